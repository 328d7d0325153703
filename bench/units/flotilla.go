package main

import (
	"context"
	"os"
	"os/exec"
)

// flotilla is our own daemons, as the nodes run them.
type flotilla struct{ cluster *cluster }

func (f flotilla) command(ctx context.Context, args ...string) *exec.Cmd {
	if args[0] == "start" {
		args = append([]string{"start", "--timeout", "3m"}, args[1:]...)
	}
	cmd := exec.CommandContext(ctx, f.cluster.bench.Binary, args...)
	cmd.Env, cmd.Dir = append(os.Environ(), "FLOTILLA_CLUSTER="+f.cluster.name), f.cluster.bench.Dir
	return cmd
}

// store is the first node's member: every member does all.
func (f flotilla) store() (string, []metric) {
	return "http://" + f.cluster.nodes[0].Address + ":2379/metrics", []metric{
		{"etcd_server_proposals_applied_total", "writes (raft proposals)"},
		{"etcd_mvcc_txn_total", "transactions"},
		{"etcd_mvcc_put_total", "keys put"},
	}
}

func (f flotilla) processes() (nodes, stores []int, err error) {
	for _, n := range f.cluster.nodes {
		node, err := processOf(n, "/usr/local/bin/flotillad", "node")
		if err != nil {
			return nil, nil, err
		}
		store, err := processOf(n, "/usr/local/bin/flotillad", "store")
		if err != nil {
			return nil, nil, err
		}
		nodes, stores = append(nodes, node), append(stores, store)
	}
	return nodes, stores, nil
}
