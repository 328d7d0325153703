//go:build linux

package cli

import (
	"strings"
	"testing"
)

func TestCommandLine(t *testing.T) {
	for _, tc := range []struct{ args, want string }{{"ls -l", "ls -l"}, {"ls|-l", "ls -l"}, {"echo|it's", `echo 'it'\''s'`}, {"echo|a b", "echo 'a b'"}} {
		if got := commandLine(strings.Split(tc.args, "|")); got != tc.want {
			t.Errorf("%q: %q, want %q", tc.args, got, tc.want)
		}
	}
}
