//go:build unix

package plugin

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/rpc"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/iotest"
	"time"

	"github.com/hashicorp/go-hclog"
)

// ==== Faults of the system and of the host's own code ====

const (
	faultConfigEnv = "TEST_FAULT_CONFIG" // a name in faultConfigs
	faultLimitEnv  = "TEST_FAULT_LIMIT"  // how many descriptors a plugin may have beside those it began with
)

// faultConfigs change a configuration in what takes descriptors.
var faultConfigs = map[string]func(*ClientConfig) error{
	"plain":    func(*ClientConfig) error { return nil },
	"AutoMTLS": func(cfg *ClientConfig) error { cfg.AutoMTLS = true; return nil },
	"SecureConfig": func(cfg *ClientConfig) error {
		binary, err := os.ReadFile(cfg.Cmd.Path)
		sum := sha256.Sum256(binary)
		cfg.SecureConfig = &SecureConfig{sum[:], sha256.New()}
		return err
	},
	"detached": func(cfg *ClientConfig) error { cfg.Detach = true; return nil },
}

func init() {
	modes["fault host"] = faultHost
	modes["fault host that runs out"] = faultHostRunsOut
	modes["fault host that reattaches"] = faultHostReattaches
	modes["fault host on a small disk"] = faultHostOnSmallDisk
	modes["fault host without processes"] = faultHostWithoutProcesses
	modes["fault without a directory"] = func() {
		dir := os.Getenv(EnvUnixSocketDir)
		if err := os.Remove(dir); err != nil {
			panic(err)
		}
		if err := os.WriteFile(dir, nil, 0o600); err != nil {
			panic(err)
		}
		Serve(&ServeConfig{HandshakeConfig: testHandshake, Plugins: callsPlugins()})
	}
	modes["fault endless"] = func() {
		Serve(&ServeConfig{HandshakeConfig: testHandshake, Plugins: callsPlugins()})
		time.Sleep(baseForever)
	}
	modes["fault noisy"] = func() {
		fmt.Println("welcome to the jungle")
		fmt.Fprintln(os.Stderr, "so far, so good")
		Serve(&ServeConfig{HandshakeConfig: testHandshake, Plugins: callsPlugins()})
	}
	modes["fault greedy"] = func() {
		Serve(&ServeConfig{HandshakeConfig: testHandshake, Plugins: faultGreedyPlugins()})
	}
	modes["fault plugin"] = func() {
		spare, err := strconv.Atoi(os.Getenv(faultLimitEnv))
		if err != nil {
			panic(err)
		}
		faultLimit(spare)
		Serve(&ServeConfig{HandshakeConfig: testHandshake, Plugins: callsPlugins()})
	}
}

// faultLimit lets this process open so many more descriptors, until the
// returned function is called.
func faultLimit(spare int) (restore func()) {
	// The runtime's own descriptors must be there: it cannot go on without.
	r, w, err := os.Pipe()
	if err != nil {
		panic(err)
	}
	_, _ = r.Close(), w.Close()
	next, err := syscall.Open(os.DevNull, syscall.O_RDONLY, 0)
	if err != nil {
		panic(err)
	}
	_ = syscall.Close(next)
	var before syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &before); err != nil {
		panic(err)
	}
	after := before
	faultSet(&after.Cur, next+spare)
	if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &after); err != nil {
		panic(err)
	}
	return func() {
		if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &before); err != nil {
			panic(err)
		}
	}
}

// faultFill takes every descriptor that this process may still open, as one
// does that never closes any, until the returned function is called.
func faultFill() (restore func()) {
	raise := faultLimit(10)
	var taken []int
	for {
		fd, err := syscall.Open(os.DevNull, syscall.O_RDONLY|syscall.O_CLOEXEC, 0)
		if err != nil {
			break
		}
		taken = append(taken, fd)
	}
	return func() {
		for _, fd := range taken {
			_ = syscall.Close(fd)
		}
		raise()
	}
}

// faultSet sets a number whose type depends on the system.
func faultSet[T int64 | uint64](to *T, n int) { *to = T(n) }

// FaultReport is what a host in a process of its own tells its test, one for
// each life of a plugin.
type FaultReport struct {
	Spare int    // the descriptors it had
	Step  string // at which it failed
	Err   string // "" if it did not
	Left  string // what was left behind
}

// faultConfig is the configuration of the hosts in processes of their own.
func faultConfig() *ClientConfig {
	cfg := baseConfig("calls")
	cfg.Plugins = callsPlugins()
	return cfg
}

// faultBounded runs f and returns its error, or that it hangs.
func faultBounded(f func() error) error {
	done := make(chan error, 1)
	go func() { done <- f() }()
	select {
	case err := <-done:
		return err
	case <-time.After(hangs):
		buf := make([]byte, 1<<20)
		return fmt.Errorf("it hangs:\n%s", buf[:runtime.Stack(buf, true)])
	}
}

// faultLife starts a plugin, uses it, and ends it; before each step it calls
// before. It returns the step that failed.
func faultLife(cfg *ClientConfig, before func(step string)) (step string, err error) {
	c := NewClient(cfg)
	var p ClientProtocol
	for _, s := range []struct {
		name string
		run  func() error
	}{
		{"Start", func() error { _, err := c.Start(); return err }},
		{"Client", func() (err error) { p, err = c.Client(); return err }},
		{"Ping", func() error { return p.Ping() }},
		{"everything", func() error { return everything(p.(*RPCClient)) }},
	} {
		before(s.name)
		if err = faultBounded(s.run); err != nil {
			step = s.name
			break
		}
	}
	before("Kill")
	if hung := faultBounded(func() error { c.Kill(); return nil }); hung != nil {
		return "Kill", hung
	}
	if err == nil && c.Err() != nil {
		return "Kill", c.Err()
	}
	return step, err
}

// faultLeft says what this process has left of what it had not before.
func faultLeft(before []string, goroutines int) (left string) {
	poll(5*time.Second, func() bool {
		held := slices.DeleteFunc(baseHeld(os.TempDir()), func(s string) bool { return slices.Contains(before, s) })
		left = strings.Join(held, "\n")
		if n := runtime.NumGoroutine(); n > goroutines {
			buf := make([]byte, 1<<20)
			left += fmt.Sprintf("\n%d goroutines:\n%s", n-goroutines, buf[:runtime.Stack(buf, true)])
		}
		return left == ""
	})
	return left
}

// faultTell sends a report to the test.
func faultTell(r FaultReport) {
	if err := json.NewEncoder(os.Stdout).Encode(r); err != nil {
		panic(err)
	}
}

// faultHost lives through the life of a plugin again and again, each time with
// one descriptor more, until it does so without an error.
func faultHost() {
	cfg := faultConfig()
	if err := faultConfigs[os.Getenv(faultConfigEnv)](cfg); err != nil {
		panic(err)
	}
	held, goroutines := baseHeld(os.TempDir()), runtime.NumGoroutine()
	for r := (FaultReport{Err: "none yet"}); r.Err != "" && r.Spare < 100; r.Spare++ {
		restore := faultLimit(r.Spare)
		var err error
		r.Step, err = faultLife(cfg, func(string) {})
		restore()
		r.Err, r.Left = faultText(err), faultLeft(held, goroutines)
		faultTell(r)
	}
}

func faultText(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}

// faultHostRunsOut has all descriptors until a step, and none more from there
// on, for each step in turn.
func faultHostRunsOut() {
	held, goroutines := baseHeld(os.TempDir()), runtime.NumGoroutine()
	for _, at := range []string{"Start", "Client", "Ping", "everything", "Kill"} {
		restore := func() {}
		step, err := faultLife(faultConfig(), func(step string) {
			if step == at {
				restore = faultFill()
			}
		})
		restore()
		if step == "" {
			step = "none after " + at
		}
		faultTell(FaultReport{Step: step, Err: faultText(err), Left: faultLeft(held, goroutines)})
	}
}

// faultHostReattaches reattaches with one descriptor more each time.
func faultHostReattaches() {
	c := NewClient(faultConfig())
	defer c.Kill()
	if _, err := c.Client(); err != nil {
		panic(err)
	}
	held, goroutines := baseHeld(os.TempDir()), runtime.NumGoroutine()
	for r := (FaultReport{Err: "none yet"}); r.Err != "" && r.Spare < 100; r.Spare++ {
		cfg := faultConfig()
		cfg.Cmd, cfg.Reattach = nil, c.ReattachConfig()
		cfg.Reattach.Test = true // so that Kill leaves the plugin to the next one
		again := NewClient(cfg)
		restore := faultLimit(r.Spare)
		err := faultBounded(func() error { _, err := again.Client(); return err })
		restore()
		r.Err = faultText(err)
		if errors.Is(err, ErrProcessNotFound) {
			r.Err = "the plugin is taken for dead: " + r.Err
		}
		if err := faultBounded(func() error { again.Kill(); return nil }); err != nil {
			r.Err = "Kill: " + err.Error()
		}
		r.Left = faultLeft(held, goroutines)
		faultTell(r)
	}
}

// faultReports runs a host in a process of its own, started through another program
// if that is given, and returns what it tells.
func faultReports(t *testing.T, mode string, env []string, through ...string) (reports []FaultReport) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 6*hangs)
	defer cancel()
	argv := append(through, os.Args[0])
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	cmd.Env = append(os.Environ(), append(env, modeEnv+"="+mode, "TMPDIR="+baseShortDir(t))...)
	var stderr strings.Builder
	cmd.Stderr = &stderr
	cmd.WaitDelay = hangs
	out, err := cmd.Output()
	if err != nil || stderr.Len() > 0 {
		t.Errorf("the host ended with %v\n%s", err, &stderr)
	}
	lines := bufio.NewScanner(strings.NewReader(string(out)))
	lines.Buffer(nil, 4<<20)
	for lines.Scan() {
		var r FaultReport
		if err := json.Unmarshal(lines.Bytes(), &r); err != nil {
			t.Fatalf("the host says %q: %v", lines.Text(), err)
		}
		reports = append(reports, r)
	}
	return reports
}

// A host that runs out of descriptors, at any moment, gets an error that says
// so, and has no fewer of them afterwards.
func TestFaultDescriptors(t *testing.T) {
	t.Parallel()
	for name := range faultConfigs {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			reports := faultReports(t, "fault host", []string{faultConfigEnv + "=" + name})
			if len(reports) < 5 {
				t.Fatalf("there are %d reports", len(reports))
			}
			for i, r := range reports {
				t.Logf("%d: %s: %s", r.Spare, r.Step, r.Err)
				if r.Left != "" {
					t.Errorf("with %d descriptors there is left:\n%s", r.Spare, r.Left)
				}
				if i == len(reports)-1 {
					if r.Err != "" {
						t.Errorf("with %d descriptors it still fails", r.Spare)
					}
					continue
				}
				baseCheckError(t, errors.New(r.Err), pluginName(os.Args[0]), "too many open files", "ulimit -n")
			}
		})
	}
}

// A host that has no descriptor left goes on with the plugins that it is
// connected to, and can end those to which it is not.
func TestFaultNoDescriptorsLeft(t *testing.T) {
	t.Parallel()
	reports := faultReports(t, "fault host that runs out", nil)
	var steps []string
	for _, r := range reports {
		t.Logf("%s: %s", r.Step, r.Err)
		steps = append(steps, r.Step)
		if r.Left != "" {
			t.Errorf("%s: left is\n%s", r.Step, r.Left)
		}
		if r.Step == "Start" || r.Step == "Client" {
			baseCheckError(t, errors.New(r.Err), pluginName(os.Args[0]), "too many open files", "ulimit -n")
		}
	}
	want := []string{"Start", "Client", "none after Ping", "none after everything", "none after Kill"}
	if !slices.Equal(steps, want) {
		t.Errorf("it failed at %q", steps)
	}
}

// A host that is out of descriptors does not take a plugin for dead.
func TestFaultReattach(t *testing.T) {
	t.Parallel()
	reports := faultReports(t, "fault host that reattaches", nil)
	if len(reports) < 2 {
		t.Fatalf("there are %d reports", len(reports))
	}
	for i, r := range reports {
		t.Logf("%d: %s", r.Spare, r.Err)
		if r.Left != "" {
			t.Errorf("with %d descriptors there is left:\n%s", r.Spare, r.Left)
		}
		if last := i == len(reports)-1; last != (r.Err == "") {
			t.Errorf("with %d descriptors: %q", r.Spare, r.Err)
		} else if !last {
			baseCheckError(t, errors.New(r.Err), "reattaching", "too many open files", "ulimit -n")
		}
		if strings.Contains(r.Err, "taken for dead") {
			t.Error(r.Err)
		}
	}
}

// A plugin that has too few descriptors to serve says so, and does not leave
// its host waiting for it.
func TestFaultDescriptorsOfPlugin(t *testing.T) {
	t.Parallel()
	for name, change := range faultConfigs {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			for spare := 0; ; spare++ {
				l := newLab(t)
				cfg := l.config("fault plugin")
				cfg.Plugins = callsPlugins()
				cfg.Cmd.Env = append(cfg.Cmd.Env, fmt.Sprintf("%s=%d", faultLimitEnv, spare))
				if err := change(cfg); err != nil {
					t.Fatal(err)
				}
				step, err := faultLife(cfg, func(string) {})
				l.deserted(hangs)
				if err == nil {
					if spare == 0 {
						t.Error("it needs no descriptors")
					}
					break
				}
				t.Logf("%d: %s: %v", spare, step, err)
				baseCheckError(t, err, pluginName(os.Args[0]), "too many open files", "ulimit -n")
				if step != "Start" || spare > 100 {
					t.Fatalf("with %d descriptors, %s fails: %v", spare, step, err)
				}
			}
		})
	}
}

// faultLogger is a logger of the host's that does something else than logging
// from some record on.
type faultLogger struct {
	hclog.Logger
	from  string // a part of that record; every one has ""
	fault func()
	hit   *atomic.Bool
}

func newFaultLogger(from string, fault func()) *faultLogger {
	return &faultLogger{hclog.NewNullLogger(), from, fault, new(atomic.Bool)}
}

func (l *faultLogger) Log(_ hclog.Level, msg string, _ ...any) {
	if strings.Contains(msg, l.from) {
		l.hit.Store(true)
	}
	if l.hit.Load() {
		l.fault()
	}
}
func (l *faultLogger) Trace(msg string, args ...any) { l.Log(hclog.Trace, msg, args...) }
func (l *faultLogger) Debug(msg string, args ...any) { l.Log(hclog.Debug, msg, args...) }
func (l *faultLogger) Info(msg string, args ...any)  { l.Log(hclog.Info, msg, args...) }
func (l *faultLogger) Warn(msg string, args ...any)  { l.Log(hclog.Warn, msg, args...) }
func (l *faultLogger) Error(msg string, args ...any) { l.Log(hclog.Error, msg, args...) }
func (l *faultLogger) Named(string) hclog.Logger     { return l }
func (l *faultLogger) With(...any) hclog.Logger      { return l }

// faultOf makes a fault that panics or blocks until the test has ended.
func faultOf(t *testing.T, how string) func() {
	if how == "panics" {
		return func() { panic("the host's own code is broken") }
	}
	block := make(chan struct{})
	t.Cleanup(func() { close(block) })
	return func() { <-block }
}

// A logger that panics or blocks for ever, whatever it is that it is given,
// keeps nobody from using and ending a plugin.
func TestFaultLogger(t *testing.T) {
	for _, how := range []string{"panics", "blocks"} {
		for _, test := range []struct {
			from string
			mode string
			use  func(*testing.T, *Client, ClientProtocol)
		}{
			{"", "calls", nil},
			{"started", "calls", nil},
			{"the process has ended", "calls", nil},
			{"is killed", "fault endless", nil},
			{"printed to stdout", "fault noisy", nil},
			{"a method that a plugin called panicked", "calls", func(t *testing.T, _ *Client, p ClientProtocol) {
				c := dispense[*callsClient](t, p, "calls")
				back := CallsBack{c.broker.ServeRPC(newCallsService(nil)), "Plugin.Panic", "ouch"}
				if err := Call(callsContext(t), c.Client, "Plugin.CallBack", back, new(string)); err == nil || !strings.Contains(err.Error(), "ouch") {
					t.Errorf("a callback that panics returns %v", err)
				}
			}},
			{"a served reader", "calls", func(t *testing.T, _ *Client, p ClientProtocol) {
				c := dispense[*callsClient](t, p, "calls")
				pipe := CallsPipe{c.broker.ServeReader(iotest.ErrReader(io.ErrClosedPipe)), c.broker.ServeWriter(io.Discard)}
				if err := Call(callsContext(t), c.Client, "Plugin.Pipe", pipe, new(string)); err == nil {
					t.Error("a broken reader is read")
				}
			}},
			{"a service cannot be called", "calls", func(t *testing.T, _ *Client, p ClientProtocol) {
				c := dispense[*callsClient](t, p, "calls")
				back := CallsBack{c.broker.ServeRPC(struct{}{}), "Plugin.Echo", ""}
				if err := Call(callsContext(t), c.Client, "Plugin.CallBack", back, new(string)); err == nil {
					t.Error("what has no methods is called")
				}
			}},
			{"is dropped from here on", "fault noisy", nil},
			{"so far, so good", "fault noisy", nil},
		} {
			t.Run(how+": "+test.from, func(t *testing.T) {
				t.Parallel()
				cfg := newLab(t).config(test.mode)
				logger := newFaultLogger(test.from, faultOf(t, how))
				cfg.Plugins, cfg.Logger = callsPlugins(), logger
				cfg.Stderr = callsWriter(func([]byte) (int, error) { return 0, io.ErrShortWrite })
				cfg.StartTimeout, cfg.KillTimeout = 5*time.Second, 500*time.Millisecond
				c := NewClient(cfg)
				defer c.Kill()
				var p ClientProtocol
				err := faultBounded(func() (err error) { p, err = c.Client(); return err })
				if err != nil {
					t.Fatal(err)
				}
				if test.use != nil {
					test.use(t, c, p)
				}
				var out string
				if err := Call(callsContext(t), dispense[*callsClient](t, p, "calls").Client, "Plugin.Echo", "x", &out); err != nil || out != "x" {
					t.Errorf("Echo returns %q, %v", out, err)
				}
				within(t, "Kill", cfg.KillTimeout+time.Second, c.Kill)
				awaitClosed(t, "Done", c.Done())
				if err := c.Err(); err != nil {
					t.Error(err)
				}
				if !logger.hit.Load() {
					t.Error("nothing of that kind was logged")
				}
			})
		}
	}
}

// faultFullDisk returns a file that cannot be written to: /dev/full where the
// system has it, and otherwise one that is open for reading alone.
func faultFullDisk(t *testing.T) io.Writer {
	f, err := os.OpenFile("/dev/full", os.O_WRONLY, 0)
	if err != nil {
		f, err = os.Open(os.DevNull)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = f.Close() })
	return f
}

// A writer of the host's that fails in whatever way loses its own part of the
// output, and that is logged; one that blocks for ever holds up nothing else.
func TestFaultWriters(t *testing.T) {
	junk := bytes.Repeat([]byte(strings.Repeat("so much to say ", 70)+"\n"), 300) // more than a pipe holds
	for _, test := range []struct {
		name   string
		writer func(*testing.T) io.Writer
		text   string // of what is logged
	}{
		{"error", func(*testing.T) io.Writer {
			return callsWriter(func([]byte) (int, error) { return 0, errors.New("no paper") })
		}, "no paper"},
		{"short write", func(*testing.T) io.Writer {
			return callsWriter(func(p []byte) (int, error) { return len(p) / 2, nil })
		}, "short write"},
		{"impossible count", func(*testing.T) io.Writer {
			return callsWriter(func(p []byte) (int, error) { return -1, nil })
		}, "short write"},
		{"panic", func(t *testing.T) io.Writer {
			fault := faultOf(t, "panics")
			return callsWriter(func(p []byte) (int, error) { fault(); return len(p), nil })
		}, "the host's own code is broken"},
		{"nil in a writer", func(*testing.T) io.Writer { return (*bytes.Buffer)(nil) }, "nil pointer"},
		{"full disk", faultFullDisk, "/dev/"},
		{"blocked", func(t *testing.T) io.Writer {
			fault := faultOf(t, "blocks")
			return callsWriter(func(p []byte) (int, error) { fault(); return len(p), nil })
		}, ""},
	} {
		for which := range 3 {
			name := []string{"SyncStdout", "SyncStderr", "Stderr"}[which]
			t.Run(test.name+" of "+name, func(t *testing.T) {
				t.Parallel()
				l := newLab(t)
				cfg := l.config("base")
				cfg.Plugins = basePlugins(&baseServer{})
				cfg.KillTimeout = 500 * time.Millisecond
				logger, records := baseLogger()
				cfg.Logger = logger
				var good [3]baseBuffer
				to := [3]io.Writer{&good[0], &good[1], &good[2]}
				to[which] = test.writer(t)
				cfg.SyncStdout, cfg.SyncStderr, cfg.Stderr = to[0], to[1], to[2]
				c, p := start(t, cfg)
				client := dispense[*rpc.Client](t, p, "base")
				said := [3][]byte{junk, junk, junk}
				if test.text == "" {
					said[which] = junk[:1000] // it would fill what is between
				}
				if err := Call(callsContext(t), client, "Plugin.Print", BaseOutput{said[0], said[1], said[2]}, new(struct{})); err != nil {
					t.Error(err)
				}
				baseEcho(t, client, "and still here")
				for i := range good {
					if i != which {
						baseUntil(t, "the rest of the output", func() bool { return strings.HasPrefix(good[i].String(), string(junk)) })
					}
				}
				within(t, "Kill", cfg.KillTimeout+time.Second, c.Kill)
				awaitClosed(t, "Done", c.Done())
				if err := c.Err(); err != nil {
					t.Error(err)
				}
				dropped := records.find("cannot be written")
				if test.text == "" && len(dropped) > 0 || test.text != "" && len(dropped) != 1 {
					t.Fatalf("that it fails is logged %d times", len(dropped))
				}
				if test.text != "" {
					if text := fmt.Sprint(dropped[0].args...); dropped[0].level != hclog.Warn || !strings.Contains(text, test.text) {
						t.Errorf("what is logged at %v has no %q: %s", dropped[0].level, test.text, text)
					}
				}
			})
		}
	}
}

// Where the socket's directory, or the socket, cannot be made, a start says
// where that is and how another place is set.
func TestFaultSocket(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	missing := filepath.Join(t.TempDir(), "missing")
	loop := filepath.Join(t.TempDir(), "loop")
	if err := os.Symlink(loop, loop); err != nil {
		t.Fatal(err)
	}
	for _, dir := range []string{file, missing, loop, "/dev/null", "/dev/fd", strings.Repeat("x", 300)} {
		for _, variable := range []string{"TMPDIR", "TempDir"} {
			t.Run(variable+"="+dir[:min(len(dir), 50)], func(t *testing.T) {
				cfg := baseConfig("calls")
				if variable == "TMPDIR" {
					t.Setenv(variable, dir)
				} else {
					cfg.UnixSocketConfig = &UnixSocketConfig{TempDir: dir}
				}
				err := startError(t, NewClient(cfg))
				baseCheckError(t, err, pluginName(os.Args[0]), dir, "TMPDIR", "TempDir")
				if strings.Contains(err.Error(), "interpreter") {
					t.Error(err)
				}
				if cfg.Cmd.Process != nil {
					t.Error("it was started")
				}
			})
		}
	}
	// The plugin's side of it.
	cfg := newLab(t).config("fault without a directory")
	err := startError(t, NewClient(cfg))
	baseCheckError(t, err, pluginName(os.Args[0]), "cannot serve", "listen unix", cfg.UnixSocketConfig.TempDir)
}

// faultHostOnSmallDisk tells how starts fail on a disk that takes no more
// files: none at all, and then one, which the directory of the socket is.
func faultHostOnSmallDisk() {
	dir := filepath.Join(os.TempDir(), "disk")
	for _, files := range []int{1, 2, 10} {
		must := func(err error) {
			if err != nil {
				panic(err)
			}
		}
		must(os.Mkdir(dir, 0o700))
		out, err := exec.Command("mount", "-t", "tmpfs", "-o", fmt.Sprintf("nr_inodes=%d", files), "tmpfs", dir).CombinedOutput()
		if err != nil {
			panic(fmt.Sprintf("%v: %s", err, out))
		}
		held, goroutines := baseHeld(os.TempDir()), runtime.NumGoroutine()
		cfg := faultConfig()
		cfg.UnixSocketConfig = &UnixSocketConfig{TempDir: dir}
		step, err := faultLife(cfg, func(string) {})
		left := faultLeft(held, goroutines)
		if entries, _ := os.ReadDir(dir); len(entries) > 0 {
			left += fmt.Sprint(entries)
		}
		faultTell(FaultReport{Spare: files, Step: step, Err: faultText(err), Left: left})
		out, err = exec.Command("umount", dir).CombinedOutput()
		if err != nil {
			panic(fmt.Sprintf("%v: %s", err, out))
		}
		must(os.Remove(dir))
	}
}

// A disk that is full is said to be. This needs a disk of its own, which Linux
// gives to everybody in a name space of their own, unless that is forbidden;
// there, and elsewhere, TestFaultSocket has to do.
func TestFaultDiskFull(t *testing.T) {
	t.Parallel()
	apart := []string{"unshare", "--user", "--map-root-user", "--mount"}
	dir := baseShortDir(t)
	if out, err := exec.Command(apart[0], append(apart[1:], "mount", "-t", "tmpfs", "tmpfs", dir)...).CombinedOutput(); err != nil {
		t.Logf("there are no disks here: %v: %s", err, out)
		return
	}
	reports := faultReports(t, "fault host on a small disk", nil, apart...)
	if len(reports) != 3 {
		t.Fatalf("there are %d reports", len(reports))
	}
	for i, r := range reports {
		t.Logf("%d: %s: %s", r.Spare, r.Step, r.Err)
		if r.Left != "" {
			t.Errorf("with room for %d files there is left:\n%s", r.Spare, r.Left)
		}
		switch i {
		case 0, 1:
			baseCheckError(t, errors.New(r.Err), pluginName(os.Args[0]), "no space left on device", "/disk")
		case 2:
			if r.Err != "" {
				t.Error("it does not start where there is room:", r.Err)
			}
		}
	}
}

// Where the system cannot execute the binary, a start says why and what to do.
func TestFaultExec(t *testing.T) {
	for _, test := range []struct {
		name  string
		edit  func(*testing.T, *ClientConfig)
		texts []string
		is    error
	}{
		// This is no fault on macOS.
		{"open for writing", func(t *testing.T, cfg *ClientConfig) {
			faultCopy(t, cfg)
			f, err := os.OpenFile(cfg.Cmd.Path, os.O_WRONLY, 0)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = f.Close() })
		}, []string{"being built or copied"}, syscall.ETXTBSY},
		{"too many arguments", func(_ *testing.T, cfg *ClientConfig) {
			cfg.Cmd.Args = append(cfg.Cmd.Args, slices.Repeat([]string{strings.Repeat("x", 100<<10)}, 100)...)
		}, []string{"arguments"}, syscall.E2BIG},
		{"no directory to run in", func(t *testing.T, cfg *ClientConfig) {
			cfg.Cmd.Dir = filepath.Join(t.TempDir(), "missing")
		}, []string{"chdir", "missing", "no such file"}, fs.ErrNotExist},
		{"a name with a zero in it", func(_ *testing.T, cfg *ClientConfig) {
			cfg.Cmd.Env = append(cfg.Cmd.Env, "A=\x00")
		}, []string{"environment"}, nil},
	} {
		if test.is == syscall.ETXTBSY && runtime.GOOS == "darwin" {
			continue
		}
		for _, secure := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, SecureConfig: %v", test.name, secure), func(t *testing.T) {
				cfg := newLab(t).config("calls")
				test.edit(t, cfg)
				if secure {
					if err := faultConfigs["SecureConfig"](cfg); err != nil {
						t.Fatal(err)
					}
				}
				err := startError(t, NewClient(cfg))
				t.Log(err)
				baseCheckError(t, err, append(test.texts, pluginName(cfg.Cmd.Path))...)
				if test.is != nil && !errors.Is(err, test.is) {
					t.Errorf("it is no %v: %v", test.is, err.Err)
				}
				if cfg.Cmd.Process != nil {
					t.Error("it was started")
				}
			})
		}
	}
}

// faultCopy makes a configuration start a copy of the test binary.
func faultCopy(t *testing.T, cfg *ClientConfig) {
	t.Helper()
	binary, err := os.ReadFile(os.Args[0])
	if err != nil {
		t.Fatal(err)
	}
	cfg.Cmd.Path = filepath.Join(t.TempDir(), "greeter")
	lifeWriteProgram(t, cfg.Cmd.Path, binary, 0o700)
}

// faultHostWithoutProcesses starts two plugins as a user who may have one.
func faultHostWithoutProcesses() {
	held, goroutines := baseHeld(os.TempDir()), runtime.NumGoroutine()
	dir := os.Getenv(faultConfigEnv)
	start := func() (*Client, error) {
		cfg := faultConfig()
		cfg.Cmd.Path, cfg.Cmd.Dir = filepath.Join(dir, "greeter"), dir
		cfg.Cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 54321, Gid: 54321, NoSetGroups: true}}
		cfg.UnixSocketConfig = &UnixSocketConfig{TempDir: dir}
		c := NewClient(cfg)
		return c, faultBounded(func() error { _, err := c.Client(); return err })
	}
	first, err := start()
	if err != nil {
		panic(err)
	}
	const processes = 6 // RLIMIT_NPROC on Linux
	if err := syscall.Setrlimit(processes, &syscall.Rlimit{Cur: 1, Max: 1}); err != nil {
		panic(err)
	}
	second, err := start()
	second.Kill()
	if alive := faultBounded(func() error { _, err := first.Client(); return err }); alive != nil {
		panic(alive)
	}
	first.Kill()
	faultTell(FaultReport{Err: faultText(err), Left: faultLeft(held, goroutines)})
}

// A fork that fails for want of processes is said to have. The limit does not
// bind root, but another user as which root starts something; with any other
// user the host itself could not go on, so there TestFaultExec has to do.
func TestFaultProcesses(t *testing.T) {
	if runtime.GOOS != "linux" || os.Getuid() != 0 {
		t.Log("this is for root on Linux")
		return
	}
	dir, _ := baseShared(t)
	reports := faultReports(t, "fault host without processes", []string{faultConfigEnv + "=" + dir})
	if len(reports) != 1 {
		t.Fatalf("there are %d reports", len(reports))
	}
	t.Log(reports[0].Err)
	baseCheckError(t, errors.New(reports[0].Err), "greeter", "resource temporarily unavailable", "ulimit -u")
	if reports[0].Left != "" {
		t.Errorf("left behind:\n%s", reports[0].Left)
	}
}

// FaultGreedy is served by a plugin that takes all its descriptors, and gives
// them back.
type FaultGreedy struct{ give func() }

func (g *FaultGreedy) Take(struct{}, *struct{}) error {
	g.give = faultFill()
	return nil
}

func (g *FaultGreedy) Give(struct{}, *struct{}) error {
	g.give()
	return nil
}

func faultGreedyPlugins() PluginSet {
	set := callsPlugins()
	set["greedy"] = testPlugin{serves(&FaultGreedy{}), func(_ *MuxBroker, c *rpc.Client) (any, error) { return c, nil }}
	return set
}

// A plugin that runs out of descriptors while it serves goes on serving its
// host, accepts another one when it has descriptors again, and can be ended.
func TestFaultNoDescriptorsLeftInPlugin(t *testing.T) {
	t.Parallel()
	cfg := newLab(t).config("fault greedy")
	logger, records := baseLogger()
	cfg.Plugins, cfg.Logger = faultGreedyPlugins(), logger
	c, p := start(t, cfg)
	greedy := dispense[*rpc.Client](t, p, "greedy")
	ask := func(method string) {
		t.Helper()
		if err := Call(callsContext(t), greedy, "Plugin."+method, struct{}{}, new(struct{})); err != nil {
			t.Fatal(err)
		}
	}
	ask("Take")
	calls := dispense[*callsClient](t, p, "calls")
	var out string
	back := CallsBack{calls.broker.ServeRPC(newCallsService(nil)), "Plugin.Echo", "y"}
	if err := Call(callsContext(t), calls.Client, "Plugin.CallBack", back, &out); err != nil || out != "y" {
		t.Errorf("%q, %v", out, err)
	}
	var written baseBuffer
	pipe := CallsPipe{calls.broker.ServeReader(strings.NewReader("all of it")), calls.broker.ServeWriter(&written)}
	if err := Call(callsContext(t), calls.Client, "Plugin.Pipe", pipe, &out); err != nil {
		t.Error(err)
	}
	baseUntil(t, "what was written", func() bool { return written.String() == "all of it" })

	again := *cfg
	again.Cmd, again.Reattach = nil, c.ReattachConfig()
	again.Reattach.Test = true // Kill only disconnects it
	_, other := start(t, &again)
	answered := callsGo(func() error {
		_, err := Dispense[*callsClient](other, "calls")
		return err
	})
	baseUntil(t, "what is wrong is logged", func() bool { return len(records.find("could not be accepted")) > 0 })
	if len(answered) > 0 {
		t.Error("the other host has a connection:", <-answered)
	}
	ask("Give")
	if err := callsGet(t, "the other host's connection", answered); err != nil {
		t.Error(err)
	}
	ask("Take")
	within(t, "Kill", defaultKillTimeout+time.Second, c.Kill)
	if err := c.Err(); err != nil || !cfg.Cmd.ProcessState.Success() {
		t.Error("it ended with", err, cfg.Cmd.ProcessState)
	}
}
