package fleetapi

import (
	"encoding/json"
	"errors"
	"maps"
	"net/http"
	"regexp"
	"slices"

	"flotilla/internal/api"
	"flotilla/internal/state"
	"flotilla/internal/wire"
)

// metadataPath is what the path of an operation looks like.
var metadataPath = regexp.MustCompile(`^/([^/]+)/metadata/([A-Za-z0-9_.-]+)$`)

// metadataOp is one operation of a PATCH of the machines.
type metadataOp struct {
	Op    string        `json:"op"`
	Path  string        `json:"path"`
	Value metadataValue `json:"value"`
}

// metadataValue is written as "x" in fleet's documents and as {"value": "x"} by
// its clients.
type metadataValue string

func (v *metadataValue) UnmarshalJSON(raw []byte) error {
	if len(raw) > 0 && raw[0] == '{' {
		var wrapped struct {
			Value string `json:"value"`
		}
		err := json.Unmarshal(raw, &wrapped)
		*v = metadataValue(wrapped.Value)
		return err
	}
	var plain string
	err := json.Unmarshal(raw, &plain)
	*v = metadataValue(plain)
	return err
}

// patchMachines sets and hides metadata of machines, whether they are there or
// not. All of it is checked before anything is written; each machine is one
// write.
func (h *Handler) patchMachines(r *http.Request) (answer, error) {
	var ops []metadataOp
	if err := json.NewDecoder(r.Body).Decode(&ops); err != nil {
		if large := (*http.MaxBytesError)(nil); errors.As(err, &large) {
			return answer{}, err
		}
		return answer{}, refuse(http.StatusBadRequest, "%v", err)
	}
	changes := map[string]map[string]string{} // by machine
	for _, op := range ops {
		parts := metadataPath.FindStringSubmatch(op.Path)
		switch {
		case op.Op != "add" && op.Op != "remove" && op.Op != "replace":
			return answer{}, refuse(http.StatusBadRequest, "invalid op: expect add, remove, or replace")
		case parts == nil || state.CheckNodeID(parts[1]) != nil:
			return answer{}, refuse(http.StatusBadRequest, "machine metadata path invalid")
		case op.Op == "remove":
			op.Value = ""
		case op.Value == "":
			return answer{}, refuse(http.StatusBadRequest, "invalid value: add and replace require a value")
		}
		if err := api.CheckMetadata(parts[2], string(op.Value)); err != nil {
			return answer{}, refuse(http.StatusBadRequest, "invalid value: %v", err)
		}
		if changes[parts[1]] == nil {
			changes[parts[1]] = map[string]string{}
		}
		changes[parts[1]][parts[2]] = string(op.Value)
	}
	for _, machine := range slices.Sorted(maps.Keys(changes)) {
		_, _, _, err := h.API.ChangeSettings(r.Context(), machine, func(s *state.Settings) { maps.Copy(s.Metadata, changes[machine]) })
		if e := (*wire.Error)(nil); errors.As(err, &e) {
			err = refuse(e.Code.Status(), "%s", e.Message)
		}
		if err != nil {
			return answer{}, err
		}
	}
	return answer{status: http.StatusNoContent, typed: true}, nil
}
