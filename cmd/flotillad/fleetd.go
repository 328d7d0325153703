package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"maps"
	"net"
	"os"
	"os/signal"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/coreos/go-systemd/v22/activation"

	"flotilla/internal/cli"
	"flotilla/internal/node"
	"flotilla/internal/nodeconfig"
)

// Where fleet's configuration is, unless -config names a file.
const fleetConfFile = "/etc/fleet/fleet.conf"

// fleetKeys are the keys that fleet knows, and what they set of a node; nil: they
// mean nothing here.
var fleetKeys = map[string]func(c *nodeconfig.Config, value string) error{
	"verbosity": func(c *nodeconfig.Config, v string) error {
		n, err := strconv.Atoi(v)
		if n > 0 {
			c.LogLevel = "debug"
		}
		return err
	},
	"etcd_servers":    func(c *nodeconfig.Config, v string) (err error) { c.EtcdEndpoints, err = servers(v); return err },
	"etcd_keyfile":    func(c *nodeconfig.Config, v string) error { c.EtcdKeyFile = v; return nil },
	"etcd_certfile":   func(c *nodeconfig.Config, v string) error { c.EtcdCertFile = v; return nil },
	"etcd_cafile":     func(c *nodeconfig.Config, v string) error { c.EtcdCAFile = v; return nil },
	"etcd_key_prefix": func(c *nodeconfig.Config, v string) error { c.KeyPrefix = "/" + strings.Trim(v, "/") + "/"; return nil },
	"public_ip":       func(c *nodeconfig.Config, v string) error { c.Address = v; return nil },
	"metadata":        func(c *nodeconfig.Config, v string) (err error) { c.Metadata, err = pairs(v); return err },
	"agent_ttl": func(c *nodeconfig.Config, v string) error {
		ttl, err := time.ParseDuration(v)
		c.MachineTTL = int((ttl + time.Second - 1) / time.Second)
		return err
	},
	"units_directory": func(c *nodeconfig.Config, v string) error { c.UnitsDir = v; return nil },
	"token_limit":     func(c *nodeconfig.Config, v string) (err error) { c.TokenLimit, err = strconv.Atoi(v); return err },
	"disable_engine": func(c *nodeconfig.Config, v string) error {
		off, err := strconv.ParseBool(v)
		c.Engine = !off
		return err
	},
	"on_stop":                   func(c *nodeconfig.Config, v string) error { c.OnStop = v; return nil }, // not fleet's own
	"etcd_username":             nil,
	"etcd_password":             nil,
	"systemd_user":              nil,
	"enable_grpc":               nil,
	"disable_watches":           nil,
	"verify_units":              nil,
	"authorized_keys_file":      nil,
	"etcd_request_timeout":      nil,
	"engine_reconcile_interval": nil,
}

// Keys without meaning here whose loss somebody may mind, unless they say no.
var fleetLost = map[string]string{
	"etcd_username":        "etcd is used without a user: give a client certificate (etcd_certfile, etcd_keyfile) instead",
	"etcd_password":        "etcd is used without a user: give a client certificate (etcd_certfile, etcd_keyfile) instead",
	"systemd_user":         "units are run by the system's systemd, not by a user's",
	"verify_units":         "signatures of units are not verified; fleet gave that up too",
	"authorized_keys_file": "signatures of units are not verified; fleet gave that up too",
}

// parseFleetConf returns the node that the text of a configuration file asks for,
// called where in errors, and the environment, which counts more. warnings are
// about keys that mean nothing here. All mistakes are returned at once.
//
// A node that runs as fleetd runs units and nothing else, and drains when it is
// stopped, as fleetd did.
func parseFleetConf(text, where string, environ []string) (c nodeconfig.Config, warnings []string, err error) {
	c = nodeconfig.Default()
	c.UnitsOnly, c.OnStop, c.LogFormat = true, "drain", "text"
	c.EtcdEndpoints = []string{"http://127.0.0.1:2379"}
	type setting struct{ value, where string }
	given := map[string]setting{}
	var wrong []error
	number := 0
	for line := range strings.Lines(text) {
		number++
		line = strings.TrimSpace(line)
		if line == "" || line[0] == '#' || line[0] == ';' {
			continue
		}
		at := fmt.Sprintf("%s:%d", where, number)
		key, value, ok := strings.Cut(line, "=")
		if !ok {
			wrong = append(wrong, fmt.Errorf("%s: %q is not KEY=VALUE", at, line))
			continue
		}
		given[strings.ToLower(strings.TrimSpace(key))] = setting{unquote(strings.TrimSpace(value)), at}
	}
	for _, variable := range environ {
		name, value, _ := strings.Cut(variable, "=")
		if key, ok := strings.CutPrefix(name, "FLEET_"); ok {
			given[strings.ToLower(key)] = setting{unquote(value), name}
		}
	}
	for _, key := range slices.Sorted(maps.Keys(given)) {
		s := given[key]
		set, known := fleetKeys[key]
		switch {
		case !known:
			warnings = append(warnings, fmt.Sprintf("%s: fleet has no setting %s, and it is not used", s.where, key))
		case set == nil:
			if text := fleetLost[key]; text != "" && s.value != "" && s.value != "false" {
				warnings = append(warnings, fmt.Sprintf("%s: %s is not used: %s", s.where, key, text))
			}
		case s.value == "" && key != "metadata":
		default:
			if err := set(&c, s.value); err != nil {
				wrong = append(wrong, fmt.Errorf("%s: %s=%s: %w", s.where, key, s.value, err))
			}
		}
	}
	return c, warnings, errors.Join(wrong...)
}

// unquote takes off quotes around the whole value.
func unquote(s string) string {
	for _, q := range []string{`"`, `'`} {
		if len(s) > 1 && strings.HasPrefix(s, q) && strings.HasSuffix(s, q) {
			return s[1 : len(s)-1]
		}
	}
	return s
}

// servers reads http://a,http://b or ["http://a","http://b"].
func servers(value string) ([]string, error) {
	value = strings.TrimSuffix(strings.TrimPrefix(value, "["), "]")
	var list []string
	for s := range strings.SplitSeq(value, ",") {
		if s = strings.TrimSuffix(unquote(strings.TrimSpace(s)), "/"); s == "" {
			continue
		}
		if !strings.Contains(s, "://") {
			s = "http://" + s
		}
		list = append(list, s)
	}
	if len(list) == 0 {
		return nil, errors.New("names no server")
	}
	return list, nil
}

// pairs reads k=v,k2=v2 and returns them in order; of two values for a key the last
// counts.
func pairs(value string) ([]string, error) {
	m := map[string]string{}
	for pair := range strings.SplitSeq(value, ",") {
		k, v, ok := strings.Cut(pair, "=")
		k, v = strings.TrimSpace(k), strings.TrimSpace(v)
		if ok && k != "" && v != "" {
			m[k] = k + "=" + v
		} else if strings.TrimSpace(pair) != "" {
			return nil, fmt.Errorf("%q is not KEY=VALUE", strings.TrimSpace(pair))
		}
	}
	return slices.Sorted(maps.Values(m)), nil
}

// routeAddress returns the address from which this machine speaks to others, or
// "" if it has no route. Nothing is sent.
func routeAddress() string {
	conn, err := net.Dial("udp4", "192.0.2.1:9") // an address for documentation
	if err != nil {
		return ""
	}
	defer func() { _ = conn.Close() }() // nothing was written
	addr, ok := conn.LocalAddr().(*net.UDPAddr)
	if !ok {
		return ""
	}
	return addr.IP.String()
}

// readFleetConf returns the configuration of a node from fleet's file. A file
// that was not asked for by name may be missing.
func readFleetConf(file string, named bool, environ []string) (nodeconfig.Config, []string, error) {
	raw, err := os.ReadFile(file)
	if err != nil && (named || !errors.Is(err, fs.ErrNotExist)) {
		return nodeconfig.Default(), nil, err
	}
	cfg, warnings, err := parseFleetConf(string(raw), file, environ)
	if err != nil {
		return cfg, warnings, err
	}
	if cfg.Address == "" {
		cfg.Address = routeAddress()
	}
	return cfg, warnings, cfg.Validate()
}

// runFleetd runs a node as fleetd and returns the exit code. SIGHUP makes it
// read its configuration again.
func runFleetd(args []string, stdout, stderr io.Writer) int {
	fl := flag.NewFlagSet("fleetd", flag.ContinueOnError)
	fl.SetOutput(stderr)
	file := fl.String("config", "", "fleet's configuration `file` (default "+fleetConfFile+", if it is there)")
	about := fl.Bool("version", false, "print the version and exit")
	err := fl.Parse(args)
	switch {
	case errors.Is(err, flag.ErrHelp):
		return cli.ExitDone
	case err != nil:
		return cli.ExitUsage
	case *about:
		cli.Say(stdout, "fleetd version %s\n", cli.Version)
		return cli.ExitDone
	case fl.NArg() > 0:
		cli.Say(stderr, "fleetd: error: fleetd takes no argument, and %q is one\n", fl.Arg(0))
		return cli.ExitUsage
	}
	named := *file != ""
	if !named {
		*file = fleetConfFile
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	again := make(chan os.Signal, 1)
	signal.Notify(again, syscall.SIGHUP)
	defer signal.Stop(again)
	if err := serveFleetd(ctx, again, *file, named, stderr); err != nil {
		cli.Say(stderr, "fleetd: error: %s\n", strings.ReplaceAll(err.Error(), "\n", "\nfleetd: error: "))
		return cli.ExitFailed
	}
	return cli.ExitDone
}

// serveFleetd runs the node until ctx ends. For each signal from again the file
// is read anew and, if it is good, the node is run anew with it.
func serveFleetd(ctx context.Context, again <-chan os.Signal, file string, named bool, stderr io.Writer) error {
	cfg, log, err := fleetdConfig(file, named, stderr)
	sockets := activation.Files(false) // kept by this variable over all runs
	defer runtime.KeepAlive(sockets)
	for err == nil {
		run, end := context.WithCancelCause(ctx)
		ended := make(chan error, 1)
		go func() { ended <- node.Run(run, cfg, cli.Version, log, sockets...) }()
		for run.Err() == nil {
			select {
			case err := <-ended:
				end(nil)
				return err
			case <-again:
				log.Info("Reloading configuration from " + file)
				next, nextLog, err := fleetdConfig(file, named, stderr)
				if err != nil {
					log.Error("the configuration is not good, and the old one stays", "file", file, "err", err)
					continue
				}
				cfg, log = next, nextLog
				end(node.ErrReload)
			}
		}
		err = <-ended
		end(nil)
		if ctx.Err() != nil {
			return err
		}
	}
	return err
}

// fleetdConfig reads the configuration and warns of what is in it.
func fleetdConfig(file string, named bool, stderr io.Writer) (nodeconfig.Config, *slog.Logger, error) {
	cfg, warnings, err := readFleetConf(file, named, os.Environ())
	if err == nil {
		err = node.CheckPrivileges(&cfg)
	}
	log := newLogger(stderr, &cfg)
	for _, w := range warnings {
		log.Warn(w)
	}
	return cfg, log, err
}
