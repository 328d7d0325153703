//go:build cluster

package nspawn_test

import (
	"context"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"flotilla/internal/nspawn"
)

// host returns this machine with a state of its own and the usual cache.
func host(t *testing.T) *nspawn.Host {
	t.Helper()
	h := nspawn.Default(slog.New(slog.NewTextHandler(t.Output(), nil)))
	if err := h.Check(); err != nil {
		t.Fatalf("this machine cannot run machines: %v", err)
	}
	h.State = filepath.Join(t.TempDir(), "clusters")
	return h
}

// cluster returns a cluster that is removed when the test ends.
func cluster(t *testing.T, h *nspawn.Host, name string) *nspawn.Cluster {
	t.Helper()
	c, err := h.Cluster(name)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Remove(context.Background()); err != nil {
			t.Error(err)
		}
		if left := traces(t, h, name); len(left) > 0 {
			t.Errorf("the cluster left behind:\n%s", strings.Join(left, "\n"))
		}
	})
	return c
}

// traces returns what is left of a cluster whose name is at most 8 characters.
func traces(t *testing.T, h *nspawn.Host, name string) []string {
	t.Helper()
	var left []string
	links, err := net.Interfaces()
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range links {
		if strings.HasPrefix(l.Name, "fl-"+name) {
			left = append(left, "link "+l.Name)
		}
	}
	for _, pattern := range []string{filepath.Join(h.State, name), filepath.Join(h.Run, name), "/run/netns/flotilla-" + name + ".*"} {
		found, err := filepath.Glob(pattern)
		if err != nil {
			t.Fatal(err)
		}
		left = append(left, found...)
	}
	_ = filepath.WalkDir("/sys/fs/cgroup", func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() && strings.HasPrefix(d.Name(), "flotilla-"+name+".") {
			left = append(left, path)
		}
		return nil
	})
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(mounts)) {
		if strings.Contains(line, filepath.Join(h.State, name)) || strings.Contains(line, "flotilla-"+name+".") {
			left = append(left, "mount "+line)
		}
	}
	tables, err := exec.Command("nft", "list", "tables").Output()
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(string(tables), "flotilla_"+name) {
		left = append(left, string(tables))
	}
	commands, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range commands {
		if text, _ := os.ReadFile(file); strings.Contains(string(text), "--machine="+name+".") {
			left = append(left, "process "+strings.ReplaceAll(string(text), "\x00", " "))
		}
	}
	return left
}

func create(t *testing.T, c *nspawn.Cluster, s nspawn.Spec) nspawn.Machine {
	t.Helper()
	m, err := c.Create(t.Context(), s)
	if err != nil {
		t.Fatal(err)
	}
	ready(t, c, s.Name)
	return m
}

func ready(t *testing.T, c *nspawn.Cluster, name string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if err := c.Ready(ctx, name); err != nil {
		console, _ := c.Console(t.Context(), name)
		t.Fatalf("%v\n%s", err, console)
	}
}

// on runs a command on a machine and returns what it prints.
func on(t *testing.T, c *nspawn.Cluster, name, command string) string {
	t.Helper()
	out, err := c.SSH(t.Context(), name, command).CombinedOutput()
	if err != nil {
		t.Fatalf("%s on %s: %v: %s", command, name, err, out)
	}
	return strings.TrimSpace(string(out))
}

func TestMachine(t *testing.T) {
	for _, release := range nspawn.Releases() {
		t.Run(release, func(t *testing.T) {
			h := host(t)
			c := cluster(t, h, "t"+release[:3])
			began := time.Now()
			m := create(t, c, nspawn.Spec{Name: "n1", Release: release, Labels: map[string]string{"zone": "a"}, Files: []nspawn.File{
				{Path: "/etc/flotilla/x.yaml", Text: "hello\n", Mode: 0o600},
				{Path: "/usr/local/bin/tool", Source: "/bin/true", Mode: 0o755},
				{Path: "/usr/local/bin/link", Link: "tool"},
			}})
			t.Logf("ready after %s", time.Since(began))
			for command, want := range map[string]string{
				"cat /etc/flotilla/x.yaml":                  "hello",
				"/usr/local/bin/link && echo good":          "good",
				"cat /etc/machine-id":                       m.MachineID,
				"hostname":                                  "n1",
				"stat -c %a /etc/flotilla/x.yaml":           "600",
				"stat -c %U /home/core":                     "core",
				"systemctl is-enabled haproxy":              "disabled",
				"stat -fc %T /sys/fs/cgroup":                "cgroup2fs",
				". /etc/os-release; echo $VERSION_CODENAME": release,
				"su core -c 'sudo id -u'":                   "0",
			} {
				if got, _ := c.SSH(t.Context(), "n1", command).CombinedOutput(); strings.TrimSpace(string(got)) != want {
					t.Errorf("%s: %q, want %q", command, got, want)
				}
			}
			if got := on(t, c, "n1", "systemctl --failed --no-legend --plain"); got != "" {
				t.Errorf("units that failed: %s", got)
			}
			list, err := c.List(t.Context())
			if err != nil || len(list) != 1 || !list[0].Running || !list[0].Complete || list[0].Labels["zone"] != "a" {
				t.Errorf("the list is %+v, %v", list, err)
			}
			console, err := c.Console(t.Context(), "n1")
			if err != nil || !strings.Contains(console, "Multi-User System") {
				t.Errorf("the console says %q, %v", console, err)
			}
		})
	}
}

func TestPower(t *testing.T) {
	c := cluster(t, host(t), "tpower")
	create(t, c, nspawn.Spec{Name: "n1"})
	create(t, c, nspawn.Spec{Name: "n2"})
	if got := on(t, c, "n1", "getent hosts n2"); !strings.HasSuffix(got, "n2") {
		t.Errorf("n1 knows n2 as %q", got)
	}
	on(t, c, "n1", "nc -z -w5 n2 22")

	on(t, c, "n1", "echo kept >/root/kept; sync")
	boot := on(t, c, "n1", "systemctl show --value -p KernelTimestampMonotonic; cat /proc/1/stat | cut -d' ' -f22")
	ctx := t.Context()
	steps := []struct {
		what string
		do   func() error
	}{
		{"reboot", func() error { return c.Reboot(ctx, "n1") }},
		{"reboot from inside", func() error {
			_ = c.SSH(ctx, "n1", "systemctl reboot").Run() // the connection breaks
			return nil
		}},
		{"power cut", func() error {
			if err := c.PowerCut(ctx, "n1"); err != nil {
				return err
			}
			return c.PowerOn(ctx, "n1")
		}},
		{"power off", func() error {
			if err := c.PowerOff(ctx, "n1", 30*time.Second); err != nil {
				return err
			}
			if list, err := c.List(ctx); err != nil || list[0].Running || !list[1].Running {
				t.Errorf("after the power off: %+v, %v", list, err)
			}
			return c.PowerOn(ctx, "n1")
		}},
	}
	for _, s := range steps {
		if err := s.do(); err != nil {
			t.Fatalf("%s: %v", s.what, err)
		}
		limit := time.Now().Add(time.Minute)
		for {
			out, err := c.SSH(ctx, "n1", "cat /root/kept; cat /proc/1/stat | cut -d' ' -f22").Output()
			kept, now, _ := strings.Cut(strings.TrimSpace(string(out)), "\n")
			if err == nil && !strings.HasSuffix(boot, now) && kept == "kept" {
				boot = now
				break
			}
			if time.Now().After(limit) {
				t.Fatalf("%s: no new boot: %s, %v", s.what, out, err)
			}
		}
	}

	if err := c.CutLink(ctx, "n1"); err != nil {
		t.Fatal(err)
	}
	if out, err := c.SSH(ctx, "n2", "nc -z -w1 n1 22").CombinedOutput(); err == nil {
		t.Errorf("n2 reaches n1 although its link is cut: %s", out)
	}
	if err := c.RestoreLink(ctx, "n1"); err != nil {
		t.Fatal(err)
	}
	ready(t, c, "n1")
	on(t, c, "n2", "nc -z -w5 n1 22")

	if err := c.Stop(ctx, 30*time.Second); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"n1", "n2"} {
		create(t, c, nspawn.Spec{Name: name})
	}
	if got := on(t, c, "n1", "cat /root/kept"); got != "kept" {
		t.Errorf("after stop and start: %q", got)
	}
	if err := c.Destroy(ctx, "n1"); err != nil {
		t.Fatal(err)
	}
	if err := c.Destroy(ctx, "n1"); err != nil {
		t.Errorf("the second time: %v", err)
	}
	list, err := c.List(ctx)
	if err != nil || len(list) != 1 || list[0].Name != "n2" {
		t.Errorf("after n1 is destroyed: %+v, %v", list, err)
	}
}

func TestSideBySide(t *testing.T) {
	h := host(t)
	a, b := cluster(t, h, "ta"), cluster(t, h, "tb")
	m, n := create(t, a, nspawn.Spec{Name: "n1"}), create(t, b, nspawn.Spec{Name: "n1"})
	if m.Address == n.Address {
		t.Error("both have the same address")
	}
	if m.MachineID == n.MachineID {
		t.Error("both have the same machine ID")
	}
	names, err := h.Clusters()
	if err != nil || !slices.Equal(names, []string{"ta", "tb"}) {
		t.Errorf("the clusters are %v, %v", names, err)
	}
	if err := a.Remove(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := on(t, b, "n1", "hostname"); got != "n1" {
		t.Errorf("tb's machine answers %q after ta is gone", got)
	}
}
