package catalog

import (
	"fmt"
	"hash/fnv"
	"strconv"
	"strings"
)

// shownLength is how many characters of a name or value a person gets to see.
const shownLength = 80

// Show makes any string fit for a terminal, a log or a page: printable ASCII, at
// most 80 characters, quoted as in Go if it was not printable.
func Show(s string) string {
	shown := s[:min(len(s), shownLength)]
	if !printable(shown) {
		shown = strconv.QuoteToASCII(shown)
	}
	if len(s) > shownLength || len(shown) > shownLength {
		return shown[:min(len(shown), shownLength-3)] + "..."
	}
	return shown
}

func printable(s string) bool {
	for i := range len(s) {
		if s[i] < ' ' || s[i] > '~' {
			return false
		}
	}
	return true
}

// safeName returns name itself if it is printable ASCII of at most limit bytes,
// and otherwise a printable stand-in that differs for different names.
func safeName(name string, limit int) string {
	if len(name) <= limit && printable(name) && !strings.Contains(name, `"`) {
		return name
	}
	quoted := strconv.QuoteToASCII(name[:min(len(name), shownLength)])
	if len(name) <= shownLength && len(quoted) <= shownLength {
		return quoted
	}
	sum := fnv.New64a()
	_, _ = sum.Write([]byte(name)) // never fails
	return fmt.Sprintf("%s...%016x", quoted[:shownLength-20], sum.Sum64())
}

// shellWord quotes s so that it can be pasted into bash or zsh.
func shellWord(s string) string {
	plain := s != ""
	for i := range len(s) {
		c := s[i]
		plain = plain && (isAlnum(c) || strings.IndexByte("/_.:-", c) >= 0)
	}
	switch {
	case plain:
		return s
	case printable(s):
		return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'"
	}
	var b strings.Builder
	b.WriteString("$'")
	for i := range len(s) {
		switch c := s[i]; {
		case c == '\'' || c == '\\':
			b.WriteByte('\\')
			b.WriteByte(c)
		case c < ' ' || c > '~':
			fmt.Fprintf(&b, `\x%02x`, c)
		default:
			b.WriteByte(c)
		}
	}
	b.WriteByte('\'')
	return b.String()
}

func isDigit(c byte) bool { return '0' <= c && c <= '9' }

func isAlnum(c byte) bool {
	return isDigit(c) || 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z'
}
