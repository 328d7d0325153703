package api

import (
	"bufio"
	"encoding/json"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"flotilla/internal/api/apitest"
	"flotilla/internal/state"
	"flotilla/internal/store/storetest"
	"flotilla/internal/unit"
	"flotilla/internal/wait"
	"flotilla/internal/wire"
)

// wait asks for a wait and returns the events as they come.
func (w *world) wait(in wire.Wait) <-chan wire.WaitEvent {
	w.Helper()
	raw, err := json.Marshal(in)
	if err != nil {
		w.Fatal(err)
	}
	resp, err := w.Open("POST", "/v1/wait", nil, string(raw))
	if err != nil {
		w.Fatal(err)
	}
	if resp.StatusCode != http.StatusOK {
		w.Fatalf("%+v: %s", in, resp.Status)
	}
	events := make(chan wire.WaitEvent)
	go func() {
		defer close(events)
		defer func() { _ = resp.Body.Close() }()
		for lines := bufio.NewScanner(resp.Body); lines.Scan(); {
			if lines.Text() == "" {
				continue
			}
			var e wire.WaitEvent
			if err := json.Unmarshal(lines.Bytes(), &e); err != nil {
				w.Error(err)
			}
			select {
			case events <- e:
			case <-w.Context().Done():
				return
			}
		}
	}()
	return events
}

// expect reads events and compares them; those of one snapshot in any order.
func expect(t *testing.T, events <-chan wire.WaitEvent, want ...wire.WaitEvent) {
	t.Helper()
	for _, one := range want {
		select {
		case got := <-events:
			if diff := cmp.Diff(one, got); diff != "" {
				t.Errorf("%s", diff)
			}
		case <-time.After(20 * time.Second):
			t.Fatalf("%+v did not come", one)
		}
	}
}

func quick() wait.Pace {
	return wait.Pace{Settle: 20 * time.Millisecond, Quiet: time.Millisecond, Beat: 10 * time.Millisecond, Silent: 15 * time.Second}
}

// Each unit gets one line when it is there, when it has failed, and when time is
// up; before that it is said what it waits for.
func TestWaitForUnits(t *testing.T) {
	w := newWorld(t)
	w.pace = quick()
	w.Node("m1")
	text := apitest.Text("/bin/true")
	hash := apitest.Hash(t, text)
	for _, name := range []string{"a.service", "b.service", "c.service", "once.service"} {
		w.Unit(name, text, unit.Launched)
	}
	w.Unit("g.service", text+"[X-Fleet]\nGlobal=yes\n", unit.Launched)
	w.Put("cluster/unplaced/c.service", state.Encode(state.Unplaced{V: 1, Reason: "1 node: it has no disk=ssd"}))
	node := &wire.NodeRef{ID: "m1", Name: "node-m1", Address: "10.0.0.1"}

	events := w.wait(wire.Wait{Goal: wire.GoalLaunched, Names: []string{"g", "none", "a", "b"}})
	expect(t, events, wire.WaitEvent{Outcome: wire.WaitGlobal, Unit: "g.service"}, wire.WaitEvent{Outcome: wire.WaitGone, Unit: "none.service"})
	expect(t, events, wire.WaitEvent{Outcome: wire.WaitPending, Unit: "a.service", Current: "inactive", Message: "on no node: the engine has not placed it yet"},
		wire.WaitEvent{Outcome: wire.WaitPending, Unit: "b.service", Current: "inactive", Message: "on no node: the engine has not placed it yet"})
	w.Place("a.service", "m1")
	expect(t, events, wire.WaitEvent{Outcome: wire.WaitPending, Unit: "a.service", Current: "inactive", Node: node, Message: "m1.../10.0.0.1 has not taken it up yet"})
	w.Report("m1", map[string]state.UnitState{"a.service": {Hash: hash, Launched: true, Load: "loaded", Active: "active", Sub: "running"}})
	expect(t, events, wire.WaitEvent{Outcome: wire.WaitReached, Unit: "a.service", Current: "launched", Node: node})
	w.Delete("cluster/units/b.service")
	expect(t, events, wire.WaitEvent{Outcome: wire.WaitGone, Unit: "b.service"}, wire.WaitEvent{Outcome: wire.WaitEnd})
	if e, more := <-events; more {
		t.Errorf("behind the end: %+v", e)
	}

	// What may be about an earlier start is believed after a while.
	w.pace.Quiet = time.Hour
	w.Place("once.service", "m1")
	failed := state.UnitState{Hash: hash, Launched: true, Load: "loaded", Active: "failed", Sub: "failed"}
	once := state.UnitState{Hash: hash, Launched: true, Load: "loaded", Active: "inactive", Sub: "dead"}
	w.Report("m1", map[string]state.UnitState{"a.service": failed, "once.service": once})
	events = w.wait(wire.Wait{Goal: wire.GoalLaunched, Names: []string{"a.service", "once.service", "c*"}, Limit: "300ms"})
	expect(t, events, wire.WaitEvent{Outcome: wire.WaitFailed, Unit: "a.service", Current: "launched", Node: node, Message: "on m1.../10.0.0.1, systemd says: loaded, failed (failed)"},
		wire.WaitEvent{Outcome: wire.WaitReached, Unit: "once.service", Current: "launched", Node: node, Message: "it has ended"},
		wire.WaitEvent{Outcome: wire.WaitLate, Unit: "c.service", Current: "inactive", Message: "on no node: 1 node: it has no disk=ssd"},
		wire.WaitEvent{Outcome: wire.WaitEnd, Left: 1})

	// Gone is what no node has.
	w.Delete("cluster/units/a.service")
	events = w.wait(wire.Wait{Goal: wire.GoalGone, Names: []string{"a.service", "none"}})
	expect(t, events, wire.WaitEvent{Outcome: wire.WaitReached, Unit: "none.service", Current: "inactive"})
	w.Delete("cluster/placements/a.service")
	w.Report("m1", nil)
	expect(t, events, wire.WaitEvent{Outcome: wire.WaitReached, Unit: "a.service", Current: "inactive"}, wire.WaitEvent{Outcome: wire.WaitEnd})
}

func TestWaitForEmptyNode(t *testing.T) {
	w := newWorld(t)
	w.pace = quick()
	w.Node("m1")
	w.Node("m2")
	for _, name := range []string{"a.service", "b.service"} {
		w.Unit(name, apitest.Text("a"), unit.Launched)
		w.Place(name, "m1")
	}
	node := &wire.NodeRef{ID: "m1", Name: "node-m1", Address: "10.0.0.1"}
	events := w.wait(wire.Wait{Goal: wire.GoalEmpty, Node: "node-m1", Limit: "200ms"})
	expect(t, events, wire.WaitEvent{Outcome: wire.WaitPending, Node: node, Left: 2},
		wire.WaitEvent{Outcome: wire.WaitLate, Unit: "a.service", Node: node, Message: "the fewest units"}, wire.WaitEvent{Outcome: wire.WaitLate, Unit: "b.service", Node: node, Message: "the fewest units"},
		wire.WaitEvent{Outcome: wire.WaitEnd, Left: 2})
	events = w.wait(wire.Wait{Goal: wire.GoalEmpty, Node: "m1"})
	expect(t, events, wire.WaitEvent{Outcome: wire.WaitPending, Node: node, Left: 2})
	w.Place("a.service", "m2")
	expect(t, events, wire.WaitEvent{Outcome: wire.WaitPending, Node: node, Left: 1})
	w.Delete("cluster/placements/b.service")
	expect(t, events, wire.WaitEvent{Outcome: wire.WaitReached, Node: node}, wire.WaitEvent{Outcome: wire.WaitEnd})
	events = w.wait(wire.Wait{Goal: wire.GoalEmpty, Node: "m2"})
	<-events
	w.Delete("cluster/nodes/m2")
	node = &wire.NodeRef{ID: "m2", Name: "node-m2", Address: "10.0.0.1"}
	expect(t, events, wire.WaitEvent{Outcome: wire.WaitGone, Node: node}, wire.WaitEvent{Outcome: wire.WaitEnd})
}

func TestWaitForRevision(t *testing.T) {
	w := newWorld(t)
	w.report("m1", 50)
	w.report("m2", 10)
	events := w.wait(wire.Wait{Goal: wire.GoalApplied, Revision: 50})
	first := <-events
	if first.Outcome != wire.WaitReached || first.Node.ID != "m1" || first.Applied.Revision != 50 || !first.Applied.Reached {
		t.Errorf("%+v", first)
	}
	w.Router("m2", state.RouterReport{Applied: 51})
	if e := <-events; e.Outcome != wire.WaitReached || e.Node.ID != "m2" || e.Applied.MS <= 0 {
		t.Errorf("%+v", e)
	}
	expect(t, events, wire.WaitEvent{Outcome: wire.WaitEnd})
	events = w.wait(wire.Wait{Goal: wire.GoalApplied, Revision: 51, Limit: "100ms"})
	for e := range events {
		if e.Node != nil && e.Node.ID == "m1" && e.Outcome != wire.WaitLate || e.Outcome == wire.WaitEnd && e.Left != 1 {
			t.Errorf("%+v", e)
		}
	}
}

func TestWaitIsRefused(t *testing.T) {
	w := newWorld(t)
	for body, want := range map[string]string{
		`{"goal":"fame","names":["a"]}`: "nothing to wait for", `{"goal":"applied"}`: "nothing to wait for", `{"goal":"loaded","limit":"soon"}`: "is not a time",
		`{"goal":"empty","node":"n9"}`: `there is no node \"n9\"`, "": "takes a body",
	} {
		if r := w.Do("POST", "/v1/wait", nil, body); r.Status/100 != 4 || !strings.Contains(r.Body, want) {
			t.Errorf("%s: %d %s", body, r.Status, r.Body)
		}
	}
}

// A wait without end gives up when the store is away for long.
func TestWaitWithoutStore(t *testing.T) {
	proxy := storetest.NewProxy(t, storetest.Start(t))
	w := newWorldAt(t, proxy.Endpoint())
	w.pace = quick()
	w.pace.Silent = 100 * time.Millisecond
	w.Unit("a.service", apitest.Text("a"), unit.Launched)
	events := w.wait(wire.Wait{Goal: wire.GoalLaunched, Names: []string{"a.service"}})
	<-events
	proxy.Cut()
	if e := <-events; e.Outcome != wire.WaitEnd || e.Left != 1 || e.Error == nil || e.Error.Code != wire.CodeStoreUnavailable {
		t.Errorf("%+v", e)
	}
}
