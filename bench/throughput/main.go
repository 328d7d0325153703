// Command throughput measures what routing costs: requests per second and CPU per
// request of a node's HAProxy beside the same HAProxy with one static backend.
package main

import (
	"bytes"
	"context"
	_ "embed"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"flotilla/bench/harness"
)

const (
	claim = "requests per second and CPU per request through a node's router beside the same HAProxy with one static backend"
	// Networks 127.<n>.0.0/16 of the node and of the static HAProxy. That of the
	// endpoints is in origin.cfg.
	nodeNet, staticNet = 91, 92
	connections        = 64
	bar                = 0.95
)

//go:embed origin.cfg
var originConfig string

//go:embed static.cfg
var staticConfig string

//go:embed hosts.lua
var hostsScript []byte

func main() {
	length := flag.Duration("length", 6*time.Second, "of one round")
	rounds := flag.Int("rounds", 7, "rounds of each system")
	harness.Main("throughput", claim, func(ctx context.Context, b *harness.Bench) error {
		if b.Quick {
			*length, *rounds = 2*time.Second, 3
		}
		return run(ctx, b, *length, *rounds)
	})
}

// endpoint is an address of origin.cfg.
func endpoint(service, n int) string { return fmt.Sprintf("127.93.1.%d:9000", (service+n)%3+1) }

func run(ctx context.Context, b *harness.Bench, length time.Duration, rounds int) (err error) {
	page, script := filepath.Join(b.Dir, "page"), filepath.Join(b.Dir, "hosts.lua")
	err = errors.Join(os.WriteFile(page, bytes.Repeat([]byte("flotilla"), 128), 0o644), os.WriteFile(script, hostsScript, 0o644))
	if err != nil {
		return err
	}
	origin, err := static(b, "origin", strings.ReplaceAll(originConfig, "${PAGE}", page))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, origin.Stop()) }()
	b.Printf("setup    wrk, the router and the origin (one more HAProxy, 1 KiB answers, 1 thread) share this machine's cores\n")
	b.Printf("load     wrk -t1 -c%d -d%s, keep-alive, a random service of those asked in each request; rounds in turn\n", connections, length)
	b.Printf("static   one backend with as many servers as the asked services have; X-Forwarded headers and retries as the node's router has them\n")
	b.Printf("bare     the same without those headers and retries: what the least possible configuration reaches\n")
	// More servers in use would keep more idle connections than the origin takes.
	cases := []struct{ services, asked int }{{1, 1}, {10000, 1}, {10000, 100}, {10000, 300}}
	if b.Quick {
		cases = cases[:2]
		cases[1].services = 1000
	}
	cluster, err := b.StartCluster(ctx, nodeNet, 1)
	defer func() { err = errors.Join(err, cluster.Stop()) }()
	if err != nil {
		return err
	}
	var verdicts []func()
	services := 0
	for _, c := range cases {
		if c.services > services {
			revision, err := cluster.PutServices(ctx, services, c.services, endpoint)
			if err == nil {
				err = cluster.Settle(ctx, revision)
			}
			if err != nil {
				return err
			}
			services = c.services
		}
		b.Logf("%d services, %d asked", c.services, c.asked)
		ratio, err := compare(ctx, b, cluster.Nodes[0], script, c.services, c.asked, length, rounds)
		if err != nil {
			return fmt.Errorf("%d services, %d asked: %w", c.services, c.asked, err)
		}
		verdicts = append(verdicts, func() {
			b.AtLeast(fmt.Sprintf("requests/s at %d services, %d servers in use, of the static HAProxy's", c.services, c.asked*3), ratio, bar, "")
		})
	}
	b.Printf("\n")
	for _, v := range verdicts {
		v()
	}
	return nil
}

// static starts an HAProxy with a configuration of ours.
func static(b *harness.Bench, name, config string) (*harness.Process, error) {
	path := filepath.Join(b.Dir, name+".cfg")
	if err := os.WriteFile(path, []byte(config), 0o644); err != nil {
		return nil, err
	}
	return harness.Start(filepath.Join(b.Dir, name+".log"), b.HAProxy, "-db", "-f", path)
}

// one is the static HAProxy's configuration with as many servers; with mark in place
// of the + that its further lines begin with.
func one(address string, servers int, mark string) string {
	var b strings.Builder
	b.WriteString(strings.NewReplacer("${LISTEN}", address, "\n+", "\n"+mark).Replace(staticConfig))
	for i := range servers {
		fmt.Fprintf(&b, "    server s%d %s\n", i, endpoint(i/3, i%3+1))
	}
	return b.String()
}

// system is one HAProxy under load.
type system struct {
	name, address string
	usage         func() (harness.Usage, error)
	perSecond     []float64
	micros        []float64 // of CPU per request
	p99           []float64 // ms
}

// compare runs the rounds of one case and returns the ratio of our rate to the
// static HAProxy's.
func compare(ctx context.Context, b *harness.Bench, node *harness.Node, script string, services, asked int, length time.Duration, rounds int) (_ float64, err error) {
	ours := &system{name: "flotilla", address: node.Address, usage: func() (harness.Usage, error) {
		c, err := node.Costs()
		return c[harness.HAProxyPart], err
	}}
	systems := []*system{ours}
	for i, mark := range []string{" ", "#"} {
		s := &system{name: []string{"static", "bare"}[i], address: fmt.Sprintf("127.%d.0.1:%d", staticNet, 8001+i)}
		p, err := static(b, s.name, one(s.address, asked*3, mark))
		if err != nil {
			return 0, err
		}
		defer func() { err = errors.Join(err, p.Stop()) }()
		s.usage = func() (harness.Usage, error) { return harness.ProcessUsage(p.Pid, false) }
		systems = append(systems, s)
	}
	for _, s := range systems { // started, and answering for each name
		if err := s.answers(ctx, services, asked); err != nil {
			return 0, err
		}
	}
	b.Printf("\n%d services, %d asked, %d servers in use\nsystem    round  requests/s  cpu us/request  p99 ms\n", services, asked, asked*3)
	for i := range rounds + 1 {
		for _, s := range systems {
			err := s.round(ctx, "-t1", fmt.Sprintf("-c%d", connections), fmt.Sprintf("-d%ds", int(length.Seconds())), "-s", script,
				"http://"+s.address+"/", "--", strconv.Itoa(asked), strconv.Itoa(services/asked))
			if err != nil {
				return 0, fmt.Errorf("%s: %w", s.name, err)
			}
			if i == 0 { // connections and caches are cold
				s.perSecond, s.micros, s.p99 = nil, nil, nil
				continue
			}
			b.Printf("%-8s  %5d  %10.0f  %14.2f  %6.2f\n", s.name, i, s.perSecond[i-1], s.micros[i-1], s.p99[i-1])
		}
	}
	for _, s := range systems {
		b.Printf("median    %-8s %.0f requests/s, %.2f us of CPU per request, p99 %.2f ms", s.name,
			harness.Median(s.perSecond), harness.Median(s.micros), harness.Median(s.p99))
		if s != ours {
			b.Printf("   flotilla: %.3f times its rate, %.3f times its CPU (medians of the rounds' ratios)",
				ratio(ours.perSecond, s.perSecond), ratio(ours.micros, s.micros))
		}
		b.Printf("\n")
	}
	return ratio(ours.perSecond, systems[1].perSecond), nil
}

// ratio is the median of the rounds' ratios: what disturbs a round disturbs both.
func ratio(a, b []float64) float64 {
	var all []float64
	for i := range a {
		all = append(all, a[i]/b[i])
	}
	return harness.Median(all)
}

// answers waits until the system answers for each name that is asked.
func (s *system) answers(ctx context.Context, services, asked int) error {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	client := &harness.Client{Address: s.address, KeepAlive: true}
	defer client.Close()
	for i := range asked {
		if _, err := client.Until(ctx, harness.ServiceName(i*(services/asked)), ""); err != nil {
			return err
		}
	}
	return nil
}

// round puts the system under load once.
func (s *system) round(ctx context.Context, args ...string) error {
	before, err := s.usage()
	if err != nil {
		return err
	}
	out, err := harness.Output(exec.CommandContext(ctx, "wrk", args...))
	if err != nil {
		return err
	}
	after, err := s.usage()
	if err != nil {
		return err
	}
	_, result, _ := strings.Cut(out, "result ")
	var requests, micros, failed, p99 float64
	if _, err := fmt.Sscan(result, &requests, &micros, &failed, &p99); err != nil {
		return fmt.Errorf("wrk printed no result: %w: %s", err, out)
	}
	if failed > 0 || requests == 0 {
		return fmt.Errorf("%v of %v requests failed", failed, requests)
	}
	s.perSecond = append(s.perSecond, requests/micros*1e6)
	s.micros = append(s.micros, float64((after.CPU-before.CPU).Microseconds())/requests)
	s.p99 = append(s.p99, p99)
	return nil
}
