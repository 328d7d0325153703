// Command nodes measures what a cluster costs as it grows: how long many nodes take
// to be up, how long a change takes until all of them have acknowledged it, and what
// a node, a service and a change cost in watches, leases, keys, writes, memory and
// CPU. Two sizes (-nodes 3, -nodes 30) give the cost of a further node.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"net/http"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"flotilla/bench/harness"
)

const (
	claim = "many nodes on one machine: until they are up, until all acknowledge a change, and what each costs"
	// Networks 127.<n>.0.0/16 of the nodes and of the endpoints.
	nodeNet, endpointNet = 97, 98
	// The bars are for so many nodes: seconds, ms, cores and watches.
	barNodes   = 30
	barUp      = 40
	barChange  = 200
	barIdle    = 0.25
	barWatches = 2
)

// options is what a run is told beside what all benchmarks are.
type options struct {
	nodes, services, changes int
	idle                     time.Duration
}

func main() {
	var o options
	flag.IntVar(&o.nodes, "nodes", barNodes, "nodes; the first three are members of the store, the others are its clients")
	flag.IntVar(&o.services, "services", 1000, "services to measure the cost of; 0: only the one that is changed")
	flag.IntVar(&o.changes, "changes", 100, "changes of one endpoint, each until all nodes have acknowledged it")
	flag.DurationVar(&o.idle, "idle", time.Minute, "how long to watch the nodes at rest")
	harness.Main("nodes", claim, func(ctx context.Context, b *harness.Bench) error {
		if b.Quick {
			o.nodes, o.services, o.changes, o.idle = min(o.nodes, 5), min(o.services, 100), min(o.changes, 10), 5*time.Second
		}
		return run(ctx, b, o)
	})
}

func run(ctx context.Context, b *harness.Bench, o options) (err error) {
	b.Printf("setup    %d nodes without units, each with its HAProxy as a child; the first three, one after the other, with a member of\n", o.nodes)
	b.Printf("         the store, then all others at once; all share this machine's cores\n")
	b.Printf("up       from the start of the first node until all follow the store and have answered a request for a service\n")
	b.Printf("change   PUT of another endpoint at one node after the other with ?wait, until the answer: all nodes have applied it;\n")
	b.Printf("         0.3 to 0.6 s between two\n")
	b.Printf("cpu      of all nodes together; per change less what they use at rest. Memory: resident, MiB\n")
	began := time.Now()
	cluster, err := b.StartCluster(ctx, nodeNet, o.nodes)
	defer func() { err = errors.Join(err, cluster.Stop()) }()
	if err != nil {
		return err
	}
	up := time.Since(began)
	origin, err := harness.Serve(harness.EndpointAddress(endpointNet, 0), "origin")
	if err != nil {
		return err
	}
	g := &growth{Bench: b, options: o, cluster: cluster, origin: origin.Address}
	if err := g.routed(ctx); err != nil {
		return err
	}
	routed := time.Since(began)
	b.Printf("\n%d nodes\n", o.nodes)
	b.Printf("up       %.1f s until all follow the store, %.1f s until all route\n", up.Seconds(), routed.Seconds())
	g.bar("all nodes up and routing", routed.Seconds(), barUp, " s")
	if err := g.measure(ctx, 1); err != nil {
		return err
	}
	if o.services < 2 {
		return nil
	}
	b.Printf("\n%d nodes, %d services\n", o.nodes, o.services)
	if err := g.grow(ctx, "service with 3 endpoints", o.services-1, func(i int) []clientv3.Op {
		return harness.ServiceOps("", harness.ServiceName(i+1), g.elsewhere(i), g.elsewhere(i+1), g.elsewhere(i+2))
	}); err != nil {
		return err
	}
	if err := g.grow(ctx, "further endpoint", o.services-1, func(i int) []clientv3.Op {
		return []clientv3.Op{clientv3.OpPut(harness.EndpointKey(harness.ServiceName(i+1), "4"), g.elsewhere(i+3))}
	}); err != nil {
		return err
	}
	return g.measure(ctx, o.services)
}

// growth is a cluster of one size, measured with several numbers of services.
type growth struct {
	*harness.Bench
	options
	cluster *harness.Cluster
	origin  string // what answers requests
	turn    int    // of change
}

// elsewhere is an address that nobody asks.
func (g *growth) elsewhere(n int) string { return harness.EndpointAddress(endpointNet, n%60000+1) }

// bar holds a figure to its bar if this is the size that bars are for.
func (g *growth) bar(what string, got, bar float64, unit string) {
	if g.nodes == barNodes {
		g.AtMost(what, got, bar, unit)
	}
}

// routed writes the first service and asks every node for it.
func (g *growth) routed(ctx context.Context) error {
	if _, err := g.cluster.Store.Txn(ctx).Then(harness.ServiceOps("", harness.ServiceName(0), g.origin)...).Commit(); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	for _, n := range g.cluster.Nodes {
		client := &harness.Client{Address: n.Address}
		if _, err := client.Until(ctx, harness.ServiceName(0), "origin"); err != nil {
			return err
		}
	}
	return nil
}

// grow writes count further things and prints the memory that each has added.
func (g *growth) grow(ctx context.Context, what string, count int, ops func(i int) []clientv3.Op) error {
	before, err := g.cluster.Costs()
	if err != nil {
		return err
	}
	revision, err := g.cluster.PutAll(ctx, 0, count, ops)
	if err != nil {
		return err
	}
	if err := g.cluster.Settle(ctx, revision); err != nil {
		return err
	}
	after, err := g.cluster.Costs()
	if err != nil {
		return err
	}
	g.Printf("memory   KiB for each %s, on one node or member:", what)
	for part, u := range after {
		holders := len(g.cluster.Nodes)
		if part == harness.StorePart {
			holders = len(g.cluster.Members())
		}
		g.Printf("  %s %.2f", harness.PartNames[part], (u.RSS-before[part].RSS)*1024/float64(count*holders))
	}
	g.Printf("\n")
	return nil
}

// measure measures a while at rest and one with changes, with n services.
func (g *growth) measure(ctx context.Context, n int) error {
	g.Logf("%d services: at rest for %s", n, g.idle)
	rest, err := g.cluster.During(ctx, func() error { return harness.Pause(ctx, g.idle) })
	if err != nil {
		return err
	}
	g.Logf("%d services: %d changes", n, g.changes)
	var ms []float64
	busy, err := g.cluster.During(ctx, func() error {
		for range g.changes {
			took, err := g.change(ctx)
			if err != nil {
				return err
			}
			ms = append(ms, took.Seconds()*1000)
			if err := harness.Pause(ctx, 300*time.Millisecond+rand.N(300*time.Millisecond)); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	g.Printf("change   %s\n         raw %s\n", harness.Spread(ms), harness.Join(ms, "%.0f"))
	g.Changed(rest, busy, g.changes)
	if err := g.perNode(); err != nil {
		return err
	}
	if err := g.store(ctx); err != nil {
		return err
	}
	g.bar(fmt.Sprintf("slowest of %d changes acknowledged by all, %d services", g.changes, n), harness.Percentile(ms, 100), barChange, " ms")
	g.bar(fmt.Sprintf("all node processes at rest, %d services", n), rest.Cores(harness.NodePart), barIdle, " cores")
	return nil
}

// change moves an endpoint of the first service to another port and returns how
// long that took until all nodes had acknowledged it.
func (g *growth) change(ctx context.Context) (time.Duration, error) {
	g.turn++
	request := map[string]any{"endpoints": map[string]string{"2": fmt.Sprintf("127.%d.1.1:%d", endpointNet, 10000+g.turn)}}
	var answer struct{ Applied []struct{ Reached bool } }
	n := g.cluster.Nodes[g.turn%len(g.cluster.Nodes)]
	began := time.Now()
	if err := harness.Ask(ctx, n.Socket(), http.MethodPut, "/v1/services/"+harness.ServiceName(0)+"?wait=30s", request, &answer); err != nil {
		return 0, fmt.Errorf("change %d by %s: %w", g.turn, n.Name, err)
	}
	took := time.Since(began)
	reached := 0
	for _, a := range answer.Applied {
		if a.Reached {
			reached++
		}
	}
	if reached != g.nodes {
		return 0, fmt.Errorf("change %d by %s: %d of %d nodes have acknowledged it", g.turn, n.Name, reached, g.nodes)
	}
	return took, nil
}

// perNode prints the memory of one node.
func (g *growth) perNode() error {
	var rss [len(harness.Costs{})][]float64
	for _, n := range g.cluster.Nodes {
		costs, err := n.Costs()
		if err != nil {
			return err
		}
		for part, u := range costs {
			if u.RSS > 0 { // clients have no store
				rss[part] = append(rss[part], u.RSS)
			}
		}
	}
	g.Printf("a node   MiB, median and most:")
	for part, all := range rss {
		g.Printf("  %s %.1f %.1f", harness.PartNames[part], harness.Median(all), harness.Percentile(all, 100))
	}
	g.Printf("\n")
	return nil
}

// store prints what the store holds and who watches it.
func (g *growth) store(ctx context.Context) error {
	watches := 0.0
	for _, n := range g.cluster.Members() {
		metrics, err := harness.Metrics(ctx, "http://"+n.Store()+"/metrics")
		if err != nil {
			return err
		}
		watches += metrics["etcd_debugging_mvcc_watcher_total"]
	}
	leases, err := g.cluster.Store.Leases(ctx)
	if err != nil {
		return err
	}
	var keys [2]int64
	for i, prefix := range []string{"/flotilla/", "/services/"} {
		answer, err := g.cluster.Store.Get(ctx, prefix, clientv3.WithPrefix(), clientv3.WithCountOnly())
		if err != nil {
			return err
		}
		keys[i] = answer.Count
	}
	each := watches / float64(g.nodes)
	g.Printf("store    %.0f watches (%.2f a node), %d leases, %d keys of ours and %d of services\n", watches, each, len(leases.Leases), keys[0], keys[1])
	g.bar("watches of a node in the store's own metric", each, barWatches, "")
	return nil
}
