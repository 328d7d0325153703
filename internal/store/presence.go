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
//
// Withdraw takes the keys out of the store until Return, and may come before Run.
type Presence struct {
	c   *Client
	ttl time.Duration
	log *slog.Logger

	wake chan struct{} // something is dirty

	mu    sync.Mutex
	want  map[string]string   // guarded by mu
	dirty map[string]struct{} // keys that differ, or may differ, from the store; guarded by mu
	away  bool                // withdrawn; guarded by mu
	drop  bool                // the present lease is to be revoked; guarded by mu

	lease  atomic.Pointer[leaseLink]
	linger atomic.Bool // see Linger
}

// Lease is how the lease of a Presence stands.
type Lease struct {
	Number int // 1 is the first one that this Presence was granted; 0: none was yet
	// Renewed is when the last renewal that the store confirmed had been sent: the
	// store keeps the lease for at least the TTL from then. It has a monotonic
	// reading. It is zero once the lease is known to be lost.
	Renewed time.Time
}

type leaseLink struct {
	Lease
	replaced chan struct{} // closed when a newer link is stored
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
	p := &Presence{c: c, ttl: ttl, log: log, wake: make(chan struct{}, 1), want: map[string]string{}, dirty: map[string]struct{}{}}
	p.lease.Store(&leaseLink{replaced: make(chan struct{})})
	return p
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

// Lease returns how the lease stands, and a channel that is closed when that
// changes: with each confirmed renewal, and when the lease is lost.
func (p *Presence) Lease() (Lease, <-chan struct{}) {
	l := p.lease.Load()
	return l.Lease, l.replaced
}

// tell publishes how the lease stands.
func (p *Presence) tell(l Lease) {
	close(p.lease.Swap(&leaseLink{l, make(chan struct{})}).replaced)
}

// Withdraw takes all keys out of the store, but not what somebody else has
// written to them, and has nothing written until Return: the lease is revoked.
func (p *Presence) Withdraw() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.away, p.drop = true, true
	p.touch()
}

// Return ends Withdraw: all keys are written, under another lease.
func (p *Presence) Return() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.away = false
	p.touch()
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
// that a process that is started again within the TTL was never away. What was
// deleted is deleted all the same.
func (p *Presence) Linger(linger bool) { p.linger.Store(linger) }

// errWithdrawn ends the keeping of a lease that is to be revoked.
var errWithdrawn = errors.New("the keys were withdrawn")

// Run keeps the keys until ctx ends, and returns nil then. Unless they linger it
// revokes the lease on the way out, which removes the keys at once, if that
// takes no longer than a second.
func (p *Presence) Run(ctx context.Context) error {
	var lease clientv3.LeaseID
	defer func() {
		if lease == 0 {
			return
		}
		rctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
		defer cancel()
		_, _ = p.flush(rctx, lease) // what was said last, for those who watch
		if !p.linger.Load() {
			_, _ = p.c.etcd.Revoke(rctx, lease) // it expires anyway
		}
	}()
	number, away := 0, false
	lost := func() {
		lease = 0
		p.tell(Lease{Number: number})
	}
	for p.admitted(ctx) {
		granted, err := p.grant(ctx, number+1)
		if err == nil {
			number++
			lease = granted
			if away {
				away = false
				p.log.Info("the keys of this node are in the store again")
			}
			err = p.keep(ctx, lease, number)
		}
		switch {
		case ctx.Err() != nil:
			return nil
		case errors.Is(err, errWithdrawn):
			rctx, cancel := context.WithTimeout(ctx, writeLimit)
			if _, err := p.c.etcd.Revoke(rctx, lease); err != nil {
				p.log.Warn("the keys of this node are in the store until their lease expires", "err", err)
			}
			cancel()
			lost()
			continue
		case errors.Is(err, rpctypes.ErrLeaseNotFound):
			lost()
			p.log.Warn("the lease of this node was lost: writing its keys again", "err", err)
			continue
		case !away:
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

// admitted waits while the keys are withdrawn. It returns false when ctx ends.
func (p *Presence) admitted(ctx context.Context) bool {
	for ctx.Err() == nil {
		p.mu.Lock()
		away := p.away
		p.drop = p.drop && away // there is no lease to revoke
		p.mu.Unlock()
		if !away {
			return true
		}
		select {
		case <-p.wake:
		case <-ctx.Done():
		}
	}
	return false
}

// dropped reports whether the lease is to be revoked.
func (p *Presence) dropped() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.drop
}

// grant gets the lease of that number and marks all keys to be written under it.
func (p *Presence) grant(ctx context.Context, number int) (clientv3.LeaseID, error) {
	ctx, cancel := context.WithTimeout(ctx, writeLimit)
	defer cancel()
	sent := time.Now()
	resp, err := p.c.etcd.Grant(ctx, int64((p.ttl+time.Second-1)/time.Second))
	if err != nil {
		return 0, p.c.explain("get a lease", err)
	}
	p.tell(Lease{number, sent})
	p.mu.Lock()
	defer p.mu.Unlock()
	p.touch(slices.Collect(maps.Keys(p.want))...)
	return resp.ID, nil
}

// keep renews the lease and writes what changes, until the lease is lost.
func (p *Presence) keep(ctx context.Context, lease clientv3.LeaseID, number int) error {
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
			if p.dropped() {
				return errWithdrawn
			}
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
			if p.dropped() {
				return errWithdrawn
			}
			err := p.renew(ctx, lease, number)
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

func (p *Presence) renew(ctx context.Context, lease clientv3.LeaseID, number int) error {
	ctx, cancel := context.WithTimeout(ctx, readLimit)
	defer cancel()
	sent := time.Now()
	if _, err := p.c.etcd.KeepAliveOnce(ctx, lease); err != nil {
		return p.c.explain("renew the lease", err)
	}
	p.tell(Lease{number, sent})
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
		tctx, cancel := context.WithTimeout(ctx, p.ttl/6) // a write that hangs must not keep the lease from being renewed
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
		if len(ops) == MaxOps || p.away || p.drop {
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
