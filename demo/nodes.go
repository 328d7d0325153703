package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"flotilla/internal/client"
)

// ports are the same on every node.
type ports struct {
	http, https, dns, balancer, redirect, client, peer int

	echo int // host_port of the sample TCP service
}

// choosePorts takes each usual port if it can be had on all the addresses, or
// else the next that can, and says why it had to.
func choosePorts(addrs []string) (p ports, why []string, err error) {
	for _, w := range []struct {
		port      *int
		want, run int // run: how many ports in a row
	}{
		{&p.http, 80, 1}, {&p.https, 443, 1}, {&p.dns, 53, 1}, {&p.balancer, 9180, 1}, {&p.redirect, 9181, 2},
		{&p.client, 2379, 1}, {&p.peer, 2380, 1}, {&p.echo, 7007, 1},
	} {
		*w.port = w.want
		for refused := bindable(addrs, *w.port, w.run); refused != nil; refused = bindable(addrs, *w.port, w.run) {
			switch {
			case *w.port != w.want:
			case errors.Is(refused, fs.ErrPermission):
				why = append(why, fmt.Sprintf("port %d needs root", w.want))
			case errors.Is(refused, syscall.EADDRINUSE):
				why = append(why, fmt.Sprintf("port %d is taken by another program", w.want))
			default:
				return p, nil, refused
			}
			if *w.port += 1000; *w.port < 8000 && w.want < 1024 {
				*w.port = w.want + 8000
			}
			if *w.port > 60000 {
				return p, nil, fmt.Errorf("no port can be had in place of %d: %w", w.want, refused)
			}
		}
	}
	return p, why, nil
}

// bindable reports what keeps ports from being listened on, TCP and UDP.
func bindable(addrs []string, first, count int) error {
	for _, a := range addrs {
		for port := first; port < first+count; port++ {
			addr := net.JoinHostPort(a, strconv.Itoa(port))
			l, err := net.Listen("tcp", addr)
			if err != nil {
				return err
			}
			u, err := net.ListenPacket("udp", addr)
			if err != nil {
				return errors.Join(err, l.Close())
			}
			if err := errors.Join(l.Close(), u.Close()); err != nil {
				return err
			}
		}
	}
	return nil
}

// flags returns the flags that these ports need.
func (p ports) flags() []string {
	var flags []string
	for _, f := range []struct {
		name        string
		port, usual int
	}{
		{"http-port", p.http, 80}, {"https-port", p.https, 443}, {"dns-port", p.dns, 53}, {"balancer-port", p.balancer, 9180},
		{"redirect-port", p.redirect, 9181}, {"store-client-port", p.client, 2379}, {"store-peer-port", p.peer, 2380},
	} {
		if f.port != f.usual {
			flags = append(flags, fmt.Sprintf("--%s=%d", f.name, f.port))
		}
	}
	return flags
}

// node is one of the three.
type node struct {
	name, addr, dir string // dir: of the whole demo
	ports           ports
	argv            []string
	process         *process // nil where systemd runs it
	balance         balance
}

func newNode(binary string, n int, p *place, ports ports) *node {
	name := fmt.Sprintf("n%d", n+1)
	v := &node{name: name, addr: p.addrs[n], dir: p.dir, ports: ports}
	v.argv = append([]string{filepath.Join(filepath.Dir(binary), "flotillad"), "node", "--name=" + name, "--address=" + v.addr, "--data=" + filepath.Join(p.dir, name), "--socket=" + v.socket()}, ports.flags()...)
	if n > 0 {
		v.argv = append(v.argv, "--join="+p.addrs[0])
	}
	return v
}

func (n *node) socket() string { return filepath.Join(n.dir, n.name+".sock") }
func (n *node) log() string    { return filepath.Join(n.dir, n.name+".log") }

// at returns an address of the node.
func (n *node) at(port int) string { return net.JoinHostPort(n.addr, strconv.Itoa(port)) }

// url returns a URL of the node, without the port where that is usual.
func (n *node) url(path string) string {
	if n.ports.http == 80 {
		return "http://" + n.addr + path
	}
	return "http://" + n.at(n.ports.http) + path
}

func (n *node) start() (err error) {
	n.process, err = start(n.dir, n.name, n.argv...)
	return err
}

// ready waits until the node takes requests, unless it ends before.
func (n *node) ready(ctx context.Context) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	go func() {
		select {
		case <-n.process.ended:
			cancel(nil)
		case <-ctx.Done():
		}
	}()
	return until(ctx, 30*time.Second, n.name+" to serve", func() error { return n.check(ctx, "/readyz") })
}

// router and everything return what to kill: process groups.
func (n *node) router() []int { return livePids(n.dir, n.name+"/router/haproxy.pid") }

func (n *node) everything() []int {
	return append(livePids(n.dir, n.name+".pid"), livePids(n.dir, n.name+"/router/haproxy.pid", n.name+"/store.pid")...)
}

// killLine returns the command that kills the groups of these processes.
func killLine(pids []int) string {
	var b strings.Builder
	for _, pid := range pids {
		fmt.Fprintf(&b, " -%d", pid)
	}
	return "kill -9 --" + b.String()
}

// cluster waits until so many nodes serve and so many live members of the store
// vote, with a leader among them. It asks this node.
func (n *node) cluster(ctx context.Context, serve, vote int) error {
	what := fmt.Sprintf("%d nodes to serve and %d members of the store to vote", serve, vote)
	return until(ctx, 60*time.Second, what, func() error {
		list, err := client.Dial(n.socket()).Nodes(ctx)
		if err != nil {
			return err
		}
		serving, voting, leading := 0, 0, 0
		for _, v := range list.Nodes {
			if v.Serving {
				serving++
			}
		}
		for _, m := range list.Store.Members {
			if m.Reachable && !m.Learner {
				voting++
			}
			if m.Reachable && m.Leader {
				leading++
			}
		}
		if serving < serve || voting < vote || leading != 1 {
			return fmt.Errorf("%d serve, %d vote, %d lead", serving, voting, leading)
		}
		return nil
	})
}
