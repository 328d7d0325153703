package fleetapi

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"slices"

	"flotilla/internal/registry"
	"flotilla/internal/store"
	"flotilla/internal/unit"
	"flotilla/internal/unitapi"
)

const (
	// maxSubmission is the length of the longest body of POST /v1/units.
	maxSubmission = 64 << 20
	// maxRequest is that of all other bodies.
	maxRequest = 1 << 20
)

// NativeRoutes adds the native API to mux.
func (h *Handler) NativeRoutes(mux *http.ServeMux) {
	handle := func(pattern string, limit int64, answer func(r *http.Request) (any, error)) {
		mux.HandleFunc(pattern, func(w http.ResponseWriter, r *http.Request) {
			r.Body = http.MaxBytesReader(w, r.Body, limit)
			body, err := answer(r)
			if err != nil {
				h.writeError(w, r, err)
				return
			}
			writeJSON(w, http.StatusOK, body)
		})
	}
	handle("POST /v1/units", maxSubmission, h.postUnits)
	handle("POST /v1/units/change", maxRequest, h.postChanges)
	handle("GET /v1/units", maxRequest, h.getUnits)
	handle("GET /v1/units/{name}", maxRequest, h.getUnit)
	handle("GET /v1/units/{name}/explain", maxRequest, h.explain)
	handle("POST /v1/units/{name}/move", maxRequest, h.postMove)
	handle("GET /v1/rebalance", maxRequest, h.getRebalance)
	handle("POST /v1/rebalance", maxRequest, h.postRebalance)
	handle("GET /v1/states", maxRequest, h.getStates)
	handle("GET /v1/machines", maxRequest, h.getMachines)
	handle("POST /v1/machines/{id}/settings", maxRequest, h.postSettings)
	handle("POST /v1/failover", maxRequest, h.postFailover)
	handle("POST /v1/leave", maxRequest, h.postLeave)
}

func writeJSON(w http.ResponseWriter, status int, body any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	out := json.NewEncoder(w)
	out.SetEscapeHTML(false)
	_ = out.Encode(body) // a client that is gone does not want it
}

func (h *Handler) writeError(w http.ResponseWriter, r *http.Request, err error) {
	e := asError(err)
	if e.status == http.StatusInternalServerError && r.Context().Err() == nil {
		h.Log.Error("a request ended in an error", "method", r.Method, "path", r.URL.Path, "err", err)
	}
	writeJSON(w, e.status, map[string]*Error{"error": e})
}

// asError gives an error its code; one that has a code keeps it.
func asError(err error) *Error {
	var e *Error
	switch {
	case errors.As(err, &e):
		return e
	case errors.Is(err, store.ErrConflict):
		return fail(http.StatusConflict, "run it again", "%v", err)
	case errors.Is(err, store.ErrUnknown):
		return fail(http.StatusGatewayTimeout, "look with: flotilla list-unit-files", "%v", err)
	case errors.Is(err, store.ErrUnavailable), errors.Is(err, context.DeadlineExceeded), errors.Is(err, context.Canceled):
		return fail(http.StatusServiceUnavailable, "see: flotilla status, flotilla doctor", "%v", err)
	}
	return fail(http.StatusInternalServerError, "", "%v", err)
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
		return fail(http.StatusRequestEntityTooLarge, "split it", "the request's body is larger than %d bytes", large.Limit)
	case errors.Is(err, io.EOF):
		return fail(http.StatusBadRequest, "", "%s %s takes a body, and there is none", r.Method, r.URL.Path)
	case err != nil:
		return fail(http.StatusBadRequest, "", "the request's body is not what %s %s takes: %v", r.Method, r.URL.Path, err)
	}
	return nil
}

func (h *Handler) postUnits(r *http.Request) (any, error) {
	var in unitapi.Submissions
	if err := readBody(r, &in); err != nil {
		return nil, err
	}
	out := unitapi.Results{Results: make([]unitapi.Result, len(in.Units))}
	var names []string
	var decisions []func(record[registry.Unit]) step
	var place []int // in the request
	known := map[string]bool{}
	for i, s := range in.Units {
		if known[s.Name] {
			out.Results[i] = unitapi.Result{Name: s.Name, Outcome: unitapi.Refused, Reason: "the request has another unit of this name before it"}
			continue
		}
		known[s.Name] = true
		names, decisions, place = append(names, s.Name), append(decisions, submit(s)), append(place, i)
	}
	return h.carryOut(r.Context(), out, names, decisions, place)
}

func (h *Handler) postChanges(r *http.Request) (any, error) {
	var in unitapi.Changes
	if err := readBody(r, &in); err != nil {
		return nil, err
	}
	asked := 0
	for _, set := range []bool{in.Desired != "", in.Restart, in.Destroy} {
		if set {
			asked++
		}
	}
	if asked != 1 {
		return nil, fail(http.StatusBadRequest, "", "give one of desired, restart and destroy")
	}
	if in.Desired != "" {
		if _, err := registry.ParseDesired(string(in.Desired)); err != nil {
			return nil, fail(http.StatusBadRequest, "", "%v", err)
		}
	}
	out := unitapi.Results{Results: make([]unitapi.Result, 0, len(in.Names))}
	var names []string
	var decisions []func(record[registry.Unit]) step
	var place []int
	for _, name := range in.Names {
		if slices.Contains(names, name) {
			continue
		}
		names, decisions, place = append(names, name), append(decisions, alter(name, in)), append(place, len(names))
	}
	out.Results = make([]unitapi.Result, len(names))
	return h.carryOut(r.Context(), out, names, decisions, place)
}

// carryOut makes the decisions and fills in the results at their places.
func (h *Handler) carryOut(ctx context.Context, out unitapi.Results, names []string, decisions []func(record[registry.Unit]) step, place []int) (any, error) {
	steps, revision, err := h.change(ctx, names, func(i int, have record[registry.Unit]) step { return decisions[i](have) })
	if err != nil {
		return nil, err
	}
	for i, s := range steps {
		out.Results[place[i]] = s.result
	}
	out.Revision = revision
	return out, nil
}

func (h *Handler) getUnits(r *http.Request) (any, error) {
	v, err := h.read(r.Context(), r.URL.Query()["name"])
	if err != nil {
		return nil, err
	}
	return unitapi.Units{Revision: v.revision, Units: v.all(h.Keys)}, nil
}

func noUnit(name string) error {
	return fail(http.StatusNotFound, "list them with: flotilla list-unit-files", "there is no unit %q", name)
}

func (h *Handler) getUnit(r *http.Request) (any, error) {
	name := r.PathValue("name")
	v, err := h.readNamed(r.Context(), 0, []string{name})
	if err != nil {
		return nil, err
	}
	if len(v.units) == 0 {
		return nil, noUnit(name)
	}
	u := v.unit(name, v.units[0])
	u.Text = v.units[0].registry.Text
	if f, err := unit.Parse(u.Text); err == nil {
		u.Serialized = f.Serialize()
	}
	return u, nil
}

func problemsOf(list []unit.Problem) []unitapi.Problem {
	var out []unitapi.Problem
	for _, p := range list {
		out = append(out, unitapi.Problem(p))
	}
	return out
}
