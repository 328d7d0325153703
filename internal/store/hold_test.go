package store_test

import (
	"context"
	"errors"
	"testing"
	"time"

	"flotilla/internal/store"
	"flotilla/internal/store/storetest"
)

const held = "/test/held"

// Only one client has the key. One that cannot renew its lease loses it, is told,
// and cannot write any more.
func TestHold(t *testing.T) {
	t.Parallel()
	endpoint := storetest.Start(t)
	proxy := storetest.NewProxy(t, endpoint)
	a, b := open(t, proxy.Endpoint()), open(t, endpoint)
	put := []store.Op{store.Put("/test/who", "a")}

	has, lost := make(chan store.Cond), make(chan error, 1)
	go func() {
		lost <- a.Hold(t.Context(), held, "a", func(ctx context.Context, c store.Cond, _ int64) error {
			has <- c
			<-ctx.Done()
			return ctx.Err()
		})
	}()
	cond := <-has
	if _, err := b.Apply(t.Context(), put, cond); err != nil {
		t.Errorf("a write of the holder: %v", err)
	}
	nobody := func(context.Context, store.Cond, int64) error { t.Error("two clients have the key"); return nil }
	if err := b.Hold(t.Context(), held, "b", nobody); !errors.Is(err, store.ErrConflict) {
		t.Errorf("a second holder: %v, want ErrConflict", err)
	}

	proxy.Freeze() // a cannot renew, and does not see that either
	storetest.Wait(t, 30*time.Second, "the key to go", func() bool {
		_, there, err := b.Get(t.Context(), held)
		return err == nil && !there
	})
	if _, err := b.Apply(t.Context(), put, cond); !errors.Is(err, store.ErrConflict) {
		t.Errorf("a write of who was the holder: %v, want ErrConflict", err)
	}
	if err := <-lost; err == nil || errors.Is(err, context.Canceled) {
		t.Errorf("the holder ended with %v, want that the lease was lost", err)
	}
	over := errors.New("over")
	err := b.Hold(t.Context(), held, "b", func(_ context.Context, _ store.Cond, created int64) error {
		if kv, there, err := b.Get(t.Context(), held); err != nil || !there || kv.Value != "b" || kv.CreateRevision != created {
			t.Errorf("the key is %+v %v %v, created at %d", kv, there, err, created)
		}
		return over
	})
	if !errors.Is(err, over) {
		t.Errorf("got %v, want the error of the holder", err)
	}
	if _, there, err := b.Get(t.Context(), held); err != nil || there {
		t.Errorf("the key is still there: %v, %v", there, err)
	}
}
