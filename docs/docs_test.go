// Package docs_test holds the documents to the code: flags, routes, metrics, direct
// dependencies and links. It reads both as text and knows nothing else.
package docs_test

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"flotilla/internal/api"
	"flotilla/internal/nodeconfig"
)

func read(t *testing.T, path string) string {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// set returns the first groups of all matches.
func set(pattern, text string) map[string]bool {
	found := map[string]bool{}
	for _, m := range regexp.MustCompile(pattern).FindAllStringSubmatch(text, -1) {
		found[m[1]] = true
	}
	return found
}

func compare(t *testing.T, what, page string, code, documented map[string]bool) {
	t.Helper()
	if len(code) == 0 {
		t.Fatalf("no %s found in the code", what)
	}
	for _, name := range slices.Sorted(maps.Keys(code)) {
		if !documented[name] {
			t.Errorf("%s %s is not in %s", what, name, page)
		}
	}
	for _, name := range slices.Sorted(maps.Keys(documented)) {
		if !code[name] {
			t.Errorf("%s has %s %s, which is not in the code", page, what, name)
		}
	}
}

// Every option of a node stands as a row of a table, and no other flag does.
func TestFlags(t *testing.T) {
	code := map[string]bool{"print-units": true} // of the command alone
	for _, o := range new(nodeconfig.Config).Options() {
		code[o.Name] = true
	}
	compare(t, "flag", "reference/flags.md", code, set("(?m)^\\| `--([a-z-]+)`", read(t, "reference/flags.md")))
}

// Each route of the API stands as a row of a table, with its own line.
func TestRoutes(t *testing.T) {
	page := read(t, "reference/api.md")
	code := map[string]bool{}
	for _, r := range api.Routes() {
		code[r.Method+" "+r.Path] = true
		if row := "| `" + r.Method + " " + r.Path + "` | " + r.Doc + " |\n"; !strings.Contains(page, row) {
			t.Errorf("reference/api.md has no line %s", row)
		}
	}
	compare(t, "route", "reference/api.md", code, set("(?m)^\\| `([A-Z]+ /(?:v1|metrics)[^`]*)` \\|", page))
}

// Metrics are made by desc("name", ...) and by options with a Name.
func TestMetrics(t *testing.T) {
	code := map[string]bool{}
	add := func(prefix string, e ast.Expr) {
		if lit, ok := e.(*ast.BasicLit); ok && lit.Kind == token.STRING {
			if name, err := strconv.Unquote(lit.Value); err == nil {
				code[prefix+name] = true
			}
		}
	}
	for _, name := range []string{"../internal/api/metrics.go"} {
		file, err := parser.ParseFile(token.NewFileSet(), name, nil, parser.SkipObjectResolution)
		if err != nil {
			t.Fatal(err)
		}
		ast.Inspect(file, func(n ast.Node) bool {
			switch n := n.(type) {
			case *ast.CallExpr:
				if f, ok := n.Fun.(*ast.Ident); ok && f.Name == "desc" {
					add("flotilla_", n.Args[0])
				}
			case *ast.KeyValueExpr:
				if key, ok := n.Key.(*ast.Ident); ok && key.Name == "Name" {
					add("", n.Value)
				}
			}
			return true
		})
	}
	compare(t, "metric", "reference/metrics.md", code, set(`(?m)^\| .(flotilla_[a-z_]+).\s*\| (?:gauge|counter|histogram)`, read(t, "reference/metrics.md")))
}

func TestDependencies(t *testing.T) {
	page := read(t, "dependencies.md")
	direct, tools, _ := strings.Cut(read(t, "../go.mod"), "\ntool ")
	code := map[string]bool{}
	for line := range strings.Lines(direct) {
		fields := strings.Fields(line)
		if len(fields) == 2 && strings.HasPrefix(fields[1], "v") {
			code[fields[0]] = true
		}
	}
	// A tool is named by its package; its module is a prefix of that.
	for name := range set("(?m)^\\| `([a-z0-9.]+/[^`]+)`", page) {
		if !code[name] && strings.Contains(tools, name) {
			code[name] = true
		}
	}
	for name := range set(`(?m)^\t([a-z0-9.]+/\S+)$`, tools) {
		known := func(m string) bool { return name == m || strings.HasPrefix(name, m+"/") }
		if !slices.ContainsFunc(slices.Collect(maps.Keys(code)), known) {
			t.Errorf("tool %s is not in dependencies.md", name)
		}
	}
	compare(t, "module", "dependencies.md", code, set("(?m)^\\| `([a-z0-9.]+/[^`]+)`", page))
}

var (
	fence   = regexp.MustCompile("(?ms)^```.*?^```\n?")
	link    = regexp.MustCompile(`\]\(([^)\s]+)\)`)
	heading = regexp.MustCompile(`(?m)^#+ +(.+)$`)
	notSlug = regexp.MustCompile(`[^a-z0-9 _-]`)
)

// anchors returns the names that headings of a page can be linked by.
func anchors(page string) map[string]bool {
	found := map[string]bool{}
	for _, m := range heading.FindAllStringSubmatch(fence.ReplaceAllString(page, ""), -1) {
		slug := notSlug.ReplaceAllString(strings.ToLower(m[1]), "")
		found[strings.ReplaceAll(slug, " ", "-")] = true
	}
	return found
}

// Every relative link leads to a file and, if it says so, to a heading of it.
func TestLinks(t *testing.T) {
	links := 0
	err := filepath.WalkDir("..", func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() && path != ".." && strings.HasPrefix(d.Name(), ".") {
			return filepath.SkipDir
		}
		if filepath.Ext(path) != ".md" {
			return nil
		}
		page := read(t, path)
		for _, m := range link.FindAllStringSubmatch(fence.ReplaceAllString(page, ""), -1) {
			if strings.Contains(m[1], "://") || strings.HasPrefix(m[1], "mailto:") {
				continue
			}
			links++
			file, anchor, _ := strings.Cut(m[1], "#")
			to := path
			if file != "" {
				to = filepath.Join(filepath.Dir(path), file)
			}
			if _, err := os.Stat(to); err != nil {
				t.Errorf("%s links to %s, which is not there", path, m[1])
			} else if anchor != "" && !anchors(read(t, to))[anchor] {
				t.Errorf("%s links to %s, and there is no such heading", path, m[1])
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if links == 0 {
		t.Error("no links found")
	}
}
