package wire

import "flotilla/internal/unit"

// Goal is what a wait is for.
type Goal string

// The goals of a wait. The first ones are about units; global units are not
// waited for.
const (
	// GoalLaunched: started in its present version on the node where it is to
	// stay, with as many restarts as asked for, and systemd says that it is active
	// or that it has ended.
	GoalLaunched Goal = "launched"
	// GoalLoaded: on its node to stay, in its present version, and not running.
	GoalLoaded Goal = "loaded"
	// GoalStopped: loaded, or on no node.
	GoalStopped Goal = "stopped"
	// GoalInactive: on no node.
	GoalInactive Goal = "inactive"
	// GoalGone: destroyed, and no node has it any more.
	GoalGone Goal = "gone"
	// GoalEmpty: no unit is placed on a node. Global units do not count.
	GoalEmpty Goal = "empty"
	// GoalApplied: every node that routes runs a revision of the catalog.
	GoalApplied Goal = "applied"
)

// Wait is the body of POST /v1/wait.
type Wait struct {
	Goal     Goal     `json:"goal"`
	Names    []string `json:"names,omitempty"`    // of units: names and patterns, as in Changes
	Node     string   `json:"node,omitempty"`     // of GoalEmpty, as in POST /v1/nodes/{node}/settings
	Revision int64    `json:"revision,omitempty"` // of GoalApplied
	Service  string   `json:"service,omitempty"`  // of GoalApplied: whose revision it is, if that is known
	Limit    string   `json:"limit,omitempty"`    // such as "30s"; "" is for ever
}

// WaitOutcome says what an event of a wait is about.
type WaitOutcome string

// The outcomes of a wait. About each unit, or about each node in a wait for a
// revision, there is one event of the first five; the last event of all is
// WaitEnd.
const (
	WaitReached WaitOutcome = "reached" // it is where it should be
	WaitFailed  WaitOutcome = "failed"  // systemd says that it failed
	WaitLate    WaitOutcome = "late"    // time is up
	WaitGone    WaitOutcome = "gone"    // there is no such unit (any more), or the node is gone
	WaitGlobal  WaitOutcome = "global"  // a global unit
	WaitPending WaitOutcome = "pending" // what it waits for, after some seconds; of GoalEmpty, each time that fewer are left
	WaitEnd     WaitOutcome = "end"
)

// WaitEvent is one line of the answer to POST /v1/wait. Empty lines between them
// are signs of life.
type WaitEvent struct {
	Outcome WaitOutcome  `json:"outcome"`
	Unit    string       `json:"unit,omitempty"`
	Current unit.Desired `json:"current,omitempty"` // of the unit
	Node    *NodeRef     `json:"node,omitempty"`    // of the unit, or that was waited for
	Message string       `json:"message,omitempty"` // why, in words that go behind the name of the unit; of reached a remark
	Applied *Applied     `json:"applied,omitempty"` // of GoalApplied
	Left    int          `json:"left,omitempty"`    // how many are not there yet, or were not in the end
	Error   *Error       `json:"error,omitempty"`   // of end: why the wait was given up
}
