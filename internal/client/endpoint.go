package client

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	neturl "net/url"
	"os"
)

// TLS are files of certificates for an https endpoint; "" is none.
type TLS struct {
	CA        string // certificate authority of the endpoint; "": those of the system
	Cert, Key string // of the client
}

// Endpoint returns a client for the node at unix:///PATH, http://HOST:PORT or
// https://HOST:PORT. dial connects, such as through a tunnel; errors call the node
// by where.
func Endpoint(where, endpoint string, dial func(ctx context.Context, network, address string) (net.Conn, error), files TLS) (*Client, error) {
	u, err := neturl.Parse(endpoint)
	if err != nil {
		return nil, err
	}
	network, address := "tcp", u.Host
	switch u.Scheme {
	case "":
		return nil, errors.New("URL scheme undefined")
	case "unix", "file":
		if u.Host != "" {
			return nil, fmt.Errorf("unable to connect to host %q with scheme %q", u.Host, u.Scheme)
		}
		network, address = "unix", u.Path
	case "http", "https":
		if u.Port() == "" {
			address = net.JoinHostPort(u.Hostname(), map[string]string{"http": "80", "https": "443"}[u.Scheme])
		}
	default:
		return nil, fmt.Errorf("unable to connect with scheme %q", u.Scheme)
	}
	plain := func(ctx context.Context) (net.Conn, error) { return dial(ctx, network, address) }
	if u.Scheme != "https" {
		return Over(where, plain), nil
	}
	cfg, err := files.config(u.Hostname())
	if err != nil {
		return nil, err
	}
	return Over(where, func(ctx context.Context) (net.Conn, error) {
		conn, err := plain(ctx)
		if err != nil {
			return nil, err
		}
		secure := tls.Client(conn, cfg)
		if err := secure.HandshakeContext(ctx); err != nil {
			return nil, errors.Join(err, conn.Close())
		}
		return secure, nil
	}), nil
}

func (f TLS) config(host string) (*tls.Config, error) {
	cfg := &tls.Config{ServerName: host, MinVersion: tls.VersionTLS12}
	if f.CA != "" {
		pem, err := os.ReadFile(f.CA)
		if err != nil {
			return nil, err
		}
		cfg.RootCAs = x509.NewCertPool()
		if !cfg.RootCAs.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("%s has no certificate in it", f.CA)
		}
	}
	if f.Cert != "" || f.Key != "" {
		pair, err := tls.LoadX509KeyPair(f.Cert, f.Key)
		if err != nil {
			return nil, err
		}
		cfg.Certificates = []tls.Certificate{pair}
	}
	return cfg, nil
}
