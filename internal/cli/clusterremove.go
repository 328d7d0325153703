//go:build linux

package cli

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"flotilla/internal/nspawn"
)

func (c *cli) clusterRemove() *cobra.Command {
	force := false
	cmd := &cobra.Command{
		Use: "remove [NAME] NODE", Short: "Take a node out of its cluster and destroy it", Args: Between(1, 2, "a node, or a cluster and a node"),
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
				Say(cmd.ErrOrStderr(), "flotilla: the store still counts %s: %v\n", name, err)
			}
			if err := l.Destroy(cmd.Context(), name); err != nil {
				return err
			}
			g := wishes(l)
			g.nodes = len(machines) - 1
			if err := l.Found(cmd.Context(), g.labels()); err != nil {
				return err
			}
			Say(cmd.OutOrStdout(), "%s/%s: removed\n", l.Name(), name)
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
