package router

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"flotilla/internal/child"
)

const inNamespace = "FLOTILLA_TEST_NAMESPACE"

// ownNamespace runs the test again in a network namespace of its own and reports
// whether this is the run outside.
func ownNamespace(t *testing.T) (outside bool) {
	t.Helper()
	if os.Getenv(inNamespace) != "" {
		return false
	}
	if os.Geteuid() != 0 {
		t.Fatal("nftables and network namespaces need root: run the tests as root")
	}
	ctx, cancel := context.WithTimeout(t.Context(), 4*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "unshare", "-n", "--kill-child", os.Args[0], "-test.run=^"+t.Name()+"$", "-test.v", "-test.parallel=8")
	cmd.Env = append(os.Environ(), inNamespace+"=1")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("in a network namespace: %v\n%s", err, out)
	}
	return true
}

// run runs a command and returns its output.
func run(t *testing.T, argv ...string) string {
	t.Helper()
	out, err := exec.Command(argv[0], argv[1:]...).CombinedOutput()
	if err != nil {
		t.Errorf("%s: %v: %s", strings.Join(argv, " "), err, out)
	}
	return string(out)
}

// nftHosts are the last parts of our addresses, one for each HAProxy version.
var nftHosts = [...]string{"1", "3", "4"}

// neighbour makes a second network namespace, 10.77.0.2 and fd77::2, beside this
// one, 10.77.0.N and fd77::N. It returns the id of a process in it.
func neighbour(t *testing.T) string {
	t.Helper()
	run(t, "ip", "link", "set", "lo", "up")
	cmd := exec.Command("unshare", "-n", "sleep", "300")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	pid := strconv.Itoa(cmd.Process.Pid)
	ours, err := os.Readlink("/proc/self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, func() string {
		if theirs, err := os.Readlink("/proc/" + pid + "/ns/net"); err != nil || theirs == ours {
			return "the second namespace is not there"
		}
		return ""
	})
	run(t, "ip", "link", "add", "v1", "type", "veth", "peer", "name", "v2", "netns", pid)
	in := func(argv ...string) { run(t, append([]string{"nsenter", "-t", pid, "-n"}, argv...)...) }
	for _, host := range nftHosts {
		run(t, "ip", "addr", "add", "10.77.0."+host+"/24", "dev", "v1")
		run(t, "ip", "addr", "add", "fd77::"+host+"/64", "dev", "v1", "nodad")
	}
	run(t, "ip", "link", "set", "v1", "up")
	in("ip", "addr", "add", "10.77.0.2/24", "dev", "v2")
	in("ip", "addr", "add", "fd77::2/64", "dev", "v2", "nodad")
	in("ip", "link", "set", "v2", "up")
	return pid
}

func TestNftables(t *testing.T) {
	t.Parallel()
	if ownNamespace(t) {
		return
	}
	other := neighbour(t)
	for i, binary := range haproxies(t) {
		t.Run(filepath.Base(filepath.Dir(binary)), func(t *testing.T) {
			t.Parallel()
			testNftables(t, binary, netip.MustParseAddr("10.77.0."+nftHosts[i]), other)
		})
		t.Run(filepath.Base(filepath.Dir(binary))+" IPv6", func(t *testing.T) {
			t.Parallel()
			testIPv6(t, binary, netip.MustParseAddr("fd77::"+nftHosts[i]))
		})
	}
}

// testIPv6 checks what a node with an IPv6 address does about host_ports: its
// HAProxy cannot tell the original port of a redirected connection.
func testIPv6(t *testing.T, binary string, address netip.Addr) {
	cfg := testConfig(t, binary)
	cfg.HostPorts, cfg.Address = "auto", address
	b := newBed(t, cfg)
	b.put("a/scheme tcp", "a/host_port 7001", "a/hosts/1 "+tcpEndpoint(t, "a1"), "web/scheme http", "web/hosts/1 "+endpoint(t, "web"))
	b.wait()
	b.put("b/scheme http", "b/host_port 7002", "b/hosts/1 "+endpoint(t, "b1"))
	b.wait()
	if got := b.tcpAnswer(7001) + " " + b.answer(7002, "what.ever", "/x") + " " + b.answer(8080, "web.example", "/"); got != "a1 b1 web" {
		t.Errorf("answers: %s", got)
	}
	if s := b.router.Status(); s.HostPorts != "listeners" || s.Reloads != 1 || len(s.Problems) != 0 {
		t.Errorf("host ports by %s, %d reloads, problems %v", s.HostPorts, s.Reloads, s.Problems)
	}
	cfg.HostPorts = "nftables"
	p := hostPorts{}
	if err := p.prepare(t.Context(), cfg, nil, nil); err == nil || !strings.Contains(err.Error(), "IPv6") {
		t.Errorf("nftables on IPv6: %v", err)
	}
}

func testNftables(t *testing.T, binary string, address netip.Addr, other string) {
	cfg := testConfig(t, binary)
	cfg.HostPorts, cfg.Address = "nftables", address
	b := newBed(t, cfg)
	table := "ip flotilla_" + strings.ReplaceAll(address.String(), ".", "_")
	tableIs := func() bool {
		return exec.Command("nft", append([]string{"list", "table"}, strings.Fields(table)...)...).Run() == nil
	}
	at := func(port int) string { return netip.AddrPortFrom(cfg.Address, uint16(port)).String() }
	// fromOutside is what a client in the other namespace gets.
	fromOutside := func(port int) string {
		out, err := exec.Command("nsenter", "-t", other, "-n", "curl", "-gsS", "-m", "5", "http://"+at(port)+"/x").CombinedOutput()
		word, _, _ := strings.Cut(string(out), " ")
		if err != nil {
			return "closed"
		}
		return word
	}

	b.put("a/scheme tcp", "a/host_port 7001", "a/hosts/1 "+tcpEndpoint(t, "a1"))
	b.wait()
	if got := b.tcpAnswer(7001); got != "a1" {
		t.Fatalf("port 7001: %s", got)
	}
	conn := b.dial(7001)
	n := 0
	alive := func(when string) {
		t.Helper()
		n++
		if got, want := exchangeLine(t, conn, fmt.Sprint(n)), fmt.Sprint("a1 ", n); got != want {
			t.Fatalf("%s: got %q, want %q", when, got, want)
		}
	}
	alive("at first")
	b.put("web/scheme http", "web/private 1", "web/host_port 7002", "web/hosts/1 "+endpoint(t, "web"))
	b.put("b/scheme tcp", "b/host_port 7003", "b/hosts/1 "+endpoint(t, "b1"))
	b.wait()
	if s := b.router.Status(); s.Reloads != 0 || s.HostPorts != "nftables" || len(s.Problems) > 0 {
		t.Errorf("%d reloads (%s), host ports by %s, problems %v", s.Reloads, s.LastReload, s.HostPorts, s.Problems)
	}
	for port, want := range map[int]string{7002: "web", 7003: "b1"} {
		if got := b.answer(port, "what.ever", "/x"); got != want {
			t.Errorf("from this node, port %d: %s, want %s", port, got, want)
		}
		if got := fromOutside(port); got != want {
			t.Errorf("from another machine, port %d: %s, want %s", port, got, want)
		}
	}
	if _, body, _ := b.get(7002, "what.ever", "/"); shown(body, "x-forwarded-port") != "7002" {
		t.Errorf("X-Forwarded-Port: %s", body)
	}
	alive("ports were added")

	// From TCP to HTTP and away.
	b.put("-b/host_port", "-web/host_port", "web/host_port 7003")
	b.wait()
	if got := b.answer(7003, "what.ever", "/x") + " " + fromOutside(7003) + " " + fromOutside(7002); got != "web web closed" {
		t.Errorf("moved: %s", got)
	}

	// A port that another program has stays its own.
	l, err := net.Listen("tcp", at(7004))
	if err != nil {
		t.Fatal(err)
	}
	echoLines(t, l, "stranger")
	b.put("c/scheme tcp", "c/host_port 7004", "c/hosts/1 "+tcpEndpoint(t, "c1"))
	b.wait()
	if p := b.router.Status().Problems; b.tcpAnswer(7004) != "stranger" || len(p) != 1 {
		t.Errorf("the port of another program answers %s; problems %v", b.tcpAnswer(7004), p)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	// Meanwhile somebody removes the table, and a port from the set.
	run(t, append([]string{"nft", "delete", "table"}, strings.Fields(table)...)...)
	b.hurryChecks()
	eventually(t, func() string {
		if got := fmt.Sprint(b.tcpAnswer(7001), " ", b.answerOr(7003), " ", b.tcpAnswer(7004)); got != "a1 web c1" {
			return "after the table was removed and a port was freed: " + got
		}
		return ""
	})
	alive("the table was removed and came back")
	run(t, append(append([]string{"nft", "delete", "element"}, strings.Fields(table)...), "tcp_ports", "{ 7001 }")...)
	b.hurryChecks()
	eventually(t, func() string {
		if got := b.tcpAnswer(7001); got != "a1" {
			return "after a port was removed from the set: " + got
		}
		return ""
	})
	alive("a port was removed and came back")

	// The next node process finds everything as it is; a stop for good tidies up.
	b.halt(child.ErrLeave)
	if got := b.tcpAnswer(7001); got != "a1" || !tableIs() {
		t.Errorf("while the node's process is away: %s", got)
	}
	b.start()
	b.put("a/hosts/2 " + tcpEndpoint(t, "a2"))
	b.wait()
	alive("the node's process was replaced")
	b.put("-a/host_port")
	b.wait()
	if got := b.tcpAnswer(7001); got != "closed" {
		t.Errorf("port 7001 without a service: %s", got)
	}
	alive("its port was taken from the service")
	b.halt(nil)
	if tableIs() {
		t.Error("the table stays after the node was stopped")
	}
}

// answerOr is answer for a port that may be closed.
func (b *bed) answerOr(port int) string {
	status, body, _ := send(b.t, b.caller(port, ""), "GET", "http://what.ever/", "")
	if status == 0 {
		return "closed"
	}
	word, _, _ := strings.Cut(body, " ")
	return word
}

func TestNftablesMissing(t *testing.T) {
	t.Parallel()
	cfg := testConfig(t, haproxies(t)[0])
	p := hostPorts{}
	cfg.HostPorts = "nftables"
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(errors.New("nft cannot be run"))
	if err := p.prepare(ctx, cfg, nil, nil); err == nil || !strings.Contains(err.Error(), "--host-ports=listeners") {
		t.Errorf("without nft: %v", err)
	}
}
