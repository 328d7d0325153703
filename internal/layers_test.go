// Package internal_test holds the packages to the layers of the design: imports
// go down, components meet in the store and not in each other, plans are pure.
package internal_test

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

const module = "flotilla"

// A package may import packages of lower layers, but not those it must not
// know. cmd, demo and bench stand above all layers.
var packages = map[string]struct {
	layer       int
	mustNotKnow []string
}{
	// Leaves, each for one thing that has nothing to do with clusters.
	"durable": {layer: 0},
	"feed":    {layer: 0},
	"text":    {layer: 0},

	"catalog": {layer: 1},
	"unit":    {layer: 1},

	"wire":       {layer: 2},
	"nodeconfig": {layer: 2, mustNotKnow: []string{"catalog"}},

	"client":  {layer: 3, mustNotKnow: []string{"catalog", "unit"}},
	"child":   {layer: 3, mustNotKnow: []string{"catalog"}},
	"haproxy": {layer: 3, mustNotKnow: []string{"catalog"}},
	"peer":    {layer: 3, mustNotKnow: []string{"catalog", "unit"}},
	"remote":  {layer: 3, mustNotKnow: []string{"catalog", "unit"}},
	"store":   {layer: 3, mustNotKnow: []string{"catalog", "unit"}},
	"systemd": {layer: 3, mustNotKnow: []string{"catalog", "unit"}},

	"state": {layer: 4, mustNotKnow: []string{"systemd", "haproxy"}},

	"agent":  {layer: 5, mustNotKnow: []string{"haproxy", "catalog"}},
	"dns":    {layer: 5, mustNotKnow: []string{"haproxy"}},
	"engine": {layer: 5, mustNotKnow: []string{"systemd", "haproxy", "catalog"}},
	"router": {layer: 5},
	"wait":   {layer: 5, mustNotKnow: []string{"systemd", "haproxy", "catalog"}},

	"api":  {layer: 6, mustNotKnow: []string{"systemd", "haproxy", "agent", "router", "dns"}},
	"logs": {layer: 6, mustNotKnow: []string{"haproxy", "catalog", "remote"}},

	"provision": {layer: 6, mustNotKnow: []string{"catalog", "unit", "state"}},

	// Platforms stand above the interface that they implement.
	"nspawn": {layer: 7, mustNotKnow: []string{"api", "catalog", "client", "remote", "state", "store", "systemd", "unit"}},

	"fleetapi": {layer: 7, mustNotKnow: []string{"systemd", "haproxy", "catalog", "engine"}},

	"cli":  {layer: 8, mustNotKnow: []string{"api", "fleetapi", "logs", "agent", "engine", "router", "dns", "store", "state", "systemd", "haproxy"}},
	"node": {layer: 8},
}

// Test support: only tests and benchmarks import these.
var testSupport = []string{"store/storetest", "systemd/systemdtest", "remote/sshdtest", "nspawn/nspawntest", "api/apitest"}

// Whose business a foreign module is; tests may use it as a client would.
var edges = map[string]string{
	"go.etcd.io/":            "store",
	"google.golang.org/grpc": "store",
	"github.com/godbus/":     "systemd",
	"github.com/miekg/dns":   "dns",
	"golang.org/x/crypto/":   "remote",
}

func TestLayers(t *testing.T) {
	files := 0
	err := filepath.WalkDir("..", func(name string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() {
			if base := d.Name(); name != ".." && (strings.HasPrefix(base, ".") || base == "testdata") {
				return filepath.SkipDir
			}
			return nil
		}
		if !strings.HasSuffix(name, ".go") {
			return nil
		}
		files++
		src, err := os.ReadFile(name)
		if err != nil {
			return err
		}
		rel, err := filepath.Rel("..", name)
		if err != nil {
			return err
		}
		found, err := faults(filepath.ToSlash(rel), src)
		for _, f := range found {
			t.Errorf("%s: %s", rel, f)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	if files == 0 {
		t.Error("no Go files found")
	}
}

// faults returns what is wrong with the file, whose name is relative to the
// root of the module.
func faults(name string, src []byte) ([]string, error) {
	file, err := parser.ParseFile(token.NewFileSet(), name, src, parser.SkipObjectResolution)
	if err != nil {
		return nil, err
	}
	dir, isTest := path.Dir(name), strings.HasSuffix(name, "_test.go")
	pkg, inside := strings.CutPrefix(dir, "internal/")
	support := slices.Contains(testSupport, pkg)
	if support {
		pkg = path.Dir(pkg) // as free as the package it supports
	}
	self, listed := packages[pkg]
	if inside && !listed {
		return []string{fmt.Sprintf("package %s is in no layer: decide and add it to layers_test.go", pkg)}, nil
	}
	var found []string
	complain := func(format string, args ...any) { found = append(found, fmt.Sprintf(format, args...)) }
	for _, spec := range file.Imports {
		imported, err := strconv.Unquote(spec.Path.Value)
		if err != nil {
			return nil, err
		}
		for prefix, owner := range edges {
			if inside && !isTest && pkg != owner && strings.HasPrefix(imported, prefix) {
				complain("%s is imported by package %s only", imported, owner)
			}
		}
		target, ours := strings.CutPrefix(imported, module+"/internal/")
		switch {
		case !ours:
		case slices.Contains(testSupport, target):
			if !isTest && !support && !strings.HasPrefix(dir+"/", "bench/") {
				complain("%s is for tests", target)
			}
		case !inside, target == pkg && (isTest || support):
		case !known(target):
			complain("imports %s, which is in no layer", target)
		case packages[target].layer >= self.layer:
			complain("layer %d imports %s of layer %d: imports go down only", self.layer, target, packages[target].layer)
		case slices.Contains(self.mustNotKnow, target):
			complain("%s must not know %s", pkg, target)
		}
	}
	if inside && !isTest && pure(pkg, path.Base(name)) {
		found = append(found, impurities(file)...)
	}
	return found, nil
}

func known(pkg string) bool {
	_, ok := packages[pkg]
	return ok
}

// pure reports whether a file decides and does nothing else. The engine's plan
// fills all of its package but the loop, and what is in state and unit decides
// for engine and agents alike.
func pure(pkg, base string) bool {
	switch pkg {
	case "engine":
		return base != "engine.go"
	case "unit":
		return true
	case "state":
		return base != "feed.go" && base != "registration.go"
	}
	return base == "plan.go"
}

// What a pure function from state to steps cannot need.
var (
	impureImports = []string{"context", "crypto/rand", "log", "log/slog", "math/rand", "math/rand/v2", "net/http", "os", "sync", "sync/atomic"}
	clocks        = []string{"After", "AfterFunc", "NewTicker", "NewTimer", "Now", "Since", "Sleep", "Tick", "Until"}
)

func impurities(file *ast.File) []string {
	var found []string
	clock := "" // what the file calls package time
	for _, spec := range file.Imports {
		imported, _ := strconv.Unquote(spec.Path.Value)
		if slices.Contains(impureImports, imported) {
			found = append(found, "a plan is pure: it must not import "+imported)
		}
		if imported == "time" {
			clock = "time"
			if spec.Name != nil {
				clock = spec.Name.Name
			}
		}
	}
	if clock == "." {
		return append(found, "a plan is pure: it must not import time as .")
	}
	ast.Inspect(file, func(n ast.Node) bool {
		switch n := n.(type) {
		case *ast.GoStmt:
			found = append(found, "a plan is pure: it must not start goroutines")
		case *ast.SelectorExpr:
			if x, ok := n.X.(*ast.Ident); ok && clock != "" && x.Name == clock && slices.Contains(clocks, n.Sel.Name) {
				found = append(found, "a plan is pure: it must not use time."+n.Sel.Name)
			}
		}
		return true
	})
	return found
}

// The rules themselves: each bad file is found out, each good one left alone.
func TestFaults(t *testing.T) {
	for _, tc := range []struct{ name, src, want string }{
		{"internal/router/a.go", `import "flotilla/internal/haproxy"`, ""},
		{"internal/router/a.go", `import "flotilla/internal/dns"`, "layer 5 imports dns of layer 5: imports go down only"},
		{"internal/router/a_test.go", `import "flotilla/internal/dns"`, "layer 5 imports dns of layer 5: imports go down only"},
		{"internal/store/a.go", `import "flotilla/internal/node"`, "layer 3 imports node of layer 8: imports go down only"},
		{"internal/haproxy/a.go", `import "flotilla/internal/catalog"`, "haproxy must not know catalog"},
		{"internal/dns/a.go", `import "flotilla/internal/haproxy"`, "dns must not know haproxy"},
		{"internal/util/a.go", ``, "package util is in no layer: decide and add it to layers_test.go"},
		{"internal/dns/deep/a.go", ``, "package dns/deep is in no layer: decide and add it to layers_test.go"},
		{"internal/node/a.go", `import "flotilla/internal/util"`, "imports util, which is in no layer"},
		{"internal/store/a_test.go", `import "flotilla/internal/store"`, ""},
		{"internal/store/a_test.go", `import "flotilla/internal/store/storetest"`, ""},
		{"internal/store/storetest/a.go", `import "flotilla/internal/store"`, ""},
		{"internal/api/a_test.go", `import "flotilla/internal/store/storetest"`, ""},
		{"internal/api/a.go", `import "flotilla/internal/store/storetest"`, "store/storetest is for tests"},
		{"cmd/flotilla/a.go", `import "flotilla/internal/store/storetest"`, "store/storetest is for tests"},
		{"cmd/flotillad/a.go", `import "flotilla/internal/node"`, ""},
		{"bench/dns/a.go", `import "flotilla/internal/store/storetest"`, ""},
		{"internal/api/a.go", `import "go.etcd.io/etcd/client/v3"`, "go.etcd.io/etcd/client/v3 is imported by package store only"},
		{"internal/api/a_test.go", `import "go.etcd.io/etcd/client/v3"`, ""},
		{"internal/store/storetest/a.go", `import "go.etcd.io/etcd/server/v3/embed"`, ""},
		{"internal/router/plan.go", `import "log/slog"`, "a plan is pure: it must not import log/slog"},
		{"internal/router/loop.go", `import "log/slog"`, ""},
		{"internal/router/plan.go", `import "time"; var _ time.Duration = time.Second`, ""},
		{"internal/router/plan.go", `import t "time"; var _ = t.Now()`, "a plan is pure: it must not use time.Now"},
		{"internal/router/plan.go", `import "time"; var _ = time.Since`, "a plan is pure: it must not use time.Since"},
		{"internal/engine/score.go", `import "os"`, "a plan is pure: it must not import os"},
		{"internal/engine/engine.go", `import "log/slog"`, ""},
		{"internal/engine/sim_test.go", `import "os"`, ""},
		{"internal/router/plan.go", `func f() { go f() }`, "a plan is pure: it must not start goroutines"},
	} {
		found, err := faults(tc.name, []byte("package p\n"+tc.src))
		if err != nil {
			t.Fatal(err)
		}
		if got := strings.Join(found, "; "); got != tc.want {
			t.Errorf("%s with %q: %q, want %q", tc.name, tc.src, got, tc.want)
		}
	}
}
