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
	harness.Span
	load    load
	changes int
}

func size(ctx context.Context, b *harness.Bench, services int, length time.Duration, rounds int) (err error) {
	cluster, err := b.StartCluster(ctx, nodeNet, 1)
	defer func() { err = errors.Join(err, cluster.Stop()) }()
	if err != nil {
		return err
	}
	s := &swarm{cluster: cluster, live: make([][]member, asked)}
	defer func() { err = errors.Join(err, s.close()) }()
	if err := s.populate(ctx, services); err != nil {
		return err
	}
	b.Printf("\n%d services\nchanges/s  round  requests  failed  p50 ms  p99 ms  max ms  changes  node  haproxy  store (cores)\n", services)
	rates := []int{0, 10, fast}
	results := map[int][]*round{}
	all, err := cluster.During(ctx, func() error {
		for i := range rounds {
			for _, rate := range rates {
				r, err := measure(ctx, s, rate, length)
				if err != nil {
					return err
				}
				results[rate] = append(results[rate], r)
				ms := r.load.ms
				b.Printf("%9d  %5d  %8d  %6d  %6.2f  %6.2f  %6.1f  %7d  %.3f    %.3f  %.3f\n", rate, i+1, len(ms), r.load.failed,
					harness.Median(ms), harness.Percentile(ms, 99), harness.Percentile(ms, 100), r.changes,
					r.Cores(harness.NodePart), r.Cores(harness.HAProxyPart), r.Cores(harness.StorePart))
				for _, f := range r.load.failures {
					b.Printf("           %s\n", f)
				}
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	var quiet []float64
	for _, r := range results[0] {
		quiet = append(quiet, r.Cores(harness.HAProxyPart))
	}
	for _, rate := range rates[1:] {
		var control []float64
		failed, sent := 0, 0
		for _, r := range results[rate] {
			control = append(control, r.Cores(harness.NodePart)+max(0, r.Cores(harness.HAProxyPart)-harness.Median(quiet)))
			failed, sent = failed+r.load.failed, sent+len(r.load.ms)
		}
		b.Printf("control at %d changes/s: median %.3f cores  raw %s\n", rate, harness.Median(control), harness.Join(control, "%.3f"))
		b.AtMost(fmt.Sprintf("failed of %d requests at %d changes/s, %d services", sent, rate, services), float64(failed), 0, "")
		if rate == fast {
			b.AtMost(fmt.Sprintf("control at %d changes/s, %d services", rate, services), harness.Median(control), barCores, " cores")
		}
	}
	b.AtMost(fmt.Sprintf("HAProxy reloads, %d services", services), float64(all.Reloads), 0, "")
	return nil
}

// measure keeps the load and the changes up for length.
func measure(ctx context.Context, s *swarm, changes int, length time.Duration) (r *round, err error) {
	r = &round{}
	r.Span, err = s.cluster.During(ctx, func() error {
		g, ctx := errgroup.WithContext(ctx)
		for i := range clients {
			g.Go(func() error { return r.load.run(ctx, s.cluster.Nodes[0].Address, i, length) })
		}
		if changes > 0 {
			g.Go(func() error {
				return harness.Every(ctx, time.Second/time.Duration(changes), length, func() error {
					r.changes++
					return s.change(ctx, r.changes)
				})
			})
		}
		return g.Wait()
	})
	return r, err
}

// load counts requests and what went wrong with them.
type load struct {
	mu       sync.Mutex // guards all below
	ms       []float64  // of each request
	failed   int
	failures []string // the first few
}

// run asks random services, one request after the other, at client i's share of
// the rate.
func (l *load) run(ctx context.Context, address string, i int, length time.Duration) error {
	c := &harness.Client{Address: address, KeepAlive: i%2 == 0}
	defer c.Close()
	method := http.MethodGet
	if i/2%2 == 1 {
		method = http.MethodPost
	}
	every := time.Second * clients / rate
	late := rand.N(every) // clients do not keep step with each other
	if err := harness.Pause(ctx, late); err != nil {
		return err
	}
	return harness.Every(ctx, every, length-late, func() error {
		name := harness.ServiceName(rand.IntN(asked))
		began := time.Now()
		status, body, err := c.Do(method, name)
		l.count(time.Since(began), method, name, status, body, err)
		return nil
	})
}

func (l *load) count(took time.Duration, method, name string, status int, body string, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
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
	cluster  *harness.Cluster
	next     int        // number of the next endpoint, never used twice
	live     [][]member // by service, oldest first
	changing int        // the service of the last change
	leaving  errgroup.Group
}

// member is one of them; its key ends with n.
type member struct {
	n      string
	server *harness.Endpoint
}

// start starts an endpoint of the service, and returns what puts it into the store.
func (s *swarm) start(service int) (put clientv3.Op, err error) {
	s.next++
	n := fmt.Sprint(s.next)
	e, err := harness.Serve(harness.EndpointAddress(endpointNet, s.next), harness.ServiceName(service)+"/"+n)
	if err != nil {
		return put, err
	}
	s.live[service] = append(s.live[service], member{n, e})
	return clientv3.OpPut(harness.EndpointKey(harness.ServiceName(service), n), e.Address), nil
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
		ops := harness.ServiceOps("", harness.ServiceName(i))
		for range 3 {
			put, err := s.start(i)
			if err != nil {
				return err
			}
			ops = append(ops, put)
		}
		resp, err := s.cluster.Store.Txn(ctx).Then(ops...).Commit()
		if err != nil {
			return err
		}
		revision = resp.Header.Revision
	}
	return s.cluster.Settle(ctx, revision)
}

// change makes a change of a random service: in turn one endpoint more, and one
// less of the same service.
func (s *swarm) change(ctx context.Context, turn int) error {
	if turn%2 == 1 {
		s.changing = rand.IntN(asked)
		put, err := s.start(s.changing)
		if err == nil {
			_, err = s.cluster.Store.Do(ctx, put)
		}
		return err
	}
	oldest := s.live[s.changing][0]
	s.live[s.changing] = s.live[s.changing][1:]
	_, err := s.cluster.Store.Delete(ctx, harness.EndpointKey(harness.ServiceName(s.changing), oldest.n))
	s.leaving.Go(func() error {
		time.Sleep(closeAfter)
		return oldest.server.Close()
	})
	return err
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
