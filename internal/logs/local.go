package logs

import (
	"bufio"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"time"

	"golang.org/x/sync/errgroup"

	"flotilla/internal/state"
	"flotilla/internal/systemd"
	"flotilla/internal/wire"
)

// errEnough: the reader wants no more.
var errEnough = errors.New("enough")

// own returns those of the names whose units are on this node.
func (s *Server) own(names []string) []string {
	have := map[string]bool{}
	for _, name := range s.Own() {
		have[name] = true
	}
	var found []string
	for _, name := range names {
		if have[name] {
			found = append(found, name)
		}
	}
	return found
}

// local hands over the lines of this node's own units: what is there, one line
// with Live set, and then, following, what is new, until ctx ends.
func (s *Server) local(ctx context.Context, q question, each func(wire.JournalLine) error) error {
	units := s.own(q.units)
	if len(units) == 0 {
		return each(wire.JournalLine{Live: true})
	}
	query := systemd.JournalQuery{Units: units, Lines: q.lines, Since: q.since, After: q.after}
	began := time.Now()
	if q.lines < 0 {
		query.Lines = 0 // its word for all
	}
	if q.lines != 0 {
		last, err := s.pass(ctx, query, each)
		if err != nil {
			return err
		}
		query.After = cmp.Or(last, query.After)
	}
	if err := each(wire.JournalLine{Live: true, Units: units}); err != nil || !q.follow {
		return err
	}
	query.Lines, query.Follow = 0, true
	if query.After == "" {
		query.Since = began // nothing was there: nothing comes twice
	} else {
		query.Since = time.Time{}
	}
	_, err := s.pass(ctx, query, each)
	return err
}

// pass hands over entries and returns the cursor of the last.
func (s *Server) pass(ctx context.Context, q systemd.JournalQuery, each func(wire.JournalLine) error) (cursor string, err error) {
	for e, err := range s.Journal(ctx, q) {
		if err != nil {
			return cursor, err
		}
		cursor = e.Cursor
		err := each(wire.JournalLine{
			Time: e.Time, Unit: e.Unit, Message: e.Message, Priority: e.Priority, PID: e.PID, Identifier: e.Identifier, Cursor: e.Cursor,
		})
		if err != nil {
			return cursor, err
		}
	}
	return cursor, nil
}

// writer writes lines as they come and empty ones as signs of life. The two come
// from two goroutines, so it takes turns.
type writer struct {
	turn chan struct{} // holds one token
	w    http.ResponseWriter
	out  *json.Encoder
	rc   *http.ResponseController
}

func newWriter(w http.ResponseWriter) *writer {
	w.Header().Set("Content-Type", "application/x-ndjson")
	w.WriteHeader(http.StatusOK)
	out := json.NewEncoder(w)
	out.SetEscapeHTML(false)
	l := &writer{turn: make(chan struct{}, 1), w: w, out: out, rc: http.NewResponseController(w)}
	l.turn <- struct{}{}
	return l
}

func (l *writer) line(line wire.JournalLine) error {
	<-l.turn
	defer func() { l.turn <- struct{}{} }()
	return l.out.Encode(line)
}

func (l *writer) flush() error {
	<-l.turn
	defer func() { l.turn <- struct{}{} }()
	return l.rc.Flush()
}

func (l *writer) beat() error {
	<-l.turn
	defer func() { l.turn <- struct{}{} }()
	if _, err := io.WriteString(l.w, "\n"); err != nil {
		return err
	}
	return l.rc.Flush()
}

func (s *Server) localJournal(w http.ResponseWriter, r *http.Request) {
	q, err := parse(r)
	if err != nil {
		wire.WriteError(w, wire.Errorf(wire.CodeBadRequest, "", "%v", err))
		return
	}
	ctx, cancel := context.WithCancel(r.Context())
	defer cancel()
	out := newWriter(w)
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error {
		defer cancel()
		live := false
		err := s.local(ctx, q, func(line wire.JournalLine) error {
			live = live || line.Live
			if err := out.line(line); err != nil || !live {
				return err
			}
			return out.flush()
		})
		if err != nil && ctx.Err() == nil {
			return out.line(wire.JournalLine{Time: time.Now(), Problem: err.Error()})
		}
		return nil
	})
	g.Go(func() error {
		tick := time.NewTicker(s.pace.beat)
		defer tick.Stop()
		for {
			select {
			case <-tick.C:
				if err := out.beat(); err != nil {
					return err
				}
			case <-ctx.Done():
				return nil
			}
		}
	})
	_ = g.Wait() // the asking node is gone
}

// ask asks another node.
func (s *Server) ask(ctx context.Context, n *state.Node, path string, query url.Values) (io.ReadCloser, error) {
	if n.Record.Value.Peer == "" {
		return nil, errors.New("it does not serve its logs to other nodes")
	}
	return s.Peer.Get(ctx, n.Record.Value.Peer, path, query)
}

// errSilent: not even signs of life come.
var errSilent = errors.New("it says nothing any more")

// remote hands over the lines of another node, as local does.
func (s *Server) remote(ctx context.Context, n *state.Node, q question, each func(wire.JournalLine) error) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	query := url.Values{"unit": q.units, "lines": {"all"}}
	if q.lines >= 0 {
		query.Set("lines", strconv.Itoa(q.lines))
	}
	if q.follow {
		query.Set("follow", "1")
	}
	if q.after != "" {
		query.Set("after", q.after)
	}
	if !q.since.IsZero() {
		query.Set("since", q.since.UTC().Format(time.RFC3339Nano))
	}
	body, err := s.ask(ctx, n, "/v1/local/journal", query)
	if err != nil {
		return err
	}
	defer func() { _ = body.Close() }() // it was read as far as anybody wants

	silent := time.AfterFunc(3*s.pace.beat, func() { cancel(errSilent) })
	defer silent.Stop()
	live := false
	lines := bufio.NewReaderSize(body, 64<<10)
	for {
		raw, err := lines.ReadBytes('\n')
		silent.Reset(3 * s.pace.beat)
		switch {
		case err == io.EOF && live && !q.follow:
			return nil
		case err != nil && errors.Is(context.Cause(ctx), errSilent):
			return errSilent
		case err != nil:
			return fmt.Errorf("the connection was lost: %w", err)
		case len(raw) == 1:
			continue // a sign of life
		}
		var line wire.JournalLine
		if err := json.Unmarshal(raw, &line); err != nil {
			return fmt.Errorf("its answer is not understood: %w", err)
		}
		if line.Problem != "" {
			return errors.New(line.Problem)
		}
		live = live || line.Live
		if err := each(line); err != nil {
			return err
		}
		if line.Live && len(line.Units) == 0 {
			return nil // it has none of the units
		}
	}
}

// statusesAtOnce limits the processes that one question starts.
const statusesAtOnce = 4

func (s *Server) localStatuses(ctx context.Context, names []string) []wire.UnitStatus {
	units := s.own(names)
	found := make([]wire.UnitStatus, len(units))
	var g errgroup.Group
	g.SetLimit(statusesAtOnce)
	for i, name := range units {
		g.Go(func() error {
			found[i].Unit = name
			var err error
			if found[i].Text, found[i].Exit, err = s.Show(ctx, name); err != nil {
				found[i].Problem = err.Error()
			}
			return nil
		})
	}
	_ = g.Wait() // no error is left
	return found
}

func (s *Server) localStatus(w http.ResponseWriter, r *http.Request) {
	q, err := parse(r)
	if err != nil {
		wire.WriteError(w, wire.Errorf(wire.CodeBadRequest, "", "%v", err))
		return
	}
	wire.Write(w, http.StatusOK, wire.UnitStatuses{Statuses: s.localStatuses(r.Context(), q.units)})
}

func (s *Server) remoteStatuses(ctx context.Context, n *state.Node, names []string) ([]wire.UnitStatus, error) {
	body, err := s.ask(ctx, n, "/v1/local/unit-status", url.Values{"unit": names})
	if err != nil {
		return nil, err
	}
	defer func() { _ = body.Close() }() // it was read to its end
	var found wire.UnitStatuses
	if err := json.NewDecoder(body).Decode(&found); err != nil {
		return nil, fmt.Errorf("its answer is not understood: %w", err)
	}
	return found.Statuses, nil
}

// ServeUnitStatus answers GET /v1/unit-status: systemd's status of units.
func (s *Server) ServeUnitStatus(w http.ResponseWriter, r *http.Request) {
	_, v, ok := s.begin(w, r)
	if !ok {
		return
	}
	parts := make(chan []wire.UnitStatus)
	for id, names := range v.units {
		go func() { parts <- s.statusesOf(r.Context(), v.nodes, id, names) }()
	}
	all := wire.UnitStatuses{Statuses: []wire.UnitStatus{}}
	for range v.units {
		all.Statuses = append(all.Statuses, <-parts...)
	}
	for name, why := range v.nowhere {
		all.Statuses = append(all.Statuses, wire.UnitStatus{Unit: name, Problem: why})
	}
	if v.partial != "" {
		all.Statuses = append(all.Statuses, wire.UnitStatus{Problem: v.partial})
	}
	slices.SortFunc(all.Statuses, func(a, b wire.UnitStatus) int {
		return cmp.Or(cmp.Compare(a.Unit, b.Unit), cmp.Compare(a.Node, b.Node), cmp.Compare(a.NodeID, b.NodeID))
	})
	wire.Write(w, http.StatusOK, all)
}

// statusesOf asks one node. If it is away each unit says so.
func (s *Server) statusesOf(ctx context.Context, nodes map[string]*state.Node, id string, names []string) []wire.UnitStatus {
	n := nodes[id]
	var found []wire.UnitStatus
	var err error
	switch {
	case id == s.Self:
		found = s.localStatuses(ctx, names)
	case !n.Present():
		err = errGone
	default:
		found, err = s.remoteStatuses(ctx, n, names)
	}
	if err != nil {
		for _, name := range names {
			found = append(found, wire.UnitStatus{Unit: name, Problem: fmt.Sprintf("node %s: %v", called(n, id), err)})
		}
	}
	for i := range found {
		found[i].NodeID, found[i].Node = id, nameOf(n)
	}
	return found
}

// errGone: the node has left, and its units are not yet placed elsewhere.
var errGone = errors.New("it is not there")

// called returns how people know a node.
func called(n *state.Node, id string) string { return cmp.Or(nameOf(n), id) }

func nameOf(n *state.Node) string {
	if n == nil {
		return ""
	}
	return n.Record.Value.Name
}
