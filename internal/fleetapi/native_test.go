package fleetapi

import (
	"encoding/json"
	"fmt"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"flotilla/internal/registry"
	"flotilla/internal/store"
	"flotilla/internal/unitapi"
)

// Everything that is known of a unit is in its answer.
func TestNativeUnits(t *testing.T) {
	w := start(t)
	w.machine("m1")
	one, global := "# mine\n"+text("/bin/true"), text("/bin/true")+"[X-Fleet]\nGlobal=yes\n"
	w.submit(unitapi.Submission{Name: "a.service", Text: one, Desired: "launched"}, unitapi.Submission{Name: "g.service", Text: global, Desired: "launched"},
		unitapi.Submission{Name: "t@.service", Text: one}, unitapi.Submission{Name: "n.service", Text: one, Desired: "loaded"})
	w.put("placements/a.service", registry.Encode(registry.Placement{V: 1, Machine: "m1", Reason: "the fewest units"}))
	w.put("schedules/m1/a.service", registry.Encode(registry.Entry{V: 1, Text: one, Release: "m1 is drained"}))
	w.put("schedules/global/g.service", registry.Encode(registry.Entry{V: 1, Text: global}))
	w.put("unplaced/n.service", registry.Encode(registry.Unplaced{V: 1, Reason: "1 machine: 1 has no disk=ssd"}))
	w.put("moves/a.service", registry.Encode(registry.Move{V: 1, To: "m2"}))
	w.put("units/x.service", `{"v":9}`)
	w.put("units/y.service", registry.Encode(registry.Unit{V: 1, Text: "[x", Desired: "loaded"}))
	running := registry.State{Hash: hashOf(t, one), Load: "loaded", Active: "active", Sub: "running", Launched: true, Epoch: 3, Restarts: 2}
	w.states("m1", map[string]registry.State{"a.service": running, "g.service": {Waiting: "it conflicts with a.service"}})
	w.states("m9", map[string]registry.State{"a.service": {Hash: "0", Load: "loaded", Active: "failed", Sub: "failed", Trouble: "start limit"}})

	var list unitapi.Units
	w.native("GET", "/v1/units", nil, 200, &list)
	ref := unitapi.MachineRef{ID: "m1", Node: "node-m1", Address: "10.0.0.1"}
	hash := hashOf(t, one)
	want := []unitapi.Unit{
		{Name: "a.service", Hash: hash, Desired: "launched", Current: "launched", Machine: &ref, Releasing: "m1 is drained", Placed: "the fewest units", MovingTo: "m2",
			States: []unitapi.State{
				{Machine: "m1", Node: "node-m1", Address: "10.0.0.1", Load: "loaded", Active: "active", Sub: "running", Hash: hash, Epoch: 3, Launched: true, Restarts: 2},
				{Machine: "m9", Load: "loaded", Active: "failed", Sub: "failed", Hash: "0", Trouble: "start limit"},
			}},
		{Name: "g.service", Hash: hashOf(t, global), Desired: "launched", Global: true,
			States: []unitapi.State{{Machine: "m1", Node: "node-m1", Address: "10.0.0.1", Waiting: "it conflicts with a.service"}}},
		{Name: "n.service", Hash: hash, Desired: "loaded", Current: "inactive", Unplaced: "1 machine: 1 has no disk=ssd", States: []unitapi.State{}},
		{Name: "t@.service", Hash: hash, Desired: "inactive", Current: "inactive", Template: true, States: []unitapi.State{}},
		{Name: "x.service", Current: "inactive", States: []unitapi.State{}, Problem: "record has version 9, this program reads 1: upgrade it"},
		{Name: "y.service", Desired: "loaded", Current: "inactive", States: []unitapi.State{}, Problem: "line 1: unable to find end of section [x; close it on the same line, as in [Service]"},
	}
	if diff := cmp.Diff(want, list.Units); diff != "" {
		t.Error(diff)
	}
	// Named units are read in another way, with the same result.
	for query, want := range map[string][]unitapi.Unit{
		"name=a.service":                         want[:1],
		"name=g.service&name=a.service":          want[:2],
		"name=?.service":                         {want[0], want[1], want[2], want[4], want[5]},
		"name=[ag].service&name=t@.service":      {want[0], want[1], want[3]},
		"name=none.service":                      {},
		"name=[&name=a.service&name=a.service":   want[:1],
		"name=a.service&name=g.*&name=a.service": want[:2],
	} {
		var got unitapi.Units
		w.native("GET", "/v1/units?"+query, nil, 200, &got)
		if diff := cmp.Diff(want, got.Units); diff != "" || got.Revision != list.Revision {
			t.Errorf("%s: %d, %s", query, got.Revision, diff)
		}
	}
	var states unitapi.States
	w.native("GET", "/v1/states", nil, 200, &states)
	if diff := cmp.Diff(unitapi.States{
		Revision: list.Revision,
		Machines: map[string]unitapi.MachineRef{"m1": ref, "m9": {ID: "m9"}},
		States: []unitapi.UnitState{
			{Unit: "a.service", Machine: "m1", Load: "loaded", Active: "active", Sub: "running", Hash: hash, Epoch: 3, Launched: true, Restarts: 2},
			{Unit: "a.service", Machine: "m9", Load: "loaded", Active: "failed", Sub: "failed", Hash: "0", Trouble: "start limit"},
		},
	}, states); diff != "" {
		t.Error(diff)
	}
	// A second time they are not decoded; what has changed is.
	w.states("m9", map[string]registry.State{"a.service": {Hash: "0", Load: "loaded", Active: "inactive", Sub: "dead"}})
	w.native("GET", "/v1/states", nil, 200, &states)
	if s := states.States; len(s) != 2 || s[0].Active != "active" || s[1].Active != "inactive" {
		t.Errorf("%+v", s)
	}
	var single unitapi.Unit
	w.native("GET", "/v1/units/a.service", nil, 200, &single)
	if single.Text != one || single.Serialized != text("/bin/true") || single.Hash != hash {
		t.Errorf("%+v", single)
	}
	w.native("GET", "/v1/units/none.service", nil, 404, nil)
}

func TestNativeMachines(t *testing.T) {
	w := start(t)
	w.machine("m1")
	w.machine("m12345678")
	long := "0123456789abcdef0123456789abcdef"
	w.submit(unitapi.Submission{Name: "a.service", Text: text("a"), Desired: "launched"}, unitapi.Submission{Name: "g.service", Text: text("a") + "[X-Fleet]\nGlobal=yes\n", Desired: "launched"})
	w.run("a.service", "m1", registry.State{Hash: "1"})
	w.put("schedules/global/g.service", registry.Encode(registry.Entry{V: 1}))
	w.states("m1", map[string]registry.State{"a.service": {Hash: "1"}, "g.service": {Hash: "2"}})
	yes, no, why, gone, b := true, false, "new disk", "", "b"
	for i, tc := range []struct {
		id     string
		in     unitapi.SettingsChange
		status int
		want   registry.Settings
	}{
		{"m1", unitapi.SettingsChange{Cordon: &yes, Reason: &why}, 200, registry.Settings{V: 1, Cordon: true, Reason: why}},
		{"m1", unitapi.SettingsChange{Cordon: &yes}, 200, registry.Settings{V: 1, Cordon: true, Reason: why}},
		{"node-m1", unitapi.SettingsChange{Drain: &yes, Metadata: map[string]*string{"zone": &gone, "rack": &b}}, 200,
			registry.Settings{V: 1, Cordon: true, Drain: true, Reason: why, Metadata: map[string]string{"zone": "", "rack": "b"}}},
		{"m123", unitapi.SettingsChange{Cordon: &yes}, 200, registry.Settings{V: 1, Cordon: true}},
		{"m", unitapi.SettingsChange{Cordon: &yes}, 409, registry.Settings{}},
		{"x", unitapi.SettingsChange{Cordon: &yes}, 404, registry.Settings{}},
		{long, unitapi.SettingsChange{Metadata: map[string]*string{"zone": &b}}, 200, registry.Settings{V: 1, Metadata: map[string]string{"zone": "b"}}},
		{"m1", unitapi.SettingsChange{Metadata: map[string]*string{"a b": &b}}, 400, registry.Settings{}},
		{"m1", unitapi.SettingsChange{Cordon: &no, Drain: &no, Metadata: map[string]*string{"zone": nil}}, 200, registry.Settings{V: 1, Metadata: map[string]string{"rack": "b"}}},
	} {
		var out unitapi.SettingsChanged
		if tc.status != 200 {
			w.native("POST", "/v1/machines/"+tc.id+"/settings", tc.in, tc.status, nil)
			continue
		}
		w.native("POST", "/v1/machines/"+tc.id+"/settings", tc.in, 200, &out)
		if diff := cmp.Diff(tc.want, out.Settings); diff != "" || out.Changed == (i == 1) {
			t.Errorf("%d: changed %t, %s", i, out.Changed, diff)
		}
	}
	var out unitapi.Machines
	w.native("GET", "/v1/machines", nil, 200, &out)
	for i := range out.Machines {
		if out.Machines[i].Generation == 0 {
			t.Error("a machine without a generation")
		}
		out.Machines[i].Generation = 0
	}
	base := unitapi.Machine{Address: "10.0.0.1", Version: "1.2.3", Runs: true, Memory: 1 << 30, CPU: 4000}
	m1, m2 := base, base
	m1.ID, m1.Node, m1.BootID, m1.Metadata, m1.Units, m1.Globals, m1.Here = "m1", "node-m1", "bm1", map[string]string{"zone": "a", "rack": "b"}, 1, 1, true
	m2.ID, m2.Node, m2.BootID, m2.Metadata, m2.Cordon = "m12345678", "node-m12345678", "bm12345678", map[string]string{"zone": "a"}, true
	if diff := cmp.Diff([]unitapi.Machine{m1, m2}, out.Machines); diff != "" || out.Failover != nil {
		t.Error(diff, out.Failover)
	}
}

func TestFailover(t *testing.T) {
	w := start(t)
	w.native("POST", "/v1/failover", unitapi.FailoverChange{Allow: true}, 409, nil)
	w.native("POST", "/v1/failover", unitapi.FailoverChange{}, 400, nil)
	held := registry.Failover{V: 1, Held: []string{"m1", "m2"}, Until: 1 << 33}
	w.put("failover", registry.Encode(held))
	var machines unitapi.Machines
	w.native("GET", "/v1/machines", nil, 200, &machines)
	if diff := cmp.Diff(&held, machines.Failover); diff != "" {
		t.Error(diff)
	}
	held.Allowed = true
	for range 2 {
		var out unitapi.FailoverChanged
		w.native("POST", "/v1/failover", unitapi.FailoverChange{Allow: true}, 200, &out)
		if diff := cmp.Diff(held, out.Failover); diff != "" {
			t.Error(diff)
		}
	}
}

func TestExplainMoveRebalance(t *testing.T) {
	w := start(t)
	w.machine("m1")
	w.machine("m2")
	picky := text("a") + "[X-Fleet]\nMachineMetadata=disk=ssd\n"
	var units []unitapi.Submission
	for i := range 4 {
		units = append(units, unitapi.Submission{Name: fmt.Sprintf("u%d.service", i), Text: text("a"), Desired: "launched"})
	}
	w.submit(append(units, unitapi.Submission{Name: "picky.service", Text: picky, Desired: "launched"}, unitapi.Submission{Name: "off.service", Text: text("a")},
		unitapi.Submission{Name: "g.service", Text: text("a") + "[X-Fleet]\nGlobal=yes\n", Desired: "loaded"})...)
	m1, _, err := w.Store.Get(t.Context(), w.Keys.Machine("m1"))
	if err != nil {
		t.Fatal(err)
	}
	for _, u := range units {
		w.apply(store.Put(w.Keys.Placement(u.Name), registry.Encode(registry.Placement{V: 1, Machine: "m1", Generation: m1.CreateRevision, Epoch: 1, Reason: "it was free"})),
			store.Put(w.Keys.Entry("m1", u.Name), registry.Encode(registry.Entry{V: 1, Text: u.Text, Desired: u.Desired, Generation: m1.CreateRevision, Epoch: 1})))
	}
	var e unitapi.Explanation
	w.native("GET", "/v1/units/u0.service/explain", nil, 200, &e)
	if len(e.Machines) != 2 || e.Machines[0].Verdict != "here" || e.Machines[0].ID != "m1" || e.Machines[1].Verdict != "eligible" || e.Machines[1].Score == "" || e.Placed != "it was free" {
		t.Errorf("%+v", e)
	}
	e = unitapi.Explanation{}
	w.native("GET", "/v1/units/picky.service/explain", nil, 200, &e)
	if len(e.Machines) != 2 || e.Machines[0].Verdict != "refused" || !strings.Contains(e.Machines[0].Reason, "disk") || !strings.Contains(e.Summary, "2 machines") || e.Unit.Name != "picky.service" {
		t.Errorf("%+v", e)
	}
	w.native("GET", "/v1/units/none.service/explain", nil, 404, nil)

	for path, status := range map[string]int{"none": 404, "off": 409, "g": 409, "picky": 409} {
		w.native("POST", "/v1/units/"+path+".service/move", unitapi.MoveRequest{To: "m2"}, status, nil)
	}
	w.native("POST", "/v1/units/u0.service/move", unitapi.MoveRequest{To: "m3"}, 404, nil)
	w.native("POST", "/v1/units/u0.service/move", unitapi.MoveRequest{To: "m"}, 409, nil)
	w.native("POST", "/v1/units/u0.service/move", unitapi.MoveRequest{}, 400, nil)
	var moved unitapi.Moved
	w.native("POST", "/v1/units/u0.service/move", unitapi.MoveRequest{To: "m1"}, 200, &moved)
	if moved.Changed {
		t.Error("a unit is moved to where it is")
	}
	for i := range 2 {
		w.native("POST", "/v1/units/u0.service/move", unitapi.MoveRequest{To: "node-m2"}, 200, &moved)
		if moved.Changed != (i == 0) || moved.Machine != (unitapi.MachineRef{ID: "m2", Node: "node-m2", Address: "10.0.0.1"}) {
			t.Errorf("%+v", moved)
		}
	}
	w.apply(store.Delete(w.Keys.Move("u0.service")))

	var shown, asked unitapi.Rebalance
	w.native("GET", "/v1/rebalance", nil, 200, &shown)
	if len(shown.Moves) != 2 || shown.Moves[0].From != "m1" || shown.Moves[0].To != "m2" || shown.Moves[0].Reason == "" {
		t.Fatalf("%+v", shown)
	}
	w.native("POST", "/v1/rebalance", shown, 200, &asked)
	if diff := cmp.Diff(shown.Moves, asked.Moves); diff != "" {
		t.Error(diff)
	}
	for _, m := range shown.Moves {
		kv, found, err := w.Store.Get(t.Context(), w.Keys.Move(m.Unit))
		if move := recordOf[registry.Move](kv, found); err != nil || move.registry.To != "m2" || move.registry.Reason != m.Reason {
			t.Errorf("%s: %+v, %v", m.Unit, move, err)
		}
		w.apply(store.Delete(w.Keys.Move(m.Unit)))
	}
	w.native("POST", "/v1/rebalance", nil, 200, &asked)
	if len(asked.Moves) != 2 {
		t.Errorf("%+v", asked)
	}
	w.native("POST", "/v1/rebalance", unitapi.Rebalance{Moves: []unitapi.ProposedMove{{Unit: "none.service", To: "m1"}}}, 409, nil)
	w.native("POST", "/v1/rebalance", unitapi.Rebalance{Moves: []unitapi.ProposedMove{{Unit: "../x", To: "m1"}}}, 400, nil)
}

// populate fills the store with running units, as after 500 starts.
func populate(w *world, units, machines int) {
	states := make([]map[string]registry.State, machines)
	for m := range machines {
		states[m] = map[string]registry.State{}
		w.machine(fmt.Sprintf("m%d", m))
	}
	content := "[Unit]\nDescription=A unit as people write them, with a description\nAfter=network-online.target\n\n[Service]\nEnvironment=A=1 B=2\n" +
		"ExecStartPre=-/usr/bin/docker kill %p-%i\nExecStart=/usr/bin/docker run --name %p-%i example/web\nExecStop=/usr/bin/docker stop %p-%i\nRestart=always\nRestartSec=2\n\n" +
		"[X-Fleet]\nConflicts=web@%i.service\nMachineMetadata=zone=a\n"
	hash := hashOf(w.t, content)
	for i := range units {
		name, m := fmt.Sprintf("unit@%d.service", i), i%machines
		id := fmt.Sprintf("m%d", m)
		w.apply(store.Put(w.Keys.Unit(name), registry.Encode(registry.Unit{V: 1, Text: content, Desired: registry.Launched})),
			store.Put(w.Keys.Placement(name), registry.Encode(registry.Placement{V: 1, Machine: id, Generation: 7, Epoch: 8, Reason: "it has the fewest units (7)"})),
			store.Put(w.Keys.Entry(id, name), registry.Encode(registry.Entry{V: 1, Text: content, Desired: registry.Launched, Generation: 7, Epoch: 8})))
		states[m][name] = registry.State{Hash: hash, Epoch: 8, Load: "loaded", Active: "active", Sub: "running", Launched: true}
	}
	for m := range machines {
		w.states(fmt.Sprintf("m%d", m), states[m])
	}
}

// cpu runs a benchmark and reports the CPU time of this process, store and client
// included, which a busy machine does not change.
func cpu(b *testing.B, name string, once func(b *testing.B)) {
	b.Run(name, func(b *testing.B) {
		used := func() time.Duration {
			var u syscall.Rusage
			if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
				b.Fatal(err)
			}
			return time.Duration(u.Utime.Nano() + u.Stime.Nano())
		}
		before := used()
		for b.Loop() {
			once(b)
		}
		b.ReportMetric(float64((used()-before).Microseconds())/1000/float64(b.N), "cpu-ms/op")
	})
}

// All 500 units, by one request of the native API and by the pages of fleet's.
func BenchmarkList500(b *testing.B) {
	w := start(b)
	populate(w, 500, 3)
	cpu(b, "native", func(b *testing.B) {
		var list unitapi.Units
		if w.native("GET", "/v1/units", nil, 200, &list); len(list.Units) != 500 || list.Units[0].Current != registry.Launched {
			b.Fatal("not all of them")
		}
	})
	cpu(b, "one", func(b *testing.B) { w.native("GET", "/v1/units?name=unit@7.service", nil, 200, nil) })
	for _, path := range []string{"units", "state"} {
		cpu(b, "fleet-"+path, func(b *testing.B) {
			count := 0
			for token := ""; ; {
				var page fleetPage
				r := w.do("GET", "/fleet/v1/"+path+token, nil, "")
				if err := json.Unmarshal([]byte(r.body), &page); err != nil {
					b.Fatal(err)
				}
				if count += len(page.Units) + len(page.States); page.Next == "" {
					break
				}
				token = "?nextPageToken=" + page.Next
			}
			if count != 500 {
				b.Fatal(count)
			}
		})
	}
}
