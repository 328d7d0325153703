// Package sshdtest runs OpenSSH's own server for tests, on a loopback address,
// with keys and configuration of its own and for the user of the test.
package sshdtest

import (
	"crypto/ed25519"
	"crypto/rand"
	"encoding/pem"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"
)

// Key makes a key pair and returns the file of the private key, whose public key
// lies beside it as ssh-keygen leaves it.
func Key(t testing.TB) string {
	t.Helper()
	return newKey(t, filepath.Join(t.TempDir(), "id_ed25519"))
}

func newKey(t testing.TB, file string) string {
	t.Helper()
	public, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	block, err := ssh.MarshalPrivateKey(private, "test")
	if err != nil {
		t.Fatal(err)
	}
	p, err := ssh.NewPublicKey(public)
	if err != nil {
		t.Fatal(err)
	}
	write(t, file, string(pem.EncodeToMemory(block)))
	write(t, file+".pub", string(ssh.MarshalAuthorizedKey(p)))
	return file
}

func write(t testing.TB, file, text string) {
	t.Helper()
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

// Server is one sshd.
type Server struct {
	Host string // loopback address
	Port int
	User string // who may log in

	t    testing.TB
	dir  string
	stop func()
}

// Start runs an sshd on host, such as 127.0.0.1, that lets the owner of the key
// file in. lines are added to its configuration. It ends with the test.
func Start(t testing.TB, host, key string, lines ...string) *Server {
	t.Helper()
	return StartAt(t, host, 0, key, lines...)
}

// StartAt is Start on a certain port; 0: one that is free.
func StartAt(t testing.TB, host string, port int, key string, lines ...string) *Server {
	t.Helper()
	u, err := user.Current()
	if err != nil {
		t.Fatal(err)
	}
	s := &Server{Host: host, User: u.Username, t: t, dir: t.TempDir()}
	public, err := os.ReadFile(key + ".pub")
	if err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join(s.dir, "authorized_keys"), string(public))
	newKey(t, filepath.Join(s.dir, "host"))
	if os.Geteuid() == 0 { // sshd wants it, and only an init system makes it
		if err := os.MkdirAll("/run/sshd", 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for range 5 { // another process may take the port meanwhile
		if s.Port = port; port == 0 {
			s.Port = freePort(t, host)
		}
		if s.run(lines) {
			t.Cleanup(func() { s.stop() })
			return s
		}
	}
	t.Fatalf("sshd does not start:\n%s", s.Log())
	return nil
}

func freePort(t testing.TB, host string) int {
	t.Helper()
	l, err := net.Listen("tcp", net.JoinHostPort(host, "0"))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }() // it was not used
	return l.Addr().(*net.TCPAddr).Port
}

// Address returns host:port.
func (s *Server) Address() string { return net.JoinHostPort(s.Host, strconv.Itoa(s.Port)) }

// KnownHosts returns the server's line of a known_hosts file.
func (s *Server) KnownHosts() string {
	s.t.Helper()
	public, err := os.ReadFile(filepath.Join(s.dir, "host.pub"))
	if err != nil {
		s.t.Fatal(err)
	}
	return fmt.Sprintf("[%s]:%d %s", s.Host, s.Port, public)
}

// Log returns the server's log.
func (s *Server) Log() string {
	raw, err := os.ReadFile(filepath.Join(s.dir, "log"))
	if err != nil {
		return err.Error()
	}
	return string(raw)
}

// Stop ends the server and its connections.
func (s *Server) Stop() { s.stop() }

// Replace ends the server and starts another one on its address: a machine that
// was installed anew.
func (s *Server) Replace(lines ...string) {
	s.t.Helper()
	s.stop()
	newKey(s.t, filepath.Join(s.dir, "host"))
	if !s.run(lines) {
		s.t.Fatalf("sshd does not start again:\n%s", s.Log())
	}
}

// run starts sshd and reports whether it answers.
func (s *Server) run(lines []string) bool {
	s.t.Helper()
	config := append([]string{
		"ListenAddress " + s.Address(),
		"HostKey " + filepath.Join(s.dir, "host"),
		"AuthorizedKeysFile " + filepath.Join(s.dir, "authorized_keys"),
		"PidFile none", "UsePAM no", "StrictModes no", "PermitRootLogin prohibit-password",
		"PasswordAuthentication no", "KbdInteractiveAuthentication no", "PrintMotd no", "LogLevel VERBOSE",
		// The user's own start-up files would make commands slow, or print.
		"SetEnv PATH=" + os.Getenv("PATH") + " HOME=" + s.dir,
	}, lines...)
	write(s.t, filepath.Join(s.dir, "config"), strings.Join(config, "\n")+"\n")
	path, err := exec.LookPath("sshd")
	if err != nil {
		path = "/usr/sbin/sshd" // where users' PATH does not lead
	}
	cmd := exec.Command(path, "-D", "-f", filepath.Join(s.dir, "config"), "-E", filepath.Join(s.dir, "log"))
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL} // it does not outlive a test that times out
	if err := cmd.Start(); err != nil {
		s.t.Fatalf("run sshd (apt-get install openssh-server): %v", err)
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_ = cmd.Wait() // a test ends it by a signal
	}()
	stopped := false
	s.stop = func() {
		if stopped {
			return
		}
		stopped = true
		children := childrenOf(cmd.Process.Pid)
		_ = cmd.Process.Kill() // it may have ended
		<-ended
		for _, c := range children {
			_ = c.Kill() // as above
		}
	}
	for deadline := time.Now().Add(30 * time.Second); time.Now().Before(deadline); {
		if c, err := net.DialTimeout("tcp", s.Address(), time.Second); err == nil {
			banner := make([]byte, 4)
			n, _ := c.Read(banner)
			_ = c.Close() // it was only a question
			if string(banner[:n]) == "SSH-" {
				return true
			}
		}
		select {
		case <-ended:
			return false
		case <-time.After(20 * time.Millisecond):
		}
	}
	s.stop()
	return false
}

// childrenOf returns the processes below pid: sshd leaves its connections behind.
func childrenOf(pid int) []*os.Process {
	var found []*os.Process
	tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid))
	if err != nil {
		return nil
	}
	for _, file := range tasks {
		raw, err := os.ReadFile(file)
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		for _, field := range strings.Fields(string(raw)) {
			if n, err := strconv.Atoi(field); err == nil {
				if p, err := os.FindProcess(n); err == nil {
					found = append(append(found, childrenOf(n)...), p)
				}
			}
		}
	}
	return found
}
