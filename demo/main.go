// Package main is `make demo`: a cluster of three nodes on this machine, services,
// a steady load, and what happens to it when parts are killed. As root, with
// systemd-nspawn, the nodes are machines of their own that run units; otherwise
// they are processes on loopback addresses.
//
// It knows what a user knows: the command line, the keys, the API and the usual
// tools. It must not know how a node does what it does.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"
)

func main() {
	if len(os.Args) > 1 && os.Args[1] == backendVerb {
		fmt.Fprintln(os.Stderr, "demo: backend:", backend(os.Args[2:]))
		os.Exit(1)
	}
	binary := flag.String("flotilla", "bin/flotilla", "the flotilla binary; flotillad is beside it")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	if err := run(ctx, *binary, os.Getenv("DEMO_CLUSTER"), os.Getenv("DEMO") == "once"); err != nil {
		fmt.Fprintln(os.Stderr, "demo:", err)
		os.Exit(1)
	}
}

// errLost is the end of a story in which requests got lost.
var errLost = errors.New("requests were lost")

// run tells the story of a kind, or of the best that this machine can tell if
// none is given. It then waits for ctx to end unless once is set, and leaves
// nothing behind either way.
func run(ctx context.Context, binary, kind string, once bool) error {
	if _, err := os.Stat(binary); err != nil {
		return fmt.Errorf("%w: run make build first", err)
	}
	// Tools such as haproxy and nft are where some users do not look.
	if err := os.Setenv("PATH", os.Getenv("PATH")+":/usr/local/sbin:/usr/sbin:/sbin"); err != nil {
		return err
	}
	t := newTeller(os.Stdout)
	switch kind {
	case "nspawn":
		return runMachines(ctx, t, binary, once)
	case "loopback":
		return runProcesses(ctx, t, binary, once)
	case "":
	default:
		return fmt.Errorf("DEMO_CLUSTER=%s is neither nspawn nor loopback", kind)
	}
	if why := cannot(ctx, binary); why != "" {
		t.say("No machines of their own for the nodes, and so no units: %s.", why)
		return runProcesses(ctx, t, binary, once)
	}
	err := runMachines(ctx, t, binary, once)
	if errors.Is(err, errNoMachines) && ctx.Err() == nil {
		t.say("%s", err)
		t.say("The same story without machines of their own, and so without units:")
		return runProcesses(ctx, t, binary, once)
	}
	return err
}

// runProcesses tells the story on loopback addresses.
func runProcesses(ctx context.Context, t *teller, binary string, once bool) (err error) {
	place, err := claim(t)
	if err != nil {
		return err
	}
	defer func() {
		t.say("")
		t.say("Stopping everything and removing %s.", place.dir)
		err = errors.Join(err, cleanUp(place), place.lock.Close())
	}()
	s := &story{scene: scene{teller: t, binary: binary}, place: place}
	if err := s.tell(ctx); err != nil && ctx.Err() == nil {
		return fmt.Errorf("%w\nthe logs end:\n%s", err, logTails(place.dir))
	}
	return s.end(ctx, once, s.tryNext)
}

// place is where one demo runs: addresses and a directory that no other has.
type place struct {
	dir   string
	addrs [4]string // three nodes, and the sample backends
	lock  net.Listener
}

// places is how many demos may run at the same time.
const places = 4

// claim takes the first free place, after removing what a demo that was killed
// left there. The lock is an abstract socket: it ends with its process.
func claim(t *teller) (*place, error) {
	for n := range places {
		p := &place{dir: filepath.Join(os.TempDir(), fmt.Sprintf("flotilla-demo-%d-%d", os.Getuid(), n+1))}
		for i := range p.addrs {
			p.addrs[i] = fmt.Sprintf("127.0.0.%d", 10*(n+1)+i+1)
		}
		var err error
		if p.lock, err = net.Listen("unix", "@flotilla-demo-"+p.addrs[0]); errors.Is(err, syscall.EADDRINUSE) {
			continue
		} else if err != nil {
			return nil, fmt.Errorf("lock a place for the demo: %w", err)
		}
		if _, err := os.Lstat(p.dir); err == nil {
			t.say("Removing what an earlier demo left in %s.", p.dir)
			if err := cleanUp(p); err != nil {
				return nil, errors.Join(err, p.lock.Close())
			}
		}
		// Mkdir and not MkdirAll: a directory that somebody else made is refused.
		if err := os.Mkdir(p.dir, 0o755); err != nil {
			return nil, errors.Join(err, p.lock.Close())
		}
		return p, nil
	}
	return nil, fmt.Errorf("%d demos run already: stop one of them with Ctrl-C", places)
}

// until waits for cond, which is asked often, and fails with its last error.
func until(ctx context.Context, limit time.Duration, what string, cond func() error) error {
	began := time.Now()
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for {
		err := cond()
		if err == nil {
			return nil
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return fmt.Errorf("waited %s for %s: %w", took(time.Since(began)), what, err)
		}
	}
}
