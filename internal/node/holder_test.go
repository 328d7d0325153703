package node

import (
	"net"
	"net/netip"
	"os"
	"strings"
	"syscall"
	"testing"

	"flotilla/internal/nodeconfig"
)

func TestPortHolder(t *testing.T) {
	for _, listen := range []string{"127.0.0.1:0", "[::]:0"} {
		l, err := net.Listen("tcp", listen)
		if err != nil {
			t.Fatal(err)
		}
		port := l.Addr().(*net.TCPAddr).AddrPort().Port()
		addr := netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), port)
		h, ok := PortHolder("tcp", addr)
		if !ok || h.Pid != os.Getpid() || h.Program == "" {
			t.Errorf("%s is held by %v, %t", listen, h, ok)
		}
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
		if h, ok := PortHolder("tcp", addr); ok {
			t.Errorf("%s is closed and held by %v", listen, h)
		}
	}
	u, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = u.Close() }()
	if h, ok := PortHolder("udp", u.LocalAddr().(*net.UDPAddr).AddrPort()); !ok || h.Pid != os.Getpid() {
		t.Errorf("a UDP socket is held by %v, %t", h, ok)
	}
}

func TestExplainBind(t *testing.T) {
	c := settings{nodeconfig.Default()}
	c.Address, c.HTTPPort, c.HTTPSPort, c.DNSPort = "127.0.0.1", 8080, 8443, 8053
	if err := c.explainBind(syscall.EADDRINUSE); err == nil || strings.Contains(err.Error(), "held by") {
		t.Errorf("error %v: nobody holds those ports", err)
	}
	if err := c.explainBind(nil); err != nil {
		t.Error(err)
	}
}
