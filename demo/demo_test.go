package main

import (
	"bufio"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// build makes the binaries that make demo makes.
func build(t *testing.T) (demo, flotilla string) {
	t.Helper()
	dir := t.TempDir()
	for _, pkg := range []string{"./demo", "./cmd/flotilla"} {
		cmd := exec.Command("go", "build", "-o", dir+"/", pkg)
		cmd.Dir = ".."
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0") // the machines have libraries of their own
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("build %s: %v\n%s", pkg, err, out)
		}
	}
	return filepath.Join(dir, "demo"), filepath.Join(dir, "flotilla")
}

// killedDemo starts a demo, kills it when its nodes run, and returns the
// directory that it left.
func killedDemo(t *testing.T, demo, flotilla string) string {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), demo, "-flotilla", flotilla)
	cmd.Env = append(os.Environ(), "DEMO_CLUSTER=loopback")
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	dir := ""
	lines := bufio.NewScanner(out)
	for lines.Scan() && !strings.HasPrefix(lines.Text(), "2. ") {
		if m := regexp.MustCompile(`^  logs +(/.*)/\*\.log$`).FindStringSubmatch(lines.Text()); m != nil {
			dir = m[1]
		}
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	if _, err := io.Copy(io.Discard, out); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait() // it was killed
	if len(livePids(dir, "*.pid", "*/*.pid", "*/*/*.pid")) < 9 {
		t.Fatalf("the killed demo left fewer than three nodes in %q", dir)
	}
	return dir
}

// What make demo tells on loopback addresses, after a demo that was killed with all its nodes running.
func TestStory(t *testing.T) {
	demo, flotilla := build(t)
	left := killedDemo(t, demo, flotilla)
	cmd := exec.CommandContext(t.Context(), demo, "-flotilla", flotilla)
	cmd.Env = append(os.Environ(), "DEMO=once", "DEMO_CLUSTER=loopback")
	raw, err := cmd.CombinedOutput()
	out := string(raw)
	t.Log(out)
	if err != nil {
		t.Fatalf("the story ends with %v", err)
	}
	for _, want := range []string{
		"Removing what an earlier demo left in " + left + ".\n",
		" answers GET / for web.example.com\n",
		"No request was lost",
		"Stopping everything and removing " + left + ".\n",
	} {
		if !strings.Contains(out, want) {
			t.Errorf("the story lacks %q", want)
		}
	}
	if strings.Contains(out, "\x1b") {
		t.Error("colour, though this is no terminal")
	}
	checkSums(t, out, map[string]bool{
		"nothing happens": false, "a backend is killed": false, "a router is killed": true,
		"a node is killed": true, "the node comes back": false, "together": true,
	})
	if _, err := os.Stat(left); !os.IsNotExist(err) {
		t.Errorf("stat %s: %v, want it gone", left, err)
	}
}

// checkSums holds the table at the end to its promises. kills says of each row
// whether a router is killed in it.
func checkSums(t *testing.T, out string, kills map[string]bool) {
	t.Helper()
	rows := regexp.MustCompile(`(?m)^ +([a-z ]+?) +([1-9]\d*) +([1-9]\d*) +(\d+) +(\d+) +(\d+)\b`).FindAllStringSubmatch(out, -1)
	for _, r := range rows {
		killed, known := kills[r[1]]
		delete(kills, r[1])
		switch {
		case !known:
			t.Errorf("unknown row %q", r[0])
		case r[6] != "0":
			t.Errorf("%s requests were lost while %s", r[6], r[1])
		case !killed && (r[4] != "0" || r[5] != "0"):
			t.Errorf("requests failed while %s, though no router was killed: %q", r[1], r[0])
		}
	}
	if len(kills) > 0 {
		t.Errorf("no rows for %v", kills)
	}
}
