package cli

import (
	"strings"
	"testing"
)

func TestHarmless(t *testing.T) {
	if got := harmless("a\x1b[2J\tb\nc\u009b\x00"); strings.ContainsAny(got, "\x1b\x00\u009b") || !strings.Contains(got, "\tb\nc") {
		t.Errorf("%q", got)
	}
}
