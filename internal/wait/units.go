package wait

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"

	"flotilla/internal/state"
	"flotilla/internal/unit"
	"flotilla/internal/wire"
)

// verdict is how a unit stands to what is waited for.
type verdict int

const (
	underWay verdict = iota
	reached
	broken   // systemd says that it failed
	doubtful // it has ended, or it has failed: but is that about this start?
)

// goal judges a unit; note is put behind the line about it.
type goal func(st state.Standing) (v verdict, note string)

var goals = map[wire.Goal]goal{
	wire.GoalLaunched: launched, wire.GoalLoaded: loaded, wire.GoalStopped: stopped, wire.GoalInactive: inactive, wire.GoalGone: gone,
}

func inactive(st state.Standing) (verdict, string) {
	if st.Current == unit.Inactive && !st.Placement.Exists() {
		return reached, ""
	}
	return underWay, ""
}

// loaded: on its node to stay, in this version, and not about to stop.
func loaded(st state.Standing) (verdict, string) {
	if st.Current != unit.Loaded || st.Placement.Value.Leave != "" || st.There.Hash != st.Hash || st.There.Active == "deactivating" {
		return underWay, ""
	}
	return reached, ""
}

// stopped: as loaded, but a unit that never got a node does not run either.
func stopped(st state.Standing) (verdict, string) {
	if st.Current == unit.Inactive && st.Home == "" {
		return reached, ""
	}
	return loaded(st)
}

// launched: started in this version where it is to stay, with as many restarts
// as asked for, and systemd says that it is active.
func launched(st state.Standing) (verdict, string) {
	if st.Current != unit.Launched || st.Placement.Value.Leave != "" || st.There.Hash != st.Hash || st.There.Restarts < st.Record.Value.Restarts {
		return underWay, ""
	}
	switch st.There.Active {
	case "active", "reloading", "refreshing":
		return reached, ""
	case "failed":
		return broken, st.There.Trouble
	case "inactive":
		if st.There.Waiting != "" {
			return underWay, ""
		}
		return doubtful, "it has ended"
	}
	return underWay, ""
}

// gone: destroyed. That no node has it either is seen by unitWait.
func gone(st state.Standing) (verdict, string) {
	if st.Record.Exists() || st.Placement.Exists() {
		return underWay, ""
	}
	return reached, ""
}

// why says what keeps a unit from getting on.
func why(known *state.Snapshot, st state.Standing) string {
	switch {
	case st.Home == "" && st.Unplaced.Value.Reason != "":
		return "on no node: " + st.Unplaced.Value.Reason
	case st.Home == "":
		return "on no node: the engine has not placed it yet"
	}
	at := legend(Ref(known, st.Home))
	switch {
	case st.Placement.Value.Leave != "":
		return "leaving " + at + ": " + st.Placement.Value.Leave
	case !st.Known:
		return at + " has not taken it up yet"
	case st.There.Trouble != "":
		return "on " + at + ": " + st.There.Trouble
	case st.There.Waiting != "":
		return "on " + at + ": " + st.There.Waiting
	case st.There.Hash != st.Hash:
		return at + " still has the old version"
	}
	return fmt.Sprintf("on %s, systemd says: %s, %s (%s)", at, st.There.Load, st.There.Active, st.There.Sub)
}

// legend shows a node as fleetctl does.
func legend(n wire.NodeRef) string {
	text := n.ID[:min(8, len(n.ID))] + "..."
	if n.Address != "" {
		text += "/" + n.Address
	}
	return text
}

// unitWait waits for units.
type unitWait struct {
	goal  wire.Goal
	judge goal
	pace  Pace
	names []string // that are not there yet
	began time.Time
	since map[string]time.Time // when a state in doubt was first seen
	told  map[string]string    // what units were last said to wait for
}

// Units returns a Waiter for units. It returns nil if the goal is none of units.
func Units(goal wire.Goal, names []string, pace Pace) Waiter {
	judge := goals[goal]
	if judge == nil {
		return nil
	}
	return &unitWait{goal: goal, judge: judge, pace: pace, names: names, began: time.Now(), since: map[string]time.Time{}, told: map[string]string{}}
}

// mostTold is how many units are said to wait at a time.
const mostTold = 10

func (w *unitWait) look(known *state.Snapshot, now time.Time) (events []wire.WaitEvent, until time.Time, done bool) {
	soonest := func(t time.Time) {
		if until.IsZero() || t.Before(until) {
			until = t
		}
	}
	loud, told := w.began.Add(w.pace.Quiet), 0
	w.names = slices.DeleteFunc(w.names, func(name string) bool {
		st := state.StandingOf(known, known.Named(name))
		switch {
		case w.goal != wire.GoalGone && !st.Record.Exists():
			events = append(events, wire.WaitEvent{Outcome: wire.WaitGone, Unit: name})
			return true
		case w.goal != wire.GoalGone && st.Requirements.Global:
			events = append(events, wire.WaitEvent{Outcome: wire.WaitGlobal, Unit: name})
			return true
		}
		v, note := w.judge(st)
		if w.goal == wire.GoalGone && v == reached && reported(known, name) {
			v = underWay
		}
		if v == broken || v == doubtful {
			if w.since[name].IsZero() {
				w.since[name] = now
			}
			if settled := w.since[name].Add(w.pace.Settle); now.Before(settled) {
				v = underWay
				soonest(settled)
			}
		} else {
			delete(w.since, name)
		}
		switch v {
		case reached, doubtful:
			events = append(events, eventOf(known, st, wire.WaitReached, note))
		case broken:
			events = append(events, eventOf(known, st, wire.WaitFailed, why(known, st)))
		default:
			if !now.Before(loud) && told < mostTold {
				if why := why(known, st); w.told[name] != why {
					w.told[name] = why
					told++
					events = append(events, eventOf(known, st, wire.WaitPending, why))
				}
			}
		}
		return v != underWay
	})
	if now.Before(loud) {
		soonest(loud)
	}
	return events, until, len(w.names) == 0
}

// reported reports whether a node says that it has a unit.
func reported(known *state.Snapshot, name string) bool {
	for _, n := range known.Nodes {
		if n.Units.Value.Units[name].Load != "" {
			return true
		}
	}
	return false
}

func eventOf(known *state.Snapshot, st state.Standing, outcome wire.WaitOutcome, message string) wire.WaitEvent {
	e := wire.WaitEvent{Outcome: outcome, Unit: st.Name, Current: st.Current, Message: message}
	if st.Home != "" {
		e.Node = new(Ref(known, st.Home))
	}
	return e
}

func (w *unitWait) late(known *state.Snapshot) (events []wire.WaitEvent, left int) {
	for _, name := range w.names {
		st := state.StandingOf(known, known.Named(name))
		events = append(events, eventOf(known, st, wire.WaitLate, why(known, st)))
	}
	return events, len(events)
}

// emptyWait waits until no unit is placed on a node.
type emptyWait struct {
	node wire.NodeRef
	left int
}

// Empty returns a Waiter for a node that has no units any more.
func Empty(node wire.NodeRef) Waiter { return &emptyWait{node: node} }

func (w *emptyWait) placed(known *state.Snapshot) (units []*state.Unit) {
	for _, u := range known.Units {
		if u.Placement.Exists() && u.Placement.Value.Node == w.node.ID {
			units = append(units, u)
		}
	}
	slices.SortFunc(units, func(a, b *state.Unit) int { return strings.Compare(a.Name, b.Name) })
	return units
}

func (w *emptyWait) look(known *state.Snapshot, _ time.Time) (events []wire.WaitEvent, _ time.Time, done bool) {
	e, left := wire.WaitEvent{Node: &w.node}, len(w.placed(known))
	switch {
	case !known.Nodes[w.node.ID].Present():
		e.Outcome, done = wire.WaitGone, true
	case left == 0:
		e.Outcome, done = wire.WaitReached, true
	case left != w.left:
		e.Outcome, e.Left = wire.WaitPending, left
	default:
		return nil, time.Time{}, false
	}
	w.left = left
	return []wire.WaitEvent{e}, time.Time{}, done
}

func (w *emptyWait) late(known *state.Snapshot) (events []wire.WaitEvent, left int) {
	for _, u := range w.placed(known) {
		why := "leaving: " + u.Placement.Value.Leave
		if u.Placement.Value.Leave == "" {
			why = cmp.Or(u.Unplaced.Value.Reason, u.Placement.Value.Reason)
		}
		events = append(events, wire.WaitEvent{Outcome: wire.WaitLate, Unit: u.Name, Node: &w.node, Message: why})
	}
	return events, len(events)
}
