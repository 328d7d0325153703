package systemd

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"time"

	"github.com/godbus/dbus/v5"
	"golang.org/x/sync/semaphore"
)

// Result is how systemd ended what it was asked to do with a unit.
type Result string

// Some of systemd's results; the others are timeout, dependency and skipped, and
// newer versions may add more. The empty one goes with an error.
const (
	Done     Result = "done"
	Failed   Result = "failed"   // see Detail for what failed
	Canceled Result = "canceled" // another order for the unit took its place
	Asserted Result = "assert"   // an Assert...= of the unit does not hold
)

// Start starts the unit and waits until systemd is done with it, which for
// Type=notify and oneshot is when the unit is ready. An error means that
// systemd refused (ErrNoUnit, or its words) or, wrapping ErrUnknown, that the
// connection or ctx ended after it was asked. The end of ctx does not cancel the
// start.
//
// sent is called when the request is on its way: systemd gets later ones after it,
// and orders two units by After= if it is asked for the first one first.
func (c *Conn) Start(ctx context.Context, name string, sent ...func()) (Result, error) {
	r, err := c.order(ctx, c.starts, sent, manager+".StartUnit", name, "replace")
	if err != nil {
		return "", fmt.Errorf("start %s: %w", name, err)
	}
	return r, nil
}

// Stop stops the unit and waits until it has stopped, ExecStopPost= included.
// A unit that is not loaded is stopped: Done. Errors are those of Start.
func (c *Conn) Stop(ctx context.Context, name string) (Result, error) {
	r, err := c.order(ctx, c.stops, nil, manager+".StopUnit", name, "replace")
	return stopped(name, r, err)
}

// stopped turns the outcome of a StopUnit call into that of Stop.
func stopped(name string, r Result, err error) (Result, error) {
	switch {
	case errors.Is(err, ErrNoUnit):
		return Done, nil
	case err != nil:
		return "", fmt.Errorf("stop %s: %w", name, err)
	}
	return r, nil
}

// StopAll queues the stops of all units and returns one wait function per unit,
// with the results of Stop; call them all, concurrently. Signals are not handled
// until the calls that stopLimit has room for are sent: handling those of the
// first units delayed the call for the last of 500 by up to 3 s.
func (c *Conn) StopAll(ctx context.Context, names ...string) map[string]func(context.Context) (Result, error) {
	waits := make(map[string]func(context.Context) (Result, error), len(names))
	s := c.head.Load().session
	if s != nil {
		s.handling.Lock()
		defer s.handling.Unlock()
	}
	for _, name := range names {
		if s == nil || !c.stops.TryAcquire(1) {
			waits[name] = func(ctx context.Context) (Result, error) { return c.Stop(ctx, name) }
			continue
		}
		call := s.call(ctx, manager+".StopUnit", name, "replace")
		waits[name] = func(ctx context.Context) (Result, error) {
			r, err := s.wait(ctx, c.stops, call)
			return stopped(name, r, err)
		}
	}
	return waits
}

// Restart stops the unit if it runs, then starts it. Result, errors and sent are
// those of Start.
func (c *Conn) Restart(ctx context.Context, name string, sent ...func()) (Result, error) {
	r, err := c.order(ctx, c.starts, sent, manager+".RestartUnit", name, "replace")
	if err != nil {
		return "", fmt.Errorf("restart %s: %w", name, err)
	}
	return r, nil
}

// How many starts, and how many stops, may be queued in systemd without having
// begun. While systemd begins with a batch of jobs it handles no D-Bus calls and
// no timers: 500 starts at once delayed a fence by 10 s, since it forks for each.
// A stop takes it less time. It sends the signals for the whole batch before it
// cleans up after the first unit, so that large batches of stops end sooner.
const (
	startLimit = 8
	stopLimit  = 500
)

// beginLimit is how long a job holds its place in the limit: one that has not
// begun by then may be waiting for another job, which takes no time of systemd.
const beginLimit = 200 * time.Millisecond

// order calls a method that answers with the path of a systemd job, and waits
// for the end of that job.
func (c *Conn) order(ctx context.Context, limit *semaphore.Weighted, sent []func(), method string, args ...any) (Result, error) {
	if err := limit.Acquire(ctx, 1); err != nil {
		return "", err
	}
	s, err := c.session(ctx)
	if err != nil {
		limit.Release(1)
		return "", err
	}
	call := s.call(ctx, method, args...)
	for _, tell := range sent {
		tell()
	}
	return s.wait(ctx, limit, call)
}

// wait waits for the end of the job that the call asked for. When systemd has
// begun with the job it gives back the job's place in the limit.
func (s *session) wait(ctx context.Context, limit *semaphore.Weighted, call *dbus.Call) (Result, error) {
	j, err := s.accepted(ctx, call)
	if err == nil {
		s.begun(ctx, j)
	}
	limit.Release(1)
	if err != nil {
		return "", err
	}
	select {
	case <-j.ended:
		return j.result, nil
	case <-s.bus.Context().Done():
		return "", fmt.Errorf("%w: the connection to systemd was lost", ErrUnknown)
	case <-ctx.Done():
		return "", fmt.Errorf("%w: %w", ErrUnknown, ctx.Err())
	}
}

// begun returns when systemd has begun with the job, or cannot begin with it now.
func (s *session) begun(ctx context.Context, j *job) {
	wait := time.NewTimer(beginLimit)
	defer wait.Stop()
	select {
	case <-j.begun:
	case <-j.ended:
	case <-s.bus.Context().Done():
	case <-ctx.Done():
	case <-wait.C:
		// It is answered when systemd handles calls again. If it fails because the
		// connection is lost, the wait for the job's end says so.
		s.object.CallWithContext(ctx, "org.freedesktop.DBus.Peer.Ping", 0)
	}
}

// A job of systemd.
type job struct {
	begun, ended chan struct{} // closed when it has
	result       Result        // valid once ended is closed
	ours         bool          // a call of ours was answered with it
}

// call calls a method that answers with the path of a job.
func (s *session) call(ctx context.Context, method string, args ...any) *dbus.Call {
	s.mu.Lock()
	s.calls++
	s.mu.Unlock()
	return s.object.GoWithContext(ctx, method, 0, make(chan *dbus.Call, 1), args...)
}

// accepted returns the job that the call's answer names. Signals about it may
// have been handled before the answer.
func (s *session) accepted(ctx context.Context, call *dbus.Call) (*job, error) {
	var path dbus.ObjectPath
	err := (<-call.Done).Err
	switch {
	case err == nil:
		err = call.Store(&path)
	case refused(err):
		err = explain(err)
	case ctx.Err() != nil:
		err = fmt.Errorf("%w: %w", ErrUnknown, ctx.Err())
	default:
		err = fmt.Errorf("%w: %w", ErrUnknown, err)
	}

	s.mu.Lock()
	defer s.mu.Unlock()
	var j *job
	if err == nil {
		j = s.job(path)
		j.ours = true
	}
	if s.calls--; s.calls == 0 {
		maps.DeleteFunc(s.jobs, func(_ dbus.ObjectPath, j *job) bool { return !j.ours || isClosed(j.ended) })
	}
	return j, err
}

// job returns the job with that path; s.mu must be held.
func (s *session) job(path dbus.ObjectPath) *job {
	j := s.jobs[path]
	if j == nil {
		j = &job{begun: make(chan struct{}), ended: make(chan struct{})}
		s.jobs[path] = j
	}
	return j
}

// announced notes a signal about a job that is ours, or may be because a call is
// not answered yet.
func (s *session) announced(path dbus.ObjectPath, ended bool, r Result) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.jobs[path] == nil && s.calls == 0 {
		return
	}
	j := s.job(path)
	if !ended {
		if !isClosed(j.begun) {
			close(j.begun)
		}
		return
	}
	if !isClosed(j.ended) {
		j.result = r
		close(j.ended)
	}
	if s.calls == 0 {
		delete(s.jobs, path)
	}
}

func isClosed(ch <-chan struct{}) bool {
	select {
	case <-ch:
		return true
	default:
		return false
	}
}
