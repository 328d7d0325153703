package fleetapi

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"flotilla/internal/registry"
	"flotilla/internal/store"
	"flotilla/internal/store/storetest"
	"flotilla/internal/unitapi"
)

// world is a handler with a real store, reached over a real socket.
type world struct {
	*Handler
	t          testing.TB
	url        string
	registered atomic.Bool
}

// endpoint starts one store for all tests of a test function.
func newWorld(t testing.TB, endpoint, prefix string) *world {
	t.Helper()
	client, err := store.Open(store.Config{Endpoints: []string{endpoint}, Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = client.Close() })
	w := &world{t: t}
	w.registered.Store(true)
	w.Handler = New(Config{Store: client, Keys: registry.Keys{Prefix: prefix}, Registered: w.registered.Load,
		Self: func() string { return "m1" }, Version: "1.2.3", Log: slog.New(slog.DiscardHandler)})
	mux := http.NewServeMux()
	w.NativeRoutes(mux)
	mux.Handle("/", w.FleetHandler())
	server := httptest.NewServer(mux)
	t.Cleanup(server.Close)
	w.url = server.URL
	return w
}

func start(t testing.TB) *world { return newWorld(t, storetest.Start(t), "/flotilla/") }

// put writes a key below the prefix.
func (w *world) put(key, value string) int64 {
	w.t.Helper()
	return w.apply(store.Put(w.Keys.Prefix+key, value))
}

func (w *world) apply(ops ...store.Op) int64 {
	w.t.Helper()
	revision, err := w.Store.Apply(w.t.Context(), ops)
	if err != nil {
		w.t.Fatal(err)
	}
	return revision
}

// reply is an answer as it came over the wire.
type reply struct {
	status int
	header http.Header
	body   string
}

func (w *world) do(method, path string, header http.Header, body string) reply {
	w.t.Helper()
	r, err := w.send(method, path, header, body)
	if err != nil {
		w.t.Fatal(err)
	}
	return r
}

// send is do for goroutines.
func (w *world) send(method, path string, header http.Header, body string) (reply, error) {
	var in io.Reader
	if body != "" {
		in = strings.NewReader(body)
	}
	req, err := http.NewRequest(method, w.url+path, in)
	if err != nil {
		return reply{}, err
	}
	for key, values := range header {
		req.Header[key] = values
	}
	resp, err := http.DefaultTransport.RoundTrip(req)
	if err != nil {
		return reply{}, err
	}
	raw, err := io.ReadAll(resp.Body)
	return reply{resp.StatusCode, resp.Header, string(raw)}, err
}

var jsonType = http.Header{"Content-Type": {"application/json"}}

// native sends a request of the native API and decodes the answer, which must
// have that status, into out unless that is nil.
func (w *world) native(method, path string, in any, status int, out any) {
	w.t.Helper()
	body := ""
	if in != nil {
		raw, err := json.Marshal(in)
		if err != nil {
			w.t.Fatal(err)
		}
		body = string(raw)
	}
	r := w.do(method, path, nil, body)
	if r.status != status {
		w.t.Fatalf("%s %s: %d %s, want %d", method, path, r.status, r.body, status)
	}
	if out == nil {
		return
	}
	dec := json.NewDecoder(bytes.NewReader([]byte(r.body)))
	dec.DisallowUnknownFields()
	if err := dec.Decode(out); err != nil {
		w.t.Fatalf("%s %s: %v in %s", method, path, err, r.body)
	}
}

func (w *world) submit(units ...unitapi.Submission) unitapi.Results {
	w.t.Helper()
	var out unitapi.Results
	w.native("POST", "/v1/units", unitapi.Submissions{Units: units}, 200, &out)
	return out
}

// outcomes joins the outcomes of a request.
func outcomes(r unitapi.Results) string {
	var all []string
	for _, one := range r.Results {
		all = append(all, string(one.Outcome))
	}
	return strings.Join(all, " ")
}

func text(command string) string { return "[Service]\nExecStart=" + command + "\n" }

// run gives a unit a place and a state, as engine and agent do.
func (w *world) run(name, machine string, state registry.State) {
	w.t.Helper()
	w.put("placements/"+name, registry.Encode(registry.Placement{V: 1, Machine: machine, Epoch: 1, Reason: "the fewest units"}))
	w.states(machine, map[string]registry.State{name: state})
}

func (w *world) states(machine string, units map[string]registry.State) {
	w.t.Helper()
	w.put("states/"+machine, registry.Encode(registry.States{V: 1, Units: units}))
}

func (w *world) machine(id string) {
	w.t.Helper()
	w.put("machines/"+id, registry.Encode(registry.Machine{V: 1, ID: id, Node: "node-" + id, Address: "10.0.0.1", Units: true,
		Metadata: map[string]string{"zone": "a"}, Memory: 1 << 30, CPU: 4000, Version: "1.2.3", BootID: "b" + id}))
}

func hashOf(t testing.TB, content string) string {
	t.Helper()
	f := fileOf("x.service", content)
	if f.err != nil {
		t.Fatal(f.err)
	}
	return f.hash
}

// together runs f n times at once.
func together(n int, f func(i int)) {
	var group sync.WaitGroup
	for i := range n {
		group.Go(func() { f(i) })
	}
	group.Wait()
}

func fleetBody(command, desired string) string {
	return fmt.Sprintf(`{"options":[{"section":"Service","name":"ExecStart","value":%q}],"desiredState":%q}`, command, desired)
}
