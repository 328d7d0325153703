// Command throughput measures what routing costs: requests per second and CPU per
// request of a node's HAProxy beside the same HAProxy with one static backend.
package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"flotilla/bench/harness"
)

const (
	claim = "requests per second and CPU per request through a node's router beside the same HAProxy with one static backend"
	// Networks 127.<n>.0.0/16 of the node, of the static HAProxy and of the endpoints.
	nodeNet, staticNet, endpointNet = 91, 92, 93
	connections                     = 64
	bar                             = 0.95
)

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

// Every endpoint is one of three addresses of one HAProxy that answers 1 KiB
// itself. What matters for the routers is how many servers they have and use.
func endpoint(service, n int) string {
	return fmt.Sprintf("127.%d.1.%d:9000", endpointNet, (service+n)%3+1)
}

const originConfig = `
global
    nbthread 1
    maxconn 9900
defaults
    mode http
    timeout client 60s
    timeout connect 5s
    timeout server 60s
frontend origin
    bind 127.%[1]d.1.1:9000
    bind 127.%[1]d.1.2:9000
    bind 127.%[1]d.1.3:9000
    http-request return status 200 content-type text/plain file %[2]s
`

// staticConfig sends everything to one backend, with the timeouts and the handling
// of connections that the node's HAProxy has. Unless it is bare it also does what
// the node's HAProxy does to every request apart from routing it: it sets the
// X-Forwarded headers and keeps safe requests for a second attempt.
func staticConfig(port, servers int, bare bool) string {
	var b strings.Builder
	fmt.Fprintf(&b, `
global
    maxconn 8000
defaults
    mode http
    balance leastconn
    timeout connect 2s
    timeout client 60s
    timeout server 60s
    timeout queue 5s
    timeout http-request 10s
    timeout http-keep-alive 30s
    retries 3
    option redispatch 1
    option http-keep-alive
    http-reuse safe
frontend http
    bind 127.%d.0.1:%d
`, staticNet, port)
	if !bare {
		b.WriteString(`    option forwardfor
    http-request del-header x-forwarded- -m beg
    http-request del-header forwarded
    http-request add-header x-forwarded-proto http
    http-request add-header x-forwarded-port %[dst_port]
    http-request disable-l7-retry unless { method GET HEAD OPTIONS PUT DELETE }
`)
	}
	b.WriteString("    default_backend only\nbackend only\n")
	if !bare {
		b.WriteString("    retry-on conn-failure empty-response junk-response 0rtt-rejected\n")
	}
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

func run(ctx context.Context, b *harness.Bench, length time.Duration, rounds int) (err error) {
	page := filepath.Join(b.Dir, "page")
	if err := os.WriteFile(page, bytes.Repeat([]byte("flotilla"), 128), 0o644); err != nil {
		return err
	}
	origin, err := static(b, "origin", fmt.Sprintf(originConfig, endpointNet, page))
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
	var node *harness.Cluster
	defer func() {
		if node != nil {
			err = errors.Join(err, node.Stop())
		}
	}()
	services := 0
	var verdicts []func()
	for _, c := range cases {
		if node == nil {
			if node, err = b.StartCluster(ctx, nodeNet, 1); err != nil {
				return err
			}
		}
		if c.services > services {
			revision, err := node.PutServices(ctx, services, c.services, endpoint)
			if err != nil {
				return err
			}
			if err := node.Settle(ctx, revision); err != nil {
				return err
			}
			services = c.services
		}
		b.Logf("%d services, %d asked", c.services, c.asked)
		v, err := compare(ctx, b, node.Nodes[0], c.services, c.asked, length, rounds)
		if err != nil {
			return fmt.Errorf("%d services, %d asked: %w", c.services, c.asked, err)
		}
		verdicts = append(verdicts, v)
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

// compare runs the rounds of one case and returns the verdict on it.
func compare(ctx context.Context, b *harness.Bench, node *harness.Node, services, asked int, length time.Duration, rounds int) (verdict func(), err error) {
	systems := []*system{
		{name: "flotilla", address: node.Address, usage: func() (harness.Usage, error) {
			c, err := node.Costs()
			return c.HAProxy, err
		}},
	}
	for i, name := range []string{"static", "bare"} {
		p, err := static(b, name, staticConfig(8001+i, asked*3, name == "bare"))
		if err != nil {
			return nil, err
		}
		defer func() { err = errors.Join(err, p.Stop()) }()
		systems = append(systems, &system{
			name: name, address: fmt.Sprintf("127.%d.0.1:%d", staticNet, 8001+i),
			usage: func() (harness.Usage, error) { return harness.ProcessUsage(p.Pid, false) },
		})
	}
	script, names, err := hosts(b.Dir, services, asked)
	if err != nil {
		return nil, err
	}
	for _, s := range systems { // started, and answering for each name
		client := &harness.Client{Address: s.address, KeepAlive: true}
		wait, cancel := context.WithTimeout(ctx, 30*time.Second)
		for _, n := range names {
			if _, err = client.Until(wait, n, ""); err != nil {
				break
			}
		}
		client.Close()
		cancel()
		if err != nil {
			return nil, err
		}
	}
	b.Printf("\n%d services, %d asked, %d servers in use\nsystem    round  requests/s  cpu us/request  p99 ms\n", services, asked, asked*3)
	for i := range rounds + 1 {
		for _, s := range systems {
			if err := s.round(ctx, script, length); err != nil {
				return nil, fmt.Errorf("%s: %w", s.name, err)
			}
			if i == 0 { // connections and caches are cold
				s.perSecond, s.micros, s.p99 = nil, nil, nil
				continue
			}
			b.Printf("%-8s  %5d  %10.0f  %14.2f  %6.2f\n", s.name, i, s.perSecond[i-1], s.micros[i-1], s.p99[i-1])
		}
	}
	ours := systems[0]
	for _, s := range systems {
		b.Printf("median    %-8s %.0f requests/s, %.2f us of CPU per request, p99 %.2f ms", s.name,
			harness.Median(s.perSecond), harness.Median(s.micros), harness.Median(s.p99))
		if s != ours {
			b.Printf("   flotilla: %.3f times its rate, %.3f times its CPU (medians of the rounds' ratios)",
				ratio(ours.perSecond, s.perSecond), ratio(ours.micros, s.micros))
		}
		b.Printf("\n")
	}
	return func() {
		b.AtLeast(fmt.Sprintf("requests/s at %d services, %d servers in use, of the static HAProxy's", services, asked*3),
			ratio(ours.perSecond, systems[1].perSecond), bar, "")
	}, nil
}

// ratio is the median of the rounds' ratios: what disturbs a round disturbs both.
func ratio(a, b []float64) float64 {
	var all []float64
	for i := range a {
		all = append(all, a[i]/b[i])
	}
	return harness.Median(all)
}

// hosts writes a wrk script that asks for random services of those asked, which
// are spread over all.
func hosts(dir string, services, asked int) (script string, names []string, err error) {
	for i := range asked {
		names = append(names, harness.ServiceName(i*(services/asked)))
	}
	var lua strings.Builder
	lua.WriteString("local names = {\n")
	for _, n := range names {
		fmt.Fprintf(&lua, "%q,\n", n)
	}
	lua.WriteString(`}
local requests = {}
init = function()
  for i, n in ipairs(names) do requests[i] = wrk.format("GET", "/", {Host = n}) end
end
request = function() return requests[math.random(#requests)] end
done = function(summary, latency)
  local e = summary.errors
  io.write(string.format("result %d %d %d %.3f\n", summary.requests, summary.duration,
    e.connect + e.read + e.write + e.status + e.timeout, latency:percentile(99) / 1000))
end
`)
	script = filepath.Join(dir, "hosts.lua")
	return script, names, os.WriteFile(script, []byte(lua.String()), 0o644)
}

// round puts the system under load once.
func (s *system) round(ctx context.Context, script string, length time.Duration) error {
	before, err := s.usage()
	if err != nil {
		return err
	}
	cmd := exec.CommandContext(ctx, "wrk", "-t1", fmt.Sprintf("-c%d", connections), fmt.Sprintf("-d%ds", int(length.Seconds())), "-s", script, "http://"+s.address+"/")
	out, err := cmd.CombinedOutput()
	if err != nil {
		return fmt.Errorf("wrk: %w: %s", err, out)
	}
	after, err := s.usage()
	if err != nil {
		return err
	}
	_, result, _ := strings.Cut(string(out), "result ")
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
