package engine

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"flotilla/internal/registry"
	"flotilla/internal/store"
	"flotilla/internal/unit"
)

var keys = registry.Keys{Prefix: "/flotilla/"}

// world is a store and agents for tests of the plan: every change of a record
// is fed to the cluster at once.
type world struct {
	c        *Cluster
	records  map[string]store.KV
	revision int64
	now      time.Time
	next     time.Time // when Plan wants to be called
}

func newWorld() *world {
	return &world{c: NewCluster(keys), records: map[string]store.KV{}, now: time.Unix(1_000_000, 0)}
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
	w.c.Set(kv)
	w.c.Advance(w.revision)
}

func (w *world) del(key string) {
	w.revision++
	w.erase(key)
}

func (w *world) erase(key string) {
	if _, ok := w.records[key]; ok {
		delete(w.records, key)
		w.c.Delete(key)
	}
	w.c.Advance(w.revision)
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
	var steps []Step
	steps, w.next = w.c.Plan(w.now)
	return steps
}

// agents has every machine that is there stop and forget what it is to release.
func (w *world) agents() (done int) {
	for _, key := range w.under("schedules/") {
		id, name, _ := strings.Cut(strings.TrimPrefix(key, keys.Prefix+"schedules/"), "/")
		e, err := registry.Decode[registry.Entry](w.records[key].Value)
		if _, there := w.records[keys.Machine(id)]; err != nil || !there || e.Release == "" {
			continue
		}
		done++
		w.revision++
		w.erase(key)
		w.erase(keys.Placement(name))
	}
	return done
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

// settle plans, writes and lets agents work until nothing is left to do, and
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

func (w *world) unit(name string, desired registry.Desired, options ...string) {
	text := "[Service]\nExecStart=/bin/true\n"
	if len(options) > 0 {
		text += "[X-Fleet]\n" + strings.Join(options, "\n") + "\n"
	}
	w.put(keys.Unit(name), registry.Encode(registry.Unit{V: registry.Version, Text: text, Desired: desired}))
}

func (w *world) want(name string) registry.Unit {
	u, _ := registry.Decode[registry.Unit](w.records[keys.Unit(name)].Value)
	return u
}

func (w *world) desire(name string, desired registry.Desired) {
	u := w.want(name)
	u.Desired = desired
	w.put(keys.Unit(name), registry.Encode(u))
}

func (w *world) machine(id string, change func(*registry.Machine)) {
	m := registry.Machine{V: registry.Version, ID: id, Node: "node-" + id, Units: true, Metadata: map[string]string{}, Counters: map[string]int64{}}
	if change != nil {
		change(&m)
	}
	w.put(keys.Machine(id), registry.Encode(m))
}

func (w *world) settings(id string, change func(*registry.Settings)) {
	s, err := registry.Decode[registry.Settings](w.records[keys.Settings(id)].Value)
	if err != nil {
		s = registry.Settings{V: registry.Version, Metadata: map[string]string{}}
	}
	if s.Metadata == nil {
		s.Metadata = map[string]string{}
	}
	change(&s)
	w.put(keys.Settings(id), registry.Encode(s))
}

// placement returns where a unit is placed; "" if it is nowhere.
func (w *world) placement(name string) registry.Placement {
	p, _ := registry.Decode[registry.Placement](w.records[keys.Placement(name)].Value)
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
