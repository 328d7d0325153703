package agent

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"syscall"
	"time"

	"flotilla/internal/store"
	"flotilla/internal/systemd"
)

// work begins a worker, in place of the one that is under way for the unit.
func (a *Agent) work(name string, do Action, work func(context.Context) error) {
	u := a.units[name]
	if u.cancel != nil {
		u.cancel() // what systemd was asked for is not called off, but replaced
	}
	ctx, cancel := context.WithCancel(a.life)
	u.turn++
	u.busy, u.cancel, u.broken = do, cancel, ""
	turn, mod := u.turn, u.mod
	a.others.Go(func() {
		err := work(ctx)
		if a.life.Err() != nil {
			err = a.life.Err()
		}
		a.ended <- ended{name, turn, do, err, mod}
	})
}

// take notes what came of a worker.
func (a *Agent) take(e ended) {
	u := a.units[e.name]
	if u == nil || u.turn != e.turn || a.life.Err() != nil { // the next agent sees what became of it
		return
	}
	u.cancel()
	u.busy, u.cancel = "", nil
	a.look[e.name] = true
	if e.do == Release {
		if e.err == nil {
			u.released = e.mod
			a.succeed(e.name)
		} else {
			a.fail(e.name, e.err)
		}
		return
	}
	if e.do == Restart && errors.Is(e.err, systemd.ErrUnknown) {
		u.broken = Restart // the next pass finds out
		a.fail(e.name, e.err)
		return
	}
	u.rec.Doing, u.rec.Before = "", ""
	switch {
	case e.do == Stop && e.err == nil:
		u.rec.Launched = false
	case e.do == Start && e.err != nil:
		u.rec.Launched = false
	case e.do == Restart && e.err == nil:
		u.rec.Restarts = u.asked
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
		u.rec.Doing = Stop
		if !a.note(s.Unit) {
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
	exclusive := a.units[name].rec.Exclusive
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

// start starts and restarts units, all at once but for those that are ordered:
// systemd orders what it was asked for before the first of it has begun, so a
// unit is asked for when those that come before it are queued.
func (a *Agent) start(now *present, steps []Step) {
	do := map[string]Action{}
	var due []string
	for _, s := range steps {
		if a.startable(s, now) {
			a.log.Info(map[Action]string{Start: "starting a unit", Restart: "restarting a unit"}[s.Do], "unit", s.Unit, "reason", s.Reason)
			do[s.Unit] = s.Do
			due = append(due, s.Unit)
		}
	}
	if len(due) == 0 {
		return
	}
	groups := levels(due, func(name string) []string { return now.wants[name].After })
	turns := make([]chan struct{}, len(groups)+1)
	for i := range turns {
		turns[i] = make(chan struct{})
	}
	close(turns[0])
	called := map[string]chan struct{}{} // closed when the worker has ended
	for _, name := range due {
		called[name] = make(chan struct{})
	}
	for i, group := range groups {
		for _, name := range group {
			call := a.call(name, do[name], now)
			a.work(name, do[name], func(ctx context.Context) error {
				defer close(called[name])
				select {
				case <-turns[i]:
					return call(ctx)
				case <-ctx.Done():
					return ctx.Err()
				}
			})
		}
	}
	if len(groups) == 1 {
		return
	}
	life := a.life
	a.others.Go(func() {
		for i, group := range groups {
			a.awaitQueued(life, group, called)
			close(turns[i+1])
		}
	})
}

// startable notes that the unit is about to be started, if it can be.
func (a *Agent) startable(s Step, now *present) bool {
	u, w := a.units[s.Unit], now.wants[s.Unit]
	if !u.retryAt.IsZero() || !u.rec.Whole || u.status.Load != "loaded" {
		return false
	}
	u.asked = w.Restarts
	u.rec.Doing, u.rec.Launched, u.rec.Asked, u.rec.Before = s.Do, true, w.Restarts, ""
	if s.Do == Start {
		u.rec.Restarts = w.Restarts
	} else {
		ctx, cancel := context.WithTimeout(a.life, callLimit)
		defer cancel()
		d, err := a.cfg.Systemd.Detail(ctx, s.Unit)
		if err != nil {
			u.rec.Doing = ""
			a.fail(s.Unit, err)
			return false
		}
		u.rec.Before = d.Invocation
	}
	return a.note(s.Unit)
}

// call returns what starts or restarts the unit.
func (a *Agent) call(name string, do Action, now *present) func(context.Context) error {
	order := a.cfg.Systemd.Start
	if do == Restart {
		order = a.cfg.Systemd.Restart
	}
	exclusive, mod, generation := now.wants[name].Exclusive, now.entries[name].mod, now.generation
	return func(ctx context.Context) error {
		if exclusive {
			if err := a.mayStart(ctx, name, mod, generation); err != nil {
				return err
			}
		}
		// A unit that fails was launched all the same: its state says the rest.
		r, err := order(ctx, name)
		if r == systemd.Asserted && exclusive {
			return fmt.Errorf("%w: the fence is closed", errNotNow)
		}
		return err
	}
}

// mayStart asks the store whether an exclusive unit is still this machine's:
// see fence.go.
func (a *Agent) mayStart(ctx context.Context, name string, mod, generation int64) error {
	place, entry := a.keys.Machine(a.own), a.keys.Entry(a.own, name)
	record, _ := a.place.admitted()
	now, _, err := a.cfg.Store.GetMany(ctx, 0, place, entry)
	if err != nil {
		return fmt.Errorf("%w: the store cannot be asked about it (%w)", errNotNow, err)
	}
	t0 := a.place.t0()
	f := a.guard.look()
	switch {
	case now[place].Value != record || now[place].CreateRevision != generation:
		return fmt.Errorf("%w: this machine's place in the cluster is not confirmed", errNotNow)
	case now[entry].ModRevision != mod:
		return fmt.Errorf("%w: its place has changed meanwhile", errNotNow)
	case !f.Open || !f.Solo && (t0.IsZero() || time.Since(t0) >= stopAfter(a.cfg.TTL)):
		return fmt.Errorf("%w: the fence is not armed", errNotNow)
	}
	return nil
}

// awaitQueued waits until systemd knows of each unit that it shall start, but
// not for long.
func (a *Agent) awaitQueued(ctx context.Context, group []string, called map[string]chan struct{}) {
	ctx, cancel := context.WithTimeout(ctx, readyLimit)
	defer cancel()
	for pause := time.Millisecond; ; pause *= 2 {
		found, err := a.cfg.Systemd.Units(ctx, group...)
		if err != nil || !slices.ContainsFunc(group, func(name string) bool {
			select {
			case <-called[name]:
				return false
			default:
				return !have{Status: found[name]}.alive()
			}
		}) {
			return
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(pause):
		}
	}
}

// release tells the store that released units have left.
func (a *Agent) release(now *present, names []string) {
	names = slices.DeleteFunc(names, func(name string) bool {
		return now.generation == 0 || a.units[name].on // not yet unloaded, after all
	})
	for some := range slices.Chunk(names, 60) {
		batch := &releases{agent: a, generation: now.generation, done: make(chan struct{}), failed: map[string]error{}}
		for _, name := range some {
			batch.units = append(batch.units, released{name, now.entries[name].mod})
			a.work(name, Release, func(ctx context.Context) error {
				select {
				case <-batch.done:
					return batch.failed[name]
				case <-ctx.Done():
					return ctx.Err()
				}
			})
		}
		life := a.life
		a.others.Go(func() { batch.write(life) })
	}
}

type released struct {
	name string
	mod  int64
}

// releases are units that leave in one transaction.
type releases struct {
	agent      *Agent
	generation int64
	units      []released
	failed     map[string]error // written before done is closed
	done       chan struct{}
}

func (r *releases) write(ctx context.Context) {
	defer close(r.done)
	err := r.apply(ctx, r.units...)
	if err == nil {
		return
	}
	for _, u := range r.units {
		if errors.Is(err, store.ErrConflict) { // because of one of them, perhaps
			r.failed[u.name] = r.apply(ctx, u)
		} else {
			r.failed[u.name] = err
		}
		if one := r.failed[u.name]; one != nil {
			r.failed[u.name] = fmt.Errorf("%w: the store does not take back its place (%w)", errNotNow, one)
		}
	}
}

func (r *releases) apply(ctx context.Context, units ...released) error {
	a := r.agent
	var ops []store.Op
	conds := []store.Cond{store.CreatedAt(a.keys.Machine(a.own), r.generation)}
	for _, u := range units {
		entry := a.keys.Entry(a.own, u.name)
		ops = append(ops, store.Delete(entry), store.Delete(a.keys.Placement(u.name)))
		conds = append(conds, store.Unchanged(entry, u.mod))
	}
	_, err := a.cfg.Store.Apply(ctx, ops, conds...)
	return err
}
