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
	"time"

	"golang.org/x/sys/unix"
)

// process is one live process, our own child or an adopted one, held by its
// pidfd so that no signal of ours can reach a stranger with the same number.
type process struct {
	pid      int
	started  uint64   // clock ticks since boot; with pid, unique until the next boot
	pidfd    *os.File // readable when the process has ended
	logStart int64    // size of the log file when it started; 0 for an adopted one
	unsaved  bool     // its pid file could not be written yet

	ended    chan struct{} // closed when the process has ended
	released chan struct{} // closed when the goroutine that watches pidfd has returned
}

// exit is how a process ended; known is false for one that was not our child.
type exit struct {
	status syscall.WaitStatus
	known  bool
}

func (e exit) String() string {
	switch {
	case !e.known:
		return "exit status unknown"
	case e.status.Signaled():
		return "signal: " + e.status.Signal().String()
	}
	return "exit status " + strconv.Itoa(e.status.ExitStatus())
}

// spawn starts cfg.Argv in a session of its own, with its output going to out.
func spawn(cfg Config, out *os.File) (*process, error) {
	path, err := exec.LookPath(cfg.Argv[0])
	if err == nil {
		path, err = filepath.Abs(path) // Dir must not change what it means
	}
	if err != nil {
		return nil, fmt.Errorf("start: %w", err)
	}
	null, err := os.Open(os.DevNull)
	if err != nil {
		return nil, fmt.Errorf("start: %w", err)
	}
	defer func() { _ = null.Close() }()
	proc, err := os.StartProcess(path, cfg.Argv, &os.ProcAttr{
		Dir:   cfg.Dir,
		Env:   cfg.Env,
		Files: []*os.File{null, out, out},
		Sys:   &syscall.SysProcAttr{Setsid: true},
	})
	if err != nil {
		return nil, fmt.Errorf("start: %w", err)
	}
	// Nobody has waited for it, so the number is still its own.
	p, err := hold(proc.Pid)
	if err != nil {
		_ = proc.Kill()
		_, _ = proc.Wait()
		return nil, err
	}
	_ = proc.Release() // from here on the pidfd stands for it
	return p, nil
}

// adopt returns the live process that the pid file names, nil if there is none.
func adopt(pidFile string) (*process, error) {
	pid, started, err := readPidFile(pidFile)
	if err != nil || pid == 0 {
		return nil, err
	}
	p, err := hold(pid)
	if errors.Is(err, unix.ESRCH) || errors.Is(err, os.ErrNotExist) {
		return nil, nil // it is gone
	}
	if err != nil {
		return nil, err
	}
	if p.started != started {
		p.release() // a stranger got the number
		return nil, nil
	}
	return p, nil
}

// hold finds the process and watches it until it has ended or release is called.
func hold(pid int) (*process, error) {
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return nil, fmt.Errorf("open process %d: %w", pid, err)
	}
	// Non-blocking, so that the run-time's poller waits and no thread does.
	if err := unix.SetNonblock(fd, true); err != nil {
		return nil, errors.Join(fmt.Errorf("watch process %d: %w", pid, err), unix.Close(fd))
	}
	p := &process{
		pid: pid, pidfd: os.NewFile(uintptr(fd), "pidfd"),
		ended: make(chan struct{}), released: make(chan struct{}),
	}
	conn, err := p.pidfd.SyscallConn()
	if err == nil {
		err = p.pidfd.SetReadDeadline(time.Time{}) // refused where the poller cannot watch it
	}
	if err == nil {
		p.started, err = startTime(pid) // after the pidfd: it is that process's or none
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("watch process %d: %w", pid, err), p.pidfd.Close())
	}
	go func() {
		defer close(p.released)
		if conn.Read(func(fd uintptr) bool { return readable(int(fd)) }) == nil {
			close(p.ended)
		}
	}()
	return p, nil
}

func readable(fd int) bool {
	fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	for {
		n, err := unix.Poll(fds, 0)
		if err != unix.EINTR {
			return err == nil && n > 0
		}
	}
}

// release stops watching and leaves the process alone.
func (p *process) release() {
	_ = p.pidfd.SetReadDeadline(time.Unix(1, 0))
	<-p.released
	_ = p.pidfd.Close()
}

// control runs f on the pidfd without taking it from the poller, as Fd would.
func (p *process) control(f func(fd int) error) error {
	conn, err := p.pidfd.SyscallConn()
	if err != nil {
		return err
	}
	if cerr := conn.Control(func(fd uintptr) { err = f(int(fd)) }); cerr != nil {
		return cerr
	}
	return err
}

// signal sends sig to the process alone; one that has ended does not mind.
func (p *process) signal(sig syscall.Signal) {
	_ = p.control(func(fd int) error { return unix.PidfdSendSignal(fd, sig, nil, 0) })
}

// kill ends the process and its group.
func (p *process) kill() {
	p.signal(syscall.SIGKILL)
	p.killGroup()
}

// killGroup kills what is in the process group, unless its number belongs to a
// stranger by now. Groups of ours are killed before their leader is reaped, when
// that cannot be.
func (p *process) killGroup() {
	if now, err := startTime(p.pid); err == nil && now != p.started {
		return
	}
	_ = unix.Kill(-p.pid, unix.SIGKILL)
}

// reap finishes a process that has ended: the rest of its group dies, its
// zombie goes if it was our child.
func (p *process) reap() exit {
	p.killGroup()
	var e exit
	// The pidfd tells whether it is our child, and still ours to wait for.
	err := p.control(func(fd int) error {
		return unix.Waitid(unix.P_PIDFD, fd, nil, unix.WEXITED|unix.WNOHANG|unix.WNOWAIT, nil)
	})
	if err == nil {
		pid, err := syscall.Wait4(p.pid, &e.status, 0, nil)
		for err == syscall.EINTR {
			pid, err = syscall.Wait4(p.pid, &e.status, 0, nil)
		}
		e.known = err == nil && pid == p.pid
	}
	p.release()
	return e
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
	// behind it comes the third, and the start time is the 22nd.
	f := strings.Fields(string(b[bytes.LastIndexByte(b, ')')+1:]))
	if len(f) < 20 {
		return 0, fmt.Errorf("read start time: %q is too short", b)
	}
	return strconv.ParseUint(f[19], 10, 64)
}
