package node

import (
	"context"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"path/filepath"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"flotilla/internal/registry"
	"flotilla/internal/store"
	"flotilla/internal/store/storetest"
)

// witness is a node with a member of the store.
type witness struct {
	*leaderless
	gone   atomic.Bool // what the member's process says of itself
	server *httptest.Server
}

func TestLeaderless(t *testing.T) {
	t.Parallel()
	log := testLog(t)
	c := storetest.StartCluster(t, 3)
	client, err := store.Open(store.Config{Endpoints: c.Endpoints(), Logger: log})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	over := make(chan error)
	go func() { over <- client.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-over; err != nil {
			t.Error(err)
		}
		_ = client.Close()
	})
	storetest.Wait(t, time.Minute, "the members to be known", func() bool {
		known := client.Members()
		return len(known) == 3 && !slices.ContainsFunc(known, func(m store.Member) bool { return m.Learner || m.Name == "" })
	})

	// The one that asks has no member.
	l := &leaderless{
		address: storetest.Addr(t), file: filepath.Join(t.TempDir(), "run", "members"), log: log, members: client.Members,
		opinion: func(context.Context, string) (store.Opinion, error) { panic("it has no member") },
	}
	registered := func(addr netip.Addr) bool { return addr == l.address }
	var machines []registry.Machine
	l.machines = func() []registry.Machine { return machines }
	var nodes []*witness
	for _, m := range c.Members {
		w := &witness{}
		w.leaderless = &leaderless{
			address: m.Config.Address, endpoint: m.Endpoint(), log: log, opinion: client.Opinion,
			name:       func() (string, error) { return store.MemberName(m.Config.DataDir) },
			members:    func() []store.Member { return nil },
			machines:   func() []registry.Machine { return nil },
			registered: registered,
			processes: func(context.Context) ([]int, error) {
				if w.gone.Load() {
					return nil, nil
				}
				return []int{1}, nil
			},
		}
		mux := http.NewServeMux()
		mux.Handle("GET "+memberPath, w.handler())
		w.server = httptest.NewUnstartedServer(mux)
		_ = w.server.Listener.Close()
		if w.server.Listener, err = net.Listen("tcp", netip.AddrPortFrom(m.Config.Address, 0).String()); err != nil {
			t.Fatal(err)
		}
		w.server.Start()
		t.Cleanup(w.server.Close)
		machines = append(machines, registry.Machine{Address: m.Config.Address.String(), API: w.server.Listener.Addr().String()})
		nodes = append(nodes, w)
	}
	ask := func(l *leaderless) bool {
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		defer cancel()
		return l.proven(ctx)
	}
	never := func(when string) {
		t.Helper()
		for range 3 {
			if ask(l) {
				t.Fatalf("%s: it takes the store for leaderless", when)
			}
		}
	}
	kill := func(i int) { c.Kill(i); nodes[i].gone.Store(true) }

	never("all members run")
	first := c.Leader(t)
	second, third := (first+1)%3, (first+2)%3
	c.Stop(first)
	never("the leader is frozen")
	kill(second)
	kill(third)
	never("the leader is frozen, the others are dead")
	nodes[first].gone.Store(true)
	never("the leader runs frozen outside of its unit")
	nodes[first].gone.Store(false)
	c.Cont(first)
	storetest.Wait(t, time.Minute, "the one that is left to give up", func() bool { return ask(l) })
	members := client.Members()
	l.members = func() []store.Member {
		return slices.DeleteFunc(slices.Clone(members), func(m store.Member) bool { return m.Endpoint == c.Members[third].Endpoint() })
	}
	never("this node does not know all members")
	l.members = func() []store.Member {
		other := slices.Clone(members)
		other[0].Name = "n1-000000"
		return other
	}
	never("a node has another member")
	l.members = client.Members
	kill(first)
	if !ask(l) {
		t.Error("all members are dead: it takes the store for led")
	}

	// The next process knows what this one has known, and lets others ask.
	run, stop := context.WithCancel(t.Context())
	kept := make(chan error)
	go func() { kept <- l.run(run) }()
	next := &leaderless{
		address: l.address, file: l.file, log: log, registered: func(netip.Addr) bool { return false },
		members: func() []store.Member { return nil }, machines: func() []registry.Machine { return nil },
	}
	storetest.Wait(t, time.Minute, "what is known to be kept", func() bool { next.load(); return len(next.kept.Machines) == 3 })
	stop()
	if err := <-kept; err != nil {
		t.Fatal(err)
	}
	if !ask(next) {
		t.Error("the next process does not know whom to ask")
	}
	if !next.allowed(c.Members[0].Config.Address) || next.allowed(next.address) {
		t.Error("it answers to others than the machines that were there")
	}
	next.address = storetest.Addr(t)
	if ask(next) {
		t.Error("a stranger was answered")
	}

	// One member alone was in no quorum since it was started: it says nothing.
	nodes[first].gone.Store(false)
	c.Restart(first)
	never("a member was started")
	nodes[first].server.Close()
	never("a node does not answer")
}
