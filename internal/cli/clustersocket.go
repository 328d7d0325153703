//go:build linux

package cli

import (
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"flotilla/internal/nspawn"
	"flotilla/internal/remote"
)

// clusterSocket chooses the socket that a command asks, if neither --socket nor
// FLOTILLA_SOCKET does: one of the cluster that --cluster names; else the one of
// the node on this machine; if that is not there, one of the only cluster that
// runs on this machine.
func (c *cli) clusterSocket(cmd *cobra.Command) error {
	given := cmd.Flags().Lookup("socket")
	if given == nil || given.Changed || os.Getenv("FLOTILLA_SOCKET") != "" && !cmd.Flags().Changed("cluster") {
		return nil
	}
	host := nspawn.Default(slog.New(slog.DiscardHandler))
	if c.cluster != "" {
		if _, err := host.Cluster(c.cluster); err != nil {
			return Usage(err.Error(), "flotilla cluster list")
		}
		var err error
		if c.socket, err = liveSocket(host, c.cluster); err != nil {
			return err
		}
		if c.socket == "" {
			return hinted{fmt.Errorf("no node of cluster %s on this machine answers", c.cluster), []string{"flotilla cluster up " + c.cluster, "flotilla cluster list"}}
		}
		return nil
	}
	if _, err := os.Stat(c.socket); err == nil {
		return nil
	}
	names, err := host.Clusters()
	if err != nil {
		return nil // not root: then there is only the node on this machine
	}
	running, socket := []string{}, ""
	for _, name := range names {
		if _, err := host.Cluster(name); err != nil {
			continue // not one of ours
		}
		if s, err := liveSocket(host, name); err == nil && s != "" {
			running, socket = append(running, name), s
		}
	}
	switch len(running) {
	case 0:
	case 1:
		c.socket = socket
		Say(cmd.ErrOrStderr(), "flotilla: asking cluster %s\n", running[0])
	default:
		return hinted{fmt.Errorf("no node runs on this machine itself, and several clusters do: %s", strings.Join(running, ", ")),
			[]string{"choose one: --cluster " + running[0] + ", or FLOTILLA_CLUSTER=" + running[0]}}
	}
	return nil
}

// liveSocket returns the socket of the first node of a cluster that takes a
// connection; empty if none does. It asks nothing else about the machines, which
// would take longer than most requests.
func liveSocket(host *nspawn.Host, cluster string) (string, error) {
	dir := filepath.Join(host.Run, cluster)
	machines, err := os.ReadDir(dir)
	if err != nil && !isMissing(err) {
		return "", err
	}
	for _, m := range machines {
		socket := filepath.Join(dir, m.Name(), "node.sock")
		if conn, err := net.Dial("unix", socket); err == nil {
			_ = conn.Close() // nothing was said
			return socket, nil
		}
	}
	return "", nil
}

// localLogin adds what the machines of a cluster on this host need: the cluster's
// key and what it knows of host keys. node is the name of the machine's node.
func (c *cli) localLogin(o *remote.Options, node string) {
	cluster := c.localCluster()
	if cluster == nil || node == "" {
		return
	}
	identity, known := cluster.Login()
	o.Identities = append(o.Identities, identity)
	o.HostKeys = remote.HostKeys{Files: []string{known}, Alias: node, Insecure: o.HostKeys.Insecure}
	if o.User == "" {
		o.User = "root"
	}
}

// localCluster returns the cluster on this host whose socket is asked; nil if it
// is another node's.
func (c *cli) localCluster() *nspawn.Cluster {
	socket := c.socket
	if path, ok := strings.CutPrefix(c.reach.endpoint, "unix://"); ok {
		socket = path
	}
	if c.reach.tunnel != "" {
		return nil
	}
	host := nspawn.Default(slog.New(slog.DiscardHandler))
	rest, below := strings.CutPrefix(socket, host.Run+"/")
	name, _, deeper := strings.Cut(rest, "/")
	if !below || !deeper {
		return nil
	}
	cluster, err := host.Cluster(name)
	if err != nil || !cluster.Exists() {
		return nil
	}
	return cluster
}
