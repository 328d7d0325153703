package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"flotilla/bench/harness"
)

// machines are three machines that run units.
type machines struct {
	*story
	harness.Machines
}

// The sample units: three web servers and three clocks. Of the web servers each
// machine has one, by itself: they are spread.
const (
	template  = "examples/units/web@.service"
	wanted    = "'examples/units/web@{1..3}' 'examples/units/clock@{1..3}'"
	instances = 6
)

func newMachines(s *story, place int) (world, error) {
	m := &machines{story: s, Machines: harness.Machines{Binary: s.binary, Name: "demo"}}
	if place > 1 {
		m.Name = fmt.Sprintf("demo%d", place)
	}
	return m, m.Down() // what a demo that was killed has left
}

func (m *machines) remove() error {
	m.say("\nRemoving the cluster.")
	return m.Down()
}

// flotilla shows and runs commands that ask the cluster.
func (m *machines) flotilla(ctx context.Context, commands ...string) error {
	for _, args := range commands {
		if _, err := m.run(ctx, m.binary+" "+args); err != nil {
			return err
		}
	}
	return nil
}

func (m *machines) up(ctx context.Context) (nodes []*node, err error) {
	m.step("Three machines")
	m.say("  Each is a container with a Debian of its own: systemd, journal, disk, address,")
	m.say("  and on it a store (etcd), a router (HAProxy) and a DNS server.")
	if _, err := m.run(ctx, m.binary+" cluster up "+m.Name+" --timeout 5m"); err != nil {
		return nil, fmt.Errorf("%w: %w", errNoMachines, err)
	}
	if err := m.Refresh(ctx); err != nil {
		return nil, err
	}
	for _, n := range m.Nodes {
		nodes = append(nodes, &node{name: n.Name, addr: n.Address, ports: map[string]int{"http-port": 80, "balancer-port": 9180}})
	}
	m.command("export FLOTILLA_CLUSTER=" + m.Name)
	if err := os.Setenv("FLOTILLA_CLUSTER", m.Name); err != nil {
		return nil, err
	}
	return nodes, m.listed(ctx)
}

// listed waits until all machines are there, and shows them.
func (m *machines) listed(ctx context.Context) error {
	if err := harness.Listed(ctx, len(m.Nodes), m.Command); err != nil {
		return err
	}
	return m.flotilla(ctx, "nodes list")
}

func (m *machines) serve(ctx context.Context) ([]kind, error) {
	m.step("Six units from two templates")
	if _, err := m.run(ctx, "sed '/^#/d' "+template); err != nil {
		return nil, err
	}
	began := time.Now()
	if err := m.flotilla(ctx, "start "+wanted); err != nil {
		return nil, err
	}
	m.say("  All run after %s.", took(time.Since(began)))
	return []kind{kept, byHost}, m.flotilla(ctx, "list-units --fields unit,node,active,sub", "explain web@1", "journal --lines 6 'web@*' 'clock@*'")
}

func (m *machines) looks(n *node) [][2]string {
	return [][2]string{
		{"curl -sS -H 'Host: web.example.com' " + n.url("/"), "web@"},
		{"dig +short @" + n.addr + " web.local", n.addr},
	}
}

// backendDies tells nothing: systemd starts a unit again that dies, which is not
// about routers.
func (m *machines) backendDies(context.Context) error { return nil }

func (m *machines) killRouter(ctx context.Context, n *node) error {
	return m.flotilla(ctx, "cluster shell "+n.name+" 'systemctl kill --signal=KILL flotilla-haproxy'")
}

func (m *machines) killNode(ctx context.Context, n *node) error {
	return m.flotilla(ctx, "cluster power "+n.name+" cut")
}

func (m *machines) after(ctx context.Context, dead *node, began time.Time) error {
	m.say("  Its endpoint is still in the store: the routers repeat elsewhere what it refuses.")
	m.say("  After 12 s of silence the machine counts as dead, and its units start elsewhere.")
	if err := m.unitsOn(ctx, dead.name); err != nil {
		return err
	}
	m.say("  %s", m.paint(green, fmt.Sprintf("All units ran on the other two machines %s after the cut.", took(time.Since(began)))))
	list, err := m.Flotilla(ctx, "list-unit-files", "--no-legend", "--fields", "unit,reason")
	if err != nil {
		return err
	}
	// One that is where it is because its machine went.
	lines := slices.Collect(strings.Lines(list))
	moved := slices.IndexFunc(lines, func(l string) bool { return strings.Contains(l, "gone") })
	name, _, _ := strings.Cut(lines[max(moved, 0)], "\t")
	return m.flotilla(ctx, "list-units --fields unit,node,active,sub", "explain "+name)
}

// unitsOn waits until all instances run, none of them on the node without.
func (m *machines) unitsOn(ctx context.Context, without string) error {
	return until(ctx, "all units to run elsewhere than on "+without, func() error {
		out, err := m.Flotilla(ctx, "list-units", "--no-legend", "--fields", "node,active,unit")
		if err != nil {
			return err
		}
		there := map[string]bool{}
		for line := range strings.Lines(out) {
			if f := strings.Fields(line); len(f) == 3 && f[0] != without && f[1] == "active" {
				there[f[2]] = true
			}
		}
		if len(there) < instances {
			return fmt.Errorf("%d of %d do", len(there), instances)
		}
		return nil
	})
}

func (m *machines) start(ctx context.Context, n *node) error {
	return m.flotilla(ctx, "cluster power "+n.name+" on")
}

func (m *machines) back(ctx context.Context, _ *node, _ time.Time) error {
	if err := m.listed(ctx); err != nil {
		return err
	}
	m.say("  What runs stays where it is, unless somebody wants it otherwise:")
	if err := m.flotilla(ctx, "rebalance --yes"); err != nil {
		return err
	}
	err := until(ctx, "the units to have moved", func() error {
		out, err := m.Flotilla(ctx, "rebalance")
		if err == nil && !strings.HasPrefix(out, "Nothing") {
			err = errors.New("some are not there yet")
		}
		return err
	})
	if err != nil {
		return err
	}
	return m.unitsOn(ctx, "none")
}

func (m *machines) drain(ctx context.Context, n *node) error {
	began := time.Now()
	if err := m.flotilla(ctx, "nodes drain "+n.name+" --reason 'new disk'"); err != nil {
		return err
	}
	if err := m.unitsOn(ctx, n.name); err != nil {
		return err
	}
	m.say("  All units ran on the other two machines after %s.", took(time.Since(began)))
	return nil
}

func (m *machines) undrain(ctx context.Context, n *node) error {
	return m.flotilla(ctx, "nodes undrain "+n.name)
}

func (m *machines) tryNext() [][2]string {
	return [][2]string{
		{"which cluster this shell asks", "export FLOTILLA_CLUSTER=" + m.Name},
		{"the web service", "curl -H 'Host: web.local' " + m.nodes[0].url("/")},
		{"what runs where", m.binary + " list-units"},
		{"why it is there", m.binary + " explain web@2"},
		{"what all of them say", m.binary + " journal -f 'web@*'"},
		{"more of them", m.binary + " start '" + strings.TrimSuffix(template, ".service") + "{4..6}'"},
		{"one elsewhere", m.binary + " move clock@2 n2"},
		{"restart, stop, remove", m.binary + " restart web@1; " + m.binary + " stop web@1; " + m.binary + " destroy web@1"},
		{"another power failure", m.binary + " cluster power n2 cut"},
		{"and its end", m.binary + " cluster power n2 on"},
		{"one more machine", m.binary + " cluster add " + m.Name},
		{"a shell on one", m.binary + " cluster shell n3"},
		{"the service in detail", m.binary + " services explain web"},
		{"fleet's own command", m.binary + " cluster shell n1 fleetctl list-units"},
	}
}
