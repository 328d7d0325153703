package store

import (
	"context"
	"fmt"
	"strings"

	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc/codes"
)

// Op is one write of a transaction.
type Op struct{ op clientv3.Op }

// Put writes a key.
func Put(key, value string) Op { return Op{clientv3.OpPut(key, value)} }

// Delete removes a key. It is no error if there is none.
func Delete(key string) Op { return Op{clientv3.OpDelete(key)} }

// DeletePrefix removes all keys that begin with prefix.
func DeletePrefix(prefix string) Op { return Op{clientv3.OpDelete(prefix, clientv3.WithPrefix())} }

// Cond is one condition of a transaction.
type Cond struct{ cmp clientv3.Cmp }

// Missing holds if there is no such key.
func Missing(key string) Cond { return Cond{clientv3.Compare(clientv3.CreateRevision(key), "=", 0)} }

// Present holds if there is such a key.
func Present(key string) Cond { return Cond{clientv3.Compare(clientv3.CreateRevision(key), ">", 0)} }

// Unchanged holds if the key was last written at that revision; 0 is Missing.
func Unchanged(key string, modRevision int64) Cond {
	return Cond{clientv3.Compare(clientv3.ModRevision(key), "=", modRevision)}
}

// CreatedAt holds if the key was created at that revision and has not been
// deleted since: the key of a leader or an owner that must still be the same.
func CreatedAt(key string, createRevision int64) Cond {
	return Cond{clientv3.Compare(clientv3.CreateRevision(key), "=", createRevision)}
}

// Apply does all ops in one transaction if all conditions hold, and returns the
// store revision at which they are in force. No op may touch a key that another
// one puts. At most MaxOps ops and MaxOps conditions are allowed.
//
// ErrConflict: a condition does not hold and nothing was written; the revision
// is that of the refusal. ErrUnknown: it may have been done; read before writing
// again. Any other error: it was not done.
func (c *Client) Apply(ctx context.Context, ops []Op, conds ...Cond) (int64, error) {
	what := "write " + describe(ops)
	if len(ops) > MaxOps || len(conds) > MaxOps {
		return 0, fmt.Errorf("%s: %d operations and %d conditions are too many for one transaction, which takes %d of each: split it",
			what, len(ops), len(conds), MaxOps)
	}
	ctx, cancel := withLimit(ctx, writeLimit)
	defer cancel()
	var then []clientv3.Op
	for _, o := range ops {
		then = append(then, o.op)
	}
	var when []clientv3.Cmp
	for _, o := range conds {
		when = append(when, o.cmp)
	}
	ctx, tried := recorded(ctx)
	resp, err := c.etcd.Txn(ctx).If(when...).Then(then...).Commit()
	if err != nil {
		if tried.sent && unknownOutcome(err) {
			return 0, fmt.Errorf("%s: %w: the store at %s did not answer in time or the connection broke (%s)",
				what, ErrUnknown, strings.Join(c.Endpoints(), ", "), short(err))
		}
		return 0, c.explain(what, tried.cause(err))
	}
	if !resp.Succeeded {
		return resp.Header.Revision, fmt.Errorf("%s: %w", what, ErrConflict)
	}
	return resp.Header.Revision, nil
}

// describe names the first key of a transaction.
func describe(ops []Op) string {
	if len(ops) == 0 {
		return "nothing"
	}
	key := string(ops[0].op.KeyBytes())
	if len(ops) > 1 {
		return fmt.Sprintf("%s and %d more", key, len(ops)-1)
	}
	return key
}

// unknownOutcome reports whether a write that was sent and ended with err may
// have been done.
func unknownOutcome(err error) bool {
	switch codeOf(err) {
	case codes.InvalidArgument, codes.NotFound, codes.AlreadyExists, codes.PermissionDenied, codes.Unauthenticated,
		codes.FailedPrecondition, codes.OutOfRange, codes.Unimplemented, codes.ResourceExhausted:
		return false
	}
	return true
}
