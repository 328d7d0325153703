package store

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"go.etcd.io/etcd/server/v3/etcdserver"
	"go.etcd.io/etcd/server/v3/etcdserver/api/membership"

	"flotilla/internal/durable"
)

// marker is the file beside the data directory that says who the member is. It
// is written before the first start and stays when the data is lost.
type marker struct {
	V       int    `json:"v"`
	Name    string `json:"name"`     // <node>-<random>, never used twice
	Token   string `json:"token"`    // of the cluster, if this member founded it
	PeerURL string `json:"peer_url"` // under which the others know it
	Joined  bool   `json:"joined"`   // it joined; otherwise it founded the cluster
	Started bool   `json:"started"`  // it has been ready: from then on its data must be there
}

func readMarker(path string) (marker, error) {
	var m marker
	text, err := os.ReadFile(path)
	if err != nil {
		return m, fmt.Errorf("read who this member is: %w", err)
	}
	if err := json.Unmarshal(text, &m); err != nil || m.Name == "" || m.PeerURL == "" {
		return m, fmt.Errorf("%s, which says who this member is, is damaged: put it back from a backup, or remove the member, move it and the data directory away and join again", path)
	}
	return m, nil
}

// MemberName returns the name of the member whose data is, or was, in dataDir.
func MemberName(dataDir string) (string, error) {
	m, err := readMarker(dataDir + ".member")
	return m.Name, err
}

func (m marker) write(path string) error {
	text, err := json.MarshalIndent(m, "", "  ")
	if err == nil {
		err = durable.WriteFile(path, append(text, '\n'), 0o600)
	}
	if err != nil {
		return fmt.Errorf("record who this member is: %w", err)
	}
	return nil
}

// hasData reports whether etcd has ever written its log into dir.
func hasData(dir string) bool {
	logs, err := filepath.Glob(filepath.Join(dir, "member", "wal", "*.wal"))
	return err == nil && len(logs) > 0
}

// open makes a client for the members at the endpoints.
func (s *server) open(endpoints []string) (*Client, error) {
	var secure *tls.Config
	if s.cfg.ClientTLS.set() {
		var err error
		if secure, err = s.cfg.ClientTLS.info().ClientConfig(); err != nil {
			return nil, fmt.Errorf("read the store's certificates: %w", err)
		}
	}
	return Open(Config{Endpoints: endpoints, TLS: secure, Logger: s.log})
}

// join adds this member to the cluster as a learner, unless an earlier try did,
// and returns the initial cluster with which it must start. It tries until ctx
// ends. A second call changes nothing.
func (s *server) join(ctx context.Context) (initialCluster string, err error) {
	var endpoints []string
	for _, j := range s.cfg.Join {
		e, err := s.cfg.joinEndpoint(j)
		if err != nil {
			return "", err
		}
		if u := s.cfg.clientURL(); e != u.String() {
			endpoints = append(endpoints, e)
		}
	}
	if len(endpoints) == 0 {
		return "", errors.New("this node is told to join itself: name another node, or none to found a new store")
	}
	c, err := s.open(endpoints)
	if err != nil {
		return "", err
	}
	defer func() { _ = c.Close() }()
	began, said := time.Now(), ""
	for pause := 250 * time.Millisecond; ; pause = min(2*pause, 5*time.Second) {
		var cluster string
		for _, e := range endpoints { // one of them may be a learner, which cannot answer
			c.use([]string{e})
			if cluster, err = s.tryJoin(ctx, c); !errors.Is(err, errAgain) {
				break
			}
		}
		switch {
		case err == nil:
			return cluster, nil
		case ctx.Err() != nil:
			return "", fmt.Errorf("join the store at %s: given up after %s: %w", strings.Join(endpoints, ", "), time.Since(began).Round(time.Second), err)
		case !errors.Is(err, errAgain):
			return "", err
		case err.Error() != said:
			said = err.Error()
			s.log.Warn("the store cannot be joined yet: trying again", "err", err)
		}
		wait(ctx, pause)
	}
}

// errAgain wraps errors after which joining is tried again.
var errAgain = errors.New("not possible now")

// tryJoin is one try of join.
func (s *server) tryJoin(ctx context.Context, c *Client) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, writeLimit)
	defer cancel()
	lctx, done := context.WithTimeout(ctx, readLimit)
	lctx, tried := recorded(lctx)
	list, err := c.etcd.MemberList(lctx)
	done()
	if err != nil {
		return "", fmt.Errorf("%w: %w", errAgain, c.explain("list the members of the store", tried.cause(err)))
	}
	var others []string
	mine := false
	for _, m := range list.Members {
		id := fmt.Sprintf("%x", m.ID)
		switch known := len(m.PeerURLs) > 0 && m.PeerURLs[0] == s.marker.PeerURL; {
		case !known:
			name := m.Name
			if name == "" {
				name = "not-started-" + id
			}
			for _, u := range m.PeerURLs {
				others = append(others, name+"="+u)
			}
		case m.Name == "" && m.IsLearner || m.Name == s.marker.Name:
			mine = true
		case m.IsLearner: // it has never voted: its lost data cannot harm the cluster
			if _, err := c.etcd.MemberRemove(ctx, m.ID); err != nil {
				return "", fmt.Errorf("%w: %w", errAgain, c.explain("remove the earlier member "+m.Name+" of this address", err))
			}
			return "", fmt.Errorf("%w: the earlier member %s of this address was removed", errAgain, m.Name)
		default:
			return "", fmt.Errorf("the store already has a voting member %s at %s, whose data is not on this node: remove it with 'etcdctl member remove %s' and start again", m.Name, s.marker.PeerURL, id)
		}
	}
	if mine {
		return strings.Join(append(others, s.marker.Name+"="+s.marker.PeerURL), ","), nil
	}
	if len(list.Members) >= wantVoters {
		return "", fmt.Errorf("join the store at %s: %w (%d)", strings.Join(c.Endpoints(), ", "), ErrEnoughVoters, len(list.Members))
	}
	if _, err := c.etcd.MemberAddAsLearner(ctx, []string{s.marker.PeerURL}); err != nil && !errors.Is(err, rpctypes.ErrPeerURLExist) {
		if codeRefused(err) {
			return "", c.explain("add this node to the store", err)
		}
		return "", fmt.Errorf("%w: %w", errAgain, c.explain("add this node to the store", err))
	}
	return s.tryJoin(ctx, c) // the list with this member in it
}

// codeRefused reports whether trying again is useless.
func codeRefused(err error) bool {
	return !unknownOutcome(err) && !errors.Is(err, rpctypes.ErrTooManyLearners) && !errors.Is(err, rpctypes.ErrMemberNotEnoughStarted)
}

// promote turns learners into voters until ctx ends. Every member runs it, and
// only the leader acts. A single voter stays alone until two learners have caught
// up, then both are promoted, so that there are two voters only for that moment. If
// the second promotion fails, the next leader repeats it.
func (s *server) promote(ctx context.Context, e *etcdserver.EtcdServer) {
	said := ""
	for wait(ctx, time.Second) {
		if e.Leader() != e.MemberID() {
			continue
		}
		var learners []*membership.Member
		missing := wantVoters
		for _, m := range e.Cluster().Members() {
			if m.IsLearner {
				learners = append(learners, m)
			} else {
				missing--
			}
		}
		if missing <= 0 || len(learners) < missing {
			continue
		}
		err := s.promoteAll(ctx, e, learners, missing)
		if err != nil && ctx.Err() == nil && err.Error() != said {
			said = err.Error()
			s.log.Info("learners of the store do not become voters yet", "reason", err)
		}
	}
}

// lagLimit is how many entries a learner that has caught up may be behind the
// voters.
const lagLimit = 500

func (s *server) promoteAll(ctx context.Context, e *etcdserver.EtcdServer, learners []*membership.Member, missing int) error {
	ctx, cancel := context.WithTimeout(ctx, 2*writeLimit)
	defer cancel()
	self := s.cfg.clientURL()
	c, err := s.open([]string{self.String()})
	if err != nil {
		return err
	}
	defer func() { _ = c.Close() }()
	newest := e.CommittedIndex()
	for _, m := range learners {
		st, err := c.status(ctx, m.ClientURLs)
		switch {
		case err != nil:
			return fmt.Errorf("learner %s at %s does not answer: %w", m.Name, strings.Join(m.PeerURLs, ","), err)
		case st.RaftAppliedIndex+lagLimit < newest:
			return fmt.Errorf("learner %s is %d entries behind", m.Name, newest-st.RaftAppliedIndex)
		}
	}
	for _, m := range learners[:missing] {
		if _, err := e.PromoteMember(ctx, uint64(m.ID)); err != nil && !errors.Is(err, membership.ErrMemberNotLearner) {
			return fmt.Errorf("promote %s: %w", m.Name, err)
		}
		s.log.Info("a member of the store has become a voter", "member", m.Name)
	}
	return nil
}
