// Package api is a node's HTTP surface: the API on its unix socket, and the
// health checks and metrics on its operations socket. It knows the components of
// its node, the state of the cluster and how it is changed without losing anybody
// else's change; it must not know HAProxy, systemd, how nodes run units, or how
// answers are shown to people. It asks the engine's pure part why a unit is where
// it is.
package api

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"

	"flotilla/internal/catalog"
	"flotilla/internal/client"
	"flotilla/internal/engine"
	"flotilla/internal/state"
	"flotilla/internal/store"
	"flotilla/internal/wait"
	"flotilla/internal/wire"
)

// Router is what the API asks of the node's router. *router.Router has it; the
// tests of this package answer with fixed figures.
type Router interface {
	Status() wire.RouterStatus
	Stats(ctx context.Context) ([]wire.ServiceCounters, error)
}

// Config is what a Server serves.
type Config struct {
	Node    string // its name
	ID      string // its ID
	Version string
	Address string
	Domain  string // that DNS answers from the catalog
	Started time.Time

	Socket    string         // unix socket of the API: for its owner and group
	OpsSocket string         // "@name": abstract unix socket of health checks and metrics, for everybody; "": none
	Listeners []net.Listener // that serve the API beside its socket

	State *state.Feed
	Store *store.Client
	Log   *slog.Logger

	StoreStatus func() wire.StoreStatus
	Warnings    func() []string             // troubles of this node; nil: none
	Engine      func() engine.Stats         // nil: there is none
	Report      func() state.UnitsReport    // what runs on this node; nil: it runs no units
	Leave       func(context.Context) error // stops all units of this node and takes it out of the cluster; nil: it runs none

	// What follows is nil or 0 on a node that routes no services.
	Catalog  *catalog.Feed
	Policy   catalog.Policy
	Ports    Ports
	Router   Router
	DNS      func() wire.DNSStats
	Problems func() int // of all services
	// AcceptEpoch tells the reflector of the catalog that the store's present
	// content is the right one.
	AcceptEpoch func()

	// What other packages serve on the API's socket; nil: nobody does.
	Journal    http.HandlerFunc
	UnitStatus http.HandlerFunc
	Fleet      http.Handler // fleet's API
}

// Ports are the node's, as far as answers name them. SNI is 0 when there is none.
type Ports struct{ HTTP, HTTPS, SNI int }

// Server serves both sockets. Make it with New and start it with Run.
type Server struct {
	Config
	metrics *metrics
	pace    wait.Pace
}

// New returns a server for cfg. What it serves for others may be set until it
// runs.
func New(cfg Config) *Server {
	s := &Server{Config: cfg, pace: wait.UsualPace}
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
	g, ctx := errgroup.WithContext(ctx)
	if s.OpsSocket != "" {
		ops, err := net.Listen("unix", client.SocketAddress(s.OpsSocket))
		if err != nil {
			if errors.Is(err, syscall.EADDRINUSE) { // its text has the padding in it
				err = errors.New("another node with this address and balancer port runs")
			}
			return errors.Join(fmt.Errorf("open socket %s: %w", s.OpsSocket, err), api.Close())
		}
		g.Go(func() error { return Serve(ctx, s.OpsHandler(), s.Log, ops) })
	}
	g.Go(func() error { return Serve(ctx, s.Handler(), s.Log, append(s.Listeners, api)...) })
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
	mux.Handle("GET /metrics", s.metrics)
	return mux
}

// ready returns why this node does not route, or nil. Stale routing is routing.
func (s *Server) ready() error {
	if s.Catalog.Latest() == nil {
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
	st := s.StoreStatus()
	switch {
	case st.Live:
		return nil
	case st.Confirmed.IsZero():
		return fmt.Errorf("stale: the store was never reached: %s", st.Err)
	}
	return fmt.Errorf("stale: not confirmed by the store since %s: %s", st.Confirmed.UTC().Format(time.RFC3339), st.Err)
}
