// Package fleetapi is the HTTP surface of units and machines: fleet's API as
// fleet's own clients speak it, and the native one, which takes many units at
// once and says why. It knows the records of the registry and how they are
// changed without losing anybody else's change; it must not know systemd, how
// machines run units, or how answers are shown to people. It asks the engine's
// pure part why a unit is where it is.
package fleetapi

import (
	"context"
	"log/slog"
	"net/http"
	"sync/atomic"
	"time"

	"flotilla/internal/registry"
	"flotilla/internal/store"
)

// DefaultTokenLimit is the number of items on one page of fleet's lists.
const DefaultTokenLimit = 100

const (
	// startLimit is how long a request waits for the first registration of the
	// machine.
	startLimit = 2 * time.Second
	// holdLimit is how long a request for the state of a unit waits until the
	// unit has one.
	holdLimit = 1500 * time.Millisecond
)

// Config is what a Handler answers from.
type Config struct {
	Store *store.Client // required
	Keys  registry.Keys // required
	// Registered reports whether this machine is in the store. While it is not,
	// fleet's API answers 503 on every path. nil: it always is.
	Registered func() bool
	Self       func() string // ID of this machine; nil: none
	Version    string        // of this program
	TokenLimit int           // items on one page of fleet's lists, up to 65535; 0: DefaultTokenLimit
	// Leave stops all units of this machine and takes it out of the cluster; nil:
	// it runs none.
	Leave   func(ctx context.Context) error
	Metrics http.Handler // GET /metrics of fleet's API; nil: there is nothing
	Log     *slog.Logger // required
}

// Handler answers the requests. Make it with New.
type Handler struct {
	Config
	registered atomic.Bool   // the machine was, once
	hold       time.Duration // holdLimit, shorter in tests
	start      time.Duration // startLimit, shorter in tests
	digests    digests
	units      decoded[registry.Unit]
	placements decoded[registry.Placement]
	states     decoded[registry.States]
	lookBack   lookBack
}

// New returns a handler for cfg.
func New(cfg Config) *Handler {
	if cfg.TokenLimit <= 0 || cfg.TokenLimit > 1<<16-1 {
		cfg.TokenLimit = DefaultTokenLimit
	}
	if cfg.Registered == nil {
		cfg.Registered = func() bool { return true }
	}
	if cfg.Self == nil {
		cfg.Self = func() string { return "" }
	}
	return &Handler{Config: cfg, hold: holdLimit, start: startLimit}
}

// Register adds the native routes and fleet's to the API of the node.
func (h *Handler) Register(mux *http.ServeMux) {
	h.NativeRoutes(mux)
	for _, pattern := range []string{"/{$}", "/fleet/v1", "/fleet/v1/", "/v1-alpha", "/v1-alpha/"} {
		mux.Handle(pattern, h.FleetHandler())
	}
}

// awaitRegistered reports whether this machine is registered. Until it has been
// so once, it waits a little: what starts a node and then asks it should not
// have to try again.
func (h *Handler) awaitRegistered(ctx context.Context) bool {
	if h.Registered() {
		h.registered.Store(true)
		return true
	}
	if h.registered.Load() {
		return false
	}
	limit := time.NewTimer(h.start)
	defer limit.Stop()
	again := time.NewTicker(20 * time.Millisecond)
	defer again.Stop()
	for {
		select {
		case <-again.C:
			if h.Registered() {
				h.registered.Store(true)
				return true
			}
		case <-limit.C:
			return false
		case <-ctx.Done():
			return false
		}
	}
}
