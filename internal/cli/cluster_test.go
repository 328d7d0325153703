//go:build linux

package cli

import (
	"strings"
	"testing"
)

func TestNewNames(t *testing.T) {
	for _, tc := range []struct {
		taken string
		n     int
		want  string
	}{{"", 3, "n1 n2 n3"}, {"n1 n3", 2, "n2 n4"}, {"n1 n2 n3", 0, ""}, {"n1 n2", -1, ""}} {
		if got := strings.Join(newNames(strings.Fields(tc.taken), tc.n), " "); got != tc.want {
			t.Errorf("%d beside %q: %q, want %q", tc.n, tc.taken, got, tc.want)
		}
	}
}

func TestMemberAt(t *testing.T) {
	const list = `1a, started, n1-aa, http://10.77.0.11:2380, http://10.77.0.11:2379, false
2b, started, n2-bb, http://10.77.0.111:2380, http://10.77.0.111:2379, false
`
	for address, want := range map[string]string{"10.77.0.11": "1a", "10.77.0.111": "2b", "10.77.0.1": ""} {
		if got := memberAt(list, address); got != want {
			t.Errorf("%s is member %q, want %q", address, got, want)
		}
	}
}

func TestShellWords(t *testing.T) {
	for _, tc := range []struct{ args, want string }{{"ls -l", "ls -l"}, {"ls|-l", "'ls' '-l'"}, {"echo|it's", `'echo' 'it'\''s'`}} {
		if got := strings.Join(shellWords(strings.Split(tc.args, "|")), " "); got != tc.want {
			t.Errorf("%q: %q, want %q", tc.args, got, tc.want)
		}
	}
}
