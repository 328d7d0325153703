package cli

import (
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"flotilla/internal/client"
	"flotilla/internal/text"
	"flotilla/internal/unit"
	"flotilla/internal/wire"
)

// statusCommand shows the node, or units. fleetctl's is about units alone.
func (c *cli) statusCommand() *cobra.Command {
	node := asking(c, http.MethodGet, "/v1/status", nil, sayStatus)
	cmd := &cobra.Command{
		Use: "status [UNIT...]", Short: "Show how the node on this machine is doing, or how units are wherever they run",
		Long: `Show how the node on this machine is doing. With units: where each is, why, and what
systemd says of it there. The exit code is then the first that systemctl status gave
that is not 0.`,
		ValidArgsFunction: c.completeUnits,
		RunE: func(cmd *cobra.Command, args []string) error {
			switch {
			case len(args) > 0:
				return c.showUnits(cmd, args)
			case c.fleet:
				Say(cmd.ErrOrStderr(), "No units given\n")
				return nil
			}
			return node(cmd, args)
		},
	}
	if c.fleet {
		cmd.Use, cmd.Short, cmd.Long = "status UNIT...", "Show what systemd says of units, on whatever machines they are", ""
		cmd.Flags().Int("ssh-port", 22, "accepted for old scripts: the nodes are asked")
	}
	return c.unitFlags(cmd)
}

func sayStatus(w io.Writer, st wire.Status) {
	p := NewPainter(w)
	Say(w, "%s on %s, up %s, version %s\n", p.Bold(st.Name), st.Address, time.Duration(st.Uptime*float64(time.Second)).Round(time.Second), st.Version)

	state := p.Green("live")
	switch {
	case st.Store.Held:
		state = p.Yellow("held: the store holds another or an older state")
	case !st.Store.Live && st.Store.Source == wire.SourceNone:
		state = p.Red("no catalog yet")
	case !st.Store.Live && st.Store.Confirmed.IsZero():
		state = p.Yellow("stale: the catalog is the one on disk")
	case !st.Store.Live:
		state = p.Yellow("stale: not confirmed for " + ago(st.Store.Confirmed))
	}
	leader := ""
	if st.Leader != "" {
		leader = ", led by " + st.Leader
	}
	Say(w, "  store    %s, revision %d, %s%s\n", state, st.Store.Revision, strings.Join(st.Store.Endpoints, ", "), leader)
	if st.Store.Err != "" {
		Say(w, "           %s\n", st.Store.Err)
	}
	if r := st.Router; r != nil {
		state = p.Green("serving")
		switch {
		case !r.Serving:
			state = p.Red("not serving")
		case r.Draining:
			state = p.Yellow("draining")
		}
		Say(w, "  router   %s, revision %d applied, HAProxy %s (pid %d), reloads %d, host_ports by %s\n", state, r.Applied, dash(r.Version), r.Pid, r.Reloads, dash(r.HostPorts))
		if r.Err != "" {
			Say(w, "           %s\n", r.Err)
		}
	}
	if d := st.DNS; d != nil {
		Say(w, "  dns      *.%s; answered %d itself, %d forwarded, %d from cache, %d stale, %d errors\n", st.Domain, d.Local, d.Forwarded, d.Cached, d.Stale, d.Errors)
	}
	if st.Router != nil {
		problems := p.Green("no problems")
		if st.Problems > 0 {
			problems = p.Yellow(text.Count(st.Problems, "problem")) + ": flotilla services problems"
		}
		Say(w, "  catalog  %s at revision %d, %s\n", text.Count(st.Services, "service"), st.Revision, problems)
	}
	if h := st.Held; h != nil {
		Say(w, "  %s %d of %d endpoints vanished at once and stay routed; if that is meant: flotilla services confirm\n", p.Yellow("held"), h.Removed, h.Of)
	}
	for _, warning := range st.Warnings {
		Say(w, "  %s %s\n", p.Yellow("warning"), warning)
	}
}

// showUnits shows where units are, why, and what systemd says there. It ends with
// the first exit code of systemctl that is not 0.
func (c *cli) showUnits(cmd *cobra.Command, args []string) error {
	names, err := unitNames(args)
	if err != nil {
		return err
	}
	answer, err := client.Get[wire.UnitStatuses](cmd.Context(), c.dial(), "/v1/unit-status", url.Values{"unit": names})
	if err != nil {
		return err
	}
	units := map[string]wire.Unit{}
	if !c.fleet && c.output != "json" {
		known, err := c.units(cmd.Context(), names)
		if err != nil {
			return err
		}
		for _, u := range known.Units {
			units[u.Name] = u
		}
	}
	err = show(c, cmd, answer, nil, func(w io.Writer, answer wire.UnitStatuses) {
		for i, s := range answer.Statuses {
			if i > 0 {
				Say(w, "\n")
			}
			if u, ok := units[s.Unit]; ok {
				Say(w, "%s\n", whereabouts(u, s))
			}
			switch {
			case s.Problem != "" && s.Unit == "":
				Say(cmd.ErrOrStderr(), "%s%s\n", c.prefix(), harmless(s.Problem))
			case s.Problem != "":
				Say(cmd.ErrOrStderr(), "%s%s: %s\n", c.prefix(), s.Unit, harmless(s.Problem))
			default:
				Say(w, "%s\n", strings.TrimRight(harmless(s.Text), "\n"))
			}
		}
	})
	for _, s := range answer.Statuses {
		switch {
		case err != nil:
			return err
		case s.Exit != 0:
			return exitCode{ErrReported, s.Exit}
		case s.Problem != "":
			return exitCode{ErrReported, ExitFailed}
		}
	}
	return err
}

// whereabouts says in one line what is wanted of a unit, where it is and why.
func whereabouts(u wire.Unit, s wire.UnitStatus) string {
	line := fmt.Sprintf("%s: to be %s", u.Name, u.Desired)
	on, why := s.Node, u.Placed
	if on == "" && s.NodeID != "" {
		on = shortID(s.NodeID, false)
	}
	switch {
	case u.Global && on != "":
		line += ", on " + on + " as on every node that may have it"
	case on != "":
		line += ", on " + on
	default:
		why = u.Unplaced
		if u.Desired != unit.Inactive {
			line += ", on no node"
		}
	}
	if why != "" {
		line += ": " + why
	}
	if u.Leaving != "" {
		line += "; it leaves: " + u.Leaving
	}
	return line
}
