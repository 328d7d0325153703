package agent

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"flotilla/internal/state"
	"flotilla/internal/unit"
)

func TestStartReplaceStopRelease(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	p := r.begin()
	r.place("web.service", service("run"), unit.Launched)
	r.waitActive("web.service")
	if !p.Registered() {
		t.Error("it runs a unit and says that it is not registered")
	}
	text, err := os.ReadFile(filepath.Join(r.fake.units, "web.service"))
	if err != nil || string(text) != service("run") {
		t.Errorf("the unit file is %q (%v)", text, err)
	}
	dropIn, err := os.ReadFile(filepath.Join(r.fake.dropIns, "web.service.d", "50-flotilla.conf"))
	if err != nil || !strings.Contains(string(dropIn), `"FLOTILLA_EPOCH=7" "FLOTILLA_UNIT=%n" "FLOTILLA_MACHINE=0123456789abcdef0123456789abcdef"`) {
		t.Errorf("the drop-in is %q (%v)", dropIn, err)
	}

	// A new version: the old one's stop has ended before its file is touched.
	first := r.fake.invocation("web.service")
	r.place("web.service", service("slow"), unit.Launched)
	r.wait("the new version to begin", func() bool { return r.fake.active("web.service") == "activating" })
	r.waitState("web.service", "to be launched", func(s state.UnitState) bool { return s.Launched && s.Active == "activating" })
	if r.fake.invocation("web.service") == first {
		t.Error("the old version still runs")
	}
	// A stop does not wait for a start that takes for ever.
	r.place("web.service", service("slow"), unit.Loaded)
	r.wait("the stop to begin", func() bool { return r.fake.active("web.service") == "deactivating" })
	r.fake.goOn("web.service")
	r.waitState("web.service", "to be loaded only", func(s state.UnitState) bool { return !s.Launched && s.Active == "inactive" && s.Load == "loaded" })

	r.place("web.service", service("run"), unit.Launched, func(e *placed) { e.Restarts = 3 })
	r.waitState("web.service", "to be restarted", func(s state.UnitState) bool { return s.Active == "active" && s.Restarts == 3 })
	second := r.fake.invocation("web.service")
	r.place("web.service", service("run"), unit.Launched, func(e *placed) { e.Restarts = 4 })
	r.waitState("web.service", "to be restarted", func(s state.UnitState) bool { return s.Active == "active" && s.Restarts == 4 })
	if r.fake.invocation("web.service") == second {
		t.Error("no restart")
	}

	r.place("web.service", service("run"), unit.Launched, func(e *placed) { e.Restarts, e.Leave = 4, "drained" })
	r.wait("the release", func() bool {
		_, placement := r.get(r.keys.Placement("web.service"))
		return !placement
	})
	r.wait("its files to be gone", r.clean)
	r.wait("its state to be gone", func() bool { return len(r.states()) == 0 })
	r.check()
}

func TestNewAndGoneUnitsNeedNoReload(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	r.begin()
	r.generation()
	r.place("web.service", service("run"), unit.Launched)
	r.waitActive("web.service")
	r.place("web.service", service("run"), unit.Launched, func(e *placed) { e.Leave = "it was destroyed" })
	r.wait("its files to be gone", r.clean)
	r.fake.mu.Lock()
	n := r.fake.reloads
	r.fake.mu.Unlock()
	if n != 0 {
		t.Errorf("%d reloads", n)
	}
	r.check()
}

// TestReloadsRest: units that come one after the other do not make systemd read
// its files all the time.
func TestReloadsRest(t *testing.T) {
	t.Parallel()
	const takes = 50 * time.Millisecond
	r := newRig(t)
	r.fake.deaf = takes
	r.begin()
	r.generation()
	began := time.Now()
	for i := range 20 {
		name := fmt.Sprintf("u%d.service", i)
		r.place(name, service("run", "[Install]", "WantedBy=multi-user.target"), unit.Launched)
		r.waitActive(name)
	}
	most := 2 + int(time.Since(began)/(5*takes))
	r.fake.mu.Lock()
	defer r.fake.mu.Unlock()
	if n := r.fake.reloads; n < 1 || n > most {
		t.Errorf("%d reloads, want 1 to %d", n, most)
	}
}

func TestManyUnitsShareAReload(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	p := r.begin()
	r.generation()
	// Names against the order in which they are to be started.
	r.place("a.service", "[Unit]\nAfter=b.service\n"+service("run"), unit.Launched)
	r.waitActive("a.service")
	p.finish()
	for i := range 100 {
		r.place(fmt.Sprintf("u%d@x.service", i), service("run", "[Install]", "WantedBy=multi-user.target"), unit.Launched)
	}
	r.place("c.service", "[Unit]\nAfter=d.service\n"+service("run"), unit.Launched)
	r.place("d.service", "[Unit]\nAfter=e.service\n"+service("slow"), unit.Launched)
	r.place("e.service", "[Unit]\nAfter=f.service\n"+service("run"), unit.Launched)
	r.place("f.service", "[Unit]\nBefore=c.service\n"+service("run"), unit.Launched)
	r.fake.mu.Lock()
	before := r.fake.reloads
	r.fake.mu.Unlock()
	r.begin()
	r.waitActive("c.service")
	r.wait("all to be active", func() bool {
		n := 0
		for _, s := range r.states() {
			if s.Active == "active" {
				n++
			}
		}
		return n == 104
	})
	r.fake.mu.Lock()
	defer r.fake.mu.Unlock()
	if n := r.fake.reloads - before; n != 1 {
		t.Errorf("%d reloads for one pass", n)
	}
	if len(r.fake.enabled) != 100 {
		t.Errorf("%d units are enabled", len(r.fake.enabled))
	}
	at := func(name string) int { return slices.Index(r.fake.history, "start "+name) }
	if at("f.service") > at("e.service") || at("e.service") > at("d.service") || at("d.service") > at("c.service") {
		t.Errorf("wrong order: %v", r.fake.history)
	}
}

func TestBadUnitsHarmNobody(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	r.begin()
	r.place("long.service", service("run", strings.Repeat("#"+strings.Repeat("x", 1022)+"\n", maxText>>10)), unit.Launched)
	r.place("syntax.service", "[Service\nExecStart=/bin/run\n", unit.Launched)
	r.place("bad.service", service("bad"), unit.Launched)
	r.place("unlinkable.service", service("unlinkable"), unit.Launched)
	r.place("limit.service", service("limit"), unit.Launched)
	r.place("fail.service", service("fail"), unit.Launched)
	r.place("template@.service", service("run"), unit.Launched)
	r.place(strings.Repeat("n", 247)+".service", service("run"), unit.Launched) // its drop-in's directory has too long a name
	r.place("../../evil.service", service("run"), unit.Launched)
	r.place("newer.service", service("run"), unit.Loaded)
	r.put(r.keys.Unit("newer.service"), `{"v":99}`)
	r.place("good.service", service("run"), unit.Launched)
	r.waitActive("good.service")
	for name, want := range map[string]string{
		"long.service": "bytes", "syntax.service": "cannot be used", "bad.service": "ExecStart= is bad", "unlinkable.service": "cannot be linked",
		"limit.service": "given up", "template@.service": "template", "newer.service": "upgrade", strings.Repeat("n", 247) + ".service": "too long",
	} {
		r.waitState(name, "to be in trouble", func(s state.UnitState) bool { return strings.Contains(s.Trouble, want) })
	}
	r.waitState("fail.service", "to be launched", func(s state.UnitState) bool { return s.Launched && s.Active == "failed" && s.Trouble == "" })
	if _, err := os.Stat(filepath.Join(r.dir, "evil.service")); !errors.Is(err, os.ErrNotExist) {
		t.Error("a file outside of the directory was written")
	}
	// What runs of an earlier version keeps running.
	was := r.fake.invocation("good.service")
	r.place("good.service", "[Service\n", unit.Launched)
	r.waitState("good.service", "to be in trouble", func(s state.UnitState) bool { return s.Trouble != "" && s.Active == "active" })
	if r.fake.invocation("good.service") != was {
		t.Error("it was restarted")
	}
	r.check()
}

func TestVoidEntriesStartNothing(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	r.begin()
	r.place("old.service", service("run"), unit.Launched)
	r.waitActive("old.service")
	was := r.fake.invocation("old.service")
	void := func(e *placed) { e.Generation-- }
	r.place("new.service", service("run"), unit.Launched, void)
	r.place("old.service", service("run", "Nice=1"), unit.Launched, void)
	r.waitState("new.service", "to wait", func(s state.UnitState) bool { return s.Waiting != "" && s.Load == "" })
	r.place("other.service", service("run"), unit.Launched)
	r.waitActive("other.service")
	if r.fake.invocation("old.service") != was || r.fake.active("new.service") != "inactive" {
		t.Error("a void entry had an effect")
	}
	// The refresh: same text as what runs, new epoch, no restart.
	r.place("old.service", service("run"), unit.Launched, func(e *placed) { e.Epoch = 9 })
	r.place("new.service", service("run"), unit.Launched)
	r.waitActive("new.service")
	r.waitState("old.service", "to have the new epoch", func(s state.UnitState) bool { return s.Epoch == 9 && s.Active == "active" })
	if r.fake.invocation("old.service") != was {
		t.Error("a refresh restarted the unit")
	}
}

// A lease that was lost gives the machine another generation.
func TestLostLease(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	r.ttl = 6 * time.Second
	r.begin()
	r.place("a.service", service("run"), unit.Launched)
	r.waitActive("a.service")
	was, g := r.fake.invocation("a.service"), r.generation()
	r.proxy.Cut()
	r.wait("the machine to be gone", func() bool { _, ok := r.get(r.keys.Node(r.machine.ID)); return !ok })
	r.proxy.Mend()
	g2 := r.generation()
	if g2 == g {
		t.Fatal("the generation is the same")
	}
	r.waitState("a.service", "to run on", func(s state.UnitState) bool { return s.Active == "active" && s.Launched })
	r.place("b.service", service("run"), unit.Launched, func(e *placed) { e.Generation = g })
	r.waitState("b.service", "to wait", func(s state.UnitState) bool { return s.Waiting != "" })
	r.place("a.service", service("run"), unit.Launched, func(e *placed) { e.Epoch = 8 })
	r.waitState("a.service", "to be refreshed", func(s state.UnitState) bool { return s.Active == "active" && s.Epoch == 8 })
	if r.fake.invocation("a.service") != was {
		t.Error("the unit was restarted")
	}
}

func TestGlobalUnits(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	p := r.begin()
	global := func(name, xfleet string, desired unit.Desired) (epoch int64) {
		return r.put(r.keys.Unit(name), state.Encode(state.UnitRecord{V: 1, Text: service("run", "[X-Fleet]", "Global=yes", xfleet), Desired: desired}))
	}
	epoch := global("a.service", "MachineMetadata=disk=ssd", unit.Launched)
	global("b.service", "Conflicts=a.service", unit.Launched)
	global("c.service", "MachineMetadata=disk=hdd", unit.Launched)
	global("d.service", "", unit.Loaded)
	r.waitActive("a.service")
	r.waitState("d.service", "to be loaded", func(s state.UnitState) bool { return s.Load == "loaded" && !s.Launched })
	r.waitState("b.service", "to wait", func(s state.UnitState) bool { return strings.Contains(s.Waiting, "a.service") && s.Load == "" })
	r.put(r.keys.Settings(r.machine.ID), state.Encode(state.Settings{V: 1, Metadata: map[string]string{"disk": "hdd"}}))
	r.waitActive("c.service")
	r.waitActive("b.service")
	r.wait("a to leave", func() bool { _, ok := r.states()["a.service"]; return !ok })

	// Its epoch is when it was made, whatever becomes of it.
	if got := r.states()["b.service"].Epoch; got != epoch+1 {
		t.Errorf("the epoch is %d, want %d", got, epoch+1)
	}
	// A bad version does not end the one before it; nor is it a reason to go where it was not.
	was := r.fake.invocation("c.service")
	r.put(r.keys.Unit("c.service"), state.Encode(state.UnitRecord{V: 1, Text: "[Service\n", Desired: unit.Launched}))
	r.waitState("c.service", "to be in trouble", func(s state.UnitState) bool { return s.Trouble != "" && s.Active == "active" })
	p.finish()
	r.put(r.keys.Unit("e.service"), state.Encode(state.UnitRecord{V: 1, Text: "[Service\n", Desired: unit.Launched}))
	r.begin()
	r.waitState("c.service", "to be left as it is by the next agent", func(s state.UnitState) bool { return s.Trouble != "" && s.Active == "active" })
	if _, there := r.states()["e.service"]; there || r.fake.invocation("c.service") != was {
		t.Errorf("e is here: %v, or c was touched: %v", there, r.fake.did())
	}
	r.put(r.keys.Unit("c.service"), state.Encode(state.UnitRecord{V: 1, Text: "[Service\n", Desired: unit.Inactive}))
	r.delete(r.keys.Unit("b.service"))
	r.wait("b to leave", func() bool { _, ok := r.states()["b.service"]; return !ok })
	r.check()
}

func TestLeave(t *testing.T) {
	t.Parallel()
	for _, during := range []bool{true, false} {
		r := newRig(t)
		p := r.begin()
		for i := range 20 {
			r.place(fmt.Sprintf("u%d.service", i), service("run"), unit.Launched)
		}
		r.wait("all", func() bool { return len(r.states()) == 20 })
		for i := range 20 {
			r.waitActive(fmt.Sprintf("u%d.service", i))
		}
		if !during {
			p.stop()
			if err := <-p.ended; err != nil {
				t.Error(err)
			}
			if r.fake.active("u0.service") != "active" {
				t.Error("the end of the agent stopped a unit")
			}
		}
		if err := p.Leave(t.Context()); err != nil {
			t.Error(err)
		}
		if !r.clean() {
			t.Error("something is left")
		}
		for i := range 20 {
			if r.fake.active(fmt.Sprintf("u%d.service", i)) != "inactive" {
				t.Errorf("unit %d runs", i)
			}
		}
		r.check()
	}
}

func TestSlowUnitHoldsUpNobody(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	r.begin()
	r.place("slow.service", service("slow"), unit.Launched)
	r.wait("the start", func() bool { return r.fake.active("slow.service") == "activating" })
	r.place("slow.service", service("run"), unit.Launched)
	r.wait("the stop", func() bool { return r.fake.active("slow.service") == "deactivating" })
	r.place("quick.service", service("run"), unit.Launched)
	r.waitActive("quick.service")
	r.delete(r.keys.Placement("quick.service"))
	r.wait("quick to leave", func() bool { _, ok := r.states()["quick.service"]; return !ok })
	r.fake.goOn("slow.service")
	r.waitActive("slow.service")
	r.check()
}

// What an earlier version of a unit was installed in is undone when it leaves.
func TestEarlierInstallIsUndone(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	r.begin()
	r.place("web.service", service("run")+"[Install]\nWantedBy=multi-user.target\n", unit.Launched)
	r.waitActive("web.service")
	r.place("web.service", service("other"), unit.Launched)
	r.wait("the new version", func() bool {
		text, _ := os.ReadFile(filepath.Join(r.fake.units, "web.service"))
		return string(text) == service("other") && r.fake.active("web.service") == "active"
	})
	r.delete(r.keys.Placement("web.service"))
	r.wait("its state to be gone", func() bool { return len(r.states()) == 0 })
	r.fake.mu.Lock()
	defer r.fake.mu.Unlock()
	if len(r.fake.enabled) > 0 || len(r.fake.allLinks()) > 0 {
		t.Errorf("enabled %v, linked %v", r.fake.enabled, r.fake.allLinks())
	}
}

func TestForeignUnitIsLeftAlone(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	if err := errors.Join(os.MkdirAll(r.fake.dropIns, 0o755), os.Symlink("/lib/systemd/system/ssh.service", filepath.Join(r.fake.dropIns, "ssh.service"))); err != nil {
		t.Fatal(err)
	}
	r.fake.files["ssh.service"] = service("run")
	r.fake.runs["ssh.service"] = &fakeRun{active: "active", sub: "running", text: service("run")}
	r.begin()
	r.place("ssh.service", service("other"), unit.Launched)
	r.waitState("ssh.service", "to be in trouble", func(s state.UnitState) bool { return strings.Contains(s.Trouble, "/lib/systemd") })
	r.delete(r.keys.Placement("ssh.service"))
	r.wait("its state to be gone", func() bool { return len(r.states()) == 0 })
	if r.fake.active("ssh.service") != "active" {
		t.Error("the machine's own unit was stopped")
	}
}

// What is wanted of a placed unit needs no decision of the engine, but a new file.
func TestNodeActsByItself(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	r.begin()
	want := func(text string, desired unit.Desired, restarts int64) {
		r.put(r.keys.Unit("web.service"), state.Encode(state.UnitRecord{V: 1, Text: text, Desired: desired, Restarts: restarts}))
	}
	loaded := func(s state.UnitState) bool { return s.Load == "loaded" && !s.Launched && s.Active == "inactive" }
	text, newer := service("run"), service("run", "Nice=1")
	r.place("web.service", text, unit.Launched)
	r.waitActive("web.service")
	want(text, unit.Loaded, 0)
	r.waitState("web.service", "to be loaded", loaded)
	want(text, unit.Launched, 0)
	r.waitActive("web.service")
	want(text, unit.Launched, 1)
	r.waitState("web.service", "to be restarted", func(s state.UnitState) bool { return s.Restarts == 1 && s.Active == "active" })

	// A file that is not approved is not run, and what runs is only stopped.
	was := r.fake.invocation("web.service")
	want(newer, unit.Launched, 2)
	r.place("other.service", text, unit.Launched)
	r.waitActive("other.service")
	if r.fake.invocation("web.service") != was {
		t.Error("it was touched before its file was approved")
	}
	want(newer, unit.Loaded, 2)
	r.waitState("web.service", "to be loaded", loaded)
	want(newer, unit.Launched, 2)
	r.waitState("web.service", "to wait", func(s state.UnitState) bool { return strings.Contains(s.Waiting, "approved") && loaded(s) })
	if file, err := os.ReadFile(filepath.Join(r.fake.units, "web.service")); err != nil || string(file) != text {
		t.Errorf("its file is %q (%v)", file, err)
	}
	r.place("web.service", newer, unit.Launched, func(p *placed) { p.Restarts = 2 })
	r.waitActive("web.service")
	if file, err := os.ReadFile(filepath.Join(r.fake.units, "web.service")); err != nil || string(file) != newer {
		t.Errorf("its file is %q (%v)", file, err)
	}

	// Inactive or destroyed it leaves.
	left := func(name string) func() bool {
		return func() bool {
			_, placed := r.get(r.keys.Placement(name))
			_, told := r.states()[name]
			return !placed && !told
		}
	}
	want(newer, unit.Inactive, 2)
	r.wait("web to leave", left("web.service"))
	r.delete(r.keys.Unit("other.service"))
	r.wait("other to leave", left("other.service"))
	if !r.clean() {
		t.Error("something is left")
	}
	r.check()
}

// A unit that is wanted again while it leaves is started again, and its placement
// is never gone.
func TestDestroyedAndStartedAgain(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	r.begin()
	r.place("web.service", service("slow"), unit.Launched)
	r.wait("the start", func() bool { return r.fake.active("web.service") == "activating" })
	placement, _ := r.get(r.keys.Placement("web.service"))
	first := r.fake.invocation("web.service")
	r.delete(r.keys.Unit("web.service"))
	r.wait("the stop", func() bool { return r.fake.active("web.service") == "deactivating" })
	r.put(r.keys.Unit("web.service"), state.Encode(state.UnitRecord{V: 1, Text: service("slow"), Desired: unit.Launched}))
	r.fake.goOn("web.service")
	r.waitActive("web.service")
	if now, _ := r.get(r.keys.Placement("web.service")); now != placement || r.fake.invocation("web.service") == first {
		t.Errorf("the placement is %+v, and was %+v", now, placement)
	}
	r.check()
}

// Records that cannot be read are a reason for nothing.
func TestUnreadableRecordsStopNothing(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	p := r.begin()
	r.place("a.service", service("run"), unit.Launched)
	r.place("b.service", service("run"), unit.Launched)
	r.waitActive("a.service")
	r.waitActive("b.service")
	was, other := r.fake.invocation("a.service"), r.fake.invocation("b.service")
	r.put(r.keys.Placement("a.service"), `{"v":99}`)
	r.put(r.keys.Unit("b.service"), `{"v":99}`)
	r.delete(r.keys.Unit("a.service"))
	for range 2 { // also by an agent that has never known better
		for _, name := range []string{"a.service", "b.service"} {
			r.waitState(name, "to be in trouble, and to run", func(s state.UnitState) bool {
				return strings.Contains(s.Trouble, "upgrade") && s.Active == "active"
			})
		}
		p.finish()
		p = r.begin()
		r.place("c.service", service("run"), unit.Launched) // so that this agent has made a pass
		r.waitActive("c.service")
		r.delete(r.keys.Unit("c.service"))
		r.wait("c to leave", func() bool { _, there := r.states()["c.service"]; return !there })
	}
	if r.fake.invocation("a.service") != was || r.fake.invocation("b.service") != other {
		t.Errorf("they were touched: %v", r.fake.did())
	}
	r.delete(r.keys.Placement("a.service"))
	r.delete(r.keys.Placement("b.service"))
	r.delete(r.keys.Unit("b.service"))
	r.wait("both to leave", func() bool { return len(r.states()) == 0 })
	r.check()
}
