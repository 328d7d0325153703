package agent

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"flotilla/internal/state"
	"flotilla/internal/systemd"
	"flotilla/internal/unit"
)

// beside returns a rig of another machine on the same store.
func (r *rig) beside(t testing.TB, n int) *rig {
	dir := t.TempDir()
	b := *r
	b.t, b.dir = t, dir
	b.machine.ID, b.machine.Address = fmt.Sprintf("machine%d", n), fmt.Sprintf("10.0.1.%d", n)
	b.fake = newFake(filepath.Join(dir, "units"), filepath.Join(dir, "systemd"), filepath.Join(dir, "gate"))
	b.keys.Prefix = fmt.Sprintf("/f%d/", n)
	return &b
}

// story is a bit of all that an agent does. calm is a unit that nothing happens
// to.
func (r *rig) story() {
	r.t.Helper()
	installed := []string{"[Install]", "WantedBy=multi-user.target"}
	r.place("replaced.service", service("run", "Nice=2"), unit.Launched)
	r.place("restarted.service", service("run"), unit.Launched, func(e *placed) { e.Restarts = 1 })
	r.place("released.service", service("run"), unit.Launched, func(e *placed) { e.Leave = "drained" })
	r.place("new.service", service("run", installed...), unit.Launched)
	r.place("stopped.service", service("run"), unit.Loaded)
	r.delete(r.keys.Placement("gone.service"))
}

func (r *rig) beforeStory() *process {
	r.t.Helper()
	p := r.begin()
	names := []string{"replaced.service", "restarted.service", "released.service", "stopped.service", "gone.service", "calm.service"}
	for _, name := range names {
		r.place(name, service("run"), unit.Launched)
	}
	for _, name := range names {
		r.waitActive(name)
	}
	return p
}

// afterStory waits until all is as it shall be, and checks that everything was
// done once.
func (r *rig) afterStory() {
	r.t.Helper()
	for _, name := range []string{"replaced.service", "new.service", "restarted.service", "calm.service"} {
		r.waitActive(name)
	}
	r.waitState("restarted.service", "to be restarted", func(s state.UnitState) bool { return s.Restarts == 1 && s.Active == "active" })
	r.waitState("stopped.service", "to be stopped", func(s state.UnitState) bool { return !s.Launched && s.Active == "inactive" })
	r.wait("the new version", func() bool {
		text, err := os.ReadFile(filepath.Join(r.fake.units, "replaced.service"))
		return err == nil && string(text) == service("run", "Nice=2") && r.fake.active("replaced.service") == "active"
	})
	r.wait("the others to leave", func() bool { return len(r.states()) == 5 })
	r.wait("the release", func() bool { _, there := r.get(r.keys.Placement("released.service")); return !there })
	if diff := fmt.Sprint(r.fake.linked()); diff != "[calm.service new.service replaced.service restarted.service stopped.service]" {
		r.t.Errorf("linked are %v", diff)
	}
	starts := map[string]int{}
	for _, what := range r.fake.did() {
		starts[what]++
	}
	for name, n := range map[string]int{"calm": 1, "new": 1, "replaced": 2, "restarted": 2, "released": 1, "stopped": 1, "gone": 1} {
		if got := starts["start "+name+".service"]; got != n {
			r.t.Errorf("%s was started %d times, want %d: %v", name, got, n, r.fake.did())
		}
	}
	r.check()
}

// Each call to systemd fails once, before it had an effect or after it.
func TestEveryCallFails(t *testing.T) {
	t.Parallel()
	first := newRig(t)
	first.beforeStory()
	first.fake.hook(nil)
	first.story()
	first.afterStory()
	first.fake.mu.Lock()
	calls := first.fake.calls
	first.fake.mu.Unlock()
	for n := range 2 * calls {
		t.Run(fmt.Sprint(n), func(t *testing.T) {
			t.Parallel()
			r := first.beside(t, n)
			r.beforeStory()
			r.fake.hook(func(call int, name string) (before, after error) {
				switch {
				case call != n/2+1:
					return nil, nil
				case n%2 == 0:
					return errors.New("systemd refuses " + name), nil
				default:
					return nil, fmt.Errorf("%s: %w", name, systemd.ErrUnknown)
				}
			})
			r.story()
			r.afterStory()
		})
	}
}

// The agent dies at each call to systemd, before it had an effect or after it,
// and another one goes on.
func TestDeathAtEveryCall(t *testing.T) {
	t.Parallel()
	first := newRig(t)
	first.beforeStory()
	first.fake.hook(nil)
	first.story()
	first.afterStory()
	first.fake.mu.Lock()
	calls := first.fake.calls
	first.fake.mu.Unlock()
	for n := range 2 * calls {
		t.Run(fmt.Sprint(n), func(t *testing.T) {
			t.Parallel()
			r := first.beside(t, n)
			p := r.beforeStory()
			died := make(chan struct{})
			r.fake.hook(func(call int, name string) (before, after error) {
				if call < n/2+1 {
					return nil, nil
				}
				p.stop()
				if call == n/2+1 {
					t.Logf("dies at %s", name)
					close(died)
					if n%2 == 1 {
						return nil, systemd.ErrUnknown
					}
				}
				return systemd.ErrUnknown, nil
			})
			r.story()
			r.wait("the death, or the end of a story with fewer calls", func() bool {
				select {
				case <-died:
					return true
				default:
					_, there := r.get(r.keys.Placement("released.service"))
					return !there && len(r.states()) == 5 && r.states()["restarted.service"].Restarts == 1 && r.fake.active("replaced.service") == "active"
				}
			})
			p.stop()
			if err := <-p.ended; err != nil {
				t.Error(err)
			}
			p.ended <- nil
			p.finish()
			r.fake.hook(nil)
			r.begin()
			r.afterStory()
		})
	}
}

// The records are lost, but not the units.
func TestLostRecords(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	p := r.begin()
	r.place("a.service", service("run"), unit.Launched)
	r.place("b.service", service("run"), unit.Launched)
	r.waitActive("a.service")
	r.waitActive("b.service")
	was := r.fake.invocation("a.service")
	p.finish()
	if err := os.RemoveAll(filepath.Join(r.dir, "state")); err != nil {
		t.Fatal(err)
	}
	r.delete(r.keys.Placement("b.service"))
	r.begin()
	r.wait("b to leave", func() bool { return slices.Equal(r.fake.linked(), []string{"a.service"}) })
	r.waitActive("a.service")
	if r.fake.invocation("a.service") != was {
		t.Error("a was restarted")
	}
	r.check()
}

// After a reboot nothing is there, and nothing starts before the machine has its
// place.
func TestReboot(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	p := r.begin()
	r.place("a.service", service("run"), unit.Launched)
	r.waitActive("a.service")
	g := r.generation()
	p.finish()
	b := *r
	b.dir = t.TempDir()
	b.fake = newFake(filepath.Join(b.dir, "units"), filepath.Join(b.dir, "systemd"), filepath.Join(b.dir, "gate"))
	b.machine.BootID, b.machine.Name = "b2", "renamed"
	b.begin()
	b.wait("a to run", func() bool { return b.fake.active("a.service") == "active" })
	if b.generation() != g {
		t.Error("a quick reboot has another generation")
	}
}

func TestStoreAway(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	p := r.begin()
	r.place("a.service", service("run"), unit.Launched)
	r.place("b.service", service("run"), unit.Launched)
	r.waitActive("a.service")
	r.waitActive("b.service")
	p.finish()
	r.proxy.Cut()
	r.delete(r.keys.Placement("b.service"))
	p = r.begin()
	steps := 0
	r.fake.hook(func(int, string) (before, after error) { steps++; return nil, nil })
	r.wait("the agent to have tried", func() bool {
		return p.cfg.Feed.Status().Err != "" && p.cfg.Feed.Latest().Revision == 0 && !p.Registered()
	})
	p.finish()
	if history := r.fake.did(); len(history) != 2 || steps != 0 {
		t.Errorf("it did %v with %d calls", history, steps)
	}
	r.begin()
	r.proxy.Mend()
	r.wait("b to leave", func() bool { return slices.Equal(r.fake.linked(), []string{"a.service"}) })
	if history := r.fake.did(); len(history) != 3 {
		t.Errorf("it did %v", history)
	}
}

func TestSameMachineID(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	r.ttl = 6 * time.Second
	p := r.begin()
	r.place("a.service", service("run"), unit.Launched)
	r.waitActive("a.service")
	g := r.generation()
	other := *r
	other.dir = t.TempDir()
	other.fake = newFake(filepath.Join(other.dir, "units"), filepath.Join(other.dir, "systemd"), filepath.Join(other.dir, "gate"))
	other.machine.BootID, other.machine.Name, other.machine.Address = "b9", "n9", "10.0.0.9"
	q := other.begin()
	r.wait("the other to know what is wanted", func() bool { return q.cfg.Feed.Latest().Revision > 0 })
	r.place("b.service", service("run"), unit.Launched)
	r.waitActive("b.service")
	if kv, _ := r.get(r.keys.Node(r.machine.ID)); kv.CreateRevision != g || q.Registered() || len(other.fake.did()) != 0 {
		t.Errorf("the other has taken the place: %s, %v", kv.Value, other.fake.did())
	}
	// It waits until the first one has gone.
	if err := p.Leave(t.Context()); err != nil {
		t.Fatal(err)
	}
	p.finish()
	r.wait("the other to register", q.Registered)
	other.place("c.service", service("run"), unit.Launched)
	other.waitActive("c.service")

	// Who finds that another one is in its place lets it be there, and comes back
	// when it is gone.
	q.cfg.Presence.Set(r.keys.RouterReport(r.machine.ID), "{}")
	r.wait("the report", func() bool { _, there := r.get(r.keys.RouterReport(r.machine.ID)); return there })
	m := r.machine
	m.V, m.Session = 1, "other.1"
	r.put(r.keys.Node(r.machine.ID), state.Encode(m))
	r.wait("it to withdraw", func() bool {
		_, report := r.get(r.keys.RouterReport(r.machine.ID))
		return !q.Registered() && q.Generation() == 0 && q.T0().IsZero() && !report
	})
	if kv, _ := r.get(r.keys.Node(r.machine.ID)); kv.Value != state.Encode(m) {
		t.Errorf("the record of the other is %q", kv.Value)
	}
	if other.fake.active("c.service") != "active" {
		t.Error("its unit was stopped")
	}
	r.delete(r.keys.Node(r.machine.ID))
	r.wait("it to come back, with all keys", func() bool {
		_, report := r.get(r.keys.RouterReport(r.machine.ID))
		return q.Registered() && !q.T0().IsZero() && report
	})
}
