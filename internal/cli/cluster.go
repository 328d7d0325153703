//go:build linux

package cli

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"flotilla/internal/nspawn"
)

// defaultCluster is the cluster of who names none.
const defaultCluster = "tryout"

// How long a node may take to shut down before its power is cut.
const powerOffLimit = 30 * time.Second

func (c *cli) clusterCommand() *cobra.Command {
	cmd := group("cluster", "Run a whole cluster on this machine, to try things out",
		c.clusterUp(), c.clusterAdd(), c.clusterRemove(), c.clusterDown(), c.clusterList(), c.clusterStatus(),
		c.clusterShell(), c.clusterConsole(), c.clusterPower(), c.clusterLink())
	cmd.Long = `Run a whole cluster on this machine, to try things out. Each node is a machine of
its own in a container: Debian with systemd, HAProxy and this program, an address
on a private network and ssh. It needs root. A cluster without a name is called
` + defaultCluster + ` (or as FLOTILLA_CLUSTER says).`
	cmd.PersistentFlags().StringVarP(&c.output, "output", "o", "text", "text or json")
	cmd.PersistentPreRunE = func(cmd *cobra.Command, _ []string) error { return c.checkOutput(cmd) }
	return cmd
}

// local is the cluster on this machine that a command is about.
type local struct {
	*nspawn.Cluster
	host *nspawn.Host
}

// localHost returns this machine as a host of clusters.
func localHost(w io.Writer) (*nspawn.Host, error) {
	h := nspawn.Default(slog.New(slog.NewTextHandler(w, &slog.HandlerOptions{Level: slog.LevelWarn})))
	err := h.Check()
	var missing *nspawn.MissingTools
	switch {
	case errors.Is(err, nspawn.ErrNotRoot):
		return nil, hinted{err, []string{"sudo " + strings.Join(os.Args, " ")}}
	case errors.As(err, &missing):
		return nil, hinted{err, []string{"apt-get install " + strings.Join(missing.Packages, " ")}}
	}
	return h, err
}

// openLocal returns the cluster of that name; without one, the one that
// FLOTILLA_CLUSTER names, or the usual one. It fails if the cluster has to be
// there and is not.
func openLocal(cmd *cobra.Command, name string, there bool) (local, error) {
	h, err := localHost(cmd.ErrOrStderr())
	if err != nil {
		return local{}, err
	}
	name = cmp.Or(name, os.Getenv("FLOTILLA_CLUSTER"), defaultCluster)
	cl, err := h.Cluster(name)
	if err != nil {
		return local{}, Usage(err.Error(), cmd.CommandPath()+" --help")
	}
	if there && !cl.Exists() {
		return local{}, hinted{fmt.Errorf("there is no cluster %s on this machine", name), []string{"flotilla cluster list", "flotilla cluster up " + name}}
	}
	return local{cl, h}, nil
}

func argument(args []string, i int) string {
	if i < len(args) {
		return args[i]
	}
	return ""
}

func (c *cli) clusterDown() *cobra.Command {
	keep := false
	cmd := &cobra.Command{
		Use: "down [NAME]", Short: "Stop a cluster and remove all of it", Args: Between(0, 1, "one name"),
		Long: `Stop a cluster and remove all of it: machines, network and what they have written.
With --keep, given here or to up, the nodes shut down and their data stay for the
next up; --keep=false removes them nevertheless.`,
		RunE: func(cmd *cobra.Command, args []string) error {
			l, err := openLocal(cmd, argument(args, 0), false)
			if err != nil {
				return err
			}
			w, was := cmd.OutOrStdout(), l.Exists()
			if !cmd.Flags().Changed("keep") {
				keep = wishes(l).keep
			}
			if keep && was {
				if err := l.Stop(cmd.Context(), powerOffLimit); err != nil {
					return err
				}
				Say(w, "%s: stopped; flotilla cluster up %s starts it again\n", l.Name(), l.Name())
				return nil
			}
			// What a damaged record leaves behind is removed too.
			if err := l.Remove(cmd.Context()); err != nil {
				return err
			}
			if !was {
				Say(w, "%s: there is no such cluster on this machine\n", l.Name())
				return nil
			}
			Say(w, "%s: removed\n", l.Name())
			return nil
		},
	}
	cmd.Flags().BoolVar(&keep, "keep", false, "keep what the nodes have written, for the next up")
	return cmd
}

func (c *cli) clusterList() *cobra.Command {
	return &cobra.Command{
		Use: "list", Short: "List the clusters on this machine", Args: Between(0, 0, ""),
		RunE: func(cmd *cobra.Command, _ []string) error {
			h, err := localHost(cmd.ErrOrStderr())
			if err != nil {
				return err
			}
			names, err := h.Clusters()
			if err != nil {
				return err
			}
			type line struct {
				Name    string `json:"name"`
				Nodes   int    `json:"nodes"`
				Running int    `json:"running"`
				Network string `json:"network"`
			}
			lines := []line{}
			rows := [][]string{{"CLUSTER", "NODES", "RUNNING", "NETWORK"}}
			for _, name := range names {
				cl, err := h.Cluster(name)
				if err != nil {
					continue // not one of ours
				}
				machines, err := cl.List(cmd.Context())
				if err != nil {
					return err
				}
				_, prefix, err := cl.Labels()
				if err != nil && !errors.Is(err, nspawn.ErrNotFound) {
					return err
				}
				l := line{Name: name, Nodes: len(machines), Network: prefix.String()}
				for _, m := range machines {
					if m.Running {
						l.Running++
					}
				}
				lines = append(lines, l)
				rows = append(rows, []string{l.Name, strconv.Itoa(l.Nodes), strconv.Itoa(l.Running), l.Network})
			}
			if c.output == "json" {
				return SayJSON(cmd.OutOrStdout(), lines)
			}
			if len(lines) == 0 {
				Say(cmd.OutOrStdout(), "no clusters on this machine; flotilla cluster up makes one\n")
				return nil
			}
			table(cmd.OutOrStdout(), rows...)
			return nil
		},
	}
}

func (c *cli) clusterStatus() *cobra.Command {
	return &cobra.Command{
		Use: "status [NAME]", Short: "Show the nodes of a cluster on this machine", Args: Between(0, 1, "one name"),
		RunE: func(cmd *cobra.Command, args []string) error {
			l, err := openLocal(cmd, argument(args, 0), true)
			if err != nil {
				return err
			}
			states, err := statesOf(cmd.Context(), l)
			if err != nil {
				return err
			}
			if c.output == "json" {
				return SayJSON(cmd.OutOrStdout(), states)
			}
			rows := [][]string{{"NODE", "ADDRESS", "DEBIAN", "STATE", "METADATA", ""}}
			for _, s := range states {
				var metadata []string
				for _, k := range slices.Sorted(maps.Keys(s.Labels)) {
					metadata = append(metadata, k+"="+s.Labels[k])
				}
				rows = append(rows, []string{s.Name, s.Address.String(), s.Release, s.State, dash(strings.Join(metadata, ",")), s.Missing})
			}
			table(cmd.OutOrStdout(), rows...)
			return nil
		},
	}
}
