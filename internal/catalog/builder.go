package catalog

import (
	"cmp"
	"iter"
	"slices"
	"strings"
	"time"
)

// Builder makes snapshots of the keys under /services/. It keeps the keys of
// every service, reads again only the services that a batch touches, and settles
// what several services want at once: the oldest claim wins.
//
// A batch that would take away more than half of all endpoints, at least ten,
// from two services or more is not believed at once: what it deletes from the
// services that lose endpoints is held, that is, stays in force, until Confirm,
// until ten minutes have passed, or until the service has as many endpoints
// again. All else in the batch applies.
//
// A Builder belongs to one goroutine; its snapshots to everybody.
type Builder struct {
	rules     *rules
	services  map[string]*entry // by name as written
	holders   map[resource][]holder
	snapshot  *Snapshot
	endpoints int // in force, over all services
	routable  int // services
	excess    int // services that are over the limit
	changed   int
	hold      *hold
}

// entry is one service in the Builder.
type entry struct {
	name   string
	parsed *parsed // nil: the service is gone
	claims []claim // as entered in Builder.holders
	excess bool    // over MaxServices
	// Deletions of this service's keys are held if before > 0; it is how many
	// endpoints there were before them, and losing how many would go.
	before, losing int
}

// holder is a service that claims a resource; the first in the list has it.
type holder struct {
	entry   *entry
	created int64
}

// KeyValue is one key of the store, or its deletion.
type KeyValue struct {
	Key, Value     string
	CreateRevision int64
	ModRevision    int64
	Deleted        bool
}

// Batch is what happened in the store up to Revision. An empty batch lets time
// pass.
type Batch struct {
	Revision int64
	Reset    bool       // Keys are all keys there are, not only what changed
	Keys     []KeyValue // in the order of the store
	Now      time.Time
}

// SavedKey is a key with its last good value, as the last-good file keeps it.
type SavedKey struct {
	Key            string `json:"key"`
	Value          string `json:"value"`
	Good           string `json:"good,omitempty"`
	HasGood        bool   `json:"hasGood,omitempty"`
	CreateRevision int64  `json:"createRevision"`
	ModRevision    int64  `json:"modRevision"`
}

// NewBuilder returns a Builder without services.
func NewBuilder(p Policy) *Builder {
	return &Builder{
		rules:    newRules(p),
		services: map[string]*entry{},
		holders:  map[resource][]holder{},
		snapshot: &Snapshot{},
	}
}

// Apply takes a batch and returns the catalog after it. The revision never goes
// back except by a Reset. If nothing is different, Apply returns the snapshot it
// returned before.
func (b *Builder) Apply(batch Batch) *Snapshot {
	b.changed = 0
	dirty := map[*entry]struct{}{}
	if b.holdIsOver(batch.Now) {
		b.release(dirty)
	}
	edits := b.edits(batch)
	for _, e := range edits {
		e.read(b.rules)
	}
	if loss := b.lossOf(edits); loss.suspicious(b.endpoints) {
		b.startHold(batch, edits)
	}
	for _, e := range edits {
		b.replace(e, dirty)
	}
	revision := batch.Revision
	if !batch.Reset {
		revision = max(revision, b.snapshot.Revision)
	}
	return b.finish(revision, dirty)
}

// Changed returns how many keys were put or deleted by the last Apply or
// Restore; a key that a Reset found unchanged does not count.
func (b *Builder) Changed() int { return b.changed }

// Restore fills a new Builder from the last-good file. The next Reset is compared
// with that, so the rule about mass disappearance covers the time the node was
// away.
func (b *Builder) Restore(revision int64, keys []SavedKey) *Snapshot {
	b.changed = 0
	edits := map[string]*edit{}
	for _, k := range keys {
		service, name, ok := splitKey(k.Key)
		if !ok {
			continue
		}
		b.edit(edits, service).put(b.rules, Key{
			Name: name, Value: k.Value, Good: k.Good, HasGood: k.HasGood,
			CreateRevision: k.CreateRevision, ModRevision: k.ModRevision,
		})
		b.changed++
	}
	dirty := map[*entry]struct{}{}
	for _, e := range edits {
		e.read(b.rules)
		b.replace(e, dirty)
	}
	return b.finish(revision, dirty)
}

// edit is what a batch does to one service.
type edit struct {
	entry *entry
	keys  []Key // after the batch; no snapshot shares them
	gone  []Key // what the batch deletes, as it was
	after *parsed
	plain *parsed // without held keys, if there are any
}

// edits sorts a batch by service and leaves out what changes nothing.
func (b *Builder) edits(batch Batch) map[string]*edit {
	edits := map[string]*edit{}
	var present map[string]struct{}
	if batch.Reset {
		present = make(map[string]struct{}, len(batch.Keys))
	}
	for i := range batch.Keys {
		kv := &batch.Keys[i]
		service, name, ok := splitKey(kv.Key)
		if !ok {
			continue
		}
		if batch.Reset && !kv.Deleted {
			present[kv.Key] = struct{}{}
		}
		keys := b.keysOf(edits, service)
		at, found := find(keys, name)
		switch {
		case kv.Deleted && (!found || keys[at].Held):
		case kv.Deleted:
			b.edit(edits, service).remove(at)
			b.changed++
		case !found || !keys[at].same(kv):
			b.edit(edits, service).put(b.rules, newKey(name, kv))
			b.changed++
		}
	}
	if !batch.Reset {
		return edits
	}
	for service, e := range b.services {
		for _, k := range e.parsed.service.Keys {
			if _, ok := present[joinKey(service, k.Name)]; ok || k.Held {
				continue
			}
			ed := b.edit(edits, service)
			if at, found := find(ed.keys, k.Name); found {
				ed.remove(at)
				b.changed++
			}
		}
	}
	return edits
}

// keysOf returns the keys of a service as the batch has left them so far.
func (b *Builder) keysOf(edits map[string]*edit, service string) []Key {
	if ed := edits[service]; ed != nil {
		return ed.keys
	}
	if e := b.services[service]; e != nil {
		return e.parsed.service.Keys
	}
	return nil
}

// edit returns the edit of a service, a new one if need be.
func (b *Builder) edit(edits map[string]*edit, service string) *edit {
	ed := edits[service]
	if ed == nil {
		ed = &edit{entry: b.services[service]}
		if ed.entry == nil {
			ed.entry = &entry{name: strings.Clone(service)}
		} else {
			ed.keys = slices.Clone(ed.entry.parsed.service.Keys)
		}
		edits[ed.entry.name] = ed
	}
	return ed
}

func find(keys []Key, name string) (int, bool) {
	return slices.BinarySearchFunc(keys, name, func(k Key, name string) int { return strings.Compare(k.Name, name) })
}

func newKey(name string, kv *KeyValue) Key {
	return Key{Name: name, Value: kv.Value, CreateRevision: kv.CreateRevision, ModRevision: kv.ModRevision}
}

// same reports whether the store's kv is what k holds already.
func (k *Key) same(kv *KeyValue) bool {
	return !k.Held && k.ModRevision == kv.ModRevision && k.CreateRevision == kv.CreateRevision && k.Value == cut(kv.Value)
}

// cut bounds what an over-long value costs in memory; it stays over-long.
func cut(value string) string { return value[:min(len(value), maxOptions+1)] }

// put adds or replaces a key. If the new value is bad, the last good one stays
// with it.
func (ed *edit) put(r *rules, k Key) {
	at, found := find(ed.keys, k.Name)
	kind, _ := kindOf(k.Name)
	if short := cut(k.Value); len(short) < len(k.Value) {
		k.Value = strings.Clone(short)
	}
	valid := func(value string) bool { _, f := r.check(kind, value); return f == nil }
	switch {
	case valid(k.Value):
		k.Good, k.HasGood = "", false
	case k.HasGood && valid(k.Good): // from the last-good file
	case found && valid(ed.keys[at].Value):
		k.Good, k.HasGood = ed.keys[at].Value, true
	case found:
		k.Good, k.HasGood = ed.keys[at].Good, ed.keys[at].HasGood
	default:
		k.Good, k.HasGood = "", false
	}
	if found {
		k.Name = ed.keys[at].Name
		ed.keys[at] = k
		return
	}
	k.Name = strings.Clone(k.Name) // it is a part of the longer key
	ed.keys = slices.Insert(ed.keys, at, k)
}

func (ed *edit) remove(at int) {
	ed.gone = append(ed.gone, ed.keys[at])
	ed.keys = slices.Delete(ed.keys, at, at+1)
}

// read parses the service as it is after the batch. Held deletions are carried out
// as soon as the service has as many endpoints without the held keys as it had
// before the loss.
func (ed *edit) read(r *rules) {
	ed.keys = slices.Clone(ed.keys) // without spare room: it stays for long
	ed.after, ed.plain = r.parse(ed.entry.name, ed.keys), nil
	if !slices.ContainsFunc(ed.keys, func(k Key) bool { return k.Held }) {
		ed.entry.before = 0
		return
	}
	plain := r.parse(ed.entry.name, withoutHeld(ed.keys))
	if plain.endpoints() >= ed.entry.before {
		ed.after, ed.entry.before = plain, 0
		return
	}
	ed.plain = plain
}

// replace puts an edited service in the place of what it was.
func (b *Builder) replace(ed *edit, dirty map[*entry]struct{}) {
	e := ed.entry
	b.endpoints += ed.after.endpoints() - e.parsed.endpoints()
	if e.parsed.routable() {
		b.routable--
	}
	if ed.after.routable() {
		b.routable++
	}
	losing := 0
	if e.before > 0 {
		losing = max(0, e.before-ed.plain.endpoints())
	}
	b.updateHold(e, losing)
	e.losing = losing
	e.parsed = ed.after
	if e.parsed == nil {
		delete(b.services, e.name)
	} else {
		b.services[e.name] = e
	}
	dirty[e] = struct{}{}
}

// finish settles limits and claims and makes the snapshot.
func (b *Builder) finish(revision int64, dirty map[*entry]struct{}) *Snapshot {
	if len(dirty) > 0 {
		b.limitServices(dirty)
	}
	touched := make([]*entry, 0, len(dirty))
	for e := range dirty {
		touched = append(touched, e)
	}
	for _, e := range touched {
		b.enterClaims(e, dirty)
	}
	var changed map[string]*Service
	if len(dirty) > 0 {
		changed = make(map[string]*Service, len(dirty))
	}
	for e := range dirty {
		if e.parsed == nil {
			name := safeName(e.name, shownLength)
			changed[name] = nil
			continue
		}
		changed[e.parsed.service.Name] = b.resolve(e)
	}
	held := b.endHold()
	if len(changed) == 0 && revision == b.snapshot.Revision && held == b.snapshot.Held {
		return b.snapshot
	}
	b.snapshot = b.snapshot.with(revision, changed)
	b.snapshot.Held = held
	return b.snapshot
}

// limitServices finds out which services are too many: the newest ones.
func (b *Builder) limitServices(dirty map[*entry]struct{}) {
	if b.routable <= b.rules.MaxServices && b.excess == 0 {
		return
	}
	all := make([]*entry, 0, b.routable)
	for _, e := range b.services {
		if e.parsed.routable() {
			all = append(all, e)
		} else {
			e.excess = false
		}
	}
	slices.SortFunc(all, func(x, y *entry) int {
		return cmp.Or(cmp.Compare(x.parsed.created, y.parsed.created), strings.Compare(x.name, y.name))
	})
	for i, e := range all {
		if excess := i >= b.rules.MaxServices; excess != e.excess {
			e.excess = excess
			dirty[e] = struct{}{}
		}
	}
	b.excess = max(0, len(all)-b.rules.MaxServices)
}

// Saved yields every key of the snapshot for the last-good file. Services with
// an invalid name are left out, nothing of them is ever in force.
func (s *Snapshot) Saved() iter.Seq[SavedKey] {
	return func(yield func(SavedKey) bool) {
		for svc := range s.All() {
			if readName(svc.Name) != nil {
				continue
			}
			for _, k := range svc.Keys {
				saved := SavedKey{joinKey(svc.Name, k.Name), k.Value, k.Good, k.HasGood, k.CreateRevision, k.ModRevision}
				if !yield(saved) {
					return
				}
			}
		}
	}
}
