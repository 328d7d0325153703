package agent

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"syscall"
	"time"

	"flotilla/internal/store"
	"flotilla/internal/systemd"
)

// work begins a worker, in place of the one that is under way for the unit.
func (a *Agent) work(name string, do Action, work func(context.Context) error) {
	u := a.units[name]
	if u.cancel != nil {
		u.cancel() // the systemd job is not cancelled; the new one replaces it
	}
	ctx, cancel := context.WithCancel(a.life)
	u.turn++
	u.Busy, u.cancel = do, cancel
	turn := u.turn
	a.workers.Go(func() {
		err := work(ctx)
		if a.life.Err() != nil {
			err = a.life.Err()
		}
		a.ended <- ended{name: name, turn: turn, do: do, err: err}
	})
}

// take notes what came of a worker.
func (a *Agent) take(e ended) {
	u := a.units[e.name]
	if u == nil || u.turn != e.turn || a.life.Err() != nil { // the next agent sees what became of it
		return
	}
	if u.cancel != nil {
		u.cancel()
	}
	u.Busy, u.cancel = "", nil
	a.look[e.name] = true
	if e.do == Release {
		if e.err == nil {
			u.released = e.of
			a.succeed(e.name)
		} else {
			a.fail(e.name, e.err)
		}
		return
	}
	if e.do == Restart && errors.Is(e.err, systemd.ErrUnknown) {
		a.fail(e.name, e.err) // the next pass finds out
		return
	}
	u.Doing, u.Before = "", ""
	switch {
	case e.do == Stop && e.err == nil:
		u.Launched = false
	case e.do == Start && e.err != nil:
		u.Launched = false
	case e.do == Restart && e.err == nil:
		u.Restarts = u.Asked
	}
	if a.note(e.name) && e.err == nil {
		a.succeed(e.name)
	} else if e.err != nil {
		a.fail(e.name, e.err)
	}
}

// stop stops units. It asks systemd when all is written down, quickly: what
// comes late has to wait until systemd has cleared up after the others.
func (a *Agent) stop(steps []Step) {
	steps = slices.DeleteFunc(steps, func(s Step) bool {
		a.log.Info("stopping a unit", "unit", s.Unit, "reason", s.Reason)
		u := a.units[s.Unit]
		old := u.Doing
		u.Doing = Stop
		if !a.note(s.Unit) {
			u.Doing = old
			return true
		}
		if u.cancel != nil {
			u.cancel() // a start that still waits for its turn
		}
		return false
	})
	waits := a.cfg.Systemd.StopAll(a.life, names(steps)...)
	for name, wait := range waits {
		a.stopOne(name, wait)
	}
}

func (a *Agent) stopOne(name string, wait func(context.Context) (systemd.Result, error)) {
	exclusive := a.units[name].Exclusive
	a.work(name, Stop, func(ctx context.Context) error {
		if _, err := wait(ctx); err != nil {
			return err
		}
		if !exclusive {
			return nil
		}
		for range 50 { // KillMode= may have left some
			pids, err := a.cfg.Systemd.Processes(ctx, name)
			if err != nil || len(pids) == 0 {
				return err
			}
			if err := a.cfg.Systemd.Kill(ctx, name, syscall.SIGKILL); err != nil {
				return err
			}
			select {
			case <-ctx.Done():
				return ctx.Err()
			case <-time.After(100 * time.Millisecond):
			}
		}
		return fmt.Errorf("%s has stopped, but some of its processes do not die", name)
	})
}

// start starts and restarts units, all at once: systemd is asked for a unit after
// those that come before it, and orders them by that.
func (a *Agent) start(now *part, steps []Step) {
	do := map[string]Action{}
	var due []string
	for _, s := range steps {
		if a.startable(s, now) {
			a.log.Info(map[Action]string{Start: "starting a unit", Restart: "restarting a unit"}[s.Do], "unit", s.Unit, "reason", s.Reason)
			do[s.Unit] = s.Do
			due = append(due, s.Unit)
		}
	}
	turn := make(chan struct{})
	close(turn)
	for _, name := range inOrder(due, now.wants) {
		next := make(chan struct{})
		a.work(name, do[name], a.call(do[name], now.wants[name], turn, sync.OnceFunc(func() { close(next) })))
		turn = next
	}
}

// startable notes that the unit is about to be started, if it can be.
func (a *Agent) startable(s Step, now *part) bool {
	u, w := a.units[s.Unit], now.wants[s.Unit]
	if !u.retryAt.IsZero() || !u.Whole || u.Status.Load != "loaded" {
		return false
	}
	old := u.record
	u.Doing, u.Launched, u.Asked, u.Before = s.Do, true, w.Restarts, ""
	if s.Do == Start {
		u.Restarts = w.Restarts
	} else {
		ctx, cancel := context.WithTimeout(a.life, callLimit)
		defer cancel()
		d, err := a.cfg.Systemd.Detail(ctx, s.Unit)
		if err != nil {
			u.record = old
			a.fail(s.Unit, err)
			return false
		}
		u.Before = d.Invocation
	}
	if !a.note(s.Unit) {
		u.record = old
		return false
	}
	return true
}

// call returns what starts or restarts a unit when its turn comes, and calls pass
// when that of the next one has come.
func (a *Agent) call(do Action, w *want, turn <-chan struct{}, pass func()) func(context.Context) error {
	name, order := w.unit.Name, a.cfg.Systemd.Start
	if do == Restart {
		order = a.cfg.Systemd.Restart
	}
	return func(ctx context.Context) error {
		defer pass()
		var refused error
		if w.Exclusive { // all ask at once
			refused = a.mayStart(ctx, w)
		}
		<-turn // it comes soon after ctx has ended, too
		switch {
		case refused != nil:
			return refused
		case ctx.Err() != nil: // it is to be stopped, or was fenced
			return ctx.Err()
		}
		// A unit that fails was launched all the same: its state says the rest.
		r, err := order(ctx, name, pass)
		if r == systemd.Asserted && w.Exclusive {
			return fmt.Errorf("%w: the fence is closed", errNotNow)
		}
		return err
	}
}

// mayStart asks the store whether an exclusive unit is still this node's, with the
// file that was approved: see fence.go.
func (a *Agent) mayStart(ctx context.Context, w *want) error {
	s, err := a.cfg.Feed.Fresh(ctx)
	if err != nil {
		return fmt.Errorf("%w: the store cannot be asked about it (%w)", errNotNow, err)
	}
	now := want{unit: s.Units[w.unit.Name]}
	t0 := a.cfg.Registration.T0()
	f := a.guard.look()
	switch {
	case t0.IsZero() || a.cfg.Registration.GenerationIn(s) != w.generation:
		return fmt.Errorf("%w: this node's place in the cluster is not confirmed", errNotNow)
	case now.unit == nil || now.version() != w.version():
		return fmt.Errorf("%w: its place has changed meanwhile", errNotNow)
	case !f.Open || !f.Exempt && time.Since(t0) >= stopAfter(a.cfg.TTL):
		return fmt.Errorf("%w: the fence is not armed", errNotNow)
	}
	return nil
}

// releasesAtOnce is how many units leave in one transaction, with two conditions
// each.
const releasesAtOnce = 60

// release tells the store that units have left.
func (a *Agent) release(now *part, names []string) {
	names = slices.DeleteFunc(names, func(name string) bool {
		return now.generation == 0 || a.units[name].On // not yet unloaded, after all
	})
	for some := range slices.Chunk(names, releasesAtOnce) {
		var left []*want
		var ends []ended
		for _, name := range some {
			u, w := a.units[name], now.wants[name]
			u.turn++
			u.Busy = Release
			left = append(left, w)
			ends = append(ends, ended{name: name, turn: u.turn, do: Release, of: w.version()})
		}
		life := a.life
		a.workers.Go(func() {
			err := a.deletePlacements(life, left...)
			for i, e := range ends {
				if e.err = err; errors.Is(err, store.ErrConflict) { // because of one of them, perhaps
					e.err = a.deletePlacements(life, left[i])
				}
				if e.err != nil {
					e.err = fmt.Errorf("%w: the store does not take back its place (%w)", errNotNow, e.err)
				}
				a.ended <- e
			}
		})
	}
}

// deletePlacements deletes the placements of units that have left, if all is as it
// was when that was found to be wanted: one that was destroyed or inactive may be
// wanted again.
func (a *Agent) deletePlacements(ctx context.Context, left ...*want) error {
	keys := a.cfg.Feed.Keys
	conds := []store.Cond{store.CreatedAt(keys.Node(a.cfg.ID), left[0].generation)}
	var ops []store.Op
	for _, w := range left {
		name := w.unit.Name
		ops = append(ops, store.Delete(keys.Placement(name)))
		conds = append(conds, store.Unchanged(keys.Placement(name), w.unit.Placement.Modified))
		if w.unit.Placement.Value.Leave == "" {
			conds = append(conds, store.Unchanged(keys.Unit(name), w.unit.Record.Modified))
		}
	}
	_, err := a.cfg.Store.Apply(ctx, ops, conds...)
	return err
}
