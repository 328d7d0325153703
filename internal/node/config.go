package node

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"flotilla/internal/catalog"
	"flotilla/internal/dns"
	"flotilla/internal/nodeconfig"
	"flotilla/internal/router"
	"flotilla/internal/store"
)

// settings are those of this node, with what each component is told of them.
type settings struct{ nodeconfig.Config }

// StoreConfig returns what the node's own store needs to know. Call it on a
// configuration that is valid.
func StoreConfig(c *nodeconfig.Config) store.ServerConfig {
	addr, _ := netip.ParseAddr(c.Address) // Validate has parsed it
	return store.ServerConfig{
		Name: c.Name, DataDir: filepath.Join(c.Data, "store"), Address: addr,
		ClientPort: c.StoreClientPort, PeerPort: c.StorePeerPort, Join: c.Join, Insecure: c.Insecure,
	}
}

// Policy returns which endpoints the catalog takes and which ports services
// cannot have on this node.
func (c *settings) Policy() catalog.Policy {
	addr, _ := netip.ParseAddr(c.Address)
	p := catalog.Policy{Loopback: addr.IsLoopback(), LocalDomain: c.DNSDomain, ReservedPorts: map[int]string{}}
	for _, v := range c.EndpointAllow {
		if prefix, err := nodeconfig.ParsePrefix(v); err == nil {
			p.Allow = append(p.Allow, prefix)
		}
	}
	for _, own := range c.Ports() {
		p.ReservedPorts[own.Number] = "flotilla's port for " + own.What
	}
	return p
}

// CheckPrivileges reports ports below 1024 that this process may not open, with
// the flags that help. It is not part of Validate: not every command that reads
// the settings opens the node's ports.
func CheckPrivileges(c *nodeconfig.Config) error {
	first := firstFreePort()
	if first <= 1 {
		return nil
	}
	var low, remedy []string
	for _, p := range c.Ports() {
		if p.Number >= 1 && p.Number < first {
			low = append(low, fmt.Sprintf("--%s %d", p.Option, p.Number))
			remedy = append(remedy, fmt.Sprintf("--%s %d", p.Option, p.Number+8000))
		}
	}
	if len(low) == 0 {
		return nil
	}
	return fmt.Errorf("only root may open ports below %d, and this node would open %s; run it as root, or give %s",
		first, strings.Join(low, ", "), strings.Join(remedy, " "))
}

// firstFreePort returns the first port that this process may open.
func firstFreePort() int {
	var head unix.CapUserHeader
	var caps [2]unix.CapUserData
	head.Version = unix.LINUX_CAPABILITY_VERSION_3
	if err := unix.Capget(&head, &caps[0]); err == nil && caps[0].Effective&(1<<unix.CAP_NET_BIND_SERVICE) != 0 {
		return 0
	}
	raw, err := os.ReadFile("/proc/sys/net/ipv4/ip_unprivileged_port_start")
	if err != nil {
		return 1024
	}
	n, err := strconv.Atoi(strings.TrimSpace(string(raw)))
	if err != nil {
		return 1024
	}
	return n
}

// endpoints returns where the store is reached and which of them is this node's
// own, "" if it has none.
func (c *settings) endpoints() (all []string, local string) {
	if !c.RunsStore() {
		return c.EtcdEndpoints, ""
	}
	addr, _ := netip.ParseAddr(c.Address) // Validate has parsed it
	local = "http://" + netip.AddrPortFrom(addr, uint16(c.StoreClientPort)).String()
	all = append(all, local)
	for _, j := range c.Join {
		if e, err := nodeconfig.JoinEndpoint(j, c.StoreClientPort); err == nil && e != local {
			all = append(all, e)
		}
	}
	return all, local
}

// tls returns how to speak to an external etcd, nil for plain connections.
func (c *settings) tls() (*tls.Config, error) {
	if c.EtcdCAFile == "" && c.EtcdCertFile == "" {
		if len(c.EtcdEndpoints) > 0 && strings.HasPrefix(c.EtcdEndpoints[0], "https://") {
			return &tls.Config{MinVersion: tls.VersionTLS12}, nil // the system's authorities
		}
		return nil, nil
	}
	t := &tls.Config{MinVersion: tls.VersionTLS12}
	if c.EtcdCAFile != "" {
		pem, err := os.ReadFile(c.EtcdCAFile)
		if err != nil {
			return nil, fmt.Errorf("--etcd-ca-file: %w", err)
		}
		t.RootCAs = x509.NewCertPool()
		if !t.RootCAs.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("--etcd-ca-file %s holds no certificate", c.EtcdCAFile)
		}
	}
	if c.EtcdCertFile != "" {
		if _, err := tls.LoadX509KeyPair(c.EtcdCertFile, c.EtcdKeyFile); err != nil {
			return nil, fmt.Errorf("--etcd-cert-file %s with --etcd-key-file %s: %w", c.EtcdCertFile, c.EtcdKeyFile, err)
		}
		// Read again for each handshake, so that a renewed certificate is used.
		t.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			pair, err := tls.LoadX509KeyPair(c.EtcdCertFile, c.EtcdKeyFile)
			return &pair, err
		}
	}
	return t, nil
}

func (c *settings) router(addr netip.Addr, ops string) router.Config {
	r := router.Config{
		Node: c.Name, Address: addr, HTTPPort: c.HTTPPort, HTTPSPort: c.HTTPSPort, BalancerPort: c.BalancerPort,
		RedirectPort: c.RedirectPort, SNIPort: c.TLSPassthroughPort, Dir: filepath.Join(c.Data, "router"),
		Certs: c.Certs, OpsSocket: ops, Binary: c.HAProxy, Supervise: c.Supervise, AcceptProxy: c.AcceptProxy,
		AccessLog: c.AccessLog, HostPorts: c.HostPorts, MaxConnections: c.MaxConnections,
	}
	for _, v := range c.TrustedProxy {
		if p, err := nodeconfig.ParsePrefix(v); err == nil { // Validate has parsed it
			r.TrustedProxies = append(r.TrustedProxies, p)
		}
	}
	return r
}

// resolvConf is where the machine's own resolvers are listed.
const resolvConf = "/etc/resolv.conf"

func (c *settings) dns(addr netip.Addr) (dns.Config, error) {
	d := dns.Config{
		Listen: []netip.AddrPort{netip.AddrPortFrom(addr, uint16(c.DNSPort))}, Domain: c.DNSDomain,
		Address: []netip.Addr{addr}, Node: c.Name,
	}
	for _, v := range c.DNSListen {
		a, err := nodeconfig.AddrPort(v, c.DNSPort)
		if err != nil {
			return d, fmt.Errorf("--dns-listen %s: %w", v, err)
		}
		d.Listen = append(d.Listen, a)
	}
	switch {
	case len(c.DNSUpstream) == 1 && c.DNSUpstream[0] == "none":
	case len(c.DNSUpstream) == 0:
		found, err := dns.ResolvConf(resolvConf)
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return d, err
		}
		d.Upstreams = found
	default:
		for _, v := range c.DNSUpstream {
			a, err := nodeconfig.AddrPort(v, 53)
			if err != nil {
				return d, fmt.Errorf("--dns-upstream %s: %w", v, err)
			}
			d.Upstreams = append(d.Upstreams, a)
		}
	}
	return d, nil
}
