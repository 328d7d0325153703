// Package main is `make demo`: a cluster of three nodes on this machine, services,
// a steady load, and what happens to it when parts are killed. As root, with
// systemd-nspawn, the nodes are machines of their own that run units; otherwise
// they are processes on loopback addresses. The story is the same.
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
	"os/exec"
	"os/signal"
	"strings"
	"syscall"
)

func main() {
	s := &story{teller: newTeller(os.Stdout)}
	flag.StringVar(&s.binary, "flotilla", "bin/flotilla", "the flotilla binary; flotillad is beside it")
	flag.StringVar(&s.backend, "backend", "bin/backend", "the binary of examples/backend")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	if err := run(ctx, s, os.Getenv("DEMO_CLUSTER"), os.Getenv("DEMO") == "once"); err != nil {
		fmt.Fprintln(os.Stderr, "demo:", err)
		os.Exit(1)
	}
}

var (
	// errLost is the end of a story in which requests got lost.
	errLost = errors.New("requests were lost")
	// errNoMachines says that they could not be made.
	errNoMachines = errors.New("this machine cannot run the nodes as machines of their own")
)

// run tells the story in a world, or in the best that this machine has if none is
// given. It then waits for ctx to end unless once is set, and leaves nothing behind
// either way.
func run(ctx context.Context, s *story, world string, once bool) error {
	for _, binary := range []string{s.binary, s.backend} {
		if _, err := os.Stat(binary); err != nil {
			return fmt.Errorf("%w: make demo builds it", err)
		}
	}
	// Tools such as haproxy and nft are where some users do not look.
	if err := os.Setenv("PATH", os.Getenv("PATH")+":/usr/local/sbin:/usr/sbin:/sbin"); err != nil {
		return err
	}
	// Settings of the user's are for other nodes, and other stores.
	for _, kv := range os.Environ() {
		if key, _, _ := strings.Cut(kv, "="); strings.HasPrefix(key, "FLOTILLA_") || strings.HasPrefix(key, "ETCDCTL_") {
			if err := os.Unsetenv(key); err != nil {
				return err
			}
		}
	}
	switch world {
	case "nspawn", "loopback":
		return s.in(ctx, world, once)
	case "":
	default:
		return fmt.Errorf("DEMO_CLUSTER=%s is neither nspawn nor loopback", world)
	}
	if why := cannot(ctx, s.binary); why != "" {
		s.say("No machines of their own for the nodes, and so no units: %s.", why)
		return s.in(ctx, "loopback", once)
	}
	err := s.in(ctx, "nspawn", once)
	if errors.Is(err, errNoMachines) && ctx.Err() == nil {
		s.say("%s", err)
		s.say("The same story without machines of their own, and so without units:")
		return s.in(ctx, "loopback", once)
	}
	return err
}

// cannot returns why no machines can be made here; empty if they can.
func cannot(ctx context.Context, binary string) string {
	out, err := exec.CommandContext(ctx, binary, "cluster", "list").CombinedOutput()
	if err == nil {
		return ""
	}
	first, _, _ := strings.Cut(strings.TrimSpace(string(out)), "\n")
	if first == "" {
		first = err.Error()
	}
	return strings.TrimPrefix(first, "flotilla: error: ")
}

// places is how many demos may run at the same time.
const places = 4

// claim takes the first place, a number from 1, that no other demo has. The lock is
// an abstract socket: it ends with its process.
func claim() (place int, lock net.Listener, err error) {
	for place := 1; place <= places; place++ {
		lock, err := net.Listen("unix", fmt.Sprintf("@flotilla-demo-%d", place))
		if !errors.Is(err, syscall.EADDRINUSE) {
			return place, lock, err
		}
	}
	return 0, nil, fmt.Errorf("%d demos run already: stop one of them with Ctrl-C", places)
}
