package dns

import (
	"errors"
	"fmt"
	"net/netip"
	"strconv"
	"strings"

	"flotilla/internal/catalog"

	"github.com/miekg/dns"
)

const (
	localTTL  = 5 // seconds, for all that is said about the domain, absence too
	soaSerial = 1 // constant: nobody transfers this zone
)

// zone is the cluster's own domain as this node answers it. Below the domain:
//
//	<anything>                A, AAAA: this node, whose router knows the services
//	_<service>._tcp           SRV: each endpoint that is not draining
//	<n>.<service>.inst        A, AAAA: the address of that endpoint
//	(the domain itself)       SOA, NS, A, AAAA
//
// The SOA record at the top also tells the mDNS modules of common C libraries
// to leave ".local" to unicast DNS.
type zone struct {
	domain    string // fully qualified, lower case: "local."
	labels    int    // in domain
	v4, v6    []netip.Addr
	node      string // this node's name in the domain, fully qualified
	recursive bool   // there are upstreams
	feed      *catalog.Feed
	reverse   reverse
}

func newZone(cfg Config, feed *catalog.Feed) (*zone, error) {
	domain := strings.ToLower(strings.Trim(cfg.Domain, "."))
	if domain == "" {
		domain = defaultDomain
	}
	labels := strings.Split(domain, ".")
	for _, l := range labels {
		if !validLabel(l) {
			return nil, fmt.Errorf("domain %q: %q is no host name", cfg.Domain, l)
		}
	}
	if len(domain) > 100 {
		return nil, fmt.Errorf("domain %q is longer than 100 characters", cfg.Domain)
	}
	z := &zone{domain: domain + ".", labels: len(labels), feed: feed}
	z.node = "ns." + z.domain
	if validLabel(cfg.Node) {
		z.node = cfg.Node + "." + z.domain
	}
	for _, a := range cfg.Address {
		switch a = a.Unmap().WithZone(""); {
		case !a.IsValid() || a.IsUnspecified():
			return nil, fmt.Errorf("%s is no address of a node", a)
		case a.Is4():
			z.v4 = append(z.v4, a)
		default:
			z.v6 = append(z.v6, a)
		}
	}
	if len(cfg.Address) == 0 {
		return nil, errors.New("no address of this node to answer with")
	}
	return z, nil
}

// has reports whether name (fully qualified) is the domain or below it.
func (z *zone) has(name string) bool { return dns.IsSubDomain(z.domain, name) }

// answer fills r, which has its question, from the newest snapshot. The
// question's name must be in the zone.
func (z *zone) answer(r *dns.Msg) {
	q := r.Question[0]
	r.Authoritative = true
	suffix := q.Name[len(q.Name)-len(z.domain):]
	labels := dns.SplitDomainName(q.Name)
	labels = labels[:len(labels)-z.labels]
	snap := z.feed.Latest()

	exists := true
	top := ""
	if len(labels) > 0 {
		top = strings.ToLower(labels[len(labels)-1])
	}
	switch {
	case top == "_tcp":
		exists = z.srv(r, snap, labels, suffix)
	case top == "_udp":
		exists = false
	case top == "inst" && len(labels) > 1:
		exists = z.instance(r, snap, labels)
	default:
		r.Answer = append(r.Answer, addresses(q, z.v4, z.v6)...)
		if top == "" {
			switch q.Qtype {
			case dns.TypeSOA:
				r.Answer = append(r.Answer, soa(suffix))
			case dns.TypeNS:
				ns := "ns." + suffix
				r.Answer = append(r.Answer, &dns.NS{Hdr: head(suffix, dns.TypeNS), Ns: ns})
				r.Extra = append(r.Extra, addresses(dns.Question{Name: ns, Qtype: dns.TypeA}, z.v4, nil)...)
				r.Extra = append(r.Extra, addresses(dns.Question{Name: ns, Qtype: dns.TypeAAAA}, nil, z.v6)...)
			}
		}
	}
	if exists && q.Qtype == dns.TypeANY {
		r.Answer, r.Extra = []dns.RR{minimalANY(q.Name)}, nil
	}
	if !exists {
		r.Rcode = dns.RcodeNameError
	}
	if len(r.Answer) == 0 {
		r.Ns = append(r.Ns, soa(suffix))
	}
}

// srv answers for the names under _tcp and reports whether the name exists.
func (z *zone) srv(r *dns.Msg, snap *catalog.Snapshot, labels []string, suffix string) bool {
	if len(labels) == 1 {
		return true
	}
	if len(labels) > 2 {
		return false
	}
	name, underscore := strings.CutPrefix(labels[0], "_")
	svc := snap.Fold(name)
	if !underscore || svc == nil || !svc.Routable() {
		return false
	}
	if r.Question[0].Qtype != dns.TypeSRV {
		return true
	}
	for i := range svc.Endpoints {
		e := &svc.Endpoints[i]
		if e.Drain {
			continue
		}
		target := endpointName(svc, e, suffix)
		r.Answer = append(r.Answer, &dns.SRV{
			Hdr:    head(r.Question[0].Name, dns.TypeSRV),
			Weight: uint16(e.Weight),
			Port:   e.Addr.Port(),
			Target: target,
		})
		r.Extra = append(r.Extra, address(target, e.Addr.Addr()))
	}
	return true
}

// instance answers for the names under inst and reports whether the name exists.
func (z *zone) instance(r *dns.Msg, snap *catalog.Snapshot, labels []string) bool {
	svc := snap.Fold(labels[len(labels)-2])
	if svc == nil || !svc.Routable() {
		return false
	}
	if len(labels) == 2 {
		return true
	}
	if len(labels) > 3 {
		return false
	}
	found := false
	for i := range svc.Endpoints {
		e := &svc.Endpoints[i]
		if !strings.EqualFold(endpointLabel(e), labels[0]) {
			continue
		}
		found = true
		if rr := address(r.Question[0].Name, e.Addr.Addr()); rr.Header().Rrtype == r.Question[0].Qtype {
			r.Answer = append(r.Answer, rr)
		}
	}
	return found
}

// endpointName returns <n>.<service>.inst below the domain that ends in suffix.
func endpointName(svc *catalog.Service, e *catalog.Endpoint, suffix string) string {
	return endpointLabel(e) + "." + svc.Name + ".inst." + suffix
}

// endpointLabel returns the endpoint's name, or, if that cannot be a label,
// its address and port with dashes.
func endpointLabel(e *catalog.Endpoint) string {
	if validLabel(e.Name) {
		return e.Name
	}
	a := strings.NewReplacer(".", "-", ":", "-").Replace(e.Addr.Addr().StringExpanded())
	return a + "-" + strconv.Itoa(int(e.Addr.Port()))
}

func addresses(q dns.Question, v4, v6 []netip.Addr) []dns.RR {
	var of []netip.Addr
	switch q.Qtype {
	case dns.TypeA:
		of = v4
	case dns.TypeAAAA:
		of = v6
	}
	rrs := make([]dns.RR, len(of))
	for i, a := range of {
		rrs[i] = address(q.Name, a)
	}
	return rrs
}

func address(name string, a netip.Addr) dns.RR {
	if a.Is4() {
		return &dns.A{Hdr: head(name, dns.TypeA), A: a.AsSlice()}
	}
	return &dns.AAAA{Hdr: head(name, dns.TypeAAAA), AAAA: a.AsSlice()}
}

func head(name string, rrtype uint16) dns.RR_Header {
	return dns.RR_Header{Name: name, Rrtype: rrtype, Class: dns.ClassINET, Ttl: localTTL}
}

func soa(domain string) dns.RR {
	return &dns.SOA{
		Hdr: head(domain, dns.TypeSOA), Ns: "ns." + domain, Mbox: "hostmaster." + domain,
		Serial: soaSerial, Refresh: 3600, Retry: 600, Expire: 86400, Minttl: localTTL,
	}
}

// minimalANY is what a question for any type gets (RFC 8482).
func minimalANY(name string) dns.RR {
	return &dns.HINFO{Hdr: head(name, dns.TypeHINFO), Cpu: "RFC8482"}
}
