//go:build linux

package cli

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"flotilla/internal/nodeconfig"
	"flotilla/internal/nspawn"
	"flotilla/internal/provision"
	"flotilla/internal/text"
)

// growth is what up and add are told.
type growth struct {
	provision.Growth
	metadata []string
	settings []string
	keep     bool
}

func (c *cli) clusterUp() *cobra.Command {
	g := growth{}
	cmd := &cobra.Command{
		Use: "up [NAME]", Short: "Make and start a cluster, or what is missing of it", Args: Between(0, 1, "one name"),
		Long: `Make and start a cluster on this machine. What is there already is left as it is
and started, so that the command can be given again. The first time a root file
system is made from Debian's packages, which takes some minutes; it is cached.`,
		Example: `  flotilla cluster up
  flotilla cluster up old --nodes 1 --release bookworm`,
		RunE: func(cmd *cobra.Command, args []string) error {
			l, err := openLocal(cmd, argument(args, 0), false)
			if err != nil {
				return err
			}
			nodes, keep := l.wishes()
			if !cmd.Flags().Changed("nodes") && nodes > 0 {
				g.Nodes = nodes
			}
			if !cmd.Flags().Changed("keep") {
				g.keep = keep
			}
			if err := g.check(cmd); err != nil {
				return err
			}
			return g.reach(cmd, l, func(there int) int { return max(there, g.Nodes) })
		},
	}
	cmd.Flags().IntVar(&g.Nodes, "nodes", 3, "number of nodes")
	cmd.Flags().BoolVar(&g.keep, "keep", false, "let cluster down keep what the nodes have written, for the next up")
	g.flags(cmd)
	return cmd
}

func (c *cli) clusterAdd() *cobra.Command {
	g := growth{}
	cmd := &cobra.Command{
		Use: "add [NAME]", Short: "Add nodes to a cluster", Args: Between(0, 1, "one name"),
		Example: `  flotilla cluster add
  flotilla cluster add --metadata disk=ssd --release bookworm`,
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := g.check(cmd); err != nil {
				return err
			}
			l, err := openLocal(cmd, argument(args, 0), true)
			if err != nil {
				return err
			}
			_, g.keep = l.wishes()
			return g.reach(cmd, l, func(there int) int { return there + g.Nodes })
		},
	}
	cmd.Flags().IntVar(&g.Nodes, "nodes", 1, "number of nodes to add")
	g.flags(cmd)
	return cmd
}

func (g *growth) flags(cmd *cobra.Command) {
	cmd.Flags().StringVar(&g.Spec.Release, "release", nspawn.DefaultRelease, "release of Debian of new nodes: "+strings.Join(nspawn.Releases(), " or "))
	cmd.Flags().StringVar(&g.Programs.Flotillad, "binary", "", "`FLOTILLAD` of new nodes (default: the one beside this program, or in PATH)")
	cmd.Flags().StringArrayVar(&g.metadata, "metadata", nil, "`KEY=VALUE` that new nodes have as metadata (repeatable)")
	cmd.Flags().StringArrayVar(&g.settings, "set", nil, "`SETTING=VALUE` of flotillad node for new nodes, as machine-ttl=5 (repeatable)")
	cmd.Flags().DurationVar(&g.Limit, "timeout", 2*time.Minute, "how long the nodes may take to find each other")
}

// check finishes and checks what was given.
func (g *growth) check(cmd *cobra.Command) (err error) {
	bad := func(format string, args ...any) error {
		return Usage(fmt.Sprintf(format, args...), cmd.CommandPath()+" --help")
	}
	if g.Nodes < 1 || g.Nodes > 100 {
		return bad("--nodes %d is not a number of nodes from 1 to 100", g.Nodes)
	}
	if !slices.Contains(nspawn.Releases(), g.Spec.Release) {
		return bad("--release %q is neither %s", g.Spec.Release, strings.Join(nspawn.Releases(), " nor "))
	}
	g.Spec.Labels = map[string]string{}
	for _, m := range g.metadata {
		key, value, ok := strings.Cut(m, "=")
		if !ok || key == "" || strings.ContainsAny(m, ",\n") {
			return bad("--metadata %q is not KEY=VALUE", m)
		}
		g.Spec.Labels[key] = value
	}
	g.Settings = []nodeconfig.Setting{
		{Name: "insecure", Value: "true"}, // the network is this cluster's own: nobody else is on it
		{Name: "metadata", Value: strings.Join(g.metadata, ",")},
	}
	for _, given := range g.settings {
		key, value, _ := strings.Cut(given, "=")
		if value == "" || !nodeconfig.IsSetting(key) {
			return bad("--set %q is not SETTING=VALUE of flotillad node", given)
		}
		g.Settings = append(g.Settings, nodeconfig.Setting{Name: key, Value: value})
	}
	if g.Programs.Flotillad == "" {
		if g.Programs.Flotillad, err = daemon(); err != nil {
			return err
		}
	}
	if info, err := os.Stat(g.Programs.Flotillad); err != nil || !info.Mode().IsRegular() || info.Mode()&0o111 == 0 {
		return bad("--binary %s is not a program", g.Programs.Flotillad)
	}
	if g.Programs.Flotilla, err = os.Executable(); err != nil {
		return fmt.Errorf("find this program's own path: %w", err)
	}
	if _, err := nodeconfig.Files(g.Programs, g.Settings); err != nil {
		return Usage(err.Error(), "flotillad node --help")
	}
	return nil
}

// reach brings the cluster to as many nodes as number says, given how many there
// are, and prints what happens.
func (g *growth) reach(cmd *cobra.Command, l local, number func(there int) int) error {
	ctx, began := cmd.Context(), time.Now()
	say := func(format string, args ...any) { Say(cmd.OutOrStdout(), l.Name()+format+"\n", args...) }
	machines, err := l.List(ctx)
	if err != nil {
		return err
	}
	g.Nodes = number(len(machines))
	if err := l.Found(ctx, labels(g.Nodes, g.keep)); err != nil {
		return err
	}
	if release := g.Spec.Release; !l.host.ImageCached(release) {
		say(": making a root file system of Debian %s, once; this takes some minutes", release)
		if _, err := l.host.Image(ctx, release); err != nil {
			return err
		}
	}
	l.nodes.Tell = func(e provision.Event) {
		if e.Joined {
			say("/%s: joined after %s", e.Machine.Name, e.Took.Round(100*time.Millisecond))
			return
		}
		say("/%s: %s, Debian %s, booted after %s", e.Machine.Name, e.Machine.Address, e.Machine.Release, e.Took.Round(10*time.Millisecond))
	}
	err = l.nodes.Grow(ctx, g.Growth)
	if errors.Is(err, provision.ErrNotJoined) {
		return exitCode{hinted{err, []string{"flotilla cluster status " + l.Name(),
			"flotilla cluster shell --cluster " + l.Name() + " NODE journalctl -b -u 'flotilla-*'"}}, ExitNotConverged}
	}
	if err == nil {
		say(": %s, all joined after %s", text.Count(g.Nodes, "node"), time.Since(began).Round(100*time.Millisecond))
	}
	return err
}
