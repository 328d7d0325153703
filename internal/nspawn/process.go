package nspawn

import (
	"context"
	_ "embed"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// What systemd, as a machine's first process, understands: SIGRTMIN+4 and +5.
const signalPowerOff, signalReboot = syscall.Signal(34 + 4), syscall.Signal(34 + 5)

// How long the first process of a machine may take to appear, a machine to shut
// down before its power is cut, and killed processes to go.
const bootLimit, powerOffLimit, killLimit = 30 * time.Second, 30 * time.Second, 20 * time.Second

//go:embed boot.sh
var bootScript string

// boot starts the machine unless it runs, and returns when its systemd does.
func (c *Cluster) boot(ctx context.Context, m machine, held *held) error {
	if c.leader(m.Name) != 0 {
		return nil
	}
	if err := c.halt(ctx, m.Name); err != nil { // what a killed program has begun to start
		return err
	}
	if err := os.MkdirAll(c.runDir(m.Name), 0o755); err != nil {
		return err
	}
	console, err := os.OpenFile(filepath.Join(m.dir, "console.log"), os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	defer func() { _ = console.Close() }() // the machine has its own
	before, err := console.Seek(0, 2)
	if err != nil {
		return err
	}
	args := c.bootCommand(m)
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Dir = "/"
	cmd.Env = []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG=C.UTF-8", "SYSTEMD_NSPAWN_UNIFIED_HIERARCHY=1"}
	cmd.Stdout, cmd.Stderr = console, console
	cmd.ExtraFiles = []*os.File{held.file} // until the container starts: see boot.sh
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return err
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }() // the machine outlives this process; as long as both live, this one reaps
	ctx, cancel := context.WithTimeout(ctx, bootLimit)
	defer cancel()
	var failed error
	err = until(ctx, "its systemd", func() bool {
		select {
		case failed = <-ended:
			return true
		default:
			return c.leader(m.Name) != 0
		}
	})
	if err == nil && c.leader(m.Name) == 0 {
		err = fmt.Errorf("it ended at once: %w", failed)
	}
	if err == nil {
		return nil
	}
	text, _ := os.ReadFile(console.Name())
	said := lastLines(string(text[min(before, int64(len(text))):]), 4)
	err = fmt.Errorf("%w: %s", err, said)
	if strings.Contains(said, "mount: ") {
		return explainKernel(err, "overlay file system that works on "+c.host.State, "overlay")
	}
	return err
}

// bootCommand returns the program that boots the machine, with its arguments.
func (c *Cluster) bootCommand(m machine) []string {
	var args []string
	if systemdIsFirst() {
		// A scope of its own outlives the session that this program was started in.
		args = []string{"systemd-run", "--scope", "--quiet", "--collect", "--unit=" + filepath.Base(c.group(m.Name)), "--property=Delegate=yes",
			"--description=Machine " + m.Name + " of the Flotilla cluster " + c.name, "--"}
	}
	root := filepath.Join(m.dir, "root")
	return append(args, "unshare", "--mount", "--propagation", "slave", "--", "/bin/sh", "-euc", bootScript, "boot",
		m.Image, filepath.Join(m.dir, "upper"), filepath.Join(m.dir, "work"), root, c.runDir(m.Name), c.group(m.Name),
		"systemd-nspawn", "--quiet", "--boot", "--register=no", "--keep-unit", "--network-namespace-path="+filepath.Join(namespaces, c.namespace(m.Name)),
		"--machine="+c.name+"."+m.Name, "--hostname="+m.Name, "--directory="+root, "--console=read-only",
		"--capability=CAP_NET_ADMIN", "--link-journal=no", "--resolv-conf=off", "--timezone=off",
		"--bind="+c.runDir(m.Name)+":/run/flotilla", "--bind-ro="+c.hosts()+":/etc/hosts",
		// As on a real machine: in memory, and gone when it is switched off.
		"--tmpfs=/run/flotilla/agent:mode=0755", "--tmpfs=/run/flotilla/units:mode=0755")
}

func systemdIsFirst() bool {
	_, err := os.Stat("/run/systemd/system")
	return err == nil
}

// group returns the control group of all processes of the machine, those around
// its container included: a scope of systemd, or a group that boot.sh makes.
func (c *Cluster) group(name string) string {
	group := "flotilla-" + c.name + "." + name
	if systemdIsFirst() {
		return filepath.Join(cgroups(), "system.slice", group+".scope")
	}
	return filepath.Join(cgroups(), group)
}

// alive says whether the machine has any process.
func (c *Cluster) alive(name string) bool {
	events, _ := os.ReadFile(filepath.Join(c.group(name), "cgroup.events"))
	return strings.Contains(string(events), "populated 1")
}

// leader returns the first process of the machine, systemd, as the host numbers
// it; 0 if it has none. systemd-nspawn puts the container into the group payload,
// and systemd itself into init.scope in it.
func (c *Cluster) leader(name string) int {
	text, _ := os.ReadFile(filepath.Join(c.group(name), "payload", "init.scope", "cgroup.procs"))
	for field := range strings.FieldsSeq(string(text)) {
		status, _ := os.ReadFile("/proc/" + field + "/status")
		_, rest, _ := strings.Cut(string(status), "\nNSpid:")
		line, _, _ := strings.Cut(rest, "\n")
		if strings.HasSuffix(line, "\t1") { // its number inside
			pid, _ := strconv.Atoi(field)
			return pid
		}
	}
	return 0
}

// signal sends sig to the machine's first process.
func (c *Cluster) signal(name string, sig syscall.Signal) {
	if pid := c.leader(name); pid != 0 {
		_ = unix.Kill(pid, sig) // gone is as good
	}
}

// powerOff lets the machine shut down; after a while its power is cut.
func (c *Cluster) powerOff(ctx context.Context, name string) error {
	c.signal(name, signalPowerOff)
	wait, cancel := context.WithTimeout(ctx, powerOffLimit)
	defer cancel()
	_ = c.awaitGone(wait, name) // else by force
	return c.halt(ctx, name)
}

// halt ends all processes of the machine and removes its control groups.
func (c *Cluster) halt(ctx context.Context, name string) error {
	err := os.WriteFile(filepath.Join(c.group(name), "cgroup.kill"), []byte("1"), 0)
	if err != nil && c.alive(name) {
		return fmt.Errorf("end its processes (which takes Linux 5.14 or newer): %w", err)
	}
	limit, cancel := context.WithTimeout(ctx, killLimit)
	defer cancel()
	if err := c.awaitGone(limit, name); err != nil {
		return err
	}
	return c.removeGroups(name)
}

func (c *Cluster) awaitGone(ctx context.Context, name string) error {
	return until(ctx, "its processes to end", func() bool { return !c.alive(name) })
}

// removeGroups removes the control groups of a machine without processes, unless
// systemd does.
func (c *Cluster) removeGroups(name string) error {
	if systemdIsFirst() {
		return nil
	}
	var dirs []string
	find := func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() {
			dirs = append(dirs, path)
		}
		return nil
	}
	_ = filepath.WalkDir(c.group(name), find)
	if base, both := strings.CutSuffix(cgroups(), "/unified"); both {
		// Where the first version is mounted too, systemd-nspawn makes the same group in it.
		_ = filepath.WalkDir(filepath.Join(base, "systemd", filepath.Base(c.group(name))), find)
	}
	var err error
	for _, dir := range slices.Backward(dirs) {
		if e := unix.Rmdir(dir); e != nil && !errors.Is(e, unix.ENOENT) {
			err = errors.Join(err, fmt.Errorf("remove control group %s: %w", dir, e))
		}
	}
	return err
}
