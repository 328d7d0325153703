package nodeconfig

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// Exit codes of `flotillad store` that mean that starting it again is useless.
const (
	ExitEnoughVoters = 10 // the cluster has its voters: this node is a client only
	ExitRemoved      = 11 // this member was removed from the cluster
)

// Unit is one systemd unit file.
type Unit struct{ Name, Text string }

// WriteTo writes the unit below dir, which has to exist.
func (u Unit) WriteTo(dir string) error {
	path := filepath.Join(dir, u.Name)
	if err := os.WriteFile(path, []byte(u.Text), 0o644); err != nil {
		return fmt.Errorf("write unit: %w", err)
	}
	return nil
}

// Units returns the systemd units that run this node with the flotillad at self:
// store (unless etcd is external), node and HAProxy, each on its own, so that
// one can fail or be upgraded without the others. The settings are in the
// configuration file if the node was given one, else in the arguments.
func Units(c *Config, self string) ([]Unit, error) {
	haproxy := c.HAProxy
	if haproxy == "" {
		haproxy = "/usr/sbin/haproxy"
	}
	for _, path := range []string{self, haproxy, c.Data, c.ConfigFile} {
		if strings.ContainsAny(path, " \t\"'\\%$") {
			return nil, fmt.Errorf("path %q has a character that systemd gives a meaning to: choose another one", path)
		}
	}
	if c.ConfigFile != "" && !filepath.IsAbs(c.ConfigFile) {
		return nil, errors.New("--config has to be an absolute path in a unit")
	}
	var units []Unit
	after := ""
	if c.RunsStore() {
		after = " flotilla-store.service"
		units = append(units, c.storeUnit(self))
	}
	return append(units, c.nodeUnit(self, after), c.haproxyUnit(haproxy)), nil
}

// arguments returns the command line that gives a process these settings: only
// those that differ from the defaults.
func (c *Config) arguments(only ...string) string {
	if c.ConfigFile != "" {
		return " --config " + c.ConfigFile
	}
	wanted := map[string]bool{}
	for _, name := range only {
		wanted[name] = true
	}
	var args strings.Builder
	usual := Default()
	defaults := usual.Options()
	for i, o := range c.Options() {
		value := o.Value.String()
		if len(only) > 0 && !wanted[o.Name] || o.Name == "supervise" || o.Name == "config" {
			continue
		}
		// The host name is not the same everywhere: it is always written down.
		if value == defaults[i].Value.String() && o.Name != "name" {
			continue
		}
		if o.Value.Type() == "bool" {
			fmt.Fprintf(&args, " --%s=%s", o.Name, value)
		} else {
			fmt.Fprintf(&args, " --%s %s", o.Name, strings.ReplaceAll(value, "%", "%%"))
		}
	}
	return args.String()
}

// LeaveLimit bounds how long a node that drains when it is stopped waits for its
// units to be elsewhere.
const LeaveLimit = 80 * time.Second

// stopSeconds is how long stopping the node may take.
func (c *Config) stopSeconds() int {
	if c.OnStop == "drain" {
		return int(LeaveLimit/time.Second) + 20
	}
	return 20
}

func (c *Config) storeUnit(self string) Unit {
	return Unit{"flotilla-store.service", `[Unit]
Description=Flotilla store (etcd)
Wants=network-online.target
After=network-online.target
StartLimitIntervalSec=0

[Service]
ExecStart=` + self + ` store` + c.arguments("name", "address", "data", "join", "insecure", "store-client-port", "store-peer-port", "log-level", "log-format") + `
Restart=always
RestartSec=5
# The cluster has all members it needs, or has removed this one.
RestartPreventExitStatus=` + fmt.Sprintf("%d %d", ExitEnoughVoters, ExitRemoved) + `
SuccessExitStatus=` + fmt.Sprintf("%d", ExitEnoughVoters) + `
TimeoutStopSec=20
LimitNOFILE=65536
OOMScoreAdjust=-500
IOSchedulingClass=best-effort
IOSchedulingPriority=0

[Install]
WantedBy=multi-user.target
`}
}

func (c *Config) nodeUnit(self, after string) Unit {
	wants := ""
	if after != "" {
		wants = "Wants=" + strings.TrimSpace(after) + "\n"
	}
	return Unit{"flotilla-node.service", `[Unit]
Description=Flotilla node
Wants=network-online.target flotilla-haproxy.service
` + wants + `After=network-online.target` + after + `
StartLimitIntervalSec=0

[Service]
ExecStart=` + self + ` node --supervise=false` + c.arguments() + `
Restart=always
RestartSec=1
TimeoutStopSec=` + strconv.Itoa(c.stopSeconds()) + `
RuntimeDirectory=flotilla
RuntimeDirectoryPreserve=yes
RuntimeDirectoryMode=0750
LimitNOFILE=1048576
OOMScoreAdjust=-400

[Install]
WantedBy=multi-user.target
`}
}

func (c *Config) haproxyUnit(haproxy string) Unit {
	dir := filepath.Join(c.Data, "router")
	return Unit{"flotilla-haproxy.service", `[Unit]
Description=HAProxy, driven by flotilla-node.service
Wants=network-online.target
After=network-online.target
StartLimitIntervalSec=0

[Service]
Type=notify
# The node writes the first configuration. From then on the file is equal to what
# runs, and HAProxy starts without the node.
ExecStartPre=/bin/sh -c 'until [ -s ` + dir + `/haproxy.cfg ]; do sleep 0.1; done'
ExecStart=` + haproxy + ` -Ws -S ` + dir + `/master.sock,mode,600 -f ` + dir + `/haproxy.cfg
KillMode=mixed
Restart=always
RestartSec=1
SuccessExitStatus=143
TimeoutStopSec=15
LimitNOFILE=1048576
OOMScoreAdjust=-600

[Install]
WantedBy=multi-user.target
`}
}
