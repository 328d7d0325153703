package agent

import (
	"context"
	"crypto/rand"
	"fmt"
	"strings"
	"sync"
	"time"

	"flotilla/internal/registry"
)

// place is this machine's place in the store: its record, and which lease that
// is on. Every process has its own sessions, so that it can tell its own record
// from that of an earlier one, which may be on a lease that nobody renews.
type place struct {
	a       *Agent
	process string // random

	mu    sync.Mutex // guards what follows
	asked bool       // the record was given to the Presence
	count int        // of sessions
	value string     // of the record of the present session
	last  time.Time  // when the newest renewal that was looked at had been sent
}

func newPlace(a *Agent) *place {
	p := &place{a: a, process: rand.Text()[:10]}
	p.begin()
	return p
}

// begin begins another session; p.mu is held, or p is new.
func (p *place) begin() {
	p.count++
	m := p.a.cfg.Machine
	m.Session = fmt.Sprintf("%s.%d", p.process, p.count)
	p.value = registry.Encode(m)
	if p.asked {
		p.a.cfg.Presence.Set(p.a.keys.Machine(p.a.own), p.value)
	}
}

// mine reports whether the record was written by this process.
func (p *place) mine(m machine) bool { return strings.HasPrefix(m.Session, p.process+".") }

// admitted reports whether the record may be in the store, and its value.
func (p *place) admitted() (string, bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.value, p.asked
}

// t0 returns when the last confirmed renewal was sent of the lease that the
// record is on; zero while that is not known. After a gap in the renewals the
// lease may be another one than before, which the record is not yet on.
func (p *place) t0() time.Time {
	p.mu.Lock()
	defer p.mu.Unlock()
	now := p.a.cfg.Presence.Confirmed()
	if !now.IsZero() {
		if !p.last.IsZero() && now.Sub(p.last) >= stopAfter(p.a.cfg.TTL) {
			p.begin()
		}
		p.last = now
	}
	if self := p.a.view.self(); !p.asked || self.value != p.value {
		return time.Time{}
	}
	return now
}

// lost reports whether it is known that the record is gone: the lease was lost,
// or the store has said that the record was removed or is another machine's.
func (p *place) lost() bool {
	p.mu.Lock()
	last := p.last
	p.mu.Unlock()
	if !last.IsZero() && p.a.cfg.Presence.Confirmed().IsZero() {
		return true
	}
	_, _, known := p.a.view.others()
	return known && !sameMachine(p.a.view.self().Machine, p.a.cfg.Machine)
}

// run writes the record of this machine, unless another machine that is there
// has the same ID, and watches over it.
func (p *place) run(ctx context.Context) error {
	a, said := p.a, ""
	for ctx.Err() == nil {
		kv, there, err := a.cfg.Store.Get(ctx, a.keys.Machine(a.own))
		var other registry.Machine
		if err == nil && there {
			// One that cannot be read is taken for an own one of another version.
			other, _ = registry.Decode[registry.Machine](kv.Value)
		}
		switch {
		case err != nil:
			if ctx.Err() == nil && said == "" {
				said = "away"
				a.log.Warn("this machine cannot register: trying again", "err", err)
			}
		case there && other.ID != "" && !sameMachine(other, a.cfg.Machine):
			if said != other.Address {
				said = other.Address
				a.log.Error("this machine does not register: another one has the same machine ID. "+
					"Give this one its own: rm /etc/machine-id && systemd-machine-id-setup, and reboot",
					"machine", a.own, "node", other.Node, "address", other.Address)
			}
		default:
			p.mu.Lock()
			p.asked = true
			p.begin()
			p.mu.Unlock()
			a.poke()
			a.guard.poke()
			return p.watch(ctx)
		}
		select {
		case <-ctx.Done():
		case <-time.After(time.Second):
		}
	}
	return nil
}

// watch returns ErrReplaced when the record of this machine is that of another
// one.
func (p *place) watch(ctx context.Context) error {
	a := p.a
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(time.Second):
		}
		if self := a.view.self(); self.ID == "" || sameMachine(self.Machine, a.cfg.Machine) {
			continue
		}
		kv, there, err := a.cfg.Store.Get(ctx, a.keys.Machine(a.own)) // the view may be older than our record
		now, bad := registry.Decode[registry.Machine](kv.Value)
		if err == nil && there && bad == nil && !sameMachine(now, a.cfg.Machine) {
			return fmt.Errorf("machine %s: %w: node %s at %s; give one of the two another /etc/machine-id", a.own, ErrReplaced, now.Node, now.Address)
		}
	}
}

// sameMachine reports whether two records with one ID are of one machine. Two
// that are there at once have different addresses; one that was started again
// has its address, and one whose address was changed has its boot ID and name.
// A machine that comes back from a reboot with another address waits until its
// old record is gone.
func sameMachine(a, b registry.Machine) bool {
	return a.Address == b.Address || a.BootID == b.BootID && a.Node == b.Node
}
