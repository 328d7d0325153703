package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"flotilla/internal/remote"
	"flotilla/internal/unitapi"
)

func (c *cli) sshCommand() *cobra.Command {
	var machine, unit string
	var forward bool
	var port int
	cmd := &cobra.Command{
		Use: "ssh [MACHINE|UNIT] [COMMAND...]", Short: "Log in to a machine, or run a command there",
		Long: `Log in to a machine by ssh, or run a command there. The machine is named by its ID
or the beginning of one, the name of its node, its address, or a unit that runs on it.
With --tunnel the way goes through the entry node. The exit code is the command's.`,
		Example: "  flotilla ssh n2\n  flotilla ssh web@1.service journalctl -u web@1 -f\n  flotilla ssh --tunnel core@edge.example.com n2 uptime",
		RunE: func(cmd *cobra.Command, args []string) error {
			if port < 1 || port > 65535 {
				return Usage(fmt.Sprintf("--ssh-port %d is not a port", port), cmd.CommandPath()+" --help")
			}
			m, line, err := c.sshTarget(cmd.Context(), machine, unit, args)
			if err != nil {
				return err
			}
			to := remote.Target{User: c.reach.username, Host: m.Address, Port: port}
			return c.runThere(cmd, m, to, line, forward)
		},
	}
	cmd.Flags().StringVar(&machine, "machine", "", "the machine, so that all arguments are the command")
	cmd.Flags().StringVar(&unit, "unit", "", "a unit on the machine, so that all arguments are the command")
	cmd.Flags().BoolVarP(&forward, "forward-agent", "A", false, "let the machine use the keys of the local ssh-agent")
	cmd.Flags().IntVar(&port, "ssh-port", remote.DefaultPort, "port of sshd on the machine")
	cmd.Flags().SetInterspersed(false) // flags after the machine are the command's
	return c.unitFlags(cmd)
}

// sshTarget returns the machine that is meant and the command line for it, empty
// for a login.
func (c *cli) sshTarget(ctx context.Context, machine, unit string, args []string) (unitapi.Machine, string, error) {
	var none unitapi.Machine
	switch {
	case machine != "" && unit != "":
		return none, "", Usage("--machine and --unit exclude each other", "give one of them")
	case machine == "" && unit == "" && len(args) == 0:
		return none, "", Usage("ssh needs a machine or a unit", "list them with: flotilla list-machines")
	}
	either := ""
	if machine == "" && unit == "" {
		either, args = args[0], args[1:]
		machine = either
	}
	line := strings.Join(args, " ") // as ssh does: the shell there takes it apart
	all, err := c.machines(ctx)
	if err != nil {
		return none, "", err
	}
	if machine != "" {
		m, err := findMachine(all, machine)
		if err == nil || either == "" {
			return m, line, err
		}
		unit = either
	}
	m, err := c.machineOf(ctx, all, unit)
	if isNotFound(err) && either != "" {
		err = hinted{fmt.Errorf("there is neither a machine nor a unit %q", either), []string{"flotilla list-machines", "flotilla list-units"}}
	}
	return m, line, err
}

// machineOf returns the machine of a unit. The error is not found if there is no
// such unit.
func (c *cli) machineOf(ctx context.Context, all []unitapi.Machine, arg string) (unitapi.Machine, error) {
	name, _ := unitName(arg)
	u, ok, err := c.unitText(ctx, name)
	switch {
	case err != nil:
		return unitapi.Machine{}, err
	case !ok:
		return unitapi.Machine{}, c.missingUnit(name)
	case u.Global:
		return unitapi.Machine{}, hinted{fmt.Errorf("unit %s is global: it is on many machines", name), []string{"name one: flotilla ssh MACHINE"}}
	case u.Machine == nil:
		why := "it is on no machine"
		if u.Unplaced != "" {
			why += ": " + u.Unplaced
		}
		return unitapi.Machine{}, hinted{fmt.Errorf("unit %s: %s", name, why), []string{"flotilla explain " + name}}
	}
	for _, m := range all {
		if m.ID == u.Machine.ID {
			return m, nil
		}
	}
	return unitapi.Machine{}, hinted{fmt.Errorf("unit %s: its machine %s is not there", name, u.Machine.ID), []string{"flotilla list-machines"}}
}

// runThere runs a command on a machine and ends with its exit code.
func (c *cli) runThere(cmd *cobra.Command, m unitapi.Machine, to remote.Target, line string, forward bool) (err error) {
	ctx := cmd.Context()
	options := c.reach.sshOptions()
	var client *remote.Client
	if c.reach.tunnel != "" {
		entry, err := c.reach.entry(ctx)
		if err != nil {
			return err
		}
		client, err = entry.Jump(ctx, to, options)
		if err != nil {
			return err
		}
	} else {
		c.localLogin(&options, m.Node)
		if client, err = remote.Dial(ctx, to, options); err != nil {
			return err
		}
	}
	defer func() { err = errors.Join(err, client.Close()) }()

	there := remote.Command{Line: line, Stdin: cmd.InOrStdin(), Stdout: cmd.OutOrStdout(), Stderr: cmd.ErrOrStderr(), ForwardAgent: forward}
	if line == "" && term.IsTerminal(int(os.Stdin.Fd())) {
		restore, pty, err := terminal()
		if err != nil {
			return err
		}
		there.PTY = pty
		defer restore()
	}
	code, err := client.Run(ctx, there)
	if err == nil && code != 0 {
		return exitCode{ErrReported, code}
	}
	return err
}

// terminal hands the terminal to the far side until restore is called.
func terminal() (restore func(), pty *remote.PTY, err error) {
	fd := int(os.Stdin.Fd())
	state, err := term.MakeRaw(fd)
	if err != nil {
		return nil, nil, fmt.Errorf("prepare the terminal: %w", err)
	}
	size := func() remote.Size {
		columns, rows, err := term.GetSize(fd)
		if err != nil {
			return remote.Size{Columns: 80, Rows: 24}
		}
		return remote.Size{Columns: columns, Rows: rows}
	}
	resized, changed, done := make(chan remote.Size, 1), make(chan os.Signal, 1), make(chan struct{})
	signal.Notify(changed, syscall.SIGWINCH)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for {
			select {
			case <-changed:
			case <-done:
				return
			}
			select {
			case resized <- size():
			case <-done:
				return
			}
		}
	}()
	restore = func() {
		signal.Stop(changed)
		close(done)
		<-ended
		_ = term.Restore(fd, state) // there is no other way back
	}
	name := os.Getenv("TERM")
	if name == "" {
		name = "xterm"
	}
	return restore, &remote.PTY{Term: name, Size: size(), Resized: resized}, nil
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
