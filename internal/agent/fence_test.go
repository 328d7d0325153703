package agent

import (
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"flotilla/internal/state"
	"flotilla/internal/store"
	"flotilla/internal/systemd"
	"flotilla/internal/unit"
)

func TestFenceActions(t *testing.T) {
	t0 := time.Now()
	at := func(s float64) time.Time { return t0.Add(time.Duration(s * float64(time.Second))) }
	for _, tc := range []struct {
		name string
		fenceState
		do   fenceAction
		wait time.Duration
		open bool
	}{
		{"no exclusive unit", fenceState{closed: true}, rest, 0, false},
		{"the last one has left", fenceState{armed: t0}, disarm, 0, false},
		{"the first one, armed at once", fenceState{needed: true, closed: true, armed: at(-100), t0: t0, now: at(2)}, arm, 0, false},
		{"armed, nothing to do before 8 s", fenceState{needed: true, armed: t0, t0: t0, now: at(3)}, rest, 5 * time.Second, true},
		{"renewed", fenceState{needed: true, armed: t0, t0: at(3), now: at(3.1)}, arm, 0, true},
		{"confirmed too late to count", fenceState{needed: true, armed: t0, t0: at(1), now: at(9.1)}, halt, 0, false},
		{"the store is away", fenceState{needed: true, armed: t0, now: at(8)}, halt, 0, false},
		{"stopped", fenceState{needed: true, armed: t0, now: at(8.5), halted: true}, rest, time.Second, false},
		{"time is up", fenceState{needed: true, armed: t0, now: at(9.5), halted: true}, kill, 0, false},
		{"killed once", fenceState{needed: true, armed: t0, now: at(9.6), halted: true, kills: 1}, rest, 400 * time.Millisecond, false},
		{"killed again", fenceState{needed: true, armed: t0, now: at(10.1), halted: true, kills: 1}, kill, 0, false},
		{"frozen for long: stop, so that nothing restarts", fenceState{needed: true, armed: t0, now: at(60)}, halt, 0, false},
		{"and kill at once", fenceState{needed: true, armed: t0, now: at(60), halted: true}, kill, 0, false},
		{"cannot be armed just now", fenceState{needed: true, armed: t0, t0: at(3), now: at(3.2), failed: at(3.1)}, rest, 400 * time.Millisecond, true},
		{"cannot be armed for long", fenceState{needed: true, armed: t0, t0: at(6), now: at(8), failed: at(7.9)}, halt, 0, false},
		{"confirmed again after that", fenceState{needed: true, armed: t0, t0: at(59), now: at(60), halted: true, kills: 3}, arm, 0, false},
		{"alone", fenceState{needed: true, exempt: true, closed: true, now: at(60)}, widen, 0, false},
		{"alone, and the store is away", fenceState{needed: true, exempt: true, wide: true, armed: t0, now: at(60)}, rest, 0, true},
		{"not alone any more", fenceState{needed: true, wide: true, armed: at(-100), t0: t0, now: at(1)}, arm, 0, false},
		{"a new process that gets no lease", fenceState{needed: true, closed: true, armed: t0, now: at(8)}, halt, 0, false},
	} {
		tc.ttl = store.DefaultTTL
		do, wait := tc.next()
		if do != tc.do || wait != tc.wait || tc.open != tc.fenceState.open() {
			t.Errorf("%s: %s, %s, open %v, want %s, %s, %v", tc.name, do, wait, tc.fenceState.open(), tc.do, tc.wait, tc.open)
		}
	}
}

// Whatever is confirmed when: unless it is alone, units are dead and cannot be
// started from killAfter after the last confirmation that counted, if all that
// is due is done at once.
func TestFenceActionsHold(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		begin := time.Now()
		s := fenceState{ttl: store.DefaultTTL, needed: true, closed: true, armed: begin, now: begin}
		timer, alive := time.Time{}, false // PID 1's, and the units
		for range 200 {
			s.now = s.now.Add(time.Duration(rapid.IntRange(1, 3000).Draw(t, "ms")) * time.Millisecond)
			if rapid.Bool().Draw(t, "confirmed") {
				s.t0 = s.now.Add(-time.Duration(rapid.IntRange(0, 4000).Draw(t, "ago")) * time.Millisecond)
			} else if rapid.Bool().Draw(t, "lost") {
				s.t0 = time.Time{}
			}
			frozen := rapid.IntRange(0, 9).Draw(t, "frozen") == 0
			if !timer.IsZero() && !s.now.Before(timer) {
				alive = false
			}
			for !frozen {
				do, wait := s.next()
				switch do {
				case arm:
					if rapid.IntRange(0, 3).Draw(t, "broken") == 0 {
						s.failed = s.now
						continue
					}
					timer = s.t0.Add(killAfter(s.ttl))
					s.armed, s.closed, s.halted, s.kills = s.t0, false, false, 0
				case halt:
					s.halted, alive = true, false
				case kill:
					s.kills++
					alive = false
				}
				if do == rest {
					if wait < 0 {
						t.Fatalf("rest for %s: %+v", wait, s)
					}
					break
				}
			}
			if !frozen && s.open() {
				alive = true
			}
			if alive && s.now.Sub(s.armed) >= killAfter(s.ttl) {
				t.Fatalf("alive %s after the last confirmation: %+v", s.now.Sub(s.armed), s)
			}
		}
	})
}

// second registers another machine.
func (r *rig) second() {
	r.put(r.keys.Node("second"), state.Encode(state.NodeRecord{V: 1, ID: "second", BootID: "x", Name: "n2", Address: "10.0.0.2", Units: true}))
}

func TestExclusiveIsFenced(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	r.ttl = 12 * time.Second
	r.second()
	p := r.begin()
	r.place("e.service", service("run", exclusive), unit.Launched)
	r.place("n.service", service("run"), unit.Launched)
	pinned := service("run", exclusive, "MachineID="+r.machine.ID)
	r.place("pinned.service", pinned, unit.Launched)
	for _, name := range []string{"e.service", "n.service", "pinned.service"} {
		r.waitActive(name)
	}
	first, calm, fixed := r.fake.invocation("e.service"), r.fake.invocation("n.service"), r.fake.invocation("pinned.service")
	r.proxy.Cut()
	r.wait("the unit to be stopped", func() bool {
		_, there := r.get(r.keys.Node(r.machine.ID))
		active := r.fake.active("e.service") == "active"
		if active && !there {
			t.Error("the unit runs, and the machine's record is gone")
		}
		return !active
	})
	r.wait("the record to be gone", func() bool { _, there := r.get(r.keys.Node(r.machine.ID)); return !there })
	r.proxy.Mend()
	r.wait("the machine to be back", p.Registered)
	// Its entry is void until it is refreshed.
	r.waitState("n.service", "to run", func(s state.UnitState) bool { return s.Active == "active" })
	if active := r.fake.active("e.service"); active == "active" {
		t.Error("it runs without a valid entry")
	}
	r.place("e.service", service("run", exclusive), unit.Launched, func(e *placed) { e.Epoch = 8 })
	r.wait("it to run again", func() bool { return r.fake.active("e.service") == "active" && r.fake.invocation("e.service") != first })
	if r.fake.invocation("n.service") != calm || r.fake.invocation("pinned.service") != fixed {
		t.Error("a unit that is not fenced was stopped")
	}
	r.check()
}

// The agent is dead: PID 1 kills, and the next agent starts again only with a
// valid entry.
func TestFenceWithoutAgent(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	r.ttl = 6 * time.Second
	r.second()
	p := r.begin()
	r.place("e.service", service("run", exclusive), unit.Launched)
	r.place("once.service", service("once"), unit.Launched)
	r.waitActive("e.service")
	r.waitState("once.service", "to be launched", func(s state.UnitState) bool { return s.Launched })
	was := r.fake.invocation("e.service")
	p.finish()
	r.wait("the fence", func() bool { return r.fake.active("e.service") == "failed" })
	p = r.begin()
	r.wait("the machine to be back", p.Registered)
	r.place("e.service", service("run", exclusive), unit.Launched)
	r.wait("it to run again", func() bool { return r.fake.active("e.service") == "active" })
	if r.fake.invocation("e.service") == was {
		t.Error("it is the same copy")
	}
	n := 0
	for _, what := range r.fake.did() {
		if what == "start once.service" {
			n++
		}
	}
	if n != 1 {
		t.Errorf("a unit that had done its work was started %d times", n)
	}
}

// The next agent keeps the fence, and what runs behind it.
func TestAgentRestartsBehindTheFence(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	r.second()
	p := r.begin()
	r.place("e.service", service("run", exclusive), unit.Launched)
	r.waitActive("e.service")
	was := r.fake.invocation("e.service")
	fences := func() int { r.fake.mu.Lock(); defer r.fake.mu.Unlock(); return r.fake.fences }
	for range 3 {
		p.finish()
		before := fences()
		p = r.begin()
		r.wait("the new agent to put the fence off", func() bool { return p.Registered() && fences() > before })
		r.waitActive("e.service")
	}
	if r.fake.invocation("e.service") != was {
		t.Error("the restart of the agent was noticed")
	}
}

func TestExclusiveStopsWhenTheFenceCannotBeArmed(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	r.ttl = 12 * time.Second
	r.second()
	r.begin()
	r.place("e.service", service("run", exclusive), unit.Launched)
	r.waitActive("e.service")
	r.fake.hook(func(_ int, call string) (before, after error) {
		if call == "fence" {
			return errors.New("no timers today"), nil
		}
		return nil, nil
	})
	r.wait("it to stop", func() bool { return r.fake.active("e.service") != "active" })
	if !slices.Contains(r.fake.did(), "stopped e.service") {
		t.Errorf("it was killed and not stopped: %v", r.fake.did())
	}
	r.waitState("e.service", "to wait", func(s state.UnitState) bool { return !s.Launched && s.Waiting != "" && s.Trouble == "" })
	r.fake.hook(nil)
	r.waitActive("e.service")
}

// A single machine is exempt by its setting, until there is another one.
func TestSingleMachine(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	r.ttl, r.single = 6*time.Second, true
	p := r.begin()
	// A node that runs no units takes none.
	r.put(r.keys.Node("router"), state.Encode(state.NodeRecord{V: 1, ID: "router", Name: "r", Address: "10.0.0.3", Routes: true}))
	r.place("e.service", service("run", exclusive), unit.Launched)
	r.waitActive("e.service")
	was := r.fake.invocation("e.service")

	// The store goes away for good: nothing is stopped, not by the next agent either.
	r.proxy.Cut()
	r.wait("the machine to be gone", func() bool { _, there := r.get(r.keys.Node(r.machine.ID)); return !there })
	p.finish()
	p = r.begin()
	began := time.Now()
	r.wait("the time of the fence to pass", func() bool { return time.Since(began) > r.ttl })
	if r.fake.invocation("e.service") != was || r.fake.active("e.service") != "active" {
		t.Errorf("an exclusive unit of a machine that is alone was stopped: %v", r.fake.did())
	}
	// Back with another generation: the refresh touches nothing.
	r.proxy.Mend()
	r.wait("the machine to be back", p.Registered)
	r.place("e.service", service("run", exclusive), unit.Launched, func(e *placed) { e.Epoch = 8 })
	r.waitState("e.service", "to have the new epoch", func(s state.UnitState) bool { return s.Epoch == 8 && s.Active == "active" })
	if r.fake.invocation("e.service") != was {
		t.Error("the refresh restarted it")
	}

	// A second machine: the fence is armed, and stays so when that has gone again.
	fences := func() int { r.fake.mu.Lock(); defer r.fake.mu.Unlock(); return r.fake.fences }
	before := fences()
	r.second()
	r.wait("the fence to be armed", func() bool { f := p.guard.look(); return fences() > before && f.Open && !f.Exempt })
	if r.fake.invocation("e.service") != was {
		t.Error("it was restarted")
	}
	r.delete(r.keys.Node("second"))
	r.proxy.Cut()
	r.wait("it to be fenced", func() bool { return r.fake.active("e.service") != "active" })
	r.check()
}

// Without the setting a machine that is alone is fenced as any other.
func TestAloneIsFenced(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	r.ttl = 6 * time.Second
	r.begin()
	r.place("e.service", service("run", exclusive), unit.Launched)
	r.waitActive("e.service")
	r.proxy.Cut()
	r.wait("it to be fenced", func() bool { return r.fake.active("e.service") != "active" })
	r.check()
}

// The placement is taken away at the moment of the start.
func TestExclusiveAsksBeforeItStarts(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	r.second()
	r.begin()
	r.place("x.service", service("run", exclusive), unit.Launched) // so that the fence is armed
	r.waitActive("x.service")
	taken := false
	r.fake.hook(func(_ int, call string) (before, after error) {
		if call == "link" && !taken {
			taken = true
			if _, err := r.store.Apply(t.Context(), []store.Op{store.Delete(r.keys.Placement("e.service"))}); err != nil {
				return err, nil
			}
		}
		return nil, nil
	})
	r.place("e.service", service("run", exclusive), unit.Launched)
	r.wait("it to be taken away and unloaded", func() bool {
		return slices.Equal(r.fake.linked(), []string{"x.service"}) && len(r.states()) == 1 && func() bool { r.fake.mu.Lock(); defer r.fake.mu.Unlock(); return taken }()
	})
	if slices.Contains(r.fake.did(), "start e.service") {
		t.Error("it was started")
	}
}

func TestDropIns(t *testing.T) {
	for name, want := range map[string]string{"a.service": "[Service]", "a.socket": "[Socket]", "a.timer": ""} {
		keys := state.Keys{Prefix: "/f/"}
		record := state.UnitRecord{V: 1, Text: "[Unit]\n" + exclusive, Desired: unit.Launched}
		s := state.Load(keys, []store.KV{{Key: keys.Unit(name), Value: state.Encode(record), CreateRevision: 3, ModRevision: 3}}, 3)
		got := newWant(s.Units[name], "m", 1, nil).DropIn
		if want == "" && got != "" || !strings.Contains(got, want) || want != "" && !strings.Contains(got, "Slice="+systemd.FenceSlice) {
			t.Errorf("%s: %q", name, got)
		}
	}
}
