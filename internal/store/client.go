// Package store is the edge to etcd: a client that chooses its own endpoints,
// guarded transactions, a reflector that follows a prefix, keys that live on a
// lease, and the embedded server. It knows etcd and must not know what the keys
// and values mean.
package store

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net/url"
	"slices"
	"strings"
	"sync"
	"time"

	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
)

// What a call may end with. Test with errors.Is.
var (
	// ErrConflict: a condition of Apply did not hold; nothing was written.
	ErrConflict = errors.New("the keys have changed meanwhile")
	// ErrUnknown: the write may or may not have been done, or may still be
	// done a moment later. Read again before writing again.
	ErrUnknown = errors.New("it is unknown whether the write was done")
	// ErrUnavailable: no member answered, or those that did have no quorum.
	ErrUnavailable = errors.New("the store does not answer")
	// ErrCompacted: the revision asked for is older than what the store keeps.
	ErrCompacted = errors.New("the revision is no longer kept by the store")
)

// Deadlines of calls whose context has none, and the size of one page of a list.
const (
	readLimit  = 2 * time.Second
	writeLimit = 5 * time.Second
	pageLimit  = 5 * time.Second
	pageSize   = 5000
	// MaxOps is the highest number of operations, and of conditions, that one
	// Apply may have. It is etcd's default.
	MaxOps = 128
)

// Config says how the store is reached.
type Config struct {
	Endpoints []string     // http://host:port, https://host:port or host:port; at least one
	TLS       *tls.Config  // nil: plain connections
	Local     string       // the endpoint to prefer as long as it answers; "" for none
	Logger    *slog.Logger // required
}

// Client talks to the store. Its methods may be called from any goroutine. It
// works without Run, but only Run keeps it away from members that hang.
type Client struct {
	cfg        Config
	configured []string // cfg.Endpoints with their schemes
	etcd       *clientv3.Client
	log        *slog.Logger
	fresh      freshReads

	mu      sync.Mutex
	members []string // client URLs that the members announce; guarded by mu
	inUse   []string // what clientv3 was given last, best first; guarded by mu
	cluster uint64   // id of the cluster that a configured endpoint last proved; 0 unknown; guarded by mu
}

// KV is one key. CreateRevision is 0 in an Event that deletes it.
type KV struct {
	Key, Value     string
	CreateRevision int64
	ModRevision    int64
}

// Event is one change of a key. When Deleted is set, Value is empty and
// ModRevision is the revision of the deletion.
type Event struct {
	KV
	Deleted bool
}

// Open makes a client. It does not connect: a store that is away shows in the
// first call. Errors are those of the configuration.
func Open(cfg Config) (*Client, error) {
	if len(cfg.Endpoints) == 0 {
		return nil, errors.New("no store endpoint is given: name at least one, such as http://127.0.0.1:2379")
	}
	c := &Client{cfg: cfg, log: cfg.Logger}
	for _, e := range cfg.Endpoints {
		e, err := normalEndpoint(e, cfg.TLS != nil)
		if err != nil {
			return nil, err
		}
		c.configured = append(c.configured, e)
	}
	if cfg.Local != "" {
		local, err := normalEndpoint(cfg.Local, cfg.TLS != nil)
		if err != nil {
			return nil, err
		}
		c.cfg.Local = local
	}
	c.inUse = c.configured
	if i := slices.Index(c.configured, c.cfg.Local); i > 0 {
		c.inUse = append([]string{c.cfg.Local}, slices.Delete(slices.Clone(c.configured), i, i+1)...)
	}
	etcd, err := c.dial(c.inUse...)
	if err != nil {
		return nil, err
	}
	c.etcd = etcd
	return c, nil
}

// normalEndpoint returns the endpoint with its scheme.
func normalEndpoint(endpoint string, secure bool) (string, error) {
	scheme := "http"
	if secure {
		scheme = "https"
	}
	if !strings.Contains(endpoint, "://") {
		endpoint = scheme + "://" + endpoint
	}
	u, err := url.Parse(endpoint)
	switch {
	case err != nil || u.Host == "" || u.Port() == "" || strings.Trim(u.Path, "/") != "":
		return "", fmt.Errorf("store endpoint %q is not of the form %s://host:port", endpoint, scheme)
	case u.Scheme == "https" && !secure:
		return "", fmt.Errorf("store endpoint %s needs certificates and none are configured: give the CA, certificate and key files, or write http://", endpoint)
	case u.Scheme != scheme:
		return "", fmt.Errorf("store endpoint %s is not encrypted although certificates are configured: write %s://%s", endpoint, scheme, u.Host)
	}
	return u.Scheme + "://" + u.Host, nil
}

// dial makes an etcd client for the endpoints, which it tries in their order.
func (c *Client) dial(endpoints ...string) (*clientv3.Client, error) {
	etcd, err := clientv3.New(clientv3.Config{
		Endpoints:            endpoints,
		TLS:                  c.cfg.TLS,
		DialTimeout:          readLimit,
		DialKeepAliveTime:    10 * time.Second,
		DialKeepAliveTimeout: 3 * time.Second,
		Logger:               clientLogger(c.log),
		DialOptions: []grpc.DialOption{
			// clientv3 asks for round robin by its service config, which
			// blocks every n-th call on a member that hangs. Without it
			// gRPC takes the first endpoint that connects.
			grpc.WithDisableServiceConfig(),
			grpc.WithChainUnaryInterceptor(record),
			grpc.WithConnectParams(grpc.ConnectParams{
				Backoff:           backoff.Config{BaseDelay: 100 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: 2 * time.Second},
				MinConnectTimeout: readLimit,
			}),
		},
	})
	if err != nil {
		return nil, fmt.Errorf("open the store at %s: %w", strings.Join(endpoints, ", "), err)
	}
	return etcd, nil
}

// Close ends all connections. Calls that are under way fail.
func (c *Client) Close() error { return c.etcd.Close() }

// Endpoints returns the endpoints in use, the preferred one first.
func (c *Client) Endpoints() []string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Clone(c.inUse)
}

// withLimit gives ctx a deadline unless it has one.
func withLimit(ctx context.Context, limit time.Duration) (context.Context, context.CancelFunc) {
	if _, ok := ctx.Deadline(); ok {
		return ctx, func() {}
	}
	return context.WithTimeout(ctx, limit)
}

// attempts records the attempts of one call. clientv3 tries again until the
// deadline and then returns only that the deadline has passed.
type attempts struct {
	sent bool  // a member may have received it
	err  error // of the last attempt, unless it just ran out of time
}

type attemptsKey struct{}

// recorded returns a context that records the attempts of one unary call.
func recorded(ctx context.Context) (context.Context, *attempts) {
	a := &attempts{}
	return context.WithValue(ctx, attemptsKey{}, a), a
}

// record runs around each attempt.
func record(ctx context.Context, method string, req, reply any, conn *grpc.ClientConn, invoke grpc.UnaryInvoker, opts ...grpc.CallOption) error {
	a, ok := ctx.Value(attemptsKey{}).(*attempts)
	if !ok {
		return invoke(ctx, method, req, reply, conn, opts...)
	}
	var p peer.Peer // stays empty if no connection could be had
	err := invoke(ctx, method, req, reply, conn, append(slices.Clone(opts), grpc.Peer(&p))...)
	if p.Addr != nil {
		a.sent = true
	}
	if err != nil && (p.Addr == nil || codeOf(err) != codes.DeadlineExceeded) {
		a.err = err
	}
	return err
}

// cause returns the error of the last attempt instead of err if err only says that
// the deadline has passed.
func (a *attempts) cause(err error) error {
	if a.err != nil && codeOf(err) == codes.DeadlineExceeded {
		return a.err
	}
	return err
}

// Get reads one key, linearizably. The second result is false if there is no
// such key.
func (c *Client) Get(ctx context.Context, key string) (KV, bool, error) {
	ctx, cancel := withLimit(ctx, readLimit)
	defer cancel()
	ctx, tried := recorded(ctx)
	resp, err := c.etcd.Get(ctx, key)
	if err != nil {
		return KV{}, false, c.explain("read "+key, tried.cause(err))
	}
	if len(resp.Kvs) == 0 {
		return KV{}, false, nil
	}
	return kvOf(resp.Kvs[0]), true, nil
}

// Revision returns the revision of the store, from a linearizable read of key,
// which need not exist.
func (c *Client) Revision(ctx context.Context, key string) (int64, error) {
	f := c.readAlone(ctx, key)
	return f.revision, f.err
}

// List reads all keys that begin with prefix, sorted, as they were at one
// revision, which it returns.
func (c *Client) List(ctx context.Context, prefix string) ([]KV, int64, error) {
	items, head, err := c.list(ctx, prefix, 0)
	return items, head.revision, err
}

// head is what the header of an answer says about its sender.
type head struct {
	cluster  uint64
	revision int64
}

// list reads prefix in pages, as it was at the given revision, or now if that
// is 0. Each page has its own deadline if ctx has none.
func (c *Client) list(ctx context.Context, prefix string, revision int64) ([]KV, head, error) {
	var items []KV
	at := head{revision: revision}
	from, end := prefix, clientv3.GetPrefixRangeEnd(prefix)
	if prefix == "" {
		from = "\x00"
	}
	for {
		pctx, cancel := withLimit(ctx, pageLimit)
		pctx, tried := recorded(pctx)
		resp, err := c.etcd.Get(pctx, from, clientv3.WithRange(end), clientv3.WithLimit(pageSize), clientv3.WithRev(at.revision))
		cancel()
		if err != nil {
			return nil, head{}, c.explain("list "+prefix, tried.cause(err))
		}
		if at.cluster == 0 {
			at.cluster = resp.Header.ClusterId
			if at.revision == 0 {
				at.revision = resp.Header.Revision
			}
		}
		if resp.Header.ClusterId != at.cluster {
			return nil, head{}, fmt.Errorf("list %s: the endpoints %s belong to different clusters (%x and %x): name endpoints of one cluster only",
				prefix, strings.Join(c.Endpoints(), ", "), at.cluster, resp.Header.ClusterId)
		}
		items = slices.Grow(items, len(resp.Kvs))
		for _, kv := range resp.Kvs {
			items = append(items, kvOf(kv))
		}
		if !resp.More {
			return items, at, nil
		}
		from = items[len(items)-1].Key + "\x00"
	}
}

// explain turns an error of the library into one that names the cause and, where
// one is known, the remedy. It is for reads, and for writes that were not done.
func (c *Client) explain(what string, err error) error {
	at := strings.Join(c.Endpoints(), ", ")
	switch {
	case errors.Is(err, rpctypes.ErrCompacted):
		return fmt.Errorf("%s: %w", what, ErrCompacted)
	case errors.Is(err, rpctypes.ErrNoSpace):
		return fmt.Errorf("%s: the store at %s is full: delete what is not needed, then compact, defragment and disarm it with etcdctl", what, at)
	case errors.Is(err, context.Canceled):
		return fmt.Errorf("%s: %w", what, err)
	}
	switch codeOf(err) {
	case codes.DeadlineExceeded, codes.Unavailable:
		return fmt.Errorf("%s: %w at %s: check that most of its members run and can be reached (%s)", what, ErrUnavailable, at, short(err))
	case codes.Unauthenticated, codes.PermissionDenied:
		return fmt.Errorf("%s: the store at %s refuses it: check the certificate and the role of its user (%s)", what, at, short(err))
	}
	return fmt.Errorf("%s: store at %s: %w", what, at, err)
}

// short returns the part of a gRPC error that is of use to people.
func short(err error) string {
	text := err.Error()
	if st, ok := status.FromError(err); ok {
		text = st.Message()
	}
	if _, dialing, ok := strings.Cut(text, "Error while dialing: "); ok {
		text = strings.TrimSuffix(dialing, `"`)
	}
	return text
}

// codeOf returns the gRPC code of an error of clientv3 in any of its forms.
func codeOf(err error) codes.Code {
	var known rpctypes.EtcdError
	switch {
	case errors.As(err, &known):
		return known.Code()
	case errors.Is(err, context.DeadlineExceeded):
		return codes.DeadlineExceeded
	case errors.Is(err, context.Canceled):
		return codes.Canceled
	}
	return status.Code(err)
}

// clientLogger passes clientv3's warnings on, without the one it writes for
// every attempt of every call.
func clientLogger(log *slog.Logger) *zap.Logger {
	return zap.New(&slogCore{log: log, quiet: []string{"retrying of unary invoker failed"}})
}

func kvOf(kv *mvccpb.KeyValue) KV {
	return KV{Key: string(kv.Key), Value: string(kv.Value), CreateRevision: kv.CreateRevision, ModRevision: kv.ModRevision}
}

func eventOf(e *clientv3.Event) Event {
	return Event{KV: kvOf(e.Kv), Deleted: e.Type == clientv3.EventTypeDelete}
}
