package cli

import (
	"io"
	"os"
	"path/filepath"
)

// The node brings along etcd, gRPC and Prometheus, and their initialisation takes
// longer than most commands. "Program initialization" of the Go specification says
// when it happens: again and again the first package in the order of import paths
// is initialised of which all imports are. This package imports little, and its path
// comes before those of all others that need net/http. So init runs the commands
// that need nothing but this package, and what is left of the program is never
// initialised. docs/decisions/0016-early-commands.md has the figures.
func init() {
	run := early(os.Args)
	if run == nil {
		return
	}
	// A goroutine of its own, because the one that initialises keeps to its thread.
	code := make(chan int)
	go func() { code <- run(os.Stdout, os.Stderr) }()
	os.Exit(<-code)
}

// early returns what executes a command line if that is possible before the rest of
// the program is there. Otherwise, and in programs of any other name, such as tests,
// it returns nil, and main gets the command line.
func early(line []string) func(stdout, stderr io.Writer) int {
	if len(line) == 0 {
		return nil
	}
	switch filepath.Base(line[0]) {
	case "fleetctl": // all of it
		return func(stdout, stderr io.Writer) int { return runFleetctl(line[1:], stdout, stderr) }
	case "flotilla":
		root := newRoot(nil)
		if cmd, _, err := root.Find(line[1:]); err == nil && cmd.HasParent() {
			return func(stdout, stderr io.Writer) int { return run(root, line[1:], stdout, stderr) }
		}
	}
	return nil
}
