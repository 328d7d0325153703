package unit

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"
)

// parse reads an expression of a unit that is not a template and has no specifiers.
func parse(source string) (*Expr, error) {
	return parseExpr(source, func(s string) string { return s }, false)
}

func TestExpr(t *testing.T) {
	machine := map[string]string{"zone": "a", "disk": "ssd", "cores": "8", "load": "0.5", "temp": "-3", "note": "two words", "empty": "", "in": "x"}
	for text, want := range map[string]bool{
		`zone = a`:                       true,
		`zone == a`:                      true,
		`zone=b`:                         false,
		`zone != b`:                      true,
		`zone!=a`:                        false,
		`ZONE = a`:                       false, // keys are as written
		`zone in (a, b)`:                 true,
		`zone in (b)`:                    false,
		`zone not in (b,c)`:              true,
		`not zone in (a)`:                false,
		`cores = 8`:                      true,
		`cores = 8.0`:                    false, // = compares text
		`cores < 10`:                     true,  // as numbers
		`cores <= 8`:                     true,
		`cores > 8`:                      false,
		`cores >= 8.0`:                   true,
		`load < 0.75 and temp > -4`:      true,
		`zone < 5`:                       false, // not a number
		`zone >= 5`:                      false,
		`gone < 5`:                       false, // no such key
		`gone = x`:                       false,
		`gone != x`:                      true,
		`gone = ""`:                      true,
		`empty = ''`:                     true,
		`disk != ""`:                     true,
		`gone in (x, "")`:                true,
		`note = "two words"`:             true,
		`"note" = 'two words'`:           true,
		`"in" = x`:                       true,
		`zone = a and disk = hdd`:        false,
		`zone = a && disk = ssd`:         true,
		`zone = b or disk = ssd`:         true,
		`zone = b || disk = hdd`:         false,
		`zone = a OR zone = b AND x=y`:   true, // and binds tighter
		`(zone = a or zone = b) and x=y`: false,
		`not zone = b and disk = ssd`:    true,
		`not (zone = a and disk=ssd)`:    false,
		`!(zone = b) && !disk = hdd`:     true,
		`not not zone = a`:               true,
		"zone = a and \\\n  disk = ssd":  true,
		"zone = a\\\nand disk = ssd":     true,
		"zone = a\tand\ndisk = ssd":      true,
		`zone in(a)and(disk=ssd)`:        true,
	} {
		e, err := parse(text)
		if err != nil {
			t.Errorf("%s: %v", text, err)
			continue
		}
		if got := e.Match(machine); got != want {
			t.Errorf("%s is %t", text, got)
		}
		if e.String() != text {
			t.Errorf("%s became %s", text, e)
		}
	}
}

func TestExprRefuses(t *testing.T) {
	for text, want := range map[string]string{
		``:                         "column 1: expected a metadata key instead of the end",
		`zone`:                     "column 5: expected an operator after the key zone instead of the end",
		`"zone = a"`:               "column 11: expected an operator after the key zone = a instead of the end",
		`zone a`:                   "column 6: expected an operator after the key zone instead of a",
		`zone ! a`:                 "column 6: expected an operator after the key zone instead of !",
		`zone =`:                   "column 7: expected a value instead of the end",
		`zone = =`:                 "column 8: expected a value instead of =",
		`zone = a b`:               "column 10: expected and, or, or the end instead of b",
		`zone = a = b`:             "column 10: expected and, or, or the end instead of =",
		`zone = a and`:             "column 13: expected a metadata key instead of the end",
		`and zone = a`:             "column 1: expected a metadata key instead of and",
		`zone = a & disk = b`:      "column 10: a single &",
		`zone = a |`:               "column 10: a single |",
		`zone = "a`:                "column 8: the quote is not closed",
		`zone = ä and "ö`:          "column 14: the quote is not closed",
		`(zone = a`:                "column 10: expected ) instead of the end",
		`zone = a)`:                "column 9: expected and, or, or the end instead of )",
		`zone in a`:                "column 9: expected ( instead of a",
		`zone in ()`:               "column 10: expected a value instead of )",
		`zone in (a b)`:            "column 12: expected ) instead of b",
		`zone in (a,)`:             "column 12: expected a value instead of )",
		`zone not = a`:             "column 10: expected in instead of =",
		`cores > many`:             "column 9: > compares numbers, and many is not one",
		`cores < 1e3`:              "column 9: < compares numbers, and 1e3 is not one",
		`cores < "0x1"`:            `column 9: < compares numbers, and "0x1" is not one`,
		`cores < %i`:               "column 9: < compares numbers, and %i is not one",
		`"" = a`:                   "column 1: the metadata key is empty",
		strings.Repeat("(", 1<<19): "column 102: nested deeper than 100",
		strings.Repeat("!", 1<<19): "column 102: nested deeper than 100",
	} {
		e, err := parse(text)
		var bad Problem
		if !errors.As(err, &bad) {
			t.Errorf("%.80s: %v, %v", text, e, err)
			continue
		}
		if got := strings.Replace(bad.Reason, " of the expression", "", 1); got != want || bad.Remedy == "" {
			t.Errorf("%.80s: %s, want %s", text, err, want)
		}
	}
}

// A long chain costs no stack.
func TestExprLong(t *testing.T) {
	e, err := parse("a=1" + strings.Repeat(" or a=2 and b=3", 50_000))
	if err != nil || !e.Match(map[string]string{"a": "1"}) {
		t.Error(err)
	}
	if keys := e.Keys(); !slices.Equal(keys, []string{"a", "b"}) {
		t.Error(keys)
	}
}

// A random expression, written in random spelling, means what it was made to
// mean.
func TestExprMeansWhatItSays(t *testing.T) {
	type meaning func(map[string]string) bool
	word := rapid.SampledFrom([]string{"a", "b", "1", "2.5", "-1", "10", ""})
	key := rapid.SampledFrom([]string{"k", "l", "m"})
	rapid.Check(t, func(t *rapid.T) {
		pick := func(of ...string) string { return rapid.SampledFrom(of).Draw(t, "pick") }
		quote := func(s string) string {
			if s != "" && rapid.Bool().Draw(t, "bare") {
				return s
			}
			q := pick(`"`, `'`)
			return q + s + q
		}
		var make func(depth int) (string, meaning)
		make = func(depth int) (string, meaning) {
			kind := rapid.IntRange(0, 6).Draw(t, "kind")
			if depth == 0 {
				kind %= 4
			}
			k, v, w := key.Draw(t, "key"), word.Draw(t, "value"), word.Draw(t, "value")
			switch kind {
			case 0:
				return k + pick("=", " = ", "==") + quote(v), func(m map[string]string) bool { return m[k] == v }
			case 1:
				return k + pick("!=", " != ") + quote(v), func(m map[string]string) bool { return m[k] != v }
			case 2:
				not := rapid.Bool().Draw(t, "not")
				op := map[bool]string{false: pick(" in (", " IN("), true: " not in ("}[not]
				return k + op + quote(v) + pick(",", " , ") + quote(w) + ")", func(m map[string]string) bool { return (m[k] == v || m[k] == w) != not }
			case 3:
				x := rapid.Float64Range(-3, 12).Draw(t, "number")
				op := pick("<", "<=", ">", ">=")
				return fmt.Sprintf("%s%s%f", k, op, x), func(m map[string]string) bool {
					var has, limit float64
					if n, _ := fmt.Sscanf(m[k], "%g", &has); n != 1 {
						return false
					}
					_, _ = fmt.Sscanf(fmt.Sprintf("%f", x), "%g", &limit)
					return map[string]bool{"<": has < limit, "<=": has <= limit, ">": has > limit, ">=": has >= limit}[op]
				}
			case 4:
				s, a := make(depth - 1)
				return pick("not (", "! (", "NOT(") + s + ")", func(m map[string]string) bool { return !a(m) }
			}
			l, a := make(depth - 1)
			r, b := make(depth - 1)
			if kind == 5 {
				return "(" + l + ")" + pick("and", "&&", " AND ") + "(" + r + ")", func(m map[string]string) bool { return a(m) && b(m) }
			}
			return "(" + l + ")" + pick("or", "||", " Or ") + "(" + r + ")", func(m map[string]string) bool { return a(m) || b(m) }
		}
		text, means := make(3)
		e, err := parse(text)
		if err != nil {
			t.Fatalf("%s: %v", text, err)
		}
		machine := rapid.MapOf(key, word).Draw(t, "machine")
		if e.Match(machine) != means(machine) {
			t.Fatalf("%s with %v", text, machine)
		}
	})
}

func FuzzExpr(f *testing.F) {
	f.Add("zone in (a, 'b') && not (cores < 8 or \"x\" != %i)")
	f.Add("a = \\\n b||(c>=1)")
	f.Fuzz(func(t *testing.T, text string) {
		e, err := parse(text)
		if err == nil {
			// Only what Keys names counts.
			machine := map[string]string{"a": "1", "zone": "a", "cores": "9"}
			matched := e.Match(machine)
			maps.DeleteFunc(machine, func(key, _ string) bool { return !slices.Contains(e.Keys(), key) })
			if e.String() != text || e.Match(machine) != matched {
				t.Fatalf("%q: %t for a machine with %v", e, !matched, machine)
			}
			return
		}
		var bad Problem
		var column int
		if errors.As(err, &bad) {
			_, _ = fmt.Sscanf(bad.Reason, "column %d of the expression: ", &column) // 0 if it does not say
		}
		if column < 1 || column > len([]rune(text))+1 || bad.Remedy == "" {
			t.Fatalf("%#v", err)
		}
	})
}
