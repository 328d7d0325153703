package node

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"net/netip"
	"os"
	"runtime"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"flotilla/internal/child"
	"flotilla/internal/state"
)

// record returns what the cluster is to know of this node. The configuration has
// to be valid.
func (c *settings) record(version string, started time.Time) (state.NodeRecord, error) {
	r := state.NodeRecord{
		Name: c.Name, Address: c.Address, Version: version, Started: started.Unix(),
		Metadata: map[string]string{}, Counters: map[string]int64{}, CPU: int64(runtime.NumCPU()) * 1000, Units: c.RunsUnits(), Routes: !c.UnitsOnly,
	}
	var err error
	if r.ID, err = c.id(r.Units); err != nil {
		return r, err
	}
	if r.BootID, err = child.BootID(); err != nil {
		return r, err
	}
	var info unix.Sysinfo_t
	if err := unix.Sysinfo(&info); err != nil {
		return r, fmt.Errorf("read the size of the memory: %w", err)
	}
	r.Memory = int64(info.Totalram) * int64(info.Unit)
	for _, kv := range c.Metadata {
		k, v, _ := strings.Cut(kv, "=")
		r.Metadata[k] = v
	}
	for _, kv := range c.Counters {
		k, v, _ := strings.Cut(kv, "=")
		r.Counters[k], _ = strconv.ParseInt(v, 10, 64) // Validate has parsed it
	}
	if addr, err := netip.ParseAddr(c.Address); err == nil && r.Units && c.APIPort != 0 {
		r.Peer = netip.AddrPortFrom(addr, uint16(c.APIPort)).String()
	}
	return r, nil
}

// id returns the node's ID: that of the machine if the node runs its units. Several
// nodes that only route may be on one machine: their names are part of their IDs.
func (c *settings) id(units bool) (string, error) {
	id, from, remedy := c.MachineID, "--machine-id", "leave it out to use /etc/machine-id"
	if id == "" {
		raw, err := os.ReadFile("/etc/machine-id")
		if err != nil && units {
			return "", fmt.Errorf("read the machine's ID: %w; give --machine-id", err)
		}
		id, from, remedy = string(bytes.TrimSpace(raw)), "/etc/machine-id", "make one with systemd-machine-id-setup"
		if !units {
			sum := sha256.Sum256([]byte(id + "/" + c.Name))
			return hex.EncodeToString(sum[:16]), nil
		}
	}
	if err := state.CheckNodeID(id); err != nil {
		return "", fmt.Errorf("%s: %w; %s", from, err, remedy)
	}
	return id, nil
}
