package fleetapi

import (
	"net/http"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"flotilla/internal/engine"
	"flotilla/internal/registry"
)

func desc(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc("flotilla_"+name, help, labels, nil)
}

var (
	descLeading    = desc("engine_leading", "1 on the node whose engine places units.")
	descPlacements = desc("engine_placements_total", "Units that this node's engine placed.")
	descReleases   = desc("engine_releases_total", "Units that this node's engine told to leave their machine.")
	descFailures   = desc("engine_failures_total", "Steps that this node's engine could not write as planned; it plans them again.")
	descPlan       = desc("engine_last_plan_seconds", "Time that the last plan took.")
	descKnown      = desc("units_known", "Units that the leading engine knows; only on its node.")
	descUnplaced   = desc("units_unplaced", "Units that should run and have no machine; only on the leader's node.")
	descMachines   = desc("machines", "Machines that are there; only on the leader's node.")
	descUnits      = desc("machine_units", "Units on this machine, by systemd's active state.", "active")
	descTroubled   = desc("machine_units_troubled", "Units that cannot run on this machine.")
)

// fleetNames are the names that fleet gave to the same.
var fleetNames = struct{ since, tasks, failed, passes *prometheus.Desc }{
	prometheus.NewDesc("fleet_engine_leader_start_time", "Start time of leadership, Unix seconds; 0 on followers.", nil, nil),
	prometheus.NewDesc("fleet_engine_task_count_total", "Changes of placements.", nil, nil),
	prometheus.NewDesc("fleet_engine_task_failure_count_total", "Changes of placements that failed.", nil, nil),
	prometheus.NewDesc("fleet_engine_reconcile_count_total", "Passes of the engine.", nil, nil),
}

// Collector gives figures about units and machines.
type Collector struct {
	Engine func() engine.Stats
	States func() registry.States // of this machine
	fleet  bool
}

// Handler serves the figures under the names that fleet gave them.
func (c Collector) Handler() http.Handler {
	c.fleet = true
	r := prometheus.NewRegistry()
	r.MustRegister(c)
	return promhttp.HandlerFor(r, promhttp.HandlerOpts{})
}

// Describe sends nothing: which states units have is not known before.
func (c Collector) Describe(chan<- *prometheus.Desc) {}

// Collect reads the engine and the agent once.
func (c Collector) Collect(out chan<- prometheus.Metric) {
	gauge := func(d *prometheus.Desc, v float64, labels ...string) {
		out <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
	}
	counter := func(d *prometheus.Desc, v uint64) {
		out <- prometheus.MustNewConstMetric(d, prometheus.CounterValue, float64(v))
	}
	e := c.Engine()
	if c.fleet {
		since := 0.0
		if e.Leading {
			since = float64(e.Since.UnixMilli()) / 1000
		}
		gauge(fleetNames.since, since)
		counter(fleetNames.tasks, e.Placements+e.Releases)
		counter(fleetNames.failed, e.Failures)
		counter(fleetNames.passes, e.Passes)
		return
	}
	leading := 0.0
	if e.Leading {
		leading = 1
		gauge(descKnown, float64(e.Units))
		gauge(descUnplaced, float64(e.Unplaced))
		gauge(descMachines, float64(e.Machines))
	}
	gauge(descLeading, leading)
	counter(descPlacements, e.Placements)
	counter(descReleases, e.Releases)
	counter(descFailures, e.Failures)
	gauge(descPlan, e.LastPass.Seconds())
	active := map[string]int{}
	troubled := 0
	for _, s := range c.States().Units {
		if s.Active != "" {
			active[s.Active]++
		}
		if s.Trouble != "" {
			troubled++
		}
	}
	for state, n := range active {
		gauge(descUnits, float64(n), state)
	}
	gauge(descTroubled, float64(troubled))
}
