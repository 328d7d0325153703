package main

import (
	"os/exec"
	"strings"
	"testing"
)

// What the command line is linked with has to be initialised before it begins.
func TestDependencies(t *testing.T) {
	out, err := exec.Command("go", "list", "-deps", ".").Output()
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(out), "flotilla/internal/cli\n") {
		t.Fatalf("go list says: %s", out)
	}
	for pkg := range strings.Lines(string(out)) {
		for _, prefix := range []string{"go.etcd.io/", "google.golang.org/", "github.com/prometheus/", "github.com/godbus/", "github.com/coreos/go-systemd/",
			"github.com/miekg/", "go.uber.org/", "flotilla/internal/store", "flotilla/internal/systemd", "flotilla/internal/node\n"} {
			if strings.HasPrefix(pkg, prefix) {
				t.Errorf("the command line needs %s", pkg)
			}
		}
	}
}
