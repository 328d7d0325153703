package wire

import (
	"time"

	"flotilla/internal/unit"
)

// Submissions is the body of POST /v1/units.
type Submissions struct {
	Units []Submission `json:"units"`
	// Together has nothing written if one of the units is refused or missing.
	// Otherwise each stands for itself: one that is refused does not keep the
	// others out.
	Together bool `json:"together,omitempty"`
	// Retry has units that are launched already and have failed started again.
	Retry bool `json:"retry,omitempty"`
}

// Submission is one unit that is to be there, in a state.
type Submission struct {
	// Name is that of the unit; web means web.service. Without a text it may be a
	// pattern as of path.Match, for all units that it matches.
	Name string `json:"name"`
	// Text is the unit file, kept byte for byte. Without one the unit that is
	// there is meant, and if there is none and Name is an instance, the text of
	// its template.
	Text *string `json:"text,omitempty"`
	// Template says that Text is that of the template of Name: one that is there
	// already comes before it.
	Template bool `json:"template,omitempty"`
	// Desired is the state that is wanted; "" leaves it as it is, and is
	// inactive for a new unit.
	Desired unit.Desired `json:"desired,omitempty"`
	// Replace puts the text in the place of another one of that name. Without
	// it the old text stays, but the desired state is set all the same.
	Replace bool `json:"replace,omitempty"`
	// Careful has Replace keep the old text if the unit is wanted in a higher
	// state than Desired ("" is inactive here): the outcome is InUse.
	Careful bool `json:"careful,omitempty"`
}

// Outcome is what a request did with one unit.
type Outcome string

// The outcomes of POST /v1/units, and then those of POST /v1/units/change.
const (
	Created   Outcome = "created"
	Replaced  Outcome = "replaced"  // another text, in the place of the old one
	Updated   Outcome = "updated"   // the same text; desired state, comments or spacing differ
	Unchanged Outcome = "unchanged" // it is all there already
	Differs   Outcome = "differs"   // there is another text, which stays; the desired state is set
	InUse     Outcome = "in_use"    // the same, since the unit is in too high a state to be replaced
	Refused   Outcome = "refused"   // see the problems or the reason; nothing was written
	Skipped   Outcome = "skipped"   // nothing was written, because another one of a request that goes together was refused

	Changed Outcome = "changed"
	Missing Outcome = "missing" // there is no such unit
)

// Result is what became of one unit.
type Result struct {
	Name    string       `json:"name"` // of the unit; what was asked for if that is missing
	Outcome Outcome      `json:"outcome"`
	Desired unit.Desired `json:"desired,omitempty"` // from now on; "" if there is no such unit
	Was     unit.Desired `json:"was,omitempty"`     // before; "" if it was not there
	Global  bool         `json:"global,omitempty"`
	// From is the template whose text was taken, and FromDiffers says that the
	// one that was sent is another.
	From        string         `json:"from,omitempty"`
	FromDiffers bool           `json:"from_differs,omitempty"`
	Reason      string         `json:"reason,omitempty"` // why it was refused, if that is not in the problems
	Problems    []unit.Problem `json:"problems,omitempty"`
}

// Results is the answer to POST /v1/units and POST /v1/units/change.
type Results struct {
	Results  []Result `json:"results"`  // in the order of the request; of a pattern one for each unit, by name
	Revision int64    `json:"revision"` // of the store; all that was written is in force at it
}

// Changes is the body of POST /v1/units/change: exactly one of Desired, Stop,
// Restart and Destroy.
type Changes struct {
	Names   []string     `json:"names"` // names and patterns, as in Submission
	Desired unit.Desired `json:"desired,omitempty"`
	Stop    bool         `json:"stop,omitempty"`    // loaded, of launched units; the others stay as they are
	Restart bool         `json:"restart,omitempty"` // of launched units; loaded ones are launched
	Destroy bool         `json:"destroy,omitempty"`
}

// Units is the answer to GET /v1/units.
type Units struct {
	Revision int64    `json:"revision"`          // of the store, at which all that follows was read
	Units    []Unit   `json:"units"`             // by name
	Missing  []string `json:"missing,omitempty"` // names and patterns that were asked for and mean no unit
}

// Unit is one unit: what is wanted, where it is to run and what runs.
type Unit struct {
	Name    string       `json:"name"`
	Hash    string       `json:"hash,omitempty"` // 40 digits, as fleet's
	Desired unit.Desired `json:"desired,omitempty"`
	// Current is what has been reached on its node; "" for global units.
	Current    unit.Desired `json:"current,omitempty"`
	Global     bool         `json:"global,omitempty"`
	Template   bool         `json:"template,omitempty"`
	Node       *NodeRef     `json:"node"`                 // null: it is on none, or global
	Leaving    string       `json:"leaving,omitempty"`    // why it leaves its node
	Placed     string       `json:"placed,omitempty"`     // why it is on that node
	Unplaced   string       `json:"unplaced,omitempty"`   // why it is on none
	MovingTo   string       `json:"moving_to,omitempty"`  // ID of the node somebody wants it on
	Restarts   int64        `json:"restarts,omitempty"`   // asked for so far
	States     []UnitState  `json:"states"`               // by node ID; more than one for a global unit, or while it moves
	Problem    string       `json:"problem,omitempty"`    // why its record or its file cannot be used
	Text       string       `json:"text,omitempty"`       // only of GET /v1/units/{name}
	Serialized string       `json:"serialized,omitempty"` // as fleet shows it; only of GET /v1/units/{name}
}

// UnitState is what one node says of a unit.
type UnitState struct {
	Unit     string `json:"unit"`
	NodeID   string `json:"node_id"`
	Node     string `json:"node"`    // "" while it is away
	Address  string `json:"address"` // of the node
	Load     string `json:"load"`
	Active   string `json:"active"`
	Sub      string `json:"sub"`
	Hash     string `json:"hash"` // "": the node has no file of it, see Waiting
	Epoch    int64  `json:"epoch,omitempty"`
	Launched bool   `json:"launched,omitempty"`
	Restarts int64  `json:"restarts,omitempty"`
	Trouble  string `json:"trouble,omitempty"`
	Waiting  string `json:"waiting,omitempty"`
}

// States is the answer to GET /v1/states: what nodes have, of units that are
// wanted and of those that are just being stopped.
type States struct {
	Revision int64       `json:"revision"` // of the store, at which all that follows was read
	States   []UnitState `json:"states"`   // by unit and node ID
}

// UnitExplanation is the answer to GET /v1/units/{name}/explain.
type UnitExplanation struct {
	Unit    Unit      `json:"unit"`
	Summary string    `json:"summary,omitempty"` // why it is nowhere
	Nodes   []Verdict `json:"nodes"`
}

// Verdict is what is to be said of one node for a unit.
type Verdict struct {
	NodeID  string `json:"node_id"`
	Node    string `json:"node"`
	Verdict string `json:"verdict"` // here, eligible or refused
	Reason  string `json:"reason,omitempty"`
	Score   string `json:"score,omitempty"`
}

// MoveRequest is the body of POST /v1/units/{name}/move.
type MoveRequest struct {
	To     string `json:"to"` // a node, as in POST /v1/nodes/{node}/settings
	Reason string `json:"reason,omitempty"`
}

// Moved is the answer to it.
type Moved struct {
	Unit     string  `json:"unit"`
	Node     NodeRef `json:"node"`
	Changed  bool    `json:"changed"` // false: it is there already, or on its way
	Revision int64   `json:"revision"`
}

// Rebalance is the answer to GET and POST /v1/rebalance: the moves that would
// even out the nodes, or those that were asked for.
type Rebalance struct {
	Moves    []Move `json:"moves"`
	Revision int64  `json:"revision"`
}

// Move is one of them.
type Move struct {
	Unit   string `json:"unit"`
	From   string `json:"from"` // a node's ID, as To
	To     string `json:"to"`
	Reason string `json:"reason"`
}

// JournalLine is one line of the answer to GET /v1/journal. One with a Problem has
// no message: it says why lines are missing.
type JournalLine struct {
	Time       time.Time `json:"time"`
	NodeID     string    `json:"node_id,omitempty"`
	Node       string    `json:"node,omitempty"`
	Unit       string    `json:"unit,omitempty"`
	Message    string    `json:"message"`
	Priority   int       `json:"priority"`
	PID        int       `json:"pid,omitempty"`
	Identifier string    `json:"identifier,omitempty"`
	Problem    string    `json:"problem,omitempty"`

	// Between nodes only.
	Cursor string   `json:"cursor,omitempty"`
	Live   bool     `json:"live,omitempty"`  // not a line: what was there is over, what is new follows
	Units  []string `json:"units,omitempty"` // of Live: those that the node has of the ones asked for
}

// UnitStatus is what systemd says of one unit on one node.
type UnitStatus struct {
	Unit    string `json:"unit"`
	NodeID  string `json:"node_id,omitempty"`
	Node    string `json:"node,omitempty"`
	Text    string `json:"text,omitempty"`    // of systemctl status
	Exit    int    `json:"exit"`              // of systemctl status
	Problem string `json:"problem,omitempty"` // why there is no text
}

// UnitStatuses is the answer to GET /v1/unit-status, by unit and then by node.
type UnitStatuses struct {
	Statuses []UnitStatus `json:"statuses"`
}
