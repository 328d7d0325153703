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

	"flotilla/internal/api"
	"flotilla/internal/cli"
	"flotilla/internal/fleetapi"
	"flotilla/internal/state"
	"flotilla/internal/store"
	"flotilla/internal/store/storetest"
	"flotilla/internal/unit"
	"flotilla/internal/wire"
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

// machineIDs are those of the played nodes.
var machineIDs = []string{"a1b2c3d4a1b2c3d4a1b2c3d4a1b2c3d4", "b1b2c3d4a1b2c3d4a1b2c3d4a1b2c3d4", "b9b2c3d4a1b2c3d4a1b2c3d4a1b2c3d4"}

// stage plays the engine and three nodes on a store: units are placed where
// there are fewest, and do what their text says: "slow" never gets beyond
// activating, "fail" fails, "once" ends.
type stage struct {
	store    *store.Client
	feed     *state.Feed // runs while play does
	keys     state.Keys
	restarts map[string]int64
}

func setStage(env *testscript.Env, endpoint string) error {
	dir, err := os.MkdirTemp("", "cli") // shorter than $WORK: it holds sockets
	if err != nil {
		return err
	}
	s, handler, err := newStage(dir, endpoint)
	if err != nil {
		return err
	}
	client := s.store
	socket := filepath.Join(dir, "node.sock")
	l, err := net.Listen("unix", socket)
	if err != nil {
		return err
	}
	server := httptest.NewUnstartedServer(handler)
	if err := server.Listener.Close(); err != nil {
		return err
	}
	server.Listener = l
	server.Start()
	tcp := httptest.NewServer(handler)

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
func newStage(dir, endpoint string) (*stage, http.Handler, error) {
	log := slog.New(slog.DiscardHandler)
	client, err := store.Open(store.Config{Endpoints: []string{endpoint}, Logger: log})
	if err != nil {
		return nil, nil, err
	}
	keys := state.Keys{Prefix: "/" + filepath.Base(dir) + "/"}
	s := &stage{client, state.NewFeed(client, keys, log), keys, map[string]int64{}}
	for i, id := range machineIDs {
		n := state.NodeRecord{V: state.Version, ID: id, Name: fmt.Sprintf("n%d", i+1), Address: fmt.Sprintf("10.0.0.%d", i+1),
			Units: true, Metadata: map[string]string{"zone": string(rune('a' + i))}}
		if _, err := client.Apply(context.Background(), []store.Op{store.Put(s.keys.Node(id), state.Encode(n))}); err != nil {
			return nil, nil, err
		}
	}
	server := api.New(api.Config{Node: "n1", ID: machineIDs[0], Version: "1.2.3", State: s.feed, Store: client, Log: log,
		StoreStatus: func() wire.StoreStatus { return wire.StoreStatus{Live: true} }})
	server.Fleet = fleetapi.New(fleetapi.Config{API: server, Log: log,
		Registered: func() bool { _, err := os.Stat(filepath.Join(dir, "unregistered")); return err != nil }})
	return s, server.Handler(), nil
}

// Five hundred units cost a handful of requests, not thousands.
func TestManyUnits(t *testing.T) {
	dir := t.TempDir()
	s, handler, err := newStage(dir, storetest.Start(t))
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
		handler.ServeHTTP(w, r)
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
	}{{"start", 2, 500}, {"start", 2, 500}, {"stop", 2, 500}, {"destroy", 1, 500}} { // each waits with a request of its own
		posts.Store(0)
		gets.Store(0)
		var out, errs strings.Builder
		line := []string{"flotilla", tc.verb, "--endpoint", server.URL, filepath.Join(dir, "web@{1..500}")}
		if code := cli.Run(line, &out, &errs); code != cli.ExitDone {
			t.Fatalf("%s: exit code %d; %s", tc.verb, code, errs.String())
		}
		if lines := strings.Count(out.String(), "\n"); posts.Load() != tc.posts || gets.Load() > 0 || lines != tc.lines {
			t.Errorf("%s: %d POSTs, %d GETs, %d lines, want %d, none, %d", tc.verb, posts.Load(), gets.Load(), lines, tc.posts, tc.lines)
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
	var following sync.WaitGroup
	following.Go(func() { _ = s.feed.Run(ctx) })
	defer following.Wait()
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

// pass makes the store as if engine and nodes had done all there is to do.
func (s *stage) pass(ctx context.Context) error {
	k := s.keys
	now, err := s.feed.Full(ctx)
	if err != nil {
		return err
	}
	load, next := map[string]int{}, map[string]map[string]state.UnitState{}
	for id := range now.Nodes {
		next[id] = map[string]state.UnitState{}
	}
	for _, u := range now.Units {
		if u.Placement.Exists() {
			load[u.Placement.Value.Node]++
		}
	}
	var ops []store.Op
	for _, name := range slices.Sorted(maps.Keys(now.Units)) {
		u := now.Units[name]
		if !u.Wanted() {
			if u.Placement.Exists() {
				ops = append(ops, store.Delete(k.Placement(name)))
			}
			if u.Unplaced.Exists() && !u.Record.Exists() {
				ops = append(ops, store.Delete(k.Unplaced(name)))
			}
			continue
		}
		if u.Requirements.Global {
			for id := range now.Nodes {
				next[id][name] = s.state(u, id+name)
			}
			continue
		}
		p := u.Placement.Value
		to, ok := p.Node, u.Placement.Exists()
		if u.Move.Exists() {
			to, ok = u.Move.Value.To, u.Move.Value.To == p.Node
			ops = append(ops, store.Delete(k.Move(name)))
		}
		if ok && now.Nodes[p.Node].Settings.Value.Drain {
			to, ok = "", false
		}
		why := ""
		if to == "" {
			for _, id := range slices.Sorted(maps.Keys(now.Nodes)) {
				n := now.Nodes[id]
				mismatch := u.Requirements.Mismatch(id, n.Record.Value.Metadata)
				switch {
				case mismatch != "":
					why = mismatch
				case n.Settings.Value.Cordon || n.Settings.Value.Drain:
					why = "it is cordoned"
				case to == "" || load[id] < load[to]:
					to = id
				}
			}
		}
		if to == "" {
			if !u.Unplaced.Exists() {
				ops = append(ops, store.Put(k.Unplaced(name), state.Encode(state.Unplaced{V: 1, Reason: fmt.Sprintf("%d nodes: %s", len(now.Nodes), why)})))
			}
			continue
		}
		if !ok {
			load[to]++
			ops = append(ops, store.Put(k.Placement(name), state.Encode(state.Placement{V: 1, Node: to, Generation: 1, Epoch: now.Revision, Approved: u.Hash, Reason: "fewest units"})))
		}
		next[to][name] = s.state(u, name)
	}
	for id, n := range now.Nodes {
		if !maps.Equal(n.Units.Value.Units, next[id]) {
			ops = append(ops, store.Put(k.UnitsReport(id), state.Encode(state.UnitsReport{V: 1, Units: next[id]})))
		}
	}
	for chunk := range slices.Chunk(ops, store.MaxOps) {
		if _, err := s.store.Apply(ctx, chunk); err != nil {
			return err
		}
	}
	return nil
}

func (s *stage) state(u *state.Unit, key string) state.UnitState {
	st := state.UnitState{Hash: u.Hash, Load: "loaded", Active: "inactive", Sub: "dead", Launched: u.Record.Value.Desired == unit.Launched, Restarts: u.Record.Value.Restarts}
	if !st.Launched {
		return st
	}
	switch text := u.Record.Value.Text; {
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
