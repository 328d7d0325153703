package catalog

import (
	"fmt"
	"hash/fnv"
	"strconv"
	"strings"

	"flotilla/internal/text"
)

// shownLength is the longest name of an invalid service that stays as it is.
const shownLength = 80

// printable reports whether s is printable ASCII.
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

// shellWord quotes s so that it can be pasted into bash or zsh, even if it holds
// control characters.
func shellWord(s string) string {
	if printable(s) {
		return text.ShellQuote(s)
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
