package main

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"flotilla/internal/cli"
	"flotilla/internal/node"
	"flotilla/internal/nspawn"
)

// What is written to a node is a configuration that the node takes.
func TestNodeFiles(t *testing.T) {
	metadata := []string{"disk=ssd", "zone=a"}
	files, err := nodeFiles("/bin/true", [][2]string{{"name", "n1"}, {"insecure", "true"}, {"join", "n1,n3"}, {"metadata", strings.Join(metadata, ",")}, {"name", "n2"}})
	if err != nil {
		t.Fatal(err)
	}
	at := slices.IndexFunc(files, func(f nspawn.File) bool { return f.Path == nodeConfig })
	path := filepath.Join(t.TempDir(), "node.yaml")
	if err := os.WriteFile(path, []byte(files[at].Text), 0o600); err != nil {
		t.Fatal(err)
	}
	cfg, err := node.Load(&node.Config{ConfigFile: path}, func(option string) bool { return option == "config" }, nil)
	if err != nil {
		t.Fatalf("%v:\n%s", err, files[at].Text)
	}
	cfg.Address = "10.77.0.12" // the machine's only one
	if err := cfg.Validate(); err != nil {
		t.Error(err)
	}
	if cfg.Name != "n2" || !cfg.Insecure || !slices.Equal(cfg.Join, []string{"n1", "n3"}) || !slices.Equal(cfg.Metadata, metadata) {
		t.Errorf("%s is read as %+v", files[at].Text, cfg)
	}
	for _, unit := range []string{"flotilla-store.service", "flotilla-node.service", "flotilla-haproxy.service"} {
		at := slices.IndexFunc(files, func(f nspawn.File) bool { return f.Path == "/etc/systemd/system/multi-user.target.wants/"+unit })
		if at < 0 {
			t.Errorf("%s is not enabled", unit)
		}
	}
}

// Without the tools the command says how to get them; without root, how to be.
func TestClusterCannot(t *testing.T) {
	t.Setenv("PATH", t.TempDir())
	var out, complaint strings.Builder
	code := cli.Run([]string{"flotilla", "cluster", "up"}, &out, &complaint, &daemons)
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
		{"cluster up a b", `takes one name, and "b" is too much`},
		{"cluster remove", "needs a node, or a cluster and a node"},
		{"cluster list -o xml", `--output "xml" is neither text nor json`},
		{"cluster dwon", `there is no command "flotilla cluster dwon"`},
	} {
		var out, complaint strings.Builder
		if code := cli.Run(strings.Fields("flotilla "+tc.args), &out, &complaint, &daemons); code != cli.ExitUsage || !strings.Contains(complaint.String(), tc.want) {
			t.Errorf("%s: exit code %d, %s, want %q", tc.args, code, complaint.String(), tc.want)
		}
	}
}
