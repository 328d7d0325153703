// Package agent makes this node run its part of the units: it compares what the
// cluster's snapshot says is meant for the node with what systemd runs, removes
// the difference, and reports the state of each unit. It knows unit files, systemd
// and the records of the store. It must not know how nodes are chosen for units,
// nor HAProxy or the catalog.
package agent

import (
	"context"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"

	"flotilla/internal/state"
	"flotilla/internal/store"
	"flotilla/internal/systemd"
)

// Systemd is what the agent needs of *systemd.Conn, with the contracts given
// there. It has more methods than an interface should: the tests' fake of it can
// fail in ways in which the real one cannot be made to.
type Systemd interface {
	Changed() <-chan struct{}
	Take() systemd.Change
	Units(ctx context.Context, names ...string) (map[string]systemd.Status, error)
	Kept(ctx context.Context, names ...string) (map[string]bool, error)
	Detail(ctx context.Context, name string) (systemd.Detail, error)
	Link(ctx context.Context, paths ...string) error
	Enable(ctx context.Context, names ...string) error
	Disable(ctx context.Context, names ...string) error
	Reload(ctx context.Context) error
	Start(ctx context.Context, name string, sent ...func()) (systemd.Result, error)
	Stop(ctx context.Context, name string) (systemd.Result, error)
	StopAll(ctx context.Context, names ...string) map[string]func(context.Context) (systemd.Result, error)
	Restart(ctx context.Context, name string, sent ...func()) (systemd.Result, error)
	ResetFailed(ctx context.Context, name string) error
	Kill(ctx context.Context, name string, signal syscall.Signal) error
	Processes(ctx context.Context, name string) ([]int, error)
	Fence(ctx context.Context, after time.Duration) error
	Unfence(ctx context.Context) error
}

// Config says what an Agent works with. The zero value of a directory is its
// default. Feed, Store, Registration, Presence and Systemd are run by the caller.
type Config struct {
	ID           string            // of this node
	Metadata     map[string]string // of this node, from its configuration
	Feed         *state.Feed
	Store        *store.Client // for deleting placements
	Registration *state.Registration
	Presence     *store.Presence // the agent sets the report of its units in it
	Systemd      Systemd
	UnitsDir     string        // unit files; /run/flotilla/units. They are gone after a reboot
	DropIns      string        // systemd's run-time units; /run/systemd/system
	StateDir     string        // what was done; /run/flotilla/agent. It has to be gone after a reboot
	Gate         string        // systemd.FenceGate
	TTL          time.Duration // of the Presence; store.DefaultTTL
	// SingleMachine exempts exclusive units from the fence until another node that
	// runs units is seen. It is for a cluster of one machine.
	SingleMachine bool
	Log           *slog.Logger // required
}

const (
	settle = 5 * time.Millisecond // in which events are merged into one pass
	// many is how many changed units make a pass wait for more of them: for each
	// pass systemd searches its directories anew, and while it cleans up after units
	// that have stopped it does not stop others.
	many          = 8
	settleMany    = 30 * time.Millisecond // without a further change
	longestSettle = 300 * time.Millisecond

	callLimit   = 30 * time.Second // of calls to systemd that a pass waits for
	longestRest = 5 * time.Second  // between two times that systemd reads all files
	checkEvery  = time.Minute
	firstRetry  = 200 * time.Millisecond // doubled each time, up to a minute
)

// Agent runs the units of one node.
type Agent struct {
	cfg   Config
	log   *slog.Logger
	disk  disk
	guard *guard

	wake    chan struct{} // one slot: a pass is due
	ended   chan ended    // workers that have ended
	leaving chan struct{} // closed by Leave
	leave   sync.Once
	life    context.Context // of the present run; set before its goroutines begin
	workers sync.WaitGroup  // goroutines that work on units

	running sync.Mutex    // held by Run, and by Leave after it
	empty   chan struct{} // closed when all units have left
	left    sync.Once

	report atomic.Pointer[state.UnitsReport]

	// What follows belongs to the loop.
	opened bool
	units  map[string]*tracked
	part   *part // what is wanted here, as the last pass saw it; nil before the first snapshot
	reload bool  // systemd has to read all files before anything is started
	// reloadAfter is when that may be asked for again for units that can wait.
	reloadAfter time.Time
	lookAll     bool // the status of all units is to be read
	look        map[string]bool
	putOffs     int       // passes in a row that were put off
	retryAt     time.Time // of what is not about one unit; zero if nothing failed
}

// tracked is one unit as the loop sees it.
type tracked struct {
	have
	detail systemd.Detail // while it is failed or cannot be loaded
	turn   int            // of the worker whose end counts
	cancel context.CancelFunc

	seen     version // of the records that failures are about
	failures int
	retryAt  time.Time
	trouble  string
	waiting  string
	released version // of the records whose placement was deleted: the snapshot is behind
}

// New returns an Agent that Run sets to work.
func New(cfg Config) *Agent {
	for dir, usual := range map[*string]string{
		&cfg.UnitsDir: "/run/flotilla/units", &cfg.DropIns: "/run/systemd/system",
		&cfg.StateDir: "/run/flotilla/agent", &cfg.Gate: systemd.FenceGate,
	} {
		if *dir == "" {
			*dir = usual
		}
	}
	if cfg.TTL == 0 {
		cfg.TTL = store.DefaultTTL
	}
	a := &Agent{
		cfg: cfg, log: cfg.Log, disk: disk{cfg.UnitsDir, cfg.DropIns, cfg.StateDir},
		wake:    make(chan struct{}, 1),
		ended:   make(chan ended),
		leaving: make(chan struct{}),
		empty:   make(chan struct{}),
		units:   map[string]*tracked{},
		look:    map[string]bool{},
		lookAll: true,
	}
	a.report.Store(&state.UnitsReport{V: state.Version})
	a.guard = newGuard(a)
	return a
}

// Report returns what the agent has last reported of its units; it has none before
// the first report. It must not be changed. It may be called from any goroutine.
func (a *Agent) Report() state.UnitsReport { return *a.report.Load() }

// Run makes the node run its units until ctx ends, and returns nil then. It leaves
// all units as they are. Error: the directories cannot be made.
func (a *Agent) Run(ctx context.Context) error {
	a.running.Lock()
	defer a.running.Unlock()
	if err := a.open(); err != nil {
		return err
	}
	g, ctx := errgroup.WithContext(ctx)
	a.life = ctx
	g.Go(func() error { return a.guard.run(ctx) })
	g.Go(func() error { a.loop(ctx); return nil })
	return g.Wait()
}

// Leave stops all units and removes what there is of them. It returns when
// nothing is left, or with what is when ctx ends. The caller ends the Presence
// after that, so that the engine sees this node leave. It may be called while Run
// runs, which starts nothing from then on, or after.
func (a *Agent) Leave(ctx context.Context) error {
	a.leave.Do(func() { close(a.leaving) })
	a.poke()
	if a.running.TryLock() { // nobody else does it
		defer a.running.Unlock()
		if err := a.open(); err != nil {
			return err
		}
		lctx, stop := context.WithCancel(ctx)
		defer stop()
		a.life = lctx
		go func() {
			select {
			case <-a.empty:
				stop()
			case <-lctx.Done():
			}
		}()
		a.lookAll = true
		var guarding sync.WaitGroup
		guarding.Go(func() { _ = a.guard.run(lctx) }) // else PID 1 would kill exclusive units while they stop
		a.loop(lctx)
		stop()
		guarding.Wait()
	}
	select {
	case <-a.empty:
		return nil
	case <-ctx.Done():
	}
	select {
	case <-a.empty:
		return nil
	default:
		return fmt.Errorf("stop all units of this node: %d are left: %w", len(a.Report().Units), ctx.Err())
	}
}

// LetGo deletes the placements on this node. It is for a node that runs nothing any
// more and whose record is gone: its units are placed elsewhere at once.
func (a *Agent) LetGo(ctx context.Context) error {
	const atOnce = store.MaxOps / 2
	for more := true; more; {
		_, err := a.cfg.Feed.Update(ctx, func(s *state.Snapshot) (tx state.Tx, err error) {
			for name, u := range s.Units {
				if !u.Placement.Usable() || u.Placement.Value.Node != a.cfg.ID || len(tx.Ops) == atOnce {
					continue
				}
				key := a.cfg.Feed.Keys.Placement(name)
				tx.Ops = append(tx.Ops, store.Delete(key))
				tx.Conds = append(tx.Conds, store.Unchanged(key, u.Placement.Modified))
			}
			more = len(tx.Ops) == atOnce
			return tx, nil
		})
		if err != nil {
			return fmt.Errorf("let go of the units of this node: %w", err)
		}
	}
	return nil
}

// open reads what earlier agents left, once.
func (a *Agent) open() error {
	if a.opened {
		return nil
	}
	records, err := a.disk.open()
	if err != nil {
		return err
	}
	for name, r := range records {
		u := &tracked{have: have{record: r, On: true}}
		if r.Doing == Start { // it may not have been called
			u.Launched = false
		}
		a.units[name] = u
	}
	a.opened = true
	a.tellGuard()
	return nil
}

func (a *Agent) poke() {
	select {
	case a.wake <- struct{}{}:
	default:
	}
}
