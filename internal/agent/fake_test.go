package agent

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"flotilla/internal/systemd"
)

// fakeSystemd is a systemd in memory: it reads real files at Reload, or when it
// is asked about a unit that it does not know, and runs what it has read. It
// outlives agents, as systemd does. ExecStart= says how a unit behaves: /fail
// ends in failure, /slow starts and stops only when it is let, /once runs and is
// done, all else runs until it is stopped.
type fakeSystemd struct {
	units, dropIns, gate string

	mu      sync.Mutex // guards what follows
	enabled map[string]bool
	files   map[string]string // with drop-in, as they were read last
	runs    map[string]*fakeRun
	let     map[string]chan struct{} // closed: the slow unit may go on
	change  systemd.Change
	names   map[string]bool
	wake    chan struct{}
	calls   int
	on      func(n int, call string) (before, after error)
	history []string // "start web.service", "stopped web.service", ...
	faults  []string // what must never happen
	reloads int
	deaf    time.Duration // how long a reload takes
	fence   *time.Timer
	fences  int
	fired   int
	count   int // invocations
}

type fakeRun struct {
	active, sub, queued, result string
	text                        string
	invocation                  int
	ended                       chan struct{} // closed when a job of it has ended
}

func newFake(units, dropIns, gate string) *fakeSystemd {
	return &fakeSystemd{
		units: units, dropIns: dropIns, gate: gate,
		enabled: map[string]bool{}, files: map[string]string{}, runs: map[string]*fakeRun{},
		let: map[string]chan struct{}{}, names: map[string]bool{}, wake: make(chan struct{}, 1),
	}
}

// enter counts a call and takes the lock.
func (f *fakeSystemd) enter(call string) (after error, before error) {
	f.mu.Lock()
	f.calls++
	if f.on != nil {
		before, after = f.on(f.calls, call)
	}
	return after, before
}

func (f *fakeSystemd) changed(name string) {
	f.names[name] = true
	select {
	case f.wake <- struct{}{}:
	default:
	}
}

func (f *fakeSystemd) Changed() <-chan struct{} { return f.wake }

func (f *fakeSystemd) Take() systemd.Change {
	f.mu.Lock()
	defer f.mu.Unlock()
	c := f.change
	for name := range f.names {
		c.Units = append(c.Units, name)
	}
	f.change, f.names = systemd.Change{}, map[string]bool{}
	return c
}

func (f *fakeSystemd) status(name string) systemd.Status {
	s := systemd.Status{Load: "not-found", Active: "inactive", Sub: "dead"}
	if text, ok := f.files[name]; ok {
		s.Load = "loaded"
		if strings.Contains(text, "/bad") {
			s.Load = "bad-setting"
		}
	}
	if r := f.runs[name]; r != nil {
		s.Active, s.Sub, s.Queued = r.active, r.sub, r.queued
	}
	return s
}

func (f *fakeSystemd) Units(_ context.Context, names ...string) (map[string]systemd.Status, error) {
	after, err := f.enter("units")
	defer f.mu.Unlock()
	if err != nil {
		return nil, err
	}
	found := map[string]systemd.Status{}
	for _, name := range names {
		f.meet(name)
		found[name] = f.status(name)
	}
	return found, after
}

func (f *fakeSystemd) Kept(_ context.Context, names ...string) (map[string]bool, error) {
	after, err := f.enter("kept")
	defer f.mu.Unlock()
	if err != nil {
		return nil, err
	}
	kept := map[string]bool{}
	for _, name := range names {
		r := f.runs[name]
		if kept[name] = r != nil && (r.active != "inactive" || r.queued != ""); !kept[name] {
			delete(f.files, name)
		}
	}
	return kept, after
}

func (f *fakeSystemd) Detail(_ context.Context, name string) (systemd.Detail, error) {
	after, err := f.enter("detail " + name)
	defer f.mu.Unlock()
	if err != nil {
		return systemd.Detail{}, err
	}
	d := systemd.Detail{Status: f.status(name), FragmentPath: f.link(name)}
	if d.Load == "bad-setting" {
		d.LoadError = "ExecStart= is bad"
	}
	if r := f.runs[name]; r != nil {
		d.Invocation, d.Result = fmt.Sprint(r.invocation), r.result
	}
	return d, after
}

func (f *fakeSystemd) each(ctx context.Context, call string, names []string, do func(string) error) error {
	after, err := f.enter(call)
	defer f.mu.Unlock()
	if err != nil {
		return err
	}
	failures := systemd.Failures{}
	for _, name := range names {
		if err := do(name); err != nil {
			failures[name] = err
		}
	}
	if len(failures) > 0 {
		return fmt.Errorf("%s: %w", call, failures)
	}
	return after
}

func (f *fakeSystemd) Link(ctx context.Context, paths ...string) error {
	return f.each(ctx, "link", paths, func(path string) error {
		text, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		if strings.Contains(string(text), "/unlinkable") {
			return errors.New("it cannot be linked")
		}
		link := filepath.Join(f.dropIns, filepath.Base(path))
		if err := os.Remove(link); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		return errors.Join(os.MkdirAll(f.dropIns, 0o755), os.Symlink(path, link))
	})
}

func (f *fakeSystemd) Enable(ctx context.Context, names ...string) error {
	return f.each(ctx, "enable", names, func(name string) error { f.enabled[name] = true; return nil })
}

func (f *fakeSystemd) Disable(ctx context.Context, names ...string) error {
	return f.each(ctx, "disable", names, func(name string) error {
		delete(f.enabled, name)
		if err := os.Remove(filepath.Join(f.dropIns, name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		return nil
	})
}

// link returns where the link to a unit's file leads, and "" if there is none.
func (f *fakeSystemd) link(name string) string {
	path, _ := os.Readlink(filepath.Join(f.dropIns, name))
	return path
}

// read reads the files of a linked unit.
func (f *fakeSystemd) read(name string) {
	text, err := os.ReadFile(f.link(name))
	if err != nil {
		return
	}
	dropIn, err := os.ReadFile(filepath.Join(f.dropIns, name+".d", dropInName))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		panic(err)
	}
	f.files[name] = string(text) + string(dropIn)
}

// meet is what being asked about a unit does: the files of one that is not
// known are read, and one without any is forgotten if nothing is left of it.
func (f *fakeSystemd) meet(name string) {
	_, known := f.files[name]
	linked := f.link(name) != ""
	r := f.runs[name]
	if known && !linked && r != nil && r.active != "failed" && r.active != "inactive" {
		f.faults = append(f.faults, "unlinked while it runs: "+name)
	}
	switch {
	case !known && linked:
		f.read(name)
	case known && !linked && (r == nil || r.active == "inactive" && r.queued == ""):
		delete(f.files, name)
	}
}

func (f *fakeSystemd) Reload(context.Context) error {
	after, err := f.enter("reload")
	defer f.mu.Unlock()
	if err != nil {
		return err
	}
	f.reloads++
	time.Sleep(f.deaf)
	f.files = map[string]string{}
	for _, name := range f.allLinks() {
		f.read(name)
	}
	f.change.All = true
	f.changed("")
	return after
}

func (f *fakeSystemd) Start(ctx context.Context, name string, sent ...func()) (systemd.Result, error) {
	return f.order(ctx, "start", name, sent...)
}

func (f *fakeSystemd) Stop(ctx context.Context, name string) (systemd.Result, error) {
	return f.order(ctx, "stop", name)
}

func (f *fakeSystemd) StopAll(_ context.Context, names ...string) map[string]func(context.Context) (systemd.Result, error) {
	waits := map[string]func(context.Context) (systemd.Result, error){}
	for _, name := range names {
		waits[name] = func(ctx context.Context) (systemd.Result, error) { return f.Stop(ctx, name) }
	}
	return waits
}

func (f *fakeSystemd) Restart(ctx context.Context, name string, sent ...func()) (systemd.Result, error) {
	return f.order(ctx, "restart", name, sent...)
}

func (f *fakeSystemd) order(ctx context.Context, verb, name string, sent ...func()) (systemd.Result, error) {
	after, err := f.enter(verb + " " + name)
	defer f.mu.Unlock()
	if err != nil {
		return "", err
	}
	f.meet(name)
	text, loaded := f.files[name]
	r := f.runs[name]
	if r == nil {
		r = &fakeRun{active: "inactive", sub: "dead"}
		f.runs[name] = r
	}
	if r.ended != nil { // what was asked for before is called off
		close(r.ended)
		r.ended = nil
	}
	if verb != "start" {
		if done := f.finish(ctx, name, r, verb == "restart"); !done {
			return "", fmt.Errorf("%s: %w: %w", verb, systemd.ErrUnknown, ctx.Err())
		}
	}
	if verb == "stop" {
		return systemd.Done, after
	}
	if !loaded {
		return "", fmt.Errorf("start %s: %w", name, systemd.ErrNoUnit)
	}
	if r.active == "active" || r.active == "activating" && r.sub == "start" {
		return systemd.Done, after
	}
	if strings.Contains(text, "AssertPathExists="+f.gate) || strings.Contains(text, "AssertPathExists="+systemd.FenceGate) {
		if _, err := os.Stat(f.gate); err != nil {
			return systemd.Asserted, after
		}
	}
	f.count++
	r.invocation, r.text, r.result = f.count, text, "success"
	f.history = append(f.history, "start "+name)
	for _, tell := range sent {
		tell()
	}
	switch {
	case strings.Contains(text, "/fail"):
		r.active, r.sub, r.result = "failed", "failed", "exit-code"
		f.changed(name)
		return systemd.Failed, after
	case strings.Contains(text, "/limit"):
		r.active, r.sub, r.result = "failed", "failed", "start-limit-hit"
		f.changed(name)
		return systemd.Failed, after
	case strings.Contains(text, "/once"):
		f.changed(name)
		return systemd.Done, after
	case strings.Contains(text, "/slow"):
		r.active, r.sub = "activating", "start"
		f.changed(name)
		let, ended := f.letter(name), make(chan struct{})
		r.ended = ended
		f.mu.Unlock()
		select {
		case <-let:
		case <-ended:
			f.mu.Lock()
			return systemd.Canceled, after
		case <-ctx.Done():
			f.mu.Lock()
			return "", fmt.Errorf("start: %w: %w", systemd.ErrUnknown, ctx.Err())
		}
		f.mu.Lock()
	}
	r.active, r.sub = "active", "running"
	f.changed(name)
	return systemd.Done, after
}

// finish ends what runs of the unit. Like systemd it goes on with that when the
// caller has gone.
func (f *fakeSystemd) finish(ctx context.Context, name string, r *fakeRun, restart bool) bool {
	if r.active == "inactive" || r.active == "failed" {
		return true
	}
	if strings.Contains(r.text, "/slow") {
		r.active, r.sub = "deactivating", "stop"
		f.changed(name)
		let := f.letter(name)
		f.mu.Unlock()
		select {
		case <-let:
		case <-ctx.Done():
			f.mu.Lock()
			return false
		}
		f.mu.Lock()
	}
	if _, err := os.Stat(f.link(name)); err != nil && f.link(name) != "" {
		f.faults = append(f.faults, "file removed before it had stopped: "+name)
	}
	if text, err := os.ReadFile(f.link(name)); err == nil && !strings.HasPrefix(r.text, string(text)) && !restart {
		f.faults = append(f.faults, "new file written before it had stopped: "+name)
	}
	r.active, r.sub = "inactive", "dead"
	f.history = append(f.history, "stopped "+name)
	f.changed(name)
	return true
}

func (f *fakeSystemd) letter(name string) chan struct{} {
	if f.let[name] == nil {
		f.let[name] = make(chan struct{})
	}
	return f.let[name]
}

// goOn lets the slow unit go on, now and ever after.
func (f *fakeSystemd) goOn(name string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	close(f.letter(name))
}

func (f *fakeSystemd) ResetFailed(_ context.Context, name string) error {
	after, err := f.enter("reset " + name)
	defer f.mu.Unlock()
	if err != nil {
		return err
	}
	if r := f.runs[name]; r != nil && r.active == "failed" {
		r.active, r.sub = "inactive", "dead"
	}
	return after
}

func (f *fakeSystemd) Kill(_ context.Context, name string, _ syscall.Signal) error {
	after, err := f.enter("kill " + name)
	defer f.mu.Unlock()
	if err != nil {
		return err
	}
	f.kill(name)
	return after
}

func (f *fakeSystemd) kill(name string) {
	for unit, r := range f.runs {
		if unit == name || name == systemd.FenceSlice && strings.Contains(r.text, systemd.FenceSlice) {
			if r.active != "inactive" && r.active != "failed" {
				r.active, r.sub, r.result = "failed", "failed", "signal"
				f.history = append(f.history, "killed "+unit)
				f.changed(unit)
			}
		}
	}
}

func (f *fakeSystemd) Processes(_ context.Context, name string) ([]int, error) {
	after, err := f.enter("processes " + name)
	defer f.mu.Unlock()
	if err != nil {
		return nil, err
	}
	var pids []int
	for unit, r := range f.runs {
		if (unit == name || name == systemd.FenceSlice && strings.Contains(r.text, systemd.FenceSlice)) && r.active != "inactive" && r.active != "failed" {
			pids = append(pids, r.invocation)
		}
	}
	return pids, after
}

func (f *fakeSystemd) Fence(_ context.Context, wait time.Duration) error {
	after, err := f.enter("fence")
	defer f.mu.Unlock()
	if err != nil {
		return err
	}
	if f.fence != nil {
		f.fence.Stop()
	}
	if err := os.WriteFile(f.gate, nil, 0o644); err != nil {
		return err
	}
	f.fences++
	f.fence = time.AfterFunc(wait, func() {
		f.mu.Lock()
		defer f.mu.Unlock()
		f.fired++
		_ = os.Remove(f.gate)
		f.kill(systemd.FenceSlice)
	})
	return after
}

func (f *fakeSystemd) Unfence(context.Context) error {
	after, err := f.enter("unfence")
	defer f.mu.Unlock()
	if err != nil {
		return err
	}
	if f.fence != nil {
		f.fence.Stop()
	}
	_ = os.Remove(f.gate)
	return after
}

// What tests ask.

func (f *fakeSystemd) active(name string) string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.status(name).Active
}

func (f *fakeSystemd) invocation(name string) int {
	f.mu.Lock()
	defer f.mu.Unlock()
	if r := f.runs[name]; r != nil {
		return r.invocation
	}
	return 0
}

func (f *fakeSystemd) did() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.history)
}

func (f *fakeSystemd) linked() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.allLinks()
}

// allLinks returns the names of the units that are linked, sorted.
func (f *fakeSystemd) allLinks() []string {
	var all []string
	entries, _ := os.ReadDir(f.dropIns)
	for _, e := range entries {
		if e.Type() == fs.ModeSymlink {
			all = append(all, e.Name())
		}
	}
	return all
}

func (f *fakeSystemd) hook(on func(n int, call string) (before, after error)) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.on, f.calls = on, 0
}
