package catalog

import (
	"context"
	"testing"
	"testing/synctest"
)

func TestFeedStartsEmpty(t *testing.T) {
	f := NewFeed()
	if f.Latest() != nil {
		t.Error("a new feed has a snapshot")
	}
	s, replaced := f.Next()
	if s != nil {
		t.Error("Next of a new feed has a snapshot")
	}
	f.Publish(&Snapshot{Revision: 1})
	<-replaced
	if f.Latest().Revision != 1 {
		t.Errorf("latest is %d", f.Latest().Revision)
	}
}

// A slow reader skips what was replaced meanwhile, sees the newest, and leaves
// when its context ends.
func TestFeedChanges(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := NewFeed()
		ctx, cancel := context.WithCancel(t.Context())
		var fast, slow []int64
		proceed := make(chan struct{})
		done := make(chan struct{}, 2)
		go func() {
			for s := range f.Changes(ctx) {
				fast = append(fast, s.Revision)
			}
			done <- struct{}{}
		}()
		go func() {
			for s := range f.Changes(ctx) {
				slow = append(slow, s.Revision)
				<-proceed
			}
			done <- struct{}{}
		}()
		synctest.Wait()
		for r := range int64(3) {
			f.Publish(&Snapshot{Revision: r + 1})
			synctest.Wait()
		}
		close(proceed)
		synctest.Wait()
		cancel()
		<-done
		<-done
		if len(fast) != 3 || fast[2] != 3 {
			t.Errorf("the fast reader saw %v", fast)
		}
		if len(slow) != 2 || slow[0] != 1 || slow[1] != 3 {
			t.Errorf("the slow reader saw %v", slow)
		}
	})
}

func TestFeedChangesStopsWhenTheReaderBreaks(t *testing.T) {
	f := NewFeed()
	f.Publish(&Snapshot{Revision: 7})
	for s := range f.Changes(t.Context()) {
		if s.Revision != 7 {
			t.Errorf("revision %d", s.Revision)
		}
		break
	}
}
