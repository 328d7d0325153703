package fleetapi

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"

	"flotilla/internal/engine"
	"flotilla/internal/registry"
	"flotilla/internal/store"
	"flotilla/internal/unit"
	"flotilla/internal/unitapi"
)

// cluster reads all that the engine plans from, at one revision, and the units
// called by names.
func (h *Handler) cluster(ctx context.Context, names ...string) (*engine.Cluster, *view, error) {
	items, revision, err := h.Store.List(ctx, h.Keys.Prefix)
	if err != nil {
		return nil, nil, err
	}
	v, err := h.readNamed(ctx, revision, names)
	if err != nil {
		return nil, nil, err
	}
	return engine.Load(h.Keys, items, revision), v, nil
}

func (h *Handler) explain(r *http.Request) (any, error) {
	name := r.PathValue("name")
	c, v, err := h.cluster(r.Context(), name)
	if err != nil {
		return nil, err
	}
	if len(v.units) == 0 {
		return nil, noUnit(name)
	}
	u := v.unit(name, v.units[0])
	out := unitapi.Explanation{Unit: u, Placed: u.Placed, Summary: cmp.Or(c.Summary(name), u.Unplaced), Machines: []unitapi.Verdict{}}
	for _, one := range c.Explain(name) {
		out.Machines = append(out.Machines, unitapi.Verdict{ID: one.Machine, Node: one.Node, Verdict: one.Verdict, Reason: one.Reason, Score: one.Score})
	}
	return out, nil
}

// postMove asks the engine to move a unit, if the machine would take it.
func (h *Handler) postMove(r *http.Request) (any, error) {
	var in unitapi.MoveRequest
	if err := readBody(r, &in); err != nil {
		return nil, err
	}
	ctx, name := r.Context(), r.PathValue("name")
	c, v, err := h.cluster(ctx, name)
	if err != nil {
		return nil, err
	}
	if len(v.units) == 0 {
		return nil, noUnit(name)
	}
	f := &fleet{machines: v.machines}
	id, err := f.find(in.To, false)
	if err != nil {
		return nil, err
	}
	u := v.unit(name, v.units[0])
	out := unitapi.Moved{Machine: v.ref(id), Revision: v.revision}
	switch {
	case u.Global:
		return nil, fail(http.StatusConflict, "", "unit %s is global: it runs on every machine that is fit for it", name)
	case u.Desired == registry.Inactive || u.Desired == "":
		return nil, fail(http.StatusConflict, "start it, then move it", "unit %s is inactive and on no machine", name)
	case u.Machine != nil && u.Machine.ID == id && u.MovingTo == "", u.MovingTo == id:
		return out, nil
	}
	if why := c.Refuses(name, id); why != "" && (u.Machine == nil || u.Machine.ID != id) {
		return nil, fail(http.StatusConflict, "see: flotilla explain "+name, "machine %s cannot take unit %s: %s", cmp.Or(out.Machine.Node, id), name, why)
	}
	out.Changed = true
	out.Revision, err = h.move(ctx, []unitapi.ProposedMove{{Unit: name, To: id, Reason: cmp.Or(in.Reason, "somebody asked for it")}})
	return out, err
}

// move writes what the engine is to move, if the units are there.
func (h *Handler) move(ctx context.Context, moves []unitapi.ProposedMove) (int64, error) {
	var revision int64
	for some := range slices.Chunk(moves, batchUnits) {
		var ops []store.Op
		var conds []store.Cond
		for _, m := range some {
			ops = append(ops, store.Put(h.Keys.Move(m.Unit), registry.Encode(registry.Move{V: registry.Version, To: m.To, Reason: m.Reason})))
			conds = append(conds, store.Present(h.Keys.Unit(m.Unit)))
		}
		var err error
		for range attempts {
			// Done twice it is the same: an unknown outcome can be tried again.
			if revision, err = h.Store.Apply(ctx, ops, conds...); !errors.Is(err, store.ErrUnknown) {
				break
			}
		}
		if err != nil {
			return 0, fmt.Errorf("move %d units: %w", len(some), err)
		}
		for _, m := range some {
			h.Log.Info("unit is to move", "unit", m.Unit, "machine", m.To, "reason", m.Reason, "revision", revision)
		}
	}
	return revision, nil
}

func (h *Handler) rebalance(ctx context.Context) (unitapi.Rebalance, error) {
	c, v, err := h.cluster(ctx)
	if err != nil {
		return unitapi.Rebalance{}, err
	}
	out := unitapi.Rebalance{Moves: []unitapi.ProposedMove{}, Revision: v.revision}
	for _, m := range c.Rebalance() {
		out.Moves = append(out.Moves, unitapi.ProposedMove{Unit: m.Unit, From: m.From, To: m.To, Reason: m.Reason})
	}
	return out, nil
}

func (h *Handler) getRebalance(r *http.Request) (any, error) { return h.rebalance(r.Context()) }

// postRebalance writes the moves that are given, as shown before, or those that
// are best now if there is no body.
func (h *Handler) postRebalance(r *http.Request) (any, error) {
	if r.ContentLength == 0 {
		out, err := h.rebalance(r.Context())
		if err != nil || len(out.Moves) == 0 {
			return out, err
		}
		out.Revision, err = h.move(r.Context(), out.Moves)
		return out, err
	}
	var in unitapi.Rebalance
	if err := readBody(r, &in); err != nil {
		return nil, err
	}
	for _, m := range in.Moves {
		if err := errors.Join(unit.CheckName(m.Unit), registry.CheckMachineID(m.To)); err != nil {
			return nil, fail(http.StatusBadRequest, "", "move unit %q to %q: %v", m.Unit, m.To, err)
		}
	}
	var err error
	in.Revision, err = h.move(r.Context(), in.Moves)
	return in, err
}
