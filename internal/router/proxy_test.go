package router

import (
	"bufio"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

// tap stands between the router and HAProxy's admin socket. It notes every
// command and can cut the connection at one of those that change something.
type tap struct {
	t      *testing.T
	socket string // HAProxy's

	mu       sync.Mutex // guards the rest
	commands []string
	cutAt    int  // how many changes from now; negative: never
	effect   bool // whether HAProxy gets the command at which the cut is
}

// newTap returns a tap and what makes a router use it.
func newTap(t *testing.T, cfg Config) (*tap, func(*Router)) {
	t.Helper()
	p := &tap{t: t, socket: filepath.Join(cfg.Dir, "admin.sock"), cutAt: -1}
	path := filepath.Join(cfg.Dir, "tap.sock")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			go p.relay(conn.(*net.UnixConn))
		}
	}()
	return p, func(r *Router) { r.client.Socket = path }
}

// arm cuts the connection at the n-th change from now, before or after it had its
// effect.
func (p *tap) arm(n int, effect bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.cutAt, p.effect = n, effect
}

// armed reports whether the cut is still to come.
func (p *tap) armed() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.cutAt >= 0
}

func (p *tap) seen() []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.commands
}

func (p *tap) note(command string) (cut, effect bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.commands = append(p.commands, command)
	verb, _, _ := strings.Cut(command, " ")
	switch verb {
	case "add", "del", "set", "publish", "unpublish":
	default:
		return false, false
	}
	if p.cutAt < 0 || strings.Contains(command, "severity-output") {
		return false, false
	}
	p.cutAt--
	return p.cutAt < 0, p.effect
}

func (p *tap) relay(client *net.UnixConn) {
	defer func() { _ = client.Close() }()
	conn, err := net.Dial("unix", p.socket)
	if err != nil {
		if !errors.Is(err, os.ErrNotExist) {
			p.t.Logf("tap: %v", err)
		}
		return
	}
	server := conn.(*net.UnixConn)
	defer func() { _ = server.Close() }()
	var back sync.WaitGroup
	back.Go(func() {
		_, _ = io.Copy(client, server) // ends with either side
		_ = client.Close()
	})
	in := bufio.NewReader(client)
	for {
		line, err := in.ReadString('\n')
		cut, effect := false, false
		if line != "" {
			cut, effect = p.note(strings.TrimSpace(line))
		}
		if cut { // before HAProxy could answer
			_ = client.Close()
		}
		if !cut || effect {
			_, _ = io.WriteString(server, line)
		}
		if cut {
			// HAProxy carries out what it has read, then closes.
			_ = server.SetReadDeadline(time.Now().Add(2 * time.Second))
			_ = server.CloseWrite()
			_, _ = io.Copy(io.Discard, server)
			break
		}
		if err != nil {
			_ = server.CloseWrite()
			break
		}
	}
	back.Wait()
}
