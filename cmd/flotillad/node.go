package main

import (
	"fmt"
	"io"
	"log/slog"
	"os"
	"slices"
	"strings"

	"github.com/coreos/go-systemd/v22/activation"
	"github.com/spf13/cobra"
	"golang.org/x/term"

	"flotilla/internal/cli"
	"flotilla/internal/node"
	"flotilla/internal/nodeconfig"
)

func nodeCommand() *cobra.Command {
	given := nodeconfig.Default()
	var units string
	cmd := &cobra.Command{
		Use: "node", Short: "Run a node: router, DNS, API and, unless an external etcd is given, the store",
		Long: `Run a node. Alone it is a cluster of one; --join makes it a member of one that
is there. Each flag can also be written in the --config file, by the same name,
or in the environment (--http-port as FLOTILLA_HTTP_PORT); flags count most, then
the environment, then the file.`,
		Example: `  flotillad node --name n1 --address 10.0.0.11 --insecure
  flotillad node --name n2 --address 10.0.0.12 --insecure --join 10.0.0.11
  flotillad node --address 127.0.0.1 --data /tmp/n1 --http-port 8080 --https-port 8443 --dns-port 8053`,
		Args: cli.Between(0, 0, ""),
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := load(cmd, &given)
			if err != nil {
				return err
			}
			if cmd.Flags().Changed("print-units") {
				return printUnits(cmd.OutOrStdout(), units, &cfg)
			}
			if err := node.CheckPrivileges(&cfg); err != nil {
				return cli.Usage(err.Error(), cmd.CommandPath()+" --help")
			}
			return node.Run(cmd.Context(), cfg, cli.Version, newLogger(cmd.ErrOrStderr(), &cfg), activation.Files(false)...)
		},
	}
	addOptions(cmd, &given)
	cmd.Flags().StringVar(&units, "print-units", "", "write the systemd units for these settings and exit: to stdout, or to `DIR` with --print-units=DIR")
	cmd.Flags().Lookup("print-units").NoOptDefVal = "-"
	return cmd
}

// addOptions adds the options of a node as flags; with names, only those.
func addOptions(cmd *cobra.Command, c *nodeconfig.Config, names ...string) {
	for _, o := range c.Options() {
		if len(names) > 0 && !slices.Contains(names, o.Name) {
			continue
		}
		f := cmd.Flags().VarPF(o.Value, o.Name, "", o.Usage)
		if o.Value.Type() == "bool" {
			f.NoOptDefVal = "true"
		}
	}
}

// load returns the valid configuration that file, environment and flags make.
func load(cmd *cobra.Command, given *nodeconfig.Config) (nodeconfig.Config, error) {
	cfg, err := nodeconfig.Load(given, cmd.Flags().Changed, os.Environ())
	if err == nil {
		err = cfg.Validate()
	}
	if err != nil {
		return cfg, cli.Usage(err.Error(), cmd.CommandPath()+" --help")
	}
	return cfg, nil
}

// newLogger writes text to a terminal and JSON elsewhere unless told otherwise.
func newLogger(w io.Writer, cfg *nodeconfig.Config) *slog.Logger {
	var level slog.Level
	if err := level.UnmarshalText([]byte(cfg.LogLevel)); err != nil {
		level = slog.LevelInfo // Validate has refused it
	}
	options := &slog.HandlerOptions{Level: level}
	f, ok := w.(*os.File)
	if cfg.LogFormat == "text" || cfg.LogFormat == "" && ok && term.IsTerminal(int(f.Fd())) {
		return slog.New(slog.NewTextHandler(w, options))
	}
	return slog.New(slog.NewJSONHandler(w, options))
}

// printUnits writes the systemd units to dir, or to w if dir is "-".
func printUnits(w io.Writer, dir string, cfg *nodeconfig.Config) error {
	self, err := os.Executable()
	if err != nil {
		return fmt.Errorf("find this program's own path: %w", err)
	}
	units, err := nodeconfig.Units(cfg, self)
	if err != nil {
		return err
	}
	for i, u := range units {
		if dir == "-" {
			cli.Say(w, "%s# %s\n%s", strings.Repeat("\n", min(i, 1)), u.Name, u.Text)
			continue
		}
		if err := u.WriteTo(dir); err != nil {
			return err
		}
		cli.Say(w, "wrote %s/%s\n", strings.TrimSuffix(dir, "/"), u.Name)
	}
	return nil
}
