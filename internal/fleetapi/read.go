package fleetapi

import (
	"cmp"
	"context"
	"maps"
	"path"
	"slices"
	"strings"
	"sync"

	"flotilla/internal/registry"
	"flotilla/internal/store"
	"flotilla/internal/unit"
	"flotilla/internal/unitapi"
)

// record is one record of the store; err says why it cannot be used.
type record[R registry.Record] struct {
	registry R
	store.KV
	found bool
	err   error
}

func recordOf[R registry.Record](kv store.KV, found bool) record[R] {
	r := record[R]{KV: kv, found: found}
	if found {
		r.registry, r.err = registry.Decode[R](kv.Value)
	}
	return r
}

// decoded remembers what records say, since most of the work of a list would be
// to decode the same ones again. What it returns must not be changed.
type decoded[R registry.Record] struct {
	mu    sync.Mutex
	known map[string]record[R] // by key; guarded by mu
}

// mostKnown records are remembered, then it begins anew.
const mostKnown = 1 << 17

func (d *decoded[R]) of(kv store.KV) record[R] {
	d.mu.Lock()
	r, ok := d.known[kv.Key]
	d.mu.Unlock()
	if ok && r.Value == kv.Value {
		r.KV = kv
		return r
	}
	r = recordOf[R](kv, true)
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.known == nil || len(d.known) >= mostKnown {
		d.known = map[string]record[R]{}
	}
	d.known[kv.Key] = r
	return r
}

// anew decodes a record of a kind that is not remembered.
func anew[R registry.Record](kv store.KV) record[R] { return recordOf[R](kv, true) }

// byName decodes the records below a prefix.
func byName[R registry.Record](prefix string, items []store.KV, of func(store.KV) record[R]) map[string]record[R] {
	all := make(map[string]record[R], len(items))
	for _, kv := range items {
		all[strings.TrimPrefix(kv.Key, prefix)] = of(kv)
	}
	return all
}

// file is what can be known of a unit from its text.
type file struct {
	*unit.File
	hash   string
	global bool
	err    error // the text cannot be read
}

func fileOf(name, text string) file {
	f, err := unit.Parse(text)
	if err != nil {
		return file{err: err}
	}
	n, _ := unit.SplitName(name)
	req, _ := f.Check(n)
	return file{File: f, hash: f.Hash().String(), global: req.Global}
}

// digest is what lists show of a file.
type digest struct {
	revision int64 // of the record
	hash     string
	global   bool
	problem  string // why the text cannot be read
}

// digests remembers the digests of records, since most of the work of a list
// would be to make the same ones again.
type digests struct {
	mu    sync.Mutex
	known map[string]digest // by key; guarded by mu
}

func (d *digests) of(name string, r record[registry.Unit]) digest {
	d.mu.Lock()
	known, ok := d.known[r.Key]
	d.mu.Unlock()
	if ok && known.revision == r.ModRevision {
		return known
	}
	f := fileOf(name, r.registry.Text)
	known = digest{revision: r.ModRevision, hash: f.hash, global: f.global}
	if f.err != nil {
		known.problem = f.err.Error()
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.known == nil || len(d.known) >= mostKnown {
		d.known = map[string]digest{}
	}
	d.known[r.Key] = known
	return known
}

// view is what the store holds about some units and all machines at one
// revision.
type view struct {
	revision   int64
	units      []record[registry.Unit] // by name
	placements map[string]record[registry.Placement]
	unplaced   map[string]record[registry.Unplaced]
	moves      map[string]record[registry.Move]
	release    map[string]string // reason by unit
	states     []machineStates   // by machine
	machines   map[string]record[registry.Machine]
	digests    *digests
}

type machineStates struct {
	machine string
	units   map[string]registry.State
}

func (v *view) name(keys registry.Keys, r record[registry.Unit]) string {
	return strings.TrimPrefix(r.Key, keys.Unit(""))
}

// read reads the units that match one of the patterns, all if there is none.
// Patterns are those of path.Match; a name also matches itself, whatever is in
// it.
func (h *Handler) read(ctx context.Context, patterns []string) (*view, error) {
	exact := len(patterns) > 0 && len(patterns) <= store.MaxOps && !slices.ContainsFunc(patterns, isWild)
	if exact {
		return h.readNamed(ctx, 0, patterns)
	}
	k := h.Keys
	prefixes := []string{k.Unit(""), k.Placement(""), k.Unplaced(""), k.Move(""), strings.TrimSuffix(k.Schedule(""), "/"), k.States(""), k.Machine("")}
	lists, revision, err := h.Store.ListMany(ctx, 0, prefixes...)
	if err != nil {
		return nil, err
	}
	v := &view{
		revision:   revision,
		digests:    &h.digests,
		placements: byName(prefixes[1], lists[1], h.placements.of),
		unplaced:   byName(prefixes[2], lists[2], anew[registry.Unplaced]),
		moves:      byName(prefixes[3], lists[3], anew[registry.Move]),
		release:    map[string]string{},
		states:     h.statesOf(lists[5]),
		machines:   byName(prefixes[6], lists[6], anew[registry.Machine]),
	}
	matches := matcher(patterns)
	for _, kv := range lists[0] {
		if matches(strings.TrimPrefix(kv.Key, prefixes[0])) {
			v.units = append(v.units, h.units.of(kv))
		}
	}
	for _, kv := range lists[4] {
		v.released(path.Base(kv.Key), kv)
	}
	return v, nil
}

// readNamed reads some units without reading all of them, as they were at a
// revision; 0 is now.
func (h *Handler) readNamed(ctx context.Context, revision int64, names []string) (*view, error) {
	names = slices.Compact(slices.Sorted(slices.Values(names)))
	k := h.Keys
	var keys []string
	for _, name := range names {
		keys = append(keys, k.Unit(name), k.Placement(name), k.Unplaced(name), k.Move(name))
	}
	first, revision, err := h.Store.GetMany(ctx, revision, keys...)
	if err != nil {
		return nil, err
	}
	v := &view{revision: revision, digests: &h.digests, placements: map[string]record[registry.Placement]{}, unplaced: map[string]record[registry.Unplaced]{},
		moves: map[string]record[registry.Move]{}, release: map[string]string{}}
	var entries []string
	for _, name := range names {
		kv, found := first[k.Unit(name)]
		if !found {
			continue
		}
		v.units = append(v.units, recordOf[registry.Unit](kv, true))
		if kv, found := first[k.Placement(name)]; found {
			p := recordOf[registry.Placement](kv, true)
			v.placements[name] = p
			entries = append(entries, k.Entry(p.registry.Machine, name))
		}
		if kv, found := first[k.Unplaced(name)]; found {
			v.unplaced[name] = recordOf[registry.Unplaced](kv, true)
		}
		if kv, found := first[k.Move(name)]; found {
			v.moves[name] = recordOf[registry.Move](kv, true)
		}
	}
	lists, _, err := h.Store.ListMany(ctx, revision, k.States(""), k.Machine(""))
	if err != nil {
		return nil, err
	}
	v.states, v.machines = h.statesOf(lists[0]), byName(k.Machine(""), lists[1], anew[registry.Machine])
	if len(entries) > 0 {
		second, _, err := h.Store.GetMany(ctx, revision, entries...)
		if err != nil {
			return nil, err
		}
		for key, kv := range second {
			v.released(path.Base(key), kv)
		}
	}
	return v, nil
}

// released notes why a unit leaves its machine. Entries hold whole unit files:
// most need not be decoded.
func (v *view) released(name string, kv store.KV) {
	if !strings.Contains(kv.Value, `"release":`) {
		return
	}
	if e := recordOf[registry.Entry](kv, true); e.err == nil && e.registry.Release != "" {
		v.release[name] = e.registry.Release
	}
}

func (h *Handler) statesOf(items []store.KV) []machineStates {
	var all []machineStates
	for _, kv := range items {
		id := strings.TrimPrefix(kv.Key, h.Keys.States(""))
		states := h.states.of(kv)
		if states.err != nil {
			h.Log.Debug("the states of a machine cannot be read", "machine", id, "err", states.err)
			continue
		}
		all = append(all, machineStates{id, states.registry.Units})
	}
	return all
}

// matcher returns what says whether a name matches one of the patterns. Names
// are looked up: there may be hundreds.
func matcher(patterns []string) func(name string) bool {
	names, wild := map[string]bool{}, []string{}
	for _, p := range patterns {
		names[p] = true
		if isWild(p) {
			wild = append(wild, p)
		}
	}
	return func(name string) bool {
		return len(patterns) == 0 || names[name] || slices.ContainsFunc(wild, func(p string) bool {
			ok, err := path.Match(p, name)
			return ok && err == nil
		})
	}
}

func isWild(pattern string) bool { return strings.ContainsAny(pattern, `*?[\`) }

// currentOf is what a unit that is not global has reached on its machine:
// launched only if what was started there is what is wanted now.
func currentOf(p record[registry.Placement], state registry.State, known bool, hash string) registry.Desired {
	switch {
	case !p.found || p.err != nil || !known || state.Hash == "":
		return registry.Inactive
	case state.Launched && state.Hash == hash:
		return registry.Launched
	}
	return registry.Loaded
}

// unit puts together all that the view has of one of its units.
func (v *view) unit(name string, r record[registry.Unit]) unitapi.Unit {
	u := unitapi.Unit{Name: name, States: []unitapi.State{}}
	if r.err != nil {
		u.Problem = r.err.Error()
	} else {
		d := v.digests.of(name, r)
		n, _ := unit.SplitName(name)
		u.Problem, u.Hash, u.Global, u.Template = d.problem, d.hash, d.global, n.IsTemplate()
		u.Desired, u.Restarts = r.registry.Desired, r.registry.Restarts
	}
	p := v.placements[name]
	var there registry.State // what its own machine says
	known := false
	for _, m := range v.states {
		s, ok := m.units[name]
		if !ok {
			continue
		}
		if p.found && m.machine == p.registry.Machine {
			there, known = s, true
		}
		ref := v.ref(m.machine)
		u.States = append(u.States, unitapi.State{Machine: ref.ID, Node: ref.Node, Address: ref.Address, Load: s.Load, Active: s.Active, Sub: s.Sub,
			Hash: s.Hash, Epoch: s.Epoch, Launched: s.Launched, Restarts: s.Restarts, Trouble: s.Trouble, Waiting: s.Waiting})
	}
	if !u.Global {
		u.Current = currentOf(p, there, known, u.Hash)
	}
	if p.found && p.err == nil {
		ref := v.ref(p.registry.Machine)
		u.Machine, u.Placed = &ref, p.registry.Reason
	}
	u.Releasing = v.release[name]
	u.Unplaced = v.unplaced[name].registry.Reason
	u.MovingTo = v.moves[name].registry.To
	return u
}

func (v *view) ref(id string) unitapi.MachineRef {
	m := v.machines[id].registry
	return unitapi.MachineRef{ID: id, Node: m.Node, Address: m.Address}
}

// all puts together the units of the view.
func (v *view) all(keys registry.Keys) []unitapi.Unit {
	units := make([]unitapi.Unit, 0, len(v.units))
	for _, r := range v.units {
		units = append(units, v.unit(v.name(keys, r), r))
	}
	return units
}

// fleet is the machines and what operators set of them, at one revision.
type fleet struct {
	revision int64
	machines map[string]record[registry.Machine]
	settings map[string]record[registry.Settings]
}

func (h *Handler) readMachines(ctx context.Context, revision int64) (*fleet, error) {
	lists, revision, err := h.Store.ListMany(ctx, revision, h.Keys.Machine(""), h.Keys.Settings(""))
	if err != nil {
		return nil, err
	}
	return &fleet{revision, byName(h.Keys.Machine(""), lists[0], anew[registry.Machine]), byName(h.Keys.Settings(""), lists[1], anew[registry.Settings])}, nil
}

// ids returns the IDs of the machines that are there, sorted.
func (f *fleet) ids() []string { return slices.Sorted(maps.Keys(f.machines)) }

// metadata is a machine's own with what was set.
func (f *fleet) metadata(id string) map[string]string {
	return f.settings[id].registry.Merge(f.machines[id].registry.Metadata)
}

// find returns the ID that somebody means: an ID of a machine that is there or
// has settings, the name of a node, or the beginning of just one ID. An ID of
// which nothing is known is taken for one if strange is set and it looks like
// systemd's.
func (f *fleet) find(what string, strange bool) (string, error) {
	if f.machines[what].found || strange && f.settings[what].found {
		return what, nil
	}
	var nodes, begin []string
	for _, id := range f.ids() {
		if f.machines[id].registry.Node == what {
			nodes = append(nodes, id)
		}
		if strings.HasPrefix(id, what) {
			begin = append(begin, id)
		}
	}
	found := cmp.Or(len(nodes), len(begin))
	switch {
	case what == "":
		return "", fail(400, "list them with: flotilla list-machines", "no machine is named")
	case len(nodes) == 1:
		return nodes[0], nil
	case len(nodes) == 0 && len(begin) == 1:
		return begin[0], nil
	case found > 1:
		return "", fail(409, "write more of its ID, see: flotilla list-machines --full", "%s means %d machines: %s", what, found, strings.Join(slices.Concat(nodes, begin), ", "))
	case strange && len(what) == 32 && strings.Trim(what, "0123456789abcdef") == "":
		return what, nil
	}
	return "", fail(404, "list them with: flotilla list-machines", "there is no machine %q", what)
}
