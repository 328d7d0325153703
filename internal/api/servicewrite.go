package api

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"time"

	"flotilla/internal/catalog"
	"flotilla/internal/store"
	"flotilla/internal/wire"
)

// attempts is how often a change is planned again when somebody else changed
// the same keys meanwhile.
const attempts = 10

func (s *Server) putService(r *http.Request) (any, error) {
	var c wire.ServiceChange
	if err := readBody(r, &c); err != nil {
		return nil, err
	}
	wait, err := durationOf(r, "wait", 0)
	if err != nil {
		return nil, err
	}
	name := r.PathValue("name")
	return s.written(r.Context(), name, wait, func(ctx context.Context) (wire.Written, error) { return s.changeService(ctx, name, c) })
}

func (s *Server) deleteService(r *http.Request) (any, error) {
	wait, err := durationOf(r, "wait", 0)
	if err != nil {
		return nil, err
	}
	name := r.PathValue("name")
	return s.written(r.Context(), name, wait, func(ctx context.Context) (wire.Written, error) { return s.removeService(ctx, name) })
}

// written does a write and, if wait is not 0, waits for the nodes.
func (s *Server) written(ctx context.Context, service string, wait time.Duration, write func(context.Context) (wire.Written, error)) (any, error) {
	w, err := write(ctx)
	if err != nil || wait == 0 {
		return w, err
	}
	w.Applied, err = s.converge(ctx, w.Revision, service, wait)
	return w, err
}

// changeService carries out c in one transaction that is guarded by what it was
// planned from.
func (s *Server) changeService(ctx context.Context, service string, c wire.ServiceChange) (wire.Written, error) {
	if service == "" || strings.Contains(service, "/") {
		return wire.Written{}, wire.Errorf(wire.CodeInvalid, "use letters, digits, '-' and '_'", "%s is not a service name", strconv.Quote(service))
	}
	var err error
	for range attempts {
		var have keys
		if have, err = s.keys(ctx, service); err != nil {
			return wire.Written{}, err
		}
		var e edits
		if e, err = edit(&c, have); err != nil {
			return wire.Written{}, err
		}
		if err = e.check(service, have, s.Policy, s.Catalog.Latest()); err != nil {
			return wire.Written{}, err
		}
		if len(e) == 0 {
			return wire.Written{Revision: have.revision()}, nil
		}
		if len(e) > store.MaxOps {
			return wire.Written{}, wire.Errorf(wire.CodeBadRequest, "split it", "a change of %d keys is too large: one can have %d", len(e), store.MaxOps)
		}
		var revision int64
		if revision, err = s.Store.Apply(ctx, e.ops(service), e.guards(service, have)...); err == nil {
			s.Log.Info("service changed", "service", service, "keys", len(e), "revision", revision)
			return wire.Written{Revision: revision, Changed: true}, nil
		}
		if !errors.Is(err, store.ErrConflict) {
			break
		}
	}
	return wire.Written{}, fmt.Errorf("change service %s: %w", service, err)
}

// keys reads those of one service from the store: the catalog holds deletions back,
// and a change that is planned from it could take what is old for what is there.
func (s *Server) keys(ctx context.Context, service string) (keys, error) {
	prefix := catalog.Prefix + service + "/"
	items, _, err := s.Store.List(ctx, prefix)
	if err != nil {
		return nil, err
	}
	have := keys{}
	for _, kv := range items {
		have[strings.TrimPrefix(kv.Key, prefix)] = kv
	}
	return have, nil
}

func (have keys) revision() int64 {
	var newest int64
	for _, kv := range have {
		newest = max(newest, kv.ModRevision)
	}
	return newest
}

func (e edits) ops(service string) []store.Op {
	var ops []store.Op
	for name, value := range e {
		key := catalog.Prefix + service + "/" + name
		if value == nil {
			ops = append(ops, store.Delete(key))
		} else {
			ops = append(ops, store.Put(key, *value))
		}
	}
	return ops
}

func (e edits) guards(service string, have keys) []store.Cond {
	var conds []store.Cond
	for name := range e {
		// A key that is not there has revision 0.
		conds = append(conds, store.Unchanged(catalog.Prefix+service+"/"+name, have[name].ModRevision))
	}
	return conds
}

func (s *Server) removeService(ctx context.Context, service string) (wire.Written, error) {
	have, err := s.keys(ctx, service)
	if err != nil {
		return wire.Written{}, err
	}
	if len(have) == 0 {
		return wire.Written{}, noService(s.Catalog.Latest(), service)
	}
	revision, err := s.Store.Apply(ctx, []store.Op{store.DeletePrefix(catalog.Prefix + service + "/")})
	if err != nil {
		return wire.Written{}, fmt.Errorf("remove service %s: %w", service, err)
	}
	s.Log.Info("service removed", "service", service, "keys", len(have), "revision", revision)
	return wire.Written{Revision: revision, Changed: true}, nil
}

// postConfirm accepts a held disappearance of endpoints for the whole cluster, and
// on this node a store whose content is another than before.
func (s *Server) postConfirm(r *http.Request) (any, error) {
	if s.StoreStatus().Held || s.State.Status().Held {
		s.State.AcceptEpoch()
		if s.AcceptEpoch != nil {
			s.AcceptEpoch()
		}
		s.Log.Warn("the store's new content was accepted by hand")
		return wire.Written{Changed: true}, nil
	}
	var held *catalog.Hold
	if s.Catalog != nil && s.Catalog.Latest() != nil {
		held = s.Catalog.Latest().Held
	}
	if held == nil {
		return nil, wire.Errorf(wire.CodeConflict, "", "nothing is held back on this node")
	}
	revision, err := s.Store.Apply(r.Context(), []store.Op{store.Put(s.State.Keys.Confirmed(), strconv.FormatInt(held.Revision, 10))})
	if err != nil {
		return nil, fmt.Errorf("confirm up to revision %d: %w", held.Revision, err)
	}
	s.Log.Info("a mass disappearance of endpoints was confirmed by hand", "revision", held.Revision)
	return wire.Written{Revision: revision, Changed: true}, nil
}
