package agent

import (
	"context"
	"fmt"
	"maps"
	"path/filepath"
	"slices"
	"time"

	"flotilla/internal/registry"
	"flotilla/internal/systemd"
)

// ended is what came of a worker.
type ended struct {
	name string
	turn int
	do   Action
	err  error
	mod  int64 // of the entry, for Release
}

// loop makes pass after pass until ctx ends. All that it and its callees touch
// belongs to this goroutine.
func (a *Agent) loop(ctx context.Context) {
	check := time.NewTicker(checkEvery)
	defer check.Stop()
	drained := make(chan struct{})
	defer func() { // workers that end after the loop want to be heard all the same
		go func() {
			a.others.Wait()
			close(drained)
		}()
		for {
			select {
			case <-a.ended:
			case <-drained:
				return
			}
		}
	}()
	for {
		a.pass(ctx)
		var retry <-chan time.Time
		if at := a.nextRetry(); !at.IsZero() {
			retry = time.After(max(time.Until(at), time.Millisecond))
		}
		select {
		case <-ctx.Done():
			return
		case <-a.wake:
		case e := <-a.ended:
			a.take(e)
		case <-a.cfg.Systemd.Changed():
		case <-check.C:
			a.lookAll = true
		case <-retry:
			continue
		}
		// More of the same is likely on its way.
		began, fresh := time.Now(), 0
		for merge := time.After(settle); merge != nil; {
			select {
			case <-ctx.Done():
				return
			case <-a.wake:
			case e := <-a.ended:
				a.take(e)
			case <-merge:
				merge = nil
				if n := a.view.fresh(); n >= many && n > fresh && time.Since(began) < longestSettle {
					fresh, merge = n, time.After(settleMany)
				}
			}
		}
	}
}

// nextRetry returns when a pass is due although nothing happens; zero if never.
func (a *Agent) nextRetry() time.Time {
	next := a.retryAt
	for _, u := range a.units {
		if !u.retryAt.IsZero() && (next.IsZero() || u.retryAt.Before(next)) {
			next = u.retryAt
		}
	}
	return next
}

// pass compares and carries out one plan.
func (a *Agent) pass(ctx context.Context) {
	f, fenced := a.guard.fence()
	if fenced {
		a.noteFenced()
	}
	if a.view.isNewer() || a.present == nil {
		a.present = a.view.present(a.place.mine)
	}
	now := a.present
	if a.isLeaving() {
		now = &present{}
	}
	if now == nil {
		return // nothing is known of what is wanted: nothing is touched
	}
	for name := range now.wants {
		if a.units[name] == nil {
			a.units[name] = &tracked{}
			a.look[name] = true
		}
	}
	a.retryAt = time.Time{}
	if err := a.observe(ctx); err != nil {
		a.putOff(ctx, err)
		return
	}
	a.settleRestarts(ctx)
	a.carry(ctx, now, plan(now.wants, a.haves(now), f))
	if a.retryAt.IsZero() {
		a.putOffs = 0
	}
	for name, u := range a.units {
		if _, wanted := now.wants[name]; !wanted && !u.on && u.busy == "" {
			delete(a.units, name)
		}
	}
	a.tellGuard()
	a.report(now, f)
	if a.isLeaving() && len(a.units) == 0 && !a.reload {
		a.left.Do(func() { close(a.empty) })
	}
}

func (a *Agent) isLeaving() bool {
	select {
	case <-a.leaving:
		return true
	default:
		return false
	}
}

// putOff tries a pass again a little later.
func (a *Agent) putOff(ctx context.Context, err error) {
	if a.putOffs++; a.putOffs == 1 && ctx.Err() == nil {
		a.log.Warn("systemd does not do what the units need: trying again", "err", err)
	}
	a.retryAt = time.Now().Add(min(firstRetry<<min(a.putOffs-1, 20), 5*time.Second))
}

// observe reads the status of the units that may have changed.
func (a *Agent) observe(ctx context.Context) error {
	change := a.cfg.Systemd.Take()
	a.lookAll = a.lookAll || change.All
	for _, name := range change.Units {
		a.look[name] = true
	}
	var names []string
	for name := range a.units {
		if a.lookAll || a.look[name] {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	cctx, cancel := context.WithTimeout(ctx, callLimit)
	defer cancel()
	found, err := a.statuses(cctx, names)
	looked := a.look
	if err != nil {
		for _, name := range names {
			a.look[name] = true
		}
		return err
	}
	a.lookAll, a.look = false, map[string]bool{}
	for name, status := range found {
		u := a.units[name]
		changed := u.status != status || looked[name]
		u.status = status
		odd := status.Active == "failed" || status.Load != "loaded" && status.Load != "not-found" || !u.on && status.Load == "loaded"
		switch {
		case !odd:
			u.detail = systemd.Detail{}
		case changed:
			if u.detail, err = a.cfg.Systemd.Detail(cctx, name); err != nil {
				maps.Copy(a.look, looked)
				a.look[name] = true
				return err
			}
		}
	}
	return nil
}

// statuses reads the status of units. Those that have stopped systemd has mostly
// forgotten, and would read again from their files only to answer.
func (a *Agent) statuses(ctx context.Context, names []string) (map[string]systemd.Status, error) {
	var stopped []string
	for _, name := range names {
		u := a.units[name]
		if !a.lookAll && u.on && u.status.Load == "loaded" && (!u.rec.Launched || u.busy == Stop) {
			stopped = append(stopped, name)
		}
	}
	kept, err := a.cfg.Systemd.Kept(ctx, stopped...)
	if err != nil {
		return nil, err
	}
	found, err := a.cfg.Systemd.Units(ctx, slices.DeleteFunc(slices.Clone(names), func(name string) bool {
		is, asked := kept[name]
		return asked && !is
	})...)
	if err != nil {
		return nil, err
	}
	for name, is := range kept {
		if !is {
			found[name] = systemd.Status{Load: "loaded", Active: "inactive", Sub: "dead"}
		}
	}
	return found, nil
}

// settleRestarts finds out what became of restarts during which the connection
// to systemd was lost or an earlier agent ended.
func (a *Agent) settleRestarts(ctx context.Context) {
	for name, u := range a.units {
		if u.broken != Restart || u.busy != "" {
			continue
		}
		d, err := a.cfg.Systemd.Detail(ctx, name)
		if err != nil { // what was under way is called again then, which does no harm
			continue
		}
		if d.Invocation != u.rec.Before {
			u.rec.Restarts = u.rec.Asked
		}
		u.broken, u.rec.Doing, u.rec.Before = "", "", ""
		a.note(name)
	}
}

func (a *Agent) haves(now *present) map[string]have {
	clock := time.Now()
	haves := make(map[string]have, len(a.units))
	for name, u := range a.units {
		mod := now.entries[name].mod
		if u.mod != mod && u.busy != Release { // what failed before may do now
			u.mod, u.failures, u.retryAt, u.trouble, u.waiting = mod, 0, time.Time{}, "", ""
		}
		if !u.retryAt.IsZero() && !clock.Before(u.retryAt) {
			u.retryAt = time.Time{}
		}
		h := have{
			On: u.on, Whole: u.rec.Whole, Hash: u.rec.Hash, Sum: u.rec.Sum, Epoch: u.rec.Epoch, Launched: u.rec.Launched,
			Restarts: u.rec.Restarts, Exclusive: u.rec.Exclusive, Broken: u.broken, Status: u.status, Busy: u.busy, Resting: !u.retryAt.IsZero(),
		}
		if u.busy == Restart {
			h.Restarts = u.asked
		}
		if !u.on {
			h.Foreign = a.foreign(name)
		}
		if w, ok := now.wants[name]; ok && u.released != 0 && u.released == mod {
			w.Gone = true
			now.wants[name] = w
		}
		haves[name] = h
	}
	return haves
}

// foreign returns the file of a unit of that name that is the machine's own, and
// "" if there is none. A template's does not count: what is an instance of it
// for systemd may have a file of its own.
func (a *Agent) foreign(name string) string {
	u := a.units[name]
	path := u.detail.FragmentPath
	if u.status.Load != "loaded" || path == a.disk.unit(name) || filepath.Base(path) != name {
		return ""
	}
	return path
}

// noteFenced notes that exclusive units were stopped or killed.
func (a *Agent) noteFenced() {
	for name, u := range a.units {
		if !u.on || !u.rec.Exclusive || u.busy == Stop {
			continue
		}
		if u.cancel != nil {
			u.cancel()
			u.turn++
			u.busy, u.cancel = "", nil
		}
		u.rec.Launched, u.rec.Doing, u.broken = false, "", ""
		a.look[name] = true
		a.note(name)
	}
}

// tellGuard says which units the fence is for.
func (a *Agent) tellGuard() {
	var exclusive []string
	for name, u := range a.units {
		if u.on && u.rec.Exclusive {
			exclusive = append(exclusive, name)
		}
	}
	a.guard.set(exclusive)
}

// stopping is the state of a unit whose stop systemd may not have heard of yet.
// Nobody shall take it for one that was launched to stay.
func stopping(s registry.State) registry.State {
	switch s.Active {
	case "inactive", "failed":
		s.Launched = false
	default:
		s.Active = "deactivating"
	}
	return s
}

// report says what there is.
func (a *Agent) report(now *present, f fence) {
	s := registry.States{V: registry.Version, Units: make(map[string]registry.State, len(a.units))}
	for name, u := range a.units {
		w, wanted := now.wants[name]
		state := registry.State{Trouble: u.trouble, Waiting: u.waiting, Epoch: w.Epoch}
		if u.on {
			state.Load, state.Active, state.Sub = u.status.Load, u.status.Active, u.status.Sub
			state.Hash, state.Epoch, state.Launched, state.Restarts = u.rec.Hash, u.rec.Epoch, u.rec.Launched, u.rec.Restarts
			if u.busy == Stop || u.broken == Stop {
				state = stopping(state)
			}
		}
		switch {
		case state.Trouble != "":
		case wanted && w.Problem != "":
			state.Trouble = w.Problem
		case wanted && !u.on && a.foreign(name) != "":
			state.Trouble = "the machine has a unit of that name already: " + a.foreign(name)
		case u.on && u.rec.Whole && u.status.Load != "" && u.status.Load != "loaded":
			state.Trouble = "systemd cannot load it: " + u.status.Load
			if u.detail.LoadError != "" {
				state.Trouble = "systemd cannot load it: " + u.detail.LoadError
			}
		case u.on && u.rec.Launched && u.status.Active == "failed" && (u.detail.Result == "start-limit-hit" || u.detail.Restarts > 0):
			// The result is usually that of the last failure before the limit.
			state.Trouble = fmt.Sprintf("systemd has given up starting it, after %d restarts: %s", u.detail.Restarts, u.detail.Result)
		}
		switch {
		case state.Waiting != "" || state.Trouble != "" || !wanted || w.Release != "":
		case w.Void != "" && !(u.on && u.rec.Launched):
			state.Waiting = w.Void
		case w.Exclusive && w.Desired == registry.Launched && u.on && !u.rec.Launched && !f.Open:
			state.Waiting = "it is exclusive, and the fence is not armed yet"
		case u.busy == Start && u.status.Active == "inactive":
			state.Waiting = "systemd is about to start it"
		}
		if state.Trouble != "" && wanted {
			state.Epoch = w.Epoch // this is about what is wanted
		}
		if u.on || state.Trouble != "" || state.Waiting != "" {
			s.Units[name] = state
		}
	}
	for name, why := range now.waiting {
		if _, ok := s.Units[name]; !ok {
			s.Units[name] = registry.State{Epoch: now.epochs[name], Waiting: why}
		}
	}
	_, admitted := a.place.admitted()
	if maps.Equal(a.states.Load().Units, s.Units) && a.told == admitted {
		return
	}
	a.states.Store(&s)
	if a.told = admitted; admitted {
		// The Presence writes what has changed: at once, and then every 200 ms.
		a.cfg.Presence.Set(a.keys.States(a.own), registry.Encode(s))
	}
}
