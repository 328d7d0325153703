package store_test

import (
	"context"
	"fmt"
	"log/slog"
	"maps"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	clientv3 "go.etcd.io/etcd/client/v3"

	"flotilla/internal/store"
	"flotilla/internal/store/storetest"
)

// mirror is what a user of a Reflector would keep.
type mirror struct {
	mu       sync.Mutex
	keys     map[string]string
	revision int64
	updates  []store.Update
}

func (m *mirror) apply(u store.Update) (changed int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	next := m.keys
	if u.Reset {
		next = make(map[string]string, len(u.Items))
		for _, kv := range u.Items {
			next[kv.Key] = kv.Value
		}
		for k, v := range next {
			if old, ok := m.keys[k]; !ok || old != v {
				changed++
			}
		}
		for k := range m.keys {
			if _, ok := next[k]; !ok {
				changed++
			}
		}
	}
	for _, e := range u.Events {
		changed++
		if e.Deleted {
			delete(next, e.Key)
		} else {
			next[e.Key] = e.Value
		}
	}
	m.keys, m.revision = next, u.Revision
	m.updates = append(m.updates, u)
	return changed
}

func (m *mirror) copy() map[string]string {
	m.mu.Lock()
	defer m.mu.Unlock()
	return maps.Clone(m.keys)
}

func (m *mirror) at() int64 {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.revision
}

func open(t *testing.T, endpoints ...string) *store.Client {
	t.Helper()
	c, err := store.Open(store.Config{Endpoints: endpoints, Logger: logger(t)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c
}

func raw(t *testing.T, endpoint string) *clientv3.Client {
	t.Helper()
	c, err := clientv3.NewFromURL(endpoint)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c
}

// logger writes to the test's log until the test ends.
func logger(t *testing.T) *slog.Logger {
	return slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelDebug}))
}

// start runs part until the test ends, which then waits for it.
func start(t *testing.T, part func(context.Context) error) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- part(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("a part ended with %v", err)
		}
	})
}

func put(t *testing.T, c *clientv3.Client, key, value string) int64 {
	t.Helper()
	resp, err := c.Put(t.Context(), key, value)
	if err != nil {
		t.Fatal(err)
	}
	return resp.Header.Revision
}

func reflect(t *testing.T, r *store.Reflector) *mirror {
	m := &mirror{}
	start(t, func(ctx context.Context) error { return r.Run(ctx, m.apply) })
	return m
}

func TestReflectorFollows(t *testing.T) {
	endpoint := storetest.Start(t)
	etcd := raw(t, endpoint)
	put(t, etcd, "/a/1", "one")
	put(t, etcd, "/b/1", "other")
	put(t, etcd, "/fresh", "seven")
	r := store.NewReflector(open(t, endpoint), "/a/", "/fresh", logger(t))
	r.SetPeriods(500*time.Millisecond, time.Hour, time.Hour)
	m := reflect(t, r)
	storetest.Wait(t, 5*time.Second, "the first list", func() bool { return m.at() > 0 })
	put(t, etcd, "/a/2", "two")
	if _, err := etcd.Delete(t.Context(), "/a/1"); err != nil {
		t.Fatal(err)
	}
	rev := put(t, etcd, "/a/3", "three")
	storetest.Wait(t, 5*time.Second, "the last revision", func() bool { return m.at() == rev })
	if diff := cmp.Diff(map[string]string{"/a/2": "two", "/a/3": "three"}, m.copy()); diff != "" {
		t.Error(diff)
	}
	// A write elsewhere moves the proved revision too.
	rev = put(t, etcd, "/b/1", "again")
	begin := time.Now()
	storetest.Wait(t, 5*time.Second, "a proof after that", func() bool {
		s := r.Status()
		return s.Live && s.Revision >= rev && s.Confirmed.After(begin)
	})
	if s := r.Status(); s.FreshValue != "seven" || s.Lists != 1 || s.Restarts != 0 || s.Err != "" {
		t.Errorf("status %+v", s)
	}
}

// A watch from before the newest revision is not in step yet when it is asked
// first, and one from after it says nothing at all: neither is stuck.
func TestReflectorProvesAQuietPrefix(t *testing.T) {
	t.Parallel()
	endpoint := storetest.Start(t)
	etcd := raw(t, endpoint)
	put(t, etcd, "/a/1", "one")
	const period = 1500 * time.Millisecond // with jitter always longer than a watch may take to answer
	for name, elsewhere := range map[string]bool{"nothing is written": false, "other keys are written": true} {
		t.Run(name, func(t *testing.T) {
			r := store.NewReflector(open(t, endpoint), "/a/", "/fresh", logger(t))
			r.SetPeriods(period, time.Hour, time.Hour)
			var rev int64
			start(t, func(ctx context.Context) error {
				return r.Run(ctx, func(store.Update) int {
					if elsewhere { // after the list, before the watch
						resp, err := etcd.Put(t.Context(), "/b/1", "other")
						if err != nil {
							t.Error(err)
							return 0
						}
						rev = resp.Header.Revision
					}
					return 0
				})
			})
			begin := time.Now()
			storetest.Wait(t, 30*time.Second, "two proofs", func() bool { return r.Status().Confirmed.After(begin.Add(2 * period)) })
			if s := r.Status(); !s.Live || s.Revision < rev || s.Lists != 1 || s.Restarts != 0 {
				t.Errorf("status %+v", s)
			}
		})
	}
}

func TestReflectorKeepsStateWhileTheStoreIsAway(t *testing.T) {
	t.Parallel()
	endpoint := storetest.Start(t)
	etcd := raw(t, endpoint)
	proxy := storetest.NewProxy(t, endpoint)
	put(t, etcd, "/a/1", "one")
	r := store.NewReflector(open(t, proxy.Endpoint()), "/a/", "/fresh", logger(t))
	r.SetPeriods(50*time.Millisecond, time.Hour, time.Hour)
	m := reflect(t, r)
	live := func() bool { return r.Status().Live }
	storetest.Wait(t, 5*time.Second, "the first list", live)

	for what, fault := range map[string]struct{ begin, end func() }{
		"cut": {proxy.Cut, proxy.Mend}, "frozen": {proxy.Freeze, proxy.Thaw},
	} {
		fault.begin()
		storetest.Wait(t, 10*time.Second, "the reflector to notice that the store is "+what, func() bool { return !live() })
		if diff := cmp.Diff(1, len(m.copy())); diff != "" {
			t.Error(what, diff)
		}
		rev := put(t, etcd, "/a/"+what, "x")
		if _, err := etcd.Delete(t.Context(), "/a/"+what); err != nil {
			t.Fatal(err)
		}
		fault.end()
		storetest.Wait(t, 20*time.Second, "the reflector to go on", func() bool { return live() && m.at() == rev+1 })
	}
	for i, u := range m.updates {
		if u.Reset != (i == 0) {
			t.Errorf("update %d: reset %v; only the first is one", i, u.Reset)
		}
	}
}

func TestReflectorListsAgainAfterCompaction(t *testing.T) {
	t.Parallel()
	endpoint := storetest.Start(t)
	etcd := raw(t, endpoint)
	proxy := storetest.NewProxy(t, endpoint)
	put(t, etcd, "/a/1", "one")
	put(t, etcd, "/a/2", "two")
	r := store.NewReflector(open(t, proxy.Endpoint()), "/a/", "/fresh", logger(t))
	r.SetPeriods(50*time.Millisecond, time.Hour, time.Hour)
	m := reflect(t, r)
	storetest.Wait(t, 5*time.Second, "the first list", func() bool { return r.Status().Live })
	proxy.Cut()
	storetest.Wait(t, 10*time.Second, "the reflector to notice", func() bool { return !r.Status().Live })
	if _, err := etcd.Delete(t.Context(), "/a/1"); err != nil {
		t.Fatal(err)
	}
	rev := put(t, etcd, "/a/3", "three")
	if _, err := etcd.Compact(t.Context(), rev); err != nil {
		t.Fatal(err)
	}
	proxy.Mend()
	storetest.Wait(t, 20*time.Second, "a second list", func() bool { s := r.Status(); return s.Live && s.Lists == 2 })
	if diff := cmp.Diff(map[string]string{"/a/2": "two", "/a/3": "three"}, m.copy()); diff != "" {
		t.Error(diff)
	}
	rev = put(t, etcd, "/a/4", "four")
	storetest.Wait(t, 5*time.Second, "an event after the list", func() bool { return m.at() == rev })
}

func TestReflectorHoldsOnAnotherCluster(t *testing.T) {
	for _, test := range []struct {
		name string
		end  func(r *store.Reflector, p *storetest.Proxy, first string)
		hold time.Duration
		want map[string]string
	}{
		{"until accepted", func(r *store.Reflector, _ *storetest.Proxy, _ string) { r.AcceptEpoch() }, time.Hour, map[string]string{}},
		{"until time has passed", func(*store.Reflector, *storetest.Proxy, string) {}, time.Second, map[string]string{}},
		{"until the first is back", func(_ *store.Reflector, p *storetest.Proxy, first string) {
			p.Cut()
			p.Retarget(first)
			p.Mend()
		}, time.Hour, map[string]string{"/a/1": "one", "/a/2": "two"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			first, second := storetest.Start(t), storetest.Start(t)
			proxy := storetest.NewProxy(t, first)
			etcd := raw(t, first)
			put(t, etcd, "/a/1", "one")
			put(t, etcd, "/a/2", "two")
			r := store.NewReflector(open(t, proxy.Endpoint()), "/a/", "/fresh", logger(t))
			r.SetPeriods(50*time.Millisecond, time.Hour, test.hold)
			m := reflect(t, r)
			storetest.Wait(t, 5*time.Second, "the first list", func() bool { return r.Status().Live })
			r.AcceptEpoch() // too early: must not count
			proxy.Cut()
			proxy.Retarget(second)
			proxy.Mend()
			storetest.Wait(t, 10*time.Second, "the hold", func() bool { return r.Status().Held })
			if diff := cmp.Diff(2, len(m.copy())); diff != "" || r.Status().Live {
				t.Error(diff, r.Status())
			}
			test.end(r, proxy, first)
			storetest.Wait(t, 10*time.Second, "the end of the hold", func() bool { s := r.Status(); return s.Live && !s.Held })
			if diff := cmp.Diff(test.want, m.copy()); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestReflectorCorrectsDrift(t *testing.T) {
	endpoint := storetest.Start(t)
	etcd := raw(t, endpoint)
	put(t, etcd, "/a/1", "one")
	r := store.NewReflector(open(t, endpoint), "/a/", "/fresh", logger(t))
	r.SetPeriods(50*time.Millisecond, 20*time.Millisecond, time.Hour)
	m := reflect(t, r)
	stop := make(chan struct{})
	var writer sync.WaitGroup
	writer.Go(func() { // checks race with events and must not see a difference
		for i := 0; ; i++ {
			select {
			case <-stop:
				return
			default:
				_, _ = etcd.Put(context.Background(), fmt.Sprintf("/a/%d", i%50), fmt.Sprint(i))
			}
		}
	})
	storetest.Wait(t, 20*time.Second, "twenty checks", func() bool { return r.Status().Lists > 20 })
	close(stop)
	writer.Wait()
	if n := r.Status().Drift; n != 0 {
		t.Errorf("%d checks found drift that is not there", n)
	}
	m.mu.Lock()
	m.keys["/a/1"] = "wrong"
	m.mu.Unlock()
	storetest.Wait(t, 10*time.Second, "the drift to be found", func() bool { return r.Status().Drift == 1 })
	if m.copy()["/a/1"] == "wrong" {
		t.Error("the drift was counted but not corrected")
	}
}

func TestReflectorLoadsManyKeys(t *testing.T) {
	const keys = 100_000
	endpoint := storetest.Start(t)
	etcd := raw(t, endpoint)
	for i := 0; i < keys; i += 125 {
		var ops []clientv3.Op
		for j := i; j < i+125; j++ {
			ops = append(ops, clientv3.OpPut(fmt.Sprintf("/services/s%05d/hosts/%d", j/5, j%5), fmt.Sprintf("10.0.0.1:%d", j)))
		}
		if _, err := etcd.Txn(t.Context()).Then(ops...).Commit(); err != nil {
			t.Fatal(err)
		}
	}
	r := store.NewReflector(open(t, endpoint), "/services/", "/fresh", logger(t))
	begin := time.Now()
	m := reflect(t, r)
	storetest.Wait(t, 30*time.Second, "the first list", func() bool { return r.Status().Live })
	t.Logf("%d keys loaded after %s", keys, time.Since(begin))
	if n := len(m.copy()); n != keys {
		t.Errorf("%d keys, want %d", n, keys)
	}
}

// Reach returns as soon as everything up to a revision is there, also if what was
// written is none of the prefix, and long before the reflector would look by itself.
func TestReflectorReaches(t *testing.T) {
	t.Parallel()
	endpoint := storetest.Start(t)
	etcd := raw(t, endpoint)
	r := store.NewReflector(open(t, endpoint), "/p/", "/fresh", logger(t))
	r.SetPeriods(time.Hour, time.Hour, time.Hour)
	m := reflect(t, r)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	for i := range 5 {
		revision := put(t, etcd, "/p/a", fmt.Sprint(i))
		if err := r.Reach(ctx, revision); err != nil {
			t.Fatal(err)
		}
		if got := m.copy()["/p/a"]; got != fmt.Sprint(i) {
			t.Fatalf("reached revision %d with %q, want %d", revision, got, i)
		}
		if err := r.Reach(ctx, put(t, etcd, "/elsewhere", "x")); err != nil {
			t.Fatal(err)
		}
	}
	short, stop := context.WithTimeout(ctx, 50*time.Millisecond)
	defer stop()
	if err := r.Reach(short, 1<<40); err == nil {
		t.Error("a revision of the future was reached")
	}
}

// Another prefix is followed by the same reflector from then on, with one watch.
func TestReflectorFollowsAnotherPrefix(t *testing.T) {
	t.Parallel()
	endpoint := storetest.Start(t)
	etcd := raw(t, endpoint)
	r := store.NewReflector(open(t, endpoint), "/p/narrow/", "/fresh", logger(t))
	put(t, etcd, "/p/narrow/a", "1")
	put(t, etcd, "/p/b", "1")
	m := reflect(t, r)
	has := func(want map[string]string) func() bool {
		return func() bool { return maps.Equal(m.copy(), want) }
	}
	storetest.Wait(t, 20*time.Second, "the narrow prefix", has(map[string]string{"/p/narrow/a": "1"}))
	r.Follow("/p/")
	storetest.Wait(t, 20*time.Second, "all", has(map[string]string{"/p/narrow/a": "1", "/p/b": "1"}))
	put(t, etcd, "/p/b", "2")
	storetest.Wait(t, 20*time.Second, "a change of the wide prefix", has(map[string]string{"/p/narrow/a": "1", "/p/b": "2"}))
	r.Follow("/p/narrow/")
	storetest.Wait(t, 20*time.Second, "the narrow prefix again", has(map[string]string{"/p/narrow/a": "1"}))
	put(t, etcd, "/p/narrow/a", "3")
	storetest.Wait(t, 20*time.Second, "a change of the narrow prefix", has(map[string]string{"/p/narrow/a": "3"}))
	if st := r.Status(); st.Drift != 0 || st.Restarts != 0 {
		t.Errorf("a switch counts as drift or restart: %+v", st)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	var prefixes []string
	for _, u := range m.updates {
		if u.Reset {
			prefixes = append(prefixes, u.Prefix)
		}
	}
	if diff := cmp.Diff([]string{"/p/narrow/", "/p/", "/p/narrow/"}, prefixes); diff != "" {
		t.Error(diff)
	}
}
