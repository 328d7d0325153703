package node

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"sync/atomic"
	"time"

	"flotilla/internal/catalog"
)

// lastGood keeps the newest catalog on disk, so that a node whose store is away
// when it boots can route at once. It writes two files in turn, last-good.1 and
// last-good.2: a write that fails or is torn leaves the other one whole.
//
// A file is the magic line, a header (big-endian: schema uint32, sequence
// uint64, revision int64, time in Unix nanoseconds int64), the SHA-256 of the
// header and all that follows, the cluster id and the records up to the end of
// the file; a text is a uvarint length and its bytes.
type lastGood struct {
	dir     string
	cluster string // "" while it is not known
	log     *slog.Logger

	sequence uint64                 // of the newest file; its parity says which file that is
	problem  atomic.Pointer[string] // why the newest catalog is not on disk; nil: it is, or will be soon
}

const (
	lastGoodMagic  = "flotilla last good catalog\n"
	lastGoodSchema = 1
	lastGoodHeader = 4 + 8 + 8 + 8
	// A text longer than this in a file means that the file is damaged.
	lastGoodText = 1 << 20

	lastGoodEvery = 5 * time.Second
	lastGoodShare = 50 // writing takes at most one part in so many of the time
)

// saved is one catalog as it is in a file.
type saved struct {
	sequence uint64
	revision int64
	at       time.Time
	cluster  string
	keys     []catalog.SavedKey
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
		if newest == nil || s.sequence > newest.sequence {
			newest = s
		}
	}
	if newest != nil {
		l.sequence, l.cluster = newest.sequence, newest.cluster
	}
	return newest
}

// run writes each snapshot of feed that is newer than from, at most every 2 s
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

func (l *lastGood) save(s *catalog.Snapshot, now time.Time) (err error) {
	path := l.path(l.sequence + 1)
	tmp := path + ".tmp"
	f, err := os.OpenFile(tmp, os.O_CREATE|os.O_TRUNC|os.O_RDWR, 0o600)
	if err != nil {
		return fmt.Errorf("save the catalog: %w", err)
	}
	defer func() {
		if err != nil {
			err = fmt.Errorf("save the catalog: %w", errors.Join(err, os.Remove(tmp)))
		}
	}()
	if err := errors.Join(l.encode(f, s, now), f.Sync(), f.Close()); err != nil {
		return err
	}
	if err := os.Rename(tmp, path); err != nil {
		return err
	}
	l.sequence++
	dir, err := os.Open(l.dir)
	if err != nil {
		return err
	}
	return errors.Join(dir.Sync(), dir.Close())
}

func (l *lastGood) encode(f *os.File, s *catalog.Snapshot, now time.Time) error {
	header := binary.BigEndian.AppendUint32(nil, lastGoodSchema)
	header = binary.BigEndian.AppendUint64(header, l.sequence+1)
	header = binary.BigEndian.AppendUint64(header, uint64(s.Revision))
	header = binary.BigEndian.AppendUint64(header, uint64(now.UnixNano()))

	sum := sha256.New()
	sum.Write(header)
	buf := bufio.NewWriterSize(io.MultiWriter(f, sum), 64<<10)
	if _, err := f.Write(append(append([]byte(lastGoodMagic), header...), make([]byte, sha256.Size)...)); err != nil {
		return err
	}
	var scratch []byte
	text := func(s string) { scratch = append(binary.AppendUvarint(scratch, uint64(len(s))), s...) }
	text(l.cluster)
	for k := range s.Saved() {
		text(k.Key)
		text(k.Value)
		text(k.Good)
		good := byte(0)
		if k.HasGood {
			good = 1
		}
		scratch = append(scratch, good)
		scratch = binary.AppendUvarint(scratch, uint64(k.CreateRevision))
		scratch = binary.AppendUvarint(scratch, uint64(k.ModRevision))
		if _, err := buf.Write(scratch); err != nil {
			return err
		}
		scratch = scratch[:0]
	}
	if _, err := buf.Write(scratch); err != nil {
		return err
	}
	if err := buf.Flush(); err != nil {
		return err
	}
	_, err := f.WriteAt(sum.Sum(nil), int64(len(lastGoodMagic)+lastGoodHeader))
	return err
}

// readLastGood returns the catalog of one file, or an error that says how the
// file is damaged.
func readLastGood(path string) (*saved, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer func() { _ = f.Close() }() // only read
	head := make([]byte, len(lastGoodMagic)+lastGoodHeader+sha256.Size)
	if _, err := io.ReadFull(f, head); err != nil {
		return nil, errors.New("shorter than its header")
	}
	header, ok := bytes.CutPrefix(head, []byte(lastGoodMagic))
	if !ok {
		return nil, errors.New("not a saved catalog")
	}
	header, want := header[:lastGoodHeader], header[lastGoodHeader:]
	if schema := binary.BigEndian.Uint32(header); schema != lastGoodSchema {
		return nil, fmt.Errorf("written in form %d by another version of this program", schema)
	}
	s := &saved{
		sequence: binary.BigEndian.Uint64(header[4:]),
		revision: int64(binary.BigEndian.Uint64(header[12:])),
		at:       time.Unix(0, int64(binary.BigEndian.Uint64(header[20:]))),
	}
	sum := sha256.New()
	sum.Write(header)
	r := &recordReader{r: bufio.NewReaderSize(io.TeeReader(f, sum), 64<<10)}
	s.cluster = r.text()
	for r.more() {
		s.keys = append(s.keys, catalog.SavedKey{Key: r.text(), Value: r.text(), Good: r.text(), HasGood: r.byte() == 1,
			CreateRevision: int64(r.uvarint()), ModRevision: int64(r.uvarint())})
	}
	if r.err != nil {
		return nil, r.err
	}
	if !bytes.Equal(sum.Sum(nil), want) {
		return nil, errors.New("the checksum does not match")
	}
	return s, nil
}

// recordReader reads the parts of a record; after an error it returns zeros.
type recordReader struct {
	r   *bufio.Reader
	err error
}

// more reports whether another record begins.
func (r *recordReader) more() bool {
	if r.err != nil {
		return false
	}
	_, err := r.r.Peek(1)
	return err == nil
}

func (r *recordReader) uvarint() uint64 {
	if r.err != nil {
		return 0
	}
	n, err := binary.ReadUvarint(r.r)
	if err != nil {
		r.err = errors.New("ends in the middle of a record")
	}
	return n
}

func (r *recordReader) byte() byte {
	if r.err != nil {
		return 0
	}
	b, err := r.r.ReadByte()
	if err != nil {
		r.err = errors.New("ends in the middle of a record")
	}
	return b
}

func (r *recordReader) text() string {
	n := r.uvarint()
	if r.err == nil && n > lastGoodText {
		r.err = errors.New("holds a text that is too long")
	}
	if r.err != nil {
		return ""
	}
	raw := make([]byte, n)
	if _, err := io.ReadFull(r.r, raw); err != nil {
		r.err = errors.New("ends in the middle of a record")
	}
	return string(raw)
}
