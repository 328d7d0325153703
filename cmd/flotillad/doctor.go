package main

import (
	"context"
	"fmt"
	"io"
	"os"

	"github.com/spf13/cobra"

	"flotilla/internal/cli"
	"flotilla/internal/client"
	"flotilla/internal/node"
	"flotilla/internal/nodeconfig"
	"flotilla/internal/wire"
)

// level is how a check ended.
type level string

const (
	levelOK   level = "ok"
	levelWarn level = "warn"
	levelFail level = "fail"
)

// finding is the result of one check.
type finding struct {
	Level  level  `json:"level"`
	Check  string `json:"check"`
	Text   string `json:"text"`
	Remedy string `json:"remedy,omitempty"`
}

func ok(check, format string, args ...any) finding {
	return finding{levelOK, check, fmt.Sprintf(format, args...), ""}
}

func warn(check, remedy, format string, args ...any) finding {
	return finding{levelWarn, check, fmt.Sprintf(format, args...), remedy}
}

func bad(check, remedy, format string, args ...any) finding {
	return finding{levelFail, check, fmt.Sprintf(format, args...), remedy}
}

// machine is what the checks look at: this one, with the settings of its node.
type machine struct {
	cfg     nodeconfig.Config
	running *wire.Status // of the node that serves on the socket; nil: none does
}

// checks are done in this order.
var checks = []func(ctx context.Context, p *machine) []finding{
	checkNode, checkPorts, checkHAProxy, checkLimits, checkNftables, checkClock, checkDisk, checkStore,
}

func doctorCommand() *cobra.Command {
	given := nodeconfig.Default()
	var output string
	cmd := &cobra.Command{
		Use: "doctor", Short: "Check whether this machine can run a node well, and say what to do",
		Long: `Check this machine for the settings that flotillad node would have: give the same
flags, file and environment. The exit code is 1 if a check fails.`,
		Args: cli.Between(0, 0, ""),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if output != "text" && output != "json" {
				return cli.Usage(fmt.Sprintf("--output %q is neither text nor json", output), "flotillad doctor --help")
			}
			cfg, err := nodeconfig.Load(&given, cmd.Flags().Changed, os.Environ())
			if err != nil {
				return cli.Usage(err.Error(), cmd.CommandPath()+" --help")
			}
			findings := examine(cmd.Context(), cfg)
			if output == "json" {
				err = cli.SayJSON(cmd.OutOrStdout(), findings)
			} else {
				sayFindings(cmd.OutOrStdout(), findings)
			}
			for _, f := range findings {
				if f.Level == levelFail && err == nil {
					err = cli.ErrReported
				}
			}
			return err
		},
	}
	addOptions(cmd, &given)
	cmd.Flags().StringVarP(&output, "output", "o", "text", "text or json")
	return cmd
}

// examine runs all checks.
func examine(ctx context.Context, cfg nodeconfig.Config) []finding {
	p := &machine{cfg: cfg}
	var findings []finding
	if err := p.cfg.Validate(); err != nil {
		for _, m := range mistakes(err) {
			findings = append(findings, bad("settings", "", "%v", m))
		}
	} else {
		findings = append(findings, ok("settings", "node %s on %s, data in %s", p.cfg.Name, p.cfg.Address, p.cfg.Data))
	}
	if err := node.CheckPrivileges(&p.cfg); err != nil {
		findings = append(findings, bad("settings", "", "%v", err))
	}
	if st, err := client.Get[wire.Status](ctx, client.Dial(p.cfg.Socket), "/v1/status", nil); err == nil {
		p.running = &st
	}
	for _, check := range checks {
		findings = append(findings, check(ctx, p)...)
	}
	return findings
}

// mistakes takes joined errors apart.
func mistakes(err error) []error {
	if joined, ok := err.(interface{ Unwrap() []error }); ok {
		return joined.Unwrap()
	}
	return []error{err}
}

func sayFindings(w io.Writer, findings []finding) {
	p := cli.NewPainter(w)
	for _, f := range findings {
		mark := map[level]string{levelOK: p.Green("ok  "), levelWarn: p.Yellow("warn"), levelFail: p.Red("fail")}[f.Level]
		cli.Say(w, "%s  %-9s %s\n", mark, f.Check, f.Text)
		if f.Remedy != "" {
			cli.Say(w, "                -> %s\n", f.Remedy)
		}
	}
}
