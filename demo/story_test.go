//go:build !cluster

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

// killedDemo starts a demo, kills it when its nodes run, and returns the
// directory that it left.
func killedDemo(t *testing.T, demo []string) string {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), demo[0], demo[1:]...)
	cmd.Env = append(os.Environ(), "DEMO_CLUSTER=loopback")
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	dir := ""
	lines := bufio.NewScanner(out)
	for lines.Scan() && !strings.HasPrefix(lines.Text(), "2. ") {
		if m := regexp.MustCompile(`^  logs +(/.*)/\*\.log$`).FindStringSubmatch(lines.Text()); m != nil {
			dir = m[1]
		}
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	if _, err := io.Copy(io.Discard, out); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait() // it was killed
	if dir == "" || len(running(dir+"/")) < 9 {
		t.Fatalf("the killed demo left fewer than three nodes in %q", dir)
	}
	return dir
}

// What make demo tells on loopback addresses, after a demo that was killed with all its nodes running.
func TestStory(t *testing.T) {
	demo, _ := build(t)
	left := killedDemo(t, demo)
	cmd := exec.CommandContext(t.Context(), demo[0], demo[1:]...)
	cmd.Env = append(os.Environ(), "DEMO=once", "DEMO_CLUSTER=loopback")
	raw, err := cmd.CombinedOutput()
	out := string(raw)
	t.Log(out)
	if err != nil {
		t.Fatalf("the story ends with %v", err)
	}
	for _, want := range []string{
		"Removing what an earlier demo left in " + left + ".\n",
		": GET / host=web.example.com ",
		"No request was lost",
		"Stopping everything and removing " + left + ".\n",
	} {
		if !strings.Contains(out, want) {
			t.Errorf("the story lacks %q", want)
		}
	}
	if strings.Contains(out, "\x1b") {
		t.Error("colour, though this is no terminal")
	}
	checkSums(t, out, true)
	if _, err := os.Stat(left); !os.IsNotExist(err) {
		t.Errorf("stat %s: %v, want it gone", left, err)
	}
}
