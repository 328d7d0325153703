package cli

import (
	"fmt"
	"os"
	"path"
	"slices"
	"strconv"
	"strings"

	"flotilla/internal/unit"
)

// unitName returns the name of the unit that an argument means, and the file in
// which it would be: web means web.service, and so does some/where/web.service.
func unitName(arg string) (name, file string) {
	if unit.CheckName(path.Base(arg)) == nil {
		return path.Base(arg), arg
	}
	name = unit.FromArgument(arg)
	return name, path.Join(path.Dir(arg), name)
}

// isPattern reports whether arg is to be matched with names that exist.
func isPattern(arg string) bool { return strings.ContainsAny(arg, "*?[") }

// mostExpanded bounds what one argument may stand for.
const mostExpanded = 10000

// expandAll expands the braces of all arguments, as a shell does, and drops
// repeated ones. An argument that is the name of a file stays as it is.
func expandAll(args []string) ([]string, error) {
	var all []string
	seen := map[string]bool{}
	for _, arg := range args {
		list := []string{arg}
		if _, err := os.Stat(arg); err != nil {
			if list, err = braces(arg); err != nil {
				return nil, err
			}
		}
		for _, a := range list {
			if !seen[a] {
				seen[a] = true
				all = append(all, a)
			}
		}
	}
	return all, nil
}

// braces returns what text stands for: web@{1..3} for three names, a{b,c} for
// two, one group after the other and one in the other. Braces without a comma or
// a range stand for themselves.
func braces(text string) ([]string, error) {
	open, end, parts := group1(text)
	if open < 0 {
		return []string{text}, nil
	}
	tails, err := braces(text[end:])
	if err != nil {
		return nil, err
	}
	var all []string
	for _, part := range parts {
		heads, err := braces(part)
		if err != nil {
			return nil, err
		}
		for _, head := range heads {
			for _, tail := range tails {
				all = append(all, text[:open]+head+tail)
			}
		}
		if len(all) > mostExpanded {
			return nil, Usage(fmt.Sprintf("%q stands for more than %d names", text, mostExpanded), "give fewer at a time")
		}
	}
	return all, nil
}

// group1 finds the first group of braces that stands for something: text[open:end]
// for parts. open is -1 if there is none.
func group1(text string) (open, end int, parts []string) {
	for open = 0; open < len(text); open++ {
		if text[open] != '{' {
			continue
		}
		depth, from := 0, open+1
		parts = nil
		for i := open; i < len(text); i++ {
			switch text[i] {
			case '{':
				depth++
			case '}':
				depth--
			case ',':
				if depth == 1 {
					parts = append(parts, text[from:i])
					from = i + 1
				}
			}
			if depth > 0 {
				continue
			}
			if parts != nil {
				return open, i + 1, append(parts, text[from:i])
			}
			if parts = numbers(text[open+1 : i]); parts != nil {
				return open, i + 1, parts
			}
			break
		}
	}
	return -1, 0, nil
}

// numbers returns the numbers of FIRST..LAST, with zeros before them if one of
// the two has any; nil if text is no range. Too long a range is cut just above
// what is allowed.
func numbers(text string) []string {
	first, last, ok := strings.Cut(text, "..")
	if !ok {
		return nil
	}
	from, err1 := strconv.ParseUint(first, 10, 31)
	to, err2 := strconv.ParseUint(last, 10, 31)
	if err1 != nil || err2 != nil {
		return nil
	}
	width := 0
	if len(first) > 1 && first[0] == '0' || len(last) > 1 && last[0] == '0' {
		width = max(len(first), len(last))
	}
	low, high := min(from, to), max(from, to)
	var list []string
	for n := low; n <= high && len(list) <= mostExpanded; n++ {
		list = append(list, fmt.Sprintf("%0*d", width, n))
	}
	if from > to {
		slices.Reverse(list)
	}
	return list
}

// existing returns the names that args mean among the units there are: names as
// they are, patterns for all that match. missing are those that mean none.
func existing(args []string, units map[string]unitView) (names, missing []string, err error) {
	seen := map[string]bool{}
	add := func(name string) {
		if !seen[name] {
			seen[name] = true
			names = append(names, name)
		}
	}
	for _, arg := range args {
		if !isPattern(arg) {
			name, _ := unitName(arg)
			if _, ok := units[name]; ok {
				add(name)
			} else {
				missing = append(missing, name)
			}
			continue
		}
		if _, err := path.Match(arg, ""); err != nil {
			return nil, nil, Usage(fmt.Sprintf("%q is not a pattern", arg), "* stands for any text, ? for one character, [ab] for one of them")
		}
		found := false
		for _, u := range sortedUnits(units) {
			if matches(arg, u.Name) {
				add(u.Name)
				found = true
			}
		}
		if !found {
			missing = append(missing, arg)
		}
	}
	return names, missing, nil
}

// matches reports whether a pattern means a unit; the type may be left out for
// services.
func matches(pattern, name string) bool {
	if ok, err := path.Match(pattern, name); err != nil || ok {
		return ok
	}
	ok, _ := path.Match(pattern+".service", name) // the pattern was good just now
	return ok
}
