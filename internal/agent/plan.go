package agent

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	"flotilla/internal/systemd"
	"flotilla/internal/unit"
)

// Action is what a Step does with a unit.
type Action string

// The actions, in the order in which a pass carries them out. Load and Unload
// of all units share one daemon-reload, if they need any, which comes before
// the first Start.
const (
	Stop    Action = "stop"
	Unload  Action = "unload"  // unlink, forget its failures, remove its files
	Load    Action = "load"    // write its files, link and, with [Install], enable them
	Adopt   Action = "adopt"   // note that it is as it shall be
	Start   Action = "start"   //
	Restart Action = "restart" //
	Release Action = "release" // tell the store that it is not here any more
)

var phase = map[Action]int{Stop: 0, Unload: 1, Load: 2, Adopt: 3, Start: 4, Restart: 4, Release: 5}

// Step is one thing to do with a unit, and why.
type Step struct {
	Do     Action
	Unit   string
	Reason string
}

func (s Step) String() string { return fmt.Sprintf("%s %s: %s", s.Do, s.Unit, s.Reason) }

// have is what there is of one unit on this node.
type have struct {
	record                // what was done with it
	On     bool           // it has files here, or had some when this was written down
	Status systemd.Status //
	Busy   Action         // what is under way; "" with Doing: an earlier agent ended before it knew what became of it

	// The loop sets these before it plans.
	Foreign  string // file of a unit of that name that is not ours
	Resting  bool   // what went wrong before is not due to be tried again
	Released bool   // the store knows that it has left
}

// alive reports whether something of the unit runs or is about to.
func (h have) alive() bool {
	switch h.Status.Active {
	case "", "inactive", "failed":
		return h.Status.Queued == "start" || h.Status.Queued == "restart"
	}
	return true
}

// started reports whether it was started here, or may have been.
func (h have) started() bool { return h.Launched || h.Doing != "" || h.Busy != "" }

// stoppable reports whether the unit has to be stopped before its files may be
// touched.
func (h have) stoppable() bool { return h.On && (h.started() || h.alive()) }

// fence says what may be done with exclusive units.
type fence struct {
	Exempt bool // no other node can be given them
	Open   bool // they may be started: the fence is armed and the lease is young
}

// plan returns the next steps from what there is to what is wanted, for every
// unit that has nothing under way. When a step has ended plan is asked again:
// a new version is loaded only after the stop of the old one has ended.
func plan(wants map[string]*want, haves map[string]have, f fence) []Step {
	names := slices.Collect(maps.Keys(haves))
	for name, w := range wants {
		if _, ok := haves[name]; !ok && !w.IfHere {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	var steps []Step
	for _, name := range names {
		for _, s := range planUnit(wants[name], haves[name], f) {
			s.Unit = name
			steps = append(steps, s)
		}
	}
	slices.SortStableFunc(steps, func(a, b Step) int { return phase[a.Do] - phase[b.Do] })
	return steps
}

// planUnit returns the steps without the unit's name. w is nil if the unit is not
// meant for this node.
func planUnit(w *want, h have, f fence) []Step {
	switch {
	case h.Resting, h.Busy != "" && h.Busy != Start && h.Busy != Restart:
		return nil
	case w == nil:
		return leave(h, "it is not meant for this node", false)
	case w.Release != "":
		return leave(h, w.Release, !h.Released)
	case w.Problem != "": // what runs of an earlier version keeps running
		return nil
	case w.Void != "":
		switch {
		case w.Outlived && h.Exclusive && !f.Exempt && h.stoppable():
			return []Step{{Do: Stop, Reason: "it is exclusive, and " + w.Void}}
		case w.Desired == unit.Loaded && h.On && h.started():
			return []Step{{Do: Stop, Reason: "it shall be loaded and not launched"}}
		}
		return nil
	case !h.On && h.Foreign != "":
		return nil
	}
	return keep(w, h, f)
}

// leave stops the unit and removes what there is of it. A start that is under
// way is overtaken.
func leave(h have, reason string, release bool) []Step {
	var steps []Step
	switch {
	case h.stoppable():
		return []Step{{Do: Stop, Reason: reason}}
	case h.On:
		steps = append(steps, Step{Do: Unload, Reason: reason})
	}
	if release {
		steps = append(steps, Step{Do: Release, Reason: reason})
	}
	return steps
}

// keep brings a unit that may be here to the state that is wanted.
func keep(w *want, h have, f fence) []Step {
	replaced := ""
	switch {
	case !h.On || h.Hash == "":
	case w.Hash != h.Hash:
		replaced = "its file has changed"
	case w.Exclusive != h.Exclusive:
		replaced = "it is exclusive, or not any more"
	case w.Exclusive && w.Epoch != h.Epoch && !f.Exempt:
		replaced = "it is exclusive and was placed anew"
	}
	switch {
	case h.Doing == Stop && h.Busy == "":
		return []Step{{Do: Stop, Reason: "its stop was under way"}}
	case replaced != "" && h.stoppable():
		return []Step{{Do: Stop, Reason: replaced}}
	case w.Desired == unit.Loaded && h.started():
		return []Step{{Do: Stop, Reason: "it shall be loaded and not launched"}}
	case h.Busy == Start && w.Restarts <= h.Restarts, h.Busy == Restart && w.Restarts <= h.Restarts:
		return nil
	}
	var steps []Step
	loadable := h.Status.Load == "loaded"
	switch {
	case !h.On:
		steps, loadable = append(steps, Step{Do: Load, Reason: "it is meant for this node"}), true
	case !h.Whole:
		steps, loadable = append(steps, Step{Do: Load, Reason: "its files are not complete"}), true
	case replaced != "":
		steps, loadable = append(steps, Step{Do: Load, Reason: replaced}), true
	case w.Sum != h.Sum || w.Epoch != h.Epoch:
		steps, loadable = append(steps, Step{Do: Load, Reason: "its comments, drop-in or epoch have changed"}), true
	}
	switch {
	case w.Desired != unit.Launched:
		if w.Restarts != h.Restarts && len(steps) == 0 {
			steps = append(steps, Step{Do: Adopt, Reason: "it is not launched, so there is nothing to restart"})
		}
	case !loadable, h.Busy != "" && w.Restarts <= h.Restarts:
	case !h.Launched && h.alive() && replaced == "":
		steps = append(steps, Step{Do: Adopt, Reason: "it runs already"})
	case w.Exclusive && !f.Open && (!h.Launched || w.Restarts > h.Restarts):
	case !h.Launched:
		steps = append(steps, Step{Do: Start, Reason: "it shall be launched"})
	case w.Restarts > h.Restarts:
		steps = append(steps, Step{Do: Restart, Reason: fmt.Sprintf("restart %d was asked for", w.Restarts)})
	case w.Restarts < h.Restarts && len(steps) == 0:
		steps = append(steps, Step{Do: Adopt, Reason: "its restarts are counted anew"})
	}
	return steps
}

// inOrder sorts units that are to be started so that each comes after those that
// are to be started before it. Of units that wait for each other any is first.
func inOrder(names []string, wants map[string]*want) []string {
	due, before := map[string]bool{}, map[string][]string{}
	for _, name := range names {
		due[name] = true
		before[name] = append(before[name], wants[name].After...)
		for _, later := range wants[name].Before {
			before[later] = append(before[later], name)
		}
	}
	var order []string
	seen := map[string]bool{}
	var visit func(string)
	visit = func(name string) {
		if seen[name] {
			return
		}
		seen[name] = true
		for _, other := range before[name] {
			visit(other)
		}
		if due[name] {
			order = append(order, name)
		}
	}
	for _, name := range slices.Sorted(slices.Values(names)) {
		visit(name)
	}
	return order
}

// startedBefore returns the units that the file names as those to be started
// first, and the ones of the same stem that activate it. before lists what it
// wants to be started before itself.
func startedBefore(n unit.Name, f *unit.File) (after, before []string) {
	for _, o := range f.Options {
		if o.Section != "Unit" || o.Name != "After" && o.Name != "Before" {
			continue
		}
		names := strings.Fields(n.Expand(strings.ReplaceAll(o.Value, "\\\n", " ")))
		switch {
		case o.Name == "After" && len(names) == 0:
			after = nil
		case o.Name == "After":
			after = append(after, names...)
		case len(names) == 0:
			before = nil
		default:
			before = append(before, names...)
		}
	}
	if n.Type == "service" {
		for _, kind := range []string{".socket", ".timer", ".path"} {
			after = append(after, n.Stem+kind)
		}
	}
	return after, before
}
