package child

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// process is one live process, our own child or an adopted one. os.Process holds
// it by its pidfd, so that no signal of ours can reach another process that got
// the same number later.
type process struct {
	*os.Process
	started  uint64 // clock ticks since boot; with the pid, unique until the next boot
	logStart int64  // size of the log file when it started; 0 for an adopted one
	unsaved  bool   // its pid file could not be written yet

	ended     chan struct{} // closed when the process has ended
	unwatch   *os.File      // ends the watching when it is closed
	unwatched chan struct{} // closed when the watching goroutine has returned
}

// spawn starts cfg.Argv in a session of its own, with its output going to out.
func spawn(cfg Config, out *os.File) (*process, error) {
	path, err := exec.LookPath(cfg.Argv[0])
	if err == nil {
		path, err = filepath.Abs(path) // Dir must not change what it means
	}
	cmd := exec.Cmd{
		Path: path, Args: cfg.Argv, Dir: cfg.Dir, Env: cfg.Env, Stdout: out, Stderr: out,
		SysProcAttr: &syscall.SysProcAttr{Setsid: true},
	}
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		return nil, fmt.Errorf("start: %w", err)
	}
	p, err := watch(cmd.Process)
	if err != nil {
		_ = cmd.Process.Kill()
		_, _ = cmd.Process.Wait()
		return nil, err
	}
	return p, nil
}

// adopt returns the live process that the pid file names, nil if there is none.
func adopt(pidFile string) (*process, error) {
	pid, started, err := readPidFile(pidFile)
	if err != nil || pid == 0 {
		return nil, err
	}
	proc, err := os.FindProcess(pid)
	if err != nil {
		return nil, fmt.Errorf("open process %d: %w", pid, err)
	}
	// One that FindProcess did not find has no handle, and is said to be done.
	if errors.Is(proc.Signal(syscall.Signal(0)), os.ErrProcessDone) {
		return nil, nil
	}
	p, err := watch(proc)
	if errors.Is(err, os.ErrProcessDone) || errors.Is(err, os.ErrNotExist) {
		return nil, nil // it is gone
	}
	if err != nil {
		return nil, err
	}
	if p.started != started {
		p.release() // another process got the number
		return nil, nil
	}
	return p, nil
}

// watch notices the end of the process until release is called.
func watch(proc *os.Process) (*process, error) {
	p := &process{Process: proc, ended: make(chan struct{}), unwatched: make(chan struct{})}
	fail := func(err error) (*process, error) {
		return nil, fmt.Errorf("watch process %d: %w", proc.Pid, err)
	}
	// proc holds the process: the start time is that of this process or none.
	err := proc.WithHandle(func(uintptr) {})
	if err != nil {
		return fail(err)
	}
	if p.started, err = startTime(proc.Pid); err != nil {
		return fail(err)
	}
	stop, unwatch, err := os.Pipe()
	if err != nil {
		return fail(err)
	}
	p.unwatch = unwatch
	go func() {
		defer close(p.unwatched)
		defer func() { _ = stop.Close() }() // nothing was written
		_ = proc.WithHandle(func(pidfd uintptr) {
			fds := []unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}, {Fd: int32(stop.Fd()), Events: unix.POLLIN}}
			for {
				if _, err := unix.Poll(fds, -1); err != unix.EINTR {
					break
				}
			}
			if fds[0].Revents != 0 {
				close(p.ended)
			}
		})
	}()
	return p, nil
}

// release stops watching and leaves the process alone.
func (p *process) release() {
	_ = p.unwatch.Close() // nothing is left to write
	<-p.unwatched
	_ = p.Release() // it only closes the pidfd
}

// killGroup kills what is in the process group, unless its number belongs to
// another process by now. Groups of ours are killed before their leader is reaped,
// when that cannot be.
func (p *process) killGroup() {
	if now, err := startTime(p.Pid); err == nil && now != p.started {
		return
	}
	_ = unix.Kill(-p.Pid, unix.SIGKILL)
}

// reap finishes a process that has ended: the rest of its group dies, and its
// zombie goes if it was our child. It returns nil for one that was not: only its
// parent is told how it ended.
func (p *process) reap() *os.ProcessState {
	p.killGroup()
	state, err := p.Wait()
	p.release()
	if err != nil {
		return nil
	}
	return state
}

// ending is how a process ended, for people.
func ending(state *os.ProcessState) string {
	if state == nil {
		return "exit status unknown"
	}
	return state.String()
}

// startTime is when the process started, in clock ticks since boot.
func startTime(pid int) (uint64, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if errors.Is(err, unix.ESRCH) {
		err = os.ErrNotExist // it ended while we read
	}
	if err != nil {
		return 0, fmt.Errorf("read start time: %w", err)
	}
	// The second field is the program's name in brackets and may hold anything;
	// after it comes the third, and the start time is the 22nd.
	f := strings.Fields(string(b[bytes.LastIndexByte(b, ')')+1:]))
	if len(f) < 20 {
		return 0, fmt.Errorf("read start time: %q is too short", b)
	}
	return strconv.ParseUint(f[19], 10, 64)
}

// BootID identifies this boot of the machine or, in a container, which shares
// the kernel's boot ID with its host, this start of the container.
func BootID() (string, error) {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "", fmt.Errorf("read the boot ID: %w", err)
	}
	kernel := strings.TrimSpace(string(b))
	started, err := startTime(1)
	if err != nil {
		return kernel, nil // where /proc shows only our own processes
	}
	return fmt.Sprintf("%s-%d", kernel, started), nil
}
