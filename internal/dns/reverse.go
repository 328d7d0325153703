package dns

import (
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"sync"

	"flotilla/internal/catalog"

	"github.com/miekg/dns"
)

// maxPTR bounds the names given for one address; a machine may hold an endpoint
// of every service.
const maxPTR = 16

// reverse finds the endpoints of an address. It is built at the first question
// and follows the catalog by difference from then on.
type reverse struct {
	mu     sync.Mutex // guards all below
	snap   *catalog.Snapshot
	byAddr map[netip.Addr][]*catalog.Service // once for each endpoint
}

// services returns those with an endpoint at a, sorted by name.
func (x *reverse) services(snap *catalog.Snapshot, a netip.Addr) []*catalog.Service {
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.byAddr == nil {
		x.byAddr = map[netip.Addr][]*catalog.Service{}
	}
	for _, c := range snap.Diff(x.snap) {
		if c.Old != nil {
			for _, e := range c.Old.Endpoints {
				x.remove(e.Addr.Addr(), c.Old)
			}
		}
		if c.New != nil && c.New.Routable() && !c.New.Shadowed {
			for _, e := range c.New.Endpoints {
				x.byAddr[e.Addr.Addr()] = append(x.byAddr[e.Addr.Addr()], c.New)
			}
		}
	}
	x.snap = snap
	found := slices.Clone(x.byAddr[a])
	slices.SortFunc(found, func(a, b *catalog.Service) int { return strings.Compare(a.Name, b.Name) })
	return slices.Compact(found)
}

func (x *reverse) remove(a netip.Addr, svc *catalog.Service) {
	rest := slices.DeleteFunc(x.byAddr[a], func(s *catalog.Service) bool { return s == svc })
	if len(rest) == 0 {
		delete(x.byAddr, a)
		return
	}
	x.byAddr[a] = rest
}

// point answers the question of r with PTR records, if it is for an address that is
// known here: this node's name for its own addresses, and the names of endpoints.
func (z *zone) point(r *dns.Msg) bool {
	name := r.Question[0].Name
	a, ok := reverseAddr(name)
	if !ok {
		return false
	}
	add := func(target string) {
		r.Answer = append(r.Answer, &dns.PTR{Hdr: head(name, dns.TypePTR), Ptr: target})
	}
	if slices.Contains(z.v4, a) || slices.Contains(z.v6, a) {
		add(z.node)
	}
	for _, svc := range z.reverse.services(z.feed.Latest(), a) {
		for i := range svc.Endpoints {
			if len(r.Answer) < maxPTR && svc.Endpoints[i].Addr.Addr() == a {
				add(endpointName(svc, &svc.Endpoints[i], z.domain))
			}
		}
	}
	r.Authoritative = len(r.Answer) > 0
	return r.Authoritative
}

// reverseAddr returns the address that name stands for under in-addr.arpa or
// ip6.arpa.
func reverseAddr(name string) (netip.Addr, bool) {
	labels := dns.SplitDomainName(dns.CanonicalName(name))
	n := len(labels) - 2
	if n < 4 || labels[n+1] != "arpa" {
		return netip.Addr{}, false
	}
	slices.Reverse(labels[:n])
	switch {
	case labels[n] == "in-addr" && n == 4:
		a, err := netip.ParseAddr(strings.Join(labels[:n], "."))
		return a, err == nil && a.Is4()
	case labels[n] == "ip6" && n == 32:
		var ip [16]byte
		for i, l := range labels[:n] {
			d, err := strconv.ParseUint(l, 16, 8)
			if err != nil || len(l) != 1 {
				return netip.Addr{}, false
			}
			ip[i/2] = ip[i/2]<<4 | byte(d)
		}
		return netip.AddrFrom16(ip), true
	}
	return netip.Addr{}, false
}
