package store

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"go.etcd.io/etcd/client/pkg/v3/transport"
	"go.etcd.io/etcd/server/v3/embed"
	"go.uber.org/zap"
)

// What Serve may end with. Test with errors.Is.
var (
	// ErrEnoughVoters: the store has all the members it takes. This node is a
	// client only, and nothing is wrong.
	ErrEnoughVoters = errors.New("the store has enough members")
	// ErrRemoved: this member was removed from the store for good. Its data
	// directory is of no use any more.
	ErrRemoved = errors.New("this member was removed from the store")
)

const (
	wantVoters   = 3
	defaultQuota = 1 << 30
	// startLimit bounds the first start of a member. A member that has been
	// up before waits for the others as long as it takes.
	startLimit = 2 * time.Minute
)

// TLSFiles are PEM files. All three are given or none.
type TLSFiles struct {
	Cert string // certificate of this member; also shown to other members
	Key  string
	CA   string // that must have signed the certificate of whoever connects
}

func (f TLSFiles) set() bool { return f != TLSFiles{} }

func (f TLSFiles) info() transport.TLSInfo {
	return transport.TLSInfo{
		CertFile: f.Cert, KeyFile: f.Key, TrustedCAFile: f.CA, ClientCertAuth: f.set(),
		// A node with several addresses does not always call from the one
		// in its certificate. The CA is what counts.
		SkipClientSANVerify: f.set(),
	}
}

func (f TLSFiles) scheme() string {
	if f.set() {
		return "https"
	}
	return "http"
}

// ServerConfig says how one member of the store runs.
type ServerConfig struct {
	Name       string     // of the node; the member's name begins with it
	DataDir    string     // of this member alone; beside it lies <DataDir>.member, which says who it is
	Address    netip.Addr // where it listens and how the other members reach it
	ClientPort int        // usually 2379
	PeerPort   int        // usually 2380
	// Join has addresses of existing members, as host or host:clientport. A
	// member that has been up before ignores it. Empty: the first member of a
	// new store.
	Join       []string
	Insecure   bool     // allow plain connections on Address although it is not a loopback address
	ClientTLS  TLSFiles // for the client port, and for asking other members
	PeerTLS    TLSFiles // for the peer port
	QuotaBytes int64    // largest size of the database; 0 is 1 GiB
	// UnsafeNoFsync does not wait for the disk. A power cut loses data: for
	// tests only.
	UnsafeNoFsync bool
}

// Validate reports what is wrong with the configuration.
func (c ServerConfig) Validate() error {
	switch {
	case c.Name == "":
		return errors.New("the store has no name: give the name of this node")
	case strings.ContainsAny(c.Name, "=, \t\n"):
		return fmt.Errorf("store name %q has a space, a comma or an equals sign in it", c.Name)
	case c.DataDir == "":
		return errors.New("the store has no data directory: give one on a local disk, such as /var/lib/flotilla/store")
	case !c.Address.IsValid() || c.Address.IsUnspecified():
		return errors.New("the store has no address: give the address at which the other nodes reach this one")
	case c.ClientPort < 1 || c.ClientPort > 65535 || c.PeerPort < 1 || c.PeerPort > 65535 || c.ClientPort == c.PeerPort:
		return fmt.Errorf("store ports %d (clients) and %d (members) must be two different ports from 1 to 65535", c.ClientPort, c.PeerPort)
	case c.QuotaBytes < 0:
		return fmt.Errorf("store quota %d is negative", c.QuotaBytes)
	}
	for what, f := range map[string]TLSFiles{"client": c.ClientTLS, "peer": c.PeerTLS} {
		if f.set() && (f.Cert == "" || f.Key == "" || f.CA == "") {
			return fmt.Errorf("the store's %s port needs all of certificate, key and CA file", what)
		}
		if !f.set() && !c.Address.IsLoopback() && !c.Insecure {
			return fmt.Errorf("the store's %s port on %s would be open to everybody who can reach it: give certificate, key and CA files, or say that plain connections are wanted (insecure)", what, c.Address)
		}
	}
	for _, j := range c.Join {
		if _, err := c.joinEndpoint(j); err != nil {
			return err
		}
	}
	return nil
}

// joinEndpoint returns the endpoint of an entry of Join.
func (c ServerConfig) joinEndpoint(join string) (string, error) {
	host, port, err := net.SplitHostPort(join)
	if err != nil {
		host, port = strings.Trim(join, "[]"), strconv.Itoa(c.ClientPort)
	}
	if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 || host == "" || strings.ContainsAny(host, "/ ") {
		return "", fmt.Errorf("join address %q is neither host nor host:port", join)
	}
	return c.ClientTLS.scheme() + "://" + net.JoinHostPort(host, port), nil
}

func (c ServerConfig) peerURL() url.URL {
	return url.URL{Scheme: c.PeerTLS.scheme(), Host: net.JoinHostPort(c.Address.String(), strconv.Itoa(c.PeerPort))}
}

func (c ServerConfig) clientURL() url.URL {
	return url.URL{Scheme: c.ClientTLS.scheme(), Host: net.JoinHostPort(c.Address.String(), strconv.Itoa(c.ClientPort))}
}

// Serve runs one member of the store until ctx ends, and returns nil then. It
// calls ready once it serves clients. Run it in a process of its own: etcd ends
// the process when the disk is full or the data is damaged.
//
// The first member of a store starts alone. Others join as learners, and two of
// them become voters together, so that there are one or three voters and never
// two. With three members there, ErrEnoughVoters is returned. A member that was
// removed ends with ErrRemoved.
//
// BUG(store): when all members start at the same moment each waits up to 7 s
// for every other one's checksum (etcd's initial corruption check) before it
// serves, 14 s for three.
//
// BUG(store): a node that was added and never started keeps its place as a
// learner until it is removed; a fourth node then gets ErrEnoughVoters although
// there is one voter.
//
// BUG(store): promotion is asked for inside the process and would be refused if
// etcd's own user authentication were switched on.
func Serve(ctx context.Context, cfg ServerConfig, log *slog.Logger, ready func()) error {
	if err := cfg.Validate(); err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(cfg.DataDir), 0o755); err != nil {
		return fmt.Errorf("create the store's directory: %w", err)
	}
	s := &server{cfg: cfg, log: log, ready: ready}
	m, err := s.identity()
	if err != nil {
		return err
	}
	s.marker = m
	first := !hasData(cfg.DataDir)
	for try := 1; ; try++ {
		state, cluster := embed.ClusterStateFlagExisting, m.Name+"="+m.PeerURL
		switch {
		case first && m.Joined:
			if cluster, err = s.join(ctx); err != nil {
				return err
			}
		case first:
			state = embed.ClusterStateFlagNew
		}
		err := s.serve(ctx, state, cluster, first)
		if !errors.Is(err, errNotStarted) || !m.Joined || hasData(cfg.DataDir) || try == 10 {
			return err
		}
		// The list of members may have changed between reading it and starting.
		log.Info("joining the store again", "reason", err)
		if !wait(ctx, time.Second) {
			return nil
		}
	}
}

type server struct {
	cfg     ServerConfig
	log     *slog.Logger
	ready   func()
	marker  marker
	removed atomic.Bool // etcd has said that this member was removed
}

// identity reads who this member is, or generates and records that before the
// first start. It refuses to start where that could split the cluster, or bring
// back a voter whose votes are lost.
func (s *server) identity() (marker, error) {
	path, data := s.cfg.DataDir+".member", hasData(s.cfg.DataDir)
	m, err := readMarker(path)
	switch {
	case errors.Is(err, os.ErrNotExist) && data:
		return m, fmt.Errorf("the data directory %s holds a member of a store, but %s, which says which one, is missing: put it back, or move the data directory away to start as a new member", s.cfg.DataDir, path)
	case errors.Is(err, os.ErrNotExist):
	case err != nil:
		return m, err
	case !data && m.Started:
		return m, fmt.Errorf("the data of member %s is gone from %s although it was part of a store; starting it empty could lose or split the store: "+
			"put the data back, or remove the member (etcdctl member remove), delete %s and join again", m.Name, s.cfg.DataDir, path)
	case data && m.PeerURL != peerURLString(s.cfg):
		return m, fmt.Errorf("member %s of the store is known as %s and would now be %s: go back to the old address and port, or remove the member, move %s and %s away and join again",
			m.Name, m.PeerURL, peerURLString(s.cfg), s.cfg.DataDir, path)
	case data:
		return m, nil
	case m.Joined && len(s.cfg.Join) == 0:
		return m, fmt.Errorf("this node was told to join a store before and is now told to found one: name the members to join, or delete %s to found a new store", path)
	case m.Joined == (len(s.cfg.Join) > 0) && m.PeerURL == peerURLString(s.cfg):
		return m, nil // a first start that was interrupted
	}
	m = marker{
		V:       1,
		Name:    s.cfg.Name + "-" + random(3),
		Token:   "flotilla-" + random(8),
		PeerURL: peerURLString(s.cfg),
		Joined:  len(s.cfg.Join) > 0,
	}
	return m, m.write(path)
}

func peerURLString(c ServerConfig) string {
	u := c.peerURL()
	return u.String()
}

func random(bytes int) string {
	b := make([]byte, bytes)
	_, _ = rand.Read(b) // never fails
	return hex.EncodeToString(b)
}

// errNotStarted wraps errors of etcd's start.
var errNotStarted = errors.New("the store did not start")

// serve runs etcd until ctx ends or it does.
func (s *server) serve(ctx context.Context, state, cluster string, first bool) error {
	e, err := embed.StartEtcd(s.etcdConfig(state, cluster))
	if err != nil {
		return fmt.Errorf("store member %s in %s: %w: %w", s.marker.Name, s.cfg.DataDir, errNotStarted, err)
	}
	defer e.Close()
	slow := time.NewTicker(30 * time.Second)
	defer slow.Stop()
	began := time.Now()
	for started := false; !started; {
		select {
		case <-e.Server.ReadyNotify():
			started = true
		case <-slow.C:
			if first && time.Since(began) > startLimit {
				return fmt.Errorf("store member %s is not ready after %s: check that the other members run and reach %s", s.marker.Name, startLimit, s.marker.PeerURL)
			}
			s.log.Warn("the store waits for a majority of its members", "took", time.Since(began).Round(time.Second))
		case <-ctx.Done():
			return nil
		case err := <-e.Err():
			return s.ended(e, err)
		case <-e.Server.StopNotify():
			return s.ended(e, nil)
		}
	}
	if !s.marker.Started {
		s.marker.Started = true
		if err := s.marker.write(s.cfg.DataDir + ".member"); err != nil {
			return err
		}
	}
	s.log.Info("the store is ready", "member", s.marker.Name, "endpoint", e.Clients[0].Addr().String(), "took", time.Since(began).Round(time.Millisecond))
	s.ready()

	pctx, cancel := context.WithCancel(ctx)
	promoted := make(chan struct{})
	go func() {
		defer close(promoted)
		s.promote(pctx, e.Server)
	}()
	defer func() {
		cancel()
		<-promoted
	}()
	select {
	case <-ctx.Done():
		return nil
	case err := <-e.Err():
		return s.ended(e, err)
	case <-e.Server.StopNotify():
		return s.ended(e, nil)
	}
}

// ended returns why etcd ended although ctx did not.
func (s *server) ended(e *embed.Etcd, err error) error {
	if s.removed.Load() || e.Server.Cluster().Member(e.Server.MemberID()) == nil {
		return fmt.Errorf("store member %s: %w: move %s and %s.member away; it can join again as a new member", s.marker.Name, ErrRemoved, s.cfg.DataDir, s.cfg.DataDir)
	}
	if err == nil {
		err = errors.New("etcd stopped by itself")
	}
	return fmt.Errorf("store member %s: %w", s.marker.Name, err)
}

func (s *server) etcdConfig(state, cluster string) *embed.Config {
	c := embed.NewConfig()
	c.Name, c.Dir = s.marker.Name, s.cfg.DataDir
	c.ListenClientUrls = []url.URL{s.cfg.clientURL()}
	c.AdvertiseClientUrls = c.ListenClientUrls
	c.ListenPeerUrls = []url.URL{s.cfg.peerURL()}
	c.AdvertisePeerUrls = c.ListenPeerUrls
	c.ClientTLSInfo, c.PeerTLSInfo = s.cfg.ClientTLS.info(), s.cfg.PeerTLS.info()
	c.ClusterState, c.InitialCluster, c.InitialClusterToken = state, cluster, s.marker.Token
	c.QuotaBackendBytes = defaultQuota
	if s.cfg.QuotaBytes > 0 {
		c.QuotaBackendBytes = s.cfg.QuotaBytes
	}
	c.AutoCompactionMode, c.AutoCompactionRetention = embed.CompactorModePeriodic, "30m"
	c.BootstrapDefragThresholdMegabytes = 64
	c.MaxLearners = 2
	c.EnableGRPCGateway = false
	c.UnsafeNoFsync = s.cfg.UnsafeNoFsync
	c.ZapLoggerBuilder = embed.NewZapLoggerBuilder(zap.New(&slogCore{log: s.log, quiet: quietServer, fatal: os.Stderr, seen: func(line string) {
		if strings.HasPrefix(line, "data-dir used by this member must be removed") {
			s.removed.Store(true)
		}
	}}))
	// Both gates detect members whose data differs from the others'.
	if gate, ok := c.ServerFeatureGate.(interface{ Set(string) error }); ok {
		if err := gate.Set("InitialCorruptCheck=true,CompactHashCheck=true"); err != nil {
			s.log.Warn("the store runs without corruption checks", "err", err)
		}
	}
	return c
}

// wait waits for d and reports whether ctx goes on.
func wait(ctx context.Context, d time.Duration) bool {
	select {
	case <-time.After(d):
		return true
	case <-ctx.Done():
		return false
	}
}
