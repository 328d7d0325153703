// Package nodeconfig is what can be told to a node: its settings, where they are
// read from, which are wrong, and the files that make a machine a node. It must not
// know etcd nor any component: the command line uses it too, also where no node can
// run.
package nodeconfig

import (
	"errors"
	"fmt"
	"math"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// Config is everything that can be told to a node. The yaml tag of a field is
// also the name of its flag (--http-port) and, upper-cased with underscores, of
// its environment variable (FLOTILLA_HTTP_PORT); the help tag says what it means.
// Make one with Default, fill it with Load, and check it with Validate.
type Config struct {
	Name string `yaml:"name" help:"name of this node, unique in the cluster (default: the host name)"`
	// Address is the IP address that every listener binds to and that other
	// nodes, clients and DNS answers use.
	Address string   `yaml:"address" help:"IP address of this node; every listener binds to it (default: the machine's only non-loopback IPv4 address)"`
	Data    string   `yaml:"data" help:"directory for everything that survives a restart"`
	Join    []string `yaml:"join" help:"address[:port] of a member of the cluster to join (repeatable)"`

	EtcdEndpoints []string `yaml:"etcd-endpoints" help:"URL of an etcd run by somebody else; no store is started then (repeatable)"`
	EtcdCertFile  string   `yaml:"etcd-cert-file" help:"client certificate for https etcd endpoints (PEM)"`
	EtcdKeyFile   string   `yaml:"etcd-key-file" help:"key of --etcd-cert-file (PEM)"`
	EtcdCAFile    string   `yaml:"etcd-ca-file" help:"certificate authority of https etcd endpoints (PEM)"`
	Insecure      bool     `yaml:"insecure" help:"allow the store to speak plaintext on an address other machines can reach"`

	HTTPPort  int    `yaml:"http-port" help:"port of the router for http"`
	HTTPSPort int    `yaml:"https-port" help:"port of the router for https"`
	DNSPort   int    `yaml:"dns-port" help:"port of the DNS server, UDP and TCP"`
	DNSDomain string `yaml:"dns-domain" help:"domain that this node answers itself"`
	// DNSUpstream may be "none": other names are refused then.
	DNSUpstream  []string `yaml:"dns-upstream" help:"ip[:port] of a resolver for all other names, or none (repeatable; default: those in /etc/resolv.conf)"`
	DNSListen    []string `yaml:"dns-listen" help:"further ip[:port] to answer DNS on (repeatable)"`
	BalancerPort int      `yaml:"balancer-port" help:"port for a load balancer's health check and for metrics"`
	// The port after RedirectPort is the one for HTTP host ports.
	RedirectPort       int `yaml:"redirect-port" help:"port that host_ports of tcp services are redirected to; the next one is for http services"`
	TLSPassthroughPort int `yaml:"tls-passthrough-port" help:"port that routes TLS by server name without decrypting it (0: off)"`
	StoreClientPort    int `yaml:"store-client-port" help:"port of the store for clients"`
	StorePeerPort      int `yaml:"store-peer-port" help:"port of the store for its other members"`

	// Certs is looked at while the node runs: changed files are taken over.
	Certs      string `yaml:"certs" help:"directory of certificates for https services (PEM, chain and key in one file)"`
	Socket     string `yaml:"socket" help:"unix socket of the API"`
	ConfigFile string `yaml:"-" flag:"config" help:"yaml file with these settings, by the same names"`
	HAProxy    string `yaml:"haproxy" help:"HAProxy binary (default: haproxy in PATH)"`
	// Supervise is false under systemd, where store and HAProxy are units of their own.
	Supervise    bool     `yaml:"supervise" help:"start store and HAProxy as child processes; false where systemd does it"`
	TrustedProxy []string `yaml:"trusted-proxy" help:"network (CIDR) whose X-Forwarded headers are believed (repeatable)"`
	AcceptProxy  bool     `yaml:"accept-proxy" help:"every http and https connection begins with a PROXY protocol header"`
	AccessLog    string   `yaml:"access-log" help:"where HAProxy logs requests: off, stdout, a syslog socket or ip:port"`
	HostPorts    string   `yaml:"host-ports" help:"how host_ports open: auto, nftables or listeners"`
	// EndpointAllow does not allow what is always refused, such as link-local addresses.
	EndpointAllow  []string `yaml:"endpoint-allow" help:"network (CIDR) that endpoints may be in (repeatable; default: all)"`
	MaxConnections int      `yaml:"max-connections" help:"connections that HAProxy takes at once (0: from the limit of open files)"`

	Units     string   `yaml:"units" help:"whether this machine runs units: on, off, or auto (as root where systemd runs)"`
	MachineID string   `yaml:"machine-id" help:"ID of this machine for units (default: the content of /etc/machine-id)"`
	Metadata  []string `yaml:"metadata" help:"key=value that units can ask for by MachineMetadata= (repeatable)"`
	Counters  []string `yaml:"counter" help:"name=number that units can reserve from by CounterReserve= (repeatable)"`
	// UnitsDir is emptied by a reboot.
	UnitsDir      string   `yaml:"units-dir" help:"run-time directory for unit files"`
	MachineTTL    int      `yaml:"machine-ttl" help:"seconds of silence after which this machine counts as dead and its units start elsewhere"`
	SingleMachine bool     `yaml:"single-machine" help:"there is no other machine to take over: exclusive units run on while the store is away"`
	OnStop        string   `yaml:"on-stop" help:"what becomes of units when the node is stopped: keep or drain"`
	Engine        bool     `yaml:"engine" help:"whether this node may become the leader that places units"`
	KeyPrefix     string   `yaml:"key-prefix" help:"where the records of units and nodes are in the store"`
	APIListen     []string `yaml:"api-listen" help:"further ip:port or unix:PATH to serve the API on; whoever reaches it is root (repeatable)"`
	APIPort       int      `yaml:"api-port" help:"port on which other nodes read logs of units (0: off)"`
	TokenLimit    int      `yaml:"token-limit" help:"entries on one page of fleet's API"`
	UnitsOnly     bool     `yaml:"units-only" help:"run units only: no router and no DNS server"`

	LogLevel  string `yaml:"log-level" help:"debug, info, warn or error"`
	LogFormat string `yaml:"log-format" help:"text or json (default: text on a terminal, json otherwise)"`
}

// Default returns the configuration of a node that was told nothing.
func Default() Config {
	return Config{
		Name: defaultName(), Data: defaultData(), Socket: DefaultSocket(),
		HTTPPort: 80, HTTPSPort: 443, DNSPort: 53, DNSDomain: "local",
		BalancerPort: 9180, RedirectPort: 9181, StoreClientPort: 2379, StorePeerPort: 2380,
		Units: "auto", UnitsDir: "/run/flotilla/units", MachineTTL: 12, OnStop: "keep", Engine: true,
		KeyPrefix: defaultKeyPrefix, APIPort: 9183, TokenLimit: 100,
		Supervise: true, AccessLog: "off", HostPorts: "auto", LogLevel: "info",
	}
}

// defaultKeyPrefix is where the records of a cluster are.
const defaultKeyPrefix = "/flotilla/"

func defaultName() string {
	host, err := os.Hostname()
	if err != nil {
		return ""
	}
	host, _, _ = strings.Cut(host, ".")
	return host
}

func defaultData() string {
	if os.Geteuid() == 0 {
		return "/var/lib/flotilla"
	}
	if dir := os.Getenv("XDG_STATE_HOME"); dir != "" {
		return filepath.Join(dir, "flotilla")
	}
	if home, err := os.UserHomeDir(); err == nil {
		return filepath.Join(home, ".local", "state", "flotilla")
	}
	return filepath.Join(os.TempDir(), fmt.Sprintf("flotilla-%d", os.Getuid()), "data")
}

// DefaultSocket returns the path of the API socket of a node that was told
// nothing: /run/flotilla for root, the user's run-time directory otherwise.
func DefaultSocket() string {
	if os.Geteuid() == 0 {
		return "/run/flotilla/node.sock"
	}
	if dir := os.Getenv("XDG_RUNTIME_DIR"); dir != "" {
		return filepath.Join(dir, "flotilla", "node.sock")
	}
	return filepath.Join(os.TempDir(), fmt.Sprintf("flotilla-%d", os.Getuid()), "node.sock")
}

// A Mistake is one wrong setting of a Config.
type Mistake struct {
	Option string // name of the flag, without dashes
	Value  string
	Reason string
	Remedy string
}

func (m Mistake) Error() string {
	return fmt.Sprintf("--%s %q: %s; %s", m.Option, m.Value, m.Reason, m.Remedy)
}

// Validate returns every mistake at once, joined: each a Mistake, or a sentence
// that names its flags. It fills Address and makes paths absolute; it binds
// nothing and writes nothing.
func (c *Config) Validate() error {
	m := &mistakes{}
	c.checkAddress(m)
	c.checkPaths(m)
	for _, r := range c.rules() {
		o, _ := c.option(r.option) // a test sees that each is there
		for _, v := range o.Value.entries() {
			if !r.good(v) {
				m.add(r.option, v, r.reason, r.remedy)
			}
		}
	}
	c.checkPorts(m)
	c.checkTogether(m)
	return errors.Join(m.found...)
}

// mistakes collects what is wrong.
type mistakes struct{ found []error }

func (m *mistakes) add(option, value, reason, remedy string) {
	m.found = append(m.found, Mistake{option, value, reason, remedy})
}

func (c *Config) checkAddress(m *mistakes) {
	if c.Address == "" {
		only, err := onlyAddress()
		if err != nil {
			m.found = append(m.found, err)
			return
		}
		c.Address = only
	}
	addr, err := netip.ParseAddr(c.Address)
	switch {
	case err != nil:
		m.add("address", c.Address, "not an IP address", "give one such as 10.0.0.11, or 127.0.0.1 to try things out")
	case addr.IsUnspecified() || addr.IsMulticast() || addr.Zone() != "":
		m.add("address", c.Address, "not the address of one machine", "give the address that other nodes reach this one by")
	case !addr.IsLoopback() && c.RunsStore() && !c.Insecure:
		m.add("address", c.Address, "the store would speak plaintext there and everybody who reaches it could write to it", "give --insecure if only trusted machines reach this network, or --address 127.0.0.1 to try things out")
	}
}

// Unix socket paths end at 107 bytes; HAProxy adds up to 30 to the data directory.
const maxSocketPath, maxDataPath = 107, 70

func (c *Config) checkPaths(m *mistakes) {
	for _, p := range []struct {
		option string
		path   *string
	}{{"data", &c.Data}, {"socket", &c.Socket}, {"certs", &c.Certs}} {
		if *p.path == "" {
			if p.option != "certs" {
				m.add(p.option, "", "empty", "give a path")
			}
			continue
		}
		abs, err := filepath.Abs(*p.path)
		if err != nil {
			m.add(p.option, *p.path, err.Error(), "give an absolute path")
			continue
		}
		*p.path = abs
		if strings.ContainsFunc(abs, func(r rune) bool { return r <= ' ' || r == 0x7f || strings.ContainsRune(`"'\#`, r) }) {
			m.add(p.option, abs, "has a space, quote or control character, which HAProxy's configuration cannot hold", "choose another path")
		}
	}
}

// rule is what one setting has to be; of a list, each entry.
type rule struct {
	option         string
	good           func(value string) bool
	reason, remedy string
}

func (c *Config) rules() []rule {
	choice := func(option string, words ...string) rule {
		given := slices.DeleteFunc(slices.Clone(words), func(w string) bool { return w == "" })
		last := len(given) - 1
		return rule{option, func(v string) bool { return slices.Contains(words, v) }, "not one of the choices", "give " + strings.Join(given[:last], ", ") + " or " + given[last]}
	}
	number := func(least, most int) func(string) bool {
		return func(v string) bool {
			n, err := strconv.Atoi(v)
			return err == nil && n >= least && n <= most
		}
	}
	file := func(v string) bool {
		_, err := os.Stat(v)
		return v == "" || err == nil
	}
	network := func(v string) bool {
		_, err := ParsePrefix(v)
		return err == nil
	}
	return []rule{
		{"name", func(v string) bool { return len(v) <= 63 && isWord(v) && !strings.Contains("_.-", v[:1]) },
			"not a node name", "use up to 63 letters, digits, '-', '_' and '.', beginning with a letter or digit"},
		{"data", func(v string) bool { return len(v) <= maxDataPath },
			fmt.Sprintf("longer than %d bytes, so unix sockets below it would not open", maxDataPath), "choose a shorter path"},
		{"socket", func(v string) bool { return len(v) <= maxSocketPath }, "longer than the 107 bytes a unix socket may have", "choose a shorter path"},
		{"certs", func(v string) bool {
			info, err := os.Stat(v)
			return v == "" || err == nil && info.IsDir()
		}, "not a directory", "create it, or leave --certs out"},
		{"etcd-cert-file", file, "cannot be read", "give the path of a PEM file"},
		{"etcd-key-file", file, "cannot be read", "give the path of a PEM file"},
		{"etcd-ca-file", file, "cannot be read", "give the path of a PEM file"},
		{"etcd-endpoints", func(v string) bool {
			scheme, rest, _ := strings.Cut(v, "://")
			return (scheme == "http" || scheme == "https") && rest != ""
		}, "not an http or https URL", "write http://10.0.0.5:2379"},
		{"join", func(v string) bool {
			_, err := JoinEndpoint(v, c.StoreClientPort)
			return err == nil
		}, "not an address or address:port", "give the address of a node that is in the cluster, such as 10.0.0.11 or 10.0.0.11:2379"},
		{"dns-domain", isDomain, "not a domain name", "write local or cluster.example.com"},
		{"dns-upstream", func(v string) bool {
			_, err := AddrPort(v, 53)
			return err == nil || v == "none" && len(c.DNSUpstream) == 1
		}, "not an IP address or ip:port", "write 9.9.9.9 or 10.0.0.2:5353"},
		{"dns-listen", func(v string) bool {
			_, err := AddrPort(v, c.DNSPort)
			return err == nil
		}, "not an IP address or ip:port", "write 172.17.0.1 or 172.17.0.1:53"},
		{"trusted-proxy", network, "not a network", "write 10.0.0.0/8 or one address"},
		{"endpoint-allow", network, "not a network", "write 10.0.0.0/8 or one address"},
		{"access-log", func(v string) bool {
			_, err := netip.ParseAddrPort(v)
			return v == "off" || v == "stdout" || filepath.IsAbs(v) || err == nil
		}, "not a place to log to", "give off, stdout, the path of a syslog socket such as /dev/log, or ip:port"},
		{"max-connections", number(0, math.MaxInt), "negative", "give 0 or more"},
		choice("host-ports", "auto", "nftables", "listeners"),
		choice("log-level", "debug", "info", "warn", "error"),
		choice("log-format", "", "text", "json"),
		choice("units", "auto", "on", "off"),
		choice("on-stop", "keep", "drain"),
		{"machine-id", func(v string) bool { return v == "" || len(v) <= 64 && isWord(v) && v != "global" },
			"not up to 64 letters, digits, '-', '_' and '.'", "leave it out to use /etc/machine-id"},
		{"metadata", func(v string) bool {
			key, value, _ := strings.Cut(v, "=")
			return isWord(key) && value != ""
		}, "not key=value", "write disk=ssd; keys have letters, digits, '_', '.' and '-'"},
		{"counter", func(v string) bool {
			key, value, _ := strings.Cut(v, "=")
			n, err := strconv.ParseInt(value, 10, 64)
			return isWord(key) && err == nil && n >= 0
		}, "not name=number", "write gpu=2"},
		{"units-dir", func(v string) bool { return filepath.IsAbs(v) && !strings.ContainsAny(v, " \t\n%\"'\\") },
			"not an absolute path without special characters", "leave it out, or give one such as /run/flotilla/units"},
		{"machine-ttl", number(2, 3600), "not from 2 to 3600 seconds", "leave it out for 12"},
		{"key-prefix", func(v string) bool {
			return strings.HasPrefix(v, "/") && strings.HasSuffix(v, "/") && !strings.Contains(v, "//") && !strings.HasPrefix(v, "/services/")
		}, "not a place for these records", "begin and end it with a slash, as " + defaultKeyPrefix},
		{"api-port", number(0, 65535), "not a port", "give a number from 1 to 65535, or 0 for none"},
		{"token-limit", number(1, 65535), "not from 1 to 65535", "leave it out for 100"},
		{"api-listen", func(v string) bool {
			path, unix := strings.CutPrefix(v, "unix:")
			_, err := netip.ParseAddrPort(v)
			return unix && filepath.IsAbs(path) && len(path) <= maxSocketPath || err == nil
		}, "neither ip:port nor unix:/path", "write 127.0.0.1:49153 or unix:/run/fleet.sock"},
	}
}

// isWord reports whether s is made of letters, digits, '_', '.' and '-'.
func isWord(s string) bool {
	return s != "" && strings.Trim(s, "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ_.-") == ""
}

// isDomain reports whether s is one label or more, such as "cluster.example.com".
func isDomain(s string) bool {
	for label := range strings.SplitSeq(strings.TrimSuffix(s, "."), ".") {
		if len(label) > 63 || !isWord(label) || strings.Contains(label, "_") || strings.HasPrefix(label, "-") || strings.HasSuffix(label, "-") {
			return false
		}
	}
	return len(s) <= 200
}

// checkTogether finds settings that are good alone and wrong beside others.
func (c *Config) checkTogether(m *mistakes) {
	if len(c.Join) > 0 && len(c.EtcdEndpoints) > 0 {
		m.add("join", c.Join[0], "cannot be combined with --etcd-endpoints", "an external etcd needs no --join: leave it out")
	}
	if (c.EtcdCertFile == "") != (c.EtcdKeyFile == "") {
		m.add("etcd-cert-file", c.EtcdCertFile, "certificate and key belong together", "give --etcd-cert-file and --etcd-key-file, or neither")
	}
	for _, v := range c.APIListen {
		if addr, err := netip.ParseAddrPort(v); err == nil && !addr.Addr().IsLoopback() && !c.Insecure {
			m.add("api-listen", v, "whoever reaches it could run anything as root on every machine", "give --insecure if only trusted machines reach this network, or listen on 127.0.0.1")
		}
	}
}

// Port is one port of a node and the flag that sets it.
type Port struct {
	Option string
	Number int
	What   string // what listens there
}

// Networks are those that the port is opened on.
func (p Port) Networks() []string {
	if p.Option == "dns-port" {
		return []string{"udp", "tcp"}
	}
	return []string{"tcp"}
}

// Ports lists the ports that the node's own processes will listen on.
func (c *Config) Ports() []Port {
	var list []Port
	if !c.UnitsOnly {
		list = []Port{
			{"http-port", c.HTTPPort, "http"}, {"https-port", c.HTTPSPort, "https"}, {"dns-port", c.DNSPort, "DNS"},
			{"balancer-port", c.BalancerPort, "the balancer's check"}, {"redirect-port", c.RedirectPort, "host_ports of tcp services"},
			{"redirect-port", c.RedirectPort + 1, "host_ports of http services"},
		}
	}
	if c.APIPort != 0 && c.RunsUnits() {
		list = append(list, Port{"api-port", c.APIPort, "questions of other nodes"})
	}
	if c.TLSPassthroughPort != 0 {
		list = append(list, Port{"tls-passthrough-port", c.TLSPassthroughPort, "TLS passthrough"})
	}
	if c.RunsStore() {
		list = append(list, Port{"store-client-port", c.StoreClientPort, "the store"}, Port{"store-peer-port", c.StorePeerPort, "the store's members"})
	}
	return list
}

func (c *Config) checkPorts(m *mistakes) {
	seen := map[int]Port{}
	for _, p := range c.Ports() {
		number := strconv.Itoa(p.Number)
		if p.Number < 1 || p.Number > 65535 {
			m.add(p.Option, number, "not a port", "give a number from 1 to 65535")
		} else if other, taken := seen[p.Number]; taken {
			m.add(p.Option, number, fmt.Sprintf("port %d is used twice: for %s (--%s) and for %s", p.Number, other.What, other.Option, p.What), "give one of them another port")
		} else {
			seen[p.Number] = p
		}
	}
}

// RunsStore reports whether this node has a store of its own.
func (c *Config) RunsStore() bool { return len(c.EtcdEndpoints) == 0 }

// ParsePrefix reads a network, or one address as the network of itself.
func ParsePrefix(s string) (netip.Prefix, error) {
	if addr, err := netip.ParseAddr(s); err == nil && addr.Zone() == "" {
		return netip.PrefixFrom(addr, addr.BitLen()), nil
	}
	return netip.ParsePrefix(s)
}

// AddrPort reads ip or ip:port.
func AddrPort(s string, port int) (netip.AddrPort, error) {
	if addr, err := netip.ParseAddr(strings.Trim(s, "[]")); err == nil {
		return netip.AddrPortFrom(addr, uint16(port)), nil
	}
	return netip.ParseAddrPort(s)
}

// JoinEndpoint turns address or address:port into the URL of a member's store.
func JoinEndpoint(s string, port int) (string, error) {
	host, given, err := net.SplitHostPort(s)
	if err != nil {
		host, given = strings.Trim(s, "[]"), strconv.Itoa(port)
	}
	n, err := strconv.Atoi(given)
	if host == "" || strings.ContainsAny(host, "/ ") || err != nil || n < 1 || n > 65535 {
		return "", errors.New("not an address or address:port")
	}
	return "http://" + net.JoinHostPort(host, given), nil
}

// onlyAddress returns the machine's only IPv4 address that other machines could
// reach; with none or several the operator has to choose.
func onlyAddress() (string, error) {
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		return "", fmt.Errorf("--address is not given and the machine's addresses cannot be read: %w", err)
	}
	var found []string
	for _, a := range addrs {
		if n, ok := a.(*net.IPNet); ok && n.IP.To4() != nil && n.IP.IsGlobalUnicast() {
			found = append(found, n.IP.String())
		}
	}
	switch len(found) {
	case 1:
		return found[0], nil
	case 0:
		return "", errors.New("--address is not given and this machine has no address but loopback; give --address 127.0.0.1 to try things out")
	}
	return "", fmt.Errorf("--address is not given and this machine has several addresses (%s); give the one that other nodes reach it by", strings.Join(found, ", "))
}

// RunsUnits reports whether this node runs units.
func (c *Config) RunsUnits() bool {
	if c.Units != "auto" {
		return c.Units == "on"
	}
	_, err := os.Stat("/run/systemd/system") // as sd_booted does
	return err == nil && os.Geteuid() == 0
}
