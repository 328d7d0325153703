package store

import (
	"context"
	"errors"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
)

// holdTTL is how long the key of a holder that died stays, in seconds.
const holdTTL = 5

// errLeaseLost cancels the context of a holder whose lease was not renewed in time.
var errLeaseLost = errors.New("the lease was lost")

// Hold writes a key that only one client can have, and runs holding while this one
// does: with a context that ends when the lease of the key is lost, a condition
// that holds as long as the key is there, and the revision of its creation. The
// key is deleted when holding returns, whose error Hold returns; or within 5 s, if
// the store is away then.
//
// ErrConflict: somebody has the key. Other errors: the store's.
func (c *Client) Hold(ctx context.Context, key, value string, holding func(ctx context.Context, held Cond, created int64) error) error {
	gctx, granted := context.WithTimeout(ctx, writeLimit)
	defer granted()
	lease, err := c.etcd.Grant(gctx, holdTTL)
	if err != nil {
		return c.explain("get a lease", err)
	}
	defer func() { // with a context of its own: ctx may have ended
		rctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
		defer cancel()
		_, _ = c.etcd.Revoke(rctx, lease.ID) // it expires anyway
	}()
	created, err := c.Apply(gctx, []Op{{clientv3.OpPut(key, value, clientv3.WithLease(lease.ID))}}, Missing(key))
	if err != nil {
		return err
	}
	hctx, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	renewals, err := c.etcd.KeepAlive(hctx, lease.ID)
	if err != nil {
		return c.explain("keep a lease", err)
	}
	ended := make(chan struct{})
	defer func() { <-ended }()
	defer stop(nil)
	go func() {
		defer close(ended)
		for range renewals {
		}
		stop(errLeaseLost)
	}()
	err = holding(hctx, CreatedAt(key, created), created)
	if cause := context.Cause(hctx); errors.Is(cause, errLeaseLost) && ctx.Err() == nil {
		return cause
	}
	return err
}
