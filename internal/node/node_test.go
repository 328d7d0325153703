package node

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	mdns "github.com/miekg/dns"

	"flotilla/internal/client"
	"flotilla/internal/nodeconfig"
	"flotilla/internal/store"
	"flotilla/internal/store/storetest"
	"flotilla/internal/wire"
)

// nodeConfig in the environment makes the test binary a node with that
// configuration (JSON).
const nodeConfig = "NODE_TEST_CONFIG"

func TestMain(m *testing.M) {
	if raw := os.Getenv(nodeConfig); raw != "" {
		var cfg nodeconfig.Config
		err := json.Unmarshal([]byte(raw), &cfg)
		if err == nil {
			err = Run(context.Background(), cfg, "test", slog.New(slog.NewTextHandler(os.Stderr, nil)))
		}
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	storetest.Main(m)
}

// testConfig returns the configuration of a node on an address of its own.
func testConfig(t *testing.T, endpoint string) nodeconfig.Config {
	t.Helper()
	dir, err := os.MkdirTemp("", "node") // shorter than t.TempDir: it holds sockets
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	addr := storetest.Addr(t)
	c := nodeconfig.Default()
	c.Name, c.Address, c.Data, c.Socket = "n1", addr.String(), dir, filepath.Join(dir, "node.sock")
	c.EtcdEndpoints, c.Units = []string{endpoint}, "off"
	c.HostPorts, c.DNSUpstream, c.MaxConnections = "listeners", []string{"none"}, 500
	ports := map[int]bool{}
	for _, p := range []*int{&c.HTTPPort, &c.HTTPSPort, &c.DNSPort, &c.BalancerPort, &c.RedirectPort} {
		for *p = storetest.Port(t, addr); ports[*p] || ports[*p+1] || ports[*p-1]; *p = storetest.Port(t, addr) {
		}
		ports[*p] = true
	}
	if err := c.Validate(); err != nil {
		t.Fatal(err)
	}
	return c
}

// testLog keeps what a node logs, to show it when a test fails.
func testLog(t *testing.T) *slog.Logger {
	t.Helper()
	w := &lockedBuffer{}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("log of the node:\n%s", w)
		}
	})
	return slog.New(slog.NewTextHandler(w, nil))
}

type lockedBuffer struct {
	mu sync.Mutex // guards b
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// startNode runs a node in this process until stop is called.
func startNode(t *testing.T, cfg nodeconfig.Config) (stop func() error) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- Run(ctx, cfg, "test", testLog(t)) }()
	stop = sync.OnceValue(func() error {
		cancel()
		return <-ended
	})
	t.Cleanup(func() {
		if err := stop(); err != nil {
			t.Errorf("node: %v", err)
		}
	})
	return stop
}

// page reads a path of the operations socket.
func page(cfg nodeconfig.Config, path string) (string, bool) {
	text, ok, err := client.Dial(fmt.Sprintf("@flotilla/%s:%d", cfg.Address, cfg.BalancerPort)).Ops(context.Background(), path)
	return text, ok && err == nil
}

func waitReady(t *testing.T, cfg nodeconfig.Config) {
	t.Helper()
	storetest.Wait(t, 30*time.Second, "the node to be ready", func() bool { _, ok := page(cfg, "/readyz"); return ok })
}

func waitFresh(t *testing.T, cfg nodeconfig.Config) {
	t.Helper()
	storetest.Wait(t, 30*time.Second, "the node to be fresh", func() bool { _, ok := page(cfg, "/freshz"); return ok })
}

// get asks the node's router for http://<service>/.
func get(cfg nodeconfig.Config, service string) (int, string) {
	req, err := http.NewRequest(http.MethodGet, fmt.Sprintf("http://%s/", net.JoinHostPort(cfg.Address, fmt.Sprint(cfg.HTTPPort))), nil)
	if err != nil {
		return 0, err.Error()
	}
	req.Host = service + ".example.com"
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: 5 * time.Second}
	resp, err := client.Do(req)
	if err != nil {
		return 0, err.Error()
	}
	defer func() { _ = resp.Body.Close() }()
	raw, err := io.ReadAll(resp.Body)
	if err != nil {
		return 0, err.Error()
	}
	return resp.StatusCode, string(raw)
}

func waitRouted(t *testing.T, cfg nodeconfig.Config, service, body string) {
	t.Helper()
	storetest.Wait(t, 30*time.Second, service+" to be routed", func() bool { code, text := get(cfg, service); return code == 200 && text == body })
}

// resolve asks the node's DNS server.
func resolve(t *testing.T, cfg nodeconfig.Config, name string) string {
	t.Helper()
	m := new(mdns.Msg)
	m.SetQuestion(mdns.Fqdn(name), mdns.TypeA)
	r, err := mdns.Exchange(m, net.JoinHostPort(cfg.Address, fmt.Sprint(cfg.DNSPort)))
	if err != nil || len(r.Answer) != 1 {
		t.Fatalf("resolve %s: %v, error %v", name, r, err)
	}
	return r.Answer[0].(*mdns.A).A.String()
}

// backend is a web server that answers with its name, and its address.
func backend(t *testing.T, name string) string {
	t.Helper()
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, name) }))
	t.Cleanup(s.Close)
	return strings.TrimPrefix(s.URL, "http://")
}

func open(t *testing.T, endpoint string) *store.Client {
	t.Helper()
	c, err := store.Open(store.Config{Endpoints: []string{endpoint}, Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c
}

func apply(t *testing.T, c *store.Client, ops ...store.Op) int64 {
	t.Helper()
	revision, err := c.Apply(t.Context(), ops)
	if err != nil {
		t.Fatal(err)
	}
	return revision
}

func status(t *testing.T, cfg nodeconfig.Config) (wire.Status, error) {
	return client.Get[wire.Status](t.Context(), client.Dial(cfg.Socket), "/v1/status", nil)
}

func TestNodeRoutesAndReports(t *testing.T) {
	endpoint := storetest.Start(t)
	cfg := testConfig(t, endpoint)
	stop := startNode(t, cfg)
	waitFresh(t, cfg)
	c := open(t, endpoint)
	web := backend(t, "web")
	node := client.Dial(cfg.Socket)

	scheme := "http"
	var w wire.Written
	err := node.Do(t.Context(), http.MethodPut, "/v1/services/web", url.Values{"wait": {"20s"}}, wire.ServiceChange{Scheme: &scheme, AddEndpoints: []string{web}}, &w)
	if err != nil || !w.Changed || len(w.Applied) != 1 || !w.Applied[0].Reached {
		t.Fatalf("set: %+v, error %v", w, err)
	}
	// Applied is applied: no waiting here.
	if code, text := get(cfg, "web"); code != 200 || text != "web" {
		t.Errorf("web answers %d %q", code, text)
	}
	if got := resolve(t, cfg, "web.local"); got != cfg.Address {
		t.Errorf("web.local is %s, want %s", got, cfg.Address)
	}
	// A plain put by hand is the same.
	again := backend(t, "other")
	apply(t, c, store.Put("/services/other/scheme", "http\n"), store.Put("/services/other/hosts/x", again))
	waitRouted(t, cfg, "other", "other")

	if kv, found, err := c.Get(t.Context(), "/flotilla/schema"); err != nil || !found || kv.Value != `{"v":1}` {
		t.Errorf("the schema is %+v, error %v", kv, err)
	}
	text, _ := page(cfg, "/metrics")
	for _, want := range []string{`flotilla_service_requests_total{code="2xx",service="web"} 1`, `flotilla_state_source{source="live"} 1`, "flotilla_store_drift_total 0", "flotilla_propagation_seconds_count 2"} {
		if !strings.Contains(text, want) {
			t.Errorf("metrics lack %s", want)
		}
	}
	if t.Failed() {
		t.Log(text)
	}
	if err := stop(); err != nil {
		t.Error(err)
	}
	for _, prefix := range []string{"/flotilla/cluster/nodes/", "/flotilla/reports/"} {
		if kvs, _, err := c.List(t.Context(), prefix); err != nil || len(kvs) > 0 {
			t.Errorf("what the stopped node said of itself is still there: %v, error %v", kvs, err)
		}
	}
}

func TestBootWithoutStore(t *testing.T) {
	endpoint := storetest.Start(t)
	cfg := testConfig(t, endpoint)
	web := backend(t, "web")
	apply(t, open(t, endpoint), store.Put("/services/web/scheme", "http"), store.Put("/services/web/hosts/1", web))
	stop := startNode(t, cfg)
	waitRouted(t, cfg, "web", "web")
	if err := stop(); err != nil {
		t.Fatal(err)
	}

	addr := storetest.Addr(t)
	cfg.EtcdEndpoints = []string{"http://" + netip.AddrPortFrom(addr, uint16(storetest.Port(t, addr))).String()}
	startNode(t, cfg)
	waitReady(t, cfg)
	waitRouted(t, cfg, "web", "web")
	if got := resolve(t, cfg, "web.local"); got != cfg.Address {
		t.Errorf("web.local is %s, want %s", got, cfg.Address)
	}
	if text, fresh := page(cfg, "/freshz"); fresh || !strings.HasPrefix(text, "stale: ") {
		t.Errorf("/freshz says %q", text)
	}
	st, err := status(t, cfg)
	if err != nil || st.Store.Live || st.Store.Source != wire.SourceSnapshot || st.Services != 1 {
		t.Errorf("status %+v, error %v", st.Store, err)
	}
}

func TestSecondNodeOnOneDirectoryIsRefused(t *testing.T) {
	endpoint := storetest.Start(t)
	cfg := testConfig(t, endpoint)
	startNode(t, cfg)
	waitReady(t, cfg)
	err := Run(t.Context(), cfg, "test", testLog(t))
	if err == nil || !strings.Contains(err.Error(), fmt.Sprintf("used by another node (pid %d)", os.Getpid())) {
		t.Errorf("error %v", err)
	}
}

func TestTakenPortNamesItsHolder(t *testing.T) {
	cfg := testConfig(t, storetest.Start(t))
	l, err := net.Listen("tcp", net.JoinHostPort(cfg.Address, fmt.Sprint(cfg.DNSPort)))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	// This process is the holder, so the node has to be another one.
	cmd := nodeProcess(t, cfg)
	var text bytes.Buffer
	cmd.Stderr = &text
	if err := cmd.Run(); err == nil {
		t.Error("the node ran")
	}
	if want := fmt.Sprintf("tcp port %d of --dns-port is held by", cfg.DNSPort); !strings.Contains(text.String(), want) || !strings.Contains(text.String(), fmt.Sprintf("(pid %d)", os.Getpid())) {
		t.Errorf("the node said %s", &text)
	}
}

func nodeProcess(t *testing.T, cfg nodeconfig.Config) *exec.Cmd {
	t.Helper()
	raw, err := json.Marshal(cfg)
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), nodeConfig+"="+string(raw))
	return cmd
}

func TestStartStop(t *testing.T) {
	endpoint := storetest.Start(t)
	cfg := testConfig(t, endpoint)
	run := func() {
		stop := startNode(t, cfg)
		waitFresh(t, cfg)
		if err := stop(); err != nil {
			t.Fatal(err)
		}
	}
	run() // what starts once per process
	http.DefaultClient.CloseIdleConnections()
	before := runtime.NumGoroutine()
	for range 19 {
		run()
	}
	storetest.Wait(t, 10*time.Second, "the goroutines of stopped nodes to end", func() bool {
		now := runtime.NumGoroutine()
		if now > before+5 {
			stacks := make([]byte, 1<<20)
			t.Logf("%d goroutines, %d before:\n%s", now, before, stacks[:runtime.Stack(stacks, true)])
			return false
		}
		return true
	})
}

func TestKillAndAdopt(t *testing.T) {
	endpoint := storetest.Start(t)
	cfg := testConfig(t, endpoint)
	web := backend(t, "web")
	apply(t, open(t, endpoint), store.Put("/services/web/scheme", "http"), store.Put("/services/web/hosts/1", web))
	node := nodeProcess(t, cfg)
	node.Stderr = os.Stderr
	if err := node.Start(); err != nil {
		t.Fatal(err)
	}
	waitRouted(t, cfg, "web", "web")
	waitFresh(t, cfg)
	before, err := status(t, cfg)
	if err != nil {
		t.Fatal(err)
	}
	if err := node.Process.Signal(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	_ = node.Wait()
	if code, text := get(cfg, "web"); code != 200 {
		t.Errorf("after the kill web answers %d %q", code, text)
	}
	startNode(t, cfg)
	waitFresh(t, cfg)
	after, err := status(t, cfg)
	if err != nil {
		t.Fatal(err)
	}
	if before.Router.Pid != after.Router.Pid || after.Router.Reloads != 0 {
		t.Errorf("HAProxy was pid %d and is %d, %d reloads", before.Router.Pid, after.Router.Pid, after.Router.Reloads)
	}
	waitRouted(t, cfg, "web", "web")
}

// Most endpoints vanish at once: they stay routed until somebody confirms it.
func TestMassDisappearance(t *testing.T) {
	endpoint := storetest.Start(t)
	cfg := testConfig(t, endpoint)
	web := backend(t, "web")
	var puts, deletes []store.Op
	for i := range 12 {
		key := fmt.Sprintf("/services/s%02d/", i)
		puts = append(puts, store.Put(key+"scheme", "http"), store.Put(key+"hosts/1", web))
		deletes = append(deletes, store.DeletePrefix(key))
	}
	c := open(t, endpoint)
	apply(t, c, puts...)
	startNode(t, cfg)
	waitRouted(t, cfg, "s03", "web")
	waitFresh(t, cfg)
	apply(t, c, deletes...)
	storetest.Wait(t, 10*time.Second, "the hold", func() bool {
		st, err := status(t, cfg)
		return err == nil && st.Held != nil && st.Held.Removed == 12
	})
	if code, text := get(cfg, "s03"); code != 200 {
		t.Errorf("a held endpoint answers %d %q", code, text)
	}
	if err := client.Dial(cfg.Socket).Do(t.Context(), http.MethodPost, "/v1/confirm", nil, nil, nil); err != nil {
		t.Fatal(err)
	}
	storetest.Wait(t, 20*time.Second, "the services to go", func() bool { code, _ := get(cfg, "s03"); return code == 404 })
	if st, err := status(t, cfg); err != nil || st.Held != nil || st.Services != 0 {
		t.Errorf("status %+v, error %v", st, err)
	}
}
