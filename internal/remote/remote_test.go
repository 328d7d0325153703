package remote

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"flotilla/internal/remote/sshdtest"
	"flotilla/internal/text"
)

func target(s *sshdtest.Server) Target { return Target{User: s.User, Host: s.Host, Port: s.Port} }

// options know the servers and have the key.
func options(t *testing.T, key string, known ...*sshdtest.Server) Options {
	t.Helper()
	file := filepath.Join(t.TempDir(), "known_hosts")
	var lines strings.Builder
	for _, s := range known {
		lines.WriteString(s.KnownHosts())
	}
	if err := os.WriteFile(file, []byte(lines.String()), 0o600); err != nil {
		t.Fatal(err)
	}
	return Options{Identities: []string{key}, HostKeys: HostKeys{Files: []string{file}}, Timeout: time.Minute}
}

func dial(t *testing.T, s *sshdtest.Server, o Options) *Client {
	t.Helper()
	c, err := Dial(t.Context(), target(s), o)
	if err != nil {
		t.Fatalf("%v\nsshd says:\n%s", err, s.Log())
	}
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	})
	return c
}

func output(t *testing.T, c *Client, cmd Command) (stdout, stderr string, exit int) {
	t.Helper()
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	exit, err := c.Run(t.Context(), cmd)
	if err != nil {
		t.Fatal(err)
	}
	return out.String(), errs.String(), exit
}

func TestParseTarget(t *testing.T) {
	for _, tc := range []struct {
		in   string
		want Target
	}{
		{"10.0.0.1", Target{"", "10.0.0.1", 22}},
		{"core@10.0.0.1:2222", Target{"core", "10.0.0.1", 2222}},
		{"a@b@host", Target{"a@b", "host", 22}},
		{"fe80::1", Target{"", "fe80::1", 22}},
		{"[fe80::1]:23", Target{"", "fe80::1", 23}},
		{"root@[::1]", Target{"root", "::1", 22}},
	} {
		if got, err := ParseTarget(tc.in, 22); err != nil || got != tc.want {
			t.Errorf("%q: %+v, %v, want %+v", tc.in, got, err, tc.want)
		}
	}
	for _, in := range []string{"", "@host", "core@", "host:0", "host:99999", "a b", "a/b", ":22", "a,b"} {
		if got, err := ParseTarget(in, 22); err == nil {
			t.Errorf("%q is taken as %+v", in, got)
		}
	}
}

func TestCommand(t *testing.T) {
	key := sshdtest.Key(t)
	s := sshdtest.Start(t, "127.0.0.1", key)
	c := dial(t, s, options(t, key, s))

	out, errs, exit := output(t, c, Command{Line: "cat; echo problem >&2; exit 7", Stdin: strings.NewReader("text\n")})
	if out != "text\n" || errs != "problem\n" || exit != 7 {
		t.Errorf("output %q, errors %q, exit code %d", out, errs, exit)
	}
	if _, _, exit := output(t, c, Command{Line: "kill -9 $$"}); exit != 137 {
		t.Errorf("exit code %d of a command that was killed, want 137", exit)
	}
	if out, _, _ := output(t, c, Command{Line: "echo " + text.ShellQuote(`it's "$HOME" \`)}); out != "it's \"$HOME\" \\\n" {
		t.Errorf("quoted text arrives as %q", out)
	}
	out, _, _ = output(t, c, Command{Line: "stty size; echo $TERM; test -t 0 && echo terminal", PTY: &PTY{Term: "vt100", Size: Size{91, 33}}})
	if want := "33 91\r\nvt100\r\nterminal\r\n"; out != want {
		t.Errorf("on a terminal: %q, want %q", out, want)
	}
}

func TestResize(t *testing.T) {
	key := sshdtest.Key(t)
	s := sshdtest.Start(t, "127.0.0.1", key)
	c := dial(t, s, options(t, key, s))
	sizes := make(chan Size, 1)
	sizes <- Size{120, 40}
	stdin, open := io.Pipe() // sshd closes the terminal with its input
	defer func() { _ = open.Close() }()
	out, _, _ := output(t, c, Command{
		Line:  `until [ "$(stty size)" = "40 120" ]; do :; done; echo resized`,
		Stdin: stdin,
		PTY:   &PTY{Term: "vt100", Size: Size{80, 24}, Resized: sizes},
	})
	if !strings.Contains(out, "resized") {
		t.Errorf("output %q", out)
	}
}

func TestCommandEnds(t *testing.T) {
	key := sshdtest.Key(t)
	s := sshdtest.Start(t, "127.0.0.1", key)
	c := dial(t, s, options(t, key, s))
	ctx, cancel := context.WithCancel(t.Context())
	started := writerFunc(func(b []byte) (int, error) { cancel(); return len(b), nil })
	if _, err := c.Run(ctx, Command{Line: "echo started; sleep 1000", Stdout: started}); !errors.Is(err, context.Canceled) {
		t.Errorf("error %v, want that of the context", err)
	}
	stop := writerFunc(func(b []byte) (int, error) { s.Stop(); return len(b), nil })
	_, err := c.Run(t.Context(), Command{Line: "echo started; sleep 1000", Stdout: stop})
	if err == nil || !strings.Contains(err.Error(), "connection was lost") {
		t.Errorf("error %v of a connection that was cut", err)
	}
	_ = c.ssh.Wait()
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(b []byte) (int, error) { return f(b) }

// A far side that is there but says nothing any more is given up.
func TestKeepAlive(t *testing.T) {
	key := sshdtest.Key(t)
	s := sshdtest.Start(t, "127.0.0.1", key)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	frozen := make(chan struct{})
	go relay(l, s.Address(), frozen)

	o := options(t, key)
	o.HostKeys.Insecure = true
	o.Alive = 1500 * time.Millisecond
	to := target(s)
	to.Port = l.Addr().(*net.TCPAddr).Port
	c, err := Dial(t.Context(), to, o)
	if err != nil {
		t.Fatal(err)
	}
	output(t, c, Command{Line: "true"})
	close(frozen)
	_ = c.ssh.Wait()
	if err := c.Close(); err != nil {
		t.Error(err)
	}
}

// relay passes one connection on until frozen is closed; then it stays open and
// silent until the client goes.
func relay(l net.Listener, to string, frozen <-chan struct{}) {
	in, err := l.Accept()
	if err != nil {
		return
	}
	defer func() { _ = in.Close() }()
	out, err := net.Dial("tcp", to)
	if err != nil {
		return
	}
	defer func() { _ = out.Close() }()
	go func() {
		buf := make([]byte, 1<<15)
		for {
			n, err := out.Read(buf)
			if err != nil {
				return
			}
			select {
			case <-frozen:
			default:
				_, _ = in.Write(buf[:n])
			}
		}
	}()
	_, _ = io.Copy(out, in)
}

func TestUnknownHost(t *testing.T) {
	key := sshdtest.Key(t)
	s := sshdtest.Start(t, "127.0.0.1", key)
	o := options(t, key)
	file := filepath.Join(t.TempDir(), "new", "known_hosts")
	o.HostKeys.Files = []string{file}
	wantErr := func(part string) {
		t.Helper()
		if _, err := Dial(t.Context(), target(s), o); !errors.Is(err, ErrHostKey) || !strings.Contains(err.Error(), part) {
			t.Fatalf("error %v, want one about the host key with %q", err, part)
		}
	}
	wantErr("is not known")
	asked := ""
	answer := func(yes bool) func(string) (bool, error) {
		return func(question string) (bool, error) { asked += question; return yes, nil }
	}
	o.HostKeys.Ask = answer(false)
	wantErr("was not accepted")
	if !strings.Contains(asked, s.Address()) || !strings.Contains(asked, "ED25519 SHA256:") {
		t.Errorf("the question is %q", asked)
	}
	o.HostKeys.Ask = answer(true)
	dial(t, s, o)
	o.HostKeys.Ask = nil
	dial(t, s, o) // it is remembered

	s.Replace()
	o.HostKeys.Ask = answer(true) // nobody is asked about a changed key
	wantErr(file + " line 1 has ED25519")
	var e *Error
	if _, err := Dial(t.Context(), target(s), o); !errors.As(err, &e) || !strings.Contains(e.Hint(), "ssh-keygen -f "+file+" -R '["+s.Host+"]:") {
		t.Errorf("no hint how to forget the key in %v", err)
	}
	insecure := o
	insecure.HostKeys.Insecure = true
	dial(t, s, insecure)
	if err := os.Truncate(file, 0); err != nil {
		t.Fatal(err)
	}
	dial(t, s, o)
}

// The file's last line has no end, and the host has keys of kinds that the
// library would rather use than the one that is known.
func TestKnownHostsFile(t *testing.T) {
	key := sshdtest.Key(t)
	rsa := filepath.Join(t.TempDir(), "rsa")
	if out, err := exec.Command("ssh-keygen", "-q", "-t", "rsa", "-b", "2048", "-N", "", "-f", rsa).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	s := sshdtest.Start(t, "127.0.0.1", key, "HostKey "+rsa)
	public, err := os.ReadFile(rsa + ".pub")
	if err != nil {
		t.Fatal(err)
	}
	o := options(t, key)
	file := o.HostKeys.Files[0]
	for _, tc := range []struct{ name, known string }{
		{"ed25519", s.KnownHosts()},
		{"rsa", fmt.Sprintf("[%s]:%d %s", s.Host, s.Port, public)},
	} {
		if err := os.WriteFile(file, []byte(tc.known), 0o600); err != nil {
			t.Fatal(err)
		}
		if out, err := exec.Command("ssh-keygen", "-q", "-H", "-f", file).CombinedOutput(); err != nil { // as Debian's ssh does
			t.Fatalf("%v: %s", err, out)
		}
		t.Run(tc.name, func(t *testing.T) { dial(t, s, o) })
	}

	alias := o
	alias.HostKeys.Alias = "n1"
	if _, err := Dial(t.Context(), target(s), alias); !errors.Is(err, ErrHostKey) {
		t.Errorf("error %v, want that n1 is not known", err)
	}
	if err := os.WriteFile(file, []byte("n1 "+strings.SplitN(s.KnownHosts(), " ", 2)[1]), 0o600); err != nil {
		t.Fatal(err)
	}
	dial(t, s, alias)

	other := "other.example " + strings.SplitN(strings.TrimSpace(s.KnownHosts()), " ", 2)[1]
	if err := os.WriteFile(file, []byte(other), 0o600); err != nil {
		t.Fatal(err)
	}
	o.HostKeys.Ask = func(string) (bool, error) { return true, nil }
	dial(t, s, o)
	raw, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if lines := strings.Split(strings.TrimSpace(string(raw)), "\n"); len(lines) != 2 || lines[0] != other {
		t.Errorf("the file is now %q", raw)
	}
}

func TestAgent(t *testing.T) {
	key := sshdtest.Key(t)
	s := sshdtest.Start(t, "127.0.0.1", key)
	o := options(t, key, s)
	o.Identities = nil
	wantErr := func(part string) {
		t.Helper()
		if _, err := Dial(t.Context(), target(s), o); err == nil || !strings.Contains(err.Error(), part) {
			t.Fatalf("error %v, want one with %q", err, part)
		}
	}
	wantErr("(there is none)")
	o.Agent = filepath.Join(t.TempDir(), "gone")
	wantErr("the ssh-agent does not answer")
	o.Agent = startAgent(t)
	wantErr("(offered: the agent's 0)")
	addKey(t, o.Agent, sshdtest.Key(t)) // a wrong one
	wantErr("(offered: the agent's 1)")
	addKey(t, o.Agent, key)
	c := dial(t, s, o)
	if out, _, _ := output(t, c, Command{Line: "echo agent $SSH_AUTH_SOCK"}); out != "agent\n" {
		t.Errorf("a command that was not given the agent has %q", out)
	}
	out, _, _ := output(t, c, Command{Line: "ssh-add -l | wc -l", ForwardAgent: true})
	if strings.TrimSpace(out) != "2" {
		t.Errorf("the far side sees %q keys of the agent, want 2", out)
	}
	if out, _, _ := output(t, c, Command{Line: "ssh-add -l | wc -l", ForwardAgent: true}); strings.TrimSpace(out) != "2" {
		t.Errorf("a second command sees %q keys of the agent, want 2", out)
	}
}

func startAgent(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "agent")
	if err != nil {
		t.Fatal(err)
	}
	socket := filepath.Join(dir, "agent")
	cmd := exec.Command("ssh-agent", "-D", "-a", socket)
	if err := cmd.Start(); err != nil {
		t.Fatalf("run ssh-agent (apt-get install openssh-client): %v", err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		_ = os.RemoveAll(dir)
	})
	for deadline := time.Now().Add(30 * time.Second); ; {
		if c, err := net.Dial("unix", socket); err == nil {
			_ = c.Close()
			return socket
		} else if time.Now().After(deadline) {
			t.Fatal(err)
		}
	}
}

func addKey(t *testing.T, socket, key string) {
	t.Helper()
	cmd := exec.Command("ssh-add", "-q", key)
	cmd.Env = append(os.Environ(), "SSH_AUTH_SOCK="+socket)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
}

func TestKeyFiles(t *testing.T) {
	key := sshdtest.Key(t)
	s := sshdtest.Start(t, "127.0.0.1", key)
	o := options(t, key, s)
	o.Identities, o.Defaults = nil, []string{filepath.Join(t.TempDir(), "missing"), key}
	dial(t, s, o)

	o.Identities = []string{filepath.Join(t.TempDir(), "missing")}
	if _, err := Dial(t.Context(), target(s), o); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("error %v, want that the key is missing", err)
	}

	locked := filepath.Join(filepath.Dir(key), "id_ed25519")
	if out, err := exec.Command("ssh-keygen", "-q", "-p", "-P", "", "-N", "secret phrase", "-f", locked).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	o.Identities, o.Defaults = []string{locked}, nil
	if _, err := Dial(t.Context(), target(s), o); err == nil || !strings.Contains(err.Error(), "has a passphrase") {
		t.Errorf("error %v, want that the key has a passphrase", err)
	}
	o.Passphrase = func(file string) (string, error) { return "secret phrase", nil }
	dial(t, s, o)
	o.Passphrase = func(file string) (string, error) { return "wrong", nil }
	if _, err := Dial(t.Context(), target(s), o); err == nil || !strings.Contains(err.Error(), locked) {
		t.Errorf("error %v, want one about %s", err, locked)
	}
}

func TestNobodyThere(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	to := Target{"core", "127.0.0.1", l.Addr().(*net.TCPAddr).Port}
	// The listener never accepts: the connection stands and nothing answers.
	if _, err := Dial(t.Context(), to, Options{Timeout: 50 * time.Millisecond}); err == nil || !strings.Contains(err.Error(), "no answer within 50ms") {
		t.Errorf("error %v of a silent server", err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := Dial(ctx, to, Options{Timeout: time.Minute}); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("error %v of a context that ended", err)
	}
	_ = l.Close()
	if _, err := Dial(t.Context(), to, Options{}); err == nil || !strings.Contains(err.Error(), "refused") {
		t.Errorf("error %v of a closed port", err)
	}
}

// Through an entry node to a second one, whose sshd listens elsewhere.
func TestJump(t *testing.T) {
	key := sshdtest.Key(t)
	entry, second := sshdtest.Start(t, "127.0.0.1", key), sshdtest.Start(t, "127.0.0.2", key)
	o := options(t, key, entry, second)
	c := dial(t, entry, o)
	far, err := c.Jump(t.Context(), target(second), o)
	if err != nil {
		t.Fatal(err)
	}
	if out, _, _ := output(t, far, Command{Line: "set -- $SSH_CONNECTION; echo $3:$4"}); out != second.Address()+"\n" {
		t.Errorf("the command ran in %q", out)
	}
	if err := far.Close(); err != nil {
		t.Error(err)
	}
	// The host key of the second one is checked too.
	if _, err := c.Jump(t.Context(), target(second), options(t, key, entry)); !errors.Is(err, ErrHostKey) {
		t.Errorf("error %v, want one about the host key", err)
	}
	second.Stop()
	if _, err := c.Jump(t.Context(), target(second), o); err == nil || !strings.Contains(err.Error(), "through "+entry.User+"@127.0.0.1") {
		t.Errorf("error %v, want one that names the entry node", err)
	}
}

func TestJumpForbidden(t *testing.T) {
	key := sshdtest.Key(t)
	entry := sshdtest.Start(t, "127.0.0.1", key, "AllowTcpForwarding no")
	o := options(t, key, entry)
	c := dial(t, entry, o)
	var e *Error
	if _, err := c.Jump(t.Context(), target(entry), o); !errors.As(err, &e) {
		t.Errorf("error %v without a hint", err)
	}
	if _, err := c.DialTCP(t.Context(), entry.Address()); !errors.As(err, &e) || !strings.Contains(e.Hint(), "AllowTcpForwarding") {
		t.Errorf("error %v without a hint", err)
	}
}

// HTTP to a unix socket of the far side, by sshd and by a command.
func TestUnixSocket(t *testing.T) {
	dir, err := os.MkdirTemp("", "sock")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = os.RemoveAll(dir) }()
	socket := filepath.Join(dir, "it's.sock")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		raw, _ := io.ReadAll(r.Body)
		_, _ = fmt.Fprintf(w, "%s: %d bytes", r.URL.Path, len(raw))
	})}
	go func() { _ = server.Serve(l) }()
	defer func() { _ = server.Close() }()

	key := sshdtest.Key(t)
	for _, tc := range []struct{ name, line string }{{"sshd", ""}, {"command", "AllowStreamLocalForwarding no"}} {
		t.Run(tc.name, func(t *testing.T) {
			s := sshdtest.Start(t, "127.0.0.1", key, tc.line)
			c := dial(t, s, options(t, key, s))
			forwarder := "nc.openbsd -U"
			client := &http.Client{Transport: &http.Transport{
				DisableKeepAlives: true,
				DialContext:       func(ctx context.Context, _, _ string) (net.Conn, error) { return c.DialUnix(ctx, socket, forwarder) },
			}}
			for i := range 3 {
				resp, err := client.Post(fmt.Sprintf("http://node/%d", i), "text/plain", bytes.NewReader(make([]byte, 1<<20)))
				if err != nil {
					t.Fatal(err)
				}
				raw, _ := io.ReadAll(resp.Body)
				if want := fmt.Sprintf("/%d: 1048576 bytes", i); string(raw) != want {
					t.Errorf("answer %q, want %q", raw, want)
				}
				_ = resp.Body.Close()
			}
			if tc.line != "" && !c.byCommand {
				t.Error("sshd is asked again and again")
			}
		})
	}

	s := sshdtest.Start(t, "127.0.0.1", key)
	c := dial(t, s, options(t, key, s))
	if _, err := c.DialUnix(t.Context(), filepath.Join(dir, "none"), ""); err == nil || !strings.Contains(err.Error(), "none on ") {
		t.Errorf("error %v of a socket that is not there", err)
	}
	conn, err := c.DialUnix(t.Context(), filepath.Join(dir, "none"), "no-such-command fd-forward")
	if err != nil {
		t.Fatal(err)
	}
	for range 2 { // it stays the same
		if _, err := conn.Read(make([]byte, 1)); err == nil || !strings.Contains(err.Error(), "no-such-command: ") || !strings.Contains(err.Error(), "not found") || !strings.Contains(err.Error(), "sshd itself: ") {
			t.Errorf("error %v of a command that is not there", err)
		}
	}
	if err := conn.Close(); err != nil {
		t.Error(err)
	}
}
