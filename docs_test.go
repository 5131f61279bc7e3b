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
	"runtime"
	"strings"
	"testing"
	"time"
)

// examplePlugins are the examples by the cookies of their plugins.
var examplePlugins = map[string]func(){
	"greeter":  Example,
	"worker":   ExampleClient_Done,
	"sleeper":  ExampleCall,
	"numberer": ExampleMuxBroker_ServeReader,
	"baker":    ExampleMuxBroker_ServeRPC,
	"shop":     ExampleRegisterError,
	"adder":    ExampleHandshakeConfig_versions,
}

// init runs an example as the main function that it is where godoc shows it:
// the test binary stands in for its plugin.
func init() {
	if main := examplePlugins[os.Getenv("EXAMPLE_PLUGIN")]; main != nil {
		main()
		os.Exit(0)
	}
}

// TestGodocPrograms saves each example as godoc shows it as the
// main.go of a module, builds it, runs it, and compares what it prints.
func TestGodocPrograms(t *testing.T) {
	dir := newModule(t)
	fset, examples := documentedExamples(t)
	if len(examples) != len(examplePlugins) {
		t.Errorf("godoc shows %d examples, and there are %d: one is not named after anything that is exported", len(examples), len(examplePlugins))
	}
	for _, ex := range examples {
		if ex.Play == nil {
			t.Fatalf("the example %q is not a whole program: it uses what its file does not declare", ex.Name)
		}
		var text bytes.Buffer
		if err := format.Node(&text, fset, ex.Play); err != nil {
			t.Fatal(err)
		}
		writeFile(t, filepath.Join(dir, "Example"+ex.Name, "main.go"), text.Bytes())
	}
	bin := filepath.Join(dir, "bin") + string(filepath.Separator)
	runIn(t, dir, "go", "build", "-o", bin, "./...")
	for _, ex := range examples {
		t.Run("Example"+ex.Name, func(t *testing.T) {
			t.Parallel()
			got := runIn(t, dir, filepath.Join(bin, "Example"+ex.Name)+exe)
			if strings.TrimSpace(got) != strings.TrimSpace(ex.Output) {
				t.Errorf("it printed\n%s\nand not\n%s", got, ex.Output)
			}
		})
	}
}

// documentedExamples are the examples that godoc shows.
func documentedExamples(t *testing.T) (*token.FileSet, []*doc.Example) {
	t.Helper()
	fset, pkg := documentation(t)
	all := pkg.Examples
	for _, f := range pkg.Funcs {
		all = append(all, f.Examples...)
	}
	for _, typ := range pkg.Types {
		all = append(all, typ.Examples...)
		for _, f := range append(typ.Funcs, typ.Methods...) {
			all = append(all, f.Examples...)
		}
	}
	return fset, all
}

// TestDocLinks checks that what looks like a link in the documentation is one:
// a link to a name that was changed shows as text in brackets.
func TestDocLinks(t *testing.T) {
	_, pkg := documentation(t)
	texts := map[string]string{"package": pkg.Doc}
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
				t.Errorf("in the documentation of %s, %s is no link", name, link)
			}
		}
	}
}

// documentation is what godoc shows.
func documentation(t *testing.T) (*token.FileSet, *doc.Package) {
	t.Helper()
	fset := token.NewFileSet()
	var files []*ast.File
	names, err := filepath.Glob("*.go")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range names {
		f, err := parser.ParseFile(fset, name, nil, parser.ParseComments)
		if err != nil {
			t.Fatal(err)
		}
		files = append(files, f)
	}
	pkg, err := doc.NewFromFiles(fset, files, "github.com/muxplug/plugin")
	if err != nil {
		t.Fatal(err)
	}
	return fset, pkg
}

// TestReadmeProgram builds the files of the README's first program as the
// README says, and runs it.
func TestReadmeProgram(t *testing.T) {
	readme := readFile(t, "README.md")
	dir := newModule(t)
	blocks := regexp.MustCompile("(?s)```go\n// ([a-z/]+\\.go)\n(.*?)```").FindAllStringSubmatch(readme, -1)
	if len(blocks) != 3 {
		t.Fatalf("the README has %d files, not three", len(blocks))
	}
	for _, block := range blocks {
		name, text := block[1], []byte(block[2])
		if formatted, err := format.Source(text); err != nil || !bytes.Equal(formatted, text) {
			t.Errorf("%s in the README is not formatted: %v", name, err)
		}
		writeFile(t, filepath.Join(dir, name), text)
	}
	for _, command := range []string{"go build -o hello-plugin ./plugin", "go run ."} {
		if !strings.Contains(readme, "\n"+command+"\n") {
			t.Errorf("the README does not say %q", command)
		}
		command = strings.Replace(command, "hello-plugin", "hello-plugin"+exe, 1)
		got := runIn(t, dir, strings.Fields(command)...)
		if want := "Hello, Gopher! <nil>"; command == "go run ." && (got != want+"\n" || !strings.Contains(readme, "`"+want+"`")) {
			t.Errorf("it printed %q; the README must say %q", got, want)
		}
	}
}

// TestReplaceLine builds and runs a program that imports go-plugin, with the
// line in its go.mod that the README gives to those who come from there.
func TestReplaceLine(t *testing.T) {
	const theirs, ours = "github.com/hashicorp/go-plugin", "github.com/muxplug/plugin"
	dir := newModule(t)
	if line := "go mod edit -replace=" + theirs + "=../plugin"; !strings.Contains(readFile(t, "README.md"), "\n"+line+"\n") {
		t.Errorf("the README does not say %q", line)
	}
	mod := filepath.Join(dir, "go.mod")
	writeFile(t, mod, []byte(strings.ReplaceAll(readFile(t, mod), ours, theirs)))
	fset, examples := documentedExamples(t)
	for _, ex := range examples {
		if ex.Name == "" {
			var text bytes.Buffer
			if err := format.Node(&text, fset, ex.Play); err != nil {
				t.Fatal(err)
			}
			writeFile(t, filepath.Join(dir, "main.go"), bytes.ReplaceAll(text.Bytes(), []byte(ours), []byte(theirs)))
		}
	}
	if got := runIn(t, dir, "go", "run", "."); got != "Hello!\n" {
		t.Errorf("it printed %q", got)
	}
}

// TestReadmeCommands checks that what the README tells to run is what the
// checks before a merge run, and that the files it links to are there.
func TestReadmeCommands(t *testing.T) {
	readme, ci := readFile(t, "README.md"), readFile(t, ".ci/run")
	for _, command := range []string{"go test -v -run Example .", "go test ./..."} {
		if !strings.Contains(readme, "\n"+command+"\n") {
			t.Errorf("the README does not have the command %q", command)
		}
	}
	if !strings.Contains(ci, "\ngo test ./...\n") {
		t.Error(".ci/run does not run the README's go test ./...")
	}
	for _, link := range regexp.MustCompile(`\]\(([A-Za-z0-9._/-]+)\)`).FindAllStringSubmatch(readme, -1) {
		if _, err := os.Stat(link[1]); err != nil {
			t.Errorf("the README links to what is not there: %v", err)
		}
	}
}

// exe ends the name of a program.
var exe = map[bool]string{true: ".exe"}[runtime.GOOS == "windows"]

// newModule makes a module that requires this one, as it is here, and returns
// its directory.
func newModule(t *testing.T) string {
	t.Helper()
	here, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	mod := strings.Replace(readFile(t, "go.mod"), "module github.com/muxplug/plugin", "module example.com/greeter", 1)
	mod += "\nrequire github.com/muxplug/plugin v0.0.0\n\nreplace github.com/muxplug/plugin => " + here + "\n"
	writeFile(t, filepath.Join(dir, "go.mod"), []byte(mod))
	writeFile(t, filepath.Join(dir, "go.sum"), []byte(readFile(t, "go.sum")))
	return dir
}

func readFile(t *testing.T, name string) string {
	t.Helper()
	text, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return strings.ReplaceAll(string(text), "\r\n", "\n")
}

func writeFile(t *testing.T, path string, text []byte) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, text, 0o644); err != nil {
		t.Fatal(err)
	}
}

// runIn runs a command in a directory and returns its stdout.
func runIn(t *testing.T, dir string, args ...string) string {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), args[0], args[1:]...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "GOFLAGS=-mod=mod", "GOWORK=off")
	cmd.WaitDelay = 20 * time.Second
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s: %v\n%s%s", strings.Join(args, " "), err, out, stderr.String())
	}
	return string(out)
}
