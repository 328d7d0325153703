// Command flotillad is what runs on the machines of a cluster: a node, and its store
// in a process of its own. Called fleetd it is a node with fleet's configuration.
package main

import (
	"io"
	"os"
	"path/filepath"

	"flotilla/internal/cli"
)

func main() { os.Exit(run(os.Args, os.Stdout, os.Stderr)) }

// run executes one command line, whose first word is the name of the program, and
// returns the exit code.
func run(line []string, stdout, stderr io.Writer) int {
	if filepath.Base(line[0]) == "fleetd" {
		return runFleetd(line[1:], stdout, stderr)
	}
	root := cli.Root("flotillad", "Run a node of a Flotilla cluster", `Flotillad runs on each machine of a Flotilla cluster: the node, which runs units,
routes requests and answers DNS, and its store (etcd). flotilla asks it and tells
it what to do.`)
	root.AddCommand(nodeCommand(), storeCommand(), doctorCommand())
	return cli.Execute(root, line[1:], stdout, stderr)
}
