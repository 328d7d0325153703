package haproxy

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"time"
)

// ErrUnknown wraps every failure after which a command may or may not have been
// carried out: the caller must read the state again before it acts on it.
var ErrUnknown = errors.New("outcome unknown")

// commandTimeout bounds one Do when ctx has no deadline.
const commandTimeout = 5 * time.Second

// Client speaks HAProxy's Runtime API on a unix socket. It dials for every call:
// a connection that was opened before a reload would stay with the old worker.
type Client struct{ Socket string }

// Answer is what HAProxy said to one command.
type Answer struct {
	Severity int    // 0 to 7 as in syslog; 6 when HAProxy gave none
	Text     string // without the severity mark and the final line feed
}

// Err returns the answer as an error when HAProxy refused the command.
func (a Answer) Err() error {
	if a.Severity > 3 {
		return nil
	}
	return errors.New(a.Text)
}

// ErrGuard is returned by DoIf when the guard's answer was not accepted.
var ErrGuard = errors.New("haproxy is not the process that was expected")

// Do sends commands over one connection, without waiting in between, and returns
// their answers in order. On an error the answers that had arrived are returned
// and the outcome of the others is unknown (the error wraps ErrUnknown).
func (c *Client) Do(ctx context.Context, commands ...string) ([]Answer, error) {
	return c.DoIf(ctx, "", nil, commands...)
}

// DoIf is Do, but first sends the guard command and goes on only if accept takes
// its answer; otherwise it returns ErrGuard and has sent nothing else.
func (c *Client) DoIf(ctx context.Context, guard string, accept func(Answer) bool, commands ...string) ([]Answer, error) {
	for _, cmd := range commands {
		if err := checkCommand(cmd); err != nil {
			return nil, err
		}
	}
	conn, err := c.dial(ctx)
	if err != nil {
		return nil, err
	}
	defer func() { _ = conn.Close() }()
	answers, err := converse(conn, guard, accept, commands)
	if err != nil && !errors.Is(err, ErrGuard) {
		err = fmt.Errorf("haproxy socket %s: %w: %w", c.Socket, ErrUnknown, err)
	}
	return answers, err
}

// maxCommand is less than the buffer that HAProxy reads a line into; it ends the
// connection when a line does not fit.
const maxCommand = 15 << 10

// checkCommand refuses what HAProxy would not take for exactly one command: a
// backslash can join a line with the next one, and "<<" begins a payload.
func checkCommand(cmd string) error {
	bad := func(r rune) bool { return r < ' ' || r > '~' || r == ';' || r == '\\' }
	switch i := strings.IndexFunc(cmd, bad); {
	case i >= 0:
		return fmt.Errorf("haproxy command %.200q: byte %q is not allowed", cmd, cmd[i])
	case strings.Contains(cmd, "<<"):
		return fmt.Errorf("haproxy command %.200q: %q is not allowed", cmd, "<<")
	case strings.TrimSpace(cmd) == "":
		return errors.New("haproxy command: it is empty")
	case len(cmd) > maxCommand:
		return fmt.Errorf("haproxy command %.200q: %d bytes are more than %d", cmd, len(cmd), maxCommand)
	}
	return nil
}

func converse(conn net.Conn, guard string, accept func(Answer) bool, commands []string) ([]Answer, error) {
	in := &answerReader{r: conn}
	first := []string{"prompt", "set severity-output number"}
	if guard != "" {
		first = append(first, guard)
	}
	if _, err := io.WriteString(conn, strings.Join(first, "\n")+"\n"); err != nil {
		return nil, err
	}
	greeting, err := in.read(len(first))
	if err != nil {
		return nil, err
	}
	if guard != "" && !accept(greeting[len(first)-1]) {
		return nil, ErrGuard
	}
	text := strings.Join(commands, "\n") + "\n"
	if len(text) <= kernelTakes {
		if _, err := io.WriteString(conn, text); err != nil {
			return nil, err
		}
		return in.read(len(commands))
	}
	// A long batch would block both sides if nobody read the answers meanwhile.
	var sendErr error
	sent := make(chan struct{})
	go func() {
		defer close(sent)
		_, sendErr = io.WriteString(conn, text)
	}()
	answers, err := in.read(len(commands))
	if err != nil {
		_ = conn.Close() // ends the writer
		<-sent
		return answers, err
	}
	<-sent
	return answers, sendErr
}

// kernelTakes is what a socket takes in without anybody reading.
const kernelTakes = 16 << 10

// Payload sends one command with a multi-line payload, such as a certificate.
// HAProxy before 3.4 silently drops payloads over 16 KiB, so these are refused.
func (c *Client) Payload(ctx context.Context, command, payload string) error {
	if err := checkCommand(command); err != nil {
		return err
	}
	payload = strings.TrimSpace(payload)
	if len(payload) > 15<<10 {
		return fmt.Errorf("haproxy command %q: payload of %d bytes is over 15 KiB", command, len(payload))
	}
	for line := range strings.SplitSeq(payload, "\n") {
		if strings.TrimSpace(line) == "" && payload != "" {
			return fmt.Errorf("haproxy command %q: an empty line would end the payload early", command)
		}
	}
	text, err := c.raw(ctx, "set severity-output number;"+command+" <<\n"+payload+"\n\n")
	if err != nil {
		return err
	}
	return parseAnswer(strings.TrimSpace(text)).Err()
}

// Alive reports whether somebody answers on the socket.
func (c *Client) Alive() bool {
	_, err := c.Do(context.Background(), "show version")
	return err == nil
}

// Master sends one command to the master process's socket and returns its answer.
func (c *Client) Master(ctx context.Context, command string) (string, error) {
	return c.raw(ctx, command+"\n")
}

// raw sends text, closes the sending side and reads to the end.
func (c *Client) raw(ctx context.Context, text string) (string, error) {
	conn, err := c.dial(ctx)
	if err != nil {
		return "", err
	}
	defer func() { _ = conn.Close() }()
	if _, err := io.WriteString(conn, text); err != nil {
		return "", fmt.Errorf("haproxy socket %s: %w: %w", c.Socket, ErrUnknown, err)
	}
	if err := conn.(*net.UnixConn).CloseWrite(); err != nil {
		return "", fmt.Errorf("haproxy socket %s: %w: %w", c.Socket, ErrUnknown, err)
	}
	out, err := io.ReadAll(conn)
	if err != nil {
		return string(out), fmt.Errorf("haproxy socket %s: %w: %w", c.Socket, ErrUnknown, err)
	}
	return string(out), nil
}

func (c *Client) dial(ctx context.Context) (net.Conn, error) {
	var d net.Dialer
	ctx, cancel := context.WithTimeout(ctx, commandTimeout)
	defer cancel()
	conn, err := d.DialContext(ctx, "unix", c.Socket)
	if err != nil {
		return nil, fmt.Errorf("haproxy socket %s: %w", c.Socket, err)
	}
	deadline, _ := ctx.Deadline()
	if err := conn.SetDeadline(deadline); err != nil {
		_ = conn.Close()
		return nil, fmt.Errorf("haproxy socket %s: %w", c.Socket, err)
	}
	return conn, nil
}

var prompt = []byte("\n> ")

// answerReader splits what HAProxy sends in prompt mode: every answer ends with
// an empty line and a prompt.
type answerReader struct {
	r   io.Reader
	buf []byte // read, not yet part of an answer
}

func (a *answerReader) read(n int) ([]Answer, error) {
	answers := make([]Answer, 0, n)
	scanned := 0 // no prompt begins before this
	for len(answers) < n {
		if i := bytes.Index(a.buf[scanned:], prompt); i >= 0 {
			answers = append(answers, parseAnswer(string(a.buf[:scanned+i])))
			a.buf = a.buf[scanned+i+len(prompt):]
			scanned = 0
			continue
		}
		scanned = max(0, len(a.buf)-len(prompt)+1)
		a.buf = slices.Grow(a.buf, 16<<10)
		m, err := a.r.Read(a.buf[len(a.buf):cap(a.buf)])
		a.buf = a.buf[:len(a.buf)+m]
		if err != nil && m == 0 {
			return answers, err
		}
	}
	return answers, nil
}

func parseAnswer(text string) Answer {
	a := Answer{Severity: 6, Text: strings.Trim(text, "\n")}
	if len(a.Text) >= 4 && a.Text[0] == '[' && a.Text[2] == ']' && a.Text[3] == ':' && '0' <= a.Text[1] && a.Text[1] <= '7' {
		a.Severity = int(a.Text[1] - '0')
		a.Text = strings.TrimSpace(a.Text[4:])
	}
	return a
}
