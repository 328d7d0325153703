package node

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"sync"
	"time"

	"flotilla/internal/api"
	"flotilla/internal/client"
	"flotilla/internal/store"
)

// report keeps this node's record in the store equal to what its router says:
// at once when the applied revision changes, within 1 s for all else.
func (n *node) report(ctx context.Context) error {
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	var last string
	for {
		_, changed := n.router.Applied()
		st := n.router.Status()
		raw, err := json.Marshal(client.NodeRecord{
			V: schemaVersion, Name: n.cfg.Name, Address: n.cfg.Address, Version: n.version, Started: n.started.UTC().Truncate(time.Second),
			Applied: st.Applied, Serving: st.Serving, Draining: st.Draining, Refused: st.Refused,
		})
		if err != nil {
			return fmt.Errorf("write down the state of the node: %w", err)
		}
		if record := string(raw); record != last {
			last = record
			n.presence.Set(api.NodesPrefix+n.cfg.Name, record)
		}
		select {
		case <-changed:
		case <-tick.C:
		case <-ctx.Done():
			return nil
		}
	}
}

// checkSchema writes the version of our keys if the store has none, and warns
// if they are of a version that this program does not know.
func (n *node) checkSchema(ctx context.Context) error {
	retry := time.NewTicker(2 * time.Second)
	defer retry.Stop()
	for !n.schemaKnown(ctx) {
		select {
		case <-retry.C:
		case <-ctx.Done():
			return nil
		}
	}
	<-ctx.Done()
	return nil
}

// schemaKnown reports whether the store was reached and has a version. Errors
// are not logged: the store client and the reflector say that it is away.
func (n *node) schemaKnown(ctx context.Context) bool {
	kv, found, err := n.client.Get(ctx, SchemaKey)
	if err != nil {
		return false
	}
	if !found {
		value := fmt.Sprintf(`{"v":%d}`, schemaVersion)
		_, err := n.client.Apply(ctx, []store.Op{store.Put(SchemaKey, value)}, store.Missing(SchemaKey))
		return err == nil // after a conflict the next look finds what the other wrote
	}
	var schema struct {
		V int `json:"v"`
	}
	if err := json.Unmarshal([]byte(kv.Value), &schema); err != nil || schema.V > schemaVersion {
		n.troubles.set("schema", fmt.Sprintf("the store's keys are of version %q and this program knows %d: upgrade this node", kv.Value, schemaVersion))
		n.log.Error("the store's keys are of another version: upgrade this node", "key", SchemaKey, "value", kv.Value)
	}
	return true
}

// troubles are sentences about what is wrong with this node, by topic.
type troubles struct {
	mu   sync.Mutex // guards text
	text map[string]string
}

func (t *troubles) set(topic, sentence string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.text == nil {
		t.text = map[string]string{}
	}
	t.text[topic] = sentence
}

func (t *troubles) get(topic string) string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.text[topic]
}

// warnings returns this node's own troubles for its status.
func (n *node) warnings() []string {
	var list []string
	for _, topic := range []string{"schema", "store"} {
		if s := n.troubles.get(topic); s != "" {
			list = append(list, s)
		}
	}
	if p := n.lastGood.problem.Load(); p != nil {
		list = append(list, *p)
	}
	if h := n.discovery.reflector.Status(); h.Held {
		list = append(list, strings.TrimSuffix(h.Err, ".")+"; accept it on each node with: flotilla services confirm")
	}
	return list
}

// lag measures how long a change takes from its watch event to HAProxy.
type lag struct {
	mu      sync.Mutex // guards pending
	pending []arrival  // by revision
}

type arrival struct {
	revision int64
	at       time.Time
}

// lagPending bounds what is remembered while HAProxy is away.
const lagPending = 4096

func newLag() *lag { return &lag{} }

// seen notes that the changes up to revision have arrived.
func (l *lag) seen(revision int64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.pending) < lagPending {
		l.pending = append(l.pending, arrival{revision, time.Now()})
	}
}

// applied returns the times of the changes up to revision, and forgets them.
func (l *lag) applied(revision int64) []time.Duration {
	l.mu.Lock()
	defer l.mu.Unlock()
	var took []time.Duration
	for len(l.pending) > 0 && l.pending[0].revision <= revision {
		took = append(took, time.Since(l.pending[0].at))
		l.pending = l.pending[1:]
	}
	return took
}

// run hands the time of each change to observe, as soon as it is applied.
func (l *lag) run(ctx context.Context, applied func() (int64, <-chan struct{}), observe func(time.Duration)) error {
	for {
		revision, changed := applied()
		for _, took := range l.applied(revision) {
			observe(took)
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return nil
		}
	}
}
