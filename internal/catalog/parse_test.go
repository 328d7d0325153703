package catalog

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"
	"unicode"

	"github.com/google/go-cmp/cmp"

	"flotilla/internal/text"
)

// put makes a batch of alternating keys (below /services/) and values, each with
// its position as revision.
func put(keyValues ...string) Batch {
	var b Batch
	for i := 0; i < len(keyValues); i += 2 {
		b.Revision++
		b.Keys = append(b.Keys, KeyValue{Key: Prefix + keyValues[i], Value: keyValues[i+1], CreateRevision: b.Revision, ModRevision: b.Revision})
	}
	return b
}

func build(p Policy, keyValues ...string) *Snapshot { return NewBuilder(p).Apply(put(keyValues...)) }

func endpointsOf(s *Service) string {
	var all []string
	for _, e := range s.Endpoints {
		all = append(all, e.Name+"="+e.Addr.String())
	}
	return strings.Join(all, " ")
}

func TestWholeService(t *testing.T) {
	got := build(Policy{},
		"web/domains/1", "WWW.Example.com",
		"web/domains/2", "*.example.org\n",
		"web/host_port", "8080\n",
		"web/hosts/a", " 10.0.0.1:80\n",
		"web/hosts/b", "[2001:db8::1]:81",
		"web/hosts/c", "[::ffff:10.0.0.3]:82",
		"web/hosts/deep/er", "ignored",
		"web/meta/a", `{"weight": 7, "drain": true, "zone": "eu-1"}`,
		"web/meta/gone", `{"weight": 0}`,
		"web/notes", "a sibling key of somebody else",
		"web/options", `{"strip_path":true,"sticky":true,"balance":"roundrobin","timeout_server":"90s","timeout_tunnel":"24h","max_connections":100000,"retries":false,"h2c":true,"send_proxy":true}`,
		"web/scheme", "http\r\n",
	).Service("web")
	got.Keys = nil
	want := &Service{
		Name: "web", Scheme: HTTP, HostPort: 8080, Revision: 12,
		Domains: []string{"*.example.org", "www.example.com"},
		Endpoints: []Endpoint{
			{Name: "a", Addr: netip.MustParseAddrPort("10.0.0.1:80"), Weight: 7, Drain: true, Zone: "eu-1"},
			{Name: "b", Addr: netip.MustParseAddrPort("[2001:db8::1]:81"), Weight: 100},
			{Name: "c", Addr: netip.MustParseAddrPort("10.0.0.3:82"), Weight: 100},
		},
		Options: Options{StripPath: true, Sticky: true, Balance: RoundRobin, TimeoutServer: 90 * time.Second, TimeoutTunnel: 24 * time.Hour,
			MaxConnections: 100000, NoRetries: true, H2C: true, SendProxy: true},
	}
	if d := cmp.Diff(want, got, cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b })); d != "" {
		t.Error(d)
	}
}

func TestEndpointValues(t *testing.T) {
	policy := Policy{Allow: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8"), netip.MustParsePrefix("fd00::/8"), netip.MustParsePrefix("64:ff9b::/96"),
		netip.MustParsePrefix("169.254.0.0/16"), netip.MustParsePrefix("::/0")}}
	for _, tc := range []struct{ value, reason, remedy string }{
		{"10.0.0.1:80", "", ""},
		{"\t10.255.255.255:65535 \r\n", "", ""},
		{"[fd00::1]:1", "", ""},
		{"", "the value is empty", "write a value, or delete the key: etcdctl put /services/web/hosts/1 10.0.0.11:8080"},
		{" \n", "the value is empty", ""},
		{"10.0.0.1", "there is no port", "etcdctl put /services/web/hosts/1 10.0.0.1:8080"},
		{"fd00::1", "there is no port", "etcdctl put /services/web/hosts/1 '[fd00::1]:8080'"},
		{"fd00::1:80", "there is no port", ""},
		{":8080", "there is no address before the port", ""},
		{"10.0.0.1:", "is not a port", ""},
		{"10.0.0.1:0", "0 is not a port", "etcdctl put /services/web/hosts/1 10.0.0.1:8080"},
		{"10.0.0.1:+80", "+80 is not a port", ""},
		{"10.0.0.1:-80", "-80 is not a port", ""},
		{"10.0.0.1:080", "080 is not a port", ""},
		{"10.0.0.1:65536", "65536 is not a port", ""},
		{"10.0.0.1:99999", "99999 is not a port", ""},
		{"10.0.0.1:99999999999999999999", "is not a port", ""},
		{"10.0.0.1:http", "http is not a port", ""},
		{"10.0.0.1:8_0", "8_0 is not a port", ""},
		{"10.0.0.1:\u0668\u0660", "\u0668\u0660 is not a port", ""},
		{"10.0.0.1:80 send-proxy", "80 send-proxy is not a port", ""},
		{"10.0.0.1:80 # tail", "is not a port", ""},
		{"10.0.0.1:80'", "is not a port", ""},
		{"10.0.0.1:80\nhttp-request redirect location http://evil", "a URL stands", ""},
		{"10.0.0.1:80\n  bind :22", "is not an IP address", ""},
		{"10.0.0.1\x00:80", `"10.0.0.1\x00" is not an IP address`, ""},
		{"10.0.0.1:80\x00", "is not a port", ""},
		{"/var/run/docker.sock", "is not ip:port", "names are not resolved"},
		{"unix@/var/run/docker.sock:1", "is not an IP address", ""},
		{"abns@x", "is not ip:port", ""},
		{"fd@3:1", "is not an IP address", ""},
		{"999.1.1.1:80", "999.1.1.1 is not an IP address", "four numbers"},
		{"010.0.0.1:80", "is not an IP address", ""},
		{"10.1:80", "is not an IP address", ""},
		{"some.host:80", "some.host is not an IP address", "write the address; names are not resolved: etcdctl put /services/web/hosts/1 10.0.0.11:8080"},
		{"http://10.0.0.1:80/path", "a URL stands", "etcdctl put /services/web/hosts/1 10.0.0.1:80"},
		{"http://web.example.com/", "a URL stands", "10.0.0.11:8080"},
		{"[10.0.0.1]:80", "brackets", ""},
		{"[fd00::1:80", "brackets", ""},
		{"[fd00::1%eth0]:80", "zone", ""},
		{"[fe80::1]:80", "link-local", ""},
		{"[ff02::1]:80", "multicast", ""},
		{"[::]:80", "no address one can connect to", ""},
		{"[::1]:80", "loopback", ""},
		{"[::ffff:127.0.0.1]:80", "loopback", ""},
		{"[::ffff:169.254.169.254]:80", "link-local", ""},
		{"[::169.254.169.254]:80", "a detour to 169.254.169.254", ""},
		{"[64:ff9b::169.254.169.254]:80", "a detour to 169.254.169.254", ""},
		{"[64:ff9b::127.0.0.1]:80", "a detour to 127.0.0.1", ""},
		{"0.0.0.0:80", "no address one can connect to", ""},
		{"0.1.2.3:80", "no address one can connect to", ""},
		{"127.0.0.1:80", "loopback", ""},
		{"169.254.169.254:80", "link-local", ""},
		{"224.0.0.1:80", "multicast", ""},
		{"255.255.255.255:80", "broadcast", ""},
		{"100.100.100.200:80", "metadata", ""},
		{"[fd00:ec2::254]:80", "metadata", ""},
		{"192.168.0.1:80", "outside the allowed addresses", ""},
		{"10.0.0.1:80" + strings.Repeat(" ", maxValue), "the value is longer than 4096 bytes", ""},
		{strings.Repeat("a", 300), "is not ip:port", ""},
		{strings.Repeat("a", 20_000), "the value is longer than 4096 bytes", ""},
	} {
		web := build(policy, "web/hosts/1", tc.value, "web/scheme", "http").Service("web")
		checkProblem(t, tc.value, web, "/services/web/hosts/1", tc.reason, tc.remedy)
		if want := tc.reason == ""; want != (len(web.Endpoints) == 1) {
			t.Errorf("%s: endpoints are %v", text.Show(tc.value), web.Endpoints)
		}
	}
}

// checkProblem expects one problem, or none if reason is empty.
func checkProblem(t *testing.T, title string, s *Service, key, reason, remedy string) {
	t.Helper()
	if reason == "" {
		if len(s.Problems) != 0 {
			t.Errorf("%s: problems where none are expected: %+v", text.Show(title), s.Problems)
		}
		return
	}
	if len(s.Problems) != 1 {
		t.Errorf("%s: want one problem %q, got %+v", text.Show(title), reason, s.Problems)
		return
	}
	p := s.Problems[0]
	if p.Key != key || !strings.Contains(p.Reason, reason) || !strings.Contains(p.Remedy, remedy) {
		t.Errorf("%s: want problem at %s with reason %q and remedy %q, got %+v", text.Show(title), key, reason, remedy, p)
	}
}

func TestLoopbackIsAllowedByPolicy(t *testing.T) {
	p := Policy{Loopback: true, Allow: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}}
	s := build(p, "web/hosts/1", "127.0.0.7:80", "web/hosts/2", "[::1]:80", "web/hosts/3", "10.0.0.1:80", "web/scheme", "tcp").Service("web")
	if got := endpointsOf(s); got != "1=127.0.0.7:80 2=[::1]:80 3=10.0.0.1:80" || len(s.Problems) > 0 {
		t.Errorf("endpoints %s, problems %v", got, s.Problems)
	}
}

func TestOtherValues(t *testing.T) {
	policy := Policy{ReservedPorts: map[int]string{2379: "the store"}, LocalDomain: "local."}
	for _, tc := range []struct{ key, value, reason, remedy string }{
		{"scheme", "https", "", ""},
		{"scheme", "http-and-https", "", ""},
		{"scheme", "TCP", "TCP is not a scheme", "write http, tcp, https or http-and-https: etcdctl put /services/web/scheme tcp"},
		{"scheme", "ftp", "ftp is not a scheme", "etcdctl put /services/web/scheme http"},
		{"scheme", "", "the value is empty", ""},
		{"scheme", "http\nbind :22", `"http\nbind :22" is not a scheme`, ""},

		{"host_port", "1", "", ""},
		{"host_port", "65535\n", "", ""},
		{"host_port", "2379", "port 2379 is used by the store", "write another port: etcdctl put /services/web/host_port 9000"},
		{"host_port", "0", "is not a port", ""},
		{"host_port", "65536", "is not a port", ""},
		{"host_port", "+80", "is not a port", ""},
		{"host_port", "080", "is not a port", ""},
		{"host_port", "0.0.0.0:80", "is not a port", ""},

		{"private", "", "", ""},
		{"private", strings.Repeat("x", 10_000), "", ""},

		{"domains/1", "a.b", "", ""},
		{"domains/1", "*.a.b", "", ""},
		{"domains/1", "_x.ex-ample.com", "", ""},
		{"domains/1", "example", "has no dot", "etcdctl put /services/web/domains/1 www.example.com"},
		{"domains/1", "*.com", "whole top-level domain", "*.example.com"},
		{"domains/1", "*", "the star may only", ""},
		{"domains/1", "a.*.example.com", "the star may only", ""},
		{"domains/1", "a*.example.com", "the star may only", ""},
		{"domains/1", "*.*.example.com", "the star may only", ""},
		{"domains/1", "10.0.0.1", "is an IP address", ""},
		{"domains/1", "[::1]", "is an IP address", ""},
		{"domains/1", "*.0.0.1", "ends like an IP address", ""},
		{"domains/1", "10.0.1", "ends like an IP address", ""},
		{"domains/1", "example.com:80", "is not a host name", ""},
		{"domains/1", "example.com/x", "is not a host name", ""},
		{"domains/1", ".example.com", "is not a host name", ""},
		{"domains/1", "example..com", "is not a host name", ""},
		{"domains/1", "example.com.", "is not a host name", ""},
		{"domains/1", "-a.example.com", "is not a host name", ""},
		{"domains/1", "a-.example.com", "is not a host name", ""},
		{"domains/1", "a b.example.com", "is not a host name", ""},
		{"domains/1", "a.example.com\nb", "is not a host name", ""},
		{"domains/1", "z\u00fcrich.example.com", "is not a host name", ""},
		{"domains/1", strings.Repeat("a", 64) + ".com", "is not a host name", ""},
		{"domains/1", strings.Repeat("a.", 130) + "com", "longer than 253", ""},
		{"domains/1", "api.LOCAL", "names in local belong to the services", ""},
		{"domains/1", "*.x.local", "names in local belong to the services", ""},
		{"domains/1", "notlocal.example", "", ""},

		{"options", "{}", "", ""},
		{"options", `{"sticky": null, "max_connections": null, "balance": null, "timeout_server": null}`, "", ""},
		{"options", "", "the value is empty", `etcdctl put /services/web/options '{"balance": "roundrobin"}'`},
		{"options", "sticky", "not a JSON object: the mistake is at byte 1", ""},
		{"options", "null", "not a JSON object", ""},
		{"options", "[]", "not a JSON object", ""},
		{"options", "{} x", "not a JSON object: the mistake is at byte 4", ""},
		{"options", `{"sticky": "yes"}`, `sticky is "yes", but takes true or false`, `put /services/web/options '{"sticky":true}'`},
		{"options", `{"h2c": true, "timeout_server": 30}`, `timeout_server is 30, but takes a time in quotes, from "1s" to "24h"`, `'{"h2c":true,"timeout_server":"30s"}'`},
		{"options", `{"timeout_tunnel": "999ms"}`, "timeout_tunnel", ""},
		{"options", `{"timeout_tunnel": "24h1s"}`, "timeout_tunnel", ""},
		{"options", `{"timeout_tunnel": "-1h"}`, "timeout_tunnel", ""},
		{"options", `{"max_connections": 0}`, "takes a number from 1 to 100000", ""},
		{"options", `{"max_connections": 100001}`, "max_connections", ""},
		{"options", `{"max_connections": 1.5}`, "max_connections", ""},
		{"options", `{"balance": "random"}`, `balance is "random"`, ""},
		{"options", `{"balance": ""}`, "balance", ""},
		{"options", `{"stiky": true, "h2c": true}`, "unknown field stiky is ignored; the other fields apply",
			`use only balance, h2c, max_connections, retries, send_proxy, sticky, strip_path, timeout_server, timeout_tunnel: etcdctl put /services/web/options '{"h2c":true}'`},
		{"options", `{"a":1,"b":1,"c":1,"d":1,"e":1,"f":1,"\u0000":1}`, `field "\x00", a, b, c, d and 2 more`, ""},
		{"options", strings.Repeat(" ", maxOptions) + "{}", "longer than 16384 bytes", ""},
		{"options", strings.Repeat(" ", maxOptions-2) + "{}", "", ""},
		{"options", strings.Repeat("[", 10_000), "not a JSON object", ""},

		{"meta/1", `{"weight": 0, "zone": ""}`, "", ""},
		{"meta/1", `{"weight": 257}`, "takes a number from 0 to 256", ""},
		{"meta/1", `{"zone": "a\nb"}`, "zone", ""},
		{"meta/1", `{"zone": "` + strings.Repeat("a", 64) + `"}`, "zone", ""},
		{"meta/1", `{"wieght": 3}`, "unknown field wieght is ignored", "use only drain, weight, zone"},

		{"foo", "bar", "", ""},
		{"hosts/a/b", "10.0.0.1:80", "", ""},
		{"health/check", "/ping", "", ""},
		{"host/1", "10.0.0.9:80", "did you mean /services/web/hosts/1?", "etcdctl put /services/web/hosts/1 10.0.0.9:80 && etcdctl del /services/web/host/1"},
		{"Host/b", "no address", "did you mean /services/web/hosts/b?", "etcdctl put /services/web/hosts/b 10.0.0.11:8080 &&"},
		{"hosts", "10.0.0.9:80", "did you mean /services/web/hosts/1?", ""},
		{"hosts/", "10.0.0.9:80", "did you mean /services/web/hosts/1?", ""},
		{"endpoints", "10.0.0.9:80", "did you mean /services/web/hosts/1?", ""},
		{"port", "8080", "did you mean /services/web/host_port?", "etcdctl put /services/web/host_port 8080 &&"},
		{"hostport", "-1", "did you mean /services/web/host_port?", "etcdctl put /services/web/host_port 9000 &&"},
		{"host-port", "8080", "did you mean /services/web/host_port?", ""},
		{"host_port/1", "8080", "did you mean /services/web/host_port?", ""},
		{"Scheme", "http", "did you mean /services/web/scheme?", ""},
		{"Private", "", "did you mean /services/web/private?", ""},
		{"domain", "a.example.com", "did you mean /services/web/domains/1?", ""},
		{"option", "{}", "did you mean /services/web/options?", ""},
		{"meta", "{}", "did you mean /services/web/meta/1?", ""},
	} {
		kv := []string{"web/hosts/0", "10.0.0.1:80", "web/" + tc.key, tc.value}
		if tc.key != "scheme" {
			kv = append(kv, "web/scheme", "http")
		}
		checkProblem(t, tc.key+" "+tc.value, build(policy, kv...).Service("web"), "/services/web/"+tc.key, tc.reason, tc.remedy)
	}
}

func TestServiceNames(t *testing.T) {
	for _, tc := range []struct{ name, shown, reason string }{
		{"web", "web", ""},
		{"W-e_b9", "W-e_b9", ""},
		{"0x", "0x", ""},
		{strings.Repeat("a", 63), strings.Repeat("a", 63), ""},
		{strings.Repeat("a", 64), strings.Repeat("a", 64), "longer than 63"},
		{"", "", "the service name is empty"},
		{"10", "10", "digits only"},
		{"LocalHost", "LocalHost", "every machine's name"},
		{"-web", "-web", "letters and digits"},
		{"_web", "_web", "letters and digits"},
		{"web.de", "web.de", "letters and digits"},
		{"$(reboot)", "$(reboot)", "letters and digits"},
		{"a\nbind :22", `"a\nbind :22"`, "letters and digits"},
		{"\u00e9", `"\u00e9"`, "letters and digits"},
		{`a"b`, `"a\"b"`, "letters and digits"},
		{"a\x00", `"a\x00"`, "letters and digits"},
	} {
		snap := build(Policy{}, tc.name+"/hosts/1", "10.0.0.1:80", tc.name+"/scheme", "http")
		s := snap.Service(tc.shown)
		if s == nil || snap.Len() != 1 {
			t.Errorf("%q: not shown as %s", tc.name, tc.shown)
			continue
		}
		checkProblem(t, tc.name, s, "/services/"+tc.shown, tc.reason, "etcdctl del --prefix ")
		if s.Routable() != (tc.reason == "") {
			t.Errorf("%q: routable is %v", tc.name, s.Routable())
		}
	}
	long := build(Policy{}, strings.Repeat("x", 20_000)+"/scheme", "http", strings.Repeat("x", 20_001)+"/scheme", "http")
	if long.Len() != 2 {
		t.Errorf("two long names make %d services", long.Len())
	}
	for s := range long.All() {
		if len(s.Name) > shownLength || s.Routable() {
			t.Errorf("a long name is shown as %s", s.Name)
		}
	}
}

// A remedy is pasted into a shell: nothing in a name may act there.
func TestRemediesAreSafeToPaste(t *testing.T) {
	for name, want := range map[string]string{
		"$(reboot)":  `etcdctl del '/services/$(reboot)/scheme'`,
		"a'b;reboot": `etcdctl del '/services/a'\''b;reboot/scheme'`,
		"a\n'":       `etcdctl del $'/services/a\x0a\'/scheme'`,
	} {
		for s := range build(Policy{}, name+"/scheme", "http").All() {
			if got := s.Problems[0].Remedy; !strings.HasSuffix(got, want) {
				t.Errorf("%q: remedy is %s, want it to end in %s", name, got, want)
			}
		}
	}
}

func TestKeysOutsideServices(t *testing.T) {
	if s := build(Policy{}, "", "x", "web/", "dir"); s.Len() != 0 {
		t.Errorf("keys of no service make %d services", s.Len())
	}
	web := build(Policy{}, "web", "10.0.0.1:80").Service("web")
	checkProblem(t, "bare key", web, "/services/web", "did you mean /services/web/hosts/1?", "etcdctl put /services/web/hosts/1 10.0.0.1:80 && etcdctl del /services/web")
}

func TestScheme(t *testing.T) {
	none := build(Policy{}, "web/host_port", "80", "web/hosts/1", "10.0.0.1:80").Service("web")
	checkProblem(t, "no scheme", none, "/services/web/scheme", "the key is missing", "etcdctl put /services/web/scheme http")
	if none.Routable() || none.HostPort != 0 {
		t.Errorf("a service without scheme is routed: %+v", none)
	}
	empty := build(Policy{}, "web/scheme", "http").Service("web")
	checkProblem(t, "no hosts", empty, "", "", "")
	if !empty.Routable() || len(empty.Endpoints) != 0 {
		t.Errorf("a service without endpoints: %+v", empty)
	}
	misfit := build(Policy{}, "db/options", `{"sticky":true,"h2c":true,"send_proxy":true}`, "db/scheme", "tcp").Service("db")
	checkProblem(t, "misfit", misfit, "/services/db/options", "h2c, sticky cannot be had with scheme tcp", "")
	if misfit.Options != (Options{SendProxy: true}) {
		t.Errorf("options are %+v", misfit.Options)
	}
	if p := build(Policy{}, "db/domains/1", "a.b", "db/private", "", "db/scheme", "http").Service("db"); !p.Private || len(p.Domains) > 0 || len(p.Problems) > 0 {
		t.Errorf("a private service: %+v", p)
	}
}

func TestDuplicateEndpoints(t *testing.T) {
	s := build(Policy{}, "web/hosts/b", "10.0.0.1:80", "web/hosts/a", "[::ffff:10.0.0.1]:80", "web/scheme", "http").Service("web")
	checkProblem(t, "duplicate", s, "/services/web/hosts/b", "10.0.0.1:80 is already registered as hosts/a", "etcdctl del /services/web/hosts/b")
	if got := endpointsOf(s); got != "a=10.0.0.1:80" {
		t.Errorf("endpoints are %s", got)
	}
	var kv []string
	for i := range 40 {
		kv = append(kv, fmt.Sprintf("web/hosts/%02d", i), fmt.Sprintf("10.0.0.%d:80", i%20+1))
	}
	many := build(Policy{}, append(kv, "web/scheme", "http")...).Service("web")
	if len(many.Endpoints) != 20 || len(many.Problems) != 20 {
		t.Errorf("%d endpoints and %d problems, want 20 and 20", len(many.Endpoints), len(many.Problems))
	}
}

// Too many endpoints: the oldest stay, whatever their names.
func TestEndpointLimit(t *testing.T) {
	s := build(Policy{MaxEndpoints: 2}, "web/scheme", "http", "web/hosts/z", "10.0.0.1:80", "web/hosts/b", "10.0.0.2:80", "web/hosts/a", "10.0.0.3:80").Service("web")
	checkProblem(t, "limit", s, "/services/web/hosts", "may have 2 endpoints; the 1 newest are left out", "etcdctl get --keys-only --prefix /services/web/hosts/")
	if got := endpointsOf(s); got != "b=10.0.0.2:80 z=10.0.0.1:80" {
		t.Errorf("endpoints are %s", got)
	}
}

func TestEndpointNames(t *testing.T) {
	long := strings.Repeat("n", maxEndpointName+1)
	s := build(Policy{}, "web/scheme", "http", "web/hosts/a\nb", "10.0.0.1:80", "web/meta/a\nb", `{"weight":3}`, "web/hosts/"+long, "10.0.0.2:80",
		"web/hosts/ ok", "10.0.0.3:80").Service("web")
	if len(s.Endpoints) != 2 || s.Endpoints[0].Name != " ok" || s.Endpoints[1].Name != `"a\nb"` || s.Endpoints[1].Weight != 3 {
		t.Errorf("endpoints are %+v", s.Endpoints)
	}
	if len(s.Problems) != 1 || !strings.Contains(s.Problems[0].Reason, "longer than 255 bytes") {
		t.Errorf("problems are %+v", s.Problems)
	}
}

func TestProblemsAreBounded(t *testing.T) {
	var kv []string
	for i := range 300 {
		kv = append(kv, fmt.Sprintf("web/hosts/%03d", i), "bad")
	}
	s := build(Policy{}, append(kv, "web/scheme", "http")...).Service("web")
	if len(s.Problems) != maxProblems || !strings.Contains(s.Problems[maxProblems-1].Reason, "and 200 more problems") {
		t.Errorf("%d problems, the last is %+v", len(s.Problems), s.Problems[len(s.Problems)-1])
	}
	kv = nil
	for i := range maxDomains + 5 {
		kv = append(kv, fmt.Sprintf("web/domains/%d", i), fmt.Sprintf("d%d.example.com", i))
	}
	s = build(Policy{}, append(kv, "web/scheme", "http")...).Service("web")
	checkProblem(t, "domains", s, "/services/web/domains", "may have 1000 domains; the last 5 are left out", "--prefix /services/web/domains/")
	if len(s.Domains) != maxDomains {
		t.Errorf("%d domains", len(s.Domains))
	}
}

// FuzzParse writes any value to any key of a cluster that has another service,
// in place of a good value. Nothing it does may reach the other service or bring
// an endpoint into force that the policy refuses.
func FuzzParse(f *testing.F) {
	for _, s := range [][2]string{
		{"web/hosts/1", "10.0.0.1:80\nbind :22"}, {"web/hosts/1", "[::ffff:169.254.169.254]:80"}, {"web/hosts/\n", "10.0.0.9:80"},
		{"web/options", `{"sticky":true,"x\n":1}`}, {"web/meta/1", `{"zone":"é"}`}, {"web/scheme", "http # x"},
		{"web/domains/1", "*.EXAMPLE.com"}, {"web", ""}, {"we\xffb/scheme", "http"}, {"OTHER/scheme", "http"}, {"web/host_port", "9000"},
		{"x/host/'", "a'b"}, {"x/y/z", strings.Repeat("\x00", 5000)}, {"web/domains/2", "other.example.com"},
	} {
		f.Add(s[0], s[1])
	}
	policy := Policy{Allow: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8"), netip.MustParsePrefix("2001:db8::/32")}, ReservedPorts: map[int]string{22: "sshd"}}
	f.Fuzz(func(t *testing.T, key, value string) {
		b := NewBuilder(policy)
		base := put(
			"other/domains/1", "other.example.com", "other/host_port", "9000", "other/hosts/1", "10.0.0.2:80", "other/scheme", "http",
			"web/hosts/1", "10.0.0.1:80", "web/hosts/2", "10.0.0.3:80", "web/scheme", "http", "web/host_port", "9001")
		before := b.Apply(base).Service("other")
		snap := b.Apply(Batch{Revision: 100, Keys: []KeyValue{{Key: Prefix + key, Value: value, CreateRevision: 50, ModRevision: 100}}})
		if !strings.HasPrefix(key, "other/") && key != "other" && snap.Service("other") != before {
			t.Errorf("%q = %q changes another service", key, value)
		}
		for s := range snap.All() {
			checkSane(t, s, policy)
		}
		if web := snap.Service("web"); len(web.Endpoints) < 1 || web.Scheme == "" {
			t.Errorf("%q = %q breaks its service: %+v", key, value, web)
		}
		if again := NewBuilder(policy).Restore(100, saved(snap)); again.Len() > snap.Len() {
			t.Errorf("%d services restored of %d", again.Len(), snap.Len())
		}
	})
}

func checkSane(t *testing.T, s *Service, policy Policy) {
	t.Helper()
	texts := []string{s.Name, string(s.Scheme), string(s.Options.Balance)}
	var said []string
	for _, e := range s.Endpoints {
		a := e.Addr.Addr()
		if !e.Addr.IsValid() || e.Addr.Port() == 0 || a.Zone() != "" || a.Is4In6() ||
			!policy.Allow[0].Contains(a) && !policy.Allow[1].Contains(a) || e.Weight < 0 || e.Weight > 256 {
			t.Errorf("endpoint outside the policy: %+v", e)
		}
		texts = append(texts, e.Name, e.Zone)
	}
	for _, d := range s.Domains {
		texts = append(texts, d)
		if d != strings.ToLower(d) || !strings.Contains(d, ".") {
			t.Errorf("domain %q", d)
		}
	}
	for _, p := range s.Problems {
		said = append(said, p.Key, p.Value, p.Reason)
		texts = append(texts, p.Remedy)
		if p.Reason == "" || p.Remedy == "" || !strings.HasPrefix(p.Key, Prefix) || p.Value != text.Show(p.Value) && len(p.Value) > 10*shownLength {
			t.Errorf("incomplete problem %+v", p)
		}
	}
	for _, ascii := range texts {
		if !printable(ascii) {
			t.Errorf("%q is not printable ASCII, in %+v", ascii, s)
		}
	}
	for _, shown := range said {
		if strings.ContainsFunc(shown, func(r rune) bool { return !unicode.IsPrint(r) }) {
			t.Errorf("%q is not printable, in %+v", shown, s)
		}
	}
	if !s.Routable() && (s.HostPort != 0 || len(s.Domains) > 0) || s.HostPort == 22 || s.HostPort < 0 || s.HostPort > 65535 {
		t.Errorf("host port %d and domains %v with scheme %q", s.HostPort, s.Domains, s.Scheme)
	}
}

func saved(s *Snapshot) []SavedKey {
	var all []SavedKey
	for k := range s.Saved() {
		all = append(all, k)
	}
	return all
}
