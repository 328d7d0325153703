package node

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/http"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"flotilla/internal/agent"
	"flotilla/internal/api"
	"flotilla/internal/engine"
	"flotilla/internal/fleetapi"
	"flotilla/internal/logs"
	"flotilla/internal/nodeconfig"
	"flotilla/internal/registry"
	"flotilla/internal/store"
	"flotilla/internal/systemd"
)

// ErrReload as the cause of a context that ends makes Run leave everything as it
// is, whatever OnStop says: the node is started again at once.
var ErrReload = errors.New("the node is started again")

// fleet is the part of a node that places and runs units.
type fleet struct {
	keys    registry.Keys
	machine registry.Machine
	systemd *systemd.Conn // nil: this machine runs no units
	engine  *engine.Engine
	handler *fleetapi.Handler
	logs    *logs.Server
	// nil: that the store has no leader cannot be proven here
	leaderless *leaderless
	agent      atomic.Pointer[agent.Agent] // the present one; nil before the first and where none is run
	left       chan struct{}               // closed when the machine has left for good
	leaving    sync.Once                   // closes left
}

func (n *node) openFleet() (err error) {
	f := &n.fleet
	f.keys, f.left = registry.Keys{Prefix: n.cfg.KeyPrefix}, make(chan struct{})
	if f.machine, err = n.cfg.Machine(n.version); err != nil && n.cfg.RunsUnits() {
		return err
	}
	registered, leave := func() bool { return true }, (func(context.Context) error)(nil)
	if n.cfg.RunsUnits() {
		f.systemd, leave = systemd.New(n.log), f.leave
		registered = func() bool { a := f.agent.Load(); return a != nil && (a.Registered() || f.gone()) }
	}
	f.engine = engine.New(engine.Config{Store: n.client, Keys: f.keys, Name: n.cfg.Name, Log: n.log})
	f.handler = fleetapi.New(fleetapi.Config{
		Store: n.client, Keys: f.keys, Registered: registered, Self: func() string { return f.machine.ID },
		Version: n.version, TokenLimit: n.cfg.TokenLimit, Metrics: f.collector().Handler(), Leave: leave, Log: n.log,
	})
	f.logs = logs.New(logs.Config{
		Store: n.client, Keys: f.keys, Self: func() string { return f.machine.ID }, Own: f.own,
		Journal: systemd.Journal, Show: systemd.Show, Log: n.log,
	})
	f.leaderless = n.openLeaderless()
	return nil
}

// states returns what the agent has reported last.
func (f *fleet) states() registry.States {
	if a := f.agent.Load(); a != nil {
		return a.States()
	}
	return registry.States{}
}

// own returns the names of the units that are on this machine.
func (f *fleet) own() []string { return slices.Collect(maps.Keys(f.states().Units)) }

func (f *fleet) collector() fleetapi.Collector {
	return fleetapi.Collector{Engine: f.engine.Stats, States: f.states}
}

// routes are what the API has for units.
func (f *fleet) routes() []func(*http.ServeMux) {
	return []func(*http.ServeMux){f.handler.Register, f.logs.Register}
}

// fleetParts are what of units runs on this node, those that others need first.
func (n *node) fleetParts() []part {
	parts := []part{{"logs", n.fleet.logs.Run}}
	if n.fleet.systemd != nil {
		parts = append(parts, part{"systemd", n.fleet.systemd.Run}, part{"units", n.runUnits})
		if n.cfg.APIPort != 0 {
			parts = append(parts, part{"answers to other nodes", n.serveOthers})
		}
		if n.fleet.leaderless != nil {
			parts = append(parts, part{"members of the store", n.fleet.leaderless.run})
		}
	}
	if n.cfg.Engine {
		parts = append(parts, part{"engine", n.fleet.engine.Run})
	}
	return parts
}

// leave stops all units of this machine and takes it out of the cluster until
// the node is started again.
func (f *fleet) leave(ctx context.Context) error {
	a := f.agent.Load()
	if a == nil {
		return errors.New("the node has just started and runs no units yet")
	}
	if err := a.Leave(ctx); err != nil {
		return err
	}
	f.leaving.Do(func() { close(f.left) })
	return nil
}

func (f *fleet) gone() bool {
	select {
	case <-f.left:
		return true
	default:
		return false
	}
}

// runUnits runs the agent until ctx ends. The machine's keys linger when the
// node is stopped, so that a restart or an upgrade moves nothing.
func (n *node) runUnits(ctx context.Context) error {
	for {
		err := n.runAgent(ctx)
		if !errors.Is(err, agent.ErrReplaced) || ctx.Err() != nil {
			return err
		}
	}
}

func (n *node) runAgent(ctx context.Context) error {
	ttl := time.Duration(n.cfg.MachineTTL) * time.Second
	presence := store.NewPresence(n.client, ttl, n.log)
	presence.Linger(true)
	cfg := agent.Config{
		Machine: n.fleet.machine, Keys: n.fleet.keys, Store: n.client, Presence: presence, Systemd: n.fleet.systemd,
		UnitsDir: n.cfg.UnitsDir, TTL: ttl, Log: n.log,
	}
	if n.fleet.leaderless != nil {
		cfg.Leaderless = n.fleet.leaderless.proven
	}
	a := agent.New(cfg)
	n.fleet.agent.Store(a)
	pctx, stop := context.WithCancel(context.WithoutCancel(ctx))
	ended := make(chan error, 1)
	go func() { ended <- presence.Run(pctx) }()
	if n.cfg.UnitsOnly {
		var telling sync.WaitGroup
		telling.Go(func() { n.tellSilence(pctx, presence, ttl) })
		defer telling.Wait()
	}
	defer stop()
	actx, end := context.WithCancel(ctx)
	defer end()
	go func() {
		select {
		case <-n.fleet.left:
			end()
		case <-actx.Done():
		}
	}()
	err := a.Run(actx)
	if n.fleet.gone() && ctx.Err() == nil {
		n.log.Info("this machine has left the cluster; it comes back when the node is started again", "machine", n.fleet.machine.ID)
		presence.Linger(false)
		stop()
		err = errors.Join(err, <-ended)
		<-ctx.Done()
		return err
	}
	if ctx.Err() != nil && n.cfg.OnStop == "drain" && !errors.Is(context.Cause(ctx), ErrReload) {
		leave, cancel := context.WithTimeout(context.WithoutCancel(ctx), nodeconfig.LeaveLimit)
		if left := a.Leave(leave); left != nil {
			n.log.Warn("units are left on this machine", "err", left)
		} else {
			presence.Linger(false)
		}
		cancel()
	}
	stop()
	return errors.Join(err, <-ended)
}

// tellSilence logs, in the words that fleetd had and scripts look for, that the
// store has not confirmed this machine for so long that others take it for dead.
func (n *node) tellSilence(ctx context.Context, p *store.Presence, ttl time.Duration) {
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	known := false
	for {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
		t0 := p.Confirmed()
		alive := !t0.IsZero() && time.Since(t0) < ttl
		if known && !alive {
			n.log.Warn("Server monitor triggered: Monitor timed out before successful heartbeat")
		}
		known = alive
	}
}

// listeners opens what serves the whole API beside its own socket: the sockets
// that this process was started with, and those of the configuration.
func (n *node) listeners(inherited []*os.File) (list []net.Listener, err error) {
	defer func() {
		if err != nil {
			for _, l := range list {
				err = errors.Join(err, l.Close())
			}
		}
	}()
	for _, f := range inherited {
		l, err := net.FileListener(f)
		if err != nil {
			return list, fmt.Errorf("serve on socket %s, which this process was started with: %w", f.Name(), err)
		}
		if u, ok := l.(*net.UnixListener); ok {
			u.SetUnlinkOnClose(false) // it is systemd's
		}
		list = append(list, l)
	}
	for _, where := range n.cfg.APIListen {
		var l net.Listener
		if path, ok := strings.CutPrefix(where, "unix:"); ok {
			l, err = api.Listen(path)
		} else {
			l, err = net.Listen("tcp", where)
		}
		if err != nil {
			return list, fmt.Errorf("--api-listen %s: %w", where, err)
		}
		list = append(list, l)
	}
	return list, nil
}
