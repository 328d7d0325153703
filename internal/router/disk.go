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
	text  map[string][]byte // rendered backends
	order []string          // names of the rendered backends; nil: to be sorted anew
	dirty map[string]bool   // map names, and configKey
	next  time.Time         // no write before this

	booted    time.Time         // when the router began
	offered   *catalog.Snapshot // what the files were written for while HAProxy was away
	offeredAt time.Time
}

const configKey = "" // in disk.dirty: the configuration file

type file struct {
	path string
	data []byte
}

func newDisk(dir string, log *slog.Logger) disk {
	return disk{dir: dir, log: log, jobs: make(chan []file, 1), text: map[string][]byte{}, dirty: map[string]bool{}, booted: time.Now()}
}

func (d *disk) config() string { return filepath.Join(d.dir, "haproxy.cfg") }

func (d *disk) exists() bool {
	_, err := os.Stat(d.config())
	return err == nil
}

func (d *disk) touch(mapName string) { d.dirty[mapName] = true }

func (d *disk) touchBackend(name string) {
	if _, ok := d.text[name]; !ok {
		d.order = nil
	}
	d.text[name] = nil
	d.dirty[configKey] = true
}

func (d *disk) forget(name string) {
	delete(d.text, name)
	d.order = nil
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

// run writes the files that the loop has rendered.
func (d *disk) run(ctx context.Context) error {
	var last string
	for {
		select {
		case <-ctx.Done():
			return nil
		case files := <-d.jobs:
			err := writeAll(files)
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
		if err := replaceFile(f.path, f.data); err != nil {
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
	if err := r.ports.prepare(ctx, r.cfg, r.log); err != nil {
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
	d := &r.disk
	var files []file
	byMap := map[string]*bytes.Buffer{}
	for _, m := range haproxy.Maps {
		if d.dirty[m] {
			byMap[m] = &bytes.Buffer{}
		}
	}
	if b := byMap[haproxy.StateMap]; b != nil {
		fmt.Fprintf(b, "attached no\ndraining %s\n", yes(r.draining))
	}
	if len(byMap) > 0 {
		for e, value := range r.have.routes {
			if b := byMap[e.Map]; b != nil {
				b.WriteString(e.Key + " " + value + "\n")
			}
		}
	}
	for m, b := range byMap {
		files = append(files, file{r.mapFile(m), b.Bytes()})
	}
	if d.dirty[configKey] {
		text, err := r.settings(generation).Render()
		if err != nil {
			return nil, err
		}
		if d.order == nil {
			d.order = slices.Sorted(maps.Keys(r.have.backends))
		}
		for _, name := range d.order {
			section := d.text[name]
			if section == nil {
				servers := slices.SortedFunc(maps.Values(r.have.backends[name]), func(a, b haproxy.Server) int { return compareServerNames(a.Name, b.Name) })
				section = haproxy.AppendBackend(nil, haproxy.Backend{Name: name, Servers: servers})
				d.text[name] = section
			}
			text = append(text, section...)
		}
		files = append(files, file{d.config(), text})
	}
	clear(d.dirty)
	return files, nil
}

// writeEvery bounds how old the files may be.
const writeEvery = time.Second

// writeFiles hands what changed to the writer, unless it was done just now.
func (r *Router) writeFiles(now time.Time) {
	if len(r.disk.dirty) == 0 || !now.IsZero() && now.Before(r.disk.next) || len(r.disk.jobs) > 0 {
		return
	}
	began := time.Now()
	files, err := r.renderDirty(r.reload.generation)
	if err != nil {
		r.log.Error("HAProxy's files are not up to date", "err", err)
		return
	}
	r.disk.jobs <- files
	// Never more than 2 % of the time, however large the files are.
	r.disk.next = began.Add(max(writeEvery/2, 50*time.Since(began)))
}

// reloading decides when HAProxy is reloaded.
type reloading struct {
	generation int64 // of the file that HAProxy has loaded
	at         time.Time
	reason     string // "" when no reload is wanted
	last       string
	notBefore  time.Time
	failures   int
}

const (
	reloadDebounce = 300 * time.Millisecond
	reloadEvery    = 5 * time.Second // old workers keep their memory until their connections end
	maxReloadWait  = 5 * time.Minute
)

// ask wants a reload soon; a zero now wants it at once.
func (l *reloading) ask(now time.Time, reason string) {
	if l.reason != "" {
		return
	}
	l.reason = reason
	if !now.IsZero() {
		l.at = now.Add(reloadDebounce)
	}
}

func (l *reloading) pending() bool { return l.reason != "" }

func (l *reloading) due(now time.Time) bool {
	return l.pending() && !now.Before(l.at) && !now.Before(l.notBefore)
}

// nextGeneration numbers a new file; its lower half is the layout.
func (r *Router) nextGeneration() int64 {
	counter := max(r.reload.generation>>32+1, time.Now().Unix())
	return counter<<32 | r.layout()
}

// firstSnapshotWait is how long a router that knows nothing yet waits for the
// catalog before it starts HAProxy empty.
const firstSnapshotWait = 2 * time.Second

// offer writes files for an HAProxy that is not running, and lets it start.
func (r *Router) offer(snapshot *catalog.Snapshot) {
	now := time.Now()
	if snapshot == nil && now.Sub(r.disk.booted) < firstSnapshotWait || r.disk.offered == snapshot && !r.disk.offeredAt.IsZero() {
		return
	}
	if now.Sub(r.disk.offeredAt) < time.Second {
		return
	}
	r.disk.offered, r.disk.offeredAt = snapshot, now
	if snapshot == nil && r.disk.exists() {
		r.startable() // better what it ran last than nothing
		return
	}
	r.have = newState()
	r.slots.reset(r.have, r.version.MakesBackends(), now)
	r.ports.adopt()
	generation := r.nextGeneration()
	err := r.target(snapshot)
	if err == nil {
		var files []file
		if files, err = r.render(generation); err == nil {
			err = writeAll(files)
		}
	}
	if err != nil {
		r.log.Error("HAProxy cannot be started", "err", err)
		return
	}
	r.reload.reason = ""
	r.startable()
}

func (r *Router) startable() {
	select {
	case <-r.start:
	default:
		close(r.start)
	}
}

// target changes r.have to what HAProxy shall run for the snapshot, with as many
// backends as that needs.
func (r *Router) target(snapshot *catalog.Snapshot) error {
	need := map[haproxy.Class]int{}
	names := map[string]bool{}
	for svc := range snapshot.All() {
		names[svc.Name] = true
		if w := want(svc, offers{hostPort: true, sni: r.cfg.SNIPort != 0}); w.service != "" {
			need[w.class]++
		}
	}
	for service := range r.slots.used {
		names[service] = true
	}
	for _, class := range haproxy.Classes {
		if r.slots.runtime {
			break
		}
		n := max(spare(class), need[class]*3/2)
		var added []string
		for i := 1; r.slots.declared[class] < n; i++ {
			name := class.BackendName(fmt.Sprint(i))
			if _, ok := r.have.backends[name]; ok {
				continue
			}
			r.have.backends[name] = map[string]haproxy.Server{}
			r.slots.declared[class]++
			added = append(added, name)
		}
		slices.Reverse(added)
		r.slots.fresh[class] = append(added, r.slots.fresh[class]...)
	}
	var steps []Step
	for name := range names {
		steps = append(steps, r.planService(snapshot.Service(name), name)...)
	}
	for _, s := range order(steps) {
		r.have.apply(s)
	}
	return nil
}

// doReload replaces HAProxy's worker by one that runs the snapshot and has what
// cannot be changed at run time. Whatever comes of it, everything is read anew
// afterwards.
func (r *Router) doReload(ctx context.Context, snapshot *catalog.Snapshot) error {
	began := time.Now()
	reason := r.reload.reason
	r.reload.reason = "" // what planning asks for is in this reload
	r.attached = false
	r.ports.adopt()
	generation := r.nextGeneration()
	err := r.target(snapshot)
	if err == nil {
		err = r.replaceWorker(ctx, generation)
	}
	if err != nil {
		r.reload.failures++
		r.reload.reason = reason
		r.reload.notBefore = time.Now().Add(min(reloadEvery<<r.reload.failures, maxReloadWait))
		return fmt.Errorf("reload HAProxy (%s): %w", reason, err)
	}
	r.reload = reloading{generation: generation, last: reason, notBefore: time.Now().Add(reloadEvery)}
	r.counts.reloads++
	r.log.Info("HAProxy reloaded", "reason", reason, "generation", generation, "took", time.Since(began).Round(time.Millisecond))
	return r.attach(ctx, snapshot)
}

func (r *Router) replaceWorker(ctx context.Context, generation int64) error {
	files, err := r.render(generation)
	if err != nil {
		return err
	}
	config := files[len(files)-1]
	if err := writeAll(files[:len(files)-1]); err != nil {
		return err
	}
	candidate := r.disk.config() + ".candidate"
	if err := os.WriteFile(candidate, config.data, 0o600); err != nil {
		return fmt.Errorf("write %s: %w", candidate, err)
	}
	out, err := exec.CommandContext(ctx, r.cfg.Binary, "-c", "-q", "-f", candidate).CombinedOutput()
	if err != nil {
		return fmt.Errorf("HAProxy refuses its new configuration, %s: %w: %.500s", candidate, err, out)
	}
	if err := os.Rename(candidate, r.disk.config()); err != nil {
		return fmt.Errorf("replace %s: %w", r.disk.config(), err)
	}
	master := &haproxy.Client{Socket: r.masterSocket()}
	limit := time.Now().Add(5*time.Second + time.Duration(len(r.have.backends))*time.Millisecond)
	for asked := false; ; {
		if !asked {
			answer, err := master.Master(ctx, "reload")
			if err == nil && strings.Contains(answer, "Success=0") {
				return fmt.Errorf("HAProxy did not start its new worker: %.500s", answer)
			}
			// A reset connection leaves the outcome unknown: the generation tells.
			asked = err == nil
		}
		if answers, err := r.client.Do(ctx, "get var proc.gen"); err == nil {
			if g, err := parseGeneration(answers[0].Text); err == nil && g == generation {
				return nil
			}
		}
		if time.Now().After(limit) {
			return fmt.Errorf("the new worker did not answer within its time; see %s", filepath.Join(r.cfg.Dir, "haproxy.log"))
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(10 * time.Millisecond):
		}
	}
}
