package agent

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"path/filepath"
	"slices"
	"time"

	"flotilla/internal/state"
	"flotilla/internal/systemd"
	"flotilla/internal/unit"
)

// ended is what came of a worker.
type ended struct {
	name string
	turn int
	do   Action
	err  error
	of   version // of the records, for Release
}

// loop makes pass after pass until ctx ends. All that it and its callees touch
// belongs to this goroutine.
func (a *Agent) loop(ctx context.Context) {
	check := time.NewTicker(checkEvery)
	defer check.Stop()
	defer a.drainWorkers()
	for {
		s, newer := a.cfg.Feed.Next()
		a.pass(ctx, s)
		if !a.await(ctx, newer, check.C) {
			return
		}
		a.merge(ctx)
	}
}

// await returns when a pass is due, and false when ctx ends. newer is closed when
// there is a snapshot that the last pass has not seen.
func (a *Agent) await(ctx context.Context, newer <-chan struct{}, check <-chan time.Time) bool {
	for {
		var retry <-chan time.Time
		if at := a.nextRetry(); !at.IsZero() {
			retry = time.After(max(time.Until(at), time.Millisecond))
		}
		select {
		case <-ctx.Done():
			return false
		case <-newer:
			var s *state.Snapshot
			if s, newer = a.cfg.Feed.Next(); a.changes(s) == 0 {
				continue // it is about other nodes
			}
		case <-a.wake:
		case e := <-a.ended:
			a.take(e)
		case <-a.cfg.Systemd.Changed():
		case <-check:
			a.lookAll = true
		case <-retry:
		}
		return true
	}
}

// changes returns how many units a snapshot wants otherwise than the last pass
// has seen it.
func (a *Agent) changes(s *state.Snapshot) int {
	if s.Revision == 0 {
		return 0
	}
	p, changed := a.derive(s, a.part)
	if a.part == nil || p.generation != a.part.generation || !maps.Equal(p.waiting, a.part.waiting) {
		changed++
	}
	return changed
}

// merge takes what comes in soon after something has happened: more of the same is
// likely on its way.
func (a *Agent) merge(ctx context.Context) {
	began, before := time.Now(), 0
	for rest := time.After(settle); rest != nil; {
		select {
		case <-ctx.Done():
			return
		case <-a.wake:
		case e := <-a.ended:
			a.take(e)
		case <-rest:
			rest = nil
			if n := a.changes(a.cfg.Feed.Latest()); n >= many && n > before && time.Since(began) < longestSettle {
				before, rest = n, time.After(settleMany)
			}
		}
	}
}

// drainWorkers waits for the workers, which want to be heard when they end.
func (a *Agent) drainWorkers() {
	ended := make(chan struct{})
	go func() {
		a.workers.Wait()
		close(ended)
	}()
	for {
		select {
		case <-a.ended:
		case <-ended:
			return
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

// pass compares what a snapshot wants with what there is, and carries out one plan.
func (a *Agent) pass(ctx context.Context, s *state.Snapshot) {
	f, fenced := a.guard.fence()
	if fenced {
		a.noteFenced()
	}
	switch {
	case a.isLeaving():
		a.part = &part{}
	case s.Revision == 0:
		return // nothing is known of what is wanted: nothing is touched
	default:
		a.part, _ = a.derive(s, a.part)
	}
	now := a.part
	for name, w := range now.wants {
		if a.units[name] == nil && !w.IfHere {
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
		if w := now.wants[name]; (w == nil || w.IfHere) && !u.On && u.Busy == "" {
			delete(a.units, name)
		}
	}
	a.tellGuard()
	a.tell(now, f)
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
	ctx, cancel := context.WithTimeout(ctx, callLimit)
	defer cancel()
	found, err := a.statuses(ctx, names)
	if err != nil {
		return err
	}
	for name, status := range found {
		u := a.units[name]
		changed := u.Status != status || a.look[name]
		u.Status = status
		odd := status.Active == "failed" || status.Load != "loaded" && status.Load != "not-found" || !u.On && status.Load == "loaded"
		switch {
		case !odd:
			u.detail = systemd.Detail{}
		case changed:
			if u.detail, err = a.cfg.Systemd.Detail(ctx, name); err != nil {
				a.look[name] = true
				return err
			}
		}
	}
	a.lookAll, a.look = false, map[string]bool{}
	return nil
}

// statuses reads the status of units. Those that have stopped systemd has mostly
// forgotten, and would read again from their files only to answer.
func (a *Agent) statuses(ctx context.Context, names []string) (map[string]systemd.Status, error) {
	var stopped, rest []string
	for _, name := range names {
		if u := a.units[name]; !a.lookAll && u.On && u.Status.Load == "loaded" && (!u.Launched || u.Busy == Stop) {
			stopped = append(stopped, name)
		} else {
			rest = append(rest, name)
		}
	}
	kept, err := a.cfg.Systemd.Kept(ctx, stopped...)
	if err != nil {
		return nil, err
	}
	for name, is := range kept {
		if is {
			rest = append(rest, name)
		}
	}
	found, err := a.cfg.Systemd.Units(ctx, rest...)
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
		if u.Doing != Restart || u.Busy != "" {
			continue
		}
		d, err := a.cfg.Systemd.Detail(ctx, name)
		if err != nil { // what was under way is called again then, which does no harm
			continue
		}
		if d.Invocation != u.Before {
			u.Restarts = u.Asked
		}
		u.Doing, u.Before = "", ""
		a.note(name)
	}
}

// haves returns what there is of all units.
func (a *Agent) haves(now *part) map[string]have {
	clock := time.Now()
	haves := make(map[string]have, len(a.units))
	for name, u := range a.units {
		of := now.wants[name].version()
		if u.seen != of && u.Busy != Release { // what failed before may do now
			u.seen, u.failures, u.retryAt, u.trouble, u.waiting = of, 0, time.Time{}, "", ""
		}
		if !u.retryAt.IsZero() && !clock.Before(u.retryAt) {
			u.retryAt = time.Time{}
		}
		h := u.have
		h.Resting, h.Released = !u.retryAt.IsZero(), u.released != version{} && u.released == of
		if u.Busy == Restart {
			h.Restarts = u.Asked
		}
		if !u.On {
			h.Foreign = a.foreign(name)
		}
		haves[name] = h
	}
	return haves
}

// foreign returns the file of a unit of that name that is the node's own, and ""
// if there is none. A template's does not count: what is an instance of it for
// systemd may have a file of its own.
func (a *Agent) foreign(name string) string {
	u := a.units[name]
	path := u.detail.FragmentPath
	if u.Status.Load != "loaded" || path == a.disk.unit(name) || filepath.Base(path) != name {
		return ""
	}
	return path
}

// noteFenced notes that exclusive units were stopped or killed.
func (a *Agent) noteFenced() {
	for name, u := range a.units {
		if !u.On || !u.Exclusive || u.Busy == Stop {
			continue
		}
		if u.cancel != nil {
			u.cancel()
			u.turn++
			u.Busy, u.cancel = "", nil
		}
		u.Launched, u.Doing = false, ""
		a.look[name] = true
		a.note(name)
	}
}

// tellGuard says which units the fence is for.
func (a *Agent) tellGuard() {
	var exclusive []string
	for name, u := range a.units {
		if u.On && u.Exclusive {
			exclusive = append(exclusive, name)
		}
	}
	a.guard.set(exclusive)
}

// tell reports what there is of the units.
func (a *Agent) tell(now *part, f fence) {
	units := make(map[string]state.UnitState, len(a.units))
	for name, u := range a.units {
		w := now.wants[name]
		s := state.UnitState{Trouble: a.troubleOf(name, w)}
		if s.Trouble == "" {
			s.Waiting = a.waitingOf(name, w, f)
		}
		if w != nil {
			s.Epoch = w.Epoch
		}
		if u.On {
			s.Load, s.Active, s.Sub = u.Status.Load, u.Status.Active, u.Status.Sub
			s.Hash, s.Launched, s.Restarts = u.Hash, u.Launched, u.Restarts
			if w == nil || s.Trouble == "" { // trouble is about what is wanted
				s.Epoch = u.Epoch
			}
			if u.Doing == Stop { // waiters must not count it as launched
				if s.Active != "inactive" && s.Active != "failed" {
					s.Active = "deactivating"
				} else {
					s.Launched = false
				}
			}
		}
		if u.On || s.Trouble != "" || s.Waiting != "" {
			units[name] = s
		}
	}
	for name, s := range now.waiting {
		if _, ok := units[name]; !ok {
			units[name] = s
		}
	}
	if old := a.Report().Units; old != nil && maps.Equal(old, units) {
		return
	}
	r := &state.UnitsReport{V: state.Version, Units: units}
	a.report.Store(r)
	// The Presence writes what has changed: at once, and then every 200 ms.
	a.cfg.Presence.Set(a.cfg.Feed.Keys.UnitsReport(a.cfg.ID), state.Encode(*r))
}

// troubleOf returns what keeps a unit from running here for good.
func (a *Agent) troubleOf(name string, w *want) string {
	u := a.units[name]
	switch {
	case u.trouble != "":
		return u.trouble
	case w != nil && w.Problem != "":
		return w.Problem
	case w != nil && !u.On && a.foreign(name) != "":
		return "the node has a unit of that name already: " + a.foreign(name)
	case u.On && u.Whole && u.Status.Load != "" && u.Status.Load != "loaded":
		return "systemd cannot load it: " + cmp.Or(u.detail.LoadError, u.Status.Load)
	case u.On && u.Launched && u.Status.Active == "failed" && (u.detail.Result == "start-limit-hit" || u.detail.Restarts > 0):
		// The result is usually that of the last failure before the limit.
		return fmt.Sprintf("systemd has given up starting it, after %d restarts: %s", u.detail.Restarts, u.detail.Result)
	}
	return ""
}

// waitingOf returns why a unit is not started yet.
func (a *Agent) waitingOf(name string, w *want, f fence) string {
	u := a.units[name]
	switch {
	case u.waiting != "" || w == nil || w.Release != "":
		return u.waiting
	case w.Void != "" && !(u.On && u.Launched):
		return w.Void
	case w.Exclusive && w.Desired == unit.Launched && u.On && !u.Launched && !f.Open:
		return "it is exclusive, and the fence is not armed yet"
	case u.Busy == Start && u.Status.Active == "inactive":
		return "systemd is about to start it"
	}
	return ""
}
