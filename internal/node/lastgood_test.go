package node

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"flotilla/internal/catalog"
)

// services returns a catalog of n services at a revision.
func services(n int, revision int64) *catalog.Snapshot {
	batch := catalog.Batch{Revision: revision, Reset: true, Now: time.Now()}
	for i := range n {
		name := fmt.Sprintf("/services/s%05d/", i)
		batch.Keys = append(batch.Keys,
			catalog.KeyValue{Key: name + "hosts/1", Value: fmt.Sprintf("10.0.%d.%d:80", i/256, i%256), CreateRevision: 2, ModRevision: revision},
			catalog.KeyValue{Key: name + "scheme", Value: "http", CreateRevision: 1, ModRevision: 1})
	}
	return catalog.NewBuilder(catalog.Policy{}).Apply(batch)
}

func restored(s *saved) *catalog.Snapshot {
	return catalog.NewBuilder(catalog.Policy{}).Restore(s.Revision, s.keys)
}

func newLastGood(dir string) *lastGood {
	return &lastGood{dir: dir, log: slog.New(slog.DiscardHandler)}
}

func mustSave(t *testing.T, l *lastGood, s *catalog.Snapshot) {
	t.Helper()
	if !l.write(s) {
		t.Fatal(*l.problem.Load())
	}
}

func TestLastGoodRoundTrip(t *testing.T) {
	dir := t.TempDir()
	if s := newLastGood(dir).load(); s != nil {
		t.Errorf("an empty directory holds %v", s)
	}
	l := newLastGood(dir)
	for revision := int64(10); revision < 15; revision++ {
		mustSave(t, l, services(int(revision), revision))
		s := newLastGood(dir).load()
		if s == nil || s.Revision != revision {
			t.Fatalf("saved revision %d, loaded %v", revision, s)
		}
		if diff := cmp.Diff(services(int(revision), revision).Sorted(), restored(s).Sorted(), cmp.Comparer(func(a, b catalog.Endpoint) bool { return a == b })); diff != "" {
			t.Error(diff)
		}
	}
	names, err := filepath.Glob(filepath.Join(dir, "*"))
	if err != nil || len(names) != 2 {
		t.Errorf("files %v, error %v", names, err)
	}
}

// A bad value keeps the good one before it across a restart.
func TestLastGoodKeepsGoodValues(t *testing.T) {
	b := catalog.NewBuilder(catalog.Policy{})
	key := func(name, value string, revision int64) catalog.KeyValue {
		return catalog.KeyValue{Key: "/services/web/" + name, Value: value, CreateRevision: 1, ModRevision: revision}
	}
	b.Apply(catalog.Batch{Revision: 1, Keys: []catalog.KeyValue{key("scheme", "http", 1), key("hosts/1", "10.0.0.1:80", 1)}})
	s := b.Apply(catalog.Batch{Revision: 2, Keys: []catalog.KeyValue{key("hosts/1", "nonsense\n\x00\xff", 2)}})
	dir := t.TempDir()
	mustSave(t, newLastGood(dir), s)
	loaded := newLastGood(dir).load()
	if diff := cmp.Diff(slices.Collect(s.Saved()), loaded.keys); diff != "" {
		t.Error(diff)
	}
	web := restored(loaded).Service("web")
	if len(web.Endpoints) != 1 || len(web.Problems) != 1 {
		t.Errorf("endpoints %v, problems %v", web.Endpoints, web.Problems)
	}
}

func TestLastGoodDamaged(t *testing.T) {
	for name, damage := range map[string]func(raw []byte) []byte{
		"flipped bit":   func(raw []byte) []byte { raw[len(raw)/2] ^= 1; return raw },
		"flipped head":  func(raw []byte) []byte { raw[len(lastGoodForm)+12] ^= 1; return raw },
		"torn":          func(raw []byte) []byte { return raw[:len(raw)*2/3] },
		"torn header":   func(raw []byte) []byte { return raw[:20] },
		"empty":         func([]byte) []byte { return nil },
		"longer":        func(raw []byte) []byte { return append(raw, 0) },
		"other file":    func([]byte) []byte { return []byte(strings.Repeat("name: web\n", 100)) },
		"other version": func(raw []byte) []byte { raw[len(lastGoodForm)-2] = '9'; return raw },
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			l := newLastGood(dir)
			mustSave(t, l, services(10, 1))
			mustSave(t, l, services(20, 2))
			newest := l.path(l.sequence)
			raw, err := os.ReadFile(newest)
			if err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(newest, damage(raw), 0o600); err != nil {
				t.Fatal(err)
			}
			again := newLastGood(dir)
			if s := again.load(); s == nil || s.Revision != 1 {
				t.Fatalf("loaded %v, want the generation before", s)
			}
			// The next write replaces the damaged file, not the good one.
			mustSave(t, again, services(30, 3))
			if s := newLastGood(dir).load(); s == nil || s.Revision != 3 {
				t.Errorf("loaded %v after the repair", s)
			}
			if _, err := readLastGood(newest); err != nil {
				t.Errorf("the damaged file is still there: %v", err)
			}
		})
	}
}

func FuzzLastGood(f *testing.F) {
	dir := f.TempDir()
	l := newLastGood(dir)
	l.write(services(3, 1))
	raw, err := os.ReadFile(l.path(1))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(raw)
	f.Add(raw[:len(raw)-1])
	f.Fuzz(func(t *testing.T, data []byte) {
		path := filepath.Join(t.TempDir(), "file")
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
		_, _ = readLastGood(path) // it must return, whatever it says
	})
}

func TestLastGoodDiskFull(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Fatal("this test mounts a small tmpfs and needs root")
	}
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=256k"); err != nil {
		t.Fatalf("mount a tmpfs: %v", err)
	}
	t.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_DETACH) })
	var log strings.Builder
	l := &lastGood{dir: dir, log: slog.New(slog.NewTextHandler(&log, nil))}
	mustSave(t, l, services(100, 1))
	for range 3 {
		if l.write(services(5000, 2)) {
			t.Fatal("a catalog larger than the disk was saved")
		}
	}
	if n := strings.Count(log.String(), "level=ERROR"); n != 1 {
		t.Errorf("the full disk was logged %d times:\n%s", n, &log)
	}
	if p := l.problem.Load(); p == nil || !strings.Contains(*p, "no space left") {
		t.Errorf("problem %v", p)
	}
	if s := newLastGood(dir).load(); s == nil || s.Revision != 1 {
		t.Errorf("loaded %v, want the one from before", s)
	}
	mustSave(t, l, services(100, 3))
	if l.problem.Load() != nil {
		t.Error("the problem stays")
	}
}

// However fast the catalog changes, a file is written at most every 5 s, and
// the last one when the node stops.
func TestLastGoodPace(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		feed := catalog.NewFeed()
		l := newLastGood(dir)
		ctx, stop := context.WithCancel(t.Context())
		ended := make(chan error)
		go func() { ended <- l.run(ctx, feed, nil) }()
		for revision := range int64(100) {
			feed.Publish(services(3, revision+1))
			time.Sleep(100 * time.Millisecond) // of the test's own clock
		}
		stop()
		if err := <-ended; err != nil {
			t.Error(err)
		}
		if l.sequence < 3 || l.sequence > 4 {
			t.Errorf("%d files written in 10 s and at the stop", l.sequence)
		}
	})
	if s := newLastGood(dir).load(); s == nil || s.Revision != 100 {
		t.Errorf("loaded %v after the stop", s)
	}
}

func BenchmarkLastGood(b *testing.B) {
	l := newLastGood(b.TempDir())
	s := services(10000, 1)
	for b.Loop() {
		if !l.write(s) {
			b.Fatal(*l.problem.Load())
		}
	}
}
