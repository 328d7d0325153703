package cli

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
		return Usage(cmd.CommandPath()+" needs a unit", cmd.UseLine())
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
				Say(r.io.err, "No units given\n")
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
			return exitCode{fleetText("WARNING: The signed/verified units feature is DEPRECATED and cannot be used."), ExitUsage}
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
				Say(r.io.out, "Unit %s inactive\n", u.name)
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
			Say(r.io.out, "%s\n", u.line(""))
		}
	}
	return nil
}

func (r *unitRun) sayUnits(list []unitView) error {
	if list == nil {
		list = []unitView{}
	}
	return SayJSON(r.io.out, list)
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
				Say(r.io.out, "Triggered global unit %s %s\n", name, r.verb)
			}
		case w.noBlock:
			if r.output != "json" {
				Say(r.io.out, "Triggered unit %s %s\n", name, r.verb)
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
