// Command propagation measures how long an acknowledged change in the store takes
// until every node routes by it.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"golang.org/x/sync/errgroup"

	"flotilla/bench/harness"
	"flotilla/internal/catalog"
)

const (
	claim = "from an acknowledged put to one store member to the first routed answer on all three nodes"
	nodes = 3
	// Networks 127.<n>.0.0/16 of the nodes, of the probed and of the other endpoints.
	nodeNet, probeNet, bulkNet = 81, 82, 83
	// bar is the 99th percentile at the largest size, in ms.
	bar = 25
)

func main() {
	samples := flag.Int("samples", 400, "changes of each kind at each size")
	harness.Main("propagation", claim, func(ctx context.Context, b *harness.Bench) error { return run(ctx, b, *samples) })
}

// bench is the running cluster and what watches it.
type bench struct {
	*harness.Bench
	cluster   *harness.Cluster
	probes    []*harness.Client
	endpoints []*harness.Endpoint
	turn      int // of newEndpoint
}

func run(ctx context.Context, hb *harness.Bench, samples int) (err error) {
	if hb.Quick {
		samples = min(samples, 40)
	}
	b := &bench{Bench: hb}
	b.Printf("setup    %d nodes, a store of %d members and %d HAProxys share this machine's cores with the probes\n", nodes, nodes, nodes)
	b.Printf("endpoint one transaction puts an endpoint and deletes the only other one; the answer names the new one\n")
	b.Printf("service  one transaction puts scheme and three endpoints of a new name; 404 before\n")
	b.Printf("sample   from the store's answer until the last of the three nodes gives that answer, in ms; each node is asked\n")
	b.Printf("         on a kept connection about once in 1 ms; 30 to 90 ms between samples\n")
	b.cluster, err = b.StartCluster(ctx, nodeNet, nodes)
	defer func() { err = errors.Join(err, b.cluster.Stop()) }()
	if err != nil {
		return err
	}
	for i, n := range b.cluster.Nodes {
		b.probes = append(b.probes, &harness.Client{Address: n.Address, KeepAlive: true})
		e, err := harness.Serve(harness.EndpointAddress(probeNet, i), fmt.Sprint(i))
		if err != nil {
			return err
		}
		b.endpoints = append(b.endpoints, e)
	}
	size := 0
	var verdicts []func()
	for _, n := range b.Sizes() {
		b.Logf("%d services", n)
		revision, err := b.cluster.PutServices(ctx, size, n, func(service, e int) string {
			return harness.EndpointAddress(bulkNet, (service*3+e)%60000)
		})
		if err != nil {
			return err
		}
		size = n
		if err := b.cluster.Settle(ctx, revision); err != nil {
			return err
		}
		before, err := b.cluster.Reloads(ctx)
		if err != nil {
			return err
		}
		b.Printf("\n%d services of 3 endpoints\n", n)
		for _, kind := range []struct {
			name   string
			sample func(context.Context, int) (float64, error)
		}{{"endpoint", b.newEndpoint}, {"service", b.newService}} {
			ms, err := b.collect(ctx, samples, kind.sample)
			if err != nil {
				return err
			}
			p99 := harness.Percentile(ms, 99)
			b.Printf("%-8s n %d  p50 %.2f  p90 %.2f  p99 %.2f  max %.2f ms\n", kind.name, len(ms),
				harness.Median(ms), harness.Percentile(ms, 90), p99, harness.Percentile(ms, 100))
			b.Printf("         raw %s\n", harness.Join(ms, "%.1f"))
			if n == b.Sizes()[len(b.Sizes())-1] {
				verdicts = append(verdicts, func() { b.AtMost(fmt.Sprintf("p99 of a new %s at %d services", kind.name, n), p99, bar, " ms") })
			}
		}
		after, err := b.cluster.Reloads(ctx)
		if err != nil {
			return err
		}
		verdicts = append(verdicts, func() {
			b.AtMost(fmt.Sprintf("HAProxy reloads during the samples at %d services", n), float64(after-before), 0, "")
		})
	}
	b.Printf("\n")
	for _, v := range verdicts {
		v()
	}
	return nil
}

// collect takes samples one after the other, at moments that keep no step with
// any clock of the nodes.
func (b *bench) collect(ctx context.Context, samples int, sample func(context.Context, int) (float64, error)) ([]float64, error) {
	var all []float64
	for i := range samples + 1 {
		ms, err := sample(ctx, i)
		if err != nil {
			return nil, fmt.Errorf("sample %d: %w", i, err)
		}
		if i > 0 { // the first one opens connections
			all = append(all, ms)
		}
		if err := harness.Pause(ctx, 30*time.Millisecond+rand.N(60*time.Millisecond)); err != nil {
			return nil, err
		}
	}
	return all, nil
}

// newEndpoint moves the service "probe" from one endpoint to the next.
func (b *bench) newEndpoint(ctx context.Context, _ int) (float64, error) {
	b.turn++
	i := b.turn % len(b.endpoints)
	return b.measure(ctx, "probe", fmt.Sprint(i),
		clientv3.OpPut(catalog.Prefix+"probe/scheme", "http"),
		clientv3.OpPut(harness.EndpointKey("probe", fmt.Sprint(b.turn)), b.endpoints[i].Address),
		clientv3.OpDelete(harness.EndpointKey("probe", fmt.Sprint(b.turn-1))))
}

// newService makes a service and removes it after it was seen.
func (b *bench) newService(ctx context.Context, i int) (float64, error) {
	name := fmt.Sprintf("new%d", i)
	ms, err := b.measure(ctx, name, "", harness.ServiceOps(name, b.endpoints[0].Address, b.endpoints[1].Address, b.endpoints[2].Address)...)
	if err != nil {
		return 0, err
	}
	_, err = b.cluster.Store.Delete(ctx, catalog.Prefix+name+"/", clientv3.WithPrefix())
	return ms, err
}

// measure writes ops and returns the ms from the store's answer until every node
// answers for service with want, or with any endpoint's name if want is "".
func (b *bench) measure(ctx context.Context, service, want string, ops ...clientv3.Op) (float64, error) {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	seen := make([]time.Time, len(b.probes))
	g, gctx := errgroup.WithContext(ctx)
	for i, p := range b.probes {
		g.Go(func() (err error) {
			seen[i], err = p.Until(gctx, service, want)
			return err
		})
	}
	_, err := b.cluster.Store.Txn(ctx).Then(ops...).Commit()
	acknowledged := time.Now()
	if err != nil {
		cancel()
		return 0, errors.Join(err, g.Wait())
	}
	if err := g.Wait(); err != nil {
		return 0, err
	}
	last := seen[0]
	for _, t := range seen {
		if t.After(last) {
			last = t
		}
	}
	return last.Sub(acknowledged).Seconds() * 1000, nil
}
