package catalog

import (
	"fmt"
	"maps"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"
)

func TestNilSnapshotIsEmpty(t *testing.T) {
	var s *Snapshot
	if s.Len() != 0 || s.Service("web") != nil || s.Fold("web") != nil || len(s.Sorted()) != 0 || len(s.Diff(nil)) != 0 {
		t.Error("a nil snapshot has something in it")
	}
}

func snapshotOf(services map[string]*Service) *Snapshot {
	var s *Snapshot
	return s.with(1, services)
}

func TestFold(t *testing.T) {
	for _, tc := range []struct {
		name  string
		have  []Service
		query string
		want  string
	}{
		{"exact", []Service{{Name: "web", Scheme: HTTP}}, "web", "web"},
		{"other case", []Service{{Name: "Web", Scheme: HTTP}}, "wEB", "Web"},
		{"unknown", []Service{{Name: "Web", Scheme: HTTP}}, "api", ""},
		{"not the shadowed", []Service{{Name: "web", Scheme: HTTP, Shadowed: true}, {Name: "Web", Scheme: HTTP}}, "web", "Web"},
		{"public before private", []Service{{Name: "web", Scheme: HTTP, Private: true}, {Name: "Web", Scheme: HTTP}}, "web", "Web"},
		{"routable before not", []Service{{Name: "WEB"}, {Name: "Web", Scheme: TCP, Private: true}}, "WEB", "Web"},
		{"first by name", []Service{{Name: "web", Scheme: TCP, Private: true}, {Name: "WEB", Scheme: TCP, Private: true}}, "weB", "WEB"},
	} {
		services := map[string]*Service{}
		for _, s := range tc.have {
			services[s.Name] = &s
		}
		got := ""
		if s := snapshotOf(services).Fold(tc.query); s != nil {
			got = s.Name
		}
		if got != tc.want {
			t.Errorf("%s: Fold(%q) is %q, want %q", tc.name, tc.query, got, tc.want)
		}
	}
}

// Whatever sequence of changes made them, the difference of two snapshots is the
// difference of what they contain, and applying it to one gives the other.
func TestDiffEqualsNaiveComparison(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		name := rapid.SampledFrom([]string{"a", "b", "c", "A", "B", "web", "Web", "api", "db-1", "db_2"})
		history := []*Snapshot{nil}
		contents := []map[string]*Service{{}}
		n := int64(0)
		t.Repeat(map[string]func(*rapid.T){
			"change": func(t *rapid.T) {
				from := rapid.IntRange(0, len(history)-1).Draw(t, "from")
				changed := map[string]*Service{}
				content := maps.Clone(contents[from])
				for _, c := range rapid.SliceOfN(name, 0, 4).Draw(t, "names") {
					n++
					if rapid.Bool().Draw(t, "remove") {
						changed[c] = nil
						delete(content, c)
					} else {
						changed[c] = &Service{Name: c, Revision: n}
						content[c] = changed[c]
					}
				}
				history = append(history, history[from].with(n, changed))
				contents = append(contents, content)
			},
			"": func(t *rapid.T) {
				i := rapid.IntRange(0, len(history)-1).Draw(t, "i")
				j := rapid.IntRange(0, len(history)-1).Draw(t, "j")
				checkDiff(t, history[i], contents[i], history[j], contents[j])
			},
		})
	})
}

func checkDiff(t *rapid.T, was *Snapshot, wasIn map[string]*Service, is *Snapshot, isIn map[string]*Service) {
	if is.Len() != len(isIn) {
		t.Fatalf("Len is %d, want %d", is.Len(), len(isIn))
	}
	if got := maps.Collect(byName(is)); !maps.Equal(got, isIn) {
		t.Fatalf("All yields %v, want %v", got, isIn)
	}
	names := slices.Concat(slices.Collect(maps.Keys(wasIn)), slices.Collect(maps.Keys(isIn)))
	slices.SortFunc(names, compareNames)
	var want []Change
	for _, n := range slices.Compact(names) {
		if wasIn[n] != isIn[n] {
			want = append(want, Change{wasIn[n], isIn[n]})
		}
	}
	if d := cmp.Diff(want, is.Diff(was)); d != "" {
		t.Fatalf("Diff differs from the naive comparison:\n%s", d)
	}
}

func byName(s *Snapshot) func(yield func(string, *Service) bool) {
	return func(yield func(string, *Service) bool) {
		for svc := range s.All() {
			if !yield(svc.Name, svc) {
				return
			}
		}
	}
}

// One change of a large catalog is one pair in the difference: all other services
// are the same pointers.
func TestSnapshotsShareWhatDidNotChange(t *testing.T) {
	services := map[string]*Service{}
	for i := range 10_000 {
		name := fmt.Sprintf("svc-%d", i)
		services[name] = &Service{Name: name}
	}
	a := snapshotOf(services)
	b := a.with(2, map[string]*Service{"svc-7": {Name: "svc-7"}})
	if d := b.Diff(a); len(d) != 1 || d[0].Name() != "svc-7" || d[0].Old != services["svc-7"] {
		t.Errorf("Diff is %v", d)
	}
}
