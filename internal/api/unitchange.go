package api

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"

	"golang.org/x/sync/errgroup"

	"flotilla/internal/state"
	"flotilla/internal/store"
	"flotilla/internal/wire"
)

const (
	// batchUnits is how many units are written in one transaction. One unit
	// takes up to two operations and one condition.
	batchUnits = 50
	// batchesAtOnce is how many transactions of one request are under way.
	batchesAtOnce = 8
	// batchBytes is the length of the values of one transaction, unless it is one
	// unit only.
	batchBytes = 512 << 10
)

// Step is what a request comes to for one unit: a record to write, the unit to
// destroy, or neither.
type Step struct {
	Write   *state.UnitRecord
	Destroy bool
	Result  wire.Result // once it is written, or at once if there is nothing to write

	have  state.Item[state.UnitRecord] // from which this was decided
	value string                       // of Write, as it is stored
}

// Decide says what to do about the i-th unit of a request. It is asked again if
// the unit changes before the step is done.
type Decide func(i int, known *state.Snapshot, u *state.Unit) Step

// Put is a step that writes a record, unless it is what is there already.
func Put(have state.Item[state.UnitRecord], r state.UnitRecord, result wire.Result) Step {
	r.V = state.Version
	result.Desired = r.Desired
	if have.Usable() && have.Value == r {
		return Step{Result: result}
	}
	return Step{Write: &r, Result: result}
}

// ChangeUnits carries out one decision per unit. known says how large what is to be
// written may be; it is planned from what is there when it is written. Each unit
// stands for itself: one that others change all the time holds up no other. The
// names must differ. The revision is one at which all of it is in force.
//
// Errors are those of the store: ErrUnknown if some of the units were written, or
// may have been.
func (s *Server) ChangeUnits(ctx context.Context, known *state.Snapshot, names []string, decide Decide) ([]Step, int64, error) {
	c := &changing{Server: s, names: names, decide: decide, steps: make([]Step, len(names)), unsure: make([]*Step, len(names)), revision: known.Revision}
	var all errgroup.Group
	all.SetLimit(batchesAtOnce)
	for _, batch := range c.inBatches(known) {
		all.Go(func() error { return c.write(ctx, batch) })
	}
	err := all.Wait()
	if err != nil && (c.written > 0 || slices.ContainsFunc(c.unsure, func(st *Step) bool { return st != nil })) {
		err = fmt.Errorf("%w of some units (%d of %d were written): %v", store.ErrUnknown, c.written, len(names), err)
	}
	return c.steps, c.revision, err
}

// changing is a change under way. Units are called by their index. Each is in one
// batch, whose goroutine owns its step.
type changing struct {
	*Server
	names  []string
	decide Decide
	steps  []Step
	unsure []*Step // the last of which nobody knows whether it was done; nil: there is none

	mu       sync.Mutex
	written  int   // units; guarded by mu
	revision int64 // guarded by mu
}

// inBatches cuts what is to be written into transactions.
func (c *changing) inBatches(known *state.Snapshot) (all [][]int) {
	size := 0
	for i := range c.names {
		tx := c.plan(known, []int{i})
		length := len(c.steps[i].value)
		last := len(all) - 1
		switch {
		case len(tx.Ops) == 0: // it is there already
		case last >= 0 && len(all[last]) < batchUnits && size+length <= batchBytes:
			all[last] = append(all[last], i)
			size += length
		default:
			all = append(all, []int{i})
			size = length
		}
	}
	return all
}

// plan decides about the units of a batch.
func (c *changing) plan(known *state.Snapshot, batch []int) (tx state.Tx) {
	for _, i := range batch {
		u := known.Named(c.names[i])
		if before := c.unsure[i]; before != nil && before.done(u.Record) {
			c.steps[i] = *before
			continue
		}
		st := c.decide(i, known, u)
		st.have = u.Record
		key := c.State.Keys.Unit(u.Name)
		switch {
		case st.Destroy:
			tx.Ops = append(tx.Ops, store.Delete(key), store.Delete(c.State.Keys.Move(u.Name)))
		case st.Write != nil:
			st.value = u.Record.With(*st.Write)
			tx.Ops = append(tx.Ops, store.Put(key, st.value))
		}
		if c.steps[i] = st; st.Destroy || st.Write != nil {
			tx.Conds = append(tx.Conds, store.Unchanged(key, u.Record.Modified))
		}
	}
	tx.Unknown = func() {
		for _, i := range batch {
			c.unsure[i] = new(c.steps[i])
		}
	}
	return tx
}

// done reports whether a record is what the step was to make of it.
func (st *Step) done(now state.Item[state.UnitRecord]) bool {
	switch {
	case st.Destroy:
		return !now.Exists() || now.Created > st.have.Modified
	case st.Write == nil:
		return false
	}
	return now.Usable() && now.Value == *st.Write && now.Modified > st.have.Modified
}

// write writes the steps of a batch in one transaction, or one by one if others
// change some of its units all the time.
func (c *changing) write(ctx context.Context, batch []int) error {
	revision, err := c.State.Update(ctx, func(known *state.Snapshot) (state.Tx, error) { return c.plan(known, batch), nil })
	switch {
	case errors.Is(err, store.ErrConflict) && len(batch) > 1:
		for i := range batch {
			if err := c.write(ctx, batch[i:i+1]); err != nil {
				return err
			}
		}
		return nil
	case err != nil:
		return fmt.Errorf("change unit %s: %w", c.names[batch[0]], err)
	}
	c.mu.Lock()
	c.revision = max(c.revision, revision)
	c.written += len(batch)
	c.mu.Unlock()
	for _, i := range batch {
		c.unsure[i] = nil
		if r := c.steps[i].Result; c.steps[i].value != "" || c.steps[i].Destroy {
			c.Log.Info("unit "+string(r.Outcome), "unit", c.names[i], "desired", r.Desired, "revision", revision)
		}
	}
	return nil
}
