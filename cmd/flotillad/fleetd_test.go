package main

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"flotilla/internal/nodeconfig"
)

func TestFleetConf(t *testing.T) {
	for name, tc := range map[string]struct {
		text, env string
		want      func(c *nodeconfig.Config)
		warnings  string
		err       string
	}{
		"nothing": {},
		"what the functional suite writes": {
			text: "verbosity=2\netcd_servers=[\"http://172.18.0.1:4001\"]\netcd_key_prefix=/fleet_functional/smoke\npublic_ip=172.18.1.1\nagent_ttl=3s\nenable_grpc=true\n",
			env:  "FLEET_METADATA=hostname=smoke1",
			want: func(c *nodeconfig.Config) {
				c.LogLevel, c.EtcdEndpoints, c.KeyPrefix, c.Address = "debug", []string{"http://172.18.0.1:4001"}, "/fleet_functional/smoke/", "172.18.1.1"
				c.MachineTTL, c.Metadata = 3, []string{"hostname=smoke1"}
			},
		},
		"everything": {
			text: "# comment\n; comment\n\n etcd_servers = http://a:1/, \"https://b:2\",c:3 \nmetadata=\"disk=ssd, zone = a,disk=hdd\"\r\nunits_directory='/run/x/'\ntoken_limit=7\ndisable_engine=true\netcd_cafile=ca\netcd_certfile=c\netcd_keyfile=k\n",
			want: func(c *nodeconfig.Config) {
				c.EtcdEndpoints, c.Metadata = []string{"http://a:1", "https://b:2", "http://c:3"}, []string{"disk=hdd", "zone=a"}
				c.UnitsDir, c.TokenLimit, c.Engine = "/run/x/", 7, false
				c.EtcdCAFile, c.EtcdCertFile, c.EtcdKeyFile = "ca", "c", "k"
			},
		},
		"the environment counts more": {text: "public_ip=10.0.0.1\n", env: "FLEET_PUBLIC_IP=10.0.0.2", want: func(c *nodeconfig.Config) { c.Address = "10.0.0.2" }},
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
			want := nodeconfig.Default()
			want.UnitsOnly, want.OnStop, want.LogFormat, want.EtcdEndpoints = true, "drain", "text", []string{"http://127.0.0.1:2379"}
			if tc.want != nil {
				tc.want(&want)
			}
			if diff := cmp.Diff(want, got); diff != "" {
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
	c, _, err := parseFleetConf("verbosity=1\netcd_servers=http://127.0.0.1:4001\netcd_key_prefix=fleet\npublic_ip=127.0.0.9\nagent_ttl=2500ms\nmetadata=b=2,a=1\nunits_directory=/run/x\ntoken_limit=7\ndisable_engine=true\non_stop=keep\n", "f", nil)
	if err != nil {
		t.Fatal(err)
	}
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
}

func FuzzFleetConf(f *testing.F) {
	f.Add("etcd_servers=[\"http://a\"]\nmetadata=a=b\n", "FLEET_AGENT_TTL=3s")
	f.Fuzz(func(t *testing.T, text, env string) {
		c, _, err := parseFleetConf(text, "f", []string{env})
		if err == nil && (!c.UnitsOnly || c.RunsStore()) {
			t.Errorf("%q and %q give %+v", text, env, c)
		}
	})
}
