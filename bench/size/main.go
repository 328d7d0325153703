// Command size measures what a node costs as the number of services grows: CPU
// per change, memory, and the time from its start until it routes everything.
package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"time"

	"flotilla/bench/harness"
)

const (
	claim = "CPU per change, memory and cold start of one node by number of services, 3 endpoints each"
	// Networks 127.<n>.0.0/16 of the nodes and of the endpoints.
	nodeNet, endpointNet = 84, 85
	// bar is the node process's memory at the largest size, in MiB.
	bar = 150e6 / (1 << 20)
	// rate is how many changes are made in a second.
	rate = 20
	// auditRound is how long a router takes to compare all of HAProxy with what
	// it knows; a part of such a round would not be what it costs at rest.
	auditRound = 40 * time.Second
)

func main() { harness.Main("size", claim, run) }

func run(ctx context.Context, b *harness.Bench) (err error) {
	origin := make([]*harness.Endpoint, 3)
	for i := range origin {
		if origin[i], err = harness.Serve(harness.EndpointAddress(endpointNet, i), "origin"); err != nil {
			return err
		}
	}
	b.Printf("setup    one node with its own store; a second node that follows that store is started cold (empty data\n")
	b.Printf("         directory) and warm (its last good catalog on disk); a change replaces one endpoint, %d changes/s\n", rate)
	b.Printf("cpu      of the node process and of its HAProxy, per change, less what they use when nothing changes\n")
	b.Printf("memory   resident, MiB: after the load (at rest), after the changes, and the most there ever was\n")
	b.Printf("start    ms from exec until the router runs the whole catalog; then every service is asked once\n")
	for i, n := range b.Sizes() {
		s := &sized{Bench: b, services: n, origin: origin, last: i == len(b.Sizes())-1}
		b.Logf("%d services", n)
		b.Printf("\n%d services\n", n)
		if err := s.run(ctx); err != nil {
			return fmt.Errorf("%d services: %w", n, err)
		}
	}
	return nil
}

// sized is the measurement at one number of services.
type sized struct {
	*harness.Bench
	services int
	origin   []*harness.Endpoint
	last     bool // the size that the bar is for
	cluster  *harness.Cluster
	revision int64
}

func (s *sized) endpoint(service, n int) string { return s.origin[(service+n)%3].Address }

func (s *sized) run(ctx context.Context) (err error) {
	s.cluster, err = s.StartCluster(ctx, nodeNet, 1)
	defer func() { err = errors.Join(err, s.cluster.Stop()) }()
	if err != nil {
		return err
	}
	began := time.Now()
	if s.revision, err = s.cluster.PutServices(ctx, 0, s.services, s.endpoint); err != nil {
		return err
	}
	wrote := time.Since(began)
	if err := s.cluster.Nodes[0].Applied(ctx, s.revision); err != nil {
		return err
	}
	s.Printf("load     %d keys written in %.2f s, applied %.2f s after the first\n", s.services*4, wrote.Seconds(), time.Since(began).Seconds())
	if err := s.cluster.Settle(ctx, s.revision); err != nil {
		return err
	}
	if err := s.changes(ctx); err != nil {
		return err
	}
	return s.starts(ctx)
}

// changes measures a quiet while, and one with changes.
func (s *sized) changes(ctx context.Context) error {
	length := auditRound
	if s.Quick {
		length = 5 * time.Second
	}
	rest, err := s.cluster.During(ctx, func() error { return harness.Pause(ctx, length) })
	if err != nil {
		return err
	}
	done := 0
	busy, err := s.cluster.During(ctx, func() error {
		return harness.Every(ctx, time.Second/rate, length, func() error {
			done++
			// A port that it did not have, so that the value does change.
			key := harness.EndpointKey(harness.ServiceName(rand.IntN(s.services)), "3")
			_, err := s.cluster.Store.Put(ctx, key, fmt.Sprintf("127.%d.1.1:%d", endpointNet, 10000+done%50000))
			return err
		})
	})
	if err != nil {
		return err
	}
	s.Changed(rest, busy, done)
	if s.last {
		s.AtMost(fmt.Sprintf("memory of the node process at %d services, at rest or after changes", s.services),
			max(busy.Before[harness.NodePart].RSS, busy.After[harness.NodePart].RSS), bar, " MiB")
	}
	s.AtMost(fmt.Sprintf("HAProxy reloads during the changes at %d services", s.services), float64(busy.Reloads), 0, "")
	// What was changed points nowhere; put it right for the starts.
	s.revision, err = s.cluster.PutServices(ctx, 0, s.services, s.endpoint)
	return err
}

// starts measures starts of a second node, in turn with nothing and with its
// last good catalog on disk.
func (s *sized) starts(ctx context.Context) error {
	rounds := 5
	if s.Quick {
		rounds = 1
	}
	kinds := [2]string{"cold", "warm"}
	var ms, memory [2][]float64
	for range rounds {
		for kind := range kinds {
			took, rss, err := s.start(ctx)
			if err != nil {
				return err
			}
			ms[kind], memory[kind] = append(ms[kind], took.Seconds()*1000), append(memory[kind], rss)
		}
		if err := os.RemoveAll(filepath.Join(s.Dir, "n2")); err != nil {
			return err
		}
	}
	for kind, name := range kinds {
		s.Printf("start    %s median %.0f ms  raw %s  node process %s MiB just then\n", name,
			harness.Median(ms[kind]), harness.Join(ms[kind], "%.0f"), harness.Join(memory[kind], "%.0f"))
	}
	return nil
}

// start starts the second node and stops it after it routes everything. It returns
// how long that took and the MiB that the node process had then.
func (s *sized) start(ctx context.Context) (took time.Duration, rss float64, err error) {
	n, err := s.StartNode("n2", fmt.Sprintf("127.%d.0.2", nodeNet), "--etcd-endpoints", s.cluster.Endpoint())
	defer func() { err = errors.Join(err, n.Stop()) }()
	if err == nil {
		err = n.Applied(ctx, s.revision)
	}
	took = time.Since(n.Started)
	client := &harness.Client{Address: n.Address, KeepAlive: true}
	defer client.Close()
	for i := 0; i < s.services && err == nil; i++ {
		status, body, failed := client.Do(http.MethodGet, harness.ServiceName(i))
		if failed != nil || status != http.StatusOK {
			err = fmt.Errorf("service %d is not routed when the node says that all are: %d %.60q %v", i, status, body, failed)
		}
	}
	if err != nil {
		return 0, 0, err
	}
	costs, err := n.Costs()
	return took, costs[harness.NodePart].RSS, err
}
