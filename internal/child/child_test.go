package child

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// The test binary itself is the supervisor that the crash test kills.
func TestMain(m *testing.M) {
	if dir := os.Getenv("CHILD_TEST_SUPERVISE"); dir != "" {
		if err := Run(context.Background(), Config{
			Name: "sleeper", Argv: []string{"sleep", "600"},
			PidFile: filepath.Join(dir, "pid"), LogFile: filepath.Join(dir, "log"),
		}); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	os.Exit(m.Run())
}

// running is a Run in progress.
type running struct {
	t      *testing.T
	dir    string
	pids   chan int // of each start and adoption
	cancel context.CancelCauseFunc
	result chan error
	log    *logBuffer
}

type logBuffer struct {
	pids chan<- int // gets those of the lines that say started or adopted

	mu  sync.Mutex // guards buf
	buf bytes.Buffer
}

var begun = regexp.MustCompile(`msg=(?:started|adopted) .*pid=(\d+)`)

func (b *logBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if found := begun.FindSubmatch(p); found != nil {
		pid, _ := strconv.Atoi(string(found[1]))
		b.pids <- pid
	}
	return b.buf.Write(p)
}

func (b *logBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}

// supervise runs the shell script under Run with its files in dir.
func supervise(t *testing.T, dir, script string, change ...func(*Config)) *running {
	t.Helper()
	ctx, cancel := context.WithCancelCause(context.Background())
	pids := make(chan int, 100)
	r := &running{t: t, dir: dir, pids: pids, cancel: cancel, result: make(chan error, 1), log: &logBuffer{pids: pids}}
	cfg := Config{
		Name: "script", Argv: []string{"/bin/sh", "-c", script},
		Env: append(os.Environ(), "DIR="+dir), Dir: dir,
		LogFile: filepath.Join(dir, "log"), PidFile: filepath.Join(dir, "pid"),
		Logger: slog.New(slog.NewTextHandler(r.log, nil)),
	}
	for _, f := range change {
		f(&cfg)
	}
	go func() { r.result <- Run(ctx, cfg) }()
	t.Cleanup(func() {
		cancel(nil)
		select {
		case err := <-r.result:
			t.Logf("Run = %v", err)
		case <-time.After(20 * time.Second):
			t.Error("Run did not return after its context ended")
		}
		if t.Failed() {
			t.Log(r.log.String())
		}
	})
	return r
}

func (r *running) pid() int {
	r.t.Helper()
	select {
	case pid := <-r.pids:
		return pid
	case err := <-r.result:
		r.result <- err
		r.t.Fatalf("Run returned %v, want a start", err)
	case <-time.After(20 * time.Second):
		r.t.Fatalf("no start in 20 s; log: %s", r.log)
	}
	return 0
}

func (r *running) stop(cause error) error {
	r.t.Helper()
	r.cancel(cause)
	return r.wait()
}

func (r *running) wait() error {
	r.t.Helper()
	select {
	case err := <-r.result:
		r.result <- err
		return err
	case <-time.After(20 * time.Second):
		r.t.Fatal("Run did not return in 20 s")
		return nil
	}
}

func eventually(t *testing.T, what string, cond func() bool) {
	t.Helper()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(20 * time.Second); !cond(); <-tick.C {
		if time.Now().After(deadline) {
			t.Fatalf("not in 20 s: %s", what)
		}
	}
}

// alive says whether pid runs; a zombie does not.
func alive(pid int) bool {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	return err == nil && b[bytes.LastIndexByte(b, ')')+2] != 'Z'
}

func read(t *testing.T, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	return string(b)
}

func readPid(t *testing.T, path string) int {
	t.Helper()
	var pid int
	eventually(t, "a pid in "+path, func() bool {
		pid, _ = strconv.Atoi(strings.TrimSpace(read(t, path)))
		return pid > 0
	})
	return pid
}

func TestRestart(t *testing.T) {
	dir := t.TempDir()
	r := supervise(t, dir, `echo line 0; for i in 1 2 3 4 5; do echo "line $i" >&2; done; [ -e again ] && exec sleep 600; touch again; exit 3`)
	first, second := r.pid(), r.pid()
	eventually(t, "both lives in the log", func() bool { return strings.Count(read(t, filepath.Join(dir, "log")), "line 5") == 2 })
	if first == second || !alive(second) {
		t.Fatalf("pids %d and %d, want another live one", first, second)
	}
	for _, want := range []string{"level=WARN", "exit status 3", `log="line 1 | line 2 | line 3 | line 4 | line 5"`, "process=script", "again_in=100ms"} {
		if !strings.Contains(r.log.String(), want) {
			t.Errorf("log %q lacks %q", r.log, want)
		}
	}
	if got := readPidLine(t, dir); got != second {
		t.Errorf("pid file names %d, want %d", got, second)
	}
	if err := r.stop(nil); err != nil {
		t.Errorf("Run = %v, want nil", err)
	}
	if alive(second) {
		t.Error("the child still runs after Run returned")
	}
	if _, err := os.Stat(filepath.Join(dir, "pid")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("pid file after the stop: %v, want none", err)
	}
}

func readPidLine(t *testing.T, dir string) int {
	t.Helper()
	pid, _, err := readPidFile(filepath.Join(dir, "pid"))
	if err != nil {
		t.Fatal(err)
	}
	return pid
}

func TestSignalIsAReason(t *testing.T) {
	r := supervise(t, t.TempDir(), `exec sleep 600`)
	if err := syscall.Kill(r.pid(), syscall.SIGSEGV); err != nil {
		t.Fatal(err)
	}
	r.pid()
	if want := "signal: segmentation fault"; !strings.Contains(r.log.String(), want) {
		t.Errorf("log %q lacks %q", r.log, want)
	}
}

func TestBackoff(t *testing.T) {
	var got []time.Duration
	d := time.Duration(0)
	for range 8 {
		d = backoff(d, time.Second)
		got = append(got, d)
	}
	if want := "[100ms 200ms 400ms 800ms 1.6s 3.2s 5s 5s]"; fmt.Sprint(got) != want {
		t.Errorf("pauses %v, want %s", got, want)
	}
	if d = backoff(d, goodLife); d != backoffMin {
		t.Errorf("pause after a good life = %v, want %v", d, backoffMin)
	}
}

func TestAdoptAfterCrash(t *testing.T) {
	dir := t.TempDir()
	super := exec.Command(os.Args[0])
	super.Env = append(os.Environ(), "CHILD_TEST_SUPERVISE="+dir)
	super.Stderr = os.Stderr
	if err := super.Start(); err != nil {
		t.Fatal(err)
	}
	var pid int
	eventually(t, "a pid file", func() bool { pid = readPidLine(t, dir); return pid > 0 })

	// Two supervisors of one child: the second is refused and told about the first.
	err := Run(t.Context(), Config{Name: "sleeper", Argv: []string{"sleep", "600"}, PidFile: filepath.Join(dir, "pid")})
	if want := fmt.Sprintf("run sleeper: process %d supervises it already", super.Process.Pid); err == nil || !strings.HasPrefix(err.Error(), want) {
		t.Errorf("second Run = %v, want %s", err, want)
	}

	if err := super.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = super.Wait()
	if !alive(pid) {
		t.Fatal("the child died with its supervisor")
	}
	r := supervise(t, dir, `exec sleep 601`)
	if got := r.pid(); got != pid {
		t.Fatalf("Run started %d, want %d adopted", got, pid)
	}
	if !strings.Contains(r.log.String(), "adopted") {
		t.Errorf("log %q does not say adopted", r.log)
	}
	// The end of an adopted child is noticed too.
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	next := r.pid()
	if !strings.Contains(r.log.String(), "exit status unknown") {
		t.Errorf("log %q does not say that the exit status is unknown", r.log)
	}
	if err := r.stop(nil); err != nil || alive(next) {
		t.Errorf("Run = %v, child alive %v; want nil, false", err, alive(next))
	}
}

func TestAdoptedIsStopped(t *testing.T) {
	dir := t.TempDir()
	a := supervise(t, dir, `exec sleep 600`)
	pid := a.pid()
	if err := a.stop(ErrLeave); err != nil {
		t.Fatalf("Run = %v, want nil", err)
	}
	if !alive(pid) || readPidLine(t, dir) != pid {
		t.Fatal("ErrLeave ended the child or its pid file")
	}
	b := supervise(t, dir, `exec sleep 600`)
	if got := b.pid(); got != pid {
		t.Fatalf("second Run runs %d, want %d adopted", got, pid)
	}
	if err := b.stop(nil); err != nil || alive(pid) {
		t.Errorf("Run = %v, child alive %v; want nil, false", err, alive(pid))
	}
}

// The pid file of a process that is gone, whose number nobody has, names nothing to
// adopt: a node and its store that were killed together start again.
func TestGoneIsNotAdopted(t *testing.T) {
	gone := exec.Command("true")
	if err := gone.Run(); err != nil {
		t.Fatal(err)
	}
	boot, err := BootID()
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "pid")
	if err := os.WriteFile(file, fmt.Appendln(nil, gone.Process.Pid, 1, boot), 0o644); err != nil {
		t.Fatal(err)
	}
	if p, err := adopt(file); p != nil || err != nil {
		t.Errorf("adopt = %v, %v; want nothing", p, err)
	}
}

func TestStrangerIsNotAdopted(t *testing.T) {
	stranger := exec.Command("sleep", "600")
	if err := stranger.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = stranger.Process.Kill(); _ = stranger.Wait() }()
	pid := stranger.Process.Pid
	started, err := startTime(pid)
	if err != nil {
		t.Fatal(err)
	}
	boot, err := BootID()
	if err != nil {
		t.Fatal(err)
	}
	for name, content := range map[string]string{
		"reused pid":   fmt.Sprintf("%d\n%d\n%s\n", pid, started-1, boot),
		"earlier boot": fmt.Sprintf("%d\n%d\n%s\n", pid, started, "another"),
		"only a pid":   fmt.Sprintf("%d\n", pid),
		"rubbish":      "x y " + boot,
		"empty":        "",
		"group 1":      fmt.Sprintf("-1\n%d\n%s\n", started, boot),
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			if err := os.WriteFile(filepath.Join(dir, "pid"), []byte(content), 0o644); err != nil {
				t.Fatal(err)
			}
			r := supervise(t, dir, `exec sleep 600`)
			if got := r.pid(); got == pid {
				t.Error("Run adopted a stranger")
			}
			if err := r.stop(nil); err != nil {
				t.Error(err)
			}
			if !alive(pid) {
				t.Error("Run stopped a stranger")
			}
		})
	}
}

func TestStopAndKill(t *testing.T) {
	polite := supervise(t, t.TempDir(), `trap 'echo bye; exit 0' TERM; touch ready; while :; do sleep 0.05; done`)
	polite.pid()
	eventually(t, "ready", func() bool { return exists(polite.dir, "ready") })
	if err := polite.stop(nil); err != nil {
		t.Fatal(err)
	}
	if log := read(t, filepath.Join(polite.dir, "log")); log != "bye\n" {
		t.Errorf("child's log = %q, want its farewell", log)
	}

	stubborn := supervise(t, t.TempDir(), `trap '' TERM; touch ready; while :; do sleep 0.05; done`,
		func(c *Config) { c.StopTimeout = 100 * time.Millisecond })
	pid := stubborn.pid()
	eventually(t, "ready", func() bool { return exists(stubborn.dir, "ready") })
	if err := stubborn.stop(nil); err != nil {
		t.Fatal(err)
	}
	if alive(pid) || !strings.Contains(stubborn.log.String(), "signal: killed") {
		t.Errorf("alive %v, log %q; want it killed", alive(pid), stubborn.log)
	}
}

func exists(dir, name string) bool {
	_, err := os.Stat(filepath.Join(dir, name))
	return err == nil
}

func TestGrandchildrenDie(t *testing.T) {
	const script = `sleep 600 & echo $! > grand.new; mv grand.new grand; wait`
	t.Run("stop", func(t *testing.T) {
		r := supervise(t, t.TempDir(), script)
		r.pid()
		grand := readPid(t, filepath.Join(r.dir, "grand"))
		if err := r.stop(nil); err != nil {
			t.Fatal(err)
		}
		eventually(t, "the grandchild is dead", func() bool { return !alive(grand) })
	})
	t.Run("death", func(t *testing.T) {
		r := supervise(t, t.TempDir(), script)
		pid := r.pid()
		grand := readPid(t, filepath.Join(r.dir, "grand"))
		if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		r.pid()
		eventually(t, "the grandchild is dead", func() bool { return !alive(grand) })
	})
}

func TestGiveUp(t *testing.T) {
	dir := t.TempDir()
	r := supervise(t, dir, `[ -e again ] || { touch again; exit 1; }; echo the disk is on fire; exit 2`,
		func(c *Config) { c.GiveUp = func(exit int) bool { return exit == 2 } })
	err := r.wait()
	if !errors.Is(err, ErrGiveUp) || err.Error() != "run script: exit status 2, not started again; its log ends: the disk is on fire" {
		t.Errorf("Run = %v, want ErrGiveUp with the log", err)
	}
	if len(r.pids) != 2 || exists(dir, "pid") {
		t.Errorf("%d starts, pid file %v; want 2, none", len(r.pids), exists(dir, "pid"))
	}
}

func TestCannotStart(t *testing.T) {
	dir := t.TempDir()
	for want, cfg := range map[string]Config{
		`run child "x": name, argv and pid file are required`:                          {Name: "x"},
		`run x: start: exec: "/nowhere/x": stat /nowhere/x: no such file or directory`: {Name: "x", Argv: []string{"/nowhere/x"}, PidFile: filepath.Join(dir, "p")},
		`run x: open log: open /nowhere/log: no such file or directory`:                {Name: "x", Argv: []string{"true"}, PidFile: filepath.Join(dir, "p"), LogFile: "/nowhere/log"},
		`run x: open lock: open /nowhere/p.lock: no such file or directory`:            {Name: "x", Argv: []string{"true"}, PidFile: "/nowhere/p"},
	} {
		if err := Run(t.Context(), cfg); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("Run = %v, want %s", err, want)
		}
	}
}

// A program that is away for a while, as in an upgrade, does not end the supervision.
func TestProgramComesBack(t *testing.T) {
	dir := t.TempDir()
	prog := filepath.Join(dir, "prog")
	install := func() {
		if err := os.WriteFile(prog+".new", []byte("#!/bin/sh\nexec sleep 600\n"), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(prog+".new", prog); err != nil {
			t.Fatal(err)
		}
	}
	install()
	r := supervise(t, dir, "", func(c *Config) { c.Argv = []string{prog} })
	pid := r.pid()
	if err := os.Remove(prog); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	eventually(t, "a refused start", func() bool { return strings.Contains(r.log.String(), "not started") })
	install()
	r.pid()
}

func TestLogRotates(t *testing.T) {
	dir := t.TempDir()
	log := filepath.Join(dir, "log")
	if err := os.WriteFile(log, bytes.Repeat([]byte("x"), logLimit+1), 0o640); err != nil {
		t.Fatal(err)
	}
	r := supervise(t, dir, `echo new; exec sleep 600`)
	r.pid()
	eventually(t, "a new log", func() bool { return read(t, log) == "new\n" })
	if st, err := os.Stat(log + ".1"); err != nil || st.Size() != logLimit+1 {
		t.Errorf("rotated log: %v, %v; want the old one", st, err)
	}
}

func TestLogTail(t *testing.T) {
	log := filepath.Join(t.TempDir(), "log")
	if err := os.WriteFile(log, []byte("old life\n"+"a\nb\xff\n\nc\nd\ne\nf"), 0o640); err != nil {
		t.Fatal(err)
	}
	for from, want := range map[int64]string{
		0:   "b? | c | d | e | f",
		9:   "b? | c | d | e | f",
		19:  "e | f",
		22:  "(it wrote nothing)",
		999: "(it wrote nothing)",
	} {
		if got := logTail(log, from); got != want {
			t.Errorf("logTail(%d) = %q, want %q", from, got, want)
		}
	}
	if got := logTail(log+"x", 0); got != "(it wrote nothing)" {
		t.Errorf("logTail without a log = %q", got)
	}
}

// The child gets a session of its own, /dev/null to read and none of our files.
func TestSurroundings(t *testing.T) {
	dir := t.TempDir()
	r := supervise(t, dir, `ls -l /proc/$$/fd >fds; readlink /proc/$$/fd/0; pwd; echo "$DIR"; cut -d' ' -f5,6 /proc/$$/stat; touch ready; exec sleep 600`)
	pid := r.pid()
	eventually(t, "ready", func() bool { return exists(dir, "ready") })
	want := fmt.Sprintf("/dev/null\n%s\n%s\n%d %d\n", dir, dir, pid, pid)
	if got := read(t, filepath.Join(dir, "log")); got != want {
		t.Errorf("child sees %q, want %q", got, want)
	}
	if fds := read(t, filepath.Join(dir, "fds")); strings.Contains(fds, ".lock") || strings.Contains(fds, "pidfd") {
		t.Errorf("child holds files of ours: %s", fds)
	}
}
