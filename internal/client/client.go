// Package client is how programs talk to a node: a client for its HTTP API, and what
// the requests and answers about services, nodes and the store look like. It is
// small to start, and so it must not know etcd, metrics, or anything else of what
// answers; nor how answers are shown to people.
package client

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	neturl "net/url"
	"strconv"
	"strings"
	"syscall"
	"time"

	"flotilla/internal/catalog"
)

// CodeNoNode is the code of a Client's own errors: the node was not reached.
const CodeNoNode Code = "no_node"

// Client speaks to the API of one node. Its errors are of type *Error.
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
	return &Client{where, &http.Client{Transport: &http.Transport{DialContext: to}}}
}

// Do sends a request that Client has no method for. in is sent as JSON unless it
// is nil, and the answer is decoded into out unless that is nil.
func (c *Client) Do(ctx context.Context, method, path string, query neturl.Values, in, out any) error {
	return c.do(ctx, method, path, query, in, out)
}

// Stream sends a GET and returns the answer while it comes. The caller closes it.
func (c *Client) Stream(ctx context.Context, path string, query neturl.Values) (io.ReadCloser, error) {
	resp, err := c.send(ctx, http.MethodGet, path, query, nil)
	if err != nil {
		return nil, err
	}
	if resp.StatusCode/100 == 2 {
		return resp.Body, nil
	}
	defer func() { _ = resp.Body.Close() }() // it was read to its end
	raw, err := io.ReadAll(resp.Body)
	if err != nil {
		return nil, c.unreached(err)
	}
	return nil, answered(resp, raw)
}

// send sends one request. Its errors are those of a Client.
func (c *Client) send(ctx context.Context, method, path string, query neturl.Values, in any) (*http.Response, error) {
	var body io.Reader
	if in != nil {
		raw, err := json.Marshal(in)
		if err != nil {
			return nil, Errorf(CodeBadRequest, "", "%v", err)
		}
		body = bytes.NewReader(raw)
	}
	plain, err := neturl.PathUnescape(path)
	if err != nil {
		return nil, Errorf(CodeBadRequest, "", "%v", err)
	}
	u := neturl.URL{Scheme: "http", Host: "node", Path: plain, RawPath: path, RawQuery: query.Encode()}
	req, err := http.NewRequestWithContext(ctx, method, u.String(), body)
	if err != nil {
		return nil, Errorf(CodeBadRequest, "", "%v", err)
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return nil, c.unreached(err)
	}
	return resp, nil
}

// do sends one request and decodes the answer into out.
func (c *Client) do(ctx context.Context, method, path string, query neturl.Values, in, out any) error {
	resp, err := c.send(ctx, method, path, query, in)
	if err != nil {
		return err
	}
	defer func() { _ = resp.Body.Close() }() // it was read to its end
	raw, err := io.ReadAll(resp.Body)
	if err != nil {
		return c.unreached(err)
	}
	if resp.StatusCode/100 != 2 {
		return answered(resp, raw)
	}
	if out == nil {
		return nil
	}
	if err := json.Unmarshal(raw, out); err != nil {
		return Errorf(CodeInternal, "is the node of another version? flotilla status", "the node's answer to %s %s is not understood: %v", method, path, err)
	}
	return nil
}

// answered returns the error that an answer holds. Those of fleet's API have the
// status as their code.
func answered(resp *http.Response, raw []byte) *Error {
	var wrapped struct {
		Error *struct {
			Error
			Code any `json:"code"`
		} `json:"error"`
	}
	if err := json.Unmarshal(raw, &wrapped); err != nil || wrapped.Error == nil {
		e := Errorf(CodeInternal, "", "the node answered %s: %.200s", resp.Status, raw)
		e.Status = resp.StatusCode
		return e
	}
	e := wrapped.Error.Error
	e.Status = resp.StatusCode
	if code, ok := wrapped.Error.Code.(string); ok {
		e.Code = Code(code)
		return &e
	}
	for code, status := range statusOf {
		if status == resp.StatusCode && code != CodeUnknown { // which shares its status
			e.Code = code
		}
	}
	return &e
}

func (c *Client) unreached(err error) *Error {
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
		return Errorf(CodeNoNode, known.Hint(), "%v", err)
	case errors.Is(err, fs.ErrPermission):
		return Errorf(CodeNoNode, "run it with sudo, or as a member of the socket's group", "this user may not open the node's socket %s", c.socket)
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, syscall.ECONNREFUSED):
		return Errorf(CodeNoNode, "is the node running? start it with: flotillad node, or give its --socket PATH", "no node answers on %s", c.socket)
	case errors.Is(err, context.DeadlineExceeded):
		return Errorf(CodeNoNode, "look at the node's log", "the node on %s does not answer in time", c.socket)
	}
	return Errorf(CodeNoNode, "is the node running? start it with: flotillad node, or give its --socket PATH", "the node on %s does not answer: %v", c.socket, err)
}

func servicePath(name string) string { return "/v1/services/" + neturl.PathEscape(name) }

func waitQuery(wait time.Duration) neturl.Values {
	if wait <= 0 {
		return nil
	}
	return neturl.Values{"wait": {wait.String()}}
}

// Status returns the state of the node.
func (c *Client) Status(ctx context.Context) (NodeStatus, error) {
	var st NodeStatus
	err := c.do(ctx, http.MethodGet, "/v1/status", nil, nil, &st)
	return st, err
}

// Services returns all services by name.
func (c *Client) Services(ctx context.Context) ([]ServiceSummary, error) {
	var list []ServiceSummary
	err := c.do(ctx, http.MethodGet, "/v1/services", nil, nil, &list)
	return list, err
}

// Explain returns everything that is known of one service.
func (c *Client) Explain(ctx context.Context, service string) (Explanation, error) {
	var e Explanation
	err := c.do(ctx, http.MethodGet, servicePath(service), nil, nil, &e)
	return e, err
}

// Set changes a service. With wait > 0 it returns when every live node has
// applied it, or with code not_converged after that time.
func (c *Client) Set(ctx context.Context, service string, change Change, wait time.Duration) (Written, error) {
	var w Written
	err := c.do(ctx, http.MethodPut, servicePath(service), waitQuery(wait), change, &w)
	return w, err
}

// Remove deletes a service and all its keys; wait is as for Set.
func (c *Client) Remove(ctx context.Context, service string, wait time.Duration) (Written, error) {
	var w Written
	err := c.do(ctx, http.MethodDelete, servicePath(service), waitQuery(wait), nil, &w)
	return w, err
}

// Problems returns every problem of all services, then the node's own.
func (c *Client) Problems(ctx context.Context) ([]catalog.Problem, error) {
	var list []catalog.Problem
	err := c.do(ctx, http.MethodGet, "/v1/problems", nil, nil, &list)
	return list, err
}

// Nodes returns the live nodes and the members of the store.
func (c *Client) Nodes(ctx context.Context) (Nodes, error) {
	var n Nodes
	err := c.do(ctx, http.MethodGet, "/v1/nodes", nil, nil, &n)
	return n, err
}

// Wait returns when every live node has applied revision, or with code
// not_converged after limit.
func (c *Client) Wait(ctx context.Context, revision int64, limit time.Duration) ([]Applied, error) {
	var w Written
	query := neturl.Values{"revision": {strconv.FormatInt(revision, 10)}, "timeout": {limit.String()}}
	err := c.do(ctx, http.MethodGet, "/v1/wait", query, nil, &w)
	return w.Applied, err
}

// Drain makes the balancer's check of the node answer 503, or 200 again.
func (c *Client) Drain(ctx context.Context, draining bool) error {
	method := http.MethodPost
	if !draining {
		method = http.MethodDelete
	}
	return c.do(ctx, method, "/v1/drain", nil, nil, nil)
}

// Confirm accepts the mass disappearance of endpoints that is held back.
func (c *Client) Confirm(ctx context.Context) (Written, error) {
	var w Written
	err := c.do(ctx, http.MethodPost, "/v1/confirm", nil, nil, &w)
	return w, err
}

// RemoveMember takes the member of that name, ID or address out of the store for good.
// With code conflict the store is not ready for that yet.
func (c *Client) RemoveMember(ctx context.Context, member string) error {
	return c.do(ctx, http.MethodDelete, "/v1/store/members/"+neturl.PathEscape(member), nil, nil, nil)
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
