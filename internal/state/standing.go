package state

import "flotilla/internal/unit"

// Standing is a unit as a snapshot with reports shows it: where it belongs, and
// what is said of it there.
type Standing struct {
	*Unit
	Home    string       // ID of the node that it belongs to; "" if it is global or nowhere
	There   UnitState    // what that node says of it
	Known   bool         // it says something
	Hash    string       // of its text; "" if that cannot be read
	Current unit.Desired // what has been reached there; "" for a global unit
}

// StandingOf returns how a unit stands. It takes nil for a unit of which there is
// nothing at all.
func StandingOf(s *Snapshot, u *Unit) Standing {
	if u == nil {
		u = &Unit{Requirements: &unit.Requirements{}}
	}
	st := Standing{Unit: u, Hash: u.Hash}
	if u.Problem != "" { // then u.Hash may be that of an older text
		st.Hash = ""
		if f, err := unit.Parse(u.Record.Value.Text); err == nil {
			st.Hash = f.Hash().String()
		}
	}
	if u.Placement.Usable() {
		st.Home = u.Placement.Value.Node
		if n := s.Nodes[st.Home]; n != nil {
			st.There, st.Known = n.Units.Value.Units[u.Name]
		}
	}
	switch {
	case u.Requirements.Global && u.Record.Exists():
	case !st.Known || st.There.Hash == "":
		st.Current = unit.Inactive
	case st.There.Launched && st.There.Hash == st.Hash: // what was started is what is wanted now
		st.Current = unit.Launched
	default:
		st.Current = unit.Loaded
	}
	return st
}

// Named returns the unit of that name; if there is none, one without records.
func (s *Snapshot) Named(name string) *Unit {
	if u := s.Units[name]; u != nil {
		return u
	}
	return &Unit{Name: name, Requirements: &unit.Requirements{Unit: name}}
}
