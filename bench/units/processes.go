package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"flotilla/bench/harness"
)

const (
	poll          = 5 * time.Millisecond
	upLimit       = 3 * time.Minute
	failoverLimit = 2 * time.Minute
)

// sleep is how long units sleep; no other process on the host sleeps as long.
func sleep() string { return strconv.Itoa(5_000_000 + os.Getpid()) }

func unitText() string {
	return "[Unit]\nDescription=Unit %i of the benchmark\n[Service]\nExecStart=/bin/sleep " + sleep() + "\n"
}

// errTooLong is what until returns at its limit.
var errTooLong = errors.New("that took too long")

// watch knows which of the units' processes are on the host. A process is
// looked at until it is one of them, which it stays; what was there before the
// first scan and is none never becomes one.
type watch struct {
	others map[int]bool
	here   map[int]bool
	proc   *os.File
}

// watching returns a watch that has scanned once.
func watching() (*watch, error) {
	proc, err := os.Open("/proc")
	if err != nil {
		return nil, err
	}
	w := &watch{proc: proc}
	return w, w.scan()
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
		if !w.here[pid] {
			line, err := os.ReadFile("/proc/" + name + "/cmdline")
			if err != nil || string(line) != "/bin/sleep\x00"+sleep()+"\x00" {
				w.others[pid] = begin
				continue
			}
		}
		here[pid] = true
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

// timing is how units came or went, in seconds.
type timing struct {
	began      time.Time
	first, all float64 // until the first one did, and all
	returned   float64 // until the command returned
	failed     error   // what it returned
	there      int     // units in the end
}

// timed runs command, which starts or ends units, until n of their processes are
// there.
func timed(ctx context.Context, n int, limit time.Duration, command func() error) (t timing, err error) {
	w, err := watching()
	if err != nil {
		return t, err
	}
	t.began = time.Now()
	returned := make(chan time.Time)
	go func() {
		t.failed = command()
		returned <- time.Now()
	}()
	first, all, err := w.until(ctx, t.began, n, limit)
	t.returned = (<-returned).Sub(t.began).Seconds()
	t.first, t.all, t.there = first, all, len(w.here)
	return t, errors.Join(err, w.proc.Close())
}

// used returns the CPU time of a program on each machine; command is how its command
// line begins on the host.
func used(machines []harness.Machine, command ...string) ([]time.Duration, error) {
	begin := []byte(strings.Join(command, "\x00") + "\x00")
	files, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		return nil, err
	}
	pids := map[string]int{} // by machine ID
	for _, path := range files {
		line, err := os.ReadFile(path)
		if err != nil || !bytes.HasPrefix(line, begin) {
			continue // ended, or another
		}
		dir := filepath.Dir(path)
		if id, err := os.ReadFile(dir + "/root/etc/machine-id"); err == nil {
			pids[strings.TrimSpace(string(id))], _ = strconv.Atoi(filepath.Base(dir)) // digits
		}
	}
	var all []time.Duration
	for _, m := range machines {
		if pids[m.MachineID] == 0 {
			return nil, fmt.Errorf("node %s runs no %s", m.Name, strings.Join(command, " "))
		}
		u, err := harness.ProcessUsage(pids[m.MachineID], false)
		if err != nil {
			return nil, err
		}
		all = append(all, u.CPU)
	}
	return all, nil
}
