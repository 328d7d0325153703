package node

import (
	"context"
	"log/slog"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"flotilla/internal/catalog"
	"flotilla/internal/store"
	"flotilla/internal/wire"
)

// Problems logged one by one in one step; of more, only the number is logged.
const problemsLogged = 20

// discovery turns what the store's reflector delivers into snapshots of the
// catalog and publishes them.
type discovery struct {
	reflector *store.Reflector
	feed      *catalog.Feed
	log       *slog.Logger
	received  func(revision int64) // called before a snapshot with changes is published

	mu      sync.Mutex // guards builder: the reflector and the clock both apply
	builder *catalog.Builder
	last    *catalog.Snapshot

	source   atomic.Pointer[wire.Source]
	problems atomic.Int64
}

// restore publishes the catalog of an earlier run, before the store is asked.
func (d *discovery) restore(s *saved) {
	source := wire.SourceNone
	if s != nil {
		d.publish(d.builder.Restore(s.Revision, s.keys))
		source = wire.SourceSnapshot
		d.log.Info("routing from the catalog on disk until the store answers",
			"revision", s.Revision, "services", d.last.Len(), "saved", s.At.Format(time.RFC3339))
	}
	d.source.Store(&source)
}

// run follows the store until ctx ends.
func (d *discovery) run(ctx context.Context) error {
	return runAll(ctx,
		part{"reflector", func(ctx context.Context) error { return d.reflector.Run(ctx, d.apply) }},
		part{"hold", d.watchHold},
	)
}

// apply takes one update of the reflector and returns how many keys it changed.
func (d *discovery) apply(u store.Update) int {
	batch := catalog.Batch{Revision: u.Revision, Reset: u.Reset, Now: time.Now()}
	if u.Reset {
		batch.Keys = make([]catalog.KeyValue, len(u.Items))
		for i, kv := range u.Items {
			batch.Keys[i] = keyValue(kv, false)
		}
	} else {
		batch.Keys = make([]catalog.KeyValue, len(u.Events))
		for i, e := range u.Events {
			batch.Keys[i] = keyValue(e.KV, e.Deleted)
		}
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	next := d.builder.Apply(batch)
	changed := d.builder.Changed()
	if changed > 0 && d.received != nil {
		d.received(next.Revision)
	}
	d.publish(next)
	if *d.source.Load() != wire.SourceLive {
		live := wire.SourceLive
		d.source.Store(&live)
		d.log.Info("the catalog is loaded from the store", "revision", u.Revision, "services", next.Len())
	}
	return changed
}

func keyValue(kv store.KV, deleted bool) catalog.KeyValue {
	return catalog.KeyValue{Key: kv.Key, Value: kv.Value, CreateRevision: kv.CreateRevision, ModRevision: kv.ModRevision, Deleted: deleted}
}

// publish makes next the newest snapshot and logs the problems that are new in
// it. Calls are serialised by mu, or come before run.
func (d *discovery) publish(next *catalog.Snapshot) {
	if next == d.last {
		return
	}
	var fresh []catalog.Problem
	count := d.problems.Load()
	for _, c := range next.Diff(d.last) {
		var was, is []catalog.Problem
		if c.Old != nil {
			was = c.Old.Problems
		}
		if c.New != nil {
			is = c.New.Problems
		}
		count += int64(len(is) - len(was))
		for _, p := range is {
			if !slices.Contains(was, p) {
				fresh = append(fresh, p)
			}
		}
	}
	d.logHold(next.Held)
	d.problems.Store(count)
	d.last = next
	d.feed.Publish(next)
	for i, p := range fresh {
		if i == problemsLogged {
			d.log.Warn("more keys with a problem; flotilla services explain shows them", "keys", len(fresh)-i)
			break
		}
		d.log.Warn("a key is not usable", "key", p.Key, "value", p.Value, "reason", p.Reason, "remedy", p.Remedy)
	}
}

func (d *discovery) logHold(now *catalog.Hold) {
	var before *catalog.Hold
	if d.last != nil {
		before = d.last.Held
	}
	switch {
	case now != nil && before == nil:
		d.log.Warn("most endpoints vanished at once: they stay routed until this is confirmed (flotilla services confirm), has lasted 10 minutes, or they come back",
			"removed", now.Removed, "of", now.Of, "revision", now.Revision)
	case now == nil && before != nil:
		d.log.Info("the held disappearance of endpoints is over", "revision", d.last.Revision)
	}
}

// watchHold lets time pass for a held disappearance, and ends it when somebody
// has confirmed it: the key that the reflector reads for freshness holds the
// highest confirmed revision.
func (d *discovery) watchHold(ctx context.Context) error {
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
			d.checkHold(time.Now())
		}
	}
}

func (d *discovery) checkHold(now time.Time) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.last == nil || d.last.Held == nil {
		return
	}
	if revision, err := strconv.ParseInt(strings.TrimSpace(d.reflector.Status().FreshValue), 10, 64); err == nil {
		d.builder.Confirm(revision)
	}
	d.publish(d.builder.Apply(catalog.Batch{Revision: d.last.Revision, Now: now}))
}

// status returns what the API says about where the catalog comes from.
func (d *discovery) status() wire.StoreStatus {
	return storeStatus(d.reflector.Status(), *d.source.Load())
}

func storeStatus(s store.Status, from wire.Source) wire.StoreStatus {
	return wire.StoreStatus{
		Live: s.Live, Confirmed: s.Confirmed, Revision: s.Revision, Lists: s.Lists,
		Restarts: s.Restarts, Drift: s.Drift, Held: s.Held, Err: s.Err, Source: from,
	}
}
