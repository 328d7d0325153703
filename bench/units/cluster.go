package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
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

	floors []float64 // seconds in which systemd alone had the most units up
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

// booted waits until a node that was switched on has done what it does then.
func (c *cluster) booted(ctx context.Context, n node) error {
	for began := time.Now(); ; {
		_, err := c.shell(ctx, n, "systemctl is-system-running --wait >/dev/null || true") // degraded is fine
		if err == nil || time.Since(began) > upLimit {
			return err
		}
		if err := harness.Pause(ctx, 200*time.Millisecond); err != nil {
			return err
		}
	}
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

// processOf returns the process on the host that runs a program in a node;
// command is how its command line begins.
func processOf(n node, command ...string) (int, error) {
	begin := []byte(strings.Join(command, "\x00") + "\x00")
	lines, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		return 0, err
	}
	for _, path := range lines {
		line, err := os.ReadFile(path)
		if err != nil || !bytes.HasPrefix(line, begin) {
			continue // ended, or another
		}
		dir := filepath.Dir(path)
		id, err := os.ReadFile(dir + "/root/etc/machine-id")
		if err == nil && strings.TrimSpace(string(id)) == n.MachineID {
			return strconv.Atoi(filepath.Base(dir))
		}
	}
	return 0, fmt.Errorf("node %s runs no %s", n.Name, strings.Join(command, " "))
}
