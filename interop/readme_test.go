package interop

import (
	"flag"
	"fmt"
	"os"
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
