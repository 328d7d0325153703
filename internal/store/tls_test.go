package store_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"go.etcd.io/etcd/client/pkg/v3/transport"

	"flotilla/internal/store"
	"flotilla/internal/store/storetest"
)

func TestMembersWithCertificates(t *testing.T) {
	clients, peers := newCA(t), newCA(t)
	secure := func(m *storetest.Member) *storetest.Member {
		ip := net.IP(m.Config.Address.AsSlice())
		m.Config.ClientTLS, m.Config.PeerTLS = clients.issue(t, ip), peers.issue(t, ip)
		return m
	}
	first := secure(storetest.NewMember(t, "n1"))
	first.Start()
	first.Ready()
	second := secure(storetest.NewMember(t, "n2", first.Address()))
	second.Start()
	second.Ready()

	connect := func(files store.TLSFiles) *store.Client {
		cfg, err := (transport.TLSInfo{CertFile: files.Cert, KeyFile: files.Key, TrustedCAFile: files.CA}).ClientConfig()
		if err != nil {
			t.Fatal(err)
		}
		return openTLS(t, first.Endpoint(), cfg)
	}
	c := connect(clients.issue(t))
	if h := c.Status(t.Context()); len(h.Members) != 2 || !h.Quorum || !h.Members[0].Reachable || !h.Members[1].Reachable {
		t.Errorf("%+v", h)
	}
	stranger := connect(store.TLSFiles{Cert: peers.issue(t).Cert, Key: peers.key, CA: clients.file})
	if _, _, err := stranger.Get(t.Context(), "/a"); err == nil {
		t.Error("a certificate of the peers' authority opens the client port")
	}
}

func openTLS(t *testing.T, endpoint string, cfg *tls.Config) *store.Client {
	t.Helper()
	c, err := store.Open(store.Config{Endpoints: []string{endpoint}, TLS: cfg, Logger: logger(t)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c
}

type authority struct {
	dir, file, key string // key: file of the private key that all its certificates share
	private        *ecdsa.PrivateKey
	cert           *x509.Certificate
	issued         int64
}

func newCA(t *testing.T) *authority {
	t.Helper()
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	ca := &authority{dir: t.TempDir(), private: private}
	ca.cert = &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	ca.file = ca.sign(t, ca.cert)
	der, err := x509.MarshalECPrivateKey(private)
	if err != nil {
		t.Fatal(err)
	}
	ca.key = ca.save(t, "key", "EC PRIVATE KEY", der)
	return ca
}

func (ca *authority) issue(t *testing.T, ips ...net.IP) store.TLSFiles {
	t.Helper()
	cert := ca.sign(t, &x509.Certificate{
		SerialNumber: big.NewInt(2 + ca.issued), Subject: pkix.Name{CommonName: "node"}, IPAddresses: ips,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	})
	return store.TLSFiles{Cert: cert, Key: ca.key, CA: ca.file}
}

func (ca *authority) sign(t *testing.T, cert *x509.Certificate) string {
	t.Helper()
	der, err := x509.CreateCertificate(rand.Reader, cert, ca.cert, ca.private.Public(), ca.private)
	if err != nil {
		t.Fatal(err)
	}
	ca.issued++
	return ca.save(t, big.NewInt(ca.issued).String(), "CERTIFICATE", der)
}

func (ca *authority) save(t *testing.T, name, kind string, der []byte) string {
	t.Helper()
	path := filepath.Join(ca.dir, name+".pem")
	if err := os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}
