package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"strings"

	"github.com/spf13/cobra"

	"flotilla/internal/text"
	"flotilla/internal/unit"
	"flotilla/internal/wire"
)

// unitName returns the name of the unit that an argument means, and the file in
// which it would be: web means web.service, and so does some/where/web.service.
func unitName(arg string) (name, file string) {
	if unit.CheckName(path.Base(arg)) == nil {
		return path.Base(arg), arg
	}
	name = unit.FromArgument(arg)
	return name, path.Join(path.Dir(arg), name)
}

// isPattern reports whether arg is to be matched with names that exist.
func isPattern(arg string) bool { return strings.ContainsAny(arg, "*?[") }

// isMissing reports whether an error says that a file is not there.
func isMissing(err error) bool { return errors.Is(err, fs.ErrNotExist) }

// unitNames returns the names and patterns that arguments mean.
func unitNames(args []string) ([]string, error) {
	names, err := expandAll(args)
	for i, arg := range names {
		if !isPattern(arg) {
			names[i], _ = unitName(arg)
		}
	}
	return names, err
}

// source is a unit that an argument means, and where its text is. A pattern stands
// for the units in the cluster that match it.
type source struct {
	name     string
	file     string
	template string  // file of its template; "" if it is no instance
	from     string  // the file that was read, file or template; "": neither is there
	text     *string // of from
}

// sourcesOf returns the units that arguments mean, with the files there are.
func sourcesOf(args []string) ([]source, error) {
	args, err := expandAll(args)
	if err != nil {
		return nil, err
	}
	var list []source
	var wrong []error
	seen := map[string]bool{}
	for _, arg := range args {
		s := source{name: arg}
		if !isPattern(arg) {
			if s, err = sourceOf(arg); err != nil {
				wrong = append(wrong, err)
			}
		}
		if !seen[s.name] {
			seen[s.name] = true
			list = append(list, s)
		}
	}
	return list, errors.Join(wrong...)
}

func sourceOf(arg string) (source, error) {
	name, file := unitName(arg)
	s := source{name: name, file: file}
	if err := unit.CheckName(name); err != nil {
		return s, fmt.Errorf("unit %q: %w", name, err)
	}
	if parts, _ := unit.SplitName(name); parts.IsInstance() {
		s.template = path.Join(path.Dir(file), parts.Template())
	}
	for _, from := range []string{s.file, s.template} {
		raw, err := os.ReadFile(from)
		if err == nil {
			s.from, s.text = from, new(string(raw))
			return s, nil
		}
		if from != "" && !isMissing(err) {
			return s, fmt.Errorf("read the unit file: %w", err)
		}
	}
	return s, nil
}

func (s source) fromTemplate() bool { return s.from != "" && s.from == s.template }

// title is what the local file is called.
func (s source) title() string {
	if s.fromTemplate() {
		return "local template unit file " + s.from
	}
	return "local unit file " + s.from
}

// origin is where the text of a unit came from.
func (s source) origin(res wire.Result) string {
	if res.From != "" {
		return "template " + res.From
	}
	return s.from
}

// nowhere is the error that there is no unit of a name, nor a file. What has no
// source is a pattern.
func (s source) nowhere(name string, fleet bool) error {
	switch {
	case s.file == "":
		return hinted{fmt.Errorf("no unit matches %q", name), []string{"list them with: flotilla list-unit-files"}}
	case fleet && s.template != "":
		return fmt.Errorf("failed getting Unit(%s) from template: unable to find template Unit(%s) in Registry or on filesystem", s.file, path.Base(s.template))
	case fleet:
		return fmt.Errorf("unable to find Unit(%s) in Registry or on filesystem", name)
	case s.template != "":
		return fmt.Errorf("unit %s is not in the cluster and there is no file %s, nor is there its template %s", name, s.file, path.Base(s.template))
	}
	return fmt.Errorf("unit %s is not in the cluster and there is no file %s", name, s.file)
}

func (c *cli) catCommand() *cobra.Command {
	cmd := c.unitVerb("cat", "Print the file of a unit", "As it was given, comments and all. As fleetctl: the options alone, as fleet keeps them.",
		func(ctx context.Context, r *unitRun, args []string) error {
			name, _ := unitName(args[0])
			u, err := r.unit(ctx, name)
			if isNotFound(err) && !r.fleet {
				err = noUnits([]string{name})
			}
			return show(r.cli, r.cmd, u, err, func(w io.Writer, u wire.Unit) {
				if r.fleet {
					u.Text = u.Serialized
				}
				Say(w, "%s", u.Text)
			})
		})
	cmd.Use = "cat UNIT"
	cmd.Args = func(cmd *cobra.Command, args []string) error {
		switch {
		case !c.fleet:
			return Between(1, 1, "one unit")(cmd, args)
		case len(args) != 1:
			return fleetText("One unit file must be provided.")
		}
		return nil
	}
	return cmd
}

func (c *cli) verifyCommand() *cobra.Command {
	return c.unitVerb("verify", "Check unit files, without giving them to the cluster",
		"UNIT is a file. What is not a file is looked for in the cluster.",
		func(ctx context.Context, r *unitRun, args []string) error {
			args, err := expandAll(args)
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
				return fmt.Errorf("%d of %s would be refused", wrong, text.Count(len(args), "unit"))
			}
			return err
		})
}

// verify prints what is wrong with a unit, and reports whether the cluster would
// take it.
func (r *unitRun) verify(ctx context.Context, arg string) (bool, error) {
	name, file := unitName(arg)
	w := r.cmd.OutOrStdout()
	if err := unit.CheckName(name); err != nil {
		Say(w, "%s: %v\n", arg, err)
		return false, nil
	}
	raw, err := os.ReadFile(file)
	content := string(raw)
	if isMissing(err) {
		u, missing := r.unit(ctx, name)
		switch {
		case isNotFound(missing):
			return false, source{file: file}.nowhere(name, r.fleet)
		case missing != nil:
			return false, fmt.Errorf("there is no file %s, and the cluster cannot be asked for %s: %w", file, name, missing)
		}
		file, content, err = name, u.Text, nil
	}
	if err != nil {
		Say(w, "read the unit file: %v\n", err)
		return false, nil
	}
	f, err := unit.Parse(content)
	if err != nil {
		Say(w, "%s: %v\n", file, err)
		return false, nil
	}
	parts, _ := unit.SplitName(name)
	_, problems := f.Check(parts)
	for _, p := range problems {
		kind := "error"
		if p.Warning {
			kind = "warning"
		}
		Say(w, "%s: %s: %v\n", file, kind, p)
	}
	if len(problems) == 0 {
		Say(w, "%s: good\n", file)
	}
	return unit.Refusal(problems) == nil, nil
}

// mostExpanded bounds what one argument may stand for.
const mostExpanded = 10000

// expandAll expands the braces of all arguments, as a shell does, and drops
// repeated ones. An argument that is the name of a file stays as it is. It refuses
// patterns that are malformed.
func expandAll(args []string) ([]string, error) {
	var all []string
	seen := map[string]bool{}
	for _, arg := range args {
		list := []string{arg}
		if _, err := os.Stat(arg); err != nil {
			var ok bool
			if list, ok = text.Braces(arg, mostExpanded); !ok {
				return nil, Usage(fmt.Sprintf("%q stands for more than %d names", arg, mostExpanded), "give fewer at a time")
			}
		}
		for _, a := range list {
			if _, err := path.Match(a, ""); err != nil && isPattern(a) {
				return nil, Usage(fmt.Sprintf("%q is not a pattern", a), "* stands for any text, ? for one character, [ab] for one of them")
			}
			if !seen[a] {
				seen[a] = true
				all = append(all, a)
			}
		}
	}
	return all, nil
}
