package main

import (
	"context"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"os/exec"
	"strconv"
	"strings"
	"time"

	"flotilla/bench/harness"
)

const (
	templateName = "bench@.service"
	// goneLimit is how long units may take to end.
	goneLimit = time.Minute
)

// system is what starts units on a cluster, and what was found out about it.
type system struct {
	*harness.Bench
	name     string
	machines *harness.Machines
	// command is the client, with a verb and what this is about.
	command func(ctx context.Context, args ...string) *exec.Cmd
	// used is the CPU time of what never ends: the daemons by node, and the stores.
	used       func() (daemons, stores []time.Duration, err error)
	metricsURL string
	metrics    []metric // of the store, that count: writes first
	figures    []figure

	// Of a system that does not always do what it is told.
	pass  time.Duration               // it looks for work as often, so a start comes at any time between
	sweep func(context.Context) error // ends what is still there after goneLimit; nil: that is an error
}

type metric struct{ name, what string }

// flotilla is our own daemons, as the nodes run them.
func flotilla(b *harness.Bench, m *harness.Machines) *system {
	const daemon = "/usr/local/bin/flotillad"
	return &system{
		Bench: b, name: "flotilla", machines: m,
		command: func(ctx context.Context, args ...string) *exec.Cmd {
			if args[0] == "start" {
				args = append([]string{"start", "--timeout", "3m"}, args[1:]...)
			}
			cmd := m.Command(ctx, args...)
			cmd.Dir = b.Dir
			return cmd
		},
		used: func() (daemons, stores []time.Duration, err error) {
			if daemons, err = used(m.Nodes, daemon, "node"); err == nil {
				stores, err = used(m.Nodes, daemon, "store")
			}
			return daemons, stores, err
		},
		metricsURL: "http://" + m.Nodes[0].Address + ":2379/metrics", // of one member: every member does all
		metrics: []metric{
			{"etcd_server_proposals_applied_total", "writes (raft proposals)"},
			{"etcd_mvcc_txn_total", "transactions"},
			{"etcd_mvcc_put_total", "keys put"},
		},
	}
}

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
	if s.sweep == nil && bar != noBar {
		s.AtMost(f.what, f.value, bar, f.unit)
	}
}

func (s *system) output(ctx context.Context, args ...string) (string, error) {
	return harness.Output(s.command(ctx, args...))
}

// counted asks the store for its metrics.
func (s *system) counted(ctx context.Context) ([]float64, error) {
	all, err := harness.Metrics(ctx, s.metricsURL)
	if err != nil {
		return nil, err
	}
	var counts []float64
	for _, m := range s.metrics {
		n, ok := all[m.name]
		if !ok {
			return nil, fmt.Errorf("the store has no metric %s", m.name)
		}
		counts = append(counts, n)
	}
	return counts, nil
}

// words tells what the store has done between two readings of its metrics.
func (s *system) words(before, after []float64) string {
	var parts []string
	for i, m := range s.metrics {
		parts = append(parts, fmt.Sprintf("%.0f %s", after[i]-before[i], m.what))
	}
	return strings.Join(parts, ", ")
}

// withNames are a verb and the names of n units.
func withNames(verb string, n int) []string {
	list := []string{verb}
	for i := range n {
		list = append(list, strings.Replace(templateName, "@", "@"+strconv.Itoa(i+1), 1))
	}
	return list
}

// trial is one start of units and their end.
type trial struct {
	start         timing
	gone          float64
	left          int       // units that were not gone by then
	before, after []float64 // metrics of the store around the start
}

// start starts n units and waits until their processes are there, the command
// has returned and the system knows of them.
func (s *system) start(ctx context.Context, n int) (t trial, err error) {
	if err := harness.Pause(ctx, rand.N(s.pass+1)); err != nil {
		return t, err
	}
	if t.before, err = s.counted(ctx); err != nil {
		return t, err
	}
	t.start, err = timed(ctx, n, upLimit, func() error {
		_, err := s.output(ctx, withNames("start", n)...)
		return err
	})
	switch failed := t.start.failed; {
	case err != nil, failed != nil && s.sweep == nil:
		return t, errors.Join(err, failed)
	case failed != nil:
		s.Printf("           all are up, but %v\n", failed)
	}
	if err := s.settle(ctx, n); err != nil {
		return t, err
	}
	t.after, err = s.counted(ctx)
	return t, err
}

// trial starts n units and destroys them.
func (s *system) trial(ctx context.Context, n int) (trial, error) {
	t, err := s.start(ctx, n)
	if err != nil {
		return t, fmt.Errorf("start %d units: %w", n, err)
	}
	end, err := timed(ctx, 0, goneLimit, func() error {
		_, err := s.output(ctx, withNames("destroy", n)...)
		return err
	})
	t.gone, t.left = end.all, end.there
	if s.sweep != nil && end.failed == nil && errors.Is(err, errTooLong) {
		return t, s.sweep(ctx)
	}
	if err = errors.Join(err, end.failed); err != nil {
		return t, fmt.Errorf("destroy %d units: %w", n, err)
	}
	return t, s.clear(ctx)
}

// settle waits until all n units are listed as active and, of a system that is
// quiet then, the store has not been written to for two seconds.
func (s *system) settle(ctx context.Context, n int) error {
	err := harness.Until(ctx, upLimit, 100*time.Millisecond, fmt.Sprintf("%d units to be listed as active", n), func() error {
		units, err := s.output(ctx, "list-units", "--no-legend", "--fields", "unit,active")
		if active := strings.Count(units, "\tactive\n"); err == nil && active != n {
			err = fmt.Errorf("%d are", active)
		}
		return err
	})
	if err != nil || s.pass > 0 {
		return err
	}
	writes, since := -1.0, time.Now()
	return harness.Until(ctx, upLimit, 100*time.Millisecond, "no more writes to the store", func() error {
		now, err := s.counted(ctx)
		if err != nil {
			return err
		}
		if now[0] != writes {
			writes, since = now[0], time.Now()
		}
		if time.Since(since) < 2*time.Second {
			return errors.New("it is still written to")
		}
		return nil
	})
}

// clear destroys what is there and waits until nothing is.
func (s *system) clear(ctx context.Context) error {
	return harness.Until(ctx, upLimit, 100*time.Millisecond, "all units to be destroyed", func() error {
		files, err := s.output(ctx, "list-unit-files", "--no-legend", "--fields", "unit")
		if err != nil {
			return err
		}
		units, err := s.output(ctx, "list-units", "--no-legend", "--fields", "unit")
		if err != nil || files+units == "" {
			return err
		}
		if files != "" {
			_, err = s.output(ctx, append([]string{"destroy"}, strings.Fields(files)...)...)
		}
		return errors.Join(errors.New("some are still there"), err)
	})
}
