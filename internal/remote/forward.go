package remote

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"sync"
	"time"

	"golang.org/x/crypto/ssh"

	"flotilla/internal/text"
)

// DialTCP connects to host:port as the far side sees it.
func (c *Client) DialTCP(ctx context.Context, address string) (net.Conn, error) {
	conn, err := c.ssh.DialContext(ctx, "tcp", address)
	if err != nil {
		err = fmt.Errorf("connect to %s through %s: %w", address, c.target, err)
		var open *ssh.OpenChannelError
		if errors.As(err, &open) && open.Reason == ssh.Prohibited {
			return nil, &Error{err, "sshd there must allow it: AllowTcpForwarding yes"}
		}
		return nil, err
	}
	return conn, nil
}

// DialUnix connects to a unix socket of the far side: by sshd itself or, where
// sshd will not, by running "forwarder PATH" there, which must join its standard
// input and output with the socket.
func (c *Client) DialUnix(ctx context.Context, path, forwarder string) (net.Conn, error) {
	c.mu.Lock()
	byCommand := c.byCommand
	c.mu.Unlock()
	var refused error
	if !byCommand {
		conn, err := c.ssh.DialContext(ctx, "unix", path)
		if err == nil {
			return conn, nil
		}
		refused = err
		var open *ssh.OpenChannelError
		if !errors.As(err, &open) || forwarder == "" {
			return nil, fmt.Errorf("connect to %s on %s: %w", path, c.target, err)
		}
	}
	conn, err := c.pipe(ctx, forwarder+" "+text.ShellQuote(path))
	if err != nil {
		if refused != nil {
			err = fmt.Errorf("%w (sshd itself: %v)", err, refused)
		}
		return nil, fmt.Errorf("connect to %s on %s: %w", path, c.target, err)
	}
	conn.refused = refused
	conn.worked = func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		c.byCommand = true
	}
	return conn, nil
}

// pipe runs a command and returns its standard input and output as a connection.
func (c *Client) pipe(ctx context.Context, line string) (*pipe, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	session, err := c.ssh.NewSession()
	if err != nil {
		return nil, err
	}
	p := &pipe{session: session, line: line, far: c.target.String()}
	session.Stderr = &p.complaint
	if p.in, err = session.StdinPipe(); err == nil {
		if p.out, err = session.StdoutPipe(); err == nil {
			err = session.Start(line)
		}
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("run %q: %w", line, err), notEOF(session.Close()))
	}
	return p, nil
}

// pipe is a net.Conn. It has no deadlines: setting one is an error.
type pipe struct {
	session *ssh.Session
	line    string
	far     string
	in      io.WriteCloser
	out     io.Reader
	refused error  // why it had to be a pipe
	worked  func() // called once something was read

	complaint lockedBuffer
	read      bool // something was read; by the one reader of a connection
	ending    sync.Once
	ended     error // of the session, once ending is done
}

func (p *pipe) Read(b []byte) (int, error) {
	n, err := p.out.Read(b)
	if n > 0 && !p.read {
		p.read = true
		if p.worked != nil {
			p.worked()
		}
	}
	if err == io.EOF && !p.read && n == 0 {
		p.ending.Do(func() { p.ended = p.session.Wait() }) // then its text is there
		if p.ended != nil {
			err = fmt.Errorf("%q on %s: %w: %s", p.line, p.far, p.ended, p.complaint.String())
			if p.refused != nil {
				err = fmt.Errorf("%w (sshd itself: %v)", err, p.refused)
			}
		}
	}
	return n, err
}

func (p *pipe) Write(b []byte) (int, error) { return p.in.Write(b) }

// CloseWrite says that nothing more will be written.
func (p *pipe) CloseWrite() error { return notEOF(p.in.Close()) }

func (p *pipe) Close() error { return notEOF(p.session.Close()) }

func (p *pipe) LocalAddr() net.Addr              { return pipeAddr(p.line) }
func (p *pipe) RemoteAddr() net.Addr             { return pipeAddr(p.line) }
func (p *pipe) SetDeadline(time.Time) error      { return os.ErrNoDeadline }
func (p *pipe) SetReadDeadline(time.Time) error  { return os.ErrNoDeadline }
func (p *pipe) SetWriteDeadline(time.Time) error { return os.ErrNoDeadline }

type pipeAddr string

func (pipeAddr) Network() string  { return "ssh" }
func (a pipeAddr) String() string { return string(a) }

// notEOF drops the io.EOF that closing an ended session returns.
func notEOF(err error) error {
	if errors.Is(err, io.EOF) {
		return nil
	}
	return err
}

// lockedBuffer is written by the session and read after its end or by an error.
type lockedBuffer struct {
	mu  sync.Mutex // guards buf
	buf bytes.Buffer
}

const maxComplaint = 4 << 10

func (l *lockedBuffer) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if room := maxComplaint - l.buf.Len(); room > 0 {
		l.buf.Write(b[:min(room, len(b))])
	}
	return len(b), nil
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return strings.TrimSpace(l.buf.String())
}
