// Package provision makes machines and makes them nodes of a cluster: what their
// names are, which node joins which, when a node has joined, and how one leaves.
// It knows the files of a node and the API that nodes answer; it must not know
// any platform: those stand behind Provider.
package provision

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"time"

	"flotilla/internal/nodeconfig"
)

// Provider is the machines that one cluster has on one platform. The program that
// calls a method may be killed at any moment: the next call of Make completes the
// machine, and Destroy removes what there is of it. For a machine that is not there
// Power, Run and Console return ErrNotFound.
type Provider interface {
	// Make makes a machine and starts it, and returns when its systemd runs. A
	// machine that is there is started if it is off, and stays as it was made.
	Make(ctx context.Context, s Spec) (Machine, error)
	// Destroy cuts the machine's power and removes all of it, its disk included. A
	// machine that is not there is no error.
	Destroy(ctx context.Context, name string) error
	// List returns all machines by name, also those that are half made.
	List(ctx context.Context) ([]Machine, error)
	// Power switches the machine and returns when that is done. What the machine
	// has written to its disk stays in any case.
	Power(ctx context.Context, name string, to Power) error
	// Run runs a command line as root, by a shell of the machine; an empty one is a
	// login shell. If it ends with another code than 0, the error has a method
	// ExitCode. Files are read and written through it.
	Run(ctx context.Context, name, command string, std Streams) error
	// Dial connects to a unix socket on the machine.
	Dial(ctx context.Context, name, socket string) (net.Conn, error)
	// Console returns what the machine's console has printed since it was made.
	Console(ctx context.Context, name string) (string, error)
}

// ErrNotFound says that there is no machine or cluster of that name.
var ErrNotFound = errors.New("there is none of that name")

// Power is what is done to a machine's power.
type Power string

// On and off, and what can happen to a machine that is on.
const (
	PowerOn  Power = "on"
	PowerOff Power = "off"    // the machine shuts down; after a while its power is cut
	PowerCut Power = "cut"    // as in a power failure
	Reboot   Power = "reboot" // the machine restarts itself
)

// Spec describes a machine to make.
type Spec struct {
	Name    string            // unique in the cluster; also the host name
	Release string            // what is installed, in the words of the provider; empty: its default
	Labels  map[string]string // kept with the machine, shown by List
	Files   []nodeconfig.File // written before the first boot
}

// Machine is one machine as it is now.
type Machine struct {
	Name      string            `json:"name"`
	Release   string            `json:"release"`
	Address   netip.Addr        `json:"address"`
	MachineID string            `json:"machine_id"` // 32 hexadecimal digits
	Labels    map[string]string `json:"labels,omitempty"`
	Created   time.Time         `json:"created"`
	// Complete is false while the machine is being made or destroyed.
	Complete bool `json:"complete"`
	Running  bool `json:"running"`
	// Run is the directory on this host that the machine has as /run/flotilla; empty
	// if the provider has none.
	Run string `json:"run,omitempty"`
}

// Streams are what a command reads and writes; nil is nothing.
type Streams struct {
	In       io.Reader
	Out, Err io.Writer
}
