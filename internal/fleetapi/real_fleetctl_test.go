package fleetapi

import (
	"bytes"
	"context"
	"errors"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"flotilla/internal/api/apitest"
	"flotilla/internal/state"
	"flotilla/internal/store"
	"flotilla/internal/store/storetest"
	"flotilla/internal/unit"
)

// The machines of these tests. The first runs what it is told, see runUnits; of
// the second the test itself tells.
const (
	busyMachine = "0123456789abcdef0123456789abcdef"
	testMachine = "fedcba9876543210fedcba9876543210"
)

// fleetctl is the real fleetctl 1.0.0 with a handler to talk to and a directory
// of unit files to work in.
type fleetctl struct {
	*world
	program string
	dir     string
	socket  string
	seen    atomic.Pointer[func(path string)] // is called before the handler
}

func newFleetctl(t *testing.T) *fleetctl {
	t.Helper()
	build := exec.Command("../../test/fleet.sh", "fleetctl")
	build.Stderr = os.Stderr
	program, err := build.Output()
	if err != nil {
		t.Fatalf("build the real fleetctl: %v", err)
	}
	f := &fleetctl{world: start(t), program: strings.TrimSpace(string(program)), dir: t.TempDir()}
	f.TokenLimit = 3 // so that lists have pages
	f.socket = filepath.Join(f.dir, "fleet.sock")
	listener, err := net.Listen("unix", f.socket)
	if err != nil {
		t.Fatal(err)
	}
	api := f.Handler
	server := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if seen := f.seen.Load(); seen != nil {
			(*seen)(r.Method + " " + r.URL.Path)
		}
		api.ServeHTTP(w, r)
	}))
	_ = server.Listener.Close()
	server.Listener = listener
	server.Start()
	t.Cleanup(server.Close)

	for id, address := range map[string]string{busyMachine: "10.0.0.1", testMachine: "10.0.0.2"} {
		f.Put("cluster/nodes/"+id, state.Encode(state.NodeRecord{V: 1, ID: id, Name: "n", Address: address, Units: true,
			Metadata: map[string]string{"zone": "a", "rack": address[7:]}}))
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- f.runUnits(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
	return f
}

// runUnits plays engine and agent of the first machine: every unit goes there
// and is at once what it should be, but for those called slow.
func (f *fleetctl) runUnits(ctx context.Context) error {
	defer f.State.FollowReports()()
	var done *state.Snapshot // of which all was written that follows from it
	for {
		known, err := f.State.Until(ctx, func(s *state.Snapshot) bool { return s.Reports && s != done })
		if err != nil {
			return nil // the test is over
		}
		done = known
		report := state.UnitsReport{V: 1, Units: map[string]state.UnitState{}}
		var ops []store.Op
		for name, u := range known.Units {
			if strings.HasPrefix(name, "slow") {
				continue
			}
			if !u.Wanted() {
				if u.Placement.Exists() {
					ops = append(ops, store.Delete(f.State.Keys.Placement(name)))
				}
				continue
			}
			if !u.Requirements.Global && !u.Placement.Exists() {
				ops = append(ops, store.Put(f.State.Keys.Placement(name), state.Encode(state.Placement{V: 1, Node: busyMachine, Epoch: 1})))
			}
			report.Units[name] = state.UnitState{Hash: u.Hash, Load: "loaded", Active: "inactive", Sub: "dead"}
			if u.Record.Value.Desired == unit.Launched {
				report.Units[name] = state.UnitState{Hash: u.Hash, Load: "loaded", Active: "active", Sub: "running", Launched: true}
			}
		}
		if value := state.Encode(report); value != state.Encode(known.Nodes[busyMachine].Units.Value) {
			ops = append(ops, store.Put(f.State.Keys.UnitsReport(busyMachine), value))
		}
		if len(ops) == 0 {
			continue
		}
		if _, err := f.Store.Apply(ctx, ops); err != nil && ctx.Err() == nil {
			return err
		}
	}
}

// report says what the second machine runs. It may be called from any goroutine.
func (f *fleetctl) report(name, active string) {
	known, err := f.State.Fresh(f.Context())
	if err != nil {
		f.Error(err)
		return
	}
	report := state.UnitsReport{V: 1, Units: map[string]state.UnitState{}}
	if active != "" {
		report.Units[name] = state.UnitState{Hash: known.Units[name].Hash, Load: "loaded", Active: active, Launched: true}
	}
	ops := []store.Op{store.Put(f.State.Keys.Placement(name), state.Encode(state.Placement{V: 1, Node: testMachine, Epoch: 1})),
		store.Put(f.State.Keys.UnitsReport(testMachine), state.Encode(report))}
	if _, err := f.Store.Apply(f.Context(), ops); err != nil {
		f.Error(err)
	}
}

// onRequest calls do once, before the first such request is answered.
func (f *fleetctl) onRequest(what string, do func()) {
	var done atomic.Bool
	seen := func(path string) {
		if path == what && done.CompareAndSwap(false, true) {
			do()
		}
	}
	f.seen.Store(&seen)
}

func (f *fleetctl) write(name, content string) {
	f.Helper()
	if err := os.WriteFile(filepath.Join(f.dir, name), []byte(content), 0o600); err != nil {
		f.Fatal(err)
	}
}

var (
	tabs = regexp.MustCompile(`\t+`)
	when = regexp.MustCompile(`(?m)^\d{4}/\d\d/\d\d \d\d:\d\d:\d\d(\.\d+)? `) // in front of what it logs
)

// run runs fleetctl with the words of line and compares its exit code and what
// it writes. How many tabs are between columns is no concern of ours.
func (f *fleetctl) run(line string, code int, stdout, stderr string) {
	f.Helper()
	ctx, cancel := context.WithTimeout(f.Context(), 2*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, f.program, strings.Fields(line)...)
	cmd.Dir = f.dir
	cmd.Env = []string{"HOME=" + f.dir, "FLEETCTL_ENDPOINT=unix://" + f.socket}
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		f.Fatalf("fleetctl %s: %v", line, err)
	}
	if diff := cmp.Diff([]any{code, stdout, stderr}, []any{cmd.ProcessState.ExitCode(), tabs.ReplaceAllString(out.String(), "\t"), when.ReplaceAllString(errs.String(), "")}); diff != "" {
		f.Errorf("fleetctl %s (-want +got):\n%s", line, diff)
	}
}

const (
	onBusy = " on 01234567.../10.0.0.1\n"
	onTest = " on fedcba98.../10.0.0.2\n"
)

// The life of a unit, as the real fleetctl tells it.
func TestRealFleetctl(t *testing.T) {
	f := newFleetctl(t)
	f.run("version", 0, "fleetctl version 1.0.0\n", "")
	f.run("list-machines", 0, "MACHINE\tIP\tMETADATA\n01234567...\t10.0.0.1\track=1,zone=a\nfedcba98...\t10.0.0.2\track=2,zone=a\n", "")
	f.run("list-machines --full --no-legend --fields=machine", 0, busyMachine+"\n"+testMachine+"\n", "")
	f.run("--endpoint="+f.URL+" list-machines --no-legend --fields=ip", 0, "10.0.0.1\n10.0.0.2\n", "")
	f.run("list-units", 0, "UNIT\tMACHINE\tACTIVE\tSUB\n", "")
	f.run("list-unit-files", 0, "UNIT\tHASH\tDSTATE\tSTATE\tTARGET\n", "")

	const hello = "[Unit]\nDescription=Hello\n\n[Service]\nExecStart=/bin/sleep 100\n"
	hash := apitest.Hash(t, hello)
	f.write("hello.service", hello)
	f.run("submit hello.service", 0, "Unit hello.service inactive\n", "")
	f.run("cat hello.service", 0, hello, "")
	f.run("list-unit-files", 0, "UNIT\tHASH\tDSTATE\tSTATE\tTARGET\nhello.service\t"+hash[:7]+"\tinactive\tinactive\t-\n", "")
	f.run("stop hello", 1, "", "Unable to stop unit hello.service in state inactive\n")
	f.run("load hello.service", 0, "Unit hello.service loaded"+onBusy, "")
	f.run("list-units --no-legend", 0, "hello.service\t01234567.../10.0.0.1\tinactive\tdead\n", "")
	f.run("start hello.service", 0, "Unit hello.service launched"+onBusy, "")
	f.run("start hello.service", 0, "", "") // it is already
	f.run("list-units --full --fields=unit,machine,load,active,sub,hash", 0, "UNIT\tMACHINE\tLOAD\tACTIVE\tSUB\tHASH\n"+
		"hello.service\t"+busyMachine+"/10.0.0.1\tloaded\tactive\trunning\t"+hash+"\n", "")
	f.run("list-unit-files --no-legend --fields=unit,global,dstate,state,target,desc", 0,
		"hello.service\tfalse\tlaunched\tlaunched\t01234567.../10.0.0.1\tHello\n", "")
	f.run("stop hello.service", 0, "Unit hello.service loaded"+onBusy, "Successfully stopped units [hello.service].\n")
	f.run("unload hello.service", 0, "Unit hello.service inactive\n", "Successfully unloaded units [hello.service].\n")
	// It says so for units and again for what systemd makes of them.
	f.run("start --no-block hello", 0, strings.Repeat("Triggered unit hello.service start\n", 2), "")
	f.run("start --block-attempts=20 hello", 0, "", "")
	// It asks for loaded, waits for launched all the same, and starts and waits again.
	f.run("restart hello", 0, strings.Repeat("Unit hello.service launched"+onBusy, 2), "INFO restart.go:100: Unit(hello.service) was restarted.\n")
	f.run("destroy hello.service", 0, "Destroyed hello.service\n", "")
	f.run("destroy hello.service", 0, "", "Units not found in registry\n")
	f.run("cat hello.service", 1, "", "Unit hello.service not found\n")
	f.run("list-unit-files --no-legend", 0, "", "")
}

// A file that is not the one in the state.
func TestRealFleetctlReplaces(t *testing.T) {
	f := newFleetctl(t)
	one, two, three := "[Service]\nExecStart=/bin/sleep 1\n", "[Service]\nExecStart=/bin/sleep 2\n", "[Service]\nExecStart=/bin/sleep 3\n"
	f.write("a.service", one)
	f.run("submit a.service", 0, "Unit a.service inactive\n", "")
	f.run("submit --replace a.service", 0, "Found same Unit(a.service) in Registry, nothing to do\n", "")
	f.write("a.service", two)
	f.run("submit a.service", 0, "", "WARNING: Unit a.service in registry differs from local unit file a.service. Add --replace to override.\n")
	f.run("cat a.service", 0, one, "")
	f.run("submit --replace a.service", 0, "Unit a.service inactive\n", "")
	f.run("cat a.service", 0, two, "")
	f.run("start a.service", 0, "Unit a.service launched"+onBusy, "")
	f.write("a.service", three)
	f.run("load --replace a.service", 0, "Unit a.service loaded"+onBusy, "Warning: can not replace Unit(a.service) in state 'launched', use the appropriate command\n")
	f.run("load --replace a.service", 0, "Unit a.service inactive\nUnit a.service loaded"+onBusy, "")
	f.run("start a.service", 0, "Unit a.service launched"+onBusy, "")
	f.write("a.service", one)
	f.run("start --replace a.service", 0, "Unit a.service inactive\nUnit a.service launched"+onBusy, "")
	f.run("list-units --no-legend --fields=unit,active,hash", 0, "a.service\tactive\t"+apitest.Hash(t, one)[:7]+"\n", "")
}

// Templates, of which the handler knows nothing but that they do not run, units
// for every machine, and lists of more than one page.
func TestRealFleetctlInstances(t *testing.T) {
	f := newFleetctl(t)
	const sleep = "[Service]\nExecStart=/bin/sleep %i\n"
	f.write("here@.service", sleep) // next to the name that is given
	f.run("start here@1.service", 0, "Unit here@1.service inactive\nUnit here@1.service launched"+onBusy, "")
	f.write("there@.service", sleep)
	f.run("submit there@.service", 0, "Unit there@.service inactive\n", "")
	f.run("start there@.service", 1, "", "Error starting units: googleapi: Error 400: cannot activate template \"there@.service\"\n")
	if err := os.Remove(filepath.Join(f.dir, "there@.service")); err != nil {
		t.Fatal(err)
	}
	f.run("start there@1", 0, "Unit there@1.service inactive\nUnit there@1.service launched"+onBusy, "")
	f.run("cat there@1", 0, sleep, "")
	f.write("all.service", "[Service]\nExecStart=/bin/sleep 1\n\n[X-Fleet]\nGlobal=true\n")
	f.run("start all.service", 0, "Unit all.service \nTriggered global unit all.service start\n", "")
	f.run("list-unit-files --no-legend --fields=unit,global,dstate,state,target", 0, "all.service\ttrue\tlaunched\t-\tglobal\n"+
		"here@1.service\tfalse\tlaunched\tlaunched\t01234567.../10.0.0.1\n"+
		"there@.service\tfalse\tinactive\tinactive\t-\n"+
		"there@1.service\tfalse\tlaunched\tlaunched\t01234567.../10.0.0.1\n", "")
	storetest.Wait(t, time.Minute, "the global unit", func() bool {
		return strings.Contains(f.Do("GET", "/fleet/v1/state?unitName=all.service", nil, "").Body, busyMachine)
	})
	f.run("list-units --no-legend --fields=unit,machine,active", 0, "all.service\t01234567.../10.0.0.1\tactive\n"+
		"here@1.service\t01234567.../10.0.0.1\tactive\nthere@1.service\t01234567.../10.0.0.1\tactive\n", "")
	f.run("stop all.service", 0, "Triggered global unit all.service stop\n", "Successfully stopped units [].\n")
	f.run("destroy here@1 there@1 there@ all", 0, "Destroyed here@1.service\nDestroyed there@1.service\nDestroyed there@.service\nDestroyed all.service\n", "")
}

// What fleetctl cannot do, and how it says so.
func TestRealFleetctlRefused(t *testing.T) {
	f := newFleetctl(t)
	f.run("start nothing.service", 1, "", "Error creating units: unable to find Unit(nothing.service) in Registry or on filesystem\n")
	f.run("start", 0, "", "No units given\n")
	f.run("list-units --fields=foo", 1, "", "Invalid key in output format: \"foo\"\n")
	f.run("status nothing.service", 1, "", "Unit nothing.service does not exist.\n")
	f.write("bad.service", "[Service]\nExecStart=/bin/true\n[X-Fleet]\nGlobal=true\nReplaces=other.service\n")
	f.run("submit bad.service", 1, "", "Error creating units: Global cannot be used with Replaces\n")
	f.world.registered.Store(false)
	f.run("list-machines", 1, "", "Error retrieving list of active machines from fleet API (googleapi: Error 503: fleet server unable to communicate with etcd)\n"+
		"Possible issues:\n  etcd is unhealthy and/or lost quorum\n  connection cannot be established to any etcd servers\n")
}

// fleetctl start waits: for a machine, then for the unit to be active, and this
// for 2 s only. It must not be told that there is no state.
func TestRealFleetctlWaits(t *testing.T) {
	f := newFleetctl(t)
	const state = "GET /fleet/v1/state/slow.service"
	f.write("slow.service", apitest.Text("/bin/sleep 1"))
	f.run("start --block-attempts=1 slow.service", 1, "Unit slow.service inactive\n",
		"Error waiting for units: timed out waiting for unit slow.service to report state launched\n"+
			"Error waiting for unit states, exit status: timed out waiting for unit slow.service to report state launched\n")

	// It gets a machine as soon as it is waited for, and is active when that is asked.
	launch := func() { f.report("slow.service", "activating") }
	f.run("destroy slow.service", 0, "Destroyed slow.service\n", "")
	f.write("slow.service", apitest.Text("/bin/sleep 2"))
	f.run("submit slow.service", 0, "Unit slow.service inactive\n", "")
	launch()
	f.onRequest(state, func() { f.report("slow.service", "active") })
	f.run("start slow.service", 0, "Unit slow.service launched"+onTest, "")

	// A unit that does not stop in between.
	f.run("restart slow.service", 0, strings.Repeat("Unit slow.service launched"+onTest, 2), "INFO restart.go:100: Unit(slow.service) was restarted.\n")

	// The state is lost when it is asked for, with the lease of the machine.
	failed := "Failed to find an active unit slow.service within 2s, err: Failed to fetch states within 2s\n"
	f.run("stop --no-block slow.service", 0, "Triggered unit slow.service stop\n", "Successfully stopped units [slow.service].\n")
	launch()
	f.onRequest(state, func() { f.report("slow.service", "") })
	f.run("start slow.service", 1, "Unit slow.service launched"+onTest, "Error waiting for units: "+failed+"Error waiting for systemd unit states, err: "+failed)
}
