// Package systemdtest runs the tests of a package on machines of their own,
// with a real systemd as PID 1: containers of systemd-nspawn with a network of
// their own and a Debian in memory over a cached one. It knows how to boot and
// remove them; it must not know what is tested.
//
// It needs root, systemd-nspawn, mmdebstrap and, the first time, a Debian
// mirror.
package systemdtest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

const (
	release  = "FLOTILLA_SYSTEMDTEST_RELEASE" // set inside
	binary   = "/opt/flotilla.test"           // the test binary, inside
	source   = "/opt/package"                 // the folder of the package, inside
	cgroups  = "flotilla-systemdtest-"        // and our pid
	bootTime = 3 * time.Minute
)

// Main is for TestMain. On the machine it runs the tests; started by go test, it
// boots a machine of each Debian release ("trixie", "bookworm"), runs this
// test binary with its arguments on each of them, and exits with 1 if one of
// them failed.
func Main(m *testing.M, releases ...string) {
	if os.Getenv(release) != "" {
		if err := os.Chdir(source); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(m.Run())
	}
	if slices.ContainsFunc(os.Args[1:], func(arg string) bool { return strings.HasPrefix(arg, "-test.list") }) {
		os.Exit(m.Run())
	}
	// nspawn dies with the thread that started it. A machine that outlives that,
	// because its systemd has re-executed itself, is killed by the next run.
	runtime.LockOSThread()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGQUIT, syscall.SIGPIPE)
	exit := 0
	for _, r := range releases {
		if err := runOn(ctx, r); err != nil {
			fmt.Fprintf(os.Stderr, "tests on %s: %v\n", r, err)
			exit = 1
		}
	}
	stop()
	os.Exit(exit)
}

// Release names the Debian release that the test runs on.
func Release() string { return os.Getenv(release) }

func runOn(ctx context.Context, r string) (err error) {
	if os.Geteuid() != 0 {
		return errors.New("booting a machine takes root; to leave these tests out, leave out the build tag system")
	}
	for tool, pkg := range map[string]string{"systemd-nspawn": "systemd-container", "mmdebstrap": "mmdebstrap", "nsenter": "util-linux"} {
		if _, err := exec.LookPath(tool); err != nil {
			return fmt.Errorf("%s is missing: apt-get install %s", tool, pkg)
		}
	}
	root, err := rootOf(ctx, r)
	if err != nil {
		return err
	}
	began := time.Now()
	m, err := boot(ctx, root)
	if err != nil {
		return fmt.Errorf("boot: %w", err)
	}
	defer func() { err = errors.Join(err, m.remove()) }()
	fmt.Printf("%s booted in %v\n", r, time.Since(began).Round(time.Millisecond))

	args := []string{"--target=" + strconv.Itoa(m.leader), "--mount", "--uts", "--ipc", "--net", "--pid", "--cgroup", "--", binary}
	for _, arg := range os.Args[1:] {
		// Files of go test, which are not on the machine.
		if name, _, _ := strings.Cut(arg, "="); name != "-test.testlogfile" && name != "-test.gocoverdir" && name != "-test.coverprofile" {
			args = append(args, arg)
		}
	}
	tests := exec.CommandContext(ctx, "nsenter", args...)
	tests.Stdout, tests.Stderr = os.Stdout, os.Stderr
	tests.Env = []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root", "LANG=C.UTF-8", release + "=" + r}
	for _, v := range os.Environ() {
		if strings.HasPrefix(v, "GO") {
			tests.Env = append(tests.Env, v)
		}
	}
	return tests.Run()
}

// A machine is a running container.
type machine struct {
	nspawn *exec.Cmd
	ended  chan struct{} // closed when nspawn has ended
	output bytes.Buffer  // of nspawn; read it when it has ended
	leader int           // pid of the machine's PID 1
	groups []string      // made for it
}

func boot(ctx context.Context, root string) (m *machine, err error) {
	dir, err := os.MkdirTemp("", "systemdtest-")
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	notify, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: filepath.Join(dir, "notify"), Net: "unixgram"})
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, notify.Close()) }()
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	here, err := os.Getwd()
	if err != nil {
		return nil, err
	}
	m = &machine{ended: make(chan struct{})}
	if m.groups, err = makeGroups(); err != nil {
		return nil, err
	}
	// nspawn keeps to the control group that it is started in.
	args := []string{"-c", `while [ "$1" != -- ]; do echo $$ >"$1/cgroup.procs" || exit; shift; done; shift; exec "$@"`, "sh"}
	args = append(append(args, m.groups...), "--",
		"systemd-nspawn", "--quiet", "--boot", "--directory="+root, "--machine=systemdtest"+strconv.Itoa(os.Getpid()),
		"--volatile=overlay", "--register=no", "--keep-unit", "--private-network", "--link-journal=no",
		"--console=pipe", "--resolv-conf=off", "--timezone=off", "--notify-ready=yes",
		"--setenv=SYSTEMD_CGROUP_ENABLE_LEGACY_FORCE=1", // systemd 256 and newer want this where cgroup v1 is
		"--bind-ro="+self+":"+binary, "--bind-ro="+here+":"+source)
	m.nspawn = exec.Command("sh", args...)
	m.nspawn.Env = append(os.Environ(), "NOTIFY_SOCKET="+notify.LocalAddr().String())
	m.nspawn.Stdout, m.nspawn.Stderr = &m.output, &m.output
	m.nspawn.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := m.nspawn.Start(); err != nil {
		return nil, errors.Join(err, removeGroups(m.groups))
	}
	ready := make(chan error, 1)
	go func() {
		var err error
		m.leader, err = awaitBoot(notify)
		ready <- err
	}()
	go func() {
		_ = m.nspawn.Wait() // how it ends says nothing: it is killed
		close(m.ended)
		_ = notify.SetReadDeadline(time.Now()) // a closed socket has no deadline to set
	}()
	stop := context.AfterFunc(ctx, func() { _ = notify.SetReadDeadline(time.Now()) })
	defer stop()
	if err := <-ready; err != nil {
		kill := m.nspawn.Process.Kill()
		<-m.ended
		if errors.Is(kill, os.ErrProcessDone) {
			kill = nil
		}
		return nil, errors.Join(fmt.Errorf("the machine did not come up: %w: %s", err, bytes.TrimSpace(m.output.Bytes())), kill, removeGroups(m.groups))
	}
	return m, nil
}

// awaitBoot reads nspawn's notifications until the machine has booted, and
// returns the pid of its PID 1.
func awaitBoot(notify *net.UnixConn) (leader int, err error) {
	if err := notify.SetReadDeadline(time.Now().Add(bootTime)); err != nil {
		return 0, err
	}
	message := make([]byte, 4096)
	for ready := false; leader == 0 || !ready; {
		n, err := notify.Read(message)
		if err != nil {
			return 0, err
		}
		for line := range strings.Lines(string(message[:n])) {
			switch key, value, _ := strings.Cut(strings.TrimSpace(line), "="); key {
			case "X_NSPAWN_LEADER_PID":
				if leader, err = strconv.Atoi(value); err != nil {
					return 0, err
				}
			case "READY":
				ready = true
			}
		}
	}
	return leader, nil
}

// remove kills all processes of the machine and what it left in the kernel.
func (m *machine) remove() error {
	err := syscall.Kill(m.leader, syscall.SIGKILL)
	if errors.Is(err, syscall.ESRCH) {
		err = nil
	}
	<-m.ended
	return errors.Join(err, removeGroups(m.groups))
}

// makeGroups makes a control group for a machine in each hierarchy that systemd
// cares for, and removes those of dead test runs.
func makeGroups() ([]string, error) {
	var made []string
	for _, top := range []string{"/sys/fs/cgroup", "/sys/fs/cgroup/systemd", "/sys/fs/cgroup/unified"} {
		if _, err := os.Stat(filepath.Join(top, "cgroup.procs")); err != nil {
			continue
		}
		old, err := filepath.Glob(filepath.Join(top, cgroups+"*"))
		if err != nil {
			return nil, err
		}
		for _, group := range old {
			pid, err := strconv.Atoi(strings.TrimPrefix(filepath.Base(group), cgroups))
			if err == nil && errors.Is(syscall.Kill(pid, 0), syscall.ESRCH) {
				if err := errors.Join(killGroup(group), removeGroups([]string{group})); err != nil {
					return nil, err
				}
			}
		}
		group := filepath.Join(top, cgroups+strconv.Itoa(os.Getpid()))
		if err := os.Mkdir(group, 0o755); err != nil && !errors.Is(err, os.ErrExist) {
			return nil, errors.Join(err, removeGroups(made))
		}
		made = append(made, group)
	}
	return made, nil
}

// killGroup kills the processes in the group and in those in it.
func killGroup(group string) error {
	return filepath.WalkDir(group, func(path string, d os.DirEntry, err error) error {
		if err != nil || d.Name() != "cgroup.procs" {
			return err
		}
		pids, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		for _, field := range strings.Fields(string(pids)) {
			pid, err := strconv.Atoi(field)
			if err != nil {
				return err
			}
			if err := syscall.Kill(pid, syscall.SIGKILL); err != nil && !errors.Is(err, syscall.ESRCH) {
				return err
			}
		}
		return nil
	})
}

// removeGroups removes the groups and those in them. Killed processes leave
// them a moment later.
func removeGroups(groups []string) error {
	var dirs []string
	for _, group := range groups {
		err := filepath.WalkDir(group, func(path string, d os.DirEntry, err error) error {
			if err == nil && d.IsDir() {
				dirs = append(dirs, path)
			}
			return err
		})
		if err != nil {
			return err
		}
	}
	slices.Reverse(dirs)
	deadline := time.Now().Add(10 * time.Second)
	for _, dir := range dirs {
		for {
			err := os.Remove(dir)
			if err == nil || errors.Is(err, os.ErrNotExist) {
				break
			}
			if !errors.Is(err, syscall.EBUSY) || time.Now().After(deadline) {
				return err
			}
			time.Sleep(10 * time.Millisecond)
		}
	}
	return nil
}

// rootOf returns the folder of a Debian, which it makes when there is none yet.
func rootOf(ctx context.Context, r string) (root string, err error) {
	const cache = "/var/cache/flotilla/systemdtest"
	if err := os.MkdirAll(cache, 0o755); err != nil {
		return "", err
	}
	root = filepath.Join(cache, r)
	lock, err := os.OpenFile(root+".lock", os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return "", err
	}
	defer func() { err = errors.Join(err, lock.Close()) }()
	if err := syscall.Flock(int(lock.Fd()), syscall.LOCK_EX); err != nil {
		return "", fmt.Errorf("lock %s: %w", lock.Name(), err)
	}
	if _, err := os.Stat(root); err == nil {
		return root, nil
	}
	args, err := mirror(ctx)
	if err != nil {
		return "", err
	}
	fmt.Printf("making a Debian %s in %s, once\n", r, root)
	fresh := root + ".new"
	if err := os.RemoveAll(fresh); err != nil { // of one that was interrupted
		return "", err
	}
	args = append([]string{"--quiet", "--variant=minbase", "--include=systemd,systemd-sysv,dbus"}, args...)
	url := args[len(args)-1]
	build := exec.CommandContext(ctx, "mmdebstrap", append(args[:len(args)-1], r, fresh, url)...)
	build.Cancel = func() error { return build.Process.Signal(syscall.SIGTERM) }
	out, err := build.CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("mmdebstrap from %s: %w: %s", url, err, out[max(0, len(out)-2000):])
	}
	return root, os.Rename(fresh, root)
}

var (
	uri   = regexp.MustCompile(`(?m)^(?:URIs:|deb(?: \[[^]]*\])?) +(https?://\S*/debian)/?(?: |$)`)
	proxy = regexp.MustCompile(`(?m)^(Acquire::(?:https?::Proxy[^ ]*|Check-[^ ]*) ".*");$`)
)

// mirror returns options of mmdebstrap for this machine's way to a mirror, and
// as the last one its address.
func mirror(ctx context.Context) ([]string, error) {
	var args []string
	out, err := exec.CommandContext(ctx, "apt-config", "dump").Output()
	if err != nil {
		return nil, fmt.Errorf("apt-config: %w", err)
	}
	for _, found := range proxy.FindAllStringSubmatch(string(out), -1) {
		args = append(args, "--aptopt="+found[1])
	}
	lists, err := filepath.Glob("/etc/apt/sources.list.d/*")
	if err != nil {
		return nil, err
	}
	for _, name := range append([]string{"/etc/apt/sources.list"}, lists...) {
		text, err := os.ReadFile(name)
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return nil, err
		}
		if found := uri.FindSubmatch(text); found != nil {
			return append(args, string(found[1])), nil
		}
	}
	return append(args, "http://deb.debian.org/debian"), nil
}
