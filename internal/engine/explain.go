package engine

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"
)

// Verdict is what one machine is to one unit.
type Verdict struct {
	Machine string // its ID
	Node    string
	Verdict string // here, eligible or refused
	Reason  string // why it is here, or why it is refused; for here also why it is to leave
	Score   string // eligible: what it is measured by, best first
}

// What a Verdict may be.
const (
	Here     = "here"
	Eligible = "eligible"
	Refused  = "refused"
)

// Explain says of every machine what it is to the unit: the one it is on, one
// that would take it, or one that would not. The eligible ones are in the order
// in which they would be chosen, behind the one it is on. It is nil if there is
// no such unit.
func (c *Cluster) Explain(name string) []Verdict {
	u := c.units[name]
	if u == nil || !u.known {
		return nil
	}
	c.settle()
	type judged struct {
		Verdict
		rank  int
		score score
		m     *machine
	}
	var all []judged
	s := &scorer{c: c, values: map[string]map[string]struct{}{}}
	rivals := c.rival(u, func(*unitState) bool { return true })
	for _, m := range c.machines {
		if !m.present && u.at != m {
			continue
		}
		v := judged{Verdict: Verdict{Machine: m.id, Node: m.rec.Node, Verdict: Refused}, rank: 2, m: m}
		r := c.refuse(u, m)
		switch {
		case u.at == m:
			v.Verdict.Verdict, v.rank = Here, 0
			v.Reason = u.placement.Reason
			if c.holds(m) {
				v.Reason += "; the machine is gone, and others with it: the unit waits for it until " +
					time.Unix(c.failover.Until, 0).UTC().Format(time.DateTime) + " UTC, or until somebody allows the failover"
			} else if r := c.evict(u, m); r.kind != fits {
				v.Reason += "; it is to leave: " + c.say(r, u, m)
			} else if e := u.entryOf(m.id); e != nil && e.Release != "" {
				v.Reason += "; it is to leave: " + e.Release
			}
		case u.req.Global && slices.Contains(m.globals, u):
			v.Verdict.Verdict, v.rank, v.Reason = Here, 0, "it runs on every machine that it fits"
		case u.req.Global:
			v.Reason = cmp.Or(m.refused[u.name], u.idle(), u.bad, "it is not yet decided")
		case u.bad != "":
			v.Reason = u.bad
		case r.kind == fits && rivals != nil:
			v.Reason = c.say(refusal{rival, rivals.name}, u, m)
		case r.kind == fits:
			v.Verdict.Verdict, v.rank = Eligible, 1
			sc := s.score(u, m)
			v.score = score{sc.instances, slices.Clone(sc.shared), sc.load}
			v.Score = v.score.measures(u, m)
		default:
			v.Reason = c.say(r, u, m)
		}
		all = append(all, v)
	}
	slices.SortFunc(all, func(a, b judged) int {
		switch {
		case a.rank != b.rank:
			return a.rank - b.rank
		case a.score.better(&b.score):
			return -1
		case b.score.better(&a.score):
			return 1
		}
		return cmp.Or(cmp.Compare(a.score.load, b.score.load), strings.Compare(a.Machine, b.Machine))
	})
	verdicts := make([]Verdict, len(all))
	for i, v := range all {
		verdicts[i] = v.Verdict
	}
	return verdicts
}

// holds reports whether units of the machine wait because of the brake.
func (c *Cluster) holds(m *machine) bool {
	return !m.present && !c.failover.Allowed && slices.Contains(c.failover.Held, m.id)
}

// Summary says in one line why no machine takes the unit: "3 machines: 2
// conflict with a.service, 1 has no disk=ssd". It is "" if one does, if the unit
// is placed or global, or if there is no such unit.
func (c *Cluster) Summary(name string) string {
	u := c.units[name]
	if u == nil || !u.known || u.at != nil || u.req.Global {
		return ""
	}
	c.settle()
	if u.bad != "" {
		return u.bad
	}
	if m, _ := (&scorer{c: c, values: map[string]map[string]struct{}{}}).pick(u); m != nil {
		return ""
	}
	return c.summary(u)
}

// Refuses returns why the machine, given by its ID, cannot take the unit, and ""
// if it can: whether a move would be done.
func (c *Cluster) Refuses(name, machine string) string {
	u, m := c.units[name], c.machines[machine]
	switch {
	case u == nil || !u.known:
		return "there is no such unit"
	case m == nil:
		return "there is no such machine"
	case u.bad != "":
		return u.bad
	case u.req.Global:
		return "it is a global unit, which runs on every machine that it fits"
	case u.at == m:
		return ""
	}
	c.settle()
	return c.say(c.refuse(u, m), u, m)
}

// settle brings global units up to date, as Plan does first.
func (c *Cluster) settle() {
	for m := range c.stale {
		c.refreshGlobals(m)
	}
	clear(c.stale)
}

// measures gives the numbers of a score.
func (a *score) measures(u *unitState, m *machine) string {
	var words []string
	if u.group != nil {
		words = append(words, plural(a.instances, "instance")+" of "+u.group.template)
		for i, key := range u.req.SpreadOver {
			if value := m.metadata[key]; value != "" {
				words = append(words, fmt.Sprintf("%d with %s=%s", a.shared[i], key, value))
			}
		}
	}
	return strings.Join(append(words, plural(a.load, "unit")), ", ")
}

// Move is a unit that would better be elsewhere.
type Move struct {
	Unit, From, To string // To and From are machine IDs
	Reason         string
}

// Rebalance proposes moves that bring the numbers of units on the machines
// nearer to each other, as few as that takes: each one from a machine with at
// least two more units than the other. No move brings instances of a template
// or of a metadata value nearer together, and units that others must be with,
// or that must be with others, stay.
func (c *Cluster) Rebalance() []Move {
	c.settle()
	p := c.newPass()
	defer p.restore()
	var moves []Move
	stuck := map[*machine]bool{} // nothing of theirs can go
	for {
		var from *machine
		for _, m := range slices.Backward(c.order) { // the fullest first
			if !stuck[m] {
				from = m
				break
			}
		}
		if from == nil || from.load-c.order[0].load < 2 {
			return moves
		}
		u, to := p.relief(from)
		if u == nil {
			stuck[from] = true
			continue
		}
		moves = append(moves, Move{u.name, from.id, to.id,
			fmt.Sprintf("%s has %s and %s has %d", from.rec.Node, plural(from.load, "unit"), to.rec.Node, to.load)})
		p.put(u, to)
	}
}

// relief returns a unit of the machine that another one should have.
func (p *pass) relief(from *machine) (*unitState, *machine) {
	units := make([]*unitState, 0, len(from.units))
	for u := range from.units {
		if u.at == from && u.marked != p.serial && !u.leaving && u.moveMod == 0 && u.placeable() && len(u.req.MachineOf) == 0 && len(p.followers[u.name]) == 0 && p.rival(u, func(*unitState) bool { return true }) == nil {
			units = append(units, u)
		}
	}
	slices.SortFunc(units, byName)
	s := &scorer{c: p.Cluster}
	for _, u := range units {
		here := *s.score(u, from)
		here.shared = slices.Clone(here.shared)
		for _, m := range p.order {
			if m.load > from.load-2 {
				break
			}
			if !u.class.has(m) || p.refuse(u, m).kind != fits {
				continue
			}
			there := s.score(u, m)
			if u.group != nil { // as it is without the unit
				there.instances++
				for i, key := range u.req.SpreadOver {
					if m.metadata[key] != from.metadata[key] {
						there.shared[i]++
					}
				}
			}
			worse := there.instances > here.instances
			for i := range here.shared {
				worse = worse || there.shared[i] > here.shared[i]
			}
			if !worse {
				return u, m
			}
		}
	}
	return nil, nil
}
