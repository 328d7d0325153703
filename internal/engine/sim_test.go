package engine

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"flotilla/internal/state"
	"flotilla/internal/unit"
)

// TestSimulation lives through random events with 1,000 nodes and 100,000 units,
// and holds what is in the records against the rules. The small one does so more
// often, and with one who knows the records alone.
func TestSimulation(t *testing.T) {
	t.Run("small", func(t *testing.T) { simulate(t, 100, 5_000, 300, true) })
	if !testing.Short() {
		t.Run("full", func(t *testing.T) { simulate(t, 1000, 100_000, 30, false) })
	}
}

func simulate(t *testing.T, nodes, units, events int, often bool) {
	w := crowd(nodes, units)
	r := rand.New(rand.NewPCG(4, 2))
	settle := func() (steps []Step) {
		t.Helper()
		steps, err := w.settleFast()
		if err != nil {
			t.Fatal(err)
		}
		return steps
	}
	began := time.Now()
	settle()
	t.Logf("placed after %v", time.Since(began))

	ids := slices.Sorted(maps.Keys(w.snapshot().Nodes))
	names := slices.Sorted(maps.Keys(w.snapshot().Units))
	gone := map[string]string{} // records of nodes that are not there
	var slowest time.Duration
	for i := range events {
		touched := map[string]bool{} // units that have a cause to move
		lost := func(id string) {
			for name, u := range w.snapshot().Units {
				if u.Placement.Value.Node == id {
					touched[name] = true
				}
			}
		}
		id, name := ids[r.IntN(len(ids))], names[r.IntN(len(names))]
		switch n := r.IntN(12); {
		case n < 2 && gone[id] == "" && len(gone) < nodes/20:
			lost(id)
			gone[id] = w.records[keys.Node(id)].Value
			w.del(keys.Node(id))
		case n < 5 && len(gone) > 0:
			id = slices.Min(slices.Collect(maps.Keys(gone)))
			w.put(keys.Node(id), gone[id])
			delete(gone, id)
		case n < 6:
			lost(id)
			w.settings(id, func(s *state.Settings) {
				s.Metadata["disk"] = []string{"", "ssd", "hdd"}[r.IntN(3)]
				s.Drain = r.IntN(10) == 0
			})
		case n < 8:
			touched[name] = true
			w.desire(name, unit.Inactive)
			w.agent(name)
		case n < 11:
			w.desire(name, unit.Launched)
		default:
			w.unit(fmt.Sprintf("new-%d.service", i), unit.Launched, "Conflicts=new-*", "MemoryReserve=1G")
		}
		w.now = w.now.Add(time.Minute)
		planning := time.Now()
		first := w.plan()
		slowest = max(slowest, time.Since(planning))
		for _, s := range first {
			if err := w.apply(s); err != nil {
				t.Fatal(err)
			}
		}
		w.letGo(first)
		// Who leaves without being on a node that something happened to is a
		// follower.
		for _, s := range append(first, settle()...) {
			if s.Do == Leave && !touched[s.Unit] && !strings.HasPrefix(s.Unit, "side-") {
				t.Fatalf("event %d: without cause: %s", i, s)
			}
		}
		if often && i%50 == 0 {
			w.checkPlaces(t)
		}
	}
	w.checkPlaces(t)
	if often {
		for _, s := range Plan(Input{Snapshot: w.load(), Now: w.now}).Steps {
			t.Errorf("one who knows the records alone would: %s", s)
		}
	}
	t.Logf("the slowest plan took %v", slowest)
}

// settleFast is settle for many records: nodes look only at what the steps are about.
func (w *world) settleFast() ([]Step, error) {
	var all []Step
	for range 20 {
		steps := w.plan()
		for _, s := range steps {
			if err := w.apply(s); err != nil {
				return all, err
			}
		}
		all = append(all, steps...)
		if len(steps) == 0 {
			return all, nil
		}
		w.letGo(steps)
	}
	return all, fmt.Errorf("there is no end of it: %v", all[max(0, len(all)-5):])
}

// letGo has nodes do what the steps tell them.
func (w *world) letGo(steps []Step) {
	for _, s := range steps {
		if s.Do == Leave {
			w.agent(s.Unit)
		}
	}
}

// checkPlaces holds all records against the rules; what crowd does not use is
// not looked at.
func (w *world) checkPlaces(t *testing.T) {
	t.Helper()
	m := w.model()
	memory := map[string]int64{}
	lonely := map[string]string{}
	for name, p := range m.placements {
		req := m.req[name]
		if m.created[p.Node] == 0 {
			if m.unplaced[name] == "" {
				t.Errorf("%s is on %s, which is gone", name, p.Node)
			}
			continue
		}
		memory[p.Node] += req.Memory
		if why := req.Mismatch(p.Node, m.metadata[p.Node]); why != "" {
			t.Errorf("%s on %s: %s", name, p.Node, why)
		}
		if m.settings[p.Node].Drain {
			t.Errorf("%s on %s, which is drained", name, p.Node)
		}
		if kind, _, _ := strings.Cut(name, "-"); kind == "lonely" || kind == "new" {
			if other := lonely[kind+p.Node]; other != "" {
				t.Errorf("%s and %s are together on %s", name, other, p.Node)
			}
			lonely[kind+p.Node] = name
		}
		for _, peer := range req.MachineOf {
			if m.placements[peer].Node != p.Node {
				t.Errorf("%s on %s is not with %s on %q", name, p.Node, peer, m.placements[peer].Node)
			}
		}
		if p.Approved != hashOf(m.units[name].Text) || p.Generation != m.created[p.Node] || p.Leave != "" {
			t.Errorf("placement of %s is %+v", name, p)
		}
	}
	for id, n := range memory {
		if n > m.nodes[id].Memory {
			t.Errorf("%d bytes are reserved on %s", n, id)
		}
	}
	for name := range m.units {
		if _, placed := m.placements[name]; m.wanted(name) && !placed && m.unplaced[name] == "" {
			t.Errorf("%s is nowhere without explanation", name)
		}
	}
}
