package nspawn

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// Clusters get a /24 of this network.
var pool = netip.MustParsePrefix("10.77.0.0/16")

// freeNetwork returns the first /24 of the pool that overlaps none of used.
func freeNetwork(used []netip.Prefix) (netip.Prefix, error) {
	base := pool.Addr().As4()
	for third := range 256 {
		p := netip.PrefixFrom(netip.AddrFrom4([4]byte{base[0], base[1], byte(third), 0}), 24)
		if !slices.ContainsFunc(used, p.Overlaps) {
			return p, nil
		}
	}
	return netip.Prefix{}, fmt.Errorf("no network is free in %s: remove a cluster", pool)
}

// usedNetworks returns the networks that the host has an address in or a route
// to, but for the default routes.
func usedNetworks(ctx context.Context) ([]netip.Prefix, error) {
	table, err := run(ctx, "ip", "-4", "route", "show", "table", "all")
	return routedNetworks(table), err
}

// routedNetworks reads what ip route prints: a line begins with the destination,
// or with a type of route and the destination.
func routedNetworks(table string) []netip.Prefix {
	var list []netip.Prefix
	for line := range strings.Lines(table) {
		fields := strings.Fields(line)
		for _, field := range fields[:min(2, len(fields))] {
			if p, err := netip.ParsePrefix(field); err == nil {
				list = append(list, p)
			} else if a, err := netip.ParseAddr(field); err == nil {
				list = append(list, netip.PrefixFrom(a, a.BitLen()))
			}
		}
	}
	return list
}

// hostAddress returns the n-th address of a /24.
func hostAddress(p netip.Prefix, n int) netip.Addr {
	a := p.Addr().As4()
	a[3] = byte(n)
	return netip.AddrFrom4(a)
}

// tag is the cluster's name where only few characters fit.
func tag(cluster string) string {
	if len(cluster) <= 8 {
		return cluster
	}
	sum := sha256.Sum256([]byte(cluster))
	return hex.EncodeToString(sum[:4])
}

// Names of a cluster's things in the kernel. An interface has 15 characters.
func (c *Cluster) bridge() string            { return "fl-" + tag(c.name) }
func (c *Cluster) table() string             { return "flotilla_" + strings.ReplaceAll(c.name, "-", "_") }
func (c *Cluster) namespace(m string) string { return "flotilla-" + c.name + "." + m }
func (m machine) link(c *Cluster) string     { return fmt.Sprintf("%s.%d", c.bridge(), m.Index) }

const namespaces = "/run/netns"

// connect makes what is missing of the cluster's bridge, its way out and the
// machine's namespace with its address.
func (c *Cluster) connect(ctx context.Context, n network, m machine) error {
	held, err := lock(ctx, c.dir())
	if err != nil {
		return err
	}
	defer held.release()
	if err := c.connectBridge(ctx, n); err != nil {
		return err
	}
	if err := c.connectMachine(ctx, n, m); err != nil {
		return err
	}
	return c.writeHosts()
}

func (c *Cluster) connectBridge(ctx context.Context, n network) error {
	if _, err := net.InterfaceByName(c.bridge()); err != nil {
		// No spanning tree: a port forwards as soon as it is there.
		if _, err := run(ctx, "ip", "link", "add", c.bridge(), "type", "bridge", "forward_delay", "0", "stp_state", "0"); err != nil {
			return explainKernel(err, "network bridges", "bridge")
		}
	}
	address := netip.PrefixFrom(hostAddress(n.Prefix, 1), 24)
	for _, args := range [][]string{{"addr", "replace", address.String(), "dev", c.bridge()}, {"link", "set", c.bridge(), "up"}} {
		if _, err := run(ctx, "ip", args...); err != nil {
			return err
		}
	}
	rules := fmt.Sprintf(`table ip %[1]s
delete table ip %[1]s
table ip %[1]s {
	chain out {
		type nat hook postrouting priority 100; policy accept;
		ip saddr %[2]s ip daddr != %[2]s masquerade
	}
}
`, c.table(), n.Prefix)
	if _, err := runWith(ctx, rules, "nft", "-f", "-"); err != nil {
		return explainKernel(err, "nftables with masquerading", "nf_tables nft_masq nft_chain_nat")
	}
	if err := os.WriteFile("/proc/sys/net/ipv4/ip_forward", []byte("1\n"), 0o644); err != nil {
		return fmt.Errorf("let the machines reach other networks: %w", err)
	}
	if filter, err := run(ctx, "nft", "list", "table", "ip", "filter"); err == nil && dropsForwarded(filter) {
		return errors.New(`a firewall on this host, of Docker or ufw perhaps, drops what machines send: ` +
			`nft insert rule ip filter FORWARD iifname '"fl-*"' accept; nft insert rule ip filter FORWARD oifname '"fl-*"' accept`)
	}
	return nil
}

// dropsForwarded reports whether a table of nftables drops what is forwarded and
// makes no exception for the bridges of clusters.
func dropsForwarded(table string) bool {
	return strings.Contains(table, "hook forward priority filter; policy drop") && !strings.Contains(table, `"fl-`)
}

// connectMachine makes what is missing of the machine's namespace and link, and
// plugs it in.
func (c *Cluster) connectMachine(ctx context.Context, n network, m machine) error {
	space, link := c.namespace(m.Name), m.link(c)
	there, err := hasNamespace(space)
	if err == nil && !there {
		_, err = run(ctx, "ip", "netns", "add", space)
	}
	if err != nil {
		return err
	}
	if _, err := net.InterfaceByName(link); err != nil {
		if _, err := run(ctx, "ip", "link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", space); err != nil {
			return explainKernel(err, "pairs of virtual network links", "veth")
		}
	}
	inside := fmt.Sprintf("link set lo up\naddr replace %s/24 dev eth0\nlink set eth0 up\nroute replace default via %s\n", m.Address, hostAddress(n.Prefix, 1))
	if _, err := runWith(ctx, inside, "ip", "-netns", space, "-batch", "-"); err != nil {
		return err
	}
	_, err = run(ctx, "ip", "link", "set", link, "master", c.bridge(), "up")
	return err
}

// disconnect removes the machine's namespace and link.
func (c *Cluster) disconnect(ctx context.Context, m machine) error {
	if m.Index != 0 {
		if _, err := net.InterfaceByName(m.link(c)); err == nil {
			if _, err := run(ctx, "ip", "link", "delete", m.link(c)); err != nil {
				return err
			}
		}
	}
	there, err := hasNamespace(c.namespace(m.Name))
	if there {
		_, err = run(ctx, "ip", "netns", "delete", c.namespace(m.Name))
	}
	return err
}

// hasNamespace reports whether there is a network namespace of that name. The
// file of one that was only half made is removed.
func hasNamespace(name string) (bool, error) {
	path := filepath.Join(namespaces, name)
	var fs unix.Statfs_t
	switch err := unix.Statfs(path, &fs); {
	case errors.Is(err, unix.ENOENT):
		return false, nil
	case err != nil:
		return false, fmt.Errorf("look at namespace %s: %w", path, err)
	case fs.Type == unix.NSFS_MAGIC:
		return true, nil
	}
	return false, os.Remove(path)
}

// removeNetwork removes what connectBridge has made.
func (c *Cluster) removeNetwork(ctx context.Context) error {
	if _, err := net.InterfaceByName(c.bridge()); err == nil {
		if _, err := run(ctx, "ip", "link", "delete", c.bridge()); err != nil {
			return err
		}
	}
	tables, err := run(ctx, "nft", "list", "tables", "ip")
	if err != nil || !slices.Contains(strings.Split(tables, "\n"), "table ip "+c.table()) {
		return err
	}
	_, err = run(ctx, "nft", "delete", "table", "ip", c.table())
	return err
}

// writeHosts writes the file that all machines of the cluster have as
// /etc/hosts. It is mounted in them, so it is changed and not replaced.
func (c *Cluster) writeHosts() error {
	all, err := c.machines()
	if err != nil || len(all) == 0 {
		return err
	}
	text := "127.0.0.1 localhost\n::1 localhost ip6-localhost\n"
	for _, m := range all {
		if m.Index != 0 {
			text += m.Address.String() + " " + m.Name + "\n"
		}
	}
	if err := os.MkdirAll(filepath.Dir(c.hosts()), 0o755); err != nil {
		return err
	}
	f, err := os.OpenFile(c.hosts(), os.O_WRONLY|os.O_CREATE, 0o644)
	if err != nil {
		return err
	}
	_, err = f.WriteString(text)
	return errors.Join(err, f.Truncate(int64(len(text))), f.Close())
}

func (c *Cluster) hosts() string { return filepath.Join(c.host.Run, c.name, ".hosts") }

// hostNameservers returns the resolvers that the host uses and its machines can.
func hostNameservers() []netip.Addr {
	for _, path := range []string{"/etc/resolv.conf", "/run/systemd/resolve/resolv.conf"} {
		text, _ := os.ReadFile(path)
		if list := nameservers(string(text)); len(list) > 0 {
			return list
		}
	}
	return nil
}

// nameservers returns those of a resolv.conf that are reached from elsewhere too.
func nameservers(text string) []netip.Addr {
	var list []netip.Addr
	for line := range strings.Lines(text) {
		address, ok := strings.CutPrefix(strings.TrimSpace(line), "nameserver ")
		if a, err := netip.ParseAddr(strings.TrimSpace(address)); ok && err == nil && a.Is4() && !a.IsLoopback() && !a.IsUnspecified() {
			list = append(list, a)
		}
	}
	return list
}

// explainKernel adds what the kernel may lack, and how to get it.
func explainKernel(err error, what, modules string) error {
	return fmt.Errorf("%w: if this kernel has no %s, load its modules (modprobe -a %s) or use another kernel", err, what, modules)
}
