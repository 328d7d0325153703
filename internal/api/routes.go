package api

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net/http"

	"flotilla/internal/store"
	"flotilla/internal/wire"
)

// The longest bodies of requests.
const (
	maxRequest    = 1 << 20
	maxSubmission = 64 << 20 // of POST /v1/units
)

// Route is one path of the API.
type Route struct {
	Method, Path string
	Doc          string // its line in docs/reference/api.md
	serve        http.HandlerFunc
}

// Routes returns all paths of the API, fleet's apart.
func Routes() []Route { return New(Config{}).routes() }

func (s *Server) routes() []Route {
	do := func(answer answer) http.HandlerFunc { return s.json(maxRequest, answer) }
	services := func(answer answer) http.HandlerFunc { return do(s.routing(answer)) }
	return []Route{
		{"GET", "/v1/status", "the node that answers: store, router, DNS, warnings", do(s.getStatus)},

		{"GET", "/v1/services", "all services, one summary each", services(s.getServices)},
		{"GET", "/v1/services/{name}", "one service: endpoints, keys, problems, routes, counters, nodes", services(s.getService)},
		{"PUT", "/v1/services/{name}", "change it; [body](#changing-a-service); `?wait=30s`", services(s.putService)},
		{"DELETE", "/v1/services/{name}", "remove it and all its keys; `?wait=30s`", services(s.deleteService)},
		{"GET", "/v1/problems", "all problems, then this node's own", services(s.getProblems)},
		{"POST", "/v1/confirm", "accept what is held", do(s.postConfirm)},

		{"POST", "/v1/units", "[submit](#submitting-units) unit files", s.json(maxSubmission, s.postUnits)},
		{"POST", "/v1/units/change", "[desired state, restart or destruction](#changing-units) of many units", do(s.postChanges)},
		{"GET", "/v1/units", "[units](#reading-units); `?name=PATTERN`, repeatable", do(s.getUnits)},
		{"GET", "/v1/units/{name}", "one, with its `text` as given and `serialized` as fleet shows it", do(s.getUnit)},
		{"GET", "/v1/units/{name}/explain", "what each node is to the unit, and why", do(s.getExplanation)},
		{"POST", "/v1/units/{name}/move", "ask for another node: `{\"to\": NODE}`", do(s.postMove)},
		{"GET", "/v1/states", "what nodes have, one entry for each unit and node: also units that were destroyed and are still stopping", do(s.getStates)},
		{"GET", "/v1/rebalance", "moves that would even out the nodes", do(s.getRebalance)},
		{"POST", "/v1/rebalance", "ask for them; with the answer of `GET` as body, for exactly those", do(s.postRebalance)},
		{"POST", "/v1/failover", "`{\"allow\": true}`: move the units of many nodes that are gone", do(s.postFailover)},

		{"GET", "/v1/nodes", "the nodes that are there, and the members of the store", do(s.getNodes)},
		{"GET", "/v1/nodes/{node}", "one [node](#nodes), without the numbers of its units", do(s.getNode)},
		{"POST", "/v1/nodes/{node}/settings", "`cordon`, `drain`, `reason`, `metadata` of a [node](#nodes); what is not given stays", do(s.postSettings)},
		{"POST", "/v1/leave", "stop all units of the node that answers and take it out of the cluster, until it is started again", do(s.postLeave)},
		{"DELETE", "/v1/store/members/{member}", "take the member of that name or ID out of the store for good; `conflict` while the store is not ready for that", do(s.deleteMember)},

		{"POST", "/v1/wait", "[wait](#waiting) for units, for a node to be empty or for a revision to be routed: a stream", s.postWait},
		{"GET", "/v1/wait", "`?revision=N`: answers when every live node has applied N; `&service=NAME` if it is the revision of that service; `&timeout=30s`", do(s.getWait)},

		{"GET", "/v1/journal", "[what units say](#logs), `?unit=PATTERN`: a stream", s.Journal},
		{"GET", "/v1/unit-status", "what `systemctl status` says of units on each node, `?unit=PATTERN`", s.UnitStatus},
		{"GET", "/metrics", "[metrics](metrics.md)", s.metrics.ServeHTTP},
	}
}

// Handler returns the API.
func (s *Server) Handler() http.Handler {
	mux := http.NewServeMux()
	for _, r := range s.routes() {
		if r.serve != nil {
			mux.HandleFunc(r.Method+" "+r.Path, r.serve)
		}
	}
	if s.Fleet != nil {
		for _, pattern := range []string{"/{$}", "/fleet/v1", "/fleet/v1/", "/v1-alpha", "/v1-alpha/"} {
			mux.Handle(pattern, s.Fleet)
		}
	}
	return jsonErrors(mux, s.Log)
}

// answer answers a request: with what is written as JSON, or with an error.
type answer func(r *http.Request) (any, error)

func (s *Server) json(limit int64, answer answer) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		r.Body = http.MaxBytesReader(w, r.Body, limit)
		body, err := answer(r)
		if err != nil {
			fail(w, r, s.Log, err)
			return
		}
		wire.Write(w, http.StatusOK, body)
	}
}

// routing refuses what only a node that routes services can answer.
func (s *Server) routing(answer answer) answer {
	return func(r *http.Request) (any, error) {
		if s.Catalog == nil {
			return nil, wire.Errorf(wire.CodeNotFound, "ask another node", "this node routes no services")
		}
		return answer(r)
	}
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
			fail(w, r, log, wire.Errorf(wire.CodeNotAllowed, "", "%s does not take %s, only %s", r.URL.Path, r.Method, allow))
		default:
			fail(w, r, log, wire.Errorf(wire.CodeNotFound, "", "there is nothing at %s", r.URL.Path))
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

// fail answers with an error, and logs it if it is a bug.
func fail(w http.ResponseWriter, r *http.Request, log *slog.Logger, err error) {
	e := Error(err)
	if e.Code == wire.CodeInternal && r.Context().Err() == nil {
		log.Error("a request ended in an error", "method", r.Method, "path", r.URL.Path, "err", err)
	}
	wire.WriteError(w, e)
}

// Error gives an error of the store its code; one that has a code keeps it.
func Error(err error) *wire.Error {
	var e *wire.Error
	switch {
	case errors.As(err, &e):
		return e
	case errors.Is(err, store.ErrConflict):
		return wire.Errorf(wire.CodeConflict, "run it again", "%v", err)
	case errors.Is(err, store.ErrUnknown):
		return wire.Errorf(wire.CodeUnknown, "look with: flotilla services list, flotilla list-unit-files", "%v", err)
	case errors.Is(err, store.ErrUnavailable), errors.Is(err, context.DeadlineExceeded), errors.Is(err, context.Canceled):
		return wire.Errorf(wire.CodeStoreUnavailable, "see: flotilla status, flotilla doctor", "%v", err)
	}
	return wire.Errorf(wire.CodeInternal, "", "%v", err)
}

// readBody decodes a JSON body strictly into v.
func readBody(r *http.Request, v any) error {
	in := json.NewDecoder(r.Body)
	in.DisallowUnknownFields()
	err := in.Decode(v)
	if err == nil && in.More() {
		err = errors.New("more than one JSON value")
	}
	var large *http.MaxBytesError
	switch {
	case errors.As(err, &large):
		return wire.Errorf(wire.CodeTooLarge, "split it", "the request's body is larger than %d bytes", large.Limit)
	case errors.Is(err, io.EOF):
		return wire.Errorf(wire.CodeBadRequest, "", "%s %s takes a body, and there is none", r.Method, r.URL.Path)
	case err != nil:
		return wire.Errorf(wire.CodeBadRequest, "", "the request's body is not what %s %s takes: %v", r.Method, r.URL.Path, err)
	}
	return nil
}
