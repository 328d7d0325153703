package api

import (
	"fmt"
	"net"
	"net/http"
	"slices"
	"strconv"
	"strings"

	"flotilla/internal/catalog"
	"flotilla/internal/text"
	"flotilla/internal/wait"
	"flotilla/internal/wire"
)

func (s *Server) getServices(*http.Request) (any, error) {
	list := []wire.ServiceSummary{} // [] in JSON, not null
	for _, svc := range s.Catalog.Latest().Sorted() {
		list = append(list, summary(svc))
	}
	return list, nil
}

// getProblems answers with those of all services by service, then this node's own.
func (s *Server) getProblems(*http.Request) (any, error) {
	list := []catalog.Problem{}
	for _, svc := range s.Catalog.Latest().Sorted() {
		list = append(list, svc.Problems...)
	}
	return append(list, s.Router.Status().Problems...), nil
}

// getService answers without the store too: with what is known of it.
func (s *Server) getService(r *http.Request) (any, error) {
	name := r.PathValue("name")
	snapshot := s.Catalog.Latest()
	svc := snapshot.Service(name)
	if svc == nil {
		return nil, noService(snapshot, name)
	}
	e := &wire.ServiceExplanation{ServiceSummary: summary(svc), Shadowed: svc.Shadowed, Problem: slices.Concat([]catalog.Problem{}, svc.Problems), Routes: s.routesTo(svc)}
	for _, p := range s.Router.Status().Problems {
		if strings.HasPrefix(p.Key, catalog.Prefix+name+"/") {
			e.Problem = append(e.Problem, p)
		}
	}
	e.Serving = []wire.Endpoint{}
	for _, p := range svc.Endpoints {
		e.Serving = append(e.Serving, wire.Endpoint{Name: p.Name, Address: p.Addr.String(), Weight: p.Weight, Drain: p.Drain, Zone: p.Zone})
	}
	for _, k := range svc.Keys {
		x := wire.ExplainedKey{Key: catalog.Prefix + name + "/" + k.Name, Held: k.Held, Value: text.Printable(k.Value), Meaning: meaning(k.Name)}
		if k.HasGood {
			x.InForce = text.Printable(k.Good)
		}
		e.Keys = append(e.Keys, x)
	}
	counters, err := s.Router.Stats(r.Context())
	if err != nil {
		e.Notes = append(e.Notes, fmt.Sprintf("HAProxy's counters cannot be read: %v", err))
	}
	for _, c := range counters {
		if c.Service == name {
			e.Counters = &c
		}
	}
	if held := snapshot.Held; held != nil {
		e.Notes = append(e.Notes, fmt.Sprintf("%d of %d endpoints vanished at once at revision %d and stay routed; accept it with: flotilla services confirm", held.Removed, held.Of, held.Revision))
	}
	if !s.StoreStatus().Live {
		e.Notes = append(e.Notes, "the store does not answer: this is the last known state")
	}
	known, err := s.State.Full(r.Context())
	if err != nil {
		known = s.State.Latest()
		e.Notes = append(e.Notes, fmt.Sprintf("how far the nodes are is not known: %v", err))
	}
	routers := wait.Applied{Revision: svc.Revision, Service: name}
	routers.See(known)
	e.Nodes = routers.List()
	return e, nil
}

func summary(svc *catalog.Service) wire.ServiceSummary {
	sum := wire.ServiceSummary{
		Name: svc.Name, Scheme: string(svc.Scheme), Endpoints: len(svc.Endpoints), HostPort: svc.HostPort,
		Private: svc.Private, Domains: svc.Domains, Problems: len(svc.Problems), Revision: svc.Revision,
	}
	for _, e := range svc.Endpoints {
		if e.Drain {
			sum.Draining++
		}
	}
	return sum
}

func noService(snapshot *catalog.Snapshot, name string) *wire.Error {
	hint := "list them with: flotilla services list"
	if other := snapshot.Fold(name); other != nil {
		hint = fmt.Sprintf("there is %s: case matters here", other.Name)
	}
	return wire.Errorf(wire.CodeNotFound, hint, "there is no service %s", strconv.Quote(name))
}

// meaning says what the key of that name below a service does.
func meaning(key string) string {
	kind, rest, _ := strings.Cut(key, "/")
	switch {
	case key == "scheme":
		return "how the service is spoken to; without it nothing is routed"
	case key == "host_port":
		return "port on every node that leads to the service"
	case key == "private":
		return "no public route by host or path; its mere presence counts"
	case key == "options":
		return "settings of the route"
	case kind == "hosts" && rest != "":
		return "endpoint " + rest
	case kind == "domains" && rest != "":
		return "custom domain that leads to the service"
	case kind == "meta" && rest != "":
		return "weight, drain and zone of endpoint " + rest
	}
	return "not used by flotilla"
}

// routesTo lists the ways to a service, as far as its keys open them.
func (s *Server) routesTo(svc *catalog.Service) []wire.Route {
	routes := []wire.Route{}
	if !svc.Routable() {
		return routes
	}
	add := func(kind, to, note string) { routes = append(routes, wire.Route{Kind: kind, To: to, Note: note}) }
	if svc.Scheme.IsHTTP() && !svc.Private {
		type way struct {
			scheme string
			port   int
			note   string
		}
		ways := []way{{"http", s.Ports.HTTP, ""}}
		switch svc.Scheme {
		case catalog.HTTPS:
			ways = []way{{"https", s.Ports.HTTPS, ""}, {"http", s.Ports.HTTP, "redirects to https"}}
		case catalog.HTTPAndHTTPS:
			ways = append(ways, way{"https", s.Ports.HTTPS, ""})
		}
		for _, w := range ways {
			if !svc.Shadowed {
				add("host", url(w.scheme, svc.Name+"."+s.Domain, w.port)+"/", strings.TrimPrefix(w.note+"; any domain after the first label", "; "))
				add("path", url(w.scheme, s.Address, w.port)+"/"+svc.Name, w.note)
			}
			for _, d := range svc.Domains {
				add("domain", url(w.scheme, d, w.port)+"/", w.note)
			}
		}
	}
	if svc.Scheme == catalog.TCP && s.Ports.SNI != 0 && !svc.Private && !svc.Shadowed {
		add("tls", fmt.Sprintf("%s.%s:%d", svc.Name, s.Domain, s.Ports.SNI), "TLS by server name; any domain after the first label")
	}
	if svc.HostPort != 0 {
		add("host_port", net.JoinHostPort(s.Address, strconv.Itoa(svc.HostPort)), "and on every other node")
	}
	if !svc.Shadowed {
		add("dns", svc.Name+"."+s.Domain, "the address of the node that is asked")
		add("dns", "_"+svc.Name+"._tcp."+s.Domain, "SRV: the endpoints themselves")
	}
	return routes
}

// url returns scheme://host, with the port unless it is the scheme's own.
func url(scheme, host string, port int) string {
	if scheme == "http" && port == 80 || scheme == "https" && port == 443 {
		if strings.Contains(host, ":") {
			host = "[" + host + "]"
		}
		return scheme + "://" + host
	}
	return scheme + "://" + net.JoinHostPort(host, strconv.Itoa(port))
}
