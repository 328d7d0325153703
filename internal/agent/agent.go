// Package agent makes this machine run its schedule: it compares what the store
// says is meant for the machine with what systemd runs, removes the difference,
// and reports the state of each unit. It knows unit files, systemd and the
// records of the store. It must not know how machines are chosen, nor HAProxy or
// the catalog.
package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"

	"flotilla/internal/registry"
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
	Start(ctx context.Context, name string) (systemd.Result, error)
	Stop(ctx context.Context, name string) (systemd.Result, error)
	StopAll(ctx context.Context, names ...string) map[string]func(context.Context) (systemd.Result, error)
	Restart(ctx context.Context, name string) (systemd.Result, error)
	ResetFailed(ctx context.Context, name string) error
	Kill(ctx context.Context, name string, signal syscall.Signal) error
	Processes(ctx context.Context, name string) ([]int, error)
	Fence(ctx context.Context, after time.Duration) error
	Unfence(ctx context.Context) error
}

// Config says what an Agent works with. The zero value of a directory is its
// default.
type Config struct {
	Machine  registry.Machine // without V and Session, which the agent fills in
	Keys     registry.Keys
	Store    *store.Client   // run by the caller
	Presence *store.Presence // run by the caller, and only read by the agent from Beats
	Systemd  Systemd         // run by the caller
	UnitsDir string          // unit files; /run/flotilla/units. They are gone after a reboot
	DropIns  string          // systemd's run-time units; /run/systemd/system
	StateDir string          // what was done; /run/flotilla/agent. It has to be gone after a reboot
	Gate     string          // systemd.FenceGate
	TTL      time.Duration   // of the Presence; store.DefaultTTL
	// Leaderless proves that exclusive units may run on while the store is away:
	// it reports whether each member of the store surely did not lead at some
	// moment between the call and the return. Not to know is false. Its context
	// ends a sixth of the TTL after the call. nil: no such proof can be had.
	Leaderless func(context.Context) bool
	Log        *slog.Logger // required
}

// ErrReplaced: another machine with this machine's ID has taken its place in
// the store. The caller ends the Presence, whose keys may not come back, and may
// begin anew with fresh ones: then the agent waits until the other is gone.
var ErrReplaced = errors.New("another machine with the same machine ID has registered")

const (
	settle = 5 * time.Millisecond // in which events are merged into one pass
	// While so many units and more change, one pass for all of them spares systemd
	// much: it looks through all its folders after each change of them, and stops
	// nothing while it clears up after what has stopped.
	many          = 8
	settleMany    = 30 * time.Millisecond // without a further change
	longestSettle = 300 * time.Millisecond

	callLimit   = 30 * time.Second // of calls to systemd that a pass waits for
	longestRest = 5 * time.Second  // between two times that systemd reads all files
	checkEvery  = time.Minute
	firstRetry  = 200 * time.Millisecond // doubled each time, up to a minute
	readyLimit  = 2 * time.Second        // for units to be queued before those that come after them
)

// Agent runs the units of one machine.
type Agent struct {
	cfg  Config
	own  string // machine ID
	keys registry.Keys
	log  *slog.Logger
	disk disk
	view *view

	guard   *guard
	wake    chan struct{} // one slot: a pass is due
	ended   chan ended    // workers that have ended
	leaving chan struct{} // closed by Leave
	leave   sync.Once
	life    context.Context // of the present run; set before its goroutines begin
	others  sync.WaitGroup  // goroutines that work on units

	running sync.Mutex    // held by Run, and by Leave after it
	empty   chan struct{} // closed when all units have left
	left    sync.Once

	place  *place
	states atomic.Pointer[registry.States]

	// What follows belongs to the loop.
	opened  bool
	units   map[string]*tracked
	present *present
	told    bool // the states were given to the Presence
	reload  bool // systemd has to read all files before anything is started
	// reloadAfter is when it may be made to do so again, unless it has to.
	reloadAfter time.Time
	lookAll     bool // the status of all units is to be read
	look        map[string]bool
	putOffs     int       // passes in a row that were put off
	retryAt     time.Time // of what is not about one unit; zero if nothing failed
}

// tracked is one unit as the loop sees it.
type tracked struct {
	rec    record
	on     bool // rec counts: there are files
	status systemd.Status
	detail systemd.Detail // while it is failed or cannot be loaded
	busy   Action
	asked  int64 // number of the restart under way
	turn   int   // of the worker whose end counts
	cancel context.CancelFunc
	broken Action

	mod      int64 // of the entry that failures are about
	failures int
	retryAt  time.Time
	trouble  string
	waiting  string
	released int64 // mod of the entry that was released: the view is behind
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
	cfg.Machine.V = registry.Version
	if cfg.TTL == 0 {
		cfg.TTL = store.DefaultTTL
	}
	a := &Agent{
		cfg: cfg, own: cfg.Machine.ID, keys: cfg.Keys, log: cfg.Log,
		disk:    disk{cfg.UnitsDir, cfg.DropIns, cfg.StateDir},
		view:    newView(cfg.Machine, cfg.Keys, cfg.Log),
		wake:    make(chan struct{}, 1),
		ended:   make(chan ended),
		leaving: make(chan struct{}),
		empty:   make(chan struct{}),
		units:   map[string]*tracked{},
		look:    map[string]bool{},
		lookAll: true,
	}
	a.place = newPlace(a)
	a.states.Store(&registry.States{V: registry.Version, Units: map[string]registry.State{}})
	a.guard = newGuard(a)
	return a
}

// States returns what the agent has last reported of its units. It must not be
// changed. It may be called from any goroutine.
func (a *Agent) States() registry.States { return *a.states.Load() }

// Registered reports whether the cluster knows this machine as present.
func (a *Agent) Registered() bool {
	t0 := a.cfg.Presence.Confirmed()
	return !t0.IsZero() && time.Since(t0) < a.cfg.TTL && a.place.mine(a.view.self())
}

// Generation returns the generation of this machine, and 0 while it is not
// registered.
func (a *Agent) Generation() int64 {
	if self := a.view.self(); a.place.mine(self) {
		return self.generation
	}
	return 0
}

// Machines returns the records of all machines, as the agent has last seen them.
// It may be called from any goroutine.
func (a *Agent) Machines() []registry.Machine { return a.view.everyone() }

// Run makes the machine run its schedule until ctx ends, and returns nil then.
// It leaves all units as they are. Errors: the directories cannot be made, or
// ErrReplaced.
func (a *Agent) Run(ctx context.Context) error {
	a.running.Lock()
	defer a.running.Unlock()
	if err := a.open(); err != nil {
		return err
	}
	g, ctx := errgroup.WithContext(ctx)
	a.life = ctx
	for p := range parts {
		r := store.NewReflector(a.cfg.Store, a.view.prefix(p), a.keys.Machine(a.own), a.log)
		g.Go(func() error {
			return r.Run(ctx, func(u store.Update) int {
				changed := a.view.apply(p, u)
				if changed > 0 || u.Reset {
					a.poke()
					a.guard.poke()
				}
				return changed
			})
		})
	}
	g.Go(func() error { return a.place.run(ctx) })
	g.Go(func() error { return a.guard.run(ctx) })
	g.Go(func() error { a.loop(ctx); return nil })
	return g.Wait()
}

// Leave stops all units and removes what there is of them. It returns when
// nothing is left, or with what is when ctx ends. The caller ends the Presence
// after that, so that the engine sees this machine leave. It may be called while
// Run runs, which starts nothing from then on, or after.
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
		a.loop(lctx)
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
		return fmt.Errorf("stop all units of this machine: %d are left: %w", len(a.States().Units), ctx.Err())
	}
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
		u := &tracked{rec: r, on: true, broken: r.Doing}
		if r.Doing == Start { // it may not have been called
			u.rec.Launched = false
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
