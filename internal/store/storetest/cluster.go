package storetest

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"sync"
	"syscall"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"flotilla/internal/store"
)

// memberEnv holds the configuration of the member that a child process runs.
const memberEnv = "FLOTILLA_STORETEST_MEMBER"

// Main runs the tests, or one member of a cluster if this process is one.
// Packages that use Member or StartCluster call it from TestMain:
//
//	func TestMain(m *testing.M) { storetest.Main(m) }
func Main(m *testing.M) {
	text, ok := os.LookupEnv(memberEnv)
	if !ok {
		os.Exit(m.Run())
	}
	var cfg store.ServerConfig
	if err := json.Unmarshal([]byte(text), &cfg); err != nil {
		fmt.Fprintln(os.Stderr, "configuration of the member:", err)
		os.Exit(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	go func() { // the test holds the other end: do not outlive it
		var b [1]byte
		_, _ = os.Stdin.Read(b[:])
		os.Exit(3)
	}()
	err := store.Serve(ctx, cfg, slog.New(slog.NewTextHandler(os.Stderr, nil)), func() { fmt.Println("ready") })
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "ended:", err)
		os.Exit(1)
	}
	os.Exit(0)
}

// Member is one member of the store in a process of its own.
type Member struct {
	Config store.ServerConfig
	t      testing.TB
	cmd    *exec.Cmd
	ended  chan struct{} // closed when the process has ended

	mu     sync.Mutex
	ready  bool   // guarded by mu
	output []byte // of all its processes; guarded by mu
}

// NewMember returns a member with an address, ports and a data directory of its
// own, which does not run yet. It ends with the test.
func NewMember(t testing.TB, name string, join ...string) *Member {
	t.Helper()
	addr := Addr(t)
	m := &Member{t: t, Config: store.ServerConfig{
		Name: name, DataDir: filepath.Join(t.TempDir(), "data"), Address: addr,
		ClientPort: Port(t, addr), PeerPort: Port(t, addr), Join: join, UnsafeNoFsync: true,
	}}
	t.Cleanup(func() {
		if m.cmd != nil {
			_ = m.cmd.Process.Kill()
			<-m.ended
		}
		if t.Failed() {
			t.Logf("output of %s:\n%s", name, m.Output())
		}
	})
	return m
}

// Endpoint returns the member's client endpoint.
func (m *Member) Endpoint() string {
	if m.Config.ClientTLS.Cert != "" {
		return "https://" + m.Address()
	}
	return "http://" + m.Address()
}

// Address returns host:clientport, as others join it.
func (m *Member) Address() string {
	return netip.AddrPortFrom(m.Config.Address, uint16(m.Config.ClientPort)).String()
}

// Start starts the process and returns at once.
func (m *Member) Start() {
	m.t.Helper()
	text, err := json.Marshal(m.Config)
	if err != nil {
		m.t.Fatal(err)
	}
	self, err := os.Executable()
	if err != nil {
		m.t.Fatal(err)
	}
	cmd := exec.Command(self)
	cmd.Env = append(os.Environ(), memberEnv+"="+string(text))
	cmd.Stdout, cmd.Stderr = memberOutput{m, true}, memberOutput{m, false}
	if _, err := cmd.StdinPipe(); err != nil {
		m.t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		m.t.Fatalf("start member %s: %v", m.Config.Name, err)
	}
	m.mu.Lock()
	m.ready = false
	m.mu.Unlock()
	ended := make(chan struct{})
	m.cmd, m.ended = cmd, ended
	go func() {
		_ = cmd.Wait()
		close(ended)
	}()
}

// memberOutput collects what a member writes.
type memberOutput struct {
	m      *Member
	stdout bool // where it says that it is ready
}

func (o memberOutput) Write(b []byte) (int, error) {
	o.m.mu.Lock()
	defer o.m.mu.Unlock()
	if o.stdout {
		o.m.ready = true
	}
	o.m.output = append(o.m.output, b...)
	return len(b), nil
}

// Output returns what the member's processes have written so far.
func (m *Member) Output() string {
	m.mu.Lock()
	defer m.mu.Unlock()
	return string(m.output)
}

// Ready waits until the member serves.
func (m *Member) Ready() {
	m.t.Helper()
	Wait(m.t, startLimit, "member "+m.Config.Name+" to be ready", func() bool {
		select {
		case <-m.ended:
			m.t.Fatalf("member %s has ended:\n%s", m.Config.Name, m.Output())
		default:
		}
		m.mu.Lock()
		defer m.mu.Unlock()
		return m.ready
	})
}

// Ended waits until the process has ended and returns its exit code.
func (m *Member) Ended() int {
	m.t.Helper()
	select {
	case <-m.ended:
	case <-time.After(startLimit):
		m.t.Fatalf("member %s still runs after %s", m.Config.Name, startLimit)
	}
	return m.cmd.ProcessState.ExitCode()
}

// Terminate ends the process in the normal way and waits for it.
func (m *Member) Terminate() int {
	m.t.Helper()
	m.signal(syscall.SIGTERM)
	return m.Ended()
}

// Kill ends the process as a crash would and waits for it.
func (m *Member) Kill() {
	m.t.Helper()
	m.signal(syscall.SIGKILL)
	m.Ended()
}

// Stop freezes the process until Cont.
func (m *Member) Stop() { m.t.Helper(); m.signal(syscall.SIGSTOP) }

// Cont ends Stop.
func (m *Member) Cont() { m.t.Helper(); m.signal(syscall.SIGCONT) }

func (m *Member) signal(s syscall.Signal) {
	m.t.Helper()
	if err := m.cmd.Process.Signal(s); err != nil {
		m.t.Fatalf("signal %s to member %s: %v", s, m.Config.Name, err)
	}
}

// Cluster is a store of several members, each in its own process.
type Cluster struct{ Members []*Member }

// StartCluster starts n members, 1 or 3, the others joining the first, and
// waits until all are voters. The package's TestMain must call Main.
func StartCluster(t testing.TB, n int) *Cluster {
	t.Helper()
	c := &Cluster{}
	for i := range n {
		var join []string
		if i > 0 {
			join = []string{c.Members[0].Address()}
		}
		m := NewMember(t, fmt.Sprintf("n%d", i+1), join...)
		c.Members = append(c.Members, m)
		m.Start()
		if i == 0 {
			m.Ready()
		}
	}
	for _, m := range c.Members {
		m.Ready()
	}
	Wait(t, startLimit, "all members to be voters", func() bool { return len(Voters(c.Members[0].Endpoint())) == n })
	return c
}

// Endpoints returns the client endpoints of all members.
func (c *Cluster) Endpoints() []string {
	var all []string
	for _, m := range c.Members {
		all = append(all, m.Endpoint())
	}
	return all
}

// Leader returns the index of the member that leads, waiting for one.
func (c *Cluster) Leader(t testing.TB) int {
	t.Helper()
	leader := -1
	Wait(t, startLimit, "a leader", func() bool {
		for i, m := range c.Members {
			if st, err := status(m.Endpoint()); err == nil && st.Leader == st.Header.MemberId {
				leader = i
			}
		}
		return leader >= 0
	})
	return leader
}

// Kill crashes member i.
func (c *Cluster) Kill(i int) { c.Members[i].Kill() }

// Stop freezes member i until Cont.
func (c *Cluster) Stop(i int) { c.Members[i].Stop() }

// Cont ends Stop of member i.
func (c *Cluster) Cont(i int) { c.Members[i].Cont() }

// Restart starts member i again after Kill or Terminate, and returns at once.
func (c *Cluster) Restart(i int) { c.Members[i].Start() }

// Voters returns the names of the voting members that the endpoint knows, or
// nil if it does not answer.
func Voters(endpoint string) []string {
	var names []string
	ask(endpoint, func(ctx context.Context, c *clientv3.Client) {
		list, err := c.MemberList(ctx)
		if err != nil {
			return
		}
		for _, m := range list.Members {
			if !m.IsLearner {
				names = append(names, m.Name)
			}
		}
	})
	return names
}

func status(endpoint string) (st *clientv3.StatusResponse, err error) {
	ask(endpoint, func(ctx context.Context, c *clientv3.Client) { st, err = c.Status(ctx, endpoint) })
	return st, err
}

func ask(endpoint string, question func(context.Context, *clientv3.Client)) {
	c, err := clientv3.NewFromURL(endpoint)
	if err != nil {
		return
	}
	defer func() { _ = c.Close() }()
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	question(ctx, c)
}
