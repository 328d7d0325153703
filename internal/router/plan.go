package router

import (
	"cmp"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"flotilla/internal/catalog"
	"flotilla/internal/haproxy"
)

// Action is what a Step does to HAProxy.
type Action string

// The actions, in the order in which a plan carries them out: whatever takes
// traffic is made ready before a route leads to it, and keeps serving until no
// route does.
const (
	MakeBackend Action = "make-backend" // or publish it; only where HAProxy can at run time
	AddServer   Action = "add-server"   // a new server, parked
	MoveServer  Action = "move-server"  // a parked server gets another address
	SetWeight   Action = "set-weight"
	SetState    Action = "set-state" // ready, or drain
	SetCookies  Action = "set-cookies"
	SetRoute    Action = "set-route"
	DelRoute    Action = "del-route"
	ParkServer  Action = "park-server" // takes nothing new, finishes what it has
)

// phase orders the steps of one batch.
var phase = map[Action]int{
	MakeBackend: 0, AddServer: 1, MoveServer: 1, SetWeight: 1, SetState: 1, SetCookies: 2, SetRoute: 3, DelRoute: 4, ParkServer: 5,
}

// Step is one change to HAProxy and why it is made.
type Step struct {
	Do      Action
	Backend string
	Server  haproxy.Server // as it shall be after the step
	Map     string
	Key     string
	Value   string
	Reason  string
}

func (s Step) String() string {
	switch s.Do {
	case MakeBackend, SetCookies:
		return fmt.Sprintf("%s %s: %s", s.Do, s.Backend, s.Reason)
	case SetRoute:
		return fmt.Sprintf("%s %s %s %s: %s", s.Do, s.Map, s.Key, s.Value, s.Reason)
	case DelRoute:
		return fmt.Sprintf("%s %s %s: %s", s.Do, s.Map, s.Key, s.Reason)
	}
	return fmt.Sprintf("%s %s/%s %s weight %d %s: %s", s.Do, s.Backend, s.Server.Name, s.Server.Addr, s.Server.Weight, s.Server.State, s.Reason)
}

// state is what HAProxy runs, as read from it, or what it shall run.
type state struct {
	// Servers by name, by backend. The servers of a backend are replaced, never
	// changed: the writer of the files reads them meanwhile.
	backends map[string]map[string]haproxy.Server
	routes   map[entry]string            // the map files
	owned    map[string]map[entry]string // routes by the service that they name
	domains  int                         // how many of the routes are by custom domain
}

func newState() *state {
	return &state{backends: map[string]map[string]haproxy.Server{}, routes: map[entry]string{}, owned: map[string]map[entry]string{}}
}

// apply changes s as HAProxy would be changed by the step.
func (s *state) apply(step Step) {
	switch step.Do {
	case MakeBackend:
		if s.backends[step.Backend] == nil {
			s.backends[step.Backend] = map[string]haproxy.Server{}
		}
	case AddServer, MoveServer, SetWeight, SetState, ParkServer:
		servers := maps.Clone(s.backends[step.Backend])
		servers[step.Server.Name] = step.Server
		s.backends[step.Backend] = servers
	case SetRoute:
		s.setRoute(entry{step.Map, step.Key}, step.Value)
	case DelRoute:
		s.setRoute(entry{step.Map, step.Key}, "")
	}
}

// setRoute records a map entry; "" is none.
func (s *state) setRoute(e entry, value string) {
	if was, ok := s.routes[e]; ok {
		_, service := haproxy.RouteOwner(was)
		if e.byDomain() {
			s.domains--
		}
		delete(s.owned[service], e)
		if len(s.owned[service]) == 0 {
			delete(s.owned, service)
		}
	}
	if value == "" {
		delete(s.routes, e)
		return
	}
	s.routes[e] = value
	if e.byDomain() {
		s.domains++
	}
	_, service := haproxy.RouteOwner(value)
	if s.owned[service] == nil {
		s.owned[service] = map[entry]string{}
	}
	s.owned[service][e] = value
}

// entry is one key of one map.
type entry struct{ Map, Key string }

// byDomain reports whether the entry is a custom domain's; services' names have
// no dots.
func (e entry) byDomain() bool {
	switch e.Map {
	case haproxy.HTTPWildMap, haproxy.HTTPSWildMap:
		return true
	case haproxy.HTTPMap, haproxy.HTTPSMap:
		return strings.Contains(e.Key, ".")
	}
	return false
}

// wanted is what one service needs of HAProxy.
type wanted struct {
	service string
	class   haproxy.Class
	routes  map[entry]haproxy.Route // the Backend of each is filled in when the service has one
	servers []wantedServer
}

type wantedServer struct {
	endpoint string
	addr     netip.AddrPort
	options  haproxy.ServerOptions
	weight   int
	state    haproxy.ServerState
}

// offers says what this node can offer of a service beyond HTTP.
type offers struct {
	hostPort bool // its host_port
	sni      bool // TLS passthrough
}

// want says what a service needs. A service without any route needs nothing.
func want(svc *catalog.Service, node offers) wanted {
	w := wanted{routes: map[entry]haproxy.Route{}}
	if svc == nil || !svc.Routable() {
		return w
	}
	o := svc.Options
	w.service = svc.Name
	w.class = haproxy.Class{TCP: svc.Scheme == catalog.TCP, Balance: string(cmp.Or(o.Balance, catalog.LeastConn))}
	route := haproxy.Route{Service: svc.Name}
	if !w.class.TCP {
		w.class.Sticky = o.Sticky
		route.StripPath, route.NoRetries = o.StripPath, o.NoRetries
		route.TimeoutServer, route.TimeoutTunnel = o.TimeoutServer.Milliseconds(), o.TimeoutTunnel.Milliseconds()
		w.class.Options = route != haproxy.Route{Service: svc.Name}
	}
	if !svc.Private && !svc.Shadowed {
		w.publish(svc, route, node)
	}
	if svc.HostPort != 0 && node.hostPort {
		m := haproxy.HTTPPortMap
		if w.class.TCP {
			m = haproxy.TCPPortMap
		}
		w.routes[entry{m, strconv.Itoa(svc.HostPort)}] = route
	}
	if len(w.routes) == 0 {
		return wanted{routes: w.routes}
	}
	for _, e := range svc.Endpoints {
		s := wantedServer{
			endpoint: e.Name,
			addr:     e.Addr,
			options:  haproxy.ServerOptions{H2: o.H2C && !w.class.TCP, SendProxy: o.SendProxy, MaxConn: o.MaxConnections},
			weight:   e.Weight,
		}
		if e.Drain {
			s.state = haproxy.Drain
		}
		w.servers = append(w.servers, s)
	}
	return w
}

// publish adds the routes by name and by custom domain.
func (w *wanted) publish(svc *catalog.Service, route haproxy.Route, node offers) {
	name := strings.ToLower(svc.Name)
	if w.class.TCP {
		if node.sni {
			w.routes[entry{haproxy.SNIMap, name}] = route
		}
		return
	}
	redirect := haproxy.Route{Backend: haproxy.Redirect, Service: svc.Name}
	add := func(plainMap, tlsMap, key string) {
		if svc.Scheme != catalog.HTTPS {
			w.routes[entry{plainMap, key}] = route
		} else {
			w.routes[entry{plainMap, key}] = redirect
		}
		if svc.Scheme != catalog.HTTP {
			w.routes[entry{tlsMap, key}] = route
		}
	}
	add(haproxy.HTTPMap, haproxy.HTTPSMap, name)
	for _, d := range svc.Domains {
		if parent, ok := strings.CutPrefix(d, "*."); ok {
			add(haproxy.HTTPWildMap, haproxy.HTTPSWildMap, parent)
		} else {
			add(haproxy.HTTPMap, haproxy.HTTPSMap, d)
		}
	}
}

// nobody is the owner of domainsSwitch, which is for all services together, and of
// routes that somebody made by hand without an owner.
const nobody = ""

// domainsSwitch makes HAProxy look requests up by custom domain. That costs every
// request, so it is on only where there is a custom domain.
var domainsSwitch = entry{haproxy.DomainsMap, haproxy.DomainsKey}

// wantOfNobody says what all services together need.
func wantOfNobody(have *state) wanted {
	w := wanted{routes: map[entry]haproxy.Route{}}
	if have.domains > 0 {
		w.routes[domainsSwitch] = haproxy.Route{Backend: "yes", Service: nobody}
	}
	return w
}

// view is what a plan is made from; planning changes nothing of it.
type view struct {
	snapshot *catalog.Snapshot
	have     *state
	slots    *slots
	ports    *hostPorts
	sni      bool // the node has a port for TLS passthrough
}

// plan is what is to be done for some services.
type plan struct {
	steps  []Step
	moves  []move            // services that take or give up a backend
	reload map[string]string // by service, what it wants that HAProxy only has after a reload
}

// move gives a service a backend; "" only takes away the one that it has.
type move struct{ service, backend string }

// planServices returns what makes HAProxy serve the named services as the snapshot
// has them. A name may be that of a service that is gone, or nobody.
func planServices(v view, names []string) plan {
	p := plan{reload: map[string]string{}}
	taken := map[haproxy.Class]int{}
	for _, name := range names {
		svc := v.snapshot.Service(name)
		w, backend := wantOfNobody(v.have), ""
		if name != nobody {
			opens, waits := v.ports.opens(svc)
			w = want(svc, offers{hostPort: opens, sni: v.sni})
			if waits {
				p.reload[name] = fmt.Sprintf("host_port %d of service %s is new", svc.HostPort, name)
			}
		}
		if w.service != "" {
			var isNew, ok bool
			backend, isNew, ok = v.slots.pick(name, w.class, v.have, taken)
			if !ok {
				p.reload[name] = "no free backend of class " + w.class.Code()
				continue
			}
			p.moves = append(p.moves, move{name, backend})
			if isNew {
				p.steps = append(p.steps, Step{Do: MakeBackend, Backend: backend, Reason: "service " + name + " is new"})
			}
			p.steps = append(p.steps, planServers(backend, w.servers, v.have.backends[backend])...)
		} else if v.slots.used[name] != "" {
			p.moves = append(p.moves, move{name, ""})
		}
		p.steps = append(p.steps, planRoutes(name, backend, w, v.have)...)
	}
	p.steps = order(p.steps)
	return p
}

// planServers returns the steps from the servers that a backend has to those it
// shall have. A server that is no longer wanted is parked, and a parked one is
// used again for a new endpoint before another is made.
func planServers(backend string, want []wantedServer, have map[string]haproxy.Server) []Step {
	type identity struct {
		addr    netip.AddrPort
		options haproxy.ServerOptions
	}
	names := slices.SortedFunc(maps.Keys(have), compareServerNames)
	active := map[identity]string{}
	parked := map[haproxy.ServerOptions][]string{}
	var steps, last []Step
	park := func(s haproxy.Server, reason string) {
		s.State = haproxy.Maint
		last = append(last, Step{Do: ParkServer, Backend: backend, Server: s, Reason: reason})
	}
	wants := map[identity]bool{}
	for _, w := range want {
		wants[identity{w.addr, w.options}] = true
	}
	for _, name := range names {
		s := have[name]
		_, o, ok := haproxy.ParseServerName(name)
		id := identity{s.Addr, o}
		switch {
		case s.State == haproxy.Maint:
			if ok {
				parked[o] = append(parked[o], name)
			}
		case !ok:
			park(s, "not made by flotilla")
		case !wants[id]:
			park(s, "endpoint left the catalog")
		case active[id] != "":
			park(s, "the endpoint has another server")
		default:
			active[id] = name
		}
	}
	used := map[int]bool{}
	for _, name := range names {
		if n, _, ok := haproxy.ParseServerName(name); ok {
			used[n] = true
		}
	}
	next := 1
	added := false
	for _, w := range want {
		reason := "endpoint " + w.endpoint + " registered"
		name := active[identity{w.addr, w.options}]
		if name == "" {
			if i := reusable(parked[w.options], have, w.addr); i >= 0 {
				name = parked[w.options][i]
				parked[w.options] = slices.Delete(parked[w.options], i, i+1)
			}
		}
		var s haproxy.Server
		if name != "" {
			s = have[name]
		} else {
			for used[next] {
				next++
			}
			used[next] = true
			s = haproxy.Server{Name: haproxy.ServerName(next, w.options), Addr: w.addr, Weight: w.weight, State: haproxy.Maint}
			steps = append(steps, Step{Do: AddServer, Backend: backend, Server: s, Reason: reason})
			added = true
		}
		if s.Addr != w.addr {
			s.Addr = w.addr
			steps = append(steps, Step{Do: MoveServer, Backend: backend, Server: s, Reason: reason})
		}
		weigh := func() {
			if s.Weight != w.weight {
				s.Weight = w.weight
				steps = append(steps, Step{Do: SetWeight, Backend: backend, Server: s, Reason: fmt.Sprintf("endpoint %s has weight %d", w.endpoint, w.weight)})
			}
		}
		if w.state != haproxy.Drain {
			weigh() // before it takes traffic
		}
		if s.State != w.state {
			switch {
			case w.state == haproxy.Drain:
				reason = "endpoint " + w.endpoint + " is draining"
			case s.State == haproxy.Drain:
				reason = "endpoint " + w.endpoint + " is no longer draining"
			}
			s.State = w.state
			steps = append(steps, Step{Do: SetState, Backend: backend, Server: s, Reason: reason})
		}
		weigh()
	}
	if c, _ := haproxy.ClassOf(backend); c.Sticky && added {
		steps = append(steps, Step{Do: SetCookies, Backend: backend, Reason: "a server was added"})
	}
	return append(steps, last...)
}

// reusable picks a parked server, preferably the one that had this address.
func reusable(parked []string, have map[string]haproxy.Server, addr netip.AddrPort) int {
	for i, name := range parked {
		if have[name].Addr == addr {
			return i
		}
	}
	return len(parked) - 1
}

func compareServerNames(a, b string) int {
	an, _, _ := haproxy.ParseServerName(a)
	bn, _, _ := haproxy.ParseServerName(b)
	return cmp.Or(cmp.Compare(an, bn), strings.Compare(a, b))
}

// planRoutes returns the steps from the map entries that lead to a service to
// those that shall, all of them through backend.
func planRoutes(service, backend string, w wanted, have *state) []Step {
	subject := "service " + service
	if service == nobody {
		subject = "any custom domain"
	}
	var steps []Step
	for e, route := range w.routes {
		if route.Backend == "" {
			route.Backend = backend
		}
		if value := route.String(); have.routes[e] != value {
			steps = append(steps, Step{Do: SetRoute, Map: e.Map, Key: e.Key, Value: value, Reason: subject + " is offered here"})
		}
	}
	for e := range have.owned[service] {
		if _, ok := w.routes[e]; !ok {
			steps = append(steps, Step{Do: DelRoute, Map: e.Map, Key: e.Key, Reason: subject + " is no longer offered here"})
		}
	}
	slices.SortFunc(steps, func(a, b Step) int {
		return cmp.Or(strings.Compare(a.Map, b.Map), strings.Compare(a.Key, b.Key))
	})
	return steps
}

// order puts the steps of several services into the order of their phases. A
// route that one service gives up and another takes over in the same batch is
// only set.
func order(steps []Step) []Step {
	set := map[entry]bool{}
	for _, s := range steps {
		if s.Do == SetRoute {
			set[entry{s.Map, s.Key}] = true
		}
	}
	steps = slices.DeleteFunc(steps, func(s Step) bool { return s.Do == DelRoute && set[entry{s.Map, s.Key}] })
	slices.SortStableFunc(steps, func(a, b Step) int { return cmp.Compare(phase[a.Do], phase[b.Do]) })
	return steps
}
