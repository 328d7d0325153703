// Command units measures how long units take to start, to be gone and to be up
// elsewhere after a power failure, and what the cluster does when nothing
// happens, on clusters of containers with real systemd; beside it systemd alone
// and, if its programs are given, the real fleet. It needs root.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"flotilla/bench/harness"
)

const claim = "starting, ending, moving and watching units, against systemd alone"

// The bars, on any machine: seconds but for the ratio, the writes and the share.
const (
	barOne      = 0.15
	barFloor    = 1.2
	barGone     = 3
	barWrites   = 600
	barIdle     = 0.01 // of a core
	barFailover = 15
	barList     = 0.03
)

// options is what a run is told beside what all benchmarks are.
type options struct {
	on     string // a cluster that is there already; empty: new ones
	rounds int
	many   int
	idle   time.Duration
}

func main() {
	var o options
	flag.StringVar(&o.on, "on", "", "measure on this cluster of the machine, which stays (default: new ones of 1 and of 3 nodes)")
	flag.IntVar(&o.rounds, "rounds", 3, "measurements of each kind")
	flag.IntVar(&o.many, "many", 500, "the most units")
	flag.DurationVar(&o.idle, "idle", 30*time.Second, "how long to watch a cluster at rest")
	harness.Main("units", claim, func(ctx context.Context, b *harness.Bench) error {
		sizes := []int{1, 3}
		if b.Quick {
			o.rounds, o.many, o.idle, sizes = 1, min(o.many, 50), 5*time.Second, sizes[1:]
		}
		return run(ctx, b, o, sizes)
	})
}

func run(ctx context.Context, b *harness.Bench, o options, sizes []int) error {
	b.Printf("setup    nodes are containers with systemd, made by flotilla cluster; default settings. Units are instances of one\n")
	b.Printf("         template that run /bin/sleep. Times are seconds from the start of the command until so many of these\n")
	b.Printf("         processes are, or are no more, in the host's /proc, which is read every 5 ms\n")
	b.Printf("systemd  the same units as files: systemctl link, daemon-reload, start --no-block; on all nodes at once, a share each,\n")
	b.Printf("         while flotilla-node is stopped\n")
	if o.on != "" {
		return onCluster(ctx, b, o, &cluster{bench: b, name: o.on})
	}
	for _, n := range sizes {
		c := &cluster{bench: b, name: fmt.Sprintf("b%dx%d", os.Getpid()%10000, n)}
		b.Logf("cluster %s of %d", c.name, n)
		err := c.up(ctx, n)
		if err == nil {
			err = onCluster(ctx, b, o, c)
		}
		if err = errors.Join(err, c.down()); err != nil {
			return fmt.Errorf("%d nodes: %w", n, err)
		}
	}
	return nil
}

// trial is one start of units and their end.
type trial struct {
	first, up, returned float64
	gone                float64
	writes              counts // of the start
}

// onCluster measures everything on one cluster.
func onCluster(ctx context.Context, b *harness.Bench, o options, c *cluster) error {
	if err := c.refresh(ctx); err != nil {
		return err
	}
	template := filepath.Join(b.Dir, templateName)
	if err := os.WriteFile(template, []byte(c.unitText()), 0o644); err != nil {
		return err
	}
	ours := &system{cluster: c, dir: b.Dir}
	if err := ours.clear(ctx); err != nil {
		return err
	}
	b.Printf("\n%d node(s)\n%-10s units  round   first      up  returned    gone\n", len(c.nodes), "")
	var one []float64
	for i := range 2*o.rounds + 1 {
		t, err := ours.trial(ctx, 1)
		if err != nil {
			return err
		}
		c.row("flotilla", 1, i, t)
		one = append(one, t.up)
	}
	for i := range o.rounds {
		t, err := ours.trial(ctx, o.many/5)
		if err != nil {
			return err
		}
		c.row("flotilla", o.many/5, i, t)
	}
	var ups, gone, floors, writes []float64
	for i := range o.rounds {
		floor, err := c.floor(ctx, o.many)
		if err != nil {
			return err
		}
		c.row("systemd", o.many, i, floor)
		t, err := ours.trial(ctx, o.many)
		if err != nil {
			return err
		}
		c.row("flotilla", o.many, i, t)
		b.Printf("           store: %s; returned after %.2f of systemd's time, up after %.2f\n", t.writes, t.returned/floor.up, t.up/floor.up)
		ups, gone, floors = append(ups, t.up), append(gone, t.gone), append(floors, floor.up)
		writes = append(writes, t.writes.proposals)
	}
	b.AtMost("1 unit up, median", harness.Median(one), barOne, " s")
	b.AtMost(fmt.Sprintf("%d units up, median, in times of systemd alone", o.many), harness.Median(ups)/harness.Median(floors), barFloor, "")
	b.AtMost(fmt.Sprintf("%d units destroyed and gone, median", o.many), harness.Median(gone), barGone, " s")
	b.AtMost(fmt.Sprintf("store writes for %d starts, median", o.many), harness.Median(writes), barWrites, "")
	if err := atRest(ctx, b, o, ours); err != nil {
		return err
	}
	if len(c.nodes) > 1 {
		if err := failover(ctx, b, o, ours); err != nil {
			return err
		}
	}
	return ours.clear(ctx)
}

// row prints one trial.
func (c *cluster) row(who string, units, round int, t trial) {
	c.bench.Printf("%-10s %5d  %5d  %6.3f  %6.3f    %6.3f  %6.3f\n", who, units, round+1, t.first, t.up, t.returned, t.gone)
}

// atRest starts the most units and watches; they stay.
func atRest(ctx context.Context, b *harness.Bench, o options, s *system) error {
	if _, err := s.start(ctx, o.many); err != nil {
		return err
	}
	if err := s.settle(ctx); err != nil {
		return err
	}
	b.Logf("at rest for %s", o.idle)
	before, err := s.reading(ctx)
	if err != nil {
		return err
	}
	if err := harness.Pause(ctx, o.idle); err != nil {
		return err
	}
	after, err := s.reading(ctx)
	if err != nil {
		return err
	}
	writes := after.counts.minus(before.counts)
	b.Printf("at rest with %d units for %s: store %s\n", o.many, o.idle, writes)
	worst := 0.0
	for i, n := range s.cluster.nodes {
		node := (after.node[i] - before.node[i]).Seconds() / o.idle.Seconds()
		store := (after.store[i] - before.store[i]).Seconds() / o.idle.Seconds()
		worst = max(worst, node)
		b.Printf("           %s: node %.4f cores, store %.4f cores\n", n.Name, node, store)
	}
	b.AtMost("writes to the store per unit at rest", writes.puts/float64(o.many), 0, "")
	b.AtMost("CPU of the busiest node process at rest", worst, barIdle, " cores")
	for _, verb := range []string{"list-units", "list-unit-files"} {
		var took []float64
		for range 9 {
			began := time.Now()
			lines, err := s.output(ctx, verb, "--no-legend")
			if err != nil {
				return err
			}
			if n := countLines(lines); n != o.many {
				return fmt.Errorf("%s has %d lines, not %d", verb, n, o.many)
			}
			took = append(took, time.Since(began).Seconds())
		}
		b.Printf("%s   raw %s\n", verb, harness.Join(took, "%.4f"))
		b.AtMost(fmt.Sprintf("%s of %d units, median", verb, o.many), harness.Median(took), barList, " s")
	}
	return nil
}

// failover cuts the power of the last node and waits for its units.
func failover(ctx context.Context, b *harness.Bench, o options, s *system) error {
	c := s.cluster
	victim := c.nodes[len(c.nodes)-1]
	before, err := c.watch()
	if err != nil {
		return err
	}
	had := len(before.here)
	began := time.Now()
	if err := c.cli(ctx, "cluster", "power", "--cluster", c.name, victim.Name, "cut"); err != nil {
		return err
	}
	cut := time.Since(began).Seconds()
	if err := before.scan(); err != nil {
		return err
	}
	lost := had - len(before.here)
	first, all, err := before.until(ctx, began, o.many, failoverLimit)
	if err != nil {
		return err
	}
	b.Printf("failover   %s of %d nodes cut (the command took %.2f s), %d of %d units lost: first up after %.2f, all after %.2f\n",
		victim.Name, len(c.nodes), cut, lost, had, first, all)
	b.AtMost(fmt.Sprintf("%d units of a dead node up again", lost), all, barFailover, " s")
	if err := c.cli(ctx, "cluster", "power", "--cluster", c.name, victim.Name, "on"); err != nil {
		return err
	}
	return nil
}
