// Package catalog is what the cluster offers: services and the endpoints that
// serve them, read from the keys under /services/. It parses and validates
// those keys and turns them into immutable snapshots. It knows no etcd, no
// HAProxy, no DNS and no clock.
package catalog

import (
	"net/netip"
	"time"
)

// Prefix is the key prefix under which services are registered.
const Prefix = "/services/"

// Scheme says how a service is spoken to.
type Scheme string

// The schemes that a service's /scheme key may hold.
const (
	HTTP         Scheme = "http"           // port 80
	TCP          Scheme = "tcp"            // host_port only
	HTTPS        Scheme = "https"          // port 443, port 80 redirects to it
	HTTPAndHTTPS Scheme = "http-and-https" // both ports
)

// IsHTTP reports whether the router speaks HTTP for this scheme.
func (s Scheme) IsHTTP() bool { return s == HTTP || s == HTTPS || s == HTTPAndHTTPS }

// Service is one service as every node sees it. It is immutable once it is part
// of a Snapshot: readers share it and must not change it.
type Service struct {
	Name      string     // always printable ASCII; an invalid name is shown quoted and shortened here
	Scheme    Scheme     // "" while the service has no usable scheme: nothing is routed
	Endpoints []Endpoint // sorted by Name; no two have the same Addr
	HostPort  int        // port on every node; 0 for none, or when another service holds it
	Private   bool       // no public route by host or path
	Shadowed  bool       // another service holds the name (they differ only in case): no route by host or path
	Domains   []string   // custom domains that this service holds, lower case, exact or "*.example.com"
	Options   Options
	Problems  []Problem // what is wrong with this service's keys; empty when all is well
	Keys      []Key     // every key below /services/<name>/, sorted
	Revision  int64     // highest modification revision among Keys
}

// Routable reports whether the service has a usable scheme.
func (s *Service) Routable() bool { return s.Scheme != "" }

// Endpoint is one address that serves a service.
type Endpoint struct {
	Name   string         // the <n> of hosts/<n>, quoted if it is not printable ASCII
	Addr   netip.AddrPort // never unspecified, multicast or link-local; port 1 to 65535
	Weight int            // 0 to 256, share of the traffic relative to the others; 100 unless set
	Drain  bool           // takes no new clients; those bound to it by a cookie stay, running requests finish
	Zone   string         // free text, "" unless set
}

// Balance is how requests are spread over a service's endpoints.
type Balance string

// The balance algorithms that options may name.
const (
	LeastConn      Balance = "leastconn" // the default
	RoundRobin     Balance = "roundrobin"
	ConsistentHash Balance = "consistent-hash" // by client address
)

// Options are the settings of /services/<name>/options. The zero value means
// "as usual" for each of them.
type Options struct {
	StripPath      bool          // /web/x reaches the endpoint as /x
	Sticky         bool          // keep a client on one endpoint by a cookie (http only)
	Balance        Balance       // "" is LeastConn
	TimeoutServer  time.Duration // longest silence of an endpoint; 0 is the router's default
	TimeoutTunnel  time.Duration // longest silence of a WebSocket; 0 is the router's default
	MaxConnections int           // concurrent connections per endpoint; 0 is no limit
	NoRetries      bool          // never send a request to a second endpoint
	H2C            bool          // speak HTTP/2 without TLS to the endpoints (gRPC)
	SendProxy      bool          // announce the client with PROXY protocol v2
}

// Key is one raw key of a service as the store holds it. Name and Value are
// what somebody wrote and may hold anything: pass them through Show before a
// person sees them.
type Key struct {
	Name           string // below /services/<service>/, such as "hosts/1"; "" for /services/<service> itself
	Value          string // as written, not validated; cut after 16 KiB
	Good           string // the last value that was valid; "" if there was none or Value itself is valid
	HasGood        bool   // Good is in force in place of Value
	Held           bool   // the store has lost this key, and the loss is held back (Snapshot.Held)
	CreateRevision int64
	ModRevision    int64
}

// Problem is one thing that is wrong with a key, said so that the writer of the
// key can mend it.
type Problem struct {
	Key    string `json:"key"`    // the full key, such as /services/web/hosts/1
	Value  string `json:"value"`  // what it holds, shortened and quoted if it is not printable
	Reason string `json:"reason"` // what is wrong
	Remedy string `json:"remedy"` // what to do about it
}
