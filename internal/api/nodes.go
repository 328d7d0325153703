package api

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"time"

	"flotilla/internal/client"
	"flotilla/internal/store"
)

// NodesPrefix is the key prefix of the records of nodes, a client.NodeRecord each.
const NodesPrefix = "/flotilla/nodes/"

// records returns the records of the live nodes by name and the store revision
// they were read at. A record that cannot be read still is a node.
func (s *Server) records(ctx context.Context) ([]client.NodeRecord, int64, error) {
	items, revision, err := s.Store.List(ctx, NodesPrefix)
	if err != nil {
		return nil, 0, err
	}
	records := make([]client.NodeRecord, len(items))
	for i, kv := range items {
		records[i] = record(kv)
	}
	return records, revision, nil
}

func record(kv store.KV) client.NodeRecord {
	var r client.NodeRecord
	if err := json.Unmarshal([]byte(kv.Value), &r); err != nil {
		r = client.NodeRecord{}
	}
	r.Name = strings.TrimPrefix(kv.Key, NodesPrefix)
	return r
}

// nodes answers without the store too: with what can still be found out.
func (s *Server) nodes(ctx context.Context) (*client.Nodes, error) {
	n := &client.Nodes{Nodes: []client.ClusterNode{}, Store: storeOf(s.Store.Status(ctx))}
	records, _, err := s.records(ctx)
	if err != nil && n.Store.Quorum {
		return nil, err
	}
	for _, r := range records {
		n.Nodes = append(n.Nodes, client.ClusterNode{NodeRecord: r, Self: r.Name == s.Node})
	}
	return n, nil
}

func storeOf(h store.Health) client.StoreHealth {
	st := client.StoreHealth{Cluster: h.Cluster, Quorum: h.Quorum, Err: h.Err}
	for _, m := range h.Members {
		st.Members = append(st.Members, client.Member(m))
	}
	return st
}

func (s *Server) wait(r *http.Request) (any, error) {
	revision, err := revisionOf(r)
	if err != nil {
		return nil, err
	}
	limit, err := durationOf(r, "timeout", 30*time.Second)
	if err != nil {
		return nil, err
	}
	applied, err := s.converge(r.Context(), r.FormValue("service"), revision, limit)
	if err != nil {
		return nil, err
	}
	return client.Written{Revision: revision, Applied: applied}, nil
}

// errConverged ends a watch whose purpose is reached.
var errConverged = errors.New("every node has applied the revision")

// converge returns when every live node has applied revision, and has not refused
// what it says of service, if that is not "". A node that goes away meanwhile is no
// longer waited for, one that comes is.
func (s *Server) converge(ctx context.Context, service string, revision int64, limit time.Duration) ([]client.Applied, error) {
	w := waiting{service: service, revision: revision, refused: map[string]bool{}, began: time.Now(), nodes: map[string]client.Applied{}}
	limited, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	var last error
	for {
		err := w.follow(limited, s)
		if errors.Is(err, errConverged) {
			return w.list(), nil
		}
		if limited.Err() == nil || last == nil {
			last = err
		}
		pause := time.NewTimer(200 * time.Millisecond) // the store is away or compacted the watch
		select {
		case <-pause.C:
			continue
		case <-limited.Done():
			pause.Stop()
		}
		if err := ctx.Err(); err != nil {
			return nil, client.Errorf(client.CodeUnavailable, "", "the node is stopping, or nobody waits any more: %v", err)
		}
		e := client.Errorf(client.CodeNotConverged, "flotilla nodes list shows how far each node is; nothing is undone, the change still spreads",
			"revision %d is not applied everywhere after %s: %s", revision, limit, w.laggards())
		if len(w.nodes) == 0 && last != nil {
			e.Message = fmt.Sprintf("revision %d: no node could be watched for %s: %v", revision, limit, last)
		}
		e.Applied = w.list()
		return nil, e
	}
}

// waiting is how far each node is while one caller waits.
type waiting struct {
	service  string
	revision int64
	began    time.Time
	nodes    map[string]client.Applied
	refused  map[string]bool // by node, whose HAProxy does not take the service
}

// follow reads all records and watches them until all have the revision, which
// it reports as errConverged.
func (w *waiting) follow(ctx context.Context, s *Server) error {
	records, at, err := s.records(ctx)
	if err != nil {
		return err
	}
	gone := map[string]bool{}
	for name := range w.nodes {
		gone[name] = true
	}
	for _, r := range records {
		delete(gone, r.Name)
		w.saw(r)
	}
	for name := range gone {
		delete(w.nodes, name)
	}
	if w.done() {
		return errConverged
	}
	return s.Store.Watch(ctx, NodesPrefix, at+1, func(events []store.Event) error {
		for _, e := range events {
			r := record(e.KV)
			if e.Deleted {
				delete(w.nodes, r.Name)
			} else {
				w.saw(r)
			}
		}
		if w.done() {
			return errConverged
		}
		return nil
	})
}

func (w *waiting) saw(r client.NodeRecord) {
	if w.nodes[r.Name].Reached {
		return
	}
	since, refused := r.Refused[w.service]
	w.refused[r.Name] = refused && since <= w.revision
	a := client.Applied{Node: r.Name, Revision: r.Applied, Reached: r.Applied >= w.revision && !w.refused[r.Name]}
	if a.Reached {
		a.MS = float64(time.Since(w.began).Microseconds()) / 1000
	}
	w.nodes[r.Name] = a
}

func (w *waiting) done() bool {
	for _, a := range w.nodes {
		if !a.Reached {
			return false
		}
	}
	return len(w.nodes) > 0
}

func (w *waiting) list() []client.Applied {
	list := make([]client.Applied, 0, len(w.nodes))
	for _, a := range w.nodes {
		list = append(list, a)
	}
	slices.SortFunc(list, func(a, b client.Applied) int { return strings.Compare(a.Node, b.Node) })
	return list
}

// laggards returns "n2 is at 41, n3 is at 40".
func (w *waiting) laggards() string {
	var behind []string
	for _, a := range w.list() {
		if !a.Reached {
			if w.refused[a.Node] {
				behind = append(behind, fmt.Sprintf("%s refuses service %s", a.Node, w.service))
				continue
			}
			behind = append(behind, fmt.Sprintf("%s is at %d", a.Node, a.Revision))
		}
	}
	if len(behind) == 0 {
		return "no node has reported"
	}
	return strings.Join(behind, ", ")
}
