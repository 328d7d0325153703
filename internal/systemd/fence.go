package systemd

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/godbus/dbus/v5"
	"golang.org/x/sys/unix"
)

// FenceSlice holds the units that the fence kills. Its name makes it a child
// of flotilla.slice.
const FenceSlice = "flotilla-exclusive.slice"

// FenceGate is a file that exists while a fence is armed. Units in FenceSlice
// must not start without it, which FenceDropIn sees to.
const FenceGate = "/run/flotilla/fence-armed"

// FenceDropIn is what a unit behind the fence needs in a drop-in, for a unit
// of the kind that has processes ("Service", "Socket", "Mount" or "Swap").
func FenceDropIn(section string) string {
	return "[Unit]\nAssertPathExists=" + FenceGate + "\n[" + section + "]\nSlice=" + FenceSlice + "\n"
}

// fenceScript is what PID 1 runs when the time is up. With the gate closed
// nothing in the slice starts again, Restart= included. Then SIGKILL, and again,
// for ExecStop= and ExecStopPost= start processes too; and the wish that the
// units stop, which nothing may replace. It ends when systemd says that all
// have, and not when systemd does not answer.
const fenceScript = `rm -f ` + FenceGate + `
until
	systemctl kill --signal=SIGKILL ` + FenceSlice + `
	systemctl stop --no-block --job-mode=replace-irreversibly ` + FenceSlice + `
	test "$(systemctl is-active ` + FenceSlice + `)" = inactive
do sleep 0.02
done 2>/dev/null`

const fencePrefix = "flotilla-fence-"

type setting struct {
	Name  string
	Value dbus.Variant
}

// Fence makes PID 1 kill every process in FenceSlice after the given time,
// unless Fence or Unfence is called before. PID 1 needs nobody for that: this
// process may be dead or frozen. Until Fence is called again, no unit of the
// slice comes back. Time counts from the call of Fence; reloading and
// re-executing systemd does not change it; time asleep (suspend) does not
// count. After an error the earlier fence is in force, or the new one. Fence must
// not be called at the same time as itself or Unfence.
func (c *Conn) Fence(ctx context.Context, after time.Duration) error {
	now, err := monotonic()
	if err != nil {
		return fmt.Errorf("arm the fence: %w", err)
	}
	if after <= 0 {
		return fmt.Errorf("arm the fence: %v is in the past", after)
	}
	var startup uint64 // when PID 1 started, in microseconds
	err = c.ask(ctx, rootPath, "org.freedesktop.DBus.Properties.Get", []any{manager, "UserspaceTimestampMonotonic"}, &startup)
	if err != nil {
		return fmt.Errorf("arm the fence: ask when systemd started: %w", err)
	}
	others, err := c.fences(ctx)
	if err != nil {
		return fmt.Errorf("arm the fence: %w", err)
	}
	// A timer cannot be set anew: each is another unit, and takes the place of
	// those before in one transaction of PID 1.
	name := fmt.Sprintf("%s%d", fencePrefix, now)
	common := []setting{
		{"Description", dbus.MakeVariant("Fence around " + FenceSlice)},
		{"DefaultDependencies", dbus.MakeVariant(false)},
		{"IgnoreOnIsolate", dbus.MakeVariant(true)},
		{"CollectMode", dbus.MakeVariant("inactive-or-failed")},
	}
	// Not OnActiveSec: that one starts again at every daemon-reload.
	type trigger struct {
		Base string
		USec uint64
	}
	timer := append(common[:len(common):len(common)],
		setting{"TimersMonotonic", dbus.MakeVariant([]trigger{{"OnStartupSec", uint64(now+after)/1e3 - startup}})},
		setting{"AccuracyUSec", dbus.MakeVariant(uint64(1000))},
		setting{"RemainAfterElapse", dbus.MakeVariant(false)},
		setting{"Conflicts", dbus.MakeVariant(others)},
		setting{"After", dbus.MakeVariant(others)},
	)
	type command struct {
		Path    string
		Args    []string
		MayFail bool
	}
	service := append(common[:len(common):len(common)],
		setting{"Type", dbus.MakeVariant("simple")},
		setting{"ExecStart", dbus.MakeVariant([]command{{"/bin/sh", []string{"/bin/sh", "-c", fenceScript}, false}})},
		setting{"KillSignal", dbus.MakeVariant(int32(unix.SIGKILL))},
		setting{"OOMScoreAdjust", dbus.MakeVariant(int32(-1000))},
	)
	type auxiliary struct {
		Name       string
		Properties []setting
	}
	r, err := c.order(ctx, nil, manager+".StartTransientUnit",
		name+".timer", "replace", timer, []auxiliary{{name + ".service", service}})
	if err == nil && r != Done {
		err = fmt.Errorf("start of its timer: %s", r)
	}
	if err != nil {
		return fmt.Errorf("arm the fence: %w", err)
	}
	// The gate must not open after the fence has fired.
	if err := before(now + after); err != nil {
		return err
	}
	if err := openGate(); err != nil {
		return err
	}
	if err := before(now + after); err != nil {
		return errors.Join(err, os.Remove(FenceGate))
	}
	return nil
}

// Unfence disarms the fence and lets no further unit of the slice start. It
// does not touch those that run.
func (c *Conn) Unfence(ctx context.Context) error {
	if err := os.Remove(FenceGate); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("disarm the fence: %w", err)
	}
	armed, err := c.fences(ctx)
	if err != nil {
		return fmt.Errorf("disarm the fence: %w", err)
	}
	for _, name := range armed {
		if _, err := c.Stop(ctx, name); err != nil {
			return fmt.Errorf("disarm the fence: %w", err)
		}
	}
	return nil
}

// fences lists the timers and services that PID 1 keeps, whoever armed them;
// timers first.
func (c *Conn) fences(ctx context.Context) ([]string, error) {
	var rows []row
	err := c.ask(ctx, rootPath, manager+".ListUnitsByPatterns", []any{[]string{}, []string{fencePrefix + "*"}}, &rows)
	if err != nil {
		return nil, fmt.Errorf("list fences: %w", err)
	}
	var names []string
	for _, r := range rows {
		names = append(names, r.Name)
	}
	slices.SortFunc(names, func(a, b string) int { return strings.Compare(filepath.Ext(b), filepath.Ext(a)) })
	return names, nil
}

func openGate() error {
	if err := os.MkdirAll(filepath.Dir(FenceGate), 0o755); err != nil {
		return fmt.Errorf("open the fence's gate: %w", err)
	}
	file, err := os.OpenFile(FenceGate, os.O_CREATE|os.O_WRONLY, 0o644)
	if err != nil {
		return fmt.Errorf("open the fence's gate: %w", err)
	}
	return file.Close()
}

func before(deadline time.Duration) error {
	now, err := monotonic()
	if err == nil && now >= deadline {
		err = errors.New("its time has passed meanwhile")
	}
	if err != nil {
		return fmt.Errorf("arm the fence: %w", err)
	}
	return nil
}

// monotonic is the clock of systemd's monotonic timers.
func monotonic() (time.Duration, error) {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts); err != nil {
		return 0, fmt.Errorf("read the clock: %w", err)
	}
	return time.Duration(ts.Nano()), nil
}
