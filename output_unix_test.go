//go:build unix

package plugin_test

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/muxplug/plugin"
)

var keptStdout *os.File // by the step "keep stdout"

func init() {
	// What a program prints just before its end.
	modes["speak"] = func() {
		fmt.Print(strings.Repeat("x", 10_000), "goodbye")
		fmt.Fprint(os.Stderr, "fatal: cannot open the database")
	}
	for _, end := range []string{"exit0", "exit3", "panic", "killed"} {
		modes["speak, "+end] = func() {
			modes["speak"]()
			modes[end]()
		}
	}
	modes["keep stdout"] = func() { keptStdout = os.Stdout }
	modes["use kept stdout"] = func() { must(keptStdout.WriteString("kept")) }
	// Keeps os.Stdout of the plugin of the host in a variable of that.
	modes["keeping"] = func() { mustDo(hostedTest(), "keep stdout") }
	// The same as a step of the plugin's main function.
	modes["use-kept"] = modes["use kept stdout"]
	modes["use foreign"] = func() {
		if _, err := syscall.Write(5, []byte("foreign")); err != nil {
			panic(err)
		}
	}
}

// mustDo runs a mode in the plugin.
func mustDo(test *testClient, mode string) {
	if err := test.Call("Plugin.Do", mode, new(string)); err != nil {
		panic(err)
	}
}

// What a method prints just before the process ends has arrived when the call fails, and
// the error has it.
func TestLastWords(t *testing.T) {
	t.Parallel()
	for _, end := range []string{"exit0", "exit3", "panic", "killed"} {
		t.Run(end, func(t *testing.T) {
			t.Parallel()
			for range 10 {
				var stdout, stderr syncBuffer
				cfg := newLab(t).config("plugin")
				cfg.SyncStdout, cfg.SyncStderr = &stdout, &stderr
				c, p := startPlugin(t, cfg)
				err := dispense(t, p).Call("Plugin.Do", "speak, "+end, new(string))
				if !strings.HasSuffix(stdout.String(), "xgoodbye") {
					t.Errorf("the last words on stdout are %q", stdout.String())
				}
				checkEqual(t, "stderr", stderr.String(), "fatal: cannot open the database")
				var exit *plugin.ExitError
				if !errors.As(err, &exit) || !strings.Contains(exit.Stderr, "database") {
					t.Fatalf("the error is %+v", err)
				}
				if end == "panic" {
					errorSays(t, err, "panic: boom")
				} else {
					errorSays(t, err, "cannot open the database")
				}
				c.Kill()
			}
		})
	}
}

// Last words without a writer are logged, also a last line without its end.
func TestLastWordsToLog(t *testing.T) {
	t.Parallel()
	cfg := newLab(t).config("plugin")
	logger, records := recorder()
	cfg.Logger = logger
	_, p := startPlugin(t, cfg)
	_ = dispense(t, p).Call("Plugin.Do", "speak, exit3", new(string))
	for _, text := range []string{"goodbye", "database"} {
		found := records.find(text)
		if len(found) != 1 || found[0].level != hclog.Debug {
			t.Errorf("%s is logged as %v", text, found)
		}
	}
}

// ExitError.Stderr has what was written to the process's stderr and to os.Stderr in the
// order in which it arrived.
func TestOrderOfStderr(t *testing.T) {
	t.Parallel()
	var stderr, raw syncBuffer
	cfg := newLab(t).config("plugin")
	cfg.SyncStderr, cfg.Stderr = &stderr, &raw
	c, p := startPlugin(t, cfg)
	test := dispense(t, p)
	var want strings.Builder
	for i := range 20 {
		toRaw, served := fmt.Sprintf("raw %d\n", i), fmt.Sprintf("served %d\n", i)
		mustCall[struct{}](t, test.Client, "Print", Output{Raw: toRaw})
		await(t, "stderr of the process", func() bool { return strings.HasSuffix(raw.String(), toRaw) })
		mustCall[struct{}](t, test.Client, "Print", Output{Stderr: served})
		await(t, "os.Stderr", func() bool { return strings.HasSuffix(stderr.String(), served) })
		want.WriteString(toRaw + served)
	}
	_ = test.Call("Plugin.Do", "exit3", new(string))
	receive(t, "Done", c.Done())
	var exit *plugin.ExitError
	if !errors.As(c.Err(), &exit) || exit.Stderr != want.String() {
		t.Errorf("the plugin ended with %+v", c.Err())
	}
}

// What a child of the plugin still holds open delays neither the end of the plugin nor its
// last words.
func TestLastWordsBesideGrandchild(t *testing.T) {
	t.Parallel()
	var stdout syncBuffer
	cfg := newLab(t).config("plugin")
	cfg.SyncStdout = &stdout
	c, p := startPlugin(t, cfg)
	test := dispense(t, p)
	defer signalTo(t, mustCall[int](t, test.Client, "Fork", []string{"sleep", "1000"}), syscall.SIGKILL)
	_ = test.Call("Plugin.Do", "speak, exit3", new(string))
	within(t, "Done", 0, func() { <-c.Done() })
	if !strings.HasSuffix(stdout.String(), "xgoodbye") {
		t.Errorf("the last words are %q", stdout.String())
	}
}

// A child of the plugin that prints without an end does not keep the plugin from its own.
func TestNoisyGrandchild(t *testing.T) {
	t.Parallel()
	cfg := newLab(t).config("plugin")
	cfg.SyncStdout = io.Discard
	c, p := startPlugin(t, cfg)
	test := dispense(t, p)
	mustCall[int](t, test.Client, "Fork", []string{"yes"}) // ends when nobody reads
	_ = test.Call("Plugin.Do", "exit3", new(string))
	within(t, "Done", 0, func() { <-c.Done() })
}

// The end of a plugin waits for no writer. Kill waits within its bound, drops the rest, and
// says so.
func TestSlowWriters(t *testing.T) {
	t.Parallel()
	release := make(chan struct{})
	defer close(release)
	var begun atomic.Int32
	stuck := writerFunc(func(p []byte) (int, error) {
		begun.Add(1)
		<-release
		return len(p), nil
	})
	cfg := newLab(t).config("plugin")
	cfg.KillTimeout = time.Second
	cfg.SyncStdout, cfg.SyncStderr, cfg.Stderr = stuck, stuck, stuck
	logger, records := recorder()
	cfg.Logger = logger
	c, p := startPlugin(t, cfg)
	test := dispense(t, p)
	mustCall[struct{}](t, test.Client, "Print", Output{Stdout: "x", Stderr: "x", Raw: "x\n"})
	await(t, "Writes", func() bool { return begun.Load() == 3 })
	text := strings.Repeat("a line\n", 152_000) // more than waits before the plugin has to
	mustCall[struct{}](t, test.Client, "Print", Output{Stdout: text, Stderr: text})
	_ = test.Call("Plugin.Do", "speak, exit3", new(string))
	within(t, "Done", time.Second, func() { <-c.Done() })
	errorSays(t, c.Err(), "exit status 3", "cannot open the database")
	within(t, "Kill", 2*time.Second, c.Kill)
	dropped := records.find("dropped")
	if len(dropped) != 1 || dropped[0].level != hclog.Warn {
		t.Fatalf("Kill logged %v", dropped)
	}
	words := len(strings.Repeat("x", 10_000)+"goodbye") + len("fatal: cannot open the database")
	checkEqual(t, "bytes that were dropped", dropped[0].args[1].(int), 2*len(text)+words)
}

// A writer that is given twice gets one Write at a time, whatever its output comes from.
func TestOneWriteAtATime(t *testing.T) {
	t.Parallel()
	w := new(singleWriter)
	cfg := newLab(t).config("plugin")
	cfg.SyncStdout, cfg.SyncStderr, cfg.Stderr = w, w, w
	c, p := startPlugin(t, cfg)
	test := dispense(t, p)
	const size = 200_000
	text := strings.Repeat("x", size)
	callers := async(func() bool {
		concurrently(t, 4, func(int) {
			mustCall[struct{}](t, test.Client, "Print", Output{Stdout: text, Stderr: text, Raw: text})
		})
		return true
	})
	receive(t, "the output", callers)
	c.Kill()
	checkEqual(t, "Writes at the same time", w.clashes.Load(), 0)
	checkEqual(t, "bytes", w.bytes.Load(), 4*3*size)
}

// singleWriter counts the bytes that are written to it, and the Writes that begin while
// another one runs.
type singleWriter struct{ running, clashes, bytes atomic.Int32 }

func (w *singleWriter) Write(p []byte) (int, error) {
	if w.running.Add(1) > 1 {
		w.clashes.Add(1)
	}
	w.bytes.Add(int32(len(p)))
	time.Sleep(time.Millisecond)
	w.running.Add(-1)
	return len(p), nil
}

// What a plugin has kept of os.Stdout goes to the next host when the one that detached it is
// gone.
func TestKeptOutput(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	receive(t, "the first host's end", l.start("host idle keeping reattachable", childEnv+"=plugin").ended)
	var stdout syncBuffer
	cfg := attachTo(&plugin.ReattachConfig{
		ProtocolVersion: 3,
		Addr:            parseAddr(l.read("address")),
		Pid:             l.readPid("plugin"),
	})
	cfg.SyncStdout = &stdout
	_, p := startPlugin(t, cfg)
	test := dispense(t, p)
	mustCall[string](t, test.Client, "Do", "use kept stdout")
	mustCall[struct{}](t, test.Client, "Print", Output{Stdout: " and printed"})
	await(t, "the output", func() bool { return stdout.String() == "kept and printed" })
}

// A plugin writes to no pipe of its host when ReattachConfig has returned.
func TestDetachLeavesPipes(t *testing.T) {
	t.Parallel()
	type output struct{ stdout, stderr syncBuffer }
	var first, second output
	printing := func(config *plugin.ClientConfig, out *output, text string) *plugin.Client {
		config.SyncStdout, config.SyncStderr = &out.stdout, &out.stderr
		c, p := startPlugin(t, config)
		mustCall[struct{}](t, dispense(t, p).Client, "Print", Output{Stdout: text, Stderr: text})
		return c
	}
	c := printing(newLab(t).config("plugin"), &first, "before")
	printing(attachTo(c.ReattachConfig()), &second, "after")
	for text, out := range map[string]*output{"before": &first, "after": &second} {
		await(t, "the output "+text, func() bool {
			return out.stdout.String() == text && out.stderr.String() == text
		})
	}
}

// Outside Serve, what the program has kept of os.Stdout is the process's own.
func TestKeptOutputAfterServe(t *testing.T) {
	t.Parallel()
	cfg := newLab(t).config("plugin use-kept")
	var stdout syncBuffer
	cfg.SyncStdout = &stdout
	logger, records := recorder()
	cfg.Logger = logger
	c, p := startPlugin(t, cfg)
	mustCall[string](t, dispense(t, p).Client, "Do", "keep stdout")
	c.Kill()
	checkEqual(t, "SyncStdout", stdout.String(), "")
	checkEqual(t, "records of stdout", len(records.find("kept")), 1)
}

// Child processes of a plugin do not inherit what the host has passed to it, its pinned
// binary included.
func TestPassedIsNotInherited(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	cfg := l.config("plugin")
	cfg.SecureConfig = &plugin.SecureConfig{Checksum: sumOf(t, cfg.Cmd.Path), Hash: sha256.New()}
	_, p := startPlugin(t, cfg)
	tmp := filepath.Join(l.notes, "list")
	list := fmt.Sprintf("ls -l /dev/fd/ >%s; mv %s %s", tmp, tmp, filepath.Join(l.notes, "fds"))
	mustCall[int](t, dispense(t, p).Client, "Fork", []string{"sh", "-c", list})
	fds := l.read("fds")
	if !regexp.MustCompile(`(?m) 0( ->|$)`).MatchString(fds) {
		t.Fatalf("the list has no stdin: %s", fds)
	}
	if regexp.MustCompile(`(?m) ([3-9]|1\d) -> (pipe:|/.*test)`).MatchString(fds) {
		t.Errorf("a child process has %s", fds)
	}
}

// A pipe of a stranger at the number of one of the host's is left alone: it is neither
// taken for the end of the host, nor written to, nor closed.
func TestForeignPipes(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	cfg := l.config("plugin")
	fifo := filepath.Join(l.notes, "fifo")
	check(t, syscall.Mkfifo(fifo, 0o600))
	// Descriptor 3 reads from the first fifo, which has ended. 4 and 5 write to the second,
	// from which cat reads. true and cat are there because a fifo opens when both ends do.
	script := fmt.Sprintf(`true >%s & exec 3<%s; cat %s >%s & exec 4>%s; exec 5>&4; exec "$0"`,
		fifo, fifo, fifo+"2", filepath.Join(l.notes, "cat"), fifo+"2")
	check(t, syscall.Mkfifo(fifo+"2", 0o600))
	cfg.Cmd = &exec.Cmd{Path: "/bin/sh", Args: []string{"sh", "-c", script, os.Args[0]}, Env: cfg.Cmd.Env}
	var stdout syncBuffer
	cfg.SyncStdout = &stdout
	c, p := startPlugin(t, cfg)
	test := dispense(t, p)
	mustCall[struct{}](t, test.Client, "Print", Output{Stdout: "hello"})
	mustCall[string](t, test.Client, "Do", "use foreign")
	await(t, "the output", func() bool { return stdout.String() == "hello" })
	c.Kill()
	check(t, c.Err())
	await(t, "the end of cat", func() bool {
		text, err := os.ReadFile(filepath.Join(l.notes, "cat"))
		return err == nil && string(text) == "foreign"
	})
}
