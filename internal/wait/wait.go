// Package wait is what can be waited for: units that reach a goal, a node that
// becomes empty, a revision of the catalog that all routers run. It judges snapshots
// of the cluster's state; it must not know who asks, nor how what it waits for comes
// about.
package wait

import (
	"context"
	"time"

	"flotilla/internal/state"
	"flotilla/internal/wire"
)

// Pace is how long things take in a wait; tests are in a hurry.
type Pace struct {
	Settle time.Duration // a state in doubt has to last to be believed: nodes report what systemd does a moment later
	Quiet  time.Duration // before it is said what units wait for
	Beat   time.Duration // between signs of life
	Silent time.Duration // that the store may be away until a wait is given up
}

// UsualPace is the pace for people.
var UsualPace = Pace{Settle: 500 * time.Millisecond, Quiet: 5 * time.Second, Beat: 5 * time.Second, Silent: 15 * time.Second}

// Waiter is something that somebody waits for.
type Waiter interface {
	// look says what became of what is waited for. until is when to look again
	// although nothing has changed; zero: never. done ends the wait.
	look(known *state.Snapshot, now time.Time) (events []wire.WaitEvent, until time.Time, done bool)
	// late says what has not become of it in time, and of how much.
	late(known *state.Snapshot) (events []wire.WaitEvent, left int)
}

// Run sends the events of a wait until it is over, or send fails; a limit of 0 is
// for ever. Without events send sends a sign of life.
func Run(ctx context.Context, feed *state.Feed, pace Pace, limit time.Duration, what Waiter, send func(...wire.WaitEvent) error) error {
	defer feed.FollowReports()()
	beat := time.NewTicker(pace.Beat)
	defer beat.Stop()
	over := make(<-chan time.Time)
	if limit > 0 {
		timer := time.NewTimer(limit)
		defer timer.Stop()
		over = timer.C
	}
	for {
		known, newer := feed.Next()
		var events []wire.WaitEvent
		var until time.Time
		done := false
		if known.Reports { // without them nothing can be judged
			events, until, done = what.look(known, time.Now())
		}
		if done {
			return send(append(events, wire.WaitEvent{Outcome: wire.WaitEnd})...)
		}
		if len(events) > 0 {
			if err := send(events...); err != nil {
				return err
			}
		}
		again := make(<-chan time.Time)
		if !until.IsZero() {
			again = time.After(time.Until(until))
		}
		select {
		case <-newer:
		case <-again:
		case <-over:
			events, left := what.late(known)
			return send(append(events, wire.WaitEvent{Outcome: wire.WaitEnd, Left: left})...)
		case now := <-beat.C:
			st := feed.Status()
			if !st.Live && now.Sub(st.Confirmed) > pace.Silent {
				_, left := what.late(known)
				return send(wire.WaitEvent{Outcome: wire.WaitEnd, Left: left, Error: wire.Errorf(wire.CodeStoreUnavailable, "see: flotilla status, flotilla doctor", "the store does not answer: %s", st.Err)})
			}
			if err := send(); err != nil {
				return err
			}
		case <-ctx.Done():
			return send(wire.WaitEvent{Outcome: wire.WaitEnd, Error: wire.Errorf(wire.CodeUnavailable, "", "the node is stopping")})
		}
	}
}

// Ref names a node; of one that is away only the ID is known.
func Ref(known *state.Snapshot, id string) wire.NodeRef {
	ref := wire.NodeRef{ID: id}
	if n := known.Nodes[id]; n != nil {
		ref.Name, ref.Address = n.Record.Value.Name, n.Record.Value.Address
	}
	return ref
}
