package state_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strconv"
	"sync"
	"testing"
	"time"

	"flotilla/internal/state"
	"flotilla/internal/store"
	"flotilla/internal/store/storetest"
	"flotilla/internal/unit"
)

var keys = state.Keys{Prefix: state.DefaultPrefix}

// node is a Feed that runs, and the client below it.
type node struct {
	*state.Feed
	store *store.Client
}

func run(t *testing.T, endpoint string) node {
	t.Helper()
	log := slog.New(slog.NewTextHandler(t.Output(), nil))
	c, err := store.Open(store.Config{Endpoints: []string{endpoint}, Logger: log})
	if err != nil {
		t.Fatal(err)
	}
	n := node{state.NewFeed(c, keys, log), c}
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- n.Run(ctx) }()
	t.Cleanup(func() {
		stop()
		if err := errors.Join(<-done, c.Close()); err != nil {
			t.Error(err)
		}
	})
	return n
}

func (n node) put(t *testing.T, key, value string) int64 {
	t.Helper()
	revision, err := n.store.Apply(t.Context(), []store.Op{store.Put(key, value)})
	if err != nil {
		t.Fatal(err)
	}
	return revision
}

func record(desired unit.Desired, restarts int64) string {
	return state.Encode(state.UnitRecord{V: state.Version, Text: "[Service]\nExecStart=/bin/true\n", Desired: desired, Restarts: restarts})
}

// What one node has written another one finds in its next fresh snapshot, at once,
// with and without reports.
func TestFresh(t *testing.T) {
	t.Parallel()
	endpoint := storetest.Start(t)
	a, b := run(t, endpoint), run(t, endpoint)
	for i := range int64(20) {
		wrote := a.put(t, keys.Unit("web.service"), record(unit.Launched, i))
		s, err := b.Fresh(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if got := s.Units["web.service"].Record.Value.Restarts; got != i || s.Revision < wrote {
			t.Fatalf("got restart %d at %d, want %d at %d", got, s.Revision, i, wrote)
		}
	}
	if b.Latest().Reports {
		t.Error("reports are followed though nobody reads them")
	}
	for i := range int64(5) {
		a.put(t, keys.RouterReport("n1"), state.Encode(state.RouterReport{V: state.Version, Applied: i}))
		s, err := b.Full(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if got := s.Nodes["n1"].Router.Value.Applied; !s.Reports || got != i {
			t.Fatalf("got applied %d, want %d", got, i)
		}
	}
	if s, err := a.Fresh(t.Context()); err != nil || s.Reports || s.Nodes["n1"] != nil {
		t.Errorf("a node that nobody asked for reports has them: %v, %v", s, err)
	}
}

func TestFreshSaysThatTheStoreIsAway(t *testing.T) {
	t.Parallel()
	proxy := storetest.NewProxy(t, storetest.Start(t))
	n := run(t, proxy.Endpoint())
	if _, err := n.Fresh(t.Context()); err != nil {
		t.Fatal(err)
	}
	proxy.Freeze()
	if _, err := n.Fresh(t.Context()); !errors.Is(err, store.ErrUnavailable) {
		t.Errorf("got %v, want ErrUnavailable", err)
	}
	if n.Latest().Revision == 0 {
		t.Error("the last snapshot is gone with the store")
	}
}

// Nodes that change the same record at the same time lose nobody's change.
func TestUpdate(t *testing.T) {
	t.Parallel()
	endpoint := storetest.Start(t)
	nodes := []node{run(t, endpoint), run(t, endpoint), run(t, endpoint)}
	nodes[0].put(t, keys.Unit("web.service"), record(unit.Launched, 0))
	const each = 5
	var all sync.WaitGroup
	for _, n := range nodes {
		all.Go(func() {
			for range each {
				_, err := n.Update(t.Context(), func(s *state.Snapshot) (state.Tx, error) {
					u := s.Units["web.service"]
					next := u.Record.Value
					next.Restarts++
					return state.Tx{
						Ops:   []store.Op{store.Put(keys.Unit(u.Name), u.Record.With(next))},
						Conds: []store.Cond{store.Unchanged(keys.Unit(u.Name), u.Record.Modified)},
					}, nil
				})
				if err != nil {
					t.Error(err)
				}
			}
		})
	}
	all.Wait()
	s, err := nodes[0].Fresh(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if got := s.Units["web.service"].Record.Value.Restarts; got != int64(len(nodes)*each) {
		t.Errorf("%d restarts, want %d", got, len(nodes)*each)
	}
	refused := errors.New("there is no such unit")
	if _, err := nodes[0].Update(t.Context(), func(*state.Snapshot) (state.Tx, error) { return state.Tx{}, refused }); !errors.Is(err, refused) {
		t.Errorf("got %v, want the error of the change", err)
	}
	if revision, err := nodes[0].Update(t.Context(), func(*state.Snapshot) (state.Tx, error) { return state.Tx{}, nil }); err != nil || revision < s.Revision {
		t.Errorf("nothing to do: %d, %v, want at least %d", revision, err, s.Revision)
	}
}

// One node leads. When it cannot renew, or somebody deletes its key, it is told and
// cannot write, and another one leads.
func TestLead(t *testing.T) {
	t.Parallel()
	endpoint := storetest.Start(t)
	proxy := storetest.NewProxy(t, endpoint)
	direct := run(t, endpoint)
	type event struct {
		leads  bool
		leader store.Cond
	}
	stand := func(n node, id string) chan event {
		events := make(chan event, 64)
		ctx, stop := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() {
			done <- n.Lead(ctx, id, "node "+id, func(ctx context.Context, leader store.Cond) error {
				events <- event{true, leader}
				<-ctx.Done()
				events <- event{false, leader}
				return ctx.Err()
			})
		}()
		t.Cleanup(func() {
			stop()
			if err := <-done; err != nil {
				t.Error(err)
			}
		})
		return events
	}
	await := func(events chan event, leads bool) event {
		t.Helper()
		select {
		case got := <-events:
			if got.leads != leads {
				t.Fatalf("leads: %v, want %v", got.leads, leads)
			}
			return got
		case <-time.After(30 * time.Second):
			t.Fatalf("waited in vain for leads: %v", leads)
		}
		panic("not reached")
	}
	mayWrite := func(e event, may bool) {
		t.Helper()
		_, err := direct.store.Apply(t.Context(), []store.Op{store.Put("/test/who", "x")}, e.leader)
		if may && err != nil || !may && !errors.Is(err, store.ErrConflict) {
			t.Errorf("a write of the leader ends with %v, allowed: %v", err, may)
		}
	}
	leads := func(id string) {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
		defer cancel()
		if _, err := direct.Until(ctx, func(s *state.Snapshot) bool { return s.Leader.Value.Node == id }); err != nil {
			t.Fatalf("%s does not lead: %v", id, err)
		}
	}
	a := stand(run(t, proxy.Endpoint()), "a")
	first := await(a, true)
	mayWrite(first, true)
	leads("a")
	b := stand(run(t, endpoint), "b")
	proxy.Freeze() // a cannot renew, and does not see that either
	second := await(b, true)
	leads("b")
	mayWrite(first, false)
	mayWrite(second, true)
	await(a, false)
	proxy.Thaw()
	if _, err := direct.store.Apply(t.Context(), []store.Op{store.Delete(keys.Leader())}); err != nil {
		t.Fatal(err)
	}
	await(b, false)
	mayWrite(second, false)
	select { // either may be faster
	case e := <-a:
		mayWrite(e, true)
	case e := <-b:
		mayWrite(e, true)
	case <-time.After(30 * time.Second):
		t.Fatal("nobody leads any more")
	}
}

func BenchmarkFold(b *testing.B) {
	for _, n := range []int{1000, 10000} {
		var items []store.KV
		for i := range n {
			name := "u" + strconv.Itoa(i) + ".service"
			items = append(items, store.KV{Key: keys.Unit(name), Value: record(unit.Launched, 0), CreateRevision: int64(i + 1), ModRevision: int64(i + 1)})
		}
		b.Run(fmt.Sprintf("load/%d", n), func(b *testing.B) {
			for b.Loop() {
				state.Load(keys, items, int64(n))
			}
		})
	}
}
