package registry

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"flotilla/internal/unit"
)

func TestDecodeRefusesNewerVersions(t *testing.T) {
	if _, err := Decode[Unit](`{"v":2,"text":"x"}`); err == nil || !strings.Contains(err.Error(), "upgrade") {
		t.Errorf("got %v, want a refusal that says to upgrade", err)
	}
	if _, err := Decode[Unit](`[1]`); err == nil {
		t.Error("a list was read as a unit")
	}
	want := Entry{V: Version, Text: "[Service]\nExecStart=/bin/true\n", Desired: Launched, Epoch: 7, Generation: 3}
	got, err := Decode[Entry](Encode(want))
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

func TestCheckMachineID(t *testing.T) {
	for _, bad := range []string{"", "global", "a/b", "a b", strings.Repeat("x", 65)} {
		if CheckMachineID(bad) == nil {
			t.Errorf("%q was accepted", bad)
		}
	}
	if err := CheckMachineID("0123456789abcdef0123456789abcdef"); err != nil {
		t.Error(err)
	}
}
