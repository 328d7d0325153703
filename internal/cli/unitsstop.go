package cli

import (
	"context"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"flotilla/internal/registry"
	"flotilla/internal/unitapi"
)

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
			Say(r.io.out, "%s\n", u.line(""))
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
			Say(r.io.err, "Failed to %s units %v. exit == 1.\n", r.verb, names)
		} else {
			Say(r.io.err, "Successfully %s units %v.\n", done, names)
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
			Say(r.io.err, "Unable to restart unit %s in state %s\n", u.Name, u.Desired)
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
		Say(r.io.err, "Units not found in registry\n")
		return nil
	}
	results, err := r.changeUnits(ctx, unitapi.Changes{Names: namesOf(list), Destroy: true})
	if err != nil && r.fleet {
		return fleetSays{"Error destroying units: ", err}
	} else if err != nil {
		return err
	}
	if r.output == "json" {
		return cmpErr(SayJSON(r.io.out, namesOf(list)), missing)
	}
	var refused []unitapi.Result
	for _, u := range list {
		if res := results[u.Name]; res.Outcome == unitapi.Refused {
			refused = append(refused, res)
		} else {
			Say(r.io.out, "Destroyed %s\n", u.Name)
		}
	}
	return cmpErr(r.sayRefused(refused), missing)
}
