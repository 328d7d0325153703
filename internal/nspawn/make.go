package nspawn

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"flotilla/internal/durable"
	"flotilla/internal/nodeconfig"
	"flotilla/internal/provision"
)

// make writes what the machine's root file system has beyond the image. What an
// earlier try has left is removed before.
func (m machine) make(ctx context.Context, c *Cluster, s provision.Spec) error {
	key, err := c.makeKey(ctx)
	if err != nil {
		return err
	}
	for _, dir := range []string{"upper", "work", "root"} {
		if err := os.RemoveAll(filepath.Join(m.dir, dir)); err != nil {
			return err
		}
		if err := os.Mkdir(filepath.Join(m.dir, dir), 0o755); err != nil {
			return err
		}
	}
	resolv := ""
	for _, a := range append([]netip.Addr{m.Address}, hostNameservers()...) { // itself first: it may know names of its own
		resolv += "nameserver " + a.String() + "\n"
	}
	files := []nodeconfig.File{
		{Path: "/etc/machine-id", Mode: 0o444, Text: m.MachineID + "\n"},
		{Path: "/etc/hostname", Text: m.Name + "\n"},
		{Path: "/etc/hosts"}, // the cluster's file is laid over it
		{Path: "/etc/resolv.conf", Text: resolv + "options timeout:1 attempts:3\n"},
		{Path: "/root/.ssh/authorized_keys", Mode: 0o600, Text: key},
		{Path: "/home/core/.ssh/authorized_keys", Mode: 0o600, Text: key},
	}
	for _, f := range append(files, s.Files...) {
		if err := m.put(f); err != nil {
			return fmt.Errorf("write %s: %w", f.Path, err)
		}
	}
	for _, path := range []string{"/home/core/.ssh", "/home/core/.ssh/authorized_keys"} {
		if err := os.Lchown(m.upper(path), coreID, coreID); err != nil {
			return err
		}
	}
	if err := c.makeHostKey(ctx, m); err != nil {
		return err
	}
	// A /usr newer than the image's would make the first boot update caches.
	info, err := os.Stat(filepath.Join(m.Image, "usr"))
	if err != nil {
		return err
	}
	if err := os.Chtimes(m.upper("/usr"), info.ModTime(), info.ModTime()); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// The user and group core, as customize.sh makes them.
const coreID = 500

func (m machine) upper(path string) string {
	return filepath.Join(m.dir, "upper", filepath.Clean(path))
}

// put writes one file into the layer above the image. Directories that the image
// has keep their owner and mode.
func (m machine) put(f nodeconfig.File) error {
	if !filepath.IsAbs(f.Path) {
		return errors.New("not an absolute path")
	}
	if err := m.putDir(filepath.Dir(filepath.Clean(f.Path))); err != nil {
		return err
	}
	to := m.upper(f.Path)
	if err := os.RemoveAll(to); err != nil {
		return err
	}
	mode := f.Mode
	if mode == 0 {
		mode = 0o644
	}
	switch {
	case f.Link != "":
		return os.Symlink(f.Link, to)
	case f.Source != "":
		return copyFile(f.Source, to, mode)
	}
	return errors.Join(os.WriteFile(to, []byte(f.Text), mode), os.Chmod(to, mode))
}

func (m machine) putDir(dir string) error {
	if _, err := os.Lstat(m.upper(dir)); err == nil || dir == "/" {
		return nil
	}
	if err := m.putDir(filepath.Dir(dir)); err != nil {
		return err
	}
	mode, uid, gid := fs.FileMode(0o755), 0, 0
	info, err := os.Lstat(filepath.Join(m.Image, dir))
	switch {
	case err == nil && info.IsDir():
		mode = info.Mode()
		uid, gid = owner(info)
	case err == nil:
		return fmt.Errorf("%s is no directory there: give the path without links", dir)
	case strings.HasSuffix(dir, "/.ssh"):
		mode = 0o700
	}
	to := m.upper(dir)
	// Mkdir heeds the umask, and neither call sets what the other does.
	return errors.Join(os.Mkdir(to, 0o700), os.Lchown(to, uid, gid), os.Chmod(to, mode))
}

// makeKey returns the public half of the cluster's ssh key, which the first
// machine makes.
func (c *Cluster) makeKey(ctx context.Context) (string, error) {
	held, err := lock(ctx, c.dir())
	if err != nil {
		return "", err
	}
	defer held.release()
	public, err := os.ReadFile(c.key() + ".pub")
	if errors.Is(err, fs.ErrNotExist) {
		if err := os.MkdirAll(filepath.Dir(c.key()), 0o700); err != nil {
			return "", err
		}
		public, err = newKey(ctx, c.key(), "flotilla cluster "+c.name)
	}
	return string(public), err
}

// newKey makes an ssh key at path, in place of one that was half made, and returns
// its public half, which ssh-keygen writes last.
func newKey(ctx context.Context, path, comment string) ([]byte, error) {
	if err := os.RemoveAll(path); err != nil {
		return nil, err
	}
	if _, err := run(ctx, "ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", comment, "-f", path); err != nil {
		return nil, err
	}
	return os.ReadFile(path + ".pub")
}

// makeHostKey makes the key by which the machine is known and adds it to the
// cluster's file of known hosts.
func (c *Cluster) makeHostKey(ctx context.Context, m machine) error {
	if err := m.putDir("/etc/ssh"); err != nil {
		return err
	}
	public, err := newKey(ctx, m.upper("/etc/ssh/ssh_host_ed25519_key"), m.Name)
	if err != nil {
		return err
	}
	held, err := lock(ctx, c.dir())
	if err != nil {
		return err
	}
	defer held.release()
	known, err := os.ReadFile(filepath.Join(c.dir(), "known_hosts"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	var lines strings.Builder
	for line := range strings.Lines(string(known)) {
		if !strings.HasPrefix(line, m.Name+",") {
			lines.WriteString(line)
		}
	}
	fmt.Fprintf(&lines, "%s,%s %s", m.Name, m.Address, public)
	return durable.WriteFile(filepath.Join(c.dir(), "known_hosts"), []byte(lines.String()), 0o644)
}

func owner(info fs.FileInfo) (uid, gid int) {
	if s, ok := info.Sys().(*syscall.Stat_t); ok {
		return int(s.Uid), int(s.Gid)
	}
	return 0, 0
}

// copyFile copies a file of the host.
func copyFile(from, to string, mode fs.FileMode) error {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer func() { _ = in.Close() }() // only read
	out, err := os.OpenFile(to, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, mode)
	if err != nil {
		return err
	}
	_, err = out.ReadFrom(in)
	return errors.Join(err, out.Chmod(mode), out.Close())
}
