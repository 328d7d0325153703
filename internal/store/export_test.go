package store

import (
	"context"
	"time"
)

// SetPeriods makes a Reflector quick enough for a test.
func (r *Reflector) SetPeriods(fresh, check, hold time.Duration) {
	r.freshPeriod, r.checkPeriod, r.holdLimit = fresh, check, hold
}

// ReadFresh is readFresh.
func (c *Client) ReadFresh(ctx context.Context, key string, gather time.Duration) (began time.Time, cluster uint64, err error) {
	f := c.readFresh(ctx, key, gather)
	return f.began, f.cluster, f.err
}

// FreshDue reports whether a read of the key gathers those who join it.
func (c *Client) FreshDue(key string) bool {
	c.fresh.mu.Lock()
	defer c.fresh.mu.Unlock()
	return c.fresh.due[key] != nil
}
