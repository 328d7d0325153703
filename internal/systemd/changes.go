package systemd

import (
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/godbus/dbus/v5"
)

// settle is how long changes are collected before they are announced: a unit
// that starts makes about ten signals within a few milliseconds.
const settle = 20 * time.Millisecond

// Change says which units may have changed since the last Change.
type Change struct {
	All   bool     // any unit: systemd was connected to, re-executed or reloaded
	Units []string // sorted; not only units that this program linked
}

// changes collects names until somebody takes them.
type changes struct {
	mu        sync.Mutex // guards what follows
	every     bool
	names     map[string]struct{}
	scheduled bool // a wake will be sent

	wake chan struct{} // room for one
}

func (c *changes) all()             { c.add("", true) }
func (c *changes) unit(name string) { c.add(name, false) }

func (c *changes) add(name string, every bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if every {
		c.every = true
	} else {
		if c.names == nil {
			c.names = make(map[string]struct{})
		}
		c.names[name] = struct{}{}
	}
	if c.scheduled {
		return
	}
	c.scheduled = true
	time.AfterFunc(settle, func() {
		c.mu.Lock()
		c.scheduled = false
		c.mu.Unlock()
		select {
		case c.wake <- struct{}{}:
		default: // not received yet
		}
	})
}

// Changed receives a value when Take has something new, 20 ms after the first
// of the changes. It is for one reader.
func (c *Conn) Changed() <-chan struct{} { return c.changes.wake }

// Take returns what may have changed since the last Take. Listing units is not a
// change, even though systemd loads them for it.
func (c *Conn) Take() Change {
	h := &c.changes
	h.mu.Lock()
	defer h.mu.Unlock()
	change := Change{All: h.every, Units: slices.Sorted(maps.Keys(h.names))}
	h.every, h.names = false, nil
	return change
}

// DeliverSignal handles systemd's signals, in their order, on the connection's
// own goroutine: it must not block, except for StopAll.
//
// UnitNew and UnitRemoved only say which units systemd has in memory. They are
// ignored: asking for the status of an idle unit causes both.
func (s *session) DeliverSignal(iface, member string, signal *dbus.Signal) {
	s.handling.RLock()
	defer s.handling.RUnlock()
	switch iface + "." + member {
	case "org.freedesktop.DBus.Properties.PropertiesChanged":
		if escaped, ok := strings.CutPrefix(string(signal.Path), unitRoot); ok {
			s.changes.unit(unescape(escaped))
		} else if strings.HasPrefix(string(signal.Path), jobRoot) {
			s.announced(signal.Path, false, "") // the job has begun to run
		}
	case manager + ".JobRemoved":
		var id uint32
		var path dbus.ObjectPath
		var name, result string
		if dbus.Store(signal.Body, &id, &path, &name, &result) == nil {
			s.announced(path, true, Result(result))
			s.changes.unit(name)
		}
	case manager + ".Reloading":
		var begins bool
		if dbus.Store(signal.Body, &begins) == nil && !begins {
			s.changes.all()
		}
	}
}

// unescape returns the name of the unit whose object path ends in path: the
// inverse of PathBusEscape. What PathBusEscape cannot have made stays as it is.
func unescape(path string) string {
	if path == "_" {
		return ""
	}
	digit := func(ch byte) int { return strings.IndexByte("0123456789abcdef", ch) }
	var b strings.Builder
	for i := 0; i < len(path); i++ {
		if path[i] == '_' && i+2 < len(path) && digit(path[i+1]) >= 0 && digit(path[i+2]) >= 0 {
			b.WriteByte(byte(digit(path[i+1])<<4 | digit(path[i+2])))
			i += 2
			continue
		}
		b.WriteByte(path[i])
	}
	return b.String()
}
