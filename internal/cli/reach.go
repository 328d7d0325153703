package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"golang.org/x/term"

	"flotilla/internal/client"
	"flotilla/internal/nodeconfig"
	"flotilla/internal/remote"
)

// reach is how the program is told to reach the cluster.
type reach struct {
	endpoint, tunnel, username, knownHosts string
	sshTimeout                             seconds
	strict                                 bool
	identities                             []string
	tls                                    client.TLS
	forwarder                              string // what joins its input and output with a socket, on the other side

	entering sync.Mutex     // guards entered
	entered  *remote.Client // see entry
}

const (
	farSocket   = "/run/flotilla/node.sock" // of the API on the other side of a tunnel
	fleetSocket = "/var/run/fleet.sock"     // where fleetctl looks unless it is told otherwise
)

// seconds is a flag of seconds: 10, 2.5, or a duration such as 1m.
type seconds float64

func (s *seconds) String() string { return strconv.FormatFloat(float64(*s), 'g', -1, 64) }
func (s *seconds) Type() string   { return "seconds" }

func (s *seconds) Set(text string) error {
	n, err := strconv.ParseFloat(text, 64)
	if d, wrong := time.ParseDuration(text); wrong == nil {
		n, err = d.Seconds(), nil
	}
	if err != nil || !(n > 0 && n <= 3600) { // NaN is neither
		return errors.New("not a number of seconds such as 10")
	}
	*s = seconds(n)
	return nil
}

// reachFlags are the flags that say how a node far away is reached. Each is also
// read from FLOTILLA_ and its name.
func (c *cli) reachFlags(fl *pflag.FlagSet) {
	r := &c.reach
	r.sshTimeout, r.forwarder = 10, "flotilla fd-forward"
	fl.StringVar(&r.endpoint, "endpoint", "", "where the API is: unix:///PATH or http://HOST:PORT; instead of --socket")
	fl.StringVar(&r.tunnel, "tunnel", "", "reach the node through ssh by way of [USER@]HOST[:PORT]; of several, the first that answers")
	fl.StringVar(&r.username, "ssh-username", "", "user on the other side of ssh (default: the same as here; root in a cluster on this machine)")
	fl.Var(&r.sshTimeout, "ssh-timeout", "seconds until an ssh connection has to be there")
	fl.BoolVar(&r.strict, "strict-host-key-checking", true, "verify the keys of hosts that ssh connects to")
	fl.StringVar(&r.knownHosts, "known-hosts-file", "", "the keys of hosts that are known (default: ~/.config/flotilla/known_hosts and ~/.ssh/known_hosts)")
	fl.StringSliceVar(&r.identities, "ssh-identity", nil, "file of a private key for ssh, beside those of the agent and in ~/.ssh (repeatable)")
}

var reachNames = []string{"endpoint", "tunnel", "ssh-username", "ssh-timeout", "strict-host-key-checking", "known-hosts-file", "ssh-identity"}

// fleetReachFlags are those of fleetctl. Each is also read from FLEETCTL_ and its name.
func (c *cli) fleetReachFlags(fl *pflag.FlagSet) {
	r := &c.reach
	r.sshTimeout, r.forwarder = 10, "fleetctl fd-forward"
	fl.StringVar(&r.endpoint, "endpoint", "unix://"+fleetSocket, "where the API is: unix:///PATH or http://HOST:PORT; if this socket is not there, the node's own")
	fl.StringVar(&r.tunnel, "tunnel", "", "reach the API through ssh by way of HOST[:PORT]")
	fl.StringVar(&r.username, "ssh-username", "core", "user on the other side of ssh")
	fl.Var(&r.sshTimeout, "ssh-timeout", "seconds until an ssh connection has to be there")
	fl.BoolVar(&r.strict, "strict-host-key-checking", true, "verify the keys of hosts that ssh connects to")
	fl.StringVar(&r.knownHosts, "known-hosts-file", "~/.fleetctl/known_hosts", "the keys of hosts that are known")
	fl.StringVar(&r.tls.CA, "ca-file", "", "certificate authority of an https endpoint (PEM)")
	fl.StringVar(&r.tls.Cert, "cert-file", "", "client certificate for an https endpoint (PEM)")
	fl.StringVar(&r.tls.Key, "key-file", "", "key of --cert-file (PEM)")
}

// fromEnvironment sets the flags of these names, all for none, that were not given
// from variables such as FLEETCTL_ENDPOINT.
func fromEnvironment(cmd *cobra.Command, fl *pflag.FlagSet, prefix string, names ...string) (err error) {
	fl.VisitAll(func(f *pflag.Flag) {
		variable := prefix + strings.ToUpper(strings.ReplaceAll(f.Name, "-", "_"))
		value := os.Getenv(variable)
		if value == "" || f.Changed || err != nil || len(names) > 0 && !slices.Contains(names, f.Name) {
			return
		}
		if bad := f.Value.Set(value); bad != nil { // the flag set's own Set would speak of a flag that nobody gave
			err = Usage(fmt.Sprintf("%s=%q: %v", variable, value, bad), cmd.CommandPath()+" --help")
		}
	})
	return err
}

// reachNode makes dial lead to where the flags say. It reports whether they say
// anything.
func (c *cli) reachNode(cmd *cobra.Command) (bool, error) {
	if err := fromEnvironment(cmd, cmd.Flags(), "FLOTILLA_", reachNames...); err != nil {
		return false, err
	}
	endpoint, socket := c.reach.endpoint, cmd.Flags().Changed("socket")
	switch {
	case endpoint == "" && c.reach.tunnel == "":
		return false, nil
	case endpoint != "" && socket:
		return false, Usage("--endpoint and --socket say the same thing twice", cmd.CommandPath()+" --help")
	case endpoint == "" && socket:
		endpoint = "unix://" + c.socket
	case endpoint == "":
		endpoint = "unix://" + farSocket
	}
	if _, err := remote.ParseTargets(c.reach.tunnel); err != nil {
		return false, Usage("--tunnel: "+err.Error(), cmd.CommandPath()+" --help")
	}
	where := endpoint
	if c.reach.tunnel != "" {
		where += " by way of " + c.reach.tunnel
	}
	there, err := client.Endpoint(where, endpoint, c.reach.dial, c.reach.tls)
	if err != nil {
		return false, Usage(fmt.Sprintf("--endpoint %q: %v", endpoint, err), "write unix:///run/flotilla/node.sock or http://10.0.0.1:9180")
	}
	c.connect = func() *client.Client { return there }
	return true, nil
}

// reachFleet makes dial lead to fleetctl's endpoint.
func (c *cli) reachFleet() error {
	first, more, several := strings.Cut(c.reach.endpoint, ",")
	if several {
		Say(os.Stderr, "multiple endpoints provided but only the first (%s) is used, not %s\n", first, more)
	}
	there, err := client.Endpoint(first, first, c.reach.dial, c.reach.tls)
	if err != nil {
		return fleetText("Unable to initialize client: %v", err)
	}
	c.connect = func() *client.Client { return there }
	return nil
}

// dial connects, through the entry node if there is a tunnel.
func (r *reach) dial(ctx context.Context, network, address string) (net.Conn, error) {
	if r.tunnel == "" {
		if network == "unix" {
			address = presentSocket(address)
		}
		return new(net.Dialer).DialContext(ctx, network, address)
	}
	entry, err := r.entry(ctx)
	switch {
	case err != nil:
		return nil, err
	case network == "unix":
		return entry.DialUnix(ctx, address, r.forwarder)
	}
	return entry.DialTCP(ctx, address)
}

// presentSocket returns the node's own socket where fleet's is asked for and
// nobody serves it: it may lie there long after fleet was stopped.
func presentSocket(path string) string {
	if path != fleetSocket || !unserved(path) {
		return path
	}
	if s := os.Getenv("FLOTILLA_SOCKET"); s != "" {
		return s
	}
	return nodeconfig.DefaultSocket()
}

// unserved reports whether a socket is not there, or is and nobody listens.
func unserved(path string) bool {
	conn, err := net.Dial("unix", path)
	if err == nil {
		_ = conn.Close() // nothing was said
	}
	return errors.Is(err, os.ErrNotExist) || errors.Is(err, syscall.ECONNREFUSED)
}

// entry returns the connection to the entry node, which is opened once and ends
// with the program.
func (r *reach) entry(ctx context.Context) (*remote.Client, error) {
	r.entering.Lock()
	defer r.entering.Unlock()
	if r.entered != nil {
		return r.entered, nil
	}
	targets, err := remote.ParseTargets(r.tunnel)
	if err == nil {
		r.entered, err = remote.DialFirst(ctx, targets, r.sshOptions())
	}
	return r.entered, err
}

func (r *reach) sshOptions() remote.Options {
	home, err := os.UserHomeDir()
	if err != nil {
		home = "/" // then nothing is found there
	}
	own := filepath.Join(home, ".config", "flotilla", "known_hosts")
	if dir, err := os.UserConfigDir(); err == nil {
		own = filepath.Join(dir, "flotilla", "known_hosts")
	}
	files := []string{own, filepath.Join(home, ".ssh", "known_hosts")}
	if r.knownHosts != "" {
		files = []string{inHome(r.knownHosts, home)}
	}
	o := remote.Options{
		User: r.username, Timeout: time.Duration(float64(r.sshTimeout) * float64(time.Second)),
		HostKeys: remote.HostKeys{Files: files, Ask: askOnStdin, Insecure: !r.strict},
		Agent:    os.Getenv("SSH_AUTH_SOCK"), Defaults: remote.DefaultIdentities(home),
	}
	for _, file := range r.identities {
		o.Identities = append(o.Identities, inHome(file, home))
	}
	if term.IsTerminal(int(os.Stdin.Fd())) {
		o.Passphrase = askPassphrase
	}
	return o
}

func inHome(path, home string) string {
	if rest, ok := strings.CutPrefix(path, "~/"); ok {
		return filepath.Join(home, rest)
	}
	return path
}

// askOnStdin takes one line of the standard input for the answer, from a terminal
// or a script, and leaves what follows to the command.
func askOnStdin(question string) (bool, error) {
	Say(os.Stderr, "%s", question)
	line, one := []byte{}, make([]byte, 1)
	for len(line) < 100 {
		n, err := os.Stdin.Read(one)
		if n == 1 && one[0] != '\n' {
			line = append(line, one[0])
			continue
		}
		if err != nil && !errors.Is(err, io.EOF) {
			return false, err
		}
		if n == 1 || err != nil {
			break
		}
	}
	return strings.EqualFold(strings.TrimSpace(string(line)), "yes"), nil
}

func askPassphrase(file string) (string, error) {
	Say(os.Stderr, "Passphrase of %s: ", file)
	raw, err := term.ReadPassword(int(os.Stdin.Fd()))
	Say(os.Stderr, "\n")
	return string(raw), err
}
