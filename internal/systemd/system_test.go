//go:build system

package systemd

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sync/semaphore"

	"flotilla/internal/systemd/systemdtest"
)

func TestMain(m *testing.M) {
	if os.Getenv(armAndDie) != "" {
		os.Exit(arm())
	}
	systemdtest.Main(m, "trixie", "bookworm")
}

const patience = time.Minute

// connect returns a connection that runs until the test ends.
func connect(t *testing.T) *Conn {
	t.Helper()
	c := New(slog.New(slog.NewTextHandler(t.Output(), nil)))
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error)
	go func() { ended <- c.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; !errors.Is(err, context.Canceled) {
			t.Errorf("Run returned %v", err)
		}
	})
	return c
}

// install writes units ("name", "text", ...), links them and reloads. They are
// gone after the test.
func install(t *testing.T, c *Conn, namesAndTexts ...string) {
	t.Helper()
	dir := t.TempDir()
	var names, paths []string
	for i := 0; i < len(namesAndTexts); i += 2 {
		names = append(names, namesAndTexts[i])
		paths = append(paths, filepath.Join(dir, namesAndTexts[i]))
		write(t, paths[i/2], namesAndTexts[i+1])
	}
	t.Cleanup(func() {
		ctx := context.Background()
		var all sync.WaitGroup
		for _, name := range names {
			all.Go(func() {
				_, err := c.Stop(ctx, name)
				check(t, err)
				check(t, c.ResetFailed(ctx, name))
			})
		}
		all.Wait()
		check(t, c.Disable(ctx, names...))
		check(t, c.Reload(ctx))
	})
	must(t, c.Link(t.Context(), paths...))
	must(t, c.Reload(t.Context()))
}

func write(t *testing.T, path, text string) {
	t.Helper()
	must(t, os.MkdirAll(filepath.Dir(path), 0o755))
	must(t, os.WriteFile(path, []byte(text), 0o644))
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Error(err)
	}
}

func wantResult(t *testing.T, want Result) func(Result, error) {
	return func(got Result, err error) {
		t.Helper()
		if got != want || err != nil {
			t.Errorf("result %q (%v), want %q", got, err, want)
		}
	}
}

func wantStatus(t *testing.T, c *Conn, name, want string) {
	t.Helper()
	got, err := c.Units(t.Context(), name)
	must(t, err)
	if s := got[name]; s.Load+" "+s.Active+" "+s.Sub != want {
		t.Errorf("%s is %+v, want %s", name, s, want)
	}
}

// eventually waits for a condition that nothing announces.
func eventually(t *testing.T, what string, condition func() bool) {
	t.Helper()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(patience); !condition(); <-tick.C {
		if time.Now().After(deadline) {
			t.Fatalf("not within %v: %s", patience, what)
		}
	}
}

// awaitUnit waits by signals until the unit is in the active state.
func awaitUnit(t *testing.T, c *Conn, name, active string) Status {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	for {
		got, err := c.Units(ctx, name)
		must(t, err)
		if got[name].Active == active {
			return got[name]
		}
		for relevant := false; !relevant; {
			select {
			case <-c.Changed():
				change := c.Take()
				relevant = change.All || slices.Contains(change.Units, name)
			case <-ctx.Done():
				t.Fatalf("%s is %+v, want it %s", name, got[name], active)
			}
		}
	}
}

func run(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %v: %v: %s", name, args, err, out)
	}
	return strings.TrimSpace(string(out))
}

// shown returns a property of the unit as systemctl shows it.
func shown(t *testing.T, name, property string) string {
	t.Helper()
	return run(t, "systemctl", "show", "-P", property, name)
}

const sleeper = "[Service]\nExecStart=/bin/sleep infinity\n"

func TestResults(t *testing.T) {
	c, ctx := connect(t), t.Context()
	install(t, c,
		"good.service", sleeper,
		"once.service", "[Service]\nType=oneshot\nExecStart=/bin/true\n",
		"bad.service", "[Service]\nType=oneshot\nExecStart=/bin/sh -c 'exit 7'\n",
		"missing.service", "[Service]\nType=exec\nExecStart=/no/such/file\n",
		"needy.service", "[Unit]\nRequires=bad.service\nAfter=bad.service\n"+sleeper,
		"late.service", "[Unit]\nJobTimeoutSec=200ms\n[Service]\nType=notify\nExecStart=/bin/sleep infinity\n",
		"condition.service", "[Unit]\nConditionPathExists=/no/such/file\n"+sleeper,
		"assert.service", "[Unit]\nAssertPathExists=/no/such/file\n"+sleeper,
		"broken.service", "[Service]\nRestart=always\n",
	)
	wantResult(t, Done)(c.Start(ctx, "good.service"))
	wantStatus(t, c, "good.service", "loaded active running")
	before, err := c.Detail(ctx, "good.service")
	must(t, err)
	pid := shown(t, "good.service", "MainPID")
	wantResult(t, Done)(c.Start(ctx, "good.service")) // does nothing
	wantResult(t, Done)(c.Restart(ctx, "good.service"))
	after, err := c.Detail(ctx, "good.service")
	must(t, err)
	if again := shown(t, "good.service", "MainPID"); pid == "0" || again == pid || before.Invocation == "" || before.Invocation == after.Invocation {
		t.Errorf("before the restart process %s and %+v, after it process %s and %+v", pid, before, again, after)
	}
	if state := shown(t, "good.service", "UnitFileState"); state != "linked-runtime" || filepath.Base(after.FragmentPath) != "good.service" {
		t.Errorf("its file is %s of %+v", state, after)
	}
	pids, err := c.Processes(ctx, "good.service")
	must(t, err)
	if want := shown(t, "good.service", "MainPID"); fmt.Sprint(pids) != "["+want+"]" {
		t.Errorf("processes %v, want %s", pids, want)
	}
	wantResult(t, Done)(c.Stop(ctx, "good.service"))
	wantStatus(t, c, "good.service", "loaded inactive dead")

	wantResult(t, Done)(c.Start(ctx, "once.service"))
	wantResult(t, Failed)(c.Start(ctx, "bad.service"))
	wantStatus(t, c, "bad.service", "loaded failed failed")
	if d, err := c.Detail(ctx, "bad.service"); err != nil || d.Result != "exit-code" {
		t.Errorf("detail %+v, %v", d, err)
	}
	must(t, c.ResetFailed(ctx, "bad.service"))
	wantStatus(t, c, "bad.service", "loaded inactive dead")
	wantResult(t, Failed)(c.Start(ctx, "missing.service"))
	wantResult(t, "dependency")(c.Start(ctx, "needy.service"))
	wantResult(t, "timeout")(c.Start(ctx, "late.service"))
	wantResult(t, Done)(c.Start(ctx, "condition.service"))
	wantStatus(t, c, "condition.service", "loaded inactive dead")
	wantResult(t, Asserted)(c.Start(ctx, "assert.service"))

	if _, err := c.Start(ctx, "broken.service"); err == nil || errors.Is(err, ErrNoUnit) {
		t.Errorf("start of a broken unit: %v", err)
	} else {
		t.Log(err)
	}
	wantStatus(t, c, "broken.service", "bad-setting inactive dead")
	if d, err := c.Detail(ctx, "broken.service"); err != nil || d.LoadError == "" {
		t.Errorf("detail %+v, %v", d, err)
	} else {
		t.Log(d.LoadError)
	}
}

func TestUnknownUnits(t *testing.T) {
	c, ctx := connect(t), t.Context()
	const name = "nobody.service"
	if r, err := c.Start(ctx, name); !errors.Is(err, ErrNoUnit) || errors.Is(err, ErrUnknown) {
		t.Errorf("start: %q, %v", r, err)
	} else {
		t.Log(err)
	}
	wantResult(t, Done)(c.Stop(ctx, name))
	check(t, c.ResetFailed(ctx, name))
	check(t, c.Kill(ctx, name, 9))
	check(t, c.Disable(ctx, name))
	if pids, err := c.Processes(ctx, name); err != nil || len(pids) != 0 {
		t.Errorf("processes %v, %v", pids, err)
	}
	wantStatus(t, c, name, "not-found inactive dead")
	if d, err := c.Detail(ctx, name); err != nil || d.Load != "not-found" {
		t.Errorf("detail %+v, %v", d, err)
	}
	// Bad names spoil nothing.
	install(t, c, "good.service", sleeper)
	got, err := c.Units(ctx, "good.service", "no unit", "template@.service", name)
	must(t, err)
	if len(got) != 4 || got["good.service"].Load != "loaded" || got[name].Load != "not-found" || got["no unit"].Err == "" {
		t.Errorf("units %+v", got)
	}
	t.Logf("%+v", got)

	path := filepath.Join(t.TempDir(), "linked.service")
	write(t, path, sleeper)
	err = c.Link(ctx, path, "/no/such/file.service", "/not/a/unit")
	var failed Failures
	if !errors.As(err, &failed) || len(failed) != 2 || failed[path] != nil {
		t.Errorf("link: %v", err)
	}
	t.Log(err)
	must(t, c.Reload(ctx))
	wantStatus(t, c, "linked.service", "loaded inactive dead")
	must(t, c.Disable(ctx, "linked.service", name))
	must(t, c.Reload(ctx))
	wantStatus(t, c, "linked.service", "not-found inactive dead")
}

func TestStopWaitsForStopPost(t *testing.T) {
	c, ctx := connect(t), t.Context()
	mark := filepath.Join(t.TempDir(), "mark")
	install(t, c, "slow.service", sleeper+"ExecStopPost=/bin/sh -c 'sleep 1; touch "+mark+"'\n")
	wantResult(t, Done)(c.Start(ctx, "slow.service"))
	wantResult(t, Done)(c.Stop(ctx, "slow.service"))
	if _, err := os.Stat(mark); err != nil {
		t.Error("Stop returned before ExecStopPost= was done")
	}
}

func TestContextEndsWhileUnitStarts(t *testing.T) {
	c := connect(t)
	gate := filepath.Join(t.TempDir(), "gate")
	install(t, c, "slow.service", "[Service]\nType=oneshot\nRemainAfterExit=yes\nExecStart=/bin/sh -c 'until test -e "+gate+"; do sleep 0.02; done'\n")
	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		awaitUnit(t, c, "slow.service", "activating")
		cancel()
	}()
	r, err := c.Start(ctx, "slow.service")
	if r != "" || !errors.Is(err, ErrUnknown) || !errors.Is(err, context.Canceled) {
		t.Errorf("start: %q, %v", r, err)
	}
	if _, err := c.Start(ctx, "slow.service"); err == nil || errors.Is(err, ErrUnknown) {
		t.Errorf("start after the context ended: %v, want it known that nothing was asked", err)
	}
	write(t, gate, "")
	awaitUnit(t, c, "slow.service", "active") // it was not called off

	// A stop calls off a start, and both are told.
	must(t, os.Remove(gate))
	wantResult(t, Done)(c.Stop(t.Context(), "slow.service"))
	started := make(chan struct{})
	go func() {
		defer close(started)
		wantResult(t, Canceled)(c.Start(t.Context(), "slow.service"))
	}()
	awaitUnit(t, c, "slow.service", "activating")
	wantResult(t, Done)(c.Stop(t.Context(), "slow.service"))
	<-started
}

func TestReplaceFile(t *testing.T) {
	c, ctx := connect(t), t.Context()
	dir := t.TempDir()
	for i, text := range []string{"one", "two"} {
		path := filepath.Join(dir, text, "web.service") // another folder each time: the link is replaced
		write(t, path, "[Unit]\nDescription="+text+"\n"+sleeper)
		must(t, c.Link(ctx, path))
		must(t, c.Reload(ctx))
		wantResult(t, Done)(c.Restart(ctx, "web.service"))
		if got := shown(t, "web.service", "Description"); got != text {
			t.Errorf("round %d: %q, want %q", i, got, text)
		}
		write(t, path, "[Unit]\nDescription=edited\n"+sleeper)
		eventually(t, "the edited file is noticed", func() bool {
			return shown(t, "web.service", "NeedDaemonReload") == "yes"
		})
	}
	wantResult(t, Done)(c.Stop(ctx, "web.service"))
	must(t, os.RemoveAll(dir)) // the files may go first
	must(t, c.Disable(ctx, "web.service"))
	must(t, c.Reload(ctx))
	wantStatus(t, c, "web.service", "not-found inactive dead")
}

func TestEnable(t *testing.T) {
	c, ctx := connect(t), t.Context()
	install(t, c, "auto.service", sleeper+"[Install]\nWantedBy=multi-user.target\n", "plain.service", sleeper)
	const link = "/run/systemd/system/multi-user.target.wants/auto.service"
	must(t, c.Enable(ctx, "auto.service", "plain.service"))
	must(t, c.Reload(ctx))
	if state := shown(t, "auto.service", "UnitFileState"); state != "enabled-runtime" {
		t.Errorf("its file is %s", state)
	}
	if _, err := os.Lstat(link); err != nil {
		t.Error(err)
	}
	if wants := shown(t, "multi-user.target", "Wants"); !strings.Contains(wants, "auto.service") {
		t.Errorf("multi-user.target wants %s", wants)
	}
	must(t, c.Disable(ctx, "auto.service"))
	must(t, c.Reload(ctx))
	if _, err := os.Lstat(link); err == nil {
		t.Errorf("%s is still there", link)
	}
	wantStatus(t, c, "auto.service", "not-found inactive dead")
}

func TestNames(t *testing.T) {
	c, ctx := connect(t), t.Context()
	const template = "[Service]\nExecStart=/bin/sleep infinity\nEnvironment=\"I=%i\"\n"
	names := []string{`foo\x2dbar.service`, `web@1.service`, `web@a\x2db.c_d:e.service`, `1-2_3.service`}
	install(t, c, names[0], template, names[1], template, names[2], template, names[3], template)
	for _, name := range names {
		wantResult(t, Done)(c.Start(ctx, name))
		awaitUnit(t, c, name, "active")
		pid := shown(t, name, "MainPID")
		must(t, c.Kill(ctx, name, 9))
		awaitUnit(t, c, name, "failed")
		after, err := c.Detail(ctx, name)
		must(t, err)
		if status := shown(t, name, "ExecMainStatus"); pid == "0" || after.Result != "signal" || status != "9" {
			t.Errorf("%s: process %s, after SIGKILL status %s and %+v", name, pid, status, after)
		}
		if text, exit, err := Show(ctx, name); err != nil || exit != 3 || !strings.Contains(text, "Active: failed") {
			t.Errorf("show %s: %q, %d, %v", name, text, exit, err)
		}
	}
	if _, exit, err := Show(ctx, "nobody.service"); err != nil || exit != 4 {
		t.Errorf("exit code %d, %v", exit, err)
	}
}

// Asking for the status of idle units makes systemd load and drop them, which
// must not wake whoever asks when something changes.
func TestListingIsNoChange(t *testing.T) {
	c, ctx := connect(t), t.Context()
	install(t, c, "idle.service", sleeper, "web.service", sleeper)
	wantResult(t, Done)(c.Start(ctx, "web.service"))
	for range 20 {
		_, err := c.Units(ctx, "idle.service", "nobody.service", "web.service")
		must(t, err)
	}
	wantResult(t, Done)(c.Stop(ctx, "web.service"))
	seen := make(map[string]bool)
	for !seen["web.service"] {
		<-c.Changed()
		for _, name := range c.Take().Units {
			seen[name] = true
		}
	}
	if seen["idle.service"] || seen["nobody.service"] {
		t.Errorf("changed: %v", seen)
	}
}

// What runs or has failed is kept; what is idle is forgotten, also if it was
// asked about.
func TestKept(t *testing.T) {
	c, ctx := connect(t), t.Context()
	install(t, c, "idle.service", sleeper, "web.service", sleeper, "bad.service", "[Service]\nExecStart=/bin/false\nType=oneshot\n")
	wantResult(t, Done)(c.Start(ctx, "web.service"))
	wantResult(t, Failed)(c.Start(ctx, "bad.service"))
	_, err := c.Units(ctx, "idle.service", "nobody.service")
	must(t, err)
	names := []string{"idle.service", "web.service", "bad.service", "nobody.service", "no unit"}
	want := map[string]bool{"idle.service": false, "web.service": true, "bad.service": true, "nobody.service": false, "no unit": false}
	eventually(t, "only what runs or has failed to be kept", func() bool {
		kept, err := c.Kept(ctx, names...)
		must(t, err)
		return maps.Equal(kept, want)
	})
	wantResult(t, Done)(c.Stop(ctx, "web.service"))
	want["web.service"] = false
	eventually(t, "what was stopped to be forgotten", func() bool {
		kept, err := c.Kept(ctx, names...)
		must(t, err)
		return maps.Equal(kept, want)
	})
}

// More units than the limit has room for, one that does not exist and one that is
// stopped.
func TestStopAll(t *testing.T) {
	c, ctx := connect(t), t.Context()
	c.stops = semaphore.NewWeighted(4)
	var units, names []string
	for i := range 12 {
		names = append(names, fmt.Sprintf("all%d.service", i))
		units = append(units, names[i], sleeper)
	}
	install(t, c, units...)
	for _, name := range names[1:] {
		wantResult(t, Done)(c.Start(ctx, name))
	}
	names = append(names, "nobody.service")
	waits := c.StopAll(ctx, names...)
	if len(waits) != len(names) {
		t.Fatalf("%d waits for %d units", len(waits), len(names))
	}
	var ended sync.WaitGroup
	for _, wait := range waits {
		ended.Go(func() { wantResult(t, Done)(wait(ctx)) })
	}
	ended.Wait()
	for _, name := range names[:12] {
		wantStatus(t, c, name, "loaded inactive dead")
	}
	if !c.stops.TryAcquire(4) {
		t.Fatal("not all have given back their place in the limit")
	}
	c.stops.Release(4)
}

func TestManyUnits(t *testing.T) {
	const n = 500
	c, ctx := connect(t), t.Context()
	dir := t.TempDir()
	var names, paths []string
	for i := range n {
		names = append(names, fmt.Sprintf("many@%03d.service", i))
		paths = append(paths, filepath.Join(dir, names[i]))
		write(t, paths[i], sleeper)
	}
	took := func(what string, do func()) {
		began := time.Now()
		do()
		t.Logf("%s %d units: %v", what, n, time.Since(began).Round(time.Millisecond))
	}
	all := func(what string, order func(context.Context, string) (Result, error)) {
		took(what, func() {
			var wg sync.WaitGroup
			for _, name := range names {
				wg.Go(func() { wantResult(t, Done)(order(ctx, name)) })
			}
			wg.Wait()
		})
	}
	took("link", func() { must(t, c.Link(ctx, paths...)) })
	took("reload with", func() { must(t, c.Reload(ctx)) })
	list := func(want string) {
		took("list", func() {
			got, err := c.Units(ctx, names...)
			must(t, err)
			for _, name := range names {
				if got[name].Active != want {
					t.Errorf("%s is %+v", name, got[name])
				}
			}
		})
	}
	list("inactive")

	var wakes atomic.Int32
	watching, stop := context.WithCancel(ctx)
	var watcher sync.WaitGroup
	watcher.Go(func() {
		for {
			select {
			case <-c.Changed():
				wakes.Add(1)
				_, err := c.Units(ctx, c.Take().Units...)
				check(t, err)
			case <-watching.Done():
				return
			}
		}
	})
	deaf := time.Duration(0)
	watcher.Go(func() {
		tick := time.NewTicker(20 * time.Millisecond)
		defer tick.Stop()
		for {
			select {
			case <-tick.C:
				began := time.Now()
				_, err := c.Units(ctx, "init.scope")
				check(t, err)
				deaf = max(deaf, time.Since(began))
			case <-watching.Done():
				return
			}
		}
	})
	all("start", func(ctx context.Context, name string) (Result, error) { return c.Start(ctx, name) })
	t.Logf("%d wake-ups", wakes.Load())
	list("active")
	took("reload with", func() { must(t, c.Reload(ctx)) })
	all("stop", c.Stop)
	list("inactive")
	took("disable", func() { must(t, c.Disable(ctx, names...)) })
	took("reload without", func() { must(t, c.Reload(ctx)) })
	stop()
	watcher.Wait()
	t.Logf("systemd was deaf for up to %v", deaf.Round(time.Millisecond))
	if got, err := c.Units(ctx, names[0]); err != nil || got[names[0]].Load != "not-found" {
		t.Errorf("%+v, %v", got, err)
	}
}

// Starts of one unit become one for systemd; each caller is told.
func TestSameUnitAtOnce(t *testing.T) {
	c, ctx := connect(t), t.Context()
	install(t, c, "same.service", "[Service]\nType=oneshot\nRemainAfterExit=yes\nExecStart=/bin/sleep 0.1\n")
	for range 5 {
		var all sync.WaitGroup
		for range 50 {
			all.Go(func() { wantResult(t, Done)(c.Start(ctx, "same.service")) })
		}
		all.Wait()
		wantResult(t, Done)(c.Stop(ctx, "same.service"))
	}
}

func TestReexec(t *testing.T) {
	c, ctx := connect(t), t.Context()
	gate := filepath.Join(t.TempDir(), "gate")
	install(t, c, "web.service", sleeper,
		"slow.service", "[Service]\nType=oneshot\nRemainAfterExit=yes\nExecStart=/bin/sh -c 'until test -e "+gate+"; do sleep 0.02; done'\n")
	wantResult(t, Done)(c.Start(ctx, "web.service"))
	for range 3 {
		result := make(chan error)
		go func() {
			_, err := c.Start(ctx, "slow.service")
			result <- err
		}()
		awaitUnit(t, c, "slow.service", "activating")
		run(t, "systemctl", "daemon-reexec")
		if err := <-result; !errors.Is(err, ErrUnknown) {
			t.Errorf("a start across the re-execution: %v", err)
		}
		for all := false; !all; all = c.Take().All {
			<-c.Changed()
		}
		wantStatus(t, c, "web.service", "loaded active running")
		write(t, gate, "")
		awaitUnit(t, c, "slow.service", "active") // systemd kept it
		must(t, os.Remove(gate))
		wantResult(t, Done)(c.Stop(ctx, "slow.service"))
	}
	run(t, "systemctl", "kill", "-s", "KILL", "web.service")
	awaitUnit(t, c, "web.service", "failed")
}

func TestDBusRestart(t *testing.T) {
	c, ctx := connect(t), t.Context()
	gate := filepath.Join(t.TempDir(), "gate")
	install(t, c, "slow.service", "[Service]\nType=oneshot\nRemainAfterExit=yes\nExecStart=/bin/sh -c 'until test -e "+gate+"; do sleep 0.02; done'\n")
	result := make(chan struct{})
	go func() {
		defer close(result)
		wantResult(t, Done)(c.Start(ctx, "slow.service"))
	}()
	awaitUnit(t, c, "slow.service", "activating")
	wantResult(t, Done)(c.Restart(ctx, "dbus.service"))
	write(t, gate, "")
	<-result
	wantResult(t, Done)(c.Stop(ctx, "dbus.service"))
	wantResult(t, Done)(c.Restart(ctx, "slow.service"))
	wantResult(t, Done)(c.Start(ctx, "dbus.service"))
}

func TestRunEnds(t *testing.T) {
	c := New(slog.New(slog.DiscardHandler))
	short, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	if _, err := c.Units(short, "web.service"); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("without Run: %v", err)
	} else {
		t.Log(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	ended := make(chan error)
	go func() { ended <- c.Run(ctx) }()
	_, err := c.Units(t.Context(), "web.service")
	must(t, err)
	stop()
	if err := <-ended; !errors.Is(err, context.Canceled) {
		t.Errorf("Run returned %v", err)
	}
	if _, err := c.Units(t.Context(), "web.service"); err == nil {
		t.Error("a call after the end of Run is answered")
	} else {
		t.Log(err)
	}
}

func TestJournal(t *testing.T) {
	c, ctx := connect(t), t.Context()
	install(t, c,
		`talk\x2der.service`, "[Service]\nType=oneshot\nExecStart=/bin/sh -c 'echo one; echo two >&2; printf \"bad \\\\377 byte\\\\n\"; printf \"%%05000d\\\\n\" 0'\n",
		"other.service", "[Service]\nType=oneshot\nExecStart=/bin/echo other\n")
	const name = `talk\x2der.service`
	wantResult(t, Done)(c.Start(ctx, "other.service"))
	wantResult(t, Done)(c.Start(ctx, name))
	run(t, "journalctl", "--sync")

	var entries []Entry
	for e, err := range Journal(ctx, JournalQuery{Units: []string{name}}) {
		must(t, err)
		entries = append(entries, e)
	}
	var said []string
	for _, e := range entries {
		if e.Unit != name || e.Time.IsZero() || e.Cursor == "" || e.PID == 0 || e.Identifier == "" {
			t.Errorf("entry %+v", e)
		}
		if e.Identifier == "sh" {
			said = append(said, e.Message)
		}
	}
	if want := []string{"one", "two", "bad \uFFFD byte", strings.Repeat("0", 5000)}; !slices.Equal(said, want) {
		t.Errorf("it said %q, want %q", said, want)
	}
	if len(entries) <= len(said) {
		t.Error("what systemd says about the unit is missing")
	}

	query := func(q JournalQuery) (messages []string) {
		t.Helper()
		q.Units = []string{name}
		for e, err := range Journal(ctx, q) {
			must(t, err)
			messages = append(messages, e.Message)
		}
		return messages
	}
	if got := query(JournalQuery{Lines: 2}); len(got) != 2 {
		t.Errorf("the last two: %q", got)
	}
	if got := query(JournalQuery{Lines: -1}); len(got) != 0 {
		t.Errorf("none: %q", got)
	}
	if got := query(JournalQuery{After: entries[2].Cursor}); len(got) != len(entries)-3 {
		t.Errorf("after the third of %d: %q", len(entries), got)
	}
	since := 0
	for _, e := range entries {
		if !e.Time.Before(entries[2].Time) {
			since++
		}
	}
	if got := query(JournalQuery{Since: entries[2].Time}); len(got) != since {
		t.Errorf("since the third, %d of %d: %.20q", since, len(entries), got)
	}

	// Following several units: what is there, then what comes, until ctx ends.
	following, stop := context.WithCancel(ctx)
	seen := make(map[string]int)
	var last error
	for e, err := range Journal(following, JournalQuery{Units: []string{name, "other.service"}, Lines: 1, Follow: true}) {
		if last = err; err != nil {
			break
		}
		if seen[e.Message]++; len(seen) == 1 {
			wantResult(t, Done)(c.Start(ctx, "other.service"))
			wantResult(t, Done)(c.Start(ctx, name))
		}
		if seen["other"] > 0 && seen["two"] > 0 {
			stop()
		}
	}
	stop()
	if !errors.Is(last, context.Canceled) {
		t.Errorf("following ended with %v", last)
	}
	if err := exec.Command("pgrep", "-x", "journalctl").Run(); err == nil {
		t.Error("journalctl is still there")
	}
	for _, err := range Journal(ctx, JournalQuery{After: "nonsense"}) {
		if err == nil {
			t.Error("a bad cursor is no error")
		}
		t.Log(err)
	}
}
