package unit

import (
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"

	"flotilla/internal/text"
)

// maxDepth is how deep parentheses and "not" may be nested in an expression.
const maxDepth = 100

// Expr is a condition on a machine's metadata, as written after Where=:
//
//	zone in (a, b) and not (disk = hdd || cores < 8)
//
// A key that a machine does not have reads as the empty text. = and != and in
// compare text; <, <=, > and >= compare decimal numbers, and are false if the
// metadata is not one. An Expr is immutable.
type Expr struct {
	source string
	root   *node
}

// node is a comparison (key op values) or a combination of others (op kids).
type node struct {
	op     string // = != < <= > >= in; and or not
	kids   []*node
	key    string
	values []string
	number float64 // of values[0], for the comparisons of numbers
}

// parseExpr reads an expression, and expands each key and each value by expand.
// The values of a template are not known yet: one that still holds a specifier
// is accepted as a number. The error is a Problem whose reason begins with the
// column.
func parseExpr(source string, expand func(string) string, template bool) (*Expr, error) {
	tokens, err := lex(source)
	if err != nil {
		return nil, err
	}
	p := &exprParser{tokens: tokens, expand: expand, template: template}
	root, err := p.either(0)
	if err != nil {
		return nil, err
	}
	if t := p.peek(); t.kind != tokenEnd {
		return nil, t.fail("expected and, or, or the end instead of "+t.shown(), "join comparisons with and or or, as in: zone = a and disk = ssd")
	}
	return &Expr{source, root}, nil
}

// String returns the expression as it was written.
func (e *Expr) String() string { return e.source }

// Match reports whether the metadata of a machine fulfils the expression.
func (e *Expr) Match(metadata map[string]string) bool { return e.root.match(metadata) }

// Keys returns the metadata keys that the expression looks at, sorted.
func (e *Expr) Keys() []string {
	keys := map[string]bool{}
	e.root.collect(keys)
	return slices.Sorted(maps.Keys(keys))
}

func (n *node) collect(keys map[string]bool) {
	if n.key != "" {
		keys[n.key] = true
	}
	for _, kid := range n.kids {
		kid.collect(keys)
	}
}

func (n *node) match(metadata map[string]string) bool {
	has := metadata[n.key]
	switch n.op {
	case "and":
		return !slices.ContainsFunc(n.kids, func(kid *node) bool { return !kid.match(metadata) })
	case "or":
		return slices.ContainsFunc(n.kids, func(kid *node) bool { return kid.match(metadata) })
	case "not":
		return !n.kids[0].match(metadata)
	case "=", "in":
		return slices.Contains(n.values, has)
	case "!=":
		return has != n.values[0]
	}
	x, ok := parseNumber(has)
	if !ok {
		return false
	}
	switch n.op {
	case "<":
		return x < n.number
	case "<=":
		return x <= n.number
	case ">":
		return x > n.number
	default:
		return x >= n.number
	}
}

// parseNumber reads a decimal number such as 8, -1 or 0.5.
func parseNumber(s string) (float64, bool) {
	whole, fraction, dotted := strings.Cut(strings.TrimPrefix(s, "-"), ".")
	if !isDigits(whole) || dotted && !isDigits(fraction) {
		return 0, false
	}
	x, err := strconv.ParseFloat(s, 64)
	return x, err == nil
}

func isDigits(s string) bool {
	return s != "" && strings.Trim(s, "0123456789") == ""
}

type exprParser struct {
	tokens   []token
	expand   func(string) string
	template bool
}

func (p *exprParser) peek() token { return p.tokens[0] }

// next consumes and returns the next token. The last one, tokenEnd, stays.
func (p *exprParser) next() token {
	t := p.tokens[0]
	if t.kind != tokenEnd {
		p.tokens = p.tokens[1:]
	}
	return t
}

func (p *exprParser) either(depth int) (*node, error) {
	return p.chain("or", "||", depth, p.both)
}

func (p *exprParser) both(depth int) (*node, error) {
	return p.chain("and", "&&", depth, p.single)
}

// chain reads operands joined by op, which is written as word or as symbol.
func (p *exprParser) chain(op, symbol string, depth int, operand func(int) (*node, error)) (*node, error) {
	first, err := operand(depth)
	if err != nil || !p.peek().is(op) && !p.peek().is(symbol) {
		return first, err
	}
	n := &node{op: op, kids: []*node{first}}
	for p.peek().is(op) || p.peek().is(symbol) {
		p.next()
		kid, err := operand(depth)
		if err != nil {
			return nil, err
		}
		n.kids = append(n.kids, kid)
	}
	return n, nil
}

func (p *exprParser) single(depth int) (*node, error) {
	t := p.peek()
	if depth > maxDepth {
		return nil, t.fail(fmt.Sprintf("nested deeper than %d", maxDepth), "simplify the expression, or write several Where= lines: all must hold")
	}
	switch {
	case t.is("not"), t.is("!"):
		p.next()
		kid, err := p.single(depth + 1)
		return &node{op: "not", kids: []*node{kid}}, err
	case t.is("("):
		p.next()
		n, err := p.either(depth + 1)
		if err != nil {
			return nil, err
		}
		return n, p.expect(")", fmt.Sprintf("close the parenthesis of column %d", t.column))
	}
	return p.comparison()
}

func (p *exprParser) comparison() (*node, error) {
	t := p.next()
	if t.kind == tokenWord && slices.Contains([]string{"and", "or", "in"}, strings.ToLower(t.text)) || !t.isText() {
		return nil, t.fail("expected a metadata key instead of "+t.shown(), "write a comparison such as zone = a")
	}
	n := &node{key: p.expand(t.text)}
	if n.key == "" {
		return nil, t.fail("the metadata key is empty", "write a comparison such as zone = a")
	}
	negated := p.peek().is("not")
	if negated {
		p.next()
	}
	op := p.next()
	switch {
	case op.is("in"):
		n.op = "in"
		if err := p.list(n); err != nil {
			return nil, err
		}
		if negated {
			return &node{op: "not", kids: []*node{n}}, nil
		}
		return n, nil
	case negated:
		return nil, op.fail("expected in instead of "+op.shown(), "write: not in (a, b)")
	case op.kind != tokenSymbol || strings.Trim(op.text, "=!<>") != "" || op.text == "!":
		return nil, op.fail(fmt.Sprintf("expected an operator after the key %s instead of %s", text.Show(t.text), op.shown()),
			"use =, !=, <, <=, >, >=, in (...) or not in (...); the expression as a whole takes no quotes")
	}
	n.op = strings.Replace(op.text, "==", "=", 1)
	at := p.peek()
	if err := p.value(n); err != nil {
		return nil, err
	}
	if strings.ContainsAny(n.op, "<>") {
		var ok bool
		if n.number, ok = parseNumber(n.values[0]); !ok && !(p.template && strings.Contains(n.values[0], "%")) {
			return nil, at.fail(fmt.Sprintf("%s compares numbers, and %s is not one", n.op, at.shown()), "write a number such as 8 or 0.5; text is compared with = and !=")
		}
	}
	return n, nil
}

// list reads the values of in.
func (p *exprParser) list(n *node) error {
	if err := p.expect("(", "write the values in parentheses: in (a, b)"); err != nil {
		return err
	}
	for {
		if err := p.value(n); err != nil {
			return err
		}
		if !p.peek().is(",") {
			return p.expect(")", "separate the values by commas and close the list: in (a, b)")
		}
		p.next()
	}
}

func (p *exprParser) value(n *node) error {
	t := p.next()
	if !t.isText() {
		return t.fail("expected a value instead of "+t.shown(), `write a word or a text in quotes, such as ssd or "two words"`)
	}
	n.values = append(n.values, p.expand(t.text))
	return nil
}

func (p *exprParser) expect(symbol, remedy string) error {
	if t := p.next(); !t.is(symbol) {
		return t.fail("expected "+symbol+" instead of "+t.shown(), remedy)
	}
	return nil
}

type tokenKind uint8

const (
	tokenEnd    tokenKind = iota
	tokenWord             // bare: a key, a value or and, or, not, in
	tokenQuoted           // in quotes: a key or a value
	tokenSymbol
)

type token struct {
	kind   tokenKind
	text   string // without the quotes
	column int
}

func (t token) isText() bool { return t.kind == tokenWord || t.kind == tokenQuoted }

// is reports whether t is the symbol s, or the word s in any case.
func (t token) is(s string) bool {
	return (t.kind == tokenWord || t.kind == tokenSymbol) && strings.EqualFold(t.text, s)
}

func (t token) shown() string {
	switch t.kind {
	case tokenEnd:
		return "the end"
	case tokenQuoted:
		return strconv.Quote(text.Show(t.text))
	}
	return text.Show(t.text)
}

func (t token) fail(reason, remedy string) error {
	return Problem{Reason: fmt.Sprintf("column %d of the expression: %s", t.column, reason), Remedy: remedy}
}

// lex cuts source into tokens; the last is a tokenEnd.
func lex(source string) ([]token, error) {
	const special = "()=!<>&|,\"' \t\r\n"
	var tokens []token
	column := 1
	for source != "" {
		t := token{column: column}
		size := 1
		switch c := source[0]; {
		case strings.HasPrefix(source, "\\\n"): // the line goes on
			size = 2
		case strings.IndexByte(" \t\r\n", c) >= 0:
		case c == '"' || c == '\'':
			end := strings.IndexByte(source[1:], c)
			if end < 0 {
				return nil, t.fail("the quote is not closed", "close it, or use the other kind of quote around this one")
			}
			t.kind, t.text, size = tokenQuoted, source[1:1+end], end+2
		case c == '&' || c == '|':
			if size = 2; len(source) < 2 || source[1] != c {
				return nil, t.fail(fmt.Sprintf("a single %c", c), fmt.Sprintf("write %c%c, or the words and and or", c, c))
			}
			t.kind, t.text = tokenSymbol, source[:size]
		case strings.IndexByte(special, c) >= 0:
			if len(source) > 1 && source[1] == '=' && strings.IndexByte("=!<>", c) >= 0 {
				size = 2
			}
			t.kind, t.text = tokenSymbol, source[:size]
		default:
			if size = strings.IndexAny(source, special); size < 0 {
				size = len(source)
			}
			if strings.HasPrefix(source[size-1:], "\\\n") {
				size-- // the backslash belongs to the end of the line
			}
			t.kind, t.text = tokenWord, source[:size]
		}
		if t.kind != tokenEnd {
			tokens = append(tokens, t)
		}
		column += utf8.RuneCountInString(source[:size])
		source = source[size:]
	}
	return append(tokens, token{column: column}), nil
}
