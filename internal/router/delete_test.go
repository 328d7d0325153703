package router

import (
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"flotilla/internal/haproxy"
)

func TestSweeperWaits(t *testing.T) {
	server := func(state haproxy.ServerState) haproxy.Server {
		return haproxy.Server{Addr: netip.MustParseAddrPort("10.0.0.1:80"), State: state}
	}
	have := newState()
	have.backends["hl.1"] = map[string]haproxy.Server{"s1": server(haproxy.Ready), "s2": server(haproxy.Maint), "s3": server(haproxy.Drain)}
	have.backends["hl.2"] = map[string]haproxy.Server{"s1": server(haproxy.Maint)}
	var s sweeper
	look := func(second int, want ...serverID) {
		t.Helper()
		if got := s.look(have, fixedTime.Add(time.Duration(second)*time.Second), 30*time.Second); !slices.Equal(got, want) {
			t.Errorf("at %d s: %v, want %v", second, got, want)
		}
	}
	look(0)
	look(29)
	look(30, serverID{"hl.1", "s2"}, serverID{"hl.2", "s1"})
	have.backends["hl.1"]["s2"] = server(haproxy.Ready) // used again
	have.backends["hl.1"]["s3"] = server(haproxy.Maint)
	look(31, serverID{"hl.2", "s1"})
	have.backends["hl.1"]["s2"] = server(haproxy.Maint)
	delete(have.backends, "hl.2")
	look(60)
	look(61, serverID{"hl.1", "s3"})
	look(90, serverID{"hl.1", "s3"}, serverID{"hl.1", "s2"})
	for i := range 2 * sweepAtOnce {
		have.backends["hl.1"][fmt.Sprint("s", i+10)] = server(haproxy.Maint)
	}
	look(100, serverID{"hl.1", "s3"}, serverID{"hl.1", "s2"})
	if n := len(s.look(have, fixedTime.Add(time.Hour), 30*time.Second)); n != sweepAtOnce {
		t.Errorf("%d at once, want %d", n, sweepAtOnce)
	}
}

// Servers of endpoints that left are deleted where HAProxy does so safely, and
// kept for the next endpoint elsewhere. Their names can be used again.
func TestParkedServersAreDeleted(t *testing.T) {
	eachHAProxy(t, func(t *testing.T, binary string) {
		t.Parallel()
		cfg := testConfig(t, binary)
		p, tune := newTap(t, cfg)
		b := newBed(t, cfg, tune, func(r *Router) { r.slots.sweeper.after = 300 * time.Millisecond })
		one := endpoint(t, "one")
		b.put("web/scheme http", "web/hosts/1 "+one, "gone/scheme http", "gone/hosts/1 "+one)
		b.wait()
		deletes := versionOf(t, binary).DeletesServers()
		backend, _ := b.backendOf("web")
		count := func() (n int) {
			servers, err := haproxy.ParseServers(b.command(haproxy.ServersState(backend))[0].Text)
			if err != nil {
				t.Fatal(err)
			}
			return len(servers[backend])
		}
		for round := range 3 {
			var add, remove []string
			for i := range 5 {
				add = append(add, fmt.Sprintf("web/hosts/e%d %s", i, endpoint(t, "one")))
				remove = append(remove, fmt.Sprintf("-web/hosts/e%d", i))
			}
			b.put(add...)
			b.wait()
			for range 10 {
				b.answer(b.cfg.HTTPPort, "web.x", "/")
			}
			if n := count(); n != 6 {
				t.Errorf("round %d: %d servers, want 6", round, n)
			}
			b.put(remove...)
			b.wait()
			if !deletes {
				continue
			}
			eventually(t, func() string {
				if n := count(); n != 1 {
					return fmt.Sprintf("round %d: %d servers are left, want 1", round, n)
				}
				return ""
			})
		}
		if got := b.answer(b.cfg.HTTPPort, "web.x", "/"); got != "one" {
			t.Errorf("got %s, want one", got)
		}
		if s := b.router.Status(); s.Drift != 0 || s.Err != "" || s.Resyncs != 1 {
			t.Errorf("status %+v", s)
		}
		used := slices.ContainsFunc(p.seen(), func(c string) bool { return strings.HasPrefix(c, "del server ") })
		if used != deletes {
			t.Errorf("%s: del server used: %v, want %v", versionOf(t, binary).Full, used, deletes)
		}
	})
}

// TestDeadEndpointsDoNotCrash removes endpoints while requests wait to try them
// again: "del server" at that moment crashes HAProxy 2.6.
func TestDeadEndpointsDoNotCrash(t *testing.T) {
	eachHAProxy(t, func(t *testing.T, binary string) {
		t.Parallel()
		cfg := testConfig(t, binary)
		p, tune := newTap(t, cfg)
		b := newBed(t, cfg, tune, func(r *Router) { r.slots.sweeper.after = time.Millisecond })
		b.put("live/scheme http", "live/hosts/1 "+endpoint(t, "live"))
		b.wait()
		pid := b.pid()
		client := &http.Client{Timeout: 30 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}
		var asked sync.WaitGroup
		for round := range 15 {
			service := fmt.Sprintf("dead%d", round%3)
			b.put(service+"/scheme http", fmt.Sprintf("%s/hosts/1 127.0.0.1:%d", service, 1+round))
			b.wait()
			for range 8 {
				asked.Go(func() {
					req, err := http.NewRequest(http.MethodGet, b.url(b.cfg.HTTPPort), nil)
					if err != nil {
						t.Error(err)
						return
					}
					req.Host = service + ".x"
					if resp, err := client.Do(req); err == nil { // 503 or 404
						_ = resp.Body.Close()
						if resp.StatusCode == http.StatusOK {
							t.Errorf("%s is answered", service)
						}
					} else {
						t.Errorf("%s: %v", service, err)
					}
				})
			}
			backend, _ := b.backendOf(service)
			eventually(t, func() string {
				rows := haproxy.ParseStats(b.command("show stat " + backend + " 2 -1")[0].Text)
				if len(rows) != 1 || rows[0]["scur"] == "" || rows[0]["scur"] < "1" {
					return fmt.Sprintf("no request waits: %v", rows)
				}
				return ""
			})
			if round%3 == 2 {
				b.put("-"+service+"/hosts/1", "-"+service+"/scheme")
			} else {
				b.put("-" + service + "/hosts/1")
			}
			b.wait()
			swept := make(chan error, 1)
			b.router.requests <- func() { swept <- b.router.sweep(t.Context(), time.Now().Add(time.Hour)) }
			if err := <-swept; err != nil {
				t.Errorf("round %d: %v", round, err)
			}
		}
		asked.Wait()
		if got := b.answer(b.cfg.HTTPPort, "live.x", "/"); got != "live" {
			t.Errorf("live: %s", got)
		}
		if got := b.pid(); got != pid {
			t.Errorf("pid %d, want %d: HAProxy crashed", got, pid)
		}
		deletes := 0
		for _, c := range p.seen() {
			if strings.HasPrefix(c, "del server ") {
				deletes++
			}
		}
		if can := versionOf(t, binary).DeletesServers(); can != (deletes > 0) {
			t.Errorf("%d times del server on %s", deletes, versionOf(t, binary).Full)
		}
	})
}

// TestBackendsChangeHandsSafely makes and deletes services of a class with few
// backends while requests for them wait: for a connection, in a queue, to be tried
// again. A request is answered by its own service or not at all.
func TestBackendsChangeHandsSafely(t *testing.T) {
	eachHAProxy(t, func(t *testing.T, binary string) {
		t.Parallel()
		b := newBed(t, testConfig(t, binary))
		b.put("fixed/scheme http", "fixed/hosts/1 "+endpoint(t, "fixed"))
		b.wait()
		l := &load{}
		client := &http.Client{Timeout: 30 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}
		ask := func(service string) {
			l.wg.Go(func() {
				req, err := http.NewRequest(http.MethodGet, b.url(b.cfg.HTTPPort), nil)
				if err != nil {
					l.fail("%v", err)
					return
				}
				req.Host = service + ".x"
				l.sent.Add(1)
				resp, err := client.Do(req)
				if err != nil {
					l.fail("%s: %v", service, err)
					return
				}
				body, _ := io.ReadAll(resp.Body) // may be cut: its service is gone
				_ = resp.Body.Close()
				if resp.StatusCode == http.StatusOK && string(body) != service {
					l.fail("%s: answered by %s", service, body)
				}
			})
		}
		hands := map[string]map[string]bool{} // services that had a backend
		for round := range 8 {
			release := make(chan struct{})
			var put, remove, names []string
			for i := range 6 {
				name := fmt.Sprintf("r%dx%d", round, i)
				names = append(names, name)
				addr, options := "", `{"balance":"roundrobin"}`
				switch i {
				case 0: // refuses every connection
					addr = fmt.Sprintf("127.0.0.1:%d", 1+round)
				case 1, 2: // takes one at a time, and its time
					options = `{"balance":"roundrobin","max_connections":1}`
					addr = serve(t, func(w http.ResponseWriter, _ *http.Request) {
						select {
						case <-release:
						case <-time.After(3 * time.Second):
						}
						_, _ = io.WriteString(w, name)
					})
				default:
					addr = serve(t, func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, name) })
				}
				put = append(put, name+"/scheme http", name+"/hosts/1 "+addr, name+"/options "+options)
				remove = append(remove, "-"+name+"/scheme", "-"+name+"/hosts/1", "-"+name+"/options")
			}
			b.put(put...)
			b.wait()
			for _, name := range names {
				backend, _ := b.backendOf(name)
				if hands[backend] == nil {
					hands[backend] = map[string]bool{}
				}
				hands[backend][name] = true
				for range 5 {
					ask(name)
				}
			}
			eventually(t, func() string {
				backend, _ := b.backendOf(names[1])
				if rows := haproxy.ParseStats(b.command("show stat " + backend + " 2 -1")[0].Text); len(rows) != 1 || rows[0]["qcur"] == "0" {
					return fmt.Sprintf("nothing is queued: %v", rows)
				}
				return ""
			})
			b.put(remove...)
			b.wait()
			for _, name := range names {
				ask(name)
			}
			// As if half a minute had gone by, but for what HAProxy has in them.
			if err := b.hurryRetire(2); err != nil {
				t.Error(err)
			}
			close(release)
			if got := b.answer(b.cfg.HTTPPort, "fixed.x", "/"); got != "fixed" {
				t.Errorf("round %d: fixed: %s", round, got)
			}
		}
		l.wg.Wait()
		again := 0
		for _, services := range hands {
			if len(services) > 1 {
				again++
			}
		}
		t.Logf("%d requests, %d backends changed hands; %+v", l.sent.Load(), again, b.router.Status())
		if l.failed.Load() > 0 {
			t.Errorf("%d of %d requests went wrong; the first: %s", l.failed.Load(), l.sent.Load(), l.first)
		}
		if again == 0 && !versionOf(t, binary).MakesBackends() {
			t.Error("no backend was used again")
		}
	})
}

// Where servers cannot be deleted, a reload drops them when most are parked.
func TestManyParkedServersAreDroppedByAReload(t *testing.T) {
	eachHAProxy(t, func(t *testing.T, binary string) {
		if v, err := haproxy.BinaryVersion(t.Context(), binary); err != nil || v.DeletesServers() {
			return // it deletes them one by one, see TestParkedServersAreDeleted
		}
		dropParked(t, newBed(t, testConfig(t, binary)))
	})
}

func dropParked(t *testing.T, b *bed) {
	keys := []string{"web/scheme http"}
	for i := range 260 {
		keys = append(keys, fmt.Sprintf("web/hosts/%d 10.1.%d.%d:80", i, i/250, i%250+1))
	}
	b.put(keys...)
	b.wait()
	for i := range 5 { // each set of options is a set of servers
		b.put(fmt.Sprintf(`web/options {"max_connections":%d}`, i+1))
		b.wait()
	}
	eventually(t, func() string {
		if s := b.router.Status(); s.LastReload != "most servers are parked" {
			return fmt.Sprintf("no reload: %+v", s)
		}
		return ""
	})
	b.wait()
	if answer := b.command(haproxy.ServersState("")); strings.Count(answer[0].Text, "10.1.") != 260 {
		t.Errorf("%d servers are left, want 260", strings.Count(answer[0].Text, "10.1."))
	}
}
