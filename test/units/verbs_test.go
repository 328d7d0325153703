//go:build cluster

package units_test

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// fleet runs fleetctl, which has to succeed without a complaint, and returns what
// it prints.
func (c *cluster) fleet(t *testing.T, args ...string) string {
	t.Helper()
	r := c.fleetctl(args...)
	if r.code != 0 || strings.Contains(r.err, "Error") {
		t.Fatalf("fleetctl %s: exit code %d\n%s%s", strings.Join(args, " "), r.code, r.out, r.err)
	}
	return r.out
}

// instances writes a template and returns the paths of n instances of it.
func instances(t *testing.T, name string, n int) (paths []string) {
	t.Helper()
	template := unit(t, name+"@.service")
	for i := range n {
		paths = append(paths, filepath.Join(filepath.Dir(template), fmt.Sprintf("%s@%d.service", name, i+1)))
	}
	return paths
}

// names returns the units of these paths.
func names(paths []string) (list []string) {
	for _, p := range paths {
		list = append(list, filepath.Base(p))
	}
	return list
}

// answer is what the API says to one request.
type answer struct {
	status int
	kind   string // Content-Type
	body   string
}

// ask makes a request of fleet's API, to the first node.
func (c *cluster) ask(t *testing.T, method, path, body string) answer {
	t.Helper()
	client := http.Client{Transport: &http.Transport{DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", filepath.Join(c.nodes[0].Run, "node.sock"))
		}}}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute) // it is asked after tests too
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, method, "http://node/fleet/v1"+path, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Content-Type", "application/json")
	resp, err := client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }() // it was read
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return answer{resp.StatusCode, resp.Header.Get("Content-Type"), string(text)}
}

// wants fails the test unless the answer has that status and is JSON.
func (a answer) wants(t *testing.T, status int) {
	t.Helper()
	if a.status != status || !strings.HasPrefix(a.kind, "application/json") {
		t.Errorf("answer %d of type %q, want %d of application/json: %s", a.status, a.kind, status, a.body)
	}
}

// TestFleetctlAlone: what fleetctl answers without a cluster.
func TestFleetctlAlone(t *testing.T) {
	alone := func(args ...string) string {
		cmd := exec.Command(fleetctl, args...)
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Errorf("fleetctl %s: %v\n%s", strings.Join(args, " "), err, out)
		}
		return string(out)
	}
	version := strings.TrimSpace(alone("version"))
	if version != "fleetctl version dev" || strings.TrimSpace(alone("--version")) != version {
		t.Errorf("fleetctl version says %q and --version %q", version, alone("--version"))
	}
	for _, args := range [][]string{{"--help"}, {"-h"}, {"help"}, {}} {
		if out := alone(args...); !strings.Contains(out, "dev") || !strings.Contains(out, "list-units") {
			t.Errorf("fleetctl %s: no version or no commands in\n%s", args, out)
		}
	}
}

// TestFleetctlEnvironment: where the API is may be a variable.
func TestFleetctlEnvironment(t *testing.T) {
	c := usual(t)
	out := c.fleet(t, "list-machines", "--full", "--no-legend")
	for _, n := range c.nodes {
		if !strings.Contains(out, n.MachineID) {
			t.Errorf("machine %s is missing in\n%s", n.MachineID, out)
		}
	}
}

// TestMachinesAPI: fleet's API on machines, and what it refuses.
func TestMachinesAPI(t *testing.T) {
	c := usual(t)
	c.ask(t, "GET", "/machines", "").wants(t, 200)
	c.ask(t, "GET", "/machines?nextPageToken=EwBMLg==", "").wants(t, 400)
	for _, patch := range []string{
		`[{"op":"noop","path":"/X/metadata/foo","value":{"value":"bar"}}]`,
		`[{"op":"add","path":"/X/foo","value":{"value":"bar"}}]`,
		`[{"op":"add","path":"/X/metadata/foo","value":{"value":""}}]`,
	} {
		c.ask(t, "PATCH", "/machines", strings.ReplaceAll(patch, "X", c.nodes[0].MachineID)).wants(t, 400)
	}
}

// metadata returns the metadata of all machines, as fleet's API has it.
func (c *cluster) metadata(t *testing.T) map[string]map[string]string {
	t.Helper()
	a := c.ask(t, "GET", "/machines", "")
	a.wants(t, 200)
	var page struct {
		Machines []struct {
			ID       string
			Metadata map[string]string
		}
	}
	if err := json.Unmarshal([]byte(a.body), &page); err != nil {
		t.Fatalf("%v in %s", err, a.body)
	}
	all := map[string]map[string]string{}
	for _, m := range page.Machines {
		all[m.ID] = m.Metadata
	}
	return all
}

// TestMachinesPatch: metadata added, replaced and removed through fleet's API.
func TestMachinesPatch(t *testing.T) {
	c := usual(t)
	a, b := c.nodes[0].MachineID, c.nodes[1].MachineID
	remove := fmt.Sprintf(`[{"op":"remove","path":"/%s/metadata/foo"},{"op":"remove","path":"/%s/metadata/boo"}]`, a, b)
	t.Cleanup(func() { c.ask(t, "PATCH", "/machines", remove) })
	c.ask(t, "PATCH", "/machines", remove).wants(t, 204)
	c.waitFor(t, "it to be away", func() bool { m := c.metadata(t); return m[a]["foo"] == "" && m[b]["boo"] == "" })
	before := c.metadata(t)
	c.ask(t, "PATCH", "/machines", remove).wants(t, 204) // it is not there
	if now := c.metadata(t); !maps.EqualFunc(now, before, maps.Equal[map[string]string, map[string]string]) {
		t.Errorf("removing what is not there made %v of %v", now, before)
	}
	c.ask(t, "PATCH", "/machines", fmt.Sprintf(
		`[{"op":"add","path":"/%s/metadata/foo","value":{"value":"bar"}},{"op":"replace","path":"/%s/metadata/boo","value":{"Value":"bing"}}]`, a, b)).wants(t, 204)
	c.waitFor(t, "the metadata to show", func() bool {
		now := c.metadata(t)
		return now[a]["foo"] == "bar" && now[b]["boo"] == "bing" && now[a]["boo"] == "" && now[b]["foo"] == ""
	})
	for id, had := range before {
		for k, v := range had {
			if got := c.metadata(t)[id][k]; got != v {
				t.Errorf("%s of %s is %q now, and was %q", k, id, got, v)
			}
		}
	}
}

// TestStart: one unit, one active.
func TestStart(t *testing.T) {
	c := usual(t)
	c.fleet(t, "start", unit(t, "hello.service"))
	if where := c.active(t); len(where) != 1 || where["hello.service"] == "" {
		t.Errorf("start has returned, and active is %v", where)
	}
}

// TestVerbs: what submit, load and start do is undone by destroy, unload and
// stop, and can be done again.
func TestVerbs(t *testing.T) {
	verbs(t, usual(t))
}

func verbs(t *testing.T, c *cluster) {
	for _, v := range []struct {
		do, undo string
		n        int
		listed   func() int // how many there are
	}{
		{"submit", "destroy", 9, func() int { return len(c.unitFiles(t)) }},
		{"load", "unload", 6, func() int { return len(c.units(t)) }},
		{"start", "stop", 3, func() int { return len(c.active(t)) }},
	} {
		paths := instances(t, v.do, v.n)
		for range 2 {
			c.fleet(t, append([]string{v.do}, paths...)...)
			c.waitFor(t, fmt.Sprintf("%d units after %s", v.n, v.do), func() bool { return v.listed() == v.n })
			c.fleet(t, append([]string{v.undo}, names(paths)...)...)
			c.waitFor(t, "none after "+v.undo, func() bool { return v.listed() == 0 })
		}
		c.clean(t)
	}
}

// TestReplaceVerbs: each of the verbs takes the new text of units if it is told
// to, and only then.
func TestReplaceVerbs(t *testing.T) {
	replaceVerbs(t, usual(t))
}

func replaceVerbs(t *testing.T, c *cluster) {
	for _, v := range []struct {
		verb   string
		n      int
		listed func() int
	}{
		{"submit", 3, func() int { return len(c.unitFiles(t)) }},
		{"load", 3, func() int { return len(c.units(t)) }},
		{"start", 3, func() int { return len(c.active(t)) }},
	} {
		paths := []string{}
		for i := range v.n {
			paths = append(paths, unit(t, fmt.Sprintf("%s-%d.service", v.verb, i)))
		}
		c.fleet(t, append([]string{v.verb}, paths...)...)
		for _, p := range paths {
			text, err := os.ReadFile(p)
			if err == nil {
				err = os.WriteFile(p, append(text, "ExecStop=/bin/true\n"...), 0o644)
			}
			if err != nil {
				t.Fatal(err)
			}
		}
		r := c.fleetctl(append([]string{v.verb}, paths...)...)
		if !strings.Contains(r.out+r.err, "differs from local unit file") || strings.Contains(c.fleet(t, "cat", filepath.Base(paths[0])), "ExecStop") {
			t.Errorf("%s without --replace: exit code %d\n%s%s", v.verb, r.code, r.out, r.err)
		}
		c.fleet(t, append([]string{v.verb, "--replace"}, paths...)...)
		for _, p := range paths {
			if text := c.fleet(t, "cat", filepath.Base(p)); !strings.Contains(text, "ExecStop=/bin/true") {
				t.Errorf("%s --replace left the old text:\n%s", v.verb, text)
			}
		}
		c.waitFor(t, fmt.Sprintf("%d units after %s --replace", v.n, v.verb), func() bool { return v.listed() == v.n })
		c.clean(t)
	}
}

// TestReplaceInOrder: nothing of the new version runs before the old one has
// ended altogether.
func TestReplaceInOrder(t *testing.T) {
	c := usual(t)
	version := func(v string) string {
		say := func(what string) string { return "/bin/sh -c 'echo " + v + " " + what + " >>/var/tmp/order'" }
		return unit(t, "ordered.service", "[Service]", "ExecStartPre="+say("comes"), "ExecStart=/bin/sleep 1000000",
			"ExecStopPost=/bin/sleep 1", "ExecStopPost="+say("goes"), "[X-Fleet]", "MachineID="+c.nodes[0].MachineID)
	}
	t.Cleanup(func() { c.on(t, c.nodes[0].Name, "rm -f /var/tmp/order") })
	c.fleet(t, "start", version("old"))
	c.fleet(t, "start", "--replace", version("new"))
	c.waitActive(t, 1)
	c.waitFor(t, "the new version", func() bool {
		return strings.Contains(c.on(t, c.nodes[0].Name, "cat /var/tmp/order"), "new comes")
	})
	if got := c.on(t, c.nodes[0].Name, "cat /var/tmp/order"); got != "old comes\nold goes\nnew comes\n" {
		t.Errorf("the order was\n%s", got)
	}
}

// TestRestart: units that are restarted have other processes and stay.
func TestRestart(t *testing.T) {
	c := usual(t)
	paths := instances(t, "restart", 3)
	for range 2 {
		c.fleet(t, append([]string{"start"}, paths...)...)
		where := c.waitActive(t, 3)
		pids := map[string]string{}
		pid := func(name string) string {
			return strings.TrimSpace(c.on(t, c.node(t, where[name]).Name, "systemctl show -P MainPID "+name))
		}
		for _, name := range names(paths) {
			pids[name] = pid(name)
		}
		c.fleet(t, append([]string{"restart"}, names(paths)...)...)
		if now := c.waitActive(t, 3); !maps.Equal(now, where) {
			t.Errorf("a restart moved units from %v to %v", where, now)
		}
		for _, name := range names(paths) {
			c.waitFor(t, "a new process of "+name, func() bool { p := pid(name); return p != "0" && p != pids[name] })
		}
		c.fleet(t, append([]string{"stop"}, names(paths)...)...)
		c.waitActive(t, 0)
	}
}

// TestReach: ssh to a unit, its status and its journal.
func TestReach(t *testing.T) {
	reach(t, usual(t))
}

func reach(t *testing.T, c *cluster) {
	path := unit(t, "hello.service")
	c.fleet(t, "start", path)
	if out := c.fleet(t, "ssh", "hello.service", "echo", "foo"); out != "foo\n" {
		t.Errorf("ssh printed %q", out)
	}
	if out := c.fleet(t, "status", "hello.service"); !strings.Contains(out, "Active: active") {
		t.Errorf("status printed\n%s", out)
	}
	c.waitFor(t, "the journal", func() bool {
		return strings.Contains(c.fleet(t, "journal", "--sudo", "hello.service"), "Hello, World!")
	})
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if got := c.fleet(t, "cat", "hello.service"); strings.TrimSpace(got) != strings.TrimSpace(string(text)) {
		t.Errorf("cat printed\n%s\nwant\n%s", got, text)
	}
	c.clean(t)
	c.fleet(t, "load", path)
	if r := c.fleetctl("status", "hello.service"); !strings.Contains(r.out, "Loaded: loaded") {
		t.Errorf("status of a loaded unit: exit code %d\n%s%s", r.code, r.out, r.err)
	}
}

// TestOrderOfFiles: units are listed by name, whatever the order of their coming.
func TestOrderOfFiles(t *testing.T) {
	c := usual(t)
	paths := instances(t, "order", 20)
	for _, p := range paths {
		c.fleet(t, "submit", p)
	}
	want := names(paths)
	slices.Sort(want)
	var got []string
	for line := range strings.Lines(c.fleet(t, "list-unit-files", "--no-legend", "--fields", "unit")) {
		got = append(got, strings.TrimSpace(line))
	}
	if !slices.Equal(got, want) {
		t.Errorf("listed as %v, want %v", got, want)
	}
}

// TestInstall: a unit that is only loaded starts and stops with the one that
// wants it.
func TestInstall(t *testing.T) {
	c := usual(t)
	c.fleet(t, "load", unit(t, "hello.service"))
	c.fleet(t, "load", unit(t, "discovery.service", "[Unit]", "BindsTo=hello.service", "After=hello.service",
		"[Install]", "WantedBy=hello.service", "[X-Fleet]", "MachineOf=hello.service"))
	state := func(want string) func() bool {
		return func() bool {
			r := c.fleetctl("ssh", "discovery.service", "systemctl", "show", "-P", "ActiveState", "discovery.service")
			return r.out == want+"\n"
		}
	}
	c.waitFor(t, "discovery.service to be inactive", state("inactive"))
	c.fleet(t, "start", "hello.service")
	c.waitFor(t, "discovery.service to start with hello.service", state("active"))
	c.fleet(t, "stop", "hello.service")
	c.waitFor(t, "discovery.service to stop with hello.service", state("inactive"))
}
