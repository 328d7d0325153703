package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"flotilla/internal/client"
	"flotilla/internal/haproxy"
	"flotilla/internal/node"
	"flotilla/internal/wire"
)

func checkNode(_ context.Context, p *machine) []finding {
	st := p.running
	switch {
	case st == nil:
		return []finding{ok("node", "none runs on %s yet", p.cfg.Socket)}
	case st.Router != nil && !st.Router.Serving:
		return []finding{bad("node", "look at its log", "%s runs, but its router does not serve: %s", st.Name, st.Router.Err)}
	case !st.Store.Live:
		return []finding{warn("node", "it goes on with the last known state; look at the store", "%s serves, but is stale: %s", st.Name, st.Store.Err)}
	case len(st.Warnings) > 0:
		return []finding{warn("node", "flotilla status", "%s serves, with a warning: %s", st.Name, st.Warnings[0])}
	}
	if st.Router == nil {
		return []finding{ok("node", "%s runs units only", st.Name)}
	}
	return []finding{ok("node", "%s serves, revision %d applied", st.Name, st.Router.Applied)}
}

// checkPorts looks whether the node's ports are free, or its own.
func checkPorts(_ context.Context, p *machine) []finding {
	addr, err := netip.ParseAddr(p.cfg.Address)
	if err != nil {
		return nil // said under settings
	}
	var findings []finding
	free := 0
	for _, port := range p.cfg.Ports() {
		for _, network := range port.Networks() {
			h, taken := node.PortHolder(network, netip.AddrPortFrom(addr, uint16(port.Number)))
			own := p.running != nil && p.running.Address == p.cfg.Address && slices.Contains([]string{"flotillad", "fleetd", "haproxy", ""}, h.Program)
			switch {
			case !taken || own:
				free++
			case port.Option == "dns-port":
				findings = append(findings, bad("ports", dnsRemedy(h.Program, p.cfg.Address), "%s port %d for DNS is held by %s", network, port.Number, h))
			default:
				findings = append(findings, bad("ports", fmt.Sprintf("stop it, or give --%s another port", port.Option), "%s port %d for %s is held by %s", network, port.Number, port.What, h))
			}
		}
	}
	if len(findings) == 0 {
		what := "are free"
		if p.running != nil {
			what = "are free or the node's own"
		}
		findings = append(findings, ok("ports", "all %d ports of %s %s", free, p.cfg.Address, what))
	}
	return findings
}

// dnsRemedy says how to get the DNS port from the resolver that has it.
func dnsRemedy(program, address string) string {
	switch program {
	case "systemd-resolve", "systemd-resolved":
		return "write DNSStubListener=no below [Resolve] in /etc/systemd/resolved.conf and run: systemctl restart systemd-resolved (with DNS=" + address + " it then asks this node)"
	case "dnsmasq":
		return "add bind-dynamic and except-interface or listen-address=127.0.0.1 to dnsmasq's configuration, and server=/local/" + address + " to send it our names"
	case "named", "unbound", "pdns_recursor", "coredns":
		return "let it listen on 127.0.0.1 only and forward our domain to " + address + ", or give --dns-port another port"
	}
	return "stop it, or give --dns-port another port"
}

func checkHAProxy(ctx context.Context, p *machine) []finding {
	binary := p.cfg.HAProxy
	if binary == "" {
		binary = "haproxy"
	}
	path, err := exec.LookPath(binary)
	if err != nil {
		return []finding{bad("haproxy", "apt install haproxy, or give --haproxy PATH", "%s is not there", binary)}
	}
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	v, err := haproxy.BinaryVersion(ctx, path)
	if err != nil {
		return []finding{bad("haproxy", "run it by hand with -v", "%v", err)}
	}
	name := fmt.Sprintf("%s is version %s", path, v.Full)
	switch {
	case v.Major < 2 || v.Major == 2 && v.Minor < 6:
		return []finding{bad("haproxy", "install 2.6 or newer: Debian 12 and Ubuntu 24.04 have it", "%s, which is too old", name)}
	case !v.DeletesServers():
		return []finding{ok("haproxy", "%s; its 'del server' can crash the worker, so flotilla never sends it and parks unused servers instead", name)}
	case !v.MakesBackends():
		return []finding{ok("haproxy", "%s; new services take a prepared backend, more are made by a seamless reload", name)}
	}
	return []finding{ok("haproxy", "%s; services come and go without any reload", name)}
}

// enoughFiles is what HAProxy should be able to open: two for each connection.
const enoughFiles = 65536

func checkLimits(context.Context, *machine) []finding {
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return []finding{warn("limits", "", "the limit of open files cannot be read: %v", err)}
	}
	if limit.Max < enoughFiles {
		return []finding{warn("limits", fmt.Sprintf("raise it: LimitNOFILE=%d in the unit, or ulimit -n", enoughFiles),
			"%d open files allow about %d connections at once", limit.Max, limit.Max/2)}
	}
	return []finding{ok("limits", "%d open files", limit.Max)}
}

func checkNftables(ctx context.Context, p *machine) []finding {
	if p.cfg.HostPorts == "listeners" {
		return []finding{ok("nftables", "not used: --host-ports listeners")}
	}
	level := warn
	if p.cfg.HostPorts == "nftables" {
		level = bad
	}
	path, err := exec.LookPath("nft")
	if err != nil {
		return []finding{level("nftables", "apt install nftables", "nft is not there: a new host_port will cost a reload of HAProxy")}
	}
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	if out, err := exec.CommandContext(ctx, path, "list", "tables").CombinedOutput(); err != nil {
		return []finding{level("nftables", "run the node as root or with CAP_NET_ADMIN", "no right to use nftables (%s): a new host_port will cost a reload of HAProxy", firstLine(out))}
	}
	return []finding{ok("nftables", "usable: a new host_port opens without a reload")}
}

func firstLine(out []byte) string {
	for i, b := range out {
		if b == '\n' {
			return string(out[:i])
		}
	}
	return string(out)
}

// checkClock asks the kernel whether something keeps its clock right.
func checkClock(context.Context, *machine) []finding {
	var t unix.Timex
	state, err := unix.Adjtimex(&t)
	if err != nil {
		return []finding{warn("clock", "", "the kernel does not say whether the clock is right: %v", err)}
	}
	if state == unix.TIME_ERROR || t.Status&unix.STA_UNSYNC != 0 {
		return []finding{warn("clock", "timedatectl set-ntp true, or install chrony; leases do not depend on it, certificates and logs do",
			"nothing keeps the clock right (not synchronised)")}
	}
	return []finding{ok("clock", "synchronised, estimated error %s", time.Duration(t.Esterror)*time.Microsecond)}
}

// What the store needs of its disk.
const (
	freeMiB   = 512
	slowFsync = 25 * time.Millisecond
	fsyncs    = 40
)

func checkDisk(_ context.Context, p *machine) []finding {
	dir := p.cfg.Data
	for {
		if info, err := os.Stat(dir); err == nil && info.IsDir() {
			break
		}
		if dir == filepath.Dir(dir) {
			return []finding{bad("disk", "give --data", "no directory above %s exists", p.cfg.Data)}
		}
		dir = filepath.Dir(dir)
	}
	var findings []finding
	var fs unix.Statfs_t
	if err := unix.Statfs(dir, &fs); err != nil {
		findings = append(findings, warn("disk", "", "free space of %s cannot be read: %v", dir, err))
	} else if free := int64(fs.Bavail) * fs.Bsize >> 20; free < freeMiB {
		findings = append(findings, bad("disk", "make room or give another --data: a full disk stops the store", "%s has %d MiB free, the store needs %d", dir, free, freeMiB))
	} else {
		findings = append(findings, ok("disk", "%s has %d MiB free", dir, free))
	}
	slowest, err := fsyncTime(dir)
	switch {
	case errors.Is(err, os.ErrPermission):
		return append(findings, warn("disk", "run this as the user of the node", "%s cannot be written by this user", dir))
	case err != nil:
		return append(findings, bad("disk", "check the file system", "writing to %s: %v", dir, err))
	case slowest > slowFsync:
		return append(findings, warn("disk", "put --data on a faster disk: every write of the store waits for this", "fsync takes %s (p95 of %d)", slowest.Round(10*time.Microsecond), fsyncs))
	}
	return append(findings, ok("disk", "fsync takes %s (p95 of %d)", slowest.Round(10*time.Microsecond), fsyncs))
}

// fsyncTime returns the 95th percentile of small synced writes.
func fsyncTime(dir string) (_ time.Duration, err error) {
	f, err := os.CreateTemp(dir, ".flotilla-doctor-*")
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, f.Close(), os.Remove(f.Name())) }()
	var times []time.Duration
	for range fsyncs {
		began := time.Now()
		if _, err := f.Write(make([]byte, 512)); err != nil {
			return 0, err
		}
		if err := f.Sync(); err != nil {
			return 0, err
		}
		times = append(times, time.Since(began))
	}
	slices.Sort(times)
	return times[len(times)*95/100], nil
}

const slowStore = 100 * time.Millisecond

// checkStore asks the members how they are, through the running node.
func checkStore(ctx context.Context, p *machine) []finding {
	if p.running == nil {
		return []finding{ok("store", "not asked: no node runs")}
	}
	n, err := client.Get[wire.Nodes](ctx, client.Dial(p.cfg.Socket), "/v1/nodes", nil)
	if err != nil {
		return []finding{bad("store", "flotilla nodes list", "%v", err)}
	}
	var findings []finding
	if !n.Store.Quorum {
		findings = append(findings, bad("store", "start the members that are away", "no quorum: %s", n.Store.Err))
	}
	for _, m := range n.Store.Members {
		name := m.Name
		if name == "" {
			name = m.Endpoint
		}
		switch {
		case !m.Reachable:
			findings = append(findings, warn("store", "start it, or look at its log", "member %s: %s", name, m.Err))
		case m.Err != "":
			findings = append(findings, warn("store", "flotilla nodes list", "member %s: %s", name, m.Err))
		case m.Latency > slowStore:
			findings = append(findings, warn("store", "look at its disk and network", "member %s answers after %s", name, m.Latency.Round(time.Millisecond)))
		case m.Quota > 0 && m.DBInUse > m.Quota*6/10:
			findings = append(findings, warn("store", "delete what nobody needs", "member %s uses %s %% of its quota", name, strconv.FormatInt(m.DBInUse*100/m.Quota, 10)))
		default:
			findings = append(findings, ok("store", "member %s answers after %s", name, m.Latency.Round(10*time.Microsecond)))
		}
	}
	return findings
}
