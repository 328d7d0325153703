package nspawn

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
)

// What has to be installed, and Debian's package that has it.
var tools = []struct{ name, pkg string }{
	{"systemd-nspawn", "systemd-container"}, {"mmdebstrap", "mmdebstrap"}, {"ip", "iproute2"}, {"nft", "nftables"},
	{"ssh", "openssh-client"}, {"ssh-keygen", "openssh-client"}, {"unshare", "util-linux"}, {"mount", "mount"},
}

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

// Check reports why this host cannot run machines: ErrNotRoot, MissingTools or
// what the kernel lacks. It changes nothing.
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
	for _, f := range []struct{ path, what string }{
		{"/proc/self/ns/net", "network namespaces"}, {"/proc/self/ns/pid", "process namespaces"}, {"/proc/self/ns/cgroup", "control group namespaces"},
	} {
		if _, err := os.Stat(f.path); err != nil {
			return fmt.Errorf("this kernel has no %s: use another one", f.what)
		}
	}
	if mounts, _ := cgroupMounts(); len(mounts) == 0 {
		return errors.New("no control groups are mounted that systemd could use: mount -t cgroup2 cgroup2 /sys/fs/cgroup")
	}
	return nil
}
