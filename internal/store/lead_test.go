package store_test

import (
	"context"
	"errors"
	"sync/atomic"
	"testing"
	"time"

	"flotilla/internal/store"
	"flotilla/internal/store/storetest"
)

const election = "/test/leaders/"

// candidate runs Lead; while it leads it writes its name to /test/who each 10 ms.
type candidate struct {
	leading atomic.Bool
	stop    context.CancelFunc
	done    chan error
}

func stand(t *testing.T, c *store.Client, name string) *candidate {
	ctx, stop := context.WithCancel(t.Context())
	k := &candidate{stop: stop, done: make(chan error, 1)}
	go func() {
		k.done <- c.Lead(ctx, election, name, logger(t), func(ctx context.Context, leader store.Cond) error {
			k.leading.Store(true)
			defer k.leading.Store(false)
			for ctx.Err() == nil {
				_, _ = c.Apply(ctx, []store.Op{store.Put("/test/who", name)}, leader)
				select {
				case <-time.After(10 * time.Millisecond):
				case <-ctx.Done():
				}
			}
			return ctx.Err()
		})
	}()
	return k
}

// leader returns the value of the election's oldest key, which has won; "" if
// there is none.
func leader(t *testing.T, c *store.Client) string {
	t.Helper()
	keys, _, err := c.List(t.Context(), election)
	if err != nil {
		t.Error(err)
	}
	var first store.KV
	for _, kv := range keys {
		if first.Key == "" || kv.CreateRevision < first.CreateRevision {
			first = kv
		}
	}
	return first.Value
}

func TestLead(t *testing.T) {
	t.Parallel()
	endpoint := storetest.Start(t)
	proxy := storetest.NewProxy(t, endpoint)
	direct := open(t, endpoint)
	who := func(want string) func() bool {
		return func() bool {
			kv, _, err := direct.Get(t.Context(), "/test/who")
			return err == nil && kv.Value == want
		}
	}
	a := stand(t, open(t, proxy.Endpoint()), "a")
	storetest.Wait(t, 30*time.Second, "a to lead", who("a"))
	b := stand(t, open(t, endpoint), "b")
	if name := leader(t, direct); name != "a" {
		t.Errorf("leader is %q, want a", name)
	}
	if b.leading.Load() {
		t.Error("b leads beside a")
	}

	proxy.Freeze() // a cannot renew, and does not see that either
	storetest.Wait(t, 30*time.Second, "b to lead", who("b"))
	storetest.Wait(t, 30*time.Second, "a to notice", func() bool { return !a.leading.Load() })
	proxy.Thaw()
	b.stop()
	if err := <-b.done; err != nil {
		t.Errorf("b ended with %v", err)
	}
	storetest.Wait(t, 30*time.Second, "a to lead again", who("a"))

	// Deposed by somebody who deletes its key.
	if _, err := direct.Apply(t.Context(), []store.Op{store.DeletePrefix(election)}); err != nil {
		t.Fatal(err)
	}
	storetest.Wait(t, 30*time.Second, "a to notice", func() bool {
		return leader(t, direct) == "a" && a.leading.Load() // elected anew
	})
	a.stop()
	if err := <-a.done; err != nil {
		t.Errorf("a ended with %v", err)
	}
}

func TestDeposedLeaderCannotWrite(t *testing.T) {
	t.Parallel()
	c := open(t, storetest.Start(t))
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	err := c.Lead(ctx, election, "a", logger(t), func(ctx context.Context, leader store.Cond) error {
		defer stop()
		put := []store.Op{store.Put("/test/who", "a")}
		if _, err := c.Apply(t.Context(), put, leader); err != nil {
			t.Errorf("a leader's write: %v", err)
		}
		if _, err := c.Apply(t.Context(), []store.Op{store.DeletePrefix(election)}); err != nil {
			t.Error(err)
		}
		if _, err := c.Apply(t.Context(), put, leader); !errors.Is(err, store.ErrConflict) {
			t.Errorf("a deposed leader's write: %v, want ErrConflict", err)
		}
		select {
		case <-ctx.Done():
		case <-time.After(30 * time.Second):
			t.Error("a deposed leader was not told")
		}
		return nil
	})
	if err != nil {
		t.Error(err)
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
