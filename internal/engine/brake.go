package engine

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"flotilla/internal/registry"
)

// This file is as pure as plan.go: what keeps a plan from being rash.

// Limits of back-off and brake.
const (
	firstBackOff = time.Minute // doubled with each trouble of the unit on the machine
	lastBackOff  = time.Hour
	massWindow   = 5 * time.Minute  // in which machines go together
	holdTime     = 10 * time.Minute // until what is held goes on by itself
)

// backOff ends what has lasted long enough.
func (p *pass) backOff() {
	for u := range p.excluding {
		for id, x := range u.excluded {
			switch {
			case p.now.Before(x.until):
				p.due(x.until)
			case x.active:
				x.active = false
				p.touch(u)
				p.due(x.until.Add(lastBackOff))
			case p.now.Before(x.until.Add(lastBackOff)):
				p.due(x.until.Add(lastBackOff))
			default: // it was well for long
				delete(u.excluded, id)
				p.touch(u)
			}
		}
		if len(u.excluded) == 0 {
			delete(p.excluding, u)
		}
	}
}

// exclude keeps the unit from the machine for a while, once for each placement.
func (p *pass) exclude(u *unitState, m *machine, t trouble) {
	x := u.excluded[m.id]
	switch {
	case x == nil:
		x = &exclusion{delay: firstBackOff}
	case x.epoch == t.epoch:
		return
	default:
		x.delay = min(2*x.delay, lastBackOff)
	}
	x.active, x.epoch, x.until, x.reason = true, t.epoch, p.now.Add(x.delay), t.text
	if u.excluded == nil {
		u.excluded = map[string]*exclusion{}
	}
	u.excluded[m.id] = x
	p.excluding[u] = struct{}{}
	p.due(x.until)
}

// brake finds out whether so many machines are gone at once that something else
// than their death is likely, and holds what would be moved.
func (p *pass) brake() {
	lost := p.lostMachines()
	recent := 0
	for id, at := range p.gone {
		m := p.machines[id]
		old := p.now.Sub(at) > massWindow
		if m != nil && m.present || old && !slices.Contains(lost, m) {
			delete(p.gone, id)
		} else if !old {
			recent++
		}
	}
	mass := recent >= 2 && 3*recent > p.present+recent
	f := p.failover
	until := func(s Step) Step {
		s.FailoverSeen = p.failoverMod
		return s
	}
	if f.Allowed {
		switch end := time.Unix(f.Until, 0); {
		case f.Until == 0:
			p.steps = append(p.steps, until(Step{Do: Allow, Reason: "somebody allowed it",
				Failover: registry.Failover{V: registry.Version, Allowed: true, Until: p.now.Add(holdTime).Unix()}}))
		case !p.now.Before(end):
			p.steps = append(p.steps, until(Step{Do: EndHold, Reason: "what was held has had its time to move"}))
		default:
			p.due(end)
		}
		return
	}
	end, added := time.Unix(f.Until, 0), false
	if p.failoverMod == 0 {
		end = p.now.Add(holdTime)
	}
	var held []string
	for _, m := range lost {
		before := slices.Contains(f.Held, m.id)
		if before || mass && p.now.Sub(p.gone[m.id]) <= massWindow {
			held = append(held, m.id)
			p.held[m] = struct{}{}
			added = added || !before
		}
	}
	switch {
	case len(held) == 0 && p.failoverMod != 0:
		p.steps = append(p.steps, until(Step{Do: EndHold, Reason: "no machine is gone any more whose units wait"}))
	case len(held) == 0:
	case !p.now.Before(end):
		p.steps = append(p.steps, until(Step{Do: Allow, Reason: "it was held for long enough",
			Failover: registry.Failover{V: registry.Version, Allowed: true, Until: p.now.Add(holdTime).Unix()}}))
	case added:
		p.steps = append(p.steps, until(Step{Do: Hold, Reason: fmt.Sprintf("%d of %s went within %s: their units wait until they are back, somebody allows it, or the time is over",
			recent, plural(p.present+recent, "machine"), massWindow),
			Failover: registry.Failover{V: registry.Version, Held: held, Until: end.Unix()}}))
	default:
		p.due(end)
	}
}

// lostMachines returns the machines that are gone and have units about which
// nothing is decided, sorted by ID, and notes since when. One that had stopped
// all its units before has left in order, and is not among them.
func (p *pass) lostMachines() []*machine {
	var lost []*machine
	for _, m := range p.machines {
		if m.present || m.idle {
			continue
		}
		for u := range m.units {
			if u.placeable() && u.unplacedMod == 0 {
				lost = append(lost, m)
				if _, ok := p.gone[m.id]; !ok {
					p.gone[m.id] = p.now
				}
				break
			}
		}
	}
	slices.SortFunc(lost, func(a, b *machine) int { return strings.Compare(a.id, b.id) })
	return lost
}
