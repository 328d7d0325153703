package agent

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"flotilla/internal/systemd"
	"flotilla/internal/unit"
)

// carry carries out the steps of one plan. What takes long is begun and left to
// workers.
func (a *Agent) carry(ctx context.Context, now *part, steps []Step) {
	by := map[Action][]Step{}
	for _, s := range steps {
		a.log.Debug("step", "do", string(s.Do), "unit", s.Unit, "reason", s.Reason)
		by[s.Do] = append(by[s.Do], s)
	}
	a.stop(by[Stop])
	cctx, cancel := context.WithTimeout(ctx, callLimit)
	defer cancel()
	a.postpone(now, by)
	unloaded := a.unload(cctx, names(by[Unload]))
	loaded := a.load(cctx, now, names(by[Load]))
	if a.reload || len(unloaded)+len(loaded) > 0 {
		found, err := a.reread(cctx, unloaded, loaded)
		if err != nil {
			a.putOff(ctx, err)
			return
		}
		for _, name := range unloaded {
			a.forget(name)
		}
		for _, name := range loaded {
			a.units[name].Whole = true
			a.note(name)
		}
		for _, name := range slices.Concat(unloaded, loaded) {
			if u := a.units[name]; found[name].Load == "loaded" || !u.On && found[name].Load == "not-found" {
				u.Status, u.detail = found[name], systemd.Detail{}
			} else {
				a.look[name] = true
			}
		}
		if err := a.observe(cctx); err != nil {
			a.putOff(ctx, err)
			return
		}
	}
	for _, s := range by[Adopt] {
		a.adopt(s.Unit, now.wants[s.Unit])
	}
	a.start(now, slices.Concat(by[Start], by[Restart]))
	a.release(now, names(by[Release]))
}

// reread makes systemd know the files as they are now. It reads those of a unit
// that it does not know when it is asked about it, and forgets a unit that is
// stopped and not needed: only for others it has to read all files again, which
// takes longer than all the rest. It returns the status of those that need not be
// looked at again.
func (a *Agent) reread(ctx context.Context, unloaded, loaded []string) (found map[string]systemd.Status, err error) {
	if !a.reload {
		kept, err := a.cfg.Systemd.Kept(ctx, unloaded...)
		if err == nil {
			found, err = a.cfg.Systemd.Units(ctx, loaded...)
		}
		if err != nil {
			a.reload = true
			return nil, err
		}
		a.reload = slices.ContainsFunc(unloaded, func(name string) bool { return kept[name] }) ||
			slices.ContainsFunc(loaded, func(name string) bool { return found[name].Load == "not-found" })
		for _, name := range unloaded {
			found[name] = systemd.Status{Load: "not-found", Active: "inactive", Sub: "dead"}
		}
	}
	if a.reload {
		began := time.Now()
		if err := a.cfg.Systemd.Reload(ctx); err != nil {
			return nil, err
		}
		a.reload, found = false, nil
		took := time.Since(began)
		a.reloadAfter = time.Now().Add(min(4*took, longestRest))
	}
	return found, nil
}

// needsReload reports whether what systemd knows of a unit that is to be loaded,
// or of what it is installed in, is out of date.
func (a *Agent) needsReload(name string, w *want) bool {
	u := a.units[name]
	return u.On || u.Status.Load != "not-found" || w.Install
}

// postpone takes out of the steps the units whose loading needs systemd to read all
// files again, if it has just done that and need not anyway: it does nothing else
// meanwhile, and when many units change one after the other it would do little else.
func (a *Agent) postpone(now *part, by map[Action][]Step) {
	if a.reload || !time.Now().Before(a.reloadAfter) {
		return
	}
	later := map[string]bool{}
	for _, s := range by[Load] {
		if a.needsReload(s.Unit, now.wants[s.Unit]) {
			later[s.Unit] = true
		}
	}
	if len(later) == 0 {
		return
	}
	for do, steps := range by {
		by[do] = slices.DeleteFunc(steps, func(s Step) bool { return do != Stop && later[s.Unit] })
	}
	a.retryAt = a.reloadAfter
}

func names(steps []Step) []string {
	var all []string
	for _, s := range steps {
		all = append(all, s.Unit)
	}
	return all
}

// fail notes what is wrong with a unit, and when to try again. Of trouble the
// engine is told, which may choose another node.
func (a *Agent) fail(name string, err error) {
	u := a.units[name]
	u.failures++
	u.retryAt = time.Now().Add(min(firstRetry<<min(u.failures-1, 20), time.Minute))
	if errors.Is(err, systemd.ErrUnknown) || errors.Is(err, context.DeadlineExceeded) || errors.Is(err, errNotNow) {
		u.waiting, u.trouble = err.Error(), ""
	} else {
		u.waiting, u.trouble = "", err.Error()
	}
	if u.failures == 1 {
		a.log.Warn("a unit cannot be brought to its state: trying again", "unit", name, "err", err)
	}
}

// errNotNow: nothing is wrong with the unit.
var errNotNow = errors.New("it has to wait")

func (a *Agent) succeed(name string) {
	u := a.units[name]
	u.failures, u.retryAt, u.trouble, u.waiting = 0, time.Time{}, "", ""
}

// note writes the record of a unit down.
func (a *Agent) note(name string) bool {
	if err := a.disk.note(name, a.units[name].record); err != nil {
		a.fail(name, err)
		return false
	}
	return true
}

// failed takes those out of names that the call failed for, and says so.
func (a *Agent) failed(names []string, key func(string) string, err error) []string {
	if err == nil {
		return names
	}
	var some systemd.Failures
	each := errors.As(err, &some)
	return slices.DeleteFunc(names, func(name string) bool {
		one := some[key(name)]
		switch {
		case !each:
			a.fail(name, fmt.Errorf("%w: %w", errNotNow, err))
		case one != nil:
			a.fail(name, one)
		}
		return !each || one != nil
	})
}

func itself(name string) string { return name }

// unload removes what there is of stopped units, and returns those that are to
// be forgotten when systemd has read its files.
func (a *Agent) unload(ctx context.Context, names []string) []string {
	if len(names) == 0 {
		return nil
	}
	for _, name := range names {
		a.units[name].Whole = false
	}
	names = slices.DeleteFunc(names, func(name string) bool { return !a.note(name) })
	// Where nothing else was linked systemd need not look through all its folders.
	installed := slices.DeleteFunc(slices.Clone(names), func(name string) bool {
		return !a.units[name].Installed && a.disk.isPlain(name)
	})
	enabled := a.failed(slices.Clone(installed), itself, a.cfg.Systemd.Disable(ctx, installed...))
	return slices.DeleteFunc(names, func(name string) bool {
		if slices.Contains(installed, name) && !slices.Contains(enabled, name) {
			return true
		}
		err := errors.Join(a.disk.unlink(name), a.cfg.Systemd.ResetFailed(ctx, name), a.disk.remove(name))
		if err != nil {
			a.fail(name, err)
		}
		return err != nil
	})
}

func (a *Agent) forget(name string) {
	u := a.units[name]
	if err := a.disk.forget(name); err != nil {
		a.fail(name, err)
		return
	}
	u.On, u.record = false, record{}
	a.succeed(name)
}

// load writes and links the files of units, and returns those that are whole
// when systemd has read its files.
func (a *Agent) load(ctx context.Context, now *part, names []string) []string {
	if len(names) == 0 {
		return nil
	}
	names = slices.DeleteFunc(names, func(name string) bool {
		u, w := a.units[name], now.wants[name]
		old := u.have
		a.reload = a.reload || a.needsReload(name, w)
		if !u.On {
			u.record = record{Restarts: w.Restarts}
		}
		u.Hash, u.Sum, u.Epoch, u.Exclusive, u.Whole = w.Hash, w.Sum, w.Epoch, w.Exclusive, false
		u.On, u.Installed = true, u.Installed || w.Install
		if !a.note(name) {
			u.have = old
			return true
		}
		if err := a.disk.write(name, w.Text, w.DropIn); err != nil {
			a.fail(name, err)
			return true
		}
		return false
	})
	paths := make([]string, len(names))
	for i, name := range names {
		paths[i] = a.disk.unit(name)
	}
	names = a.failed(names, a.disk.unit, a.cfg.Systemd.Link(ctx, paths...))
	var install []string
	for _, name := range names {
		if now.wants[name].Install {
			install = append(install, name)
		}
	}
	if len(install) == 0 {
		return names
	}
	enabled := a.failed(slices.Clone(install), itself, a.cfg.Systemd.Enable(ctx, install...))
	return slices.DeleteFunc(names, func(name string) bool {
		return slices.Contains(install, name) && !slices.Contains(enabled, name)
	})
}

func (a *Agent) adopt(name string, w *want) {
	u := a.units[name]
	u.Launched = u.Launched || w.Desired == unit.Launched
	u.Restarts, u.Doing = w.Restarts, ""
	if a.note(name) {
		a.succeed(name)
	}
}
