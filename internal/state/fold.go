package state

import (
	"fmt"
	"maps"
	"strings"

	"flotilla/internal/store"
	"flotilla/internal/unit"
)

// Load returns the snapshot of the records that a list of the store has returned.
func Load(keys Keys, items []store.KV, revision int64) *Snapshot {
	return Fold(keys, &Snapshot{}, store.Update{Revision: revision, Reset: true, Prefix: keys.Prefix, Items: items})
}

// Fold returns the snapshot after an update. The old one stays as it is.
func Fold(keys Keys, old *Snapshot, u store.Update) *Snapshot {
	s, _ := fold(keys, old, u)
	return s
}

// fold returns the snapshot after an update, and how many records it changed. The
// cost is that of the update and a copy of two maps.
func fold(keys Keys, old *Snapshot, u store.Update) (*Snapshot, int) {
	next := *old
	d := draft{keys: keys, old: old, next: &next, units: map[string]*Unit{}, nodes: map[string]*Node{}}
	next.Revision = u.Revision
	if u.Reset {
		next = Snapshot{Revision: u.Revision, Reports: u.Prefix == keys.Prefix, Units: map[string]*Unit{}, Nodes: map[string]*Node{}}
	}
	next.Strange = maps.Clone(next.Strange)
	for _, kv := range u.Items {
		d.put(kv)
	}
	for _, e := range u.Events {
		if e.Deleted {
			e.KV = store.KV{Key: e.Key}
		}
		d.put(e.KV)
	}
	d.finish(u.Reset)
	if u.Reset { // what was there before and is not any more
		d.changed += old.records(next.Reports) - d.kept
	}
	return &next, d.changed
}

// draft is a snapshot that is being made. Units and nodes are copied before they
// are changed.
type draft struct {
	keys      Keys
	old, next *Snapshot
	units     map[string]*Unit // copies, not yet in next
	nodes     map[string]*Node
	changed   int // records that are not as in old
	kept      int // records that old has too
}

// put takes in a record; one without a revision is not there any more.
func (d *draft) put(kv store.KV) {
	path, ours := strings.CutPrefix(kv.Key, d.keys.Prefix)
	if !ours {
		return
	}
	kind, name := path, ""
	if i := strings.LastIndexByte(path, '/'); i >= 0 && path != "cluster/leader" && path != "cluster/failover" {
		kind, name = path[:i], path[i+1:]
	}
	var err error
	switch kind {
	case "cluster/units", "cluster/placements", "cluster/unplaced", "cluster/moves":
		if err = unit.CheckName(name); err == nil {
			d.putUnit(kind, name, kv)
		}
	case "cluster/nodes", "cluster/settings", "reports/router", "reports/units":
		if err = CheckNodeID(name); err == nil {
			d.putNode(kind, name, kv)
		}
	case "cluster/leader":
		assign(d, &d.next.Leader, d.old.Leader, kv)
	case "cluster/failover":
		assign(d, &d.next.Failover, d.old.Failover, kv)
	}
	if err != nil {
		if kv.ModRevision == 0 {
			delete(d.next.Strange, kv.Key)
			return
		}
		if d.next.Strange == nil {
			d.next.Strange = map[string]string{}
		}
		d.next.Strange[kv.Key] = err.Error()
	}
}

// assign gives item the record kv, decoded anew only if it is not the one that old
// has.
func assign[R Record](d *draft, item *Item[R], old Item[R], kv store.KV) (changed bool) {
	if old.Exists() && kv.ModRevision != 0 {
		d.kept++
	}
	if kv.ModRevision == old.Modified {
		*item = old
		return false
	}
	d.changed++
	if kv.ModRevision == 0 {
		*item = Item[R]{}
	} else {
		*item = item.next(kv.Value, kv.CreateRevision, kv.ModRevision)
		if old.Exists() && item.Problem != "" {
			item.Value = old.Value
		}
	}
	return true
}

func (d *draft) putUnit(kind, name string, kv store.KV) {
	was := d.old.Units[name]
	if was == nil {
		was = &Unit{Name: name, Requirements: &unit.Requirements{Unit: name}}
	}
	u := d.units[name]
	if u == nil {
		u = &Unit{Name: name, Hash: was.Hash, Requirements: was.Requirements, Problem: was.Problem}
		if had := d.next.Units[name]; had != nil {
			*u = *had
		}
		d.units[name] = u
	}
	switch kind {
	case "cluster/units":
		before := u.Record
		if assign(d, &u.Record, was.Record, kv) && (u.Record.Value.Text != before.Value.Text || u.Record.Value.Desired != before.Value.Desired ||
			before.Problem != "" || u.Hash == "") {
			u.read()
		}
	case "cluster/placements":
		assign(d, &u.Placement, was.Placement, kv)
		if u.Placement.Problem == "" && u.Placement.Exists() {
			if err := CheckNodeID(u.Placement.Value.Node); err != nil {
				u.Placement.Problem = err.Error()
			}
		}
		if n := d.next.Nodes[u.Placement.Value.Node]; n != nil {
			u.Placement.Value.Node = n.ID // the same string in memory
		}
	case "cluster/unplaced":
		assign(d, &u.Unplaced, was.Unplaced, kv)
	case "cluster/moves":
		assign(d, &u.Move, was.Move, kv)
	}
	if u.Placement.Value.Approved == u.Hash {
		u.Placement.Value.Approved = u.Hash // the same string in memory
	}
}

// read finds out what the unit's file asks for.
func (u *Unit) read() {
	u.Problem = ""
	if !u.Record.Usable() {
		return
	}
	if _, err := unit.ParseDesired(string(u.Record.Value.Desired)); err != nil {
		u.Record.Problem = err.Error()
		return
	}
	n, _ := unit.SplitName(u.Name)
	f, err := unit.Parse(u.Record.Value.Text)
	if err == nil {
		var problems []unit.Problem
		var r *unit.Requirements
		if r, problems = f.Check(n); unit.Refusal(problems) == nil {
			u.Requirements, u.Hash = r, f.Hash().String()
		}
		err = unit.Refusal(problems)
	}
	switch {
	case n.IsTemplate():
		u.Problem = "it is a template: only its instances run"
	case err != nil:
		u.Problem = fmt.Sprintf("its unit file cannot be used: %v", err)
	}
}

func (d *draft) putNode(kind, id string, kv store.KV) {
	was := d.old.Nodes[id]
	if was == nil {
		was = &Node{ID: id}
	}
	n := d.nodes[id]
	if n == nil {
		n = &Node{ID: id}
		if had := d.next.Nodes[id]; had != nil {
			*n = *had
		}
		d.nodes[id] = n
	}
	switch kind {
	case "cluster/nodes":
		assign(d, &n.Record, was.Record, kv)
	case "cluster/settings":
		assign(d, &n.Settings, was.Settings, kv)
	case "reports/router":
		assign(d, &n.Router, was.Router, kv)
		return
	case "reports/units":
		assign(d, &n.Units, was.Units, kv)
		return
	}
	n.Metadata = n.Settings.Value.Merge(n.Record.Value.Metadata)
}

// finish puts what was changed into the snapshot. Maps that nothing has changed
// are shared with the old one.
func (d *draft) finish(reset bool) {
	if len(d.units) > 0 && !reset {
		d.next.Units = maps.Clone(d.next.Units)
	}
	if len(d.nodes) > 0 && !reset {
		d.next.Nodes = maps.Clone(d.next.Nodes)
	}
	for name, u := range d.units {
		if d.next.Units[name] = u; u.empty() {
			delete(d.next.Units, name)
		}
	}
	for id, n := range d.nodes {
		if d.next.Nodes[id] = n; n.empty() {
			delete(d.next.Nodes, id)
		}
	}
}

// records counts the records of a snapshot, with or without the reports.
func (s *Snapshot) records(reports bool) (n int) {
	count := func(modified int64) {
		if modified != 0 {
			n++
		}
	}
	for _, u := range s.Units {
		count(u.Record.Modified)
		count(u.Placement.Modified)
		count(u.Unplaced.Modified)
		count(u.Move.Modified)
	}
	for _, node := range s.Nodes {
		count(node.Record.Modified)
		count(node.Settings.Modified)
		if reports {
			count(node.Router.Modified)
			count(node.Units.Modified)
		}
	}
	count(s.Leader.Modified)
	count(s.Failover.Modified)
	return n
}
