package fleetapi

import (
	"context"
	"errors"
	"fmt"

	"golang.org/x/sync/errgroup"

	"flotilla/internal/registry"
	"flotilla/internal/store"
	"flotilla/internal/unit"
	"flotilla/internal/unitapi"
)

const (
	// batchUnits is how many units are written in one transaction. One unit
	// takes up to two operations and one condition.
	batchUnits = 50
	// batchesAtOnce is how many transactions of one request are under way.
	batchesAtOnce = 8
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
	result  unitapi.Result        // once it is written, or at once if there is nothing to write
	refusal *fleetError           // fleet's answer instead
}

// decide says what to do about the i-th unit of a request, given its record. It
// is asked again if the record changes before the step is done.
type decide func(i int, have record[registry.Unit]) step

// put is a step that writes a record, unless it is what is there already.
func put(have record[registry.Unit], u registry.Unit, result unitapi.Result) step {
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
// Errors are those of the store: ErrUnknown if some of the units were written, or
// may have been.
func (h *Handler) change(ctx context.Context, names []string, what decide) ([]step, int64, error) {
	c := &changing{Handler: h, names: names, what: what, steps: make([]step, len(names)), seen: map[int]int64{}, unsure: map[int]step{}}
	var pending []int
	for i := range names {
		pending = append(pending, i)
	}
	for attempt := 0; len(pending) > 0; attempt++ {
		batches, err := c.plan(ctx, pending)
		if err == nil && attempt == attempts && len(batches) > 0 {
			err = fmt.Errorf("change unit %s: %w %d times in a row", names[batches[0][0]], store.ErrConflict, attempts)
		}
		pending = nil
		if err == nil {
			pending, err = c.writeAll(ctx, batches)
		}
		if err != nil {
			return nil, 0, partly(err, c.written, len(c.unsure), len(names))
		}
	}
	return c.steps, c.revision, nil
}

// changing is a change under way. Units are called by their index.
type changing struct {
	*Handler
	names    []string
	what     decide
	steps    []step
	seen     map[int]int64 // mod revision from which the unit was planned last
	unsure   map[int]step  // of which nobody knows whether they were done
	written  int           // units
	revision int64
}

// plan decides about the pending units and returns those to be written, in
// batches. A unit that somebody else has changed since it was planned last is
// one of its own, so that it does not hold up others.
func (c *changing) plan(ctx context.Context, pending []int) ([][]int, error) {
	var keys []string
	for _, i := range pending {
		keys = append(keys, c.Keys.Unit(c.names[i]))
	}
	kvs, revision, err := c.Store.GetMany(ctx, 0, keys...)
	if err != nil {
		return nil, err
	}
	c.revision = max(c.revision, revision)
	var together []int
	var alone [][]int
	for n, i := range pending {
		kv, found := kvs[keys[n]]
		have := recordOf[registry.Unit](kv, found)
		if before, ok := c.unsure[i]; ok && before.done(have) {
			c.steps[i] = before
			continue
		}
		s := c.what(i, have)
		s.have = have
		c.steps[i] = s
		mod, planned := c.seen[i]
		c.seen[i] = kv.ModRevision
		switch {
		case !s.write:
		case planned && mod != kv.ModRevision:
			alone = append(alone, []int{i})
		default:
			together = append(together, i)
		}
	}
	return append(inBatches(together, c.steps), alone...), nil
}

// writeAll writes batches side by side, so that the engine gets to know of all of
// them at about the same time, and returns the units that are to be planned again.
func (c *changing) writeAll(ctx context.Context, batches [][]int) (again []int, err error) {
	revisions, errs := make([]int64, len(batches)), make([]error, len(batches))
	var all errgroup.Group
	all.SetLimit(batchesAtOnce)
	for i, batch := range batches {
		all.Go(func() error {
			revisions[i], errs[i] = c.write(ctx, batch)
			return nil
		})
	}
	_ = all.Wait()
	for i, batch := range batches {
		switch {
		case errs[i] == nil:
			c.note(batch, revisions[i])
		case errors.Is(errs[i], store.ErrUnknown):
			for _, i := range batch {
				c.unsure[i] = c.steps[i]
			}
			again = append(again, batch...)
		case errors.Is(errs[i], store.ErrConflict):
			again = append(again, batch...)
		case err == nil:
			err = errs[i]
		}
	}
	return again, err
}

// note notes that a batch was written.
func (c *changing) note(batch []int, revision int64) {
	c.revision = max(c.revision, revision)
	c.written += len(batch)
	for _, i := range batch {
		s := c.steps[i]
		c.Log.Info("unit "+string(s.result.Outcome), "unit", c.names[i], "desired", s.result.Desired, "revision", revision)
	}
}

// write does some of the steps in one transaction, if none of their records has
// changed, and returns its revision.
func (c *changing) write(ctx context.Context, batch []int) (int64, error) {
	var ops []store.Op
	var conds []store.Cond
	for _, i := range batch {
		key := c.Keys.Unit(c.names[i])
		conds = append(conds, store.Unchanged(key, c.steps[i].have.ModRevision))
		if c.steps[i].destroy {
			ops = append(ops, store.Delete(key), store.Delete(c.Keys.Move(c.names[i])))
		} else {
			ops = append(ops, store.Put(key, c.steps[i].want))
		}
	}
	return c.Store.Apply(ctx, ops, conds...)
}

// partly turns an error that says that nothing was written into one that does
// not, if that is so.
func partly(err error, written, unsure, all int) error {
	switch {
	case unsure > 0:
		return fmt.Errorf("%w of some units: %v", store.ErrUnknown, err)
	case written > 0:
		return fmt.Errorf("%w: %d of %d units are done, then: %v", store.ErrUnknown, written, all, err)
	}
	return err
}

// done reports whether a record is what the step was to make of it.
func (s step) done(have record[registry.Unit]) bool {
	if s.destroy {
		return !have.found || have.CreateRevision > s.have.ModRevision
	}
	return have.found && have.Value == s.want && have.ModRevision > s.have.ModRevision
}

// inBatches cuts what is to be written into transactions.
func inBatches(indexes []int, steps []step) [][]int {
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

// sizeProblem says that a unit is too large to be stored, or nil.
func sizeProblem(text string) *unitapi.Problem {
	u := registry.Unit{V: registry.Version, Text: text, Desired: registry.Launched}
	if len(text) <= maxRecord/6 { // as JSON no byte takes more than six
		return nil
	}
	if size := len(registry.Encode(u)); size > maxRecord {
		return &unitapi.Problem{Reason: fmt.Sprintf("the unit file is too large: it takes %d bytes in the store, and the limit is %d", size, maxRecord),
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
func submit(in unitapi.Submission) func(have record[registry.Unit]) step {
	refused := func(reason string, problems ...unitapi.Problem) func(record[registry.Unit]) step {
		return func(have record[registry.Unit]) step {
			return step{result: unitapi.Result{Name: in.Name, Outcome: unitapi.Refused, Reason: reason, Problems: problems, Desired: have.registry.Desired}}
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
		result := unitapi.Result{Name: in.Name, Outcome: unitapi.Created, Problems: problems}
		u := have.registry
		switch {
		case have.found && have.err != nil:
			return step{result: unitapi.Result{Name: in.Name, Outcome: unitapi.Refused, Reason: "what is stored under this name cannot be read: " + have.err.Error() + "; destroy it first"}}
		case !have.found:
			u = registry.Unit{Text: in.Text, Desired: registry.Inactive}
		case u.Text == in.Text:
			result.Outcome = unitapi.Unchanged
		default:
			old, err := unit.Parse(u.Text)
			switch {
			case err == nil && old.Hash() == hash: // comments and spacing
				result.Outcome = unitapi.Unchanged
			case in.Replace:
				result.Outcome = unitapi.Replaced
			default:
				result.Outcome = unitapi.Differs
			}
			if in.Replace {
				u.Text = in.Text
			}
		}
		if in.Desired != "" {
			u.Desired = in.Desired
		}
		s := put(have, u, result)
		if s.write && result.Outcome == unitapi.Unchanged {
			s.result.Outcome = unitapi.Updated
		}
		return s
	}
}

func problemOf(err error) unitapi.Problem {
	var p unit.Problem
	if errors.As(err, &p) {
		return unitapi.Problem(p)
	}
	return unitapi.Problem{Reason: err.Error()}
}

// alter decides about one unit of POST /v1/units/change.
func alter(name string, c unitapi.Changes) func(have record[registry.Unit]) step {
	return func(have record[registry.Unit]) step {
		u := have.registry
		refused := func(reason string) step {
			return step{result: unitapi.Result{Name: name, Outcome: unitapi.Refused, Reason: reason, Desired: u.Desired}}
		}
		switch {
		case !have.found:
			return step{result: unitapi.Result{Name: name, Outcome: unitapi.Missing}}
		case c.Destroy:
			return step{write: true, destroy: true, result: unitapi.Result{Name: name, Outcome: unitapi.Changed}}
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
		s := put(have, u, unitapi.Result{Name: name, Outcome: unitapi.Unchanged})
		if s.write {
			s.result.Outcome = unitapi.Changed
		}
		return s
	}
}
