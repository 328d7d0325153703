// Package fleetapi is fleet's API as fleet's own clients speak it: fleet's shapes and
// quirks on top of the node's own API. It knows the state of the cluster and how
// package api changes it; it must not know the store, systemd, or how units are
// placed and run. What fleet calls a machine is a node that runs units.
package fleetapi

import (
	"context"
	"log/slog"
	"sync/atomic"
	"time"

	"flotilla/internal/api"
)

// DefaultTokenLimit is the number of items on one page of fleet's lists.
const DefaultTokenLimit = 100

const (
	// startLimit is how long a request waits for the first registration of the
	// node.
	startLimit = 2 * time.Second
	// holdLimit is how long a request for the state of a unit waits until the
	// unit has one.
	holdLimit = 1500 * time.Millisecond
)

// Config is what a Handler answers from.
type Config struct {
	API *api.Server // required
	// Registered reports whether this node is in the store. While it is not,
	// fleet's API answers 503 on every path. nil: it always is.
	Registered func() bool
	TokenLimit int          // items on one page of fleet's lists, up to 65535; 0: DefaultTokenLimit
	Log        *slog.Logger // required
}

// Handler answers the requests below /fleet/v1 and /v1-alpha, and what fleet answers
// on other paths. Make it with New.
type Handler struct {
	Config
	registered atomic.Bool   // the node was, once
	hold       time.Duration // holdLimit, shorter in tests
	start      time.Duration // startLimit, shorter in tests
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
	return &Handler{Config: cfg, hold: holdLimit, start: startLimit}
}

// awaitRegistered reports whether this node is registered. Until it has been so
// once, it waits a little: what starts a node and then asks it should not have to
// try again.
func (h *Handler) awaitRegistered(ctx context.Context) bool {
	if h.Registered() {
		h.registered.Store(true)
		return true
	}
	if h.registered.Load() {
		return false
	}
	ctx, cancel := context.WithTimeout(ctx, h.start)
	defer cancel()
	again := time.NewTicker(20 * time.Millisecond)
	defer again.Stop()
	for {
		select {
		case <-again.C:
			if h.Registered() {
				h.registered.Store(true)
				return true
			}
		case <-ctx.Done():
			return false
		}
	}
}
