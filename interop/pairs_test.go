package interop

import (
	"bytes"
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/muxplug/plugin/interop/internal/build"
)

var update = flag.Bool("update", false, "write the table in README.md")

// pair is a host and a plugin, each built with one of the libraries.
type pair struct{ host, plugin build.Library }

var pairs = []pair{
	{build.Ours, build.Ours},
	{build.Ours, build.GoPlugin},
	{build.GoPlugin, build.Ours},
	{build.GoPlugin, build.GoPlugin},
}

func (p pair) String() string { return string(p.host) + " host, " + string(p.plugin) + " plugin" }

// check is one thing that the host program can check.
type check struct{ name, what string }

// checks asks the host program what it can check; each host must know the same.
func checks(t *testing.T) (list []check) {
	t.Helper()
	var before []byte
	for _, lib := range []build.Library{build.Ours, build.GoPlugin} {
		out, err := exec.Command(program{"host", lib}.path(t), "-list").Output()
		if err != nil {
			t.Fatal(err)
		}
		if before != nil && !bytes.Equal(out, before) {
			t.Fatalf("one host can check %s, and the other %s", before, out)
		}
		before = out
	}
	var names [][2]string
	if err := json.Unmarshal(before, &names); err != nil || len(names) == 0 {
		t.Fatalf("%s: %v", before, err)
	}
	for _, n := range names {
		list = append(list, check{n[0], n[1]})
	}
	return list
}

// outcome is what a check of a pair came to: "" if it passed.
type outcome struct {
	pair  pair
	check string
}

var outcomes sync.Map // outcome to a func() string

// of runs a check, once in a test run: the table needs its outcome, too.
func (o outcome) of(t *testing.T) string {
	t.Helper()
	host, plugin := program{"host", o.pair.host}.path(t), program{"plugin", o.pair.plugin}.path(t)
	f, _ := outcomes.LoadOrStore(o, sync.OnceValue(func() string { return runCheck(host, plugin, o.check, o.pair.host == build.Ours) }))
	return f.(func() string)()
}

// runCheck runs a host with one check and returns what is wrong. A go-plugin
// host does not remove the socket of a plugin that it has killed or that
// crashed, so files are held against ours alone.
func runCheck(host, plugin, check string, oursHost bool) string {
	dir, err := os.MkdirTemp("", "c-*")
	if err != nil {
		return err.Error()
	}
	defer os.RemoveAll(dir)
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, host, "-plugin", plugin, "-check", check)
	cmd.Env = append(os.Environ(), "TMPDIR="+dir)
	cmd.WaitDelay = hangs
	out, err := cmd.CombinedOutput()
	if err != nil {
		return fmt.Sprintf("%v: %s", err, out)
	}
	left := func() string { return processesLeft(dir) }
	if oursHost {
		left = func() string { return processesLeft(dir) + filesLeft(dir) }
	}
	if what := nothing(left); what != "" {
		return "left behind: " + what
	}
	return ""
}

// TestPairs runs every check with all four pairs.
func TestPairs(t *testing.T) {
	list := checks(t)
	for _, p := range pairs {
		t.Run(p.String(), func(t *testing.T) {
			for _, c := range list {
				t.Run(c.name, func(t *testing.T) {
					t.Parallel()
					if wrong := (outcome{p, c.name}).of(t); wrong != "" {
						t.Error(wrong)
					}
				})
			}
		})
	}
}

const (
	tableBegin = "<!-- The tests write this table: go test -run Table -update -->\n"
	tableEnd   = "<!-- end of the table -->\n"
)

// TestTable checks that the table in README.md is what the tests find.
func TestTable(t *testing.T) {
	readme, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	before, rest, found := strings.Cut(string(readme), tableBegin)
	old, after, found2 := strings.Cut(rest, tableEnd)
	if !found || !found2 {
		t.Fatal("README.md has no place for the table")
	}
	table := table(t)
	if table == old {
		return
	}
	if !*update {
		t.Fatalf("the table in README.md is not current: run the tests with -update; it should be\n%s", table)
	}
	if err := os.WriteFile("README.md", []byte(before+tableBegin+table+tableEnd+after), 0o666); err != nil {
		t.Fatal(err)
	}
}

func table(t *testing.T) string {
	var b strings.Builder
	version := func(module string) string {
		v, err := builder.Version(module)
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
	fmt.Fprintf(&b, "Run against go-plugin %s, with yamux %s on both sides. The columns are the\nhost and the plugin; *ours* is this library, *theirs* is go-plugin.\n\n",
		version("github.com/hashicorp/go-plugin"), version("github.com/hashicorp/yamux"))
	b.WriteString("| what |")
	name := map[build.Library]string{build.Ours: "ours", build.GoPlugin: "theirs"}
	for _, p := range pairs {
		fmt.Fprintf(&b, " %s → %s |", name[p.host], name[p.plugin])
	}
	b.WriteString("\n| --- |" + strings.Repeat(" --- |", len(pairs)) + "\n")
	// As TestPairs has it, a few at a time; the outcomes are kept.
	list := checks(t)
	t.Run("pairs", func(t *testing.T) {
		for _, c := range list {
			for _, p := range pairs {
				t.Run(p.String()+", "+c.name, func(t *testing.T) {
					t.Parallel()
					outcome{p, c.name}.of(t)
				})
			}
		}
	})
	for _, c := range list {
		fmt.Fprintf(&b, "| %s |", c.what)
		for _, p := range pairs {
			fmt.Fprintf(&b, " %s |", yes(outcome{p, c.name}.of(t) == ""))
		}
		b.WriteString("\n")
	}
	b.WriteString("\nWhat only one of the libraries has:\n\n| who | what | what comes of it | so it is |\n| --- | --- | --- | --- |\n")
	for i, p := range peerTests {
		t.Run(p.what, func(t *testing.T) {
			fmt.Fprintf(&b, "| %s | %s | %s | %s |\n", p.group, p.what, p.outcome, yes(p.of(t, i) == nil))
		})
	}
	return b.String()
}

func yes(b bool) string {
	if b {
		return "yes"
	}
	return "no"
}
