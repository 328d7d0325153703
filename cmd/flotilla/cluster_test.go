package main

import (
	"os"
	"strings"
	"testing"

	"flotilla/internal/cli"
)

// Without the tools the command says how to get them; without root, how to be.
func TestClusterCannot(t *testing.T) {
	t.Setenv("PATH", t.TempDir())
	var out, complaint strings.Builder
	code := cli.Run([]string{"flotilla", "cluster", "up"}, &out, &complaint)
	want := []string{"not installed here: systemd-nspawn, mmdebstrap, ip", "hint: apt-get install systemd-container mmdebstrap iproute2"}
	if os.Geteuid() != 0 {
		want = []string{"by root only", "hint: sudo "}
	}
	for _, w := range want {
		if code != cli.ExitFailed || !strings.Contains(complaint.String(), w) {
			t.Errorf("exit code %d, %s, want %q in it", code, complaint.String(), w)
		}
	}
}

func TestClusterUsage(t *testing.T) {
	for _, tc := range []struct{ args, want string }{
		{"cluster", "flotilla cluster needs a command: "},
		{"cluster add --nodes 0", "--nodes 0 is not a number of nodes from 1 to 100"},
		{"cluster add --release potato", `--release "potato" is neither trixie nor bookworm`},
		{"cluster add --metadata x", `--metadata "x" is not KEY=VALUE`},
		{"cluster add --binary /etc/passwd", "--binary /etc/passwd is not a program"},
		{"cluster up a b", `takes one name; unexpected argument "b"`},
		{"cluster remove", "needs a node, or a cluster and a node"},
		{"cluster list -o xml", `--output "xml" is neither text nor json`},
		{"cluster dwon", `there is no command "flotilla cluster dwon"`},
	} {
		var out, complaint strings.Builder
		if code := cli.Run(strings.Fields("flotilla "+tc.args), &out, &complaint); code != cli.ExitUsage || !strings.Contains(complaint.String(), tc.want) {
			t.Errorf("%s: exit code %d, %s, want %q", tc.args, code, complaint.String(), tc.want)
		}
	}
}
