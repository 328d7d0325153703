package cli

import (
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
	if !early(os.Args) {
		return
	}
	// A goroutine of its own, because the one that initialises keeps to its thread.
	code := make(chan int)
	go func() { code <- Run(os.Args, os.Stdout, os.Stderr, nil) }()
	os.Exit(<-code)
}

// early reports whether a command line can be executed before the rest of the
// program is there. If not, and in programs of any other name, such as tests, main
// gets it.
func early(line []string) bool {
	if len(line) == 0 {
		return false
	}
	switch filepath.Base(line[0]) {
	case "fleetctl":
		return true // all of it
	case "flotilla":
		cmd, _, err := newRoot(nil).Find(line[1:])
		return err == nil && cmd.HasParent()
	}
	return false
}
