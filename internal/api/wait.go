package api

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"time"

	"flotilla/internal/state"
	"flotilla/internal/wait"
	"flotilla/internal/wire"
)

// postWait answers with a line for each event of a wait.
func (s *Server) postWait(w http.ResponseWriter, r *http.Request) {
	r.Body = http.MaxBytesReader(w, r.Body, maxRequest)
	limit, what, err := s.waitOf(r)
	if err != nil {
		fail(w, r, s.Log, err)
		return
	}
	w.Header().Set("Content-Type", "application/x-ndjson")
	w.WriteHeader(http.StatusOK)
	out, flush := json.NewEncoder(w), http.NewResponseController(w)
	out.SetEscapeHTML(false)
	_ = wait.Run(r.Context(), s.State, s.pace, limit, what, func(events ...wire.WaitEvent) error { // it ends when nobody reads any more
		for _, e := range events {
			if err := out.Encode(e); err != nil {
				return err
			}
		}
		if len(events) == 0 {
			if _, err := io.WriteString(w, "\n"); err != nil {
				return err
			}
		}
		return flush.Flush()
	})
}

// waitOf returns what a request waits for, and for how long; 0 is for ever.
func (s *Server) waitOf(r *http.Request) (limit time.Duration, what wait.Waiter, err error) {
	var in wire.Wait
	if err := readBody(r, &in); err != nil {
		return 0, nil, err
	}
	if in.Limit != "" {
		if limit, err = time.ParseDuration(in.Limit); err != nil || limit <= 0 {
			return 0, nil, wire.Errorf(wire.CodeBadRequest, "", "limit=%q is not a time such as 30s", in.Limit)
		}
	}
	known, err := s.State.Full(r.Context())
	if err != nil {
		return 0, nil, err
	}
	switch what = wait.Units(in.Goal, resolve(known, in.Names), s.pace); {
	case what != nil:
	case in.Goal == wire.GoalEmpty:
		id, err := findNode(known, in.Node, false)
		if err != nil {
			return 0, nil, err
		}
		what = wait.Empty(wait.Ref(known, id))
	case in.Goal == wire.GoalApplied && in.Revision > 0:
		what = &wait.Applied{Revision: in.Revision, Service: in.Service, Began: time.Now()}
	default:
		return 0, nil, wire.Errorf(wire.CodeBadRequest, "", "goal=%q, with a revision of %d, is nothing to wait for", in.Goal, in.Revision)
	}
	return limit, what, nil
}

// converge returns when every router has applied a revision, which is that of a
// service unless that is "".
func (s *Server) converge(ctx context.Context, revision int64, service string, limit time.Duration) ([]wire.Applied, error) {
	defer s.State.FollowReports()()
	a := &wait.Applied{Revision: revision, Service: service, Began: time.Now()}
	limited, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	_, _ = s.State.Full(limited) // what was reported before counts; while the store is away, what is known
	known, err := s.State.Until(limited, func(known *state.Snapshot) bool {
		if known.Reports {
			a.See(known)
		}
		return a.Reached()
	})
	switch {
	case err == nil:
		return a.List(), nil
	case ctx.Err() != nil:
		return nil, wire.Errorf(wire.CodeUnavailable, "", "the node is stopping, or nobody waits any more: %v", ctx.Err())
	}
	e := wire.Errorf(wire.CodeNotConverged, "flotilla nodes list shows how far each node is; nothing is undone, the change still spreads",
		"revision %d is not applied everywhere after %s: %s", revision, limit, a.Laggards())
	if !known.Reports {
		e.Message = fmt.Sprintf("revision %d: no node could be watched for %s: %s", revision, limit, s.State.Status().Err)
	}
	e.Applied = a.List()
	return nil, e
}

func (s *Server) getWait(r *http.Request) (any, error) {
	query := r.URL.Query().Get("revision")
	revision, err := strconv.ParseInt(query, 10, 64)
	if err != nil || revision < 1 {
		return nil, wire.Errorf(wire.CodeBadRequest, "", "revision=%q is not a store revision", query)
	}
	limit, err := durationOf(r, "timeout", 30*time.Second)
	if err != nil {
		return nil, err
	}
	applied, err := s.converge(r.Context(), revision, r.URL.Query().Get("service"), limit)
	return wire.Written{Revision: revision, Applied: applied}, err
}

// durationOf reads a duration of at most an hour from the query; "" is fallback.
func durationOf(r *http.Request, name string, fallback time.Duration) (time.Duration, error) {
	text := r.URL.Query().Get(name)
	if text == "" {
		return fallback, nil
	}
	d, err := time.ParseDuration(text)
	if err != nil || d <= 0 || d > time.Hour {
		return 0, wire.Errorf(wire.CodeBadRequest, "", "%s=%q is not a time such as 30s, up to 1h", name, text)
	}
	return d, nil
}
