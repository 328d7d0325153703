//go:build linux

package cli

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"flotilla/internal/provision"
	"flotilla/internal/text"
)

// onNode opens the cluster that has the node in args[0].
func (c *cli) onNode(do func(cmd *cobra.Command, l local, m provision.Machine, args []string) error) func(*cobra.Command, []string) error {
	return func(cmd *cobra.Command, args []string) error {
		l, err := openLocal(cmd, c.cluster, true)
		if err != nil {
			return err
		}
		machines, err := l.List(cmd.Context())
		if err != nil {
			return err
		}
		at := slices.IndexFunc(machines, func(m provision.Machine) bool { return m.Name == args[0] })
		if at < 0 {
			return hinted{fmt.Errorf("cluster %s has no node %s", l.Name(), args[0]), []string{"flotilla cluster status " + l.Name()}}
		}
		return do(cmd, l, machines[at], args[1:])
	}
}

// ofCluster adds the flag that says which cluster a node is in.
func (c *cli) ofCluster(cmd *cobra.Command) *cobra.Command {
	cmd.Flags().StringVar(&c.cluster, "cluster", os.Getenv("FLOTILLA_CLUSTER"), "name of the cluster (also FLOTILLA_CLUSTER; default "+defaultCluster+")")
	return cmd
}

func (c *cli) clusterShell() *cobra.Command {
	cmd := &cobra.Command{
		Use: "shell NODE [COMMAND...]", Short: "Log in to a node as root, or run a command there", Args: Between(1, 1000, "a node"),
		Example: "  flotilla cluster shell n1\n  flotilla cluster shell n1 journalctl -u 'flotilla-*' -f",
		RunE: c.onNode(func(cmd *cobra.Command, l local, m provision.Machine, args []string) error {
			if !m.Running {
				return hinted{fmt.Errorf("node %s is off", m.Name), []string{"flotilla cluster power --cluster " + l.Name() + " " + m.Name + " on"}}
			}
			err := l.Run(cmd.Context(), m.Name, commandLine(args), provision.Streams{In: os.Stdin, Out: cmd.OutOrStdout(), Err: cmd.ErrOrStderr()})
			var exit interface{ ExitCode() int }
			if errors.As(err, &exit) && exit.ExitCode() > 0 && exit.ExitCode() != 255 { // 255 is of ssh itself
				return exitCode{ErrReported, exit.ExitCode()}
			}
			return err
		}),
	}
	cmd.Flags().SetInterspersed(false) // flags after the node are the command's
	return c.ofCluster(cmd)
}

// commandLine makes each argument one word for the shell at the other end; a
// single one is a whole command line.
func commandLine(args []string) string {
	if len(args) == 1 {
		return args[0]
	}
	words := make([]string, len(args))
	for i, a := range args {
		words[i] = text.ShellQuote(a)
	}
	return strings.Join(words, " ")
}

func (c *cli) clusterConsole() *cobra.Command {
	return c.ofCluster(&cobra.Command{
		Use: "console NODE", Short: "Print what a node's console has said", Args: Between(1, 1, "a node"),
		RunE: c.onNode(func(cmd *cobra.Command, l local, m provision.Machine, _ []string) error {
			printed, err := l.Console(cmd.Context(), m.Name)
			Say(cmd.OutOrStdout(), "%s", printed)
			return err
		}),
	})
}

func (c *cli) clusterPower() *cobra.Command {
	return c.ofCluster(&cobra.Command{
		Use: "power NODE on|off|cut|reboot", Short: "Switch a node on or off; cut is a power failure", Args: Between(2, 2, "a node and on, off, cut or reboot"),
		RunE: c.onNode(func(cmd *cobra.Command, l local, m provision.Machine, args []string) error {
			to := provision.Power(args[0])
			if !slices.Contains([]provision.Power{provision.PowerOn, provision.PowerOff, provision.PowerCut, provision.Reboot}, to) {
				return Usage(fmt.Sprintf("%q is neither on, off, cut nor reboot", args[0]), cmd.UseLine())
			}
			return l.Power(cmd.Context(), m.Name, to)
		}),
	})
}

func (c *cli) clusterLink() *cobra.Command {
	return c.ofCluster(&cobra.Command{
		Use: "link NODE up|down", Short: "Plug a node's network in, or unplug it", Args: Between(2, 2, "a node and up or down"),
		RunE: c.onNode(func(cmd *cobra.Command, l local, m provision.Machine, args []string) error {
			if args[0] != "up" && args[0] != "down" {
				return Usage(fmt.Sprintf("%q is neither up nor down", args[0]), cmd.UseLine())
			}
			return l.SetLink(cmd.Context(), m.Name, args[0] == "up")
		}),
	})
}
