// Package router makes the local HAProxy equal the catalog. It knows services,
// endpoints and HAProxy; it must not know etcd, DNS or unit files.
package router

import (
	"context"
	"log/slog"
	"net/netip"
	"time"

	"flotilla/internal/catalog"
)

// Config is what a node decides about its router.
type Config struct {
	Node           string     // the node's name, shown on error pages
	Address        netip.Addr // every listener binds to it
	HTTPPort       int        // default 80
	HTTPSPort      int        // default 443
	BalancerPort   int        // health check of the balancer before the nodes, metrics; default 9180
	RedirectPort   int        // where nftables sends TCP host_ports; the next port takes HTTP host_ports; default 9181
	SNIPort        int        // TLS passthrough by server name; 0: none
	Dir            string     // HAProxy's configuration, maps, sockets and certificates
	Certs          string     // directory of certificates, "" for none
	OpsSocket      string     // unix socket that serves /healthz, /readyz, /freshz and /metrics
	Binary         string     // HAProxy; default: found in PATH
	Supervise      bool       // start and restart HAProxy ourselves; false under systemd
	TrustedProxies []netip.Prefix
	AcceptProxy    bool   // every HTTP and HTTPS connection begins with a PROXY protocol header
	AccessLog      string // "off" (default), "stdout", a syslog socket's path or ip:port
	HostPorts      string // how host_ports open: "auto" (default), "nftables" or "listeners"
	MaxConnections int    // 0: from the limit of open files
}

// Status is what the router says of itself.
type Status struct {
	Serving    bool      `json:"serving"` // HAProxy answers and runs Applied
	Applied    int64     `json:"applied"` // catalog revision that HAProxy runs
	AppliedAt  time.Time `json:"applied_at"`
	Draining   bool      `json:"draining"` // the balancer's check answers 503
	Version    string    `json:"haproxy_version"`
	Pid        int       `json:"haproxy_pid"` // of the worker
	Generation int64     `json:"generation"`  // of the configuration file that the worker loaded
	Reloads    uint64    `json:"reloads"`     // asked by us since the node started
	LastReload string    `json:"last_reload,omitempty"`
	Resyncs    uint64    `json:"resyncs"`   // full comparisons with HAProxy
	Drift      uint64    `json:"drift"`     // differences that audits found and removed
	Commands   uint64    `json:"commands"`  // Runtime API commands sent
	Slots      int       `json:"slots"`     // backends declared
	FreeSlots  int       `json:"free_slots"`
	HostPorts  string    `json:"host_ports"` // "nftables" or "listeners"
	// Problems of this node alone, such as a host_port that another program has.
	Problems []catalog.Problem `json:"problems"`
	Err      string            `json:"error,omitempty"` // why it is not serving
}

// ServiceStats are HAProxy's own counters for one service since this node's
// router began to count; they never go back while the node runs.
type ServiceStats struct {
	Service        string
	Requests       [6]uint64 // answers by class: [1] is 1xx .. [5] is 5xx, [0] other; for tcp all zero
	Connections    uint64    // sessions
	Errors         uint64    // connection errors, response errors and aborts by the endpoint
	Retries        uint64
	BytesIn        uint64
	BytesOut       uint64
	Active         int     // sessions now
	Queued         int     // requests waiting for an endpoint now
	ResponseMillis float64 // average time to the answer's headers over the last 1,024 requests
	TotalMillis    float64 // average whole time over the last 1,024 requests
}

// Router drives one HAProxy. Make it with New and start it with Run.
type Router struct {
	cfg  Config
	feed *catalog.Feed
	log  *slog.Logger
}

// New returns a router for cfg that follows feed.
func New(cfg Config, feed *catalog.Feed, log *slog.Logger) (*Router, error) {
	return &Router{cfg: cfg, feed: feed, log: log}, nil
}

// Run keeps HAProxy equal to the feed until ctx ends.
func (r *Router) Run(ctx context.Context) error { <-ctx.Done(); return nil }

// Status returns the router's state now. It never blocks.
func (r *Router) Status() Status { return Status{} }

// Applied returns the catalog revision that HAProxy runs and a channel that is
// closed when it changes.
func (r *Router) Applied() (int64, <-chan struct{}) { return 0, nil }

// SetDraining makes the balancer's check answer 503, or 200 again. It outlives
// restarts of the node.
func (r *Router) SetDraining(draining bool) error { return nil }

// Stats reads every service's counters from HAProxy.
func (r *Router) Stats(ctx context.Context) ([]ServiceStats, error) { return nil, nil }
