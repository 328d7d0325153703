package router

import (
	"fmt"
	"log/slog"
	"slices"
	"testing"
	"time"

	"flotilla/internal/catalog"
)

// BenchmarkChange measures one endpoint change from the snapshot to HAProxy's
// confirmation, at 10,000 services with three endpoints each.
func BenchmarkChange(b *testing.B) {
	for _, services := range []int{10, 1000, 10000} {
		b.Run(fmt.Sprintf("services=%d", services), func(b *testing.B) {
			var keys []catalog.KeyValue
			add := func(key, value string) {
				keys = append(keys, catalog.KeyValue{Key: catalog.Prefix + key, Value: value, CreateRevision: 1, ModRevision: 1})
			}
			for i := range services {
				add(fmt.Sprintf("s%d/scheme", i), "http")
				for j := range 3 {
					add(fmt.Sprintf("s%d/hosts/%d", i, j), fmt.Sprintf("10.%d.%d.%d:80", i/250, i%250, j+1))
				}
			}
			builder := catalog.NewBuilder(catalog.Policy{})
			feed := catalog.NewFeed()
			feed.Publish(builder.Apply(catalog.Batch{Revision: 1, Reset: true, Keys: keys}))
			cfg := Config{
				Node: "n1", Address: freshAddress(), HTTPPort: 8080, HTTPSPort: 8443, BalancerPort: 9180, RedirectPort: 9181,
				Dir: b.TempDir(), Binary: "haproxy", Supervise: true, HostPorts: "listeners", MaxConnections: 2000,
			}
			r, err := New(cfg, feed, slog.New(slog.DiscardHandler))
			if err != nil {
				b.Fatal(err)
			}
			ctx := b.Context()
			done := make(chan error, 1)
			go func() { done <- r.Run(ctx) }()
			waitFor := func(revision int64) {
				for {
					applied, newer := r.Applied()
					if applied >= revision {
						return
					}
					select {
					case <-newer:
					case err := <-done:
						b.Fatal(err)
					}
				}
			}
			start := time.Now()
			waitFor(1)
			b.Logf("%d services: serving after %v", services, time.Since(start))
			var took []time.Duration
			revision := int64(1)
			for b.Loop() {
				revision++
				i := int(revision) % services
				began := time.Now()
				feed.Publish(builder.Apply(catalog.Batch{Revision: revision, Keys: []catalog.KeyValue{{
					Key: fmt.Sprintf("%ss%d/hosts/0", catalog.Prefix, i), Value: fmt.Sprintf("10.99.%d.%d:81", revision/250%250, revision%250+1), CreateRevision: 1, ModRevision: revision,
				}}}))
				waitFor(revision)
				took = append(took, time.Since(began))
			}
			slices.Sort(took)
			b.ReportMetric(float64(took[len(took)*99/100].Microseconds()), "p99-us")
			if s := r.Status(); s.Reloads != 0 {
				b.Errorf("%d reloads: %s", s.Reloads, s.LastReload)
			}
		})
	}
}
