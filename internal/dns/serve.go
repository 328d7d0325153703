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
	in := make([]ipv4.Message, batch)
	for i := range in {
		in[i].Buffers = [][]byte{make([]byte, maxQuestion)}
	}
	out := make([]ipv4.Message, 0, batch)
	for {
		n, err := pc.ReadBatch(in, 0)
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			s.pause(ctx, "dns question not read", err)
			continue
		}
		now := time.Now()
		replies := out
		for i := range in[:n] {
			from := in[i].Addr
			reply, late := s.answer(in[i].Buffers[0][:in[i].N], false, now, t)
			switch {
			case late != nil:
				s.later(ctx, late, t, func(reply []byte) {
					if reply != nil {
						_, _ = c.WriteTo(reply, from)
					}
				})
			case reply != nil:
				replies = append(replies, ipv4.Message{Buffers: [][]byte{reply}, Addr: from})
			}
		}
		for len(replies) > 0 {
			n, err := pc.WriteBatch(replies, 0)
			if err != nil {
				n = 1 // this one cannot be sent, the others may
			}
			replies = replies[n:]
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
		if reply == nil {
			return
		}
		mu.Lock()
		defer mu.Unlock()
		_ = c.SetWriteDeadline(time.Now().Add(tcpIdle))
		_, _ = c.Write(append(binary.BigEndian.AppendUint16(make([]byte, 0, 2+len(reply)), uint16(len(reply))), reply...))
	}
	t := s.tallies[len(s.tallies)-1]
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
		reply, late := s.answer(msg, true, time.Now(), t)
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

// answer returns the reply to pkt. If that has to come from upstreams it returns
// the question instead, for later; if pkt deserves no answer it returns nothing.
func (s *Server) answer(pkt []byte, tcp bool, now time.Time, t *tally) (reply []byte, late *request) {
	const headerLen = 12
	if len(pkt) < headerLen || pkt[2]&0x80 != 0 {
		t.dropped.Add(1)
		return nil, nil
	}
	m := new(dns.Msg)
	err := m.Unpack(pkt)
	rcode, opt := judge(m, err)
	if rcode == dns.RcodeFormatError || rcode == dns.RcodeNotImplemented {
		t.errors.Add(1)
		id, opcodeAndRD := pkt[:2], pkt[2]&0x79
		return []byte{id[0], id[1], 0x80 | opcodeAndRD, byte(rcode), 0, 0, 0, 0, 0, 0, 0, 0}, nil
	}
	q := newRequest(m, opt, tcp)
	r := q.reply()
	r.RecursionAvailable = s.zone.recursive
	count := &t.local
	switch {
	case rcode != dns.RcodeSuccess:
		r.Rcode, count = rcode, &t.errors
	case s.zone.has(q.question.Name):
		s.zone.answer(r)
	case q.question.Qtype == dns.TypeANY:
		r.Answer = []dns.RR{minimalANY(q.question.Name)}
	case q.question.Qtype == dns.TypePTR && s.zone.point(r): // before what upstreams say about our addresses
	case !s.zone.recursive:
		r.Rcode, count = dns.RcodeRefused, &t.errors
	default:
		e, st := s.forward.cache.get(q.key(), now)
		switch st {
		case fresh:
			count = &t.cached
		case held:
			count = &t.stale
		default:
			return nil, q
		}
		r = e.reply(q, now)
	}
	if reply = q.pack(r); reply == nil {
		count = &t.dropped
	}
	count.Add(1)
	return reply, nil
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

// later gets the answer to q from upstreams and sends it; nil if it cannot be put on
// the wire. It returns at once.
func (s *Server) later(ctx context.Context, q *request, t *tally, send func(reply []byte)) {
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
		send(q.pack(e.reply(q, now)))
	}
	select {
	case s.slots <- struct{}{}:
	default:
		give(failure(time.Now()))
		return
	}
	s.running.Go(func() {
		defer func() { <-s.slots }()
		give(s.forward.resolve(ctx, q))
	})
}
