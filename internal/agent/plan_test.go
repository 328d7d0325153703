package agent

import (
	"flag"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"flotilla/internal/systemd"
	"flotilla/internal/unit"
)

var update = flag.Bool("update", false, "write the expected steps anew")

// A golden file has cases, cut by empty lines: a comment, lines of "fence",
// "want UNIT" and "have UNIT" with the words of parse, "----" and the steps.
func TestPlans(t *testing.T) {
	files, err := filepath.Glob("testdata/plans/*.txt")
	if err != nil || len(files) == 0 {
		t.Fatalf("no plans (%v)", err)
	}
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		var out []string
		for _, c := range strings.Split(strings.TrimSpace(string(text)), "\n\n") {
			input, steps, _ := strings.Cut(c+"\n", "----\n")
			wants, haves, f := parse(t, input)
			var got strings.Builder
			for _, s := range plan(wants, haves, f) {
				fmt.Fprintln(&got, s)
			}
			if diff := cmp.Diff(strings.TrimSpace(steps), strings.TrimSpace(got.String())); diff != "" && !*update {
				t.Errorf("%s: %s\n%s", file, input, diff)
			}
			out = append(out, input+"----\n"+got.String())
		}
		if *update {
			if err := os.WriteFile(file, []byte(strings.Join(out, "\n")), 0o644); err != nil {
				t.Fatal(err)
			}
		}
	}
}

func parse(t *testing.T, input string) (map[string]*want, map[string]have, fence) {
	t.Helper()
	wants, haves, f := map[string]*want{}, map[string]have{}, fence{Open: true}
	for line := range strings.Lines(input) {
		words := strings.Fields(line)
		switch words[0] {
		case "#":
		case "fence":
			f = fence{Open: slices.Contains(words, "open"), Exempt: slices.Contains(words, "exempt")}
		case "want":
			w := &want{Hash: "h1", Sum: "s1", Epoch: 1, Desired: unit.Launched}
			for _, word := range words[2:] {
				k, v, _ := strings.Cut(word, "=")
				n, _ := strconv.ParseInt(v, 10, 64)
				switch k {
				case "hash":
					w.Hash, w.Sum = v, v
				case "sum":
					w.Sum = v
				case "epoch":
					w.Epoch = n
				case "restarts":
					w.Restarts = n
				case "release":
					w.Release = v
				case "void":
					w.Void, w.Outlived = "it is void", true
				case "unregistered":
					w.Void = "the machine is not registered"
				case "problem":
					w.Problem = "it is bad"
				case "exclusive":
					w.Exclusive = true
				case "loaded":
					w.Desired = unit.Loaded
				default:
					t.Fatalf("what is %q?", word)
				}
			}
			wants[words[1]] = w
		case "have":
			h := have{On: true, record: record{Whole: true, Hash: "h1", Sum: "s1", Epoch: 1, Launched: true}, Status: systemd.Status{Load: "loaded", Active: "active"}}
			for _, word := range words[2:] {
				k, v, _ := strings.Cut(word, "=")
				n, _ := strconv.ParseInt(v, 10, 64)
				switch k {
				case "hash":
					h.Hash, h.Sum = v, v
				case "epoch":
					h.Epoch = n
				case "restarts":
					h.Restarts = n
				case "exclusive":
					h.Exclusive = true
				case "loaded":
					h.Launched = false
					h.Status.Active = "inactive"
				case "absent":
					h = have{Status: systemd.Status{Load: "not-found", Active: "inactive"}}
				case "foreign":
					h = have{Status: systemd.Status{Load: "loaded", Active: "active"}, Foreign: "/lib/systemd/system/x"}
				case "torn":
					h.Whole = false
				case "unloadable":
					h.Status.Load = "bad-setting"
				case "released":
					h.Released = true
				case "resting":
					h.Resting = true
				case "busy":
					h.Busy = Action(v)
				case "broken":
					h.Doing = Action(v)
				case "launched":
					h.Launched = v != "no"
				case "active", "inactive", "failed", "activating", "deactivating":
					h.Status.Active = k
				case "queued":
					h.Status.Queued = v
				default:
					t.Fatalf("what is %q?", word)
				}
			}
			haves[words[1]] = h
		default:
			t.Fatalf("what is %q?", line)
		}
	}
	return wants, haves, f
}

func TestInOrder(t *testing.T) {
	wants := map[string]*want{
		"a": {After: []string{"b", "x"}}, "b": {}, "c": {Before: []string{"b"}}, "d": {After: []string{"e"}}, "e": {After: []string{"d"}},
		"f": {After: []string{"f"}}, "g": {},
	}
	got := inOrder([]string{"f", "b", "d", "a", "c", "e"}, wants)
	if diff := cmp.Diff([]string{"c", "b", "a", "e", "d", "f"}, got); diff != "" {
		t.Error(diff)
	}
}

func TestStartedBefore(t *testing.T) {
	f, err := unit.Parse("[Unit]\nAfter=gone.service\nAfter=\nAfter=db@%i.service \\\n  x.target\nBefore=y.service\n[Service]\nAfter=no.service\n")
	if err != nil {
		t.Fatal(err)
	}
	n, _ := unit.SplitName("web@7.service")
	after, before := startedBefore(n, f)
	if diff := cmp.Diff([]string{"db@7.service", "x.target", "web@7.socket", "web@7.timer", "web@7.path"}, after); diff != "" {
		t.Error(diff)
	}
	if diff := cmp.Diff([]string{"y.service"}, before); diff != "" {
		t.Error(diff)
	}
}

// do changes h as carrying out the step would.
func do(s Step, w *want, h have) have {
	switch s.Do {
	case Stop:
		h.Launched, h.Doing, h.Busy, h.Status.Active, h.Status.Queued = false, "", "", "inactive", ""
	case Unload:
		return have{Status: systemd.Status{Load: "not-found", Active: "inactive"}}
	case Load:
		h.On, h.Whole, h.Hash, h.Sum, h.Epoch, h.Exclusive, h.Status.Load = true, true, w.Hash, w.Sum, w.Epoch, w.Exclusive, "loaded"
	case Start, Restart:
		h.Launched, h.Restarts, h.Doing, h.Status.Active = true, w.Restarts, "", "active"
	case Adopt:
		h.Launched, h.Restarts, h.Doing = h.Launched || w.Desired == unit.Launched, w.Restarts, ""
	case Release:
		h.Released = true
	}
	return h
}

// From any state the steps lead to where there are none; on the way no file of a
// unit that runs another version is touched, each step has a reason, and what is
// as it shall be is left alone.
func TestPlansConverge(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		pick := func(label string, of ...string) string { return rapid.SampledFrom(of).Draw(t, label) }
		is := func(label string) bool { return rapid.Bool().Draw(t, label) }
		wants, haves := map[string]*want{}, map[string]have{}
		for _, name := range []string{"a", "b", "c"} {
			if is("wanted") {
				w := &want{
					Hash: pick("hash", "h1", "h2"), Desired: unit.Desired(pick("desired", "loaded", "launched")),
					Restarts: rapid.Int64Range(0, 2).Draw(t, "restarts"), Epoch: rapid.Int64Range(1, 2).Draw(t, "epoch"),
					Exclusive: is("exclusive"), Release: pick("release", "", "", "", "drained"), Void: pick("void", "", "", "", "void"), Outlived: is("outlived"), Problem: pick("problem", "", "", "", "bad"),
				}
				w.Sum = w.Hash + pick("sum", "x", "y")
				wants[name] = w
			}
			if is("here") {
				h := have{
					On: true, record: record{
						Whole: is("whole"), Hash: pick("hash", "h1", "h2", ""), Epoch: rapid.Int64Range(0, 2).Draw(t, "epoch"), Launched: is("launched"),
						Restarts: rapid.Int64Range(0, 2).Draw(t, "restarts"), Exclusive: is("exclusive"), Doing: Action(pick("doing", "", "", "stop", "start", "restart")),
					},
					Status: systemd.Status{Load: "loaded", Active: pick("active", "active", "inactive", "failed", "activating", "deactivating")},
				}
				h.Sum = h.Hash + pick("sum", "x", "y")
				haves[name] = h
			}
		}
		f := fence{Open: is("open"), Exempt: is("exempt")}
		calm := maps.Clone(haves)
		for round := 0; ; round++ {
			steps := plan(wants, haves, f)
			if diff := cmp.Diff(steps, plan(wants, haves, f)); diff != "" {
				t.Fatalf("asked again it says: %s", diff)
			}
			if len(steps) == 0 {
				break
			}
			if round > 5 {
				t.Fatalf("still %v", steps)
			}
			for _, s := range steps {
				w, h := wants[s.Unit], haves[s.Unit]
				if w == nil {
					w = &want{}
				}
				if s.Reason == "" {
					t.Fatalf("%v has no reason", s)
				}
				if s.Do == Unload && h.alive() || s.Do == Load && h.On && h.Hash != "" && h.Hash != w.Hash && h.alive() {
					t.Fatalf("%v of a unit that runs: %+v", s, h)
				}
				if s.Do == Start && (w.Void != "" || w.Problem != "" || w.Release != "" || w.Exclusive && !f.Open) {
					t.Fatalf("%v of %+v", s, w)
				}
				if h, c := haves[s.Unit], calm[s.Unit]; s.Do == Stop && c == h && w.Hash == h.Hash && w.Epoch == h.Epoch && w.Exclusive == h.Exclusive &&
					w.Desired == unit.Launched && w.Release == "" && w.Void == "" && h.Doing == "" {
					t.Fatalf("%v although all is well: %+v, %+v", s, w, h)
				}
				haves[s.Unit] = do(s, w, h)
			}
		}
		for name, w := range wants {
			h := haves[name]
			switch {
			case w.Void != "" || w.Problem != "":
			case w.Release != "":
				if h.On {
					t.Fatalf("%s is still here: %+v", name, h)
				}
			case !h.On || !h.Whole || h.Hash != w.Hash || h.Sum != w.Sum || h.Epoch != w.Epoch:
				t.Fatalf("%s is not as wanted: %+v, %+v", name, w, h)
			case h.Launched != (w.Desired == unit.Launched) && (!w.Exclusive || f.Open):
				t.Fatalf("%s is launched: %v, %+v", name, h.Launched, w)
			case h.Restarts != w.Restarts && (!w.Exclusive || f.Open):
				t.Fatalf("%s: %d restarts, want %d", name, h.Restarts, w.Restarts)
			}
		}
		for name, h := range haves {
			if _, ok := wants[name]; !ok && h.On {
				t.Fatalf("%s is not wanted, and still here", name)
			}
		}
	})
}
