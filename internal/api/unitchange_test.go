package api

import (
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"flotilla/internal/api/apitest"
	"flotilla/internal/state"
	"flotilla/internal/store/storetest"
	"flotilla/internal/unit"
	"flotilla/internal/wire"
)

func TestSubmitOutcomes(t *testing.T) {
	w := newWorld(t)
	one, commented, two := apitest.Text("/bin/true"), "# ours\n"+apitest.Text("/bin/true"), apitest.Text("/bin/false")
	bad := "[Service]\nExecStart=/bin/true\n[X-Fleet]\nGlobal=yes\nReplaces=b.service\nWehre=x\n"
	for i, tc := range []struct {
		in      wire.Submission
		outcome wire.Outcome
		desired unit.Desired
		text    string
		reason  string
	}{
		{wire.Submission{Name: "a.service", Text: new(one)}, wire.Created, "inactive", one, ""},
		{wire.Submission{Name: "a.service", Text: new(one)}, wire.Unchanged, "inactive", one, ""},
		{wire.Submission{Name: "a.service", Text: new(one), Desired: "launched"}, wire.Updated, "launched", one, ""},
		{wire.Submission{Name: "a.service", Text: new(commented)}, wire.Unchanged, "launched", one, ""},
		{wire.Submission{Name: "a.service", Text: new(commented), Replace: true}, wire.Updated, "launched", commented, ""},
		{wire.Submission{Name: "a.service", Text: new(two), Desired: "loaded"}, wire.Differs, "loaded", commented, ""},
		{wire.Submission{Name: "a.service", Text: new(two)}, wire.Differs, "loaded", commented, ""},
		{wire.Submission{Name: "a.service", Text: new(two), Replace: true}, wire.Replaced, "loaded", two, ""},
		{wire.Submission{Name: "a.service", Text: new(one), Replace: true, Desired: "launched"}, wire.Replaced, "launched", one, ""},
		{wire.Submission{Name: "a.service", Text: new(bad), Replace: true}, wire.Refused, "launched", one, "asks for what cannot be"},
		{wire.Submission{Name: "a.service", Text: new("ExecStart=\n[x"), Replace: true}, wire.Refused, "launched", one, "cannot be read"},
		{wire.Submission{Name: "a.service", Text: new(one), Desired: "bogus"}, wire.Refused, "launched", one, `invalid desired state "bogus"`},
		{wire.Submission{Name: "a.service", Text: new(strings.Repeat("# "+strings.Repeat("x", 1<<19)+"\n", 4) + one)}, wire.Refused, "launched", one, "too large"},
		{wire.Submission{Name: "a.foo", Text: new(one)}, wire.Refused, "", "", `invalid unit type: "foo"`},
		{wire.Submission{Name: "a@.service", Text: new(one), Desired: "loaded"}, wire.Refused, "", "", "cannot activate template"},
		{wire.Submission{Name: "a@.service", Text: new(one)}, wire.Created, "inactive", one, ""},
	} {
		r := w.submit(tc.in).Results[0]
		u, _ := w.Stored(tc.in.Name)
		if r.Outcome != tc.outcome || r.Desired != tc.desired || u.Desired != tc.desired || u.Text != tc.text || !strings.Contains(r.Reason, tc.reason) {
			t.Errorf("%d: %+v, stored %+v; want %s %s", i, r, u, tc.outcome, tc.desired)
		}
		if (r.Outcome == wire.Refused) != (r.Reason != "") {
			t.Errorf("%d: %s with reason %q", i, r.Outcome, r.Reason)
		}
	}
	got := w.submit(wire.Submission{Name: "b.service", Text: new(bad)}).Results[0].Problems
	want := []unit.Problem{
		{Line: 5, Key: "Replaces", Value: "b.service", Reason: "Global cannot be used with Replaces", Remedy: "remove Global (line 4) or Replaces (line 5)"},
		{Line: 6, Key: "Wehre", Value: "x", Reason: `unrecognized requirement in [X-Fleet] section: "Wehre"`, Remedy: "it has no effect: write Where", Warning: true},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	if got := w.submit(wire.Submission{Name: "c.service", Text: new(one)}, wire.Submission{Name: "c.service", Text: new(two)}, wire.Submission{Name: "d.service", Text: new(one)}); outcomes(got) != "created refused created" {
		t.Errorf("the same name twice: %s", outcomes(got))
	}
}

// What a submission without a text, of a template's text, or with conditions
// comes to.
func TestSubmitResolves(t *testing.T) {
	w := newWorld(t)
	one, two := apitest.Text("/bin/true"), apitest.Text("/bin/false")
	global := apitest.Text("/bin/true") + "[X-Fleet]\nGlobal=yes\n"
	w.submit(wire.Submission{Name: "t@.service", Text: new(one)}, wire.Submission{Name: "bad@.service", Text: new(one)}, wire.Submission{Name: "run.service", Text: new(one), Desired: "launched"},
		wire.Submission{Name: "off.service", Text: new(one)})
	w.Unit("bad@.service", "[x", unit.Inactive)
	for i, tc := range []struct {
		in   wire.Submission
		want wire.Result
		text string
	}{
		{wire.Submission{Name: "none", Desired: "launched"}, wire.Result{Name: "none.service", Outcome: wire.Missing}, ""},
		{wire.Submission{Name: "no*", Desired: "launched"}, wire.Result{Name: "no*", Outcome: wire.Missing}, ""},
		{wire.Submission{Name: "run", Desired: "launched"}, wire.Result{Name: "run.service", Outcome: wire.Unchanged, Desired: "launched", Was: "launched"}, one},
		{wire.Submission{Name: "of*", Desired: "loaded"}, wire.Result{Name: "off.service", Outcome: wire.Updated, Desired: "loaded", Was: "inactive"}, one},
		// Of an instance, the template that the cluster has.
		{wire.Submission{Name: "t@1", Desired: "loaded"}, wire.Result{Name: "t@1.service", Outcome: wire.Created, Desired: "loaded", From: "t@.service"}, one},
		{wire.Submission{Name: "t@2.service", Text: new(two), Template: true}, wire.Result{Name: "t@2.service", Outcome: wire.Created, Desired: "inactive", From: "t@.service", FromDiffers: true}, one},
		{wire.Submission{Name: "t@3.service", Text: new(two)}, wire.Result{Name: "t@3.service", Outcome: wire.Created, Desired: "inactive"}, two},
		{wire.Submission{Name: "t@3.service", Replace: true}, wire.Result{Name: "t@3.service", Outcome: wire.Replaced, Desired: "inactive", Was: "inactive", From: "t@.service"}, one},
		{wire.Submission{Name: "u@1.service", Text: new(global), Template: true, Desired: "launched"}, wire.Result{Name: "u@1.service", Outcome: wire.Created, Desired: "launched", Global: true}, global},
		{wire.Submission{Name: "u@2.service"}, wire.Result{Name: "u@2.service", Outcome: wire.Missing}, ""},
		{wire.Submission{Name: "bad@1.service"}, wire.Result{Name: "bad@1.service", Outcome: wire.Refused, Reason: "its template bad@.service cannot be read: line 1: unable to find end of section [x; close it on the same line, as in [Service]"}, ""},
		// A unit in a higher state is not replaced if that matters.
		{wire.Submission{Name: "run.service", Text: new(two), Replace: true, Careful: true}, wire.Result{Name: "run.service", Outcome: wire.InUse, Desired: "launched", Was: "launched"}, one},
		{wire.Submission{Name: "run.service", Text: new(two), Replace: true, Careful: true, Desired: "loaded"}, wire.Result{Name: "run.service", Outcome: wire.InUse, Desired: "loaded", Was: "launched"}, one},
		{wire.Submission{Name: "run.service", Text: new(two), Replace: true, Careful: true, Desired: "launched"}, wire.Result{Name: "run.service", Outcome: wire.Replaced, Desired: "launched", Was: "loaded"}, two},
	} {
		got := w.submit(tc.in).Results
		if diff := cmp.Diff([]wire.Result{tc.want}, got); diff != "" {
			t.Errorf("%d: %s", i, diff)
		}
		if u, _ := w.Stored(tc.want.Name); u.Text != tc.text {
			t.Errorf("%d: the text is %q", i, u.Text)
		}
	}
	// A bad file that is not taken does not matter.
	bad := "[Service]\nExecStart=/bin/true\n[X-Fleet]\nGlobal=yes\nReplaces=b.service\n"
	if got := w.submit(wire.Submission{Name: "run.service", Text: new(bad)}); outcomes(got) != "differs" {
		t.Errorf("%+v", got)
	}
	// Patterns and names that mean the same unit.
	if got := w.submit(wire.Submission{Name: "t@[12]"}, wire.Submission{Name: "t@2"}, wire.Submission{Name: "t@3.service"}); outcomes(got) != "unchanged unchanged unchanged" || got.Results[1].Name != "t@2.service" {
		t.Errorf("%+v", got)
	}
}

// Of units that go together none is written if one cannot be.
func TestSubmitTogether(t *testing.T) {
	w := newWorld(t)
	w.Unit("b.service", apitest.Text("b"), unit.Loaded)
	for last, want := range map[string]string{"none": "skipped skipped missing", "a@.service": "skipped skipped refused"} {
		var out wire.Results
		w.JSON("POST", "/v1/units", wire.Submissions{Together: true, Units: []wire.Submission{
			{Name: "a.service", Text: new(apitest.Text("a"))}, {Name: "b.service", Desired: "launched"}, {Name: last, Desired: "launched"}}}, 200, &out)
		if outcomes(out) != want || out.Results[1].Desired != unit.Loaded {
			t.Errorf("%+v", out)
		}
		if _, found := w.Stored("a.service"); found {
			t.Error("it was written")
		}
	}
	var out wire.Results
	w.JSON("POST", "/v1/units", wire.Submissions{Together: true, Units: []wire.Submission{{Name: "a.service", Text: new(apitest.Text("a"))}, {Name: "b", Desired: "launched"}}}, 200, &out)
	if outcomes(out) != "created updated" {
		t.Errorf("%+v", out)
	}
}

// A unit that has failed is started again if that is asked for.
func TestSubmitRetry(t *testing.T) {
	w := newWorld(t)
	for _, name := range []string{"failed.service", "well.service"} {
		w.Unit(name, apitest.Text("a"), unit.Launched)
		w.Place(name, "m1")
	}
	w.Report("m1", map[string]state.UnitState{"failed.service": {Hash: "1", Active: "failed"}, "well.service": {Hash: "1", Active: "active"}})
	for _, retry := range []bool{false, true} {
		var out wire.Results
		w.JSON("POST", "/v1/units", wire.Submissions{Retry: retry, Units: []wire.Submission{{Name: "failed", Desired: "launched"}, {Name: "well", Desired: "launched"}}}, 200, &out)
		failed, _ := w.Stored("failed.service")
		well, _ := w.Stored("well.service")
		if want := map[bool]string{false: "unchanged unchanged", true: "updated unchanged"}[retry]; outcomes(out) != want || failed.Restarts != map[bool]int64{true: 1}[retry] || well.Restarts != 0 {
			t.Errorf("retry %t: %+v", retry, out)
		}
	}
}

func TestChangeOutcomes(t *testing.T) {
	w := newWorld(t)
	w.submit(wire.Submission{Name: "a.service", Text: new(apitest.Text("a"))}, wire.Submission{Name: "b.service", Text: new(apitest.Text("b")), Desired: "launched"}, wire.Submission{Name: "t@.service", Text: new(apitest.Text("t"))})
	w.Put("cluster/units/x.service", "nonsense")
	w.Put("cluster/moves/b.service", state.Encode(state.Move{V: 1, To: "m2"}))
	all := []string{"a.service", "b.service", "t@.service", "x.service", "none.service", "a.service"}
	for i, tc := range []struct {
		in    wire.Changes
		want  string
		check string // desired states and restarts of a and b
	}{
		{wire.Changes{Restart: true}, "refused changed refused refused missing", "inactive 0 launched 1"},
		{wire.Changes{Desired: "loaded"}, "changed changed refused refused missing", "loaded 0 loaded 1"},
		{wire.Changes{Desired: "loaded"}, "unchanged unchanged refused refused missing", "loaded 0 loaded 1"},
		{wire.Changes{Restart: true}, "changed changed refused refused missing", "launched 0 launched 1"},
		{wire.Changes{Desired: "inactive"}, "changed changed unchanged refused missing", "inactive 0 inactive 1"},
		{wire.Changes{Desired: "launched"}, "changed changed refused refused missing", "launched 0 launched 1"},
		{wire.Changes{Stop: true}, "changed changed unchanged refused missing", "loaded 0 loaded 1"},
		{wire.Changes{Stop: true}, "unchanged unchanged unchanged refused missing", "loaded 0 loaded 1"},
		{wire.Changes{Destroy: true}, "changed changed changed changed missing", " 0  0"},
		{wire.Changes{Destroy: true}, "missing missing missing missing missing", " 0  0"},
	} {
		tc.in.Names = all
		var out wire.Results
		w.JSON("POST", "/v1/units/change", tc.in, 200, &out)
		a, _ := w.Stored("a.service")
		b, _ := w.Stored("b.service")
		if check := fmt.Sprintf("%s %d %s %d", a.Desired, a.Restarts, b.Desired, b.Restarts); outcomes(out) != tc.want || check != tc.check {
			t.Errorf("%d: %s and %q, want %s and %q", i, outcomes(out), check, tc.want, tc.check)
		}
	}
	if u := w.Known().Units["b.service"]; u != nil {
		t.Error("the move of a unit outlives it")
	}
	w.JSON("POST", "/v1/units/change", wire.Changes{Names: all}, 400, nil)
	w.JSON("POST", "/v1/units/change", wire.Changes{Names: all, Destroy: true, Restart: true}, 400, nil)
	w.JSON("POST", "/v1/units/change", wire.Changes{Names: all, Desired: "bogus"}, 400, nil)
	w.JSON("POST", "/v1/units/change", map[string]any{"name": "a.service"}, 400, nil)
	w.JSON("POST", "/v1/units", nil, 400, nil)
}

// 500 units are about ten transactions, each of them one revision of the store.
func TestManyUnitsAreFewTransactions(t *testing.T) {
	w := newWorld(t)
	var units []wire.Submission
	var names []string
	for i := range 500 {
		names = append(names, fmt.Sprintf("u@%d.service", i))
		units = append(units, wire.Submission{Name: names[i], Text: new(apitest.Text("/bin/sleep 1000")), Desired: "launched"})
	}
	before := w.Put("mark", "")
	out := w.submit(units...)
	if n := strings.Count(outcomes(out), "created"); n != 500 || out.Revision-before > 12 {
		t.Errorf("%d units in %d transactions", n, out.Revision-before)
	}
	var list wire.Units
	w.JSON("GET", "/v1/units", nil, 200, &list)
	if len(list.Units) != 500 || list.Revision < out.Revision {
		t.Errorf("%d units at %d, written at %d", len(list.Units), list.Revision, out.Revision)
	}
	for _, c := range []wire.Changes{{Restart: true}, {Destroy: true}} {
		before, c.Names = out.Revision, names
		w.JSON("POST", "/v1/units/change", c, 200, &out)
		if n := strings.Count(outcomes(out), "changed"); n != 500 || out.Revision-before > 12 {
			t.Errorf("%+v: %d units in %d transactions", c.Destroy, n, out.Revision-before)
		}
	}
	// Large files do not make large transactions.
	units = units[:20]
	for i := range units {
		units[i].Text = new("# " + strings.Repeat("x", 200<<10) + "\n" + apitest.Text("/bin/true"))
	}
	if out := w.submit(units...); strings.Count(outcomes(out), "created") != 20 {
		t.Errorf("large files: %s", outcomes(out))
	}
}

// Writers on the same units lose nothing: every restart is counted.
func TestConcurrentWriters(t *testing.T) {
	w := newWorld(t)
	w.submit(wire.Submission{Name: "hot.service", Text: new(apitest.Text("a")), Desired: "launched"})
	var others []wire.Submission
	names := []string{"hot.service"}
	for i := range 60 {
		name := fmt.Sprintf("cold@%d.service", i)
		names = append(names, name)
		others = append(others, wire.Submission{Name: name, Text: new(apitest.Text("a")), Desired: "launched"})
	}
	w.submit(others...)
	var hot, cold atomic.Int64
	apitest.Together(4, func(i int) {
		for range 5 {
			c, count := `{"names":["hot.service"],"restart":true}`, &hot
			if i == 0 { // one of them does it in a batch with others
				c, count = fmt.Sprintf(`{"names":["%s"],"restart":true}`, strings.Join(names, `","`)), &cold
			}
			r, err := w.Send("POST", "/v1/units/change", nil, c)
			if err != nil || r.Status != 200 {
				t.Error(r, err)
				return
			}
			count.Add(1)
		}
	})
	u, _ := w.Stored("hot.service")
	c, _ := w.Stored("cold@7.service")
	if u.Restarts != hot.Load()+cold.Load() || c.Restarts != cold.Load() {
		t.Errorf("hot: %d restarts of %d, cold: %d of %d", u.Restarts, hot.Load()+cold.Load(), c.Restarts, cold.Load())
	}
}

// A write whose answer is lost is done once, whether it arrived or not.
func TestUnknownOutcome(t *testing.T) {
	for _, arrives := range []bool{true, false} {
		t.Run(fmt.Sprint(arrives), func(t *testing.T) {
			proxy := storetest.NewProxy(t, storetest.Start(t))
			w := newWorldAt(t, proxy.Endpoint())
			w.submit(wire.Submission{Name: "a.service", Text: new(apitest.Text("a")), Desired: "launched"})
			if arrives {
				proxy.CutAfter(`"restarts":1`, func() {})
			} else {
				proxy.CutBefore(`"restarts":1`)
			}
			ended := make(chan apitest.Reply)
			go func() {
				r, err := w.Send("POST", "/v1/units/change", nil, `{"names":["a.service"],"restart":true}`)
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
					if u, _ := w.Stored("a.service"); r.Status != 200 || !strings.Contains(r.Body, `"changed"`) || u.Restarts != 1 {
						t.Errorf("%d %s, %d restarts", r.Status, r.Body, u.Restarts)
					}
				}
				return
			}
		})
	}
}

func TestInBatches(t *testing.T) {
	s := New(Config{State: state.NewFeed(nil, state.Keys{}, slog.New(slog.DiscardHandler))})
	c := &changing{Server: s, names: make([]string, 121), steps: make([]Step, 121), unsure: make([]*Step, 121)}
	var all []int
	for i := range c.names {
		c.names[i] = fmt.Sprintf("u%d.service", i)
		all = append(all, i)
	}
	c.decide = func(i int, _ *state.Snapshot, u *state.Unit) Step {
		length := 10
		switch {
		case i == 120:
			return Step{} // there is nothing to write
		case i == 119:
			length = 2 * batchBytes
		case i >= 100:
			length = batchBytes/2 - 100
		}
		return Step{Write: &state.UnitRecord{Text: strings.Repeat("x", length)}}
	}
	var lengths []int
	for _, b := range c.inBatches(&state.Snapshot{}) {
		lengths = append(lengths, len(b))
		all = slices.DeleteFunc(all, func(i int) bool { return slices.Contains(b, i) })
	}
	if !slices.Equal(all, []int{120}) || !slices.Equal(lengths, []int{50, 50, 2, 2, 2, 2, 2, 2, 2, 2, 2, 1, 1}) {
		t.Error(lengths, all)
	}
}
