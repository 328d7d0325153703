package dns

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"net/netip"
	"sync"
	"syscall"
	"time"

	"github.com/miekg/dns"
	"golang.org/x/net/ipv4"
	"golang.org/x/sys/unix"
)

// sockets are all that a Server listens on.
type sockets struct {
	tcp   []*net.TCPListener
	udp   []*net.UDPConn // readersPerAddr for each address
	addrs []netip.AddrPort
}

// bind opens the sockets. TCP comes first: it is not shared, so that a second
// server on the same address is an error, not a thief of half the questions.
func bind(ctx context.Context, listen []netip.AddrPort) (*sockets, error) {
	s := &sockets{}
	for _, addr := range listen {
		err := s.add(ctx, addr)
		for i := 0; i < 10 && addr.Port() == 0 && errors.Is(err, syscall.EADDRINUSE); i++ {
			err = s.add(ctx, addr) // the port was free for TCP only
		}
		if err != nil {
			s.close()
			return nil, err
		}
	}
	return s, nil
}

func (s *sockets) add(ctx context.Context, addr netip.AddrPort) error {
	shared := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		var err error
		if cerr := c.Control(func(fd uintptr) {
			err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEPORT, 1)
		}); cerr != nil {
			return cerr
		}
		return err
	}}
	l, err := new(net.ListenConfig).Listen(ctx, "tcp", addr.String())
	if err != nil {
		return err
	}
	bound := l.Addr().(*net.TCPAddr).AddrPort()
	opened := &sockets{tcp: []*net.TCPListener{l.(*net.TCPListener)}}
	for range readersPerAddr {
		c, err := shared.ListenPacket(ctx, "udp", bound.String())
		if err != nil {
			opened.close()
			return err
		}
		udp := c.(*net.UDPConn)
		opened.udp = append(opened.udp, udp)
		_ = udp.SetReadBuffer(1 << 20) // for bursts; the kernel gives what it allows
	}
	s.tcp = append(s.tcp, opened.tcp...)
	s.udp = append(s.udp, opened.udp...)
	s.addrs = append(s.addrs, netip.AddrPortFrom(bound.Addr().Unmap(), bound.Port()))
	return nil
}

func (s *sockets) close() {
	for _, l := range s.tcp {
		_ = l.Close()
	}
	for _, c := range s.udp {
		_ = c.Close()
	}
}

// serveUDP answers what arrives at c, many messages per system call.
func (s *Server) serveUDP(ctx context.Context, c *net.UDPConn, t *tally) error {
	const batch = 32
	const maxQuestion = 4096    // longer ones are cut off and so malformed
	pc := ipv4.NewPacketConn(c) // reads and writes IPv6 as well
	var in, out [batch]ipv4.Message
	var buf [batch][]byte
	for i := range in {
		in[i].Buffers = [][]byte{make([]byte, maxQuestion)}
		out[i].Buffers = make([][]byte, 1)
		buf[i] = make([]byte, 0, maxUDPAnswer)
	}
	var q query
	for {
		n, err := pc.ReadBatch(in[:], 0)
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			s.pause(ctx, "dns question not read", err)
			continue
		}
		now := time.Now()
		replies := 0
		for i := range in[:n] {
			from := in[i].Addr
			reply, late := s.answer(&q, in[i].Buffers[0][:in[i].N], buf[i][:0], false, now, t)
			switch {
			case late != nil:
				s.later(ctx, late, t, func(reply []byte) { _, _ = c.WriteTo(reply, from) })
			case reply != nil:
				out[replies].Buffers[0], out[replies].Addr = reply, from
				replies++
			}
		}
		for sent := 0; sent < replies; {
			n, err := pc.WriteBatch(out[sent:replies], 0)
			if err != nil {
				n = 1 // this one cannot be sent, the others may
			}
			sent += n
		}
	}
}

// serveTCP answers the connections that l accepts.
func (s *Server) serveTCP(ctx context.Context, l *net.TCPListener) error {
	for {
		c, err := l.Accept()
		if ctx.Err() != nil {
			if err == nil {
				_ = c.Close()
			}
			return nil
		}
		if err != nil {
			s.pause(ctx, "dns connection not accepted", err)
			continue
		}
		select {
		case s.conns <- struct{}{}:
		default:
			_ = c.Close()
			continue
		}
		s.running.Go(func() {
			defer func() { <-s.conns }()
			s.serveConn(ctx, c)
		})
	}
}

// pause lets a shortage (of descriptors or memory) pass, which is no reason to
// stop serving.
func (s *Server) pause(ctx context.Context, what string, err error) {
	s.log.Warn(what, "err", err)
	select {
	case <-time.After(100 * time.Millisecond):
	case <-ctx.Done():
	}
}

// serveConn answers the questions of one connection, in any order, until it is
// idle for tcpIdle.
func (s *Server) serveConn(ctx context.Context, c net.Conn) {
	defer func() { _ = c.Close() }()
	defer context.AfterFunc(ctx, func() { _ = c.Close() })()
	var waiting sync.WaitGroup
	defer waiting.Wait()
	var mu sync.Mutex // guards writing
	write := func(reply []byte) {
		mu.Lock()
		defer mu.Unlock()
		_ = c.SetWriteDeadline(time.Now().Add(tcpIdle))
		_, _ = c.Write(append(binary.BigEndian.AppendUint16(make([]byte, 0, 2+len(reply)), uint16(len(reply))), reply...))
	}
	t := s.tallies[len(s.tallies)-1]
	var q query
	buf := make([]byte, dns.MaxMsgSize)
	for ctx.Err() == nil {
		_ = c.SetReadDeadline(time.Now().Add(tcpIdle))
		if _, err := io.ReadFull(c, buf[:2]); err != nil {
			return
		}
		msg := buf[:binary.BigEndian.Uint16(buf)]
		if _, err := io.ReadFull(c, msg); err != nil {
			return
		}
		reply, late := s.answer(&q, msg, nil, true, time.Now(), t)
		switch {
		case late != nil:
			waiting.Add(1)
			s.later(ctx, late, t, func(reply []byte) {
				defer waiting.Done()
				write(reply)
			})
		case reply != nil:
			write(reply)
		default:
			return // not DNS at all
		}
	}
}

// answer appends the reply to pkt to out. If the reply has to come from
// upstreams it returns the question instead, for later; if pkt deserves no
// answer it returns nothing. q is room to work in.
func (s *Server) answer(q *query, pkt, out []byte, tcp bool, now time.Time, t *tally) (reply []byte, late *query) {
	if q.parse(pkt, tcp) {
		if reply := s.zone.fast(out, q); reply != nil {
			t.local.Add(1)
			return reply, nil
		}
		// Addresses of endpoints come before what upstreams say about them.
		if q.qtype != dns.TypePTR {
			if reply := s.cached(q, out, now, t); reply != nil {
				return reply, nil
			}
		}
	}
	return s.slow(q, pkt, out, tcp, now, t)
}

// cached appends the answer to q if it can be given without asking upstreams.
func (s *Server) cached(q *query, out []byte, now time.Time, t *tally) []byte {
	e, st := s.forward.cache.get(q.key(), now)
	switch st {
	case fresh:
		t.cached.Add(1)
	case held:
		t.stale.Add(1)
	default:
		return nil
	}
	return e.reply(out, q, now)
}

// slow does what answer does, for any packet.
func (s *Server) slow(q *query, pkt, out []byte, tcp bool, now time.Time, t *tally) (reply []byte, late *query) {
	if len(pkt) < headerLen || pkt[2]&0x80 != 0 {
		t.dropped.Add(1)
		return nil, nil
	}
	m := new(dns.Msg)
	err := m.Unpack(pkt)
	rcode, opt := judge(m, err)
	r := new(dns.Msg)
	if rcode == dns.RcodeFormatError || rcode == dns.RcodeNotImplemented {
		t.errors.Add(1)
		out = append(out, pkt[0], pkt[1], 0x80|pkt[2]&0x79, byte(rcode)) // id, opcode and RD as sent
		return append(out, 0, 0, 0, 0, 0, 0, 0, 0), nil
	}
	r.SetReply(m)
	r.Compress = true
	r.RecursionAvailable = s.zone.recursive
	q.setHeader(m.Id, binary.BigEndian.Uint16(pkt[2:]))
	q.setEDNS(false, false, 0, tcp)
	if opt != nil {
		q.setEDNS(true, opt.Do(), int(opt.UDPSize()), tcp)
		r.SetEdns0(maxUDPAnswer, opt.Do())
	}
	question := m.Question[0]
	switch {
	case rcode != dns.RcodeSuccess:
		r.Rcode = rcode
	case s.zone.has(question.Name):
		s.zone.answer(r)
		t.local.Add(1)
		return s.pack(r, q, out, t), nil
	case question.Qtype == dns.TypeANY:
		r.Answer = []dns.RR{minimalANY(question.Name)}
		t.local.Add(1)
		return s.pack(r, q, out, t), nil
	case question.Qtype == dns.TypePTR:
		if r.Answer = s.zone.pointers(question.Name); r.Answer != nil {
			r.Authoritative = true
			t.local.Add(1)
			return s.pack(r, q, out, t), nil
		}
		fallthrough
	default:
		if !s.zone.recursive {
			r.Rcode = dns.RcodeRefused
			break
		}
		var wire [maxName + 4]byte
		n, err := dns.PackDomainName(question.Name, wire[:], 0, nil, false)
		if err != nil {
			r.Rcode = dns.RcodeFormatError
			break
		}
		binary.BigEndian.PutUint16(wire[n:], question.Qtype)
		binary.BigEndian.PutUint16(wire[n+2:], dns.ClassINET)
		q.setQuestion(wire[:n+4])
		if reply := s.cached(q, out, now, t); reply != nil {
			return reply, nil
		}
		return nil, q.clone()
	}
	t.errors.Add(1)
	return s.pack(r, q, out, t), nil
}

// judge returns how a message that may have failed to unpack is answered
// whatever it asks: RcodeSuccess if on its merits. It returns the message's OPT
// record too.
func judge(m *dns.Msg, err error) (int, *dns.OPT) {
	if m.Opcode != dns.OpcodeQuery {
		return dns.RcodeNotImplemented, nil
	}
	if err != nil || len(m.Question) != 1 {
		return dns.RcodeFormatError, nil
	}
	var opt *dns.OPT
	for _, rr := range m.Extra {
		if o, ok := rr.(*dns.OPT); ok {
			if opt != nil {
				return dns.RcodeFormatError, nil
			}
			opt = o
		}
	}
	if opt != nil && opt.Version() != 0 {
		return dns.RcodeBadVers, opt
	}
	q := m.Question[0]
	meta := q.Qtype == 0 || q.Qtype == dns.TypeOPT || q.Qtype >= 128 && q.Qtype < dns.TypeANY
	if q.Qclass != dns.ClassINET || meta {
		return dns.RcodeRefused, opt // zone transfers among others
	}
	return dns.RcodeSuccess, opt
}

// pack appends r to out, without its additional records if it is too long for
// the asker with them, and truncated if it is without them too.
func (s *Server) pack(r *dns.Msg, q *query, out []byte, t *tally) []byte {
	for {
		wire, err := r.Pack()
		if err == nil && len(wire) <= q.limit {
			return append(out, wire...)
		}
		opt := r.IsEdns0()
		short := 0
		if opt != nil {
			short = 1
		}
		switch {
		case len(r.Extra) > short:
			r.Extra = nil
			if opt != nil {
				r.Extra = []dns.RR{opt}
			}
		case len(r.Answer)+len(r.Ns) > 0:
			r.Answer, r.Ns, r.Truncated = nil, nil, true
		default:
			t.dropped.Add(1)
			return nil
		}
	}
}

// later gets the answer to q from upstreams and sends it. It returns at once.
func (s *Server) later(ctx context.Context, q *query, t *tally, send func(reply []byte)) {
	give := func(e *entry) {
		now := time.Now()
		switch {
		case e.failed:
			t.errors.Add(1)
		case e.life > 0 && !now.Before(e.expires()):
			t.stale.Add(1)
		default:
			t.forwarded.Add(1)
		}
		send(e.reply(nil, q, now))
	}
	select {
	case s.slots <- struct{}{}:
	default:
		give(failure(q, time.Now()))
		return
	}
	s.running.Go(func() {
		defer func() { <-s.slots }()
		give(s.forward.resolve(ctx, q))
	})
}
