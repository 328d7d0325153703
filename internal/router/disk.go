package router

import (
	"bytes"
	"context"
	"embed"
	"fmt"
	"hash/crc32"
	"hash/maphash"
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
	"flotilla/internal/durable"
	"flotilla/internal/haproxy"
)

//go:embed pages
var pages embed.FS

// disk keeps HAProxy's files equal to what it runs, so that whoever restarts it
// starts it in today's state. One goroutine, run, writes all files once HAProxy may
// read them.
type disk struct {
	dir  string
	log  *slog.Logger
	pid  int // of the worker we are attached to
	jobs chan job
	lost atomic.Bool  // a write went wrong: it must be done again
	took atomic.Int64 // ns that the last write took

	stale bool      // HAProxy runs something else than what was handed to run last
	all   bool      // the files may have been changed by somebody else
	next  time.Time // no write before this

	booted    time.Time         // when the router began
	offered   *catalog.Snapshot // what the files were written for while HAProxy was away
	offeredAt time.Time
}

// job is files to be written. Their text is made by who writes them, because that
// takes long when there are many services.
type job struct {
	files func() ([]file, error)
	all   bool       // those too that were written with the same text
	done  chan error // nil: nobody waits
}

type file struct {
	path   string
	text   []byte
	remove bool
}

// put brings one file to the disk.
func (f file) put() error {
	if f.remove {
		return durable.Remove(f.path)
	}
	return durable.WriteFile(f.path, f.text, 0o600)
}

func newDisk(dir string, log *slog.Logger) *disk {
	return &disk{dir: dir, log: log, jobs: make(chan job, 1), booted: time.Now()}
}

func (d *disk) config() string { return filepath.Join(d.dir, "haproxy.cfg") }

func (d *disk) exists() bool {
	_, err := os.Stat(d.config())
	return err == nil
}

// run writes the files that the loop hands over.
func (d *disk) run(ctx context.Context) error {
	written := map[string]uint64{}
	seed := maphash.MakeSeed()
	write := func(j job) error {
		files, err := j.files()
		if err != nil {
			return err
		}
		for _, f := range files {
			sum := maphash.Bytes(seed, f.text)
			if last, ok := written[f.path]; ok && last == sum && !j.all {
				continue
			}
			delete(written, f.path)
			if err := f.put(); err != nil {
				return err
			}
			written[f.path] = sum
		}
		return nil
	}
	var last string
	for {
		select {
		case <-ctx.Done():
			return nil
		case j := <-d.jobs:
			began := time.Now()
			err := write(j)
			if j.done != nil {
				j.done <- err
				continue
			}
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

// write has files written and waits for it. Whatever was handed over before is
// written then, too.
func (d *disk) write(ctx context.Context, files ...file) error {
	j := job{files: func() ([]file, error) { return files, nil }, all: true, done: make(chan error, 1)}
	select {
	case d.jobs <- j:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	select {
	case err := <-j.done:
		return err
	case <-ctx.Done():
		return context.Cause(ctx)
	}
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
	var files []file // HAProxy, if it runs, reads none of them now
	entries, err := pages.ReadDir("pages")
	if err != nil {
		return fmt.Errorf("pages: %w", err)
	}
	for _, e := range entries {
		text, err := fs.ReadFile(pages, "pages/"+e.Name())
		if err != nil {
			return fmt.Errorf("pages: %w", err)
		}
		files = append(files, file{path: filepath.Join(r.cfg.Dir, "pages", e.Name()), text: text})
	}
	var trusted strings.Builder
	for _, p := range r.cfg.TrustedProxies {
		fmt.Fprintln(&trusted, p)
	}
	files = append(files, file{path: filepath.Join(r.cfg.Dir, "trusted.lst"), text: []byte(trusted.String())})
	r.disk = newDisk(r.cfg.Dir, r.log)
	saved, err := os.ReadFile(r.mapFile(haproxy.StateMap))
	r.draining = err == nil && bytes.Contains(saved, []byte("draining yes"))
	if err := r.ports.prepare(ctx, r.cfg, r.client, r.log); err != nil {
		return err
	}
	certificates, err := r.prepareCertificates()
	if err != nil {
		return err
	}
	for _, f := range append(files, certificates...) {
		if err := f.put(); err != nil {
			return err
		}
	}
	return nil
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

// render returns what makes all files for what r.have says now, the configuration
// last. It may be called by another goroutine later.
func (r *Router) render(generation int64) func() ([]file, error) {
	have := &state{backends: maps.Clone(r.have.backends), routes: maps.Clone(r.have.routes)}
	settings, draining, config := r.settings(generation), r.draining, r.disk.config()
	return func() ([]file, error) {
		texts := map[string]*bytes.Buffer{}
		for _, m := range haproxy.Maps {
			texts[m] = &bytes.Buffer{}
		}
		fmt.Fprintf(texts[haproxy.StateMap], "attached no\ndraining %s\n", yes(draining))
		for e, value := range have.routes {
			fmt.Fprintf(texts[e.Map], "%s %s\n", e.Key, value)
		}
		var files []file
		for _, m := range haproxy.Maps {
			files = append(files, file{path: settings.Map(m), text: texts[m].Bytes()})
		}
		text, err := settings.Render()
		if err != nil {
			return nil, err
		}
		for _, name := range slices.Sorted(maps.Keys(have.backends)) {
			servers := slices.SortedFunc(maps.Values(have.backends[name]), func(a, b haproxy.Server) int { return compareServerNames(a.Name, b.Name) })
			text = haproxy.AppendBackend(text, haproxy.Backend{Name: name, Servers: servers})
		}
		return append(files, file{path: config, text: text}), nil
	}
}

// writeEvery bounds how old the files may be.
const writeEvery = 2 * time.Second

// writeFiles hands what HAProxy runs to the writer if the files are older, unless
// it was done just now.
func (r *Router) writeFiles(now time.Time) {
	if r.disk.lost.Swap(false) {
		r.disk.stale, r.disk.all = true, true
	}
	if !r.disk.stale || !now.IsZero() && now.Before(r.disk.next) || len(r.disk.jobs) > 0 {
		return
	}
	r.disk.jobs <- job{files: r.render(r.reload.generation), all: r.disk.all}
	r.disk.stale, r.disk.all = false, false
	// Never more than 2 % of the time, however large the files are.
	r.disk.next = time.Now().Add(max(writeEvery, 50*time.Duration(r.disk.took.Load())))
}
