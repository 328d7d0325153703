// Package state is what the store holds about units and nodes, at one revision:
// where each record is, what it says, the immutable Snapshot of all of them, and
// the one Feed through which a node reads them. It knows unit files; it must not
// know systemd, HTTP, nor the rules by which units are placed or run.
//
//	cluster/units/<unit>       UnitRecord    what is wanted                       written by the API
//	cluster/placements/<unit>  Placement     the node it belongs to               engine; the node when it lets go
//	cluster/unplaced/<unit>    Unplaced      why it is on no node                 engine
//	cluster/moves/<unit>       Move          somebody wants it elsewhere          API; engine when done
//	cluster/nodes/<node>       NodeRecord    there as long as the node's lease    the node
//	cluster/settings/<node>    Settings      what operators set; outlives it      API
//	cluster/leader             Leader        who decides                          the leader
//	cluster/failover           Failover      many nodes are gone: held, allowed   engine, API
//	reports/router/<node>      RouterReport  how far its router is; on its lease  the node
//	reports/units/<node>       UnitsReport   what runs there; on its lease        the node
//
// All nodes follow what is below cluster/. What is below reports/ changes all the
// time, and only who reads it follows it.
package state

// DefaultPrefix is where the records are unless the node was told otherwise.
const DefaultPrefix = "/flotilla/"

// Keys builds the keys of the records below a prefix.
type Keys struct{ Prefix string } // ends in a slash

// Unit names and node IDs have no slash: see unit.CheckName and CheckNodeID.

func (k Keys) Unit(name string) string       { return k.Prefix + "cluster/units/" + name }
func (k Keys) Placement(name string) string  { return k.Prefix + "cluster/placements/" + name }
func (k Keys) Unplaced(name string) string   { return k.Prefix + "cluster/unplaced/" + name }
func (k Keys) Move(name string) string       { return k.Prefix + "cluster/moves/" + name }
func (k Keys) Node(id string) string         { return k.Prefix + "cluster/nodes/" + id }
func (k Keys) Settings(id string) string     { return k.Prefix + "cluster/settings/" + id }
func (k Keys) Leader() string                { return k.Prefix + "cluster/leader" }
func (k Keys) Failover() string              { return k.Prefix + "cluster/failover" }
func (k Keys) RouterReport(id string) string { return k.Prefix + "reports/router/" + id }
func (k Keys) UnitsReport(id string) string  { return k.Prefix + "reports/units/" + id }

// Confirmed holds, in decimal, the revision up to which somebody has confirmed
// that what vanished from the store shall vanish.
func (k Keys) Confirmed() string { return k.Prefix + "confirmed" }

// Schema holds the version of all these keys.
func (k Keys) Schema() string { return k.Prefix + "schema" }
