// Package remote is the edge to other machines by ssh: logging in, host keys,
// running a command, and connections to sockets on the far side, directly or
// through an entry node. It must not know what the commands mean, what is spoken
// over the connections, or how anything is shown to people.
package remote

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os/user"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/crypto/ssh"
)

// DefaultPort is where sshd listens.
const DefaultPort = 22

// Defaults of Options.
const (
	defaultTimeout = 10 * time.Second
	defaultAlive   = 15 * time.Second
)

// Target is a machine and who logs in there.
type Target struct {
	User string // "": the one of the Options
	Host string // name or address
	Port int
}

// ParseTarget reads [user@]host[:port]. An IPv6 address with a port stands in
// brackets. port is the one to use where none is given.
func ParseTarget(s string, port int) (Target, error) {
	t := Target{Host: s, Port: port}
	if at := strings.LastIndex(s, "@"); at >= 0 {
		t.User, t.Host = s[:at], s[at+1:]
		if t.User == "" {
			return Target{}, fmt.Errorf("ssh target %q has no user before the @", s)
		}
	}
	if host, given, err := net.SplitHostPort(t.Host); err == nil {
		n, err := strconv.ParseUint(given, 10, 16)
		if err != nil || n == 0 {
			return Target{}, fmt.Errorf("ssh target %q: %q is not a port", s, given)
		}
		t.Host, t.Port = host, int(n)
	} else {
		t.Host = strings.Trim(t.Host, "[]")
	}
	if t.Host == "" || strings.ContainsFunc(t.Host, func(r rune) bool { return r <= ' ' || strings.ContainsRune("/@,[]\x7f", r) }) {
		return Target{}, fmt.Errorf("ssh target %q has no host: write user@host:port", s)
	}
	return t, nil
}

// ParseTargets reads targets between commas; none if s is "".
func ParseTargets(s string) ([]Target, error) {
	if s == "" {
		return nil, nil
	}
	var targets []Target
	for one := range strings.SplitSeq(s, ",") {
		to, err := ParseTarget(strings.TrimSpace(one), DefaultPort)
		if err != nil {
			return nil, err
		}
		targets = append(targets, to)
	}
	return targets, nil
}

// Address returns host:port.
func (t Target) Address() string { return net.JoinHostPort(t.Host, strconv.Itoa(t.Port)) }

func (t Target) String() string {
	text := t.Host
	if t.Port != DefaultPort {
		text = t.Address()
	}
	if t.User != "" {
		text = t.User + "@" + text
	}
	return text
}

// Options say how to log in. The zero value knows no host and has no key.
type Options struct {
	User    string        // where the target names none; "": the name of this process's user
	Timeout time.Duration // for connecting and logging in, people's answers not counted; 0: 10 s
	// Alive is how often a silent far side is asked whether it is there; without
	// an answer for twice as long the connection is cut. 0: 15 s.
	Alive    time.Duration
	HostKeys HostKeys

	Identities []string // files of private keys: each must be there, and they are tried first
	Agent      string   // socket of an ssh-agent; "": none
	Defaults   []string // files of private keys that are used if they are there
	// Passphrase asks for the passphrase of a key file; nil: encrypted keys are
	// left out.
	Passphrase func(file string) (string, error)
}

// Error is an error with something to do about it.
type Error struct {
	err  error
	hint string
}

func (e *Error) Error() string { return e.err.Error() }

func (e *Error) Unwrap() error { return e.err }

// Hint returns what to do, "" if nothing is known to help.
func (e *Error) Hint() string { return e.hint }

// Client is one connection to a machine. Its methods may be called from any
// goroutine.
type Client struct {
	target Target
	agent  string
	ssh    *ssh.Client
	own    sync.WaitGroup // goroutines that end with the connection
	ended  chan struct{}  // closed by Close

	mu         sync.Mutex // guards the following
	forwarding bool       // the agent's channels are answered
	byCommand  bool       // sockets are reached by a command, not by the server's forwarding
	closed     bool
}

// DialFirst logs in to the first of the targets that answers. A host key that is
// not accepted ends it: another target would only hide it.
func DialFirst(ctx context.Context, targets []Target, o Options) (*Client, error) {
	var failed []error
	for _, to := range targets {
		client, err := Dial(ctx, to, o)
		if err == nil {
			return client, nil
		}
		failed = append(failed, err)
		if errors.Is(err, ErrHostKey) {
			break
		}
	}
	return nil, errors.Join(failed...)
}

// Dial logs in at a machine. ctx ends the attempt, not the connection.
//
// It fails when the machine does not answer, when its host key is not accepted
// (ErrHostKey), or when it accepts none of our keys. Errors of these are of type
// *Error, perhaps joined with others.
func Dial(ctx context.Context, to Target, o Options) (*Client, error) {
	return connect(ctx, to, o, func(ctx context.Context) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "tcp", to.Address())
	})
}

// Jump logs in at another machine through this one, which sees only encrypted
// traffic. The new connection ends with this one.
func (c *Client) Jump(ctx context.Context, to Target, o Options) (*Client, error) {
	return connect(ctx, to, o, func(ctx context.Context) (net.Conn, error) { return c.DialTCP(ctx, to.Address()) })
}

// connect reaches the machine and logs in. Each of the two has the whole time-out.
func connect(ctx context.Context, to Target, o Options, dial func(context.Context) (net.Conn, error)) (*Client, error) {
	timeout := o.Timeout
	if timeout <= 0 {
		timeout = defaultTimeout
	}
	if to.User == "" {
		to.User = o.User
	}
	if to.User == "" {
		u, err := user.Current()
		if err != nil {
			return nil, fmt.Errorf("ssh to %s: no user name given (use user@host or --ssh-username): %w", to, err)
		}
		to.User = u.Username
	}
	reach, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	conn, err := dial(reach)
	if err != nil {
		return nil, &Error{fmt.Errorf("ssh to %s: %w", to, notInTime(err, timeout)), "is sshd running there, and is the port the right one?"}
	}
	client, err := login(ctx, conn, to, o, timeout)
	if err != nil {
		return nil, errors.Join(err, notEOF(ignoreClosed(conn.Close())))
	}
	return client, nil
}

// login logs the user in on conn.
func login(ctx context.Context, conn net.Conn, to Target, o Options, timeout time.Duration) (*Client, error) {
	stop := context.AfterFunc(ctx, func() { _ = conn.Close() }) // which ends the handshake
	defer stop()
	late := make(chan struct{})
	limit := time.AfterFunc(timeout, func() {
		close(late)
		_ = conn.Close() // as above
	})
	defer limit.Stop()
	// The time limit is paused while a person is asked.
	patient := func() func() {
		if !limit.Stop() {
			return func() {}
		}
		return func() { limit.Reset(timeout) }
	}

	keys := &keys{options: o, patient: patient}
	defer keys.close()
	check := &hostKeyCheck{HostKeys: o.HostKeys, address: to.Address(), patient: patient}
	if o.HostKeys.Alias != "" {
		check.address = net.JoinHostPort(o.HostKeys.Alias, strconv.Itoa(DefaultPort))
	}
	algorithms, err := check.algorithms()
	if err != nil {
		return nil, &Error{fmt.Errorf("ssh to %s: %w", to, err), ""}
	}
	c, channels, requests, err := ssh.NewClientConn(conn, to.Address(), &ssh.ClientConfig{
		User:              to.User,
		Auth:              []ssh.AuthMethod{ssh.PublicKeysCallback(keys.signers)},
		HostKeyCallback:   check.check,
		HostKeyAlgorithms: algorithms,
		ClientVersion:     "SSH-2.0-flotilla",
	})
	if err != nil {
		select {
		case <-late:
			err = notInTime(context.DeadlineExceeded, timeout)
		default:
			if ctx.Err() != nil {
				err = ctx.Err()
			}
		}
		return nil, explain(to, keys, check, err)
	}
	client := &Client{target: to, agent: o.Agent, ssh: ssh.NewClient(c, channels, requests), ended: make(chan struct{})}
	client.own.Go(func() { client.keepAlive(o.Alive) })
	return client, nil
}

// explain turns an error of the library into one that names the cause and, where
// one is known, the remedy.
func explain(to Target, keys *keys, check *hostKeyCheck, err error) error {
	var known *Error
	switch {
	case check.refused != nil: // the library keeps only its text
		err = check.refused
		if errors.As(err, &known) {
			return &Error{fmt.Errorf("ssh to %s: %w", to, err), known.hint}
		}
	case keys.failed != nil:
		err = keys.failed
	case strings.Contains(err.Error(), "unable to authenticate"): // it has no type
		return &Error{fmt.Errorf("ssh to %s: no key of ours is accepted for user %s%s", to.Address(), to.User, keys.tried()), keys.hint()}
	}
	return &Error{fmt.Errorf("ssh to %s: %w", to, err), ""}
}

func notInTime(err error, timeout time.Duration) error {
	if errors.Is(err, context.DeadlineExceeded) {
		return fmt.Errorf("no answer within %s", timeout)
	}
	return err
}

func ignoreClosed(err error) error {
	if errors.Is(err, net.ErrClosed) {
		return nil
	}
	return err
}

// keepAlive asks the far side whether it is there and cuts the connection when no
// answer comes.
func (c *Client) keepAlive(every time.Duration) {
	if every <= 0 {
		every = defaultAlive
	}
	tick := time.NewTicker(every)
	defer tick.Stop()
	for {
		select {
		case <-c.ended:
			return
		case <-tick.C:
		}
		limit := time.AfterFunc(2*every, func() { _ = c.ssh.Close() }) // the request then fails
		_, _, err := c.ssh.SendRequest("keepalive@openssh.com", true, nil)
		limit.Stop()
		if err != nil {
			return
		}
	}
}

// Close ends the connection and everything that goes through it.
func (c *Client) Close() error {
	c.mu.Lock()
	again := c.closed
	c.closed = true
	c.mu.Unlock()
	if again {
		return nil
	}
	close(c.ended)
	err := c.ssh.Close()
	c.own.Wait()
	if err = notEOF(ignoreClosed(err)); err != nil { // either: the far side was faster
		return fmt.Errorf("close the connection to %s: %w", c.target, err)
	}
	return nil
}
