// Package systemd is the edge to the systemd of this machine: units linked,
// started, stopped and listed over D-Bus, their changes by signals, their
// journal by journalctl, and a fence that PID 1 keeps for us. It knows no
// placement, no etcd, and not what is in a unit file.
//
// It speaks to PID 1 directly, on the socket that systemctl uses as root, so
// that dbus-daemon may be restarted or missing. Of go-systemd it uses only types:
// go-systemd's connection is not made anew when it is lost and leaves who waits for
// a job waiting then, does not say when a job begins, and drops changes that are
// not read in time.
package systemd

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/godbus/dbus/v5"
	"golang.org/x/sync/semaphore"
)

const (
	address   = "unix:path=/run/systemd/private" // root only
	busName   = "org.freedesktop.systemd1"
	manager   = busName + ".Manager"
	jobRoot   = "/org/freedesktop/systemd1/job/"
	unitRoot  = "/org/freedesktop/systemd1/unit/"
	rootPath  = "/org/freedesktop/systemd1"
	redialMin = 20 * time.Millisecond
	redialMax = 2 * time.Second
)

var (
	// ErrUnknown is wrapped by the error of a call that systemd may or may not
	// have carried out: read the unit's status before trying again.
	ErrUnknown = errors.New("the outcome is unknown")

	// ErrNoUnit is wrapped when systemd finds no such unit.
	ErrNoUnit = errors.New("no such unit")

	errStopped = errors.New("the connection to systemd was ended")
)

// Conn is a connection to PID 1, which Run keeps: it is lost whenever systemd
// re-executes itself. All methods may be called at the same time. Those that take
// a context wait for the connection, and return when systemd answers, when the
// context ends, or when Run does.
type Conn struct {
	log     *slog.Logger
	head    atomic.Pointer[link]
	changes changes
	starts  *semaphore.Weighted
	stops   *semaphore.Weighted
}

// A link is the current session, or nil with the reason why there is none.
type link struct {
	session  *session
	err      error
	replaced chan struct{} // closed when a newer link is in place
}

// New returns a Conn without a connection: call Run. The logger must not be nil.
func New(log *slog.Logger) *Conn {
	c := &Conn{log: log, starts: semaphore.NewWeighted(startLimit), stops: semaphore.NewWeighted(stopLimit)}
	c.changes.wake = make(chan struct{}, 1)
	c.head.Store(&link{err: errors.New("not connected yet"), replaced: make(chan struct{})})
	return c
}

func (c *Conn) set(s *session, err error) {
	old := c.head.Swap(&link{session: s, err: err, replaced: make(chan struct{})})
	close(old.replaced)
}

// Run connects, and again after each loss, until ctx ends, whose error it returns.
// That systemd is unreachable is logged once. Run must be called once; all other
// calls on c end with it.
func (c *Conn) Run(ctx context.Context) error {
	defer c.set(nil, errStopped)
	wait, complained := redialMin, false
	for {
		s, err := c.dial(ctx)
		if err == nil {
			if complained {
				c.log.Info("systemd is reachable again")
			}
			wait, complained = redialMin, false
			c.set(s, nil)
			c.changes.all() // what happened meanwhile was not signalled
			<-s.bus.Context().Done()
			err = errors.New("the connection was closed")
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		c.set(nil, err)
		if !complained && wait > 10*redialMin { // a re-execution of systemd takes less, and is not logged
			complained = true
			c.log.Warn("systemd is not reachable", "err", err)
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(wait):
		}
		wait = min(2*wait, redialMax)
	}
}

// A session is one connection, from its dial to its loss.
type session struct {
	bus     *dbus.Conn
	object  dbus.BusObject
	changes *changes

	handling sync.RWMutex // locked while signals must wait: see StopAll

	mu    sync.Mutex               // guards what follows
	calls int                      // not answered yet, of those whose answer is the path of a job
	jobs  map[dbus.ObjectPath]*job // ours and, while calls > 0, all others that signals were about
}

func (c *Conn) dial(ctx context.Context) (*session, error) {
	s := &session{changes: &c.changes, jobs: make(map[dbus.ObjectPath]*job)}
	bus, err := dbus.Dial(address, dbus.WithContext(ctx), dbus.WithSignalHandler(s))
	if err != nil {
		return nil, err
	}
	// No Hello and no Subscribe: PID 1 sends every signal to its direct peers.
	if err := bus.Auth([]dbus.Auth{dbus.AuthExternal(strconv.Itoa(os.Getuid()))}); err != nil {
		return nil, errors.Join(err, bus.Close())
	}
	s.bus, s.object = bus, bus.Object(busName, rootPath)
	return s, nil
}

func (s *session) lost() bool { return s.bus.Context().Err() != nil }

// session waits for a session that is alive.
func (c *Conn) session(ctx context.Context) (*session, error) {
	for {
		l := c.head.Load()
		if l.session != nil && !l.session.lost() {
			return l.session, ctx.Err()
		}
		if errors.Is(l.err, errStopped) {
			return nil, errStopped
		}
		select {
		case <-l.replaced:
		case <-ctx.Done():
			if l.err != nil {
				return nil, fmt.Errorf("%w: no connection to systemd: %w", ctx.Err(), l.err)
			}
			return nil, ctx.Err()
		}
	}
}

// ask calls a method of the object at path and stores its answer in answer, if
// given. The method must be idempotent: it is called again if the connection is
// lost before the answer.
func (c *Conn) ask(ctx context.Context, path dbus.ObjectPath, method string, args []any, answer ...any) error {
	for {
		s, err := c.session(ctx)
		if err != nil {
			return err
		}
		call := s.bus.Object(busName, path).CallWithContext(ctx, method, 0, args...)
		switch {
		case call.Err == nil && len(answer) == 0:
			return nil
		case call.Err == nil:
			return call.Store(answer...)
		case refused(call.Err):
			return explain(call.Err)
		case ctx.Err() != nil:
			return ctx.Err()
		}
		if !s.lost() { // such as an argument that cannot be encoded
			return call.Err
		}
	}
}

// refused reports whether err is an answer of systemd, and not a lost connection.
func refused(err error) bool {
	var said dbus.Error
	return errors.As(err, &said)
}

// explain turns systemd's answer into an error of this package.
func explain(err error) error {
	var said dbus.Error
	if !errors.As(err, &said) {
		return err
	}
	return &answer{name: said.Name, text: strings.TrimRight(said.Error(), ".")}
}

// An answer is an error that systemd answered with, in its words.
type answer struct{ name, text string }

func (a *answer) Error() string { return a.text }

func (a *answer) Is(target error) bool {
	return target == ErrNoUnit && (a.name == busName+".NoSuchUnit" || a.name == busName+".NoSuchUnitFile" ||
		a.name == "org.freedesktop.DBus.Error.FileNotFound")
}
