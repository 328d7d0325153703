package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"testing"
)

// build makes the binaries that make demo makes. demo is its command line.
func build(t *testing.T) (demo []string, flotilla string) {
	t.Helper()
	dir := t.TempDir()
	for _, pkg := range []string{"./demo", "./cmd/flotilla", "./cmd/flotillad", "./examples/backend"} {
		cmd := exec.Command("go", "build", "-o", dir+"/", pkg)
		cmd.Dir = ".."
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0") // the machines have libraries of their own
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("build %s: %v\n%s", pkg, err, out)
		}
	}
	flotilla = filepath.Join(dir, "flotilla")
	return []string{filepath.Join(dir, "demo"), "-flotilla", flotilla, "-backend", filepath.Join(dir, "backend")}, flotilla
}

// checkSums holds the table at the end to its promises. backend says whether there
// is a row of a backend that is killed.
func checkSums(t *testing.T, out string, backend bool) {
	t.Helper()
	kills := map[string]bool{ // by row, whether a router is killed in it
		"nothing happens": false, "a router is killed": true, "a node is killed": true,
		"the node comes back": false, "a node is drained": false, "together": true,
	}
	if backend {
		kills["a backend is killed"] = false
	}
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
