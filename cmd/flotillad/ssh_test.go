package main

import (
	"context"
	"fmt"
	"iter"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"flotilla/internal/api"
	"flotilla/internal/fleetapi"
	"flotilla/internal/logs"
	"flotilla/internal/peer"
	"flotilla/internal/remote/sshdtest"
	"flotilla/internal/state"
	"flotilla/internal/store"
	"flotilla/internal/store/storetest"
	"flotilla/internal/systemd"
	"flotilla/internal/unit"
	"flotilla/internal/wire"
)

// TestSSHScripts runs testdata/ssh/*.txtar: what goes through ssh, and journals.
// An entry node, whose sshd is on $ENTRY, serves the API on $NODE_SOCKET; the
// commands have to go there by way of ssh with $KEY. $M1 is the entry node and $M2
// a second machine; both have an sshd on port $SSH_PORT. Unit hello.service is on
// the second, web@1.service on the first, stuck.service is nowhere. $STRICT_ENTRY
// is an sshd that does not forward to sockets. $HOME is empty.
//
//	replace   gives the second machine another host key
func TestSSHScripts(t *testing.T) {
	endpoint := storetest.Start(t)
	testscript.Run(t, testscript.Params{
		Dir:                 filepath.Join("testdata", "ssh"),
		RequireExplicitExec: true,
		Setup:               func(env *testscript.Env) error { return setSSH(t, env, endpoint) },
		Cmds: map[string]func(ts *testscript.TestScript, neg bool, args []string){
			"until": until, "exits": exits,
			"replace": func(ts *testscript.TestScript, _ bool, _ []string) {
				ts.Value(second{}).(*sshdtest.Server).Replace()
			},
		},
	})
}

type second struct{} // the key of the second machine's server in a script's values

func setSSH(t *testing.T, env *testscript.Env, endpoint string) error {
	dir, err := os.MkdirTemp("", "cli") // shorter than $WORK: it holds sockets
	if err != nil {
		return err
	}
	env.Defer(func() { _ = os.RemoveAll(dir) })
	key := sshdtest.Key(t)
	machine := sshdtest.Start(t, storetest.Addr(t).String(), key)
	entry := sshdtest.StartAt(t, storetest.Addr(t).String(), machine.Port, key)
	strict := sshdtest.Start(t, "127.0.0.1", key, "AllowStreamLocalForwarding no")
	env.Values[second{}] = machine

	client, err := store.Open(store.Config{Endpoints: []string{endpoint}, Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		return err
	}
	keys := state.Keys{Prefix: "/" + filepath.Base(dir) + "/"}
	put := func(key, value string) {
		if err == nil {
			_, err = client.Apply(context.Background(), []store.Op{store.Put(key, value)})
		}
	}
	text := "[Service]\nExecStart=/bin/true\n"
	for i, address := range []string{entry.Host, machine.Host} {
		n := state.NodeRecord{V: state.Version, ID: machineIDs[i], Name: fmt.Sprintf("n%d", i+1), Address: address, Units: true}
		put(keys.Node(n.ID), state.Encode(n))
	}
	for name, id := range map[string]string{"web@1.service": machineIDs[0], "hello.service": machineIDs[1]} {
		put(keys.Unit(name), state.Encode(state.UnitRecord{V: 1, Text: text, Desired: unit.Launched}))
		put(keys.Placement(name), state.Encode(state.Placement{V: 1, Node: id, Reason: "fewest units"}))
	}
	put(keys.Unit("stuck.service"), state.Encode(state.UnitRecord{V: 1, Text: text, Desired: unit.Launched}))
	put(keys.Unplaced("stuck.service"), state.Encode(state.Unplaced{V: 1, Reason: "2 nodes: 2 have no disk=ssd"}))
	if err != nil {
		return err
	}

	log := slog.New(slog.DiscardHandler)
	feed := state.NewFeed(client, keys, log)
	l := logs.New(logs.Config{Feed: feed, Peer: peer.New(netip.Addr{}, func(netip.Addr) bool { return false }), Self: machineIDs[0],
		Own: func() []string { return []string{"web@1.service"} }, Journal: playedJournal,
		Show: func(_ context.Context, unit string) (string, int, error) {
			return "● " + unit + "\n     Active: inactive (dead)\n", 3, nil
		}})
	a := api.New(api.Config{Node: "n1", ID: machineIDs[0], Version: "1.2.3", State: feed, Store: client, Log: log,
		StoreStatus: func() wire.StoreStatus { return wire.StoreStatus{Live: true} }, Journal: l.ServeJournal, UnitStatus: l.ServeUnitStatus})
	a.Fleet = fleetapi.New(fleetapi.Config{API: a, Log: log})
	socket := filepath.Join(dir, "node.sock")
	listener, err := net.Listen("unix", socket)
	if err != nil {
		return err
	}
	server := &http.Server{Handler: a.Handler()}
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() { _ = feed.Run(ctx) })
	running.Go(func() { _ = server.Serve(listener) })
	env.Defer(func() {
		cancel()
		_ = server.Close()
		running.Wait()
		_ = client.Close()
	})
	home := filepath.Join(env.WorkDir, "home")
	known := filepath.Join(env.WorkDir, "known_hosts")
	if err := os.WriteFile(known, []byte(entry.KnownHosts()+strict.KnownHosts()), 0o600); err != nil {
		return err
	}
	for name, value := range map[string]string{
		"HOME": home, "NODE_SOCKET": socket, "KEY": key, "KNOWN": known, "SSH_USER": entry.User, "SSH_AUTH_SOCK": "",
		"ENTRY": entry.Address(), "STRICT_ENTRY": strict.Address(), "SSH_PORT": fmt.Sprint(machine.Port),
		"M1": machineIDs[0], "M2": machineIDs[1], "ADDRESS2": machine.Host,
	} {
		env.Setenv(name, value)
	}
	return os.Mkdir(home, 0o700)
}

// playedJournal has two lines of web@1.service, one of them hostile.
func playedJournal(ctx context.Context, q systemd.JournalQuery) iter.Seq2[systemd.Entry, error] {
	return func(yield func(systemd.Entry, error) bool) {
		if !slices.Contains(q.Units, "web@1.service") {
			return
		}
		at := time.Date(2026, 1, 2, 3, 4, 5, 0, time.Local)
		entries := []systemd.Entry{
			{Time: at, Unit: "web@1.service", Message: "Hello, World!", PID: 12, Priority: 6, Identifier: "sh", Cursor: "1"},
			{Time: at.Add(time.Second), Unit: "web@1.service", Message: "two\nlines \x1b[31m", Priority: 3, Identifier: "sh", Cursor: "2"},
		}
		if q.After != "" || !q.Since.IsZero() {
			entries = nil
		}
		if q.Lines == 1 {
			entries = entries[1:]
		}
		for _, e := range entries {
			if !yield(e, nil) {
				return
			}
		}
		if q.Follow {
			<-ctx.Done()
			yield(systemd.Entry{}, ctx.Err())
		}
	}
}
