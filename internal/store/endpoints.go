package store

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"go.etcd.io/etcd/api/v3/etcdserverpb"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc/codes"

	"flotilla/internal/wire"
)

// How often and how long each endpoint is probed.
const (
	probePeriod = 2 * time.Second
	probeLimit  = 1500 * time.Millisecond
)

// probe is one endpoint as Run sees it.
type probe struct {
	endpoint   string
	configured bool
	rank       float64 // random: clients spread over the members
	etcd       *clientv3.Client
	cluster    uint64                 // that answered last
	members    []*etcdserverpb.Member // as they were read last; nil if never
	err        error                  // of the last round
}

// Run chooses the endpoints until ctx ends, and returns nil then. Every 2 s it
// reads the list of members linearizably through each known voter, and gives only
// the endpoints that answer to the client: the local one first, the others in an
// order that is random per client. If none answers, all are kept. Endpoints that
// the members announce are used too if they answer and belong to the same cluster.
func (c *Client) Run(ctx context.Context) error {
	probes := map[string]*probe{}
	defer func() {
		for _, p := range probes {
			_ = p.etcd.Close()
		}
	}()
	c.known(probes)
	for {
		wait := probePeriod
		c.round(ctx, probes)
		if c.known(probes) { // do not wait to try what has just been announced
			wait = 0
		}
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return nil
		}
	}
}

// known makes probes contain exactly the configured endpoints and those of the
// members, and reports whether there are new ones.
func (c *Client) known(probes map[string]*probe) (more bool) {
	c.mu.Lock()
	want := slices.Concat(c.configured, c.members)
	c.mu.Unlock()
	for e, p := range probes {
		if !slices.Contains(want, e) {
			_ = p.etcd.Close()
			delete(probes, e)
		}
	}
	for _, e := range want {
		if probes[e] != nil {
			continue
		}
		etcd, err := c.dial(e)
		if err != nil {
			c.log.Warn("store endpoint cannot be used", "endpoint", e, "err", err)
			continue
		}
		p := &probe{endpoint: e, configured: slices.Contains(c.configured, e), rank: rand.Float64(), etcd: etcd}
		if e == c.cfg.Local {
			p.rank = -1
		}
		probes[e], more = p, true
	}
	return more
}

// round probes all endpoints and gives the best to the client.
func (c *Client) round(ctx context.Context, probes map[string]*probe) {
	was := map[string]error{}
	var g sync.WaitGroup
	for _, p := range probes {
		was[p.endpoint] = p.err
		g.Go(func() { p.read(ctx) })
	}
	g.Wait()
	if ctx.Err() != nil {
		return
	}
	all := make([]*probe, 0, len(probes))
	for _, p := range probes {
		all = append(all, p)
	}
	slices.SortFunc(all, func(a, b *probe) int { return cmp.Compare(a.rank, b.rank) })

	c.mu.Lock()
	for _, p := range all { // configured endpoints say which cluster is ours
		if p.configured && p.err == nil {
			c.cluster = p.cluster
			break
		}
	}
	cluster := c.cluster
	for _, p := range all {
		if p.err == nil && p.cluster == cluster && p.members != nil {
			c.members = c.usable(p.members)
			break
		}
	}
	c.mu.Unlock()

	var good, every []string
	for _, p := range all {
		if p.err == nil && !p.configured && p.cluster != cluster {
			p.err = errors.New("it belongs to another cluster")
		}
		if p.err == nil {
			good = append(good, p.endpoint)
		}
		every = append(every, p.endpoint)
		if before := was[p.endpoint]; before == nil && p.err != nil {
			c.log.Warn("store endpoint does not answer", "endpoint", p.endpoint, "err", p.err)
		} else if before != nil && p.err == nil {
			c.log.Info("store endpoint answers again", "endpoint", p.endpoint)
		}
	}
	if len(good) == 0 {
		good = every
	}
	c.use(good)
}

// read proves that the endpoint reaches a quorum. An answer that permission is
// denied proves it too.
func (p *probe) read(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, probeLimit)
	defer cancel()
	ctx, tried := recorded(ctx)
	resp, err := p.etcd.MemberList(ctx)
	switch {
	case err == nil:
		p.cluster, p.members, p.err = resp.Header.ClusterId, resp.Members, nil
	case codeOf(err) == codes.PermissionDenied:
		p.err = nil
	default:
		p.err = errors.New(short(tried.cause(err)))
	}
}

// usable returns the client URLs that the voters announce, without those that
// are configured.
func (c *Client) usable(members []*etcdserverpb.Member) []string {
	var urls []string
	for _, m := range members {
		if m.IsLearner {
			continue
		}
		for _, u := range m.ClientURLs {
			if u, err := normalEndpoint(u, c.cfg.TLS != nil); err == nil && !slices.Contains(c.configured, u) {
				urls = append(urls, u)
			}
		}
	}
	return urls
}

// use gives the endpoints to clientv3, best first.
func (c *Client) use(endpoints []string) {
	c.mu.Lock()
	before := c.inUse
	c.inUse = endpoints
	c.mu.Unlock()
	if slices.Equal(before, endpoints) {
		return
	}
	if endpoints[0] == c.cfg.Local && before[0] != c.cfg.Local {
		// gRPC stays where it is as long as that is in the list.
		c.etcd.SetEndpoints(endpoints[0])
	}
	c.etcd.SetEndpoints(endpoints...)
}

// Status asks every member how it is. It answers without a quorum too, with
// what can still be found out.
func (c *Client) Status(ctx context.Context) wire.StoreHealth {
	ctx, cancel := withLimit(ctx, writeLimit)
	defer cancel()
	lctx, done := context.WithTimeout(ctx, readLimit)
	lctx, tried := recorded(lctx)
	list, err := c.etcd.MemberList(lctx)
	done()
	h := wire.StoreHealth{Quorum: err == nil}
	if err != nil {
		h.Err = c.explain("list the members", tried.cause(err)).Error()
		lctx, done := context.WithTimeout(ctx, readLimit/2)
		list, err = c.etcd.MemberList(lctx, clientv3.WithSerializable()) // as one member knows them
		done()
		if err != nil {
			for _, e := range c.everyEndpoint() {
				h.Members = append(h.Members, c.ask(ctx, wire.Member{}, []string{e}))
			}
			return h
		}
	}
	h.Cluster = strconv.FormatUint(list.Header.ClusterId, 16)
	h.Members = make([]wire.Member, len(list.Members))
	var g sync.WaitGroup
	for i, m := range list.Members {
		h.Members[i] = wire.Member{Name: m.Name, ID: strconv.FormatUint(m.ID, 16), Learner: m.IsLearner}
		g.Go(func() { h.Members[i] = c.ask(ctx, h.Members[i], m.ClientURLs) })
	}
	g.Wait()
	slices.SortFunc(h.Members, func(a, b wire.Member) int { return strings.Compare(a.Name+a.ID, b.Name+b.ID) })
	return h
}

// ask completes m with what the first of its endpoints that answers says.
func (c *Client) ask(ctx context.Context, m wire.Member, urls []string) wire.Member {
	if len(urls) > 0 {
		m.Endpoint = urls[0]
	}
	began := time.Now()
	st, err := c.status(ctx, urls)
	m.Latency = time.Since(began)
	if err != nil {
		m.Err = fmt.Sprintf("does not answer: %v", err)
		return m
	}
	m.Reachable = true
	m.ID = strconv.FormatUint(st.Header.MemberId, 16)
	m.Leader = st.Leader == st.Header.MemberId
	m.Learner = st.IsLearner
	m.Version, m.DBSize, m.DBInUse, m.Quota = st.Version, st.DbSize, st.DbSizeInUse, st.DbSizeQuota
	m.Err = strings.Join(st.Errors, "; ")
	return m
}

func (c *Client) everyEndpoint() []string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Compact(slices.Sorted(slices.Values(slices.Concat(c.configured, c.members))))
}

// status asks the first of the URLs of one member that answers.
func (c *Client) status(ctx context.Context, urls []string) (st *clientv3.StatusResponse, err error) {
	err = errors.New("it has never started")
	for _, u := range urls {
		one, cancel := context.WithTimeout(ctx, readLimit)
		st, err = c.etcd.Status(one, u)
		cancel()
		if err == nil {
			return st, nil
		}
	}
	return nil, err
}
