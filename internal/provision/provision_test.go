package provision

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"flotilla/internal/nodeconfig"
	"flotilla/internal/wire"
)

// platform is a Provider whose machines are records, and the API of their nodes.
type platform struct {
	mu       sync.Mutex // guards all of this
	machines []Machine
	made     []string          // names in the order in which Make returned
	files    map[string]string // configuration by machine
	failing  map[string]error  // of Make, by machine
	lacking  map[string]bool   // nodes whose router does not serve
	answers  []string          // codes of the next removals of a member; "" and none: it is done
	removed  []string          // members, and whom was asked
}

func newPlatform(machines ...Machine) *platform {
	p := &platform{files: map[string]string{}, failing: map[string]error{}, lacking: map[string]bool{}}
	for i, m := range machines {
		m.Address = netip.AddrFrom4([4]byte{10, 0, 0, byte(11 + i)})
		p.machines = append(p.machines, m)
	}
	return p
}

func (p *platform) find(name string) *Machine {
	for i := range p.machines {
		if p.machines[i].Name == name {
			return &p.machines[i]
		}
	}
	return nil
}

func (p *platform) Make(_ context.Context, s Spec) (Machine, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	m := p.find(s.Name)
	if m == nil {
		p.machines = append(p.machines, Machine{Name: s.Name, Release: s.Release, Address: netip.AddrFrom4([4]byte{10, 0, 0, byte(11 + len(p.machines))})})
		m = &p.machines[len(p.machines)-1]
	}
	if err := p.failing[s.Name]; err != nil {
		return *m, err
	}
	if !m.Complete {
		for _, f := range s.Files {
			if strings.HasSuffix(f.Path, "/node.yaml") {
				p.files[s.Name] = f.Text
			}
		}
	}
	m.Complete, m.Running = true, true
	p.made = append(p.made, s.Name)
	return *m, nil
}

func (p *platform) List(context.Context) ([]Machine, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Clone(p.machines), nil
}

func (p *platform) Destroy(context.Context, string) error              { return nil }
func (p *platform) Power(context.Context, string, Power) error         { return nil }
func (p *platform) Run(context.Context, string, string, Streams) error { return nil }
func (p *platform) Console(context.Context, string) (string, error)    { return "", nil }

// Dial connects to the API of a node that runs; it answers one request.
func (p *platform) Dial(_ context.Context, name, _ string) (net.Conn, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if m := p.find(name); m == nil || !m.Running {
		return nil, errors.New("connection refused")
	}
	near, far := net.Pipe()
	go func() {
		defer func() { _ = far.Close() }()
		r, err := http.ReadRequest(bufio.NewReader(far))
		if err != nil {
			return
		}
		w := httptest.NewRecorder()
		w.Header().Set("Connection", "close")
		p.answer(w, r, name)
		_ = w.Result().Write(far) // the client may be gone
	}()
	return near, nil
}

func (p *platform) answer(w http.ResponseWriter, r *http.Request, name string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	var body any
	switch {
	case r.URL.Path == "/v1/status":
		st := wire.Status{Router: &wire.RouterStatus{}}
		st.Store.Live, st.Router.Serving = true, !p.lacking[name]
		body = st
	case r.URL.Path == "/v1/nodes":
		nodes := wire.Nodes{}
		for _, m := range p.machines {
			if m.Running {
				n := wire.Node{}
				n.Name, n.Serving = m.Name, !p.lacking[m.Name]
				nodes.Nodes = append(nodes.Nodes, n)
			}
		}
		body = nodes
	case r.Method == http.MethodDelete:
		code := wire.Code("")
		if len(p.answers) > 0 {
			code, p.answers = wire.Code(p.answers[0]), p.answers[1:]
		}
		p.removed = append(p.removed, name+" "+strings.TrimPrefix(r.URL.Path, "/v1/store/members/"))
		if code != "" {
			w.WriteHeader(code.Status())
			body = map[string]any{"error": wire.Errorf(code, "", "the store says %s", code)}
		}
	}
	_ = json.NewEncoder(w).Encode(body)
}

var programs = nodeconfig.Programs{Flotilla: "/bin/true", Flotillad: "/bin/true"}

func on(name string) Machine { return Machine{Name: name, Complete: true, Running: true} }

// The first node founds the cluster, alone; the others join all others.
func TestGrow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPlatform()
		var events []string
		c := Cluster{Provider: p, Name: "a", Tell: func(e Event) { events = append(events, fmt.Sprintf("%s %t", e.Machine.Name, e.Joined)) }}
		g := Growth{Nodes: 3, Programs: programs, Settings: []nodeconfig.Setting{{Name: "insecure", Value: "true"}}, Limit: time.Minute}
		if err := c.Grow(t.Context(), g); err != nil {
			t.Fatal(err)
		}
		if p.made[0] != "n1" || strings.Contains(p.files["n1"], "join") {
			t.Errorf("made in the order %v, the first with\n%s", p.made, p.files["n1"])
		}
		for name, join := range map[string]string{"n2": `join: ["n1", "n3"]`, "n3": `join: ["n1", "n2"]`} {
			if !strings.Contains(p.files[name], join) || !strings.Contains(p.files[name], "insecure: true") {
				t.Errorf("%s has\n%s", name, p.files[name])
			}
		}
		if len(events) != 6 || slices.Contains(events[:3], "n1 true") || !slices.Contains(events[3:], "n1 true") {
			t.Errorf("it told of %v", events)
		}

		// Again: nothing is made, and nobody told of a boot. What is off is started.
		events = nil
		p.find("n2").Running = false
		if err := c.Grow(t.Context(), g); err != nil {
			t.Fatal(err)
		}
		if events[0] != "n2 false" || len(events) != 4 || len(p.machines) != 3 {
			t.Errorf("the second time it told of %v", events)
		}
	})
}

// Who was killed while the first node was made goes on with that node alone.
func TestGrowAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPlatform(Machine{Name: "n1"})
		c := Cluster{Provider: p, Name: "a"}
		p.failing["n1"] = errors.New("no disk")
		g := Growth{Nodes: 2, Programs: programs, Limit: time.Minute}
		if err := c.Grow(t.Context(), g); err == nil || !strings.Contains(err.Error(), "no disk") || len(p.machines) != 1 {
			t.Errorf("%v, machines %v", err, p.machines)
		}
		p.failing = nil
		if err := c.Grow(t.Context(), g); err != nil {
			t.Fatal(err)
		}
		if strings.Contains(p.files["n1"], "join") || !strings.Contains(p.files["n2"], `join: ["n1"]`) {
			t.Errorf("%v", p.files)
		}
		g.Settings = []nodeconfig.Setting{{Name: "nonsense", Value: "1"}}
		if err := c.Grow(t.Context(), g); err == nil || !strings.Contains(err.Error(), "nonsense") {
			t.Errorf("an unknown setting: %v", err)
		}
	})
}

func TestNotJoined(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPlatform(on("n1"), on("n2"), Machine{Name: "n3", Complete: true}, Machine{Name: "n4"})
		p.lacking["n2"] = true
		c := Cluster{Provider: p, Name: "a"}
		nodes, err := c.Nodes(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		got := map[string]string{}
		for _, n := range nodes {
			got[n.Name] = n.State + " " + n.Missing
		}
		want := map[string]string{"n1": "joining it does not see n2", "n2": "joining its router does not serve", "n3": "off ", "n4": "incomplete "}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Error(diff)
		}
		began := time.Now()
		err = c.Grow(t.Context(), Growth{Nodes: 4, Programs: programs, Limit: 10 * time.Second})
		if !errors.Is(err, ErrNotJoined) || !strings.Contains(err.Error(), "node n2 has not joined within 10s: its router does not serve") || !strings.Contains(err.Error(), "n1 has not joined within 10s: it does not see n2") || time.Since(began) != 10*time.Second {
			t.Errorf("%v after %s", err, time.Since(began))
		}
		ctx, cancel := context.WithCancelCause(t.Context())
		time.AfterFunc(time.Second, func() { cancel(io.ErrUnexpectedEOF) })
		if err := c.Grow(ctx, Growth{Nodes: 4, Programs: programs, Limit: time.Hour}); !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Errorf("after it was cancelled: %v", err)
		}
	})
}

func TestLeave(t *testing.T) {
	for _, tc := range []struct {
		what    string
		answers string // of the nodes asked, in order
		asked   string
		err     string
	}{
		{"it is done", "", "n1", ""},
		{"it has no member", "not_found", "n1", ""},
		{"the store has just started", "conflict conflict conflict conflict", "n1 n3 n1 n3 n1", ""},
		{"the first has lost the store", "store_unavailable", "n1 n3", ""},
		{"all have lost the store", "store_unavailable store_unavailable", "n1 n3", "the store says store_unavailable"},
		{"it never becomes healthy", strings.Repeat("conflict ", 200), "", "the store says conflict"},
	} {
		t.Run(tc.what, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				p := newPlatform(on("n1"), on("n2"), on("n3"), Machine{Name: "n4", Complete: true})
				p.answers = strings.Fields(tc.answers)
				c := Cluster{Provider: p, Name: "a"}
				err := c.Leave(t.Context(), "n2")
				if (err == nil) != (tc.err == "") || err != nil && !strings.Contains(err.Error(), tc.err) {
					t.Errorf("%v, want %q", err, tc.err)
				}
				var want []string
				for _, name := range strings.Fields(tc.asked) {
					want = append(want, name+" 10.0.0.12")
				}
				if diff := cmp.Diff(want, p.removed); diff != "" && tc.asked != "" {
					t.Error(diff)
				}
			})
		})
	}
	c := Cluster{Provider: newPlatform(on("n1"), Machine{Name: "n2"}), Name: "a"}
	if err := c.Leave(t.Context(), "n9"); !errors.Is(err, ErrNotFound) {
		t.Errorf("an unknown node: %v", err)
	}
	if err := c.Leave(t.Context(), "n1"); err == nil || !strings.Contains(err.Error(), "no other node runs") {
		t.Errorf("the only one that runs: %v", err)
	}
}

func TestNewNames(t *testing.T) {
	for _, tc := range []struct {
		taken string
		n     int
		want  string
	}{{"", 3, "n1 n2 n3"}, {"n1 n3", 4, "n1 n3 n2 n4"}, {"n1 n2 n3", 3, "n1 n2 n3"}, {"n1 n2", 1, "n1 n2"}} {
		var machines []Machine
		for name := range strings.FieldsSeq(tc.taken) {
			machines = append(machines, Machine{Name: name})
		}
		if got := strings.Join(newNames(machines, tc.n), " "); got != tc.want {
			t.Errorf("%d with %q: %q, want %q", tc.n, tc.taken, got, tc.want)
		}
	}
}
