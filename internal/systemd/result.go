package systemd

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"time"

	"github.com/godbus/dbus/v5"
)

// Result is how systemd ended what it was asked to do with a unit.
type Result string

// The results that systemd knows; more may come with newer versions. The empty
// one goes with an error.
const (
	Done       Result = "done"
	Failed     Result = "failed"     // see Detail for what failed
	Canceled   Result = "canceled"   // something else was asked for meanwhile
	Timeout    Result = "timeout"    // not within JobTimeoutSec
	Dependency Result = "dependency" // a unit that this one requires failed
	Skipped    Result = "skipped"    // does not apply to the unit's present state
	Asserted   Result = "assert"     // an Assert...= of the unit does not hold
)

// Start starts the unit and waits until systemd is done with it, which for
// Type=notify and oneshot is when the unit is ready. An error means that
// systemd refused (ErrNoUnit, or its words) or, wrapping ErrUnknown, that the
// connection or ctx ended after it was asked. ctx ending does not call it off.
func (c *Conn) Start(ctx context.Context, name string) (Result, error) {
	r, err := c.order(ctx, c.starts, manager+".StartUnit", name, "replace")
	if err != nil {
		return "", fmt.Errorf("start %s: %w", name, err)
	}
	return r, nil
}

// Stop stops the unit and waits until it has stopped, ExecStopPost= included.
// A unit that is not loaded is stopped: Done. Errors are those of Start.
func (c *Conn) Stop(ctx context.Context, name string) (Result, error) {
	r, err := c.order(ctx, c.stops, manager+".StopUnit", name, "replace")
	return stopped(name, r, err)
}

// stopped makes of the end of an order the end of Stop.
func stopped(name string, r Result, err error) (Result, error) {
	switch {
	case errors.Is(err, ErrNoUnit):
		return Done, nil
	case err != nil:
		return "", fmt.Errorf("stop %s: %w", name, err)
	}
	return r, nil
}

// StopAll stops units as Stop does, and returns what waits for each of them, which
// must be called, all at once. It asks for all that the crowd has room for before it listens to
// systemd again, which would clear up after the first before it hears of the last.
func (c *Conn) StopAll(ctx context.Context, names ...string) map[string]func(context.Context) (Result, error) {
	waits := make(map[string]func(context.Context) (Result, error), len(names))
	s := c.head.Load().session
	if s != nil {
		s.listening.Lock()
		defer s.listening.Unlock()
	}
	for _, name := range names {
		if s == nil || !c.stops.enterNow() {
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

// Restart stops the unit if it runs, then starts it. Result and errors are
// those of Start.
func (c *Conn) Restart(ctx context.Context, name string) (Result, error) {
	r, err := c.order(ctx, c.starts, manager+".RestartUnit", name, "replace")
	if err != nil {
		return "", fmt.Errorf("restart %s: %w", name, err)
	}
	return r, nil
}

// A crowd is how many jobs may wait at a time for systemd to begin with them.
// Once it has begun it is deaf, to us and to its timers, until it has forked for
// every job that can run: 500 starts at once delay a fence by 10 s and more.
// Stops do not wait for starts.
type crowd chan struct{}

const (
	startCrowd = 8
	stopCrowd  = 500 // takes systemd less time each; it kills all that it has begun to stop before it clears up after them
)

// enter waits for room. No crowd: at once.
func (c crowd) enter(ctx context.Context) error {
	if c == nil {
		return nil
	}
	select {
	case c <- struct{}{}:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (c crowd) enterNow() bool {
	select {
	case c <- struct{}{}:
		return true
	default:
		return false
	}
}

func (c crowd) leave() {
	if c != nil {
		<-c
	}
}

// slow is after what time a job that has not begun may be waiting for another
// one, which takes no time of systemd.
const slow = 200 * time.Millisecond

// order calls a method that answers with the path of a systemd job, and waits
// for that to end. Any number may wait at a time.
func (c *Conn) order(ctx context.Context, crowd crowd, method string, args ...any) (Result, error) {
	if err := crowd.enter(ctx); err != nil {
		return "", err
	}
	s, err := c.session(ctx)
	if err != nil {
		crowd.leave()
		return "", err
	}
	return s.wait(ctx, crowd, s.call(ctx, method, args...))
}

// wait waits for the end of the job that the call asked for. It leaves the crowd
// when systemd has begun with it.
func (s *session) wait(ctx context.Context, crowd crowd, call *dbus.Call) (Result, error) {
	j, err := s.accepted(ctx, call)
	if err == nil {
		s.begun(ctx, j)
	}
	crowd.leave()
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

// begun returns when systemd has begun with the job, or has nothing to do for
// it now.
func (s *session) begun(ctx context.Context, j *job) {
	wait := time.NewTimer(slow)
	defer wait.Stop()
	select {
	case <-j.begun:
	case <-j.ended:
	case <-s.bus.Context().Done():
	case <-ctx.Done():
	case <-wait.C:
		// Answered when systemd hears again. That it fails will show.
		s.object.CallWithContext(ctx, "org.freedesktop.DBus.Peer.Ping", 0)
	}
}

// A job is what systemd does because it was asked to.
type job struct {
	begun, ended chan struct{} // closed
	result       Result        // once ended is closed
	ours         bool
}

// call calls a method that answers with the path of a job.
func (s *session) call(ctx context.Context, method string, args ...any) *dbus.Call {
	s.mu.Lock()
	s.calls++
	s.mu.Unlock()
	return s.object.GoWithContext(ctx, method, 0, make(chan *dbus.Call, 1), args...)
}

// accepted returns the job that the call's answer names, complete with what was
// announced of it before the answer came.
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

// announced notes what systemd says of a job, if it is one of ours or may be.
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
