package engine

import (
	"fmt"
	"syscall"
	"testing"
	"time"

	"flotilla/internal/state"
	"flotilla/internal/unit"
)

// crowd is a cluster of plain nodes and units, one in four an instance of a
// template, with a few that have wishes.
func crowd(nodes, units int) *world {
	w := newWorld()
	for i := range nodes {
		w.node(fmt.Sprintf("%032x", i), func(n *state.NodeRecord) {
			n.Metadata["zone"] = fmt.Sprintf("z%d", i%3)
			n.Metadata["disk"] = []string{"ssd", "hdd"}[i%2]
			n.Memory = 1 << 40
		})
	}
	for i := range units {
		switch {
		case i%4 == 0:
			w.unit(fmt.Sprintf("web%d@%d.service", i%400, i), unit.Launched)
		case i%10 == 1:
			w.unit(fmt.Sprintf("ssd-%d.service", i), unit.Launched, "MachineMetadata=disk=ssd")
		case i%10 == 3:
			w.unit(fmt.Sprintf("big-%d.service", i), unit.Launched, "MemoryReserve=1M")
		case i%100 == 5:
			w.unit(fmt.Sprintf("lonely-%d.service", i), unit.Launched, "Conflicts=lonely-*")
		case i%100 == 7:
			w.unit(fmt.Sprintf("side-%d.service", i), unit.Launched, fmt.Sprintf("MachineOf=ssd-%d.service", i/10*10+1))
		default:
			w.unit(fmt.Sprintf("plain-%d.service", i), unit.Launched)
		}
	}
	return w
}

// reported has every node report all its units, as in a cluster that has settled.
func (w *world) reported() {
	units := map[string]map[string]state.UnitState{}
	for name, u := range w.snapshot().Units {
		id := u.Placement.Value.Node
		if units[id] == nil {
			units[id] = map[string]state.UnitState{}
		}
		units[id][name] = state.UnitState{Hash: u.Hash, Epoch: u.Placement.Value.Epoch, Load: "loaded", Active: "active", Sub: "running", Launched: true}
	}
	for id, report := range units {
		w.put(keys.UnitsReport(id), state.Encode(state.UnitsReport{V: state.Version, Units: report}))
	}
	w.memory = w.memory.Saw(w.snapshot())
}

// settledCrowd is a crowd that is placed and of which all is reported.
func settledCrowd(t testing.TB, nodes, units int) *world {
	t.Helper()
	w := crowd(nodes, units)
	if _, err := w.settleFast(); err != nil {
		t.Fatal(err)
	}
	w.reported()
	if steps := w.plan(); len(steps) > 0 {
		t.Fatalf("a settled cluster has %d steps: %v", len(steps), steps[0])
	}
	return w
}

// cpuTime is what this process has used so far: the wall clock says little on a
// machine that is shared.
func cpuTime(t testing.TB) time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		t.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// Bars of one plan, in CPU time of the whole process: the garbage collector
// counts.
const (
	barSettled = 10 * time.Millisecond // 10,000 settled units on 300 nodes
	barLarge   = 60 * time.Millisecond // 100,000 settled units on 1,000 nodes
	barPlace   = 2 * time.Second       // these placed from nothing
	noise      = 3                     // how much slower a test may find it
)

// TestBars fails if a plan takes clearly longer than it should. The fastest of a
// few counts.
func TestBars(t *testing.T) {
	measure := func(what string, w *world, steps, rounds int, bar time.Duration) {
		t.Helper()
		best := time.Hour
		for range rounds {
			began := cpuTime(t)
			r := Plan(Input{Snapshot: w.snapshot(), Now: w.now, Memory: w.memory})
			best = min(best, cpuTime(t)-began)
			if len(r.Steps) != steps {
				t.Fatalf("%s: %d steps, want %d", what, len(r.Steps), steps)
			}
		}
		t.Logf("%s: %v, the bar is %v", what, best, bar)
		if best > noise*bar {
			t.Errorf("%s takes %v of CPU, far more than %v", what, best, bar)
		}
	}
	measure("10,000 settled units on 300 nodes", settledCrowd(t, 300, 10_000), 0, 20, barSettled)
	if !testing.Short() {
		measure("placing 100,000 units on 1,000 nodes", crowd(1000, 100_000), 100_000, 2, barPlace)
		measure("100,000 settled units on 1,000 nodes", settledCrowd(t, 1000, 100_000), 0, 20, barLarge)
	}
}

func benchmark(b *testing.B, w *world) {
	in := Input{Snapshot: w.snapshot(), Now: w.now, Memory: w.memory}
	began := cpuTime(b)
	b.ReportAllocs()
	for b.Loop() {
		Plan(in)
	}
	b.ReportMetric((cpuTime(b)-began).Seconds()*1000/float64(b.N), "cpu-ms/op")
}

func BenchmarkSettled10000(b *testing.B)  { benchmark(b, settledCrowd(b, 300, 10_000)) }
func BenchmarkSettled100000(b *testing.B) { benchmark(b, settledCrowd(b, 1000, 100_000)) }
func BenchmarkPlace100000(b *testing.B)   { benchmark(b, crowd(1000, 100_000)) }

// BenchmarkNodeGone plans what becomes of the 100 units of a node.
func BenchmarkNodeGone(b *testing.B) {
	w := settledCrowd(b, 1000, 100_000)
	w.gone(fmt.Sprintf("%032x", 7))
	benchmark(b, w)
}
