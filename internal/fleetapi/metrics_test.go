package fleetapi

import (
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"flotilla/internal/engine"
	"flotilla/internal/registry"
)

func TestMetrics(t *testing.T) {
	c := Collector{
		Engine: func() engine.Stats {
			return engine.Stats{Leading: true, Since: time.Unix(1700000000, 0), Units: 5, Machines: 3, Unplaced: 1, Placements: 7, Releases: 2, Failures: 4, Passes: 9}
		},
		States: func() registry.States {
			return registry.States{Units: map[string]registry.State{"a": {Active: "active"}, "b": {Active: "active"}, "c": {Active: "failed", Trouble: "no"}}}
		},
	}
	page := func(h http.Handler) string {
		w := httptest.NewRecorder()
		h.ServeHTTP(w, httptest.NewRequest("GET", "/metrics", nil))
		return w.Body.String()
	}
	r := prometheus.NewPedanticRegistry()
	r.MustRegister(c)
	holds(t, page(promhttp.HandlerFor(r, promhttp.HandlerOpts{})), `flotilla_machine_units{active="active"} 2`,
		`flotilla_machine_units{active="failed"} 1`, "flotilla_machine_units_troubled 1", "flotilla_units_unplaced 1", "flotilla_engine_leading 1")
	holds(t, page(c.Handler()), "fleet_engine_leader_start_time 1.7e+09", "fleet_engine_task_count_total 9",
		"fleet_engine_task_failure_count_total 4", "fleet_engine_reconcile_count_total 9")
}

func holds(t *testing.T, page string, lines ...string) {
	t.Helper()
	for _, line := range lines {
		if !strings.Contains(page, line+"\n") {
			t.Errorf("no %q in\n%s", line, page)
		}
	}
}
