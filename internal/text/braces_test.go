package text

import (
	"strings"
	"testing"
)

func TestBraces(t *testing.T) {
	for _, tc := range []struct{ in, want string }{
		{"web.service", "web.service"},
		{"web@{1..3}.service", "web@1.service web@2.service web@3.service"},
		{"web@{3..1}", "web@3 web@2 web@1"},
		{"web@{08..10}", "web@08 web@09 web@10"},
		{"{a,b}@{1..2}", "a@1 a@2 b@1 b@2"},
		{"web@{a,{1..2},c}", "web@a web@1 web@2 web@c"},
		{"web@{a,}", "web@a web@"},
		{"web@{a}", "web@{a}"},
		{"web@{1..}", "web@{1..}"},
		{"web@{", "web@{"},
		{"}{", "}{"},
		{"x{1..2}{", "x1{ x2{"},
		{"{{1..2}", "{1 {2"},
		{"{1..1}", "1"},
	} {
		got, ok := Braces(tc.in, 10000)
		if !ok || strings.Join(got, " ") != tc.want {
			t.Errorf("%s: %q, %v, want %s", tc.in, got, ok, tc.want)
		}
	}
	for _, in := range []string{"{1..20000}", "{1..2000000000}", strings.Repeat("{1..100}", 40)} {
		if got, ok := Braces(in, 10000); ok {
			t.Errorf("%s stands for %d names", in, len(got))
		}
	}
}

func FuzzBraces(f *testing.F) {
	for _, s := range []string{"web@{1..3}", "{a,{b,c}}", "{{{,}", "{1..99999}"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		if len(s) > 200 {
			return
		}
		list, ok := Braces(s, 1000)
		if ok && (len(list) == 0 || len(list) > 1000) {
			t.Errorf("%q stands for %d", s, len(list))
		}
		if !strings.ContainsRune(s, '{') && (len(list) != 1 || list[0] != s) {
			t.Errorf("%q stands for %q", s, list)
		}
	})
}
