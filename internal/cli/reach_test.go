package cli

import (
	"net"
	"path/filepath"
	"testing"

	"flotilla/internal/nodeconfig"
)

func TestSeconds(t *testing.T) {
	for in, want := range map[string]float64{"10": 10, "2.5": 2.5, "1m": 60, "500ms": 0.5} {
		var s seconds
		if err := s.Set(in); err != nil || float64(s) != want {
			t.Errorf("%q: %v, %v, want %v", in, s, err, want)
		}
	}
	for _, in := range []string{"", "0", "-1", "x", "NaN", "1e9"} {
		var s seconds
		if err := s.Set(in); err == nil {
			t.Errorf("%q is taken as %v", in, s)
		}
	}
}

// A shell with the variables of the command line can also run a node.
func TestVariables(t *testing.T) {
	environ := []string{"FLOTILLA_CLUSTER=x"}
	for _, name := range reachNames {
		environ = append(environ, nodeconfig.EnvironmentName(name)+"=x")
	}
	none := func(string) bool { return false }
	if _, err := nodeconfig.Load(new(nodeconfig.Config), none, environ); err != nil {
		t.Error(err)
	}
}

// A socket that is left of somebody who has ended is as good as none.
func TestUnserved(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	if !unserved(path) {
		t.Error("a socket that is not there is served")
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	if unserved(path) {
		t.Error("a socket with a listener is not served")
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	if !unserved(path) {
		t.Error("a socket without its listener is served")
	}
}
