//go:build system

package systemd

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

const armAndDie = "FLOTILLA_TEST_ARM" // duration

// arm is the test binary as a process that arms the fence and dies.
func arm() int {
	after, err := time.ParseDuration(os.Getenv(armAndDie))
	if err != nil {
		fmt.Println(err)
		return 1
	}
	c := New(slog.New(slog.DiscardHandler))
	ctx := context.Background()
	go func() { _ = c.Run(ctx) }()
	if err := c.Fence(ctx, after); err != nil {
		fmt.Println(err)
		return 1
	}
	_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
	return 1
}

func armByAnother(t *testing.T, after time.Duration) {
	t.Helper()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), armAndDie+"="+after.String())
	out, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.Exited() {
		t.Fatalf("%v: %s", err, out)
	}
}

// The hardest to keep down: each starts again at once, when it ends or is
// wanted, ignores SIGTERM, and runs commands when it stops.
var exclusive = []string{
	"always@.service", "[Service]\nExecStart=/bin/sleep infinity\nRestart=always\nRestartSec=0\nStartLimitIntervalSec=0\n",
	"deaf@.service", "[Service]\nExecStart=/bin/sh -c 'trap \"\" TERM; while :; do sleep 1000 & wait; done'\nRestart=always\nRestartSec=50ms\nSendSIGKILL=no\nKillMode=process\nTimeoutStopSec=1h\n",
	"post@.service", "[Service]\nExecStart=/bin/sleep infinity\nExecStop=/bin/sleep 1001\nExecStopPost=/bin/sleep 1002\nRestart=always\nRestartSec=0\nTimeoutStopSec=1h\n",
}

func installExclusive(t *testing.T, c *Conn, each int) []string {
	t.Helper()
	t.Cleanup(func() { check(t, c.Unfence(context.Background())) })
	var files, names []string
	for i := 0; i < len(exclusive); i += 2 {
		dir := "/run/systemd/system/" + exclusive[i] + ".d"
		write(t, dir+"/50-flotilla.conf", FenceDropIn("Service"))
		t.Cleanup(func() { check(t, os.RemoveAll(dir)) })
		for n := range each {
			name := strings.Replace(exclusive[i], "@", "@"+strconv.Itoa(n), 1)
			names = append(names, name)
			files = append(files, name, exclusive[i+1])
		}
	}
	// Wants the first of them as long as it runs itself.
	files = append(files, "upholder.service", "[Unit]\nUpholds="+names[0]+"\n"+sleeper)
	install(t, c, files...)
	t.Cleanup(func() { // they would not stop for hours
		_, err := c.Stop(context.Background(), "upholder.service")
		check(t, err)
		if err := c.Fence(context.Background(), time.Millisecond); err != nil {
			t.Log(err) // it fired before the gate could open
		}
		awaitEmpty(t, c)
	})
	return names
}

func startAll(t *testing.T, c *Conn, names []string) {
	t.Helper()
	var all sync.WaitGroup
	for _, name := range names {
		all.Go(func() { wantResult(t, Done)(c.Start(t.Context(), name)) })
	}
	all.Wait()
}

func processes(t *testing.T, c *Conn) []int {
	t.Helper()
	pids, err := c.Processes(t.Context(), FenceSlice)
	must(t, err)
	return pids
}

// awaitEmpty waits until the slice has no process and no unit that may make one.
func awaitEmpty(t *testing.T, c *Conn) {
	t.Helper()
	eventually(t, "the slice is inactive", func() bool {
		got, err := c.Units(context.Background(), FenceSlice)
		check(t, err)
		return got[FenceSlice].Active == "inactive"
	})
}

func gateOpen(t *testing.T) bool {
	t.Helper()
	_, err := os.Stat(FenceGate)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		t.Fatal(err)
	}
	return err == nil
}

func TestFence(t *testing.T) {
	c, ctx := connect(t), t.Context()
	names := installExclusive(t, c, 5)

	// Without a fence nothing behind it starts.
	for _, name := range names[:2] {
		wantResult(t, Asserted)(c.Start(ctx, name))
	}
	if err := c.Fence(ctx, -time.Second); err == nil {
		t.Error("a fence in the past is armed")
	}
	must(t, c.Fence(ctx, time.Hour))
	startAll(t, c, append(names, "upholder.service"))
	if got := len(processes(t, c)); got < len(names) {
		t.Fatalf("%d processes of %d units", got, len(names))
	}

	// A process that dies after arming replaced our fence by its own.
	const after = 2 * time.Second
	began := time.Now()
	armByAnother(t, after)
	eventually(t, "the gate closes", func() bool { return !gateOpen(t) })
	fired := time.Since(began)
	eventually(t, "the slice is empty", func() bool { return len(processes(t, c)) == 0 })
	t.Logf("armed for %v: fired at %v, all of %d units dead at %v", after, fired.Round(time.Millisecond), len(names), time.Since(began).Round(time.Millisecond))
	if fired < after {
		t.Errorf("it fired after %v", fired)
	}
	awaitEmpty(t, c)
	// Neither Restart= nor Upholds= nor an operator brings one back. The job of
	// the one may take the place of the other's, or be refused because of it.
	got, err := c.Start(ctx, names[0])
	refused := err != nil && strings.Contains(err.Error(), "is destructive")
	if !refused && (err != nil || got != Asserted && got != Canceled) {
		t.Errorf("a start behind the closed fence: %q (%v)", got, err)
	}
	watch := time.NewTimer(time.Second) // ten times the shortest pause of a restart
	for over := false; !over; {
		if pids := processes(t, c); len(pids) > 0 {
			t.Fatalf("processes %v are back", pids)
		}
		select {
		case <-watch.C:
			over = true
		default:
		}
	}
	wantResult(t, Done)(c.Stop(ctx, "upholder.service"))

	// Armed again, all is as before.
	must(t, c.Fence(ctx, time.Hour))
	startAll(t, c, names)
	if !gateOpen(t) || len(processes(t, c)) < len(names) {
		t.Error("not all units started again")
	}
	must(t, c.Unfence(ctx))
	if left := run(t, "systemctl", "list-units", "--all", "--plain", "--no-legend", fencePrefix+"*"); left != "" {
		t.Errorf("left after Unfence: %s", left)
	}
	if gateOpen(t) || len(processes(t, c)) < len(names) {
		t.Error("Unfence lets units start, or has stopped some")
	}
}

// Arming again and again holds it off, costs systemd no memory, and a later
// process takes over what an earlier one armed.
func TestRearm(t *testing.T) {
	c, ctx := connect(t), t.Context()
	names := installExclusive(t, c, 1)
	armByAnother(t, 3*time.Second)
	startAll(t, c, names)
	began, rounds := time.Now(), 0
	for ; time.Since(began) < 5*time.Second || rounds < 20; rounds++ {
		must(t, c.Fence(ctx, 3*time.Second))
	}
	t.Logf("%d times in %v", rounds, time.Since(began).Round(time.Millisecond))
	if !gateOpen(t) || len(processes(t, c)) < len(names) {
		t.Error("the fence fired")
	}
	eventually(t, "systemd has dropped the fences before", func() bool {
		left := run(t, "systemctl", "list-units", "--all", "--plain", "--no-legend", fencePrefix+"*")
		return strings.Count(left, "\n")+1 <= 4
	})
	eventually(t, "it fires when not armed any more", func() bool { return !gateOpen(t) && len(processes(t, c)) == 0 })
}

// Reloading and re-executing systemd neither delays the fence nor loses it.
func TestFenceDuringReload(t *testing.T) {
	c, ctx := connect(t), t.Context()
	names := installExclusive(t, c, 1)
	for _, verb := range []string{"daemon-reload", "daemon-reexec"} {
		const after = 3 * time.Second
		must(t, c.Fence(ctx, time.Hour))
		startAll(t, c, names)
		began := time.Now()
		must(t, c.Fence(ctx, after))
		rounds := 0
		for gateOpen(t) {
			run(t, "systemctl", verb)
			if rounds++; time.Since(began) > patience {
				t.Fatal("it does not fire")
			}
		}
		fired := time.Since(began)
		eventually(t, "the slice is empty", func() bool { return len(processes(t, c)) == 0 })
		t.Logf("%s %d times: armed for %v, fired at %v, empty at %v", verb, rounds, after, fired.Round(time.Millisecond), time.Since(began).Round(time.Millisecond))
		if fired < after {
			t.Errorf("it fired after %v and %d rounds", fired, rounds)
		}
		awaitEmpty(t, c)
	}
}
