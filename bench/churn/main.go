// Command churn measures requests that fail, and what control costs, while
// endpoints come and go under load.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"golang.org/x/sync/errgroup"

	"flotilla/bench/harness"
)

const (
	claim = "failed requests and cost of control while endpoints come and go"
	// Networks 127.<n>.0.0/16 of the node, of the endpoints that are asked and of
	// the others.
	nodeNet, endpointNet, bulkNet = 86, 87, 88
	asked                         = 100 // services that get requests and changes
	rate                          = 500 // requests in a second
	clients                       = 20
	closeAfter                    = time.Second // from the removal of an endpoint to the end of its process
	fast                          = 100         // changes in a second that the bars are for
	barCores                      = 0.2
)

func main() {
	length := flag.Duration("length", 30*time.Second, "of each measurement")
	rounds := flag.Int("rounds", 3, "measurements of each kind")
	harness.Main("churn", claim, func(ctx context.Context, b *harness.Bench) error {
		if b.Quick {
			*length, *rounds = 5*time.Second, 1
		}
		return run(ctx, b, *length, *rounds)
	})
}

func run(ctx context.Context, b *harness.Bench, length time.Duration, rounds int) error {
	b.Printf("setup    one node with its own store; %d services of 3 endpoints are asked %d times a second by %d clients: keep-alive\n", asked, rate, clients)
	b.Printf("         or a connection for each request, GET or POST in turn; no client tries anything twice\n")
	b.Printf("change   in turn: a new endpoint listens and its key is put; the key of an endpoint is deleted and %v later\n", closeAfter)
	b.Printf("         its listener and all its connections close\n")
	b.Printf("failed   no answer, an answer other than 200, or one by another service's endpoint\n")
	b.Printf("control  CPU of the node process and what HAProxy uses beyond the median of the rounds without changes, in cores\n")
	sizes := []int{asked, 10000}
	if b.Quick {
		sizes = sizes[:1]
	}
	for _, n := range sizes {
		b.Logf("%d services", n)
		if err := size(ctx, b, n, length, rounds); err != nil {
			return fmt.Errorf("%d services: %w", n, err)
		}
	}
	return nil
}

// round is the result of one measurement.
type round struct {
	changes              int
	load                 *load
	node, haproxy, store float64 // cores
}

func size(ctx context.Context, b *harness.Bench, services int, length time.Duration, rounds int) (err error) {
	cluster, err := b.StartCluster(ctx, nodeNet, 1)
	defer func() { err = errors.Join(err, cluster.Stop(), os.RemoveAll(filepath.Join(b.Dir, "n1"))) }()
	if err != nil {
		return err
	}
	s := &swarm{cluster: cluster, live: make([][]member, asked)}
	defer func() { err = errors.Join(err, s.close()) }()
	if err := s.populate(ctx, services); err != nil {
		return err
	}
	before, err := cluster.Reloads(ctx)
	if err != nil {
		return err
	}
	b.Printf("\n%d services\nchanges/s  round  requests  failed  p50 ms  p99 ms  max ms  changes  node  haproxy  store (cores)\n", services)
	rates := []int{0, 10, fast}
	results := map[int][]round{}
	for i := range rounds {
		for _, r := range rates {
			got, err := measure(ctx, s, r, length)
			if err != nil {
				return err
			}
			results[r] = append(results[r], got)
			ms := got.load.ms
			b.Printf("%9d  %5d  %8d  %6d  %6.2f  %6.2f  %6.1f  %7d  %.3f    %.3f  %.3f\n", r, i+1, got.load.sent, got.load.failed,
				harness.Median(ms), harness.Percentile(ms, 99), harness.Percentile(ms, 100), got.changes, got.node, got.haproxy, got.store)
			for _, f := range got.load.failures {
				b.Printf("           %s\n", f)
			}
		}
	}
	after, err := cluster.Reloads(ctx)
	if err != nil {
		return err
	}
	var quiet []float64
	for _, r := range results[0] {
		quiet = append(quiet, r.haproxy)
	}
	for _, r := range rates[1:] {
		var control []float64
		failed, sent := 0, 0
		for _, got := range results[r] {
			control = append(control, got.node+max(0, got.haproxy-harness.Median(quiet)))
			failed, sent = failed+got.load.failed, sent+got.load.sent
		}
		b.Printf("control at %d changes/s: median %.3f cores  raw %s\n", r, harness.Median(control), harness.Join(control, "%.3f"))
		b.AtMost(fmt.Sprintf("failed of %d requests at %d changes/s, %d services", sent, r, services), float64(failed), 0, "")
		if r == fast {
			b.AtMost(fmt.Sprintf("control at %d changes/s, %d services", r, services), harness.Median(control), barCores, " cores")
		}
	}
	b.AtMost(fmt.Sprintf("HAProxy reloads, %d services", services), float64(after-before), 0, "")
	return nil
}

// measure keeps the load and the changes up for length.
func measure(ctx context.Context, s *swarm, changes int, length time.Duration) (round, error) {
	node := s.cluster.Nodes[0]
	before, err := node.Costs()
	if err != nil {
		return round{}, err
	}
	began := time.Now()
	done := began.Add(length)
	r := round{load: &load{}}
	g, gctx := errgroup.WithContext(ctx)
	for i := range clients {
		g.Go(func() error { return r.load.run(gctx, node.Address, i, done) })
	}
	g.Go(func() (err error) {
		r.changes, err = s.churn(gctx, changes, done)
		return err
	})
	if err := g.Wait(); err != nil {
		return r, err
	}
	took := time.Since(began).Seconds()
	after, err := node.Costs()
	r.node = (after.Node.CPU - before.Node.CPU).Seconds() / took
	r.haproxy = (after.HAProxy.CPU - before.HAProxy.CPU).Seconds() / took
	r.store = (after.Store.CPU - before.Store.CPU).Seconds() / took
	return r, err
}

// load counts requests and what went wrong with them.
type load struct {
	mu           sync.Mutex // guards all below
	sent, failed int
	ms           []float64
	failures     []string // the first few
}

// run asks random services, one request after the other, at client i's share of
// the rate.
func (l *load) run(ctx context.Context, address string, i int, done time.Time) error {
	c := &harness.Client{Address: address, KeepAlive: i%2 == 0}
	defer c.Close()
	method := http.MethodGet
	if i/2%2 == 1 {
		method = http.MethodPost
	}
	every := time.Second * clients / rate
	// Clients do not keep step with each other.
	if err := harness.Pause(ctx, rand.N(every)); err != nil {
		return err
	}
	tick := time.NewTicker(every)
	defer tick.Stop()
	for time.Now().Before(done) {
		name := harness.ServiceName(rand.IntN(asked))
		began := time.Now()
		status, body, err := c.Do(method, name)
		l.count(time.Since(began), method, name, status, body, err)
		select {
		case <-tick.C:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return nil
}

func (l *load) count(took time.Duration, method, name string, status int, body string, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.sent++
	l.ms = append(l.ms, took.Seconds()*1000)
	if err == nil && status == http.StatusOK && strings.HasPrefix(body, name+"/") {
		return
	}
	l.failed++
	if len(l.failures) < 5 {
		l.failures = append(l.failures, fmt.Sprintf("%s %s after %v: %d %.60q %v", method, name, took, status, body, err))
	}
}

// swarm is the endpoints of the services that are asked.
type swarm struct {
	cluster *harness.Cluster
	next    int        // number of the next endpoint, never used twice
	live    [][]member // by service, oldest first
	leaving errgroup.Group
}

type member struct {
	n      string // in the key
	server *harness.Endpoint
}

func (m member) key(service int) string {
	return harness.EndpointKey(harness.ServiceName(service), m.n)
}

func (m member) put(service int) clientv3.Op {
	return clientv3.OpPut(m.key(service), m.server.Address)
}

// start starts an endpoint of the service.
func (s *swarm) start(service int) (member, error) {
	s.next++
	n := fmt.Sprint(s.next)
	e, err := harness.Serve(harness.EndpointAddress(endpointNet, s.next), harness.ServiceName(service)+"/"+n)
	m := member{n, e}
	if err == nil {
		s.live[service] = append(s.live[service], m)
	}
	return m, err
}

// populate makes all services and waits until they are routed.
func (s *swarm) populate(ctx context.Context, services int) error {
	revision, err := s.cluster.PutServices(ctx, asked, services, func(service, n int) string {
		return harness.EndpointAddress(bulkNet, service*3+n)
	})
	if err != nil {
		return err
	}
	for i := range asked {
		ops := harness.ServiceOps(harness.ServiceName(i))
		for range 3 {
			m, err := s.start(i)
			if err != nil {
				return err
			}
			ops = append(ops, m.put(i))
		}
		resp, err := s.cluster.Store.Txn(ctx).Then(ops...).Commit()
		if err != nil {
			return err
		}
		revision = resp.Header.Revision
	}
	return s.cluster.Settle(ctx, revision)
}

// churn makes changes of random services until done, and returns how many.
func (s *swarm) churn(ctx context.Context, rate int, done time.Time) (int, error) {
	if rate == 0 {
		return 0, nil
	}
	tick := time.NewTicker(time.Second / time.Duration(rate))
	defer tick.Stop()
	changes := 0
	service := 0
	for ; time.Now().Before(done); changes++ {
		if changes%2 == 0 {
			service = rand.IntN(asked)
			m, err := s.start(service)
			if err != nil {
				return changes, err
			}
			if _, err := s.cluster.Store.Do(ctx, m.put(service)); err != nil {
				return changes, err
			}
		} else {
			m := s.live[service][0]
			s.live[service] = s.live[service][1:]
			if _, err := s.cluster.Store.Do(ctx, clientv3.OpDelete(m.key(service))); err != nil {
				return changes, err
			}
			s.leaving.Go(func() error {
				time.Sleep(closeAfter)
				return m.server.Close()
			})
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return changes, ctx.Err()
		}
	}
	return changes, nil
}

// close ends all endpoints.
func (s *swarm) close() error {
	err := s.leaving.Wait()
	for _, members := range s.live {
		for _, m := range members {
			err = errors.Join(err, m.server.Close())
		}
	}
	return err
}
