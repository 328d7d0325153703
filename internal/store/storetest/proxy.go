package storetest

import (
	"bytes"
	"net"
	"net/netip"
	"net/url"
	"sync"
	"testing"
)

// Proxy passes TCP connections on to one endpoint and can break them in the
// ways in which networks do.
type Proxy struct {
	listener net.Listener
	open     sync.WaitGroup

	mu     sync.Mutex
	target string                // host:port; guarded by mu
	down   bool                  // refuses; guarded by mu
	thawed chan struct{}         // closed unless frozen; guarded by mu
	cut    *cut                  // guarded by mu
	conns  map[net.Conn]struct{} // both sides of every connection; guarded by mu
}

type cut struct {
	match  []byte
	effect func() // nil: cut before the match is passed on
}

// NewProxy starts a proxy to the endpoint, such as http://127.0.0.1:2379. It
// ends with the test.
func NewProxy(t testing.TB, endpoint string) *Proxy {
	t.Helper()
	l, err := net.Listen("tcp", netip.AddrPortFrom(Addr(t), 0).String())
	if err != nil {
		t.Fatalf("listen for the proxy: %v", err)
	}
	p := &Proxy{listener: l, thawed: make(chan struct{}), conns: map[net.Conn]struct{}{}}
	close(p.thawed)
	p.Retarget(endpoint)
	p.open.Go(p.accept)
	t.Cleanup(func() {
		_ = l.Close()
		p.Thaw()
		p.Cut()
		p.open.Wait()
	})
	return p
}

// Endpoint returns where the proxy listens, as an endpoint of the store.
func (p *Proxy) Endpoint() string { return "http://" + p.listener.Addr().String() }

// Retarget sends new connections to another endpoint.
func (p *Proxy) Retarget(endpoint string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.target = endpoint
	if u, err := url.Parse(endpoint); err == nil && u.Host != "" {
		p.target = u.Host
	}
}

// Cut closes all connections, and new ones at once, until Mend.
func (p *Proxy) Cut() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.down = true
	for c := range p.conns {
		_ = c.Close()
	}
}

// Mend ends Cut.
func (p *Proxy) Mend() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.down = false
}

// Freeze leaves connections open, accepts new ones, and passes nothing on until
// Thaw: a half-open connection.
func (p *Proxy) Freeze() {
	p.mu.Lock()
	defer p.mu.Unlock()
	select {
	case <-p.thawed:
		p.thawed = make(chan struct{})
	default:
	}
}

// Thaw ends Freeze. What was held is passed on.
func (p *Proxy) Thaw() {
	p.mu.Lock()
	defer p.mu.Unlock()
	select {
	case <-p.thawed:
	default:
		close(p.thawed)
	}
}

// CutBefore cuts, once, in place of passing on the next piece of data from a
// client that contains match. Short requests arrive in one piece.
func (p *Proxy) CutBefore(match string) { p.arm(&cut{match: []byte(match)}) }

// CutAfter passes the next piece of data from a client that contains match on,
// waits for effect to return and cuts. The answer does not reach the client.
func (p *Proxy) CutAfter(match string, effect func()) { p.arm(&cut{[]byte(match), effect}) }

func (p *Proxy) arm(c *cut) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.cut = c
}

func (p *Proxy) accept() {
	for {
		client, err := p.listener.Accept()
		if err != nil {
			return
		}
		p.open.Go(func() { p.serve(client) })
	}
}

func (p *Proxy) serve(client net.Conn) {
	defer p.drop(client)
	p.mu.Lock()
	target, down := p.target, p.down
	p.conns[client] = struct{}{}
	p.mu.Unlock()
	if down {
		return
	}
	server, err := net.Dial("tcp", target)
	if err != nil {
		return
	}
	p.mu.Lock()
	p.conns[server] = struct{}{}
	down = p.down
	p.mu.Unlock()
	defer p.drop(server)
	if down {
		return
	}
	swallow := make(chan struct{})
	var back sync.WaitGroup
	back.Go(func() {
		p.copy(client, server, swallow, nil)
		_ = client.Close()
	})
	p.copy(server, client, nil, swallow)
	_ = server.Close()
	back.Wait()
}

func (p *Proxy) drop(c net.Conn) {
	_ = c.Close()
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.conns, c)
}

// copy passes data on until either side ends. On the way to the client it drops
// data once deaf is closed; on the way to the server it closes mute, which is
// the other way's deaf, when CutAfter matches.
func (p *Proxy) copy(to, from net.Conn, deaf, mute chan struct{}) {
	buf := make([]byte, 64<<10)
	for {
		n, err := from.Read(buf)
		if err != nil {
			return
		}
		p.mu.Lock()
		thawed, hit := p.thawed, p.cut
		if hit != nil && (mute == nil || !bytes.Contains(buf[:n], hit.match)) {
			hit = nil
		}
		if hit != nil {
			p.cut = nil
		}
		p.mu.Unlock()
		<-thawed
		if hit != nil && hit.effect == nil {
			p.Cut()
			return
		}
		if hit != nil {
			close(mute)
		}
		select {
		case <-deaf:
			continue
		default:
		}
		if _, err := to.Write(buf[:n]); err != nil {
			return
		}
		if hit != nil {
			hit.effect()
			p.Cut()
			return
		}
	}
}
