package main

import (
	"context"
	"embed"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"flotilla/bench/harness"
)

// peer is another router, one on each node, which follows the node's own member
// of the store. It runs only while it is measured.
type peer struct {
	*harness.Bench
	name, program string
	net           int // it listens on 127.<net>.0.<node>
	start         func(p *peer, ctx context.Context, dir string, node *harness.Node, probe *harness.Client) error
	processes     []*harness.Process
}

// peerRest is what a peer gets after each change before the next: longer than
// confd waits for its commands to end, and than Traefik's throttle.
const peerRest = 250 * time.Millisecond

// peers returns the systems whose programs are given.
func peers(ctx context.Context, b *harness.Bench, c *harness.Cluster, o options) ([]*system, error) {
	var all []*system
	add := func(p *peer, keys keys, version, setup string) error {
		if p.program == "" {
			return nil
		}
		program, err := harness.Program(p.program, "test/peers.sh "+p.name+", which prints its path")
		if err != nil {
			return err
		}
		p.Bench, p.program = b, program
		b.Printf("%-8s %s; %s\n", p.name, strings.Join(strings.Fields(harness.FirstLine(ctx, program, version)), " "), setup)
		s := &system{name: p.name, keys: keys, samples: o.peerSamples, most: o.peerServices, rest: peerRest, stop: p.stop}
		for i := range c.Nodes {
			s.probes = append(s.probes, &harness.Client{Address: fmt.Sprintf("127.%d.0.%d:8080", p.net, i+1), KeepAlive: true})
		}
		s.prepare = func(ctx context.Context, _ int64) error {
			for i, n := range c.Nodes {
				dir := filepath.Join(b.Dir, fmt.Sprintf("%s%d", p.name, i+1))
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
		all = append(all, s)
		return nil
	}
	err := add(&peer{name: "confd", program: o.confd, net: confdNet, start: (*peer).startConfd}, catalogKeys(confdPrefix), "-version",
		"for each change it writes the file, checks it by haproxy -c and has HAProxy reload it, seamlessly")
	if err == nil {
		err = add(&peer{name: "traefik", program: o.traefik, net: traefikNet, start: (*peer).startTraefik}, traefikKeys(), "version",
			"a throttle of 0.1 s instead of 2, over before each sample")
	}
	return all, err
}

// process starts a program, which stop will stop.
func (p *peer) process(log, program string, args ...string) error {
	process, err := harness.Start(log, program, args...)
	if err == nil {
		p.processes = append(p.processes, process)
	}
	return err
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

//go:embed haproxy.cfg.tmpl confd.toml reload.sh
var confdFiles embed.FS

// startConfd starts HAProxy without services and, when that answers, confd.
func (p *peer) startConfd(ctx context.Context, dir string, node *harness.Node, probe *harness.Client) error {
	nc, err := harness.Program("nc.openbsd", "scripts/install-deps.sh test")
	if err != nil {
		return err
	}
	fill := strings.NewReplacer("@dir@", dir, "@address@", probe.Address, "@haproxy@", p.HAProxy, "@nc@", nc, "@prefix@", confdPrefix)
	cfg := filepath.Join(dir, "haproxy.cfg")
	for from, to := range map[string]string{"haproxy.cfg.tmpl": "templates/haproxy.cfg.tmpl", "confd.toml": "conf.d/haproxy.toml", "reload.sh": "reload.sh"} {
		raw, err := confdFiles.ReadFile(from)
		if err != nil {
			return err
		}
		path, text := filepath.Join(dir, to), fill.Replace(string(raw))
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(text), 0o644)); err != nil {
			return err
		}
		if from == "haproxy.cfg.tmpl" { // HAProxy begins with what is before the first service
			empty, _, _ := strings.Cut(text, "{{")
			if err := os.WriteFile(cfg, []byte(empty), 0o644); err != nil {
				return err
			}
		}
	}
	if err := p.process(filepath.Join(dir, "haproxy.log"), p.HAProxy, "-W", "-S", filepath.Join(dir, "master.sock"), "-f", cfg); err != nil {
		return err
	}
	wait, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	if _, err := probe.UntilGone(wait, "probe"); err != nil {
		return err
	}
	return p.process(filepath.Join(dir, "confd.log"), p.program, "-confdir", dir, "-config-file", filepath.Join(dir, "none"),
		"-backend", "etcd", "-node", "http://"+node.Store(), "-watch")
}

func (p *peer) startTraefik(_ context.Context, dir string, node *harness.Node, probe *harness.Client) error {
	return p.process(filepath.Join(dir, "traefik.log"), p.program, "--entrypoints.web.address="+probe.Address,
		"--providers.etcd.endpoints="+node.Store(), "--providers.providersthrottleduration=100ms",
		"--global.checknewversion=false", "--global.sendanonymoususage=false", "--log.level=ERROR")
}

const traefikRouters, traefikServices = "traefik/http/routers/", "traefik/http/services/"

// traefikKeys are those of Traefik's provider. Its endpoints have numbers, not
// names, so a move writes the only endpoint anew.
func traefikKeys() keys {
	service := func(name string, endpoints ...string) []clientv3.Op {
		ops := []clientv3.Op{
			clientv3.OpPut(traefikRouters+name+"/rule", "Host(`"+name+"`)"),
			clientv3.OpPut(traefikRouters+name+"/service", name),
		}
		for i, e := range endpoints {
			ops = append(ops, clientv3.OpPut(fmt.Sprintf("%s%s/loadbalancer/servers/%d/url", traefikServices, name, i), "http://"+e))
		}
		return ops
	}
	return keys{
		service: service,
		move:    func(name string, _ int, address string) []clientv3.Op { return service(name, address) },
		remove: func(name string) []clientv3.Op {
			return []clientv3.Op{
				clientv3.OpDelete(traefikRouters+name+"/", clientv3.WithPrefix()),
				clientv3.OpDelete(traefikServices+name+"/", clientv3.WithPrefix()),
			}
		},
	}
}
