package dns

import (
	"strings"

	"github.com/miekg/dns"
)

// request is one question and what its answer has to give back.
type request struct {
	id         uint16
	rd, ad, cd bool
	edns, do   bool
	limit      int // largest answer that the asker takes, bytes
	question   dns.Question
}

// newRequest reads m, which has one question. opt is its OPT record, nil if it has
// none.
func newRequest(m *dns.Msg, opt *dns.OPT, tcp bool) *request {
	q := &request{
		id: m.Id, rd: m.RecursionDesired, ad: m.AuthenticatedData, cd: m.CheckingDisabled,
		limit: dns.MinMsgSize, question: m.Question[0],
	}
	if opt != nil {
		q.edns, q.do = true, opt.Do()
		q.limit = min(max(int(opt.UDPSize()), dns.MinMsgSize), maxUDPAnswer)
	}
	if tcp {
		q.limit = dns.MaxMsgSize
	}
	return q
}

// key returns what the cache and the questions in flight go by.
func (q *request) key() string {
	flags := byte('0')
	if q.do {
		flags |= 1
	}
	if q.cd {
		flags |= 2
	}
	return string([]byte{flags, byte(q.question.Qtype >> 8), byte(q.question.Qtype)}) + strings.ToLower(q.question.Name)
}

// reply returns an answer to q without records.
func (q *request) reply() *dns.Msg {
	r := &dns.Msg{Compress: true, Question: []dns.Question{q.question}}
	r.Id, r.Response, r.RecursionDesired, r.CheckingDisabled = q.id, true, q.rd, q.cd
	if q.edns {
		r.SetEdns0(maxUDPAnswer, q.do)
	}
	return r
}

// pack returns r on the wire: without its additional records if it is too long for
// the asker with them, and truncated if it is without them too. It returns nil if r
// cannot be put on the wire at all.
func (q *request) pack(r *dns.Msg) []byte {
	for {
		wire, err := r.Pack()
		if err == nil && len(wire) <= q.limit {
			return wire
		}
		opt := r.IsEdns0()
		rest := r.Extra[:0:0]
		if opt != nil {
			rest = append(rest, opt)
		}
		switch {
		case len(r.Extra) > len(rest):
			r.Extra = rest
		case len(r.Answer)+len(r.Ns) > 0:
			r.Answer, r.Ns, r.Truncated = nil, nil, true
		default:
			return nil
		}
	}
}
