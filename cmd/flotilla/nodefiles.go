package main

import (
	"slices"
	"strconv"
	"strings"

	"flotilla/internal/cli"
	"flotilla/internal/node"
	"flotilla/internal/nspawn"
)

// Where things are on a node of flotilla cluster.
const (
	nodeProgram = "/usr/local/bin/flotilla"
	nodeConfig  = "/etc/flotilla/node.yaml"
	nodeData    = "/var/lib/flotilla"
)

// nodeFiles are cli.Daemons.NodeFiles.
func nodeFiles(path string, settings [][2]string) ([]nspawn.File, error) {
	cfg := node.Config{}
	cfg.Data, cfg.ConfigFile, cfg.HAProxy = nodeData, nodeConfig, "/usr/sbin/haproxy"
	units, err := node.Units(&cfg, nodeProgram)
	if err != nil {
		return nil, err
	}
	settings = append([][2]string{{"data", nodeData}}, settings...)
	text := "# Written by flotilla cluster.\n"
	for i, s := range settings {
		if s[1] == "" || slices.ContainsFunc(settings[i+1:], func(later [2]string) bool { return later[0] == s[0] }) {
			continue
		}
		o := option(s[0])
		if o == nil {
			return nil, cli.Usage("nodes of this version have no "+s[0], "flotilla node --help")
		}
		text += settingLine(o, s[1])
	}
	files := []nspawn.File{
		{Path: nodeProgram, Source: path, Mode: 0o755},
		{Path: "/usr/local/bin/fleetctl", Link: "flotilla"},
		{Path: "/usr/local/bin/fleetd", Link: "flotilla"},
		{Path: nodeConfig, Text: text},
	}
	for _, u := range units {
		path := "/etc/systemd/system/" + u.Name
		files = append(files, nspawn.File{Path: path, Text: u.Text},
			nspawn.File{Path: "/etc/systemd/system/multi-user.target.wants/" + u.Name, Link: path})
	}
	return files, nil
}

// option returns the option of a node of that name; nil if there is none.
func option(name string) *node.Option {
	options := new(node.Config).Options()
	if i := slices.IndexFunc(options, func(o node.Option) bool { return o.Name == name }); i >= 0 {
		return &options[i]
	}
	return nil
}

// settingLine returns a setting of a node as a line of its configuration file.
func settingLine(o *node.Option, value string) string {
	if o.Value.Type() != "list" {
		return o.Name + ": " + value + "\n"
	}
	var quoted []string
	for v := range strings.SplitSeq(value, ",") {
		quoted = append(quoted, strconv.Quote(v))
	}
	return o.Name + ": [" + strings.Join(quoted, ", ") + "]\n"
}
