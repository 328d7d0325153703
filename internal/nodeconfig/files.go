package nodeconfig

import (
	"fmt"
	"io/fs"
	"slices"
	"strconv"
	"strings"
)

// Where things are on a machine that Files makes a node.
const (
	dataDir    = "/var/lib/flotilla"
	configFile = "/etc/flotilla/node.yaml"
	unitDir    = "/etc/systemd/system/"
)

// File is a file of a machine. One of Text, Source and Link says what it holds.
type File struct {
	Path   string // absolute
	Mode   fs.FileMode
	Text   string
	Source string // a file on the machine that this program runs on
	Link   string
}

// Programs are the paths of the two programs that a node is given.
type Programs struct{ Flotilla, Flotillad string }

// Setting is a setting of a node as text; a list is joined by commas.
type Setting struct{ Name, Value string }

// Files returns what makes a Debian machine a node: the programs, their units, and
// a configuration of these settings, of which the last one of a name counts.
func Files(programs Programs, settings []Setting) ([]File, error) {
	settings = append([]Setting{{"data", dataDir}}, settings...)
	text := "# Written by flotilla cluster.\n"
	for i, s := range settings {
		if s.Value == "" || slices.ContainsFunc(settings[i+1:], func(later Setting) bool { return later.Name == s.Name }) {
			continue
		}
		line, err := settingLine(s)
		if err != nil {
			return nil, err
		}
		text += line
	}
	// The units depend on the settings: on-stop, for one, changes how long a stop takes.
	cfg := Default()
	if err := cfg.read(configFile, []byte(text)); err != nil {
		return nil, err
	}
	cfg.ConfigFile = configFile
	units, err := Units(&cfg, "/usr/local/bin/flotillad")
	if err != nil {
		return nil, err
	}
	files := []File{
		{Path: "/usr/local/bin/flotilla", Source: programs.Flotilla, Mode: 0o755},
		{Path: "/usr/local/bin/flotillad", Source: programs.Flotillad, Mode: 0o755},
		{Path: "/usr/local/bin/fleetctl", Link: "flotilla"},
		{Path: "/usr/local/bin/fleetd", Link: "flotillad"},
		{Path: configFile, Text: text},
	}
	for _, u := range units {
		files = append(files, File{Path: unitDir + u.Name, Text: u.Text},
			File{Path: unitDir + "multi-user.target.wants/" + u.Name, Link: unitDir + u.Name})
	}
	return files, nil
}

// settingLine returns a setting as a line of the configuration file.
func settingLine(s Setting) (string, error) {
	o, _ := new(Config).option(s.Name)
	if !IsSetting(s.Name) {
		return "", fmt.Errorf("nodes of this version have no setting %s", s.Name)
	}
	switch o.Value.Type() {
	case "text":
		return s.Name + ": " + strconv.Quote(s.Value) + "\n", nil
	case "list":
		var quoted []string
		for v := range strings.SplitSeq(s.Value, ",") {
			quoted = append(quoted, strconv.Quote(v))
		}
		return s.Name + ": [" + strings.Join(quoted, ", ") + "]\n", nil
	}
	return s.Name + ": " + s.Value + "\n", nil
}

// IsSetting reports whether the configuration file has a setting of that name.
func IsSetting(name string) bool {
	_, ok := new(Config).option(name)
	return ok && name != "config"
}
