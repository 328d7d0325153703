package engine

import (
	"fmt"
	"maps"
	"reflect"
	"slices"
	"strings"
	"time"

	"flotilla/internal/state"
	"flotilla/internal/store"
	"flotilla/internal/unit"
)

var keys = state.Keys{Prefix: "/flotilla/"}

// world is a store and nodes for tests of the plan. The snapshot is folded from
// what has changed, as that of a Feed is.
type world struct {
	records  map[string]store.KV
	revision int64
	events   []store.Event // not yet in folded
	folded   *state.Snapshot
	memory   Memory
	now      time.Time
	next     time.Time // when to plan again
}

func newWorld() *world {
	return &world{folded: state.Load(keys, nil, 0), records: map[string]store.KV{}, now: time.Unix(1_000_000, 0)}
}

// snapshot returns the snapshot of the present records.
func (w *world) snapshot() *state.Snapshot {
	if len(w.events) > 0 || w.folded.Revision != w.revision {
		w.folded = state.Fold(keys, w.folded, store.Update{Revision: w.revision, Events: w.events})
		w.events = nil
	}
	return w.folded
}

// load returns a snapshot of one who has not seen the records before.
func (w *world) load() *state.Snapshot {
	return state.Load(keys, slices.Collect(maps.Values(w.records)), w.revision)
}

func (w *world) put(key, value string) {
	w.revision++
	w.write(key, value)
}

func (w *world) write(key, value string) {
	kv := store.KV{Key: key, Value: value, CreateRevision: w.revision, ModRevision: w.revision}
	if old, ok := w.records[key]; ok {
		kv.CreateRevision = old.CreateRevision
	}
	w.records[key] = kv
	w.events = append(w.events, store.Event{KV: kv})
}

func (w *world) del(key string) {
	w.revision++
	w.erase(key)
}

func (w *world) erase(key string) {
	if _, ok := w.records[key]; ok {
		delete(w.records, key)
		w.events = append(w.events, store.Event{KV: store.KV{Key: key, ModRevision: w.revision}, Deleted: true})
	}
}

// apply does a step as the store would: not at all if a guard does not hold.
func (w *world) apply(s Step) error {
	changes, guards := s.writes(keys)
	for _, g := range guards {
		kv := w.records[g.key]
		if has := kv.ModRevision; !g.created && has != g.revision {
			return fmt.Errorf("%s: %s is of revision %d and not %d", s, g.key, has, g.revision)
		}
		if has := kv.CreateRevision; g.created && has != g.revision {
			return fmt.Errorf("%s: %s is of creation %d and not %d", s, g.key, has, g.revision)
		}
	}
	w.revision++
	for _, c := range changes {
		if c.delete {
			w.erase(c.key)
		} else {
			w.write(c.key, c.value)
		}
	}
	return nil
}

func (w *world) plan() []Step {
	r := Plan(Input{Snapshot: w.snapshot(), Now: w.now, Memory: w.memory})
	w.memory, w.next = r.Memory, r.Next
	return r.Steps
}

// agents has every node that is there stop and let go of what is to leave or is
// not wanted any more.
func (w *world) agents() (done int) {
	for name := range w.snapshot().Units {
		done += w.agent(name)
	}
	return done
}

// agent does so for one unit.
func (w *world) agent(name string) (done int) {
	kv, placed := w.records[keys.Placement(name)]
	if !placed {
		return 0
	}
	p, err := state.Decode[state.Placement](kv.Value)
	if _, there := w.records[keys.Node(p.Node)]; err != nil || !there || p.Leave == "" && w.wanted(name) {
		return 0
	}
	w.del(keys.Placement(name))
	return 1
}

// wanted reports whether a unit is to be somewhere, or may be.
func (w *world) wanted(name string) bool {
	kv, ok := w.records[keys.Unit(name)]
	u, err := state.Decode[state.UnitRecord](kv.Value)
	return ok && (err != nil || u.Desired != unit.Inactive)
}

func (w *world) under(prefix string) []string {
	var found []string
	for key := range w.records {
		if strings.HasPrefix(key, keys.Prefix+prefix) {
			found = append(found, key)
		}
	}
	slices.Sort(found)
	return found
}

// settle plans, writes and lets nodes work until nothing is left to do, and
// returns all steps.
func (w *world) settle() ([]Step, error) {
	var all []Step
	for range 100 {
		steps := w.plan()
		for _, s := range steps {
			if err := w.apply(s); err != nil {
				return all, err
			}
		}
		all = append(all, steps...)
		if w.agents() == 0 && len(steps) == 0 {
			return all, nil
		}
	}
	return all, fmt.Errorf("there is no end of it, at last %v", all[max(0, len(all)-5):])
}

func (w *world) unit(name string, desired unit.Desired, options ...string) {
	text := "[Service]\nExecStart=/bin/true\n"
	if len(options) > 0 {
		text += "[X-Fleet]\n" + strings.Join(options, "\n") + "\n"
	}
	w.put(keys.Unit(name), state.Encode(state.UnitRecord{V: state.Version, Text: text, Desired: desired}))
}

func (w *world) want(name string) state.UnitRecord {
	u, _ := state.Decode[state.UnitRecord](w.records[keys.Unit(name)].Value)
	return u
}

func (w *world) desire(name string, desired unit.Desired) {
	u := w.want(name)
	u.Desired = desired
	w.put(keys.Unit(name), state.Encode(u))
}

func (w *world) node(id string, change func(*state.NodeRecord)) {
	n := state.NodeRecord{V: state.Version, ID: id, Name: "node-" + id, Units: true, Metadata: map[string]string{}, Counters: map[string]int64{}}
	if change != nil {
		change(&n)
	}
	w.put(keys.Node(id), state.Encode(n))
}

// gone ends the lease of a node.
func (w *world) gone(id string) {
	w.revision++
	w.erase(keys.Node(id))
	w.erase(keys.UnitsReport(id))
}

// report has the engine see what a node says of its units, even if it does not
// plan before the next change.
func (w *world) report(id string, units map[string]state.UnitState) {
	w.put(keys.UnitsReport(id), state.Encode(state.UnitsReport{V: state.Version, Units: units}))
	w.memory = w.memory.Saw(w.snapshot())
}

func (w *world) settings(id string, change func(*state.Settings)) {
	s, err := state.Decode[state.Settings](w.records[keys.Settings(id)].Value)
	if err != nil {
		s = state.Settings{V: state.Version, Metadata: map[string]string{}}
	}
	if s.Metadata == nil {
		s.Metadata = map[string]string{}
	}
	change(&s)
	w.put(keys.Settings(id), state.Encode(s))
}

// placement returns where a unit is placed; "" if it is nowhere.
func (w *world) placement(name string) state.Placement {
	p, _ := state.Decode[state.Placement](w.records[keys.Placement(name)].Value)
	return p
}

func requirements(name, text string) *unit.Requirements {
	f, err := unit.Parse(text)
	if err != nil {
		return nil
	}
	n, _ := unit.SplitName(name)
	r, problems := f.Check(n)
	if unit.Refusal(problems) != nil {
		return nil
	}
	return r
}

func hashOf(text string) string {
	f, err := unit.Parse(text)
	if err != nil {
		return ""
	}
	return f.Hash().String()
}

// same compares all of two values, also what steps were planned from.
func same(a, b any) bool { return reflect.DeepEqual(a, b) }
