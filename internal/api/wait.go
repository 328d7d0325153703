package api

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"

	"flotilla/internal/state"
	"flotilla/internal/text"
	"flotilla/internal/unit"
	"flotilla/internal/wire"
)

// pace is how long things take in a wait; tests are in a hurry.
type pace struct {
	settle time.Duration // a state in doubt has to last to be believed: nodes report what systemd does a moment later
	quiet  time.Duration // before it is said what units wait for
	beat   time.Duration // between signs of life
	silent time.Duration // that the store may be away until a wait is given up
}

var usualPace = pace{settle: 500 * time.Millisecond, quiet: 5 * time.Second, beat: 5 * time.Second, silent: 15 * time.Second}

// verdict is how a unit stands to what is waited for.
type verdict int

const (
	underWay verdict = iota
	reached
	broken   // systemd says that it failed
	doubtful // it has ended, or it has failed: but is that about this start?
)

// goal judges a unit; note is put behind the line about it.
type goal func(st Standing) (v verdict, note string)

var goals = map[wire.Goal]goal{
	wire.GoalLaunched: launched, wire.GoalLoaded: loaded, wire.GoalStopped: stopped, wire.GoalInactive: inactive, wire.GoalGone: gone,
}

func inactive(st Standing) (verdict, string) {
	if st.Current == unit.Inactive {
		return reached, ""
	}
	return underWay, ""
}

// loaded: on its node to stay, in this version, and not about to stop.
func loaded(st Standing) (verdict, string) {
	if st.Current != unit.Loaded || st.Placement.Value.Leave != "" || st.There.Hash != st.Hash || st.There.Active == "deactivating" {
		return underWay, ""
	}
	return reached, ""
}

// stopped: as loaded, but a unit that never got a node does not run either.
func stopped(st Standing) (verdict, string) {
	if st.Current == unit.Inactive && st.Home == "" {
		return reached, ""
	}
	return loaded(st)
}

// launched: started in this version where it is to stay, with as many restarts
// as asked for, and systemd says that it is active.
func launched(st Standing) (verdict, string) {
	if st.Current != unit.Launched || st.Placement.Value.Leave != "" || st.There.Hash != st.Hash || st.There.Restarts < st.Record.Value.Restarts {
		return underWay, ""
	}
	switch st.There.Active {
	case "active", "reloading", "refreshing":
		return reached, ""
	case "failed":
		return broken, st.There.Trouble
	case "inactive":
		if st.There.Waiting != "" {
			return underWay, ""
		}
		return doubtful, "it has ended"
	}
	return underWay, ""
}

// gone: destroyed. That no node has it either is seen by unitWait.
func gone(st Standing) (verdict, string) {
	if st.Record.Exists() || st.Placement.Exists() {
		return underWay, ""
	}
	return reached, ""
}

// why says what keeps a unit from getting on.
func (st Standing) why(known *state.Snapshot) string {
	switch {
	case st.Home == "" && st.Unplaced.Value.Reason != "":
		return "on no node: " + st.Unplaced.Value.Reason
	case st.Home == "":
		return "on no node: the engine has not placed it yet"
	}
	at := legend(refOf(known, st.Home))
	switch {
	case st.Placement.Value.Leave != "":
		return "leaving " + at + ": " + st.Placement.Value.Leave
	case !st.Known:
		return at + " has not taken it up yet"
	case st.There.Trouble != "":
		return "on " + at + ": " + st.There.Trouble
	case st.There.Waiting != "":
		return "on " + at + ": " + st.There.Waiting
	case st.There.Hash != st.Hash:
		return at + " still has the old version"
	}
	return fmt.Sprintf("on %s, systemd says: %s, %s (%s)", at, st.There.Load, st.There.Active, st.There.Sub)
}

// legend shows a node as fleetctl does.
func legend(n wire.NodeRef) string {
	text := n.ID[:min(8, len(n.ID))] + "..."
	if n.Address != "" {
		text += "/" + n.Address
	}
	return text
}

// waiter is something that a request waits for.
type waiter interface {
	// look says what became of what is waited for. until is when to look again
	// although nothing has changed; zero: never. done ends the wait.
	look(known *state.Snapshot, now time.Time) (events []wire.WaitEvent, until time.Time, done bool)
	// late says what has not become of it in time, and of how much.
	late(known *state.Snapshot) (events []wire.WaitEvent, left int)
}

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
	_ = s.await(r.Context(), limit, what, func(events ...wire.WaitEvent) error { // it ends when nobody reads any more
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
func (s *Server) waitOf(r *http.Request) (limit time.Duration, what waiter, err error) {
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
	switch judge := goals[in.Goal]; {
	case judge != nil:
		what = &unitWait{goal: in.Goal, judge: judge, pace: s.pace, names: resolve(known, in.Names), began: time.Now(), since: map[string]time.Time{}, told: map[string]string{}}
	case in.Goal == wire.GoalEmpty:
		id, err := findNode(known, in.Node, false)
		if err != nil {
			return 0, nil, err
		}
		what = &emptyWait{node: refOf(known, id)}
	case in.Goal == wire.GoalApplied && in.Revision > 0:
		what = &applied{revision: in.Revision, service: in.Service, began: time.Now()}
	default:
		return 0, nil, wire.Errorf(wire.CodeBadRequest, "", "goal=%q, with a revision of %d, is nothing to wait for", in.Goal, in.Revision)
	}
	return limit, what, nil
}

// await sends the events of a wait until it is over, or send fails. Without events
// send sends a sign of life.
func (s *Server) await(ctx context.Context, limit time.Duration, what waiter, send func(...wire.WaitEvent) error) error {
	defer s.State.FollowReports()()
	beat := time.NewTicker(s.pace.beat)
	defer beat.Stop()
	over := make(<-chan time.Time)
	if limit > 0 {
		timer := time.NewTimer(limit)
		defer timer.Stop()
		over = timer.C
	}
	for {
		known, newer := s.State.Next()
		events, until, done := what.look(known, time.Now())
		if done {
			return send(append(events, wire.WaitEvent{Outcome: wire.WaitEnd})...)
		}
		if len(events) > 0 {
			if err := send(events...); err != nil {
				return err
			}
		}
		again := make(<-chan time.Time)
		if !until.IsZero() {
			again = time.After(time.Until(until))
		}
		select {
		case <-newer:
		case <-again:
		case <-over:
			events, left := what.late(known)
			return send(append(events, wire.WaitEvent{Outcome: wire.WaitEnd, Left: left})...)
		case now := <-beat.C:
			st := s.State.Status()
			if !st.Live && now.Sub(st.Confirmed) > s.pace.silent {
				_, left := what.late(known)
				return send(wire.WaitEvent{Outcome: wire.WaitEnd, Left: left, Error: wire.Errorf(wire.CodeStoreUnavailable, "see: flotilla status, flotilla doctor", "the store does not answer: %s", st.Err)})
			}
			if err := send(); err != nil {
				return err
			}
		case <-ctx.Done():
			return send(wire.WaitEvent{Outcome: wire.WaitEnd, Error: wire.Errorf(wire.CodeUnavailable, "", "the node is stopping")})
		}
	}
}

// unitWait waits for units.
type unitWait struct {
	goal  wire.Goal
	judge goal
	pace  pace
	names []string // that are not there yet
	began time.Time
	since map[string]time.Time // when a state in doubt was first seen
	told  map[string]string    // what units were last said to wait for
}

// mostTold is how many units are said to wait at a time.
const mostTold = 10

func (w *unitWait) look(known *state.Snapshot, now time.Time) (events []wire.WaitEvent, until time.Time, done bool) {
	soonest := func(t time.Time) {
		if until.IsZero() || t.Before(until) {
			until = t
		}
	}
	loud, told := w.began.Add(w.pace.quiet), 0
	w.names = slices.DeleteFunc(w.names, func(name string) bool {
		st := StandingOf(known, unitNamed(known, name))
		switch {
		case w.goal != wire.GoalGone && !st.Record.Exists():
			events = append(events, wire.WaitEvent{Outcome: wire.WaitGone, Unit: name})
			return true
		case w.goal != wire.GoalGone && st.Requirements.Global:
			events = append(events, wire.WaitEvent{Outcome: wire.WaitGlobal, Unit: name})
			return true
		}
		v, note := w.judge(st)
		if w.goal == wire.GoalGone && v == reached && reported(known, name) {
			v = underWay
		}
		if v == broken || v == doubtful {
			if w.since[name].IsZero() {
				w.since[name] = now
			}
			if settled := w.since[name].Add(w.pace.settle); now.Before(settled) {
				v = underWay
				soonest(settled)
			}
		} else {
			delete(w.since, name)
		}
		switch v {
		case reached, doubtful:
			events = append(events, eventOf(known, st, wire.WaitReached, note))
		case broken:
			events = append(events, eventOf(known, st, wire.WaitFailed, st.why(known)))
		default:
			if !now.Before(loud) && told < mostTold {
				if why := st.why(known); w.told[name] != why {
					w.told[name] = why
					told++
					events = append(events, eventOf(known, st, wire.WaitPending, why))
				}
			}
		}
		return v != underWay
	})
	if now.Before(loud) {
		soonest(loud)
	}
	return events, until, len(w.names) == 0
}

// reported reports whether a node says that it has a unit.
func reported(known *state.Snapshot, name string) bool {
	for _, n := range known.Nodes {
		if n.Units.Value.Units[name].Load != "" {
			return true
		}
	}
	return false
}

func eventOf(known *state.Snapshot, st Standing, outcome wire.WaitOutcome, message string) wire.WaitEvent {
	e := wire.WaitEvent{Outcome: outcome, Unit: st.Name, Current: st.Current, Message: message}
	if st.Home != "" {
		e.Node = new(refOf(known, st.Home))
	}
	return e
}

func (w *unitWait) late(known *state.Snapshot) (events []wire.WaitEvent, left int) {
	for _, name := range w.names {
		st := StandingOf(known, unitNamed(known, name))
		events = append(events, eventOf(known, st, wire.WaitLate, st.why(known)))
	}
	return events, len(events)
}

// emptyWait waits until no unit is placed on a node.
type emptyWait struct {
	node wire.NodeRef
	left int
}

func (w *emptyWait) placed(known *state.Snapshot) (units []*state.Unit) {
	for _, u := range known.Units {
		if u.Placement.Exists() && u.Placement.Value.Node == w.node.ID {
			units = append(units, u)
		}
	}
	slices.SortFunc(units, func(a, b *state.Unit) int { return strings.Compare(a.Name, b.Name) })
	return units
}

func (w *emptyWait) look(known *state.Snapshot, _ time.Time) (events []wire.WaitEvent, _ time.Time, done bool) {
	e, left := wire.WaitEvent{Node: &w.node}, len(w.placed(known))
	switch {
	case !known.Nodes[w.node.ID].Present():
		e.Outcome, done = wire.WaitGone, true
	case left == 0:
		e.Outcome, done = wire.WaitReached, true
	case left != w.left:
		e.Outcome, e.Left = wire.WaitPending, left
	default:
		return nil, time.Time{}, false
	}
	w.left = left
	return []wire.WaitEvent{e}, time.Time{}, done
}

func (w *emptyWait) late(known *state.Snapshot) (events []wire.WaitEvent, left int) {
	for _, u := range w.placed(known) {
		why := "leaving: " + u.Placement.Value.Leave
		if u.Placement.Value.Leave == "" {
			why = cmp.Or(u.Unplaced.Value.Reason, u.Placement.Value.Reason)
		}
		events = append(events, wire.WaitEvent{Outcome: wire.WaitLate, Unit: u.Name, Node: &w.node, Message: why})
	}
	return events, len(events)
}

// applied is how far the routers are with a revision of the catalog. Nodes without
// a report of a router are not waited for, nor those that refuse another service:
// it blocks nobody. A node that goes away is no longer waited for, one that comes
// is.
type applied struct {
	revision int64
	service  string // whose revision it is; "": not known
	began    time.Time
	nodes    map[string]nodeApplied // by ID
}

type nodeApplied struct {
	wire.Applied
	refuses string // the service that keeps it from the revision
}

// see takes in what a snapshot says.
func (a *applied) see(known *state.Snapshot) {
	before := a.nodes
	a.nodes = map[string]nodeApplied{}
	for id, n := range known.Nodes {
		if !n.Router.Exists() {
			continue
		}
		if a.nodes[id] = before[id]; before[id].Reached {
			continue
		}
		at := nodeApplied{Applied: wire.Applied{Node: n.Name(), Revision: n.Router.Value.Applied}}
		for service, revision := range n.Router.Value.Refused {
			if a.service == service && revision <= a.revision || a.service == "" && revision == a.revision {
				at.refuses = service
			}
		}
		if at.Reached = at.Revision >= a.revision && at.refuses == ""; at.Reached && !a.began.IsZero() {
			at.MS = float64(time.Since(a.began).Microseconds()) / 1000
		}
		a.nodes[id] = at
	}
}

func (a *applied) done() bool {
	for _, n := range a.nodes {
		if !n.Reached {
			return false
		}
	}
	return len(a.nodes) > 0
}

func (a *applied) list() []wire.Applied {
	list := make([]wire.Applied, 0, len(a.nodes))
	for _, n := range a.nodes {
		list = append(list, n.Applied)
	}
	slices.SortFunc(list, func(a, b wire.Applied) int { return strings.Compare(a.Node, b.Node) })
	return list
}

// laggards returns "n2 is at 41, n3 refuses service web".
func (a *applied) laggards() string {
	var behind []string
	for _, n := range a.nodes {
		switch {
		case n.Reached:
		case n.refuses != "":
			behind = append(behind, fmt.Sprintf("%s refuses service %s", n.Node, text.Show(n.refuses)))
		default:
			behind = append(behind, fmt.Sprintf("%s is at %d", n.Node, n.Revision))
		}
	}
	if len(behind) == 0 {
		return "no node has reported"
	}
	slices.Sort(behind)
	return strings.Join(behind, ", ")
}

func (a *applied) look(known *state.Snapshot, _ time.Time) (events []wire.WaitEvent, _ time.Time, done bool) {
	before := a.nodes
	a.see(known)
	for id, n := range a.nodes {
		if n.Reached && !before[id].Reached {
			events = append(events, wire.WaitEvent{Outcome: wire.WaitReached, Node: new(refOf(known, id)), Applied: new(n.Applied)})
		}
	}
	return events, time.Time{}, a.done()
}

func (a *applied) late(known *state.Snapshot) (events []wire.WaitEvent, left int) {
	for id, n := range a.nodes {
		if !n.Reached {
			e := wire.WaitEvent{Outcome: wire.WaitLate, Node: new(refOf(known, id)), Applied: new(n.Applied)}
			if n.refuses != "" {
				e.Message = "it refuses service " + text.Show(n.refuses)
			}
			events = append(events, e)
		}
	}
	return events, len(events)
}

// converge returns when every router has applied a revision, which is that of a
// service unless that is "".
func (s *Server) converge(ctx context.Context, revision int64, service string, limit time.Duration) ([]wire.Applied, error) {
	defer s.State.FollowReports()()
	a := &applied{revision: revision, service: service, began: time.Now()}
	limited, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	_, _ = s.State.Full(limited) // what was reported before counts; while the store is away, what is known
	known, err := s.State.Until(limited, func(known *state.Snapshot) bool {
		if known.Reports {
			a.see(known)
		}
		return a.done()
	})
	switch {
	case err == nil:
		return a.list(), nil
	case ctx.Err() != nil:
		return nil, wire.Errorf(wire.CodeUnavailable, "", "the node is stopping, or nobody waits any more: %v", ctx.Err())
	}
	e := wire.Errorf(wire.CodeNotConverged, "flotilla nodes list shows how far each node is; nothing is undone, the change still spreads",
		"revision %d is not applied everywhere after %s: %s", revision, limit, a.laggards())
	if !known.Reports {
		e.Message = fmt.Sprintf("revision %d: no node could be watched for %s: %s", revision, limit, s.State.Status().Err)
	}
	e.Applied = a.list()
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
