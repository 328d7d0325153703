package cli

import (
	"testing"

	"flotilla/internal/registry"
	"flotilla/internal/unitapi"
)

// What a unit has to be for a verb to be done.
func TestGoals(t *testing.T) {
	own := func(current registry.Desired, st unitapi.State) unitView {
		st.Machine = "m"
		return unitView{unitapi.Unit{Name: "a.service", Hash: "h", Current: current, Restarts: 2,
			Machine: &unitapi.MachineRef{ID: "m"}, States: []unitapi.State{{Machine: "other", Active: "active", Hash: "h", Restarts: 2}, st}}}
	}
	nowhere := unitView{unitapi.Unit{Current: registry.Inactive}}
	for name, tc := range map[string]struct {
		goal goal
		u    unitView
		want stand
	}{
		"active":                 {launched, own(registry.Launched, unitapi.State{Active: "active", Hash: "h", Restarts: 2}), reached},
		"starting":               {launched, own(registry.Launched, unitapi.State{Active: "activating", Hash: "h", Restarts: 2}), underWay},
		"old version":            {launched, own(registry.Launched, unitapi.State{Active: "active", Hash: "old", Restarts: 2}), underWay},
		"not yet restarted":      {launched, own(registry.Launched, unitapi.State{Active: "active", Hash: "h", Restarts: 1}), underWay},
		"failed":                 {launched, own(registry.Launched, unitapi.State{Active: "failed", Hash: "h", Restarts: 2}), broken},
		"ended":                  {launched, own(registry.Launched, unitapi.State{Active: "inactive", Hash: "h", Restarts: 2}), doubtful},
		"nowhere, to be started": {launched, nowhere, underWay},
		"loaded":                 {loaded, own(registry.Loaded, unitapi.State{Active: "inactive", Hash: "h"}), reached},
		"still stopping":         {stopped, own(registry.Loaded, unitapi.State{Active: "deactivating", Hash: "h"}), underWay},
		"nowhere, to be stopped": {stopped, nowhere, reached},
		"nowhere, to be loaded":  {loaded, nowhere, underWay},
		"unloaded":               {inactive, nowhere, reached},
		"to be unloaded":         {inactive, own(registry.Loaded, unitapi.State{}), underWay},
	} {
		if got, _ := tc.goal(tc.u); got != tc.want {
			t.Errorf("%s: %d, want %d", name, got, tc.want)
		}
	}
}
