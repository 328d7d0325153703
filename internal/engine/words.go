package engine

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"

	"flotilla/internal/text"
)

// say puts a refusal in words about one node: "it conflicts with a.service there".
func (p *pass) say(why refusal, u *unitPlan, n *nodePlan) string {
	because := func(s string) string {
		if why.other != "" {
			return s + ": " + why.other
		}
		return s
	}
	want := u.Requirements
	switch why.kind {
	case mismatch:
		return want.Mismatch(n.ID, n.Metadata)
	case peer:
		return "it has to be with " + p.whereabouts(why.other)
	case conflict:
		return "it conflicts with " + why.other + " there"
	case replaced:
		return why.other + " there replaces it"
	case rival:
		return "it and " + why.other + " replace each other, and " + why.other + " was placed first"
	case entangled:
		return "it replaces " + why.other + " there, which would make it leave in turn"
	case notThere:
		return "the node is gone"
	case unreadable:
		return "the node's records cannot be read by this version: upgrade it"
	case noUnits:
		return "the node runs no units"
	case draining:
		return because("the node is drained")
	case cordoned:
		return because("the node is cordoned")
	case backingOff:
		return because("it was in trouble there")
	case noMemory:
		return fmt.Sprintf("%d bytes of memory are free of %d, and it reserves %d", max(0, n.free().memory), n.Record.Value.Memory, want.Memory)
	case noCPU:
		return fmt.Sprintf("%d thousandths of a core are free of %d, and it reserves %d", max(0, n.free().cpu), n.Record.Value.CPU, want.CPU)
	case noCounter:
		free := n.free()
		return fmt.Sprintf("%d of %d %s are free, and it reserves %d", max(0, free.counter(why.other)), n.Record.Value.Counters[why.other], why.other, want.Counters[why.other])
	}
	return ""
}

// whereabouts names a unit that another one must be with, and says where it is.
func (p *pass) whereabouts(name string) string {
	v := p.named[name]
	switch {
	case v == nil || !v.Record.Exists():
		return name + ", which does not exist"
	case !v.Wanted():
		return name + ", which is inactive"
	case v.global:
		return name + ", which does not run there"
	case v.at == nil:
		return name + ", which is nowhere"
	case v.leaving:
		return name + ", which is leaving " + v.at.ID
	}
	return name + ", which is on " + v.at.ID
}

// tally puts a refusal in words about one or many nodes, without their number:
// "conflicts with a.service", "conflict with a.service".
func (p *pass) tally(why refusal, u *unitPlan, n *nodePlan) (one, many string) {
	both := func(one, many, rest string) (string, string) { return one + " " + rest, many + " " + rest }
	switch why.kind {
	case mismatch:
		r := u.Requirements
		if r.MachineID != "" && r.MachineID != n.ID && (len(n.ID) < 8 || r.MachineID != n.ID[:8]) {
			return both("is", "are", "not node "+r.MachineID)
		}
		for _, key := range slices.Sorted(maps.Keys(r.Metadata)) {
			if values := r.Metadata[key]; !slices.Contains(values, n.Metadata[key]) {
				return both("has", "have", "no "+key+"="+strings.Join(values, " or "))
			}
		}
		for _, e := range r.Where {
			if !e.Match(n.Metadata) {
				return both("is", "are", "not where "+e.String())
			}
		}
	case peer:
		return both("is", "are", "not with "+p.whereabouts(why.other))
	case conflict:
		return both("conflicts", "conflict", "with "+why.other)
	case replaced:
		return both("has", "have", why.other+", which replaces it")
	case entangled:
		return both("has", "have", why.other+", which would make it leave if it were replaced")
	case unreadable:
		return both("has", "have", "records that this version cannot read")
	case noUnits:
		return both("runs", "run", "no units")
	case draining:
		return both("is", "are", "drained")
	case cordoned:
		return both("is", "are", "cordoned")
	case backingOff:
		return both("is", "are", "left out for a while because of trouble")
	case noMemory:
		return both("has", "have", "too little memory")
	case noCPU:
		return both("has", "have", "too little CPU")
	case noCounter:
		return both("has", "have", "too little "+why.other)
	}
	return both("is", "are", "out of the question")
}

// shownReasons is how many different reasons a summary gives.
const shownReasons = 6

// summary says in one line why no node takes the unit: "3 nodes: 2 conflict with
// a.service, 1 has no disk=ssd".
func (p *pass) summary(u *unitPlan) string {
	if v := p.rival(u, anyUnit); v != nil {
		return p.say(refusal{rival, v.Name}, u, nil)
	}
	if p.present == 0 {
		return "there is no node"
	}
	nodes := text.Count(p.present, "node")
	if r := u.Requirements; p.classOf(u).count == 0 { // the same of all, whatever else there is
		switch {
		case r.MachineID != "":
			return nodes + ": none is node " + r.MachineID
		case len(r.Metadata) == 1 && len(r.Where) == 0:
			for key, values := range r.Metadata {
				return nodes + ": none has " + key + "=" + strings.Join(values, " or ")
			}
		}
	}
	type line struct {
		one, many string
		nodes     int
	}
	counted := map[string]*line{}
	for _, n := range p.nodes {
		if !n.present {
			continue
		}
		why := p.refuse(u, n)
		if u.at == n {
			why = refusal{kind: backingOff}
		}
		one, many := p.tally(why, u, n)
		if counted[one] == nil {
			counted[one] = &line{one: one, many: many}
		}
		counted[one].nodes++
	}
	lines := slices.SortedFunc(maps.Values(counted), func(a, b *line) int {
		return cmp.Or(cmp.Compare(b.nodes, a.nodes), strings.Compare(a.one, b.one))
	})
	var words []string
	rest := 0
	for i, l := range lines {
		switch {
		case i >= shownReasons && len(lines) > shownReasons+1:
			rest += l.nodes
		case l.nodes == 1:
			words = append(words, "1 "+l.one)
		default:
			words = append(words, fmt.Sprintf("%d %s", l.nodes, l.many))
		}
	}
	if rest > 0 {
		words = append(words, fmt.Sprintf("%d for other reasons", rest))
	}
	return nodes + ": " + strings.Join(words, ", ")
}
