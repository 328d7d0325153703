package main

import (
	"context"
	"fmt"
	"io/fs"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"flotilla/internal/cli"
	"flotilla/internal/client"
	"flotilla/internal/store/storetest"
	"flotilla/internal/wire"
)

func TestMain(m *testing.M) {
	flotilla := func() { os.Exit(cli.Run(os.Args, os.Stdout, os.Stderr)) }
	testscript.Main(m, map[string]func(){"flotilla": flotilla, "fleetctl": flotilla, "flotillad": main, "fleetd": main})
}

// TestScripts runs testdata/*.txtar with both programs: what people type and what they
// read. In a
// script $ADDR is a loopback address of its own, $NODE the configuration file of
// a node on it with $DATA and $SOCKET, $HTTP_PORT and so on its ports, $ADDR2 to
// $ADDR4 addresses of further nodes, and $BACKEND the ip:port of a web server.
//
//	ready             waits until the node on $SOCKET routes what the store holds
//	until RE CMD...   runs CMD again and again until its output matches RE
//	exits CODE CMD... runs CMD and wants this exit code
func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir:                 "testdata",
		RequireExplicitExec: true,
		Setup:               func(env *testscript.Env) error { return setup(t, env) },
		Cmds: map[string]func(ts *testscript.TestScript, neg bool, args []string){
			"ready": ready, "until": until, "exits": exits,
		},
	})
}

func setup(t *testing.T, env *testscript.Env) error {
	dir, err := os.MkdirTemp("", "cli") // shorter than $WORK: it holds sockets
	if err != nil {
		return err
	}
	env.Defer(func() {
		killLeft(dir)
		_ = os.RemoveAll(dir)
	})
	addr := storetest.Addr(t)
	var flags []string
	var used []int
	for _, name := range []string{"http-port", "https-port", "dns-port", "balancer-port", "redirect-port", "store-client-port", "store-peer-port"} {
		port := storetest.Port(t, addr)
		for slices.ContainsFunc(used, func(u int) bool { return max(u, port)-min(u, port) < 2 }) {
			port = storetest.Port(t, addr)
		}
		used = append(used, port)
		flags = append(flags, fmt.Sprintf("--%s=%d", name, port))
		env.Setenv(strings.ToUpper(strings.ReplaceAll(name, "-", "_")), fmt.Sprint(port))
	}
	backend := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = fmt.Fprintln(w, "hello from the backend") }))
	env.Defer(backend.Close)
	socket := filepath.Join(dir, "node.sock")
	for name, value := range map[string]string{
		"ADDR": addr.String(), "DATA": dir, "SOCKET": socket, "BACKEND": strings.TrimPrefix(backend.URL, "http://"),
		"ADDR2": storetest.Addr(t).String(), "ADDR3": storetest.Addr(t).String(), "ADDR4": storetest.Addr(t).String(),
		"FLOTILLA_SOCKET": socket, "NODE": filepath.Join(env.WorkDir, "node.yaml"),
	} {
		env.Setenv(name, value)
	}
	var file strings.Builder
	for _, f := range append(flags, "--name=n1", "--address="+addr.String(), "--data="+dir, "--socket="+socket,
		"--host-ports=listeners", "--dns-upstream=none", "--max-connections=500", "--log-format=text") {
		name, value, _ := strings.Cut(strings.TrimPrefix(f, "--"), "=")
		fmt.Fprintf(&file, "%s: %s\n", name, value)
	}
	return os.WriteFile(env.Getenv("NODE"), []byte(file.String()), 0o600)
}

// killLeft ends what killed nodes have left running, by the pid files below dir.
func killLeft(dir string) {
	_ = filepath.WalkDir(dir, func(path string, _ fs.DirEntry, err error) error {
		if err != nil || filepath.Ext(path) != ".pid" {
			return nil
		}
		raw, _ := os.ReadFile(path)
		var pid int
		if n, _ := fmt.Sscan(string(raw), &pid); n == 1 && pid > 1 {
			_ = syscall.Kill(-pid, syscall.SIGKILL) // it leads its process group
		}
		return nil
	})
}

func ready(ts *testscript.TestScript, neg bool, _ []string) {
	if neg {
		ts.Fatalf("ready has no opposite")
	}
	node := client.Dial(ts.Getenv("SOCKET"))
	deadline := time.Now().Add(40 * time.Second)
	var last string
	for time.Now().Before(deadline) {
		st, err := client.Get[wire.Status](context.Background(), node, "/v1/status", nil)
		if err == nil && st.Router.Serving && st.Store.Live {
			if n, err := client.Get[wire.Nodes](context.Background(), node, "/v1/nodes", nil); err == nil && len(n.Nodes) == 1 && n.Nodes[0].Serving {
				return
			}
		}
		last = fmt.Sprintf("%+v, error %v", st, err)
		time.Sleep(20 * time.Millisecond)
	}
	ts.Fatalf("the node is not ready: %s", last)
}

func until(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: until RE COMMAND...")
	}
	want := regexp.MustCompile("(?m)" + args[0])
	for deadline := time.Now().Add(60 * time.Second); time.Now().Before(deadline); time.Sleep(50 * time.Millisecond) {
		cmd := exec.Command(args[1], args[2:]...)
		cmd.Env = append(os.Environ(), "FLOTILLA_SOCKET="+ts.Getenv("FLOTILLA_SOCKET"))
		if out, err := cmd.Output(); err == nil && want.Match(out) {
			return
		}
	}
	ts.Check(ts.Exec(args[1], args[2:]...)) // shows what it says
	ts.Fatalf("%s never said %s", strings.Join(args[1:], " "), args[0])
}

func exits(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: exits CODE COMMAND...")
	}
	err := ts.Exec(args[1], args[2:]...)
	code := "0"
	if exit, ok := err.(interface{ ExitCode() int }); ok {
		code = fmt.Sprint(exit.ExitCode())
	} else if err != nil {
		ts.Fatalf("%v", err)
	}
	if code != args[0] {
		ts.Fatalf("%s exits with %s, want %s", strings.Join(args[1:], " "), code, args[0])
	}
}
