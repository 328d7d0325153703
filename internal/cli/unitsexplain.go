package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"net/http"
	"net/url"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"flotilla/internal/unitapi"
)

func isMissing(err error) bool { return errors.Is(err, fs.ErrNotExist) }

func (c *cli) explainCommand() *cobra.Command {
	return c.clientFlags(&cobra.Command{
		Use: "explain UNIT", Short: "Say why a unit is where it is, or why it is nowhere",
		Args: Between(1, 1, "one unit"), ValidArgsFunction: c.completeUnits,
		RunE: func(cmd *cobra.Command, args []string) error {
			name, _ := unitName(args[0])
			var e unitapi.Explanation
			err := c.dial().Do(cmd.Context(), http.MethodGet, "/v1/units/"+url.PathEscape(name)+"/explain", nil, nil, &e)
			if err != nil {
				return c.noUnit(err, name)
			}
			if c.output == "json" {
				return SayJSON(cmd.OutOrStdout(), e)
			}
			sayExplained(cmd.OutOrStdout(), e)
			return nil
		},
	})
}

// noUnit makes the error that there is no such unit out of one that says so.
func (c *cli) noUnit(err error, name string) error {
	if isNotFound(err) {
		return hinted{fmt.Errorf("the cluster has no unit %s", name), []string{"list them with: flotilla list-unit-files"}}
	}
	return err
}

func sayExplained(w io.Writer, e unitapi.Explanation) {
	p := NewPainter(w)
	u := unitView{e.Unit}
	where := "on no machine"
	switch {
	case u.Global:
		where = "on every machine that fits"
	case u.Machine != nil:
		where = "on " + dash(u.Machine.Node) + " (" + u.at(false) + ")"
	}
	Say(w, "%s: %s, %s\n", p.Bold(u.Name), u.Current, where)
	rows := [][]string{{"  wanted", string(u.Desired)}, {"  version", shortHash(u.Hash, false)}}
	for _, line := range [][2]string{{"placed", u.Placed}, {"leaving", u.Releasing}, {"nowhere", u.Unplaced}} {
		if line[1] != "" {
			rows = append(rows, []string{"  " + line[0], line[1]})
		}
	}
	if e.Summary != "" && e.Summary != u.Unplaced {
		rows = append(rows, []string{"  now", e.Summary})
	}
	for _, st := range u.States {
		text := fmt.Sprintf("%s, %s (%s) on %s", st.Load, st.Active, st.Sub, machineLegend(st.Machine, st.Address, false))
		for _, more := range []string{st.Trouble, st.Waiting} {
			if more != "" {
				text += ": " + more
			}
		}
		rows = append(rows, []string{"  systemd", text})
	}
	table(w, rows...)
	Say(w, "\n%s\n", p.Bold("Machines"))
	if len(e.Machines) == 0 {
		Say(w, "  none is registered\n")
	}
	rows = nil
	for _, m := range e.Machines {
		why := m.Reason
		if m.Score != "" {
			why = strings.TrimPrefix(why+"; "+m.Score, "; ")
		}
		rows = append(rows, []string{"  " + dash(m.Node), shortID(m.ID, false), m.Verdict, why})
	}
	table(w, rows...)
}

func (c *cli) moveCommand() *cobra.Command {
	return c.clientFlags(&cobra.Command{
		Use: "move UNIT MACHINE", Short: "Move a unit to another machine",
		Long: `Move a unit to another machine.

The unit stops where it is, and starts on the other machine once it has stopped.
MACHINE is an ID or its beginning, the name of a node, or an address.`,
		Args: Between(2, 2, "a unit and a machine"), ValidArgsFunction: c.completeMove,
		RunE: func(cmd *cobra.Command, args []string) error {
			name, _ := unitName(args[0])
			all, err := c.machines(cmd.Context())
			if err != nil {
				return err
			}
			m, err := findMachine(all, args[1])
			if err != nil {
				return err
			}
			body := unitapi.MoveRequest{To: m.ID}
			var moved unitapi.Moved
			if err := c.dial().Do(cmd.Context(), http.MethodPost, "/v1/units/"+url.PathEscape(name)+"/move", nil, body, &moved); err != nil {
				return c.noUnit(err, name)
			}
			if c.output == "json" {
				return SayJSON(cmd.OutOrStdout(), moved)
			}
			if !moved.Changed {
				Say(cmd.OutOrStdout(), "Unit %s is on %s already, or on its way there\n", name, machineLegend(m.ID, m.Address, false))
				return nil
			}
			Say(cmd.OutOrStdout(), "Unit %s is to move to %s; see: flotilla explain %s\n", name, machineLegend(m.ID, m.Address, false), name)
			return nil
		},
	})
}

func (c *cli) rebalanceCommand() *cobra.Command {
	var agreed bool
	cmd := &cobra.Command{
		Use: "rebalance", Short: "Show which moves would level the load of the machines; with --yes, make them",
		Args: Between(0, 0, ""),
		RunE: func(cmd *cobra.Command, _ []string) error {
			method := http.MethodGet
			if agreed {
				method = http.MethodPost
			}
			var plan unitapi.Rebalance
			if err := c.dial().Do(cmd.Context(), method, "/v1/rebalance", nil, nil, &plan); err != nil {
				return err
			}
			w := cmd.OutOrStdout()
			if c.output == "json" {
				return SayJSON(w, plan)
			}
			if len(plan.Moves) == 0 {
				Say(w, "Nothing is to be moved.\n")
				return nil
			}
			names := c.legends(cmd.Context())
			rows := [][]string{{"UNIT", "FROM", "TO", "REASON"}}
			for _, m := range plan.Moves {
				rows = append(rows, []string{m.Unit, names(m.From), names(m.To), m.Reason})
			}
			table(w, rows...)
			if agreed {
				Say(w, "\n%s under way; see: flotilla list-unit-files --fields unit,target,reason\n", count(len(plan.Moves), "move"))
			} else {
				Say(w, "\nNothing is moved yet. To do it: flotilla rebalance --yes\n")
			}
			return nil
		},
	}
	cmd.Flags().BoolVar(&agreed, "yes", false, "make the moves")
	return c.clientFlags(cmd)
}

// legends returns a function that shows the machine of an ID; if the machines
// cannot be asked for, by its ID alone.
func (c *cli) legends(ctx context.Context) func(id string) string {
	known := map[string]string{}
	all, err := c.machines(ctx)
	if err == nil {
		for _, m := range all {
			known[m.ID] = dash(m.Node) + " (" + shortID(m.ID, false) + ")"
		}
	}
	return func(id string) string {
		if text, ok := known[id]; ok {
			return text
		}
		return shortID(id, false)
	}
}

func (c *cli) failoverCommand() *cobra.Command {
	allow := &cobra.Command{
		Use: "allow", Short: "Let the units of the machines that vanished together start elsewhere", Args: Between(0, 0, ""),
		RunE: func(cmd *cobra.Command, _ []string) error {
			var done unitapi.FailoverChanged
			if err := c.dial().Do(cmd.Context(), http.MethodPost, "/v1/failover", nil, unitapi.FailoverChange{Allow: true}, &done); err != nil {
				return err
			}
			if c.output == "json" {
				return SayJSON(cmd.OutOrStdout(), done)
			}
			Say(cmd.OutOrStdout(), "The units of machines that are gone are placed anew.\n")
			return nil
		},
	}
	cmd := group("failover", "Decide what happens when many machines vanish at once", allow)
	cmd.Long = `When many machines vanish at once it may be the network and not they that failed.
Their units are then held back for some minutes instead of being started elsewhere.`
	return c.clientFlags(cmd)
}

// completeUnits completes names of units in the cluster, and files.
func (c *cli) completeUnits(cmd *cobra.Command, args []string, prefix string) ([]string, cobra.ShellCompDirective) {
	ctx, cancel := context.WithTimeout(context.Background(), completeLimit)
	defer cancel()
	directive := cobra.ShellCompDirectiveNoFileComp
	if slices.Contains([]string{"submit", "load", "start", "verify"}, cmd.Name()) {
		directive = cobra.ShellCompDirectiveDefault
	}
	one := slices.Contains([]string{"cat", "explain", "move"}, cmd.Name())
	units, err := c.units(ctx)
	if err != nil || one && len(args) > 0 {
		return nil, directive
	}
	var names []string
	for _, name := range slices.Sorted(maps.Keys(units)) {
		if strings.HasPrefix(name, prefix) && !slices.Contains(args, name) {
			names = append(names, name+"\t"+string(units[name].Current))
		}
	}
	return names, directive
}

func (c *cli) completeMove(cmd *cobra.Command, args []string, prefix string) ([]string, cobra.ShellCompDirective) {
	if len(args) == 1 {
		return c.completeMachines(cmd, nil, prefix)
	}
	return c.completeUnits(cmd, args, prefix)
}
