package catalog

import (
	"fmt"
	"net/netip"
	"strings"
)

// Policy is what an operator allows the writers of keys to do. The zero value
// allows every address that is not always refused, and no loopback.
//
// Always refused are unspecified, multicast, broadcast and link-local addresses
// and the metadata servers of the large clouds.
type Policy struct {
	Allow         []netip.Prefix // endpoints must lie in one of them; empty: anywhere
	Loopback      bool           // 127.0.0.0/8 and ::1 are allowed, whatever Allow says
	MaxEndpoints  int            // per service; 0 is 512
	MaxServices   int            // routable services; 0 is 50,000
	ReservedPorts map[int]string // ports that host_port may not take, and who uses them
	LocalDomain   string         // domain of the nodes' own DNS, which no custom domain may lie in; "" for none
}

const (
	defaultMaxEndpoints = 512
	defaultMaxServices  = 50_000

	maxValue        = 4 << 10  // bytes of any value but options
	maxOptions      = 16 << 10 // bytes of options
	maxNameLength   = 63       // bytes of a service name: it must fit into a DNS label
	maxEndpointName = 255      // bytes of the <n> of hosts/<n>
	maxDomains      = 1000     // per service
	maxProblems     = 100      // per service
)

// rules are a Policy made ready to use.
type rules struct {
	Policy
	never []refusal
}

type refusal struct {
	prefix netip.Prefix
	what   string
}

func newRules(p Policy) *rules {
	if p.MaxEndpoints <= 0 {
		p.MaxEndpoints = defaultMaxEndpoints
	}
	if p.MaxServices <= 0 {
		p.MaxServices = defaultMaxServices
	}
	p.LocalDomain = strings.Trim(strings.ToLower(p.LocalDomain), ".")
	r := &rules{Policy: p}
	for _, n := range [][2]string{
		{"0.0.0.0/8", "no address one can connect to"},
		{"169.254.0.0/16", "a link-local address, where clouds keep their metadata"},
		{"224.0.0.0/4", "a multicast address"},
		{"255.255.255.255/32", "the broadcast address"},
		{"100.100.100.200/32", "a cloud's metadata server"},
		{"168.63.129.16/32", "a cloud's metadata server"},
		{"::/128", "no address one can connect to"},
		{"fe80::/10", "a link-local address"},
		{"ff00::/8", "a multicast address"},
		{"fd00:ec2::254/128", "a cloud's metadata server"},
		{"fd20:ce::254/128", "a cloud's metadata server"},
	} {
		r.never = append(r.never, refusal{netip.MustParsePrefix(n[0]), n[1]})
	}
	return r
}

// refuses says why no endpoint may have the address a, or "". a is unmapped and
// has no zone.
func (r *rules) refuses(a netip.Addr) string {
	for _, n := range r.never {
		if n.prefix.Contains(a) {
			return n.what
		}
	}
	if a.IsLoopback() {
		if !r.Loopback {
			return "a loopback address: every node would reach itself"
		}
		return ""
	}
	if v4, ok := embedded(a); ok {
		if what := r.refuses(v4); what != "" {
			return fmt.Sprintf("a detour to %s, %s", v4, what)
		}
	}
	if len(r.Allow) == 0 {
		return ""
	}
	for _, p := range r.Allow {
		if p.Contains(a) {
			return ""
		}
	}
	return "outside the allowed addresses"
}

// embedded returns the IPv4 address that a reaches by translation (NAT64) or
// stands for (the deprecated IPv4-compatible form).
func embedded(a netip.Addr) (netip.Addr, bool) {
	if !a.Is6() {
		return netip.Addr{}, false
	}
	b := a.As16()
	switch [12]byte(b[:12]) {
	case [12]byte{0, 0x64, 0xff, 0x9b}, [12]byte{}:
		return netip.AddrFrom4([4]byte(b[12:])), true
	}
	return netip.Addr{}, false
}
