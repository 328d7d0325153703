package nspawn

import (
	"bufio"
	"bytes"
	"context"
	_ "embed"
	"errors"
	"fmt"
	"io/fs"
	"iter"
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

// How long the first process of a machine may take to appear, and killed
// processes to go.
const bootLimit, killLimit = 30 * time.Second, 20 * time.Second

//go:embed boot.sh
var bootScript string

// boot starts the machine unless it runs, and returns when its systemd does.
func (c *Cluster) boot(ctx context.Context, m machine, held *held) error {
	if c.leader(m.Name) != 0 {
		return nil
	}
	// Half a start of somebody who was killed.
	if err := c.halt(ctx, m.Name); err != nil {
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
	name, args, env := c.bootCommand(m)
	cmd := exec.Command(name, args...)
	cmd.Dir = "/"
	cmd.Env = append([]string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG=C.UTF-8"}, env...)
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
	if err != nil {
		text, _ := os.ReadFile(console.Name())
		said := lastLines(string(text[min(before, int64(len(text))):]), 4)
		err = fmt.Errorf("%w: %s", err, said)
		if strings.Contains(said, "mount: ") {
			return explainKernel(err, "overlay file system that works on "+c.host.State, "overlay")
		}
		return err
	}
	return nil
}

// bootCommand returns the program that boots the machine, its arguments and
// environment.
func (c *Cluster) bootCommand(m machine) (name string, args, env []string) {
	root := filepath.Join(m.dir, "root")
	groups := ""
	if systemdIsFirst() {
		// A scope of its own outlives the session that this program was started in.
		args = []string{"systemd-run", "--scope", "--quiet", "--collect", "--unit=" + c.scope(m.Name), "--property=Delegate=yes",
			"--description=Machine " + m.Name + " of the Flotilla cluster " + c.name, "--"}
	} else {
		groups = strings.Join(c.groups(m.Name), " ")
	}
	args = append(args, "unshare", "--mount", "--propagation", "slave", "--", "/bin/sh", "-euc", bootScript, "boot",
		m.Image, filepath.Join(m.dir, "upper"), filepath.Join(m.dir, "work"), root, c.runDir(m.Name), groups,
		"systemd-nspawn", "--quiet", "--boot", "--register=no", "--keep-unit", "--network-namespace-path="+filepath.Join(namespaces, c.namespace(m.Name)),
		"--machine="+c.name+"."+m.Name, "--hostname="+m.Name, "--directory="+root, "--console=read-only",
		"--capability=CAP_NET_ADMIN", "--link-journal=no", "--resolv-conf=off", "--timezone=off",
		"--bind="+c.runDir(m.Name)+":/run/flotilla", "--bind-ro="+c.hosts()+":/etc/hosts",
		// As on a real machine: in memory, and gone when it is switched off.
		"--tmpfs=/run/flotilla/agent:mode=0755", "--tmpfs=/run/flotilla/units:mode=0755")
	if _, unified := cgroupMounts(); unified {
		env = []string{"SYSTEMD_NSPAWN_UNIFIED_HIERARCHY=1"}
	} else {
		// New versions of systemd take the old control groups only if told so.
		args = append(args, "--setenv=SYSTEMD_CGROUP_ENABLE_LEGACY_FORCE=1", "systemd.unified_cgroup_hierarchy=0")
	}
	return args[0], args[1:], env
}

func systemdIsFirst() bool {
	_, err := os.Stat("/run/systemd/system")
	return err == nil
}

func (c *Cluster) scope(name string) string { return "flotilla-" + c.name + "." + name + ".scope" }

// cgroupMounts returns where control groups are mounted that follow processes,
// and whether one of them is of the second version.
func cgroupMounts() (mounts []string, unified bool) {
	text, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, false
	}
	for line := range strings.Lines(string(text)) {
		before, after, ok := strings.Cut(line, " - ")
		if !ok {
			continue
		}
		at, kind := strings.Fields(before), strings.Fields(after)
		if len(at) < 5 || len(kind) < 3 {
			continue
		}
		switch {
		case kind[0] == "cgroup2":
			mounts, unified = append(mounts, at[4]), true
		case kind[0] == "cgroup" && strings.Contains(kind[2], "name=systemd"):
			mounts = append(mounts, at[4])
		}
	}
	slices.Sort(mounts)
	return slices.Compact(mounts), unified
}

// groups returns the directories of the machine's control groups where systemd
// does not make them.
func (c *Cluster) groups(name string) []string {
	mounts, _ := cgroupMounts()
	for i, m := range mounts {
		mounts[i] = filepath.Join(m, "flotilla-"+c.name+"."+name)
	}
	return mounts
}

// anyGroups returns all directories that can be control groups of the machine.
func (c *Cluster) anyGroups(name string) []string {
	list := c.groups(name)
	mounts, _ := cgroupMounts()
	for _, m := range mounts {
		list = append(list, filepath.Join(m, "system.slice", c.scope(name)))
	}
	return list
}

// processes returns the processes of the machine, those around its container
// included.
func (c *Cluster) processes(name string) []int {
	return slices.Compact(slices.Sorted(c.walk(name)))
}

// alive says whether the machine has any process, without looking for all.
func (c *Cluster) alive(name string) bool {
	for range c.walk(name) {
		return true
	}
	return false
}

// walk finds the processes of the machine in the groups that it may be in, in
// no order, some more than once.
func (c *Cluster) walk(name string) iter.Seq[int] {
	return func(yield func(int) bool) {
		for _, g := range c.anyGroups(name) {
			more := true
			_ = filepath.WalkDir(g, func(path string, d fs.DirEntry, err error) error {
				if err != nil || d.Name() != "cgroup.procs" {
					return nil // groups come and go
				}
				text, _ := os.ReadFile(path)
				for field := range strings.FieldsSeq(string(text)) {
					if pid, err := strconv.Atoi(field); err == nil && pid > 1 {
						if more = yield(pid); !more {
							return fs.SkipAll
						}
					}
				}
				return nil
			})
			if !more {
				return
			}
		}
	}
}

// leader returns the first process of the machine, seen from the host; 0 if it
// has none.
func (c *Cluster) leader(name string) int {
	for _, pid := range c.processes(name) {
		if depth, inner := innermost(pid); depth == 2 && inner == 1 && comm(pid) == "systemd" {
			return pid
		}
	}
	return 0
}

// innermost returns how many process namespaces the process is in, counted from
// this one, and its number in the last.
func innermost(pid int) (depth, inner int) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, 0
	}
	lines := bufio.NewScanner(bytes.NewReader(text))
	for lines.Scan() {
		if rest, ok := strings.CutPrefix(lines.Text(), "NSpid:"); ok {
			numbers := strings.Fields(rest)
			if len(numbers) == 0 {
				return 0, 0
			}
			inner, _ = strconv.Atoi(numbers[len(numbers)-1])
			return len(numbers), inner
		}
	}
	return 0, 0
}

func comm(pid int) string {
	text, _ := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid))
	return strings.TrimSpace(string(text))
}

// signal sends sig to the machine's first process.
func (c *Cluster) signal(name string, sig syscall.Signal) {
	if pid := c.leader(name); pid != 0 {
		_ = unix.Kill(pid, sig) // gone is as good
	}
}

// halt ends all processes of the machine and removes its control groups.
func (c *Cluster) halt(ctx context.Context, name string) error {
	// The container's first process takes all others with it; what stands around
	// it then ends by itself.
	c.signal(name, unix.SIGKILL)
	soon, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	if c.waitGone(soon, name) != nil {
		limit, cancel := context.WithTimeout(ctx, killLimit)
		defer cancel()
		err := until(limit, "its processes to end", func() bool {
			pids := c.processes(name)
			for _, pid := range pids {
				_ = unix.Kill(pid, unix.SIGKILL) // gone is as good
			}
			return len(pids) == 0
		})
		if err != nil {
			return fmt.Errorf("%w: %v are left", err, c.processes(name))
		}
	}
	return c.sweep(name)
}

func (c *Cluster) waitGone(ctx context.Context, name string) error {
	return until(ctx, "its processes to end", func() bool { return !c.alive(name) })
}

// sweep removes the control groups of a machine without processes.
func (c *Cluster) sweep(name string) error {
	var err error
	for _, g := range c.groups(name) {
		var dirs []string
		_ = filepath.WalkDir(g, func(path string, d fs.DirEntry, err error) error {
			if err == nil && d.IsDir() {
				dirs = append(dirs, path)
			}
			return nil
		})
		for _, dir := range slices.Backward(dirs) {
			if e := unix.Rmdir(dir); e != nil && !errors.Is(e, unix.ENOENT) {
				err = errors.Join(err, fmt.Errorf("remove control group %s: %w", dir, e))
			}
		}
	}
	return err
}
