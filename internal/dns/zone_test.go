package dns

import (
	"net/netip"
	"strings"
	"testing"
	"time"

	"flotilla/internal/catalog"

	"github.com/google/go-cmp/cmp"
	"github.com/miekg/dns"
)

const denial = "ns %s 5 IN SOA ns.%s hostmaster.%s 1 3600 600 86400 5"

// noData and noName are the two ways to say no.
func noData(domain string) string { return "NOERROR\n" + strings.ReplaceAll(denial, "%s", domain) }
func noName(domain string) string { return "NXDOMAIN\n" + strings.ReplaceAll(denial, "%s", domain) }

func TestLocalNames(t *testing.T) {
	s := newServer(t, testConfig(), fleet(t))
	for _, c := range []struct {
		name, qtype, want string
	}{
		{"web.local", "A", "NOERROR\nan web.local. 5 IN A 10.9.0.1"},
		{"web.local", "AAAA", "NOERROR\nan web.local. 5 IN AAAA fd00::9"},
		{"nowhere.local", "A", "NOERROR\nan nowhere.local. 5 IN A 10.9.0.1"},
		{"a.b.local", "A", "NOERROR\nan a.b.local. 5 IN A 10.9.0.1"},
		{"WeB.LoCaL", "A", "NOERROR\nan WeB.LoCaL. 5 IN A 10.9.0.1"},
		{"web.local", "TXT", noData("local.")},
		{"web.LOCAL", "HTTPS", noData("LOCAL.")},
		{"web.local", "SRV", noData("local.")},
		{"web.local", "ANY", "NOERROR\nan web.local. 5 IN HINFO \"RFC8482\" \"\""},
		{"inst.local", "A", "NOERROR\nan inst.local. 5 IN A 10.9.0.1"},

		{"local", "A", "NOERROR\nan local. 5 IN A 10.9.0.1"},
		{"local", "SOA", "NOERROR\nan local. 5 IN SOA ns.local. hostmaster.local. 1 3600 600 86400 5"},
		{"LOCAL", "NS", "NOERROR\nan LOCAL. 5 IN NS ns.LOCAL.\nar ns.LOCAL. 5 IN A 10.9.0.1\nar ns.LOCAL. 5 IN AAAA fd00::9"},
		{"local", "MX", noData("local.")},

		{"_web._tcp.local", "SRV", `NOERROR
an _web._tcp.local. 5 IN SRV 0 100 8000 1.web.inst.local.
an _web._tcp.local. 5 IN SRV 0 100 8003 10-0-0-3-8003.web.inst.local.
an _web._tcp.local. 5 IN SRV 0 100 8006 six.web.inst.local.
an _web._tcp.local. 5 IN SRV 0 7 8001 two.web.inst.local.
ar 1.web.inst.local. 5 IN A 10.0.0.1
ar 10-0-0-3-8003.web.inst.local. 5 IN A 10.0.0.3
ar six.web.inst.local. 5 IN AAAA fd00::6
ar two.web.inst.local. 5 IN A 10.0.0.2`},
		{"_BIG._TCP.local", "SRV", "NOERROR\nan _BIG._TCP.local. 5 IN SRV 0 100 1 A.Big.inst.local.\nar A.Big.inst.local. 5 IN A 10.0.1.1"},
		{"_web._tcp.local", "A", noData("local.")},
		{"_empty._tcp.local", "SRV", noData("local.")},
		{"_lost._tcp.local", "SRV", noName("local.")},
		{"_nope._tcp.local", "SRV", noName("local.")},
		{"_nope._tcp.local", "ANY", noName("local.")},
		{"web._tcp.local", "SRV", noName("local.")},
		{"x._web._tcp.local", "SRV", noName("local.")},
		{"_tcp.local", "A", noData("local.")},
		{"_web._udp.local", "SRV", noName("local.")},
		{"b._dns-sd._udp.local", "PTR", noName("local.")},

		{"1.web.inst.local", "A", "NOERROR\nan 1.web.inst.local. 5 IN A 10.0.0.1"},
		{"TWO.Web.Inst.local", "A", "NOERROR\nan TWO.Web.Inst.local. 5 IN A 10.0.0.2"},
		{"old.web.inst.local", "A", "NOERROR\nan old.web.inst.local. 5 IN A 10.0.0.4"},
		{"10-0-0-3-8003.web.inst.local", "A", "NOERROR\nan 10-0-0-3-8003.web.inst.local. 5 IN A 10.0.0.3"},
		{"six.web.inst.local", "AAAA", "NOERROR\nan six.web.inst.local. 5 IN AAAA fd00::6"},
		{"six.web.inst.local", "A", noData("local.")},
		{"9.web.inst.local", "A", noName("local.")},
		{"x.1.web.inst.local", "A", noName("local.")},
		{"web.inst.local", "A", noData("local.")},
		{"nope.inst.local", "A", noName("local.")},

		{"1.0.9.10.in-addr.arpa", "PTR", "NOERROR\nan 1.0.9.10.in-addr.arpa. 5 IN PTR n1.local."},
		{"2.0.0.10.in-addr.arpa", "PTR", "NOERROR\nan 2.0.0.10.in-addr.arpa. 5 IN PTR two.web.inst.local."},
		{"6" + strings.Repeat(".0", 29) + ".d.f.ip6.ARPA", "PTR", "NOERROR\nan 6" + strings.Repeat(".0", 29) + ".d.f.ip6.ARPA. 5 IN PTR six.web.inst.local."},

		// Not ours, and no upstream to ask.
		{"9.9.9.9.in-addr.arpa", "PTR", "REFUSED"},
		{"web.local.example.com", "A", "REFUSED"},
		{"notlocal", "A", "REFUSED"},
		{"xlocal.", "A", "REFUSED"},
		{".", "NS", "REFUSED"},
		{"local", "AXFR", "REFUSED"},
		{"web.local", "MAILB", "REFUSED"},
		{"example.com", "ANY", "NOERROR\nan example.com. 5 IN HINFO \"RFC8482\" \"\""},
	} {
		r := answerTo(t, s, question(c.name, dns.StringToType[c.qtype]))
		if diff := cmp.Diff(c.want, brief(r)); diff != "" {
			t.Errorf("%s %s (-want +got):\n%s", c.name, c.qtype, diff)
		}
		if local := strings.Contains(strings.ToLower(c.want), "local."); r.Authoritative != local && c.qtype != "ANY" {
			t.Errorf("%s %s: authoritative %v", c.name, c.qtype, r.Authoritative)
		}
		if r.Question[0].Name != dns.Fqdn(c.name) || r.RecursionAvailable || !r.RecursionDesired {
			t.Errorf("%s %s: header or question: %v", c.name, c.qtype, r)
		}
	}
}

func TestDomainOfSeveralLabels(t *testing.T) {
	cfg := testConfig()
	cfg.Domain = ".Fleet.Example.com."
	s := newServer(t, cfg, fleet(t))
	for name, want := range map[string]string{
		"web.fleet.example.com":         "NOERROR\nan web.fleet.example.com. 5 IN A 10.9.0.1",
		"1.web.inst.FLEET.example.com":  "NOERROR\nan 1.web.inst.FLEET.example.com. 5 IN A 10.0.0.1",
		"example.com":                   "REFUSED",
		"web.local":                     "REFUSED",
		"web.fleet.example.com.local":   "REFUSED",
		"nope._tcp.fleet.example.com":   noName("fleet.example.com."),
		"fleet.example.com":             "NOERROR\nan fleet.example.com. 5 IN A 10.9.0.1",
		"a.very.long.fleet.example.com": "NOERROR\nan a.very.long.fleet.example.com. 5 IN A 10.9.0.1",
	} {
		if got := brief(answerTo(t, s, question(name, dns.TypeA))); got != want {
			t.Errorf("%s: %s", name, got)
		}
	}
}

func TestBeforeTheFirstSnapshot(t *testing.T) {
	s := newServer(t, testConfig(), catalog.NewFeed())
	for name, want := range map[string]string{
		"web.local":       "NOERROR\nan web.local. 5 IN A 10.9.0.1",
		"_web._tcp.local": noName("local."),
		"web.inst.local":  noName("local."),
	} {
		if got := brief(answerTo(t, s, question(name, dns.TypeA))); got != want {
			t.Errorf("%s: %s", name, got)
		}
	}
	if got := brief(answerTo(t, s, question("1.0.9.10.in-addr.arpa", dns.TypePTR))); !strings.HasSuffix(got, "PTR n1.local.") {
		t.Errorf("ptr: %s", got)
	}
}

// The reverse index follows the catalog, forwards and backwards.
func TestReverseFollowsTheCatalog(t *testing.T) {
	s := newServer(t, testConfig(), fleet(t))
	ptr := func(feed *catalog.Feed) string {
		s.zone.feed = feed
		return brief(answerTo(t, s, question("1.0.0.10.in-addr.arpa", dns.TypePTR)))
	}
	for range 3 {
		if got := ptr(fleet(t)); !strings.HasSuffix(got, "PTR 1.web.inst.local.") {
			t.Errorf("first: %s", got)
		}
		if got := ptr(feedOf(t, "db/scheme", "tcp", "db/hosts/a", "10.0.0.1:1", "db/hosts/b", "10.0.0.1:2")); got !=
			"NOERROR\nan 1.0.0.10.in-addr.arpa. 5 IN PTR a.db.inst.local.\nan 1.0.0.10.in-addr.arpa. 5 IN PTR b.db.inst.local." {
			t.Errorf("second: %s", got)
		}
		if got := ptr(feedOf(t, "db/scheme", "tcp")); got != "REFUSED" {
			t.Errorf("third: %s", got)
		}
	}
}

func TestNewRefuses(t *testing.T) {
	for name, change := range map[string]func(*Config){
		"no listen":  func(c *Config) { c.Listen = nil },
		"no address": func(c *Config) { c.Address = nil },
		"wildcard":   func(c *Config) { c.Address = []netip.Addr{netip.IPv4Unspecified()} },
		"domain":     func(c *Config) { c.Domain = "a..b" },
		"domain2":    func(c *Config) { c.Domain = "a b" },
	} {
		cfg := testConfig()
		change(&cfg)
		if _, err := New(cfg, catalog.NewFeed(), nil); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

func BenchmarkAnswer(b *testing.B) {
	s := newServer(b, testConfig(), fleet(b))
	pkt, err := question("service-1234.local", dns.TypeA).Pack()
	if err != nil {
		b.Fatal(err)
	}
	now := time.Now()
	for b.Loop() {
		s.answer(pkt, false, now, s.tallies[0])
	}
}
