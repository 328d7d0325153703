package engine

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"strings"
	"testing"
	"time"

	"flotilla/internal/registry"
	"flotilla/internal/store"
	"flotilla/internal/store/storetest"
)

const patience = 60 * time.Second

func open(t *testing.T, endpoint string) *store.Client {
	t.Helper()
	c, err := store.Open(store.Config{Endpoints: []string{endpoint}, Logger: quiet()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c
}

func quiet() *slog.Logger { return slog.New(slog.NewTextHandler(io.Discard, nil)) }

// rig is a store with machines and units in it, and what tests ask of it.
type rig struct {
	t *testing.T
	c *store.Client
}

func newRig(t *testing.T) (*rig, string) {
	endpoint := storetest.Start(t)
	return &rig{t, open(t, endpoint)}, endpoint
}

func (r *rig) apply(ops ...store.Op) {
	r.t.Helper()
	if _, err := r.c.Apply(r.t.Context(), ops); err != nil {
		r.t.Fatal(err)
	}
}

func (r *rig) machine(id string) {
	r.t.Helper()
	r.apply(store.Put(keys.Machine(id), registry.Encode(registry.Machine{V: 1, ID: id, Node: id, Units: true})))
}

func (r *rig) units(names []string, desired registry.Desired, options ...string) {
	r.t.Helper()
	text := "[Service]\nExecStart=/bin/true\n[X-Fleet]\n" + strings.Join(options, "\n") + "\n"
	for len(names) > 0 {
		var ops []store.Op
		for _, name := range names[:min(100, len(names))] {
			ops = append(ops, store.Put(keys.Unit(name), registry.Encode(registry.Unit{V: 1, Text: text, Desired: desired})))
		}
		r.apply(ops...)
		names = names[len(ops):]
	}
}

func (r *rig) list(prefix string) map[string]store.KV {
	r.t.Helper()
	all, _, err := r.c.List(r.t.Context(), keys.Prefix+prefix)
	if err != nil {
		r.t.Fatal(err)
	}
	found := map[string]store.KV{}
	for _, kv := range all {
		found[strings.TrimPrefix(kv.Key, keys.Prefix+prefix)] = kv
	}
	return found
}

// at returns the machine of a unit, "" if it is nowhere.
func (r *rig) at(name string) string {
	r.t.Helper()
	kv, ok, err := r.c.Get(r.t.Context(), keys.Placement(name))
	if err != nil {
		r.t.Fatal(err)
	}
	if !ok {
		return ""
	}
	return must[registry.Placement](kv).Machine
}

func (r *rig) wait(what string, ok func() bool) {
	r.t.Helper()
	storetest.Wait(r.t, patience, what, ok)
}

// engine runs an Engine until the test ends or stop is called, which waits.
func (r *rig) engine(c *store.Client, name string) (e *Engine, stop func()) {
	e = New(Config{Store: c, Keys: keys, Name: name, Log: quiet()})
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- e.Run(ctx) }()
	stop = func() {
		cancel()
		if err, open := <-done; open && err != nil {
			r.t.Errorf("engine %s: %v", name, err)
		}
	}
	r.t.Cleanup(func() { cancel() })
	return e, stop
}

func many(n int) []string {
	var names []string
	for i := range n {
		names = append(names, fmt.Sprintf("u%03d.service", i))
	}
	return names
}

func TestEngineFollowsTheStore(t *testing.T) {
	r, _ := newRig(t)
	r.machine("m1")
	r.machine("m2")
	e, stop := r.engine(r.c, "n1")
	defer stop()
	r.wait("leading", e.Leading)
	r.units([]string{"a.service", "b.service"}, registry.Launched)
	r.units([]string{"pin.service"}, registry.Launched, "MachineID=m1")
	r.units([]string{"g.service"}, registry.Loaded, "Global=yes")
	r.units([]string{"ssd.service"}, registry.Launched, "MachineMetadata=disk=ssd")
	r.wait("three placements, a global unit and one that is nowhere", func() bool {
		return len(r.list("placements/")) == 3 && len(r.list("schedules/global/")) == 1 && len(r.list("unplaced/")) == 1
	})

	// A machine dies: another takes its units, but for the one that only it can
	// run, which it still has when it is back.
	r.apply(store.Delete(keys.Machine("m1")))
	r.wait("m2 having all it can have", func() bool {
		return r.at("a.service") == "m2" && r.at("b.service") == "m2" && r.at("pin.service") == "m1" && len(r.list("schedules/m1/")) == 1
	})
	old := must[registry.Placement](r.list("placements/")["pin.service"])
	r.machine("m1")
	r.wait("the new generation", func() bool {
		p := must[registry.Placement](r.list("placements/")["pin.service"])
		entry := must[registry.Entry](r.list("schedules/m1/")["pin.service"])
		return p.Generation == r.list("machines/")["m1"].CreateRevision && p.Epoch > old.Epoch && entry.Epoch == p.Epoch && entry.Generation == p.Generation
	})

	// A release waits for the agent, and is taken back when it need not be.
	r.units([]string{"pin.service"}, registry.Inactive, "MachineID=m1")
	releasing := func() bool { return must[registry.Entry](r.list("schedules/m1/")["pin.service"]).Release != "" }
	r.wait("the release", releasing)
	r.units([]string{"pin.service"}, registry.Launched, "MachineID=m1")
	r.wait("the release taken back", func() bool { return !releasing() })
	r.units([]string{"pin.service"}, registry.Inactive, "MachineID=m1")
	r.wait("the release again", releasing)
	r.apply(store.Delete(keys.Placement("pin.service")), store.Delete(keys.Entry("m1", "pin.service")))
	r.wait("three units known to be somewhere or not", func() bool {
		s := e.Stats()
		return s.Placements >= 4 && s.Releases == 2 && s.Units == 5 && s.Machines == 2 && s.Unplaced == 1
	})
}

// Nothing is planned, and little is done, when nothing changes; keys that are
// nobody's business do not keep the engine waiting.
func TestEngineIsQuiet(t *testing.T) {
	r, _ := newRig(t)
	r.machine("m1")
	e, stop := r.engine(r.c, "n1")
	defer stop()
	r.units(many(5), registry.Launched)
	r.wait("placements", func() bool { return len(r.list("placements/")) == 5 })
	r.apply(store.Put("/services/x/hosts/1", "1.2.3.4:5"))
	r.units([]string{"more.service"}, registry.Launched)
	r.wait("one more", func() bool { return len(r.list("placements/")) == 6 })
	if passes := e.Stats().Passes; passes > 20 {
		t.Errorf("%d passes for six units", passes)
	}
	if failures := e.Stats().Failures; failures > 0 {
		t.Errorf("%d failures", failures)
	}
}

// checkOnce fails if a unit was placed twice, or is in two schedules.
func (r *rig) checkOnce(names []string) {
	r.t.Helper()
	placements := r.list("placements/")
	entries := r.list("schedules/")
	if len(placements) != len(names) || len(entries) != len(names) {
		r.t.Errorf("%d placements and %d entries for %d units", len(placements), len(entries), len(names))
	}
	for name, kv := range placements {
		if kv.CreateRevision != kv.ModRevision {
			r.t.Errorf("%s was placed again", name)
		}
		p := must[registry.Placement](kv)
		if entry, ok := entries[p.Machine+"/"+name]; !ok || entry.ModRevision != kv.ModRevision {
			r.t.Errorf("%s has no entry of the same revision on %s", name, p.Machine)
		}
	}
}

// The leader's connection breaks behind a batch that it has written and does not
// know of; the other one goes on and places nothing twice.
func TestLeaderDiesInTheMiddle(t *testing.T) {
	r, endpoint := newRig(t)
	for i := range 5 {
		r.machine(fmt.Sprintf("m%d", i))
	}
	proxy := storetest.NewProxy(t, endpoint)
	first, stopFirst := r.engine(open(t, proxy.Endpoint()), "n1")
	defer stopFirst()
	r.wait("the first leader", first.Leading)
	second, stopSecond := r.engine(open(t, endpoint), "n2")
	defer stopSecond()
	cut := make(chan struct{})
	proxy.CutAfter("placements/u100.service", func() {
		proxy.Cut()
		close(cut)
	})
	names := many(300)
	r.units(names, registry.Launched)
	<-cut
	r.wait("the second leader", second.Leading)
	r.wait("all placed", func() bool { return len(r.list("placements/")) == len(names) })
	r.checkOnce(names)
	proxy.Mend()
	if p := second.Stats().Placements; p == 0 {
		t.Error("the second leader has placed nothing")
	}
}

// Two engines that both believe to lead: the one that does not can write
// nothing, and what both plan is done once.
func TestTwoLeaders(t *testing.T) {
	r, _ := newRig(t)
	for i := range 3 {
		r.machine(fmt.Sprintf("m%d", i))
	}
	names := many(90)
	r.units(names, registry.Launched)
	ctx := t.Context()
	revision, err := r.c.Apply(ctx, []store.Op{store.Put(keys.EngineElection()+"1", "n1")})
	if err != nil {
		t.Fatal(err)
	}
	leader := func() *leadership {
		all, revision, err := r.c.List(ctx, keys.Prefix)
		if err != nil {
			t.Fatal(err)
		}
		e := New(Config{Store: r.c, Keys: keys, Log: quiet()})
		e.longest = time.Hour
		return &leadership{Engine: e, cluster: Load(keys, all, revision), failed: map[string]failure{}, said: map[string]string{}}
	}
	a, b, deposed := leader(), leader(), leader()
	a.leader = store.CreatedAt(keys.EngineElection()+"1", revision)
	b.leader, deposed.leader = a.leader, store.CreatedAt(keys.EngineElection()+"0", revision-1)

	if err := deposed.pass(ctx); !errors.Is(err, errDeposed) {
		t.Errorf("a deposed leader: %v, want %v", err, errDeposed)
	}
	if n := len(r.list("placements/")); n != 0 {
		t.Fatalf("a deposed leader has placed %d units", n)
	}
	// One step of a batch is refused: the others are done.
	steps, _ := b.cluster.Plan(time.Now())
	odd := leader()
	odd.leader = a.leader
	r.apply(store.Put(keys.Placement("u007.service"), registry.Encode(registry.Placement{V: 1, Machine: "m0", Reason: "by hand"})))
	if err := odd.pass(ctx); err != nil {
		t.Fatal(err)
	}
	if n := len(r.list("placements/")); n != len(names) || odd.stats.Failures != 1 || odd.failed["u007.service"].times != 1 {
		t.Errorf("%d placements, %d failures, %v, want %d and 1 of u007", n, odd.stats.Failures, odd.failed, len(names))
	}
	// The other leader has planned the same and is refused everything.
	before := r.list("placements/")
	if err := b.write(ctx, steps); err != nil {
		t.Fatal(err)
	}
	for name, kv := range r.list("placements/") {
		if before[name].ModRevision != kv.ModRevision {
			t.Errorf("%s was placed twice", name)
		}
	}
	if b.stats.Placements != 0 || int(b.stats.Failures) != len(names) {
		t.Errorf("the second one has placed %d and failed %d", b.stats.Placements, b.stats.Failures)
	}
}

// Batches keep the limits of the store.
func TestPack(t *testing.T) {
	w := newWorld()
	for i := range 100 {
		w.machine(fmt.Sprintf("m%03d", i), nil)
		w.unit(fmt.Sprintf("u%d.service", i), registry.Launched, "MachineID="+fmt.Sprintf("m%03d", i))
	}
	w.unit("large.service", registry.Launched, "# "+strings.Repeat("x", maxBytes))
	steps := w.plan()
	count := 0
	for _, b := range pack(keys, steps) {
		count += len(b.steps)
		if len(b.steps) > maxUnits || len(b.ops) > store.MaxOps || len(b.conds) >= store.MaxOps || b.size > maxBytes && len(b.steps) > 1 {
			t.Errorf("batch of %d steps, %d operations, %d conditions, %d bytes", len(b.steps), len(b.ops), len(b.conds), b.size)
		}
	}
	if count != 101 {
		t.Errorf("%d steps are in batches, want 101", count)
	}
}
