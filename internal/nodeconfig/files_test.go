package nodeconfig

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// What is written to a node is a configuration that the node takes.
func TestNodeFiles(t *testing.T) {
	metadata := []string{"disk=ssd", "zone=a"}
	files, err := Files(Programs{"/bin/flotilla", "/bin/flotillad"}, []Setting{{"name", "n1"}, {"insecure", "true"}, {"join", "n1,n3"}, {"metadata", strings.Join(metadata, ",")}, {"name", "n2"}})
	if err != nil {
		t.Fatal(err)
	}
	at := slices.IndexFunc(files, func(f File) bool { return f.Path == configFile })
	path := filepath.Join(t.TempDir(), "node.yaml")
	if err := os.WriteFile(path, []byte(files[at].Text), 0o600); err != nil {
		t.Fatal(err)
	}
	cfg, err := Load(&Config{ConfigFile: path}, func(option string) bool { return option == "config" }, nil)
	if err != nil {
		t.Fatalf("%v:\n%s", err, files[at].Text)
	}
	cfg.Address = "10.77.0.12" // the machine's only one
	if err := cfg.Validate(); err != nil {
		t.Error(err)
	}
	if cfg.Name != "n2" || !cfg.Insecure || !slices.Equal(cfg.Join, []string{"n1", "n3"}) || !slices.Equal(cfg.Metadata, metadata) {
		t.Errorf("%s is read as %+v", files[at].Text, cfg)
	}
	for _, unit := range []string{"flotilla-store.service", "flotilla-node.service", "flotilla-haproxy.service"} {
		at := slices.IndexFunc(files, func(f File) bool { return f.Path == "/etc/systemd/system/multi-user.target.wants/"+unit })
		if at < 0 {
			t.Errorf("%s is not enabled", unit)
		}
	}
}

// The units are made for the settings, not for those of a node that was told nothing.
func TestUnitsOfFiles(t *testing.T) {
	for _, tc := range []struct {
		setting Setting
		unit    string
		want    string // "": there is no such unit
	}{
		{Setting{"on-stop", "keep"}, "flotilla-node.service", "TimeoutStopSec=20\n"},
		{Setting{"on-stop", "drain"}, "flotilla-node.service", "TimeoutStopSec=100\n"},
		{Setting{"on-stop", "keep"}, "flotilla-store.service", "ExecStart=/usr/local/bin/flotillad store --config /etc/flotilla/node.yaml\n"},
		{Setting{"etcd-endpoints", "http://10.0.0.9:2379"}, "flotilla-store.service", ""},
		{Setting{"haproxy", "/opt/haproxy"}, "flotilla-haproxy.service", "ExecStart=/opt/haproxy -Ws"},
		{Setting{"data", "/data"}, "flotilla-haproxy.service", "-f /data/router/haproxy.cfg\n"},
	} {
		files, err := Files(Programs{"/bin/flotilla", "/bin/flotillad"}, []Setting{tc.setting})
		if err != nil {
			t.Fatal(err)
		}
		text := ""
		for _, f := range files {
			if f.Path == unitDir+tc.unit {
				text = f.Text
			}
		}
		if tc.want == "" && text != "" || !strings.Contains(text, tc.want) {
			t.Errorf("%v: %q is not in %s:\n%s", tc.setting, tc.want, tc.unit, text)
		}
	}
}

func TestFilesRefuse(t *testing.T) {
	for _, tc := range []struct {
		setting Setting
		want    string
	}{
		{Setting{"colour", "red"}, "nodes of this version have no setting colour"},
		{Setting{"config", "/x"}, "nodes of this version have no setting config"},
		{Setting{"http-port", "eighty"}, `http-port: "eighty" is not a number`},
		{Setting{"data", "/a b"}, `path "/a b" has a character that systemd gives a meaning to`},
	} {
		if _, err := Files(Programs{}, []Setting{tc.setting}); err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%v: error %v, want one with %q", tc.setting, err, tc.want)
		}
	}
}
