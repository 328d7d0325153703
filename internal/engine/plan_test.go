package engine

import (
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"flotilla/internal/registry"
)

var update = flag.Bool("update", false, "rewrite testdata/*.plan; review the difference")

// TestGoldenPlans runs the scripts of testdata; below "----" is what they say.
//
//	machine m1 zone=a memory=100 gpu#2 nounits   a machine comes, or changes
//	gone m1                                      it goes
//	set m1 zone=b cordon drain uncordon undrain  settings
//	unit a.service launched: Conflicts=b*; Spread=no
//	stop a.service | load a.service | start a.service | restart a.service | destroy a.service
//	trouble m1 a.service it cannot be loaded     m1's only trouble; without a unit: none
//	move a.service m2 | solo m1 | allow | raw <key> <value> | after 10m
//	plan                                         one plan, written
//	agents                                       what is to be released is
//	settle                                       both until nothing is left to do
//	explain a.service | summary a.service | rebalance | where
func TestGoldenPlans(t *testing.T) {
	files, err := filepath.Glob("testdata/*.plan")
	if err != nil || len(files) == 0 {
		t.Fatalf("no plans: %v", err)
	}
	for _, path := range files {
		t.Run(strings.TrimSuffix(filepath.Base(path), ".plan"), func(t *testing.T) {
			text, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			in, expected, _ := strings.Cut(string(text), "----\n")
			got := goldenPlan(t, in)
			if *update {
				if err := os.WriteFile(path, []byte(in+"----\n"+got), 0o644); err != nil {
					t.Fatal(err)
				}
				return
			}
			if diff := cmp.Diff(expected, got); diff != "" {
				t.Errorf("plan (-want +got):\n%s", diff)
			}
		})
	}
}

func goldenPlan(t *testing.T, in string) string {
	w := newWorld()
	var out strings.Builder
	show := func(steps []Step) {
		for _, s := range steps {
			if s.Reason == "" {
				t.Errorf("step without reason: %s", s)
			}
			fmt.Fprintln(&out, s)
		}
	}
	for line := range strings.SplitSeq(in, "\n") {
		head, options, _ := strings.Cut(line, ": ")
		f := strings.Fields(head)
		if len(f) == 0 || strings.HasPrefix(f[0], "#") {
			continue
		}
		arg := func(i int) string {
			if i < len(f) {
				return f[i]
			}
			return ""
		}
		switch f[0] {
		case "machine":
			w.machine(f[1], func(m *registry.Machine) { describe(m, f[2:]) })
		case "gone":
			w.del(keys.Machine(f[1]))
			w.del(keys.States(f[1]))
		case "set":
			w.settings(f[1], func(s *registry.Settings) {
				for _, word := range f[2:] {
					switch key, value, isPair := strings.Cut(word, "="); {
					case isPair:
						s.Metadata[key] = value
					default:
						s.Cordon = word == "cordon" || s.Cordon && word != "uncordon"
						s.Drain = word == "drain" || s.Drain && word != "undrain"
					}
				}
			})
		case "unit":
			var lines []string
			if options != "" {
				lines = strings.Split(options, "; ")
			}
			w.unit(f[1], registry.Desired(f[2]), lines...)
		case "stop":
			w.desire(f[1], registry.Inactive)
		case "load":
			w.desire(f[1], registry.Loaded)
		case "start":
			w.desire(f[1], registry.Launched)
		case "restart":
			u := w.want(f[1])
			u.Restarts++
			w.put(keys.Unit(f[1]), registry.Encode(u))
		case "destroy":
			w.del(keys.Unit(f[1]))
		case "trouble":
			states := registry.States{V: registry.Version, Units: map[string]registry.State{}}
			if arg(2) != "" {
				states.Units[f[2]] = registry.State{Epoch: w.placement(f[2]).Epoch, Trouble: strings.Join(f[3:], " ")}
			}
			w.put(keys.States(f[1]), registry.Encode(states))
		case "move":
			w.put(keys.Move(f[1]), registry.Encode(registry.Move{V: registry.Version, To: f[2], Reason: "by hand"}))
		case "solo":
			w.put(keys.Solo(), registry.Encode(registry.Solo{V: registry.Version, Machine: f[1]}))
		case "nosolo":
			w.del(keys.Solo())
		case "allow":
			w.put(keys.Failover(), registry.Encode(registry.Failover{V: registry.Version, Allowed: true}))
		case "raw":
			w.put(f[1], strings.Join(f[2:], " "))
		case "unraw":
			w.del(f[1])
		case "after":
			d, err := time.ParseDuration(f[1])
			if err != nil {
				t.Fatal(err)
			}
			w.now = w.now.Add(d)
		case "plan":
			fmt.Fprintf(&out, "%s\n", line)
			steps := w.plan()
			for _, s := range steps {
				if err := w.apply(s); err != nil {
					t.Error(err)
				}
			}
			show(steps)
		case "agents":
			w.agents()
		case "settle":
			fmt.Fprintf(&out, "%s\n", line)
			steps, err := w.settle()
			if err != nil {
				t.Error(err)
			}
			show(steps)
		case "explain":
			fmt.Fprintf(&out, "%s\n", line)
			for _, v := range w.c.Explain(f[1]) {
				fmt.Fprintf(&out, "%s %s %s\n", v.Machine, v.Verdict, v.Reason+v.Score)
			}
		case "summary":
			fmt.Fprintf(&out, "%s\n%s\n", line, w.c.Summary(f[1]))
		case "rebalance":
			fmt.Fprintf(&out, "%s\n", line)
			for _, m := range w.c.Rebalance() {
				fmt.Fprintf(&out, "%s from %s to %s: %s\n", m.Unit, m.From, m.To, m.Reason)
			}
		case "where":
			fmt.Fprintf(&out, "%s\n", line)
			for _, key := range w.under("placements/") {
				name := strings.TrimPrefix(key, keys.Prefix+"placements/")
				fmt.Fprintf(&out, "%s %s\n", name, w.placement(name).Machine)
			}
		default:
			t.Fatalf("unknown line %q", line)
		}
	}
	return out.String()
}

func describe(m *registry.Machine, words []string) {
	for _, word := range words {
		if name, n, isCounter := strings.Cut(word, "#"); isCounter {
			m.Counters[name], _ = strconv.ParseInt(n, 10, 64)
			continue
		}
		key, value, _ := strings.Cut(word, "=")
		n, _ := strconv.ParseInt(value, 10, 64)
		switch key {
		case "nounits":
			m.Units = false
		case "memory":
			m.Memory = n
		case "cpu":
			m.CPU = n
		default:
			m.Metadata[key] = value
		}
	}
}
