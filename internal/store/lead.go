package store

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"time"

	"go.etcd.io/etcd/client/v3/concurrency"
)

// leaderTTL is how long the others wait after a leader died.
const leaderTTL = 5 // seconds

// Lead takes part in the election below prefix until ctx ends, and returns nil
// then. Whenever this process is elected it calls lead, with a context that ends
// when the leadership is lost and a condition that holds as long as it is not:
// every write of the leader carries it, so that one who was deposed and does not
// know yet cannot write. When lead returns, the leadership is given up, and
// after a second this process stands for election again. value is what others
// can read of the leader: its name or its address.
func (c *Client) Lead(ctx context.Context, prefix, value string, log *slog.Logger, lead func(ctx context.Context, leader Cond) error) error {
	away := false
	for ctx.Err() == nil {
		err := c.leadOnce(ctx, prefix, value, lead)
		if ctx.Err() != nil {
			break
		}
		switch {
		case errors.Is(err, errNotElected):
			if !away {
				log.Warn("cannot take part in the election: trying again", "election", prefix, "err", err)
			}
			away = true
		case err != nil:
			log.Warn("leadership ended", "election", prefix, "err", err)
			away = false
		}
		select {
		case <-time.After(jitter(time.Second)):
		case <-ctx.Done():
		}
	}
	return nil
}

// errNotElected wraps errors that occur before this process is elected.
var errNotElected = errors.New("no election")

// errDeposed cancels the leader's context when it loses leadership.
var errDeposed = errors.New("the leadership was lost")

func (c *Client) leadOnce(ctx context.Context, prefix, value string, lead func(ctx context.Context, leader Cond) error) (err error) {
	gctx, granted := context.WithTimeout(ctx, writeLimit)
	lease, err := c.etcd.Grant(gctx, leaderTTL)
	granted()
	if err != nil {
		return fmt.Errorf("%w: %w", errNotElected, c.explain("get a lease", err))
	}
	session, err := concurrency.NewSession(c.etcd, concurrency.WithLease(lease.ID), concurrency.WithContext(ctx))
	if err != nil {
		return fmt.Errorf("%w: %w", errNotElected, c.explain("keep a lease", err))
	}
	defer func() {
		// The lease is revoked with a context of its own: ctx may have ended. If
		// the store is away it expires.
		session.Orphan()
		rctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
		defer cancel()
		_, _ = c.etcd.Revoke(rctx, lease.ID)
	}()
	lctx, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	go func() {
		select {
		case <-session.Done():
			stop(errDeposed)
		case <-lctx.Done():
		}
	}()
	// The prefix of concurrency has no slash at its end.
	election := concurrency.NewElection(session, strings.TrimSuffix(prefix, "/"))
	if err := election.Campaign(lctx, value); err != nil {
		return fmt.Errorf("%w: %w", errNotElected, c.explain("wait to be elected", err))
	}
	go func() { // the key may be deleted while the lease lives on
		_ = c.Watch(lctx, election.Key(), election.Rev()+1, func(events []Event) error {
			for _, e := range events {
				if e.Deleted {
					stop(errDeposed)
				}
			}
			return nil
		})
	}()
	err = lead(lctx, CreatedAt(election.Key(), election.Rev()))
	if cause := context.Cause(lctx); ctx.Err() == nil && cause != nil {
		return cause
	}
	return err
}
