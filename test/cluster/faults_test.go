package cluster

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"flotilla/internal/store/storetest"
	"flotilla/internal/wire"
)

// TestFaults breaks one thing after another in one cluster. Whatever breaks in
// the control plane, no request is lost; what breaks in one node's data plane is
// seen on that node alone; and every change reaches every node in the end.
func TestFaults(t *testing.T) {
	nodes := startCluster(t, 60+syscall.Getpid()%150)
	stable := endpoint(t, "stable")
	etcdctl(t, nodes, "put", "/services/web/scheme", "http")
	etcdctl(t, nodes, "put", "/services/web/hosts/1", stable)
	routed(t, nodes, "web", "stable")

	change := 0
	// changes registers a new service through some nodes' stores and waits until
	// others route it.
	changes := func(t *testing.T, through, seen []*node) {
		t.Helper()
		change++
		name := fmt.Sprintf("svc%d", change)
		for _, kv := range [][2]string{{"scheme", "http"}, {"hosts/1", stable}} {
			// While the store elects a leader a write may fail.
			wait(t, "put "+name, func() string {
				_, err := tryEtcdctl(through, "put", "/services/"+name+"/"+kv[0], kv[1])
				return errorText(err)
			})
		}
		routed(t, seen, name, "stable")
	}

	// Whatever a node does, it has two watches on the store: also the leader, and one
	// that was just asked for what the others report.
	t.Run("two watches of each node", func(t *testing.T) {
		for _, n := range nodes {
			resp, err := n.api().Get("http://node/v1/nodes")
			if err != nil {
				t.Fatal(err)
			}
			_ = resp.Body.Close()
		}
		wait(t, "the watches", func() string {
			if got := watches(t, nodes); got != 2*len(nodes) {
				return fmt.Sprintf("%d watches of %d nodes", got, len(nodes))
			}
			return ""
		})
	})

	t.Run("the node process is killed", func(t *testing.T) {
		l := startTraffic(nodes)
		haproxy := nodes[1].pid(haproxyPid)
		nodes[1].signal(syscall.SIGKILL)
		changes(t, nodes, []*node{nodes[0], nodes[2]})
		if got := nodes[1].ops("/"); got != 200 {
			t.Errorf("balancer check without the node process: %d, want 200", got)
		}
		nodes[1].start()
		nodes[1].until("back", live)
		routed(t, nodes, fmt.Sprintf("svc%d", change), "stable")
		if now := nodes[1].pid(haproxyPid); now != haproxy {
			t.Errorf("HAProxy was replaced: pid %d, was %d", now, haproxy)
		}
		l.end(t)
	})

	t.Run("the store's leader is killed", func(t *testing.T) {
		l := startTraffic(nodes)
		leader := leaderOf(t, nodes)
		old := leader.pid(storePid)
		kill(t, old, syscall.SIGKILL)
		var others []*node
		for _, n := range nodes {
			if n != leader {
				others = append(others, n)
			}
		}
		changes(t, others, nodes)
		wait(t, "a new store process", func() string {
			if now := leader.pid(storePid); now == old {
				return "still the old pid"
			}
			return ""
		})
		for _, n := range nodes {
			n.until("live again", live)
		}
		l.end(t)
	})

	t.Run("a store member hangs", func(t *testing.T) {
		l := startTraffic(nodes)
		pid := nodes[2].pid(storePid)
		kill(t, pid, syscall.SIGSTOP)
		changes(t, nodes[:2], nodes)
		kill(t, pid, syscall.SIGCONT)
		changes(t, nodes, nodes)
		l.end(t)
	})

	t.Run("the watch falls behind a compaction", func(t *testing.T) {
		l := startTraffic(nodes)
		nodes[1].signal(syscall.SIGSTOP)
		for i := range 20 {
			etcdctl(t, nodes[:1], "put", "/services/web/hosts/1", stable)
			_ = i
		}
		etcdctl(t, nodes[:1], "del", "/services/svc1", "--prefix")
		out := etcdctl(t, nodes[:1], "get", "/services/web/hosts/1", "-w", "fields")
		var revision int
		for line := range strings.SplitSeq(out, "\n") {
			if _, err := fmt.Sscanf(line, `"Revision" : %d`, &revision); err == nil {
				break
			}
		}
		etcdctl(t, nodes[:1], "compact", fmt.Sprint(revision))
		changes(t, nodes[:1], []*node{nodes[0], nodes[2]})
		nodes[1].signal(syscall.SIGCONT)
		routed(t, nodes, fmt.Sprintf("svc%d", change), "stable")
		routed(t, nodes, "svc1", "404")
		l.end(t)
	})

	t.Run("the store is away, also at boot", func(t *testing.T) {
		l := startTraffic(nodes)
		var pids []int
		for _, n := range nodes {
			pids = append(pids, n.pid(storePid))
			kill(t, pids[len(pids)-1], syscall.SIGSTOP)
		}
		stale := func(s wire.Status) bool { return !s.Store.Live && s.Router.Serving }
		for _, n := range nodes {
			n.until("says stale", stale)
			if ready, fresh := n.ops("/readyz"), n.ops("/freshz"); ready != 200 || fresh != 503 {
				t.Errorf("%s: readyz %d freshz %d, want 200 and 503", n.name, ready, fresh)
			}
		}
		l.end(t)
		// The whole data plane of a node and the node itself go; what comes back
		// has nothing but its disk.
		l = startTraffic(nodes)
		nodes[0].signal(syscall.SIGKILL)
		kill(t, nodes[0].pid(haproxyPid), syscall.SIGKILL)
		nodes[0].start()
		nodes[0].until("serves from disk", stale)
		routed(t, nodes[:1], "web", "stable")
		for _, pid := range pids {
			kill(t, pid, syscall.SIGCONT)
		}
		for _, n := range nodes {
			n.until("live again", live)
		}
		changes(t, nodes, nodes)
		l.end(t, 0)
	})

	t.Run("a disk is full", func(t *testing.T) {
		l := startTraffic(nodes)
		ballast := filepath.Join(nodes[2].data, "ballast")
		fill(t, ballast)
		changes(t, nodes[:2], nodes)
		// The store writes until it cannot; it must not take the node with it.
		for range 100 {
			etcdctl(t, nodes[:1], "put", "/elsewhere", strings.Repeat("x", 100<<10))
		}
		changes(t, nodes[:2], nodes)
		l.end(t)
		kill(t, nodes[2].pid(haproxyPid), syscall.SIGKILL)
		wait(t, "HAProxy ends", func() string {
			if nodes[2].ops("/") != 0 {
				return "it answers"
			}
			return ""
		})
		routed(t, nodes, "web", "stable")
		l = startTraffic(nodes)
		if err := os.Remove(ballast); err != nil {
			t.Fatal(err)
		}
		wait(t, "the store on the disk is back", func() string {
			_, err := tryEtcdctl(nodes[2:], "endpoint", "health")
			return errorText(err)
		})
		changes(t, nodes[2:], nodes)
		l.end(t)
	})

	t.Run("HAProxy is killed", func(t *testing.T) {
		l := startTraffic(nodes)
		began := time.Now()
		kill(t, nodes[2].pid(haproxyPid), syscall.SIGKILL)
		status, err := nodes[2].status()
		if err != nil {
			t.Fatal(err)
		}
		_ = syscall.Kill(status.Router.Pid, syscall.SIGKILL) // the worker may have gone with its master
		routed(t, nodes[2:], "web", "stable")
		t.Logf("served again after %v", time.Since(began).Round(time.Millisecond))
		changes(t, nodes, nodes)
		l.end(t, 2)
	})
}

// fill takes all room that is left on the disk of path.
func fill(t *testing.T, path string) {
	t.Helper()
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = f.Close() }()
	block := make([]byte, 1<<20)
	for err == nil {
		_, err = f.Write(block)
	}
	if !errors.Is(err, syscall.ENOSPC) {
		t.Fatalf("fill the disk: %v", err)
	}
}

// TestExternalEtcd runs a node on an etcd that is not ours, and takes members of
// it away.
func TestExternalEtcd(t *testing.T) {
	c := storetest.StartCluster(t, 3)
	n := newNode(t, t.TempDir(), "n1", fmt.Sprintf("127.0.%d.9", 60+syscall.Getpid()%150), "--etcd-endpoints", strings.Join(c.Endpoints(), ","))
	n.start()
	n.until("live", live)
	if _, err := os.Stat(filepath.Join(n.data, storePid)); err == nil {
		t.Error("a store was started beside the external one")
	}
	first, second := endpoint(t, "first"), endpoint(t, "second")
	put := func(key, value string) {
		t.Helper()
		wait(t, "put "+key, func() string {
			cmd := exec.Command("etcdctl", "--endpoints", strings.Join(c.Endpoints(), ","), "--command-timeout", "10s", "put", key, value)
			cmd.Env = append(os.Environ(), "ETCDCTL_API=3")
			out, err := cmd.CombinedOutput()
			if err != nil {
				return string(out)
			}
			return ""
		})
	}
	put("/services/web/scheme", "http")
	put("/services/web/hosts/1", first)
	routed(t, []*node{n}, "web", "first")
	leader := c.Leader(t)
	c.Kill(leader)
	put("/services/web/hosts/1", second)
	routed(t, []*node{n}, "web", "second")
	c.Restart(leader)
	c.Members[leader].Ready()
	c.Stop((leader + 1) % 3)
	put("/services/web/hosts/1", first)
	routed(t, []*node{n}, "web", "first")
	c.Cont((leader + 1) % 3)
}

// watches returns how many watches the members of the store have, by their own count.
func watches(t *testing.T, nodes []*node) int {
	t.Helper()
	sum := 0
	for _, n := range nodes {
		resp, err := oneShot.Get(fmt.Sprintf("http://%s:%d/metrics", n.address, clientPort))
		if err != nil {
			t.Fatal(err)
		}
		text, err := io.ReadAll(resp.Body)
		_ = resp.Body.Close()
		if err != nil {
			t.Fatal(err)
		}
		_, rest, found := strings.Cut(string(text), "\netcd_debugging_mvcc_watcher_total ")
		count := 0
		if _, err := fmt.Sscan(rest, &count); !found || err != nil {
			t.Fatalf("%s: no count of watches: %v", n.name, err)
		}
		sum += count
	}
	return sum
}

// leaderOf returns the node whose store leads.
func leaderOf(t *testing.T, nodes []*node) *node {
	t.Helper()
	for _, n := range nodes {
		// endpoint, id, version, size, leader, ...
		if f := strings.Split(etcdctl(t, []*node{n}, "endpoint", "status"), ", "); len(f) > 4 && f[4] == "true" {
			return n
		}
	}
	t.Fatal("no store leads")
	return nil
}
