// Package unitapi is what the requests and answers of a node's API about units,
// machines and journals look like. It knows the records of the registry, whose
// shapes some answers have. It is small to start, for the sake of clients, and must
// not know the store or anything else of what answers.
package unitapi

import (
	"time"

	"flotilla/internal/registry"
)

// Submissions is the body of POST /v1/units. Each unit stands for itself: one
// that is refused does not keep the others out.
type Submissions struct {
	Units []Submission `json:"units"`
}

// Submission is one unit file.
type Submission struct {
	Name string `json:"name"`
	Text string `json:"text"` // kept byte for byte
	// Desired is the state that is wanted; "" leaves it as it is, and is
	// inactive for a new unit.
	Desired registry.Desired `json:"desired,omitempty"`
	// Replace puts the text in the place of another one of that name. Without
	// it the old text stays, but the desired state is set all the same.
	Replace bool `json:"replace,omitempty"`
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
	Refused   Outcome = "refused"   // see the problems or the reason; nothing was written

	Changed Outcome = "changed"
	Missing Outcome = "missing" // there is no such unit
)

// Result is what became of one unit.
type Result struct {
	Name     string           `json:"name"`
	Outcome  Outcome          `json:"outcome"`
	Desired  registry.Desired `json:"desired,omitempty"` // from now on; "" if there is no such unit
	Reason   string           `json:"reason,omitempty"`  // why it was refused, if that is not in the problems
	Problems []Problem        `json:"problems,omitempty"`
}

// Results is the answer to POST /v1/units and POST /v1/units/change.
type Results struct {
	Results  []Result `json:"results"`  // in the order of the request
	Revision int64    `json:"revision"` // of the store; all that was written is in force at it
}

// Problem is one thing that is wrong with a unit file.
type Problem struct {
	Line    int    `json:"line,omitempty"` // from 1; 0: it is not about one line
	Key     string `json:"key,omitempty"`
	Value   string `json:"value,omitempty"`
	Reason  string `json:"reason"`
	Remedy  string `json:"remedy,omitempty"`
	Warning bool   `json:"warning,omitempty"` // the unit is accepted all the same
}

// Changes is the body of POST /v1/units/change: exactly one of Desired, Restart
// and Destroy.
type Changes struct {
	Names   []string         `json:"names"`
	Desired registry.Desired `json:"desired,omitempty"`
	Restart bool             `json:"restart,omitempty"` // of launched units; loaded ones are launched
	Destroy bool             `json:"destroy,omitempty"`
}

// Units is the answer to GET /v1/units.
type Units struct {
	Revision int64  `json:"revision"` // of the store, at which all that follows was read
	Units    []Unit `json:"units"`    // by name
}

// Unit is one unit: what is wanted, where it is to run and what runs.
type Unit struct {
	Name    string           `json:"name"`
	Hash    string           `json:"hash,omitempty"` // 40 digits, as fleet's
	Desired registry.Desired `json:"desired,omitempty"`
	// Current is what has been reached on its machine; "" for global units.
	Current    registry.Desired `json:"current,omitempty"`
	Global     bool             `json:"global,omitempty"`
	Template   bool             `json:"template,omitempty"`
	Machine    *MachineRef      `json:"machine"`              // null: it is on none, or global
	Releasing  string           `json:"releasing,omitempty"`  // why it leaves its machine
	Placed     string           `json:"placed,omitempty"`     // why it is on that machine
	Unplaced   string           `json:"unplaced,omitempty"`   // why it is on none
	MovingTo   string           `json:"moving_to,omitempty"`  // ID of the machine somebody wants it on
	Restarts   int64            `json:"restarts,omitempty"`   // asked for so far
	States     []State          `json:"states"`               // by machine; more than one for a global unit, or while it moves
	Problem    string           `json:"problem,omitempty"`    // why its record cannot be used
	Text       string           `json:"text,omitempty"`       // only of GET /v1/units/{name}
	Serialized string           `json:"serialized,omitempty"` // as fleet shows it; only of GET /v1/units/{name}
}

// MachineRef names a machine. Node and Address are empty if it is not there.
type MachineRef struct {
	ID      string `json:"id"`
	Node    string `json:"node"`
	Address string `json:"address"`
}

// State is what one machine says of a unit.
type State struct {
	Machine  string `json:"machine"`
	Node     string `json:"node"`
	Address  string `json:"address"`
	Load     string `json:"load"`
	Active   string `json:"active"`
	Sub      string `json:"sub"`
	Hash     string `json:"hash"` // "": the machine has no file of it, see Waiting
	Epoch    int64  `json:"epoch,omitempty"`
	Launched bool   `json:"launched,omitempty"`
	Restarts int64  `json:"restarts,omitempty"`
	Trouble  string `json:"trouble,omitempty"`
	Waiting  string `json:"waiting,omitempty"`
}

// States is the answer to GET /v1/states: what machines have, of units that are
// wanted and of those that are just being stopped.
type States struct {
	Revision int64                 `json:"revision"` // of the store, at which all that follows was read
	Machines map[string]MachineRef `json:"machines"` // by ID: those that have units
	States   []UnitState           `json:"states"`   // by unit and machine
}

// UnitState is a State without what Machines says.
type UnitState struct {
	Unit     string `json:"unit"`
	Machine  string `json:"machine"`
	Load     string `json:"load"`
	Active   string `json:"active"`
	Sub      string `json:"sub"`
	Hash     string `json:"hash"`
	Epoch    int64  `json:"epoch,omitempty"`
	Launched bool   `json:"launched,omitempty"`
	Restarts int64  `json:"restarts,omitempty"`
	Trouble  string `json:"trouble,omitempty"`
	Waiting  string `json:"waiting,omitempty"`
}

// Explanation is the answer to GET /v1/units/{name}/explain.
type Explanation struct {
	Unit     Unit      `json:"unit"`
	Placed   string    `json:"placed,omitempty"`  // why it is where it is
	Summary  string    `json:"summary,omitempty"` // why it is nowhere
	Machines []Verdict `json:"machines"`
}

// Verdict is what is to be said of one machine for a unit.
type Verdict struct {
	ID      string `json:"id"`
	Node    string `json:"node"`
	Verdict string `json:"verdict"` // here, eligible or refused
	Reason  string `json:"reason,omitempty"`
	Score   string `json:"score,omitempty"`
}

// MoveRequest is the body of POST /v1/units/{name}/move.
type MoveRequest struct {
	To     string `json:"to"` // a machine's ID, the beginning of one, or the name of its node
	Reason string `json:"reason,omitempty"`
}

// Moved is the answer to POST /v1/units/{name}/move.
type Moved struct {
	Machine  MachineRef `json:"machine"`
	Changed  bool       `json:"changed"` // false: it is there already, or on its way
	Revision int64      `json:"revision"`
}

// Rebalance is the answer to GET and POST /v1/rebalance: the moves that would
// even out the machines, or those that were asked for.
type Rebalance struct {
	Moves    []ProposedMove `json:"moves"`
	Revision int64          `json:"revision"`
}

// ProposedMove is one of them; From and To are machine IDs.
type ProposedMove struct {
	Unit   string `json:"unit"`
	From   string `json:"from"`
	To     string `json:"to"`
	Reason string `json:"reason"`
}

// Machines is the answer to GET /v1/machines.
type Machines struct {
	Revision int64              `json:"revision"`
	Machines []Machine          `json:"machines"`           // by ID
	Failover *registry.Failover `json:"failover,omitempty"` // while many machines are gone
}

// Machine is one machine that is there.
type Machine struct {
	ID         string            `json:"id"`
	Node       string            `json:"node"`
	Address    string            `json:"address"`
	API        string            `json:"api,omitempty"` // ip:port for other nodes
	Version    string            `json:"version"`
	Metadata   map[string]string `json:"metadata"` // its own, with what was set
	Cordon     bool              `json:"cordon,omitempty"`
	Drain      bool              `json:"drain,omitempty"`
	Reason     string            `json:"reason,omitempty"` // of cordon or drain
	Units      int               `json:"units"`            // placed on it
	Globals    int               `json:"globals"`          // global units that run on it
	Runs       bool              `json:"runs"`             // it takes units; false where there is no systemd
	Memory     int64             `json:"memory"`           // bytes
	CPU        int64             `json:"cpu"`              // thousandths of a core
	Counters   map[string]int64  `json:"counters,omitempty"`
	Generation int64             `json:"generation"`
	BootID     string            `json:"boot_id"`
	Here       bool              `json:"here,omitempty"` // it is the answering one
}

// SettingsChange is the body of POST /v1/machines/{id}/settings. What is not
// given stays.
type SettingsChange struct {
	Cordon *bool   `json:"cordon,omitempty"`
	Drain  *bool   `json:"drain,omitempty"`
	Reason *string `json:"reason,omitempty"`
	// Metadata is merged into what was set: null takes the setting back, ""
	// hides the machine's own value.
	Metadata map[string]*string `json:"metadata,omitempty"`
}

// SettingsChanged is the answer to POST /v1/machines/{id}/settings.
type SettingsChanged struct {
	Machine  string            `json:"machine"` // its ID
	Settings registry.Settings `json:"settings"`
	Changed  bool              `json:"changed"`
	Revision int64             `json:"revision"`
}

// FailoverChange is the body of POST /v1/failover.
type FailoverChange struct {
	Allow bool `json:"allow"`
}

// FailoverChanged is the answer to POST /v1/failover.
type FailoverChanged struct {
	Failover registry.Failover `json:"failover"`
	Revision int64             `json:"revision"`
}

// JournalLine is one line of the answer to GET /v1/journal. One with a Problem has no
// message: it says why lines are missing.
type JournalLine struct {
	Time       time.Time `json:"time"`
	Machine    string    `json:"machine,omitempty"`
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
	Units  []string `json:"units,omitempty"` // of Live: those that the machine has of the ones asked for
}

// Status is what systemd says of one unit on one machine.
type Status struct {
	Unit    string `json:"unit"`
	Machine string `json:"machine,omitempty"`
	Node    string `json:"node,omitempty"`
	Text    string `json:"text,omitempty"`    // of systemctl status
	Exit    int    `json:"exit"`              // of systemctl status
	Problem string `json:"problem,omitempty"` // why there is no text
}

// Statuses is the answer to GET /v1/unit-status, by unit and then by node.
type Statuses struct {
	Statuses []Status `json:"statuses"`
}
