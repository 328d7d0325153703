package haproxy

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
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

// Do sends commands over one connection, without waiting in between, and returns
// their answers in order. On an error the answers that had arrived are returned
// and the outcome of the others is unknown (the error wraps ErrUnknown).
func (c *Client) Do(ctx context.Context, commands ...string) ([]Answer, error) {
	var b bytes.Buffer
	b.WriteString("prompt\nset severity-output number\n")
	for _, cmd := range commands {
		if i := strings.IndexFunc(cmd, func(r rune) bool { return r < ' ' || r > '~' || r == ';' }); i >= 0 {
			return nil, fmt.Errorf("haproxy command %q: byte %q is not allowed", cmd, cmd[i])
		}
		b.WriteString(cmd)
		b.WriteByte('\n')
	}
	b.WriteString("quit\n")

	conn, err := c.dial(ctx)
	if err != nil {
		return nil, err
	}
	defer conn.Close() //nolint:errcheck // nothing is buffered
	// Long batches would block both sides if nobody read the answers meanwhile.
	sent := make(chan error, 1)
	go func() {
		_, err := conn.Write(b.Bytes())
		sent <- err
	}()
	answers, err := readAnswers(conn, len(commands))
	if err != nil {
		_ = conn.Close() // ends the writer
	}
	if werr := <-sent; err == nil && werr != nil && len(answers) < len(commands) {
		err = werr
	}
	if err != nil {
		return answers, fmt.Errorf("haproxy socket %s: %w: %w", c.Socket, ErrUnknown, err)
	}
	return answers, nil
}

// Payload sends one command with a multi-line payload, such as a certificate.
// HAProxy before 3.4 silently drops payloads over 16 KiB, so these are refused.
func (c *Client) Payload(ctx context.Context, command, payload string) error {
	if len(payload) > 15<<10 {
		return fmt.Errorf("haproxy command %q: payload of %d bytes is over 15 KiB", command, len(payload))
	}
	text, err := c.raw(ctx, "set severity-output number;"+command+" <<\n"+strings.TrimSpace(payload)+"\n\n")
	if err != nil {
		return err
	}
	return parseAnswer(strings.TrimSpace(text)).Err()
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
	defer conn.Close() //nolint:errcheck // nothing is buffered
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

// readAnswers reads n answers that follow the answers to "prompt" and "set
// severity-output". Each ends with an empty line and a prompt.
func readAnswers(r io.Reader, n int) ([]Answer, error) {
	answers := make([]Answer, 0, n)
	buf := make([]byte, 0, 64<<10)
	skip := 2
	for {
		for {
			i := bytes.Index(buf, prompt)
			if i < 0 {
				break
			}
			text := string(buf[:i])
			buf = append(buf[:0], buf[i+len(prompt):]...)
			if skip > 0 {
				skip--
				continue
			}
			answers = append(answers, parseAnswer(text))
			if len(answers) == n {
				return answers, nil
			}
		}
		if len(buf) == cap(buf) {
			buf = append(buf, make([]byte, len(buf))...)[:len(buf)]
		}
		m, err := r.Read(buf[len(buf):cap(buf)])
		buf = buf[:len(buf)+m]
		if err != nil && m == 0 {
			return answers, err
		}
	}
}

func parseAnswer(text string) Answer {
	a := Answer{Severity: 6, Text: strings.Trim(text, "\n")}
	if len(a.Text) >= 4 && a.Text[0] == '[' && a.Text[2] == ']' && a.Text[3] == ':' && '0' <= a.Text[1] && a.Text[1] <= '7' {
		a.Severity = int(a.Text[1] - '0')
		a.Text = strings.TrimSpace(a.Text[4:])
	}
	return a
}
