package cli

import (
	"context"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"flotilla/internal/client"
)

func (c *cli) nodesCommand() *cobra.Command {
	return c.clientFlags(group("nodes", "List nodes, take one out of its balancer",
		c.nodesList(),
		c.nodesDrain("drain", "Make the balancer's check of this node answer 503", true),
		c.nodesDrain("undrain", "Make the balancer's check of this node answer 200 again", false)))
}

func (c *cli) nodesList() *cobra.Command {
	return &cobra.Command{
		Use: "list", Short: "List the live nodes and the members of the store", Args: Between(0, 0, ""),
		RunE: func(cmd *cobra.Command, _ []string) error {
			n, err := c.dial().Nodes(cmd.Context())
			if err != nil {
				return err
			}
			w := cmd.OutOrStdout()
			if c.output == "json" {
				return SayJSON(w, n)
			}
			rows := [][]string{{"NODE", "ADDRESS", "STATE", "APPLIED", "UP", "VERSION", ""}}
			for _, r := range n.Nodes {
				state, self := "serving", ""
				switch {
				case !r.Serving:
					state = "not serving"
				case r.Draining:
					state = "draining"
				}
				if r.Self {
					self = "this node"
				}
				rows = append(rows, []string{r.Name, r.Address, state, strconv.FormatInt(r.Applied, 10), ago(r.Started), r.Version, self})
			}
			table(w, rows...)
			Say(w, "\n")
			if !n.Store.Quorum {
				p := NewPainter(w)
				Say(w, "%s %s\n", p.Yellow("the store has no quorum:"), n.Store.Err)
			}
			rows = [][]string{{"STORE MEMBER", "ENDPOINT", "ROLE", "SIZE", "LATENCY", "VERSION", ""}}
			for _, m := range n.Store.Members {
				rows = append(rows, []string{dash(m.Name), dash(m.Endpoint), role(m), fmt.Sprintf("%d MiB", m.DBSize>>20),
					m.Latency.Round(10 * time.Microsecond).String(), dash(m.Version), m.Err})
			}
			table(w, rows...)
			return nil
		},
	}
}

func role(m client.Member) string {
	switch {
	case !m.Reachable:
		return "unreachable"
	case m.Leader:
		return "leader"
	case m.Learner:
		return "learner"
	}
	return "voter"
}

func (c *cli) nodesDrain(use, short string, draining bool) *cobra.Command {
	return &cobra.Command{
		Use: use + " [NAME]", Short: short, Args: Between(0, 1, "one node"), ValidArgsFunction: c.completeNodes,
		Long: short + ".\n\nA node is drained through its own socket. NAME is a guard: if the socket is another node's,\nnothing is done. The node goes on routing what still comes to it.",
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx, node := cmd.Context(), c.dial()
			st, err := node.Status(ctx)
			if err != nil {
				return err
			}
			if len(args) == 1 && args[0] != st.Name {
				return hinted{fmt.Errorf("the node on %s is %s, not %s", c.socket, st.Name, args[0]),
					[]string{"run this on " + args[0] + ", or give its --socket"}}
			}
			if err := node.Drain(ctx, draining); err != nil {
				return err
			}
			if c.output == "json" {
				return SayJSON(cmd.OutOrStdout(), map[string]any{"node": st.Name, "draining": draining})
			}
			state := "takes new traffic again"
			if draining {
				state = "is draining: its balancer's check answers 503"
			}
			Say(cmd.OutOrStdout(), "node %s %s\n", st.Name, state)
			return nil
		},
	}
}

func (c *cli) completeNodes(_ *cobra.Command, args []string, prefix string) ([]string, cobra.ShellCompDirective) {
	ctx, cancel := context.WithTimeout(context.Background(), completeLimit)
	defer cancel()
	n, err := c.dial().Nodes(ctx)
	if err != nil || len(args) > 0 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	var names []string
	for _, r := range n.Nodes {
		if strings.HasPrefix(r.Name, prefix) {
			names = append(names, r.Name+"\t"+r.Address)
		}
	}
	return names, cobra.ShellCompDirectiveNoFileComp
}
