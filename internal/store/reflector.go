package store

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc/metadata"
)

// Update is one step of a Reflector: either the complete state or what changed.
type Update struct {
	Revision int64   // store revision that this update leads to; lower than before only after a hold
	Reset    bool    // Items replace everything that was delivered before
	Prefix   string  // of Items, when Reset
	Items    []KV    // the complete state by key, when Reset
	Events   []Event // what changed, in revision order, unless Reset
	Drift    bool    // this Reset is the periodic check: it must not change anything
}

// Status is how a Reflector is doing.
type Status struct {
	Live       bool      // what was delivered is current, give or take the freshness period
	Held       bool      // another cluster or an older state is in the store; see AcceptEpoch
	Confirmed  time.Time // when it was last proved that nothing is missing; zero if never
	Revision   int64     // store revision up to which everything was delivered
	Lists      uint64    // full lists delivered
	Drift      uint64    // periodic checks that found a difference: a bug if not 0
	Restarts   uint64    // watches that had to be started again
	Err        string    // why it is not live; "" when it is
	FreshValue string    // value of the fresh key when it was last read; "" if there is none
}

// Reflector follows all keys below a prefix. It hands over the complete state
// once and then what changes, and never takes "cannot be reached" for "is
// gone": while the store is away, what was delivered stays as it is.
//
// It proves every freshPeriod that it is current. It reads a key linearizably
// and then asks the watch how far it is: only if the watch has passed the
// revision of the read nothing can be missing. A watch that does not answer is
// replaced. The Reflectors of one Client share these reads.
//
// If the store is suddenly another cluster, or an older state of the same one
// (a restore, a wrong address), the Reflector holds: it delivers nothing until
// AcceptEpoch is called or holdLimit has passed, and goes on by itself if the
// old cluster comes back.
type Reflector struct {
	c        *Client
	prefix   string
	freshKey string
	log      *slog.Logger
	accepted chan struct{}
	look     chan struct{} // one slot: what is followed has changed, or somebody waits for a revision

	freshPeriod time.Duration // 2 s, +-20 %
	checkPeriod time.Duration // 10 min, +-20 %
	holdLimit   time.Duration // 10 min

	mu      sync.Mutex
	status  Status        // guarded by mu
	wanted  string        // the prefix to follow; guarded by mu
	reached chan struct{} // closed when status.Revision grows; guarded by mu
}

// NewReflector returns a Reflector of all keys that begin with prefix. freshKey
// is any key; it need not exist. Its value is in Status.
func NewReflector(c *Client, prefix, freshKey string, log *slog.Logger) *Reflector {
	return &Reflector{
		c: c, prefix: prefix, wanted: prefix, freshKey: freshKey, log: log.With("prefix", prefix),
		accepted:    make(chan struct{}, 1),
		look:        make(chan struct{}, 1),
		reached:     make(chan struct{}),
		freshPeriod: 2 * time.Second,
		checkPeriod: 10 * time.Minute,
		holdLimit:   10 * time.Minute,
	}
}

// Status returns the current status. It may be called from any goroutine.
func (r *Reflector) Status() Status {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.status
}

// AcceptEpoch says that the cluster that is in the store now is the right one.
// It has an effect only while Status.Held is set.
func (r *Reflector) AcceptEpoch() {
	if r.Status().Held {
		select {
		case r.accepted <- struct{}{}:
		default:
		}
	}
}

// Follow has the Reflector follow another prefix from now on. The first Update of
// it is a Reset with that prefix; until then what was delivered stands.
func (r *Reflector) Follow(prefix string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.wanted != prefix {
		r.wanted = prefix
		r.poke()
	}
}

// following returns the prefix that is to be followed.
func (r *Reflector) following() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.wanted
}

// Reach returns when everything up to a revision of the store was delivered. It
// has the watch asked at once how far it is. It fails only with the end of ctx.
func (r *Reflector) Reach(ctx context.Context, revision int64) error {
	for asked := false; ; asked = true {
		r.mu.Lock()
		there, reached := r.status.Lists > 0 && r.status.Revision >= revision, r.reached
		if !there && !asked {
			r.poke()
		}
		r.mu.Unlock()
		if there {
			return nil
		}
		select {
		case <-reached:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func (r *Reflector) poke() {
	select {
	case r.look <- struct{}{}:
	default:
	}
}

func (r *Reflector) set(change func(*Status)) {
	r.mu.Lock()
	defer r.mu.Unlock()
	revision := r.status.Revision
	if change(&r.status); r.status.Revision != revision {
		close(r.reached)
		r.reached = make(chan struct{})
	}
}

// answerLimit is how long a watch may take to say how far it is. It is asked
// again each askAgain: a member drops the question while the watch catches up.
const answerLimit, askAgain = time.Second, 200 * time.Millisecond

var (
	errRelist = errors.New("the watch cannot go on from where it was")
	// errSwitched ends a run because something else is to be followed.
	errSwitched = errors.New("another prefix is to be followed")
	errHeld     = errors.New("the store holds another cluster or an older state than before: nothing is changed until this is confirmed")
	errStuck    = errors.New("the watch does not answer")
)

// Run follows the prefix until ctx ends, and returns nil then. It calls apply
// from one goroutine with one Update after the other; the first one is a Reset.
// apply returns how many keys differed from what it had.
func (r *Reflector) Run(ctx context.Context, apply func(Update) (changed int)) error {
	s := &session{Reflector: r, apply: apply, relist: true}
	s.planCheck()
	for attempt := 0; ctx.Err() == nil; attempt++ {
		err := s.run(ctx)
		if ctx.Err() != nil {
			return nil
		}
		if errors.Is(err, errSwitched) {
			s.relist = true
			continue
		}
		if s.proved {
			attempt = 0
		}
		s.relist = s.relist || errors.Is(err, errRelist) || errors.Is(err, ErrCompacted)
		if !s.relist {
			r.set(func(st *Status) { st.Restarts++ })
		}
		if !errors.Is(err, errStuck) || s.misses > 1 {
			s.stale(err)
		}
		wait := time.Duration(rand.Int64N(int64(min(5*time.Second, 200*time.Millisecond<<min(attempt, 8)))))
		var accepted chan struct{}
		if errors.Is(err, errHeld) {
			wait, accepted = s.freshPeriod, r.accepted
		}
		select {
		case <-time.After(wait):
		case <-accepted:
			s.hold = time.Time{}
			s.known = head{}
		case <-ctx.Done():
		}
	}
	return nil
}

// session is what Run knows; only its goroutine touches it.
type session struct {
	*Reflector
	apply     func(Update) int
	known     head      // cluster and revision that everything was delivered up to; zero before the first list
	hold      time.Time // when holding began; zero if not holding
	nextCheck time.Time // when to compare with a full list
	relist    bool      // the next run begins with a list
	proved    bool      // the current run was confirmed
	misses    int       // freshness periods in a row without confirmation
	runs      uint64    // makes the context of each watch unique
}

func (s *session) run(ctx context.Context) error {
	s.proved = false
	if s.relist {
		if err := s.load(ctx); err != nil {
			return err
		}
		s.relist = false
	}
	return s.follow(ctx)
}

// load lists everything and delivers it.
func (s *session) load(ctx context.Context) error {
	began := time.Now()
	if s.known.cluster != 0 { // a cheap look before the list
		f := s.c.readFresh(ctx, s.freshKey, 0).at(s.known.revision)
		if f.err != nil {
			return f.err
		}
		if err := s.check(f.head, s.known.revision); err != nil {
			return err
		}
	}
	s.prefix = s.following()
	items, at, err := s.c.list(ctx, s.prefix, 0)
	if err != nil {
		return err
	}
	if err := s.check(at, s.known.revision); err != nil {
		return err
	}
	s.hold = time.Time{}
	s.known = at
	s.apply(Update{Revision: at.revision, Reset: true, Prefix: s.prefix, Items: items})
	s.set(func(st *Status) { st.Lists++; st.Held = false })
	s.confirm(began)
	return nil
}

// check compares who answered with what is known, and begins to hold if they
// do not fit. floor is the revision known when the question was asked.
func (s *session) check(at head, floor int64) error {
	if s.known.cluster == 0 || at.cluster == s.known.cluster && at.revision >= floor {
		if !s.hold.IsZero() {
			s.hold = time.Time{}
			s.set(func(st *Status) { st.Held = false })
		}
		return nil
	}
	if s.hold.IsZero() {
		s.hold = time.Now()
		select { // an acceptance is for one hold, not for the next
		case <-s.accepted:
		default:
		}
		s.log.Warn("the store holds another cluster or an older state: keeping the last state until this is confirmed",
			"cluster", strconv.FormatUint(at.cluster, 16), "known", strconv.FormatUint(s.known.cluster, 16),
			"revision", at.revision, "floor", floor, "limit", s.holdLimit)
	}
	if time.Since(s.hold) > s.holdLimit {
		return nil
	}
	s.relist = true
	s.set(func(st *Status) { st.Held = true })
	return errHeld
}

func (s *session) confirm(at time.Time) {
	s.proved, s.misses = true, 0
	var was bool
	s.set(func(st *Status) {
		was = st.Live || st.Confirmed.IsZero()
		st.Live, st.Confirmed, st.Revision, st.Err = true, at, s.known.revision, ""
	})
	if !was {
		s.log.Info("the store is followed again", "revision", s.known.revision)
	}
}

func (s *session) stale(err error) {
	if errors.Is(err, errRelist) || errors.Is(err, ErrCompacted) {
		s.log.Info("listing again", "reason", err)
	}
	var was Status
	s.set(func(st *Status) {
		was = *st
		st.Live, st.Err = false, err.Error()
	})
	if (was.Live || was.Err == "") && !errors.Is(err, errHeld) {
		s.log.Warn("the store cannot be followed: keeping the last state", "revision", s.known.revision, "err", err)
	}
}

// follow watches from the known revision on, until the watch ends.
func (s *session) follow(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	var running sync.WaitGroup
	defer running.Wait()
	defer cancel()

	// Watches with equal metadata share one stream, and a stream stays with
	// its member. A watch that is started again must not get the old one.
	s.runs++
	wctx := clientv3.WithRequireLeader(metadata.AppendToOutgoingContext(ctx, "flotilla-watch", fmt.Sprintf("%p-%d", s, s.runs)))
	batches := make(chan batch)
	from := s.known
	running.Go(func() {
		// Watch itself waits for the member's answer.
		pump(ctx, s.c.etcd.Watch(wctx, s.prefix, clientv3.WithPrefix(), clientv3.WithRev(from.revision+1)), from, batches)
	})

	reads := make(chan fresh, 1)
	tick := time.NewTimer(0)
	defer tick.Stop()
	var waiting *fresh  // a read that the watch has not passed yet
	var asked time.Time // since when the watch owes an answer; zero if it does not
	again := time.NewTimer(0)
	defer again.Stop()
	ask := func() error {
		again.Reset(askAgain)
		pctx, stop := context.WithTimeout(wctx, readLimit)
		defer stop()
		if err := s.c.etcd.RequestProgress(pctx); err != nil {
			s.misses++
			return fmt.Errorf("watch %s: %w", s.prefix, err)
		}
		return nil
	}

	lists := make(chan listed, 1)
	check := time.NewTimer(time.Until(s.nextCheck))
	defer check.Stop()
	checking := false
	var since []Event // events delivered while a check is under way

	for {
		select {
		case <-ctx.Done():
			return ctx.Err()

		case b := <-batches:
			asked = time.Time{}
			if len(b.events) > 0 {
				s.known.revision = b.events[len(b.events)-1].ModRevision
				s.apply(Update{Revision: s.known.revision, Events: b.events})
				if checking {
					since = append(since, b.events...)
				}
			}
			s.known.revision = max(s.known.revision, b.progress)
			s.set(func(st *Status) { st.Revision = s.known.revision })
			if waiting != nil && s.known.revision >= waiting.revision {
				s.confirm(waiting.began)
				waiting = nil
			}
			if b.err != nil {
				return s.c.explain("watch "+s.prefix, b.err)
			}

		case <-tick.C:
			floor := s.known.revision
			gather := s.freshPeriod / 4
			if !s.proved {
				gather = 0
			}
			running.Go(func() { reads <- s.c.readFresh(ctx, s.freshKey, gather).at(floor) })

		case f := <-reads:
			tick.Reset(s.freshPeriod + rand.N(s.freshPeriod/10) - time.Since(f.began))
			if f.err != nil {
				if s.misses++; s.misses >= 2 {
					return f.err
				}
				continue
			}
			s.set(func(st *Status) { st.FreshValue = f.value })
			if err := s.check(f.head, f.floor); err != nil {
				return err
			}
			if f.revision <= s.known.revision { // nothing was written since: no answer is owed
				s.confirm(f.began)
				continue
			}
			if !asked.IsZero() && time.Since(asked) > answerLimit {
				s.misses++
				return errStuck
			}
			if asked.IsZero() {
				asked = f.began
			}
			if waiting == nil {
				waiting = &f
			}
			if err := ask(); err != nil {
				return err
			}

		case <-s.look:
			if s.prefix != s.following() {
				return errSwitched
			}
			if asked.IsZero() {
				asked = time.Now()
			}
			if err := ask(); err != nil {
				return err
			}

		case <-again.C:
			if asked.IsZero() {
				continue
			}
			if err := ask(); err != nil {
				return err
			}

		case <-check.C:
			checking, since = true, nil
			at := s.known.revision
			running.Go(func() {
				items, _, err := s.c.list(ctx, s.prefix, at)
				lists <- listed{items, err}
			})

		case l := <-lists:
			s.planCheck()
			check.Reset(time.Until(s.nextCheck))
			checking = false
			if errors.Is(l.err, ErrCompacted) {
				return l.err
			}
			if l.err == nil {
				s.compare(overlay(l.items, since))
			}
		}
	}
}

func (s *session) planCheck() { s.nextCheck = time.Now().Add(jitter(s.checkPeriod)) }

// compare delivers the result of the periodic check.
func (s *session) compare(items []KV) {
	changed := s.apply(Update{Revision: s.known.revision, Reset: true, Prefix: s.prefix, Items: items, Drift: true})
	s.set(func(st *Status) {
		st.Lists++
		if changed > 0 {
			st.Drift++
		}
	})
	if changed > 0 {
		s.log.Warn("the reflected state had drifted from the store and was corrected", "keys", changed, "revision", s.known.revision)
	}
}

type listed struct {
	items []KV
	err   error
}

// overlay returns items after events.
func overlay(items []KV, events []Event) []KV {
	if len(events) == 0 {
		return items
	}
	all := make(map[string]KV, len(items))
	for _, kv := range items {
		all[kv.Key] = kv
	}
	for _, e := range events {
		if e.Deleted {
			delete(all, e.Key)
		} else {
			all[e.Key] = e.KV
		}
	}
	return slices.SortedFunc(maps.Values(all), func(a, b KV) int { return strings.Compare(a.Key, b.Key) })
}

// batch is what a watch has sent since the last batch was taken.
type batch struct {
	events   []Event
	progress int64 // everything up to this revision was sent; 0 if not said
	err      error // the watch has ended
}

// pump reads the watch and hands over all that is waiting at once, so that a
// slow reader gets few large batches and a fast one gets each response alone.
// known is where the watch starts.
func pump(ctx context.Context, watch clientv3.WatchChan, known head, out chan<- batch) {
	var b batch
	last, full := known.revision, false
	for {
		in, to := watch, chan<- batch(nil)
		if full {
			to = out
		}
		if b.err != nil {
			in = nil
		}
		select {
		case resp, ok := <-in:
			full = true
			b.err = b.add(resp, ok, known.cluster, &last)
		case to <- b:
			if b.err != nil {
				return
			}
			b, full = batch{}, false
		case <-ctx.Done():
			return
		}
	}
}

// add appends one response. last is the revision of the newest event so far.
func (b *batch) add(resp clientv3.WatchResponse, ok bool, cluster uint64, last *int64) error {
	switch {
	case !ok:
		return errors.New("the watch was closed")
	case resp.Err() != nil:
		return resp.Err()
	case resp.Header.ClusterId != cluster:
		return fmt.Errorf("%w: another cluster answers it", errRelist)
	case resp.IsProgressNotify():
		b.progress = resp.Header.Revision
		return nil
	}
	floor := *last // events of one response may share a revision, those of two never do
	for _, e := range resp.Events {
		if e.Kv.ModRevision <= floor || e.Kv.ModRevision < *last {
			return fmt.Errorf("%w: event of revision %d came after %d", errRelist, e.Kv.ModRevision, *last)
		}
		*last = e.Kv.ModRevision
		b.events = append(b.events, eventOf(e))
	}
	return nil
}

func jitter(d time.Duration) time.Duration {
	return d*4/5 + time.Duration(rand.Int64N(int64(d*2/5)+1))
}
