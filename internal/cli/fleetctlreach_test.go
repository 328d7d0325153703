package cli

import (
	"net"
	"path/filepath"
	"testing"
)

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
