package api

import (
	"cmp"
	"context"
	"net/http"
	"slices"

	"flotilla/internal/engine"
	"flotilla/internal/state"
	"flotilla/internal/store"
	"flotilla/internal/unit"
	"flotilla/internal/wait"
	"flotilla/internal/wire"
)

func (s *Server) getExplanation(r *http.Request) (any, error) {
	known, u, err := s.fullUnit(r)
	if err != nil {
		return nil, err
	}
	out := wire.UnitExplanation{Unit: unitOf(known, reporting(known), u), Summary: cmp.Or(engine.Summary(known, u.Name), u.Unplaced.Value.Reason), Nodes: []wire.Verdict{}}
	out.Nodes = append(out.Nodes, engine.Explain(known, u.Name)...)
	return out, nil
}

// postMove asks the engine to move a unit, if the node would take it.
func (s *Server) postMove(r *http.Request) (any, error) {
	var in wire.MoveRequest
	if err := readBody(r, &in); err != nil {
		return nil, err
	}
	known, u, err := s.fullUnit(r)
	if err != nil {
		return nil, err
	}
	id, err := findNode(known, in.To, false)
	if err != nil {
		return nil, err
	}
	out := wire.Moved{Unit: u.Name, Node: wait.Ref(known, id), Revision: known.Revision}
	st := state.StandingOf(known, u)
	switch {
	case u.Requirements.Global:
		return nil, wire.Errorf(wire.CodeConflict, "", "unit %s is global: it runs on every node that is fit for it", u.Name)
	case !u.Wanted():
		return nil, wire.Errorf(wire.CodeConflict, "start it, then move it", "unit %s is inactive and on no node", u.Name)
	case st.Home == id && !u.Move.Exists(), u.Move.Exists() && u.Move.Value.To == id:
		return out, nil
	}
	if why := engine.Refuses(known, u.Name, id); why != "" && st.Home != id {
		return nil, wire.Errorf(wire.CodeConflict, "see: flotilla explain "+u.Name, "node %s cannot take unit %s: %s", cmp.Or(out.Node.Name, id), u.Name, why)
	}
	out.Changed = true
	out.Revision, err = s.move(r.Context(), []wire.Move{{Unit: u.Name, To: id, Reason: cmp.Or(in.Reason, "somebody asked for it")}})
	return out, err
}

// move writes what the engine is to move, if the units are there.
func (s *Server) move(ctx context.Context, moves []wire.Move) (revision int64, err error) {
	for some := range slices.Chunk(moves, batchUnits) {
		revision, err = s.State.Update(ctx, func(known *state.Snapshot) (tx state.Tx, err error) {
			for _, m := range some {
				u := known.Units[m.Unit]
				switch {
				case u == nil || !u.Record.Exists():
					return tx, wire.Errorf(wire.CodeConflict, "", "there is no unit %s to be moved", m.Unit)
				case u.Move.Usable() && u.Move.Value.To == m.To && u.Move.Value.Reason == m.Reason:
					continue
				}
				value := u.Move.With(state.Move{V: state.Version, To: m.To, Reason: m.Reason})
				tx.Ops = append(tx.Ops, store.Put(s.State.Keys.Move(m.Unit), value))
				tx.Conds = append(tx.Conds, store.Present(s.State.Keys.Unit(m.Unit)))
			}
			return tx, nil
		})
		if err != nil {
			return 0, failed(err, "move units")
		}
		for _, m := range some {
			s.Log.Info("unit is to move", "unit", m.Unit, "node", m.To, "reason", m.Reason, "revision", revision)
		}
	}
	return revision, nil
}

func (s *Server) getRebalance(r *http.Request) (any, error) {
	known, err := s.State.Full(r.Context())
	if err != nil {
		return nil, err
	}
	return wire.Rebalance{Moves: append([]wire.Move{}, engine.Rebalance(known)...), Revision: known.Revision}, nil
}

// postRebalance writes the moves that are given, as shown before, or those that
// are best now if there is no body.
func (s *Server) postRebalance(r *http.Request) (any, error) {
	var in wire.Rebalance
	if r.ContentLength == 0 {
		best, err := s.getRebalance(r)
		if err != nil {
			return nil, err
		}
		in = best.(wire.Rebalance)
	} else if err := readBody(r, &in); err != nil {
		return nil, err
	}
	for _, m := range in.Moves {
		if err := cmp.Or(unit.CheckName(m.Unit), state.CheckNodeID(m.To)); err != nil {
			return nil, wire.Errorf(wire.CodeBadRequest, "", "move unit %q to %q: %v", m.Unit, m.To, err)
		}
	}
	if len(in.Moves) == 0 {
		return in, nil
	}
	var err error
	in.Revision, err = s.move(r.Context(), in.Moves)
	return in, err
}
