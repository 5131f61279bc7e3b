package plugin_test

import (
	"bytes"
	"go/ast"
	"go/doc"
	"go/format"
	"go/parser"
	"go/token"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"
)

// What the documentation shows is checked here: the commands, programs, links
// and examples in README.md and in godoc.

var readmeCommands = []string{
	"go run ./examples/greeter",
	"go test ./...",
	// The first program, which .ci/readme follows to the letter.
	"go mod init example.com/greeter",
	"go mod edit -require=github.com/muxplug/plugin@v0.0.0 -replace=github.com/muxplug/plugin=../plugin",
	"go mod tidy",
	"go build -o hello-plugin ./plugin",
	"go run .",
	// Migrating, which .ci/migrate does.
	"go mod edit -replace=github.com/hashicorp/go-plugin=../plugin/compat" +
		" -replace=github.com/muxplug/plugin=../plugin",
	"go mod tidy",
	`perl -pi -e 's,"github.com/hashicorp/go-plugin","github.com/muxplug/plugin",' *.go`,
	"go mod edit -dropreplace=github.com/hashicorp/go-plugin",
}

// codeBlock matches a block of code in Markdown: its language, the name of the
// file if the first line has one, and the text.
var codeBlock = regexp.MustCompile("(?s)```(go|sh)\n(?:// ([a-z/]+\\.go)\n)?(.*?)```")

// TestReadme builds and runs the first program, and finds the commands and the
// other Go code where they are tested.
func TestReadme(t *testing.T) {
	t.Parallel()
	readme := readFile(t, "README.md")
	dir := newModule(t)
	var sources, snippets, commands []string
	for _, name := range []string{"examples/greeter/main.go", "examples/greeter/main_test.go"} {
		sources = append(sources, readFile(t, name))
	}
	for _, block := range codeBlock.FindAllStringSubmatch(readme, -1) {
		switch language, name, text := block[1], block[2], block[3]; {
		case language == "sh":
			commands = append(commands, strings.Split(strings.TrimSpace(text), "\n")...)
		case name == "":
			snippets = append(snippets, text)
		default:
			sources = append(sources, text)
			writeFile(t, filepath.Join(dir, name), text)
			if formatted, err := format.Source([]byte(text)); err != nil || string(formatted) != text {
				t.Errorf("%s in the README is not formatted: %v", name, err)
			}
		}
	}
	if !slices.Equal(commands, readmeCommands) {
		t.Errorf("the README has the commands\n%s\nand should have\n%s",
			strings.Join(commands, "\n"), strings.Join(readmeCommands, "\n"))
	}
	for _, snippet := range snippets {
		if !strings.Contains(flat(sources...), flat(snippet)) {
			t.Errorf("the README has code that is in no example:\n%s", snippet)
		}
	}
	runIn(t, dir, "go", "build", "-o", "hello-plugin"+exe, "./plugin")
	got := runIn(t, dir, "go", "run", ".")
	if !strings.Contains(readme, "prints `"+strings.TrimSpace(got)+"`") {
		t.Errorf("the first program prints %q, and the README says something else", got)
	}
	for _, link := range regexp.MustCompile(`\]\(([A-Za-z0-9._/-]+)[)#]`).FindAllStringSubmatch(readme, -1) {
		if _, err := os.Stat(link[1]); err != nil {
			t.Errorf("the README has a broken link: %v", err)
		}
	}
}

// flat joins texts without their indentation.
func flat(texts ...string) string {
	return regexp.MustCompile(`(?m)^[\t ]+`).ReplaceAllString(strings.Join(texts, "\n"), "")
}

// TestPackageDoc checks that the code in the package's documentation is tested:
// its program is the README's, and the rest is in the examples.
func TestPackageDoc(t *testing.T) {
	t.Parallel()
	_, pkg := documentation(t)
	program := flat(pkg.Doc)
	for _, block := range codeBlock.FindAllStringSubmatch(readFile(t, "README.md"), -1) {
		if block[2] != "" && !strings.Contains(program, flat(block[3])) {
			t.Errorf("the package documentation does not have %s of the README", block[2])
		}
	}
	_, byHand, _ := strings.Cut(pkg.Doc, "# A plugin by hand")
	examples := flat(readFile(t, "example_test.go"))
	for _, code := range regexp.MustCompile(`(?m)(?:^\t.*\n+)+`).FindAllString(byHand, -1) {
		if strings.Contains(code, "func ") && !strings.Contains(examples, flat(code)) {
			t.Errorf("the package documentation has code that is in no example:\n%s", code)
		}
	}
}

// TestGodocExamples checks that godoc shows every example, as a whole program
// that builds. What they print is checked where they run as tests.
func TestGodocExamples(t *testing.T) {
	t.Parallel()
	dir := newModule(t)
	fset, pkg := documentation(t)
	examples := pkg.Examples
	for _, f := range pkg.Funcs {
		examples = append(examples, f.Examples...)
	}
	for _, typ := range pkg.Types {
		examples = append(examples, typ.Examples...)
		for _, f := range append(typ.Funcs, typ.Methods...) {
			examples = append(examples, f.Examples...)
		}
	}
	checkEqual(t, "examples that godoc shows", len(examples), len(examplePlugins))
	for _, ex := range examples {
		if ex.Play == nil {
			t.Fatalf("Example%s uses something that its file does not declare", ex.Name)
		}
		var text bytes.Buffer
		check(t, format.Node(&text, fset, ex.Play))
		writeFile(t, filepath.Join(dir, "Example"+ex.Name, "main.go"), text.String())
	}
	runIn(t, dir, "go", "vet", "./...")
}

// TestDocLinks checks that the documentation has no link to a name that does not
// exist, and none where godoc does not show links.
func TestDocLinks(t *testing.T) {
	t.Parallel()
	fset, pkg := documentation(t)
	texts := map[string]string{"the package": pkg.Doc}
	addFuncs := func(funcs []*doc.Func) {
		for _, f := range funcs {
			texts[f.Recv+"."+f.Name] = f.Doc
		}
	}
	addFuncs(pkg.Funcs)
	values := append(pkg.Consts, pkg.Vars...)
	for _, typ := range pkg.Types {
		texts[typ.Name] = typ.Doc
		addFuncs(append(typ.Funcs, typ.Methods...))
		values = append(append(values, typ.Consts...), typ.Vars...)
	}
	for _, v := range values {
		texts[v.Names[0]] = v.Doc
	}
	bracketed := regexp.MustCompile(`\[\*?(\w+\.)?[A-Z]\w*[a-z]\w*(\.\w+)?\]`)
	for name, text := range texts {
		shown := strings.ReplaceAll(string(pkg.Markdown(text)), `\`, "")
		for _, link := range bracketed.FindAllString(shown, -1) {
			if !strings.Contains(shown, link+"(") {
				t.Errorf("in the documentation of %s, %s is not a link", name, link)
			}
		}
	}
	for _, v := range values {
		ast.Inspect(v.Decl, func(n ast.Node) bool {
			group, ok := n.(*ast.CommentGroup)
			if ok && group != v.Decl.Doc && bracketed.MatchString(group.Text()) {
				t.Errorf("%v: godoc shows no links here", fset.Position(group.Pos()))
			}
			return true
		})
	}
}

// documentation is what godoc shows.
func documentation(t *testing.T) (*token.FileSet, *doc.Package) {
	t.Helper()
	fset := token.NewFileSet()
	var files []*ast.File
	names, err := filepath.Glob("*.go")
	check(t, err)
	for _, name := range names {
		f, err := parser.ParseFile(fset, name, nil, parser.ParseComments)
		check(t, err)
		files = append(files, f)
	}
	pkg, err := doc.NewFromFiles(fset, files, "github.com/muxplug/plugin")
	check(t, err)
	return fset, pkg
}

// newModule makes a module that requires this one, as it is here, and returns
// its directory. It needs no network.
func newModule(t *testing.T) string {
	t.Helper()
	here, err := os.Getwd()
	check(t, err)
	dir := t.TempDir()
	mod := readFile(t, "go.mod")
	mod = strings.Replace(mod, "module github.com/muxplug/plugin", "module example.com/greeter", 1)
	mod += "\nrequire github.com/muxplug/plugin v0.0.0\n\nreplace github.com/muxplug/plugin => " + here + "\n"
	writeFile(t, filepath.Join(dir, "go.mod"), mod)
	writeFile(t, filepath.Join(dir, "go.sum"), readFile(t, "go.sum"))
	return dir
}

func readFile(t *testing.T, name string) string {
	t.Helper()
	text, err := os.ReadFile(name)
	check(t, err)
	return strings.ReplaceAll(string(text), "\r\n", "\n")
}

func writeFile(t *testing.T, path, text string) {
	t.Helper()
	check(t, os.MkdirAll(filepath.Dir(path), 0o755))
	check(t, os.WriteFile(path, []byte(text), 0o644))
}

// runIn runs a command in a directory and returns its stdout.
func runIn(t *testing.T, dir string, args ...string) string {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), args[0], args[1:]...)
	cmd.Dir = dir
	// Without symbols, as linking takes most of the time.
	cmd.Env = append(os.Environ(), "GOFLAGS=-mod=mod -ldflags=-s", "GOWORK=off")
	cmd.WaitDelay = 20 * time.Second
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s: %v\n%s%s", strings.Join(args, " "), err, out, stderr.String())
	}
	return string(out)
}
