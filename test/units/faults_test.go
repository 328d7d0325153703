//go:build cluster

package units_test

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"flotilla/internal/nspawn"
)

// faulty is the cluster of the tests of failures: three nodes with the usual
// times, so that how long things take means something.
func faulty(t *testing.T) *cluster { return faultyOf(t, "faulty", "--nodes", "3") }

func faultyOf(t *testing.T, name string, args ...string) *cluster {
	c := clusterOf(t, name, args...)
	t.Cleanup(func() { // before the units are destroyed
		c.each(func(n node) {
			_ = c.run("", "cluster", "power", "--cluster", c.name, n.Name, "on")
			_ = c.run("", "cluster", "link", "--cluster", c.name, n.Name, "up")
			_ = c.run("", "nodes", "uncordon", n.Name)
		})
		c.within(t, 3*time.Minute, "all nodes to be back", func() bool { return len(c.machines(t)) == len(c.nodes) })
	})
	for _, n := range c.nodes {
		c.inside(t, n, "rm -f "+copies)
	}
	return c
}

// inside runs a shell command on a node as root, also if its link is cut. It has
// to succeed.
func (c *cluster) inside(t *testing.T, n node, command string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute) // clean-up needs it as well
	defer cancel()
	cl, err := nspawn.Default(slog.New(slog.DiscardHandler)).Cluster(c.name)
	if err != nil {
		t.Fatal(err)
	}
	login := cl.SSH(ctx, n.Name, command)
	for {
		cmd := exec.CommandContext(ctx, "ip", append([]string{"netns", "exec", "flotilla-" + c.name + "." + n.Name}, login.Args...)...)
		out, err := cmd.Output()
		switch {
		case err == nil:
			return string(out)
		case cmd.ProcessState.ExitCode() == 255 && ctx.Err() == nil: // the node is booting
			time.Sleep(100 * time.Millisecond)
		default:
			t.Fatalf("on %s: %s: %v", n.Name, command, err)
		}
	}
}

func (c *cluster) power(t *testing.T, n node, what string) {
	t.Helper()
	c.ok(t, "cluster", "power", "--cluster", c.name, n.Name, what)
}

func (c *cluster) link(t *testing.T, n node, what string) {
	t.Helper()
	c.ok(t, "cluster", "link", "--cluster", c.name, n.Name, what)
}

// running returns the process and the invocation of each active unit that the
// patterns match, by node and name.
func (c *cluster) running(t *testing.T, patterns string, nodes ...node) map[string]string {
	t.Helper()
	all := map[string]string{}
	for _, n := range nodes {
		out := c.inside(t, n, "systemctl show -p Id -p MainPID -p InvocationID -p ActiveState "+patterns)
		for paragraph := range strings.SplitSeq(out, "\n\n") {
			values := map[string]string{}
			for line := range strings.Lines(paragraph) {
				key, value, _ := strings.Cut(strings.TrimSpace(line), "=")
				values[key] = value
			}
			if values["ActiveState"] == "active" {
				all[n.Name+"/"+values["Id"]] = values["MainPID"] + " " + values["InvocationID"]
			}
		}
	}
	return all
}

// untouched fails unless the units run as they did.
func (c *cluster) untouched(t *testing.T, patterns string, before map[string]string, nodes ...node) {
	t.Helper()
	if diff := cmp.Diff(before, c.running(t, patterns, nodes...)); diff != "" {
		t.Errorf("units were touched (-before +after):\n%s", diff)
	}
}

// copies is where each copy of a beating unit says that it runs.
const copies = "/var/log/copies"

// beating is a unit that writes down ten times a second that it runs, and when,
// by the clock that all nodes share.
func beating(t *testing.T, name string, lines ...string) string {
	t.Helper()
	return unit(t, name, append([]string{"[Service]",
		`ExecStart=/bin/sh -c 'trap : TERM; while read now rest </proc/uptime; do echo "%n $$INVOCATION_ID $$now" >>` + copies + `; sleep 0.1; done'`,
		"KillSignal=SIGKILL"}, lines...)...)
}

// span is how long a copy ran, in seconds of the shared clock.
type span struct {
	node, invocation string
	first, last      float64
}

// spans returns what ran of each beating unit, in the order of the starts.
func (c *cluster) spans(t *testing.T) map[string][]span {
	t.Helper()
	all := map[string][]span{}
	for _, n := range c.nodes {
		at := map[string]*span{}
		var order []string
		for line := range strings.Lines(c.inside(t, n, "cat "+copies+" || :")) {
			fields := strings.Fields(line)
			if len(fields) != 3 {
				continue // the power was cut
			}
			now, err := strconv.ParseFloat(fields[2], 64)
			if err != nil {
				continue
			}
			key := fields[0] + " " + fields[1]
			if at[key] == nil {
				at[key] = &span{n.Name, fields[1], now, now}
				order = append(order, key)
			}
			at[key].last = now
		}
		for _, key := range order {
			name, _, _ := strings.Cut(key, " ")
			all[name] = append(all[name], *at[key])
		}
	}
	for _, list := range all {
		slices.SortFunc(list, func(a, b span) int { return int(1000 * (a.first - b.first)) })
	}
	return all
}

// apart fails if two copies of one of the units ever ran at once, or none ran.
func (c *cluster) apart(t *testing.T, units ...string) {
	t.Helper()
	all := c.spans(t)
	for _, name := range units {
		list := all[name]
		if len(list) == 0 {
			t.Errorf("%s never ran", name)
		}
		for i := 1; i < len(list); i++ {
			before := list[i-1]
			for _, s := range list[:i] {
				if s.last > before.last {
					before = s
				}
			}
			t.Logf("%s: on %s %.2f s after it ended on %s", name, list[i].node, list[i].first-before.last, before.node)
			if list[i].first <= before.last {
				t.Errorf("two copies of %s ran at once: %+v and %+v", name, before, list[i])
			}
		}
	}
}

// start starts units, on that node only if it is not the zero node.
func (c *cluster) start(t *testing.T, on node, paths ...string) {
	t.Helper()
	for _, n := range c.nodes {
		if on.Name != "" && n.Name != on.Name {
			c.ok(t, "nodes", "cordon", n.Name)
		}
	}
	c.ok(t, append([]string{"start"}, paths...)...)
	for _, n := range c.nodes {
		if on.Name != "" && n.Name != on.Name {
			c.ok(t, "nodes", "uncordon", n.Name)
		}
	}
}

func (c *cluster) others(n node) []node {
	return slices.DeleteFunc(slices.Clone(c.nodes), func(o node) bool { return o.Name == n.Name })
}

// TestPowerCut: the units of a node without power are elsewhere soon, and no
// other unit notices. When it is back, it has its own units again.
func TestPowerCut(t *testing.T) {
	c := faulty(t)
	var paths []string
	for i := range 9 {
		paths = append(paths, unit(t, fmt.Sprintf("still-%d.service", i)))
	}
	victim := c.nodes[1]
	c.ok(t, append([]string{"start"}, paths...)...)
	c.ok(t, "start", unit(t, "own.service", "[X-Fleet]", "MachineID="+victim.MachineID))
	c.ok(t, "start", unit(t, "all.service", "[X-Fleet]", "Global=true"))
	c.waitActive(t, 13)
	before := c.running(t, "'still-*' all.service", c.others(victim)...)

	c.power(t, victim, "cut")
	began := time.Now()
	c.within(t, 2*time.Minute, "the units of "+victim.Name+" to be elsewhere", func() bool {
		where := c.active(t)
		for i := range paths {
			at := where[fmt.Sprintf("still-%d.service", i)]
			if at == "" || strings.Contains(at, victim.MachineID) {
				return false
			}
		}
		return true
	})
	t.Logf("failover took %.1f s", time.Since(began).Seconds())
	for name, process := range c.running(t, "'still-*' all.service", c.others(victim)...) {
		if before[name] != "" && before[name] != process {
			t.Errorf("%s was %s, and is %s", name, before[name], process)
		}
	}
	c.power(t, victim, "on")
	began = time.Now()
	c.within(t, 2*time.Minute, "the node to run its own units again", func() bool {
		where := c.active(t)
		return where["own.service"] == victim.MachineID && strings.Contains(where["all.service"], victim.MachineID)
	})
	t.Logf("back with its own units after %.1f s", time.Since(began).Seconds())
	c.waitActive(t, 13)
}

// TestReboot: a node that is back before its lease has ended starts its units
// again, cleanly shut down or not.
func TestReboot(t *testing.T) {
	c := faulty(t)
	victim := c.nodes[2]
	c.start(t, victim, unit(t, "one.service"), unit(t, "two.service"), beating(t, "only.service", "[X-Fleet]", "Exclusive=yes"))
	for _, how := range [][]string{{"reboot"}, {"cut", "on"}} {
		before := c.running(t, "one.service two.service only.service", c.nodes...)
		if len(before) != 3 {
			t.Fatalf("three units should run: %v", before)
		}
		began := time.Now()
		for _, what := range how {
			c.power(t, victim, what)
		}
		t.Logf("%v: booted after %.1f s", how, time.Since(began).Seconds())
		var now map[string]string
		c.within(t, 2*time.Minute, "the units to run again", func() bool {
			now = c.running(t, "one.service two.service only.service", c.nodes...)
			for name := range now {
				if now[name] == before[name] {
					t.Fatalf("%s was not rebooted", name)
				}
			}
			return len(now) == 3 && len(c.active(t)) == 3
		})
		t.Logf("%v: units are up after %.1f s: %v", how, time.Since(began).Seconds(), now)
	}
	c.apart(t, "only.service")
}

// storeLeader returns the node whose store leads the others.
func (c *cluster) storeLeader(t *testing.T) node {
	t.Helper()
	var leader node
	c.waitFor(t, "a leader of the store", func() bool {
		for _, n := range c.nodes {
			out, err := exec.Command("etcdctl", "--endpoints", "http://"+n.Address+":2379", "endpoint", "status", "-w", "json").Output()
			var status []struct {
				Status struct {
					Header struct {
						Member uint64 `json:"member_id"`
					} `json:"header"`
					Leader uint64 `json:"leader"`
				}
			}
			if err == nil && json.Unmarshal(out, &status) == nil && len(status) == 1 && status[0].Status.Leader == status[0].Status.Header.Member {
				leader = n
				return true
			}
		}
		return false
	})
	return leader
}

// TestStoreLeaderLost: the store's leader is killed while a unit is started.
func TestStoreLeaderLost(t *testing.T) {
	c := faulty(t)
	c.start(t, node{}, unit(t, "still-1.service"), unit(t, "still-2.service"), unit(t, "still-3.service"),
		unit(t, "still-only.service", "[X-Fleet]", "Exclusive=yes"))
	before := c.running(t, "'still-*'", c.nodes...)
	for i := range 2 {
		leader := c.storeLeader(t)
		c.inside(t, leader, "systemctl kill -s KILL flotilla-store")
		began := time.Now()
		c.within(t, time.Minute, "a start to be accepted", func() bool {
			return c.run("", "start", unit(t, fmt.Sprintf("new-%d.service", i))).code == 0
		})
		t.Logf("a start without the store's leader (%s) took %.1f s", leader.Name, time.Since(began).Seconds())
	}
	c.waitActive(t, 6)
	c.untouched(t, "'still-*'", before, c.nodes...)
}

// storeAway takes the store away from all nodes, and returns what brings it back,
// on one node after the other: members that start at the same moment wait for
// each other's checksums for up to 14 s, and nothing is known of them meanwhile.
func (c *cluster) storeAway(t *testing.T) (back func()) {
	t.Helper()
	// A node that starts wants its store: a condition keeps that from starting.
	const away = "/run/systemd/system/flotilla-store.service.d"
	leave := "mkdir -p " + away + "; printf '[Unit]\\nConditionPathExists=/nowhere\\n' >" + away + "/away.conf; systemctl daemon-reload; systemctl stop flotilla-store"
	start := "rm -rf " + away + "; systemctl daemon-reload; systemctl start flotilla-store"
	back = func() {
		for _, n := range c.nodes {
			c.inside(t, n, start)
		}
	}
	t.Cleanup(back)
	c.everywhere(t, func(node) string { return leave })
	return back
}

// onlys starts one exclusive unit on each node, and returns their names.
func (c *cluster) onlys(t *testing.T, prefix string) (names []string) {
	t.Helper()
	for _, n := range c.nodes {
		name := prefix + n.Name + ".service"
		c.start(t, n, beating(t, name, "[X-Fleet]", "Exclusive=yes"))
		names = append(names, name)
	}
	return names
}

// TestStoreAway: the store is away for a minute, and nodes are killed meanwhile.
// All units run on but the exclusive ones: these stop when their node has not
// reached the store in time, and run again with it.
func TestStoreAway(t *testing.T) {
	c := faulty(t)
	var paths []string
	for i := range 6 {
		paths = append(paths, unit(t, fmt.Sprintf("still-%d.service", i)))
	}
	only := c.onlys(t, "only-")
	c.start(t, node{}, append(paths, beating(t, "clock.service"))...)
	c.ok(t, "start", unit(t, "still-all.service", "[X-Fleet]", "Global=true"))
	c.waitActive(t, 13)
	before := c.running(t, "'still-*' clock.service", c.nodes...)

	back := c.storeAway(t)
	began := time.Now()
	c.within(t, 20*time.Second, "the exclusive units to stop", func() bool { return len(c.running(t, "'only-*'", c.nodes...)) == 0 })
	c.untouched(t, "'still-*' clock.service", before, c.nodes...)
	for _, n := range c.nodes[:2] {
		c.inside(t, n, "systemctl kill -s KILL --kill-whom=main flotilla-node")
	}
	c.within(t, 2*time.Minute, "a minute to pass", func() bool { return time.Since(began) > time.Minute })
	c.untouched(t, "'still-*' clock.service", before, c.nodes...)
	if runs := c.running(t, "flotilla-store.service 'only-*'", c.nodes...); len(runs) > 0 {
		t.Errorf("these run while the store is away: %v", runs)
	}
	back()
	began = time.Now()
	c.within(t, 2*time.Minute, "the exclusive units to run again", func() bool { return len(c.running(t, "'only-*'", c.nodes...)) == 3 })
	t.Logf("exclusive units run again %.1f s after the store was started", time.Since(began).Seconds())
	c.waitActive(t, 13)
	c.within(t, time.Minute, "what it has missed to happen", func() bool { return time.Since(began) > 30*time.Second })
	c.untouched(t, "'still-*' clock.service", before, c.nodes...)
	c.apart(t, only...)
}

// TestUpgrade: no unit notices that its node's process is another one.
func TestUpgrade(t *testing.T) {
	c := faulty(t)
	c.start(t, node{}, unit(t, "still-1.service"), unit(t, "still-2.service"), unit(t, "still-3.service"),
		unit(t, "still-only.service", "[X-Fleet]", "Exclusive=yes"))
	c.ok(t, "start", unit(t, "still-all.service", "[X-Fleet]", "Global=true"))
	c.waitActive(t, 7)
	before := c.running(t, "'still-*'", c.nodes...)
	for _, n := range c.nodes {
		c.inside(t, n, "systemctl restart flotilla-node")
		c.waitFor(t, "the node to be back", func() bool { _, err := os.Stat(n.Run + "/node.sock"); return err == nil })
		c.ok(t, "start", unit(t, "after-"+n.Name+".service"))
		c.untouched(t, "'still-*'", before, c.nodes...)
	}
	c.waitActive(t, 10)
	c.untouched(t, "'still-*'", before, c.nodes...)
}

// TestManyUnits: 200 units on one node.
func TestManyUnits(t *testing.T) {
	c := faulty(t)
	const many = 200
	on := c.nodes[0]
	c.ok(t, "submit", unit(t, "many@.service", "[Service]", "ExecStart=/bin/sleep infinity", "[X-Fleet]", "MachineID="+on.MachineID))
	began := time.Now()
	c.ok(t, "start", "--no-block", fmt.Sprintf("many@{1..%d}", many))
	c.within(t, 5*time.Minute, "all to run", func() bool { return len(c.active(t)) == many })
	t.Logf("%d units started on one node in %.1f s", many, time.Since(began).Seconds())
	before := c.running(t, "'many@*'", on)
	if len(before) != many {
		t.Fatalf("%d units run", len(before))
	}
	c.inside(t, on, "systemctl restart flotilla-node")
	c.within(t, 2*time.Minute, "the node to report its units", func() bool { return len(c.active(t)) == many })
	c.untouched(t, "'many@*'", before, on)
	began = time.Now()
	c.ok(t, "destroy", "many@*")
	c.within(t, 5*time.Minute, "all to be gone", func() bool { return len(c.running(t, "'many@*'", on)) == 0 })
	t.Logf("%d units were gone after %.1f s", many, time.Since(began).Seconds())
}

// TestDrain: cordon, drain, uncordon, move and rebalance.
func TestDrain(t *testing.T) {
	c := faulty(t)
	first, second, third := c.nodes[0], c.nodes[1], c.nodes[2]
	c.start(t, first, unit(t, "a.service"), unit(t, "b.service"), unit(t, "d.service"), beating(t, "only.service", "[X-Fleet]", "Exclusive=yes"))
	c.ok(t, "start", unit(t, "all.service", "[X-Fleet]", "Global=true"))
	for name, at := range c.waitActive(t, 7) {
		if name != "all.service" && at != first.MachineID {
			t.Errorf("%s is on %s although the other machines are cordoned", name, at)
		}
	}
	c.ok(t, "move", "a.service", second.Name)
	c.waitFor(t, "a.service to be on "+second.Name, func() bool { return c.active(t)["a.service"] == second.MachineID })
	c.ok(t, "move", "only.service", third.Name)
	c.waitFor(t, "only.service to be on "+third.Name, func() bool { return c.active(t)["only.service"] == third.MachineID })

	c.ok(t, "nodes", "drain", first.Name)
	c.waitFor(t, "the node to be drained", func() bool {
		where := c.active(t)
		return len(where) == 5 && where["b.service"] != first.MachineID && where["d.service"] != first.MachineID && strings.Contains(where["all.service"], first.MachineID)
	})
	c.ok(t, "nodes", "uncordon", first.Name)
	if out := c.ok(t, "rebalance"); !strings.Contains(out, "service") {
		t.Fatalf("there is nothing to rebalance:\n%s\n%v", out, c.active(t))
	}
	c.ok(t, "rebalance", "--yes")
	c.waitFor(t, "the drained node to have units again", func() bool {
		where := c.active(t)
		delete(where, "all.service")
		n := 0
		for _, at := range where {
			if at == first.MachineID {
				n++
			}
		}
		return len(where) == 4 && n > 0
	})
	c.apart(t, "only.service")
}
