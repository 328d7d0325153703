// Package systemd is the edge to the systemd of this machine: units linked,
// started, stopped and listed over D-Bus, their changes by signals, their
// journal by journalctl, and a fence that PID 1 keeps for us. It knows no
// placement, no etcd, and not what is in a unit file.
//
// It speaks to PID 1 directly, on the socket that systemctl uses as root, so
// that dbus-daemon may be restarted or missing.
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
)

const (
	address   = "unix:path=/run/systemd/private" // root only
	booted    = "/run/systemd/system"            // a directory where systemd is the init system
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

// Present reports whether systemd is the init system of this machine.
func Present() bool {
	info, err := os.Stat(booted)
	return err == nil && info.IsDir()
}

// Conn is a connection to PID 1. It is made anew when systemd re-executes
// itself. All methods may be called at the same time; those that take a
// context wait for the connection, and end only with an answer, with the
// context, or with Run.
type Conn struct {
	log     *slog.Logger
	head    atomic.Pointer[link]
	changes changes
	starts  crowd
	stops   crowd
}

// A link is the present session, or nil with the reason why there is none.
type link struct {
	session  *session
	err      error
	replaced chan struct{} // closed when a newer link is in place
}

// New returns a connection that Run will make. The logger must not be nil.
func New(log *slog.Logger) *Conn {
	c := &Conn{log: log, starts: make(crowd, startCrowd), stops: make(crowd, stopCrowd)}
	c.changes.wake = make(chan struct{}, 1)
	c.head.Store(&link{err: errors.New("not connected yet"), replaced: make(chan struct{})})
	return c
}

func (c *Conn) set(s *session, err error) {
	old := c.head.Swap(&link{session: s, err: err, replaced: make(chan struct{})})
	close(old.replaced)
}

// Run connects and connects again until ctx ends, whose error it returns. An
// unreachable systemd is logged once and tried again. Run must be called once;
// what was called on c ends with it.
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
		if !complained && wait > 10*redialMin { // not worth a line when systemd re-executes itself
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

	listening sync.RWMutex // locked: what systemd announces waits

	mu    sync.Mutex               // guards what follows
	calls int                      // that will be answered with the path of a job
	jobs  map[dbus.ObjectPath]*job // that somebody waits for, or may once such a call is answered
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

// ask calls a method of the object at path and stores its answer; without a
// place for it the answer does not matter. The method must be one that does no harm when it is called twice: it is, when the
// connection is lost before the answer.
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
		if !s.lost() { // neither systemd's word nor the connection's end
			return call.Err
		}
	}
}

// refused reports whether err is systemd's own answer.
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

// An answer is a refusal in systemd's words.
type answer struct{ name, text string }

func (a *answer) Error() string { return a.text }

func (a *answer) Is(target error) bool {
	return target == ErrNoUnit && (a.name == busName+".NoSuchUnit" || a.name == busName+".NoSuchUnitFile" ||
		a.name == "org.freedesktop.DBus.Error.FileNotFound")
}
