package engine

import (
	"flotilla/internal/registry"
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
func (s Step) writes(k registry.Keys) (changes []change, guards []guard) {
	put := func(key, value string) { changes = append(changes, change{key: key, value: value}) }
	del := func(key string) { changes = append(changes, change{key: key, delete: true}) }
	unchanged := func(key string, revision int64) { guards = append(guards, guard{key: key, revision: revision}) }
	placement := k.Placement(s.Unit)
	leavesLost := func(machine string) { // nobody may have come back, nor be alone
		unchanged(k.Machine(machine), 0)
		if s.Exclusive {
			unchanged(k.Solo(), s.SoloSeen)
		}
	}
	switch s.Do {
	case Place, Refresh:
		unchanged(placement, s.PlacementSeen)
		guards = append(guards, guard{key: k.Machine(s.Machine), created: true, revision: s.Placement.Generation})
		if s.From != "" {
			leavesLost(s.From)
			del(k.Entry(s.From, s.Unit))
		}
		put(placement, registry.Encode(s.Placement))
		put(k.Entry(s.Machine, s.Unit), registry.Encode(s.Entry))
	case Update, Release:
		unchanged(placement, s.PlacementSeen)
		put(k.Entry(s.Machine, s.Unit), registry.Encode(s.Entry))
	case Forget:
		unchanged(placement, s.PlacementSeen)
		leavesLost(s.Machine)
		del(k.Entry(s.Machine, s.Unit))
		del(placement)
	case Clean:
		unchanged(placement, s.PlacementSeen)
		unchanged(k.Entry(s.Machine, s.Unit), s.EntrySeen)
		del(k.Entry(s.Machine, s.Unit))
	case Explain:
		unchanged(placement, s.PlacementSeen)
		put(k.Unplaced(s.Unit), registry.Encode(registry.Unplaced{V: registry.Version, Reason: s.Reason}))
	case Clear:
		del(k.Unplaced(s.Unit))
	case PutGlobal:
		guards = append(guards, guard{key: k.Unit(s.Unit), created: true, revision: s.Entry.Epoch})
		put(k.Entry(registry.Global, s.Unit), registry.Encode(s.Entry))
	case EndGlobal:
		unchanged(k.Entry(registry.Global, s.Unit), s.EntrySeen)
		del(k.Entry(registry.Global, s.Unit))
	case Hold, Allow:
		unchanged(k.Failover(), s.FailoverSeen)
		put(k.Failover(), registry.Encode(s.Failover))
	case EndHold:
		unchanged(k.Failover(), s.FailoverSeen)
		del(k.Failover())
	}
	if s.Clear {
		del(k.Unplaced(s.Unit))
	}
	if s.EndMove {
		unchanged(k.Move(s.Unit), s.MoveSeen)
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

// Limits of one batch: those of the store less the leader's condition, and
// half of what one request may be long.
const (
	maxUnits = 40
	maxBytes = 512 << 10
)

// pack puts steps into as few transactions as they fit in. The leader's
// condition is not yet in them.
func pack(k registry.Keys, steps []Step) []batch {
	var all []batch
	b := batch{guards: map[guard]struct{}{}}
	for _, s := range steps {
		changes, guards := s.writes(k)
		size := 0
		for _, c := range changes {
			size += len(c.key) + len(c.value)
		}
		if len(b.steps) > 0 && (len(b.steps) >= maxUnits || len(b.ops)+len(changes) > store.MaxOps ||
			len(b.conds)+len(guards)+1 > store.MaxOps || b.size+size > maxBytes) {
			all = append(all, b)
			b = batch{guards: map[guard]struct{}{}}
		}
		b.steps = append(b.steps, s)
		b.size += size
		for _, c := range changes {
			if c.delete {
				b.ops = append(b.ops, store.Delete(c.key))
			} else {
				b.ops = append(b.ops, store.Put(c.key, c.value))
			}
		}
		for _, g := range guards {
			if _, has := b.guards[g]; has { // many steps ask for the same machine
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
	if len(b.steps) > 0 {
		all = append(all, b)
	}
	return all
}
