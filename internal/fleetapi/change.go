package fleetapi

import (
	"context"
	"errors"
	"fmt"

	"flotilla/internal/registry"
	"flotilla/internal/store"
	"flotilla/internal/unit"
)

const (
	// batchUnits is how many units are written in one transaction. One unit
	// takes up to two operations and one condition.
	batchUnits = 50
	// batchBytes is the length of the values of one transaction, unless it is
	// one value only.
	batchBytes = 512 << 10
	// maxRecord is the longest record of a unit in bytes of JSON. What the
	// engine adds to it must fit into a request of etcd, 1.5 MiB.
	maxRecord = 5 << 18
	// attempts is how often a change is planned again when the unit was changed
	// meanwhile.
	attempts = 10
)

// step is what a request comes to for one unit.
type step struct {
	write   bool // put the record, or delete it
	destroy bool
	want    string                // the record to put, encoded
	have    record[registry.Unit] // from which this was decided
	result  Result                // once it is written, or at once if there is nothing to write
	refusal *fleetError           // fleet's answer instead
}

// decide says what to do about the i-th unit of a request, given its record. It
// is asked again if the record changes before the step is done.
type decide func(i int, have record[registry.Unit]) step

// put is a step that writes a record, unless it is what is there already.
func put(have record[registry.Unit], u registry.Unit, result Result) step {
	u.V = registry.Version
	result.Desired = u.Desired
	if have.found && have.err == nil && have.registry == u {
		return step{result: result}
	}
	return step{write: true, want: registry.Encode(u), result: result}
}

// change carries out one decision per unit. Each unit stands for itself: a
// conflict on one is planned again for that one only. The names must differ.
// The revision is one at which all of it is in force.
//
// Errors are those of the store; some of the units may have been written then.
func (h *Handler) change(ctx context.Context, names []string, what decide) ([]step, int64, error) {
	steps := make([]step, len(names))
	pending := make([]int, len(names))
	for i := range names {
		pending[i] = i
	}
	seen := map[int]int64{}  // mod revision that the last attempt was planned from
	unsure := map[int]step{} // attempts of which nobody knows whether they were done
	var revision int64
	for attempt := 0; len(pending) > 0; attempt++ {
		keys := make([]string, 0, len(pending))
		for _, i := range pending {
			keys = append(keys, h.Keys.Unit(names[i]))
		}
		kvs, at, err := h.Store.GetMany(ctx, 0, keys...)
		if err != nil {
			return nil, 0, err
		}
		revision = max(revision, at)
		var together, alone []int // those that somebody else is changing too are written one by one
		for n, i := range pending {
			kv, found := kvs[keys[n]]
			have := recordOf[registry.Unit](kv, found)
			if before, ok := unsure[i]; ok && before.done(have) {
				steps[i] = before
				continue
			}
			steps[i] = what(i, have)
			steps[i].have = have
			if !steps[i].write {
				continue
			}
			mod, planned := seen[i]
			if planned && mod != kv.ModRevision {
				alone = append(alone, i)
			} else {
				together = append(together, i)
			}
			seen[i] = kv.ModRevision
		}
		if attempt == attempts && len(together)+len(alone) > 0 {
			i := append(together, alone...)[0]
			return nil, 0, fmt.Errorf("change unit %s: %w %d times in a row", names[i], store.ErrConflict, attempts)
		}
		pending = nil
		for _, batch := range append(batches(together, steps), singles(alone)...) {
			at, err := h.apply(ctx, names, steps, batch)
			switch {
			case err == nil:
				revision = max(revision, at)
			case errors.Is(err, store.ErrUnknown):
				for _, i := range batch {
					unsure[i] = steps[i]
				}
				pending = append(pending, batch...)
			case errors.Is(err, store.ErrConflict):
				pending = append(pending, batch...)
			default:
				return nil, 0, err
			}
		}
	}
	return steps, revision, nil
}

// done reports whether a record is what the step was to make of it.
func (s step) done(have record[registry.Unit]) bool {
	if s.destroy {
		return !have.found || have.CreateRevision > s.have.ModRevision
	}
	return have.found && have.Value == s.want && have.ModRevision > s.have.ModRevision
}

// apply writes some of the steps in one transaction, if none of their records
// has changed.
func (h *Handler) apply(ctx context.Context, names []string, steps []step, batch []int) (int64, error) {
	var ops []store.Op
	var conds []store.Cond
	for _, i := range batch {
		key := h.Keys.Unit(names[i])
		conds = append(conds, store.Unchanged(key, steps[i].have.ModRevision))
		if steps[i].destroy {
			ops = append(ops, store.Delete(key), store.Delete(h.Keys.Move(names[i])))
		} else {
			ops = append(ops, store.Put(key, steps[i].want))
		}
	}
	revision, err := h.Store.Apply(ctx, ops, conds...)
	if err == nil {
		for _, i := range batch {
			s := steps[i]
			h.Log.Info("unit "+string(s.result.Outcome), "unit", names[i], "desired", s.result.Desired, "revision", revision)
		}
	}
	return revision, err
}

func batches(indexes []int, steps []step) [][]int {
	var all [][]int
	size := 0
	for _, i := range indexes {
		length := len(steps[i].want)
		if last := len(all) - 1; last >= 0 && len(all[last]) < batchUnits && size+length <= batchBytes {
			all[last] = append(all[last], i)
			size += length
			continue
		}
		all = append(all, []int{i})
		size = length
	}
	return all
}

func singles(indexes []int) [][]int {
	var all [][]int
	for _, i := range indexes {
		all = append(all, []int{i})
	}
	return all
}

// sizeProblem says that a unit is too large to be stored, or nil.
func sizeProblem(text string) *Problem {
	u := registry.Unit{V: registry.Version, Text: text, Desired: registry.Launched}
	if len(text) <= maxRecord/6 { // as JSON no byte takes more than six
		return nil
	}
	if size := len(registry.Encode(u)); size > maxRecord {
		return &Problem{Reason: fmt.Sprintf("the unit file is too large: it takes %d bytes in the store, and the limit is %d", size, maxRecord),
			Remedy: "move data into a file on the machines, or into an image"}
	}
	return nil
}

// templateReason says that a template cannot be what is asked, in fleet's words,
// or "".
func templateReason(name string, desired registry.Desired) string {
	if n, ok := unit.SplitName(name); ok && n.IsTemplate() && desired != "" && desired != registry.Inactive {
		return fmt.Sprintf("cannot activate template %q", name)
	}
	return ""
}

// submit decides about one unit file of the native API.
func submit(in Submission) func(have record[registry.Unit]) step {
	refused := func(reason string, problems ...Problem) func(record[registry.Unit]) step {
		return func(have record[registry.Unit]) step {
			return step{result: Result{Name: in.Name, Outcome: Refused, Reason: reason, Problems: problems, Desired: have.registry.Desired}}
		}
	}
	if err := unit.CheckName(in.Name); err != nil {
		return refused(err.Error())
	}
	if in.Desired != "" {
		if _, err := registry.ParseDesired(string(in.Desired)); err != nil {
			return refused(err.Error())
		}
	}
	if reason := templateReason(in.Name, in.Desired); reason != "" {
		return refused(reason)
	}
	if p := sizeProblem(in.Text); p != nil {
		return refused(p.Reason, *p)
	}
	f, err := unit.Parse(in.Text)
	if err != nil {
		return refused("the unit file cannot be read", problemOf(err))
	}
	n, _ := unit.SplitName(in.Name)
	_, found := f.Check(n)
	problems := problemsOf(found)
	if unit.Refusal(found) != nil {
		return refused("the unit file asks for what cannot be", problems...)
	}
	hash := f.Hash()
	return func(have record[registry.Unit]) step {
		result := Result{Name: in.Name, Outcome: Created, Problems: problems}
		u := have.registry
		switch {
		case have.found && have.err != nil:
			return step{result: Result{Name: in.Name, Outcome: Refused, Reason: "what is stored under this name cannot be read: " + have.err.Error() + "; destroy it first"}}
		case !have.found:
			u = registry.Unit{Text: in.Text, Desired: registry.Inactive}
		case u.Text == in.Text:
			result.Outcome = Unchanged
		default:
			old, err := unit.Parse(u.Text)
			switch {
			case err == nil && old.Hash() == hash: // comments and spacing
				result.Outcome = Unchanged
			case in.Replace:
				result.Outcome = Replaced
			default:
				result.Outcome = Differs
			}
			if in.Replace {
				u.Text = in.Text
			}
		}
		if in.Desired != "" {
			u.Desired = in.Desired
		}
		s := put(have, u, result)
		if s.write && result.Outcome == Unchanged {
			s.result.Outcome = Updated
		}
		return s
	}
}

func problemOf(err error) Problem {
	var p unit.Problem
	if errors.As(err, &p) {
		return Problem(p)
	}
	return Problem{Reason: err.Error()}
}

// alter decides about one unit of POST /v1/units/change.
func alter(name string, c Changes) func(have record[registry.Unit]) step {
	return func(have record[registry.Unit]) step {
		u := have.registry
		refused := func(reason string) step {
			return step{result: Result{Name: name, Outcome: Refused, Reason: reason, Desired: u.Desired}}
		}
		switch {
		case !have.found:
			return step{result: Result{Name: name, Outcome: Missing}}
		case c.Destroy:
			return step{write: true, destroy: true, result: Result{Name: name, Outcome: Changed}}
		case have.err != nil:
			return refused("what is stored cannot be read: " + have.err.Error())
		case c.Restart && u.Desired == registry.Launched:
			u.Restarts++
		case c.Restart && u.Desired == registry.Loaded:
			u.Desired = registry.Launched
		case c.Restart:
			return refused("it is inactive: start it")
		default:
			u.Desired = c.Desired
		}
		if reason := templateReason(name, u.Desired); reason != "" {
			return refused(reason)
		}
		s := put(have, u, Result{Name: name, Outcome: Unchanged})
		if s.write {
			s.result.Outcome = Changed
		}
		return s
	}
}
