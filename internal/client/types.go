package client

import (
	"encoding/json"
	"fmt"
	"net/http"
	"time"

	"flotilla/internal/catalog"
)

// Code says in one word what kind of error an answer is.
type Code string

// The codes of errors.
const (
	CodeBadRequest   Code = "bad_request"       // 400: the request itself is malformed
	CodeInvalid      Code = "invalid"           // 422: the catalog would refuse a value
	CodeNotFound     Code = "not_found"         // 404
	CodeNotAllowed   Code = "not_allowed"       // 405: the path takes another method
	CodeConflict     Code = "conflict"          // 409: somebody else holds it, or changed it meanwhile
	CodeUnavailable  Code = "store_unavailable" // 503: the store does not answer; nothing was written
	CodeUnknown      Code = "unknown_outcome"   // 504: it is not known whether the write was done
	CodeNotConverged Code = "not_converged"     // 504: some node has not applied the revision in time
	CodeInternal     Code = "internal"          // 500
)

var statusOf = map[Code]int{
	CodeBadRequest: http.StatusBadRequest, CodeInvalid: http.StatusUnprocessableEntity, CodeNotFound: http.StatusNotFound,
	CodeNotAllowed: http.StatusMethodNotAllowed, CodeConflict: http.StatusConflict, CodeUnavailable: http.StatusServiceUnavailable,
	CodeUnknown: http.StatusGatewayTimeout, CodeNotConverged: http.StatusGatewayTimeout, CodeInternal: http.StatusInternalServerError,
}

// Error is an error as it crosses the wire: {"error": {...}}.
type Error struct {
	Code    Code      `json:"code"`
	Message string    `json:"message"`
	Hint    string    `json:"hint,omitempty"`
	Applied []Applied `json:"applied,omitempty"` // of not_converged: every node and how far it is
	Status  int       `json:"-"`                 // of the answer, where a Client got one
}

func (e *Error) Error() string { return e.Message }

// Status returns the HTTP status of an answer with that code.
func (c Code) Status() int { return statusOf[c] }

// Errorf returns an error of that code; hint is a command or a sentence that helps,
// or "".
func Errorf(code Code, hint, format string, args ...any) *Error {
	return &Error{Code: code, Message: fmt.Sprintf(format, args...), Hint: hint}
}

// Source is where the catalog that a node routes by comes from.
type Source string

// The sources of a node's catalog.
const (
	SourceNone     Source = "none"     // there is none yet
	SourceSnapshot Source = "snapshot" // the file of an earlier run; the store has not answered since
	SourceLive     Source = "live"     // the store
)

// StoreState is how a node stands to the store.
type StoreState struct {
	Live      bool      `json:"live"`      // what is routed is what the store holds
	Source    Source    `json:"source"`    // where the catalog comes from
	Confirmed time.Time `json:"confirmed"` // when it was last proved current; zero if never
	Revision  int64     `json:"revision"`  // up to which the store was followed
	Endpoints []string  `json:"endpoints"` // of the store, the one in use first
	Held      bool      `json:"held"`      // the store holds another cluster or an older state
	Lists     uint64    `json:"lists"`     // times that everything was read
	Restarts  uint64    `json:"restarts"`  // watches started again
	Drift     uint64    `json:"drift"`     // comparisons that found something missed
	Err       string    `json:"error,omitempty"`
}

// NodeStatus is the answer to GET /v1/status.
type NodeStatus struct {
	Name     string        `json:"name"`
	Version  string        `json:"version"`
	Address  string        `json:"address"`
	Domain   string        `json:"dns_domain"`
	Started  time.Time     `json:"started"`
	Uptime   float64       `json:"uptime_seconds"`
	Store    StoreState    `json:"store"`
	Services int           `json:"services"`
	Revision int64         `json:"revision"` // of the newest catalog
	Held     *catalog.Hold `json:"held,omitempty"`
	Router   RouterState   `json:"router"`
	DNS      DNSStats      `json:"dns"`
	Problems int           `json:"problems"` // of services and of this node
	// Warnings are this node's own troubles in sentences, such as a full disk.
	Warnings []string `json:"warnings,omitempty"`
}

// RouterState is the state of a node's router.
type RouterState struct {
	Serving    bool      `json:"serving"` // HAProxy answers and runs Applied
	Applied    int64     `json:"applied"` // catalog revision that HAProxy runs
	AppliedAt  time.Time `json:"applied_at"`
	Draining   bool      `json:"draining"` // the balancer's check answers 503
	Version    string    `json:"haproxy_version"`
	Pid        int       `json:"haproxy_pid"` // of the worker
	Generation int64     `json:"generation"`  // of the configuration file that the worker loaded
	Reloads    uint64    `json:"reloads"`     // since the node started
	LastReload string    `json:"last_reload,omitempty"`
	Resyncs    uint64    `json:"resyncs"`  // full comparisons with HAProxy
	Drift      uint64    `json:"drift"`    // differences that audits found and removed
	Commands   uint64    `json:"commands"` // Runtime API commands sent
	Slots      int       `json:"slots"`    // backends declared
	FreeSlots  int       `json:"free_slots"`
	HostPorts  string    `json:"host_ports"` // "nftables" or "listeners"
	// Refused are the services of which HAProxy does not run what is wanted: for
	// each the first revision that it may lack. Applied goes on without them.
	Refused map[string]int64 `json:"refused,omitempty"`
	// Problems of this node alone, such as a host_port that another program has.
	Problems []catalog.Problem `json:"problems"`
	Err      string            `json:"error,omitempty"` // why it is not serving
}

// DNSStats are the DNS server's counters since the node started.
type DNSStats struct {
	Local            uint64 `json:"local"`     // answered from the catalog
	Forwarded        uint64 `json:"forwarded"` // answered by an upstream
	Cached           uint64 `json:"cached"`
	Stale            uint64 `json:"stale"`   // answered from expired answers: no upstream answered in time
	Errors           uint64 `json:"errors"`  // answered with an error by this server itself
	Dropped          uint64 `json:"dropped"` // no DNS questions
	UpstreamFailures uint64 `json:"upstream_failures"`
	CacheEntries     int    `json:"cache_entries"`
}

// NodeRecord is the value of /flotilla/nodes/<name>, which lives as long as the
// node does.
type NodeRecord struct {
	V        int       `json:"v"`
	Name     string    `json:"name"`
	Address  string    `json:"address"`
	Version  string    `json:"version"`
	Started  time.Time `json:"started"`
	Applied  int64     `json:"applied"` // catalog revision that its router runs
	Serving  bool      `json:"serving"`
	Draining bool      `json:"draining"`
	// Services that its router could not bring to Applied; see RouterState.
	Refused map[string]int64 `json:"refused,omitempty"`
}

// ServiceSummary is one line of GET /v1/services.
type ServiceSummary struct {
	Name      string   `json:"name"`
	Scheme    string   `json:"scheme"` // "" when the service is not routable
	Endpoints int      `json:"endpoints"`
	Draining  int      `json:"draining"`
	HostPort  int      `json:"host_port,omitempty"`
	Private   bool     `json:"private,omitempty"`
	Domains   []string `json:"domains,omitempty"`
	Problems  int      `json:"problems"`
	Revision  int64    `json:"revision"`
}

// Endpoint is one endpoint of an explained service.
type Endpoint struct {
	Name    string `json:"name"`
	Address string `json:"address"`
	Weight  int    `json:"weight"`
	Drain   bool   `json:"drain,omitempty"`
	Zone    string `json:"zone,omitempty"`
}

// ExplainedKey is one key of a service and what it does.
type ExplainedKey struct {
	Key     string `json:"key"` // the full key
	Value   string `json:"value"`
	InForce string `json:"in_force,omitempty"` // the earlier value that is used in its place
	Held    bool   `json:"held,omitempty"`     // deleted, but the deletion is held back; see Held of the status
	Meaning string `json:"meaning"`
}

// Route is one way to reach a service.
type Route struct {
	Kind string `json:"kind"` // host, path, domain, host_port or dns
	To   string `json:"to"`   // a URL, address:port or DNS name; <address> stands for any node's
	Note string `json:"note,omitempty"`
}

// Counters are HAProxy's own for one service on the answering node, since that
// node's router began to count.
type Counters struct {
	Requests    map[string]uint64 `json:"requests"` // by class of the answer: 2xx ...
	Connections uint64            `json:"connections"`
	Errors      uint64            `json:"errors"`
	Retries     uint64            `json:"retries"`
	BytesIn     uint64            `json:"bytes_in"`
	BytesOut    uint64            `json:"bytes_out"`
	Active      int               `json:"active"`
	Queued      int               `json:"queued"`
	ResponseMS  float64           `json:"response_ms"`
	TotalMS     float64           `json:"total_ms"`
}

// Explanation is the answer to GET /v1/services/{name}.
type Explanation struct {
	ServiceSummary
	Shadowed bool              `json:"shadowed,omitempty"`
	Serving  []Endpoint        `json:"serving"` // the endpoints
	Keys     []ExplainedKey    `json:"keys"`
	Problem  []catalog.Problem `json:"problem_list"`
	Routes   []Route           `json:"routes"`
	Counters *Counters         `json:"counters,omitempty"`
	Nodes    []Applied         `json:"nodes"`
	Notes    []string          `json:"notes,omitempty"` // what could not be found out, and why
}

// Applied is how far one node is.
type Applied struct {
	Node     string `json:"node"`
	Revision int64  `json:"revision"` // catalog revision that its router runs
	Reached  bool   `json:"reached"`  // it is the asked revision or a newer one
	// MS is the time from the beginning of the wait, or from the acknowledged
	// write when both are one request, until the node's report was seen.
	// Reports are written at most every 200 ms.
	MS float64 `json:"ms"`
}

// Change is the body of PUT /v1/services/{name}. Only what is given changes.
// In the maps a null value removes the key.
type Change struct {
	Scheme       *string            `json:"scheme,omitempty"`        // "" removes it
	Endpoints    map[string]*string `json:"endpoints,omitempty"`     // <n>: "ip:port"
	AddEndpoints []string           `json:"add_endpoints,omitempty"` // "ip:port", named by the next free number
	HostPort     *int               `json:"host_port,omitempty"`     // 0 removes it
	Private      *bool              `json:"private,omitempty"`
	Domains      *[]string          `json:"domains,omitempty"` // the complete list
	AddDomains   []string           `json:"add_domains,omitempty"`
	DropDomains  []string           `json:"drop_domains,omitempty"`
	// Options are merged into those that are there.
	Options map[string]json.RawMessage `json:"options,omitempty"`
	// Meta is merged into the meta data of each endpoint: weight, drain, zone.
	Meta map[string]map[string]json.RawMessage `json:"meta,omitempty"`
}

// Written is the answer to a write.
type Written struct {
	Revision int64     `json:"revision"` // of the write, or the service's own if nothing had to change
	Changed  bool      `json:"changed"`
	Applied  []Applied `json:"applied,omitempty"` // when the request asked to wait
}

// ClusterNode is one node of GET /v1/nodes.
type ClusterNode struct {
	NodeRecord
	Self bool `json:"self,omitempty"` // the answering node
}

// Nodes is the answer to GET /v1/nodes.
type Nodes struct {
	Nodes []ClusterNode `json:"nodes"` // by name; empty when the store does not answer
	Store StoreHealth   `json:"store"`
}

// StoreHealth is the state of the store.
type StoreHealth struct {
	Cluster string   `json:"cluster"` // id, hexadecimal; "" not known
	Quorum  bool     `json:"quorum"`  // the members were read linearizably
	Members []Member `json:"members"` // by name
	Err     string   `json:"err"`     // why there is no quorum; "" when there is
}

// Member is one etcd of the store, and how it answered.
type Member struct {
	Name      string        `json:"name"` // "" until it has started once
	ID        string        `json:"id"`   // hexadecimal, as etcdctl writes it
	Endpoint  string        `json:"endpoint"`
	Learner   bool          `json:"learner"` // not a voter
	Leader    bool          `json:"leader"`
	Reachable bool          `json:"reachable"`
	Version   string        `json:"version"`  // of etcd
	DBSize    int64         `json:"db_size"`  // bytes of the file
	DBInUse   int64         `json:"db_inuse"` // bytes of it that hold data
	Quota     int64         `json:"quota"`    // bytes that the file may reach; 0 not known
	Latency   time.Duration `json:"latency"`  // of the question, in nanoseconds
	Err       string        `json:"err"`      // what is wrong with it; "" if nothing is
}
