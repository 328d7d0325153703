package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"flotilla/internal/client"
	"flotilla/internal/text"
	"flotilla/internal/unit"
	"flotilla/internal/wire"
)

// The verbs that change units, as flotilla VERB and as fleetctl VERB.

// unitRun is one command that changes units.
type unitRun struct {
	*cli
	cmd      *cobra.Command
	out, err io.Writer // out is for lines about units, and drops them if JSON is asked for
	verb     string
}

// atLeastOne demands a unit; fleetctl takes none for nothing to do.
func (c *cli) atLeastOne(cmd *cobra.Command, args []string) error {
	if len(args) == 0 && !c.fleet {
		return Usage(cmd.CommandPath()+" needs a unit", cmd.UseLine())
	}
	return nil
}

// unitVerb is what the commands have in common.
func (c *cli) unitVerb(verb, short, long string, do func(ctx context.Context, r *unitRun, args []string) error) *cobra.Command {
	return c.unitFlags(&cobra.Command{
		Use: verb + " UNIT...", Short: short, Long: short + ".\n\n" + long,
		Args: c.atLeastOne, ValidArgsFunction: c.completeUnits,
		RunE: func(cmd *cobra.Command, args []string) error {
			r := &unitRun{c, cmd, cmd.OutOrStdout(), cmd.ErrOrStderr(), verb}
			if c.output == "json" {
				r.out = io.Discard
			}
			if len(args) == 0 {
				Say(r.err, "No units given\n")
				return nil
			}
			return do(cmd.Context(), r, args)
		},
	})
}

// unitFlags adds the client's flags where the root does not have them.
func (c *cli) unitFlags(cmd *cobra.Command) *cobra.Command {
	if c.fleet {
		return cmd
	}
	return c.clientFlags(cmd)
}

// unit returns one unit with its text.
func (c *cli) unit(ctx context.Context, name string) (wire.Unit, error) {
	return client.Get[wire.Unit](ctx, c.dial(), "/v1/units/"+url.PathEscape(name), nil)
}

// units returns the units that names and patterns mean, all for none.
func (c *cli) units(ctx context.Context, names []string) (wire.Units, error) {
	return client.Get[wire.Units](ctx, c.dial(), "/v1/units", url.Values{"name": names})
}

func isNotFound(err error) bool {
	var e *wire.Error
	return errors.As(err, &e) && e.Code == wire.CodeNotFound
}

// noUnits is the error that names and patterns mean no unit; nil for none.
func noUnits(missing []string) error {
	if len(missing) == 0 {
		return nil
	}
	return hinted{fmt.Errorf("the cluster has no unit %s", strings.Join(missing, ", ")), []string{"list them with: flotilla list-unit-files"}}
}

const namesHelp = `UNIT is a name, a file, or a pattern: web means web.service, 'web@{1..3}' three
instances, 'web@*' all there are. A unit that the cluster does not have is taken
from the file of that name; an instance from its template, in the cluster or beside.`

func (c *cli) submitCommand() *cobra.Command {
	return c.bringCommand("submit", "Give units to the cluster without starting them", "", unit.Inactive)
}

func (c *cli) loadCommand() *cobra.Command {
	return c.bringCommand("load", "Place units on nodes, known to systemd there, but do not start them", "", unit.Loaded)
}

func (c *cli) startCommand() *cobra.Command {
	cmd := c.bringCommand("start", "Start units, and give them to the cluster first if it does not have them", `

The command returns when systemd says that they are active, and says why if not.`, unit.Launched)
	cmd.Example = `  flotilla start web.service
  flotilla start --replace 'web@{1..3}'
  flotilla start --timeout 5m db`
	return cmd
}

func (c *cli) bringCommand(verb, short, more string, desired unit.Desired) *cobra.Command {
	var replace, sign bool
	var w waiting
	cmd := c.unitVerb(verb, short, namesHelp+more, func(ctx context.Context, r *unitRun, args []string) error {
		return r.bring(ctx, args, desired, replace, w)
	})
	cmd.Flags().BoolVar(&replace, "replace", false, "where the local file differs from the unit in the cluster, take the file")
	if desired != unit.Inactive {
		w.add(cmd, c.fleet)
	}
	if c.fleet {
		cmd.Flags().BoolVar(&sign, "sign", false, "DEPRECATED - this option cannot be used")
		cmd.PreRunE = func(*cobra.Command, []string) error {
			if sign {
				return exitCode{fleetText("WARNING: The signed/verified units feature is DEPRECATED and cannot be used."), ExitUsage}
			}
			return nil
		}
	}
	return cmd
}

// bring gives units to the cluster and wants them in a state. If one of them is
// refused, none is written.
func (r *unitRun) bring(ctx context.Context, args []string, desired unit.Desired, replace bool, w waiting) error {
	sources, err := sourcesOf(args)
	if err != nil {
		return err
	}
	body := wire.Submissions{Together: true, Retry: !r.fleet && desired == unit.Launched}
	from := map[string]source{}
	for _, s := range sources {
		sub := wire.Submission{Name: s.name, Text: s.text, Template: s.fromTemplate(), Replace: replace && !isPattern(s.name), Careful: true}
		if desired != unit.Inactive {
			sub.Desired = desired
		}
		body.Units = append(body.Units, sub)
		from[s.name] = s
	}
	var answer wire.Results
	if err := r.dial().Do(ctx, http.MethodPost, "/v1/units", nil, body, &answer); err != nil {
		return err
	}
	var refused []error
	var meant []wire.Result
	for _, res := range answer.Results {
		s := from[res.Name]
		r.remark(res, s, replace)
		switch isNew := res.Outcome == wire.Created || res.Outcome == wire.Replaced; {
		case res.Outcome == wire.Missing:
			refused = append(refused, s.nowhere(res.Name, r.fleet))
		case res.Outcome == wire.Refused:
			refused = append(refused, r.refusal(res, s))
		case res.Outcome == wire.Skipped:
		case isNew, desired != unit.Inactive && (!r.fleet || res.Was != desired): // fleetctl skips those that are as wanted
			if isNew && (r.fleet || desired == unit.Inactive) {
				Say(r.out, "Unit %s inactive\n", res.Name)
			}
			meant = append(meant, res)
		}
	}
	switch {
	case len(refused) > 0:
		return errors.Join(refused...)
	case desired == unit.Inactive:
		return r.sayUnits(ctx, meant)
	case desired == unit.Loaded:
		return r.finish(ctx, meant, wire.GoalLoaded, desired, w)
	}
	return r.finish(ctx, meant, wire.GoalLaunched, desired, w)
}

// remark says what is odd about a unit that is taken, or left as it is.
func (r *unitRun) remark(res wire.Result, s source, replace bool) {
	differs := func(name string) {
		Say(r.err, "WARNING: Unit %s in registry differs from %s. Add --replace to override.\n", name, s.title())
	}
	switch res.Outcome {
	case wire.Created, wire.Replaced:
		if res.FromDiffers {
			differs(res.From)
		}
		for _, p := range res.Problems {
			if p.Warning {
				Say(r.err, "WARNING: Unit %s: %s: %v\n", res.Name, s.origin(res), p)
			}
		}
	case wire.Differs:
		differs(res.Name)
	case wire.InUse:
		Say(r.err, "Warning: can not replace Unit(%s) in state '%s', use the appropriate command\n", res.Name, res.Was)
	case wire.Unchanged, wire.Updated:
		if replace && (s.text != nil || res.From != "") {
			Say(r.out, "Found same Unit(%s) in Registry, nothing to do\n", res.Name)
		}
	}
}

// refusal says why a unit was refused.
func (r *unitRun) refusal(res wire.Result, s source) error {
	bad := unit.Refusal(res.Problems)
	var first unit.Problem
	switch {
	case bad == nil:
		return fmt.Errorf("unit %s: %s", res.Name, res.Reason)
	case r.fleet && errors.As(bad, &first):
		return errors.New(first.Reason)
	}
	return fmt.Errorf("unit %s: %s: %w", res.Name, s.origin(res), bad)
}

const existingHelp = `UNIT is the name of a unit in the cluster (web means web.service), or a pattern:
'web@{1..3}', 'web@*'.`

func (c *cli) changeCommand(verb, short, more string, change wire.Changes, goal wire.Goal, state unit.Desired) *cobra.Command {
	var w waiting
	cmd := c.unitVerb(verb, short, existingHelp+more, func(ctx context.Context, r *unitRun, args []string) error {
		return r.change(ctx, args, change, goal, state, w)
	})
	w.add(cmd, c.fleet)
	return cmd
}

func (c *cli) stopCommand() *cobra.Command {
	return c.changeCommand("stop", "Stop units; they stay on their nodes and can be started again", "",
		wire.Changes{Stop: true}, wire.GoalStopped, unit.Loaded)
}

func (c *cli) unloadCommand() *cobra.Command {
	return c.changeCommand("unload", "Stop units and take them from their nodes; the cluster keeps their files", "",
		wire.Changes{Desired: unit.Inactive}, wire.GoalInactive, unit.Inactive)
}

func (c *cli) restartCommand() *cobra.Command {
	return c.changeCommand("restart", "Let systemd restart units, where they are", " Loaded units are started.",
		wire.Changes{Restart: true}, wire.GoalLaunched, unit.Launched)
}

func (c *cli) destroyCommand() *cobra.Command {
	cmd := c.changeCommand("destroy", "Stop units and remove them from the cluster", "\nIt does not wait until they have stopped.",
		wire.Changes{Destroy: true}, "", unit.Inactive)
	for _, flag := range []string{"timeout", "no-block", "block-attempts"} { // for scripts of fleetctl, whose destroy never waited either
		_ = cmd.Flags().MarkHidden(flag)
	}
	return cmd
}

// change changes units that are there, and waits. For flotilla a unit that is not
// there is an error, returned when the others are done; fleetctl leaves it out.
func (r *unitRun) change(ctx context.Context, args []string, change wire.Changes, goal wire.Goal, state unit.Desired, w waiting) error {
	names, err := unitNames(args)
	var refused []error
	if err == nil && r.fleet {
		var no error
		if names, no, err = r.fleetTakes(ctx, names); no != nil {
			refused = append(refused, no)
		}
	}
	if err != nil {
		return err
	}
	var answer wire.Results
	if change.Names = names; len(names) > 0 {
		if err := r.dial().Do(ctx, http.MethodPost, "/v1/units/change", nil, change, &answer); err != nil {
			return err
		}
	}
	var missing []string
	done := []wire.Result{}
	for _, res := range answer.Results {
		switch {
		case res.Outcome == wire.Missing:
			missing = append(missing, res.Name)
		case res.Outcome == wire.Refused && change.Restart && res.Was == unit.Inactive:
			refused = append(refused, hinted{fmt.Errorf("unit %s is inactive: there is nothing to restart", res.Name), []string{"flotilla start " + res.Name}})
		case res.Outcome == wire.Refused:
			refused = append(refused, r.refusal(res, source{}))
		default:
			done = append(done, res)
		}
	}
	if change.Destroy {
		err = r.destroyed(done)
	} else {
		err = r.finish(ctx, done, goal, state, w)
	}
	switch {
	case !r.fleet:
		refused = append(refused, err, noUnits(missing))
	case len(refused) == 0: // fleetctl ends with the first
		return err
	}
	return errors.Join(refused...)
}

// fleetTakes returns those of the units that fleetctl would change, and the error
// with which it would stop before the others.
func (r *unitRun) fleetTakes(ctx context.Context, names []string) (takes []string, refused, err error) {
	known, err := r.units(ctx, names)
	for _, u := range known.Units {
		nowhere := !u.Global && u.Current == unit.Inactive
		switch {
		case r.verb == "stop" && nowhere:
			return takes, fleetText("Unable to stop unit %s in state %s", u.Name, u.Current), err
		case r.verb == "stop" && u.Desired != unit.Launched, r.verb == "unload" && nowhere && u.Desired == unit.Inactive:
		case r.verb == "restart" && u.Desired == unit.Inactive:
			Say(r.err, "Unable to restart unit %s in state %s\n", u.Name, u.Desired)
		default:
			takes = append(takes, u.Name)
		}
	}
	if r.verb == "destroy" && len(takes) == 0 && err == nil {
		Say(r.err, "Units not found in registry\n")
	}
	return takes, nil, err
}

func (r *unitRun) destroyed(done []wire.Result) error {
	names := namesOf(done)
	return show(r.cli, r.cmd, names, nil, func(w io.Writer, names []string) {
		for _, name := range names {
			Say(w, "Destroyed %s\n", name)
		}
	})
}

func namesOf(results []wire.Result) []string {
	names := make([]string, 0, len(results))
	for _, res := range results {
		names = append(names, res.Name)
	}
	return names
}

// finish waits for the units that were changed, or says that it does not.
func (r *unitRun) finish(ctx context.Context, changed []wire.Result, goal wire.Goal, state unit.Desired, w waiting) error {
	names := []string{}
	for _, res := range changed {
		if res.Global {
			Say(r.out, "Triggered global unit %s %s\n", res.Name, r.verb)
			continue
		}
		if w.noBlock {
			Say(r.out, "Triggered unit %s %s\n", res.Name, r.verb)
		}
		names = append(names, res.Name)
	}
	var err error
	if !w.noBlock {
		err = r.awaitUnits(ctx, names, goal, state, w.limit())
	}
	if done := fleetPhrases[r.verb].done; r.fleet && done != "" {
		if err != nil {
			Say(r.err, "Failed to %s units %v. exit == 1.\n", r.verb, names)
		} else {
			Say(r.err, "Successfully %s units %v.\n", done, names)
		}
	}
	return errors.Join(r.sayUnits(ctx, changed), err)
}

// sayUnits prints how units are now, if JSON is asked for.
func (r *unitRun) sayUnits(ctx context.Context, units []wire.Result) error {
	if r.output != "json" {
		return nil
	}
	now := wire.Units{Units: []wire.Unit{}}
	if len(units) > 0 {
		var err error
		if now, err = r.units(ctx, namesOf(units)); err != nil {
			return err
		}
	}
	return SayJSON(r.cmd.OutOrStdout(), now.Units)
}

// completeUnits completes names of units in the cluster, and files.
func (c *cli) completeUnits(cmd *cobra.Command, args []string, prefix string) ([]string, cobra.ShellCompDirective) {
	directive := cobra.ShellCompDirectiveNoFileComp
	if slices.Contains([]string{"submit", "load", "start", "verify"}, cmd.Name()) {
		directive = cobra.ShellCompDirectiveDefault
	}
	one := slices.Contains([]string{"cat", "explain", "move"}, cmd.Name())
	return complete(c, !one || len(args) == 0, "/v1/units", prefix, func(known wire.Units) (words []string) {
		for _, u := range known.Units {
			if !slices.Contains(args, u.Name) {
				words = append(words, u.Name+"\t"+string(u.Current))
			}
		}
		return words
	}), directive
}

// awaitUnits waits until units are where the goal wants them, and prints a line for
// each that is.
func (r *unitRun) awaitUnits(ctx context.Context, names []string, goal wire.Goal, state unit.Desired, limit waitLimit) error {
	if len(names) == 0 {
		return nil
	}
	words := unitWords[r.fleet]
	var failed, late, gone []string
	note := func(list *[]string, format string, e wire.WaitEvent) {
		*list = append(*list, e.Unit)
		Say(r.err, format+"\n", e.Unit, e.Message, state)
	}
	_, err := r.await(ctx, wire.Wait{Goal: goal, Names: names}, limit, func(e wire.WaitEvent) {
		switch e.Outcome {
		case wire.WaitReached:
			Say(r.out, "%s\n", unitLine(e))
		case wire.WaitFailed:
			note(&failed, words.failed, e)
		case wire.WaitLate:
			note(&late, words.late, e)
		case wire.WaitGone:
			note(&gone, words.gone, e)
		case wire.WaitPending:
			if r.fleet && limit == 0 {
				Say(r.err, "Waiting for unit %s: %s\n", e.Unit, e.Message)
			}
		}
	})
	all := text.Count(len(names), "unit")
	switch {
	case err != nil || len(failed)+len(late)+len(gone) == 0:
		return err
	case r.fleet:
		return exitCode{ErrReported, ExitFailed}
	case len(failed) > 0:
		return hinted{fmt.Errorf("%d of %s failed to start", len(failed), all),
			[]string{"its last lines: flotilla journal " + failed[0], "and systemd's view: flotilla status " + failed[0]}}
	case len(gone) > 0:
		return fmt.Errorf("%d of %s were destroyed meanwhile", len(gone), all)
	}
	return exitCode{hinted{fmt.Errorf("%d of %s not %s after %s", len(late), all, state, limit),
		[]string{"flotilla explain " + late[0], "wait longer with --timeout, or not at all with --no-block"}}, ExitNotConverged}
}
