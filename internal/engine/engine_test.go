package engine

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"time"

	"flotilla/internal/state"
	"flotilla/internal/store"
	"flotilla/internal/store/storetest"
	"flotilla/internal/unit"
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

// rig is a store with nodes and units in it, and what tests ask of it.
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

func (r *rig) node(id string) {
	r.t.Helper()
	r.apply(store.Put(keys.Node(id), state.Encode(state.NodeRecord{V: 1, ID: id, Name: id, Units: true})))
}

func (r *rig) units(names []string, desired unit.Desired, options ...string) {
	r.t.Helper()
	text := "[Service]\nExecStart=/bin/true\n[X-Fleet]\n" + strings.Join(options, "\n") + "\n"
	for len(names) > 0 {
		var ops []store.Op
		for _, name := range names[:min(100, len(names))] {
			ops = append(ops, store.Put(keys.Unit(name), state.Encode(state.UnitRecord{V: 1, Text: text, Desired: desired})))
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

// at returns the node of a unit, "" if it is nowhere.
func (r *rig) at(name string) string {
	r.t.Helper()
	kv, ok, err := r.c.Get(r.t.Context(), keys.Placement(name))
	if err != nil {
		r.t.Fatal(err)
	}
	if !ok {
		return ""
	}
	return must[state.Placement](kv).Node
}

func (r *rig) wait(what string, ok func() bool) {
	r.t.Helper()
	storetest.Wait(r.t, patience, what, ok)
}

// feed returns a Feed that follows the store until the test ends.
func (r *rig) feed(c *store.Client) *state.Feed {
	f := state.NewFeed(c, keys, quiet())
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- f.Run(ctx) }()
	r.t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			r.t.Errorf("feed: %v", err)
		}
	})
	return f
}

// engine runs a node that stands for election and has its Engine lead, until the
// test ends or stop is called, which waits.
func (r *rig) engine(c *store.Client, name string) (e *Engine, stop func()) {
	f := r.feed(c)
	e = New(Config{Feed: f, Store: c, Log: quiet()})
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- f.Lead(ctx, name, name, e.Lead) }()
	stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			r.t.Errorf("engine %s: %v", name, err)
		}
	})
	r.t.Cleanup(stop)
	return e, stop
}

func (e *Engine) leading() bool { return e.Stats().Leading }

func many(n int) []string {
	var names []string
	for i := range n {
		names = append(names, fmt.Sprintf("u%03d.service", i))
	}
	return names
}

func TestEngineFollowsTheStore(t *testing.T) {
	r, _ := newRig(t)
	r.node("m1")
	r.node("m2")
	e, stop := r.engine(r.c, "n1")
	defer stop()
	r.wait("leading", e.leading)
	r.units([]string{"a.service", "b.service"}, unit.Launched)
	r.units([]string{"pin.service"}, unit.Launched, "MachineID=m1")
	r.units([]string{"g.service"}, unit.Loaded, "Global=yes")
	r.units([]string{"ssd.service"}, unit.Launched, "MachineMetadata=disk=ssd")
	r.wait("three placements and a unit that is nowhere", func() bool {
		return len(r.list("cluster/placements/")) == 3 && len(r.list("cluster/unplaced/")) == 1
	})

	// A node dies: another one takes its units, but for the one that only it can
	// run, which it still has when it is back.
	r.apply(store.Delete(keys.Node("m1")))
	r.wait("m2 having all it can have", func() bool {
		return r.at("a.service") == "m2" && r.at("b.service") == "m2" && r.at("pin.service") == "m1"
	})
	pin := func() state.Placement { return must[state.Placement](r.list("cluster/placements/")["pin.service"]) }
	old := pin()
	r.node("m1")
	r.wait("the new generation", func() bool {
		return pin().Generation == r.list("cluster/nodes/")["m1"].CreateRevision && pin().Epoch > old.Epoch
	})

	// A new file is approved with the placement as it is; one that does not fit
	// makes the unit leave, until it fits again.
	old = pin()
	r.units([]string{"pin.service"}, unit.Launched, "MachineID=m1", "Exclusive=yes")
	r.wait("the new file approved", func() bool { return pin().Approved != old.Approved && pin().Epoch == old.Epoch })
	r.units([]string{"pin.service"}, unit.Launched, "MachineID=m2")
	r.wait("the reason to leave", func() bool { return pin().Leave != "" })
	r.units([]string{"pin.service"}, unit.Launched, "MachineID=m1")
	r.wait("that taken back", func() bool { return pin().Leave == "" && pin().Approved == old.Approved })
	r.units([]string{"pin.service"}, unit.Launched, "MachineID=m2")
	r.wait("the reason again", func() bool { return pin().Leave != "" })
	r.apply(store.Delete(keys.Placement("pin.service")))
	r.wait("the other node", func() bool { return r.at("pin.service") == "m2" })
	r.wait("all units known to be somewhere or not", func() bool {
		s := e.Stats()
		return s.Placements >= 5 && s.Releases == 2 && s.Units == 5 && s.Nodes == 2 && s.Unplaced == 1
	})

	// One that is in trouble is tried elsewhere.
	b := must[state.Placement](r.list("cluster/placements/")["b.service"])
	r.apply(store.Put(keys.UnitsReport("m2"), state.Encode(state.UnitsReport{V: 1, Units: map[string]state.UnitState{"b.service": {Epoch: b.Epoch, Trouble: "bad setting"}}})))
	r.wait("b leaving", func() bool {
		return must[state.Placement](r.list("cluster/placements/")["b.service"]).Leave == "it is in trouble there: bad setting"
	})
}

// Nothing is planned when nothing changes, and little is done when what changes
// is no business of the plan: other keys, and what nodes report all the time.
func TestEngineIsQuiet(t *testing.T) {
	r, _ := newRig(t)
	r.node("m1")
	e, stop := r.engine(r.c, "n1")
	defer stop()
	r.units(many(5), unit.Launched)
	r.wait("placements", func() bool { return len(r.list("cluster/placements/")) == 5 })
	r.apply(store.Put("/services/x/hosts/1", "1.2.3.4:5"))
	for i := range 100 {
		r.apply(store.Put(keys.RouterReport("m1"), state.Encode(state.RouterReport{V: 1, Applied: int64(i)})))
		r.apply(store.Put(keys.UnitsReport("m1"), state.Encode(state.UnitsReport{V: 1, Units: map[string]state.UnitState{"u001.service": {Restarts: int64(i)}}})))
	}
	r.units([]string{"more.service"}, unit.Launched)
	r.wait("one more", func() bool { return len(r.list("cluster/placements/")) == 6 })
	if passes := e.Stats().Passes; passes > 20 {
		t.Errorf("%d passes for six units", passes)
	}
	if failures := e.Stats().Failures; failures > 0 {
		t.Errorf("%d failures", failures)
	}
}

// 500 units that are started at once are placed with few writes, and the first of
// them at once.
func TestManyStarts(t *testing.T) {
	r, _ := newRig(t)
	for i := range 3 {
		r.node(fmt.Sprintf("m%d", i))
	}
	e, stop := r.engine(r.c, "n1")
	defer stop()
	r.wait("leading", e.leading)
	revision := func() int64 {
		revision, err := r.c.Revision(t.Context(), keys.Leader())
		if err != nil {
			t.Fatal(err)
		}
		return revision
	}
	began, before := time.Now(), revision()
	r.units(many(1), unit.Launched)
	r.wait("the first one", func() bool { return r.at("u000.service") != "" })
	t.Logf("the first unit was placed after %v", time.Since(began))
	r.units(many(500)[1:], unit.Launched)
	r.wait("all", func() bool { return len(r.list("cluster/placements/")) == 500 })
	if writes := revision() - before; writes > 60 {
		t.Errorf("500 units took %d writes", writes)
	}
	r.checkOnce(many(500))
}

// checkOnce fails if a unit was placed twice, or not by its present file.
func (r *rig) checkOnce(names []string) {
	r.t.Helper()
	placements := r.list("cluster/placements/")
	units := r.list("cluster/units/")
	if len(placements) != len(names) {
		r.t.Errorf("%d placements for %d units", len(placements), len(names))
	}
	for name, kv := range placements {
		if kv.CreateRevision != kv.ModRevision {
			r.t.Errorf("%s was placed again", name)
		}
		if p := must[state.Placement](kv); p.Approved != hashOf(must[state.UnitRecord](units[name]).Text) {
			r.t.Errorf("%s is placed for another file: %+v", name, p)
		}
	}
}

// The leader's connection breaks behind a batch that it has written and does not
// know of; the other one goes on and places nothing twice.
func TestLeaderDiesInTheMiddle(t *testing.T) {
	r, endpoint := newRig(t)
	for i := range 5 {
		r.node(fmt.Sprintf("m%d", i))
	}
	proxy := storetest.NewProxy(t, endpoint)
	first, stopFirst := r.engine(open(t, proxy.Endpoint()), "n1")
	defer stopFirst()
	r.wait("the first leader", first.leading)
	second, stopSecond := r.engine(open(t, endpoint), "n2")
	defer stopSecond()
	cut := make(chan struct{})
	proxy.CutAfter("placements/u100.service", func() {
		proxy.Cut()
		close(cut)
	})
	names := many(300)
	r.units(names, unit.Launched)
	<-cut
	r.wait("the second leader", second.leading)
	r.wait("all placed", func() bool { return len(r.list("cluster/placements/")) == len(names) })
	r.checkOnce(names)
	proxy.Mend()
	if p := second.Stats().Placements; p == 0 {
		t.Error("the second leader has placed nothing")
	}
}

// Two engines that both believe that they lead: the one that does not can write
// nothing, and what both plan is done once.
func TestTwoLeaders(t *testing.T) {
	r, _ := newRig(t)
	for i := range 3 {
		r.node(fmt.Sprintf("m%d", i))
	}
	names := many(90)
	r.units(names, unit.Launched)
	ctx := t.Context()
	revision, err := r.c.Apply(ctx, []store.Op{store.Put(keys.Leader(), state.Encode(state.Leader{V: 1, Node: "n1"}))})
	if err != nil {
		t.Fatal(err)
	}
	f := r.feed(r.c)
	leader := func(created int64) *leadership {
		s, err := f.Full(ctx)
		if err != nil {
			t.Fatal(err)
		}
		e := New(Config{Feed: f, Store: r.c, Log: quiet()})
		e.writing = time.Hour
		return e.newLeadership(store.CreatedAt(keys.Leader(), created), s)
	}
	b, deposed := leader(revision), leader(revision-1)

	if err := deposed.pass(ctx); !errors.Is(err, errDeposed) {
		t.Errorf("a deposed leader: %v, want %v", err, errDeposed)
	}
	if n := len(r.list("cluster/placements/")); n != 0 {
		t.Fatalf("a deposed leader has placed %d units", n)
	}
	// One step of a batch is refused: the others are done.
	steps := Plan(Input{Snapshot: b.seen, Now: time.Now()}).Steps
	odd := leader(revision)
	r.apply(store.Put(keys.Placement("u007.service"), state.Encode(state.Placement{V: 1, Node: "m0", Reason: "by hand"})))
	if err := odd.write(ctx, steps, time.Hour); err != nil {
		t.Fatal(err)
	}
	if n := len(r.list("cluster/placements/")); n != len(names) || odd.stats.Failures != 1 || odd.failed["u007.service"].times != 1 {
		t.Errorf("%d placements, %d failures, %v, want %d and 1 of u007", n, odd.stats.Failures, odd.failed, len(names))
	}
	// The other leader has planned the same and is refused everything.
	before := r.list("cluster/placements/")
	if err := b.write(ctx, steps, time.Hour); err != nil {
		t.Fatal(err)
	}
	for name, kv := range r.list("cluster/placements/") {
		if before[name].ModRevision != kv.ModRevision {
			t.Errorf("%s was placed twice", name)
		}
	}
	if b.stats.Placements != 0 || int(b.stats.Failures) != len(names) {
		t.Errorf("the second one has placed %d and failed %d", b.stats.Placements, b.stats.Failures)
	}
}

// Batches keep the limits of the store.
func TestBatches(t *testing.T) {
	w := newWorld()
	for i := range 100 {
		w.node(fmt.Sprintf("m%03d", i), nil)
		w.unit(fmt.Sprintf("u%d.service", i), unit.Launched, "MachineID="+fmt.Sprintf("m%03d", i))
	}
	w.unit("large.service", unit.Launched)
	w.put(keys.Move("large.service"), state.Encode(state.Move{V: 1, To: "m000", Reason: strings.Repeat("x", maxBytes)}))
	count, most := 0, 0
	for b := range batches(keys, w.plan()) {
		count += len(b.steps)
		most = max(most, len(b.steps))
		if len(b.ops) > store.MaxOps || len(b.conds) >= store.MaxOps || b.size > maxBytes && len(b.steps) > 1 {
			t.Errorf("batch of %d steps, %d operations, %d conditions, %d bytes", len(b.steps), len(b.ops), len(b.conds), b.size)
		}
	}
	if count != 101 || most < 60 {
		t.Errorf("%d steps are in batches of up to %d, want 101 and 60 or more", count, most)
	}
}

// A step that is refused for ever is written less and less often, and keeps
// nothing else from being written.
func TestRefusedSteps(t *testing.T) {
	l := New(Config{Log: quiet()}).newLeadership(store.Cond{}, &state.Snapshot{})
	step := Step{Do: Place, Unit: "a.service"}
	other := Step{Do: Place, Unit: "b.service"}
	for range 3 {
		l.fail(batch{steps: []Step{step}}, store.ErrConflict)
	}
	wait := time.Until(l.failed["a.service"].again)
	if wait < 300*time.Millisecond || wait > 400*time.Millisecond {
		t.Errorf("after the third time it waits %v", wait)
	}
	if got := l.mayWrite([]Step{step, other}, time.Now()); len(got) != 1 || got[0].Unit != "b.service" {
		t.Errorf("may write %v", got)
	}
	if got := l.mayWrite([]Step{step}, time.Now().Add(wait)); len(got) != 1 {
		t.Errorf("may write %v when its time has come", got)
	}
	if due := l.due(); due.After(time.Now().Add(wait)) {
		t.Errorf("plans again at %v", due)
	}
	l.mayWrite(nil, time.Now().Add(wait))
	if len(l.failed) != 0 {
		t.Errorf("still remembers %v, for which there is no step any more", l.failed)
	}
}
