package fleetapi

import (
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"net/http/httptest"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"flotilla/internal/api/apitest"
	"flotilla/internal/state"
	"flotilla/internal/store"
	"flotilla/internal/store/storetest"
	"flotilla/internal/unit"
)

// A request for the state of a unit that was just started waits for it.
func TestStateIsAwaited(t *testing.T) {
	w := start(t)
	w.hold = time.Minute
	w.Put("cluster/units/a.service", state.Encode(state.UnitRecord{V: 1, Text: apitest.Text("a"), Desired: unit.Launched}))
	w.Put(`cluster/units/sys-a\x2db.mount`, state.Encode(state.UnitRecord{V: 1, Text: apitest.Text("a"), Desired: unit.Launched}))
	answers := make(chan apitest.Reply, 2)
	for _, name := range []string{"a.service", `sys-a%5Cx2db.mount`} {
		go func() {
			r, err := w.Send("GET", "/fleet/v1/state/"+name, nil, "")
			if err != nil {
				t.Error(err)
			}
			answers <- r
		}()
	}
	other := state.UnitState{Hash: "11", Load: "loaded", Active: "active", Sub: "running"}
	for i := range 20 { // what others do is no answer
		w.Report("m1", map[string]state.UnitState{"b.service": other, fmt.Sprintf("a.service%d", i): other, "a.service": {Waiting: "soon"}})
	}
	select {
	case r := <-answers:
		t.Fatalf("answered before there was a state: %+v", r)
	default:
	}
	w.Report("m1", map[string]state.UnitState{"a.service": other, `sys-a\x2db.mount`: other})
	for range 2 {
		if r := <-answers; r.Status != 200 || !strings.Contains(r.Body, `"hash":"11","machineID":"m1"`) {
			t.Errorf("%+v", r)
		}
	}
}

// A request waits for the first registration; when the registration is lost
// later, the answer comes at once.
func TestRegistration(t *testing.T) {
	w := start(t)
	w.start = time.Minute
	w.registered.Store(false)
	var asked atomic.Int64
	w.Registered = func() bool { asked.Add(1); return w.registered.Load() }
	answers := make(chan apitest.Reply)
	go func() {
		r, err := w.Send("GET", "/fleet/v1/machines", nil, "")
		if err != nil {
			t.Error(err)
		}
		answers <- r
	}()
	storetest.Wait(t, time.Minute, "a request that waits", func() bool { return asked.Load() > 3 })
	select {
	case r := <-answers:
		t.Fatalf("answered before the registration: %+v", r)
	default:
	}
	w.registered.Store(true)
	if r := <-answers; r.Status != 200 {
		t.Errorf("%+v", r)
	}
	w.registered.Store(false)
	if r := w.Do("GET", "/fleet/v1/machines", nil, ""); r.Status != 503 || r.Header.Get("Server") != "fleetd/1.2.3" {
		t.Errorf("%+v", r)
	}
	w = newWorld(t, w.World.Store.Endpoints()[0], "/other/")
	w.start = time.Millisecond
	w.registered.Store(false)
	if r := w.Do("GET", "/fleet/v1/machines", nil, ""); r.Status != 503 {
		t.Errorf("never registered: %+v", r)
	}
}

func TestBodyLimit(t *testing.T) {
	w := start(t)
	for _, method := range []string{"PUT /fleet/v1/units/a.service", "PATCH /fleet/v1/machines"} {
		verb, path, _ := strings.Cut(method, " ")
		r := w.Do(verb, path, jsonType, `[{"value":"`+strings.Repeat("x", maxBody)+`"}]`)
		if verb == "PUT" {
			r = w.Do(verb, path, jsonType, fleetBody(strings.Repeat("x", maxBody), "launched"))
		}
		if r.Status != 413 || !strings.Contains(r.Body, "larger than 2097152 bytes") {
			t.Errorf("%s: %d %s", method, r.Status, r.Body)
		}
	}
	// What fits into a request and not into the store.
	long := strings.Repeat(strings.Repeat("x", 300<<10)+"\\\n", 5)
	if r := w.Do("PUT", "/fleet/v1/units/a.service", jsonType, fleetBody(long+"x", "launched")); r.Status != 400 || !strings.Contains(r.Body, "too large") {
		t.Errorf("%d %.200s", r.Status, r.Body)
	}
	// The longest line that systemd takes is stored.
	if r := w.Do("PUT", "/fleet/v1/units/a.service", jsonType, fleetBody(strings.Repeat("x", 1<<20-len("ExecStart=")), "launched")); r.Status != 201 {
		t.Errorf("%d %.200s", r.Status, r.Body)
	}
	if r := w.Do("POST", "/v1/failover", nil, `{"x":"`+strings.Repeat("x", 1<<20)+`"}`); r.Status != 413 {
		t.Errorf("%d %.200s", r.Status, r.Body)
	}
}

// Pages of every list, walked by their tokens, are all of it in order.
func TestPages(t *testing.T) {
	w := start(t)
	w.TokenLimit = 7
	for _, total := range []int{14, 15} { // at 14 the last page is empty
		for i := range total {
			name := fmt.Sprintf("u%02d.service", i)
			w.Put("cluster/units/"+name, state.Encode(state.UnitRecord{V: 1, Text: apitest.Text("a"), Desired: unit.Loaded}))
			w.Put(fmt.Sprintf("cluster/nodes/m%02d", i), state.Encode(state.NodeRecord{V: 1, ID: fmt.Sprintf("m%02d", i), Units: true}))
			w.Report(fmt.Sprintf("m%02d", i), map[string]state.UnitState{"a.service": {Hash: "11"}})
		}
		for _, path := range []string{"units", "machines", "state"} {
			var all []string
			pages, token := 0, ""
			for {
				query := ""
				if token != "" {
					query = "?nextPageToken=" + url.QueryEscape(token)
				}
				var page fleetPage
				r := w.Do("GET", "/fleet/v1/"+path+query, nil, "")
				if err := json.Unmarshal([]byte(r.Body), &page); err != nil || r.Status != 200 {
					t.Fatal(r, err)
				}
				for _, u := range page.Units {
					all = append(all, u.Name)
				}
				for _, m := range page.Machines {
					all = append(all, m.ID)
				}
				for _, s := range page.States {
					all = append(all, s.MachineID)
				}
				if pages, token = pages+1, page.Next; token == "" {
					break
				}
			}
			if len(all) != total || !slices.IsSorted(all) || pages != 3 {
				t.Errorf("%s: %d of %d items on %d pages", path, len(all), total, pages)
			}
		}
	}
	if got := (pageToken{100, 2}).String(); got != "ZAACAA==" {
		t.Errorf("token of the second page of 100: %s", got)
	}
	if items, next := cut(make([]int, 1<<16), pageToken{1, 1<<16 - 1}); len(items) != 1 || next != "" {
		t.Errorf("the last page that a token can name: %d items, then %q", len(items), next)
	}
}

func FuzzPageToken(f *testing.F) {
	for _, s := range []string{"ZAACAA==", "EwBMLg==", "", "ZAA=", "!", "ZAAAAA==", "ZAACAAAA"} {
		f.Add(s)
	}
	all := make([]int, 1000)
	f.Fuzz(func(t *testing.T, s string) {
		token, err := parsePage(url.Values{"nextPageToken": {s}}, 100)
		if err != nil {
			return
		}
		items, next := cut(all, token)
		if token.limit != 100 || token.page == 0 || len(items) > 100 || next != "" && len(items) != 100 {
			t.Errorf("%q: %+v, %d items, then %q", s, token, len(items), next)
		}
		if again, err := parsePage(url.Values{"nextPageToken": {token.String()}}, 100); err != nil || again != token {
			t.Errorf("%q: written again: %+v, %v", s, again, err)
		}
	})
}

// Whatever a body holds, the answer is one of those known, and what is stored
// can be read again.
func FuzzPut(f *testing.F) {
	w := start(f)
	f.Add("a.service", `{"options":[{"section":"Service","name":"ExecStart","value":"/bin/true"}],"desiredState":"launched"}`)
	f.Add("a.service", `{"name":"b.service"}`)
	f.Add("t@.service", `{"options":[{"section":"X-Fleet","name":"MachineOf","value":"%i.service"}]}`)
	f.Add("a@b.service", `{"options":[{"section":"]\n[","name":"=","value":"\\"}]}`)
	f.Add("", `[]`)
	f.Add("a/b.service", `null`)
	f.Fuzz(func(t *testing.T, name, body string) {
		r, err := w.Send("PUT", "/fleet/v1/units/"+url.PathEscape(name), jsonType, body)
		if err != nil {
			return // the client does not send such a path
		}
		if !slices.Contains([]int{201, 204, 400, 404, 409}, r.Status) {
			t.Fatalf("PUT %q %q: %d %s", name, body, r.Status, r.Body)
		}
		if r.Status/100 != 2 {
			return
		}
		got, err := w.Send("GET", "/fleet/v1/units/"+url.PathEscape(name), nil, "")
		var u fleetUnit
		if err != nil || got.Status != 200 || json.Unmarshal([]byte(got.Body), &u) != nil || u.Name != name || len(u.Options) == 0 {
			t.Fatalf("PUT %q %q, then GET: %d %s, %v", name, body, got.Status, got.Body, err)
		}
		raw, err := json.Marshal(u)
		if err != nil {
			t.Fatal(err)
		}
		again, err := w.Send("PUT", "/fleet/v1/units/"+url.PathEscape(name), jsonType, string(raw))
		if err != nil || again.Status != 204 {
			t.Fatalf("what was read is not what is there: %d %s, %v", again.Status, again.Body, err)
		}
	})
}

// The answers of one list belong to one revision, whatever is written meanwhile.
func TestListsAreConsistent(t *testing.T) {
	w := start(t)
	w.Put("cluster/units/a.service", state.Encode(state.UnitRecord{V: 1, Text: apitest.Text("a"), Desired: unit.Launched}))
	write := func(i int) {
		id := fmt.Sprintf("m%d", i%2)
		w.Apply(
			store.Put(w.State.Keys.Placement("a.service"), state.Encode(state.Placement{V: 1, Node: id})),
			store.Put(w.State.Keys.UnitsReport(id), state.Encode(state.UnitsReport{V: 1, Units: map[string]state.UnitState{"a.service": {Hash: apitest.Hash(t, apitest.Text("a")), Launched: true}}})),
			store.Delete(w.State.Keys.UnitsReport(fmt.Sprintf("m%d", 1-i%2))))
	}
	write(0)
	ended := make(chan struct{})
	written := make(chan struct{})
	go func() {
		defer close(written)
		for i := 0; ; i++ {
			select {
			case <-ended:
				return
			default:
				write(i)
			}
		}
	}()
	for range 100 {
		for _, path := range []string{"/fleet/v1/units", "/fleet/v1/units/a.service", "/v1/units?name=a.service", "/v1/units"} {
			if r := w.Do("GET", path, nil, ""); !regexp.MustCompile(`"current(State)?":"launched"`).MatchString(r.Body) {
				t.Errorf("%s: %s", path, r.Body)
			}
		}
	}
	close(ended)
	<-written
}

// discoveryDoc is what Google's discovery format says a document is.
type discoveryDoc struct {
	Kind, DiscoveryVersion, ID, Name, Version, Revision, Title, Description, Protocol, DocumentationLink string
	BaseURL, BasePath, RootURL, ServicePath, BatchPath                                                   string
	Icons                                                                                                map[string]string
	Labels                                                                                               []string
	Auth                                                                                                 map[string]any
	Parameters                                                                                           map[string]schema
	Schemas                                                                                              map[string]schema
	Resources                                                                                            map[string]struct{ Methods map[string]method }
}

type schema struct {
	ID, Type, Description, Location, Pattern string
	Ref                                      string `json:"$ref"`
	Required, ReadOnly                       bool
	Enum, EnumDescriptions                   []string
	Properties                               map[string]schema
	Items, AdditionalProperties              *schema
}

type method struct {
	ID, Description, HTTPMethod, Path string
	Parameters                        map[string]schema
	ParameterOrder                    []string
	Request, Response                 *schema
}

// The discovery document keeps the rules of its format and describes what is
// served, no more and no less.
func TestDiscovery(t *testing.T) {
	w := start(t)
	r := w.Do("GET", "/fleet/v1/discovery", nil, "")
	var doc discoveryDoc
	dec := json.NewDecoder(strings.NewReader(r.Body))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&doc); err != nil {
		t.Fatal(err)
	}
	if doc.Kind != "discovery#restDescription" || doc.DiscoveryVersion != "v1" || doc.Protocol != "rest" || doc.ID != doc.Name+":"+doc.Version ||
		doc.BaseURL != doc.RootURL+doc.ServicePath || doc.BasePath != "/"+doc.ServicePath || doc.BasePath != "/fleet/v1/" || doc.RootURL != "$ENDPOINT/" {
		t.Errorf("the head: %+v", doc)
	}
	used := map[string]bool{}
	for name, s := range doc.Schemas {
		if s.ID != name {
			t.Errorf("schema %s has the id %s", name, s.ID)
		}
		doc.check(t, name, s, used)
	}
	served := map[string]bool{}
	ids := map[string]bool{}
	for _, resource := range doc.Resources {
		for name, m := range resource.Methods {
			if ids[m.ID] || !regexp.MustCompile(`^fleet\.[A-Z][A-Za-z]*\.`+name+`$`).MatchString(m.ID) || m.Description == "" {
				t.Errorf("method %s: id %q, description %q", name, m.ID, m.Description)
			}
			ids[m.ID] = true
			doc.checkMethod(t, m, used)
			served[m.HTTPMethod+" "+m.Path] = true
			w.described(t, m)
		}
	}
	for name := range doc.Schemas {
		if !used[name] {
			t.Errorf("schema %s is not used", name)
		}
	}
	want := []string{"DELETE units/{unitName}", "GET machines", "GET state", "GET state/{unitName}", "GET units", "GET units/{unitName}", "PATCH machines", "PUT units/{unitName}"}
	if got := slices.Sorted(maps.Keys(served)); !slices.Equal(got, want) {
		t.Errorf("methods %q, served are %q", got, want)
	}
	// Every field that is sent is described.
	for name, value := range map[string]any{
		"Machine": fleetMachine{"m", map[string]string{"a": "b"}, "10.0.0.1"}, "UnitOption": fleetOption{"a", "b", "c"},
		"Unit": fleetUnit{"a", []fleetOption{{}}, "loaded", "loaded", "m"}, "UnitState": fleetState{"a", "b", "c", "d", "e", "f"},
	} {
		raw, err := json.Marshal(value)
		fields := map[string]any{}
		if err != nil || json.Unmarshal(raw, &fields) != nil {
			t.Fatal(err)
		}
		if got, want := slices.Sorted(maps.Keys(doc.Schemas[name].Properties)), slices.Sorted(maps.Keys(fields)); !slices.Equal(got, want) {
			t.Errorf("schema %s describes %q, sent are %q", name, got, want)
		}
	}
}

// check holds one schema to the rules: a reference alone, or a type with what
// belongs to it.
func (doc *discoveryDoc) check(t *testing.T, where string, s schema, used map[string]bool) {
	t.Helper()
	if s.Ref != "" {
		if _, ok := doc.Schemas[s.Ref]; !ok || s.Type != "" {
			t.Errorf("%s: reference to %q", where, s.Ref)
		}
		used[s.Ref] = true
		return
	}
	switch {
	case !slices.Contains([]string{"object", "array", "string", "boolean", "integer", "number", "any"}, s.Type),
		(s.Type == "array") != (s.Items != nil),
		s.Type != "object" && (s.Properties != nil || s.AdditionalProperties != nil),
		s.Type != "string" && (s.Enum != nil || s.Pattern != ""),
		len(s.Enum) != len(s.EnumDescriptions):
		t.Errorf("%s: %+v", where, s)
	}
	for name, p := range s.Properties {
		doc.check(t, where+"."+name, p, used)
	}
	for _, p := range []*schema{s.Items, s.AdditionalProperties} {
		if p != nil {
			doc.check(t, where+"[]", *p, used)
		}
	}
}

func (doc *discoveryDoc) checkMethod(t *testing.T, m method, used map[string]bool) {
	t.Helper()
	var inPath []string
	for _, match := range regexp.MustCompile(`\{([A-Za-z]+)\}`).FindAllStringSubmatch(m.Path, -1) {
		inPath = append(inPath, match[1])
	}
	if !slices.Equal(inPath, m.ParameterOrder) || strings.HasPrefix(m.Path, "/") {
		t.Errorf("%s: path %s, order %q", m.ID, m.Path, m.ParameterOrder)
	}
	for name, p := range m.Parameters {
		doc.check(t, m.ID+"."+name, p, used)
		if want := map[bool]string{true: "path", false: "query"}[slices.Contains(inPath, name)]; p.Location != want || p.Required != (want == "path") {
			t.Errorf("%s: parameter %s: %+v", m.ID, name, p)
		}
	}
	for _, body := range []*schema{m.Request, m.Response} {
		if body != nil {
			doc.check(t, m.ID, *body, used)
		}
	}
	if (m.Request != nil) != slices.Contains([]string{"PUT", "PATCH", "POST"}, m.HTTPMethod) {
		t.Errorf("%s: %s with request %v", m.ID, m.HTTPMethod, m.Request)
	}
}

// described sends the method's request and compares whether there is a body.
func (w *world) described(t *testing.T, m method) {
	t.Helper()
	w.Put("cluster/units/a.service", state.Encode(state.UnitRecord{V: 1, Text: apitest.Text("a"), Desired: unit.Inactive}))
	body := map[string]string{"PUT": `{"desiredState":"inactive"}`, "PATCH": "[]"}[m.HTTPMethod]
	r := w.Do(m.HTTPMethod, "/fleet/v1/"+strings.ReplaceAll(m.Path, "{unitName}", "a.service"), jsonType, body)
	if want := map[bool]int{true: http.StatusOK, false: http.StatusNoContent}[m.Response != nil]; r.Status != want {
		t.Errorf("%s: %d %s, want %d", m.ID, r.Status, r.Body, want)
	}
}

// On the node's socket both APIs live beside each other.
func TestPaths(t *testing.T) {
	w := start(t)
	for path, want := range map[string]int{"/": 405, "/fleet/v1": 405, "/fleet/v1/": 404, "/fleet/v1/units": 200, "/v1-alpha/machines": 200,
		"/v1-alpha/x": 404, "/v1/units": 200, "/v1/status": 200, "/metrics": 200, "/other": 404} {
		r := httptest.NewRecorder()
		if w.server.Handler().ServeHTTP(r, httptest.NewRequest("GET", path, nil)); r.Code != want {
			t.Errorf("%s: %d, want %d", path, r.Code, want)
		}
	}
}

// Two clients of fleet's API that create and destroy the same unit get answers
// that make sense, and what is left is what one of them wrote.
func TestConcurrentPuts(t *testing.T) {
	w := start(t)
	var created, destroyed atomic.Int64
	apitest.Together(4, func(i int) {
		for n := range 10 {
			method, body := "PUT", fleetBody(fmt.Sprintf("/bin/echo %d", i), "launched")
			if (i+n)%3 == 0 {
				method, body = "DELETE", ""
			}
			r, err := w.Send(method, "/fleet/v1/units/a.service", jsonType, body)
			switch {
			case err != nil:
				t.Error(err)
			case method == "PUT" && r.Status == 201:
				created.Add(1)
			case method == "DELETE" && r.Status == 204:
				destroyed.Add(1)
			case method == "DELETE" && r.Status == 404, r.Status == 204:
			default:
				t.Errorf("%s: %d %s", method, r.Status, r.Body)
			}
		}
	})
	if created.Load() == 0 || destroyed.Load() == 0 || destroyed.Load() > created.Load() {
		t.Errorf("created %d times, destroyed %d times", created.Load(), destroyed.Load())
	}
	if u, found := w.Stored("a.service"); found && (!strings.HasPrefix(u.Text, "[Service]\nExecStart=/bin/echo ") || u.Desired != unit.Launched) {
		t.Errorf("what is left: %+v", u)
	}
}

// Without the store fleet's API says so.
func TestStoreAway(t *testing.T) {
	proxy := storetest.NewProxy(t, storetest.Start(t))
	w := newWorld(t, proxy.Endpoint(), "/flotilla/")
	w.Unit("a.service", apitest.Text("a"), unit.Inactive)
	w.Known()
	proxy.Cut()
	if r := w.Do("GET", "/fleet/v1/units/a.service", nil, ""); r.Status != 503 || !strings.Contains(r.Body, unregistered) {
		t.Error(r)
	}
}

// All 500 units, by the pages of fleet's lists.
func BenchmarkList500(b *testing.B) {
	w := start(b)
	w.Populate(500, 3)
	for _, path := range []string{"units", "state"} {
		apitest.CPU(b, path, func(b *testing.B) {
			count := 0
			for token := ""; ; {
				var page fleetPage
				r := w.Do("GET", "/fleet/v1/"+path+token, nil, "")
				if err := json.Unmarshal([]byte(r.Body), &page); err != nil {
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
