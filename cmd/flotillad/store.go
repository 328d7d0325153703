package main

import (
	"errors"
	"fmt"
	"os"

	"github.com/spf13/cobra"

	"flotilla/internal/cli"
	"flotilla/internal/node"
	"flotilla/internal/nodeconfig"
	"flotilla/internal/store"
)

func storeCommand() *cobra.Command {
	given := nodeconfig.Default()
	cmd := &cobra.Command{
		Use: "store", Short: "Run the store's member of a node: etcd, in a process of its own",
		Long: fmt.Sprintf(`Run the store's member of a node. flotillad node starts it by itself, unless
--supervise=false leaves that to systemd. It reads the same --config file.

Exit code %d means that the cluster has all members it needs, %d that this member
was removed from it; starting it again is useless then.`, nodeconfig.ExitEnoughVoters, nodeconfig.ExitRemoved),
		Args: cli.Between(0, 0, ""),
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := load(cmd, &given)
			if err != nil {
				return err
			}
			if !cfg.RunsStore() {
				return cli.Usage("--etcd-endpoints names an external etcd, so this node has no store to run", "leave flotilla-store.service out")
			}
			if err := os.MkdirAll(cfg.Data, 0o755); err != nil {
				return fmt.Errorf("create the data directory: %w", err)
			}
			log := newLogger(cmd.ErrOrStderr(), &cfg)
			err = store.Serve(cmd.Context(), node.StoreConfig(&cfg), log, func() {})
			switch {
			case errors.Is(err, store.ErrEnoughVoters):
				return cli.Exit(err, nodeconfig.ExitEnoughVoters)
			case errors.Is(err, store.ErrRemoved):
				return cli.Exit(err, nodeconfig.ExitRemoved)
			}
			return err
		},
	}
	addOptions(cmd, &given, "name", "address", "data", "join", "insecure", "store-client-port", "store-peer-port", "config", "log-level", "log-format")
	return cmd
}
