package haproxy

import (
	"bytes"
	_ "embed"
	"fmt"
	"net"
	"net/netip"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"text/template"
)

// Class says which backend-level settings a backend has. HAProxy cannot change
// these at run time, so a service takes a backend of the class it needs.
type Class struct {
	TCP     bool
	Balance string // "leastconn", "roundrobin" or "consistent-hash"
	Sticky  bool   // by cookie; HTTP only
	Options bool   // evaluates a route's options (see Route); HTTP only
}

// Classes are all classes that there are.
var Classes = func() []Class {
	var all []Class
	for _, balance := range []string{"leastconn", "roundrobin", "consistent-hash"} {
		all = append(all, Class{TCP: true, Balance: balance})
		for _, sticky := range []bool{false, true} {
			for _, options := range []bool{false, true} {
				all = append(all, Class{Balance: balance, Sticky: sticky, Options: options})
			}
		}
	}
	return all
}()

// Code is the class's short name; backend names begin with it.
func (c Class) Code() string {
	code := "h"
	if c.TCP {
		code = "t"
	}
	code += c.Balance[:1]
	if c.Sticky {
		code += "s"
	}
	if c.Options {
		code += "o"
	}
	return code
}

// Defaults is the name of the class's "defaults" section.
func (c Class) Defaults() string { return "class-" + c.Code() }

// BackendName names a backend of the class after id, which is a number or a
// service's name.
func (c Class) BackendName(id string) string { return c.Code() + "." + id }

// ClassOf returns the class of a backend by its name.
func ClassOf(backend string) (Class, bool) {
	code, _, ok := strings.Cut(backend, ".")
	if !ok {
		return Class{}, false
	}
	for _, c := range Classes {
		if c.Code() == code {
			return c, true
		}
	}
	return Class{}, false
}

// CookieKey returns the command that gives the servers which were added to a
// sticky backend at run time their cookie; HAProxy itself does so only at start.
func CookieKey(backend string) string {
	return "set dynamic-cookie-key backend " + backend + " " + cookieKey
}

// The cookie is a hash of address, port and this key, so every node gives an
// endpoint the same cookie.
const cookieKey = "flotilla"

// The map files, by the name that Map and the configuration know them under.
const (
	HTTPMap      = "http"       // service name or custom domain -> route, on the HTTP port
	HTTPSMap     = "https"      // the same on the HTTPS port
	HTTPWildMap  = "http-wild"  // example.com for *.example.com -> route
	HTTPSWildMap = "https-wild" // the same on the HTTPS port
	DomainsMap   = "domains"    // DomainsKey, if there are custom domains
	HTTPPortMap  = "http-port"  // host_port -> route
	TCPPortMap   = "tcp-port"   // host_port -> route
	SNIMap       = "sni"        // service name -> route, on the TLS passthrough port
	StateMap     = "state"      // draining, and which node process is attached
)

// Maps are all map files.
var Maps = []string{HTTPMap, HTTPSMap, HTTPWildMap, HTTPSWildMap, DomainsMap, HTTPPortMap, TCPPortMap, SNIMap, StateMap}

// Redirect is the backend that sends the client to the same name on HTTPS.
const Redirect = "redirect"

// DomainsKey is the key in DomainsMap that makes requests be looked up by custom
// domain; it is there or not.
const DomainsKey = "1"

// Route is the value of a map entry: which backend, for which service, and the
// options that backends of an Options class evaluate.
type Route struct {
	Backend       string // or Redirect
	Service       string
	StripPath     bool
	TimeoutServer int64 // ms, 0: default
	TimeoutTunnel int64 // ms, 0: default
	NoRetries     bool
}

// String returns the route as a map value.
func (r Route) String() string {
	s := r.Backend + ":" + r.Service
	if !r.StripPath && r.TimeoutServer == 0 && r.TimeoutTunnel == 0 && !r.NoRetries {
		return s
	}
	flag := func(b bool) string {
		if b {
			return "1"
		}
		return "0"
	}
	return fmt.Sprintf("%s:%s:%d:%d:%s", s, flag(r.StripPath), r.TimeoutServer, r.TimeoutTunnel, flag(r.NoRetries))
}

// RouteOwner returns the backend and the service of a map value.
func RouteOwner(value string) (backend, service string) {
	backend, rest, _ := strings.Cut(value, ":")
	service, _, _ = strings.Cut(rest, ":")
	return backend, service
}

// Config is everything in the configuration file but its backends. Render refuses
// strings that the file would have to quote.
type Config struct {
	Generation   int64 // "get var proc.gen" tells which file a worker has loaded
	Node         string
	Address      netip.Addr
	HTTPPort     int
	HTTPSPort    int
	BalancerPort int
	SNIPort      int   // 0: none
	TCPPorts     []int // where the frontend of TCP host_ports listens
	HTTPPorts    []int // where the frontend of HTTP host_ports listens
	Dir          string
	OpsSocket    string // "@name" of an abstract unix socket; "": none
	User, Group  string // "": as started
	MaxConn      int
	Trusted      bool // <Dir>/trusted.lst lists proxies whose X-Forwarded headers are kept
	AcceptProxy  bool
	AccessLog    string // "": none; otherwise what HAProxy's "log" directive takes
}

// Backend is one backend and its servers as the file shall have them.
type Backend struct {
	Name    string
	Servers []Server // those in Maint are left out, but for spare ones
}

//go:embed haproxy.cfg.tmpl
var configText string

// Not at once: every command of the program would wait for it.
var configTemplate = sync.OnceValue(func() *template.Template {
	return template.Must(template.New("haproxy.cfg").Parse(configText))
})

// plainWord is what may stand in the file without quotes and escapes.
var plainWord = sync.OnceValue(func() *regexp.Regexp {
	return regexp.MustCompile(`^[A-Za-z0-9_./@:+=-]*$`)
})

// Render returns the configuration file up to its backends, which AppendBackend
// adds one by one.
func (c Config) Render() ([]byte, error) {
	for _, word := range append(strings.Fields(c.AccessLog), c.Node, c.Dir, c.OpsSocket, c.User, c.Group) {
		if !plainWord().MatchString(word) {
			return nil, fmt.Errorf("HAProxy configuration: %q has characters other than letters, digits and _./@:+=-", word)
		}
	}
	var b bytes.Buffer
	if err := configTemplate().Execute(&b, c); err != nil {
		return nil, fmt.Errorf("render HAProxy configuration: %w", err)
	}
	return b.Bytes(), nil
}

// AppendBackend appends the backend's section to a configuration file.
func AppendBackend(b []byte, be Backend) []byte {
	class, _ := ClassOf(be.Name)
	b = append(b, "backend "...)
	b = append(b, be.Name...)
	b = append(b, " from "...)
	b = append(b, class.Defaults()...)
	b = append(b, '\n')
	for _, s := range be.Servers {
		if s.State == Maint && s.Addr != Spare {
			continue
		}
		n, o, ours := ParseServerName(s.Name)
		weight := s.Weight
		if s.State == Drain {
			weight = 0 // the file knows no drain; audits set the state and the weight
		}
		b = append(b, "    server "...)
		b = append(b, s.Name...)
		b = append(b, ' ')
		b = append(b, s.Addr.String()...)
		if ours {
			b = append(b, " id "...)
			b = strconv.AppendInt(b, int64(n), 10)
		}
		b = append(b, " weight "...)
		b = strconv.AppendInt(b, int64(weight), 10)
		b = append(b, pooling...)
		b = append(b, o.keywords()...)
		if s.State == Maint {
			b = append(b, " disabled"...)
		}
		b = append(b, '\n')
	}
	return b
}

// Classes, Map, Bind and the rest serve the template.

// Classes returns every class.
func (c Config) Classes() []Class { return Classes }

// Map returns the path of a map file.
func (c Config) Map(name string) string { return c.Dir + "/maps/" + name + ".map" }

// CookieKey returns the key of the dynamic cookies.
func (c Config) CookieKey() string { return cookieKey }

// Bind returns address and port as HAProxy writes them.
func (c Config) Bind(port int) string {
	return net.JoinHostPort(c.Address.String(), strconv.Itoa(port))
}

// Algorithm returns the "balance" line's argument.
func (c Class) Algorithm() string {
	if c.Balance == "consistent-hash" {
		return "source"
	}
	return c.Balance
}

// Edge describes one of the two public HTTP frontends to the template.
type Edge struct {
	Config
	Name, Proto string
	Port        int
	Routes      string // map names
	Wild        string
}

// Edges returns the public HTTP frontends.
func (c Config) Edges() []Edge {
	return []Edge{
		{c, "http", "http", c.HTTPPort, HTTPMap, HTTPWildMap},
		{c, "https", "https", c.HTTPSPort, HTTPSMap, HTTPSWildMap},
	}
}
