package node

import (
	"bytes"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"runtime"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"flotilla/internal/child"
	"flotilla/internal/registry"
)

// Machine returns what the registry is to know of this machine. The
// configuration has to be valid.
func (c *settings) Machine(version string) (registry.Machine, error) {
	m := registry.Machine{
		V: registry.Version, ID: c.MachineID, Node: c.Name, Address: c.Address, Version: version,
		Metadata: map[string]string{}, Counters: map[string]int64{}, CPU: int64(runtime.NumCPU()) * 1000, Units: c.RunsUnits(),
	}
	from, remedy := "--machine-id", "leave it out to use /etc/machine-id"
	if m.ID == "" {
		raw, err := os.ReadFile("/etc/machine-id")
		if err != nil {
			return m, fmt.Errorf("read the machine's ID: %w; give --machine-id", err)
		}
		m.ID, from, remedy = string(bytes.TrimSpace(raw)), "/etc/machine-id", "make one with systemd-machine-id-setup"
	}
	if err := registry.CheckMachineID(m.ID); err != nil {
		return m, fmt.Errorf("%s: %w; %s", from, err, remedy)
	}
	var err error
	if m.BootID, err = child.BootID(); err != nil {
		return m, err
	}
	var info unix.Sysinfo_t
	if err := unix.Sysinfo(&info); err != nil {
		return m, fmt.Errorf("read the size of the memory: %w", err)
	}
	m.Memory = int64(info.Totalram) * int64(info.Unit)
	for _, kv := range c.Metadata {
		k, v, _ := strings.Cut(kv, "=")
		m.Metadata[k] = v
	}
	for _, kv := range c.Counters {
		k, v, _ := strings.Cut(kv, "=")
		m.Counters[k], _ = strconv.ParseInt(v, 10, 64) // Validate has parsed it
	}
	if c.APIPort != 0 {
		addr, err := netip.ParseAddr(c.Address)
		if err != nil {
			return m, errors.New("the node's address is not valid")
		}
		m.API = netip.AddrPortFrom(addr, uint16(c.APIPort)).String()
	}
	return m, nil
}
