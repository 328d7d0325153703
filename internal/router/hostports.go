package router

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"os/exec"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"flotilla/internal/catalog"
	"flotilla/internal/haproxy"
)

// hostPorts opens the host_ports of services on this node. With nftables every
// port is redirected to one of two listeners, and a new port costs one set
// element; elsewhere a new port is a new listener, which costs a reload.
type hostPorts struct {
	log      *slog.Logger
	client   *haproxy.Client
	address  netip.Addr
	nftables bool
	redirect int             // port of the TCP listener; the HTTP one is the next
	open     map[string]bool // redirected now, by "map port"
	listen   map[entry]bool  // listeners that HAProxy has
	busy     map[int]busyPort
	next     time.Time // of the next look for other programs
}

// busyPort is a host_port that this node cannot open.
type busyPort struct {
	service string
	why     error
}

func (p *hostPorts) prepare(ctx context.Context, cfg Config, client *haproxy.Client, log *slog.Logger) error {
	*p = hostPorts{
		log: log, client: client, address: cfg.Address, redirect: cfg.RedirectPort,
		open: map[string]bool{}, listen: map[entry]bool{}, busy: map[int]busyPort{},
	}
	if cfg.HostPorts == "listeners" {
		return nil
	}
	if !p.address.Is4() {
		if cfg.HostPorts == "nftables" {
			return fmt.Errorf("host ports: HAProxy cannot tell which port an IPv6 client asked for (address %s): use --host-ports=listeners", p.address)
		}
		return nil
	}
	// Only checked: the ports that were open before we came stay open.
	_, err := p.nft(ctx, p.table(nil), "--check", "--file", "-")
	p.nftables = err == nil
	switch {
	case err != nil && cfg.HostPorts == "nftables":
		return fmt.Errorf("host ports: %w: run as root with the nftables package installed, or use --host-ports=listeners", err)
	case err != nil:
		log.Info("host_ports open by reload", "reason", "nftables cannot be used", "err", err)
	}
	return nil
}

func (p *hostPorts) mode() string {
	if p.nftables {
		return "nftables"
	}
	return "listeners"
}

// binds returns the ports that HAProxy itself listens on for host_ports.
func (p *hostPorts) binds(tcp bool) []int {
	if p.nftables {
		if tcp {
			return []int{p.redirect}
		}
		return []int{p.redirect + 1}
	}
	var ports []int
	for e := range p.listen {
		if port, err := strconv.Atoi(e.Key); err == nil && (e.Map == haproxy.TCPPortMap) == tcp {
			ports = append(ports, port)
		}
	}
	slices.Sort(ports)
	if len(ports) == 0 { // a frontend needs one
		return p.unusedBind(tcp)
	}
	return ports
}

func (p *hostPorts) unusedBind(tcp bool) []int {
	if tcp {
		return []int{p.redirect}
	}
	return []int{p.redirect + 1}
}

// adopt makes the ports that the next configuration routes its listeners.
func (p *hostPorts) adopt(next *state) {
	clear(p.listen)
	for e := range next.routes {
		if portSets[e.Map] != "" {
			p.listen[e] = true
		}
	}
}

// portOf returns the map entry of the service's host_port; ok is false if it wants
// none.
func portOf(svc *catalog.Service) (e entry, ok bool) {
	if svc == nil || svc.HostPort == 0 || !svc.Routable() {
		return e, false
	}
	e = entry{haproxy.HTTPPortMap, strconv.Itoa(svc.HostPort)}
	if svc.Scheme == catalog.TCP {
		e.Map = haproxy.TCPPortMap
	}
	return e, true
}

// look finds out whether the service's host_port is one that another program
// listens on, which is a problem of this node alone.
func (p *hostPorts) look(svc *catalog.Service) {
	e, ok := portOf(svc)
	if !ok {
		return
	}
	// A port that changes between TCP and HTTP is held by HAProxy itself.
	ours := !p.nftables && (p.listen[entry{haproxy.TCPPortMap, e.Key}] || p.listen[entry{haproxy.HTTPPortMap, e.Key}])
	if !ours {
		if err := tryBind(netip.AddrPortFrom(p.address, uint16(svc.HostPort))); err != nil {
			p.busy[svc.HostPort] = busyPort{svc.Name, err}
			return
		}
	}
	delete(p.busy, svc.HostPort)
}

// opens reports whether this node can offer the service's host_port, as far as look
// has found, and whether that waits for a reload.
func (p *hostPorts) opens(svc *catalog.Service) (ok, waits bool) {
	e, ok := portOf(svc)
	if !ok {
		return false, false
	}
	if _, busy := p.busy[svc.HostPort]; busy {
		return false, false
	}
	return true, !p.nftables && !p.listen[e]
}

// tryBind reports why nobody could listen on the address now, if so.
func tryBind(addr netip.AddrPort) error {
	family := unix.AF_INET6
	var sa unix.Sockaddr = &unix.SockaddrInet6{Port: int(addr.Port()), Addr: addr.Addr().As16()}
	if addr.Addr().Is4() {
		family = unix.AF_INET
		sa = &unix.SockaddrInet4{Port: int(addr.Port()), Addr: addr.Addr().As4()}
	}
	fd, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("socket: %w", err)
	}
	defer func() { _ = unix.Close(fd) }()
	// With SO_REUSEADDR only a listening socket is in the way, not one that is
	// in TIME_WAIT. Not listening, we never take a connection.
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1); err != nil {
		return fmt.Errorf("socket: %w", err)
	}
	return unix.Bind(fd, sa)
}

// follow redirects ports as the steps that were carried out route them.
func (p *hostPorts) follow(ctx context.Context, steps []Step) error {
	if !p.nftables {
		return nil
	}
	var script strings.Builder
	for _, s := range steps {
		set, ok := portSets[s.Map]
		if !ok {
			continue
		}
		key := set + " " + s.Key
		switch {
		case s.Do == SetRoute && !p.open[key]:
			p.open[key] = true
			fmt.Fprintf(&script, "add element %s %s { %s }\n", p.name(), set, s.Key)
		case s.Do == DelRoute && p.open[key]:
			delete(p.open, key)
			fmt.Fprintf(&script, "delete element %s %s { %s }\n", p.name(), set, s.Key)
		}
	}
	if script.Len() == 0 {
		return nil
	}
	if _, err := p.nft(ctx, script.String(), "--file", "-"); err != nil {
		return p.replaceTable(ctx) // it may have been changed by hand
	}
	return nil
}

var portSets = map[string]string{haproxy.TCPPortMap: "tcp_ports", haproxy.HTTPPortMap: "http_ports"}

// resync redirects just the ports that the maps route, or learns which ports
// HAProxy listens on.
func (p *hostPorts) resync(ctx context.Context, have *state) error {
	if !p.nftables {
		return p.readListeners(ctx)
	}
	clear(p.open)
	for e := range have.routes {
		if set := portSets[e.Map]; set != "" {
			p.open[set+" "+e.Key] = true
		}
	}
	return p.replaceTable(ctx)
}

func (p *hostPorts) readListeners(ctx context.Context) error {
	const listeners = "8" // the type of row
	answers, err := p.client.Do(ctx, "show stat tcp-ports "+listeners+" -1", "show stat http-ports "+listeners+" -1")
	if err != nil {
		return fmt.Errorf("listeners: %w", err)
	}
	clear(p.listen)
	for i, m := range []string{haproxy.TCPPortMap, haproxy.HTTPPortMap} {
		for _, row := range haproxy.ParseStats(answers[i].Text) {
			if addr, err := netip.ParseAddrPort(row["addr"]); err == nil && int(addr.Port()) != p.redirect+i {
				p.listen[entry{m, strconv.Itoa(int(addr.Port()))}] = true
			}
		}
	}
	return nil
}

// name is the table's: each node on a machine has its own.
func (p *hostPorts) name() string {
	return "ip flotilla_" + strings.ReplaceAll(p.address.String(), ".", "_")
}

// table returns the script that replaces the whole table in one transaction.
func (p *hostPorts) table(open map[string]bool) string {
	var b strings.Builder
	name := p.name()
	fmt.Fprintf(&b, "add table %s\ndelete table %s\nadd table %s\n", name, name, name)
	for i, set := range []string{"tcp_ports", "http_ports"} {
		fmt.Fprintf(&b, "add set %s %s { type inet_service; }\n", name, set)
		for _, hook := range []string{"prerouting", "output"} {
			fmt.Fprintf(&b, "add chain %s %s { type nat hook %s priority -100; }\n", name, hook, hook)
			fmt.Fprintf(&b, "add rule %s %s ip daddr %s tcp dport @%s dnat to %s\n",
				name, hook, p.address, set, netip.AddrPortFrom(p.address, uint16(p.redirect+i)))
		}
	}
	for _, key := range slices.Sorted(maps.Keys(open)) {
		set, port, _ := strings.Cut(key, " ")
		fmt.Fprintf(&b, "add element %s %s { %s }\n", name, set, port)
	}
	return b.String()
}

// replaceTable makes the kernel's table what it shall be. Connections that are
// redirected stay so.
func (p *hostPorts) replaceTable(ctx context.Context) error {
	_, err := p.nft(ctx, p.table(p.open), "--file", "-")
	return err
}

// nft runs the nft program with a script, as one transaction, and returns its
// output.
func (p *hostPorts) nft(ctx context.Context, script string, argv ...string) (string, error) {
	cmd := exec.CommandContext(ctx, "nft", argv...)
	cmd.Stdin = strings.NewReader(script)
	out, err := cmd.CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("nft: %w: %.200s", err, strings.TrimSpace(string(out)))
	}
	return string(out), nil
}

var nftSet = sync.OnceValue(func() *regexp.Regexp {
	return regexp.MustCompile(`set (\w+) \{\s*type inet_service\s*(?:elements = \{([^}]*)\})?`)
})

// intact reports whether the kernel redirects what it shall.
func (p *hostPorts) intact(ctx context.Context) bool {
	text, err := p.nft(ctx, "", append([]string{"--numeric", "list", "table"}, strings.Fields(p.name())...)...)
	if err != nil || strings.Count(text, " dnat to ") != 2*len(portSets) {
		return false
	}
	found := map[string]bool{}
	for _, m := range nftSet().FindAllStringSubmatch(text, -1) {
		for port := range strings.FieldsFuncSeq(m[2], func(c rune) bool { return c < '0' || c > '9' }) {
			found[m[1]+" "+port] = true
		}
	}
	return maps.Equal(found, p.open)
}

// remove takes the redirects away when HAProxy stops for good.
func (p *hostPorts) remove() {
	if !p.nftables {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	defer cancel()
	if _, err := p.nft(ctx, "delete table "+p.name()+"\n", "--file", "-"); err != nil {
		p.log.Warn("host ports stay redirected", "err", err)
	}
}

// checkPorts looks from time to time whether other programs took or freed a
// port, and renews the redirects in case somebody removed them.
func (r *Router) checkPorts(ctx context.Context, now time.Time) error {
	p := &r.ports
	if now.Before(p.next) || r.done == nil {
		return nil
	}
	p.next = now.Add(10 * time.Second)
	var names []string
	for port, b := range p.busy {
		if svc := r.done.Service(b.service); svc == nil || svc.HostPort != port {
			delete(p.busy, port)
		} else {
			names = append(names, b.service)
		}
	}
	if p.nftables {
		for e, value := range r.have.routes {
			if _, service := haproxy.RouteOwner(value); portSets[e.Map] != "" {
				names = append(names, service)
			}
		}
	}
	slices.Sort(names)
	if err := r.reconcile(ctx, r.done, slices.Compact(names)); err != nil {
		return err
	}
	if p.nftables && !p.intact(ctx) {
		p.log.Warn("host ports are redirected anew", "reason", "the nftables table was changed by somebody else")
		return p.replaceTable(ctx)
	}
	return nil
}

func (p *hostPorts) problems() []catalog.Problem {
	var problems []catalog.Problem
	for _, port := range slices.Sorted(maps.Keys(p.busy)) {
		b := p.busy[port]
		reason, remedy := fmt.Sprintf("this node cannot open the port: %v", b.why), "choose another host_port"
		switch {
		case errors.Is(b.why, syscall.EADDRINUSE):
			reason = "another program on this node listens on the port"
			remedy = fmt.Sprintf("stop it (ss -ltnp sport = :%d names it), let it listen on another address, or choose another host_port", port)
		case errors.Is(b.why, syscall.EACCES):
			reason = "this node may not open ports below 1024"
			remedy = "run it as root or give it CAP_NET_BIND_SERVICE, or choose a host_port above 1023"
		}
		problems = append(problems, catalog.Problem{
			Key: catalog.Prefix + b.service + "/host_port", Value: strconv.Itoa(port), Reason: reason, Remedy: remedy,
		})
	}
	return problems
}
