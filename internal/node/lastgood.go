package node

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/gob"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"sync/atomic"
	"time"

	"flotilla/internal/catalog"
	"flotilla/internal/durable"
)

// lastGood keeps the newest catalog on disk, so that a node whose store is away
// when it boots can route at once. It writes two files in turn, last-good.1 and
// last-good.2: if the newer one is damaged, the one before is used.
//
// A file is a line that names its form, a savedHead and the keys as gob, which keeps
// values that are not UTF-8, and the SHA-256 of all that.
type lastGood struct {
	dir string
	log *slog.Logger

	sequence uint64                 // of the newest file; its parity says which file that is
	problem  atomic.Pointer[string] // why the newest catalog is not on disk; nil: it is, or will be soon
}

const (
	lastGoodForm = "flotilla last good catalog, form 2\n"

	lastGoodEvery = 5 * time.Second
	lastGoodShare = 50 // writing takes at most one part in so many of the time
)

// saved is one catalog as it is in a file.
type saved struct {
	savedHead
	keys []catalog.SavedKey
}

type savedHead struct {
	Sequence uint64
	Revision int64
	At       time.Time
}

func (l *lastGood) path(sequence uint64) string {
	return filepath.Join(l.dir, fmt.Sprintf("last-good.%d", 2-sequence%2))
}

// load returns the newest catalog on disk, or nil if there is none. A damaged
// file is logged and passed over.
func (l *lastGood) load() *saved {
	var newest *saved
	for n := range uint64(2) {
		path := l.path(n)
		s, err := readLastGood(path)
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			l.log.Warn("a last good catalog is damaged and is not used", "path", path, "err", err)
			continue
		}
		if newest == nil || s.Sequence > newest.Sequence {
			newest = s
		}
	}
	if newest != nil {
		l.sequence = newest.Sequence
	}
	return newest
}

// run writes each snapshot of feed that is newer than from, at most every 5 s
// and for at most 2 % of the time. A failed write is logged once, kept as the
// problem, and tried again with the next snapshot or after 30 s.
func (l *lastGood) run(ctx context.Context, feed *catalog.Feed, from *catalog.Snapshot) error {
	last := from
	retry := time.NewTicker(30 * time.Second)
	defer retry.Stop()
	for {
		snapshot, newer := feed.Next()
		if snapshot != last {
			began := time.Now()
			if l.write(snapshot) {
				last = snapshot
			}
			pause := time.NewTimer(max(lastGoodEvery, lastGoodShare*time.Since(began)))
			select {
			case <-pause.C:
			case <-ctx.Done():
				pause.Stop()
			}
		}
		select {
		case <-newer:
		case <-retry.C:
		case <-ctx.Done():
			if s := feed.Latest(); s != last {
				l.write(s)
			}
			return nil
		}
	}
}

// write saves s over the older of the two files and reports whether it did.
func (l *lastGood) write(s *catalog.Snapshot) bool {
	err := l.save(s, time.Now())
	if err == nil {
		if l.problem.Swap(nil) != nil {
			l.log.Info("the catalog is saved on disk again", "revision", s.Revision)
		}
		return true
	}
	text := err.Error()
	if old := l.problem.Swap(&text); old == nil || *old != text {
		l.log.Error("the catalog cannot be saved; the one before stays on disk", "revision", s.Revision, "err", err)
	}
	return false
}

func (l *lastGood) save(s *catalog.Snapshot, now time.Time) error {
	var content bytes.Buffer
	content.WriteString(lastGoodForm)
	out := gob.NewEncoder(&content)
	next := savedHead{l.sequence + 1, s.Revision, now}
	err := out.Encode(next)
	for k := range s.Saved() {
		err = errors.Join(err, out.Encode(k))
	}
	if err != nil {
		return fmt.Errorf("save the catalog: %w", err)
	}
	sum := sha256.Sum256(content.Bytes())
	content.Write(sum[:])
	if err := durable.WriteFile(l.path(next.Sequence), content.Bytes(), 0o600); err != nil {
		return fmt.Errorf("save the catalog: %w", err)
	}
	l.sequence = next.Sequence
	return nil
}

// readLastGood returns the catalog of one file, or an error that says how the
// file is damaged.
func readLastGood(path string) (*saved, error) {
	raw, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	rest, ours := bytes.CutPrefix(raw, []byte(lastGoodForm))
	if !ours || len(rest) < sha256.Size {
		return nil, errors.New("not a saved catalog of this version of the program")
	}
	end := len(raw) - sha256.Size
	if sum := sha256.Sum256(raw[:end]); !bytes.Equal(sum[:], raw[end:]) {
		return nil, errors.New("the checksum does not match")
	}
	in := gob.NewDecoder(bytes.NewReader(raw[len(lastGoodForm):end]))
	s := new(saved)
	if err := in.Decode(&s.savedHead); err != nil {
		return nil, fmt.Errorf("decode the head: %w", err)
	}
	for {
		var k catalog.SavedKey
		switch err := in.Decode(&k); {
		case errors.Is(err, io.EOF):
			return s, nil
		case err != nil:
			return nil, fmt.Errorf("decode key %d: %w", len(s.keys)+1, err)
		}
		s.keys = append(s.keys, k)
	}
}
