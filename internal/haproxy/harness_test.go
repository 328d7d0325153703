package haproxy

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"math/big"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"
)

// binaries returns the HAProxy of the distribution and those that
// test/haproxies.sh unpacked.
func binaries(t *testing.T) []string {
	t.Helper()
	system, err := exec.LookPath("haproxy")
	if err != nil {
		t.Fatalf("no haproxy: %v: run scripts/install-deps.sh test", err)
	}
	more, err := filepath.Glob("../../.cache/haproxy/*/haproxy")
	if err != nil || len(more) == 0 {
		t.Fatalf("no further HAProxy versions (%v): run test/haproxies.sh", err)
	}
	return append([]string{system}, more...)
}

// running is one HAProxy with a rendered configuration.
type running struct {
	Client
	version Version
	config  Config
	pid     int
}

// eachHAProxy runs the test with every HAProxy version. The HAProxy has the
// backends hl.1 (s1 ready, s2 with weight 0 and options) and tl.1 (empty).
func eachHAProxy(t *testing.T, test func(t *testing.T, h running)) {
	for _, binary := range binaries(t) {
		v, err := BinaryVersion(t.Context(), binary)
		if err != nil {
			t.Fatal(err)
		}
		t.Run(fmt.Sprintf("haproxy-%d.%d", v.Major, v.Minor), func(t *testing.T) {
			t.Parallel()
			test(t, start(t, binary, v))
		})
	}
}

func testBackends() []Backend {
	addr := netip.MustParseAddrPort
	return []Backend{
		{Name: "hl.1", Servers: []Server{
			{Name: "s1", Addr: addr("127.0.0.1:9"), Weight: 100},
			{Name: "s2-h2-pp-m7", Addr: addr("[::1]:9"), Weight: 50, State: Drain},
			{Name: "s3", Addr: addr("127.0.0.1:10"), Weight: 100, State: Maint},
		}},
		{Name: "hcso.1", Servers: []Server{{Name: "s7", Addr: addr("127.0.0.1:9"), Weight: 256}}},
		{Name: "tl.1"},
	}
}

func start(t *testing.T, binary string, v Version) running {
	t.Helper()
	c := Config{
		Generation: 7<<32 | 5, Node: "n1", HTTPPort: 8080, HTTPSPort: 8443, BalancerPort: 9180, SNIPort: 8444,
		Address:  netip.AddrFrom4([4]byte{127, 60 + byte(v.Major), byte(v.Minor), byte(os.Getpid()%250 + 2)}),
		TCPPorts: []int{9181}, HTTPPorts: []int{9182, 9183}, Dir: t.TempDir(), MaxConn: 100,
		OpsSocket: "@flotilla-test", Trusted: true, AcceptProxy: true, AccessLog: "stdout format raw",
	}
	files := map[string]string{
		"pages/404.html": "none", "pages/404.json": "{}", "pages/503": "503", "pages/json.map": "json 1\n",
		"trusted.lst": "10.0.0.0/8\n", "certs/crt-list": c.Dir + "/certs/default.pem\n", "certs/default.pem": certificate(t),
		"maps/http.map": "web hl.1:web\n*.odd\tvalue with  spaces\n", "maps/state.map": "attached no\ndraining no\n",
	}
	for _, m := range Maps {
		if path := "maps/" + m + ".map"; files[path] == "" {
			files[path] = ""
		}
	}
	text, err := c.Render()
	if err != nil {
		t.Fatal(err)
	}
	for _, be := range testBackends() {
		text = AppendBackend(text, be)
	}
	files["haproxy.cfg"] = string(text)
	for name, content := range files {
		path := filepath.Join(c.Dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	ctx, stop := context.WithCancel(context.Background())
	log, err := os.Create(filepath.Join(c.Dir, "log"))
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(ctx, binary, "-db", "-f", filepath.Join(c.Dir, "haproxy.cfg"))
	cmd.Stdout, cmd.Stderr = log, log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	exited := make(chan struct{})
	go func() {
		_ = cmd.Wait() // killed below
		close(exited)
	}()
	t.Cleanup(func() { stop(); <-exited; _ = log.Close() })
	h := running{Client: Client{Socket: filepath.Join(c.Dir, "admin.sock")}, version: v, config: c, pid: cmd.Process.Pid}
	for limit := time.Now().Add(20 * time.Second); !h.Alive(); time.Sleep(20 * time.Millisecond) {
		select {
		case <-exited:
			limit = time.Time{}
		default:
		}
		if time.Now().After(limit) {
			text, _ := os.ReadFile(log.Name())
			t.Fatalf("haproxy %s does not run: %s", v.Full, text)
		}
	}
	return h
}

func certificate(t *testing.T) string {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour)},
		&x509.Certificate{}, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})) +
		string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER}))
}

// ask sends one command; its outcome must be known.
func (h running) ask(t *testing.T, command string) Answer {
	t.Helper()
	answers, err := h.Do(t.Context(), command)
	if err != nil {
		t.Fatalf("%s: %v", command, err)
	}
	return answers[0]
}
