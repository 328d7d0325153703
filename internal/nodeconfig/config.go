// Package nodeconfig is what can be told to a node: its settings, where they are
// read from, which are wrong, and the files that make a machine a node. It must not
// know etcd nor any component: the command line uses it too, also where no node can
// run.
package nodeconfig

import (
	"errors"
	"fmt"
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
// its environment variable (FLOTILLA_HTTP_PORT); the help tag is the flag's help
// text. Make one with Default, fill it with Load, and check it with Validate.
type Config struct {
	// Name is the node's name in the cluster, unique in it.
	Name string `yaml:"name" help:"name of this node, unique in the cluster (default: the host name)"`
	// Address is the IP address that every listener binds to and that other
	// nodes, clients and DNS answers use.
	Address string `yaml:"address" help:"IP address of this node; every listener binds to it (default: the machine's only non-loopback IPv4 address)"`
	// Data is the directory of everything that has to survive a restart.
	Data string `yaml:"data" help:"directory for everything that survives a restart"`
	// Join lists members that are already in the cluster: address or address:port
	// of their store. Empty for the first node.
	Join []string `yaml:"join" help:"address[:port] of a member of the cluster to join (repeatable)"`

	// EtcdEndpoints lists the URLs of an etcd cluster that somebody else runs.
	// The node then starts no store.
	EtcdEndpoints []string `yaml:"etcd-endpoints" help:"URL of an etcd run by somebody else; no store is started then (repeatable)"`
	// EtcdCertFile, EtcdKeyFile and EtcdCAFile are PEM files for https endpoints.
	EtcdCertFile string `yaml:"etcd-cert-file" help:"client certificate for https etcd endpoints (PEM)"`
	EtcdKeyFile  string `yaml:"etcd-key-file" help:"key of --etcd-cert-file (PEM)"`
	EtcdCAFile   string `yaml:"etcd-ca-file" help:"certificate authority of https etcd endpoints (PEM)"`
	// Insecure allows the store to speak plaintext on an address that is not
	// loopback.
	Insecure bool `yaml:"insecure" help:"allow the store to speak plaintext on an address other machines can reach"`

	// HTTPPort and HTTPSPort are where the router takes requests.
	HTTPPort  int `yaml:"http-port" help:"port of the router for http"`
	HTTPSPort int `yaml:"https-port" help:"port of the router for https"`
	// DNSPort is where the DNS server answers, UDP and TCP.
	DNSPort int `yaml:"dns-port" help:"port of the DNS server, UDP and TCP"`
	// DNSDomain is the domain answered from the catalog; one label or more.
	DNSDomain string `yaml:"dns-domain" help:"domain that this node answers itself"`
	// DNSUpstream lists the resolvers for all other names, ip or ip:port. Empty:
	// those of /etc/resolv.conf; "none": other names are refused.
	DNSUpstream []string `yaml:"dns-upstream" help:"ip[:port] of a resolver for all other names, or none (repeatable; default: those in /etc/resolv.conf)"`
	// DNSListen lists further ip or ip:port to answer DNS on.
	DNSListen []string `yaml:"dns-listen" help:"further ip[:port] to answer DNS on (repeatable)"`
	// BalancerPort answers the check of a balancer in front of the nodes.
	BalancerPort int `yaml:"balancer-port" help:"port for a load balancer's health check and for metrics"`
	// RedirectPort is where nftables sends connections to TCP host ports; the
	// port after it takes those to HTTP host ports.
	RedirectPort int `yaml:"redirect-port" help:"port that host_ports of tcp services are redirected to; the next one is for http services"`
	// TLSPassthroughPort routes TLS by server name without ending it; 0: off.
	TLSPassthroughPort int `yaml:"tls-passthrough-port" help:"port that routes TLS by server name without decrypting it (0: off)"`
	// StoreClientPort and StorePeerPort belong to the embedded etcd.
	StoreClientPort int `yaml:"store-client-port" help:"port of the store for clients"`
	StorePeerPort   int `yaml:"store-peer-port" help:"port of the store for its other members"`

	// Certs is a directory of PEM files (certificate chain and key) for https
	// services; changed files are taken over while running.
	Certs string `yaml:"certs" help:"directory of certificates for https services (PEM, chain and key in one file)"`
	// Socket is the unix socket of the API.
	Socket string `yaml:"socket" help:"unix socket of the API"`
	// ConfigFile is the yaml file that holds these same settings.
	ConfigFile string `yaml:"-" flag:"config" help:"yaml file with these settings, by the same names"`
	// HAProxy is the binary to run; empty: haproxy in PATH.
	HAProxy string `yaml:"haproxy" help:"HAProxy binary (default: haproxy in PATH)"`
	// Supervise says whether the node starts store and HAProxy itself. False
	// under systemd, where each is a unit of its own.
	Supervise bool `yaml:"supervise" help:"start store and HAProxy as child processes; false where systemd does it"`
	// TrustedProxy lists the networks whose X-Forwarded headers are believed.
	TrustedProxy []string `yaml:"trusted-proxy" help:"network (CIDR) whose X-Forwarded headers are believed (repeatable)"`
	// AcceptProxy says that every connection begins with a PROXY header.
	AcceptProxy bool `yaml:"accept-proxy" help:"every http and https connection begins with a PROXY protocol header"`
	// AccessLog is "off", "stdout", the path of a syslog socket or ip:port.
	AccessLog string `yaml:"access-log" help:"where HAProxy logs requests: off, stdout, a syslog socket or ip:port"`
	// HostPorts is "auto", "nftables" or "listeners".
	HostPorts string `yaml:"host-ports" help:"how host_ports open: auto, nftables or listeners"`
	// EndpointAllow lists the networks that endpoints may be in; empty: any that
	// is not always refused (link-local and the like).
	EndpointAllow []string `yaml:"endpoint-allow" help:"network (CIDR) that endpoints may be in (repeatable; default: all)"`
	// MaxConnections limits HAProxy; 0: as many as the limit of open files gives.
	MaxConnections int `yaml:"max-connections" help:"connections that HAProxy takes at once (0: from the limit of open files)"`

	// Units says whether this machine runs units: "on", "off", or "auto" for
	// wherever the node is root under systemd.
	Units string `yaml:"units" help:"whether this machine runs units: on, off, or auto (as root where systemd runs)"`
	// MachineID is the machine's ID in the registry of units.
	MachineID string `yaml:"machine-id" help:"ID of this machine for units (default: the content of /etc/machine-id)"`
	// Metadata lists key=value pairs that units can ask for.
	Metadata []string `yaml:"metadata" help:"key=value that units can ask for by MachineMetadata= (repeatable)"`
	// Counters lists name=number pairs: what units can reserve by CounterReserve=.
	Counters []string `yaml:"counter" help:"name=number that units can reserve from by CounterReserve= (repeatable)"`
	// UnitsDir holds the unit files; it is emptied by a reboot.
	UnitsDir string `yaml:"units-dir" help:"run-time directory for unit files"`
	// MachineTTL is how many seconds a machine that is silent counts as there.
	MachineTTL int `yaml:"machine-ttl" help:"seconds of silence after which this machine counts as dead and its units start elsewhere"`
	// SingleMachine exempts exclusive units from the fence on a cluster of one machine.
	SingleMachine bool `yaml:"single-machine" help:"there is no other machine to take over: exclusive units run on while the store is away"`
	// OnStop is "keep" or "drain": what happens to units when the node is stopped.
	OnStop string `yaml:"on-stop" help:"what becomes of units when the node is stopped: keep or drain"`
	// Engine says whether this node may become the leader that places units.
	Engine bool `yaml:"engine" help:"whether this node may become the leader that places units"`
	// KeyPrefix is where the records of units are in the store.
	KeyPrefix string `yaml:"key-prefix" help:"where the records of units and machines are in the store"`
	// APIListen lists further ip:port or unix sockets that serve the whole API.
	APIListen []string `yaml:"api-listen" help:"further ip:port or unix:PATH to serve the API on; whoever reaches it is root (repeatable)"`
	// APIPort is where other nodes read the logs of this one; 0: nowhere.
	APIPort int `yaml:"api-port" help:"port on which other nodes read logs of units, and ask whether the store has a leader (0: off)"`
	// TokenLimit is the length of a page of fleet's API.
	TokenLimit int `yaml:"token-limit" help:"entries on one page of fleet's API"`
	// UnitsOnly leaves out routing and DNS.
	UnitsOnly bool `yaml:"units-only" help:"run units only: no router and no DNS server"`

	// LogLevel is "debug", "info", "warn" or "error".
	LogLevel string `yaml:"log-level" help:"debug, info, warn or error"`
	// LogFormat is "text" or "json".
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

// isWord reports whether s is made of letters, digits, '_', '.' and '-'.
func isWord(s string) bool {
	return s != "" && strings.Trim(s, "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ_.-") == ""
}

// Unix socket paths end at 107 bytes; HAProxy adds up to 30 to the data directory.
const maxSocketPath, maxDataPath = 107, 70

// Validate returns every mistake at once, joined: each a Mistake, or a sentence
// that names its flags. It fills Address and makes paths absolute; it binds
// nothing and writes nothing.
func (c *Config) Validate() error {
	var found []error
	wrong := func(option, value, reason, remedy string) {
		found = append(found, Mistake{option, value, reason, remedy})
	}
	if len(c.Name) > 63 || !isWord(c.Name) || strings.Contains("_.-", c.Name[:1]) {
		wrong("name", c.Name, "not a node name", "use up to 63 letters, digits, '-', '_' and '.', beginning with a letter or digit")
	}
	if c.Address == "" {
		only, err := onlyAddress()
		if err != nil {
			found = append(found, err)
		}
		c.Address = only
	}
	if c.Address != "" {
		addr, err := netip.ParseAddr(c.Address)
		switch {
		case err != nil:
			wrong("address", c.Address, "not an IP address", "give one such as 10.0.0.11, or 127.0.0.1 to try things out")
		case addr.IsUnspecified() || addr.IsMulticast() || addr.Zone() != "":
			wrong("address", c.Address, "not the address of one machine", "give the address that other nodes reach this one by")
		}
	}
	if addr, err := netip.ParseAddr(c.Address); err == nil && !addr.IsLoopback() && c.RunsStore() && !c.Insecure {
		wrong("address", c.Address, "the store would speak plaintext there and everybody who reaches it could write to it", "give --insecure if only trusted machines reach this network, or --address 127.0.0.1 to try things out")
	}
	c.checkPaths(wrong)
	c.checkUnits(wrong)
	c.checkPorts(wrong)
	c.checkLists(wrong)
	c.checkWords(wrong)
	return errors.Join(found...)
}

func (c *Config) checkPaths(wrong func(option, value, reason, remedy string)) {
	for option, path := range map[string]*string{"data": &c.Data, "socket": &c.Socket, "certs": &c.Certs} {
		if *path == "" {
			if option != "certs" {
				wrong(option, "", "empty", "give a path")
			}
			continue
		}
		abs, err := filepath.Abs(*path)
		if err != nil {
			wrong(option, *path, err.Error(), "give an absolute path")
			continue
		}
		*path = abs
		if strings.ContainsFunc(abs, func(r rune) bool { return r <= ' ' || r == 0x7f || strings.ContainsRune(`"'\#`, r) }) {
			wrong(option, abs, "has a space, quote or control character, which HAProxy's configuration cannot hold", "choose another path")
		}
	}
	if len(c.Socket) > maxSocketPath {
		wrong("socket", c.Socket, "longer than the 107 bytes a unix socket may have", "choose a shorter path")
	}
	if len(c.Data) > maxDataPath {
		wrong("data", c.Data, fmt.Sprintf("longer than %d bytes, so unix sockets below it would not open", maxDataPath), "choose a shorter path")
	}
	if c.Certs != "" {
		if info, err := os.Stat(c.Certs); err != nil || !info.IsDir() {
			wrong("certs", c.Certs, "not a directory", "create it, or leave --certs out")
		}
	}
	for option, path := range map[string]string{"etcd-cert-file": c.EtcdCertFile, "etcd-key-file": c.EtcdKeyFile, "etcd-ca-file": c.EtcdCAFile} {
		if path == "" {
			continue
		}
		if _, err := os.Stat(path); err != nil {
			wrong(option, path, "cannot be read", "give the path of a PEM file")
		}
	}
	if (c.EtcdCertFile == "") != (c.EtcdKeyFile == "") {
		wrong("etcd-cert-file", c.EtcdCertFile, "certificate and key belong together", "give --etcd-cert-file and --etcd-key-file, or neither")
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

func (c *Config) checkPorts(wrong func(option, value, reason, remedy string)) {
	seen := map[int]Port{}
	for _, p := range c.Ports() {
		if p.Number < 1 || p.Number > 65535 {
			wrong(p.Option, strconv.Itoa(p.Number), "not a port", "give a number from 1 to 65535")
			continue
		}
		if other, taken := seen[p.Number]; taken {
			wrong(p.Option, strconv.Itoa(p.Number), fmt.Sprintf("port %d is used twice: for %s (--%s) and for %s", p.Number, other.What, other.Option, p.What), "give one of them another port")
			continue
		}
		seen[p.Number] = p
	}
	if c.MaxConnections < 0 {
		wrong("max-connections", strconv.Itoa(c.MaxConnections), "negative", "give 0 or more")
	}
}

func (c *Config) checkLists(wrong func(option, value, reason, remedy string)) {
	for _, v := range c.Join {
		if len(c.EtcdEndpoints) > 0 {
			wrong("join", v, "cannot be combined with --etcd-endpoints", "an external etcd needs no --join: leave it out")
			break
		}
		if _, err := JoinEndpoint(v, c.StoreClientPort); err != nil {
			wrong("join", v, err.Error(), "give the address of a node that is in the cluster, such as 10.0.0.11 or 10.0.0.11:2379")
		}
	}
	for _, v := range c.EtcdEndpoints {
		scheme, rest, ok := strings.Cut(v, "://")
		if !ok || scheme != "http" && scheme != "https" || rest == "" {
			wrong("etcd-endpoints", v, "not an http or https URL", "write http://10.0.0.5:2379")
		}
	}
	for _, v := range c.DNSUpstream {
		if v == "none" && len(c.DNSUpstream) == 1 {
			continue
		}
		if _, err := AddrPort(v, 53); err != nil {
			wrong("dns-upstream", v, "not an IP address or ip:port", "write 9.9.9.9 or 10.0.0.2:5353")
		}
	}
	for _, v := range c.DNSListen {
		if _, err := AddrPort(v, c.DNSPort); err != nil {
			wrong("dns-listen", v, "not an IP address or ip:port", "write 172.17.0.1 or 172.17.0.1:53")
		}
	}
	for option, list := range map[string][]string{"trusted-proxy": c.TrustedProxy, "endpoint-allow": c.EndpointAllow} {
		for _, v := range list {
			if _, err := ParsePrefix(v); err != nil {
				wrong(option, v, "not a network", "write 10.0.0.0/8 or one address")
			}
		}
	}
}

// isDomain reports whether s is one label or more, such as "cluster.example.com".
func isDomain(s string) bool {
	for label := range strings.SplitSeq(s, ".") {
		if len(label) > 63 || !isWord(label) || strings.Contains(label, "_") || strings.HasPrefix(label, "-") || strings.HasSuffix(label, "-") {
			return false
		}
	}
	return len(s) <= 200
}

func (c *Config) checkWords(wrong func(option, value, reason, remedy string)) {
	oneOf := func(option, value string, words ...string) {
		if !slices.Contains(words, value) {
			wrong(option, value, "not one of the choices", "give "+strings.Join(words[:len(words)-1], ", ")+" or "+words[len(words)-1])
		}
	}
	oneOf("host-ports", c.HostPorts, "auto", "nftables", "listeners")
	oneOf("log-level", c.LogLevel, "debug", "info", "warn", "error")
	if c.LogFormat != "" {
		oneOf("log-format", c.LogFormat, "text", "json")
	}
	if !isDomain(strings.TrimSuffix(c.DNSDomain, ".")) {
		wrong("dns-domain", c.DNSDomain, "not a domain name", "write local or cluster.example.com")
	}
	if c.AccessLog != "off" && c.AccessLog != "stdout" && !filepath.IsAbs(c.AccessLog) {
		if _, err := netip.ParseAddrPort(c.AccessLog); err != nil {
			wrong("access-log", c.AccessLog, "not a place to log to", "give off, stdout, the path of a syslog socket such as /dev/log, or ip:port")
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

// checkUnits finds the mistakes in what concerns units.
func (c *Config) checkUnits(wrong func(option, value, reason, remedy string)) {
	switch c.Units {
	case "auto", "on", "off":
	default:
		wrong("units", c.Units, "not one of the choices", "give auto, on or off")
	}
	switch c.OnStop {
	case "keep", "drain":
	default:
		wrong("on-stop", c.OnStop, "not one of the choices", "give keep or drain")
	}
	if c.MachineID != "" && (len(c.MachineID) > 64 || !isWord(c.MachineID)) {
		wrong("machine-id", c.MachineID, "not up to 64 letters, digits, '-', '_' and '.'", "leave it out to use /etc/machine-id")
	}
	for _, kv := range c.Metadata {
		if k, v, ok := strings.Cut(kv, "="); !ok || v == "" || !isWord(k) {
			wrong("metadata", kv, "not key=value", "write disk=ssd; keys have letters, digits, '_', '.' and '-'")
		}
	}
	for _, kv := range c.Counters {
		k, v, ok := strings.Cut(kv, "=")
		if n, err := strconv.ParseInt(v, 10, 64); !ok || !isWord(k) || err != nil || n < 0 {
			wrong("counter", kv, "not name=number", "write gpu=2")
		}
	}
	if !filepath.IsAbs(c.UnitsDir) || strings.ContainsAny(c.UnitsDir, " \t\n%\"'\\") {
		wrong("units-dir", c.UnitsDir, "not an absolute path without special characters", "leave it out, or give one such as /run/flotilla/units")
	}
	if c.MachineTTL < 2 || c.MachineTTL > 3600 {
		wrong("machine-ttl", strconv.Itoa(c.MachineTTL), "not from 2 to 3600 seconds", "leave it out for 12")
	}
	if !strings.HasPrefix(c.KeyPrefix, "/") || !strings.HasSuffix(c.KeyPrefix, "/") || strings.Contains(c.KeyPrefix, "//") || strings.HasPrefix(c.KeyPrefix, "/services/") {
		wrong("key-prefix", c.KeyPrefix, "not a place for these records", "begin and end it with a slash, as "+defaultKeyPrefix)
	}
	if c.APIPort < 0 || c.APIPort > 65535 {
		wrong("api-port", strconv.Itoa(c.APIPort), "not a port", "give a number from 1 to 65535, or 0 for none")
	}
	if c.TokenLimit < 1 || c.TokenLimit > 65535 {
		wrong("token-limit", strconv.Itoa(c.TokenLimit), "not from 1 to 65535", "leave it out for 100")
	}
	for _, v := range c.APIListen {
		if path, ok := strings.CutPrefix(v, "unix:"); ok && filepath.IsAbs(path) && len(path) <= maxSocketPath {
			continue
		}
		addr, err := netip.ParseAddrPort(v)
		switch {
		case err != nil:
			wrong("api-listen", v, "neither ip:port nor unix:/path", "write 127.0.0.1:49153 or unix:/run/fleet.sock")
		case !addr.Addr().IsLoopback() && !c.Insecure:
			wrong("api-listen", v, "whoever reaches it could run anything as root on every machine", "give --insecure if only trusted machines reach this network, or listen on 127.0.0.1")
		}
	}
}

// RunsUnits reports whether this node runs units.
func (c *Config) RunsUnits() bool {
	if c.Units != "auto" {
		return c.Units == "on"
	}
	_, err := os.Stat("/run/systemd/system") // as sd_booted does
	return err == nil && os.Geteuid() == 0
}
