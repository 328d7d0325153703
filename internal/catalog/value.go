package catalog

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"flotilla/internal/text"
)

// kind is what a key below /services/<name>/ is for.
type kind uint8

const (
	kindOther    kind = iota // not ours: ignored
	kindMisspelt             // not ours, but probably meant to be
	kindScheme
	kindHost
	kindHostPort
	kindPrivate
	kindDomain
	kindOptions
	kindMeta
)

// kindOf tells what the key called name is for. arg is the <n> of hosts/<n>,
// domains/<n> and meta/<n>; for a misspelt key it is the name that was probably
// meant.
func kindOf(name string) (k kind, arg string) {
	first, rest, nested := strings.Cut(name, "/")
	switch first {
	case "hosts":
		k = kindHost
	case "domains":
		k = kindDomain
	case "meta":
		k = kindMeta
	case "scheme":
		k = kindScheme
	case "host_port":
		k = kindHostPort
	case "private":
		k = kindPrivate
	case "options":
		k = kindOptions
	default:
		if meant := meantBy(first, rest); meant != "" {
			return kindMisspelt, meant
		}
		return kindOther, ""
	}
	numbered := k == kindHost || k == kindDomain || k == kindMeta
	switch {
	case numbered && rest == "":
		return kindMisspelt, first + "/1"
	case numbered && strings.Contains(rest, "/"):
		return kindOther, ""
	case !numbered && nested:
		return kindMisspelt, first
	}
	return k, rest
}

// meantBy returns the key that the unknown key first/rest was probably meant to
// be, or "". Sibling keys of other tools are allowed, so only near misses count.
func meantBy(first, rest string) string {
	if first == "" && rest == "" { // the key /services/<name> itself
		return "hosts/1"
	}
	if rest == "" || strings.Contains(rest, "/") {
		rest = "1"
	}
	switch strings.NewReplacer("_", "", "-", "").Replace(strings.ToLower(first)) {
	case "scheme", "schema":
		return "scheme"
	case "host", "hosts", "endpoint", "endpoints":
		return "hosts/" + rest
	case "port", "hostport":
		return "host_port"
	case "private":
		return "private"
	case "domain", "domains":
		return "domains/" + rest
	case "option", "options":
		return "options"
	}
	return ""
}

// example is a value that is valid for a key of that kind under most policies.
func (k kind) example() string {
	switch k {
	case kindHost:
		return "10.0.0.11:8080"
	case kindHostPort:
		return "9000"
	case kindDomain:
		return "www.example.com"
	case kindOptions:
		return `{"balance": "roundrobin"}`
	case kindMeta:
		return `{"weight": 100}`
	case kindPrivate:
		return "true"
	}
	return "http"
}

// setting is what one valid key says; which field counts follows from the kind.
type setting struct {
	scheme  Scheme
	addr    netip.AddrPort
	port    int
	domain  string
	options Options
	meta    meta
	unknown *valueError // fields of options or meta that do not exist; the others are in force
}

type meta struct {
	weight int
	drain  bool
	zone   string
}

// valueError is what is wrong with a value: the reason, what to do, and the value
// to write instead.
type valueError struct{ reason, advice, instead string }

// check reads the value of a key. Spaces, tabs and line ends around it do not
// count, because `echo 10.0.0.1:80 | etcdctl put ...` leaves one there.
func (r *rules) check(k kind, value string) (setting, *valueError) {
	var s setting
	if k == kindPrivate || k == kindOther || k == kindMisspelt {
		return s, nil
	}
	limit := maxValue
	if k == kindOptions {
		limit = maxOptions
	}
	if len(value) > limit {
		return s, &valueError{fmt.Sprintf("the value is longer than %d bytes", limit), "write a shorter value", k.example()}
	}
	value = trim(value)
	if value == "" {
		return s, &valueError{"the value is empty", "write a value, or delete the key", k.example()}
	}
	var f *valueError
	switch k {
	case kindScheme:
		s.scheme, f = readScheme(value)
	case kindHost:
		s.addr, f = r.readEndpoint(value)
	case kindHostPort:
		s.port, f = r.readHostPort(value)
	case kindDomain:
		s.domain, f = r.readDomain(value)
	case kindOptions:
		s.options, s.unknown, f = readOptions(value)
	case kindMeta:
		s.meta, s.unknown, f = readMeta(value)
	}
	return s, f
}

func trim(value string) string { return strings.Trim(value, " \t\r\n") }

func readScheme(value string) (Scheme, *valueError) {
	switch s := Scheme(value); s {
	case HTTP, TCP, HTTPS, HTTPAndHTTPS:
		return s, nil
	}
	f := &valueError{text.Show(value) + " is not a scheme", "write http, tcp, https or http-and-https", "http"}
	switch s := Scheme(strings.ToLower(value)); s {
	case TCP, HTTPS, HTTPAndHTTPS:
		f.instead = string(s)
	}
	return "", f
}

// number reads a decimal number from 1 to limit: digits only, no sign, no
// leading zero, because readers further on take +80 or 080 for something else.
func number(s string, limit int) (int, bool) {
	if s == "" || len(s) > 6 || s[0] == '0' {
		return 0, false
	}
	n := 0
	for i := range len(s) {
		if !isDigit(s[i]) {
			return 0, false
		}
		n = n*10 + int(s[i]-'0')
	}
	return n, n <= limit
}

func (r *rules) readHostPort(value string) (int, *valueError) {
	port, ok := number(value, 65535)
	if !ok {
		return 0, &valueError{text.Show(value) + " is not a port", "write a number from 1 to 65535", kindHostPort.example()}
	}
	if user, taken := r.ReservedPorts[port]; taken {
		return 0, &valueError{fmt.Sprintf("port %d is used by %s on every node", port, text.Show(user)), "write another port", kindHostPort.example()}
	}
	return port, nil
}

// readEndpoint reads ip:port or [ip6]:port.
func (r *rules) readEndpoint(value string) (netip.AddrPort, *valueError) {
	fail := func(reason, advice, instead string) (netip.AddrPort, *valueError) {
		if instead == "" {
			instead = kindHost.example()
		}
		return netip.AddrPort{}, &valueError{reason, advice, instead}
	}
	if _, rest, ok := strings.Cut(value, "://"); ok {
		host, _, _ := strings.Cut(rest, "/")
		instead := ""
		if addr, f := r.readEndpoint(host); f == nil {
			instead = addr.String()
		}
		return fail("a URL stands where ip:port belongs", "write only the address and the port", instead)
	}
	if addr, err := netip.ParseAddr(value); err == nil {
		return fail("there is no port", "write the address (IPv6 in brackets), a colon and the port",
			netip.AddrPortFrom(addr.WithZone(""), 8080).String())
	}
	colon := strings.LastIndexByte(value, ':')
	if colon < 0 {
		return fail(text.Show(value)+" is not ip:port", "write the address, a colon and the port; names are not resolved", "")
	}
	host, port := value[:colon], value[colon+1:]
	inner, bracketed := strings.CutPrefix(host, "[")
	if bracketed {
		inner, bracketed = strings.CutSuffix(inner, "]")
	}
	addr, err := netip.ParseAddr(inner)
	switch {
	case host == "":
		return fail("there is no address before the port", "write the address too", "")
	case err != nil && strings.Trim(host, "0123456789.:[]") == "":
		return fail(text.Show(host)+" is not an IP address", "write an address of four numbers up to 255, or IPv6 in brackets", "")
	case err != nil:
		return fail(text.Show(host)+" is not an IP address", "write the address; names are not resolved", "")
	case bracketed != addr.Is6():
		return fail("brackets belong around an IPv6 address and only there", "write 10.0.0.11:8080 or [2001:db8::11]:8080", "")
	case addr.Zone() != "":
		return fail("the address has a zone, which means nothing on other machines", "write it without the part from % on", "")
	}
	n, ok := number(port, 65535)
	if !ok {
		return fail(text.Show(port)+" is not a port", "write a port from 1 to 65535 after the colon",
			netip.AddrPortFrom(addr, 8080).String())
	}
	addr = addr.Unmap()
	if what := r.refuses(addr); what != "" {
		return fail(fmt.Sprintf("%s is %s", addr, what), "write an address that every node can reach and that the node's policy allows", "")
	}
	return netip.AddrPortFrom(addr, uint16(n)), nil
}

// readDomain reads a host name, or a wildcard for everything below one, and
// returns it in lower case.
func (r *rules) readDomain(value string) (string, *valueError) {
	fail := func(reason, advice string) (string, *valueError) {
		return "", &valueError{reason, advice, kindDomain.example()}
	}
	domain := strings.ToLower(value)
	base, wildcard := strings.CutPrefix(domain, "*.")
	if len(domain) > 253 {
		return fail("the name is longer than 253 characters", "write a shorter host name")
	}
	if strings.Contains(base, "*") {
		return fail("the star may only be the whole first part", "write the host name, or *.example.com for all below it")
	}
	if _, err := netip.ParseAddr(strings.Trim(domain, "[]")); err == nil {
		return fail(text.Show(value)+" is an IP address", "write a host name")
	}
	labels := strings.Split(base, ".")
	for _, l := range labels {
		if !validLabel(l) {
			return fail(text.Show(value)+" is not a host name", "write a host name of letters, digits, dashes and dots, without port or path")
		}
	}
	last := labels[len(labels)-1]
	switch {
	case len(labels) < 2 && wildcard:
		return fail(text.Show(value)+" would take a whole top-level domain", "write a wildcard with at least two names after the star, such as *.example.com")
	case len(labels) < 2:
		return fail(text.Show(value)+" has no dot", "write the full host name")
	case strings.Trim(last, "0123456789") == "":
		return fail(text.Show(value)+" ends like an IP address", "write a host name")
	case r.LocalDomain != "" && (base == r.LocalDomain || strings.HasSuffix(base, "."+r.LocalDomain)):
		return fail("names in "+text.Show(r.LocalDomain)+" belong to the services of that name", "write a host name in another domain")
	}
	return domain, nil
}

func validLabel(l string) bool {
	if l == "" || len(l) > 63 || l[0] == '-' || l[len(l)-1] == '-' {
		return false
	}
	for i := range len(l) {
		if !isAlnum(l[i]) && l[i] != '-' && l[i] != '_' {
			return false
		}
	}
	return true
}

// field is one field of a JSON value: what it takes, an example, and a function
// that stores it and says whether it was right.
type field struct {
	takes, example string
	set            func(raw json.RawMessage) bool
}

func readOptions(value string) (o Options, unknown, f *valueError) {
	retries := true
	known := map[string]field{
		"strip_path":      flag(&o.StripPath),
		"sticky":          flag(&o.Sticky),
		"retries":         flag(&retries),
		"h2c":             flag(&o.H2C),
		"send_proxy":      flag(&o.SendProxy),
		"timeout_server":  timeout(&o.TimeoutServer),
		"timeout_tunnel":  timeout(&o.TimeoutTunnel),
		"max_connections": count(&o.MaxConnections, 1, 100_000, "a number from 1 to 100000"),
		"balance": {`"leastconn", "roundrobin" or "consistent-hash"`, `"leastconn"`, func(raw json.RawMessage) bool {
			if json.Unmarshal(raw, &o.Balance) != nil {
				return false
			}
			switch o.Balance {
			case "", LeastConn, RoundRobin, ConsistentHash:
				return o.Balance != "" || string(raw) == "null"
			}
			return false
		}},
	}
	unknown, f = readFields(value, known)
	o.NoRetries = !retries
	return o, unknown, f
}

func readMeta(value string) (m meta, unknown, f *valueError) {
	m.weight = defaultWeight
	unknown, f = readFields(value, map[string]field{
		"weight": count(&m.weight, 0, 256, "a number from 0 to 256"),
		"drain":  flag(&m.drain),
		"zone": {"printable text of up to 63 characters", `"a"`, func(raw json.RawMessage) bool {
			return json.Unmarshal(raw, &m.zone) == nil && len(m.zone) <= 63 && printable(m.zone)
		}},
	})
	return m, unknown, f
}

func flag(to *bool) field {
	return field{"true or false", "true", func(raw json.RawMessage) bool { return json.Unmarshal(raw, to) == nil }}
}

func count(to *int, from, limit int, takes string) field {
	return field{takes, "100", func(raw json.RawMessage) bool {
		n := from
		if string(raw) == "null" {
			return true
		}
		if json.Unmarshal(raw, &n) != nil || n < from || n > limit {
			return false
		}
		*to = n
		return true
	}}
}

func timeout(to *time.Duration) field {
	return field{`a time in quotes, from "1s" to "24h"`, `"30s"`, func(raw json.RawMessage) bool {
		var s *string
		if json.Unmarshal(raw, &s) != nil {
			return false
		}
		if s == nil {
			return true
		}
		d, err := time.ParseDuration(*s)
		*to = d
		return err == nil && d >= time.Second && d <= 24*time.Hour
	}}
}

// readFields reads a JSON object whose fields are known. A field of the wrong
// type or range makes the whole value bad; an unknown one is left out and said.
// null leaves a field as if it were not there.
func readFields(value string, known map[string]field) (unknown, f *valueError) {
	var fields map[string]json.RawMessage
	err := json.Unmarshal([]byte(value), &fields)
	if err != nil || fields == nil {
		reason := "the value is not a JSON object"
		var syntax *json.SyntaxError
		if errors.As(err, &syntax) {
			reason = fmt.Sprintf("%s: the mistake is at byte %d", reason, syntax.Offset)
		}
		names := slices.Sorted(maps.Keys(known))
		example := fmt.Sprintf(`{"%s": %s}`, names[0], known[names[0]].example)
		return nil, &valueError{reason, "write fields in double quotes, between braces", example}
	}
	var ignored []string
	for _, name := range slices.Sorted(maps.Keys(fields)) {
		fd, ok := known[name]
		if !ok {
			ignored = append(ignored, text.Show(name))
			delete(fields, name)
		} else if !fd.set(fields[name]) {
			reason := fmt.Sprintf("%s is %s, but takes %s", name, text.Show(string(fields[name])), fd.takes)
			fields[name] = json.RawMessage(fd.example)
			return nil, &valueError{reason, "write " + fd.takes, compact(fields, name)}
		}
	}
	if len(ignored) == 0 {
		return nil, nil
	}
	more := ""
	if n := len(ignored) - 5; n > 0 {
		ignored, more = ignored[:5], fmt.Sprintf(" and %d more", n)
	}
	return &valueError{
		reason:  fmt.Sprintf("unknown field %s%s is ignored; the other fields apply", strings.Join(ignored, ", "), more),
		advice:  "use only " + strings.Join(slices.Sorted(maps.Keys(known)), ", "),
		instead: compact(fields, ""),
	}, nil
}

// compact writes fields as JSON for a remedy, or, if that would be too long to
// read or paste, only the field named.
func compact(fields map[string]json.RawMessage, only string) string {
	b, err := json.Marshal(fields)
	if err == nil && len(b) <= 200 && printable(string(b)) {
		return string(b)
	}
	if only == "" {
		return "{}"
	}
	return "{" + strconv.Quote(only) + ":" + string(fields[only]) + "}"
}
