package plugin

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"reflect"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
)

// ---- What is left behind ----

// leavesNothing fails the test if it leaves a goroutine, child process,
// descriptor or file behind. It is not for parallel tests. Call it before
// anything else: cleanups that are added later run before its check.
func leavesNothing(t testing.TB) {
	t.Helper()
	left := takeStock(os.TempDir())
	t.Cleanup(func() {
		if left := left(); left != "" {
			t.Errorf("left behind:\n%s", left)
		}
	})
}

// takeStock lists what this process has and what is in the temporary directory.
// The function that it returns lists what was added since, after waiting a
// while for it to go.
func takeStock(tmp string) (left func() string) {
	goroutines, before := runtime.NumGoroutine(), held(tmp)
	return func() (left string) {
		poll(5*time.Second, func() bool {
			more := slices.DeleteFunc(held(tmp), func(s string) bool { return slices.Contains(before, s) })
			if n := runtime.NumGoroutine(); n > goroutines {
				more = append(more, fmt.Sprintf("%d goroutines:\n%s", n-goroutines, stacks()))
			}
			left = strings.Join(more, "\n")
			return left == ""
		})
		return left
	}
}

// held lists the contents of the temporary directory and, where there is /proc,
// this process's children, including zombies, and descriptors.
func held(tmp string) []string {
	held := contents(tmp)
	if runtime.GOOS == "windows" {
		return held // Wine has a /proc with its own descriptors
	}
	stats, _ := filepath.Glob("/proc/[0-9]*/stat")
	for _, name := range stats {
		stat, _ := os.ReadFile(name)
		_, after, _ := strings.Cut(string(stat), ") ")
		if f := strings.Fields(after); len(f) > 1 && f[1] == strconv.Itoa(os.Getpid()) {
			held = append(held, "child "+string(stat))
		}
	}
	fds, _ := filepath.Glob("/proc/self/fd/*")
	for _, fd := range fds {
		// The runtime has descriptors of other kinds.
		to, _ := os.Readlink(fd)
		if strings.HasPrefix(to, "pipe:") || strings.HasPrefix(to, "socket:") || strings.HasPrefix(to, "/") && !strings.HasPrefix(to, "/dev/") {
			held = append(held, "descriptor of "+to)
		}
	}
	return held
}

// contents lists the processes with this temporary directory, and its files.
func contents(tmp string) (names []string) {
	for _, pid := range processesIn(tmp) {
		cmdline, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
		names = append(names, fmt.Sprintf("process %d: %q", pid, cmdline))
	}
	entries, _ := os.ReadDir(tmp)
	for _, e := range entries {
		names = append(names, "file "+e.Name())
	}
	return names
}

var signedIn *os.File // set by signIn

// signIn opens a file named after this process, so that processesIn finds it on
// Windows, where an open file cannot be removed and environments cannot be read.
func signIn() {
	if runtime.GOOS == "windows" {
		signedIn, _ = os.Create(filepath.Join(os.Getenv("TMPDIR"), fmt.Sprintf("process-%d", os.Getpid())))
	}
}

// processesIn returns the other processes that were started with this TMPDIR
// and are no zombies. Systems with neither /proc nor signIn have none.
func processesIn(tmp string) (pids []int) {
	if runtime.GOOS == "windows" {
		files, _ := filepath.Glob(filepath.Join(tmp, "process-*"))
		for _, file := range files {
			_, number, _ := strings.Cut(filepath.Base(file), "-")
			if pid, err := strconv.Atoi(number); err == nil && os.Remove(file) != nil {
				pids = append(pids, pid)
			}
		}
		return pids
	}
	dirs, _ := filepath.Glob("/proc/[0-9]*")
	for _, dir := range dirs {
		pid, _ := strconv.Atoi(filepath.Base(dir))
		env, _ := os.ReadFile(dir + "/environ") // empty for a zombie
		if pid != os.Getpid() && slices.Contains(strings.Split(string(env), "\x00"), "TMPDIR="+tmp) {
			pids = append(pids, pid)
		}
	}
	return pids
}

// descriptors returns the number of this process's descriptors, or 0 without
// /proc and on Windows.
func descriptors() int {
	if runtime.GOOS == "windows" {
		return 0
	}
	fds, _ := os.ReadDir("/proc/self/fd")
	return len(fds)
}

// exe ends the names of programs.
var exe = map[bool]string{true: ".exe"}[runtime.GOOS == "windows"]

// writeProgram writes a file to execute. A process forked meanwhile would hold
// it open for writing, and it could not be executed.
func writeProgram(t testing.TB, path string, data []byte, mode fs.FileMode) {
	t.Helper()
	syscall.ForkLock.RLock()
	defer syscall.ForkLock.RUnlock()
	check(t, os.WriteFile(path, data, mode))
}

// copyBinary returns a copy of the test binary with this name.
func copyBinary(t testing.TB, name string) string {
	t.Helper()
	data, err := os.ReadFile(os.Args[0])
	check(t, err)
	path := filepath.Join(t.TempDir(), name+exe)
	writeProgram(t, path, data, 0o700)
	return path
}

// ---- Labs: processes that tests watch and kill ----

// lab holds the processes of one test: they have their own TMPDIR, and a
// directory where they leave notes for the test. When the test ends, no
// process and no file may be left.
type lab struct {
	t          testing.TB
	tmp, notes string
}

func newLab(t testing.TB) *lab {
	t.Helper()
	// The paths of t.TempDir are too long for a socket.
	tmp, err := os.MkdirTemp("", "l*")
	check(t, err)
	l := &lab{t, tmp, t.TempDir()}
	t.Cleanup(func() {
		l.deserted(hangs)
		_ = os.RemoveAll(tmp)
	})
	return l
}

// env is the environment of a process in the lab.
func (l *lab) env() []string { return []string{"TMPDIR=" + l.tmp, notesEnv + "=" + l.notes} }

// config returns a configuration that starts a mode in the lab.
func (l *lab) config(mode string, env ...string) *ClientConfig {
	cfg := config(mode, append(l.env(), env...)...)
	if runtime.GOOS != "windows" {
		cfg.UnixSocketConfig = &UnixSocketConfig{TempDir: l.tmp}
	}
	return cfg
}

// deserted fails the test if a process or file is left after a while.
func (l *lab) deserted(within time.Duration) {
	l.t.Helper()
	if poll(within, func() bool { return len(contents(l.tmp)) == 0 }) {
		return
	}
	l.t.Errorf("after %v there are left: %q", within, contents(l.tmp))
	for _, pid := range processesIn(l.tmp) {
		if p, err := os.FindProcess(pid); err == nil {
			_ = p.Kill()
		}
	}
}

// read waits for a note and returns its text. Each process leaves its pid in
// the notes "plugin", or "host", and "plugin finished", or "host finished".
func (l *lab) read(name string) string {
	l.t.Helper()
	var text []byte
	await(l.t, "the note "+name, func() bool {
		var err error
		text, err = os.ReadFile(filepath.Join(l.notes, name))
		return err == nil
	})
	return string(text)
}

// readPid waits for a note that is a pid.
func (l *lab) readPid(name string) int {
	l.t.Helper()
	pid, err := strconv.Atoi(l.read(name))
	check(l.t, err)
	return pid
}

// noted reports whether there is a note.
func (l *lab) noted(name string) bool {
	_, err := os.Stat(filepath.Join(l.notes, name))
	return err == nil
}

// write leaves a note for the processes of the lab.
func (l *lab) write(name, text string) { leaveNote(l.notes, name, text) }

// note leaves a note for the test, if this process is in a lab.
func note(name, text string) { leaveNote(os.Getenv(notesEnv), name, text) }

// leaveNote writes the whole note at once.
func leaveNote(dir, name, text string) {
	if dir == "" {
		return
	}
	tmp := filepath.Join(dir, fmt.Sprintf(".%s-%d", name, os.Getpid()))
	if os.WriteFile(tmp, []byte(text), 0o600) == nil {
		_ = os.Rename(tmp, filepath.Join(dir, name))
	}
}

// awaitNote waits for a note of the test.
func awaitNote(name string) {
	l := &lab{notes: os.Getenv(notesEnv)}
	if !poll(3*hangs, func() bool { return l.noted(name) }) {
		os.Exit(65)
	}
}

// testProcess is a process that a test starts beside its plugins.
type testProcess struct {
	*exec.Cmd
	output syncBuffer
	ended  chan struct{}
}

// ownGroup makes a command the leader of a process group, where there is such
// a thing.
var ownGroup = func(*exec.Cmd) {}

// start starts the test binary in a mode. The process and its children are a
// process group: a signal to that is what a terminal sends.
func (l *lab) start(mode string, env ...string) *testProcess {
	l.t.Helper()
	p := &testProcess{Cmd: exec.Command(os.Args[0]), ended: make(chan struct{})}
	p.Env = slices.Concat(os.Environ(), []string{modeEnv + "=" + mode}, l.env(), env)
	p.Stdout, p.Stderr = &p.output, &p.output
	p.WaitDelay = time.Second
	ownGroup(p.Cmd)
	check(l.t, p.Start())
	go func() { defer close(p.ended); _ = p.Wait() }()
	l.t.Cleanup(func() {
		_ = p.Process.Kill()
		<-p.ended
		if l.t.Failed() {
			l.t.Logf("%s printed: %s", mode, p.output.String())
		}
	})
	return p
}

// kill kills the process and waits for its end.
func (p *testProcess) kill(t testing.TB) {
	t.Helper()
	_ = p.Process.Kill()
	receive(t, "the end of a killed process", p.ended)
}

// ---- Hosts in their own processes ----

// hosted is the plugin of a host in its own process. The step "host" makes the
// configuration. The next may change it, and then one starts the client and
// brings the plugin to a moment of its life. The steps "ready wait" leave it
// there.
var hosted struct {
	cfg    *ClientConfig
	client *Client
}

func init() {
	modes["host"] = func() {
		// The parent of the tests may have made them ignore these signals.
		interrupted := make(chan os.Signal, 1)
		signal.Notify(interrupted, os.Interrupt, syscall.SIGHUP)
		go func() { <-interrupted; os.Exit(130) }() // ends with the process
		hosted.cfg = config(os.Getenv(childEnv))
	}
	modes["attaching"] = func() {
		address, pid, _ := strings.Cut(os.Getenv(childEnv), " ")
		hosted.cfg = attachTo(&ReattachConfig{ProtocolVersion: 3, Addr: toAddr(address), Pid: must(strconv.Atoi(pid))})
	}
	modes["detaching"] = func() { hosted.cfg.Detach = true }
	modes["quiet"] = func() {
		hosted.cfg.Logger = hclog.New(&hclog.LoggerOptions{Output: os.Stdout, Level: hclog.Info})
		hosted.cfg.AutoMTLS = true
	}
	modes["shell"] = func() {
		cmd := exec.Command("sh", "-c", `"$0"; exit $?`, os.Args[0])
		cmd.Env = hosted.cfg.Cmd.Env
		hosted.cfg.Cmd = cmd
	}
	modes["starting"] = func() {
		hosted.client = NewClient(hosted.cfg)
		go hosted.client.Start() // ends with the process
		awaitNote("plugin")
	}
	modes["started"] = func() {
		hosted.client = NewClient(hosted.cfg)
		note("address", must(hosted.client.Start()).String())
	}
	modes["idle"] = func() { hostedTest() }
	modes["calling"] = func() {
		go hostedTest().Call("Plugin.Block", "", new(string)) // ends with the process
		awaitNote("in a call")
	}
	// Ends when the plugin is gone.
	modes["busy"] = func() {
		test := hostedTest()
		note(fmt.Sprintf("busy-%d", os.Getpid()), hosted.client.ID())
		if test.traffic(context.Background(), func() {}) == errWrong {
			note("a wrong reply", "")
		}
		hosted.client.Kill()
	}
	modes["kill"] = func() { hosted.client.Kill() }
	modes["reattachable"] = func() { note("reattach", strconv.Itoa(hosted.client.ReattachConfig().Pid)) }
	modes["ready"] = func() { note("host is ready", "") }
}

// hostedTest starts the host's plugin and dispenses "test".
func hostedTest() *testClient {
	modes["started"]()
	return must(Dispense[*testClient](must(hosted.client.Client()), "test"))
}

// must is for processes that are no tests.
func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

// toAddr is the inverse of String for the address of a plugin.
func toAddr(address string) net.Addr {
	if runtime.GOOS == "windows" {
		return must(net.ResolveTCPAddr("tcp", address))
	}
	return &net.UnixAddr{Name: address, Net: "unix"}
}

// silent returns the address of a listener that accepts no connection.
func (l *lab) silent(name string) net.Addr {
	l.t.Helper()
	network, address := "unix", filepath.Join(l.tmp, name)
	if runtime.GOOS == "windows" {
		network, address = "tcp", "127.0.0.1:0"
	}
	listener, err := net.Listen(network, address)
	check(l.t, err)
	l.t.Cleanup(func() { _ = listener.Close() })
	return listener.Addr()
}

// orphanTest is a host that ends, and its plugin with it.
type orphanTest struct {
	plugin, host string
	end          func(testing.TB, *testProcess) // of a host that does not end by itself
	endless      bool                           // the plugin's main is
}

var orphanTests = []orphanTest{
	{plugin: "late plugin", host: "host starting ready wait"},
	{plugin: "plugin say cry", host: "host started ready wait"},
	{plugin: "plugin say cry", host: "host idle ready panic"},
	{plugin: "plugin say cry", host: "host calling ready exit3"},
	{plugin: "nest plugin", host: "host calling ready wait"},
	{plugin: "plugin endless", host: "host idle ready wait", endless: true},
}

func init() {
	// A plugin that is a host in turn.
	modes["nest"] = func() { must(NewClient(config("plugin")).Start()) }
}

// Plugins exit with their hosts, whenever and however those end.
func TestOrphans(t *testing.T) {
	t.Parallel()
	for _, test := range orphanTests {
		t.Run(test.plugin+", "+test.host, func(t *testing.T) {
			t.Parallel()
			l := newLab(t)
			host := l.start(test.host, childEnv+"="+test.plugin)
			l.read("host is ready")
			if test.end != nil {
				test.end(t, host)
			} else if strings.HasSuffix(test.host, "wait") {
				host.kill(t)
			}
			receive(t, "the host's end", host.ended)
			l.write("serve", "")
			l.deserted(orphanTimeout + slack)
			if !test.endless {
				l.read("plugin finished")
			}
		})
	}
}

// ---- Torture ----

// errWrong is a wrong reply.
var errWrong = errors.New("a wrong reply")

// traffic makes calls, streams and prints until ctx ends or a call fails.
func (c *testClient) traffic(ctx context.Context, progress func()) error {
	for n := 0; ctx.Err() == nil; n++ {
		progress()
		data := string(noise(1+n*7919%200_000, rand.Uint64()))
		got := data
		var err error
		switch n % 3 {
		case 0:
			err = Call(ctx, c.Client, "Plugin.Echo", data, &got)
		case 1:
			var back syncBuffer
			from, stopReader := c.broker.ServeReader(strings.NewReader(data))
			to, stopWriter := c.broker.ServeWriter(&back)
			err = Call(ctx, c.Client, "Plugin.Copy", Transfer{Reader: from, Writer: to}, new(int64))
			stopReader()
			stopWriter()
			got = back.String()
		case 2:
			text := fmt.Sprintf("%x\n", data[:min(len(data), 5000)])
			err = c.Call("Plugin.Print", Output{Stdout: text, Stderr: text}, new(struct{}))
		}
		if err != nil {
			return err
		}
		if got != data {
			return errWrong
		}
	}
	return nil
}

// ---- Processes of other hosts ----

// A plugin whose host is gone is used by the next host, and killed by the last.
func TestReattach(t *testing.T) {
	t.Parallel()
	for _, mode := range []string{"host detaching idle", "host idle reattachable"} {
		if runtime.GOOS == "windows" && strings.HasSuffix(mode, "reattachable") {
			continue // which does not detach it there
		}
		t.Run(mode, func(t *testing.T) {
			t.Parallel()
			l := newLab(t)
			receive(t, "the first host's end", l.start(mode, childEnv+"=plugin say cry").ended)
			address, pid := l.read("address"), l.read("plugin")
			rc := &ReattachConfig{Addr: toAddr(address), Pid: l.readPid("plugin")} // there is but one version
			cfg := attachTo(rc)
			var stdout syncBuffer
			cfg.SyncStdout = &stdout
			c, p := start(t, cfg)
			test := dispense(t, p)
			_ = test.Call("Plugin.Print", Output{"for this host", "", "for nobody", ""}, new(struct{})) // nor is that its end
			await(t, "output", func() bool { return stdout.String() == "for this host" })
			if c.ID() != pid || c.NegotiatedVersion() != 3 || c.Exited() || !reflect.DeepEqual(c.ReattachConfig(), rc) {
				t.Errorf("reattached: %s, %d, %v, %+v", c.ID(), c.NegotiatedVersion(), c.Exited(), c.ReattachConfig())
			}
			receive(t, "the last host's end", l.start("host attaching idle kill", childEnv+"="+address+" "+pid).ended)
			l.read("plugin finished")
			receive(t, "Done", c.Done())
			var exit *ExitError
			if !errors.As(c.Err(), &exit) || exit.State != nil {
				t.Errorf("Err is %v", c.Err())
			}
			if _, err := NewClient(cfg).Start(); err != ErrProcessNotFound {
				t.Errorf("reattaching to what is gone returned %v", err)
			}
		})
	}
}

// A process that may not be the plugin is never signalled.
func TestStranger(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	dead := l.start("exit0")
	receive(t, "an end", dead.ended)
	stranger := l.start("late")
	pid := stranger.Process.Pid
	plugin, _ := start(t, newLab(t).config("plugin"))
	other, _ := start(t, newLab(t).config("plugin"))
	silent, now := l.silent("plugin-1-1"), context.Background()
	ended, cancel := context.WithCancel(now)
	cancel()
	tests := []struct {
		name string
		rc   *ReattachConfig
		ctx  context.Context
		err  error
	}{
		{"dead", &ReattachConfig{Pid: dead.Process.Pid, Addr: silent}, now, ErrProcessNotFound},
		{"no pid", &ReattachConfig{Addr: silent}, now, ErrProcessNotFound},
		{"a process group", &ReattachConfig{Pid: -pid, Addr: silent}, now, ErrProcessNotFound},
		{"nobody listens", &ReattachConfig{Pid: pid, Addr: toAddr("127.0.0.1:1")}, now, ErrProcessNotFound},
		{"not its socket", &ReattachConfig{Pid: pid, Addr: silent}, now, nil},
		{"the plugin's socket", &ReattachConfig{Pid: pid, Addr: plugin.ReattachConfig().Addr}, now, nil},
		{"no time to look", other.ReattachConfig(), ended, context.Canceled},
	}
	callers(t, len(tests), func(i int) {
		c := NewClient(attachTo(tests[i].rc))
		if _, err := c.StartContext(tests[i].ctx); !errors.Is(err, tests[i].err) || tests[i].err == ErrProcessNotFound && err != ErrProcessNotFound {
			t.Errorf("%s: Start returned %v", tests[i].name, err)
		}
		within(t, "Kill", 4*time.Second, c.Kill)
		if !c.Exited() {
			t.Errorf("%s: Kill has returned, and Exited is false", tests[i].name)
		}
	})
	receive(t, "the end of a plugin that was asked to quit", plugin.Done())
	l.write("serve", "")
	receive(t, "the stranger's end", stranger.ended)
	if !stranger.ProcessState.Success() {
		t.Error("the stranger was harmed:", stranger.ProcessState)
	}
}

// testRunner is an AttachedRunner.
type testRunner struct {
	ended        chan error           // Wait returns what it receives
	waits, kills chan context.Context // of Wait and Kill
	stuck        bool                 // they ignore it
}

// config is for a plugin whose process is r. There is no such pid.
func (r *testRunner) config(addr net.Addr) *ReattachConfig {
	return &ReattachConfig{ProtocolVersion: 3, Addr: addr, Pid: -1, ReattachFunc: func() (AttachedRunner, error) { return r, nil }}
}

func newTestRunner(t testing.TB, stuck bool) *testRunner {
	r := &testRunner{make(chan error, 1), make(chan context.Context, 9), make(chan context.Context, 9), stuck}
	if stuck {
		t.Cleanup(func() { close(r.ended) })
	}
	return r
}

func (r *testRunner) Wait(ctx context.Context) error {
	r.waits <- ctx
	if r.stuck {
		ctx = context.Background()
	}
	select {
	case err := <-r.ended:
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (r *testRunner) Kill(ctx context.Context) error {
	r.kills <- ctx
	if r.stuck {
		<-r.ended
	}
	return nil
}

func (*testRunner) ID() string { return "box 7" }

var errBox = errors.New("the box has fallen over")

// boxed starts a plugin that a client knows through a runner. A mute runner does
// not learn of the plugin's end.
func boxed(t *testing.T, mode string, mute bool) (*Client, *testClient, *testRunner, *os.Process) {
	t.Helper()
	t.Parallel()
	cfg := newLab(t).config(mode)
	first, _ := start(t, cfg)
	r := newTestRunner(t, false)
	if !mute {
		go func() { <-first.Done(); r.ended <- errBox }() // ends with the plugin
	}
	second := attachTo(r.config(first.ReattachConfig().Addr))
	second.KillTimeout = 500 * time.Millisecond
	c, p := start(t, second)
	if c.ID() != r.ID() || c.Exited() || c.Err() != nil {
		t.Errorf("reattached: %s, %v, %v", c.ID(), c.Exited(), c.Err())
	}
	return c, dispense(t, p), r, cfg.Cmd.Process
}

// ReattachFunc finds the process, which is waited for and killed through it.
func TestReattachFunc(t *testing.T) {
	t.Parallel()
	for mode, stubborn := range map[string]bool{"plugin": false, "plugin endless": true} {
		t.Run(mode, func(t *testing.T) {
			c, _, r, process := boxed(t, mode, false)
			waiting := receive(t, "Wait", r.waits)
			killing := async(func() bool { c.Kill(); return true })
			if stubborn {
				if ctx := receive(t, "Kill", r.kills); waiting.Err() != nil || ctx.Err() != nil {
					t.Error("the contexts have ended:", waiting.Err(), ctx.Err())
				}
				_ = process.Kill()
			}
			receive(t, "Client.Kill", killing)
			if !c.Exited() || c.Err() != nil || waiting.Err() == nil || len(r.kills) > 0 {
				t.Error("after Kill:", c.Exited(), c.Err(), waiting.Err(), len(r.kills))
			}
		})
	}
	t.Run("crash", func(t *testing.T) {
		c, test, _, _ := boxed(t, "plugin", false)
		for _, err := range []error{test.Call("Plugin.Do", "exit3", new(string)), c.Err()} {
			errorSays(t, err, errBox.Error())
			if !c.Exited() || !errors.Is(err, errBox) || !errors.As(err, new(*ExitError)) {
				t.Errorf("Exited is %v, and the error %v", c.Exited(), err)
			}
		}
	})
	t.Run("outlived", func(t *testing.T) { // as by a child that has the connection
		c, test, r, _ := boxed(t, "plugin", true)
		errs := test.block(t, 4)
		r.ended <- errBox
		for range cap(errs) {
			if err := receive(t, "a call", errs); !errors.Is(err, errBox) || !c.Exited() {
				t.Errorf("Exited is %v, and a call in flight returned %v", c.Exited(), err)
			}
		}
	})
	t.Run("lost connection", func(t *testing.T) {
		c, test, _, process := boxed(t, "plugin", true)
		_ = process.Kill()
		err := test.Call("Plugin.Block", "", new(string))
		if c.Exited() || c.Err() != nil || errors.As(err, new(*ExitError)) || !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Errorf("the process is taken for dead, %v, with %v", c.Exited(), err)
		}
	})
	silent := newLab(t).silent("s")
	t.Run("stuck", func(t *testing.T) {
		r := newTestRunner(t, true)
		cfg := attachTo(r.config(silent))
		cfg.KillTimeout = 100 * time.Millisecond
		c, _ := start(t, cfg)
		within(t, "Kill", cfg.KillTimeout+2*time.Second, c.Kill)
		waiting, killing := receive(t, "Wait", r.waits), receive(t, "Kill", r.kills)
		if !c.Exited() || c.Err() != nil || waiting.Err() == nil || killing.Err() == nil {
			t.Error("after Kill:", c.Exited(), c.Err(), waiting.Err(), killing.Err())
		}
	})
	for found, want := range map[error]error{errBox: errBox, ErrProcessNotFound: ErrProcessNotFound, nil: ErrProcessNotFound} {
		rc := &ReattachConfig{Addr: silent, ReattachFunc: func() (AttachedRunner, error) { return nil, found }}
		if _, err := NewClient(attachTo(rc)).Start(); !errors.Is(err, want) || want == ErrProcessNotFound && err != want {
			t.Errorf("Start returned %v and not %v", err, want)
		}
	}
	// A panic in the host's own code stays one, and Kill works.
	c := NewClient(attachTo(&ReattachConfig{Addr: silent, ReattachFunc: func() (AttachedRunner, error) { panic(errBox) }}))
	func() {
		defer func() {
			if p := recover(); p != errBox {
				t.Error("Start panicked with", p)
			}
		}()
		_, _ = c.Start()
	}()
	within(t, "Kill", 0, c.Kill)
	_, err := c.Start()
	errorSays(t, err, "panicked")
}

// ---- SecureConfig ----

// sumOf returns the SHA-256 checksum of a file.
func sumOf(t testing.TB, path string) []byte {
	t.Helper()
	data, err := os.ReadFile(path)
	check(t, err)
	sum := sha256.Sum256(data)
	return sum[:]
}

// One SecureConfig may be used again, and by several clients at once.
func TestSecureConfig(t *testing.T) {
	t.Parallel()
	path := os.Args[0]
	hash := sha256.New()
	hash.Write([]byte("used before"))
	right := &SecureConfig{sumOf(t, path), hash}
	callers(t, 6, func(i int) {
		cfg := config("plugin")
		cfg.SecureConfig = right
		c := NewClient(cfg)
		defer c.Kill()
		ok, err := right.Check(path)
		if i%2 == 0 {
			err = connect(c)
		}
		if err != nil || !ok {
			t.Error(ok, err)
		}
	})
	wrong := append([]byte{right.Checksum[0] + 1}, right.Checksum[1:]...)
	for _, test := range []struct {
		secure *SecureConfig
		file   string
		err    error
	}{
		{&SecureConfig{wrong, hash}, path, nil},
		{&SecureConfig{right.Checksum[:16], hash}, path, nil},
		{&SecureConfig{nil, hash}, path, ErrSecureConfigNoChecksum},
		{&SecureConfig{wrong, nil}, path, ErrSecureConfigNoHash},
		{right, path + ".missing", fs.ErrNotExist},
	} {
		if ok, err := test.secure.Check(test.file); ok || !errors.Is(err, test.err) {
			t.Errorf("Check returned %v, %v and not %v", ok, err, test.err)
		}
	}
}
