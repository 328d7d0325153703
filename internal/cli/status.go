package cli

import (
	"io"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"flotilla/internal/client"
)

func (c *cli) statusCommand() *cobra.Command {
	return c.clientFlags(&cobra.Command{
		Use: "status [UNIT...]", Short: "Show how the node on this machine is doing, or how units are wherever they run",
		Long: `Show how the node on this machine is doing. With units: where each is, why, and what
systemd says of it there. The exit code is then the first that systemctl status gave
that is not 0.`,
		ValidArgsFunction: c.completeUnits,
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) > 0 {
				return c.showUnits(cmd, args)
			}
			st, err := c.dial().Status(cmd.Context())
			if err != nil {
				return err
			}
			if c.output == "json" {
				return SayJSON(cmd.OutOrStdout(), st)
			}
			sayStatus(cmd.OutOrStdout(), st)
			return nil
		},
	})
}

func sayStatus(w io.Writer, st client.NodeStatus) {
	p := NewPainter(w)
	Say(w, "%s on %s, up %s, version %s\n", p.Bold(st.Name), st.Address, time.Duration(st.Uptime*float64(time.Second)).Round(time.Second), st.Version)

	state := p.Green("live")
	switch {
	case st.Store.Held:
		state = p.Yellow("held: the store holds another or an older state")
	case !st.Store.Live && st.Store.Source == client.SourceNone:
		state = p.Red("no catalog yet")
	case !st.Store.Live && st.Store.Confirmed.IsZero():
		state = p.Yellow("stale: the catalog is the one on disk")
	case !st.Store.Live:
		state = p.Yellow("stale: not confirmed for " + ago(st.Store.Confirmed))
	}
	Say(w, "  store    %s, revision %d, %s\n", state, st.Store.Revision, strings.Join(st.Store.Endpoints, ", "))
	if st.Store.Err != "" {
		Say(w, "           %s\n", st.Store.Err)
	}

	r := st.Router
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
	d := st.DNS
	Say(w, "  dns      *.%s; answered %d itself, %d forwarded, %d from cache, %d stale, %d errors\n", st.Domain, d.Local, d.Forwarded, d.Cached, d.Stale, d.Errors)

	problems := p.Green("no problems")
	if st.Problems > 0 {
		problems = p.Yellow(count(st.Problems, "problem")) + ": flotilla services problems"
	}
	Say(w, "  catalog  %s at revision %s, %s\n", count(st.Services, "service"), strconv.FormatInt(st.Revision, 10), problems)
	if h := st.Held; h != nil {
		Say(w, "  %s %d of %d endpoints vanished at once and stay routed; if that is meant: flotilla services confirm\n", p.Yellow("held"), h.Removed, h.Of)
	}
	for _, text := range st.Warnings {
		Say(w, "  %s %s\n", p.Yellow("warning"), text)
	}
}
