package api

import (
	"cmp"
	"maps"
	"net/http"
	"path"
	"slices"
	"strings"

	"flotilla/internal/state"
	"flotilla/internal/unit"
	"flotilla/internal/wait"
	"flotilla/internal/wire"
)

// reporting returns the nodes that say what they have, by ID.
func reporting(known *state.Snapshot) []*state.Node {
	return slices.SortedFunc(maps.Values(known.Nodes), func(a, b *state.Node) int { return strings.Compare(a.ID, b.ID) })
}

// unitOf puts together all that is known of a unit. nodes are those of reporting.
func unitOf(known *state.Snapshot, nodes []*state.Node, u *state.Unit) wire.Unit {
	st := state.StandingOf(known, u)
	name, _ := unit.SplitName(u.Name)
	out := wire.Unit{
		Name: u.Name, Hash: st.Hash, Desired: u.Record.Value.Desired, Current: st.Current, Global: u.Requirements.Global, Template: name.IsTemplate(),
		Leaving: u.Placement.Value.Leave, Unplaced: u.Unplaced.Value.Reason, MovingTo: u.Move.Value.To,
		Restarts: u.Record.Value.Restarts, Problem: cmp.Or(u.Record.Problem, u.Placement.Problem), States: []wire.UnitState{},
	}
	if out.Problem == "" && !out.Template {
		out.Problem = u.Problem
	}
	if st.Home != "" {
		out.Node, out.Placed = new(wait.Ref(known, st.Home)), u.Placement.Value.Reason
	}
	for _, n := range nodes {
		if s, ok := n.Units.Value.Units[u.Name]; ok {
			out.States = append(out.States, stateOf(n, u.Name, s))
		}
	}
	return out
}

func stateOf(n *state.Node, unit string, s state.UnitState) wire.UnitState {
	return wire.UnitState{
		Unit: unit, NodeID: n.ID, Node: n.Record.Value.Name, Address: n.Record.Value.Address, Load: s.Load, Active: s.Active, Sub: s.Sub,
		Hash: s.Hash, Epoch: s.Epoch, Launched: s.Launched, Restarts: s.Restarts, Trouble: s.Trouble, Waiting: s.Waiting,
	}
}

// isPattern reports whether a name is to be matched with those of units.
func isPattern(name string) bool { return strings.ContainsAny(name, `*?[\`) }

// fullName returns the name of the unit that somebody means: web is web.service.
func fullName(name string) string {
	if unit.CheckName(name) == nil {
		return name
	}
	return unit.FromArgument(name)
}

// find returns the names of the units that a name or a pattern means. A name also
// means itself, whatever is in it, and a pattern may leave out the type of
// services; one that is malformed means none.
func find(known *state.Snapshot, what string) []string {
	for _, name := range []string{what, fullName(what)} {
		if u := known.Units[name]; u != nil && u.Record.Exists() {
			return []string{name}
		}
	}
	if !isPattern(what) {
		return nil
	}
	var names []string
	for name, u := range known.Units {
		ok, err := path.Match(what, name)
		if !ok && err == nil {
			ok, err = path.Match(what+".service", name)
		}
		if ok && err == nil && u.Record.Exists() {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return names
}

// resolve returns the names of the units that names and patterns mean, each once
// and in their order. What means no unit stands for itself.
func resolve(known *state.Snapshot, asked []string) (names []string) {
	seen := map[string]bool{}
	for _, what := range asked {
		found := find(known, what)
		switch {
		case len(found) > 0:
		case isPattern(what):
			found = []string{what}
		default:
			found = []string{fullName(what)}
		}
		for _, name := range found {
			if !seen[name] {
				seen[name] = true
				names = append(names, name)
			}
		}
	}
	return names
}

func (s *Server) getUnits(r *http.Request) (any, error) {
	asked := r.URL.Query()["name"]
	known, err := s.State.Full(r.Context())
	if err != nil {
		return nil, err
	}
	out := wire.Units{Revision: known.Revision, Units: []wire.Unit{}}
	names := slices.Collect(maps.Keys(known.Units))
	if len(asked) > 0 {
		names = resolve(known, asked)
	}
	slices.Sort(names)
	nodes := reporting(known)
	for _, name := range names {
		if u := known.Units[name]; u != nil && u.Record.Exists() {
			out.Units = append(out.Units, unitOf(known, nodes, u))
		} else if len(asked) > 0 {
			out.Missing = append(out.Missing, name)
		}
	}
	return out, nil
}

func noUnit(name string) error {
	return wire.Errorf(wire.CodeNotFound, "list them with: flotilla list-unit-files", "there is no unit %q", name)
}

// fullUnit returns a snapshot with reports and the unit of a request.
func (s *Server) fullUnit(r *http.Request) (*state.Snapshot, *state.Unit, error) {
	known, err := s.State.Full(r.Context())
	if err != nil {
		return nil, nil, err
	}
	name := r.PathValue("name")
	for _, name := range []string{name, fullName(name)} {
		if u := known.Units[name]; u != nil && u.Record.Exists() {
			return known, u, nil
		}
	}
	return nil, nil, noUnit(name)
}

func (s *Server) getUnit(r *http.Request) (any, error) {
	known, u, err := s.fullUnit(r)
	if err != nil {
		return nil, err
	}
	out := unitOf(known, reporting(known), u)
	out.Text = u.Record.Value.Text
	if f, err := unit.Parse(out.Text); err == nil {
		out.Serialized = f.Serialize()
	}
	return out, nil
}

// getStates answers with what nodes have, without what is wanted of it.
func (s *Server) getStates(r *http.Request) (any, error) {
	known, err := s.State.Full(r.Context())
	if err != nil {
		return nil, err
	}
	nodes, n := reporting(known), 0
	for _, node := range nodes {
		n += len(node.Units.Value.Units)
	}
	out := wire.States{Revision: known.Revision, States: make([]wire.UnitState, 0, n)}
	for _, node := range nodes {
		for name, st := range node.Units.Value.Units {
			if st.Load != "" { // else it only waits there
				out.States = append(out.States, stateOf(node, name, st))
			}
		}
	}
	slices.SortFunc(out.States, func(a, b wire.UnitState) int {
		return cmp.Or(strings.Compare(a.Unit, b.Unit), strings.Compare(a.NodeID, b.NodeID))
	})
	return out, nil
}
