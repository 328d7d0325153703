package dns

import (
	"encoding/binary"

	"github.com/miekg/dns"
)

// Header bits, in the second 16 bits of a message.
const (
	bitQR = 1 << 15
	bitAA = 1 << 10
	bitTC = 1 << 9
	bitRD = 1 << 8
	bitRA = 1 << 7
	bitAD = 1 << 5
	bitCD = 1 << 4
)

const (
	headerLen = 12
	optLen    = 11  // an OPT record without options
	maxName   = 255 // a name in wire form
)

// query is one question of class IN and what its answer has to give back.
type query struct {
	id         uint16
	rd, ad, cd bool
	edns, do   bool
	limit      int    // largest answer that the asker takes, bytes
	question   []byte // name, type and class as asked; shared with the packet

	qtype   uint16
	nameLen int                // of the name in wire form, with the root's zero
	labels  int                // in the name, without the root
	start   [maxName / 2]uint8 // where each label starts in the name
	lower   [maxName + 3]byte  // the name in lower case, then room for the rest of the cache key
}

// parse reads pkt if it has the common shape: a query with one question of
// class IN, not compressed, and at most an OPT record without options. It
// reports false for everything else, which may be valid too.
func (q *query) parse(pkt []byte, tcp bool) bool {
	if len(pkt) < headerLen {
		return false
	}
	bits := binary.BigEndian.Uint16(pkt[2:])
	additional := binary.BigEndian.Uint16(pkt[10:])
	if bits&^(bitRD|bitAD|bitCD) != 0 || additional > 1 ||
		binary.BigEndian.Uint16(pkt[4:]) != 1 || pkt[6]|pkt[7]|pkt[8]|pkt[9] != 0 {
		return false
	}
	if !q.setQuestion(pkt[headerLen:]) {
		return false
	}
	rest := pkt[headerLen+len(q.question):]
	size, do := 0, false
	if additional == 1 {
		// Root name, type OPT, version 0, no options.
		if len(rest) != optLen || rest[0] != 0 || rest[1] != 0 || rest[2] != byte(dns.TypeOPT) ||
			rest[5]|rest[6]|rest[9]|rest[10] != 0 {
			return false
		}
		size, do = int(binary.BigEndian.Uint16(rest[3:])), rest[7]&0x80 != 0
	} else if len(rest) != 0 {
		return false
	}
	q.setHeader(binary.BigEndian.Uint16(pkt), bits)
	q.setEDNS(additional == 1, do, size, tcp)
	return true
}

func (q *query) setHeader(id, bits uint16) {
	q.id, q.rd, q.ad, q.cd = id, bits&bitRD != 0, bits&bitAD != 0, bits&bitCD != 0
}

func (q *query) setEDNS(edns, do bool, size int, tcp bool) {
	q.edns, q.do = edns, do
	q.limit = min(max(size, dns.MinMsgSize), maxUDPAnswer)
	if tcp {
		q.limit = dns.MaxMsgSize
	}
}

// setQuestion reads name, type and class from the front of wire. It reports
// false unless the name is whole, uncompressed and of class IN.
func (q *query) setQuestion(wire []byte) bool {
	off := 0
	for q.labels = 0; ; q.labels++ {
		if off >= len(wire) || off >= maxName {
			return false
		}
		n := int(wire[off])
		q.lower[off] = wire[off]
		if n == 0 {
			break
		}
		if n > 63 || off+1+n >= len(wire) || off+1+n >= maxName {
			return false
		}
		q.start[q.labels] = uint8(off)
		for i := off + 1; i <= off+n; i++ {
			c := wire[i]
			if c-'A' < 26 {
				c += 'a' - 'A'
			}
			q.lower[i] = c
		}
		off += n + 1
	}
	q.nameLen = off + 1
	if len(wire) < q.nameLen+4 || binary.BigEndian.Uint16(wire[q.nameLen+2:]) != dns.ClassINET {
		return false
	}
	q.qtype = binary.BigEndian.Uint16(wire[q.nameLen:])
	q.question = wire[:q.nameLen+4]
	return true
}

// key returns what the cache and the questions in flight go by. It is valid
// until q is set again.
func (q *query) key() []byte {
	var flags byte
	if q.do {
		flags |= 1
	}
	if q.cd {
		flags |= 2
	}
	binary.BigEndian.PutUint16(q.lower[q.nameLen:], q.qtype)
	q.lower[q.nameLen+2] = flags
	return q.lower[:q.nameLen+3]
}

// clone returns a copy of q that does not share the packet.
func (q *query) clone() *query {
	c := *q
	c.question = append([]byte(nil), q.question...)
	return &c
}

// header appends the header of an answer to q and its question to out. bits are
// those that q does not determine.
func (q *query) header(out []byte, bits uint16, answers, authority, additional int) []byte {
	bits |= bitQR
	if q.rd {
		bits |= bitRD
	}
	if q.cd {
		bits |= bitCD
	}
	out = binary.BigEndian.AppendUint16(out, q.id)
	out = binary.BigEndian.AppendUint16(out, bits)
	out = append(out, 0, 1)
	out = binary.BigEndian.AppendUint16(out, uint16(answers))
	out = binary.BigEndian.AppendUint16(out, uint16(authority))
	out = binary.BigEndian.AppendUint16(out, uint16(additional))
	return append(out, q.question...)
}

// opt appends an OPT record if q had one.
func (q *query) opt(out []byte) []byte {
	if !q.edns {
		return out
	}
	var do byte
	if q.do {
		do = 0x80
	}
	return append(out, 0, 0, byte(dns.TypeOPT), maxUDPAnswer>>8, maxUDPAnswer&0xff, 0, 0, do, 0, 0, 0)
}

// opts is the number of OPT records in an answer to q.
func (q *query) opts() int {
	if q.edns {
		return 1
	}
	return 0
}

// truncated appends an answer without records that sends the asker to TCP.
func (q *query) truncated(out []byte, bits uint16) []byte {
	return q.opt(q.header(out, bits|bitTC, 0, 0, q.opts()))
}
