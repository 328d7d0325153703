package cli

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"slices"

	"flotilla/internal/registry"
	"flotilla/internal/unit"
)

// unitRun is one command about units. With fleet it speaks as fleetctl does.
type unitRun struct {
	*cli
	io    streams
	fleet bool
	verb  string // submit, load ...
}

// wanted is a unit that a command is about.
type wanted struct {
	name string
	was  *unitView // in the registry; nil if it is new
	text string    // to be submitted; "" if what is in the registry stays
}

// resolver finds the unit files that arguments mean. Files are read once.
type resolver struct {
	*unitRun
	replace bool
	known   map[string]unitView // in the registry: the units and their templates
	files   map[string]*unit.File
	texts   map[string]string // of templates in the registry
}

// resolve returns the units that args mean, in their order: for each the one in
// the registry, a file of that name, the template in the registry or the file of
// the template. Nothing is written. Errors: a unit is nowhere, or its file is
// bad.
func (r *unitRun) resolve(ctx context.Context, args []string, replace bool) ([]wanted, error) {
	args, err := expandAll(args)
	if err != nil {
		return nil, err
	}
	s := &resolver{unitRun: r, replace: replace, files: map[string]*unit.File{}, texts: map[string]string{}}
	if s.known, err = s.lookup(ctx, args); err != nil {
		return nil, err
	}
	var list []wanted
	var wrong []error
	for _, arg := range args {
		if isPattern(arg) {
			names, missing, err := existing([]string{arg}, s.known)
			if err != nil {
				return nil, err
			}
			if len(missing) > 0 {
				return nil, r.creating(hinted{fmt.Errorf("no unit matches %q", arg), []string{"list them with: flotilla list-unit-files"}})
			}
			for _, name := range names {
				u := s.known[name]
				list = append(list, wanted{name: name, was: &u})
			}
			continue
		}
		w, err := s.one(ctx, arg)
		if err != nil {
			wrong = append(wrong, err)
			continue
		}
		list = append(list, w)
	}
	if len(wrong) > 0 {
		return nil, r.creating(errors.Join(wrong...))
	}
	return dedup(list), nil
}

func dedup(list []wanted) []wanted {
	seen := map[string]bool{}
	return slices.DeleteFunc(list, func(w wanted) bool {
		again := seen[w.name]
		seen[w.name] = true
		return again
	})
}

// lookup fetches the units that args and their templates are in the registry; if
// an argument is a pattern, all units.
func (r *unitRun) lookup(ctx context.Context, args []string) (map[string]unitView, error) {
	if len(args) == 0 || slices.ContainsFunc(args, isPattern) {
		return r.units(ctx)
	}
	var names []string
	seen := map[string]bool{}
	for _, arg := range args {
		name, _ := unitName(arg)
		parts, _ := unit.SplitName(name)
		for _, n := range []string{name, parts.Template()} {
			if n != "" && !seen[n] {
				seen[n] = true
				names = append(names, n)
			}
		}
	}
	return r.units(ctx, names...)
}

// creating gives an error about unit files the words of the face.
func (r *unitRun) creating(err error) error {
	if r.fleet {
		return fleetSays{"Error creating units: ", err}
	}
	return err
}

// one resolves one argument.
func (s *resolver) one(ctx context.Context, arg string) (wanted, error) {
	name, file := unitName(arg)
	if err := unit.CheckName(name); err != nil {
		if s.fleet {
			return wanted{}, err
		}
		return wanted{}, fmt.Errorf("unit %q: %w", name, err)
	}
	parts, _ := unit.SplitName(name)
	template := path.Join(path.Dir(file), parts.Template())
	if u, ok := s.known[name]; ok {
		w := wanted{name: name, was: &u}
		err := s.compare(ctx, &w, file, parts)
		return w, err
	}
	local, err := s.read(file)
	switch {
	case err == nil:
		return s.checked(wanted{name: name}, local, file)
	case !errors.Is(err, fs.ErrNotExist):
		return wanted{}, err
	case !parts.IsInstance():
		return wanted{}, s.nowhere(name, file, "")
	}
	if t, ok := s.known[parts.Template()]; ok {
		if local, err := s.read(template); err == nil && local.Hash().String() != t.Hash {
			s.differs(t.Name, "local template unit file "+template)
		}
		f, err := s.fromRegistry(ctx, parts.Template())
		if err != nil {
			return wanted{}, err
		}
		return s.checked(wanted{name: name}, f, "template "+parts.Template())
	}
	if local, err = s.read(template); errors.Is(err, fs.ErrNotExist) {
		return wanted{}, s.nowhere(name, file, parts.Template())
	} else if err != nil {
		return wanted{}, err
	}
	return s.checked(wanted{name: name}, local, template)
}

// compare looks whether the unit in the registry is still what the local file
// says, and with --replace takes the file.
func (s *resolver) compare(ctx context.Context, w *wanted, file string, parts unit.Name) error {
	from, what := file, "local unit file "+file
	local, err := s.read(file)
	if errors.Is(err, fs.ErrNotExist) && parts.IsInstance() {
		from = path.Join(path.Dir(file), parts.Template())
		what = "local template unit file " + from
		local, err = s.read(from)
		if _, ok := s.known[parts.Template()]; ok && errors.Is(err, fs.ErrNotExist) && s.replace {
			from = "template " + parts.Template()
			local, err = s.fromRegistry(ctx, parts.Template())
		}
	}
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil // nothing to compare with
	case err != nil:
		return err
	}
	switch same := local.Hash().String() == w.was.Hash; {
	case same && s.replace:
		if s.output != "json" {
			Say(s.io.out, "Found same Unit(%s) in Registry, nothing to do\n", w.name)
		}
	case same:
	case !s.replace:
		s.differs(w.name, what)
	case !mayReplace[s.verb][w.was.Desired]:
		Say(s.io.err, "Warning: can not replace Unit(%s) in state '%s', use the appropriate command\n", w.name, w.was.Desired)
	default:
		replaced, err := s.checked(*w, local, from)
		if err != nil {
			return err
		}
		*w = replaced
	}
	return nil
}

// In which desired states a verb may replace a unit.
var mayReplace = map[string]map[registry.Desired]bool{
	"submit": {registry.Inactive: true},
	"load":   {registry.Inactive: true, registry.Loaded: true},
	"start":  {registry.Inactive: true, registry.Loaded: true, registry.Launched: true},
}

func (s *resolver) differs(name, what string) {
	Say(s.io.err, "WARNING: Unit %s in registry differs from %s. Add --replace to override.\n", name, what)
}

// checked takes the file for the unit unless it is bad; warnings are printed.
func (s *resolver) checked(w wanted, f *unit.File, from string) (wanted, error) {
	parts, _ := unit.SplitName(w.name)
	_, problems := f.Check(parts)
	for _, p := range problems {
		if p.Warning {
			Say(s.io.err, "WARNING: Unit %s: %s: %v\n", w.name, from, p)
		}
	}
	if err := unit.Refusal(problems); err != nil {
		if s.fleet {
			return w, errors.New(firstProblem(err))
		}
		return w, fmt.Errorf("unit %s: %s: %w", w.name, from, err)
	}
	w.text = f.Text
	if w.text == "" {
		w.text = "\n" // a unit file may say nothing
	}
	return w, nil
}

// firstProblem is the reason alone, as fleet gives it.
func firstProblem(err error) string {
	var p unit.Problem
	if errors.As(err, &p) {
		return p.Reason
	}
	return err.Error()
}

// read returns a local unit file.
func (s *resolver) read(file string) (*unit.File, error) {
	if f, ok := s.files[file]; ok {
		if f == nil {
			return nil, fs.ErrNotExist
		}
		return f, nil
	}
	raw, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		s.files[file] = nil
		return nil, fs.ErrNotExist
	}
	if err != nil {
		return nil, fmt.Errorf("read the unit file: %w", err)
	}
	f, err := unit.Parse(string(raw))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	s.files[file] = f
	return f, nil
}

// fromRegistry returns the file of a template that is in the registry.
func (s *resolver) fromRegistry(ctx context.Context, name string) (*unit.File, error) {
	text, ok := s.texts[name]
	if !ok {
		u, found, err := s.unitText(ctx, name)
		if err != nil {
			return nil, err
		}
		if !found {
			return nil, fmt.Errorf("template %s was destroyed meanwhile", name)
		}
		text = u.Text
		s.texts[name] = text
	}
	f, err := unit.Parse(text)
	if err != nil {
		return nil, fmt.Errorf("template %s in the registry: %w", name, err)
	}
	return f, nil
}

func (s *resolver) nowhere(name, file, template string) error {
	switch {
	case s.fleet && template != "":
		return fmt.Errorf("failed getting Unit(%s) from template: unable to find template Unit(%s) in Registry or on filesystem", file, template)
	case s.fleet:
		return fmt.Errorf("unable to find Unit(%s) in Registry or on filesystem", name)
	case template != "":
		return fmt.Errorf("unit %s is not in the cluster and there is no file %s, nor is there its template %s", name, file, template)
	}
	return fmt.Errorf("unit %s is not in the cluster and there is no file %s", name, file)
}
