package nspawn

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"flotilla/internal/provision"
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

// Default returns the host with the usual directories.
func Default(log *slog.Logger) *Host {
	return &Host{State: "/var/lib/flotilla/clusters", Cache: "/var/cache/flotilla", Run: "/run/flotilla-clusters", Log: log}
}

// Cluster returns the cluster of that name, which need not exist: its first
// machine makes it.
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

// Summary is a cluster in few words.
type Summary struct {
	Name     string       `json:"name"`
	Machines int          `json:"nodes"`
	Running  int          `json:"running"`
	Network  netip.Prefix `json:"network"`
}

// Summaries returns the clusters that there are, sorted by name.
func (h *Host) Summaries(ctx context.Context) ([]Summary, error) {
	names, err := h.Clusters()
	list := []Summary{}
	for _, name := range names {
		c, bad := h.Cluster(name)
		if bad != nil {
			continue // not one of ours
		}
		machines, err := c.List(ctx)
		if err != nil {
			return nil, err
		}
		_, prefix, err := c.Labels()
		if err != nil && !errors.Is(err, provision.ErrNotFound) {
			return nil, err
		}
		s := Summary{Name: name, Machines: len(machines), Network: prefix}
		for _, m := range machines {
			if m.Running {
				s.Running++
			}
		}
		list = append(list, s)
	}
	return list, err
}

// What has to be installed, and Debian's package that has it.
var tools = []struct{ name, pkg string }{
	{"systemd-nspawn", "systemd-container"}, {"mmdebstrap", "mmdebstrap"}, {"ip", "iproute2"}, {"nft", "nftables"},
	{"ssh", "openssh-client"}, {"ssh-keygen", "openssh-client"}, {"unshare", "util-linux"}, {"mount", "mount"},
}

// leastSystemd is the oldest version of systemd-nspawn that is expected to work:
// that of Ubuntu 22.04.
const leastSystemd = 249

// ErrNotRoot says that only root can make machines.
var ErrNotRoot = errors.New("machines on this host are made by root only")

// MissingTools says which programs are not installed.
type MissingTools struct {
	Tools    []string // programs
	Packages []string // of Debian and Ubuntu, that have them
}

func (e *MissingTools) Error() string {
	return "not installed here: " + strings.Join(e.Tools, ", ")
}

// Check reports why this host cannot run machines: ErrNotRoot, MissingTools, or
// what is too old or not there, with a remedy. It changes nothing.
func (h *Host) Check() error {
	if os.Geteuid() != 0 {
		return ErrNotRoot
	}
	missing := &MissingTools{}
	for _, t := range tools {
		if _, err := exec.LookPath(t.name); err != nil {
			missing.Tools = append(missing.Tools, t.name)
			if !slices.Contains(missing.Packages, t.pkg) {
				missing.Packages = append(missing.Packages, t.pkg)
			}
		}
	}
	if len(missing.Tools) > 0 {
		return missing
	}
	out, err := exec.Command("systemd-nspawn", "--version").Output()
	if err != nil {
		return fmt.Errorf("ask systemd-nspawn for its version: %w", err)
	}
	if v := systemdVersion(string(out)); v < leastSystemd {
		return fmt.Errorf("systemd-nspawn %d is too old: use a host with systemd %d or newer, such as Debian 12 or Ubuntu 22.04", v, leastSystemd)
	}
	for _, kind := range []string{"net", "pid", "cgroup"} {
		if _, err := os.Stat("/proc/self/ns/" + kind); err != nil {
			return fmt.Errorf("this kernel has no %s namespaces: use another one", kind)
		}
	}
	if cgroups() == "" {
		return errors.New("version 2 of control groups is not mounted: mount -t cgroup2 cgroup2 /sys/fs/cgroup, or boot with systemd.unified_cgroup_hierarchy=1")
	}
	return nil
}

// systemdVersion reads the output of systemd-nspawn --version; 0 if it cannot.
func systemdVersion(text string) int {
	fields := strings.FieldsFunc(text, func(r rune) bool { return r == ' ' || r == '.' || r == '~' || r == '\n' })
	if len(fields) < 2 {
		return 0
	}
	v, _ := strconv.Atoi(fields[1])
	return v
}

// cgroups returns where version 2 of control groups is mounted: alone, or beside
// the first version; empty if nowhere.
var cgroups = sync.OnceValue(func() string {
	for _, path := range []string{"/sys/fs/cgroup", "/sys/fs/cgroup/unified"} {
		var fs unix.Statfs_t
		if err := unix.Statfs(path, &fs); err == nil && fs.Type == unix.CGROUP2_SUPER_MAGIC {
			return path
		}
	}
	return ""
})
