package state

import (
	"context"
	"crypto/rand"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"time"

	"flotilla/internal/store"
)

// registerAgain is how long a Registration waits after the store has not answered.
const registerAgain = time.Second

// Registration keeps this node's record in the store. It has the node's Presence
// withdrawn until the record may be there: whatever others set in the Presence is
// written from then on.
//
// Of two nodes with one ID the second waits until the first is gone. If another
// node has taken this one's place all the same (this one was cut off, and came
// back), this one withdraws and waits.
//
// Each process has sessions of its own, one for each lease. So it can tell its own
// record from that of an earlier process, which may be on a lease that nobody
// renews, and whether the record is on the lease that it renews now.
type Registration struct {
	feed     *Feed
	presence *store.Presence
	record   NodeRecord // without a Session
	ttl      time.Duration
	log      *slog.Logger
	process  string // random; sessions begin with it

	mu      sync.Mutex // guards what follows
	there   bool       // the record may be in the store
	left    bool       // see Withdraw
	number  int        // of the lease that the present session is for
	session string
}

// NewRegistration returns a Registration of a node with this record, whose V and
// Session it fills in, and withdraws the Presence. The keys of a node that runs
// units stay in the store for the rest of the TTL when the Presence ends, so that
// a restart or an upgrade moves nothing; Presence.Linger changes that. ttl is that
// of the Presence, and at least 2 s.
func NewRegistration(f *Feed, p *store.Presence, record NodeRecord, ttl time.Duration, log *slog.Logger) *Registration {
	record.V = Version
	p.Withdraw()
	p.Linger(record.Units)
	return &Registration{feed: f, presence: p, record: record, ttl: ttl, log: log, process: rand.Text()[:10]}
}

// Run keeps the record until ctx ends, and returns nil then. What becomes of the
// keys is up to the Presence, which has to be run as well, and for longer.
func (r *Registration) Run(ctx context.Context) error {
	said := "" // what was logged last, while the node is not registered
	for {
		s, newer := r.feed.Next()
		lease, renewed := r.presence.Lease()
		other, err := r.settle(ctx, s, lease)
		var again <-chan time.Time
		switch {
		case err != nil:
			again = time.After(registerAgain)
			if said == "" && ctx.Err() == nil {
				said = "away"
				r.log.Warn("this node cannot register: trying again", "err", err)
			}
		case other == nil:
			said = ""
		case said != other.Address:
			said = other.Address
			r.log.Error("this node is not registered: another one has the same machine ID. "+
				"Give this one its own: rm /etc/machine-id && systemd-machine-id-setup, and reboot",
				"machine", other.ID, "node", other.Name, "address", other.Address)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-newer:
		case <-renewed:
		case <-again:
		}
	}
}

// settle has the record in the store, unless that of another node is there, which
// it returns.
func (r *Registration) settle(ctx context.Context, s *Snapshot, lease store.Lease) (other *NodeRecord, err error) {
	if s.Revision == 0 {
		return nil, nil // nothing is known yet
	}
	r.mu.Lock()
	there := r.there
	r.mu.Unlock()
	other = r.other(s)
	if there == (other != nil) { // something has to change, if the snapshot is not older than our record
		if s, err = r.feed.Fresh(ctx); err != nil {
			return nil, err
		}
		other = r.other(s)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	switch {
	case r.left:
	case other == nil && !r.there:
		r.there = true
		r.begin(lease.Number + 1) // there is none now, while the Presence is withdrawn
		r.presence.Return()
	case other == nil && lease.Number > r.number:
		r.begin(lease.Number)
	case other != nil && r.there:
		r.there = false
		r.presence.Withdraw()
	}
	return other, nil
}

// Withdraw takes the node's keys out of the store for good.
func (r *Registration) Withdraw() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.left, r.there = true, false
	r.presence.Withdraw()
}

// begin begins the session for a lease; r.mu is held.
func (r *Registration) begin(number int) {
	r.number, r.session = number, fmt.Sprintf("%s.%d", r.process, number)
	record := r.record
	record.Session = r.session
	r.presence.Set(r.feed.Keys.Node(record.ID), Encode(record))
}

// other returns the record that is in this node's place, and nil if there is none
// or it is this node's own. One that cannot be read is taken for an own one of
// another version.
func (r *Registration) other(s *Snapshot) *NodeRecord {
	n := s.Nodes[r.record.ID]
	if n == nil || !n.Record.Usable() || sameNode(n.Record.Value, r.record) {
		return nil
	}
	return &n.Record.Value
}

// sameNode reports whether two records with one ID are of one node. Two that are
// there at once have different addresses; one that was started again has its
// address, and one whose address was changed has its boot ID and name. A node that
// comes back from a reboot with another address waits until its old record is gone.
func sameNode(a, b NodeRecord) bool {
	return a.Address == b.Address || a.BootID == b.BootID && a.Name == b.Name
}

// T0 returns when the last confirmed renewal was sent of the lease that the record
// is surely on, and the zero Time while that is not known: the record stays in the
// store for at least the TTL from then.
func (r *Registration) T0() time.Time {
	lease, _ := r.presence.Lease()
	self := r.feed.Latest().Nodes[r.record.ID]
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.there || lease.Number != r.number || self == nil || !self.Record.Usable() || self.Record.Value.Session != r.session {
		return time.Time{}
	}
	return lease.Renewed
}

// Registered reports whether the cluster knows this node as present.
func (r *Registration) Registered() bool {
	lease, _ := r.presence.Lease()
	return time.Since(lease.Renewed) < r.ttl && r.Generation() != 0
}

// Generation returns the generation of this node, and 0 while it is not registered.
func (r *Registration) Generation() int64 { return r.GenerationIn(r.feed.Latest()) }

// GenerationIn returns what Generation was in a snapshot.
func (r *Registration) GenerationIn(s *Snapshot) int64 {
	n := s.Nodes[r.record.ID]
	if n == nil || !n.Record.Usable() || !strings.HasPrefix(n.Record.Value.Session, r.process+".") {
		return 0
	}
	return n.Generation()
}
