package interop

import (
	"flag"
	"fmt"
	"go/importer"
	"go/token"
	"go/types"
	"io"
	"maps"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/muxplug/plugin/interop/internal/build"
)

var update = flag.Bool("update", false, "write the tables in README.md")

// TestPairsTable checks that README.md has what TestPairs and TestPeers check.
func TestPairsTable(t *testing.T) {
	version, err := builder.Version(goPluginPath)
	ok(t, err)
	var b strings.Builder
	fmt.Fprintf(&b, "| what | %s | %s | %s |\n| --- | --- | --- | --- |\n", version, build.V1_4, build.V1_0)
	for _, c := range checks(t) {
		fmt.Fprintf(&b, "| %s |", c[1])
		for _, lib := range []build.Library{build.GoPlugin, build.V1_4, build.V1_0} {
			b.WriteString(map[bool]string{true: " yes |", false: " no API |"}[has(lib, c[0])])
		}
		b.WriteString("\n")
	}
	fmt.Fprintf(&b, "\nWhat only one of the libraries has, with %s:\n\n| who | what | what comes of it |\n| --- | --- | --- |\n", version)
	for _, p := range peerTests {
		fmt.Fprintf(&b, "| %s | %s | %s |\n", p.group, p.what, p.outcome)
	}
	checkSection(t, "pairs", b.String())
}

// checkSection checks or writes a part of README.md.
func checkSection(t *testing.T, name, want string) {
	t.Helper()
	text, err := os.ReadFile("README.md")
	ok(t, err)
	begin, end := "<!-- "+name+": go test -run Table -update -->\n", "<!-- end -->\n"
	before, rest, found := strings.Cut(string(text), begin)
	got, after, found2 := strings.Cut(rest, end)
	must(t, found && found2, "README.md has no place for the section %s", name)
	if *update {
		ok(t, os.WriteFile("README.md", []byte(before+begin+want+end+after), 0o666))
	} else if got != want {
		t.Errorf("README.md is not current: run the tests with -update; the section %s should be\n%s", name, want)
	}
}

const goPluginPath = "github.com/hashicorp/go-plugin"

// differences has patterns for the names that compat has not, or has with another
// type, and the reasons.
var differences = []struct{ pattern, reason string }{
	{`GRPC|^NetRPCUnsupportedPlugin$`, "absent: there is no gRPC"},
	{`^ClientConfig\.RunnerFunc$|^runner\.(Runner|AddrTranslator)$`, "absent: plugins are processes on this machine"},
	{`^runner\.AttachedRunner$`, "lacks the two methods that translate addresses; a type that has them fits"},
	{`^ReattachConfig\.ReattachFunc$`, "has the type of the function itself; a `runner.ReattachFunc` fits"},
	{`^MuxBroker\.(Mutex|Lock|TryLock|Unlock)$`, "absent: the broker's lock is its own"},
	{`^Test(RPC|PluginRPC)?Conn$`, "take a `*testing.T`, `*testing.B` or `testing.TB`, without package testing in the binary"},
}

// TestAPITable compares the API of compat with go-plugin's: but for the
// differences, every name is there with the same type.
func TestAPITable(t *testing.T) {
	theirs, ours := api(t, build.GoPlugin), api(t, build.Ours)
	found := make([][]string, len(differences))
	for _, name := range slices.Sorted(maps.Keys(theirs)) {
		of, _, _ := strings.Cut(name, ".")
		if theirs[name] == ours[name] || of != name && theirs[of] != "" && ours[of] == "" {
			continue
		}
		i := slices.IndexFunc(differences, func(d struct{ pattern, reason string }) bool {
			return regexp.MustCompile(d.pattern).MatchString(name)
		})
		if i < 0 {
			t.Errorf("%s is %q in go-plugin, and %q in compat", name, theirs[name], ours[name])
			continue
		}
		found[i] = append(found[i], "`"+name+"`")
	}
	var b strings.Builder
	b.WriteString("| go-plugin | with `compat` |\n| --- | --- |\n")
	for i, d := range differences {
		must(t, found[i] != nil, "no difference matches %s", d.pattern)
		fmt.Fprintf(&b, "| %s | %s |\n", strings.Join(found[i], ", "), d.reason)
	}
	checkSection(t, "api", b.String())
}

// api describes what go-plugin's packages export with a library: each name, and
// each field and method of a type.
func api(t *testing.T, lib build.Library) map[string]string {
	t.Helper()
	packages := []string{goPluginPath, goPluginPath + "/runner"}
	lines, err := builder.List(lib, "{{.ImportPath}} {{.Export}}", packages...)
	ok(t, err)
	files := make(map[string]string)
	for _, line := range lines {
		path, file, _ := strings.Cut(line, " ")
		files[path] = file
	}
	imports := importer.ForCompiler(token.NewFileSet(), "gc", func(path string) (io.ReadCloser, error) { return os.Open(files[path]) })
	described := make(map[string]string)
	for _, path := range packages {
		pkg, err := imports.Import(path)
		ok(t, err)
		for _, name := range pkg.Scope().Names() {
			if obj := pkg.Scope().Lookup(name); obj.Exported() {
				describe(described, strings.TrimPrefix(pkg.Name()+"."+name, "plugin."), obj)
			}
		}
	}
	return described
}

// describe adds what there is to say of one name.
func describe(described map[string]string, name string, obj types.Object) {
	described[name] = typeText(obj.Type())
	if c, ok := obj.(*types.Const); ok {
		described[name] += " = " + c.Val().String()
	}
	if _, ok := obj.(*types.TypeName); !ok {
		return
	}
	described[name] = "type " + typeText(obj.Type().Underlying())
	if s, ok := obj.Type().Underlying().(*types.Struct); ok {
		described[name] = "struct"
		for field := range s.Fields() {
			if field.Exported() {
				described[name+"."+field.Name()] = fmt.Sprint(typeText(field.Type()), field.Embedded())
			}
		}
	}
	for method := range types.NewMethodSet(types.NewPointer(obj.Type())).Methods() {
		if method.Obj().Exported() {
			described[name+"."+method.Obj().Name()] = typeText(method.Type())
		}
	}
}

// typeText is a type without the names of parameters. What belongs to either
// library has the package plugin.
func typeText(t types.Type) string {
	if s, ok := t.(*types.Signature); ok {
		t = types.NewSignatureType(nil, nil, nil, unnamed(s.Params()), unnamed(s.Results()), s.Variadic())
	}
	text := types.TypeString(t, func(p *types.Package) string { return strings.Replace(p.Name(), "runner", "plugin", 1) })
	return strings.ReplaceAll(text, "interface{}", "any")
}

func unnamed(tuple *types.Tuple) *types.Tuple {
	var vars []*types.Var
	for v := range tuple.Variables() {
		vars = append(vars, types.NewParam(token.NoPos, nil, "", v.Type()))
	}
	return types.NewTuple(vars...)
}
