package fleetapi

import (
	"fmt"
	"log/slog"
	"net/http"
	"sync/atomic"
	"testing"

	"flotilla/internal/api"
	"flotilla/internal/api/apitest"
	"flotilla/internal/store/storetest"
	"flotilla/internal/wire"
)

// world is a handler with a real store, reached over a real socket beside the
// node's own API.
type world struct {
	*Handler
	*apitest.World
	server     *api.Server // serves both as production does
	registered atomic.Bool
}

func newWorld(t testing.TB, endpoint, prefix string) *world {
	t.Helper()
	w := &world{World: apitest.New(t, endpoint, prefix)}
	w.registered.Store(true)
	w.server = api.New(api.Config{
		Node: "node-m1", ID: "m1", Version: "1.2.3", State: w.State, Store: w.Store,
		StoreStatus: func() wire.StoreStatus { return wire.StoreStatus{Live: true} }, Log: slog.New(slog.DiscardHandler),
	})
	w.Handler = New(Config{API: w.server, Registered: w.registered.Load, Log: slog.New(slog.DiscardHandler)})
	w.server.Fleet = w.Handler
	mux := http.NewServeMux()
	mux.Handle("/v1/", w.server.Handler())
	mux.Handle("/", w.Handler)
	w.Serve(mux)
	return w
}

func start(t testing.TB) *world { t.Helper(); return newWorld(t, storetest.Start(t), "/flotilla/") }

var jsonType = http.Header{"Content-Type": {"application/json"}}

func fleetBody(command, desired string) string {
	return fmt.Sprintf(`{"options":[{"section":"Service","name":"ExecStart","value":%q}],"desiredState":%q}`, command, desired)
}
