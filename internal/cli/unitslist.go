package cli

import (
	"fmt"
	"io"
	"maps"
	"slices"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"flotilla/internal/client"
	"flotilla/internal/unit"
	"flotilla/internal/wire"
)

// listing is the flags of the commands that list.
type listing struct {
	full, noLegend bool
	fields         string
}

// add adds the flags; fields are those of the command.
func (l *listing) add(cmd *cobra.Command, standard string, fields []string) {
	fl := cmd.Flags()
	fl.BoolVarP(&l.full, "full", "l", false, "do not shorten machine IDs and hashes")
	fl.BoolVar(&l.full, "l", false, "the same")
	_ = fl.MarkHidden("l") // -l and --l both were fleetctl's
	fl.BoolVar(&l.noLegend, "no-legend", false, "no line with the names of the columns")
	fl.StringVar(&l.fields, "fields", standard, fmt.Sprintf("columns to print, of %q", strings.Join(fields, ",")))
}

// columns returns the columns asked for, of those that there are.
func columns(c *cli, l *listing, all []string) ([]string, error) {
	if l.fields == "" && c.fleet {
		return nil, fleetText("Must define output format")
	}
	cols := strings.Split(l.fields, ",")
	for _, col := range cols {
		switch {
		case slices.Contains(all, col):
		case c.fleet:
			return nil, fleetText("Invalid key in output format: %q", col)
		default:
			return nil, Usage(fmt.Sprintf("--fields: there is no column %q", col), "there are "+strings.Join(all, ", "))
		}
	}
	return cols, nil
}

// rows makes the table of items; each column is a function of an item.
func rows[T any](l *listing, cols []string, has map[string]func(T, bool) string, items []T) [][]string {
	all := make([][]string, 0, len(items)+1)
	if !l.noLegend {
		all = append(all, strings.Split(strings.ToUpper(strings.Join(cols, ",")), ","))
	}
	for _, item := range items {
		row := make([]string, len(cols))
		for i, col := range cols {
			row[i] = dash(has[col](item, l.full))
		}
		all = append(all, row)
	}
	return all
}

// unitList is a command that lists something of units.
func unitList[T any](c *cli, use, standard string, has map[string]func(T, bool) string, find func(cmd *cobra.Command, args, cols []string) ([]T, error)) *cobra.Command {
	var l listing
	all := slices.Sorted(maps.Keys(has))
	cmd := &cobra.Command{
		Use: use, Args: cobra.ArbitraryArgs, ValidArgsFunction: c.completeUnits,
		RunE: func(cmd *cobra.Command, args []string) error {
			cols, err := columns(c, &l, all)
			if err != nil {
				return err
			}
			if c.fleet {
				args = nil // fleetctl takes none, and ignores them
			}
			names, err := unitNames(args)
			if err != nil {
				return err
			}
			items, err := find(cmd, names, cols)
			return show(c, cmd, items, err, func(w io.Writer, items []T) { tabs(w, rows(&l, cols, has, items)) })
		},
	}
	l.add(cmd, standard, all)
	return c.unitFlags(cmd)
}

// listed returns the units that names mean, all for none, by name.
func (c *cli) listed(cmd *cobra.Command, names []string) ([]wire.Unit, error) {
	known, err := c.units(cmd.Context(), names)
	if err == nil {
		err = noUnits(known.Missing)
	}
	return append([]wire.Unit{}, known.Units...), err // [] in JSON, not null
}

func shortHash(hash string, full bool) string {
	if full {
		return hash
	}
	return hash[:min(7, len(hash))]
}

func stateLegend(s wire.UnitState, full bool) string {
	return legend(wire.NodeRef{ID: s.NodeID, Address: s.Address}, full)
}

var stateFields = map[string]func(wire.UnitState, bool) string{
	"unit":    func(s wire.UnitState, _ bool) string { return s.Unit },
	"machine": stateLegend,
	"node":    func(s wire.UnitState, _ bool) string { return s.Node },
	"load":    func(s wire.UnitState, _ bool) string { return s.Load },
	"active":  func(s wire.UnitState, _ bool) string { return s.Active },
	"sub":     func(s wire.UnitState, _ bool) string { return s.Sub },
	"hash":    func(s wire.UnitState, full bool) string { return shortHash(s.Hash, full) },
}

func (c *cli) listUnitsCommand() *cobra.Command {
	cmd := unitList(c, "list-units [UNIT...]", "unit,machine,active,sub", stateFields, func(cmd *cobra.Command, names, _ []string) ([]wire.UnitState, error) {
		states := []wire.UnitState{}
		if len(names) == 0 { // also of units that were destroyed and are still stopping
			answer, err := client.Get[wire.States](cmd.Context(), c.dial(), "/v1/states", nil)
			return append(states, answer.States...), err
		}
		list, err := c.listed(cmd, names)
		for _, u := range list {
			for _, st := range u.States {
				if st.Load != "" { // else it only waits there
					states = append(states, st)
				}
			}
		}
		return states, err
	})
	cmd.Short = "List the units that nodes have, and how they are"
	cmd.Long = "List the units that nodes have, one line for each unit and node.\n\nWith UNIT, a name or a pattern such as 'web@*', only those."
	cmd.Example = "  flotilla list-units\n  flotilla list-units 'web@*' --no-legend --fields unit,active"
	return cmd
}

// place is where a unit belongs.
func place(u wire.Unit, full bool) string {
	switch {
	case u.Global:
		return "global"
	case u.Node == nil:
		return "-"
	}
	return legend(*u.Node, full)
}

var fileFields = map[string]func(wire.Unit, bool) string{
	"unit":     func(u wire.Unit, _ bool) string { return u.Name },
	"hash":     func(u wire.Unit, full bool) string { return shortHash(u.Hash, full) },
	"dstate":   func(u wire.Unit, _ bool) string { return string(u.Desired) },
	"target":   place,
	"tmachine": place,
	"global":   func(u wire.Unit, _ bool) string { return strconv.FormatBool(u.Global) },
	"state":    func(u wire.Unit, _ bool) string { return string(u.Current) }, // none of global ones
	"desc":     func(u wire.Unit, _ bool) string { return description(u.Text) },
	"reason":   func(u wire.Unit, _ bool) string { return reason(u) },
}

// description returns the Description= of a unit file, the last if it has many.
func description(file string) string {
	f, err := unit.Parse(file)
	if err != nil {
		return ""
	}
	last := ""
	for _, o := range f.Options {
		if o.Section == "Unit" && o.Name == "Description" {
			last = o.Value
		}
	}
	return last
}

// reason is why a unit is where it is, or why it is nowhere.
func reason(u wire.Unit) string {
	switch {
	case u.Unplaced != "":
		return u.Unplaced
	case u.Leaving != "":
		return "leaving: " + u.Leaving
	case u.Placed != "":
		return u.Placed
	case u.Desired == unit.Inactive:
		return "inactive"
	}
	return ""
}

func (c *cli) listUnitFilesCommand() *cobra.Command {
	cmd := unitList(c, "list-unit-files [UNIT...]", "unit,hash,dstate,state,target", fileFields, func(cmd *cobra.Command, names, cols []string) ([]wire.Unit, error) {
		if slices.Contains(cols, "tmachine") {
			Say(cmd.ErrOrStderr(), "WARNING: The \"tmachine\" field is deprecated. Use \"target\" instead\n")
		}
		list, err := c.listed(cmd, names)
		for i := range list {
			if err == nil && slices.Contains(cols, "desc") {
				var full wire.Unit
				if full, err = c.unit(cmd.Context(), list[i].Name); isNotFound(err) {
					err = nil // it was destroyed meanwhile
				}
				list[i].Text = full.Text
			}
		}
		return list, err
	})
	cmd.Short = "List the units that the cluster has, and where they belong"
	cmd.Long = "List the units that the cluster has, on a node or not.\n\nDSTATE is what is wanted, STATE what is; TARGET is the node. --fields unit,state,reason\nsays why."
	cmd.Example = "  flotilla list-unit-files\n  flotilla list-unit-files --fields unit,target,reason"
	return cmd
}
