// Package nspawn makes machines on one Linux machine: systemd in containers of
// systemd-nspawn, each with a root file system, a network namespace and an
// address of its own on a bridge that its cluster shares. It creates, destroys
// and lists them, cuts their power and their network, and keeps what their
// consoles say. It knows root file systems, namespaces and processes; it must
// not know what the machines are for, what units or services are, or any other
// platform.
//
// What is made is written down before it is made, and what is written down is
// forgotten only after it is gone. So whoever is killed at any moment leaves
// something that Create continues and Destroy removes.
package nspawn

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// Host is the Linux machine that everything runs on. All its methods need root.
type Host struct {
	// State holds a directory for each cluster; it has to be on a file system
	// that overlayfs can write to, such as ext4, xfs or btrfs.
	State string
	// Cache holds root file systems to start from.
	Cache string
	// Run holds, for each machine, the directory that the machine sees as
	// /run/flotilla, so that its sockets are reached from outside. Paths of
	// sockets are short: so must this be.
	Run string
	Log *slog.Logger
}

// Default returns the host with the directories that are used if nothing else
// is said: /var/lib/flotilla/clusters, /var/cache/flotilla, /run/flotilla-clusters.
func Default(log *slog.Logger) *Host {
	return &Host{State: "/var/lib/flotilla/clusters", Cache: "/var/cache/flotilla", Run: "/run/flotilla-clusters", Log: log}
}

// ErrNotFound says that there is no machine or cluster of that name.
var ErrNotFound = errors.New("there is none of that name")

// Spec describes a machine to create.
type Spec struct {
	Name    string            // unique in the cluster; also the host name
	Release string            // of Debian; empty: DefaultRelease
	Labels  map[string]string // kept with the machine, shown by List
	Files   []File            // written before the first boot
}

// File is something to put into a machine's root file system: Text, or a copy
// of what is at Source on the host, or a symbolic link to Link.
type File struct {
	Path   string // absolute
	Mode   fs.FileMode
	Text   string
	Source string
	Link   string
}

// Machine is one machine as it is now.
type Machine struct {
	Name      string            `json:"name"`
	Release   string            `json:"release"`
	Address   netip.Addr        `json:"address"`
	MachineID string            `json:"machine_id"` // 32 hexadecimal digits
	Labels    map[string]string `json:"labels,omitempty"`
	Created   time.Time         `json:"created"`
	// Complete is false while the machine is being made or destroyed; Create or
	// Destroy finishes what somebody else has begun.
	Complete bool `json:"complete"`
	Running  bool `json:"running"`
	// Run is the directory on the host that the machine has as /run/flotilla.
	Run string `json:"run"`
}

// Cluster is the machines that share one name and one network.
type Cluster struct {
	host *Host
	name string
}

// Cluster returns the cluster of that name, which need not exist: its first
// machine makes it. It returns an error if the name is none.
func (h *Host) Cluster(name string) (*Cluster, error) {
	if err := checkName("cluster", name); err != nil {
		return nil, err
	}
	return &Cluster{h, name}, nil
}

// Clusters returns the names of the clusters that there are, sorted.
func (h *Host) Clusters() ([]string, error) {
	names, err := directories(h.State)
	if err != nil {
		return nil, fmt.Errorf("list clusters: %w", err)
	}
	return names, nil
}

// Name returns the cluster's name.
func (c *Cluster) Name() string { return c.name }

// Exists reports whether something of the cluster is on this host.
func (c *Cluster) Exists() bool {
	_, err := os.Stat(c.dir())
	return err == nil
}

// Create makes a machine and starts it. A machine of that name that is there
// already is started if it does not run, and stays as it was made; one that is
// half made is made anew. It returns when the machine's systemd runs.
func (c *Cluster) Create(ctx context.Context, s Spec) (Machine, error) {
	m, err := c.create(ctx, s)
	if err != nil {
		return m, fmt.Errorf("create machine %s: %w", s.Name, err)
	}
	return m, nil
}

func (c *Cluster) create(ctx context.Context, s Spec) (Machine, error) {
	if err := checkName("machine", s.Name); err != nil {
		return Machine{}, err
	}
	if s.Release == "" {
		s.Release = DefaultRelease
	}
	image, err := c.host.Image(ctx, s.Release)
	if err != nil {
		return Machine{}, err
	}
	if m, err := readMachine(c.machineDir(s.Name)); err == nil && m.State == stateLeaving {
		if err := c.Destroy(ctx, s.Name); err != nil { // somebody did not come to the end of it
			return Machine{}, err
		}
	}
	m, n, err := c.reserve(ctx, s, image)
	if err != nil {
		return Machine{}, err
	}
	held, err := lock(ctx, m.dir)
	if err != nil {
		return Machine{}, err
	}
	defer held.release()
	if m, err = readMachine(m.dir); err != nil {
		return Machine{}, err
	}
	if m.State == stateLeaving {
		return Machine{}, errors.New("it is being destroyed at the same time")
	}
	if m.State != stateReady {
		if err := m.make(ctx, c, s); err != nil {
			return Machine{}, err
		}
		m.State = stateReady
		if err := m.write(); err != nil {
			return Machine{}, err
		}
	}
	if err := c.connect(ctx, n, m); err != nil {
		return Machine{}, err
	}
	if err := c.boot(ctx, m, held); err != nil {
		return Machine{}, err
	}
	return c.describe(m), nil
}

// Destroy cuts the machine's power and removes everything of it. A machine that
// is not there is no error.
func (c *Cluster) Destroy(ctx context.Context, name string) error {
	err := c.withMachine(ctx, name, func(m machine, _ *held) error {
		m.State = stateLeaving
		if err := m.write(); err != nil {
			return err
		}
		if err := c.halt(ctx, m.Name); err != nil {
			return err
		}
		if err := c.disconnect(ctx, m); err != nil {
			return err
		}
		if err := os.RemoveAll(c.runDir(name)); err != nil {
			return err
		}
		return m.remove()
	})
	if err != nil && !errors.Is(err, ErrNotFound) {
		return fmt.Errorf("destroy machine %s: %w", name, err)
	}
	return c.writeHosts()
}

// List returns the machines, sorted by name.
func (c *Cluster) List(context.Context) ([]Machine, error) {
	all, err := c.machines()
	if err != nil {
		return nil, fmt.Errorf("list machines of %s: %w", c.name, err)
	}
	list := make([]Machine, len(all))
	for i, m := range all {
		list[i] = c.describe(m)
	}
	return list, nil
}

func (c *Cluster) describe(m machine) Machine {
	return Machine{
		Name: m.Name, Release: m.Release, Address: m.Address, MachineID: m.MachineID, Labels: m.Labels, Created: m.Created,
		Complete: m.State == stateReady, Running: c.alive(m.Name), Run: c.runDir(m.Name),
	}
}

// Console returns what the machine's console has said since it was made.
func (c *Cluster) Console(_ context.Context, name string) (string, error) {
	if err := checkName("machine", name); err != nil {
		return "", err
	}
	text, err := os.ReadFile(filepath.Join(c.machineDir(name), "console.log"))
	if errors.Is(err, fs.ErrNotExist) && !c.has(name) {
		err = ErrNotFound
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return "", fmt.Errorf("console of machine %s: %w", name, err)
	}
	return string(text), nil
}

func (c *Cluster) has(name string) bool {
	_, err := os.Stat(c.machineDir(name))
	return err == nil
}

// Remove destroys all machines, the network and everything else of the cluster.
// A cluster that is not there is no error.
func (c *Cluster) Remove(ctx context.Context) error {
	names, err := directories(filepath.Join(c.dir(), "nodes"))
	if err != nil {
		return fmt.Errorf("remove cluster %s: %w", c.name, err)
	}
	for _, name := range names {
		if err := c.Destroy(ctx, name); err != nil {
			return fmt.Errorf("remove cluster %s: %w", c.name, err)
		}
	}
	if err := errors.Join(c.removeRest(ctx), c.host.removeBuilds()); err != nil {
		return fmt.Errorf("remove cluster %s: %w", c.name, err)
	}
	return nil
}

func (c *Cluster) removeRest(ctx context.Context) error {
	held, err := lock(ctx, c.host.State)
	if errors.Is(err, ErrNotFound) || !c.Exists() {
		return c.removeTraces(ctx)
	}
	if err != nil {
		return err
	}
	defer held.release()
	// Between the list and the lock somebody may have made a machine.
	if left, err := directories(filepath.Join(c.dir(), "nodes")); err != nil || len(left) > 0 {
		return errors.Join(err, fmt.Errorf("machines were created meanwhile: %s", strings.Join(left, ", ")))
	}
	if err := c.removeNetwork(ctx); err != nil {
		return err
	}
	if err := os.RemoveAll(filepath.Join(c.host.Run, c.name)); err != nil {
		return err
	}
	_ = os.Remove(c.host.Run) // unless another cluster is there
	if err := c.removeDir(); err != nil {
		return err
	}
	_ = os.Remove(c.host.State) // these two as well
	_ = os.Remove(filepath.Dir(c.host.State))
	return nil
}

// Stop powers all machines off, each within limit or by force, and takes the
// network down. What the machines have written stays; Create of each starts it.
func (c *Cluster) Stop(ctx context.Context, limit time.Duration) error {
	all, err := c.machines()
	if err != nil {
		return fmt.Errorf("stop cluster %s: %w", c.name, err)
	}
	done := make(chan error, len(all))
	for _, m := range all {
		go func() { done <- c.PowerOff(ctx, m.Name, limit) }()
	}
	for range all {
		err = errors.Join(err, <-done)
	}
	for _, m := range all {
		err = errors.Join(err, c.disconnect(ctx, m))
	}
	if err == nil {
		err = errors.Join(c.removeNetwork(ctx), os.RemoveAll(filepath.Join(c.host.Run, c.name)))
	}
	if err != nil {
		return fmt.Errorf("stop cluster %s: %w", c.name, err)
	}
	return nil
}

// PowerCut ends every process of the machine at once, as a power failure does.
// What it has written to its disk stays.
func (c *Cluster) PowerCut(ctx context.Context, name string) error {
	return c.named(ctx, "cut the power of", name, func(m machine, _ *held) error { return c.halt(ctx, name) })
}

// PowerOff lets the machine shut down; after limit its power is cut.
func (c *Cluster) PowerOff(ctx context.Context, name string, limit time.Duration) error {
	return c.named(ctx, "power off", name, func(m machine, _ *held) error {
		c.signal(name, signalPowerOff)
		wait, cancel := context.WithTimeout(ctx, limit)
		defer cancel()
		if c.waitGone(wait, name) == nil {
			return c.sweep(name)
		}
		return c.halt(ctx, name)
	})
}

// PowerOn starts a machine that was powered off, with the data it had. It
// returns when its systemd runs; a machine that runs is left alone.
func (c *Cluster) PowerOn(ctx context.Context, name string) error {
	return c.named(ctx, "power on", name, func(m machine, held *held) error {
		if m.State != stateReady {
			return errors.New("it was never completed: create it again")
		}
		n, err := c.readNetwork()
		if err != nil {
			return err
		}
		if err := c.connect(ctx, n, m); err != nil {
			return err
		}
		return c.boot(ctx, m, held)
	})
}

// Reboot asks the machine's systemd to restart the machine. It returns when a
// new systemd runs.
func (c *Cluster) Reboot(ctx context.Context, name string) error {
	return c.named(ctx, "reboot", name, func(m machine, held *held) error {
		before := c.leader(name)
		if before == 0 {
			return errors.New("it does not run")
		}
		c.signal(name, signalReboot)
		return until(ctx, "its new systemd", func() bool { now := c.leader(name); return now != 0 && now != before })
	})
}

// CutLink makes the machine's network unplugged; its processes go on.
func (c *Cluster) CutLink(ctx context.Context, name string) error {
	return c.named(ctx, "unplug", name, func(m machine, _ *held) error { return c.setLink(ctx, m, "down") })
}

// RestoreLink plugs the machine's network in again.
func (c *Cluster) RestoreLink(ctx context.Context, name string) error {
	return c.named(ctx, "plug in", name, func(m machine, _ *held) error { return c.setLink(ctx, m, "up") })
}

func (c *Cluster) named(ctx context.Context, what, name string, do func(machine, *held) error) error {
	if err := c.withMachine(ctx, name, do); err != nil {
		return fmt.Errorf("%s machine %s: %w", what, name, err)
	}
	return nil
}

// withMachine holds the machine's lock during do.
func (c *Cluster) withMachine(ctx context.Context, name string, do func(machine, *held) error) error {
	if err := checkName("machine", name); err != nil {
		return err
	}
	held, err := lock(ctx, c.machineDir(name))
	if err != nil {
		return err
	}
	defer held.release()
	m, err := readMachine(c.machineDir(name))
	if err != nil {
		return err
	}
	return do(m, held)
}

// Ready waits until the machine answers ssh.
func (c *Cluster) Ready(ctx context.Context, name string) error {
	var out []byte
	err := until(ctx, "ssh", func() bool {
		cmd := c.SSH(ctx, name, "true")
		var err error
		out, err = cmd.CombinedOutput()
		return err == nil
	})
	if err != nil {
		return fmt.Errorf("reach machine %s: %w: %s", name, err, strings.TrimSpace(string(out)))
	}
	return nil
}

// SSH returns a command that runs args, which a shell there reads, as root on
// the machine, or a login shell if there are none.
func (c *Cluster) SSH(ctx context.Context, name string, args ...string) *exec.Cmd {
	return exec.CommandContext(ctx, "ssh", slices.Concat([]string{"-F", "none", "-i", c.key(), "-o", "UserKnownHostsFile=" + filepath.Join(c.dir(), "known_hosts"),
		"-o", "GlobalKnownHostsFile=none", "-o", "StrictHostKeyChecking=yes", "-o", "HostKeyAlias=" + name, "-o", "BatchMode=yes", "-o", "ConnectTimeout=5",
		"-o", "LogLevel=ERROR", "root@" + c.address(name)}, args)...)
}

func (c *Cluster) address(name string) string {
	m, err := readMachine(c.machineDir(name))
	if err != nil {
		return name + ".invalid"
	}
	return m.Address.String()
}

func (c *Cluster) dir() string                   { return filepath.Join(c.host.State, c.name) }
func (c *Cluster) machineDir(name string) string { return filepath.Join(c.dir(), "nodes", name) }
func (c *Cluster) runDir(name string) string     { return filepath.Join(c.host.Run, c.name, name) }
func (c *Cluster) key() string                   { return filepath.Join(c.dir(), "ssh", "id_ed25519") }

// until tries ready until it says yes or ctx ends.
func until(ctx context.Context, what string, ready func() bool) error {
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for !ready() {
		select {
		case <-ctx.Done():
			return fmt.Errorf("wait for %s: %w", what, context.Cause(ctx))
		case <-tick.C:
		}
	}
	return nil
}

// run runs a program and returns what it prints; an error ends with what it
// complains about.
func run(ctx context.Context, name string, args ...string) (string, error) {
	return runWith(ctx, "", name, args...)
}

func runWith(ctx context.Context, stdin, name string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Stdin = strings.NewReader(stdin)
	var out, complaint strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &complaint
	if err := cmd.Run(); err != nil {
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		return "", fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, strings.TrimSpace(complaint.String()))
	}
	return out.String(), nil
}

// removeTraces removes what the cluster has outside of its directory, for one
// whose directory is gone.
func (c *Cluster) removeTraces(ctx context.Context) error {
	if err := c.removeNetwork(ctx); err != nil {
		return err
	}
	return os.RemoveAll(filepath.Join(c.host.Run, c.name))
}
