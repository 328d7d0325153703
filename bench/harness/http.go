package harness

import (
	"bufio"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"syscall"
	"time"
)

// Endpoint is an HTTP server that answers every request with its own name.
type Endpoint struct {
	Address string // ip:port
	server  *http.Server
}

// endpointPort is free on addresses that nobody else uses.
const endpointPort = 9000

// EndpointAddress returns ip:port number n of the addresses 127.<net>.x.y.
func EndpointAddress(net, n int) string {
	ip := netip.AddrFrom4([4]byte{127, byte(net), byte(n/250 + 1), byte(n%250 + 1)})
	return netip.AddrPortFrom(ip, endpointPort).String()
}

// Serve starts an endpoint. Its address is not to be used twice.
func Serve(address, name string) (*Endpoint, error) {
	l, err := net.Listen("tcp", address)
	if err != nil {
		return nil, fmt.Errorf("start endpoint %s: %w", name, err)
	}
	s := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		_, _ = io.WriteString(w, name) // the router sees it if that fails
	})}
	go func() { _ = s.Serve(l) }() // returns when it is closed
	return &Endpoint{address, s}, nil
}

// Close closes the listener and every connection at once, as a process that
// ends does.
func (e *Endpoint) Close() error { return e.server.Close() }

// Client is an HTTP client without mercy: one connection, no second attempt.
type Client struct {
	Address   string        // ip:port
	Path      string        // that is asked for; empty: /
	KeepAlive bool          // use a connection for many requests
	Limit     time.Duration // of one request; 0: requestLimit
	Opened    time.Time     // when it began to open its last connection

	conn net.Conn
	in   *bufio.Reader
}

// requestLimit is longer than anything that a router waits for.
const requestLimit = 15 * time.Second

// Do sends one request without a body and returns the status and the answer. It
// opens a connection if none is left. A status with an error is that of an answer
// that has broken off.
func (c *Client) Do(method, host string) (int, string, error) {
	limit := cmp.Or(c.Limit, requestLimit)
	if c.conn == nil {
		c.Opened = time.Now()
		conn, err := net.DialTimeout("tcp", c.Address, limit)
		if err != nil {
			return 0, "", err
		}
		c.conn, c.in = conn, bufio.NewReader(conn)
	}
	if err := c.conn.SetDeadline(time.Now().Add(limit)); err != nil {
		return 0, "", err
	}
	status, body, stays, err := c.exchange(method, host)
	if err != nil || !stays || !c.KeepAlive {
		c.Close()
	}
	return status, body, err
}

// Open reports whether there is a connection that the other side has not closed.
func (c *Client) Open() bool {
	socket, ok := c.conn.(syscall.Conn)
	if !ok {
		return false
	}
	raw, err := socket.SyscallConn()
	if err != nil {
		return false
	}
	open := false
	err = raw.Read(func(fd uintptr) bool {
		// Nothing to read, and nobody has hung up.
		_, _, err := syscall.Recvfrom(int(fd), make([]byte, 1), syscall.MSG_PEEK|syscall.MSG_DONTWAIT)
		open = errors.Is(err, syscall.EAGAIN)
		return true
	})
	return err == nil && open
}

func (c *Client) exchange(method, host string) (status int, answer string, stays bool, err error) {
	extra := ""
	if !c.KeepAlive {
		extra = "Connection: close\r\n"
	}
	if method == http.MethodPost {
		extra += "Content-Length: 0\r\n"
	}
	if _, err := fmt.Fprintf(c.conn, "%s %s HTTP/1.1\r\nHost: %s\r\n%s\r\n", method, cmp.Or(c.Path, "/"), host, extra); err != nil {
		return 0, "", false, err
	}
	resp, err := http.ReadResponse(c.in, nil)
	if err != nil {
		return 0, "", false, err
	}
	body, err := io.ReadAll(resp.Body)
	return resp.StatusCode, string(body), !resp.Close, err
}

// Close closes the connection, if there is one.
func (c *Client) Close() {
	if c.conn != nil {
		_ = c.conn.Close() // nothing is waiting to be sent
		c.conn = nil
	}
}

// Until asks for host again and again until the answer is 200 and want, or any
// text if want is "", and returns when it was.
func (c *Client) Until(ctx context.Context, host, want string) (time.Time, error) {
	return c.until(ctx, host, func(status int, body string) bool {
		return status == http.StatusOK && (want == "" || body == want)
	})
}

// UntilGone asks for host again and again until there is an answer other than
// 200, and returns when it was.
func (c *Client) UntilGone(ctx context.Context, host string) (time.Time, error) {
	return c.until(ctx, host, func(status int, _ string) bool { return status != http.StatusOK })
}

func (c *Client) until(ctx context.Context, host string, ok func(status int, body string) bool) (time.Time, error) {
	for {
		status, body, err := c.Do(http.MethodGet, host)
		if err == nil && ok(status, body) {
			return time.Now(), nil
		}
		select {
		case <-ctx.Done():
			return time.Time{}, fmt.Errorf("%s at %s: %w (last answer: %d %.60q %v)", host, c.Address, ctx.Err(), status, body, err)
		case <-time.After(200 * time.Microsecond):
		}
	}
}
