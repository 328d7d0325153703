package state

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"flotilla/internal/unit"
)

func TestDecodeRefusesNewerVersions(t *testing.T) {
	if _, err := Decode[UnitRecord](`{"v":2,"text":"x"}`); err == nil || !strings.Contains(err.Error(), "upgrade") {
		t.Errorf("got %v, want a refusal that says to upgrade", err)
	}
	if _, err := Decode[UnitRecord](`[1]`); err == nil {
		t.Error("a list was read as a unit")
	}
	want := Placement{V: Version, Node: "m1", Generation: 3, Epoch: 7, Approved: "abc", Reason: "it has room"}
	got, err := Decode[Placement](Encode(want))
	if err != nil || got != want {
		t.Errorf("got %v, %v, want %v", got, err, want)
	}
}

func TestMetadataHidesAndOverlays(t *testing.T) {
	own := map[string]string{"zone": "a", "disk": "ssd"}
	got := Settings{Metadata: map[string]string{"disk": "", "rack": "7", "gone": ""}}.Merge(own)
	if diff := cmp.Diff(map[string]string{"zone": "a", "rack": "7"}, got); diff != "" {
		t.Error(diff)
	}
}

func claim(t *testing.T, name string, epoch int64, xfleet ...string) Claim {
	t.Helper()
	f, err := unit.Parse("[Service]\nExecStart=/bin/true\n[X-Fleet]\n" + strings.Join(xfleet, "\n") + "\n")
	if err != nil {
		t.Fatal(err)
	}
	n, _ := unit.SplitName(name)
	r, problems := f.Check(n)
	if err := unit.Refusal(problems); err != nil {
		t.Fatal(err)
	}
	return Claim{name, r, epoch}
}

func TestGlobalsOn(t *testing.T) {
	globals := []Claim{
		claim(t, "b.service", 20, "Global=yes", "Conflicts=a.service"),
		claim(t, "a.service", 10, "Global=yes"),
		claim(t, "ssd.service", 30, "Global=yes", "MachineMetadata=disk=ssd"),
		claim(t, "late.service", 50, "Global=yes", "Conflicts=web@*"),
		claim(t, "early.service", 35, "Global=yes", "Conflicts=web@*"),
	}
	placed := []Claim{claim(t, "web@1.service", 40)}
	run, refused := GlobalsOn("m1", map[string]string{"disk": "hdd"}, placed, globals)
	if diff := cmp.Diff([]string{"a.service", "early.service"}, run); diff != "" {
		t.Error(diff)
	}
	for name, want := range map[string]string{"b.service": "a.service", "ssd.service": "disk", "late.service": "web@1.service"} {
		if !strings.Contains(refused[name], want) {
			t.Errorf("%s: reason %q does not name %s", name, refused[name], want)
		}
	}
}

func TestCheckNodeID(t *testing.T) {
	for _, bad := range []string{"", "a/b", "a b", strings.Repeat("x", 65)} {
		if CheckNodeID(bad) == nil {
			t.Errorf("%q was accepted", bad)
		}
	}
	if err := CheckNodeID("0123456789abcdef0123456789abcdef"); err != nil {
		t.Error(err)
	}
}

// What a newer program has added to a record survives a rewrite by this one.
func TestUnknownFieldsAreKept(t *testing.T) {
	item := Item[Settings]{}.next(`{"v":1,"cordon":true,"quota":{"disk":5},"metadata":{"a":"b"}}`, 3, 4)
	if item.Problem != "" || !item.Value.Cordon || item.Value.Metadata["a"] != "b" {
		t.Fatalf("got %+v", item)
	}
	item.Value.Cordon = false
	if got, want := item.With(item.Value), `{"metadata":{"a":"b"},"quota":{"disk":5},"v":1}`; got != want {
		t.Errorf("rewritten as %s, want %s", got, want)
	}
}

// A record that cannot be read keeps its last readable value.
func TestLastReadableValue(t *testing.T) {
	item := Item[Settings]{}.next(`{"v":1,"drain":true}`, 3, 4).next(`{"v":2}`, 3, 5)
	if item.Usable() || !item.Exists() || !item.Value.Drain || item.Modified != 5 || !strings.Contains(item.Problem, "upgrade") {
		t.Errorf("got %+v", item)
	}
}
