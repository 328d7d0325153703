package main

import (
	"cmp"
	"context"
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

	"flotilla/internal/node"
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
		return local{}, usage(err.Error(), cmd.CommandPath()+" --help")
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
	cmd.Flags().StringVar(&g.binary, "binary", "", "flotilla `PROGRAM` of new nodes (default: this one)")
	cmd.Flags().StringArrayVar(&g.metadata, "metadata", nil, "`KEY=VALUE` that new nodes have as metadata (repeatable)")
	cmd.Flags().StringArrayVar(&g.settings, "set", nil, "`SETTING=VALUE` of flotilla node for new nodes, as machine-ttl=5 (repeatable)")
	cmd.Flags().DurationVar(&g.limit, "timeout", 2*time.Minute, "how long the nodes may take to find each other")
}

// check finishes and checks what was given.
func (g *growth) check(cmd *cobra.Command) error {
	bad := func(format string, args ...any) error {
		return usage(fmt.Sprintf(format, args...), cmd.CommandPath()+" --help")
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
		if _, ok := settingLine(key, value); !ok || value == "" {
			return bad("--set %q is not SETTING=VALUE of flotilla node", given)
		}
	}
	if g.binary == "" {
		self, err := os.Executable()
		if err != nil {
			return fmt.Errorf("find this program's own path: %w", err)
		}
		g.binary = self
	}
	if info, err := os.Stat(g.binary); err != nil || !info.Mode().IsRegular() || info.Mode()&0o111 == 0 {
		return bad("--binary %s is not a program", g.binary)
	}
	return nil
}

func (c *cli) clusterUp() *cobra.Command {
	g := growth{}
	cmd := &cobra.Command{
		Use: "up [NAME]", Short: "Make and start a cluster, or what is missing of it", Args: between(0, 1, "one name"),
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
		Use: "add [NAME]", Short: "Add nodes to a cluster", Args: between(0, 1, "one name"),
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
	files, err := nodeFiles(l.host, g, name, join)
	if err != nil {
		return err
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

// Where things are on a node.
const (
	nodeProgram = "/usr/local/bin/flotilla"
	nodeConfig  = "/etc/flotilla/node.yaml"
)

// nodeFiles returns what makes a Debian machine a node of the cluster.
func nodeFiles(h *nspawn.Host, g growth, name string, join []string) ([]nspawn.File, error) {
	upstream := "none"
	var servers []string
	for _, a := range h.Nameservers() {
		servers = append(servers, a.String())
	}
	if len(servers) > 0 {
		upstream = strings.Join(servers, ",")
	}
	cfg := node.Config{}
	cfg.Data, cfg.ConfigFile, cfg.HAProxy = "/var/lib/flotilla", nodeConfig, "/usr/sbin/haproxy"
	units, err := node.Units(&cfg, nodeProgram)
	if err != nil {
		return nil, err
	}
	// The network is this cluster's own: nobody else is on it.
	settings := [][2]string{
		{"name", name}, {"data", cfg.Data}, {"insecure", "true"}, {"join", strings.Join(join, ",")}, {"dns-upstream", upstream},
		{"metadata", strings.Join(g.metadata, ",")},
	}
	for _, given := range g.settings {
		key, value, _ := strings.Cut(given, "=")
		settings = slices.DeleteFunc(settings, func(s [2]string) bool { return s[0] == key })
		settings = append(settings, [2]string{key, value})
	}
	text := "# Written by flotilla cluster.\n"
	for _, s := range settings {
		if s[1] == "" {
			continue
		}
		line, ok := settingLine(s[0], s[1])
		if !ok {
			return nil, usage("nodes of this version have no "+s[0], "flotilla node --help")
		}
		text += line
	}
	files := []nspawn.File{
		{Path: nodeProgram, Source: g.binary, Mode: 0o755},
		{Path: "/usr/local/bin/fleetctl", Link: "flotilla"},
		{Path: "/usr/local/bin/fleetd", Link: "flotilla"},
		{Path: nodeConfig, Text: text},
	}
	for _, u := range units {
		path := "/etc/systemd/system/" + u.Name
		files = append(files, nspawn.File{Path: path, Text: u.Text},
			nspawn.File{Path: "/etc/systemd/system/multi-user.target.wants/" + u.Name, Link: path})
	}
	return files, nil
}

// settingLine returns a setting of a node as a line of its configuration file.
func settingLine(name, value string) (line string, ok bool) {
	for _, o := range new(node.Config).Options() {
		if o.Name != name {
			continue
		}
		if o.Value.Type() != "list" {
			return name + ": " + value + "\n", true
		}
		var quoted []string
		for v := range strings.SplitSeq(value, ",") {
			quoted = append(quoted, strconv.Quote(v))
		}
		return name + ": [" + strings.Join(quoted, ", ") + "]\n", true
	}
	return "", false
}

func (c *cli) clusterRemove() *cobra.Command {
	force := false
	cmd := &cobra.Command{
		Use: "remove [NAME] NODE", Short: "Take a node out of its cluster and destroy it", Args: between(1, 2, "a node, or a cluster and a node"),
		Long: `Take a node out of its cluster's store and destroy it with all it has written. With
--force it is destroyed even if the store cannot be told.`,
		RunE: func(cmd *cobra.Command, args []string) error {
			name := args[len(args)-1]
			cluster := ""
			if len(args) == 2 {
				cluster = args[0]
			}
			l, err := openLocal(cmd, cluster, true)
			if err != nil {
				return err
			}
			machines, err := l.List(cmd.Context())
			if err != nil {
				return err
			}
			at := slices.IndexFunc(machines, func(m nspawn.Machine) bool { return m.Name == name })
			if at < 0 {
				return c.noNode(l, name)
			}
			if len(machines) == 1 {
				return hinted{fmt.Errorf("%s is the only node of cluster %s", name, l.Name()), []string{"flotilla cluster down " + l.Name()}}
			}
			if err := leaveStore(cmd.Context(), l, machines[at], machines); err != nil {
				if !force {
					return hinted{fmt.Errorf("take %s out of the store: %w", name, err), []string{"destroy it all the same: " + cmd.CommandPath() + " --force " + l.Name() + " " + name}}
				}
				say(cmd.ErrOrStderr(), "flotilla: the store still counts %s: %v\n", name, err)
			}
			if err := l.Destroy(cmd.Context(), name); err != nil {
				return err
			}
			g := wishes(l)
			g.nodes = len(machines) - 1
			if err := l.Found(cmd.Context(), g.labels()); err != nil {
				return err
			}
			say(cmd.OutOrStdout(), "%s/%s: removed\n", l.Name(), name)
			return nil
		},
	}
	cmd.Flags().BoolVar(&force, "force", false, "destroy it even if the store cannot be told")
	return cmd
}

// noNode says that a cluster has no node of that name.
func (c *cli) noNode(l local, name string) error {
	return hinted{fmt.Errorf("cluster %s has no node %s", l.Name(), name), []string{"flotilla cluster status " + l.Name()}}
}

// How long a store may take to be healthy enough to let a member go.
const leaveLimit = time.Minute

// leaveStore removes the machine's member from the store, by way of another
// machine. That it has none is no error.
func leaveStore(ctx context.Context, l local, leaving nspawn.Machine, all []nspawn.Machine) error {
	ctx, cancel := context.WithTimeout(ctx, leaveLimit)
	defer cancel()
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for {
		err := tryLeave(ctx, l, leaving, all)
		// etcd counts members that have started a few seconds ago as absent.
		if err == nil || !strings.Contains(err.Error(), "unhealthy cluster") {
			return err
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return err
		}
	}
}

func tryLeave(ctx context.Context, l local, leaving nspawn.Machine, all []nspawn.Machine) error {
	err := errors.New("no other node runs")
	for _, m := range all {
		if !m.Running || m.Name == leaving.Name {
			continue
		}
		var members string
		// Nodes whose store is no member have no etcd to ask.
		etcdctl := "ETCDCTL_API=3 etcdctl --endpoints=http://" + m.Address.String() + ":2379 member "
		if members, err = onMachine(ctx, l, m.Name, etcdctl+"list"); err != nil {
			continue
		}
		id := memberAt(members, leaving.Address.String())
		if id == "" {
			return nil
		}
		if _, err = onMachine(ctx, l, m.Name, etcdctl+"remove "+id); err == nil {
			return nil
		}
	}
	return err
}

// memberAt returns the ID of the member with that address in what etcdctl
// member list prints: ID, state, name, peer URLs and more, by commas.
func memberAt(list, address string) string {
	for line := range strings.Lines(list) {
		fields := strings.Split(line, ", ")
		if len(fields) > 3 && fields[3] == "http://"+address+":2380" {
			return fields[0]
		}
	}
	return ""
}

func onMachine(ctx context.Context, l local, name, command string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	cmd := l.SSH(ctx, name, command)
	var complaint strings.Builder
	cmd.Stderr = &complaint
	out, err := cmd.Output()
	if err != nil {
		lines := strings.Split(strings.TrimSpace(complaint.String()), "\n")
		err = fmt.Errorf("on %s: %w: %s", name, err, lines[len(lines)-1])
	}
	return string(out), err
}

func (c *cli) clusterDown() *cobra.Command {
	keep := false
	cmd := &cobra.Command{
		Use: "down [NAME]", Short: "Stop a cluster and remove all of it", Args: between(0, 1, "one name"),
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
				say(w, "%s: stopped; flotilla cluster up %s starts it again\n", l.Name(), l.Name())
				return nil
			}
			// What a damaged record leaves behind is removed too.
			if err := l.Remove(cmd.Context()); err != nil {
				return err
			}
			if !was {
				say(w, "%s: there is no such cluster on this machine\n", l.Name())
				return nil
			}
			say(w, "%s: removed\n", l.Name())
			return nil
		},
	}
	cmd.Flags().BoolVar(&keep, "keep", false, "keep what the nodes have written, for the next up")
	return cmd
}

func (c *cli) clusterList() *cobra.Command {
	return &cobra.Command{
		Use: "list", Short: "List the clusters on this machine", Args: between(0, 0, ""),
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
				return sayJSON(cmd.OutOrStdout(), lines)
			}
			if len(lines) == 0 {
				say(cmd.OutOrStdout(), "no clusters on this machine; flotilla cluster up makes one\n")
				return nil
			}
			table(cmd.OutOrStdout(), rows...)
			return nil
		},
	}
}

func (c *cli) clusterStatus() *cobra.Command {
	return &cobra.Command{
		Use: "status [NAME]", Short: "Show the nodes of a cluster on this machine", Args: between(0, 1, "one name"),
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
				return sayJSON(cmd.OutOrStdout(), states)
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
