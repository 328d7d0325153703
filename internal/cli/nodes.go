package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"flotilla/internal/client"
	"flotilla/internal/text"
	"flotilla/internal/wire"
)

func (c *cli) nodesCommand() *cobra.Command {
	drain := c.settingsCommand("drain", "Take a node out of its balancer and move its units away; global units stay",
		wire.SettingsChange{Drain: new(true)}, "is draining: its balancer's check answers 503 and its units move away")
	drain.Long = drain.Short + `.

The command returns when no unit is placed on the node any more. The node goes on
routing what still comes to it.

` + nodeHelp
	cmd := group("nodes", "List nodes, take them out of use, set their metadata",
		c.nodesList(), drain,
		c.settingsCommand("undrain", "Let a node take requests and units again", wire.SettingsChange{Drain: new(false)}, "takes requests and units again"),
		c.settingsCommand("cordon", "Place nothing new on a node; what is there stays", wire.SettingsChange{Cordon: new(true)}, "is cordoned: nothing new is placed there"),
		c.settingsCommand("uncordon", "Use a node again: neither cordoned nor draining", wire.SettingsChange{Cordon: new(false), Drain: new(false)}, "is in use again"),
		c.leaveCommand(), c.metadataCommand())
	return c.clientFlags(cmd)
}

// nodeFields are the columns of the lists of nodes. The second argument says that
// IDs are not shortened.
var nodeFields = map[string]func(n wire.Node, full bool) string{
	"machine":  func(n wire.Node, full bool) string { return shortID(n.ID, full) },
	"ip":       func(n wire.Node, _ bool) string { return n.Address },
	"metadata": func(n wire.Node, _ bool) string { return metadataText(n.Metadata) },
	"node":     func(n wire.Node, _ bool) string { return n.Name },
	"units":    func(n wire.Node, _ bool) string { return strconv.Itoa(n.Units) },
	"state":    func(n wire.Node, _ bool) string { return stateText(n) },
	"id":       func(n wire.Node, full bool) string { return shortID(n.ID, full) },
	"address":  func(n wire.Node, _ bool) string { return n.Address },
	"version":  func(n wire.Node, _ bool) string { return n.Version },
	"up":       func(n wire.Node, _ bool) string { return ago(n.Started) },
	"applied": func(n wire.Node, _ bool) string {
		if !n.Routes {
			return ""
		}
		return strconv.FormatInt(n.Applied, 10)
	},
	"role": func(n wire.Node, _ bool) string {
		switch {
		case n.Leader && n.Here:
			return "leader, this node"
		case n.Leader:
			return "leader"
		case n.Here:
			return "this node"
		}
		return ""
	},
}

// machineFields are those of list-machines.
var machineFields = []string{"ip", "machine", "metadata", "node", "state", "units"}

// metadataText shows metadata as fleetctl does.
func metadataText(metadata map[string]string) string {
	var pairs []string
	for _, k := range slices.Sorted(maps.Keys(metadata)) {
		pairs = append(pairs, k+"="+metadata[k])
	}
	return strings.Join(pairs, ",")
}

// stateText says whether a node works, and what operators have done to it.
func stateText(n wire.Node) string {
	var words []string
	if n.Routes && !n.Serving {
		words = append(words, "not serving")
	}
	switch {
	case n.Drain || n.Draining:
		words = append(words, "draining")
	case n.Cordon:
		words = append(words, "cordoned")
	case len(words) > 0:
	case n.Routes:
		words = append(words, "serving")
	default:
		words = append(words, "in use")
	}
	if n.Reason != "" {
		words[len(words)-1] += " (" + n.Reason + ")"
	}
	return strings.Join(words, ", ")
}

func (c *cli) nodes(ctx context.Context) (wire.Nodes, error) {
	return client.Get[wire.Nodes](ctx, c.dial(), "/v1/nodes", nil)
}

func (c *cli) nodesList() *cobra.Command {
	var l listing
	cmd := &cobra.Command{
		Use: "list", Short: "List the nodes that are there, and the members of the store", Args: Between(0, 0, ""),
		Example: "  flotilla nodes list\n  flotilla nodes list --full --no-legend --fields id,units,state",
		RunE: func(cmd *cobra.Command, _ []string) error {
			cols, err := columns(c, &l, slices.Sorted(maps.Keys(nodeFields)))
			if err != nil {
				return err
			}
			answer, err := c.nodes(cmd.Context())
			if err != nil {
				return err
			}
			warnNodes(cmd.ErrOrStderr(), answer)
			return show(c, cmd, answer, nil, func(w io.Writer, answer wire.Nodes) {
				table(w, rows(&l, cols, nodeFields, answer.Nodes)...)
				if !l.noLegend && !cmd.Flags().Changed("fields") {
					sayMembers(w, answer.Store)
				}
			})
		},
	}
	l.add(cmd, "node,address,state,applied,units,id,up,version,role", slices.Sorted(maps.Keys(nodeFields)))
	return cmd
}

// warnNodes says what is unusual about a list of nodes.
func warnNodes(w io.Writer, n wire.Nodes) {
	if n.Stale {
		Say(w, "flotilla: the store does not answer: these are the nodes as last known\n")
	}
	if f := n.Failover; f != nil && !f.Allowed && len(f.Held) > 0 {
		Say(w, "flotilla: %s vanished together: their units wait until %s, unless you say: flotilla failover allow\n",
			text.Count(len(f.Held), "node"), time.Unix(f.Until, 0).Format(time.TimeOnly))
	}
}

func sayMembers(w io.Writer, health wire.StoreHealth) {
	Say(w, "\n")
	if !health.Quorum {
		Say(w, "%s %s\n", NewPainter(w).Yellow("the store has no quorum:"), health.Err)
	}
	rows := [][]string{{"STORE MEMBER", "ENDPOINT", "ROLE", "SIZE", "LATENCY", "VERSION", ""}}
	for _, m := range health.Members {
		role := "voter"
		switch {
		case !m.Reachable:
			role = "unreachable"
		case m.Leader:
			role = "leader"
		case m.Learner:
			role = "learner"
		}
		rows = append(rows, []string{dash(m.Name), dash(m.Endpoint), role, fmt.Sprintf("%d MiB", m.DBSize>>20),
			m.Latency.Round(10 * time.Microsecond).String(), dash(m.Version), m.Err})
	}
	table(w, rows...)
}

// listMachinesCommand is fleet's list of nodes: of those that run units.
func (c *cli) listMachinesCommand() *cobra.Command {
	var l listing
	cmd := &cobra.Command{
		Use: "list-machines", Short: "List the nodes that run units, as fleetctl does", Args: Between(0, 0, ""),
		Example: "  flotilla list-machines --full --no-legend --fields machine,units,state",
		RunE: func(cmd *cobra.Command, _ []string) error {
			cols, err := columns(c, &l, machineFields)
			if err != nil {
				return err
			}
			var answer wire.Nodes
			if c.fleet {
				answer.Nodes, err = c.fleetMachines(cmd.Context())
			} else {
				answer, err = c.nodes(cmd.Context())
				warnNodes(cmd.ErrOrStderr(), answer)
			}
			machines := slices.DeleteFunc(append([]wire.Node{}, answer.Nodes...), func(n wire.Node) bool { return !n.RunsUnits })
			slices.SortFunc(machines, func(a, b wire.Node) int { return strings.Compare(a.ID, b.ID) })
			return show(c, cmd, machines, err, func(w io.Writer, machines []wire.Node) { tabs(w, rows(&l, cols, nodeFields, machines)) })
		},
	}
	l.add(cmd, "machine,ip,metadata", machineFields)
	return c.unitFlags(cmd)
}

// fleetMachines asks fleet's API, which refuses while the node that answers is
// not registered itself: fleetctl's users see by it that something is wrong.
func (c *cli) fleetMachines(ctx context.Context) ([]wire.Node, error) {
	var all []wire.Node
	query := url.Values{}
	for {
		var page struct {
			Machines []struct {
				ID        string            `json:"id"`
				PrimaryIP string            `json:"primaryIP"`
				Metadata  map[string]string `json:"metadata"`
			} `json:"machines"`
			NextPageToken string `json:"nextPageToken"`
		}
		if err := c.dial().Do(ctx, http.MethodGet, "/fleet/v1/machines", query, nil, &page); err != nil {
			return nil, err
		}
		for _, m := range page.Machines {
			all = append(all, wire.Node{ID: m.ID, Address: m.PrimaryIP, Metadata: m.Metadata, RunsUnits: true})
		}
		if page.NextPageToken == "" {
			return all, nil
		}
		query.Set("nextPageToken", page.NextPageToken)
	}
}

func (c *cli) leaveCommand() *cobra.Command {
	return &cobra.Command{
		Use: "leave", Short: "Stop all units of the node that answers, and take it out of the cluster", Args: Between(0, 0, ""),
		Long: `Stop all units of the node that answers, global ones too, and take it out of the
cluster. The others start elsewhere. It comes back when it is started again. To move
units away while the node stays, drain it.`,
		RunE: asking(c, http.MethodPost, "/v1/leave", nil, func(w io.Writer, _ struct{}) {
			Say(w, "the node has left the cluster; it comes back when it is started again\n")
		}),
	}
}

const nodeHelp = "NODE is a name, an ID or its beginning, or an address; without one, the node that answers."

func (c *cli) settingsCommand(use, short string, change wire.SettingsChange, done string) *cobra.Command {
	var reason string
	var wait bool
	var limit time.Duration
	cmd := &cobra.Command{
		Use: use + " [NODE]", Short: short, Long: short + ".\n\n" + nodeHelp,
		Args: Between(0, 1, "one node"), ValidArgsFunction: c.completeNodes,
		RunE: func(cmd *cobra.Command, args []string) error {
			body := change
			if reason != "" {
				body.Reason = &reason
			}
			name := strings.Join(args, "")
			if name == "" {
				here, err := client.Get[wire.Status](cmd.Context(), c.dial(), "/v1/status", nil)
				if err != nil {
					return err
				}
				name = here.ID
			}
			changed, err := c.set(cmd, name, body)
			if err != nil {
				return err
			}
			if c.output != "json" {
				Say(cmd.OutOrStdout(), "node %s %s\n", nodeName(changed.Node), done)
			}
			if wait {
				if err := c.awaitEmpty(cmd, changed.Node, limit); err != nil {
					return err
				}
			}
			return show(c, cmd, changed, nil, func(io.Writer, wire.SettingsChanged) {})
		},
	}
	if use == "drain" || use == "cordon" {
		cmd.Flags().StringVar(&reason, "reason", "", "why, for those who wonder later")
	}
	if use == "drain" {
		cmd.Flags().BoolVar(&wait, "wait", true, "return when no unit is placed there any more; --wait=false returns at once")
		cmd.Flags().DurationVar(&limit, "timeout", 5*time.Minute, "how long to wait; after that the exit code is 3")
	}
	return cmd
}

// nodeName shows a node by its name and, in brackets, as fleetctl does.
func nodeName(n wire.NodeRef) string {
	if n.Name == "" {
		return legend(n, false)
	}
	return n.Name + " (" + legend(n, false) + ")"
}

// legend shows a node as fleetctl does.
func legend(n wire.NodeRef, full bool) string {
	if n.Address == "" {
		return shortID(n.ID, full)
	}
	return shortID(n.ID, full) + "/" + n.Address
}

func shortID(id string, full bool) string {
	if full {
		return id
	}
	return id[:min(8, len(id))] + "..."
}

// awaitEmpty waits until no unit is placed on a node, and says which are left if
// that takes too long.
func (c *cli) awaitEmpty(cmd *cobra.Command, n wire.NodeRef, limit time.Duration) error {
	w, first, still := cmd.OutOrStdout(), "", ""
	if c.output == "json" {
		w = io.Discard
	}
	left, err := c.await(cmd.Context(), wire.Wait{Goal: wire.GoalEmpty, Node: n.ID}, limit, func(e wire.WaitEvent) {
		switch {
		case e.Outcome == wire.WaitPending:
			Say(w, "%s to go\n", text.Count(e.Left, "unit"))
		case e.Outcome == wire.WaitReached:
			Say(w, "no unit is placed there any more\n")
		case e.Outcome == wire.WaitGone:
			still = fmt.Sprintf("node %s is gone, and its units with it", nodeName(n))
		case first == "":
			first = e.Unit
			fallthrough
		default:
			still += "\n" + e.Unit + ": " + e.Message
		}
	})
	switch {
	case err != nil:
		return err
	case left > 0:
		err = fmt.Errorf("%s still on node %s after %s%s", text.Count(left, "unit"), nodeName(n), limit, still)
		return exitCode{hinted{err, []string{"flotilla explain " + first}}, ExitNotConverged}
	case still != "":
		return errors.New(still)
	}
	return nil
}

func (c *cli) metadataCommand() *cobra.Command {
	return group("metadata", "Set or remove metadata of a node, over what its configuration says",
		c.editMetadata("set NODE KEY=VALUE...", "Set metadata of a node", "KEY=VALUE", "such as disk=ssd; "),
		c.editMetadata("remove NODE KEY...", "Remove metadata of a node, also what its configuration says", "KEY", ""))
}

func (c *cli) editMetadata(use, short, form, example string) *cobra.Command {
	const letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_.-"
	return &cobra.Command{
		Use: use, Short: short, Long: short + ". It stays so when the node restarts.\n\nNODE is a name, an ID or its beginning, or an address.",
		Args: Between(2, 1000, "a node and "+form), ValidArgsFunction: c.completeNodes,
		RunE: func(cmd *cobra.Command, args []string) error {
			change := wire.SettingsChange{Metadata: map[string]*string{}}
			for _, arg := range args[1:] {
				key, value, sets := strings.Cut(arg, "=") // an empty value hides the node's own
				if key == "" || strings.Trim(key, letters) != "" || sets != (form == "KEY=VALUE") || sets && value == "" {
					return Usage(fmt.Sprintf("%q is not %s of metadata", arg, form), example+"keys are of letters, digits, '_', '.' and '-'")
				}
				change.Metadata[key] = &value
			}
			changed, err := c.set(cmd, args[0], change)
			return show(c, cmd, changed, err, func(w io.Writer, changed wire.SettingsChanged) {
				Say(w, "metadata of node %s: %s\n", nodeName(changed.Node), dash(metadataText(changed.Metadata)))
			})
		},
	}
}

// set changes the settings of a node.
func (c *cli) set(cmd *cobra.Command, node string, change wire.SettingsChange) (changed wire.SettingsChanged, err error) {
	err = c.dial().Do(cmd.Context(), http.MethodPost, "/v1/nodes/"+url.PathEscape(node)+"/settings", nil, change, &changed)
	return changed, err
}

func (c *cli) completeNodes(cmd *cobra.Command, args []string, prefix string) ([]string, cobra.ShellCompDirective) {
	return complete(c, len(args) == 0, "/v1/nodes", prefix, func(answer wire.Nodes) (words []string) {
		for _, n := range answer.Nodes {
			name := n.Name
			if !strings.HasPrefix(name, prefix) {
				name = n.ID
			}
			words = append(words, name+"\t"+n.Address)
		}
		return words
	}), cobra.ShellCompDirectiveNoFileComp
}
