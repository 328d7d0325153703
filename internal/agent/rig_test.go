package agent

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"flotilla/internal/registry"
	"flotilla/internal/store"
	"flotilla/internal/store/storetest"
)

const patience = 60 * time.Second

// rig is one machine with a real store and a fake systemd, and what an engine
// and the API write.
type rig struct {
	t       testing.TB
	store   *store.Client // never cut off
	proxy   *storetest.Proxy
	keys    registry.Keys
	machine registry.Machine
	fake    *fakeSystemd
	real    Systemd // if there is no fake
	dir     string
	ttl     time.Duration

	leaderless func(context.Context) bool
}

func newRig(t testing.TB) *rig {
	t.Helper()
	endpoint := storetest.Start(t)
	dir := t.TempDir()
	r := &rig{
		t: t, proxy: storetest.NewProxy(t, endpoint), keys: registry.Keys{Prefix: "/f/"}, dir: dir, ttl: time.Minute,
		machine: registry.Machine{
			ID: "0123456789abcdef0123456789abcdef", BootID: "b1", Node: "n1", Address: "10.0.0.1", Units: true, Metadata: map[string]string{"disk": "ssd"},
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
	rig      *rig
	presence *store.Presence
	stop     context.CancelFunc // of the agent alone
	ended    chan error         // what Run returned
	finish   func()             // ends all; the lease lingers
}

// begin starts an agent.
func (r *rig) begin() *process {
	r.t.Helper()
	c, err := store.Open(store.Config{Endpoints: []string{r.proxy.Endpoint()}, Logger: logger(r.t)})
	if err != nil {
		r.t.Fatal(err)
	}
	p := &process{rig: r, presence: store.NewPresence(c, r.ttl, logger(r.t)), ended: make(chan error, 1)}
	p.presence.Linger(true)
	cfg := Config{Machine: r.machine, Keys: r.keys, Store: c, Presence: p.presence, TTL: r.ttl, Leaderless: r.leaderless, Log: logger(r.t)}
	if r.fake != nil {
		cfg.Systemd, cfg.UnitsDir, cfg.DropIns, cfg.StateDir, cfg.Gate = r.fake, r.fake.units, r.fake.dropIns, filepath.Join(r.dir, "state"), r.fake.gate
	} else {
		cfg.Systemd = r.real
	}
	p.Agent = New(cfg)
	ctx, stop := context.WithCancel(context.Background())
	outer, stopAll := context.WithCancel(context.Background())
	p.stop = stop
	present := make(chan struct{})
	go func() { _ = p.presence.Run(outer); close(present) }()
	over := make(chan struct{})
	go func() { p.ended <- p.Run(ctx); close(over) }()
	done := false
	p.finish = func() {
		if done {
			return
		}
		done = true
		stop()
		<-over
		stopAll()
		<-present
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
		kv, ok := r.get(r.keys.Machine(r.machine.ID))
		g = kv.CreateRevision
		return ok
	})
	return g
}

// place schedules a unit here, as the engine does.
func (r *rig) place(name, text string, desired registry.Desired, change ...func(*registry.Entry)) {
	r.t.Helper()
	e := registry.Entry{V: 1, Text: text, Desired: desired, Generation: r.generation(), Epoch: 7}
	for _, c := range change {
		c(&e)
	}
	_, err := r.store.Apply(r.t.Context(), []store.Op{
		store.Put(r.keys.Entry(r.machine.ID, name), registry.Encode(e)),
		store.Put(r.keys.Placement(name), registry.Encode(registry.Placement{V: 1, Machine: r.machine.ID, Generation: e.Generation, Epoch: e.Epoch, Reason: "test"})),
	})
	if err != nil {
		r.t.Fatal(err)
	}
}

func (r *rig) states() map[string]registry.State {
	kv, ok := r.get(r.keys.States(r.machine.ID))
	if !ok {
		return nil
	}
	s, err := registry.Decode[registry.States](kv.Value)
	if err != nil {
		r.t.Fatal(err)
	}
	return s.Units
}

func (r *rig) waitState(name, what string, ok func(registry.State) bool) {
	r.t.Helper()
	r.wait(name+" "+what, func() bool { s, there := r.states()[name]; return there && ok(s) })
}

func (r *rig) waitActive(name string) {
	r.t.Helper()
	r.waitState(name, "to be active", func(s registry.State) bool { return s.Launched && s.Active == "active" })
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
