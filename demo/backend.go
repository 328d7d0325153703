package main

import (
	"bufio"
	"errors"
	"fmt"
	"net"
	"net/http"
	"time"
)

// backendVerb as first argument makes this program a sample backend, a process
// of its own so that it can be killed.
const backendVerb = "backend"

// backendArgs returns the command line of a backend; dir marks it as the demo's.
func backendArgs(self, scheme, name, addr, dir string) []string {
	return []string{self, backendVerb, scheme, name, addr, dir + "/"}
}

// backend serves until it is killed: http says its name and what it was asked,
// tcp says its name and sends each line back.
func backend(args []string) error {
	if len(args) != 4 {
		return errors.New("needs scheme, name, address and directory")
	}
	scheme, name, addr := args[0], args[1], args[2]
	l, err := net.Listen("tcp", addr)
	if err != nil {
		return err
	}
	if scheme == "http" {
		return http.Serve(l, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			time.Sleep(5 * time.Millisecond) // some work, so that a kill finds requests under way
			_, _ = fmt.Fprintf(w, "%s answers %s %s for %s\n", name, r.Method, r.URL.Path, r.Host)
		}))
	}
	for {
		c, err := l.Accept()
		if err != nil {
			return err
		}
		go echo(c, name)
	}
}

func echo(c net.Conn, name string) {
	defer func() { _ = c.Close() }()
	for lines := bufio.NewScanner(c); lines.Scan(); {
		if _, err := fmt.Fprintf(c, "%s echoes %s\n", name, lines.Text()); err != nil {
			return
		}
	}
}
