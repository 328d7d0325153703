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

	"flotilla/internal/catalog"
	"flotilla/internal/client"
	"flotilla/internal/dns"
	"flotilla/internal/router"
	"flotilla/internal/store"
	"flotilla/internal/store/storetest"
)

// fixedRouter answers with what the test wants.
type fixedRouter struct {
	mu     sync.Mutex // guards status
	status router.Status
	stats  []router.ServiceStats
}

func (r *fixedRouter) Status() router.Status {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.status
}
func (r *fixedRouter) Applied() (int64, <-chan struct{}) { return r.Status().Applied, nil }
func (r *fixedRouter) SetDraining(draining bool) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.status.Draining = draining
	return nil
}
func (r *fixedRouter) Stats(context.Context) ([]router.ServiceStats, error) { return r.stats, nil }

// world is a server with a real store and a catalog that follows it on demand.
type world struct {
	*Server
	t      *testing.T
	router *fixedRouter
	state  client.StoreState
	client *client.Client
}

func newWorld(t *testing.T) *world {
	t.Helper()
	etcd, err := store.Open(store.Config{Endpoints: []string{storetest.Start(t)}, Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = etcd.Close() })
	dir, err := os.MkdirTemp("", "api")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	w := &world{t: t, router: &fixedRouter{status: router.Status{Serving: true, Applied: 1, Version: "2.6.12"}},
		state: client.StoreState{Live: true, Source: client.SourceLive, Confirmed: time.Now()}}
	w.Server = New(Config{
		Node: "n1", Version: "test", Address: "10.0.0.11", Domain: "local", Started: time.Now(), Ports: Ports{HTTP: 80, HTTPS: 8443},
		Socket: filepath.Join(dir, "run", "node.sock"), OpsSocket: "@flotilla-test" + dir,
		Feed: catalog.NewFeed(), Store: etcd, Router: w.router, DNS: func() dns.Stats { return dns.Stats{Local: 5} },
		StoreState: func() client.StoreState { return w.state }, Problems: func() int { return len(w.problems()) },
		Log: slog.New(slog.DiscardHandler),
	})
	ctx, stop := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- w.Run(ctx) }()
	t.Cleanup(func() {
		stop()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
	w.client = client.Dial(w.Socket)
	storetest.Wait(t, 10*time.Second, "the sockets", func() bool { _, _, err := client.Dial(w.OpsSocket).Ops(t.Context(), "/healthz"); return err == nil })
	w.follow()
	return w
}

// follow loads the catalog from the store.
func (w *world) follow() {
	w.t.Helper()
	items, revision, err := w.Store.List(w.t.Context(), catalog.Prefix)
	if err != nil {
		w.t.Fatal(err)
	}
	batch := catalog.Batch{Revision: revision, Reset: true, Now: time.Now()}
	for _, kv := range items {
		batch.Keys = append(batch.Keys, catalog.KeyValue{Key: kv.Key, Value: kv.Value, CreateRevision: kv.CreateRevision, ModRevision: kv.ModRevision})
	}
	w.Feed.Publish(catalog.NewBuilder(w.Policy).Apply(batch))
}

func (w *world) put(key, value string) int64 {
	w.t.Helper()
	revision, err := w.Store.Apply(w.t.Context(), []store.Op{store.Put(key, value)})
	if err != nil {
		w.t.Fatal(err)
	}
	return revision
}

func (w *world) report(name string, applied int64) {
	w.t.Helper()
	raw, err := json.Marshal(client.NodeRecord{V: 1, Name: name, Address: "10.0.0.1", Applied: applied, Serving: true})
	if err != nil {
		w.t.Fatal(err)
	}
	w.put(NodesPrefix+name, string(raw))
}

func wantCode(t *testing.T, err error, code client.Code, text string) client.Error {
	t.Helper()
	var e *client.Error
	if !errors.As(err, &e) || e.Code != code || !strings.Contains(e.Message, text) {
		t.Errorf("error %+v, want %s with %q", err, code, text)
		return client.Error{}
	}
	return *e
}

func TestServiceLifeCycle(t *testing.T) {
	w := newWorld(t)
	ctx := t.Context()
	scheme := "http"
	first, err := w.client.Set(ctx, "web", client.Change{Scheme: &scheme, AddEndpoints: []string{"10.0.0.1:80"}, AddDomains: []string{"www.example.com"}}, 0)
	if err != nil || !first.Changed || first.Revision < 2 {
		t.Fatalf("set: %+v, error %v", first, err)
	}
	again, err := w.client.Set(ctx, "web", client.Change{Scheme: &scheme}, 0)
	if err != nil || again.Changed || again.Revision != first.Revision {
		t.Errorf("set the same again: %+v, error %v", again, err)
	}
	_, err = w.client.Set(ctx, "web", client.Change{AddEndpoints: []string{"10.0.0.2:http"}}, 0)
	wantCode(t, err, client.CodeInvalid, "10.0.0.2:http")
	w.put("/services/web/hosts/2", "nonsense")
	w.put("/services/web/note", "by hand")
	w.report("n1", 2)
	w.report("n2", 99)
	w.follow()
	w.router.stats = []router.ServiceStats{{Service: "web", Requests: [6]uint64{0, 0, 12, 0, 1, 0}, Connections: 13}}

	list, err := w.client.Services(ctx)
	if err != nil || len(list) != 1 || list[0].Problems != 1 || list[0].Endpoints != 1 {
		t.Errorf("services: %+v, error %v", list, err)
	}
	e, err := w.client.Explain(ctx, "web")
	if err != nil {
		t.Fatal(err)
	}
	routes := ""
	for _, r := range e.Routes {
		routes += r.Kind + " " + r.To + "\n"
	}
	if want := "host http://web.local/\npath http://10.0.0.11/web\ndomain http://www.example.com/\ndns web.local\ndns _web._tcp.local\n"; routes != want {
		t.Errorf("routes:\n%swant:\n%s", routes, want)
	}
	if len(e.Keys) != 5 || len(e.Problem) != 1 || e.Problem[0].Remedy == "" || e.Counters == nil || e.Counters.Requests["2xx"] != 12 {
		t.Errorf("explanation %+v", e)
	}
	if len(e.Nodes) != 2 || e.Nodes[0].Reached || !e.Nodes[1].Reached {
		t.Errorf("nodes %+v", e.Nodes)
	}
	problems, err := w.client.Problems(ctx)
	if err != nil || len(problems) != 1 || problems[0].Key != "/services/web/hosts/2" {
		t.Errorf("problems %+v, error %v", problems, err)
	}
	if _, err := w.client.Remove(ctx, "web", 0); err != nil {
		t.Error(err)
	}
	w.follow()
	_, err = w.client.Remove(ctx, "web", 0)
	wantCode(t, err, client.CodeNotFound, `there is no service "web"`)
	_, err = w.client.Explain(ctx, "a/b")
	wantCode(t, err, client.CodeNotFound, "there is no service")
}

// Writers that change one service at the same time lose nothing.
func TestConcurrentChanges(t *testing.T) {
	w := newWorld(t)
	scheme := "http"
	if _, err := w.client.Set(t.Context(), "web", client.Change{Scheme: &scheme}, 0); err != nil {
		t.Fatal(err)
	}
	var g sync.WaitGroup
	for i := range 4 {
		g.Go(func() {
			change := client.Change{AddEndpoints: []string{fmt.Sprintf("10.0.0.%d:80", i+1)}}
			for {
				_, err := w.client.Set(t.Context(), "web", change, 0)
				var e *client.Error
				if errors.As(err, &e) && e.Code == client.CodeConflict {
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
	if n := len(w.Feed.Latest().Service("web").Endpoints); n != 4 {
		t.Errorf("%d endpoints, want 4", n)
	}
}

// A node that refuses one service holds up those who wait for that one, and nobody
// else.
func TestWaitForARefusedService(t *testing.T) {
	w := newWorld(t)
	raw, err := json.Marshal(client.NodeRecord{V: 1, Name: "n1", Applied: 1 << 40, Serving: true, Refused: map[string]int64{"web": 1}})
	if err != nil {
		t.Fatal(err)
	}
	w.put(NodesPrefix+"n1", string(raw))
	scheme := "http"
	change := client.Change{Scheme: &scheme, AddEndpoints: []string{"10.0.0.1:80"}}
	_, err = w.client.Set(t.Context(), "web", change, 200*time.Millisecond)
	wantCode(t, err, client.CodeNotConverged, "n1 refuses service web")
	if _, err := w.client.Set(t.Context(), "api", change, 10*time.Second); err != nil {
		t.Errorf("another service: %v", err)
	}
}

func TestWait(t *testing.T) {
	w := newWorld(t)
	w.report("n1", 50)
	w.report("n2", 10)
	_, err := w.client.Wait(t.Context(), 50, 200*time.Millisecond)
	e := wantCode(t, err, client.CodeNotConverged, "n2 is at 10")
	if len(e.Applied) != 2 || !e.Applied[0].Reached || e.Applied[1].Reached {
		t.Errorf("applied %+v", e.Applied)
	}
	for name, then := range map[string]func(){
		"the laggard catches up": func() { w.report("n2", 51) },
		"the laggard is gone": func() {
			if _, err := w.Store.Apply(t.Context(), []store.Op{store.Delete(NodesPrefix + "n2")}); err != nil {
				t.Error(err)
			}
		},
	} {
		w.report("n2", 10)
		done := make(chan error, 1)
		go func() {
			_, err := w.client.Wait(t.Context(), 50, 20*time.Second)
			done <- err
		}()
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
	for _, query := range []string{"", "revision=x", "revision=0", "revision=5&timeout=x", "revision=5&timeout=2h"} {
		r := httptest.NewRequest(http.MethodGet, "/v1/wait?"+query, nil)
		a := httptest.NewRecorder()
		w.Handler().ServeHTTP(a, r)
		if a.Code != http.StatusBadRequest || !strings.Contains(a.Body.String(), `"code": "bad_request"`) {
			t.Errorf("%q: %d %s", query, a.Code, a.Body)
		}
	}
}

func TestErrorsAreJSON(t *testing.T) {
	w := newWorld(t)
	for _, test := range []struct {
		method, path, body string
		status             int
		code               client.Code
	}{
		{http.MethodGet, "/v1/nothing", "", 404, client.CodeNotFound},
		{http.MethodPatch, "/v1/services/web", "", 405, client.CodeNotAllowed},
		{http.MethodPut, "/v1/services/web", "{", 400, client.CodeBadRequest},
		{http.MethodPut, "/v1/services/web", `{"shceme":"http"}`, 400, client.CodeBadRequest},
		{http.MethodPut, "/v1/services/web", `{} {}`, 400, client.CodeBadRequest},
		{http.MethodPut, "/v1/services/web?wait=x", `{}`, 400, client.CodeBadRequest},
		{http.MethodPut, "/v1/services/a%2Fb", `{"scheme":"http"}`, 422, client.CodeInvalid},
		{http.MethodPost, "/v1/confirm", "", 409, client.CodeConflict},
	} {
		a := httptest.NewRecorder()
		w.Handler().ServeHTTP(a, httptest.NewRequest(test.method, test.path, strings.NewReader(test.body)))
		var body struct{ Error client.Error }
		if err := json.Unmarshal(a.Body.Bytes(), &body); err != nil || a.Code != test.status || body.Error.Code != test.code || body.Error.Message == "" {
			t.Errorf("%s %s: %d %s", test.method, test.path, a.Code, a.Body)
		}
	}
}

func TestDrainAndNodes(t *testing.T) {
	w := newWorld(t)
	for _, draining := range []bool{true, false} {
		if err := w.client.Drain(t.Context(), draining); err != nil || w.router.Status().Draining != draining {
			t.Errorf("draining %t, error %v", w.router.Status().Draining, err)
		}
	}
	w.report("n1", 5)
	w.put(NodesPrefix+"n2", "not JSON")
	n, err := w.client.Nodes(t.Context())
	if err != nil || len(n.Nodes) != 2 || !n.Nodes[0].Self || n.Nodes[1].Name != "n2" || !n.Store.Quorum {
		t.Errorf("nodes %+v, error %v", n, err)
	}
}

func TestRemoveMember(t *testing.T) {
	w := newWorld(t)
	wantCode(t, w.client.RemoveMember(t.Context(), "n9-abc"), client.CodeNotFound, "has no such member")
	n, err := w.client.Nodes(t.Context())
	if err != nil || len(n.Store.Members) != 1 {
		t.Fatalf("%+v, %v", n.Store, err)
	}
	// The only member cannot go.
	wantCode(t, w.client.RemoveMember(t.Context(), n.Store.Members[0].ID), client.CodeConflict, "does not change its members")
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
	w.Feed.Publish(b.Apply(catalog.Batch{Revision: 41, Reset: true, Now: batch.Now}))
	if w.Feed.Latest().Held == nil {
		t.Fatal("nothing is held")
	}
	if _, err := w.client.Confirm(t.Context()); err != nil {
		t.Fatal(err)
	}
	if kv, _, err := w.Store.Get(t.Context(), ConfirmedKey); err != nil || kv.Value != "41" {
		t.Errorf("%s is %q, error %v", ConfirmedKey, kv.Value, err)
	}
	// A store with another content is accepted on this node alone.
	accepted := false
	w.state.Held = true
	w.AcceptEpoch = func() { accepted = true }
	if _, err := w.client.Confirm(t.Context()); err != nil || !accepted {
		t.Errorf("accepted %t, error %v", accepted, err)
	}
}

func TestOps(t *testing.T) {
	w := newWorld(t)
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
	w.state.Live, w.state.Err = false, "no member answers"
	check("/readyz", true, "ok")
	check("/freshz", false, "no member answers")
	w.router.mu.Lock()
	w.router.status.Serving = false
	w.router.mu.Unlock()
	check("/readyz", false, "HAProxy")
	check("/v1/status", false, "404")
	w.router.stats = []router.ServiceStats{{Service: "web", Requests: [6]uint64{0, 0, 3}, ResponseMillis: 2}}
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
	_, err = client.Dial(old).Status(t.Context())
	wantCode(t, err, client.CodeNoNode, "no node answers on "+old)
	fresh, err := Listen(old)
	if err != nil {
		t.Fatalf("a socket that was left behind: %v", err)
	}
	if err := fresh.Close(); err != nil {
		t.Error(err)
	}
	_, err = client.Dial(filepath.Join(t.TempDir(), "none")).Status(t.Context())
	if e := wantCode(t, err, client.CodeNoNode, "no node answers"); !strings.Contains(e.Hint, "--socket") {
		t.Errorf("hint %q", e.Hint)
	}
}

// Without the store reads go on and writes say what is wrong.
func TestStoreAway(t *testing.T) {
	w := newWorld(t)
	away, err := store.Open(store.Config{Endpoints: []string{"http://127.0.0.1:1"}, Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = away.Close() })
	w.Store = away
	if _, err := w.client.Services(t.Context()); err != nil {
		t.Error(err)
	}
	if _, err := w.client.Status(t.Context()); err != nil {
		t.Error(err)
	}
	scheme := "http"
	_, err = w.client.Set(t.Context(), "web", client.Change{Scheme: &scheme}, 0)
	wantCode(t, err, client.CodeUnavailable, "store")
	n, err := w.client.Nodes(t.Context())
	if err != nil || n.Store.Quorum {
		t.Errorf("nodes %+v, error %v", n, err)
	}
}
