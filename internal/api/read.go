package api

import (
	"context"
	"fmt"
	"math"
	"net"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"

	"flotilla/internal/catalog"
	"flotilla/internal/client"
	"flotilla/internal/router"
)

func (s *Server) status() client.NodeStatus {
	snapshot := s.Feed.Latest()
	st := client.NodeStatus{
		Name: s.Node, Version: s.Version, Address: s.Address, Domain: s.Domain,
		Started: s.Started, Uptime: math.Round(time.Since(s.Started).Seconds()*10) / 10,
		Store: s.storeState(), Services: snapshot.Len(), Router: client.RouterState(s.Router.Status()), DNS: client.DNSStats(s.DNS()),
	}
	st.Problems = s.Problems() + len(st.Router.Problems)
	if snapshot != nil {
		st.Revision, st.Held = snapshot.Revision, snapshot.Held
	}
	if s.Warnings != nil {
		st.Warnings = s.Warnings()
	}
	return st
}

func (s *Server) storeState() client.StoreState {
	st := s.StoreState()
	st.Endpoints = s.Store.Endpoints()
	return st
}

func (s *Server) services() []client.ServiceSummary {
	list := []client.ServiceSummary{} // [] in JSON, not null
	for _, svc := range s.Feed.Latest().Sorted() {
		list = append(list, summary(svc))
	}
	return list
}

func summary(svc *catalog.Service) client.ServiceSummary {
	sum := client.ServiceSummary{
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

// problems returns those of all services by service, then this node's own.
func (s *Server) problems() []catalog.Problem {
	list := []catalog.Problem{}
	for _, svc := range s.Feed.Latest().Sorted() {
		list = append(list, svc.Problems...)
	}
	return append(list, s.Router.Status().Problems...)
}

func (s *Server) explain(ctx context.Context, name string) (*client.Explanation, error) {
	snapshot := s.Feed.Latest()
	svc := snapshot.Service(name)
	if svc == nil {
		return nil, s.noService(snapshot, name)
	}
	e := &client.Explanation{ServiceSummary: summary(svc), Shadowed: svc.Shadowed, Problem: slices.Concat([]catalog.Problem{}, svc.Problems), Routes: s.routes(svc)}
	for _, p := range s.Router.Status().Problems {
		if strings.HasPrefix(p.Key, catalog.Prefix+name+"/") {
			e.Problem = append(e.Problem, p)
		}
	}
	e.Serving = []client.Endpoint{}
	for _, p := range svc.Endpoints {
		e.Serving = append(e.Serving, client.Endpoint{Name: p.Name, Address: p.Addr.String(), Weight: p.Weight, Drain: p.Drain, Zone: p.Zone})
	}
	for _, k := range svc.Keys {
		x := client.ExplainedKey{Key: catalog.Prefix + name + "/" + k.Name, Held: k.Held, Value: printable(k.Value), Meaning: meaning(k.Name)}
		if k.HasGood {
			x.InForce = printable(k.Good)
		}
		e.Keys = append(e.Keys, x)
	}
	stats, err := s.Router.Stats(ctx)
	if err != nil {
		e.Notes = append(e.Notes, fmt.Sprintf("HAProxy's counters cannot be read: %v", err))
	}
	for _, st := range stats {
		if st.Service == name {
			e.Counters = counters(st)
		}
	}
	if held := snapshot.Held; held != nil {
		e.Notes = append(e.Notes, fmt.Sprintf("%d of %d endpoints vanished at once at revision %d and stay routed; accept it with: flotilla services confirm", held.Removed, held.Of, held.Revision))
	}
	if st := s.StoreState(); !st.Live {
		e.Notes = append(e.Notes, "the store does not answer: this is the last known state")
	}
	records, _, err := s.records(ctx)
	if err != nil {
		e.Notes = append(e.Notes, fmt.Sprintf("the other nodes are not known: %v", err))
	}
	for _, r := range records {
		e.Nodes = append(e.Nodes, client.Applied{Node: r.Name, Revision: r.Applied, Reached: r.Applied >= svc.Revision})
	}
	return e, nil
}

func (s *Server) noService(snapshot *catalog.Snapshot, name string) *client.Error {
	hint := "list them with: flotilla services list"
	if other := snapshot.Fold(name); other != nil {
		hint = fmt.Sprintf("there is %s: case matters here", other.Name)
	}
	return client.Errorf(client.CodeNotFound, hint, "there is no service %s", strconv.Quote(name))
}

// printable returns v as it is if a terminal can show it, else quoted.
func printable(v string) string {
	if strings.ContainsFunc(v, func(r rune) bool { return r < ' ' || r == 0x7f || r == '\uFFFD' || 0x80 <= r && r < 0xa0 }) {
		return strconv.Quote(v)
	}
	return v
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

// routes lists the ways to a service, as far as its keys open them.
func (s *Server) routes(svc *catalog.Service) []client.Route {
	routes := []client.Route{}
	if !svc.Routable() {
		return routes
	}
	add := func(kind, to, note string) { routes = append(routes, client.Route{Kind: kind, To: to, Note: note}) }
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

// classes names the answers counted in router.ServiceStats.Requests.
var classes = [6]string{"other", "1xx", "2xx", "3xx", "4xx", "5xx"}

func counters(st router.ServiceStats) *client.Counters {
	c := &client.Counters{
		Requests: map[string]uint64{}, Connections: st.Connections, Errors: st.Errors, Retries: st.Retries,
		BytesIn: st.BytesIn, BytesOut: st.BytesOut, Active: st.Active, Queued: st.Queued,
		ResponseMS: st.ResponseMillis, TotalMS: st.TotalMillis,
	}
	for i, n := range st.Requests {
		if n > 0 {
			c.Requests[classes[i]] = n
		}
	}
	return c
}

// revisionOf reads the query's revision, which has to be there.
func revisionOf(r *http.Request) (int64, error) {
	text := r.URL.Query().Get("revision")
	n, err := strconv.ParseInt(text, 10, 64)
	if err != nil || n < 1 {
		return 0, client.Errorf(client.CodeBadRequest, "", "revision=%q is not a store revision", text)
	}
	return n, nil
}

// durationOf reads a duration of at most an hour from the query; "" is fallback.
func durationOf(r *http.Request, name string, fallback time.Duration) (time.Duration, error) {
	text := r.URL.Query().Get(name)
	if text == "" {
		return fallback, nil
	}
	d, err := time.ParseDuration(text)
	if err != nil || d <= 0 || d > time.Hour {
		return 0, client.Errorf(client.CodeBadRequest, "", "%s=%q is not a time such as 30s, up to 1h", name, text)
	}
	return d, nil
}
