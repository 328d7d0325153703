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
	if !p.Confirmed().IsZero() {
		t.Error("confirmed before there is a lease")
	}
	before := time.Now()
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- p.Run(ctx) }()
	<-p.Beats()
	first := p.Confirmed()
	if !first.After(before) {
		t.Errorf("confirmed at %v, before it was asked at %v", first, before)
	}
	storetest.Wait(t, 30*time.Second, "a renewal", func() bool { return p.Confirmed().After(first) })

	proxy.Freeze()
	storetest.Wait(t, 30*time.Second, "the lease to expire", func() bool {
		leases, err := etcd.Leases(t.Context())
		return err == nil && len(leases.Leases) == 0
	})
	if age := time.Since(p.Confirmed()); age < 2*time.Second {
		t.Errorf("the lease expired %v after the last confirmation, sooner than its TTL", age)
	}
	proxy.Thaw()
	storetest.Wait(t, 30*time.Second, "a new lease", func() bool { return time.Since(p.Confirmed()) < time.Second })
	stop()
	if err := <-done; err != nil {
		t.Error(err)
	}
}
