package plugin

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
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
	modes["detaching"] = func() { hosted.cfg.Detach = true }
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

// Plugins exit with their hosts.
func TestOrphans(t *testing.T) {
	for _, test := range []struct{ plugin, host string }{
		{"late plugin", "host starting ready wait"},
		{"plugin say cry", "host started ready wait"},
		{"plugin say cry", "host shell idle ready wait"},
		{"plugin say cry", "host calling ready exit3"},
	} {
		t.Run(test.host, func(t *testing.T) {
			t.Parallel()
			l := newLab(t)
			host := l.start(test.host, childEnv+"="+test.plugin)
			l.read("host is ready")
			host.kill(t)
			l.write("serve", "")
			l.deserted(slack)
			l.read("plugin finished")
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

// torments are signals that end no plugin, and goOn continues a stopped process.
// Windows has neither.
var (
	torments []os.Signal
	goOn     = func(*os.Process) {}
)

// torment sends these signals and the torments to a process, in random order
// and at random moments.
func torment(p *os.Process, signals ...os.Signal) {
	signals = append(signals, torments...)
	for _, i := range rand.Perm(len(signals)) {
		time.Sleep(rand.N(100 * time.Millisecond))
		_ = p.Signal(signals[i])
	}
}

// Hosts and plugins are killed, stopped and continued at any moment, while they
// call, stream and print. No call may hang or get a wrong reply.
func TestTorture(t *testing.T) {
	l := newLab(t)
	end := time.Now().Add(time.Second)
	var calls atomic.Int64
	callers(t, 4, func(i int) {
		for time.Now().Before(end) && !t.Failed() {
			if i%2 == 0 {
				torturePlugin(t, l, &calls)
			} else {
				tortureHost(t, l)
			}
		}
	})
	if l.noted("a wrong reply") || calls.Load() == 0 {
		t.Errorf("there is a wrong reply, or there are no calls: %d", calls.Load())
	}
}

func torturePlugin(t *testing.T, l *lab, calls *atomic.Int64) {
	cfg := l.config("plugin say cry")
	cfg.KillTimeout = 500 * time.Millisecond
	cfg.AutoMTLS = rand.IntN(4) == 0
	c := NewClient(cfg)
	killed := async(func() bool {
		await(t, "a process", func() bool { return c.ID() != "" || ended(c.Done()) })
		pid, _ := strconv.Atoi(c.ID())
		if p, err := os.FindProcess(pid); err == nil && !ended(c.Done()) {
			torment(p, syscall.SIGTERM, os.Kill)
		}
		c.Kill()
		return ended(c.Done())
	})
	if p, err := c.Client(); err == nil {
		callers(t, 3, func(int) {
			test, err := Dispense[*testClient](p, "test")
			if err == nil {
				err = test.traffic(context.Background(), func() { calls.Add(1) })
			}
			if err == nil || err == errWrong {
				t.Errorf("a call to a killed plugin returned %v", err)
			}
		})
	}
	if !receive(t, "Kill", killed) {
		t.Error("a plugin outlives Kill")
	}
}

func tortureHost(t *testing.T, l *lab) {
	host := l.start("host busy", childEnv+"=plugin say cry")
	pid := l.readPid(fmt.Sprintf("busy-%d", host.Process.Pid))
	plugin, err := os.FindProcess(pid)
	check(t, err)
	if rand.IntN(2) == 0 {
		torment(plugin, os.Kill)
		receive(t, "the end of a host without its plugin", host.ended)
	} else {
		torment(host.Process, syscall.SIGTERM)
		torment(plugin)
		host.kill(t)
		goOn(plugin)
	}
	await(t, "the end of a plugin without its host", func() bool { return !slices.Contains(processesIn(l.tmp), pid) })
}
