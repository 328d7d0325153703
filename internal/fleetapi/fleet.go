package fleetapi

import (
	_ "embed"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strings"

	"flotilla/internal/registry"
	"flotilla/internal/store"
	"flotilla/internal/unit"
	"flotilla/internal/unitapi"
)

// maxBody is the length of the longest body that fleet's API takes.
const maxBody = 2 << 20

// unregistered is what clients and scripts look for.
const unregistered = "fleet server unable to communicate with etcd"

//go:embed discovery.json
var discovery []byte

// What fleet's API sends; empty fields are left out, as there.
type (
	fleetOption struct {
		Section string `json:"section,omitempty"`
		Name    string `json:"name,omitempty"`
		Value   string `json:"value,omitempty"`
	}
	fleetUnit struct {
		Name         string           `json:"name,omitempty"`
		Options      []fleetOption    `json:"options,omitempty"`
		DesiredState registry.Desired `json:"desiredState,omitempty"`
		CurrentState registry.Desired `json:"currentState,omitempty"`
		MachineID    string           `json:"machineID,omitempty"`
	}
	fleetState struct {
		Name      string `json:"name,omitempty"`
		Hash      string `json:"hash,omitempty"`
		MachineID string `json:"machineID,omitempty"`
		Load      string `json:"systemdLoadState,omitempty"`
		Active    string `json:"systemdActiveState,omitempty"`
		Sub       string `json:"systemdSubState,omitempty"`
	}
	fleetMachine struct {
		ID        string            `json:"id,omitempty"`
		Metadata  map[string]string `json:"metadata,omitempty"`
		PrimaryIP string            `json:"primaryIP,omitempty"`
	}
	fleetPage struct {
		Machines []fleetMachine `json:"machines,omitempty"`
		States   []fleetState   `json:"states,omitempty"`
		Units    []fleetUnit    `json:"units,omitempty"`
		Next     string         `json:"nextPageToken,omitempty"`
	}
)

// fleetError is an answer that is not what was asked for. fleet gives many of
// them no message.
type fleetError struct {
	Code    int    `json:"code"`
	Message string `json:"message"`
}

func (e *fleetError) Error() string { return fmt.Sprintf("%d %s", e.Code, e.Message) }

func refuse(code int, format string, args ...any) *fleetError {
	return &fleetError{code, fmt.Sprintf(format, args...)}
}

// answer is what a request ends with: a status and, unless it is nil, a body.
type answer struct {
	status int
	body   any
	typed  bool // it has a Content-Type although it has no body
}

// FleetHandler serves fleet's API: below /fleet/v1 and /v1-alpha, and what fleet
// answers on other paths.
func (h *Handler) FleetHandler() http.Handler { return http.HandlerFunc(h.serveFleet) }

func (h *Handler) serveFleet(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Server", "fleetd/"+h.Version)
	a, err := answer{}, error(refuse(http.StatusServiceUnavailable, unregistered))
	if h.awaitRegistered(r.Context()) {
		if r.URL.Path == "/metrics" && h.Metrics != nil {
			h.Metrics.ServeHTTP(w, r)
			return
		}
		r.Body = http.MaxBytesReader(w, r.Body, maxBody)
		a, err = h.routeFleet(r)
	}
	if err != nil {
		a = h.failedFleet(r, err)
	}
	if a.body != nil || a.typed {
		w.Header().Set("Content-Type", "application/json")
	}
	if a.body == nil {
		w.WriteHeader(a.status)
		return
	}
	raw, ok := a.body.([]byte)
	if !ok {
		if raw, err = json.Marshal(a.body); err != nil {
			panic(err) // strings and maps of them cannot fail
		}
	}
	w.WriteHeader(a.status)
	_, _ = w.Write(raw) // a client that is gone does not want it
}

func (h *Handler) failedFleet(r *http.Request, err error) answer {
	var e *fleetError
	var large *http.MaxBytesError
	switch {
	case errors.As(err, &e):
	case errors.As(err, &large):
		e = refuse(http.StatusRequestEntityTooLarge, "the body is larger than %d bytes", large.Limit)
	case errors.Is(err, store.ErrUnavailable):
		e = refuse(http.StatusServiceUnavailable, unregistered)
	default:
		e = &fleetError{Code: http.StatusInternalServerError}
	}
	if e.Code == http.StatusInternalServerError && r.Context().Err() == nil {
		h.Log.Error("a request of fleet's API ended in an error", "method", r.Method, "path", r.URL.Path, "err", err)
	}
	return answer{status: e.Code, body: map[string]*fleetError{"error": e}}
}

func (h *Handler) routeFleet(r *http.Request) (answer, error) {
	path, ok := strings.CutPrefix(r.URL.Path, "/fleet/v1")
	if !ok {
		path, ok = strings.CutPrefix(r.URL.Path, "/v1-alpha")
	}
	switch {
	case r.URL.Path == "/", ok && path == "":
		return answer{}, refuse(http.StatusMethodNotAllowed, "")
	case !ok:
		return answer{}, refuse(http.StatusNotFound, "")
	}
	collection, item, isItem := strings.Cut(strings.TrimPrefix(path, "/"), "/")
	if path[0] != '/' || strings.Contains(item, "/") {
		return answer{}, refuse(http.StatusNotFound, "")
	}
	switch {
	case collection == "discovery" && !isItem:
		if r.Method != http.MethodGet {
			return answer{}, refuse(http.StatusBadRequest, "only HTTP GET supported against this resource")
		}
		return answer{status: http.StatusOK, body: discovery}, nil
	case collection == "machines" && !isItem:
		switch r.Method {
		case http.MethodGet:
			return h.fleetMachines(r)
		case http.MethodPatch:
			return h.patchMachines(r)
		}
		return answer{}, onlySupported("GET and PATCH")
	case collection == "units" && isItem:
		switch r.Method {
		case http.MethodGet:
			return h.fleetUnit(r, item)
		case http.MethodPut:
			return h.setFleetUnit(r, item)
		case http.MethodDelete:
			return h.deleteFleetUnit(r, item)
		}
		return answer{}, onlySupported("GET, PUT and DELETE")
	case collection != "units" && collection != "state":
		return answer{}, refuse(http.StatusNotFound, "")
	case r.Method != http.MethodGet:
		return answer{}, onlySupported("GET")
	case collection == "units":
		return h.fleetUnits(r)
	case isItem:
		return h.fleetState(r, item)
	}
	return h.fleetStates(r)
}

func onlySupported(methods string) error {
	return refuse(http.StatusMethodNotAllowed, "only %s supported against this resource", methods)
}

// page reads the page token of a request.
func (h *Handler) page(r *http.Request) (pageToken, error) {
	t, err := parsePage(r.URL.Query(), h.TokenLimit)
	if err != nil {
		return t, refuse(http.StatusBadRequest, "%v", err)
	}
	return t, nil
}

func (h *Handler) fleetMachines(r *http.Request) (answer, error) {
	token, err := h.page(r)
	if err != nil {
		return answer{}, err
	}
	f, err := h.readMachines(r.Context(), 0)
	if err != nil {
		return answer{}, err
	}
	var page fleetPage
	ids, next := cut(f.ids(), token)
	for _, id := range ids {
		page.Machines = append(page.Machines, fleetMachine{ID: id, Metadata: f.metadata(id), PrimaryIP: f.machines[id].registry.Address})
	}
	page.Next = next
	return answer{status: http.StatusOK, body: page}, nil
}

// asFleet writes a unit as fleet does. A list says "inactive" of a global unit,
// a single one has no current state.
func (h *Handler) asFleet(name string, r record[registry.Unit], p record[registry.Placement], state registry.State, known, listed bool) fleetUnit {
	out := fleetUnit{Name: name, DesiredState: r.registry.Desired}
	f := fileOf(name, r.registry.Text)
	if err := errors.Join(r.err, f.err); err != nil {
		h.Log.Debug("a unit cannot be read", "unit", name, "err", err)
	} else {
		for _, o := range f.Options {
			out.Options = append(out.Options, fleetOption{o.Section, o.Name, o.Value})
		}
	}
	switch {
	case !f.global:
		out.CurrentState = currentOf(p, state, known, f.hash)
		out.MachineID = p.registry.Machine
	case listed:
		out.CurrentState = registry.Inactive
	}
	return out
}

func (h *Handler) fleetUnits(r *http.Request) (answer, error) {
	token, err := h.page(r)
	if err != nil {
		return answer{}, err
	}
	k := h.Keys
	lists, _, err := h.Store.ListMany(r.Context(), 0, k.Unit(""), k.Placement(""), k.States(""))
	if err != nil {
		return answer{}, err
	}
	placements := make(map[string]store.KV, len(lists[1]))
	for _, kv := range lists[1] {
		placements[strings.TrimPrefix(kv.Key, k.Placement(""))] = kv
	}
	states := map[string]map[string]registry.State{}
	for _, m := range h.statesOf(lists[2]) {
		states[m.machine] = m.units
	}
	var page fleetPage
	items, next := cut(lists[0], token)
	for _, kv := range items {
		name := strings.TrimPrefix(kv.Key, k.Unit(""))
		at, placed := placements[name]
		p := recordOf[registry.Placement](at, placed)
		state, known := states[p.registry.Machine][name]
		page.Units = append(page.Units, h.asFleet(name, recordOf[registry.Unit](kv, true), p, state, known, true))
	}
	page.Next = next
	return answer{status: http.StatusOK, body: page}, nil
}

func (h *Handler) fleetUnit(r *http.Request, name string) (answer, error) {
	k := h.Keys
	kvs, revision, err := h.Store.GetMany(r.Context(), 0, k.Unit(name), k.Placement(name))
	if err != nil {
		return answer{}, err
	}
	kv, found := kvs[k.Unit(name)]
	if !found {
		return answer{}, refuse(http.StatusNotFound, "unit does not exist")
	}
	at, placed := kvs[k.Placement(name)]
	p := recordOf[registry.Placement](at, placed)
	var state registry.State
	known := false
	if placed && p.err == nil {
		key := k.States(p.registry.Machine)
		kvs, _, err := h.Store.GetMany(r.Context(), revision, key)
		if err != nil {
			return answer{}, err
		}
		for _, m := range h.statesOf(listOf(kvs)) {
			state, known = m.units[name]
		}
	}
	out := h.asFleet(name, recordOf[registry.Unit](kv, true), p, state, known, false)
	if out.CurrentState == registry.Loaded && h.lookBack.take(name) {
		out.CurrentState = registry.Launched
	}
	return answer{status: http.StatusOK, body: out}, nil
}

func listOf(kvs map[string]store.KV) []store.KV {
	var list []store.KV
	for _, kv := range kvs {
		list = append(list, kv)
	}
	return list
}

// setFleetUnit creates, replaces or updates a unit.
func (h *Handler) setFleetUnit(r *http.Request, name string) (answer, error) {
	if err := checkContentType(r.Header); err != nil {
		return answer{}, err
	}
	var in fleetUnit
	if err := json.NewDecoder(r.Body).Decode(&in); err != nil {
		if large := (*http.MaxBytesError)(nil); errors.As(err, &large) {
			return answer{}, err
		}
		return answer{}, refuse(http.StatusBadRequest, "unable to decode body: %v", err)
	}
	if in.Name == "" {
		in.Name = name
	}
	if in.Name != name {
		return answer{}, refuse(http.StatusBadRequest, "name in URL %q differs from unit name in request body %q", name, in.Name)
	}
	if err := unit.CheckName(name); err != nil {
		return answer{}, refuse(http.StatusBadRequest, "%v", err)
	}
	if in.DesiredState != "" {
		if _, err := registry.ParseDesired(string(in.DesiredState)); err != nil {
			return answer{}, refuse(http.StatusBadRequest, "%v", err)
		}
	}
	file, err := fleetFile(in.Options)
	if err != nil {
		return answer{}, err
	}
	was := registry.Inactive
	steps, _, err := h.change(r.Context(), []string{name}, func(_ int, have record[registry.Unit]) step {
		was = have.registry.Desired
		return setFleet(in, file, have)
	})
	if err == nil && was == registry.Launched && in.DesiredState == registry.Loaded {
		h.lookBack.note(name)
	}
	switch {
	case err != nil:
		return answer{}, err
	case steps[0].refusal != nil:
		return answer{}, steps[0].refusal
	case steps[0].result.Outcome == unitapi.Created, steps[0].result.Outcome == unitapi.Replaced:
		return answer{status: http.StatusCreated}, nil
	}
	return answer{status: http.StatusNoContent}, nil
}

func checkContentType(header http.Header) error {
	types := header["Content-Type"]
	if len(types) != 1 {
		return refuse(http.StatusUnsupportedMediaType, "expected 1 Content-Type, got %d", len(types))
	}
	kind, _, _ := strings.Cut(types[0], ";")
	if strings.TrimSpace(kind) != "application/json" {
		return refuse(http.StatusUnsupportedMediaType, "only acceptable Content-Type is application/json")
	}
	return nil
}

// fleetFile makes a unit file of options, nil if there are none.
func fleetFile(options []fleetOption) (*unit.File, error) {
	if len(options) == 0 {
		return nil, nil
	}
	var list []unit.Option
	for _, o := range options {
		list = append(list, unit.Option{Section: o.Section, Name: o.Name, Value: o.Value})
	}
	f, err := unit.New(list)
	if err != nil {
		return nil, refuse(http.StatusBadRequest, "%v", err)
	}
	if p := sizeProblem(f.Text); p != nil {
		return nil, refuse(http.StatusBadRequest, "%s; %s", p.Reason, p.Remedy)
	}
	return f, nil
}

// setFleet decides about a PUT of fleet's API; file is nil if it had no options.
func setFleet(in fleetUnit, file *unit.File, have record[registry.Unit]) step {
	no := func(code int, format string, args ...any) step { return step{refusal: refuse(code, format, args...)} }
	if have.found && have.err != nil {
		return no(http.StatusConflict, "what is stored under this name cannot be read: %v", have.err)
	}
	outcome := unitapi.Updated
	switch {
	case !have.found && file == nil:
		return no(http.StatusConflict, "unit does not exist and options field empty")
	case !have.found:
		outcome = unitapi.Created
	case file != nil && fileOf(in.Name, have.registry.Text).hash != file.Hash().String():
		outcome = unitapi.Replaced
	case in.DesiredState == "":
		return no(http.StatusConflict, "must provide DesiredState to update existing unit")
	}
	if reason := templateReason(in.Name, in.DesiredState); reason != "" {
		return no(http.StatusBadRequest, "%s", reason)
	}
	u := have.registry
	if outcome != unitapi.Updated {
		if message := refusalOf(in.Name, file); message != "" {
			return no(http.StatusBadRequest, "%s", message)
		}
		u.Text, u.Desired = file.Text, registry.Inactive
	}
	if in.DesiredState != "" {
		u.Desired = in.DesiredState
	}
	return put(have, u, unitapi.Result{Name: in.Name, Outcome: outcome})
}

// refusalOf returns why a unit file is refused, "" if it is not: fleet's refused
// combinations in fleet's words alone, all else with what to do about it.
func refusalOf(name string, f *unit.File) string {
	n, _ := unit.SplitName(name)
	_, problems := f.Check(n)
	for _, p := range problems {
		switch {
		case p.Warning:
		case strings.HasPrefix(p.Reason, "unresolvable requirements: "), strings.Contains(p.Reason, " cannot be used with "):
			return p.Reason
		default:
			return p.Error()
		}
	}
	return ""
}

func (h *Handler) deleteFleetUnit(r *http.Request, name string) (answer, error) {
	steps, _, err := h.change(r.Context(), []string{name}, func(_ int, have record[registry.Unit]) step {
		return alter(name, unitapi.Changes{Destroy: true})(have)
	})
	switch {
	case err != nil:
		return answer{}, err
	case steps[0].result.Outcome == unitapi.Missing:
		return answer{}, refuse(http.StatusNotFound, "unit does not exist")
	}
	return answer{status: http.StatusNoContent}, nil
}
