package unit

import (
	"errors"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

// check reads lines as those of [X-Fleet], which is line 1.
func check(t *testing.T, name, lines string) (*Requirements, []Problem) {
	t.Helper()
	f, err := Parse("[X-Fleet]\n" + lines)
	if err != nil {
		t.Fatalf("%s: %v", lines, err)
	}
	n, _ := SplitName(name)
	return f.Check(n)
}

func TestSplitValues(t *testing.T) {
	for s, want := range map[string][]string{
		`a b`:          {"a b"},
		``:             {""},
		`"a=b" "c=d"`:  {"a=b", "c=d"},
		`"a b" "c"`:    {"a b", "c"},
		`"a"  "b"`:     {"a", "", "b"},
		"\"a\"\t\"b\"": {"a\tb"},
		`"a`:           {`"a`},
		`a"`:           {`a"`},
		`""`:           {""},
		`"`:            {""},
		`"a" "`:        {"a", ""},
		`"a" b "c"`:    {"a", "b", "c"},
	} {
		if diff := cmp.Diff(want, splitValues(s)); diff != "" {
			t.Errorf("%s: %s", s, diff)
		}
	}
}

func TestCheck(t *testing.T) {
	zone := []string{DefaultSpread}
	for _, tc := range []struct {
		lines string
		want  Requirements
	}{
		{"", Requirements{Spread: true, SpreadOver: zone}},
		{"MachineID=abcdef01\nMachineMetadata=a=b", Requirements{MachineID: "abcdef01", Metadata: map[string][]string{"a": {"b"}}, Spread: true, SpreadOver: zone}},
		{"MachineOf=%p@2.service\nMachineOf=\"b.service\" \"c.socket\"", Requirements{MachineOf: []string{"web@2.service", "b.service", "c.socket"}, Spread: true, SpreadOver: zone}},
		{"MachineMetadata=\"zone=b\" \"zone=a\"\nMachineMetadata=host=%i\nMachineMetadata=zone=a", Requirements{Metadata: map[string][]string{"zone": {"a", "b"}, "host": {"1"}}, Spread: true, SpreadOver: zone}},
		{"MachineMetadata=\"a=b\" \\\n \"c=d\"", Requirements{Metadata: map[string][]string{"a": {"b"}, "c": {"d"}}, Spread: true, SpreadOver: zone}},
		{"MachineID=ab \\\n\nGlobal=no", Requirements{MachineID: "ab", Spread: true, SpreadOver: zone}},
		{"Conflicts=a@*.service  b.service\nConflicts=\"c d\" \"%p@*\"", Requirements{Conflicts: []string{"a@*.service", "b.service", "c", "d", "web@*"}, Spread: true, SpreadOver: zone}},
		{"Replaces=%N.old\nReplaces=\"a*\" \"b\"", Requirements{Replaces: []string{"web@1.old", "a*", "b"}, Spread: true, SpreadOver: zone}},
		{"Global=TRUE", Requirements{Global: true, Spread: true, SpreadOver: zone}},
		{"Global=yes\nGlobal=no", Requirements{Spread: true, SpreadOver: zone}},
		{"Global=no\nGlobal=\"1\"", Requirements{Global: true, Spread: true, SpreadOver: zone}},
		{"Exclusive=yes", Requirements{Exclusive: true, Spread: true, SpreadOver: zone}},
		{"MemoryReserve=1.5G\nCPUReserve=0.07", Requirements{Memory: 3 << 29, CPU: 70, Spread: true, SpreadOver: zone}},
		{"MemoryReserve=1T\nMemoryReserve=100\nCPUReserve=150%", Requirements{Memory: 100, CPU: 1500, Spread: true, SpreadOver: zone}},
		{"CPUReserve=0.0001\nMemoryReserve=0.0001K", Requirements{Memory: 1, CPU: 1, Spread: true, SpreadOver: zone}},
		{"CounterReserve=\"gpu=1\" \"license=2\"", Requirements{Counters: map[string]int64{"gpu": 1, "license": 2}, Spread: true, SpreadOver: zone}},
		{"SpreadOver=rack zone rack", Requirements{Spread: true, SpreadOver: []string{"rack", "zone"}}},
		{"SpreadOver=", Requirements{Spread: true}},
		{"Spread=no\nSpreadOver=rack", Requirements{}},
	} {
		got, problems := check(t, "web@1.service", tc.lines)
		tc.want.Unit = "web@1.service"
		if diff := cmp.Diff(tc.want, *got, cmpopts.EquateEmpty()); diff != "" || len(problems) > 0 {
			t.Errorf("%s: %s %v", tc.lines, diff, problems)
		}
	}
}

// The deprecated forms say the same, with a warning for each.
func TestDeprecated(t *testing.T) {
	got, problems := check(t, "web.service", "X-ConditionMachineOf=a.service\nMachineOf=b.service\nX-ConditionMachineMetadata=a=b\nX-Conflicts=c* d*")
	if diff := cmp.Diff(Requirements{Unit: "web.service", MachineOf: []string{"a.service", "b.service"}, Metadata: map[string][]string{"a": {"b"}},
		Conflicts: []string{"c*", "d*"}, Spread: true, SpreadOver: []string{DefaultSpread}}, *got); diff != "" {
		t.Error(diff)
	}
	if len(problems) != 3 || Refusal(problems) != nil || problems[2].Reason != "X-Conflicts is deprecated" || problems[2].Remedy != "write Conflicts" || problems[2].Line != 5 {
		t.Errorf("%+v", problems)
	}
	for lines, want := range map[string]string{
		"X-ConditionMachineID=a1\nMachineID=b2":                "b2",
		"X-ConditionMachineBootID=a1\nX-ConditionMachineID=b2": "b2",
		"X-ConditionMachineBootID=a1":                          "a1",
		"MachineID=\"a1\" \"b2\"":                              "a1",
	} {
		if got, problems := check(t, "web.service", lines); got.MachineID != want || Refusal(problems) != nil || len(problems) == 0 {
			t.Errorf("%s: %+v, %v", lines, got, problems)
		}
	}
}

func TestWarnings(t *testing.T) {
	for lines, want := range map[string]string{
		"MachineMetaData=a=b":       `unrecognized requirement in [X-Fleet] section: "MachineMetaData"; it has no effect: write MachineMetadata`,
		"Wehre=a=b":                 `unrecognized requirement in [X-Fleet] section: "Wehre"; it has no effect: write Where`,
		"Nothing=1":                 `unrecognized requirement in [X-Fleet] section: "Nothing"; it has no effect: remove it, or write one of MachineID, MachineOf,`,
		"MachineMetadata=a=b c=d":   "a=b c=d is not key=value and has no effect; write key=value; several in quotes",
		"MachineMetadata==b":        "=b is not key=value",
		"MachineMetadata=a=":        "a= is not key=value",
		"MachineMetadata=":          "MachineMetadata has no value and no effect",
		"Conflicts=[a":              "the pattern [a is malformed and matches nothing",
		"Conflicts=":                "Conflicts has no value and no effect",
		"Replaces=a b":              "a pattern with a space matches nothing",
		"Global=y":                  "y is neither yes nor no, and counts as no",
		"Where=":                    "Where has no value and no effect",
		"MachineID=my-machine":      "this does not look like a machine ID",
		"Global=yes\nSpreadOver=dc": "SpreadOver has no effect on a global unit",
		"[x-fleet]\nGlobal=yes":     "the section [x-fleet] is not [X-Fleet] and has no effect",
	} {
		_, problems := check(t, "web.service", lines)
		if len(problems) != 1 || !problems[0].Warning || problems[0].Line != 2+strings.Count(lines, "\n") || !strings.Contains(problems[0].Error(), want) {
			t.Errorf("%s: %v, want %s", lines, problems, want)
		}
	}
	f, err := Parse("A=b\n[S]\nA=c")
	if err != nil {
		t.Fatal(err)
	}
	if _, problems := f.Check(Name{}); len(problems) != 1 || !problems[0].Warning || problems[0].Line != 1 {
		t.Error(problems)
	}
}

func TestRefusals(t *testing.T) {
	for lines, want := range map[string]string{
		"MachineOf=a.service\nConflicts=b *.service": `unresolvable requirements: peer "a.service" matches conflict "*.service"`,
		"Replaces=*.service\nMachineOf=a.service":    `unresolvable requirements: peer "a.service" matches replace "*.service"`,
		"MachineID=ab\nMachineOf=a.service":          "MachineID cannot be used with Peers",
		"MachineID=ab\nConflicts=a*":                 "MachineID cannot be used with Conflicts",
		"MachineID=ab\nX-Conflicts=a*":               "MachineID cannot be used with Conflicts",
		"MachineID=ab\nGlobal=yes":                   "MachineID cannot be used with Global",
		"MachineID=ab\nReplaces=a*":                  "MachineID cannot be used with Replaces",
		"MachineID=ab\nConflicts=a\nGlobal=yes":      "MachineID cannot be used with Conflicts", // the first in fleet's order
		"Global=yes\nMachineOf=a.service":            "Global cannot be used with Peers",
		"Global=yes\nReplaces=a*":                    "Global cannot be used with Replaces",
		"Conflicts=a*\nReplaces=b*":                  "Conflicts cannot be used with Replaces",
		"Global=yes\nExclusive=yes":                  "Global cannot be used with Exclusive",
		"MachineID=":                                 "MachineID has no value: no machine has that ID",
		"MachineID=%i":                               "%i is empty for web.service: no machine has that ID",
		"MachineOf=":                                 "MachineOf has no value: there is no such unit",
		"MachineOf=a":                                `no unit can be called a: unit name must contain "."`,
		"MachineOf=a.service b.service":              "no unit can be called a.service b.service: invalid character ' ' in unit name",
		"MachineOf=%n":                               "the unit would wait for itself",
		"Exclusive=maybe":                            "maybe is neither yes nor no",
		"Spread=2":                                   "2 is neither yes nor no",
		"MemoryReserve=512MB":                        "512MB is not an amount of memory",
		"MemoryReserve=-1":                           "-1 is not an amount of memory",
		"MemoryReserve=9999999T":                     "9999999T is not an amount of memory",
		"MemoryReserve=1e9":                          "1e9 is not an amount of memory",
		"CPUReserve=two":                             "two is not a number of cores",
		"CPUReserve=%i":                              "%i, which is empty here, is not a number of cores",
		"CounterReserve=gpu":                         "gpu is not NAME=AMOUNT",
		"CounterReserve=gpu=1.5":                     "gpu=1.5 is not NAME=AMOUNT",
		"CounterReserve=gpu=1\nCounterReserve=gpu=2": "gpu is reserved twice",
		"SpreadOver=a=b":                             "a=b is not a metadata key",
		"Where=zone = ":                              "column 7 of the expression: expected a value instead of the end",
		"Where=cores > \\\n many":                    "column 12 of the expression: > compares numbers, and many is not one",
	} {
		_, problems := check(t, "web.service", lines)
		err := Refusal(problems)
		var p Problem
		if !errors.As(err, &p) || !strings.HasPrefix(p.Reason, want) || p.Remedy == "" || p.Line < 2 {
			t.Errorf("%s: %+v, want %s", lines, p, want)
		}
	}
}

func TestAllowedCombinations(t *testing.T) {
	for _, lines := range []string{
		"MachineID=ab\nMachineMetadata=a=b",
		"MachineID=ab\nGlobal=no",
		"MachineID=ab\nWhere=a=b\nExclusive=yes",
		"Global=yes\nMachineMetadata=a=b\nConflicts=a*\nWhere=a=b\nMemoryReserve=1G",
		"MachineOf=a.service\nMachineMetadata=a=b\nConflicts=b*",
		"MachineOf=a.service\nReplaces=b*",
		"Conflicts=[\nMachineOf=a.service",
	} {
		if _, problems := check(t, "web.service", lines); Refusal(problems) != nil {
			t.Errorf("%s: %v", lines, problems)
		}
	}
}

func TestProblem(t *testing.T) {
	_, problems := check(t, "web.service", "MachineID=ab\n\nConflicts=a*\nCPUReserve=x")
	want := "line 4: Conflicts=a*: MachineID cannot be used with Conflicts; remove MachineID (line 2) or Conflicts (line 4)\n" +
		"line 5: CPUReserve=x: x is not a number of cores; write cores, such as 2 or 0.5, or percent of one core, such as 50%"
	if err := Refusal(problems); err == nil || err.Error() != want {
		t.Errorf("%v", err)
	}
}

// A template's specifiers have no values yet: they stay and are not judged.
func TestTemplate(t *testing.T) {
	const lines = "MachineOf=%p-data@%i.service\nMachineMetadata=host=%i\nMemoryReserve=%iG\nWhere=slot < %i and zone = %p"
	got, problems := check(t, "web@.service", lines)
	if len(problems) > 0 || got.MachineOf[0] != "%p-data@%i.service" || got.Metadata["host"][0] != "%i" {
		t.Errorf("%+v %v", got, problems)
	}
	got, problems = check(t, "web@2.service", lines)
	if len(problems) > 0 || got.MachineOf[0] != "web-data@2.service" || got.Metadata["host"][0] != "2" || got.Memory != 2<<30 {
		t.Errorf("%+v %v", got, problems)
	}
	if !got.Where[0].Match(map[string]string{"slot": "1", "zone": "web"}) || got.Where[0].Match(map[string]string{"slot": "2", "zone": "web"}) {
		t.Error(got.Where[0])
	}
	if _, problems = check(t, "web@x.service", lines); len(problems) != 2 {
		t.Error(problems)
	}
}

func TestMismatch(t *testing.T) {
	const id = "0123456789abcdef0123456789abcdef"
	machine := map[string]string{"zone": "a", "disk": "hdd", "cores": "8", "void": ""}
	for lines, want := range map[string]string{
		"":                       "",
		"MachineID=" + id:        "",
		"MachineID=01234567":     "",
		"MachineID=0123456":      "it is not machine 0123456",
		"MachineID=012345678":    "it is not machine 012345678",
		"MachineMetadata=zone=a": "",
		"MachineMetadata=\"zone=a\" \"zone=b\" \"disk=hdd\"":               "",
		"MachineMetadata=\"zone=a\" \"disk=ssd\" \"disk=nvme\" \"rack=1\"": "its metadata has disk=hdd and not disk=nvme or ssd",
		"MachineMetadata=rack=1":                                           "its metadata has no rack and not rack=1",
		"Where=cores >= 8":                                                 "",
		"Where=zone=a\nWhere=cores > 8 and rack = \"\"":                    `its metadata has cores=8, no rack, and the unit is for machines where cores > 8 and rack = ""`,
	} {
		r, problems := check(t, "web.service", lines)
		if err := Refusal(problems); err != nil {
			t.Fatal(err)
		}
		if got := r.Mismatch(id, machine); got != want {
			t.Errorf("%s: %q, want %q", lines, got, want)
		}
	}
}

func TestConflicts(t *testing.T) {
	r, _ := check(t, "web@1.service", "Conflicts=[bad web@*.service db.?")
	for other, want := range map[string]string{"web@2.service": "web@*.service", "web@1.service": "", "db.x": "db.?", "db.xy": "", "[bad": ""} {
		if pattern, ok := r.ConflictsWith(other); pattern != want || ok != (want != "") {
			t.Errorf("%s: %q", other, pattern)
		}
	}
	r, _ = check(t, "web@1.service", "Replaces=web@*.service")
	if _, ok := r.Replacing("web@0.service"); !ok {
		t.Error("web@0.service is not replaced")
	}
	if _, ok := r.Replacing("web@1.service"); ok {
		t.Error("a unit replaces itself")
	}
}
