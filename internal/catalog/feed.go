package catalog

import (
	"context"
	"iter"
	"sync/atomic"
)

// Feed hands the newest Snapshot to any number of readers. One writer calls
// Publish; slow readers skip intermediate snapshots, they never queue them.
type Feed struct{ head atomic.Pointer[link] }

type link struct {
	snapshot *Snapshot     // nil until the first Publish
	replaced chan struct{} // closed when a newer link is published
}

// NewFeed returns a Feed that has no snapshot yet.
func NewFeed() *Feed {
	f := &Feed{}
	f.head.Store(&link{replaced: make(chan struct{})})
	return f
}

// Publish makes s the newest snapshot.
func (f *Feed) Publish(s *Snapshot) {
	old := f.head.Swap(&link{s, make(chan struct{})})
	close(old.replaced)
}

// Latest returns the newest snapshot, or nil before the first Publish.
func (f *Feed) Latest() *Snapshot { return f.head.Load().snapshot }

// Next returns the newest snapshot (nil before the first Publish) and a channel
// that is closed as soon as a newer one is there.
func (f *Feed) Next() (*Snapshot, <-chan struct{}) {
	l := f.head.Load()
	return l.snapshot, l.replaced
}

// Changes yields the newest snapshot, as soon as there is one, and then each
// newer one until ctx ends.
func (f *Feed) Changes(ctx context.Context) iter.Seq[*Snapshot] {
	return func(yield func(*Snapshot) bool) {
		for ctx.Err() == nil {
			s, replaced := f.Next()
			if s != nil && !yield(s) {
				return
			}
			select {
			case <-replaced:
			case <-ctx.Done():
			}
		}
	}
}
