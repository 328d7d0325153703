package engine

import (
	"cmp"
	"slices"
	"strings"
	"time"

	"flotilla/internal/registry"
	"flotilla/internal/unit"
)

// Cluster is what the engine knows: all records, what follows from them, and
// what has changed since the last Plan. It is fed by Set and Delete, which are
// cheap and may be called in any order. It is for one goroutine.
type Cluster struct {
	keys     registry.Keys
	revision int64 // of the store, up to which records were fed
	passes   uint64

	units    map[string]*unitState
	machines map[string]*machine // also those that are not there but have something
	names    names
	classes  *classes
	conflict *patterns
	replace  *patterns
	groups   map[string]*group
	order    []*machine // those that take units, by load and ID
	present  int        // machines that are there

	globals   map[*unitState]struct{}            // that are to run on every machine that they fit
	followers map[string]map[*unitState]struct{} // by the unit that they must be with
	replacers map[*unitState]struct{}            // with Replaces
	moving    map[*unitState]struct{}            // with a record in moves
	excluding map[*unitState]struct{}            // with back-off from machines

	solo        registry.Solo
	soloMod     int64
	failover    registry.Failover
	failoverMod int64
	gone        map[string]time.Time // when machines went that had units
	problems    map[string]string    // records that cannot be used, by key

	dirty   map[*unitState]struct{} // to be looked at by the next Plan
	better  map[*machine]struct{}   // may take units that it would not take before
	stale   map[*machine]struct{}   // global units to be found anew
	waiting map[string]*waiters     // units that would go where there is place, by signature
}

// NewCluster returns a Cluster without records.
func NewCluster(keys registry.Keys) *Cluster {
	return &Cluster{
		keys:  keys,
		units: map[string]*unitState{}, machines: map[string]*machine{}, classes: newClasses(),
		conflict: newPatterns(), replace: newPatterns(), groups: map[string]*group{},
		globals: map[*unitState]struct{}{}, followers: map[string]map[*unitState]struct{}{}, replacers: map[*unitState]struct{}{},
		moving: map[*unitState]struct{}{}, excluding: map[*unitState]struct{}{},
		gone: map[string]time.Time{}, problems: map[string]string{},
		dirty: map[*unitState]struct{}{}, better: map[*machine]struct{}{}, stale: map[*machine]struct{}{}, waiting: map[string]*waiters{},
	}
}

// waiters are units for which every machine is the same.
type waiters struct{ units map[*unitState]struct{} }

// unitState is all records of one unit name and what follows from them.
type unitState struct {
	name   string
	gone   bool
	frozen map[string]struct{} // keys of records that this program cannot read: nothing is done

	known   bool // it is in units/
	want    registry.Unit
	created int64 // revision of the creation of units/<name>
	bad     string

	text string             // that req is of
	req  *unit.Requirements // of its file or, if that is of no use, of its entry

	placement    registry.Placement
	placementMod int64   // 0: none
	entries      []entry // by machine
	unplaced     string
	unplacedMod  int64
	move         registry.Move
	moveMod      int64

	at       *machine // where it is placed, or was in the course of this Plan
	going    *machine // where its place is kept while it moves
	leaving  bool     // its entry says that it is to leave
	class    *class
	group    *group // of its template, if it is spread
	conflict []*pattern
	replace  []*pattern
	// Patterns of others that match its name.
	conflicted []*pattern
	replaced   []*pattern
	excluded   map[string]*exclusion // by machine
	waits      string                // signature under which it waits
	isWaiting  bool

	// Serials of the last pass in which it got a step, and in which what it was
	// before has been noted.
	stepped, marked uint64
}

// entry is one schedules/<machine>/<unit>.
type entry struct {
	machine string
	mod     int64
	registry.Entry
}

func (u *unitState) entryOf(machine string) *entry {
	for i := range u.entries {
		if u.entries[i].machine == machine {
			return &u.entries[i]
		}
	}
	return nil
}

// wanted reports whether it shall be on a machine.
func (u *unitState) wanted() bool {
	return u.known && u.want.Desired != registry.Inactive
}

// epoch tells who was first.
func (u *unitState) epoch() int64 {
	if u.at == nil && u.req.Global {
		return u.created
	}
	return u.placement.Epoch
}

// senior reports whether u was there before v.
func senior(u, v *unitState) bool {
	return cmp.Or(cmp.Compare(u.epoch(), v.epoch()), strings.Compare(u.name, v.name)) < 0
}

func (u *unitState) reserves() bool {
	return u.req.Memory != 0 || u.req.CPU != 0 || len(u.req.Counters) > 0
}

// social reports whether others have a say in where it can be.
func (u *unitState) social() bool {
	return len(u.conflict)+len(u.conflicted)+len(u.replace)+len(u.replaced) > 0
}

// machine is one machine, there or not.
type machine struct {
	id         string
	present    bool
	opaque     bool  // its record or settings cannot be read: it keeps what it has
	generation int64 // 0 if it is not there
	raw        string
	rec        registry.Machine
	settings   registry.Settings
	setMod     int64
	metadata   map[string]string
	troubles   map[string]trouble
	idle       bool // it said last that it has no units: if it is gone, it has left

	index   int // among the classes
	classes map[*class]struct{}
	open    bool // it is in Cluster.order

	units   map[*unitState]struct{} // placed there, on the way there, and global
	load    int                     // of units
	globals []*unitState            // that run there, in the order of GlobalsOn
	refused map[string]string       // why other global units do not
	memory  int64                   // reserved, as are cpu and counters
	cpu     int64
	counter map[string]int64
	owners  map[*pattern][]*unitState // units there that have the pattern
	names   map[*pattern][]*unitState // units there whose name it matches
}

type trouble struct {
	epoch int64
	text  string
}

func (m *machine) takes() bool {
	return m.present && !m.opaque && m.rec.Units && !m.settings.Cordon && !m.settings.Drain
}

// byLoad is the order in which machines are tried.
func byLoad(a, b *machine) int {
	return cmp.Or(cmp.Compare(a.load, b.load), strings.Compare(a.id, b.id))
}

// unit returns the state of a unit, made if there is none.
func (c *Cluster) unit(name string) *unitState {
	u := c.units[name]
	if u == nil {
		u = &unitState{name: name, req: &unit.Requirements{Unit: name}}
		c.units[name] = u
		c.names.add(u)
		u.conflicted = c.conflict.matching(u)
		u.replaced = c.replace.matching(u)
		c.join(u)
	}
	return u
}

// forget drops a unit of which no record is left.
func (c *Cluster) forget(u *unitState) {
	if u.known || u.placementMod != 0 || len(u.entries) > 0 || u.unplacedMod != 0 || u.moveMod != 0 || len(u.frozen) > 0 {
		return
	}
	c.part(u)
	for _, p := range u.conflicted {
		delete(p.names, u)
	}
	for _, p := range u.replaced {
		delete(p.names, u)
	}
	c.names.remove(u)
	c.unwait(u)
	delete(c.dirty, u)
	delete(c.excluding, u)
	delete(c.units, u.name)
}

// join makes the unit known by its requirements.
func (c *Cluster) join(u *unitState) {
	u.class = c.classes.join(u.req)
	own := func(ps *patterns, texts []string, matched func(*unitState) *[]*pattern) []*pattern {
		var owned []*pattern
		for _, text := range slices.Compact(slices.Sorted(slices.Values(texts))) {
			p, isNew := ps.own(u, text, c.find)
			if isNew {
				for v := range p.names {
					*matched(v) = append(*matched(v), p)
					if v.isWaiting {
						c.touch(v)
					}
				}
			}
			owned = append(owned, p)
		}
		return owned
	}
	// Who is somewhere is counted there under each pattern that matches it.
	u.conflict = c.recount(func() []*pattern {
		return own(c.conflict, u.req.Conflicts, func(v *unitState) *[]*pattern { return &v.conflicted })
	}, c.conflict, u.req.Conflicts)
	u.replace = c.recount(func() []*pattern {
		return own(c.replace, u.req.Replaces, func(v *unitState) *[]*pattern { return &v.replaced })
	}, c.replace, u.req.Replaces)
	if len(u.req.Replaces) > 0 {
		c.replacers[u] = struct{}{}
	}
	for _, peer := range u.req.MachineOf {
		insert(c.followers, peer, u)
	}
	if name, _ := unit.SplitName(u.name); u.req.Spread && !u.req.Global && name.IsInstance() {
		u.group = c.group(name.Template(), u.req.SpreadOver)
	}
}

// recount runs own, and counts the patterns that it made new for the units that
// are on machines already.
func (c *Cluster) recount(own func() []*pattern, ps *patterns, texts []string) []*pattern {
	old := map[string]bool{}
	for _, text := range texts {
		prefix, whole := literal(text)
		old[text] = whole && ps.exact[text] != nil || !whole && ps.globs[prefix][text] != nil
	}
	owned := own()
	for _, p := range owned {
		if old[p.text] {
			continue
		}
		for v := range p.names {
			for m := range c.placesOf(v) {
				m.names[p] = append(m.names[p], v)
			}
		}
	}
	return owned
}

// placesOf yields the machines on which a unit is counted.
func (c *Cluster) placesOf(u *unitState) map[*machine]struct{} {
	places := map[*machine]struct{}{}
	if u.at != nil {
		places[u.at] = struct{}{}
	}
	if u.going != nil {
		places[u.going] = struct{}{}
	}
	if u.req.Global {
		for _, m := range c.machines {
			if _, ok := m.units[u]; ok {
				places[m] = struct{}{}
			}
		}
	}
	return places
}

// part undoes join.
func (c *Cluster) part(u *unitState) {
	c.classes.leave(u.class)
	disown := func(ps *patterns, owned []*pattern, matched func(*unitState) *[]*pattern) {
		for _, p := range owned {
			if !ps.disown(u, p) {
				continue
			}
			for v := range p.names {
				list := matched(v)
				*list = slices.DeleteFunc(*list, func(q *pattern) bool { return q == p })
				for m := range c.placesOf(v) {
					delete(m.names, p)
				}
			}
		}
	}
	disown(c.conflict, u.conflict, func(v *unitState) *[]*pattern { return &v.conflicted })
	disown(c.replace, u.replace, func(v *unitState) *[]*pattern { return &v.replaced })
	u.conflict, u.replace = nil, nil
	delete(c.replacers, u)
	for _, peer := range u.req.MachineOf {
		drop(c.followers, peer, u)
	}
	u.group = nil
}

func (c *Cluster) find(prefix string, whole bool) []*unitState {
	if !whole {
		return c.names.from(prefix)
	}
	if u := c.units[prefix]; u != nil {
		return []*unitState{u}
	}
	return nil
}

// machine returns a machine, made as one that is not there if there is none.
func (c *Cluster) machine(id string) *machine {
	m := c.machines[id]
	if m == nil {
		m = &machine{id: id, classes: map[*class]struct{}{}, units: map[*unitState]struct{}{}, counter: map[string]int64{},
			owners: map[*pattern][]*unitState{}, names: map[*pattern][]*unitState{}}
		c.classes.enter(m)
		c.machines[id] = m
	}
	return m
}

// dismiss drops a machine of which nothing is left.
func (c *Cluster) dismiss(m *machine) {
	if m.present || m.setMod != 0 || len(m.units) > 0 || len(m.troubles) > 0 {
		return
	}
	c.classes.exit(m)
	delete(c.better, m)
	delete(c.stale, m)
	delete(c.machines, m.id)
}

// place orders the machine anew after change, which may alter its load or
// whether it takes units.
func (c *Cluster) place(m *machine, change func()) {
	at := -1
	if m.open {
		at, _ = slices.BinarySearchFunc(c.order, m, byLoad)
	}
	change()
	m.open = m.takes()
	switch {
	case at < 0 && !m.open:
	case at < 0:
		to, _ := slices.BinarySearchFunc(c.order, m, byLoad)
		c.order = slices.Insert(c.order, to, m)
	case !m.open:
		c.order = slices.Delete(c.order, at, at+1)
	default:
		// The others are in order on both sides of it.
		to, _ := slices.BinarySearchFunc(c.order[:at], m, byLoad)
		if to < at {
			copy(c.order[to+1:at+1], c.order[to:at])
		} else {
			rest, _ := slices.BinarySearchFunc(c.order[at+1:], m, byLoad)
			to = at + rest
			copy(c.order[at:to], c.order[at+1:to+1])
		}
		c.order[to] = m
	}
}

// add counts a unit on a machine.
func (c *Cluster) add(m *machine, u *unitState) {
	m.units[u] = struct{}{}
	c.count(m, u, 1)
}

// remove undoes add.
func (c *Cluster) remove(m *machine, u *unitState) {
	delete(m.units, u)
	c.count(m, u, -1)
}

func (c *Cluster) count(m *machine, u *unitState, by int) {
	c.place(m, func() { m.load += by })
	m.memory += int64(by) * u.req.Memory
	m.cpu += int64(by) * u.req.CPU
	for name, n := range u.req.Counters {
		m.counter[name] += int64(by) * n
	}
	list := func(lists map[*pattern][]*unitState, ps []*pattern) {
		for _, p := range ps {
			if by > 0 {
				lists[p] = append(lists[p], u)
			} else if i := slices.Index(lists[p], u); len(lists[p]) > 1 {
				lists[p] = slices.Delete(lists[p], i, i+1)
			} else {
				delete(lists, p)
			}
		}
	}
	list(m.owners, u.conflict)
	list(m.owners, u.replace)
	list(m.names, u.conflicted)
	list(m.names, u.replaced)
	if u.group != nil && m.present {
		u.group.count(m, by)
	}
}

// group is the instances of one template, and where they are.
type group struct {
	template string
	on       map[*machine]int
	spread   []int                     // [n]: machines with n instances; [0] is not counted
	over     map[string]map[string]int // metadata key, value: instances
}

func (c *Cluster) group(template string, over []string) *group {
	g := c.groups[template]
	if g == nil {
		g = &group{template: template, on: map[*machine]int{}, over: map[string]map[string]int{}}
		c.groups[template] = g
	}
	for _, key := range over {
		if g.over[key] == nil {
			g.over[key] = map[string]int{}
			for m, n := range g.on {
				g.over[key][m.metadata[key]] += n
			}
		}
	}
	return g
}

func (g *group) count(m *machine, by int) {
	n := g.on[m]
	if g.on[m] = n + by; n+by == 0 {
		delete(g.on, m)
	}
	for len(g.spread) <= n+1 {
		g.spread = append(g.spread, 0)
	}
	g.spread[n]--
	g.spread[n+by]++
	for key, values := range g.over {
		values[m.metadata[key]] += by
	}
}

// least is a lower bound of the instances on any machine, of n that are there.
func (g *group) least(n int) int {
	if len(g.on) < n {
		return 0
	}
	for i := 1; i < len(g.spread); i++ {
		if g.spread[i] > 0 {
			return i
		}
	}
	return 0
}

// touch has the next Plan look at the unit. It does not wait any more: it may
// have become another one than those that it waited with.
func (c *Cluster) touch(u *unitState) {
	c.unwait(u)
	c.dirty[u] = struct{}{}
}

func (c *Cluster) touchAll(units map[*unitState]struct{}) {
	for u := range units {
		c.touch(u)
	}
}

// touchNear touches whoever's place depends on u being on m.
func (c *Cluster) touchNear(m *machine, u *unitState) {
	for _, lists := range [][]*pattern{u.conflict, u.replace} {
		for _, p := range lists {
			for _, v := range m.names[p] {
				c.touch(v)
			}
		}
	}
	for _, lists := range [][]*pattern{u.conflicted, u.replaced} {
		for _, p := range lists {
			for _, v := range m.owners[p] {
				c.touch(v)
			}
		}
	}
	if u.reserves() {
		for v := range m.units {
			if v.reserves() {
				c.touch(v)
			}
		}
	}
	if len(u.conflict)+len(u.conflicted) > 0 && len(c.globals) > 0 {
		c.stale[m] = struct{}{}
	}
	c.touchFar(u)
}

// touchFar touches whoever's place depends on where u is.
func (c *Cluster) touchFar(u *unitState) {
	c.touchAll(c.followers[u.name])
	if len(u.replace) > 0 {
		c.touchAll(c.replacers)
	}
}

// wait keeps a unit that would go elsewhere, until a machine takes it.
func (c *Cluster) wait(u *unitState) {
	u.waits, u.isWaiting = c.signature(u), true
	w := c.waiting[u.waits]
	if w == nil {
		w = &waiters{units: map[*unitState]struct{}{}}
		c.waiting[u.waits] = w
	}
	w.units[u] = struct{}{}
}

func (c *Cluster) unwait(u *unitState) {
	if !u.isWaiting {
		return
	}
	w := c.waiting[u.waits]
	if delete(w.units, u); len(w.units) == 0 {
		delete(c.waiting, u.waits)
	}
	u.waits, u.isWaiting = "", false
}

// signature is the same for units for which every machine is the same.
func (c *Cluster) signature(u *unitState) string {
	var b strings.Builder
	if u.at != nil || u.going != nil || len(u.excluded) > 0 || len(u.req.MachineOf) > 0 || len(u.replace) > 0 {
		return "=" + u.name
	}
	b.WriteString(u.class.key)
	writeAmounts(&b, u.req)
	for i, list := range [][]*pattern{u.conflict, u.conflicted, u.replaced} {
		texts := make([]string, 0, len(list))
		for _, p := range list {
			texts = append(texts, p.text)
		}
		slices.Sort(texts)
		for _, text := range texts {
			b.WriteByte(0)
			b.WriteByte('0' + byte(i))
			b.WriteString(text)
		}
	}
	return b.String()
}
