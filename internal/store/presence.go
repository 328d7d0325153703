package store

import (
	"context"
	"errors"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// DefaultTTL is how long keys of a Presence outlive a node that is gone.
const DefaultTTL = 12 * time.Second

// Presence keeps a set of keys in the store for as long as this process lives.
// All of them are on one lease, which is renewed four times per TTL. If the
// lease is lost they are all written again under a new one; so are, within a
// minute, keys that somebody else deleted.
type Presence struct {
	c   *Client
	ttl time.Duration
	log *slog.Logger

	wake chan struct{} // something is dirty

	mu    sync.Mutex
	want  map[string]string   // guarded by mu
	dirty map[string]struct{} // keys that differ, or may differ, from the store; guarded by mu

	confirmed atomic.Pointer[time.Time] // see Confirmed; nil: no lease
	beat      chan struct{}             // one slot, filled with each confirmation
	linger    atomic.Bool               // see Linger
}

// The time between two writes of a Presence: the second of a quick sequence, which
// often says the end of what the first said the beginning of, comes soon; then it
// doubles up to coalesce, for each coalesceBytes that a write puts, because all
// who follow these keys have to read them.
const (
	coalesceFirst = 25 * time.Millisecond
	coalesce      = 200 * time.Millisecond
	coalesceBytes = 32 << 10
	coalesceMost  = time.Second
)

// NewPresence returns a Presence with no keys. ttl is rounded up to seconds;
// etcd grants no less than 2 s.
func NewPresence(c *Client, ttl time.Duration, log *slog.Logger) *Presence {
	return &Presence{c: c, ttl: ttl, log: log, wake: make(chan struct{}, 1), beat: make(chan struct{}, 1), want: map[string]string{}, dirty: map[string]struct{}{}}
}

// Set makes the key hold value as soon as the store can be reached. It never
// blocks, may be called from any goroutine and before Run, and costs nothing if
// the key has that value.
func (p *Presence) Set(key, value string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if old, ok := p.want[key]; ok && old == value {
		return
	}
	p.want[key] = value
	p.touch(key)
}

// Delete removes the key as soon as the store can be reached. It never blocks.
func (p *Presence) Delete(key string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if _, ok := p.want[key]; !ok {
		return
	}
	delete(p.want, key)
	p.touch(key)
}

// Confirmed returns when the last renewal of the lease that the store confirmed
// had been sent: the store keeps the lease for at least the TTL from then. It is
// the zero Time before the first lease, and while it is known to be lost.
// The Time has a monotonic reading.
func (p *Presence) Confirmed() time.Time {
	if t := p.confirmed.Load(); t != nil {
		return *t
	}
	return time.Time{}
}

// Beats receives after each confirmation and after each loss of the lease; one
// that nobody waited for is kept. There is one channel for all callers.
func (p *Presence) Beats() <-chan struct{} { return p.beat }

// confirm notes a confirmation, or a loss if sent is zero.
func (p *Presence) confirm(sent time.Time) {
	if sent.IsZero() {
		p.confirmed.Store(nil)
	} else {
		p.confirmed.Store(&sent)
	}
	select {
	case p.beat <- struct{}{}:
	default:
	}
}

// touch marks keys dirty; p.mu is held.
func (p *Presence) touch(keys ...string) {
	for _, k := range keys {
		p.dirty[k] = struct{}{}
	}
	select {
	case p.wake <- struct{}{}:
	default:
	}
}

// Linger says whether the keys stay until the lease expires when Run ends, so
// that a process that is started again within the TTL was never away.
func (p *Presence) Linger(linger bool) { p.linger.Store(linger) }

// Run keeps the keys until ctx ends, and returns nil then. Unless they linger it
// revokes the lease on the way out, which removes the keys at once, if that
// takes no longer than a second.
func (p *Presence) Run(ctx context.Context) error {
	var lease clientv3.LeaseID
	defer func() {
		if lease != 0 && !p.linger.Load() {
			rctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
			defer cancel()
			_, _ = p.flush(rctx, lease)         // what was said last, for those who watch
			_, _ = p.c.etcd.Revoke(rctx, lease) // it expires anyway
		}
	}()
	away := false
	for ctx.Err() == nil {
		granted, err := p.grant(ctx)
		if err == nil {
			lease = granted
			if away {
				away = false
				p.log.Info("the keys of this node are in the store again")
			}
			err = p.keep(ctx, lease)
		}
		if ctx.Err() != nil {
			break
		}
		if errors.Is(err, rpctypes.ErrLeaseNotFound) {
			lease = 0
			p.confirm(time.Time{})
			p.log.Warn("the lease of this node was lost: writing its keys again", "err", err)
			continue
		}
		if !away {
			away = true
			p.log.Warn("the keys of this node cannot be kept in the store: trying again", "err", err)
		}
		select {
		case <-time.After(jitter(time.Second)):
		case <-ctx.Done():
		}
	}
	return nil
}

// grant gets a lease and marks all keys to be written under it.
func (p *Presence) grant(ctx context.Context) (clientv3.LeaseID, error) {
	ctx, cancel := context.WithTimeout(ctx, writeLimit)
	defer cancel()
	sent := time.Now()
	resp, err := p.c.etcd.Grant(ctx, int64((p.ttl+time.Second-1)/time.Second))
	if err != nil {
		return 0, p.c.explain("get a lease", err)
	}
	p.confirm(sent)
	p.mu.Lock()
	defer p.mu.Unlock()
	p.touch(slices.Collect(maps.Keys(p.want))...)
	return resp.ID, nil
}

// keep renews the lease and writes what changes, until the lease is lost.
func (p *Presence) keep(ctx context.Context, lease clientv3.LeaseID) error {
	renew := time.NewTimer(p.ttl / 4)
	defer renew.Stop()
	var pause <-chan time.Time // set while a write must wait for the next interval
	wake := p.wake
	renewed, rounds := time.Now(), 0
	var rested time.Time // when the last pause was over
	rest := coalesceFirst
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-wake:
			size, err := p.flush(ctx, lease)
			if time.Since(rested) > coalesce {
				rest = coalesceFirst
			}
			wake, pause = nil, time.After(rest)
			rest = min(2*rest, coalesce*time.Duration(1+size/coalesceBytes), coalesceMost)
			if err != nil {
				if errors.Is(err, rpctypes.ErrLeaseNotFound) {
					return err
				}
				p.log.Debug("keys of this node wait for the store", "err", err)
				pause = time.After(jitter(time.Second))
			}
		case <-pause:
			wake, pause, rested = p.wake, nil, time.Now()
		case <-renew.C:
			began := time.Now()
			err := p.renew(ctx, lease)
			if rounds++; err == nil && rounds%20 == 0 {
				err = p.repair(ctx, lease)
			}
			switch {
			case err == nil:
				renewed = began
				renew.Reset(p.ttl / 4)
			case errors.Is(err, rpctypes.ErrLeaseNotFound):
				return err
			case time.Since(renewed) > p.ttl: // it may be gone: ask for a new one
				return err
			default:
				renew.Reset(jitter(p.ttl / 24))
			}
		}
	}
}

func (p *Presence) renew(ctx context.Context, lease clientv3.LeaseID) error {
	ctx, cancel := context.WithTimeout(ctx, readLimit)
	defer cancel()
	sent := time.Now()
	if _, err := p.c.etcd.KeepAliveOnce(ctx, lease); err != nil {
		return p.c.explain("renew the lease", err)
	}
	p.confirm(sent)
	return nil
}

// flush writes what is dirty, and returns how many bytes that was. What could
// not be written stays dirty; writing a key twice does no harm, so an unknown
// outcome is written again.
func (p *Presence) flush(ctx context.Context, lease clientv3.LeaseID) (size int, err error) {
	for {
		keys, ops := p.take(lease)
		if len(keys) == 0 {
			return size, nil
		}
		for _, op := range ops {
			size += len(op.ValueBytes())
		}
		tctx, cancel := context.WithTimeout(ctx, writeLimit)
		_, err := p.c.etcd.Txn(tctx).Then(ops...).Commit()
		cancel()
		if err != nil {
			p.mu.Lock()
			p.touch(keys...)
			p.mu.Unlock()
			return size, p.c.explain("write "+describe([]Op{{ops[0]}}), err)
		}
	}
}

// take takes up to MaxOps dirty keys and says what to do with them.
func (p *Presence) take(lease clientv3.LeaseID) (keys []string, ops []clientv3.Op) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for k := range p.dirty {
		if len(ops) == MaxOps {
			break
		}
		delete(p.dirty, k)
		keys = append(keys, k)
		if v, ok := p.want[k]; ok {
			ops = append(ops, clientv3.OpPut(k, v, clientv3.WithLease(lease)))
		} else {
			ops = append(ops, clientv3.OpDelete(k))
		}
	}
	return keys, ops
}

// repair marks keys that somebody else has taken off the lease.
func (p *Presence) repair(ctx context.Context, lease clientv3.LeaseID) error {
	ctx, cancel := context.WithTimeout(ctx, readLimit)
	defer cancel()
	resp, err := p.c.etcd.TimeToLive(ctx, lease, clientv3.WithAttachedKeys())
	if err != nil {
		return p.c.explain("read the lease", err)
	}
	if resp.TTL < 0 {
		return rpctypes.ErrLeaseNotFound
	}
	there := make(map[string]bool, len(resp.Keys))
	for _, k := range resp.Keys {
		there[string(k)] = true
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	for k := range p.want {
		if !there[k] {
			p.touch(k)
		}
	}
	return nil
}
