package engine

import (
	"fmt"
	"syscall"
	"testing"
	"time"

	"flotilla/internal/registry"
)

// crowd is a cluster of plain machines and units, one in four an instance of a
// template, with a few that have wishes.
func crowd(machines, units int) *world {
	w := newWorld()
	for i := range machines {
		w.machine(fmt.Sprintf("%032x", i), func(m *registry.Machine) {
			m.Metadata["zone"] = fmt.Sprintf("z%d", i%3)
			m.Metadata["disk"] = []string{"ssd", "hdd"}[i%2]
			m.Memory = 1 << 40
		})
	}
	for i := range units {
		switch {
		case i%4 == 0:
			w.unit(fmt.Sprintf("web%d@%d.service", i%400, i), registry.Launched)
		case i%10 == 1:
			w.unit(fmt.Sprintf("ssd-%d.service", i), registry.Launched, "MachineMetadata=disk=ssd")
		case i%10 == 3:
			w.unit(fmt.Sprintf("big-%d.service", i), registry.Launched, "MemoryReserve=1M")
		case i%100 == 5:
			w.unit(fmt.Sprintf("lonely-%d.service", i), registry.Launched, "Conflicts=lonely-*")
		case i%100 == 7:
			w.unit(fmt.Sprintf("side-%d.service", i), registry.Launched, fmt.Sprintf("MachineOf=ssd-%d.service", i/10*10+1))
		default:
			w.unit(fmt.Sprintf("plain-%d.service", i), registry.Launched)
		}
	}
	return w
}

// cpuTime is what this process has used so far: the wall clock says little on a
// machine that is shared.
func cpuTime(b *testing.B) time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// BenchmarkPlace100000 plans 100,000 placements on 1,000 machines from nothing.
func BenchmarkPlace100000(b *testing.B) {
	w := crowd(1000, 100_000)
	began := cpuTime(b)
	for b.Loop() {
		w.c.RetryAll()
		if steps := w.plan(); len(steps) < 100_000 {
			b.Fatalf("%d steps", len(steps))
		}
	}
	b.ReportMetric((cpuTime(b)-began).Seconds()/float64(b.N), "cpu-s/op")
}

// BenchmarkLoad100000 reads the records of the same cluster, placed.
func BenchmarkLoad100000(b *testing.B) {
	w := crowd(1000, 100_000)
	if _, err := w.settle(); err != nil {
		b.Fatal(err)
	}
	began := cpuTime(b)
	for b.Loop() {
		c := NewCluster(keys)
		for _, kv := range w.records {
			c.Set(kv)
		}
	}
	b.ReportMetric((cpuTime(b)-began).Seconds()/float64(b.N), "cpu-s/op")
}

// BenchmarkOneChange stops a unit and starts it again, on 1,000 machines with
// 100,000 units: four changes, all of them written.
func BenchmarkOneChange(b *testing.B) {
	w := crowd(1000, 100_000)
	if _, err := w.settle(); err != nil {
		b.Fatal(err)
	}
	var planned time.Duration
	plans := 0
	plan := func() {
		began := time.Now()
		steps := w.plan()
		planned += time.Since(began)
		plans++
		for _, s := range steps {
			if err := w.apply(s); err != nil {
				b.Fatal(err)
			}
		}
	}
	for b.Loop() {
		w.desire("plain-2.service", registry.Inactive)
		plan()
		p := w.placement("plain-2.service")
		w.erase(keys.Entry(p.Machine, "plain-2.service"))
		w.erase(keys.Placement("plain-2.service"))
		plan()
		w.desire("plain-2.service", registry.Launched)
		plan()
		plan()
	}
	b.ReportMetric(float64(planned.Nanoseconds())/float64(plans), "ns/plan")
}

// BenchmarkMachineGone plans what becomes of the 100 units of a machine.
func BenchmarkMachineGone(b *testing.B) {
	w := crowd(1000, 100_000)
	if _, err := w.settle(); err != nil {
		b.Fatal(err)
	}
	id := fmt.Sprintf("%032x", 7)
	rec := w.records[keys.Machine(id)].Value
	for b.Loop() {
		w.del(keys.Machine(id))
		if steps := w.plan(); len(steps) < 90 {
			b.Fatalf("%d steps", len(steps))
		}
		w.put(keys.Machine(id), rec)
	}
}
