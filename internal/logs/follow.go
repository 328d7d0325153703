package logs

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"flotilla/internal/wire"
)

// stream is what is read from one node about some of its units.
type stream struct {
	node    string // its ID
	units   []string
	cursor  string // of the last line
	begun   bool   // it has said what was there
	running bool
	trouble string // that was told last; "" when there is none
}

// event is a line of a stream, or its end.
type event struct {
	from  *stream
	line  wire.JournalLine
	ended bool
}

// follower merges lines as they are written. All its fields belong to one
// goroutine.
type follower struct {
	s       *Server
	q       question
	began   time.Time
	out     *writer
	streams []*stream
	waiting []arrival
	begun   bool // what was there before has been shown
	view    view
}

type arrival struct {
	wire.JournalLine
	at time.Time
}

// follow shows what is there and then what is new, until ctx ends or nobody
// reads. Units that start on a node meanwhile are found.
func (s *Server) follow(ctx context.Context, q question, v view, out *writer) error {
	ctx, cancel := context.WithCancel(ctx)
	var readers sync.WaitGroup
	defer readers.Wait()
	defer cancel()

	f := &follower{s: s, q: q, began: time.Now(), out: out, view: v}
	events := make(chan event, 256)
	read := func(st *stream) {
		mine := f.questionOf(st)
		v := f.view
		readers.Go(func() {
			tell := func(e event) error {
				select {
				case events <- e:
					return nil
				case <-ctx.Done():
					return errEnough
				}
			}
			_ = s.from(ctx, v, st.node, mine, func(l wire.JournalLine) error { return tell(event{from: st, line: l}) }) // what failed is a line
			_ = tell(event{from: st, ended: true})                                                                      // or nobody listens
		})
	}
	f.start(read)

	begin := time.NewTimer(s.pace.begin)
	defer begin.Stop()
	look := time.NewTicker(s.pace.look)
	defer look.Stop()
	flush := time.NewTicker(s.pace.reorder / 2)
	defer flush.Stop()
	for {
		var err error
		select {
		case <-ctx.Done():
			return nil
		case e := <-events:
			f.take(e)
			if !f.begun && f.allBegun() {
				err = f.showOld()
			}
		case <-begin.C:
			if !f.begun {
				err = f.showOld()
			}
		case <-look.C:
			if v, found := s.look(ctx, q.units); found == nil && v.partial == "" {
				f.view = v
			}
			f.start(read)
		case now := <-flush.C:
			if f.begun {
				err = f.showUntil(now.Add(-s.pace.reorder))
			}
		}
		if err != nil {
			return err
		}
	}
}

// questionOf returns what to ask for a stream: at first the last lines, later
// what came since.
func (f *follower) questionOf(st *stream) question {
	q := f.q
	q.units = st.units
	switch {
	case st.cursor != "":
		q.lines, q.after = -1, st.cursor
	case f.begun:
		q.lines, q.since = -1, f.began
	}
	return q
}

// start reads what no stream covers, and again what has ended.
func (f *follower) start(read func(*stream)) {
	for _, id := range slices.Sorted(maps.Keys(f.view.units)) {
		missing := map[string]bool{}
		for _, name := range f.view.units[id] {
			missing[name] = true
		}
		for _, st := range f.streams {
			if st.node != id {
				continue
			}
			for _, name := range st.units {
				delete(missing, name)
			}
		}
		if len(missing) > 0 {
			f.streams = append(f.streams, &stream{node: id, units: slices.Sorted(maps.Keys(missing))})
		}
	}
	f.streams = slices.DeleteFunc(f.streams, func(st *stream) bool { return !st.running && !f.wanted(st) })
	for _, st := range f.streams {
		if !st.running {
			st.running = true
			read(st)
		}
	}
}

// wanted reports whether one of the stream's units may still be there.
func (f *follower) wanted(st *stream) bool {
	return slices.ContainsFunc(st.units, func(name string) bool { return slices.Contains(f.view.units[st.node], name) })
}

func (f *follower) take(e event) {
	st, l := e.from, e.line
	switch {
	case e.ended:
		st.running, st.begun = false, true
		return
	case l.Live:
		st.begun = true
		st.trouble = ""
		if len(l.Units) > 0 { // the others are asked for again
			st.units = l.Units
		}
		return
	case l.Problem != "" && l.Problem == st.trouble:
		return
	case l.Problem != "":
		st.trouble = l.Problem
	default:
		st.cursor = l.Cursor
	}
	f.waiting = append(f.waiting, arrival{l, time.Now()})
}

func (f *follower) allBegun() bool {
	return !slices.ContainsFunc(f.streams, func(st *stream) bool { return !st.begun })
}

// showOld shows the last lines of what was there, and all that came since.
func (f *follower) showOld() error {
	f.begun = true
	f.sort()
	old := 0
	for _, a := range f.waiting {
		if a.Problem == "" && a.Time.Before(f.began) {
			old++
		}
	}
	for _, a := range f.waiting {
		if a.Problem == "" && a.Time.Before(f.began) {
			if old--; old >= f.q.lines {
				continue
			}
		}
		if err := f.out.show(a.JournalLine); err != nil {
			return fmt.Errorf("show a line: %w", err)
		}
	}
	f.waiting = nil
	return f.out.flush()
}

func (f *follower) sort() {
	slices.SortStableFunc(f.waiting, func(a, b arrival) int { return a.Time.Compare(b.Time) })
}

// mostWaiting is how many lines wait for earlier ones.
const mostWaiting = 10_000

// showUntil shows the lines that have waited since limit, and those before them.
func (f *follower) showUntil(limit time.Time) error {
	f.sort()
	n := 0
	for i, a := range f.waiting {
		if !a.at.After(limit) {
			n = i + 1
		}
	}
	n = max(n, len(f.waiting)-mostWaiting)
	if n == 0 {
		return nil
	}
	for _, a := range f.waiting[:n] {
		if err := f.out.show(a.JournalLine); err != nil {
			return fmt.Errorf("show a line: %w", err)
		}
	}
	f.waiting = slices.Delete(f.waiting, 0, n)
	return f.out.flush()
}
