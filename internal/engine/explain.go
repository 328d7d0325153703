package engine

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"

	"flotilla/internal/state"
	"flotilla/internal/text"
	"flotilla/internal/wire"
)

// What wire.Verdict.Verdict may be.
const (
	Here     = "here"
	Eligible = "eligible"
	Refused  = "refused"
)

// question is a pass in which nothing is decided. It does not know of back-offs,
// which only the leader remembers.
func question(s *state.Snapshot) *pass { return newPass(s, Memory{}.Saw(s), time.Time{}, true) }

// find returns a unit of the pass, nil if it does not exist.
func (p *pass) find(name string) *unitPlan {
	i := slices.IndexFunc(p.units, func(u *unitPlan) bool { return u.Name == name && u.Record.Exists() })
	if i < 0 {
		return nil
	}
	return p.units[i]
}

// Explain says of every node what it is to the unit: the one it is on, one that
// would take it, or one that would not. The eligible ones are in the order in
// which they would be chosen, after the one it is on. It is nil if there is no
// such unit.
func Explain(s *state.Snapshot, name string) []wire.Verdict {
	p := question(s)
	u := p.find(name)
	if u == nil {
		return nil
	}
	type judged struct {
		wire.Verdict
		rank  int
		score score
	}
	var all []judged
	for _, n := range p.nodes {
		if !n.present && u.at != n {
			continue
		}
		j := judged{Verdict: wire.Verdict{NodeID: n.ID, Node: n.Record.Value.Name}}
		j.Verdict.Verdict, j.Reason = p.judge(u, n)
		switch j.Verdict.Verdict {
		case Eligible:
			j.rank, j.score = 1, p.score(u, n, nil)
			j.Score = p.measures(u, n, j.score)
		case Refused:
			j.rank = 2
		}
		all = append(all, j)
	}
	slices.SortFunc(all, func(a, b judged) int {
		switch {
		case a.rank != b.rank:
			return a.rank - b.rank
		case a.score.better(b.score):
			return -1
		case b.score.better(a.score):
			return 1
		}
		return cmp.Or(cmp.Compare(a.score.load, b.score.load), strings.Compare(a.NodeID, b.NodeID))
	})
	verdicts := make([]wire.Verdict, len(all))
	for i, j := range all {
		verdicts[i] = j.Verdict
	}
	return verdicts
}

// judge says what one node is to a unit, and why.
func (p *pass) judge(u *unitPlan, n *nodePlan) (verdict, reason string) {
	why := p.refuse(u, n)
	other := p.rival(u, anyUnit)
	switch {
	case u.at == n:
		return Here, p.whyHere(u, n)
	case slices.Contains(n.globals, u):
		return Here, "it runs on every node that it fits"
	case u.Requirements.Global:
		return Refused, cmp.Or(n.refused[u.Name], idle(u), u.Problem, "it is not yet decided")
	case u.Problem != "":
		return Refused, u.Problem
	case why.kind != fits:
		return Refused, p.say(why, u, n)
	case other != nil:
		return Refused, p.say(refusal{rival, other.Name}, u, n)
	}
	return Eligible, ""
}

// whyHere says why a unit is on its node, and whether it is to leave.
func (p *pass) whyHere(u *unitPlan, n *nodePlan) string {
	reason := u.Placement.Value.Reason
	if until := p.heldUntil(n); !until.IsZero() {
		return reason + "; the node is gone, and others with it: the unit waits for it until " +
			until.UTC().Format(time.DateTime) + " UTC, or until somebody allows the failover"
	}
	if why := p.evict(u, n); why.kind != fits {
		return reason + "; it is to leave: " + p.say(why, u, n)
	}
	if leave := u.Placement.Value.Leave; leave != "" {
		return reason + "; it is to leave: " + leave
	}
	return reason
}

// Summary says in one line why no node takes the unit: "3 nodes: 2 conflict with
// a.service, 1 has no disk=ssd". It is "" if one does, if the unit is placed or
// global, or if there is no such unit.
func Summary(s *state.Snapshot, name string) string {
	p := question(s)
	u := p.find(name)
	switch {
	case u == nil || u.at != nil || u.Requirements.Global:
		return ""
	case u.Problem != "":
		return u.Problem
	}
	if n, _ := p.pick(u); n != nil {
		return ""
	}
	return p.summary(u)
}

// Refuses returns why the node, given by its ID, cannot take the unit, and "" if
// it can: whether a move would be done.
func Refuses(s *state.Snapshot, name, node string) string {
	p := question(s)
	u, n := p.find(name), p.nodes[node]
	switch {
	case u == nil:
		return "there is no such unit"
	case n == nil:
		return "there is no such node"
	case u.Problem != "":
		return u.Problem
	case u.Requirements.Global:
		return "it is a global unit, which runs on every node that it fits"
	case u.at == n:
		return ""
	}
	return p.say(p.refuse(u, n), u, n)
}

// Rebalance proposes moves that bring the numbers of units on the nodes nearer to
// each other, as few as that takes: each one from a node with at least two more
// units than the other. No move brings instances of a template or of a metadata
// value nearer together, and units that others must be with, or that must be with
// others, stay.
func Rebalance(s *state.Snapshot) []wire.Move {
	p := question(s)
	var moves []wire.Move
	moved := map[*unitPlan]bool{}
	stuck := map[*nodePlan]bool{} // none of their units can go
	for {
		var from *nodePlan
		for _, n := range slices.Backward(p.order) { // the fullest first
			if !stuck[n] {
				from = n
				break
			}
		}
		if from == nil || from.load-p.order[0].load < 2 {
			return moves
		}
		u, to := p.relief(from, moved)
		if u == nil {
			stuck[from] = true
			continue
		}
		moves = append(moves, wire.Move{Unit: u.Name, From: from.ID, To: to.ID,
			Reason: fmt.Sprintf("%s has %s and %s has %d", from.Name(), text.Count(from.load, "unit"), to.Name(), to.load)})
		moved[u] = true
		p.put(u, to)
	}
}

// relief returns a unit of the node that another one should have, and which.
func (p *pass) relief(from *nodePlan, moved map[*unitPlan]bool) (*unitPlan, *nodePlan) {
	for _, u := range slices.SortedFunc(slices.Values(from.placed), byName) {
		free := u.placeable() && len(u.Requirements.MachineOf) == 0 && len(p.followers[u.Name]) == 0
		if !free || moved[u] || u.leaving || u.Move.Exists() || p.rival(u, anyUnit) != nil {
			continue
		}
		here := p.score(u, from, nil)
		for _, to := range p.order {
			if to.load > from.load-2 {
				break
			}
			if p.refuse(u, to).kind == fits && !p.closer(u, from, to, here) {
				return u, to
			}
		}
	}
	return nil, nil
}

// closer reports whether the unit would have more instances of its template near
// it on the other node than it has where it is.
func (p *pass) closer(u *unitPlan, from, to *nodePlan, here score) bool {
	if p.groupOf(u) == nil {
		return false
	}
	there := p.score(u, to, nil)
	if there.instances+1 > here.instances { // here the unit itself is counted
		return true
	}
	for i, key := range u.Requirements.SpreadOver {
		if to.Metadata[key] != from.Metadata[key] {
			there.shared[i]++
		}
		if there.shared[i] > here.shared[i] {
			return true
		}
	}
	return false
}
