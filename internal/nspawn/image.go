package nspawn

import (
	"context"
	"crypto/sha256"
	_ "embed"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"
)

// DefaultRelease is the release of Debian that machines get.
const DefaultRelease = "trixie"

// Releases are the releases of Debian that machines can have.
var releases = []string{"trixie", "bookworm"}

// Releases returns the releases of Debian that machines can have, the default
// first.
func Releases() []string { return slices.Clone(releases) }

// What a root file system has beyond Debian's minimum.
var packages = []string{
	"systemd", "systemd-sysv", "dbus", "libpam-systemd", "openssh-server", "sudo", "haproxy", "nftables", "iptables", "iproute2", "curl",
	"ca-certificates", "procps", "less", "netcat-openbsd", "bind9-dnsutils", "busybox", "etcd-client",
}

// What dpkg leaves out to keep it small.
var leftOut = []string{"/usr/share/man/*", "/usr/share/doc/*", "/usr/share/info/*", "/usr/share/locale/*"}

// customize runs on the host with the new root file system as first argument.
//
//go:embed customize.sh
var customize string

// recipe returns what a root file system is made of. The same recipe makes the
// same file system, but for newer versions of packages.
func recipe(release string) []string {
	args := []string{"--mode=root", "--variant=minbase", "--format=directory", "--include=" + strings.Join(packages, ","), "--dpkgopt=force-unsafe-io"}
	for _, path := range leftOut {
		args = append(args, "--dpkgopt=path-exclude="+path)
	}
	return append(args, "--customize-hook="+customize, release)
}

// Image returns the directory of a root file system of the release. The first
// call for a release makes it, which takes minutes and the network; the others
// find it in the cache.
func (h *Host) Image(ctx context.Context, release string) (string, error) {
	if !slices.Contains(releases, release) {
		return "", fmt.Errorf("there are no machines with Debian %q: choose one of %s", release, strings.Join(releases, ", "))
	}
	dir := h.imageDir(release)
	if h.ImageCached(release) {
		return dir, nil
	}
	if err := os.MkdirAll(h.Cache, 0o711); err != nil {
		return "", fmt.Errorf("make a root file system: %w", err)
	}
	held, err := lock(ctx, h.Cache)
	if err != nil {
		return "", fmt.Errorf("make a root file system: %w", err)
	}
	defer held.release()
	if h.ImageCached(release) {
		return dir, nil // another program made it while this one waited
	}
	began := time.Now()
	h.Log.Info("making the root file system, once", "release", release, "path", dir)
	if err := h.build(ctx, release, dir, held); err != nil {
		return "", fmt.Errorf("make a root file system of Debian %s: %w", release, err)
	}
	h.Log.Info("the root file system is made", "release", release, "took", time.Since(began).Round(time.Second))
	return dir, nil
}

// ImageCached reports whether Image of this release will return at once.
func (h *Host) ImageCached(release string) bool {
	_, err := os.Stat(h.imageDir(release))
	return err == nil
}

func (h *Host) imageDir(release string) string {
	sum := sha256.Sum256([]byte(strings.Join(recipe(release), "\n")))
	return filepath.Join(h.Cache, release+"-"+hex.EncodeToString(sum[:6]))
}

// build makes the root file system beside dir and renames it, after it has removed
// what interrupted builds have left. held is the lock of the cache.
func (h *Host) build(ctx context.Context, release, dir string, held *held) error {
	if err := h.removeLeft(); err != nil {
		return err
	}
	work := filepath.Join(h.Cache, ".build-"+filepath.Base(dir))
	if err := os.Mkdir(work, 0o711); err != nil {
		return err
	}
	defer func() { _ = os.RemoveAll(work) }()
	// Without apt on this host: Debian's public mirror and no proxy.
	targets, _ := run(ctx, "apt-get", "indextargets", "--format", "$(REPO_URI)|$(RELEASE)|$(COMPONENT)", "Created-By: Packages")
	config, _ := run(ctx, "apt-config", "dump", "Acquire")
	args := recipe(release)
	root := filepath.Join(work, "root")
	// mmdebstrap takes its arguments in this order: options, release, target, sources.
	args = slices.Concat(args[:len(args)-1], aptOptions(config), []string{release, root, "-"})
	log, err := os.Create(filepath.Join(work, "log"))
	if err != nil {
		return err
	}
	defer func() { _ = log.Close() }() // read only when mmdebstrap has written it
	if err := ends(ctx, sources(release, targets), log, held.file, "mmdebstrap", args...); err != nil {
		said, _ := os.ReadFile(log.Name())
		return fmt.Errorf("mmdebstrap: %w\n%s", err, lastLines(string(said), 6))
	}
	return os.Rename(root, dir)
}

// The suites of Debian by which a mirror of it is recognised among the host's
// sources; those of other distributions have other names.
const debianSuites = "bullseye|bookworm|trixie|forky|duke|sid|oldstable|stable|testing|unstable"

// sources returns the apt sources of the release: at the mirrors that the host
// itself uses, given the lists of its apt as URI|suite|component, else at the
// public ones.
func sources(release, targets string) string {
	mirror := regexp.MustCompile(`(?m)^(\S+?)/?\|(?:` + debianSuites + `)\|main$`).FindStringSubmatch(targets)
	security := regexp.MustCompile(`(?m)^(\S+?)/?\|(?:` + debianSuites + `)-security\|main$`).FindStringSubmatch(targets)
	if mirror == nil {
		mirror = []string{"", "http://deb.debian.org/debian"}
		if security == nil {
			security = []string{"", "http://deb.debian.org/debian-security"}
		}
	}
	text := "deb " + mirror[1] + " " + release + " main\n"
	if security != nil { // a host without it may not reach it
		text += "deb " + security[1] + " " + release + "-security main\n"
	}
	return text
}

// aptOptions returns the arguments that give mmdebstrap those settings of the
// host, as apt-config dump prints them, that say how servers are reached and
// believed.
func aptOptions(config string) []string {
	carried := regexp.MustCompile(`(?im)^Acquire::(?:(?:http|https|ftp|tor)::|Check-Valid-Until |Check-Date |Max-ValidTime |ForceIPv|Retries |Queue-Mode |proxy).*[^"]";$`)
	var args []string
	for _, line := range carried.FindAllString(config, -1) {
		args = append(args, "--aptopt="+line)
	}
	if len(args) > 0 {
		// Passwords of servers are in files beside the settings.
		args = append(args, `--aptopt=Dir::Etc::netrc "/etc/apt/auth.conf"`, `--aptopt=Dir::Etc::netrcparts "/etc/apt/auth.conf.d"`)
	}
	return args
}

// removeBuilds removes what killed builds have left, unless one is going on.
func (h *Host) removeBuilds() error {
	now, cancel := context.WithCancel(context.Background())
	cancel()
	held, err := lock(now, h.Cache)
	if err != nil {
		return nil // a build is going on, or there never was one
	}
	defer held.release()
	return h.removeLeft()
}

func (h *Host) removeLeft() error {
	left, err := filepath.Glob(filepath.Join(h.Cache, ".build-*"))
	for _, l := range left {
		err = errors.Join(err, os.RemoveAll(l))
	}
	return err
}

// ends runs a program that, with all its children, ends when this process does
// and that holds on to lock until then.
func ends(ctx context.Context, stdin string, log, lock *os.File, name string, args ...string) error {
	done := make(chan error, 1)
	go func() {
		// The kernel sends the death signal when the thread ends that started the
		// child, so the thread must not end before.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		cmd := exec.CommandContext(ctx, "unshare", append([]string{"--pid", "--fork", "--kill-child", "--mount-proc", name}, args...)...)
		cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(stdin), log, log
		cmd.ExtraFiles = []*os.File{lock}
		cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setpgid: true}
		done <- cmd.Run()
	}()
	if err := <-done; err != nil {
		return errors.Join(context.Cause(ctx), err)
	}
	return nil
}

func lastLines(text string, n int) string {
	lines := strings.Split(strings.TrimSpace(text), "\n")
	return strings.Join(lines[max(0, len(lines)-n):], "\n")
}
