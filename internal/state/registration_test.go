package state_test

import (
	"bytes"
	"context"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"time"

	"flotilla/internal/state"
	"flotilla/internal/store"
	"flotilla/internal/store/storetest"
)

const patience = 30 * time.Second

// member is a node as the store sees it.
type member struct {
	*state.Registration
	presence *store.Presence
	feed     *state.Feed
	log      *logBuffer
	end      func()
}

type logBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (b *logBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *logBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}

func client(t *testing.T, endpoint string) *store.Client {
	t.Helper()
	c, err := store.Open(store.Config{Endpoints: []string{endpoint}, Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c
}

// begin begins a node with a report beside its record.
func begin(t *testing.T, endpoint string, record state.NodeRecord, ttl time.Duration) *member {
	t.Helper()
	n := &member{log: &logBuffer{}}
	log := slog.New(slog.NewTextHandler(n.log, nil))
	c := client(t, endpoint)
	n.presence, n.feed = store.NewPresence(c, ttl, log), state.NewFeed(c, keys, log)
	n.Registration = state.NewRegistration(n.feed, n.presence, record, ttl, log)
	n.presence.Set(keys.RouterReport(record.ID), "of "+record.Name)
	n.presence.Set(keys.UnitsReport(record.ID), "of "+record.Name)
	ctx, stop := context.WithCancel(context.Background())
	outer, stopPresence := context.WithCancel(context.Background())
	var inner, outside sync.WaitGroup
	inner.Go(func() { _ = n.feed.Run(ctx) })
	inner.Go(func() { _ = n.Registration.Run(ctx) })
	outside.Go(func() { _ = n.presence.Run(outer) })
	n.end = sync.OnceFunc(func() {
		stop()
		inner.Wait()
		stopPresence()
		outside.Wait()
	})
	t.Cleanup(n.end)
	return n
}

func get(t *testing.T, c *store.Client, key string) store.KV {
	t.Helper()
	kv, _, err := c.Get(t.Context(), key)
	if err != nil {
		t.Fatal(err)
	}
	return kv
}

var first = state.NodeRecord{ID: "id1", Name: "n1", Address: "10.0.0.1", BootID: "b1", Units: true}

func TestRegistration(t *testing.T) {
	t.Parallel()
	endpoint := storetest.Start(t)
	direct, proxy := client(t, endpoint), storetest.NewProxy(t, endpoint)
	n := begin(t, proxy.Endpoint(), first, 3*time.Second)
	counts := func() bool { return n.Registered() && !n.T0().IsZero() && n.Generation() != 0 }
	storetest.Wait(t, patience, "the node to be registered", counts)
	record := get(t, direct, keys.Node("id1"))
	if record.CreateRevision != n.Generation() || record.CreateRevision != record.ModRevision {
		t.Errorf("generation %d, and the record is of %d, written last at %d", n.Generation(), record.CreateRevision, record.ModRevision)
	}
	if age := time.Since(n.T0()); age < 0 || age > 3*time.Second {
		t.Errorf("t0 is %s ago", age)
	}

	// The lease is lost, and not for a moment does the next one count for the old record.
	was, session := n.Generation(), func() string {
		r, err := state.Decode[state.NodeRecord](get(t, direct, keys.Node("id1")).Value)
		if err != nil {
			return ""
		}
		return r.Session
	}
	before := session()
	proxy.Cut()
	storetest.Wait(t, patience, "the record to be gone", func() bool { return get(t, direct, keys.Node("id1")).Key == "" })
	proxy.Mend()
	storetest.Wait(t, patience, "the node to be back", func() bool {
		lease, _ := n.presence.Lease()
		if !n.T0().IsZero() && lease.Number > 1 && n.Generation() == was {
			t.Error("a renewal counts for a record that is not there")
		}
		return counts() && n.Generation() != was
	})
	if session() == before {
		t.Error("the session is the same")
	}

	// It is started again: record and units report were never away, the router's
	// report is deleted at the end of the one before.
	generation := n.Generation()
	n.presence.Delete(keys.RouterReport("id1"))
	n.end()
	if kv := get(t, direct, keys.RouterReport("id1")); kv.Key != "" {
		t.Error("the report of the router outlives it")
	}
	if kv := get(t, direct, keys.UnitsReport("id1")); kv.Value != "of n1" {
		t.Errorf("the report of the units is %q", kv.Value)
	}
	n = begin(t, endpoint, first, 3*time.Second)
	storetest.Wait(t, patience, "the next process to be registered", counts)
	if n.Generation() != generation {
		t.Error("a restart has changed the generation")
	}
	n.end()

	// One that runs no units is gone at once.
	router := first
	router.Units = false
	n = begin(t, endpoint, router, time.Minute)
	storetest.Wait(t, patience, "the router to be registered", counts)
	n.end()
	if kv := get(t, direct, keys.Node("id1")); kv.Key != "" {
		t.Error("the record outlives the node")
	}
}

func TestRegistrationBesideAnother(t *testing.T) {
	t.Parallel()
	endpoint := storetest.Start(t)
	direct := client(t, endpoint)
	a := begin(t, endpoint, first, 3*time.Second)
	storetest.Wait(t, patience, "the first to be registered", a.Registered)
	other := first
	other.Name, other.Address, other.BootID = "n2", "10.0.0.2", "b2"
	b := begin(t, endpoint, other, 3*time.Second)
	storetest.Wait(t, patience, "the second to say why it waits", func() bool {
		return strings.Contains(b.log.String(), "systemd-machine-id-setup") && strings.Contains(b.log.String(), "10.0.0.1")
	})
	if kv := get(t, direct, keys.RouterReport("id1")); kv.Value != "of n1" || b.Registered() || b.Generation() != 0 || !b.T0().IsZero() {
		t.Errorf("the second has taken the place: %q", kv.Value)
	}

	// Another one takes the place of the first.
	record := other
	record.V, record.Session = 1, "x.1"
	if _, err := direct.Apply(t.Context(), []store.Op{
		store.Put(keys.Node("id1"), state.Encode(record)), store.Put(keys.RouterReport("id1"), "of n2"),
	}); err != nil {
		t.Fatal(err)
	}
	storetest.Wait(t, patience, "the first to withdraw", func() bool {
		return !a.Registered() && a.Generation() == 0 && a.T0().IsZero()
	})
	a.presence.Set(keys.RouterReport("id1"), "of n1, later")
	storetest.Wait(t, patience, "the second, whose record that is, to be registered", func() bool {
		return b.Registered() && !b.T0().IsZero() && get(t, direct, keys.UnitsReport("id1")).Value == "of n2"
	})
	if record, report := get(t, direct, keys.Node("id1")), get(t, direct, keys.RouterReport("id1")); a.Registered() ||
		!strings.Contains(record.Value, "10.0.0.2") || report.Value != "of n2" {
		t.Errorf("the record is %q, the report %q", record.Value, report.Value)
	}
	b.end()
	storetest.Wait(t, patience, "the first to come back", func() bool {
		return a.Registered() && !a.T0().IsZero() && get(t, direct, keys.RouterReport("id1")).Value == "of n1, later" &&
			get(t, direct, keys.UnitsReport("id1")).Value == "of n1"
	})
}
