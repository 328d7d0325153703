// Package logs shows what units say, wherever they run: their journals merged
// by time, and systemd's status of each. Every node answers for its own units,
// to other nodes only; the node that is asked by an operator asks the others. It
// knows the records of units and nodes and the edge to systemd. It must not
// know how units are placed or run, nor how anything is shown to people.
//
// Names of units come from strangers. A node shows units that it runs itself and
// nothing else of its journal.
package logs

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"net/http"
	"path"
	"slices"
	"strconv"
	"strings"
	"time"

	"flotilla/internal/peer"
	"flotilla/internal/state"
	"flotilla/internal/systemd"
	"flotilla/internal/unit"
	"flotilla/internal/wire"
)

// Config is what a Server works with. All fields are required.
type Config struct {
	Feed *state.Feed
	Peer *peer.Peer
	Self string          // ID of this node
	Own  func() []string // names of the units that are on this node
	// Journal and Show are systemd.Journal and systemd.Show.
	Journal func(context.Context, systemd.JournalQuery) iter.Seq2[systemd.Entry, error]
	Show    func(ctx context.Context, unit string) (text string, exit int, err error)
}

// Server answers for the units of this node and asks the others.
type Server struct {
	Config
	pace pace
}

// pace is how long things take; tests are in a hurry.
type pace struct {
	reorder time.Duration // lines of different nodes arrive within this
	begin   time.Duration // for nodes to send what they have
	look    time.Duration // between looks at where the units are
	beat    time.Duration // of a node that has nothing to say
}

// New returns a Server, which answers other nodes through cfg.Peer from now on.
func New(cfg Config) *Server {
	s := &Server{Config: cfg, pace: pace{reorder: 300 * time.Millisecond, begin: 5 * time.Second, look: 3 * time.Second, beat: 5 * time.Second}}
	cfg.Peer.Handle("GET /v1/local/journal", s.localJournal)
	cfg.Peer.Handle("GET /v1/local/unit-status", s.localStatus)
	return s
}

// errNoUnit: there is no such unit, or none that matches.
var errNoUnit = errors.New("no such unit")

// question is what was asked for.
type question struct {
	units  []string // names or patterns as of path.Match
	lines  int      // negative: all
	follow bool
	after  string    // cursor; between nodes only
	since  time.Time // between nodes only; zero: no limit
}

const (
	defaultLines = 10
	maxLines     = 10_000 // of a question that has to be kept in memory
	maxUnits     = 10_000
)

func parse(r *http.Request) (question, error) {
	query := r.URL.Query()
	q := question{units: query["unit"], lines: defaultLines, after: query.Get("after")}
	if len(q.units) == 0 || len(q.units) > maxUnits {
		return q, errors.New("name the units: ?unit=NAME")
	}
	for _, u := range q.units {
		if !isPattern(u) {
			if err := unit.CheckName(u); err != nil {
				return q, fmt.Errorf("%.300q: %w", u, err)
			}
		} else if _, err := path.Match(u, ""); err != nil || len(u) > 256 {
			return q, fmt.Errorf("%.300q is not a pattern", u)
		}
	}
	var err error
	switch v := query.Get("lines"); v {
	case "":
	case "all":
		q.lines = -1
	default:
		if q.lines, err = strconv.Atoi(v); err != nil || q.lines < 0 {
			return q, fmt.Errorf("lines=%.20q is neither a number nor all", v)
		}
	}
	switch v := query.Get("follow"); v {
	case "", "0", "false":
	case "1", "true":
		q.follow = true
	default:
		return q, fmt.Errorf("follow=%.20q is neither 1 nor 0", v)
	}
	if v := query.Get("output"); v != "" && v != "json" {
		return q, fmt.Errorf("output=%.20q: there is only json", v)
	}
	if v := query.Get("since"); v != "" {
		if q.since, err = time.Parse(time.RFC3339Nano, v); err != nil {
			return q, fmt.Errorf("since=%.40q is not a time", v)
		}
	}
	return q, nil
}

func isPattern(name string) bool { return strings.ContainsAny(name, "*?[") }

// matches reports whether one of the patterns means the unit; the type may be
// left out for services.
func matches(patterns []string, name string) bool {
	is := func(p string) bool {
		ok, err := path.Match(p, name)
		return p == name || err == nil && ok
	}
	return slices.ContainsFunc(patterns, func(p string) bool { return is(p) || is(p+".service") })
}

// view is where units are.
type view struct {
	nodes   map[string]*state.Node
	units   map[string][]string // names by the node's ID; of global units those that may be there
	nowhere map[string]string   // names of units on no node, and why
	partial string              // why this is only what the node itself knows; "" if it is all
}

// look finds the units. Without the store it finds those of this node.
func (s *Server) look(ctx context.Context, patterns []string) (view, error) {
	v := view{nodes: s.Feed.Latest().Nodes, units: map[string][]string{}, nowhere: map[string]string{}}
	now, err := s.Feed.Fresh(ctx)
	switch {
	case ctx.Err() != nil:
		return v, ctx.Err()
	case err == nil:
		v.nodes = now.Nodes
		return v, v.find(now, patterns)
	}
	v.partial = fmt.Sprintf("only units of this node are shown: %v", err)
	for _, name := range s.Own() {
		if matches(patterns, name) {
			v.units[s.Self] = append(v.units[s.Self], name)
		}
	}
	return v, nil
}

// find finds units by name, and those on a node by pattern.
func (v *view) find(s *state.Snapshot, patterns []string) error {
	var globs []string
	for _, p := range patterns {
		if isPattern(p) {
			globs = append(globs, p)
			continue
		}
		u := s.Units[p]
		if u == nil || !u.Record.Exists() && !u.Placement.Exists() {
			return fmt.Errorf("%w: %s", errNoUnit, p)
		}
		if !v.place(u) {
			v.nowhere[p] = "it is on no node"
			switch {
			case u.Record.Value.Desired == unit.Inactive:
				v.nowhere[p] += ": it is to be inactive"
			case u.Unplaced.Exists():
				v.nowhere[p] += ": " + u.Unplaced.Value.Reason
			}
		}
	}
	found := len(globs) == 0
	for name, u := range s.Units {
		if len(globs) > 0 && matches(globs, name) && v.place(u) {
			found = true
		}
	}
	if !found && len(v.units) == 0 && len(v.nowhere) == 0 {
		return fmt.Errorf("%w on any node matches %s", errNoUnit, strings.Join(globs, " or "))
	}
	for id, names := range v.units {
		slices.Sort(names)
		v.units[id] = slices.Compact(names)
	}
	return nil
}

// place notes where a unit is, and reports whether it may be anywhere.
func (v *view) place(u *state.Unit) bool {
	switch {
	case u.Placement.Usable():
		v.units[u.Placement.Value.Node] = append(v.units[u.Placement.Value.Node], u.Name)
	case u.Placement.Exists():
		v.nowhere[u.Name] = u.Placement.Problem
	case u.Requirements.Global && u.Wanted():
		for id, n := range v.nodes {
			if n.Record.Value.Units {
				v.units[id] = append(v.units[id], u.Name)
			}
		}
	default:
		return false
	}
	return true
}

// begin looks for what was asked for, and answers itself if nothing is there.
func (s *Server) begin(w http.ResponseWriter, r *http.Request) (q question, v view, ok bool) {
	q, err := parse(r)
	if err != nil {
		wire.WriteError(w, wire.Errorf(wire.CodeBadRequest, "", "%v", err))
		return q, v, false
	}
	v, err = s.look(r.Context(), q.units)
	switch {
	case errors.Is(err, errNoUnit):
		wire.WriteError(w, wire.Errorf(wire.CodeNotFound, "flotilla list-units shows what runs where", "%v", err))
		return q, v, false
	case err != nil:
		wire.WriteError(w, wire.Errorf(wire.CodeUnavailable, "", "%v", err))
		return q, v, false
	}
	return q, v, true
}
