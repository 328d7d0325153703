package unit

import (
	"errors"
	"fmt"
	"strconv"
	"strings"
	"unicode"
)

// Problem is one thing that is wrong with a unit file: where it is, what is
// wrong and what to do about it.
type Problem struct {
	Line    int    `json:"line,omitempty"`    // in the file, from 1
	Key     string `json:"key,omitempty"`     // the option, "" if the problem is not about one
	Value   string `json:"value,omitempty"`   // what it holds, shortened, quoted if it is not printable
	Reason  string `json:"reason"`            // what is wrong
	Remedy  string `json:"remedy,omitempty"`  // what to do about it
	Warning bool   `json:"warning,omitempty"` // the unit is accepted all the same
}

// Error gives the problem as one line.
func (p Problem) Error() string {
	var b strings.Builder
	if p.Line > 0 {
		fmt.Fprintf(&b, "line %d: ", p.Line)
	}
	if p.Key != "" {
		fmt.Fprintf(&b, "%s=%s: ", p.Key, p.Value)
	}
	return b.String() + p.Reason + "; " + p.Remedy
}

// Refusal joins the problems for which a unit must be refused, in their order.
// It is nil if there are only warnings. Each problem is found by errors.As.
func Refusal(problems []Problem) error {
	var refused []error
	for _, p := range problems {
		if !p.Warning {
			refused = append(refused, p)
		}
	}
	return errors.Join(refused...)
}

// problem is a Problem with o.
func (o *Option) problem(reason, remedy string) Problem {
	return Problem{Line: o.Line, Key: show(o.Name), Value: show(o.Value), Reason: reason, Remedy: remedy}
}

// show makes s fit for one line of text: at most 80 characters, quoted if it
// has any that are not printable.
func show(s string) string {
	const limit = 80
	cut := s
	if runes := []rune(s[:min(len(s), 4*limit+4)]); len(runes) > limit {
		cut = string(runes[:limit-3]) + "..."
	}
	if strings.ContainsFunc(cut, func(r rune) bool { return !unicode.IsPrint(r) || r == unicode.ReplacementChar }) {
		return strconv.Quote(cut)
	}
	return cut
}
