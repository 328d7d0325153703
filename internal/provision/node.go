package provision

import (
	"context"
	"errors"
	"net"
	"net/http"
	"slices"
	"time"

	"flotilla/internal/client"
	"flotilla/internal/wire"
)

// socket is where a node's API listens on its machine.
const socket = "/run/flotilla/node.sock"

// API returns a client of the node of that name.
func (c *Cluster) API(name string) *client.Client {
	return client.Over("node "+name, func(ctx context.Context) (net.Conn, error) { return c.Dial(ctx, name, socket) })
}

// Node is one node of the cluster as it is now.
type Node struct {
	Machine
	State   string `json:"state"`             // joined, joining, off or incomplete
	Missing string `json:"missing,omitempty"` // until it has joined
}

// Nodes asks every node about itself and the others.
func (c *Cluster) Nodes(ctx context.Context) ([]Node, error) {
	machines, err := c.List(ctx)
	if err != nil {
		return nil, err
	}
	nodes := make([]Node, len(machines))
	at := map[string]*Node{} // of those that run
	var running []string
	for i, m := range machines {
		nodes[i] = Node{Machine: m, State: "off"}
		if !m.Complete {
			nodes[i].State = "incomplete"
		}
		if m.Running {
			running, at[m.Name] = append(running, m.Name), &nodes[i]
		}
	}
	return nodes, each(running, func(name string) error {
		n := at[name]
		n.State, n.Missing = "joined", missing(ctx, c.API(name), running)
		if n.Missing != "" {
			n.State = "joining"
		}
		return nil
	})
}

// missing returns what the node lacks to be part of a cluster of these nodes;
// empty if nothing.
func missing(ctx context.Context, node *client.Client, nodes []string) string {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	st, err := client.Get[wire.Status](ctx, node, "/v1/status", nil)
	switch {
	case err != nil:
		return "its API does not answer"
	case !st.Store.Live:
		return "it has not reached the store"
	case st.Router == nil || !st.Router.Serving:
		return "its router does not serve"
	}
	seen, err := client.Get[wire.Nodes](ctx, node, "/v1/nodes", nil)
	if err != nil {
		return "it cannot list the nodes"
	}
	for _, name := range nodes {
		if !slices.ContainsFunc(seen.Nodes, func(n wire.Node) bool { return n.Name == name && n.Serving }) {
			return "it does not see " + name
		}
	}
	return ""
}

// How long a store may take to be healthy enough to let a member go.
const leaveLimit = time.Minute

// Leave removes the machine's member from the store, by way of another node. That
// it has none is no error.
func (c *Cluster) Leave(ctx context.Context, name string) error {
	machines, err := c.List(ctx)
	if err != nil {
		return err
	}
	at := slices.IndexFunc(machines, func(m Machine) bool { return m.Name == name })
	if at < 0 {
		return ErrNotFound
	}
	address := machines[at].Address.String()
	others := slices.DeleteFunc(machines, func(m Machine) bool { return m.Name == name || !m.Running })
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for began := time.Now(); ; {
		err := errors.New("no other node runs")
		for _, m := range others {
			if err = c.removeMember(ctx, m.Name, address); err == nil {
				return nil
			}
		}
		// etcd counts a member that has started a few seconds ago as absent.
		if !is(err, wire.CodeConflict) || time.Since(began) > leaveLimit {
			return err
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return err
		}
	}
}

// removeMember asks a node to remove the member at the address, if there is one.
func (c *Cluster) removeMember(ctx context.Context, node, address string) error {
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	err := c.API(node).Do(ctx, http.MethodDelete, "/v1/store/members/"+address, nil, nil, nil)
	if is(err, wire.CodeNotFound) {
		return nil
	}
	return err
}

// is reports whether a node has answered with an error of that code.
func is(err error, code wire.Code) bool {
	var answer *wire.Error
	return errors.As(err, &answer) && answer.Code == code
}
