package agent

import (
	"context"
	"errors"
	"os"
	"sync"
	"syscall"
	"time"

	"flotilla/internal/registry"
	"flotilla/internal/store"
	"flotilla/internal/systemd"
)

// At most one copy of an exclusive unit runs, ever. Why that holds:
//
// The engine gives such a unit to another machine only in a transaction that
// finds machines/<this> missing. That key is on a lease of 12 s, which the store
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
// after a read of the store that finds the key still of the generation of the
// entry, and the entry unchanged. A timer that went off leaves no gate behind,
// and without the gate systemd starts nothing in the slice.
//
// t0 counts only if the key is on the lease that was renewed. A lease is new
// when this process is, or when renewals failed for a while; then the record
// gets another session, and until that is seen in the store no t0 counts.
//
// A machine that is alone is exempt. It has written "solo", in a transaction that
// no other machine's record had come before, and while that is there nobody takes
// its exclusive units away, whether its key is there or not. When another machine
// shows up the timer is armed first, and the record deleted after that: at every
// moment one of the two protects. If it is not known whether the deletion was
// done, the timer stays armed, which is always right.
//
// While the store is away nobody can take the units, if that is sure. It is when
// each member of the store proves that at a moment of its own, between b when the
// question was begun and e when it was answered, it did not lead. Then t0 may be
// set to b, if t0 was younger than 8 s at e. For the key goes only if a leader
// finds its lease expired, and none does before t0 + 12 s, which is more than 4 s
// after e. The member that leads then did not at its moment, which was after b;
// so it became leader after b, and a member that becomes leader fills every
// lease up to the whole TTL before it looks for expired ones: it finds this one
// expired at b + 12 s at the earliest. So t0 moves on from proof to proof. One
// that comes too late counts for nothing, for the key may be gone already; and
// none counts any more once the lease or the record is known to be lost.
// A majority would not do: a frozen leader that goes on again may still revoke
// leases, with the followers that it had.
//
// t0 outlives this process, in a file that a reboot removes. So the next process
// can go on proving; all else that it may do, it may do with the renewals of its
// own only. In particular starts are still asked of the store.
//
// Not covered: a virtual machine that is paused for longer than the lease runs
// its units from when it goes on until its timer goes off, at once; storage can
// tell the copies apart by FLOTILLA_EPOCH. A member of the store that was added,
// made a voter and elected in the seconds between two proofs, or between the last
// look at the list of members, every 2 s, and the first proof, is not asked.
//
// The times are of a lease of 12 s and grow and shrink with it.
func stopAfter(ttl time.Duration) time.Duration { return ttl * 2 / 3 }
func killAfter(ttl time.Duration) time.Duration { return ttl * 19 / 24 }

// Proofs are asked for when no renewal was confirmed for askAfter, every askEach,
// for askLimit at most.
func askAfter(ttl time.Duration) time.Duration { return ttl / 3 }
func askEach(ttl time.Duration) time.Duration  { return ttl / 12 }
func askLimit(ttl time.Duration) time.Duration { return ttl / 6 }

const (
	forEver  = 10 * 365 * 24 * time.Hour
	armAgain = time.Second / 2 // between two attempts
)

// duty is what the fence needs at a moment.
type duty string

const (
	rest   duty = "rest"
	arm    duty = "arm"   // put PID 1's timer off to t0 + killAfter
	widen  duty = "widen" // put it off for ever, with the gate open
	disarm duty = "disarm"
	halt   duty = "halt" // stop the exclusive units
	kill   duty = "kill" // kill what is left of them
)

// stand is where the fence stands.
type stand struct {
	ttl     time.Duration // of the lease
	needed  bool          // there are exclusive units on this machine
	solo    bool          // no other machine can be given them
	armed   time.Time     // t0 of the timer in PID 1, or when this process began
	closed  bool          // this process has not armed or widened it
	wide    bool          // it is put off for ever
	failed  time.Time     // when arming failed last
	halted  bool          // the units were stopped since it was armed
	kills   int           // rounds of killing since it was armed
	present time.Time     // the present moment
	t0      time.Time     // from which the record is there for the TTL at least; zero if that is not known

	confirmed time.Time // t0 of the last confirmed renewal; zero if none counts
	proven    time.Time // t0 of the last proof, also one of an earlier process; zero if none counts
	carried   bool      // it is by proofs of this process that the units run
}

// date sets t0 by what counts now. lost says that the record is known to be gone.
func (s *stand) date(now, confirmed time.Time, lost bool) {
	if lost {
		s.proven = time.Time{}
	}
	s.present, s.confirmed, s.t0 = now, confirmed, confirmed
	if s.proven.After(confirmed) {
		s.t0 = s.proven
	}
}

// asks reports whether a proof is to be asked for.
func (s stand) asks() bool {
	return s.needed && !s.solo && s.young() && s.present.Sub(s.confirmed) >= askAfter(s.ttl)
}

// prove takes in a proof that was asked for at a moment, and has been answered
// at the present one. It reports whether it counts.
func (s *stand) prove(asked time.Time) bool {
	if !s.young() || asked.Before(s.proven) {
		return false
	}
	s.proven = asked
	s.date(s.present, s.confirmed, false)
	return true
}

// next returns what to do now and, for rest, for how long nothing is to do; 0
// is until something happens.
func (s stand) next() (duty, time.Duration) {
	switch {
	case !s.needed && !s.closed:
		return disarm, 0
	case !s.needed:
		return rest, 0
	case s.solo && !s.wide:
		return widen, 0
	case s.solo:
		return rest, 0
	}
	due := s.young() && (s.wide || s.closed || s.t0.After(s.armed))
	if due && s.present.Sub(s.failed) >= armAgain {
		return arm, 0
	}
	// A timer that cannot be put off does not keep the deadlines from coming.
	age, round := s.present.Sub(s.armed), killAfter(s.ttl)+time.Duration(s.kills)*time.Second/2
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
		wait = min(wait, armAgain-s.present.Sub(s.failed))
	}
	return rest, wait
}

func (s stand) young() bool   { return s.younger(s.t0) }
func (s stand) renewed() bool { return s.younger(s.confirmed) }

func (s stand) younger(t0 time.Time) bool {
	return !t0.IsZero() && s.present.Sub(t0) < stopAfter(s.ttl)
}

// open reports whether exclusive units may be started.
func (s stand) open() bool {
	return s.needed && (s.solo && s.wide || !s.closed && !s.wide && s.present.Sub(s.armed) < stopAfter(s.ttl))
}

// guard keeps the fence. It has a goroutine of its own: nothing that a pass
// waits for may hold it up.
type guard struct {
	a     *Agent
	wake  chan struct{}  // one slot
	stops sync.WaitGroup // stops under way

	mu       sync.Mutex // guards what follows
	stand    stand
	units    []string // exclusive ones on this machine
	fenced   bool     // they were stopped or killed, and the loop does not know yet
	verified bool     // the solo record was found in the store since this process began
	gone     bool     // there is no solo record of ours

	// What follows belongs to the goroutine of run.
	kept     time.Time // t0 that the next process will find
	carrying bool      // it was said that the units run without the store
}

func newGuard(a *Agent) *guard {
	g := &guard{a: a, wake: make(chan struct{}, 1), stand: stand{ttl: a.cfg.TTL, closed: true, armed: time.Now(), solo: a.disk.solo()}}
	if a.cfg.Leaderless != nil {
		g.stand.proven = a.disk.t0()
	}
	return g
}

// set says which exclusive units are on this machine.
func (g *guard) set(units []string) {
	g.mu.Lock()
	g.units = units
	changed := g.stand.needed != (len(units) > 0)
	g.stand.needed = len(units) > 0
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
	s := g.stand
	s.present = time.Now()
	return fence{Solo: s.solo, Open: s.open()}
}

// run keeps the fence until ctx ends. The timer stays as it is then: the units
// run on, and the next process has as long as that to renew the lease.
func (g *guard) run(ctx context.Context) error {
	defer g.stops.Wait()
	if g.a.cfg.Leaderless != nil {
		var asking sync.WaitGroup
		asking.Go(func() { g.ask(ctx) })
		defer asking.Wait()
	}
	for ctx.Err() == nil {
		s := g.date()
		g.keep(s)
		g.tell(s)
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
				g.note(func(s *stand) { s.failed = s.present })
				continue
			}
			wait = armAgain
		}
		if s.renewed() {
			if again := g.settleSolo(ctx, s); again > 0 && (wait == 0 || again < wait) {
				wait = again
			}
		}
		var timer <-chan time.Time
		if wait > 0 {
			timer = time.After(wait)
		}
		select {
		case <-ctx.Done():
		case <-g.wake:
		case <-g.a.cfg.Presence.Beats():
		case <-timer:
		}
	}
	return nil
}

// date brings the stand up to date and returns it.
func (g *guard) date() stand {
	confirmed, lost := g.a.place.t0(), g.a.place.lost()
	g.mu.Lock()
	defer g.mu.Unlock()
	g.stand.date(time.Now(), confirmed, lost)
	return g.stand
}

// ask asks for proofs until ctx ends, while they could carry the units.
func (g *guard) ask(ctx context.Context) {
	ttl := g.a.cfg.TTL
	tick := time.NewTicker(askEach(ttl))
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		if !g.date().asks() {
			continue
		}
		asked := time.Now()
		qctx, cancel := context.WithTimeout(ctx, askLimit(ttl))
		proven := g.a.cfg.Leaderless(qctx)
		cancel()
		if !proven {
			continue
		}
		g.date() // what was lost meanwhile counts no more
		g.note(func(s *stand) { s.carried = s.prove(asked) || s.carried })
		g.poke()
	}
}

// keep leaves t0 to the next process.
func (g *guard) keep(s stand) {
	if !s.needed { // or a file would be written with each renewal
		s.t0 = time.Time{}
	}
	if g.a.cfg.Leaderless == nil || s.t0.Equal(g.kept) {
		return
	}
	if err := g.a.disk.setT0(s.t0); err != nil {
		g.a.log.Debug("the next process will not know how long the units may run", "err", err)
		return
	}
	g.kept = s.t0
}

// tell logs when the units run by proofs, and when no longer.
func (g *guard) tell(s stand) {
	switch runs := s.carried && s.needed && !s.solo && s.young() && !s.renewed(); {
	case runs && !g.carrying:
		g.a.log.Info("the store has no leader: exclusive units run on")
	case !runs && g.carrying && s.renewed():
		g.a.log.Info("the store confirms this machine again: exclusive units ran on")
	case !runs && g.carrying:
		g.a.log.Warn("nobody can say any more that the store has no leader: exclusive units do not run on")
	default:
		return
	}
	g.carrying = !g.carrying
}

func (g *guard) do(ctx context.Context, do duty, s stand) error {
	limit := 3 * time.Second
	if do == arm { // a slow systemd has all the time there is until the units must stop
		limit = max(limit, stopAfter(s.ttl)-s.present.Sub(s.armed))
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
			g.note(func(s *stand) { g.fenced = true })
		}
		if err := g.a.cfg.Systemd.Fence(ctx, after); err != nil {
			return err
		}
		opened := false
		g.note(func(s *stand) {
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
		g.note(func(s *stand) { s.wide, s.closed = false, true })
	case halt:
		g.mu.Lock()
		units := g.units
		g.mu.Unlock()
		why := "the store does not confirm that this machine is there"
		if !t0.IsZero() && time.Since(t0) < stopAfter(g.a.cfg.TTL) {
			why = "systemd does not put off its timer in time, although nobody else may run them yet"
		}
		g.a.log.Warn("stopping the exclusive units: "+why, "units", len(units))
		g.note(func(s *stand) { s.halted, g.fenced = true, true })
		for _, name := range units {
			g.stops.Go(func() {
				// Whatever comes of it, SIGKILL follows.
				_, _ = g.a.cfg.Systemd.Stop(g.a.life, name)
			})
		}
		g.a.poke()
	case kill:
		g.note(func(s *stand) { s.kills++; g.fenced = true })
		pids, err := g.a.cfg.Systemd.Processes(ctx, systemd.FenceSlice)
		if err == nil && len(pids) == 0 {
			return nil
		}
		return errors.Join(err, g.a.cfg.Systemd.Kill(ctx, systemd.FenceSlice, syscall.SIGKILL))
	}
	return nil
}

func (g *guard) note(change func(*stand)) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.stand.present = time.Now()
	change(&g.stand)
}

// settleSolo writes, checks or deletes the solo record. It is called while the
// store answers, and returns after which time to call it again; 0 for when
// something changes.
func (g *guard) settleSolo(ctx context.Context, s stand) (again time.Duration) {
	others, at, known := g.a.view.others()
	alone, self := others == 0, g.a.view.self()
	g.mu.Lock()
	verified, gone := g.verified, g.gone
	g.mu.Unlock()
	switch {
	case !known:
		return 0
	case alone && s.solo && verified:
		return 0
	case alone && !s.needed && !s.solo:
		return 0
	case !alone && !s.solo && gone:
		return 0
	}
	ctx, cancel := context.WithTimeout(ctx, 1500*time.Millisecond)
	defer cancel()
	const soon = time.Second
	if !alone && s.solo {
		if s.needed {
			if err := g.do(ctx, arm, s); err != nil {
				g.a.log.Warn("the fence of exclusive units cannot be armed, now that there are other machines", "err", err)
				return soon
			}
		}
		return g.leaveSolo()
	}
	key := g.a.keys.Solo()
	kv, there, err := g.a.cfg.Store.Get(ctx, key)
	if err != nil {
		return soon
	}
	record, err := registry.Decode[registry.Solo](kv.Value)
	ours := there && err == nil && record.Machine == g.a.own
	if !alone {
		if ours {
			if _, err := g.a.cfg.Store.Apply(ctx, []store.Op{store.Delete(key)}, store.Unchanged(key, kv.ModRevision)); err != nil {
				return soon
			}
		}
		g.note(func(*stand) { g.gone = true })
		return 0
	}
	switch {
	case ours:
	case s.solo: // somebody has deleted it: it protects no more
		return g.leaveSolo()
	case there:
		return time.Minute // the units of a machine that is gone wait for it: an operator decides
	default:
		_, err := g.a.cfg.Store.Apply(ctx,
			[]store.Op{store.Put(key, registry.Encode(registry.Solo{V: registry.Version, Machine: g.a.own}))},
			store.Missing(key), store.CreatedAt(g.a.keys.Machine(g.a.own), self.generation),
			store.NoneChangedSince(g.a.keys.Machine(""), at))
		if err != nil {
			return soon
		}
		g.a.log.Info("this machine is alone: its exclusive units run on without the store")
	}
	if err := g.a.disk.setSolo(true); err != nil {
		g.a.log.Warn("the next process will not know that this machine was alone", "err", err)
	}
	g.note(func(s *stand) { s.solo, g.verified, g.gone = true, true, false })
	g.poke()
	return 0
}

// leaveSolo goes back to the fence.
func (g *guard) leaveSolo() (again time.Duration) {
	if err := g.a.disk.setSolo(false); err != nil {
		g.a.log.Warn("solo", "err", err)
		return time.Second
	}
	g.note(func(s *stand) { s.solo, g.verified, g.gone = false, false, false })
	g.poke()
	return 0
}
