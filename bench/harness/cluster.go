package harness

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
	"golang.org/x/sync/errgroup"
)

// Ports of every node; each has an address of its own.
const (
	httpPort  = 8080
	storePort = 2379
)

// Node is one running node.
type Node struct {
	Name    string
	Address string // HTTP, ip:port
	Started time.Time

	ip, dir string
	process *Process
}

// Status is what benchmarks read of a node's GET /v1/status.
type Status struct {
	Store  struct{ Live bool }
	Router struct {
		Serving bool
		Applied int64
		Reloads int
	}
}

// Up reports whether the node routes and follows the store.
func (st Status) Up() bool { return st.Store.Live && st.Router.Serving }

// Cluster is a few nodes; the first three are also members of the store.
type Cluster struct {
	Nodes []*Node
	Store *clientv3.Client // speaks to the first node's member only
}

// members is the most members that a store has.
const members = 3

// StartCluster starts nodes on 127.<net>.0.1 and following, the members of the
// store one after the other and then all others at once. It returns when all route
// and follow the store. Stop it also when it was not started whole.
func (b *Bench) StartCluster(ctx context.Context, net, nodes int) (*Cluster, error) {
	c := &Cluster{}
	for i := range nodes {
		var args []string
		if i > 0 {
			args = []string{"--join", fmt.Sprintf("127.%d.0.1", net)}
		}
		n, err := b.StartNode(fmt.Sprintf("n%d", i+1), fmt.Sprintf("127.%d.0.%d", net, i+1), args...)
		c.Nodes = append(c.Nodes, n)
		if err == nil && i < members {
			err = n.Wait(ctx, Status.Up)
		}
		if err != nil {
			return c, err
		}
	}
	for _, n := range c.Nodes {
		if err := n.Wait(ctx, Status.Up); err != nil {
			return c, err
		}
	}
	var err error
	c.Store, err = clientv3.New(clientv3.Config{Endpoints: []string{c.Endpoint()}, DialTimeout: 5 * time.Second, Logger: zap.NewNop()})
	return c, err
}

// Endpoint is the URL of the first node's store.
func (c *Cluster) Endpoint() string { return "http://" + c.Nodes[0].Store() }

// Members are the nodes with a member of the store.
func (c *Cluster) Members() []*Node { return c.Nodes[:min(members, len(c.Nodes))] }

// Store is where the node's member of the store listens, ip:port.
func (n *Node) Store() string { return fmt.Sprintf("%s:%d", n.ip, storePort) }

// Stop stops all nodes, the last one first, and removes their data.
func (c *Cluster) Stop() error {
	var errs []error
	if c.Store != nil {
		errs = append(errs, c.Store.Close())
	}
	for i := range c.Nodes {
		n := c.Nodes[len(c.Nodes)-1-i]
		errs = append(errs, n.Stop(), os.RemoveAll(n.dir))
	}
	return errors.Join(errs...)
}

// StartNode starts one node; further arguments are added to those that give it
// its name and address. A name that was used before finds its data again.
func (b *Bench) StartNode(name, ip string, args ...string) (*Node, error) {
	n := &Node{Name: name, Address: fmt.Sprintf("%s:%d", ip, httpPort), Started: time.Now(), ip: ip, dir: filepath.Join(b.Dir, name)}
	args = append([]string{"node", "--units", "off", "--name", name, "--address", ip, "--data", n.dir, "--socket", n.Socket(),
		"--http-port", fmt.Sprint(httpPort), "--https-port", "8443", "--dns-port", "8053", "--dns-upstream", "none",
		"--store-client-port", fmt.Sprint(storePort), "--host-ports", "listeners", "--haproxy", b.HAProxy}, args...)
	var err error
	n.process, err = Start(n.dir+".log", Daemon(b.Binary), args...)
	return n, err
}

// Daemon is flotillad, which is beside flotilla.
func Daemon(flotilla string) string { return filepath.Join(filepath.Dir(flotilla), "flotillad") }

// Socket is that of the node's API.
func (n *Node) Socket() string { return n.dir + ".sock" }

// Stop ends the node, with its HAProxy and store.
func (n *Node) Stop() error {
	if n.process == nil {
		return nil
	}
	return n.process.Stop()
}

// Status asks the node for its status.
func (n *Node) Status(ctx context.Context) (st Status, err error) {
	err = Ask(ctx, n.Socket(), "GET", "/v1/status", nil, &st)
	return st, err
}

// Wait returns when the node's status is as ok wants it.
func (n *Node) Wait(ctx context.Context, ok func(Status) bool) error {
	ctx, cancel := n.process.While(ctx)
	defer cancel()
	err := Until(ctx, 5*time.Minute, 10*time.Millisecond, "node "+n.Name, func() error {
		st, err := n.Status(ctx)
		if err == nil && !ok(st) {
			err = fmt.Errorf("last seen: %+v", st)
		}
		return err
	})
	if err != nil {
		err = fmt.Errorf("%w: %s", err, LastLine(n.dir+".log"))
	}
	return err
}

// LastLine returns the last line of a log, or why it cannot be read.
func LastLine(path string) string {
	raw, err := os.ReadFile(path)
	if err != nil {
		return err.Error()
	}
	text := strings.TrimSpace(string(raw))
	return text[strings.LastIndexByte(text, '\n')+1:]
}

// Applied returns when the node's router runs revision.
func (n *Node) Applied(ctx context.Context, revision int64) error {
	return n.Wait(ctx, func(st Status) bool { return st.Router.Applied >= revision })
}

// settled is longer than a router waits between two reloads.
const settled = 7 * time.Second

// Settle returns when every router runs revision and has not reloaded HAProxy
// for a while: what a bulk change caused is over.
func (c *Cluster) Settle(ctx context.Context, revision int64) error {
	g, ctx := errgroup.WithContext(ctx)
	for _, n := range c.Nodes {
		g.Go(func() error {
			var reloads int
			var since time.Time
			return n.Wait(ctx, func(st Status) bool {
				if st.Router.Applied < revision || st.Router.Reloads != reloads || since.IsZero() {
					reloads, since = st.Router.Reloads, time.Now()
				}
				return time.Since(since) >= settled
			})
		})
	}
	return g.Wait()
}

// txnKeys is below the 128 operations that etcd takes in one transaction.
const txnKeys = 100

// PutServices writes services svc<from> to svc<to-1>, each with endpoints as
// endpoint gives them, and returns the store's revision after the last.
func (c *Cluster) PutServices(ctx context.Context, from, to int, endpoint func(service, n int) string) (int64, error) {
	return c.PutAll(ctx, from, to, func(i int) []clientv3.Op {
		return ServiceOps("", ServiceName(i), endpoint(i, 1), endpoint(i, 2), endpoint(i, 3))
	})
}

// PutAll does what ops returns for from to to-1, as much as possible in one
// transaction, and returns the store's revision after the last.
func (c *Cluster) PutAll(ctx context.Context, from, to int, ops func(i int) []clientv3.Op) (int64, error) {
	var next []clientv3.Op
	var revision int64
	for i := from; i < to; i++ {
		next = append(next, ops(i)...)
		if i < to-1 && len(next)+len(ops(i+1)) <= txnKeys {
			continue
		}
		resp, err := c.Store.Txn(ctx).Then(next...).Commit()
		if err != nil {
			return 0, fmt.Errorf("write %d keys: %w", len(next), err)
		}
		next, revision = next[:0], resp.Header.Revision
	}
	return revision, nil
}

// ServiceName is the name of service i.
func ServiceName(i int) string { return fmt.Sprintf("svc%d", i) }

// ServiceOps writes an HTTP service with endpoints 1, 2 and so on; prefix is before
// its keys if they are for somebody else.
func ServiceOps(prefix, name string, endpoints ...string) []clientv3.Op {
	ops := []clientv3.Op{clientv3.OpPut(prefix+SchemeKey(name), "http")}
	for i, e := range endpoints {
		ops = append(ops, clientv3.OpPut(prefix+EndpointKey(name, fmt.Sprint(i+1)), e))
	}
	return ops
}

// ServiceKeys is the prefix of all keys of a service.
func ServiceKeys(service string) string { return "/services/" + service + "/" }

// SchemeKey is the key that makes a service routable.
func SchemeKey(service string) string { return ServiceKeys(service) + "scheme" }

// EndpointKey is the key of one endpoint of a service.
func EndpointKey(service, n string) string { return ServiceKeys(service) + "hosts/" + n }
