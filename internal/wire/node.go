package wire

import (
	"time"

	"flotilla/internal/catalog"
)

// Status is the answer to GET /v1/status: the node that answers.
type Status struct {
	Name     string        `json:"name"`
	ID       string        `json:"id"`
	Version  string        `json:"version"`
	Address  string        `json:"address"`
	Domain   string        `json:"dns_domain,omitempty"`
	Started  time.Time     `json:"started"`
	Uptime   float64       `json:"uptime_seconds"`
	Leader   string        `json:"leader,omitempty"` // name of the node that leads
	Store    StoreStatus   `json:"store"`
	Services int           `json:"services"`
	Revision int64         `json:"revision"` // of the newest catalog
	Held     *catalog.Hold `json:"held,omitempty"`
	// Router and DNS are missing from a node that routes no services.
	Router   *RouterStatus `json:"router,omitempty"`
	DNS      *DNSStats     `json:"dns,omitempty"`
	Problems int           `json:"problems"` // of services and of this node
	// Warnings are this node's own troubles in sentences, such as a full disk.
	Warnings []string `json:"warnings,omitempty"`
}

// Source is where the catalog that a node routes by comes from.
type Source string

// The sources of a node's catalog.
const (
	SourceNone     Source = "none"     // there is none yet
	SourceSnapshot Source = "snapshot" // the file of an earlier run; the store has not answered since
	SourceLive     Source = "live"     // the store
)

// StoreStatus is how a node stands to the store.
type StoreStatus struct {
	Live      bool      `json:"live"`      // what is known is what the store holds
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

// RouterStatus is what a node's router says of itself.
type RouterStatus struct {
	Serving    bool      `json:"serving"` // HAProxy answers and runs Applied
	Applied    int64     `json:"applied"` // catalog revision that HAProxy runs
	AppliedAt  time.Time `json:"applied_at"`
	Draining   bool      `json:"draining"` // the balancer's check answers 503
	Version    string    `json:"haproxy_version"`
	Pid        int       `json:"haproxy_pid"` // of the worker
	Generation int64     `json:"generation"`  // of the configuration file that the worker loaded
	Reloads    uint64    `json:"reloads"`     // asked for since the node started
	LastReload string    `json:"last_reload,omitempty"`
	Resyncs    uint64    `json:"resyncs"`  // full comparisons with HAProxy
	Drift      uint64    `json:"drift"`    // differences that audits found and removed
	Commands   uint64    `json:"commands"` // Runtime API commands sent
	Slots      int       `json:"slots"`    // backends declared
	FreeSlots  int       `json:"free_slots"`
	HostPorts  string    `json:"host_ports"` // "nftables" or "listeners"
	// Refused are the services of which HAProxy does not run what is wanted: for
	// each the revision that could not be applied.
	Refused map[string]int64 `json:"refused,omitempty"`
	// Problems of this node alone, such as a host_port that another program has.
	Problems []catalog.Problem `json:"problems"`
	Err      string            `json:"error,omitempty"` // why it is not serving
}

// DNSStats are the DNS server's counters since the node started.
type DNSStats struct {
	Local            uint64 `json:"local"`             // answered from the catalog
	Forwarded        uint64 `json:"forwarded"`         // answered by an upstream
	Cached           uint64 `json:"cached"`            // answered from fresh answers kept
	Stale            uint64 `json:"stale"`             // answered from expired ones: no upstream answered in time
	Errors           uint64 `json:"errors"`            // answered FORMERR, NOTIMP, REFUSED or SERVFAIL by this server itself
	Dropped          uint64 `json:"dropped"`           // not answered: no DNS question at all
	UpstreamFailures uint64 `json:"upstream_failures"` // tries of an upstream without a usable answer
	CacheEntries     int    `json:"cache_entries"`     // answers kept now
}

// Node is one node that is there.
type Node struct {
	ID         string           `json:"id"`
	Name       string           `json:"name"`
	Address    string           `json:"address"`
	Peer       string           `json:"peer,omitempty"` // ip:port for other nodes
	Version    string           `json:"version"`
	Started    time.Time        `json:"started"`
	BootID     string           `json:"boot_id"`
	Generation int64            `json:"generation"` // another one when it was away for as long as its lease
	Memory     int64            `json:"memory"`     // bytes that units may reserve
	CPU        int64            `json:"cpu"`        // thousandths of a core that units may reserve
	Counters   map[string]int64 `json:"counters,omitempty"`

	Metadata map[string]string `json:"metadata"` // its own, with what was set
	Cordon   bool              `json:"cordon,omitempty"`
	Drain    bool              `json:"drain,omitempty"`
	Reason   string            `json:"reason,omitempty"` // of cordon or drain

	RunsUnits bool `json:"runs_units"` // false where there is no systemd
	Units     int  `json:"units"`      // placed on it
	Globals   int  `json:"globals"`    // global units that run on it

	Routes   bool             `json:"routes"`            // it routes services; the rest is 0 where it does not
	Applied  int64            `json:"applied"`           // catalog revision that its router runs
	Serving  bool             `json:"serving"`           // its router routes
	Draining bool             `json:"draining"`          // its balancer's check answers 503
	Refused  map[string]int64 `json:"refused,omitempty"` // as in RouterStatus

	Leader bool `json:"leader,omitempty"`
	Here   bool `json:"here,omitempty"` // the answering node
}

// NodeRef names a node. Name and Address are empty if it is away.
type NodeRef struct {
	ID      string `json:"id"`
	Name    string `json:"name"`
	Address string `json:"address"`
}

// Nodes is the answer to GET /v1/nodes.
type Nodes struct {
	Revision int64       `json:"revision"`
	Nodes    []Node      `json:"nodes"`              // by name
	Stale    bool        `json:"stale,omitempty"`    // the store does not answer: this is what was known last
	Failover *Failover   `json:"failover,omitempty"` // while many nodes are gone
	Store    StoreHealth `json:"store"`
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

// NodeSettings are what operators want of a node.
type NodeSettings struct {
	Metadata map[string]string `json:"metadata,omitempty"` // over its own; "" hides a key of it
	Cordon   bool              `json:"cordon,omitempty"`   // nothing new is placed there
	Drain    bool              `json:"drain,omitempty"`    // out of its balancer, and its placed units move away
	Reason   string            `json:"reason,omitempty"`
}

// SettingsChange is the body of POST /v1/nodes/{node}/settings, where the node is
// its name, its ID, the beginning of its ID or its address. What is not given
// stays.
type SettingsChange struct {
	Cordon *bool   `json:"cordon,omitempty"`
	Drain  *bool   `json:"drain,omitempty"`
	Reason *string `json:"reason,omitempty"`
	// Metadata is merged into what was set: null takes the setting back, ""
	// hides the node's own value.
	Metadata map[string]*string `json:"metadata,omitempty"`
}

// SettingsChanged is the answer to it.
type SettingsChanged struct {
	Node     NodeRef           `json:"node"`
	Settings NodeSettings      `json:"settings"` // of it now
	Metadata map[string]string `json:"metadata"` // of it now, with its own
	Changed  bool              `json:"changed"`
	Revision int64             `json:"revision"`
}

// Failover says that so many nodes are gone that their units wait.
type Failover struct {
	Held    []string `json:"held,omitempty"`    // IDs of the nodes
	Until   int64    `json:"until,omitempty"`   // Unix seconds: then the engine goes on by itself
	Allowed bool     `json:"allowed,omitempty"` // somebody said: go on
}

// FailoverChange is the body of POST /v1/failover.
type FailoverChange struct {
	Allow bool `json:"allow"`
}

// FailoverChanged is the answer to POST /v1/failover.
type FailoverChanged struct {
	Failover Failover `json:"failover"`
	Revision int64    `json:"revision"`
}
