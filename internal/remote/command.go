package remote

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"

	"golang.org/x/crypto/ssh"
	"golang.org/x/crypto/ssh/agent"
)

// Command is what to run on the far side.
type Command struct {
	Line           string // for the user's shell there; "": a login shell
	Stdin          io.Reader
	Stdout, Stderr io.Writer
	PTY            *PTY // nil: no terminal
	ForwardAgent   bool // lets this and all later commands sign with our agent's keys
}

// PTY is the terminal of a command.
type PTY struct {
	Term string // value of TERM
	Size Size
	// Resized hands over each new size; nil: it never changes.
	Resized <-chan Size
}

// Size is that of a terminal, in characters.
type Size struct{ Columns, Rows int }

// Run runs a command and returns its exit code, which is 128 plus the number of
// the signal if one ended it. The end of ctx ends it too. An error means that it
// is not known how the command ended.
func (c *Client) Run(ctx context.Context, cmd Command) (exit int, err error) {
	what := "a shell"
	if cmd.Line != "" {
		what = fmt.Sprintf("%q", cmd.Line)
	}
	defer func() {
		if err != nil {
			err = fmt.Errorf("run %s on %s: %w", what, c.target, err)
		}
	}()
	session, err := c.ssh.NewSession()
	if err != nil {
		return 0, err
	}
	var resizing sync.WaitGroup
	done := make(chan struct{})
	defer func() {
		close(done)
		_ = session.Close() // it says EOF after a normal end
		resizing.Wait()
	}()
	defer context.AfterFunc(ctx, func() {
		_ = session.Signal(ssh.SIGTERM) // a process that does not end by it loses its input and output
		_ = session.Close()
	})()

	if cmd.ForwardAgent {
		if err := c.forwardAgent(session); err != nil {
			return 0, err
		}
	}
	if p := cmd.PTY; p != nil {
		if err := session.RequestPty(p.Term, p.Size.Rows, p.Size.Columns, ssh.TerminalModes{}); err != nil {
			return 0, fmt.Errorf("ask for a terminal: %w", err)
		}
	}
	session.Stdin, session.Stdout, session.Stderr = cmd.Stdin, cmd.Stdout, cmd.Stderr
	if cmd.Line == "" {
		err = session.Shell()
	} else {
		err = session.Start(cmd.Line)
	}
	if err != nil {
		return 0, err
	}
	if p := cmd.PTY; p != nil {
		resizing.Go(func() { resize(session, p.Resized, done) })
	}
	ended := make(chan error, 1)
	c.own.Go(func() { ended <- session.Wait() }) // a process that ignores its end keeps it, until Close
	select {
	case err = <-ended:
	case <-ctx.Done():
		err = ctx.Err()
	}
	return exitOf(ctx, err)
}

func exitOf(ctx context.Context, err error) (int, error) {
	var status *ssh.ExitError
	var missing *ssh.ExitMissingError
	switch {
	case err == nil:
		return 0, nil
	case errors.As(err, &status):
		return status.ExitStatus(), nil
	case ctx.Err() != nil:
		return 0, ctx.Err()
	case errors.As(err, &missing):
		return 0, errors.New("the connection was lost")
	}
	return 0, err
}

func resize(session *ssh.Session, sizes <-chan Size, done <-chan struct{}) {
	for {
		select {
		case s := <-sizes:
			_ = session.WindowChange(s.Rows, s.Columns) // a wrong size is no reason to end
		case <-done:
			return
		}
	}
}

func (c *Client) forwardAgent(session *ssh.Session) error {
	if c.agent == "" {
		return &Error{errors.New("there is no ssh-agent to forward"), "start one: eval $(ssh-agent); ssh-add"}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.forwarding { // sshd gives it to the whole connection
		return nil
	}
	if err := agent.ForwardToRemote(c.ssh, c.agent); err != nil {
		return fmt.Errorf("forward the ssh-agent: %w", err)
	}
	c.forwarding = true
	if err := agent.RequestAgentForwarding(session); err != nil {
		return fmt.Errorf("forward the ssh-agent: %w", err)
	}
	return nil
}
