package harness

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"
)

// The parts of a node, each with processes of its own.
const (
	NodePart = iota
	HAProxyPart
	StorePart
	parts
)

// PartNames names the parts for reports.
var PartNames = [parts]string{"node", "haproxy", "store"}

// Costs is what nodes have used, by part.
type Costs [parts]Usage

// Costs reads what the node's processes have used until now.
func (n *Node) Costs() (c Costs, err error) {
	if c[NodePart], err = ProcessUsage(n.process.Pid, false); err != nil {
		return c, err
	}
	for part, file := range map[int]string{HAProxyPart: "router/haproxy.pid", StorePart: "store.pid"} {
		pid, err := pidFile(filepath.Join(n.dir, file))
		if err == nil {
			c[part], err = ProcessUsage(pid, part == HAProxyPart)
		}
		if part == StorePart && errors.Is(err, os.ErrNotExist) {
			err = nil // it has no member of the store
		}
		if err != nil {
			return c, err
		}
	}
	return c, nil
}

// Costs reads what all nodes have used until now, added up.
func (c *Cluster) Costs() (sum Costs, err error) {
	for _, n := range c.Nodes {
		costs, err := n.Costs()
		if err != nil {
			return sum, err
		}
		for part, u := range costs {
			sum[part] = sum[part].plus(u)
		}
	}
	return sum, nil
}

// Span is what a cluster did and used in a while.
type Span struct {
	Length  time.Duration
	Reloads int     // of HAProxy
	Writes  float64 // to the store: raft proposals

	Before, After Costs // of all nodes
}

// Cores is how many cores a part used.
func (s Span) Cores(part int) float64 {
	return (s.After[part].CPU - s.Before[part].CPU).Seconds() / s.Length.Seconds()
}

// writesMetric counts what the store's members agree on; every member counts all.
const writesMetric = "etcd_server_proposals_applied_total"

// During measures the cluster while do runs.
func (c *Cluster) During(ctx context.Context, do func() error) (s Span, err error) {
	read := func() (reloads int, writes float64, costs Costs, err error) {
		for _, n := range c.Nodes {
			st, err := n.Status(ctx)
			if err != nil {
				return 0, 0, costs, fmt.Errorf("node %s: %w", n.Name, err)
			}
			reloads += st.Router.Reloads
		}
		metrics, err := Metrics(ctx, c.Endpoint()+"/metrics")
		if err != nil {
			return 0, 0, costs, err
		}
		costs, err = c.Costs()
		return reloads, metrics[writesMetric], costs, err
	}
	reloads, writes, before, err := read()
	if err != nil {
		return s, err
	}
	began := time.Now()
	if err := do(); err != nil {
		return s, err
	}
	took := time.Since(began)
	more, written, after, err := read()
	return Span{took, more - reloads, written - writes, before, after}, err
}

// Changed prints what a cluster used at rest and while there were changes: CPU
// and memory of each part, of all nodes together.
func (b *Bench) Changed(rest, busy Span, changes int) {
	for part, name := range PartNames {
		per := (busy.Cores(part) - rest.Cores(part)) * busy.Length.Seconds() * 1000 / float64(changes)
		b.Printf("%-8s %6.2f ms of CPU per change (n %d)  at rest %.2f %% of a core  memory %.0f at rest, %.0f after changes, %.0f at most\n",
			name, per, changes, rest.Cores(part)*100, busy.Before[part].RSS, busy.After[part].RSS, busy.After[part].Peak)
	}
	b.Printf("writes   %.1f to the store per change; %.0f in %.0f s at rest\n", busy.Writes/float64(changes), rest.Writes, rest.Length.Seconds())
}
