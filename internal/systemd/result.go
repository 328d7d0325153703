package systemd

import (
	"context"
	"errors"
	"fmt"
	"maps"

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
	return c.order(ctx, "start", name, manager+".StartUnit", name, "replace")
}

// Stop stops the unit and waits until it has stopped, ExecStopPost= included.
// A unit that is not loaded is stopped: Done. Errors are those of Start.
func (c *Conn) Stop(ctx context.Context, name string) (Result, error) {
	r, err := c.order(ctx, "stop", name, manager+".StopUnit", name, "replace")
	if errors.Is(err, ErrNoUnit) {
		return Done, nil
	}
	return r, err
}

// Restart stops the unit if it runs, then starts it. Result and errors are
// those of Start.
func (c *Conn) Restart(ctx context.Context, name string) (Result, error) {
	return c.order(ctx, "restart", name, manager+".RestartUnit", name, "replace")
}

// order calls a method that answers with the path of a systemd job, and waits
// for that to end. Any number may wait at a time.
func (c *Conn) order(ctx context.Context, verb, name, method string, args ...any) (Result, error) {
	s, err := c.session(ctx)
	if err != nil {
		return "", fmt.Errorf("%s %s: %w", verb, name, err)
	}
	ended, err := s.enqueue(ctx, method, args...)
	if err == nil {
		select {
		case r := <-ended:
			return r, nil
		case <-s.bus.Context().Done():
			err = fmt.Errorf("%w: the connection to systemd was lost", ErrUnknown)
		case <-ctx.Done():
			err = fmt.Errorf("%w: %w", ErrUnknown, ctx.Err())
		}
	}
	return "", fmt.Errorf("%s %s: %w", verb, name, err)
}

// enqueue returns a channel that will receive the result, also when that is
// announced before the answer to the call.
func (s *session) enqueue(ctx context.Context, method string, args ...any) (<-chan Result, error) {
	s.mu.Lock()
	s.calls++
	s.mu.Unlock()

	var path dbus.ObjectPath
	call := s.object.CallWithContext(ctx, method, 0, args...)
	err := call.Err
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
	ended := make(chan Result, 1)
	if err == nil {
		if r, ok := s.early[path]; ok {
			ended <- r
		} else {
			s.waiting[path] = append(s.waiting[path], ended)
		}
	}
	if s.calls--; s.calls == 0 {
		maps.DeleteFunc(s.early, func(dbus.ObjectPath, Result) bool { return true })
	}
	return ended, err
}

func (s *session) ended(path dbus.ObjectPath, r Result) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, ch := range s.waiting[path] {
		ch <- r
	}
	delete(s.waiting, path)
	if s.calls > 0 {
		s.early[path] = r
	}
}
