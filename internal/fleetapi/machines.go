package fleetapi

import (
	"errors"
	"fmt"
	"net/http"
	"strings"

	"flotilla/internal/registry"
	"flotilla/internal/store"
	"flotilla/internal/unitapi"
)

func (h *Handler) getMachines(r *http.Request) (any, error) {
	k := h.Keys
	prefixes := []string{k.Machine(""), k.Settings(""), k.Placement(""), k.States(""), k.Failover(), k.Schedule(registry.Global)}
	lists, revision, err := h.Store.ListMany(r.Context(), 0, prefixes...)
	if err != nil {
		return nil, err
	}
	f := &fleet{revision, byName(prefixes[0], lists[0], anew[registry.Machine]), byName(prefixes[1], lists[1], anew[registry.Settings])}
	placed := map[string]int{}
	for _, p := range byName(prefixes[2], lists[2], anew[registry.Placement]) {
		placed[p.registry.Machine]++
	}
	globals := map[string]int{}
	for _, m := range h.statesOf(lists[3]) {
		for _, kv := range lists[5] {
			if m.units[strings.TrimPrefix(kv.Key, prefixes[5])].Hash != "" {
				globals[m.machine]++
			}
		}
	}
	out := unitapi.Machines{Revision: revision, Machines: []unitapi.Machine{}}
	for _, kv := range lists[4] {
		if failover := recordOf[registry.Failover](kv, true); kv.Key == k.Failover() && failover.err == nil {
			out.Failover = &failover.registry
		}
	}
	for _, id := range f.ids() {
		m, s := f.machines[id], f.settings[id].registry
		out.Machines = append(out.Machines, unitapi.Machine{
			ID: id, Node: m.registry.Node, Address: m.registry.Address, API: m.registry.API, Version: m.registry.Version,
			Metadata: f.metadata(id), Cordon: s.Cordon, Drain: s.Drain, Reason: s.Reason,
			Units: placed[id], Globals: globals[id], Runs: m.registry.Units,
			Memory: m.registry.Memory, CPU: m.registry.CPU, Counters: m.registry.Counters,
			Generation: m.CreateRevision, BootID: m.registry.BootID, Here: id == h.Self(),
		})
	}
	return out, nil
}

func (h *Handler) postSettings(r *http.Request) (any, error) {
	var in unitapi.SettingsChange
	if err := readBody(r, &in); err != nil {
		return nil, err
	}
	for key, value := range in.Metadata {
		if value == nil {
			continue
		}
		if err := checkMetadata(key, *value); err != nil {
			return nil, fail(http.StatusBadRequest, "", "%v", err)
		}
	}
	f, err := h.readMachines(r.Context(), 0)
	if err != nil {
		return nil, err
	}
	id, err := f.find(r.PathValue("id"), true)
	if err != nil {
		return nil, err
	}
	settings, changed, revision, err := h.set(r.Context(), id, func(s *registry.Settings) { edit(s, in) })
	if err != nil {
		return nil, err
	}
	return unitapi.SettingsChanged{Machine: id, Settings: settings, Changed: changed, Revision: revision}, nil
}

// edit makes settings what c asks for.
func edit(s *registry.Settings, c unitapi.SettingsChange) {
	if c.Cordon != nil {
		s.Cordon = *c.Cordon
	}
	if c.Drain != nil {
		s.Drain = *c.Drain
	}
	if c.Reason != nil {
		s.Reason = *c.Reason
	}
	if !s.Cordon && !s.Drain {
		s.Reason = ""
	}
	for key, value := range c.Metadata {
		if value == nil {
			delete(s.Metadata, key)
			continue
		}
		if s.Metadata == nil {
			s.Metadata = map[string]string{}
		}
		s.Metadata[key] = *value
	}
}

// postFailover lets the engine move the units of machines that are gone although
// they are many.
func (h *Handler) postFailover(r *http.Request) (any, error) {
	var in unitapi.FailoverChange
	if err := readBody(r, &in); err != nil {
		return nil, err
	}
	if !in.Allow {
		return nil, fail(http.StatusBadRequest, "", `the only thing to say is {"allow": true}`)
	}
	ctx, key := r.Context(), h.Keys.Failover()
	var err error
	for range attempts {
		kv, found, rerr := h.Store.Get(ctx, key)
		if rerr != nil {
			return nil, rerr
		}
		have := recordOf[registry.Failover](kv, found)
		switch f := have.registry; {
		case have.err != nil:
			return nil, fail(http.StatusConflict, "upgrade this node, or delete "+key, "what is held back cannot be read: %v", have.err)
		case !found || len(f.Held) == 0:
			return nil, fail(http.StatusConflict, "", "nothing is held back")
		case f.Allowed:
			return unitapi.FailoverChanged{Failover: f, Revision: kv.ModRevision}, nil
		}
		f := have.registry
		f.V, f.Allowed = registry.Version, true
		var revision int64
		revision, err = h.Store.Apply(ctx, []store.Op{store.Put(key, registry.Encode(f))}, store.Unchanged(key, kv.ModRevision))
		if err == nil {
			h.Log.Info("failover of many machines was allowed by hand", "machine", f.Held, "revision", revision)
			return unitapi.FailoverChanged{Failover: f, Revision: revision}, nil
		}
		if !errors.Is(err, store.ErrConflict) && !errors.Is(err, store.ErrUnknown) {
			break
		}
	}
	return nil, fmt.Errorf("allow the failover: %w", err)
}

// postLeave takes this machine out of the cluster. It answers when its units
// have stopped.
func (h *Handler) postLeave(r *http.Request) (any, error) {
	if h.Leave == nil {
		return nil, fail(http.StatusConflict, "", "the node that answers runs no units: it has nothing to leave with")
	}
	if err := h.Leave(r.Context()); err != nil {
		return nil, err
	}
	return struct{}{}, nil
}
