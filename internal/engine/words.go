package engine

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"

	"flotilla/internal/text"
	"flotilla/internal/unit"
)

// phrases returns the words for a refusal: what to say of a unit and a node, and of
// a number of nodes, one or many. {} is what the refusal is about.
func phrases(kind refusalKind) (say, one, many string) {
	switch kind {
	case notThere:
		return "the node is gone", "is gone", "are gone"
	case unreadable:
		return "the node's records cannot be read by this version: upgrade it", "has records that this version cannot read", "have records that this version cannot read"
	case noUnits:
		return "the node runs no units", "runs no units", "run no units"
	case draining:
		return "the node is drained", "is drained", "are drained"
	case cordoned:
		return "the node is cordoned", "is cordoned", "are cordoned"
	case backingOff:
		return "it was in trouble there", "is left out for a while because of trouble", "are left out for a while because of trouble"
	case peer:
		return "it has to be with {}", "is not with {}", "are not with {}"
	case conflict:
		return "it conflicts with {} there", "conflicts with {}", "conflict with {}"
	case replaced:
		return "{} there replaces it", "has {}, which replaces it", "have {}, which replaces it"
	case rival:
		return "it and {} replace each other, and {} was placed first", "", "" // the same for all nodes
	case entangled:
		return "it replaces {} there, which would make it leave in turn", "has {}, which would make it leave if it were replaced", "have {}, which would make it leave if it were replaced"
	case noMemory:
		return "bytes of memory", "has too little memory", "have too little memory"
	case noCPU:
		return "thousandths of a core", "has too little CPU", "have too little CPU"
	case noCounter:
		return "", "has too little {}", "have too little {}"
	}
	return "", "is out of the question", "are out of the question"
}

// say puts a refusal in words about one node: "it conflicts with a.service there".
func (p *pass) say(why refusal, u *unitPlan, n *nodePlan) string {
	want := u.Requirements
	say, _, _ := phrases(why.kind)
	say = strings.ReplaceAll(say, "{}", p.about(why))
	short := func(free, has, reserved int64) string {
		return fmt.Sprintf("%d %s are free of %d, and it reserves %d", max(0, free), say, has, reserved)
	}
	switch why.kind {
	case mismatch:
		return want.Mismatch(n.ID, n.Metadata)
	case draining, cordoned, backingOff:
		if why.other != "" {
			return say + ": " + why.other
		}
	case noMemory:
		return short(n.free().memory, n.Record.Value.Memory, want.Memory)
	case noCPU:
		return short(n.free().cpu, n.Record.Value.CPU, want.CPU)
	case noCounter:
		free := n.free()
		return fmt.Sprintf("%d of %d %s are free, and it reserves %d", max(0, free.counter(why.other)), n.Record.Value.Counters[why.other], why.other, want.Counters[why.other])
	}
	return say
}

// about names what a refusal is about.
func (p *pass) about(why refusal) string {
	if why.kind == peer {
		return p.whereabouts(why.other)
	}
	return why.other
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
	if why.kind != mismatch {
		_, one, many = phrases(why.kind)
		return strings.ReplaceAll(one, "{}", p.about(why)), strings.ReplaceAll(many, "{}", p.about(why))
	}
	r := u.Requirements
	if r.MachineID != "" && r.MachineID != n.ID && (len(n.ID) < 8 || r.MachineID != n.ID[:8]) {
		return "is not node " + r.MachineID, "are not node " + r.MachineID
	}
	for _, key := range slices.Sorted(maps.Keys(r.Metadata)) {
		if values := r.Metadata[key]; !slices.Contains(values, n.Metadata[key]) {
			lacks := " no " + key + "=" + strings.Join(values, " or ")
			return "has" + lacks, "have" + lacks
		}
	}
	i := slices.IndexFunc(r.Where, func(e *unit.Expr) bool { return !e.Match(n.Metadata) })
	return "is not where " + r.Where[i].String(), "are not where " + r.Where[i].String()
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
