package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"flotilla/internal/registry"
	"flotilla/internal/unit"
	"flotilla/internal/unitapi"
)

// The verbs on units, as flotilla VERB and as fleetctl VERB.

// run makes the run of a command from its flags and what it is called as.
func (c *cli) run(cmd *cobra.Command, verb string) *unitRun {
	return &unitRun{cli: c, io: streams{cmd.OutOrStdout(), cmd.ErrOrStderr()}, fleet: c.fleet, verb: verb}
}

// atLeastOne demands a unit; fleetctl takes none for nothing to do.
func (c *cli) atLeastOne(cmd *cobra.Command, args []string) error {
	if len(args) == 0 && !c.fleet {
		return usage(cmd.CommandPath()+" needs a unit", cmd.UseLine())
	}
	return nil
}

// unitVerb is what the commands have in common.
func (c *cli) unitVerb(use, short, long string, do func(ctx context.Context, r *unitRun, args []string) error) *cobra.Command {
	verb, _, _ := strings.Cut(use, " ")
	return c.unitFlags(&cobra.Command{
		Use: use, Short: short, Long: short + ".\n\n" + long,
		Args: c.atLeastOne, ValidArgsFunction: c.completeUnits,
		RunE: func(cmd *cobra.Command, args []string) error {
			r := c.run(cmd, verb)
			if len(args) == 0 {
				say(r.io.err, "No units given\n")
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

const namesHelp = `UNIT is a name, a file, or a pattern: web means web.service, 'web@{1..3}' three
instances, 'web@*' all there are. A unit that the cluster does not have is taken
from the file of that name; an instance from its template, in the cluster or beside.`

func (c *cli) submitCommand() *cobra.Command {
	var replace, sign bool
	cmd := c.unitVerb("submit UNIT...", "Give units to the cluster without starting them", namesHelp,
		func(ctx context.Context, r *unitRun, args []string) error {
			return r.bring(ctx, args, registry.Inactive, replace, waiting{noBlock: true})
		})
	replaceFlag(cmd, &replace)
	c.signFlag(cmd, &sign)
	return cmd
}

func (c *cli) loadCommand() *cobra.Command {
	var replace, sign bool
	var w waiting
	cmd := c.unitVerb("load UNIT...", "Place units on machines, known to systemd there, but do not start them", namesHelp,
		func(ctx context.Context, r *unitRun, args []string) error {
			return r.bring(ctx, args, registry.Loaded, replace, w)
		})
	replaceFlag(cmd, &replace)
	c.signFlag(cmd, &sign)
	w.add(cmd, c.fleet)
	return cmd
}

func (c *cli) startCommand() *cobra.Command {
	var replace, sign bool
	var w waiting
	cmd := c.unitVerb("start UNIT...", "Start units, and give them to the cluster first if it does not have them", namesHelp+`

The command returns when systemd says that they are active, and says why if not.`,
		func(ctx context.Context, r *unitRun, args []string) error {
			return r.bring(ctx, args, registry.Launched, replace, w)
		})
	cmd.Example = `  flotilla start web.service
  flotilla start --replace 'web@{1..3}'
  flotilla start --timeout 5m db`
	replaceFlag(cmd, &replace)
	c.signFlag(cmd, &sign)
	w.add(cmd, c.fleet)
	return cmd
}

func replaceFlag(cmd *cobra.Command, replace *bool) {
	cmd.Flags().BoolVar(replace, "replace", false, "where the local file differs from the unit in the cluster, take the file")
}

func (c *cli) signFlag(cmd *cobra.Command, sign *bool) {
	if !c.fleet {
		return
	}
	cmd.Flags().BoolVar(sign, "sign", false, "DEPRECATED - this option cannot be used")
	cmd.PreRunE = func(*cobra.Command, []string) error {
		if *sign {
			return exitCode{fleetText("WARNING: The signed/verified units feature is DEPRECATED and cannot be used."), exitUsage}
		}
		return nil
	}
}

// bring gives units to the cluster and wants them in a state: all in one request
// for those that are new and one for those that are there.
func (r *unitRun) bring(ctx context.Context, args []string, state registry.Desired, replace bool, w waiting) error {
	list, err := r.resolve(ctx, args, replace)
	if err != nil {
		return err
	}
	var news []unitapi.Submission
	for _, u := range list {
		if u.text == "" {
			continue
		}
		n := unitapi.Submission{Name: u.name, Text: u.text, Replace: u.was != nil}
		if state != registry.Inactive {
			n.Desired = state
		}
		news = append(news, n)
	}
	results, err := r.submitUnits(ctx, news)
	if err != nil {
		return r.creating(err)
	}
	refused := r.refusals(results)
	change := unitapi.Changes{Desired: state}
	again := unitapi.Changes{Restart: true}
	var triggered []string
	for _, u := range list {
		res, sent := results[u.name]
		switch {
		case sent && refusal(res) != "":
		case sent && res.Outcome != unitapi.Unchanged && res.Outcome != unitapi.Differs:
			triggered = append(triggered, u.name)
			if r.fleet && r.output != "json" {
				say(r.io.out, "Unit %s inactive\n", u.name)
			}
		case state == registry.Inactive: // submit leaves alone what is there
		case sent || u.was.Desired != state:
			change.Names = append(change.Names, u.name)
			triggered = append(triggered, u.name)
		case r.fleet: // it skips those that are as wanted
		case state == registry.Launched && u.was.failed():
			again.Names = append(again.Names, u.name)
			triggered = append(triggered, u.name)
		default:
			triggered = append(triggered, u.name)
		}
	}
	for _, ch := range []unitapi.Changes{change, again} {
		changed, err := r.changeUnits(ctx, ch)
		if err != nil {
			return r.starting(err)
		}
		refused = append(refused, r.refusals(changed)...)
	}
	failed := r.sayRefused(refused)
	if state == registry.Inactive {
		err = r.sayNow(ctx, triggered)
	} else {
		goal := goal(loaded)
		if state == registry.Launched {
			goal = launched
		}
		err = r.finish(ctx, without(triggered, refused), goal, state, w)
	}
	return cmpErr(failed, err)
}

// failed reports whether systemd gave up the unit on its machine.
func (u unitView) failed() bool {
	st, ok := u.own()
	return ok && st.Active == "failed"
}

// cmpErr returns the first error that is one.
func cmpErr(errs ...error) error {
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}

// starting gives an error of a change the words of the face.
func (r *unitRun) starting(err error) error {
	if r.fleet {
		return fleetSays{map[string]string{"load": "Error loading units: ", "start": "Error starting units: "}[r.verb], err}
	}
	return err
}

// refusals returns the results that say no, by name.
func (r *unitRun) refusals(results map[string]unitapi.Result) []unitapi.Result {
	var list []unitapi.Result
	for _, name := range slices.Sorted(maps.Keys(results)) {
		if refusal(results[name]) != "" {
			list = append(list, results[name])
		}
	}
	return list
}

// sayRefused prints what the node did not take, and returns the error for it.
func (r *unitRun) sayRefused(refused []unitapi.Result) error {
	if len(refused) == 0 {
		return nil
	}
	var lines []string
	for _, res := range refused {
		text := fmt.Sprintf("unit %s: %s", res.Name, refusal(res))
		for _, p := range res.Problems {
			if !p.Warning && !r.fleet {
				text = fmt.Sprintf("unit %s: %v", res.Name, unit.Problem(p))
				break
			}
		}
		lines = append(lines, text)
	}
	if r.fleet {
		return fleetSays{"Error creating units: ", errors.New(strings.Join(lines, "\n"))}
	}
	return errors.New(strings.Join(lines, "\n"))
}

func without(names []string, refused []unitapi.Result) []string {
	return slices.DeleteFunc(names, func(name string) bool {
		return slices.ContainsFunc(refused, func(r unitapi.Result) bool { return r.Name == name })
	})
}

// sayNow prints how units are at this moment.
func (r *unitRun) sayNow(ctx context.Context, names []string) error {
	if len(names) == 0 || r.fleet {
		if r.output == "json" {
			return r.sayUnits(nil)
		}
		return nil
	}
	found, err := r.units(ctx, names...)
	if err != nil {
		return err
	}
	if r.output == "json" {
		return r.sayUnits(sortedUnits(found))
	}
	for _, name := range names {
		if u, ok := found[name]; ok {
			say(r.io.out, "%s\n", u.line(""))
		}
	}
	return nil
}

func (r *unitRun) sayUnits(list []unitView) error {
	if list == nil {
		list = []unitView{}
	}
	return sayJSON(r.io.out, list)
}

// finish waits for the units that were changed, or says that it does not.
func (r *unitRun) finish(ctx context.Context, names []string, g goal, state registry.Desired, w waiting) error {
	found, err := r.units(ctx, names...)
	if err != nil {
		return err
	}
	var blocking []string
	for _, name := range names {
		switch {
		case found[name].Global:
			if r.output != "json" {
				say(r.io.out, "Triggered global unit %s %s\n", name, r.verb)
			}
		case w.noBlock:
			if r.output != "json" {
				say(r.io.out, "Triggered unit %s %s\n", name, r.verb)
			}
		default:
			blocking = append(blocking, name)
		}
	}
	o, err := r.await(ctx, blocking, g, w)
	if err != nil {
		return err
	}
	if r.output == "json" {
		if len(names) > 0 {
			if found, err = r.units(ctx, names...); err != nil {
				return err
			}
		}
		if err := r.sayUnits(sortedUnits(found)); err != nil {
			return err
		}
	}
	return r.conclude(o, state, w.limit())
}

// pick returns the units that args mean among those there are. For flotilla a
// unit that is not there is an error, returned after the others are done;
// fleetctl says nothing about it.
func (r *unitRun) pick(ctx context.Context, args []string) (list []unitView, missing error, err error) {
	args, err = expandAll(args)
	if err != nil {
		return nil, nil, err
	}
	known, err := r.lookup(ctx, args)
	if err != nil {
		return nil, nil, err
	}
	names, unknown, err := existing(args, known)
	if err != nil {
		return nil, nil, err
	}
	for _, name := range names {
		list = append(list, known[name])
	}
	if len(unknown) > 0 && !r.fleet {
		missing = hinted{fmt.Errorf("the cluster has no unit %s", strings.Join(unknown, ", ")), []string{"list them with: flotilla list-unit-files"}}
	}
	return list, missing, nil
}

func namesOf(list []unitView) []string {
	names := make([]string, 0, len(list))
	for _, u := range list {
		names = append(names, u.Name)
	}
	return names
}

const existingHelp = `UNIT is the name of a unit in the cluster (web means web.service), or a pattern:
'web@{1..3}', 'web@*'.`

func (c *cli) stopCommand() *cobra.Command {
	var w waiting
	cmd := c.unitVerb("stop UNIT...", "Stop units; they stay on their machines and can be started again", existingHelp,
		func(ctx context.Context, r *unitRun, args []string) error { return r.stop(ctx, args, w) })
	w.add(cmd, c.fleet)
	return cmd
}

func (r *unitRun) stop(ctx context.Context, args []string, w waiting) error {
	list, missing, err := r.pick(ctx, args)
	if err != nil {
		return err
	}
	var names []string
	for _, u := range list {
		switch {
		case r.fleet && !u.Global && u.Current == registry.Inactive:
			if err := r.release(ctx, names, registry.Loaded, stopped, w); err != nil {
				return err
			}
			return fleetText("Unable to stop unit %s in state %s", u.Name, u.Current)
		case u.Desired == registry.Launched || !r.fleet && u.Desired != registry.Inactive:
			names = append(names, u.Name)
		case !r.fleet && r.output != "json":
			say(r.io.out, "%s\n", u.line(""))
		}
	}
	return cmpErr(r.release(ctx, names, registry.Loaded, stopped, w), missing)
}

func (c *cli) unloadCommand() *cobra.Command {
	var w waiting
	cmd := c.unitVerb("unload UNIT...", "Stop units and take them from their machines; the cluster keeps their files", existingHelp,
		func(ctx context.Context, r *unitRun, args []string) error {
			list, missing, err := r.pick(ctx, args)
			if err != nil {
				return err
			}
			var names []string
			for _, u := range list {
				if !r.fleet || u.Global || u.Current != registry.Inactive || u.Desired != registry.Inactive {
					names = append(names, u.Name)
				}
			}
			return cmpErr(r.release(ctx, names, registry.Inactive, inactive, w), missing)
		})
	w.add(cmd, c.fleet)
	return cmd
}

// release wants units in a lower state and waits for it.
func (r *unitRun) release(ctx context.Context, names []string, state registry.Desired, g goal, w waiting) error {
	var failed error
	if len(names) > 0 {
		results, err := r.changeUnits(ctx, unitapi.Changes{Names: names, Desired: state})
		if err != nil {
			return err
		}
		refused := r.refusals(results)
		failed = r.sayRefused(refused)
		names = without(names, refused)
		if err := r.finish(ctx, names, g, state, w); err != nil {
			failed = cmpErr(failed, err)
		}
	} else if r.output == "json" {
		failed = r.sayUnits(nil)
	}
	if r.fleet {
		done := map[string]string{"stop": "stopped", "unload": "unloaded"}[r.verb]
		if failed != nil {
			say(r.io.err, "Failed to %s units %v. exit == 1.\n", r.verb, names)
		} else {
			say(r.io.err, "Successfully %s units %v.\n", done, names)
		}
	}
	return failed
}

func (c *cli) restartCommand() *cobra.Command {
	var w waiting
	cmd := c.unitVerb("restart UNIT...", "Let systemd restart units, where they are", existingHelp+" Loaded units are started.",
		func(ctx context.Context, r *unitRun, args []string) error { return r.restart(ctx, args, w) })
	w.add(cmd, c.fleet)
	return cmd
}

func (r *unitRun) restart(ctx context.Context, args []string, w waiting) error {
	list, missing, err := r.pick(ctx, args)
	if err != nil {
		return err
	}
	again := unitapi.Changes{Restart: true}
	start := unitapi.Changes{Desired: registry.Launched}
	for _, u := range list {
		switch {
		case u.Desired == registry.Launched:
			again.Names = append(again.Names, u.Name)
		case u.Desired == registry.Loaded:
			start.Names = append(start.Names, u.Name)
		case r.fleet:
			say(r.io.err, "Unable to restart unit %s in state %s\n", u.Name, u.Desired)
		default:
			missing = cmpErr(missing, hinted{fmt.Errorf("unit %s is inactive: there is nothing to restart", u.Name), []string{"flotilla start " + u.Name}})
		}
	}
	var refused []unitapi.Result
	for _, ch := range []unitapi.Changes{again, start} {
		results, err := r.changeUnits(ctx, ch)
		if err != nil {
			return err
		}
		refused = append(refused, r.refusals(results)...)
	}
	names := without(append(again.Names, start.Names...), refused)
	err = r.sayRefused(refused)
	if len(names) > 0 {
		err = cmpErr(err, r.finish(ctx, names, launched, registry.Launched, w))
	}
	return cmpErr(err, missing)
}

func (c *cli) destroyCommand() *cobra.Command {
	var w waiting
	cmd := c.unitVerb("destroy UNIT...", "Stop units and remove them from the cluster", existingHelp+"\nIt does not wait until they have stopped.",
		func(ctx context.Context, r *unitRun, args []string) error { return r.destroy(ctx, args) })
	w.add(cmd, c.fleet)
	_ = cmd.Flags().MarkHidden("timeout") // for scripts of fleetctl: it never waited either
	_ = cmd.Flags().MarkHidden("no-block")
	_ = cmd.Flags().MarkHidden("block-attempts")
	return cmd
}

func (r *unitRun) destroy(ctx context.Context, args []string) error {
	list, missing, err := r.pick(ctx, args)
	if err != nil {
		return err
	}
	if len(list) == 0 && r.fleet {
		say(r.io.err, "Units not found in registry\n")
		return nil
	}
	results, err := r.changeUnits(ctx, unitapi.Changes{Names: namesOf(list), Destroy: true})
	if err != nil && r.fleet {
		return fleetSays{"Error destroying units: ", err}
	} else if err != nil {
		return err
	}
	if r.output == "json" {
		return cmpErr(sayJSON(r.io.out, namesOf(list)), missing)
	}
	var refused []unitapi.Result
	for _, u := range list {
		if res := results[u.Name]; res.Outcome == unitapi.Refused {
			refused = append(refused, res)
		} else {
			say(r.io.out, "Destroyed %s\n", u.Name)
		}
	}
	return cmpErr(r.sayRefused(refused), missing)
}

func (c *cli) catCommand() *cobra.Command {
	cmd := c.unitVerb("cat UNIT", "Print the file of a unit", "As it was given, comments and all. As fleetctl: the options alone, as fleet keeps them.",
		func(ctx context.Context, r *unitRun, args []string) error {
			name, _ := unitName(args[0])
			u, ok, err := r.unitText(ctx, name)
			switch {
			case err != nil && r.fleet:
				return fleetSays{"Error retrieving Unit " + name + ": ", err}
			case err != nil:
				return err
			case !ok && r.fleet:
				return fleetText("Unit %s not found.", name)
			case !ok:
				return hinted{fmt.Errorf("the cluster has no unit %s", name), []string{"list them with: flotilla list-unit-files"}}
			case r.output == "json":
				return sayJSON(r.io.out, u)
			}
			text := u.Text
			if r.fleet {
				text = u.Serialized
			}
			say(r.io.out, "%s", text)
			return nil
		})
	cmd.Args = func(cmd *cobra.Command, args []string) error {
		if len(args) != 1 && c.fleet {
			return fleetText("One unit file must be provided.")
		}
		if c.fleet {
			return nil
		}
		return between(1, 1, "one unit")(cmd, args)
	}
	return cmd
}

func (c *cli) verifyCommand() *cobra.Command {
	return c.unitVerb("verify UNIT...", "Check unit files, without giving them to the cluster",
		"UNIT is a file. What is not a file is looked for in the cluster.",
		func(ctx context.Context, r *unitRun, args []string) error {
			args, err := expandAll(args)
			if err != nil {
				return err
			}
			wrong := 0
			for _, arg := range args {
				good, err := r.verify(ctx, arg)
				if err != nil {
					return err
				}
				if !good {
					wrong++
				}
			}
			if wrong > 0 {
				return fmt.Errorf("%d of %s would be refused", wrong, count(len(args), "unit"))
			}
			return nil
		})
}

// verify prints what is wrong with a unit, and reports whether the cluster would
// take it.
func (r *unitRun) verify(ctx context.Context, arg string) (bool, error) {
	name, file := unitName(arg)
	if err := unit.CheckName(name); err != nil {
		say(r.io.out, "%s: %v\n", arg, err)
		return false, nil
	}
	s := &resolver{unitRun: r, files: map[string]*unit.File{}, texts: map[string]string{}}
	f, err := s.read(file)
	var problems []unit.Problem
	switch {
	case isMissing(err):
		u, ok, err := r.unitText(ctx, name)
		if err != nil {
			return false, fmt.Errorf("there is no file %s, and the cluster cannot be asked for %s: %w", file, name, err)
		}
		if !ok {
			return false, s.nowhere(name, file, "")
		}
		file = name
		f, err = unit.Parse(u.Text)
		if err != nil {
			say(r.io.out, "%s: %v\n", name, err)
			return false, nil
		}
	case err != nil:
		say(r.io.out, "%v\n", err)
		return false, nil
	}
	parts, _ := unit.SplitName(name)
	_, problems = f.Check(parts)
	for _, p := range problems {
		what := "error"
		if p.Warning {
			what = "warning"
		}
		say(r.io.out, "%s: %s: %v\n", file, what, p)
	}
	good := unit.Refusal(problems) == nil
	if good && len(problems) == 0 {
		say(r.io.out, "%s: good\n", file)
	}
	return good, nil
}
