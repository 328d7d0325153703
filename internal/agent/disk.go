package agent

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"flotilla/internal/durable"
	"flotilla/internal/unit"
)

// record is what was done with one unit, written down so that the next agent
// goes on where this one ended. It is gone after a reboot, like the unit.
type record struct {
	Hash      string `json:"hash"`
	Sum       string `json:"sum"`
	Epoch     int64  `json:"epoch"`
	Launched  bool   `json:"launched"`
	Restarts  int64  `json:"restarts"`
	Exclusive bool   `json:"exclusive"`
	Whole     bool   `json:"whole"`               // its files are complete, and systemd has read them
	Installed bool   `json:"installed,omitempty"` // some version of it here had an [Install] section
	Doing     Action `json:"doing"`               // start, stop or restart under way; "" if none
	// Before is the invocation of the unit before the restart under way: when it
	// has another one, the restart was carried out.
	Before string `json:"before,omitempty"`
	Asked  int64  `json:"asked,omitempty"` // the number of that restart
}

// disk is where the files are. All of them are below /run, in memory, so that they
// are gone after a reboot, and so that fsync costs nothing.
type disk struct {
	units   string // unit files, linked from there
	dropIns string // systemd's own directory of run-time units
	state   string // records
}

const dropInName = "50-flotilla.conf"

func (d disk) unit(name string) string      { return filepath.Join(d.units, name) }
func (d disk) records() string              { return filepath.Join(d.state, "units") }
func (d disk) dropInDir(name string) string { return filepath.Join(d.dropIns, name+".d") }

// open makes the directories and reads what earlier agents wrote down. A unit
// file without a record, which is there when the records were lost, counts as
// one that is not whole.
func (d disk) open() (map[string]record, error) {
	for _, dir := range []string{d.units, d.records()} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return nil, fmt.Errorf("make the directory of units: %w", err)
		}
	}
	all := map[string]record{}
	files, err := os.ReadDir(d.units)
	if err != nil {
		return nil, fmt.Errorf("list unit files: %w", err)
	}
	for _, f := range files {
		if unit.CheckName(f.Name()) != nil || !f.Type().IsRegular() {
			continue
		}
		r := record{}
		if text, err := os.ReadFile(d.unit(f.Name())); err == nil {
			if parsed, err := unit.Parse(string(text)); err == nil {
				r.Hash = parsed.Hash().String()
			}
		}
		all[f.Name()] = r
	}
	files, err = os.ReadDir(d.records())
	if err != nil {
		return nil, fmt.Errorf("list the records of units: %w", err)
	}
	for _, f := range files {
		if unit.CheckName(f.Name()) != nil {
			continue
		}
		r := all[f.Name()]
		if text, err := os.ReadFile(filepath.Join(d.records(), f.Name())); err == nil {
			var read record
			if json.Unmarshal(text, &read) == nil {
				r = read
			}
		}
		all[f.Name()] = r
	}
	return all, nil
}

// note writes the record of a unit down.
func (d disk) note(name string, r record) error {
	text, err := json.Marshal(r)
	if err != nil {
		return fmt.Errorf("note unit %s: %w", name, err)
	}
	return durable.WriteFile(filepath.Join(d.records(), name), text, 0o644)
}

// forget removes the record of a unit.
func (d disk) forget(name string) error { return durable.Remove(filepath.Join(d.records(), name)) }

// write writes the files of a unit; an empty drop-in is none.
func (d disk) write(name, text, dropIn string) error {
	if err := durable.WriteFile(d.unit(name), []byte(text), 0o644); err != nil {
		return err
	}
	if dropIn == "" {
		return d.removeDropIn(name)
	}
	if err := os.MkdirAll(d.dropInDir(name), 0o755); err != nil {
		return fmt.Errorf("make the directory of a drop-in: %w", err)
	}
	return durable.WriteFile(filepath.Join(d.dropInDir(name), dropInName), []byte(dropIn), 0o644)
}

// isPlain reports whether the file of a unit says of no other unit that it is
// installed in it: then its own link is all that systemd made for it.
func (d disk) isPlain(name string) bool {
	text, err := os.ReadFile(d.unit(name))
	return err == nil && !strings.Contains(string(text), "[Install]")
}

// unlink removes the link that systemd made to the file of a unit.
func (d disk) unlink(name string) error {
	link := filepath.Join(d.dropIns, name)
	to, err := os.Readlink(link)
	if !filepath.IsAbs(to) {
		to = filepath.Join(d.dropIns, to)
	}
	if err != nil || to != d.unit(name) {
		return nil
	}
	return durable.Remove(link)
}

// remove removes the files of a unit.
func (d disk) remove(name string) error {
	return errors.Join(durable.Remove(d.unit(name)), d.removeDropIn(name))
}

func (d disk) removeDropIn(name string) error {
	if err := durable.Remove(filepath.Join(d.dropInDir(name), dropInName)); err != nil {
		return err
	}
	if err := os.Remove(d.dropInDir(name)); err != nil && !errors.Is(err, fs.ErrNotExist) && !isNotEmpty(err) {
		return fmt.Errorf("remove the directory of a drop-in: %w", err)
	}
	return nil
}

func isNotEmpty(err error) bool { // somebody else's drop-in is in there
	return errors.Is(err, fs.ErrExist) // which is what Go makes of ENOTEMPTY
}
