package node

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"

	"flotilla/internal/api"
	"flotilla/internal/logs"
	"flotilla/internal/registry"
	"flotilla/internal/store"
)

// storeService is the unit that runs a node's member of the store.
const storeService = "flotilla-store.service"

// membersFile is gone after a reboot, and so is what it is needed for.
const membersFile = "/run/flotilla/store-members"

// memberPath is what nodes ask each other.
const memberPath = "/v1/local/store-member"

// memberState is the answer of a node that is asked for its member of the store.
type memberState struct {
	Name    string   `json:"name"`              // of the member
	State   string   `json:"state"`             // at a moment after the question came
	Members []string `json:"members,omitempty"` // IDs of the members that it knows, if it is leaderless
	Why     string   `json:"why,omitempty"`     // the state is unknown
}

const (
	memberStopped    = "stopped"    // no process of it exists
	memberLeaderless = "leaderless" // it runs, and neither leads nor knows a leader
	memberLed        = "led"        // it leads, or knows who does
	memberUnknown    = "unknown"    // it may lead
)

// leaderless finds out whether the store surely has no leader; see
// agent.Config.Leaderless. Every node answers for its own member, whose process
// it can see: that one does not answer by itself says nothing.
type leaderless struct {
	address  netip.Addr // of this node, by which the others know it
	endpoint string     // client endpoint of the own member
	file     string     // what the next process has to know while the store is away
	log      *slog.Logger

	name       func() (string, error)                                            // of the own member
	processes  func(context.Context) ([]int, error)                              // of the own member; nil: not to be seen
	opinion    func(ctx context.Context, endpoint string) (store.Opinion, error) // of the own member
	members    func() []store.Member                                             // that were read last; nil: none yet
	machines   func() []registry.Machine                                         // that were seen last; none yet if the store is away
	registered func(netip.Addr) bool                                             // the address is that of a machine
	kept       known                                                             // by an earlier process of this boot
}

// known is who is to be asked, and who may ask.
type known struct {
	Members  []store.Member `json:"members"`
	Machines []peer         `json:"machines"`
}

// peer is what has to be known of a machine.
type peer struct {
	Address string `json:"address"`
	API     string `json:"api"` // ip:port; "" if it answers nobody
}

func (p peer) at(addr netip.Addr) bool {
	own, err := netip.ParseAddr(p.Address)
	return err == nil && own.Unmap() == addr.Unmap()
}

// openLeaderless returns nil where nothing could be proven: the store is somebody
// else's, or this machine runs no units or answers no other node.
func (n *node) openLeaderless() *leaderless {
	if !n.cfg.RunsUnits() || !n.cfg.RunsStore() || n.cfg.APIPort == 0 {
		return nil
	}
	_, local := n.cfg.endpoints()
	l := &leaderless{
		address: netip.MustParseAddr(n.cfg.Address), endpoint: local, file: membersFile, log: n.log,
		name:    func() (string, error) { return store.MemberName(StoreConfig(&n.cfg.Config).DataDir) },
		opinion: n.client.Opinion, members: n.client.Members, registered: n.fleet.logs.Registered,
		machines: func() []registry.Machine {
			if a := n.fleet.agent.Load(); a != nil {
				return a.Machines()
			}
			return nil
		},
	}
	if !n.cfg.Supervise { // a child of the node is in no unit of its own
		l.processes = func(ctx context.Context) ([]int, error) { return n.fleet.systemd.Processes(ctx, storeService) }
	}
	l.load()
	return l
}

// load reads what an earlier process has kept. What cannot be read is nothing.
func (l *leaderless) load() {
	text, err := os.ReadFile(l.file)
	if err == nil {
		err = json.Unmarshal(text, &l.kept)
	}
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		l.log.Warn("who the members of the store were is not known", "err", err)
	}
}

// run keeps for the next process what this one knows, until ctx ends.
func (l *leaderless) run(ctx context.Context) error {
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	var last known
	for {
		if k := l.know(); !slices.Equal(k.Members, last.Members) || !slices.Equal(k.Machines, last.Machines) {
			if err := k.write(l.file); err != nil {
				l.log.Warn("the next process will not know the members of the store", "err", err)
			}
			last = k
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil
		}
	}
}

func (k known) write(file string) error {
	text, err := json.Marshal(k)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		return err
	}
	if err := os.WriteFile(file+".new", text, 0o600); err != nil {
		return err
	}
	return os.Rename(file+".new", file)
}

// know returns what was read last, by an earlier process if this one has read
// nothing yet.
func (l *leaderless) know() known {
	k := known{Members: l.members()}
	for _, m := range l.machines() {
		k.Machines = append(k.Machines, peer{m.Address, m.API})
	}
	slices.SortFunc(k.Machines, func(a, b peer) int {
		return cmp.Or(cmp.Compare(a.Address, b.Address), cmp.Compare(a.API, b.API))
	})
	if k.Members == nil {
		k.Members = l.kept.Members
	}
	if k.Machines == nil {
		k.Machines = l.kept.Machines
	}
	return k
}

// proven asks for all members of the store, learners included, and reports
// whether each surely did not lead at a moment since.
func (l *leaderless) proven(ctx context.Context) bool {
	k := l.know()
	if len(k.Members) == 0 {
		return false
	}
	g, ctx := errgroup.WithContext(ctx)
	for _, m := range k.Members {
		g.Go(func() error {
			if err := l.ask(ctx, k, m); err != nil {
				return fmt.Errorf("member %s of the store: %w", cmp.Or(m.Name, m.ID), err)
			}
			return nil
		})
	}
	err := g.Wait()
	if err != nil {
		l.log.Debug("the store may have a leader", "err", err)
	}
	return err == nil
}

// ask returns nil if the member surely did not lead at a moment since the call.
func (l *leaderless) ask(ctx context.Context, k known, m store.Member) error {
	if m.Name == "" {
		return errors.New("it has never started: nobody knows where it is")
	}
	addr, err := endpointAddr(m.Endpoint)
	if err != nil {
		return err
	}
	var s memberState
	if addr == l.address {
		s = l.state(ctx)
	} else {
		i := slices.IndexFunc(k.Machines, func(p peer) bool { return p.at(addr) && p.API != "" })
		if i < 0 {
			return fmt.Errorf("no machine at %s answers for it", addr)
		}
		if s, err = l.remote(ctx, k.Machines[i].API); err != nil {
			return err
		}
	}
	if s.Name != m.Name {
		return fmt.Errorf("the node at %s has the member %q", addr, s.Name)
	}
	switch s.State {
	case memberStopped:
		return nil
	case memberLeaderless:
		for _, id := range s.Members {
			if !slices.ContainsFunc(k.Members, func(m store.Member) bool { return m.ID == id }) {
				return fmt.Errorf("it knows a member %s that this node does not know", id)
			}
		}
		return nil
	}
	return fmt.Errorf("it is %s: %s", s.State, s.Why)
}

func endpointAddr(endpoint string) (netip.Addr, error) {
	u, err := url.Parse(endpoint)
	if err != nil {
		return netip.Addr{}, err
	}
	return netip.ParseAddr(u.Hostname())
}

// remote asks another node.
func (l *leaderless) remote(ctx context.Context, api string) (s memberState, err error) {
	u := url.URL{Scheme: "http", Host: api, Path: memberPath}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, u.String(), nil)
	if err != nil {
		return s, err
	}
	// The others know this node by its address.
	from := net.Dialer{LocalAddr: net.TCPAddrFromAddrPort(netip.AddrPortFrom(l.address, 0))}
	transport := &http.Transport{DialContext: from.DialContext, DisableKeepAlives: true}
	resp, err := transport.RoundTrip(req)
	if err != nil {
		return s, fmt.Errorf("its node does not answer: %w", err)
	}
	defer func() { _ = resp.Body.Close() }() // what is needed of it was read
	if resp.StatusCode != http.StatusOK {
		return s, fmt.Errorf("its node answers %s", resp.Status)
	}
	if err := json.NewDecoder(io.LimitReader(resp.Body, 64<<10)).Decode(&s); err != nil {
		return s, fmt.Errorf("the answer of its node is not understood: %w", err)
	}
	return s, nil
}

// answerLimit bounds what a node does for one question.
const answerLimit = 1500 * time.Millisecond

// state looks at the own member. All that it looks at is from after the call.
func (l *leaderless) state(ctx context.Context) memberState {
	ctx, cancel := context.WithTimeout(ctx, answerLimit)
	defer cancel()
	s := memberState{State: memberUnknown}
	var err error
	if s.Name, err = l.name(); err != nil {
		s.Why = err.Error()
		return s
	}
	// Whoever runs a store of his own beside the unit is seen by its socket.
	if l.processes != nil {
		if pids, err := l.processes(ctx); err == nil && len(pids) == 0 && l.refused(ctx) {
			s.State = memberStopped
			return s
		}
	}
	o, err := l.opinion(ctx, l.endpoint)
	switch {
	case err != nil:
		s.Why = err.Error()
	case o.Led:
		s.State = memberLed
	default:
		s.State, s.Members = memberLeaderless, o.Members
	}
	return s
}

// refused reports whether nobody listens where the own member would.
func (l *leaderless) refused(ctx context.Context) bool {
	u, err := url.Parse(l.endpoint)
	if err != nil {
		return false
	}
	conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", u.Host)
	if err == nil {
		_ = conn.Close() // nothing was said on it
	}
	return errors.Is(err, syscall.ECONNREFUSED)
}

// handler answers for the own member, to machines of the cluster only.
func (l *leaderless) handler() http.Handler {
	return logs.Guard(l.allowed, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		_ = json.NewEncoder(w).Encode(l.state(r.Context())) // a node that is gone does not want it
	}))
}

// allowed reports whether a machine has the address, or had it when the store
// was last there.
func (l *leaderless) allowed(addr netip.Addr) bool {
	return l.registered(addr) || slices.ContainsFunc(l.know().Machines, func(p peer) bool { return p.at(addr) })
}

// serveOthers serves what other nodes ask of this one.
func (n *node) serveOthers(ctx context.Context) error {
	l, err := net.Listen("tcp", n.fleet.machine.API)
	if err != nil {
		return fmt.Errorf("--api-port %d: %w", n.cfg.APIPort, err)
	}
	mux := http.NewServeMux()
	mux.Handle("/", n.fleet.logs.Local())
	if n.fleet.leaderless != nil {
		mux.Handle("GET "+memberPath, n.fleet.leaderless.handler())
	}
	return api.Serve(ctx, mux, n.log, l)
}
