// Package feed hands the newest snapshot of something to any number of readers
// inside a node. It knows nothing of what is in a snapshot but its revision.
package feed

import (
	"context"
	"sync/atomic"
)

// Snapshot is what a Feed carries. It is immutable, since all readers share it.
type Snapshot interface {
	// Rev returns the revision of the store that the snapshot shows. If S is a
	// pointer, Rev must take nil, which is what a Feed may begin with.
	Rev() int64
}

// Feed hands the newest snapshot to its readers. One writer calls Publish; slow
// readers skip intermediate snapshots, they never queue them.
type Feed[S Snapshot] struct{ head atomic.Pointer[link[S]] }

type link[S Snapshot] struct {
	snapshot S
	replaced chan struct{} // closed when a newer link is published
}

// New returns a Feed whose newest snapshot is first, which is often empty or nil.
func New[S Snapshot](first S) *Feed[S] {
	f := &Feed[S]{}
	f.head.Store(&link[S]{first, make(chan struct{})})
	return f
}

// Publish makes s the newest snapshot.
func (f *Feed[S]) Publish(s S) {
	old := f.head.Swap(&link[S]{s, make(chan struct{})})
	close(old.replaced)
}

// Latest returns the newest snapshot.
func (f *Feed[S]) Latest() S { return f.head.Load().snapshot }

// Next returns the newest snapshot and a channel that is closed as soon as a
// newer one is there: a loop selects on it beside its other events.
func (f *Feed[S]) Next() (S, <-chan struct{}) {
	l := f.head.Load()
	return l.snapshot, l.replaced
}

// Until returns the newest snapshot as soon as ok accepts it. If ctx ends first,
// it returns the last snapshot that ok saw and the cause.
func (f *Feed[S]) Until(ctx context.Context, ok func(S) bool) (S, error) {
	for {
		s, replaced := f.Next()
		if ok(s) {
			return s, nil
		}
		select {
		case <-replaced:
		case <-ctx.Done():
			return s, context.Cause(ctx)
		}
	}
}

// At returns the newest snapshot as soon as it shows that revision or a later one.
func (f *Feed[S]) At(ctx context.Context, revision int64) (S, error) {
	return f.Until(ctx, func(s S) bool { return s.Rev() >= revision })
}
