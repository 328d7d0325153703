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
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
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
		return onCluster(ctx, b, o, &harness.Machines{Binary: b.Binary, Name: o.on})
	}
	for _, n := range sizes {
		m := &harness.Machines{Binary: b.Binary, Name: fmt.Sprintf("b%dx%d", os.Getpid()%10000, n)}
		b.Logf("cluster %s of %d", m.Name, n)
		err := m.Up(ctx, n)
		if err == nil {
			err = onCluster(ctx, b, o, m)
		}
		if err = errors.Join(err, m.Down()); err != nil {
			return fmt.Errorf("%d nodes: %w", n, err)
		}
	}
	return nil
}

// onCluster measures everything on one cluster.
func onCluster(ctx context.Context, b *harness.Bench, o options, m *harness.Machines) error {
	if err := m.Refresh(ctx); err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(b.Dir, templateName), []byte(unitText()), 0o644); err != nil {
		return err
	}
	ours := flotilla(b, m)
	if err := ours.clear(ctx); err != nil {
		return err
	}
	b.Printf("\n%d node(s)\n", len(m.Nodes))
	floors, err := measure(ctx, o, ours, nil)
	if err != nil {
		return err
	}
	if err := ours.clear(ctx); err != nil || !o.fleet.given() {
		return err
	}
	b.Printf("\nfleet on %d node(s)\n", len(m.Nodes))
	f := &fleet{programs: o.fleet, ours: ours}
	theirs, err := f.up(ctx)
	if err == nil {
		_, err = measure(ctx, o, theirs, floors)
	}
	if err = errors.Join(err, f.down()); err != nil {
		return fmt.Errorf("fleet: %w", err)
	}
	compare(b, theirs, ours)
	return nil
}

// measure measures one system. Without floors it measures beside it how long systemd
// alone needs for the most units, in each round, and returns that.
func measure(ctx context.Context, o options, s *system, floors []float64) ([]float64, error) {
	s.Printf("%-10s units  round   first      up  returned    gone\n", "")
	beside := floors == nil
	var ups [3][]float64
	var gone, writes []float64
	left := 0
	for size, n := range []int{1, o.many / 5, o.many} {
		rounds := o.rounds
		if n == 1 {
			rounds = 2*o.rounds + 1
		}
		for i := range rounds {
			if n == o.many && beside {
				t, err := floor(ctx, s, n)
				if err != nil {
					return nil, err
				}
				s.row("systemd", n, i, t)
				floors = append(floors, t.start.all)
			}
			t, err := s.trial(ctx, n)
			if err != nil {
				return nil, err
			}
			s.row(s.name, n, i, t)
			ups[size] = append(ups[size], t.start.all)
			if n == o.many {
				s.Printf("           store: %s; returned after %.2f of systemd's time, up after %.2f\n",
					s.words(t.before, t.after), t.start.returned/floors[i], t.start.all/floors[i])
				gone, writes, left = append(gone, t.gone), append(writes, t.after[0]-t.before[0]), left+t.left
			}
		}
	}
	up := harness.Median(ups[2])
	s.figure(figure{what: "1 unit up, median", value: harness.Median(ups[0]), unit: " s"}, barOne)
	s.figure(figure{what: fmt.Sprintf("%d units up, median", o.many/5), value: harness.Median(ups[1]), unit: " s"}, noBar)
	s.figure(figure{what: fmt.Sprintf("%d units up, median", o.many), value: up, unit: " s"}, noBar)
	s.figure(figure{what: fmt.Sprintf("%d units up, median, in times of systemd alone", o.many), value: up / harness.Median(floors)}, barFloor)
	s.figure(figure{what: fmt.Sprintf("%d units destroyed and gone, median", o.many), value: harness.Median(gone), unit: " s", least: left > 0}, barGone)
	s.figure(figure{what: fmt.Sprintf("store writes for %d starts, median", o.many), value: harness.Median(writes)}, barWrites)
	if err := atRest(ctx, o, s); err != nil {
		return nil, err
	}
	if len(s.machines.Nodes) > 1 {
		return floors, failover(ctx, o, s)
	}
	return floors, nil
}

// row prints one trial.
func (s *system) row(who string, units, round int, t trial) {
	s.Printf("%-10s %5d  %5d  %6.3f  %6.3f    %6.3f  %6.3f", who, units, round+1, t.start.first, t.start.all, t.start.returned, t.gone)
	if t.left > 0 {
		s.Printf(" and %d still there", t.left)
	}
	s.Printf("\n")
}

// floor is what systemd alone needs for n units, on all nodes at once, a share each.
// What it is asked to do counts from when the first node's shell begins with it.
func floor(ctx context.Context, s *system, n int) (t trial, err error) {
	everywhere := func(ctx context.Context, script string) ([]string, error) {
		return s.machines.Everywhere(ctx, func(i int) string {
			return fmt.Sprintf("date +%%s%%N; n=%d\n%s", (n+len(s.machines.Nodes)-1-i)/len(s.machines.Nodes), script)
		})
	}
	_, err = everywhere(ctx, "systemctl stop flotilla-node; rm -rf /run/floor; mkdir /run/floor; cd /run/floor\n"+
		"for i in $(seq $n); do cat >floor$i.service <<'END'\n"+unitText()+"END\ndone")
	if err != nil {
		return t, err
	}
	defer func() {
		again := context.WithoutCancel(ctx)
		_, failed := everywhere(again, "rm -rf /run/floor; systemctl start flotilla-node")
		if err = errors.Join(err, failed); err == nil {
			err = harness.Listed(again, len(s.machines.Nodes), s.machines.Command)
		}
	}()
	timedEverywhere := func(n int, script string) (timing, error) {
		var outs []string
		t, err := timed(ctx, n, upLimit, func() (err error) {
			outs, err = everywhere(ctx, "cd /run/floor; "+script)
			return err
		})
		late := math.Inf(1)
		for _, out := range outs {
			var began int64
			if _, bad := fmt.Sscan(out, &began); bad != nil {
				err = errors.Join(err, fmt.Errorf("when a shell began: %w", bad))
			}
			late = min(late, time.Unix(0, began).Sub(t.began).Seconds())
		}
		t.first, t.all, t.returned = t.first-late, t.all-late, t.returned-late
		return t, errors.Join(err, t.failed)
	}
	t.start, err = timedEverywhere(n, "systemctl link --runtime $PWD/*.service 2>/dev/null; systemctl daemon-reload; systemctl start --no-block $(ls)")
	if err != nil {
		return t, err
	}
	end, err := timedEverywhere(0, "systemctl stop $(ls); systemctl disable --runtime $(ls) 2>/dev/null; systemctl daemon-reload")
	t.gone = end.all
	return t, err
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
func atRest(ctx context.Context, o options, s *system) error {
	if _, err := s.start(ctx, o.many); err != nil {
		return err
	}
	s.Logf("at rest for %s", o.idle)
	read := func() (counts []float64, daemons, stores []time.Duration, err error) {
		if counts, err = s.counted(ctx); err == nil {
			daemons, stores, err = s.used()
		}
		return counts, daemons, stores, err
	}
	counts, daemons, stores, err := read()
	if err != nil {
		return err
	}
	if err := harness.Pause(ctx, o.idle); err != nil {
		return err
	}
	countsAfter, daemonsAfter, storesAfter, err := read()
	if err != nil {
		return err
	}
	cores := shares(daemons, daemonsAfter, o.idle)
	s.Printf("at rest with %d units for %s: store %s\n", o.many, o.idle, s.words(counts, countsAfter))
	s.Printf("           cores: daemons %s, store %s\n", harness.Join(cores, "%.4f"), harness.Join(shares(stores, storesAfter, o.idle), "%.4f"))
	s.figure(figure{what: "writes to the store per unit at rest", value: (countsAfter[0] - counts[0]) / float64(o.many)}, 0)
	s.figure(figure{what: "CPU of the busiest node process at rest", value: slices.Max(cores), unit: " cores"}, barIdle)
	for _, verb := range []string{"list-units", "list-unit-files"} {
		var took, nothing []float64
		for range 9 {
			began := time.Now()
			lines, err := s.output(ctx, verb, "--no-legend")
			if err != nil {
				return err
			}
			if n := strings.Count(lines, "\n"); n != o.many {
				return fmt.Errorf("%s has %d lines, not %d", verb, n, o.many)
			}
			took = append(took, time.Since(began).Seconds())
			began = time.Now()
			if _, err := s.output(ctx, "version"); err != nil {
				return err
			}
			nothing = append(nothing, time.Since(began).Seconds())
		}
		s.Printf("%s   of which the start of the program, as of one that only says its version: %.4f\n", verb, harness.Median(nothing))
		s.Printf("%s   raw %s\n", verb, harness.Join(took, "%.4f"))
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
func failover(ctx context.Context, o options, s *system) (err error) {
	victim := s.machines.Nodes[len(s.machines.Nodes)-1]
	w, err := watching()
	if err != nil {
		return err
	}
	defer func() {
		err = errors.Join(err, w.proc.Close(), s.machines.Power(context.WithoutCancel(ctx), victim, "on"))
	}()
	had := len(w.here)
	began := time.Now()
	if err := s.machines.Power(ctx, victim, "cut"); err != nil {
		return err
	}
	cut := time.Since(began).Seconds()
	if err := w.scan(); err != nil {
		return err
	}
	lost := had - len(w.here)
	first, all, err := w.until(ctx, began, o.many, failoverLimit)
	if err != nil {
		return err
	}
	s.Printf("failover   %s of %d nodes cut (the command took %.2f s), %d of %d units lost: first up after %.2f, all after %.2f\n",
		victim.Name, len(s.machines.Nodes), cut, lost, had, first, all)
	s.figure(figure{what: "units of a dead node up again", value: all, unit: " s"}, barFailover)
	return nil
}
