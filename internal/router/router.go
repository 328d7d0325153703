// Package router makes the local HAProxy equal the catalog. It knows services,
// endpoints and HAProxy; it must not know etcd, DNS or unit files.
package router

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"flotilla/internal/catalog"
	"flotilla/internal/child"
	"flotilla/internal/haproxy"
	"flotilla/internal/wire"
)

// Config is what a node decides about its router.
type Config struct {
	Node           string     // the node's name, shown on error pages
	Address        netip.Addr // every listener binds to it
	HTTPPort       int        // default 80
	HTTPSPort      int        // default 443
	BalancerPort   int        // health check of the balancer before the nodes, metrics; default 9180
	RedirectPort   int        // where nftables sends TCP host_ports; the next port takes HTTP host_ports; default 9181
	SNIPort        int        // TLS passthrough by server name; 0: none
	Dir            string     // HAProxy's configuration, maps, sockets and certificates
	Certs          string     // directory of certificates, "" for none
	OpsSocket      string     // "@name": abstract unix socket that serves /healthz, /readyz, /freshz and /metrics
	Binary         string     // HAProxy; default: found in PATH
	Supervise      bool       // start and restart HAProxy ourselves; false under systemd
	TrustedProxies []netip.Prefix
	AcceptProxy    bool   // every HTTP and HTTPS connection begins with a PROXY protocol header
	AccessLog      string // "off" (default), "stdout", a syslog socket's path or ip:port
	HostPorts      string // how host_ports open: "auto" (default), "nftables" or "listeners"
	MaxConnections int    // 0: from the limit of open files
}

// Router drives one HAProxy. Make it with New and start it with Run.
type Router struct {
	cfg     Config
	feed    *catalog.Feed
	log     *slog.Logger
	client  *haproxy.Client
	version haproxy.Version
	token   string // tells this process's attachment from any other

	status   atomic.Pointer[wire.RouterStatus]
	applied  atomic.Pointer[appliedMark]
	requests chan func() // run by the loop
	owners   sync.Map    // service name by backend, for Stats
	stats    statistics

	// Owned by the loop.
	attached bool
	have     *state // what HAProxy runs, as far as it was read
	slots    slots  // which backends are free
	done     *catalog.Snapshot
	ports    hostPorts
	certs    certificates
	disk     *disk
	reload   reloading
	lacking  map[string]lack // by service
	draining bool
	counts   struct{ reloads, resyncs, drift, commands uint64 }
	audit    auditor
	start    chan struct{} // closed when HAProxy may be started
}

// lack is a service of which HAProxy does not run what is wanted.
type lack struct {
	since   int64 // the first revision that may be missing
	why     string
	refused bool // at run time; else it waits for a reload
}

type appliedMark struct {
	revision int64
	replaced chan struct{}
}

// New returns a router for cfg that follows feed.
func New(cfg Config, feed *catalog.Feed, log *slog.Logger) (*Router, error) {
	dir, err := filepath.Abs(cfg.Dir)
	if err != nil {
		return nil, fmt.Errorf("router directory %s: %w", cfg.Dir, err)
	}
	cfg.Dir = dir
	r := &Router{
		cfg: cfg, feed: feed, log: log,
		client:   &haproxy.Client{Socket: filepath.Join(dir, "admin.sock")},
		token:    rand.Text(),
		requests: make(chan func()),
		lacking:  map[string]lack{},
		start:    make(chan struct{}),
		have:     newState(),
	}
	r.applied.Store(&appliedMark{replaced: make(chan struct{})})
	r.status.Store(&wire.RouterStatus{})
	return r, nil
}

// Run keeps HAProxy equal to the feed until ctx ends. When it supervises HAProxy
// it stops it then, unless the cause of ctx's end is child.ErrLeave.
func (r *Router) Run(ctx context.Context) error {
	if err := r.prepare(ctx); err != nil {
		return err
	}
	g, gctx := errgroup.WithContext(ctx)
	if r.cfg.Supervise {
		g.Go(func() error { return r.supervise(gctx) })
	}
	g.Go(func() error { return r.disk.run(gctx) })
	g.Go(func() error { return r.loop(gctx) })
	err := g.Wait()
	if r.cfg.Supervise && !errors.Is(context.Cause(ctx), child.ErrLeave) {
		r.ports.remove()
	}
	return err
}

func (r *Router) supervise(ctx context.Context) error {
	select {
	case <-r.start:
	case <-ctx.Done():
		return nil
	}
	err := child.Run(ctx, child.Config{
		Name:        "haproxy",
		Argv:        []string{r.cfg.Binary, "-W", "-S", r.masterSocket() + ",mode,600", "-f", r.disk.config()},
		Dir:         r.cfg.Dir,
		LogFile:     filepath.Join(r.cfg.Dir, "haproxy.log"),
		PidFile:     filepath.Join(r.cfg.Dir, "haproxy.pid"),
		StopTimeout: 5 * time.Second,
		Logger:      r.log,
	})
	if err != nil {
		return fmt.Errorf("run HAProxy: %w", err)
	}
	return nil
}

func (r *Router) masterSocket() string { return filepath.Join(r.cfg.Dir, "master.sock") }

// attachEvery is how often a router without HAProxy looks for it.
const attachEvery = 50 * time.Millisecond

// worthLogging is how long HAProxy may be away, as at every start, before it is
// worth a line.
const worthLogging = 2 * time.Second

// loop is the only goroutine that changes HAProxy.
func (r *Router) loop(ctx context.Context) error {
	tick := time.NewTicker(time.Second / ticksPerSecond)
	defer tick.Stop()
	ticks := 0
	retry := time.NewTicker(attachEvery)
	defer retry.Stop()
	var lastErr string
	var failing time.Time // since when converging fails
	for {
		snapshot, newer := r.feed.Next()
		err := r.converge(ctx, snapshot)
		if ctx.Err() != nil {
			return nil
		}
		switch text := errorText(err); {
		case err == nil:
			lastErr, failing = "", time.Time{}
		case failing.IsZero():
			failing = time.Now()
		case text != lastErr && time.Since(failing) > worthLogging:
			lastErr = text
			r.log.Warn("router is not converged", "err", err)
		}
		r.publish(err)
		again := retry.C
		if err == nil && !r.reload.pending() {
			again = nil
		}
		select {
		case <-ctx.Done():
			return nil
		case <-newer:
		case f := <-r.requests:
			f()
		case <-tick.C:
			ticks++
			r.housekeeping(ctx, ticks%ticksPerSecond == 0)
		case <-again:
		}
	}
}

func errorText(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}

// converge makes HAProxy equal snapshot, which is nil before the first one.
func (r *Router) converge(ctx context.Context, snapshot *catalog.Snapshot) error {
	if !r.attached {
		if err := r.attach(ctx, snapshot); err != nil {
			return err
		}
	}
	if snapshot == nil {
		return nil
	}
	var names []string
	for _, c := range snapshot.Diff(r.done) {
		names = append(names, c.Name())
	}
	if r.done == nil { // what HAProxy has beyond the catalog
		for service := range r.have.owned {
			if service != nobody && snapshot.Service(service) == nil {
				names = append(names, service)
			}
		}
	}
	names = append(names, nobody) // the last one, because it depends on the others
	if err := r.reconcile(ctx, snapshot, names); err != nil {
		return err
	}
	r.done = snapshot
	// Only now: the old worker goes on with the connections that it has, so it
	// must know what the new one knows.
	if r.reload.due(time.Now()) {
		return r.doReload(ctx, snapshot)
	}
	return nil
}

// reconcile makes HAProxy serve the named services as the snapshot has them.
func (r *Router) reconcile(ctx context.Context, snapshot *catalog.Snapshot, names []string) error {
	const atOnce = 256
	for len(names) > 0 {
		batch := names[:min(atOnce, len(names))]
		names = names[len(batch):]
		if err := r.reconcileBatch(ctx, snapshot, batch); err != nil {
			return err
		}
	}
	return nil
}

func (r *Router) reconcileBatch(ctx context.Context, snapshot *catalog.Snapshot, names []string) error {
	var refused map[string]string
	for range 3 {
		p := r.plan(snapshot, names)
		if len(p.steps) == 0 {
			r.note(snapshot, names, p.reload, nil)
			return nil
		}
		var err error
		if refused, err = r.execute(ctx, p.steps); err != nil {
			return err
		}
	}
	// HAProxy refuses something. One service must not hold up the others: those
	// that are left over wait for the next audit.
	left, reload := map[string]string{}, map[string]string{}
	for _, name := range names {
		p := r.plan(snapshot, []string{name})
		if len(p.steps) > 0 {
			left[name] = refused[name]
		}
		maps.Copy(reload, p.reload)
	}
	r.note(snapshot, names, reload, left)
	return nil
}

// plan plans for the named services, and takes and gives up backends for them.
func (r *Router) plan(snapshot *catalog.Snapshot, names []string) plan {
	for _, name := range names {
		r.ports.look(snapshot.Service(name))
	}
	p := planServices(view{snapshot: snapshot, have: r.have, slots: &r.slots, ports: &r.ports, sni: r.cfg.SNIPort != 0}, names)
	now := time.Now()
	for _, m := range p.moves {
		r.slots.apply(m, now)
		if m.backend != "" {
			r.owners.Store(m.backend, m.service)
		}
	}
	return p
}

// note remembers which of the named services lack something: those that wait for a
// reload, which it asks for, and those that HAProxy has refused, each with the reason.
func (r *Router) note(snapshot *catalog.Snapshot, names []string, reload, refused map[string]string) {
	since := r.done.Rev() + 1
	if snapshot == r.done { // somebody else has changed HAProxy
		since--
	}
	now := time.Now()
	for _, name := range names {
		was, old := r.lacking[name]
		if !old {
			was.since = since
		}
		why, isRefused := refused[name]
		switch {
		case isRefused:
			if !was.refused {
				r.log.Error("HAProxy refuses a change", "service", name, "reason", why)
				r.reload.ask(now, "a change of service "+name+" was refused at run time")
			}
			r.lacking[name] = lack{was.since, why, true}
		case reload[name] != "":
			r.reload.ask(now, reload[name])
			r.lacking[name] = lack{was.since, reload[name], false}
		default:
			delete(r.lacking, name)
		}
	}
}

// ticksPerSecond is how often housekeeping runs: little at a time, because
// changes wait for it.
const ticksPerSecond = 4

// housekeeping audits a part of HAProxy, and does the rest once a second.
func (r *Router) housekeeping(ctx context.Context, second bool) {
	if !r.attached {
		return
	}
	now := time.Now()
	err := r.auditSome(ctx, second)
	if !second {
		if err != nil && ctx.Err() == nil {
			r.log.Warn("router audit", "err", err)
		}
		return
	}
	for _, f := range []func(context.Context, time.Time) error{r.retire, r.checkPorts, r.updateCertificates} {
		err = errors.Join(err, f(ctx, now))
	}
	if err != nil && ctx.Err() == nil {
		r.log.Warn("router housekeeping", "err", err)
	}
	if r.slots.scarce() {
		r.reload.ask(now, "few free backends are left")
	}
	r.writeFiles(now)
}

// publish makes the loop's state visible to others.
func (r *Router) publish(err error) {
	old := r.status.Load()
	s := &wire.RouterStatus{
		Serving: r.attached, Applied: old.Applied, AppliedAt: old.AppliedAt, Draining: r.draining,
		Version: r.version.Full, Pid: old.Pid, Generation: r.reload.generation,
		Reloads: r.counts.reloads, LastReload: r.reload.last,
		Resyncs: r.counts.resyncs, Drift: r.counts.drift, Commands: r.counts.commands,
		Slots: r.slots.total(), FreeSlots: r.slots.total() - len(r.slots.used),
		HostPorts: r.ports.mode(), Refused: map[string]int64{}, Problems: r.problems(), Err: errorText(err),
	}
	if r.attached {
		s.Pid = r.disk.pid
	}
	for name := range r.refused() {
		s.Refused[name] = r.lacking[name].since
	}
	// A reload is waited for, unless it fails: then the services that need it are
	// refused, and the others go on.
	waiting := r.reload.pending() && r.reload.failures == 0
	if err == nil && r.done != nil && !waiting && r.done.Revision != old.Applied {
		s.Applied, s.AppliedAt = r.done.Revision, time.Now()
	}
	r.status.Store(s)
	if s.Applied != old.Applied {
		mark := r.applied.Swap(&appliedMark{s.Applied, make(chan struct{})})
		close(mark.replaced)
	}
}

func (r *Router) problems() []catalog.Problem {
	problems := slices.Concat([]catalog.Problem{}, r.ports.problems(), r.certs.problems)
	for name, why := range r.refused() {
		problems = append(problems, catalog.Problem{
			Key:    catalog.Prefix + name,
			Reason: "HAProxy refuses it: " + why,
			Remedy: "report this as a bug, with the service's keys; the service is served as it was before",
		})
	}
	return problems
}

// refused returns the services that will lack something for longer, and why.
func (r *Router) refused() map[string]string {
	services := map[string]string{}
	for name, l := range r.lacking {
		if l.refused || r.reload.failures > 0 {
			services[name] = l.why
		}
	}
	return services
}

// Status returns the router's state now. It never blocks.
func (r *Router) Status() wire.RouterStatus { return *r.status.Load() }

// Applied returns the catalog revision that HAProxy runs and a channel that is
// closed when it changes.
func (r *Router) Applied() (int64, <-chan struct{}) {
	mark := r.applied.Load()
	return mark.revision, mark.replaced
}

// SetDraining makes the balancer's check answer 503, or 200 again. It outlives
// restarts of the node.
func (r *Router) SetDraining(draining bool) error {
	result := make(chan error, 1)
	ask := func() { result <- r.setDraining(draining) }
	select {
	case r.requests <- ask:
		return <-result
	case <-time.After(5 * time.Second):
		return errors.New("the router is busy; try again")
	}
}

func (r *Router) setDraining(draining bool) error {
	r.draining = draining
	r.disk.stale = true
	r.writeFiles(time.Time{})
	if !r.attached {
		return nil
	}
	cmd := fmt.Sprintf("set map %s draining %s", r.mapFile(haproxy.StateMap), yes(draining))
	answers, err := r.do(context.Background(), cmd) // an error makes us attach, which sets it again
	if err != nil {
		return err
	}
	return answers[0].Err()
}

func yes(b bool) string {
	if b {
		return "yes"
	}
	return "no"
}

func (r *Router) mapFile(name string) string {
	return haproxy.Config{Dir: r.cfg.Dir}.Map(name)
}

// isRoot decides whether HAProxy is told to give up its rights.
func isRoot() bool { return os.Geteuid() == 0 }
