package node

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"flotilla/internal/child"
	"flotilla/internal/nodeconfig"
)

// exitUsage is the exit code of `flotillad store` for settings that are wrong.
const exitUsage = 2

// runStore keeps `flotillad store` running until ctx ends. When the cluster has
// no need of this member, or does not want it, the node goes on as a client.
func (n *node) runStore(ctx context.Context) error {
	self, err := os.Executable()
	if err != nil {
		return fmt.Errorf("find this program's own path: %w", err)
	}
	var code int
	err = child.Run(ctx, child.Config{
		Name: "store", Argv: append([]string{self}, n.cfg.storeArgs()...), Env: withoutSettings(os.Environ()),
		LogFile: filepath.Join(n.cfg.Data, "store.log"), PidFile: filepath.Join(n.cfg.Data, "store.pid"), Logger: n.log,
		GiveUp: func(exit int) bool {
			code = exit
			return exit == nodeconfig.ExitEnoughVoters || exit == nodeconfig.ExitRemoved || exit == exitUsage
		},
	})
	switch {
	case !errors.Is(err, child.ErrGiveUp) || code == exitUsage:
		return err
	case code == nodeconfig.ExitRemoved:
		n.troubles.set("store", "this node's member was removed from the store's cluster; to join again, stop the node and move "+filepath.Join(n.cfg.Data, "store")+" and store.member beside it away")
		n.log.Warn("this node's member was removed from the store; going on as a client")
	default:
		n.log.Info("the store has enough members; going on as a client", "endpoints", strings.Join(n.client.Endpoints(), ","))
	}
	<-ctx.Done()
	return nil
}

// storeArgs returns the arguments of `flotillad store` that give it the same
// settings that this node has.
func (c *settings) storeArgs() []string {
	args := []string{"store", "--name", c.Name, "--address", c.Address, "--data", c.Data,
		"--store-client-port", strconv.Itoa(c.StoreClientPort), "--store-peer-port", strconv.Itoa(c.StorePeerPort),
		"--log-level", c.LogLevel, "--log-format", "json"}
	if c.Insecure {
		args = append(args, "--insecure")
	}
	for _, j := range c.Join {
		args = append(args, "--join", j)
	}
	return args
}

// withoutSettings leaves our own variables out of environ: the arguments say
// all that a child has to know.
func withoutSettings(environ []string) []string {
	var kept []string
	for _, kv := range environ {
		if !strings.HasPrefix(kv, "FLOTILLA_") {
			kept = append(kept, kv)
		}
	}
	return kept
}
