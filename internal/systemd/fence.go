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

	sdbus "github.com/coreos/go-systemd/v22/dbus"
	"github.com/godbus/dbus/v5"
	"golang.org/x/sync/semaphore"
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

// fenceScript is what PID 1 runs when the time is up. Without the gate nothing in
// the slice starts again, not by Restart= either. It then sends SIGKILL until the
// slice is inactive, because ExecStop= and ExecStopPost= start processes too, and
// queues stop jobs that no other job may replace. An error of systemctl is not
// taken for an inactive slice.
const fenceScript = `rm -f ` + FenceGate + `
until
	systemctl kill --signal=SIGKILL ` + FenceSlice + `
	systemctl stop --no-block --job-mode=replace-irreversibly ` + FenceSlice + `
	test "$(systemctl is-active ` + FenceSlice + `)" = inactive
do sleep 0.02
done 2>/dev/null`

const fencePrefix = "flotilla-fence-"

// Fence makes PID 1 kill every process in FenceSlice after the given time, unless
// Fence or Unfence is called before. PID 1 does that alone: this process may be
// dead or frozen. Until Fence is called again, no unit of the slice can start.
// Time counts from the call of Fence; reloading and re-executing systemd does not
// change it; time in suspend does not count. After an error either the earlier
// fence is in force or the new one. Fence must not be called at the same time as
// itself or Unfence.
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
	// A timer cannot be set anew: each is a new unit, which replaces the earlier
	// ones in one transaction of PID 1.
	name := fmt.Sprintf("%s%d", fencePrefix, now)
	property := func(name string, value any) sdbus.Property {
		return sdbus.Property{Name: name, Value: dbus.MakeVariant(value)}
	}
	common := []sdbus.Property{
		sdbus.PropDescription("Fence around " + FenceSlice),
		property("DefaultDependencies", false),
		property("IgnoreOnIsolate", true),
		property("CollectMode", "inactive-or-failed"),
	}
	// Not OnActiveSec: that would count from the start at every daemon-reload.
	type trigger struct {
		Base string
		USec uint64
	}
	timer := slices.Concat(common, []sdbus.Property{
		property("TimersMonotonic", []trigger{{"OnStartupSec", uint64(now+after)/1e3 - startup}}),
		property("AccuracyUSec", uint64(1000)),
		property("RemainAfterElapse", false),
		sdbus.PropConflicts(others...),
		sdbus.PropAfter(others...),
	})
	service := slices.Concat(common, []sdbus.Property{
		sdbus.PropType("simple"),
		sdbus.PropExecStart([]string{"/bin/sh", "-c", fenceScript}, false),
		property("KillSignal", int32(unix.SIGKILL)),
		property("OOMScoreAdjust", int32(-1000)),
	})
	noLimit := semaphore.NewWeighted(1) // the fence does not queue behind starts
	r, err := c.order(ctx, noLimit, nil, manager+".StartTransientUnit",
		name+".timer", "replace", timer, []sdbus.PropertyCollection{{Name: name + ".service", Properties: service}})
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

// fences lists the timers and services of armed fences, also those of earlier
// processes; timers first.
func (c *Conn) fences(ctx context.Context) ([]string, error) {
	var rows []sdbus.UnitStatus
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
