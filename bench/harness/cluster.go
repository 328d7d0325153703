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

	"flotilla/internal/catalog"
	"flotilla/internal/client"
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

	dir     string
	process *Process
	api     *client.Client
}

// Cluster is a few nodes with a store of as many members.
type Cluster struct {
	Nodes []*Node
	Store *clientv3.Client // speaks to the first node's member only
}

// StartCluster starts nodes on 127.<net>.0.1 and following, and returns when all
// route and follow the store. Stop it also when it was not started whole.
func (b *Bench) StartCluster(ctx context.Context, net, nodes int) (*Cluster, error) {
	c := &Cluster{}
	for i := range nodes {
		var args []string
		if i > 0 {
			args = []string{"--join", fmt.Sprintf("127.%d.0.1", net)}
		}
		n, err := b.StartNode(fmt.Sprintf("n%d", i+1), fmt.Sprintf("127.%d.0.%d", net, i+1), args...)
		if err != nil {
			return c, err
		}
		c.Nodes = append(c.Nodes, n)
		if err := n.Wait(ctx, func(st client.NodeStatus) bool { return st.Store.Live && st.Router.Serving }); err != nil {
			return c, err
		}
	}
	var err error
	c.Store, err = clientv3.New(clientv3.Config{Endpoints: []string{c.Endpoint()}, DialTimeout: 5 * time.Second, Logger: zap.NewNop()})
	return c, err
}

// Endpoint is the URL of the first node's store.
func (c *Cluster) Endpoint() string { return "http://" + c.Nodes[0].Store() }

// Store is where the node's member of the store listens, ip:port.
func (n *Node) Store() string { return fmt.Sprintf("%s:%d", hostOf(n.Address), storePort) }

func hostOf(address string) string { return address[:len(address)-len(fmt.Sprintf(":%d", httpPort))] }

// Stop stops all nodes, the last one first.
func (c *Cluster) Stop() error {
	var errs []error
	if c.Store != nil {
		errs = append(errs, c.Store.Close())
	}
	for i := range c.Nodes {
		errs = append(errs, c.Nodes[len(c.Nodes)-1-i].Stop())
	}
	return errors.Join(errs...)
}

// StartNode starts one node; further arguments are added to those that give it
// its name and address. A name that was used before finds its data again.
func (b *Bench) StartNode(name, address string, args ...string) (*Node, error) {
	n := &Node{Name: name, Address: fmt.Sprintf("%s:%d", address, httpPort), dir: filepath.Join(b.Dir, name)}
	socket := filepath.Join(b.Dir, name+".sock")
	args = append([]string{"node", "--units", "off", "--name", name, "--address", address, "--data", n.dir, "--socket", socket,
		"--http-port", fmt.Sprint(httpPort), "--https-port", "8443", "--dns-port", "8053", "--dns-upstream", "none",
		"--store-client-port", fmt.Sprint(storePort), "--host-ports", "listeners", "--haproxy", b.HAProxy}, args...)
	n.Started = time.Now()
	var err error
	n.process, err = Start(filepath.Join(b.Dir, name+".log"), filepath.Join(filepath.Dir(b.Binary), "flotillad"), args...)
	n.api = client.Dial(socket)
	return n, err
}

// Stop ends the node, with its HAProxy and store.
func (n *Node) Stop() error {
	if n.process == nil {
		return nil
	}
	return n.process.Stop()
}

// Wait returns when the node's status is as ok wants it.
func (n *Node) Wait(ctx context.Context, ok func(client.NodeStatus) bool) error {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Minute)
	defer cancel()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for {
		st, err := n.api.Status(ctx)
		if err == nil && ok(st) {
			return nil
		}
		select {
		case <-tick.C:
		case <-n.process.ended:
			return fmt.Errorf("node %s ended: %w: %s", n.Name, n.process.err, lastLine(n.dir+".log"))
		case <-ctx.Done():
			return fmt.Errorf("node %s: %w (last seen: %v, %+v)", n.Name, ctx.Err(), err, st.Router)
		}
	}
}

// lastLine returns the last line of a log, or why it cannot be read.
func lastLine(path string) string {
	raw, err := os.ReadFile(path)
	if err != nil {
		return err.Error()
	}
	lines := strings.Split(strings.TrimSpace(string(raw)), "\n")
	return lines[len(lines)-1]
}

// Applied returns when the node's router runs revision.
func (n *Node) Applied(ctx context.Context, revision int64) error {
	return n.Wait(ctx, func(st client.NodeStatus) bool { return st.Router.Applied >= revision })
}

// settled is longer than a router waits between two reloads.
const settled = 7 * time.Second

// Settle returns when every router runs revision and has not reloaded HAProxy
// for a while: what a bulk change caused is over.
func (c *Cluster) Settle(ctx context.Context, revision int64) error {
	g, ctx := errgroup.WithContext(ctx)
	for _, n := range c.Nodes {
		g.Go(func() error {
			var reloads uint64
			var since time.Time
			return n.Wait(ctx, func(st client.NodeStatus) bool {
				if st.Router.Applied < revision || st.Router.Reloads != reloads || since.IsZero() {
					reloads, since = st.Router.Reloads, time.Now()
				}
				return time.Since(since) >= settled
			})
		})
	}
	return g.Wait()
}

// Reloads returns how often the routers have reloaded HAProxy, all together.
func (c *Cluster) Reloads(ctx context.Context) (int, error) {
	sum := 0
	for _, n := range c.Nodes {
		st, err := n.api.Status(ctx)
		if err != nil {
			return 0, fmt.Errorf("node %s: %w", n.Name, err)
		}
		sum += int(st.Router.Reloads)
	}
	return sum, nil
}

// Costs is what the processes of a node have used.
type Costs struct{ Node, HAProxy, Store Usage }

// Costs reads what the node's processes have used until now.
func (n *Node) Costs() (c Costs, err error) {
	if c.Node, err = ProcessUsage(n.process.Pid, false); err != nil {
		return c, err
	}
	pid, err := pidFile(filepath.Join(n.dir, "router", "haproxy.pid"))
	if err != nil {
		return c, err
	}
	if c.HAProxy, err = ProcessUsage(pid, true); err != nil {
		return c, err
	}
	if pid, err = pidFile(filepath.Join(n.dir, "store.pid")); err == nil {
		c.Store, err = ProcessUsage(pid, false)
		return c, err
	}
	return c, nil // a node with an external store
}

// txnKeys is below the 128 operations that etcd takes in one transaction.
const txnKeys = 100

// PutServices writes services svc<from> to svc<to-1>, each with endpoints as
// endpoint gives them, and returns the store's revision after the last.
func (c *Cluster) PutServices(ctx context.Context, from, to int, endpoint func(service, n int) string) (int64, error) {
	return c.PutAll(ctx, from, to, func(i int) []clientv3.Op {
		return ServiceOps(ServiceName(i), endpoint(i, 1), endpoint(i, 2), endpoint(i, 3))
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

// ServiceOps writes an HTTP service with endpoints 1, 2 and so on.
func ServiceOps(name string, endpoints ...string) []clientv3.Op {
	ops := []clientv3.Op{clientv3.OpPut(catalog.Prefix+name+"/scheme", "http")}
	for i, e := range endpoints {
		ops = append(ops, clientv3.OpPut(EndpointKey(name, fmt.Sprint(i+1)), e))
	}
	return ops
}

// EndpointKey is the key of one endpoint of a service.
func EndpointKey(service, n string) string { return catalog.Prefix + service + "/hosts/" + n }
