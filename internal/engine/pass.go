package engine

import (
	"cmp"
	"path"
	"slices"
	"strings"
	"time"

	"flotilla/internal/state"
)

// pass is one look at a snapshot: what follows from its records, and what the
// plan has decided so far. A unit that gets a place is counted there at once, so
// that the units after it find the place taken.
type pass struct {
	snapshot *state.Snapshot
	now      time.Time
	memory   Memory // its maps are this pass's own

	units   []*unitPlan // in no order
	quiet   []quietUnit // the others
	moving  []*unitPlan
	globals []*unitPlan // that run on every node that they fit
	nodes   map[string]*nodePlan
	order   []*nodePlan // those that take new units, by load and ID
	present int         // nodes that are there
	running int         // nodes that are there and run units

	named     map[string]*unitPlan   // units that others must be with, or that back off from nodes
	followers map[string][]*unitPlan // units that must be with another one, by its name
	conflicts patterns
	replaces  patterns

	classes map[string]*class
	groups  map[string]*group // nil: not yet made
	spread  map[string]map[string]bool

	steps    []Step
	next     time.Time         // when something is due; zero: nothing
	again    []*unitPlan       // the peer that they must be with was placed
	unplaced []*unitPlan       // see noteUnplaced
	hopeless map[string]string // requirements that no node meets, and why
}

// unitPlan is one unit in a pass.
type unitPlan struct {
	*state.Unit
	at       *nodePlan // by its placement, or where the pass has put it
	goingTo  *nodePlan // where a place is reserved for it while it leaves at
	global   bool      // it is one of pass.globals
	leaving  bool      // it is to leave at
	rank     int       // see rank
	stepped  bool      // it has a step
	backsOff bool      // the memory has nodes that it stays away from
	patterns *unitPatterns
	class    *class // nil: not yet looked up
	group    *group // of its template, if it is spread; nil until pass.groups are made
	nowhere  string // why it is on no node that is there, see noteUnplaced
}

// quietUnit is one of the units, nearly all in most passes, that run where they are
// placed and have nothing to do with others. They are only counted.
type quietUnit struct {
	*state.Unit
	name string // that of Unit, at hand
	at   *nodePlan
}

// unitPatterns is what one unit has to do with patterns of Conflicts and
// Replaces; most units have nothing to do with any.
type unitPatterns struct {
	conflicts, replaces      []*pattern // its own
	conflictedBy, replacedBy []*pattern // those, of whatever unit, that match its name
}

// nodePlan is one node in a pass, there or not.
type nodePlan struct {
	*state.Node
	index      int // among the nodes of the pass
	present    bool
	unreadable bool  // its records cannot be read: it keeps what it has
	generation int64 // 0 if it is not there
	held       bool  // it is gone, and its units wait: see brake
	open       bool  // it is in pass.order
	troubles   map[string]trouble

	placed     []*unitPlan       // units that are placed there or have a place reserved
	globals    []*unitPlan       // global units that run there
	refused    map[string]string // why other global units do not
	load       int               // number of all these
	memory     int64             // reserved by them, as are cpu and counters
	cpu        int64
	counters   map[string]int64
	overbooked bool // of something there was less than what is reserved when the pass began

	owners  map[*pattern][]*unitPlan // units there that have the pattern
	matched map[*pattern][]*unitPlan // units there whose name it matches
}

// trouble is what a node reports of a unit that cannot run there.
type trouble struct {
	epoch int64
	text  string
}

// troublesOf returns what a node reports of units that cannot run there, by name.
func troublesOf(n *state.Node) map[string]trouble {
	var found map[string]trouble
	for name, u := range n.Units.Value.Units {
		if u.Trouble == "" {
			continue
		}
		if found == nil {
			found = map[string]trouble{}
		}
		found[name] = trouble{u.Epoch, u.Trouble}
	}
	return found
}

// newPass reads a snapshot. The maps of memory become those of the pass. No unit is
// quiet if each is to be asked about.
func newPass(s *state.Snapshot, memory Memory, now time.Time, each bool) *pass {
	p := &pass{
		snapshot: s, now: now, memory: memory, nodes: make(map[string]*nodePlan, len(s.Nodes)), quiet: make([]quietUnit, 0, len(s.Units)),
		named: map[string]*unitPlan{}, followers: map[string][]*unitPlan{},
		classes: map[string]*class{}, spread: map[string]map[string]bool{}, hopeless: map[string]string{},
	}
	for _, n := range s.Nodes {
		p.addNode(n)
	}
	for key := range memory.backOff {
		p.named[key.unit] = nil
	}
	for name, u := range s.Units {
		at := p.nodeOf(u)
		if r := u.Requirements; !each && at != nil && len(r.Conflicts)+len(r.Replaces) == 0 && !reserves(r) && isQuiet(u, at) {
			at.load++
			p.quiet = append(p.quiet, quietUnit{u, name, at})
			continue
		}
		p.addUnit(u, at)
	}
	p.matchNames()
	for _, u := range p.units {
		if u.at != nil {
			p.count(u.at, u, 1)
		}
	}
	for _, n := range p.nodes {
		p.placeGlobals(n)
		n.overbooked = n.lacksRoom()
		if n.takesNew().kind == fits {
			p.order = append(p.order, n)
		}
	}
	slices.SortFunc(p.order, byLoad)
	for _, n := range p.order {
		n.open = true
	}
	return p
}

// nodeOf returns the node on which a unit is placed, nil if it is not.
func (p *pass) nodeOf(u *state.Unit) *nodePlan {
	if !u.Placement.Exists() {
		return nil
	}
	id := u.Placement.Value.Node
	if n := p.nodes[id]; n != nil {
		return n
	}
	return p.addNode(&state.Node{ID: id}) // it is gone and has no settings
}

func (p *pass) addNode(record *state.Node) *nodePlan {
	n := &nodePlan{Node: record, index: len(p.nodes), present: record.Present(), generation: record.Generation(), troubles: troublesOf(record)}
	n.unreadable = record.Record.Problem != "" || record.Settings.Problem != ""
	p.nodes[n.ID] = n
	if n.present {
		p.present++
		if n.unreadable || n.Record.Value.Units {
			p.running++
		}
	}
	return n
}

func (p *pass) addUnit(record *state.Unit, at *nodePlan) *unitPlan {
	u := &unitPlan{Unit: record, at: at, leaving: at != nil && record.Placement.Value.Leave != ""}
	p.units = append(p.units, u)
	r := u.Requirements
	if at == nil && r.Global && u.Wanted() {
		u.global = true
		p.globals = append(p.globals, u)
	}
	if u.Move.Exists() {
		p.moving = append(p.moving, u)
	}
	if len(r.Conflicts)+len(r.Replaces) > 0 {
		u.patterns = &unitPatterns{conflicts: p.conflicts.of(r.Conflicts), replaces: p.replaces.of(r.Replaces)}
	}
	for _, peer := range r.MachineOf {
		p.followers[peer] = append(p.followers[peer], u)
		p.named[peer] = nil
	}
	return u
}

// matchNames finds units by name: those that others refer to, and for each the
// patterns that match its name. A quiet unit that is found is not quiet any more.
func (p *pass) matchNames() {
	if len(p.named) == 0 && p.conflicts.none() && p.replaces.none() {
		return
	}
	for _, u := range p.units {
		p.matchName(u.Name, func() *unitPlan { return u })
	}
	p.quiet = slices.DeleteFunc(p.quiet, func(q quietUnit) bool {
		return p.matchName(q.name, func() *unitPlan {
			q.at.load--
			return p.addUnit(q.Unit, q.at)
		})
	})
	for key := range p.memory.backOff {
		if u := p.named[key.unit]; u != nil {
			u.backsOff = true
		}
	}
}

// matchName reports whether a name is referred to, and if so notes by what with the
// unit that it gets.
func (p *pass) matchName(name string, get func() *unitPlan) bool {
	_, named := p.named[name]
	conflictedBy, replacedBy := p.conflicts.match(name), p.replaces.match(name)
	if !named && conflictedBy == nil && replacedBy == nil {
		return false
	}
	u := get()
	if named {
		p.named[name] = u
	}
	if conflictedBy == nil && replacedBy == nil {
		return true
	}
	if u.patterns == nil {
		u.patterns = &unitPatterns{}
	}
	u.patterns.conflictedBy, u.patterns.replacedBy = conflictedBy, replacedBy
	for _, list := range [][]*pattern{conflictedBy, replacedBy} {
		for _, pt := range list {
			pt.names = append(pt.names, u)
		}
	}
	return true
}

// placeGlobals finds out which global units run on the node, by the rules that
// the node itself goes by.
func (p *pass) placeGlobals(n *nodePlan) {
	if len(p.globals) == 0 || !n.present {
		return
	}
	if !n.Record.Value.Units {
		n.refused = map[string]string{}
		for _, g := range p.globals {
			n.refused[g.Name] = "the node runs no units"
		}
		return
	}
	claim := func(u *unitPlan) state.Claim {
		return state.Claim{Name: u.Name, Requirements: u.Requirements, Epoch: u.epoch()}
	}
	var placed, globals []state.Claim
	for _, u := range n.placed {
		if u.patterns != nil { // others conflict with nobody
			placed = append(placed, claim(u))
		}
	}
	slices.SortFunc(placed, func(a, b state.Claim) int { return strings.Compare(a.Name, b.Name) })
	byName := map[string]*unitPlan{}
	for _, g := range p.globals {
		globals = append(globals, claim(g))
		byName[g.Name] = g
	}
	var run []string
	run, n.refused = state.GlobalsOn(n.ID, n.Metadata, placed, globals)
	for _, name := range run {
		n.globals = append(n.globals, byName[name])
		p.count(n, byName[name], 1)
	}
}

// epoch tells which of two units was there first: the lower one.
func (u *unitPlan) epoch() int64 {
	if u.global {
		return u.Record.Created
	}
	return u.Placement.Value.Epoch
}

// before reports whether u was there before v.
func before(u, v *unitPlan) bool {
	return cmp.Or(cmp.Compare(u.epoch(), v.epoch()), strings.Compare(u.Name, v.Name)) < 0
}

func byName(a, b *unitPlan) int { return strings.Compare(a.Name, b.Name) }

// byLoad is the order in which nodes are tried.
func byLoad(a, b *nodePlan) int {
	return cmp.Or(cmp.Compare(a.load, b.load), strings.Compare(a.ID, b.ID))
}

// reserve counts the unit on a second node.
func (p *pass) reserve(u *unitPlan, n *nodePlan) {
	u.goingTo = n
	p.count(n, u, 1)
}

// put counts the unit on a node and no longer on that on which it was.
func (p *pass) put(u *unitPlan, n *nodePlan) {
	if u.at != nil {
		p.count(u.at, u, -1)
	}
	if u.goingTo != n {
		p.count(n, u, 1)
	}
	u.at, u.goingTo = n, nil
}

// count adds the unit to all that is counted of the node, or takes it away.
func (p *pass) count(n *nodePlan, u *unitPlan, by int) {
	at := 0
	if n.open {
		at, _ = slices.BinarySearchFunc(p.order, n, byLoad)
		p.order = slices.Delete(p.order, at, at+1)
	}
	n.load += by
	if n.open {
		at, _ = slices.BinarySearchFunc(p.order, n, byLoad)
		p.order = slices.Insert(p.order, at, n)
	}
	if !u.global {
		n.placed = with(n.placed, u, by)
	}
	if r := u.Requirements; reserves(r) {
		n.memory += int64(by) * r.Memory
		n.cpu += int64(by) * r.CPU
		for name, amount := range r.Counters {
			if n.counters == nil {
				n.counters = map[string]int64{}
			}
			n.counters[name] += int64(by) * amount
		}
	}
	if u.patterns != nil {
		if n.owners == nil {
			n.owners, n.matched = map[*pattern][]*unitPlan{}, map[*pattern][]*unitPlan{}
		}
		for _, list := range [][]*pattern{u.patterns.conflicts, u.patterns.replaces} {
			for _, pt := range list {
				n.owners[pt] = with(n.owners[pt], u, by)
			}
		}
		for _, list := range [][]*pattern{u.patterns.conflictedBy, u.patterns.replacedBy} {
			for _, pt := range list {
				n.matched[pt] = with(n.matched[pt], u, by)
			}
		}
	}
	if u.group != nil {
		u.group.count(n, by)
	}
}

// with returns the list with the unit or, if by is negative, without it.
func with(list []*unitPlan, u *unitPlan, by int) []*unitPlan {
	if by > 0 {
		return append(list, u)
	}
	i := slices.Index(list, u)
	return slices.Delete(list, i, i+1)
}

// pattern is one pattern of Conflicts or Replaces, and the units whose name it
// matches, wherever they are.
type pattern struct {
	text  string
	names []*unitPlan
}

// patterns are all patterns of one option. They are found by what a name must
// begin with, so that not each name is tried with each pattern.
type patterns struct {
	exact   map[string]*pattern   // those without wildcards
	globs   map[string][]*pattern // the others, by the text before the first wildcard
	lengths []int                 // of the keys of globs
}

func (ps *patterns) none() bool { return len(ps.exact)+len(ps.globs) == 0 }

// of returns the patterns of these texts, each once.
func (ps *patterns) of(texts []string) []*pattern {
	var found []*pattern
	for _, text := range texts {
		if pt := ps.one(text); !slices.Contains(found, pt) {
			found = append(found, pt)
		}
	}
	return found
}

func (ps *patterns) one(text string) *pattern {
	if ps.exact == nil {
		ps.exact, ps.globs = map[string]*pattern{}, map[string][]*pattern{}
	}
	wildcard := strings.IndexAny(text, `*?[\`)
	if wildcard < 0 {
		if ps.exact[text] == nil {
			ps.exact[text] = &pattern{text: text}
		}
		return ps.exact[text]
	}
	same := ps.globs[text[:wildcard]]
	if i := slices.IndexFunc(same, func(pt *pattern) bool { return pt.text == text }); i >= 0 {
		return same[i]
	}
	pt := &pattern{text: text}
	ps.globs[text[:wildcard]] = append(same, pt)
	if !slices.Contains(ps.lengths, wildcard) {
		ps.lengths = append(ps.lengths, wildcard)
	}
	return pt
}

// match returns the patterns that match a name.
func (ps *patterns) match(name string) []*pattern {
	var found []*pattern
	if pt := ps.exact[name]; pt != nil {
		found = append(found, pt)
	}
	for _, n := range ps.lengths {
		if n > len(name) {
			continue
		}
		for _, pt := range ps.globs[name[:n]] {
			if ok, err := path.Match(pt.text, name); ok && err == nil {
				found = append(found, pt)
			}
		}
	}
	return found
}
