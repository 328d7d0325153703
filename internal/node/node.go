// Package node assembles one node: it opens the edges, starts the components
// and stops them in the reverse order. It knows every component and how they
// are wired; it must not know their rules.
package node

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"flotilla/internal/agent"
	"flotilla/internal/api"
	"flotilla/internal/catalog"
	"flotilla/internal/dns"
	"flotilla/internal/engine"
	"flotilla/internal/fleetapi"
	"flotilla/internal/logs"
	"flotilla/internal/nodeconfig"
	"flotilla/internal/peer"
	"flotilla/internal/router"
	"flotilla/internal/state"
	"flotilla/internal/store"
	"flotilla/internal/systemd"
	"flotilla/internal/wire"
)

// node is what the parts of Run share.
type node struct {
	cfg      settings
	version  string
	log      *slog.Logger
	started  time.Time
	troubles troubles

	client       *store.Client
	state        *state.Feed
	record       state.NodeRecord
	presence     *store.Presence
	registration *state.Registration
	engine       *engine.Engine
	peer         *peer.Peer
	api          *api.Server

	routing // where it routes
	units   // where it runs units
}

// routing is what a node that routes has.
type routing struct {
	catalog   *catalog.Feed
	discovery *discovery
	lastGood  *lastGood
	router    *router.Router
	dns       *dns.Server
	lag       *lag
}

// units is what a node that runs units has.
type units struct {
	systemd *systemd.Conn
	agent   *agent.Agent
	left    chan struct{} // closed when the node has left the cluster for good
	leaving sync.Once     // closes left
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
// Errors: another node uses the data directory, a port is taken, or a part of the
// node failed.
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

	n := &node{cfg: cfg, version: version, log: log, started: time.Now()}
	if err := n.open(); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, n.client.Close()) }()
	if n.api.Listeners, err = n.listeners(sockets); err != nil {
		return cfg.explainBind(err)
	}
	log.Info("node starts", "node", cfg.Name, "address", cfg.Address, "data", cfg.Data, "version", version)
	if err := runAll(ctx, n.parts()...); err != nil {
		return cfg.explainBind(err)
	}
	log.Info("node stopped", "node", cfg.Name)
	return nil
}

// parts are all that runs, those that others need first: they stop last.
func (n *node) parts() []part {
	var parts []part
	if n.cfg.RunsStore() && n.cfg.Supervise {
		parts = append(parts, part{"store", n.runStore})
	}
	parts = append(parts, part{"store client", n.client.Run}, part{"schema", n.checkSchema}, part{"state", n.state.Run},
		part{"presence", n.presence.Run}, part{"registration", n.registration.Run})
	if n.router != nil {
		n.discovery.restore(n.lastGood.load())
		from := n.catalog.Latest()
		parts = append(parts,
			part{"last good catalog", func(ctx context.Context) error { return n.lastGood.run(ctx, n.catalog, from) }},
			part{"discovery", n.discovery.run}, part{"router", n.router.Run}, part{"dns", n.dns.Run}, part{"router report", n.reportRouter},
			part{"propagation", func(ctx context.Context) error { return n.lag.run(ctx, n.router.Applied, n.api.Propagated) }})
	}
	if n.agent != nil {
		parts = append(parts, part{"systemd", n.systemd.Run}, part{"units", n.runUnits})
	}
	if n.record.Peer != "" {
		parts = append(parts, part{"answers to other nodes", n.servePeers})
	}
	if n.cfg.Engine {
		parts = append(parts, part{"leadership", func(ctx context.Context) error {
			return n.state.Lead(ctx, n.record.ID, n.cfg.Name, n.engine.Lead)
		}})
	}
	return append(parts, part{"api", n.api.Run})
}

// open makes every edge and component; none of them runs yet.
func (n *node) open() (err error) {
	secure, err := n.cfg.tls()
	if err != nil {
		return err
	}
	endpoints, local := n.cfg.endpoints()
	if n.client, err = store.Open(store.Config{Endpoints: endpoints, TLS: secure, Local: local, Logger: n.log}); err != nil {
		return err
	}
	if err = n.openComponents(); err != nil {
		return errors.Join(err, n.client.Close())
	}
	return nil
}

func (n *node) openComponents() (err error) {
	addr, err := netip.ParseAddr(n.cfg.Address)
	if err != nil {
		return err
	}
	if n.record, err = n.cfg.record(n.version, n.started); err != nil {
		return err
	}
	ttl := time.Duration(n.cfg.MachineTTL) * time.Second
	n.state = state.NewFeed(n.client, state.Keys{Prefix: n.cfg.KeyPrefix}, n.log)
	n.presence = store.NewPresence(n.client, ttl, n.log)
	n.registration = state.NewRegistration(n.state, n.presence, n.record, ttl, n.log)
	n.engine = engine.New(engine.Config{Feed: n.state, Store: n.client, Log: n.log})
	n.peer = peer.New(addr, func(a netip.Addr) bool { return n.state.Latest().HasAddress(a) })
	a := api.Config{
		Node: n.cfg.Name, ID: n.record.ID, Version: n.version, Address: n.cfg.Address, Started: n.started, Socket: n.cfg.Socket,
		State: n.state, Store: n.client, Log: n.log, StoreStatus: n.storeStatus, Warnings: n.warnings, Engine: n.engine.Stats,
	}
	if n.record.Units {
		n.openUnits(ttl)
		a.Report, a.Leave = n.agent.Report, n.leave
	}
	if n.record.Routes {
		if err := n.openServices(addr, &a); err != nil {
			return err
		}
	}
	journals := logs.New(logs.Config{Feed: n.state, Peer: n.peer, Self: n.record.ID, Own: n.ownUnits, Journal: systemd.Journal, Show: systemd.Show})
	a.Journal, a.UnitStatus = journals.ServeJournal, journals.ServeUnitStatus
	n.api = api.New(a)
	n.api.Fleet = fleetapi.New(fleetapi.Config{API: n.api, Registered: n.registered, TokenLimit: n.cfg.TokenLimit, Log: n.log})
	return nil
}

func (n *node) openServices(addr netip.Addr, a *api.Config) (err error) {
	cfg := n.cfg
	a.OpsSocket = fmt.Sprintf("@flotilla/%s:%d", cfg.Address, cfg.BalancerPort)
	n.catalog, n.lag = catalog.NewFeed(), newLag()
	if n.router, err = router.New(cfg.router(addr, a.OpsSocket), n.catalog, n.log); err != nil {
		return err
	}
	names, err := cfg.dns(addr)
	if err != nil {
		return err
	}
	if n.dns, err = dns.New(names, n.catalog, n.log); err != nil {
		return err
	}
	n.lastGood = &lastGood{dir: cfg.Data, log: n.log}
	n.discovery = &discovery{
		reflector: store.NewReflector(n.client, catalog.Prefix, n.state.Keys.Confirmed(), n.log),
		feed:      n.catalog, log: n.log, received: n.lag.seen, builder: catalog.NewBuilder(cfg.Policy()),
	}
	a.Catalog, a.Policy, a.Router, a.DNS, a.AcceptEpoch = n.catalog, cfg.Policy(), n.router, n.dns.Stats, n.discovery.reflector.AcceptEpoch
	a.Domain, a.Ports = strings.Trim(cfg.DNSDomain, "."), api.Ports{HTTP: cfg.HTTPPort, HTTPS: cfg.HTTPSPort, SNI: cfg.TLSPassthroughPort}
	a.Problems = func() int { return int(n.discovery.problems.Load()) }
	return nil
}

// storeStatus returns how the node stands to the store: its catalog, or its state
// of the cluster where it has none.
func (n *node) storeStatus() wire.StoreStatus {
	if n.discovery != nil {
		return n.discovery.status()
	}
	return storeStatus(n.state.Status(), wire.SourceLive)
}

// servePeers answers other nodes.
func (n *node) servePeers(ctx context.Context) error {
	l, err := net.Listen("tcp", n.record.Peer)
	if err != nil {
		return fmt.Errorf("--api-port %d: %w", n.cfg.APIPort, err)
	}
	return api.Serve(ctx, http.Handler(n.peer), n.log, l)
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
