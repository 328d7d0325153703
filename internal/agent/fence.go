package agent

import (
	"context"
	"errors"
	"os"
	"sync"
	"syscall"
	"time"

	"flotilla/internal/state"
	"flotilla/internal/systemd"
)

// At most one copy of an exclusive unit runs, ever. Why that holds:
//
// The engine gives such a unit to another node only in a transaction that finds
// cluster/nodes/<this> missing. That key is on a lease of 12 s, which the store
// counts from when it processed the last renewal, and so from no earlier than
// when we sent it, t0 (a new leader of the store only counts anew). So the key
// is there until t0 + 12 s at least.
//
// At t0 + 8 s the units are stopped by this process, at t0 + 9.5 s they are
// killed by two actors that do not need each other: this process, and a timer
// of PID 1 which each confirmed renewal puts off. The rest, 2.5 s, is for
// clocks that run at different rates and for the killing itself.
//
// Started they are only while the timer is armed and t0 is younger than 8 s, and
// after a snapshot in which everything is that was written before it was asked
// for, and in which this node has the generation that the unit was placed for, and
// placement and unit are as they were planned from. A timer that went off leaves
// no gate behind, and without the gate systemd starts nothing in the slice.
//
// t0 counts only if the key is on the lease that was renewed: see
// state.Registration.
//
// With Config.SingleMachine nothing of this is done until another node that runs
// units is seen: nobody could take the units over. The setting is a promise of the
// operator, which nothing here can check while the store is away. Once another
// node was seen this process keeps the fence, also when that node has gone again.
//
// Not covered: a virtual machine that is paused for longer than the lease runs
// its units from when it goes on until its timer goes off, at once; storage can
// tell the copies apart by FLOTILLA_EPOCH.
//
// The times are of a lease of 12 s and grow and shrink with it.
func stopAfter(ttl time.Duration) time.Duration { return ttl * 2 / 3 }
func killAfter(ttl time.Duration) time.Duration { return ttl * 19 / 24 }

const (
	forEver  = 10 * 365 * 24 * time.Hour
	armAgain = time.Second / 2 // between two attempts
)

// fenceAction is what is to be done to keep the fence.
type fenceAction string

const (
	rest   fenceAction = "rest"
	arm    fenceAction = "arm"   // put PID 1's timer off to t0 + killAfter
	widen  fenceAction = "widen" // put it off for ever, with the gate open
	disarm fenceAction = "disarm"
	halt   fenceAction = "halt" // stop the exclusive units
	kill   fenceAction = "kill" // kill what is left of them
)

// fenceState is what the fence depends on, and what was done last.
type fenceState struct {
	ttl    time.Duration // of the lease
	needed bool          // there are exclusive units on this node
	exempt bool          // no other node can be given them
	armed  time.Time     // t0 of the timer in PID 1, or when this process began
	closed bool          // this process has not armed or widened it
	wide   bool          // it is put off for ever
	failed time.Time     // when arming failed last
	halted bool          // the units were stopped since it was armed
	kills  int           // rounds of killing since it was armed
	now    time.Time
	t0     time.Time // from which the record is there for the TTL at least; zero if that is not known
}

// next returns what to do now and, for rest, for how long nothing is to do; 0
// is until something happens.
func (s fenceState) next() (fenceAction, time.Duration) {
	switch {
	case !s.needed && !s.closed:
		return disarm, 0
	case !s.needed:
		return rest, 0
	case s.exempt && !s.wide:
		return widen, 0
	case s.exempt:
		return rest, 0
	}
	due := s.young() && (s.wide || s.closed || s.t0.After(s.armed))
	if due && s.now.Sub(s.failed) >= armAgain {
		return arm, 0
	}
	// A timer that cannot be put off does not keep the deadlines from coming.
	age, round := s.now.Sub(s.armed), killAfter(s.ttl)+time.Duration(s.kills)*time.Second/2
	wait := round - age
	switch {
	case age >= stopAfter(s.ttl) && !s.halted:
		return halt, 0
	case age >= round:
		return kill, 0
	case age < stopAfter(s.ttl):
		wait = stopAfter(s.ttl) - age
	}
	if due {
		wait = min(wait, armAgain-s.now.Sub(s.failed))
	}
	return rest, wait
}

func (s fenceState) young() bool { return !s.t0.IsZero() && s.now.Sub(s.t0) < stopAfter(s.ttl) }

// open reports whether exclusive units may be started.
func (s fenceState) open() bool {
	return s.needed && (s.exempt && s.wide || !s.closed && !s.wide && s.now.Sub(s.armed) < stopAfter(s.ttl))
}

// guard keeps the fence. It has a goroutine of its own: nothing that a pass
// waits for may hold it up.
type guard struct {
	a     *Agent
	wake  chan struct{}  // one slot
	stops sync.WaitGroup // stops under way

	mu     sync.Mutex // guards what follows
	state  fenceState
	units  []string // exclusive ones on this node
	fenced bool     // they were stopped or killed, and the loop does not know yet
}

func newGuard(a *Agent) *guard {
	return &guard{a: a, wake: make(chan struct{}, 1), state: fenceState{
		ttl: a.cfg.TTL, closed: true, armed: time.Now(), exempt: a.cfg.SingleMachine,
	}}
}

// set says which exclusive units are on this node.
func (g *guard) set(units []string) {
	g.mu.Lock()
	g.units = units
	changed := g.state.needed != (len(units) > 0)
	g.state.needed = len(units) > 0
	g.mu.Unlock()
	if changed {
		g.poke()
	}
}

func (g *guard) poke() {
	select {
	case g.wake <- struct{}{}:
	default:
	}
}

// fence returns what a plan has to know, and whether the exclusive units were
// stopped behind the loop's back since it was last asked. That is asked first:
// a fence that is open was opened after it was noted.
func (g *guard) fence() (f fence, fenced bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	fenced, g.fenced = g.fenced, false
	return g.read(), fenced
}

// look returns what a worker has to know.
func (g *guard) look() fence {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.read()
}

func (g *guard) read() fence {
	s := g.state
	s.now = time.Now()
	return fence{Exempt: s.exempt, Open: s.open()}
}

// run keeps the fence until ctx ends. The timer stays as it is then: the units
// run on, and the next process has as long as that to renew the lease.
func (g *guard) run(ctx context.Context) error {
	defer g.stops.Wait()
	for ctx.Err() == nil {
		snapshot, newer := g.a.cfg.Feed.Next()
		_, renewed := g.a.cfg.Presence.Lease()
		s := g.update(snapshot)
		do, wait := s.next()
		if do != rest {
			err := g.do(ctx, do, s)
			if err == nil {
				continue
			}
			if ctx.Err() == nil {
				g.a.log.Warn("the fence of exclusive units", "step", string(do), "err", err)
			}
			if do == arm {
				g.note(func(s *fenceState) { s.failed = s.now })
				continue
			}
			wait = armAgain
		}
		var timer <-chan time.Time
		if wait > 0 {
			timer = time.After(wait)
		}
		select {
		case <-ctx.Done():
		case <-g.wake:
		case <-newer:
		case <-renewed:
		case <-timer:
		}
	}
	return nil
}

// update brings the state up to date and returns it.
func (g *guard) update(snapshot *state.Snapshot) fenceState {
	t0, other := g.a.cfg.Registration.T0(), g.a.other(snapshot)
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.state.exempt && other != "" {
		g.state.exempt = false
		g.a.log.Warn("the setting single-machine has no effect: there is another node, so exclusive units are fenced. "+
			"Remove the setting", "node", other)
	}
	g.state.now, g.state.t0 = time.Now(), t0
	return g.state
}

// other returns another node that runs units, or may, and "" if there is none.
func (a *Agent) other(s *state.Snapshot) string {
	for id, n := range s.Nodes {
		if id != a.cfg.ID && n.Present() && (n.Record.Value.Units || n.Record.Problem != "") {
			return id
		}
	}
	return ""
}

func (g *guard) do(ctx context.Context, do fenceAction, s fenceState) error {
	limit := 3 * time.Second
	if do == arm { // a slow systemd has all the time there is until the units must stop
		limit = max(limit, stopAfter(s.ttl)-s.now.Sub(s.armed))
	}
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	t0 := s.t0
	switch do {
	case arm, widen:
		after := forEver
		if do == arm {
			after = time.Until(t0.Add(killAfter(g.a.cfg.TTL)))
		}
		if _, err := os.Stat(g.a.cfg.Gate); err != nil {
			g.note(func(s *fenceState) { g.fenced = true })
		}
		if err := g.a.cfg.Systemd.Fence(ctx, after); err != nil {
			return err
		}
		opened := false
		g.note(func(s *fenceState) {
			opened = !s.open()
			s.wide, s.closed, s.halted, s.kills = do == widen, false, false, 0
			if do == arm {
				s.armed = t0
			}
		})
		if opened {
			g.a.poke()
		}
	case disarm:
		if err := g.a.cfg.Systemd.Unfence(ctx); err != nil {
			return err
		}
		g.note(func(s *fenceState) { s.wide, s.closed = false, true })
	case halt:
		g.mu.Lock()
		units := g.units
		g.mu.Unlock()
		why := "the store does not confirm that this node is there"
		if !t0.IsZero() && time.Since(t0) < stopAfter(g.a.cfg.TTL) {
			why = "systemd does not put off its timer in time, although nobody else may run them yet"
		}
		g.a.log.Warn("stopping the exclusive units: "+why, "units", len(units))
		g.note(func(s *fenceState) { s.halted, g.fenced = true, true })
		for _, name := range units {
			g.stops.Go(func() {
				// Whatever comes of it, SIGKILL follows.
				_, _ = g.a.cfg.Systemd.Stop(g.a.life, name)
			})
		}
		g.a.poke()
	case kill:
		g.note(func(s *fenceState) { s.kills++; g.fenced = true })
		pids, err := g.a.cfg.Systemd.Processes(ctx, systemd.FenceSlice)
		if err == nil && len(pids) == 0 {
			return nil
		}
		return errors.Join(err, g.a.cfg.Systemd.Kill(ctx, systemd.FenceSlice, syscall.SIGKILL))
	}
	return nil
}

func (g *guard) note(change func(*fenceState)) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.state.now = time.Now()
	change(&g.state)
}
