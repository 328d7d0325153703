package node

import (
	"bufio"
	"encoding/hex"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
)

// Holder is a process that listens on a port.
type Holder struct {
	Pid     int    // 0 when this user may not see whose socket it is
	Program string // its name, such as "nginx"; "" when Pid is 0
}

// String returns "nginx (pid 12)", or "another program" when it is not known.
func (h Holder) String() string {
	if h.Pid == 0 {
		return "another program (run as root to see which)"
	}
	return fmt.Sprintf("%s (pid %d)", h.Program, h.Pid)
}

// PortHolder returns who listens on addr for "tcp" or "udp", on that address or
// on all of them. It reads /proc and opens no socket.
func PortHolder(network string, addr netip.AddrPort) (Holder, bool) {
	inodes := map[string]bool{}
	for _, file := range []string{"/proc/net/" + network, "/proc/net/" + network + "6"} {
		socketsOn(file, network == "tcp", addr, inodes)
	}
	if len(inodes) == 0 {
		return Holder{}, false
	}
	links, _ := filepath.Glob("/proc/[0-9]*/fd/*") // the pattern is well formed
	for _, link := range links {
		to, err := os.Readlink(link)
		if err != nil || !strings.HasPrefix(to, "socket:[") {
			continue
		}
		if !inodes[strings.TrimSuffix(strings.TrimPrefix(to, "socket:["), "]")] {
			continue
		}
		process := filepath.Dir(filepath.Dir(link))
		pid, err := strconv.Atoi(filepath.Base(process))
		if err != nil {
			continue
		}
		name, err := os.ReadFile(filepath.Join(process, "comm"))
		if err != nil {
			continue // it ended meanwhile
		}
		return Holder{pid, strings.TrimSpace(string(name))}, true
	}
	return Holder{}, true
}

// socketsOn adds to inodes the sockets of a /proc/net table that are bound to
// addr's port on addr's address or on the wildcard address.
func socketsOn(file string, listeningOnly bool, addr netip.AddrPort, inodes map[string]bool) {
	f, err := os.Open(file)
	if err != nil {
		return
	}
	defer func() { _ = f.Close() }() // only read
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		fields := strings.Fields(lines.Text())
		if len(fields) < 10 || listeningOnly && fields[3] != "0A" {
			continue
		}
		local, err := kernelAddr(fields[1])
		if err != nil || local.Port() != addr.Port() {
			continue
		}
		if local.Addr().IsUnspecified() || local.Addr() == addr.Addr().Unmap() {
			inodes[fields[9]] = true
		}
	}
}

// kernelAddr reads an address of /proc/net/tcp, such as 0100007F:0050: 32-bit
// words in the machine's (little-endian) order.
func kernelAddr(s string) (netip.AddrPort, error) {
	host, port, _ := strings.Cut(s, ":")
	raw, err := hex.DecodeString(host)
	if err != nil {
		return netip.AddrPort{}, err
	}
	for word := range slices.Chunk(raw, 4) {
		slices.Reverse(word)
	}
	addr, ok := netip.AddrFromSlice(raw)
	n, err := strconv.ParseUint(port, 16, 16)
	if !ok || err != nil {
		return netip.AddrPort{}, fmt.Errorf("%q is not a socket address", s)
	}
	return netip.AddrPortFrom(addr.Unmap(), uint16(n)), nil
}

// explainBind adds to a listen error which program holds the port; any other
// error comes back as it is.
func (c *settings) explainBind(err error) error {
	if err == nil || !errors.Is(err, syscall.EADDRINUSE) {
		return err
	}
	taken := c.TakenPorts()
	if len(taken) == 0 {
		return err
	}
	return fmt.Errorf("%w: %s", err, strings.Join(taken, "; "))
}

// TakenPorts returns a sentence for each of the node's ports on which another
// program listens already.
func (c *settings) TakenPorts() []string {
	addr, err := netip.ParseAddr(c.Address)
	if err != nil {
		return nil
	}
	var taken []string
	for _, p := range c.Ports() {
		networks := []string{"tcp"}
		if p.Option == "dns-port" {
			networks = append(networks, "udp")
		}
		for _, network := range networks {
			if h, ok := PortHolder(network, netip.AddrPortFrom(addr, uint16(p.Number))); ok && h.Pid != os.Getpid() {
				taken = append(taken, fmt.Sprintf("%s port %d of --%s is held by %s", network, p.Number, p.Option, h))
			}
		}
	}
	return taken
}
