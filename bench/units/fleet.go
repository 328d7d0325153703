package main

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"flotilla/bench/harness"
)

const (
	fleetPass    = 5 * time.Second // of its agents
	fleetBlocks  = 100             // most units to start with a command that waits
	fleetBinary  = "/run/bench/fleetd"
	fleetPort    = "49153"
	fleetStorage = "_coreos.com/fleet"
)

// programs are the paths of what fleet consists of.
type programs struct{ daemon, client, etcd string }

func (p programs) given() bool { return p.daemon != "" }

// find makes the paths absolute.
func (p *programs) find() error {
	if *p == (programs{}) {
		return nil
	}
	for name, path := range map[string]*string{"fleetd": &p.daemon, "fleetctl": &p.client, "etcd": &p.etcd} {
		found, err := exec.LookPath(*path)
		if err == nil {
			found, err = filepath.Abs(found)
		}
		if err != nil {
			return fmt.Errorf("fleet needs -fleetd, -fleetctl and -etcd: %s: %w", name, err)
		}
		*path = found
	}
	return nil
}

func (p *programs) describe(ctx context.Context, b *harness.Bench) error {
	client, err := output(exec.CommandContext(ctx, p.client, "version"))
	if err != nil {
		return err
	}
	etcd, err := output(exec.CommandContext(ctx, p.etcd, "--version"))
	if err != nil {
		return err
	}
	_, version, _ := strings.Cut(client, "version ")
	etcd, _, _ = strings.Cut(strings.Replace(etcd, " Version:", "", 1), "\n")
	b.Printf("fleet    %s with default settings on the same nodes, while flotilla-node is stopped; on the host one member of\n", strings.TrimSpace(version))
	b.Printf("         %s with the v2 API, and fleetctl, which asks the first node over HTTP. It waits for what it starts, up to\n", etcd)
	b.Printf("         %d units; it does not for more (--no-block). Starts come at any time between two passes of its agents. Units\n", fleetBlocks)
	b.Printf("         that are not gone %s after they were destroyed are counted, and ended by hand\n", goneLimit)
	return nil
}

// fleet is the real fleetd on every node of a cluster, with an etcd on the host.
type fleet struct {
	programs
	cluster *cluster
	host    string // address of the host in the nodes' network
	process *harness.Process
}

func (f *fleet) command(ctx context.Context, args ...string) *exec.Cmd {
	if args[0] == "start" && len(args)-1 > fleetBlocks {
		args = append([]string{"start", "--no-block"}, args[1:]...)
	}
	endpoint := "http://" + f.cluster.nodes[0].Address + ":" + fleetPort
	cmd := exec.CommandContext(ctx, f.client, append([]string{"--endpoint", endpoint}, args...)...)
	cmd.Dir = f.cluster.bench.Dir
	return cmd
}

// store leaves out raft's proposals: with keys that expire there are two every
// second to let them.
func (f *fleet) store() (string, []metric) {
	return "http://" + f.host + ":2379/metrics", []metric{
		{"etcd_debugging_store_writes_total", "writes"},
		{"etcd_debugging_store_reads_total", "reads"},
	}
}

func (f *fleet) processes() (daemons, stores []int, err error) {
	for _, n := range f.cluster.nodes {
		pid, err := processOf(n, fleetBinary)
		if err != nil {
			return nil, nil, err
		}
		daemons = append(daemons, pid)
	}
	return daemons, []int{f.process.Pid}, nil
}

// up starts fleet in place of our nodes. Take it down also when it was not
// started whole.
func (f *fleet) up(ctx context.Context) error {
	if err := f.cluster.joined(ctx); err != nil {
		return err
	}
	first, err := netip.ParseAddr(f.cluster.nodes[0].Address)
	if err != nil {
		return err
	}
	host := first.As4()
	host[3] = 1
	f.host = netip.AddrFrom4(host).String()
	client, peer := "http://"+f.host+":2379", "http://"+f.host+":2380"
	dir := f.cluster.bench.Dir
	f.process, err = harness.Start(filepath.Join(dir, "etcd.log"), f.etcd, "--enable-v2", "--data-dir", filepath.Join(dir, "etcd"+f.cluster.name),
		"--listen-client-urls", client, "--advertise-client-urls", client,
		"--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer, "--initial-cluster", "default="+peer)
	if err != nil {
		return err
	}
	return f.start(ctx)
}

// start starts the daemons and waits until they know each other.
func (f *fleet) start(ctx context.Context) error {
	for _, n := range f.cluster.nodes {
		if err := f.copyTo(ctx, n); err != nil {
			return err
		}
	}
	_, err := f.cluster.everywhere(ctx, func(i int) string {
		address := f.cluster.nodes[i].Address
		return `systemctl stop flotilla-node
cat >/run/systemd/system/fleetd.socket <<END
[Socket]
ListenStream=` + address + ":" + fleetPort + `
END
cat >/run/systemd/system/fleetd.service <<END
[Unit]
Requires=fleetd.socket
[Service]
Environment=FLEET_ETCD_SERVERS=http://` + f.host + `:2379 FLEET_PUBLIC_IP=` + address + `
ExecStart=` + fleetBinary + `
END
systemctl daemon-reload && systemctl start fleetd.service`
	})
	if err != nil {
		return err
	}
	for began := time.Now(); ; {
		list, err := output(f.command(ctx, "list-machines", "--no-legend"))
		if err == nil && countLines(list) == len(f.cluster.nodes) {
			return nil
		}
		if time.Since(began) > upLimit {
			return errors.Join(errors.New("not all nodes run fleet"), err)
		}
		if err := harness.Pause(ctx, 200*time.Millisecond); err != nil {
			return err
		}
	}
}

// copyTo brings the daemon to a node that lacks it.
func (f *fleet) copyTo(ctx context.Context, n node) (err error) {
	from, err := os.Open(f.daemon)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, from.Close()) }()
	cmd := exec.CommandContext(ctx, f.cluster.bench.Binary, "cluster", "shell", "--cluster", f.cluster.name, n.Name,
		fmt.Sprintf("mkdir -p %s; test -x %s || { cat >%[2]s && chmod +x %[2]s; }", filepath.Dir(fleetBinary), fleetBinary))
	cmd.Stdin = from
	_, err = output(cmd)
	return err
}

// quit ends the daemons at once, as when asked they would end unit after unit,
// then the units, and removes what they have left on the nodes.
func (f *fleet) quit(ctx context.Context, then string) error {
	_, err := f.cluster.everywhere(ctx, func(int) string {
		return `systemctl kill -s KILL fleetd.service 2>/dev/null
systemctl stop fleetd.socket fleetd.service 2>/dev/null
systemctl stop 'bench@*.service'
rm -rf /run/fleet /run/systemd/system/fleetd.* /run/systemd/system/bench@*
systemctl daemon-reload
systemctl reset-failed
` + then
	})
	return err
}

// sweep ends all units by hand and begins anew with nothing in the store.
func (f *fleet) sweep(ctx context.Context) error {
	if err := f.quit(ctx, ""); err != nil {
		return err
	}
	request, err := http.NewRequestWithContext(ctx, http.MethodDelete, "http://"+f.host+":2379/v2/keys/"+fleetStorage+"?recursive=true", nil)
	if err != nil {
		return err
	}
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		return err
	}
	if err := response.Body.Close(); err != nil {
		return err
	}
	if response.StatusCode != http.StatusOK {
		return fmt.Errorf("empty the store of fleet: %s", response.Status)
	}
	return f.start(ctx)
}

// down leaves the nodes to ours again, also after the run was interrupted.
func (f *fleet) down() error {
	ctx := context.Background()
	err := f.quit(ctx, "rm -rf "+filepath.Dir(fleetBinary)+"; systemctl start flotilla-node")
	if f.process != nil {
		err = errors.Join(err, f.process.Stop())
	}
	if err != nil {
		return err
	}
	return f.cluster.joined(ctx)
}
