package logs

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"iter"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"flotilla/internal/peer"
	"flotilla/internal/state"
	"flotilla/internal/store"
	"flotilla/internal/store/storetest"
	"flotilla/internal/systemd"
	"flotilla/internal/unit"
	"flotilla/internal/wire"
)

// journal stands for systemd's, of which go test has none. It answers the
// question as journalctl does.
type journal struct {
	mu      sync.Mutex // guards what follows
	entries []systemd.Entry
	grown   chan struct{} // closed when an entry is added
	asked   [][]string
	broken  error
}

func newJournal() *journal { return &journal{grown: make(chan struct{})} }

func (j *journal) write(at time.Time, unit, message string) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.entries = append(j.entries, systemd.Entry{Time: at, Unit: unit, Message: message, PID: 7, Priority: 6, Identifier: "id", Cursor: strconv.Itoa(len(j.entries) + 1)})
	close(j.grown)
	j.grown = make(chan struct{})
}

func (j *journal) look(q systemd.JournalQuery, from int) (found []systemd.Entry, next int, grown <-chan struct{}, err error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	for _, e := range j.entries[from:] {
		if slices.Contains(q.Units, e.Unit) && !e.Time.Before(q.Since) {
			found = append(found, e)
		}
	}
	return found, len(j.entries), j.grown, j.broken
}

func (j *journal) read(ctx context.Context, q systemd.JournalQuery) iter.Seq2[systemd.Entry, error] {
	j.mu.Lock()
	j.asked = append(j.asked, q.Units)
	j.mu.Unlock()
	return func(yield func(systemd.Entry, error) bool) {
		from, _ := strconv.Atoi(q.After) // none is 0
		for first := true; ; first = false {
			found, next, grown, err := j.look(q, from)
			if err != nil {
				yield(systemd.Entry{}, err)
				return
			}
			if first && q.Lines > 0 && len(found) > q.Lines {
				found = found[len(found)-q.Lines:]
			}
			for _, e := range found {
				if !yield(e, nil) {
					return
				}
			}
			if !q.Follow {
				return
			}
			from = next
			select {
			case <-grown:
			case <-ctx.Done():
				yield(systemd.Entry{}, ctx.Err())
				return
			}
		}
	}
}

// node is one node: its journal, its units and its server.
type node struct {
	*Server
	peer    *peer.Peer
	journal *journal
	id      string
	address netip.Addr
	url     string // of the API for operators
	http    *http.Server

	mu    sync.Mutex // guards units
	units []string
}

func (n *node) own() []string {
	n.mu.Lock()
	defer n.mu.Unlock()
	return slices.Clone(n.units)
}

func (n *node) setOwn(units ...string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.units = units
}

// cluster is a store and its nodes.
type cluster struct {
	t      *testing.T
	client *store.Client
	keys   state.Keys
	nodes  []*node
}

var quick = pace{reorder: 100 * time.Millisecond, begin: 30 * time.Second, look: 50 * time.Millisecond, beat: time.Second}

func newCluster(t *testing.T, size int) *cluster {
	t.Helper()
	log := slog.New(slog.DiscardHandler)
	client, err := store.Open(store.Config{Endpoints: []string{storetest.Start(t)}, Logger: log})
	if err != nil {
		t.Fatal(err)
	}
	c := &cluster{t: t, client: client, keys: state.Keys{Prefix: state.DefaultPrefix}}
	t.Cleanup(func() { _ = client.Close() })
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	t.Cleanup(func() {
		cancel()
		running.Wait()
	})
	for i := range size {
		n := &node{journal: newJournal(), id: fmt.Sprintf("m%d", i+1), address: storetest.Addr(t)}
		feed := state.NewFeed(client, c.keys, log)
		n.peer = peer.New(n.address, func(a netip.Addr) bool { return feed.Latest().HasAddress(a) })
		n.peer.ConnectLimit = 20 * time.Second
		n.Server = New(Config{Feed: feed, Peer: n.peer, Self: n.id, Own: n.own, Journal: n.journal.read, Show: show})
		n.pace = quick
		running.Go(func() { _ = feed.Run(ctx) })
		n.http = &http.Server{Handler: n.peer}
		l, err := net.Listen("tcp", netip.AddrPortFrom(n.address, 0).String())
		if err != nil {
			t.Fatal(err)
		}
		running.Go(func() { _ = n.http.Serve(l) })
		t.Cleanup(func() { _ = n.http.Close() })
		mux := http.NewServeMux()
		mux.HandleFunc("GET /v1/journal", n.ServeJournal)
		mux.HandleFunc("GET /v1/unit-status", n.ServeUnitStatus)
		api := httptest.NewServer(mux)
		t.Cleanup(func() {
			api.CloseClientConnections()
			api.Close()
		})
		n.url = api.URL
		c.put(c.keys.Node(n.id), state.Encode(state.NodeRecord{V: 1, ID: n.id, Name: "node" + n.id[1:], Address: n.address.String(), Peer: l.Addr().String(), Units: true}))
		c.nodes = append(c.nodes, n)
	}
	for _, n := range c.nodes {
		storetest.Wait(t, time.Minute, "every node knows every other", func() bool { return len(n.Feed.Latest().Nodes) == size })
	}
	return c
}

func show(_ context.Context, unit string) (string, int, error) {
	if unit == "broken.service" {
		return "", 0, errors.New("systemctl is not there")
	}
	return "status of " + unit, 3, nil
}

func (c *cluster) put(key, value string) {
	c.t.Helper()
	if _, err := c.client.Apply(c.t.Context(), []store.Op{store.Put(key, value)}); err != nil {
		c.t.Fatal(err)
	}
}

func (c *cluster) delete(key string) {
	c.t.Helper()
	if _, err := c.client.Apply(c.t.Context(), []store.Op{store.Delete(key)}); err != nil {
		c.t.Fatal(err)
	}
}

// place puts units on node i.
func (c *cluster) place(i int, units ...string) {
	c.t.Helper()
	n := c.nodes[i]
	for _, name := range units {
		c.put(c.keys.Placement(name), state.Encode(state.Placement{V: 1, Node: n.id, Reason: "test"}))
	}
	n.setOwn(append(n.own(), units...)...)
}

func (c *cluster) get(path string) (status int, body string) {
	c.t.Helper()
	req, err := http.NewRequestWithContext(c.t.Context(), http.MethodGet, c.nodes[0].url+path, nil)
	if err != nil {
		c.t.Fatal(err)
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		c.t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	raw, err := io.ReadAll(resp.Body)
	if err != nil {
		c.t.Fatal(err)
	}
	return resp.StatusCode, string(raw)
}

func decode(t *testing.T, raw string) wire.JournalLine {
	t.Helper()
	var l wire.JournalLine
	if err := json.Unmarshal([]byte(raw), &l); err != nil {
		t.Fatalf("%v: %q", err, raw)
	}
	if l.Cursor != "" || l.Live || l.Units != nil {
		t.Errorf("the line has what only nodes need: %s", raw)
	}
	return l
}

// text returns "node unit message" or the problem.
func text(l wire.JournalLine) string {
	if l.Problem != "" {
		return "! " + l.Problem
	}
	return l.Node + " " + l.Unit + " " + l.Message
}

func (c *cluster) lines(path string) []string {
	c.t.Helper()
	status, body := c.get(path)
	if status != http.StatusOK {
		c.t.Fatalf("%s: %d %s", path, status, body)
	}
	found := []string{}
	for line := range strings.Lines(body) {
		found = append(found, text(decode(c.t, line)))
	}
	return found
}

func (c *cluster) want(path string, want ...string) {
	c.t.Helper()
	if got := c.lines(path); !slices.Equal(got, want) {
		c.t.Errorf("%s:\n%s\nwant:\n%s", path, strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

var noon = time.Date(2026, 1, 2, 12, 0, 0, 0, time.UTC)

func second(n int) time.Time { return noon.Add(time.Duration(n) * time.Second) }

func TestMerge(t *testing.T) {
	c := newCluster(t, 3)
	c.place(0, "web@1.service")
	c.place(1, "web@2.service", "db.service")
	c.place(2, "web@3.service")
	for i := range 9 {
		c.nodes[i%3].journal.write(second(i), fmt.Sprintf("web@%d.service", i%3+1), fmt.Sprintf("line %d", i))
	}
	c.nodes[1].journal.write(second(4), "db.service", "query")
	c.nodes[0].journal.write(second(20), "sshd.service", "secret")

	c.want("/v1/journal?unit=web@*&lines=4",
		"node3 web@3.service line 5", "node1 web@1.service line 6", "node2 web@2.service line 7", "node3 web@3.service line 8")
	c.want("/v1/journal?unit=*@3&lines=1", "node3 web@3.service line 8")
	c.want("/v1/journal?unit=web@2.service&lines=2", "node2 web@2.service line 4", "node2 web@2.service line 7")
	c.want("/v1/journal?unit=web@1.service&unit=db.service&lines=all",
		"node1 web@1.service line 0", "node1 web@1.service line 3", "node2 db.service query", "node1 web@1.service line 6")
	c.want("/v1/journal?unit=web@1.service&lines=0")
	if got := c.lines("/v1/journal?unit=*&lines=all"); len(got) != 10 {
		t.Errorf("all units have %d lines, want 10 without that of sshd: %q", len(got), got)
	}
	_, body := c.get("/v1/journal?unit=db.service")
	want := wire.JournalLine{Time: second(4), NodeID: "m2", Node: "node2", Unit: "db.service", Message: "query", Priority: 6, PID: 7, Identifier: "id"}
	if got := decode(t, body); fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("the line is %+v, want %+v", got, want)
	}
}

func TestGlobalUnits(t *testing.T) {
	c := newCluster(t, 3)
	c.put(c.keys.Unit("agent.service"), state.Encode(state.UnitRecord{V: 1, Text: "[X-Fleet]\nGlobal=yes\n", Desired: unit.Launched}))
	c.nodes[0].setOwn("agent.service")
	c.nodes[2].setOwn("agent.service") // the second node refuses it
	for i, n := range c.nodes {
		n.journal.write(second(i), "agent.service", "here")
	}
	c.want("/v1/journal?unit=agent.service", "node1 agent.service here", "node3 agent.service here")
	c.want("/v1/journal?unit=ag*", "node1 agent.service here", "node3 agent.service here")
	var found wire.UnitStatuses
	_, body := c.get("/v1/unit-status?unit=agent.service")
	if err := json.Unmarshal([]byte(body), &found); err != nil {
		t.Fatal(err)
	}
	want := []wire.UnitStatus{
		{Unit: "agent.service", NodeID: "m1", Node: "node1", Text: "status of agent.service", Exit: 3},
		{Unit: "agent.service", NodeID: "m3", Node: "node3", Text: "status of agent.service", Exit: 3},
	}
	if !slices.Equal(found.Statuses, want) {
		t.Errorf("statuses %+v, want %+v", found.Statuses, want)
	}
}

func TestNowhere(t *testing.T) {
	c := newCluster(t, 1)
	c.put(c.keys.Unit("idle.service"), state.Encode(state.UnitRecord{V: 1, Desired: unit.Inactive}))
	c.put(c.keys.Unit("big.service"), state.Encode(state.UnitRecord{V: 1, Desired: unit.Launched}))
	c.put(c.keys.Unplaced("big.service"), state.Encode(state.Unplaced{V: 1, Reason: "1 node: 1 has no disk=ssd"}))
	c.want("/v1/journal?unit=idle.service&unit=big.service",
		"! big.service: it is on no node: 1 node: 1 has no disk=ssd", "! idle.service: it is on no node: it is to be inactive")
	for _, path := range []string{"/v1/journal?unit=none.service", "/v1/unit-status?unit=none.service", "/v1/journal?unit=none*", "/v1/journal?unit=idle*"} {
		if status, body := c.get(path); status != http.StatusNotFound || !strings.Contains(body, "no such unit") {
			t.Errorf("%s: %d %s", path, status, body)
		}
	}
	_, body := c.get("/v1/unit-status?unit=big.service")
	if want := `{"statuses":[{"unit":"big.service","exit":0,"problem":"it is on no node: 1 node: 1 has no disk=ssd"}]}`; strings.TrimSpace(body) != want {
		t.Errorf("status %s, want %s", body, want)
	}
}

func TestHostileQuestions(t *testing.T) {
	c := newCluster(t, 1)
	c.place(0, "web.service")
	for _, query := range []string{
		"", "unit=", "unit=web", "unit=../etc/passwd", "unit=--help.service", "unit=a%0ab.service", "unit=[", "unit=" + strings.Repeat("a", 300) + ".service",
		"unit=web.service&lines=-1", "unit=web.service&lines=x", "unit=web.service&follow=maybe", "unit=web.service&output=short", "unit=web.service&since=now",
	} {
		for _, path := range []string{"/v1/journal?", "/v1/unit-status?"} {
			if status, body := c.get(path + query); status != http.StatusBadRequest && !(status == http.StatusNotFound && strings.HasPrefix(query, "unit=--help")) {
				t.Errorf("%s%s: %d %s", path, query, status, body)
			}
		}
	}
	// A node shows what is its own, whatever another one asks for.
	n := c.nodes[0]
	n.journal.write(second(1), "sshd.service", "secret")
	n.journal.write(second(2), "web.service", "hello")
	w := httptest.NewRecorder()
	r := httptest.NewRequest(http.MethodGet, "/v1/local/journal?unit=sshd.service&unit=web.service&unit=*", nil)
	r.RemoteAddr = netip.AddrPortFrom(n.address, 1234).String()
	n.peer.ServeHTTP(w, r)
	if body := w.Body.String(); w.Code != http.StatusOK || strings.Contains(body, "secret") || !strings.Contains(body, "hello") {
		t.Errorf("%d %s", w.Code, body)
	}
	w = httptest.NewRecorder()
	r.URL = &url.URL{Path: "/v1/local/unit-status", RawQuery: "unit=sshd.service"}
	n.peer.ServeHTTP(w, r)
	if body := strings.TrimSpace(w.Body.String()); body != `{"statuses":[]}` {
		t.Errorf("status of a unit that is not ours: %s", body)
	}
	for _, units := range n.journal.asked {
		if !slices.Equal(units, []string{"web.service"}) {
			t.Errorf("the journal was asked for %q", units)
		}
	}
}

func TestGuard(t *testing.T) {
	c := newCluster(t, 2)
	n := c.nodes[0]
	for _, tc := range []struct {
		from   string
		method string
		want   int
	}{
		{c.nodes[1].address.String() + ":99", http.MethodGet, http.StatusOK},
		{"[::ffff:" + c.nodes[1].address.String() + "]:99", http.MethodGet, http.StatusOK},
		{c.nodes[1].address.String() + ":99", http.MethodPost, http.StatusMethodNotAllowed},
		{"127.0.0.1:99", http.MethodGet, http.StatusForbidden},
		{"@", http.MethodGet, http.StatusForbidden},
	} {
		w := httptest.NewRecorder()
		r := httptest.NewRequest(tc.method, "/v1/local/unit-status?unit=web.service", nil)
		r.RemoteAddr = tc.from
		n.peer.ServeHTTP(w, r)
		if w.Code != tc.want {
			t.Errorf("%s from %s: %d, want %d", tc.method, tc.from, w.Code, tc.want)
		}
	}
	// One that left is no longer let in.
	c.delete(c.keys.Node("m2"))
	storetest.Wait(t, time.Minute, "the address is forgotten", func() bool { return !n.Feed.Latest().HasAddress(c.nodes[1].address) })
}

func TestNodeAway(t *testing.T) {
	c := newCluster(t, 3)
	c.place(0, "web@1.service")
	c.place(1, "web@2.service")
	c.place(2, "web@3.service")
	for i, n := range c.nodes {
		n.journal.write(second(i), fmt.Sprintf("web@%d.service", i+1), "hello")
	}
	if err := c.nodes[1].http.Close(); err != nil {
		t.Fatal(err)
	}
	c.nodes[2].journal.broken = errors.New("journalctl is not there")
	got := c.lines("/v1/journal?unit=web@*")
	if len(got) != 3 || got[0] != "node1 web@1.service hello" || !strings.Contains(strings.Join(got, "\n"), "! node node2: it does not answer: ") ||
		!strings.Contains(strings.Join(got, "\n"), "! node node3: journalctl is not there") {
		t.Errorf("lines %q", got)
	}
	c.delete(c.keys.Node("m2"))
	if got := c.lines("/v1/journal?unit=web@2.service"); len(got) != 1 || got[0] != "! node m2: it is not there" {
		t.Errorf("lines %q", got)
	}
	c.place(0, "broken.service")
	_, body := c.get("/v1/unit-status?unit=*")
	var found wire.UnitStatuses
	if err := json.Unmarshal([]byte(body), &found); err != nil {
		t.Fatal(err)
	}
	var problems []string
	for _, s := range found.Statuses {
		problems = append(problems, s.Unit+": "+s.Problem)
	}
	if want := []string{"broken.service: systemctl is not there", "web@1.service: ", "web@2.service: node m2: it is not there", "web@3.service: "}; !slices.Equal(problems, want) {
		t.Errorf("problems %q, want %q", problems, want)
	}
}

// follow reads an answer line by line.
type following struct {
	t     *testing.T
	lines chan string
}

func (c *cluster) follow(query string) *following {
	c.t.Helper()
	ctx, cancel := context.WithCancel(c.t.Context())
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, c.nodes[0].url+"/v1/journal?follow=1&"+query, nil)
	if err != nil {
		c.t.Fatal(err)
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		c.t.Fatal(err)
	}
	if resp.StatusCode != http.StatusOK {
		c.t.Fatal(resp.Status)
	}
	f := &following{c.t, make(chan string)}
	done := make(chan struct{})
	go func() {
		defer close(done)
		in := bufio.NewScanner(resp.Body)
		for in.Scan() {
			var l wire.JournalLine
			if json.Unmarshal(in.Bytes(), &l) != nil {
				continue
			}
			select {
			case f.lines <- text(l):
			case <-ctx.Done():
				return
			}
		}
	}()
	c.t.Cleanup(func() {
		cancel()
		<-done
		_ = resp.Body.Close()
	})
	return f
}

func (f *following) want(lines ...string) {
	f.t.Helper()
	for _, want := range lines {
		select {
		case got := <-f.lines:
			if !strings.HasPrefix(got, want) {
				f.t.Fatalf("line %q, want %q", got, want)
			}
		case <-time.After(time.Minute):
			f.t.Fatalf("no line for a minute, want %q", want)
		}
	}
}

func TestFollow(t *testing.T) {
	c := newCluster(t, 3)
	c.place(0, "web@1.service")
	c.place(1, "web@2.service")
	for i := range 6 {
		c.nodes[i%2].journal.write(second(i), fmt.Sprintf("web@%d.service", i%2+1), fmt.Sprintf("old %d", i))
	}
	f := c.follow("unit=web@*&lines=3")
	f.want("node2 web@2.service old 3", "node1 web@1.service old 4", "node2 web@2.service old 5")

	// Lines that come in the wrong order within the window are put right.
	at := time.Now()
	c.nodes[1].journal.write(at.Add(time.Millisecond), "web@2.service", "new 1")
	c.nodes[0].journal.write(at, "web@1.service", "new 0")
	f.want("node1 web@1.service new 0", "node2 web@2.service new 1")

	// A unit that comes later is found, from its first line on.
	c.nodes[2].journal.write(time.Now(), "web@3.service", "first")
	c.place(2, "web@3.service")
	f.want("node3 web@3.service first")
	c.nodes[0].journal.write(time.Now(), "web@4.service", "second on its node")
	c.place(0, "web@4.service")
	f.want("node1 web@4.service second on its node")
	c.nodes[0].journal.write(time.Now(), "web@1.service", "still there")
	f.want("node1 web@1.service still there")
}

func TestFollowLoss(t *testing.T) {
	c := newCluster(t, 2)
	c.place(0, "web@1.service")
	c.place(1, "web@2.service")
	c.nodes[1].journal.write(second(1), "web@2.service", "old")
	f := c.follow("unit=web@*")
	f.want("node2 web@2.service old")

	// The node goes away and comes back on the same port: one problem, and no
	// line is lost or doubled.
	address := c.nodes[0].Feed.Latest().Nodes["m2"].Record.Value.Peer
	if err := c.nodes[1].http.Close(); err != nil {
		t.Fatal(err)
	}
	f.want("! node node2: the connection was lost", "! node node2: it does not answer")
	c.nodes[1].journal.write(time.Now(), "web@2.service", "meanwhile")
	c.nodes[0].journal.write(time.Now(), "web@1.service", "the other goes on")
	f.want("node1 web@1.service the other goes on")
	l, err := net.Listen("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	again := &http.Server{Handler: c.nodes[1].peer}
	served := make(chan struct{})
	go func() {
		defer close(served)
		_ = again.Serve(l)
	}()
	defer func() {
		_ = again.Close()
		<-served
	}()
	f.want("node2 web@2.service meanwhile")
	c.nodes[1].journal.write(time.Now(), "web@2.service", "after")
	f.want("node2 web@2.service after")
}

// A node that hangs says nothing, not even that it is there.
func TestSilence(t *testing.T) {
	c := newCluster(t, 2)
	c.place(0, "web@1.service")
	c.place(1, "web@2.service")
	hang := make(chan struct{})
	silent := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.WriteString(w, `{"live":true,"units":["web@2.service"]}`+"\n")
		_ = http.NewResponseController(w).Flush()
		select {
		case <-hang:
		case <-r.Context().Done():
		}
	}))
	t.Cleanup(silent.Close)
	t.Cleanup(func() { close(hang) })
	c.put(c.keys.Node("m2"), state.Encode(state.NodeRecord{V: 1, ID: "m2", Name: "node2", Address: "127.0.0.1", Peer: strings.TrimPrefix(silent.URL, "http://"), Units: true}))
	f := c.follow("unit=web@*")
	f.want("! node node2: it says nothing any more")
	c.nodes[0].journal.write(time.Now(), "web@1.service", "the other goes on")
	f.want("node1 web@1.service the other goes on")
}

// Without the store a node still shows what it has itself.
func TestStoreAway(t *testing.T) {
	c := newCluster(t, 2)
	c.place(0, "web@1.service")
	c.place(1, "web@2.service")
	c.nodes[0].journal.write(second(1), "web@1.service", "hello")
	if err := c.client.Close(); err != nil {
		t.Fatal(err)
	}
	got := c.lines("/v1/journal?unit=web@*")
	if len(got) != 2 || !strings.HasPrefix(got[0], "! only units of this node are shown: ") || got[1] != "node1 web@1.service hello" {
		t.Errorf("lines %q", got)
	}
	if !c.nodes[0].Feed.Latest().HasAddress(c.nodes[1].address) {
		t.Error("without the store the other nodes are forgotten")
	}
}

func TestTail(t *testing.T) {
	for n, want := range map[int]string{-1: "0123p4", 0: "p", 1: "4p", 3: "234p", 5: "01234p", 9: "01234p"} {
		var got strings.Builder
		tail := newTail(n, func(l wire.JournalLine) error {
			got.WriteString(l.Message + l.Problem)
			return nil
		})
		for i := range 5 {
			if i == 4 {
				_ = tail.add(wire.JournalLine{Problem: "p"})
			}
			_ = tail.add(wire.JournalLine{Message: strconv.Itoa(i)})
		}
		if err := tail.end(); err != nil || got.String() != want {
			t.Errorf("the last %d: %s, want %s", n, got.String(), want)
		}
	}
}
