package router

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"time"

	"flotilla/internal/haproxy"
)

// slots knows which backend serves which service. Before HAProxy 3.4 backends
// cannot be made at run time, so the file declares some in advance and a service
// takes a free one; from 3.4 on they are made when needed, named after the
// service.
type slots struct {
	runtime  bool              // HAProxy makes backends at run time
	used     map[string]string // backend by service
	fresh    map[haproxy.Class][]string
	retiring []retired // no route leads to them any more, requests may still be on their way
	resting  []retired // parked; to be used again when it is certain that nothing is left in them
	declared map[haproxy.Class]int
	sweeper  sweeper
}

type retired struct {
	backend string
	since   time.Time
}

const (
	// retireAfter lets requests that were routed before the last route went reach
	// their server.
	retireAfter = 3 * time.Second
	// restFor is longer than a request can wait in a backend for a connection.
	restFor = 30 * time.Second
)

// spare is how many backends of a class are declared at least.
func spare(c haproxy.Class) int {
	switch {
	case c == haproxy.Class{Balance: "leastconn"}:
		return 1024
	case c == haproxy.Class{Balance: "leastconn", TCP: true}:
		return 256
	}
	return 16
}

// scarce reports that a class is running out of backends.
func (s *slots) scarce() bool {
	if s.runtime {
		return false
	}
	for c, n := range s.declared {
		free := len(s.fresh[c])
		for _, r := range s.resting {
			if class, _ := haproxy.ClassOf(r.backend); class == c {
				free++
			}
		}
		if free*8 < n {
			return true
		}
	}
	return false
}

func (s *slots) total() int {
	if s.runtime {
		return len(s.used) + len(s.resting) + len(s.retiring)
	}
	n := 0
	for _, d := range s.declared {
		n += d
	}
	return n
}

// reset learns the slots from what HAProxy runs: its backends, and which of them
// routes lead to.
func (s *slots) reset(have *state, runtime bool, now time.Time) {
	*s = slots{
		runtime: runtime, used: map[string]string{}, fresh: map[haproxy.Class][]string{}, declared: map[haproxy.Class]int{},
		sweeper: sweeper{after: s.sweeper.after},
	}
	taken := map[string]bool{}
	for service, routes := range have.owned {
		for _, value := range routes {
			backend, _ := haproxy.RouteOwner(value)
			if _, ok := have.backends[backend]; !ok || taken[backend] {
				continue
			}
			if old, ok := s.used[service]; ok { // left behind in the middle of a move
				s.retiring = append(s.retiring, retired{old, now})
			}
			s.used[service] = backend
			taken[backend] = true
		}
	}
	for _, backend := range slices.Sorted(maps.Keys(have.backends)) {
		class, ok := haproxy.ClassOf(backend)
		if !ok {
			continue
		}
		s.declared[class]++
		switch {
		case taken[backend]:
		case runtime || slices.ContainsFunc(slices.Collect(maps.Values(have.backends[backend])), inUse):
			s.retiring = append(s.retiring, retired{backend, now})
		default:
			s.fresh[class] = append(s.fresh[class], backend)
		}
	}
	for _, fresh := range s.fresh {
		slices.Reverse(fresh) // taken from the end: lowest first
		slices.SortStableFunc(fresh, func(a, b string) int { return cmp.Compare(len(have.backends[a]), len(have.backends[b])) })
	}
}

// inUse tells a server that some endpoint had from a spare one.
func inUse(s haproxy.Server) bool { return s.State != haproxy.Maint || s.Addr != haproxy.Spare }

const (
	// stocked is how many free backends of the usual class have spare servers:
	// as many services as that can come quickly after a reload.
	stocked = 512
	// spareServers is how many each has.
	spareServers = 3
)

// stock gives the backends of the usual class that are taken next spare servers.
func (s *slots) stock(have *state) {
	fresh := s.fresh[haproxy.Class{Balance: "leastconn"}]
	for _, backend := range fresh[max(0, len(fresh)-stocked):] {
		servers := maps.Clone(have.backends[backend])
		for i := len(servers); i < spareServers; i++ {
			name := haproxy.ServerName(i+1, haproxy.ServerOptions{})
			servers[name] = haproxy.Server{Name: name, Addr: haproxy.Spare, Weight: 100, State: haproxy.Maint}
		}
		have.backends[backend] = servers
	}
}

// pick returns the backend that the service is to have: its own one if that is of
// the class, else a free one. isNew says that it must be made, or published again,
// first. taken counts the free backends of each class that are picked already.
func (s *slots) pick(service string, class haproxy.Class, have *state, taken map[haproxy.Class]int) (backend string, isNew, ok bool) {
	if old, had := s.used[service]; had {
		if c, _ := haproxy.ClassOf(old); c == class {
			_, exists := have.backends[old]
			return old, !exists, true
		}
	}
	if s.runtime {
		return class.BackendName(service), true, true // if it exists it may be unpublished, on its way to be removed
	}
	fresh := s.fresh[class]
	n := len(fresh) - taken[class]
	if n == 0 {
		return "", false, false
	}
	taken[class]++
	return fresh[n-1], false, true
}

// apply carries out a move. A backend that is given up is retired.
func (s *slots) apply(m move, now time.Time) {
	old := s.used[m.service]
	if old == m.backend {
		return
	}
	if old != "" {
		s.retiring = append(s.retiring, retired{old, now})
		delete(s.used, m.service)
	}
	if m.backend == "" {
		return
	}
	s.used[m.service] = m.backend
	is := func(r retired) bool { return r.backend == m.backend }
	s.retiring = slices.DeleteFunc(s.retiring, is)
	s.resting = slices.DeleteFunc(s.resting, is)
	class, _ := haproxy.ClassOf(m.backend)
	fresh := s.fresh[class]
	for at := len(fresh) - 1; at >= 0; at-- { // it is nearly always the last one
		if fresh[at] == m.backend {
			s.fresh[class] = slices.Delete(fresh, at, at+1)
			break
		}
	}
}

// ripe removes and returns those of list that have been there for d.
func ripe(list *[]retired, now time.Time, d time.Duration) []string {
	var names []string
	*list = slices.DeleteFunc(*list, func(r retired) bool {
		old := now.Sub(r.since) >= d
		if old {
			names = append(names, r.backend)
		}
		return old
	})
	return names
}

// retire parks the servers of backends that are no longer routed to, makes those
// that have rested free again, or removes them where HAProxy can, and deletes
// servers that have been parked for long.
func (r *Router) retire(ctx context.Context, now time.Time) error {
	var steps []Step
	for _, backend := range ripe(&r.slots.retiring, now, retireAfter) {
		steps = append(steps, planServers(backend, nil, r.have.backends[backend])...)
		r.slots.resting = append(r.slots.resting, retired{backend, now})
	}
	if len(steps) > 0 {
		if _, err := r.execute(ctx, steps); err != nil {
			return err
		}
	}
	for _, backend := range ripe(&r.slots.resting, now, restFor) {
		free, err := r.reclaim(ctx, backend)
		if err != nil {
			return err
		}
		if !free {
			r.slots.resting = append(r.slots.resting, retired{backend, now})
		}
	}
	return r.sweep(ctx, now)
}

// reclaim makes a rested backend free if nothing is left in it: a request that is
// still to be tried again there must not reach the next service's endpoint.
func (r *Router) reclaim(ctx context.Context, backend string) (bool, error) {
	st := &r.stats
	if !st.mu.TryLock() {
		return false, nil // the counters are being read; there is no hurry
	}
	defer st.mu.Unlock()
	answers, err := r.do(ctx, "show servers conn "+backend, "show stat "+backend+" 2 -1", "show info")
	if err != nil {
		return false, err
	}
	for _, used := range haproxy.ParseConns(answers[0].Text) {
		if used > 0 {
			return false, nil
		}
	}
	counters := haproxy.ParseStats(answers[1].Text)
	for _, row := range counters {
		if n, _ := strconv.Atoi(row["scur"]); n > 0 || row["qcur"] != "0" {
			return false, nil
		}
	}
	if service, ok := r.owners.LoadAndDelete(backend); ok {
		st.meet(answers[2])
		for _, row := range counters {
			st.add(row, service.(string))
		}
	}
	if r.slots.runtime {
		gone, err := r.removeBackend(ctx, backend)
		if gone {
			delete(st.last, backend)
		}
		return gone, err
	}
	class, _ := haproxy.ClassOf(backend)
	r.slots.fresh[class] = append([]string{backend}, r.slots.fresh[class]...)
	return true, nil
}

// removeBackend deletes a backend and its servers. A refusal is normal while
// something still refers to them; it is tried again later.
func (r *Router) removeBackend(ctx context.Context, backend string) (bool, error) {
	commands := []string{"unpublish backend " + backend}
	for name := range r.have.backends[backend] {
		commands = append(commands, fmt.Sprintf("del server %s/%s", backend, name))
	}
	commands = append(commands, "del backend "+backend, "show backend")
	answers, err := r.do(ctx, commands...)
	if err != nil {
		return false, err
	}
	if slices.Contains(parseBackends(answers[len(answers)-1].Text), backend) {
		return false, r.readBack(ctx, []string{backend}, nil)
	}
	delete(r.have.backends, backend)
	r.disk.stale = true
	return true, nil
}
