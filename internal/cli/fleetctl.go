package cli

import (
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"

	"flotilla/internal/wire"
)

// fleetctl: the same program under another name takes fleetctl's flags, prints
// its texts and ends with its exit codes.

// fleetSays is an error in fleetctl's words.
type fleetSays string

func (e fleetSays) Error() string { return string(e) }

// fleetText is an error that says what fleetctl says.
func fleetText(format string, args ...any) error { return fleetSays(fmt.Sprintf(format, args...)) }

// phrases are fleetctl's words about what a command came to.
type phrases struct {
	failed  string // format of another error: [1] is the error, [2] the unit
	missing string // format of the error that there is no unit: [2] as above
	done    string // the units are there
}

var bringPhrases = phrases{failed: "Error creating units: %[1]s"}

var fleetPhrases = map[string]phrases{
	"submit": bringPhrases, "load": bringPhrases, "start": bringPhrases,
	"stop":            {done: "stopped"},
	"unload":          {done: "unloaded"},
	"destroy":         {failed: "Error destroying units: %[1]s"},
	"cat":             {failed: "Error retrieving Unit %[2]s: %[1]s", missing: "Unit %[2]s not found."},
	"status":          {missing: "Unit %[2]s does not exist."},
	"journal":         {missing: "Unit %[2]s does not exist."},
	"list-units":      {failed: "Error retrieving list of units from repository: %[1]s"},
	"list-unit-files": {failed: "Error retrieving list of units from repository: %[1]s"},
	"list-machines": {failed: "Error retrieving list of active machines from fleet API (%[1]s)\nPossible issues:\n" +
		"  etcd is unhealthy and/or lost quorum\n  connection cannot be established to any etcd servers"},
}

// fleetWords returns what fleetctl says about an error of a command.
func fleetWords(cmd *cobra.Command, err error) string {
	said, message, name := fleetPhrases[cmd.Name()], err.Error(), ""
	if args := cmd.Flags().Args(); len(args) == 1 {
		name, _ = unitName(args[0])
	}
	var own fleetSays
	var answer *wire.Error
	switch {
	case errors.As(err, &own):
		return message
	case isNotFound(err) && said.missing != "" && name != "":
		return fmt.Sprintf(said.missing, "", name)
	case errors.As(err, &answer) && answer.Status != 0:
		// The text that people's scripts look for.
		message = strings.Replace(message, answer.Message, fmt.Sprintf("googleapi: Error %d: %s", answer.Status, answer.Message), 1)
	}
	if said.failed == "" {
		return message
	}
	return fmt.Sprintf(said.failed, message, name)
}

// runFleetctl executes one command line of fleetctl and returns the exit code.
func runFleetctl(args []string, stdout, stderr io.Writer) int {
	cobra.EnablePrefixMatching = true
	cmd, err := execute(newFleetctl(&cli{fleet: true}), args, stdout, stderr)
	if err != nil {
		return reportFleet(cmd, stderr, err)
	}
	return ExitDone
}

// reportFleet prints err as fleetctl does and returns the exit code.
func reportFleet(cmd *cobra.Command, w io.Writer, err error) int {
	var bad *usageError
	var own exitCode
	switch {
	case errors.Is(err, ErrReported):
		if errors.As(err, &own) {
			return own.code
		}
		return ExitFailed
	case errors.As(err, &bad):
		// Old scripts give flags that do not exist, and fleetctl takes that
		// for a call for help.
		Say(w, "cannot execute cmdFleet: %v\n%s", err, cmd.UsageString())
		if bad.hint == fleetUnknown {
			return ExitFailed
		}
		return ExitDone
	}
	code := ExitFailed
	if errors.As(err, &own) && own.code != ExitNotConverged {
		code = own.code
	}
	Say(w, "%s\n", strings.TrimSuffix(fleetWords(cmd, err), "\n"))
	return code
}

// fleetUnknown is the hint of a command that does not exist.
const fleetUnknown = "fleetctl help"

// fleetOptions are fleetctl's own global flags.
type fleetOptions struct {
	driver, etcdPrefix string
	requestTimeout     float64
	experimental       bool
	debug              bool
}

func newFleetctl(c *cli) *cobra.Command {
	var o fleetOptions
	root := &cobra.Command{
		Use:   "fleetctl",
		Short: "fleetctl for a cluster of flotilla",
		Long: fmt.Sprintf(`fleetctl for a cluster of flotilla: fleet's commands, flags and output.

Version: %s

Global options can also be given in the environment: --some-flag as FLEETCTL_SOME_FLAG.
Commands may be shortened, as long as it is clear which is meant.`, Version),
		SilenceErrors: true, SilenceUsage: true,
		Version: Version,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) > 0 {
				return Usage(fmt.Sprintf("unknown command %q for \"fleetctl\"", args[0]), fleetUnknown)
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	root.SetVersionTemplate("fleetctl version {{.Version}}\n")
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error { return Usage(err.Error(), cmd.CommandPath()+" --help") })
	root.CompletionOptions.DisableDefaultCmd = true
	fl := root.PersistentFlags()
	c.fleetReachFlags(fl)
	fl.StringVar(&o.driver, "driver", "API", "only API is there: the cluster is never spoken to through etcd")
	fl.BoolVar(&o.debug, "debug", false, "accepted for old scripts")
	fl.Float64Var(&o.requestTimeout, "request-timeout", 3, "accepted for old scripts")
	fl.StringVar(&o.etcdPrefix, "etcd-key-prefix", "", "accepted for old scripts")
	fl.BoolVar(&o.experimental, "experimental-api", true, "DEPRECATED: do not use this flag.")
	for _, name := range []string{"etcd-keyfile", "etcd-certfile", "etcd-cafile"} {
		fl.String(name, "", "DEPRECATED: do not use this flag.")
	}
	root.PersistentPreRunE = func(cmd *cobra.Command, _ []string) error {
		if err := fromEnvironment(cmd, fl, "FLEETCTL_"); err != nil {
			return err
		}
		if !strings.EqualFold(o.driver, "API") && o.driver != "" {
			return fleetText("Unable to initialize client: unrecognized driver %q", o.driver)
		}
		if cmd.Name() == "help" || cmd.Name() == "version" || cmd.Name() == "fd-forward" || cmd == root {
			return nil
		}
		return c.reachFleet()
	}
	root.AddCommand(c.catCommand(), c.destroyCommand(), c.listMachinesCommand(), c.listUnitFilesCommand(), c.listUnitsCommand(),
		c.loadCommand(), c.restartCommand(), c.startCommand(), c.stopCommand(), c.submitCommand(), c.unloadCommand(), c.verifyCommand(),
		c.journalCommand(), c.statusCommand(), c.sshCommand(), fdForwardCommand(),
		&cobra.Command{
			Use: "version", Short: "Print the version and exit",
			Run: func(cmd *cobra.Command, _ []string) { Say(cmd.OutOrStdout(), "fleetctl version %s\n", Version) },
		})
	return root
}
