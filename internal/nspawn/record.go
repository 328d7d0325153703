package nspawn

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"flotilla/internal/durable"
	"flotilla/internal/provision"
)

// A machine is made in the directory of its record, <state>/<cluster>/nodes/<name>.
type state string

const (
	stateMaking  state = "making"
	stateReady   state = "ready"
	stateLeaving state = "leaving"
)

// machine is the record of a machine, on disk before anything else of it is
// made and until everything else of it is gone.
type machine struct {
	V         int               `json:"v"`
	Name      string            `json:"name"`
	State     state             `json:"state"`
	Release   string            `json:"release"`
	Image     string            `json:"image"` // directory of the root file system it starts from
	Index     int               `json:"index"` // last byte of the address
	Address   netip.Addr        `json:"address"`
	MachineID string            `json:"machine_id"`
	Labels    map[string]string `json:"labels,omitempty"`
	Created   time.Time         `json:"created"`

	dir string
}

// network is the record of a cluster.
type network struct {
	V      int          `json:"v"`
	Prefix netip.Prefix `json:"prefix"` // a /24; .1 is the host
	Made   time.Time    `json:"made"`
	// Labels are what Found was given last.
	Labels map[string]string `json:"labels,omitempty"`
}

var nameForm = sync.OnceValue(func() *regexp.Regexp {
	return regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,28}[a-z0-9])?$`)
})

// checkName accepts what can be a host name, a directory and part of the name
// of a network interface.
func checkName(what, name string) error {
	if !nameForm().MatchString(name) {
		return fmt.Errorf("%q is not a name for a %s: use 1 to 30 lower-case letters, digits and '-', with no '-' at either end", name, what)
	}
	return nil
}

// lockState locks the list of the host's clusters.
func (h *Host) lockState(ctx context.Context) (*held, error) {
	for {
		if err := os.MkdirAll(h.State, 0o711); err != nil {
			return nil, err
		}
		// Removing the last cluster removes the directory too.
		if held, err := lock(ctx, h.State); !errors.Is(err, provision.ErrNotFound) {
			return held, err
		}
	}
}

// Found writes the cluster down, with labels instead of those that it had. It
// makes nothing else: Make does.
func (c *Cluster) Found(ctx context.Context, labels map[string]string) error {
	held, err := c.host.lockState(ctx)
	if err != nil {
		return fmt.Errorf("found cluster %s: %w", c.name, err)
	}
	defer held.release()
	n, err := c.found(ctx)
	if err == nil {
		n.Labels = labels
		err = writeJSON(c.record(), n)
	}
	if err != nil {
		return fmt.Errorf("found cluster %s: %w", c.name, err)
	}
	return nil
}

// Labels returns what Found was given, and the network of the cluster; an
// error is provision.ErrNotFound if there is no such cluster.
func (c *Cluster) Labels() (labels map[string]string, prefix netip.Prefix, err error) {
	n, err := c.readNetwork()
	if err != nil {
		return nil, netip.Prefix{}, fmt.Errorf("cluster %s: %w", c.name, err)
	}
	return n.Labels, n.Prefix, nil
}

func (c *Cluster) record() string { return filepath.Join(c.dir(), "cluster.json") }

// reserve writes down a machine with a free address, and the cluster if this is
// its first machine. One that is known already is returned as it is.
func (c *Cluster) reserve(ctx context.Context, s provision.Spec, image string) (machine, error) {
	all, err := c.host.lockState(ctx)
	if err != nil {
		return machine{}, err
	}
	defer all.release()
	n, err := c.found(ctx)
	if err != nil {
		return machine{}, err
	}
	known, err := c.machines()
	if err != nil {
		return machine{}, err
	}
	taken := map[int]bool{}
	for _, m := range known {
		if m.Name == s.Name {
			return m, nil
		}
		taken[m.Index] = true
	}
	index := freeIndex(s.Name, taken)
	if index == 0 {
		return machine{}, fmt.Errorf("cluster %s has no address left in %s", c.name, n.Prefix)
	}
	var id [16]byte
	_, _ = rand.Read(id[:]) // it never fails
	id[6], id[8] = id[6]&0x0f|0x40, id[8]&0x3f|0x80
	m := machine{
		V: 1, Name: s.Name, State: stateMaking, Release: s.Release, Image: image, Index: index, Address: hostAddress(n.Prefix, index),
		MachineID: hex.EncodeToString(id[:]), Labels: s.Labels, Created: time.Now().UTC().Truncate(time.Second), dir: c.machineDir(s.Name),
	}
	if err := os.MkdirAll(m.dir, 0o700); err != nil {
		return m, err
	}
	return m, m.write()
}

var number = sync.OnceValue(func() *regexp.Regexp {
	return regexp.MustCompile(`[1-9][0-9]{0,2}$`)
})

// freeIndex returns the last byte of a new machine's address, 0 if none is left.
// If it can, n3 gets 13: addresses are easier to read that way.
func freeIndex(name string, taken map[int]bool) int {
	n, _ := strconv.Atoi(number().FindString(name))
	if n += firstIndex - 1; n >= firstIndex && n <= lastIndex && !taken[n] {
		return n
	}
	for i := firstIndex; i <= lastIndex; i++ {
		if !taken[i] {
			return i
		}
	}
	return 0
}

// The last bytes of addresses that machines get.
const firstIndex, lastIndex = 11, 254

// found returns the record of the cluster. A new cluster gets a free network and
// is written down. The caller holds the lock of the host's state.
func (c *Cluster) found(ctx context.Context) (network, error) {
	if n, err := c.readNetwork(); !errors.Is(err, provision.ErrNotFound) {
		return n, err
	}
	used, err := usedNetworks(ctx)
	if err != nil {
		return network{}, err
	}
	names, err := c.host.Clusters()
	if err != nil {
		return network{}, err
	}
	for _, name := range names {
		other := Cluster{c.host, name}
		if n, err := other.readNetwork(); err == nil {
			used = append(used, n.Prefix)
		}
	}
	prefix, err := freeNetwork(used)
	if err != nil {
		return network{}, err
	}
	n := network{V: 1, Prefix: prefix, Made: time.Now().UTC().Truncate(time.Second)}
	if err := os.MkdirAll(filepath.Join(c.dir(), "nodes"), 0o711); err != nil {
		return n, err
	}
	return n, writeJSON(c.record(), n)
}

func (c *Cluster) readNetwork() (network, error) {
	var n network
	err := readJSON(c.record(), &n)
	if err == nil && (!n.Prefix.Addr().Is4() || n.Prefix.Bits() != 24) {
		err = fmt.Errorf("%s is damaged: %s is no network of a cluster", c.record(), n.Prefix)
	}
	return n, err
}

// machines returns the records of all machines. A directory without a record is
// a machine of which nothing else was made yet, or all else is gone.
func (c *Cluster) machines() ([]machine, error) {
	names, err := directories(filepath.Join(c.dir(), "nodes"))
	if err != nil {
		return nil, err
	}
	var all []machine
	for _, name := range names {
		m, err := readMachine(c.machineDir(name))
		if errors.Is(err, provision.ErrNotFound) {
			continue
		}
		if err != nil {
			return nil, err
		}
		all = append(all, m)
	}
	return all, nil
}

// readMachine returns the record in dir. A directory without one is a machine
// that is leaving.
func readMachine(dir string) (machine, error) {
	m := machine{}
	err := readJSON(filepath.Join(dir, "machine.json"), &m)
	if errors.Is(err, provision.ErrNotFound) {
		if _, there := os.Stat(dir); there == nil {
			m, err = machine{V: 1, Name: filepath.Base(dir), State: stateLeaving}, nil
		}
	}
	m.dir = dir
	return m, err
}

func (m machine) write() error { return writeJSON(filepath.Join(m.dir, "machine.json"), m) }

// removeButLast removes a directory with all that is in it, the file last after
// everything else.
func removeButLast(dir, last string) error {
	entries, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	for _, e := range entries {
		if e.Name() != last {
			if err := os.RemoveAll(filepath.Join(dir, e.Name())); err != nil {
				return err
			}
		}
	}
	return os.RemoveAll(dir)
}

func readJSON(path string, v any) error {
	raw, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return provision.ErrNotFound
	}
	if err != nil {
		return err
	}
	if err := json.Unmarshal(raw, v); err != nil {
		return fmt.Errorf("%s is damaged: %w", path, err)
	}
	return nil
}

func writeJSON(path string, v any) error {
	raw, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return err
	}
	return durable.WriteFile(path, append(raw, '\n'), 0o644)
}

// directories returns the names of the directories in dir, sorted; none if dir
// is not there.
func directories(dir string) ([]string, error) {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	var names []string
	for _, e := range entries {
		if e.IsDir() && !strings.HasPrefix(e.Name(), ".") {
			names = append(names, e.Name())
		}
	}
	return names, err
}

// held is the lock of a directory. Programs that inherit file hold it too.
type held struct{ file *os.File }

// lock waits until no other program holds the directory, and holds it. It returns
// provision.ErrNotFound if the directory is not there, or was removed meanwhile.
func lock(ctx context.Context, dir string) (*held, error) {
	f, err := os.Open(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, provision.ErrNotFound
	}
	if err != nil {
		return nil, err
	}
	var failed error
	err = until(ctx, "another program that works on "+dir, func() bool {
		failed = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		return !errors.Is(failed, unix.EWOULDBLOCK) && !errors.Is(failed, unix.EINTR)
	})
	if err == nil {
		err = failed
	}
	if err == nil {
		is, err1 := f.Stat()
		now, err2 := os.Stat(dir)
		switch {
		case err1 != nil:
			err = err1
		case err2 != nil || !os.SameFile(is, now):
			err = provision.ErrNotFound // it was removed meanwhile
		}
	}
	if err != nil {
		_ = f.Close()
		return nil, err
	}
	return &held{f}, nil
}

func (h *held) release() { _ = h.file.Close() }
