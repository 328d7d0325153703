package dns

import (
	"strings"
	"sync"
	"time"

	"github.com/miekg/dns"
)

const (
	maxTTL         = 24 * 3600 // seconds an answer is kept at most
	maxNegativeTTL = 3600      // seconds the absence of a name or record is kept at most
	staleTTL       = 30        // seconds given with an expired answer
	staleFor       = time.Hour // after expiry an answer may still be given
	staleHold      = 30 * time.Second
	failureHold    = time.Second // a failure is kept, so that retries do not reach dead upstreams
	maxKept        = 8 << 10     // bytes; larger answers are not kept
)

// entry is an upstream's answer, ready to be given to anyone who asks the same.
// It is immutable.
type entry struct {
	msg     *dns.Msg // rcode, AD, TC and records without OPT; the rest is not used
	failed  bool     // stands for upstreams that failed
	life    uint32   // seconds that it may be kept; 0: only for those who wait for it
	fetched time.Time
}

// newEntry makes an entry of r, whose records it keeps. It fails if r cannot be put
// in wire form.
func newEntry(r *dns.Msg, now time.Time) (*entry, error) {
	m := &dns.Msg{Compress: true, Answer: r.Answer, Ns: r.Ns}
	m.Rcode, m.AuthenticatedData, m.Truncated = r.Rcode&0xf, r.AuthenticatedData, r.Truncated
	for _, rr := range r.Extra {
		if t := rr.Header().Rrtype; t != dns.TypeOPT && t != dns.TypeTSIG {
			m.Extra = append(m.Extra, rr)
		}
	}
	e := &entry{msg: m, life: lifetime(r.Rcode, m), fetched: now}
	wire, err := m.Pack()
	if err != nil {
		return nil, err
	}
	if err := new(dns.Msg).Unpack(wire); err != nil {
		return nil, err // a record that came without its data
	}
	if m.Truncated || len(wire) > maxKept {
		e.life = 0
	}
	return e, nil
}

// lifetime returns how many seconds an answer may be kept, and lowers the TTL
// of each record of m to what is allowed for it.
func lifetime(rcode int, m *dns.Msg) uint32 {
	limit := uint32(maxTTL)
	if len(m.Answer) == 0 || rcode != dns.RcodeSuccess {
		negative := false
		for _, rr := range m.Ns {
			if soa, ok := rr.(*dns.SOA); ok {
				negative = true
				limit = min(soa.Hdr.Ttl, soa.Minttl, maxNegativeTTL)
			}
		}
		if !negative {
			limit = 0 // a referral, or a denial that does not say for how long
		}
	}
	life := limit
	for _, section := range [][]dns.RR{m.Answer, m.Ns, m.Extra} {
		for _, rr := range section {
			h := rr.Header()
			if h.Ttl > 1<<31-1 {
				h.Ttl = 0 // RFC 2181, section 8
			}
			if limit > 0 {
				h.Ttl = min(h.Ttl, limit)
			}
			life = min(life, h.Ttl)
		}
	}
	return life
}

// failure is the entry for a question that no upstream could answer.
func failure(now time.Time) *entry {
	m := &dns.Msg{}
	m.Rcode = dns.RcodeServerFailure
	return &entry{msg: m, failed: true, fetched: now}
}

// expires is when e is no longer fresh.
func (e *entry) expires() time.Time {
	if e.failed {
		return e.fetched.Add(failureHold)
	}
	return e.fetched.Add(time.Duration(e.life) * time.Second)
}

// reply returns the answer to q, with the TTLs as they are at now.
func (e *entry) reply(q *request, now time.Time) *dns.Msg {
	r := q.reply()
	r.Rcode, r.Truncated, r.RecursionAvailable = e.msg.Rcode, e.msg.Truncated, true
	r.AuthenticatedData = e.msg.AuthenticatedData && (q.ad || q.do)
	age := uint32(max(now.Sub(e.fetched)/time.Second, 0))
	aged := func(rrs []dns.RR) []dns.RR {
		list := make([]dns.RR, 0, len(rrs)+1)
		for _, rr := range rrs {
			rr = dns.Copy(rr)
			h := rr.Header()
			if strings.EqualFold(h.Name, q.question.Name) {
				h.Name = q.question.Name // spelt as asked
			}
			switch {
			case e.life > 0 && age >= e.life:
				h.Ttl = staleTTL
			case e.life > 0:
				h.Ttl -= age
			}
			list = append(list, rr)
		}
		return list
	}
	r.Answer, r.Ns, r.Extra = aged(e.msg.Answer), aged(e.msg.Ns), append(aged(e.msg.Extra), r.Extra...)
	return r
}

// state says what an entry found in the cache is good for.
type state int

const (
	missing state = iota
	fresh         // give it
	stale         // ask again, give it if that fails or takes long
	held          // expired too, but asking has just failed: give it
)

// cache keeps answers by request.key. When it is full, the least useful of a few
// entries taken at random makes room: a dead one, or the one unused longest.
type cache struct {
	size int

	mu      sync.Mutex // guards entries and what they point to
	entries map[string]*kept
}

type kept struct {
	*entry
	used      time.Time
	holdUntil time.Time // while it is stale: when to ask again
}

// newCache returns a cache of at most size entries; none if size is not positive.
func newCache(size int) *cache {
	return &cache{size: size, entries: map[string]*kept{}}
}

func (c *cache) len() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.entries)
}

// get returns the entry for key and what it is good for at now; nil if missing.
func (c *cache) get(key string, now time.Time) (*entry, state) {
	c.mu.Lock()
	defer c.mu.Unlock()
	k := c.entries[key]
	if k == nil {
		return nil, missing
	}
	s := k.state(now)
	if s == missing {
		delete(c.entries, key)
		return nil, missing
	}
	k.used = now
	return k.entry, s
}

func (k *kept) state(now time.Time) state {
	expires := k.expires()
	switch {
	case now.Before(expires):
		return fresh
	case k.failed || !now.Before(expires.Add(staleFor)):
		return missing
	case now.Before(k.holdUntil):
		return held
	}
	return stale
}

// put keeps e, if it may be kept at all. A failure does not displace an answer
// that can still be given: that one is held instead, for staleHold.
func (c *cache) put(key string, e *entry, now time.Time) {
	if c.size <= 0 || e.life == 0 && !e.failed {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	old := c.entries[key]
	if e.failed && old != nil && !old.failed && old.state(now) != missing {
		old.holdUntil = now.Add(staleHold)
		return
	}
	if old == nil && len(c.entries) >= c.size {
		c.evict(now)
	}
	c.entries[key] = &kept{entry: e, used: now}
}

func (c *cache) evict(now time.Time) {
	const sample = 8
	var victim string
	var oldest time.Time
	n := 0
	for key, k := range c.entries { // starts anywhere
		used := k.used
		if k.state(now) == missing {
			used = time.Time{}
		}
		if n == 0 || used.Before(oldest) {
			victim, oldest = key, used
		}
		if n++; n == sample {
			break
		}
	}
	delete(c.entries, victim)
}
