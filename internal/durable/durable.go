// Package durable writes files that are whole or not there: a reader, a crash or
// a power cut finds the old content or the new one, never a part. It knows
// nothing of what is in them.
package durable

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
)

// WriteFile replaces the file at path. It returns when the content and the name
// have reached the disk. On an error the old file is as it was.
func WriteFile(path string, data []byte, mode fs.FileMode) error {
	return Write(path, mode, func(w io.Writer) error {
		_, err := w.Write(data)
		return named(path, err)
	})
}

// named returns err as one about path, and not about the temporary file beside it,
// whose name is another one each time.
func named(path string, err error) error {
	if err == nil {
		return nil
	}
	var cause *fs.PathError
	if errors.As(err, &cause) {
		err = cause.Err
	}
	return fmt.Errorf("write %s: %w", path, err)
}

// Write replaces the file at path by what fill writes, as WriteFile does. An
// error of fill is returned as it is, and leaves the old file.
func Write(path string, mode fs.FileMode, fill func(io.Writer) error) (err error) {
	dir, name := filepath.Split(filepath.Clean(path))
	f, err := os.CreateTemp(dir, "."+name[:min(len(name), 200)]+".*") // names end at 255 bytes
	if err != nil {
		return named(path, err)
	}
	defer func() {
		if err != nil {
			_ = os.Remove(f.Name()) // the first error is the one to report
		}
	}()
	if err := fill(f); err != nil {
		_ = f.Close() // as above
		return err
	}
	if err := errors.Join(f.Chmod(mode), f.Sync(), f.Close()); err != nil {
		return named(path, err)
	}
	if err := os.Rename(f.Name(), path); err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	return syncDir(dir)
}

// Remove deletes the file at path, if it is there, and returns when that has
// reached the disk.
func Remove(path string) error {
	if err := os.Remove(path); err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		return fmt.Errorf("remove %s: %w", path, err)
	}
	return syncDir(filepath.Dir(path))
}

// syncDir makes the names in dir survive a power cut.
func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return fmt.Errorf("sync %s: %w", dir, err)
	}
	if err := errors.Join(d.Sync(), d.Close()); err != nil {
		return fmt.Errorf("sync %s: %w", dir, err)
	}
	return nil
}
