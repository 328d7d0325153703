//go:build cluster

package units_test

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"
)

// What a machine of fleet has: its configuration, its service and its sockets.
const (
	fleetConf = `etcd_servers="%s"
etcd_key_prefix=/fleet_functional/smoke
public_ip=%s
agent_ttl=4s
metadata=hostname=%s
`
	fleetService = `[Unit]
After=fleet.socket
[Service]
ExecStart=/usr/local/bin/fleetd -config /etc/fleet/fleet.conf
[Install]
WantedBy=multi-user.target
`
	fleetSocket = `[Socket]
ListenStream=/run/fleet.sock
ListenStream=54728
SocketMode=0666
Service=fleet.service
`
)

// daemons is the usual cluster with fleetd on its nodes, and etcd beside it as
// fleet has it.
func daemons(t *testing.T) *cluster {
	t.Helper()
	c := clusterMade(t, "usual", "--nodes", "3", "--set", "machine-ttl=4")
	if !c.fleetd {
		c.leaveFleetd(t) // an earlier run of the tests may have left it
		c.clean(t)
	}
	var etcd []string
	for _, n := range c.nodes {
		etcd = append(etcd, "http://"+n.Address+":2379")
	}
	files := func(n node) string {
		return fmt.Sprintf("mkdir -p /etc/fleet; cat >/etc/fleet/fleet.conf <<'END'\n%sEND\n", fmt.Sprintf(fleetConf, strings.Join(etcd, ","), n.Address, n.Name)) +
			"cat >/etc/systemd/system/fleet.service <<'END'\n" + fleetService + "END\n" +
			"cat >/etc/systemd/system/fleet.socket <<'END'\n" + fleetSocket + "END\n"
	}
	c.everywhere(t, func(n node) string {
		if c.fleetd { // a test may have stopped some of it
			return "systemctl start fleet.socket fleet.service"
		}
		return files(n) + "systemctl stop flotilla-node.service; systemctl daemon-reload; systemctl start fleet.socket fleet.service"
	})
	c.fleetd, c.settled = true, false
	c.ready(t)
	return c
}

// leaveFleetd makes a node of flotilla of one that may run fleetd.
const leaveFleetd = `if [ -e /etc/systemd/system/fleet.service ]; then
	systemctl stop fleet.socket fleet.service
	rm /etc/systemd/system/fleet.*
	systemctl daemon-reload
	systemctl start flotilla-node.service
fi`

func (c *cluster) leaveFleetd(t *testing.T) {
	t.Helper()
	if !c.settled {
		c.everywhere(t, func(node) string { return leaveFleetd })
		c.fleetd, c.settled = false, true
	}
}

// fleetState returns ActiveState and Result of a node's fleet.service.
func (c *cluster) fleetState(t *testing.T, n node) string {
	t.Helper()
	return strings.Join(strings.Fields(c.on(t, n.Name, "systemctl show -P ActiveState -P Result fleet.service")), " ")
}

// TestFleetdStopMoves: fleetd takes its units off when it is stopped. The one in
// conflict with others goes to the free machine, and nobody else moves.
func TestFleetdStopMoves(t *testing.T) {
	c := daemons(t)
	var paths []string
	for i := range 2 {
		paths = append(paths, unit(t, fmt.Sprintf("conflict.%d.service", i), "[X-Fleet]", "Conflicts=conflict.*.service"))
	}
	c.fleet(t, append([]string{"start"}, paths...)...)
	where := c.active(t)
	from := where["conflict.0.service"]
	if len(where) != 2 || from == where["conflict.1.service"] {
		t.Fatalf("two units that conflict are on %v", where)
	}
	c.on(t, c.node(t, from).Name, "systemctl stop fleet.socket fleet.service")
	c.waitFor(t, "conflict.0.service to go to the free machine", func() bool {
		now := c.active(t)
		to := now["conflict.0.service"]
		return to != "" && !strings.Contains(to, ",") && to != from && len(c.machines(t)) == 2
	})
	if now := c.active(t); now["conflict.1.service"] != where["conflict.1.service"] || now["conflict.0.service"] == now["conflict.1.service"] {
		t.Errorf("units are on %v, and were on %v", now, where)
	}
}

// TestFleetdStopTogether: units that belong together leave a machine together.
func TestFleetdStopTogether(t *testing.T) {
	c := daemons(t)
	args := []string{"start", "--no-block"}
	for i := range 3 {
		args = append(args, unit(t, fmt.Sprintf("ping.%d.service", i)),
			unit(t, fmt.Sprintf("pong.%d.service", i), "[X-Fleet]", fmt.Sprintf("MachineOf=ping.%d.service", i)))
	}
	c.fleet(t, args...)
	where := c.waitActive(t, 6)
	paired := func() bool {
		for i := range 3 {
			if !together(where, fmt.Sprintf("ping.%d.service", i), fmt.Sprintf("pong.%d.service", i)) {
				return false
			}
		}
		return true
	}
	if !paired() {
		t.Fatalf("pairs are not together: %v", where)
	}
	from := c.node(t, where["ping.1.service"])
	c.on(t, from.Name, "systemctl stop fleet.socket fleet.service")
	c.waitFor(t, "the pairs to be together elsewhere", func() bool {
		where = c.active(t)
		for _, m := range where {
			if m == from.MachineID {
				return false
			}
		}
		return len(where) == 6 && paired()
	})
}

// TestFleetdStopPinned: a unit that may be nowhere else ends when its machine
// leaves.
func TestFleetdStopPinned(t *testing.T) {
	c := daemons(t)
	n := c.nodes[0]
	c.fleet(t, "start", unit(t, "pinned.service", "[X-Fleet]", "MachineID="+n.MachineID))
	c.waitActive(t, 1)
	c.on(t, n.Name, "systemctl stop fleet.socket fleet.service")
	c.waitFor(t, "the machine and its unit to be gone", func() bool { return len(c.machines(t)) == 2 && len(c.units(t)) == 0 })
	if state := strings.TrimSpace(c.on(t, n.Name, "systemctl show -P ActiveState pinned.service")); state != "inactive" {
		t.Errorf("pinned.service is %s on the machine that has left", state)
	}
}

// TestFleetdStop: it ends well.
func TestFleetdStop(t *testing.T) {
	c := daemons(t)
	c.on(t, c.nodes[1].Name, "systemctl stop fleet.socket fleet.service")
	if got := c.fleetState(t, c.nodes[1]); got != "success inactive" && got != "inactive success" {
		t.Errorf("fleet.service is %s after it was stopped", got)
	}
}

// TestFleetdReload: on SIGHUP the configuration is read again, and the sockets
// stay.
func TestFleetdReload(t *testing.T) {
	c := daemons(t)
	n := c.nodes[0]
	c.on(t, n.Name, "test -S /var/run/fleet.sock")
	c.fleet(t, "start", unit(t, "hello.service"))
	c.fleet(t, "unload", "hello.service")
	journal := func() string {
		return c.on(t, n.Name, `journalctl --no-pager -o cat _SYSTEMD_INVOCATION_ID="$(systemctl show -P InvocationID fleet.service)"`)
	}
	c.on(t, n.Name, "kill -HUP $(pidof fleetd)")
	c.waitFor(t, "the configuration to be read again", func() bool { return strings.Contains(journal(), "Reloading configuration") })
	c.waitFor(t, "an answer", func() bool {
		return c.run("", "cluster", "shell", "--cluster", c.name, n.Name, "fleetctl list-units").code == 0
	})
	if strings.Contains(journal(), "Failed serving HTTP on listener:") {
		t.Errorf("it does not serve any more:\n%s", journal())
	}
	if got := c.fleetState(t, n); got != "success active" && got != "active success" {
		t.Errorf("fleet.service is %s after SIGHUP", got)
	}
}

// TestFleetdStopWithoutStore: it ends well also when etcd does not answer.
func TestFleetdStopWithoutStore(t *testing.T) {
	c := daemons(t)
	n := c.nodes[2]
	rule := "OUTPUT -p tcp --dport 2379 -j DROP"
	c.on(t, n.Name, "iptables -I "+rule)
	t.Cleanup(func() {
		c.on(t, n.Name, "iptables -D "+rule)
		c.on(t, n.Name, "systemctl start fleet.socket fleet.service")
		c.waitFor(t, "the machine to be back", func() bool { return len(c.machines(t)) == len(c.nodes) })
	})
	c.waitFor(t, "it to say that etcd is away", func() bool {
		r := c.run("", "cluster", "shell", "--cluster", c.name, n.Name, "timeout 10 fleetctl list-machines")
		return strings.Contains(r.err, "fleet server unable to communicate with etcd")
	})
	c.waitFor(t, "its journal to say so", func() bool {
		return strings.Contains(c.on(t, n.Name, "journalctl --no-pager -b -u fleet -o cat"), "Server monitor triggered: Monitor timed out before successful heartbeat")
	})
	c.within(t, 2*time.Minute, "fleet.service to stop", func() bool {
		c.on(t, n.Name, "systemctl stop fleet.socket fleet.service")
		return true
	})
	if got := c.fleetState(t, n); got != "success inactive" && got != "inactive success" {
		t.Errorf("fleet.service is %s after it was stopped", got)
	}
}

// TestFleetdSameMachineID: a machine with the ID of another one stays out, says
// so, and is up.
func TestFleetdSameMachineID(t *testing.T) {
	c := daemons(t)
	first, second := c.nodes[0], c.nodes[1]
	identify := func(n node, id string) {
		c.on(t, n.Name, "echo "+id+" >/etc/machine-id; systemctl restart fleet.service")
	}
	t.Cleanup(func() {
		c.on(t, second.Name, "systemctl stop fleet.service")
		identify(first, first.MachineID)
		identify(second, second.MachineID)
		c.waitFor(t, "the machines to be themselves", func() bool {
			ids := c.machines(t)
			return len(ids) == 3 && slices.Contains(ids, first.MachineID) && slices.Contains(ids, second.MachineID)
		})
	})
	identify(second, first.MachineID)
	if got := c.fleetState(t, second); got != "success active" && got != "active success" {
		t.Errorf("fleet.service with the ID of another machine is %s", got)
	}
	r := c.run("", "cluster", "shell", "--cluster", c.name, second.Name, "fleetctl list-machines")
	if r.code != 1 || !strings.Contains(r.err, "fleet server unable to communicate with etcd") {
		t.Errorf("list-machines on the machine with the ID of another: exit code %d\n%s%s", r.code, r.out, r.err)
	}
	identify(first, strings.Repeat("ab", 16))
	c.on(t, first.Name, "fleetctl list-machines")
	c.waitFor(t, "both machines", func() bool {
		ids := c.machines(t)
		return len(ids) == 3 && slices.Contains(ids, first.MachineID) && slices.Contains(ids, strings.Repeat("ab", 16))
	})
}

// TestFleetctlTunnel: units started through ssh, by a user who is not root.
func TestFleetctlTunnel(t *testing.T) {
	c := daemons(t)
	far := c.throughSSH(t)
	for _, args := range [][]string{
		{"start", unit(t, "hello.service")},
		append([]string{"start"}, instances(t, "batch", 10)...),
	} {
		if r := far("", args...); r.code != 0 || strings.Contains(r.err, "Error") {
			t.Fatalf("through a tunnel: exit code %d\n%s%s", r.code, r.out, r.err)
		}
	}
	c.waitActive(t, 11)
}
