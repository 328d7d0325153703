// Package child keeps one process running where no init system does: it starts
// it, starts it again when it ends, and stops it when asked. The process
// outlives a supervisor that dies; the next supervisor adopts it. The package
// knows processes, signals and log files; it must not know what the processes
// are or when they are ready.
package child

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"syscall"
	"time"

	"flotilla/internal/durable"
)

// ErrLeave as the cause of the end of Run's context makes Run return with the
// child still running, for a later Run to adopt.
var ErrLeave = errors.New("leave the child running")

// ErrGiveUp is wrapped by Run's error when Config.GiveUp called an exit final.
var ErrGiveUp = errors.New("not started again")

const (
	backoffMin = 100 * time.Millisecond
	backoffMax = 5 * time.Second
	goodLife   = 10 * time.Second // a child that lived this long starts again without penalty
	logLimit   = 10 << 20         // bytes; a longer log is rotated at the next start
)

// Config describes the child. Name, Argv and PidFile are required.
type Config struct {
	Name string   // in log lines and errors
	Argv []string // program and arguments; the program is looked up in PATH
	Env  []string // nil: ours
	Dir  string   // working directory; empty: ours

	// LogFile gets the child's output appended, directly and not through us,
	// so the child never blocks on a dead supervisor. At a start it is renamed
	// to LogFile.1 when it is over 10 MiB. Empty: the output is dropped.
	LogFile string

	// PidFile names the running child across supervisors. Beside it,
	// PidFile.lock keeps a second supervisor out.
	PidFile string

	// StopTimeout is how long after SIGTERM the process group gets SIGKILL;
	// default 10 s.
	StopTimeout time.Duration

	Logger *slog.Logger // nil: silent

	// GiveUp says whether an exit code means that starting again is useless.
	// It is not asked about a child that a signal ended, nor about one of an
	// earlier supervisor, whose exit code is unknown. nil: never.
	GiveUp func(exit int) bool
}

// Run keeps the child running until ctx ends, then stops it and returns nil;
// with the cause ErrLeave it leaves it running. A child that an earlier Run left
// or lost is adopted as it is, even if cfg would start it differently now.
//
// The child leads a session of its own. When it ends, what is left of its
// process group is killed, and it is started again after 0.1 s, doubling to 5 s
// for children that live less than 10 s.
//
// Errors: another supervisor holds the lock, files cannot be written, the very
// first start is impossible, or ErrGiveUp with the end of the child's log.
func Run(ctx context.Context, cfg Config) error {
	if cfg.Name == "" || len(cfg.Argv) == 0 || cfg.PidFile == "" {
		return fmt.Errorf("run child %q: name, argv and pid file are required", cfg.Name)
	}
	if cfg.StopTimeout == 0 {
		cfg.StopTimeout = 10 * time.Second
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	cfg.Logger = cfg.Logger.With("process", cfg.Name)
	if err := run(ctx, cfg); err != nil {
		return fmt.Errorf("run %s: %w", cfg.Name, err)
	}
	return nil
}

func run(ctx context.Context, cfg Config) error {
	lock, err := lockFile(cfg.PidFile + ".lock")
	if err != nil {
		return err
	}
	defer func() { _ = lock.Close() }()

	p, err := adopt(cfg.PidFile)
	if err != nil {
		return err
	}
	if p != nil {
		cfg.Logger.Info("adopted", "pid", p.Pid)
	} else if p, err = start(cfg); err != nil {
		return err
	}
	for delay := time.Duration(0); ; {
		began := time.Now()
		savePid(ctx, p, cfg)
		select {
		case <-p.ended:
		case <-ctx.Done():
			if errors.Is(context.Cause(ctx), ErrLeave) {
				cfg.Logger.Info("left running", "pid", p.Pid)
				p.release()
				return nil
			}
			stop(p, cfg)
			return durable.Remove(cfg.PidFile)
		}
		end := p.reap()
		tail := logTail(cfg.LogFile, p.logStart)
		if end != nil && end.Exited() && cfg.GiveUp != nil && cfg.GiveUp(end.ExitCode()) {
			return errors.Join(fmt.Errorf("%s, %w; its log ends: %s", end, ErrGiveUp, tail), durable.Remove(cfg.PidFile))
		}
		took := time.Since(began)
		delay = backoff(delay, took)
		cfg.Logger.Warn("ended", "pid", p.Pid, "reason", ending(end), "took", took, "again_in", delay, "log", tail)
		if p, err = restart(ctx, cfg, &delay); err != nil || p == nil {
			return err
		}
	}
}

// restart waits *delay and starts the child, for as long as that is refused. It
// returns nil when ctx ends first.
func restart(ctx context.Context, cfg Config, delay *time.Duration) (*process, error) {
	for {
		select {
		case <-time.After(*delay):
		case <-ctx.Done():
			return nil, durable.Remove(cfg.PidFile)
		}
		p, err := start(cfg)
		if err == nil {
			return p, nil
		}
		*delay = backoff(*delay, 0)
		cfg.Logger.Warn("not started", "err", err, "again_in", *delay)
	}
}

// backoff is the pause before the next start, after a pause of last and a life of took.
func backoff(last, took time.Duration) time.Duration {
	if last == 0 || took >= goodLife {
		return backoffMin
	}
	return min(2*last, backoffMax)
}

// start starts the child and writes its pid file.
//
// BUG(child): a supervisor that is killed between the two leaves a child that no
// later one adopts.
func start(cfg Config) (*process, error) {
	out, size, err := openLog(cfg.LogFile)
	if err != nil {
		return nil, err
	}
	defer func() { _ = out.Close() }() // the child has its own
	p, err := spawn(cfg, out)
	if err != nil {
		return nil, err
	}
	p.logStart = size
	// On a full disk the child matters more than its pid file.
	if err := writePidFile(cfg.PidFile, p); err != nil {
		p.unsaved = true
		cfg.Logger.Error("the pid file cannot be written: until it can, a later supervisor would not adopt the child", "pid", p.Pid, "err", err)
	}
	cfg.Logger.Info("started", "pid", p.Pid)
	return p, nil
}

// savePid tries to write a pid file that could not be written until it is, or
// the child or ctx ends.
func savePid(ctx context.Context, p *process, cfg Config) {
	for p.unsaved {
		select {
		case <-p.ended:
			return
		case <-ctx.Done():
			return
		case <-time.After(time.Second):
			p.unsaved = writePidFile(cfg.PidFile, p) != nil
		}
	}
}

// stop ends the child: SIGTERM, then SIGKILL.
func stop(p *process, cfg Config) {
	began := time.Now()
	how := syscall.SIGTERM
	_ = p.Signal(how) // it may have ended
	select {
	case <-p.ended:
	case <-time.After(cfg.StopTimeout):
		how = syscall.SIGKILL
		_ = p.Kill() // as above
		p.killGroup()
		<-p.ended
	}
	end := p.reap()
	cfg.Logger.Info("stopped", "pid", p.Pid, "reason", ending(end), "signal", how.String(), "took", time.Since(began))
}
