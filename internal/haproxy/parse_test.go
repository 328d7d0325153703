package haproxy

import (
	"flag"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"
	"unicode"

	"github.com/google/go-cmp/cmp"
)

var update = flag.Bool("update", false, "rewrite testdata from the installed HAProxy versions")

// fixtures are the commands whose answers testdata keeps, by file name. HAProxy
// ran harness_test.go's configuration.
var fixtures = map[string]string{
	"servers": ServersState(""), "empty-backend": ServersState("tl.1"), "no-backend": ServersState("none"),
	"conns": "show servers conn hl.1", "stats": "show stat -1 2 -1", "info": "show info",
	"map": "show map MAP", "no-map": "show map /none", "get-map": "get map MAP web", "get-map-none": "get map MAP none",
}

var nodeName = regexp.MustCompile(`(?m)^(node: ).*`) // the machine's

func TestFixturesAreWhatHAProxySays(t *testing.T) {
	eachHAProxy(t, func(t *testing.T, h running) {
		dir := filepath.Join("testdata", fmt.Sprintf("%d.%d", h.version.Major, h.version.Minor))
		if *update {
			if err := os.MkdirAll(dir, 0o755); err != nil {
				t.Fatal(err)
			}
		}
		for name, command := range fixtures {
			text := h.ask(t, strings.ReplaceAll(command, "MAP", h.config.Map(HTTPMap))).Text
			text = strings.ReplaceAll(text, h.config.Dir, "/run/flotilla")
			text = nodeName.ReplaceAllString(text, "${1}test")
			path := filepath.Join(dir, name)
			if *update {
				if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			saved, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			if a, b := strings.Count(text, "\n"), strings.Count(string(saved), "\n"); a != b && name != "info" {
				t.Errorf("%s has %d lines, the fixture %d", name, a, b)
			}
		}
	})
}

// eachFixture runs the test with the answers of every version to one command.
func eachFixture(t *testing.T, name string, test func(t *testing.T, text string)) {
	paths, err := filepath.Glob("testdata/*/" + name)
	if err != nil || len(paths) < 3 {
		t.Fatalf("fixtures: %v, %v", paths, err)
	}
	for _, path := range paths {
		text, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		t.Run(filepath.Base(filepath.Dir(path)), func(t *testing.T) { test(t, string(text)) })
	}
}

func TestParseServers(t *testing.T) {
	eachFixture(t, "servers", func(t *testing.T, text string) {
		addr := netip.MustParseAddrPort
		want := map[string][]Server{
			"hl.1":   {{"s1", addr("127.0.0.1:9"), 100, Ready}, {"s2-h2-pp-m7", addr("[::1]:9"), 0, Ready}},
			"hcso.1": {{"s7", addr("127.0.0.1:9"), 256, Ready}},
		}
		got, err := ParseServers(text)
		if diff := cmp.Diff(want, got, cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b })); diff != "" || err != nil {
			t.Errorf("%v, (-want +got):\n%s", err, diff)
		}
	})
	eachFixture(t, "empty-backend", func(t *testing.T, text string) {
		if got, err := ParseServers(text); len(got) != 0 || err != nil {
			t.Errorf("%v, %v", got, err)
		}
	})
	eachFixture(t, "no-backend", func(t *testing.T, text string) {
		if got, err := ParseServers(text); err == nil {
			t.Errorf("no error, but %v", got)
		}
	})
}

func TestParseServerStates(t *testing.T) {
	const line = "3 hl.1 1 s1 127.0.0.1 2 %d 77 100 5 6 3 4 6 0 0 0 - 9 - 0 0 - - 0"
	for admin, want := range map[int]ServerState{
		0: Ready, 1: Maint, 2: Maint, 4: Ready, 8: Drain, 16: Drain, 9: Maint, 24: Drain, 32: Ready, // 4: the file had it parked; 32: the name does not resolve
	} {
		got, err := ParseServers(fmt.Sprintf(line, admin))
		if err != nil || len(got["hl.1"]) != 1 || got["hl.1"][0].State != want || got["hl.1"][0].Weight != 77 {
			t.Errorf("admin state %d: %v, %v, want %s", admin, got, err, want)
		}
	}
	for _, bad := range []string{"3 hl.1 1 s1 127.0.0.1 2 x 77 100 5 6 3 4 6 0 0 0 - 9", "3 hl.1 1 s1 127.0.0.1 2 0 77 100 5 6 3 4 6 0 0 0 - 99999", "Can't find backend."} {
		if got, err := ParseServers(bad); err == nil {
			t.Errorf("%q: %v", bad, got)
		}
	}
}

func TestParseMap(t *testing.T) {
	eachFixture(t, "map", func(t *testing.T, text string) {
		if diff := cmp.Diff(map[string]string{"web": "hl.1:web", "*.odd": "value with  spaces"}, ParseMap(text)); diff != "" {
			t.Errorf("(-want +got):\n%s", diff)
		}
	})
	for _, name := range []string{"no-map", "no-backend"} {
		eachFixture(t, name, func(t *testing.T, text string) {
			if got := ParseMap(text); len(got) != 0 {
				t.Errorf("an error is read as %v", got)
			}
		})
	}
	if got := ParseMap("0x1 a first\n0x2 a second\n0x3 novalue\n"); !maps.Equal(got, map[string]string{"a": "first"}) {
		t.Errorf("%v, want only the first a", got)
	}
}

func TestParseConns(t *testing.T) {
	eachFixture(t, "conns", func(t *testing.T, text string) {
		if got := ParseConns(text); !maps.Equal(got, map[string]int{"hl.1/s1": 0, "hl.1/s2-h2-pp-m7": 0}) {
			t.Errorf("%v", got)
		}
		was, is := " 9 - 5000 0 ", " 9 - 5000 12 "
		if strings.Contains(text, " served ") { // a column more since 3.4
			was, is = " 9 - 5000 0 0 ", " 9 - 5000 0 12 "
		}
		busy := strings.Replace(text, was, is, 1)
		if got := ParseConns(busy)["hl.1/s1"]; busy == text || got != 12 {
			t.Errorf("%d connections in %q, want 12", got, busy)
		}
	})
}

func TestParseStats(t *testing.T) {
	eachFixture(t, "stats", func(t *testing.T, text string) {
		rows := map[string]map[string]string{}
		for _, row := range ParseStats(text) {
			rows[row["pxname"]] = row
			for _, column := range []string{"svname", "scur", "qcur", "stot", "bin", "bout", "econ", "eresp", "wretr", "wredis", "mode"} {
				if row[column] == "" {
					t.Errorf("%s has no %s", row["pxname"], column)
				}
			}
		}
		for name, mode := range map[string]string{"hl.1": "http", "hcso.1": "http", "tl.1": "tcp", "node": "http"} {
			if rows[name]["mode"] != mode || rows[name]["svname"] != "BACKEND" {
				t.Errorf("%s: %v", name, rows[name])
			}
		}
	})
}

func TestParseInfo(t *testing.T) {
	eachFixture(t, "info", func(t *testing.T, text string) {
		info := ParseInfo(text)
		v, err := ParseVersion(info["Version"])
		if err != nil || fmt.Sprintf("%d.%d", v.Major, v.Minor) != filepath.Base(t.Name()) {
			t.Errorf("%+v, %v", v, err)
		}
		if info["Pid"] == "" || info["Uptime_sec"] == "" || info["Maxconn"] != "100" {
			t.Errorf("%v", info)
		}
	})
}

func TestParseVersion(t *testing.T) {
	for text, want := range map[string]Version{
		"2.6.12-1+deb12u4": {2, 6, "2.6.12-1+deb12u4"},
		"3.4.7-1":          {3, 4, "3.4.7-1"},
		"3.5-dev5":         {3, 5, "3.5-dev5"},
		"HAProxy version 3.5-dev5-1234ab-12 2026/01/01 - https://haproxy.org/":       {3, 5, "3.5-dev5-1234ab-12"},
		"HAProxy version 3.0.11-1~bpo12+1 2026/05/20 - https://haproxy.org/\nStatus": {3, 0, "3.0.11-1~bpo12+1"},
		"HA-Proxy version 1.8.30 2021/04/12":                                         {1, 8, "1.8.30"},
	} {
		if got, err := ParseVersion(text); got != want || err != nil {
			t.Errorf("%q: %+v, %v, want %+v", text, got, err, want)
		}
	}
	for _, text := range []string{"", "HAProxy", "99999999999999999999.1", "1.99999999999999999999"} {
		if got, err := ParseVersion(text); err == nil {
			t.Errorf("%q: %+v, want an error", text, got)
		}
	}
	for v, can := range map[[2]int][2]bool{{2, 6}: {false, false}, {2, 9}: {false, false}, {3, 0}: {true, false}, {3, 3}: {true, false}, {3, 4}: {true, true}, {4, 0}: {true, true}} {
		is := Version{Major: v[0], Minor: v[1]}
		if is.DeletesServers() != can[0] || is.MakesBackends() != can[1] {
			t.Errorf("%v deletes servers %v, makes backends %v", v, is.DeletesServers(), is.MakesBackends())
		}
	}
}

func FuzzServerName(f *testing.F) {
	f.Add(1, true, true, 7, "s1-h2-pp-m7")
	for _, s := range []string{"s0", "s", "s1-", "s01", "s1-pp-h2", "s1-h2-h2", "s1-m0", "s1-m07", "s1-m-1", "s+1", "S1", "s1--pp", "s-1", "s99999999999999999999", "s1-m"} {
		f.Add(5, false, false, 0, s)
	}
	f.Fuzz(func(t *testing.T, n int, h2, pp bool, maxConn int, name string) {
		n, maxConn = max(1, n), max(0, maxConn)
		o := ServerOptions{H2: h2, SendProxy: pp, MaxConn: maxConn}
		gotN, gotO, ok := ParseServerName(ServerName(n, o))
		if gotN != n || gotO != o || !ok {
			t.Errorf("%s: %d %+v %v", ServerName(n, o), gotN, gotO, ok)
		}
		if n, o, ok := ParseServerName(name); ok && ServerName(n, o) != name {
			t.Errorf("%q is taken for %s", name, ServerName(n, o))
		}
	})
}

// FuzzParse holds what is read to what was said: nothing comes out that is not in
// the text, and what comes out reads the same when it is said again.
func FuzzParse(f *testing.F) {
	paths, err := filepath.Glob("testdata/[0-9]*/*")
	if err != nil || len(paths) == 0 {
		f.Fatalf("fixtures: %v", err)
	}
	for _, path := range paths {
		text, err := os.ReadFile(path)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(string(text))
	}
	f.Add("# bkname/svname used_cur\nx\n")
	f.Add("# a,b\n\n,,,,\n")
	f.Fuzz(func(t *testing.T, text string) {
		servers, err := ParseServers(text)
		if err != nil && servers != nil {
			t.Errorf("servers and an error: %v", err)
		}
		for backend, list := range servers {
			for _, server := range list {
				if !server.Addr.IsValid() || !strings.Contains(text, backend) || !strings.Contains(text, server.Name) || server.Addr.Addr().Is4In6() {
					t.Errorf("server %+v of backend %q", server, backend)
				}
			}
		}
		var again strings.Builder
		entries := ParseMap(text)
		for key, value := range entries {
			fmt.Fprintf(&again, "0x1 %s %s\n", key, value)
		}
		if got := ParseMap(again.String()); !maps.Equal(got, entries) {
			t.Errorf("map %q is read again as %q", entries, got)
		}
		again.Reset()
		info := ParseInfo(text)
		for key, value := range info {
			fmt.Fprintf(&again, "%s: %s\n", key, value)
		}
		if got := ParseInfo(again.String()); !maps.Equal(got, info) {
			t.Errorf("info %q is read again as %q", info, got)
		}
		for server := range ParseConns(text) {
			if strings.ContainsFunc(server, unicode.IsSpace) || !strings.Contains(text, server) {
				t.Errorf("connections of %q", server)
			}
		}
		for _, row := range ParseStats(text) {
			for column, value := range row {
				if value == "" || !strings.Contains(text, value) || strings.ContainsAny(column+value, ",\n") {
					t.Errorf("statistics %q: %q", column, value)
				}
			}
		}
		if v, err := ParseVersion(text); err == nil {
			if again, err := ParseVersion(v.Full); err != nil || again != v || !strings.Contains(text, v.Full) {
				t.Errorf("version %+v is read again as %+v, %v", v, again, err)
			}
		}
		if a := parseAnswer(text); a.Severity < 0 || a.Severity > 7 || !strings.Contains(text, a.Text) {
			t.Errorf("answer %+v", a)
		}
		if backend, service := RouteOwner(text); !strings.HasPrefix(text, backend) || strings.Contains(backend+service, ":") {
			t.Errorf("route owner %q, %q", backend, service)
		}
		if c, ok := ClassOf(text); ok && !strings.HasPrefix(text, c.Code()+".") {
			t.Errorf("class %+v", c)
		}
	})
}

func TestRouteRoundTrip(t *testing.T) {
	for _, r := range []Route{
		{Backend: "hl.1", Service: "web"}, {Backend: Redirect, Service: "Web_1-x"},
		{Backend: "hlo.web", Service: "web", StripPath: true}, {Backend: "hlo.1", Service: "w", TimeoutServer: 5000, TimeoutTunnel: 86400000, NoRetries: true},
	} {
		backend, service := RouteOwner(r.String())
		if backend != r.Backend || service != r.Service || strings.ContainsAny(r.String(), " ;\n") {
			t.Errorf("%+v: %q gives %s and %s", r, r, backend, service)
		}
	}
	if got := (Route{Backend: "hlo.1", Service: "w", StripPath: true, TimeoutTunnel: 7}).String(); got != "hlo.1:w:1:0:7:0" {
		t.Errorf("fields are in another order than the configuration reads them: %s", got)
	}
}

func TestClassesHaveDistinctCodes(t *testing.T) {
	seen := map[string]bool{}
	for _, c := range Classes {
		if back, ok := ClassOf(c.BackendName("x.y")); !ok || back != c || seen[c.Code()] {
			t.Errorf("%+v: code %s, read as %+v", c, c.Code(), back)
		}
		seen[c.Code()] = true
	}
	for _, name := range []string{"node", "http", "", ".", "x.1", "hl", "HL.1"} {
		if c, ok := ClassOf(name); ok {
			t.Errorf("%q is taken for %+v", name, c)
		}
	}
}

func TestRenderRefusesWordsThatNeedQuotes(t *testing.T) {
	good := Config{Node: "n1", Dir: "/run/x", Address: netip.MustParseAddr("127.0.0.1"), AccessLog: "10.0.0.1:514 format raw"}
	if _, err := good.Render(); err != nil {
		t.Fatal(err)
	}
	for _, bad := range []string{"a b", "a\nb", "a\tb", "a#b", `a"b`, "a'b", `a\b`, "a$b", "a)b", "a%b", "a{b", "é", "a\x00"} {
		for i := range 5 {
			c := good
			*[]*string{&c.Node, &c.Dir, &c.OpsSocket, &c.User, &c.Group}[i] = bad
			if text, err := c.Render(); err == nil {
				t.Errorf("field %d %q is taken: %d bytes", i, bad, len(text))
			}
		}
		c := good
		if c.AccessLog = bad; !slices.Contains(strings.Fields("a b a\nb a\tb"), strings.Fields(bad)[0]) {
			if _, err := c.Render(); err == nil {
				t.Errorf("access log %q is taken", bad)
			}
		}
	}
}

func TestAppendBackend(t *testing.T) {
	var text []byte
	for _, be := range testBackends() {
		text = AppendBackend(text, be)
	}
	want := `backend hl.1 from class-hl
    server s1 127.0.0.1:9 id 1 weight 100 pool-max-conn -1 pool-purge-delay 5s
    server s2-h2-pp-m7 [::1]:9 id 2 weight 0 pool-max-conn -1 pool-purge-delay 5s proto h2 send-proxy-v2 maxconn 7
backend hcso.1 from class-hcso
    server s7 127.0.0.1:9 id 7 weight 256 pool-max-conn -1 pool-purge-delay 5s
backend tl.1 from class-tl
`
	if diff := cmp.Diff(want, string(text)); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	if got := AppendBackend([]byte("x"), Backend{Name: "tl.1"}); !reflect.DeepEqual(got, []byte("xbackend tl.1 from class-tl\n")) {
		t.Errorf("%q", got)
	}
}
