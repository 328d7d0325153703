// Package storetest runs real etcd for tests: one member inside the test
// process, a cluster of members in processes of their own, and a TCP proxy that
// cuts connections at a chosen moment. It knows how members are started and
// stopped and must not know what is stored in them. Nothing outside of tests
// may import it.
package storetest

import (
	"math/rand/v2"
	"net"
	"net/netip"
	"net/url"
	"strconv"
	"testing"
	"time"

	"go.etcd.io/etcd/server/v3/embed"
	"go.uber.org/zap"
)

// startLimit bounds every start of a member, far beyond what a busy machine needs.
const startLimit = 60 * time.Second

// Start runs one etcd member inside the test process until the test ends and
// returns its client endpoint, such as http://127.90.1.2:40001. Nothing is
// synced to disk.
func Start(t testing.TB) (endpoint string) {
	t.Helper()
	addr := Addr(t)
	cfg := embed.NewConfig()
	cfg.Name = "single"
	cfg.Dir = t.TempDir()
	cfg.ListenClientUrls = []url.URL{hostURL(addr, Port(t, addr))}
	cfg.ListenPeerUrls = []url.URL{hostURL(addr, Port(t, addr))}
	cfg.AdvertiseClientUrls = cfg.ListenClientUrls
	cfg.AdvertisePeerUrls = cfg.ListenPeerUrls
	cfg.InitialCluster = cfg.InitialClusterFromName(cfg.Name)
	cfg.ZapLoggerBuilder = embed.NewZapLoggerBuilder(zap.NewNop())
	cfg.UnsafeNoFsync = true
	cfg.TickMs, cfg.ElectionMs = 10, 100
	e, err := embed.StartEtcd(cfg)
	if err != nil {
		t.Fatalf("start etcd on %s: %v", addr, err)
	}
	t.Cleanup(e.Close)
	select {
	case <-e.Server.ReadyNotify():
	case err := <-e.Err():
		t.Fatalf("etcd on %s ended: %v", addr, err)
	case <-time.After(startLimit):
		t.Fatalf("etcd on %s is not ready after %s", addr, startLimit)
	}
	return cfg.ListenClientUrls[0].String()
}

// Addr returns a loopback address that no other test is likely to use.
func Addr(t testing.TB) netip.Addr {
	t.Helper()
	for range 100 {
		a := netip.AddrFrom4([4]byte{127, byte(64 + rand.IntN(128)), byte(rand.IntN(256)), byte(1 + rand.IntN(254))})
		l, err := net.Listen("tcp", netip.AddrPortFrom(a, 0).String())
		if err == nil {
			_ = l.Close()
			return a
		}
	}
	t.Fatal("no loopback address can be bound")
	return netip.Addr{}
}

// Port returns a port that is free on addr at this moment.
func Port(t testing.TB, addr netip.Addr) int {
	t.Helper()
	l, err := net.Listen("tcp", netip.AddrPortFrom(addr, 0).String())
	if err != nil {
		t.Fatalf("find a free port on %s: %v", addr, err)
	}
	defer func() { _ = l.Close() }()
	return l.Addr().(*net.TCPAddr).Port
}

func hostURL(addr netip.Addr, port int) url.URL {
	return url.URL{Scheme: "http", Host: net.JoinHostPort(addr.String(), strconv.Itoa(port))}
}

// Wait calls ok every few milliseconds until it returns true, and fails the
// test with what was waited for when that takes longer than limit.
func Wait(t testing.TB, limit time.Duration, what string, ok func() bool) {
	t.Helper()
	deadline := time.Now().Add(limit)
	for pause := time.Millisecond; !ok(); pause = min(2*pause, 50*time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("after %s still waiting for %s", limit, what)
		}
		time.Sleep(pause)
	}
}
