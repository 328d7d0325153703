// Command flotilla is the node's daemons and the operator's tool; package cli is
// all of the latter that does not need the former.
package main

import (
	"os"
	"path/filepath"

	"github.com/spf13/cobra"

	"flotilla/internal/cli"
)

func main() {
	if filepath.Base(os.Args[0]) == "fleetd" {
		os.Exit(runFleetd(os.Args[1:], os.Stdout, os.Stderr))
	}
	os.Exit(cli.Run(os.Args, os.Stdout, os.Stderr, &daemons))
}

// daemons is what this program does beyond asking nodes.
var daemons = cli.Daemons{
	Commands:   func() []*cobra.Command { return []*cobra.Command{nodeCommand(), storeCommand(), doctorCommand()} },
	HasSetting: func(name string) bool { return option(name) != nil },
	NodeFiles:  nodeFiles,
}
