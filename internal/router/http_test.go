package router

import (
	"bufio"
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// caller is an HTTP client with an address of its own that knows its way to one
// port of the router, whatever the URL's host.
func (b *bed) caller(port int, from string) *http.Client {
	d := net.Dialer{}
	if from != "" {
		d.LocalAddr = &net.TCPAddr{IP: net.ParseIP(from)}
	}
	to := netip.AddrPortFrom(b.cfg.Address, uint16(port)).String()
	return &http.Client{
		Timeout: 30 * time.Second,
		Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return d.DialContext(ctx, "tcp", to)
		}},
	}
}

// send makes one request; an error of the connection is status 0.
func send(t *testing.T, c *http.Client, method, url, body string, header ...string) (int, string, http.Header) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), method, url, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	for _, h := range header {
		k, v, _ := strings.Cut(h, ": ")
		req.Header.Add(k, v)
	}
	resp, err := c.Do(req)
	if err != nil {
		return 0, err.Error(), nil
	}
	defer func() { _ = resp.Body.Close() }()
	return resp.StatusCode, readAll(resp), resp.Header
}

// serve starts an HTTP endpoint of the given behaviour.
func serve(t *testing.T, handler http.HandlerFunc) string {
	t.Helper()
	s := httptest.NewServer(handler)
	t.Cleanup(func() { s.CloseClientConnections(); s.Close() })
	return s.Listener.Addr().String()
}

// shown returns the value of a header line in an endpoint's answer.
func shown(body, header string) string {
	for line := range strings.SplitSeq(body, "\n") {
		if v, ok := strings.CutPrefix(line, header+": "); ok {
			return v
		}
	}
	return ""
}

func TestForwardedHeaders(t *testing.T) {
	t.Parallel()
	eachHAProxy(t, func(t *testing.T, binary string) {
		t.Parallel()
		cfg := testConfig(t, binary)
		cfg.TrustedProxies = []netip.Prefix{netip.MustParsePrefix("127.9.0.0/16")}
		b := newBed(t, cfg)
		b.put("web/scheme http-and-https", "web/hosts/1 "+endpoint(t, "web"), "web/host_port 7001")
		b.wait()
		claims := []string{
			"X-Forwarded-For: 192.0.2.1", "X-Forwarded-Proto: gopher", "X-Forwarded-Port: 70", "X-Forwarded-Host: evil",
			"X-Forwarded-Anything: x", "Forwarded: for=192.0.2.1",
		}
		for _, c := range []struct {
			from   string
			port   int
			header []string
			want   map[string]string
		}{
			{"127.8.0.1", 8080, nil, map[string]string{"x-forwarded-for": "127.8.0.1", "x-forwarded-proto": "http", "x-forwarded-port": "8080"}},
			{"127.8.0.1", 8080, claims, map[string]string{
				"x-forwarded-for": "127.8.0.1", "x-forwarded-proto": "http", "x-forwarded-port": "8080",
				"x-forwarded-host": "", "x-forwarded-anything": "", "forwarded": "",
			}},
			{"127.9.0.1", 8080, nil, map[string]string{"x-forwarded-for": "127.9.0.1", "x-forwarded-proto": "http", "x-forwarded-port": "8080"}},
			{"127.9.0.1", 8080, claims, map[string]string{
				"x-forwarded-for": "192.0.2.1, 127.9.0.1", "x-forwarded-proto": "gopher", "x-forwarded-port": "70",
				"x-forwarded-host": "evil", "x-forwarded-anything": "x", "forwarded": "for=192.0.2.1",
			}},
			{"127.8.0.1", 7001, claims, map[string]string{
				"x-forwarded-for": "127.8.0.1", "x-forwarded-proto": "http", "x-forwarded-port": "7001", "forwarded": "",
			}},
		} {
			status, body, _ := send(t, b.caller(c.port, c.from), "GET", "http://web.example/", "", c.header...)
			for h, want := range c.want {
				if got := shown(body, h); status != 200 || got != want {
					t.Errorf("from %s to %d with %d claims: status %d, %s: %q, want %q", c.from, c.port, len(c.header), status, h, got, want)
				}
			}
		}
		tlsConn := b.dialTLS("web.example", "http/1.1")
		body := exchange(t, tlsConn, "GET / HTTP/1.1\r\nHost: web.example\r\nX-Forwarded-Proto: http\r\nConnection: close\r\n\r\n")
		if shown(body, "x-forwarded-proto") != "https" || shown(body, "x-forwarded-port") != "8443" {
			t.Errorf("over TLS: %s", body)
		}
	})
}

// exchange writes a request to a connection and reads to its end, without
// carriage returns.
func exchange(t *testing.T, conn net.Conn, request string) string {
	t.Helper()
	defer func() { _ = conn.Close() }()
	if err := conn.SetDeadline(time.Now().Add(20 * time.Second)); err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(conn, request); err != nil {
		t.Fatal(err)
	}
	text, err := io.ReadAll(conn)
	if err != nil {
		return fmt.Sprintf("%s\n(%v)", text, err)
	}
	return strings.ReplaceAll(string(text), "\r", "")
}

func (b *bed) dial(port int) net.Conn {
	b.t.Helper()
	conn, err := net.DialTimeout("tcp", netip.AddrPortFrom(b.cfg.Address, uint16(port)).String(), 5*time.Second)
	if err != nil {
		b.t.Fatal(err)
	}
	b.t.Cleanup(func() { _ = conn.Close() })
	return conn
}

const proxyMagic = "\r\n\r\n\x00\r\nQUIT\n"

// proxyV2 is the binary PROXY header for a TCP connection over IPv4.
func proxyV2(src, dst netip.AddrPort) string {
	h := []byte(proxyMagic + "\x21\x11\x00\x0c")
	s, d := src.Addr().As4(), dst.Addr().As4()
	h = append(append(h, s[:]...), d[:]...)
	h = binary.BigEndian.AppendUint16(h, src.Port())
	return string(binary.BigEndian.AppendUint16(h, dst.Port()))
}

func TestProxyProtocolIn(t *testing.T) {
	t.Parallel()
	eachHAProxy(t, func(t *testing.T, binary string) {
		t.Parallel()
		cfg := testConfig(t, binary)
		cfg.AcceptProxy = true
		b := newBed(t, cfg)
		b.put("web/scheme http-and-https", "web/hosts/1 "+endpoint(t, "web"))
		b.wait()
		const request = "GET / HTTP/1.1\r\nHost: web.example\r\nConnection: close\r\n\r\n"
		v2 := proxyV2(netip.MustParseAddrPort("203.0.113.7:5555"), netip.MustParseAddrPort("203.0.113.1:80"))
		for name, header := range map[string]string{"v1": "PROXY TCP4 203.0.113.7 203.0.113.1 5555 80\r\n", "v2": v2} {
			body := exchange(t, b.dial(cfg.HTTPPort), header+request)
			if shown(body, "x-forwarded-for") != "203.0.113.7" || shown(body, "x-forwarded-port") != "80" {
				t.Errorf("%s: %s", name, body)
			}
		}
		conn := b.dial(cfg.HTTPSPort)
		if _, err := io.WriteString(conn, v2); err != nil {
			t.Fatal(err)
		}
		if body := exchange(t, overTLS(conn, "web.example", "http/1.1"), request); shown(body, "x-forwarded-for") != "203.0.113.7" {
			t.Errorf("v2 over TLS: %s", body)
		}
		if body := exchange(t, b.dial(cfg.HTTPPort), request); strings.Contains(body, "200 OK") {
			t.Errorf("served without a PROXY header: %s", body)
		}
	})
}

// proxyListener takes a binary PROXY header from each connection and shows its
// source as the connection's remote address.
type proxyListener struct{ net.Listener }

type proxiedConn struct {
	net.Conn
	source netip.AddrPort
}

func (c proxiedConn) RemoteAddr() net.Addr { return net.TCPAddrFromAddrPort(c.source) }

func (l proxyListener) Accept() (net.Conn, error) {
	for {
		conn, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		header := make([]byte, 16)
		if _, err := io.ReadFull(conn, header); err == nil && string(header[:12]) == proxyMagic {
			rest := make([]byte, binary.BigEndian.Uint16(header[14:]))
			if _, err := io.ReadFull(conn, rest); err == nil && len(rest) >= 12 {
				return proxiedConn{conn, netip.AddrPortFrom(netip.AddrFrom4([4]byte(rest)), binary.BigEndian.Uint16(rest[8:]))}, nil
			}
		}
		_ = conn.Close()
	}
}

func TestProxyProtocolOut(t *testing.T) {
	t.Parallel()
	eachHAProxy(t, func(t *testing.T, binary string) {
		t.Parallel()
		b := newBed(t, testConfig(t, binary))
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		s := &httptest.Server{Listener: proxyListener{l}, Config: &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			_, _ = fmt.Fprint(w, r.RemoteAddr)
		})}}
		s.Start()
		t.Cleanup(s.Close)
		e := l.Addr().String()
		b.put("web/scheme http", "web/hosts/1 "+e, `web/options {"send_proxy": true}`)
		b.put("raw/scheme tcp", "raw/hosts/1 "+e, `raw/options {"send_proxy": true}`, "raw/host_port 7001")
		b.wait()
		for _, port := range []int{8080, 7001} {
			for _, from := range []string{"127.8.0.1", "127.8.0.2"} {
				status, body, _ := send(t, b.caller(port, from), "GET", "http://web.example/", "")
				if status != 200 || !strings.HasPrefix(body, from+":") {
					t.Errorf("port %d from %s: %d %s", port, from, status, body)
				}
			}
		}
	})
}

func TestStripPath(t *testing.T) {
	t.Parallel()
	eachHAProxy(t, func(t *testing.T, binary string) {
		t.Parallel()
		b := newBed(t, testConfig(t, binary))
		b.put("web/scheme http", "web/hosts/1 "+endpoint(t, "web"), `web/options {"strip_path": true}`, "web/host_port 7001")
		b.put("full/scheme http", "full/hosts/1 "+endpoint(t, "full"))
		b.wait()
		for _, c := range []struct {
			port       int
			host, path string
			want       string
		}{
			{8080, "any.domain", "/web", "web /"}, {8080, "any.domain", "/web/", "web /"}, {8080, "any.domain", "/web/a/b?c=/web/d", "web /a/b?c=/web/d"},
			{8080, "any.domain", "/web?c=d", "web /?c=d"}, {8080, "web.domain", "/web/a", "web /web/a"}, {7001, "any.domain", "/web/a", "web /web/a"},
			{8080, "any.domain", "/web/web/a", "web /web/a"}, {8080, "any.domain", "/full/a", "full /full/a"},
		} {
			if _, body, _ := b.get(c.port, c.host, c.path); !strings.HasPrefix(body, c.want+"\n") {
				t.Errorf("%s%s on %d: %.40q, want %q", c.host, c.path, c.port, body, c.want)
			}
		}
	})
}

// cookie returns the sticky cookie that an answer sets, as "FLOTILLA=value", and
// the rest of its line.
func cookie(h http.Header) (pair, attributes string) {
	for _, line := range h.Values("Set-Cookie") {
		if strings.HasPrefix(line, "FLOTILLA=") {
			pair, attributes, _ = strings.Cut(line, ";")
		}
	}
	return pair, attributes
}

func TestSticky(t *testing.T) {
	t.Parallel()
	eachHAProxy(t, func(t *testing.T, binary string) {
		t.Parallel()
		b, other := newBed(t, testConfig(t, binary)), newBed(t, testConfig(t, binary))
		addrs := map[string]string{}
		for _, name := range []string{"a", "b", "c", "d", "e", "f"} {
			addrs[name] = endpoint(t, name)
		}
		const options = `web/options {"sticky": true, "balance": "roundrobin"}`
		host := func(name string) string { return "web/hosts/" + name + " " + addrs[name] }
		b.put("web/scheme http", options, host("a"), host("b"), host("c"))
		other.put("web/scheme http", options, host("d"))
		other.wait()
		other.put(host("c"))
		other.wait()
		other.put(host("b"), host("a"))
		other.wait()
		b.wait()
		ask := func(b *bed, cookies ...string) (string, http.Header) {
			t.Helper()
			status, body, header := b.get(8080, "web.example", "/", cookies...)
			name, _, _ := strings.Cut(body, " ")
			if status != 200 {
				name = fmt.Sprint(status)
			}
			return name, header
		}
		jar := map[string]string{} // cookie by endpoint
		for range 12 {
			name, header := ask(b)
			jar[name], _ = cookie(header)
		}
		sticks := func(b *bed, when string, names ...string) {
			t.Helper()
			for _, name := range names {
				for range 3 {
					got, header := ask(b, "Cookie: "+jar[name])
					if got != name {
						t.Errorf("%s: cookie %s of %s leads to %s", when, jar[name], name, got)
					}
					if again, _ := cookie(header); again != "" {
						t.Errorf("%s: a good cookie is set again: %s", when, again)
					}
				}
			}
		}
		sticks(b, "at first", "a", "b", "c")
		sticks(other, "on another router", "a", "b", "c")
		b.put(host("d"))
		b.wait()
		sticks(b, "after an endpoint was added", "a", "b", "c")
		for range 12 {
			name, header := ask(b)
			jar[name], _ = cookie(header)
		}
		sticks(b, "for the added endpoint", "d")
		sticks(other, "for the added endpoint on another router", "d")

		b.put(`web/meta/a {"drain": true}`)
		b.wait()
		for range 12 {
			if name, _ := ask(b); name == "a" {
				t.Error("a new client reaches a draining endpoint")
			}
		}
		sticks(b, "while it drains", "a")
		b.put("-web/hosts/a")
		b.wait()
		name, header := ask(b, "Cookie: "+jar["a"])
		if moved, _ := cookie(header); name == "a" || moved != jar[name] {
			t.Errorf("after its endpoint went the client is on %s with cookie %q, want %q", name, moved, jar[name])
		}
		// A new endpoint takes the place of the one that went, with a cookie of
		// its own.
		b.put(host("e"))
		b.wait()
		if name, _ := ask(b, "Cookie: "+jar["b"]); name != "b" {
			t.Errorf("after an endpoint was replaced, b's client is on %s", name)
		}
		eventually(t, func() string {
			name, header := ask(b)
			if name != "e" {
				return "nobody gets the new endpoint"
			}
			jar["e"], _ = cookie(header)
			return ""
		})
		other.put(host("e"))
		other.wait()
		sticks(other, "for the replacement on another router", "e")
	})
}

// TestStickyByPath has two sticky services under one host name: the cookie of one
// must not push out that of the other.
func TestStickyByPath(t *testing.T) {
	t.Parallel()
	eachHAProxy(t, func(t *testing.T, binary string) {
		t.Parallel()
		b := newBed(t, testConfig(t, binary))
		b.put("web/scheme http", `web/options {"sticky": true}`, "web/hosts/1 "+endpoint(t, "web"))
		b.put("Api/scheme http", `Api/options {"sticky": true, "strip_path": true}`, "Api/hosts/1 "+endpoint(t, "api"))
		b.wait()
		for _, c := range []struct{ host, path, want string }{
			{"any.domain", "/web/x", "path=/web;"}, {"any.domain", "/Api", "path=/Api;"}, {"any.domain", "/api/y", "path=/api;"}, {"web.any", "/x", "path=/;"},
		} {
			_, _, header := b.get(8080, c.host, c.path)
			if _, attributes := cookie(header); !strings.Contains(attributes+";", c.want) {
				t.Errorf("%s%s sets %q, want %s", c.host, c.path, header.Values("Set-Cookie"), c.want)
			}
		}
	})
}

func TestBalance(t *testing.T) {
	t.Parallel()
	eachHAProxy(t, func(t *testing.T, binary string) {
		t.Parallel()
		b := newBed(t, testConfig(t, binary))
		var keys []string
		for i := range 5 {
			name := fmt.Sprint("e", i)
			keys = append(keys, "hash/hosts/"+name+" "+endpoint(t, name))
		}
		b.put("hash/scheme http", `hash/options {"balance": "consistent-hash"}`, "rr/scheme http", `rr/options {"balance": "roundrobin"}`)
		b.put(keys[:4]...)
		for _, k := range keys[:3] {
			b.put(strings.Replace(k, "hash/", "rr/", 1))
		}
		b.wait()
		where := func() map[string]string {
			found := map[string]string{}
			for i := range 50 {
				from := fmt.Sprintf("127.8.%d.%d", i%5, i+1)
				_, body, _ := send(t, b.caller(8080, from), "GET", "http://hash.example/", "")
				found[from], _, _ = strings.Cut(body, " ")
			}
			return found
		}
		moved := func(before, after map[string]string) (all, toNew int) {
			for from, name := range after {
				if before[from] != name {
					all++
					if name == "e4" {
						toNew++
					}
				}
			}
			return all, toNew
		}
		first := where()
		if n, _ := moved(first, where()); n > 0 {
			t.Errorf("%d of 50 clients moved without a cause", n)
		}
		b.put(keys[4])
		b.wait()
		second := where()
		if n, toNew := moved(first, second); n != toNew || n == 0 || n > 25 {
			t.Errorf("%d of 50 clients moved for a fifth endpoint, %d of them to it", n, toNew)
		}
		b.put("-hash/hosts/e1")
		b.wait()
		third := where()
		for from, name := range second {
			if name != "e1" && third[from] != name {
				t.Errorf("%s moved from %s to %s when e1 went", from, name, third[from])
			}
		}
		b.put("port/scheme tcp", "port/host_port 7009") // a reload
		b.wait()
		if n, _ := moved(third, where()); b.router.Status().Reloads != 1 || n > 0 {
			t.Errorf("%d of 50 clients moved in a reload (%d reloads)", n, b.router.Status().Reloads)
		}

		counts := func(n int) map[string]int {
			found := map[string]int{}
			for range n {
				found[b.answer(8080, "rr.example", "/")]++
			}
			return found
		}
		if c := counts(30); c["e0"] != 10 || c["e1"] != 10 || c["e2"] != 10 {
			t.Errorf("roundrobin: %v", c)
		}
		b.put(`rr/meta/e0 {"weight": 200}`, `rr/meta/e1 {"weight": 50}`, `rr/meta/e2 {"weight": 0}`)
		b.wait()
		if c := counts(50); c["e0"] < 38 || c["e1"] < 8 || c["e2"] != 0 {
			t.Errorf("weights 200, 50 and 0: %v", c)
		}
		b.put("-rr/meta/e0", "-rr/meta/e1", `rr/meta/e2 {"drain": true}`)
		b.wait()
		if c := counts(20); c["e0"] != 10 || c["e1"] != 10 {
			t.Errorf("drained e2: %v", c)
		}
		b.put("-rr/meta/e2")
		b.wait()
		if c := counts(30); c["e2"] != 10 {
			t.Errorf("e2 came back: %v", c)
		}
	})
}

func TestDrainFinishesRequests(t *testing.T) {
	t.Parallel()
	eachHAProxy(t, func(t *testing.T, binary string) {
		t.Parallel()
		b := newBed(t, testConfig(t, binary))
		arrived, finish := make(chan bool, 10), make(chan bool)
		slow := serve(t, func(w http.ResponseWriter, _ *http.Request) {
			arrived <- true
			<-finish
			_, _ = fmt.Fprint(w, "slow done")
		})
		b.put("web/scheme http", "web/hosts/slow "+slow)
		b.wait()
		answers := make(chan string, 2)
		ask := func() {
			status, body, _ := send(t, b.caller(8080, ""), "GET", "http://web.example/", "")
			answers <- fmt.Sprint(status, " ", body)
		}
		go ask()
		<-arrived
		b.put("web/hosts/quick "+endpoint(t, "quick"), `web/meta/slow {"drain": true}`)
		b.wait()
		for range 5 {
			if got := b.answer(8080, "web.example", "/"); got != "quick" {
				t.Errorf("a new request reaches %s", got)
			}
		}
		b.put("-web/hosts/slow")
		b.wait()
		// Another endpoint takes the server's place while the request is on its way.
		b.put("web/hosts/third " + endpoint(t, "third"))
		b.wait()
		close(finish)
		if got := <-answers; got != "200 slow done" {
			t.Errorf("the request that was on its way: %s", got)
		}
	})
}

func TestTimeoutsByService(t *testing.T) {
	t.Parallel()
	eachHAProxy(t, func(t *testing.T, binary string) {
		t.Parallel()
		b := newBed(t, testConfig(t, binary))
		var wait sync.WaitGroup
		sleepy := serve(t, func(w http.ResponseWriter, r *http.Request) {
			if r.Header.Get("Upgrade") != "" {
				upgrade(t, w)
				return
			}
			select {
			case <-time.After(2500 * time.Millisecond):
			case <-r.Context().Done():
			}
			_, _ = fmt.Fprint(w, "awake")
		})
		b.put("short/scheme http", "short/hosts/1 "+sleepy, `short/options {"timeout_server": "1s", "timeout_tunnel": "1s"}`)
		b.put("long/scheme http", "long/hosts/1 "+sleepy)
		b.put("tunnel/scheme http", "tunnel/hosts/1 "+sleepy, `tunnel/options {"timeout_tunnel": "3s", "timeout_server": "1s"}`)
		b.wait()
		for host, want := range map[string]int{"short": 504, "long": 200, "tunnel": 504} {
			wait.Go(func() {
				began := time.Now()
				status, body, _ := send(t, b.caller(8080, ""), "GET", "http://"+host+".example/", "")
				if took := time.Since(began); status != want || want == 504 && took > 2*time.Second {
					t.Errorf("%s: %d after %s, want %d: %s", host, status, took, want, body)
				}
			})
		}
		for host, limits := range map[string][2]time.Duration{"short": {900 * time.Millisecond, 2 * time.Second}, "tunnel": {2500 * time.Millisecond, 4500 * time.Millisecond}} {
			wait.Go(func() {
				began := time.Now()
				text := exchange(t, b.dial(8080), upgradeRequest(host))
				if took := time.Since(began); !strings.Contains(text, " 101 ") || took < limits[0] || took > limits[1] {
					t.Errorf("silent tunnel of %s closed after %s, want %s: %s", host, took, limits, text)
				}
			})
		}
		wait.Wait()
	})
}

func upgradeRequest(host string) string {
	return "GET /chat HTTP/1.1\r\nHost: " + host + ".example\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n" +
		"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
}

// upgrade switches a connection to a protocol that echoes every byte.
func upgrade(t *testing.T, w http.ResponseWriter) {
	conn, rw, err := http.NewResponseController(w).Hijack()
	if err != nil {
		t.Error(err)
		return
	}
	defer func() { _ = conn.Close() }()
	_, _ = io.WriteString(conn, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"+
		"Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n")
	_, _ = io.Copy(conn, rw)
}

func TestMaxConnectionsQueues(t *testing.T) {
	t.Parallel()
	eachHAProxy(t, func(t *testing.T, binary string) {
		t.Parallel()
		b := newBed(t, testConfig(t, binary))
		var now, peak atomic.Int32
		e := serve(t, func(w http.ResponseWriter, _ *http.Request) {
			n := now.Add(1)
			defer now.Add(-1)
			for old := peak.Load(); n > old && !peak.CompareAndSwap(old, n); old = peak.Load() {
			}
			<-time.After(60 * time.Millisecond)
			_, _ = fmt.Fprint(w, "ok")
		})
		b.put("web/scheme http", "web/hosts/1 "+e, `web/options {"max_connections": 2}`)
		b.wait()
		var wait sync.WaitGroup
		for range 12 {
			wait.Go(func() {
				if status, body, _ := send(t, b.caller(8080, ""), "GET", "http://web.example/", ""); status != 200 {
					t.Errorf("%d %s", status, body)
				}
			})
		}
		wait.Wait()
		if peak.Load() != 2 {
			t.Errorf("%d requests at once, want 2", peak.Load())
		}
	})
}

// rudeEndpoint reads each request's first line, counts its method and resets the
// connection.
func rudeEndpoint(t *testing.T) (addr string, count func(method string) int) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	var mu sync.Mutex // guards methods
	var methods []string
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				line, _ := bufio.NewReader(conn).ReadString('\n')
				method, _, _ := strings.Cut(line, " ")
				mu.Lock()
				methods = append(methods, method)
				mu.Unlock()
				_ = conn.(*net.TCPConn).SetLinger(0)
				_ = conn.Close()
			}()
		}
	}()
	return l.Addr().String(), func(method string) int {
		mu.Lock()
		defer mu.Unlock()
		return len(slices.DeleteFunc(slices.Clone(methods), func(m string) bool { return m != method }))
	}
}

func TestRetries(t *testing.T) {
	t.Parallel()
	eachHAProxy(t, func(t *testing.T, binary string) {
		t.Parallel()
		b := newBed(t, testConfig(t, binary))
		rude, rudeCount := rudeEndpoint(t)
		var kindMu sync.Mutex // guards kind
		kind := map[string]int{}
		kindly := serve(t, func(w http.ResponseWriter, r *http.Request) {
			kindMu.Lock()
			defer kindMu.Unlock()
			kind[r.Method]++
		})
		const n, gone = 10, "127.0.0.1:1" // a port that no other test is given
		count := func(method, host string) (good int) {
			for range n {
				if status, _, _ := send(t, b.caller(8080, ""), method, "http://"+host+".example/", "x"); status == 200 {
					good++
				}
			}
			return good
		}
		b.put("web/scheme http", "web/hosts/1 "+rude, "web/hosts/2 "+kindly, `web/options {"balance": "roundrobin"}`)
		b.put("once/scheme http", "once/hosts/1 "+rude, "once/hosts/2 "+kindly, `once/options {"balance": "roundrobin", "retries": false}`)
		b.put("dead/scheme http", "dead/hosts/1 "+gone, "dead/hosts/2 "+kindly, `dead/options {"balance": "roundrobin"}`)
		b.wait()
		for _, method := range []string{"GET", "PUT", "DELETE"} {
			if good := count(method, "web"); good != n || rudeCount(method) == 0 {
				t.Errorf("%s: %d of %d succeeded (%d met the reset)", method, good, n, rudeCount(method))
			}
		}
		for _, method := range []string{"POST", "PATCH"} {
			good := count(method, "web")
			if bad := rudeCount(method); bad == 0 || bad+good != n || kind[method] != good {
				t.Errorf("%s: %d sent, %d succeeded, endpoints got %d and %d", method, n, good, bad, kind[method])
			}
		}
		before, beforeKind := rudeCount("GET"), kind["GET"]
		good := count("GET", "once")
		if bad := rudeCount("GET") - before; bad == 0 || bad+good != n || kind["GET"]-beforeKind != good {
			t.Errorf("retries false: %d sent, %d succeeded, endpoints got %d and %d", n, good, bad, kind["GET"]-beforeKind)
		}
		// A connection that was refused has carried nothing: anything may try again.
		for _, method := range []string{"GET", "POST"} {
			if good := count(method, "dead"); good != n {
				t.Errorf("%s with a dead endpoint: %d of %d succeeded", method, good, n)
			}
		}
	})
}

// TestIdleConnectionsOutliveReload sends a request on a connection that was idle
// during a reload: it must not be closed under the client.
func TestIdleConnectionsOutliveReload(t *testing.T) {
	t.Parallel()
	eachHAProxy(t, func(t *testing.T, binary string) {
		t.Parallel()
		b := newBed(t, testConfig(t, binary))
		b.put("web/scheme http-and-https", "web/hosts/1 "+endpoint(t, "web"))
		b.wait()
		conns := map[string]net.Conn{"plain": b.dial(8080), "TLS": b.dialTLS("web.example", "http/1.1")}
		ask := func(name string) (status int, last bool) {
			t.Helper()
			if err := conns[name].SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
				t.Fatal(err)
			}
			if _, err := io.WriteString(conns[name], "POST / HTTP/1.1\r\nHost: web.example\r\nContent-Length: 0\r\n\r\n"); err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			resp, err := http.ReadResponse(bufio.NewReader(conns[name]), nil)
			if err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			readAll(resp)
			return resp.StatusCode, resp.Close
		}
		for name := range conns {
			if status, last := ask(name); status != 200 || last {
				t.Errorf("%s: %d, closes %t", name, status, last)
			}
		}
		b.put("raw/scheme tcp", "raw/host_port 7001", "raw/hosts/1 "+tcpEndpoint(t, "raw"))
		b.wait()
		if s := b.router.Status(); s.Reloads != 1 {
			t.Fatalf("%d reloads", s.Reloads)
		}
		for name := range conns {
			if status, last := ask(name); status != 200 || !last {
				t.Errorf("%s after the reload: %d, closes %t", name, status, last)
			}
		}
	})
}
