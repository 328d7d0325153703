package store_test

import (
	"errors"
	"fmt"
	"os/exec"
	"strings"
	"testing"
	"time"

	"flotilla/internal/store"
	"flotilla/internal/store/storetest"
)

func TestOpenRefusesBadEndpoints(t *testing.T) {
	for endpoints, want := range map[string]string{
		"":                    "no store endpoint",
		"10.0.0.1":            "http://host:port",
		"http://10.0.0.1:1/x": "http://host:port",
		"https://10.0.0.1:1":  "needs certificates",
	} {
		_, err := store.Open(store.Config{Endpoints: strings.Fields(endpoints), Logger: logger(t)})
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, want %q", endpoints, err, want)
		}
	}
}

func TestApplyWritesAllOrNothing(t *testing.T) {
	c := open(t, storetest.Start(t))
	ctx := t.Context()
	first, err := c.Apply(ctx, []store.Op{store.Put("/a/1", "one"), store.Put("/a/2", "two"), store.Put("/b", "three")}, store.Missing("/a/1"))
	if err != nil {
		t.Fatal(err)
	}
	kv, ok, err := c.Get(ctx, "/a/2")
	if want := (store.KV{Key: "/a/2", Value: "two", CreateRevision: first, ModRevision: first}); kv != want || !ok || err != nil {
		t.Errorf("got %+v %v %v, want %+v", kv, ok, err, want)
	}
	for _, cond := range []store.Cond{store.Missing("/a/1"), store.Present("/none"), store.Unchanged("/a/1", first-1), store.CreatedAt("/a/1", first+1)} {
		if _, err := c.Apply(ctx, []store.Op{store.Put("/a/1", "x")}, cond); !errors.Is(err, store.ErrConflict) {
			t.Errorf("%v, want ErrConflict", err)
		}
	}
	rev, err := c.Apply(ctx, []store.Op{store.DeletePrefix("/a/"), store.Delete("/none")},
		store.Present("/b"), store.Unchanged("/a/1", first), store.CreatedAt("/a/1", first))
	if err != nil {
		t.Fatal(err)
	}
	items, at, err := c.List(ctx, "/")
	if err != nil || len(items) != 1 || items[0].Key != "/b" || at != rev {
		t.Errorf("%v at %d %v", items, at, err)
	}
	var many []store.Op
	for i := range store.MaxOps + 1 {
		many = append(many, store.Put(fmt.Sprint("/m/", i), ""))
	}
	if _, err := c.Apply(ctx, many); err == nil || !strings.Contains(err.Error(), "split it") {
		t.Error(err)
	}
	if _, err := c.Apply(ctx, many[1:]); err != nil {
		t.Error(err)
	}
}

func TestApplyReportsAnUnknownOutcome(t *testing.T) {
	t.Parallel()
	endpoint := storetest.Start(t)
	direct := open(t, endpoint)
	for _, after := range []bool{false, true} {
		t.Run(fmt.Sprintf("after the effect %v", after), func(t *testing.T) {
			proxy := storetest.NewProxy(t, endpoint)
			c := open(t, proxy.Endpoint())
			key := fmt.Sprintf("/unknown-%v", after)
			if _, _, err := c.Get(t.Context(), key); err != nil {
				t.Fatal(err)
			}
			there := func() bool {
				_, ok, err := direct.Get(t.Context(), key)
				return err == nil && ok
			}
			if after {
				proxy.CutAfter(key, func() { storetest.Wait(t, 5*time.Second, "the effect", there) })
			} else {
				proxy.CutBefore(key)
			}
			if _, err := c.Apply(t.Context(), []store.Op{store.Put(key, "x")}); !errors.Is(err, store.ErrUnknown) {
				t.Errorf("%v, want ErrUnknown", err)
			}
			if there() != after {
				t.Errorf("written: %v, want %v", !after, after)
			}
		})
	}
	t.Run("never connected", func(t *testing.T) {
		addr := storetest.Addr(t)
		c := open(t, fmt.Sprintf("http://%s:%d", addr, storetest.Port(t, addr)))
		_, err := c.Apply(t.Context(), []store.Op{store.Put("/a", "x")})
		if errors.Is(err, store.ErrUnknown) || !errors.Is(err, store.ErrUnavailable) || !strings.Contains(err.Error(), "connection refused") {
			t.Errorf("%v, want ErrUnavailable with its cause and not ErrUnknown", err)
		}
	})
}

// Operators and old sidekicks write with etcdctl as it comes.
func TestEtcdctlPut(t *testing.T) {
	endpoint := storetest.Start(t)
	cmd := exec.Command("etcdctl", "--endpoints", endpoint, "put", "/services/web/hosts/1", "10.0.0.1:80")
	cmd.Env = append(cmd.Environ(), "ETCDCTL_API=3")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	kv, ok, err := open(t, endpoint).Get(t.Context(), "/services/web/hosts/1")
	if err != nil || !ok || kv.Value != "10.0.0.1:80" {
		t.Errorf("%+v %v %v", kv, ok, err)
	}
}

func TestStatus(t *testing.T) {
	t.Parallel()
	endpoint := storetest.Start(t)
	h := open(t, endpoint).Status(t.Context())
	if len(h.Members) != 1 || !h.Quorum || h.Err != "" {
		t.Fatalf("%+v", h)
	}
	m := h.Members[0]
	if !m.Leader || m.Learner || !m.Reachable || m.Name != "single" || m.Endpoint != endpoint || m.DBSize == 0 || m.Version == "" || m.Latency == 0 || m.Err != "" {
		t.Errorf("%+v", m)
	}
	addr := storetest.Addr(t)
	h = open(t, fmt.Sprintf("http://%s:%d", addr, storetest.Port(t, addr))).Status(t.Context())
	if len(h.Members) != 1 || h.Quorum || h.Err == "" || h.Members[0].Reachable || h.Members[0].Err == "" {
		t.Errorf("away: %+v", h)
	}
}
