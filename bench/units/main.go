// Command units measures how long units take to start, to be gone and to be up
// elsewhere after a power failure, and what the cluster does when nothing
// happens, on clusters of containers with real systemd; beside it systemd alone
// and, if its programs are given, the real fleet. It needs root.
//
// test/fleet.sh builds fleet's programs. The etcd has to be 3.4 or older, as in
// the package etcd-server of Debian 12, which need not be installed for it:
//
//	apt-get download etcd-server && dpkg -x etcd-server_*.deb DIR
//	go run ./bench/units -fleetctl .cache/fleet/fleetctl -fleetd .cache/fleet/fleetd -etcd DIR/usr/bin/etcd
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"slices"
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
	fleet  programs
}

func main() {
	var o options
	flag.StringVar(&o.on, "on", "", "measure on this cluster of the machine, which stays (default: new ones of 1 and of 3 nodes)")
	flag.IntVar(&o.rounds, "rounds", 3, "measurements of each kind")
	flag.IntVar(&o.many, "many", 500, "the most units")
	flag.DurationVar(&o.idle, "idle", 30*time.Second, "how long to watch a cluster at rest")
	flag.StringVar(&o.fleet.daemon, "fleetd", "", "the real fleetd, to measure beside ours; -fleetctl and -etcd go with it")
	flag.StringVar(&o.fleet.client, "fleetctl", "", "the real fleetctl")
	flag.StringVar(&o.fleet.etcd, "etcd", "", "an etcd that has the v2 API, for fleet")
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
	if err := o.fleet.find(); err != nil {
		return err
	}
	if o.fleet.given() {
		if err := o.fleet.describe(ctx, b); err != nil {
			return err
		}
	}
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

// onCluster measures everything on one cluster.
func onCluster(ctx context.Context, b *harness.Bench, o options, c *cluster) error {
	if err := c.refresh(ctx); err != nil {
		return err
	}
	template := filepath.Join(b.Dir, templateName)
	if err := os.WriteFile(template, []byte(c.unitText()), 0o644); err != nil {
		return err
	}
	ours := &system{daemons: flotilla{c}, name: "flotilla", cluster: c}
	if err := ours.clear(ctx); err != nil {
		return err
	}
	b.Printf("\n%d node(s)\n", len(c.nodes))
	if err := measure(ctx, b, o, ours); err != nil {
		return err
	}
	if err := ours.clear(ctx); err != nil || !o.fleet.given() {
		return err
	}
	f := &fleet{cluster: c, programs: o.fleet}
	theirs := &system{daemons: f, name: "fleet", cluster: c, pass: fleetPass, sweep: f.sweep}
	b.Printf("\nfleet on %d node(s)\n", len(c.nodes))
	err := f.up(ctx)
	if err == nil {
		err = measure(ctx, b, o, theirs)
	}
	if err = errors.Join(err, f.down()); err != nil {
		return fmt.Errorf("fleet: %w", err)
	}
	compare(b, theirs, ours)
	return nil
}

// measure measures one system; ours comes first, with systemd alone beside it.
func measure(ctx context.Context, b *harness.Bench, o options, s *system) error {
	c := s.cluster
	b.Printf("%-10s units  round   first      up  returned    gone\n", "")
	var one, few []float64
	for i := range 2*o.rounds + 1 {
		t, err := s.trial(ctx, 1)
		if err != nil {
			return err
		}
		c.row(s.name, 1, i, t)
		one = append(one, t.up)
	}
	for i := range o.rounds {
		t, err := s.trial(ctx, o.many/5)
		if err != nil {
			return err
		}
		c.row(s.name, o.many/5, i, t)
		few = append(few, t.up)
	}
	beside := len(c.floors) == 0
	var ups, gone, writes []float64
	left := 0
	for i := range o.rounds {
		if beside {
			floor, err := c.floor(ctx, o.many)
			if err != nil {
				return err
			}
			c.row("systemd", o.many, i, floor)
			c.floors = append(c.floors, floor.up)
		}
		t, err := s.trial(ctx, o.many)
		if err != nil {
			return err
		}
		c.row(s.name, o.many, i, t)
		b.Printf("           store: %s; returned after %.2f of systemd's time, up after %.2f\n",
			s.words(t.writes), t.returned/c.floors[i], t.up/c.floors[i])
		ups, gone, writes, left = append(ups, t.up), append(gone, t.gone), append(writes, t.writes.writes()), left+t.left
	}
	up := harness.Median(ups)
	s.figure(figure{what: "1 unit up, median", value: harness.Median(one), unit: " s"}, barOne)
	s.figure(figure{what: fmt.Sprintf("%d units up, median", o.many/5), value: harness.Median(few), unit: " s"}, noBar)
	s.figure(figure{what: fmt.Sprintf("%d units up, median", o.many), value: up, unit: " s"}, noBar)
	s.figure(figure{what: fmt.Sprintf("%d units up, median, in times of systemd alone", o.many), value: up / harness.Median(c.floors)}, barFloor)
	s.figure(figure{what: fmt.Sprintf("%d units destroyed and gone, median", o.many), value: harness.Median(gone), unit: " s", least: left > 0}, barGone)
	s.figure(figure{what: fmt.Sprintf("store writes for %d starts, median", o.many), value: harness.Median(writes)}, barWrites)
	if err := atRest(ctx, b, o, s); err != nil {
		return err
	}
	if len(c.nodes) > 1 {
		return failover(ctx, b, o, s)
	}
	return nil
}

// row prints one trial.
func (c *cluster) row(who string, units, round int, t trial) {
	c.bench.Printf("%-10s %5d  %5d  %6.3f  %6.3f    %6.3f  %6.3f", who, units, round+1, t.first, t.up, t.returned, t.gone)
	if t.left > 0 {
		c.bench.Printf(" and %d still there", t.left)
	}
	c.bench.Printf("\n")
}

// compare prints what both were measured for.
func compare(b *harness.Bench, theirs, ours *system) {
	b.Printf("\n%-50s %12s %12s   %s/%s\n", "", theirs.name, ours.name, theirs.name, ours.name)
	for i, f := range theirs.figures {
		more, ratio := "", "-"
		if f.least {
			more = "> "
		}
		if value := ours.figures[i].value; value > 0 {
			ratio = fmt.Sprintf("%s%.3g", more, f.value/value)
		}
		b.Printf("%-50s %12s %12s   %s\n", f.what, more+fmt.Sprintf("%.3g", f.value)+f.unit, fmt.Sprintf("%.3g", ours.figures[i].value)+f.unit, ratio)
	}
}

// atRest starts the most units and watches; they stay.
func atRest(ctx context.Context, b *harness.Bench, o options, s *system) error {
	if _, err := s.start(ctx, o.many); err != nil {
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
	daemons, stores := shares(before.daemons, after.daemons, o.idle), shares(before.stores, after.stores, o.idle)
	b.Printf("at rest with %d units for %s: store %s\n", o.many, o.idle, s.words(writes))
	b.Printf("           cores: daemons %s, store %s\n", harness.Join(daemons, "%.4f"), harness.Join(stores, "%.4f"))
	s.figure(figure{what: "writes to the store per unit at rest", value: writes.writes() / float64(o.many)}, 0)
	s.figure(figure{what: "CPU of the busiest node process at rest", value: slices.Max(daemons), unit: " cores"}, barIdle)
	for _, verb := range []string{"list-units", "list-unit-files"} {
		var took, nothing []float64
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
			began = time.Now()
			if _, err := s.output(ctx, "version"); err != nil {
				return err
			}
			nothing = append(nothing, time.Since(began).Seconds())
		}
		b.Printf("%s   of which the start of the program, as of one that only says its version: %.4f\n", verb, harness.Median(nothing))
		b.Printf("%s   raw %s\n", verb, harness.Join(took, "%.4f"))
		s.figure(figure{what: fmt.Sprintf("%s of %d units, median", verb, o.many), value: harness.Median(took), unit: " s"}, barList)
	}
	return nil
}

// shares returns what each of some processes has used, in cores.
func shares(before, after []time.Duration, d time.Duration) []float64 {
	list := make([]float64, len(after))
	for i := range list {
		list[i] = (after[i] - before[i]).Seconds() / d.Seconds()
	}
	return list
}

// failover cuts the power of the last node, waits for its units and switches it
// on again.
func failover(ctx context.Context, b *harness.Bench, o options, s *system) (err error) {
	c := s.cluster
	victim := c.nodes[len(c.nodes)-1]
	before, err := c.watch()
	if err != nil {
		return err
	}
	had := len(before.here)
	defer func() {
		on := context.WithoutCancel(ctx)
		err = errors.Join(err, c.cli(on, "cluster", "power", "--cluster", c.name, victim.Name, "on"))
		if err == nil {
			err = c.booted(on, victim)
		}
	}()
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
	s.figure(figure{what: "units of a dead node up again", value: all, unit: " s"}, barFailover)
	return nil
}
