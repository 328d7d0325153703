package engine

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"flotilla/internal/registry"
)

// TestSimulation lives through random events with 1,000 machines and 100,000
// units, and holds what is in the records against the rules. The small one does
// so more often, and with one who knows the records alone.
func TestSimulation(t *testing.T) {
	t.Run("small", func(t *testing.T) { simulate(t, 100, 5_000, 300, true) })
	if !testing.Short() {
		t.Run("full", func(t *testing.T) { simulate(t, 1000, 100_000, 300, false) })
	}
}

func simulate(t *testing.T, machines, units, events int, often bool) {
	w := crowd(machines, units)
	r := rand.New(rand.NewPCG(4, 2))
	settle := func() (steps []Step) {
		t.Helper()
		steps, err := w.settle2()
		if err != nil {
			t.Fatal(err)
		}
		return steps
	}
	began := time.Now()
	settle()
	t.Logf("placed after %v", time.Since(began))

	ids := slices.Sorted(maps.Keys(w.c.machines))
	names := slices.Sorted(maps.Keys(w.c.units))
	gone := map[string]string{} // records of machines that are not there
	var slowest time.Duration
	for i := range events {
		touched := map[string]bool{} // units that have a cause to move
		lost := func(id string) {
			if m := w.c.machines[id]; m != nil {
				for u := range m.units {
					touched[u.name] = true
				}
			}
		}
		id, name := ids[r.IntN(len(ids))], names[r.IntN(len(names))]
		switch n := r.IntN(12); {
		case n < 2 && gone[id] == "" && len(gone) < machines/20:
			lost(id)
			gone[id] = w.records[keys.Machine(id)].Value
			w.del(keys.Machine(id))
		case n < 5 && len(gone) > 0:
			id = slices.Min(slices.Collect(maps.Keys(gone)))
			w.put(keys.Machine(id), gone[id])
			delete(gone, id)
		case n < 6:
			lost(id)
			w.settings(id, func(s *registry.Settings) {
				s.Metadata["disk"] = []string{"", "ssd", "hdd"}[r.IntN(3)]
				s.Drain = r.IntN(10) == 0
			})
		case n < 8:
			touched[name] = true
			w.desire(name, registry.Inactive)
		case n < 11:
			w.desire(name, registry.Launched)
		default:
			w.unit(fmt.Sprintf("new-%d.service", i), registry.Launched, "Conflicts=new-*", "MemoryReserve=1G")
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
		w.release(first)
		// Who leaves without being on a machine that something happened to is
		// a follower, or was stopped.
		for _, s := range append(first, settle()...) {
			if s.Do == Release && !touched[s.Unit] && !strings.HasPrefix(s.Unit, "side-") && w.want(s.Unit).Desired != registry.Inactive {
				t.Fatalf("event %d: without cause: %s", i, s)
			}
		}
		if often && i%50 == 0 {
			w.checkPlaces(t)
		}
	}
	w.checkPlaces(t)
	if often {
		for _, s := range fresh(w, r) {
			if s.Do != Explain {
				t.Errorf("one who knows the records alone would: %s", s)
			}
		}
	}
	t.Logf("the slowest plan took %v", slowest)
}

// settle2 is settle for many records: agents look only at what was released.
func (w *world) settle2() ([]Step, error) {
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
		w.release(steps)
	}
	return all, fmt.Errorf("there is no end of it: %v", all[max(0, len(all)-5):])
}

func (w *world) release(steps []Step) {
	for _, s := range steps {
		if _, there := w.records[keys.Machine(s.Machine)]; s.Do == Release && there {
			w.revision++
			w.erase(keys.Entry(s.Machine, s.Unit))
			w.erase(keys.Placement(s.Unit))
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
		if m.created[p.Machine] == 0 {
			if m.unplaced[name] == "" {
				t.Errorf("%s is on %s, which is gone", name, p.Machine)
			}
			continue
		}
		memory[p.Machine] += req.Memory
		if why := req.Mismatch(p.Machine, m.metadata[p.Machine]); why != "" {
			t.Errorf("%s on %s: %s", name, p.Machine, why)
		}
		if m.settings[p.Machine].Drain {
			t.Errorf("%s on %s, which is drained", name, p.Machine)
		}
		if kind, _, _ := strings.Cut(name, "-"); kind == "lonely" || kind == "new" {
			if other := lonely[kind+p.Machine]; other != "" {
				t.Errorf("%s and %s are together on %s", name, other, p.Machine)
			}
			lonely[kind+p.Machine] = name
		}
		for _, peer := range req.MachineOf {
			if m.placements[peer].Machine != p.Machine {
				t.Errorf("%s on %s is not with %s on %q", name, p.Machine, peer, m.placements[peer].Machine)
			}
		}
		e, u := m.entries[p.Machine+"/"+name], m.units[name]
		if e.Text != u.Text || e.Desired != u.Desired || e.Epoch != p.Epoch || e.Generation != p.Generation || e.Generation != m.created[p.Machine] || e.Release != "" {
			t.Errorf("entry of %s is %+v", name, e)
		}
	}
	for id, n := range memory {
		if n > m.machines[id].Memory {
			t.Errorf("%d bytes are reserved on %s", n, id)
		}
	}
	entries := 0
	for key := range m.entries {
		if !strings.HasPrefix(key, registry.Global) {
			entries++
		}
	}
	if entries != len(m.placements) {
		t.Errorf("%d entries for %d placements", entries, len(m.placements))
	}
	for name := range m.units {
		if _, placed := m.placements[name]; m.wanted(name) && !placed && m.unplaced[name] == "" {
			t.Errorf("%s is nowhere without explanation", name)
		}
	}
}
