package harness

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// Usage is what processes have used.
type Usage struct {
	CPU  time.Duration // user and system since they started
	RSS  float64       // resident now, MiB
	Peak float64       // most that was ever resident, MiB
}

func (u Usage) plus(o Usage) Usage { return Usage{u.CPU + o.CPU, u.RSS + o.RSS, u.Peak + o.Peak} }

// clockTick is the unit of CPU times in /proc (USER_HZ, 100 on Linux).
const clockTick = 10 * time.Millisecond

// ProcessUsage returns the usage of one process; with children also that of its
// children, those that have ended included.
func ProcessUsage(pid int, children bool) (Usage, error) {
	u, err := usageOf(pid, children)
	if err != nil || !children {
		return u, err
	}
	tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid))
	if err != nil {
		return u, err
	}
	for _, path := range tasks {
		raw, err := os.ReadFile(path)
		if err != nil {
			return u, err
		}
		for word := range strings.FieldsSeq(string(raw)) {
			child, err := strconv.Atoi(word)
			if err != nil {
				return u, err
			}
			cu, err := usageOf(child, false)
			if errors.Is(err, os.ErrNotExist) {
				continue // ended meanwhile
			}
			if err != nil {
				return u, err
			}
			u = u.plus(cu)
		}
	}
	return u, nil
}

func usageOf(pid int, ended bool) (Usage, error) {
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return Usage{}, err
	}
	stat := string(raw)
	words := strings.Fields(stat[strings.LastIndexByte(stat, ')')+1:])
	if len(words) < 15 {
		return Usage{}, fmt.Errorf("process %d: %q is not understood", pid, stat)
	}
	counted := words[11:13] // utime stime
	if ended {
		counted = words[11:15] // and those of children that have ended
	}
	var u Usage
	for _, w := range counted {
		ticks, err := strconv.ParseInt(w, 10, 64)
		if err != nil {
			return Usage{}, fmt.Errorf("process %d: %w", pid, err)
		}
		u.CPU += time.Duration(ticks) * clockTick
	}
	status := fmt.Sprintf("/proc/%d/status", pid)
	u.RSS, u.Peak = mebibytes(field(status, "VmRSS")), mebibytes(field(status, "VmHWM"))
	return u, nil
}

func mebibytes(kb string) float64 {
	n, err := strconv.ParseFloat(strings.TrimSuffix(kb, " kB"), 64)
	if err != nil {
		return 0 // a process that is ending has no such line
	}
	return n / 1024
}

// pidFile returns the process id that a file holds.
func pidFile(path string) (int, error) {
	raw, err := os.ReadFile(path)
	if err != nil {
		return 0, err
	}
	word, _, _ := strings.Cut(strings.Join(strings.Fields(string(raw)), " "), " ")
	return strconv.Atoi(word)
}

// Process is a child of the benchmark.
type Process struct {
	Pid int

	cmd   *exec.Cmd
	ended chan struct{} // closed when it has ended
	err   error         // set before ended is closed
}

// Start starts a program whose output is appended to the file log.
func Start(log, program string, args ...string) (*Process, error) {
	f, err := os.OpenFile(log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return nil, err
	}
	cmd := exec.Command(program, args...)
	cmd.Stdout, cmd.Stderr = f, f
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // Ctrl-C is for the benchmark, which stops it in order
	if err := errors.Join(cmd.Start(), f.Close()); err != nil {
		return nil, fmt.Errorf("start %s: %w", program, err)
	}
	p := &Process{Pid: cmd.Process.Pid, cmd: cmd, ended: make(chan struct{})}
	go func() {
		p.err = cmd.Wait()
		close(p.ended)
	}()
	return p, nil
}

// While returns a context that ends with the process.
func (p *Process) While(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancelCause(ctx)
	go func() {
		select {
		case <-p.ended:
			cancel(fmt.Errorf("process %d ended: %v", p.Pid, p.err))
		case <-ctx.Done():
		}
	}()
	return ctx, func() { cancel(nil) }
}

// Stop asks the process to end and returns when it has.
func (p *Process) Stop() error {
	if err := p.cmd.Process.Signal(syscall.SIGTERM); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	select {
	case <-p.ended:
		return nil
	case <-time.After(30 * time.Second):
		err := p.cmd.Process.Kill()
		<-p.ended
		return errors.Join(fmt.Errorf("process %d did not stop in 30 s and was killed", p.Pid), err)
	}
}
