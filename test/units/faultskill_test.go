//go:build cluster

package units_test

import (
	"fmt"
	"math/rand/v2"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// TestKilled kills the nodes' processes at random moments while units are
// started, stopped, replaced and destroyed. In the end exactly what is wanted
// runs, each in its last version and on one machine, and units that nobody asked
// anything of run as before. UNITS_SEED repeats a run.
func TestKilled(t *testing.T) {
	// A node that is killed again and again may miss the usual lease.
	c := faultyOf(t, "killed", "--nodes", "3", "--set", "machine-ttl=60")
	seed := uint64(time.Now().UnixNano())
	if text := os.Getenv("UNITS_SEED"); text != "" {
		var err error
		if seed, err = strconv.ParseUint(text, 10, 64); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("UNITS_SEED=%d", seed)
	random := rand.New(rand.NewPCG(seed, 0))

	c.start(t, node{}, unit(t, "still-1.service"), unit(t, "still-2.service"), unit(t, "still-3.service"), beating(t, "only.service", "[X-Fleet]", "Exclusive=yes"))
	before := c.running(t, "'still-*'", c.nodes...)

	var killers sync.WaitGroup
	for _, n := range c.nodes {
		script := "for s in"
		for range 12 {
			script += fmt.Sprintf(" %.2f", 0.1+3*random.Float64())
		}
		script += "; do sleep $s; systemctl kill -s KILL --kill-whom=main flotilla-node; done; :"
		killers.Go(func() { _ = c.run("", "cluster", "shell", "--cluster", c.name, n.Name, script) })
	}
	killed := make(chan struct{})
	go func() { killers.Wait(); close(killed) }()

	want := map[string]string{} // what runs of each unit
	for round := 0; ; round++ {
		select {
		case <-killed:
		default:
			c.change(t, random, round, want)
			continue
		}
		t.Logf("%d changes", round)
		break
	}
	wanted := []string{}
	for _, process := range want {
		if process != "" {
			wanted = append(wanted, process)
		}
	}
	slices.Sort(wanted)
	var runs []string
	for limit := time.Now().Add(2 * time.Minute); !slices.Equal(runs, wanted); runs = c.sleepers(t) {
		if time.Now().After(limit) {
			t.Fatalf("not what is wanted runs (-want +have):\n%s", cmp.Diff(wanted, runs))
		}
	}
	c.within(t, time.Minute, "the listing to say so too", func() bool { return len(c.active(t)) == len(wanted)+4 })
	c.untouched(t, "'still-*'", before, c.nodes...)
	c.apart(t, "only.service")
}

// change does something to one of the units, again until it is done.
func (c *cluster) change(t *testing.T, random *rand.Rand, round int, want map[string]string) {
	t.Helper()
	i := random.IntN(6)
	name := fmt.Sprintf("change-%d.service", i)
	var args []string
	switch do := random.IntN(8); {
	case do < 4 || want[name] == "" && do < 6:
		seconds := strconv.Itoa(1000000 + 10000*i + round)
		lines := []string{"[Service]", "ExecStart=/bin/sleep " + seconds}
		if i%2 == 0 {
			lines = append(lines, "ExecStartPre=/bin/sleep 0.3", "ExecStop=/bin/sleep 0.3")
		}
		args = []string{"start", "--no-block", "--replace", unit(t, name, lines...)}
		want[name] = seconds
	case want[name] == "":
		return
	case do < 7:
		args = []string{"stop", "--no-block", name}
		want[name] = ""
	default:
		args = []string{"destroy", name}
		want[name] = ""
	}
	c.waitFor(t, strings.Join(args, " "), func() bool { return c.run("", args...).code == 0 })
}

var sleeper = regexp.MustCompile(`/bin/sleep (1[0-9]{6}) \n`)

// sleepers returns how long all processes of change's units on all nodes want to
// sleep, sorted.
func (c *cluster) sleepers(t *testing.T) (all []string) {
	t.Helper()
	for _, n := range c.nodes {
		out := c.inside(t, n, `for p in /proc/[0-9]*/cmdline; do tr '\0' ' ' <$p; echo; done 2>/dev/null`)
		for _, m := range sleeper.FindAllStringSubmatch(out, -1) {
			all = append(all, m[1])
		}
	}
	slices.Sort(all)
	return all
}
