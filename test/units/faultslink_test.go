//go:build cluster

package units_test

import (
	"strings"
	"testing"
	"time"
)

const freeze = "/run/systemd/system/flotilla-node.service.d/dead.conf"

// TestPartition: a node that is cut off keeps its units, which are elsewhere as
// well, but for exclusive ones: of those two copies never run, whatever becomes
// of the node's process.
func TestPartition(t *testing.T) {
	for what, before := range map[string]string{
		"alive":  "",
		"frozen": "systemctl kill -s STOP --kill-whom=main flotilla-node",
		"dead": "mkdir -p " + freeze[:strings.LastIndex(freeze, "/")] + "; printf '[Service]\\nRestart=no\\n' >" + freeze +
			"; systemctl daemon-reload; systemctl kill -s KILL --kill-whom=main flotilla-node",
	} {
		t.Run(what, func(t *testing.T) {
			c := faulty(t)
			cut := c.nodes[2]
			// Not the names of before: one that takes long to stop may still be stopping.
			meek, deaf, again := "only-meek-"+what+".service", "only-deaf-"+what+".service", "only-again-"+what+".service"
			c.start(t, cut, beating(t, "usual.service"),
				beating(t, meek, "[X-Fleet]", "Exclusive=yes"),
				beating(t, deaf, "KillSignal=SIGTERM", "TimeoutStopSec=20", "[X-Fleet]", "Exclusive=yes"),
				beating(t, again, "Restart=always", "RestartSec=0", "KillMode=process", "[X-Fleet]", "Exclusive=yes"))
			was := c.running(t, "usual.service", cut)
			if runs := c.running(t, "usual.service 'only-*'", cut); len(runs) != 4 {
				t.Fatalf("not all run on %s: %v", cut.Name, runs)
			}
			t.Cleanup(func() {
				c.inside(t, cut, "rm -f "+freeze+"; systemctl daemon-reload; systemctl kill -s CONT --kill-whom=main flotilla-node; systemctl start flotilla-node")
			})

			if before != "" {
				c.inside(t, cut, before)
			}
			c.link(t, cut, "down")
			began := time.Now()
			left := map[string]bool{}
			c.within(t, 2*time.Minute, "all to run on the other side", func() bool {
				n := 0
				for name, at := range c.active(t) {
					if !strings.Contains(at, cut.MachineID) {
						if n++; !left[name] {
							t.Logf("%s runs on the other side after %.1f s", name, time.Since(began).Seconds())
						}
						left[name] = true
					}
				}
				return n == 4
			})
			c.untouched(t, "usual.service", was, cut)
			if runs := c.running(t, "'only-*'", cut); len(runs) > 0 {
				t.Errorf("exclusive units still run on %s: %v", cut.Name, runs)
			}
			c.link(t, cut, "up")
			c.inside(t, cut, "rm -f "+freeze+"; systemctl daemon-reload; systemctl kill -s CONT --kill-whom=main flotilla-node; systemctl start flotilla-node")
			began = time.Now()
			c.within(t, 2*time.Minute, "one copy of each to be left", func() bool {
				return len(c.running(t, "usual.service 'only-*'", cut)) == 0 && len(c.machines(t)) == 3
			})
			t.Logf("the second copy was gone %.1f s after the link was back", time.Since(began).Seconds())
			c.waitActive(t, 4)
			c.apart(t, meek, deaf, again)
		})
	}
}

// TestManyGone: of four machines two are cut off at once: what runs on them is
// not all started elsewhere until somebody says so.
func TestManyGone(t *testing.T) {
	c := faulty(t)
	c.ok(t, "cluster", "add", c.name, "--nodes", "1")
	c.refresh(t)
	t.Cleanup(func() {
		c.ok(t, "cluster", "remove", c.name, "n4")
		c.refresh(t)
	})
	third, fourth := c.nodes[2], c.nodes[3]
	c.waitFor(t, "the new machine", func() bool { return len(c.machines(t)) == 4 })
	c.start(t, third, unit(t, "third.service"))
	c.start(t, fourth, unit(t, "fourth.service"))

	c.link(t, third, "down")
	c.link(t, fourth, "down")
	c.within(t, time.Minute, "the machines to be gone", func() bool { return len(c.machines(t)) == 2 })
	// The store may see one go before the other: what ran there is elsewhere then.
	c.within(t, time.Minute, "a unit to be held", func() bool {
		for _, name := range []string{"third.service", "fourth.service"} {
			if strings.Contains(c.run("", "explain", name).out, "allows the failover") {
				return true
			}
		}
		return false
	})
	if told := c.run("", "nodes", "list"); !strings.Contains(told.err, "flotilla failover allow") {
		t.Errorf("nodes list does not say that units are held: %s", told.err)
	}
	c.ok(t, "failover", "allow")
	c.within(t, time.Minute, "the units to be elsewhere", func() bool {
		where := c.active(t)
		for _, name := range []string{"third.service", "fourth.service"} {
			if at := where[name]; at != c.nodes[0].MachineID && at != c.nodes[1].MachineID {
				return false
			}
		}
		return true
	})
	c.link(t, third, "up")
	c.link(t, fourth, "up")
	c.within(t, 2*time.Minute, "one copy of each to be left", func() bool {
		return len(c.machines(t)) == 4 && len(c.running(t, "third.service fourth.service", third, fourth)) == 0
	})
}
