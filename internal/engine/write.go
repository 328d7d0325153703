package engine

import (
	"iter"

	"flotilla/internal/state"
	"flotilla/internal/store"
)

// change is one write of a step, and guard one condition for all of them.
type change struct {
	key    string
	value  string
	delete bool
}

type guard struct {
	key      string
	created  bool  // revision is that of its creation and not of its last change
	revision int64 // 0: there is no such key
}

// writes returns what a step means for the records: the changes, and under which
// conditions they are to be made.
func (s Step) writes(k state.Keys) (changes []change, guards []guard) {
	put := func(key, value string) { changes = append(changes, change{key: key, value: value}) }
	del := func(key string) { changes = append(changes, change{key: key, delete: true}) }
	unchanged := func(key string, revision int64) { guards = append(guards, guard{key: key, revision: revision}) }
	if s.unit == nil {
		unchanged(k.Failover(), s.failover.Modified)
		switch s.Do {
		case Hold, Allow:
			put(k.Failover(), s.failover.With(s.Failover))
		case EndHold:
			del(k.Failover())
		}
		return changes, guards
	}
	placement := k.Placement(s.Unit)
	switch s.Do {
	case Place, Refresh, Approve, Leave:
		unchanged(placement, s.unit.Placement.Modified)
		put(placement, s.unit.Placement.With(s.Placement))
	case Forget:
		unchanged(placement, s.unit.Placement.Modified)
		unchanged(k.Node(s.Node), 0) // it has not come back
		del(placement)
	case Unplaced:
		unchanged(placement, s.unit.Placement.Modified)
		put(k.Unplaced(s.Unit), s.unit.Unplaced.With(state.Unplaced{V: state.Version, Reason: s.Reason}))
	case Clear:
		del(k.Unplaced(s.Unit))
	}
	if s.Do == Place || s.Do == Refresh {
		guards = append(guards, guard{key: k.Node(s.Node), created: true, revision: s.Placement.Generation})
	}
	if s.From != "" {
		unchanged(k.Node(s.From), 0)
	}
	if s.Clear {
		del(k.Unplaced(s.Unit))
	}
	if s.EndMove {
		unchanged(k.Move(s.Unit), s.unit.Move.Modified)
		del(k.Move(s.Unit))
	}
	return changes, guards
}

// batch is steps that are written in one transaction.
type batch struct {
	steps  []Step
	ops    []store.Op
	conds  []store.Cond
	guards map[guard]struct{}
	size   int // bytes of the values
}

// maxBytes is how long the values of one batch may be: half of what one request
// may be long. Its other limits are those of the store, of which the leader's
// condition takes one.
const maxBytes = 512 << 10

// batches puts steps into as few transactions as they fit in, each made when it is
// asked for. The leader's condition is not yet in them.
func batches(k state.Keys, steps []Step) iter.Seq[batch] {
	return func(yield func(batch) bool) {
		b := batch{guards: map[guard]struct{}{}}
		for _, s := range steps {
			changes, guards := s.writes(k)
			size := 0
			for _, c := range changes {
				size += len(c.key) + len(c.value)
			}
			full := len(b.ops)+len(changes) > store.MaxOps || len(b.conds)+len(guards) >= store.MaxOps || b.size+size > maxBytes
			if full && len(b.steps) > 0 {
				if !yield(b) {
					return
				}
				b = batch{guards: map[guard]struct{}{}}
			}
			b.size += size
			b.add(s, changes, guards)
		}
		if len(b.steps) > 0 {
			yield(b)
		}
	}
}

func (b *batch) add(s Step, changes []change, guards []guard) {
	b.steps = append(b.steps, s)
	for _, c := range changes {
		if c.delete {
			b.ops = append(b.ops, store.Delete(c.key))
		} else {
			b.ops = append(b.ops, store.Put(c.key, c.value))
		}
	}
	for _, g := range guards {
		if _, has := b.guards[g]; has { // many steps depend on the same node
			continue
		}
		b.guards[g] = struct{}{}
		if g.created {
			b.conds = append(b.conds, store.CreatedAt(g.key, g.revision))
		} else {
			b.conds = append(b.conds, store.Unchanged(g.key, g.revision))
		}
	}
}
