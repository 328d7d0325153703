package engine

import (
	"fmt"
	"maps"
	"math/bits"
	"slices"
	"strings"

	"flotilla/internal/unit"
)

// class is all units that ask the same of a machine's ID and metadata, and the
// machines that have it.
type class struct {
	key   string
	req   *unit.Requirements // of any of its units
	users int                // units
	fits  []uint64           // one bit per machine
	count int                // bits that are set
}

func (k *class) has(m *machine) bool {
	return m.index>>6 < len(k.fits) && k.fits[m.index>>6]&(1<<(m.index&63)) != 0
}

func (k *class) set(m *machine) {
	for m.index>>6 >= len(k.fits) {
		k.fits = append(k.fits, 0)
	}
	k.fits[m.index>>6] |= 1 << (m.index & 63)
	k.count++
}

func (k *class) clear(m *machine) {
	k.fits[m.index>>6] &^= 1 << (m.index & 63)
	k.count--
}

// each calls f with the index of each machine.
func (k *class) each(f func(index int)) {
	for i, word := range k.fits {
		for ; word != 0; word &= word - 1 {
			f(i<<6 + bits.TrailingZeros64(word))
		}
	}
}

// classes has all classes, and says which a machine may belong to and the other
// way round, so that neither is tried with all of the other.
type classes struct {
	all      map[string]*class
	byID     map[string]map[*class]struct{} // those with MachineID
	byPair   map[string]map[*class]struct{} // those with metadata, by the values of one key, as key=value
	rest     map[*class]struct{}
	machines []*machine                       // by index; nil where free
	free     []int                            // indexes
	ids      map[string]map[*machine]struct{} // by ID and by its first 8 characters
	pairs    map[string]map[*machine]struct{} // by key=value
}

func newClasses() *classes {
	return &classes{
		all: map[string]*class{}, byID: map[string]map[*class]struct{}{}, byPair: map[string]map[*class]struct{}{}, rest: map[*class]struct{}{},
		ids: map[string]map[*machine]struct{}{}, pairs: map[string]map[*machine]struct{}{},
	}
}

func insert[K, V comparable](m map[K]map[V]struct{}, k K, v V) {
	if m[k] == nil {
		m[k] = map[V]struct{}{}
	}
	m[k][v] = struct{}{}
}

func drop[K, V comparable](m map[K]map[V]struct{}, k K, v V) {
	if delete(m[k], v); len(m[k]) == 0 {
		delete(m, k)
	}
}

func classKey(r *unit.Requirements) string {
	if r.MachineID == "" && len(r.Metadata) == 0 && len(r.Where) == 0 {
		return ""
	}
	var b strings.Builder
	b.WriteString(r.MachineID)
	for _, key := range slices.Sorted(maps.Keys(r.Metadata)) {
		fmt.Fprintf(&b, "\x00%s=%q", key, r.Metadata[key])
	}
	for _, e := range r.Where {
		fmt.Fprintf(&b, "\x01%s", e)
	}
	return b.String()
}

// selectors returns by what the class is found: IDs or key=value.
func (k *class) selectors() (ids, pairs []string) {
	if k.req.MachineID != "" {
		return []string{k.req.MachineID}, nil
	}
	if len(k.req.Metadata) == 0 {
		return nil, nil
	}
	key := slices.Min(slices.Collect(maps.Keys(k.req.Metadata)))
	for _, value := range k.req.Metadata[key] {
		pairs = append(pairs, key+"="+value)
	}
	return nil, pairs
}

// join returns the class of a unit and counts the unit.
func (cs *classes) join(r *unit.Requirements) *class {
	key := classKey(r)
	k := cs.all[key]
	if k == nil {
		k = &class{key: key, req: r}
		cs.all[key] = k
		ids, pairs := k.selectors()
		try := func(machines map[*machine]struct{}) {
			for m := range machines {
				cs.try(k, m)
			}
		}
		for _, id := range ids {
			insert(cs.byID, id, k)
			try(cs.ids[id])
		}
		for _, pair := range pairs {
			insert(cs.byPair, pair, k)
			try(cs.pairs[pair])
		}
		if ids == nil && pairs == nil {
			cs.rest[k] = struct{}{}
			for _, m := range cs.machines {
				if m != nil && m.present {
					cs.try(k, m)
				}
			}
		}
	}
	k.users++
	return k
}

func (cs *classes) try(k *class, m *machine) {
	if !k.has(m) && k.req.Mismatch(m.id, m.metadata) == "" {
		k.set(m)
		m.classes[k] = struct{}{}
	}
}

// leave undoes join.
func (cs *classes) leave(k *class) {
	if k.users--; k.users > 0 {
		return
	}
	delete(cs.all, k.key)
	ids, pairs := k.selectors()
	for _, id := range ids {
		drop(cs.byID, id, k)
	}
	for _, pair := range pairs {
		drop(cs.byPair, pair, k)
	}
	delete(cs.rest, k)
	k.each(func(i int) { delete(cs.machines[i].classes, k) })
}

// enter gives a new machine an index.
func (cs *classes) enter(m *machine) {
	if n := len(cs.free); n > 0 {
		m.index, cs.free = cs.free[n-1], cs.free[:n-1]
		cs.machines[m.index] = m
		return
	}
	m.index = len(cs.machines)
	cs.machines = append(cs.machines, m)
}

// exit takes the index back from a machine that is in no class.
func (cs *classes) exit(m *machine) {
	cs.machines[m.index] = nil
	cs.free = append(cs.free, m.index)
}

// remove takes the machine out of all classes, before its metadata change or
// it goes.
func (cs *classes) remove(m *machine) {
	for k := range m.classes {
		k.clear(m)
	}
	clear(m.classes)
	drop(cs.ids, m.id, m)
	drop(cs.ids, short(m.id), m)
	for key, value := range m.metadata {
		drop(cs.pairs, key+"="+value, m)
	}
}

// sort puts a machine that is there into its classes.
func (cs *classes) sort(m *machine) {
	insert(cs.ids, m.id, m)
	insert(cs.ids, short(m.id), m)
	try := func(candidates map[*class]struct{}) {
		for k := range candidates {
			cs.try(k, m)
		}
	}
	try(cs.byID[m.id])
	try(cs.byID[short(m.id)])
	for key, value := range m.metadata {
		insert(cs.pairs, key+"="+value, m)
		try(cs.byPair[key+"="+value])
	}
	try(cs.rest)
}

// short is what a machine's ID may be shortened to in MachineID.
func short(id string) string { return id[:min(8, len(id))] }
