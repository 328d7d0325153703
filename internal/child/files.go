package child

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"flotilla/internal/durable"
)

// A pid file has three lines: pid, start time of the process in clock ticks
// since boot, and BootID. No two processes ever have the same three.

// readPidFile returns pid 0 when there is no file, when it was written before
// the last boot, or when it does not make sense.
func readPidFile(path string) (pid int, started uint64, err error) {
	b, err := os.ReadFile(path)
	if errors.Is(err, os.ErrNotExist) {
		return 0, 0, nil
	}
	if err != nil {
		return 0, 0, fmt.Errorf("read pid file: %w", err)
	}
	boot, err := BootID()
	if err != nil {
		return 0, 0, err
	}
	f := strings.Fields(string(b))
	if len(f) != 3 || f[2] != boot {
		return 0, 0, nil
	}
	pid, perr := strconv.Atoi(f[0])
	started, serr := strconv.ParseUint(f[1], 10, 64)
	if perr != nil || serr != nil || pid <= 0 {
		return 0, 0, nil
	}
	return pid, started, nil
}

func writePidFile(path string, p *process) error {
	boot, err := BootID()
	if err != nil {
		return err
	}
	return durable.WriteFile(path, fmt.Appendf(nil, "%d\n%d\n%s\n", p.Pid, p.started, boot), 0o644)
}

// lockFile takes the lock, which the kernel holds until the file is closed or this
// process ends, and writes our pid into it, which a refused supervisor reports.
func lockFile(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o644)
	if err != nil {
		return nil, fmt.Errorf("open lock: %w", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		holder, _ := io.ReadAll(io.LimitReader(f, 32))
		_ = f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, fmt.Errorf("process %s supervises it already and holds %s", strings.TrimSpace(string(holder)), path)
		}
		return nil, fmt.Errorf("lock %s: %w", path, err)
	}
	err = f.Truncate(0)
	if err == nil {
		_, err = f.WriteAt(fmt.Appendf(nil, "%d\n", os.Getpid()), 0)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("write lock: %w", err), f.Close())
	}
	return f, nil
}

// openLog opens the log for appending, after rotating it if it is too long, and
// returns its size.
func openLog(path string) (*os.File, int64, error) {
	if path == "" {
		f, err := os.OpenFile(os.DevNull, os.O_WRONLY, 0)
		return f, 0, err
	}
	if st, err := os.Stat(path); err == nil && st.Size() > logLimit {
		if err := os.Rename(path, path+".1"); err != nil {
			return nil, 0, fmt.Errorf("rotate log: %w", err)
		}
	}
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o640)
	if err != nil {
		return nil, 0, fmt.Errorf("open log: %w", err)
	}
	st, err := f.Stat()
	if err != nil {
		return nil, 0, errors.Join(fmt.Errorf("open log: %w", err), f.Close())
	}
	return f, st.Size(), nil
}

// logTail returns the last five lines written after the offset from, joined by
// " | ", and says so when there are none.
func logTail(path string, from int64) string {
	const none = "(it wrote nothing)"
	if path == "" {
		return "(its output is not kept)"
	}
	f, err := os.Open(path)
	if err != nil {
		return none
	}
	defer func() { _ = f.Close() }()
	st, err := f.Stat()
	if err != nil {
		return none
	}
	b := make([]byte, min(4096, max(0, st.Size()-from)))
	n, _ := f.ReadAt(b, st.Size()-int64(len(b)))
	lines := strings.FieldsFunc(strings.ToValidUTF8(string(b[:n]), "?"), func(r rune) bool { return r == '\n' || r == '\r' })
	if len(lines) == 0 {
		return none
	}
	return strings.Join(lines[max(0, len(lines)-5):], " | ")
}
