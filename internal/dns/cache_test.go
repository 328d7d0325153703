package dns

import (
	"fmt"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/miekg/dns"
)

// asked returns the request for a question as if it had come over UDP.
func asked(t testing.TB, name string, qtype uint16, change ...func(*dns.Msg)) *request {
	t.Helper()
	m := question(name, qtype)
	for _, c := range change {
		c(m)
	}
	rcode, opt := judge(m, nil)
	if rcode != dns.RcodeSuccess {
		t.Fatalf("%s is answered %s", name, dns.RcodeToString[rcode])
	}
	return newRequest(m, opt, false)
}

func records(t testing.TB, lines ...string) []dns.RR {
	t.Helper()
	var rrs []dns.RR
	for _, l := range lines {
		rr, err := dns.NewRR(l)
		if err != nil {
			t.Fatal(err)
		}
		rrs = append(rrs, rr)
	}
	return rrs
}

func entryOf(t testing.TB, r *dns.Msg, now time.Time) *entry {
	t.Helper()
	e, err := newEntry(r, now)
	if err != nil {
		t.Fatal(err)
	}
	return e
}

func TestLifeOfAnAnswer(t *testing.T) {
	for name, c := range map[string]struct {
		reply dns.Msg
		life  uint32
	}{
		"least ttl":    {dns.Msg{Answer: records(t, "x.test. 300 A 192.0.2.1", "x.test. 20 A 192.0.2.2")}, 20},
		"capped":       {dns.Msg{Answer: records(t, "x.test. 9999999 A 192.0.2.1")}, maxTTL},
		"zero":         {dns.Msg{Answer: records(t, "x.test. 0 A 192.0.2.1")}, 0},
		"negative ttl": {dns.Msg{Answer: records(t, "x.test. 4294967295 A 192.0.2.1")}, 0},
		"no data":      {dns.Msg{Ns: records(t, "test. 900 SOA a. b. 1 2 3 4 60")}, 60},
		"no name":      {dns.Msg{MsgHdr: dns.MsgHdr{Rcode: dns.RcodeNameError}, Ns: records(t, "test. 50 SOA a. b. 1 2 3 4 60")}, 50},
		"long denial":  {dns.Msg{Ns: records(t, "test. 90000 SOA a. b. 1 2 3 4 90000")}, maxNegativeTTL},
		"no soa":       {dns.Msg{MsgHdr: dns.MsgHdr{Rcode: dns.RcodeNameError}}, 0},
		"referral":     {dns.Msg{Ns: records(t, "test. 900 NS a.")}, 0},
		"cname to nothing": {dns.Msg{MsgHdr: dns.MsgHdr{Rcode: dns.RcodeNameError},
			Answer: records(t, "x.test. 30 CNAME y.test."), Ns: records(t, "test. 900 SOA a. b. 1 2 3 4 60")}, 30},
		"truncated": {dns.Msg{MsgHdr: dns.MsgHdr{Truncated: true}, Answer: records(t, "x.test. 300 A 192.0.2.1")}, 0},
	} {
		if got := entryOf(t, &c.reply, time.Now()).life; got != c.life {
			t.Errorf("%s: %d s, want %d", name, got, c.life)
		}
	}
}

func TestReplyFromAnEntry(t *testing.T) {
	r := &dns.Msg{
		MsgHdr: dns.MsgHdr{AuthenticatedData: true, Authoritative: true},
		Answer: records(t, "x.test. 300 CNAME y.test.", "y.test. 100 A 192.0.2.1"),
		Ns:     records(t, "test. 200 NS ns.test."),
		Extra:  append(records(t, "ns.test. 400 AAAA 2001:db8::1"), &dns.OPT{Hdr: dns.RR_Header{Name: ".", Rrtype: dns.TypeOPT}}),
	}
	at := time.Now()
	e := entryOf(t, r, at)
	reply := func(age time.Duration, change ...func(*dns.Msg)) *dns.Msg {
		q := asked(t, "X.tesT", dns.TypeA, change...)
		return unpack(t, q.pack(e.reply(q, at.Add(age))))
	}
	got := reply(10 * time.Second)
	want := "NOERROR\nan X.tesT. 290 IN CNAME y.test.\nan y.test. 90 IN A 192.0.2.1\nns test. 190 IN NS ns.test.\nar ns.test. 390 IN AAAA 2001:db8::1"
	if diff := cmp.Diff(want, brief(got)); diff != "" {
		t.Error(diff)
	}
	if got.IsEdns0() != nil || got.AuthenticatedData || got.Authoritative || !got.RecursionAvailable || got.Question[0].Name != "X.tesT." {
		t.Errorf("header: %v", got)
	}
	got = reply(0, func(m *dns.Msg) { m.SetEdns0(4096, true); m.CheckingDisabled = true })
	if o := got.IsEdns0(); o == nil || !o.Do() || o.UDPSize() != maxUDPAnswer || !got.AuthenticatedData || !got.CheckingDisabled {
		t.Errorf("with EDNS: %v", got)
	}
	for _, rr := range reply(101 * time.Second).Answer {
		if rr.Header().Ttl != staleTTL {
			t.Errorf("stale: %v", rr)
		}
	}
}

func TestReplyIsTruncated(t *testing.T) {
	var r dns.Msg
	for i := range 40 {
		r.Answer = append(r.Answer, records(t, fmt.Sprintf("x.test. 300 A 192.0.2.%d", i))...)
	}
	e := entryOf(t, &r, time.Now())
	q := asked(t, "x.test", dns.TypeA)
	got := unpack(t, q.pack(e.reply(q, time.Now())))
	if !got.Truncated || len(got.Answer) != 0 {
		t.Errorf("without EDNS: %v", got)
	}
	q = asked(t, "x.test", dns.TypeA, func(m *dns.Msg) { m.SetEdns0(1232, false) })
	got = unpack(t, q.pack(e.reply(q, time.Now())))
	if got.Truncated || len(got.Answer) != 40 {
		t.Errorf("with EDNS: %v", got)
	}
}

func TestCacheStates(t *testing.T) {
	c := newCache(10)
	at := time.Now()
	q := asked(t, "x.test", dns.TypeA)
	key := q.key()
	expect := func(after time.Duration, want state) {
		t.Helper()
		if e, got := c.get(key, at.Add(after)); got != want || (e == nil) != (want == missing) {
			t.Errorf("after %s: state %d, want %d", after, got, want)
		}
	}
	expect(0, missing)
	c.put(key, failure(at), at)
	expect(0, fresh)
	expect(failureHold, missing)
	c.put(key, entryOf(t, &dns.Msg{Answer: records(t, "x.test. 60 A 192.0.2.1")}, at), at)
	expect(59*time.Second, fresh)
	expect(60*time.Second, stale)
	c.put(key, failure(at.Add(70*time.Second)), at.Add(70*time.Second))
	expect(70*time.Second, held)
	expect(99*time.Second, held)
	expect(100*time.Second, stale)
	expect(60*time.Second+staleFor-1, stale)
	expect(60*time.Second+staleFor, missing)
	if c.len() != 0 {
		t.Errorf("%d entries left", c.len())
	}
	c.put(key, entryOf(t, &dns.Msg{Answer: records(t, "x.test. 0 A 192.0.2.1")}, at), at)
	expect(0, missing)
}

func TestCacheTellsQuestionsApart(t *testing.T) {
	seen := map[string]bool{}
	for _, q := range []*request{
		asked(t, "x.test", dns.TypeA), asked(t, "x.test", dns.TypeAAAA), asked(t, "y.test", dns.TypeA),
		asked(t, "x.test", dns.TypeA, func(m *dns.Msg) { m.SetEdns0(1232, true) }),
		asked(t, "x.test", dns.TypeA, func(m *dns.Msg) { m.CheckingDisabled = true }),
	} {
		seen[q.key()] = true
	}
	for _, q := range []*request{
		asked(t, "X.TEST", dns.TypeA),
		asked(t, "x.test", dns.TypeA, func(m *dns.Msg) { m.SetEdns0(512, false); m.RecursionDesired = false; m.AuthenticatedData = true }),
	} {
		seen[q.key()] = true
	}
	if len(seen) != 5 {
		t.Errorf("%d keys, want 5", len(seen))
	}
}

// A full cache keeps its size, and what is in use mostly stays.
func TestCacheEviction(t *testing.T) {
	const size = 100
	c := newCache(size)
	at := time.Now()
	add := func(i int) string {
		key := asked(t, fmt.Sprintf("n%d.test", i), dns.TypeA).key()
		c.put(key, entryOf(t, &dns.Msg{Answer: records(t, "x.test. 9999 A 192.0.2.1")}, at), at)
		return key
	}
	var popular []string
	for i := range 10 {
		popular = append(popular, add(i))
	}
	for i := 10; i < 2000; i++ {
		at = at.Add(time.Millisecond)
		for _, key := range popular {
			c.get(key, at)
		}
		add(i)
		if c.len() > size {
			t.Fatalf("%d entries", c.len())
		}
	}
	stayed := 0
	for _, key := range popular {
		if _, s := c.get(key, at); s == fresh {
			stayed++
		}
	}
	if c.len() != size || stayed < 9 {
		t.Errorf("%d entries, %d of 10 popular ones stayed", c.len(), stayed)
	}
	none := newCache(-1)
	q := asked(t, "x.test", dns.TypeA)
	none.put(q.key(), entryOf(t, &dns.Msg{Answer: records(t, "x.test. 9999 A 192.0.2.1")}, at), at)
	if none.len() != 0 {
		t.Error("a cache of no size keeps something")
	}
}
