package text

import (
	"os/exec"
	"strings"
	"testing"
	"unicode"
)

func TestShow(t *testing.T) {
	for in, want := range map[string]string{
		"web":                    "web",
		"größe":                  "größe",
		"a\nb":                   `"a\nb"`,
		"\x1b[31mred":            `"\x1b[31mred"`,
		"\xff":                   `"\xff"`,
		strings.Repeat("x", 100): strings.Repeat("x", 77) + "...",
	} {
		if got := Show(in); got != want {
			t.Errorf("Show(%q) = %q, want %q", in, got, want)
		}
	}
}

func FuzzShow(f *testing.F) {
	f.Add("a\x00b")
	f.Add(strings.Repeat("\u202e", 200))
	f.Fuzz(func(t *testing.T, s string) {
		got := Show(s)
		if strings.ContainsFunc(got, func(r rune) bool { return !unicode.IsPrint(r) }) {
			t.Errorf("Show(%q) = %q is not printable", s, got)
		}
	})
}

// A real shell reads what is quoted as one word, unchanged.
func TestShellQuote(t *testing.T) {
	for _, s := range []string{"", "plain", "two words", "it's", `"$HOME" \ *`, "a\nb", "größe", "~"} {
		out, err := exec.Command("sh", "-c", "printf %s "+ShellQuote(s)+"; printf .").Output()
		if err != nil || string(out) != s+"." {
			t.Errorf("the shell read %q, %v from %s, want %q", out, err, ShellQuote(s), s)
		}
	}
}

func TestNearest(t *testing.T) {
	words := []string{"Conflicts", "MachineOf", "Global"}
	for in, want := range map[string]string{"conflict": "Conflicts", "Glob": "Global", "machineof": "MachineOf", "x": "", "somethingquitelong": ""} {
		if got := Nearest(in, words); got != want {
			t.Errorf("Nearest(%q) = %q, want %q", in, got, want)
		}
	}
}

func TestCount(t *testing.T) {
	for n, want := range map[int]string{0: "0 machines", 1: "1 machine", 2: "2 machines"} {
		if got := Count(n, "machine"); got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	}
}
