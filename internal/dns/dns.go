// Package dns answers the cluster's own domain on a node from the newest
// catalog snapshot and forwards every other name. It knows DNS messages, the
// catalog and sockets; it must not know etcd, HAProxy, units or other nodes,
// and it never waits for any of them.
package dns

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"flotilla/internal/catalog"

	"flotilla/internal/wire"
	"golang.org/x/sync/errgroup"
)

const (
	maxForwards    = 1024 // questions that may wait for upstreams at once
	maxTCP         = 256  // open TCP connections
	tcpIdle        = 10 * time.Second
	maxUDPAnswer   = 1232 // bytes; larger ones are truncated, whatever the asker takes
	readersPerAddr = 2    // UDP sockets per listen address, which the kernel spreads askers over
	defaultDomain  = "local"
	defaultCache   = 10000
)

// Config says what a Server answers and whom it asks.
type Config struct {
	Listen    []netip.AddrPort // each is served over UDP and TCP; port 0 picks a free one
	Domain    string           // the cluster's own domain, "local" if empty
	Address   []netip.Addr     // this node's service addresses, given for every name of the domain
	Node      string           // this node's name, for its PTR records
	Upstreams []netip.AddrPort // asked for all other names, in this order; none: they are refused
	CacheSize int              // answers of upstreams to keep; 0 is 10000, negative keeps none
}

// Server is a DNS server for one node.
type Server struct {
	listen  []netip.AddrPort
	zone    *zone
	forward *forwarder
	log     *slog.Logger
	slots   chan struct{} // one token per question that waits for upstreams
	conns   chan struct{} // one token per TCP connection
	running sync.WaitGroup
	ready   chan struct{} // closed when addrs is set and every socket bound
	addrs   []netip.AddrPort
	tallies []*tally // one per UDP socket and the last for TCP
}

// tally counts the questions of one reader, apart from the others' so that
// readers do not contend for it.
type tally struct {
	local, forwarded, cached, stale, errors, dropped atomic.Uint64
	_                                                [64]byte
}

// New returns a Server that answers from feed's newest snapshot. It opens
// nothing; Run does. An upstream that is one of the listen addresses is left
// out, since it would be this server itself.
func New(cfg Config, feed *catalog.Feed, log *slog.Logger) (*Server, error) {
	if len(cfg.Listen) == 0 {
		return nil, errors.New("dns: no address to listen on")
	}
	zone, err := newZone(cfg, feed)
	if err != nil {
		return nil, fmt.Errorf("dns: %w", err)
	}
	if cfg.CacheSize == 0 {
		cfg.CacheSize = defaultCache
	}
	upstreams := slices.DeleteFunc(slices.Clone(cfg.Upstreams), func(u netip.AddrPort) bool {
		return !u.IsValid() || slices.Contains(cfg.Listen, u)
	})
	if n := len(cfg.Upstreams) - len(upstreams); n > 0 {
		log.Warn("dns upstreams left out: this server itself", "upstreams", n)
	}
	zone.recursive = len(upstreams) > 0
	return &Server{
		listen:  slices.Clone(cfg.Listen),
		zone:    zone,
		forward: newForwarder(upstreams, newCache(cfg.CacheSize), log),
		log:     log,
		slots:   make(chan struct{}, maxForwards),
		conns:   make(chan struct{}, maxTCP),
		ready:   make(chan struct{}),
		tallies: newTallies(len(cfg.Listen)*readersPerAddr + 1),
	}, nil
}

func newTallies(n int) []*tally {
	t := make([]*tally, n)
	for i := range t {
		t[i] = new(tally)
	}
	return t
}

// Run binds every socket and serves until ctx ends. It returns nil then, and an
// error if an address cannot be bound. It runs once.
func (s *Server) Run(ctx context.Context) error {
	socks, err := bind(ctx, s.listen)
	if err != nil {
		return err
	}
	defer socks.close()
	g, ctx := errgroup.WithContext(ctx)
	defer context.AfterFunc(ctx, socks.close)()
	for _, l := range socks.tcp {
		g.Go(func() error { return s.serveTCP(ctx, l) })
	}
	for i, c := range socks.udp {
		g.Go(func() error { return s.serveUDP(ctx, c, s.tallies[i]) })
	}
	s.addrs = socks.addrs
	close(s.ready)
	err = g.Wait()
	s.running.Wait()
	s.forward.running.Wait()
	return err
}

// Ready is closed when every socket is bound.
func (s *Server) Ready() <-chan struct{} { return s.ready }

// Addrs returns the addresses served, in the order of Config.Listen; nil before
// Ready.
func (s *Server) Addrs() []netip.AddrPort {
	select {
	case <-s.ready:
		return slices.Clone(s.addrs)
	default:
		return nil
	}
}

// Stats returns the counters.
func (s *Server) Stats() wire.DNSStats {
	st := wire.DNSStats{
		UpstreamFailures: s.forward.failures.Load(),
		CacheEntries:     s.forward.cache.len(),
	}
	for _, t := range s.tallies {
		st.Local += t.local.Load()
		st.Forwarded += t.forwarded.Load()
		st.Cached += t.cached.Load()
		st.Stale += t.stale.Load()
		st.Errors += t.errors.Load()
		st.Dropped += t.dropped.Load()
	}
	return st
}

// validLabel reports whether s can be one label of a host name as it stands.
func validLabel(s string) bool {
	return s != "" && len(s) <= 63 && strings.Trim(s, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_") == ""
}
