package engine

import (
	"cmp"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"flotilla/internal/state"
	"flotilla/internal/store"
	"flotilla/internal/unit"
)

// model is what the records say, read plainly: the rules once more, each in the
// simplest words.
type model struct {
	nodes      map[string]state.NodeRecord
	created    map[string]int64
	settings   map[string]state.Settings
	metadata   map[string]map[string]string
	units      map[string]state.UnitRecord
	unitMade   map[string]int64
	req        map[string]*unit.Requirements
	placements map[string]state.Placement
	unplaced   map[string]string
	moves      map[string]state.Move
	failover   state.Failover
	running    map[string][]string // by node: placed and global units
	troubled   map[string]bool     // units that are in trouble where they are placed
	away       map[unitOnNode]bool // units that stay away from a node
}

func must[R state.Record](kv store.KV) R {
	r, err := state.Decode[R](kv.Value)
	if err != nil {
		panic(err)
	}
	return r
}

func (w *world) model() *model {
	m := &model{nodes: map[string]state.NodeRecord{}, created: map[string]int64{}, settings: map[string]state.Settings{}, metadata: map[string]map[string]string{},
		units: map[string]state.UnitRecord{}, unitMade: map[string]int64{}, req: map[string]*unit.Requirements{}, placements: map[string]state.Placement{},
		unplaced: map[string]string{}, moves: map[string]state.Move{}, running: map[string][]string{}}
	for key, kv := range w.records {
		kind, name, _ := strings.Cut(strings.TrimPrefix(key, keys.Prefix+"cluster/"), "/")
		switch kind {
		case "nodes":
			m.nodes[name], m.created[name] = must[state.NodeRecord](kv), kv.CreateRevision
		case "settings":
			m.settings[name] = must[state.Settings](kv)
		case "units":
			u := must[state.UnitRecord](kv)
			m.units[name], m.unitMade[name], m.req[name] = u, kv.CreateRevision, requirements(name, u.Text)
		case "placements":
			m.placements[name] = must[state.Placement](kv)
		case "unplaced":
			m.unplaced[name] = must[state.Unplaced](kv).Reason
		case "moves":
			m.moves[name] = must[state.Move](kv)
		case "failover":
			m.failover = must[state.Failover](kv)
		}
	}
	m.troubled, m.away = map[string]bool{}, map[unitOnNode]bool{}
	for _, key := range w.under("reports/units/") {
		for name, u := range must[state.UnitsReport](w.records[key]).Units {
			p := m.placements[name]
			m.troubled[name] = m.troubled[name] || u.Trouble != "" && keys.UnitsReport(p.Node) == key && p.Epoch == u.Epoch
		}
	}
	for key, b := range w.memory.backOff {
		m.away[key] = w.now.Before(b.until)
	}
	for name := range m.placements { // of one that was destroyed the last file counts, as the plan remembers it
		if m.req[name] == nil {
			m.req[name] = w.snapshot().Units[name].Requirements
		}
	}
	var globals []state.Claim
	for name, u := range m.units {
		if _, placed := m.placements[name]; u.Desired != unit.Inactive && m.req[name].Global && !placed {
			globals = append(globals, state.Claim{Name: name, Requirements: m.req[name], Epoch: m.unitMade[name]})
		}
	}
	placed := map[string][]state.Claim{}
	for name, p := range m.placements {
		placed[p.Node] = append(placed[p.Node], state.Claim{Name: name, Requirements: m.req[name], Epoch: p.Epoch})
		m.running[p.Node] = append(m.running[p.Node], name)
	}
	for id, rec := range m.nodes {
		m.metadata[id] = m.settings[id].Merge(rec.Metadata)
		if rec.Units {
			run, _ := state.GlobalsOn(id, m.metadata[id], placed[id], globals)
			m.running[id] = append(m.running[id], run...)
		}
	}
	return m
}

func (m *model) wanted(name string) bool {
	u, ok := m.units[name]
	return ok && u.Desired != unit.Inactive
}

// epoch tells who was first.
func (m *model) epoch(name string) int64 {
	if p, ok := m.placements[name]; ok {
		return p.Epoch
	}
	return m.unitMade[name]
}

// mayBe returns why the unit cannot be on the node, "" if it can, now
// (fresh) or still.
func (m *model) mayBe(name, id string, fresh bool) string {
	rec, ok := m.nodes[id]
	req, s := m.req[name], m.settings[id]
	switch {
	case !ok:
		return "no node"
	case !rec.Units || s.Drain || fresh && s.Cordon:
		return "closed"
	case req.Mismatch(id, m.metadata[id]) != "":
		return "mismatch"
	case fresh && m.away[unitOnNode{name, id}]:
		return "it was in trouble there"
	}
	for _, peer := range req.MachineOf {
		p, placed := m.placements[peer]
		switch {
		case !m.wanted(peer):
			return "peer is inactive"
		case m.req[peer].Global && !placed:
			if !slices.Contains(m.running[id], peer) {
				return "global peer is not there"
			}
		case !placed || p.Node != id || p.Leave != "":
			return "peer is not there"
		}
	}
	memory, gpus := int64(0), int64(0)
	for _, other := range m.running[id] {
		o := m.req[other]
		if fresh || other == name || cmp.Or(cmp.Compare(m.epoch(other), m.epoch(name)), strings.Compare(other, name)) < 0 {
			memory, gpus = memory+o.Memory, gpus+o.Counters["gpu"]
		}
		if other == name {
			continue
		}
		if state.Conflict(state.Claim{Name: name, Requirements: req}, state.Claim{Name: other, Requirements: o}) {
			return "conflict with " + other
		}
		_, pushes := o.Replacing(name)
		_, pushed := req.Replacing(other)
		if pushes && !pushed {
			return "replaced by " + other
		}
		if fresh && pushed && !pushes && m.drives(other, name, map[string]bool{}) {
			return "entangled with " + other
		}
	}
	if fresh {
		memory, gpus = memory+req.Memory, gpus+req.Counters["gpu"]
	}
	if req.Memory > 0 && memory > rec.Memory || req.Counters["gpu"] > 0 && gpus > rec.Counters["gpu"] {
		return "no room"
	}
	for other := range m.placements {
		_, a := m.req[other].Replacing(name)
		_, b := req.Replacing(other)
		first := fresh || cmp.Or(cmp.Compare(m.epoch(other), m.epoch(name)), strings.Compare(other, name)) < 0
		if a && b && other != name && first && m.wanted(other) && !(strings.HasPrefix(name, "web@") && strings.HasPrefix(other, "web@")) {
			return "rival " + other
		}
	}
	return ""
}

// drives reports whether the second unit has to leave when the first one does,
// or when it comes.
func (m *model) drives(first, second string, seen map[string]bool) bool {
	seen[first] = true
	for name, req := range m.req {
		_, replaced := m.req[first].Replacing(name)
		if !replaced && !slices.Contains(req.MachineOf, first) {
			continue
		}
		if name == second || !seen[name] && m.wanted(name) && m.drives(name, second, seen) {
			return true
		}
	}
	return false
}

// faults returns what is wrong when nothing is left to do.
func (m *model) faults(now time.Time) []string {
	var found []string
	fault := func(format string, args ...any) { found = append(found, fmt.Sprintf(format, args...)) }
	for name := range m.moves {
		if p := m.placements[name]; m.created[p.Node] != 0 || !slices.Contains(m.failover.Held, p.Node) {
			fault("the move of %s stands", name)
		}
	}
	held := func(id string) bool {
		return slices.Contains(m.failover.Held, id) && !m.failover.Allowed && now.Before(time.Unix(m.failover.Until, 0))
	}
	for name, p := range m.placements {
		gone := m.created[p.Node] == 0
		switch {
		case !m.wanted(name):
			fault("%s is placed and not wanted", name)
		case gone && held(p.Node):
		case gone:
			for id := range m.nodes {
				if m.mayBe(name, id, true) == "" {
					fault("%s is on %s, which is gone, and could be on %s", name, p.Node, id)
				}
			}
			if m.unplaced[name] == "" {
				fault("%s on %s, which is gone, has no explanation", name, p.Node)
			}
		case m.req[name].Global:
			fault("%s is global and placed", name)
		case p.Generation != m.created[p.Node]:
			fault("%s has generation %d of %s, which is in %d", name, p.Generation, p.Node, m.created[p.Node])
		case m.mayBe(name, p.Node, false) != "":
			fault("%s cannot be on %s: %s", name, p.Node, m.mayBe(name, p.Node, false))
		case p.Leave != "":
			fault("%s is still to leave", name)
		case p.Approved != hashOf(m.units[name].Text):
			fault("the file of %s is not approved", name)
		case m.unplaced[name] != "":
			fault("%s is placed and explained: %s", name, m.unplaced[name])
		case p.Reason == "":
			fault("%s is placed for no reason", name)
		}
	}
	for name := range m.units {
		_, placed := m.placements[name]
		switch {
		case !m.wanted(name), m.req[name].Global && !placed:
			if m.unplaced[name] != "" {
				fault("%s is not to be placed and is explained: %s", name, m.unplaced[name])
			}
		case placed:
		default:
			for id := range m.nodes {
				if m.mayBe(name, id, true) == "" {
					fault("%s is nowhere and could be on %s", name, id)
				}
			}
			if m.unplaced[name] == "" {
				fault("%s is nowhere without explanation", name)
			}
		}
	}
	slices.Sort(found)
	return found
}

// cause checks one step before it is done.
func (m *model) cause(s Step) string {
	_, moves := m.moves[s.Unit]
	switch {
	case s.Reason == "":
		return "it has no reason"
	case s.Do == Place:
		if why := m.mayBe(s.Unit, s.Node, true); why != "" {
			return why
		}
		if p, placed := m.placements[s.Unit]; placed && (p.Node != s.From || m.created[s.From] != 0) {
			return "it is placed on " + p.Node
		}
	case s.Do == Leave && m.wanted(s.Unit) && !moves && !m.req[s.Unit].Global && !m.troubled[s.Unit]:
		if why := m.mayBe(s.Unit, s.Node, false); why == "" {
			return "it may stay"
		}
	}
	return ""
}

var (
	someNodes   = []string{"m1", "m2", "m3", "m4", "m5"}
	someUnits   = []string{"a.service", "b.service", "c.service", "d.service", "g.service", "web@1.service", "web@2.service", "web@3.service", "x.service", "y.service"}
	someOptions = []string{
		"Conflicts=web@*", "Conflicts=a.service", "Conflicts=b.service c.service", "Conflicts=*",
		"MachineOf=a.service", "MachineOf=g.service", "MachineOf=x.service", "Global=yes", "Global=yes", "Exclusive=yes",
		"MachineMetadata=disk=ssd", "MachineMetadata=zone=a", "MachineID=m2", "Where=zone != a",
		"Replaces=a.service", "Replaces=b.service", "Replaces=web@*", "Replaces=x.service",
		"MemoryReserve=1", "MemoryReserve=2", "CounterReserve=gpu=1", "Spread=no", "SpreadOver=disk",
	}
)

// event changes a record as operators and nodes would.
func (w *world) event(r interface{ IntN(int) int }) string {
	pick := func(list []string) string { return list[r.IntN(len(list))] }
	name, id := pick(someUnits), pick(someNodes)
	_, has := w.records[keys.Unit(name)]
	_, there := w.records[keys.Node(id)]
	switch n := r.IntN(23); {
	case n < 6 || n < 12 && !has:
		var options []string
		for range r.IntN(3) {
			options = append(options, pick(someOptions))
		}
		if requirements(name, "[X-Fleet]\n"+strings.Join(options, "\n")+"\n") == nil {
			options = nil
		}
		desired := []unit.Desired{unit.Launched, unit.Launched, unit.Loaded, unit.Inactive}[r.IntN(4)]
		w.unit(name, desired, options...)
		return fmt.Sprint("unit ", name, " ", desired, " ", options)
	case n < 7:
		w.del(keys.Unit(name))
		return "destroy " + name
	case n < 9:
		desired := []unit.Desired{unit.Launched, unit.Loaded, unit.Inactive}[r.IntN(3)]
		w.desire(name, desired)
		return fmt.Sprint(desired, " ", name)
	case n < 10:
		u := w.want(name)
		u.Restarts++
		w.put(keys.Unit(name), state.Encode(u))
		return "restart " + name
	case n < 12:
		to := pick(someNodes)
		w.put(keys.Move(name), state.Encode(state.Move{V: state.Version, To: to}))
		return "move " + name + " " + to
	case n < 16 && there:
		w.gone(id)
		return "gone " + id
	case n < 18:
		words := []string{[]string{"zone=a", "zone=b"}[r.IntN(2)], []string{"disk=ssd", "disk=hdd"}[r.IntN(2)], fmt.Sprint("memory=", r.IntN(4)), fmt.Sprint("gpu#", r.IntN(2))}
		if r.IntN(10) == 0 {
			words = append(words, "nounits")
		}
		w.node(id, func(n *state.NodeRecord) { describe(n, words) })
		return fmt.Sprint("node ", id, " ", words)
	case n < 20:
		w.settings(id, func(s *state.Settings) {
			s.Cordon, s.Drain = r.IntN(4) == 0, r.IntN(4) == 0
			s.Metadata["disk"] = []string{"", "ssd", "hdd"}[r.IntN(3)]
		})
		return "settings " + id
	case n < 22:
		id := w.placement(name).Node
		if _, there := w.records[keys.Node(id)]; !there {
			return "nothing"
		}
		trouble := []string{"", "bad setting"}[r.IntN(2)]
		w.report(id, map[string]state.UnitState{name: {Epoch: w.placement(name).Epoch, Trouble: trouble}})
		return fmt.Sprintf("%s reports %s: %q", id, name, trouble)
	default:
		w.now = w.now.Add([]time.Duration{time.Minute, 6 * time.Minute, 11 * time.Minute}[r.IntN(3)])
		return "time"
	}
}

type draw struct{ t *rapid.T }

func (d draw) IntN(n int) int { return rapid.IntRange(0, n-1).Draw(d.t, "n") }

// The plan against the model: after any events and whenever nothing is left to
// do every unit is where it may be, or nowhere and there is no place for it; no
// step is without cause; and one that knows nothing but the records would not do
// anything else.
func TestPlanConverges(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) { converge(t, draw{t}, rapid.IntRange(1, 40).Draw(t, "events")) })
}

// The same with more and longer histories than rapid draws.
func TestPlanConvergesLong(t *testing.T) {
	n := 150
	if testing.Short() {
		n = 20
	}
	for seed := range uint64(n) {
		converge(t, rand.New(rand.NewPCG(seed, 1)), 60)
		if t.Failed() {
			t.Fatalf("seed %d", seed)
		}
	}
}

type fataler interface {
	Helper()
	Fatalf(string, ...any)
}

func converge(t fataler, r interface{ IntN(int) int }, events int) {
	w := newWorld()
	var log []string
	fatalf := func(format string, args ...any) {
		t.Helper()
		t.Fatalf("%s\n%s", fmt.Sprintf(format, args...), strings.Join(log, "\n"))
	}
	for range events {
		for range 1 + r.IntN(3) {
			log = append(log, w.event(r))
		}
		if r.IntN(4) == 0 {
			if why := w.impure(); why != "" {
				fatalf("%s", why)
			}
		}
		rounds := 0
		for quiet := false; !quiet; rounds++ {
			before := w.model()
			steps := w.plan()
			// Which global units run changes when others lose the place or the
			// seniority they had: the plan sees that only in the next pass.
			unsettled := slices.ContainsFunc(steps, func(s Step) bool { return s.Do == Refresh || s.Do == Forget })
			for _, s := range steps {
				log = append(log, "  "+s.String())
				why := w.model().cause(s)
				if s.Do == Leave && before.cause(s) == "" {
					why = "" // a refresh in the same plan has made it the older one meanwhile
				}
				if why != "" && !(s.Do == Place && unsettled && strings.HasPrefix(why, "conflict")) {
					fatalf("%s\n without cause: %s", s, why)
				}
				if err := w.apply(s); err != nil {
					fatalf("%v", err)
				}
			}
			quiet = len(steps) == 0
			if r.IntN(3) == 0 || quiet {
				if w.agents() > 0 {
					log = append(log, "  agents")
					quiet = false
				}
			}
			if rounds > 50 {
				fatalf("there is no end of it")
			}
		}
		if faults := w.model().faults(w.now); len(faults) > 0 {
			fatalf("%s", strings.Join(faults, "\n"))
		}
		for _, s := range Plan(Input{Snapshot: w.load(), Now: w.now}).Steps {
			if s.Do != Hold && len(w.memory.backOff) == 0 {
				fatalf("one who knows the records alone would: %s", s)
			}
		}
	}
}

// impure returns in what a plan is not a pure function of its input, "" if it is.
func (w *world) impure() string {
	a, b, memory := w.load(), w.load(), w.memory.clone()
	first := Plan(Input{Snapshot: a, Now: w.now, Memory: w.memory})
	second := Plan(Input{Snapshot: a, Now: w.now, Memory: w.memory})
	switch other := Plan(Input{Snapshot: b, Now: w.now, Memory: memory}); {
	case !same(first, second):
		return fmt.Sprintf("the same input gives two plans:\n%v\n%v", first.Steps, second.Steps)
	case !same(first, other):
		return fmt.Sprintf("two equal inputs give two plans:\n%v\n%v", first.Steps, other.Steps)
	case !same(a, w.load()):
		return "a plan has changed its snapshot"
	case !same(w.memory.clone(), memory):
		return "a plan has changed the memory that it was given"
	}
	return ""
}
