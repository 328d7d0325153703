package dns

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/miekg/dns"
)

const (
	tryLimit      = 2 * time.Second         // for one upstream to answer, TCP included
	resendAfter   = 600 * time.Millisecond  // of silence, a UDP packet is taken for lost
	nextAfter     = 500 * time.Millisecond  // of silence, the next upstream is asked as well
	badFor        = 10 * time.Second        // an upstream that was silent or broken is asked last
	stalePatience = 1800 * time.Millisecond // before an expired answer is given instead (RFC 8767)
	maxFlights    = 2 * maxForwards         // questions at upstreams, those that nobody waits for any more included
)

// forwarder answers from upstreams and the cache. Equal questions that are
// asked meanwhile wait for one answer, so that a loop of forwarders ends here.
type forwarder struct {
	upstreams []*upstream
	cache     *cache
	log       *slog.Logger
	exchange  func(ctx context.Context, to netip.AddrPort, m *dns.Msg) (*dns.Msg, error)
	failures  atomic.Uint64
	running   sync.WaitGroup

	mu      sync.Mutex // guards flights
	flights map[string]*flight
}

type upstream struct {
	addr     netip.AddrPort
	badUntil atomic.Pointer[time.Time] // nil: it works as far as we know
}

// flight is one question at the upstreams.
type flight struct {
	done chan struct{} // closed when e is set
	e    *entry
}

func newForwarder(upstreams []netip.AddrPort, c *cache, log *slog.Logger) *forwarder {
	f := &forwarder{cache: c, log: log, exchange: exchange, flights: map[string]*flight{}}
	for _, addr := range upstreams {
		f.upstreams = append(f.upstreams, &upstream{addr: addr})
	}
	return f
}

// resolve returns the answer to q, waiting for upstreams if need be. It is an
// expired one if they do not answer in time, and a failure if there is none.
func (f *forwarder) resolve(ctx context.Context, q *request) *entry {
	now := time.Now()
	key := q.key()
	old, s := f.cache.get(key, now)
	if s == fresh || s == held {
		return old
	}
	fl := f.join(ctx, key, q)
	if fl == nil {
		if old != nil {
			return old
		}
		return failure(now)
	}
	var impatient <-chan time.Time
	if old != nil {
		t := time.NewTimer(stalePatience)
		defer t.Stop()
		impatient = t.C
	}
	select {
	case <-fl.done:
		if fl.e.failed && old != nil {
			return old
		}
		return fl.e
	case <-impatient:
		return old
	}
}

// join returns the flight for key, taking off if there is none. It returns nil
// if there are too many.
func (f *forwarder) join(ctx context.Context, key string, q *request) *flight {
	f.mu.Lock()
	defer f.mu.Unlock()
	if fl := f.flights[key]; fl != nil {
		return fl
	}
	if len(f.flights) >= maxFlights {
		return nil
	}
	fl := &flight{done: make(chan struct{})}
	f.flights[key] = fl
	f.running.Go(func() {
		fl.e = f.fetch(ctx, q)
		f.cache.put(key, fl.e, time.Now())
		f.mu.Lock()
		delete(f.flights, key)
		f.mu.Unlock()
		close(fl.done)
	})
	return fl
}

// fetch asks the upstreams.
func (f *forwarder) fetch(ctx context.Context, q *request) *entry {
	m := &dns.Msg{}
	m.RecursionDesired = true
	m.CheckingDisabled = q.cd
	m.AuthenticatedData = true // tell us; who did not ask for it is not told
	m.Question = []dns.Question{q.question}
	m.SetEdns0(maxUDPAnswer, q.do)
	r := f.ask(ctx, m)
	if r == nil {
		return failure(time.Now())
	}
	e, err := newEntry(r, time.Now())
	if err != nil {
		return failure(time.Now())
	}
	e.failed = !usable(r)
	return e
}

// usable reports whether r says something about the name that was asked for.
func usable(r *dns.Msg) bool {
	return r.Rcode == dns.RcodeSuccess || r.Rcode == dns.RcodeNameError
}

// ask returns the first usable answer, or else the last refusal, or nil. The
// others are not called off: their answers tell which upstreams are well.
func (f *forwarder) ask(ctx context.Context, m *dns.Msg) *dns.Msg {
	order := f.order(time.Now())
	answers := make(chan *dns.Msg, len(order))
	turn := time.NewTimer(0)
	defer turn.Stop()
	var refusal *dns.Msg
	for started, open := 0, 0; started < len(order) || open > 0; {
		next := turn.C
		if started == len(order) {
			next = nil
		}
		select {
		case <-next:
			u := order[started]
			f.running.Go(func() { answers <- f.try(ctx, u, m.Copy()) })
			started, open = started+1, open+1
			turn.Reset(nextAfter)
		case r := <-answers:
			if r != nil && usable(r) {
				return r
			}
			if r != nil {
				refusal = r
			}
			open--
			turn.Reset(0)
		}
	}
	return refusal
}

// order returns the upstreams as they are to be asked: those that are well
// before the others.
func (f *forwarder) order(now time.Time) []*upstream {
	order := slices.Clone(f.upstreams)
	slices.SortStableFunc(order, func(a, b *upstream) int { return a.bad(now) - b.bad(now) })
	return order
}

func (u *upstream) bad(now time.Time) int {
	if t := u.badUntil.Load(); t != nil && now.Before(*t) {
		return 1
	}
	return 0
}

// try asks one upstream. It returns nil if there is no answer.
func (f *forwarder) try(ctx context.Context, u *upstream, m *dns.Msg) *dns.Msg {
	limited, cancel := context.WithTimeout(ctx, tryLimit)
	defer cancel()
	m.Id = dns.Id()
	r, err := f.exchange(limited, u.addr, m)
	if ctx.Err() != nil {
		return nil
	}
	if err != nil {
		f.failures.Add(1)
		until := time.Now().Add(badFor)
		if u.badUntil.Swap(&until) == nil {
			f.log.Warn("dns upstream does not answer", "upstream", u.addr, "err", err)
		}
		return nil
	}
	if u.badUntil.Swap(nil) != nil {
		f.log.Info("dns upstream answers again", "upstream", u.addr)
	}
	if !usable(r) {
		f.failures.Add(1)
	}
	return r
}

// exchange sends m to an upstream over UDP, again without EDNS if the upstream
// does not know that, and over TCP if the answer is truncated. A truncated
// answer is returned if TCP fails.
func exchange(ctx context.Context, to netip.AddrPort, m *dns.Msg) (*dns.Msg, error) {
	r, err := exchangeOver(ctx, "udp", to, m)
	if err == nil && (r.Rcode == dns.RcodeFormatError || r.Rcode == dns.RcodeNotImplemented || r.Rcode == dns.RcodeBadVers) {
		m.Extra = nil
		r, err = exchangeOver(ctx, "udp", to, m)
	}
	if err != nil || !r.Truncated {
		return r, err
	}
	if full, err := exchangeOver(ctx, "tcp", to, m); err == nil {
		return full, nil
	}
	return r, nil
}

// exchangeOver waits for the answer to m until ctx ends. Over UDP, whatever is
// not that answer is ignored: anybody may have sent it.
func exchangeOver(ctx context.Context, network string, to netip.AddrPort, m *dns.Msg) (*dns.Msg, error) {
	var d net.Dialer
	c, err := d.DialContext(ctx, network, to.String())
	if err != nil {
		return nil, err
	}
	conn := &dns.Conn{Conn: c, UDPSize: dns.MaxMsgSize}
	defer func() { _ = conn.Close() }()
	defer context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })()
	if err := conn.WriteMsg(m); err != nil {
		return nil, err
	}
	buf := make([]byte, dns.DefaultMsgSize)
	if network == "tcp" {
		buf = make([]byte, dns.MaxMsgSize)
	}
	for {
		if network == "udp" {
			_ = conn.SetReadDeadline(time.Now().Add(resendAfter))
		}
		n, err := conn.Read(buf)
		switch {
		case ctx.Err() != nil:
			return nil, fmt.Errorf("no answer over %s in time", network)
		case errors.Is(err, os.ErrDeadlineExceeded):
			if err := conn.WriteMsg(m); err != nil {
				return nil, err
			}
			continue
		case err != nil:
			return nil, err
		}
		r := new(dns.Msg)
		if r.Unpack(buf[:n]) == nil && answers(r, m) {
			return r, nil
		}
		if network == "tcp" {
			return nil, errors.New("an answer over tcp that is not one to the question")
		}
	}
}

// answers reports whether r is an answer to m. A refusal may leave out the
// question.
func answers(r, m *dns.Msg) bool {
	if !r.Response || r.Id != m.Id || r.Opcode != dns.OpcodeQuery {
		return false
	}
	if len(r.Question) == 0 {
		return r.Rcode != dns.RcodeSuccess && r.Rcode != dns.RcodeNameError
	}
	a, q := r.Question[0], m.Question[0]
	return len(r.Question) == 1 && a.Qtype == q.Qtype && a.Qclass == q.Qclass && strings.EqualFold(a.Name, q.Name)
}
