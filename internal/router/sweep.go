package router

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"slices"
	"time"

	"flotilla/internal/haproxy"
)

// sweeper deletes servers that have been parked for long, so that those of
// endpoints that never come back do not pile up. Where HAProxy does not delete
// servers safely they wait to be used again, and a reload drops them when they
// are the greater part.
type sweeper struct {
	after  time.Duration // how long a server is parked before; 0 is parkFor
	next   time.Time     // of the next look
	parked map[serverID]time.Time
}

type serverID struct{ backend, server string }

const (
	// parkFor is long enough for an endpoint that restarts to find its server.
	parkFor = 30 * time.Second
	// sweepAtOnce bounds one batch.
	sweepAtOnce = 500
	// tooManyParked servers cost memory worth a reload where they cannot be deleted.
	tooManyParked = 1000
)

// count returns how many servers may take traffic and how many are parked.
func (s *state) count() (active, parked int) {
	for _, servers := range s.backends {
		for _, server := range servers {
			switch {
			case server.State != haproxy.Maint:
				active++
			case server.Addr != haproxy.Spare:
				parked++
			}
		}
	}
	return active, parked
}

// sweep deletes the servers that have been parked for long enough. HAProxy
// refuses to while a connection or a request has to do with one: it is tried
// again at the next look.
func (r *Router) sweep(ctx context.Context, now time.Time) error {
	sw := &r.slots.sweeper
	if now.Before(sw.next) {
		return nil
	}
	after := cmp.Or(sw.after, parkFor)
	sw.next = now.Add(after / 3)
	if !r.version.DeletesServers() {
		if active, parked := r.have.count(); parked > max(active, tooManyParked) {
			r.reload.ask(now, "most servers are parked")
		}
		return nil
	}
	gone := sw.look(r.have, now, after)
	if len(gone) == 0 {
		return nil
	}
	backends := map[string]bool{}
	var commands []string
	for _, id := range gone {
		backends[id.backend] = true
		commands = append(commands, fmt.Sprintf("del server %s/%s", id.backend, id.server))
	}
	touched := slices.Sorted(maps.Keys(backends))
	commands = append(commands, r.readCommands(touched, nil)...)
	answers, err := r.do(ctx, commands...)
	if err != nil {
		return err
	}
	left := map[serverID]bool{}
	for i, backend := range touched {
		answer := answers[len(gone)+i]
		if answer.Err() != nil { // the whole backend is gone
			continue
		}
		servers, err := haproxy.ParseServers(answer.Text)
		if err != nil {
			return fmt.Errorf("delete servers: %w", err)
		}
		for _, s := range servers[backend] {
			left[serverID{backend, s.Name}] = true
		}
	}
	for _, id := range gone {
		if !left[id] { // only that: a change by somebody else is for the audit to find
			servers := maps.Clone(r.have.backends[id.backend])
			delete(servers, id.server)
			r.have.backends[id.backend] = servers
			delete(sw.parked, id)
		}
	}
	return nil
}

// look notes which servers are parked and returns those that have been for d, the
// longest first.
func (s *sweeper) look(have *state, now time.Time, d time.Duration) []serverID {
	parked := make(map[serverID]time.Time, len(s.parked))
	var gone []serverID
	for backend, servers := range have.backends {
		for name, server := range servers {
			if server.State != haproxy.Maint || server.Addr == haproxy.Spare {
				continue
			}
			id := serverID{backend, name}
			since, seen := s.parked[id]
			if !seen {
				since = now
			}
			parked[id] = since
			if now.Sub(since) >= d {
				gone = append(gone, id)
			}
		}
	}
	s.parked = parked
	slices.SortFunc(gone, func(a, b serverID) int {
		return cmp.Or(parked[a].Compare(parked[b]), cmp.Compare(a.backend, b.backend), cmp.Compare(a.server, b.server))
	})
	return gone[:min(len(gone), sweepAtOnce)]
}
