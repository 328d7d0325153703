// Command propagation measures how long an acknowledged change in the store takes
// until every node routes by it; beside it confd with HAProxy, and Traefik, if
// their programs are given. test/peers.sh builds them:
//
//	go run ./bench/propagation -confd .cache/peers/confd -traefik .cache/peers/traefik
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"slices"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"golang.org/x/sync/errgroup"

	"flotilla/bench/harness"
)

const (
	claim = "from an acknowledged put to one store member to the first routed answer on all three nodes"
	nodes = 3
	// Networks 127.<n>.0.0/16 of the nodes, of the probed and of the other endpoints.
	nodeNet, probeNet, bulkNet = 81, 82, 83
	// and of the peers.
	confdNet, traefikNet = 95, 96
	// bar is the 99th percentile at the largest size, in ms.
	bar = 25
	// limit is how long a sample may take; the first one of a peer that has just
	// started takes longest.
	limit = 10 * time.Minute
)

// options is what a run is told beside what all benchmarks are.
type options struct {
	samples        int
	confd, traefik string // programs; empty: not measured
	peerSamples    int
	peerServices   int
}

func main() {
	var o options
	flag.IntVar(&o.samples, "samples", 400, "changes of each kind at each size")
	flag.StringVar(&o.confd, "confd", "", "the real confd, to measure beside ours with the same HAProxy")
	flag.StringVar(&o.traefik, "traefik", "", "the real Traefik, to measure beside ours")
	flag.IntVar(&o.peerSamples, "peer-samples", 100, "changes of each kind at each size, with a peer")
	flag.IntVar(&o.peerServices, "peer-services", 1000, "the largest size at which peers are measured")
	harness.Main("propagation", claim, func(ctx context.Context, b *harness.Bench) error {
		if b.Quick {
			o.samples, o.peerSamples = min(o.samples, 40), min(o.peerSamples, 10)
		}
		return run(ctx, b, o)
	})
}

// system is what is measured: our nodes, or a peer beside them.
type system struct {
	name    string
	keys    keys
	probes  []*harness.Client // one for each node
	samples int               // changes of each kind at each size
	most    int               // services with which a peer is measured
	rest    time.Duration     // between two changes, at least
	prepare func(ctx context.Context, revision int64) error
	stop    func() error // a peer that prepare has started

	size int // services that are written
	turn int // of newEndpoint
	made int // by newService
}

// keys is how services are written for a system.
type keys struct {
	// service makes a service.
	service func(name string, endpoints ...string) []clientv3.Op
	// move makes address the only endpoint of a service that has turn-1 moves behind it.
	move func(name string, turn int, address string) []clientv3.Op
	// remove removes a service.
	remove func(name string) []clientv3.Op
}

// catalogKeys are those of our catalog, below a prefix if they are for others.
func catalogKeys(prefix string) keys {
	return keys{
		service: func(name string, endpoints ...string) []clientv3.Op {
			return harness.ServiceOps(prefix, name, endpoints...)
		},
		move: func(name string, turn int, address string) []clientv3.Op {
			return []clientv3.Op{
				clientv3.OpPut(prefix+harness.SchemeKey(name), "http"),
				clientv3.OpPut(prefix+harness.EndpointKey(name, fmt.Sprint(turn)), address),
				clientv3.OpDelete(prefix + harness.EndpointKey(name, fmt.Sprint(turn-1))),
			}
		},
		remove: func(name string) []clientv3.Op {
			return []clientv3.Op{clientv3.OpDelete(prefix+harness.ServiceKeys(name), clientv3.WithPrefix())}
		},
	}
}

// bench is the running cluster and what its services lead to.
type bench struct {
	*harness.Bench
	cluster   *harness.Cluster
	endpoints []*harness.Endpoint
	verdicts  []func()
	failed    error // of peers
}

func run(ctx context.Context, hb *harness.Bench, o options) (err error) {
	b := &bench{Bench: hb}
	b.Printf("setup    %d nodes, a store of %d members and %d HAProxys share this machine's cores with the probes\n", nodes, nodes, nodes)
	b.Printf("endpoint one transaction puts an endpoint and deletes the only other one; the answer names the new one\n")
	b.Printf("service  one transaction puts scheme and three endpoints of a new name; 404 before\n")
	b.Printf("sample   from the store's answer until the last of the three nodes gives that answer, in ms; each node is asked\n")
	b.Printf("         on a kept connection about once in 1 ms; 30 to 90 ms between changes\n")
	b.cluster, err = b.StartCluster(ctx, nodeNet, nodes)
	defer func() { err = errors.Join(err, b.cluster.Stop()) }()
	if err != nil {
		return err
	}
	ours := &system{name: "flotilla", keys: catalogKeys(""), samples: o.samples, prepare: b.cluster.Settle}
	for i, n := range b.cluster.Nodes {
		ours.probes = append(ours.probes, &harness.Client{Address: n.Address, KeepAlive: true})
		e, err := harness.Serve(harness.EndpointAddress(probeNet, i), fmt.Sprint(i))
		if err != nil {
			return err
		}
		b.endpoints = append(b.endpoints, e)
	}
	others, err := peers(ctx, b.Bench, b.cluster, o)
	if err != nil {
		return err
	}
	if len(others) > 0 {
		b.Printf("peers    one on each node, with keys of its own in the same store, which only it follows; it runs only while it is\n")
		b.Printf("         measured, our nodes stay and are idle then; %s more between changes\n", peerRest)
	}
	for _, n := range b.Sizes() {
		b.Printf("\n%d services of 3 endpoints\n", n)
		ms, err := b.measureOurs(ctx, n, ours)
		if err != nil {
			return err
		}
		for _, s := range others {
			if err := b.measurePeer(ctx, n, s, ms); ctx.Err() != nil {
				return err
			} else if err != nil {
				b.Printf("%-8s FAILED at %d services: %v\n", s.name, n, err)
				b.failed = errors.Join(b.failed, fmt.Errorf("%s at %d services: %w", s.name, n, err))
			}
		}
	}
	b.Printf("\n")
	for _, v := range b.verdicts {
		v()
	}
	return b.failed
}

// measureOurs measures our nodes with n services.
func (b *bench) measureOurs(ctx context.Context, n int, ours *system) (ms [][]float64, err error) {
	if err := b.fill(ctx, ours, n); err != nil {
		return nil, err
	}
	span, err := b.cluster.During(ctx, func() (err error) {
		ms, err = b.measure(ctx, ours)
		return err
	})
	if err != nil {
		return nil, err
	}
	b.verdicts = append(b.verdicts, func() {
		if sizes := b.Sizes(); n == sizes[len(sizes)-1] {
			for i, kind := range kinds {
				b.AtMost(fmt.Sprintf("p99 of a new %s at %d services", kind.name, n), harness.Percentile(ms[i], 99), bar, " ms")
			}
		}
		b.AtMost(fmt.Sprintf("HAProxy reloads during the samples at %d services", n), float64(span.Reloads), 0, "")
	})
	return ms, nil
}

// measurePeer measures a peer with n services and compares it with our samples
// of each kind.
func (b *bench) measurePeer(ctx context.Context, n int, s *system, ours [][]float64) (err error) {
	if n > s.most {
		b.Printf("%-8s not measured: more than -peer-services %d\n", s.name, s.most)
		return nil
	}
	defer func() { err = errors.Join(err, s.stop()) }()
	if err := b.fill(ctx, s, n); err != nil {
		return err
	}
	ms, err := b.measure(ctx, s)
	if err != nil {
		return err
	}
	for i, kind := range kinds {
		ratio := func(p float64) float64 { return harness.Percentile(ours[i], p) / harness.Percentile(ms[i], p) }
		b.Printf("ratio    %s, ours to %s's: p50 %.4f  p99 %.4f\n", kind.name, s.name, ratio(50), ratio(99))
	}
	return nil
}

// fill writes services until there are n, and prepares the system.
func (b *bench) fill(ctx context.Context, s *system, n int) error {
	b.Logf("%s: %d services", s.name, n)
	revision, err := b.cluster.PutAll(ctx, s.size, n, func(i int) []clientv3.Op {
		address := func(e int) string { return harness.EndpointAddress(bulkNet, (i*3+e)%60000) }
		return s.keys.service(harness.ServiceName(i), address(1), address(2), address(3))
	})
	if err != nil {
		return err
	}
	s.size = n
	return s.prepare(ctx, revision)
}

// kinds are the changes that are measured.
var kinds = []struct {
	name   string
	sample func(b *bench, ctx context.Context, s *system) (float64, error)
}{{"endpoint", (*bench).newEndpoint}, {"service", (*bench).newService}}

// measure takes and prints the samples of each kind, one after the other, at moments
// that keep no step with any clock of the nodes.
func (b *bench) measure(ctx context.Context, s *system) ([][]float64, error) {
	var all [][]float64
	for _, kind := range kinds {
		b.Logf("%s: new %ss", s.name, kind.name)
		var ms []float64
		for i := range s.samples + 1 {
			limited, cancel := context.WithTimeout(ctx, limit)
			sample, err := kind.sample(b, limited, s)
			cancel()
			if err == nil {
				err = b.pause(ctx, s)
			}
			if err != nil {
				return nil, fmt.Errorf("new %s, sample %d: %w", kind.name, i, err)
			}
			ms = append(ms, sample)
		}
		ms = ms[1:] // the first one opened connections
		b.Printf("%-8s %-8s %s\n         raw %s\n", s.name, kind.name, harness.Spread(ms), harness.Join(ms, "%.1f"))
		all = append(all, ms)
	}
	return all, nil
}

func (b *bench) pause(ctx context.Context, s *system) error {
	return harness.Pause(ctx, s.rest+30*time.Millisecond+rand.N(60*time.Millisecond))
}

// newEndpoint moves the service "probe" from one endpoint to the next.
func (b *bench) newEndpoint(ctx context.Context, s *system) (float64, error) {
	s.turn++
	i := s.turn % len(b.endpoints)
	return b.change(ctx, s, func(ctx context.Context, p *harness.Client) (time.Time, error) {
		return p.Until(ctx, "probe", fmt.Sprint(i))
	}, s.keys.move("probe", s.turn, b.endpoints[i].Address)...)
}

// newService makes a service and removes it after it was seen. The next change
// comes after no node routes it any more: nobody's samples are to hold the work of
// removals.
func (b *bench) newService(ctx context.Context, s *system) (float64, error) {
	s.made++
	name := fmt.Sprintf("new%d", s.made)
	ms, err := b.change(ctx, s, func(ctx context.Context, p *harness.Client) (time.Time, error) {
		return p.Until(ctx, name, "")
	}, s.keys.service(name, b.endpoints[0].Address, b.endpoints[1].Address, b.endpoints[2].Address)...)
	if err != nil {
		return 0, err
	}
	if err := b.pause(ctx, s); err != nil {
		return 0, err
	}
	_, err = b.change(ctx, s, func(ctx context.Context, p *harness.Client) (time.Time, error) {
		return p.UntilGone(ctx, name)
	}, s.keys.remove(name)...)
	return ms, err
}

// change writes ops and returns the ms from the store's answer until seen has
// returned for every node.
func (b *bench) change(ctx context.Context, s *system, seen func(context.Context, *harness.Client) (time.Time, error), ops ...clientv3.Op) (float64, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	at := make([]time.Time, len(s.probes))
	g, gctx := errgroup.WithContext(ctx)
	for i, p := range s.probes {
		g.Go(func() (err error) {
			at[i], err = seen(gctx, p)
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
	last := slices.MaxFunc(at, time.Time.Compare)
	return last.Sub(acknowledged).Seconds() * 1000, nil
}
