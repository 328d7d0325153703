package fleetapi

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"slices"
	"strings"

	"flotilla/internal/registry"
	"flotilla/internal/store"
	"flotilla/internal/unitapi"
)

func stateAsFleet(name, machine string, s registry.State) fleetState {
	return fleetState{Name: name, Hash: s.Hash, MachineID: machine, Load: s.Load, Active: s.Active, Sub: s.Sub}
}

func (h *Handler) fleetStates(r *http.Request) (answer, error) {
	token, err := h.page(r)
	if err != nil {
		return answer{}, err
	}
	machine, name := r.URL.Query().Get("machineID"), r.URL.Query().Get("unitName")
	items, _, err := h.Store.List(r.Context(), h.Keys.States(""))
	if err != nil {
		return answer{}, err
	}
	var all []fleetState
	for _, m := range h.statesOf(items) {
		if machine != "" && machine != m.machine {
			continue
		}
		for unit, s := range m.units {
			// Without a hash the machine has no file of it: for fleet it is not there.
			if s.Hash != "" && (name == "" || name == unit) {
				all = append(all, stateAsFleet(unit, m.machine, s))
			}
		}
	}
	slices.SortFunc(all, func(a, b fleetState) int {
		return cmp.Or(cmp.Compare(a.Name, b.Name), cmp.Compare(a.MachineID, b.MachineID))
	})
	states, next := cut(all, token)
	return answer{status: http.StatusOK, body: fleetPage{States: states, Next: next}}, nil
}

// getStates answers with what machines have, without what is wanted of it.
func (h *Handler) getStates(r *http.Request) (any, error) {
	lists, revision, err := h.Store.ListMany(r.Context(), 0, h.Keys.States(""), h.Keys.Machine(""))
	if err != nil {
		return nil, err
	}
	all := unitapi.States{Revision: revision, Machines: map[string]unitapi.MachineRef{}, States: []unitapi.UnitState{}}
	machines := byName(h.Keys.Machine(""), lists[1], anew[registry.Machine])
	for _, m := range h.statesOf(lists[0]) {
		record := machines[m.machine].registry
		all.Machines[m.machine] = unitapi.MachineRef{ID: m.machine, Node: record.Node, Address: record.Address}
		for unit, s := range m.units {
			if s.Load != "" { // else it only waits there
				all.States = append(all.States, unitapi.UnitState{Unit: unit, Machine: m.machine, Load: s.Load, Active: s.Active, Sub: s.Sub,
					Hash: s.Hash, Epoch: s.Epoch, Launched: s.Launched, Restarts: s.Restarts, Trouble: s.Trouble, Waiting: s.Waiting})
			}
		}
	}
	slices.SortFunc(all.States, func(a, b unitapi.UnitState) int {
		return cmp.Or(cmp.Compare(a.Unit, b.Unit), cmp.Compare(a.Machine, b.Machine))
	})
	return all, nil
}

// errSeen ends a watch.
var errSeen = errors.New("the unit has a state")

// fleetState answers with the state of a unit on its machine, or on any if it is
// global. fleetctl cannot bear a 404 for a unit that it has just started: if the
// unit is to run and has no state yet, the request waits for one, and in the end
// gets what systemd says of a unit that it does not know.
func (h *Handler) fleetState(r *http.Request, name string) (answer, error) {
	k := h.Keys
	kvs, revision, err := h.Store.GetMany(r.Context(), 0, k.Unit(name), k.Placement(name))
	if err != nil {
		return answer{}, err
	}
	kv, found := kvs[k.Unit(name)]
	if !found {
		return answer{}, refuse(http.StatusNotFound, "unit state does not exist")
	}
	at, placed := kvs[k.Placement(name)]
	home := recordOf[registry.Placement](at, placed).registry.Machine
	items, _, err := h.Store.ListMany(r.Context(), revision, k.States(""))
	if err != nil {
		return answer{}, err
	}
	state := h.pick(items[0], name, home)
	if state == nil && recordOf[registry.Unit](kv, true).registry.Desired != registry.Inactive {
		if state, err = h.awaitState(r.Context(), name, revision+1); err != nil {
			return answer{}, err
		}
	}
	if state == nil {
		state = &fleetState{Name: name, Load: "not-found", Active: "inactive", Sub: "dead"}
	}
	return answer{status: http.StatusOK, body: state}, nil
}

// pick returns the unit's state on the machine called home, else on the first
// that has one, else nil.
func (h *Handler) pick(items []store.KV, name, home string) *fleetState {
	var first *fleetState
	for _, m := range h.statesOf(items) {
		s, ok := m.units[name]
		if !ok || s.Hash == "" {
			continue
		}
		state := stateAsFleet(name, m.machine, s)
		if m.machine == home {
			return &state
		}
		if first == nil {
			first = &state
		}
	}
	return first
}

// awaitState watches the store until a machine has a state of the unit. It
// returns nil if none has in time.
func (h *Handler) awaitState(ctx context.Context, name string, revision int64) (*fleetState, error) {
	ctx, cancel := context.WithTimeout(ctx, h.hold)
	defer cancel()
	quoted, err := json.Marshal(name)
	if err != nil {
		panic(err) // a string cannot fail
	}
	var state *fleetState
	err = h.Store.Watch(ctx, h.Keys.States(""), revision, func(events []store.Event) error {
		for _, e := range events {
			// Cheap first: every state of the cluster comes by here.
			if e.Deleted || !strings.Contains(e.Value, string(quoted)) {
				continue
			}
			if state = h.pick([]store.KV{e.KV}, name, ""); state != nil {
				return errSeen
			}
		}
		return nil
	})
	if err != nil && !errors.Is(err, errSeen) {
		return nil, err
	}
	return state, nil
}
