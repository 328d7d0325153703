package api

import (
	"encoding/json"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"flotilla/internal/catalog"
	"flotilla/internal/store"
	"flotilla/internal/wire"
)

// keys are those below /services/<name>/ by their names.
type keys map[string]store.KV

// edits turn a service's keys into what a Change asks for: new values by name,
// nil deletes.
type edits map[string]*string

func (e edits) set(name, value string) { e[name] = &value }

// edit returns what c has to write for a service whose keys are have. Values
// that are already there are left out.
func edit(c *wire.ServiceChange, have keys) (edits, error) {
	e := edits{}
	if c.Scheme != nil {
		e["scheme"] = nil
		if *c.Scheme != "" {
			e.set("scheme", *c.Scheme)
		}
	}
	if c.HostPort != nil {
		e["host_port"] = nil
		if *c.HostPort != 0 {
			e.set("host_port", strconv.Itoa(*c.HostPort))
		}
	}
	if c.Private != nil {
		e["private"] = nil
		if *c.Private {
			e.set("private", "true")
		}
	}
	if err := editEndpoints(c, have, e); err != nil {
		return nil, err
	}
	editDomains(c, have, e)
	if c.Options != nil {
		e["options"] = merge(have["options"].Value, c.Options)
	}
	for n, fields := range c.Meta {
		e["meta/"+n] = merge(have["meta/"+n].Value, fields)
	}
	for name, value := range e {
		old, there := have[name]
		if value == nil && !there || value != nil && there && (old.Value == *value || name == "private") {
			delete(e, name)
		}
	}
	return e, nil
}

func editEndpoints(c *wire.ServiceChange, have keys, e edits) error {
	for n, addr := range c.Endpoints {
		if n == "" || strings.Contains(n, "/") {
			return wire.Errorf(wire.CodeInvalid, "write it as 1=10.0.0.5:8080", "%q cannot name an endpoint", n)
		}
		e["hosts/"+n] = addr
		if addr == nil {
			e["meta/"+n] = nil
		}
	}
	next := 1
	for _, addr := range c.AddEndpoints {
		if have.endpoint(addr, e) {
			continue
		}
		for ; ; next++ {
			name := "hosts/" + strconv.Itoa(next)
			_, taken := have[name]
			_, planned := e[name]
			if !taken && !planned {
				e.set(name, addr)
				break
			}
		}
	}
	return nil
}

// endpoint reports whether addr is an endpoint already, after the edits.
func (have keys) endpoint(addr string, e edits) bool {
	want, err := netip.ParseAddrPort(addr)
	if err != nil {
		return false // the catalog will say what is wrong with it
	}
	same := func(value string) bool {
		a, err := netip.ParseAddrPort(strings.TrimSpace(value))
		return err == nil && a == want
	}
	for name, kv := range have {
		if _, edited := e[name]; !edited && strings.HasPrefix(name, "hosts/") && same(kv.Value) {
			return true
		}
	}
	for name, value := range e {
		if value != nil && strings.HasPrefix(name, "hosts/") && same(*value) {
			return true
		}
	}
	return false
}

// editDomains keeps domains/<n> keys as they are where their value stays; new
// ones are named by the domain itself.
func editDomains(c *wire.ServiceChange, have keys, e edits) {
	there := map[string]string{} // key name by domain
	for name, kv := range have {
		if strings.HasPrefix(name, "domains/") {
			there[domain(kv.Value)] = name
		}
	}
	add, drop := c.AddDomains, c.DropDomains
	if c.Domains != nil {
		add = append(slices.Clone(*c.Domains), add...)
		for d := range there {
			if !slices.ContainsFunc(add, func(a string) bool { return domain(a) == d }) {
				drop = append(slices.Clone(drop), d)
			}
		}
	}
	for _, d := range add {
		if _, ok := there[domain(d)]; !ok {
			e.set("domains/"+domain(d), domain(d))
		}
	}
	for _, d := range drop {
		if name, ok := there[domain(d)]; ok {
			e[name] = nil
		}
	}
}

func domain(s string) string { return strings.ToLower(strings.TrimSpace(s)) }

// merge returns the JSON object old with fields put over it; null removes a
// field, and an object without fields is nil. An old that is no object counts
// as empty.
func merge(old string, fields map[string]json.RawMessage) *string {
	object := map[string]json.RawMessage{}
	_ = json.Unmarshal([]byte(old), &object) // what cannot be read is replaced
	if object == nil {                       // old is "null"
		object = map[string]json.RawMessage{}
	}
	maps.Copy(object, fields)
	maps.DeleteFunc(object, func(_ string, v json.RawMessage) bool { return string(v) == "null" })
	if len(object) == 0 {
		return nil
	}
	raw, err := json.Marshal(object)
	if err != nil { // each field was decoded from JSON
		return nil
	}
	text := string(raw)
	return &text
}

// check lets the catalog judge the service as it will be, and returns what it
// says against the edited keys. It also looks at what other services hold.
func (e edits) check(service string, have keys, policy catalog.Policy, others *catalog.Snapshot) error {
	if len(have) == 0 && e["scheme"] == nil && len(e) > 0 {
		return wire.Errorf(wire.CodeInvalid, "add --scheme http or --scheme tcp", "service %s is new and has no scheme", strconv.Quote(service))
	}
	batch := catalog.Batch{Reset: true, Revision: 1}
	for name, kv := range have {
		if _, edited := e[name]; !edited {
			batch.Keys = append(batch.Keys, catalog.KeyValue{Key: catalog.Prefix + service + "/" + name, Value: kv.Value, CreateRevision: 1, ModRevision: 1})
		}
	}
	for name, value := range e {
		if value != nil {
			batch.Keys = append(batch.Keys, catalog.KeyValue{Key: catalog.Prefix + service + "/" + name, Value: *value, CreateRevision: 1, ModRevision: 1})
		}
	}
	slices.SortFunc(batch.Keys, func(a, b catalog.KeyValue) int { return strings.Compare(a.Key, b.Key) })
	var wrong []string
	for svc := range catalog.NewBuilder(policy).Apply(batch).All() {
		for _, p := range svc.Problems {
			name := strings.TrimPrefix(p.Key, catalog.Prefix+service+"/")
			value, edited := e[name]
			_, there := have[name]
			switch {
			case edited && value != nil:
				wrong = append(wrong, fmt.Sprintf("%s %s: %s", name, strconv.Quote(*value), p.Reason))
			case !edited && !there && name != "scheme": // the service's name, or a name that is shown quoted
				wrong = append(wrong, p.Reason)
			}
		}
	}
	if len(wrong) > 0 {
		return wire.Errorf(wire.CodeInvalid, "nothing was written; mend it and run the command again", "service %s: %s", strconv.Quote(service), strings.Join(wrong, "; "))
	}
	return e.conflict(service, others)
}

// conflict returns an error if another service holds a port, domain or name
// that the edits ask for.
func (e edits) conflict(service string, others *catalog.Snapshot) error {
	if other := others.Fold(service); other != nil && other.Name != service && others.Service(service) == nil {
		return wire.Errorf(wire.CodeConflict, "choose another name", "there is a service %s already, and host names make no difference between it and %s", other.Name, service)
	}
	port := e["host_port"]
	for svc := range others.All() {
		if svc.Name == service {
			continue
		}
		if port != nil && strconv.Itoa(svc.HostPort) == *port {
			return wire.Errorf(wire.CodeConflict, "choose another port, or see: flotilla services explain "+svc.Name, "host_port %s belongs to service %s", *port, svc.Name)
		}
		for _, d := range svc.Domains {
			if e["domains/"+d] != nil {
				return wire.Errorf(wire.CodeConflict, "remove it there first: flotilla services set "+svc.Name+" --remove-domain "+d, "domain %s belongs to service %s", d, svc.Name)
			}
		}
	}
	return nil
}
