package state

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"flotilla/internal/feed"
	"flotilla/internal/store"
)

// Times of a Feed.
const (
	// freshLimit is how long a caller whose context has no deadline waits for the
	// present state.
	freshLimit = 2 * time.Second
	// keepReports is how long reports are followed after the last reader.
	keepReports = time.Minute
	// attempts is how often Update plans a change that others get in the way of.
	attempts = 10
)

// Feed is the one place from which a node reads the state of the cluster. Its
// methods may be called from any goroutine, and answer from the last snapshot
// while the store is away, but for those that say that they ask it.
type Feed struct {
	Keys  Keys
	store *store.Client
	log   *slog.Logger
	head  *feed.Feed[*Snapshot]
	// reflector follows cluster/, and all there is while somebody reads reports: a
	// node has one watch either way.
	reflector *store.Reflector

	mu      sync.Mutex
	readers int         // of reports, that last; guarded by mu
	end     *time.Timer // ends the following of reports; nil: none is due; guarded by mu
}

// NewFeed returns a Feed, which follows the store while Run runs.
func NewFeed(c *store.Client, keys Keys, log *slog.Logger) *Feed {
	return &Feed{
		Keys: keys, store: c, log: log, head: feed.New(&Snapshot{}),
		reflector: store.NewReflector(c, keys.Prefix+"cluster/", keys.Confirmed(), log),
	}
}

// Run follows the store until ctx ends, and returns nil then.
func (f *Feed) Run(ctx context.Context) error {
	return f.reflector.Run(ctx, func(u store.Update) int {
		s, changed := fold(f.Keys, f.head.Latest(), u)
		f.head.Publish(s)
		return changed
	})
}

// Latest returns the newest snapshot.
func (f *Feed) Latest() *Snapshot { return f.head.Latest() }

// Next returns the newest snapshot and a channel that is closed as soon as there
// is a newer one.
func (f *Feed) Next() (*Snapshot, <-chan struct{}) { return f.head.Next() }

// Until returns the newest snapshot as soon as ok accepts it. If ctx ends first it
// returns the last one that ok saw and the cause.
func (f *Feed) Until(ctx context.Context, ok func(*Snapshot) bool) (*Snapshot, error) {
	return f.head.Until(ctx, ok)
}

// Status returns how the Feed stands to the store.
func (f *Feed) Status() store.Status { return f.reflector.Status() }

// AcceptEpoch says that the store's present content is the right one, see
// store.Reflector.
func (f *Feed) AcceptEpoch() { f.reflector.AcceptEpoch() }

// At returns a snapshot in which everything is that was written up to a revision.
// It asks the store if none is there yet, and fails with the end of ctx only.
func (f *Feed) At(ctx context.Context, revision int64) (*Snapshot, error) {
	if err := f.reflector.Reach(ctx, revision); err != nil {
		return nil, fmt.Errorf("wait for revision %d of the store: %w", revision, err)
	}
	s := *f.Latest()
	s.Revision = max(s.Revision, revision) // nothing of ours has changed since
	return &s, nil
}

// Fresh returns a snapshot in which everything is that was written before the
// call. It asks the store, for no longer than 2 s unless ctx has a deadline.
// Errors are those of the store, such as store.ErrUnavailable.
func (f *Feed) Fresh(ctx context.Context) (*Snapshot, error) {
	if _, ok := ctx.Deadline(); !ok {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, freshLimit)
		defer cancel()
	}
	seen := f.reflector.Status().Revision
	revision, err := f.store.Revision(ctx, f.Keys.Confirmed())
	if err != nil {
		return nil, err
	}
	if f.reflector.Status().Held || revision < seen {
		return nil, fmt.Errorf("%w: it holds another cluster or an older state than before", store.ErrUnavailable)
	}
	s, err := f.At(ctx, revision)
	if errors.Is(err, context.DeadlineExceeded) {
		err = fmt.Errorf("%w: %s", store.ErrUnavailable, f.reflector.Status().Err)
	}
	return s, err
}

// Full is Fresh with the reports of all nodes.
func (f *Feed) Full(ctx context.Context) (*Snapshot, error) {
	defer f.FollowReports()()
	limited, cancel := context.WithTimeout(ctx, freshLimit)
	defer cancel()
	for {
		if _, err := f.Until(limited, func(s *Snapshot) bool { return s.Reports }); err != nil {
			return nil, fmt.Errorf("%w: the nodes' reports could not be read: %s", store.ErrUnavailable, f.reflector.Status().Err)
		}
		// The end of an earlier reader's minute may just have taken them away.
		if s, err := f.Fresh(ctx); err != nil || s.Reports {
			return s, err
		}
	}
}

// FollowReports has the snapshots include the reports of nodes until release is
// called, and a minute longer. It does not wait for them: see Snapshot.Reports.
func (f *Feed) FollowReports() (release func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.end != nil {
		f.end.Stop()
		f.end = nil
	}
	f.readers++
	f.reflector.Follow(f.Keys.Prefix)
	return sync.OnceFunc(func() {
		f.mu.Lock()
		defer f.mu.Unlock()
		if f.readers--; f.readers > 0 {
			return
		}
		f.end = time.AfterFunc(keepReports, func() {
			f.mu.Lock()
			defer f.mu.Unlock()
			if f.readers == 0 {
				f.reflector.Follow(f.Keys.Prefix + "cluster/")
			}
		})
	})
}

// Tx is a guarded transaction. One without operations writes nothing.
type Tx struct {
	Ops   []store.Op
	Conds []store.Cond
	// Unknown is called when it is unknown whether this was written, and may be nil.
	// What counts, such as restarts, has to look whether it was before it counts on.
	Unknown func()
}

// Update writes the transaction that change makes of the present state, and
// returns a revision at which it is in force. If others change what it is guarded
// by, or if it is unknown whether it was written, change is called again with a
// newer snapshot: it must come to no operations when its purpose is reached.
//
// Errors: that of change, and those of store.Client.Apply but for ErrConflict and
// ErrUnknown, which are returned only after ten attempts.
func (f *Feed) Update(ctx context.Context, change func(*Snapshot) (Tx, error)) (int64, error) {
	for attempt := 1; ; attempt++ {
		s, err := f.Fresh(ctx)
		if err != nil {
			return 0, err
		}
		tx, err := change(s)
		if err != nil || len(tx.Ops) == 0 {
			return s.Revision, err
		}
		revision, err := f.store.Apply(ctx, tx.Ops, tx.Conds...)
		if errors.Is(err, store.ErrUnknown) && tx.Unknown != nil {
			tx.Unknown()
		}
		if err == nil || attempt == attempts || !errors.Is(err, store.ErrConflict) && !errors.Is(err, store.ErrUnknown) {
			return revision, err
		}
	}
}

// Lead takes part in the election until ctx ends, and returns nil then. While the
// node leads, lead runs with a context that ends when the leadership is lost and a
// condition that holds until then: every write of the leader carries it, so that
// one who was deposed and does not know yet cannot write. The node stands for
// election again when lead returns.
func (f *Feed) Lead(ctx context.Context, id, name string, lead func(context.Context, store.Cond) error) error {
	value := Encode(Leader{V: Version, Node: id, Name: name})
	for ctx.Err() == nil {
		s, err := f.Until(ctx, func(s *Snapshot) bool { return s.Revision > 0 && !s.Leader.Exists() })
		if err != nil {
			break
		}
		err = f.store.Hold(ctx, f.Keys.Leader(), value, func(ctx context.Context, leader store.Cond, created int64) error {
			return f.lead(ctx, created, leader, lead)
		})
		switch {
		case ctx.Err() != nil:
		case errors.Is(err, store.ErrConflict): // another one was faster
			_, _ = f.Until(ctx, func(newer *Snapshot) bool { return newer != s })
		case err != nil:
			f.log.Warn("this node does not lead any more, or cannot", "err", err)
		}
		select {
		case <-time.After(time.Second):
		case <-ctx.Done():
		}
	}
	return nil
}

// errDeposed cancels the leader's context when the snapshot shows another leader.
var errDeposed = errors.New("another node leads")

func (f *Feed) lead(ctx context.Context, created int64, leader store.Cond, lead func(context.Context, store.Cond) error) error {
	ctx, stop := context.WithCancelCause(ctx)
	var watching sync.WaitGroup
	defer watching.Wait()
	defer stop(nil)
	watching.Go(func() {
		if _, err := f.Until(ctx, func(s *Snapshot) bool { return s.Revision >= created && s.Leader.Created != created }); err == nil {
			stop(errDeposed)
		}
	})
	err := lead(ctx, leader)
	if cause := context.Cause(ctx); errors.Is(cause, errDeposed) {
		return cause
	}
	return err
}
