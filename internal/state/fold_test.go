package state

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"pgregory.net/rapid"

	"flotilla/internal/store"
	"flotilla/internal/unit"
)

var keys = Keys{Prefix: DefaultPrefix}

// records is a store of the simplest kind.
type records struct {
	revision int64
	kvs      map[string]store.KV
}

func (r *records) put(key, value string) store.Event {
	r.revision++
	kv := store.KV{Key: key, Value: value, CreateRevision: r.revision, ModRevision: r.revision}
	if old, ok := r.kvs[key]; ok {
		kv.CreateRevision = old.CreateRevision
	}
	r.kvs[key] = kv
	return store.Event{KV: kv}
}

func (r *records) del(key string) store.Event {
	r.revision++
	delete(r.kvs, key)
	return store.Event{KV: store.KV{Key: key, ModRevision: r.revision}, Deleted: true}
}

func (r *records) list(prefix string) store.Update {
	u := store.Update{Revision: r.revision, Reset: true, Prefix: prefix}
	for _, kv := range r.kvs {
		if strings.HasPrefix(kv.Key, prefix) {
			u.Items = append(u.Items, kv)
		}
	}
	slices.SortFunc(u.Items, func(a, b store.KV) int { return strings.Compare(a.Key, b.Key) })
	return u
}

var same = []cmp.Option{cmp.AllowUnexported(Item[UnitRecord]{}, Item[Placement]{}, Item[Unplaced]{}, Item[Move]{}, Item[NodeRecord]{}, Item[Settings]{},
	Item[Leader]{}, Item[Failover]{}, Item[RouterReport]{}, Item[UnitsReport]{}), cmpopts.EquateEmpty()}

// Whatever is written, in whatever batches: folding the events gives what a list of
// the result gives, the old snapshot stays as it was, and a list changes nothing.
func TestFoldEqualsLoad(t *testing.T) {
	text := func(r *rand.Rand) string {
		return fmt.Sprintf("[Service]\nExecStart=/bin/sleep %d\n[X-Fleet]\nConflicts=%c*\n", r.IntN(3), 'a'+rune(r.IntN(3)))
	}
	rapid.Check(t, func(t *rapid.T) {
		r := rand.New(rand.NewPCG(rapid.Uint64().Draw(t, "seed"), 0))
		w := &records{kvs: map[string]store.KV{}, revision: 1}
		s := Load(keys, nil, 1)
		for range r.IntN(12) {
			var events []store.Event
			for range 1 + r.IntN(4) {
				name, id := fmt.Sprintf("u%d.service", r.IntN(3)), fmt.Sprintf("n%d", r.IntN(3))
				all := map[string]string{
					keys.Unit(name):       Encode(UnitRecord{V: 1, Text: text(r), Desired: unit.Launched}),
					keys.Placement(name):  Encode(Placement{V: 1, Node: id, Epoch: w.revision, Reason: "x"}),
					keys.Unplaced(name):   Encode(Unplaced{V: 1, Reason: "no room"}),
					keys.Move(name):       Encode(Move{V: 1, To: id}),
					keys.Node(id):         Encode(NodeRecord{V: 1, ID: id, Metadata: map[string]string{"a": "b"}}),
					keys.Settings(id):     Encode(Settings{V: 1, Metadata: map[string]string{"a": "", "c": "d"}}),
					keys.Leader():         Encode(Leader{V: 1, Node: id}),
					keys.Failover():       Encode(Failover{V: 1, Held: []string{id}}),
					keys.RouterReport(id): Encode(RouterReport{V: 1, Applied: w.revision}),
					keys.UnitsReport(id):  Encode(UnitsReport{V: 1, Units: map[string]UnitState{name: {Active: "active"}}}),
				}
				key := keys.Prefix + "cluster/units/in valid"
				for k := range all {
					key = k
					break
				}
				switch r.IntN(4) {
				case 0:
					events = append(events, w.del(key))
				default:
					events = append(events, w.put(key, all[key]))
				}
			}
			before := *s
			before.Units, before.Nodes = copied(s.Units), copied(s.Nodes)
			next, _ := fold(keys, s, store.Update{Revision: w.revision, Events: events})
			if diff := cmp.Diff(before, *s, same...); diff != "" {
				t.Fatalf("the old snapshot has changed:\n%s", diff)
			}
			s = next
			want := Load(keys, w.list(keys.Prefix).Items, w.revision)
			// What a unit's last file asked for is remembered as long as it has records.
			forget := cmpopts.IgnoreFields(Unit{}, "Hash", "Requirements")
			if diff := cmp.Diff(want, s, append(same, forget)...); diff != "" {
				t.Fatalf("the snapshot is not that of the records (-list +fold):\n%s", diff)
			}
			if again, changed := fold(keys, s, w.list(keys.Prefix)); changed != 0 || !cmp.Equal(s, again, same...) {
				t.Fatalf("a list of the same records changes %d:\n%s", changed, cmp.Diff(s, again, same...))
			}
		}
	})
}

func copied[T any](m map[string]*T) map[string]*T {
	c := map[string]*T{}
	for k, v := range m {
		value := *v
		c[k] = &value
	}
	return c
}

// A text that comes with an unusable wish is read as soon as the wish is usable.
func TestTextOfARepairedRecord(t *testing.T) {
	w := &records{kvs: map[string]store.KV{}}
	text := func(option string) string { return "[Service]\nExecStart=/bin/true\n[X-Fleet]\n" + option + "\n" }
	s := Load(keys, nil, 1)
	for _, r := range []UnitRecord{{V: 1, Text: text(""), Desired: unit.Launched}, {V: 1, Text: text("Exclusive=yes"), Desired: "foo"}, {V: 1, Text: text("Exclusive=yes"), Desired: unit.Launched}} {
		s, _ = fold(keys, s, store.Update{Revision: w.revision + 1, Events: []store.Event{w.put(keys.Unit("a.service"), Encode(r))}})
		u := s.Units["a.service"]
		if want := r.Desired == "foo"; (u.Record.Problem != "") != want {
			t.Errorf("%s: problem %q", r.Desired, u.Record.Problem)
		}
		if u.Record.Usable() && u.Requirements.Exclusive != strings.Contains(r.Text, "Exclusive") {
			t.Errorf("requirements of another text: %+v", u.Requirements)
		}
	}
}

// Without the reports nothing else is missing, and to leave them out changes nothing.
func TestReportsComeAndGo(t *testing.T) {
	w := &records{kvs: map[string]store.KV{}}
	w.put(keys.Node("n1"), Encode(NodeRecord{V: 1, ID: "n1", Name: "one"}))
	w.put(keys.RouterReport("n1"), Encode(RouterReport{V: 1, Applied: 7}))
	w.put(keys.UnitsReport("n2"), Encode(UnitsReport{V: 1}))
	narrow, changed := fold(keys, &Snapshot{}, w.list(keys.Prefix+"cluster/"))
	if changed != 1 || narrow.Reports || narrow.Nodes["n1"].Name() != "one" || narrow.Nodes["n1"].Router.Exists() || narrow.Nodes["n2"] != nil {
		t.Errorf("%d changed, %+v", changed, narrow)
	}
	wide, changed := fold(keys, narrow, w.list(keys.Prefix))
	if changed != 2 || !wide.Reports || wide.Nodes["n1"].Router.Value.Applied != 7 || !wide.Nodes["n2"].Units.Exists() || wide.Nodes["n2"].Present() {
		t.Errorf("%d changed, %+v", changed, wide)
	}
	if again, changed := fold(keys, wide, w.list(keys.Prefix+"cluster/")); changed != 0 || again.Reports || !cmp.Equal(narrow, again, same...) {
		t.Errorf("%d changed:\n%s", changed, cmp.Diff(narrow, again, same...))
	}
}

// Hostile and newer records are problems of their own key, and nobody else's.
func TestProblems(t *testing.T) {
	w := &records{kvs: map[string]store.KV{}}
	good := Encode(UnitRecord{V: 1, Text: "[Service]\nExecStart=/bin/true\n", Desired: unit.Launched})
	w.put(keys.Unit("good.service"), good)
	w.put(keys.Unit("bad name.service"), good)
	w.put(keys.Unit("text.service"), Encode(UnitRecord{V: 1, Text: "[Service\n", Desired: unit.Launched}))
	w.put(keys.Unit("wish.service"), Encode(UnitRecord{V: 1, Text: "", Desired: "gone"}))
	w.put(keys.Unit("web@.service"), good)
	w.put(keys.Placement("good.service"), `{"v":2}`)
	w.put(keys.Node("n/1"), "x")
	w.put(keys.Node("n1"), "{}")
	s := Load(keys, w.list(keys.Prefix).Items, w.revision)
	for key, word := range map[string]string{
		keys.Unit("bad name.service"):  "",
		keys.Unit("text.service"):      "cannot be used",
		keys.Unit("wish.service"):      "invalid desired state",
		keys.Unit("web@.service"):      "template",
		keys.Placement("good.service"): "upgrade",
		keys.Node("n1"):                "version 0",
	} {
		if got, ok := s.Problems(keys)[key]; !ok || !strings.Contains(got, word) {
			t.Errorf("%s: problem %q does not say %q", key, got, word)
		}
	}
	if got := len(s.Problems(keys)); got != 6 {
		t.Errorf("%d problems: %v", got, s.Problems(keys))
	}
	if u := s.Units["good.service"]; u.Problem != "" || u.Unreadable() == "" || u.Hash == "" {
		t.Errorf("good.service: %+v", u)
	}
}
