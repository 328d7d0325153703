//go:build system

package agent

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"flotilla/internal/state"
	"flotilla/internal/store"
	"flotilla/internal/systemd"
	"flotilla/internal/systemd/systemdtest"
	"flotilla/internal/unit"
)

const childEnv = "FLOTILLA_AGENT_TEST" // endpoint of the store: run an agent until killed

func TestMain(m *testing.M) {
	if endpoint := os.Getenv(childEnv); endpoint != "" {
		fmt.Fprintln(os.Stderr, runChild(endpoint))
		os.Exit(1)
	}
	systemdtest.Main(m, "trixie", "bookworm")
}

// runChild is an agent in a process of its own, which can be frozen.
func runChild(endpoint string) error {
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	c, err := store.Open(store.Config{Endpoints: []string{endpoint}, Logger: log})
	if err != nil {
		return err
	}
	ctx := context.Background()
	presence, feed, conn := store.NewPresence(c, store.DefaultTTL, log), state.NewFeed(c, realKeys, log), systemd.New(log)
	registration := state.NewRegistration(feed, presence, realMachine, store.DefaultTTL, log)
	for _, run := range []func(context.Context) error{presence.Run, feed.Run, registration.Run, conn.Run} {
		go func() { _ = run(ctx) }()
	}
	return New(Config{
		ID: realMachine.ID, Feed: feed, Store: c, Registration: registration, Presence: presence, Systemd: conn, Log: log,
	}).Run(ctx)
}

var (
	realMachine = state.NodeRecord{ID: "0123456789abcdef0123456789abcdef", BootID: "b1", Name: "n1", Address: "10.0.0.1", Units: true}
	realKeys    = state.Keys{Prefix: "/f/"}
)

// newReal returns a rig on the real systemd of this machine.
func newReal(t *testing.T) (*rig, *systemd.Conn) {
	t.Helper()
	r := newRig(t)
	conn := systemd.New(logger(t))
	ctx, stop := context.WithCancel(context.Background())
	over := make(chan struct{})
	go func() { _ = conn.Run(ctx); close(over) }()
	t.Cleanup(func() { stop(); <-over })
	r.machine, r.keys, r.fake, r.real, r.ttl = realMachine, realKeys, nil, conn, store.DefaultTTL
	return r, conn
}

func detail(t *testing.T, c *systemd.Conn, name string) systemd.Detail {
	t.Helper()
	d, err := c.Detail(t.Context(), name)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// shown returns a property of the unit as systemctl shows it.
func shown(t *testing.T, name, property string) string {
	t.Helper()
	out, err := exec.Command("systemctl", "show", "-P", property, name).Output()
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(out))
}

func (r *rig) waitAllActive(n int) {
	r.t.Helper()
	r.wait(fmt.Sprintf("%d units to be active", n), func() bool {
		active := 0
		for _, s := range r.states() {
			if s.Active == "active" && s.Launched {
				active++
			}
		}
		return active == n
	})
}

func sleeper(more ...string) string {
	return "[Service]\nExecStart=/bin/sleep 1000000\n" + strings.Join(more, "\n") + "\n"
}

func TestSystemManyUnits(t *testing.T) {
	r, conn := newReal(t)
	r.ttl = time.Minute
	p := r.begin()
	r.generation()
	const n = 200
	began := time.Now()
	for i := range n {
		r.place(fmt.Sprintf(`many\x2d%d@a.service`, i), sleeper(), unit.Launched)
	}
	r.waitAllActive(n)
	t.Logf("%d units active after %s", n, time.Since(began).Round(time.Millisecond))
	before := map[string]string{}
	for i := range n {
		name := fmt.Sprintf(`many\x2d%d@a.service`, i)
		d := detail(t, conn, name)
		before[name] = d.Invocation
		if state := shown(t, name, "UnitFileState"); state != "linked-runtime" {
			t.Errorf("%s is %s", name, state)
		}
	}
	env, err := os.ReadFile(fmt.Sprintf("/proc/%s/environ", shown(t, `many\x2d7@a.service`, "MainPID")))
	for _, want := range []string{"FLOTILLA_EPOCH=7\x00", `FLOTILLA_UNIT=many\x2d7@a.service` + "\x00", "FLOTILLA_MACHINE=" + realMachine.ID + "\x00"} {
		if err != nil || !strings.Contains(string(env), want) {
			t.Errorf("the environment has no %q: %q (%v)", want, env, err)
		}
	}
	p.finish()
	p = r.begin()
	r.wait("the next agent to have its place", p.Registered)
	r.waitAllActive(n)
	for name, was := range before {
		if now := detail(t, conn, name).Invocation; now != was {
			t.Errorf("%s was started again", name)
		}
	}
	began = time.Now()
	if err := p.Leave(t.Context()); err != nil {
		t.Fatal(err)
	}
	t.Logf("%d units gone after %s", n, time.Since(began).Round(time.Millisecond))
	for name := range before {
		if d := detail(t, conn, name); d.Load != "not-found" || d.Active != "inactive" {
			t.Errorf("%s is %s and %s", name, d.Load, d.Active)
		}
	}
	for _, dir := range []string{"/run/flotilla/units", "/run/flotilla/agent/units"} {
		if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
			t.Errorf("%s has %v (%v)", dir, left, err)
		}
	}
	if left, _ := filepath.Glob("/run/systemd/system/many*"); len(left) > 0 {
		t.Errorf("left are %v", left)
	}
}

func TestSystemInstall(t *testing.T) {
	r, conn := newReal(t)
	p := r.begin()
	r.place("hello.service", sleeper(), unit.Loaded)
	r.place("discovery.service", "[Unit]\nBindsTo=hello.service\nAfter=hello.service\n"+sleeper("[Install]", "WantedBy=hello.service"), unit.Loaded)
	r.waitState("discovery.service", "to be loaded", func(s state.UnitState) bool { return s.Load == "loaded" && s.Active == "inactive" })
	r.waitState("hello.service", "to be loaded", func(s state.UnitState) bool { return s.Load == "loaded" })
	r.place("hello.service", sleeper(), unit.Launched)
	r.waitState("discovery.service", "to be started with hello", func(s state.UnitState) bool { return s.Active == "active" && !s.Launched })
	r.place("hello.service", sleeper(), unit.Loaded)
	r.waitState("discovery.service", "to be stopped with hello", func(s state.UnitState) bool { return s.Active == "inactive" })
	if err := p.Leave(t.Context()); err != nil {
		t.Error(err)
	}
	if d := detail(t, conn, "discovery.service"); d.Load != "not-found" {
		t.Errorf("discovery is %+v", d)
	}
	if left, _ := filepath.Glob("/run/systemd/system/hello*"); len(left) > 0 {
		t.Errorf("left are %v", left)
	}
}

// Units that are placed at once start in the order that After= and Before= ask for.
func TestSystemOrder(t *testing.T) {
	r, _ := newReal(t)
	p := r.begin()
	r.generation()
	p.finish()
	file := filepath.Join(t.TempDir(), "log")
	text := func(name, after string) string {
		return fmt.Sprintf("[Unit]\n%s\n[Service]\nType=oneshot\nRemainAfterExit=yes\nExecStart=/bin/sh -c 'echo begin %[2]s >>%[3]s; sleep 0.3; echo end %[2]s >>%[3]s'\n", after, name, file)
	}
	for i := range 20 { // more than may be queued at a time
		r.place(fmt.Sprintf("other%d.service", i), sleeper(), unit.Launched)
	}
	r.place("a.service", text("a", "After=b.service"), unit.Launched)
	r.place("b.service", text("b", "After=z.service"), unit.Launched)
	r.place("z.service", text("z", ""), unit.Launched)
	p = r.begin()
	r.waitAllActive(23)
	want := "begin z\nend z\nbegin b\nend b\nbegin a\nend a\n"
	if log, err := os.ReadFile(file); err != nil || string(log) != want {
		t.Errorf("the order was %q (%v)", log, err)
	}
	if err := p.Leave(t.Context()); err != nil {
		t.Error(err)
	}
}

func TestSystemReplace(t *testing.T) {
	r, _ := newReal(t)
	p := r.begin()
	file := filepath.Join(t.TempDir(), "log")
	text := func(v int) string {
		return sleeper(fmt.Sprintf("ExecStartPre=/bin/sh -c 'echo begin %d >>%s'", v, file),
			fmt.Sprintf("ExecStopPost=/bin/sh -c 'sleep 0.5; echo end %d >>%s'", v, file))
	}
	want := ""
	for v := range 4 {
		r.place("r.service", text(v), unit.Launched)
		r.wait(fmt.Sprintf("version %d", v), func() bool {
			log, _ := os.ReadFile(file)
			return strings.Contains(string(log), fmt.Sprintf("begin %d", v))
		})
		want += fmt.Sprintf("begin %d\nend %d\n", v, v)
	}
	r.waitActive("r.service")
	if err := p.Leave(t.Context()); err != nil {
		t.Error(err)
	}
	if log, err := os.ReadFile(file); err != nil || string(log) != want {
		t.Errorf("the order was %q (%v)", log, err)
	}
}

func TestSystemTrouble(t *testing.T) {
	r, _ := newReal(t)
	p := r.begin()
	r.place("bad.service", "[Service]\nType=nonsense\n", unit.Launched)
	r.place("fails.service", "[Service]\nExecStart=/bin/false\n", unit.Launched)
	r.place("limit.service", "[Unit]\nStartLimitBurst=3\n[Service]\nExecStart=/bin/false\nRestart=always\nRestartSec=10ms\n", unit.Launched)
	r.place("systemd-journald.service", sleeper(), unit.Launched)
	r.place("good.service", sleeper(), unit.Launched)
	r.waitActive("good.service")
	r.waitState("bad.service", "to be in trouble", func(s state.UnitState) bool { return s.Trouble != "" && !s.Launched })
	r.waitState("fails.service", "to have failed", func(s state.UnitState) bool { return s.Launched && s.Active == "failed" && s.Trouble == "" })
	r.waitState("limit.service", "to be in trouble", func(s state.UnitState) bool { return strings.Contains(s.Trouble, "given up") })
	r.waitState("systemd-journald.service", "to be in trouble", func(s state.UnitState) bool { return strings.Contains(s.Trouble, "unit of that name already") })
	for name, s := range r.states() {
		t.Logf("%s: %+v", name, s)
	}
	if err := p.Leave(t.Context()); err != nil {
		t.Error(err)
	}
	if s, _ := r.real.Units(t.Context(), "systemd-journald.service"); s["systemd-journald.service"].Active != "active" {
		t.Error("the machine's own unit was stopped")
	}
}

// The agent is frozen: PID 1 kills what is exclusive while the node's record
// is still there, Restart= or not.
func TestSystemFrozenAgent(t *testing.T) {
	r, conn := newReal(t)
	r.second()
	child := exec.Command(os.Args[0])
	child.Env = append(os.Environ(), childEnv+"="+r.proxy.Endpoint())
	output := t.Output()
	child.Stdout, child.Stderr = output, output
	if err := child.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = child.Process.Kill()
		_ = child.Wait()
		p := r.begin()
		if err := p.Leave(context.Background()); err != nil {
			t.Error(err)
		}
	})
	r.place("e.service", sleeper("Restart=always", "RestartSec=10ms", "KillMode=process", exclusive), unit.Launched)
	r.place("n.service", sleeper(), unit.Launched)
	r.waitActive("e.service")
	r.waitActive("n.service")
	was, copy1 := detail(t, conn, "n.service").Invocation, detail(t, conn, "e.service").Invocation
	if cgroup := shown(t, "e.service", "ControlGroup"); !strings.Contains(cgroup, systemd.FenceSlice) {
		t.Errorf("it is in %s", cgroup)
	}
	if err := child.Process.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	r.wait("it to be killed", func() bool {
		_, there := r.get(r.keys.Node(r.machine.ID))
		pids, err := conn.Processes(t.Context(), systemd.FenceSlice)
		if err != nil {
			t.Fatal(err)
		}
		if len(pids) > 0 && !there {
			t.Error("it runs, and the machine's record is gone")
		}
		return len(pids) == 0 && !there
	})
	if err := child.Process.Signal(syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	r.place("e.service", sleeper("Restart=always", "RestartSec=10ms", "KillMode=process", exclusive), unit.Launched, func(e *placed) { e.Epoch = 8 })
	r.place("n.service", sleeper(), unit.Launched, func(e *placed) { e.Epoch = 8 })
	// Not by the state alone: the thawed agent first writes the one from before.
	r.waitState("e.service", "to run again", func(s state.UnitState) bool {
		return s.Epoch == 8 && s.Launched && s.Active == "active" && detail(t, conn, "e.service").Active == "active"
	})
	r.waitState("n.service", "to be refreshed", func(s state.UnitState) bool { return s.Epoch == 8 && s.Active == "active" })
	if detail(t, conn, "e.service").Invocation == copy1 {
		t.Error("it is the copy that should have been killed")
	}
	if detail(t, conn, "n.service").Invocation != was {
		t.Error("a unit that is not exclusive was touched")
	}
}
