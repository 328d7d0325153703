package fleetapi

import (
	"cmp"
	"context"
	"net/http"
	"slices"

	"flotilla/internal/state"
	"flotilla/internal/unit"
)

func stateAsFleet(name, machine string, s state.UnitState) fleetState {
	return fleetState{Name: name, Hash: s.Hash, MachineID: machine, Load: s.Load, Active: s.Active, Sub: s.Sub}
}

func (h *Handler) getStates(r *http.Request) (answer, error) {
	token, err := h.page(r)
	if err != nil {
		return answer{}, err
	}
	machine, name := r.URL.Query().Get("machineID"), r.URL.Query().Get("unitName")
	known, err := h.API.State.Full(r.Context())
	if err != nil {
		return answer{}, err
	}
	var all []fleetState
	for id, n := range known.Nodes {
		if machine != "" && machine != id {
			continue
		}
		for unit, s := range n.Units.Value.Units {
			// Without a hash the machine has no file of it: for fleet it is not there.
			if s.Hash != "" && (name == "" || name == unit) {
				all = append(all, stateAsFleet(unit, id, s))
			}
		}
	}
	slices.SortFunc(all, func(a, b fleetState) int {
		return cmp.Or(cmp.Compare(a.Name, b.Name), cmp.Compare(a.MachineID, b.MachineID))
	})
	states, next := cut(all, token)
	return answer{status: http.StatusOK, body: fleetPage{States: states, Next: next}}, nil
}

// getState answers with the state of a unit on its machine, or on any if it is
// global. fleetctl cannot bear a 404 for a unit that it has just started: if the
// unit is to run and has no state yet, the request waits for one, and in the end
// gets what systemd says of a unit that it does not know.
func (h *Handler) getState(r *http.Request, name string) (answer, error) {
	known, err := h.API.State.Full(r.Context())
	if err != nil {
		return answer{}, err
	}
	st := state.StandingOf(known, known.Units[name])
	if !st.Record.Exists() {
		return answer{}, refuse(http.StatusNotFound, "unit state does not exist")
	}
	found := pick(known, name, st.Home)
	if found == nil && st.Record.Value.Desired != unit.Inactive {
		defer h.API.State.FollowReports()()
		ctx, cancel := context.WithTimeout(r.Context(), h.hold)
		defer cancel()
		_, _ = h.API.State.Until(ctx, func(known *state.Snapshot) bool { // the end of ctx is an answer too
			found = pick(known, name, "")
			return found != nil
		})
	}
	if found == nil {
		found = &fleetState{Name: name, Load: "not-found", Active: "inactive", Sub: "dead"}
	}
	return answer{status: http.StatusOK, body: found}, nil
}

// pick returns the unit's state on the machine called home, else on the first
// that has one, else nil.
func pick(known *state.Snapshot, name, home string) *fleetState {
	first := ""
	for id, n := range known.Nodes {
		if n.Units.Value.Units[name].Hash == "" {
			continue
		}
		if first == "" || id == home || first != home && id < first {
			first = id
		}
	}
	if first == "" {
		return nil
	}
	found := stateAsFleet(name, first, known.Nodes[first].Units.Value.Units[name])
	return &found
}
