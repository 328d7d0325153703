package engine

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	"flotilla/internal/unit"
)

// refusal is why a node does not take a unit, or does not keep it. It is turned
// into words only if somebody is to read it, see say.
type refusal struct {
	kind  refusalKind
	other string // the unit, counter or text it is about
}

type refusalKind int

const (
	fits refusalKind = iota
	notThere
	unreadable
	noUnits
	draining
	cordoned
	mismatch
	backingOff
	peer     // a unit that it must be with is not there
	conflict // one of the two does not want to be with the other
	replaced // a unit there replaces it
	noMemory
	noCPU
	noCounter
	rival     // a unit somewhere and it replace each other
	entangled // it would replace a unit without which it cannot stay itself
)

// refuse returns why the unit cannot come to the node now. Whether a rival runs
// is not looked at here: it is the same for every node, see rival.
func (p *pass) refuse(u *unitPlan, n *nodePlan) refusal {
	if why := n.takesNew(); why.kind != fits {
		return why
	}
	if !p.classOf(u).has[n.index] {
		return refusal{kind: mismatch}
	}
	if b := p.backOff(u, n); b != nil {
		return refusal{backingOff, b.reason}
	}
	if why := p.neighbours(u, n, anyUnit, anyUnit); why.kind != fits {
		return why
	}
	if u.patterns != nil {
		var other *unitPlan
		for _, pt := range u.patterns.replaces {
			other = lowest(other, n.matched[pt], func(v *unitPlan) bool { return v != u && !replaceEachOther(u, v) && p.drives(v, u) })
		}
		if other != nil {
			return refusal{entangled, other.Name}
		}
	}
	return n.free().lacks(u)
}

// evict returns why the unit cannot stay on the node on which it is placed. Of
// two units that cannot be together the one that was there first stays.
func (p *pass) evict(u *unitPlan, n *nodePlan) refusal {
	if why := n.keeps(); why.kind != fits || n.unreadable {
		return why
	}
	if u.Requirements.Mismatch(n.ID, n.Metadata) != "" {
		return refusal{kind: mismatch}
	}
	// One that is only on its way to the node drives nobody out yet.
	came := func(v *unitPlan) bool { return v.goingTo != n }
	if why := p.neighbours(u, n, func(v *unitPlan) bool { return came(v) && before(v, u) }, came); why.kind != fits {
		return why
	}
	if v := p.rival(u, func(v *unitPlan) bool { return before(v, u) }); v != nil {
		return refusal{rival, v.Name}
	}
	if reserves(u.Requirements) && n.lacksRoom() {
		return n.firstCome(u)
	}
	return refusal{}
}

// takesNew returns why the node takes no new unit, whichever it is.
func (n *nodePlan) takesNew() refusal {
	switch {
	case !n.present:
		return refusal{kind: notThere}
	case n.unreadable:
		return refusal{kind: unreadable}
	}
	if why := n.keeps(); why.kind != fits {
		return why
	}
	if n.Settings.Value.Cordon {
		return refusal{cordoned, n.Settings.Value.Reason}
	}
	return refusal{}
}

// keeps returns why the node keeps no unit, whichever it is. One whose records
// cannot be read keeps what it has.
func (n *nodePlan) keeps() refusal {
	switch {
	case !n.present:
		return refusal{kind: notThere}
	case n.unreadable:
		return refusal{}
	case !n.Record.Value.Units:
		return refusal{kind: noUnits}
	case n.Settings.Value.Drain:
		return refusal{draining, n.Settings.Value.Reason}
	}
	return refusal{}
}

// neighbours returns whom the unit lacks on the node, or which unit there keeps
// it away: one that it conflicts with, of those that mayConflict, or one that
// replaces it, of those that mayReplace.
func (p *pass) neighbours(u *unitPlan, n *nodePlan, mayConflict, mayReplace func(*unitPlan) bool) refusal {
	for _, name := range u.Requirements.MachineOf {
		if !p.staysOn(name, n) {
			return refusal{peer, name}
		}
	}
	if u.patterns == nil {
		return refusal{}
	}
	var other *unitPlan
	counts := func(v *unitPlan) bool { return v != u && mayConflict(v) }
	for _, pt := range u.patterns.conflicts {
		other = lowest(other, n.matched[pt], counts)
	}
	for _, pt := range u.patterns.conflictedBy {
		other = lowest(other, n.owners[pt], counts)
	}
	if other != nil {
		return refusal{conflict, other.Name}
	}
	for _, pt := range u.patterns.replacedBy {
		other = lowest(other, n.owners[pt], func(v *unitPlan) bool { return v != u && mayReplace(v) && !replaceEachOther(u, v) })
	}
	if other != nil {
		return refusal{replaced, other.Name}
	}
	return refusal{}
}

// lowest returns the unit with the lowest name of found and those of the list
// that count: whoever is asked, the answer names the same unit.
func lowest(found *unitPlan, list []*unitPlan, counts func(*unitPlan) bool) *unitPlan {
	for _, v := range list {
		if (found == nil || v.Name < found.Name) && counts(v) {
			found = v
		}
	}
	return found
}

// staysOn reports whether the unit of that name is on the node and need not leave.
func (p *pass) staysOn(name string, n *nodePlan) bool {
	v := p.named[name]
	switch {
	case v == nil:
		return false
	case v.global:
		return slices.Contains(n.globals, v)
	}
	return v.at == n && v.Wanted() && !v.leaving
}

// replaceEachOther reports whether each of two units replaces the other. Beside
// each other both stay.
func replaceEachOther(u, v *unitPlan) bool {
	_, a := u.Requirements.Replacing(v.Name)
	_, b := v.Requirements.Replacing(u.Name)
	return a && b
}

// anyUnit is a condition that holds for all.
func anyUnit(*unitPlan) bool { return true }

// rival returns a unit, of those that count, that is placed anywhere while u
// cannot be: they replace each other, so that each would drive the other from
// node to node. Instances of one template are no rivals: a template whose pattern
// matches its own instances means those of others.
func (p *pass) rival(u *unitPlan, counts func(v *unitPlan) bool) *unitPlan {
	if u.patterns == nil {
		return nil
	}
	var found *unitPlan
	for _, pt := range u.patterns.replaces {
		found = lowest(found, pt.names, func(v *unitPlan) bool {
			return v != u && v.at != nil && v.Wanted() && counts(v) && replaceEachOther(u, v) &&
				(templateOf(u.Name) == "" || templateOf(u.Name) != templateOf(v.Name))
		})
	}
	return found
}

// drives reports whether u would have to leave in the end if v had to leave its
// node. If so, u must not come and replace v: it could not stay either.
//
// For example x is on a node, a has MachineOf=x, and w has MachineOf=a and
// Replaces=x. If w came to the node x would have to leave; with x goes a, which
// has to be with it, and with a goes w. So x drives w, over a. Another example is
// p with Replaces=q, q with Replaces=r and r with Replaces=p. If r came to the
// node of p, p would have to find another one; there it may drive out q, and q
// may drive out r. So p drives r, over q.
//
// In general a unit drives those that must be with it, those that it replaces,
// and all that these drive. Units that are not wanted drive nobody.
func (p *pass) drives(v, u *unitPlan) bool {
	seen := map[*unitPlan]bool{v: true}
	for queue := []*unitPlan{v}; len(queue) > 0; queue = queue[1:] {
		driven := slices.Clone(p.followers[queue[0].Name])
		if queue[0].patterns != nil {
			for _, pt := range queue[0].patterns.replaces {
				driven = append(driven, pt.names...)
			}
		}
		for _, w := range driven {
			if w == u {
				return true
			}
			if !seen[w] && w.Wanted() {
				seen[w] = true
				queue = append(queue, w)
			}
		}
	}
	return false
}

// reserves reports whether a unit reserves any part of what a node has.
func reserves(r *unit.Requirements) bool {
	return r.Memory != 0 || r.CPU != 0 || len(r.Counters) > 0
}

// room is what is left of a node; less than nothing if too much is reserved.
type room struct {
	n           *nodePlan
	memory, cpu int64
	counters    map[string]int64 // reserved of them
}

// free returns what is left of the node beside all that is counted there.
func (n *nodePlan) free() room {
	r := n.Record.Value
	return room{n, r.Memory - n.memory, r.CPU - n.cpu, n.counters}
}

// counter returns what is left of a counter.
func (r *room) counter(name string) int64 { return r.n.Record.Value.Counters[name] - r.counters[name] }

// lacks returns what there is too little of for the unit.
func (r room) lacks(u *unitPlan) refusal {
	want := u.Requirements
	switch {
	case want.Memory > 0 && want.Memory > r.memory:
		return refusal{kind: noMemory}
	case want.CPU > 0 && want.CPU > r.cpu:
		return refusal{kind: noCPU}
	}
	short := refusal{}
	for name, amount := range want.Counters {
		if amount > 0 && amount > r.counter(name) && (short.kind == fits || name < short.other) {
			short = refusal{noCounter, name}
		}
	}
	return short
}

// lacksRoom reports whether more is reserved of anything than the node has.
func (n *nodePlan) lacksRoom() bool {
	free := n.free()
	if free.memory < 0 || free.cpu < 0 {
		return true
	}
	for name := range n.counters {
		if free.counter(name) < 0 {
			return true
		}
	}
	return false
}

// firstCome returns what there is too little of for a unit on the node, after
// those that were there before it have got theirs.
func (n *nodePlan) firstCome(u *unitPlan) refusal {
	all := slices.Clone(n.globals)
	for _, v := range n.placed {
		if v.goingTo == nil {
			all = append(all, v)
		}
	}
	slices.SortFunc(all, func(a, b *unitPlan) int {
		return cmp.Or(cmp.Compare(a.epoch(), b.epoch()), strings.Compare(a.Name, b.Name))
	})
	left := room{n, n.Record.Value.Memory, n.Record.Value.CPU, map[string]int64{}}
	for _, v := range all {
		why := left.lacks(v)
		if v == u {
			return why
		}
		if why.kind != fits && !v.global {
			continue // it leaves; a global unit runs all the same
		}
		left.memory -= v.Requirements.Memory
		left.cpu -= v.Requirements.CPU
		for name, amount := range v.Requirements.Counters {
			left.counters[name] += amount
		}
	}
	return refusal{}
}

// class is which nodes have what a unit asks of a node's ID and metadata. Units
// that ask the same share one.
type class struct {
	has   []bool // by nodePlan.index
	count int    // of them
}

// classOf returns the class of a unit.
func (p *pass) classOf(u *unitPlan) *class {
	if u.class != nil {
		return u.class
	}
	key := classKey(u.Requirements)
	c := p.classes[key]
	if c == nil {
		c = &class{has: make([]bool, len(p.nodes))}
		for _, n := range p.nodes {
			if n.present && (key == "" || u.Requirements.Mismatch(n.ID, n.Metadata) == "") {
				c.has[n.index] = true
				c.count++
			}
		}
		p.classes[key] = c
	}
	u.class = c
	return c
}

// classKey is the same for units that ask the same of a node's ID and metadata.
func classKey(r *unit.Requirements) string {
	if r.MachineID == "" && len(r.Metadata) == 0 && len(r.Where) == 0 {
		return ""
	}
	return fmt.Sprintf("%q %q %q", r.MachineID, r.Metadata, r.Where) // maps are printed in order
}

// requirementsKey is the same for units of which a node takes either all or none,
// so that what was found out about one holds for the others. It is "" for a unit
// that has to be looked at by itself.
func (p *pass) requirementsKey(u *unitPlan) string {
	r := u.Requirements
	if u.at != nil || u.goingTo != nil || u.backsOff || len(r.MachineOf)+len(r.Replaces) > 0 {
		return ""
	}
	key := fmt.Sprintf("%s %d %d %v", classKey(r), r.Memory, r.CPU, r.Counters)
	if u.patterns != nil {
		for _, list := range [][]*pattern{u.patterns.conflicts, u.patterns.conflictedBy, u.patterns.replacedBy} {
			key += "/"
			for _, pt := range list {
				key += fmt.Sprintf(" %q", pt.text)
			}
		}
	}
	return key
}
