package cli

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"

	"github.com/spf13/cobra"

	"flotilla/internal/text"
	"flotilla/internal/wire"
)

func (c *cli) explainCommand() *cobra.Command {
	return c.clientFlags(&cobra.Command{
		Use: "explain UNIT", Short: "Say why a unit is where it is, or why it is nowhere",
		Args: Between(1, 1, "one unit"), ValidArgsFunction: c.completeUnits,
		RunE: func(cmd *cobra.Command, args []string) error {
			name, _ := unitName(args[0])
			err := asking(c, http.MethodGet, "/v1/units/{}/explain", nil, sayUnit)(cmd, []string{name})
			if isNotFound(err) {
				return noUnits([]string{name})
			}
			return err
		},
	})
}

func sayUnit(w io.Writer, e wire.UnitExplanation) {
	p := NewPainter(w)
	u, where, current := e.Unit, "on no node", string(e.Unit.Current)
	switch {
	case u.Global:
		where, current = "on every node that fits", "global"
	case u.Node != nil:
		where = "on " + nodeName(*u.Node)
	}
	Say(w, "%s: %s, %s\n", p.Bold(u.Name), current, where)
	rows := [][]string{{"  wanted", string(u.Desired)}, {"  version", shortHash(u.Hash, false)}}
	for _, line := range [][2]string{{"placed", u.Placed}, {"leaving", u.Leaving}, {"nowhere", u.Unplaced}} {
		if line[1] != "" {
			rows = append(rows, []string{"  " + line[0], line[1]})
		}
	}
	if e.Summary != "" && e.Summary != u.Unplaced {
		rows = append(rows, []string{"  now", e.Summary})
	}
	for _, st := range u.States {
		said := fmt.Sprintf("%s, %s (%s) on %s", st.Load, st.Active, st.Sub, stateLegend(st, false))
		for _, more := range []string{st.Trouble, st.Waiting} {
			if more != "" {
				said += ": " + more
			}
		}
		rows = append(rows, []string{"  systemd", said})
	}
	table(w, rows...)
	Say(w, "\n%s\n", p.Bold("Nodes"))
	if len(e.Nodes) == 0 {
		Say(w, "  none runs units\n")
	}
	rows = nil
	for _, n := range e.Nodes {
		why := n.Reason
		if n.Score != "" {
			why = strings.TrimPrefix(why+"; "+n.Score, "; ")
		}
		rows = append(rows, []string{"  " + dash(n.Node), shortID(n.NodeID, false), n.Verdict, why})
	}
	table(w, rows...)
}

func (c *cli) moveCommand() *cobra.Command {
	return c.clientFlags(&cobra.Command{
		Use: "move UNIT NODE", Short: "Move a unit to another node",
		Long: `Move a unit to another node.

The unit stops where it is, and starts on the other node once it has stopped.
NODE is a name, an ID or its beginning, or an address.`,
		Args: Between(2, 2, "a unit and a node"), ValidArgsFunction: c.completeMove,
		RunE: func(cmd *cobra.Command, args []string) error {
			name, _ := unitName(args[0])
			var moved wire.Moved
			err := c.dial().Do(cmd.Context(), http.MethodPost, "/v1/units/"+url.PathEscape(name)+"/move", nil, wire.MoveRequest{To: args[1]}, &moved)
			return show(c, cmd, moved, err, func(w io.Writer, moved wire.Moved) {
				if !moved.Changed {
					Say(w, "Unit %s is on %s already, or on its way there\n", moved.Unit, legend(moved.Node, false))
					return
				}
				Say(w, "Unit %s is to move to %s; see: flotilla explain %s\n", moved.Unit, legend(moved.Node, false), moved.Unit)
			})
		},
	})
}

func (c *cli) rebalanceCommand() *cobra.Command {
	var agreed bool
	cmd := &cobra.Command{
		Use: "rebalance", Short: "Show which moves would level the load of the nodes; with --yes, make them",
		Args: Between(0, 0, ""),
		RunE: func(cmd *cobra.Command, args []string) error {
			method := http.MethodGet
			if agreed {
				method = http.MethodPost
			}
			return asking(c, method, "/v1/rebalance", nil, func(w io.Writer, plan wire.Rebalance) { c.sayMoves(cmd.Context(), w, plan, agreed) })(cmd, args)
		},
	}
	cmd.Flags().BoolVar(&agreed, "yes", false, "make the moves")
	return c.clientFlags(cmd)
}

func (c *cli) sayMoves(ctx context.Context, w io.Writer, plan wire.Rebalance, made bool) {
	if len(plan.Moves) == 0 {
		Say(w, "Nothing is to be moved.\n")
		return
	}
	names := map[string]string{}
	if known, err := c.nodes(ctx); err == nil { // else the IDs have to do
		for _, n := range known.Nodes {
			names[n.ID] = n.Name + " (" + shortID(n.ID, false) + ")"
		}
	}
	rows := [][]string{{"UNIT", "FROM", "TO", "REASON"}}
	for _, m := range plan.Moves {
		rows = append(rows, []string{m.Unit, cmp.Or(names[m.From], shortID(m.From, false)), cmp.Or(names[m.To], shortID(m.To, false)), m.Reason})
	}
	table(w, rows...)
	if made {
		Say(w, "\n%s under way; see: flotilla list-unit-files --fields unit,target,reason\n", text.Count(len(plan.Moves), "move"))
	} else {
		Say(w, "\nNothing is moved yet. To do it: flotilla rebalance --yes\n")
	}
}

func (c *cli) failoverCommand() *cobra.Command {
	cmd := group("failover", "Decide what happens when many nodes vanish at once", &cobra.Command{
		Use: "allow", Short: "Let the units of the nodes that vanished together start elsewhere", Args: Between(0, 0, ""),
		RunE: asking(c, http.MethodPost, "/v1/failover", wire.FailoverChange{Allow: true}, func(w io.Writer, _ wire.FailoverChanged) {
			Say(w, "The units of nodes that are gone are placed anew.\n")
		}),
	})
	cmd.Long = `When many nodes vanish at once it may be the network and not they that failed.
Their units are then held back for some minutes instead of being started elsewhere.`
	return c.clientFlags(cmd)
}

func (c *cli) completeMove(cmd *cobra.Command, args []string, prefix string) ([]string, cobra.ShellCompDirective) {
	if len(args) == 1 {
		return c.completeNodes(cmd, nil, prefix)
	}
	return c.completeUnits(cmd, args, prefix)
}
