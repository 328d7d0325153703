package store_test

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"time"

	"flotilla/internal/store"
	"flotilla/internal/store/storetest"
)

func TestManyReadsAreOfOneRevision(t *testing.T) {
	c := open(t, storetest.Start(t))
	ctx := t.Context()
	var keys []string
	for i := range 300 { // more than one transaction takes
		key := fmt.Sprintf("/a/%03d", i)
		keys = append(keys, key)
		if _, err := c.Apply(ctx, []store.Op{store.Put(key, "old"), store.Put(fmt.Sprintf("/b/%03d", i), "old")}); err != nil {
			t.Fatal(err)
		}
	}
	_, before, err := c.GetMany(ctx, 0, "/a/000")
	if err != nil {
		t.Fatal(err)
	}
	after, err := c.Apply(ctx, []store.Op{store.Put("/a/299", "new"), store.Delete("/b/299")})
	if err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		ask, at int64
		value   string
		b       int
	}{{before, before, "old", 300}, {0, after, "new", 299}} {
		got, at, err := c.GetMany(ctx, tc.ask, append(keys, "/none")...)
		if err != nil || at != tc.at || len(got) != 300 || got["/a/299"].Value != tc.value {
			t.Errorf("keys at %d: %d keys, the last one %q, at %d, %v", tc.ask, len(got), got["/a/299"].Value, at, err)
		}
		lists, at, err := c.ListMany(ctx, tc.ask, "/none/", "/b/", "/a/")
		if err != nil || at != tc.at || len(lists[0]) != 0 || len(lists[1]) != tc.b || lists[2][299].Value != tc.value {
			t.Errorf("lists at %d: %d, at %d, %v", tc.ask, len(lists), at, err)
		}
	}
	if _, _, err := c.GetMany(ctx, after+100, "/a/000"); err == nil || errors.Is(err, store.ErrUnavailable) {
		t.Errorf("a revision of the future: %v", err)
	}
}

func TestGetManyOutlivesABrokenConnection(t *testing.T) {
	proxy := storetest.NewProxy(t, storetest.Start(t))
	c := open(t, proxy.Endpoint())
	if _, err := c.Apply(t.Context(), []store.Op{store.Put("/a", "x")}); err != nil {
		t.Fatal(err)
	}
	proxy.CutBefore("/a")
	ended := make(chan struct{})
	var mend sync.WaitGroup
	mend.Go(func() {
		for again := time.NewTicker(20 * time.Millisecond); ; {
			select {
			case <-again.C:
				proxy.Mend() // whenever it is that it has been cut
			case <-ended:
				return
			}
		}
	})
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if got, _, err := c.GetMany(ctx, 0, "/a"); err != nil || got["/a"].Value != "x" {
		t.Errorf("%v, %v", got, err)
	}
	close(ended)
	mend.Wait()
	proxy.Cut()
	if _, _, err := c.GetMany(t.Context(), 0, "/a"); !errors.Is(err, store.ErrUnavailable) {
		t.Errorf("%v, want ErrUnavailable", err)
	}
}
