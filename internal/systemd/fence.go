package systemd

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
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

// fenceScript is what PID 1 runs when the time is up, in this order: nothing in
// the slice starts any more; what runs shall stop, so that Restart= does
// nothing, and no other wish can replace that one; then SIGKILL, again and
// again, for ExecStop= and ExecStopPost= start processes too.
const fenceScript = `rm -f ` + FenceGate + `
systemctl stop --no-block --job-mode=replace-irreversibly ` + FenceSlice + ` 2>/dev/null
while systemctl kill --signal=SIGKILL ` + FenceSlice + ` 2>/dev/null
	systemctl is-active --quiet ` + FenceSlice + `
do sleep 0.02
done`

const fencePrefix = "flotilla-fence-"

// fence is what we know of the timers that PID 1 keeps for us.
type fence struct {
	turn    chan struct{} // room for one: who has put a value in may read and write the rest
	listed  bool          // armed holds those of an earlier process too
	armed   []string      // without .timer; more than one only after an unknown outcome
	startup uint64        // when PID 1 started, microseconds of CLOCK_MONOTONIC
}

type setting struct {
	Name  string
	Value dbus.Variant
}

// Fence makes PID 1 kill every process in FenceSlice after the given time,
// unless Fence or Unfence is called before. PID 1 needs nobody for that: this
// process may be dead or frozen. Until Fence is called again, no unit of the
// slice comes back. Time counts from the call of Fence; reloading and
// re-executing systemd does not change it; time asleep (suspend) does not
// count. An error leaves the earlier fence in force, or both.
func (c *Conn) Fence(ctx context.Context, after time.Duration) error {
	now, err := monotonic()
	if err != nil {
		return fmt.Errorf("arm the fence: %w", err)
	}
	if after <= 0 {
		return fmt.Errorf("arm the fence: %v is in the past", after)
	}
	f := &c.fence
	if err := f.take(ctx); err != nil {
		return fmt.Errorf("arm the fence: %w", err)
	}
	defer f.give()
	if err := c.learn(ctx); err != nil {
		return fmt.Errorf("arm the fence: %w", err)
	}
	// A timer cannot be set anew: each is another unit, and takes the place of
	// those before in one transaction of PID 1.
	name := fmt.Sprintf("%s%d", fencePrefix, now)
	var others []string
	for _, old := range f.armed {
		others = append(others, old+".timer", old+".service")
	}
	common := []setting{
		{"Description", dbus.MakeVariant("Fence around " + FenceSlice)},
		{"DefaultDependencies", dbus.MakeVariant(false)},
		{"IgnoreOnIsolate", dbus.MakeVariant(true)},
		{"CollectMode", dbus.MakeVariant("inactive-or-failed")},
	}
	// Not OnActiveUSec: that one starts again at every daemon-reload.
	type trigger struct {
		Base string
		USec uint64
	}
	timer := append(common[:len(common):len(common)],
		setting{"TimersMonotonic", dbus.MakeVariant([]trigger{{"OnStartupUSec", uint64(now+after)/1e3 - f.startup}})},
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
	f.armed = append(f.armed, name)
	r, err := c.order(ctx, "start", name+".timer", manager+".StartTransientUnit",
		name+".timer", "replace", timer, []auxiliary{{name + ".service", service}})
	if err == nil && r != Done {
		err = fmt.Errorf("start %s.timer: %s", name, r)
	}
	if err != nil {
		return fmt.Errorf("arm the fence: %w", err)
	}
	f.armed = []string{name}
	return openGate()
}

// Unfence disarms the fence and lets no further unit of the slice start. It
// does not touch those that run.
func (c *Conn) Unfence(ctx context.Context) error {
	f := &c.fence
	if err := f.take(ctx); err != nil {
		return fmt.Errorf("disarm the fence: %w", err)
	}
	defer f.give()
	if err := os.Remove(FenceGate); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("disarm the fence: %w", err)
	}
	if err := c.learn(ctx); err != nil {
		return fmt.Errorf("disarm the fence: %w", err)
	}
	for len(f.armed) > 0 {
		for _, kind := range []string{".timer", ".service"} {
			if _, err := c.Stop(ctx, f.armed[0]+kind); err != nil {
				return fmt.Errorf("disarm the fence: %w", err)
			}
		}
		f.armed = f.armed[1:]
	}
	return nil
}

// learn finds once what PID 1 keeps, for whoever armed it.
func (c *Conn) learn(ctx context.Context) error {
	f := &c.fence
	if f.listed {
		return nil
	}
	err := c.ask(ctx, rootPath, "org.freedesktop.DBus.Properties.Get", []any{manager, "UserspaceTimestampMonotonic"}, &f.startup)
	if err != nil {
		return fmt.Errorf("ask when systemd started: %w", err)
	}
	var rows []row
	err = c.ask(ctx, rootPath, manager+".ListUnitsByPatterns", []any{[]string{}, []string{fencePrefix + "*"}}, &rows)
	if err != nil {
		return fmt.Errorf("list fences: %w", err)
	}
	for _, r := range rows {
		if name, ok := strings.CutSuffix(r.Name, ".timer"); ok {
			f.armed = append(f.armed, name)
		} else if name, ok := strings.CutSuffix(r.Name, ".service"); ok && r.Active != "inactive" {
			f.armed = append(f.armed, name) // it fired; its timer is gone
		}
	}
	f.listed = true
	return nil
}

func (f *fence) take(ctx context.Context) error {
	select {
	case f.turn <- struct{}{}:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (f *fence) give() { <-f.turn }

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

// monotonic is the clock of systemd's monotonic timers.
func monotonic() (time.Duration, error) {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts); err != nil {
		return 0, fmt.Errorf("read the clock: %w", err)
	}
	return time.Duration(ts.Nano()), nil
}
