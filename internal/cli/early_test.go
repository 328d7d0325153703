package cli

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

func TestEarly(t *testing.T) {
	for _, tc := range []struct {
		line string
		want bool
	}{
		{"/usr/local/bin/flotilla list-units", true},
		{"flotilla list-units --help", true},
		{"flotilla services set web --scheme http", true},
		{"flotilla version", true},
		{"fleetctl --endpoint http://10.0.0.1:1 list-units", true},
		{"fleetctl", true},
		{"flotilla", false},
		{"flotilla --help", false},
		{"flotilla help list-units", false},
		{"flotilla __complete list-units --", false},
		{"flotilla node --name n1", false},
		{"flotilla cluster up", false},
		{"flotilla list-unist", false},
		{"fleetd -config /etc/fleet/fleet.conf", false},
		{"cli.test list-units", false},
		{"", false},
	} {
		if got := early(strings.Fields(tc.line)) != nil; got != tc.want {
			t.Errorf("%q: %t, want %t", tc.line, got, tc.want)
		}
	}
}

// heavy are packages whose initialisation is not to be waited for, and which stand
// for all that they need.
var heavy = []string{"go.etcd.io/etcd/server/v3/embed", "google.golang.org/grpc", "github.com/prometheus/client_golang/prometheus"}

// What this package imports is initialised before its commands run.
func TestLight(t *testing.T) {
	out, err := exec.Command("go", "list", "-deps", ".").Output()
	if err != nil {
		t.Fatal(err)
	}
	for pkg := range strings.Lines(string(out)) {
		for _, prefix := range append(heavy, "go.etcd.io/", "google.golang.org/", "github.com/prometheus/", "github.com/godbus/", "github.com/miekg/") {
			if strings.HasPrefix(pkg, prefix) {
				t.Errorf("package cli needs %s", pkg)
			}
		}
	}
}

// The program ends before the heavy packages are initialised, unless its command
// needs them.
func TestInitialised(t *testing.T) {
	program := filepath.Join(t.TempDir(), "flotilla")
	if out, err := exec.Command("go", "build", "-o", program, "flotilla/cmd/flotilla").CombinedOutput(); err != nil {
		t.Fatalf("go build: %v\n%s", err, out)
	}
	for _, tc := range []struct {
		args string
		code int
		all  bool
	}{{"list-units", ExitFailed, false}, {"version", ExitDone, false}, {"node --help", ExitDone, true}} {
		cmd := exec.Command(program, strings.Fields(tc.args)...)
		cmd.Env = append(os.Environ(), "GODEBUG=inittrace=1", "FLOTILLA_SOCKET=/nonexistent")
		var trace bytes.Buffer
		cmd.Stderr = &trace
		err := cmd.Run()
		var exit *exec.ExitError
		if err != nil && !errors.As(err, &exit) {
			t.Fatal(err)
		}
		if code := cmd.ProcessState.ExitCode(); code != tc.code {
			t.Errorf("%s: exit code %d, want %d:\n%s", tc.args, code, tc.code, trace.String())
		}
		for _, pkg := range heavy {
			if got := strings.Contains(trace.String(), "init "+pkg+" @"); got != tc.all {
				t.Errorf("%s: %s is initialised: %t, want %t", tc.args, pkg, got, tc.all)
			}
		}
	}
}
