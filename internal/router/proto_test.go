package router

import (
	"bufio"
	"context"
	"crypto/tls"
	"fmt"
	"hash/crc32"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

func TestWebSocket(t *testing.T) {
	t.Parallel()
	eachHAProxy(t, func(t *testing.T, binary string) {
		t.Parallel()
		b := newBed(t, testConfig(t, binary))
		e := serve(t, func(w http.ResponseWriter, r *http.Request) {
			if r.Header.Get("Sec-Websocket-Key") == "" {
				t.Error("the endpoint sees no WebSocket")
			}
			upgrade(t, w)
		})
		b.put("web/scheme http-and-https", "web/hosts/1 "+e)
		b.wait()
		for name, conn := range map[string]net.Conn{"plain": b.dial(8080), "TLS": b.dialTLS("web.example", "http/1.1")} {
			if err := conn.SetDeadline(time.Now().Add(20 * time.Second)); err != nil {
				t.Fatal(err)
			}
			if _, err := io.WriteString(conn, upgradeRequest("web")); err != nil {
				t.Fatal(err)
			}
			in := bufio.NewReader(conn)
			resp, err := http.ReadResponse(in, nil)
			if err != nil || resp.StatusCode != 101 || resp.Header.Get("Sec-Websocket-Accept") == "" {
				t.Fatalf("%s: %v %v", name, resp, err)
			}
			for _, message := range []string{"\x81\x05hello", "\x89\x00", "\x82\x03\x00\r\n"} {
				if _, err := io.WriteString(conn, message); err != nil {
					t.Fatal(err)
				}
				echo := make([]byte, len(message))
				if _, err := io.ReadFull(in, echo); err != nil || string(echo) != message {
					t.Errorf("%s: sent %q, got %q, %v", name, message, echo, err)
				}
			}
			_ = conn.Close()
		}
	})
}

// TestEventsArriveAtOnce has an endpoint that sends its second event only when
// the client has acknowledged the first.
func TestEventsArriveAtOnce(t *testing.T) {
	t.Parallel()
	eachHAProxy(t, func(t *testing.T, binary string) {
		t.Parallel()
		b := newBed(t, testConfig(t, binary))
		got := make(chan bool)
		e := serve(t, func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Type", "text/event-stream")
			for i := range 3 {
				_, _ = fmt.Fprintf(w, "data: %d\n\n", i)
				if err := http.NewResponseController(w).Flush(); err != nil {
					t.Error(err)
				}
				select {
				case <-got:
				case <-r.Context().Done():
					return
				}
			}
		})
		b.put("web/scheme http", "web/hosts/1 "+e)
		b.wait()
		conn := b.dial(8080)
		if err := conn.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(conn, "GET / HTTP/1.1\r\nHost: web.example\r\n\r\n"); err != nil {
			t.Fatal(err)
		}
		resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
		if err != nil {
			t.Fatal(err)
		}
		in := bufio.NewReader(resp.Body)
		for i := range 3 {
			line, err := in.ReadString('\n')
			if line == "\n" {
				line, err = in.ReadString('\n')
			}
			if want := fmt.Sprintf("data: %d\n", i); err != nil || line != want {
				t.Fatalf("got %q, %v, want %q", line, err, want)
			}
			got <- true
		}
	})
}

// large is the size of the bodies that are streamed through the distribution's
// HAProxy; the others get a quarter.
const large = 200 << 20

// stream is a body of large bytes that do not repeat at any buffer's size.
func stream(size int) io.Reader {
	block := make([]byte, 1<<20+7)
	for i := range block {
		block[i] = byte(i*i>>8 ^ i)
	}
	return &repeated{block: block, left: size}
}

type repeated struct {
	block     []byte
	pos, left int
}

func (r *repeated) Read(p []byte) (int, error) {
	if r.left == 0 {
		return 0, io.EOF
	}
	n := copy(p[:min(len(p), r.left)], r.block[r.pos:])
	r.pos, r.left = (r.pos+n)%len(r.block), r.left-n
	return n, nil
}

func checksum(r io.Reader) string {
	h := crc32.New(crc32.MakeTable(crc32.Castagnoli))
	n, err := io.CopyBuffer(struct{ io.Writer }{h}, r, make([]byte, 256<<10))
	return fmt.Sprintf("%d bytes, checksum %08x, error %v", n, h.Sum32(), err)
}

func TestLargeBodies(t *testing.T) {
	t.Parallel()
	system := haproxies(t)[0]
	eachHAProxy(t, func(t *testing.T, binary string) {
		t.Parallel()
		size := large
		if binary != system {
			size /= 4
		}
		want := checksum(stream(size))
		b := newBed(t, testConfig(t, binary))
		e := serve(t, func(w http.ResponseWriter, r *http.Request) {
			if r.Method == http.MethodPost {
				_, _ = fmt.Fprint(w, checksum(r.Body))
				return
			}
			_, _ = io.CopyBuffer(struct{ io.Writer }{w}, stream(size), make([]byte, 256<<10))
		})
		b.put("web/scheme http", "web/hosts/1 "+e)
		b.wait()
		c := b.caller(8080, "")
		up, err := c.Post("http://web.example/", "application/octet-stream", stream(size))
		if err != nil {
			t.Fatal(err)
		}
		if got := readAll(up); got != want {
			t.Errorf("upload: %s, want %s", got, want)
		}
		down, err := c.Get("http://web.example/")
		if err != nil {
			t.Fatal(err)
		}
		if got := checksum(down.Body); got != want {
			t.Errorf("download: %s, want %s", got, want)
		}
		_, _ = up.Body.Close(), down.Body.Close()
	})
}

func TestExpectContinue(t *testing.T) {
	t.Parallel()
	eachHAProxy(t, func(t *testing.T, binary string) {
		t.Parallel()
		b := newBed(t, testConfig(t, binary))
		e := serve(t, func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Path == "/refuse" {
				w.Header().Set("Connection", "close")
				w.WriteHeader(http.StatusExpectationFailed)
				return
			}
			_, _ = io.Copy(w, r.Body)
		})
		b.put("web/scheme http", "web/hosts/1 "+e)
		b.wait()
		for path, want := range map[string]string{"/take": "HTTP/1.1 100", "/refuse": "HTTP/1.1 417"} {
			conn := b.dial(8080)
			if err := conn.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
				t.Fatal(err)
			}
			_, err := fmt.Fprintf(conn, "POST %s HTTP/1.1\r\nHost: web.example\r\nExpect: 100-continue\r\nContent-Length: 4\r\nConnection: close\r\n\r\n", path)
			if err != nil {
				t.Fatal(err)
			}
			in := bufio.NewReader(conn)
			line, err := in.ReadString('\n')
			if err != nil || !strings.HasPrefix(line, want) {
				t.Fatalf("%s: %q, %v, want %s", path, line, err, want)
			}
			if path == "/refuse" {
				continue
			}
			if _, err := io.WriteString(conn, "body"); err != nil {
				t.Fatal(err)
			}
			rest, err := io.ReadAll(in)
			if err != nil || !strings.Contains(string(rest), " 200 ") || !strings.HasSuffix(string(rest), "body") {
				t.Errorf("%q, %v", rest, err)
			}
		}
	})
}

func TestHTTP2(t *testing.T) {
	t.Parallel()
	eachHAProxy(t, func(t *testing.T, binary string) {
		t.Parallel()
		b := newBed(t, testConfig(t, binary))
		e := serve(t, func(w http.ResponseWriter, r *http.Request) { _, _ = fmt.Fprint(w, r.Proto, " ", r.Host) })
		both := serveH2C(t, func(w http.ResponseWriter, r *http.Request) { _, _ = fmt.Fprint(w, r.Proto, " ", r.Host) })
		b.put("web/scheme http-and-https", "web/hosts/1 "+e, "two/scheme http-and-https", "two/hosts/1 "+both, `two/options {"h2c": true}`)
		b.wait()
		secure := &tls.Config{InsecureSkipVerify: true} //nolint:gosec // a test against our own certificate
		var h2c, h2, h1 http.Protocols
		h2c.SetUnencryptedHTTP2(true)
		h2.SetHTTP2(true)
		h1.SetHTTP1(true)
		for _, c := range []struct {
			name, url string
			protocols *http.Protocols
			port      int
			asked     string // how the client speaks
			want      string // how the endpoint is spoken to
		}{
			{"h2c", "http://web.example/", &h2c, 8080, "HTTP/2.0", "HTTP/1.1 web.example"},
			{"h2c to h2c", "http://two.example/", &h2c, 8080, "HTTP/2.0", "HTTP/2.0 two.example"},
			{"h1 to h2c", "http://two.example/", &h1, 8080, "HTTP/1.1", "HTTP/2.0 two.example"},
			{"h2", "https://web.example/", &h2, 8443, "HTTP/2.0", "HTTP/1.1 web.example"},
			{"h2 to h2c", "https://two.example/", &h2, 8443, "HTTP/2.0", "HTTP/2.0 two.example"},
			{"h1 over TLS", "https://web.example/", &h1, 8443, "HTTP/1.1", "HTTP/1.1 web.example"},
		} {
			client := b.caller(c.port, "")
			transport := client.Transport.(*http.Transport)
			transport.Protocols, transport.TLSClientConfig, transport.DisableKeepAlives = c.protocols, secure.Clone(), false
			for range 3 {
				resp, err := client.Get(c.url)
				if err != nil {
					t.Errorf("%s: %v", c.name, err)
					continue
				}
				if body := readAll(resp); resp.Proto != c.asked || body != c.want {
					t.Errorf("%s: %s, endpoint saw %q, want %s and %q", c.name, resp.Proto, body, c.asked, c.want)
				}
				_ = resp.Body.Close()
			}
			transport.CloseIdleConnections()
		}
	})
}

// serveH2C starts an endpoint that speaks only HTTP/2 without TLS.
func serveH2C(t *testing.T, handler http.HandlerFunc) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var only http.Protocols
	only.SetUnencryptedHTTP2(true)
	s := &httptest.Server{Listener: l, Config: &http.Server{Handler: handler, Protocols: &only}}
	s.Start()
	t.Cleanup(s.Close)
	return l.Addr().String()
}

func TestGRPC(t *testing.T) {
	t.Parallel()
	eachHAProxy(t, func(t *testing.T, binary string) {
		t.Parallel()
		b := newBed(t, testConfig(t, binary))
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		state := health.NewServer()
		server := grpc.NewServer(grpc.UnaryInterceptor(func(ctx context.Context, req any, _ *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
			if err := grpc.SetTrailer(ctx, metadata.Pairs("x-end", "of the call")); err != nil {
				return nil, err
			}
			return next(ctx, req)
		}))
		healthpb.RegisterHealthServer(server, state)
		go func() { _ = server.Serve(l) }()
		t.Cleanup(server.Stop)
		b.put("rpc/scheme http-and-https", "rpc/hosts/1 "+l.Addr().String(), `rpc/options {"h2c": true}`)
		b.wait()
		for name, c := range map[string]struct {
			port        int
			credentials credentials.TransportCredentials
		}{
			"plain": {8080, insecure.NewCredentials()},
			"TLS":   {8443, credentials.NewTLS(&tls.Config{InsecureSkipVerify: true})}, //nolint:gosec // a test against our own certificate
		} {
			state.SetServingStatus("part", healthpb.HealthCheckResponse_SERVING)
			conn, err := grpc.NewClient("passthrough:///"+netip.AddrPortFrom(b.cfg.Address, uint16(c.port)).String(),
				grpc.WithTransportCredentials(c.credentials), grpc.WithAuthority("rpc.example"))
			if err != nil {
				t.Fatal(err)
			}
			ctx, cancel := context.WithTimeout(t.Context(), 15*time.Second)
			client := healthpb.NewHealthClient(conn)
			var trailer metadata.MD
			answer, err := client.Check(ctx, &healthpb.HealthCheckRequest{Service: "part"}, grpc.Trailer(&trailer))
			if err != nil || answer.GetStatus() != healthpb.HealthCheckResponse_SERVING || strings.Join(trailer["x-end"], "") != "of the call" {
				t.Errorf("%s: check: %v, %v, trailer %v", name, answer, err, trailer)
			}
			if _, err := client.Check(ctx, &healthpb.HealthCheckRequest{Service: "ghost"}); status.Code(err) != codes.NotFound {
				t.Errorf("%s: check of an unknown part: %v", name, err)
			}
			watch, err := client.Watch(ctx, &healthpb.HealthCheckRequest{Service: "part"})
			if err != nil {
				t.Fatal(err)
			}
			for _, want := range []healthpb.HealthCheckResponse_ServingStatus{healthpb.HealthCheckResponse_SERVING, healthpb.HealthCheckResponse_NOT_SERVING} {
				if m, err := watch.Recv(); err != nil || m.GetStatus() != want {
					t.Errorf("%s: watch: %v, %v, want %v", name, m, err, want)
				}
				state.SetServingStatus("part", healthpb.HealthCheckResponse_NOT_SERVING)
			}
			cancel()
			if err := conn.Close(); err != nil {
				t.Error(err)
			}
		}
	})
}

// TestSlowClients dribbles headers at all versions at once, because each takes the
// ten seconds of the timeout.
func TestSlowClients(t *testing.T) {
	t.Parallel()
	eachHAProxy(t, func(t *testing.T, binary string) {
		t.Parallel()
		b := newBed(t, testConfig(t, binary))
		b.put("web/scheme http-and-https", "web/hosts/1 "+endpoint(t, "web"))
		b.wait()
		began := time.Now()
		var clients sync.WaitGroup
		plain, secure := b.dial(8080), b.dialTLS("web.example", "http/1.1")
		for name, conn := range map[string]net.Conn{"plain": plain, "TLS": secure} {
			ended := make(chan bool)
			clients.Go(func() {
				defer close(ended)
				text, err := io.ReadAll(conn)
				took := time.Since(began)
				if !strings.HasPrefix(string(text), "HTTP/1.1 408 ") || took < 8*time.Second || took > 15*time.Second {
					t.Errorf("%s: after %s: %q, %v", name, took, text, err)
				}
			})
			clients.Go(func() {
				tick := time.NewTicker(time.Second)
				defer tick.Stop()
				if _, err := io.WriteString(conn, "GET / HTTP/1.1\r\nHost: web.example\r\nX-Slow: "); err != nil {
					t.Error(err)
				}
				for {
					if _, err := io.WriteString(conn, "x"); err != nil {
						return
					}
					select {
					case <-tick.C:
					case <-ended:
						return
					}
				}
			})
		}
		done := make(chan bool)
		go func() { clients.Wait(); close(done) }()
		others := 0
		for tick := time.NewTicker(100 * time.Millisecond); ; {
			select {
			case <-done:
				tick.Stop()
				if others < 20 {
					t.Errorf("only %d others were served meanwhile", others)
				}
				return
			case <-tick.C:
				if got := b.answer(8080, "web.example", "/"); got != "web" {
					t.Errorf("another client got %s", got)
				}
				others++
			}
		}
	})
}

func TestAccessLog(t *testing.T) {
	t.Parallel()
	eachHAProxy(t, func(t *testing.T, binary string) {
		t.Parallel()
		dir, err := os.MkdirTemp("", "log")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = os.RemoveAll(dir) })
		path := filepath.Join(dir, "log.sock")
		socket, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = socket.Close() })
		// HAProxy writes with the rights of its own user.
		for p, mode := range map[string]os.FileMode{dir: 0o755, path: 0o666} {
			if err := os.Chmod(p, mode); err != nil {
				t.Fatal(err)
			}
		}
		cfg := testConfig(t, binary)
		cfg.AccessLog = path
		b := newBed(t, cfg)
		e, echo := endpoint(t, "web"), tcpEndpoint(t, "raw")
		b.put("web/scheme http", "web/hosts/1 "+e, "raw/scheme tcp", "raw/hosts/1 "+echo, "raw/host_port 7001", "empty/scheme http",
			"safe/scheme https", "web/domains/1 www.shop.example", "web/host_port 7002")
		b.wait()
		next := func(wants ...string) {
			t.Helper()
			if err := socket.SetReadDeadline(time.Now().Add(10 * time.Second)); err != nil {
				t.Fatal(err)
			}
			buf := make([]byte, 8192)
			for {
				n, err := socket.Read(buf)
				if err != nil {
					t.Fatalf("no log line with %s: %v", wants[0], err)
				}
				line := string(buf[:n])
				if !strings.Contains(line, "client=") { // HAProxy's own messages
					continue
				}
				for _, want := range wants {
					if !regexp.MustCompile(want).MatchString(line) {
						t.Errorf("no %s in %s", want, line)
					}
				}
				return
			}
		}
		timings := []string{`wait_ms=\d+`, `connect_ms=\d+`, `total_ms=\d+`, `client=127\.0\.0\.1:\d+`, `node=n1`, `bytes=\d+`, `retries=0`}
		b.answer(8080, "web.example", "/x?y=z")
		next(append(timings, `service=web `, "endpoint="+e+" ", `status=200 `, `answer_ms=\d+`, `host="web.example"`, `request="GET /x\?y=z HTTP/1.1"`)...)
		b.answer(8080, "empty.example", "/")
		next(`service=empty `, `status=503 `)
		b.answer(8080, "ghost.example", "/")
		next(`service=- `, `status=404 `, `host="ghost.example"`)
		b.answer(8080, "safe.example", "/")
		next(`service=safe `, `status=301 `, `host="safe.example"`)
		b.answer(8080, "WWW.shop.example:8080", "/")
		next(`service=web `, `status=200 `, `host="www.shop.example"`)
		b.answer(8080, "10.0.0.1", "/web/x")
		next(`service=web `, `status=200 `, `host="10.0.0.1"`)
		b.answer(7002, "any.example", "/")
		next(`service=web `, `status=200 `, `host="any.example"`)
		send(t, b.caller(8080, ""), "GET", "http://web.example/%22%0a%0dclient=evil", "")
		next(`service=web `, `request="[^"]*"`)
		conn := b.dial(7001)
		if got := exchangeLine(t, conn, "hello"); got != "raw hello" {
			t.Errorf("tcp: %q", got)
		}
		_ = conn.Close()
		next(append(timings, `service=raw `, "endpoint="+echo+" ")...)
	})
}
