package fleetapi

import (
	_ "embed"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strings"

	"flotilla/internal/api"
	"flotilla/internal/state"
	"flotilla/internal/unit"
	"flotilla/internal/wire"
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
		Name         string        `json:"name,omitempty"`
		Options      []fleetOption `json:"options,omitempty"`
		DesiredState unit.Desired  `json:"desiredState,omitempty"`
		CurrentState unit.Desired  `json:"currentState,omitempty"`
		MachineID    string        `json:"machineID,omitempty"`
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

// ServeHTTP answers a request of fleet's API.
func (h *Handler) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Server", "fleetd/"+h.API.Version)
	a, err := answer{}, error(refuse(http.StatusServiceUnavailable, unregistered))
	if h.awaitRegistered(r.Context()) {
		r.Body = http.MaxBytesReader(w, r.Body, maxBody)
		a, err = h.route(r)
	}
	if err != nil {
		a = h.failed(r, err)
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

func (h *Handler) failed(r *http.Request, err error) answer {
	var e *fleetError
	var large *http.MaxBytesError
	switch {
	case errors.As(err, &e):
	case errors.As(err, &large):
		e = refuse(http.StatusRequestEntityTooLarge, "the body is larger than %d bytes", large.Limit)
	case api.Error(err).Code == wire.CodeStoreUnavailable:
		e = refuse(http.StatusServiceUnavailable, unregistered)
	default:
		e = &fleetError{Code: http.StatusInternalServerError}
	}
	if e.Code == http.StatusInternalServerError && r.Context().Err() == nil {
		h.Log.Error("a request of fleet's API ended in an error", "method", r.Method, "path", r.URL.Path, "err", err)
	}
	return answer{status: e.Code, body: map[string]*fleetError{"error": e}}
}

func (h *Handler) route(r *http.Request) (answer, error) {
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
			return h.getMachines(r)
		case http.MethodPatch:
			return h.patchMachines(r)
		}
		return answer{}, onlySupported("GET and PATCH")
	case collection == "units" && isItem:
		switch r.Method {
		case http.MethodGet:
			return h.getUnit(r, item)
		case http.MethodPut:
			return h.putUnit(r, item)
		case http.MethodDelete:
			return h.deleteUnit(r, item)
		}
		return answer{}, onlySupported("GET, PUT and DELETE")
	case collection != "units" && collection != "state":
		return answer{}, refuse(http.StatusNotFound, "")
	case r.Method != http.MethodGet:
		return answer{}, onlySupported("GET")
	case collection == "units":
		return h.getUnits(r)
	case isItem:
		return h.getState(r, item)
	}
	return h.getStates(r)
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

func (h *Handler) getMachines(r *http.Request) (answer, error) {
	token, err := h.page(r)
	if err != nil {
		return answer{}, err
	}
	known, err := h.API.State.Fresh(r.Context())
	if err != nil {
		return answer{}, err
	}
	var ids []string
	for id, n := range known.Nodes {
		if n.Present() && n.Record.Value.Units {
			ids = append(ids, id)
		}
	}
	slices.Sort(ids)
	var page fleetPage
	ids, page.Next = cut(ids, token)
	for _, id := range ids {
		n := known.Nodes[id]
		page.Machines = append(page.Machines, fleetMachine{ID: id, Metadata: n.Metadata, PrimaryIP: n.Record.Value.Address})
	}
	return answer{status: http.StatusOK, body: page}, nil
}

// asFleet writes a unit as fleet does. A list says "inactive" of a global unit,
// a single one has no current state.
func (h *Handler) asFleet(st state.Standing, listed bool) fleetUnit {
	out := fleetUnit{Name: st.Name, DesiredState: st.Record.Value.Desired, CurrentState: st.Current, MachineID: st.Home}
	f, err := unit.Parse(st.Record.Value.Text)
	if st.Record.Problem != "" {
		err = errors.New(st.Record.Problem)
	}
	if err != nil {
		h.Log.Debug("a unit cannot be read", "unit", st.Name, "err", err)
	} else {
		for _, o := range f.Options {
			out.Options = append(out.Options, fleetOption{o.Section, o.Name, o.Value})
		}
	}
	if st.Requirements.Global && listed {
		out.CurrentState = unit.Inactive
	}
	return out
}

func (h *Handler) getUnits(r *http.Request) (answer, error) {
	token, err := h.page(r)
	if err != nil {
		return answer{}, err
	}
	known, err := h.API.State.Full(r.Context())
	if err != nil {
		return answer{}, err
	}
	names := slices.Collect(maps.Keys(known.Units))
	names = slices.DeleteFunc(names, func(name string) bool { return !known.Units[name].Record.Exists() })
	slices.Sort(names)
	var page fleetPage
	names, page.Next = cut(names, token)
	for _, name := range names {
		page.Units = append(page.Units, h.asFleet(state.StandingOf(known, known.Units[name]), true))
	}
	return answer{status: http.StatusOK, body: page}, nil
}

func (h *Handler) getUnit(r *http.Request, name string) (answer, error) {
	known, err := h.API.State.Full(r.Context())
	if err != nil {
		return answer{}, err
	}
	st := state.StandingOf(known, known.Units[name])
	if !st.Record.Exists() {
		return answer{}, refuse(http.StatusNotFound, "unit does not exist")
	}
	out := h.asFleet(st, false)
	if out.CurrentState == unit.Loaded && h.lookBack.take(name) {
		out.CurrentState = unit.Launched
	}
	return answer{status: http.StatusOK, body: out}, nil
}

// change carries out one decision about one unit.
func (h *Handler) change(r *http.Request, name string, decide func(u *state.Unit) api.Step) (wire.Result, error) {
	known, err := h.API.State.Fresh(r.Context())
	if err != nil {
		return wire.Result{}, err
	}
	steps, _, err := h.API.ChangeUnits(r.Context(), known, []string{name}, func(_ int, _ *state.Snapshot, u *state.Unit) api.Step { return decide(u) })
	if err != nil {
		return wire.Result{}, err
	}
	return steps[0].Result, nil
}

// putUnit creates, replaces or updates a unit.
func (h *Handler) putUnit(r *http.Request, name string) (answer, error) {
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
		if _, err := unit.ParseDesired(string(in.DesiredState)); err != nil {
			return answer{}, refuse(http.StatusBadRequest, "%v", err)
		}
	}
	file, err := fleetFile(in.Options)
	if err != nil {
		return answer{}, err
	}
	var refused error
	result, err := h.change(r, name, func(u *state.Unit) (st api.Step) {
		st, refused = setFleet(in, file, u)
		return st
	})
	switch {
	case err != nil:
		return answer{}, err
	case refused != nil:
		return answer{}, refused
	}
	if result.Was == unit.Launched && in.DesiredState == unit.Loaded {
		h.lookBack.note(name)
	}
	if result.Outcome == wire.Created || result.Outcome == wire.Replaced {
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
	if p := api.SizeProblem(f.Text); p != nil {
		return nil, refuse(http.StatusBadRequest, "%s; %s", p.Reason, p.Remedy)
	}
	return f, nil
}

// setFleet decides about a PUT of fleet's API; file is nil if it had no options. The
// error is what fleet answers instead.
func setFleet(in fleetUnit, file *unit.File, u *state.Unit) (api.Step, error) {
	have := u.Record
	outcome := wire.Updated
	switch {
	case have.Problem != "":
		return api.Step{}, refuse(http.StatusConflict, "what is stored under this name cannot be read: %s", have.Problem)
	case !have.Exists() && file == nil:
		return api.Step{}, refuse(http.StatusConflict, "unit does not exist and options field empty")
	case !have.Exists():
		outcome = wire.Created
	case file != nil && state.StandingOf(&state.Snapshot{}, u).Hash != file.Hash().String():
		outcome = wire.Replaced
	case in.DesiredState == "":
		return api.Step{}, refuse(http.StatusConflict, "must provide DesiredState to update existing unit")
	}
	if reason := api.TemplateReason(in.Name, in.DesiredState); reason != "" {
		return api.Step{}, refuse(http.StatusBadRequest, "%s", reason)
	}
	r := have.Value
	if outcome != wire.Updated {
		if message := refusalOf(in.Name, file); message != "" {
			return api.Step{}, refuse(http.StatusBadRequest, "%s", message)
		}
		r.Text, r.Desired = file.Text, unit.Inactive
	}
	if in.DesiredState != "" {
		r.Desired = in.DesiredState
	}
	return api.Put(have, r, wire.Result{Name: in.Name, Outcome: outcome, Was: have.Value.Desired}), nil
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

func (h *Handler) deleteUnit(r *http.Request, name string) (answer, error) {
	result, err := h.change(r, name, func(u *state.Unit) api.Step { return api.Alter(u, wire.Changes{Destroy: true}) })
	switch {
	case err != nil:
		return answer{}, err
	case result.Outcome == wire.Missing:
		return answer{}, refuse(http.StatusNotFound, "unit does not exist")
	}
	return answer{status: http.StatusNoContent}, nil
}
