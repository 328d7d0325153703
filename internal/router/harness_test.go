package router

import (
	"context"
	"crypto/tls"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"flotilla/internal/catalog"
	"flotilla/internal/haproxy"
)

// haproxies returns the HAProxy of the distribution and those that
// test/haproxies.sh unpacked.
func haproxies(t *testing.T) []string {
	t.Helper()
	system, err := exec.LookPath("haproxy")
	if err != nil {
		t.Fatalf("no haproxy: %v: run scripts/install-deps.sh test", err)
	}
	more, err := filepath.Glob("../../.cache/haproxy/*/haproxy")
	if err != nil || len(more) == 0 {
		t.Fatalf("no further HAProxy versions (%v): run test/haproxies.sh", err)
	}
	all := []string{system}
	for _, path := range more {
		abs, err := filepath.Abs(path)
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, abs)
	}
	return all
}

// eachHAProxy runs the test with every HAProxy version.
func eachHAProxy(t *testing.T, test func(t *testing.T, binary string)) {
	for _, binary := range haproxies(t) {
		v, err := haproxy.BinaryVersion(t.Context(), binary)
		if err != nil {
			t.Fatal(err)
		}
		t.Run(fmt.Sprintf("haproxy-%d.%d", v.Major, v.Minor), func(t *testing.T) { test(t, binary) })
	}
}

var lastAddress atomic.Uint32

// freshAddress returns a loopback address that no other test uses.
func freshAddress() netip.Addr {
	n := lastAddress.Add(1)
	return netip.AddrFrom4([4]byte{127, 20 + byte(os.Getpid()%200), byte(n / 250), byte(n%250 + 2)})
}

// bed is one router with its HAProxy, and the keys that it follows.
type bed struct {
	t        *testing.T
	cfg      Config
	router   *Router
	builder  *catalog.Builder
	feed     *catalog.Feed
	revision int64
	stop     context.CancelCauseFunc
	stopped  chan struct{}
	tune     func(*Router) // called before Run
}

func testConfig(t *testing.T, binary string) Config {
	return Config{
		Node: "n1", Address: freshAddress(),
		HTTPPort: 8080, HTTPSPort: 8443, BalancerPort: 9180, RedirectPort: 9181, SNIPort: 8444,
		Dir: t.TempDir(), Binary: binary, Supervise: true, HostPorts: "listeners", MaxConnections: 2000,
	}
}

func newBed(t *testing.T, cfg Config, tune ...func(*Router)) *bed {
	t.Helper()
	b := &bed{
		t: t, cfg: cfg, feed: catalog.NewFeed(),
		tune: func(r *Router) {
			for _, f := range tune {
				f(r)
			}
		},
		builder: catalog.NewBuilder(catalog.Policy{Loopback: true}),
	}
	b.start()
	t.Cleanup(func() { b.halt(nil) })
	return b
}

func (b *bed) start() {
	b.t.Helper()
	r, err := New(b.cfg, b.feed, slog.New(slog.NewTextHandler(testWriter{b.t}, &slog.HandlerOptions{Level: slog.LevelInfo})))
	if err != nil {
		b.t.Fatal(err)
	}
	b.tune(r)
	b.router = r
	ctx, stop := context.WithCancelCause(context.Background())
	b.stop, b.stopped = stop, make(chan struct{})
	go func() {
		defer close(b.stopped)
		if err := r.Run(ctx); err != nil {
			b.t.Errorf("router: %v", err)
		}
	}()
}

// halt stops the router; with child.ErrLeave as cause HAProxy lives on.
func (b *bed) halt(cause error) {
	b.stop(cause)
	<-b.stopped
}

type testWriter struct{ t *testing.T }

func (w testWriter) Write(p []byte) (int, error) {
	w.t.Log(strings.TrimSpace(string(p)))
	return len(p), nil
}

// put writes keys below /services/, given as "web/scheme http"; "-web/scheme"
// deletes one.
func (b *bed) put(keys ...string) {
	b.t.Helper()
	b.revision++
	batch := catalog.Batch{Revision: b.revision, Now: time.Now()}
	for _, k := range keys {
		name, value, _ := strings.Cut(k, " ")
		name, gone := strings.CutPrefix(name, "-")
		batch.Keys = append(batch.Keys, catalog.KeyValue{
			Key: catalog.Prefix + name, Value: value, Deleted: gone, CreateRevision: b.revision, ModRevision: b.revision,
		})
	}
	b.feed.Publish(b.builder.Apply(batch))
}

// wait returns when the router has applied all that was put.
func (b *bed) wait() {
	b.t.Helper()
	limit := time.After(20 * time.Second)
	for {
		applied, newer := b.router.Applied()
		if applied >= b.revision {
			return
		}
		select {
		case <-newer:
		case <-limit:
			b.t.Fatalf("revision %d not applied in time: %+v", b.revision, b.router.Status())
		}
	}
}

// eventually waits until f returns "".
func eventually(t *testing.T, f func() string) {
	t.Helper()
	var problem string
	for limit := time.Now().Add(20 * time.Second); time.Now().Before(limit); time.Sleep(20 * time.Millisecond) {
		if problem = f(); problem == "" {
			return
		}
	}
	t.Fatal(problem)
}

func (b *bed) url(port int) string {
	return "http://" + netip.AddrPortFrom(b.cfg.Address, uint16(port)).String()
}

// get asks the router; the result is the status and the body.
func (b *bed) get(port int, host, path string, header ...string) (int, string, http.Header) {
	b.t.Helper()
	req, err := http.NewRequestWithContext(b.t.Context(), http.MethodGet, b.url(port)+path, nil)
	if err != nil {
		b.t.Fatal(err)
	}
	req.Host = host
	for _, h := range header {
		k, v, _ := strings.Cut(h, ": ")
		req.Header.Add(k, v)
	}
	client := &http.Client{
		Timeout:       10 * time.Second,
		Transport:     &http.Transport{DisableKeepAlives: true},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	resp, err := client.Do(req)
	if err != nil {
		b.t.Fatalf("GET %s (host %s): %v", req.URL, host, err)
	}
	defer func() { _ = resp.Body.Close() }()
	var body strings.Builder
	if _, err := fmt.Fprint(&body, readAll(resp)); err != nil {
		b.t.Fatal(err)
	}
	return resp.StatusCode, body.String(), resp.Header
}

func readAll(resp *http.Response) string {
	var b strings.Builder
	buf := make([]byte, 32<<10)
	for {
		n, err := resp.Body.Read(buf)
		b.Write(buf[:n])
		if err != nil {
			return b.String()
		}
	}
}

// endpoint starts an HTTP endpoint that answers "name path" and shows the
// request's headers; it returns its ip:port.
func endpoint(t *testing.T, name string) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := &httptest.Server{Listener: l, Config: &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("X-Endpoint", name)
		_, _ = fmt.Fprintf(w, "%s %s\n", name, r.URL)
		for k, v := range r.Header {
			_, _ = fmt.Fprintf(w, "%s: %s\n", strings.ToLower(k), strings.Join(v, ", "))
		}
	})}}
	s.Start()
	t.Cleanup(s.Close)
	return l.Addr().String()
}

// answer is the first word of what the router answers: the endpoint's name.
func (b *bed) answer(port int, host, path string) string {
	b.t.Helper()
	status, body, _ := b.get(port, host, path)
	if status != http.StatusOK {
		return fmt.Sprint(status)
	}
	word, _, _ := strings.Cut(body, " ")
	return word
}

// tlsAnswer is answer on the HTTPS port; certificates are not checked.
func (b *bed) tlsAnswer(host string) string {
	b.t.Helper()
	addr := netip.AddrPortFrom(b.cfg.Address, uint16(b.cfg.HTTPSPort)).String()
	client := &http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{
		DisableKeepAlives: true,
		TLSClientConfig:   &tls.Config{InsecureSkipVerify: true}, //nolint:gosec // a test against our own certificate
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "tcp", addr)
		},
	}}
	resp, err := client.Get("https://" + host + "/")
	if err != nil {
		b.t.Fatalf("GET https %s: %v", host, err)
	}
	defer func() { _ = resp.Body.Close() }()
	if resp.StatusCode != http.StatusOK {
		return fmt.Sprint(resp.StatusCode)
	}
	word, _, _ := strings.Cut(readAll(resp), " ")
	return word
}
