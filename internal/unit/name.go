package unit

import (
	"errors"
	"fmt"
	"path"
	"slices"
	"strings"
)

// maxName is fleet's limit. (systemd and file systems stop at 255.)
const maxName = 256

// CheckName returns what is wrong with a unit's name, in fleet's words, or nil.
func CheckName(name string) error {
	switch {
	case name == "":
		return errors.New("unit name cannot be empty")
	case len(name) > maxName:
		return fmt.Errorf("unit name exceeds maximum length (%d)", maxName)
	}
	dot := strings.LastIndexByte(name, '.')
	if dot < 0 {
		return errors.New(`unit name must contain "."`)
	}
	stem, kind := name[:dot], name[dot+1:]
	switch kind {
	case "":
		return errors.New(`unit name cannot end in "."`)
	case "path", "service", "socket", "target", "timer":
	case "automount", "busname", "device", "mount", "scope", "slice", "snapshot", "swap":
		if strings.Contains(stem, "@") {
			return fmt.Errorf("invalid unit type for template: %q", kind)
		}
	default:
		return fmt.Errorf("invalid unit type: %q", kind)
	}
	for _, r := range stem {
		if !isAlnum(r) && !strings.ContainsRune(`:-_.\@`, r) {
			return fmt.Errorf("invalid character %q in unit name", r)
		}
	}
	switch {
	case stem == "":
		return fmt.Errorf("unit name must have something before %q", name)
	case stem[0] == '@':
		return errors.New(`unit name cannot start in "@"`)
	}
	return nil
}

func isAlnum(r rune) bool {
	return r >= '0' && r <= '9' || r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z'
}

// FromArgument returns the unit name that a command's argument means: the last
// element of a path, with .service appended unless it ends in a type that fleet
// recognizes there (target, swap, slice and scope are not among them).
func FromArgument(arg string) string {
	name := path.Base(arg)
	known := []string{".service", ".socket", ".timer", ".path", ".device", ".mount", ".automount"}
	if slices.Contains(known, path.Ext(name)) {
		return name
	}
	return name + ".service"
}

// Name is a unit's name and its parts. The comments are for web@1.service.
type Name struct {
	Full     string // web@1.service
	Stem     string // web@1
	Prefix   string // web
	Instance string // 1; all after the first @
	Type     string // service

	at bool // the stem has an @
}

// SplitName takes a name apart, legal or not. Without a dot it has no parts and
// SplitName reports false.
func SplitName(full string) (Name, bool) {
	dot := strings.LastIndexByte(full, '.')
	if dot < 0 {
		return Name{Full: full}, false
	}
	n := Name{Full: full, Stem: full[:dot], Type: full[dot+1:]}
	n.Prefix, n.Instance, n.at = strings.Cut(n.Stem, "@")
	return n, true
}

// IsTemplate reports whether the name is that of a template, as web@.service.
func (n Name) IsTemplate() bool { return n.at && n.Instance == "" }

// IsInstance reports whether the name is that of an instance of a template.
func (n Name) IsInstance() bool { return n.at && n.Instance != "" }

// Template returns the template that the unit is or is an instance of, and ""
// for other units.
func (n Name) Template() string {
	if !n.at {
		return ""
	}
	return n.Prefix + "@." + n.Type
}

// Expand replaces the specifiers that fleet knows in [X-Fleet] (%n, %N, %p, %i,
// one after the other; there is no %%). In all other sections they are
// systemd's business.
func (n Name) Expand(s string) string {
	if !strings.Contains(s, "%") || n.Stem == "" && n.Type == "" {
		return s
	}
	s = strings.ReplaceAll(s, "%n", n.Full)
	s = strings.ReplaceAll(s, "%N", n.Stem)
	s = strings.ReplaceAll(s, "%p", n.Prefix)
	return strings.ReplaceAll(s, "%i", n.Instance)
}
