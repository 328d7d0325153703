package unit

import (
	"crypto/sha1"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"
)

// opts are section, name and value, three by three.
func opts(words ...string) []Option {
	var all []Option
	for i := 0; i < len(words); i += 3 {
		all = append(all, Option{Section: words[i], Name: words[i+1], Value: words[i+2]})
	}
	return all
}

func bare(options []Option) []Option {
	var all []Option
	for _, o := range options {
		o.Line = 0
		all = append(all, o)
	}
	return all
}

func TestParse(t *testing.T) {
	for _, tc := range []struct {
		name, text string
		want       []Option
		serialized string
	}{
		{"nothing", "", nil, ""},
		{"a section without options", "[Unit]\n", nil, ""},
		{"one option", "[Service]\nExecStart=/bin/sleep 100\n", opts("Service", "ExecStart", "/bin/sleep 100"), "[Service]\nExecStart=/bin/sleep 100\n"},
		{"no newline at the end", "[S]\nA=b", opts("S", "A", "b"), "[S]\nA=b\n"},
		{"white space around names and values", "  [S]  \n\t A\t= b c \t\n", opts("S", "A", "b c"), "[S]\nA=b c\n"},
		{"an equals sign in the value", "[S]\nEnvironment=A=b\n", opts("S", "Environment", "A=b"), "[S]\nEnvironment=A=b\n"},
		{"text before the first section", "hello\nA=b\n\ufeff[S]\nA=c\n", opts("S", "A", "c"), "[S]\nA=c\n"},
		{"a section behind text", "hello [S]\nA=b\n", opts("S", "A", "b"), "[S]\nA=b\n"},
		{"a section in a comment before the first", "hello # [X]\n[S]\nA=b\n", opts("S", "A", "b"), "[S]\nA=b\n"},
		{"comments", "# c\n; c\n[S]\n  # c\nA=b # no comment\n;c\n", opts("S", "A", "b # no comment"), "[S]\nA=b # no comment\n"},
		{"a continued comment", "[S]\n# c \\\nA=b\n# c\\ \nB=c\nC=d\n", opts("S", "C", "d"), "[S]\nC=d\n"},
		{"a comment whose backslash is far from its end", "[S]\n# c\\  \nA=b\n", opts("S", "A", "b"), "[S]\nA=b\n"},
		{"repeated and empty options", "[S]\nA=1\nA=\nA=2\n", opts("S", "A", "1", "S", "A", "", "S", "A", "2"), "[S]\nA=1\nA=\nA=2\n"},
		{"sections in turns", "[B]\nx=1\n[A]\ny=2\n[B]\nz=3\n", opts("B", "x", "1", "A", "y", "2", "B", "z", "3"), "[B]\nx=1\nz=3\n\n[A]\ny=2\n"},
		{"a continued value", "[S]\nE=/bin/sh \\\n  -c \\\n  x\nF=1\n", opts("S", "E", "/bin/sh \\\n  -c \\\n  x", "S", "F", "1"), "[S]\nE=/bin/sh \\\n  -c \\\n  x\nF=1\n"},
		{"a comment in a continued value stays", "[S]\nE=a\\\n#b\\\nc\n", opts("S", "E", "a\\\n#b\\\nc"), "[S]\nE=a\\\n#b\\\nc\n"},
		{"a blank line ends a continued value", "[S]\nE=a \\\n \nF=1\n", opts("S", "E", "a \\\n", "S", "F", "1"), "[S]\nE=a \\\n\nF=1\n"},
		{"two backslashes continue, too", "[S]\nE=a\\\\\nb\n", opts("S", "E", "a\\\\\nb"), "[S]\nE=a\\\\\nb\n"},
		{"a backslash at the very end", "[S]\nE=a \\", opts("S", "E", "a \\\n"), "[S]\nE=a \\\n\n"},
		{"a value that starts on the next line", "[S]\nE=\\\n a\n", opts("S", "E", "\\\n a"), "[S]\nE=\\\n a\n"},
		{"carriage returns", "[S]\r\nA=b\r\n\r\nB=c\r\n", opts("S", "A", "b", "S", "B", "c"), "[S]\nA=b\nB=c\n"},
		{"quotes mean nothing", "[S]\nE=\"a\" 'b\n", opts("S", "E", "\"a\" 'b"), "[S]\nE=\"a\" 'b\n"},
		{"any name will do", "[S]\n<<<=bar\n=x\n", opts("S", "<<<", "bar", "S", "", "x"), "[S]\n<<<=bar\n=x\n"},
		{"a long line", "[S]\nA=" + strings.Repeat("x", MaxLine-2) + "\n", opts("S", "A", strings.Repeat("x", MaxLine-2)), "[S]\nA=" + strings.Repeat("x", MaxLine-2) + "\n"},
	} {
		f, err := Parse(tc.text)
		if err != nil {
			t.Errorf("%s: %v", tc.name, err)
			continue
		}
		if diff := cmp.Diff(tc.want, bare(f.Options)); diff != "" {
			t.Errorf("%s: %s", tc.name, diff)
		}
		if f.Text != tc.text {
			t.Errorf("%s: the text changed", tc.name)
		}
		if got := f.Serialize(); got != tc.serialized {
			t.Errorf("%s: serialized %q, want %q", tc.name, got, tc.serialized)
		}
		if got, want := f.Hash().String(), fmt.Sprintf("%x", sha1.Sum([]byte(tc.serialized))); got != want {
			t.Errorf("%s: hash %s, want %s", tc.name, got, want)
		}
	}
}

func TestParseRefuses(t *testing.T) {
	for _, tc := range []struct {
		text, reason string
		line         int
	}{
		{"[S]\nA=b\n[T\nB=c]\n", "unable to find end of section [T", 3},
		{"\n[S] x\n", "found garbage after section name S: x", 2},
		{"[S]\nnonsense\n", "unexpected newline encountered while parsing option name nonsense", 2},
		{"[S]\nA", "unexpected newline encountered while parsing option name A", 2},
		{"[S]\nA\rB=c\n", `unexpected newline encountered while parsing option name "A\rB=c"`, 2},
		{"[S]\nA=" + strings.Repeat("x", MaxLine-1) + "\n", "line too long (max 1048576 bytes)", 2},
		{"[S]\nA=b \\\n c \\ \nB=c\n", "white space follows the backslash at the end of the line, so that the next line may or may not belong to it", 3},
		{"[S]\r\nA=b \\\r\n c\r\n", "white space follows the backslash at the end of the line, so that the next line may or may not belong to it", 2},
		{"[S]\n\n# a\x00b\n", "there is a NUL byte, which ends a line for systemd", 3},
		{"[S]\nA=\xff\n", "the line is not UTF-8", 2},
		{"[\xff]\n", "the section name is not UTF-8", 1},
	} {
		_, err := Parse(tc.text)
		var p Problem
		if !errors.As(err, &p) || p.Reason != tc.reason || p.Line != tc.line || p.Remedy == "" || p.Warning {
			t.Errorf("%q: %+v, want line %d: %s", tc.text[:min(len(tc.text), 30)], err, tc.line, tc.reason)
		}
	}
}

func TestLines(t *testing.T) {
	f, err := Parse("# c \\\n c\n[S]\nA=1 \\\n2\n\nB=3\n")
	if err != nil {
		t.Fatal(err)
	}
	if f.Options[0].Line != 4 || f.Options[1].Line != 7 {
		t.Errorf("%+v", f.Options)
	}
}

// The value is that of fleet itself.
func TestHash(t *testing.T) {
	const want = "1c6fb6f3684bafb0c173d8b8b957ceff031180c1"
	for _, text := range []string{
		"[Service]\nExecStart=/bin/sleep 100\n",
		"# a comment\n\n[Service]\r\n  ExecStart = /bin/sleep 100  \r\n[Service]",
	} {
		f, err := Parse(text)
		if err != nil {
			t.Fatal(err)
		}
		if h := f.Hash(); h.String() != want {
			t.Errorf("%q: %s", text, h)
		}
	}
	f, err := New(opts("Service", "ExecStart", "/bin/sleep 100"))
	if err != nil || f.Hash().String() != want {
		t.Error(f, err)
	}
}

func TestNew(t *testing.T) {
	f, err := New(opts("B", "x", " 1 ", "A", "y", "2", "B", "z", "3 \\\n4"))
	if err != nil {
		t.Fatal(err)
	}
	want := []Option{{"B", "x", "1", 2}, {"B", "z", "3 \\\n4", 3}, {"A", "y", "2", 7}}
	if diff := cmp.Diff(want, f.Options); diff != "" {
		t.Error(diff)
	}
	if f.Text != "[B]\nx= 1 \nz=3 \\\n4\n\n[A]\ny=2\n" {
		t.Errorf("%q", f.Text)
	}
	for _, bad := range [][]Option{
		opts("S", "A", "b\nB=c"),
		opts("S", "A", "b\n[X-Fleet]\nGlobal=yes", "S", "B", "c"),
		opts("S", "A", "b \\", "S", "B", "c"),
		opts("S", "A=", "b"),
		opts("S", "#A", "b"),
		opts("S", "A\nB", "b"),
		opts("S]\n[T", "A", "b"),
		opts("S\nT", "A", "b"),
		opts("", "[A]", "b"),
		opts("S", "A", "b\x00c"),
		opts("S", "A", strings.Repeat("x", MaxLine)),
	} {
		var p Problem
		if f, err := New(bad); !errors.As(err, &p) || p.Remedy == "" {
			t.Errorf("%+v: %+v, %v", bad, f, err)
		}
	}
}

// What New accepts is what it was given, up to white space and the order of
// sections.
func TestNewKeepsOptions(t *testing.T) {
	word := rapid.StringOfN(rapid.RuneFrom([]rune("ab=[]#;\\\n\r \t\"%")), 0, 6, -1)
	option := rapid.Custom(func(t *rapid.T) Option {
		return Option{Section: word.Draw(t, "section"), Name: word.Draw(t, "name"), Value: word.Draw(t, "value")}
	})
	rapid.Check(t, func(t *rapid.T) {
		given := rapid.SliceOfN(option, 0, 4).Draw(t, "options")
		f, err := New(given)
		if err != nil {
			return
		}
		want := grouped(given)
		for i := range want {
			want[i].Name, want[i].Value = strings.TrimSpace(want[i].Name), strings.TrimSpace(want[i].Value)
		}
		got := bare(f.Options)
		for i := range got {
			got[i].Value = strings.TrimSpace(got[i].Value)
		}
		if len(want)+len(got) > 0 && !cmp.Equal(want, got) {
			t.Fatal(cmp.Diff(want, got))
		}
	})
}

func FuzzParse(f *testing.F) {
	for _, seed := range []string{
		"[Service]\nExecStart=/bin/sleep 100\n", "a[S]\n#c\\\nA=b \\\n c\n\n[T]\nB=\\\n[S]\nC=d\\", "[S]\r\nA=b\\ \r\n", "\ufeff[]\n=\n",
		"[X-Fleet]\nGlobal=yes\nWhere=a in (b, 'c') && not (d < 5)\nMachineMetadata=\"a=b\" \"c=%i\"\nConflicts=[a\nMemoryReserve=1.5G\nMachineOf=a.service",
	} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, text string) {
		if err := stable(text); err != nil {
			t.Fatal(err)
		}
	})
}

// The same with text that is more like unit files than the fuzzer's.
func TestParseIsStable(t *testing.T) {
	pieces := rapid.SliceOfN(rapid.SampledFrom([]string{"[S]", "[T]", "[X-Fleet]", "A", "=", "b", " ", "\n", "\n", "\\\n", "\\", "\r", "#", ";", "]", "\u00a0", "\ufeff",
		"\nA=", "\nB=", "Global=yes", "Conflicts=", "Where=", "\"", "%i", "(", "and"}), 0, 20)
	rapid.Check(t, func(t *rapid.T) {
		text := strings.Join(pieces.Draw(t, "pieces"), "")
		if err := stable(text); err != nil {
			t.Fatalf("%q: %v", text, err)
		}
	})
}

// stable returns how text breaks the promise that a file read back from its
// serialized form is the same, and every problem has a line and a remedy.
func stable(text string) error {
	first, err := Parse(text)
	if err != nil {
		var p Problem
		if !errors.As(err, &p) || p.Line < 1 || p.Reason == "" || p.Remedy == "" {
			return fmt.Errorf("incomplete: %#v", err)
		}
		return nil
	}
	serialized := first.Serialize()
	second, err := Parse(serialized)
	if err != nil {
		return fmt.Errorf("%q does not parse: %w", serialized, err)
	}
	if want, got := bare(grouped(first.Options)), bare(second.Options); !cmp.Equal(want, got) {
		return errors.New(cmp.Diff(want, got))
	}
	if second.Serialize() != serialized || second.Hash() != first.Hash() {
		return fmt.Errorf("%q serializes to %q", serialized, second.Serialize())
	}
	for _, name := range []string{"a@1.service", "a@.service", "a"} {
		n, _ := SplitName(name)
		_, problems := first.Check(n)
		for _, p := range problems {
			if p.Line < 1 || p.Reason == "" || p.Remedy == "" {
				return fmt.Errorf("incomplete: %+v", p)
			}
		}
	}
	return nil
}
