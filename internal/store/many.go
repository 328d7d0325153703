package store

import (
	"context"
	"slices"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc/codes"
)

// GetMany reads any number of keys as they were at one revision, which it
// returns; revision 0 is now, linearizably. Keys that do not exist are not in
// the map. ErrCompacted: the store no longer keeps that revision.
func (c *Client) GetMany(ctx context.Context, revision int64, keys ...string) (map[string]KV, int64, error) {
	found := make(map[string]KV, len(keys))
	for some := range slices.Chunk(keys, MaxOps) {
		var reads []clientv3.Op
		for _, key := range some {
			reads = append(reads, clientv3.OpGet(key, clientv3.WithRev(revision)))
		}
		resp, err := c.readTxn(ctx, reads)
		if err != nil {
			return nil, 0, err
		}
		if revision == 0 {
			revision = resp.Header.Revision
		}
		for _, r := range resp.Responses {
			for _, kv := range r.GetResponseRange().Kvs {
				found[string(kv.Key)] = kvOf(kv)
			}
		}
	}
	return found, revision, nil
}

// readTxn tries again when a connection breaks, which clientv3 does not do for
// transactions: it cannot know that this one writes nothing.
func (c *Client) readTxn(ctx context.Context, reads []clientv3.Op) (*clientv3.TxnResponse, error) {
	ctx, cancel := withLimit(ctx, readLimit)
	defer cancel()
	ctx, tried := recorded(ctx)
	for {
		resp, err := c.etcd.Txn(ctx).Then(reads...).Commit()
		if err == nil {
			return resp, nil
		}
		if codeOf(err) == codes.Unavailable {
			select {
			case <-time.After(50 * time.Millisecond):
				continue
			case <-ctx.Done():
			}
		}
		return nil, c.explain("read "+string(reads[0].KeyBytes()), tried.cause(err))
	}
}

// ListMany reads all keys below each prefix as they were at one revision, which
// it returns; revision 0 is now. The answers are in the order of the prefixes,
// each sorted. ErrCompacted: the store no longer keeps that revision.
func (c *Client) ListMany(ctx context.Context, revision int64, prefixes ...string) ([][]KV, int64, error) {
	lists := make([][]KV, len(prefixes))
	first := 0
	if revision == 0 && len(prefixes) > 0 {
		items, at, err := c.list(ctx, prefixes[0], 0)
		if err != nil {
			return nil, 0, err
		}
		lists[0], revision, first = items, at.revision, 1
	}
	g, ctx := errgroup.WithContext(ctx)
	for i, prefix := range prefixes {
		if i < first {
			continue
		}
		g.Go(func() error {
			items, _, err := c.list(ctx, prefix, revision)
			lists[i] = items
			return err
		})
	}
	return lists, revision, g.Wait()
}
