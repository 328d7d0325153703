package engine

import (
	"path"
	"slices"
	"strings"
)

// pattern is one pattern of Conflicts or Replaces, with those who have it and
// those whose name it matches, wherever they are.
type pattern struct {
	text   string
	owners map[*unitState]struct{}
	names  map[*unitState]struct{}
}

// patterns finds the patterns that match a name, and the names that match a
// pattern, without trying each with each.
type patterns struct {
	exact map[string]*pattern            // those without wildcards
	globs map[string]map[string]*pattern // the others by the text before the first wildcard, then by text
}

func newPatterns() *patterns {
	return &patterns{exact: map[string]*pattern{}, globs: map[string]map[string]*pattern{}}
}

// literal returns what names that match must begin with, and whether that is
// the whole pattern.
func literal(text string) (prefix string, whole bool) {
	i := strings.IndexAny(text, `*?[\`)
	if i < 0 {
		return text, true
	}
	return text[:i], false
}

// own returns the pattern and makes u one of its owners. find gives all units
// whose name has a prefix.
func (ps *patterns) own(u *unitState, text string, find func(prefix string, whole bool) []*unitState) (p *pattern, isNew bool) {
	prefix, whole := literal(text)
	if whole {
		p = ps.exact[text]
	} else {
		p = ps.globs[prefix][text]
	}
	if p == nil {
		isNew = true
		p = &pattern{text: text, owners: map[*unitState]struct{}{}, names: map[*unitState]struct{}{}}
		if whole {
			ps.exact[text] = p
		} else {
			if ps.globs[prefix] == nil {
				ps.globs[prefix] = map[string]*pattern{}
			}
			ps.globs[prefix][text] = p
		}
		for _, v := range find(prefix, whole) {
			if p.matches(v.name) {
				p.names[v] = struct{}{}
			}
		}
	}
	p.owners[u] = struct{}{}
	return p, isNew
}

// disown ends that u is an owner, and reports whether it was the last.
func (ps *patterns) disown(u *unitState, p *pattern) (gone bool) {
	delete(p.owners, u)
	if len(p.owners) > 0 {
		return false
	}
	if prefix, whole := literal(p.text); whole {
		delete(ps.exact, p.text)
	} else if delete(ps.globs[prefix], p.text); len(ps.globs[prefix]) == 0 {
		delete(ps.globs, prefix)
	}
	return true
}

// matching returns the patterns that match the name of a new unit.
func (ps *patterns) matching(u *unitState) []*pattern {
	var found []*pattern
	if p := ps.exact[u.name]; p != nil {
		found = append(found, p)
	}
	if len(ps.globs) > 0 {
		for i := 0; i <= len(u.name); i++ {
			for _, p := range ps.globs[u.name[:i]] {
				if p.matches(u.name) {
					found = append(found, p)
				}
			}
		}
	}
	for _, p := range found {
		p.names[u] = struct{}{}
	}
	return found
}

func (p *pattern) matches(name string) bool {
	ok, err := path.Match(p.text, name)
	return ok && err == nil
}

// names is all units sorted by name, put in order when somebody asks.
type names struct {
	sorted []*unitState
	fresh  []*unitState // not yet sorted in
	gone   int          // of sorted: units that are no more
}

func (n *names) add(u *unitState) { n.fresh = append(n.fresh, u) }

func (n *names) remove(u *unitState) {
	u.gone = true
	n.gone++
}

func byName(a, b *unitState) int { return strings.Compare(a.name, b.name) }

// from returns the units whose name begins with prefix, some of which may be
// gone.
func (n *names) from(prefix string) []*unitState {
	if n.gone > len(n.sorted)/2 {
		gone := func(u *unitState) bool { return u.gone }
		n.sorted, n.fresh, n.gone = slices.DeleteFunc(n.sorted, gone), slices.DeleteFunc(n.fresh, gone), 0
	}
	if len(n.fresh) > 32 {
		n.sorted = append(n.sorted, n.fresh...)
		slices.SortFunc(n.sorted, byName)
	} else {
		for _, u := range n.fresh {
			i, _ := slices.BinarySearchFunc(n.sorted, u, byName)
			n.sorted = slices.Insert(n.sorted, i, u)
		}
	}
	n.fresh = nil
	first, _ := slices.BinarySearchFunc(n.sorted, prefix, func(u *unitState, p string) int { return strings.Compare(u.name, p) })
	last := first
	for last < len(n.sorted) && strings.HasPrefix(n.sorted[last].name, prefix) {
		last++
	}
	return n.sorted[first:last]
}
