package store

import (
	"context"
	"errors"
	"fmt"
	"net/url"
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

// RemoveMember removes a member for good: its process ends and its data is of no
// more use. The member is named by its name, its ID (hexadecimal) or the host in the
// URL by which the other members know it, which it has even before it has started.
func (c *Client) RemoveMember(ctx context.Context, member string) error {
	if member == "" {
		return fmt.Errorf("remove a member of the store: %w", ErrNoMember) // a member that has not started has no name
	}
	what := "remove member " + member + " of the store"
	ctx, cancel := withLimit(ctx, writeLimit)
	defer cancel()
	ctx, tried := recorded(ctx)
	list, err := c.etcd.MemberList(ctx)
	if err != nil {
		return c.explain(what, tried.cause(err))
	}
	at := slices.IndexFunc(list.Members, func(m *etcdserverpb.Member) bool {
		isHost := func(peer string) bool { u, err := url.Parse(peer); return err == nil && u.Hostname() == member }
		return m.Name == member || strconv.FormatUint(m.ID, 16) == member || slices.ContainsFunc(m.PeerURLs, isHost)
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
