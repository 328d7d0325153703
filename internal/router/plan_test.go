package router

import (
	"flag"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"flotilla/internal/catalog"
	"flotilla/internal/haproxy"
)

var update = flag.Bool("update", false, "rewrite testdata/*.plan; review the difference")

// TestGoldenPlans runs the scripts of testdata: "have" and "want" lines, "----",
// and the steps of the plan for the backend that the first line names.
func TestGoldenPlans(t *testing.T) {
	files, err := filepath.Glob("testdata/*.plan")
	if err != nil || len(files) == 0 {
		t.Fatalf("no plans: %v", err)
	}
	for _, path := range files {
		t.Run(strings.TrimSuffix(filepath.Base(path), ".plan"), func(t *testing.T) {
			text, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			in, expected, _ := strings.Cut(string(text), "----\n")
			var got strings.Builder
			for _, s := range goldenPlan(t, in) {
				if s.Reason == "" {
					t.Errorf("step without reason: %s", s)
				}
				fmt.Fprintln(&got, s)
			}
			if *update {
				if err := os.WriteFile(path, []byte(in+"----\n"+got.String()), 0o644); err != nil {
					t.Fatal(err)
				}
				return
			}
			if diff := cmp.Diff(expected, got.String()); diff != "" {
				t.Errorf("plan (-want +got):\n%s", diff)
			}
		})
	}
}

// goldenPlan reads lines such as
//
//	backend hl.1
//	have s1 10.0.0.1:80 100 ready
//	want 1 10.0.0.1:80 100 ready
func goldenPlan(t *testing.T, in string) []Step {
	t.Helper()
	var backend string
	have := map[string]haproxy.Server{}
	var want []wantedServer
	states := map[string]haproxy.ServerState{"ready": haproxy.Ready, "drain": haproxy.Drain, "maint": haproxy.Maint}
	for line := range strings.SplitSeq(in, "\n") {
		f := strings.Fields(line)
		if len(f) == 0 || f[0] == "#" {
			continue
		}
		if f[0] == "backend" {
			backend = f[1]
			continue
		}
		weight, err := strconv.Atoi(f[3])
		if err != nil {
			t.Fatal(err)
		}
		addr := netip.MustParseAddrPort(f[2])
		if f[0] == "have" {
			have[f[1]] = haproxy.Server{Name: f[1], Addr: addr, Weight: weight, State: states[f[4]]}
		} else {
			want = append(want, wantedServer{endpoint: f[1], addr: addr, weight: weight, state: states[f[4]], options: haproxy.ServerOptions{H2: slices.Contains(f, "h2")}})
		}
	}
	return planServers(backend, want, have)
}

var fixedTime = time.Unix(1_000_000, 0)

func genAddr(t *rapid.T) netip.AddrPort {
	return netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 0, 0, byte(rapid.IntRange(1, 4).Draw(t, "addr"))}), 80)
}

func genOptions(t *rapid.T) haproxy.ServerOptions {
	return haproxy.ServerOptions{H2: rapid.Bool().Draw(t, "h2"), MaxConn: rapid.SampledFrom([]int{0, 0, 7}).Draw(t, "maxconn")}
}

func genWant(t *rapid.T) []wantedServer {
	options := genOptions(t)
	seen := map[netip.AddrPort]bool{}
	var want []wantedServer
	for i := range rapid.IntRange(0, 4).Draw(t, "endpoints") {
		w := wantedServer{endpoint: fmt.Sprint(i), addr: genAddr(t), options: options, weight: rapid.SampledFrom([]int{0, 50, 100}).Draw(t, "weight"),
			state: rapid.SampledFrom([]haproxy.ServerState{haproxy.Ready, haproxy.Drain}).Draw(t, "state")}
		if !seen[w.addr] {
			seen[w.addr] = true
			want = append(want, w)
		}
	}
	return want
}

func genServers(t *rapid.T) map[string]haproxy.Server {
	have := map[string]haproxy.Server{}
	for i := range rapid.IntRange(0, 6).Draw(t, "servers") {
		name := haproxy.ServerName(i+1, genOptions(t))
		if rapid.IntRange(0, 9).Draw(t, "foreign") == 0 {
			name = "byhand" + fmt.Sprint(i)
		}
		have[name] = haproxy.Server{Name: name, Addr: genAddr(t), Weight: rapid.SampledFrom([]int{0, 50, 100}).Draw(t, "weight"),
			State: haproxy.ServerState(rapid.IntRange(0, 2).Draw(t, "state"))}
	}
	return have
}

// serving returns the addresses that take new requests.
func serving(servers map[string]haproxy.Server) []string {
	var addrs []string
	for _, s := range servers {
		if s.State == haproxy.Ready && s.Weight > 0 {
			addrs = append(addrs, s.Addr.String())
		}
	}
	slices.Sort(addrs)
	return slices.Compact(addrs)
}

// From any servers to any other: a plan leaves an empty plan and just what is
// wanted, and on the way nobody serves who neither did nor shall, and a backend
// that served and shall serve never stops.
func TestPlanServersConverges(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		want, have := genWant(t), genServers(t)
		const backend = "hls.1"
		s := newState()
		s.backends[backend] = maps.Clone(have)
		allowed := map[string]bool{}
		var shall []string
		for _, w := range want {
			allowed[w.addr.String()] = true
			if w.state == haproxy.Ready && w.weight > 0 {
				shall = append(shall, w.addr.String())
			}
		}
		slices.Sort(shall)
		before := serving(have)
		for _, a := range before {
			allowed[a] = true
		}
		for _, step := range order(planServers(backend, want, have)) {
			if step.Reason == "" {
				t.Fatalf("no reason: %s", step)
			}
			s.apply(step)
			for _, a := range serving(s.backends[backend]) {
				if !allowed[a] {
					t.Fatalf("%s serves in the middle, after %s", a, step)
				}
			}
			if len(before) > 0 && len(shall) > 0 && len(want) == len(shall) && len(serving(s.backends[backend])) == 0 {
				t.Fatalf("nobody serves after %s", step)
			}
		}
		if rest := planServers(backend, want, s.backends[backend]); len(rest) > 0 {
			t.Fatalf("the plan leaves %v", rest)
		}
		if got := serving(s.backends[backend]); !slices.Equal(got, shall) {
			t.Fatalf("serving %v, want %v", got, shall)
		}
	})
}

// genCatalog makes a few services that compete for names, domains and ports.
func genCatalog(t *rapid.T, b *catalog.Builder, revision int64) *catalog.Snapshot {
	batch := catalog.Batch{Revision: revision, Reset: true}
	for _, name := range []string{"a", "b", "C", "d"} {
		put := func(key, value string) {
			batch.Keys = append(batch.Keys, catalog.KeyValue{Key: catalog.Prefix + name + "/" + key, Value: value, CreateRevision: int64(rapid.IntRange(1, 9).Draw(t, "created")), ModRevision: revision})
		}
		if rapid.Bool().Draw(t, "scheme?") {
			put("scheme", rapid.SampledFrom([]string{"http", "tcp", "https", "http-and-https", "bad"}).Draw(t, "scheme"))
		}
		for i := range rapid.IntRange(0, 3).Draw(t, "hosts") {
			put(fmt.Sprintf("hosts/%d", i), genAddr(t).String())
		}
		if rapid.Bool().Draw(t, "port?") {
			put("host_port", rapid.SampledFrom([]string{"5001", "5002"}).Draw(t, "port"))
		}
		if rapid.IntRange(0, 3).Draw(t, "private?") == 0 {
			put("private", "")
		}
		if rapid.Bool().Draw(t, "domain?") {
			put("domains/1", rapid.SampledFrom([]string{"www.x.org", "*.x.org"}).Draw(t, "domain"))
		}
		if rapid.Bool().Draw(t, "options?") {
			put("options", rapid.SampledFrom([]string{`{"strip_path":true}`, `{"balance":"roundrobin"}`, `{"sticky":true,"retries":false}`, `{"h2c":true}`}).Draw(t, "options"))
		}
	}
	return b.Apply(batch)
}

// From any catalog to any other, over all services at once: a plan leaves an
// empty plan, and the routes are just those that the catalog asks for.
func TestPlanCatalogConverges(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		runtime := rapid.Bool().Draw(t, "backends at run time")
		have, slots := newState(), &slots{runtime: runtime}
		ports := &hostPorts{nftables: true}
		if !runtime {
			for _, class := range haproxy.Classes {
				for i := range 8 {
					have.backends[class.BackendName(fmt.Sprint(i+1))] = map[string]haproxy.Server{}
				}
			}
		}
		b := catalog.NewBuilder(catalog.Policy{})
		for round := range 4 {
			snapshot := genCatalog(t, b, int64(round+1))
			if rapid.Bool().Draw(t, "restarted") || round == 0 {
				slots.reset(have, runtime, fixedTime)
			}
			all := func() []Step {
				names := map[string]bool{}
				for svc := range snapshot.All() {
					names[svc.Name] = true
				}
				for service := range have.owned {
					names[service] = true
				}
				delete(names, nobody)
				v := view{snapshot: snapshot, have: have, slots: slots, ports: ports, sni: true}
				order := append(slices.Sorted(maps.Keys(names)), nobody)
				p := planServices(v, order)
				if again := planServices(v, order); !reflect.DeepEqual(p, again) {
					t.Fatalf("the same plan made twice differs:\n%v\n%v", p, again)
				}
				if len(p.reload) > 0 {
					t.Fatalf("the plan wants a reload: %v", p.reload)
				}
				for _, m := range p.moves {
					slots.apply(m, fixedTime)
				}
				return p.steps
			}
			for range 2 { // what nobody needs depends on what the services have
				for _, s := range all() {
					have.apply(s)
				}
			}
			if rest := all(); len(rest) > 0 {
				t.Fatalf("the plan leaves %v", rest)
			}
			wanted := map[entry]string{}
			for svc := range snapshot.All() {
				for e, route := range want(svc, offers{hostPort: svc.HostPort != 0, sni: true}).routes {
					wanted[e] = svc.Name
					if e.byDomain() {
						wanted[domainsSwitch] = nobody
					}
					value := have.routes[e]
					backend, service := haproxy.RouteOwner(value)
					if service != svc.Name {
						t.Fatalf("%v leads to %q, want service %s", e, value, svc.Name)
					}
					if route.Backend == haproxy.Redirect {
						continue
					}
					if got, shall := serving(have.backends[backend]), addresses(svc); !slices.Equal(got, shall) {
						t.Fatalf("service %s is served by %v, want %v", svc.Name, got, shall)
					}
				}
			}
			if len(wanted) != len(have.routes) {
				t.Fatalf("routes %v, want %v", have.routes, wanted)
			}
		}
	})
}

func addresses(svc *catalog.Service) []string {
	var addrs []string
	for _, e := range svc.Endpoints {
		addrs = append(addrs, e.Addr.String())
	}
	slices.Sort(addrs)
	return addrs
}
