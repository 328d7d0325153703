package dns

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"flotilla/internal/catalog"

	"github.com/miekg/dns"
)

var loopback = netip.MustParseAddrPort("127.0.53.1:0")

// feedOf returns a feed whose snapshot is made of pairs of key and value.
func feedOf(t testing.TB, pairs ...string) *catalog.Feed {
	t.Helper()
	feed := catalog.NewFeed()
	if len(pairs) == 0 {
		return feed
	}
	b := catalog.NewBuilder(catalog.Policy{Loopback: true})
	batch := catalog.Batch{Revision: 1, Reset: true, Now: time.Now()}
	for i := 0; i < len(pairs); i += 2 {
		batch.Keys = append(batch.Keys, catalog.KeyValue{Key: "/services/" + pairs[i], Value: pairs[i+1], CreateRevision: 1, ModRevision: 1})
	}
	feed.Publish(b.Apply(batch))
	return feed
}

// fleet is the catalog of most tests.
func fleet(t testing.TB) *catalog.Feed {
	return feedOf(t,
		"web/scheme", "http",
		"web/hosts/1", "10.0.0.1:8000",
		"web/hosts/two", "10.0.0.2:8001",
		"web/hosts/six", "[fd00::6]:8006",
		"web/hosts/10.0.0.3:80", "10.0.0.3:8003",
		"web/hosts/old", "10.0.0.4:8004",
		"web/meta/old", `{"drain":true}`,
		"web/meta/two", `{"weight":7}`,
		"Big/scheme", "tcp",
		"Big/hosts/A", "10.0.1.1:1",
		"empty/scheme", "http",
		"lost/hosts/1", "10.0.2.1:80",
	)
}

func testConfig() Config {
	return Config{
		Listen:  []netip.AddrPort{loopback},
		Address: []netip.Addr{netip.MustParseAddr("10.9.0.1"), netip.MustParseAddr("fd00::9")},
		Node:    "n1",
	}
}

func newServer(t testing.TB, cfg Config, feed *catalog.Feed) *Server {
	t.Helper()
	s, err := New(cfg, feed, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// serve runs a server until the test ends and returns its address.
func serve(t testing.TB, cfg Config, feed *catalog.Feed) (*Server, netip.AddrPort) {
	t.Helper()
	s := newServer(t, cfg, feed)
	ctx, cancel := context.WithCancel(context.Background())
	stopped := make(chan error, 1)
	go func() { stopped <- s.Run(ctx) }()
	select {
	case <-s.Ready():
	case err := <-stopped:
		t.Fatalf("run: %v", err)
	}
	t.Cleanup(func() {
		cancel()
		if err := <-stopped; err != nil {
			t.Errorf("run: %v", err)
		}
	})
	return s, s.Addrs()[0]
}

// ask sends one question over a real socket.
func ask(t testing.TB, network string, to netip.AddrPort, m *dns.Msg) *dns.Msg {
	t.Helper()
	c := dns.Client{Net: network, Timeout: 5 * time.Second, UDPSize: 4096}
	r, _, err := c.Exchange(m, to.String())
	if err != nil {
		t.Fatalf("ask %s: %v", m.Question[0].Name, err)
	}
	return r
}

func question(name string, qtype uint16) *dns.Msg {
	m := new(dns.Msg)
	m.SetQuestion(dns.Fqdn(name), qtype)
	return m
}

// answerTo gives m to the server without a socket.
func answerTo(t testing.TB, s *Server, m *dns.Msg) *dns.Msg {
	t.Helper()
	pkt, err := m.Pack()
	if err != nil {
		t.Fatal(err)
	}
	reply, late := s.answer(pkt, false, time.Now(), s.tallies[0])
	if late != nil {
		t.Fatalf("%s is forwarded", m.Question[0].Name)
	}
	return unpack(t, reply)
}

func unpack(t testing.TB, pkt []byte) *dns.Msg {
	t.Helper()
	r := new(dns.Msg)
	if err := r.Unpack(pkt); err != nil {
		t.Fatalf("%x: %v", pkt, err)
	}
	return r
}

// brief is a message's rcode and records, each section on its own line, tabs
// turned to spaces.
func brief(r *dns.Msg) string {
	var b strings.Builder
	b.WriteString(dns.RcodeToString[r.Rcode])
	for i, section := range [][]dns.RR{r.Answer, r.Ns, r.Extra} {
		for _, rr := range section {
			if rr.Header().Rrtype == dns.TypeOPT {
				continue
			}
			fmt.Fprintf(&b, "\n%s %s", []string{"an", "ns", "ar"}[i], strings.ReplaceAll(rr.String(), "\t", " "))
		}
	}
	return b.String()
}

// dig runs the real dig against addr.
func dig(t testing.TB, addr netip.AddrPort, args ...string) string {
	t.Helper()
	args = append([]string{"@" + addr.Addr().String(), "-p", fmt.Sprint(addr.Port()), "+tries=1", "+time=5"}, args...)
	out, err := exec.Command("dig", args...).CombinedOutput()
	if err != nil {
		t.Fatalf("dig %v: %v\n%s", args, err, out)
	}
	return string(out)
}

// dnsmasq starts a real upstream with the given configuration lines and returns
// its address and a function that kills it.
func dnsmasq(t testing.TB, lines ...string) (addr netip.AddrPort, kill func()) {
	t.Helper()
	c, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.MustParseAddrPort("127.0.53.2:0")))
	if err != nil {
		t.Fatal(err)
	}
	addr = c.LocalAddr().(*net.UDPAddr).AddrPort()
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	conf := filepath.Join(t.TempDir(), "dnsmasq.conf")
	lines = append(lines, "port="+fmt.Sprint(addr.Port()), "listen-address="+addr.Addr().String(), "bind-interfaces",
		"no-resolv", "no-hosts", "local-ttl=60", "user=", "group=", "pid-file=", "host-record=up.test,192.0.2.99")
	if err := os.WriteFile(conf, []byte(strings.Join(lines, "\n")+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	var log bytes.Buffer
	cmd := exec.Command("dnsmasq", "--keep-in-foreground", "--conf-file="+conf)
	cmd.Stderr = &log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	exited := make(chan struct{})
	go func() {
		_ = cmd.Wait()
		close(exited)
	}()
	kill = func() {
		_ = cmd.Process.Kill()
		<-exited
	}
	t.Cleanup(kill)
	probe := dns.Client{Timeout: 200 * time.Millisecond}
	for {
		if _, _, err := probe.Exchange(question("up.test", dns.TypeA), addr.String()); err == nil {
			return addr, kill
		}
		select {
		case <-exited:
			t.Fatalf("dnsmasq: %s", log.String())
		case <-time.After(10 * time.Millisecond):
		}
	}
}
