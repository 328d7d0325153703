package store_test

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"flotilla/internal/store"
	"flotilla/internal/store/storetest"
)

func TestMain(m *testing.M) { storetest.Main(m) }

func TestServerConfigValidate(t *testing.T) {
	good := store.ServerConfig{Name: "n", DataDir: "/d", Address: netip.MustParseAddr("127.0.0.1"), ClientPort: 2379, PeerPort: 2380}
	if err := good.Validate(); err != nil {
		t.Error(err)
	}
	for want, change := range map[string]func(*store.ServerConfig){
		"no name":                 func(c *store.ServerConfig) { c.Name = "" },
		"equals sign":             func(c *store.ServerConfig) { c.Name = "a=b" },
		"no data directory":       func(c *store.ServerConfig) { c.DataDir = "" },
		"no address":              func(c *store.ServerConfig) { c.Address = netip.IPv4Unspecified() },
		"two different ports":     func(c *store.ServerConfig) { c.PeerPort = 2379 },
		"open to everybody":       func(c *store.ServerConfig) { c.Address = netip.MustParseAddr("10.0.0.1") },
		"certificate, key and CA": func(c *store.ServerConfig) { c.PeerTLS.Cert = "x" },
		"neither host nor":        func(c *store.ServerConfig) { c.Join = []string{"http://a/b"} },
	} {
		c := good
		change(&c)
		if err := c.Validate(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v, want %q", err, want)
		}
	}
	good.Address, good.Insecure = netip.MustParseAddr("10.0.0.1"), true
	if err := good.Validate(); err != nil {
		t.Error(err)
	}
}

// follow runs a client and a reflector on the cluster.
func follow(t *testing.T, local string, endpoints ...string) (*store.Client, *store.Reflector, *mirror) {
	c, err := store.Open(store.Config{Endpoints: endpoints, Local: local, Logger: logger(t)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	start(t, c.Run)
	r := store.NewReflector(c, "/a/", "/fresh", logger(t))
	m := reflect(t, r)
	storetest.Wait(t, 10*time.Second, "the first list", func() bool { return r.Status().Live })
	return c, r, m
}

// write puts the key until that succeeds, and returns its revision.
func write(t *testing.T, c *store.Client, key string) (rev int64) {
	t.Helper()
	storetest.Wait(t, 30*time.Second, "a write of "+key, func() bool {
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		var err error
		rev, err = c.Apply(ctx, []store.Op{store.Put(key, "x")})
		return err == nil
	})
	return rev
}

// TestFirstMemberKilled: who was there when the store had one member knows the
// others as soon as they vote, and does without the first.
func TestFirstMemberKilled(t *testing.T) {
	t.Parallel()
	n1 := storetest.NewMember(t, "n1")
	n1.Start()
	n1.Ready()
	c, _, _ := follow(t, n1.Endpoint(), n1.Endpoint())
	for _, name := range []string{"n2", "n3"} {
		storetest.NewMember(t, name, n1.Address()).Start()
	}
	storetest.Wait(t, 60*time.Second, "all members to be voters", func() bool { return len(storetest.Voters(n1.Endpoint())) == 3 })
	storetest.Wait(t, 8*time.Second, "all members to be in use", func() bool { return len(c.Endpoints()) == 3 })
	n1.Kill()
	write(t, c, "/a/after-kill")
}

func TestClusterSurvives(t *testing.T) {
	t.Parallel()
	cl := storetest.StartCluster(t, 3)
	// One endpoint is configured; the others are found.
	c, r, m := follow(t, "", cl.Members[0].Endpoint())
	write(t, c, "/a/first")
	storetest.Wait(t, 10*time.Second, "all members to be in use", func() bool { return len(c.Endpoints()) == 3 })

	t.Run("a fourth member is not taken", func(t *testing.T) {
		extra := storetest.NewMember(t, "n4", cl.Members[0].Address())
		extra.Start()
		if code := extra.Ended(); code != 1 || !strings.Contains(extra.Output(), store.ErrEnoughVoters.Error()) {
			t.Errorf("exit %d: %s", code, extra.Output())
		}
	})
	t.Run("status", func(t *testing.T) {
		h := c.Status(t.Context())
		leaders := 0
		for _, m := range h.Members {
			if m.Leader {
				leaders++
			}
			if m.Learner || !m.Reachable || m.Err != "" {
				t.Errorf("%+v", m)
			}
		}
		if !h.Quorum || len(h.Members) != 3 || leaders != 1 {
			t.Errorf("%+v", h)
		}
	})
	t.Run("leader killed", func(t *testing.T) {
		leader := cl.Leader(t)
		cl.Kill(leader)
		begin := time.Now()
		rev := write(t, c, "/a/after-kill")
		t.Logf("writes again after %s", time.Since(begin))
		storetest.Wait(t, 20*time.Second, "the event", func() bool { return m.at() >= rev })
		cl.Restart(leader)
		cl.Members[leader].Ready()
		storetest.Wait(t, 20*time.Second, "all members to be in use", func() bool { return len(c.Endpoints()) == 3 })
	})
	t.Run("the member in use hangs", func(t *testing.T) {
		used := slices.Index(cl.Endpoints(), c.Endpoints()[0])
		if used == cl.Leader(t) { // freeze a follower: another client that prefers one
			used = (used + 1) % 3
		}
		c, r, m := follow(t, cl.Members[used].Endpoint(), cl.Endpoints()...)
		storetest.Wait(t, 20*time.Second, "the follower to be in use", func() bool { return c.Endpoints()[0] == cl.Members[used].Endpoint() })
		cl.Stop(used)
		begin := time.Now()
		storetest.Wait(t, 20*time.Second, "a read through the client", func() bool {
			_, _, err := c.Get(t.Context(), "/a/first")
			return err == nil && c.Endpoints()[0] != cl.Members[used].Endpoint()
		})
		t.Logf("reads again after %s", time.Since(begin))
		rev := write(t, c, "/a/during-stop")
		storetest.Wait(t, 20*time.Second, "the event", func() bool { return m.at() >= rev && r.Status().Live })
		t.Logf("events again after %s", time.Since(begin))
		cl.Cont(used)
		storetest.Wait(t, 30*time.Second, "the local member to be preferred again", func() bool { return c.Endpoints()[0] == cl.Members[used].Endpoint() })
	})
	t.Run("all killed and started again", func(t *testing.T) {
		before := len(m.copy())
		lists := r.Status().Lists
		for i := range cl.Members {
			cl.Kill(i)
		}
		storetest.Wait(t, 20*time.Second, "the reflector to notice", func() bool { return !r.Status().Live })
		if h := c.Status(t.Context()); h.Quorum || h.Err == "" {
			t.Errorf("%+v", h)
		}
		for i := range cl.Members {
			cl.Restart(i)
		}
		rev := write(t, c, "/a/after-restart")
		storetest.Wait(t, 30*time.Second, "the event", func() bool { return m.at() >= rev && r.Status().Live })
		if n := len(m.copy()); n != before+1 || r.Status().Lists != lists {
			t.Errorf("%d keys, want %d; %d lists, want %d", n, before+1, r.Status().Lists, lists)
		}
		for _, u := range m.updates[1:] {
			if u.Reset {
				t.Errorf("a list was delivered again: %+v", u)
			}
		}
	})
	t.Run("emptied data directory is refused", func(t *testing.T) {
		victim := cl.Members[1]
		victim.Ready()
		if code := victim.Terminate(); code != 0 {
			t.Errorf("exit %d at a normal stop", code)
		}
		if err := os.RemoveAll(victim.Config.DataDir); err != nil {
			t.Fatal(err)
		}
		victim.Start()
		if code := victim.Ended(); code != 1 || !strings.Contains(victim.Output(), "etcdctl member remove") {
			t.Errorf("exit %d", code)
		}
		// As somebody new it may not come in either while the old one has a vote.
		if err := os.Remove(victim.Config.DataDir + ".member"); err != nil {
			t.Fatal(err)
		}
		victim.Config.Join = []string{cl.Members[0].Address()}
		victim.Start()
		if code := victim.Ended(); code != 1 || !strings.Contains(victim.Output(), "already has a voting member") {
			t.Errorf("exit %d", code)
		}
		// The remedy works.
		etcd := raw(t, cl.Members[0].Endpoint())
		id := memberID(t, etcd, "n2-")
		if _, err := etcd.MemberRemove(t.Context(), id); err != nil {
			t.Fatal(err)
		}
		victim.Start()
		victim.Ready()
		storetest.Wait(t, 30*time.Second, "three voters again", func() bool { return len(storetest.Voters(cl.Members[0].Endpoint())) == 3 })
	})
	t.Run("a removed member says so", func(t *testing.T) {
		etcd := raw(t, cl.Members[0].Endpoint())
		id := memberID(t, etcd, "n3-")
		storetest.Wait(t, 30*time.Second, "the new member to be trusted", func() bool { // etcd waits 5 s
			_, err := etcd.MemberRemove(t.Context(), id)
			return err == nil
		})
		removed := cl.Members[2]
		if code := removed.Ended(); code != 1 || !strings.Contains(removed.Output(), store.ErrRemoved.Error()) {
			t.Errorf("exit %d", code)
		}
		before := len(removed.Output())
		removed.Start()
		if code := removed.Ended(); code != 1 || !strings.Contains(removed.Output()[before:], store.ErrRemoved.Error()) {
			t.Errorf("second start: exit %d", code)
		}
	})
}

func memberID(t *testing.T, etcd *clientv3.Client, prefix string) uint64 {
	t.Helper()
	list, err := etcd.MemberList(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range list.Members {
		if strings.HasPrefix(m.Name, prefix) {
			return m.ID
		}
	}
	t.Fatalf("no member %s*", prefix)
	return 0
}

func TestTwoMembersStayOneVoter(t *testing.T) {
	first := storetest.NewMember(t, "n1")
	first.Start()
	first.Ready()
	second := storetest.NewMember(t, "n2", first.Address())
	second.Start()
	second.Ready()
	h := open(t, first.Endpoint()).Status(t.Context())
	if len(h.Members) != 2 || h.Members[0].Learner || !h.Members[1].Learner {
		t.Errorf("%+v", h)
	}
	second.Kill() // the only voter goes on alone
	write(t, open(t, first.Endpoint()), "/a/1")

	// The second is told to found a store of its own: it knows better.
	second.Config.Join = nil
	second.Start()
	second.Ready()
	if n := len(storetest.Voters(first.Endpoint())); n != 1 {
		t.Errorf("%d voters", n)
	}

	// The third is killed before it has ever been ready, and starts again.
	third := storetest.NewMember(t, "n3", second.Address(), first.Address())
	third.Start()
	storetest.Wait(t, 30*time.Second, "the third to be a member", func() bool {
		list, err := raw(t, first.Endpoint()).MemberList(t.Context())
		return err == nil && len(list.Members) == 3
	})
	third.Kill()
	third.Start()
	third.Ready()
	storetest.Wait(t, 30*time.Second, "three voters", func() bool { return len(storetest.Voters(first.Endpoint())) == 3 })

	// One is taken out again, by its address.
	c := open(t, first.Endpoint())
	if err := c.RemoveMember(t.Context(), "n9"); !errors.Is(err, store.ErrNoMember) {
		t.Errorf("a member that is not there: %v", err)
	}
	var err error
	storetest.Wait(t, 30*time.Second, "the store to let a member go", func() bool {
		err = c.RemoveMember(t.Context(), third.Config.Address.String())
		return !errors.Is(err, store.ErrUnhealthy) // as long as the third has just started
	})
	if err != nil || len(c.Status(t.Context()).Members) != 2 {
		t.Errorf("after its removal: %+v, %v", c.Status(t.Context()).Members, err)
	}
	third.Ended()
}

func TestServeRefuses(t *testing.T) {
	t.Parallel()
	addr := storetest.Addr(t)
	config := func(t *testing.T) store.ServerConfig {
		return store.ServerConfig{Name: "n", DataDir: filepath.Join(t.TempDir(), "data"), Address: addr,
			ClientPort: storetest.Port(t, addr), PeerPort: storetest.Port(t, addr), UnsafeNoFsync: true}
	}
	refuse := func(t *testing.T, cfg store.ServerConfig, want string) {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		defer cancel()
		err := store.Serve(ctx, cfg, logger(t), func() { t.Error("it serves") })
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v, want %q", err, want)
		}
	}
	t.Run("data without marker", func(t *testing.T) {
		cfg := config(t)
		wal := filepath.Join(cfg.DataDir, "member", "wal")
		if err := errors.Join(os.MkdirAll(wal, 0o700), os.WriteFile(filepath.Join(wal, "0.wal"), nil, 0o600)); err != nil {
			t.Fatal(err)
		}
		refuse(t, cfg, "is missing")
	})
	t.Run("damaged marker", func(t *testing.T) {
		cfg := config(t)
		if err := os.WriteFile(cfg.DataDir+".member", []byte("{"), 0o600); err != nil {
			t.Fatal(err)
		}
		refuse(t, cfg, "is damaged")
	})
	t.Run("joining itself", func(t *testing.T) {
		cfg := config(t)
		cfg.Join = []string{fmt.Sprintf("%s:%d", addr, cfg.ClientPort)}
		refuse(t, cfg, "join itself")
	})
	t.Run("nobody to join, and then founding", func(t *testing.T) {
		cfg := config(t)
		cfg.Join = []string{fmt.Sprintf("%s:%d", addr, storetest.Port(t, addr))}
		refuse(t, cfg, "given up")
		cfg.Join = nil
		refuse(t, cfg, "told to join a store before")
	})
}
