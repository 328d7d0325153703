package nodeconfig

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// given returns a Config with the flags set, and what Load wants to know of them.
func given(t *testing.T, flags ...string) (*Config, func(string) bool) {
	t.Helper()
	c := Default()
	changed := map[string]bool{}
	for _, f := range flags {
		name, value, _ := strings.Cut(f, "=")
		for _, o := range c.Options() {
			if o.Name == name {
				changed[name] = true
				if err := o.Value.Set(value); err != nil {
					t.Fatal(err)
				}
			}
		}
		if !changed[name] {
			t.Fatalf("no option %s", name)
		}
	}
	return &c, func(option string) bool { return changed[option] }
}

func writeFile(t *testing.T, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "node.yaml")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestLoadPrecedence(t *testing.T) {
	file := writeFile(t, "name: file\nhttp-port: 1001\nhttps-port: 1002\ndns-port: 1003\njoin: [10.0.0.1, 10.0.0.2]\ninsecure: true\n")
	flags, changed := given(t, "config="+file, "http-port=3001", "join=10.9.9.9")
	got, err := Load(flags, changed, []string{"FLOTILLA_HTTP_PORT=2001", "FLOTILLA_HTTPS_PORT=2002", "FLOTILLA_TRUSTED_PROXY=10.0.0.0/8, 10.1.1.1", "HOME=/x"})
	if err != nil {
		t.Fatal(err)
	}
	want := Default()
	want.ConfigFile, want.Name, want.HTTPPort, want.HTTPSPort, want.DNSPort = file, "file", 3001, 2002, 1003
	want.Join, want.TrustedProxy, want.Insecure = []string{"10.9.9.9"}, []string{"10.0.0.0/8", "10.1.1.1"}, true
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

func TestLoadFileFromEnvironment(t *testing.T) {
	file := writeFile(t, "name: file\n")
	flags, changed := given(t)
	got, err := Load(flags, changed, []string{"FLOTILLA_CONFIG=" + file})
	if err != nil || got.Name != "file" {
		t.Errorf("name %q, error %v", got.Name, err)
	}
}

func TestLoadRefuses(t *testing.T) {
	for _, test := range []struct{ name, file, environ, want string }{
		{"unknown key", "name: x\nhttp-prot: 80\n", "", `node.yaml:2: unknown setting "http-prot"; did you mean http-port?`},
		{"unknown key, nothing near", "zzz: 80\n", "", `node.yaml:1: unknown setting "zzz"`},
		{"twice", "name: x\nname: y\n", "", "node.yaml:2: name is already set in line 1"},
		{"wrong type", "name: x\n\nhttp-port: eighty\n", "", `node.yaml:3: http-port: "eighty" is not a number`},
		{"no mapping", "- name\n", "", "node.yaml:1: not a list of settings"},
		{"no yaml", "name: [\n", "", "node.yaml: line 1"},
		{"two documents", "name: x\n---\nname: y\n", "", "more than one document"},
		{"unknown variable", "", "FLOTILLA_HTTP_PROT=80", "FLOTILLA_HTTP_PROT is not a setting of this program; did you mean FLOTILLA_HTTP_PORT?"},
		{"wrong variable", "", "FLOTILLA_HTTP_PORT=x", `FLOTILLA_HTTP_PORT="x": not a number`},
	} {
		t.Run(test.name, func(t *testing.T) {
			flags, changed := given(t, "config="+writeFile(t, test.file))
			_, err := Load(flags, changed, []string{test.environ})
			if err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("error %v, want one with %q", err, test.want)
			}
		})
	}
	flags, changed := given(t, "config=/nowhere/node.yaml")
	if _, err := Load(flags, changed, nil); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a missing file: error %v", err)
	}
}

func valid() Config {
	c := Default()
	c.Name, c.Address, c.Data, c.Socket = "n1", "127.0.0.1", "/tmp/flotilla-test", "/tmp/flotilla-test/node.sock"
	c.HTTPPort, c.HTTPSPort, c.DNSPort = 8080, 8443, 8053
	return c
}

func TestValidate(t *testing.T) {
	c := valid()
	if err := c.Validate(); err != nil {
		t.Fatalf("a valid configuration: %v", err)
	}
	for _, test := range []struct {
		name   string
		change func(*Config)
		want   string
	}{
		{"name", func(c *Config) { c.Name = "n 1" }, `--name "n 1": not a node name`},
		{"address", func(c *Config) { c.Address = "host" }, `--address "host": not an IP address`},
		{"wildcard", func(c *Config) { c.Address = "0.0.0.0" }, "not the address of one machine"},
		{"port range", func(c *Config) { c.HTTPPort = 70000 }, `--http-port "70000": not a port`},
		{"port clash", func(c *Config) { c.HTTPSPort = 8080 }, "port 8080 is used twice: for http (--http-port) and for https"},
		{"clash with the port after redirect", func(c *Config) { c.HTTPPort = c.RedirectPort + 1 }, "port 9182 is used twice"},
		{"plaintext", func(c *Config) { c.Address = "192.0.2.1" }, "--insecure"},
		{"join with etcd", func(c *Config) { c.Join, c.EtcdEndpoints = []string{"10.0.0.1"}, []string{"http://10.0.0.1:2379"} }, "cannot be combined"},
		{"join", func(c *Config) { c.Join = []string{"http://x"} }, "not an address or address:port"},
		{"etcd url", func(c *Config) { c.EtcdEndpoints = []string{"10.0.0.1:2379"} }, "not an http or https URL"},
		{"upstream", func(c *Config) { c.DNSUpstream = []string{"dns.example.com"} }, "not an IP address or ip:port"},
		{"network", func(c *Config) { c.TrustedProxy = []string{"10/8"} }, "not a network"},
		{"host-ports", func(c *Config) { c.HostPorts = "magic" }, "give auto, nftables or listeners"},
		{"access-log", func(c *Config) { c.AccessLog = "file.log" }, "not a place to log to"},
		{"certs", func(c *Config) { c.Certs = "/nowhere" }, "not a directory"},
		{"long data", func(c *Config) { c.Data = "/" + strings.Repeat("d", 80) }, "longer than 70 bytes"},
		{"path with a space", func(c *Config) { c.Data = "/tmp/a b" }, "choose another path"},
		{"domain", func(c *Config) { c.DNSDomain = "-x" }, "not a domain name"},
		{"units", func(c *Config) { c.Units = "yes" }, `--units "yes": not one of the choices; give auto, on or off`},
		{"on-stop", func(c *Config) { c.OnStop = "" }, "give keep or drain"},
		{"log-format", func(c *Config) { c.LogFormat = "xml" }, "give text or json"},
		{"machine-id", func(c *Config) { c.MachineID = "a/b" }, `--machine-id "a/b": not up to 64 letters`},
		{"metadata", func(c *Config) { c.Metadata = []string{"disk=ssd", "zone"} }, `--metadata "zone": not key=value`},
		{"counter", func(c *Config) { c.Counters = []string{"gpu=-1"} }, `--counter "gpu=-1": not name=number`},
		{"units-dir", func(c *Config) { c.UnitsDir = "units" }, "not an absolute path without special characters"},
		{"machine-ttl", func(c *Config) { c.MachineTTL = 1 }, "not from 2 to 3600 seconds"},
		{"key-prefix", func(c *Config) { c.KeyPrefix = "/services/x/" }, "not a place for these records"},
		{"api-port", func(c *Config) { c.APIPort = -1 }, `--api-port "-1": not a port`},
		{"token-limit", func(c *Config) { c.TokenLimit = 0 }, "leave it out for 100"},
		{"max-connections", func(c *Config) { c.MaxConnections = -1 }, "give 0 or more"},
		{"api-listen", func(c *Config) { c.APIListen = []string{"unix:x"} }, "neither ip:port nor unix:/path"},
		{"api-listen for all", func(c *Config) { c.APIListen = []string{"10.0.0.1:1"} }, "anything as root on every machine"},
		{"key without certificate", func(c *Config) { c.EtcdKeyFile = "/dev/null" }, "belong together"},
	} {
		t.Run(test.name, func(t *testing.T) {
			c := valid()
			test.change(&c)
			if err := c.Validate(); err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("error %v, want one with %q", err, test.want)
			}
		})
	}
	c = valid()
	c.Name, c.HTTPPort, c.DNSDomain = "", 0, "?"
	if err := c.Validate(); err == nil || strings.Count(err.Error(), "\n") != 2 {
		t.Errorf("three mistakes are not told at once: %v", err)
	}
}

// Each rule is about a setting that there is.
func TestRules(t *testing.T) {
	c := valid()
	for _, r := range c.rules() {
		if _, ok := c.option(r.option); !ok {
			t.Errorf("there is no --%s", r.option)
		}
	}
}

func TestArgumentsLoadAgain(t *testing.T) {
	c := valid()
	c.Join, c.Insecure, c.AccessLog = []string{"127.0.0.2", "127.0.0.3:1"}, true, "stdout"
	var flags []string
	fields := strings.Fields(c.arguments())
	for i := 0; i < len(fields); i++ {
		name := strings.TrimPrefix(fields[i], "--")
		if !strings.Contains(name, "=") {
			i++
			name += "=" + fields[i]
		}
		flags = append(flags, name)
	}
	from, changed := given(t, flags...)
	got, err := Load(from, changed, nil)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(c, got); diff != "" {
		t.Error(diff)
	}
}
