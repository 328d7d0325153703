package nspawn

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"flotilla/internal/nodeconfig"
	"flotilla/internal/provision"
)

func TestFreeNetwork(t *testing.T) {
	for _, tc := range []struct{ used, want string }{
		{"", "10.77.0.0/24"},
		{"192.168.1.0/24 10.77.1.0/24", "10.77.0.0/24"},
		{"10.77.0.0/24 10.77.1.0/24", "10.77.2.0/24"},
		{"10.77.0.128/25 10.77.1.9/32", "10.77.2.0/24"},
		{"10.77.0.0/17", "10.77.128.0/24"},
		{"10.0.0.0/8", ""},
	} {
		var used []netip.Prefix
		for field := range strings.FieldsSeq(tc.used) {
			used = append(used, netip.MustParsePrefix(field))
		}
		got, err := freeNetwork(used)
		if tc.want == "" {
			if err == nil {
				t.Errorf("besides %s: %s, want an error", tc.used, got)
			}
			continue
		}
		if err != nil || got.String() != tc.want {
			t.Errorf("besides %q: %s, %v, want %s", tc.used, got, err, tc.want)
		}
	}
}

func TestRoutedNetworks(t *testing.T) {
	const table = `default via 192.168.1.1 dev eth0
192.168.1.0/24 dev eth0 proto kernel scope link src 192.168.1.9
unreachable 172.16.0.0/12
10.77.0.0/16 dev wg0
local 192.168.1.9 dev eth0 table local proto kernel scope host src 192.168.1.9

`
	var want []netip.Prefix
	for _, p := range []string{"192.168.1.0/24", "172.16.0.0/12", "10.77.0.0/16", "192.168.1.9/32"} {
		want = append(want, netip.MustParsePrefix(p))
	}
	if got := routedNetworks(table); !slices.Equal(got, want) {
		t.Errorf("%v, want %v", got, want)
	}
}

func TestDropsForwarded(t *testing.T) {
	const chain = "table ip filter {\n\tchain FORWARD {\n\t\ttype filter hook forward priority filter; policy %s;\n%s\t}\n}\n"
	for _, tc := range []struct {
		policy, rules string
		want          bool
	}{
		{"accept", "", false}, {"drop", "", true}, {"drop", "\t\tiifname \"docker0\" accept\n", true}, {"drop", "\t\tiifname \"fl-*\" accept\n", false},
	} {
		if got := dropsForwarded(fmt.Sprintf(chain, tc.policy, tc.rules)); got != tc.want {
			t.Errorf("policy %s and %q: %t", tc.policy, tc.rules, got)
		}
	}
}

func TestNames(t *testing.T) {
	for name, good := range map[string]bool{
		"n1": true, "a": true, "my-cluster": true, strings.Repeat("a", 30): true,
		"": false, "-a": false, "a-": false, "A": false, "a.b": false, "a/b": false, "..": false, "a_b": false, "a b": false, strings.Repeat("a", 31): false,
	} {
		if err := checkName("cluster", name); (err == nil) != good {
			t.Errorf("%q: %v", name, err)
		}
	}
	h := Default(slog.New(slog.DiscardHandler))
	seen := map[string]string{}
	for _, name := range []string{"demo", "eight-88", "a-name-of-thirty-characters-ab", "a-name-of-thirty-characters-ac"} {
		c, err := h.Cluster(name)
		if err != nil {
			t.Fatal(err)
		}
		link := machine{Index: lastIndex}.link(c)
		if len(link) > 15 {
			t.Errorf("%s of %s is too long for a network interface", link, name)
		}
		if other := seen[c.bridge()]; other != "" {
			t.Errorf("%s and %s have the same bridge", name, other)
		}
		seen[c.bridge()] = name
		if socket := c.runDir(strings.Repeat("n", 30)) + "/node.sock"; len(socket) > 107 {
			t.Errorf("%s is too long for a socket", socket)
		}
	}
}

func TestFreeIndex(t *testing.T) {
	taken := map[int]bool{11: true, 12: true, 15: true}
	for name, want := range map[string]int{"n3": 13, "n1": 13, "web": 13, "n5": 13, "n7": 17, "n244": 254, "n245": 13, "n0": 13, "n10": 20} {
		if got := freeIndex(name, taken); got != want {
			t.Errorf("%s gets %d, want %d", name, got, want)
		}
	}
	for i := firstIndex; i <= lastIndex; i++ {
		taken[i] = true
	}
	if got := freeIndex("n1", taken); got != 0 {
		t.Errorf("%d although none is free", got)
	}
}

func TestSources(t *testing.T) {
	for _, tc := range []struct{ what, targets, want string }{
		{"Debian 12", "http://deb.debian.org/debian/|bookworm|main\nhttp://deb.debian.org/debian/|bookworm-updates|main\nhttp://deb.debian.org/debian-security/|bookworm-security|main\n",
			"deb http://deb.debian.org/debian trixie main\ndeb http://deb.debian.org/debian-security trixie-security main"},
		{"a mirror and other repositories", "https://deb.nodesource.com/node_20.x/|nodistro|main\nhttps://mirror.example/debian/|stable|contrib\nhttps://mirror.example/debian/|stable|main\n",
			"deb https://mirror.example/debian trixie main"},
		{"Ubuntu", "http://archive.ubuntu.com/ubuntu/|noble|main\nhttp://security.ubuntu.com/ubuntu/|noble-security|main\n",
			"deb http://deb.debian.org/debian trixie main\ndeb http://deb.debian.org/debian-security trixie-security main"},
		{"no apt", "", "deb http://deb.debian.org/debian trixie main\ndeb http://deb.debian.org/debian-security trixie-security main"},
	} {
		if got := sources("trixie", tc.targets); got != tc.want+"\n" {
			t.Errorf("%s:\n%s\nwant\n%s", tc.what, got, tc.want)
		}
	}
}

func TestAptOptions(t *testing.T) {
	const dump = `Acquire "";
Acquire::cdrom::mount "/media/cdrom/";
Acquire::http "";
Acquire::http::Proxy "http://proxy.example:3128";
Acquire::https::Verify-Peer "true";
Acquire::Check-Valid-Until "false";
Acquire::IndexTargets::deb::Packages::Optional "0";
Acquire::Languages:: "en";
`
	want := []string{
		`--aptopt=Acquire::http::Proxy "http://proxy.example:3128";`, `--aptopt=Acquire::https::Verify-Peer "true";`, `--aptopt=Acquire::Check-Valid-Until "false";`,
		`--aptopt=Dir::Etc::netrc "/etc/apt/auth.conf"`, `--aptopt=Dir::Etc::netrcparts "/etc/apt/auth.conf.d"`,
	}
	if diff := cmp.Diff(want, aptOptions(dump)); diff != "" {
		t.Error(diff)
	}
	if got := aptOptions("Acquire \"\";\n"); got != nil {
		t.Errorf("%q for a host without settings", got)
	}
}

func TestSystemdVersion(t *testing.T) {
	for text, want := range map[string]int{"systemd 252 (252.39-1~deb12u2)\n+PAM +AUDIT\n": 252, "systemd 257~rc1-2\n": 257, "systemd 249.11-0ubuntu3\n": 249, "what": 0} {
		if got := systemdVersion(text); got != want {
			t.Errorf("%q: %d, want %d", text, got, want)
		}
	}
}

// A cluster is what the rest of the program expects of every platform.
var _ provision.Provider = (*Cluster)(nil)

func TestDial(t *testing.T) {
	h := here(t)
	c, err := h.Cluster("a")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(c.runDir("n1"), 0o755); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("unix", c.runDir("n1")+"/x.sock")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	conn, err := c.Dial(t.Context(), "n1", "/run/flotilla/x.sock")
	if err != nil {
		t.Fatal(err)
	}
	_ = conn.Close() // nothing was said
	if _, err := c.Dial(t.Context(), "n1", "/run/x.sock"); err == nil {
		t.Error("a socket elsewhere was reached")
	}
}

func TestNameservers(t *testing.T) {
	got := nameservers("# comment\nnameserver 127.0.0.53\nnameserver 10.0.0.2\nnameserver ::1\noptions edns0\nnameserver 9.9.9.9\n")
	if want := []netip.Addr{netip.MustParseAddr("10.0.0.2"), netip.MustParseAddr("9.9.9.9")}; !slices.Equal(got, want) {
		t.Errorf("%v, want %v", got, want)
	}
}

// here returns a host whose directories are the test's.
func here(t *testing.T) *Host {
	dir := t.TempDir()
	return &Host{State: dir + "/state/clusters", Cache: dir + "/cache", Run: dir + "/run", Log: slog.New(slog.DiscardHandler)}
}

func TestRecords(t *testing.T) {
	h := here(t)
	c, err := h.Cluster("a")
	if err != nil {
		t.Fatal(err)
	}
	if _, _, err := c.Labels(); !errors.Is(err, provision.ErrNotFound) || c.Exists() {
		t.Errorf("before it is founded: %v", err)
	}
	if err := c.Found(t.Context(), map[string]string{"nodes": "3"}); err != nil {
		t.Fatal(err)
	}
	labels, prefix, err := c.Labels()
	if err != nil || labels["nodes"] != "3" || prefix.Bits() != 24 {
		t.Errorf("%v %s %v", labels, prefix, err)
	}
	m, err := c.reserve(t.Context(), provision.Spec{Name: "n2", Release: "trixie", Labels: map[string]string{"k": "v"}}, "/image")
	if err != nil || m.Address != hostAddress(prefix, 12) || m.State != stateMaking {
		t.Fatalf("%+v %v", m, err)
	}
	again, err := c.reserve(t.Context(), provision.Spec{Name: "n2"}, "/other")
	if err != nil || again.MachineID != m.MachineID || again.Image != "/image" {
		t.Errorf("the second time: %+v, %v", again, err)
	}
	other, err := h.Cluster("b")
	if err != nil {
		t.Fatal(err)
	}
	second, err := other.reserve(t.Context(), provision.Spec{Name: "n2"}, "/image")
	if err != nil || prefix.Contains(second.Address) || second.MachineID == m.MachineID {
		t.Errorf("another cluster gets %+v, %v", second, err)
	}
	names, err := h.Clusters()
	if err != nil || !slices.Equal(names, []string{"a", "b"}) {
		t.Errorf("clusters %v, %v", names, err)
	}
	list, err := c.List(t.Context())
	if err != nil || len(list) != 1 || list[0].Complete || list[0].Running || list[0].Labels["k"] != "v" {
		t.Errorf("list %+v, %v", list, err)
	}

	// A directory without a record: somebody was killed at the very start or end.
	if err := os.MkdirAll(c.machineDir("n3"), 0o700); err != nil {
		t.Fatal(err)
	}
	if m, err := readMachine(c.machineDir("n3")); err != nil || m.State != stateLeaving {
		t.Errorf("without a record: %+v, %v", m, err)
	}
	if err := os.WriteFile(filepath.Join(c.machineDir("n2"), "machine.json"), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := c.List(t.Context()); err == nil || !strings.Contains(err.Error(), "is damaged") {
		t.Errorf("a damaged record: %v", err)
	}
}

func TestUnknown(t *testing.T) {
	c, err := here(t).Cluster("a")
	if err != nil {
		t.Fatal(err)
	}
	for what, err := range map[string]error{
		"power on": c.Power(t.Context(), "n1", provision.PowerOn), "power cut": c.Power(t.Context(), "n1", provision.PowerCut),
		"reboot": c.Power(t.Context(), "n1", provision.Reboot), "link": c.SetLink(t.Context(), "n1", false),
	} {
		if !errors.Is(err, provision.ErrNotFound) || !strings.Contains(err.Error(), "machine n1: ") {
			t.Errorf("%s: %v", what, err)
		}
	}
	if _, err := c.Console(t.Context(), "n1"); !errors.Is(err, provision.ErrNotFound) {
		t.Errorf("console: %v", err)
	}
	if err := c.Run(t.Context(), "n1", "true", provision.Streams{}); !errors.Is(err, provision.ErrNotFound) {
		t.Errorf("run: %v", err)
	}
	if _, err := c.Make(t.Context(), provision.Spec{Name: "../x"}); err == nil {
		t.Error("a machine with a bad name was made")
	}
	if _, err := c.Make(t.Context(), provision.Spec{Name: "x", Release: "potato"}); err == nil || !strings.Contains(err.Error(), "trixie") {
		t.Errorf("an old release: %v", err)
	}
}

func TestLock(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "d")
	if _, err := lock(t.Context(), dir); !errors.Is(err, provision.ErrNotFound) {
		t.Errorf("no directory: %v", err)
	}
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	first, err := lock(t.Context(), dir)
	if err != nil {
		t.Fatal(err)
	}
	short, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := lock(short, dir); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("the second lock: %v", err)
	}
	waiting := make(chan error, 1)
	go func() {
		_, err := lock(t.Context(), dir)
		waiting <- err
	}()
	if err := os.Remove(dir); err != nil {
		t.Fatal(err)
	}
	first.release()
	if err := <-waiting; !errors.Is(err, provision.ErrNotFound) {
		t.Errorf("a directory removed while somebody waited: %v", err)
	}
}

func TestPut(t *testing.T) {
	dir := t.TempDir()
	m := machine{dir: filepath.Join(dir, "m"), Image: filepath.Join(dir, "image")}
	if err := errors.Join(os.MkdirAll(filepath.Join(m.dir, "upper"), 0o755), os.MkdirAll(m.Image+"/etc/deep", 0o755), os.Chmod(m.Image+"/etc/deep", 0o711), os.Symlink("etc", m.Image+"/link")); err != nil {
		t.Fatal(err)
	}
	if err := m.put(nodeconfig.File{Path: "/etc/deep/new/x", Text: "hello", Mode: 0o600}); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]os.FileMode{"/etc/deep": 0o711, "/etc/deep/new": 0o755, "/etc/deep/new/x": 0o600} {
		if info, err := os.Stat(m.upper(path)); err != nil || info.Mode().Perm() != want {
			t.Errorf("%s: %v, %v, want %v", path, info.Mode(), err, want)
		}
	}
	for _, path := range []string{"relative", "/link/x"} {
		if err := m.put(nodeconfig.File{Path: path, Text: "hello"}); err == nil {
			t.Errorf("%s was written", path)
		}
	}
}
