// Package apitest gives tests of the node's API a store with a feed of its records,
// and a way to ask over a real socket.
package apitest

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"flotilla/internal/state"
	"flotilla/internal/store"
	"flotilla/internal/unit"
)

// World is a store and the state that is read from it.
type World struct {
	testing.TB
	Store *store.Client
	State *state.Feed
	URL   string // of what Serve serves
}

// New returns a World of the records below a prefix of the store at endpoint.
func New(t testing.TB, endpoint, prefix string) *World {
	t.Helper()
	log := slog.New(slog.DiscardHandler)
	client, err := store.Open(store.Config{Endpoints: []string{endpoint}, Logger: log})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = client.Close() })
	w := &World{TB: t, Store: client, State: state.NewFeed(client, state.Keys{Prefix: prefix}, log)}
	ctx, stop := context.WithCancel(context.Background())
	ended := make(chan error)
	go func() { ended <- w.State.Run(ctx) }()
	t.Cleanup(func() {
		stop()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
	return w
}

// Serve has the requests of the World answered by h.
func (w *World) Serve(h http.Handler) {
	server := httptest.NewServer(h)
	w.Cleanup(server.Close)
	w.URL = server.URL
}

// Put writes a key below the prefix and returns the revision.
func (w *World) Put(key, value string) int64 {
	w.Helper()
	return w.Apply(store.Put(w.State.Keys.Prefix+key, value))
}

// Delete deletes a key below the prefix.
func (w *World) Delete(key string) { w.Helper(); w.Apply(store.Delete(w.State.Keys.Prefix + key)) }

// Apply writes to the store.
func (w *World) Apply(ops ...store.Op) int64 {
	w.Helper()
	revision, err := w.Store.Apply(w.Context(), ops)
	if err != nil {
		w.Fatal(err)
	}
	return revision
}

// Known returns the present state.
func (w *World) Known() *state.Snapshot {
	w.Helper()
	known, err := w.State.Full(w.Context())
	if err != nil {
		w.Fatal(err)
	}
	return known
}

// Stored returns the record of a unit.
func (w *World) Stored(name string) (r state.UnitRecord, found bool) {
	w.Helper()
	if u := w.Known().Units[name]; u != nil {
		return u.Record.Value, u.Record.Exists()
	}
	return r, false
}

// Unit writes the record of a unit.
func (w *World) Unit(name, text string, desired unit.Desired) {
	w.Helper()
	w.Put("cluster/units/"+name, state.Encode(state.UnitRecord{V: 1, Text: text, Desired: desired}))
}

// Node has a node in the store that runs units and routes.
func (w *World) Node(id string) {
	w.Helper()
	w.Put("cluster/nodes/"+id, state.Encode(state.NodeRecord{V: 1, ID: id, Name: "node-" + id, Address: "10.0.0.1", Units: true, Routes: true,
		Metadata: map[string]string{"zone": "a"}, Memory: 1 << 30, CPU: 4000, Version: "1.2.3", BootID: "b" + id}))
}

// Router reports that a node's router has applied a revision.
func (w *World) Router(id string, report state.RouterReport) {
	w.Helper()
	report.V = 1
	w.Put("reports/router/"+id, state.Encode(report))
}

// Place gives a unit a place, as the engine does.
func (w *World) Place(name, node string) {
	w.Helper()
	w.Put("cluster/placements/"+name, state.Encode(state.Placement{V: 1, Node: node, Epoch: 1, Reason: "the fewest units"}))
}

// Report reports what a node has, whole.
func (w *World) Report(node string, units map[string]state.UnitState) {
	w.Helper()
	w.Put("reports/units/"+node, state.Encode(state.UnitsReport{V: 1, Units: units}))
}

// Reply is an answer as it came over the wire.
type Reply struct {
	Status int
	Header http.Header
	Body   string
}

// Do sends a request.
func (w *World) Do(method, path string, header http.Header, body string) Reply {
	w.Helper()
	r, err := w.Send(method, path, header, body)
	if err != nil {
		w.Fatal(err)
	}
	return r
}

// Send is Do for goroutines.
func (w *World) Send(method, path string, header http.Header, body string) (Reply, error) {
	resp, err := w.Open(method, path, header, body)
	if err != nil {
		return Reply{}, err
	}
	raw, err := io.ReadAll(resp.Body)
	return Reply{resp.StatusCode, resp.Header, string(raw)}, err
}

// Open sends a request and returns the answer while it comes.
func (w *World) Open(method, path string, header http.Header, body string) (*http.Response, error) {
	var in io.Reader
	if body != "" {
		in = strings.NewReader(body)
	}
	req, err := http.NewRequest(method, w.URL+path, in)
	if err != nil {
		return nil, err
	}
	for key, values := range header {
		req.Header[key] = values
	}
	return http.DefaultTransport.RoundTrip(req)
}

// JSON sends in as JSON unless it is nil and decodes the answer, which must have
// that status, strictly into out unless that is nil.
func (w *World) JSON(method, path string, in any, status int, out any) {
	w.Helper()
	body := ""
	if in != nil {
		raw, err := json.Marshal(in)
		if err != nil {
			w.Fatal(err)
		}
		body = string(raw)
	}
	r := w.Do(method, path, nil, body)
	if r.Status != status {
		w.Fatalf("%s %s: %d %s, want %d", method, path, r.Status, r.Body, status)
	}
	if out == nil {
		return
	}
	dec := json.NewDecoder(strings.NewReader(r.Body))
	dec.DisallowUnknownFields()
	if err := dec.Decode(out); err != nil {
		w.Fatalf("%s %s: %v in %s", method, path, err, r.Body)
	}
}

// Text is a unit file.
func Text(command string) string { return "[Service]\nExecStart=" + command + "\n" }

// Hash returns the hash of a unit file.
func Hash(t testing.TB, text string) string {
	t.Helper()
	f, err := unit.Parse(text)
	if err != nil {
		t.Fatal(err)
	}
	return f.Hash().String()
}

// Together runs f n times at once.
func Together(n int, f func(i int)) {
	var group sync.WaitGroup
	for i := range n {
		group.Go(func() { f(i) })
	}
	group.Wait()
}

// Populate fills the store with running units, as after so many starts.
func (w *World) Populate(units, nodes int) {
	w.Helper()
	reports := make([]map[string]state.UnitState, nodes)
	for n := range nodes {
		reports[n] = map[string]state.UnitState{}
		w.Node(fmt.Sprintf("m%d", n))
	}
	content := "[Unit]\nDescription=A unit as people write them, with a description\nAfter=network-online.target\n\n[Service]\nEnvironment=A=1 B=2\n" +
		"ExecStartPre=-/usr/bin/docker kill %p-%i\nExecStart=/usr/bin/docker run --name %p-%i example/web\nExecStop=/usr/bin/docker stop %p-%i\nRestart=always\nRestartSec=2\n\n" +
		"[X-Fleet]\nConflicts=web@%i.service\nMachineMetadata=zone=a\n"
	hash := Hash(w, content)
	for i := range units {
		name, n := fmt.Sprintf("unit@%d.service", i), i%nodes
		w.Apply(store.Put(w.State.Keys.Unit(name), state.Encode(state.UnitRecord{V: 1, Text: content, Desired: unit.Launched})),
			store.Put(w.State.Keys.Placement(name), state.Encode(state.Placement{V: 1, Node: fmt.Sprintf("m%d", n), Generation: 7, Epoch: 8, Approved: hash, Reason: "it has the fewest units (7)"})))
		reports[n][name] = state.UnitState{Hash: hash, Epoch: 8, Load: "loaded", Active: "active", Sub: "running", Launched: true}
	}
	for n, report := range reports {
		w.Report(fmt.Sprintf("m%d", n), report)
	}
}

// CPU runs a benchmark and reports the CPU time of this process, store and client
// included, which a busy machine does not change.
func CPU(b *testing.B, name string, once func(b *testing.B)) {
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
