package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"
)

// machines is the story of three machines that run units.
type machines struct {
	scene
	cluster string // its name
}

// The sample units: three web servers and three clocks. Of the web servers each
// machine has one, by itself: they are spread.
const (
	template  = "examples/units/web@.service"
	wanted    = "'examples/units/web@{1..3}' 'examples/units/clock@{1..3}'"
	instances = 6
)

// machineKinds are how clients speak to the web servers.
var machineKinds = []kind{
	kinds[0],
	{"http, a connection per request", "http", false, func(*node) (int, string) {
		return 80, "GET / HTTP/1.1\r\nHost: web.local\r\nConnection: close\r\n\r\n"
	}},
}

// errNoMachines says that they could not be made.
var errNoMachines = errors.New("this machine cannot run the nodes as machines of their own")

// cannot returns why no machines can be made here; empty if they can.
func cannot(ctx context.Context, binary string) string {
	out, err := exec.CommandContext(ctx, binary, "cluster", "list").CombinedOutput()
	if err == nil {
		return ""
	}
	first, _, _ := strings.Cut(strings.TrimSpace(string(out)), "\n")
	if first == "" {
		first = err.Error()
	}
	return strings.TrimPrefix(first, "flotilla: error: ")
}

// runMachines tells the story on machines of their own.
func runMachines(ctx context.Context, t *teller, binary string, once bool) (err error) {
	name, lock, err := claimCluster()
	if err != nil {
		return err
	}
	// Settings of the user's are not for this cluster.
	for _, kv := range os.Environ() {
		if key, _, _ := strings.Cut(kv, "="); strings.HasPrefix(key, "FLOTILLA_") {
			err = errors.Join(err, os.Unsetenv(key))
		}
	}
	if err := errors.Join(err, os.Setenv("FLOTILLA_CLUSTER", name)); err != nil {
		return errors.Join(err, lock.Close())
	}
	s := &machines{scene: scene{teller: t, binary: binary}, cluster: name}
	if err := s.remove(); err != nil { // of a demo that was killed
		return errors.Join(err, lock.Close())
	}
	defer func() {
		t.say("")
		t.say("Removing the cluster.")
		err = errors.Join(err, s.remove(), lock.Close())
	}()
	if err := s.tell(ctx); err != nil && ctx.Err() == nil {
		return err
	}
	return s.end(ctx, once, s.tryNext)
}

// claimCluster takes the first name of a cluster that no other demo has. The
// lock is an abstract socket: it ends with its process.
func claimCluster() (string, net.Listener, error) {
	for n := range places {
		name := "demo"
		if n > 0 {
			name = fmt.Sprintf("demo%d", n+1)
		}
		lock, err := net.Listen("unix", "@flotilla-demo-cluster-"+name)
		if errors.Is(err, syscall.EADDRINUSE) {
			continue
		}
		if err != nil {
			return "", nil, fmt.Errorf("lock a cluster for the demo: %w", err)
		}
		return name, lock, nil
	}
	return "", nil, fmt.Errorf("%d demos run already: stop one of them with Ctrl-C", places)
}

// remove removes the cluster if it is there.
func (s *machines) remove() error {
	cmd := exec.Command(s.binary, "cluster", "down", "--keep=false", s.cluster)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // another Ctrl-C shall not leave half of it
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("remove cluster %s: %w\n%s", s.cluster, err, out)
	}
	return nil
}

// tell tells all of it. While it does so, nodes are watched and clients send
// requests; both have ended when it returns.
func (s *machines) tell(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	var running sync.WaitGroup
	defer running.Wait()
	defer cancel()
	for _, chapter := range []func(context.Context) error{s.boot, s.startUnits, s.lookThrough} {
		if err := chapter(ctx); err != nil {
			return err
		}
	}
	for _, n := range s.nodes {
		running.Go(func() { n.watch(ctx) })
	}
	for _, n := range s.nodes {
		if err := s.untilIn(ctx, n); err != nil {
			return err
		}
	}
	s.step("A steady load through all nodes")
	s.say("  %d clients send up to %d requests a second, half of them over kept connections.", len(s.load.kinds)*clientsPerKind, s.load.perSecond())
	s.say("  They play the load balancer too: a node whose check on port 9180 fails (asked")
	s.say("  every %s) gets no further requests. Nothing is retried.", took(checkEvery))
	steady := s.load.enter("nothing happens")
	running.Go(func() { s.load.run(ctx) })
	if err := s.count(ctx, steady); err != nil {
		return err
	}
	for _, chapter := range []func(context.Context) error{s.powerCut, s.powerOn, s.drain} {
		if err := chapter(ctx); err != nil {
			return err
		}
	}
	cancel()
	running.Wait()
	s.sums()
	return nil
}

func (s *machines) boot(ctx context.Context) error {
	s.step("Three machines")
	s.say("  Each is a container with a Debian of its own: systemd, journal, disk, address,")
	s.say("  and on it a store (etcd), a router (HAProxy) and a DNS server.")
	if err := s.stream(ctx, s.binary+" cluster up "+s.cluster+" --timeout 5m"); err != nil {
		return fmt.Errorf("%w: %w", errNoMachines, err)
	}
	out, err := exec.CommandContext(ctx, s.binary, "cluster", "status", s.cluster, "-o", "json").Output()
	if err != nil {
		return fmt.Errorf("ask for the nodes: %w", err)
	}
	var made []struct{ Name, Address string }
	if err := json.Unmarshal(out, &made); err != nil {
		return fmt.Errorf("read the nodes: %w", err)
	}
	for _, m := range made {
		s.nodes = append(s.nodes, &node{name: m.Name, addr: m.Address, ports: ports{http: 80, balancer: 9180}})
	}
	s.load.nodes, s.load.kinds = s.nodes, machineKinds
	s.command("export FLOTILLA_CLUSTER=" + s.cluster)
	return s.machinesInUse(ctx, len(s.nodes))
}

// machinesInUse waits until so many machines are there, and shows them.
func (s *machines) machinesInUse(ctx context.Context, n int) error {
	err := until(ctx, time.Minute, fmt.Sprintf("%d machines to be there", n), func() error {
		out, err := exec.CommandContext(ctx, s.binary, "list-machines", "--no-legend").Output()
		if have := strings.Count(string(out), "\n"); err == nil && have != n {
			return fmt.Errorf("there are %d", have)
		}
		return err
	})
	if err != nil {
		return err
	}
	_, err = s.run(ctx, s.binary+" machines list")
	return err
}

func (s *machines) startUnits(ctx context.Context) error {
	s.step("Six units from two templates")
	if _, err := s.run(ctx, "sed '/^#/d' "+template); err != nil {
		return err
	}
	began := time.Now()
	if err := s.stream(ctx, s.binary+" start "+wanted); err != nil {
		return err
	}
	s.say("  All run after %s.", took(time.Since(began)))
	for _, args := range []string{"list-units --fields unit,node,active,sub", "explain web@1", "journal --lines 6 'web@*' 'clock@*'"} {
		if _, err := s.run(ctx, s.binary+" "+args); err != nil {
			return err
		}
	}
	return nil
}

func (s *machines) lookThrough(ctx context.Context) error {
	s.step("The service that the web servers make up, through every node")
	for _, n := range s.nodes {
		if err := s.untilAnswer(ctx, n, s.load.kinds[0], ""); err != nil {
			return err
		}
		for _, look := range []struct{ line, want string }{
			{"curl -sS -H 'Host: web.example.com' " + n.url("/"), "web@"},
			{"dig +short @" + n.addr + " web.local", n.addr},
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

// unitsOn waits until all instances run, none of them on the node without.
func (s *machines) unitsOn(ctx context.Context, without *node) error {
	return until(ctx, 2*time.Minute, "all units to run elsewhere than on "+without.name, func() error {
		out, err := exec.CommandContext(ctx, s.binary, "list-units", "--no-legend", "--fields", "node,active,unit").Output()
		if err != nil {
			return err
		}
		there := map[string]bool{}
		for line := range strings.Lines(string(out)) {
			if f := strings.Fields(line); len(f) == 3 && f[0] != without.name && f[1] == "active" {
				there[f[2]] = true
			}
		}
		if len(there) < instances {
			return fmt.Errorf("%d of %d do", len(there), instances)
		}
		return nil
	})
}

func (s *machines) powerCut(ctx context.Context) error {
	s.step("The power of a machine fails")
	n := s.nodes[2]
	p := s.load.enter("the power fails")
	began := time.Now()
	err := n.balance.kills(func() error {
		_, err := s.run(ctx, s.binary+" cluster power "+n.name+" cut")
		return err
	})
	if err != nil {
		return err
	}
	s.say("  Its endpoint is still in the store: the routers repeat elsewhere what it refuses.")
	s.say("  After 12 s of silence the machine counts as dead, and its units start elsewhere.")
	if err := s.unitsOn(ctx, n); err != nil {
		return err
	}
	s.say("  %s", s.paint(green, fmt.Sprintf("All units ran on the other two machines %s after the cut.", took(time.Since(began)))))
	for _, args := range []string{"list-units --fields unit,node,active,sub", "explain " + s.moved(ctx)} {
		if _, err := s.run(ctx, s.binary+" "+args); err != nil {
			return err
		}
	}
	return s.count(ctx, p)
}

// moved returns a unit that is where it is because its machine went, or the
// first one.
func (s *machines) moved(ctx context.Context) string {
	out, err := exec.CommandContext(ctx, s.binary, "list-unit-files", "--no-legend", "--fields", "unit,reason").Output()
	if err != nil {
		return "web@1"
	}
	lines := slices.Collect(strings.Lines(string(out)))
	i := slices.IndexFunc(lines, func(l string) bool { return strings.Contains(l, "gone") })
	name, _, _ := strings.Cut(lines[max(i, 0)], "\t")
	return name
}

func (s *machines) powerOn(ctx context.Context) error {
	s.step("The machine comes back")
	n := s.nodes[2]
	p := s.load.enter("the machine comes back")
	began := time.Now()
	if _, err := s.run(ctx, s.binary+" cluster power "+n.name+" on"); err != nil {
		return err
	}
	if err := s.untilIn(ctx, n); err != nil {
		return err
	}
	s.say("  It booted, joined and routed again after %s.", took(time.Since(began)))
	if err := s.machinesInUse(ctx, len(s.nodes)); err != nil {
		return err
	}
	s.say("  What runs stays where it is, unless somebody wants it otherwise:")
	if err := s.stream(ctx, s.binary+" rebalance --yes"); err != nil {
		return err
	}
	if err := s.settled(ctx); err != nil {
		return err
	}
	return s.count(ctx, p)
}

// settled waits until all units run and none is about to move.
func (s *machines) settled(ctx context.Context) error {
	return until(ctx, time.Minute, "the units to have moved", func() error {
		out, err := exec.CommandContext(ctx, s.binary, "rebalance").Output()
		if err == nil && !strings.HasPrefix(string(out), "Nothing") {
			return errors.New("some are not there yet")
		}
		if err != nil {
			return err
		}
		return s.unitsOn(ctx, &node{})
	})
}

func (s *machines) drain(ctx context.Context) error {
	s.step("A machine is needed for something else")
	n := s.nodes[1]
	p := s.load.enter("a machine is drained")
	began := time.Now()
	if err := s.stream(ctx, s.binary+" machines drain "+n.name+" --wait --reason 'new disk'"); err != nil {
		return err
	}
	if err := s.unitsOn(ctx, n); err != nil {
		return err
	}
	s.say("  All units ran on the other two machines after %s.", took(time.Since(began)))
	if err := s.count(ctx, p); err != nil {
		return err
	}
	_, err := s.run(ctx, s.binary+" machines uncordon "+n.name)
	return err
}

// tryNext shows what can be played with.
func (s *machines) tryNext() {
	n := s.nodes[0]
	s.step("Yours to play with, until Ctrl-C")
	for _, try := range [][2]string{
		{"which cluster this shell asks", "export FLOTILLA_CLUSTER=" + s.cluster},
		{"the web service", "curl -H 'Host: web.local' " + n.url("/")},
		{"what runs where", s.binary + " list-units"},
		{"why it is there", s.binary + " explain web@2"},
		{"what all of them say", s.binary + " journal -f 'web@*'"},
		{"more of them", s.binary + " start '" + strings.TrimSuffix(template, ".service") + "{4..6}'"},
		{"one elsewhere", s.binary + " move clock@2 n2"},
		{"restart, stop, remove", s.binary + " restart web@1; " + s.binary + " stop web@1; " + s.binary + " destroy web@1"},
		{"another power failure", s.binary + " cluster power n2 cut"},
		{"and its end", s.binary + " cluster power n2 on"},
		{"one more machine", s.binary + " cluster add " + s.cluster},
		{"a shell on one", s.binary + " cluster shell n3"},
		{"the service in detail", s.binary + " services explain web"},
		{"fleet's own command", s.binary + " cluster shell n1 fleetctl list-units"},
	} {
		s.say("  %-30s %s", try[0], s.paint(cyan, try[1]))
	}
}
