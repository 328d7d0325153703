package dns

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/miekg/dns"
	"golang.org/x/sync/errgroup"
)

// With the users' tool: dig, which sends a cookie, so that this is mostly the
// slow path.
func TestDig(t *testing.T) {
	upstream, _ := dnsmasq(t, "host-record=name.test,192.0.2.7", "txt-record=name.test,hello", "local=/test/")
	cfg := testConfig()
	cfg.Upstreams = []netip.AddrPort{upstream}
	_, addr := serve(t, cfg, fleet(t))
	for _, c := range []struct {
		args string
		want []string
	}{
		{"web.local", []string{"status: NOERROR", "flags: qr aa rd ra;", "web.local.\t\t5\tIN\tA\t10.9.0.1", "udp: 1232"}},
		{"web.local +noedns", []string{"status: NOERROR", "web.local.\t\t5\tIN\tA\t10.9.0.1"}},
		{"web.local +nocookie +dnssec", []string{"flags: do; udp: 1232", "web.local.\t\t5\tIN\tA\t10.9.0.1"}},
		{"web.local +tcp", []string{"status: NOERROR", "web.local.\t\t5\tIN\tA\t10.9.0.1", "(TCP)"}},
		{"WEB.Local AAAA", []string{"WEB.Local.\t\t5\tIN\tAAAA\tfd00::9"}},
		{"web.local MX", []string{"status: NOERROR", "ANSWER: 0", "local.\t\t\t5\tIN\tSOA\tns.local. hostmaster.local. 1 3600 600 86400 5"}},
		{"_web._tcp.local SRV", []string{"0 7 8001 two.web.inst.local.", "1.web.inst.local.\t5\tIN\tA\t10.0.0.1"}},
		{"-x 10.0.0.1", []string{"PTR\t1.web.inst.local."}},
		{"-x 192.0.2.7", []string{"PTR\tname.test."}},
		{"name.test", []string{"status: NOERROR", "flags: qr rd ra;", "A\t192.0.2.7"}},
		{"NAME.test TXT +tcp", []string{"NAME.test.\t\t60\tIN\tTXT\t\"hello\""}},
		{"none.test", []string{"status: NXDOMAIN"}},
		{"web.local.name.test", []string{"status: NXDOMAIN"}},
		{"version.bind CH TXT", []string{"status: REFUSED"}},
		{"web.local ANY", []string{`HINFO	"RFC8482" ""`}},
		{"web.local +edns=1 +noednsnegotiation", []string{"status: BADVERS"}},
		{"web.local +opcode=NOTIFY", []string{"status: NOTIMP"}},
		{"web.local +header-only", []string{"status: FORMERR"}},
		{"local AXFR", []string{"Transfer failed"}},
	} {
		out := dig(t, addr, strings.Fields(c.args)...)
		for _, want := range c.want {
			if !strings.Contains(out, want) {
				t.Errorf("dig %s: no %q in\n%s", c.args, want, out)
			}
		}
	}
}

func TestForwardCacheAndStale(t *testing.T) {
	upstream, kill := dnsmasq(t, "host-record=name.test,192.0.2.7,1", "host-record=keep.test,192.0.2.8", "local=/test/")
	cfg := testConfig()
	cfg.Upstreams = []netip.AddrPort{upstream}
	s, addr := serve(t, cfg, fleet(t))
	const answer = "NOERROR\nan name.test. 1 IN A 192.0.2.7"
	for range 2 {
		if got := brief(ask(t, "udp", addr, question("name.test", dns.TypeA))); got != answer {
			t.Errorf("got %s", got)
		}
	}
	ask(t, "tcp", addr, question("keep.test", dns.TypeA))
	if st := s.Stats(); st.Forwarded != 2 || st.Cached != 1 || st.CacheEntries != 2 {
		t.Errorf("%+v", st)
	}
	kill()
	if got := brief(ask(t, "udp", addr, question("keep.test", dns.TypeA))); !strings.Contains(got, "192.0.2.8") {
		t.Errorf("kept answer: %s", got)
	}
	if got := brief(ask(t, "udp", addr, question("new.test", dns.TypeA))); got != "SERVFAIL" {
		t.Errorf("new name: %s", got)
	}
	for deadline := time.Now().Add(10 * time.Second); ; {
		got := brief(ask(t, "udp", addr, question("name.test", dns.TypeA)))
		if got == strings.Replace(answer, " 1 ", " 30 ", 1) {
			break
		}
		if got != answer || time.Now().After(deadline) {
			t.Fatalf("after the upstream died: %s", got)
		}
	}
	if st := s.Stats(); st.Stale == 0 || st.UpstreamFailures == 0 || st.Errors != 1 {
		t.Errorf("%+v", st)
	}
}

// badUpstream is a UDP and TCP server in the test whose handler gives back the
// messages to send for a question, in order.
func badUpstream(t *testing.T, handle func(network string, m *dns.Msg) [][]byte) netip.AddrPort {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.53.3:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := l.Addr().(*net.TCPAddr).AddrPort()
	u, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(addr))
	if err != nil {
		t.Fatal(err)
	}
	var g errgroup.Group
	t.Cleanup(func() {
		_, _ = l.Close(), u.Close()
		_ = g.Wait()
	})
	g.Go(func() error {
		buf := make([]byte, 4096)
		for {
			n, from, err := u.ReadFromUDPAddrPort(buf)
			if err != nil {
				return err
			}
			for _, reply := range handle("udp", unpack(t, buf[:n])) {
				_, _ = u.WriteToUDPAddrPort(reply, from)
			}
		}
	})
	g.Go(func() error {
		for {
			c, err := l.Accept()
			if err != nil {
				return err
			}
			conn := &dns.Conn{Conn: c}
			if m, err := conn.ReadMsg(); err == nil {
				for _, reply := range handle("tcp", m) {
					_, _ = conn.Write(reply)
				}
			}
			_ = c.Close()
		}
	})
	return addr
}

// replyTo is the packed good answer to m, after change.
func replyTo(m *dns.Msg, change func(*dns.Msg)) []byte {
	r := new(dns.Msg)
	r.SetReply(m)
	r.Answer = []dns.RR{&dns.A{Hdr: dns.RR_Header{Name: m.Question[0].Name, Rrtype: dns.TypeA, Class: dns.ClassINET, Ttl: 60}, A: net.IPv4(192, 0, 2, 1)}}
	if change != nil {
		change(r)
	}
	b, err := r.Pack()
	if err != nil {
		panic(err)
	}
	return b
}

func TestMisbehavingUpstreams(t *testing.T) {
	good := func(m *dns.Msg) []byte { return replyTo(m, nil) }
	evil := func(r *dns.Msg) { r.Answer[0].(*dns.A).A = net.IPv4(6, 6, 6, 6) }
	long := func(n int) func(*dns.Msg) {
		return func(r *dns.Msg) {
			r.Compress = true
			for i := range n {
				rr := dns.Copy(r.Answer[0]).(*dns.A)
				rr.A = net.IPv4(192, 0, 3, byte(i))
				r.Answer = append(r.Answer, rr)
			}
		}
	}
	const right = "NOERROR\nan x.test. 60 IN A 192.0.2.1"
	for _, c := range []struct {
		name   string
		handle func(network string, m *dns.Msg) [][]byte
		want   string // what the answer begins with
	}{
		{"wrong id, name, type; no answer at all; garbage; then right", func(_ string, m *dns.Msg) [][]byte {
			return [][]byte{
				replyTo(m, func(r *dns.Msg) { evil(r); r.Id++ }),
				replyTo(m, func(r *dns.Msg) { evil(r); r.Question[0].Name = "y.test." }),
				replyTo(m, func(r *dns.Msg) { evil(r); r.Question[0].Qtype = dns.TypeTXT }),
				replyTo(m, func(r *dns.Msg) { evil(r); r.Question = nil }),
				replyTo(m, func(r *dns.Msg) { evil(r); r.Response = false }),
				{}, {1}, bytes.Repeat([]byte{0xc0}, 600), good(m),
			}
		}, right},
		{"answers in other case", func(_ string, m *dns.Msg) [][]byte {
			return [][]byte{replyTo(m, func(r *dns.Msg) { r.Question[0].Name = strings.ToUpper(r.Question[0].Name) })}
		}, right},
		{"truncates", func(network string, m *dns.Msg) [][]byte {
			if network == "udp" {
				return [][]byte{replyTo(m, func(r *dns.Msg) { evil(r); r.Truncated = true })}
			}
			return [][]byte{good(m)}
		}, right},
		{"truncates without TCP", func(network string, m *dns.Msg) [][]byte {
			if network == "udp" {
				return [][]byte{replyTo(m, func(r *dns.Msg) { r.Truncated = true })}
			}
			return nil
		}, right},
		{"garbage over TCP", func(network string, m *dns.Msg) [][]byte {
			if network == "udp" {
				return [][]byte{replyTo(m, func(r *dns.Msg) { r.Truncated = true })}
			}
			return [][]byte{{1, 2, 3}}
		}, right},
		{"loses a packet", func() func(string, *dns.Msg) [][]byte {
			lost := false
			return func(_ string, m *dns.Msg) [][]byte {
				if !lost {
					lost = true
					return nil
				}
				return [][]byte{good(m)}
			}
		}(), right},
		{"knows no EDNS", func(_ string, m *dns.Msg) [][]byte {
			if m.IsEdns0() != nil {
				return [][]byte{replyTo(m, func(r *dns.Msg) { r.Rcode, r.Question, r.Answer = dns.RcodeFormatError, nil, nil })}
			}
			return [][]byte{good(m)}
		}, right},
		{"refuses", func(_ string, m *dns.Msg) [][]byte {
			return [][]byte{replyTo(m, func(r *dns.Msg) { r.Rcode, r.Question, r.Answer = dns.RcodeRefused, nil, nil })}
		}, "REFUSED"},
		{"long answer", func(_ string, m *dns.Msg) [][]byte { return [][]byte{replyTo(m, long(200))} }, right + "\n"},
		{"only garbage", func(_ string, m *dns.Msg) [][]byte { return [][]byte{{1, 2, 3}} }, "SERVFAIL"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			cfg := testConfig()
			cfg.Upstreams = []netip.AddrPort{badUpstream(t, c.handle)}
			_, addr := serve(t, cfg, fleet(t))
			if got := brief(ask(t, "tcp", addr, question("x.test", dns.TypeA))); !strings.HasPrefix(got, c.want) || !strings.HasSuffix(c.want, "\n") && got != c.want {
				t.Errorf("got %s", got)
			}
		})
	}
}

// A dead first upstream: the second answers.
func TestFailoverOnSockets(t *testing.T) {
	dead, kill := dnsmasq(t)
	kill()
	alive, _ := dnsmasq(t, "host-record=name.test,192.0.2.7")
	cfg := testConfig()
	cfg.Upstreams = []netip.AddrPort{dead, alive}
	_, addr := serve(t, cfg, fleet(t))
	if got := brief(ask(t, "udp", addr, question("name.test", dns.TypeA))); got != "NOERROR\nan name.test. 60 IN A 192.0.2.7" {
		t.Errorf("got %s", got)
	}
}

// A server that is its own upstream by a detour must not spin.
func TestLoopOfForwarders(t *testing.T) {
	var back netip.AddrPort
	first := badUpstream(t, func(_ string, m *dns.Msg) [][]byte {
		r, _, err := (&dns.Client{Timeout: 3 * time.Second}).Exchange(m, back.String())
		if err != nil {
			return nil
		}
		r.Id = m.Id
		b, _ := r.Pack()
		return [][]byte{b}
	})
	cfg := testConfig()
	cfg.Upstreams = []netip.AddrPort{first}
	s, addr := serve(t, cfg, fleet(t))
	back = addr
	if got := brief(ask(t, "udp", addr, question("x.test", dns.TypeA))); got != "SERVFAIL" {
		t.Errorf("got %s", got)
	}
	if st := s.Stats(); st.UpstreamFailures != 1 {
		t.Errorf("%+v", st)
	}
}

// A long answer goes out whole over TCP, and truncated over UDP to what the
// asker takes, additional records dropped first.
func TestTruncation(t *testing.T) {
	pairs := []string{"many/scheme", "tcp", "some/scheme", "tcp"}
	for i := range 200 {
		pairs = append(pairs, fmt.Sprintf("many/hosts/%d", i), fmt.Sprintf("10.1.0.%d:80", i))
		if i < 26 {
			pairs = append(pairs, fmt.Sprintf("some/hosts/%d", i), fmt.Sprintf("10.1.0.%d:80", i))
		}
	}
	_, addr := serve(t, testConfig(), feedOf(t, pairs...))
	edns := func(name string) *dns.Msg {
		m := question(name, dns.TypeSRV)
		m.SetEdns0(4096, false)
		return m
	}
	for _, c := range []struct {
		network           string
		m                 *dns.Msg
		truncated         bool
		answers, addition int
	}{
		{"udp", question("_many._tcp.local", dns.TypeSRV), true, 0, 0},
		{"udp", edns("_many._tcp.local"), true, 0, 1},
		{"udp", edns("_some._tcp.local"), false, 26, 1},
		{"tcp", question("_many._tcp.local", dns.TypeSRV), false, 200, 200},
	} {
		r := ask(t, c.network, addr, c.m)
		r.Compress = true
		if r.Truncated != c.truncated || len(r.Answer) != c.answers || len(r.Extra) != c.addition || c.network == "udp" && r.Len() > maxUDPAnswer {
			t.Errorf("%s %s: truncated %v, %d and %d records, %d bytes", c.network, c.m.Question[0].Name, r.Truncated, len(r.Answer), len(r.Extra), r.Len())
		}
	}
}

// Many questions on one TCP connection without waiting, some of them slow.
func TestPipelining(t *testing.T) {
	cfg := testConfig()
	cfg.Upstreams = []netip.AddrPort{badUpstream(t, func(_ string, m *dns.Msg) [][]byte {
		if strings.HasPrefix(m.Question[0].Name, "slow") {
			return [][]byte{}
		}
		return [][]byte{replyTo(m, nil)}
	})}
	_, addr := serve(t, cfg, fleet(t))
	c, err := net.Dial("tcp", addr.String())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = c.Close() }()
	conn := &dns.Conn{Conn: c}
	names := []string{"slow.test", "fast.test", "web.local", "b.local"}
	for i, name := range names {
		m := question(name, dns.TypeA)
		m.Id = uint16(i)
		if err := conn.WriteMsg(m); err != nil {
			t.Fatal(err)
		}
	}
	var last string
	for range names {
		r, err := conn.ReadMsg()
		if err != nil {
			t.Fatal(err)
		}
		if r.Question[0].Name != dns.Fqdn(names[r.Id]) {
			t.Errorf("%d: %s", r.Id, r.Question[0].Name)
		}
		last = names[r.Id]
	}
	if last != "slow.test" {
		t.Errorf("%s came last", last)
	}
}

func TestTCPConnectionsAreLimited(t *testing.T) {
	_, addr := serve(t, testConfig(), fleet(t))
	var open []net.Conn
	defer func() {
		for _, c := range open {
			_ = c.Close()
		}
	}()
	for range maxTCP {
		c, err := net.Dial("tcp", addr.String())
		if err != nil {
			t.Fatal(err)
		}
		open = append(open, c)
	}
	refused, err := net.Dial("tcp", addr.String())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = refused.Close() }()
	_ = refused.SetReadDeadline(time.Now().Add(5 * time.Second))
	if n, err := refused.Read(make([]byte, 1)); n != 0 || !errors.Is(err, io.EOF) && !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("one too many: %v", err)
	}
	// UDP goes on, and so do those that are open.
	ask(t, "udp", addr, question("web.local", dns.TypeA))
	if err := (&dns.Conn{Conn: open[0]}).WriteMsg(question("web.local", dns.TypeA)); err != nil {
		t.Fatal(err)
	}
	if _, err := (&dns.Conn{Conn: open[0]}).ReadMsg(); err != nil {
		t.Error(err)
	}
}

// Many UDP packets at once, good and bad, from several sockets: each good one
// gets its own answer.
func TestBurst(t *testing.T) {
	s, addr := serve(t, testConfig(), fleet(t))
	var g errgroup.Group
	const rounds, window = 40, 20
	for client := range 4 {
		g.Go(func() error {
			c, err := net.Dial("udp", addr.String())
			if err != nil {
				return err
			}
			defer func() { _ = c.Close() }()
			_ = c.SetDeadline(time.Now().Add(20 * time.Second))
			buf := make([]byte, 512)
			for round := range rounds {
				for i := range window {
					m := question(fmt.Sprintf("n%d-%d-%d.local", client, round, i), dns.TypeA)
					m.Id = uint16(i)
					pkt, err := m.Pack()
					if err != nil {
						return err
					}
					_, _ = c.Write(pkt[:i])                   // malformed
					_, _ = c.Write(append([]byte{0}, pkt...)) // nonsense
					if _, err := c.Write(pkt); err != nil {
						return err
					}
				}
				for got := 0; got < window; {
					n, err := c.Read(buf)
					if err != nil {
						return fmt.Errorf("round %d, %d answers: %w", round, got, err)
					}
					var r dns.Msg
					if r.Unpack(buf[:n]) != nil || r.Rcode != dns.RcodeSuccess {
						continue
					}
					if want := fmt.Sprintf("n%d-%d-%d.local.", client, round, r.Id); r.Question[0].Name != want {
						return fmt.Errorf("got %s, want %s", r.Question[0].Name, want)
					}
					got++
				}
			}
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		t.Error(err)
	}
	if st := s.Stats(); st.Local != 4*rounds*window {
		t.Errorf("%+v", st)
	}
}

func TestIPv6AndSeveralAddresses(t *testing.T) {
	cfg := testConfig()
	cfg.Listen = append(cfg.Listen, netip.MustParseAddrPort("[::1]:0"))
	s, _ := serve(t, cfg, fleet(t))
	for _, addr := range s.Addrs() {
		for _, network := range []string{"udp", "tcp"} {
			if got := brief(ask(t, network, addr, question("web.local", dns.TypeA))); got != "NOERROR\nan web.local. 5 IN A 10.9.0.1" {
				t.Errorf("%s %s: %s", network, addr, got)
			}
		}
	}
}

// Two servers do not share an address unnoticed, though UDP sockets could.
func TestAddressInUse(t *testing.T) {
	_, addr := serve(t, testConfig(), fleet(t))
	cfg := testConfig()
	cfg.Listen = []netip.AddrPort{addr}
	err := newServer(t, cfg, fleet(t)).Run(context.Background())
	if !errors.Is(err, syscall.EADDRINUSE) || !strings.Contains(err.Error(), addr.String()) {
		t.Errorf("second server: %v", err)
	}
}

func TestOwnAddressIsNoUpstream(t *testing.T) {
	cfg := testConfig()
	cfg.Listen = []netip.AddrPort{netip.MustParseAddrPort("127.0.53.1:53")}
	cfg.Upstreams = cfg.Listen
	var log bytes.Buffer
	s, err := New(cfg, fleet(t), slog.New(slog.NewTextHandler(&log, nil)))
	if err != nil {
		t.Fatal(err)
	}
	if got := brief(answerTo(t, s, question("example.com", dns.TypeA))); got != "REFUSED" || !strings.Contains(log.String(), "left out") {
		t.Errorf("%s, log %s", got, log.String())
	}
}

func TestResolvConf(t *testing.T) {
	path := filepath.Join(t.TempDir(), "resolv.conf")
	if err := os.WriteFile(path, []byte(`# comment
search example.com
nameserver 192.0.2.1
nameserver   2001:db8::1	 # trailing
nameserver fe80::1%lo
nameserver
nameserver here
nameserver 192.0.2.1
options edns0`), 0o600); err != nil {
		t.Fatal(err)
	}
	got, err := ResolvConf(path)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff("[192.0.2.1:53 [2001:db8::1]:53 [fe80::1%lo]:53]", fmt.Sprint(got)); diff != "" {
		t.Error(diff)
	}
	if _, err := ResolvConf(path + "x"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("missing file: %v", err)
	}
}

// Any bytes are answered or dropped, and no answer is larger than it may be or
// a question.
func FuzzPacket(f *testing.F) {
	for _, m := range []*dns.Msg{question("web.local", dns.TypeA), question("_web._tcp.local", dns.TypeSRV),
		question("1.0.0.10.in-addr.arpa", dns.TypePTR), question("example.com", dns.TypeANY)} {
		for _, edns := range []bool{false, true} {
			if edns {
				m.SetEdns0(4096, true)
				m.IsEdns0().Option = []dns.EDNS0{&dns.EDNS0_COOKIE{Code: dns.EDNS0COOKIE, Cookie: "24a5ac1223344556"}}
			}
			pkt, err := m.Pack()
			if err != nil {
				f.Fatal(err)
			}
			f.Add(pkt, edns)
			f.Add(append(pkt, 1, 2, 3), edns)
			f.Add(pkt[:len(pkt)-3], edns)
		}
	}
	f.Add([]byte{}, false)
	f.Add(make([]byte, 12), true)
	f.Add([]byte("\x00\x01\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00\xc0\x0c\x00\x01\x00\x01"), false) // name that points to itself
	f.Add(append([]byte("\x00\x01\x01\x00\xff\xff\xff\xff\xff\xff\xff\xff"), bytes.Repeat([]byte("\x3f"), 400)...), false)
	cfg := testConfig()
	cfg.Upstreams = []netip.AddrPort{netip.MustParseAddrPort("127.0.53.9:53")}
	s := newServer(f, cfg, fleet(f))
	f.Fuzz(func(t *testing.T, pkt []byte, tcp bool) {
		now := time.Now()
		reply, late := s.answer(pkt, tcp, now, s.tallies[0])
		if late != nil {
			e, err := newEntry(&dns.Msg{Answer: records(t, ". 60 A 192.0.2.1")}, now)
			if err != nil {
				t.Fatal(err)
			}
			reply = late.pack(e.reply(late, now))
		}
		if reply == nil {
			return
		}
		r := unpack(t, reply)
		if !r.Response || r.Id != binary.BigEndian.Uint16(pkt) {
			t.Fatalf("answer %v to %x", r, pkt)
		}
		if !tcp && len(reply) > maxUDPAnswer {
			t.Fatalf("%d bytes", len(reply))
		}
		if again, _ := s.answer(reply, tcp, now, s.tallies[0]); again != nil {
			t.Fatalf("an answer is answered: %x", again)
		}
		var m dns.Msg
		if m.Unpack(pkt) == nil && len(r.Question) == 1 && m.Question[0] != r.Question[0] {
			t.Fatalf("question %v for %v", r.Question[0], m.Question[0])
		}
	})
}

// Whatever an upstream says becomes an answer or an error.
func FuzzUpstream(f *testing.F) {
	m := question("x.test", dns.TypeA)
	f.Add(replyTo(m, nil))
	f.Add(replyTo(m, func(r *dns.Msg) {
		r.Compress = true
		r.Ns = []dns.RR{soa("test.")}
		r.Extra = []dns.RR{address("ns.test.", netip.MustParseAddr("2001:db8::1"))}
		r.SetEdns0(4096, true)
	}))
	f.Fuzz(func(t *testing.T, pkt []byte) {
		r := new(dns.Msg)
		if r.Unpack(pkt) != nil {
			return
		}
		now := time.Now()
		q := asked(t, "x.test", dns.TypeA)
		q.limit = dns.MaxMsgSize
		e, err := newEntry(r, now)
		if err != nil {
			return
		}
		for _, age := range []time.Duration{0, time.Second, time.Hour} {
			got := unpack(t, q.pack(e.reply(q, now.Add(age))))
			if len(got.Answer) > len(r.Answer) || len(got.Question) != 1 {
				t.Fatalf("%v became %v", r, got)
			}
			for _, rr := range got.Answer {
				if rr.Header().Ttl > maxTTL && e.life > 0 {
					t.Fatalf("ttl of %v", rr)
				}
			}
		}
	})
}
