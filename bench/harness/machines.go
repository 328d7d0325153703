package harness

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"
)

// Machines is a cluster of containers with a systemd of their own, which flotilla
// cluster makes and removes. That needs root.
type Machines struct {
	Binary string // flotilla
	Name   string
	Nodes  []Machine // as Refresh found them
}

// Machine is one of them, as flotilla cluster status -o json has it.
type Machine struct {
	Name      string `json:"name"`
	Address   string `json:"address"`
	MachineID string `json:"machine_id"`
}

// bootLimit is how long a machine may take to boot, and a cluster to be whole.
const bootLimit = 3 * time.Minute

// Command is a command of flotilla that asks this cluster.
func (m *Machines) Command(ctx context.Context, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, m.Binary, args...)
	cmd.Env = append(os.Environ(), "FLOTILLA_CLUSTER="+m.Name)
	return cmd
}

// Flotilla runs a command of flotilla that has to succeed, and returns what it
// prints.
func (m *Machines) Flotilla(ctx context.Context, args ...string) (string, error) {
	return Output(m.Command(ctx, args...))
}

// Output runs a command that has to succeed, and returns what it prints.
func Output(cmd *exec.Cmd) (string, error) {
	var out, complaint bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &complaint
	if err := cmd.Run(); err != nil {
		return "", fmt.Errorf("%.100s: %w: %s", strings.Join(cmd.Args, " "), err, strings.TrimSpace(complaint.String()))
	}
	return out.String(), nil
}

// Up makes the cluster.
func (m *Machines) Up(ctx context.Context, nodes int) error {
	_, err := m.Flotilla(ctx, "cluster", "up", m.Name, "--nodes", strconv.Itoa(nodes), "--timeout", "5m")
	return err
}

// Down removes the cluster if it is there, also after a Ctrl-C, and in spite of
// further ones.
func (m *Machines) Down() error {
	cmd := m.Command(context.Background(), "cluster", "down", "--keep=false", m.Name)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	_, err := Output(cmd)
	return err
}

// Refresh reads which machines there are.
func (m *Machines) Refresh(ctx context.Context) error {
	out, err := m.Flotilla(ctx, "cluster", "status", m.Name, "-o", "json")
	if err != nil {
		return err
	}
	return json.Unmarshal([]byte(out), &m.Nodes)
}

// Shell is a command that runs a script on a machine.
func (m *Machines) Shell(ctx context.Context, n Machine, script string) *exec.Cmd {
	return m.Command(ctx, "cluster", "shell", n.Name, script)
}

// Everywhere runs a script on all machines at once, and returns what each prints.
func (m *Machines) Everywhere(ctx context.Context, script func(i int) string) ([]string, error) {
	outs := make([]string, len(m.Nodes))
	g, ctx := errgroup.WithContext(ctx)
	for i, n := range m.Nodes {
		g.Go(func() (err error) {
			outs[i], err = Output(m.Shell(ctx, n, script(i)))
			return err
		})
	}
	return outs, g.Wait()
}

// Power switches a machine on or off; "cut" is a power failure. It returns when a
// machine that was switched on has booted.
func (m *Machines) Power(ctx context.Context, n Machine, state string) error {
	if _, err := m.Flotilla(ctx, "cluster", "power", n.Name, state); err != nil || state != "on" {
		return err
	}
	return Until(ctx, bootLimit, 200*time.Millisecond, n.Name+" to boot", func() error {
		_, err := Output(m.Shell(ctx, n, "systemctl is-system-running --wait >/dev/null || true")) // degraded is fine
		return err
	})
}

// Listed waits until client, which is flotilla or the real fleetctl, lists so many
// machines.
func Listed(ctx context.Context, machines int, client func(ctx context.Context, args ...string) *exec.Cmd) error {
	return Until(ctx, bootLimit, 200*time.Millisecond, fmt.Sprintf("%d machines to be listed", machines), func() error {
		list, err := Output(client(ctx, "list-machines", "--no-legend"))
		if n := strings.Count(list, "\n"); err == nil && n != machines {
			err = fmt.Errorf("there are %d", n)
		}
		return err
	})
}
