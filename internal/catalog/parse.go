package catalog

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"flotilla/internal/text"
)

const defaultWeight = 100

// splitKey splits /services/<service>/<name>. ok is false for a key that belongs
// to no service.
func splitKey(key string) (service, name string, ok bool) {
	rest, ok := strings.CutPrefix(key, Prefix)
	if !ok || rest == "" {
		return "", "", false
	}
	service, name, nested := strings.Cut(rest, "/")
	if nested && name == "" { // a directory marker of an older tool
		return "", "", false
	}
	return service, name, true
}

// joinKey is the inverse of splitKey.
func joinKey(service, name string) string {
	if name == "" {
		return Prefix + service
	}
	return Prefix + service + "/" + name
}

// parsed is what the keys of one service say on their own, before other services'
// claims are looked at.
type parsed struct {
	service *Service
	claims  []claim
	created int64 // create revision of the scheme key, by which services are ranked
}

// endpoints is the number of endpoints that get traffic. A nil p has none.
func (p *parsed) endpoints() int {
	if !p.routable() {
		return 0
	}
	return len(p.service.Endpoints)
}

func (p *parsed) routable() bool { return p != nil && p.service.Routable() }

// resource is something that only one service can hold.
type resource struct {
	kind  kind   // kindScheme (the name itself), kindHostPort or kindDomain
	value string // the name in lower case, the port, the domain
}

// claim is a service's wish for a resource. The oldest claim wins.
type claim struct {
	resource
	key     string // name of the key that claims
	created int64  // its create revision
}

// parse makes a service of its keys, which must be sorted by name and are kept. It
// returns nil if there are none.
func (r *rules) parse(service string, keys []Key) *parsed {
	if len(keys) == 0 {
		return nil
	}
	p := parser{rules: r, raw: service, addrs: map[netip.AddrPort]string{}, svc: &Service{Name: safeName(service, shownLength), Keys: keys}}
	for i := range keys {
		p.svc.Revision = max(p.svc.Revision, keys[i].ModRevision)
	}
	result := &parsed{service: p.svc}
	if f := readName(service); f != nil {
		remove := p.deleteAll()
		if len(keys) == 1 {
			remove = p.deleteKey(keys[0].Name)
		}
		p.problem("", "", f.reason, f.advice+", and remove this one: "+remove)
		return result
	}
	for i := range keys {
		p.key(&keys[i])
	}
	p.limitEndpoints()
	p.applyMeta()
	p.fitScheme()
	result.created, result.claims = p.created, p.claims()
	p.svc.Problems = sortProblems(p.svc.Problems)
	return result
}

// readName says what is wrong with a service name, or nil.
func readName(name string) *valueError {
	fail := func(reason, advice string) *valueError { return &valueError{reason: reason, advice: advice} }
	digits := true
	for i := range len(name) {
		c := name[i]
		digits = digits && isDigit(c)
		if !isAlnum(c) && (i == 0 || c != '-' && c != '_') {
			return fail("a service name has letters and digits, and after the first also - and _", "choose a name such as web-1")
		}
	}
	switch {
	case name == "":
		return fail("the service name is empty", "choose a name such as web")
	case len(name) > maxNameLength:
		return fail(fmt.Sprintf("the service name is longer than %d characters", maxNameLength), "choose a shorter name")
	case digits:
		return fail("a name of digits only would capture requests that are addressed to an IP address", "choose a name with a letter in it")
	case strings.EqualFold(name, "localhost"):
		return fail("localhost is every machine's name for itself", "choose another name")
	}
	return nil
}

// parser collects what the keys of one service say.
type parser struct {
	*rules
	raw     string // the service's name as written
	svc     *Service
	created int64 // of the scheme key
	port    claim
	domains []claim
	addrs   map[netip.AddrPort]string // name of the endpoint that has it
	metas   []namedMeta
	options string // the options value that is in force
}

type namedMeta struct {
	endpoint string
	meta
}

func (p *parser) problem(name, value, reason, remedy string) {
	key := Prefix + p.svc.Name
	if name != "" {
		key += "/" + text.Show(name)
	}
	p.svc.Problems = append(p.svc.Problems, Problem{key, text.Show(value), reason, remedy})
}

// put and deleteKey are the commands for a remedy.
func (p *parser) put(name, value string) string {
	return "etcdctl put " + shellKey(joinKey(p.raw, name)) + " " + shellWord(value)
}

func (p *parser) deleteKey(name string) string {
	return "etcdctl del " + shellKey(joinKey(p.raw, name))
}

func (p *parser) deleteAll() string {
	return "etcdctl del --prefix " + shellKey(joinKey(p.raw, "")+"/")
}

// shellKey is a key for a command line; one that nobody would paste is only
// described.
func shellKey(key string) string {
	if len(key) > 2*maxEndpointName {
		return "KEY (find it with: etcdctl get --prefix " + Prefix + " --keys-only)"
	}
	return shellWord(key)
}

// key takes one key into the service: its value or, if that is bad, its last
// good one.
func (p *parser) key(k *Key) {
	kind, arg := kindOf(k.Name)
	switch kind {
	case kindOther:
		return
	case kindMisspelt:
		p.misspelt(k, arg)
		return
	case kindHost:
		if len(arg) > maxEndpointName {
			p.problem(k.Name, k.Value, fmt.Sprintf("the name after hosts/ is longer than %d bytes", maxEndpointName),
				"write it under a shorter name: "+p.put("hosts/1", kind.example()))
			return
		}
	}
	value := k.Value
	set, f := p.check(kind, value)
	if f != nil {
		reason := f.reason
		still := f
		if k.HasGood {
			value = k.Good
			if set, still = p.check(kind, value); still == nil {
				reason += "; the last good value stays in force: " + text.Show(trim(value))
			}
		}
		p.problem(k.Name, k.Value, reason, f.advice+": "+p.put(k.Name, f.instead))
		if still != nil {
			return
		}
	} else if u := set.unknown; u != nil {
		p.problem(k.Name, value, u.reason, u.advice+": "+p.put(k.Name, u.instead))
	}
	p.take(k, kind, arg, set)
	if kind == kindOptions {
		p.options = value
	}
}

func (p *parser) take(k *Key, kind kind, arg string, set setting) {
	switch kind {
	case kindScheme:
		p.svc.Scheme, p.created = set.scheme, k.CreateRevision
	case kindHost:
		p.endpoint(k, arg, set.addr)
	case kindHostPort:
		p.svc.HostPort = set.port
		p.port = claim{resource{kindHostPort, strconv.Itoa(set.port)}, "host_port", k.CreateRevision}
	case kindPrivate:
		p.svc.Private = true
	case kindDomain:
		p.domains = append(p.domains, claim{resource{kindDomain, set.domain}, k.Name, k.CreateRevision})
	case kindOptions:
		p.svc.Options = set.options
	case kindMeta:
		p.metas = append(p.metas, namedMeta{safeName(arg, maxEndpointName), set.meta})
	}
}

// misspelt reports a key that looks like one of ours but is none.
func (p *parser) misspelt(k *Key, meant string) {
	kind, _ := kindOf(meant)
	instead := trim(k.Value)
	if _, f := p.check(kind, instead); f != nil || kind == kindPrivate || !printable(instead) || strings.HasPrefix(instead, "-") {
		instead = kind.example()
	}
	p.problem(k.Name, k.Value, "the key has no meaning; did you mean "+text.Show(joinKey(p.raw, meant))+"?",
		"write that one, then delete this one: "+p.put(meant, instead)+" && "+p.deleteKey(k.Name))
}

func (p *parser) endpoint(k *Key, name string, addr netip.AddrPort) {
	if first, taken := p.addrs[addr]; taken {
		p.problem(k.Name, k.Value, fmt.Sprintf("%s is already registered as hosts/%s", addr, text.Show(first)),
			"delete one of the two: "+p.deleteKey(k.Name))
		return
	}
	e := Endpoint{Name: safeName(name, maxEndpointName), Addr: addr, Weight: defaultWeight}
	p.svc.Endpoints = append(p.svc.Endpoints, e)
	p.addrs[addr] = e.Name
}

// limitEndpoints leaves out the newest endpoints if there are too many, so that
// nobody can push out those that serve already.
func (p *parser) limitEndpoints() {
	s := p.svc
	if n := len(s.Endpoints) - p.MaxEndpoints; n > 0 {
		created := make(map[string]int64, len(s.Endpoints))
		for i := range s.Keys {
			if kind, name := kindOf(s.Keys[i].Name); kind == kindHost {
				created[safeName(name, maxEndpointName)] = s.Keys[i].CreateRevision
			}
		}
		slices.SortStableFunc(s.Endpoints, func(a, b Endpoint) int {
			return cmp.Compare(created[a.Name], created[b.Name])
		})
		p.problem("hosts", fmt.Sprint(len(s.Endpoints), " endpoints"),
			fmt.Sprintf("a service may have %d endpoints; the %d newest are left out", p.MaxEndpoints, n),
			"remove endpoints or spread them over two services; this lists them: etcdctl get --keys-only --prefix "+shellKey(joinKey(p.raw, "hosts/")))
		s.Endpoints = slices.Clone(s.Endpoints[:p.MaxEndpoints])
	}
	if !slices.IsSortedFunc(s.Endpoints, endpointsByName) {
		slices.SortFunc(s.Endpoints, endpointsByName)
	}
}

func endpointsByName(a, b Endpoint) int { return strings.Compare(a.Name, b.Name) }

// applyMeta gives endpoints their weight, drain and zone. Meta keys may outlive
// their endpoint or come before it, so one without an endpoint is no problem.
func (p *parser) applyMeta() {
	for _, m := range p.metas {
		i, found := slices.BinarySearchFunc(p.svc.Endpoints, Endpoint{Name: m.endpoint}, endpointsByName)
		if found {
			e := &p.svc.Endpoints[i]
			e.Weight, e.Drain, e.Zone = m.weight, m.drain, m.zone
		}
	}
}

// fitScheme takes back what a service without a usable scheme, or with that
// scheme, cannot have.
func (p *parser) fitScheme() {
	s := p.svc
	switch {
	case s.Scheme == "":
		s.HostPort = 0
		hosts := func(k Key) bool { kind, _ := kindOf(k.Name); return kind == kindHost }
		scheme := func(k Key) bool { return k.Name == "scheme" }
		if slices.ContainsFunc(s.Keys, hosts) && !slices.ContainsFunc(s.Keys, scheme) {
			p.problem("scheme", "", "the key is missing; without it the service is not routed",
				"write http, tcp, https or http-and-https: "+p.put("scheme", kindScheme.example()))
		}
	case s.Scheme == TCP:
		o := &s.Options
		var misfits []string
		if o.TimeoutServer != 0 || o.TimeoutTunnel != 0 {
			misfits = append(misfits, "timeout_server and timeout_tunnel")
			o.TimeoutServer, o.TimeoutTunnel = 0, 0
		}
		if o.NoRetries {
			misfits = append(misfits, "retries")
			o.NoRetries = false
		}
		for _, f := range []struct {
			name string
			set  *bool
		}{{"h2c", &o.H2C}, {"sticky", &o.Sticky}, {"strip_path", &o.StripPath}} {
			if *f.set {
				misfits = append(misfits, f.name)
				*f.set = false
			}
		}
		if len(misfits) > 0 {
			p.problem("options", p.options, strings.Join(misfits, ", ")+" cannot be had with scheme tcp; the other fields are in force",
				"leave that out of the options, or change the scheme: "+p.put("scheme", "http"))
		}
	}
}

// claims returns what the service wants for itself and lists its domains.
func (p *parser) claims() []claim {
	s := p.svc
	if !s.Routable() {
		return nil
	}
	var all []claim
	if !s.Private {
		all = append(make([]claim, 0, len(p.domains)+2),
			claim{resource{kindScheme, strings.ToLower(p.raw)}, "", p.created})
		p.oldestDomains()
		for _, c := range p.domains {
			s.Domains = append(s.Domains, c.value)
		}
		all = append(all, p.domains...)
	}
	if s.HostPort != 0 {
		all = append(all, p.port)
	}
	return all
}

// oldestDomains sorts the domains and keeps one claim for each, the oldest.
func (p *parser) oldestDomains() {
	slices.SortStableFunc(p.domains, func(a, b claim) int {
		return cmp.Or(strings.Compare(a.value, b.value), cmp.Compare(a.created, b.created))
	})
	p.domains = slices.CompactFunc(p.domains, func(a, b claim) bool { return a.value == b.value })
	if n := len(p.domains) - maxDomains; n > 0 {
		p.problem("domains", fmt.Sprint(len(p.domains), " domains"),
			fmt.Sprintf("a service may have %d domains; the last %d are left out", maxDomains, n),
			"use a wildcard such as *.example.com, or delete domains; this lists them: etcdctl get --keys-only --prefix "+shellKey(joinKey(p.raw, "domains/")))
		p.domains = p.domains[:maxDomains]
	}
}

// sortProblems sorts problems by key and bounds their number.
func sortProblems(problems []Problem) []Problem {
	if len(problems) < 2 {
		return problems
	}
	slices.SortStableFunc(problems, func(a, b Problem) int { return strings.Compare(a.Key, b.Key) })
	if n := len(problems) - maxProblems; n > 0 {
		problems = slices.Clone(problems[:maxProblems])
		last := &problems[maxProblems-1]
		last.Reason = fmt.Sprintf("%s (and %d more problems of this service are not shown)", last.Reason, n)
	}
	return problems
}
