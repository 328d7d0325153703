package store

import (
	"context"
	"errors"
	"sync"
	"time"
)

// fresh is the answer to one linearizable read.
type fresh struct {
	head
	began time.Time
	floor int64 // revision known before the read began
	value string
	err   error
}

func (f fresh) at(floor int64) fresh {
	f.floor = floor
	return f
}

// freshReads are the reads of a Client that are about to begin. A node follows
// many prefixes: one read proves for all how far the store is.
type freshReads struct {
	mu  sync.Mutex
	due map[string]*freshRead // by key; guarded by mu
}

type freshRead struct {
	done   chan struct{}
	answer fresh // when done is closed
}

// readFresh reads a key linearizably. It begins after the time to gather, in
// which others who ask for that key join it; 0 is to read at once and alone.
func (c *Client) readFresh(ctx context.Context, key string, gather time.Duration) fresh {
	if gather == 0 {
		return c.readAlone(ctx, key)
	}
	c.fresh.mu.Lock()
	r := c.fresh.due[key]
	if r != nil {
		c.fresh.mu.Unlock()
		select {
		case <-r.done:
		case <-ctx.Done():
			return fresh{began: time.Now(), err: ctx.Err()}
		}
		if errors.Is(r.answer.err, context.Canceled) { // that of whoever asked first
			return c.readAlone(ctx, key)
		}
		return r.answer
	}
	r = &freshRead{done: make(chan struct{})}
	if c.fresh.due == nil {
		c.fresh.due = map[string]*freshRead{}
	}
	c.fresh.due[key] = r
	c.fresh.mu.Unlock()
	select {
	case <-time.After(gather):
	case <-ctx.Done():
	}
	c.fresh.mu.Lock()
	delete(c.fresh.due, key)
	c.fresh.mu.Unlock()
	r.answer = c.readAlone(ctx, key)
	close(r.done)
	return r.answer
}

func (c *Client) readAlone(ctx context.Context, key string) fresh {
	f := fresh{began: time.Now()}
	ctx, cancel := context.WithTimeout(ctx, readLimit)
	defer cancel()
	ctx, tried := recorded(ctx)
	resp, err := c.etcd.Get(ctx, key)
	if err != nil {
		f.err = c.explain("read "+key, tried.cause(err))
		return f
	}
	f.head = head{resp.Header.ClusterId, resp.Header.Revision}
	if len(resp.Kvs) > 0 {
		f.value = string(resp.Kvs[0].Value)
	}
	return f
}
