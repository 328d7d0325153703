package api

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"flotilla/internal/api/apitest"
	"flotilla/internal/catalog"
	"flotilla/internal/client"
	"flotilla/internal/state"
	"flotilla/internal/store"
	"flotilla/internal/store/storetest"
	"flotilla/internal/wire"
)

// fixedRouter answers with what the test wants.
type fixedRouter struct {
	mu     sync.Mutex // guards status
	status wire.RouterStatus
	stats  []wire.ServiceCounters
}

func (r *fixedRouter) Status() wire.RouterStatus {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.status
}
func (r *fixedRouter) Stats(context.Context) ([]wire.ServiceCounters, error) { return r.stats, nil }

// world is a server with a real store and a catalog that follows it on demand.
type world struct {
	*Server
	*apitest.World
	router *fixedRouter
	status wire.StoreStatus
}

func newWorld(t testing.TB) *world { return newWorldAt(t, storetest.Start(t)) }

func newWorldAt(t testing.TB, endpoint string) *world {
	t.Helper()
	dir, err := os.MkdirTemp("", "api")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	w := &world{World: apitest.New(t, endpoint, "/flotilla/"), router: &fixedRouter{status: wire.RouterStatus{Serving: true, Applied: 1, Version: "2.6.12"}},
		status: wire.StoreStatus{Live: true, Source: wire.SourceLive, Confirmed: time.Now()}}
	w.Server = New(Config{
		Node: "node-m1", ID: "m1", Version: "test", Address: "10.0.0.11", Domain: "local", Started: time.Now(), Ports: Ports{HTTP: 80, HTTPS: 8443},
		Socket: filepath.Join(dir, "run", "node.sock"), OpsSocket: "@flotilla-test" + dir,
		Catalog: catalog.NewFeed(), State: w.World.State, Store: w.World.Store, Router: w.router, DNS: func() wire.DNSStats { return wire.DNSStats{Local: 5} },
		StoreStatus: func() wire.StoreStatus { return w.status }, Problems: func() int { return 0 },
		Log: slog.New(slog.DiscardHandler),
	})
	w.Serve(w.Handler())
	w.follow()
	return w
}

// run serves the sockets.
func (w *world) run() {
	w.Helper()
	ctx, stop := context.WithCancel(w.Context())
	ended := make(chan error, 1)
	go func() { ended <- w.Run(ctx) }()
	w.Cleanup(func() {
		stop()
		if err := <-ended; err != nil {
			w.Error(err)
		}
	})
	storetest.Wait(w.TB, 10*time.Second, "the sockets", func() bool {
		_, _, err := client.Dial(w.OpsSocket).Ops(w.Context(), "/healthz")
		return err == nil
	})
}

// follow loads the catalog from the store.
func (w *world) follow() {
	w.Helper()
	items, revision, err := w.World.Store.List(w.Context(), catalog.Prefix)
	if err != nil {
		w.Fatal(err)
	}
	batch := catalog.Batch{Revision: revision, Reset: true, Now: time.Now()}
	for _, kv := range items {
		batch.Keys = append(batch.Keys, catalog.KeyValue{Key: kv.Key, Value: kv.Value, CreateRevision: kv.CreateRevision, ModRevision: kv.ModRevision})
	}
	w.Catalog.Publish(catalog.NewBuilder(w.Policy).Apply(batch))
}

func (w *world) key(key, value string) int64 { w.Helper(); return w.Apply(store.Put(key, value)) }

// report has a node whose router has applied a revision.
func (w *world) report(name string, applied int64) {
	w.Helper()
	w.Node(name)
	w.Router(name, state.RouterReport{Applied: applied, Serving: true})
}

// set changes a service.
func (w *world) set(service string, change wire.ServiceChange) (out wire.Written, err error) {
	err = w.ask("PUT", "/v1/services/"+service, change, &out)
	return out, err
}

// ask sends a request and returns the error that the answer is.
func (w *world) ask(method, path string, in, out any) error {
	body := ""
	if in != nil {
		raw, err := json.Marshal(in)
		if err != nil {
			return err
		}
		body = string(raw)
	}
	r, err := w.Send(method, path, nil, body)
	if err != nil {
		return err
	}
	if r.Status != http.StatusOK {
		var e struct{ Error wire.Error }
		if err := json.Unmarshal([]byte(r.Body), &e); err != nil {
			return err
		}
		if e.Error.Code.Status() != r.Status {
			return fmt.Errorf("status %d with code %s", r.Status, e.Error.Code)
		}
		return &e.Error
	}
	if out == nil {
		return nil
	}
	return json.Unmarshal([]byte(r.Body), out)
}

func wantCode(t testing.TB, err error, code wire.Code, text string) wire.Error {
	t.Helper()
	var e *wire.Error
	if !errors.As(err, &e) || e.Code != code || !strings.Contains(e.Message, text) {
		t.Errorf("error %+v, want %s with %q", err, code, text)
		return wire.Error{}
	}
	return *e
}

func TestServiceLifeCycle(t *testing.T) {
	w := newWorld(t)
	scheme := "http"
	first, err := w.set("web", wire.ServiceChange{Scheme: &scheme, AddEndpoints: []string{"10.0.0.1:80"}, AddDomains: []string{"www.example.com"}})
	if err != nil || !first.Changed || first.Revision < 2 {
		t.Fatalf("set: %+v, error %v", first, err)
	}
	again, err := w.set("web", wire.ServiceChange{Scheme: &scheme})
	if err != nil || again.Changed || again.Revision != first.Revision {
		t.Errorf("set the same again: %+v, error %v", again, err)
	}
	_, err = w.set("web", wire.ServiceChange{AddEndpoints: []string{"10.0.0.2:http"}})
	wantCode(t, err, wire.CodeInvalid, "10.0.0.2:http")
	w.key("/services/web/hosts/2", "nonsense")
	w.key("/services/web/note", "by hand")
	w.report("n1", 2)
	w.report("n2", 99)
	w.follow()
	w.router.stats = []wire.ServiceCounters{{Service: "web", Requests: wire.Answers{0, 0, 12, 0, 1, 0}, Connections: 13}}

	var list []wire.ServiceSummary
	err = w.ask("GET", "/v1/services", nil, &list)
	if err != nil || len(list) != 1 || list[0].Problems != 1 || list[0].Endpoints != 1 {
		t.Errorf("services: %+v, error %v", list, err)
	}
	var e wire.ServiceExplanation
	if err := w.ask("GET", "/v1/services/web", nil, &e); err != nil {
		t.Fatal(err)
	}
	routes := ""
	for _, r := range e.Routes {
		routes += r.Kind + " " + r.To + "\n"
	}
	if want := "host http://web.local/\npath http://10.0.0.11/web\ndomain http://www.example.com/\ndns web.local\ndns _web._tcp.local\n"; routes != want {
		t.Errorf("routes:\n%swant:\n%s", routes, want)
	}
	if len(e.Keys) != 5 || len(e.Problem) != 1 || e.Problem[0].Remedy == "" || e.Counters == nil || e.Counters.Requests[2] != 12 {
		t.Errorf("explanation %+v", e)
	}
	if len(e.Nodes) != 2 || e.Nodes[0].Reached || !e.Nodes[1].Reached {
		t.Errorf("nodes %+v", e.Nodes)
	}
	var problems []catalog.Problem
	err = w.ask("GET", "/v1/problems", nil, &problems)
	if err != nil || len(problems) != 1 || problems[0].Key != "/services/web/hosts/2" {
		t.Errorf("problems %+v, error %v", problems, err)
	}
	if err := w.ask("DELETE", "/v1/services/web", nil, nil); err != nil {
		t.Error(err)
	}
	w.follow()
	wantCode(t, w.ask("DELETE", "/v1/services/web", nil, nil), wire.CodeNotFound, `there is no service "web"`)
	wantCode(t, w.ask("GET", "/v1/services/a%2Fb", nil, nil), wire.CodeNotFound, "there is no service")
}

// Writers that change one service at the same time lose nothing.
func TestConcurrentChanges(t *testing.T) {
	w := newWorld(t)
	scheme := "http"
	if _, err := w.set("web", wire.ServiceChange{Scheme: &scheme}); err != nil {
		t.Fatal(err)
	}
	var g sync.WaitGroup
	for i := range 4 {
		g.Go(func() {
			change := wire.ServiceChange{AddEndpoints: []string{fmt.Sprintf("10.0.0.%d:80", i+1)}}
			for {
				_, err := w.set("web", change)
				var e *wire.Error
				if errors.As(err, &e) && e.Code == wire.CodeConflict {
					continue
				}
				if err != nil {
					t.Error(err)
				}
				return
			}
		})
	}
	g.Wait()
	w.follow()
	if n := len(w.Catalog.Latest().Service("web").Endpoints); n != 4 {
		t.Errorf("%d endpoints, want 4", n)
	}
}

// A node that refuses one service holds up those who wait for that one, and nobody
// else.
func TestWaitForARefusedService(t *testing.T) {
	w := newWorld(t)
	w.Node("n1")
	w.Router("n1", state.RouterReport{Applied: 1 << 40, Serving: true, Refused: map[string]int64{"web": 1}})
	scheme := "http"
	change := wire.ServiceChange{Scheme: &scheme, AddEndpoints: []string{"10.0.0.1:80"}}
	wantCode(t, w.ask("PUT", "/v1/services/web?wait=200ms", change, nil), wire.CodeNotConverged, "node-n1 refuses service web")
	wantCode(t, w.ask("GET", "/v1/wait?revision=5&service=web&timeout=200ms", nil, nil), wire.CodeNotConverged, "node-n1 refuses service web")
	if err := w.ask("PUT", "/v1/services/api?wait=10s", change, nil); err != nil {
		t.Errorf("another service: %v", err)
	}
}

func TestWait(t *testing.T) {
	w := newWorld(t)
	w.report("n1", 50)
	w.report("n2", 10)
	e := wantCode(t, w.ask("GET", "/v1/wait?revision=50&timeout=200ms", nil, nil), wire.CodeNotConverged, "node-n2 is at 10")
	if len(e.Applied) != 2 || !e.Applied[0].Reached || e.Applied[1].Reached {
		t.Errorf("applied %+v", e.Applied)
	}
	for name, then := range map[string]func(){
		"the laggard catches up": func() { w.report("n2", 51) },
		"the laggard is gone": func() {
			w.Delete("cluster/nodes/n2")
			w.Delete("reports/router/n2")
		},
		"the laggard refuses another service": func() {
			w.Router("n2", state.RouterReport{Applied: 60, Refused: map[string]int64{"web": 40, "db": 60}})
		},
	} {
		w.report("n2", 10)
		done := make(chan error, 1)
		go func() { done <- w.ask("GET", "/v1/wait?revision=50&timeout=20s", nil, nil) }()
		select {
		case err := <-done:
			t.Fatalf("%s: it did not wait: %v", name, err)
		case <-time.After(50 * time.Millisecond): // long enough to be waiting in most runs
		}
		then()
		if err := <-done; err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	w.Node("n2")
	w.Router("n2", state.RouterReport{Applied: 60, Refused: map[string]int64{"web": 50}})
	wantCode(t, w.ask("GET", "/v1/wait?revision=50&timeout=200ms", nil, nil), wire.CodeNotConverged, "node-n2 refuses service web")
	for _, query := range []string{"", "revision=x", "revision=0", "revision=5&timeout=x", "revision=5&timeout=2h"} {
		wantCode(t, w.ask("GET", "/v1/wait?"+query, nil, nil), wire.CodeBadRequest, "")
	}
}

func TestErrorsAreJSON(t *testing.T) {
	w := newWorld(t)
	for _, test := range []struct {
		method, path, body string
		status             int
		code               wire.Code
	}{
		{http.MethodGet, "/v1/nothing", "", 404, wire.CodeNotFound},
		{http.MethodPatch, "/v1/services/web", "", 405, wire.CodeNotAllowed},
		{http.MethodPut, "/v1/services/web", "{", 400, wire.CodeBadRequest},
		{http.MethodPut, "/v1/services/web", `{"shceme":"http"}`, 400, wire.CodeBadRequest},
		{http.MethodPut, "/v1/services/web", `{} {}`, 400, wire.CodeBadRequest},
		{http.MethodPut, "/v1/services/web?wait=x", `{}`, 400, wire.CodeBadRequest},
		{http.MethodPut, "/v1/services/a%2Fb", `{"scheme":"http"}`, 422, wire.CodeInvalid},
		{http.MethodPost, "/v1/confirm", "", 409, wire.CodeConflict},
	} {
		a := httptest.NewRecorder()
		w.Handler().ServeHTTP(a, httptest.NewRequest(test.method, test.path, strings.NewReader(test.body)))
		var body struct{ Error wire.Error }
		if err := json.Unmarshal(a.Body.Bytes(), &body); err != nil || a.Code != test.status || body.Error.Code != test.code || body.Error.Message == "" {
			t.Errorf("%s %s: %d %s", test.method, test.path, a.Code, a.Body)
		}
	}
}

func TestNodes(t *testing.T) {
	w := newWorld(t)
	w.report("m1", 5)
	w.Put("cluster/nodes/n2", "not JSON")
	var n wire.Nodes
	err := w.ask("GET", "/v1/nodes", nil, &n)
	if err != nil || len(n.Nodes) != 2 || n.Nodes[0].ID != "n2" || !n.Nodes[1].Here || n.Nodes[1].Applied != 5 || !n.Nodes[1].Serving || !n.Store.Quorum {
		t.Errorf("nodes %+v, error %v", n, err)
	}
}

func TestRemoveMember(t *testing.T) {
	w := newWorld(t)
	wantCode(t, w.ask("DELETE", "/v1/store/members/n9-abc", nil, nil), wire.CodeNotFound, "has no such member")
	var n wire.Nodes
	if err := w.ask("GET", "/v1/nodes", nil, &n); err != nil || len(n.Store.Members) != 1 {
		t.Fatalf("%+v, %v", n.Store, err)
	}
	// The only member cannot go.
	wantCode(t, w.ask("DELETE", "/v1/store/members/"+n.Store.Members[0].ID, nil, nil), wire.CodeConflict, "does not change its members")
}

func TestConfirm(t *testing.T) {
	w := newWorld(t)
	b := catalog.NewBuilder(catalog.Policy{})
	batch := catalog.Batch{Revision: 40, Reset: true, Now: time.Now()}
	for i := range 12 {
		key := fmt.Sprintf("/services/s%02d/", i)
		batch.Keys = append(batch.Keys, catalog.KeyValue{Key: key + "hosts/1", Value: fmt.Sprintf("10.0.0.%d:80", i+1)}, catalog.KeyValue{Key: key + "scheme", Value: "http"})
	}
	b.Apply(batch)
	w.Catalog.Publish(b.Apply(catalog.Batch{Revision: 41, Reset: true, Now: batch.Now}))
	if w.Catalog.Latest().Held == nil {
		t.Fatal("nothing is held")
	}
	if err := w.ask("POST", "/v1/confirm", nil, nil); err != nil {
		t.Fatal(err)
	}
	if kv, _, err := w.Store.Get(t.Context(), "/flotilla/confirmed"); err != nil || kv.Value != "41" {
		t.Errorf("it is %q, error %v", kv.Value, err)
	}
	// A store with another content is accepted on this node alone.
	accepted := false
	w.status.Held = true
	w.AcceptEpoch = func() { accepted = true }
	if err := w.ask("POST", "/v1/confirm", nil, nil); err != nil || !accepted {
		t.Errorf("accepted %t, error %v", accepted, err)
	}
}

func TestOps(t *testing.T) {
	w := newWorld(t)
	w.run()
	ops := client.Dial(w.OpsSocket)
	check := func(path string, want bool, text string) {
		t.Helper()
		got, ok, err := ops.Ops(t.Context(), path)
		if err != nil || ok != want || !strings.Contains(got, text) {
			t.Errorf("%s: %t %q, error %v", path, ok, got, err)
		}
	}
	check("/healthz", true, "ok")
	check("/readyz", true, "ok")
	check("/freshz", true, "ok")
	w.status.Live, w.status.Err = false, "no member answers"
	check("/readyz", true, "ok")
	check("/freshz", false, "no member answers")
	w.router.mu.Lock()
	w.router.status.Serving = false
	w.router.mu.Unlock()
	check("/readyz", false, "HAProxy")
	check("/v1/status", false, "404")
	w.router.stats = []wire.ServiceCounters{{Service: "web", Requests: wire.Answers{0, 0, 3}, ResponseMS: 2}}
	w.Propagated(3 * time.Millisecond)
	for _, want := range []string{
		`flotilla_service_requests_total{code="2xx",service="web"} 3`, `flotilla_service_response_seconds{service="web"} 0.002`,
		"flotilla_propagation_seconds_count 1", `flotilla_dns_queries_total{answered="local"} 5`, "flotilla_problems 0",
		"flotilla_applied_revision 1", "flotilla_store_live 0", "go_goroutines", "process_open_fds",
	} {
		check("/metrics", true, want)
	}
}

func TestSockets(t *testing.T) {
	w := newWorld(t)
	w.run()
	if st, err := client.Get[wire.Status](t.Context(), client.Dial(w.Socket), "/v1/status", nil); err != nil || st.Name != "node-m1" || st.Router == nil || !st.Router.Serving {
		t.Errorf("%+v, %v", st, err)
	}
	for path, mode := range map[string]os.FileMode{w.Socket: 0o660, filepath.Dir(w.Socket): 0o750} {
		if info, err := os.Stat(path); err != nil || info.Mode().Perm() != mode {
			t.Errorf("%s: mode %v, want %v, error %v", path, info.Mode().Perm(), mode, err)
		}
	}
	if _, err := Listen(w.Socket); err == nil || !strings.Contains(err.Error(), "another node serves on it") {
		t.Errorf("a socket in use: error %v", err)
	}
	old := filepath.Join(filepath.Dir(w.Socket), "old.sock")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: old})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	_, err = client.Get[wire.Status](t.Context(), client.Dial(old), "/v1/status", nil)
	wantCode(t, err, client.CodeNoNode, "no node answers on "+old)
	fresh, err := Listen(old)
	if err != nil {
		t.Fatalf("a socket that was left behind: %v", err)
	}
	if err := fresh.Close(); err != nil {
		t.Error(err)
	}
	_, err = client.Get[wire.Status](t.Context(), client.Dial(filepath.Join(t.TempDir(), "none")), "/v1/status", nil)
	if e := wantCode(t, err, client.CodeNoNode, "no node answers"); !strings.Contains(e.Hint, "--socket") {
		t.Errorf("hint %q", e.Hint)
	}
}

// Without the store reads go on and writes say what is wrong.
func TestStoreAway(t *testing.T) {
	proxy := storetest.NewProxy(t, storetest.Start(t))
	w := newWorldAt(t, proxy.Endpoint())
	w.report("m1", 5)
	w.Known()
	proxy.Cut()
	scheme := "http"
	for name, check := range map[string]func(t *testing.T){
		"reads": func(t *testing.T) {
			for _, path := range []string{"services", "status", "problems"} {
				if err := w.ask("GET", "/v1/"+path, nil, nil); err != nil {
					t.Errorf("%s: %v", path, err)
				}
			}
		},
		"services": func(t *testing.T) {
			_, err := w.set("web", wire.ServiceChange{Scheme: &scheme})
			wantCode(t, err, wire.CodeStoreUnavailable, "store")
		},
		"units": func(t *testing.T) {
			wantCode(t, w.ask("GET", "/v1/units/a.service", nil, nil), wire.CodeStoreUnavailable, "store")
		},
		"changes": func(t *testing.T) {
			err := w.ask("POST", "/v1/units/change", wire.Changes{Names: []string{"a.service"}, Destroy: true}, nil)
			wantCode(t, err, wire.CodeStoreUnavailable, "store")
		},
		"nodes": func(t *testing.T) {
			var n wire.Nodes
			if err := w.ask("GET", "/v1/nodes", nil, &n); err != nil || n.Store.Quorum || !n.Stale || len(n.Nodes) != 1 || n.Nodes[0].Applied != 5 {
				t.Errorf("nodes %+v, error %v", n, err)
			}
		},
	} {
		t.Run(name, func(t *testing.T) { t.Parallel(); check(t) })
	}
}

// A node that routes no services says so, and answers all else.
func TestUnitsOnly(t *testing.T) {
	w := newWorld(t)
	w.Server.Catalog, w.Server.Router, w.Server.DNS, w.OpsSocket = nil, nil, nil, ""
	w.report("m1", 5)
	var st wire.Status
	if err := w.ask("GET", "/v1/status", nil, &st); err != nil || st.ID != "m1" || st.Router != nil || st.DNS != nil {
		t.Errorf("%+v, %v", st, err)
	}
	var n wire.Nodes
	if err := w.ask("GET", "/v1/nodes", nil, &n); err != nil || len(n.Nodes) != 1 {
		t.Errorf("%+v, %v", n, err)
	}
	wantCode(t, w.ask("GET", "/v1/services", nil, nil), wire.CodeNotFound, "routes no services")
	if r := w.Do("GET", "/metrics", nil, ""); r.Status != 200 || !strings.Contains(r.Body, "flotilla_node_info") {
		t.Errorf("%d %s", r.Status, r.Body)
	}
}

// Each route is there once, with a line for the reference.
func TestRoutes(t *testing.T) {
	seen := map[string]bool{}
	for _, r := range Routes() {
		key := r.Method + " " + r.Path
		if seen[key] || r.Doc == "" {
			t.Errorf("%s: twice, or without a line", key)
		}
		seen[key] = true
	}
}
