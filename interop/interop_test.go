// Package interop tests this library against go-plugin.
package interop

import (
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/muxplug/plugin/interop/internal/build"
)

// hangs is the bound on everything that takes no time unless it hangs.
const hangs = 20 * time.Second

// builder builds into a directory that TestMain removes.
var builder *build.Builder

func TestMain(m *testing.M) { os.Exit(runTests(m)) }

// runTests runs the tests in a temporary directory of their own, and fails if
// they leave a file, process or goroutine behind.
func runTests(m *testing.M) int {
	bin, err := os.MkdirTemp("", "bin-*")
	if err != nil {
		panic(err)
	}
	defer os.RemoveAll(bin)
	if builder, err = build.New(bin); err != nil {
		panic(err)
	}
	tmp, err := os.MkdirTemp("", "io-*")
	if err != nil {
		panic(err)
	}
	defer os.RemoveAll(tmp)
	os.Setenv("TMPDIR", tmp)
	before := runtime.NumGoroutine()
	code := m.Run()
	left := nothing(func() string { return processesLeft(tmp) + filesLeft(tmp) + goroutinesLeft(before) })
	if left != "" {
		fmt.Fprintln(os.Stderr, "the tests left behind:", left)
		return 1
	}
	return code
}

// nothing waits until left finds nothing, for a while, and returns what it found.
func nothing(left func() string) (found string) {
	poll(func() bool {
		found = left()
		return found == ""
	})
	return found
}

func filesLeft(dir string) string {
	entries, err := os.ReadDir(dir)
	if len(entries) == 0 && err == nil {
		return ""
	}
	return fmt.Sprintf("files: %v %v\n", entries, err)
}

// processesLeft returns the processes whose TMPDIR is dir.
func processesLeft(dir string) (left string) {
	for _, pid := range processesWith("TMPDIR=" + dir) {
		cmdline, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
		left += fmt.Sprintf("process %d: %q\n", pid, cmdline)
	}
	return left
}

// goroutinesLeft returns all stacks if there are more goroutines than that,
// not counting those that a go-plugin host in this process leaves behind.
func goroutinesLeft(before int) string {
	buf := make([]byte, 4<<20)
	stacks := strings.Split(string(buf[:runtime.Stack(buf, true)]), "\n\n")
	stacks = slices.DeleteFunc(stacks, func(s string) bool {
		return strings.Contains(s, "github.com/hashicorp/go-plugin")
	})
	if len(stacks) <= before {
		return ""
	}
	return strings.Join(stacks, "\n\n")
}

// poll waits until a condition holds, for a while.
func poll(holds func() bool) bool {
	for end := time.Now().Add(5 * time.Second); !holds(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			return false
		}
	}
	return true
}

// processesWith returns the processes but this one that were started with a
// variable in their environment and are not zombies.
func processesWith(variable string) (pids []int) {
	dirs, _ := filepath.Glob("/proc/[0-9]*")
	for _, dir := range dirs {
		pid, _ := strconv.Atoi(filepath.Base(dir))
		env, _ := os.ReadFile(dir + "/environ") // empty for a zombie
		if pid != os.Getpid() && slices.Contains(strings.Split(string(env), "\x00"), variable) {
			pids = append(pids, pid)
		}
	}
	return pids
}

func ok(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// program is a program that is built when it is first asked for.
type program struct {
	pkg string
	lib build.Library
}

var programs sync.Map // program to a func() (string, error)

// path returns the binary's path.
func (p program) path(t *testing.T) string {
	t.Helper()
	f, _ := programs.LoadOrStore(p, sync.OnceValues(func() (string, error) {
		return builder.Program(p.pkg, p.lib)
	}))
	path, err := f.(func() (string, error))()
	ok(t, err)
	return path
}
