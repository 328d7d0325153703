package fleetapi

import (
	"fmt"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"flotilla/internal/registry"
	"flotilla/internal/store"
	"flotilla/internal/store/storetest"
	"flotilla/internal/unitapi"
)

// stored reads the record of a unit.
func (w *world) stored(name string) (registry.Unit, bool) {
	w.t.Helper()
	kv, found, err := w.Store.Get(w.t.Context(), w.Keys.Unit(name))
	if err != nil {
		w.t.Fatal(err)
	}
	return recordOf[registry.Unit](kv, found).registry, found
}

func TestSubmitOutcomes(t *testing.T) {
	w := start(t)
	one, commented, two := text("/bin/true"), "# ours\n"+text("/bin/true"), text("/bin/false")
	bad := "[Service]\nExecStart=/bin/true\n[X-Fleet]\nGlobal=yes\nReplaces=b.service\nWehre=x\n"
	for i, tc := range []struct {
		in      unitapi.Submission
		outcome unitapi.Outcome
		desired registry.Desired
		text    string
		reason  string
	}{
		{unitapi.Submission{Name: "a.service", Text: one}, unitapi.Created, "inactive", one, ""},
		{unitapi.Submission{Name: "a.service", Text: one}, unitapi.Unchanged, "inactive", one, ""},
		{unitapi.Submission{Name: "a.service", Text: one, Desired: "launched"}, unitapi.Updated, "launched", one, ""},
		{unitapi.Submission{Name: "a.service", Text: commented}, unitapi.Unchanged, "launched", one, ""},
		{unitapi.Submission{Name: "a.service", Text: commented, Replace: true}, unitapi.Updated, "launched", commented, ""},
		{unitapi.Submission{Name: "a.service", Text: two, Desired: "loaded"}, unitapi.Differs, "loaded", commented, ""},
		{unitapi.Submission{Name: "a.service", Text: two}, unitapi.Differs, "loaded", commented, ""},
		{unitapi.Submission{Name: "a.service", Text: two, Replace: true}, unitapi.Replaced, "loaded", two, ""},
		{unitapi.Submission{Name: "a.service", Text: one, Replace: true, Desired: "launched"}, unitapi.Replaced, "launched", one, ""},
		{unitapi.Submission{Name: "a.service", Text: bad, Replace: true}, unitapi.Refused, "launched", one, "asks for what cannot be"},
		{unitapi.Submission{Name: "a.service", Text: "ExecStart=\n[x", Replace: true}, unitapi.Refused, "launched", one, "cannot be read"},
		{unitapi.Submission{Name: "a.service", Text: one, Desired: "bogus"}, unitapi.Refused, "launched", one, `invalid desired state "bogus"`},
		{unitapi.Submission{Name: "a.service", Text: strings.Repeat("# "+strings.Repeat("x", 1<<19)+"\n", 4) + one}, unitapi.Refused, "launched", one, "too large"},
		{unitapi.Submission{Name: "a.foo", Text: one}, unitapi.Refused, "", "", `invalid unit type: "foo"`},
		{unitapi.Submission{Name: "a@.service", Text: one, Desired: "loaded"}, unitapi.Refused, "", "", "cannot activate template"},
		{unitapi.Submission{Name: "a@.service", Text: one}, unitapi.Created, "inactive", one, ""},
	} {
		r := w.submit(tc.in).Results[0]
		u, _ := w.stored(tc.in.Name)
		if r.Outcome != tc.outcome || r.Desired != tc.desired || u.Desired != tc.desired || u.Text != tc.text || !strings.Contains(r.Reason, tc.reason) {
			t.Errorf("%d: %+v, stored %+v; want %s %s", i, r, u, tc.outcome, tc.desired)
		}
		if (r.Outcome == unitapi.Refused) != (r.Reason != "") {
			t.Errorf("%d: %s with reason %q", i, r.Outcome, r.Reason)
		}
	}
	got := w.submit(unitapi.Submission{Name: "b.service", Text: bad}).Results[0].Problems
	want := []unitapi.Problem{
		{Line: 5, Key: "Replaces", Value: "b.service", Reason: "Global cannot be used with Replaces", Remedy: "remove Global (line 4) or Replaces (line 5)"},
		{Line: 6, Key: "Wehre", Value: "x", Reason: `unrecognized requirement in [X-Fleet] section: "Wehre"`, Remedy: "it has no effect: write Where", Warning: true},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	if got := w.submit(unitapi.Submission{Name: "c.service", Text: one}, unitapi.Submission{Name: "c.service", Text: two}, unitapi.Submission{Name: "d.service", Text: one}); outcomes(got) != "created refused created" {
		t.Errorf("the same name twice: %s", outcomes(got))
	}
}

func TestChangeOutcomes(t *testing.T) {
	w := start(t)
	w.submit(unitapi.Submission{Name: "a.service", Text: text("a")}, unitapi.Submission{Name: "b.service", Text: text("b"), Desired: "launched"}, unitapi.Submission{Name: "t@.service", Text: text("t")})
	w.put("units/x.service", "nonsense")
	w.put("moves/b.service", registry.Encode(registry.Move{V: 1, To: "m2"}))
	all := []string{"a.service", "b.service", "t@.service", "x.service", "none.service", "a.service"}
	for i, tc := range []struct {
		in    unitapi.Changes
		want  string
		check string // desired states and restarts of a and b
	}{
		{unitapi.Changes{Restart: true}, "refused changed refused refused missing", "inactive 0 launched 1"},
		{unitapi.Changes{Desired: "loaded"}, "changed changed refused refused missing", "loaded 0 loaded 1"},
		{unitapi.Changes{Desired: "loaded"}, "unchanged unchanged refused refused missing", "loaded 0 loaded 1"},
		{unitapi.Changes{Restart: true}, "changed changed refused refused missing", "launched 0 launched 1"},
		{unitapi.Changes{Desired: "inactive"}, "changed changed unchanged refused missing", "inactive 0 inactive 1"},
		{unitapi.Changes{Destroy: true}, "changed changed changed changed missing", " 0  0"},
		{unitapi.Changes{Destroy: true}, "missing missing missing missing missing", " 0  0"},
	} {
		tc.in.Names = all
		var out unitapi.Results
		w.native("POST", "/v1/units/change", tc.in, 200, &out)
		a, _ := w.stored("a.service")
		b, _ := w.stored("b.service")
		if check := fmt.Sprintf("%s %d %s %d", a.Desired, a.Restarts, b.Desired, b.Restarts); outcomes(out) != tc.want || check != tc.check {
			t.Errorf("%d: %s and %q, want %s and %q", i, outcomes(out), check, tc.want, tc.check)
		}
	}
	if _, found, _ := w.Store.Get(t.Context(), w.Keys.Move("b.service")); found {
		t.Error("the move of a unit outlives it")
	}
	w.native("POST", "/v1/units/change", unitapi.Changes{Names: all}, 400, nil)
	w.native("POST", "/v1/units/change", unitapi.Changes{Names: all, Destroy: true, Restart: true}, 400, nil)
	w.native("POST", "/v1/units/change", unitapi.Changes{Names: all, Desired: "bogus"}, 400, nil)
	w.native("POST", "/v1/units/change", map[string]any{"name": "a.service"}, 400, nil)
	w.native("POST", "/v1/units", nil, 400, nil)
}

// 500 units are about ten transactions, each of them one revision of the store.
func TestManyUnitsAreFewTransactions(t *testing.T) {
	w := start(t)
	var units []unitapi.Submission
	var names []string
	for i := range 500 {
		names = append(names, fmt.Sprintf("u@%d.service", i))
		units = append(units, unitapi.Submission{Name: names[i], Text: text("/bin/sleep 1000"), Desired: "launched"})
	}
	before := w.put("mark", "")
	out := w.submit(units...)
	if n := strings.Count(outcomes(out), "created"); n != 500 || out.Revision-before > 12 {
		t.Errorf("%d units in %d transactions", n, out.Revision-before)
	}
	var list unitapi.Units
	w.native("GET", "/v1/units", nil, 200, &list)
	if len(list.Units) != 500 || list.Revision < out.Revision {
		t.Errorf("%d units at %d, written at %d", len(list.Units), list.Revision, out.Revision)
	}
	for _, c := range []unitapi.Changes{{Restart: true}, {Destroy: true}} {
		before, c.Names = out.Revision, names
		w.native("POST", "/v1/units/change", c, 200, &out)
		if n := strings.Count(outcomes(out), "changed"); n != 500 || out.Revision-before > 12 {
			t.Errorf("%+v: %d units in %d transactions", c.Destroy, n, out.Revision-before)
		}
	}
	// Large files do not make large transactions.
	units = units[:20]
	for i := range units {
		units[i].Text = "# " + strings.Repeat("x", 200<<10) + "\n" + text("/bin/true")
	}
	if out := w.submit(units...); strings.Count(outcomes(out), "created") != 20 {
		t.Errorf("large files: %s", outcomes(out))
	}
}

// Writers on the same units lose nothing: every restart is counted.
func TestConcurrentWriters(t *testing.T) {
	w := start(t)
	w.submit(unitapi.Submission{Name: "hot.service", Text: text("a"), Desired: "launched"})
	var others []unitapi.Submission
	names := []string{"hot.service"}
	for i := range 60 {
		name := fmt.Sprintf("cold@%d.service", i)
		names = append(names, name)
		others = append(others, unitapi.Submission{Name: name, Text: text("a"), Desired: "launched"})
	}
	w.submit(others...)
	var hot, cold atomic.Int64
	together(4, func(i int) {
		for range 5 {
			c, count := `{"names":["hot.service"],"restart":true}`, &hot
			if i == 0 { // one of them does it in a batch with others
				c, count = fmt.Sprintf(`{"names":["%s"],"restart":true}`, strings.Join(names, `","`)), &cold
			}
			r, err := w.send("POST", "/v1/units/change", nil, c)
			if err != nil || r.status != 200 {
				t.Error(r, err)
				return
			}
			count.Add(1)
		}
	})
	u, _ := w.stored("hot.service")
	c, _ := w.stored("cold@7.service")
	if u.Restarts != hot.Load()+cold.Load() || c.Restarts != cold.Load() {
		t.Errorf("hot: %d restarts of %d, cold: %d of %d", u.Restarts, hot.Load()+cold.Load(), c.Restarts, cold.Load())
	}
}

// Two clients of fleet's API that create and destroy the same unit get answers
// that make sense, and what is left is what one of them wrote.
func TestConcurrentPuts(t *testing.T) {
	w := start(t)
	var created, destroyed atomic.Int64
	together(4, func(i int) {
		for n := range 10 {
			method, body := "PUT", fleetBody(fmt.Sprintf("/bin/echo %d", i), "launched")
			if (i+n)%3 == 0 {
				method, body = "DELETE", ""
			}
			r, err := w.send(method, "/fleet/v1/units/a.service", jsonType, body)
			switch {
			case err != nil:
				t.Error(err)
			case method == "PUT" && r.status == 201:
				created.Add(1)
			case method == "DELETE" && r.status == 204:
				destroyed.Add(1)
			case method == "DELETE" && r.status == 404, r.status == 204:
			default:
				t.Errorf("%s: %d %s", method, r.status, r.body)
			}
		}
	})
	if created.Load() == 0 || destroyed.Load() == 0 || destroyed.Load() > created.Load() {
		t.Errorf("created %d times, destroyed %d times", created.Load(), destroyed.Load())
	}
	if u, found := w.stored("a.service"); found && (!strings.HasPrefix(u.Text, "[Service]\nExecStart=/bin/echo ") || u.Desired != registry.Launched) {
		t.Errorf("what is left: %+v", u)
	}
}

// A write whose answer is lost is done once, whether it arrived or not.
func TestUnknownOutcome(t *testing.T) {
	for _, arrives := range []bool{true, false} {
		t.Run(fmt.Sprint(arrives), func(t *testing.T) {
			proxy := storetest.NewProxy(t, storetest.Start(t))
			w := newWorld(t, proxy.Endpoint(), "/flotilla/")
			w.submit(unitapi.Submission{Name: "a.service", Text: text("a"), Desired: "launched"})
			if arrives {
				proxy.CutAfter(`"restarts":1`, func() {})
			} else {
				proxy.CutBefore(`"restarts":1`)
			}
			ended := make(chan reply)
			go func() {
				r, err := w.send("POST", "/v1/units/change", nil, `{"names":["a.service"],"restart":true}`)
				if err != nil {
					t.Error(err)
				}
				ended <- r
			}()
			again := time.NewTicker(20 * time.Millisecond)
			defer again.Stop()
			for {
				select {
				case <-again.C:
					proxy.Mend() // whenever it is that it has been cut
					continue
				case r := <-ended:
					if u, _ := w.stored("a.service"); r.status != 200 || !strings.Contains(r.body, `"changed"`) || u.Restarts != 1 {
						t.Errorf("%d %s, %d restarts", r.status, r.body, u.Restarts)
					}
				}
				return
			}
		})
	}
}

// Without the store both APIs say so.
func TestStoreAway(t *testing.T) {
	proxy := storetest.NewProxy(t, storetest.Start(t))
	w := newWorld(t, proxy.Endpoint(), "/flotilla/")
	w.submit(unitapi.Submission{Name: "a.service", Text: text("a")})
	proxy.Cut()
	var got [2]reply
	together(2, func(i int) {
		var err error
		if got[i], err = w.send("GET", []string{"/fleet/v1/units/a.service", "/v1/units/a.service"}[i], nil, ""); err != nil {
			t.Error(err)
		}
	})
	if got[0].status != 503 || !strings.Contains(got[0].body, unregistered) {
		t.Error(got[0])
	}
	if got[1].status != 503 || !strings.Contains(got[1].body, `"code":"store_unavailable"`) {
		t.Error(got[1])
	}
}

func TestInBatches(t *testing.T) {
	steps := make([]step, 120)
	var all []int
	for i := range steps {
		all = append(all, i)
		if i >= 100 {
			steps[i].want = strings.Repeat("x", batchBytes/2)
		}
	}
	steps[119].want = strings.Repeat("x", 2*batchBytes)
	var lengths []int
	for _, b := range inBatches(all, steps) {
		lengths = append(lengths, len(b))
		all = slices.DeleteFunc(all, func(i int) bool { return slices.Contains(b, i) })
	}
	if len(all) > 0 || !slices.Equal(lengths, []int{50, 50, 2, 2, 2, 2, 2, 2, 2, 2, 2, 1, 1}) {
		t.Error(lengths, all)
	}
	if got := partly(store.ErrUnavailable, 0, 0, 3); got != store.ErrUnavailable {
		t.Error(got)
	}
}
