package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"flotilla/bench/harness"
)

// The load: so many clients of each kind, each with a pause after each request.
const (
	clientsPerKind = 8
	pause          = 20 * time.Millisecond
	requestLimit   = 5 * time.Second
	perConnection  = 100 // requests on a kept connection before its client takes another
)

// balance is what the balancer in front knows of a node. It asks the node's
// balancer port every checkEvery and takes it out after one check that fails.
type balance struct {
	mu      sync.Mutex // guards the rest
	in      bool
	turn    int       // counts the times it was taken out
	killed  time.Time // just before its router was killed; zero if never
	gone    time.Time // when the killed processes had ended
	noticed time.Time // when the first check that began after that was over; zero before
}

const (
	checkEvery = 50 * time.Millisecond
	checkLimit = 500 * time.Millisecond
)

// check asks a path of the node's balancer port on a new connection.
func (n *node) check(path string) error {
	c := harness.Client{Address: n.at("balancer-port"), Path: path, Limit: checkLimit}
	status, _, err := c.Do(http.MethodGet, n.addr)
	if err == nil && status != http.StatusOK {
		err = fmt.Errorf("%s%s answers %d", n.name, path, status)
	}
	return err
}

// watch is the balancer's view of the node, kept until ctx ends.
func (n *node) watch(ctx context.Context) {
	for ctx.Err() == nil {
		began := time.Now()
		n.balance.checked(began, n.check("/") == nil)
		_ = harness.Pause(ctx, checkEvery-time.Since(began)) // ctx is asked above
	}
}

func (b *balance) checked(began time.Time, ok bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.in && !ok {
		b.turn++
	}
	b.in = ok
	if b.noticed.IsZero() && !b.gone.IsZero() && began.After(b.gone) {
		b.noticed = time.Now()
	}
}

// kills runs kill, which ends the node's router, and remembers when.
func (b *balance) kills(kill func() error) error {
	b.mu.Lock()
	b.killed, b.gone, b.noticed = time.Now(), time.Time{}, time.Time{}
	b.mu.Unlock()
	err := kill()
	b.mu.Lock()
	b.gone = time.Now()
	b.mu.Unlock()
	return err
}

// now returns whether requests may go to the node, and its turn.
func (b *balance) now() (in bool, turn int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.in, b.turn
}

// blame says whose a request is that failed without an answer.
func (b *balance) blame(began, opened time.Time) outcome {
	b.mu.Lock()
	defer b.mu.Unlock()
	switch {
	case b.killed.IsZero():
		return lost
	case opened.Before(b.killed) && began.Before(b.killed):
		return cut
	case b.noticed.IsZero() || began.Before(b.noticed):
		return refused
	}
	return lost
}

// endpoints reports whether a request that began then may have been under way at
// an endpoint on the node when it was killed.
func (b *balance) endpoints(began time.Time) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return !b.killed.IsZero() && (b.gone.IsZero() || began.Before(b.gone))
}

// outcome is what became of a request.
type outcome int

const (
	answered outcome = iota
	cut              // under way at the router that was killed, or half answered by an endpoint that was
	refused          // sent to the killed router before the balancer's check noticed
	lost             // everything else: what must not be
	outcomes
)

// load plays the clients and the balancer in front of the nodes. It retries
// nothing.
type load struct {
	nodes []*node
	kinds []kind

	mu     sync.Mutex // guards the rest
	next   int        // of the nodes, for a new connection
	phases []*phase   // requests count in the last one, where they end
}

// phase is what was counted while one thing happened.
type phase struct {
	name    string
	sent    int
	count   [outcomes]int
	slowest time.Duration  // of the answered ones
	why     map[string]int // requests were lost
}

// enter begins a phase.
func (l *load) enter(name string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.phases = append(l.phases, &phase{name: name, why: map[string]int{}})
}

// count counts a request that began then; why says why it was lost.
func (l *load) count(what outcome, began time.Time, why string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	p := l.phases[len(l.phases)-1]
	p.sent++
	p.count[what]++
	switch what {
	case answered:
		p.slowest = max(p.slowest, time.Since(began))
	case lost:
		p.why[why]++
	}
}

// sums returns what was counted in each phase so far.
func (l *load) sums() []phase {
	l.mu.Lock()
	defer l.mu.Unlock()
	var all []phase
	for _, p := range l.phases {
		all = append(all, *p)
		all[len(all)-1].why = maps.Clone(p.why)
	}
	return all
}

// kind is how a client speaks.
type kind struct {
	name   string
	keep   bool   // one connection for many requests
	host   string // that is asked for, by HTTP
	path   string
	tcp    bool   // lines to the echo service instead
	answer string // what a right one contains
}

// The name of the service has to be the host, or its first part, or that of the path.
var (
	kept   = kind{name: "http, kept connections", keep: true, host: "web.example.com", path: "/", answer: "web"}
	byHost = kind{name: "http, a connection per request", host: "web.local", path: "/", answer: "web"}
	byPath = kind{name: "http, a connection per request", host: "any.example.com", path: "/web", answer: "web"}
	echo   = kind{name: "tcp", tcp: true, answer: "echo-"}
)

// perSecond is about how many requests the clients send.
func (l *load) perSecond() int { return len(l.kinds) * clientsPerKind * int(time.Second/pause) }

// run keeps the load up until ctx ends.
func (l *load) run(ctx context.Context) {
	var clients sync.WaitGroup
	for _, k := range l.kinds {
		for range clientsPerKind {
			clients.Go(func() {
				c := &conn{}
				for ctx.Err() == nil {
					began := time.Now()
					c = l.once(k, c)
					_ = harness.Pause(ctx, pause-time.Since(began)) // ctx is asked above
				}
				c.Close()
			})
		}
	}
	clients.Wait()
}

// conn is a client's connection to a node; none if it has no node.
type conn struct {
	harness.Client
	node *node
	turn int // the node's when it was opened
	uses int
}

// dial returns a connection to the node, not open yet.
func (k kind) dial(n *node, turn int) *conn {
	port := "http-port"
	if k.tcp {
		port = echoPort
	}
	return &conn{Client: harness.Client{Address: n.at(port), Path: k.path, KeepAlive: k.keep, Limit: requestLimit}, node: n, turn: turn}
}

// usable reports whether the client may go on with the connection: it is young,
// its node is still in, and the other side has not closed it.
func (c *conn) usable() bool {
	if c.node == nil || c.uses >= perConnection {
		return false
	}
	in, turn := c.node.balance.now()
	return in && turn == c.turn && c.Open()
}

var (
	// errAnswer is an answer that is not the right one.
	errAnswer = errors.New("wrong answer")
	// errBegun is an answer that ended in its middle.
	errBegun = errors.New("the answer ended in its middle")
)

// ask sends one request and returns the answer.
func (k kind) ask(c *conn) (answer string, err error) {
	c.uses++
	if k.tcp {
		answer, err = echoes(c)
	} else {
		var status int
		status, answer, err = c.Do(http.MethodGet, k.host)
		switch {
		case err != nil && status > 0:
			err = fmt.Errorf("%w: %w", errBegun, err)
		case err == nil && status != http.StatusOK:
			err = fmt.Errorf("%w: status %d", errAnswer, status)
		}
	}
	if err == nil && !strings.Contains(answer, k.answer) {
		err = fmt.Errorf("%w: %.60q", errAnswer, answer)
	}
	return answer, err
}

// echoes reads the greeting of the echo service, sends it a line and reads that.
func echoes(c *conn) (greeting string, err error) {
	c.Opened = time.Now()
	tcp, err := net.DialTimeout("tcp", c.Address, requestLimit)
	if err != nil {
		return "", err
	}
	defer func() { _ = tcp.Close() }() // all was read
	if err := tcp.SetDeadline(c.Opened.Add(requestLimit)); err != nil {
		return "", err
	}
	if _, err := fmt.Fprintln(tcp, "ahoy"); err != nil {
		return "", err
	}
	in := bufio.NewReader(tcp)
	if greeting, err = in.ReadString('\n'); err != nil {
		return "", err
	}
	line, err := in.ReadString('\n')
	if err == nil && line != "ahoy\n" {
		err = fmt.Errorf("%w: %.60q", errAnswer, line)
	}
	return greeting, err
}

// once sends one request, over a new connection unless c can be used again, counts
// what became of it, and returns the connection.
func (l *load) once(k kind, c *conn) *conn {
	began := time.Now()
	if !c.usable() {
		c.Close()
		if c = l.pick(k); c.node == nil {
			l.count(lost, began, "no node is in the balancer")
			return c
		}
	}
	_, err := k.ask(c)
	if err == nil {
		l.count(answered, began, "")
		return c
	}
	what := lost
	if !errors.Is(err, errAnswer) {
		what = c.node.balance.blame(began, c.Opened)
	}
	if errors.Is(err, errBegun) && slices.ContainsFunc(l.nodes, func(n *node) bool { return n.balance.endpoints(began) }) {
		what = cut // no router can send the other half
	}
	why := err.Error()
	if op := (*net.OpError)(nil); errors.As(err, &op) { // without the addresses, which make each one different
		why = op.Op + ": " + op.Err.Error()
	}
	l.count(what, began, k.name+", "+c.node.name+": "+why)
	return c
}

// pick returns a connection to the next node, not open yet; none if all are out.
func (l *load) pick(k kind) *conn {
	for range l.nodes {
		l.mu.Lock()
		l.next = (l.next + 1) % len(l.nodes)
		n := l.nodes[l.next]
		l.mu.Unlock()
		if in, turn := n.balance.now(); in {
			return k.dial(n, turn)
		}
	}
	return &conn{}
}
