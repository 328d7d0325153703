// Package engine decides which machine each unit runs on, and writes that into
// the store while this node leads. It knows the records of units and machines
// and what unit files ask for; it must not know systemd, HAProxy or services,
// nor talk to any machine.
package engine

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"

	"flotilla/internal/registry"
)

// Action is what a Step does to the records.
type Action string

// The actions. An agent answers Release by stopping the unit and deleting
// placement and entry; all others are complete by themselves.
const (
	Place     Action = "place"      // put placement and entry; with From: instead of those of a machine that is gone
	Update    Action = "update"     // put the entry, the unit stays
	Refresh   Action = "refresh"    // the same machine in a new generation
	Release   Action = "release"    // put the entry with the reason why the unit is to leave
	Forget    Action = "forget"     // delete placement and entry of a machine that is gone
	Explain   Action = "unplaced"   // put why no machine takes the unit
	Clear     Action = "clear"      // delete that
	EndMove   Action = "end-move"   // delete a move that is done or that cannot be done
	PutGlobal Action = "global"     // put the entry for all machines
	EndGlobal Action = "end-global" // delete that
	Clean     Action = "clean"      // delete an entry without placement, which nobody wrote but by hand
	Hold      Action = "hold"       // put which machines' units wait
	Allow     Action = "allow"      // put that they need not wait any more
	EndHold   Action = "end-hold"   // delete that
)

// Step is one change of the records of one unit, or of the failover, and why it
// is made. It is to be written only if what it was planned from still holds.
type Step struct {
	Do      Action
	Unit    string // "" for the failover
	Machine string // its ID
	From    string // Place: the machine that is gone
	Reason  string // never empty

	Placement registry.Placement // Place and Refresh
	Entry     registry.Entry     // Place, Update, Refresh, Release and PutGlobal
	Failover  registry.Failover  // Hold and Allow
	EndMove   bool               // the move is deleted too
	Clear     bool               // why it was unplaced is deleted too
	Exclusive bool               // at most one copy: solo is to be as it was, if the unit leaves a machine that is gone

	// Revisions of the last change of what was planned from; 0: it was not there.
	PlacementSeen, EntrySeen, MoveSeen, SoloSeen, FailoverSeen int64
}

// String gives the step as one line: "place a.service on m1: it has the fewest
// units (0)".
func (s Step) String() string {
	var b strings.Builder
	b.WriteString(string(s.Do))
	if s.Unit != "" {
		b.WriteString(" " + s.Unit)
	}
	if s.Machine != "" {
		b.WriteString(" on " + s.Machine)
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

// pass is one run of Plan. What it places is counted as if it were there, and
// undone at its end: the store has the word.
type pass struct {
	*Cluster
	scorer scorer
	now    time.Time
	next   time.Time // when something is due; zero: nothing
	steps  []Step
	again  []*unitState // whose peer was placed
	held   map[*machine]struct{}
	failed map[string]string // signatures that no machine takes, and why
	undo   []was
	serial uint64 // of this pass
}

// was is what a unit was before this pass.
type was struct {
	u       *unitState
	at      *machine
	leaving bool
}

// Plan returns what has to be done about whatever has changed since it was
// called last, and when it wants to be called again even if nothing changes;
// zero if it does not. A step that could not be written is to be told by Retry.
// No unit has more than one step.
func (c *Cluster) Plan(now time.Time) (steps []Step, next time.Time) {
	p := c.newPass()
	p.now, p.failed = now, map[string]string{}
	p.held, p.scorer = map[*machine]struct{}{}, scorer{c: c, values: map[string]map[string]struct{}{}}
	for m := range c.stale {
		c.refreshGlobals(m)
	}
	clear(c.stale)
	p.brake()
	p.backOff()
	p.wake()
	p.keepPlaces()
	queue := ranked(c.dirty)
	clear(c.dirty)
	if len(queue) > 1000 { // most likely each has a step
		p.steps = slices.Grow(p.steps, len(queue))
		p.undo = make([]was, 0, len(queue))
	}
	for len(queue) > 0 {
		for _, u := range queue {
			if u.stepped != p.serial {
				p.decide(u)
			}
		}
		again := map[*unitState]struct{}{}
		for _, u := range p.again {
			if u.stepped != p.serial {
				again[u] = struct{}{}
			}
		}
		queue, p.again = ranked(again), nil
	}
	p.restore()
	return p.steps, p.next
}

func (c *Cluster) newPass() *pass {
	c.passes++
	return &pass{Cluster: c, serial: c.passes}
}

// ranked sorts units into the order in which they get their place: those with
// the fewest choices first, and units behind the peers that they must be with.
func ranked(units map[*unitState]struct{}) []*unitState {
	type ranking struct {
		u    *unitState
		rank int
	}
	all := make([]ranking, 0, len(units))
	for u := range units {
		all = append(all, ranking{u, u.rank()})
	}
	slices.SortFunc(all, func(a, b ranking) int {
		return cmp.Or(cmp.Compare(a.rank, b.rank), strings.Compare(a.u.name, b.u.name))
	})
	sorted := make([]*unitState, len(all))
	for i, r := range all {
		sorted[i] = r.u
	}
	return sorted
}

func (u *unitState) rank() int {
	switch {
	case len(u.req.MachineOf) > 0:
		return 3
	case len(u.replace) > 0 || u.req.MachineID != "" || u.moveMod != 0:
		return 0
	case u.class.key != "" || u.social() || u.reserves():
		return 1
	}
	return 2
}

func (p *pass) due(t time.Time) {
	if p.next.IsZero() || t.Before(p.next) {
		p.next = t
	}
}

// wake touches the waiting units that one of the machines takes that may take
// more than before.
func (p *pass) wake() {
	for m := range p.better {
		if !m.open {
			continue
		}
		for _, w := range p.waiting {
			for u := range w.units { // one speaks for all
				if u.class.has(m) && p.refuse(u, m).kind == fits {
					p.touchAll(w.units)
				}
				break
			}
		}
	}
	clear(p.better)
}

// keepPlaces counts units that are to move on the machine they move to, so that
// nobody takes the place while they stop.
func (p *pass) keepPlaces() {
	var all []*unitState
	for u := range p.moving {
		all = append(all, u)
	}
	slices.SortFunc(all, byName)
	for _, u := range all {
		m := p.machines[u.move.To]
		if m == nil || u.at == m || !u.placeable() || p.refuse(u, m).kind != fits {
			continue
		}
		if v := p.rival(u, func(*unitState) bool { return true }); v == nil || u.at != nil {
			p.keep(u, m)
		}
	}
}

// placeable reports whether the unit is one that can be placed.
func (u *unitState) placeable() bool {
	return u.wanted() && u.bad == "" && !u.req.Global && len(u.frozen) == 0
}

func (p *pass) mark(u *unitState) {
	if u.marked != p.serial {
		u.marked = p.serial
		p.undo = append(p.undo, was{u, u.at, u.leaving})
	}
}

// keep counts the unit on a second machine.
func (p *pass) keep(u *unitState, m *machine) {
	p.mark(u)
	u.going = m
	p.add(m, u)
}

// put counts the unit on the machine.
func (p *pass) put(u *unitState, m *machine) {
	p.mark(u)
	if u.at != nil {
		p.remove(u.at, u)
	}
	if u.going != m {
		p.add(m, u)
	}
	u.at, u.going = m, nil
}

func (p *pass) restore() {
	for _, w := range slices.Backward(p.undo) {
		u := w.u
		if u.going != nil {
			p.remove(u.going, u)
			u.going = nil
		}
		if u.at != w.at {
			if u.at != nil {
				p.remove(u.at, u)
			}
			if u.at = w.at; u.at != nil {
				p.add(u.at, u)
			}
		}
		u.leaving = w.leaving
	}
}

func (p *pass) emit(u *unitState, s Step) {
	s.Unit = u.name
	s.PlacementSeen, s.MoveSeen, s.SoloSeen, s.Exclusive = u.placementMod, u.moveMod, p.soloMod, u.req.Exclusive
	p.steps = append(p.steps, s)
	u.stepped = p.serial
}

// decide emits the step that the unit needs, if any.
func (p *pass) decide(u *unitState) {
	p.unwait(u)
	if len(u.frozen) > 0 {
		return
	}
	for _, e := range u.entries {
		if e.machine != registry.Global && (u.at == nil || e.machine != u.at.id) {
			p.emit(u, Step{Do: Clean, Machine: e.machine, EntrySeen: e.mod, Reason: "the unit is not placed there"})
			return
		}
	}
	switch {
	case u.at != nil && u.at.present:
		p.placed(u, u.at)
	case u.at != nil:
		p.lost(u, u.at)
	case u.wanted() && u.req.Global:
		p.global(u)
	case u.wanted():
		p.homeless(u)
	default:
		p.tidy(u, u.idle())
	}
	if u.stepped != p.serial && (!u.wanted() || !u.req.Global) {
		if e := u.entryOf(registry.Global); e != nil && (u.bad == "" || !u.wanted()) {
			reason := u.idle()
			if reason == "" {
				reason = "it is no global unit any more"
			}
			p.emit(u, Step{Do: EndGlobal, EntrySeen: e.mod, Reason: reason})
		}
	}
}

// idle returns why a unit is to be nowhere, "" if it is not.
func (u *unitState) idle() string {
	switch {
	case !u.known:
		return "it was destroyed"
	case !u.wanted():
		return "its desired state is inactive"
	}
	return ""
}

// tidy deletes what is said of a unit that is neither placed nor to be placed.
func (p *pass) tidy(u *unitState, reason string) {
	switch {
	case u.unplacedMod != 0:
		p.emit(u, Step{Do: Clear, EndMove: u.moveMod != 0, Reason: reason})
	case u.moveMod != 0:
		p.emit(u, Step{Do: EndMove, EndMove: true, Reason: reason})
	}
}

// global sees to a unit that is to run on every machine.
func (p *pass) global(u *unitState) {
	e := u.entryOf(registry.Global)
	if u.bad != "" {
		return
	}
	want := registry.Entry{V: registry.Version, Text: u.want.Text, Desired: u.want.Desired, Restarts: u.want.Restarts, Epoch: u.created}
	if reason := differs(e, want); reason != "" {
		p.emit(u, Step{Do: PutGlobal, Entry: want, Reason: reason})
		return
	}
	p.tidy(u, "it is a global unit")
}

// differs returns in what an entry is not as it should be, "" if it is.
func differs(e *entry, want registry.Entry) string {
	switch {
	case e == nil && want.Generation == 0:
		return fmt.Sprintf("it shall be %s on every machine that it fits", want.Desired)
	case e == nil:
		return "its entry is missing"
	case e.Text != want.Text:
		return "its unit file has changed"
	case e.Desired != want.Desired:
		return fmt.Sprintf("its desired state is %s now", want.Desired)
	case e.Restarts != want.Restarts:
		return "somebody asked for a restart"
	case e.Release != want.Release:
		return "it need not leave any more"
	case e.Entry != want:
		return "its entry is not that of its placement"
	}
	return ""
}

// placed sees to a unit on a machine that is there.
func (p *pass) placed(u *unitState, m *machine) {
	e := u.entryOf(m.id)
	if reason := p.leave(u, m, e); reason != "" {
		p.mark(u)
		u.leaving = true
		if e != nil && e.Release != "" {
			return // it is leaving, for this reason or for one before
		}
		s := Step{Do: Release, Machine: m.id, Reason: reason}
		if e != nil {
			s.Entry = e.Entry
		} else {
			s.Entry = registry.Entry{V: registry.Version, Text: u.want.Text, Desired: registry.Loaded, Generation: u.placement.Generation, Epoch: u.placement.Epoch}
		}
		s.Entry.Release = reason
		p.emit(u, s)
		return
	}
	if u.moveMod != 0 {
		p.emit(u, Step{Do: EndMove, EndMove: true, Machine: u.move.To, Reason: p.moveEnd(u)})
		return
	}
	want := registry.Entry{V: registry.Version, Text: u.want.Text, Desired: u.want.Desired, Restarts: u.want.Restarts,
		Generation: u.placement.Generation, Epoch: u.placement.Epoch}
	if u.bad != "" {
		if e == nil {
			return
		}
		want.Text = e.Text
	}
	if m.generation != u.placement.Generation {
		s := Step{Do: Refresh, Machine: m.id, Reason: "the machine has come back", Clear: u.unplacedMod != 0}
		want.Generation, want.Epoch = m.generation, p.revision
		s.Entry = want
		s.Placement = registry.Placement{V: registry.Version, Machine: m.id, Generation: m.generation, Epoch: p.revision, Reason: u.placement.Reason}
		if s.Placement.Reason == "" {
			s.Placement.Reason = s.Reason
		}
		p.emit(u, s)
		return
	}
	if reason := differs(e, want); reason != "" {
		p.emit(u, Step{Do: Update, Machine: m.id, Entry: want, Reason: reason})
		return
	}
	p.tidy(u, "it is on "+m.id)
}

// leave returns why the unit must leave the machine, "" if it may stay.
func (p *pass) leave(u *unitState, m *machine, e *entry) string {
	if reason := u.idle(); reason != "" {
		return reason
	}
	if u.bad != "" {
		return ""
	}
	if u.req.Global {
		return "it is to run on every machine now"
	}
	if r := p.evict(u, m); r.kind != fits {
		return p.say(r, u, m)
	}
	if u.going != nil {
		return "it moves to " + u.going.id + ": " + u.moveReason()
	}
	t, found := m.troubles[u.name]
	if inTrouble := found && t.epoch == u.placement.Epoch; inTrouble {
		p.exclude(u, m, t)
	} else if x := u.excluded[m.id]; x == nil || !x.active || e == nil || e.Release == "" {
		return ""
	} else {
		t.text = x.reason
	}
	other, _ := p.scorer.pick(u)
	if other == nil {
		p.wait(u)
		return ""
	}
	p.keep(u, other)
	return "it is in trouble there: " + t.text
}

func (u *unitState) moveReason() string {
	if u.move.Reason != "" {
		return u.move.Reason
	}
	return "somebody asked for it"
}

// moveEnd says what became of a move of a unit that stays.
func (p *pass) moveEnd(u *unitState) string {
	m := p.machines[u.move.To]
	switch {
	case m == nil:
		return "it cannot move: there is no such machine"
	case m == u.at:
		return "it is there"
	case u.bad != "":
		return "it cannot move: " + u.bad
	}
	r := p.refuse(u, m)
	if v := p.rival(u, func(*unitState) bool { return true }); v != nil && r.kind == fits {
		r = refusal{rival, v.name}
	}
	return "it cannot move: " + cmp.Or(p.say(r, u, m), "the place was taken meanwhile")
}

// lost sees to a unit on a machine that is gone.
func (p *pass) lost(u *unitState, m *machine) {
	if u.req.Exclusive && (p.solo.Machine == m.id || p.solo.Machine == anyMachine) {
		why := fmt.Sprintf("machine %s is gone and was the only one: the unit may still run there, and there is to be one at most", m.id)
		if reason := u.idle(); reason != "" {
			p.tidy(u, reason)
		} else if u.unplaced != why || u.moveMod != 0 {
			p.emit(u, Step{Do: Explain, EndMove: u.moveMod != 0, Reason: why})
		}
		return
	}
	reason := u.idle()
	if reason == "" && u.req.Global && u.bad == "" {
		reason = "it is to run on every machine now"
	}
	if reason != "" {
		p.emit(u, Step{Do: Forget, Machine: m.id, Clear: u.unplacedMod != 0, Reason: "the machine is gone, and " + reason})
		return
	}
	if u.bad != "" {
		return
	}
	if u.going != nil {
		p.place(u, u.going, "it moves there: "+u.moveReason())
		return
	}
	if u.moveMod != 0 {
		p.emit(u, Step{Do: EndMove, EndMove: true, Machine: u.move.To, Reason: p.moveEnd(u)})
		return
	}
	if _, held := p.held[m]; held {
		return
	}
	if to, why := p.scorer.pick(u); to != nil {
		p.place(u, to, fmt.Sprintf("machine %s is gone; %s", m.id, why))
		return
	}
	// Its placement stands: if the machine comes back the unit need not even
	// be restarted.
	p.nowhere(u, fmt.Sprintf("machine %s is gone; %s", m.id, p.summary(u)))
}

// homeless sees to a unit that is to be somewhere and is nowhere.
func (p *pass) homeless(u *unitState) {
	if u.bad != "" {
		if u.unplaced != u.bad {
			p.emit(u, Step{Do: Explain, EndMove: u.moveMod != 0, Reason: u.bad})
		}
		return
	}
	if u.going != nil {
		p.place(u, u.going, "it moves there: "+u.moveReason())
		return
	}
	signature := ""
	if len(p.failed) > 0 {
		signature = p.signature(u)
		if why, failed := p.failed[signature]; failed {
			p.nowhere(u, why)
			return
		}
	}
	if m, why := p.scorer.pick(u); m != nil {
		if u.moveMod != 0 {
			why += "; " + p.moveEnd(u)
		}
		p.place(u, m, why)
		return
	}
	why := p.summary(u)
	if signature = p.signature(u); !strings.HasPrefix(signature, "=") {
		p.failed[signature] = why
	}
	p.nowhere(u, why)
}

func (p *pass) nowhere(u *unitState, why string) {
	p.wait(u)
	if u.unplaced != why || u.moveMod != 0 {
		p.emit(u, Step{Do: Explain, EndMove: u.moveMod != 0, Reason: why})
	}
}

// place puts the unit on a machine.
func (p *pass) place(u *unitState, m *machine, reason string) {
	s := Step{Do: Place, Machine: m.id, Reason: reason, EndMove: u.moveMod != 0, Clear: u.unplacedMod != 0}
	if u.at != nil {
		s.From = u.at.id
	}
	s.Placement = registry.Placement{V: registry.Version, Machine: m.id, Generation: m.generation, Epoch: p.revision, Reason: reason}
	s.Entry = registry.Entry{V: registry.Version, Text: u.want.Text, Desired: u.want.Desired, Restarts: u.want.Restarts,
		Generation: m.generation, Epoch: p.revision}
	p.emit(u, s)
	p.put(u, m)
	for f := range p.followers[u.name] {
		p.again = append(p.again, f)
	}
}
