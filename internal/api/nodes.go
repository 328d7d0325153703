package api

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"math"
	"net/http"
	"slices"
	"strings"
	"time"

	"flotilla/internal/state"
	"flotilla/internal/store"
	"flotilla/internal/text"
	"flotilla/internal/wait"
	"flotilla/internal/wire"
)

func (s *Server) getStatus(*http.Request) (any, error) { return s.status(), nil }

func (s *Server) status() wire.Status {
	known := s.State.Latest()
	st := wire.Status{
		Name: s.Node, ID: s.ID, Version: s.Version, Address: s.Address, Domain: s.Domain,
		Started: s.Started, Uptime: math.Round(time.Since(s.Started).Seconds()*10) / 10,
		Leader: known.Leader.Value.Name, Store: s.StoreStatus(),
	}
	st.Store.Endpoints = s.Store.Endpoints()
	if s.Catalog != nil {
		snapshot, router, dns := s.Catalog.Latest(), s.Router.Status(), s.DNS()
		st.Services, st.Revision, st.Router, st.DNS = snapshot.Len(), snapshot.Rev(), &router, &dns
		st.Problems = s.Problems() + len(router.Problems)
		if snapshot != nil {
			st.Held = snapshot.Held
		}
	}
	if s.Warnings != nil {
		st.Warnings = s.Warnings()
	}
	return st
}

// getNodes answers without the store too: with what was known last.
func (s *Server) getNodes(r *http.Request) (any, error) {
	health := make(chan wire.StoreHealth, 1)
	go func() { health <- s.Store.Status(r.Context()) }()
	known, err := s.State.Full(r.Context())
	out := wire.Nodes{Nodes: []wire.Node{}, Stale: err != nil, Store: <-health}
	if err != nil {
		if out.Store.Quorum {
			return nil, err
		}
		known = s.State.Latest()
	}
	out.Revision = known.Revision
	if known.Failover.Usable() {
		out.Failover = new(failoverOf(known.Failover.Value))
	}
	placed := map[string]int{}
	var globals []string
	for name, u := range known.Units {
		if u.Placement.Exists() {
			placed[u.Placement.Value.Node]++
		}
		if u.Record.Exists() && u.Requirements.Global {
			globals = append(globals, name)
		}
	}
	for id, n := range known.Nodes {
		if !n.Present() {
			continue
		}
		node := s.node(known, n)
		node.Units = placed[id]
		for _, name := range globals {
			if n.Units.Value.Units[name].Hash != "" {
				node.Globals++
			}
		}
		out.Nodes = append(out.Nodes, node)
	}
	slices.SortFunc(out.Nodes, func(a, b wire.Node) int { return cmp.Or(cmp.Compare(a.Name, b.Name), cmp.Compare(a.ID, b.ID)) })
	return out, nil
}

// getNode answers with one node, without what is on it.
func (s *Server) getNode(r *http.Request) (any, error) {
	known, err := s.State.Full(r.Context())
	if err != nil {
		return nil, err
	}
	id, err := findNode(known, r.PathValue("node"), false)
	if err != nil {
		return nil, err
	}
	return s.node(known, known.Nodes[id]), nil
}

// node returns all that is known of a node but what is on it.
func (s *Server) node(known *state.Snapshot, n *state.Node) wire.Node {
	r, set, router := n.Record.Value, n.Settings.Value, n.Router.Value
	return wire.Node{
		ID: n.ID, Name: r.Name, Address: r.Address, Peer: r.Peer, Version: r.Version, Started: time.Unix(r.Started, 0).UTC(),
		BootID: r.BootID, Generation: n.Generation(), Memory: r.Memory, CPU: r.CPU, Counters: r.Counters,
		Metadata: n.Metadata, Cordon: set.Cordon, Drain: set.Drain, Reason: set.Reason,
		RunsUnits: r.Units, Routes: r.Routes,
		Applied: router.Applied, Serving: router.Serving, Draining: router.Draining, Refused: router.Refused,
		Leader: known.Leader.Exists() && known.Leader.Value.Node == n.ID, Here: n.ID == s.ID,
	}
}

// findNode returns the ID of the node that somebody means: an ID, a name, an
// address or the beginning of just one ID. With away it may also be the ID of a
// node that is not there: one that has settings, or one that looks like systemd's.
func findNode(known *state.Snapshot, what string, away bool) (string, error) {
	const hint = "list them with: flotilla nodes list"
	if n := known.Nodes[what]; n.Present() || away && n != nil {
		return what, nil
	}
	var exactly, begin []string
	for id, n := range known.Nodes {
		if r := n.Record.Value; n.Present() && (r.Name == what || r.Address == what) {
			exactly = append(exactly, id)
		} else if n.Present() && strings.HasPrefix(id, what) {
			begin = append(begin, id)
		}
	}
	switch {
	case what == "":
		return "", wire.Errorf(wire.CodeBadRequest, hint, "no node is named")
	case len(exactly) == 1:
		return exactly[0], nil
	case len(exactly) > 1:
		slices.Sort(exactly)
		return "", wire.Errorf(wire.CodeConflict, "write the ID of one", "%s means %d nodes: %s", text.Show(what), len(exactly), strings.Join(exactly, ", "))
	case len(begin) == 1:
		return begin[0], nil
	case len(begin) > 1:
		return "", wire.Errorf(wire.CodeConflict, hint, "%d nodes have an ID that begins with %q", len(begin), what)
	case away && len(what) == 32 && strings.Trim(what, "0123456789abcdef") == "":
		return what, nil
	}
	return "", wire.Errorf(wire.CodeNotFound, hint, "there is no node %q", what)
}

func (s *Server) postSettings(r *http.Request) (any, error) {
	var in wire.SettingsChange
	if err := readBody(r, &in); err != nil {
		return nil, err
	}
	for key, value := range in.Metadata {
		if value != nil {
			if err := CheckMetadata(key, *value); err != nil {
				return nil, wire.Errorf(wire.CodeBadRequest, "", "%v", err)
			}
		}
	}
	known, err := s.State.Fresh(r.Context())
	if err != nil {
		return nil, err
	}
	id, err := findNode(known, r.PathValue("node"), true)
	if err != nil {
		return nil, err
	}
	out := wire.SettingsChanged{Node: wait.Ref(known, id)}
	var set state.Settings
	set, out.Changed, out.Revision, err = s.ChangeSettings(r.Context(), id, func(set *state.Settings) { editSettings(set, in) })
	if err != nil {
		return nil, err
	}
	out.Settings = wire.NodeSettings{Metadata: set.Metadata, Cordon: set.Cordon, Drain: set.Drain, Reason: set.Reason}
	var own map[string]string
	if n := known.Nodes[id]; n != nil {
		own = n.Record.Value.Metadata
	}
	out.Metadata = set.Merge(own)
	return out, nil
}

// editSettings makes settings what c asks for.
func editSettings(set *state.Settings, c wire.SettingsChange) {
	if c.Cordon != nil {
		set.Cordon = *c.Cordon
	}
	if c.Drain != nil {
		set.Drain = *c.Drain
	}
	if c.Reason != nil {
		set.Reason = *c.Reason
	}
	if !set.Cordon && !set.Drain {
		set.Reason = ""
	}
	for key, value := range c.Metadata {
		if value == nil {
			delete(set.Metadata, key)
		} else {
			set.Metadata[key] = *value
		}
	}
}

// CheckMetadata returns what keeps a node from having that metadata, or nil.
func CheckMetadata(key, value string) error {
	const limit = 4096
	switch {
	case key == "" || strings.Trim(key, "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_.-") != "":
		return fmt.Errorf("the key %q is not letters, digits, dots, dashes and underscores", key)
	case len(key)+len(value) > limit:
		return fmt.Errorf("%.40s is longer than %d bytes", key, limit)
	case strings.ContainsFunc(value, func(r rune) bool { return r < ' ' || r == 0x7f || r == '\ufffd' }):
		return fmt.Errorf("the value of %s has a control character in it", key)
	}
	return nil
}

// maxSettings is the longest record of the settings of one node, in bytes of JSON.
const maxSettings = 256 << 10

// ChangeSettings changes the settings of a node, whether it is there or not. edit
// gets what is there now, with a map of metadata that it may change, and may be
// called again. changed reports whether anything was written.
func (s *Server) ChangeSettings(ctx context.Context, id string, edit func(*state.Settings)) (now state.Settings, changed bool, revision int64, err error) {
	key := s.State.Keys.Settings(id)
	revision, err = s.State.Update(ctx, func(known *state.Snapshot) (state.Tx, error) {
		var have state.Item[state.Settings]
		if n := known.Nodes[id]; n != nil {
			have = n.Settings
		}
		if have.Problem != "" {
			return state.Tx{}, wire.Errorf(wire.CodeConflict, "upgrade this node, or delete "+key, "the settings of node %s cannot be read: %s", id, have.Problem)
		}
		now = have.Value
		now.V, now.Metadata = state.Version, maps.Clone(now.Metadata)
		if now.Metadata == nil {
			now.Metadata = map[string]string{}
		}
		edit(&now)
		value := have.With(now)
		switch {
		case state.Encode(now) == state.Encode(have.Value), !have.Exists() && state.Encode(now) == state.Encode(state.Settings{V: state.Version}):
			return state.Tx{}, nil
		case len(value) > maxSettings:
			return state.Tx{}, wire.Errorf(wire.CodeBadRequest, "remove what nobody uses", "node %s would have %d bytes of settings, and the limit is %d", id, len(value), maxSettings)
		}
		changed = true
		return state.Tx{Ops: []store.Op{store.Put(key, value)}, Conds: []store.Cond{store.Unchanged(key, have.Modified)}}, nil
	})
	if err != nil {
		return now, false, 0, failed(err, "change the settings of node "+id)
	}
	if changed {
		s.Log.Info("settings of a node changed", "node", id, "cordon", now.Cordon, "drain", now.Drain, "reason", now.Reason, "metadata", now.Metadata, "revision", revision)
	}
	return now, changed, revision, nil
}

// failed says what was tried when it failed, unless err is an answer.
func failed(err error, what string) error {
	if e := (*wire.Error)(nil); errors.As(err, &e) {
		return err
	}
	return fmt.Errorf("%s: %w", what, err)
}

func failoverOf(f state.Failover) wire.Failover {
	return wire.Failover{Held: f.Held, Until: f.Until, Allowed: f.Allowed}
}

// postFailover lets the engine move the units of nodes that are gone although they
// are many.
func (s *Server) postFailover(r *http.Request) (any, error) {
	var in wire.FailoverChange
	if err := readBody(r, &in); err != nil {
		return nil, err
	}
	if !in.Allow {
		return nil, wire.Errorf(wire.CodeBadRequest, "", `the only thing to say is {"allow": true}`)
	}
	key := s.State.Keys.Failover()
	var out wire.FailoverChanged
	written := false
	revision, err := s.State.Update(r.Context(), func(known *state.Snapshot) (state.Tx, error) {
		have := known.Failover
		switch {
		case have.Problem != "":
			return state.Tx{}, wire.Errorf(wire.CodeConflict, "upgrade this node, or delete "+key, "what is held back cannot be read: %s", have.Problem)
		case !have.Exists() || len(have.Value.Held) == 0:
			return state.Tx{}, wire.Errorf(wire.CodeConflict, "", "nothing is held back")
		}
		f := have.Value
		f.Allowed = true
		out.Failover = failoverOf(f)
		if have.Value.Allowed {
			return state.Tx{}, nil
		}
		written = true
		return state.Tx{Ops: []store.Op{store.Put(key, have.With(f))}, Conds: []store.Cond{store.Unchanged(key, have.Modified)}}, nil
	})
	if err != nil {
		return nil, failed(err, "allow the failover")
	}
	if written {
		s.Log.Info("failover of many nodes was allowed by hand", "node", out.Failover.Held, "revision", revision)
	}
	out.Revision = revision
	return out, nil
}

// postLeave takes this node out of the cluster. It answers when its units have
// stopped.
func (s *Server) postLeave(r *http.Request) (any, error) {
	if s.Leave == nil {
		return nil, wire.Errorf(wire.CodeConflict, "", "the node that answers runs no units: it has nothing to leave with")
	}
	return struct{}{}, s.Leave(r.Context())
}

// deleteMember takes a member out of the store for good.
func (s *Server) deleteMember(r *http.Request) (any, error) {
	err := s.Store.RemoveMember(r.Context(), r.PathValue("member"))
	switch {
	case errors.Is(err, store.ErrNoMember):
		return nil, wire.Errorf(wire.CodeNotFound, "flotilla nodes list", "%v", err)
	case errors.Is(err, store.ErrUnhealthy):
		return nil, wire.Errorf(wire.CodeConflict, "run it again in some seconds", "%v", err)
	}
	return struct{}{}, err
}
