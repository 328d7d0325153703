package text

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
)

// Braces returns what s stands for, as in a shell: web@{1..3} for three words, a{b,c}
// for two, one group after the other and one in the other. Braces without a comma or
// a range stand for themselves. ok is false if there are more than most.
func Braces(s string, most int) (words []string, ok bool) {
	open, end, parts := firstGroup(s, most)
	if open < 0 {
		return []string{s}, true
	}
	tails, ok := Braces(s[end:], most)
	for _, part := range parts {
		heads, few := Braces(part, most)
		if ok = ok && few && len(words)+len(heads)*len(tails) <= most; !ok {
			return nil, false
		}
		for _, head := range heads {
			for _, tail := range tails {
				words = append(words, s[:open]+head+tail)
			}
		}
	}
	return words, ok
}

// firstGroup finds the first group of braces that stands for something: s[open:end]
// for parts. open is -1 if there is none.
func firstGroup(s string, most int) (open, end int, parts []string) {
	for open = 0; open < len(s); open++ {
		if s[open] != '{' {
			continue
		}
		depth, from := 0, open+1
		parts = nil
		for i := open; i < len(s); i++ {
			switch s[i] {
			case '{':
				depth++
			case '}':
				depth--
			case ',':
				if depth == 1 {
					parts = append(parts, s[from:i])
					from = i + 1
				}
			}
			if depth > 0 {
				continue
			}
			if parts != nil {
				return open, i + 1, append(parts, s[from:i])
			}
			if parts = numbers(s[open+1:i], most); parts != nil {
				return open, i + 1, parts
			}
			break
		}
	}
	return -1, 0, nil
}

// numbers returns the numbers of FIRST..LAST, with zeros before them if one of
// the two has any; nil if s is no range. A range of more than most is cut
// behind the first that is too many.
func numbers(s string, most int) []string {
	first, last, ok := strings.Cut(s, "..")
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
	for n := low; n <= high && len(list) <= most; n++ {
		list = append(list, fmt.Sprintf("%0*d", width, n))
	}
	if from > to {
		slices.Reverse(list)
	}
	return list
}
