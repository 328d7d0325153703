package agent

import (
	"context"
	"errors"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"pgregory.net/rapid"

	"flotilla/internal/registry"
	"flotilla/internal/store"
	"flotilla/internal/systemd"
)

func TestDuties(t *testing.T) {
	t0 := time.Now()
	at := func(s float64) time.Time { return t0.Add(time.Duration(s * float64(time.Second))) }
	for _, tc := range []struct {
		name string
		stand
		do   duty
		wait time.Duration
		open bool
	}{
		{"no exclusive unit", stand{closed: true}, rest, 0, false},
		{"the last one has left", stand{armed: t0}, disarm, 0, false},
		{"the first one, armed at once", stand{needed: true, closed: true, armed: at(-100), t0: t0, present: at(2)}, arm, 0, false},
		{"armed, nothing to do before 8 s", stand{needed: true, armed: t0, t0: t0, present: at(3)}, rest, 5 * time.Second, true},
		{"renewed", stand{needed: true, armed: t0, t0: at(3), present: at(3.1)}, arm, 0, true},
		{"confirmed too late to count", stand{needed: true, armed: t0, t0: at(1), present: at(9.1)}, halt, 0, false},
		{"the store is away", stand{needed: true, armed: t0, present: at(8)}, halt, 0, false},
		{"stopped", stand{needed: true, armed: t0, present: at(8.5), halted: true}, rest, time.Second, false},
		{"time is up", stand{needed: true, armed: t0, present: at(9.5), halted: true}, kill, 0, false},
		{"killed once", stand{needed: true, armed: t0, present: at(9.6), halted: true, kills: 1}, rest, 400 * time.Millisecond, false},
		{"killed again", stand{needed: true, armed: t0, present: at(10.1), halted: true, kills: 1}, kill, 0, false},
		{"frozen for long: stop, so that nothing restarts", stand{needed: true, armed: t0, present: at(60)}, halt, 0, false},
		{"and kill at once", stand{needed: true, armed: t0, present: at(60), halted: true}, kill, 0, false},
		{"cannot be armed just now", stand{needed: true, armed: t0, t0: at(3), present: at(3.2), failed: at(3.1)}, rest, 400 * time.Millisecond, true},
		{"cannot be armed for long", stand{needed: true, armed: t0, t0: at(6), present: at(8), failed: at(7.9)}, halt, 0, false},
		{"confirmed again after that", stand{needed: true, armed: t0, t0: at(59), present: at(60), halted: true, kills: 3}, arm, 0, false},
		{"alone", stand{needed: true, solo: true, closed: true, present: at(60)}, widen, 0, false},
		{"alone, and the store is away", stand{needed: true, solo: true, wide: true, armed: t0, present: at(60)}, rest, 0, true},
		{"not alone any more", stand{needed: true, wide: true, armed: at(-100), t0: t0, present: at(1)}, arm, 0, false},
		{"a new process that gets no lease", stand{needed: true, closed: true, armed: t0, present: at(8)}, halt, 0, false},
	} {
		tc.ttl = store.DefaultTTL
		do, wait := tc.next()
		if do != tc.do || wait != tc.wait || tc.open != tc.stand.open() {
			t.Errorf("%s: %s, %s, open %v, want %s, %s, %v", tc.name, do, wait, tc.stand.open(), tc.do, tc.wait, tc.open)
		}
	}
}

// Whatever is confirmed when: unless it is alone, units are dead and cannot be
// started from killAfter after the last confirmation that counted, if all that
// is due is done at once.
func TestDutiesHold(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		begin := time.Now()
		s := stand{ttl: store.DefaultTTL, needed: true, closed: true, armed: begin, present: begin}
		timer, alive := time.Time{}, false // PID 1's, and the units
		for range 200 {
			s.present = s.present.Add(time.Duration(rapid.IntRange(1, 3000).Draw(t, "ms")) * time.Millisecond)
			if rapid.Bool().Draw(t, "confirmed") {
				s.t0 = s.present.Add(-time.Duration(rapid.IntRange(0, 4000).Draw(t, "ago")) * time.Millisecond)
			} else if rapid.Bool().Draw(t, "lost") {
				s.t0 = time.Time{}
			}
			frozen := rapid.IntRange(0, 9).Draw(t, "frozen") == 0
			if !timer.IsZero() && !s.present.Before(timer) {
				alive = false
			}
			for !frozen {
				do, wait := s.next()
				switch do {
				case arm:
					if rapid.IntRange(0, 3).Draw(t, "broken") == 0 {
						s.failed = s.present
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
			if alive && s.present.Sub(s.armed) >= killAfter(s.ttl) {
				t.Fatalf("alive %s after the last confirmation: %+v", s.present.Sub(s.armed), s)
			}
		}
	})
}

func TestProofs(t *testing.T) {
	begin := time.Now()
	at := func(s float64) time.Time { return begin.Add(time.Duration(s * float64(time.Second))) }
	never := time.Time{}
	for _, tc := range []struct {
		name              string
		confirmed, proven time.Time
		lost              bool
		asked, answered   time.Time
		asks              bool
		t0                time.Time // after the proof
	}{
		{"the store is there", at(0), never, false, at(3.9), at(4), false, at(3.9)},
		{"it does not answer", at(0), never, false, at(4), at(6), true, at(4)},
		{"the last moment to ask", at(0), never, false, at(7.9), at(7.95), true, at(7.9)},
		{"answered too late", at(0), never, false, at(7), at(8), true, at(0)},
		{"asked too late", at(0), never, false, at(8), at(8.1), false, at(0)},
		{"from proof to proof", at(0), at(50), false, at(51), at(51.1), true, at(51)},
		{"the last proof is too old", at(0), at(50), false, at(58), at(58.1), false, at(50)},
		{"of an earlier process", never, at(-3), false, at(1), at(1.1), true, at(1)},
		{"nothing is known", never, never, false, at(1), at(1.1), false, never},
		{"the record is lost", never, at(50), true, at(51), at(51.1), false, never},
		{"confirmed meanwhile", at(51), at(50), false, at(50.5), at(51.5), false, at(51)},
	} {
		s := stand{ttl: store.DefaultTTL, needed: true, proven: tc.proven}
		s.date(tc.asked, tc.confirmed, tc.lost)
		if s.asks() != tc.asks {
			t.Errorf("%s: asks %v", tc.name, s.asks())
		}
		for _, not := range []stand{{needed: false, solo: false}, {needed: true, solo: true}} {
			o := s
			if o.needed, o.solo = not.needed, not.solo; o.asks() {
				t.Errorf("%s: it asks for nothing", tc.name)
			}
		}
		s.date(tc.answered, tc.confirmed, tc.lost)
		counts := s.prove(tc.asked)
		if !s.t0.Equal(tc.t0) || counts && !s.proven.Equal(tc.asked) {
			t.Errorf("%s: counts %v, t0 is %s after the beginning", tc.name, counts, s.t0.Sub(begin))
		}
	}
}

// A model of a store whose members lead, die and come back as they like: the
// machine's record is there until killAfter the newest t0, and longer.
func TestProofsHold(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		const members = 3
		begin := time.Now()
		s := stand{ttl: store.DefaultTTL, needed: true}
		leader, expires := 0, begin.Add(s.ttl) // -1: none; the lease as the leader counts it
		confirmed := begin
		var asked time.Time
		var open [members]bool // has not yet proven
		proofs := 0
		now := begin
		for range 300 {
			now = now.Add(time.Duration(rapid.IntRange(1, 400).Draw(t, "ms")) * time.Millisecond)
			if rapid.IntRange(0, 9).Draw(t, "elect") == 0 {
				leader = rapid.IntRange(-1, members-1).Draw(t, "leader")
				expires = now.Add(s.ttl)
			}
			if leader >= 0 && rapid.IntRange(0, 19).Draw(t, "renew") == 0 {
				confirmed, expires = now, now.Add(s.ttl)
			}
			if leader >= 0 && !now.Before(expires) {
				if age := now.Sub(s.t0); age < killAfter(s.ttl) {
					t.Fatalf("the record is gone %s after t0", age)
				}
				return
			}
			s.date(now, confirmed, false)
			if asked.IsZero() && s.asks() {
				asked, open = now, [members]bool{true, true, true}
			}
			for m := range members {
				if m != leader && rapid.Bool().Draw(t, "answers") {
					open[m] = false
				}
			}
			switch {
			case asked.IsZero():
			case now.Sub(asked) > askLimit(s.ttl):
				asked = time.Time{}
			case open == [members]bool{}:
				if s.prove(asked) {
					proofs++
				}
				asked = time.Time{}
			}
		}
	})
}

func TestT0OnDisk(t *testing.T) {
	d := disk{state: t.TempDir()}
	if got := d.t0(); !got.IsZero() {
		t.Errorf("there is a t0 of %s ago", time.Since(got))
	}
	want := time.Now().Add(-3 * time.Second)
	if err := d.setT0(want); err != nil {
		t.Fatal(err)
	}
	if got := d.t0(); got.IsZero() || got.After(want) {
		t.Errorf("it is %s later", got.Sub(want))
	}
	for _, text := range []string{"", "x", "-5", "0", "99999999999999999999", strconv.FormatInt(math.MaxInt64, 10)} {
		if err := os.WriteFile(filepath.Join(d.state, t0Name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		if got := d.t0(); !got.IsZero() {
			t.Errorf("%q: it is %s ago", text, time.Since(got))
		}
	}
	if err := d.setT0(time.Time{}); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(d.state, t0Name)); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the file is there: %v", err)
	}
}

// The store is away and proven to have no leader: exclusive units run on, also
// behind another agent, which starts none; until the proof ends.
func TestProofsCarryUnits(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	r.ttl = 12 * time.Second
	var proofs atomic.Int64
	var sure atomic.Bool
	r.leaderless = func(context.Context) bool {
		if sure.Load() {
			proofs.Add(1)
		}
		return sure.Load()
	}
	r.second()
	p := r.begin()
	r.place("e.service", service("run", exclusive), registry.Launched)
	r.waitActive("e.service")
	was := r.fake.invocation("e.service")
	sure.Store(true)
	r.proxy.Cut()
	began := time.Now()
	r.wait("proofs", func() bool { return proofs.Load() > 2 })
	p.finish()
	p = r.begin()
	r.wait("the time of the fence to pass twice", func() bool { return time.Since(began) > 2*killAfter(r.ttl) })
	if r.fake.invocation("e.service") != was || r.fake.active("e.service") != "active" {
		t.Errorf("it was touched: %v", r.fake.did())
	}
	if f := p.guard.look(); !f.Open {
		t.Error("the fence is not armed")
	}
	if err := p.mayStart(t.Context(), "e.service", 0, 0); !errors.Is(err, errNotNow) {
		t.Errorf("it may start: %v", err)
	}
	sure.Store(false)
	r.wait("it to be stopped", func() bool { return r.fake.active("e.service") != "active" })
	if !slices.Contains(r.fake.did(), "stopped e.service") {
		t.Errorf("it was killed and not stopped: %v", r.fake.did())
	}
	// What is proven now comes too late.
	sure.Store(true)
	r.wait("the fence to stay closed", func() bool { return time.Since(p.guard.date().t0) > killAfter(r.ttl) })
	if p.guard.date().asks() {
		t.Error("it asks for more")
	}
	r.check()
}

// The machine's record is known to be gone: no proof helps.
func TestProofsEndWithTheRecord(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	r.ttl = 6 * time.Second
	r.leaderless = func(context.Context) bool { return true }
	r.second()
	p := r.begin()
	r.place("e.service", service("run", exclusive), registry.Launched)
	r.waitActive("e.service")
	r.proxy.Cut()
	r.wait("proofs to carry it", func() bool { s := p.guard.date(); return s.young() && !s.renewed() })
	r.wait("the record to be gone", func() bool { _, there := r.get(r.keys.Machine(r.machine.ID)); return !there })
	r.proxy.Mend()
	r.wait("the proofs to be dropped", func() bool { return p.guard.date().proven.IsZero() })
	r.wait("it to be stopped", func() bool { return r.fake.active("e.service") != "active" })
	r.check()
}

// second registers another machine.
func (r *rig) second() {
	r.put(r.keys.Machine("second"), registry.Encode(registry.Machine{V: 1, ID: "second", BootID: "x", Node: "n2", Address: "10.0.0.2"}))
}

func TestExclusiveIsFenced(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	r.ttl = 12 * time.Second
	r.second()
	p := r.begin()
	r.place("e.service", service("run", exclusive), registry.Launched)
	r.place("n.service", service("run"), registry.Launched)
	pinned := service("run", exclusive, "MachineID="+r.machine.ID)
	r.place("pinned.service", pinned, registry.Launched)
	for _, name := range []string{"e.service", "n.service", "pinned.service"} {
		r.waitActive(name)
	}
	first, calm, fixed := r.fake.invocation("e.service"), r.fake.invocation("n.service"), r.fake.invocation("pinned.service")
	r.proxy.Cut()
	r.wait("the unit to be stopped", func() bool {
		_, there := r.get(r.keys.Machine(r.machine.ID))
		active := r.fake.active("e.service") == "active"
		if active && !there {
			t.Error("the unit runs, and the machine's record is gone")
		}
		return !active
	})
	r.wait("the record to be gone", func() bool { _, there := r.get(r.keys.Machine(r.machine.ID)); return !there })
	r.proxy.Mend()
	r.wait("the machine to be back", p.Registered)
	// Its entry is void until it is refreshed.
	r.waitState("n.service", "to run", func(s registry.State) bool { return s.Active == "active" })
	if active := r.fake.active("e.service"); active == "active" {
		t.Error("it runs without a valid entry")
	}
	r.place("e.service", service("run", exclusive), registry.Launched, func(e *registry.Entry) { e.Epoch = 8 })
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
	r.place("e.service", service("run", exclusive), registry.Launched)
	r.place("once.service", service("once"), registry.Launched)
	r.waitActive("e.service")
	r.waitState("once.service", "to be launched", func(s registry.State) bool { return s.Launched })
	was := r.fake.invocation("e.service")
	p.finish()
	r.wait("the fence", func() bool { return r.fake.active("e.service") == "failed" })
	p = r.begin()
	r.wait("the machine to be back", p.Registered)
	r.place("e.service", service("run", exclusive), registry.Launched)
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
	r.place("e.service", service("run", exclusive), registry.Launched)
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
	r.place("e.service", service("run", exclusive), registry.Launched)
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
	r.waitState("e.service", "to wait", func(s registry.State) bool { return !s.Launched && s.Waiting != "" && s.Trouble == "" })
	r.fake.hook(nil)
	r.waitActive("e.service")
}

func TestSolo(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	r.ttl = 6 * time.Second
	p := r.begin()
	r.place("e.service", service("run", exclusive), registry.Launched)
	r.waitActive("e.service")
	r.wait("the solo record", func() bool {
		kv, _ := r.get(r.keys.Solo())
		s, err := registry.Decode[registry.Solo](kv.Value)
		return err == nil && s.Machine == r.machine.ID && p.guard.look().Solo
	})
	was := r.fake.invocation("e.service")

	// The store goes away for good: nothing is stopped, not by the next agent either.
	r.proxy.Cut()
	r.wait("the machine to be gone", func() bool { _, there := r.get(r.keys.Machine(r.machine.ID)); return !there })
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
	r.place("e.service", service("run", exclusive), registry.Launched, func(e *registry.Entry) { e.Epoch = 8 })
	r.waitState("e.service", "to have the new epoch", func(s registry.State) bool { return s.Epoch == 8 && s.Active == "active" })
	if r.fake.invocation("e.service") != was {
		t.Error("the refresh restarted it")
	}

	// A second machine: the fence first, then the record.
	fenced := false
	r.fake.hook(func(_ int, call string) (before, after error) {
		if _, there, err := r.store.Get(t.Context(), r.keys.Solo()); call == "fence" && err == nil && there {
			fenced = true
		}
		return nil, nil
	})
	r.second()
	r.wait("the record to be deleted", func() bool { _, there := r.get(r.keys.Solo()); return !there })
	r.fake.mu.Lock()
	if !fenced {
		t.Error("the record was deleted before the fence was armed")
	}
	r.fake.mu.Unlock()
	r.fake.hook(nil)
	if r.fake.invocation("e.service") != was {
		t.Error("it was restarted")
	}
	r.proxy.Cut()
	r.wait("it to be fenced", func() bool { return r.fake.active("e.service") != "active" })
}

// A solo record of a machine that is gone is for an operator to delete.
func TestForeignSolo(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	r.ttl = 6 * time.Second
	r.put(r.keys.Solo(), registry.Encode(registry.Solo{V: 1, Machine: "somebody"}))
	p := r.begin()
	r.place("e.service", service("run", exclusive), registry.Launched)
	r.waitActive("e.service")
	if p.guard.look().Solo {
		t.Error("it takes itself for alone")
	}
	r.proxy.Cut()
	r.wait("it to be fenced", func() bool { return r.fake.active("e.service") != "active" })
	r.proxy.Mend()
	if kv, _ := r.get(r.keys.Solo()); !strings.Contains(kv.Value, "somebody") {
		t.Errorf("the record is %s", kv.Value)
	}
}

// The entry is taken away at the moment of the start.
func TestExclusiveAsksBeforeItStarts(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	r.second()
	r.begin()
	r.place("x.service", service("run", exclusive), registry.Launched) // so that the fence is armed
	r.waitActive("x.service")
	taken := false
	r.fake.hook(func(_ int, call string) (before, after error) {
		if call == "link" && !taken {
			taken = true
			if _, err := r.store.Apply(t.Context(), []store.Op{store.Delete(r.keys.Entry(r.machine.ID, "e.service"))}); err != nil {
				return err, nil
			}
		}
		return nil, nil
	})
	r.place("e.service", service("run", exclusive), registry.Launched)
	r.wait("it to be taken away and unloaded", func() bool {
		return slices.Equal(r.fake.linked(), []string{"x.service"}) && len(r.states()) == 1 && func() bool { r.fake.mu.Lock(); defer r.fake.mu.Unlock(); return taken }()
	})
	if slices.Contains(r.fake.did(), "start e.service") {
		t.Error("it was started")
	}
}

func TestDropIns(t *testing.T) {
	for name, want := range map[string]string{"a.service": "[Service]", "a.socket": "[Socket]", "a.timer": ""} {
		e := readEntry(name, store.KV{Value: registry.Encode(registry.Entry{V: 1, Text: "[Unit]\n" + exclusive, Desired: registry.Launched, Epoch: 3})})
		got := e.dropIn(name, "m")
		if want == "" && got != "" || !strings.Contains(got, want) || want != "" && !strings.Contains(got, "Slice="+systemd.FenceSlice) {
			t.Errorf("%s: %q", name, got)
		}
	}
}
