//go:build cluster

// Package units_test tests units on whole clusters: machines of their own with
// real systemd, made and driven by the command line as an operator would.
//
// With FLOTILLA_TEST_CLUSTERS=x the clusters are called xusual and so on, are
// used if they are there, and stay: the next run is sooner at work. Their nodes
// go on with the program that they were made with.
package units_test

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// binary is flotilla, with flotillad beside it; fleetctl is a link to it.
var binary, fleetctl string

func TestMain(m *testing.M) { os.Exit(testMain(m)) }

func testMain(m *testing.M) int {
	dir, err := os.MkdirTemp("", "units")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer func() { _ = os.RemoveAll(dir) }()
	binary, fleetctl = filepath.Join(dir, "flotilla"), filepath.Join(dir, "fleetctl")
	build := exec.Command("go", "build", "-o", dir+"/", "flotilla/cmd/flotilla", "flotilla/cmd/flotillad")
	build.Env = append(os.Environ(), "CGO_ENABLED=0") // they run on Debian of other years too
	build.Stderr = os.Stderr
	if err := errors.Join(build.Run(), os.Symlink("flotilla", fleetctl)); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer func() {
		for _, c := range made {
			if os.Getenv(keepVariable) != "" {
				if c.fleetd {
					c.each(func(n node) { _ = c.run("", "cluster", "shell", "--cluster", c.name, n.Name, leaveFleetd) })
				}
				continue
			}
			if out, err := exec.Command(binary, "cluster", "down", "--keep=false", c.name).CombinedOutput(); err != nil {
				fmt.Fprintf(os.Stderr, "remove cluster %s: %v\n%s", c.name, err, out)
			}
		}
	}()
	return m.Run()
}

// keepVariable names the clusters that outlive the tests; see the package.
const keepVariable = "FLOTILLA_TEST_CLUSTERS"

// cluster is one cluster that tests run on, one after the other.
type cluster struct {
	name    string
	nodes   []node
	fleetd  bool // its nodes run fleetd, see daemons
	settled bool // they surely do not
}

// node is a machine of a cluster, as `flotilla cluster status -o json` has it.
type node struct {
	Name      string `json:"name"`
	Address   string `json:"address"`
	MachineID string `json:"machine_id"`
	Run       string `json:"run"`
	State     string `json:"state"`
}

// made are the clusters of this process, by what they were asked for.
var made = map[string]*cluster{}

// usual is the cluster of most tests: three nodes whose death is noticed soon.
func usual(t *testing.T) *cluster {
	t.Helper()
	c := clusterMade(t, "usual", "--nodes", "3", "--set", "machine-ttl=4")
	c.leaveFleetd(t)
	c.ready(t)
	return c
}

// clusterOf returns the cluster of that name without any units, made with these
// arguments when a test first asks for it.
func clusterOf(t *testing.T, name string, args ...string) *cluster {
	t.Helper()
	c := clusterMade(t, name, args...)
	c.ready(t)
	return c
}

// clusterMade is the cluster of that name as the last test has left it.
func clusterMade(t *testing.T, name string, args ...string) *cluster {
	t.Helper()
	c := made[name]
	if c == nil {
		c = &cluster{name: cmp.Or(os.Getenv(keepVariable), fmt.Sprintf("t%d", os.Getpid()%1000)) + name}
		made[name] = c
		out, err := exec.Command(binary, append([]string{"cluster", "up", c.name, "--timeout", "5m"}, args...)...).CombinedOutput()
		if err != nil {
			t.Fatalf("make the cluster: %v\n%s", err, out)
		}
		t.Logf("%s", out)
	}
	c.refresh(t)
	return c
}

// ready waits until all machines are there and nothing is on them, and makes it
// so again after the test.
func (c *cluster) ready(t *testing.T) {
	t.Helper()
	c.waitFor(t, "all machines", func() bool { return len(c.machines(t)) == len(c.nodes) })
	c.clean(t)
	t.Cleanup(func() {
		if t.Failed() {
			c.tell(t)
		}
		c.clean(t)
	})
}

// refresh reads which nodes there are.
func (c *cluster) refresh(t *testing.T) {
	t.Helper()
	out, err := exec.Command(binary, "cluster", "status", c.name, "-o", "json").Output()
	if err != nil {
		t.Fatalf("status of the cluster: %v\n%s", err, out)
	}
	c.nodes = nil
	if err := json.Unmarshal(out, &c.nodes); err != nil {
		t.Fatalf("status of the cluster: %v\n%s", err, out)
	}
}

// clean destroys all units and waits until nothing is left of them.
func (c *cluster) clean(t *testing.T) {
	t.Helper()
	var units []string
	for _, u := range c.unitFiles(t) {
		units = append(units, u[0])
	}
	if len(units) > 0 {
		c.ok(t, append([]string{"destroy"}, units...)...)
	}
	c.waitFor(t, "nothing to be left", func() bool { return len(c.units(t)) == 0 && len(c.unitFiles(t)) == 0 })
}

// tell logs what the nodes say.
func (c *cluster) tell(t *testing.T) {
	t.Logf("units:\n%s", c.run("", "list-units", "--full").out)
	t.Logf("unit files:\n%s", c.run("", "list-unit-files", "--full").out)
	for _, n := range c.nodes {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		out, err := c.command(ctx, "cluster", "shell", "--cluster", c.name, n.Name, "journalctl", "-u", "flotilla-node", "-u", "fleet", "--no-pager", "-o", "cat", "-n", "60").CombinedOutput()
		cancel()
		t.Logf("journal of %s (%v):\n%s", n.Name, err, out)
	}
}

// result is how a command ended.
type result struct {
	out, err string
	code     int
}

func (c *cluster) command(ctx context.Context, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, binary, args...)
	cmd.Env = append(os.Environ(), "FLOTILLA_CLUSTER="+c.name)
	return cmd
}

// run runs flotilla with an input against the cluster.
func (c *cluster) run(input string, args ...string) result {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	cmd := c.command(ctx, args...)
	return finish(cmd, input)
}

// fleetctl runs the program as fleetctl, against the first node's socket.
func (c *cluster) fleetctl(args ...string) result {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, fleetctl, args...)
	cmd.Env = append(os.Environ(), "FLEETCTL_ENDPOINT=unix://"+filepath.Join(c.nodes[0].Run, "node.sock"))
	return finish(cmd, "")
}

func finish(cmd *exec.Cmd, input string) result {
	var out, errors bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(input), &out, &errors
	_ = cmd.Run() // the exit code says it
	return result{out.String(), errors.String(), cmd.ProcessState.ExitCode()}
}

// ok runs a command that has to succeed and returns what it prints.
func (c *cluster) ok(t *testing.T, args ...string) string {
	t.Helper()
	r := c.run("", args...)
	if r.code != 0 {
		t.Fatalf("flotilla %s: exit code %d\n%s%s", strings.Join(args, " "), r.code, r.out, r.err)
	}
	return r.out
}

// on runs a shell command on a node as root; it has to succeed.
func (c *cluster) on(t *testing.T, node, command string) string {
	t.Helper()
	r := c.run("", "cluster", "shell", "--cluster", c.name, node, "sh", "-c", command)
	if r.code != 0 {
		t.Fatalf("on %s: %s: exit code %d\n%s%s", node, command, r.code, r.out, r.err)
	}
	return r.out
}

// table reads the lines of a listing without its head.
func (c *cluster) table(t *testing.T, args ...string) [][]string {
	t.Helper()
	r := c.run("", append(args, "--no-legend", "--full")...)
	if r.code != 0 {
		t.Logf("%s: exit code %d: %s", args[0], r.code, r.err)
	}
	var rows [][]string
	for line := range strings.Lines(r.out) {
		rows = append(rows, strings.Fields(line))
	}
	return rows
}

// units returns unit, active state and machine ID of each copy.
func (c *cluster) units(t *testing.T) (list []unitState) {
	t.Helper()
	for _, row := range c.table(t, "list-units", "--fields", "unit,active,machine") {
		machine, _, _ := strings.Cut(row[2], "/")
		list = append(list, unitState{row[0], row[1], machine})
	}
	return list
}

type unitState struct{ unit, active, machine string }

// unitFiles returns unit, desired state, state and machine of each unit.
func (c *cluster) unitFiles(t *testing.T) [][]string {
	t.Helper()
	return c.table(t, "list-unit-files", "--fields", "unit,dstate,state,target")
}

// machines returns the IDs of the machines that are there.
func (c *cluster) machines(t *testing.T) (ids []string) {
	t.Helper()
	for _, row := range c.table(t, "list-machines", "--fields", "machine") {
		ids = append(ids, row[0])
	}
	return ids
}

// active returns on which machine each active unit runs; one that runs on
// several has them joined by a comma.
func (c *cluster) active(t *testing.T) map[string]string {
	t.Helper()
	where := map[string]string{}
	for _, u := range c.units(t) {
		if u.active != "active" {
			continue
		}
		if where[u.unit] != "" {
			where[u.unit] += ","
		}
		where[u.unit] += u.machine
	}
	return where
}

// node returns the node with that machine ID.
func (c *cluster) node(t *testing.T, machine string) node {
	t.Helper()
	i := slices.IndexFunc(c.nodes, func(n node) bool { return n.MachineID == machine })
	if i < 0 {
		t.Fatalf("no node is machine %q", machine)
	}
	return c.nodes[i]
}

// waitFor waits until something holds.
func (c *cluster) waitFor(t *testing.T, what string, holds func() bool) {
	t.Helper()
	c.within(t, time.Minute, what, holds)
}

func (c *cluster) within(t *testing.T, limit time.Duration, what string, holds func() bool) {
	t.Helper()
	for began := time.Now(); !holds(); time.Sleep(100 * time.Millisecond) {
		if time.Since(began) > limit {
			t.Fatalf("waited %v for %s\n%s%s", limit, what, c.run("", "list-units", "--full").out, c.run("", "list-unit-files", "--full").out)
		}
	}
}

// waitActive waits until exactly so many copies of units are active.
func (c *cluster) waitActive(t *testing.T, n int) map[string]string {
	t.Helper()
	var where map[string]string
	c.waitFor(t, fmt.Sprintf("%d active units", n), func() bool {
		where = c.active(t)
		copies := 0
		for _, m := range where {
			copies += strings.Count(m, ",") + 1
		}
		return copies == n
	})
	return where
}

// unit writes a unit file and returns its path. Without [Service] it sleeps.
func unit(t *testing.T, name string, lines ...string) string {
	t.Helper()
	text := strings.Join(lines, "\n") + "\n"
	if !strings.Contains(text, "[Service]") {
		text = "[Service]\nExecStart=/bin/sh -c 'echo Hello, World!; exec sleep 1000000'\n" + text
	}
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	return path
}

// each does something to all nodes at once.
func (c *cluster) each(do func(n node)) {
	var all sync.WaitGroup
	for _, n := range c.nodes {
		all.Go(func() { do(n) })
	}
	all.Wait()
}

// everywhere runs a shell command on each node, which has to succeed.
func (c *cluster) everywhere(t *testing.T, command func(n node) string) {
	t.Helper()
	c.each(func(n node) {
		if r := c.run("", "cluster", "shell", "--cluster", c.name, n.Name, command(n)); r.code != 0 {
			t.Errorf("on %s: exit code %d\n%s%s", n.Name, r.code, r.out, r.err)
		}
	})
	if t.Failed() {
		t.FailNow()
	}
}
