package cli

import (
	"context"
	"fmt"

	"github.com/spf13/cobra"

	"flotilla/internal/unit"
)

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
				return SayJSON(r.io.out, u)
			}
			text := u.Text
			if r.fleet {
				text = u.Serialized
			}
			Say(r.io.out, "%s", text)
			return nil
		})
	cmd.Args = func(cmd *cobra.Command, args []string) error {
		if len(args) != 1 && c.fleet {
			return fleetText("One unit file must be provided.")
		}
		if c.fleet {
			return nil
		}
		return Between(1, 1, "one unit")(cmd, args)
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
		Say(r.io.out, "%s: %v\n", arg, err)
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
			Say(r.io.out, "%s: %v\n", name, err)
			return false, nil
		}
	case err != nil:
		Say(r.io.out, "%v\n", err)
		return false, nil
	}
	parts, _ := unit.SplitName(name)
	_, problems = f.Check(parts)
	for _, p := range problems {
		what := "error"
		if p.Warning {
			what = "warning"
		}
		Say(r.io.out, "%s: %s: %v\n", file, what, p)
	}
	good := unit.Refusal(problems) == nil
	if good && len(problems) == 0 {
		Say(r.io.out, "%s: good\n", file)
	}
	return good, nil
}
