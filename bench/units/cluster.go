package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"flotilla/bench/harness"
)

const templateName = "bench@.service"

// cluster is the containers that a measurement is about.
type cluster struct {
	bench *harness.Bench
	name  string
	nodes []node
}

// node is one of them, as flotilla cluster status -o json has it.
type node struct {
	Name      string `json:"name"`
	Address   string `json:"address"`
	MachineID string `json:"machine_id"`
	Run       string `json:"run"`
}

// sleep is how long units sleep; no other process on the host sleeps as long.
func (c *cluster) sleep() string { return strconv.Itoa(5_000_000 + os.Getpid()) }

func (c *cluster) unitText() string {
	return "[Unit]\nDescription=Unit %i of the benchmark\n[Service]\nExecStart=/bin/sleep " + c.sleep() + "\n"
}

// cli runs a command of flotilla that has to succeed.
func (c *cluster) cli(ctx context.Context, args ...string) error {
	_, err := output(exec.CommandContext(ctx, c.bench.Binary, args...))
	return err
}

func output(cmd *exec.Cmd) (string, error) {
	var out, complaint bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &complaint
	if err := cmd.Run(); err != nil {
		args := strings.Join(cmd.Args, " ")
		return "", fmt.Errorf("%.100s: %w: %s", args, err, strings.TrimSpace(complaint.String()))
	}
	return out.String(), nil
}

func countLines(s string) int { return strings.Count(s, "\n") }

func (c *cluster) up(ctx context.Context, nodes int) error {
	return c.cli(ctx, "cluster", "up", c.name, "--nodes", strconv.Itoa(nodes), "--timeout", "5m")
}

// down removes the cluster, also after the run was interrupted.
func (c *cluster) down() error {
	return c.cli(context.Background(), "cluster", "down", "--keep=false", c.name)
}

func (c *cluster) refresh(ctx context.Context) error {
	out, err := output(exec.CommandContext(ctx, c.bench.Binary, "cluster", "status", c.name, "-o", "json"))
	if err != nil {
		return err
	}
	return json.Unmarshal([]byte(out), &c.nodes)
}

// shell runs a script on a node and returns what it prints.
func (c *cluster) shell(ctx context.Context, n node, script string) (string, error) {
	return output(exec.CommandContext(ctx, c.bench.Binary, "cluster", "shell", "--cluster", c.name, n.Name, script))
}

// everywhere runs a script on all nodes at once.
func (c *cluster) everywhere(ctx context.Context, script func(i int) string) ([]string, error) {
	outs := make([]string, len(c.nodes))
	g, gctx := errgroup.WithContext(ctx)
	for i, n := range c.nodes {
		g.Go(func() (err error) {
			outs[i], err = c.shell(gctx, n, script(i))
			return err
		})
	}
	return outs, g.Wait()
}

// floor is what systemd alone needs for n units, on all nodes at once. What it
// was asked to do counts from the first line that a script prints.
func (c *cluster) floor(ctx context.Context, n int) (t trial, err error) {
	share := func(i int) int { return (n + len(c.nodes) - 1 - i) / len(c.nodes) }
	prepare := func(i int) string {
		return fmt.Sprintf("systemctl stop flotilla-node; rm -rf /run/floor; mkdir /run/floor; cd /run/floor; for i in $(seq %d); do cat >floor$i.service <<'END'\n%sEND\ndone",
			share(i), c.unitText())
	}
	if _, err := c.everywhere(ctx, prepare); err != nil {
		return t, err
	}
	defer func() {
		_, again := c.everywhere(context.WithoutCancel(ctx), func(int) string { return "rm -rf /run/floor; systemctl start flotilla-node" })
		err = errors.Join(err, again)
		if err == nil {
			err = c.joined(ctx)
		}
	}()
	w, err := c.watch()
	if err != nil {
		return t, err
	}
	said, done := make(chan error, 1), time.Time{}
	var starts []string
	began := time.Now()
	go func() {
		var err error
		starts, err = c.everywhere(ctx, func(int) string {
			return "date +%s.%N; cd /run/floor; systemctl link --runtime $PWD/*.service 2>/dev/null; systemctl daemon-reload; systemctl start --no-block $(ls)"
		})
		done = time.Now()
		said <- err
	}()
	first, up, err := w.until(ctx, began, n, upLimit)
	if err = errors.Join(err, <-said); err != nil {
		return t, err
	}
	late, err := earliest(starts, began)
	if err != nil {
		return t, err
	}
	t.first, t.up, t.returned = first-late, up-late, done.Sub(began).Seconds()-late
	began = time.Now()
	_, err = c.everywhere(ctx, func(int) string {
		return "date +%s.%N; cd /run/floor; systemctl stop $(ls); systemctl disable --runtime $(ls) 2>/dev/null; systemctl daemon-reload"
	})
	if err != nil {
		return t, err
	}
	_, t.gone, err = w.until(ctx, began, 0, upLimit)
	return t, err
}

// earliest returns the seconds from began to the earliest of times that scripts
// have printed as their first line.
func earliest(outs []string, began time.Time) (float64, error) {
	least := 0.0
	for i, out := range outs {
		line, _, _ := strings.Cut(out, "\n")
		seconds, fraction, _ := strings.Cut(line, ".")
		s, err := strconv.ParseInt(seconds, 10, 64)
		if err != nil {
			return 0, err
		}
		ns, err := strconv.ParseInt(fraction, 10, 64)
		if err != nil {
			return 0, err
		}
		if after := time.Unix(s, ns).Sub(began).Seconds(); i == 0 || after < least {
			least = after
		}
	}
	return least, nil
}

// joined waits until all nodes are machines of the cluster.
func (c *cluster) joined(ctx context.Context) error {
	deadline := time.Now().Add(upLimit)
	for {
		out, err := output(exec.CommandContext(ctx, c.bench.Binary, "list-machines", "--cluster", c.name, "--no-legend"))
		if err == nil && countLines(out) == len(c.nodes) {
			return nil
		}
		if time.Now().After(deadline) {
			return errors.Join(errors.New("not all nodes are back"), err)
		}
		if err := harness.Pause(ctx, 200*time.Millisecond); err != nil {
			return err
		}
	}
}

// counts is what the store has done.
type counts struct{ puts, txns, proposals float64 }

func (c counts) minus(o counts) counts {
	return counts{c.puts - o.puts, c.txns - o.txns, c.proposals - o.proposals}
}

func (c counts) String() string {
	return fmt.Sprintf("%.0f writes (raft proposals), %.0f transactions, %.0f keys put", c.proposals, c.txns, c.puts)
}

// counted asks the first node's member of the store: every member does all.
func (c *cluster) counted(ctx context.Context) (n counts, err error) {
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+c.nodes[0].Address+":2379/metrics", nil)
	if err != nil {
		return n, err
	}
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		return n, err
	}
	var text bytes.Buffer
	_, err = text.ReadFrom(response.Body)
	if err = errors.Join(err, response.Body.Close()); err != nil {
		return n, err
	}
	into := map[string]*float64{"etcd_mvcc_put_total": &n.puts, "etcd_mvcc_txn_total": &n.txns, "etcd_server_proposals_applied_total": &n.proposals}
	for line := range strings.Lines(text.String()) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), " ")
		if at := into[name]; at != nil {
			if *at, err = strconv.ParseFloat(value, 64); err != nil {
				return n, fmt.Errorf("metrics of the store: %s: %w", name, err)
			}
			delete(into, name)
		}
	}
	if len(into) > 0 {
		return n, fmt.Errorf("metrics of the store lack %d of those that are needed", len(into))
	}
	return n, nil
}

// reading is what was used so far; node and store by node.
type reading struct {
	counts      counts
	node, store []time.Duration
}

// system is what starts units on a cluster.
type system struct {
	cluster *cluster
	dir     string // of the template
}

func (s *system) command(ctx context.Context, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, s.cluster.bench.Binary, args...)
	cmd.Env, cmd.Dir = append(os.Environ(), "FLOTILLA_CLUSTER="+s.cluster.name), s.dir
	return cmd
}

func (s *system) output(ctx context.Context, args ...string) (string, error) {
	return output(s.command(ctx, args...))
}

func names(n int) []string {
	list := make([]string, n)
	for i := range list {
		list[i] = strings.Replace(templateName, "@", "@"+strconv.Itoa(i+1), 1)
	}
	return list
}

// start starts n units and waits until their processes are there and the
// command has returned.
func (s *system) start(ctx context.Context, n int) (t trial, err error) {
	before, err := s.cluster.counted(ctx)
	if err != nil {
		return t, err
	}
	w, err := s.cluster.watch()
	if err != nil {
		return t, err
	}
	var ended sync.WaitGroup
	var failed error
	began := time.Now()
	ended.Go(func() {
		_, failed = s.output(ctx, append([]string{"start", "--timeout", "3m"}, names(n)...)...)
		t.returned = time.Since(began).Seconds()
	})
	first, up, err := w.until(ctx, began, n, upLimit)
	ended.Wait()
	if err = errors.Join(err, failed); err != nil {
		return t, err
	}
	t.first, t.up = first, up
	if err := s.settle(ctx); err != nil {
		return t, err
	}
	after, err := s.cluster.counted(ctx)
	t.writes = after.minus(before)
	return t, err
}

// trial starts n units and destroys them.
func (s *system) trial(ctx context.Context, n int) (trial, error) {
	t, err := s.start(ctx, n)
	if err != nil {
		return t, fmt.Errorf("start %d units: %w", n, err)
	}
	w, err := s.cluster.watch()
	if err != nil {
		return t, err
	}
	var ended sync.WaitGroup
	var failed error
	began := time.Now()
	ended.Go(func() { _, failed = s.output(ctx, append([]string{"destroy"}, names(n)...)...) })
	_, t.gone, err = w.until(ctx, began, 0, upLimit)
	ended.Wait()
	if err = errors.Join(err, failed); err != nil {
		return t, fmt.Errorf("destroy %d units: %w", n, err)
	}
	return t, s.clear(ctx)
}

// settle waits until the store has not been written to for two seconds.
func (s *system) settle(ctx context.Context) error {
	last, since := counts{}, time.Now()
	for began := time.Now(); time.Since(since) < 2*time.Second; {
		now, err := s.cluster.counted(ctx)
		if err != nil {
			return err
		}
		if now.puts != last.puts {
			last, since = now, time.Now()
		}
		if time.Since(began) > upLimit {
			return fmt.Errorf("the store is still written to after %s", upLimit)
		}
		if err := harness.Pause(ctx, 100*time.Millisecond); err != nil {
			return err
		}
	}
	return nil
}

// clear destroys what is there and waits until nothing is.
func (s *system) clear(ctx context.Context) error {
	for began := time.Now(); ; {
		files, err := s.output(ctx, "list-unit-files", "--no-legend", "--fields", "unit")
		if err != nil {
			return err
		}
		units, err := s.output(ctx, "list-units", "--no-legend", "--fields", "unit")
		if err != nil {
			return err
		}
		if files+units == "" {
			return nil
		}
		if list := strings.Fields(files); len(list) > 0 {
			if _, err := s.output(ctx, append([]string{"destroy"}, list...)...); err != nil {
				return err
			}
		}
		if time.Since(began) > upLimit {
			return fmt.Errorf("units are still there %s after they were destroyed", upLimit)
		}
		if err := harness.Pause(ctx, 100*time.Millisecond); err != nil {
			return err
		}
	}
}

// reading reads what the daemons on all nodes and the store have used.
func (s *system) reading(ctx context.Context) (r reading, err error) {
	if r.counts, err = s.cluster.counted(ctx); err != nil {
		return r, err
	}
	for _, n := range s.cluster.nodes {
		for verb, list := range map[string]*[]time.Duration{"node": &r.node, "store": &r.store} {
			pid, err := processOf(n, verb)
			if err != nil {
				return r, err
			}
			u, err := harness.ProcessUsage(pid, false)
			if err != nil {
				return r, err
			}
			*list = append(*list, u.CPU)
		}
	}
	return r, nil
}

// processOf returns the process on the host that runs flotilla with this verb
// in a node.
func processOf(n node, verb string) (int, error) {
	lines, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		return 0, err
	}
	for _, path := range lines {
		line, err := os.ReadFile(path)
		if err != nil || !bytes.HasPrefix(line, []byte("/usr/local/bin/flotilla\x00"+verb+"\x00")) {
			continue // ended, or another
		}
		dir := filepath.Dir(path)
		id, err := os.ReadFile(dir + "/root/etc/machine-id")
		if err == nil && strings.TrimSpace(string(id)) == n.MachineID {
			return strconv.Atoi(filepath.Base(dir))
		}
	}
	return 0, fmt.Errorf("node %s runs no flotilla %s", n.Name, verb)
}
