// Package text is about strings that people read and type: made printable,
// quoted for a shell, counted, corrected. It knows nothing of what they mean.
package text

import (
	"fmt"
	"strconv"
	"strings"
	"unicode"
)

// shownLength is how many characters of a foreign string a person gets to see.
const shownLength = 80

// Show makes a string that may come from anybody fit for a terminal, a log or a
// page: one line of at most 80 characters, quoted as in Go if any of them cannot
// be printed.
func Show(s string) string {
	cut := s
	if len(s) > shownLength {
		if runes := []rune(s[:min(len(s), 4*shownLength)]); len(runes) > shownLength {
			cut = string(runes[:shownLength-3]) + "..."
		}
	}
	return Printable(cut)
}

// Printable returns s as it is if it is one printable line, else quoted as in Go.
func Printable(s string) string {
	if strings.ContainsFunc(s, func(r rune) bool { return !unicode.IsPrint(r) || r == unicode.ReplacementChar }) {
		return strconv.Quote(s)
	}
	return s
}

// ShellQuote writes s so that a POSIX shell reads it as one word.
func ShellQuote(s string) string {
	unsafe := func(r rune) bool {
		return !(r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || strings.ContainsRune("@%+=:,./-_", r))
	}
	if s != "" && !strings.ContainsFunc(s, unsafe) {
		return s
	}
	return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'"
}

// Count returns n and the noun, in the plural if there is not exactly one: "3 machines".
func Count(n int, noun string) string {
	if n == 1 {
		return "1 " + noun
	}
	return fmt.Sprintf("%d %ss", n, noun)
}

// Nearest returns the one of the words that was probably meant by an unknown
// word, whatever its case: the first with the fewest letters to change, and at
// most two. It returns "" if there is none.
func Nearest(word string, words []string) string {
	best, distance := "", 3
	for _, w := range words {
		if d := editDistance(strings.ToLower(word), strings.ToLower(w)); d < distance {
			best, distance = w, d
		}
	}
	return best
}

// editDistance is how many letters have to be changed, added or left out to turn
// a into b. A word much longer than b is as far as can be.
func editDistance(a, b string) int {
	if len(a) > len(b)+3 {
		return len(a)
	}
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := diagonal
			if a[i] != b[j] {
				cost++
			}
			diagonal = row[j+1]
			row[j+1] = min(cost, row[j]+1, row[j+1]+1)
		}
	}
	return row[len(b)]
}
