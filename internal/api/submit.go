package api

import (
	"errors"
	"fmt"
	"net/http"
	"slices"

	"flotilla/internal/state"
	"flotilla/internal/unit"
	"flotilla/internal/wire"
)

// maxRecord is the longest record of a unit in bytes of JSON. It has to fit into a
// request of etcd, 1.5 MiB.
const maxRecord = 5 << 18

// SizeProblem says that a unit is too large to be stored, or nil.
func SizeProblem(text string) *unit.Problem {
	if len(text) <= maxRecord/6 { // as JSON no byte takes more than six
		return nil
	}
	if size := len(state.Encode(state.UnitRecord{V: state.Version, Text: text, Desired: unit.Launched})); size > maxRecord {
		return &unit.Problem{Reason: fmt.Sprintf("the unit file is too large: it takes %d bytes in the store, and the limit is %d", size, maxRecord),
			Remedy: "move data into a file on the nodes, or into an image"}
	}
	return nil
}

// TemplateReason says that a template cannot be what is asked, in fleet's words,
// or "".
func TemplateReason(name string, desired unit.Desired) string {
	if n, ok := unit.SplitName(name); ok && n.IsTemplate() && desired != "" && desired != unit.Inactive {
		return fmt.Sprintf("cannot activate template %q", name)
	}
	return ""
}

// postUnits submits units.
func (s *Server) postUnits(r *http.Request) (any, error) {
	var in wire.Submissions
	if err := readBody(r, &in); err != nil {
		return nil, err
	}
	read := s.State.Fresh
	if in.Retry {
		read = s.State.Full // which units have failed is in the reports
	}
	known, err := read(r.Context())
	if err != nil {
		return nil, err
	}
	list := submissions(known, in)
	results, at, names := make([]wire.Result, len(list)), []int(nil), []string(nil)
	for i, sub := range list {
		results[i] = sub.decide(known, known.Named(sub.Name)).Result
		if !sub.double {
			at, names = append(at, i), append(names, sub.Name)
		}
	}
	if in.Together && slices.ContainsFunc(results, no) {
		for i, r := range results {
			if !no(r) {
				results[i].Outcome, results[i].Desired = wire.Skipped, r.Was
			}
		}
		return wire.Results{Results: results, Revision: known.Revision}, nil
	}
	steps, revision, err := s.ChangeUnits(r.Context(), known, names, func(i int, known *state.Snapshot, u *state.Unit) Step {
		return list[at[i]].decide(known, u)
	})
	if err != nil {
		return nil, err
	}
	for i, st := range steps {
		results[at[i]] = st.Result
	}
	return wire.Results{Results: results, Revision: revision}, nil
}

func no(r wire.Result) bool { return r.Outcome == wire.Refused || r.Outcome == wire.Missing }

// submission is one unit of a request.
type submission struct {
	wire.Submission
	retry   bool
	double  bool // the request has the unit before it
	refusal string
	text    source // if there is one
}

// source is a unit file that a unit may have.
type source struct {
	text     string
	hash     string
	global   bool
	problems []unit.Problem
	bad      bool // the problems refuse it
}

// readSource reads a unit file for a unit. The error is that it cannot be read.
func readSource(name, text string) (source, error) {
	f, err := unit.Parse(text)
	if err != nil {
		return source{}, err
	}
	n, _ := unit.SplitName(name)
	req, problems := f.Check(n)
	return source{text, f.Hash().String(), req.Global, problems, unit.Refusal(problems) != nil}, nil
}

// submissions returns those of a request, one for each unit that is meant.
func submissions(known *state.Snapshot, in wire.Submissions) []submission {
	list := []submission{}
	seen := map[string]bool{}
	for _, one := range in.Units {
		names := []string{one.Name}
		if one.Text == nil {
			names = resolve(known, names)
		}
		for _, name := range names {
			sub := submission{Submission: one, retry: in.Retry, double: seen[name]}
			if sub.double && one.Text == nil {
				continue
			}
			sub.Name, seen[name] = name, true
			sub.check()
			list = append(list, sub)
		}
	}
	return list
}

// check finds out what can be said without knowing what is there.
func (sub *submission) check() {
	switch {
	case sub.double:
		sub.refusal = "the request has another unit of this name before it"
		return
	case sub.Text == nil && isPattern(sub.Name): // it matches none
		return
	}
	err := unit.CheckName(sub.Name)
	if err == nil && sub.Desired != "" {
		_, err = unit.ParseDesired(string(sub.Desired))
	}
	if err != nil {
		sub.refusal = err.Error()
		return
	}
	if sub.refusal = TemplateReason(sub.Name, sub.Desired); sub.refusal != "" || sub.Text == nil {
		return
	}
	if p := SizeProblem(*sub.Text); p != nil {
		sub.refusal, sub.text.problems = p.Reason, []unit.Problem{*p}
		return
	}
	if sub.text, err = readSource(sub.Name, *sub.Text); err != nil {
		sub.refusal = "the unit file cannot be read"
		p := unit.Problem{Reason: err.Error()}
		errors.As(err, &p)
		sub.text.problems = []unit.Problem{p}
	}
}

// decide says what to do about the unit.
func (sub *submission) decide(known *state.Snapshot, u *state.Unit) Step {
	have := u.Record
	result := wire.Result{Name: sub.Name, Was: have.Value.Desired, Global: u.Requirements.Global, Problems: sub.text.problems}
	refused := func(reason string) Step {
		result.Outcome, result.Reason, result.Desired = wire.Refused, reason, have.Value.Desired
		return Step{Result: result}
	}
	switch {
	case sub.refusal != "":
		return refused(sub.refusal)
	case have.Problem != "":
		return refused("what is stored under this name cannot be read: " + have.Problem + "; destroy it first")
	}
	from, err := sub.source(known, have.Exists(), &result)
	switch {
	case err != nil:
		return refused(err.Error())
	case from == nil && !have.Exists():
		result.Outcome = wire.Missing
		return Step{Result: result}
	}
	r := have.Value
	result.Outcome = wire.Unchanged
	take := false
	switch {
	case from == nil:
	case !have.Exists():
		r.Desired, result.Outcome, take = unit.Inactive, wire.Created, true
	case r.Text == from.text:
	case state.StandingOf(known, u).Hash == from.hash: // comments and spacing differ
		take = sub.Replace
	case !sub.Replace:
		result.Outcome = wire.Differs
	case sub.Careful && higher(r.Desired, sub.Desired):
		result.Outcome = wire.InUse
	default:
		result.Outcome, take = wire.Replaced, true
	}
	if take {
		if from.bad {
			return refused("the unit file asks for what cannot be")
		}
		r.Text, result.Global = from.text, from.global
	}
	if sub.Desired != "" {
		r.Desired = sub.Desired
	}
	if st := state.StandingOf(known, u); sub.retry && result.Outcome == wire.Unchanged && st.There.Active == "failed" && have.Value.Desired == unit.Launched && r.Desired == unit.Launched {
		r.Restarts++
	}
	st := Put(have, r, result)
	if st.Write != nil && result.Outcome == wire.Unchanged {
		st.Result.Outcome = wire.Updated
	}
	return st
}

// higher reports whether a desired state is more than another one; "" is inactive.
func higher(a, b unit.Desired) bool {
	order := []unit.Desired{unit.Loaded, unit.Launched}
	return slices.Index(order, a) > slices.Index(order, b)
}

// source returns the text that the unit is to have, nil if it is the one that it
// has or if there is none.
func (sub *submission) source(known *state.Snapshot, exists bool, result *wire.Result) (*source, error) {
	name, _ := unit.SplitName(sub.Name)
	template := known.Units[name.Template()]
	takes := !exists && (sub.Text == nil || sub.Template) || exists && sub.Text == nil && sub.Replace
	if !takes || !name.IsInstance() || template == nil || !template.Record.Exists() {
		if sub.Text == nil {
			return nil, nil
		}
		return &sub.text, nil
	}
	if template.Record.Problem != "" {
		return nil, fmt.Errorf("its template %s cannot be read: %s", template.Name, template.Record.Problem)
	}
	from, err := readSource(sub.Name, template.Record.Value.Text)
	if err != nil {
		return nil, fmt.Errorf("its template %s cannot be read: %w", template.Name, err)
	}
	result.From, result.FromDiffers, result.Problems = template.Name, sub.Text != nil && sub.text.hash != from.hash, from.problems
	return &from, nil
}

// postChanges changes units that are there.
func (s *Server) postChanges(r *http.Request) (any, error) {
	var in wire.Changes
	if err := readBody(r, &in); err != nil {
		return nil, err
	}
	asked := 0
	for _, set := range []bool{in.Desired != "", in.Stop, in.Restart, in.Destroy} {
		if set {
			asked++
		}
	}
	if asked != 1 {
		return nil, wire.Errorf(wire.CodeBadRequest, "", "give one of desired, stop, restart and destroy")
	}
	if in.Desired != "" {
		if _, err := unit.ParseDesired(string(in.Desired)); err != nil {
			return nil, wire.Errorf(wire.CodeBadRequest, "", "%v", err)
		}
	}
	known, err := s.State.Fresh(r.Context())
	if err != nil {
		return nil, err
	}
	names := resolve(known, in.Names)
	steps, revision, err := s.ChangeUnits(r.Context(), known, names, func(_ int, _ *state.Snapshot, u *state.Unit) Step { return Alter(u, in) })
	if err != nil {
		return nil, err
	}
	out := wire.Results{Results: make([]wire.Result, 0, len(steps)), Revision: revision}
	for _, st := range steps {
		out.Results = append(out.Results, st.Result)
	}
	return out, nil
}

// Alter decides about one unit of POST /v1/units/change.
func Alter(u *state.Unit, c wire.Changes) Step {
	r := u.Record.Value
	result := wire.Result{Name: u.Name, Was: r.Desired, Global: u.Requirements.Global}
	refused := func(reason string) Step {
		result.Outcome, result.Reason, result.Desired = wire.Refused, reason, r.Desired
		return Step{Result: result}
	}
	switch {
	case !u.Record.Exists():
		result.Outcome = wire.Missing
		return Step{Result: result}
	case c.Destroy:
		result.Outcome = wire.Changed
		return Step{Destroy: true, Result: result}
	case u.Record.Problem != "":
		return refused("what is stored cannot be read: " + u.Record.Problem)
	case c.Stop && r.Desired == unit.Launched:
		r.Desired = unit.Loaded
	case c.Stop:
	case c.Restart && r.Desired == unit.Launched:
		r.Restarts++
	case c.Restart && r.Desired == unit.Loaded:
		r.Desired = unit.Launched
	case c.Restart:
		return refused("it is inactive: start it")
	default:
		r.Desired = c.Desired
	}
	if reason := TemplateReason(u.Name, r.Desired); reason != "" {
		r = u.Record.Value
		return refused(reason)
	}
	result.Outcome = wire.Unchanged
	st := Put(u.Record, r, result)
	if st.Write != nil {
		st.Result.Outcome = wire.Changed
	}
	return st
}
