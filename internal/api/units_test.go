package api

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"flotilla/internal/api/apitest"
	"flotilla/internal/state"
	"flotilla/internal/unit"
	"flotilla/internal/wire"
)

// Everything that is known of a unit is in its answer.
func TestUnits(t *testing.T) {
	w := newWorld(t)
	w.Node("m1")
	one, global := "# mine\n"+apitest.Text("/bin/true"), apitest.Text("/bin/true")+"[X-Fleet]\nGlobal=yes\n"
	w.submit(wire.Submission{Name: "a.service", Text: new(one), Desired: "launched"}, wire.Submission{Name: "g.service", Text: new(global), Desired: "launched"},
		wire.Submission{Name: "t@.service", Text: new(one)}, wire.Submission{Name: "n.service", Text: new(one), Desired: "loaded"})
	w.Put("cluster/placements/a.service", state.Encode(state.Placement{V: 1, Node: "m1", Reason: "the fewest units", Leave: "m1 is drained"}))
	w.Put("cluster/unplaced/n.service", state.Encode(state.Unplaced{V: 1, Reason: "1 machine: 1 has no disk=ssd"}))
	w.Put("cluster/moves/a.service", state.Encode(state.Move{V: 1, To: "m2"}))
	w.Put("cluster/units/x.service", `{"v":9}`)
	w.Put("cluster/units/y.service", state.Encode(state.UnitRecord{V: 1, Text: "[x", Desired: "loaded"}))
	running := state.UnitState{Hash: apitest.Hash(t, one), Load: "loaded", Active: "active", Sub: "running", Launched: true, Epoch: 3, Restarts: 2}
	w.Report("m1", map[string]state.UnitState{"a.service": running, "g.service": {Waiting: "it conflicts with a.service"}})
	w.Report("m9", map[string]state.UnitState{"a.service": {Hash: "0", Load: "loaded", Active: "failed", Sub: "failed", Trouble: "start limit"}})

	var list wire.Units
	w.JSON("GET", "/v1/units", nil, 200, &list)
	ref := wire.NodeRef{ID: "m1", Name: "node-m1", Address: "10.0.0.1"}
	hash := apitest.Hash(t, one)
	want := []wire.Unit{
		{Name: "a.service", Hash: hash, Desired: "launched", Current: "launched", Node: &ref, Leaving: "m1 is drained", Placed: "the fewest units", MovingTo: "m2",
			States: []wire.UnitState{
				{Unit: "a.service", NodeID: "m1", Node: "node-m1", Address: "10.0.0.1", Load: "loaded", Active: "active", Sub: "running", Hash: hash, Epoch: 3, Launched: true, Restarts: 2},
				{Unit: "a.service", NodeID: "m9", Load: "loaded", Active: "failed", Sub: "failed", Hash: "0", Trouble: "start limit"},
			}},
		{Name: "g.service", Hash: apitest.Hash(t, global), Desired: "launched", Global: true,
			States: []wire.UnitState{{Unit: "g.service", NodeID: "m1", Node: "node-m1", Address: "10.0.0.1", Waiting: "it conflicts with a.service"}}},
		{Name: "n.service", Hash: hash, Desired: "loaded", Current: "inactive", Unplaced: "1 machine: 1 has no disk=ssd", States: []wire.UnitState{}},
		{Name: "t@.service", Hash: hash, Desired: "inactive", Current: "inactive", Template: true, States: []wire.UnitState{}},
		{Name: "x.service", Current: "inactive", States: []wire.UnitState{}, Problem: "record has version 9, this program reads 1: upgrade it"},
		{Name: "y.service", Desired: "loaded", Current: "inactive", States: []wire.UnitState{}, Problem: "its unit file cannot be used: line 1: unable to find end of section [x; close it on the same line, as in [Service]"},
	}
	if diff := cmp.Diff(want, list.Units); diff != "" {
		t.Error(diff)
	}
	for query, want := range map[string][]wire.Unit{
		"name=a.service":                         want[:1],
		"name=g.service&name=a.service":          want[:2],
		"name=?.service":                         {want[0], want[1], want[2], want[4], want[5]},
		"name=[ag].service&name=t@.service":      {want[0], want[1], want[3]},
		"name=none.service":                      {},
		"name=[&name=a.service&name=a.service":   want[:1],
		"name=a.service&name=g.*&name=a.service": want[:2],
	} {
		var got wire.Units
		w.JSON("GET", "/v1/units?"+query, nil, 200, &got)
		if diff := cmp.Diff(want, got.Units); diff != "" || got.Revision != list.Revision {
			t.Errorf("%s: %d, %s", query, got.Revision, diff)
		}
	}
	var states wire.States
	w.JSON("GET", "/v1/states", nil, 200, &states)
	if diff := cmp.Diff(wire.States{
		Revision: list.Revision,
		States: []wire.UnitState{
			{Unit: "a.service", NodeID: "m1", Node: "node-m1", Address: "10.0.0.1", Load: "loaded", Active: "active", Sub: "running", Hash: hash, Epoch: 3, Launched: true, Restarts: 2},
			{Unit: "a.service", NodeID: "m9", Load: "loaded", Active: "failed", Sub: "failed", Hash: "0", Trouble: "start limit"},
		},
	}, states); diff != "" {
		t.Error(diff)
	}
	w.Report("m9", map[string]state.UnitState{"a.service": {Hash: "0", Load: "loaded", Active: "inactive", Sub: "dead"}})
	w.JSON("GET", "/v1/states", nil, 200, &states)
	if s := states.States; len(s) != 2 || s[0].Active != "active" || s[1].Active != "inactive" {
		t.Errorf("%+v", s)
	}
	var single wire.Unit
	w.JSON("GET", "/v1/units/a.service", nil, 200, &single)
	if single.Text != one || single.Serialized != apitest.Text("/bin/true") || single.Hash != hash {
		t.Errorf("%+v", single)
	}
	w.JSON("GET", "/v1/units/none.service", nil, 404, nil)
}

func TestSettings(t *testing.T) {
	w := newWorld(t)
	w.Node("m1")
	w.Node("m12345678")
	long := "0123456789abcdef0123456789abcdef"
	w.submit(wire.Submission{Name: "a.service", Text: new(apitest.Text("a")), Desired: "launched"}, wire.Submission{Name: "g.service", Text: new(apitest.Text("a") + "[X-Fleet]\nGlobal=yes\n"), Desired: "launched"})
	w.Place("a.service", "m1")
	w.Report("m1", map[string]state.UnitState{"a.service": {Hash: "1"}, "g.service": {Hash: "2"}})
	yes, no, why, gone, b := true, false, "new disk", "", "b"
	for i, tc := range []struct {
		id     string
		in     wire.SettingsChange
		status int
		want   wire.NodeSettings
	}{
		{"m1", wire.SettingsChange{Cordon: &yes, Reason: &why}, 200, wire.NodeSettings{Cordon: true, Reason: why}},
		{"m1", wire.SettingsChange{Cordon: &yes}, 200, wire.NodeSettings{Cordon: true, Reason: why}},
		{"node-m1", wire.SettingsChange{Drain: &yes, Metadata: map[string]*string{"zone": &gone, "rack": &b}}, 200,
			wire.NodeSettings{Cordon: true, Drain: true, Reason: why, Metadata: map[string]string{"zone": "", "rack": "b"}}},
		{"m123", wire.SettingsChange{Cordon: &yes}, 200, wire.NodeSettings{Cordon: true}},
		{"m", wire.SettingsChange{Cordon: &yes}, 409, wire.NodeSettings{}},
		{"x", wire.SettingsChange{Cordon: &yes}, 404, wire.NodeSettings{}},
		{long, wire.SettingsChange{Metadata: map[string]*string{"zone": &b}}, 200, wire.NodeSettings{Metadata: map[string]string{"zone": "b"}}},
		{"m1", wire.SettingsChange{Metadata: map[string]*string{"a b": &b}}, 400, wire.NodeSettings{}},
		{"m1", wire.SettingsChange{Cordon: &no, Drain: &no, Metadata: map[string]*string{"zone": nil}}, 200, wire.NodeSettings{Metadata: map[string]string{"rack": "b"}}},
	} {
		var out wire.SettingsChanged
		if tc.status != 200 {
			w.JSON("POST", "/v1/nodes/"+tc.id+"/settings", tc.in, tc.status, nil)
			continue
		}
		w.JSON("POST", "/v1/nodes/"+tc.id+"/settings", tc.in, 200, &out)
		if diff := cmp.Diff(tc.want, out.Settings); diff != "" || out.Changed == (i == 1) {
			t.Errorf("%d: changed %t, %s", i, out.Changed, diff)
		}
	}
	var out wire.Nodes
	w.JSON("GET", "/v1/nodes", nil, 200, &out)
	for i := range out.Nodes {
		if out.Nodes[i].Generation == 0 {
			t.Error("a node without a generation")
		}
		out.Nodes[i].Generation = 0
	}
	base := wire.Node{Address: "10.0.0.1", Version: "1.2.3", Started: time.Unix(0, 0).UTC(), RunsUnits: true, Routes: true, Memory: 1 << 30, CPU: 4000}
	m1, m2 := base, base
	m1.ID, m1.Name, m1.BootID, m1.Metadata, m1.Units, m1.Globals, m1.Here = "m1", "node-m1", "bm1", map[string]string{"zone": "a", "rack": "b"}, 1, 1, true
	m2.ID, m2.Name, m2.BootID, m2.Metadata, m2.Cordon = "m12345678", "node-m12345678", "bm12345678", map[string]string{"zone": "a"}, true
	if diff := cmp.Diff([]wire.Node{m1, m2}, out.Nodes); diff != "" || out.Failover != nil {
		t.Error(diff, out.Failover)
	}
}

func TestFailover(t *testing.T) {
	w := newWorld(t)
	w.JSON("POST", "/v1/failover", wire.FailoverChange{Allow: true}, 409, nil)
	w.JSON("POST", "/v1/failover", wire.FailoverChange{}, 400, nil)
	held := wire.Failover{Held: []string{"m1", "m2"}, Until: 1 << 33}
	w.Put("cluster/failover", state.Encode(state.Failover{V: 1, Held: held.Held, Until: held.Until}))
	var machines wire.Nodes
	w.JSON("GET", "/v1/nodes", nil, 200, &machines)
	if diff := cmp.Diff(&held, machines.Failover); diff != "" {
		t.Error(diff)
	}
	held.Allowed = true
	for range 2 {
		var out wire.FailoverChanged
		w.JSON("POST", "/v1/failover", wire.FailoverChange{Allow: true}, 200, &out)
		if diff := cmp.Diff(held, out.Failover); diff != "" {
			t.Error(diff)
		}
	}
}

func TestExplainMoveRebalance(t *testing.T) {
	w := newWorld(t)
	w.Node("m1")
	w.Node("m2")
	picky := apitest.Text("a") + "[X-Fleet]\nMachineMetadata=disk=ssd\n"
	var units []wire.Submission
	for i := range 4 {
		units = append(units, wire.Submission{Name: fmt.Sprintf("u%d.service", i), Text: new(apitest.Text("a")), Desired: "launched"})
	}
	w.submit(append(units, wire.Submission{Name: "picky.service", Text: new(picky), Desired: "launched"}, wire.Submission{Name: "off.service", Text: new(apitest.Text("a"))},
		wire.Submission{Name: "g.service", Text: new(apitest.Text("a") + "[X-Fleet]\nGlobal=yes\n"), Desired: "loaded"})...)
	for _, u := range units {
		w.Put("cluster/placements/"+u.Name, state.Encode(state.Placement{V: 1, Node: "m1", Generation: w.Known().Nodes["m1"].Generation(), Epoch: 1,
			Approved: apitest.Hash(t, *u.Text), Reason: "it was free"}))
	}
	var e wire.UnitExplanation
	w.JSON("GET", "/v1/units/u0.service/explain", nil, 200, &e)
	if len(e.Nodes) != 2 || e.Nodes[0].Verdict != "here" || e.Nodes[0].NodeID != "m1" || e.Nodes[1].Verdict != "eligible" || e.Nodes[1].Score == "" || e.Unit.Placed != "it was free" {
		t.Errorf("%+v", e)
	}
	e = wire.UnitExplanation{}
	w.JSON("GET", "/v1/units/picky.service/explain", nil, 200, &e)
	if len(e.Nodes) != 2 || e.Nodes[0].Verdict != "refused" || !strings.Contains(e.Nodes[0].Reason, "disk") || !strings.Contains(e.Summary, "2 nodes") || e.Unit.Name != "picky.service" {
		t.Errorf("%+v", e)
	}
	w.JSON("GET", "/v1/units/none.service/explain", nil, 404, nil)

	for path, status := range map[string]int{"none": 404, "off": 409, "g": 409, "picky": 409} {
		w.JSON("POST", "/v1/units/"+path+".service/move", wire.MoveRequest{To: "m2"}, status, nil)
	}
	w.JSON("POST", "/v1/units/u0.service/move", wire.MoveRequest{To: "m3"}, 404, nil)
	w.JSON("POST", "/v1/units/u0.service/move", wire.MoveRequest{To: "m"}, 409, nil)
	w.JSON("POST", "/v1/units/u0.service/move", wire.MoveRequest{}, 400, nil)
	var moved wire.Moved
	w.JSON("POST", "/v1/units/u0.service/move", wire.MoveRequest{To: "m1"}, 200, &moved)
	if moved.Changed {
		t.Error("a unit is moved to where it is")
	}
	for i := range 2 {
		w.JSON("POST", "/v1/units/u0.service/move", wire.MoveRequest{To: "node-m2"}, 200, &moved)
		if moved.Changed != (i == 0) || moved.Node != (wire.NodeRef{ID: "m2", Name: "node-m2", Address: "10.0.0.1"}) {
			t.Errorf("%+v", moved)
		}
	}
	w.Delete("cluster/moves/u0.service")

	var shown, asked wire.Rebalance
	w.JSON("GET", "/v1/rebalance", nil, 200, &shown)
	if len(shown.Moves) != 2 || shown.Moves[0].From != "m1" || shown.Moves[0].To != "m2" || shown.Moves[0].Reason == "" {
		t.Fatalf("%+v", shown)
	}
	w.JSON("POST", "/v1/rebalance", shown, 200, &asked)
	if diff := cmp.Diff(shown.Moves, asked.Moves); diff != "" {
		t.Error(diff)
	}
	for _, m := range shown.Moves {
		if move := w.Known().Units[m.Unit].Move.Value; move.To != "m2" || move.Reason != m.Reason {
			t.Errorf("%s: %+v", m.Unit, move)
		}
		w.Delete("cluster/moves/" + m.Unit)
	}
	w.JSON("POST", "/v1/rebalance", nil, 200, &asked)
	if len(asked.Moves) != 2 {
		t.Errorf("%+v", asked)
	}
	w.JSON("POST", "/v1/rebalance", wire.Rebalance{Moves: []wire.Move{{Unit: "none.service", To: "m1"}}}, 409, nil)
	w.JSON("POST", "/v1/rebalance", wire.Rebalance{Moves: []wire.Move{{Unit: "../x", To: "m1"}}}, 400, nil)
}

// All 500 units, and what nodes have of them.
func BenchmarkList500(b *testing.B) {
	w := newWorld(b)
	w.Populate(500, 3)
	apitest.CPU(b, "units", func(b *testing.B) {
		var list wire.Units
		if w.JSON("GET", "/v1/units", nil, 200, &list); len(list.Units) != 500 || list.Units[0].Current != unit.Launched {
			b.Fatal("not all of them")
		}
	})
	apitest.CPU(b, "states", func(b *testing.B) {
		var list wire.States
		if w.JSON("GET", "/v1/states", nil, 200, &list); len(list.States) != 500 {
			b.Fatal("not all of them")
		}
	})
	apitest.CPU(b, "one", func(b *testing.B) { w.JSON("GET", "/v1/units?name=unit@7.service", nil, 200, nil) })
}

func (w *world) submit(units ...wire.Submission) wire.Results {
	w.Helper()
	var out wire.Results
	w.JSON("POST", "/v1/units", wire.Submissions{Units: units}, 200, &out)
	return out
}

// outcomes joins the outcomes of a request.
func outcomes(r wire.Results) string {
	var all []string
	for _, one := range r.Results {
		all = append(all, string(one.Outcome))
	}
	return strings.Join(all, " ")
}
