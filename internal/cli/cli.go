// Package cli is the command line of flotilla and of fleetctl: what people type and
// what they read. It knows a node's API, ssh, and the clusters of this machine, and
// formats for people, also for flotillad. It asks and prints: names are resolved and
// waits are judged by the node. It must not import the daemons, nor anything that is
// slow to initialise, such as etcd, gRPC and Prometheus.
package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"flotilla/internal/client"
	"flotilla/internal/nodeconfig"
	"flotilla/internal/remote"
	"flotilla/internal/wire"
)

// Version is set by the linker.
var Version = "dev"

// Exit codes.
const (
	ExitDone         = 0
	ExitFailed       = 1
	ExitUsage        = 2
	ExitNotConverged = 3
)

// Run executes one command line, whose first word is the name of the program, and
// returns the exit code. A program of the name fleetctl takes fleetctl's.
func Run(line []string, stdout, stderr io.Writer) int {
	if filepath.Base(line[0]) == "fleetctl" {
		return runFleetctl(line[1:], stdout, stderr)
	}
	return Execute(newRoot(), line[1:], stdout, stderr)
}

// Execute executes a command line of a program and returns the exit code. Errors are
// printed as those of the program that root is named after.
func Execute(root *cobra.Command, args []string, stdout, stderr io.Writer) int {
	if _, err := execute(root, args, stdout, stderr); err != nil {
		return report(stderr, root.Name(), err)
	}
	return ExitDone
}

// execute executes a command line until a signal ends it, and returns the command
// that it was.
func execute(root *cobra.Command, args []string, stdout, stderr io.Writer) (*cobra.Command, error) {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	root.SetArgs(args)
	root.SetOut(stdout)
	root.SetErr(stderr)
	return root.ExecuteContextC(ctx)
}

// cli is what the commands share.
type cli struct {
	socket  string
	cluster string         // on this machine, whose nodes are asked; see clusterSocket
	output  string         // text or json
	shared  *pflag.FlagSet // see clientFlags

	fleet   bool // it speaks as fleetctl does
	reach   reach
	connect func() *client.Client // nil: to socket
}

// Root returns the command that a whole program is, without any subcommand yet.
func Root(name, short, long string) *cobra.Command {
	root := &cobra.Command{
		Use: name, Short: short, Long: long,
		SilenceErrors: true, SilenceUsage: true,
		Version: Version,
		Args:    noCommand,

		SuggestionsMinimumDistance: 2,

		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	root.SetVersionTemplate("{{.Name}} {{.Version}}\n")
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		return Usage(err.Error(), cmd.CommandPath()+" --help")
	})
	root.AddCommand(&cobra.Command{
		Use: "version", Short: "Print the version of this program", Args: Between(0, 0, ""),
		Run: func(cmd *cobra.Command, _ []string) { Say(cmd.OutOrStdout(), "%s %s\n", name, Version) },
	})
	return root
}

func newRoot() *cobra.Command {
	c := &cli{}
	root := Root("flotilla", "Run services on a cluster of Linux machines, and route requests to them",
		`Flotilla runs services on a cluster of Linux machines and routes requests to them:
it places systemd units, moves them when a machine dies, routes by host, path or
port on every node, and answers names in DNS. What is wanted is written to etcd;
each node follows.

These commands ask a node of the cluster, on this machine or through ssh
(--tunnel). Another program runs a node: flotillad node.`)
	section(root, "Services", c.servicesCommand())
	section(root, "Units", c.submitCommand(), c.loadCommand(), c.startCommand(), c.stopCommand(), c.restartCommand(), c.unloadCommand(), c.destroyCommand(),
		c.catCommand(), c.verifyCommand(), c.listUnitsCommand(), c.listUnitFilesCommand(), c.explainCommand(), c.moveCommand(), c.journalCommand())
	section(root, "Nodes", c.nodesCommand(), c.listMachinesCommand(), c.rebalanceCommand(), c.failoverCommand(), c.sshCommand(), c.clusterCommand())
	section(root, "This node", c.statusCommand(), doctorCommand())
	root.AddCommand(fdForwardCommand(), elsewhere("node", "flotillad node"), elsewhere("store", "flotillad store"), elsewhere("machines", "flotilla nodes"))
	return root
}

// section adds commands to root below a title of the help text.
func section(root *cobra.Command, title string, commands ...*cobra.Command) {
	if !root.ContainsGroup(title) {
		root.AddGroup(&cobra.Group{ID: title, Title: title + ":"})
	}
	for _, cmd := range commands {
		cmd.GroupID = title
	}
	root.AddCommand(commands...)
}

// clientFlags gives cmd the flags of every command that asks a node. All commands
// share them: only one is executed, and flags of its own for each would be most of
// what there is to build.
func (c *cli) clientFlags(cmd *cobra.Command) *cobra.Command {
	if c.shared == nil {
		socket := nodeconfig.DefaultSocket()
		if s := os.Getenv("FLOTILLA_SOCKET"); s != "" {
			socket = s
		}
		c.shared = pflag.NewFlagSet("", pflag.ContinueOnError)
		c.shared.StringVar(&c.socket, "socket", socket, "unix socket of the node's API (also FLOTILLA_SOCKET)")
		c.shared.StringVar(&c.cluster, "cluster", os.Getenv("FLOTILLA_CLUSTER"), "cluster on this machine whose nodes are asked (also FLOTILLA_CLUSTER; see flotilla cluster)")
		c.shared.StringVarP(&c.output, "output", "o", "text", "text or json")
		c.reachFlags(c.shared)
	}
	cmd.PersistentFlags().AddFlagSet(c.shared)
	cmd.PersistentPreRunE = func(cmd *cobra.Command, _ []string) error {
		if far, err := c.reachNode(cmd); err != nil {
			return err
		} else if !far {
			if err := c.clusterSocket(cmd); err != nil {
				return err
			}
		}
		return c.checkOutput(cmd)
	}
	return cmd
}

func (c *cli) checkOutput(cmd *cobra.Command) error {
	if c.output != "text" && c.output != "json" {
		return Usage(fmt.Sprintf("--output %q is neither text nor json", c.output), cmd.CommandPath()+" --help")
	}
	return nil
}

func (c *cli) dial() *client.Client {
	if c.connect != nil {
		return c.connect()
	}
	return client.Dial(c.socket)
}

// usageError is a command line that makes no sense.
type usageError struct{ text, hint string }

func (e *usageError) Error() string { return e.text }

// Usage returns the error of a command line that makes no sense; hint is a command
// that says more.
func Usage(text, hint string) error { return &usageError{text, hint} }

// hinted is an error with commands that help.
type hinted struct {
	error
	hints []string
}

func (e hinted) Unwrap() error { return e.error }

// exitCode is an error that ends the program with a code of its own.
type exitCode struct {
	error
	code int
}

func (e exitCode) Unwrap() error { return e.error }

// Exit returns err as one that ends the program with that code.
func Exit(err error, code int) error { return exitCode{err, code} }

// ErrReported is a failure whose text is on the screen already.
var ErrReported = errors.New("reported")

// report prints err as an error of that program and returns the exit code that it
// means.
func report(w io.Writer, program string, err error) int {
	code := ExitFailed
	var hints []string
	var bad *usageError
	var answer *wire.Error
	var help hinted
	var own exitCode
	var known *remote.Error
	if errors.As(err, &own) {
		code = own.code
	}
	if errors.Is(err, ErrReported) {
		return code
	}
	switch {
	case errors.As(err, &bad):
		code, hints = ExitUsage, []string{bad.hint}
	case errors.As(err, &answer):
		hints = []string{answer.Hint}
		if answer.Code == wire.CodeNotConverged {
			code = ExitNotConverged
		}
	case errors.As(err, &help):
		hints = help.hints
	case errors.As(err, &known):
		hints = []string{known.Hint()}
	}
	p := NewPainter(w)
	Say(w, "%s: %s %s\n", program, p.Red("error:"), strings.ReplaceAll(strings.TrimSpace(err.Error()), "\n", "\n"+program+": error: "))
	for i, h := range hints {
		if h != "" && i < 2 {
			Say(w, "%s: hint: %s\n", program, h)
		}
	}
	return code
}

// noCommand is the Args of a command that only has subcommands.
func noCommand(cmd *cobra.Command, args []string) error {
	if len(args) == 0 {
		return nil
	}
	hint := cmd.CommandPath() + " --help"
	if near := cmd.SuggestionsFor(args[0]); len(near) > 0 {
		hint = "did you mean: " + cmd.CommandPath() + " " + near[0]
	}
	return Usage(fmt.Sprintf("there is no command %q", cmd.CommandPath()+" "+args[0]), hint)
}

// group is a command that only has subcommands.
func group(use, short string, sub ...*cobra.Command) *cobra.Command {
	cmd := &cobra.Command{Use: use, Short: short, Args: noCommand, SuggestionsMinimumDistance: 2}
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		var names []string
		for _, s := range cmd.Commands() {
			if s.IsAvailableCommand() {
				names = append(names, s.Name())
			}
		}
		return Usage(cmd.CommandPath()+" needs a command: "+strings.Join(names, ", "), cmd.CommandPath()+" --help")
	}
	cmd.AddCommand(sub...)
	return cmd
}

// Between demands least to most arguments, called what.
func Between(least, most int, what string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		switch {
		case len(args) < least:
			return Usage(cmd.CommandPath()+" needs "+what, cmd.UseLine())
		case len(args) > most && most == 0:
			return Usage(fmt.Sprintf("%s takes no arguments; unexpected argument %q", cmd.CommandPath(), args[0]), cmd.UseLine())
		case len(args) > most:
			return Usage(fmt.Sprintf("%s takes %s; unexpected argument %q", cmd.CommandPath(), what, args[most]), cmd.UseLine())
		}
		return nil
	}
}
