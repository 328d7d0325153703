package main

import (
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"flotilla/internal/nodeconfig"
)

func TestFleetConf(t *testing.T) {
	for name, tc := range map[string]struct {
		text, env string
		want      fleetConf
		warnings  string
		err       string
	}{
		"nothing": {},
		"what the functional suite writes": {
			text: "verbosity=2\netcd_servers=[\"http://172.18.0.1:4001\"]\netcd_key_prefix=/fleet_functional/smoke\npublic_ip=172.18.1.1\nagent_ttl=3s\nenable_grpc=true\n",
			env:  "FLEET_METADATA=hostname=smoke1",
			want: fleetConf{Verbosity: 2, EtcdServers: []string{"http://172.18.0.1:4001"}, KeyPrefix: "/fleet_functional/smoke/", PublicIP: "172.18.1.1",
				MachineTTL: 3 * time.Second, Metadata: map[string]string{"hostname": "smoke1"}},
		},
		"everything": {
			text: "# comment\n; comment\n\n etcd_servers = http://a:1/, \"https://b:2\",c:3 \nmetadata=\"disk=ssd, zone = a,disk=hdd\"\r\nunits_directory='/run/x/'\ntoken_limit=7\ndisable_engine=true\netcd_cafile=ca\netcd_certfile=c\netcd_keyfile=k\n",
			want: fleetConf{EtcdServers: []string{"http://a:1", "https://b:2", "http://c:3"}, Metadata: map[string]string{"disk": "hdd", "zone": "a"},
				UnitsDir: "/run/x/", TokenLimit: 7, DisableEngine: true, CAFile: "ca", CertFile: "c", KeyFile: "k"},
		},
		"the environment counts more": {text: "public_ip=10.0.0.1\n", env: "FLEET_PUBLIC_IP=10.0.0.2", want: fleetConf{PublicIP: "10.0.0.2"}},
		"without meaning here":        {text: "engine_reconcile_interval=2\netcd_request_timeout=1.0\nverify_units=false\nsystemd_user=false\n"},
		"lost": {text: "etcd_username=me\nverify_units=true\ncolour=red\n",
			warnings: "f:3: fleet has no setting colour, and it is not used|f:1: etcd_username is not used: etcd is used without a user: give a client certificate (etcd_certfile, etcd_keyfile) instead|f:2: verify_units is not used: signatures of units are not verified; fleet gave that up too"},
		"all mistakes at once": {text: "agent_ttl=soon\nverbosity\n[section]\n", env: "FLEET_TOKEN_LIMIT=x",
			err: "f:2: \"verbosity\" is not KEY=VALUE\nf:3: \"[section]\" is not KEY=VALUE\nf:1: agent_ttl=soon: time: invalid duration \"soon\"\nFLEET_TOKEN_LIMIT: token_limit=x: strconv.Atoi: parsing \"x\": invalid syntax"},
		"no server":    {text: "etcd_servers=[]\n", err: "f:1: etcd_servers=[]: names no server"},
		"bad metadata": {text: "metadata=a\n", err: `f:1: metadata=a: "a" is not KEY=VALUE`},
	} {
		got, warnings, err := parseFleetConf(tc.text, "f", []string{"HOME=/", tc.env})
		text := ""
		if err != nil {
			text = err.Error()
		}
		if text != tc.err {
			t.Errorf("%s: error %q, want %q", name, text, tc.err)
		}
		if tc.err == "" {
			if diff := cmp.Diff(tc.want, got); diff != "" {
				t.Errorf("%s:\n%s", name, diff)
			}
		}
		if w := strings.Join(warnings, "|"); w != tc.warnings {
			t.Errorf("%s: warns %q, want %q", name, w, tc.warnings)
		}
	}
}

// What fleet's configuration makes of a node is a node that starts.
func TestFleetConfApplied(t *testing.T) {
	f, _, err := parseFleetConf("verbosity=1\netcd_servers=http://127.0.0.1:4001\netcd_key_prefix=fleet\npublic_ip=127.0.0.9\nagent_ttl=2500ms\nmetadata=b=2,a=1\nunits_directory=/run/x\ntoken_limit=7\ndisable_engine=true\non_stop=keep\n", "f", nil)
	if err != nil {
		t.Fatal(err)
	}
	c := nodeconfig.Default()
	f.apply(&c)
	if err := c.Validate(); err != nil {
		t.Fatal(err)
	}
	want := nodeconfig.Default()
	want.Name, want.Socket, want.Data = c.Name, c.Socket, c.Data
	want.UnitsOnly, want.OnStop, want.LogFormat, want.LogLevel = true, "keep", "text", "debug"
	want.EtcdEndpoints, want.KeyPrefix, want.Address = []string{"http://127.0.0.1:4001"}, "/fleet/", "127.0.0.9"
	want.MachineTTL, want.Metadata, want.UnitsDir, want.TokenLimit, want.Engine = 3, []string{"a=1", "b=2"}, "/run/x", 7, false
	if diff := cmp.Diff(want, c); diff != "" {
		t.Error(diff)
	}
	c = nodeconfig.Default()
	(&fleetConf{}).apply(&c)
	if c.KeyPrefix != nodeconfig.Default().KeyPrefix || c.MachineTTL != nodeconfig.Default().MachineTTL || !c.Engine || c.OnStop != "drain" || c.RunsStore() {
		t.Errorf("an empty configuration gives %+v", c)
	}
}

func FuzzFleetConf(f *testing.F) {
	f.Add("etcd_servers=[\"http://a\"]\nmetadata=a=b\n", "FLEET_AGENT_TTL=3s")
	f.Fuzz(func(t *testing.T, text, env string) {
		c, _, err := parseFleetConf(text, "f", []string{env})
		if err == nil {
			n := nodeconfig.Default()
			c.apply(&n)
		}
	})
}
