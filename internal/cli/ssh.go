package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/url"
	"os"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"flotilla/internal/client"
	"flotilla/internal/remote"
	"flotilla/internal/wire"
)

func (c *cli) sshCommand() *cobra.Command {
	var node, unit string
	var forward bool
	var port int
	cmd := &cobra.Command{
		Use: "ssh [NODE|UNIT] [COMMAND...]", Short: "Log in to a node, or run a command there",
		Long: `Log in to a node by ssh, or run a command there. The node is given by its name, its ID
or the beginning of it, its address, or a unit that runs on it. With --tunnel the way
goes through the entry node. The exit code is the command's.`,
		Example: "  flotilla ssh n2\n  flotilla ssh web@1.service journalctl -u web@1 -f\n  flotilla ssh --tunnel core@edge.example.com n2 uptime",
		RunE: func(cmd *cobra.Command, args []string) error {
			switch {
			case port < 1 || port > 65535:
				return Usage(fmt.Sprintf("--ssh-port %d is not a port", port), cmd.CommandPath()+" --help")
			case node != "" && unit != "":
				return Usage("--machine and --unit exclude each other", "give one of them")
			case node == "" && unit == "" && len(args) == 0:
				return Usage("ssh needs a node or a unit", "list them with: flotilla list-machines")
			}
			var n wire.NodeRef
			var err error
			switch {
			case node != "":
				n, err = c.node(cmd.Context(), node)
			case unit != "":
				n, err = c.nodeOf(cmd.Context(), unit)
			default:
				n, err = c.nodeOrUnit(cmd.Context(), args[0])
				args = args[1:]
			}
			if err != nil {
				return err
			}
			to := remote.Target{User: c.reach.username, Host: n.Address, Port: port}
			return c.runThere(cmd, n, to, strings.Join(args, " "), forward) // as ssh does: the shell there takes it apart
		},
	}
	cmd.Flags().StringVar(&node, "machine", "", "the node, so that all arguments are the command")
	cmd.Flags().StringVar(&unit, "unit", "", "a unit on the node, so that all arguments are the command")
	cmd.Flags().BoolVarP(&forward, "forward-agent", "A", false, "let the node use the keys of the local ssh-agent")
	cmd.Flags().IntVar(&port, "ssh-port", remote.DefaultPort, "port of sshd on the node")
	cmd.Flags().SetInterspersed(false) // flags after the node are the command's
	return c.unitFlags(cmd)
}

// node returns the node that somebody means.
func (c *cli) node(ctx context.Context, name string) (wire.NodeRef, error) {
	n, err := client.Get[wire.Node](ctx, c.dial(), "/v1/nodes/"+url.PathEscape(name), nil)
	return wire.NodeRef{ID: n.ID, Name: n.Name, Address: n.Address}, err
}

// nodeOf returns the node of a unit.
func (c *cli) nodeOf(ctx context.Context, arg string) (wire.NodeRef, error) {
	name, _ := unitName(arg)
	u, err := c.unit(ctx, name)
	switch {
	case err != nil:
		return wire.NodeRef{}, err
	case u.Global:
		return wire.NodeRef{}, hinted{fmt.Errorf("unit %s is global: it is on many nodes", name), []string{"name one: flotilla ssh NODE"}}
	case u.Node == nil:
		why := "it is on no node"
		if u.Unplaced != "" {
			why += ": " + u.Unplaced
		}
		return wire.NodeRef{}, hinted{fmt.Errorf("unit %s: %s", name, why), []string{"flotilla explain " + name}}
	case u.Node.Address == "":
		return wire.NodeRef{}, hinted{fmt.Errorf("unit %s: its node %s is away", name, u.Node.ID), []string{"flotilla nodes list"}}
	}
	return *u.Node, nil
}

func (c *cli) nodeOrUnit(ctx context.Context, arg string) (wire.NodeRef, error) {
	n, err := c.node(ctx, arg)
	if !isNotFound(err) {
		return n, err
	}
	if n, err = c.nodeOf(ctx, arg); isNotFound(err) {
		err = hinted{fmt.Errorf("there is neither a node nor a unit %q", arg), []string{"flotilla nodes list", "flotilla list-units"}}
	}
	return n, err
}

// runThere runs a command on a node and ends with its exit code.
func (c *cli) runThere(cmd *cobra.Command, n wire.NodeRef, to remote.Target, line string, forward bool) (err error) {
	ctx := cmd.Context()
	options := c.reach.sshOptions()
	var there *remote.Client
	if c.reach.tunnel != "" {
		entry, err := c.reach.entry(ctx)
		if err != nil {
			return err
		}
		there, err = entry.Jump(ctx, to, options)
		if err != nil {
			return err
		}
	} else {
		c.localLogin(&options, n.Name)
		if there, err = remote.Dial(ctx, to, options); err != nil {
			return err
		}
	}
	defer func() { err = errors.Join(err, there.Close()) }()

	command := remote.Command{Line: line, Stdin: cmd.InOrStdin(), Stdout: cmd.OutOrStdout(), Stderr: cmd.ErrOrStderr(), ForwardAgent: forward}
	if line == "" && term.IsTerminal(int(os.Stdin.Fd())) {
		restore, pty, err := remote.Terminal(os.Stdin)
		if err != nil {
			return err
		}
		command.PTY = pty
		defer restore()
	}
	code, err := there.Run(ctx, command)
	if err == nil && code != 0 {
		return exitCode{ErrReported, code}
	}
	return err
}

// fdForwardCommand is what the other side of a tunnel runs where sshd does not
// forward to sockets.
func fdForwardCommand() *cobra.Command {
	return &cobra.Command{
		Use: "fd-forward SOCKET", Short: "Join standard input and output with a unix socket", Hidden: true, Args: Between(1, 1, "a socket"),
		RunE: func(cmd *cobra.Command, args []string) error {
			path := strings.TrimPrefix(args[0], "unix://")
			conn, err := new(net.Dialer).DialContext(cmd.Context(), "unix", presentSocket(path))
			if err != nil {
				return fmt.Errorf("forward to a socket: %w", err)
			}
			defer func() { _ = conn.Close() }() // all was read
			go func() {
				_, _ = io.Copy(conn, cmd.InOrStdin()) // either end of it ends the writing
				if half, ok := conn.(*net.UnixConn); ok {
					_ = half.CloseWrite() // as above
				}
			}()
			if _, err := io.Copy(cmd.OutOrStdout(), conn); err != nil {
				return fmt.Errorf("forward from %s: %w", path, err)
			}
			return nil
		},
	}
}
