package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"golang.org/x/term"

	"flotilla/internal/client"
	"flotilla/internal/remote"
)

// farSocket is the API's socket on the other side of a tunnel.
const farSocket = "/run/flotilla/node.sock"

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
	r.sshTimeout = 10
	fl.StringVar(&r.endpoint, "endpoint", "", "where the API is: unix:///PATH or http://HOST:PORT; instead of --socket")
	fl.StringVar(&r.tunnel, "tunnel", "", "reach the node through ssh by way of [USER@]HOST[:PORT]; of several, the first that answers")
	fl.StringVar(&r.username, "ssh-username", "", "user on the other side of ssh (default: the same as here; root in a cluster on this machine)")
	fl.Var((*seconds)(&r.sshTimeout), "ssh-timeout", "seconds until an ssh connection has to be there")
	fl.BoolVar(&r.strict, "strict-host-key-checking", true, "verify the keys of hosts that ssh connects to")
	fl.StringVar(&r.knownHosts, "known-hosts-file", "", "the keys of hosts that are known (default: ~/.config/flotilla/known_hosts and ~/.ssh/known_hosts)")
	fl.StringSliceVar(&r.identities, "ssh-identity", nil, "file of a private key for ssh, beside those of the agent and in ~/.ssh (repeatable)")
}

var reachNames = []string{"endpoint", "tunnel", "ssh-username", "ssh-timeout", "strict-host-key-checking", "known-hosts-file", "ssh-identity"}

// reachNode makes dial lead to where the flags say. It reports whether they say
// anything.
func (c *cli) reachNode(cmd *cobra.Command) (bool, error) {
	fl := cmd.Flags()
	for _, name := range reachNames {
		f, variable := fl.Lookup(name), "FLOTILLA_"+strings.ToUpper(strings.ReplaceAll(name, "-", "_"))
		if value := os.Getenv(variable); f != nil && !f.Changed && value != "" {
			if err := f.Value.Set(value); err != nil { // fl.Set would speak of a flag that nobody gave
				return false, Usage(fmt.Sprintf("%s=%q: %v", variable, value, err), cmd.CommandPath()+" --help")
			}
		}
	}
	endpoint := c.reach.endpoint
	switch {
	case endpoint == "" && c.reach.tunnel == "":
		return false, nil
	case endpoint != "" && fl.Changed("socket"):
		return false, Usage("--endpoint and --socket say the same thing twice", cmd.CommandPath()+" --help")
	case endpoint == "" && fl.Changed("socket"):
		endpoint = "unix://" + c.socket
	case endpoint == "":
		endpoint = "unix://" + farSocket
	}
	if _, err := c.reach.entries(); err != nil {
		return false, Usage("--tunnel: "+err.Error(), cmd.CommandPath()+" --help")
	}
	dial, err := c.reach.dialer(endpoint)
	if err != nil {
		return false, Usage(fmt.Sprintf("--endpoint %q: %v", endpoint, err), "write unix:///run/flotilla/node.sock or http://10.0.0.1:9180")
	}
	where := endpoint
	if c.reach.tunnel != "" {
		where += " by way of " + c.reach.tunnel
	}
	there := client.Over(where, dial)
	c.connect = func() *client.Client { return there }
	return true, nil
}

// forwarder is the command that joins its input and output with a socket of the
// machine on which it runs.
func (r *reach) forwarder() string {
	if r.fleet {
		return "fleetctl fd-forward"
	}
	return "flotilla fd-forward"
}

// entries returns the nodes to try; none if there is no tunnel.
func (r *reach) entries() ([]remote.Target, error) {
	if r.tunnel == "" {
		return nil, nil
	}
	var targets []remote.Target
	for _, text := range strings.Split(r.tunnel, ",") {
		to, err := remote.ParseTarget(strings.TrimSpace(text), remote.DefaultPort)
		if err != nil {
			return nil, err
		}
		targets = append(targets, to)
	}
	return targets, nil
}

// entry returns the connection to the entry node, which is opened once and ends
// with the program.
func (r *reach) entry(ctx context.Context) (*remote.Client, error) {
	r.entering.Lock()
	defer r.entering.Unlock()
	if r.entered != nil {
		return r.entered, nil
	}
	targets, err := r.entries()
	if err != nil {
		return nil, err
	}
	var failed []error
	for _, to := range targets {
		client, err := remote.Dial(ctx, to, r.sshOptions())
		if err == nil {
			r.entered = client
			return client, nil
		}
		failed = append(failed, err)
		if errors.Is(err, remote.ErrHostKey) {
			break // another entry node would only hide it
		}
	}
	return nil, errors.Join(failed...)
}

// far connects through the entry node to what an endpoint names.
func (r *reach) far(ctx context.Context, network, address string) (net.Conn, error) {
	entry, err := r.entry(ctx)
	if err != nil {
		return nil, err
	}
	if network == "unix" {
		return entry.DialUnix(ctx, address, r.forwarder())
	}
	return entry.DialTCP(ctx, address)
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
		User: r.username, Timeout: time.Duration(r.sshTimeout * float64(time.Second)),
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
