package node

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"regexp"
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

// PortHolder reports whether another socket is in the way of one for "tcp" or "udp"
// on addr, by trying, and asks ss whose it is.
func PortHolder(network string, addr netip.AddrPort) (Holder, bool) {
	if err := tryPort(network, addr.String()); !errors.Is(err, syscall.EADDRINUSE) {
		return Holder{}, false // free, or not for this user to open
	}
	out, err := exec.Command("ss", "--no-header", "--listening", "--numeric", "--processes", "--"+network, fmt.Sprintf("sport = :%d", addr.Port())).Output()
	if err != nil {
		return Holder{}, true
	}
	port := fmt.Sprintf(":%d", addr.Port())
	for line := range strings.Lines(string(out)) {
		// UNCONN 0 0 127.0.0.53%lo:53 0.0.0.0:* users:(("systemd-resolve",pid=5,fd=12))
		fields := strings.Fields(line)
		if len(fields) < 4 {
			continue
		}
		local, _, _ := strings.Cut(strings.TrimSuffix(fields[3], port), "%")
		if local != strings.TrimSuffix(addr.String(), port) && local != "0.0.0.0" && local != "*" && local != "[::]" {
			continue
		}
		if user := regexp.MustCompile(`\("([^"]+)",pid=(\d+)`).FindStringSubmatch(line); user != nil {
			pid, _ := strconv.Atoi(user[2]) // digits
			return Holder{pid, user[1]}, true
		}
	}
	return Holder{}, true
}

// tryPort opens a port and closes it again.
func tryPort(network, addr string) error {
	if network == "udp" {
		c, err := net.ListenPacket(network, addr)
		if err != nil {
			return err
		}
		return c.Close()
	}
	l, err := net.Listen(network, addr)
	if err != nil {
		return err
	}
	return l.Close()
}

// explainBind adds to a listen error which program has the port; any other error
// comes back as it is.
func (c *settings) explainBind(err error) error {
	if err == nil || !errors.Is(err, syscall.EADDRINUSE) {
		return err
	}
	addr, parseErr := netip.ParseAddr(c.Address)
	if parseErr != nil {
		return err
	}
	var taken []string
	for _, p := range c.Ports() {
		for _, network := range p.Networks() {
			if h, ok := PortHolder(network, netip.AddrPortFrom(addr, uint16(p.Number))); ok && h.Pid != os.Getpid() {
				taken = append(taken, fmt.Sprintf("%s port %d of --%s is held by %s", network, p.Number, p.Option, h))
			}
		}
	}
	if len(taken) == 0 {
		return err
	}
	return fmt.Errorf("%w: %s", err, strings.Join(taken, "; "))
}
