package catalog

import (
	"iter"
	"maps"
	"slices"
	"strings"
)

// Snapshot is the whole catalog at one store revision. It is immutable and
// shares what did not change with the snapshot before it, so that making and
// comparing snapshots costs as much as the change, not as the catalog.
type Snapshot struct {
	Revision int64
	// Held describes a mass disappearance of endpoints that is held back until
	// it is confirmed or has lasted; nil otherwise. See Builder.
	Held   *Hold
	size   int
	shards [shardCount]*shard // nil: empty
}

// Hold is a change that removes suspiciously many endpoints at once and is
// therefore not in force yet.
type Hold struct {
	Revision int64 `json:"revision"` // store revision of the held change
	Removed  int   `json:"removed"`  // endpoints that would go
	Of       int   `json:"of"`       // endpoints that there are
}

// 256 shards: at 10,000 services a change copies about 40 map entries.
const shardCount = 256

type shard struct{ services map[string]*Service }

// shardOf puts names that differ only in case into one shard.
func shardOf(name string) int {
	h := uint32(2166136261)
	for i := range len(name) {
		c := name[i]
		if 'A' <= c && c <= 'Z' {
			c += 'a' - 'A'
		}
		h = (h ^ uint32(c)) * 16777619
	}
	return int(h % shardCount)
}

// Rev returns the revision of the store that the snapshot shows. A nil Snapshot
// is older than any.
func (s *Snapshot) Rev() int64 {
	if s == nil {
		return 0
	}
	return s.Revision
}

// Len returns the number of services, routable or not.
func (s *Snapshot) Len() int {
	if s == nil {
		return 0
	}
	return s.size
}

// Service returns the service of that name, or nil. A nil Snapshot is empty.
func (s *Snapshot) Service(name string) *Service {
	if s == nil {
		return nil
	}
	sh := s.shards[shardOf(name)]
	if sh == nil {
		return nil
	}
	return sh.services[name]
}

// Fold returns the service that is called name when case is ignored, as host
// names are, or nil. Of several it is the one that is public and holds the name;
// then a routable one, then the first by name.
func (s *Snapshot) Fold(name string) *Service {
	if s == nil {
		return nil
	}
	sh := s.shards[shardOf(name)]
	if sh == nil {
		return nil
	}
	if v := sh.services[name]; v != nil && foldRank(v) == 0 {
		return v
	}
	var best *Service
	for k, v := range sh.services {
		if strings.EqualFold(k, name) && !v.Shadowed && (best == nil || foldBefore(v, best)) {
			best = v
		}
	}
	return best
}

func foldRank(s *Service) int {
	switch {
	case !s.Routable():
		return 3
	case s.Shadowed:
		return 2
	case s.Private:
		return 1
	}
	return 0
}

func foldBefore(a, b *Service) bool {
	if ra, rb := foldRank(a), foldRank(b); ra != rb {
		return ra < rb
	}
	return a.Name < b.Name
}

// All yields every service in no particular order.
func (s *Snapshot) All() iter.Seq[*Service] {
	return func(yield func(*Service) bool) {
		if s == nil {
			return
		}
		for _, sh := range s.shards {
			if sh == nil {
				continue
			}
			for _, v := range sh.services {
				if !yield(v) {
					return
				}
			}
		}
	}
}

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

// Diff returns what changed from old to s, sorted by name. Either may be nil,
// which is the empty catalog. Its cost follows the number of changes when both
// come from one Builder.
func (s *Snapshot) Diff(old *Snapshot) []Change {
	var changes []Change
	for i := range shardCount {
		var was, is *shard
		if old != nil {
			was = old.shards[i]
		}
		if s != nil {
			is = s.shards[i]
		}
		if was == is {
			continue
		}
		changes = append(changes, diffShard(was, is)...)
	}
	slices.SortFunc(changes, func(a, b Change) int { return strings.Compare(a.Name(), b.Name()) })
	return changes
}

func diffShard(was, is *shard) []Change {
	var changes []Change
	if was != nil {
		for name, o := range was.services {
			var n *Service
			if is != nil {
				n = is.services[name]
			}
			if n != o {
				changes = append(changes, Change{Old: o, New: n})
			}
		}
	}
	if is != nil {
		for name, n := range is.services {
			if was == nil || was.services[name] == nil {
				changes = append(changes, Change{New: n})
			}
		}
	}
	return changes
}

// with returns a snapshot in which the given services are replaced; a nil
// service is removed.
func (s *Snapshot) with(revision int64, changed map[string]*Service) *Snapshot {
	next := &Snapshot{Revision: revision}
	if s != nil {
		next.shards, next.size = s.shards, s.size
	}
	var fresh [shardCount]bool
	for name, svc := range changed {
		i := shardOf(name)
		if !fresh[i] {
			fresh[i] = true
			copied := &shard{services: map[string]*Service{}}
			if old := next.shards[i]; old != nil {
				copied.services = maps.Clone(old.services)
			}
			next.shards[i] = copied
		}
		m := next.shards[i].services
		_, had := m[name]
		switch {
		case svc == nil && had:
			delete(m, name)
			next.size--
		case svc != nil:
			m[name] = svc
			if !had {
				next.size++
			}
		}
	}
	return next
}
