package feed

import (
	"context"
	"errors"
	"slices"
	"testing"
	"testing/synctest"
)

type snapshot struct{ revision int64 }

func (s *snapshot) Rev() int64 {
	if s == nil {
		return 0
	}
	return s.revision
}

func TestFeedStartsEmpty(t *testing.T) {
	f := New[*snapshot](nil)
	if f.Latest() != nil {
		t.Error("a new feed has a snapshot")
	}
	s, replaced := f.Next()
	if s != nil {
		t.Error("Next of a new feed has a snapshot")
	}
	f.Publish(&snapshot{1})
	<-replaced
	if f.Latest().revision != 1 {
		t.Errorf("latest is %d", f.Latest().revision)
	}
}

// A slow reader skips what was replaced meanwhile, sees the newest, and leaves
// when its context ends.
func TestReaders(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := New[*snapshot](nil)
		ctx, cancel := context.WithCancelCause(t.Context())
		proceed := make(chan struct{})
		read := func(seen *[]int64, before func()) <-chan error {
			done := make(chan error)
			go func() {
				_, err := f.Until(ctx, func(s *snapshot) bool {
					*seen = append(*seen, s.Rev())
					before()
					return false
				})
				done <- err
			}()
			return done
		}
		var fast, slow []int64
		first := read(&fast, func() {})
		second := read(&slow, func() { <-proceed })
		synctest.Wait()
		for r := range int64(3) {
			f.Publish(&snapshot{r + 1})
			synctest.Wait()
		}
		close(proceed)
		synctest.Wait()
		over := errors.New("over")
		cancel(over)
		for _, done := range []<-chan error{first, second} {
			if err := <-done; !errors.Is(err, over) {
				t.Errorf("a reader ended with %v, want the cause", err)
			}
		}
		if want := []int64{0, 1, 2, 3}; !slices.Equal(fast, want) {
			t.Errorf("the fast reader saw %v, want %v", fast, want)
		}
		if want := []int64{0, 3}; !slices.Equal(slow, want) {
			t.Errorf("the slow reader saw %v, want %v", slow, want)
		}
	})
}

// At returns as soon as the revision is there, at once if it is there already.
func TestAt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := New[*snapshot](nil)
		got := make(chan *snapshot)
		go func() {
			s, err := f.At(t.Context(), 2)
			if err != nil {
				t.Error(err)
			}
			got <- s
		}()
		f.Publish(&snapshot{1})
		synctest.Wait()
		select {
		case s := <-got:
			t.Fatalf("At(2) returned revision %d", s.revision)
		default:
		}
		f.Publish(&snapshot{5}) // revisions may be skipped
		if s := <-got; s.revision != 5 {
			t.Errorf("At(2) returned revision %d, want the newest, 5", s.revision)
		}
		if s, err := f.At(t.Context(), 5); err != nil || s.revision != 5 {
			t.Errorf("At(5) returned %v, %v", s, err)
		}
	})
}

func TestUntilReturnsTheLastOneSeen(t *testing.T) {
	f := New(&snapshot{7})
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	s, err := f.Until(ctx, func(*snapshot) bool { return false })
	if !errors.Is(err, context.Canceled) || s.Rev() != 7 {
		t.Errorf("got revision %d, %v, want 7 and the reason", s.Rev(), err)
	}
}
