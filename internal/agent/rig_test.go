package agent

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"flotilla/internal/state"
	"flotilla/internal/store"
	"flotilla/internal/store/storetest"
	"flotilla/internal/unit"
)

const patience = 60 * time.Second

// rig is one machine with a real store and a fake systemd, and what an engine
// and the API write.
type rig struct {
	t       testing.TB
	store   *store.Client // never cut off
	proxy   *storetest.Proxy
	keys    state.Keys
	machine state.NodeRecord
	fake    *fakeSystemd
	real    Systemd // if there is no fake
	dir     string
	ttl     time.Duration

	single bool // the setting single-machine
}

func newRig(t testing.TB) *rig {
	t.Helper()
	endpoint := storetest.Start(t)
	dir := t.TempDir()
	r := &rig{
		t: t, proxy: storetest.NewProxy(t, endpoint), keys: state.Keys{Prefix: "/f/"}, dir: dir, ttl: time.Minute,
		machine: state.NodeRecord{
			ID: "0123456789abcdef0123456789abcdef", BootID: "b1", Name: "n1", Address: "10.0.0.1", Units: true, Metadata: map[string]string{"disk": "ssd"},
		},
		fake: newFake(filepath.Join(dir, "units"), filepath.Join(dir, "systemd"), filepath.Join(dir, "gate")),
	}
	r.store = open(t, endpoint)
	return r
}

func open(t testing.TB, endpoint string) *store.Client {
	t.Helper()
	c, err := store.Open(store.Config{Endpoints: []string{endpoint}, Logger: logger(t)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c
}

func logger(t testing.TB) *slog.Logger {
	if !testing.Verbose() {
		return slog.New(slog.NewTextHandler(io.Discard, nil))
	}
	return slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelDebug}))
}

// process is one run of an agent.
type process struct {
	*Agent
	*state.Registration
	rig    *rig
	stop   context.CancelFunc // of the agent alone
	ended  chan error         // what Run of the agent returned
	finish func()             // ends all; the lease lingers
}

// begin starts an agent.
func (r *rig) begin() *process {
	r.t.Helper()
	c, err := store.Open(store.Config{Endpoints: []string{r.proxy.Endpoint()}, Logger: logger(r.t)})
	if err != nil {
		r.t.Fatal(err)
	}
	presence, feed := store.NewPresence(c, r.ttl, logger(r.t)), state.NewFeed(c, r.keys, logger(r.t))
	p := &process{rig: r, Registration: state.NewRegistration(feed, presence, r.machine, r.ttl, logger(r.t)), ended: make(chan error, 1)}
	cfg := Config{
		ID: r.machine.ID, Metadata: r.machine.Metadata, Feed: feed, Store: c, Registration: p.Registration, Presence: presence,
		TTL: r.ttl, SingleMachine: r.single, Log: logger(r.t),
	}
	if r.fake != nil {
		cfg.Systemd, cfg.UnitsDir, cfg.DropIns, cfg.StateDir, cfg.Gate = r.fake, r.fake.units, r.fake.dropIns, filepath.Join(r.dir, "state"), r.fake.gate
	} else {
		cfg.Systemd = r.real
	}
	p.Agent = New(cfg)
	run := func(parts ...func(context.Context) error) (stop context.CancelFunc, over *sync.WaitGroup) {
		ctx, stop := context.WithCancel(context.Background())
		over = &sync.WaitGroup{}
		for _, part := range parts {
			over.Go(func() { _ = part(ctx) })
		}
		return stop, over
	}
	endPresence, presenceOver := run(presence.Run)
	endFeed, feedOver := run(feed.Run, p.Registration.Run)
	stop, over := run(func(ctx context.Context) error { p.ended <- p.Agent.Run(ctx); return nil })
	p.stop = stop
	done := false
	p.finish = func() {
		if done {
			return
		}
		done = true
		stop()
		over.Wait()
		endFeed()
		feedOver.Wait()
		endPresence()
		presenceOver.Wait()
		_ = c.Close()
	}
	r.t.Cleanup(p.finish)
	return p
}

func (r *rig) wait(what string, ok func() bool) {
	r.t.Helper()
	storetest.Wait(r.t, patience, what, ok)
}

func (r *rig) put(key, value string) int64 {
	r.t.Helper()
	rev, err := r.store.Apply(r.t.Context(), []store.Op{store.Put(key, value)})
	if err != nil {
		r.t.Fatal(err)
	}
	return rev
}

func (r *rig) delete(key string) {
	r.t.Helper()
	if _, err := r.store.Apply(r.t.Context(), []store.Op{store.Delete(key)}); err != nil {
		r.t.Fatal(err)
	}
}

func (r *rig) get(key string) (store.KV, bool) {
	r.t.Helper()
	kv, ok, err := r.store.Get(r.t.Context(), key)
	if err != nil {
		r.t.Fatal(err)
	}
	return kv, ok
}

// generation waits until the machine is there.
func (r *rig) generation() (g int64) {
	r.t.Helper()
	r.wait("the machine's record", func() bool {
		kv, ok := r.get(r.keys.Node(r.machine.ID))
		g = kv.CreateRevision
		return ok
	})
	return g
}

// placed is what a test may say otherwise than place does.
type placed struct {
	Restarts, Generation, Epoch int64
	Approved, Leave             string
}

// place places a unit here, as API and engine do.
func (r *rig) place(name, text string, desired unit.Desired, change ...func(*placed)) {
	r.t.Helper()
	p := placed{Generation: r.generation(), Epoch: 7, Approved: hash(text)}
	for _, c := range change {
		c(&p)
	}
	_, err := r.store.Apply(r.t.Context(), []store.Op{
		store.Put(r.keys.Unit(name), state.Encode(state.UnitRecord{V: 1, Text: text, Desired: desired, Restarts: p.Restarts})),
		store.Put(r.keys.Placement(name), state.Encode(state.Placement{
			V: 1, Node: r.machine.ID, Generation: p.Generation, Epoch: p.Epoch, Approved: p.Approved, Reason: "test", Leave: p.Leave,
		})),
	})
	if err != nil {
		r.t.Fatal(err)
	}
}

// hash returns the hash of a unit file, "" if it cannot be read.
func hash(text string) string {
	f, err := unit.Parse(text)
	if err != nil {
		return ""
	}
	return f.Hash().String()
}

func (r *rig) states() map[string]state.UnitState {
	kv, ok := r.get(r.keys.UnitsReport(r.machine.ID))
	if !ok {
		return nil
	}
	s, err := state.Decode[state.UnitsReport](kv.Value)
	if err != nil {
		r.t.Fatal(err)
	}
	return s.Units
}

func (r *rig) waitState(name, what string, ok func(state.UnitState) bool) {
	r.t.Helper()
	r.wait(name+" "+what, func() bool { s, there := r.states()[name]; return there && ok(s) })
}

func (r *rig) waitActive(name string) {
	r.t.Helper()
	r.waitState(name, "to be active", func(s state.UnitState) bool { return s.Launched && s.Active == "active" })
}

func (r *rig) check() {
	r.t.Helper()
	r.fake.mu.Lock()
	defer r.fake.mu.Unlock()
	for _, f := range r.fake.faults {
		r.t.Error(f)
	}
}

// clean reports whether nothing of units is left on the machine.
func (r *rig) clean() bool {
	left := 0
	for _, dir := range []string{r.fake.units, filepath.Join(r.dir, "state", "units"), r.fake.dropIns} {
		files, _ := os.ReadDir(dir)
		left += len(files)
	}
	return left == 0 && len(r.fake.linked()) == 0
}

func service(exec string, more ...string) string {
	return fmt.Sprintf("[Service]\nExecStart=/bin/%s\n%s\n", exec, strings.Join(more, "\n"))
}

const exclusive = "[X-Fleet]\nExclusive=yes"
