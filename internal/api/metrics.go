package api

import (
	"context"
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"flotilla/internal/wire"
)

// scrapeLimit bounds how long a scrape waits for HAProxy's counters.
const scrapeLimit = 5 * time.Second

// metrics are the node's, collected when they are asked for. Only the
// propagation histogram is counted as things happen.
type metrics struct {
	http.Handler
	s           *Server
	propagation prometheus.Histogram
}

func desc(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc("flotilla_"+name, help, labels, nil)
}

// What is collected more than once in a scrape, or has a name that fleet gave it.
var (
	descRequests    = desc("service_requests_total", "Answers that HAProxy gave for a service, by class of the status code (2xx ...).", "service", "code")
	descConnections = desc("service_connections_total", "Sessions that HAProxy handed to a service.", "service")
	descErrors      = desc("service_errors_total", "Connection errors, broken answers and aborts by a service's endpoints.", "service")
	descRetries     = desc("service_retries_total", "Connection attempts that were repeated.", "service")
	descBytes       = desc("service_bytes_total", "Bytes to (in) and from (out) a service.", "service", "direction")
	descSessions    = desc("service_sessions", "Sessions of a service now.", "service")
	descQueued      = desc("service_queued", "Requests that wait for an endpoint of a service now.", "service")
	descResponse    = desc("service_response_seconds", "Average time to an answer's headers over the last 1,024 requests.", "service")
	descTotal       = desc("service_total_seconds", "Average whole time of the last 1,024 requests.", "service")
	descEndpoints   = desc("service_endpoints", "Endpoints of a service, by whether they take new connections.", "service", "state")

	descSlots     = desc("router_slots", "Backends declared in HAProxy, by whether a service has them.", "state")
	descScrapeBad = desc("service_scrape_failed", "1 if HAProxy's counters could not be read for this scrape.")

	descUnits = desc("node_units", "Units on this node, by systemd's active state.", "active")

	descFleetSince  = prometheus.NewDesc("fleet_engine_leader_start_time", "Start time of leadership, Unix seconds; 0 on followers.", nil, nil)
	descFleetTasks  = prometheus.NewDesc("fleet_engine_task_count_total", "Changes of placements.", nil, nil)
	descFleetFailed = prometheus.NewDesc("fleet_engine_task_failure_count_total", "Changes of placements that failed.", nil, nil)
	descFleetPasses = prometheus.NewDesc("fleet_engine_reconcile_count_total", "Passes of the engine.", nil, nil)
)

func newMetrics(s *Server) *metrics {
	m := &metrics{s: s}
	m.propagation = prometheus.NewHistogram(prometheus.HistogramOpts{
		Name: "flotilla_propagation_seconds",
		Help: "Time from a watch event's arrival on this node until HAProxy ran it. How long the event took to get here from the writer's node is not in it: the clocks of two nodes differ by more.",
		// 0.5 ms to 8 s
		Buckets: prometheus.ExponentialBuckets(0.0005, 2, 15),
	})
	registry := prometheus.NewRegistry()
	registry.MustRegister(m, m.propagation, collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	m.Handler = promhttp.HandlerFor(registry, promhttp.HandlerOpts{ErrorHandling: promhttp.ContinueOnError})
	return m
}

// Describe sends nothing: which metrics there are depends on the catalog.
func (m *metrics) Describe(chan<- *prometheus.Desc) {}

// Collect reads every component once.
func (m *metrics) Collect(out chan<- prometheus.Metric) {
	gauge := func(d *prometheus.Desc, v float64, labels ...string) {
		out <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
	}
	counter := func(d *prometheus.Desc, v uint64, labels ...string) {
		out <- prometheus.MustNewConstMetric(d, prometheus.CounterValue, float64(v), labels...)
	}
	st := m.s.status()
	m.collectNode(st, gauge, counter)
	m.collectUnits(gauge, counter)
	if m.s.Catalog != nil {
		m.collectRouter(*st.Router, gauge, counter)
		m.collectServices(gauge, counter)
		m.collectDNS(*st.DNS, gauge, counter)
	}
}

func (m *metrics) collectDNS(d wire.DNSStats, gauge gaugeFunc, counter counterFunc) {
	queries := map[string]uint64{"local": d.Local, "forwarded": d.Forwarded, "cached": d.Cached, "stale": d.Stale, "error": d.Errors, "dropped": d.Dropped}
	for answered, n := range queries {
		counter(desc("dns_queries_total", "DNS questions by how they were answered.", "answered"), n, answered)
	}
	counter(desc("dns_upstream_failures_total", "Tries of an upstream resolver that failed."), d.UpstreamFailures)
	gauge(desc("dns_cache_entries", "Answers of upstream resolvers in the cache."), float64(d.CacheEntries))
}

// collectUnits reads the engine and what runs on this node.
func (m *metrics) collectUnits(gauge gaugeFunc, counter counterFunc) {
	if m.s.Engine != nil {
		e := m.s.Engine()
		since := 0.0
		if e.Leading {
			since = float64(e.Since.UnixMilli()) / 1000
			gauge(desc("units_known", "Units that the leading engine knows; only on its node."), float64(e.Units))
			gauge(desc("units_unplaced", "Units that should run and have no node; only on the leader's node."), float64(e.Unplaced))
			gauge(desc("nodes", "Nodes that run units; only on the leader's node."), float64(e.Nodes))
		}
		gauge(desc("engine_leading", "1 on the node whose engine places units."), one(e.Leading))
		counter(desc("engine_placements_total", "Units that this node's engine placed."), e.Placements)
		counter(desc("engine_releases_total", "Units that this node's engine told to leave their node."), e.Releases)
		counter(desc("engine_failures_total", "Steps that this node's engine could not write as planned; it plans them again."), e.Failures)
		gauge(desc("engine_last_plan_seconds", "Time that the last plan took."), e.LastPass.Seconds())
		gauge(descFleetSince, since)
		counter(descFleetTasks, e.Placements+e.Releases)
		counter(descFleetFailed, e.Failures)
		counter(descFleetPasses, e.Passes)
	}
	if m.s.Report == nil {
		return
	}
	active, troubled := map[string]int{}, 0
	for _, u := range m.s.Report().Units {
		if u.Active != "" {
			active[u.Active]++
		}
		if u.Trouble != "" {
			troubled++
		}
	}
	for state, n := range active {
		gauge(descUnits, float64(n), state)
	}
	gauge(desc("node_units_troubled", "Units that cannot run on this node."), float64(troubled))
}

type gaugeFunc func(d *prometheus.Desc, v float64, labels ...string)
type counterFunc func(d *prometheus.Desc, v uint64, labels ...string)

func (m *metrics) collectRouter(r wire.RouterStatus, gauge gaugeFunc, counter counterFunc) {
	gauge(desc("router_serving", "1 while HAProxy answers and runs the applied catalog."), one(r.Serving))
	gauge(desc("router_draining", "1 while the balancer's check answers 503 on request."), one(r.Draining))
	gauge(desc("applied_revision", "Store revision of the catalog that HAProxy runs."), float64(r.Applied))
	counter(desc("reloads_total", "Reloads of HAProxy asked for since the node started."), r.Reloads)
	counter(desc("router_resyncs_total", "Full comparisons with HAProxy."), r.Resyncs)
	counter(desc("router_drift_total", "Differences in HAProxy that audits found and removed."), r.Drift)
	counter(desc("router_commands_total", "Runtime API commands sent to HAProxy."), r.Commands)
	gauge(descSlots, float64(r.Slots-r.FreeSlots), "used")
	gauge(descSlots, float64(r.FreeSlots), "free")
}

func (m *metrics) collectNode(st wire.Status, gauge gaugeFunc, counter counterFunc) {
	haproxy := ""
	if st.Router != nil {
		haproxy = st.Router.Version
	}
	gauge(desc("node_info", "Always 1; the labels name the node and the versions it runs.", "node", "version", "haproxy_version"), 1, st.Name, st.Version, haproxy)
	gauge(desc("services", "Services in the catalog, routable or not."), float64(st.Services))
	gauge(desc("problems", "Keys with a problem, of all services and of this node."), float64(st.Problems))

	confirmed := 0.0
	if !st.Store.Confirmed.IsZero() {
		confirmed = float64(st.Store.Confirmed.UnixMilli()) / 1000
	}
	gauge(desc("store_last_confirmed_seconds", "Unix time when the catalog was last proved current; 0 if never."), confirmed)
	gauge(desc("store_live", "1 while the catalog is proved current."), one(st.Store.Live))
	gauge(desc("store_revision", "Store revision up to which the watch was followed."), float64(st.Store.Revision))
	counter(desc("store_drift_total", "Periodic comparisons with the store that found a missed change. It must stay 0."), st.Store.Drift)
	counter(desc("store_watch_restarts_total", "Watches of the store that had to be started again."), st.Store.Restarts)
	counter(desc("store_lists_total", "Full reads of the catalog from the store."), st.Store.Lists)
	gauge(desc("state_revision", "Store revision of the newest catalog on this node."), float64(st.Revision))
	for _, source := range []wire.Source{wire.SourceNone, wire.SourceSnapshot, wire.SourceLive} {
		gauge(desc("state_source", "1 for the source of the catalog: live, snapshot (disk) or none.", "source"), one(st.Store.Source == source), string(source))
	}
	held := 0
	if st.Held != nil {
		held = st.Held.Removed
	}
	gauge(desc("held_endpoints", "Endpoints that vanished at once and stay routed until that is confirmed."), float64(held))
}

func (m *metrics) collectServices(gauge gaugeFunc, counter counterFunc) {
	for svc := range m.s.Catalog.Latest().All() {
		if !svc.Routable() {
			continue
		}
		sum := summary(svc)
		gauge(descEndpoints, float64(sum.Endpoints-sum.Draining), sum.Name, "open")
		if sum.Draining > 0 {
			gauge(descEndpoints, float64(sum.Draining), sum.Name, "draining")
		}
	}
	ctx, cancel := context.WithTimeout(context.Background(), scrapeLimit)
	defer cancel()
	stats, err := m.s.Router.Stats(ctx)
	gauge(descScrapeBad, one(err != nil))
	for _, st := range stats {
		for class, n := range st.Requests.All() {
			counter(descRequests, n, st.Service, class)
		}
		counter(descConnections, st.Connections, st.Service)
		counter(descErrors, st.Errors, st.Service)
		counter(descRetries, st.Retries, st.Service)
		counter(descBytes, st.BytesIn, st.Service, "in")
		counter(descBytes, st.BytesOut, st.Service, "out")
		gauge(descSessions, float64(st.Active), st.Service)
		gauge(descQueued, float64(st.Queued), st.Service)
		gauge(descResponse, st.ResponseMS/1000, st.Service)
		gauge(descTotal, st.TotalMS/1000, st.Service)
	}
}

func one(yes bool) float64 {
	if yes {
		return 1
	}
	return 0
}

// Propagated counts one change that HAProxy runs, took after its watch event
// arrived on this node.
func (s *Server) Propagated(took time.Duration) { s.metrics.propagation.Observe(took.Seconds()) }
