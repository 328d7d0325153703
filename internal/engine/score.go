package engine

import (
	"fmt"
	"slices"
	"strconv"
)

// score is how well a machine suits a unit; less is better, from the first
// field to the last, and then the machine's ID decides.
type score struct {
	instances int   // of its template that are on the machine
	shared    []int // for each key of SpreadOver: instances on machines with the same value
	load      int
}

// better reports whether a is better than b but for load.
func (a *score) better(b *score) bool {
	if a.instances != b.instances {
		return a.instances < b.instances
	}
	for i := range a.shared {
		if a.shared[i] != b.shared[i] {
			return a.shared[i] < b.shared[i]
		}
	}
	return false
}

// scorer finds the best machine for units during one Plan, in which the set of
// open machines does not change.
type scorer struct {
	c      *Cluster
	values map[string]map[string]struct{} // of a metadata key, among open machines
	scored score                          // reused
	list   []*machine                     // reused
}

func (s *scorer) score(u *unitState, m *machine) *score {
	s.scored.load = m.load
	s.scored.instances, s.scored.shared = 0, s.scored.shared[:0]
	if u.group != nil {
		s.scored.instances = u.group.on[m]
		for _, key := range u.req.SpreadOver {
			s.scored.shared = append(s.scored.shared, u.group.over[key][m.metadata[key]])
		}
	}
	return &s.scored
}

// best is a score that no machine can beat but for load.
func (s *scorer) best(u *unitState) score {
	if u.group == nil {
		return score{}
	}
	b := score{instances: u.group.least(s.c.present)}
	for _, key := range u.req.SpreadOver {
		if s.values[key] == nil {
			s.values[key] = map[string]struct{}{}
			for _, m := range s.c.order {
				s.values[key][m.metadata[key]] = struct{}{}
			}
		}
		least := -1
		for value := range s.values[key] {
			if n := u.group.over[key][value]; least < 0 || n < least {
				least = n
			}
		}
		b.shared = append(b.shared, max(0, least))
	}
	return b
}

// pick returns the machine that suits the unit best of those that take it, or
// nil, and why that one.
func (s *scorer) pick(u *unitState) (*machine, string) {
	c := s.c
	if u.class.count == 0 || c.rival(u, func(*unitState) bool { return true }) != nil {
		return nil, ""
	}
	candidates, reason := c.order, ""
	if len(u.req.MachineOf) > 0 {
		for _, name := range u.req.MachineOf {
			if v := c.units[name]; v == nil {
				return nil, ""
			} else if !c.isGlobal(v) {
				if v.at == nil {
					return nil, ""
				}
				candidates, reason = append(s.list[:0], v.at), "with "+name
				break
			}
		}
	} else if u.class.count <= 32 {
		s.list = s.list[:0]
		u.class.each(func(i int) {
			if m := c.classes.machines[i]; m.open {
				s.list = append(s.list, m)
			}
		})
		if slices.SortFunc(s.list, byLoad); u.class.count == 1 {
			reason = "the only machine that it is for"
		}
		candidates = s.list
	}
	best := s.best(u)
	var found *machine
	var has score
	for _, m := range candidates {
		if m == u.at || !u.class.has(m) || c.refuse(u, m).kind != fits {
			continue
		}
		sc := s.score(u, m)
		if found == nil || sc.better(&has) {
			found = m
			has = score{sc.instances, append(has.shared[:0], sc.shared...), sc.load}
			if !best.better(&has) {
				break
			}
		}
	}
	if found == nil {
		return nil, ""
	}
	if reason == "" {
		reason = "it has the " + has.text(u, found)
	}
	return found, reason
}

// text says what counted.
func (a *score) text(u *unitState, m *machine) string {
	load := "fewest units (" + strconv.Itoa(a.load) + ")"
	if u.group == nil {
		return load
	}
	text := fmt.Sprintf("fewest instances of %s (%d", u.group.template, a.instances)
	for i, key := range u.req.SpreadOver {
		if value := m.metadata[key]; value != "" {
			text += fmt.Sprintf(", %d with %s=%s", a.shared[i], key, value)
		}
	}
	return text + ") and the " + load
}
