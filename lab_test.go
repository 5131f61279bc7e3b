package plugin_test

import (
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"runtime/pprof"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/muxplug/plugin"
)

// ---- What is left behind ----

// leavesNothing fails the test if it leaves a goroutine, child process,
// descriptor or file behind. It is not for parallel tests. Call it before
// anything else: cleanups that are added later run before its check.
func leavesNothing(t testing.TB) {
	t.Helper()
	left := takeStock(os.TempDir())
	t.Cleanup(func() {
		checkEqual(t, "left behind", left(), "")
	})
}

// takeStock lists what this process has and what is in the temporary directory.
// The function that it returns lists what was added since, after waiting a
// while for it to go.
func takeStock(tmp string) (left func() string) {
	goroutines, before := runtime.NumGoroutine(), held(tmp)
	return func() (left string) {
		poll(hangs, func() bool {
			more := slices.DeleteFunc(held(tmp), func(s string) bool { return slices.Contains(before, s) })
			if n := runtime.NumGoroutine(); n > goroutines {
				more = append(more, fmt.Sprintf("%d goroutines:\n%s", n-goroutines, stacks()))
			}
			if leaked := leakedGoroutines(); leaked != "" {
				more = append(more, leaked)
			}
			left = strings.Join(more, "\n")
			return left == ""
		})
		return left
	}
}

// leakedGoroutines describes the goroutines that nothing can wake any more, where Go
// finds them: from 1.27 on, and in 1.26 with GOEXPERIMENT=goroutineleakprofile.
func leakedGoroutines() string {
	profile := pprof.Lookup("goroutineleak")
	if profile == nil {
		return ""
	}
	var text strings.Builder
	_ = profile.WriteTo(&text, 1) // which looks for them
	if profile.Count() == 0 {
		return ""
	}
	return text.String()
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
		to, _ := os.Readlink(fd)
		device := strings.HasPrefix(to, "/dev/")
		switch { // the runtime has descriptors of other kinds
		case strings.HasPrefix(to, "pipe:"), strings.HasPrefix(to, "socket:"),
			strings.HasPrefix(to, "/") && !device:
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
func (l *lab) config(mode string, env ...string) *plugin.ClientConfig {
	cfg := testConfig(mode, append(l.env(), env...)...)
	if runtime.GOOS != "windows" {
		cfg.UnixSocketConfig = &plugin.UnixSocketConfig{TempDir: l.tmp}
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

// exe ends the names of programs.
var exe = onWindows(".exe", "")

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
