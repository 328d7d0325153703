package state

import (
	"net/netip"

	"flotilla/internal/unit"
)

// Snapshot is all records at one revision. It is immutable, since all readers of
// a Feed share it. The one before the first list has revision 0 and no records.
type Snapshot struct {
	Revision int64 // of the store: all that was written up to it is in here
	Reports  bool  // the reports of nodes are in here
	Units    map[string]*Unit
	Nodes    map[string]*Node // by ID; also nodes that are away and have settings
	Leader   Item[Leader]
	Failover Item[Failover]
	Strange  map[string]string // keys that are none of ours, and why
}

// Rev returns the revision. It takes nil.
func (s *Snapshot) Rev() int64 {
	if s == nil {
		return 0
	}
	return s.Revision
}

// Unit is all records of one unit name, and what its file asks for.
type Unit struct {
	Name      string
	Record    Item[UnitRecord]
	Placement Item[Placement]
	Unplaced  Item[Unplaced]
	Move      Item[Move]

	// What follows from the text of Record. Of a text that cannot be used only
	// Problem is known, and the rest is that of the last usable one.
	Hash         string             // as fleet computes it; "" if there was no usable text
	Requirements *unit.Requirements // never nil
	Problem      string             // why the unit cannot run; "" if it can
}

// Wanted reports whether the unit shall be on a node.
func (u *Unit) Wanted() bool {
	return u.Record.Exists() && u.Record.Value.Desired != unit.Inactive
}

// Unreadable returns why one of the unit's records cannot be read, "" if all can:
// nothing is decided about such a unit.
func (u *Unit) Unreadable() string {
	for _, problem := range []string{u.Record.Problem, u.Placement.Problem} {
		if problem != "" {
			return problem
		}
	}
	return ""
}

func (u *Unit) empty() bool {
	return !u.Record.Exists() && !u.Placement.Exists() && !u.Unplaced.Exists() && !u.Move.Exists()
}

// Node is all records of one node.
type Node struct {
	ID       string
	Record   Item[NodeRecord]
	Settings Item[Settings]
	Router   Item[RouterReport] // only if Snapshot.Reports
	Units    Item[UnitsReport]  // only if Snapshot.Reports
	Metadata map[string]string  // its own, overlaid by the settings
}

// Present reports whether the node is there: its lease lives.
func (n *Node) Present() bool { return n != nil && n.Record.Exists() }

// Generation changes when the node was away for as long as its lease, that is,
// when its units may have been given away. It is 0 while it is away.
func (n *Node) Generation() int64 {
	if n == nil {
		return 0
	}
	return n.Record.Created
}

// Name returns the name of the node, or its ID while it is away.
func (n *Node) Name() string {
	if n.Record.Exists() && n.Record.Value.Name != "" {
		return n.Record.Value.Name
	}
	return n.ID
}

func (n *Node) empty() bool {
	return !n.Record.Exists() && !n.Settings.Exists() && !n.Router.Exists() && !n.Units.Exists()
}

// Problems returns why records cannot be used, by key.
func (s *Snapshot) Problems(keys Keys) map[string]string {
	found := map[string]string{}
	note := func(key, problem string) {
		if problem != "" {
			found[key] = problem
		}
	}
	for key, why := range s.Strange {
		note(key, why)
	}
	for name, u := range s.Units {
		if u.Record.Problem == "" && u.Problem != "" && u.Record.Exists() {
			note(keys.Unit(name), u.Problem)
		}
		note(keys.Unit(name), u.Record.Problem)
		note(keys.Placement(name), u.Placement.Problem)
		note(keys.Unplaced(name), u.Unplaced.Problem)
		note(keys.Move(name), u.Move.Problem)
	}
	for id, n := range s.Nodes {
		note(keys.Node(id), n.Record.Problem)
		note(keys.Settings(id), n.Settings.Problem)
		note(keys.RouterReport(id), n.Router.Problem)
		note(keys.UnitsReport(id), n.Units.Problem)
	}
	note(keys.Leader(), s.Leader.Problem)
	note(keys.Failover(), s.Failover.Problem)
	return found
}

// HasAddress reports whether a node that is there has the address.
func (s *Snapshot) HasAddress(addr netip.Addr) bool {
	for _, n := range s.Nodes {
		if known, err := netip.ParseAddr(n.Record.Value.Address); err == nil && n.Present() && known.Unmap() == addr {
			return true
		}
	}
	return false
}
