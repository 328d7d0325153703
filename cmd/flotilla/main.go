// Command flotilla is what people type; called fleetctl it speaks as fleet's did.
package main

import (
	"os"

	"flotilla/internal/cli"
)

func main() { os.Exit(cli.Run(os.Args, os.Stdout, os.Stderr)) }
