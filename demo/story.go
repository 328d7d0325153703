package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"strings"
	"sync"
	"time"
)

// story is what the demo tells.
type story struct {
	scene
	place    *place
	ports    ports
	backends map[string]*process
	httpAt   func(n int) string // address of the n-th HTTP backend
	tcpAt    func(n int) string
}

// tell tells all of it. While it does so, nodes are watched and clients send
// requests; both have ended when it returns.
func (s *story) tell(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	var running sync.WaitGroup
	defer running.Wait()
	defer cancel()
	if err := s.startNodes(ctx); err != nil {
		return err
	}
	for _, n := range s.nodes {
		running.Go(func() { n.watch(ctx) })
	}
	for _, chapter := range []func(context.Context) error{s.register, s.lookThrough} {
		if err := chapter(ctx); err != nil {
			return err
		}
	}
	for _, n := range s.nodes {
		if err := s.untilIn(ctx, n); err != nil {
			return err
		}
	}
	s.step("A steady load through all nodes")
	s.say("  %d clients send about %d requests a second: http over kept connections, http", len(s.load.kinds)*clientsPerKind, s.load.perSecond())
	s.say("  with a connection for each request, and tcp. They play the load balancer too:")
	s.say("  a node whose check on port %d fails (asked every %s) gets no further", s.ports.balancer, took(checkEvery))
	s.say("  requests. Nothing is retried.")
	steady := s.load.enter("nothing happens")
	running.Go(func() { s.load.run(ctx) })
	if err := s.count(ctx, steady); err != nil {
		return err
	}
	for _, chapter := range []func(context.Context) error{s.backendDies, s.routerDies, s.nodeDies, s.nodeReturns} {
		if err := chapter(ctx); err != nil {
			return err
		}
	}
	cancel()
	running.Wait()
	s.sums()
	return nil
}

func (s *story) startNodes(ctx context.Context) (err error) {
	s.step("Three nodes on this machine")
	s.say("  Each has a store (etcd), a router (HAProxy) and a DNS server of its own.")
	var why []string
	if s.ports, why, err = choosePorts(s.place.addrs[:3]); err != nil {
		return err
	}
	s.say("  ports    http %d, https %d, DNS %d, balancer's check %d, store %d", s.ports.http, s.ports.https, s.ports.dns, s.ports.balancer, s.ports.client)
	if len(why) > 0 {
		s.say("           because %s", strings.Join(why, ", "))
	}
	s.say("  data     %s/n1, n2, n3", s.place.dir)
	s.say("  logs     %s/*.log", s.place.dir)
	for i := range 3 {
		s.nodes = append(s.nodes, newNode(s.binary, i, s.place, s.ports))
	}
	s.load.nodes, s.load.kinds = s.nodes, kinds
	for i, n := range s.nodes {
		s.command(strings.Join(n.argv, " "))
		if err := n.start(); err != nil {
			return err
		}
		if i == 0 { // the others join it
			if err := n.ready(ctx); err != nil {
				return err
			}
		}
	}
	for _, n := range s.nodes {
		if err := n.ready(ctx); err != nil {
			return err
		}
	}
	if err := s.nodes[0].cluster(ctx, 3, 3); err != nil {
		return err
	}
	_, err = s.run(ctx, s.flotilla(s.nodes[0], "nodes list"))
	return err
}

// flotilla returns a command line that asks a node.
func (s *story) flotilla(n *node, args string) string {
	return s.binary + " --socket " + n.socket() + " " + args
}

// etcdctl returns a command line that speaks to the node's store.
func (s *story) etcdctl(n *node, args string) string {
	return "etcdctl --endpoints http://" + n.at(s.ports.client) + " " + args
}

// plainEtcdctl makes plain etcdctl the same for everybody: without the user's
// own settings, and with version 3 of the API where that is not the usual one.
func (s *story) plainEtcdctl() error {
	for _, kv := range os.Environ() {
		if name, _, _ := strings.Cut(kv, "="); strings.HasPrefix(name, "ETCDCTL_") {
			if err := os.Unsetenv(name); err != nil {
				return err
			}
		}
	}
	out, err := exec.Command("etcdctl", "version").CombinedOutput()
	if err == nil && strings.Contains(string(out), "API version: 3") {
		return nil
	}
	s.command("export ETCDCTL_API=3")
	return os.Setenv("ETCDCTL_API", "3")
}

func (s *story) register(ctx context.Context) error {
	s.step("Two services, written with plain etcdctl")
	var pool []int // a port for each backend
	for port := 9001; len(pool) < 5; port++ {
		if bindable(s.place.addrs[3:], port, 1) == nil {
			pool = append(pool, port)
		}
		if port > 60000 {
			return errors.New("no ports for the sample backends")
		}
	}
	at := func(i int) string { return fmt.Sprintf("%s:%d", s.place.addrs[3], pool[i]) }
	s.httpAt = func(n int) string { return at(n - 1) }
	s.tcpAt = func(n int) string { return at(n + 2) }
	s.backends = map[string]*process{}
	for n := range 2 {
		if err := errors.Join(s.startBackend(ctx, "http", "web", n+1), s.startBackend(ctx, "tcp", "echo", n+1)); err != nil {
			return err
		}
	}
	s.say("  Sample backends run on %s, %s (http) and %s, %s (tcp).", s.httpAt(1), s.httpAt(2), s.tcpAt(1), s.tcpAt(2))
	if err := s.plainEtcdctl(); err != nil {
		return err
	}
	for _, put := range []string{
		"/services/web/scheme http", "/services/web/hosts/1 " + s.httpAt(1), "/services/web/hosts/2 " + s.httpAt(2),
		"/services/echo/scheme tcp", "/services/echo/hosts/1 " + s.tcpAt(1), "/services/echo/hosts/2 " + s.tcpAt(2),
		fmt.Sprintf("/services/echo/host_port %d", s.ports.echo),
	} {
		if _, err := s.run(ctx, s.etcdctl(s.nodes[0], "put "+put)); err != nil {
			return err
		}
	}
	began := time.Now()
	for _, k := range kinds[1:] {
		for _, n := range s.nodes {
			if err := s.untilAnswer(ctx, n, k, ""); err != nil {
				return err
			}
		}
		s.say("  %s after the last put had returned, all three nodes route the %s service.", took(time.Since(began)), k.scheme)
	}
	return nil
}

// startBackend starts a sample backend and returns when it listens.
func (s *story) startBackend(ctx context.Context, scheme, service string, n int) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	addr := s.httpAt(n)
	if scheme == "tcp" {
		addr = s.tcpAt(n)
	}
	name := fmt.Sprintf("%s-%d", service, n)
	if s.backends[name], err = start(s.place.dir, name, backendArgs(self, scheme, name, addr, s.place.dir)...); err != nil {
		return err
	}
	return until(ctx, 10*time.Second, name+" to listen", func() error {
		c, err := net.Dial("tcp", addr)
		if err != nil {
			return err
		}
		return c.Close()
	})
}

func (s *story) lookThrough(ctx context.Context) error {
	s.step("The same through every node: by host, by path, by port and in DNS")
	for _, n := range s.nodes {
		for _, look := range []struct{ line, want string }{
			{"curl -sS -H 'Host: web.example.com' " + n.url("/"), " answers GET / for web.example.com"},
			{"curl -sS " + n.url("/web"), " answers GET /web for "},
			{fmt.Sprintf("echo hello | nc -N %s %d", n.addr, s.ports.echo), " echoes hello"},
			{s.dig(n, "web.local"), n.addr},
		} {
			out, err := s.run(ctx, look.line)
			if err != nil {
				return err
			}
			if !strings.Contains(out, look.want) {
				return fmt.Errorf("%s: answered %q, not %q", look.line, out, look.want)
			}
		}
	}
	return nil
}

func (s *story) backendDies(ctx context.Context) error {
	s.step("A backend dies")
	p := s.load.enter("a backend is killed")
	victim := s.backends["web-1"].pid
	s.command(killLine([]int{victim}) + "   # web-1")
	if err := kill(s.place.dir, victim); err != nil {
		return err
	}
	s.say("  Its key is still in etcd. The routers repeat what it left unanswered on web-2.")
	return s.count(ctx, p)
}

func (s *story) routerDies(ctx context.Context) error {
	s.step("A router dies")
	n := s.nodes[1]
	p := s.load.enter("a router is killed")
	victims := n.router()
	if len(victims) == 0 {
		return fmt.Errorf("the router of %s is not there to be killed", n.name)
	}
	s.command(killLine(victims) + "   # HAProxy of " + n.name + ", master and worker")
	began := time.Now()
	if err := n.balance.kills(func() error { return kill(s.place.dir, victims...) }); err != nil {
		return err
	}
	if err := s.untilAnswer(ctx, n, kinds[0], ""); err != nil {
		return err
	}
	s.say("  %s started another one, which answered with all services %s after the kill.", n.name, took(time.Since(began)))
	if err := s.untilIn(ctx, n); err != nil {
		return err
	}
	return s.count(ctx, p)
}

func (s *story) nodeDies(ctx context.Context) error {
	s.step("A whole node dies: the one that the others joined")
	n, other := s.nodes[0], s.nodes[1]
	p := s.load.enter("a node is killed")
	victims := n.everything()
	if len(victims) != 3 {
		return fmt.Errorf("%d processes of %s run, not 3", len(victims), n.name)
	}
	s.command(killLine(victims) + "   # " + n.name + ": node, HAProxy, store")
	began := time.Now()
	if err := n.balance.kills(func() error { return kill(s.place.dir, victims...) }); err != nil {
		return err
	}
	if err := other.cluster(ctx, 2, 2); err != nil {
		return err
	}
	s.say("  The other two members of the store have a leader %s after the kill, so the dead", took(time.Since(began)))
	s.say("  backend can be replaced.")
	if err := s.startBackend(ctx, "http", "web", 3); err != nil {
		return err
	}
	for _, args := range []string{"put /services/web/hosts/3 " + s.httpAt(3), "del /services/web/hosts/1"} {
		if _, err := s.run(ctx, s.etcdctl(other, args)); err != nil {
			return err
		}
	}
	for _, n := range s.nodes[1:] {
		if err := s.untilAnswer(ctx, n, kinds[0], "web-3"); err != nil {
			return err
		}
	}
	if _, err := s.run(ctx, "curl -sS "+other.url("/web")+" "+other.url("/web")); err != nil {
		return err
	}
	return s.count(ctx, p)
}

func (s *story) nodeReturns(ctx context.Context) error {
	s.step("The node comes back")
	n := s.nodes[0]
	p := s.load.enter("the node comes back")
	began := time.Now()
	s.command(strings.Join(n.argv, " "))
	if err := n.start(); err != nil {
		return err
	}
	if err := s.untilIn(ctx, n); err != nil {
		return err
	}
	s.say("  It routed again after %s.", took(time.Since(began)))
	if err := s.untilAnswer(ctx, n, kinds[0], "web-3"); err != nil {
		return err
	}
	s.say("  It knew the new backend after %s.", took(time.Since(began)))
	if err := s.nodes[1].cluster(ctx, 3, 3); err != nil {
		return err
	}
	s.say("  It was a full member of the store again after %s.", took(time.Since(began)))
	if err := s.count(ctx, p); err != nil {
		return err
	}
	_, err := s.run(ctx, s.flotilla(s.nodes[1], "nodes list"))
	return err
}

// tryNext shows what can be played with.
func (s *story) tryNext() {
	n := s.nodes[0]
	s.step("Yours to play with, until Ctrl-C")
	for _, try := range [][2]string{
		{"the web service in a browser", n.url("/web")},
		{"a name that nobody has", "curl -i " + s.nodes[2].url("/nobody")},
		{"the endpoints in DNS", s.dig(n, "SRV _web._tcp.local")},
		{"which node this shell asks", "export FLOTILLA_SOCKET=" + n.socket()},
		{"how it is doing", s.binary + " status"},
		{"all about one service", s.binary + " services explain web"},
		{"take an endpoint out gently", s.binary + " services set web --drain 2 --wait"},
		{"give the service a domain", s.etcdctl(n, "put /services/web/domains/1 shop.example.org")},
		{"and use it", "curl -H 'Host: shop.example.org' " + s.nodes[1].url("/")},
		{"what monitoring would read", fmt.Sprintf("curl -s http://%s/metrics", n.at(s.ports.balancer))},
		{"what the node says", "tail -f " + n.log()},
	} {
		s.say("  %-28s %s", try[0], s.paint(cyan, try[1]))
	}
}

// dig returns a command line that asks the node's DNS server.
func (s *story) dig(n *node, question string) string {
	if s.ports.dns == 53 {
		return "dig +short @" + n.addr + " " + question
	}
	return fmt.Sprintf("dig +short -p %d @%s %s", s.ports.dns, n.addr, question)
}
