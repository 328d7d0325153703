package router

import (
	"context"
	"fmt"
	"maps"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"flotilla/internal/catalog"
	"flotilla/internal/haproxy"
)

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
func (r *Router) offer(ctx context.Context, snapshot *catalog.Snapshot) {
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
	r.target(snapshot)
	files, err := r.render(r.nextGeneration())()
	if err == nil {
		err = r.disk.write(ctx, files...)
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
func (r *Router) target(snapshot *catalog.Snapshot) {
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
	// What services need of a reload they get by this one. What nobody needs depends
	// on what the services have.
	for _, names := range [][]string{slices.Sorted(maps.Keys(names)), {nobody}} {
		for _, s := range r.plan(snapshot, names).steps {
			r.have.apply(s)
		}
	}
	r.slots.stock(r.have)
	r.ports.adopt(r.have)
}

// doReload replaces HAProxy's worker by one that runs the snapshot and has what
// cannot be changed at run time. Whatever comes of it, everything is read anew
// afterwards.
func (r *Router) doReload(ctx context.Context, snapshot *catalog.Snapshot) error {
	began := time.Now()
	reason := r.reload.reason
	r.attached = false
	r.target(snapshot)
	generation := r.nextGeneration()
	if _, err := r.Stats(ctx); err != nil { // the new worker counts from 0
		r.log.Warn("some requests are not counted", "err", err)
	}
	if err := r.replaceWorker(ctx, generation); err != nil {
		r.reload.failures++
		r.reload.notBefore = time.Now().Add(min(reloadEvery<<r.reload.failures, maxReloadWait))
		return fmt.Errorf("reload HAProxy (%s): %w", reason, err)
	}
	r.reload = reloading{generation: generation, last: reason, notBefore: time.Now().Add(reloadEvery)}
	r.counts.reloads++
	r.log.Info("HAProxy reloaded", "reason", reason, "generation", generation, "took", time.Since(began).Round(time.Millisecond))
	return r.attach(ctx, snapshot)
}

func (r *Router) replaceWorker(ctx context.Context, generation int64) error {
	files, err := r.render(generation)()
	if err != nil {
		return err
	}
	config := files[len(files)-1]
	candidate := config.path + ".candidate"
	if err := r.disk.write(ctx, append(files[:len(files)-1], file{path: candidate, text: config.text})...); err != nil {
		return err
	}
	out, err := exec.CommandContext(ctx, r.cfg.Binary, "-c", "-q", "-f", candidate).CombinedOutput()
	if err != nil {
		return fmt.Errorf("HAProxy refuses its new configuration, %s: %w: %.500s", candidate, err, out)
	}
	if err := r.disk.write(ctx, config, file{path: candidate, remove: true}); err != nil {
		return err
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
