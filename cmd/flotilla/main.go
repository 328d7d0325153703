// Command flotilla is the node's daemons and the operator's tool. It is the only
// place that formats for people.
package main

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

	"flotilla/internal/client"
	"flotilla/internal/node"
	"flotilla/internal/remote"
)

// version is set by the linker.
var version = "dev"

// Exit codes.
const (
	exitDone         = 0
	exitFailed       = 1
	exitUsage        = 2
	exitNotConverged = 3
)

func main() {
	face := run
	switch filepath.Base(os.Args[0]) {
	case "fleetctl":
		face = runFleetctl
	case "fleetd":
		face = runFleetd
	}
	os.Exit(face(os.Args[1:], os.Stdout, os.Stderr))
}

// run executes one command line and returns the exit code.
func run(args []string, stdout, stderr io.Writer) int {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	root := newRoot()
	root.SetArgs(args)
	root.SetOut(stdout)
	root.SetErr(stderr)
	err := root.ExecuteContext(ctx)
	if err == nil {
		return exitDone
	}
	return report(stderr, err)
}

// cli is what the commands share.
type cli struct {
	socket  string
	cluster string // on this machine, whose nodes are asked; see clusterSocket
	output  string // text or json

	fleet   bool // it speaks as fleetctl does
	reach   fleetReach
	connect func() *client.Client // nil: to socket
}

func newRoot() *cobra.Command {
	c := &cli{}
	root := &cobra.Command{
		Use:   "flotilla",
		Short: "Route, resolve and run services on a cluster of Linux machines",
		Long: `Flotilla routes services by host, path or port on every node of a cluster and
answers their names in DNS. What is wanted is written to etcd; each node follows.`,
		SilenceErrors: true, SilenceUsage: true,
		Version: version,
		Args:    noCommand,

		SuggestionsMinimumDistance: 2,

		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	root.SetVersionTemplate("flotilla {{.Version}}\n")
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		return usage(err.Error(), cmd.CommandPath()+" --help")
	})
	section(root, "Services", c.servicesCommand())
	section(root, "Units", c.submitCommand(), c.loadCommand(), c.startCommand(), c.stopCommand(), c.restartCommand(), c.unloadCommand(), c.destroyCommand(),
		c.catCommand(), c.verifyCommand(), c.listUnitsCommand(), c.listUnitFilesCommand(), c.explainCommand(), c.moveCommand(), c.journalCommand())
	section(root, "Machines", c.machinesCommand(), c.listMachinesCommand(), c.rebalanceCommand(), c.failoverCommand(), c.sshCommand())
	section(root, "Cluster", c.nodesCommand(), c.clusterCommand())
	section(root, "Node", c.nodeCommand(), c.storeCommand(), c.statusCommand(), c.doctorCommand())
	root.AddCommand(versionCommand(), fdForwardCommand())
	return root
}

// section adds commands to root below a title of the help text.
func section(root *cobra.Command, title string, commands ...*cobra.Command) {
	root.AddGroup(&cobra.Group{ID: title, Title: title + ":"})
	for _, cmd := range commands {
		cmd.GroupID = title
	}
	root.AddCommand(commands...)
}

// clientFlags are those of every command that asks a node.
func (c *cli) clientFlags(cmd *cobra.Command) *cobra.Command {
	socket := node.DefaultSocket()
	if s := os.Getenv("FLOTILLA_SOCKET"); s != "" {
		socket = s
	}
	cmd.PersistentFlags().StringVar(&c.socket, "socket", socket, "unix socket of the node's API (also FLOTILLA_SOCKET)")
	cmd.PersistentFlags().StringVar(&c.cluster, "cluster", os.Getenv("FLOTILLA_CLUSTER"), "cluster on this machine whose nodes are asked (also FLOTILLA_CLUSTER; see flotilla cluster)")
	cmd.PersistentFlags().StringVarP(&c.output, "output", "o", "text", "text or json")
	c.reachFlags(cmd.PersistentFlags())
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
		return usage(fmt.Sprintf("--output %q is neither text nor json", c.output), cmd.CommandPath()+" --help")
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

func usage(text, hint string) error { return &usageError{text, hint} }

// hinted is an error with commands that help.
type hinted struct {
	error
	hints []string
}

func (e hinted) Unwrap() error { return e.error }

// errReported is a failure whose text is on the screen already.
var errReported = errors.New("reported")

// report prints err and returns the exit code that it means.
func report(w io.Writer, err error) int {
	code := exitFailed
	var hints []string
	var bad *usageError
	var answer *client.Error
	var help hinted
	var own exitCode
	if errors.As(err, &own) {
		code = own.code
	}
	if errors.Is(err, errReported) {
		return code
	}
	var known *remote.Error
	switch {
	case errors.As(err, &bad):
		code, hints = exitUsage, []string{bad.hint}
	case errors.As(err, &answer):
		hints = []string{answer.Hint}
		if answer.Code == client.CodeNotConverged {
			code = exitNotConverged
		}
	case errors.As(err, &help):
		hints = help.hints
	case errors.As(err, &known):
		hints = []string{known.Hint()}
	}
	p := painter{colour: colourOn(w)}
	say(w, "flotilla: %s %s\n", p.red("error:"), strings.ReplaceAll(strings.TrimSpace(err.Error()), "\n", "\nflotilla: error: "))
	for i, h := range hints {
		if h != "" && i < 2 {
			say(w, "flotilla: hint: %s\n", h)
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
	return usage(fmt.Sprintf("there is no command %q", cmd.CommandPath()+" "+args[0]), hint)
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
		return usage(cmd.CommandPath()+" needs a command: "+strings.Join(names, ", "), cmd.CommandPath()+" --help")
	}
	cmd.AddCommand(sub...)
	return cmd
}

// between demands least to most arguments, called what.
func between(least, most int, what string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		switch {
		case len(args) < least && what == "":
			return usage(cmd.CommandPath()+" takes no argument", cmd.CommandPath()+" --help")
		case len(args) < least:
			return usage(cmd.CommandPath()+" needs "+what, cmd.UseLine())
		case len(args) > most && most == 0:
			return usage(fmt.Sprintf("%s takes no argument, and %q is one", cmd.CommandPath(), args[0]), cmd.UseLine())
		case len(args) > most:
			return usage(fmt.Sprintf("%s takes %s, and %q is too much", cmd.CommandPath(), what, args[most]), cmd.UseLine())
		}
		return nil
	}
}

func versionCommand() *cobra.Command {
	return &cobra.Command{
		Use: "version", Short: "Print the version of this program", Args: between(0, 0, ""),
		Run: func(cmd *cobra.Command, _ []string) { say(cmd.OutOrStdout(), "flotilla %s\n", version) },
	}
}
