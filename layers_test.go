package plugin_test

import (
	"errors"
	"go/ast"
	"go/parser"
	"go/token"
	"go/types"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// A file uses only files that are below it in the table of CONTRIBUTING.md.
func TestLayers(t *testing.T) {
	rows := tableOfFiles(t)
	for _, use := range usesBetweenFiles(t) {
		from, fromKnown := rows[use.from]
		to, toKnown := rows[use.to]
		if !fromKnown || !toKnown {
			continue // reported below
		}
		if from >= to {
			t.Errorf("%v: %s is of %s, which is not below", use.position, use.name, use.to)
		}
	}
	files := sourceFiles(t)
	for _, name := range files {
		if _, known := rows[name]; !known {
			t.Errorf("the table in CONTRIBUTING.md has no %s", name)
		}
	}
	for name := range rows {
		if !slices.Contains(files, name) {
			t.Errorf("the table in CONTRIBUTING.md has %s, which does not exist", name)
		}
	}
}

// tableOfFiles returns the rows of the files in the table of CONTRIBUTING.md.
func tableOfFiles(t *testing.T) map[string]int {
	t.Helper()
	text, err := os.ReadFile("CONTRIBUTING.md")
	check(t, err)
	rows := make(map[string]int)
	row := regexp.MustCompile("(?m)^\\| [^|]*\\| `(\\w+\\.go)` \\|")
	for i, match := range row.FindAllStringSubmatch(string(text), -1) {
		rows[match[1]] = i
	}
	return rows
}

// sourceFiles returns the names of the files of the package that are no tests.
func sourceFiles(t *testing.T) []string {
	t.Helper()
	names, err := filepath.Glob("*.go")
	check(t, err)
	return slices.DeleteFunc(names, func(name string) bool { return strings.HasSuffix(name, "_test.go") })
}

// use is a use of a name of the package in another file than the one that declares it.
type use struct {
	from, to string // files
	name     string
	position token.Position
}

// usesBetweenFiles returns the uses of the package's names: types, functions, variables,
// constants and methods. Imports are not resolved, which would take seconds, so a method is
// missing if the type of its receiver comes out of another package.
func usesBetweenFiles(t *testing.T) []use {
	t.Helper()
	fileSet := token.NewFileSet()
	var files []*ast.File
	for _, name := range sourceFiles(t) {
		file, err := parser.ParseFile(fileSet, name, nil, parser.SkipObjectResolution)
		check(t, err)
		files = append(files, file)
	}
	info := &types.Info{Uses: make(map[*ast.Ident]types.Object)}
	config := &types.Config{
		Importer: noImports{},
		Error:    func(error) {}, // of what is imported
	}
	pkg, _ := config.Check("plugin", fileSet, files, info) // the error is of what is imported
	var uses []use
	for identifier, object := range info.Uses {
		if object.Pkg() != pkg || !isOfPackage(object) {
			continue
		}
		position := fileSet.Position(identifier.Pos())
		declared := fileSet.Position(object.Pos())
		if position.Filename != declared.Filename {
			uses = append(uses, use{
				from:     position.Filename,
				to:       declared.Filename,
				name:     object.Name(),
				position: position,
			})
		}
	}
	if len(uses) < 100 {
		t.Fatalf("only %d uses were found", len(uses))
	}
	slices.SortFunc(uses, func(a, b use) int {
		return strings.Compare(a.position.String(), b.position.String())
	})
	return uses
}

// isOfPackage reports whether an object is declared at the level of the package or is a
// method.
func isOfPackage(object types.Object) bool {
	function, isFunction := object.(*types.Func)
	return object.Parent() == object.Pkg().Scope() || isFunction && function.Signature().Recv() != nil
}

type noImports struct{}

func (noImports) Import(path string) (*types.Package, error) {
	return nil, errors.New("not resolved here")
}
