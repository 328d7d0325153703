package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
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
	noticed time.Time // when the first check that began after the kill was over; zero before
	gone    time.Time // when the killed processes had ended
}

const (
	checkEvery = 50 * time.Millisecond
	checkLimit = 500 * time.Millisecond
)

// check asks a path of the node's balancer port on a new connection.
func (n *node) check(ctx context.Context, path string) error {
	ctx, cancel := context.WithTimeout(ctx, checkLimit)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+n.at(n.ports.balancer)+path, nil)
	if err != nil {
		return err
	}
	resp, err := (&http.Transport{DisableKeepAlives: true}).RoundTrip(req)
	if err != nil {
		return err
	}
	defer func() { _ = resp.Body.Close() }()
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("%s%s answers %s", n.name, path, resp.Status)
	}
	return nil
}

// watch is the balancer's view of the node, kept until ctx ends.
func (n *node) watch(ctx context.Context) {
	tick := time.NewTicker(checkEvery)
	defer tick.Stop()
	for ctx.Err() == nil {
		began := time.Now()
		n.balance.checked(began, n.check(ctx, "/") == nil)
		select {
		case <-tick.C:
		case <-ctx.Done():
		}
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

// phase is what was counted while one thing happened.
type phase struct {
	name    string
	began   time.Time
	count   [outcomes]atomic.Int64
	slowest atomic.Int64 // nanoseconds, of the answered ones

	mu  sync.Mutex      // guards why
	why map[string]*why // by what it looks like
}

// why is one reason for which requests were lost.
type why struct {
	count int
	first time.Duration // since the phase began
}

func (p *phase) sent() int64 {
	var n int64
	for i := range p.count {
		n += p.count[i].Load()
	}
	return n
}

// reasons returns why requests were lost, most frequent first.
func (p *phase) reasons() []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	var list []string
	for text, w := range p.why {
		list = append(list, fmt.Sprintf("%6d  %s, first %s into it", w.count, text, took(w.first)))
	}
	slices.Sort(list)
	slices.Reverse(list)
	return list
}

// load plays the clients and the balancer in front of the nodes. It retries
// nothing.
type load struct {
	nodes  []*node
	kinds  []kind
	next   atomic.Uint64
	phase  atomic.Pointer[phase]
	phases []*phase
}

// enter begins a phase: requests count where they end.
func (l *load) enter(name string) *phase {
	p := &phase{name: name, began: time.Now(), why: map[string]*why{}}
	l.phases = append(l.phases, p)
	l.phase.Store(p)
	return p
}

func (l *load) lost() int64 {
	var n int64
	for _, p := range l.phases {
		n += p.count[lost].Load()
	}
	return n
}

// kind is how a client speaks.
type kind struct {
	name    string
	scheme  string // of the service: http or tcp
	keep    bool   // one connection for many requests
	request func(n *node) (port int, request string)
}

var kinds = []kind{
	{"http, kept connections", "http", true, func(n *node) (int, string) {
		return n.ports.http, "GET / HTTP/1.1\r\nHost: web.example.com\r\n\r\n"
	}},
	{"http, a connection per request", "http", false, func(n *node) (int, string) {
		return n.ports.http, "GET /web HTTP/1.1\r\nHost: " + n.addr + "\r\nConnection: close\r\n\r\n"
	}},
	{"tcp", "tcp", false, func(n *node) (int, string) { return n.ports.echo, "ahoy\n" }},
}

// perSecond is about how many requests the clients send.
func (l *load) perSecond() int { return len(l.kinds) * clientsPerKind * int(time.Second/pause) }

// run keeps the load up until ctx ends.
func (l *load) run(ctx context.Context) {
	var clients sync.WaitGroup
	for _, k := range l.kinds {
		for range clientsPerKind {
			clients.Go(func() { l.client(ctx, k) })
		}
	}
	clients.Wait()
}

func (l *load) client(ctx context.Context, k kind) {
	tick := time.NewTicker(pause)
	defer tick.Stop()
	var c *conn
	for ctx.Err() == nil {
		c = l.once(k, c)
		select {
		case <-tick.C:
		case <-ctx.Done():
		}
	}
	c.close()
}

// conn is a client's connection to a node.
type conn struct {
	net.Conn
	node   *node
	turn   int // the node's when it was opened
	opened time.Time
	uses   int
	in     *bufio.Reader
	answer string // the last one
}

func (c *conn) close() {
	if c != nil && c.Conn != nil {
		_ = c.Close()
	}
}

// usable reports whether the client may go on with the connection: it is young,
// its node is still in, and the other side has not closed it.
func (c *conn) usable() bool {
	if c == nil || c.uses >= perConnection {
		return false
	}
	if in, turn := c.node.balance.now(); !in || turn != c.turn {
		return false
	}
	raw, err := c.Conn.(syscall.Conn).SyscallConn()
	if err != nil {
		return false
	}
	open := false
	err = raw.Read(func(fd uintptr) bool {
		// Nothing to read, and nobody has hung up.
		_, _, err := syscall.Recvfrom(int(fd), make([]byte, 1), syscall.MSG_PEEK|syscall.MSG_DONTWAIT)
		open = errors.Is(err, syscall.EAGAIN)
		return true
	})
	return err == nil && open
}

// once sends one request, counts what became of it, and returns the connection
// if it can be used again.
func (l *load) once(k kind, c *conn) *conn {
	began := time.Now()
	if !c.usable() {
		c.close()
		if c = l.pick(); c == nil {
			p := l.phase.Load()
			p.count[lost].Add(1)
			p.note("no node is in the balancer")
			return nil
		}
	}
	port, request := k.request(c.node)
	err := c.exchange(k, port, request)
	p := l.phase.Load()
	if err == nil {
		p.count[answered].Add(1)
		took := int64(time.Since(began))
		for old := p.slowest.Load(); took > old && !p.slowest.CompareAndSwap(old, took); old = p.slowest.Load() {
		}
		if k.keep {
			return c
		}
		c.close()
		return nil
	}
	what := lost
	if !errors.Is(err, errAnswer) {
		what = c.node.balance.blame(began, c.opened)
	}
	if errors.Is(err, errBegun) && slices.ContainsFunc(l.nodes, func(n *node) bool { return n.balance.endpoints(began) }) {
		what = cut // no router can send the other half
	}
	if p.count[what].Add(1); what == lost {
		p.note(fmt.Sprintf("%s, %s: %s", k.name, c.node.name, classify(err)))
	}
	c.close()
	return nil
}

// pick returns the next node's connection, not open yet; nil if all are out.
func (l *load) pick() *conn {
	for range l.nodes {
		n := l.nodes[l.next.Add(1)%uint64(len(l.nodes))]
		if in, turn := n.balance.now(); in {
			return &conn{node: n, turn: turn}
		}
	}
	return nil
}

// errAnswer is an answer that is not the right one.
var errAnswer = errors.New("wrong answer")

// errBegun is an answer that ended in its middle.
var errBegun = errors.New("the answer ended in its middle")

// exchange sends a request, over a new connection if there is none, and reads
// the answer to its end.
func (c *conn) exchange(k kind, port int, request string) (err error) {
	if c.Conn == nil {
		c.opened = time.Now()
		if c.Conn, err = net.DialTimeout("tcp", c.node.at(port), requestLimit); err != nil {
			return err
		}
		c.in = bufio.NewReader(c.Conn)
	}
	c.uses++
	if err := c.SetDeadline(time.Now().Add(requestLimit)); err != nil {
		return err
	}
	if _, err := io.WriteString(c, request); err != nil {
		return err
	}
	if k.scheme == "tcp" {
		c.answer, err = c.in.ReadString('\n')
		if err == nil && (!strings.HasPrefix(c.answer, "echo-") || !strings.HasSuffix(c.answer, " echoes ahoy\n")) {
			return fmt.Errorf("%w: %q", errAnswer, c.answer)
		}
		return err
	}
	resp, err := http.ReadResponse(c.in, nil)
	if err != nil {
		return err
	}
	body, err := io.ReadAll(resp.Body)
	c.answer = string(body)
	switch {
	case err != nil:
		return fmt.Errorf("%w: %w", errBegun, err)
	case resp.StatusCode != http.StatusOK:
		return fmt.Errorf("%w: status %d", errAnswer, resp.StatusCode)
	case !strings.HasPrefix(c.answer, "web"):
		return fmt.Errorf("%w: %.60q", errAnswer, c.answer)
	}
	return nil
}

// note remembers why a request was lost.
func (p *phase) note(text string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.why[text] == nil {
		p.why[text] = &why{first: time.Since(p.began)}
	}
	p.why[text].count++
}

// classify names the error without the addresses that make each one different.
func classify(err error) string {
	switch {
	case errors.Is(err, errAnswer):
		return err.Error()
	case errors.Is(err, errBegun):
		return errBegun.Error()
	case errors.Is(err, syscall.ECONNREFUSED):
		return "connection refused"
	case errors.Is(err, syscall.ECONNRESET), errors.Is(err, syscall.EPIPE):
		return "connection reset"
	case errors.Is(err, os.ErrDeadlineExceeded):
		return "no answer in " + requestLimit.String()
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return "connection closed before the answer"
	}
	return err.Error()
}
