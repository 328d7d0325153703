package dns

import (
	"context"
	"errors"
	"log/slog"
	"net/netip"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/miekg/dns"
)

// behaviour is what a made-up upstream does: answer with rcode after a while,
// or fail.
type behaviour struct {
	after time.Duration
	rcode int
	fail  bool
	ttl   uint32
}

// upstreams stand for the network in tests of time.
type upstreams struct {
	mu    sync.Mutex // guards all
	do    map[string]behaviour
	asked []string
}

func (u *upstreams) set(addr string, b behaviour) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.do[addr] = b
}

// taken returns which upstreams were asked since the last call, in order.
func (u *upstreams) taken() string {
	u.mu.Lock()
	defer u.mu.Unlock()
	s := ""
	for _, a := range u.asked {
		s += a[len(a)-4 : len(a)-3]
	}
	u.asked = nil
	return s
}

func (u *upstreams) exchange(ctx context.Context, to netip.AddrPort, m *dns.Msg) (*dns.Msg, error) {
	u.mu.Lock()
	b := u.do[to.String()]
	u.asked = append(u.asked, to.String())
	u.mu.Unlock()
	select {
	case <-time.After(b.after):
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	if b.fail {
		return nil, errors.New("refused")
	}
	r := new(dns.Msg)
	r.SetRcode(m, b.rcode)
	if b.rcode == dns.RcodeSuccess {
		a := to.Addr().As4()
		r.Answer = []dns.RR{&dns.A{Hdr: dns.RR_Header{Name: m.Question[0].Name, Rrtype: dns.TypeA, Class: dns.ClassINET, Ttl: b.ttl}, A: a[:]}}
	}
	return r, nil
}

const up1, up2, up3 = "10.0.0.1:53", "10.0.0.2:53", "10.0.0.3:53"

// forwardTest runs f in a bubble of its own time with three upstreams that answer in
// 10 ms.
func forwardTest(t *testing.T, f func(t *testing.T, f *forwarder, ups *upstreams)) {
	synctest.Test(t, func(t *testing.T) {
		ups := &upstreams{do: map[string]behaviour{}}
		var addrs []netip.AddrPort
		for _, a := range []string{up1, up2, up3} {
			addrs = append(addrs, netip.MustParseAddrPort(a))
			ups.set(a, behaviour{after: 10 * time.Millisecond, ttl: 60})
		}
		fw := newForwarder(addrs, newCache(100), slog.New(slog.DiscardHandler))
		fw.exchange = ups.exchange
		f(t, fw, ups)
		fw.running.Wait()
	})
}

// resolve asks for x.test and returns the answer, "stale" before it if it is,
// and how long it took.
func resolve(t *testing.T, f *forwarder) (string, time.Duration) {
	t.Helper()
	start := time.Now()
	q := asked(t, "x.test", dns.TypeA)
	e := f.resolve(context.Background(), q)
	r := unpack(t, q.pack(e.reply(q, time.Now())))
	if len(r.Answer) == 0 {
		return dns.RcodeToString[r.Rcode], time.Since(start)
	}
	s := r.Answer[0].(*dns.A).A.String()
	if e.life > 0 && !time.Now().Before(e.expires()) {
		s = "stale " + s
	}
	return s, time.Since(start)
}

func expectResolve(t *testing.T, f *forwarder, answer string, took time.Duration) {
	t.Helper()
	if a, d := resolve(t, f); a != answer || d != took {
		t.Errorf("got %s after %s, want %s after %s", a, d, answer, took)
	}
}

func TestOrderAndFailover(t *testing.T) {
	forwardTest(t, func(t *testing.T, f *forwarder, ups *upstreams) {
		f.cache = newCache(-1)
		expectResolve(t, f, "10.0.0.1", 10*time.Millisecond)
		ups.set(up1, behaviour{fail: true})
		expectResolve(t, f, "10.0.0.2", 10*time.Millisecond)
		if got := ups.taken(); got != "112" {
			t.Errorf("asked %s", got)
		}
		// The broken one is asked last for a while.
		expectResolve(t, f, "10.0.0.2", 10*time.Millisecond)
		if got := ups.taken(); got != "2" {
			t.Errorf("asked %s", got)
		}
		// It comes back to its place when the while is over.
		ups.set(up1, behaviour{after: 10 * time.Millisecond, ttl: 60})
		time.Sleep(badFor)
		expectResolve(t, f, "10.0.0.1", 10*time.Millisecond)
		// A silent one costs nextAfter once, and is known by its own limit.
		ups.set(up1, behaviour{after: time.Hour})
		expectResolve(t, f, "10.0.0.2", nextAfter+10*time.Millisecond)
		time.Sleep(tryLimit)
		expectResolve(t, f, "10.0.0.2", 10*time.Millisecond)
		if n := f.failures.Load(); n != 2 {
			t.Errorf("%d failures", n)
		}
	})
}

func TestRefusalsAndFailure(t *testing.T) {
	forwardTest(t, func(t *testing.T, f *forwarder, ups *upstreams) {
		f.cache = newCache(-1)
		ups.set(up1, behaviour{rcode: dns.RcodeServerFailure})
		ups.set(up2, behaviour{rcode: dns.RcodeRefused})
		expectResolve(t, f, "10.0.0.3", 10*time.Millisecond)
		ups.set(up3, behaviour{fail: true})
		expectResolve(t, f, "REFUSED", 0)
		for _, u := range []string{up1, up2, up3} {
			ups.set(u, behaviour{after: time.Hour})
		}
		expectResolve(t, f, "SERVFAIL", 2*nextAfter+tryLimit)
	})
}

func TestFailuresAreKeptShortly(t *testing.T) {
	forwardTest(t, func(t *testing.T, f *forwarder, ups *upstreams) {
		for _, u := range []string{up1, up2, up3} {
			ups.set(u, behaviour{fail: true})
		}
		expectResolve(t, f, "SERVFAIL", 0)
		expectResolve(t, f, "SERVFAIL", 0)
		if got := ups.taken(); got != "123" {
			t.Errorf("asked %s", got)
		}
		ups.set(up2, behaviour{ttl: 60})
		time.Sleep(failureHold)
		expectResolve(t, f, "10.0.0.2", 0)
	})
}

func TestServeStale(t *testing.T) {
	forwardTest(t, func(t *testing.T, f *forwarder, ups *upstreams) {
		expectResolve(t, f, "10.0.0.1", 10*time.Millisecond)
		expectResolve(t, f, "10.0.0.1", 0)
		time.Sleep(60 * time.Second)
		// Expired, and nobody answers in time: the old one, and it is asked on.
		for _, u := range []string{up1, up2, up3} {
			ups.set(u, behaviour{after: 1900 * time.Millisecond, ttl: 60})
		}
		expectResolve(t, f, "stale 10.0.0.1", stalePatience)
		time.Sleep(200 * time.Millisecond)
		expectResolve(t, f, "10.0.0.1", 0) // the answer that came meanwhile

		// Everybody is broken: the old one at once, and not asked again for a while.
		time.Sleep(60 * time.Second)
		ups.taken()
		for _, u := range []string{up1, up2, up3} {
			ups.set(u, behaviour{fail: true})
		}
		expectResolve(t, f, "stale 10.0.0.1", 0)
		expectResolve(t, f, "stale 10.0.0.1", 0)
		if got := ups.taken(); got != "123" {
			t.Errorf("asked %s", got)
		}
		time.Sleep(staleHold)
		ups.set(up3, behaviour{ttl: 60})
		expectResolve(t, f, "10.0.0.3", 0)
		for _, u := range []string{up1, up2, up3} {
			ups.set(u, behaviour{fail: true})
		}
		time.Sleep(staleFor + 60*time.Second)
		expectResolve(t, f, "SERVFAIL", 0)
	})
}

func TestEqualQuestionsWaitTogether(t *testing.T) {
	forwardTest(t, func(t *testing.T, f *forwarder, ups *upstreams) {
		f.cache = newCache(-1)
		var all sync.WaitGroup
		for range 50 {
			all.Go(func() { expectResolve(t, f, "10.0.0.1", 10*time.Millisecond) })
		}
		all.Wait()
		if got := ups.taken(); got != "1" {
			t.Errorf("asked %s", got)
		}
	})
}

func TestFlightsAreLimited(t *testing.T) {
	forwardTest(t, func(t *testing.T, f *forwarder, _ *upstreams) {
		for len(f.flights) < maxFlights {
			f.flights[string(rune(len(f.flights)))] = nil
		}
		expectResolve(t, f, "SERVFAIL", 0)
	})
}
