// Package nspawn makes machines on one Linux machine: systemd in containers of
// systemd-nspawn, each with a root file system, a network namespace and an
// address of its own on a bridge that its cluster shares. A Cluster is a
// provision.Provider; it can also unplug the network of a machine. It knows root
// file systems, namespaces and processes; it must not know what the machines are
// for, what units or services are, or any other platform.
//
// The record of a machine is written before anything else of it is made, and
// removed after everything else of it is gone. A program that is killed at any
// moment therefore leaves something that Make completes and Destroy removes.
package nspawn

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"flotilla/internal/provision"
)

// Cluster is the machines that share one name and one network.
type Cluster struct {
	host *Host
	name string
}

// Name returns the cluster's name.
func (c *Cluster) Name() string { return c.name }

// Exists reports whether something of the cluster is on this host.
func (c *Cluster) Exists() bool {
	_, err := os.Stat(c.dir())
	return err == nil
}

// Make makes a machine and starts it: see provision.Provider.
func (c *Cluster) Make(ctx context.Context, s provision.Spec) (provision.Machine, error) {
	m, err := c.make(ctx, s)
	if err != nil {
		return provision.Machine{}, fmt.Errorf("make machine %s: %w", s.Name, err)
	}
	return c.describe(m), nil
}

func (c *Cluster) make(ctx context.Context, s provision.Spec) (made machine, err error) {
	if err := checkName("machine", s.Name); err != nil {
		return made, err
	}
	s.Release = cmp.Or(s.Release, DefaultRelease)
	image, err := c.host.Image(ctx, s.Release)
	if err != nil {
		return made, err
	}
	if m, err := readMachine(c.machineDir(s.Name)); err == nil && m.State == stateLeaving {
		if err := c.Destroy(ctx, s.Name); err != nil { // an earlier Destroy was interrupted
			return made, err
		}
	}
	if _, err := c.reserve(ctx, s, image); err != nil {
		return made, err
	}
	err = c.withMachine(ctx, s.Name, func(m machine, held *held) error {
		made = m
		switch m.State {
		case stateLeaving:
			return errors.New("it is being destroyed at the same time")
		case stateMaking:
			if err := m.make(ctx, c, s); err != nil {
				return err
			}
			made.State = stateReady
			if err := made.write(); err != nil {
				return err
			}
		}
		return c.powerOn(ctx, made, held)
	})
	return made, err
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
		return removeButLast(m.dir, "machine.json")
	})
	if err != nil && !errors.Is(err, provision.ErrNotFound) {
		return fmt.Errorf("destroy machine %s: %w", name, err)
	}
	return c.writeHosts()
}

// List returns the machines, sorted by name.
func (c *Cluster) List(context.Context) ([]provision.Machine, error) {
	all, err := c.machines()
	if err != nil {
		return nil, fmt.Errorf("list machines of %s: %w", c.name, err)
	}
	list := make([]provision.Machine, len(all))
	for i, m := range all {
		list[i] = c.describe(m)
	}
	return list, nil
}

func (c *Cluster) describe(m machine) provision.Machine {
	return provision.Machine{
		Name: m.Name, Release: m.Release, Address: m.Address, MachineID: m.MachineID, Labels: m.Labels, Created: m.Created,
		Complete: m.State == stateReady, Running: c.alive(m.Name), Run: c.runDir(m.Name),
	}
}

// Console returns what the machine's console has printed since it was made.
func (c *Cluster) Console(_ context.Context, name string) (string, error) {
	text, err := os.ReadFile(filepath.Join(c.machineDir(name), "console.log"))
	if errors.Is(err, fs.ErrNotExist) {
		if _, err = os.Stat(c.machineDir(name)); err != nil {
			err = provision.ErrNotFound
		}
	}
	if err != nil {
		return "", fmt.Errorf("console of machine %s: %w", name, err)
	}
	return string(text), nil
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
	if errors.Is(err, provision.ErrNotFound) {
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
	if err := c.removeTraces(ctx); err != nil {
		return err
	}
	if err := removeButLast(c.dir(), "cluster.json"); err != nil {
		return err
	}
	for _, dir := range []string{c.host.Run, c.host.State, filepath.Dir(c.host.State)} {
		_ = os.Remove(dir) // unless another cluster is there
	}
	return nil
}

// Stop powers all machines off and takes the network down. What the machines have
// written stays; Make of each starts it.
func (c *Cluster) Stop(ctx context.Context) error {
	all, err := c.machines()
	done := make(chan error, len(all))
	for _, m := range all {
		go func() { done <- errors.Join(c.Power(ctx, m.Name, provision.PowerOff), c.disconnect(ctx, m)) }()
	}
	for range all {
		err = errors.Join(err, <-done)
	}
	if err == nil {
		err = c.removeTraces(ctx)
	}
	if err != nil {
		return fmt.Errorf("stop cluster %s: %w", c.name, err)
	}
	return nil
}

// Power switches the machine: see provision.Provider.
func (c *Cluster) Power(ctx context.Context, name string, to provision.Power) error {
	return c.named(ctx, "power "+string(to), name, func(m machine, held *held) error {
		switch to {
		case provision.PowerOn:
			return c.powerOn(ctx, m, held)
		case provision.PowerOff:
			return c.powerOff(ctx, name)
		case provision.PowerCut:
			return c.halt(ctx, name)
		case provision.Reboot:
			return c.reboot(ctx, name)
		}
		return errors.New("it can be on, off, cut or reboot")
	})
}

func (c *Cluster) powerOn(ctx context.Context, m machine, held *held) error {
	if m.State != stateReady {
		return errors.New("it was never completed: make it again")
	}
	n, err := c.readNetwork()
	if err != nil {
		return err
	}
	if err := c.connect(ctx, n, m); err != nil {
		return err
	}
	return c.boot(ctx, m, held)
}

// reboot returns when a new systemd runs.
func (c *Cluster) reboot(ctx context.Context, name string) error {
	before := c.leader(name)
	if before == 0 {
		return errors.New("it does not run")
	}
	c.signal(name, signalReboot)
	return until(ctx, "its new systemd", func() bool { now := c.leader(name); return now != 0 && now != before })
}

// SetLink unplugs the machine's network, or plugs it in again; its processes go on.
func (c *Cluster) SetLink(ctx context.Context, name string, up bool) error {
	what, state := "unplug", "down"
	if up {
		what, state = "plug in", "up"
	}
	return c.named(ctx, what, name, func(m machine, _ *held) error {
		_, err := run(ctx, "ip", "link", "set", m.link(c), state)
		return err
	})
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

// Run runs a command line on the machine: see provision.Provider.
func (c *Cluster) Run(ctx context.Context, name, command string, std provision.Streams) error {
	if _, err := readMachine(c.machineDir(name)); err != nil {
		return fmt.Errorf("run a command on machine %s: %w", name, err)
	}
	var args []string
	if command != "" {
		args = []string{command}
	}
	cmd := c.SSH(ctx, name, args...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = std.In, std.Out, std.Err
	return cmd.Run()
}

// Dial connects to a unix socket below the machine's /run/flotilla.
func (c *Cluster) Dial(ctx context.Context, name, socket string) (net.Conn, error) {
	rest, ok := strings.CutPrefix(socket, "/run/flotilla/")
	if !ok {
		return nil, fmt.Errorf("socket %s of machine %s cannot be reached: only those in /run/flotilla can", socket, name)
	}
	return new(net.Dialer).DialContext(ctx, "unix", filepath.Join(c.runDir(name), rest))
}

// SSH returns a command that runs args, which a shell there reads, as root on
// the machine, or a login shell if there are none.
func (c *Cluster) SSH(ctx context.Context, name string, args ...string) *exec.Cmd {
	address := name + ".invalid"
	if m, err := readMachine(c.machineDir(name)); err == nil {
		address = m.Address.String()
	}
	identity, known := c.Login()
	return exec.CommandContext(ctx, "ssh", slices.Concat([]string{"-F", "none", "-i", identity, "-o", "UserKnownHostsFile=" + known,
		"-o", "GlobalKnownHostsFile=none", "-o", "StrictHostKeyChecking=yes", "-o", "HostKeyAlias=" + name, "-o", "BatchMode=yes", "-o", "ConnectTimeout=5",
		"-o", "LogLevel=ERROR", "root@" + address}, args)...)
}

// Login returns what an ssh client needs: the file of a private key that every
// machine of the cluster takes for root and core, and a known_hosts file that
// has the machines under their names.
func (c *Cluster) Login() (identity, knownHosts string) {
	return c.key(), filepath.Join(c.dir(), "known_hosts")
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
