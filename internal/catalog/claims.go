package catalog

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	"flotilla/internal/text"
)

// enterClaims brings a service's claims up to date and marks as dirty the
// services whose standing changes by it.
func (b *Builder) enterClaims(e *entry, dirty map[*entry]struct{}) {
	var want []claim
	if e.parsed != nil && !e.excess {
		want = e.parsed.claims
	}
	if !slices.Equal(e.claims, want) {
		for _, c := range e.claims {
			b.withdraw(e, c, dirty)
		}
		for _, c := range want {
			b.enter(e, c, dirty)
		}
	}
	e.claims = want
}

func holderOrder(x, y holder) int {
	return cmp.Or(cmp.Compare(x.created, y.created), strings.Compare(x.entry.name, y.entry.name))
}

func (b *Builder) withdraw(e *entry, c claim, dirty map[*entry]struct{}) {
	list := b.holders[c.resource]
	at, found := slices.BinarySearchFunc(list, holder{e, c.created}, holderOrder)
	if !found {
		return
	}
	list = slices.Delete(list, at, at+1)
	if len(list) == 0 {
		delete(b.holders, c.resource)
		return
	}
	b.holders[c.resource] = list
	if at == 0 {
		mark(list, dirty)
	}
}

func (b *Builder) enter(e *entry, c claim, dirty map[*entry]struct{}) {
	list := b.holders[c.resource]
	at, _ := slices.BinarySearchFunc(list, holder{e, c.created}, holderOrder)
	list = slices.Insert(list, at, holder{e, c.created})
	b.holders[c.resource] = list
	if at == 0 {
		mark(list, dirty)
	}
}

// mark makes all claimants dirty: the first has changed, and the others name it
// in their problems.
func mark(list []holder, dirty map[*entry]struct{}) {
	for _, h := range list {
		dirty[h.entry] = struct{}{}
	}
}

// resolve returns the service as it is after all claims: usually as it was parsed,
// else a copy without what other services hold.
func (b *Builder) resolve(e *entry) *Service {
	own := e.parsed.service
	if e.excess {
		s := *own
		s.Scheme, s.HostPort, s.Domains = "", 0, nil
		p := Problem{Key: Prefix + own.Name, Reason: fmt.Sprintf("there are more than %d services; the newest are left out", b.rules.MaxServices),
			Remedy: "remove services that nobody needs, or raise the limit in the nodes' policy; this lists them: flotilla services list"}
		s.Problems = sortProblems(append(slices.Clone(own.Problems), p))
		return &s
	}
	var s *Service
	for _, c := range e.claims {
		winner := b.holders[c.resource][0].entry
		if winner == e {
			continue
		}
		if s == nil {
			copied := *own
			s = &copied
			s.Problems = slices.Clone(own.Problems)
		}
		s.Problems = append(s.Problems, s.lose(c, winner.name))
	}
	if s == nil {
		return own
	}
	s.Problems = sortProblems(s.Problems)
	return s
}

// lose takes from s what winner holds and returns the problem that says so.
func (s *Service) lose(c claim, winner string) Problem {
	p := Problem{Key: joinKey(s.Name, text.Show(c.key)), Value: c.value}
	switch c.kind {
	case kindHostPort:
		s.HostPort = 0
		p.Reason = fmt.Sprintf("port %s belongs to the service %s, whose claim is older", c.value, winner)
		p.Remedy = fmt.Sprintf("write a port that no service uses (flotilla services list shows them): etcdctl put %s PORT", p.Key)
	case kindDomain:
		s.Domains = slices.DeleteFunc(slices.Clone(s.Domains), func(d string) bool { return d == c.value })
		p.Reason = fmt.Sprintf("the domain %s belongs to the service %s, whose claim is older", c.value, winner)
		p.Remedy = "write another domain, or take this one back: etcdctl del " + shellKey(joinKey(s.Name, c.key))
	default:
		s.Shadowed = true
		p.Key, p.Value = Prefix+s.Name, s.Name
		p.Reason = fmt.Sprintf("the name belongs to the service %s, which is older; host names do not tell the two apart", winner)
		p.Remedy = "register it under a name that differs in more than case, then: etcdctl del --prefix " + shellKey(joinKey(s.Name, "")+"/")
	}
	return p
}
