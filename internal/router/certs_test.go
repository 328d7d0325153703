package router

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// overTLS speaks TLS on a connection, for the given server name and protocol.
func overTLS(conn net.Conn, serverName, protocol string) *tls.Conn {
	return tls.Client(conn, &tls.Config{
		ServerName: serverName, NextProtos: []string{protocol},
		InsecureSkipVerify: true, //nolint:gosec // a test against our own certificates
	})
}

func (b *bed) dialTLS(serverName, protocol string) *tls.Conn {
	b.t.Helper()
	conn := overTLS(b.dial(b.cfg.HTTPSPort), serverName, protocol)
	if err := conn.Handshake(); err != nil {
		b.t.Fatalf("TLS to %s: %v", serverName, err)
	}
	return conn
}

// certFor makes a certificate for the names; extra bytes make it as long as one
// with many names.
func certFor(t *testing.T, extra int, names ...string) (chain, key []byte) {
	t.Helper()
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	serial, err := rand.Int(rand.Reader, big.NewInt(1<<62))
	if err != nil {
		t.Fatal(err)
	}
	cert := &x509.Certificate{
		SerialNumber: serial, DNSNames: names, Subject: pkix.Name{CommonName: names[0]},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
	}
	if extra > 0 {
		cert.ExtraExtensions = []pkix.Extension{{Id: []int{1, 3, 6, 1, 4, 1, 99999, 1}, Value: bytes.Repeat([]byte{4}, extra)}}
	}
	der, err := x509.CreateCertificate(rand.Reader, cert, cert, &private.PublicKey, private)
	if err != nil {
		t.Fatal(err)
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER})
}

// shownCert is the certificate that the router shows for a server name.
func (b *bed) shownCert(serverName string) *x509.Certificate {
	b.t.Helper()
	conn := b.dialTLS(serverName, "http/1.1")
	defer func() { _ = conn.Close() }()
	return conn.ConnectionState().PeerCertificates[0]
}

func TestCertificates(t *testing.T) {
	t.Parallel()
	eachHAProxy(t, func(t *testing.T, binary string) {
		t.Parallel()
		dir := t.TempDir()
		write := func(name string, parts ...[]byte) {
			t.Helper()
			if err := os.WriteFile(filepath.Join(dir, name), bytes.Join(parts, nil), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		same := func(pemText []byte, cert *x509.Certificate) bool {
			block, _ := pem.Decode(pemText)
			return bytes.Equal(block.Bytes, cert.Raw)
		}
		aChain, aKey := certFor(t, 0, "a.example")
		write("a.pem", aChain, aKey)
		cfg := testConfig(t, binary)
		cfg.Certs = dir
		b := newBed(t, cfg)
		b.put("a/scheme https", "a/hosts/1 "+endpoint(t, "a"), "b/scheme https", "b/hosts/1 "+endpoint(t, "b"))
		b.wait()
		worker := b.router.Status().Pid
		if !same(aChain, b.shownCert("a.example")) {
			t.Error("the certificate of the start is not served")
		}
		isDefault := func(serverName string) bool {
			return strings.HasPrefix(b.shownCert(serverName).Subject.CommonName, "flotilla default certificate")
		}
		if !isDefault("b.example") || !isDefault("") {
			t.Error("unknown names do not get the default certificate")
		}
		served := func(serverName string, chain []byte) {
			t.Helper()
			b.hurryChecks()
			eventually(t, func() string {
				if !same(chain, b.shownCert(serverName)) {
					return "the certificate of " + serverName + " is not served"
				}
				return ""
			})
		}
		problem := func(file string) string {
			for _, p := range b.router.Status().Problems {
				if p.Key == filepath.Join(dir, file) && p.Reason != "" && p.Remedy != "" {
					return p.Reason
				}
			}
			return ""
		}

		old := b.dialTLS("a.example", "http/1.1")
		// Both halves of a pair, the certificate before its key, and a wildcard.
		bChain, bKey := certFor(t, 0, "b.example", "*.wild.example")
		write("b.crt", bChain)
		b.hurryChecks()
		eventually(t, func() string {
			if problem("b.crt") == "" {
				return "no problem is reported for a certificate without a key"
			}
			return ""
		})
		write("b.key", bKey)
		aChain, aKey = certFor(t, 0, "a.example")
		write("a.pem", aChain, []byte("\n\n# a remark\n\n"), aKey)
		served("b.example", bChain)
		served("a.example", aChain)
		if !same(bChain, b.shownCert("x.wild.example")) || !isDefault("c.example") {
			t.Error("wrong certificate for a wildcard or an unknown name")
		}
		if got := exchange(t, old, "GET / HTTP/1.1\r\nHost: a.example\r\nConnection: close\r\n\r\n"); !strings.Contains(got, "200 OK") {
			t.Errorf("a connection from before the change: %s", got)
		}

		write("a.pem", []byte("garbage"))
		write("b.key", aKey)
		b.hurryChecks()
		eventually(t, func() string {
			if problem("a.pem") == "" || problem("b.crt") == "" {
				return "no problem is reported for broken files"
			}
			return ""
		})
		if !same(aChain, b.shownCert("a.example")) || !same(bChain, b.shownCert("b.example")) {
			t.Error("a broken file replaced the last good certificate")
		}
		write("b.key", bKey)
		aChain, aKey = certFor(t, 0, "a.example")
		write("a.pem", aChain, aKey)
		served("a.example", aChain)
		eventually(t, func() string {
			if len(b.router.Status().Problems) > 0 {
				return "problems of mended files stay"
			}
			return ""
		})
		for _, name := range []string{"b.crt", "b.key"} {
			if err := os.Remove(filepath.Join(dir, name)); err != nil {
				t.Fatal(err)
			}
		}
		b.hurryChecks()
		eventually(t, func() string {
			if !isDefault("b.example") {
				return "a removed certificate is still served"
			}
			return ""
		})
		if s := b.router.Status(); s.Reloads != 0 || s.Pid != worker {
			t.Errorf("%d reloads (%s), worker %d became %d", s.Reloads, s.LastReload, worker, s.Pid)
		}

		// What the Runtime API cannot take comes with a reload.
		cChain, cKey := certFor(t, 15<<10, "c.example")
		write("c.pem", cChain, cKey)
		served("c.example", cChain)
		eventually(t, func() string {
			if s := b.router.Status(); s.Reloads != 1 || len(s.Problems) != 0 {
				return fmt.Sprintf("%d reloads, want 1: %v", s.Reloads, s.Problems)
			}
			return ""
		})
		served("a.example", aChain)
		if !isDefault("b.example") {
			t.Error("a removed certificate came back with a reload")
		}
	})
}
