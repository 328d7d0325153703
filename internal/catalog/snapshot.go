package catalog

import (
	"cmp"
	"iter"
	"maps"
	"slices"
	"strings"
)

// Snapshot is the whole catalog at one store revision. It is immutable.
type Snapshot struct {
	Revision int64
	// Held describes a mass disappearance of endpoints that is held back until
	// it is confirmed or has lasted; nil otherwise. See Builder.
	Held *Hold
	// In the order of compareNames. A change copies the slice and nothing else:
	// 80 kB at 10,000 services, which is less than reading one service's keys.
	services []*Service
}

// Hold is a change that removes suspiciously many endpoints at once and is
// therefore not in force yet.
type Hold struct {
	Revision int64 `json:"revision"` // store revision of the held change
	Removed  int   `json:"removed"`  // endpoints that would go
	Of       int   `json:"of"`       // endpoints that there are
}

// Rev returns the revision of the store that the snapshot shows. A nil Snapshot
// is older than any.
func (s *Snapshot) Rev() int64 {
	if s == nil {
		return 0
	}
	return s.Revision
}

// all returns the services in order. A nil Snapshot is empty.
func (s *Snapshot) all() []*Service {
	if s == nil {
		return nil
	}
	return s.services
}

// compareNames puts names that differ only in case beside each other.
func compareNames(a, b string) int {
	return cmp.Or(compareFold(a, b), strings.Compare(a, b))
}

// compareFold compares names as host names are compared: the case of ASCII
// letters does not count.
func compareFold(a, b string) int {
	for i := range min(len(a), len(b)) {
		if c := cmp.Compare(lower(a[i]), lower(b[i])); c != 0 {
			return c
		}
	}
	return cmp.Compare(len(a), len(b))
}

func lower(c byte) byte {
	if 'A' <= c && c <= 'Z' {
		c += 'a' - 'A'
	}
	return c
}

func findService(services []*Service, name string) (int, bool) {
	return slices.BinarySearchFunc(services, name, func(s *Service, name string) int { return compareNames(s.Name, name) })
}

// Len returns the number of services, routable or not.
func (s *Snapshot) Len() int { return len(s.all()) }

// Service returns the service of that name, or nil.
func (s *Snapshot) Service(name string) *Service {
	at, found := findService(s.all(), name)
	if !found {
		return nil
	}
	return s.services[at]
}

// Fold returns the service that is called name when case is ignored, as host
// names are, or nil. Of several it is the one that is public and holds the name;
// then a routable one, then the first by name.
func (s *Snapshot) Fold(name string) *Service {
	services := s.all()
	at, _ := slices.BinarySearchFunc(services, name, func(s *Service, name string) int { return compareFold(s.Name, name) })
	var best *Service
	for _, v := range services[at:] {
		if compareFold(v.Name, name) != 0 {
			break
		}
		if !v.Shadowed && (best == nil || foldRank(v) < foldRank(best)) {
			best = v
		}
	}
	return best
}

func foldRank(s *Service) int {
	switch {
	case !s.Routable():
		return 2
	case s.Private:
		return 1
	}
	return 0
}

// All yields every service; those whose names differ only in case come one
// after the other.
func (s *Snapshot) All() iter.Seq[*Service] { return slices.Values(s.all()) }

// Sorted returns every service by name.
func (s *Snapshot) Sorted() []*Service {
	return slices.SortedFunc(s.All(), func(a, b *Service) int { return strings.Compare(a.Name, b.Name) })
}

// Change is one service that differs between two snapshots.
type Change struct {
	Old *Service // nil: the service is new
	New *Service // nil: the service is gone
}

// Name returns the changed service's name.
func (c Change) Name() string {
	if c.New != nil {
		return c.New.Name
	}
	return c.Old.Name
}

// Diff returns what changed from old to s, in the order of All. Either may be
// nil, which is the empty catalog. An unchanged service is the same pointer in
// both if they come from one Builder, so all but the changes costs one comparison
// of pointers each.
func (s *Snapshot) Diff(old *Snapshot) []Change {
	var changes []Change
	was, is := old.all(), s.all()
	for len(was) > 0 || len(is) > 0 {
		if len(was) > 0 && len(is) > 0 && was[0] == is[0] {
			was, is = was[1:], is[1:]
			continue
		}
		var c Change
		if len(is) == 0 || len(was) > 0 && compareNames(was[0].Name, is[0].Name) <= 0 {
			c.Old, was = was[0], was[1:]
		}
		if len(is) > 0 && (c.Old == nil || c.Old.Name == is[0].Name) {
			c.New, is = is[0], is[1:]
		}
		changes = append(changes, c)
	}
	return changes
}

// with returns a snapshot in which the given services are replaced; a nil
// service is removed.
func (s *Snapshot) with(revision int64, changed map[string]*Service) *Snapshot {
	rest := s.all()
	services := make([]*Service, 0, len(rest)+len(changed))
	for _, name := range slices.SortedFunc(maps.Keys(changed), compareNames) {
		at, found := findService(rest, name)
		services = append(services, rest[:at]...)
		rest = rest[at:]
		if found {
			rest = rest[1:]
		}
		if svc := changed[name]; svc != nil {
			services = append(services, svc)
		}
	}
	return &Snapshot{Revision: revision, services: append(services, rest...)}
}
