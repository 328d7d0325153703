package router

import (
	"bytes"
	"context"
	"embed"
	"fmt"
	"hash/crc32"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"flotilla/internal/catalog"
	"flotilla/internal/haproxy"
)

//go:embed pages
var pages embed.FS

// disk keeps HAProxy's files equal to what it runs, so that whoever restarts it
// starts it in today's state.
type disk struct {
	dir   string
	log   *slog.Logger
	pid   int // of the worker we are attached to
	jobs  chan []file
	lost  atomic.Bool       // a write went wrong: everything must be written again
	took  atomic.Int64      // ns that the last write took
	text  map[string][]byte // rendered backends
	order []string          // names of the rendered backends, sorted; nil: to be made anew
	dirty map[string]bool   // map names, and configKey
	next  time.Time         // no write before this

	booted    time.Time         // when the router began
	offered   *catalog.Snapshot // what the files were written for while HAProxy was away
	offeredAt time.Time
}

const configKey = "" // in disk.dirty: the configuration file

// file is a file to be written. Its text is put together by who writes it, from
// what the loop has handed over: that takes long when there are many services.
type file struct {
	path string
	text func() []byte
}

func newDisk(dir string, log *slog.Logger) *disk {
	return &disk{dir: dir, log: log, jobs: make(chan []file, 1), text: map[string][]byte{}, dirty: map[string]bool{}, booted: time.Now()}
}

func (d *disk) config() string { return filepath.Join(d.dir, "haproxy.cfg") }

func (d *disk) exists() bool {
	_, err := os.Stat(d.config())
	return err == nil
}

func (d *disk) touch(mapName string) { d.dirty[mapName] = true }

func (d *disk) touchBackend(name string) {
	if i, found := slices.BinarySearch(d.order, name); !found && d.order != nil {
		d.order = slices.Insert(d.order, i, name)
	}
	d.text[name] = nil
	d.dirty[configKey] = true
}

func (d *disk) forget(name string) {
	delete(d.text, name)
	if i, found := slices.BinarySearch(d.order, name); found {
		d.order = slices.Delete(d.order, i, i+1)
	}
	d.dirty[configKey] = true
}

// touchAll makes the next write a complete one.
func (d *disk) touchAll() {
	clear(d.text)
	d.order = nil
	d.dirty[configKey] = true
	for _, m := range haproxy.Maps {
		d.dirty[m] = true
	}
}

// run writes the files that the loop hands over.
func (d *disk) run(ctx context.Context) error {
	var last string
	for {
		select {
		case <-ctx.Done():
			return nil
		case files := <-d.jobs:
			began := time.Now()
			err := writeAll(files)
			if err != nil {
				d.lost.Store(true)
			}
			d.took.Store(int64(time.Since(began)))
			if text := errorText(err); text != last {
				if last = text; err != nil {
					d.log.Error("HAProxy's files are not up to date", "err", err)
				}
			}
		}
	}
}

func writeAll(files []file) error {
	for _, f := range files {
		if err := replaceFile(f.path, f.text()); err != nil {
			return err
		}
	}
	return nil
}

// replaceFile writes a new file and renames it, so that a reader sees either the
// old content or the new.
func replaceFile(path string, data []byte) error {
	tmp := path + ".new"
	if err := os.WriteFile(tmp, data, 0o600); err != nil {
		return fmt.Errorf("write %s: %w", tmp, err)
	}
	if err := os.Rename(tmp, path); err != nil {
		return fmt.Errorf("replace %s: %w", path, err)
	}
	return nil
}

// prepare makes directories and everything that does not depend on the catalog.
func (r *Router) prepare(ctx context.Context) error {
	if r.cfg.Binary == "" {
		r.cfg.Binary = "haproxy"
	}
	binary, err := exec.LookPath(r.cfg.Binary)
	if err != nil {
		return fmt.Errorf("HAProxy: %w: install it (apt-get install haproxy) or name it with --haproxy", err)
	}
	if r.cfg.Binary, err = filepath.Abs(binary); err != nil {
		return fmt.Errorf("HAProxy %s: %w", binary, err)
	}
	if r.version, err = haproxy.BinaryVersion(ctx, r.cfg.Binary); err != nil {
		return err
	}
	for _, dir := range []string{"", "maps", "pages", "certs"} {
		if err := os.MkdirAll(filepath.Join(r.cfg.Dir, dir), 0o755); err != nil {
			return fmt.Errorf("router directory: %w", err)
		}
	}
	if err := os.Chmod(filepath.Join(r.cfg.Dir, "certs"), 0o700); err != nil {
		return fmt.Errorf("router directory: %w", err)
	}
	entries, err := pages.ReadDir("pages")
	if err != nil {
		return fmt.Errorf("pages: %w", err)
	}
	for _, e := range entries {
		text, err := fs.ReadFile(pages, "pages/"+e.Name())
		if err != nil {
			return fmt.Errorf("pages: %w", err)
		}
		if err := replaceFile(filepath.Join(r.cfg.Dir, "pages", e.Name()), text); err != nil {
			return err
		}
	}
	var trusted strings.Builder
	for _, p := range r.cfg.TrustedProxies {
		fmt.Fprintln(&trusted, p)
	}
	if err := replaceFile(filepath.Join(r.cfg.Dir, "trusted.lst"), []byte(trusted.String())); err != nil {
		return err
	}
	r.disk = newDisk(r.cfg.Dir, r.log)
	saved, err := os.ReadFile(r.mapFile(haproxy.StateMap))
	r.draining = err == nil && bytes.Contains(saved, []byte("draining yes"))
	if err := r.ports.prepare(ctx, r.cfg, r.client, r.log); err != nil {
		return err
	}
	return r.prepareCertificates()
}

// settings is the configuration file but for its backends.
func (r *Router) settings(generation int64) haproxy.Config {
	c := haproxy.Config{
		Generation: generation, Node: r.cfg.Node, Address: r.cfg.Address,
		HTTPPort: r.cfg.HTTPPort, HTTPSPort: r.cfg.HTTPSPort, BalancerPort: r.cfg.BalancerPort, SNIPort: r.cfg.SNIPort,
		Dir: r.cfg.Dir, OpsSocket: r.cfg.OpsSocket, MaxConn: r.maxConn(),
		Trusted: len(r.cfg.TrustedProxies) > 0, AcceptProxy: r.cfg.AcceptProxy,
		TCPPorts: r.ports.binds(true), HTTPPorts: r.ports.binds(false),
	}
	switch r.cfg.AccessLog {
	case "", "off":
	case "stdout":
		c.AccessLog = "stdout format raw"
	default:
		c.AccessLog = r.cfg.AccessLog
	}
	if _, err := user.Lookup("haproxy"); err == nil && isRoot() {
		c.User, c.Group = "haproxy", "haproxy"
	}
	return c
}

// maxConn derives the number of connections from the limit of open files: each
// takes two, every fourth also a pipe (two more) to splice through, and
// listeners, sockets and idle connections take some.
func (r *Router) maxConn() int {
	if r.cfg.MaxConnections > 0 {
		return r.cfg.MaxConnections
	}
	var limit syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
		return 1000
	}
	n := int(min(limit.Max, 400_000))
	return (n - min(2000, n/4)) * 2 / 5
}

// layout is a checksum of the settings; a running configuration that has another
// one must be replaced.
func (r *Router) layout() int64 {
	text, err := r.settings(0).Render()
	if err != nil {
		return 0
	}
	return int64(crc32.ChecksumIEEE(text))
}

// render returns all files for what r.have says.
func (r *Router) render(generation int64) ([]file, error) {
	r.disk.touchAll()
	return r.renderDirty(generation)
}

// renderDirty returns the files that differ from what was written last.
func (r *Router) renderDirty(generation int64) ([]file, error) {
	d := r.disk
	var files []file
	lines := map[string][]string{} // key, value, key ...
	for e, value := range r.have.routes {
		if d.dirty[e.Map] {
			lines[e.Map] = append(lines[e.Map], e.Key, value)
		}
	}
	if d.dirty[haproxy.StateMap] {
		lines[haproxy.StateMap] = []string{"attached", "no", "draining", yes(r.draining)}
	}
	for _, m := range haproxy.Maps {
		if d.dirty[m] {
			files = append(files, file{r.mapFile(m), func() []byte { return mapText(lines[m]) }})
		}
	}
	if d.dirty[configKey] {
		text, err := r.settings(generation).Render()
		if err != nil {
			return nil, err
		}
		if d.order == nil {
			d.order = slices.Sorted(maps.Keys(r.have.backends))
		}
		sections := append(make([][]byte, 0, 1+len(d.order)), text)
		for _, name := range d.order {
			section := d.text[name]
			if section == nil {
				servers := slices.SortedFunc(maps.Values(r.have.backends[name]), func(a, b haproxy.Server) int { return compareServerNames(a.Name, b.Name) })
				section = haproxy.AppendBackend(nil, haproxy.Backend{Name: name, Servers: servers})
				d.text[name] = section
			}
			sections = append(sections, section)
		}
		files = append(files, file{d.config(), func() []byte { return bytes.Join(sections, nil) }})
	}
	clear(d.dirty)
	return files, nil
}

// mapText returns a map file of keys and values in turn.
func mapText(lines []string) []byte {
	var b bytes.Buffer
	for i := 0; i < len(lines); i += 2 {
		b.WriteString(lines[i])
		b.WriteByte(' ')
		b.WriteString(lines[i+1])
		b.WriteByte('\n')
	}
	return b.Bytes()
}

// writeEvery bounds how old the files may be.
const writeEvery = 2 * time.Second

// writeFiles hands what changed to the writer, unless it was done just now.
func (r *Router) writeFiles(now time.Time) {
	if r.disk.lost.Swap(false) {
		r.disk.touchAll()
	}
	if len(r.disk.dirty) == 0 || !now.IsZero() && now.Before(r.disk.next) || len(r.disk.jobs) > 0 {
		return
	}
	files, err := r.renderDirty(r.reload.generation)
	if err != nil {
		r.log.Error("HAProxy's files are not up to date", "err", err)
		return
	}
	r.disk.jobs <- files
	// Never more than 2 % of the time, however large the files are.
	r.disk.next = time.Now().Add(max(writeEvery, 50*time.Duration(r.disk.took.Load())))
}
