package wait

import (
	"testing"

	"flotilla/internal/state"
	"flotilla/internal/store"
	"flotilla/internal/unit"
)

// What a unit has to be for a verb to be done.
func TestGoals(t *testing.T) {
	const text = "[Service]\nExecStart=/bin/true\n"
	f, err := unit.Parse(text)
	if err != nil {
		t.Fatal(err)
	}
	hash := f.Hash().String()
	standing := func(desired unit.Desired, placement *state.Placement, st *state.UnitState) state.Standing {
		keys := state.Keys{Prefix: "/"}
		items := []store.KV{{Key: keys.Unit("a.service"), Value: state.Encode(state.UnitRecord{V: 1, Text: text, Desired: desired, Restarts: 2}), CreateRevision: 1, ModRevision: 1}}
		if placement != nil {
			placement.V = 1
			items = append(items, store.KV{Key: keys.Placement("a.service"), Value: state.Encode(*placement), CreateRevision: 1, ModRevision: 1})
		}
		other := state.UnitState{Active: "active", Hash: hash, Restarts: 2, Launched: true}
		for node, st := range map[string]*state.UnitState{"other": &other, "m": st} {
			if st != nil {
				items = append(items, store.KV{Key: keys.UnitsReport(node), Value: state.Encode(state.UnitsReport{V: 1, Units: map[string]state.UnitState{"a.service": *st}}), CreateRevision: 1, ModRevision: 1})
			}
		}
		known := state.Load(keys, items, 1)
		return state.StandingOf(known, known.Units["a.service"])
	}
	own := func(desired unit.Desired, st state.UnitState) state.Standing {
		st.Launched = desired == unit.Launched
		return standing(desired, &state.Placement{Node: "m"}, &st)
	}
	nowhere := standing(unit.Launched, nil, nil)
	for name, tc := range map[string]struct {
		goal goal
		st   state.Standing
		want verdict
	}{
		"active":                 {launched, own(unit.Launched, state.UnitState{Active: "active", Hash: hash, Restarts: 2}), reached},
		"starting":               {launched, own(unit.Launched, state.UnitState{Active: "activating", Hash: hash, Restarts: 2}), underWay},
		"old version":            {launched, own(unit.Launched, state.UnitState{Active: "active", Hash: "old", Restarts: 2}), underWay},
		"not yet restarted":      {launched, own(unit.Launched, state.UnitState{Active: "active", Hash: hash, Restarts: 1}), underWay},
		"failed":                 {launched, own(unit.Launched, state.UnitState{Active: "failed", Hash: hash, Restarts: 2}), broken},
		"ended":                  {launched, own(unit.Launched, state.UnitState{Active: "inactive", Hash: hash, Restarts: 2}), doubtful},
		"has yet to wait":        {launched, own(unit.Launched, state.UnitState{Active: "inactive", Hash: hash, Restarts: 2, Waiting: "soon"}), underWay},
		"nowhere, to be started": {launched, nowhere, underWay},
		"leaving": {launched, standing(unit.Launched, &state.Placement{Node: "m", Leave: "it moves"},
			&state.UnitState{Active: "active", Hash: hash, Restarts: 2, Launched: true}), underWay},
		"loaded":                 {loaded, own(unit.Loaded, state.UnitState{Active: "inactive", Hash: hash}), reached},
		"still stopping":         {stopped, own(unit.Loaded, state.UnitState{Active: "deactivating", Hash: hash}), underWay},
		"nowhere, to be stopped": {stopped, nowhere, reached},
		"not yet taken up":       {stopped, standing(unit.Loaded, &state.Placement{Node: "m"}, nil), underWay},
		"nowhere, to be loaded":  {loaded, nowhere, underWay},
		"unloaded":               {inactive, nowhere, reached},
		"to be unloaded":         {inactive, own(unit.Loaded, state.UnitState{Hash: hash}), underWay},
		"to be destroyed":        {gone, nowhere, underWay},
	} {
		if got, _ := tc.goal(tc.st); got != tc.want {
			t.Errorf("%s: %d, want %d", name, got, tc.want)
		}
	}
}
