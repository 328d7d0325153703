package catalog

import (
	"fmt"
	"maps"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"pgregory.net/rapid"
)

var noon = time.Date(2026, 1, 1, 12, 0, 0, 0, time.UTC)

// cluster writes batches the way a store would: revisions rise, a key that is
// put again keeps its create revision.
type cluster struct {
	builder  *Builder
	now      time.Time
	revision int64
	keys     map[string]KeyValue
}

func newCluster(p Policy) *cluster {
	return &cluster{builder: NewBuilder(p), now: noon, keys: map[string]KeyValue{}}
}

// apply applies one batch of "key=value" puts and "-key" deletions; a deletion
// ending in * is a prefix.
func (c *cluster) apply(changes ...string) *Snapshot {
	batch := Batch{Now: c.now}
	for _, change := range changes {
		c.revision++
		if prefix, ok := strings.CutPrefix(change, "-"); ok {
			prefix, many := strings.CutSuffix(prefix, "*")
			for _, k := range slices.Sorted(maps.Keys(c.keys)) {
				if k == Prefix+prefix || many && strings.HasPrefix(k, Prefix+prefix) {
					delete(c.keys, k)
					batch.Keys = append(batch.Keys, KeyValue{Key: k, ModRevision: c.revision, Deleted: true})
				}
			}
			continue
		}
		key, value, _ := strings.Cut(change, "=")
		batch.Keys = append(batch.Keys, c.put(Prefix+key, value))
	}
	batch.Revision = c.revision
	return c.builder.Apply(batch)
}

func (c *cluster) put(key, value string) KeyValue {
	kv := KeyValue{Key: key, Value: value, CreateRevision: c.revision, ModRevision: c.revision}
	if old, ok := c.keys[key]; ok {
		kv.CreateRevision = old.CreateRevision
	}
	c.keys[key] = kv
	return kv
}

// list returns everything in the store as a Reset batch.
func (c *cluster) list() Batch {
	b := Batch{Revision: c.revision, Reset: true, Now: c.now}
	for _, k := range slices.Sorted(maps.Keys(c.keys)) {
		b.Keys = append(b.Keys, c.keys[k])
	}
	return b
}

func (c *cluster) reset() *Snapshot { return c.builder.Apply(c.list()) }

// fill registers services web-0 ... with n endpoints each.
func (c *cluster) fill(services, n int) *Snapshot {
	var changes []string
	for s := range services {
		changes = append(changes, fmt.Sprintf("web-%d/scheme=http", s))
		for e := range n {
			changes = append(changes, fmt.Sprintf("web-%d/hosts/%d=10.0.%d.%d:80", s, e, s, e+1))
		}
	}
	return c.apply(changes...)
}

func total(s *Snapshot) int {
	n := 0
	for svc := range s.All() {
		if svc.Routable() {
			n += len(svc.Endpoints)
		}
	}
	return n
}

func TestLastGoodStaysInForce(t *testing.T) {
	c := newCluster(Policy{})
	c.apply("web/scheme=http", "web/hosts/1=10.0.0.1:80", "web/host_port=81")
	s := c.apply("web/scheme=hppt", "web/hosts/1=10.0.0.1", "web/host_port=no").Service("web")
	if s.Scheme != HTTP || endpointsOf(s) != "1=10.0.0.1:80" || s.HostPort != 81 {
		t.Errorf("last good values are not in force: %+v", s)
	}
	if len(s.Problems) != 3 || !strings.HasSuffix(s.Problems[1].Reason, "; the last good value stays in force: 10.0.0.1:80") {
		t.Errorf("problems are %+v", s.Problems)
	}
	if k := s.Keys[1]; k.Name != "hosts/1" || k.Value != "10.0.0.1" || k.Good != "10.0.0.1:80" || !k.HasGood {
		t.Errorf("key is %+v", k)
	}

	s = c.apply("web/hosts/1=still bad").Service("web")
	if endpointsOf(s) != "1=10.0.0.1:80" {
		t.Errorf("a second bad value forgets the last good one: %+v", s)
	}
	s = c.apply("web/hosts/1=10.0.0.2:80").Service("web")
	if endpointsOf(s) != "1=10.0.0.2:80" || s.Keys[1].HasGood || len(s.Problems) != 2 {
		t.Errorf("after the repair: %+v", s)
	}
	c.apply("-web/hosts/1")
	if s = c.apply("web/hosts/1=bad").Service("web"); len(s.Endpoints) != 0 {
		t.Errorf("a deleted key's value came back: %+v", s)
	}
	if s = c.apply("api/hosts/1=10.0.0.1:80", "api/hosts/1=bad", "api/scheme=tcp").Service("api"); endpointsOf(s) != "1=10.0.0.1:80" {
		t.Errorf("good and bad in one batch: %+v", s)
	}
}

func TestServiceComesAndGoes(t *testing.T) {
	c := newCluster(Policy{})
	if s := c.apply(); s.Len() != 0 || s.Revision != 0 {
		t.Errorf("an empty batch makes %+v", s)
	}
	first := c.apply("web/scheme=http", "web/hosts/1=10.0.0.1:80")
	if c.builder.Changed() != 2 {
		t.Errorf("changed %d, want 2", c.builder.Changed())
	}
	if again := c.apply(); again != first || c.builder.Changed() != 0 {
		t.Error("an empty batch makes a new snapshot")
	}
	if again := c.reset(); again != first || c.builder.Changed() != 0 {
		t.Errorf("a Reset to the same makes a new snapshot, %d keys changed", c.builder.Changed())
	}
	c.keys[Prefix+"web/hosts/2"] = KeyValue{Key: Prefix + "web/hosts/2", Value: "10.0.0.2:80", CreateRevision: 3, ModRevision: 3}
	delete(c.keys, Prefix+"web/hosts/1")
	if s := c.reset(); endpointsOf(s.Service("web")) != "2=10.0.0.2:80" || c.builder.Changed() != 2 || endpointsOf(first.Service("web")) != "1=10.0.0.1:80" {
		t.Errorf("after a Reset: %+v, changed %d", s.Service("web"), c.builder.Changed())
	}
	if s := c.apply("-web/*"); s.Len() != 0 || s.Service("web") != nil {
		t.Error("a deleted service is still there")
	}
	if s := c.apply("web/scheme=http", "-web/scheme"); s.Len() != 0 {
		t.Error("a service that came and went in one batch is there")
	}
	if s := c.builder.Apply(Batch{Revision: 1}); s.Revision != c.revision {
		t.Errorf("the revision went back to %d", s.Revision)
	}
	if s := c.builder.Apply(Batch{Revision: 1, Reset: true}); s.Revision != 1 {
		t.Errorf("after a Reset to revision 1 the revision is %d", s.Revision)
	}
}

func TestClaims(t *testing.T) {
	c := newCluster(Policy{})
	snap := c.apply("a/scheme=http", "Web/scheme=http", "web/scheme=http",
		"web/host_port=81", "a/host_port=81", "web/domains/1=x.example.com", "a/domains/7=X.example.com", "a/domains/8=a.example.com")
	a, web, upper := snap.Service("a"), snap.Service("web"), snap.Service("Web")
	if a.HostPort != 0 || web.HostPort != 81 {
		t.Errorf("port 81: a has %d, web has %d", a.HostPort, web.HostPort)
	}
	if !slices.Equal(web.Domains, []string{"x.example.com"}) || !slices.Equal(a.Domains, []string{"a.example.com"}) {
		t.Errorf("domains: a has %v, web has %v", a.Domains, web.Domains)
	}
	if !web.Shadowed || upper.Shadowed || snap.Fold("web") != upper {
		t.Errorf("shadowed: web %v, Web %v", web.Shadowed, upper.Shadowed)
	}
	want := []Problem{
		{"/services/a/domains/7", "x.example.com", "the domain x.example.com belongs to the service web, whose claim is older",
			"write another domain, or take this one back: etcdctl del /services/a/domains/7"},
		{"/services/a/host_port", "81", "port 81 belongs to the service web, whose claim is older",
			"write a port that no service uses (flotilla services list shows them): etcdctl put /services/a/host_port PORT"},
	}
	if d := cmp.Diff(want, a.Problems); d != "" {
		t.Error(d)
	}
	checkProblem(t, "name", web, "/services/web", "the name belongs to the service Web", "etcdctl del --prefix /services/web/")

	// When the winners give up, the losers are granted in the same snapshot.
	snap = c.apply("-web/host_port", "-web/domains/1", "Web/private=")
	a, web = snap.Service("a"), snap.Service("web")
	if a.HostPort != 81 || len(a.Domains) != 2 || len(a.Problems) != 0 || web.Shadowed || len(web.Problems) != 0 {
		t.Errorf("after the winners went: a %+v, web %+v", a, web)
	}
	// A younger claim takes nothing back.
	snap = c.apply("web/host_port=81", "-Web/private")
	if a := snap.Service("a"); a.HostPort != 81 || !snap.Service("web").Shadowed {
		t.Errorf("a %+v", a)
	}
	// An unroutable service claims nothing.
	snap = c.apply("-a/scheme")
	if snap.Service("a").HostPort != 0 || snap.Service("web").HostPort != 81 {
		t.Errorf("an unroutable service keeps its port")
	}
}

func TestServiceLimit(t *testing.T) {
	c := newCluster(Policy{MaxServices: 2})
	c.apply("b/scheme=tcp", "b/host_port=81", "c/scheme=http")
	a := c.apply("a/scheme=tcp", "a/host_port=82", "a/hosts/1=10.0.0.1:80", "nothing/x=y").Service("a")
	checkProblem(t, "limit", a, "/services/a", "there are more than 2 services", "flotilla services list")
	if a.Routable() || a.HostPort != 0 {
		t.Errorf("too many, and yet %+v", a)
	}
	if a = c.apply("-b/scheme").Service("a"); !a.Routable() || a.HostPort != 82 || len(a.Problems) != 0 {
		t.Errorf("there is room again: %+v", a)
	}
}

func TestMassDisappearanceIsHeld(t *testing.T) {
	c := newCluster(Policy{})
	before := c.fill(4, 5)
	held := c.apply("-web-0/*", "-web-1/*", "-web-2/*", "web-3/hosts/9=10.0.3.99:80")
	if held.Held == nil || *held.Held != (Hold{Revision: c.revision, Removed: 15, Of: 20}) {
		t.Fatalf("held is %+v", held.Held)
	}
	if total(held) != 21 || endpointsOf(held.Service("web-1")) != endpointsOf(before.Service("web-1")) {
		t.Errorf("%d endpoints in force, want 21", total(held))
	}
	if k := held.Service("web-1").Keys[0]; !k.Held {
		t.Errorf("key is not marked as held: %+v", k)
	}

	// Later batches apply; a Reset and a second deletion of what is held change nothing.
	c.now = noon.Add(9 * time.Minute)
	s := c.apply("web-1/hosts/x=10.0.1.77:80", "-web-3/hosts/0")
	if total(s) != 21 || s.Held.Removed != 15 {
		t.Errorf("%d endpoints, held %+v", total(s), s.Held)
	}
	if again := c.reset(); again.Held == nil || total(again) != 21 || c.builder.Changed() != 0 {
		t.Errorf("after a Reset %d endpoints, held %+v, changed %d", total(again), again.Held, c.builder.Changed())
	}
	// Endpoints that come back end the hold for their service.
	s = c.apply("web-0/scheme=http", "web-0/hosts/0=10.0.0.1:80", "web-0/hosts/1=10.0.0.2:80", "web-0/hosts/2=10.0.0.3:80", "web-0/hosts/3=10.0.0.4:80", "web-0/hosts/4=10.0.0.5:80")
	if s.Held == nil || s.Held.Removed != 10 || slices.ContainsFunc(s.Service("web-0").Keys, func(k Key) bool { return k.Held }) {
		t.Errorf("after web-0 came back: %+v", s.Held)
	}
	c.now = noon.Add(10 * time.Minute)
	s = c.apply()
	if s.Held != nil || total(s) != 10 || s.Len() != 3 || s.Service("web-1").Routable() {
		t.Errorf("after ten minutes: held %+v, %d endpoints, %d services", s.Held, total(s), s.Len())
	}
}

func TestMassDisappearanceConfirmed(t *testing.T) {
	c := newCluster(Policy{})
	c.fill(2, 10)
	if c.builder.Confirm(1000) {
		t.Error("confirmed although nothing is held")
	}
	s := c.apply("-*")
	if s.Held == nil || c.builder.Confirm(s.Held.Revision-1) {
		t.Fatalf("held is %+v, or an older revision confirmed it", s.Held)
	}
	if s = c.apply(); total(s) != 20 {
		t.Errorf("%d endpoints before the confirmation", total(s))
	}
	if !c.builder.Confirm(s.Held.Revision) {
		t.Error("the confirmation is refused")
	}
	if s = c.apply(); s.Held != nil || s.Len() != 0 {
		t.Errorf("after the confirmation: held %+v, %d services", s.Held, s.Len())
	}
}

func TestWhatIsNoMassDisappearance(t *testing.T) {
	for title, changes := range map[string][]string{
		"half":         {"-web-0/*", "-web-1/hosts/*"},
		"one service":  {"-web-0/*"},
		"few":          {"-web-0/hosts/0", "-web-1/hosts/0"},
		"replacement":  {"-web-0/hosts/*", "-web-1/hosts/*", "-web-2/hosts/0", "web-0/hosts/a=10.1.0.1:1", "web-0/hosts/b=10.1.0.1:2", "web-0/hosts/c=10.1.0.1:3", "web-0/hosts/d=10.1.0.1:4", "web-0/hosts/e=10.1.0.1:5"},
		"a new scheme": {"web-0/scheme=tcp", "web-1/scheme=tcp", "web-2/scheme=tcp", "web-3/scheme=tcp"},
	} {
		c := newCluster(Policy{})
		c.fill(4, 5)
		if s := c.apply(changes...); s.Held != nil {
			t.Errorf("%s: held %+v", title, s.Held)
		}
	}
	c := newCluster(Policy{})
	c.fill(1, 100)
	if s := c.apply("-*"); s.Held != nil || s.Len() != 0 {
		t.Error("one service alone may go at once")
	}
}

// Losing the scheme of every service takes their endpoints away as well.
func TestMassDisappearanceOfSchemes(t *testing.T) {
	c := newCluster(Policy{})
	c.fill(3, 5)
	s := c.apply("-web-0/scheme", "-web-1/scheme", "-web-2/scheme")
	if s.Held == nil || total(s) != 15 {
		t.Errorf("held %+v, %d endpoints", s.Held, total(s))
	}
	if s = c.apply("web-0/scheme=http", "web-1/scheme=http", "web-2/scheme=http"); s.Held != nil || total(s) != 15 {
		t.Errorf("after they came back: held %+v, %d endpoints", s.Held, total(s))
	}
}

// A held key that comes back and is then deleted like any other is gone.
func TestHeldKeyReturnsAndGoes(t *testing.T) {
	c := newCluster(Policy{})
	c.fill(2, 6)
	c.apply("-web-0/hosts/*", "-web-1/hosts/*")
	s := c.apply("web-0/hosts/0=10.0.0.1:80")
	if s.Held == nil || s.Held.Removed != 11 {
		t.Fatalf("held %+v", s.Held)
	}
	s = c.apply("-web-0/hosts/0")
	if s.Held.Removed != 12 || len(s.Service("web-0").Endpoints) != 5 {
		t.Errorf("held %+v, endpoints %s", s.Held, endpointsOf(s.Service("web-0")))
	}
}

func TestRestore(t *testing.T) {
	c := newCluster(Policy{})
	c.fill(4, 5)
	before := c.apply("web-0/hosts/0=bad", "web-1/notes=x", "web-2/scheme=bad", "a b/scheme=http")
	keys := saved(before)

	fresh := newCluster(Policy{})
	fresh.keys, fresh.revision = c.keys, c.revision
	restored := fresh.builder.Restore(before.Revision, keys)
	if restored.Revision != before.Revision || restored.Len() != before.Len()-1 || total(restored) != 20 {
		t.Errorf("restored %d services, %d endpoints at revision %d", restored.Len(), total(restored), restored.Revision)
	}
	for s := range restored.All() {
		if d := cmp.Diff(before.Service(s.Name), s, ignoreAddr); d != "" {
			t.Error(d)
		}
	}
	// The store has the same: only the service that is never saved is news.
	if fresh.reset(); fresh.builder.Changed() != 1 {
		t.Errorf("changed %d, want 1", fresh.builder.Changed())
	}
	// The store has lost most: held, though this node was away meanwhile.
	away := newCluster(Policy{})
	away.builder.Restore(before.Revision, keys)
	if s := away.builder.Apply(Batch{Revision: 900, Reset: true, Now: noon}); s.Held == nil || total(s) != 20 {
		t.Errorf("held %+v, %d endpoints", s.Held, total(s))
	}
	// A good value in the file is believed only if the policy allows it.
	bad := NewBuilder(Policy{}).Restore(1, []SavedKey{{Key: "/services/web/scheme", Value: "http"}, {Key: "elsewhere"},
		{Key: "/services/web/hosts/1", Value: "bad", Good: "127.0.0.1:80", HasGood: true}}).Service("web")
	if len(bad.Endpoints) != 0 || bad.Keys[0].HasGood {
		t.Errorf("restored against the policy: %+v", bad)
	}
}

var ignoreAddr = cmp.Options{cmpopts.EquateComparable(Endpoint{}), cmpopts.EquateEmpty()}

// Any sequence of batches gives the services that a fresh builder makes of the
// final keys with their last good values; and of all services that want the same
// thing, the one with the oldest claim has it.
func TestBatchesEqualRebuild(t *testing.T) {
	services := []string{"web", "Web", "WEB", "api", "10", "db"}
	keys := []string{"scheme", "host_port", "private", "hosts/1", "hosts/2", "domains/1", "domains/2", "options", "meta/1", "host/1", "x"}
	values := map[string][]string{
		"scheme": {"http", "tcp", "https", "bad"}, "host_port": {"80", "81", "0"}, "private": {""},
		"hosts/1": {"10.0.0.1:80", "10.0.0.2:80", "bad"}, "hosts/2": {"10.0.0.1:80", "10.0.0.3:80", ""},
		"domains/1": {"a.example.com", "b.example.com", "bad"}, "domains/2": {"A.example.com", "*.example.com"},
		"options": {`{"sticky":true}`, `{"x":1}`, "bad"}, "meta/1": {`{"drain":true}`, "bad"}, "host/1": {"10.0.0.1:80"}, "x": {"y"},
	}
	policy := Policy{MaxServices: 3}
	rapid.Check(t, func(t *rapid.T) {
		c := newCluster(policy)
		model := map[string]SavedKey{}
		var snap *Snapshot
		t.Repeat(map[string]func(*rapid.T){
			"batch": func(t *rapid.T) {
				var changes []string
				for range rapid.IntRange(0, 5).Draw(t, "n") {
					name := rapid.SampledFrom(keys).Draw(t, "key")
					key := rapid.SampledFrom(services).Draw(t, "service") + "/" + name
					if rapid.IntRange(0, 3).Draw(t, "delete") == 0 {
						changes = append(changes, "-"+key)
						delete(model, Prefix+key)
						continue
					}
					value := rapid.SampledFrom(values[name]).Draw(t, "value")
					changes = append(changes, key+"="+value)
					remember(model, Prefix+key, value, name)
				}
				snap = c.apply(changes...)
			},
			"reset": func(*rapid.T) { snap = c.reset() },
			"": func(t *rapid.T) {
				if snap == nil {
					return
				}
				var all []SavedKey
				for key, k := range model {
					k.CreateRevision, k.ModRevision = c.keys[key].CreateRevision, c.keys[key].ModRevision
					all = append(all, k)
				}
				naive := NewBuilder(policy).Restore(c.revision, all)
				if want, got := naive.Sorted(), snap.Sorted(); !reflect.DeepEqual(want, got) {
					t.Fatalf("the snapshot differs from a rebuild:\n%s", cmp.Diff(want, got, ignoreAddr))
				}
				checkClaims(t, snap)
				checkBooks(t, c.builder, snap)
			},
		})
	})
}

var plainRules = newRules(Policy{})

func remember(model map[string]SavedKey, key, value, name string) {
	k, kind := model[key], kind(0)
	kind, _ = kindOf(name)
	r := plainRules
	if _, f := r.check(kind, value); f == nil {
		k.Good, k.HasGood = "", false
	} else if _, had := model[key]; had {
		if _, f := r.check(kind, k.Value); f == nil {
			k.Good, k.HasGood = k.Value, true
		}
	}
	k.Key, k.Value = key, value
	model[key] = k
}

// checkClaims looks at the finished services only: nothing is held twice, and
// what nobody holds nobody wants.
func checkClaims(t *rapid.T, snap *Snapshot) {
	holders := map[string]*Service{}
	hold := func(what string, s *Service) {
		if other := holders[what]; other != nil {
			t.Fatalf("%s is held by %s and by %s", what, other.Name, s.Name)
		}
		holders[what] = s
	}
	for s := range snap.All() {
		if !s.Routable() {
			continue
		}
		if s.HostPort != 0 {
			hold(fmt.Sprint("port ", s.HostPort), s)
		}
		for _, d := range s.Domains {
			hold("domain "+d, s)
		}
		if !s.Private && !s.Shadowed {
			hold("name "+strings.ToLower(s.Name), s)
		}
	}
	for s := range snap.All() {
		if !s.Routable() {
			continue
		}
		wants := func(what, key string) {
			h := holders[what]
			if h == nil {
				t.Fatalf("%s wants %s, and nobody holds it", s.Name, what)
			}
			if h == s {
				return
			}
			mine, theirs := created(s, key), createdOf(h, what)
			if mine < theirs || mine == theirs && s.Name < h.Name {
				t.Fatalf("%s holds %s by revision %d, but %s wants it since %d", h.Name, what, theirs, s.Name, mine)
			}
			if !slices.ContainsFunc(s.Problems, func(p Problem) bool { return strings.Contains(p.Reason, "the service "+h.Name+",") }) {
				t.Fatalf("%s has no problem that names %s, the holder of %s: %+v", s.Name, h.Name, what, s.Problems)
			}
		}
		for what, key := range wanted(s) {
			wants(what, key)
		}
	}
}

// wanted reads a service's keys naively.
func wanted(s *Service) map[string]string {
	w := map[string]string{}
	if !s.Private {
		w["name "+strings.ToLower(s.Name)] = "scheme"
	}
	for _, k := range s.Keys {
		value := k.Value
		if k.HasGood {
			value = k.Good
		}
		kind, _ := kindOf(k.Name)
		set, f := plainRules.check(kind, value)
		switch {
		case f != nil:
		case kind == kindHostPort:
			w[fmt.Sprint("port ", set.port)] = k.Name
		case kind == kindDomain && !s.Private:
			what := "domain " + set.domain
			if old, ok := w[what]; !ok || created(s, k.Name) < created(s, old) {
				w[what] = k.Name
			}
		}
	}
	return w
}

func created(s *Service, key string) int64 {
	at, found := find(s.Keys, key)
	if !found {
		return -1
	}
	return s.Keys[at].CreateRevision
}

func createdOf(s *Service, what string) int64 { return created(s, wanted(s)[what]) }

// checkBooks compares the builder's running totals with a count.
func checkBooks(t *rapid.T, b *Builder, snap *Snapshot) {
	endpoints, routable := 0, 0
	for _, e := range b.services {
		endpoints += e.parsed.endpoints()
		if e.parsed.routable() {
			routable++
		}
	}
	if b.endpoints != endpoints || b.routable != routable || snap.Len() != len(b.services) {
		t.Fatalf("books: %d endpoints, %d routable, %d services; counted: %d, %d, %d", b.endpoints, b.routable, snap.Len(), endpoints, routable, len(b.services))
	}
}

// Whatever is deleted, restored and confirmed in whatever order: the totals stay
// right, without a hold the snapshot is what the store has, and what is held is
// marked so.
func TestHoldKeepsItsBooks(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		c := newCluster(Policy{})
		c.fill(4, 6)
		var snap *Snapshot
		t.Repeat(map[string]func(*rapid.T){
			"change": func(t *rapid.T) {
				var changes []string
				for range rapid.IntRange(1, 4).Draw(t, "n") {
					s := rapid.IntRange(0, 3).Draw(t, "service")
					e := rapid.IntRange(0, 5).Draw(t, "endpoint")
					changes = append(changes, rapid.SampledFrom([]string{
						fmt.Sprintf("-web-%d/*", s), fmt.Sprintf("-web-%d/hosts/*", s), fmt.Sprintf("-web-%d/scheme", s),
						fmt.Sprintf("web-%d/scheme=http", s), fmt.Sprintf("web-%d/hosts/%d=10.0.%d.%d:80", s, e, s, e+1), fmt.Sprintf("-web-%d/hosts/%d", s, e),
						fmt.Sprintf("web-%d/hosts/%d=bad", s, e),
					}).Draw(t, "change"))
				}
				snap = c.apply(changes...)
			},
			"reset": func(*rapid.T) { snap = c.reset() },
			"wait":  func(*rapid.T) { c.now = c.now.Add(4 * time.Minute); snap = c.apply() },
			"confirm": func(*rapid.T) {
				c.builder.Confirm(c.revision)
				snap = c.apply()
				if snap.Held != nil {
					t.Fatal("held after the confirmation")
				}
			},
			"": func(t *rapid.T) {
				if snap == nil {
					return
				}
				checkBooks(t, c.builder, snap)
				held, losing := map[string]bool{}, 0
				for s := range snap.All() {
					for _, k := range s.Keys {
						if _, ok := c.keys[joinKey(s.Name, k.Name)]; ok == k.Held {
							t.Fatalf("key %s: held is %v, in the store is %v", joinKey(s.Name, k.Name), k.Held, ok)
						}
						held[s.Name] = held[s.Name] || k.Held
					}
				}
				for _, e := range c.builder.services {
					losing += e.losing
					if held[e.name] != (e.before > 0) {
						t.Fatalf("%s: has held keys is %v, before is %d", e.name, held[e.name], e.before)
					}
				}
				if (snap.Held != nil) != slices.Contains(slices.Collect(maps.Values(held)), true) || snap.Held != nil && snap.Held.Removed != losing {
					t.Fatalf("held is %+v, services with held keys %v, losing %d", snap.Held, held, losing)
				}
				for key := range c.keys {
					service, name, _ := splitKey(key)
					if _, found := find(snap.Service(service).Keys, name); !found {
						t.Fatalf("%s is in the store and not in the snapshot", key)
					}
				}
			},
		})
	})
}
