package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"flotilla/internal/cli"
	"flotilla/internal/fleetapi"
	"flotilla/internal/registry"
	"flotilla/internal/store"
	"flotilla/internal/store/storetest"
	"flotilla/internal/unit"
)

// TestUnitScripts runs testdata/units/*.txtar against the API of units on a real
// store. Engine and machines are played: see stage. In a script $SOCKET is the
// API's socket, $URL its address over TCP, $M1 to $M3 are IDs of machines, and while
// there is a file $UNREGISTERED the answering node is not one of them.
func TestUnitScripts(t *testing.T) {
	endpoint := storetest.Start(t)
	testscript.Run(t, testscript.Params{
		Dir:                 filepath.Join("testdata", "units"),
		RequireExplicitExec: true,
		Setup:               func(env *testscript.Env) error { return setStage(env, endpoint) },
		Cmds: map[string]func(ts *testscript.TestScript, neg bool, args []string){
			"until": until, "exits": exits, "etcd": etcd,
		},
	})
}

// machineIDs are those of the played machines.
var machineIDs = []string{"a1b2c3d4a1b2c3d4a1b2c3d4a1b2c3d4", "b1b2c3d4a1b2c3d4a1b2c3d4a1b2c3d4", "b9b2c3d4a1b2c3d4a1b2c3d4a1b2c3d4"}

// stage plays the engine and three machines on a store: units are placed where
// there are fewest, and do what their text says: "slow" never gets beyond
// activating, "fail" fails, "once" ends.
type stage struct {
	store    *store.Client
	keys     registry.Keys
	restarts map[string]int64
}

func setStage(env *testscript.Env, endpoint string) error {
	dir, err := os.MkdirTemp("", "cli") // shorter than $WORK: it holds sockets
	if err != nil {
		return err
	}
	s, mux, err := newStage(dir, endpoint)
	if err != nil {
		return err
	}
	client := s.store
	socket := filepath.Join(dir, "node.sock")
	l, err := net.Listen("unix", socket)
	if err != nil {
		return err
	}
	server := httptest.NewUnstartedServer(mux)
	if err := server.Listener.Close(); err != nil {
		return err
	}
	server.Listener = l
	server.Start()
	tcp := httptest.NewServer(mux)

	for i, id := range machineIDs {
		env.Setenv(fmt.Sprintf("M%d", i+1), id)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		s.play(ctx)
	}()
	env.Defer(func() {
		cancel()
		<-ended
		server.Close()
		tcp.Close()
		_ = client.Close()
		_ = os.RemoveAll(dir)
	})
	for name, value := range map[string]string{
		"SOCKET": socket, "FLOTILLA_SOCKET": socket, "FLEETCTL_ENDPOINT": "unix://" + socket, "URL": tcp.URL,
		"ETCD": endpoint, "PREFIX": s.keys.Prefix, "UNREGISTERED": filepath.Join(dir, "unregistered"),
	} {
		env.Setenv(name, value)
	}
	return nil
}

// newStage returns a stage of its own on the store, and the API on it.
func newStage(dir, endpoint string) (*stage, *http.ServeMux, error) {
	client, err := store.Open(store.Config{Endpoints: []string{endpoint}, Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		return nil, nil, err
	}
	s := &stage{client, registry.Keys{Prefix: "/" + filepath.Base(dir) + "/"}, map[string]int64{}}
	for i, id := range machineIDs {
		m := registry.Machine{V: registry.Version, ID: id, Node: fmt.Sprintf("n%d", i+1), Address: fmt.Sprintf("10.0.0.%d", i+1),
			Units: true, Metadata: map[string]string{"zone": string(rune('a' + i))}}
		if _, err := client.Apply(context.Background(), []store.Op{store.Put(s.keys.Machine(id), registry.Encode(m))}); err != nil {
			return nil, nil, err
		}
	}
	h := fleetapi.New(fleetapi.Config{Store: client, Keys: s.keys, Self: func() string { return machineIDs[0] }, Version: "1.2.3", Log: slog.New(slog.DiscardHandler),
		Registered: func() bool { _, err := os.Stat(filepath.Join(dir, "unregistered")); return err != nil }})
	mux := http.NewServeMux()
	h.Register(mux)
	return s, mux, nil
}

// Five hundred units cost a handful of requests, not thousands.
func TestManyUnits(t *testing.T) {
	dir := t.TempDir()
	s, mux, err := newStage(dir, storetest.Start(t))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = s.store.Close() }()
	var posts, gets atomic.Int64
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodPost {
			posts.Add(1)
		} else {
			gets.Add(1)
		}
		mux.ServeHTTP(w, r)
	}))
	defer server.Close()
	ctx, cancel := context.WithCancel(t.Context())
	var playing sync.WaitGroup
	defer playing.Wait()
	defer cancel()
	playing.Go(func() { s.play(ctx) })
	if err := os.WriteFile(filepath.Join(dir, "web@.service"), []byte("[Service]\nExecStart=/bin/sleep 1000\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		verb  string
		posts int64
		lines int
	}{{"start", 1, 500}, {"start", 0, 500}, {"stop", 1, 500}, {"destroy", 1, 500}} {
		posts.Store(0)
		gets.Store(0)
		var out, errs strings.Builder
		began := time.Now()
		line := []string{"flotilla", tc.verb, "--endpoint", server.URL, filepath.Join(dir, "web@{1..500}")}
		if code := cli.Run(line, &out, &errs); code != cli.ExitDone {
			t.Fatalf("%s: exit code %d; %s", tc.verb, code, errs.String())
		}
		// Each poll is one GET, after a pause of at least 20 ms.
		most := 30 + int64(time.Since(began)/(20*time.Millisecond))
		if lines := strings.Count(out.String(), "\n"); posts.Load() != tc.posts || gets.Load() > most || lines != tc.lines {
			t.Errorf("%s: %d POSTs, %d GETs, %d lines, want %d, at most %d, %d", tc.verb, posts.Load(), gets.Load(), lines, tc.posts, most, tc.lines)
		}
	}
}

// etcd runs etcdctl on the store of the script.
func etcd(ts *testscript.TestScript, neg bool, args []string) {
	if neg {
		ts.Fatalf("etcd has no opposite")
	}
	ts.Check(ts.Exec("etcdctl", append([]string{"--endpoints", ts.Getenv("ETCD")}, args...)...))
}

func (s *stage) play(ctx context.Context) {
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		err := s.pass(ctx)
		if err != nil && ctx.Err() == nil && !errors.Is(err, store.ErrConflict) {
			panic(err) // the script cannot go on
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// pass makes the store as if engine and machines had done all there is to do.
func (s *stage) pass(ctx context.Context) error {
	k := s.keys
	lists, revision, err := s.store.ListMany(ctx, 0, k.Unit(""), k.Placement(""), k.Unplaced(""), k.States(""), k.Machine(""), k.Settings(""), k.Move(""))
	if err != nil {
		return err
	}
	units, placed := decoded[registry.Unit](k.Unit(""), lists[0]), decoded[registry.Placement](k.Placement(""), lists[1])
	unplaced, states := decoded[registry.Unplaced](k.Unplaced(""), lists[2]), decoded[registry.States](k.States(""), lists[3])
	machines, settings := decoded[registry.Machine](k.Machine(""), lists[4]), decoded[registry.Settings](k.Settings(""), lists[5])
	moves := decoded[registry.Move](k.Move(""), lists[6])
	load, next := map[string]int{}, map[string]map[string]registry.State{}
	for id := range machines {
		next[id] = map[string]registry.State{}
	}
	for _, p := range placed {
		load[p.Machine]++
	}
	var ops []store.Op
	for name := range placed {
		if u, ok := units[name]; !ok || u.Desired == registry.Inactive {
			ops = append(ops, store.Delete(k.Placement(name)))
			delete(placed, name)
		}
	}
	for _, name := range slices.Sorted(maps.Keys(units)) {
		u := units[name]
		f, err := unit.Parse(u.Text)
		if err != nil {
			continue
		}
		parts, _ := unit.SplitName(name)
		req, _ := f.Check(parts)
		if u.Desired == registry.Inactive {
			continue
		}
		if req.Global {
			for id := range machines {
				next[id][name] = s.state(f, u, id+name)
			}
			continue
		}
		p, ok := placed[name]
		to := p.Machine
		if m, asked := moves[name]; asked {
			to, ok = m.To, m.To == p.Machine
			ops = append(ops, store.Delete(k.Move(name)))
		}
		if ok && settings[p.Machine].Drain {
			to, ok = "", false
		}
		why := ""
		if to == "" {
			for _, id := range slices.Sorted(maps.Keys(machines)) {
				mismatch := req.Mismatch(id, machines[id].Metadata)
				switch {
				case mismatch != "":
					why = mismatch
				case settings[id].Cordon || settings[id].Drain:
					why = "it is cordoned"
				case to == "" || load[id] < load[to]:
					to = id
				}
			}
		}
		if to == "" {
			if unplaced[name].Reason == "" {
				ops = append(ops, store.Put(k.Unplaced(name), registry.Encode(registry.Unplaced{V: 1, Reason: fmt.Sprintf("%d machines: %s", len(machines), why)})))
			}
			continue
		}
		if !ok {
			load[to]++
			ops = append(ops, store.Put(k.Placement(name), registry.Encode(registry.Placement{V: 1, Machine: to, Generation: 1, Epoch: revision, Reason: "fewest units"})))
		}
		next[to][name] = s.state(f, u, name)
	}
	for name := range unplaced {
		if _, ok := units[name]; !ok {
			ops = append(ops, store.Delete(k.Unplaced(name)))
		}
	}
	for id := range machines {
		if !maps.Equal(states[id].Units, next[id]) {
			ops = append(ops, store.Put(k.States(id), registry.Encode(registry.States{V: 1, Units: next[id]})))
		}
	}
	for chunk := range slices.Chunk(ops, store.MaxOps) {
		if _, err := s.store.Apply(ctx, chunk); err != nil {
			return err
		}
	}
	return nil
}

func (s *stage) state(f *unit.File, u registry.Unit, key string) registry.State {
	st := registry.State{Hash: f.Hash().String(), Load: "loaded", Active: "inactive", Sub: "dead", Launched: u.Desired == registry.Launched, Restarts: u.Restarts}
	if !st.Launched {
		return st
	}
	switch text := u.Text; {
	case strings.Contains(text, "slow") && !strings.Contains(text, "slow-once"), strings.Contains(text, "slow-once") && s.restarts[key] < 10:
		st.Active, st.Sub = "activating", "start-pre"
		s.restarts[key]++
	case strings.Contains(text, "fail"):
		st.Active, st.Sub = "failed", "failed"
	case strings.Contains(text, "once"):
	default:
		st.Active, st.Sub = "active", "running"
	}
	return st
}

func decoded[R registry.Record](prefix string, items []store.KV) map[string]R {
	all := map[string]R{}
	for _, kv := range items {
		if r, err := registry.Decode[R](kv.Value); err == nil {
			all[strings.TrimPrefix(kv.Key, prefix)] = r
		}
	}
	return all
}
