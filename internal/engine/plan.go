// Package engine decides which node each unit runs on, and writes that into the
// store while this node leads. It knows the records of units and nodes and what
// unit files ask for; it must not know systemd, HAProxy or services, nor talk to
// any node.
//
// Plan is a pure function: it looks at all units of a snapshot each time, and
// what it builds for that is thrown away afterwards.
package engine

import (
	"cmp"
	"fmt"
	"maps"
	"reflect"
	"slices"
	"strings"
	"time"

	"flotilla/internal/state"
	"flotilla/internal/unit"
)

// Action is what a Step does to the records.
type Action string

// The actions. A node answers Leave by stopping the unit and deleting its
// placement. All others are complete when they are written.
const (
	Place    Action = "place"    // put the placement; with From: instead of that on a node that is gone
	Approve  Action = "approve"  // put the placement: the unit stays, with the file that it has now
	Refresh  Action = "refresh"  // put the placement: the same node in a new generation
	Leave    Action = "leave"    // put the placement with the reason to leave
	Forget   Action = "forget"   // delete the placement on a node that is gone
	Unplaced Action = "unplaced" // put why no node takes the unit
	Clear    Action = "clear"    // delete that
	EndMove  Action = "end-move" // delete a move that is done or that cannot be done
	Hold     Action = "hold"     // put which nodes' units wait
	Allow    Action = "allow"    // put that they need not wait any more
	EndHold  Action = "end-hold" // delete that
)

// Step is one change of the records of one unit, or of the failover, and why it
// is made. It is to be written only if what it was planned from still holds.
type Step struct {
	Do     Action
	Unit   string // "" for the failover
	Node   string // its ID
	From   string // Place: the node that is gone
	Reason string // never empty

	Placement state.Placement // Place, Approve, Refresh and Leave: what is put
	Failover  state.Failover  // Hold and Allow: what is put
	EndMove   bool            // the move is deleted too
	Clear     bool            // why it was unplaced is deleted too

	// What it was planned from.
	unit     *state.Unit
	failover state.Item[state.Failover] // Hold, Allow and EndHold
}

// String gives the step as one line: "place a.service on n1: it has the fewest
// units (0)".
func (s Step) String() string {
	var b strings.Builder
	b.WriteString(string(s.Do))
	if s.Unit != "" {
		b.WriteString(" " + s.Unit)
	}
	if s.Node != "" {
		b.WriteString(" on " + s.Node)
	}
	if s.From != "" {
		b.WriteString(" from " + s.From)
	}
	if s.EndMove && s.Do != EndMove {
		b.WriteString(" end-move")
	}
	if s.Clear && s.Do != Clear {
		b.WriteString(" clear")
	}
	return b.String() + ": " + s.Reason
}

// Input is what a plan is made from.
type Input struct {
	Snapshot *state.Snapshot // with the nodes' reports: troubles are in them
	Now      time.Time
	Memory   Memory
}

// Result is a plan.
type Result struct {
	Steps  []Step // at most one for each unit
	Memory Memory // for the next plan
	// Next is when to plan again even if no record changes; zero: not at all.
	Next time.Time

	Units    int // names of which there is any record
	Nodes    int // that are there and run units
	Unplaced int // units that should be on a node and are on none that is there
}

// Plan returns what has to be done. The same input gives the same result, and
// nothing of the input is changed.
func Plan(in Input) Result {
	p := newPass(in.Snapshot, in.Memory.Saw(in.Snapshot).clone(), in.Now, false)
	p.brake()
	p.expireBackOff()
	p.reservePlaces()
	var queue []*unitPlan
	for _, u := range p.units {
		if !u.settled() {
			queue = append(queue, u)
		}
	}
	if len(queue) > 1000 {
		p.steps = slices.Grow(p.steps, len(queue))
	}
	for len(queue) > 0 {
		rank(queue)
		for _, u := range queue {
			if !u.stepped {
				p.decide(u)
			}
		}
		queue, p.again = p.again, nil
	}
	r := Result{Next: p.next, Units: len(in.Snapshot.Units), Nodes: p.running, Unplaced: p.explainUnplaced()}
	r.Steps, r.Memory = p.steps, p.memory
	return r
}

// matters reports whether a plan may be another one after newer has come instead
// of old. Nodes report all the time; of that, only troubles matter.
func matters(old, newer *state.Snapshot) bool {
	if !sameMap(old.Units, newer.Units) || len(old.Nodes) != len(newer.Nodes) || old.Failover.Modified != newer.Failover.Modified {
		return true
	}
	for id, n := range newer.Nodes {
		was := old.Nodes[id]
		if was == n {
			continue
		}
		if was == nil || was.Record.Modified != n.Record.Modified || was.Settings.Modified != n.Settings.Modified || !maps.Equal(troublesOf(was), troublesOf(n)) {
			return true
		}
	}
	return false
}

// sameMap reports whether two snapshots share a map, because nothing in it has
// changed.
func sameMap(a, b map[string]*state.Unit) bool {
	return reflect.ValueOf(a).Pointer() == reflect.ValueOf(b).Pointer()
}

// isQuiet reports whether nothing can be to do about a unit at a node, as its
// records are and as the node was when the pass began, unless other units are in
// its way. It may say no of a unit about which decide finds nothing to do either.
func isQuiet(u *state.Unit, at *nodePlan) bool {
	if u.Move.Exists() || u.Unplaced.Exists() {
		return false
	}
	r, placement := u.Requirements, &u.Placement.Value
	switch {
	case at == nil:
		return !u.Wanted() || r.Global
	case !at.present:
		return false
	case !u.Wanted(): // the node stops it
		return true
	case placement.Leave != "" || placement.Generation != at.generation || placement.Approved != u.Hash || u.Problem != "":
		return false
	}
	_, troubled := at.troubles[u.Name]
	return !troubled && !r.Global && len(r.MachineOf) == 0 && at.keeps().kind == fits && (at.unreadable || r.Mismatch(at.ID, at.Metadata) == "")
}

// settled reports whether a unit is quiet and no other one can be in its way.
func (u *unitPlan) settled() bool {
	return u.patterns == nil && !u.backsOff && !(reserves(u.Requirements) && u.at != nil && u.at.overbooked) && isQuiet(u.Unit, u.at)
}

// rank sorts units into the order in which they get their place: those with the
// fewest choices first, and units after the peers that they must be with.
func rank(units []*unitPlan) {
	for _, u := range units {
		u.rank = rankOf(u)
	}
	slices.SortFunc(units, func(a, b *unitPlan) int {
		return cmp.Or(cmp.Compare(a.rank, b.rank), strings.Compare(a.Name, b.Name))
	})
}

func rankOf(u *unitPlan) int {
	r := u.Requirements
	switch {
	case len(r.MachineOf) > 0:
		return 3
	case len(r.Replaces) > 0 || r.MachineID != "" || u.Move.Exists():
		return 0
	case len(r.Metadata) > 0 || len(r.Where) > 0 || u.patterns != nil || reserves(u.Requirements):
		return 1
	}
	return 2
}

// due has the next plan made at t at the latest.
func (p *pass) due(t time.Time) {
	if p.next.IsZero() || t.Before(p.next) {
		p.next = t
	}
}

// reservePlaces counts units that are to move on the node they move to as well,
// so that no other unit takes the place while they stop.
func (p *pass) reservePlaces() {
	slices.SortFunc(p.moving, byName)
	for _, u := range p.moving {
		n := p.nodes[moveTo(u)]
		if n == nil || u.at == n || !u.placeable() || p.refuse(u, n).kind != fits {
			continue
		}
		if u.at != nil || p.rival(u, anyUnit) == nil {
			p.reserve(u, n)
		}
	}
}

// placeable reports whether the unit is one that the engine may place.
func (u *unitPlan) placeable() bool {
	return u.Wanted() && u.Problem == "" && !u.Requirements.Global && u.Unreadable() == ""
}

// emit adds the step to the plan, and what is the same for all steps of a unit.
func (p *pass) emit(u *unitPlan, s Step) {
	s.Unit, s.unit = u.Name, u.Unit
	p.steps = append(p.steps, s)
	u.stepped = true
}

// decide emits the step that the unit needs, if any.
func (p *pass) decide(u *unitPlan) {
	switch {
	case u.Unreadable() != "":
	case u.at != nil && u.at.present:
		p.decidePlaced(u, u.at)
	case u.at != nil:
		p.decideLost(u, u.at)
	case !u.Wanted():
		p.tidy(u, idle(u))
	case u.Requirements.Global && u.Problem == "":
		p.tidy(u, "it is a global unit")
	case !u.global:
		p.decideNew(u)
	}
}

// idle returns why a unit is to be nowhere, "" if it is not.
func idle(u *unitPlan) string {
	switch {
	case !u.Record.Exists():
		return "it was destroyed"
	case !u.Wanted():
		return "its desired state is inactive"
	}
	return ""
}

// tidy deletes the records that say why a unit is nowhere and where it is to
// move, when they have lost their meaning.
func (p *pass) tidy(u *unitPlan, reason string) {
	switch {
	case u.Unplaced.Exists():
		p.emit(u, Step{Do: Clear, EndMove: u.Move.Exists(), Reason: reason})
	case u.Move.Exists():
		p.emit(u, Step{Do: EndMove, EndMove: true, Reason: reason})
	}
}

// decidePlaced decides about a unit on a node that is there. The node itself
// stops a unit that is not wanted and deletes its placement.
func (p *pass) decidePlaced(u *unitPlan, n *nodePlan) {
	if reason := idle(u); reason != "" {
		p.tidy(u, reason)
		return
	}
	placement := u.Placement.Value
	if reason := p.mustLeave(u, n); reason != "" {
		u.leaving = true
		if placement.Leave == "" { // if not, it is leaving already, for this reason or for one before
			placement.V, placement.Leave = state.Version, reason
			p.emit(u, Step{Do: Leave, Node: n.ID, Reason: reason, Placement: placement})
		}
		return
	}
	u.leaving = false
	if u.Move.Exists() {
		p.emit(u, Step{Do: EndMove, EndMove: true, Node: moveTo(u), Reason: p.moveEnd(u)})
		return
	}
	placement.V, placement.Leave = state.Version, ""
	if u.Problem == "" { // if not, the node goes on with the file that it has
		placement.Approved = u.Hash
	}
	s := Step{Node: n.ID}
	switch was := u.Placement.Value; {
	case was.Generation != n.generation:
		s.Do, s.Reason, s.Clear = Refresh, "the node has come back", u.Unplaced.Exists()
		placement.Generation, placement.Epoch = n.generation, p.snapshot.Revision
		placement.Reason = cmp.Or(placement.Reason, s.Reason)
	case was.Leave != "":
		s.Do, s.Reason = Approve, "it need not leave any more"
	case was.Approved != placement.Approved:
		s.Do, s.Reason = Approve, "its unit file has changed"
	default:
		p.tidy(u, "it is on "+n.ID)
		return
	}
	s.Placement = placement
	p.emit(u, s)
}

// mustLeave returns why a wanted unit must leave the node on which it is, "" if
// it may stay.
func (p *pass) mustLeave(u *unitPlan, n *nodePlan) string {
	if u.Problem != "" {
		return ""
	}
	if u.Requirements.Global {
		return "it is to run on every node now"
	}
	if why := p.evict(u, n); why.kind != fits {
		return p.say(why, u, n)
	}
	if u.goingTo != nil {
		return "it moves to " + u.goingTo.ID + ": " + moveReason(u)
	}
	trouble := ""
	if t, found := n.troubles[u.Name]; found && t.epoch == u.Placement.Value.Epoch {
		p.startBackOff(u, n, t)
		trouble = t.text
	} else if b := p.backOff(u, n); b != nil && u.Placement.Value.Leave != "" {
		trouble = b.reason
	}
	if trouble == "" {
		return ""
	}
	other, _ := p.pick(u)
	if other == nil {
		return "" // better in trouble here than nowhere
	}
	p.reserve(u, other)
	return "it is in trouble there: " + trouble
}

// moveTo returns the ID of the node that a unit is to move to, "" if its move
// cannot be read.
func moveTo(u *unitPlan) string {
	if u.Move.Problem != "" {
		return ""
	}
	return u.Move.Value.To
}

func moveReason(u *unitPlan) string { return cmp.Or(u.Move.Value.Reason, "somebody asked for it") }

// moveEnd says what became of a move of a unit that stays.
func (p *pass) moveEnd(u *unitPlan) string {
	n := p.nodes[moveTo(u)]
	switch {
	case n == nil:
		return "it cannot move: there is no such node"
	case n == u.at:
		return "it is there"
	case u.Problem != "":
		return "it cannot move: " + u.Problem
	}
	why := p.refuse(u, n)
	if v := p.rival(u, anyUnit); v != nil && why.kind == fits {
		why = refusal{rival, v.Name}
	}
	return "it cannot move: " + cmp.Or(p.say(why, u, n), "the place was taken meanwhile")
}

// decideLost decides about a unit on a node that is gone.
func (p *pass) decideLost(u *unitPlan, n *nodePlan) {
	reason := idle(u)
	if reason == "" && u.Requirements.Global && u.Problem == "" {
		reason = "it is to run on every node now"
	}
	switch {
	case reason != "":
		p.emit(u, Step{Do: Forget, Node: n.ID, Clear: u.Unplaced.Exists(), Reason: "the node is gone, and " + reason})
	case u.Problem != "":
	case u.goingTo != nil:
		p.place(u, u.goingTo, "it moves there: "+moveReason(u))
	case u.Move.Exists():
		p.emit(u, Step{Do: EndMove, EndMove: true, Node: moveTo(u), Reason: p.moveEnd(u)})
	case n.held:
	default:
		to, why := p.pick(u)
		if to != nil {
			p.place(u, to, fmt.Sprintf("node %s is gone; %s", n.ID, why))
			return
		}
		// Its placement stands: if the node comes back the unit need not even be
		// restarted.
		p.noteUnplaced(u, fmt.Sprintf("node %s is gone; %s", n.ID, p.summary(u)))
	}
}

// decideNew decides about a unit that is to be somewhere and is nowhere.
func (p *pass) decideNew(u *unitPlan) {
	if u.Problem != "" {
		p.noteUnplaced(u, u.Problem)
		return
	}
	if u.goingTo != nil {
		p.place(u, u.goingTo, "it moves there: "+moveReason(u))
		return
	}
	key := ""
	if len(p.hopeless) > 0 {
		key = p.requirementsKey(u)
		if why, known := p.hopeless[key]; known && key != "" {
			p.noteUnplaced(u, why)
			return
		}
	}
	if n, why := p.pick(u); n != nil {
		if u.Move.Exists() {
			why += "; " + p.moveEnd(u)
		}
		p.place(u, n, why)
		return
	}
	why := p.summary(u)
	if key = p.requirementsKey(u); key != "" {
		p.hopeless[key] = why
	}
	p.noteUnplaced(u, why)
}

// place puts the unit on a node.
func (p *pass) place(u *unitPlan, n *nodePlan, reason string) {
	s := Step{Do: Place, Node: n.ID, Reason: reason, EndMove: u.Move.Exists(), Clear: u.Unplaced.Exists()}
	if u.at != nil {
		s.From = u.at.ID
	}
	s.Placement = state.Placement{V: state.Version, Node: n.ID, Generation: n.generation, Epoch: p.snapshot.Revision, Approved: u.Hash, Reason: reason}
	p.emit(u, s)
	p.put(u, n)
	p.again = append(p.again, p.followers[u.Name]...)
}

// noteUnplaced notes why the unit is on no node that is there. What is new is
// told at once. An explanation that is there already and is not exact any more
// waits until nothing else is to be done, see explainUnplaced.
func (p *pass) noteUnplaced(u *unitPlan, why string) {
	if u.nowhere == "" {
		p.unplaced = append(p.unplaced, u)
	}
	u.nowhere = why
	if !u.Unplaced.Exists() || u.Move.Exists() {
		p.emit(u, Step{Do: Unplaced, EndMove: u.Move.Exists(), Reason: why})
	}
}

// explainUnplaced returns how many units are on no node that is there. If the
// plan has no other step for any unit it puts right what was written about them:
// while many units move, what stands in the way of the others changes with each
// of them, and writing all of that would slow the moves down.
func (p *pass) explainUnplaced() (count int) {
	busy := slices.ContainsFunc(p.steps, func(s Step) bool { return s.Unit != "" })
	for _, u := range p.unplaced {
		if u.at != nil && u.at.present {
			continue // it was placed later in the same plan
		}
		count++
		if !busy && (u.Unplaced.Problem != "" || u.Unplaced.Value.Reason != u.nowhere) {
			p.emit(u, Step{Do: Unplaced, Reason: u.nowhere})
		}
	}
	return count
}

// templateOf returns the template of which the unit is an instance, "" if it is
// none.
func templateOf(name string) string {
	if n, _ := unit.SplitName(name); n.IsInstance() {
		return n.Template()
	}
	return ""
}
