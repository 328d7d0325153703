// Package cluster tests three whole nodes: the built program, real etcd, real
// HAProxy, and faults under load.
package cluster

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"flotilla/internal/store/storetest"
	"flotilla/internal/wire"
)

// program is the built flotillad; bin/ is not kept in the repository.
const program = "../../bin/flotillad-test"

func TestMain(m *testing.M) {
	// A member of storetest's cluster is this program, too.
	if _, member := os.LookupEnv("FLOTILLA_STORETEST_MEMBER"); member {
		storetest.Main(m)
	}
	if out, err := exec.Command("go", "build", "-o", program, "flotilla/cmd/flotillad").CombinedOutput(); err != nil {
		fmt.Fprintf(os.Stderr, "build: %v\n%s", err, out)
		os.Exit(1)
	}
	storetest.Main(m)
}

const (
	httpPort     = 18080
	balancerPort = 19180
	clientPort   = 12379
)

// node is one node's process; its store and HAProxy are known by pid files.
type node struct {
	t       *testing.T
	name    string
	address string
	data    string
	args    []string
	process *exec.Cmd
}

func (n *node) start() {
	n.t.Helper()
	n.process = exec.Command(program, n.args...)
	log, err := os.OpenFile(filepath.Join(filepath.Dir(n.data), n.name+".log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		n.t.Fatal(err)
	}
	defer func() { _ = log.Close() }()
	n.process.Stdout, n.process.Stderr = log, log
	if err := n.process.Start(); err != nil {
		n.t.Fatal(err)
	}
}

// signal sends a signal to the node's process and waits for its end if that is
// what the signal means.
func (n *node) signal(s syscall.Signal) {
	n.t.Helper()
	if err := n.process.Process.Signal(s); err != nil {
		n.t.Fatalf("%s: %v", n.name, err)
	}
	if s == syscall.SIGKILL || s == syscall.SIGTERM {
		_ = n.process.Wait()
	}
}

// pid returns the process in a pid file below the node's data directory.
func (n *node) pid(file string) int {
	n.t.Helper()
	text, err := os.ReadFile(filepath.Join(n.data, file))
	if err != nil {
		n.t.Fatal(err)
	}
	var pid int
	if _, err := fmt.Sscan(string(text), &pid); err != nil {
		n.t.Fatal(err)
	}
	return pid
}

const (
	storePid   = "store.pid"
	haproxyPid = "router/haproxy.pid"
)

func kill(t *testing.T, pid int, s syscall.Signal) {
	t.Helper()
	if err := syscall.Kill(pid, s); err != nil {
		t.Fatalf("signal %v to %d: %v", s, pid, err)
	}
}

// api returns a client of the node's API.
func (n *node) api() *http.Client {
	return &http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "unix", filepath.Join(n.data, "node.sock"))
		},
	}}
}

func (n *node) status() (wire.Status, error) {
	var s wire.Status
	resp, err := n.api().Get("http://node/v1/status")
	if err != nil {
		return s, err
	}
	defer func() { _ = resp.Body.Close() }()
	return s, json.NewDecoder(resp.Body).Decode(&s)
}

// until waits for a state of the node.
func (n *node) until(what string, ok func(wire.Status) bool) {
	n.t.Helper()
	wait(n.t, n.name+" "+what, func() string {
		s, err := n.status()
		if err == nil && ok(s) {
			return ""
		}
		return fmt.Sprintf("%v %+v", err, s)
	})
}

func wait(t *testing.T, what string, f func() string) {
	t.Helper()
	var why string
	for limit := time.Now().Add(45 * time.Second); time.Now().Before(limit); time.Sleep(50 * time.Millisecond) {
		if why = f(); why == "" {
			return
		}
	}
	t.Fatalf("%s: not in time: %s", what, why)
}

func live(s wire.Status) bool { return s.Store.Live && s.Router.Serving }

// get asks the node for a service and returns the first word of the answer, or
// the status.
func (n *node) get(service string) string {
	resp, err := oneShot.Get(fmt.Sprintf("http://%s:%d/%s", n.address, httpPort, service))
	if err != nil {
		return err.Error()
	}
	defer func() { _ = resp.Body.Close() }()
	if resp.StatusCode != http.StatusOK {
		return fmt.Sprint(resp.StatusCode)
	}
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		return err.Error()
	}
	return string(body)
}

var oneShot = &http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}

func (n *node) ops(path string) int {
	n.t.Helper()
	resp, err := oneShot.Get(fmt.Sprintf("http://%s:%d%s", n.address, balancerPort, path))
	if err != nil {
		return 0
	}
	_ = resp.Body.Close()
	return resp.StatusCode
}

// endpoint serves HTTP on an address of its own and answers with its name.
func endpoint(t *testing.T, name string) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, name) })}
	go func() { _ = server.Serve(l) }()
	t.Cleanup(func() { _ = server.Close() })
	return l.Addr().String()
}

// etcdctl runs the users' own tool against some of the nodes' stores.
func etcdctl(t *testing.T, nodes []*node, args ...string) string {
	t.Helper()
	out, err := tryEtcdctl(nodes, args...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func tryEtcdctl(nodes []*node, args ...string) (string, error) {
	var endpoints []string
	for _, n := range nodes {
		endpoints = append(endpoints, fmt.Sprintf("http://%s:%d", n.address, clientPort))
	}
	cmd := exec.Command("etcdctl", append([]string{"--endpoints", strings.Join(endpoints, ","), "--dial-timeout", "3s", "--command-timeout", "10s"}, args...)...)
	cmd.Env = append(os.Environ(), "ETCDCTL_API=3")
	out, err := cmd.CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("etcdctl %v: %w: %s", args, err, out)
	}
	return string(out), nil
}

func errorText(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}

// traffic asks every node for the service web all the time, half of it on kept
// connections, and counts by node.
type traffic struct {
	sent, failed [3]atomic.Int64
	mu           sync.Mutex // guards first
	first        string
	stop         chan struct{}
	wg           sync.WaitGroup
}

func startTraffic(nodes []*node) *traffic {
	l := &traffic{stop: make(chan struct{})}
	for i, n := range nodes {
		for _, keep := range []bool{false, true} {
			l.wg.Go(func() { l.run(i, n, keep) })
		}
	}
	return l
}

func (l *traffic) run(i int, n *node, keep bool) {
	transport := &http.Transport{DisableKeepAlives: !keep}
	defer transport.CloseIdleConnections()
	client := &http.Client{Timeout: 5 * time.Second, Transport: transport}
	pace := time.NewTicker(5 * time.Millisecond)
	defer pace.Stop()
	for {
		select {
		case <-l.stop:
			return
		case <-pace.C:
		}
		l.sent[i].Add(1)
		// A POST: the client does not repeat it by itself.
		resp, err := client.Post(fmt.Sprintf("http://%s:%d/web", n.address, httpPort), "text/plain", http.NoBody)
		if err == nil {
			if _, err = io.ReadAll(resp.Body); err == nil && resp.StatusCode != http.StatusOK {
				err = fmt.Errorf("status %d", resp.StatusCode)
			}
			_ = resp.Body.Close()
		}
		if err != nil {
			l.failed[i].Add(1)
			l.mu.Lock()
			if l.first == "" {
				l.first = n.name + ": " + err.Error()
			}
			l.mu.Unlock()
		}
	}
}

// end stops the traffic and fails the test if a node lost a request, but for
// those that are spared.
func (l *traffic) end(t *testing.T, spared ...int) {
	t.Helper()
	close(l.stop)
	l.wg.Wait()
	for i := range l.sent {
		t.Logf("n%d: %d requests, %d failed", i+1, l.sent[i].Load(), l.failed[i].Load())
		if l.sent[i].Load() == 0 {
			t.Errorf("n%d was not asked at all", i+1)
		}
		excused := false
		for _, s := range spared {
			excused = excused || s == i
		}
		if l.failed[i].Load() > 0 && !excused {
			t.Errorf("n%d lost %d of %d requests; the first: %s", i+1, l.failed[i].Load(), l.sent[i].Load(), l.first)
		}
	}
}

// newNode returns a node that is not started yet.
func newNode(t *testing.T, dir, name, address string, args ...string) *node {
	n := &node{t: t, name: name, address: address, data: filepath.Join(dir, name)}
	n.args = append([]string{"node", "--units", "off", "--name", name, "--address", n.address, "--data", n.data, "--socket", filepath.Join(n.data, "node.sock"),
		"--http-port", fmt.Sprint(httpPort), "--https-port", "18443", "--dns-port", "15353", "--dns-upstream", "none",
		"--balancer-port", fmt.Sprint(balancerPort), "--redirect-port", "19181", "--host-ports", "listeners",
		"--store-client-port", fmt.Sprint(clientPort), "--store-peer-port", "12380", "--max-connections", "1000"}, args...)
	t.Cleanup(func() {
		if n.process == nil {
			return
		}
		_ = n.process.Process.Signal(syscall.SIGCONT)
		n.signal(syscall.SIGTERM)
		if t.Failed() {
			log, _ := os.ReadFile(filepath.Join(dir, n.name+".log"))
			t.Logf("log of %s:\n%.6000s", n.name, log)
		}
	})
	return n
}

// startCluster starts three nodes; the last one's data is on a disk of its own
// of 400 MiB.
func startCluster(t *testing.T, net int) []*node {
	t.Helper()
	dir := t.TempDir()
	var nodes []*node
	for i := range 3 {
		var args []string
		if i > 0 {
			args = []string{"--join", nodes[0].address}
		}
		if i == 2 {
			smallDisk(t, filepath.Join(dir, "n3"))
		}
		n := newNode(t, dir, fmt.Sprintf("n%d", i+1), fmt.Sprintf("127.0.%d.%d", net, i+1), args...)
		nodes = append(nodes, n)
		n.start()
		if i == 0 {
			n.until("first", live)
		}
	}
	wait(t, "three voters", func() string {
		out := etcdctl(t, nodes[:1], "member", "list")
		if strings.Count(out, "started") == 3 && strings.Count(out, ", false") == 3 {
			return ""
		}
		return out
	})
	for _, n := range nodes {
		n.until("live", live)
	}
	return nodes
}

func smallDisk(t *testing.T, dir string) {
	t.Helper()
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, "size=400m"); err != nil {
		t.Fatalf("mount a small disk: %v: run the tests as root", err)
	}
	t.Cleanup(func() {
		if err := syscall.Unmount(dir, syscall.MNT_DETACH); err != nil {
			t.Errorf("unmount: %v", err)
		}
	})
}

// routed waits until every given node answers for the service as wanted.
func routed(t *testing.T, nodes []*node, service, want string) {
	t.Helper()
	for _, n := range nodes {
		wait(t, n.name+" routes "+service, func() string {
			if got := n.get(service); got != want {
				return fmt.Sprintf("got %s, want %s", got, want)
			}
			return ""
		})
	}
}
