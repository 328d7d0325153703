package cli

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"strings"
	"sync"
	"syscall"

	"github.com/spf13/pflag"

	"flotilla/internal/client"
	"flotilla/internal/nodeconfig"
	"flotilla/internal/remote"
)

// reach is how the program is told to reach the cluster.
type reach struct {
	fleet                                  bool // by fleetctl's flags
	endpoint, tunnel, username, knownHosts string
	sshTimeout                             float64
	strict                                 bool
	caFile, certFile, keyFile              string
	identities                             []string

	entering sync.Mutex     // guards entered
	entered  *remote.Client // see entry
}

// fleetSocket is where fleetctl looks unless it is told otherwise.
const fleetSocket = "/var/run/fleet.sock"

func (c *cli) fleetEndpointFlags(fl *pflag.FlagSet) {
	r := &c.reach
	r.fleet = true
	fl.StringVar(&r.endpoint, "endpoint", "unix://"+fleetSocket, "where the API is: unix:///PATH or http://HOST:PORT; if this socket is not there, the node's own")
	fl.StringVar(&r.tunnel, "tunnel", "", "reach the API through ssh by way of HOST[:PORT]")
	fl.StringVar(&r.username, "ssh-username", "core", "user on the other side of ssh")
	fl.Float64Var(&r.sshTimeout, "ssh-timeout", 10, "seconds until an ssh connection has to be there")
	fl.BoolVar(&r.strict, "strict-host-key-checking", true, "verify the keys of hosts that ssh connects to")
	fl.StringVar(&r.knownHosts, "known-hosts-file", "~/.fleetctl/known_hosts", "the keys of hosts that are known")
	fl.StringVar(&r.caFile, "ca-file", "", "certificate authority of an https endpoint (PEM)")
	fl.StringVar(&r.certFile, "cert-file", "", "client certificate for an https endpoint (PEM)")
	fl.StringVar(&r.keyFile, "key-file", "", "key of --cert-file (PEM)")
}

// fleetEndpoint makes dial lead to the endpoint.
func (c *cli) fleetEndpoint() error {
	first, more, several := strings.Cut(c.reach.endpoint, ",")
	if several {
		Say(os.Stderr, "multiple endpoints provided but only the first (%s) is used, not %s\n", first, more)
	}
	dial, err := c.reach.dialer(first)
	if err != nil {
		return fleetText("Unable to initialize client: %v", err)
	}
	there := client.Over(first, dial)
	c.connect = func() *client.Client { return there }
	return nil
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

// dialer returns what connects to an endpoint.
func (r *reach) dialer(endpoint string) (func(context.Context) (net.Conn, error), error) {
	u, err := url.Parse(endpoint)
	if err != nil {
		return nil, err
	}
	var d net.Dialer
	switch u.Scheme {
	case "":
		return nil, errors.New("URL scheme undefined")
	case "unix", "file":
		if u.Host != "" {
			return nil, fmt.Errorf("unable to connect to host %q with scheme %q", u.Host, u.Scheme)
		}
		path := u.Path
		if r.tunnel != "" {
			return func(ctx context.Context) (net.Conn, error) { return r.far(ctx, "unix", path) }, nil
		}
		path = presentSocket(path)
		return func(ctx context.Context) (net.Conn, error) { return d.DialContext(ctx, "unix", path) }, nil
	case "http", "https":
		address := u.Host
		if u.Port() == "" {
			address = net.JoinHostPort(u.Hostname(), map[string]string{"http": "80", "https": "443"}[u.Scheme])
		}
		plain := func(ctx context.Context) (net.Conn, error) { return d.DialContext(ctx, "tcp", address) }
		if r.tunnel != "" {
			plain = func(ctx context.Context) (net.Conn, error) { return r.far(ctx, "tcp", address) }
		}
		if u.Scheme == "http" {
			return plain, nil
		}
		cfg, err := r.tls(u.Hostname())
		if err != nil {
			return nil, err
		}
		return func(ctx context.Context) (net.Conn, error) {
			conn, err := plain(ctx)
			if err != nil {
				return nil, err
			}
			secure := tls.Client(conn, cfg)
			if err := secure.HandshakeContext(ctx); err != nil {
				return nil, errors.Join(err, conn.Close())
			}
			return secure, nil
		}, nil
	}
	return nil, fmt.Errorf("unable to connect with scheme %q", u.Scheme)
}

func (r *reach) tls(host string) (*tls.Config, error) {
	cfg := &tls.Config{ServerName: host, MinVersion: tls.VersionTLS12}
	if r.caFile != "" {
		pem, err := os.ReadFile(r.caFile)
		if err != nil {
			return nil, err
		}
		cfg.RootCAs = x509.NewCertPool()
		if !cfg.RootCAs.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("%s has no certificate in it", r.caFile)
		}
	}
	if r.certFile != "" || r.keyFile != "" {
		pair, err := tls.LoadX509KeyPair(r.certFile, r.keyFile)
		if err != nil {
			return nil, err
		}
		cfg.Certificates = []tls.Certificate{pair}
	}
	return cfg, nil
}
