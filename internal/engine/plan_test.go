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

	"flotilla/internal/state"
	"flotilla/internal/unit"
)

var update = flag.Bool("update", false, "rewrite testdata/*.plan; review the difference")

// TestGoldenPlans runs the scripts of testdata; below "----" is what they say.
//
//	node m1 zone=a memory=100 gpu#2 nounits      a node comes, or changes
//	gone m1                                      it goes
//	set m1 zone=b cordon drain uncordon undrain  settings
//	unit a.service launched: Conflicts=b*; Spread=no
//	stop a.service | load a.service | start a.service | restart a.service | destroy a.service
//	trouble m1 a.service it cannot be loaded     m1's only trouble; without a unit: none
//	move a.service m2 | allow | raw <key> <value> | after 10m
//	plan                                         one plan, written
//	agents                                       nodes let go of what they are to
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
		case "node":
			w.node(f[1], func(n *state.NodeRecord) { describe(n, f[2:]) })
		case "gone":
			w.gone(f[1])
		case "set":
			w.settings(f[1], func(s *state.Settings) {
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
			w.unit(f[1], unit.Desired(f[2]), lines...)
		case "stop":
			w.desire(f[1], unit.Inactive)
		case "load":
			w.desire(f[1], unit.Loaded)
		case "start":
			w.desire(f[1], unit.Launched)
		case "restart":
			u := w.want(f[1])
			u.Restarts++
			w.put(keys.Unit(f[1]), state.Encode(u))
		case "destroy":
			w.del(keys.Unit(f[1]))
		case "trouble":
			units := map[string]state.UnitState{}
			if arg(2) != "" {
				units[f[2]] = state.UnitState{Epoch: w.placement(f[2]).Epoch, Trouble: strings.Join(f[3:], " ")}
			}
			w.report(f[1], units)
		case "move":
			w.put(keys.Move(f[1]), state.Encode(state.Move{V: state.Version, To: f[2], Reason: "by hand"}))
		case "allow":
			w.put(keys.Failover(), state.Encode(state.Failover{V: state.Version, Allowed: true}))
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
			for _, v := range Explain(w.snapshot(), f[1]) {
				fmt.Fprintf(&out, "%s %s %s\n", v.NodeID, v.Verdict, v.Reason+v.Score)
			}
		case "summary":
			fmt.Fprintf(&out, "%s\n%s\n", line, Summary(w.snapshot(), f[1]))
		case "rebalance":
			fmt.Fprintf(&out, "%s\n", line)
			for _, m := range Rebalance(w.snapshot()) {
				fmt.Fprintf(&out, "%s from %s to %s: %s\n", m.Unit, m.From, m.To, m.Reason)
			}
		case "where":
			fmt.Fprintf(&out, "%s\n", line)
			for _, key := range w.under("cluster/placements/") {
				name := strings.TrimPrefix(key, keys.Prefix+"cluster/placements/")
				fmt.Fprintf(&out, "%s %s\n", name, w.placement(name).Node)
			}
		default:
			t.Fatalf("unknown line %q", line)
		}
	}
	return out.String()
}

func describe(n *state.NodeRecord, words []string) {
	for _, word := range words {
		if name, count, isCounter := strings.Cut(word, "#"); isCounter {
			n.Counters[name], _ = strconv.ParseInt(count, 10, 64)
			continue
		}
		key, value, _ := strings.Cut(word, "=")
		amount, _ := strconv.ParseInt(value, 10, 64)
		switch key {
		case "nounits":
			n.Units = false
		case "memory":
			n.Memory = amount
		case "cpu":
			n.CPU = amount
		default:
			n.Metadata[key] = value
		}
	}
}
