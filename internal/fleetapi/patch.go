package fleetapi

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"regexp"
	"slices"
	"strings"

	"flotilla/internal/registry"
	"flotilla/internal/store"
)

// maxSettings is the longest record of the settings of one machine, in bytes of
// JSON.
const maxSettings = 256 << 10

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
		case parts == nil || registry.CheckMachineID(parts[1]) != nil:
			return answer{}, refuse(http.StatusBadRequest, "machine metadata path invalid")
		case op.Op == "remove":
			op.Value = ""
		case op.Value == "":
			return answer{}, refuse(http.StatusBadRequest, "invalid value: add and replace require a value")
		}
		if err := checkMetadata(parts[2], string(op.Value)); err != nil {
			return answer{}, refuse(http.StatusBadRequest, "invalid value: %v", err)
		}
		if changes[parts[1]] == nil {
			changes[parts[1]] = map[string]string{}
		}
		changes[parts[1]][parts[2]] = string(op.Value)
	}
	for _, machine := range slices.Sorted(maps.Keys(changes)) {
		_, _, _, err := h.set(r.Context(), machine, func(s *registry.Settings) {
			if s.Metadata == nil {
				s.Metadata = map[string]string{}
			}
			maps.Copy(s.Metadata, changes[machine])
		})
		if e := (*Error)(nil); errors.As(err, &e) {
			err = refuse(e.status, "%s", e.Message)
		}
		if err != nil {
			return answer{}, err
		}
	}
	return answer{status: http.StatusNoContent, typed: true}, nil
}

// checkMetadata returns what keeps a machine from having that metadata, or nil.
func checkMetadata(key, value string) error {
	const limit = 4096
	switch {
	case !metadataPath.MatchString("/x/metadata/" + key):
		return fmt.Errorf("the key %q is not letters, digits, dots, dashes and underscores", key)
	case len(key)+len(value) > limit:
		return fmt.Errorf("%.40s is longer than %d bytes", key, limit)
	case strings.ContainsFunc(value, func(r rune) bool { return r < ' ' || r == 0x7f || r == '\ufffd' }):
		return fmt.Errorf("the value of %s has a control character in it", key)
	}
	return nil
}

// set changes the settings of a machine. edit gets what is there now and may be
// called again. The second result reports whether anything was written.
func (h *Handler) set(ctx context.Context, machine string, edit func(*registry.Settings)) (registry.Settings, bool, int64, error) {
	key := h.Keys.Settings(machine)
	var err error
	for range attempts {
		kvs, revision, rerr := h.Store.GetMany(ctx, 0, key)
		if rerr != nil {
			return registry.Settings{}, false, 0, rerr
		}
		kv, found := kvs[key]
		have := recordOf[registry.Settings](kv, found)
		if have.err != nil {
			return registry.Settings{}, false, 0, fail(http.StatusConflict, "upgrade this node, or delete "+key, "the settings of machine %s cannot be read: %v", machine, have.err)
		}
		s := have.registry
		s.V, s.Metadata = registry.Version, maps.Clone(s.Metadata)
		edit(&s)
		value := registry.Encode(s)
		switch {
		case value == kv.Value || !found && value == registry.Encode(registry.Settings{V: registry.Version}):
			return s, false, revision, nil
		case len(value) > maxSettings:
			return s, false, 0, fail(http.StatusBadRequest, "remove what nobody uses", "machine %s would have %d bytes of settings, and the limit is %d", machine, len(value), maxSettings)
		}
		// Done twice it is the same: an unknown outcome can be tried again.
		revision, err = h.Store.Apply(ctx, []store.Op{store.Put(key, value)}, store.Unchanged(key, kv.ModRevision))
		if err == nil {
			h.Log.Info("settings of a machine changed", "machine", machine, "cordon", s.Cordon, "drain", s.Drain, "reason", s.Reason, "metadata", s.Metadata, "revision", revision)
			return s, true, revision, nil
		}
		if !errors.Is(err, store.ErrConflict) && !errors.Is(err, store.ErrUnknown) {
			break
		}
	}
	return registry.Settings{}, false, 0, fmt.Errorf("change the settings of machine %s: %w", machine, err)
}
