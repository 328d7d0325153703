package engine

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	"flotilla/internal/registry"
	"flotilla/internal/store"
	"flotilla/internal/unit"
)

// Load returns a Cluster of the records that a list of the store has returned.
func Load(keys registry.Keys, records []store.KV, revision int64) *Cluster {
	c := NewCluster(keys)
	for _, kv := range records {
		c.Set(kv)
	}
	c.Advance(revision)
	return c
}

// Advance says up to which revision of the store the records were fed.
func (c *Cluster) Advance(revision int64) { c.revision = revision }

// Revision returns the revision up to which the records were fed.
func (c *Cluster) Revision() int64 { return c.revision }

// Problems returns why records cannot be used, by key.
func (c *Cluster) Problems() map[string]string { return maps.Clone(c.problems) }

// Counts returns how many units there are, how many machines are there, and how
// many units are to be somewhere and are nowhere.
func (c *Cluster) Counts() (units, machines, unplaced int) {
	for _, w := range c.waiting {
		for u := range w.units {
			if u.at == nil || !u.at.present {
				unplaced++
			}
		}
	}
	return len(c.units), c.present, unplaced
}

// Retry has the next Plan look at a unit although none of its records has
// changed: what was planned for it could not be written.
func (c *Cluster) Retry(name string) {
	if u := c.units[name]; u != nil {
		c.touch(u)
	}
}

// RetryAll has the next Plan look at everything.
func (c *Cluster) RetryAll() {
	for _, u := range c.units {
		c.touch(u)
	}
	for _, m := range c.machines {
		c.stale[m] = struct{}{}
	}
}

// Set takes in a record. Keys that are none of its business are ignored, and
// values that it cannot read are a problem of their own unit or machine.
func (c *Cluster) Set(kv store.KV) { c.take(kv, false) }

// Delete takes in that there is no such record any more.
func (c *Cluster) Delete(key string) { c.take(store.KV{Key: key}, true) }

func (c *Cluster) take(kv store.KV, deleted bool) {
	path, ours := strings.CutPrefix(kv.Key, c.keys.Prefix)
	kind, name, _ := strings.Cut(path, "/")
	if !ours {
		return
	}
	delete(c.problems, kv.Key)
	switch kind {
	case "solo":
		c.setSolo(kv, deleted)
		return
	case "failover":
		c.setFailover(kv, deleted)
		return
	case "machines", "settings", "states":
		if err := registry.CheckMachineID(name); err != nil {
			c.complain(kv.Key, err, deleted)
			return
		}
		m := c.machine(name)
		switch kind {
		case "machines":
			c.setMachine(m, kv, deleted)
		case "settings":
			c.setSettings(m, kv, deleted)
		case "states":
			c.setStates(m, kv, deleted)
		}
		c.dismiss(m)
		return
	case "units", "placements", "schedules", "unplaced", "moves":
	default:
		return
	}
	machine := ""
	if kind == "schedules" {
		machine, name, _ = strings.Cut(name, "/")
		if machine != registry.Global {
			if err := registry.CheckMachineID(machine); err != nil {
				c.complain(kv.Key, err, deleted)
				return
			}
		}
	}
	if err := unit.CheckName(name); err != nil {
		c.complain(kv.Key, err, deleted)
		return
	}
	u := c.unit(name)
	var err error
	switch kind {
	case "units":
		err = c.setUnit(u, kv, deleted)
	case "placements":
		err = c.setPlacement(u, kv, deleted)
	case "schedules":
		err = c.setEntry(u, machine, kv, deleted)
	case "unplaced":
		err = c.setUnplaced(u, kv, deleted)
	case "moves":
		c.setMove(u, kv, deleted)
	}
	c.freeze(u, kv.Key, err)
	c.touch(u)
	c.forget(u)
}

func (c *Cluster) complain(key string, err error, deleted bool) {
	if !deleted {
		c.problems[key] = err.Error()
	}
}

// freeze stops all decisions on a unit as long as one of its records cannot be
// read.
func (c *Cluster) freeze(u *unitState, key string, err error) {
	if err == nil {
		delete(u.frozen, key)
		return
	}
	if u.frozen == nil {
		u.frozen = map[string]struct{}{}
	}
	u.frozen[key] = struct{}{}
	c.problems[key] = err.Error()
}

func (c *Cluster) setUnit(u *unitState, kv store.KV, deleted bool) error {
	was := u.wanted()
	if deleted {
		u.known, u.want, u.created, u.bad = false, registry.Unit{}, 0, ""
	} else {
		want, err := registry.Decode[registry.Unit](kv.Value)
		if err == nil {
			_, err = registry.ParseDesired(string(want.Desired))
		}
		if err != nil {
			return err
		}
		u.known, u.want, u.created = true, want, kv.CreateRevision
	}
	c.require(u, kv.Key)
	if u.wanted() != was {
		c.touchFar(u)
		if len(u.req.MachineOf) > 0 {
			c.touchAll(c.replacers)
		}
		if u.at != nil {
			c.touchNear(u.at, u)
		}
	}
	return nil
}

// read returns what a unit file asks for.
func read(name, text string) (*unit.Requirements, error) {
	f, err := unit.Parse(text)
	if err != nil {
		return nil, err
	}
	n, _ := unit.SplitName(name)
	req, problems := f.Check(n)
	return req, unit.Refusal(problems)
}

// require finds out what the unit asks for, and sorts it in anew if that has
// changed.
func (c *Cluster) require(u *unitState, key string) {
	text, req := u.text, u.req
	u.bad = ""
	fresh := false // req was read anew
	if u.known && u.want.Text != u.text {
		r, err := read(u.name, u.want.Text)
		if err != nil {
			u.bad = "its unit file cannot be used: " + err.Error()
			c.problems[key] = u.bad
		} else {
			text, req, fresh = u.want.Text, r, true
		}
	}
	if n, _ := unit.SplitName(u.name); n.IsTemplate() {
		u.bad = "it is a template: only its instances run"
	}
	if (!u.known || u.bad != "") && !fresh {
		e := u.entryOf(u.placement.Machine)
		if e == nil {
			e = u.entryOf(registry.Global)
		}
		if e != nil && e.Text != u.text {
			if r, err := read(u.name, e.Text); err == nil {
				text, req, fresh = e.Text, r, true
			}
		}
	}
	if fresh && text != u.text {
		c.resort(u, text, req)
	}
	c.setGlobal(u)
}

// resort gives the unit other requirements.
func (c *Cluster) resort(u *unitState, text string, req *unit.Requirements) {
	c.touch(u)
	if c.isGlobal(u) {
		c.withdraw()
	}
	at := u.at
	if at != nil {
		c.touchNear(at, u)
		c.remove(at, u)
		u.at = nil
	} else {
		c.touchFar(u)
	}
	entangles := func() bool { return len(u.replace)+len(u.req.MachineOf) > 0 }
	had := entangles()
	c.part(u)
	u.text, u.req = text, req
	c.join(u)
	if had || entangles() { // see drives
		c.touchAll(c.replacers)
	}
	if at != nil {
		u.at = at
		c.add(at, u)
		c.touchNear(at, u)
		c.better[at] = struct{}{}
	} else {
		c.touchFar(u)
	}
}

func (c *Cluster) isGlobal(u *unitState) bool { _, ok := c.globals[u]; return ok }

// setGlobal finds out whether the unit is to run on every machine that it fits.
func (c *Cluster) setGlobal(u *unitState) {
	is := u.req.Global && u.placementMod == 0
	if u.bad != "" || len(u.frozen) > 0 {
		is = is && u.entryOf(registry.Global) != nil
	} else {
		is = is && u.wanted()
	}
	if is == c.isGlobal(u) {
		return
	}
	c.withdraw()
	if is {
		c.globals[u] = struct{}{}
	} else {
		delete(c.globals, u)
	}
	c.touchAll(c.followers[u.name])
}

// withdraw takes the global units from all machines, to be found anew.
func (c *Cluster) withdraw() {
	for _, m := range c.machines {
		c.withdrawFrom(m)
	}
}

func (c *Cluster) withdrawFrom(m *machine) {
	for _, g := range m.globals {
		c.remove(m, g)
		c.touchAll(c.followers[g.name])
	}
	m.globals = nil
	c.stale[m] = struct{}{}
}

// refreshGlobals finds out which global units run on the machine.
func (c *Cluster) refreshGlobals(m *machine) {
	old := m.globals
	for _, g := range old {
		c.remove(m, g)
	}
	m.globals, m.refused = nil, nil
	if m.present && m.rec.Units && !m.opaque && len(c.globals) > 0 {
		var placed, globals []registry.Claim
		for u := range m.units {
			if u.at == m && len(u.conflict)+len(u.conflicted) > 0 {
				placed = append(placed, registry.Claim{Name: u.name, Requirements: u.req, Epoch: u.placement.Epoch})
			}
		}
		slices.SortFunc(placed, func(a, b registry.Claim) int { return strings.Compare(a.Name, b.Name) })
		for g := range c.globals {
			globals = append(globals, registry.Claim{Name: g.name, Requirements: g.req, Epoch: g.created})
		}
		var run []string
		run, m.refused = registry.GlobalsOn(m.id, m.metadata, placed, globals)
		for _, name := range run {
			g := c.units[name]
			m.globals = append(m.globals, g)
			c.add(m, g)
		}
	} else if m.present {
		m.refused = map[string]string{}
		for g := range c.globals {
			m.refused[g.name] = "the machine runs no units"
		}
	}
	c.better[m] = struct{}{}
	if len(old) > 0 || len(m.globals) > 0 {
		c.touchAll(m.units)
	}
	for _, list := range [][]*unitState{old, m.globals} {
		for _, g := range list {
			c.touchAll(c.followers[g.name])
		}
	}
}

func (c *Cluster) setPlacement(u *unitState, kv store.KV, deleted bool) error {
	var p registry.Placement
	var err error
	if !deleted {
		if p, err = registry.Decode[registry.Placement](kv.Value); err == nil {
			err = registry.CheckMachineID(p.Machine)
		}
		if err != nil {
			return err // it stays where it was last seen
		}
	}
	var at *machine
	if !deleted {
		at = c.machine(p.Machine)
	}
	old := u.at
	if old != nil {
		c.touchNear(old, u)
		c.remove(old, u)
		c.better[old] = struct{}{}
	}
	u.placement, u.placementMod, u.at = p, kv.ModRevision, at
	if at != nil {
		c.add(at, u)
		c.touchNear(at, u)
	}
	if old != nil && old != at {
		c.dismiss(old)
	}
	u.leaves(c)
	c.require(u, c.keys.Unit(u.name))
	return nil
}

// leaves notes whether the unit is to leave its machine.
func (u *unitState) leaves(c *Cluster) {
	e := u.entryOf(u.placement.Machine)
	if leaving := u.at != nil && e != nil && e.Release != ""; leaving != u.leaving {
		u.leaving = leaving
		c.touchAll(c.followers[u.name])
	}
}

func (c *Cluster) setEntry(u *unitState, machine string, kv store.KV, deleted bool) error {
	i := slices.IndexFunc(u.entries, func(e entry) bool { return e.machine >= machine })
	if i < 0 {
		i = len(u.entries)
	}
	has := i < len(u.entries) && u.entries[i].machine == machine
	if deleted {
		if has {
			u.entries = slices.Delete(u.entries, i, i+1)
		}
	} else {
		e, err := registry.Decode[registry.Entry](kv.Value)
		if err != nil {
			return err
		}
		if e.Text == u.want.Text {
			e.Text = u.want.Text // one copy in memory
		}
		if !has {
			u.entries = slices.Insert(u.entries, i, entry{})
		}
		u.entries[i] = entry{machine, kv.ModRevision, e}
	}
	u.leaves(c)
	if u.bad != "" || !u.known {
		c.require(u, c.keys.Unit(u.name))
	}
	return nil
}

func (c *Cluster) setUnplaced(u *unitState, kv store.KV, deleted bool) error {
	r, err := registry.Unplaced{}, error(nil)
	if !deleted {
		if r, err = registry.Decode[registry.Unplaced](kv.Value); err != nil {
			r.Reason = "" // it is written anew
		}
	}
	u.unplaced, u.unplacedMod = r.Reason, kv.ModRevision
	return nil
}

func (c *Cluster) setMove(u *unitState, kv store.KV, deleted bool) {
	if old := c.machines[u.move.To]; u.moveMod != 0 && old != nil {
		c.better[old] = struct{}{} // a place was kept there
	}
	u.move, u.moveMod = registry.Move{}, kv.ModRevision
	delete(c.moving, u)
	if deleted {
		return
	}
	move, err := registry.Decode[registry.Move](kv.Value)
	if err != nil {
		c.problems[kv.Key] = err.Error()
		move.To = "" // it is refused
	}
	u.move = move
	c.moving[u] = struct{}{}
}

func (c *Cluster) setMachine(m *machine, kv store.KV, deleted bool) {
	if !deleted && m.present && m.raw == kv.Value && m.generation == kv.CreateRevision {
		return
	}
	c.alter(m, func() {
		m.present, m.raw, m.generation = !deleted, kv.Value, kv.CreateRevision
		if deleted {
			m.rec = registry.Machine{}
			return
		}
		rec, err := registry.Decode[registry.Machine](kv.Value)
		if err != nil {
			c.problems[kv.Key] = err.Error()
		} else {
			m.rec = rec
		}
	})
}

func (c *Cluster) setSettings(m *machine, kv store.KV, deleted bool) {
	c.alter(m, func() {
		m.setMod, m.settings = kv.ModRevision, registry.Settings{}
		if deleted {
			return
		}
		s, err := registry.Decode[registry.Settings](kv.Value)
		if err != nil {
			c.problems[kv.Key] = err.Error()
		} else {
			m.settings = s
		}
	})
}

// alter changes what the machine is.
func (c *Cluster) alter(m *machine, change func()) {
	c.withdrawFrom(m)
	units := slices.Collect(maps.Keys(m.units))
	for _, u := range units {
		c.remove(m, u)
	}
	c.classes.remove(m)
	if m.present {
		c.present--
	}
	c.place(m, func() {
		change()
		_, unread := c.problems[c.keys.Machine(m.id)]
		_, unset := c.problems[c.keys.Settings(m.id)]
		m.opaque = unread || unset
		m.metadata = m.settings.Merge(m.rec.Metadata)
	})
	if m.present {
		c.present++
		c.classes.sort(m)
	}
	for _, u := range units {
		c.add(m, u)
		c.touch(u)
	}
	c.better[m] = struct{}{}
}

func (c *Cluster) setStates(m *machine, kv store.KV, deleted bool) {
	old := m.troubles
	m.troubles = nil
	if !deleted {
		states, err := registry.Decode[registry.States](kv.Value)
		if err != nil {
			c.problems[kv.Key] = err.Error()
		}
		m.idle = err == nil && len(states.Units) == 0
		for name, s := range states.Units {
			if s.Trouble != "" {
				if m.troubles == nil {
					m.troubles = map[string]trouble{}
				}
				m.troubles[name] = trouble{s.Epoch, s.Trouble}
			}
		}
	}
	for name, t := range old {
		if m.troubles[name] != t {
			c.Retry(name)
		}
	}
	for name, t := range m.troubles {
		if old[name] != t {
			c.Retry(name)
		}
	}
}

func (c *Cluster) setSolo(kv store.KV, deleted bool) {
	c.solo, c.soloMod = registry.Solo{}, kv.ModRevision
	if !deleted {
		s, err := registry.Decode[registry.Solo](kv.Value)
		if err != nil {
			c.complain(kv.Key, fmt.Errorf("%w: no exclusive unit of a machine that is gone is moved", err), false)
			s.Machine = anyMachine
		}
		c.solo = s
	}
	c.touchLost()
}

// anyMachine stands for all machines in a solo record that cannot be read.
const anyMachine = "*"

func (c *Cluster) setFailover(kv store.KV, deleted bool) {
	c.failover, c.failoverMod = registry.Failover{}, kv.ModRevision
	if !deleted {
		f, err := registry.Decode[registry.Failover](kv.Value)
		c.failover = f
		if err != nil {
			c.complain(kv.Key, err, false)
			c.failover = registry.Failover{}
		}
	}
	c.touchLost()
}

// touchLost touches all units of machines that are gone.
func (c *Cluster) touchLost() {
	for _, m := range c.machines {
		if !m.present {
			c.touchAll(m.units)
		}
	}
}
