package systemd

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"syscall"

	sdbus "github.com/coreos/go-systemd/v22/dbus"
	"github.com/godbus/dbus/v5"
)

// Status is what systemd says of one unit, in its own words.
type Status struct {
	Load   string // loaded, not-found, bad-setting, error, masked
	Active string // active, reloading, inactive, failed, activating, deactivating
	Sub    string // depends on the kind of unit: running, dead, auto-restart ...
	Queued string // what systemd is about to do: start, stop, restart; empty: nothing
	Err    string // why systemd would not tell, as for a name that cannot be one
}

// Units returns the status of each named unit, in one call for all. Each name
// has an entry: systemd calls a unit that it does not know not-found and
// inactive. An error means that systemd did not answer in time.
func (c *Conn) Units(ctx context.Context, names ...string) (map[string]Status, error) {
	found := make(map[string]Status, len(names))
	if len(names) == 0 {
		return found, nil
	}
	var rows []sdbus.UnitStatus
	err := c.ask(ctx, rootPath, manager+".ListUnitsByNames", []any{names}, &rows)
	var said *answer
	switch {
	case err == nil && len(rows) == len(names):
		for i, name := range names { // not by the row's name: the one asked for may be an alias
			r := rows[i]
			found[name] = Status{Load: r.LoadState, Active: r.ActiveState, Sub: r.SubState, Queued: r.JobType}
		}
	case err != nil && !errors.As(err, &said):
		return nil, fmt.Errorf("list units: %w", err)
	case len(names) > 1: // one bad name fails the call, or is left out of the answer
		for _, name := range names {
			one, err := c.Units(ctx, name)
			if err != nil {
				return nil, err
			}
			found[name] = one[name]
		}
	default:
		status := Status{Load: "error", Active: "inactive", Sub: "dead", Err: "systemd does not list it"}
		if said != nil {
			status.Err = said.text
		}
		found[names[0]] = status
	}
	return found, nil
}

// Kept returns which of the named units systemd has in memory. The others are
// idle, and asking for their status makes it read their files: of 500 units that
// were just stopped each such call took 0.2 s.
func (c *Conn) Kept(ctx context.Context, names ...string) (map[string]bool, error) {
	kept := make(map[string]bool, len(names))
	if len(names) == 0 {
		return kept, nil
	}
	s, err := c.session(ctx)
	if err != nil {
		return nil, err
	}
	calls := make([]*dbus.Call, len(names))
	for i, name := range names {
		calls[i] = s.object.GoWithContext(ctx, manager+".GetUnit", 0, make(chan *dbus.Call, 1), name)
	}
	for i, name := range names {
		call := <-calls[i].Done
		if call.Err != nil && !refused(call.Err) {
			return nil, fmt.Errorf("find units: %w", call.Err)
		}
		kept[name] = call.Err == nil
	}
	return kept, nil
}

// Detail is what Status leaves out of one unit. Fields that do not apply to
// the unit are zero.
type Detail struct {
	Status
	LoadError    string // why Load is not loaded
	FragmentPath string // its file, as systemd loaded it; links followed
	Result       string // of a service: success, exit-code, signal, timeout, start-limit-hit ...
	Restarts     int    // made by systemd itself
	Invocation   string // identifies this run of the unit
}

// Detail returns the Detail of one unit. It costs more than a row of Units: use it
// for units that failed, and for people.
func (c *Conn) Detail(ctx context.Context, name string) (Detail, error) {
	var p map[string]dbus.Variant
	err := c.ask(ctx, dbus.ObjectPath(unitRoot+sdbus.PathBusEscape(name)), "org.freedesktop.DBus.Properties.GetAll", []any{""}, &p)
	if err != nil {
		return Detail{}, fmt.Errorf("read unit %s: %w", name, err)
	}
	d := Detail{
		Status: Status{
			Load:   property[string](p, "LoadState"),
			Active: property[string](p, "ActiveState"),
			Sub:    property[string](p, "SubState"),
		},
		FragmentPath: property[string](p, "FragmentPath"),
		Result:       property[string](p, "Result"),
		Restarts:     int(property[uint32](p, "NRestarts")),
		Invocation:   fmt.Sprintf("%x", property[[]byte](p, "InvocationID")),
	}
	if v, ok := p["LoadError"].Value().([]any); ok && len(v) == 2 {
		text, _ := v[1].(string)
		d.LoadError = strings.TrimRight(text, ".")
	}
	return d, nil
}

func property[T any](p map[string]dbus.Variant, name string) T {
	v, _ := p[name].Value().(T)
	return v
}

// Failures are the units for which a call failed, by the name or path that was
// given. For all others the call succeeded.
type Failures map[string]error

func (f Failures) Error() string {
	for name, err := range f {
		if len(f) == 1 {
			return fmt.Sprintf("%s: %v", name, err)
		}
		return fmt.Sprintf("%s: %v, and %d more", name, err, len(f)-1)
	}
	return "nothing failed"
}

// Link makes unit files known to systemd until the next reboot, wherever they
// lie; a link of the same name is replaced. It takes effect with Reload. An
// error is of the connection, or wraps Failures by path.
func (c *Conn) Link(ctx context.Context, paths ...string) error {
	return c.many(ctx, "link", paths, func(some []string) error {
		return c.ask(ctx, rootPath, manager+".LinkUnitFiles", []any{some, true, true})
	})
}

// Enable does until the next reboot what [Install] of the linked units says.
// It takes effect with Reload. An error is of the connection, or wraps Failures
// by name.
func (c *Conn) Enable(ctx context.Context, names ...string) error {
	return c.many(ctx, "enable", names, func(some []string) error {
		return c.ask(ctx, rootPath, manager+".EnableUnitFiles", []any{some, true, true})
	})
}

// Disable undoes Link and Enable, whether or not the files are still there. It
// takes effect with Reload, and stops nothing. An error is of the connection,
// or wraps Failures by name.
func (c *Conn) Disable(ctx context.Context, names ...string) error {
	return c.many(ctx, "disable", names, func(some []string) error {
		err := c.ask(ctx, rootPath, manager+".DisableUnitFiles", []any{some, true})
		if errors.Is(err, ErrNoUnit) && len(some) == 1 {
			return nil
		}
		return err
	})
}

// many calls do with all names and, if systemd refuses that, with each alone, so
// that one bad unit does not keep the others from it.
func (c *Conn) many(ctx context.Context, verb string, names []string, do func([]string) error) error {
	if len(names) == 0 {
		return nil
	}
	err := do(names)
	var said *answer
	if !errors.As(err, &said) {
		if err != nil {
			err = fmt.Errorf("%s units: %w", verb, err)
		}
		return err
	}
	failed := make(Failures)
	for _, name := range names {
		if err := do([]string{name}); errors.As(err, &said) {
			failed[name] = err
		} else if err != nil {
			return fmt.Errorf("%s units: %w", verb, err)
		}
	}
	if len(failed) == 0 {
		return nil
	}
	return fmt.Errorf("%s %w", verb, failed)
}

// Reload makes systemd read all unit files again, and returns when it has.
func (c *Conn) Reload(ctx context.Context) error {
	if err := c.ask(ctx, rootPath, manager+".Reload", nil); err != nil {
		return fmt.Errorf("reload systemd: %w", err)
	}
	return nil
}

// ResetFailed makes a failed unit inactive and forgets its starts, which count
// against its start limit. A unit that is not loaded has none: no error.
func (c *Conn) ResetFailed(ctx context.Context, name string) error {
	err := c.ask(ctx, rootPath, manager+".ResetFailedUnit", []any{name})
	if err != nil && !errors.Is(err, ErrNoUnit) {
		return fmt.Errorf("reset unit %s: %w", name, err)
	}
	return nil
}

// Kill sends the signal to all processes of the unit; of a slice, to those of
// all units in it. It neither stops the unit nor keeps systemd from starting it
// again. A unit that is not loaded has no processes: no error.
func (c *Conn) Kill(ctx context.Context, name string, signal syscall.Signal) error {
	err := c.ask(ctx, rootPath, manager+".KillUnit", []any{name, "all", int32(signal)})
	if err != nil && !errors.Is(err, ErrNoUnit) {
		return fmt.Errorf("send signal %d to unit %s: %w", signal, name, err)
	}
	return nil
}

// Processes returns the ids of the processes in the unit's control group; of a
// slice, those of all units in it. A unit that is not loaded has none.
func (c *Conn) Processes(ctx context.Context, name string) ([]int, error) {
	var rows []struct {
		Cgroup  string
		PID     uint32
		Command string
	}
	err := c.ask(ctx, rootPath, manager+".GetUnitProcesses", []any{name}, &rows)
	if err != nil && !errors.Is(err, ErrNoUnit) {
		return nil, fmt.Errorf("list processes of unit %s: %w", name, err)
	}
	pids := make([]int, len(rows))
	for i, r := range rows {
		pids[i] = int(r.PID)
	}
	return pids, nil
}
