package engine

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"time"

	"flotilla/internal/state"
	"flotilla/internal/text"
)

// This file is what keeps a plan from being rash: units stay away for a while
// from nodes on which they were in trouble, and when many nodes go at once their
// units wait.

// Limits of back-off and brake.
const (
	firstBackOff = time.Minute // doubled with each trouble of the unit on the node
	lastBackOff  = time.Hour
	massWindow   = 5 * time.Minute  // in which nodes go together
	holdTime     = 10 * time.Minute // until what is held goes on by itself
)

// Memory is what one plan tells the next beside what is in the store. Nothing
// ever changes a Memory: Plan and Saw return another one. The zero Memory is that
// of a new leader, who knows nothing.
type Memory struct {
	gone    map[string]time.Time // when nodes with units went, by node
	idle    map[string]bool      // nodes that reported last that nothing runs there
	backOff map[unitOnNode]backOff
}

// Saw returns the memory after a snapshot that may not be planned from: a node
// that stops reports that nothing runs on it any more just before it goes, and a
// snapshot in which it is gone does not show that.
func (m Memory) Saw(s *state.Snapshot) Memory {
	shared := true
	for id, n := range s.Nodes {
		if !n.Units.Usable() || m.idle[id] == (len(n.Units.Value.Units) == 0) {
			continue
		}
		if shared {
			shared, m.idle = false, maps.Clone(m.idle)
			if m.idle == nil {
				m.idle = map[string]bool{}
			}
		}
		m.idle[id] = !m.idle[id]
	}
	return m
}

// clone returns a memory whose maps the caller may change.
func (m Memory) clone() Memory {
	own := Memory{maps.Clone(m.gone), maps.Clone(m.idle), maps.Clone(m.backOff)}
	if own.gone == nil {
		own.gone = map[string]time.Time{}
	}
	if own.backOff == nil {
		own.backOff = map[unitOnNode]backOff{}
	}
	return own
}

// expireBackOff forgets back-offs that have been over for so long that the unit
// may be taken for well, and those of units that are no more.
func (p *pass) expireBackOff() {
	for key, b := range p.memory.backOff {
		switch {
		case p.snapshot.Units[key.unit] == nil || !p.now.Before(b.until.Add(lastBackOff)):
			delete(p.memory.backOff, key)
		case p.now.Before(b.until):
			p.due(b.until)
		}
	}
}

// startBackOff keeps the unit away from the node for a while, once for each
// placement there.
func (p *pass) startBackOff(u *unitPlan, n *nodePlan, t trouble) {
	key := unitOnNode{u.Name, n.ID}
	b, again := p.memory.backOff[key]
	switch {
	case !again:
		b.delay = firstBackOff
	case b.epoch == t.epoch:
		return
	default:
		b.delay = min(2*b.delay, lastBackOff)
	}
	b.epoch, b.until, b.reason = t.epoch, p.now.Add(b.delay), t.text
	p.memory.backOff[key] = b
	u.backsOff = true
	p.due(b.until)
}

// brake finds out whether so many nodes are gone at once that something else than
// their death is likely, and holds what would be moved from them.
func (p *pass) brake() {
	f := p.snapshot.Failover
	lost := p.lostNodes()
	if f.Problem != "" { // somebody has decided something: nothing is moved until it can be read
		for _, n := range lost {
			n.held = true
		}
		return
	}
	recent := p.rememberGone(lost)
	switch {
	case f.Value.Allowed && f.Value.Until == 0:
		p.failover(Allow, "somebody allowed it", state.Failover{Allowed: true, Until: p.now.Add(holdTime).Unix()})
	case f.Value.Allowed && !p.now.Before(time.Unix(f.Value.Until, 0)):
		p.failover(EndHold, "what was held has had its time to move", state.Failover{})
	case f.Value.Allowed:
		p.due(time.Unix(f.Value.Until, 0))
	default:
		p.hold(lost, recent)
	}
}

// hold holds the units of nodes that are gone: those that are held already and,
// if more than a third of the nodes went recently, all of these.
func (p *pass) hold(lost []*nodePlan, recent int) {
	f := p.snapshot.Failover
	end := p.now.Add(holdTime)
	if f.Exists() {
		end = time.Unix(f.Value.Until, 0)
	}
	many := recent >= 2 && 3*recent > p.running+recent
	var held []string
	added := false
	for _, n := range lost {
		already := slices.Contains(f.Value.Held, n.ID)
		if already || many && p.isRecent(p.memory.gone[n.ID]) {
			n.held = true
			held = append(held, n.ID)
			added = added || !already
		}
	}
	switch {
	case len(held) == 0 && f.Exists():
		p.failover(EndHold, "no node is gone any more whose units wait", state.Failover{})
	case len(held) == 0:
	case !p.now.Before(end):
		p.failover(Allow, "it was held for long enough", state.Failover{Allowed: true, Until: p.now.Add(holdTime).Unix()})
	case added:
		reason := fmt.Sprintf("%d of %s went within %s: their units wait until they are back, somebody allows it, or the time is over",
			recent, text.Count(p.running+recent, "node"), massWindow)
		p.failover(Hold, reason, state.Failover{Held: held, Until: end.Unix()})
	default:
		p.due(end)
	}
}

// failover emits a step about the failover.
func (p *pass) failover(do Action, reason string, value state.Failover) {
	value.V = state.Version
	p.steps = append(p.steps, Step{Do: do, Reason: reason, Failover: value, failover: p.snapshot.Failover})
}

func (p *pass) isRecent(t time.Time) bool { return p.now.Sub(t) <= massWindow }

// rememberGone notes since when nodes are lost, forgets those that are back or of
// no interest any more, and returns how many went recently.
func (p *pass) rememberGone(lost []*nodePlan) (recent int) {
	gone := p.memory.gone
	for _, n := range lost {
		if _, known := gone[n.ID]; !known {
			gone[n.ID] = p.now
		}
	}
	for id, since := range gone {
		n := p.nodes[id]
		switch {
		case n != nil && n.present, !p.isRecent(since) && !slices.Contains(lost, n):
			delete(gone, id)
		case p.isRecent(since):
			recent++
		}
	}
	for id := range p.memory.idle {
		if p.nodes[id] == nil {
			delete(p.memory.idle, id)
		}
	}
	return recent
}

// lostNodes returns the nodes that are gone and have units about which nothing is
// decided, by ID. A node that had stopped all its units before it went has left
// in order, and is not among them.
func (p *pass) lostNodes() []*nodePlan {
	var lost []*nodePlan
	for _, n := range p.nodes {
		undecided := func(u *unitPlan) bool { return u.placeable() && !u.Unplaced.Exists() }
		if !n.present && !p.memory.idle[n.ID] && slices.ContainsFunc(n.placed, undecided) {
			lost = append(lost, n)
		}
	}
	slices.SortFunc(lost, func(a, b *nodePlan) int { return cmp.Compare(a.ID, b.ID) })
	return lost
}

// heldUntil says until when the units of a node wait because of the brake, as the
// records have it; the zero time if they do not.
func (p *pass) heldUntil(n *nodePlan) time.Time {
	f := p.snapshot.Failover.Value
	if n.present || f.Allowed || !slices.Contains(f.Held, n.ID) {
		return time.Time{}
	}
	return time.Unix(f.Until, 0)
}

// backOff is why, and how long, a unit stays away from a node on which it was in
// trouble.
type backOff struct {
	until  time.Time
	delay  time.Duration
	epoch  int64 // of the placement that was in trouble
	reason string
}

type unitOnNode struct{ unit, node string }

// backOff returns why the unit stays away from the node, nil if it does not.
func (p *pass) backOff(u *unitPlan, n *nodePlan) *backOff {
	if !u.backsOff {
		return nil
	}
	if b, found := p.memory.backOff[unitOnNode{u.Name, n.ID}]; found && p.now.Before(b.until) {
		return &b
	}
	return nil
}
