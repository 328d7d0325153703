package engine

import (
	"cmp"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	gocmp "github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"flotilla/internal/registry"
	"flotilla/internal/store"
	"flotilla/internal/unit"
)

// model is what the records say, read plainly and without the Cluster: the rules
// once more, each in the simplest words.
type model struct {
	machines   map[string]registry.Machine
	created    map[string]int64
	settings   map[string]registry.Settings
	metadata   map[string]map[string]string
	units      map[string]registry.Unit
	unitMade   map[string]int64
	req        map[string]*unit.Requirements
	placements map[string]registry.Placement
	entries    map[string]registry.Entry // by machine/unit
	unplaced   map[string]string
	moves      map[string]registry.Move
	solo       string
	failover   registry.Failover
	running    map[string][]string // by machine: placed and global units
}

func must[R registry.Record](kv store.KV) R {
	r, err := registry.Decode[R](kv.Value)
	if err != nil {
		panic(err)
	}
	return r
}

func (w *world) model() *model {
	m := &model{machines: map[string]registry.Machine{}, created: map[string]int64{}, settings: map[string]registry.Settings{}, metadata: map[string]map[string]string{},
		units: map[string]registry.Unit{}, unitMade: map[string]int64{}, req: map[string]*unit.Requirements{}, placements: map[string]registry.Placement{},
		entries: map[string]registry.Entry{}, unplaced: map[string]string{}, moves: map[string]registry.Move{}, running: map[string][]string{}}
	for key, kv := range w.records {
		kind, name, _ := strings.Cut(strings.TrimPrefix(key, keys.Prefix), "/")
		switch kind {
		case "machines":
			m.machines[name], m.created[name] = must[registry.Machine](kv), kv.CreateRevision
		case "settings":
			m.settings[name] = must[registry.Settings](kv)
		case "units":
			u := must[registry.Unit](kv)
			m.units[name], m.unitMade[name], m.req[name] = u, kv.CreateRevision, requirements(name, u.Text)
		case "placements":
			m.placements[name] = must[registry.Placement](kv)
		case "schedules":
			m.entries[name] = must[registry.Entry](kv)
		case "unplaced":
			m.unplaced[name] = must[registry.Unplaced](kv).Reason
		case "moves":
			m.moves[name] = must[registry.Move](kv)
		case "solo":
			m.solo = must[registry.Solo](kv).Machine
		case "failover":
			m.failover = must[registry.Failover](kv)
		}
	}
	for name := range m.placements {
		if m.req[name] == nil {
			m.req[name] = &unit.Requirements{Unit: name}
			for key, e := range m.entries {
				if strings.HasSuffix(key, "/"+name) {
					m.req[name] = requirements(name, e.Text)
				}
			}
		}
	}
	var globals []registry.Claim
	for name, u := range m.units {
		if _, placed := m.placements[name]; u.Desired != registry.Inactive && m.req[name].Global && !placed {
			globals = append(globals, registry.Claim{Name: name, Requirements: m.req[name], Epoch: m.unitMade[name]})
		}
	}
	placed := map[string][]registry.Claim{}
	for name, p := range m.placements {
		placed[p.Machine] = append(placed[p.Machine], registry.Claim{Name: name, Requirements: m.req[name], Epoch: p.Epoch})
		m.running[p.Machine] = append(m.running[p.Machine], name)
	}
	for id, rec := range m.machines {
		m.metadata[id] = m.settings[id].Merge(rec.Metadata)
		if rec.Units {
			run, _ := registry.GlobalsOn(id, m.metadata[id], placed[id], globals)
			m.running[id] = append(m.running[id], run...)
		}
	}
	return m
}

func (m *model) wanted(name string) bool {
	u, ok := m.units[name]
	return ok && u.Desired != registry.Inactive
}

// epoch tells who was first.
func (m *model) epoch(name string) int64 {
	if p, ok := m.placements[name]; ok {
		return p.Epoch
	}
	return m.unitMade[name]
}

// mayBe returns why the unit cannot be on the machine, "" if it can, now
// (fresh) or still.
func (m *model) mayBe(name, id string, fresh bool) string {
	rec, ok := m.machines[id]
	req, s := m.req[name], m.settings[id]
	switch {
	case !ok:
		return "no machine"
	case !rec.Units || s.Drain || fresh && s.Cordon:
		return "closed"
	case req.Mismatch(id, m.metadata[id]) != "":
		return "mismatch"
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
		case !placed || p.Machine != id || m.entries[id+"/"+peer].Release != "":
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
		if registry.Conflict(registry.Claim{Name: name, Requirements: req}, registry.Claim{Name: other, Requirements: o}) {
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
	for key, e := range m.entries {
		id, name, _ := strings.Cut(key, "/")
		if e.Release != "" && m.created[id] != 0 {
			fault("%s is still to be released", key)
		}
		if p := m.placements[name]; id != registry.Global && p.Machine != id {
			fault("entry %s has no placement", key)
		}
	}
	for name := range m.moves {
		if p := m.placements[name]; m.created[p.Machine] != 0 || !slices.Contains(m.failover.Held, p.Machine) {
			if m.solo != p.Machine || m.created[p.Machine] != 0 || !m.req[name].Exclusive {
				fault("the move of %s stands", name)
			}
		}
	}
	held := func(id string) bool {
		return slices.Contains(m.failover.Held, id) && !m.failover.Allowed && now.Before(time.Unix(m.failover.Until, 0))
	}
	for name, p := range m.placements {
		gone := m.created[p.Machine] == 0
		protected := gone && m.solo == p.Machine && m.req[name].Exclusive
		e, u := m.entries[p.Machine+"/"+name], m.units[name]
		switch {
		case protected:
		case !m.wanted(name):
			fault("%s is placed and not wanted", name)
		case gone && held(p.Machine):
		case gone:
			for id := range m.machines {
				if m.mayBe(name, id, true) == "" {
					fault("%s is on %s, which is gone, and could be on %s", name, p.Machine, id)
				}
			}
			if m.unplaced[name] == "" {
				fault("%s on %s, which is gone, has no explanation", name, p.Machine)
			}
		case m.req[name].Global:
			fault("%s is global and placed", name)
		case p.Generation != m.created[p.Machine]:
			fault("%s has generation %d of %s, which is in %d", name, p.Generation, p.Machine, m.created[p.Machine])
		case m.mayBe(name, p.Machine, false) != "":
			fault("%s cannot be on %s: %s", name, p.Machine, m.mayBe(name, p.Machine, false))
		case e != registry.Entry{V: 1, Text: u.Text, Desired: u.Desired, Restarts: u.Restarts, Generation: p.Generation, Epoch: p.Epoch}:
			fault("entry of %s is %+v", name, e)
		case m.unplaced[name] != "":
			fault("%s is placed and explained: %s", name, m.unplaced[name])
		case p.Reason == "":
			fault("%s is placed for no reason", name)
		}
	}
	for name, u := range m.units {
		_, placed := m.placements[name]
		e, global := m.entries["global/"+name]
		switch {
		case !m.wanted(name):
			if global || m.unplaced[name] != "" {
				fault("%s is not wanted and has records", name)
			}
		case placed:
		case m.req[name].Global:
			if e != (registry.Entry{V: 1, Text: u.Text, Desired: u.Desired, Restarts: u.Restarts, Epoch: m.unitMade[name]}) {
				fault("global entry of %s is %+v", name, e)
			}
		default:
			for id := range m.machines {
				if m.mayBe(name, id, true) == "" {
					fault("%s is nowhere and could be on %s", name, id)
				}
			}
			if m.unplaced[name] == "" {
				fault("%s is nowhere without explanation", name)
			}
			if global {
				fault("%s is not global and has such an entry", name)
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
		if why := m.mayBe(s.Unit, s.Machine, true); why != "" {
			return why
		}
		if p, placed := m.placements[s.Unit]; placed && (p.Machine != s.From || m.created[s.From] != 0) {
			return "it is placed on " + p.Machine
		}
	case s.Do == Release && m.wanted(s.Unit) && !moves && !m.req[s.Unit].Global:
		if why := m.mayBe(s.Unit, s.Machine, false); why == "" {
			return "it may stay"
		}
	}
	return ""
}

var (
	someMachines = []string{"m1", "m2", "m3", "m4", "m5"}
	someUnits    = []string{"a.service", "b.service", "c.service", "d.service", "g.service", "web@1.service", "web@2.service", "web@3.service", "x.service", "y.service"}
	someOptions  = []string{
		"Conflicts=web@*", "Conflicts=a.service", "Conflicts=b.service c.service", "Conflicts=*",
		"MachineOf=a.service", "MachineOf=g.service", "MachineOf=x.service", "Global=yes", "Global=yes", "Exclusive=yes",
		"MachineMetadata=disk=ssd", "MachineMetadata=zone=a", "MachineID=m2", "Where=zone != a",
		"Replaces=a.service", "Replaces=b.service", "Replaces=web@*", "Replaces=x.service",
		"MemoryReserve=1", "MemoryReserve=2", "CounterReserve=gpu=1", "Spread=no", "SpreadOver=disk",
	}
)

// event changes a record as operators, agents and machines would.
func (w *world) event(r interface{ IntN(int) int }) string {
	pick := func(list []string) string { return list[r.IntN(len(list))] }
	name, id := pick(someUnits), pick(someMachines)
	_, has := w.records[keys.Unit(name)]
	_, there := w.records[keys.Machine(id)]
	switch n := r.IntN(22); {
	case n < 6 || n < 12 && !has:
		var options []string
		for range r.IntN(3) {
			options = append(options, pick(someOptions))
		}
		if requirements(name, "[X-Fleet]\n"+strings.Join(options, "\n")+"\n") == nil {
			options = nil
		}
		desired := []registry.Desired{registry.Launched, registry.Launched, registry.Loaded, registry.Inactive}[r.IntN(4)]
		w.unit(name, desired, options...)
		return fmt.Sprint("unit ", name, " ", desired, " ", options)
	case n < 7:
		w.del(keys.Unit(name))
		return "destroy " + name
	case n < 9:
		desired := []registry.Desired{registry.Launched, registry.Loaded, registry.Inactive}[r.IntN(3)]
		w.desire(name, desired)
		return fmt.Sprint(desired, " ", name)
	case n < 10:
		u := w.want(name)
		u.Restarts++
		w.put(keys.Unit(name), registry.Encode(u))
		return "restart " + name
	case n < 12:
		to := pick(someMachines)
		w.put(keys.Move(name), registry.Encode(registry.Move{V: registry.Version, To: to}))
		return "move " + name + " " + to
	case n < 16 && there:
		w.del(keys.Machine(id))
		return "gone " + id
	case n < 18:
		words := []string{[]string{"zone=a", "zone=b"}[r.IntN(2)], []string{"disk=ssd", "disk=hdd"}[r.IntN(2)], fmt.Sprint("memory=", r.IntN(4)), fmt.Sprint("gpu#", r.IntN(2))}
		if r.IntN(10) == 0 {
			words = append(words, "nounits")
		}
		w.machine(id, func(m *registry.Machine) { describe(m, words) })
		return fmt.Sprint("machine ", id, " ", words)
	case n < 20:
		w.settings(id, func(s *registry.Settings) {
			s.Cordon, s.Drain = r.IntN(4) == 0, r.IntN(4) == 0
			s.Metadata["disk"] = []string{"", "ssd", "hdd"}[r.IntN(3)]
		})
		return "settings " + id
	case n < 21:
		if _, has := w.records[keys.Solo()]; has {
			w.del(keys.Solo())
			return "no solo"
		}
		w.put(keys.Solo(), registry.Encode(registry.Solo{V: registry.Version, Machine: id}))
		return "solo " + id
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
		if a, b := fresh(w, r), fresh(w, r); !gocmp.Equal(a, b) {
			fatalf("two plans of the same records differ:\n%s", gocmp.Diff(a, b))
		}
		rounds := 0
		for quiet := false; !quiet; rounds++ {
			steps := w.plan()
			// Which global units run changes when others lose the place or the
			// seniority they had: the plan sees that only in the next pass.
			unsettled := slices.ContainsFunc(steps, func(s Step) bool { return s.Do == Refresh || s.Do == Forget })
			for _, s := range steps {
				log = append(log, "  "+s.String())
				if why := w.model().cause(s); why != "" && !(s.Do == Place && unsettled && strings.HasPrefix(why, "conflict")) {
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
		for _, s := range fresh(w, r) {
			if s.Do != Explain && s.Do != Hold {
				fatalf("one who knows the records alone would: %s", s)
			}
		}
	}
}

// fresh is the plan of a Cluster that has just read the records, in any order.
func fresh(w *world, r interface{ IntN(int) int }) []Step {
	all := slices.SortedFunc(maps.Values(w.records), func(a, b store.KV) int { return strings.Compare(a.Key, b.Key) })
	rand.New(rand.NewPCG(uint64(r.IntN(1000)), 0)).Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
	steps, _ := Load(keys, all, w.revision).Plan(w.now)
	return steps
}
