package logs

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"flotilla/internal/wire"
)

// ServeJournal answers GET /v1/journal: the lines of units, merged by time.
func (s *Server) ServeJournal(w http.ResponseWriter, r *http.Request) {
	q, v, ok := s.begin(w, r)
	if !ok {
		return
	}
	if q.follow && (q.lines < 0 || q.lines > maxLines) {
		q.lines = maxLines
	}
	q.after, q.since = "", time.Time{}
	out := newWriter(w)
	for _, problem := range v.problems() {
		if err := out.line(problem); err != nil {
			return // nobody reads
		}
	}
	// Either ends because everything was said, or because nobody reads.
	if q.follow {
		_ = s.follow(r.Context(), q, v, out)
	} else {
		_ = s.once(r.Context(), q, v, out)
	}
}

// problems are those that are known before any node is asked.
func (v view) problems() []wire.JournalLine {
	var lines []wire.JournalLine
	for name, why := range v.nowhere {
		lines = append(lines, wire.JournalLine{Time: time.Now(), Unit: name, Problem: name + ": " + why})
	}
	if v.partial != "" {
		lines = append(lines, wire.JournalLine{Time: time.Now(), Problem: v.partial})
	}
	slices.SortFunc(lines, func(a, b wire.JournalLine) int { return strings.Compare(a.Problem, b.Problem) })
	return lines
}

// from hands over the lines of one node, with its name on them.
func (s *Server) from(ctx context.Context, v view, id string, q question, each func(wire.JournalLine) error) error {
	n := v.nodes[id]
	named := func(l wire.JournalLine) error {
		l.NodeID, l.Node = id, nameOf(n)
		return each(l)
	}
	var err error
	switch {
	case id == s.Self:
		err = s.local(ctx, q, named)
	case !n.Present():
		err = errGone
	default:
		err = s.remote(ctx, n, q, named)
	}
	if err != nil && !errors.Is(err, errEnough) && ctx.Err() == nil {
		return named(wire.JournalLine{Time: time.Now(), Problem: fmt.Sprintf("node %s: %v", called(n, id), err)})
	}
	return err
}

// once merges what is there: every node's lines are in order, so the earliest
// of their heads comes next.
func (s *Server) once(ctx context.Context, q question, v view, out *writer) error {
	ctx, cancel := context.WithCancel(ctx)
	var readers sync.WaitGroup
	defer readers.Wait()
	defer cancel()

	var sources []<-chan wire.JournalLine
	for id, units := range v.units {
		lines := make(chan wire.JournalLine, 64)
		sources = append(sources, lines)
		mine := q
		mine.units = units
		readers.Go(func() {
			defer close(lines)
			_ = s.from(ctx, v, id, mine, func(l wire.JournalLine) error { // what failed is a line
				if l.Live {
					return nil
				}
				select {
				case lines <- l:
					return nil
				case <-ctx.Done():
					return errEnough
				}
			})
		})
	}
	last := newTail(q.lines, out.show)
	if err := merge(sources, last.add); err != nil {
		return err
	}
	if err := last.end(); err != nil {
		return err
	}
	return out.flush()
}

// show writes a line without what only nodes need.
func (l *writer) show(line wire.JournalLine) error {
	line.Cursor, line.Live, line.Units = "", false, nil
	return l.line(line)
}

// merge hands over the lines of all sources by time.
func merge(sources []<-chan wire.JournalLine, each func(wire.JournalLine) error) error {
	var heads []wire.JournalLine
	var open []<-chan wire.JournalLine
	for _, s := range sources {
		if l, ok := <-s; ok {
			heads, open = append(heads, l), append(open, s)
		}
	}
	for len(open) > 0 {
		first := 0
		for i := range heads {
			if heads[i].Time.Before(heads[first].Time) {
				first = i
			}
		}
		if err := each(heads[first]); err != nil {
			return err
		}
		if l, ok := <-open[first]; ok {
			heads[first] = l
		} else {
			heads, open = slices.Delete(heads, first, first+1), slices.Delete(open, first, first+1)
		}
	}
	return nil
}

// tail passes on the last n lines and every problem; all lines at once if n is
// negative.
type tail struct {
	n    int
	each func(wire.JournalLine) error
	kept []wire.JournalLine // a ring once it has n lines
	next int                // its oldest
	bad  []wire.JournalLine
}

func newTail(n int, each func(wire.JournalLine) error) *tail { return &tail{n: n, each: each} }

func (t *tail) add(l wire.JournalLine) error {
	switch {
	case t.n < 0:
		return t.each(l)
	case l.Problem != "":
		t.bad = append(t.bad, l)
	case len(t.kept) < t.n:
		t.kept = append(t.kept, l)
	case t.n > 0:
		t.kept[t.next] = l
		t.next = (t.next + 1) % t.n
	}
	return nil
}

// end passes on what was kept: problems last, where they are seen.
func (t *tail) end() error {
	for _, l := range slices.Concat(t.kept[t.next:], t.kept[:t.next], t.bad) {
		if err := t.each(l); err != nil {
			return err
		}
	}
	return nil
}
