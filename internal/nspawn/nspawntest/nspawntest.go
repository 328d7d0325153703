// Package nspawntest supports tests that boot machines. It knows what a cluster
// of them leaves in the kernel and on disk; it must not know what they run.
package nspawntest

import (
	"context"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"flotilla/internal/nspawn"
)

// Host returns this machine with the usual directories. The test fails if it
// cannot run machines.
func Host(t testing.TB) *nspawn.Host {
	t.Helper()
	h := nspawn.Default(slog.New(slog.NewTextHandler(t.Output(), nil)))
	if err := h.Check(); err != nil {
		t.Fatalf("this machine cannot run machines: %v", err)
	}
	return h
}

// Cluster returns a cluster of h that is removed when the test ends; the test
// fails if anything of it is left then. The name has at most 8 characters.
func Cluster(t testing.TB, h *nspawn.Host, name string) *nspawn.Cluster {
	t.Helper()
	c, err := h.Cluster(name)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Remove(context.Background()); err != nil {
			t.Error(err)
		}
		NoTraces(t, h, name)
	})
	return c
}

// Ready waits until the machine answers ssh.
func Ready(t testing.TB, c *nspawn.Cluster, name string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	for tick := time.NewTicker(20 * time.Millisecond); ; <-tick.C {
		out, err := c.SSH(ctx, name, "true").CombinedOutput()
		if err == nil {
			return
		}
		if ctx.Err() != nil {
			console, _ := c.Console(t.Context(), name)
			t.Fatalf("machine %s is not reached: %v: %s\n%s", name, err, out, console)
		}
	}
}

// On runs a command line on a machine and returns what it prints; the test fails
// if the command does.
func On(t testing.TB, c *nspawn.Cluster, name, command string) string {
	t.Helper()
	out, err := c.SSH(t.Context(), name, command).CombinedOutput()
	if err != nil {
		t.Fatalf("%s on %s: %v: %s", command, name, err, out)
	}
	return strings.TrimSpace(string(out))
}

// NoTraces fails the test if anything of a cluster is on this machine.
func NoTraces(t testing.TB, h *nspawn.Host, name string) {
	t.Helper()
	if left := traces(t, h, name); len(left) > 0 {
		t.Errorf("of cluster %s is left:\n%s", name, strings.Join(left, "\n"))
	}
}

func traces(t testing.TB, h *nspawn.Host, name string) []string {
	t.Helper()
	var left []string
	links, err := net.Interfaces()
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range links {
		if l.Name == "fl-"+name || strings.HasPrefix(l.Name, "fl-"+name+".") {
			left = append(left, "link "+l.Name)
		}
	}
	for _, pattern := range []string{filepath.Join(h.State, name), filepath.Join(h.Run, name), "/run/netns/flotilla-" + name + ".*"} {
		found, err := filepath.Glob(pattern)
		if err != nil {
			t.Fatal(err)
		}
		left = append(left, found...)
	}
	_ = filepath.WalkDir("/sys/fs/cgroup", func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() && strings.HasPrefix(d.Name(), "flotilla-"+name+".") {
			left = append(left, path)
		}
		return nil // groups of others come and go
	})
	for line := range strings.Lines(read(t, "/proc/self/mounts")) {
		if strings.Contains(line, filepath.Join(h.State, name)+"/") || strings.Contains(line, "flotilla-"+name+".") {
			left = append(left, "mount "+line)
		}
	}
	tables, err := exec.Command("nft", "list", "tables", "ip").Output()
	if err != nil {
		t.Fatalf("nft: %v", err)
	}
	for line := range strings.Lines(string(tables)) {
		if strings.TrimSpace(line) == "table ip flotilla_"+strings.ReplaceAll(name, "-", "_") {
			left = append(left, "nftables "+line)
		}
	}
	return append(left, Processes(t, "--machine="+name+".", filepath.Join(h.State, name)+"/")...)
}

// Processes returns the processes whose command lines contain one of the texts.
func Processes(t testing.TB, texts ...string) []string {
	t.Helper()
	files, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	var found []string
	for _, file := range files {
		raw, _ := os.ReadFile(file) // it may have ended
		for _, text := range texts {
			if strings.Contains(string(raw), text) {
				found = append(found, "process "+strings.ReplaceAll(string(raw), "\x00", " "))
			}
		}
	}
	return found
}

func read(t testing.TB, path string) string {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}
