package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"time"

	"flotilla/bench/harness"
)

const (
	poll          = 5 * time.Millisecond
	upLimit       = 3 * time.Minute
	failoverLimit = 2 * time.Minute
)

// errTooLong is what until returns at its limit.
var errTooLong = errors.New("that took too long")

// watch knows which of the units' processes are on the host. A process is
// looked at until it is one of them, which it stays; what was there before the
// first scan and is none never becomes one.
type watch struct {
	command string // arguments, each ended by a NUL
	others  map[int]bool
	here    map[int]bool
	proc    *os.File
}

func (c *cluster) watch() (*watch, error) {
	proc, err := os.Open("/proc")
	if err != nil {
		return nil, err
	}
	w := &watch{command: fmt.Sprintf("/bin/sleep\x00%s\x00", c.sleep()), proc: proc, here: map[int]bool{}}
	if err := w.scan(); err != nil {
		return nil, err
	}
	return w, nil
}

// scan reads /proc once more.
func (w *watch) scan() error {
	if _, err := w.proc.Seek(0, 0); err != nil {
		return err
	}
	names, err := w.proc.Readdirnames(0)
	if err != nil {
		return err
	}
	begin := w.others == nil
	if begin {
		w.others = map[int]bool{}
	}
	here := make(map[int]bool, len(w.here))
	for _, name := range names {
		pid, err := strconv.Atoi(name)
		if err != nil || w.others[pid] {
			continue
		}
		if w.here[pid] {
			here[pid] = true
			continue
		}
		line, err := os.ReadFile("/proc/" + name + "/cmdline")
		switch {
		case err == nil && string(line) == w.command:
			here[pid] = true
		case begin:
			w.others[pid] = true
		}
	}
	w.here = here
	return nil
}

// until scans until so many processes are there and returns after how many
// seconds since began the number first grew, or fell, and when it was reached.
func (w *watch) until(ctx context.Context, began time.Time, n int, limit time.Duration) (first, all float64, err error) {
	had := len(w.here)
	for {
		if err := w.scan(); err != nil {
			return first, 0, err
		}
		since := time.Since(began)
		if first == 0 && len(w.here) != had {
			first = since.Seconds()
		}
		if len(w.here) == n {
			return first, since.Seconds(), nil
		}
		if since > limit {
			return first, since.Seconds(), fmt.Errorf("%d units run, not %d, after %s: %w", len(w.here), n, limit, errTooLong)
		}
		if err := harness.Pause(ctx, poll); err != nil {
			return first, 0, err
		}
	}
}
