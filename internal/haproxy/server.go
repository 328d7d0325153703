package haproxy

import (
	"fmt"
	"net/netip"
	"strconv"
	"strings"
)

// ServerOptions are the settings that HAProxy fixes when a server is made. They
// are part of the server's name, so that reading the names back is enough to
// know them.
type ServerOptions struct {
	H2        bool // HTTP/2 without TLS
	SendProxy bool // PROXY protocol version 2
	MaxConn   int  // 0: no limit
}

// ServerState is the administrative state of a server.
type ServerState int

// The states that we give a server.
const (
	Ready ServerState = iota
	Drain             // finishes what it has, keeps clients bound by cookie
	Maint             // parked: takes nothing
)

func (s ServerState) String() string { return [...]string{"ready", "drain", "maint"}[s] }

// Server is one server of a backend.
type Server struct {
	Name   string // made by ServerName
	Addr   netip.AddrPort
	Weight int // 0 to 256, absolute
	State  ServerState
}

// Spare is the address of servers that are declared in advance, parked, for
// endpoints to come. Making a server stops all of HAProxy's threads for a moment;
// moving one does not.
var Spare = netip.MustParseAddrPort("127.0.0.1:1")

// ServerName returns the name of the n-th server of a backend with these options.
func ServerName(n int, o ServerOptions) string {
	name := "s" + strconv.Itoa(n)
	if o.H2 {
		name += "-h2"
	}
	if o.SendProxy {
		name += "-pp"
	}
	if o.MaxConn > 0 {
		name += "-m" + strconv.Itoa(o.MaxConn)
	}
	return name
}

// ParseServerName undoes ServerName; ok is false for a name that it did not make.
func ParseServerName(name string) (n int, o ServerOptions, ok bool) {
	first, rest, _ := strings.Cut(name, "-")
	if !strings.HasPrefix(first, "s") {
		return 0, o, false
	}
	n, err := strconv.Atoi(first[1:])
	if err != nil || n < 1 {
		return 0, o, false
	}
	for part := range strings.SplitSeq(rest, "-") {
		switch {
		case part == "" && rest == "":
		case part == "h2":
			o.H2 = true
		case part == "pp":
			o.SendProxy = true
		case strings.HasPrefix(part, "m"):
			if o.MaxConn, err = strconv.Atoi(part[1:]); err != nil {
				return 0, o, false
			}
		default:
			return 0, o, false
		}
	}
	return n, o, ServerName(n, o) == name
}

// keywords returns the options in HAProxy's words, with a leading space each.
func (o ServerOptions) keywords() string {
	var b strings.Builder
	if o.H2 {
		b.WriteString(" proto h2")
	}
	if o.SendProxy {
		b.WriteString(" send-proxy-v2")
	}
	if o.MaxConn > 0 {
		fmt.Fprintf(&b, " maxconn %d", o.MaxConn)
	}
	return b.String()
}

// pooling makes a server keep idle connections: on 2.6 one that is added at run
// time has no connection pool unless told so.
const pooling = " pool-max-conn -1 pool-purge-delay 5s"

// AddServer returns the command that makes a server; it starts in Maint. Its id is
// the number in its name: consistent hashing goes by ids, which HAProxy would
// otherwise give anew at every reload.
func AddServer(backend string, s Server) string {
	n, o, _ := ParseServerName(s.Name)
	return fmt.Sprintf("add server %s/%s %s id %d weight %d%s%s", backend, s.Name, s.Addr, n, s.Weight, pooling, o.keywords())
}

// SetState returns the command that sets a server's administrative state.
func SetState(backend, server string, state ServerState) string {
	return fmt.Sprintf("set server %s/%s state %s", backend, server, state)
}

// SetWeight returns the command that sets a server's absolute weight.
func SetWeight(backend, server string, weight int) string {
	return fmt.Sprintf("set server %s/%s weight %d", backend, server, weight)
}

// SetAddr returns the command that moves a parked server to another address.
func SetAddr(backend, server string, addr netip.AddrPort) string {
	return fmt.Sprintf("set server %s/%s addr %s port %d", backend, server, addr.Addr(), addr.Port())
}
