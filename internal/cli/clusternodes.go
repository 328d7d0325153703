//go:build linux

package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/spf13/cobra"

	"flotilla/internal/client"
	"flotilla/internal/nspawn"
)

// progress tells what happens to nodes that are made at the same time.
type progress struct {
	began time.Time
	mu    sync.Mutex // guards w
	w     io.Writer
}

func newProgress(w io.Writer) *progress { return &progress{began: time.Now(), w: w} }

func (p *progress) line(format string, args ...any) {
	p.mu.Lock()
	defer p.mu.Unlock()
	Say(p.w, format+"\n", args...)
}

func (p *progress) since() time.Duration { return time.Since(p.began).Round(100 * time.Millisecond) }

// each does the same to all names at once and returns all errors.
func each(names []string, do func(name string) error) error {
	failed := make([]error, len(names))
	var all sync.WaitGroup
	for i, name := range names {
		all.Go(func() { failed[i] = do(name) })
	}
	all.Wait()
	return errors.Join(failed...)
}

// nodeState is one node of a cluster on this machine.
type nodeState struct {
	nspawn.Machine
	State   string `json:"state"`             // joined, joining, off or incomplete
	Missing string `json:"missing,omitempty"` // until it has joined
}

// statesOf asks every node about itself and the others.
func statesOf(ctx context.Context, l local) ([]nodeState, error) {
	machines, err := l.List(ctx)
	if err != nil {
		return nil, err
	}
	var running, names []string
	for _, m := range machines {
		names = append(names, m.Name)
		if m.Running {
			running = append(running, m.Name)
		}
	}
	states := make([]nodeState, len(machines))
	for i, m := range machines {
		states[i] = nodeState{Machine: m, State: "off"}
		if !m.Complete {
			states[i].State, states[i].Missing = "incomplete", "flotilla cluster up finishes it"
		}
	}
	return states, each(running, func(name string) error {
		s := &states[slices.Index(names, name)]
		s.State, s.Missing = "joined", missing(ctx, socketOf(s.Machine), running)
		if s.Missing != "" {
			s.State = "joining"
		}
		return nil
	})
}

// nodeSocket is the name of the API's socket in a machine's Run.
const nodeSocket = "node.sock"

func socketOf(m nspawn.Machine) string { return filepath.Join(m.Run, nodeSocket) }

// missing returns what the node at the socket lacks to be part of a cluster of
// these nodes; empty if nothing.
func missing(ctx context.Context, socket string, nodes []string) string {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	asked := client.Dial(socket)
	st, err := asked.Status(ctx)
	switch {
	case err != nil:
		return "its API does not answer"
	case !st.Store.Live:
		return "it has not reached the store"
	case !st.Router.Serving:
		return "its router does not serve"
	}
	seen, err := asked.Nodes(ctx)
	if err != nil {
		return "it cannot list the nodes"
	}
	for _, name := range nodes {
		if !slices.ContainsFunc(seen.Nodes, func(n client.ClusterNode) bool { return n.Name == name && n.Serving }) {
			return "it does not see " + name
		}
	}
	return ""
}

// awaitJoined waits until all running nodes have joined, and tells of each.
func (c *cli) awaitJoined(ctx context.Context, l local, limit time.Duration, tell *progress) error {
	machines, err := l.List(ctx)
	if err != nil {
		return err
	}
	var names []string
	sockets := map[string]string{}
	for _, m := range machines {
		names = append(names, m.Name)
		sockets[m.Name] = socketOf(m)
	}
	wait, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	err = each(names, func(name string) error {
		tick := time.NewTicker(50 * time.Millisecond)
		defer tick.Stop()
		for {
			lacks := missing(wait, sockets[name], names)
			if lacks == "" {
				tell.line("%s/%s: joined after %s", l.Name(), name, tell.since())
				return nil
			}
			select {
			case <-tick.C:
			case <-wait.Done():
				return fmt.Errorf("node %s has not joined within %s: %s", name, limit, lacks)
			}
		}
	})
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if err != nil {
		return exitCode{hinted{err, []string{"flotilla cluster status " + l.Name(),
			"flotilla cluster shell --cluster " + l.Name() + " NODE journalctl -b -u 'flotilla-*'"}}, ExitNotConverged}
	}
	return nil
}

// onNode opens the cluster that has the node in args[0].
func (c *cli) onNode(do func(cmd *cobra.Command, l local, m nspawn.Machine, args []string) error) func(*cobra.Command, []string) error {
	return func(cmd *cobra.Command, args []string) error {
		l, err := openLocal(cmd, c.cluster, true)
		if err != nil {
			return err
		}
		machines, err := l.List(cmd.Context())
		if err != nil {
			return err
		}
		for _, m := range machines {
			if m.Name == args[0] {
				return do(cmd, l, m, args[1:])
			}
		}
		return c.noNode(l, args[0])
	}
}

// ofCluster adds the flag that says which cluster a node is in.
func (c *cli) ofCluster(cmd *cobra.Command) *cobra.Command {
	cmd.Flags().StringVar(&c.cluster, "cluster", "", "name of the cluster (also FLOTILLA_CLUSTER; default "+defaultCluster+")")
	return cmd
}

func (c *cli) clusterShell() *cobra.Command {
	cmd := &cobra.Command{
		Use: "shell NODE [COMMAND...]", Short: "Log in to a node as root, or run a command there", Args: Between(1, 1000, "a node"),
		Example: "  flotilla cluster shell n1\n  flotilla cluster shell n1 journalctl -u 'flotilla-*' -f",
		RunE: c.onNode(func(cmd *cobra.Command, l local, m nspawn.Machine, args []string) error {
			if !m.Running {
				return hinted{fmt.Errorf("node %s is off", m.Name), []string{"flotilla cluster power --cluster " + l.Name() + " " + m.Name + " on"}}
			}
			if len(args) == 0 {
				args = nil // a login shell, with a terminal
			}
			ssh := l.SSH(cmd.Context(), m.Name, shellWords(args)...)
			ssh.Stdin, ssh.Stdout, ssh.Stderr = os.Stdin, cmd.OutOrStdout(), cmd.ErrOrStderr()
			err := ssh.Run()
			var exit *exec.ExitError
			if errors.As(err, &exit) && exit.ExitCode() > 0 && exit.ExitCode() != 255 {
				return exitCode{ErrReported, exit.ExitCode()}
			}
			return err
		}),
	}
	cmd.Flags().SetInterspersed(false) // flags after the node are the command's
	return c.ofCluster(cmd)
}

// shellWords makes each argument one word for the shell at the other end; a single
// one is a whole command line.
func shellWords(args []string) []string {
	if len(args) < 2 {
		return args
	}
	words := make([]string, len(args))
	for i, a := range args {
		words[i] = "'" + strings.ReplaceAll(a, "'", `'\''`) + "'"
	}
	return words
}

func (c *cli) clusterConsole() *cobra.Command {
	return c.ofCluster(&cobra.Command{
		Use: "console NODE", Short: "Print what a node's console has said", Args: Between(1, 1, "a node"),
		RunE: c.onNode(func(cmd *cobra.Command, l local, m nspawn.Machine, _ []string) error {
			text, err := l.Console(cmd.Context(), m.Name)
			Say(cmd.OutOrStdout(), "%s", text)
			return err
		}),
	})
}

func (c *cli) clusterPower() *cobra.Command {
	return c.ofCluster(&cobra.Command{
		Use: "power NODE on|off|cut|reboot", Short: "Switch a node on or off; cut is a power failure", Args: Between(2, 2, "a node and on, off, cut or reboot"),
		RunE: c.onNode(func(cmd *cobra.Command, l local, m nspawn.Machine, args []string) error {
			ctx := cmd.Context()
			switch args[0] {
			case "on":
				return l.PowerOn(ctx, m.Name)
			case "off":
				return l.PowerOff(ctx, m.Name, powerOffLimit)
			case "cut":
				return l.PowerCut(ctx, m.Name)
			case "reboot":
				return l.Reboot(ctx, m.Name)
			}
			return Usage(fmt.Sprintf("%q is neither on, off, cut nor reboot", args[0]), cmd.UseLine())
		}),
	})
}

func (c *cli) clusterLink() *cobra.Command {
	return c.ofCluster(&cobra.Command{
		Use: "link NODE up|down", Short: "Plug a node's network in, or unplug it", Args: Between(2, 2, "a node and up or down"),
		RunE: c.onNode(func(cmd *cobra.Command, l local, m nspawn.Machine, args []string) error {
			switch args[0] {
			case "up":
				return l.RestoreLink(cmd.Context(), m.Name)
			case "down":
				return l.CutLink(cmd.Context(), m.Name)
			}
			return Usage(fmt.Sprintf("%q is neither up nor down", args[0]), cmd.UseLine())
		}),
	})
}
