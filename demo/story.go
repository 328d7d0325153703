package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strconv"
	"strings"
	"sync"
	"text/tabwriter"
	"time"

	"flotilla/bench/harness"
)

// story is what the demo tells: three nodes, something to route to, a load, and its
// fate while parts are killed.
type story struct {
	*teller
	binary, backend string
	world           world
	nodes           []*node
	load            load
}

// world is where the story is told.
type world interface {
	// up starts three nodes.
	up(ctx context.Context) ([]*node, error)
	// serve makes something to route to and returns how clients speak to it.
	serve(ctx context.Context) ([]kind, error)
	// looks are commands that ask for it through a node, and what they answer.
	looks(n *node) [][2]string
	// backendDies tells of a backend that is killed.
	backendDies(ctx context.Context) error
	// killRouter and killNode show how they kill, and return when that is done.
	killRouter(ctx context.Context, n *node) error
	killNode(ctx context.Context, n *node) error
	// after tells what the others do when a node has died.
	after(ctx context.Context, dead *node, began time.Time) error
	// start starts the dead node again, and back tells when it is whole.
	start(ctx context.Context, n *node) error
	back(ctx context.Context, n *node, began time.Time) error
	// drain takes a node out of use until undrain.
	drain(ctx context.Context, n *node) error
	undrain(ctx context.Context, n *node) error
	// tryNext is what can be played with, and how.
	tryNext() [][2]string
	// remove removes everything.
	remove() error
}

// node is one of the three.
type node struct {
	name, addr string
	ports      map[string]int // by the flag that sets them
	argv       []string       // what starts it, where the demo does
	balance    balance
}

// at returns an address of the node.
func (n *node) at(port string) string { return net.JoinHostPort(n.addr, strconv.Itoa(n.ports[port])) }

// url returns a URL of the node, without the port where that is usual.
func (n *node) url(path string) string {
	return "http://" + strings.TrimSuffix(n.at("http-port"), ":80") + path
}

// in tells the story in a world, and waits for ctx to end unless once is set.
func (s *story) in(ctx context.Context, world string, once bool) (err error) {
	place, lock, err := claim()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, lock.Close()) }()
	enter := newLoopback
	if world == "nspawn" {
		enter = newMachines
	}
	if s.world, err = enter(s, place); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.world.remove()) }()
	err = s.tell(ctx)
	if ctx.Err() != nil {
		return errors.New("stopped before the end of the story")
	}
	if err != nil {
		return err
	}
	if !once {
		s.step("Yours to play with, until Ctrl-C")
		for _, try := range s.world.tryNext() {
			s.say("  %-30s %s", try[0], s.paint(cyan, try[1]))
		}
		<-ctx.Done()
	}
	for _, p := range s.load.sums() {
		if p.count[lost] > 0 {
			return errLost
		}
	}
	return nil
}

// tell tells all of it. While it does so, nodes are watched and clients send
// requests; both have ended when it returns.
func (s *story) tell(ctx context.Context) (err error) {
	ctx, cancel := context.WithCancel(ctx)
	var running sync.WaitGroup
	defer running.Wait()
	defer cancel()
	if s.nodes, err = s.world.up(ctx); err != nil {
		return err
	}
	if s.load.kinds, err = s.world.serve(ctx); err != nil {
		return err
	}
	if err := s.lookThrough(ctx); err != nil {
		return err
	}
	s.load.nodes = s.nodes
	for _, n := range s.nodes {
		running.Go(func() { n.watch(ctx) })
	}
	for _, n := range s.nodes {
		if err := s.untilIn(ctx, n, true); err != nil {
			return err
		}
	}
	s.step("A steady load through all nodes")
	s.say("  %d clients send up to %d requests a second:", len(s.load.kinds)*clientsPerKind, s.load.perSecond())
	for _, k := range s.load.kinds {
		s.say("    %s", k.name)
	}
	s.say("  They play the load balancer too: a node whose check on port %d fails (asked", s.nodes[0].ports["balancer-port"])
	s.say("  every %s) gets no further requests. Nothing is retried.", took(checkEvery))
	s.load.enter("nothing happens")
	running.Go(func() { s.load.run(ctx) })
	for _, chapter := range []func(context.Context) error{
		s.verdict, s.world.backendDies, s.routerDies, s.nodeDies, s.nodeReturns, s.drained,
	} {
		if err := chapter(ctx); err != nil {
			return err
		}
	}
	cancel()
	running.Wait()
	s.sums()
	return nil
}

func (s *story) lookThrough(ctx context.Context) error {
	s.step("The same through every node")
	for _, n := range s.nodes {
		if err := s.untilAnswer(ctx, n, kept, ""); err != nil {
			return err
		}
		for _, look := range s.world.looks(n) {
			out, err := s.run(ctx, look[0])
			if err != nil {
				return err
			}
			if !strings.Contains(out, look[1]) {
				return fmt.Errorf("%s: answered %q, not %q", look[0], out, look[1])
			}
		}
	}
	return nil
}

// chapter begins one in which something happens to the load.
func (s *story) chapter(title, phase string) time.Time {
	s.step(title)
	s.load.enter(phase)
	return time.Now()
}

func (s *story) routerDies(ctx context.Context) error {
	n := s.nodes[1]
	began := s.chapter("A router dies", "a router is killed")
	if err := n.balance.kills(func() error { return s.world.killRouter(ctx, n) }); err != nil {
		return err
	}
	if err := s.untilAnswer(ctx, n, kept, ""); err != nil {
		return err
	}
	s.say("  %s has another one, which answered with all services %s after the kill.", n.name, took(time.Since(began)))
	if err := s.untilIn(ctx, n, true); err != nil {
		return err
	}
	return s.verdict(ctx)
}

func (s *story) nodeDies(ctx context.Context) error {
	n := s.nodes[0]
	began := s.chapter("A whole node dies: the one that the others joined", "a node is killed")
	if err := n.balance.kills(func() error { return s.world.killNode(ctx, n) }); err != nil {
		return err
	}
	if err := s.world.after(ctx, n, began); err != nil {
		return err
	}
	return s.verdict(ctx)
}

func (s *story) nodeReturns(ctx context.Context) error {
	n := s.nodes[0]
	began := s.chapter("The node comes back", "the node comes back")
	if err := s.world.start(ctx, n); err != nil {
		return err
	}
	if err := s.untilIn(ctx, n, true); err != nil {
		return err
	}
	s.say("  It routed again after %s.", took(time.Since(began)))
	if err := s.world.back(ctx, n, began); err != nil {
		return err
	}
	return s.verdict(ctx)
}

func (s *story) drained(ctx context.Context) error {
	n := s.nodes[1]
	s.chapter("A node is needed for something else", "a node is drained")
	if err := s.world.drain(ctx, n); err != nil {
		return err
	}
	if err := s.verdict(ctx); err != nil {
		return err
	}
	return s.world.undrain(ctx, n)
}

// untilAnswer waits until a request of this kind to the node has a good answer,
// one that contains from.
func (s *story) untilAnswer(ctx context.Context, n *node, k kind, from string) error {
	return until(ctx, n.name+" to route "+k.name, func() error {
		c := k.dial(n, 0)
		defer c.Close()
		answer, err := k.ask(c)
		if err == nil && !strings.Contains(answer, from) {
			err = fmt.Errorf("%q answers", answer)
		}
		return err
	})
}

// untilIn waits until the balancer sends requests to the node, or none any more.
func (s *story) untilIn(ctx context.Context, n *node, want bool) error {
	return until(ctx, "the balancer to see the state of "+n.name, func() error {
		if in, _ := n.balance.now(); in != want {
			return fmt.Errorf("its check succeeds: %t", in)
		}
		return nil
	})
}

// until waits for cond, which is asked often, and fails with its last error.
func until(ctx context.Context, what string, cond func() error) error {
	return harness.Until(ctx, 2*time.Minute, 5*time.Millisecond, what, cond)
}

// phaseLength is how long each phase goes on once what it waits for has happened.
const phaseLength = 2 * time.Second

// verdict lets the phase go on for a while and says what became of its requests.
func (s *story) verdict(ctx context.Context) error {
	if err := harness.Pause(ctx, phaseLength); err != nil {
		return err
	}
	all := s.load.sums()
	p := all[len(all)-1]
	line := fmt.Sprintf("%d requests, %d answered", p.sent, p.count[answered])
	if p.count[cut]+p.count[refused] > 0 {
		line += fmt.Sprintf(", %d cut off, %d refused", p.count[cut], p.count[refused])
	}
	colour := green
	if p.count[lost] > 0 {
		colour = red
	}
	s.say("  %s, %s", line, s.paint(colour, fmt.Sprintf("%d lost.", p.count[lost])))
	for why, n := range p.why {
		s.say("  %s", s.paint(red, fmt.Sprintf("%6d  %s", n, why)))
	}
	return nil
}

// sums shows the table of all phases.
func (s *story) sums() {
	s.step("The sums")
	var b strings.Builder
	w := tabwriter.NewWriter(&b, 0, 0, 2, ' ', tabwriter.AlignRight)
	row := func(cells ...any) { _, _ = fmt.Fprintf(w, strings.Repeat("%v\t", len(cells))+"\n", cells...) }
	row("while", "requests", "answered", "cut off", "refused", "lost", "slowest")
	together := phase{name: "together"}
	for _, p := range s.load.sums() {
		for o, n := range p.count {
			together.count[o] += n
		}
		together.sent += p.sent
		row(p.name, p.sent, p.count[answered], p.count[cut], p.count[refused], p.count[lost], took(p.slowest))
	}
	row(together.name, together.sent, together.count[answered], together.count[cut], together.count[refused], together.count[lost], "")
	_ = w.Flush() // to memory
	for line := range strings.Lines(b.String()) {
		s.say("  %s", strings.TrimRight(line, "\n"))
	}
	s.say("  cut off  was under way at the router, or the node, that was killed, or half answered from there")
	s.say("  refused  was sent there before the next check (each %s) took it out of the balancer", took(checkEvery))
	s.say("  lost     every other failure, of any kind: has to be 0")
	if n := together.count[lost]; n > 0 {
		s.say("  %s", s.paint(red, fmt.Sprintf("%d requests were lost.", n)))
		return
	}
	s.say("  %s", s.paint(green, fmt.Sprintf("No request was lost, beyond the %d that were at the killed routers and node themselves.",
		together.count[cut]+together.count[refused])))
}
