package store_test

import (
	"context"
	"errors"
	"sync"
	"testing"
	"time"

	"flotilla/internal/store"
	"flotilla/internal/store/storetest"
)

// TestFreshReadsAreShared: who asks in time gets the answer of the same read;
// nobody suffers from one who gives up.
func TestFreshReadsAreShared(t *testing.T) {
	t.Parallel()
	c, err := store.Open(store.Config{Endpoints: []string{storetest.Start(t)}, Logger: logger(t)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	type answer struct {
		began   time.Time
		cluster uint64
		err     error
	}
	// ask has five readers; then is called when the first is there.
	ask := func(first context.Context, then func()) (answers [5]answer) {
		read := func(ctx context.Context, a *answer) {
			a.began, a.cluster, a.err = c.ReadFresh(ctx, "/x", 2*time.Second)
		}
		var g sync.WaitGroup
		g.Go(func() { read(first, &answers[0]) })
		storetest.Wait(t, 10*time.Second, "a read to be due", func() bool { return c.FreshDue("/x") })
		for i := range answers[1:] {
			g.Go(func() { read(t.Context(), &answers[i+1]) })
		}
		then()
		g.Wait()
		return answers
	}
	all := ask(t.Context(), func() {})
	for _, a := range all {
		if a.err != nil || a.cluster == 0 || !a.began.Equal(all[0].began) {
			t.Errorf("an answer of another read: %+v, not %+v", a, all[0])
		}
	}
	first, giveUp := context.WithCancel(t.Context())
	all = ask(first, func() { time.AfterFunc(200*time.Millisecond, giveUp) })
	if !errors.Is(all[0].err, context.Canceled) {
		t.Errorf("who gave up got %+v", all[0])
	}
	for _, a := range all[1:] {
		if a.err != nil || a.cluster == 0 {
			t.Errorf("somebody gave up, and another got %+v", a)
		}
	}
}
