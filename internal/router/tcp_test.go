package router

import (
	"bufio"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"
)

// tcpEndpoint answers every line with its name and the line.
func tcpEndpoint(t *testing.T, name string) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	echoLines(t, l, name)
	return l.Addr().String()
}

// echoLines serves a listener until the test's end.
func echoLines(t *testing.T, l net.Listener, name string) {
	t.Cleanup(func() { _ = l.Close() })
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer func() { _ = conn.Close() }()
				in := bufio.NewScanner(conn)
				for in.Scan() {
					if _, err := fmt.Fprintf(conn, "%s %s\n", name, in.Text()); err != nil {
						return
					}
				}
			}()
		}
	}()
}

// exchangeLine sends a line and returns the one that comes back, or the error.
func exchangeLine(t *testing.T, conn net.Conn, line string) string {
	t.Helper()
	if err := conn.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(conn, line+"\n"); err != nil {
		return err.Error()
	}
	// One byte at a time: nothing of a later line may stay in a buffer.
	var got strings.Builder
	for b := make([]byte, 1); ; got.Write(b) {
		if _, err := conn.Read(b); err != nil {
			return err.Error()
		}
		if b[0] == '\n' {
			return got.String()
		}
	}
}

// tcpAnswer is the name of the endpoint behind a port, or "closed".
func (b *bed) tcpAnswer(port int) string {
	b.t.Helper()
	conn, err := net.DialTimeout("tcp", netip.AddrPortFrom(b.cfg.Address, uint16(port)).String(), 5*time.Second)
	if err != nil {
		return "closed"
	}
	defer func() { _ = conn.Close() }()
	name, ok := strings.CutSuffix(exchangeLine(b.t, conn, "?"), " ?")
	if !ok {
		return "closed"
	}
	return name
}

func TestHostPorts(t *testing.T) {
	t.Parallel()
	eachHAProxy(t, func(t *testing.T, binary string) {
		t.Parallel()
		b := newBed(t, testConfig(t, binary))
		b.put("first/scheme http", "first/hosts/1 "+endpoint(t, "first"))
		b.wait()
		// Several at once, and some more while the reload waits: one reload.
		b.put("a/scheme tcp", "a/host_port 7001", "a/hosts/1 "+tcpEndpoint(t, "a1"), "b/scheme tcp", "b/host_port 7002", "b/hosts/1 "+tcpEndpoint(t, "b1"))
		b.put("c/scheme http", "c/host_port 7003", "c/hosts/1 "+endpoint(t, "c1"), "c/private 1")
		b.put("d/scheme http-and-https", "d/host_port 7004", "d/hosts/1 "+endpoint(t, "d1"))
		b.wait()
		if s := b.router.Status(); s.Reloads != 1 {
			t.Errorf("%d reloads for four ports, want 1: %s", s.Reloads, s.LastReload)
		}
		for port, want := range map[int]string{7001: "a1", 7002: "b1"} {
			if got := b.tcpAnswer(port); got != want {
				t.Errorf("port %d: %s, want %s", port, got, want)
			}
		}
		for port, want := range map[int]string{7003: "c1", 7004: "d1"} {
			if got := b.answer(port, "what.ever", "/x"); got != want {
				t.Errorf("port %d: %s, want %s", port, got, want)
			}
		}
		if got := b.answer(8080, "c.example", "/"); got != "404" {
			t.Errorf("the private service on the public port: %s", got)
		}
		b.put("-b/host_port", "e/scheme tcp", "e/host_port 7005", "-d/host_port", "d/host_port 7002")
		b.wait()
		for port, want := range map[int]string{7001: "a1", 7005: "closed"} {
			if got := b.tcpAnswer(port); got != want {
				t.Errorf("port %d: %s, want %s", port, got, want)
			}
		}
		// From TCP to HTTP.
		if got := b.answer(7002, "what.ever", "/"); got != "d1" {
			t.Errorf("port 7002: %s, want d1", got)
		}
		// A port that went and came back must outlive later reloads.
		b.put("-a/host_port")
		b.wait()
		if got := b.tcpAnswer(7001); got != "closed" {
			t.Errorf("port 7001 without a service: %s", got)
		}
		b.put("a/host_port 7001")
		b.wait()
		if got := b.tcpAnswer(7001); got != "a1" {
			t.Errorf("port 7001 again: %s, want a1", got)
		}
		b.put("f/scheme tcp", "f/host_port 7006", "f/hosts/1 "+tcpEndpoint(t, "f1"))
		b.wait()
		for port, want := range map[int]string{7001: "a1", 7006: "f1"} {
			if got := b.tcpAnswer(port); got != want {
				t.Errorf("port %d after another reload: %s, want %s", port, got, want)
			}
		}
		if s := b.router.Status(); len(s.Problems) > 0 || s.Reloads != 3 {
			t.Errorf("%d reloads, want 3; problems: %v", s.Reloads, s.Problems)
		}
	})
}

// TestHostPortsAtStart checks that what is known at the start costs no reload.
func TestHostPortsAtStart(t *testing.T) {
	t.Parallel()
	eachHAProxy(t, func(t *testing.T, binary string) {
		t.Parallel()
		b := newBed(t, testConfig(t, binary))
		b.put("a/scheme tcp", "a/host_port 7001", "a/hosts/1 "+tcpEndpoint(t, "a1"), "b/scheme http", "b/host_port 7002", "b/hosts/1 "+endpoint(t, "b1"))
		b.wait()
		if got := b.tcpAnswer(7001) + b.answer(7002, "x", "/"); got != "a1b1" {
			t.Errorf("answers: %s", got)
		}
		if s := b.router.Status(); s.Reloads != 0 {
			t.Errorf("%d reloads: %s", s.Reloads, s.LastReload)
		}
	})
}

func TestLongConnectionsSurvive(t *testing.T) {
	t.Parallel()
	eachHAProxy(t, func(t *testing.T, binary string) {
		t.Parallel()
		b := newBed(t, testConfig(t, binary))
		b.put("a/scheme tcp", "a/host_port 7001", "a/hosts/1 "+tcpEndpoint(t, "a1"), "web/scheme http", "web/hosts/1 "+endpoint(t, "w1"))
		b.wait()
		conn := b.dial(7001)
		n := 0
		alive := func(when string) {
			t.Helper()
			n++
			if got, want := exchangeLine(t, conn, fmt.Sprint(n)), fmt.Sprint("a1 ", n); got != want {
				t.Fatalf("%s: got %q, want %q", when, got, want)
			}
		}
		alive("at first")
		step := func(when string, keys ...string) {
			t.Helper()
			b.put(keys...)
			b.wait()
			alive(when)
		}
		step("an endpoint was added", "a/hosts/2 "+tcpEndpoint(t, "a2"), "a/hosts/3 "+tcpEndpoint(t, "a3"))
		step("another endpoint drains", `a/meta/2 {"drain": true}`, `a/meta/3 {"weight": 7}`)
		step("another endpoint was removed", "-a/hosts/2")
		step("another endpoint was replaced", "-a/hosts/3", "a/hosts/4 "+tcpEndpoint(t, "a4"))
		step("a service was added", "new/scheme http", "new/hosts/1 "+endpoint(t, "new"))
		step("a port was added, with a reload", "b/scheme tcp", "b/host_port 7002", "b/hosts/1 "+tcpEndpoint(t, "b1"))
		step("endpoints changed after a reload", "-a/hosts/4", "a/hosts/5 "+tcpEndpoint(t, "a5"), "-web/hosts/1")
		step("its endpoint drains", `a/meta/1 {"drain": true}`)
		step("its endpoint was removed", "-a/hosts/1")
		if s := b.router.Status(); s.Reloads != 1 {
			t.Errorf("%d reloads, want 1: %s", s.Reloads, s.LastReload)
		}
		if got := b.tcpAnswer(7001); got != "a5" {
			t.Errorf("a new connection reaches %s", got)
		}
		// A connection of the worker that serves now, whose server is given to
		// another endpoint.
		late := b.dial(7001)
		if got := exchangeLine(t, late, "x"); got != "a5 x" {
			t.Fatal(got)
		}
		b.put("a/hosts/6 "+tcpEndpoint(t, "a6"), "-a/hosts/5")
		b.wait()
		b.put("a/hosts/7 " + tcpEndpoint(t, "a7"))
		b.wait()
		if got := exchangeLine(t, late, "y"); got != "a5 y" {
			t.Errorf("after its server went to another endpoint: %s", got)
		}
		alive("at last")
	})
}

func TestPortOfAnotherProgram(t *testing.T) {
	t.Parallel()
	eachHAProxy(t, func(t *testing.T, binary string) {
		t.Parallel()
		b := newBed(t, testConfig(t, binary))
		l, err := net.Listen("tcp", netip.AddrPortFrom(b.cfg.Address, 7001).String())
		if err != nil {
			t.Fatal(err)
		}
		echoLines(t, l, "stranger")
		b.put("a/scheme tcp", "a/host_port 7001", "a/hosts/1 "+tcpEndpoint(t, "a1"), "b/scheme tcp", "b/host_port 7002", "b/hosts/1 "+tcpEndpoint(t, "b1"))
		b.wait()
		if got := b.tcpAnswer(7001) + b.tcpAnswer(7002); got != "strangerb1" {
			t.Errorf("answers: %s", got)
		}
		p := b.router.Status().Problems
		if len(p) != 1 || p[0].Key != "/services/a/host_port" || p[0].Value != "7001" || !strings.Contains(p[0].Reason, "another program") || !strings.Contains(p[0].Remedy, "ss -ltnp") {
			t.Errorf("problems: %+v", p)
		}
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
		b.hurryChecks()
		eventually(t, func() string {
			if got := b.tcpAnswer(7001); got != "a1" {
				return "the port was freed, but answers " + got
			}
			return ""
		})
		eventually(t, func() string {
			if p := b.router.Status().Problems; len(p) > 0 {
				return fmt.Sprintf("problems stay: %v", p)
			}
			return ""
		})
	})
}

func TestPassthroughByServerName(t *testing.T) {
	t.Parallel()
	eachHAProxy(t, func(t *testing.T, binary string) {
		t.Parallel()
		b := newBed(t, testConfig(t, binary))
		secure := func(name string) string {
			chain, key := certFor(t, 0, name+".own")
			cert, err := tls.X509KeyPair(chain, key)
			if err != nil {
				t.Fatal(err)
			}
			l, err := tls.Listen("tcp", "127.0.0.1:0", &tls.Config{Certificates: []tls.Certificate{cert}, NextProtos: []string{"lines"}})
			if err != nil {
				t.Fatal(err)
			}
			echoLines(t, l, name)
			return l.Addr().String()
		}
		b.put("one/scheme tcp", "one/hosts/1 "+secure("one"), "Two/scheme tcp", "Two/hosts/1 "+secure("two"),
			"hidden/scheme tcp", "hidden/private 1", "hidden/hosts/1 "+secure("hidden"), "web/scheme http", "web/hosts/1 "+secure("web"))
		b.wait()
		for serverName, want := range map[string]string{
			"one.any.domain": "one", "ONE.x": "one", "two.x": "two", "one": "one",
			"ghost.any.domain": "", "hidden.x": "", "web.x": "", "": "",
		} {
			conn := overTLS(b.dial(b.cfg.SNIPort), serverName, "lines")
			got := exchangeLine(t, conn, "x")
			switch {
			case want == "" && strings.HasSuffix(got, " x"):
				t.Errorf("server name %q reaches %s", serverName, got)
			case want != "" && got != want+" x":
				t.Errorf("server name %q: %s, want %s", serverName, got, want)
			case want != "" && conn.ConnectionState().PeerCertificates[0].DNSNames[0] != want+".own":
				t.Errorf("server name %q: certificate of %v", serverName, conn.ConnectionState().PeerCertificates[0].DNSNames)
			}
			_ = conn.Close()
		}
		began := time.Now()
		plain := b.dial(b.cfg.SNIPort)
		if got := exchangeLine(t, plain, "GET / HTTP/1.1\r\nHost: one.x\r\n\r"); !strings.Contains(got, "EOF") && !strings.Contains(got, "reset") {
			t.Errorf("a client without TLS got %q", got)
		}
		if took := time.Since(began); took > time.Second {
			t.Errorf("a client without TLS was closed after %s", took)
		}
		silent := b.dial(b.cfg.SNIPort)
		if err := silent.SetReadDeadline(time.Now().Add(10 * time.Second)); err != nil {
			t.Fatal(err)
		}
		if _, err := silent.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("a silent client: %v", err)
		}
	})
}

// hurryChecks lets the next tick look for changed ports and certificates.
func (b *bed) hurryChecks() {
	done := make(chan bool)
	b.router.requests <- func() {
		b.router.ports.next, b.router.certs.next = time.Time{}, time.Time{}
		close(done)
	}
	<-done
}
