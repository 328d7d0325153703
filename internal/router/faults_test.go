package router

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"flotilla/internal/child"
	"flotilla/internal/haproxy"
)

func (b *bed) command(commands ...string) []haproxy.Answer {
	b.t.Helper()
	c := haproxy.Client{Socket: filepath.Join(b.cfg.Dir, "admin.sock")}
	answers, err := c.Do(context.Background(), commands...)
	if err != nil {
		b.t.Fatal(err)
	}
	return answers
}

func (b *bed) eventuallyAnswers(host, want string) {
	b.t.Helper()
	eventually(b.t, func() string {
		if got := b.answer(b.cfg.HTTPPort, host, "/"); got != want {
			return fmt.Sprintf("%s: got %s, want %s; %+v", host, got, want, b.router.Status())
		}
		return ""
	})
}

// master returns the pid of HAProxy's master process.
func (b *bed) master() int {
	b.t.Helper()
	text, err := os.ReadFile(filepath.Join(b.cfg.Dir, "haproxy.pid"))
	if err != nil {
		b.t.Fatal(err)
	}
	var pid int
	if _, err := fmt.Sscan(string(text), &pid); err != nil {
		b.t.Fatal(err)
	}
	return pid
}

func (b *bed) pid() int { return b.router.Status().Pid }

func TestAdoptsARunningHAProxy(t *testing.T) {
	eachHAProxy(t, func(t *testing.T, binary string) {
		b := newBed(t, testConfig(t, binary))
		one, two := endpoint(t, "one"), endpoint(t, "two")
		b.put("web/scheme http", "web/hosts/1 "+one, "old/scheme http", "old/hosts/1 "+one)
		b.wait()
		pid := b.pid()
		b.halt(child.ErrLeave)
		if got := b.answer(b.cfg.HTTPPort, "web.x", "/"); got != "one" {
			t.Fatalf("without its node: %s", got)
		}
		b.put("web/hosts/1 "+two, "-old/scheme", "-old/hosts/1", "new/scheme http", "new/hosts/1 "+one)
		b.start()
		b.wait()
		for host, want := range map[string]string{"web.x": "two", "old.x": "404", "new.x": "one"} {
			if got := b.answer(b.cfg.HTTPPort, host, "/"); got != want {
				t.Errorf("%s: got %s, want %s", host, got, want)
			}
		}
		if s := b.router.Status(); s.Pid != pid || s.Reloads != 0 {
			t.Errorf("pid %d reloads %d, want the adopted %d and none", s.Pid, s.Reloads, pid)
		}
	})
}

func TestSettingsChangedWhileAwayAreReloaded(t *testing.T) {
	eachHAProxy(t, func(t *testing.T, binary string) {
		b := newBed(t, testConfig(t, binary))
		b.put("web/scheme http", "web/hosts/1 "+endpoint(t, "one"))
		b.wait()
		b.halt(child.ErrLeave)
		b.cfg.HTTPPort = 8081
		b.start()
		b.wait()
		b.eventuallyAnswers("web.x", "one")
		if s := b.router.Status(); s.Reloads != 1 {
			t.Errorf("%d reloads, want 1", s.Reloads)
		}
	})
}

func TestKilledHAProxyComesBackWithEverything(t *testing.T) {
	eachHAProxy(t, func(t *testing.T, binary string) {
		b := newBed(t, testConfig(t, binary))
		one, two := endpoint(t, "one"), endpoint(t, "two")
		b.put("web/scheme http", "web/hosts/1 "+one)
		b.wait()
		b.put("late/scheme http", "late/hosts/1 "+two, "gone/scheme http", "gone/hosts/1 "+two)
		b.wait()
		b.put("-gone/scheme", "-gone/hosts/1")
		b.wait()
		pid := b.pid()
		if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		eventually(t, func() string {
			if s := b.router.Status(); !s.Serving || s.Pid == pid {
				return fmt.Sprintf("not back: %+v", s)
			}
			return ""
		})
		b.put("web/hosts/2 " + two)
		b.wait()
		for host, want := range map[string]string{"late.x": "two", "gone.x": "404"} {
			if got := b.answer(b.cfg.HTTPPort, host, "/"); got != want {
				t.Errorf("%s: got %s, want %s", host, got, want)
			}
		}
	})
}

func TestFrozenHAProxyIsCaughtUp(t *testing.T) {
	b := newBed(t, testConfig(t, haproxies(t)[0]))
	one, two := endpoint(t, "one"), endpoint(t, "two")
	b.put("web/scheme http", "web/hosts/1 "+one)
	b.wait()
	if err := syscall.Kill(b.pid(), syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	b.put("web/hosts/1 " + two)
	eventually(t, func() string {
		if b.router.Status().Err == "" {
			return "the router does not notice"
		}
		return ""
	})
	if err := syscall.Kill(b.pid(), syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	b.wait()
	if got := b.answer(b.cfg.HTTPPort, "web.x", "/"); got != "two" {
		t.Errorf("got %s, want two", got)
	}
}

// The file equals the running state, whatever was changed at run time: a reload
// by somebody else changes nothing, and we go on with the new worker.
func TestReloadBySomebodyElse(t *testing.T) {
	eachHAProxy(t, func(t *testing.T, binary string) {
		b := newBed(t, testConfig(t, binary))
		one, two := endpoint(t, "one"), endpoint(t, "two")
		b.put("web/scheme http", "web/hosts/1 "+one)
		b.wait()
		b.put("web/hosts/1 "+two, "late/scheme http", "late/hosts/1 "+one, "late/host_port 7001", "secure/scheme https", "secure/hosts/1 "+one,
			"dom/scheme http", "dom/hosts/1 "+one, "dom/domains/1 *.dom.org", "dom/options {\"strip_path\":true}", "tls/scheme tcp", "tls/hosts/1 "+one)
		b.wait()
		eventually(t, func() string {
			text, err := os.ReadFile(filepath.Join(b.cfg.Dir, "haproxy.cfg"))
			if err != nil || !strings.Contains(string(text), two) || strings.Contains(string(text), "xx") {
				return fmt.Sprintf("the file lags: %v", err)
			}
			return ""
		})
		pid, drift := b.pid(), b.router.Status().Drift
		var asked time.Time
		eventually(t, func() string {
			if s := b.router.Status(); s.Pid == pid || !s.Serving {
				// 2.6 ignores the signal while it still starts from the last reload.
				if time.Since(asked) > 2*time.Second {
					asked = time.Now()
					if err := syscall.Kill(b.master(), syscall.SIGUSR2); err != nil {
						return err.Error()
					}
				}
				return fmt.Sprintf("the new worker is not noticed: %+v", s)
			}
			return ""
		})
		for host, want := range map[string]string{"web.x": "two", "late.x": "one", "a.dom.org": "one"} {
			if got := b.answer(b.cfg.HTTPPort, host, "/"); got != want {
				t.Errorf("%s: got %s, want %s", host, got, want)
			}
		}
		if s := b.router.Status(); s.Drift != drift {
			t.Errorf("the file differed from the running state: drift %d", s.Drift)
		}
		b.put("web/hosts/1 " + one)
		b.wait()
		if got := b.answer(b.cfg.HTTPPort, "web.x", "/"); got != "one" {
			t.Errorf("after the reload: got %s, want one", got)
		}
	})
}

func TestChangesByHandAreUndone(t *testing.T) {
	eachHAProxy(t, func(t *testing.T, binary string) {
		b := newBed(t, testConfig(t, binary))
		one, two := endpoint(t, "one"), endpoint(t, "two")
		b.put("web/scheme http", "web/hosts/1 "+one, "api/scheme http", "api/hosts/1 "+two, "api/domains/1 web.example.com")
		b.wait()
		routes := b.command("show map " + b.router.mapFile(haproxy.HTTPMap))
		backend, _ := haproxy.RouteOwner(haproxy.ParseMap(routes[0].Text)["web"])
		for _, byHand := range [][]string{
			{"set server " + backend + "/s1 state maint"},
			{"set map " + b.router.mapFile(haproxy.HTTPMap) + " web nowhere:web"},
			{"del map " + b.router.mapFile(haproxy.HTTPMap) + " web"},
			{"add map " + b.router.mapFile(haproxy.HTTPMap) + " intruder " + backend + ":intruder"},
			{"set server " + backend + "/s1 addr 127.0.0.1 port 1"},
			{"del map " + b.router.mapFile(haproxy.DomainsMap) + " " + haproxy.DomainsKey},
			{"set map " + b.router.mapFile(haproxy.DomainsMap) + " " + haproxy.DomainsKey + " no"},
			{"add map " + b.router.mapFile(haproxy.HTTPMap) + " intruder " + backend},
		} {
			b.command(byHand...)
			b.router.hurryAudit()
			eventually(t, func() string {
				if got := b.answer(b.cfg.HTTPPort, "web.x", "/"); got != "one" {
					return fmt.Sprintf("after %v: %s", byHand, got)
				}
				if got := b.answer(b.cfg.HTTPPort, "intruder.x", "/"); got != "404" {
					return fmt.Sprintf("after %v: intruder %s", byHand, got)
				}
				if got := b.answer(b.cfg.HTTPPort, "web.example.com", "/"); got != "two" {
					return fmt.Sprintf("after %v: custom domain %s", byHand, got)
				}
				return ""
			})
		}
	})
}

// hurryAudit makes the next ticks audit everything at once.
func (r *Router) hurryAudit() {
	done := make(chan struct{})
	r.requests <- func() {
		for r.audit = (auditor{}); ; {
			_ = r.auditSome(context.Background(), false)
			if len(r.audit.backends) == 0 && len(r.audit.maps) == 0 {
				break
			}
		}
		close(done)
	}
	<-done
}

func TestDrainingAnswersTheBalancer(t *testing.T) {
	eachHAProxy(t, func(t *testing.T, binary string) {
		b := newBed(t, testConfig(t, binary))
		b.put("web/scheme http", "web/hosts/1 "+endpoint(t, "one"))
		b.wait()
		check := func(want int) {
			t.Helper()
			if status, _, _ := b.get(b.cfg.BalancerPort, "x", "/"); status != want {
				t.Errorf("balancer check: %d, want %d", status, want)
			}
		}
		check(200)
		if err := b.router.SetDraining(true); err != nil {
			t.Fatal(err)
		}
		check(503)
		if got := b.answer(b.cfg.HTTPPort, "web.x", "/"); got != "one" {
			t.Errorf("draining node: %s, want it to go on serving", got)
		}
		b.halt(nil)
		b.start()
		b.wait()
		check(503)
		if err := b.router.SetDraining(false); err != nil {
			t.Fatal(err)
		}
		check(200)
	})
}

// More services than backends were declared for: the pool grows by reload, and
// nothing else does.
func TestPoolGrows(t *testing.T) {
	eachHAProxy(t, func(t *testing.T, binary string) {
		b := newBed(t, testConfig(t, binary))
		e := endpoint(t, "one")
		b.put("web/scheme http", "web/hosts/1 "+e)
		b.wait()
		var keys []string
		for i := range 40 {
			keys = append(keys, fmt.Sprintf("s%d/scheme http", i), fmt.Sprintf("s%d/hosts/1 %s", i, e), fmt.Sprintf(`s%d/options {"balance":"roundrobin"}`, i))
		}
		b.put(keys...)
		b.wait()
		for _, host := range []string{"web.x", "s0.x", "s39.x"} {
			if got := b.answer(b.cfg.HTTPPort, host, "/"); got != "one" {
				t.Errorf("%s: %s", host, got)
			}
		}
		want := uint64(1)
		if b.router.Status().FreeSlots == 0 { // backends are made at run time
			want = 0
		}
		if s := b.router.Status(); s.Reloads != want {
			t.Errorf("%d reloads (%s), want %d", s.Reloads, s.LastReload, want)
		}
	})
}
