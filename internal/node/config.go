package node

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"flotilla/internal/catalog"
	"flotilla/internal/nodeconfig"
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
