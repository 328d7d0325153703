//go:build linux

package cli

import (
	"context"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"flotilla/internal/nodeconfig"
	"flotilla/internal/nspawn"
)

// growth is what up and add are told.
type growth struct {
	nodes    int
	release  string
	binary   string
	metadata []string
	settings []string
	limit    time.Duration
	keep     bool
}

func (g *growth) flags(cmd *cobra.Command) {
	cmd.Flags().StringVar(&g.release, "release", nspawn.DefaultRelease, "release of Debian of new nodes: "+strings.Join(nspawn.Releases(), " or "))
	cmd.Flags().StringVar(&g.binary, "binary", "", "`FLOTILLAD` of new nodes (default: the one beside this program, or in PATH)")
	cmd.Flags().StringArrayVar(&g.metadata, "metadata", nil, "`KEY=VALUE` that new nodes have as metadata (repeatable)")
	cmd.Flags().StringArrayVar(&g.settings, "set", nil, "`SETTING=VALUE` of flotillad node for new nodes, as machine-ttl=5 (repeatable)")
	cmd.Flags().DurationVar(&g.limit, "timeout", 2*time.Minute, "how long the nodes may take to find each other")
}

// check finishes and checks what was given.
func (g *growth) check(cmd *cobra.Command) error {
	bad := func(format string, args ...any) error {
		return Usage(fmt.Sprintf(format, args...), cmd.CommandPath()+" --help")
	}
	if g.nodes < 1 || g.nodes > 100 {
		return bad("--nodes %d is not a number of nodes from 1 to 100", g.nodes)
	}
	if !slices.Contains(nspawn.Releases(), g.release) {
		return bad("--release %q is neither %s", g.release, strings.Join(nspawn.Releases(), " nor "))
	}
	for _, m := range g.metadata {
		if key, _, ok := strings.Cut(m, "="); !ok || key == "" || strings.ContainsAny(m, ",\n") {
			return bad("--metadata %q is not KEY=VALUE", m)
		}
	}
	for _, given := range g.settings {
		key, value, _ := strings.Cut(given, "=")
		if value == "" || !nodeconfig.IsSetting(key) {
			return bad("--set %q is not SETTING=VALUE of flotillad node", given)
		}
	}
	if g.binary == "" {
		path, err := daemon()
		if err != nil {
			return err
		}
		g.binary = path
	}
	if info, err := os.Stat(g.binary); err != nil || !info.Mode().IsRegular() || info.Mode()&0o111 == 0 {
		return bad("--binary %s is not a program", g.binary)
	}
	return nil
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
			told := wishes(l)
			if !cmd.Flags().Changed("nodes") && told.nodes > 0 {
				g.nodes = told.nodes
			}
			if !cmd.Flags().Changed("keep") {
				g.keep = told.keep
			}
			if err := g.check(cmd); err != nil {
				return err
			}
			return c.grow(cmd, l, g, func(there []string) int { return g.nodes - len(there) })
		},
	}
	cmd.Flags().IntVar(&g.nodes, "nodes", 3, "number of nodes")
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
			g.keep = wishes(l).keep
			return c.grow(cmd, l, g, func([]string) int { return g.nodes })
		},
	}
	cmd.Flags().IntVar(&g.nodes, "nodes", 1, "number of nodes to add")
	g.flags(cmd)
	return cmd
}

// wishes is what an earlier up was told about the cluster: a zero growth if
// there was none.
func wishes(l local) growth {
	labels, _, err := l.Labels()
	if err != nil {
		return growth{}
	}
	nodes, _ := strconv.Atoi(labels["nodes"])
	return growth{nodes: nodes, keep: labels["keep"] == "yes"}
}

func (g growth) labels() map[string]string {
	return map[string]string{"nodes": strconv.Itoa(g.nodes), "keep": yes(g.keep)}
}

// grow adds as many nodes as missing says, given those that are there, starts
// all and waits until they see each other.
func (c *cli) grow(cmd *cobra.Command, l local, g growth, missing func(there []string) int) error {
	ctx, tell := cmd.Context(), newProgress(cmd.OutOrStdout())
	machines, err := l.List(ctx)
	if err != nil {
		return err
	}
	var there []string
	made := false // one is complete
	for _, m := range machines {
		there = append(there, m.Name)
		made = made || m.Complete
	}
	names := slices.Concat(there, newNames(there, missing(there)))
	g.nodes = len(names)
	if err := l.Found(ctx, g.labels()); err != nil {
		return err
	}
	if !l.host.ImageCached(g.release) {
		tell.line("%s: making a root file system of Debian %s, once; this takes some minutes", l.Name(), g.release)
		if _, err := l.host.Image(ctx, g.release); err != nil {
			return err
		}
	}
	// The first node founds the store and the others join it. It is complete
	// before any other is begun, so that a second try makes it the same way.
	first := 0
	if !made {
		first = 1
		if err := c.start(ctx, l, g, names[0], nil, tell); err != nil {
			return err
		}
	}
	if err := each(names[first:], func(name string) error {
		return c.start(ctx, l, g, name, otherNames(names, name), tell)
	}); err != nil {
		return err
	}
	if err := c.awaitJoined(ctx, l, g.limit, tell); err != nil {
		return err
	}
	tell.line("%s: %s, all joined after %s", l.Name(), count(len(names), "node"), tell.since())
	return nil
}

// newNames returns the first n of n1, n2 and so on that are not taken.
func newNames(taken []string, n int) []string {
	var names []string
	for i := 1; len(names) < n; i++ {
		if name := fmt.Sprintf("n%d", i); !slices.Contains(taken, name) {
			names = append(names, name)
		}
	}
	return names
}

func otherNames(names []string, name string) []string {
	return slices.DeleteFunc(slices.Clone(names), func(n string) bool { return n == name })
}

// start makes and boots one node.
func (c *cli) start(ctx context.Context, l local, g growth, name string, join []string, tell *progress) error {
	began := time.Now()
	self, err := os.Executable()
	if err != nil {
		return fmt.Errorf("find this program's own path: %w", err)
	}
	texts, err := nodeconfig.Files(nodeconfig.Programs{Flotilla: self, Flotillad: g.binary}, nodeSettings(l.host, g, name, join))
	if err != nil {
		return Usage(err.Error(), "flotillad node --help")
	}
	var files []nspawn.File
	for _, f := range texts {
		files = append(files, nspawn.File(f))
	}
	labels := map[string]string{}
	for _, m := range g.metadata {
		key, value, _ := strings.Cut(m, "=")
		labels[key] = value
	}
	before, err := l.List(ctx)
	if err != nil {
		return err
	}
	m, err := l.Create(ctx, nspawn.Spec{Name: name, Release: g.release, Labels: labels, Files: files})
	if err != nil {
		return err
	}
	if slices.ContainsFunc(before, func(b nspawn.Machine) bool { return b.Name == name && b.Running }) {
		return nil
	}
	tell.line("%s/%s: %s, Debian %s, booted after %s", l.Name(), name, m.Address, m.Release, time.Since(began).Round(10*time.Millisecond))
	return nil
}

// nodeSettings are those of a node of the cluster.
func nodeSettings(h *nspawn.Host, g growth, name string, join []string) []nodeconfig.Setting {
	upstream := "none"
	var servers []string
	for _, a := range h.Nameservers() {
		servers = append(servers, a.String())
	}
	if len(servers) > 0 {
		upstream = strings.Join(servers, ",")
	}
	settings := []nodeconfig.Setting{
		{Name: "name", Value: name}, {Name: "insecure", Value: "true"}, // the network is this cluster's own: nobody else is on it
		{Name: "join", Value: strings.Join(join, ",")}, {Name: "dns-upstream", Value: upstream}, {Name: "metadata", Value: strings.Join(g.metadata, ",")},
	}
	for _, given := range g.settings {
		key, value, _ := strings.Cut(given, "=")
		settings = append(settings, nodeconfig.Setting{Name: key, Value: value})
	}
	return settings
}
