package catalog

import (
	"slices"
	"time"
)

const (
	holdFor      = 10 * time.Minute
	holdFrom     = 10 // endpoints
	holdServices = 2
)

// hold is a mass disappearance that is not in force yet.
type hold struct {
	shown     *Hold // for the snapshot; replaced, never changed
	since     time.Time
	confirmed bool
	services  map[*entry]struct{} // those with held keys
}

// Confirm says that the disappearance held at that revision or before is meant;
// the next Apply, which may be empty, carries it out. It reports whether there
// was anything to confirm.
func (b *Builder) Confirm(revision int64) bool {
	if b.hold == nil || revision < b.hold.shown.Revision {
		return false
	}
	b.hold.confirmed = true
	return true
}

func (b *Builder) holdIsOver(now time.Time) bool {
	return b.hold != nil && (b.hold.confirmed || now.Sub(b.hold.since) >= holdFor)
}

// loss is how many endpoints a batch would take away, and from how many services.
// A service that gets as many new ones in the same batch loses none: that is an
// update, not a disappearance.
type loss struct{ endpoints, services int }

func (b *Builder) lossOf(edits map[string]*edit) loss {
	var l loss
	for _, ed := range edits {
		if n := ed.loss(); n > 0 {
			l.endpoints += n
			l.services++
		}
	}
	return l
}

func (ed *edit) loss() int {
	if len(ed.gone) == 0 {
		return 0
	}
	return ed.entry.parsed.endpoints() - ed.after.endpoints()
}

func (l loss) suspicious(of int) bool {
	return l.endpoints >= holdFrom && 2*l.endpoints > of && l.services >= holdServices
}

// startHold turns the deletions of every service that loses endpoints into held
// keys.
func (b *Builder) startHold(batch Batch, edits map[string]*edit) {
	if b.hold == nil {
		b.hold = &hold{services: map[*entry]struct{}{}}
		b.hold.shown = &Hold{}
	}
	b.hold.since = batch.Now
	b.hold.shown = &Hold{Revision: batch.Revision, Removed: b.hold.shown.Removed, Of: b.endpoints}
	for _, ed := range edits {
		if ed.loss() <= 0 || len(ed.gone) == 0 {
			continue
		}
		if ed.entry.before == 0 {
			ed.entry.before = ed.entry.parsed.endpoints()
		}
		for _, k := range ed.gone {
			at, found := find(ed.keys, k.Name)
			if found { // deleted and put again in the same batch
				continue
			}
			k.Held = true
			ed.keys = slices.Insert(ed.keys, at, k)
		}
		ed.read(b.rules)
	}
}

// updateHold keeps account of how many endpoints e would lose.
func (b *Builder) updateHold(e *entry, losing int) {
	if b.hold == nil {
		return
	}
	if e.before > 0 {
		b.hold.services[e] = struct{}{}
	} else {
		delete(b.hold.services, e)
	}
	if losing != e.losing {
		h := *b.hold.shown
		h.Removed += losing - e.losing
		b.hold.shown = &h
	}
}

// release carries out everything that is held.
func (b *Builder) release(dirty map[*entry]struct{}) {
	for e := range b.hold.services {
		ed := &edit{entry: e, after: b.rules.parse(e.name, withoutHeld(e.parsed.service.Keys))}
		e.before = 0
		b.replace(ed, dirty)
	}
}

// endHold ends a hold that holds nothing any more and returns what the snapshot
// says about it.
func (b *Builder) endHold() *Hold {
	if b.hold != nil && len(b.hold.services) == 0 {
		b.hold = nil
	}
	if b.hold == nil {
		return nil
	}
	return b.hold.shown
}

// withoutHeld returns the keys that the store still has.
func withoutHeld(keys []Key) []Key {
	var left []Key
	for i := range keys {
		if !keys[i].Held {
			left = append(left, keys[i])
		}
	}
	return left
}
