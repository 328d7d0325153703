//go:build !linux

package cli

import (
	"errors"

	"github.com/spf13/cobra"

	"flotilla/internal/remote"
)

var errNotHere = errors.New("flotilla cluster runs machines in containers of Linux, and this is another system")

func (c *cli) clusterCommand() *cobra.Command {
	return &cobra.Command{
		Use: "cluster", Short: "Run a whole cluster on this machine, which has to be Linux",
		DisableFlagParsing: true,
		RunE: func(*cobra.Command, []string) error {
			return hinted{errNotHere, []string{"run it in a virtual machine, and give these commands --tunnel USER@MACHINE"}}
		},
	}
}

// clusterSocket leaves the socket as it is: no cluster runs on this machine.
func (c *cli) clusterSocket(*cobra.Command) error {
	if c.cluster != "" {
		return errNotHere
	}
	return nil
}

func (c *cli) localLogin(*remote.Options, string) {}
