// Package peer is how nodes ask each other: one handler for the questions of
// others, one client for those of this node, and one rule of who may ask. It knows
// addresses; it must not know what is asked.
package peer

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"syscall"
	"time"

	"flotilla/internal/wire"
)

// DefaultConnectLimit is how long a node may take to accept a connection and to
// begin its answer, until it counts as away.
const DefaultConnectLimit = 4 * time.Second

// Peer is this node among the others. Make it with New.
type Peer struct {
	self         netip.Addr
	known        func(netip.Addr) bool
	mux          *http.ServeMux
	ConnectLimit time.Duration
}

// New returns the Peer of a node. Its questions come from the address self, by
// which the others know it; known reports whether an address is that of a node of
// the cluster.
func New(self netip.Addr, known func(netip.Addr) bool) *Peer {
	return &Peer{self: self, known: known, mux: http.NewServeMux(), ConnectLimit: DefaultConnectLimit}
}

// Handle answers a question of other nodes, a pattern as of http.ServeMux.
func (p *Peer) Handle(pattern string, h http.HandlerFunc) { p.mux.HandleFunc(pattern, h) }

// ServeHTTP answers nodes of the cluster, and nobody else.
func (p *Peer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	from, err := netip.ParseAddrPort(r.RemoteAddr)
	if err != nil || !p.known(from.Addr().Unmap().WithZone("")) {
		wire.WriteError(w, wire.Errorf(wire.CodeForbidden, "", "%s is not the address of a node of this cluster", r.RemoteAddr))
		return
	}
	p.mux.ServeHTTP(w, r)
}

// Get asks the node at address, an ip:port, and returns the body of its answer,
// which the caller closes. Errors: it does not answer, or it answers with an error.
func (p *Peer) Get(ctx context.Context, address, path string, query url.Values) (io.ReadCloser, error) {
	u := url.URL{Scheme: "http", Host: address, Path: path, RawQuery: query.Encode()}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, u.String(), nil)
	if err != nil {
		return nil, err
	}
	transport := &http.Transport{DialContext: p.dial, ResponseHeaderTimeout: p.ConnectLimit, DisableKeepAlives: true}
	resp, err := transport.RoundTrip(req)
	if err != nil {
		return nil, fmt.Errorf("it does not answer: %w", err)
	}
	if resp.StatusCode != http.StatusOK {
		raw, _ := io.ReadAll(io.LimitReader(resp.Body, 4<<10)) // what there is of it
		text := string(raw)
		var wrapped struct{ Error *wire.Error }
		if json.Unmarshal(raw, &wrapped) == nil && wrapped.Error != nil {
			text = wrapped.Error.Message
		}
		return nil, errors.Join(fmt.Errorf("it answers %s: %s", resp.Status, text), resp.Body.Close())
	}
	return resp.Body, nil
}

// dial connects from this node's own address, unless something translates it.
func (p *Peer) dial(ctx context.Context, network, address string) (net.Conn, error) {
	d := &net.Dialer{Timeout: p.ConnectLimit}
	if p.self.IsValid() {
		d.LocalAddr = net.TCPAddrFromAddrPort(netip.AddrPortFrom(p.self, 0))
	}
	conn, err := d.DialContext(ctx, network, address)
	if d.LocalAddr != nil && errors.Is(err, syscall.EADDRNOTAVAIL) {
		d.LocalAddr = nil
		return d.DialContext(ctx, network, address)
	}
	return conn, err
}
