package router

import (
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// swarm is a changing set of HTTP endpoints of several services. Each answers
// "service/number", so that an answer from the wrong service is noticed.
type swarm struct {
	t       *testing.T
	address netip.Addr
	next    int
	live    map[string][]member // by service
}

type member struct {
	name    string
	addr    string
	drained bool
	stop    func()
}

func (s *swarm) add(service string) member {
	s.t.Helper()
	l, err := net.Listen("tcp", netip.AddrPortFrom(s.address, 0).String())
	if err != nil {
		s.t.Fatal(err)
	}
	s.next++
	m := member{name: fmt.Sprint(s.next), addr: l.Addr().String()}
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		_, _ = io.WriteString(w, service+"/"+m.name)
	})}
	go func() { _ = server.Serve(l) }()
	m.stop = func() { _ = server.Close() }
	s.live[service] = append(s.live[service], m)
	return m
}

// load asks for random services until stop is closed and counts what goes wrong.
type load struct {
	sent, failed atomic.Int64
	mu           sync.Mutex // guards first
	first        string     // the first failure
	wg           sync.WaitGroup
}

func (l *load) fail(format string, args ...any) {
	l.failed.Add(1)
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.first == "" {
		l.first = fmt.Sprintf(format, args...)
	}
}

func (l *load) run(url string, services []string, keepAlive bool, stop <-chan struct{}) {
	l.wg.Go(func() {
		// No retries of its own: a request on a connection that was closed under
		// it counts as failed, unless the router said that it would close.
		transport := &http.Transport{DisableKeepAlives: !keepAlive, MaxIdleConnsPerHost: 1}
		client := &http.Client{Transport: transport, Timeout: 10 * time.Second}
		defer transport.CloseIdleConnections()
		for {
			select {
			case <-stop:
				return
			default:
			}
			service := services[rand.IntN(len(services))]
			req, err := http.NewRequest(http.MethodPost, url, http.NoBody) // a POST is not tried again by the client
			if err != nil {
				l.fail("%v", err)
				return
			}
			req.Host = service + ".example.com"
			l.sent.Add(1)
			resp, err := client.Do(req)
			if err != nil {
				l.fail("%s: %v", service, err)
				continue
			}
			body, err := io.ReadAll(resp.Body)
			_ = resp.Body.Close()
			switch {
			case err != nil:
				l.fail("%s: %v", service, err)
			case resp.StatusCode != http.StatusOK:
				l.fail("%s: %d %.100s", service, resp.StatusCode, body)
			case len(body) <= len(service) || string(body[:len(service)+1]) != service+"/":
				l.fail("%s: answered by %s", service, body)
			}
		}
	})
}

// Endpoints are added, drained and removed at 100/s under load, parked servers
// are used again, services move between classes of backends and HAProxy is
// reloaded: no request is lost, and none reaches another service.
func TestNoRequestIsLostUnderChurn(t *testing.T) {
	eachHAProxy(t, func(t *testing.T, binary string) {
		b := newBed(t, testConfig(t, binary))
		s := &swarm{t: t, address: netip.MustParseAddr("127.0.0.1"), live: map[string][]member{}}
		services := []string{"a", "b", "c", "d", "e"}
		var keys []string
		for _, name := range services {
			keys = append(keys, name+"/scheme http")
			for range 3 {
				m := s.add(name)
				keys = append(keys, fmt.Sprintf("%s/hosts/%s %s", name, m.name, m.addr))
			}
		}
		b.put(keys...)
		b.wait()

		stop := make(chan struct{})
		l := &load{}
		for i := range 8 {
			l.run(b.url(b.cfg.HTTPPort), services, i%2 == 0, stop)
		}
		// A listener closes only after every router (here: one) has applied the
		// removal, and a moment more for requests on their way: the rule that
		// drains follow.
		const moment = 300 * time.Millisecond
		type closing struct {
			revision int64
			applied  time.Time // when the removal was seen to be applied
			m        member
		}
		var closings []closing
		changes := 0
		tick := time.NewTicker(10 * time.Millisecond)
		defer tick.Stop()
		for end := time.Now().Add(6 * time.Second); time.Now().Before(end); changes++ {
			<-tick.C
			name := services[rand.IntN(len(services))]
			live := s.live[name]
			switch n := rand.IntN(20); {
			case n == 0 && changes%150 != 0: // another class of backends
				b.put(name + `/options {"balance":"` + []string{"roundrobin", "leastconn"}[rand.IntN(2)] + `"}`)
			case changes%150 == 0: // structure: a reload
				b.put(fmt.Sprintf("%s/host_port %d", name, 7000+changes))
			case len(live) < 3 || n < 10 && len(live) < 6:
				m := s.add(name)
				b.put(fmt.Sprintf("%s/hosts/%s %s", name, m.name, m.addr))
			case n < 13 && !live[1].drained && !live[2].drained: // drained first, removed later
				live[0].drained = true
				b.put(fmt.Sprintf(`%s/meta/%s {"drain":true}`, name, live[0].name))
			default:
				m := live[0]
				s.live[name] = live[1:]
				b.put("-"+name+"/hosts/"+m.name, "-"+name+"/meta/"+m.name)
				closings = append(closings, closing{revision: b.revision, m: m})
			}
			applied, _ := b.router.Applied()
			for i := range closings {
				if closings[i].applied.IsZero() && closings[i].revision <= applied {
					closings[i].applied = time.Now()
				}
			}
			for len(closings) > 0 && !closings[0].applied.IsZero() && time.Since(closings[0].applied) > moment {
				closings[0].m.stop()
				closings = closings[1:]
			}
		}
		b.wait()
		close(stop)
		l.wg.Wait()
		t.Logf("%d requests, %d failed, %d changes, status %+v", l.sent.Load(), l.failed.Load(), changes, b.router.Status())
		if l.failed.Load() > 0 {
			t.Errorf("%d of %d requests failed; the first: %s", l.failed.Load(), l.sent.Load(), l.first)
		}
		if l.sent.Load() < 1000 || changes < 200 {
			t.Errorf("only %d requests and %d changes", l.sent.Load(), changes)
		}
		for _, members := range s.live {
			for _, m := range members {
				m.stop()
			}
		}
	})
}
