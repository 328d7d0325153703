//go:build cluster

package main

import (
	"bufio"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"flotilla/internal/nspawn"
	"flotilla/internal/nspawn/nspawntest"
)

// program builds flotilla, and flotillad beside it, for the nodes: they must not need
// libraries.
func program(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	cmd := exec.Command("go", "build", "-o", dir+"/", ".", "../flotillad")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("go build: %v\n%s", err, out)
	}
	return filepath.Join(dir, "flotilla")
}

// says runs the program and wants an exit code and output that matches each of
// the expressions.
func says(t *testing.T, program string, code int, args string, want ...string) {
	t.Helper()
	cmd := exec.Command(program, strings.Fields(args)...)
	out, err := cmd.CombinedOutput()
	if cmd.ProcessState == nil {
		t.Fatalf("flotilla %s: %v", args, err)
	}
	if got := cmd.ProcessState.ExitCode(); got != code {
		t.Fatalf("flotilla %s: exit code %d, want %d:\n%s", args, got, code, out)
	}
	for _, w := range want {
		if !regexp.MustCompile("(?m)" + w).Match(out) {
			t.Errorf("flotilla %s: no %s in\n%s", args, w, out)
		}
	}
}

func TestCluster(t *testing.T) {
	h, bin := nspawntest.Host(t), program(t)
	nspawntest.Cluster(t, h, "ct")
	says(t, bin, 0, "cluster up ct --nodes 2 --timeout 5m", `^ct/n1: 10\.77\.\d+\.11, Debian trixie, booted`, `^ct/n2: joined`, `^ct: 2 nodes, all joined`)
	says(t, bin, 0, "cluster up ct --timeout 5m", `^ct: 2 nodes, all joined`)
	says(t, bin, 0, "cluster add ct --release bookworm --metadata disk=ssd --timeout 5m", `^ct/n3: .* bookworm`, `^ct: 3 nodes, all joined`)
	says(t, bin, 0, "cluster status ct", `^n1 .*joined`, `^n3 .* bookworm +joined +disk=ssd`)
	says(t, bin, 0, "cluster list", `^ct +3 +3 +10\.77`)
	says(t, bin, 0, "nodes list --cluster ct", `^n1 .*serving`, `^n3 .*serving`)
	says(t, bin, 0, "cluster shell --cluster ct n3 fleetctl --help", `fleetctl`)
	says(t, bin, 7, "cluster shell --cluster ct n3 exit 7")
	says(t, bin, 0, "cluster console --cluster ct n3", `Multi-User System`)

	says(t, bin, 0, "services set web --scheme http --endpoint a=10.1.2.3:80 --cluster ct")
	says(t, bin, 0, "cluster power --cluster ct n2 cut")
	says(t, bin, 0, "cluster status ct", `^n2 .* off`)
	says(t, bin, 0, "cluster power --cluster ct n2 on")
	says(t, bin, 0, "cluster remove ct n1", `^ct/n1: removed`)
	says(t, bin, 1, "cluster remove ct n1", `error: cluster ct has no node n1`, `hint: flotilla cluster status ct`)
	says(t, bin, 0, "cluster up ct --nodes 3 --keep --timeout 5m", `^ct/n1: .*booted`, `^ct: 3 nodes, all joined`)
	says(t, bin, 0, "cluster down ct", `^ct: stopped`)
	says(t, bin, 1, "nodes list --cluster ct", `error: no node of cluster ct on this machine answers`, `hint: flotilla cluster up ct`)
	says(t, bin, 0, "cluster up ct --timeout 5m", `^ct: 3 nodes, all joined`)
	says(t, bin, 0, "services list --cluster ct", `^web `)
	says(t, bin, 0, "cluster down ct --keep=false", `^ct: removed`)
	nspawntest.NoTraces(t, h, "ct")
	says(t, bin, 0, "cluster down ct", `there is no such cluster`)
	says(t, bin, 1, "cluster status ct", `error: there is no cluster ct`)
}

// Whenever up is killed, down leaves nothing behind, and another up goes on.
func TestKilledUp(t *testing.T) {
	h, bin := nspawntest.Host(t), program(t)
	c := nspawntest.Cluster(t, h, "ck")
	if _, err := h.Image(t.Context(), nspawn.DefaultRelease); err != nil {
		t.Fatal(err)
	}
	file := func(pattern string) func(string) bool {
		return func(string) bool {
			found, err := filepath.Glob(pattern)
			return err == nil && len(found) > 0
		}
	}
	state := filepath.Join(h.State, "ck")
	said := func(text string) func(string) bool {
		return func(out string) bool { return strings.Contains(out, text) }
	}
	moments := []struct {
		what string
		come func(out string) bool
	}{
		{"the cluster is on record", file(filepath.Join(state, "cluster.json"))},
		{"a machine has a directory", file(filepath.Join(state, "nodes", "n1"))},
		{"its files are written", file(filepath.Join(state, "nodes", "n1", "upper", "usr", "local", "bin", "flotilla"))},
		{"its namespace is there", file("/run/netns/flotilla-ck.n1")},
		{"its link is there", file("/sys/class/net/fl-ck.11")},
		{"its control group is there", file("/sys/fs/cgroup/*/flotilla-ck.n1*")},
		{"it has booted", said("ck/n1: ")},
		{"another machine has a directory", file(filepath.Join(state, "nodes", "n2"))},
		{"another has a link", file("/sys/class/net/fl-ck.12")},
		{"another has booted", said("ck/n2: ")},
		{"one has joined", said("joined")},
	}
	for _, m := range moments {
		for _, again := range []bool{false, true} {
			killUp(t, bin, m.what, m.come)
			if again {
				says(t, bin, 0, "cluster up ck --timeout 5m", `^ck: 2 nodes, all joined`)
			}
			says(t, bin, 0, "cluster down ck")
			nspawntest.NoTraces(t, h, "ck")
			if c.Exists() || t.Failed() {
				t.Fatalf("killed when %s", m.what)
			}
			if m.what != "its files are written" && m.what != "another has a link" {
				break // two of them are tried to be continued: that takes its time
			}
		}
	}
}

// killUp starts up and kills it as soon as the moment has come.
func killUp(t *testing.T, bin, what string, come func(out string) bool) {
	t.Helper()
	read, write := io.Pipe()
	cmd := exec.Command(bin, "cluster", "up", "ck", "--nodes", "2")
	cmd.Stdout, cmd.Stderr = write, write
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	lines := make(chan string, 100)
	go func() {
		defer close(lines)
		for s := bufio.NewScanner(read); s.Scan(); {
			lines <- s.Text()
		}
	}()
	out := ""
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	limit := time.After(3 * time.Minute)
	for !come(out) {
		select {
		case line, ok := <-lines:
			if !ok {
				lines = nil
			}
			out += line + "\n"
		case <-tick.C:
		case <-limit:
			t.Errorf("it never came to that %s:\n%s", what, out)
			come = func(string) bool { return true }
		}
	}
	_ = cmd.Process.Signal(syscall.SIGKILL) // it may have come to its end
	_ = cmd.Wait()
	_ = write.Close()
}
