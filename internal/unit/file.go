// Package unit is what can be known of a systemd unit from its name and its
// file alone: the options and the hash that fleet computes of them, the parts
// of the name, and what [X-Fleet] asks of the machine that runs the unit. All
// functions are pure. It knows no systemd, no etcd, no machines and no
// placement.
package unit

import (
	"crypto/sha1"
	"encoding/hex"
	"fmt"
	"slices"
	"strings"
	"unicode"
	"unicode/utf8"

	"flotilla/internal/text"
)

// MaxLine is the length in bytes of the longest line of a unit file, as in
// systemd. The length of a whole file is not limited here.
const MaxLine = 1 << 20

// Option is one NAME=VALUE of a unit file.
type Option struct {
	Section string
	Name    string
	Value   string // white space trimmed; continuation lines kept, with the backslash and the newline between them
	Line    int    // on which it starts, from 1
}

// File is a unit file. It is immutable.
type File struct {
	Text    string   // as it was given, byte for byte
	Options []Option // in the order of the file

	warnings []Problem
}

// Parse reads a unit file as fleet does: comments are dropped, options keep
// their order, repetitions and empty values, and quotes mean nothing. Unlike
// fleet it refuses what fleet or systemd would go on to read as something
// else: NUL bytes, text that is not UTF-8, section names of several lines, and
// white space after a backslash that ends a line. The error is a Problem.
func Parse(text string) (*File, error) {
	n := 0
	for line := range strings.SplitSeq(text, "\n") {
		n++
		if len(line) > MaxLine {
			return nil, Problem{Line: n, Reason: fmt.Sprintf("line too long (max %d bytes)", MaxLine), Remedy: "split it into lines that end in a backslash"}
		}
		if strings.IndexByte(line, 0) >= 0 {
			return nil, Problem{Line: n, Reason: "there is a NUL byte, which ends a line for systemd", Remedy: "remove it"}
		}
	}
	f := &File{Text: text}
	s := &scanner{rest: text}
	section, inside := "", false
	for s.more() {
		line := s.next()
		if inside {
			line = strings.TrimLeftFunc(line, unicode.IsSpace)
		} else {
			line = f.preamble(line, s.line)
		}
		switch {
		case line == "":
		case line[0] == '#' || line[0] == ';':
			s.comment(line)
		case line[0] == '[':
			name, err := sectionName(line, s.line)
			if err != nil {
				return nil, err
			}
			section, inside = name, true
		default:
			o, err := s.option(line)
			if err != nil {
				return nil, err
			}
			o.Section = section
			f.Options = append(f.Options, o)
		}
	}
	return f, nil
}

// preamble returns a line before the first section from its first bracket or
// comment on. It warns about text before that, which has no effect.
func (f *File) preamble(line string, number int) string {
	skipped, counts := line, ""
	if i := strings.IndexAny(line, "[#;"); i >= 0 {
		skipped, counts = line[:i], line[i:]
	}
	if skipped = strings.TrimSpace(strings.TrimPrefix(skipped, "\ufeff")); skipped != "" {
		f.warnings = append(f.warnings, Problem{Line: number, Value: text.Show(skipped), Warning: true,
			Reason: "text before the first section is ignored", Remedy: "put it below a line such as [Unit], or remove it"})
	}
	return counts
}

func sectionName(line string, number int) (string, error) {
	name, rest, closed := strings.Cut(line[1:], "]")
	fail := func(reason, remedy string) (string, error) {
		return "", Problem{Line: number, Value: text.Show(line), Reason: reason, Remedy: remedy}
	}
	if !closed {
		return fail("unable to find end of section "+text.Show(line), "close it on the same line, as in [Service]")
	}
	if rest = strings.TrimSpace(rest); rest != "" {
		return fail(fmt.Sprintf("found garbage after section name %s: %s", text.Show(name), text.Show(rest)), "move it to a line of its own")
	}
	if !utf8.ValidString(name) {
		return fail("the section name is not UTF-8", "save the file as UTF-8")
	}
	return name, nil
}

// scanner gives out the lines of rest.
type scanner struct {
	rest string
	line int // number of the line given last
}

func (s *scanner) more() bool { return s.rest != "" }

func (s *scanner) next() string {
	var line string
	line, s.rest, _ = strings.Cut(s.rest, "\n")
	s.line++
	return line
}

// comment skips the lines that continue the comment that starts with line.
func (s *scanner) comment(line string) {
	for strings.HasSuffix(strings.TrimSuffix(line, " "), `\`) && s.more() {
		line = s.next()
	}
}

// option reads the option that starts with line, and the lines that continue
// it. A backslash at the end of the file counts as one before an empty line:
// fleet reads it so as soon as it has written the file once.
func (s *scanner) option(line string) (Option, error) {
	name, rest, found := strings.Cut(line, "=")
	o := Option{Name: strings.TrimSpace(name), Line: s.line}
	if !found || strings.Contains(name, "\r") {
		return o, Problem{Line: s.line, Value: text.Show(line), Reason: "unexpected newline encountered while parsing option name " + text.Show(line),
			Remedy: "write NAME=VALUE, or # in front of a comment"}
	}
	var value strings.Builder
	for strings.TrimSpace(rest) != "" {
		value.WriteString(rest)
		if !strings.HasSuffix(rest, `\`) {
			if strings.HasSuffix(strings.TrimSpace(rest), `\`) {
				o.Line, o.Value = s.line, rest
				return o, o.problem("white space follows the backslash at the end of the line, so that the next line may or may not belong to it",
					"remove the white space (in a file from Windows each line ends in a carriage return: convert it)")
			}
			break
		}
		value.WriteByte('\n')
		if !s.more() {
			break
		}
		rest = s.next()
	}
	o.Value = strings.TrimSpace(value.String())
	if strings.HasSuffix(value.String(), "\n") {
		o.Value += "\n" // or the next option would continue this one
	}
	if !utf8.ValidString(o.Name) || !utf8.ValidString(o.Value) {
		return o, o.problem("the line is not UTF-8", "save the file as UTF-8")
	}
	return o, nil
}

// New makes a file of options given by a client. Options that a file cannot
// hold as they are, such as a value with a bare newline, are refused. The lines
// are those of the file made, whose Text is as Serialize writes it. The error
// is a Problem.
func New(options []Option) (*File, error) {
	options = grouped(options)
	f, err := Parse(serialize(options))
	if err != nil {
		return nil, err
	}
	for i, o := range options {
		read := Option{}
		if i < len(f.Options) {
			read = f.Options[i]
		}
		if read.Section != o.Section || read.Name != strings.TrimSpace(o.Name) || strings.TrimSpace(read.Value) != strings.TrimSpace(o.Value) {
			o.Line = read.Line
			return nil, o.problem(fmt.Sprintf("a unit file cannot hold the option %s of section %s as it is given", text.Show(o.Name), text.Show(o.Section)),
				"end every line of a value but the last in a backslash, and no value in one")
		}
	}
	return f, nil
}

// Serialize writes the file as fleet does: options grouped by section in the
// order in which the sections first appear, without comments. This is what
// "cat" shows and what the hash is made of.
func (f *File) Serialize() string { return serialize(grouped(f.Options)) }

func grouped(options []Option) []Option {
	place := map[string]int{}
	for _, o := range options {
		if _, ok := place[o.Section]; !ok {
			place[o.Section] = len(place)
		}
	}
	return slices.SortedStableFunc(slices.Values(options), func(a, b Option) int { return place[a.Section] - place[b.Section] })
}

func serialize(options []Option) string {
	var b strings.Builder
	for i, o := range options {
		if i == 0 || o.Section != options[i-1].Section {
			if i > 0 {
				b.WriteByte('\n')
			}
			b.WriteString("[" + o.Section + "]\n")
		}
		b.WriteString(o.Name + "=" + o.Value + "\n")
	}
	return b.String()
}

// Hash identifies the options of a unit file; comments and spacing do not
// count. It equals the hash that fleet shows for the same file.
type Hash [sha1.Size]byte

// Hash returns the hash of the file as Serialize writes it.
func (f *File) Hash() Hash { return sha1.Sum([]byte(f.Serialize())) }

// String returns the hash as 40 hexadecimal digits.
func (h Hash) String() string { return hex.EncodeToString(h[:]) }
