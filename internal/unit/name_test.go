package unit

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

func TestCheckName(t *testing.T) {
	for name, want := range map[string]string{
		"a.service":                           "",
		"a-b:c_d.e\\x2d@f@g.service":          "",
		"a@.timer":                            "",
		"-.mount":                             "",
		"a.busname":                           "",
		strings.Repeat("a", 248) + ".service": "",
		strings.Repeat("a", 249) + ".service": "unit name exceeds maximum length (256)",
		"":                                    "unit name cannot be empty",
		"a":                                   `unit name must contain "."`,
		"a@b":                                 `unit name must contain "."`,
		"a.":                                  `unit name cannot end in "."`,
		"a.xyz":                               `invalid unit type: "xyz"`,
		"a.Service":                           `invalid unit type: "Service"`,
		"a@b.mount":                           `invalid unit type for template: "mount"`,
		"a%b.service":                         "invalid character '%' in unit name",
		"a b.service":                         "invalid character ' ' in unit name",
		"../a.service":                        "invalid character '/' in unit name",
		"a\nb.service":                        `invalid character '\n' in unit name`,
		"ä.service":                           "invalid character 'ä' in unit name",
		"@a.service":                          `unit name cannot start in "@"`,
		"@.service":                           `unit name cannot start in "@"`,
		".service":                            `unit name must have something before ".service"`,
	} {
		got := ""
		if err := CheckName(name); err != nil {
			got = err.Error()
		}
		if got != want {
			t.Errorf("%q: %q, want %q", name, got, want)
		}
	}
}

func TestFromArgument(t *testing.T) {
	for arg, want := range map[string]string{
		"a":                 "a.service",
		"dir/a":             "a.service",
		"./dir/a@1.service": "a@1.service",
		"a.socket":          "a.socket",
		"a.timer":           "a.timer",
		"a.path":            "a.path",
		"a.device":          "a.device",
		"a.mount":           "a.mount",
		"a.automount":       "a.automount",
		"a.target":          "a.target.service",
		"a.swap":            "a.swap.service",
		"a.snapshot":        "a.snapshot.service",
		"a.1":               "a.1.service",
	} {
		if got := FromArgument(arg); got != want {
			t.Errorf("%s: %s, want %s", arg, got, want)
		}
	}
}

func TestSplitName(t *testing.T) {
	for _, tc := range []struct {
		Name
		template           string
		isTemplate, isInst bool
	}{
		{Name{Full: "foo.service", Stem: "foo", Prefix: "foo", Type: "service"}, "", false, false},
		{Name{Full: "foo@.service", Stem: "foo@", Prefix: "foo", Type: "service"}, "foo@.service", true, false},
		{Name{Full: "foo@bar.service", Stem: "foo@bar", Prefix: "foo", Instance: "bar", Type: "service"}, "foo@.service", false, true},
		{Name{Full: "foo@bar@baz.service", Stem: "foo@bar@baz", Prefix: "foo", Instance: "bar@baz", Type: "service"}, "foo@.service", false, true},
		{Name{Full: "foo.1@.service", Stem: "foo.1@", Prefix: "foo.1", Type: "service"}, "foo.1@.service", true, false},
		{Name{Full: "foo.1@2.socket", Stem: "foo.1@2", Prefix: "foo.1", Instance: "2", Type: "socket"}, "foo.1@.socket", false, true},
	} {
		got, ok := SplitName(tc.Full)
		if diff := cmp.Diff(tc.Name, got, cmpopts.IgnoreUnexported(Name{})); !ok || diff != "" {
			t.Error(ok, diff)
		}
		if got.Template() != tc.template || got.IsTemplate() != tc.isTemplate || got.IsInstance() != tc.isInst {
			t.Errorf("%s: %q, %t, %t", tc.Full, got.Template(), got.IsTemplate(), got.IsInstance())
		}
	}
	for _, name := range []string{"", "foo", "bar@baz"} {
		if n, ok := SplitName(name); ok || n.Full != name || n.Expand("%n%i") != "%n%i" {
			t.Errorf("%q: %+v", name, n)
		}
	}
}

func TestExpand(t *testing.T) {
	n, _ := SplitName("web.x@a@1.service")
	for s, want := range map[string]string{
		"plain":       "plain",
		"%n %N %p %i": "web.x@a@1.service web.x@a@1 web.x a@1",
		"%i%i":        "a@1a@1",
		"%%i":         "%a@1",
		"%H %m %":     "%H %m %",
	} {
		if got := n.Expand(s); got != want {
			t.Errorf("%s: %s, want %s", s, got, want)
		}
	}
	n, _ = SplitName("web.service")
	if got := n.Expand("%n %N %p [%i]"); got != "web.service web web []" {
		t.Error(got)
	}
}
