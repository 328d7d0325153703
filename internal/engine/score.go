package engine

import (
	"fmt"
	"slices"
	"strconv"
	"strings"

	"flotilla/internal/state"
	"flotilla/internal/text"
)

// score is how well a node suits a unit; less is better, from the first field to
// the last, and then the node's ID decides.
type score struct {
	instances int   // of the unit's template that are on the node
	shared    []int // for each key of SpreadOver: instances on nodes with the same value
	load      int
}

// better reports whether a is better than b, load left aside.
func (a score) better(b score) bool {
	if a.instances != b.instances {
		return a.instances < b.instances
	}
	return slices.Compare(a.shared, b.shared) < 0
}

// score returns how well the node suits the unit. The slice of the result is
// that of into, which the caller reuses.
func (p *pass) score(u *unitPlan, n *nodePlan, into []int) score {
	s := score{load: n.load, shared: into[:0]}
	if g := p.groupOf(u); g != nil {
		s.instances = g.on[n]
		for _, key := range u.Requirements.SpreadOver {
			s.shared = append(s.shared, g.over[key][n.Metadata[key]])
		}
	}
	return s
}

// best returns a score that no open node can beat, load left aside.
func (p *pass) best(u *unitPlan) score {
	g := p.groupOf(u)
	if g == nil {
		return score{}
	}
	b := score{instances: g.least()}
	for _, key := range u.Requirements.SpreadOver {
		least := -1
		for value := range p.values(key) {
			if n := g.over[key][value]; least < 0 || n < least {
				least = n
			}
		}
		b.shared = append(b.shared, max(0, least))
	}
	return b
}

// values returns the values that open nodes have for a key of their metadata.
func (p *pass) values(key string) map[string]bool {
	if p.spread[key] == nil {
		p.spread[key] = map[string]bool{}
		for _, n := range p.order {
			p.spread[key][n.Metadata[key]] = true
		}
	}
	return p.spread[key]
}

// pick returns the node that suits the unit best of those that take it, nil if
// none does, and why that one.
func (p *pass) pick(u *unitPlan) (*nodePlan, string) {
	c := p.classOf(u)
	if c.count == 0 || p.rival(u, anyUnit) != nil {
		return nil, ""
	}
	candidates, reason := p.order, ""
	switch {
	case len(u.Requirements.MachineOf) > 0:
		at, with, known := p.peersNode(u)
		if !known {
			return nil, ""
		}
		if at != nil {
			candidates, reason = []*nodePlan{at}, "with "+with
		}
	case c.count == 1:
		reason = "the only node that it is for"
	}
	best := p.best(u)
	var found *nodePlan
	var has score
	var tried, kept []int
	for _, n := range candidates {
		if n == u.at || !c.has[n.index] || p.refuse(u, n).kind != fits {
			continue
		}
		s := p.score(u, n, tried)
		tried = s.shared
		if found == nil || s.better(has) {
			kept = append(kept[:0], s.shared...)
			found, has = n, score{s.instances, kept, s.load}
			if !best.better(has) {
				break
			}
		}
	}
	if found == nil {
		return nil, ""
	}
	if reason == "" {
		reason = "it has the " + p.praise(u, found, has)
	}
	return found, reason
}

// peersNode returns the node of the units that u must be with, and which of them
// has it: nil if all of them are global, and not known if one is nowhere.
func (p *pass) peersNode(u *unitPlan) (at *nodePlan, with string, known bool) {
	for _, name := range u.Requirements.MachineOf {
		switch v := p.named[name]; {
		case v == nil, !v.global && v.at == nil:
			return nil, "", false
		case !v.global:
			return v.at, name, true
		}
	}
	return nil, "", true
}

// praise says in words what counted for a node.
func (p *pass) praise(u *unitPlan, n *nodePlan, s score) string {
	load := "fewest units (" + strconv.Itoa(s.load) + ")"
	g := p.groupOf(u)
	if g == nil {
		return load
	}
	numbers := append([]string{strconv.Itoa(s.instances)}, s.nearby(u, n)...)
	return fmt.Sprintf("fewest instances of %s (%s) and the %s", g.template, strings.Join(numbers, ", "), load)
}

// measures gives the numbers of a score.
func (p *pass) measures(u *unitPlan, n *nodePlan, s score) string {
	units := text.Count(s.load, "unit")
	g := p.groupOf(u)
	if g == nil {
		return units
	}
	numbers := append([]string{text.Count(s.instances, "instance") + " of " + g.template}, s.nearby(u, n)...)
	return strings.Join(append(numbers, units), ", ")
}

// nearby gives the numbers of instances on nodes with the same metadata.
func (s score) nearby(u *unitPlan, n *nodePlan) (numbers []string) {
	for i, key := range u.Requirements.SpreadOver {
		if value := n.Metadata[key]; value != "" {
			numbers = append(numbers, fmt.Sprintf("%d with %s=%s", s.shared[i], key, value))
		}
	}
	return numbers
}

// group is the instances of one template that are to be spread, and where they
// are.
type group struct {
	template string
	on       map[*nodePlan]int
	nodes    []int                     // [i]: how many open nodes have i of them
	over     map[string]map[string]int // by metadata key and value: how many are on nodes with it
}

// groupOf returns the group of a unit, nil if it is not spread. The first call
// makes the groups of all units, which most plans do not need.
func (p *pass) groupOf(u *unitPlan) *group {
	if p.groups == nil {
		p.makeGroups()
	}
	return u.group
}

func (p *pass) makeGroups() {
	p.groups = map[string]*group{}
	for _, u := range p.units {
		u.group = p.join(u.Unit)
	}
	// All keys of over are known only when all instances are.
	joined := make([]*group, len(p.quiet))
	for i, q := range p.quiet {
		joined[i] = p.join(q.Unit)
	}
	for i, q := range p.quiet {
		if joined[i] != nil {
			joined[i].count(q.at, 1)
		}
	}
	for _, u := range p.units {
		for _, n := range []*nodePlan{u.at, u.goingTo} {
			if u.group != nil && n != nil {
				u.group.count(n, 1)
			}
		}
	}
}

// join returns the group of a unit, nil if it is not spread.
func (p *pass) join(u *state.Unit) *group {
	r := u.Requirements
	if !r.Spread || r.Global {
		return nil
	}
	template := templateOf(u.Name)
	if template == "" {
		return nil
	}
	g := p.groups[template]
	if g == nil {
		g = &group{template: template, on: map[*nodePlan]int{}, nodes: []int{len(p.order)}, over: map[string]map[string]int{}}
		p.groups[template] = g
	}
	for _, key := range r.SpreadOver {
		if g.over[key] == nil {
			g.over[key] = map[string]int{}
		}
	}
	return g
}

// count adds instances on a node, or takes them away.
func (g *group) count(n *nodePlan, by int) {
	if !n.present {
		return
	}
	was := g.on[n]
	g.on[n] = was + by
	if n.open {
		for len(g.nodes) <= was+by {
			g.nodes = append(g.nodes, 0)
		}
		g.nodes[was]--
		g.nodes[was+by]++
	}
	for key, values := range g.over {
		values[n.Metadata[key]] += by
	}
}

// least returns the lowest number of instances on any open node.
func (g *group) least() int {
	return max(0, slices.IndexFunc(g.nodes, func(nodes int) bool { return nodes > 0 }))
}
