// Package logs shows what units say, wherever they run: their journals merged
// by time, and systemd's status of each. Every node answers for its own units,
// to other nodes only; the node that is asked by an operator asks the others. It
// knows the records of units and machines and the edge to systemd. It must not
// know how units are placed or run, nor how anything is shown to people.
//
// Names of units come from strangers. A node shows units that it runs itself and
// nothing else of its journal.
package logs

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"iter"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"path"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"flotilla/internal/registry"
	"flotilla/internal/store"
	"flotilla/internal/systemd"
	"flotilla/internal/unit"
)

// Config is what a Server works with. All fields are required.
type Config struct {
	Store *store.Client
	Keys  registry.Keys
	Self  func() string   // ID of this machine
	Own   func() []string // names of the units that are on this machine
	// Journal and Show are systemd.Journal and systemd.Show.
	Journal func(context.Context, systemd.JournalQuery) iter.Seq2[systemd.Entry, error]
	Show    func(ctx context.Context, unit string) (text string, exit int, err error)
	Log     *slog.Logger
}

// Server answers for the units of this machine and asks the others. Its handlers
// work while Run runs.
type Server struct {
	Config
	pace     pace
	machines atomic.Pointer[map[string]registry.Machine] // by ID; the last that were known
}

// pace is how long things take; tests are in a hurry.
type pace struct {
	reorder time.Duration // lines of different machines arrive within this
	begin   time.Duration // for machines to send what they have
	look    time.Duration // between looks at where the units are
	beat    time.Duration // of a machine that has nothing to say
	connect time.Duration // until a machine counts as away
}

// New returns a Server.
func New(cfg Config) *Server {
	s := &Server{Config: cfg, pace: pace{
		reorder: 300 * time.Millisecond, begin: 5 * time.Second, look: 3 * time.Second, beat: 5 * time.Second, connect: 4 * time.Second,
	}}
	s.machines.Store(&map[string]registry.Machine{})
	return s
}

// Run keeps the list of machines until ctx ends, and returns nil then. While the
// store is away the last list stays.
func (s *Server) Run(ctx context.Context) error {
	prefix := s.Keys.Machine("")
	return store.NewReflector(s.Store, prefix, s.Keys.Machine(s.Self()), s.Log).Run(ctx, func(u store.Update) int {
		next := map[string]registry.Machine{}
		if !u.Reset {
			for id, m := range *s.machines.Load() {
				next[id] = m
			}
		}
		for _, kv := range u.Items {
			add(next, prefix, kv.Key, kv.Value)
		}
		for _, e := range u.Events {
			if delete(next, strings.TrimPrefix(e.Key, prefix)); !e.Deleted {
				add(next, prefix, e.Key, e.Value)
			}
		}
		changed := len(u.Events)
		if u.Reset && !sameKeys(next, *s.machines.Load()) {
			changed++
		}
		s.machines.Store(&next)
		return changed
	})
}

// add leaves out what cannot be read: such a machine cannot be asked.
func add(machines map[string]registry.Machine, prefix, key, value string) {
	if m, err := registry.Decode[registry.Machine](value); err == nil {
		machines[strings.TrimPrefix(key, prefix)] = m
	}
}

func sameKeys(a, b map[string]registry.Machine) bool {
	for id := range a {
		if _, ok := b[id]; !ok {
			return false
		}
	}
	return len(a) == len(b)
}

// Registered reports whether addr is the address of a registered machine.
func (s *Server) Registered(addr netip.Addr) bool {
	for _, m := range *s.machines.Load() {
		if known, err := netip.ParseAddr(m.Address); err == nil && known.Unmap() == addr {
			return true
		}
	}
	return false
}

// Register adds what operators ask to the API of the node.
func (s *Server) Register(mux *http.ServeMux) {
	mux.HandleFunc("GET /v1/journal", s.journal)
	mux.HandleFunc("GET /v1/unit-status", s.unitStatus)
}

// Local serves what other nodes ask: read only, and to registered machines only.
func (s *Server) Local() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /v1/local/journal", s.localJournal)
	mux.HandleFunc("GET /v1/local/unit-status", s.localStatus)
	return Guard(s.Registered, mux)
}

// Guard lets only those through whose source address is allowed.
func Guard(allowed func(netip.Addr) bool, next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		from, err := netip.ParseAddrPort(r.RemoteAddr)
		if err != nil || !allowed(from.Addr().Unmap().WithZone("")) {
			fail(w, http.StatusForbidden, "forbidden", fmt.Sprintf("%s is not the address of a machine of this cluster", r.RemoteAddr), "")
			return
		}
		next.ServeHTTP(w, r)
	})
}

// fail answers in the shape of all errors of the API.
func fail(w http.ResponseWriter, status int, code, message, hint string) {
	type body struct {
		Code    string `json:"code"`
		Message string `json:"message"`
		Hint    string `json:"hint,omitempty"`
	}
	answer(w, status, map[string]body{"error": {code, message, hint}})
}

func answer(w http.ResponseWriter, status int, body any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	out := json.NewEncoder(w)
	out.SetEscapeHTML(false)
	_ = out.Encode(body) // a client that is gone does not want it
}

// errNoUnit: there is no such unit, or none that matches.
var errNoUnit = errors.New("no such unit")

// question is what was asked for.
type question struct {
	units  []string // names or patterns as of path.Match
	lines  int      // negative: all
	follow bool
	after  string    // cursor; between nodes only
	since  time.Time // between nodes only; zero: no limit
}

const (
	defaultLines = 10
	maxLines     = 10_000 // of a question that has to be kept in memory
	maxUnits     = 10_000
)

func parse(r *http.Request) (question, error) {
	query := r.URL.Query()
	q := question{units: query["unit"], lines: defaultLines, after: query.Get("after")}
	if len(q.units) == 0 || len(q.units) > maxUnits {
		return q, errors.New("name the units: ?unit=NAME")
	}
	for _, u := range q.units {
		if !isPattern(u) {
			if err := unit.CheckName(u); err != nil {
				return q, fmt.Errorf("%.300q: %w", u, err)
			}
		} else if _, err := path.Match(u, ""); err != nil || len(u) > 256 {
			return q, fmt.Errorf("%.300q is not a pattern", u)
		}
	}
	var err error
	switch v := query.Get("lines"); v {
	case "":
	case "all":
		q.lines = -1
	default:
		if q.lines, err = strconv.Atoi(v); err != nil || q.lines < 0 {
			return q, fmt.Errorf("lines=%.20q is neither a number nor all", v)
		}
	}
	switch v := query.Get("follow"); v {
	case "", "0", "false":
	case "1", "true":
		q.follow = true
	default:
		return q, fmt.Errorf("follow=%.20q is neither 1 nor 0", v)
	}
	if v := query.Get("output"); v != "" && v != "json" {
		return q, fmt.Errorf("output=%.20q: there is only json", v)
	}
	if v := query.Get("since"); v != "" {
		if q.since, err = time.Parse(time.RFC3339Nano, v); err != nil {
			return q, fmt.Errorf("since=%.40q is not a time", v)
		}
	}
	return q, nil
}

func isPattern(name string) bool { return strings.ContainsAny(name, "*?[") }

// matches reports whether one of the patterns means the unit; the type may be
// left out for services.
func matches(patterns []string, name string) bool {
	is := func(p string) bool {
		ok, err := path.Match(p, name)
		return p == name || err == nil && ok
	}
	return slices.ContainsFunc(patterns, func(p string) bool { return is(p) || is(p+".service") })
}

// view is where units are.
type view struct {
	machines map[string]registry.Machine
	units    map[string][]string // names by machine ID; of global units those that may be there
	nowhere  map[string]string   // names of units on no machine, and why
	partial  string              // why this is only what the machine itself knows; "" if it is all
}

// look finds the units. Without the store it finds those of this machine.
func (s *Server) look(ctx context.Context, patterns []string) (view, error) {
	v := view{machines: *s.machines.Load(), units: map[string][]string{}, nowhere: map[string]string{}}
	err := s.find(ctx, patterns, &v)
	if err == nil || errors.Is(err, errNoUnit) {
		return v, err
	}
	if ctx.Err() != nil {
		return v, ctx.Err()
	}
	self := s.Self()
	v.units, v.nowhere, v.partial = map[string][]string{}, nil, fmt.Sprintf("only units of this machine are shown: %v", err)
	for _, name := range s.Own() {
		if matches(patterns, name) {
			v.units[self] = append(v.units[self], name)
		}
	}
	return v, nil
}

func (s *Server) find(ctx context.Context, patterns []string, v *view) error {
	items, _, err := s.Store.List(ctx, s.Keys.Machine(""))
	if err != nil {
		return err
	}
	v.machines = map[string]registry.Machine{}
	for _, kv := range items {
		add(v.machines, s.Keys.Machine(""), kv.Key, kv.Value)
	}
	var globs []string
	for _, p := range patterns {
		if isPattern(p) {
			globs = append(globs, p)
		} else if err := s.findOne(ctx, p, v); err != nil {
			return err
		}
	}
	if len(globs) > 0 {
		if err := s.findAll(ctx, globs, v); err != nil {
			return err
		}
	}
	for id, names := range v.units {
		slices.Sort(names)
		v.units[id] = slices.Compact(names)
	}
	return nil
}

func (s *Server) findOne(ctx context.Context, name string, v *view) error {
	kv, ok, err := s.Store.Get(ctx, s.Keys.Placement(name))
	if err != nil {
		return err
	}
	if ok {
		v.place(name, kv.Value)
		return nil
	}
	if _, ok, err = s.Store.Get(ctx, s.Keys.Entry(registry.Global, name)); err != nil {
		return err
	}
	if ok {
		v.everywhere(name)
		return nil
	}
	kv, ok, err = s.Store.Get(ctx, s.Keys.Unit(name))
	if err != nil {
		return err
	}
	if !ok {
		return fmt.Errorf("%w: %s", errNoUnit, name)
	}
	v.nowhere[name] = "it is on no machine"
	if u, err := registry.Decode[registry.Unit](kv.Value); err == nil && u.Desired == registry.Inactive {
		v.nowhere[name] = "it is on no machine: it is to be inactive"
		return nil
	}
	if kv, ok, err = s.Store.Get(ctx, s.Keys.Unplaced(name)); err != nil {
		return err
	}
	if why, err := registry.Decode[registry.Unplaced](kv.Value); ok && err == nil {
		v.nowhere[name] = "it is on no machine: " + why.Reason
	}
	return nil
}

func (s *Server) findAll(ctx context.Context, globs []string, v *view) error {
	placed, _, err := s.Store.List(ctx, s.Keys.Placement(""))
	if err != nil {
		return err
	}
	globals, _, err := s.Store.List(ctx, s.Keys.Schedule(registry.Global))
	if err != nil {
		return err
	}
	found := false
	for _, kv := range placed {
		if name := strings.TrimPrefix(kv.Key, s.Keys.Placement("")); matches(globs, name) {
			v.place(name, kv.Value)
			found = true
		}
	}
	for _, kv := range globals {
		if name := strings.TrimPrefix(kv.Key, s.Keys.Schedule(registry.Global)); matches(globs, name) {
			v.everywhere(name)
			found = true
		}
	}
	if !found && len(v.units) == 0 && len(v.nowhere) == 0 {
		return fmt.Errorf("%w on any machine matches %s", errNoUnit, strings.Join(globs, " or "))
	}
	return nil
}

func (v *view) place(name, value string) {
	p, err := registry.Decode[registry.Placement](value)
	if err != nil {
		v.nowhere[name] = err.Error()
		return
	}
	v.units[p.Machine] = append(v.units[p.Machine], name)
}

func (v *view) everywhere(name string) {
	for id, m := range v.machines {
		if m.Units {
			v.units[id] = append(v.units[id], name)
		}
	}
}

// begin looks for what was asked for, and answers itself if nothing is there.
func (s *Server) begin(w http.ResponseWriter, r *http.Request) (q question, v view, ok bool) {
	q, err := parse(r)
	if err != nil {
		fail(w, http.StatusBadRequest, "bad_request", err.Error(), "")
		return q, v, false
	}
	v, err = s.look(r.Context(), q.units)
	switch {
	case errors.Is(err, errNoUnit):
		fail(w, http.StatusNotFound, "not_found", err.Error(), "flotilla list-units shows what runs where")
		return q, v, false
	case err != nil:
		fail(w, http.StatusServiceUnavailable, "unavailable", err.Error(), "")
		return q, v, false
	}
	return q, v, true
}

// transport makes connections that come from this machine's own address, by which
// the others know it.
func (s *Server) transport() *http.Transport {
	dial := func(ctx context.Context, network, address string) (net.Conn, error) {
		d := &net.Dialer{Timeout: s.pace.connect}
		if addr, err := netip.ParseAddr((*s.machines.Load())[s.Self()].Address); err == nil {
			d.LocalAddr = net.TCPAddrFromAddrPort(netip.AddrPortFrom(addr, 0))
		}
		conn, err := d.DialContext(ctx, network, address)
		if d.LocalAddr != nil && errors.Is(err, syscall.EADDRNOTAVAIL) { // an address that something else translates
			d.LocalAddr = nil
			return d.DialContext(ctx, network, address)
		}
		return conn, err
	}
	return &http.Transport{DialContext: dial, ResponseHeaderTimeout: s.pace.connect, DisableKeepAlives: true}
}
