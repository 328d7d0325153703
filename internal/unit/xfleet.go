package unit

import (
	"fmt"
	"math"
	"path"
	"slices"
	"strings"

	"flotilla/internal/text"
)

// Section is the section of a unit file with the unit's placement requirements.
const Section = "X-Fleet"

// DefaultSpread is the metadata key over which units are spread unless they
// say SpreadOver=.
const DefaultSpread = "zone"

// Requirements are the contents of [X-Fleet], with specifiers expanded (a template
// keeps them). They are immutable.
type Requirements struct {
	Unit      string              // the unit's own name, which its own patterns never match
	MachineID string              // the machine's full ID or its first 8 characters; "" for any machine
	MachineOf []string            // names of units on whose machine it must be
	Metadata  map[string][]string // for each key the machine must have one of the values; values sorted
	Conflicts []string            // patterns as of path.Match: units that must not be on its machine
	Replaces  []string            // patterns as of path.Match: units that leave the machine on which it starts
	Global    bool                // one copy on every eligible machine
	Exclusive bool                // at most one copy ever, even if that means none during a partition

	Memory   int64            // bytes reserved
	CPU      int64            // thousandths of a core reserved
	Counters map[string]int64 // amounts reserved of what machines count by name

	Spread     bool     // away from the other instances of its template, as a preference
	SpreadOver []string // metadata keys over whose values it is spread, as a preference
	Where      []*Expr  // all must hold
}

// shortID is the length of the short form of a machine ID.
const shortID = 8

// Mismatch returns why a machine does not meet MachineID, MachineMetadata and
// Where, and "" if it does. The reason is about the machine: "its metadata has
// disk=hdd and not disk=ssd".
func (r *Requirements) Mismatch(id string, metadata map[string]string) string {
	if r.MachineID != "" && r.MachineID != id && (len(id) < shortID || r.MachineID != id[:shortID]) {
		return "it is not machine " + r.MachineID
	}
	lacks := ""
	for key, values := range r.Metadata {
		if has, ok := metadata[key]; (!ok || !slices.Contains(values, has)) && (lacks == "" || key < lacks) {
			lacks = key
		}
	}
	if lacks != "" {
		return fmt.Sprintf("its metadata has %s and not %s=%s", shownMetadata(lacks, metadata), lacks, strings.Join(r.Metadata[lacks], " or "))
	}
	for _, e := range r.Where {
		if !e.Match(metadata) {
			var has []string
			for _, key := range e.Keys() {
				has = append(has, shownMetadata(key, metadata))
			}
			return fmt.Sprintf("its metadata has %s, and the unit is for machines where %s", strings.Join(has, ", "), e)
		}
	}
	return ""
}

func shownMetadata(key string, metadata map[string]string) string {
	if value := metadata[key]; value != "" {
		return key + "=" + value
	}
	return "no " + key
}

// ConflictsWith returns the pattern of Conflicts that matches the name of
// another unit. Two units conflict if either conflicts with the other.
func (r *Requirements) ConflictsWith(other string) (pattern string, ok bool) {
	return r.match(r.Conflicts, other)
}

// Replacing returns the pattern of Replaces that matches the name of another
// unit.
func (r *Requirements) Replacing(other string) (pattern string, ok bool) {
	return r.match(r.Replaces, other)
}

func (r *Requirements) match(patterns []string, other string) (string, bool) {
	if other == r.Unit {
		return "", false
	}
	return firstMatch(patterns, other)
}

// firstMatch returns the first pattern that matches name. One that path.Match
// refuses matches nothing.
func firstMatch(patterns []string, name string) (string, bool) {
	i := slices.IndexFunc(patterns, func(pattern string) bool {
		ok, err := path.Match(pattern, name)
		return ok && err == nil
	})
	if i < 0 {
		return "", false
	}
	return patterns[i], true
}

// Check reads [X-Fleet] of the file of the unit called n. Problems come with
// fleet's refused combinations first, then in the order of the file; the unit
// may be used if Refusal of them is nil. For a template, values that hold a
// specifier are judged only where they are text.
func (f *File) Check(n Name) (*Requirements, []Problem) {
	c := &checker{name: n, req: &Requirements{Unit: n.Full, Spread: true, SpreadOver: []string{DefaultSpread}}}
	c.problems = slices.Clone(f.warnings)
	for i := range f.Options {
		o := &f.Options[i]
		switch {
		case o.Section == Section:
			c.option(o)
		case strings.EqualFold(strings.TrimSpace(o.Section), Section):
			c.warn(o, fmt.Sprintf("the section [%s] is not [%s] and has no effect", text.Show(o.Section), Section), "write ["+Section+"]")
		}
	}
	c.machineID()
	c.machineOf()
	c.metadata()
	c.patterns()
	c.switches()
	c.reservations()
	c.spread()
	c.where()
	slices.SortStableFunc(c.problems, func(a, b Problem) int { return a.Line - b.Line })
	return c.req, append(c.combinations(), c.problems...)
}

type checker struct {
	name     Name
	req      *Requirements
	given    map[string][]*Option // by key as written
	problems []Problem
}

// value is one value of an option.
type value struct {
	*Option
	raw  string // as written
	text string // with specifiers expanded
	open bool   // it is a template's and has a specifier
}

// shown is the value as the text of a problem names it.
func (v value) shown() string {
	if v.text == "" {
		return fmt.Sprintf("%s, which is empty here,", text.Show(v.raw))
	}
	return text.Show(v.text)
}

func (c *checker) refuse(o *Option, reason, remedy string) {
	c.problems = append(c.problems, o.problem(reason, remedy))
}

func (c *checker) warn(o *Option, reason, remedy string) {
	p := o.problem(reason, remedy)
	p.Warning = true
	c.problems = append(c.problems, p)
}

// current returns the current name of a key, which may be a deprecated one; ok is
// false for a key that is not one of [X-Fleet].
func current(key string) (name string, ok bool) {
	switch key {
	case "X-ConditionMachineID", "X-ConditionMachineBootID":
		return "MachineID", true
	case "X-ConditionMachineOf", "X-ConditionMachineMetadata", "X-Conflicts":
		return strings.TrimPrefix(strings.TrimPrefix(key, "X-"), "Condition"), true
	}
	return key, slices.Contains(keys(), key)
}

func keys() []string {
	return []string{"MachineID", "MachineOf", "MachineMetadata", "Conflicts", "Replaces", "Global", "Exclusive",
		"MemoryReserve", "CPUReserve", "CounterReserve", "Spread", "SpreadOver", "Where"}
}

func (c *checker) option(o *Option) {
	name, known := current(o.Name)
	switch {
	case !known:
		remedy := "it has no effect: remove it, or write one of " + strings.Join(keys(), ", ")
		if meant := text.Nearest(o.Name, keys()); meant != "" {
			remedy = "it has no effect: write " + meant
		}
		c.warn(o, fmt.Sprintf("unrecognized requirement in [%s] section: %q", Section, text.Show(o.Name)), remedy)
		return
	case name != o.Name:
		c.warn(o, o.Name+" is deprecated", "write "+name)
	}
	if c.given == nil {
		c.given = map[string][]*Option{}
	}
	c.given[o.Name] = append(c.given[o.Name], o)
}

// values returns all values of the options called by one of names, in the
// order of names. Empty ones are left out.
func (c *checker) values(names ...string) []value {
	var all []value
	for _, name := range names {
		for _, o := range c.given[name] {
			for _, raw := range splitValues(strings.TrimSpace(strings.ReplaceAll(o.Value, "\\\n", " "))) {
				if strings.TrimSpace(raw) == "" {
					continue
				}
				v := value{Option: o, raw: raw, text: raw}
				if c.name.IsTemplate() {
					v.open = strings.Contains(raw, "%")
				} else {
					v.text = c.name.Expand(raw)
				}
				all = append(all, v)
			}
		}
	}
	return all
}

// splitValues cuts a value that starts and ends with a quote at each space
// outside of quotes, and drops the quotes; any other value is one value.
func splitValues(s string) []string {
	if !strings.HasPrefix(s, `"`) || !strings.HasSuffix(s, `"`) {
		return []string{s}
	}
	var values []string
	var b strings.Builder
	quoted := false
	for i := range len(s) {
		switch {
		case s[i] == '"':
			quoted = !quoted
		case s[i] == ' ' && !quoted:
			values = append(values, b.String())
			b.Reset()
		default:
			b.WriteByte(s[i])
		}
	}
	return append(values, b.String())
}

// empty calls report for each option called by one of names that has no value.
func (c *checker) empty(report func(o *Option, reason, remedy string), effect string, names ...string) {
	for _, name := range names {
		for _, o := range c.given[name] {
			if strings.Trim(o.Value, "\" \\\n") == "" {
				report(o, name+" has no value"+effect, "remove the line, or give it a value")
			}
		}
	}
}

func (c *checker) machineID() {
	names := []string{"MachineID", "X-ConditionMachineID", "X-ConditionMachineBootID"}
	c.empty(c.refuse, ": no machine has that ID", names...)
	for i, v := range c.values(names...) {
		switch {
		case i > 0:
			c.warn(v.Option, fmt.Sprintf("MachineID is given more than once: only %s counts", text.Show(c.req.MachineID)), "remove this one")
			continue
		case v.text == "":
			c.refuse(v.Option, v.raw+" is empty for "+text.Show(c.name.Full)+": no machine has that ID", "use it in a template, or name the machine")
		case !v.open && strings.Trim(v.text, "0123456789abcdef") != "":
			c.warn(v.Option, "this does not look like a machine ID", "write what list-machines --full shows: 32 hexadecimal digits")
		}
		c.req.MachineID = v.text
	}
}

func (c *checker) machineOf() {
	names := []string{"X-ConditionMachineOf", "MachineOf"}
	c.empty(c.refuse, ": there is no such unit", names...)
	for _, v := range c.values(names...) {
		err := CheckName(v.text)
		switch {
		case v.open:
		case err != nil:
			c.refuse(v.Option, fmt.Sprintf("no unit can be called %s: %s", text.Show(v.text), err), `name one unit with its type, or several in quotes: "a.service" "b.service"`)
		case v.text == c.name.Full:
			c.refuse(v.Option, "the unit would wait for itself", "name another unit")
		}
		c.req.MachineOf = append(c.req.MachineOf, v.text)
	}
}

func (c *checker) metadata() {
	names := []string{"X-ConditionMachineMetadata", "MachineMetadata"}
	c.empty(c.warn, " and no effect", names...)
	for _, v := range c.values(names...) {
		key, wanted, _ := strings.Cut(v.text, "=")
		if key == "" || wanted == "" || strings.Contains(wanted, "=") {
			if !v.open {
				c.warn(v.Option, fmt.Sprintf("%s is not key=value and has no effect", text.Show(v.text)), `write key=value; several in quotes: "disk=ssd" "zone=a"`)
			}
			continue
		}
		if c.req.Metadata == nil {
			c.req.Metadata = map[string][]string{}
		}
		if i, found := slices.BinarySearch(c.req.Metadata[key], wanted); !found {
			c.req.Metadata[key] = slices.Insert(c.req.Metadata[key], i, wanted)
		}
	}
}

func (c *checker) patterns() {
	check := func(v value, pattern string) {
		if _, err := path.Match(pattern, ""); err != nil {
			c.warn(v.Option, fmt.Sprintf("the pattern %s is malformed and matches nothing", text.Show(pattern)), `close its brackets, or write \ in front of a bracket that is meant as such`)
		}
	}
	c.empty(c.warn, " and no effect", "X-Conflicts", "Conflicts", "Replaces")
	for _, v := range c.values("X-Conflicts", "Conflicts") {
		for _, pattern := range strings.Fields(v.text) {
			check(v, pattern)
			c.req.Conflicts = append(c.req.Conflicts, pattern)
		}
	}
	for _, v := range c.values("Replaces") {
		if check(v, v.text); len(strings.Fields(v.text)) > 1 {
			c.warn(v.Option, "a pattern with a space matches nothing", `put each pattern in quotes: "a@*" "b.service"`)
		}
		c.req.Replaces = append(c.req.Replaces, v.text)
	}
}

// isTrue is fleet's rule.
func isTrue(s string) bool {
	return slices.Contains([]string{"true", "yes", "1", "on", "t"}, strings.ToLower(s))
}

// parseSwitch reads a yes or no. Anything else is a no, with ok false.
func parseSwitch(s string) (on, ok bool) {
	on = isTrue(s)
	return on, on || slices.Contains([]string{"false", "no", "0", "off", "f"}, strings.ToLower(s))
}

func (c *checker) switches() {
	const remedy = "write yes or no"
	c.empty(c.warn, " and no effect", "Global", "Exclusive", "Spread")
	for _, v := range c.values("Global") { // the last one counts
		on, ok := parseSwitch(v.text)
		if c.req.Global = on; !ok && !v.open {
			c.warn(v.Option, fmt.Sprintf("%s is neither yes nor no, and counts as no", v.shown()), remedy)
		}
	}
	for key, target := range map[string]*bool{"Exclusive": &c.req.Exclusive, "Spread": &c.req.Spread} {
		for _, v := range c.values(key) {
			on, ok := parseSwitch(v.text)
			if *target = on; !ok && !v.open {
				c.refuse(v.Option, fmt.Sprintf("%s is neither yes nor no", v.shown()), remedy)
			}
		}
	}
}

func (c *checker) reservations() {
	c.empty(c.warn, " and no effect", "MemoryReserve", "CPUReserve", "CounterReserve")
	for _, v := range c.values("MemoryReserve") {
		size, ok := parseScaled(v.text, map[string]float64{"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40})
		if c.req.Memory = size; !ok && !v.open {
			c.refuse(v.Option, v.shown()+" is not an amount of memory", "write bytes, or a number with K, M, G or T after it, such as 512M or 1.5G")
		}
	}
	for _, v := range c.values("CPUReserve") {
		cores, ok := parseScaled(v.text, map[string]float64{"": 1000, "%": 10})
		if c.req.CPU = cores; !ok && !v.open {
			c.refuse(v.Option, v.shown()+" is not a number of cores", "write cores, such as 2 or 0.5, or percent of one core, such as 50%")
		}
	}
	for _, v := range c.values("CounterReserve") {
		name, amount, _ := strings.Cut(v.text, "=")
		n, ok := parseScaled(amount, map[string]float64{"": 1})
		_, twice := c.req.Counters[name]
		switch {
		case v.open:
		case !isMetadataKey(name) || !ok || strings.Contains(amount, "."):
			c.refuse(v.Option, v.shown()+" is not NAME=AMOUNT", `write a name and a whole number, such as gpu=1; several in quotes: "gpu=1" "license=2"`)
		case twice:
			c.refuse(v.Option, text.Show(name)+" is reserved twice", "write the sum in one place")
		default:
			if c.req.Counters == nil {
				c.req.Counters = map[string]int64{}
			}
			c.req.Counters[name] = n
		}
	}
}

// parseScaled reads a number of zero or more and its unit, one of those that
// scale names, and returns the product, rounded up.
func parseScaled(s string, scale map[string]float64) (int64, bool) {
	i := strings.LastIndexAny(s, "0123456789") + 1
	x, ok := parseNumber(s[:i])
	factor, known := scale[s[i:]]
	if x *= factor; !ok || !known || s[0] == '-' || x > 1<<60 {
		return 0, false
	}
	return int64(math.Ceil(x - 1e-6)), true // 0.07 cores are 70 thousandths in spite of binary fractions
}

// isMetadataKey reports whether a machine may have metadata under key.
func isMetadataKey(key string) bool {
	return key != "" && !strings.ContainsFunc(key, func(r rune) bool { return !isAlnum(r) && !strings.ContainsRune("_.-", r) })
}

func (c *checker) spread() {
	if len(c.given["SpreadOver"]) > 0 { // it replaces the default, empty or not
		c.req.SpreadOver = nil
	}
	for _, v := range c.values("SpreadOver") {
		for _, key := range strings.Fields(v.text) {
			switch {
			case v.open:
			case !isMetadataKey(key):
				c.refuse(v.Option, text.Show(key)+" is not a metadata key", "a key has letters, digits, dots, - and _, such as zone")
				continue
			case slices.Contains(c.req.SpreadOver, key):
				continue
			}
			c.req.SpreadOver = append(c.req.SpreadOver, key)
		}
	}
	if !c.req.Spread {
		c.req.SpreadOver = nil
	}
	if c.req.Global {
		for _, o := range slices.Concat(c.given["Spread"], c.given["SpreadOver"]) {
			c.warn(o, o.Name+" has no effect on a global unit", "remove the line")
		}
	}
}

func (c *checker) where() {
	c.empty(c.warn, " and no effect", "Where")
	expand := func(s string) string { return s }
	if !c.name.IsTemplate() {
		expand = c.name.Expand
	}
	for _, o := range c.given["Where"] {
		if strings.Trim(o.Value, "\" \\\n") == "" {
			continue
		}
		e, err := parseExpr(o.Value, expand, c.name.IsTemplate())
		if err != nil {
			bad := err.(Problem)
			c.refuse(o, bad.Reason, bad.Remedy)
			continue
		}
		c.req.Where = append(c.req.Where, e)
	}
}

// combinations refuses options that exclude each other, in fleet's order and
// words. It checks the values as written, as fleet does, which does not know the
// unit's name yet.
func (c *checker) combinations() []Problem {
	ids := c.values("MachineID", "X-ConditionMachineID", "X-ConditionMachineBootID")
	peers := c.values("X-ConditionMachineOf", "MachineOf")
	conflicts := c.values("X-Conflicts", "Conflicts")
	replaces := c.values("Replaces")
	global, exclusive := c.last("Global"), c.last("Exclusive")

	var found []Problem
	refuse := func(a, b value, reason, remedy string) {
		later := a
		if b.Line > a.Line {
			later = b
		}
		found = append(found, later.problem(reason, remedy))
	}
	for _, peer := range peers {
		for _, v := range conflicts {
			if pattern, ok := firstMatch(strings.Fields(v.raw), peer.raw); ok {
				refuse(peer, v, fmt.Sprintf("unresolvable requirements: peer %q matches conflict %q", peer.raw, pattern),
					fmt.Sprintf("the units cannot be both together and apart: remove the peer of line %d or the pattern of line %d", peer.Line, v.Line))
			}
		}
	}
	for _, peer := range peers {
		for _, v := range replaces {
			if pattern, ok := firstMatch([]string{v.raw}, peer.raw); ok {
				refuse(peer, v, fmt.Sprintf("unresolvable requirements: peer %q matches replace %q", peer.raw, pattern),
					fmt.Sprintf("a unit cannot replace the one it must be with: remove the peer of line %d or the pattern of line %d", peer.Line, v.Line))
			}
		}
	}
	for _, pair := range []struct {
		a     []value
		aName string
		b     []value
		bName string
	}{
		{ids, "MachineID", peers, "Peers"},
		{ids, "MachineID", conflicts, "Conflicts"},
		{ids, "MachineID", global, "Global"},
		{ids, "MachineID", replaces, "Replaces"},
		{global, "Global", peers, "Peers"},
		{global, "Global", replaces, "Replaces"},
		{conflicts, "Conflicts", replaces, "Replaces"},
		{global, "Global", exclusive, "Exclusive"}, // ours: a copy on every machine is not at most one
	} {
		if len(pair.a) > 0 && len(pair.b) > 0 {
			a, b := pair.a[0], pair.b[0]
			refuse(a, b, pair.aName+" cannot be used with "+pair.bName, fmt.Sprintf("remove %s (line %d) or %s (line %d)", a.Name, a.Line, b.Name, b.Line))
		}
	}
	return found
}

// last returns the last value of a switch, which is the one that counts, if it is
// on.
func (c *checker) last(name string) []value {
	values := c.values(name)
	if len(values) == 0 || !isTrue(values[len(values)-1].raw) {
		return nil
	}
	return values[len(values)-1:]
}
