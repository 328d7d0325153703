package store_test

import (
	"context"
	"fmt"
	"maps"
	"testing"
	"time"

	"flotilla/internal/store"
	"flotilla/internal/store/storetest"
)

func TestPresence(t *testing.T) {
	t.Parallel()
	endpoint := storetest.Start(t)
	etcd := raw(t, endpoint)
	proxy := storetest.NewProxy(t, endpoint)
	p := store.NewPresence(open(t, proxy.Endpoint()), 2*time.Second, logger(t))
	want := map[string]string{}
	for i := range 300 { // more than one transaction
		want[fmt.Sprintf("/a/%d", i)] = "x"
		p.Set(fmt.Sprintf("/a/%d", i), "x")
	}
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- p.Run(ctx) }()
	direct := open(t, endpoint)
	have := func() map[string]string {
		items, _, err := direct.List(t.Context(), "/a/")
		if err != nil {
			t.Fatal(err)
		}
		all := map[string]string{}
		for _, kv := range items {
			all[kv.Key] = kv.Value
		}
		return all
	}
	same := func() bool { return maps.Equal(have(), want) }
	storetest.Wait(t, 5*time.Second, "all keys", same)

	p.Set("/a/0", "y")
	p.Set("/a/0", "z")
	p.Delete("/a/1")
	want["/a/0"] = "z"
	delete(want, "/a/1")
	storetest.Wait(t, 5*time.Second, "the changes", same)

	leases, err := etcd.Leases(t.Context())
	if err != nil || len(leases.Leases) != 1 {
		t.Fatalf("%v %v, want one lease", leases, err)
	}
	lost := leases.Leases[0].ID
	if _, err := etcd.Revoke(t.Context(), lost); err != nil {
		t.Fatal(err)
	}
	storetest.Wait(t, 5*time.Second, "all keys after the lease was revoked", same)

	if _, err := etcd.Delete(t.Context(), "/a/2"); err != nil {
		t.Fatal(err)
	}
	storetest.Wait(t, 20*time.Second, "a key that somebody deleted", same)

	proxy.Cut()
	storetest.Wait(t, 20*time.Second, "the lease to expire", func() bool { return len(have()) == 0 })
	p.Set("/a/new", "n")
	want["/a/new"] = "n"
	proxy.Mend()
	storetest.Wait(t, 20*time.Second, "all keys after the store was away", same)

	stop()
	if err := <-done; err != nil {
		t.Error(err)
	}
	if n := len(have()); n != 0 {
		t.Errorf("%d keys are left after a normal stop", n)
	}
}

func TestPresenceLingers(t *testing.T) {
	t.Parallel()
	endpoint := storetest.Start(t)
	c := open(t, endpoint)
	run := func(linger bool) (created int64) {
		t.Helper()
		p := store.NewPresence(c, 10*time.Second, logger(t))
		p.Linger(linger)
		p.Set("/a", fmt.Sprint(linger))
		ctx, stop := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- p.Run(ctx) }()
		storetest.Wait(t, 5*time.Second, "the key", func() bool {
			kv, _, err := c.Get(t.Context(), "/a")
			created = kv.CreateRevision
			return err == nil && kv.Value == fmt.Sprint(linger)
		})
		stop()
		if err := <-done; err != nil {
			t.Error(err)
		}
		return created
	}
	first := run(true)
	if second := run(false); second != first {
		t.Errorf("the key was created anew at %d, it was there since %d", second, first)
	}
	if _, there, err := c.Get(t.Context(), "/a"); there || err != nil {
		t.Errorf("the key outlives its lease that was given up (%v)", err)
	}
}

func TestPresenceConfirmed(t *testing.T) {
	t.Parallel()
	endpoint := storetest.Start(t)
	etcd := raw(t, endpoint)
	proxy := storetest.NewProxy(t, endpoint)
	p := store.NewPresence(open(t, proxy.Endpoint()), 2*time.Second, logger(t))
	confirmed := func() time.Time { lease, _ := p.Lease(); return lease.Renewed }
	_, renewed := p.Lease()
	if !confirmed().IsZero() {
		t.Error("confirmed before there is a lease")
	}
	before := time.Now()
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- p.Run(ctx) }()
	<-renewed
	first := confirmed()
	if !first.After(before) {
		t.Errorf("confirmed at %v, before it was asked at %v", first, before)
	}
	storetest.Wait(t, 30*time.Second, "a renewal", func() bool { return confirmed().After(first) })

	proxy.Freeze()
	storetest.Wait(t, 30*time.Second, "the lease to expire", func() bool {
		leases, err := etcd.Leases(t.Context())
		return err == nil && len(leases.Leases) == 0
	})
	if age := time.Since(confirmed()); age < 2*time.Second {
		t.Errorf("the lease expired %v after the last confirmation, sooner than its TTL", age)
	}
	proxy.Thaw()
	storetest.Wait(t, 30*time.Second, "a new lease", func() bool { return time.Since(confirmed()) < time.Second })
	stop()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// What was withdrawn is out of the store, and comes back with the next lease; what
// somebody else has written meanwhile stays.
func TestPresenceWithdraws(t *testing.T) {
	t.Parallel()
	endpoint := storetest.Start(t)
	c := open(t, endpoint)
	p := store.NewPresence(c, 10*time.Second, logger(t))
	p.Withdraw()
	p.Set("/a", "ours")
	p.Set("/b", "ours")
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- p.Run(ctx) }()
	value := func(key string) string {
		kv, _, err := c.Get(t.Context(), key)
		if err != nil {
			t.Fatal(err)
		}
		return kv.Value
	}
	if lease, _ := p.Lease(); lease.Number != 0 || value("/a") != "" {
		t.Errorf("withdrawn before it began, it has lease %+v and wrote %q", lease, value("/a"))
	}
	for round := 1; round <= 2; round++ {
		p.Return()
		storetest.Wait(t, 5*time.Second, "the keys", func() bool { return value("/a") == "ours" && value("/b") == "ours" })
		lease, renewed := p.Lease()
		if lease.Number != round || time.Since(lease.Renewed) > 5*time.Second {
			t.Errorf("round %d: %+v", round, lease)
		}
		if _, err := c.Apply(t.Context(), []store.Op{store.Put("/b", "theirs")}); err != nil {
			t.Fatal(err)
		}
		p.Withdraw()
		<-renewed
		storetest.Wait(t, 5*time.Second, "the keys to be gone", func() bool { return value("/a") == "" })
		if lease, _ := p.Lease(); lease.Number != round || !lease.Renewed.IsZero() {
			t.Errorf("withdrawn it has %+v", lease)
		}
		if got := value("/b"); got != "theirs" {
			t.Errorf("the other's key is %q", got)
		}
	}
	stop()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// A deletion is written at the end although the other keys linger.
func TestPresenceDeletesWhileLingering(t *testing.T) {
	t.Parallel()
	endpoint := storetest.Start(t)
	c := open(t, endpoint)
	p := store.NewPresence(c, time.Minute, logger(t))
	p.Linger(true)
	p.Set("/a", "x")
	p.Set("/b", "x")
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- p.Run(ctx) }()
	there := func(key string) bool {
		_, there, err := c.Get(t.Context(), key)
		return there && err == nil
	}
	storetest.Wait(t, 5*time.Second, "the keys", func() bool { return there("/a") && there("/b") })
	stop()
	p.Delete("/a")
	if err := <-done; err != nil {
		t.Error(err)
	}
	if there("/a") || !there("/b") {
		t.Errorf("the deleted key is there: %v, the other: %v", there("/a"), there("/b"))
	}
}
