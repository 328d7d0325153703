package haproxy

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// Five thousand commands at once, with answers that are larger than any buffer
// between them: each gets its own answer.
func TestAnswersComeInOrder(t *testing.T) {
	eachHAProxy(t, func(t *testing.T, h running) {
		file := h.config.Map(HTTPMap)
		var fill []string
		for i := range 2000 {
			fill = append(fill, fmt.Sprintf("add map %s key%d hl.1:service%d", file, i, i))
		}
		if _, err := h.Do(t.Context(), fill...); err != nil {
			t.Fatal(err)
		}
		var commands []string
		for i := range 5000 {
			switch {
			case i%500 == 0:
				commands = append(commands, "show map "+file)
			case i%7 == 0:
				commands = append(commands, fmt.Sprintf("get map %s none%d", file, i))
			default:
				commands = append(commands, fmt.Sprintf("get map %s key%d", file, i%2000))
			}
		}
		answers, err := h.Do(t.Context(), commands...)
		if err != nil || len(answers) != len(commands) {
			t.Fatalf("%d answers, %v", len(answers), err)
		}
		for i, a := range answers {
			want := fmt.Sprintf(`key="key%d"`, i%2000)
			switch {
			case i%500 == 0:
				if n := len(ParseMap(a.Text)); n != 2002 {
					t.Fatalf("answer %d: %d entries, want 2002", i, n)
				}
				continue
			case i%7 == 0:
				want = "found=no"
			}
			if !strings.Contains(a.Text, want) || a.Err() != nil {
				t.Fatalf("answer %d: %+v, want %s", i, a, want)
			}
		}
	})
}

func TestErrorsBySeverity(t *testing.T) {
	eachHAProxy(t, func(t *testing.T, h running) {
		for command, refused := range map[string]bool{
			"show version":                                 false,
			"set server hl.1/s1 weight 50":                 false,
			"set server hl.1/s1 state drain":               false,
			"set server hl.1/s1 addr 127.0.0.2 port 99":    false,
			"get map " + h.config.Map(HTTPMap) + " none":   false,
			"set server hl.1/s9 state ready":               true,
			"set server none.1/s1 state ready":             true,
			"set server hl.1/s1 weight many":               true,
			"set map " + h.config.Map(HTTPMap) + " none x": true,
			"del map " + h.config.Map(HTTPMap) + " none":   true,
			"show map /none":                               true,
			"get var proc.none":                            true,
			AddServer("none.1", Server{Name: "s1", Addr: testBackends()[0].Servers[0].Addr}):       true,
			AddServer("hl.1", Server{Name: "s1", Addr: testBackends()[0].Servers[0].Addr}):         true, // exists
			AddServer("tl.1", Server{Name: "s9-m5", Addr: testBackends()[0].Servers[0].Addr}):      false,
			AddServer("hcso.1", Server{Name: "s4-h2-pp", Addr: testBackends()[0].Servers[1].Addr}): false,
			CookieKey("hcso.1"): false,
		} {
			if a := h.ask(t, command); (a.Err() != nil) != refused {
				t.Errorf("%s: %+v, want refused: %v", command, a, refused)
			}
		}
	})
}

func TestAddedServersAreReadBack(t *testing.T) {
	eachHAProxy(t, func(t *testing.T, h running) {
		want := testBackends()[0].Servers[0]
		want.Name, want.Weight, want.State = "s5-h2-m3", 33, Maint
		h.ask(t, AddServer("hl.1", want))
		for _, state := range []ServerState{Ready, Drain, Maint, Ready} {
			if want.State != Maint || state != Maint {
				h.ask(t, SetState("hl.1", want.Name, state))
			}
			want.State = state
			want.Weight++
			h.ask(t, SetWeight("hl.1", want.Name, want.Weight))
			servers, err := ParseServers(h.ask(t, ServersState("hl.1")).Text)
			if err != nil {
				t.Fatal(err)
			}
			var is Server
			for _, s := range servers["hl.1"] {
				if s.Name == want.Name {
					is = s
				}
			}
			if is != want {
				t.Errorf("server is %+v, want %+v", is, want)
			}
		}
	})
}

func TestGuard(t *testing.T) {
	eachHAProxy(t, func(t *testing.T, h running) {
		guard := "get map " + h.config.Map(StateMap) + " attached"
		accept := func(a Answer) bool { return strings.Contains(a.Text, `value="no"`) }
		answers, err := h.DoIf(t.Context(), guard, accept, "set map "+h.config.Map(StateMap)+" attached me", "show version")
		if err != nil || len(answers) != 2 || !strings.Contains(answers[1].Text, h.version.Full) {
			t.Fatalf("accepted: %v, %v", answers, err)
		}
		answers, err = h.DoIf(t.Context(), guard, accept, "set map "+h.config.Map(StateMap)+" attached other")
		if !errors.Is(err, ErrGuard) || errors.Is(err, ErrUnknown) || len(answers) != 0 {
			t.Errorf("not accepted: %v, %v", answers, err)
		}
		if a := h.ask(t, guard); !strings.Contains(a.Text, `value="me"`) {
			t.Errorf("the second command was sent: %s", a.Text)
		}
	})
}

func TestPayload(t *testing.T) {
	eachHAProxy(t, func(t *testing.T, h running) {
		var lines strings.Builder
		n := 0
		for ; lines.Len() < 14<<10; n++ {
			fmt.Fprintf(&lines, "name%d.example.com hl.1:web\n", n)
		}
		if err := h.Payload(t.Context(), "add map "+h.config.Map(HTTPSMap), lines.String()); err != nil {
			t.Fatal(err)
		}
		if got := len(ParseMap(h.ask(t, "show map "+h.config.Map(HTTPSMap)).Text)); got != n {
			t.Errorf("%d of %d lines arrived", got, n)
		}
		if err := h.Payload(t.Context(), "add map "+h.config.Map("none"), "a b"); err == nil {
			t.Error("an unknown map is no error")
		}
		for what, payload := range map[string]string{
			"too long": strings.Repeat("x y\n", 5000), "empty line": "a b\n\ndel map x", "blank line": "a b\n \r\ndel map x",
		} {
			if err := h.Payload(t.Context(), "add map "+h.config.Map(HTTPSMap), payload); err == nil || errors.Is(err, ErrUnknown) {
				t.Errorf("%s: %v, want it refused", what, err)
			}
		}
		if err := h.Payload(t.Context(), "show version;show info", "x"); err == nil {
			t.Error("two commands are no error")
		}
		if got := len(ParseMap(h.ask(t, "show map "+h.config.Map(HTTPSMap)).Text)); got != n {
			t.Errorf("%d entries after refusals, want %d", got, n)
		}
	})
}

// waitStopped returns when every thread of the process has stopped.
func waitStopped(t *testing.T, pid int) {
	t.Helper()
	stopped := func() bool {
		stats, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stat", pid))
		if err != nil || len(stats) == 0 {
			t.Fatalf("process %d: %v", pid, err)
		}
		for _, path := range stats {
			if text, err := os.ReadFile(path); err != nil || !strings.Contains(string(text), ") T ") {
				return false
			}
		}
		return true
	}
	for limit := time.Now().Add(10 * time.Second); !stopped(); time.Sleep(time.Millisecond) {
		if time.Now().After(limit) {
			t.Fatalf("process %d does not stop", pid)
		}
	}
}

func TestFrozenProcessIsUnknown(t *testing.T) {
	eachHAProxy(t, func(t *testing.T, h running) {
		if err := syscall.Kill(h.pid, syscall.SIGSTOP); err != nil {
			t.Fatal(err)
		}
		waitStopped(t, h.pid)
		ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
		defer cancel()
		answers, err := h.Do(ctx, "set server hl.1/s1 weight 1", "show version")
		if len(answers) != 0 || !errors.Is(err, ErrUnknown) || !errors.Is(err, context.DeadlineExceeded) && !isTimeout(err) {
			t.Errorf("frozen: %v, %v", answers, err)
		}
		if err := syscall.Kill(h.pid, syscall.SIGCONT); err != nil {
			t.Fatal(err)
		}
		h.ask(t, "show version")
	})
}

func isTimeout(err error) bool {
	var timeout net.Error
	return errors.As(err, &timeout) && timeout.Timeout()
}

func TestNobodyThere(t *testing.T) {
	c := Client{Socket: filepath.Join(t.TempDir(), "none.sock")}
	if _, err := c.Do(t.Context(), "show version"); err == nil || errors.Is(err, ErrUnknown) {
		t.Errorf("%v: nothing was sent, so nothing is unknown", err)
	}
	if c.Alive() {
		t.Error("alive")
	}
}

// fake answers like HAProxy in prompt mode, counts the commands and cuts the
// connection after some of them.
type fake struct {
	t        *testing.T
	commands chan string // what arrived after the two that set the mode
	cutAfter int         // answers given before the cut
	partial  string      // sent just before the cut
}

func (f *fake) listen() Client {
	path := filepath.Join(f.t.TempDir(), "fake.sock")
	l, err := net.Listen("unix", path)
	if err != nil {
		f.t.Fatal(err)
	}
	f.t.Cleanup(func() { _ = l.Close() })
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			f.serve(conn)
		}
	}()
	return Client{Socket: path}
}

func (f *fake) serve(conn net.Conn) {
	defer func() { _ = conn.Close() }()
	in := bufio.NewScanner(conn)
	in.Buffer(nil, 1<<20)
	for n := -2; in.Scan(); n++ {
		if n >= 0 {
			f.commands <- in.Text()
		}
		if n == f.cutAfter {
			_, _ = fmt.Fprint(conn, f.partial)
			return
		}
		if _, err := fmt.Fprintf(conn, "[6]: answer %d\n\n> ", n); err != nil {
			return
		}
	}
}

func TestCutConnectionReturnsTheAnswersSoFar(t *testing.T) {
	commands := []string{"one", "two", "three", "four"}
	for cut := range commands {
		for _, partial := range []string{"", "[6]: half an ans", "[6]: nearly\n\n"} {
			f := &fake{t: t, commands: make(chan string, 100), cutAfter: cut, partial: partial}
			c := f.listen()
			answers, err := c.Do(t.Context(), commands...)
			if len(answers) != cut || !errors.Is(err, ErrUnknown) {
				t.Errorf("cut after %d (%q): %d answers, %v", cut, partial, len(answers), err)
			}
			for i, a := range answers {
				if a.Text != fmt.Sprint("answer ", i) {
					t.Errorf("answer %d: %q", i, a.Text)
				}
			}
		}
	}
}

// Whatever the text of a command is: either it is refused and nothing is sent, or
// exactly this one command arrives.
func FuzzCommandsCannotMultiply(f *testing.F) {
	for _, s := range []string{
		"show version", "a\nb", "a\rb", "a;b", `a\`, `a\;b`, "a <<", "a <<EOF", "a<<", "", "  ", "\x00", "a\x7f", "é", "\xff",
		"#", "'", `"`, "prompt", strings.Repeat("a", 20_000),
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, command string) {
		fk := &fake{t: t, commands: make(chan string, 100), cutAfter: 1000}
		c := fk.listen()
		answers, err := c.Do(t.Context(), command, "last")
		if err != nil {
			if errors.Is(err, ErrUnknown) || len(fk.commands) > 0 {
				t.Fatalf("%q: %d commands sent: %v", command, len(fk.commands), err)
			}
			return
		}
		if len(answers) != 2 || len(fk.commands) != 2 || <-fk.commands != command || <-fk.commands != "last" {
			t.Fatalf("%q: %d answers, %d commands more", command, len(answers), len(fk.commands))
		}
	})
}

// The same against HAProxy, which knows more ways than a line end.
func TestCommandsCannotMultiply(t *testing.T) {
	eachHAProxy(t, func(t *testing.T, h running) {
		for _, command := range []string{
			`get var x\`, `get var x \;`, "get var x <<", "get var x <<END", "get var x<<", "<<", "", " ", "get var x;show info",
			"get var x\nshow info", "get var " + strings.Repeat("a", 17_000),
			"# show info", "get var x # y", "get var 'x", `get var "x`, "get var x < <", "@1 show info", "get var ${HOME}",
			"get var " + strings.Repeat("a ", 100), "get var " + strings.Repeat("a", 15_000),
		} {
			answers, err := h.Do(t.Context(), command, "show version")
			if err != nil {
				if errors.Is(err, ErrUnknown) {
					t.Errorf("%.50q: %v", command, err)
				}
				continue
			}
			if len(answers) != 2 || !strings.Contains(answers[1].Text, h.version.Full) {
				t.Errorf("%.50q: the command after it was answered %.100v", command, answers[1:])
			}
		}
	})
}
