package engine

import (
	"context"
	"errors"
	"log/slog"
	"strings"
	"sync"
	"time"

	"flotilla/internal/registry"
	"flotilla/internal/store"
)

// Config says what an Engine works with. All of it is required.
type Config struct {
	Store *store.Client
	Keys  registry.Keys
	Name  string // of the node, for others to read who leads
	Log   *slog.Logger
}

// Engine decides where units run, while it leads.
type Engine struct {
	cfg Config

	// Times that tests shorten.
	idle, most time.Duration // without a change before a plan, and after the first one at most
	check      time.Duration // between two looks at everything
	firstWait  time.Duration // before a refused step is tried again, doubled each time
	longest    time.Duration // that writing may keep it from looking at what has changed meanwhile

	mu    sync.Mutex
	stats Stats // guarded by mu
}

// Stats are what the Engine has done since it was made.
type Stats struct {
	Leading    bool
	Since      time.Time // of Leading; zero if it does not
	Revision   int64     // of the store, up to which it has planned
	Units      int       // that it knows
	Machines   int       // that are there
	Unplaced   int       // units that should be somewhere and are nowhere
	Placements uint64
	Releases   uint64
	Failures   uint64 // steps that could not be written as planned
	Passes     uint64
	LastPass   time.Duration // planning alone
}

// New returns an Engine. It does nothing; Run does.
func New(cfg Config) *Engine {
	return &Engine{cfg: cfg, idle: 3 * time.Millisecond, most: 50 * time.Millisecond, check: time.Minute, firstWait: 100 * time.Millisecond, longest: time.Second}
}

// Stats returns the counters. It may be called from any goroutine.
func (e *Engine) Stats() Stats {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.stats
}

// Leading reports whether this Engine leads, as far as it knows.
func (e *Engine) Leading() bool { return e.Stats().Leading }

func (e *Engine) note(change func(*Stats)) {
	e.mu.Lock()
	defer e.mu.Unlock()
	change(&e.stats)
}

// Run takes part in the election until ctx ends, and returns nil then. While it
// leads it plans whatever changes and writes it.
func (e *Engine) Run(ctx context.Context) error {
	return e.cfg.Store.Lead(ctx, e.cfg.Keys.EngineElection(), e.cfg.Name, e.cfg.Log, e.lead)
}

// errDeposed ends what a leader does that leads no more.
var errDeposed = errors.New("another engine leads")

// lead is one leadership.
func (e *Engine) lead(ctx context.Context, leader store.Cond) error {
	e.cfg.Log.Info("this node decides where units run")
	e.note(func(s *Stats) { s.Leading, s.Since = true, time.Now() })
	defer func() {
		e.note(func(s *Stats) { s.Leading, s.Since = false, time.Time{} })
		e.cfg.Log.Info("this node does not decide where units run any more")
	}()
	ctx, stop := context.WithCancel(ctx)
	updates := make(chan store.Update)
	counts := make(chan int)
	var following sync.WaitGroup
	defer following.Wait()
	defer stop()
	reflector := store.NewReflector(e.cfg.Store, e.cfg.Keys.Prefix, e.cfg.Keys.Failover(), e.cfg.Log)
	following.Go(func() {
		// Run ends with ctx only.
		_ = reflector.Run(ctx, func(u store.Update) int {
			select {
			case updates <- u:
				return <-counts
			case <-ctx.Done():
				return 0
			}
		})
	})
	l := &leadership{Engine: e, leader: leader, cluster: NewCluster(e.cfg.Keys), follow: reflector.Status,
		seen: map[string]int64{}, failed: map[string]failure{}, said: map[string]string{}}
	return l.run(ctx, updates, counts)
}

// leadership is what lead knows; only its goroutine touches it.
type leadership struct {
	*Engine
	leader  store.Cond
	cluster *Cluster
	follow  func() store.Status
	seen    map[string]int64 // revision of the last change of each record
	ready   bool             // the first list has come
	until   int64            // revision that has to be seen before the next plan: that of what was written
	failed  map[string]failure
	said    map[string]string // problems that were logged

	changed, last time.Time // the first and the last change that is not planned; zero: none
	next          time.Time // when Plan wants to be called
}

// failure is a unit whose last step was refused.
type failure struct {
	times int
	again time.Time // when it may be planned
}

func (l *leadership) run(ctx context.Context, updates <-chan store.Update, counts chan<- int) error {
	timer := time.NewTimer(time.Hour)
	defer timer.Stop()
	check := time.NewTicker(l.check)
	defer check.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case u := <-updates:
			counts <- l.take(u)
			l.last = time.Now()
			if l.changed.IsZero() {
				l.changed = l.last
			}
		case <-check.C:
			l.cluster.RetryAll()
			l.next = time.Now()
		case <-timer.C:
			if wait, ok := l.due(); ok && wait <= 0 && l.sawAll() {
				if err := l.pass(ctx); err != nil {
					return err
				}
			}
		}
		timer.Stop()
		if wait, ok := l.due(); ok {
			if !l.sawAll() {
				wait = max(wait, l.idle)
			}
			timer.Reset(max(0, wait))
		}
	}
}

// due returns how long it is until there is something to plan, and false if
// there is nothing at all.
func (l *leadership) due() (wait time.Duration, ok bool) {
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
	if at.IsZero() || !l.ready {
		return 0, false
	}
	return time.Until(at), true
}

// sawAll reports whether the cluster knows what was written last. A write that
// changed nothing is never heard of: then the reflector's own checks tell.
func (l *leadership) sawAll() bool {
	if l.cluster.Revision() < l.until {
		l.cluster.Advance(max(l.cluster.Revision(), l.follow().Revision))
	}
	return l.cluster.Revision() >= l.until
}

// take feeds an update to the cluster, and returns how many records it changed.
func (l *leadership) take(u store.Update) (changed int) {
	set := func(kv store.KV) {
		if l.seen[kv.Key] != kv.ModRevision {
			l.seen[kv.Key] = kv.ModRevision
			l.cluster.Set(kv)
			changed++
		}
	}
	del := func(key string) {
		if _, had := l.seen[key]; had {
			delete(l.seen, key)
			l.cluster.Delete(key)
			changed++
		}
	}
	if u.Reset {
		has := make(map[string]struct{}, len(u.Items))
		for _, kv := range u.Items {
			has[kv.Key] = struct{}{}
			set(kv)
		}
		for key := range l.seen {
			if _, ok := has[key]; !ok {
				del(key)
			}
		}
		l.ready = true
	}
	for _, e := range u.Events {
		if e.Deleted {
			del(e.Key)
		} else {
			set(e.KV)
		}
	}
	if u.Revision < l.until && u.Reset {
		l.until = 0 // another store: what was written is not in it
	}
	l.cluster.Advance(u.Revision)
	return changed
}

// pass plans and writes once.
func (l *leadership) pass(ctx context.Context) error {
	began := time.Now()
	retried := map[string]bool{}
	for name, f := range l.failed {
		if !began.Before(f.again) {
			retried[name] = true
			l.cluster.Retry(name)
		}
	}
	l.changed = time.Time{}
	var steps []Step
	steps, l.next = l.cluster.Plan(began)
	l.complain()
	took := time.Since(began)
	units, machines, unplaced := l.cluster.Counts()
	l.note(func(s *Stats) {
		s.Passes++
		s.LastPass, s.Revision = took, l.cluster.Revision()
		s.Units, s.Machines, s.Unplaced = units, machines, unplaced
	})
	// A unit whose last step was refused has to wait for its turn, even if
	// something about it changes: a step that is refused for ever must not
	// keep the engine busy.
	var due []Step
	for _, s := range steps {
		if _, failed := l.failed[s.Unit]; !failed || retried[s.Unit] {
			due = append(due, s)
			delete(retried, s.Unit)
		}
	}
	for name := range retried { // nothing is to be done for them any more
		delete(l.failed, name)
	}
	return l.write(ctx, due)
}

func (l *leadership) write(ctx context.Context, steps []Step) error {
	began := time.Now()
	for _, b := range pack(l.cfg.Keys, steps) {
		if time.Since(began) > l.longest { // what was written brings the next plan
			for _, s := range b.steps {
				l.cluster.Retry(s.Unit)
			}
			l.next = began
			continue
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
		l.until = max(l.until, revision)
		for _, s := range b.steps {
			delete(l.failed, s.Unit)
			l.report(s)
		}
		return nil
	case ctx.Err() != nil:
		return nil
	case errors.Is(err, store.ErrConflict) && len(b.steps) > 1:
		if _, err := l.cfg.Store.Apply(ctx, nil, l.leader); errors.Is(err, store.ErrConflict) {
			return errDeposed
		}
		for _, half := range [][]Step{b.steps[:len(b.steps)/2], b.steps[len(b.steps)/2:]} {
			for _, part := range pack(l.cfg.Keys, half) {
				if err := l.commit(ctx, part); err != nil {
					return err
				}
			}
		}
		return nil
	case errors.Is(err, store.ErrUnknown):
		// What was placed takes room on its machine: nothing is planned before
		// it is known. If it cannot be read now, the failures wait longer than
		// the store does.
		if _, revision, err := l.cfg.Store.List(ctx, l.cfg.Keys.Failover()); err == nil {
			l.until = max(l.until, revision)
		}
	}
	l.note(func(s *Stats) { s.Failures += uint64(len(b.steps)) })
	for _, s := range b.steps {
		f := l.failed[s.Unit]
		f.times++
		f.again = time.Now().Add(min(l.firstWait<<min(f.times-1, 10), 10*time.Second))
		l.failed[s.Unit] = f
		if f.times == 5 {
			l.cfg.Log.Warn("a decision cannot be written: trying on", "unit", s.Unit, "machine", s.Machine, "step", s.Do, "err", err)
		}
	}
	return nil
}

// report logs what an operator would ask about.
func (l *leadership) report(s Step) {
	log := l.cfg.Log.With("unit", s.Unit, "machine", s.Machine, "reason", s.Reason)
	switch s.Do {
	case Place:
		l.note(func(st *Stats) { st.Placements++ })
		if s.From != "" {
			log = log.With("from", s.From)
		}
		log.Info("unit placed")
	case Release:
		l.note(func(st *Stats) { st.Releases++ })
		log.Info("unit is to leave its machine")
	case Refresh:
		log.Info("unit placed again where it was")
	case Forget:
		log.Info("unit forgotten with the machine")
	case Explain:
		l.cfg.Log.Info("no machine takes the unit", "unit", s.Unit, "reason", s.Reason)
	case EndMove:
		log.Info("move ended")
	case Clean:
		log.Warn("entry without placement deleted")
	case PutGlobal, EndGlobal:
		l.cfg.Log.Info("global unit changed", "unit", s.Unit, "reason", s.Reason)
	case Hold:
		l.cfg.Log.Warn("units of machines that are gone are held", "machines", strings.Join(s.Failover.Held, ","), "reason", s.Reason,
			"until", time.Unix(s.Failover.Until, 0))
	case Allow, EndHold:
		l.cfg.Log.Info("units of machines that are gone are not held", "reason", s.Reason)
	}
}

// complain logs records that cannot be used, each once.
func (l *leadership) complain() {
	problems := l.cluster.Problems()
	for key, problem := range problems {
		if l.said[key] != problem {
			l.cfg.Log.Warn("a record cannot be used", "key", key, "err", problem)
		}
	}
	l.said = problems
}
