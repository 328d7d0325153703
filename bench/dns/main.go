// Command dns is the server that bench/dns/run.sh measures: internal/dns with a
// catalog of its own making, and nothing else of a node.
package main

import (
	"context"
	"flag"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"os/signal"
	"syscall"
	"time"

	"flotilla/internal/catalog"
	"flotilla/internal/dns"
)

func main() {
	listen := flag.String("listen", "127.0.54.1:5300", "address to serve")
	upstream := flag.String("upstream", "", "address of an upstream")
	services := flag.Int("services", 10000, "services in the catalog, three endpoints each")
	flag.Parse()
	if err := run(*listen, *upstream, *services); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run(listen, upstream string, services int) error {
	addr, err := netip.ParseAddrPort(listen)
	if err != nil {
		return err
	}
	cfg := dns.Config{Listen: []netip.AddrPort{addr}, Address: []netip.Addr{netip.MustParseAddr("10.9.0.1")}, Node: "n1"}
	if upstream != "" {
		u, err := netip.ParseAddrPort(upstream)
		if err != nil {
			return err
		}
		cfg.Upstreams = []netip.AddrPort{u}
	}
	batch := catalog.Batch{Revision: 1, Reset: true, Now: time.Now()}
	put := func(key, value string) {
		batch.Keys = append(batch.Keys, catalog.KeyValue{Key: catalog.Prefix + key, Value: value, CreateRevision: 1, ModRevision: 1})
	}
	for i := range services {
		name := fmt.Sprintf("svc%d", i)
		put(name+"/scheme", "http")
		for e := range 3 {
			put(fmt.Sprintf("%s/hosts/%d", name, e), fmt.Sprintf("10.%d.%d.%d:8000", e+1, i/250, i%250+1))
		}
	}
	feed := catalog.NewFeed()
	feed.Publish(catalog.NewBuilder(catalog.Policy{}).Apply(batch))
	server, err := dns.New(cfg, feed, slog.New(slog.NewTextHandler(os.Stderr, nil)))
	if err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	return server.Run(ctx)
}
