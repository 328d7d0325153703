//go:build cluster

package nspawn_test

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"flotilla/internal/nodeconfig"
	"flotilla/internal/nspawn"
	"flotilla/internal/nspawn/nspawntest"
	"flotilla/internal/provision"
)

// host returns this machine with a state of its own and the usual cache.
func host(t *testing.T) *nspawn.Host {
	t.Helper()
	h := nspawntest.Host(t)
	h.State = filepath.Join(t.TempDir(), "clusters")
	return h
}

func create(t *testing.T, c *nspawn.Cluster, s provision.Spec) provision.Machine {
	t.Helper()
	m, err := c.Make(t.Context(), s)
	if err != nil {
		t.Fatal(err)
	}
	nspawntest.Ready(t, c, s.Name)
	return m
}

func TestMachine(t *testing.T) {
	for _, release := range nspawn.Releases() {
		t.Run(release, func(t *testing.T) {
			h := host(t)
			c := nspawntest.Cluster(t, h, "t"+release[:3])
			began := time.Now()
			m := create(t, c, provision.Spec{Name: "n1", Release: release, Labels: map[string]string{"zone": "a"}, Files: []nodeconfig.File{
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
			if got := nspawntest.On(t, c, "n1", "systemctl --failed --no-legend --plain"); got != "" {
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
	c := nspawntest.Cluster(t, host(t), "tpower")
	create(t, c, provision.Spec{Name: "n1"})
	create(t, c, provision.Spec{Name: "n2"})
	if got := nspawntest.On(t, c, "n1", "getent hosts n2"); !strings.HasSuffix(got, "n2") {
		t.Errorf("n1 knows n2 as %q", got)
	}
	nspawntest.On(t, c, "n1", "nc -z -w5 n2 22")

	nspawntest.On(t, c, "n1", "echo kept >/root/kept; sync")
	boot := nspawntest.On(t, c, "n1", "systemctl show --value -p KernelTimestampMonotonic; cat /proc/1/stat | cut -d' ' -f22")
	ctx := t.Context()
	steps := []struct {
		what string
		do   func() error
	}{
		{"reboot", func() error { return c.Power(ctx, "n1", provision.Reboot) }},
		{"reboot from inside", func() error {
			_ = c.SSH(ctx, "n1", "systemctl reboot").Run() // the connection breaks
			return nil
		}},
		{"power cut", func() error {
			if err := c.Power(ctx, "n1", provision.PowerCut); err != nil {
				return err
			}
			return c.Power(ctx, "n1", provision.PowerOn)
		}},
		{"power off", func() error {
			if err := c.Power(ctx, "n1", provision.PowerOff); err != nil {
				return err
			}
			if list, err := c.List(ctx); err != nil || list[0].Running || !list[1].Running {
				t.Errorf("after the power off: %+v, %v", list, err)
			}
			return c.Power(ctx, "n1", provision.PowerOn)
		}},
	}
	for _, s := range steps {
		nspawntest.On(t, c, "n1", "touch /run/flotilla/left /run/flotilla/units/left /run/flotilla/agent/left")
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
		if got := nspawntest.On(t, c, "n1", "find /run/flotilla -type f"); got != "" {
			t.Errorf("%s: /run/flotilla has %s", s.what, got)
		}
	}

	if err := c.SetLink(ctx, "n1", false); err != nil {
		t.Fatal(err)
	}
	if out, err := c.SSH(ctx, "n2", "nc -z -w1 n1 22").CombinedOutput(); err == nil {
		t.Errorf("n2 reaches n1 although its link is cut: %s", out)
	}
	if err := c.SetLink(ctx, "n1", true); err != nil {
		t.Fatal(err)
	}
	nspawntest.Ready(t, c, "n1")
	nspawntest.On(t, c, "n2", "nc -z -w5 n1 22")

	if err := c.Stop(ctx); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"n1", "n2"} {
		create(t, c, provision.Spec{Name: name})
	}
	if got := nspawntest.On(t, c, "n1", "cat /root/kept"); got != "kept" {
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
	a, b := nspawntest.Cluster(t, h, "ta"), nspawntest.Cluster(t, h, "tb")
	m, n := create(t, a, provision.Spec{Name: "n1"}), create(t, b, provision.Spec{Name: "n1"})
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
	if got := nspawntest.On(t, b, "n1", "hostname"); got != "n1" {
		t.Errorf("tb's machine answers %q after ta is gone", got)
	}
}

// Where TestKilledBuild tells its second process to make a root file system.
const buildIn = "NSPAWN_TEST_BUILD_IN"

// A build of a root file system ends with the process that wanted it, and what
// it leaves on disk goes with the next removal of any cluster.
func TestKilledBuild(t *testing.T) {
	h := nspawntest.Host(t)
	if dir := os.Getenv(buildIn); dir != "" {
		h.Cache = dir
		_, err := h.Image(context.Background(), nspawn.DefaultRelease)
		t.Fatalf("the build ended before it was killed: %v", err)
	}
	h.State, h.Cache = filepath.Join(t.TempDir(), "clusters"), t.TempDir()
	cmd := exec.Command(os.Args[0], "-test.run=^TestKilledBuild$", "-test.v")
	cmd.Env = append(os.Environ(), buildIn+"="+h.Cache)
	cmd.Stdout, cmd.Stderr = t.Output(), t.Output()
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	await(t, "packages to be fetched", func() bool {
		found, err := filepath.Glob(filepath.Join(h.Cache, ".build-*", "root", "var", "cache", "apt", "archives", "partial", "*"))
		return err == nil && len(found) > 0
	})
	if err := cmd.Process.Signal(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait() // killed
	await(t, "the build to end", func() bool { return len(nspawntest.Processes(t, h.Cache)) == 0 })
	c, err := h.Cluster("tk")
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Remove(t.Context()); err != nil {
		t.Fatal(err)
	}
	if left, err := filepath.Glob(filepath.Join(h.Cache, ".build-*")); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}

func await(t *testing.T, what string, ready func() bool) {
	t.Helper()
	for limit := time.Now().Add(5 * time.Minute); !ready(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(limit) {
			t.Fatalf("waited in vain for %s", what)
		}
	}
}
