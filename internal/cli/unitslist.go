package cli

import (
	"fmt"
	"io"
	"maps"
	"net/http"
	"slices"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"flotilla/internal/registry"
	"flotilla/internal/unit"
	"flotilla/internal/unitapi"
)

// tabs prints rows as fleetctl does: columns end in one or more tabs.
func tabs(w io.Writer, rows [][]string) { columnar(w, 8, 1, '\t', rows) }

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

// columns returns the columns asked for. has knows all that there are.
func columns[F any](c *cli, l *listing, has map[string]F) ([]string, error) {
	if l.fields == "" && c.fleet {
		return nil, fleetText("Must define output format")
	}
	cols := strings.Split(l.fields, ",")
	for _, col := range cols {
		if _, ok := has[col]; ok {
			continue
		}
		if c.fleet {
			return nil, fleetText("Invalid key in output format: %q", col)
		}
		return nil, Usage(fmt.Sprintf("--fields: there is no column %q", col), "there are "+strings.Join(slices.Sorted(maps.Keys(has)), ", "))
	}
	return cols, nil
}

// rows makes the table of items; each column is a function of an item.
func rows[T any](l *listing, cols []string, has map[string]func(T, bool) string, items []T) [][]string {
	var all [][]string
	if !l.noLegend {
		var head []string
		for _, col := range cols {
			head = append(head, strings.ToUpper(col))
		}
		all = append(all, head)
	}
	for _, item := range items {
		var row []string
		for _, col := range cols {
			row = append(row, dash(has[col](item, l.full)))
		}
		all = append(all, row)
	}
	return all
}

// placedState is a unit on one machine: a line of list-units.
type placedState struct {
	unitapi.UnitState
	Node    string `json:"node"`
	Address string `json:"address"`
}

func shortHash(hash string, full bool) string {
	if full {
		return hash
	}
	return hash[:min(7, len(hash))]
}

var stateFields = map[string]func(placedState, bool) string{
	"unit":    func(s placedState, _ bool) string { return s.Unit },
	"machine": func(s placedState, full bool) string { return machineLegend(s.Machine, s.Address, full) },
	"node":    func(s placedState, _ bool) string { return s.Node },
	"load":    func(s placedState, _ bool) string { return s.Load },
	"active":  func(s placedState, _ bool) string { return s.Active },
	"sub":     func(s placedState, _ bool) string { return s.Sub },
	"hash":    func(s placedState, full bool) string { return shortHash(s.Hash, full) },
}

func (c *cli) listUnitsCommand() *cobra.Command {
	var l listing
	cmd := &cobra.Command{
		Use: "list-units [UNIT...]", Short: "List the units that machines have, and how they are",
		Long:    "List the units that machines have, one line for each unit and machine.\n\nWith UNIT, a name or a pattern such as 'web@*', only those.",
		Example: "  flotilla list-units\n  flotilla list-units 'web@*' --no-legend --fields unit,active",
		Args:    cobra.ArbitraryArgs, ValidArgsFunction: c.completeUnits,
		RunE: func(cmd *cobra.Command, args []string) error {
			r := c.run(cmd, "list-units")
			cols, err := columns(c, &l, stateFields)
			if err != nil {
				return err
			}
			states, err := r.listedStates(cmd, args)
			if err != nil {
				return err
			}
			if c.output == "json" {
				return SayJSON(r.io.out, states)
			}
			tabs(r.io.out, rows(&l, cols, stateFields, states))
			return nil
		},
	}
	l.add(cmd, "unit,machine,active,sub", slices.Sorted(maps.Keys(stateFields)))
	return c.unitFlags(cmd)
}

// listedStates returns what machines have of the units that args mean, all for
// none: then also of units that were destroyed and are still stopping.
func (r *unitRun) listedStates(cmd *cobra.Command, args []string) ([]placedState, error) {
	all := r.fleet || len(args) == 0
	meant := map[string]bool{}
	if !all {
		list, err := r.listed(cmd, args)
		if err != nil {
			return nil, err
		}
		for _, u := range list {
			meant[u.Name] = true
		}
	}
	var answer unitapi.States
	if err := r.dial().Do(cmd.Context(), http.MethodGet, "/v1/states", nil, nil, &answer); err != nil {
		return nil, r.notListed(err)
	}
	states := []placedState{}
	for _, st := range answer.States {
		if all || meant[st.Unit] {
			m := answer.Machines[st.Machine]
			states = append(states, placedState{st, m.Node, m.Address})
		}
	}
	return states, nil
}

func (r *unitRun) notListed(err error) error {
	if err != nil && r.fleet {
		return fleetSays{"Error retrieving list of units from repository: ", err}
	}
	return err
}

// listed returns the units that args mean, all for none, by name.
func (r *unitRun) listed(cmd *cobra.Command, args []string) ([]unitView, error) {
	if r.fleet {
		args = nil // fleetctl takes none, and ignores them
	}
	if len(args) == 0 {
		all, err := r.units(cmd.Context())
		return sortedUnits(all), r.notListed(err)
	}
	list, missing, err := r.pick(cmd.Context(), args)
	slices.SortFunc(list, func(a, b unitView) int { return strings.Compare(a.Name, b.Name) })
	return list, cmpErr(err, missing)
}

func place(u unitView, full bool) string {
	switch {
	case u.Global:
		return "global"
	case u.Machine == nil:
		return "-"
	}
	return u.at(full)
}

var fileFields = map[string]func(unitView, bool) string{
	"unit":     func(u unitView, _ bool) string { return u.Name },
	"hash":     func(u unitView, full bool) string { return shortHash(u.Hash, full) },
	"dstate":   func(u unitView, _ bool) string { return string(u.Desired) },
	"target":   place,
	"tmachine": place,
	"global":   func(u unitView, _ bool) string { return strconv.FormatBool(u.Global) },
	"state": func(u unitView, _ bool) string {
		if u.Global {
			return "-"
		}
		return string(u.Current)
	},
	"desc":   func(u unitView, _ bool) string { return description(u.Text) },
	"reason": func(u unitView, _ bool) string { return u.reason() },
}

// description returns the Description= of a unit file, the last if it has many.
func description(text string) string {
	f, err := unit.Parse(text)
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
func (u unitView) reason() string {
	switch {
	case u.Unplaced != "":
		return u.Unplaced
	case u.Releasing != "":
		return "leaving: " + u.Releasing
	case u.Placed != "":
		return u.Placed
	case u.Desired == registry.Inactive:
		return "inactive"
	}
	return ""
}

func (c *cli) listUnitFilesCommand() *cobra.Command {
	var l listing
	cmd := &cobra.Command{
		Use: "list-unit-files [UNIT...]", Short: "List the units that the cluster has, and where they belong",
		Long:    "List the units that the cluster has, on a machine or not.\n\nDSTATE is what is wanted, STATE what is; TARGET is the machine. --fields unit,state,reason\nsays why.",
		Example: "  flotilla list-unit-files\n  flotilla list-unit-files --fields unit,target,reason",
		Args:    cobra.ArbitraryArgs, ValidArgsFunction: c.completeUnits,
		RunE: func(cmd *cobra.Command, args []string) error {
			r := c.run(cmd, "list-unit-files")
			cols, err := columns(c, &l, fileFields)
			if err != nil {
				return err
			}
			if slices.Contains(cols, "tmachine") {
				Say(r.io.err, "WARNING: The \"tmachine\" field is deprecated. Use \"target\" instead\n")
			}
			list, err := r.listed(cmd, args)
			if err != nil {
				return err
			}
			if slices.Contains(cols, "desc") {
				for i, u := range list {
					if full, ok, err := r.unitText(cmd.Context(), u.Name); err != nil {
						return err
					} else if ok {
						list[i].Text = full.Text
					}
				}
			}
			if c.output == "json" {
				return r.sayUnits(list)
			}
			tabs(r.io.out, rows(&l, cols, fileFields, list))
			return nil
		},
	}
	l.add(cmd, "unit,hash,dstate,state,target", slices.Sorted(maps.Keys(fileFields)))
	return c.unitFlags(cmd)
}
