//go:build cluster

package units_test

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
)

// together reports whether two units run on one machine, and only there.
func together(where map[string]string, a, b string) bool {
	return where[a] != "" && where[a] == where[b] && !strings.Contains(where[a], ",")
}

// TestConflicts: five units that conflict with each other have three machines.
func TestConflicts(t *testing.T) {
	c := usual(t)
	paths := []string{"start", "--no-block"}
	for i := range 5 {
		paths = append(paths, unit(t, fmt.Sprintf("conflict.%d.service", i), "[X-Fleet]", "Conflicts=conflict.*.service"))
	}
	c.ok(t, paths...)
	where := c.waitActive(t, 3)
	if machines := slices.Compact(slices.Sorted(maps.Values(where))); len(machines) != 3 {
		t.Errorf("three units that conflict run on %d machines: %v", len(machines), where)
	}
	for _, u := range c.unitFiles(t) {
		if where[u[0]] == "" && u[2] != "inactive" {
			t.Errorf("%v is on no machine, and not inactive", u)
		}
	}
}

// TestConflictOneWay: a conflict that only one of two units names holds for both,
// and the other one starts as soon as the first is gone.
func TestConflictOneWay(t *testing.T) {
	c := usual(t)
	id := c.nodes[0].MachineID
	pin := "MachineMetadata=only=here"
	c.ok(t, "nodes", "metadata", "set", c.nodes[0].Name, "only=here")
	t.Cleanup(func() { c.ok(t, "nodes", "metadata", "remove", c.nodes[0].Name, "only") })
	c.ok(t, "start", unit(t, "first.service", "[X-Fleet]", "Conflicts=second.service", pin))
	c.ok(t, "start", "--no-block", unit(t, "second.service", "[X-Fleet]", pin))
	c.waitFor(t, "the reason why the second is nowhere", func() bool {
		return strings.Contains(c.run("", "explain", "second.service").out, "conflict")
	})
	if where := c.active(t); where["first.service"] != id || where["second.service"] != "" {
		t.Fatalf("units run at %v, want first.service only, on %s", where, id)
	}
	c.ok(t, "destroy", "first.service")
	c.waitFor(t, "second.service to take its place", func() bool {
		where := c.active(t)
		return where["second.service"] == id && where["first.service"] == ""
	})
}

// TestConflictLines: patterns on one line and on several.
func TestConflictLines(t *testing.T) {
	c := usual(t)
	c.ok(t, "start",
		unit(t, "a.service", "[X-Fleet]", "Conflicts=b.service c.service"),
		unit(t, "b.service", "[X-Fleet]", "Conflicts=a.service", "Conflicts=c.service"),
		unit(t, "c.service"))
	if where := c.waitActive(t, 3); len(slices.Compact(slices.Sorted(maps.Values(where)))) != 3 {
		t.Errorf("units are not on three machines: %v", where)
	}
}

// TestMachineOf: pairs are together, and stay together when they move.
func TestMachineOf(t *testing.T) {
	c := usual(t)
	paths := []string{"start", "--no-block"}
	for i := range 3 {
		paths = append(paths, unit(t, fmt.Sprintf("ping.%d.service", i)),
			unit(t, fmt.Sprintf("pong.%d.service", i), "[X-Fleet]", fmt.Sprintf("MachineOf=ping.%d.service", i)))
	}
	c.ok(t, paths...)
	where := c.waitActive(t, 6)
	paired := func() bool {
		where = c.active(t)
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
	from := c.node(t, where["ping.0.service"])
	c.ok(t, "nodes", "drain", from.Name)
	t.Cleanup(func() { c.ok(t, "nodes", "uncordon", from.Name) })
	c.waitFor(t, "the pairs to be together elsewhere", func() bool {
		return paired() && !slices.Contains(slices.Collect(maps.Values(where)), from.MachineID)
	})
}

// TestReplaces: the unit that replaces another takes its place, and that one
// goes elsewhere.
func TestReplaces(t *testing.T) {
	c := usual(t)
	c.ok(t, "start", unit(t, "old.service"))
	c.ok(t, "start", unit(t, "other.1.service"), unit(t, "other.2.service"), unit(t, "other.3.service"), unit(t, "other.4.service"))
	was := c.waitActive(t, 5)["old.service"]
	c.ok(t, "start", unit(t, "new.service", "[X-Fleet]", "Replaces=old.service", "MachineMetadata=any=thing"), "--no-block")
	c.ok(t, "nodes", "metadata", "set", c.node(t, was).Name, "any=thing")
	t.Cleanup(func() { c.ok(t, "nodes", "metadata", "remove", c.node(t, was).Name, "any") })
	c.waitFor(t, "new.service to take the place of old.service", func() bool {
		where := c.active(t)
		return where["new.service"] == was && where["old.service"] != "" && where["old.service"] != was
	})
}

// TestReplacesEachOther: of two units that replace each other one runs.
func TestReplacesEachOther(t *testing.T) {
	c := usual(t)
	c.ok(t, "start", "--no-block",
		unit(t, "left.service", "[X-Fleet]", "Replaces=right.service", "MachineMetadata=disk=ssd"),
		unit(t, "right.service", "[X-Fleet]", "Replaces=left.service", "MachineMetadata=disk=ssd"))
	c.ok(t, "nodes", "metadata", "set", c.nodes[1].Name, "disk=ssd")
	t.Cleanup(func() { c.ok(t, "nodes", "metadata", "remove", c.nodes[1].Name, "disk") })
	c.waitActive(t, 1)
	launched := 0
	for _, u := range c.unitFiles(t) {
		if u[2] == "launched" {
			launched++
		}
	}
	if launched != 1 {
		t.Errorf("%d units are launched, want 1", launched)
	}
}

// TestMachineID: each unit on the machine that it names.
func TestMachineID(t *testing.T) {
	c := usual(t)
	args := []string{"start"}
	for i, n := range c.nodes {
		args = append(args, unit(t, fmt.Sprintf("pinned.%d.service", i), "[X-Fleet]", "MachineID="+n.MachineID))
	}
	c.ok(t, args...)
	where := c.active(t)
	for i, n := range c.nodes {
		if got := where[fmt.Sprintf("pinned.%d.service", i)]; got != n.MachineID {
			t.Errorf("the unit for %s runs on %q", n.MachineID, got)
		}
	}
}

// TestGlobal: a global unit has a copy on every machine, beside others.
func TestGlobal(t *testing.T) {
	c := usual(t)
	c.ok(t, "start", unit(t, "one.service"), unit(t, "two.service"))
	c.ok(t, "start", unit(t, "everywhere.service", "[X-Fleet]", "Global=true"))
	where := c.waitActive(t, 5)
	if got := strings.Split(where["everywhere.service"], ","); len(got) != 3 {
		t.Errorf("the global unit is on %v", got)
	}
	if r := c.fleetctl("status", "--no-block", "everywhere.service"); r.code != 0 {
		t.Errorf("status of a global unit: exit code %d\n%s%s", r.code, r.out, r.err)
	}
	c.ok(t, "status", "everywhere.service")
	c.fleet(t, "restart", "everywhere.service")
	c.waitActive(t, 5)
}

// TestGlobalConflict: of two global units in conflict the first one runs.
func TestGlobalConflict(t *testing.T) {
	c := usual(t)
	c.ok(t, "start", unit(t, "z-first.service", "[X-Fleet]", "Global=true", "Conflicts=a-second.service"))
	c.waitActive(t, 3)
	c.ok(t, "start", unit(t, "a-second.service", "[X-Fleet]", "Global=true"))
	c.waitFor(t, "the reason why the second is nowhere", func() bool {
		return strings.Contains(c.run("", "explain", "a-second.service").out, "z-first.service")
	})
	if where := c.active(t); len(where) != 1 || len(strings.Split(where["z-first.service"], ",")) != 3 {
		t.Errorf("units run at %v, want z-first.service on three machines", where)
	}
}

// TestTemplateMetadata: instances say by their name where they want to be.
func TestTemplateMetadata(t *testing.T) {
	c := usual(t)
	for _, n := range c.nodes {
		c.ok(t, "nodes", "metadata", "set", n.Name, "hostname="+n.Name)
	}
	t.Cleanup(func() {
		for _, n := range c.nodes {
			c.ok(t, "nodes", "metadata", "remove", n.Name, "hostname")
		}
	})
	c.ok(t, "submit", unit(t, "metadata@.service", "[X-Fleet]", "MachineMetadata=hostname=%i"))
	for _, n := range c.nodes {
		c.ok(t, "start", "metadata@"+n.Name+".service")
	}
	where := c.active(t)
	for _, n := range c.nodes {
		if got := where["metadata@"+n.Name+".service"]; got != n.MachineID {
			t.Errorf("the instance for %s runs on %q", n.Name, got)
		}
	}
	if r := c.run("", "start", "--block-attempts", "20", "metadata@invalid.service"); r.code == 0 {
		t.Errorf("the start of a unit that no machine takes succeeded:\n%s%s", r.out, r.err)
	} else if !strings.Contains(r.out+r.err, "hostname") {
		t.Errorf("no reason is given:\n%s%s", r.out, r.err)
	}
}

// TestLeave: a machine that leaves stops what it has, and comes back when its
// node is started again.
func TestLeave(t *testing.T) {
	c := usual(t)
	c.ok(t, "start", unit(t, "a.service"), unit(t, "b.service"), unit(t, "c.service"))
	c.ok(t, "start", unit(t, "everywhere.service", "[X-Fleet]", "Global=true"))
	leaves := c.node(t, c.waitActive(t, 6)["a.service"])
	c.on(t, leaves.Name, "flotilla nodes leave")
	t.Cleanup(func() { c.on(t, leaves.Name, "systemctl restart flotilla-node") })
	if out := c.on(t, leaves.Name, "systemctl list-units --no-legend a.service b.service c.service everywhere.service"); out != "" {
		t.Errorf("units are left on the machine:\n%s", out)
	}
	where := c.waitActive(t, 5)
	if slices.Contains(strings.Split(strings.Join(slices.Collect(maps.Values(where)), ","), ","), leaves.MachineID) {
		t.Errorf("units run on the machine that left: %v", where)
	}
	if n := len(c.machines(t)); n != 2 {
		t.Errorf("%d machines are left, want 2", n)
	}
	c.on(t, leaves.Name, "systemctl restart flotilla-node")
	c.waitActive(t, 6)
}
