package peer

import (
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"testing"
	"time"

	"flotilla/internal/wire"
)

// A node asks another one from its own address, gets the answer or the error, and
// is let in only while it is known.
func TestGet(t *testing.T) {
	one, two := netip.MustParseAddr("127.0.0.51"), netip.MustParseAddr("127.0.0.52")
	known := map[netip.Addr]bool{one: true}
	b := New(two, func(a netip.Addr) bool { return known[a] })
	b.Handle("GET /v1/local/x", func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Query().Get("bad") != "" {
			wire.WriteError(w, wire.Errorf(wire.CodeNotFound, "", "there is no such thing"))
			return
		}
		_, _ = io.WriteString(w, "hello")
	})
	l, err := net.Listen("tcp", netip.AddrPortFrom(two, 0).String())
	if err != nil {
		t.Fatal(err)
	}
	server := httptest.NewUnstartedServer(b)
	server.Listener = l
	server.Start()
	defer server.Close()
	a := New(one, nil)

	body, err := a.Get(t.Context(), l.Addr().String(), "/v1/local/x", nil)
	if err != nil {
		t.Fatal(err)
	}
	if raw, err := io.ReadAll(body); err != nil || string(raw) != "hello" {
		t.Errorf("got %q, %v", raw, err)
	}
	if err := body.Close(); err != nil {
		t.Error(err)
	}
	wants := func(word string, p *Peer, address, query string) {
		t.Helper()
		body, err := p.Get(t.Context(), address, "/v1/local/x", map[string][]string{"bad": {query}})
		if err == nil || !strings.Contains(err.Error(), word) {
			t.Errorf("got %v, want %q", err, word)
		}
		if body != nil {
			_ = body.Close()
		}
	}
	wants("404 Not Found: there is no such thing", a, l.Addr().String(), "1")
	wants("is not the address of a node of this cluster", New(two, nil), l.Addr().String(), "")
	delete(known, one)
	wants("is not the address of a node of this cluster", a, l.Addr().String(), "")
	a.ConnectLimit = time.Second
	wants("it does not answer", a, "127.0.0.53:1", "")
	wants("it does not answer", New(netip.MustParseAddr("203.0.113.7"), nil), "127.0.0.53:1", "") // an address that this host does not have
}
