package api

import (
	"strings"
	"testing"
	"time"

	"flotilla/internal/engine"
	"flotilla/internal/state"
)

// The API's socket has the node's metrics too, also under the names that fleet
// gave to some of them.
func TestUnitMetrics(t *testing.T) {
	w := newWorld(t)
	w.Server.Engine = func() engine.Stats {
		return engine.Stats{Leading: true, Since: time.Unix(1700000000, 0), Units: 5, Nodes: 3, Unplaced: 1, Placements: 7, Releases: 2, Failures: 4, Passes: 9}
	}
	w.Server.Report = func() state.UnitsReport {
		return state.UnitsReport{Units: map[string]state.UnitState{"a": {Active: "active"}, "b": {Active: "active"}, "c": {Active: "failed", Trouble: "no"}}}
	}
	page := w.Do("GET", "/metrics", nil, "").Body
	for _, line := range []string{`flotilla_node_units{active="active"} 2`,
		`flotilla_node_units{active="failed"} 1`, "flotilla_node_units_troubled 1", "flotilla_units_unplaced 1", "flotilla_nodes 3", "flotilla_engine_leading 1",
		"fleet_engine_leader_start_time 1.7e+09", "fleet_engine_task_count_total 9", "fleet_engine_task_failure_count_total 4", "fleet_engine_reconcile_count_total 9"} {
		if !strings.Contains(page, line+"\n") {
			t.Errorf("no %q in\n%s", line, page)
		}
	}
}
