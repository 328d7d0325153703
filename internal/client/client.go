// Package client is how programs talk to a node: HTTP over a unix socket or over
// whatever else a connection can be made of. It knows the shape of errors; it
// must not know what is asked, nor how answers are shown to people.
package client

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"iter"
	"net"
	"net/http"
	neturl "net/url"
	"strings"
	"syscall"

	"flotilla/internal/wire"
)

// CodeNoNode is the code of a Client's own errors: the node was not reached.
const CodeNoNode wire.Code = "no_node"

// Client speaks to the API of one node. Its errors are of type *wire.Error.
type Client struct {
	socket string
	http   *http.Client
}

// Dial returns a client for the node that serves on a unix socket. It does not
// connect.
func Dial(socket string) *Client {
	return Over(socket, func(ctx context.Context) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", SocketAddress(socket))
	})
}

// SocketAddress returns what the net package takes for the socket of that name. An
// abstract one ("@name") needs no directory that HAProxy's user can enter, and is
// padded with zeros as HAProxy pads it.
func SocketAddress(name string) string {
	const size = 108 // of sun_path
	if strings.HasPrefix(name, "@") && len(name) < size {
		name += strings.Repeat("\x00", size-len(name))
	}
	return name
}

// Over returns a client for the node that dial connects to: through a tunnel, or
// over TCP. Errors call the node by where.
func Over(where string, dial func(ctx context.Context) (net.Conn, error)) *Client {
	to := func(ctx context.Context, _, _ string) (net.Conn, error) { return dial(ctx) }
	return &Client{where, &http.Client{Transport: &http.Transport{DialContext: to, DisableKeepAlives: true}}}
}

// Get asks for path and returns the answer.
func Get[T any](ctx context.Context, c *Client, path string, query neturl.Values) (answer T, err error) {
	err = c.Do(ctx, http.MethodGet, path, query, nil, &answer)
	return answer, err
}

// Lines sends a request and yields the answer line by line while it comes, without
// the empty lines that are signs of life. An error is the last that it yields.
// The answer has ended without one if the node has closed it: whether it was
// complete is to be seen from the lines.
func Lines[T any](ctx context.Context, c *Client, method, path string, query neturl.Values, in any) iter.Seq2[T, error] {
	return func(yield func(T, error) bool) {
		var none T
		resp, err := c.send(ctx, method, path, query, in)
		if err != nil {
			yield(none, err)
			return
		}
		defer func() { _ = resp.Body.Close() }() // it was read as far as anybody wants
		lines := bufio.NewReaderSize(resp.Body, 64<<10)
		for {
			raw, err := lines.ReadBytes('\n')
			switch {
			case err == io.EOF && len(raw) == 0:
				return
			case err != nil:
				yield(none, c.unreached(err))
				return
			case len(raw) == 1:
				continue
			}
			var line T
			if err := json.Unmarshal(raw, &line); err != nil {
				yield(none, notUnderstood(method, path, err))
				return
			}
			if !yield(line, nil) {
				return
			}
		}
	}
}

// Do sends one request. in is sent as JSON unless it is nil, and the answer is
// decoded into out unless that is nil.
func (c *Client) Do(ctx context.Context, method, path string, query neturl.Values, in, out any) error {
	resp, err := c.send(ctx, method, path, query, in)
	if err != nil {
		return err
	}
	defer func() { _ = resp.Body.Close() }() // it was read to its end
	raw, err := io.ReadAll(resp.Body)
	if err != nil {
		return c.unreached(err)
	}
	if out == nil {
		return nil
	}
	if err := json.Unmarshal(raw, out); err != nil {
		return notUnderstood(method, path, err)
	}
	return nil
}

func notUnderstood(method, path string, err error) *wire.Error {
	return wire.Errorf(wire.CodeInternal, "is the node of another version? flotilla status", "the node's answer to %s %s is not understood: %v", method, path, err)
}

// send sends one request and returns the answer unless it is an error.
func (c *Client) send(ctx context.Context, method, path string, query neturl.Values, in any) (*http.Response, error) {
	var body io.Reader
	if in != nil {
		raw, err := json.Marshal(in)
		if err != nil {
			return nil, wire.Errorf(wire.CodeBadRequest, "", "%v", err)
		}
		body = bytes.NewReader(raw)
	}
	plain, err := neturl.PathUnescape(path)
	if err != nil {
		return nil, wire.Errorf(wire.CodeBadRequest, "", "%v", err)
	}
	u := neturl.URL{Scheme: "http", Host: "node", Path: plain, RawPath: path, RawQuery: query.Encode()}
	req, err := http.NewRequestWithContext(ctx, method, u.String(), body)
	if err != nil {
		return nil, wire.Errorf(wire.CodeBadRequest, "", "%v", err)
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return nil, c.unreached(err)
	}
	if resp.StatusCode/100 == 2 {
		return resp, nil
	}
	defer func() { _ = resp.Body.Close() }() // it was read to its end
	raw, err := io.ReadAll(resp.Body)
	if err != nil {
		return nil, c.unreached(err)
	}
	return nil, answered(resp, raw)
}

// answered returns the error that an answer holds. Those of fleet's API have the
// status as their code.
func answered(resp *http.Response, raw []byte) *wire.Error {
	var wrapped struct {
		Error *struct {
			wire.Error
			Code any `json:"code"`
		} `json:"error"`
	}
	if err := json.Unmarshal(raw, &wrapped); err != nil || wrapped.Error == nil {
		e := wire.Errorf(wire.CodeInternal, "", "the node answered %s: %.200s", resp.Status, raw)
		e.Status = resp.StatusCode
		return e
	}
	e := wrapped.Error.Error
	e.Status = resp.StatusCode
	if code, ok := wrapped.Error.Code.(string); ok {
		e.Code = wire.Code(code)
		return &e
	}
	e.Code = wire.CodeOf(resp.StatusCode)
	return &e
}

func (c *Client) unreached(err error) *wire.Error {
	var e *neturl.Error
	if errors.As(err, &e) {
		err = e.Err
	}
	var known interface { // what connects may know better
		error
		Hint() string
	}
	switch {
	case errors.As(err, &known):
		return wire.Errorf(CodeNoNode, known.Hint(), "%v", err)
	case errors.Is(err, fs.ErrPermission):
		return wire.Errorf(CodeNoNode, "run it with sudo, or as a member of the socket's group", "this user may not open the node's socket %s", c.socket)
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, syscall.ECONNREFUSED):
		return wire.Errorf(CodeNoNode, "is the node running? start it with: flotillad node, or give its --socket PATH", "no node answers on %s", c.socket)
	case errors.Is(err, context.DeadlineExceeded):
		return wire.Errorf(CodeNoNode, "look at the node's log", "the node on %s does not answer in time", c.socket)
	}
	return wire.Errorf(CodeNoNode, "is the node running? start it with: flotillad node, or give its --socket PATH", "the node on %s does not answer: %v", c.socket, err)
}

// Ops fetches one of the pages on the operations socket, such as "/readyz".
// ok is false if the node says that the check does not pass.
func (c *Client) Ops(ctx context.Context, path string) (text string, ok bool, err error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://node"+path, nil)
	if err != nil {
		return "", false, fmt.Errorf("read %s: %w", path, err)
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return "", false, c.unreached(err)
	}
	defer func() { _ = resp.Body.Close() }() // it was read to its end
	raw, err := io.ReadAll(resp.Body)
	return string(raw), resp.StatusCode == http.StatusOK, err
}
