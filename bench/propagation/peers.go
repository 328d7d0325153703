package main

import (
	"context"
	_ "embed"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"flotilla/bench/harness"
)

// options is what a run is told beside what all benchmarks are.
type options struct {
	samples        int
	confd, traefik string // programs; empty: not measured
	peerSamples    int
	peerServices   int
	peerTime       time.Duration // for each kind at each size
}

// peer is another router, one on each node, which follows the node's own member
// of the store. It runs only while it is measured.
type peer struct {
	*harness.Bench
	name, program, version string // version is what makes the program print it
	setup                  string // how it is run
	net                    int    // it listens on 127.<net>.0.<node>
	keys                   keys
	start                  func(p *peer, ctx context.Context, dir string, node *harness.Node, probe *harness.Client) error

	processes []*harness.Process
}

// peerRest is what a peer gets after each change before the next: longer than
// confd waits for its commands to end, and than Traefik's throttle.
const peerRest = 250 * time.Millisecond

// peers returns the systems whose programs are given.
func peers(ctx context.Context, b *harness.Bench, c *harness.Cluster, o options) ([]*system, error) {
	var all []*system
	for _, p := range []*peer{
		{Bench: b, name: "confd", program: o.confd, version: "-version", net: confdNet, keys: catalogKeys{confdPrefix}, start: (*peer).startConfd,
			setup: "for each change it writes the file, checks it by haproxy -c and has HAProxy reload it, seamlessly"},
		{Bench: b, name: "traefik", program: o.traefik, version: "version", net: traefikNet, keys: traefikKeys{}, start: (*peer).startTraefik,
			setup: "a throttle of 0.1 s instead of 2, over before each sample"},
	} {
		if p.program == "" {
			continue
		}
		program, err := exec.LookPath(p.program)
		if err == nil {
			program, err = filepath.Abs(program)
		}
		if err != nil {
			return nil, fmt.Errorf("no %s: %w: run test/peers.sh %s, which prints its path", p.name, err, p.name)
		}
		p.program = program
		b.Printf("%-8s %s; %s\n", p.name, strings.Join(strings.Fields(harness.FirstLine(ctx, program, p.version)), " "), p.setup)
		all = append(all, p.system(c, o))
	}
	return all, nil
}

// system is how the peer is measured beside the nodes of a cluster.
func (p *peer) system(c *harness.Cluster, o options) *system {
	s := &system{name: p.name, keys: p.keys, samples: o.peerSamples, most: o.peerServices, limit: o.peerTime, rest: peerRest}
	for i := range c.Nodes {
		s.probes = append(s.probes, &harness.Client{Address: fmt.Sprintf("127.%d.0.%d:8080", p.net, i+1), KeepAlive: true})
	}
	s.prepare = func(ctx context.Context, _ int64) error {
		for i, n := range c.Nodes {
			dir := filepath.Join(p.Dir, fmt.Sprintf("%s%d", p.name, i+1))
			err := os.MkdirAll(dir, 0o755)
			if err == nil {
				err = p.start(p, ctx, dir, n, s.probes[i])
			}
			if err != nil {
				return fmt.Errorf("start %s beside %s: %w", p.name, n.Name, err)
			}
		}
		return nil
	}
	s.stop = p.stop
	return s
}

// process starts a program, which stop will stop.
func (p *peer) process(log, program string, args ...string) (*harness.Process, error) {
	process, err := harness.Start(log, program, args...)
	if err == nil {
		p.processes = append(p.processes, process)
	}
	return process, err
}

// stop ends all that was started, the last one first.
func (p *peer) stop() error {
	var errs []error
	for i := range p.processes {
		errs = append(errs, p.processes[len(p.processes)-1-i].Stop())
	}
	p.processes = nil
	return errors.Join(errs...)
}

// confdPrefix is before the keys that confd follows; else they are as ours.
const confdPrefix = "/confd"

//go:embed haproxy.cfg.tmpl
var confdTemplate string

// reload has HAProxy's master behind the socket $2 load its file, and ends when
// it has: of two reloads at a time the second could be lost. The socket is away
// during a reload, and answers after it. $1 is netcat.
const reload = `echo reload | "$1" -N -U "$2"
for i in $(seq 1000); do
	echo show proc | "$1" -N -U "$2" >/dev/null 2>&1 && exit
	sleep 0.01
done
exit 1
`

// startConfd starts HAProxy without services and, when that answers, confd.
func (p *peer) startConfd(ctx context.Context, dir string, node *harness.Node, probe *harness.Client) error {
	text := strings.NewReplacer("@dir@", dir, "@address@", probe.Address).Replace(confdTemplate)
	empty, _, _ := strings.Cut(text, "{{")
	cfg := filepath.Join(dir, "haproxy.cfg")
	if err := os.WriteFile(cfg, []byte(empty), 0o644); err != nil {
		return err
	}
	nc, err := exec.LookPath("nc.openbsd")
	if err != nil {
		return fmt.Errorf("%w: run scripts/install-deps.sh test", err)
	}
	socket := filepath.Join(dir, "master.sock")
	if _, err := p.process(filepath.Join(dir, "haproxy.log"), p.HAProxy, "-W", "-S", socket, "-f", cfg); err != nil {
		return err
	}
	wait, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	if _, err := probe.UntilGone(wait, "probe"); err != nil {
		return err
	}
	resource := fmt.Sprintf(`[template]
src = "haproxy.cfg.tmpl"
dest = %[1]q
mode = "0644"
prefix = %[2]q
keys = ["/services"]
check_cmd = "%[3]s -q -c -f {{.src}}"
reload_cmd = "sh %[4]s/reload.sh %[5]s %[6]s"
`, cfg, confdPrefix, p.HAProxy, dir, nc, socket)
	for name, content := range map[string]string{"conf.d/haproxy.toml": resource, "templates/haproxy.cfg.tmpl": text, "reload.sh": reload} {
		path := filepath.Join(dir, name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(content), 0o644)); err != nil {
			return err
		}
	}
	_, err = p.process(filepath.Join(dir, "confd.log"), p.program, "-confdir", dir, "-config-file", filepath.Join(dir, "none"),
		"-backend", "etcd", "-node", "http://"+node.Store(), "-watch")
	return err
}

func (p *peer) startTraefik(_ context.Context, dir string, node *harness.Node, probe *harness.Client) error {
	_, err := p.process(filepath.Join(dir, "traefik.log"), p.program, "--entrypoints.web.address="+probe.Address,
		"--providers.etcd.endpoints="+node.Store(), "--providers.providersthrottleduration=100ms",
		"--global.checknewversion=false", "--global.sendanonymoususage=false", "--log.level=ERROR")
	return err
}

// traefikKeys are those of Traefik's provider.
type traefikKeys struct{}

const traefikRouters, traefikServices = "traefik/http/routers/", "traefik/http/services/"

func (traefikKeys) service(name string, endpoints ...string) []clientv3.Op {
	ops := []clientv3.Op{
		clientv3.OpPut(traefikRouters+name+"/rule", "Host(`"+name+"`)"),
		clientv3.OpPut(traefikRouters+name+"/service", name),
	}
	for i, e := range endpoints {
		ops = append(ops, clientv3.OpPut(fmt.Sprintf("%s%s/loadbalancer/servers/%d/url", traefikServices, name, i), "http://"+e))
	}
	return ops
}

// move writes the only endpoint anew: Traefik's endpoints have numbers, not names.
func (k traefikKeys) move(name string, _ int, address string) []clientv3.Op {
	return k.service(name, address)
}

func (traefikKeys) remove(name string) []clientv3.Op {
	return []clientv3.Op{
		clientv3.OpDelete(traefikRouters+name+"/", clientv3.WithPrefix()),
		clientv3.OpDelete(traefikServices+name+"/", clientv3.WithPrefix()),
	}
}
