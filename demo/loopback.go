package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"flotilla/bench/harness"
)

// loopback are three nodes on loopback addresses, and sample backends. Whatever it
// starts has dir in its command line: so the next demo finds it if this one is killed.
type loopback struct {
	*story
	dir       string
	addrs     [4]string // three nodes, and the sample backends
	endpoints []string  // of backends that do not run yet
}

func newLoopback(s *story, place int) (world, error) {
	l := &loopback{story: s, dir: filepath.Join(os.TempDir(), fmt.Sprintf("flotilla-demo-%d-%d", os.Getuid(), place))}
	for i := range l.addrs {
		l.addrs[i] = fmt.Sprintf("127.0.0.%d", 10*place+i+1)
	}
	if _, err := os.Lstat(l.dir); err == nil {
		s.say("Removing what an earlier demo left in %s.", l.dir)
		if err := l.cleanUp(); err != nil {
			return nil, err
		}
	}
	return l, os.Mkdir(l.dir, 0o755) // and not MkdirAll: a directory that somebody else made is refused
}

// running returns the processes with text in their command line.
func running(text string) (pids []int) {
	files, _ := filepath.Glob("/proc/[0-9]*/cmdline") // the pattern is good
	for _, f := range files {
		raw, err := os.ReadFile(f)
		if pid, _ := strconv.Atoi(filepath.Base(filepath.Dir(f))); err == nil && strings.Contains(string(raw), text) {
			pids = append(pids, pid)
		}
	}
	return pids
}

// end kills processes at once, and returns when they are gone. Those with text in
// their command line that start meanwhile stay.
func end(pids []int, text string) error {
	for _, pid := range pids {
		if err := syscall.Kill(pid, syscall.SIGKILL); err != nil && !errors.Is(err, syscall.ESRCH) {
			return fmt.Errorf("kill process %d: %w", pid, err)
		}
	}
	return until(context.Background(), "killed processes to be gone", func() error {
		for _, pid := range running(text) {
			if slices.Contains(pids, pid) {
				return fmt.Errorf("process %d does not end", pid)
			}
		}
		return nil
	})
}

// kill shows and does it.
func (l *loopback) kill(text, what string, least int) error {
	pids := running(text)
	if len(pids) < least {
		return fmt.Errorf("%d processes of %s run, not %d", len(pids), what, least)
	}
	l.command("kill -9 " + strings.Trim(fmt.Sprint(pids), "[]") + "   # " + what)
	return end(pids, text)
}

func (l *loopback) remove() error {
	l.say("\nStopping everything and removing %s.", l.dir)
	return l.cleanUp()
}

// cleanUp ends every process of the place and removes the directory, and what a
// node that was killed leaves in the kernel.
func (l *loopback) cleanUp() error {
	// Again, for what a node has started before it was killed itself.
	for pids := running(l.dir + "/"); len(pids) > 0; pids = running(l.dir + "/") {
		if err := end(pids, l.dir+"/"); err != nil {
			return err
		}
	}
	for _, addr := range l.addrs {
		// Refused where there is none, and where we never could make one.
		_ = exec.Command("nft", "delete", "table", "ip", "flotilla_"+strings.ReplaceAll(addr, ".", "_")).Run()
	}
	return os.RemoveAll(l.dir)
}

// echoPort is the host_port of the sample TCP service, among the ports of nodes.
const echoPort = "echo"

// usualPorts are those of every node by the flag that changes them.
var usualPorts = map[string]int{
	"http-port": 80, "https-port": 443, "dns-port": 53, "balancer-port": 9180, "redirect-port": 9181,
	"store-client-port": 2379, "store-peer-port": 2380, echoPort: 7007,
}

// choosePorts takes the usual ports if they can be had on all the addresses, or
// else the next set that can, and says why it had to.
func choosePorts(addrs []string) (ports map[string]int, flags []string, why error) {
	for offset := 0; offset <= 40000; offset += 8000 {
		ports, flags = map[string]int{}, nil
		var refused error
		for flag, port := range usualPorts {
			ports[flag] = port + offset
			if offset > 0 && flag != echoPort {
				flags = append(flags, fmt.Sprintf("--%s=%d", flag, port+offset))
			}
			refused = errors.Join(refused, bindable(addrs, port+offset))
		}
		refused = errors.Join(refused, bindable(addrs, ports["redirect-port"]+1)) // it has two
		if refused == nil {
			slices.Sort(flags)
			return ports, flags, why
		}
		why = errors.Join(why, refused)
	}
	return nil, nil, why
}

// bindable reports what keeps a port from being listened on, TCP and UDP.
func bindable(addrs []string, port int) error {
	for _, a := range addrs {
		addr := net.JoinHostPort(a, strconv.Itoa(port))
		l, err := net.Listen("tcp", addr)
		if err != nil {
			return err
		}
		u, err := net.ListenPacket("udp", addr)
		if err != nil {
			return errors.Join(err, l.Close())
		}
		if err := errors.Join(l.Close(), u.Close()); err != nil {
			return err
		}
	}
	return nil
}

func (l *loopback) up(ctx context.Context) (nodes []*node, err error) {
	l.step("Three nodes on this machine")
	l.say("  Each has a store (etcd), a router (HAProxy) and a DNS server of its own.")
	ports, flags, why := choosePorts(l.addrs[:3])
	if ports == nil {
		return nil, fmt.Errorf("no ports for the nodes: %w", why)
	}
	l.say("  ports    http %d, https %d, DNS %d, balancer's check %d, store %d",
		ports["http-port"], ports["https-port"], ports["dns-port"], ports["balancer-port"], ports["store-client-port"])
	if why != nil {
		reason, _, _ := strings.Cut(why.Error(), "\n")
		l.say("           because of the usual ones not all can be had: %s", reason)
	}
	l.say("  data     %s/n1, n2, n3", l.dir)
	l.say("  logs     %s/*.log", l.dir)
	for i, addr := range l.addrs[:3] {
		n := &node{name: fmt.Sprintf("n%d", i+1), addr: addr, ports: ports}
		n.argv = append([]string{harness.Daemon(l.binary), "node", "--name=" + n.name, "--address=" + addr, "--data=" + l.data(n), "--socket=" + l.data(n) + ".sock"}, flags...)
		if i > 0 {
			n.argv = append(n.argv, "--join="+l.addrs[0])
		}
		nodes = append(nodes, n)
		if err := l.start(ctx, n); err != nil {
			return nodes, err
		}
	}
	if err := l.whole(ctx, nodes[0], 3); err != nil {
		return nodes, err
	}
	_, err = l.run(ctx, l.flotilla(nodes[0], "nodes list"))
	return nodes, err
}

func (l *loopback) data(n *node) string { return filepath.Join(l.dir, n.name) }

func (l *loopback) start(ctx context.Context, n *node) error {
	l.command(strings.Join(n.argv, " "))
	log := l.data(n) + ".log"
	process, err := harness.Start(log, n.argv[0], n.argv[1:]...)
	if err != nil {
		return err
	}
	ctx, cancel := process.While(ctx)
	defer cancel()
	if err := until(ctx, n.name+" to serve", func() error { return n.check("/readyz") }); err != nil {
		return fmt.Errorf("%w\nits log ends: %s", err, harness.LastLine(log))
	}
	return nil
}

// whole waits until so many nodes serve and so many live members of the store
// vote, with a leader among them. It asks this node.
func (l *loopback) whole(ctx context.Context, n *node, want int) error {
	return until(ctx, fmt.Sprintf("%d nodes to serve and as many members of the store to vote", want), func() error {
		var list struct {
			Nodes []struct{ Serving bool }
			Store struct {
				Members []struct{ Reachable, Learner, Leader bool }
			}
		}
		if err := harness.Ask(ctx, l.data(n)+".sock", http.MethodGet, "/v1/nodes", nil, &list); err != nil {
			return err
		}
		serving, voting, leading := 0, 0, 0
		for _, v := range list.Nodes {
			if v.Serving {
				serving++
			}
		}
		for _, m := range list.Store.Members {
			if m.Reachable && !m.Learner {
				voting++
			}
			if m.Reachable && m.Leader {
				leading++
			}
		}
		if serving < want || voting < want || leading != 1 {
			return fmt.Errorf("%d serve, %d vote, %d lead", serving, voting, leading)
		}
		return nil
	})
}

// flotilla returns a command line that asks a node.
func (l *loopback) flotilla(n *node, args string) string {
	return l.binary + " --socket " + l.data(n) + ".sock " + args
}

// etcdctl shows and runs commands on the node's store.
func (l *loopback) etcdctl(ctx context.Context, n *node, commands ...string) error {
	for _, args := range commands {
		if _, err := l.run(ctx, "etcdctl --endpoints http://"+n.at("store-client-port")+" "+args); err != nil {
			return err
		}
	}
	return nil
}

func (l *loopback) serve(ctx context.Context) ([]kind, error) {
	l.step("Two services, written with plain etcdctl")
	for port := 9001; len(l.endpoints) < 5; port++ {
		if bindable(l.addrs[3:], port) == nil {
			l.endpoints = append(l.endpoints, net.JoinHostPort(l.addrs[3], strconv.Itoa(port)))
		}
		if port > 60000 {
			return nil, errors.New("no ports for the sample backends")
		}
	}
	if out, err := exec.Command("etcdctl", "version").CombinedOutput(); err != nil || !strings.Contains(string(out), "API version: 3") {
		l.command("export ETCDCTL_API=3") // which is not the usual one everywhere
		if err := os.Setenv("ETCDCTL_API", "3"); err != nil {
			return nil, err
		}
	}
	var puts []string
	for _, service := range [][2]string{{"web", "http"}, {"echo", "tcp"}} {
		puts = append(puts, "put /services/"+service[0]+"/scheme "+service[1])
		for n := range 2 {
			put, err := l.startBackend(ctx, service[0], service[1], n+1)
			if err != nil {
				return nil, err
			}
			puts = append(puts, put)
		}
	}
	puts = append(puts, fmt.Sprintf("put /services/echo/host_port %d", l.nodes[0].ports[echoPort]))
	if err := l.etcdctl(ctx, l.nodes[0], puts...); err != nil {
		return nil, err
	}
	kinds, began := []kind{kept, byPath, echo}, time.Now()
	for _, k := range kinds {
		for _, n := range l.nodes {
			if err := l.untilAnswer(ctx, n, k, ""); err != nil {
				return nil, err
			}
		}
	}
	l.say("  %s after the last put had returned, all three nodes route both services.", took(time.Since(began)))
	return kinds, nil
}

// startBackend starts a sample backend on the next address. It returns, when that
// listens, what puts it into the store.
func (l *loopback) startBackend(ctx context.Context, service, scheme string, n int) (put string, err error) {
	name, addr := fmt.Sprintf("%s-%d", service, n), l.endpoints[0]
	l.endpoints = l.endpoints[1:]
	// A program below dir: its command line says whose it is.
	self, err := filepath.Abs(l.backend)
	if err != nil {
		return "", err
	}
	program := filepath.Join(l.dir, name)
	if err := os.Symlink(self, program); err != nil {
		return "", err
	}
	args := []string{"-name", name, "-work", "5ms", "-http", addr} // some work, so that a kill finds requests under way
	if scheme == "tcp" {
		args = []string{"-name", name, "-http", "", "-tcp", addr}
	}
	if _, err := harness.Start(program+".log", program, args...); err != nil {
		return "", err
	}
	return fmt.Sprintf("put /services/%s/hosts/%d %s", service, n, addr), until(ctx, name+" to listen", func() error {
		c, err := net.Dial("tcp", addr)
		if err != nil {
			return err
		}
		return c.Close()
	})
}

func (l *loopback) looks(n *node) [][2]string {
	return [][2]string{
		{"curl -sS -H 'Host: web.example.com' " + n.url("/"), ": GET / host=web.example.com "},
		{"curl -sS " + n.url("/web"), ": GET /web host=" + n.addr},
		{fmt.Sprintf("echo hello | nc -N %s %d", n.addr, n.ports[echoPort]), "hello"},
		{l.dig(n, "web.local"), n.addr},
	}
}

// dig returns a command line that asks the node's DNS server.
func (l *loopback) dig(n *node, question string) string {
	return strings.Replace(fmt.Sprintf("dig +short -p %d @%s %s", n.ports["dns-port"], n.addr, question), " -p 53 ", " ", 1)
}

func (l *loopback) backendDies(ctx context.Context) error {
	l.chapter("A backend dies", "a backend is killed")
	if err := l.kill(l.dir+"/web-1", "web-1", 1); err != nil {
		return err
	}
	l.say("  Its key is still in etcd. The routers repeat what it left unanswered on web-2.")
	return l.verdict(ctx)
}

func (l *loopback) killRouter(_ context.Context, n *node) error {
	return l.kill(l.data(n)+"/router/", "HAProxy of "+n.name+", master and worker", 2)
}

func (l *loopback) killNode(_ context.Context, n *node) error {
	return l.kill(l.data(n), n.name+": node, HAProxy, store", 4)
}

func (l *loopback) after(ctx context.Context, _ *node, began time.Time) error {
	other := l.nodes[1]
	if err := l.whole(ctx, other, 2); err != nil {
		return err
	}
	l.say("  The other two members of the store have a leader %s after the kill, so the dead", took(time.Since(began)))
	l.say("  backend can be replaced.")
	put, err := l.startBackend(ctx, "web", "http", 3)
	if err != nil {
		return err
	}
	if err := l.etcdctl(ctx, other, put, "del /services/web/hosts/1"); err != nil {
		return err
	}
	for _, n := range l.nodes[1:] {
		if err := l.untilAnswer(ctx, n, kept, "web-3"); err != nil {
			return err
		}
	}
	_, err = l.run(ctx, "curl -sS "+other.url("/web")+" "+other.url("/web"))
	return err
}

func (l *loopback) back(ctx context.Context, n *node, began time.Time) error {
	if err := l.untilAnswer(ctx, n, kept, "web-3"); err != nil {
		return err
	}
	l.say("  It knew the new backend after %s.", took(time.Since(began)))
	if err := l.whole(ctx, l.nodes[1], 3); err != nil {
		return err
	}
	l.say("  It was a full member of the store again after %s.", took(time.Since(began)))
	_, err := l.run(ctx, l.flotilla(l.nodes[1], "nodes list"))
	return err
}

func (l *loopback) drain(ctx context.Context, n *node) error {
	if _, err := l.run(ctx, l.flotilla(n, "nodes drain")); err != nil {
		return err
	}
	return l.untilIn(ctx, n, false)
}

func (l *loopback) undrain(ctx context.Context, n *node) error {
	if _, err := l.run(ctx, l.flotilla(n, "nodes undrain")); err != nil {
		return err
	}
	return l.untilIn(ctx, n, true)
}

func (l *loopback) tryNext() [][2]string {
	n := l.nodes[0]
	return [][2]string{
		{"the web service in a browser", n.url("/web")},
		{"a name that nobody has", "curl -i " + l.nodes[2].url("/nobody")},
		{"the endpoints in DNS", l.dig(n, "SRV _web._tcp.local")},
		{"which node this shell asks", "export FLOTILLA_SOCKET=" + l.data(n) + ".sock"},
		{"how it is doing", l.binary + " status"},
		{"all about one service", l.binary + " services explain web"},
		{"take an endpoint out gently", l.binary + " services set web --drain 2 --wait"},
		{"give the service a domain", "etcdctl --endpoints http://" + n.at("store-client-port") + " put /services/web/domains/1 shop.example.org"},
		{"and use it", "curl -H 'Host: shop.example.org' " + l.nodes[1].url("/")},
		{"what monitoring would read", "curl -s http://" + n.at("balancer-port") + "/metrics"},
		{"what the node says", "tail -f " + l.data(n) + ".log"},
	}
}
