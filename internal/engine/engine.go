package engine

import (
	"context"
	"errors"
	"log/slog"
	"strings"
	"sync"
	"time"

	"flotilla/internal/state"
	"flotilla/internal/store"
)

// Config says what an Engine works with. All of it is required.
type Config struct {
	Feed  *state.Feed
	Store *store.Client
	Log   *slog.Logger
}

// Engine decides where units run, while its node leads.
type Engine struct {
	cfg Config

	// Times that tests shorten.
	idle, most time.Duration // without a change before a plan, and after the first one at most
	check      time.Duration // between two looks at everything
	firstWait  time.Duration // before a refused step is tried again, doubled each time
	writing    time.Duration // after which the rest of a plan is not written but planned anew

	mu    sync.Mutex
	stats Stats // guarded by mu
}

// Stats are what the Engine has done since it was made.
type Stats struct {
	Leading    bool
	Since      time.Time // of Leading; zero if it does not
	Revision   int64     // of the store, up to which it has planned
	Units      int       // names of which there is any record
	Nodes      int       // that are there and run units
	Unplaced   int       // units that should be on a node and are on none that is there
	Placements uint64
	Releases   uint64 // units that were told to leave their node
	Failures   uint64 // steps that could not be written as planned
	Passes     uint64
	LastPass   time.Duration // planning alone
}

// New returns an Engine. It does nothing; Lead does.
func New(cfg Config) *Engine {
	return &Engine{cfg: cfg, idle: 3 * time.Millisecond, most: 50 * time.Millisecond, check: time.Minute,
		firstWait: 100 * time.Millisecond, writing: time.Second}
}

// Stats returns the counters. It may be called from any goroutine.
func (e *Engine) Stats() Stats {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.stats
}

func (e *Engine) note(change func(*Stats)) {
	e.mu.Lock()
	defer e.mu.Unlock()
	change(&e.stats)
}

// errDeposed ends Lead when the store refuses a write because another node leads.
var errDeposed = errors.New("another node leads")

// Lead plans whatever changes and writes it, until ctx ends: it is for the node
// that leads, and leader is the condition that holds as long as it does. The error
// is nil unless another node leads.
func (e *Engine) Lead(ctx context.Context, leader store.Cond) error {
	e.cfg.Log.Info("this node decides where units run")
	e.note(func(s *Stats) { s.Leading, s.Since = true, time.Now() })
	defer func() {
		e.note(func(s *Stats) { s.Leading, s.Since = false, time.Time{} })
		e.cfg.Log.Info("this node does not decide where units run any more")
	}()
	defer e.cfg.Feed.FollowReports()()
	s, err := e.cfg.Feed.Until(ctx, func(s *state.Snapshot) bool { return s.Reports })
	if err != nil {
		return nil // ctx has ended
	}
	return e.newLeadership(leader, s).run(ctx)
}

// leadership is what the Engine knows while its node leads; only the goroutine of
// Lead touches it.
type leadership struct {
	*Engine
	leader store.Cond
	memory Memory
	seen   *state.Snapshot // the newest one that was looked at
	wrote  int64           // revision of the last write: the next plan must not be without it
	failed map[string]failure
	said   map[string]string // problems of records that were logged, by key

	changed, last time.Time // the first and the last change that is not planned; zero: none
	next          time.Time // when to plan even if nothing changes; zero: not at all
}

func (e *Engine) newLeadership(leader store.Cond, s *state.Snapshot) *leadership {
	return &leadership{Engine: e, leader: leader, seen: s, next: time.Now(), memory: Memory{}.Saw(s),
		failed: map[string]failure{}, said: map[string]string{}}
}

// failure is a unit whose last step was refused.
type failure struct {
	times int
	again time.Time // when its step may be written
}

func (l *leadership) run(ctx context.Context) error {
	timer := time.NewTimer(0)
	defer timer.Stop()
	check := time.NewTicker(l.check)
	defer check.Stop()
	l.complain()
	for {
		s, replaced := l.cfg.Feed.Next()
		l.look(s)
		if at := l.due(); at.IsZero() {
			timer.Stop()
		} else {
			timer.Reset(time.Until(at))
		}
		select {
		case <-ctx.Done():
			return nil
		case <-replaced:
		case <-check.C:
			l.complain()
			l.next = time.Now()
		case <-timer.C:
			if err := l.pass(ctx); err != nil {
				return err
			}
		}
	}
}

// look takes in a snapshot, and notes if there is anything in it to plan.
func (l *leadership) look(s *state.Snapshot) {
	if s == l.seen {
		return
	}
	if matters(l.seen, s) {
		l.last = time.Now()
		if l.changed.IsZero() {
			l.changed = l.last
		}
	}
	l.memory, l.seen = l.memory.Saw(s), s
}

// due returns when to plan, the zero time if there is nothing to plan.
func (l *leadership) due() time.Time {
	at := l.next
	sooner := func(t time.Time) {
		if at.IsZero() || t.Before(at) {
			at = t
		}
	}
	for _, f := range l.failed {
		sooner(f.again)
	}
	if !l.changed.IsZero() {
		sooner(l.last.Add(l.idle))
		sooner(l.changed.Add(l.most))
	}
	return at
}

// pass plans and writes once. It waits until what was written before is in the
// snapshot, or what was placed then would be placed again.
func (l *leadership) pass(ctx context.Context) error {
	s, err := l.cfg.Feed.At(ctx, l.wrote)
	if err != nil {
		return nil // ctx has ended
	}
	l.look(s)
	began := time.Now()
	plan := Plan(Input{Snapshot: s, Now: began, Memory: l.memory})
	took := time.Since(began)
	l.memory, l.next, l.changed = plan.Memory, plan.Next, time.Time{}
	l.note(func(st *Stats) {
		st.Passes++
		st.LastPass, st.Revision = took, s.Revision
		st.Units, st.Nodes, st.Unplaced = plan.Units, plan.Nodes, plan.Unplaced
	})
	return l.write(ctx, l.mayWrite(plan.Steps, began), max(l.writing, 2*took))
}

// mayWrite returns the steps without those of units whose last step was refused
// and whose time has not come: a step that is refused for ever must not keep the
// engine busy. It forgets failures of units for which nothing is to be done now.
func (l *leadership) mayWrite(steps []Step, now time.Time) []Step {
	if len(l.failed) == 0 {
		return steps
	}
	var may []Step
	planned := map[string]bool{}
	for _, s := range steps {
		f, failed := l.failed[s.Unit]
		planned[s.Unit] = failed
		if !failed || !now.Before(f.again) {
			may = append(may, s)
		}
	}
	for name, f := range l.failed {
		if !planned[name] && !now.Before(f.again) {
			delete(l.failed, name)
		}
	}
	return may
}

// write writes steps for no longer than limit, and has the rest planned anew.
func (l *leadership) write(ctx context.Context, steps []Step, limit time.Duration) error {
	began := time.Now()
	for b := range batches(l.cfg.Feed.Keys, steps) {
		if time.Since(began) > limit {
			l.next = began
			return nil
		}
		if err := l.commit(ctx, b); err != nil {
			return err
		}
	}
	return nil
}

// commit writes a batch, in smaller ones if one of its steps is refused.
func (l *leadership) commit(ctx context.Context, b batch) error {
	revision, err := l.cfg.Store.Apply(ctx, b.ops, append(b.conds, l.leader)...)
	switch {
	case err == nil:
		l.wrote = max(l.wrote, revision)
		for _, s := range b.steps {
			delete(l.failed, s.Unit)
			l.report(s)
		}
		return nil
	case ctx.Err() != nil:
		return nil
	case errors.Is(err, store.ErrConflict):
		if _, err := l.cfg.Store.Apply(ctx, nil, l.leader); errors.Is(err, store.ErrConflict) {
			return errDeposed
		}
		if half := len(b.steps) / 2; half > 0 {
			for _, part := range [][]Step{b.steps[:half], b.steps[half:]} {
				for smaller := range batches(l.cfg.Feed.Keys, part) {
					if err := l.commit(ctx, smaller); err != nil {
						return err
					}
				}
			}
			return nil
		}
		l.wrote = max(l.wrote, revision) // the next plan sees what was in the way
	case errors.Is(err, store.ErrUnknown):
		// If it was written it must be in the next snapshot. If the store cannot be
		// asked, the failures below wait for longer than it needs to decide.
		if revision, err := l.cfg.Store.Revision(ctx, l.cfg.Feed.Keys.Leader()); err == nil {
			l.wrote = max(l.wrote, revision)
		}
	}
	l.fail(b, err)
	return nil
}

// fail notes that the steps of a batch were not written, or that it is unknown.
func (l *leadership) fail(b batch, err error) {
	l.note(func(s *Stats) { s.Failures += uint64(len(b.steps)) })
	for _, s := range b.steps {
		f := l.failed[s.Unit]
		f.times++
		f.again = time.Now().Add(min(l.firstWait<<min(f.times-1, 10), 10*time.Second))
		l.failed[s.Unit] = f
		if f.times == 5 {
			l.cfg.Log.Warn("a decision cannot be written: it is tried again", "unit", s.Unit, "node", s.Node, "step", s.Do, "err", err)
		}
	}
}

// report logs what an operator would ask about.
func (l *leadership) report(s Step) {
	log, text := l.cfg.Log.Info, ""
	attributes := []any{"reason", s.Reason}
	switch s.Do {
	case Place:
		l.note(func(st *Stats) { st.Placements++ })
		text = "unit placed"
	case Leave:
		l.note(func(st *Stats) { st.Releases++ })
		text = "unit is to leave its node"
	case Refresh:
		text = "unit placed again where it was"
	case Forget:
		text = "unit forgotten with its node"
	case Unplaced:
		text = "no node takes the unit"
	case EndMove:
		text = "move ended"
	case Hold:
		log, text = l.cfg.Log.Warn, "units of nodes that are gone are held"
		attributes = append(attributes, "nodes", strings.Join(s.Failover.Held, ","), "until", time.Unix(s.Failover.Until, 0))
	case Allow, EndHold:
		text = "units of nodes that are gone are not held"
	case Approve, Clear:
		return
	}
	for _, a := range [][2]string{{"unit", s.Unit}, {"node", s.Node}, {"from", s.From}} {
		if a[1] != "" {
			attributes = append(attributes, a[0], a[1])
		}
	}
	log(text, attributes...)
}

// complain logs records that cannot be used, each once.
func (l *leadership) complain() {
	problems := l.cfg.Feed.Latest().Problems(l.cfg.Feed.Keys)
	for key, problem := range problems {
		if l.said[key] != problem {
			l.cfg.Log.Warn("a record cannot be used", "key", key, "err", problem)
		}
	}
	l.said = problems
}
