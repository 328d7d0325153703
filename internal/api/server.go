// Package api is a node's HTTP surface: the API on its unix socket, and the
// health checks and metrics on its operations socket. It knows the components of its node and the shape of every answer;
// it must not know HAProxy, how etcd is reached, or how answers are shown to
// people.
package api

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"

	"flotilla/internal/catalog"
	"flotilla/internal/client"
	"flotilla/internal/dns"
	"flotilla/internal/router"
	"flotilla/internal/store"
)

// Router is what the API asks of the node's router. *router.Router has it; the
// tests of this package answer with fixed figures.
type Router interface {
	Status() router.Status
	Applied() (revision int64, changed <-chan struct{})
	SetDraining(draining bool) error
	Stats(ctx context.Context) ([]router.ServiceStats, error)
}

// Config is what a Server serves. All fields are required but Ports.SNI and
// those that may be nil.
type Config struct {
	Node    string
	Version string
	Address string
	Domain  string // that DNS answers from the catalog
	Started time.Time
	Ports   Ports

	Socket    string // unix socket of the API: for its owner and group
	OpsSocket string // "@name": abstract unix socket of health checks and metrics, for everybody

	Policy     catalog.Policy
	Feed       *catalog.Feed
	Store      *store.Client
	Router     Router
	DNS        func() dns.Stats
	StoreState func() client.StoreState
	Problems   func() int      // of all services
	Warnings   func() []string // troubles of this node; nil: none
	// AcceptEpoch tells the reflector that the store's present content is the
	// right one; nil: there is nothing to tell.
	AcceptEpoch func()
	// More are routes that other packages serve on the API's socket. Their
	// errors have the shape of those here.
	More []func(mux *http.ServeMux)
	// Collectors are metrics of other packages.
	Collectors []prometheus.Collector
	// Listeners serve the API beside its socket.
	Listeners []net.Listener
	Log       *slog.Logger
}

// Ports are the node's, as far as answers name them. SNI is 0 when there is none.
type Ports struct{ HTTP, HTTPS, SNI int }

// Server serves both sockets. Make it with New and start it with Run.
type Server struct {
	Config
	metrics *metrics
}

// New returns a server for cfg.
func New(cfg Config) *Server {
	s := &Server{Config: cfg}
	s.metrics = newMetrics(s)
	return s
}

// Run serves until ctx ends; requests under way get 2 s to finish.
//
// Errors: a socket cannot be opened, or another node serves on it.
func (s *Server) Run(ctx context.Context) error {
	api, err := Listen(s.Socket)
	if err != nil {
		return err
	}
	ops, err := net.Listen("unix", client.SocketAddress(s.OpsSocket))
	if err != nil {
		if errors.Is(err, syscall.EADDRINUSE) { // its text has the padding in it
			err = errors.New("another node with this address and balancer port runs")
		}
		err = fmt.Errorf("open socket %s: %w", s.OpsSocket, err)
		return errors.Join(err, api.Close())
	}
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return Serve(ctx, s.Handler(), s.Log, append(s.Listeners, api)...) })
	g.Go(func() error { return Serve(ctx, s.OpsHandler(), s.Log, ops) })
	return g.Wait()
}

// Serve answers on all listeners until ctx ends; requests under way then get 2 s
// to finish. It closes the listeners.
func Serve(ctx context.Context, h http.Handler, log *slog.Logger, listeners ...net.Listener) error {
	g, ctx := errgroup.WithContext(ctx)
	for _, l := range listeners {
		g.Go(func() error { return serve(ctx, l, h, log) })
	}
	return g.Wait()
}

func serve(ctx context.Context, l net.Listener, h http.Handler, log *slog.Logger) error {
	server := &http.Server{
		Handler:           h,
		ReadHeaderTimeout: 10 * time.Second,
		IdleTimeout:       2 * time.Minute,
		BaseContext:       func(net.Listener) context.Context { return ctx },
		ErrorLog:          slog.NewLogLogger(log.Handler(), slog.LevelWarn),
	}
	var err error
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		err = server.Serve(l)
	}()
	select {
	case <-ended:
		return fmt.Errorf("serve %s: %w", l.Addr(), err)
	case <-ctx.Done():
	}
	limit, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*time.Second)
	defer cancel()
	if err := server.Shutdown(limit); err != nil {
		_ = server.Close() // the slow requests are cut, which is what is wanted
	}
	<-ended
	return nil
}

// Listen opens a socket of the API, for its owner and group. One that a dead
// process left behind is replaced.
func Listen(path string) (net.Listener, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o750); err != nil {
		return nil, fmt.Errorf("open socket %s: %w", path, err)
	}
	l, err := net.Listen("unix", path)
	if errors.Is(err, syscall.EADDRINUSE) {
		if c, alive := net.DialTimeout("unix", path, time.Second); alive == nil {
			return nil, errors.Join(fmt.Errorf("open socket %s: another node serves on it; give this one another --socket", path), c.Close())
		}
		if err := os.Remove(path); err != nil {
			return nil, fmt.Errorf("replace old socket %s: %w", path, err)
		}
		l, err = net.Listen("unix", path)
	}
	if err != nil {
		return nil, fmt.Errorf("open socket %s: %w", path, err)
	}
	if err := os.Chmod(path, 0o660); err != nil {
		return nil, errors.Join(fmt.Errorf("open socket %s: %w", path, err), l.Close())
	}
	return l, nil
}

// Handler returns the API.
func (s *Server) Handler() http.Handler {
	mux := http.NewServeMux()
	handle := func(pattern string, answer func(r *http.Request) (any, error)) {
		mux.HandleFunc(pattern, func(w http.ResponseWriter, r *http.Request) {
			r.Body = http.MaxBytesReader(w, r.Body, 1<<20)
			body, err := answer(r)
			if err != nil {
				writeError(w, r, s.Log, err)
				return
			}
			writeJSON(w, http.StatusOK, body)
		})
	}
	handle("GET /v1/status", func(*http.Request) (any, error) { return s.status(), nil })
	handle("GET /v1/services", func(*http.Request) (any, error) { return s.services(), nil })
	handle("GET /v1/services/{name}", func(r *http.Request) (any, error) { return s.explain(r.Context(), r.PathValue("name")) })
	handle("PUT /v1/services/{name}", s.putService)
	handle("DELETE /v1/services/{name}", s.deleteService)
	handle("GET /v1/problems", func(*http.Request) (any, error) { return s.problems(), nil })
	handle("GET /v1/nodes", func(r *http.Request) (any, error) { return s.nodes(r.Context()) })
	handle("GET /v1/wait", s.wait)
	handle("POST /v1/drain", func(*http.Request) (any, error) { return s.drain(true) })
	handle("DELETE /v1/drain", func(*http.Request) (any, error) { return s.drain(false) })
	handle("POST /v1/confirm", s.confirm)
	handle("DELETE /v1/store/members/{member}", s.removeMember)
	for _, register := range s.More {
		register(mux)
	}
	return jsonErrors(mux, s.Log)
}

// Routes returns the API of a node that has no services: only these routes.
func Routes(log *slog.Logger, more ...func(mux *http.ServeMux)) http.Handler {
	mux := http.NewServeMux()
	for _, register := range more {
		register(mux)
	}
	return jsonErrors(mux, log)
}

// jsonErrors answers what mux does not know in the shape of all other errors.
func jsonErrors(mux *http.ServeMux, log *slog.Logger) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		h, pattern := mux.Handler(r)
		if pattern != "" {
			mux.ServeHTTP(w, r)
			return
		}
		found := &head{header: http.Header{}}
		h.ServeHTTP(found, r)
		switch allow := found.header.Get("Allow"); {
		case found.status == http.StatusMethodNotAllowed:
			w.Header().Set("Allow", allow)
			writeError(w, r, log, client.Errorf(client.CodeNotAllowed, "", "%s does not take %s, only %s", r.URL.Path, r.Method, allow))
		default:
			writeError(w, r, log, client.Errorf(client.CodeNotFound, "", "there is nothing at %s", r.URL.Path))
		}
	})
}

// head is a ResponseWriter that keeps the status and drops the body.
type head struct {
	header http.Header
	status int
}

func (h *head) Header() http.Header         { return h.header }
func (h *head) WriteHeader(status int)      { h.status = status }
func (h *head) Write(b []byte) (int, error) { return len(b), nil }

func writeJSON(w http.ResponseWriter, status int, body any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	out := json.NewEncoder(w)
	out.SetEscapeHTML(false)
	out.SetIndent("", "  ")
	_ = out.Encode(body) // a client that is gone does not want it
}

func writeError(w http.ResponseWriter, r *http.Request, log *slog.Logger, err error) {
	e := asError(err)
	if e.Code == client.CodeInternal {
		log.Error("a request ended in an error", "method", r.Method, "path", r.URL.Path, "err", err)
	}
	writeJSON(w, e.Code.Status(), struct {
		Error *client.Error `json:"error"`
	}{e})
}

// asError gives an error of the store its code; one that has a code keeps it.
func asError(err error) *client.Error {
	var e *client.Error
	switch {
	case errors.As(err, &e):
		return e
	case errors.Is(err, store.ErrConflict):
		return client.Errorf(client.CodeConflict, "run it again", "%v", err)
	case errors.Is(err, store.ErrUnknown):
		return client.Errorf(client.CodeUnknown, "look with: flotilla services list", "%v", err)
	case errors.Is(err, store.ErrUnavailable), errors.Is(err, context.DeadlineExceeded), errors.Is(err, context.Canceled):
		return client.Errorf(client.CodeUnavailable, "see: flotilla status, flotilla doctor", "%v", err)
	}
	return client.Errorf(client.CodeInternal, "", "%v", err)
}

// readBody decodes a JSON body strictly into v; an empty body is allowed.
func readBody(r *http.Request, v any) error {
	in := json.NewDecoder(r.Body)
	in.DisallowUnknownFields()
	err := in.Decode(v)
	if errors.Is(err, io.EOF) {
		return nil
	}
	if err == nil && in.More() {
		err = errors.New("more than one JSON value")
	}
	if err != nil {
		return client.Errorf(client.CodeBadRequest, "", "the request's body is not what %s %s takes: %v", r.Method, r.URL.Path, err)
	}
	return nil
}

// OpsHandler returns the health checks and metrics.
func (s *Server) OpsHandler() http.Handler {
	mux := http.NewServeMux()
	check := func(pattern string, ok func() error) {
		mux.HandleFunc(pattern, func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", "text/plain; charset=utf-8")
			if err := ok(); err != nil {
				w.WriteHeader(http.StatusServiceUnavailable)
				_, _ = fmt.Fprintln(w, err) // a client that is gone does not want it
				return
			}
			_, _ = fmt.Fprintln(w, "ok")
		})
	}
	check("GET /healthz", func() error { return nil })
	check("GET /readyz", s.ready)
	check("GET /freshz", s.fresh)
	mux.Handle("GET /metrics", s.metrics.handler())
	return mux
}

// ready returns why this node does not route, or nil. Stale routing is routing.
func (s *Server) ready() error {
	if s.Feed.Latest() == nil {
		return errors.New("no catalog is loaded yet")
	}
	if st := s.Router.Status(); !st.Serving {
		if st.Err != "" {
			return fmt.Errorf("HAProxy does not serve: %s", st.Err)
		}
		return errors.New("HAProxy does not serve yet")
	}
	return nil
}

// fresh returns why what this node routes may be old, or nil.
func (s *Server) fresh() error {
	if err := s.ready(); err != nil {
		return err
	}
	st := s.StoreState()
	switch {
	case st.Live:
		return nil
	case st.Confirmed.IsZero():
		return fmt.Errorf("stale: the store was never reached: %s", st.Err)
	}
	return fmt.Errorf("stale: not confirmed by the store since %s: %s", st.Confirmed.UTC().Format(time.RFC3339), st.Err)
}
