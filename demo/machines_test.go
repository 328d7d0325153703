//go:build cluster

package main

import (
	"bufio"
	"io"
	"os"
	"os/exec"
	"regexp"
	"strings"
	"testing"
)

// What make demo tells of machines and units, after a demo that was killed when
// its machines ran.
func TestMachinesStory(t *testing.T) {
	demo, flotilla := build(t)
	env := append(os.Environ(), "DEMO=once", "DEMO_CLUSTER=nspawn")
	killed := exec.CommandContext(t.Context(), demo[0], demo[1:]...)
	killed.Env, killed.Dir = env, ".."
	read, err := killed.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := killed.Start(); err != nil {
		t.Fatal(err)
	}
	for lines := bufio.NewScanner(read); lines.Scan() && !strings.HasPrefix(lines.Text(), "2. "); {
	}
	if err := killed.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_, _ = io.Copy(io.Discard, read) // until its last command has ended
	_ = killed.Wait()                // it was killed

	cmd := exec.CommandContext(t.Context(), demo[0], demo[1:]...)
	cmd.Env, cmd.Dir = env, ".."
	raw, err := cmd.CombinedOutput()
	out := string(raw)
	t.Log(out)
	if err != nil {
		t.Fatalf("the story ends with %v", err)
	}
	for _, want := range []string{
		`demo\d?: 3 nodes, all joined`, `(?m)^ +web@\d on n\d$`, `All units ran on the other two machines`,
		`node [0-9a-f]{32} is gone`, `No request was lost`, `Removing the cluster\.`,
	} {
		if !regexp.MustCompile(want).MatchString(out) {
			t.Errorf("the story lacks %q", want)
		}
	}
	checkSums(t, out, false)
	if list, err := exec.Command(flotilla, "cluster", "list").CombinedOutput(); err != nil || regexp.MustCompile(`(?m)^demo `).Match(list) {
		t.Errorf("clusters afterwards (%v):\n%s", err, list)
	}
}
