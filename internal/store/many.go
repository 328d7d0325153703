package store

import (
	"context"
	"slices"

	clientv3 "go.etcd.io/etcd/client/v3"
	"golang.org/x/sync/errgroup"
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
		cctx, cancel := withLimit(ctx, readLimit)
		cctx, tried := recorded(cctx)
		resp, err := c.etcd.Txn(cctx).Then(reads...).Commit()
		cancel()
		if err != nil {
			return nil, 0, c.explain("read "+describe([]Op{{reads[0]}}), tried.cause(err))
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
