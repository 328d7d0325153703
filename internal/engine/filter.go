package engine

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"flotilla/internal/unit"
)

// refusal is why a machine does not take a unit. It is cheap to make and is
// turned into words only if somebody wants to read it.
type refusal struct {
	kind  refusalKind
	other string // the unit, counter or text it is about
}

type refusalKind int

const (
	fits refusalKind = iota
	notThere
	opaque
	noUnits
	draining
	cordoned
	mismatch
	backOff
	peer
	conflict
	replaced
	noMemory
	noCPU
	noCounter
	rival
	entangled
)

// refuse returns why the unit cannot be placed on the machine now. The rival,
// which is the same for every machine, is not looked at.
func (c *Cluster) refuse(u *unitState, m *machine) refusal {
	if r := m.closed(true); r.kind != fits {
		return r
	}
	if !u.class.has(m) {
		return refusal{kind: mismatch}
	}
	if x := u.excluded[m.id]; x != nil && x.active {
		return refusal{backOff, x.reason}
	}
	if r := c.company(u, m, true); r.kind != fits {
		return r
	}
	var circle *unitState
	for _, p := range u.replace {
		circle = first(circle, m.names[p], u, func(v *unitState) bool { return !mutual(u, v) && c.drives(v, u) })
	}
	if circle != nil {
		return refusal{entangled, circle.name}
	}
	switch {
	case u.req.Memory > 0 && m.memory+u.req.Memory > m.rec.Memory:
		return refusal{kind: noMemory}
	case u.req.CPU > 0 && m.cpu+u.req.CPU > m.rec.CPU:
		return refusal{kind: noCPU}
	}
	short := refusal{}
	for name, n := range u.req.Counters {
		if n > 0 && m.counter[name]+n > m.rec.Counters[name] && (short.kind == fits || name < short.other) {
			short = refusal{noCounter, name}
		}
	}
	return short
}

// closed returns why the machine takes no unit at all, or, unless fresh, why it
// keeps none.
func (m *machine) closed(fresh bool) refusal {
	switch {
	case !m.present:
		return refusal{kind: notThere}
	case m.opaque && fresh:
		return refusal{kind: opaque}
	case m.opaque:
		return refusal{}
	case !m.rec.Units:
		return refusal{kind: noUnits}
	case m.settings.Drain:
		return refusal{draining, m.settings.Reason}
	case m.settings.Cordon && fresh:
		return refusal{cordoned, m.settings.Reason}
	}
	return refusal{}
}

// company returns who keeps the unit from the machine: a peer that is not
// there, or somebody who is. Unless fresh the unit is there already, and only
// those count who were there before, or who replace it and have come.
func (c *Cluster) company(u *unitState, m *machine, fresh bool) refusal {
	counts := func(v *unitState) bool { return fresh || v.going != m && senior(v, u) }
	for _, name := range u.req.MachineOf {
		if !c.isOn(name, m) {
			return refusal{peer, name}
		}
	}
	var found *unitState
	for _, p := range u.conflict {
		found = first(found, m.names[p], u, counts)
	}
	for _, p := range u.conflicted {
		found = first(found, m.owners[p], u, counts)
	}
	if found != nil {
		return refusal{conflict, found.name}
	}
	for _, p := range u.replaced {
		found = first(found, m.owners[p], u, func(v *unitState) bool { return (fresh || v.going != m) && !mutual(u, v) })
	}
	if found != nil {
		return refusal{replaced, found.name}
	}
	return refusal{}
}

// first returns the unit with the lowest name of those that count, but for u
// itself.
func first(found *unitState, list []*unitState, u *unitState, counts func(*unitState) bool) *unitState {
	for _, v := range list {
		if v != u && (found == nil || v.name < found.name) && counts(v) {
			found = v
		}
	}
	return found
}

// isOn reports whether the unit of that name is on the machine to stay.
func (c *Cluster) isOn(name string, m *machine) bool {
	v := c.units[name]
	if v == nil {
		return false
	}
	if c.isGlobal(v) {
		_, runs := m.units[v]
		return runs
	}
	return v.at == m && v.wanted() && !v.leaving
}

// mutual reports whether two units replace each other. Nobody leaves then.
func mutual(u, v *unitState) bool {
	_, a := u.req.Replacing(v.name)
	_, b := v.req.Replacing(u.name)
	return a && b
}

// rival returns a unit that is placed somewhere and of which there cannot be
// one beside u: they replace each other, so each would drive the other through
// the cluster. Who was placed first is the one that runs. Instances of one
// template are no rivals: a template whose pattern matches its own instances
// means those of others.
func (c *Cluster) rival(u *unitState, counts func(v *unitState) bool) *unitState {
	var found *unitState
	for _, p := range u.replace {
		for v := range p.names {
			if v != u && v.at != nil && v.wanted() && len(v.replace) > 0 && (found == nil || v.name < found.name) && counts(v) && mutual(u, v) && !siblings(u, v) {
				found = v
			}
		}
	}
	return found
}

// drives reports whether u would have to leave if v had to, or if v came: then
// nobody could stay for long if u replaced v. A unit that leaves takes those
// along that have to be with it, and drives out who it replaces where it comes.
func (c *Cluster) drives(v, u *unitState) bool {
	seen := map[*unitState]bool{v: true}
	for queue := []*unitState{v}; len(queue) > 0; queue = queue[1:] {
		var next []*unitState
		for w := range c.followers[queue[0].name] {
			next = append(next, w)
		}
		for _, p := range queue[0].replace {
			for w := range p.names {
				next = append(next, w)
			}
		}
		for _, w := range next {
			if w == u {
				return true
			}
			if !seen[w] && w.wanted() {
				seen[w] = true
				queue = append(queue, w)
			}
		}
	}
	return false
}

func siblings(u, v *unitState) bool {
	a, _ := unit.SplitName(u.name)
	b, _ := unit.SplitName(v.name)
	return a.Template() != "" && a.Template() == b.Template()
}

// evict returns why a unit cannot stay on the machine on which it is placed. Of
// two that cannot be together the one that was there first stays.
func (c *Cluster) evict(u *unitState, m *machine) refusal {
	if r := m.closed(false); r.kind != fits || m.opaque {
		return r
	}
	if !u.class.has(m) {
		return refusal{kind: mismatch}
	}
	if r := c.company(u, m, false); r.kind != fits {
		return r
	}
	if v := c.rival(u, func(v *unitState) bool { return senior(v, u) }); v != nil {
		return refusal{rival, v.name}
	}
	if u.reserves() && c.overbooked(u, m) {
		return c.crowded(u, m)
	}
	return refusal{}
}

// overbooked reports whether there is less than what was reserved of something
// that the unit reserves.
func (c *Cluster) overbooked(u *unitState, m *machine) bool {
	over := u.req.Memory > 0 && m.memory > m.rec.Memory || u.req.CPU > 0 && m.cpu > m.rec.CPU
	for name, n := range u.req.Counters {
		over = over || n > 0 && m.counter[name] > m.rec.Counters[name]
	}
	return over
}

// crowded returns what there is too little of for the unit, after those that
// were there first have got theirs.
func (c *Cluster) crowded(u *unitState, m *machine) refusal {
	var all []*unitState
	for v := range m.units {
		if v.reserves() && v.going == nil {
			all = append(all, v)
		}
	}
	slices.SortFunc(all, func(a, b *unitState) int {
		return cmp.Or(cmp.Compare(a.epoch(), b.epoch()), strings.Compare(a.name, b.name))
	})
	memory, cpu, counter := m.rec.Memory, m.rec.CPU, maps.Clone(m.rec.Counters)
	if counter == nil {
		counter = map[string]int64{}
	}
	for _, v := range all {
		r := refusal{}
		switch {
		case v.req.Memory > 0 && v.req.Memory > memory:
			r = refusal{kind: noMemory}
		case v.req.CPU > 0 && v.req.CPU > cpu:
			r = refusal{kind: noCPU}
		}
		for _, name := range slices.Sorted(maps.Keys(v.req.Counters)) {
			if n := v.req.Counters[name]; r.kind == fits && n > 0 && n > counter[name] {
				r = refusal{noCounter, name}
			}
		}
		if v == u {
			return r
		}
		if r.kind != fits && v.at != nil {
			continue // it leaves; a global unit runs all the same
		}
		memory, cpu = memory-v.req.Memory, cpu-v.req.CPU
		for name, n := range v.req.Counters {
			counter[name] -= n
		}
	}
	return refusal{}
}

// say puts a refusal in words about one machine: "it conflicts with a.service".
func (c *Cluster) say(r refusal, u *unitState, m *machine) string {
	because := func(s string) string {
		if r.other != "" {
			return s + ": " + r.other
		}
		return s
	}
	switch r.kind {
	case mismatch:
		return u.req.Mismatch(m.id, m.metadata)
	case peer:
		return "it has to be with " + c.whereabouts(r.other)
	case conflict:
		return "it conflicts with " + r.other + " there"
	case replaced:
		return r.other + " there replaces it"
	case rival:
		return "it and " + r.other + " replace each other, and " + r.other + " was placed first"
	case entangled:
		return "it replaces " + r.other + " there, which would make it leave in turn"
	case notThere:
		return "the machine is gone"
	case opaque:
		return "the machine's records cannot be read by this version: upgrade it"
	case noUnits:
		return "the machine runs no units"
	case draining:
		return because("the machine is drained")
	case cordoned:
		return because("the machine is cordoned")
	case backOff:
		return because("it was in trouble there")
	case noMemory:
		return fmt.Sprintf("%d bytes of memory are free of %d, and it reserves %d", max(0, m.rec.Memory-m.memory), m.rec.Memory, u.req.Memory)
	case noCPU:
		return fmt.Sprintf("%d thousandths of a core are free of %d, and it reserves %d", max(0, m.rec.CPU-m.cpu), m.rec.CPU, u.req.CPU)
	case noCounter:
		return fmt.Sprintf("%d of %d %s are free, and it reserves %d", max(0, m.rec.Counters[r.other]-m.counter[r.other]), m.rec.Counters[r.other], r.other, u.req.Counters[r.other])
	}
	return ""
}

// whereabouts names a peer and says where it is.
func (c *Cluster) whereabouts(name string) string {
	v := c.units[name]
	switch {
	case v == nil || !v.known:
		return name + ", which does not exist"
	case !v.wanted():
		return name + ", which is inactive"
	case c.isGlobal(v):
		return name + ", which does not run there"
	case v.at == nil:
		return name + ", which is nowhere"
	case v.leaving:
		return name + ", which is leaving " + v.at.id
	}
	return name + ", which is on " + v.at.id
}

// tally puts a refusal in words about n machines: "2 conflict with a.service".
func (c *Cluster) tally(r refusal, u *unitState, m *machine) (one, many string) {
	both := func(one, many, rest string) (string, string) { return one + " " + rest, many + " " + rest }
	switch r.kind {
	case mismatch:
		if r := u.req; r.MachineID != "" && r.MachineID != m.id && r.MachineID != short(m.id) {
			return both("is", "are", "not machine "+r.MachineID)
		}
		for _, key := range slices.Sorted(maps.Keys(u.req.Metadata)) {
			if values := u.req.Metadata[key]; !slices.Contains(values, m.metadata[key]) {
				return both("has", "have", "no "+key+"="+strings.Join(values, " or "))
			}
		}
		for _, e := range u.req.Where {
			if !e.Match(m.metadata) {
				return both("is", "are", "not where "+e.String())
			}
		}
	case peer:
		return both("is", "are", "not with "+c.whereabouts(r.other))
	case conflict:
		return both("conflicts", "conflict", "with "+r.other)
	case replaced:
		return both("has", "have", r.other+", which replaces it")
	case entangled:
		return both("has", "have", r.other+", which would make it leave if it were replaced")
	case opaque:
		return both("has", "have", "records that this version cannot read")
	case noUnits:
		return both("runs", "run", "no units")
	case draining:
		return both("is", "are", "drained")
	case cordoned:
		return both("is", "are", "cordoned")
	case backOff:
		return both("is", "are", "left out for a while because of trouble")
	case noMemory:
		return both("has", "have", "too little memory")
	case noCPU:
		return both("has", "have", "too little CPU")
	case noCounter:
		return both("has", "have", "too little "+r.other)
	}
	return both("is", "are", "out of the question")
}

// writeAmounts adds what a unit reserves to a signature.
func writeAmounts(b *strings.Builder, r *unit.Requirements) {
	if r.Memory == 0 && r.CPU == 0 && len(r.Counters) == 0 {
		return
	}
	fmt.Fprintf(b, "\x02%d %d", r.Memory, r.CPU)
	for _, name := range slices.Sorted(maps.Keys(r.Counters)) {
		fmt.Fprintf(b, " %s=%d", name, r.Counters[name])
	}
}

// exclusion keeps a unit from a machine on which it was in trouble.
type exclusion struct {
	active bool // as of the last Plan
	until  time.Time
	delay  time.Duration
	epoch  int64 // of the placement that was in trouble
	reason string
}

// summary says in one line why no machine takes the unit.
func (c *Cluster) summary(u *unitState) string {
	if v := c.rival(u, func(*unitState) bool { return true }); v != nil {
		return c.say(refusal{rival, v.name}, u, nil)
	}
	if c.present > 0 && u.class.count == 0 { // the same of all, whatever else there is
		switch {
		case u.req.MachineID != "":
			return plural(c.present, "machine") + ": none is machine " + u.req.MachineID
		case len(u.req.Metadata) == 1 && len(u.req.Where) == 0:
			for key, values := range u.req.Metadata {
				return plural(c.present, "machine") + ": none has " + key + "=" + strings.Join(values, " or ")
			}
		}
	}
	type line struct {
		one, many string
		n         int
	}
	counted := map[string]*line{}
	total := 0
	for _, m := range c.machines {
		if !m.present {
			continue
		}
		total++
		r := c.refuse(u, m)
		if u.at == m {
			r = refusal{backOff, ""}
		}
		one, many := c.tally(r, u, m)
		if counted[one] == nil {
			counted[one] = &line{one, many, 0}
		}
		counted[one].n++
	}
	if total == 0 {
		return "there is no machine"
	}
	lines := slices.SortedFunc(maps.Values(counted), func(a, b *line) int {
		return cmp.Or(cmp.Compare(b.n, a.n), strings.Compare(a.one, b.one))
	})
	var words []string
	rest := 0
	for i, l := range lines {
		switch {
		case i >= 6 && len(lines) > 7:
			rest += l.n
		case l.n == 1:
			words = append(words, "1 "+l.one)
		default:
			words = append(words, fmt.Sprintf("%d %s", l.n, l.many))
		}
	}
	if rest > 0 {
		words = append(words, fmt.Sprintf("%d for other reasons", rest))
	}
	return plural(total, "machine") + ": " + strings.Join(words, ", ")
}

func plural(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}
