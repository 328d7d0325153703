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

// The environment names the cluster for commands that ask a node and for those on
// clusters: one variable is behind the flags of both.
func TestClusterFromEnvironment(t *testing.T) {
	t.Setenv("FLOTILLA_CLUSTER", "mine")
	root := newRoot()
	for _, line := range [][]string{{"list-machines"}, {"cluster", "shell"}} {
		cmd, _, err := root.Find(line)
		if err != nil {
			t.Fatal(err)
		}
		flag := cmd.Flags().Lookup("cluster")
		if flag == nil {
			flag = cmd.PersistentFlags().Lookup("cluster")
		}
		if flag == nil || flag.Value.String() != "mine" {
			t.Errorf("%v: --cluster is %v, want mine", line, flag)
		}
	}
}
