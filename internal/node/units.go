package node

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"flotilla/internal/agent"
	"flotilla/internal/api"
	"flotilla/internal/nodeconfig"
	"flotilla/internal/state"
	"flotilla/internal/systemd"
)

// ErrReload as the cause of a context that ends makes Run leave everything as it
// is, whatever OnStop says: the node is started again at once.
var ErrReload = errors.New("the node is started again")

func (n *node) openUnits(ttl time.Duration) {
	n.left, n.systemd = make(chan struct{}), systemd.New(n.log)
	n.agent = agent.New(agent.Config{
		ID: n.record.ID, Metadata: n.record.Metadata, Feed: n.state, Store: n.client, Registration: n.registration, Presence: n.presence,
		Systemd: n.systemd, UnitsDir: n.cfg.UnitsDir, TTL: ttl, SingleMachine: n.cfg.SingleMachine, Log: n.log,
	})
}

// ownUnits returns the names of the units that are on this node.
func (n *node) ownUnits() []string {
	if n.agent == nil {
		return nil
	}
	return slices.Collect(maps.Keys(n.agent.Report().Units))
}

// registered reports whether the cluster knows this node, or did until it left.
func (n *node) registered() bool {
	return n.agent == nil || n.registration.Registered() || n.hasLeft()
}

// leave stops all units of this node and takes it out of the cluster until it is
// started again.
func (n *node) leave(ctx context.Context) error {
	if err := n.agent.Leave(ctx); err != nil {
		return err
	}
	n.leaving.Do(func() { close(n.left) })
	return nil
}

func (n *node) hasLeft() bool {
	select {
	case <-n.left:
		return true
	default:
		return false
	}
}

// runUnits runs the agent until ctx ends. The node's keys linger when it is
// stopped, so that a restart or an upgrade moves nothing.
func (n *node) runUnits(ctx context.Context) error {
	if n.cfg.UnitsOnly {
		var telling sync.WaitGroup
		defer telling.Wait()
		tctx, stop := context.WithCancel(ctx)
		defer stop()
		telling.Go(func() { n.tellSilence(tctx) })
	}
	actx, end := context.WithCancel(ctx)
	defer end()
	go func() {
		select {
		case <-n.left:
			end()
		case <-actx.Done():
		}
	}()
	err := n.agent.Run(actx)
	if ctx.Err() == nil && n.hasLeft() {
		n.log.Info("this node has left the cluster; it comes back when it is started again", "node", n.cfg.Name)
		n.withdraw(ctx)
		<-ctx.Done()
		return err
	}
	if ctx.Err() != nil && n.cfg.OnStop == "drain" && !errors.Is(context.Cause(ctx), ErrReload) {
		leave, cancel := context.WithTimeout(context.WithoutCancel(ctx), nodeconfig.LeaveLimit)
		defer cancel()
		if left := n.agent.Leave(leave); left != nil {
			n.log.Warn("units are left on this node", "err", left)
		} else {
			n.withdraw(leave)
		}
	}
	return err
}

// withdraw takes a node whose units have all stopped out of the cluster: first its
// record, so that nothing is placed here any more, and then what was placed, so that
// its units need not wait for it.
func (n *node) withdraw(ctx context.Context) {
	n.presence.Linger(false)
	n.registration.Withdraw()
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), withdrawLimit)
	defer cancel()
	_, err := n.state.Until(ctx, func(s *state.Snapshot) bool { return !s.Nodes[n.record.ID].Present() })
	if err == nil {
		err = n.agent.LetGo(ctx)
	}
	if err != nil {
		n.log.Warn("the cluster does not know yet that this node's units may go elsewhere", "err", err)
	}
}

// withdrawLimit bounds how long a node that leaves waits for the store.
const withdrawLimit = 3 * time.Second

// tellSilence logs, in the words that fleetd had and scripts look for, that the
// store has not confirmed this machine for so long that others take it for dead.
func (n *node) tellSilence(ctx context.Context) {
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	known := false
	for {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
		lease, _ := n.presence.Lease()
		alive := time.Since(lease.Renewed) < time.Duration(n.cfg.MachineTTL)*time.Second
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
