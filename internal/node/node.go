// Package node assembles one node: it opens the edges, starts the components
// and stops them in the reverse order. It knows every component and how they
// are wired; it must not know their rules.
package node

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"flotilla/internal/api"
	"flotilla/internal/catalog"
	"flotilla/internal/dns"
	"flotilla/internal/nodeconfig"
	"flotilla/internal/router"
	"flotilla/internal/store"
)

// SchemaKey holds the version of the keys below /flotilla/ as {"v":1}.
const SchemaKey = "/flotilla/schema"

// schemaVersion is the one this program reads and writes.
const schemaVersion = 1

// node is what the parts of Run share.
type node struct {
	cfg     settings
	version string
	log     *slog.Logger
	started time.Time

	feed      *catalog.Feed
	client    *store.Client
	router    *router.Router
	dns       *dns.Server
	discovery *discovery
	lastGood  *lastGood
	lag       *lag
	presence  *store.Presence
	api       *api.Server
	fleet     fleet
	troubles  troubles
}

// Run runs a node until ctx ends. The configuration has to be valid.
//
// What is on disk from an earlier run is routed before the store is asked. On
// the way out the node leaves the list of nodes first and its store stops last.
// Store and HAProxy outlive a node that is killed; the next one adopts them.
//
// sockets are those that systemd opened for this process; the API is served on
// them too, and they stay open.
//
// Errors: another node uses the data directory, a port is taken (with the
// program that has it), or a part of the node failed.
func Run(ctx context.Context, given nodeconfig.Config, version string, log *slog.Logger, sockets ...*os.File) (err error) {
	cfg := settings{given}
	if err := os.MkdirAll(cfg.Data, 0o755); err != nil {
		return fmt.Errorf("create the data directory: %w", err)
	}
	unlock, err := lockData(cfg.Data)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, unlock()) }()

	n := &node{cfg: cfg, version: version, log: log, started: time.Now(), feed: catalog.NewFeed()}
	if err := n.open(); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, n.client.Close()) }()
	listeners, err := n.listeners(sockets)
	if err != nil {
		return cfg.explainBind(err)
	}

	log.Info("node starts", "node", cfg.Name, "address", cfg.Address, "data", cfg.Data, "version", version)
	var parts []part
	if cfg.RunsStore() && cfg.Supervise {
		parts = append(parts, part{"store", n.runStore})
	}
	parts = append(parts, part{"store client", n.client.Run}, part{"schema", n.checkSchema})
	parts = append(parts, n.fleetParts()...)
	if cfg.UnitsOnly {
		parts = append(parts, part{"api", func(ctx context.Context) error { return n.serveUnits(ctx, listeners) }})
	} else {
		parts = append(parts, n.serviceParts(listeners)...)
	}
	if err := runAll(ctx, parts...); err != nil {
		return cfg.explainBind(err)
	}
	log.Info("node stopped", "node", cfg.Name)
	return nil
}

// serviceParts are what of services runs on this node, those that others need
// first.
func (n *node) serviceParts(listeners []net.Listener) []part {
	n.api.Listeners = listeners
	n.discovery.restore(n.lastGood.load())
	from := n.feed.Latest()
	return []part{
		{"last good catalog", func(ctx context.Context) error { return n.lastGood.run(ctx, n.feed, from) }},
		{"discovery", n.discovery.run},
		{"router", n.router.Run},
		{"dns", n.dns.Run},
		{"api", n.api.Run},
		{"propagation", func(ctx context.Context) error { return n.lag.run(ctx, n.router.Applied, n.api.Propagated) }},
		{"presence", n.presence.Run},
		{"report", n.report},
	}
}

// serveUnits serves the API of a node without services.
func (n *node) serveUnits(ctx context.Context, listeners []net.Listener) error {
	own, err := api.Listen(n.cfg.Socket)
	if err != nil {
		return err
	}
	return api.Serve(ctx, api.Routes(n.log, n.fleet.routes()...), n.log, append(listeners, own)...)
}

// open makes every edge and component; none of them runs yet.
func (n *node) open() error {
	secure, err := n.cfg.tls()
	if err != nil {
		return err
	}
	endpoints, local := n.cfg.endpoints()
	if n.client, err = store.Open(store.Config{Endpoints: endpoints, TLS: secure, Local: local, Logger: n.log}); err != nil {
		return err
	}
	err = n.openFleet()
	if err == nil && !n.cfg.UnitsOnly {
		err = n.openComponents()
	}
	if err != nil {
		return errors.Join(err, n.client.Close())
	}
	return nil
}

func (n *node) openComponents() (err error) {
	cfg := n.cfg
	addr, err := netip.ParseAddr(cfg.Address)
	if err != nil {
		return err
	}
	ops := fmt.Sprintf("@flotilla/%s:%d", cfg.Address, cfg.BalancerPort)
	if n.router, err = router.New(cfg.router(addr, ops), n.feed, n.log); err != nil {
		return err
	}
	dnsConfig, err := cfg.dns(addr)
	if err != nil {
		return err
	}
	if n.dns, err = dns.New(dnsConfig, n.feed, n.log); err != nil {
		return err
	}
	n.lag = newLag()
	n.lastGood = &lastGood{dir: cfg.Data, log: n.log}
	n.discovery = &discovery{
		reflector: store.NewReflector(n.client, catalog.Prefix, api.ConfirmedKey, n.log),
		feed:      n.feed, log: n.log, received: n.lag.seen, builder: catalog.NewBuilder(cfg.Policy()),
	}
	n.presence = store.NewPresence(n.client, time.Duration(cfg.MachineTTL)*time.Second, n.log)
	n.api = api.New(api.Config{
		Node: cfg.Name, Version: n.version, Address: cfg.Address, Domain: strings.Trim(cfg.DNSDomain, "."), Started: n.started,
		Ports:  api.Ports{HTTP: cfg.HTTPPort, HTTPS: cfg.HTTPSPort, SNI: cfg.TLSPassthroughPort},
		Socket: cfg.Socket, OpsSocket: ops, Policy: cfg.Policy(), Feed: n.feed, Store: n.client, Router: n.router,
		DNS: n.dns.Stats, StoreState: n.discovery.state, Problems: func() int { return int(n.discovery.problems.Load()) },
		Warnings: n.warnings, AcceptEpoch: n.discovery.reflector.AcceptEpoch,
		More: n.fleet.routes(), Collectors: []prometheus.Collector{n.fleet.collector()}, Log: n.log,
	})
	return nil
}

// endpoints returns where the store is reached and which of them is this node's
// own, "" if it has none.
func (c *settings) endpoints() (all []string, local string) {
	if !c.RunsStore() {
		return c.EtcdEndpoints, ""
	}
	addr, _ := netip.ParseAddr(c.Address) // Validate has parsed it
	local = "http://" + netip.AddrPortFrom(addr, uint16(c.StoreClientPort)).String()
	all = append(all, local)
	for _, j := range c.Join {
		if e, err := nodeconfig.JoinEndpoint(j, c.StoreClientPort); err == nil && e != local {
			all = append(all, e)
		}
	}
	return all, local
}

// tls returns how to speak to an external etcd, nil for plain connections.
func (c *settings) tls() (*tls.Config, error) {
	if c.EtcdCAFile == "" && c.EtcdCertFile == "" {
		if len(c.EtcdEndpoints) > 0 && strings.HasPrefix(c.EtcdEndpoints[0], "https://") {
			return &tls.Config{MinVersion: tls.VersionTLS12}, nil // the system's authorities
		}
		return nil, nil
	}
	t := &tls.Config{MinVersion: tls.VersionTLS12}
	if c.EtcdCAFile != "" {
		pem, err := os.ReadFile(c.EtcdCAFile)
		if err != nil {
			return nil, fmt.Errorf("--etcd-ca-file: %w", err)
		}
		t.RootCAs = x509.NewCertPool()
		if !t.RootCAs.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("--etcd-ca-file %s holds no certificate", c.EtcdCAFile)
		}
	}
	if c.EtcdCertFile != "" {
		if _, err := tls.LoadX509KeyPair(c.EtcdCertFile, c.EtcdKeyFile); err != nil {
			return nil, fmt.Errorf("--etcd-cert-file %s with --etcd-key-file %s: %w", c.EtcdCertFile, c.EtcdKeyFile, err)
		}
		// Read again for each handshake, so that a renewed certificate is used.
		t.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			pair, err := tls.LoadX509KeyPair(c.EtcdCertFile, c.EtcdKeyFile)
			return &pair, err
		}
	}
	return t, nil
}

func (c *settings) router(addr netip.Addr, ops string) router.Config {
	r := router.Config{
		Node: c.Name, Address: addr, HTTPPort: c.HTTPPort, HTTPSPort: c.HTTPSPort, BalancerPort: c.BalancerPort,
		RedirectPort: c.RedirectPort, SNIPort: c.TLSPassthroughPort, Dir: filepath.Join(c.Data, "router"),
		Certs: c.Certs, OpsSocket: ops, Binary: c.HAProxy, Supervise: c.Supervise, AcceptProxy: c.AcceptProxy,
		AccessLog: c.AccessLog, HostPorts: c.HostPorts, MaxConnections: c.MaxConnections,
	}
	for _, v := range c.TrustedProxy {
		if p, err := nodeconfig.ParsePrefix(v); err == nil { // Validate has parsed it
			r.TrustedProxies = append(r.TrustedProxies, p)
		}
	}
	return r
}

// resolvConf is where the machine's own resolvers are listed.
const resolvConf = "/etc/resolv.conf"

func (c *settings) dns(addr netip.Addr) (dns.Config, error) {
	d := dns.Config{
		Listen: []netip.AddrPort{netip.AddrPortFrom(addr, uint16(c.DNSPort))}, Domain: c.DNSDomain,
		Address: []netip.Addr{addr}, Node: c.Name,
	}
	for _, v := range c.DNSListen {
		a, err := nodeconfig.AddrPort(v, c.DNSPort)
		if err != nil {
			return d, fmt.Errorf("--dns-listen %s: %w", v, err)
		}
		d.Listen = append(d.Listen, a)
	}
	switch {
	case len(c.DNSUpstream) == 1 && c.DNSUpstream[0] == "none":
	case len(c.DNSUpstream) == 0:
		found, err := dns.ResolvConf(resolvConf)
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return d, err
		}
		d.Upstreams = found
	default:
		for _, v := range c.DNSUpstream {
			a, err := nodeconfig.AddrPort(v, 53)
			if err != nil {
				return d, fmt.Errorf("--dns-upstream %s: %w", v, err)
			}
			d.Upstreams = append(d.Upstreams, a)
		}
	}
	return d, nil
}

// lockData keeps a second node off the data directory until unlock is called,
// or this process ends.
func lockData(dir string) (unlock func() error, err error) {
	path := filepath.Join(dir, "node.lock")
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return nil, fmt.Errorf("lock the data directory: %w", err)
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		pid, _ := os.ReadFile(path) // says who, if it can be read
		return nil, errors.Join(fmt.Errorf("the data directory %s is used by another node (pid %s): stop that one, or give this one another --data, --name and --address", dir, strings.TrimSpace(string(pid))), f.Close())
	}
	if err := f.Truncate(0); err != nil {
		return nil, errors.Join(fmt.Errorf("lock the data directory: %w", err), f.Close())
	}
	if _, err := f.WriteAt([]byte(strconv.Itoa(os.Getpid())+"\n"), 0); err != nil {
		return nil, errors.Join(fmt.Errorf("lock the data directory: %w", err), f.Close())
	}
	return f.Close, nil
}
