package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"net/http"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"flotilla/bench/harness"
)

// system is what starts units on a cluster, and what was found out about it.
type system struct {
	daemons
	name    string
	cluster *cluster
	figures []figure

	// Of a system that does not always do what it is told.
	pass  time.Duration               // it looks for work as often, so a start comes at any time between
	sweep func(context.Context) error // ends what is still there after goneLimit; nil: that is an error
}

// daemons is how a system's programs are asked.
type daemons interface {
	// command is the client, with a verb and what this is about.
	command(ctx context.Context, args ...string) *exec.Cmd
	// store is the URL of the store's metrics, and those that count: writes first.
	store() (url string, metrics []metric)
	// processes are those on the host that never end, the daemons by node.
	processes() (daemons, stores []int, err error)
}

type metric struct{ name, what string }

// goneLimit is how long units may take to end.
const goneLimit = time.Minute

// figure is one result that systems are compared by.
type figure struct {
	what  string
	value float64
	unit  string
	least bool // the real value is higher
}

// noBar is for figures that only compare.
var noBar = math.Inf(1)

// figure notes a result; those of flotilla have bars.
func (s *system) figure(f figure, bar float64) {
	s.figures = append(s.figures, f)
	if _, ours := s.daemons.(flotilla); ours && bar != noBar {
		s.cluster.bench.AtMost(f.what, f.value, bar, f.unit)
	}
}

func (s *system) output(ctx context.Context, args ...string) (string, error) {
	return output(s.command(ctx, args...))
}

// counts is what a store has done, by metric.
type counts []float64

func (c counts) minus(o counts) counts {
	d := slices.Clone(c)
	for i := range d {
		d[i] -= o[i]
	}
	return d
}

func (c counts) writes() float64 { return c[0] }

// words tells counts of the system's store.
func (s *system) words(c counts) string {
	_, metrics := s.store()
	parts := make([]string, len(c))
	for i, n := range c {
		parts[i] = fmt.Sprintf("%.0f %s", n, metrics[i].what)
	}
	return strings.Join(parts, ", ")
}

// counted asks the store; series of one metric are added up.
func (s *system) counted(ctx context.Context) (counts, error) {
	url, metrics := s.store()
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return nil, err
	}
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		return nil, err
	}
	var text bytes.Buffer
	_, err = text.ReadFrom(response.Body)
	if err = errors.Join(err, response.Body.Close()); err != nil {
		return nil, err
	}
	n, seen := make(counts, len(metrics)), map[string]bool{}
	for line := range strings.Lines(text.String()) {
		series, value, _ := strings.Cut(strings.TrimSpace(line), " ")
		name, _, _ := strings.Cut(series, "{")
		i := slices.IndexFunc(metrics, func(m metric) bool { return m.name == name })
		if i < 0 {
			continue
		}
		v, err := strconv.ParseFloat(value, 64)
		if err != nil {
			return nil, fmt.Errorf("metrics of the store: %s: %w", name, err)
		}
		n[i] += v
		seen[name] = true
	}
	if len(seen) < len(metrics) {
		return nil, fmt.Errorf("metrics of the store: %d of %d are there", len(seen), len(metrics))
	}
	return n, nil
}

// reading is what was used so far; daemons by node.
type reading struct {
	counts          counts
	daemons, stores []time.Duration
}

func (s *system) reading(ctx context.Context) (r reading, err error) {
	if r.counts, err = s.counted(ctx); err != nil {
		return r, err
	}
	daemons, stores, err := s.processes()
	if err != nil {
		return r, err
	}
	if r.daemons, err = used(daemons); err != nil {
		return r, err
	}
	r.stores, err = used(stores)
	return r, err
}

// used returns the CPU times of processes.
func used(pids []int) ([]time.Duration, error) {
	list := make([]time.Duration, len(pids))
	for i, pid := range pids {
		u, err := harness.ProcessUsage(pid, false)
		if err != nil {
			return nil, err
		}
		list[i] = u.CPU
	}
	return list, nil
}

func names(n int) []string {
	list := make([]string, n)
	for i := range list {
		list[i] = strings.Replace(templateName, "@", "@"+strconv.Itoa(i+1), 1)
	}
	return list
}

// trial is one start of units and their end.
type trial struct {
	first, up, returned float64
	gone                float64
	left                int    // units that were not gone by then
	writes              counts // of the start
}

// start starts n units and waits until their processes are there, the command
// has returned and the system knows of them.
func (s *system) start(ctx context.Context, n int) (t trial, err error) {
	if err := harness.Pause(ctx, rand.N(s.pass+1)); err != nil {
		return t, err
	}
	before, err := s.counted(ctx)
	if err != nil {
		return t, err
	}
	w, err := s.cluster.watch()
	if err != nil {
		return t, err
	}
	var ended sync.WaitGroup
	var failed error
	began := time.Now()
	ended.Go(func() {
		_, failed = s.output(ctx, append([]string{"start"}, names(n)...)...)
		t.returned = time.Since(began).Seconds()
	})
	t.first, t.up, err = w.until(ctx, began, n, upLimit)
	ended.Wait()
	if err != nil {
		return t, errors.Join(err, failed)
	}
	if failed != nil && s.sweep == nil {
		return t, failed
	}
	if failed != nil {
		s.cluster.bench.Printf("           all are up, but %v\n", failed)
	}
	if err := s.settle(ctx, n); err != nil {
		return t, err
	}
	after, err := s.counted(ctx)
	if err != nil {
		return t, err
	}
	t.writes = after.minus(before)
	return t, nil
}

// trial starts n units and destroys them.
func (s *system) trial(ctx context.Context, n int) (trial, error) {
	t, err := s.start(ctx, n)
	if err != nil {
		return t, fmt.Errorf("start %d units: %w", n, err)
	}
	w, err := s.cluster.watch()
	if err != nil {
		return t, err
	}
	var ended sync.WaitGroup
	var failed error
	began := time.Now()
	ended.Go(func() { _, failed = s.output(ctx, append([]string{"destroy"}, names(n)...)...) })
	_, t.gone, err = w.until(ctx, began, 0, goneLimit)
	ended.Wait()
	if s.sweep != nil && failed == nil && errors.Is(err, errTooLong) {
		t.left = len(w.here)
		return t, s.sweep(ctx)
	}
	if err = errors.Join(err, failed); err != nil {
		return t, fmt.Errorf("destroy %d units: %w", n, err)
	}
	return t, s.clear(ctx)
}

// settle waits until all n units are listed as active and, of a system that is
// quiet then, the store has not been written to for two seconds.
func (s *system) settle(ctx context.Context, n int) error {
	var last counts
	since, listed := time.Now(), false
	for began := time.Now(); ; {
		if !listed {
			units, err := s.output(ctx, "list-units", "--no-legend", "--fields", "unit,active")
			if err != nil {
				return err
			}
			listed = countActive(units) == n
		}
		now, err := s.counted(ctx)
		if err != nil {
			return err
		}
		if last == nil || now.writes() != last.writes() {
			last, since = now, time.Now()
		}
		if listed && (s.pass > 0 || time.Since(since) >= 2*time.Second) {
			return nil
		}
		if time.Since(began) > upLimit {
			return fmt.Errorf("after %s not all %d units are listed as active (%t), or the store is still written to", upLimit, n, !listed)
		}
		if err := harness.Pause(ctx, 100*time.Millisecond); err != nil {
			return err
		}
	}
}

// countActive counts the lines whose second word is active.
func countActive(list string) (n int) {
	for line := range strings.Lines(list) {
		if words := strings.Fields(line); len(words) == 2 && words[1] == "active" {
			n++
		}
	}
	return n
}

// clear destroys what is there and waits until nothing is.
func (s *system) clear(ctx context.Context) error {
	for began := time.Now(); ; {
		files, err := s.output(ctx, "list-unit-files", "--no-legend", "--fields", "unit")
		if err != nil {
			return err
		}
		units, err := s.output(ctx, "list-units", "--no-legend", "--fields", "unit")
		if err != nil {
			return err
		}
		if files+units == "" {
			return nil
		}
		if list := strings.Fields(files); len(list) > 0 {
			if _, err := s.output(ctx, append([]string{"destroy"}, list...)...); err != nil {
				return err
			}
		}
		if time.Since(began) > upLimit {
			return fmt.Errorf("units are still there %s after they were destroyed", upLimit)
		}
		if err := harness.Pause(ctx, 100*time.Millisecond); err != nil {
			return err
		}
	}
}
