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

	"github.com/spf13/cobra"

	"flotilla/internal/nspawn"
	"flotilla/internal/provision"
)

// defaultCluster is the cluster that a command is about if it names none.
const defaultCluster = "tryout"

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
	host  *nspawn.Host
	nodes *provision.Cluster // its machines as nodes
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
	return local{cl, h, &provision.Cluster{Provider: cl, Name: name}}, nil
}

func argument(args []string, i int) string {
	if i < len(args) {
		return args[i]
	}
	return ""
}

// wishes returns what an earlier up was told about the cluster: the number of
// nodes, and whether down keeps their data. They are 0 and false if there was none.
func (l local) wishes() (nodes int, keep bool) {
	labels, _, _ := l.Labels()
	nodes, _ = strconv.Atoi(labels["nodes"])
	return nodes, labels["keep"] == "yes"
}

func labels(nodes int, keep bool) map[string]string {
	return map[string]string{"nodes": strconv.Itoa(nodes), "keep": yes(keep)}
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
			if !cmd.Flags().Changed("keep") {
				_, keep = l.wishes()
			}
			was, said := l.Exists(), "removed"
			switch {
			case was && keep:
				err, said = l.Stop(cmd.Context()), "stopped; flotilla cluster up "+l.Name()+" starts it again"
			case was:
				err = l.Remove(cmd.Context())
			default: // what a damaged record leaves behind is removed too
				err, said = l.Remove(cmd.Context()), "there is no such cluster on this machine"
			}
			if err == nil {
				Say(cmd.OutOrStdout(), "%s: %s\n", l.Name(), said)
			}
			return err
		},
	}
	cmd.Flags().BoolVar(&keep, "keep", false, "keep what the nodes have written, for the next up")
	return cmd
}

func (c *cli) clusterRemove() *cobra.Command {
	force := false
	cmd := &cobra.Command{
		Use: "remove [NAME] NODE", Short: "Take a node out of its cluster and destroy it", Args: Between(1, 2, "a node, or a cluster and a node"),
		Long: `Take a node out of its cluster's store and destroy it with all it has written. With
--force it is destroyed even if the store cannot be told.`,
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) == 2 {
				c.cluster, args = args[0], args[1:]
			}
			return c.onNode(func(cmd *cobra.Command, l local, m provision.Machine, _ []string) error {
				return l.remove(cmd, m.Name, force)
			})(cmd, args)
		},
	}
	cmd.Flags().BoolVar(&force, "force", false, "destroy it even if the store cannot be told")
	return cmd
}

func (l local) remove(cmd *cobra.Command, name string, force bool) error {
	ctx := cmd.Context()
	machines, err := l.List(ctx)
	if err != nil {
		return err
	}
	if len(machines) == 1 {
		return hinted{fmt.Errorf("%s is the only node of cluster %s", name, l.Name()), []string{"flotilla cluster down " + l.Name()}}
	}
	if err := l.nodes.Leave(ctx, name); err != nil {
		if !force {
			return hinted{fmt.Errorf("take %s out of the store: %w", name, err), []string{"destroy it all the same: " + cmd.CommandPath() + " --force " + l.Name() + " " + name}}
		}
		Say(cmd.ErrOrStderr(), "flotilla: the store still counts %s: %v\n", name, err)
	}
	if err := l.Destroy(ctx, name); err != nil {
		return err
	}
	_, keep := l.wishes()
	if err := l.Found(ctx, labels(len(machines)-1, keep)); err != nil {
		return err
	}
	Say(cmd.OutOrStdout(), "%s/%s: removed\n", l.Name(), name)
	return nil
}

func (c *cli) clusterList() *cobra.Command {
	return &cobra.Command{
		Use: "list", Short: "List the clusters on this machine", Args: Between(0, 0, ""),
		RunE: func(cmd *cobra.Command, _ []string) error {
			h, err := localHost(cmd.ErrOrStderr())
			if err != nil {
				return err
			}
			clusters, err := h.Summaries(cmd.Context())
			if err != nil {
				return err
			}
			if c.output == "json" {
				return SayJSON(cmd.OutOrStdout(), clusters)
			}
			if len(clusters) == 0 {
				Say(cmd.OutOrStdout(), "no clusters on this machine; flotilla cluster up makes one\n")
				return nil
			}
			rows := [][]string{{"CLUSTER", "NODES", "RUNNING", "NETWORK"}}
			for _, s := range clusters {
				rows = append(rows, []string{s.Name, strconv.Itoa(s.Machines), strconv.Itoa(s.Running), s.Network.String()})
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
			nodes, err := l.nodes.Nodes(cmd.Context())
			if err != nil {
				return err
			}
			rows := [][]string{{"NODE", "ADDRESS", "DEBIAN", "STATE", "METADATA", ""}}
			for i := range nodes {
				n := &nodes[i]
				if !n.Complete {
					n.Missing = "flotilla cluster up finishes it"
				}
				var metadata []string
				for _, k := range slices.Sorted(maps.Keys(n.Labels)) {
					metadata = append(metadata, k+"="+n.Labels[k])
				}
				rows = append(rows, []string{n.Name, n.Address.String(), n.Release, n.State, dash(strings.Join(metadata, ",")), n.Missing})
			}
			if c.output == "json" {
				return SayJSON(cmd.OutOrStdout(), nodes)
			}
			table(cmd.OutOrStdout(), rows...)
			return nil
		},
	}
}
