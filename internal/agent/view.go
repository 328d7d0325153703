package agent

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync"

	"flotilla/internal/registry"
	"flotilla/internal/store"
	"flotilla/internal/systemd"
	"flotilla/internal/unit"
)

// maxText is how long a unit file may be, in bytes.
const maxText = 1 << 20

// A part is one of the prefixes that the agent follows.
type part int

const (
	ownSchedule part = iota
	globalSchedule
	settings
	machines
	parts
)

// view is what the store said last. While the store is away it stays as it is.
type view struct {
	own      string            // machine ID
	metadata map[string]string // of this machine, from its configuration
	keys     registry.Keys
	log      *slog.Logger

	mu       sync.Mutex // guards what follows
	there    [parts]bool
	newer    bool // than what present has returned last
	changed  int  // records, since then
	schedule map[string]entry
	globals  map[string]entry
	settings registry.Settings
	machines map[string]machine
	at       int64 // revision of machines
}

// machine is the record of one machine.
type machine struct {
	registry.Machine
	value      string // as it is in the store
	generation int64
}

// entry is one unit in a schedule, taken apart.
type entry struct {
	registry.Entry
	mod     int64
	hash    string
	req     *unit.Requirements
	after   []string
	before  []string
	install bool
	problem string // why this text cannot be run here
}

func newView(own registry.Machine, keys registry.Keys, log *slog.Logger) *view {
	return &view{own: own.ID, metadata: own.Metadata, keys: keys, log: log, schedule: map[string]entry{}, globals: map[string]entry{}, machines: map[string]machine{}}
}

// prefix is what the part is in the store.
func (v *view) prefix(p part) string {
	switch p {
	case ownSchedule:
		return v.keys.Schedule(v.own)
	case globalSchedule:
		return v.keys.Schedule(registry.Global)
	case settings:
		return v.keys.Settings(v.own)
	}
	return v.keys.Machine("")
}

// apply takes in what a Reflector delivers of one part, and returns how many
// keys differed.
func (v *view) apply(p part, u store.Update) (changed int) {
	prefix := v.prefix(p)
	v.mu.Lock()
	defer v.mu.Unlock()
	if u.Reset {
		there := map[string]bool{}
		for _, kv := range u.Items {
			there[strings.TrimPrefix(kv.Key, prefix)] = true
			changed += v.put(p, strings.TrimPrefix(kv.Key, prefix), kv)
		}
		for _, name := range v.names(p) {
			if !there[name] {
				changed += v.drop(p, name)
			}
		}
	}
	for _, e := range u.Events {
		name := strings.TrimPrefix(e.Key, prefix)
		if e.Deleted {
			changed += v.drop(p, name)
		} else {
			changed += v.put(p, name, e.KV)
		}
	}
	if p == machines {
		v.at = u.Revision
	}
	if !v.there[p] || changed > 0 {
		v.there[p], v.newer = true, true
		v.changed += changed
	}
	return changed
}

func (v *view) names(p part) []string {
	switch p {
	case ownSchedule:
		return slices.Collect(maps.Keys(v.schedule))
	case globalSchedule:
		return slices.Collect(maps.Keys(v.globals))
	case machines:
		return slices.Collect(maps.Keys(v.machines))
	}
	return []string{""}
}

func (v *view) put(p part, name string, kv store.KV) int {
	switch p {
	case ownSchedule, globalSchedule:
		all := v.schedule
		if p == globalSchedule {
			all = v.globals
		}
		if all[name].mod == kv.ModRevision {
			return 0
		}
		if err := checkName(name); err != nil {
			v.log.Warn("a unit in the schedule cannot be run", "unit", name, "err", err)
			return 0
		}
		all[name] = readEntry(name, kv)
	case settings:
		if name != "" { // of a machine whose ID begins with ours
			return 0
		}
		s, err := registry.Decode[registry.Settings](kv.Value)
		if err != nil {
			v.log.Warn("the settings of this machine are not used", "err", err)
		}
		v.settings = s
	case machines:
		if v.machines[name].value == kv.Value && v.machines[name].generation == kv.CreateRevision {
			return 0
		}
		m, err := registry.Decode[registry.Machine](kv.Value)
		if err != nil {
			v.log.Warn("the record of a machine cannot be read", "machine", name, "err", err)
		}
		v.machines[name] = machine{m, kv.Value, kv.CreateRevision}
	}
	return 1
}

func (v *view) drop(p part, name string) int {
	before := len(v.schedule) + len(v.globals) + len(v.machines)
	switch {
	case p == ownSchedule:
		delete(v.schedule, name)
	case p == globalSchedule:
		delete(v.globals, name)
	case p == machines:
		delete(v.machines, name)
	case name == "" && (v.settings.V != 0):
		v.settings = registry.Settings{}
		return 1
	}
	return before - len(v.schedule) - len(v.globals) - len(v.machines)
}

// checkName returns what is wrong with a unit's name. A name that passes is the
// name of a file, and of no other folder's.
func checkName(name string) error {
	if err := unit.CheckName(name); err != nil {
		return err
	}
	if name == "." || name == ".." || strings.ContainsAny(name, "/\x00") {
		return fmt.Errorf("%q is not the name of a file", name)
	}
	return nil
}

// readEntry takes a record of a schedule apart. What is wrong with it is the
// entry's problem.
func readEntry(name string, kv store.KV) entry {
	e := entry{mod: kv.ModRevision, req: &unit.Requirements{Unit: name}}
	refuse := func(format string, args ...any) entry {
		e.problem = fmt.Sprintf(format, args...)
		return e
	}
	r, err := registry.Decode[registry.Entry](kv.Value)
	if err != nil {
		e.Desired = registry.Loaded
		return refuse("%v", err)
	}
	e.Entry = r
	n, _ := unit.SplitName(name)
	switch {
	case n.IsTemplate():
		return refuse("it is a template, which cannot be run: start an instance of it")
	case len(e.Text) > maxText:
		return refuse("its file has %d bytes, more than %d", len(e.Text), maxText)
	}
	f, err := unit.Parse(e.Text)
	if err != nil {
		return refuse("its file is not valid: %v", err)
	}
	req, problems := f.Check(n)
	if err := unit.Refusal(problems); err != nil {
		return refuse("its file is not valid: %v", err)
	}
	e.hash, e.req = f.Hash().String(), req
	e.after, e.before = startedBefore(n, f)
	e.install = slices.ContainsFunc(f.Options, func(o unit.Option) bool { return o.Section == "Install" })
	return e
}

// fenced reports whether the unit runs behind the fence: nobody else may run it
// and somebody else could.
func (e entry) fenced() bool {
	return e.req.Exclusive && e.req.MachineID == "" && !e.req.Global
}

// dropIn is what is added to the unit's own file.
func (e entry) dropIn(name, machine string) string {
	n, _ := unit.SplitName(name)
	sections := map[string]string{"service": "Service", "socket": "Socket", "mount": "Mount", "swap": "Swap"}
	section := sections[n.Type]
	if section == "" { // it has no processes
		return ""
	}
	text := "[" + section + "]\n"
	if e.fenced() {
		text = systemd.FenceDropIn(section)
	}
	// %n is put in by systemd after it has read quotes and backslashes.
	return text + fmt.Sprintf("Environment=\"FLOTILLA_EPOCH=%d\" \"FLOTILLA_UNIT=%%n\" \"FLOTILLA_MACHINE=%s\"\n", e.Epoch, machine)
}

// present is a view as it was at one moment.
type present struct {
	wants      map[string]want
	entries    map[string]entry
	waiting    map[string]string // global units that are not here, and why
	epochs     map[string]int64  // of those
	generation int64             // of this machine, 0 while it is not registered
}

// present returns what is wanted, and nil while not all parts are known. mine
// reports whether a machine's record was written by this process.
func (v *view) present(mine func(machine) bool) *present {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.newer, v.changed = false, 0
	for _, there := range v.there {
		if !there {
			return nil
		}
	}
	p := &present{wants: map[string]want{}, entries: map[string]entry{}, waiting: map[string]string{}, epochs: map[string]int64{}}
	self := v.machines[v.own]
	if mine(self) {
		p.generation = self.generation
	}
	var placed, globals []registry.Claim
	for name, e := range v.schedule {
		placed = append(placed, registry.Claim{Name: name, Requirements: e.req, Epoch: e.Epoch})
		p.add(name, e, v.own)
	}
	for name, e := range v.globals {
		if _, ok := v.schedule[name]; !ok && (e.Desired == registry.Loaded || e.Desired == registry.Launched) {
			globals = append(globals, registry.Claim{Name: name, Requirements: e.req, Epoch: e.Epoch})
		}
	}
	metadata := v.settings.Merge(v.metadata)
	run, refused := registry.GlobalsOn(v.own, metadata, placed, globals)
	for _, name := range run {
		e := v.globals[name]
		e.Generation = p.generation
		p.add(name, e, v.own)
	}
	for name, why := range refused {
		if v.globals[name].req.Mismatch(v.own, metadata) == "" {
			p.waiting[name], p.epochs[name] = why, v.globals[name].Epoch
		}
	}
	// What one unit wants to come after itself.
	for name, e := range p.entries {
		for _, later := range e.before {
			if w, ok := p.wants[later]; ok {
				w.After = append(slices.Clip(w.After), name)
				p.wants[later] = w
			}
		}
	}
	return p
}

func (p *present) add(name string, e entry, machine string) {
	w := want{
		Hash: e.hash, Desired: e.Desired, Restarts: e.Restarts, Epoch: e.Epoch, Release: e.Release,
		Exclusive: e.fenced(), Problem: e.problem, After: e.after,
	}
	sum := sha256.Sum256([]byte(e.dropIn(name, machine) + "\x00" + e.Text))
	w.Sum = hex.EncodeToString(sum[:16])
	switch {
	case p.generation == 0:
		w.Void = "this machine is not registered"
	case e.Generation != p.generation:
		w.Void, w.Outlived = "the engine has not yet confirmed it after this machine was away", true
	}
	p.wants[name], p.entries[name] = w, e
}

// self returns the record of this machine, or a zero one.
func (v *view) self() machine {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.machines[v.own]
}

// everyone returns the records of all machines.
func (v *view) everyone() []registry.Machine {
	v.mu.Lock()
	defer v.mu.Unlock()
	all := make([]registry.Machine, 0, len(v.machines))
	for _, m := range v.machines {
		all = append(all, m.Machine)
	}
	return all
}

// others returns how many other machines there are, and the revision at which
// that was so; false if it is not known.
func (v *view) others() (n int, at int64, ok bool) {
	v.mu.Lock()
	defer v.mu.Unlock()
	n = len(v.machines)
	if _, ok := v.machines[v.own]; ok {
		n--
	}
	return n, v.at, v.there[machines]
}

// fresh returns how many records have changed since present was called.
func (v *view) fresh() int {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.changed
}

func (v *view) isNewer() bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.newer
}
