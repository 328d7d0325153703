package wire

import (
	"encoding/json"
	"iter"
	"slices"

	"flotilla/internal/catalog"
)

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

// ServiceExplanation is the answer to GET /v1/services/{name}.
type ServiceExplanation struct {
	ServiceSummary
	Shadowed bool              `json:"shadowed,omitempty"`
	Serving  []Endpoint        `json:"serving"` // the endpoints
	Keys     []ExplainedKey    `json:"keys"`
	Problem  []catalog.Problem `json:"problem_list"`
	Routes   []Route           `json:"routes"`
	Counters *ServiceCounters  `json:"counters,omitempty"`
	Nodes    []Applied         `json:"nodes"`
	Notes    []string          `json:"notes,omitempty"` // what could not be found out, and why
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
	To   string `json:"to"`   // a URL, address:port or DNS name
	Note string `json:"note,omitempty"`
}

// ServiceCounters are HAProxy's own for one service on one node, since that
// node's router began to count. They never go back while the node runs.
type ServiceCounters struct {
	Service     string  `json:"-"`
	Requests    Answers `json:"requests"`    // for tcp all 0
	Connections uint64  `json:"connections"` // sessions
	Errors      uint64  `json:"errors"`      // connection errors, response errors and aborts by the endpoint
	Retries     uint64  `json:"retries"`
	BytesIn     uint64  `json:"bytes_in"`
	BytesOut    uint64  `json:"bytes_out"`
	Active      int     `json:"active"`      // sessions now
	Queued      int     `json:"queued"`      // requests waiting for an endpoint now
	ResponseMS  float64 `json:"response_ms"` // average time to the answer's headers over the last 1,024 requests
	TotalMS     float64 `json:"total_ms"`    // average whole time over the last 1,024 requests
}

// Answers counts answers by class: [1] is 1xx to [5] for 5xx, [0] others. In JSON
// it is an object of those that are not 0: {"2xx": 12}.
type Answers [6]uint64

var classes = [6]string{"other", "1xx", "2xx", "3xx", "4xx", "5xx"}

// All yields the classes that were counted and their numbers.
func (a *Answers) All() iter.Seq2[string, uint64] {
	return func(yield func(string, uint64) bool) {
		for i, n := range a {
			if n > 0 && !yield(classes[i], n) {
				return
			}
		}
	}
}

// MarshalJSON writes the object.
func (a Answers) MarshalJSON() ([]byte, error) {
	counted := map[string]uint64{}
	for class, n := range a.All() {
		counted[class] = n
	}
	return json.Marshal(counted)
}

// UnmarshalJSON reads the object. Classes that are not known do not count.
func (a *Answers) UnmarshalJSON(raw []byte) error {
	var counted map[string]uint64
	err := json.Unmarshal(raw, &counted)
	for class, n := range counted {
		if i := slices.Index(classes[:], class); i >= 0 {
			a[i] = n
		}
	}
	return err
}

// Applied is how far one node is.
type Applied struct {
	Node     string `json:"node"`
	Revision int64  `json:"revision"` // catalog revision that its router runs
	Reached  bool   `json:"reached"`  // it is the asked revision or a newer one
	// MS is the time from the beginning of the wait, or from the acknowledged
	// write when both are one request, until the node's report was seen.
	// A node waits for up to 200 ms between two reports.
	MS float64 `json:"ms"`
}

// ServiceChange is the body of PUT /v1/services/{name}. Only what is given
// changes. In the maps a null value removes the key.
type ServiceChange struct {
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

// Written is the answer to a write of services, and to GET /v1/wait.
type Written struct {
	Revision int64     `json:"revision"` // of the write, or the service's own if nothing had to change
	Changed  bool      `json:"changed"`
	Applied  []Applied `json:"applied,omitempty"` // when the request asked to wait
}
