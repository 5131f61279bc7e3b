//go:build unix

package plugin_test

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/muxplug/plugin"
)

func init() {
	ownGroup = func(cmd *exec.Cmd) { cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} }
	killMoments["stopped"] = killMoment{mode: "plugin", reached: stopped}
	killMoments["stopped and busy"] = killMoment{mode: "plugin", reached: stoppedAndBusy}
	addOrphanTests()
	addHostModes()
}

// addOrphanTests adds hosts that end by signals, and wrappers.
func addOrphanTests() {
	toGroup := func(s syscall.Signal) func(testing.TB, *testProcess) {
		return func(t testing.TB, host *testProcess) { signalTo(t, -host.Process.Pid, s) }
	}
	// toBoth kills the host, and sends its plugin a signal while main finishes.
	toBoth := func(s syscall.Signal) func(testing.TB, *testProcess) {
		return func(t testing.TB, host *testProcess) {
			l := &lab{t: t, notes: envValues(host.Env, notesEnv)[0]}
			host.kill(t)
			l.read("finishing")
			signalTo(t, l.readPid("plugin"), s)
			l.write("finish", "")
		}
	}
	for _, shell := range []string{"host shell idle ready wait", "host shell started ready wait"} {
		orphanTests = append(orphanTests,
			orphanTest{plugin: "plugin say cry", host: shell},
			orphanTest{plugin: "plugin endless", host: shell, endless: true})
	}
	// Wrappers that close what they do not know: one that becomes the plugin, and one that
	// stays between the two.
	for _, wrapper := range []string{"closing", "closing-between"} {
		orphanTests = append(orphanTests,
			orphanTest{plugin: "plugin say cry", host: "host " + wrapper + " idle ready wait"},
			orphanTest{plugin: "plugin endless", host: "host " + wrapper + " idle ready wait", endless: true})
	}
	for _, s := range []syscall.Signal{syscall.SIGINT, syscall.SIGHUP} {
		orphanTests = append(orphanTests,
			orphanTest{plugin: "plugin say cry", host: "host calling ready wait", end: toGroup(s)})
	}
	for _, s := range []syscall.Signal{syscall.SIGINT, syscall.SIGHUP, syscall.SIGTERM} {
		orphanTests = append(orphanTests,
			orphanTest{plugin: "plugin finishing", host: "host idle ready wait", end: toBoth(s)})
	}
}

// addHostModes adds what hosts do to their plugins and to themselves.
func addHostModes() {
	closing := func(script string) func() {
		return func() {
			cmd := exec.Command("sh", "-c", "exec 3<&- 4>&- 5>&-; "+script, os.Args[0])
			cmd.Env = hosted.cfg.Cmd.Env
			hosted.cfg.Cmd = cmd
		}
	}
	modes["closing"] = closing(`exec "$0"`)
	modes["closing-between"] = closing(`"$0"; exit $?`)
	// What a plugin is told in another namespace of processes: the number of the host is
	// that of a process that began at another time.
	modes["another-host"] = func() {
		os.Setenv(lifelineVariable, fmt.Sprintf(`{"Pid":%d,"Started":1}`, os.Getpid()))
	}
	// Let the system, or a loop as the first process of a container has it, reap the children.
	modes["ignoring"] = func() { signal.Ignore(syscall.SIGCHLD) }
	modes["reaping"] = func() {
		go func() { // ends with the process
			for {
				_, err := syscall.Wait4(-1, nil, 0, nil)
				if err != nil {
					time.Sleep(time.Millisecond)
				}
			}
		}()
	}
	// Crashes a plugin and prints how it ended. Then it kills another.
	modes["twice"] = func() {
		_ = hostedTest().Call("Plugin.Do", "exit3", new(string))
		<-hosted.client.Done()
		fmt.Println(hosted.client.Err())
		hostedTest()
		hosted.client.Kill()
	}
}

// stopped is the moment at which a plugin that has answered is stopped.
func stopped(t testing.TB, c *plugin.Client, _ *lab) bool {
	check(t, connect(c))
	stop(t, pidOf(t, c))
	return true
}

// stoppedAndBusy is the moment at which a plugin is stopped that has calls in
// flight, and whose stream is full.
func stoppedAndBusy(t testing.TB, c *plugin.Client, _ *lab) bool {
	p, err := c.Client()
	check(t, err)
	test := dispense(t, p)
	test.block(t, 4)
	stop(t, pidOf(t, c))
	test.Go("Plugin.Echo", string(noise(8<<20, 1)), new(string), nil) // ends with Kill
	return true
}

// stop stops a process. Its threads run on until they notice.
func stop(t testing.TB, pid int) {
	t.Helper()
	signalTo(t, pid, syscall.SIGSTOP)
	await(t, "a stop", func() bool {
		threads, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stat", pid))
		return !slices.ContainsFunc(threads, func(name string) bool {
			stat, err := os.ReadFile(name)
			return err == nil && !strings.Contains(string(stat), ") T ")
		})
	})
}

// pidOf returns the pid of a client's process.
func pidOf(t testing.TB, c *plugin.Client) int {
	t.Helper()
	pid, err := strconv.Atoi(c.ID())
	check(t, err)
	return pid
}

// signalTo sends a signal to a process or, if pid is negative, to a group.
func signalTo(t testing.TB, pid int, s syscall.Signal) {
	t.Helper()
	if err := syscall.Kill(pid, s); err != nil {
		t.Fatalf("signalling %d: %v", pid, err)
	}
}

// A file that cannot be executed, or a place where no socket can be made, is
// named, with a hint.
func TestStartErrorFiles(t *testing.T) {
	t.Parallel()
	runs := func(text string, mode fs.FileMode) func(testing.TB, *plugin.ClientConfig) {
		return func(t testing.TB, c *plugin.ClientConfig) {
			c.Cmd.Path = filepath.Join(t.TempDir(), "greeter")
			writeProgram(t, c.Cmd.Path, []byte(text), mode)
		}
	}
	sockets := func(to plugin.UnixSocketConfig) func(testing.TB, *plugin.ClientConfig) {
		return func(_ testing.TB, c *plugin.ClientConfig) { c.UnixSocketConfig = &to }
	}
	isDirectory := func(t testing.TB, c *plugin.ClientConfig) { c.Cmd.Path = t.TempDir() }
	bar := filepath.Join(t.TempDir(), "a|b")
	check(t, os.Mkdir(bar, 0o700))
	withBar := sockets(plugin.UnixSocketConfig{TempDir: bar})
	noShell := "#!/no/such/shell\n"
	foreign := "\x7fELF\x02\x01\x01" + strings.Repeat("\x00", 999)
	notThere := sockets(plugin.UnixSocketConfig{TempDir: "/no/such/dir"})
	aFile := sockets(plugin.UnixSocketConfig{TempDir: "/dev/null"})
	for name, test := range map[string]startFailure{
		"not executable":    {edit: runs("#!/bin/sh\n", 0o600), word: "executable", is: fs.ErrPermission},
		"no interpreter":    {edit: runs(noShell, 0o700), word: "interpreter", is: fs.ErrNotExist},
		"another processor": {edit: runs(foreign, 0o700), word: runtime.GOARCH, is: syscall.ENOEXEC},
		"a directory":       {edit: isDirectory, word: "it is a directory", without: "is it executable"},
		"no directory":      {edit: notThere, word: "TempDir", without: "interpreter", is: fs.ErrNotExist},
		"a file":            {edit: aFile, word: "TempDir", is: syscall.ENOTDIR},
		"a bar in a path":   {mode: "plugin", edit: withBar, word: "without |", without: "plugin.Serve"},
		"killed":            {mode: "killed", state: killedState, without: "plugin.Serve"},
		"says and is killed": {mode: "say killed", say: "jungle", state: killedState, word: "jungle",
			without: "plugin.Serve"},
		"too long a path": {edit: sockets(plugin.UnixSocketConfig{TempDir: longDir(t)}), word: "TempDir"},
		"no group":        {edit: sockets(plugin.UnixSocketConfig{Group: "no-such-group"}), word: "Group"},
	} {
		t.Run(name, test.run)
	}
}

// A plugin that cannot be sure which process is its host says so once, and serves.
func TestUnknownHost(t *testing.T) {
	t.Parallel()
	cfg := newLab(t).config("another-host plugin")
	logger, records := recorder()
	cfg.Logger = logger
	c, p := startPlugin(t, cfg)
	dispenseAndEcho(t, p)
	c.Kill()
	check(t, c.Err())
	warned := records.find("cannot detect the end of its host")
	if len(warned) != 1 || warned[0].level != hclog.Warn {
		t.Errorf("it logged %v", warned)
	}
}

// A plugin that somebody else has reaped has ended, and nothing says how.
func TestReapedBySomebodyElse(t *testing.T) {
	t.Parallel()
	for mode, ends := range map[string][]string{
		"ignoring": {"exit status is unknown"},
		"reaping":  {"exit status is unknown", "exit status 3"}, // either may be first
	} {
		t.Run(mode, func(t *testing.T) {
			t.Parallel()
			host := newLab(t).start("host "+mode+" twice", childEnv+"=plugin")
			receive(t, "the host's end", host.ended)
			text := host.output.String()
			says := func(end string) bool { return strings.Contains(text, end) }
			if !slices.ContainsFunc(ends, says) || !host.ProcessState.Success() {
				t.Errorf("the host ended with %v, and printed: %s", host.ProcessState, text)
			}
		})
	}
}

// A binary that is open for writing is started when it is closed, within a second.
func TestBusyBinary(t *testing.T) {
	t.Parallel()
	if runtime.GOOS != "linux" {
		return // it can be executed there all the same
	}
	cfg := newLab(t).config("plugin")
	cfg.Cmd.Path = copyBinary(t, "greeter")
	openForWriting := func() *os.File {
		f, err := os.OpenFile(cfg.Cmd.Path, os.O_WRONLY, 0)
		check(t, err)
		return f
	}
	busy := openForWriting()
	closing := time.AfterFunc(200*time.Millisecond, func() { _ = busy.Close() })
	defer closing.Stop()
	c, _ := startPlugin(t, cfg)
	c.Kill()

	defer openForWriting().Close()
	errorIs(t, "Start", startError(t, plugin.NewClient(cfg)), syscall.ETXTBSY)
}

// longDir makes a directory whose path is too long for a socket.
func longDir(t *testing.T) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), strings.Repeat("long", 30))
	check(t, os.Mkdir(dir, 0o700))
	return dir
}

// A plugin that was stopped for longer than yamux lets a Write take by default goes on,
// and with it all that was under way or has begun meanwhile.
func TestPause(t *testing.T) {
	l := newLab(t)
	c, p := startPlugin(t, l.config("plugin"))
	test := dispense(t, p)
	data := string(noise(8<<20, 1))
	r, w := io.Pipe()
	id, _ := test.broker.ServeReader(r)
	results := make(chan error, 3)
	go func() { results <- test.Call("Plugin.Copy", Transfer{Reader: id}, new(int64)) }()
	// That is more than is read ahead, so the plugin has dialled and reads.
	_, err := io.WriteString(w, data[:2<<20])
	check(t, err)
	stop(t, l.readPid("plugin"))
	paused := time.After(11 * time.Second)
	t.Parallel() // so that other tests run meanwhile
	go func() {
		var got string
		err := test.Call("Plugin.Echo", data, &got)
		if err == nil && got != data {
			err = errWrong
		}
		results <- err
	}()
	go func() { _, err := p.Dispense("test"); results <- err }()
	errorIs(t, "Ping of a stopped plugin", p.Ping(), context.DeadlineExceeded)
	<-paused
	if len(results) > 0 || c.Exited() {
		t.Fatalf("while the plugin was stopped, a call returned %v, and Err %v", <-results, c.Err())
	}
	signalTo(t, l.readPid("plugin"), syscall.SIGCONT)
	_, err = io.WriteString(w, data)
	check(t, errors.Join(err, w.Close()))
	for range cap(results) {
		check(t, receive(t, "a result", results))
	}
	check(t, p.Ping())
}

// A plugin that is dead is dead to every host, even if its parent never learns.
func TestZombie(t *testing.T) {
	t.Parallel()
	if _, err := os.Stat("/proc/self/stat"); err != nil {
		return // nothing tells a zombie there
	}
	l := newLab(t)
	host := l.start("host idle ready wait", childEnv+"=plugin")
	l.read("host is ready")
	stop(t, host.Process.Pid)
	rc := &plugin.ReattachConfig{Addr: parseAddr(l.read("address")), Pid: l.readPid("plugin")}
	c, p := startPlugin(t, attachTo(rc))
	err := dispense(t, p).Call("Plugin.Do", "exit3", new(string))
	if !errors.As(err, new(*plugin.ExitError)) || !c.Exited() {
		t.Errorf("after the end of the plugin, Exited is %v and a call returned %v", c.Exited(), err)
	}
	host.kill(t)
}

// A child that holds a plugin's output open does not delay Kill.
func TestKillBesideGrandchild(t *testing.T) {
	t.Parallel()
	c, p := startPlugin(t, newLab(t).config("plugin"))
	grandchild := mustCall[int](t, dispense(t, p).Client, "Fork", []string{"sleep", "1000"})
	defer signalTo(t, grandchild, syscall.SIGKILL)
	within(t, "Kill", 2*time.Second, c.Kill)
	if !c.Exited() || c.Err() != nil {
		t.Errorf("Exited is %v, and Err %v", c.Exited(), c.Err())
	}
}

// owner returns what the system says about a file.
func owner(t *testing.T, path string) (mode fs.FileMode, uid, gid int) {
	t.Helper()
	info, err := os.Stat(path)
	check(t, err)
	stat := info.Sys().(*syscall.Stat_t)
	return info.Mode() &^ fs.ModeType, int(stat.Uid), int(stat.Gid)
}

// A plugin's socket is in its own private directory, which is gone when the
// plugin is.
func TestSocketDir(t *testing.T) {
	t.Parallel()
	for name, end := range map[string]func(*plugin.Client, *os.Process){
		"Kill":    func(c *plugin.Client, _ *os.Process) { c.Kill() },
		"SIGKILL": func(_ *plugin.Client, p *os.Process) { _ = p.Kill() },
	} {
		cfg := newLab(t).config("plugin")
		c := plugin.NewClient(cfg)
		addr, err := c.Start()
		check(t, err)
		dir := filepath.Dir(addr.String())
		mode, uid, _ := owner(t, dir)
		if mode != 0o700 || uid != os.Getuid() || filepath.Dir(dir) != cfg.UnixSocketConfig.TempDir {
			t.Errorf("%s: the directory %s belongs to %d and has mode %v", name, dir, uid, mode)
		}
		end(c, cfg.Cmd.Process)
		receive(t, "Done", c.Done())
		if _, err := os.Stat(dir); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s: the directory is left, %v", name, err)
		}
	}
}

// A group may connect, and change nothing. A plugin that runs as another user
// needs one.
func TestSocketGroup(t *testing.T) {
	t.Parallel()
	uid, gid := os.Getuid(), os.Getgid()
	if uid == 0 { // who may give files to any group
		uid, gid = 54321, 54321
	}
	cfg := testConfig("plugin")
	cfg.UnixSocketConfig = &plugin.UnixSocketConfig{Group: strconv.Itoa(gid), TempDir: "/tmp"}
	user := &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid), NoSetGroups: true}
	cfg.Cmd.SysProcAttr = &syscall.SysProcAttr{Credential: user}
	// The host opens the binary then, and the user needs no access to its directory.
	cfg.SecureConfig = &plugin.SecureConfig{Checksum: sumOf(t, cfg.Cmd.Path), Hash: sha256.New()}
	c, p := startPlugin(t, cfg)
	addr, err := c.Start()
	check(t, err)
	dir := filepath.Dir(addr.String())
	if mode, _, group := owner(t, dir); mode != 0o770|fs.ModeSticky || group != gid {
		t.Errorf("the directory belongs to group %d and has mode %v", group, mode)
	}
	if mode, user, group := owner(t, addr.String()); mode != 0o660 || user != uid || group != gid {
		t.Errorf("the socket belongs to %d:%d and has mode %v", user, group, mode)
	}
	dispenseAndEcho(t, p)
	c.Kill()
	if _, err := os.Stat(dir); !errors.Is(err, fs.ErrNotExist) || !cfg.Cmd.ProcessState.Success() {
		t.Errorf("the directory is left, %v, and the plugin has ended with %v", err, cfg.Cmd.ProcessState)
	}
}

// A TMPDIR that is too long for a socket, or has a mark of the handshake in its path, is
// not used.
func TestUnfitTMPDIR(t *testing.T) {
	bar := filepath.Join(t.TempDir(), "a|b")
	check(t, os.Mkdir(bar, 0o700))
	for _, unfit := range []string{longDir(t), bar} {
		t.Setenv("TMPDIR", unfit)
		_, p := startPlugin(t, testConfig("plugin"))
		dispenseAndEcho(t, p)
		left, err := os.ReadDir(unfit)
		check(t, err)
		checkEqual(t, "files in TMPDIR", len(left), 0)
	}
}

// swapHash swaps the file when it has been summed.
type swapHash struct {
	hash.Hash
	swap func()
}

func (h swapHash) Sum(b []byte) []byte {
	h.swap()
	return h.Hash.Sum(b)
}

// On Linux, what was summed is what runs, and it sees itself as if it had not
// been summed.
func TestSummedIsRun(t *testing.T) {
	t.Parallel()
	if runtime.GOOS != "linux" {
		return // it is not promised there
	}
	path := copyBinary(t, "greeter")
	self := func(secure *plugin.SecureConfig) Self {
		cfg := newLab(t).config("plugin")
		cfg.Cmd.Path, cfg.Cmd.Args = path, []string{"zero", "one"}
		cfg.SecureConfig = secure
		_, p := startPlugin(t, cfg)
		return mustCall[Self](t, dispense(t, p).Client, "Self", struct{}{})
	}
	plain := self(nil)
	sum := sumOf(t, path)
	bad := filepath.Join(t.TempDir(), "bad")
	writeProgram(t, bad, []byte("#!/bin/sh\n"), 0o700)
	summed := self(&plugin.SecureConfig{Checksum: sum, Hash: sha256.New()})
	if summed.Executable != plain.Executable || !slices.Equal(summed.Args, plain.Args) {
		t.Errorf("it is %q %q, and was %q %q", summed.Executable, summed.Args, plain.Executable, plain.Args)
	}
	swapping := swapHash{sha256.New(), func() { check(t, os.Rename(bad, path)) }}
	self(&plugin.SecureConfig{Checksum: sum, Hash: swapping})
	if slices.Equal(sumOf(t, path), sum) {
		t.Error("the file was not swapped")
	}
}

// A plugin that dies under a host that did not start it leaves neither its socket nor the
// directory.
func TestAttachedLeavesNoSocket(t *testing.T) {
	t.Parallel()
	l := newLab(t) // which finds what is left
	first := l.start("host detaching idle", childEnv+"=plugin")
	receive(t, "the end of the first host", first.ended)
	pid := l.readPid("plugin")
	cfg := attachTo(&plugin.ReattachConfig{
		ProtocolVersion: 3,
		Addr:            parseAddr(l.read("address")),
		Pid:             pid,
	})
	c, _ := startPlugin(t, cfg)
	signalTo(t, pid, syscall.SIGKILL)
	receive(t, "Done", c.Done())
}
