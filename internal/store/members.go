package store

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"

	"go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
)

// What RemoveMember may end with.
var (
	// ErrNoMember: the store has no such member.
	ErrNoMember = errors.New("the store has no such member")
	// ErrUnhealthy: the store does not change its members now, because too few
	// of them are healthy. It counts one that started a few seconds ago as absent.
	ErrUnhealthy = errors.New("the store does not change its members while some of them do not answer or have just started")
)

// RemoveMember removes the member of that name or ID (hexadecimal) for good: its
// process ends and its data is of no more use. It may be repeated.
func (c *Client) RemoveMember(ctx context.Context, member string) error {
	what := "remove member " + member + " of the store"
	ctx, cancel := withLimit(ctx, writeLimit)
	defer cancel()
	ctx, tried := recorded(ctx)
	list, err := c.etcd.MemberList(ctx)
	if err != nil {
		return c.explain(what, tried.cause(err))
	}
	at := slices.IndexFunc(list.Members, func(m *etcdserverpb.Member) bool {
		return m.Name == member && member != "" || strconv.FormatUint(m.ID, 16) == member
	})
	if at < 0 {
		return fmt.Errorf("%s: %w", what, ErrNoMember)
	}
	switch _, err := c.etcd.MemberRemove(ctx, list.Members[at].ID); {
	case err == nil, errors.Is(err, rpctypes.ErrMemberNotFound): // somebody else removed it meanwhile
		return nil
	case errors.Is(err, rpctypes.ErrUnhealthy), errors.Is(err, rpctypes.ErrMemberNotEnoughStarted):
		return fmt.Errorf("%s: %w", what, ErrUnhealthy)
	default:
		return c.explain(what, tried.cause(err))
	}
}
