package node

import (
	"bytes"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"flotilla/internal/registry"
)

var metadataKey = regexp.MustCompile(`^[A-Za-z0-9_.-]+$`)

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
	if c.MachineID != "" {
		if err := registry.CheckMachineID(c.MachineID); err != nil {
			wrong("machine-id", c.MachineID, err.Error(), "leave it out to use /etc/machine-id")
		}
	}
	for _, kv := range c.Metadata {
		if k, v, ok := strings.Cut(kv, "="); !ok || v == "" || !metadataKey.MatchString(k) {
			wrong("metadata", kv, "not key=value", "write disk=ssd; keys have letters, digits, '_', '.' and '-'")
		}
	}
	for _, kv := range c.Counters {
		k, v, ok := strings.Cut(kv, "=")
		if n, err := strconv.ParseInt(v, 10, 64); !ok || !metadataKey.MatchString(k) || err != nil || n < 0 {
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
		wrong("key-prefix", c.KeyPrefix, "not a place for these records", "begin and end it with a slash, as "+registry.DefaultPrefix)
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

// Machine returns what the registry is to know of this machine. The
// configuration has to be valid.
func (c *Config) Machine(version string) (registry.Machine, error) {
	m := registry.Machine{
		V: registry.Version, ID: c.MachineID, Node: c.Name, Address: c.Address, Version: version,
		Metadata: map[string]string{}, Counters: map[string]int64{}, CPU: int64(runtime.NumCPU()) * 1000, Units: c.RunsUnits(),
	}
	if m.ID == "" {
		raw, err := os.ReadFile("/etc/machine-id")
		if err != nil {
			return m, fmt.Errorf("read the machine's ID: %w; give --machine-id", err)
		}
		m.ID = string(bytes.TrimSpace(raw))
		if err := registry.CheckMachineID(m.ID); err != nil {
			return m, fmt.Errorf("/etc/machine-id: %w; make one with systemd-machine-id-setup", err)
		}
	}
	raw, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return m, fmt.Errorf("read the boot ID: %w", err)
	}
	m.BootID = bootID(string(bytes.TrimSpace(raw)))
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

// bootID tells boots apart also in containers, which share the kernel's boot
// ID: their first process started at another time.
func bootID(kernel string) string {
	stat, err := os.ReadFile("/proc/1/stat")
	if err != nil {
		return kernel
	}
	// The name in parentheses may hold anything; the start time is the 20th field
	// behind it.
	rest := stat[max(0, bytes.LastIndex(stat, []byte(") ")))+1:]
	fields := bytes.Fields(rest)
	if len(fields) < 20 {
		return kernel
	}
	return kernel + "-" + string(fields[19])
}
