package router

import (
	"fmt"
	"maps"
	"net/http"
	"net/netip"
	"slices"
	"testing"
	"time"

	"flotilla/internal/haproxy"
)

// The connection to HAProxy is cut at every command that changes something, once
// before and once after it has had its effect. Each time the router reads what
// HAProxy runs and goes on from there: nothing is missing, nothing is there
// twice, and services that were not changed are served all the while.
func TestUnknownOutcomes(t *testing.T) {
	eachHAProxy(t, func(t *testing.T, binary string) {
		t.Parallel()
		cfg := testConfig(t, binary)
		p, tune := newTap(t, cfg)
		b := newBed(t, cfg, tune)
		one, two, three := endpoint(t, "one"), endpoint(t, "two"), endpoint(t, "three")
		b.put("fixed/scheme http", "fixed/hosts/1 "+three,
			"web/scheme http", "web/hosts/1 "+one, "web/hosts/2 "+one+"0", "old/scheme http", "old/hosts/1 "+one,
			"keep/scheme http", "keep/hosts/1 "+three, `keep/options {"sticky":true}`)
		b.wait()
		states := [][]string{
			{"web/hosts/1 " + one, "-web/hosts/3", "-web/domains/1", "old/scheme http", "old/hosts/1 " + one, "-new/scheme", "-new/hosts/1", "-keep/hosts/2"},
			{"web/hosts/1 " + two, "web/hosts/3 " + three, `web/meta/3 {"weight":0}`, "web/domains/1 www.web.example", "-old/scheme", "-old/hosts/1",
				"new/scheme http", "new/hosts/1 " + two, "keep/hosts/2 " + three},
		}
		check := func(when string, state int) {
			t.Helper()
			want := map[string]string{"fixed.x": "three", "keep.x": "three", "web.x": "one", "old.x": "one", "new.x": "404", "www.web.example": "404"}
			addrs := map[string]bool{one: true}
			if state == 1 {
				want = map[string]string{"fixed.x": "three", "keep.x": "three", "web.x": "two", "old.x": "404", "new.x": "two", "www.web.example": "two"}
				addrs = map[string]bool{two: true, three: true}
			}
			for host, name := range want {
				if got := b.answer(b.cfg.HTTPPort, host, "/"); got != name {
					t.Errorf("%s: %s: got %s, want %s", when, host, got, name)
				}
			}
			routes := haproxy.ParseMap(b.command("show map " + b.router.mapFile(haproxy.HTTPMap))[0].Text)
			backend, _ := haproxy.RouteOwner(routes["web"])
			servers, err := haproxy.ParseServers(b.command(haproxy.ServersState(backend))[0].Text)
			if err != nil {
				t.Fatal(err)
			}
			var active []string
			for _, s := range servers[backend] {
				if s.State != haproxy.Maint {
					active = append(active, s.Addr.String())
				}
			}
			slices.Sort(active)
			if wanted := slices.Sorted(maps.Keys(addrs)); !slices.Equal(active, wanted) {
				t.Errorf("%s: web has the servers %v, want %v", when, active, wanted)
			}
			if s := b.router.Status(); s.Err != "" || !s.Serving || len(s.Problems) > 0 || s.Reloads > 0 {
				t.Errorf("%s: status %+v", when, s)
			}
		}
		b.put("-web/hosts/2")
		b.wait()
		check("before", 0)
		pid, cuts := b.pid(), 0
		for _, effect := range []bool{false, true} {
			for n, state := 0, 1; ; n, state = n+1, 1-state {
				resyncs := b.router.Status().Resyncs
				p.arm(n, effect)
				b.put(states[state]...)
				b.wait()
				when := fmt.Sprintf("cut at change %d, effect %v", n, effect)
				check(when, state)
				if p.armed() {
					p.arm(-1, false)
					if state == 1 { // the longer way
						break
					}
					continue
				}
				cuts++
				if b.router.Status().Resyncs == resyncs {
					t.Errorf("%s: nothing was read again", when)
				}
				if t.Failed() {
					return
				}
			}
			b.put(states[0]...)
			b.wait()
			check("in between", 0)
		}
		if b.pid() != pid || cuts < 12 {
			t.Errorf("pid %d, want %d; %d cuts", b.pid(), pid, cuts)
		}
	})
}

// A backend that somebody removed by hand is made again.
func TestRemovedBackendIsMadeAgain(t *testing.T) {
	binaries := haproxies(t)
	newest := binaries[len(binaries)-1]
	if v := versionOf(t, newest); !v.MakesBackends() {
		t.Fatalf("%s is the newest HAProxy here: run test/haproxies.sh", v.Full)
	}
	b := newBed(t, testConfig(t, newest))
	one := endpoint(t, "one")
	b.put("web/scheme http", "web/hosts/1 "+one, "empty/scheme http")
	b.wait()
	for _, service := range []string{"web", "empty"} {
		commands := []string{"unpublish backend hl." + service}
		if service == "web" {
			commands = append(commands, "set server hl.web/s1 state maint", "del server hl.web/s1")
		}
		for _, a := range b.command(append(commands, "del backend hl."+service)...) {
			if a.Err() != nil {
				t.Fatalf("%v: %s", commands, a.Text)
			}
		}
	}
	b.router.hurryAudit()
	for host, want := range map[string]string{"web.x": "one", "empty.x": "503"} {
		b.eventuallyAnswers(host, want)
	}
	if got := b.answer(b.cfg.HTTPPort, "empty.x", "/"); got != "503" {
		t.Errorf("empty: %s", got)
	}
	b.put("empty/hosts/1 " + netip.MustParseAddrPort(one).String())
	b.wait()
	b.eventuallyAnswers("empty.x", "one")
}

// hurryRetire lets what retires and rests go on as if its time had come, n times.
func (b *bed) hurryRetire(n int) error {
	result := make(chan error, 1)
	b.router.requests <- func() {
		s := &b.router.slots
		for range n {
			for _, list := range []*[]retired{&s.retiring, &s.resting} {
				for i := range *list {
					(*list)[i].since = time.Time{}
				}
			}
			if err := b.router.retire(b.t.Context(), time.Now()); err != nil {
				result <- err
				return
			}
		}
		result <- nil
	}
	return <-result
}

// The connection is cut while the backend of a deleted service is taken away. The
// service comes back at once, and is served.
func TestServiceReturnsWhileItIsTakenAway(t *testing.T) {
	eachHAProxy(t, func(t *testing.T, binary string) {
		t.Parallel()
		cfg := testConfig(t, binary)
		p, tune := newTap(t, cfg)
		b := newBed(t, cfg, tune)
		one := endpoint(t, "one")
		b.put("fixed/scheme http", "fixed/hosts/1 "+one)
		b.wait()
		for n := range 6 {
			for _, effect := range []bool{false, true} {
				b.put("web/scheme http", "web/hosts/1 "+one)
				b.wait()
				b.put("-web/scheme", "-web/hosts/1")
				b.wait()
				p.arm(n, effect)
				if err := b.hurryRetire(2); err == nil != p.armed() {
					t.Errorf("cut at change %d, effect %v: %v", n, effect, err)
				}
				p.arm(-1, false)
				b.put("web/scheme http", "web/hosts/1 "+one)
				b.wait()
				for _, host := range []string{"web.x", "fixed.x"} {
					if got := b.answer(b.cfg.HTTPPort, host, "/"); got != "one" {
						t.Errorf("cut at change %d, effect %v: %s: got %s, want one", n, effect, host, got)
					}
				}
			}
		}
		if s := b.router.Status(); s.Err != "" || s.Reloads != 0 {
			t.Errorf("status %+v", s)
		}
	})
}

// Whatever becomes of the command, the balancer's check ends as it was asked for.
func TestDrainingWithUnknownOutcome(t *testing.T) {
	cfg := testConfig(t, haproxies(t)[0])
	p, tune := newTap(t, cfg)
	b := newBed(t, cfg, tune)
	b.put("web/scheme http", "web/hosts/1 "+endpoint(t, "one"))
	b.wait()
	for _, effect := range []bool{false, true} {
		for status, draining := range map[int]bool{http.StatusServiceUnavailable: true, http.StatusOK: false} {
			resyncs := b.router.Status().Resyncs
			p.arm(0, effect)
			if err := b.router.SetDraining(draining); err == nil {
				t.Errorf("draining %v: the cut is no error", draining)
			}
			eventually(t, func() string {
				if got, _, _ := b.get(b.cfg.BalancerPort, "x", "/"); got != status {
					return fmt.Sprintf("draining %v, effect %v: the check answers %d, want %d", draining, effect, got, status)
				}
				if s := b.router.Status(); s.Resyncs == resyncs {
					return fmt.Sprintf("draining %v, effect %v: not read again: %+v", draining, effect, s)
				}
				return ""
			})
		}
	}
}

func versionOf(t *testing.T, binary string) haproxy.Version {
	t.Helper()
	v, err := haproxy.BinaryVersion(t.Context(), binary)
	if err != nil {
		t.Fatal(err)
	}
	return v
}
