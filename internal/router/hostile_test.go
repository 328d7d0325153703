package router

import (
	"cmp"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"flotilla/internal/catalog"
	"flotilla/internal/text"
)

// hostileValues are values that must do nothing but make a problem, by the key
// that holds them. HAProxy's own parsers take most of the addresses.
func hostileValues(b *bed) map[string][]string {
	long := strings.Repeat("a", 20_000)
	directives := "127.0.0.1:80\nfrontend evil\n    bind 0.0.0.0:6666\n    http-request redirect location http://evil/"
	return map[string][]string{
		"hosts/": {
			"127.0.0.1", ":8080", "127.0.0.1:0", "127.0.0.1:+80", "127.0.0.1:080", "127.0.0.1:99999", "127.0.0.1:-1", "127.0.0.1:80x", "127.0.0.1:8 0",
			"/var/run/docker.sock", "unix@/var/run/docker.sock", "abns@x", "fd@3", "sockpair@3", "ipv4@127.0.0.1:80", "127.0.0.1:80 send-proxy", "127.0.0.1:80;show info",
			directives, "127.0.0.1:80\r\nshutdown sessions", "127.0.0.1:80#", "127.0.0.1:80 # x", `"127.0.0.1:80"`, "'127.0.0.1:80", `127.0.0.1\:80`, "127.0.0.1:80\\",
			"\x00", "127.0.0.1:80\x00x", "é:80", "１２７.0.0.1:80", "999.1.1.1:80", "0.0.0.0:80", "255.255.255.255:80", "169.254.169.254:80", "[::]:80", "[fe80::1%lo]:80", "::1:80", "[::1]",
			"some.host:80", "$HOME:80", "${HOME}:80", "%[src]:80", "127.0.0.1:80 <<\nx", "http://127.0.0.1:80", long, long + ":80", "",
		},
		"scheme": {"HTTP", "http\nbind :6666", "http;x", "udp", "h2", "http tcp", "\x00", long, "", "hl.1", "é"},
		"host_port": {
			"0", "-1", "+80", "65536", "99999", "08080", "80 90", "7002,7003", "7000-7010", "0x50", "1e3", "７０００", "22\nx", "22", "80", fmt.Sprint(b.cfg.HTTPPort),
			fmt.Sprint(b.cfg.BalancerPort), fmt.Sprint(b.cfg.RedirectPort), "7001", "7002", "7003", long, "", "*",
		},
		"domains/": {
			"*.com", "*", "*.*.example", "a*.example", "web", "com", "127.0.0.1", "[::1]", "web.local", "*.local", "www.api.example", "*.both.example", "a b.example",
			"a.example/x", "a.example:80", "a.example\nb.example x", "a.example hl.1:web", "-a.example", "é.example", "a..example", ".example", "a.example.1", long, "a.example;", "a.example\\", "",
		},
		"options": {
			"{", "[]", "null", "1", `"x"`, `{"balance":"first"}`, `{"balance":"leastconn\nserver x 1.2.3.4:80"}`, `{"max_connections":-1}`, `{"max_connections":1e30}`,
			`{"timeout_server":"1ms"}`, `{"timeout_server":"99999h"}`, `{"timeout_server":5}`, `{"timeout_tunnel":"-1s"}`, `{"sticky":"yes"}`, `{"h2c":1}`,
			strings.Repeat(`{"a":`, 5000), strings.Repeat("[", 15_000), `{"x":"` + long + `"}`, `{"strip_path":true}}`, `{"unknown":"field"}`, "\x00", "{\"sticky\":true,\"sticky\":2}",
		},
		"meta/": {`{"weight":-1}`, `{"weight":257}`, `{"weight":1e99}`, `{"weight":"50%"}`, `{"drain":"x"}`, `{"zone":"a\nb"}`, "x", long, "[]"},
	}
}

// hostileNames are service names that are problems whatever their keys hold.
var hostileNames = []string{
	"hl.1", "node:x", "a.b", "a b", "a%b", "a%20b", "a;b", "a\nb", "a\\", "a<<", "a\"b", "a'b", "../web", "..", ".", "-a", "_a", "*", "é", "\x00", "\xff", "1", "127", "localhost", "LOCALHOST",
	strings.Repeat("n", 64), strings.Repeat("n", 20_000), ">", "#", "$x", "a:b", "a,b", "a\tb", "WEB", "Api", "bOTH", "secure ", " web",
}

// hostileKey makes one key that must be a problem. The service is one of its own
// or a healthy one.
func hostileKey(r *rand.Rand, values map[string][]string, healthy []string) (key, value string) {
	if r.IntN(4) == 0 {
		name := hostileNames[r.IntN(len(hostileNames))]
		return name + "/" + []string{"scheme", "scheme", "hosts/1", "host_port"}[r.IntN(4)], "http"
	}
	kinds := slices.Sorted(func(yield func(string) bool) {
		for k := range values {
			if !yield(k) {
				return
			}
		}
	})
	kind := kinds[r.IntN(len(kinds))]
	value = values[kind][r.IntN(len(values[kind]))]
	service := fmt.Sprintf("evil%d", r.IntN(8))
	if r.IntN(2) == 0 {
		service = healthy[r.IntN(len(healthy))]
		// A healthy service already holds the ports and domains that are valid.
		if kind == "host_port" || kind == "domains/" {
			if _, f := strconv.Atoi(value); f == nil || strings.HasSuffix(value, ".example") {
				service = "evil0"
			}
		}
	}
	key = service + "/" + kind
	if strings.HasSuffix(kind, "/") {
		key += []string{"1", "evil", "e vil", "é;", "<<"}[r.IntN(5)]
	}
	return key, value
}

// nameServer is a TCP endpoint that says its name and closes.
func nameServer(t *testing.T, name string) string {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			_, _ = io.WriteString(conn, name)
			_ = conn.Close()
		}
	}()
	return l.Addr().String()
}

func (b *bed) portAnswer(port int) string {
	conn, err := net.DialTimeout("tcp", netip.AddrPortFrom(b.cfg.Address, uint16(port)).String(), 5*time.Second)
	if err != nil {
		return err.Error()
	}
	defer func() { _ = conn.Close() }()
	_ = conn.SetDeadline(time.Now().Add(5 * time.Second))
	text, err := io.ReadAll(conn)
	if err != nil {
		return err.Error()
	}
	return string(text)
}

// listeners returns what the processes listen on: TCP addresses as in
// /proc/net/tcp, and unix sockets.
func listeners(t *testing.T, pids ...int) []string {
	t.Helper()
	inodes := map[string]bool{}
	for _, pid := range pids {
		dir := fmt.Sprintf("/proc/%d/fd", pid)
		fds, err := os.ReadDir(dir)
		if err != nil {
			t.Fatal(err)
		}
		for _, fd := range fds {
			if link, err := os.Readlink(filepath.Join(dir, fd.Name())); err == nil {
				if inode, ok := strings.CutPrefix(link, "socket:["); ok {
					inodes[strings.TrimSuffix(inode, "]")] = true
				}
			}
		}
	}
	var found []string
	for _, file := range []struct {
		path                       string
		inode, state, address, min int
		listening                  string
	}{
		{"/proc/net/tcp", 9, 3, 1, 10, "0A"}, {"/proc/net/tcp6", 9, 3, 1, 10, "0A"},
		{"/proc/net/udp", 9, 3, 1, 10, "07"}, {"/proc/net/unix", 6, 3, 7, 8, "00010000"},
	} {
		text, err := os.ReadFile(file.path)
		if err != nil {
			t.Fatal(err)
		}
		for line := range strings.SplitSeq(string(text), "\n") {
			f := strings.Fields(line)
			if len(f) >= file.min && inodes[f[file.inode]] && f[file.state] == file.listening {
				// HAProxy renames its sockets when it takes over from another worker.
				name, _, _ := strings.Cut(f[file.address], ".sock.")
				found = append(found, file.path+" "+strings.TrimSuffix(name, ".sock"))
			}
		}
	}
	slices.Sort(found)
	return slices.Compact(found)
}

// healthyBed has one healthy service of every kind, and a check that each is
// answered by its own endpoint on every way that leads to it.
func healthyBed(t *testing.T, binary string) (b *bed, names []string, check func(when string)) {
	b = newBed(t, testConfig(t, binary))
	policy := catalog.Policy{Loopback: true, LocalDomain: "local", ReservedPorts: map[int]string{22: "ssh", 80: "http", 443: "https"}}
	for _, port := range []int{b.cfg.HTTPPort, b.cfg.HTTPSPort, b.cfg.BalancerPort, b.cfg.RedirectPort, b.cfg.SNIPort} {
		policy.ReservedPorts[port] = "the router"
	}
	b.builder = catalog.NewBuilder(policy)
	names = []string{"web", "api", "secure", "both", "hidden", "db"}
	keys := []string{"db/scheme tcp", "db/hosts/1 " + nameServer(t, "db"), "db/host_port 7002"}
	for name, more := range map[string][]string{
		"web": {"scheme http"}, "api": {"scheme http", "host_port 7001", "domains/1 www.api.example", `options {"balance":"roundrobin","retries":false}`}, "secure": {"scheme https"},
		"both": {"scheme http-and-https", "domains/w *.both.example"}, "hidden": {"scheme http", "private yes", "host_port 7003"},
	} {
		keys = append(keys, name+"/hosts/1 "+endpoint(t, name))
		for _, k := range more {
			keys = append(keys, name+"/"+k)
		}
	}
	b.put(keys...)
	b.wait()
	check = func(when string) {
		t.Helper()
		for _, c := range []struct {
			port       int
			host, path string
			want       string
		}{
			{b.cfg.HTTPPort, "web.local", "/", "web"}, {b.cfg.HTTPPort, "x.y", "/web/z", "web"}, {b.cfg.HTTPPort, "WEB", "/", "web"},
			{b.cfg.HTTPPort, "api.any.domain", "/", "api"}, {b.cfg.HTTPPort, "www.api.example", "/", "api"}, {b.cfg.HTTPPort, "10.0.0.1", "/api", "api"}, {7001, "z", "/", "api"},
			{b.cfg.HTTPPort, "secure.local", "/", "301"}, {b.cfg.HTTPPort, "both.local", "/", "both"}, {b.cfg.HTTPPort, "q.both.example", "/", "both"},
			{b.cfg.HTTPPort, "hidden.local", "/", "404"}, {b.cfg.HTTPPort, "x", "/hidden", "404"}, {7003, "x", "/", "hidden"},
			{b.cfg.HTTPPort, "db.local", "/", "404"}, {b.cfg.HTTPPort, "localhost", "/", "404"}, {b.cfg.HTTPPort, "www.com", "/", "404"}, {b.cfg.HTTPPort, "127.0.0.1", "/", "404"},
		} {
			if got := b.answer(c.port, c.host, c.path); got != c.want {
				t.Fatalf("%s: port %d host %s path %s: got %s, want %s", when, c.port, c.host, c.path, got, c.want)
			}
		}
		for host, want := range map[string]string{"secure.local": "secure", "a.both.example": "both", "web.local": "404"} {
			if got := b.tlsAnswer(host); got != want {
				t.Fatalf("%s: https %s: got %s, want %s", when, host, got, want)
			}
		}
		if got := b.portAnswer(7002); got != "db" {
			t.Fatalf("%s: port 7002: got %s, want db", when, got)
		}
	}
	return b, names, check
}

// putKeys is put for keys that may hold anything. A key that exists keeps its
// create revision, as in the store.
func (b *bed) putKeys(keys ...catalog.KeyValue) *catalog.Snapshot {
	created := map[string]int64{}
	if snapshot, _ := b.feed.Next(); snapshot != nil {
		for svc := range snapshot.All() {
			for _, k := range svc.Keys {
				created[svc.Name+"/"+k.Name] = k.CreateRevision
			}
		}
	}
	b.revision++
	for i, k := range keys {
		keys[i].CreateRevision, keys[i].ModRevision = cmp.Or(created[k.Key], b.revision), b.revision
		keys[i].Key = catalog.Prefix + k.Key
	}
	s := b.builder.Apply(catalog.Batch{Revision: b.revision, Now: time.Now(), Keys: keys})
	b.feed.Publish(s)
	return s
}

// isProblem reports whether the key that was written at a revision has a problem.
func isProblem(s *catalog.Snapshot, key string, revision int64) bool {
	service, name, _ := strings.Cut(key, "/")
	for svc := range s.All() {
		at := slices.IndexFunc(svc.Keys, func(k catalog.Key) bool { return k.ModRevision == revision && k.Name == name })
		if at < 0 || svc.Name != service && !strings.HasPrefix(svc.Name, `"`) && !strings.HasSuffix(svc.Name, "...") {
			continue
		}
		for _, p := range svc.Problems {
			if strings.HasSuffix(p.Key, "/"+text.Show(name)) || p.Key == catalog.Prefix+svc.Name {
				return true
			}
			// One problem stands for all keys with the same domain.
			if strings.HasPrefix(name, "domains/") && p.Value == strings.ToLower(strings.TrimSpace(svc.Keys[at].Value)) {
				return true
			}
		}
	}
	return false
}

// TestHostileValuesChangeNothing writes hostile keys beside healthy services and
// into them. Everything healthy is served as before, nothing more listens, the
// file stays valid, and each hostile key is a problem.
func TestHostileValuesChangeNothing(t *testing.T) {
	eachHAProxy(t, func(t *testing.T, binary string) {
		t.Parallel()
		b, healthy, check := healthyBed(t, binary)
		check("before")
		var before []string
		eventually(t, func() string { // the master listens a moment later
			if before = listeners(t, b.pid(), b.master()); !strings.Contains(fmt.Sprint(before), "/master") {
				return fmt.Sprintf("listeners: %v", before)
			}
			return ""
		})
		reloads := b.router.Status().Reloads
		seed := uint64(time.Now().UnixNano())
		t.Logf("seed %d", seed)
		r := rand.New(rand.NewPCG(seed, 0))
		values := hostileValues(b)
		written := map[string]int64{}
		for i := range 8 {
			b.putKeys(catalog.KeyValue{Key: fmt.Sprintf("evil%d/scheme", i), Value: []string{"http", "tcp", "https", "http-and-https"}[i%4]})
		}
		for round := range 25 {
			batch := map[string]catalog.KeyValue{}
			for key := range written {
				if r.IntN(8) == 0 && !strings.HasSuffix(key, "/hosts/1") && !strings.HasSuffix(key, "/scheme") && !strings.HasSuffix(key, "/host_port") && !strings.HasSuffix(key, "/options") && !strings.HasSuffix(key, "/domains/1") {
					batch[key] = catalog.KeyValue{Key: key, Deleted: true}
				}
			}
			for range 1 + r.IntN(15) {
				key, value := hostileKey(r, values, healthy)
				batch[key] = catalog.KeyValue{Key: key, Value: value}
			}
			var keys []catalog.KeyValue
			for key, kv := range batch {
				written[key] = b.revision + 1
				if kv.Deleted {
					delete(written, key)
				}
				keys = append(keys, kv)
			}
			snapshot := b.putKeys(keys...)
			b.wait()
			check(fmt.Sprintf("round %d: %.2000s", round, fmt.Sprintf("%q", slices.Collect(maps.Keys(batch)))))
			for key, revision := range written {
				if !isProblem(snapshot, key, revision) {
					service, _, _ := strings.Cut(key, "/")
					t.Errorf("round %d: %q is no problem: %+v", round, key, snapshot.Service(service))
				}
			}
			for i := range 8 {
				if got := b.answer(b.cfg.HTTPPort, fmt.Sprintf("evil%d.local", i), "/"); got != "503" && got != "404" && got != "301" {
					t.Errorf("round %d: evil%d is answered by %s", round, i, got)
				}
			}
			eventually(t, func() string { // /proc does not show all sockets at one moment
				if after := listeners(t, b.pid(), b.master()); !slices.Equal(after, before) {
					return fmt.Sprintf("round %d: listeners were %v, are %v", round, before, after)
				}
				return ""
			})
			if round%8 == 7 {
				b.checkFile()
			}
			if t.Failed() {
				return
			}
		}
		if s := b.router.Status(); s.Reloads != reloads || len(s.Problems) > 0 || s.Err != "" {
			t.Errorf("status %+v, want %d reloads", s, reloads)
		}
		b.checkFile()
		pid := b.pid()
		if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		eventually(t, func() string {
			if s := b.router.Status(); !s.Serving || s.Pid == pid {
				return fmt.Sprintf("not back: %+v", s)
			}
			return ""
		})
		check("after kill -9")
		eventually(t, func() string {
			if after := listeners(t, b.pid(), b.master()); !slices.Equal(after, before) {
				return fmt.Sprintf("after kill -9: listeners were %v, are %v", before, after)
			}
			return ""
		})
	})
}

// checkFile waits until the files are written and has HAProxy check them.
func (b *bed) checkFile() {
	b.t.Helper()
	eventually(b.t, func() string {
		clean := make(chan bool, 1)
		b.router.requests <- func() { clean <- !b.router.disk.stale && len(b.router.disk.jobs) == 0 }
		if !<-clean {
			return "the files lag"
		}
		return ""
	})
	out, err := exec.Command(b.cfg.Binary, "-c", "-f", filepath.Join(b.cfg.Dir, "haproxy.cfg")).CombinedOutput()
	if err != nil {
		b.t.Errorf("the file is not valid: %v: %s", err, out)
	}
}
