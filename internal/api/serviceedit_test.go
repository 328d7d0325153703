package api

import (
	"encoding/json"
	"errors"
	"maps"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"flotilla/internal/catalog"
	"flotilla/internal/store"
	"flotilla/internal/wire"
)

func have(kvs map[string]string) keys {
	k := keys{}
	for name, value := range kvs {
		k[name] = store.KV{Value: value, ModRevision: 7}
	}
	return k
}

func parseChange(t *testing.T, body string) wire.ServiceChange {
	t.Helper()
	var c wire.ServiceChange
	if err := json.Unmarshal([]byte(body), &c); err != nil {
		t.Fatal(err)
	}
	return c
}

const deleted = "(deleted)"

func TestChangeEdit(t *testing.T) {
	for _, test := range []struct {
		name, body string
		have, want map[string]string
	}{
		{"nothing", `{}`, nil, nil},
		{"new", `{"scheme":"http","add_endpoints":["10.0.0.1:80","10.0.0.2:80"],"private":true,"host_port":81}`, nil,
			map[string]string{"scheme": "http", "hosts/1": "10.0.0.1:80", "hosts/2": "10.0.0.2:80", "private": "true", "host_port": "81"}},
		{"same", `{"scheme":"http","endpoints":{"1":"10.0.0.1:80"},"private":true}`,
			map[string]string{"scheme": "http", "hosts/1": "10.0.0.1:80", "private": ""}, nil},
		{"names in use are skipped", `{"add_endpoints":["10.0.0.3:80","10.0.0.1:80"]}`,
			map[string]string{"hosts/1": "10.0.0.1:80\n", "hosts/2": "10.0.0.2:80"}, map[string]string{"hosts/3": "10.0.0.3:80"}},
		{"an address moved away is free again", `{"endpoints":{"1":"10.0.0.9:80"},"add_endpoints":["10.0.0.1:80"]}`,
			map[string]string{"hosts/1": "10.0.0.1:80"}, map[string]string{"hosts/1": "10.0.0.9:80", "hosts/2": "10.0.0.1:80"}},
		{"removals", `{"scheme":"","host_port":0,"private":false,"endpoints":{"1":null,"9":null}}`,
			map[string]string{"scheme": "http", "host_port": "81", "private": "", "hosts/1": "10.0.0.1:80", "meta/1": `{"weight":5}`},
			map[string]string{"scheme": deleted, "host_port": deleted, "private": deleted, "hosts/1": deleted, "meta/1": deleted}},
		{"options are merged", `{"options":{"sticky":true,"balance":null}}`,
			map[string]string{"options": `{"balance":"leastconn","retries":false}`}, map[string]string{"options": `{"retries":false,"sticky":true}`}},
		{"the last option goes", `{"options":{"sticky":null}}`, map[string]string{"options": `{"sticky":true}`}, map[string]string{"options": deleted}},
		{"options that cannot be read are replaced", `{"options":{"sticky":true}}`, map[string]string{"options": "{"}, map[string]string{"options": `{"sticky":true}`}},
		{"meta", `{"meta":{"1":{"drain":true}}}`, map[string]string{"meta/1": `{"weight":5}`}, map[string]string{"meta/1": `{"drain":true,"weight":5}`}},
		{"domains", `{"add_domains":["WWW.example.com","a.example.com"],"drop_domains":["b.example.com"]}`,
			map[string]string{"domains/1": "a.example.com", "domains/x": "B.example.com "},
			map[string]string{"domains/www.example.com": "www.example.com", "domains/x": deleted}},
		{"all domains", `{"domains":["c.example.com","a.example.com"]}`,
			map[string]string{"domains/1": "a.example.com", "domains/2": "b.example.com"},
			map[string]string{"domains/c.example.com": "c.example.com", "domains/2": deleted}},
	} {
		t.Run(test.name, func(t *testing.T) {
			c := parseChange(t, test.body)
			e, err := edit(&c, have(test.have))
			if err != nil {
				t.Fatal(err)
			}
			got := map[string]string{}
			for name, value := range e {
				if got[name] = deleted; value != nil {
					got[name] = *value
				}
			}
			if !maps.Equal(got, test.want) {
				t.Error(cmp.Diff(test.want, got))
			}
		})
	}
}

func TestChangeCheck(t *testing.T) {
	others := catalog.NewBuilder(catalog.Policy{}).Apply(catalog.Batch{Revision: 9, Reset: true, Keys: []catalog.KeyValue{
		{Key: "/services/Shop/domains/1", Value: "shop.example.com", CreateRevision: 1},
		{Key: "/services/Shop/host_port", Value: "81", CreateRevision: 1},
		{Key: "/services/Shop/scheme", Value: "http", CreateRevision: 1},
	}})
	for _, test := range []struct {
		name, service, body string
		code                wire.Code
		want                string
	}{
		{"good", "web", `{"scheme":"http","add_endpoints":["10.0.0.1:80"],"options":{"sticky":true}}`, "", ""},
		{"no scheme", "web", `{"add_endpoints":["10.0.0.1:80"]}`, wire.CodeInvalid, "has no scheme"},
		{"scheme", "web", `{"scheme":"gopher"}`, wire.CodeInvalid, `scheme "gopher"`},
		{"endpoint", "web", `{"scheme":"http","add_endpoints":["10.0.0.1"]}`, wire.CodeInvalid, `hosts/1 "10.0.0.1"`},
		{"link-local", "web", `{"scheme":"http","add_endpoints":["169.254.169.254:80"]}`, wire.CodeInvalid, "metadata"},
		{"newline", "web", `{"scheme":"http","endpoints":{"1":"10.0.0.1:80\nbind :1"}}`, wire.CodeInvalid, `hosts/1 "10.0.0.1:80\nbind :1"`},
		{"endpoint name", "web", `{"scheme":"http","endpoints":{"a/b":"10.0.0.1:80"}}`, wire.CodeInvalid, "cannot name an endpoint"},
		{"option", "web", `{"scheme":"http","options":{"stikcy":true}}`, wire.CodeInvalid, "stikcy"},
		{"service name", "web.1", `{"scheme":"http"}`, wire.CodeInvalid, "service name"},
		{"same name but for case", "shop", `{"scheme":"http"}`, wire.CodeConflict, "there is a service Shop already"},
		{"port of another", "web", `{"scheme":"http","host_port":81}`, wire.CodeConflict, "host_port 81 belongs to service Shop"},
		{"domain of another", "web", `{"scheme":"http","add_domains":["shop.example.com"]}`, wire.CodeConflict, "domain shop.example.com belongs to service Shop"},
		{"own port", "Shop", `{"host_port":81,"scheme":"http"}`, "", ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			c := parseChange(t, test.body)
			e, err := edit(&c, keys{})
			if err == nil {
				err = e.check(test.service, keys{}, catalog.Policy{}, others)
			}
			var got *wire.Error
			switch {
			case test.code == "" && err != nil:
				t.Error(err)
			case test.code != "" && (!errors.As(err, &got) || got.Code != test.code || !strings.Contains(got.Message, test.want) || got.Hint == ""):
				t.Errorf("error %+v, want %s with %q and a hint", err, test.code, test.want)
			}
		})
	}
	// What was bad before does not stand in the way of other changes.
	c := parseChange(t, `{"host_port":82}`)
	before := have(map[string]string{"scheme": "http", "hosts/1": "nonsense", "private": ""})
	e, err := edit(&c, before)
	if err == nil {
		err = e.check("web", before, catalog.Policy{}, others)
	}
	if err != nil {
		t.Error(err)
	}
}
