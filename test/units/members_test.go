//go:build cluster

package units_test

import (
	"context"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"flotilla/internal/nspawn"
)

// throughSSH returns what runs fleetctl by way of the first node, as somebody who
// has the cluster's key at home and knows no machine yet, but trusts all.
func (c *cluster) throughSSH(t *testing.T, flags ...string) func(input string, args ...string) result {
	t.Helper()
	home := t.TempDir()
	host, err := nspawn.Default(slog.New(slog.DiscardHandler)).Cluster(c.name)
	if err != nil {
		t.Fatal(err)
	}
	identity, _ := host.Login()
	key, err := os.ReadFile(identity)
	if err == nil {
		err = os.MkdirAll(filepath.Join(home, ".ssh"), 0o700)
	}
	if err == nil {
		err = os.WriteFile(filepath.Join(home, ".ssh", "id_ed25519"), key, 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
	if len(flags) == 0 {
		flags = []string{"--strict-host-key-checking=false"}
	}
	return func(input string, args ...string) result {
		ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
		defer cancel()
		cmd := exec.CommandContext(ctx, fleetctl, append(append([]string{"--tunnel", c.nodes[0].Address}, flags...), args...)...)
		cmd.Env = append(os.Environ(), "HOME="+home)
		return finish(cmd, input)
	}
}

// TestMemberReplaced: another machine takes the place of one, with its name and
// address. Of three units in conflict only the one that was there moves, and ssh
// does not take the new machine for the old one.
func TestMemberReplaced(t *testing.T) {
	c := usual(t)
	args := []string{"start"}
	for i := range 3 {
		args = append(args, unit(t, fmt.Sprintf("conflict.%d.service", i), "[X-Fleet]", "Conflicts=conflict.*.service"))
	}
	c.ok(t, args...)
	where := c.waitActive(t, 3)
	leaving := c.nodes[2]
	known := filepath.Join(t.TempDir(), "known_hosts")
	far := c.throughSSH(t, "--known-hosts-file", known, "--ssh-username", "root")
	if r := far("yes\nyes\n", "ssh", leaving.MachineID[:8], "uptime"); r.code != 0 {
		t.Fatalf("ssh to a new machine: exit code %d\n%s%s", r.code, r.out, r.err)
	}
	if r := far("", "ssh", leaving.MachineID[:8], "uptime"); r.code != 0 {
		t.Fatalf("ssh to a known machine: exit code %d\n%s%s", r.code, r.out, r.err)
	}

	c.ok(t, "cluster", "remove", c.name, leaving.Name)
	c.ok(t, "cluster", "add", c.name, "--timeout", "5m", "--set", "machine-ttl=4")
	c.refresh(t)
	fresh := c.nodes[2]
	if fresh.Name != leaving.Name || fresh.Address != leaving.Address || fresh.MachineID == leaving.MachineID {
		t.Fatalf("%+v was replaced by %+v", leaving, fresh)
	}
	// What the machine that left had is listed until its lease ends.
	c.waitFor(t, "the unit of the machine that left to have moved", func() bool {
		return !slices.Contains(slices.Collect(maps.Values(c.active(t))), leaving.MachineID)
	})
	now := c.waitActive(t, 3)
	for name, machine := range where {
		if moved := now[name] != machine; moved != (machine == leaving.MachineID) {
			t.Errorf("%s was on %s and is on %s; the machine that left is %s", name, machine, now[name], leaving.MachineID)
		}
	}

	r := far("yes\nyes\n", "ssh", fresh.MachineID[:8], "uptime")
	if r.code == 0 || !strings.Contains(r.err, "key") {
		t.Errorf("ssh to another machine with the address of a known one: exit code %d\n%s%s", r.code, r.out, r.err)
	}
	if err := os.WriteFile(known, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if r := far("yes\nyes\n", "ssh", fresh.MachineID[:8], "uptime"); r.code != 0 {
		t.Errorf("ssh after the known hosts were forgotten: exit code %d\n%s%s", r.code, r.out, r.err)
	}
}

// old is one node alone, with the systemd and the HAProxy of the release before.
func old(t *testing.T) *cluster {
	t.Helper()
	return clusterOf(t, "old", "--nodes", "1", "--release", "bookworm", "--set", "machine-ttl=4")
}

// TestStoreAwayFromLoneNode: what runs on a node alone goes on when its store is
// away, and nothing is stopped or forgotten.
func TestStoreAwayFromLoneNode(t *testing.T) {
	c := old(t)
	n := c.nodes[0].Name
	for _, kind := range []string{"single", "global"} {
		path := unit(t, kind+"@.service", "[X-Fleet]", "Global="+fmt.Sprint(kind == "global"))
		for verb, state := range map[string]string{"submit": "inactive", "load": "loaded", "start": "launched"} {
			c.ok(t, verb, filepath.Join(filepath.Dir(path), kind+"@"+state+".service"))
		}
	}
	c.waitActive(t, 2)
	show := `for u in single global; do
		systemctl show -P ActiveState -P MainPID $u@launched.service
		systemctl is-enabled $u@loaded.service || true
		systemctl show -P LoadState $u@inactive.service
	done`
	was := c.on(t, n, show)
	if strings.Count(was, "linked-runtime") != 2 || strings.Count(was, "active\n") != 2 {
		t.Fatalf("before the store was away:\n%s", was)
	}
	files := c.unitFiles(t)
	cut := "-p tcp -m multiport --dports 2379,4001 -j REJECT"
	c.on(t, n, "iptables -I OUTPUT "+cut)
	restored := false
	restore := func() {
		if !restored {
			c.on(t, n, "iptables -D OUTPUT "+cut)
			restored = true
		}
	}
	t.Cleanup(restore)
	c.waitFor(t, "the node to have lost its store", func() bool {
		return strings.Contains(c.fleetctl("list-machines").err, "unable to communicate with etcd")
	})
	if now := c.on(t, n, show); now != was {
		t.Errorf("without the store systemd has\n%s\nand had\n%s", now, was)
	}
	restore()
	c.waitFor(t, "the units to be as they were", func() bool {
		return fmt.Sprint(c.unitFiles(t)) == fmt.Sprint(files) && len(c.active(t)) == 2
	})
	if now := c.on(t, n, show); now != was {
		t.Errorf("with the store again systemd has\n%s\nand had\n%s", now, was)
	}
	if log := c.on(t, n, "journalctl --no-pager -b _PID=1"); strings.Contains(log, "Stopping single@") || strings.Contains(log, "Stopping global@") {
		t.Errorf("units were stopped:\n%s", log)
	}
}

// TestOldSystemd: the same verbs with the systemd of the release before.
func TestOldSystemd(t *testing.T) {
	c := old(t)
	verbs(t, c)
	replaceVerbs(t, c)
	reach(t, c)
}
