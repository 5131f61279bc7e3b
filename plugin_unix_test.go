//go:build unix

package plugin

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"math/rand/v2"
	"net"
	"net/rpc"
	"os"
	"os/exec"
	"os/signal"
	"os/user"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/iotest"
	"time"

	"github.com/hashicorp/go-hclog"
)

// ==== What all sections use ====

// publicDir returns a directory that every user may enter, with a copy of the
// test binary in it.
func publicDir(t *testing.T) (dir, binary string) {
	t.Helper()
	dir = shortDir(t)
	binary = filepath.Join(dir, "greeter")
	copyBinary(t, binary)
	if err := errors.Join(os.Chmod(binary, 0o755), os.Chmod(dir, 0o755)); err != nil { // whatever the umask
		t.Fatal(err)
	}
	return dir, binary
}

// ==== Starting, calling, stopping ====

// What has to do with sockets, users and signals of Unix.

func init() {
	if os.Getenv(modeEnv) == "" {
		// The first Notify of a process starts a goroutine that never ends. It
		// must be there before the first count of goroutines.
		c := make(chan os.Signal, 1)
		signal.Notify(c, syscall.SIGTERM)
		signal.Stop(c)
	}
	// Tells who it is, before it serves.
	modes["base-user"] = func() {
		s := &baseServer{environ: []string{"USER_ID=" + strconv.Itoa(os.Getuid())}}
		servePlugins(basePlugins(s))
	}
}

// baseOwner returns what the system says about a file.
func baseOwner(t *testing.T, path string) (mode os.FileMode, uid, gid int) {
	t.Helper()
	info, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	stat := info.Sys().(*syscall.Stat_t)
	return info.Mode() &^ os.ModeType, int(stat.Uid), int(stat.Gid)
}

// baseSocket returns the plugin's socket and the directory it is in.
func baseSocket(t *testing.T, c *Client) (path, dir string) {
	t.Helper()
	addr, err := c.Start()
	if err != nil {
		t.Fatal(err)
	}
	return addr.String(), filepath.Dir(addr.String())
}

func baseGone(t *testing.T, path string) {
	t.Helper()
	if _, err := os.Lstat(path); !os.IsNotExist(err) {
		t.Errorf("%s is still there: %v", path, err)
	}
}

// TestSocketDirectory checks that nobody else may enter it, that each plugin
// has its own, and that it is gone however the plugin ended.
func TestSocketDirectory(t *testing.T) {
	leavesNothing(t)
	seen := make(map[string]bool)
	for name, end := range map[string]func(*Client, *exec.Cmd){
		"by Kill":           func(c *Client, _ *exec.Cmd) { c.Kill() },
		"by SIGKILL":        func(_ *Client, cmd *exec.Cmd) { _ = cmd.Process.Kill() },
		"by SIGTERM":        func(_ *Client, cmd *exec.Cmd) { _ = cmd.Process.Signal(syscall.SIGTERM) },
		"without a connect": nil,
	} {
		cfg := config("base")
		cfg.UnixSocketConfig = &UnixSocketConfig{TempDir: shortDir(t)}
		c := NewClient(cfg)
		t.Cleanup(c.Kill)
		path, dir := baseSocket(t, c)
		if mode, uid, _ := baseOwner(t, dir); mode != 0o700 || uid != os.Getuid() {
			t.Errorf("the directory is of user %d with %v", uid, mode)
		}
		if filepath.Dir(dir) != cfg.UnixSocketConfig.TempDir {
			t.Errorf("it is %s", dir)
		}
		if seen[dir] {
			t.Error("two plugins have the same directory")
		}
		seen[dir] = true
		if end == nil {
			c.Kill()
		} else {
			if _, err := c.Client(); err != nil {
				t.Fatal(err)
			}
			end(c, cfg.Cmd)
		}
		if !waitFor(hangs, c.done) {
			t.Fatalf("it does not end %s", name)
		}
		baseGone(t, path)
		baseGone(t, dir)
	}
	cfg := config("base")
	cfg.UnixSocketConfig = &UnixSocketConfig{TempDir: filepath.Join(t.TempDir(), "missing")}
	c := NewClient(cfg)
	defer c.Kill()
	_, err := c.Start()
	errorSays(t, err, "missing", "no such file")
}

// TestSocketGroup checks that a group may be let in.
func TestSocketGroup(t *testing.T) {
	leavesNothing(t)
	gid := os.Getgid()
	if os.Getuid() == 0 {
		gid = 54321 // only root may give files to a group that it is not in
	}
	groups := []string{strconv.Itoa(gid)}
	if g, err := user.LookupGroupId(strconv.Itoa(os.Getgid())); err == nil {
		groups = append(groups, g.Name)
	}
	for i, group := range groups {
		cfg := config("base")
		cfg.UnixSocketConfig = &UnixSocketConfig{Group: group}
		c, p := start(t, cfg)
		want := gid
		if i > 0 {
			want = os.Getgid()
		}
		path, dir := baseSocket(t, c)
		// Its members may not put another file in a file's place.
		if mode, uid, got := baseOwner(t, dir); mode != 0o770|os.ModeSticky || uid != os.Getuid() || got != want {
			t.Errorf("the directory is of %d:%d with %v", uid, got, mode)
		}
		if mode, _, got := baseOwner(t, path); mode != 0o660 || got != want {
			t.Errorf("the socket is of group %d with %v", got, mode)
		}
		if got := baseLookup(t, p, EnvUnixSocketGroup); len(got) != 1 || got[0] != group {
			t.Errorf("the plugin is told %q", got)
		}
		c.Kill()
		baseGone(t, dir)
	}
	cfg := config("base")
	cfg.UnixSocketConfig = &UnixSocketConfig{Group: "no-such-group"}
	c := NewClient(cfg)
	defer c.Kill()
	_, err := c.Start()
	errorSays(t, err, "no-such-group")
}

// TestSocketPathTooLong checks that a TMPDIR that is too long for a socket is
// done without, and that the error says so where a directory was asked for.
func TestSocketPathTooLong(t *testing.T) {
	leavesNothing(t)
	long := t.TempDir()
	for len(long) < 120 {
		long = filepath.Join(long, strings.Repeat("long", 8))
	}
	if err := os.MkdirAll(long, 0o755); err != nil {
		t.Fatal(err)
	}
	cfg := config("base")
	cfg.UnixSocketConfig = &UnixSocketConfig{TempDir: long}
	c := NewClient(cfg)
	_, err := c.Start()
	errorSays(t, err, "too long", "TempDir", long)
	c.Kill()

	t.Setenv("TMPDIR", long)
	cfg.UnixSocketConfig = nil
	c, p := start(t, cfg)
	greets(t, p)
	_, dir := baseSocket(t, c)
	if mode, _, _ := baseOwner(t, dir); mode != 0o700 {
		t.Errorf("the directory has %v", mode)
	}
	c.Kill()
	baseGone(t, dir)
	if entries, err := os.ReadDir(long); err != nil || len(entries) > 0 {
		t.Errorf("left in TMPDIR are %v, %v", entries, err)
	}
}

// TestOtherUser starts the plugin under another user, which only root can; any
// other user tries it with itself.
func TestOtherUser(t *testing.T) {
	leavesNothing(t)
	dir, binary := publicDir(t)
	cred := &syscall.Credential{Uid: uint32(os.Getuid()), Gid: uint32(os.Getgid()), NoSetGroups: true}
	if os.Getuid() == 0 {
		cred = &syscall.Credential{Uid: 54321, Gid: 54322}
	}
	for name, change := range map[string]func(*ClientConfig){
		"alone":             func(*ClientConfig) {},
		"with SecureConfig": func(c *ClientConfig) { c.SecureConfig = &SecureConfig{baseSum(t), sha256.New()} },
		"with AutoMTLS":     func(c *ClientConfig) { c.AutoMTLS = true },
		"with a group":      func(c *ClientConfig) { c.UnixSocketConfig.Group = strconv.Itoa(int(cred.Gid)) },
	} {
		cfg := config("base-user")
		cfg.Cmd.Path, cfg.Cmd.Dir = binary, dir
		cfg.Cmd.SysProcAttr = &syscall.SysProcAttr{Credential: cred}
		cfg.UnixSocketConfig = &UnixSocketConfig{TempDir: dir}
		change(cfg)
		c := NewClient(cfg)
		p, err := c.Client()
		if err != nil {
			t.Errorf("%s: %v", name, err)
			c.Kill()
			continue
		}
		if got := baseLookup(t, p, "USER_ID"); len(got) != 1 || got[0] != strconv.Itoa(int(cred.Uid)) {
			t.Errorf("%s: it runs as %q", name, got)
		}
		_, private := baseSocket(t, c)
		if mode, uid, _ := baseOwner(t, private); uid != int(cred.Uid) || mode&0o007 != 0 {
			t.Errorf("%s: the directory is of user %d with %v", name, uid, mode)
		}
		c.Kill()
		if !cfg.Cmd.ProcessState.Success() {
			t.Errorf("%s: it ended with %v", name, cfg.Cmd.ProcessState)
		}
		baseGone(t, private)
	}
}

// TestBadFile is the part of TestBadBinary that is about a Unix file system.
func TestBadFile(t *testing.T) {
	for _, test := range []struct {
		name, text string
		mode       os.FileMode
		exited     bool
		texts      []string
	}{
		{"not executable", "#!/bin/sh\n", 0o644, false, []string{"not executable", "chmod"}},
		{"a script without its interpreter", "#!/no/such/shell\n", 0o755, false, []string{"interpreter", "/no/such/shell"}},
		{"a script that prints junk", "#!/bin/sh\necho hello\necho world\necho oops >&2\n", 0o755, true, []string{"hello", "world", "oops", "no handshake"}},
		{"a script that prints nothing", "#!/bin/sh\n", 0o755, true, []string{"without a handshake", "exit status 0"}},
		{"a script that kills itself", "#!/bin/sh\nkill -9 $$\n", 0o755, true, []string{"signal: killed"}},
		{"an empty file", "", 0o755, false, []string{"no program"}},
		{"text", "hello\n", 0o755, false, []string{"no program"}},
		{"for another processor", "\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\xf3\x00" + strings.Repeat("\x00", 100), 0o755, false, []string{"riscv64"}},
		{"for Windows", "MZ" + strings.Repeat("\x00", 100), 0o755, false, []string{"Windows"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			leavesNothing(t)
			path := filepath.Join(t.TempDir(), "greeter")
			if err := os.WriteFile(path, []byte(test.text), test.mode); err != nil {
				t.Fatal(err)
			}
			cfg := config("")
			cfg.Cmd = exec.Command(path)
			c := NewClient(cfg)
			defer c.Kill()
			var err error
			returns(t, "Start", func() { _, err = c.Start() })
			errorSays(t, err, append(test.texts, "plugin greeter")...)
			if exited := cfg.Cmd.ProcessState != nil; exited != test.exited {
				t.Errorf("it ended with %v", cfg.Cmd.ProcessState)
			}
		})
	}
}

// TestTestModeSignals checks that in test mode the process's signals stay with
// whoever else takes them.
func TestTestModeSignals(t *testing.T) {
	leavesNothing(t)
	signals := make(chan os.Signal, 4)
	signal.Notify(signals, syscall.SIGTERM, os.Interrupt)
	defer signal.Stop(signals)
	rc, _ := baseServeTest(t, &ServeConfig{
		HandshakeConfig: testHandshake, Plugins: testPlugins(), Logger: hclog.NewNullLogger(), Test: &ServeTestConfig{},
	})
	_, p := start(t, attachTo(rc))
	for _, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGINT} {
		if err := syscall.Kill(os.Getpid(), sig); err != nil {
			t.Fatal(err)
		}
		select {
		case got := <-signals:
			if got != sig {
				t.Errorf("got %v and not %v", got, sig)
			}
		case <-time.After(hangs):
			t.Errorf("%v does not arrive", sig)
		}
	}
	greets(t, p, "after the signals")
}

// ==== Life and death ====

// Hosts and plugins that are killed, stopped, interrupted and detached.

var lifeTorture = flag.Duration("torture", time.Second, "how long hosts and plugins are tortured")

// orphanBound is how long a plugin may outlive its host.
const orphanBound = 2 * time.Second

// lifeHostEnv tells a host what to do: a lifeHost in JSON.
const lifeHostEnv = "TEST_LIFE_HOST"

// lifeHost describes a host in a process of its own. Until it ends, it has a
// plugin at a certain moment of its life.
type lifeHost struct {
	Plugin   string // the mode of the plugin
	At       string // the moment: see lifeMoments
	End      string // how it ends then; "" waits for the test to do it
	Shell    bool   // the plugin is started by a shell
	Detach   bool
	Reattach bool // ReattachConfig is called
}

// start starts the host, in a process group of its own: what is sent to that
// group is what a terminal sends.
func (h lifeHost) start(l *lab) *lifeProcess { return startLife(l, "life host", h) }

// lifeProcess is a process that a test starts to kill it.
type lifeProcess struct {
	*exec.Cmd
	output *bytes.Buffer
	waited chan struct{}
}

func startLife(l *lab, mode string, h lifeHost) *lifeProcess {
	l.t.Helper()
	spec, err := json.Marshal(h)
	if err != nil {
		l.t.Fatal(err)
	}
	p := &lifeProcess{exec.Command(os.Args[0]), new(bytes.Buffer), make(chan struct{})}
	p.Env = append(os.Environ(), modeEnv+"="+mode, lifeHostEnv+"="+string(spec))
	p.Env = append(p.Env, l.env()...)
	p.Stdout, p.Stderr = p.output, p.output
	p.WaitDelay = time.Second
	p.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := p.Start(); err != nil {
		l.t.Fatal(err)
	}
	go func() { defer close(p.waited); _ = p.Wait() }()
	l.t.Cleanup(func() {
		_ = p.Process.Kill()
		<-p.waited
		if l.t.Failed() && p.output.Len() > 0 {
			l.t.Logf("the host printed: %s", p.output)
		}
	})
	return p
}

// kill kills the process and waits until it is gone.
func (p *lifeProcess) kill(t testing.TB) {
	t.Helper()
	_ = p.Process.Kill()
	receive(t, "killing", p.waited)
}

// lifeMoments are the moments of a plugin's life. Each brings it there and
// returns; nothing that it has waits for it to end.
var lifeMoments = map[string]func(*Client){
	"before Serve": func(c *Client) {
		go c.Start()
		awaitNote("plugin")
	},
	"before the connection": func(c *Client) {
		if _, err := c.Start(); err != nil {
			panic(err)
		}
	},
	"idle": func(c *Client) { lifeDispense(c) },
	"in a call": func(c *Client) {
		life := lifeDispense(c)
		go life.Call("Plugin.Hang", true, new(bool))
		awaitNote("in a call")
	},
	"busy": func(c *Client) {
		life := lifeDispense(c)
		note(fmt.Sprintf("busy-%d", os.Getpid()), c.ID())
		err := life.traffic(context.Background(), func(n int) {
			note(fmt.Sprintf("progress-%d", os.Getpid()), strconv.Itoa(n))
		})
		if err == errWrong {
			note("a wrong answer", "")
		}
		c.Kill()
		os.Exit(0)
	},
}

// lifeDispense is dispense for a process that is no test.
func lifeDispense(c *Client) *lifeClient {
	p, err := c.Client()
	if err != nil {
		panic(err)
	}
	life, err := Dispense[*lifeClient](p, "life")
	if err != nil {
		panic(err)
	}
	return life
}

func init() {
	modes["life host"] = func() {
		var h lifeHost
		if err := json.Unmarshal([]byte(os.Getenv(lifeHostEnv)), &h); err != nil {
			panic(err)
		}
		if h.End == "Ctrl-C" || h.End == "hangup" {
			// Whoever started the tests may have made them ignore it.
			interrupted := make(chan os.Signal, 1)
			signal.Notify(interrupted, lifeTerminal[h.End])
			go func() { <-interrupted; os.Exit(130) }()
		}
		cfg := config(h.Plugin)
		cfg.Detach = h.Detach
		if h.Shell {
			shell := exec.Command("sh", "-c", `"$0"; exit $?`, os.Args[0])
			shell.Env = cfg.Cmd.Env
			cfg.Cmd = shell
		}
		c := NewClient(cfg)
		lifeMoments[h.At](c)
		addr := c.starting.result().addr
		if addr != nil {
			note("address", addr.String())
		}
		if h.Reattach {
			rc := c.ReattachConfig()
			note("reattach", fmt.Sprint(rc.Pid))
		}
		note("host is ready", "")
		switch h.End {
		case "exit":
			os.Exit(3)
		case "panic":
			panic("the host has a bug")
		}
		select {}
	}
	// It does for a plugin what go-plugin's hosts do.
	modes["life other host"] = func() {
		cmd := exec.Command(os.Args[0])
		dir := os.Getenv("TMPDIR")
		cmd.Env = append(os.Environ(), modeEnv+"=life",
			testHandshake.MagicCookieKey+"="+testHandshake.MagicCookieValue,
			"PLUGIN_MIN_PORT=0", "PLUGIN_MAX_PORT=0", "PLUGIN_PROTOCOL_VERSIONS=3", "PLUGIN_UNIX_SOCKET_DIR="+dir)
		stdout, err := cmd.StdoutPipe()
		if err != nil {
			panic(err)
		}
		if _, err := cmd.StderrPipe(); err != nil {
			panic(err)
		}
		if err := cmd.Start(); err != nil {
			panic(err)
		}
		line, err := bufio.NewReader(stdout).ReadString('\n')
		if err != nil {
			panic(err)
		}
		h, err := parseHandshake(line)
		if err != nil {
			panic(err)
		}
		conn, err := net.Dial(h.addr.Network(), h.addr.String())
		if err != nil {
			panic(err)
		}
		if _, err := NewRPCClient(conn, lifePlugins()); err != nil {
			panic(err)
		}
		note("address", h.addr.String())
		note("host is ready", "")
		select {}
	}
}

// lifeTerminal is what a terminal sends to all of its processes.
var lifeTerminal = map[string]syscall.Signal{"Ctrl-C": syscall.SIGINT, "hangup": syscall.SIGHUP}

// A plugin is gone when its host is gone, however and whenever that goes.
func TestLifeOrphan(t *testing.T) {
	t.Parallel()
	var hosts []lifeHost
	for _, at := range []string{"before Serve", "before the connection", "idle", "in a call"} {
		for _, end := range []string{"", "exit", "panic", "Ctrl-C", "hangup"} {
			plugin := "life"
			if at == "before Serve" {
				// A signal ends it there, and nobody is left to tidy up.
				if lifeTerminal[end] != 0 {
					continue
				}
				plugin = "life late"
			}
			hosts = append(hosts, lifeHost{Plugin: plugin, At: at, End: end})
			if end == "" {
				hosts = append(hosts, lifeHost{Plugin: plugin, At: at, Shell: true})
			}
		}
	}
	for _, h := range hosts {
		name := fmt.Sprintf("%s, %s", h.At, h.End)
		if h.Shell {
			name += "through a shell"
		}
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			l := newLab(t)
			host := h.start(l)
			l.read("host is ready")
			l.read("plugin")
			switch h.End {
			case "":
				host.kill(t)
			case "Ctrl-C", "hangup":
				if err := syscall.Kill(-host.Process.Pid, lifeTerminal[h.End]); err != nil {
					t.Fatal(err)
				}
			}
			receive(t, "the host's end", host.waited)
			if h.At == "before Serve" {
				if len(l.processes()) == 0 {
					t.Error("the plugin is gone before it was in Serve")
				}
				l.write("serve", "")
			}
			l.deserted(orphanBound + slack)
			if !l.noted("main has finished") {
				t.Error("main has not run what follows Serve")
			}
		})
	}
}

// The signal that ended the host may reach the plugin later. It lets main finish.
func TestLifeOrphanLateSignal(t *testing.T) {
	t.Parallel()
	for _, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGHUP, syscall.SIGINT} {
		t.Run(sig.String(), func(t *testing.T) {
			t.Parallel()
			l := newLab(t)
			host := lifeHost{Plugin: "life finishing", At: "idle"}.start(l)
			l.read("host is ready")
			pid := l.readPid("plugin")
			host.kill(t)
			l.read("main is finishing")
			if err := syscall.Kill(pid, sig); err != nil {
				t.Error(err)
			}
			l.write("finish", "")
			l.deserted(orphanBound + slack)
			if !l.noted("main has finished") {
				t.Error("main has not finished")
			}
		})
	}
}

// A main that goes on when its host is gone is ended.
func TestLifeOrphanEndless(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name         string
		shell, later bool // later: main is at it already when the host goes
	}{
		{name: "alone"}, {name: "through a shell", shell: true}, {name: "later", later: true},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			l := newLab(t)
			host := lifeHost{Plugin: "life endless", At: "idle", Shell: test.shell}.start(l)
			l.read("host is ready")
			if test.later {
				lifeSignal(t, l.readPid("plugin"), syscall.SIGTERM)
				l.read("main runs on")
			}
			host.kill(t)
			l.read("main runs on")
			l.deserted(orphanBound + slack)
		})
	}
}

// survives fails the test if the process ends within the time in which an
// orphan would.
func survives(t testing.TB, pid int) {
	t.Helper()
	if poll(orphanBound+time.Second, func() bool { return !lifeRuns(pid) }) {
		t.Fatal("the plugin has not survived its host")
	}
}

// lifeRuns reports whether a process is there and no zombie.
func lifeRuns(pid int) bool {
	p, err := os.FindProcess(pid)
	return err == nil && (&process{Process: p}).alive()
}

func lifeSignal(t testing.TB, pid int, s syscall.Signal) {
	t.Helper()
	if err := syscall.Kill(pid, s); err != nil {
		t.Fatalf("signalling %d: %v", pid, err)
	}
	if s == syscall.SIGSTOP {
		// Its threads run on until they notice. Without /proc, we cannot.
		await(t, "a stop", func() bool {
			threads, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stat", pid))
			return !slices.ContainsFunc(threads, func(name string) bool {
				stat, err := os.ReadFile(name)
				return err == nil && !strings.Contains(string(stat), ") T ")
			})
		})
	}
}

// A plugin that is meant to live on does, whatever it writes, and the next
// host gets what it prints and can end it.
func TestLifeDetach(t *testing.T) {
	t.Parallel()
	for _, h := range []lifeHost{
		{Plugin: "life detached", At: "idle", Detach: true},
		{Plugin: "life detached", At: "before the connection", Detach: true},
		{Plugin: "life detached", At: "idle", Detach: true, Reattach: true},
		{Plugin: "life detached", At: "idle", Reattach: true},
		{Plugin: "life detached", At: "before the connection", Reattach: true},
	} {
		t.Run(fmt.Sprintf("Detach %v, Reattach %v, %s", h.Detach, h.Reattach, h.At), func(t *testing.T) {
			t.Parallel()
			l := newLab(t)
			host := h.start(l)
			l.read("host is ready")
			pid := l.readPid("plugin")
			if h.Reattach && l.readPid("reattach") != pid {
				t.Errorf("ReattachConfig has another pid than %d", pid)
			}
			host.kill(t)
			l.write("the host is dead", "")
			l.read("has written")
			if h.At == "idle" && h.Detach != h.Reattach {
				survives(t, pid)
			}

			var stdout, stderr syncBuffer
			cfg := l.config("")
			cfg.Cmd = nil
			cfg.Reattach = &ReattachConfig{Protocol: ProtocolNetRPC, ProtocolVersion: 3, Addr: &net.UnixAddr{Net: "unix", Name: l.read("address")}, Pid: pid}
			cfg.SyncStdout, cfg.SyncStderr = &stdout, &stderr
			c, p := start(t, cfg)
			life := dispense[*lifeClient](t, p, "life")
			if err := life.Call("Plugin.Print", "for the second host\n", new(bool)); err != nil {
				t.Fatal(err)
			}
			await(t, "what the plugin printed", func() bool {
				return strings.Contains(stdout.String(), "for the second host") && strings.Contains(stderr.String(), "for the second host")
			})
			c.Kill()
			receive(t, "Done", c.Done())
			if err := c.Err(); err != nil {
				t.Error(err)
			}
			l.deserted(slack)
			if !l.noted("main has finished") {
				t.Error("main has not finished")
			}
		})
	}
}

func init() {
	modes["life detached"] = func() {
		note("plugin", strconv.Itoa(os.Getpid()))
		stdout, stderr := os.Stdout, os.Stderr
		go func() {
			awaitNote("the host is dead")
			for range 10 {
				for _, f := range []*os.File{stdout, stderr} {
					fmt.Fprintln(f, strings.Repeat("to whom it may concern ", 1000))
				}
				// If there never was a connection, this waits for one, and
				// there is not much room.
				for _, f := range []*os.File{os.Stdout, os.Stderr} {
					fmt.Fprintln(f, "to whom it may concern")
				}
			}
			note("has written", "")
		}()
		lifeServe()
		fmt.Fprintln(os.Stdout, "main is finishing")
		fmt.Fprintln(os.Stderr, "main is finishing")
		note("main has finished", "")
	}
}

// Under a host made with go-plugin a plugin survives, as it does there.
func TestLifeOtherHost(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	host := startLife(l, "life other host", lifeHost{})
	l.read("host is ready")
	pid := l.readPid("plugin")
	host.kill(t)
	survives(t, pid)
	cfg := l.config("")
	cfg.Cmd = nil
	cfg.Reattach = &ReattachConfig{Addr: &net.UnixAddr{Net: "unix", Name: l.read("address")}, Pid: pid}
	c, p := start(t, cfg)
	if err := dispense[*lifeClient](t, p, "life").Call("Plugin.Print", "hello\n", new(bool)); err != nil {
		t.Error(err)
	}
	c.Kill()
	l.deserted(slack)
	// That library's hosts read no more than the plugin's output.
	if !l.noted("main has finished") {
		t.Error("main has not finished")
	}
}

// What the system says when it cannot run a file is told in words.
func TestLifeStartErrorFiles(t *testing.T) {
	t.Parallel()
	other := map[bool]struct {
		name    string
		machine byte
	}{true: {"arm64", 183}, false: {"amd64", 62}}[runtime.GOARCH == "amd64"]
	elf := make([]byte, 4096)
	copy(elf, "\x7fELF\x02\x01\x01")
	elf[16], elf[18], elf[20] = 2, other.machine, 1
	elf[52] = 64
	runs := func(data []byte, mode fs.FileMode) func(testing.TB, *ClientConfig) {
		return func(t testing.TB, cfg *ClientConfig) {
			cfg.Cmd.Path = filepath.Join(t.TempDir(), "greeter")
			writeProgram(t, cfg.Cmd.Path, data, mode)
		}
	}
	for _, test := range []lifeFailure{
		{name: "not executable", edit: runs(elf, 0o600), code: -1, hint: "not executable", is: fs.ErrPermission},
		{name: "architecture", edit: runs(elf, 0o700), code: -1, hint: other.name + "|" + runtime.GOOS + "/" + runtime.GOARCH, is: syscall.ENOEXEC},
		{name: "interpreter", edit: runs([]byte("#!/no/such/interpreter -x\n"), 0o700), code: -1, hint: "interpreter|/no/such/interpreter", is: fs.ErrNotExist},
		{name: "no program", edit: runs([]byte("hello\n"), 0o700), code: -1, is: syscall.ENOEXEC},
		{name: "a directory", edit: func(t testing.TB, cfg *ClientConfig) { cfg.Cmd.Path = t.TempDir() }, code: -1, hint: "directory"},
		{name: "nowhere to listen", mode: "life without a place", code: 1, stderr: "cannot serve"},
	} {
		t.Run(test.name, test.run)
	}
}

// Kill ends within its time, whatever the plugin does.
func TestLifeKillBound(t *testing.T) {
	t.Parallel()
	const killTimeout = 500 * time.Millisecond
	stop := func(t testing.TB, c *Client, _ *lifeClient) {
		pid, _ := strconv.Atoi(c.ID())
		lifeSignal(t, pid, syscall.SIGSTOP)
	}
	for _, test := range []struct {
		name, mode string
		before     func(testing.TB, *Client, *lifeClient)
		gentle     bool // it ends by itself
	}{
		{"stopped", "life", stop, false},
		{"stopped in calls", "life", func(t testing.TB, c *Client, life *lifeClient) {
			life.hang(t, 4)
			stop(t, c, life)
		}, false},
		{"stopped with its stream full", "life", func(t testing.TB, c *Client, life *lifeClient) {
			stop(t, c, life)
			go life.Call("Plugin.Echo", noise(8<<20, 1), new([]byte))
		}, false},
		{"main runs on", "life endless", func(testing.TB, *Client, *lifeClient) {}, false},
		{"ignoring everything", "life stubborn", func(testing.TB, *Client, *lifeClient) {}, false},
		{"in calls", "life", func(t testing.TB, _ *Client, life *lifeClient) { life.hang(t, 4) }, true},
		{"grandchild", "life parent", func(testing.TB, *Client, *lifeClient) {}, true},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			l := newLab(t)
			cfg := l.config(test.mode)
			cfg.KillTimeout = killTimeout
			c, p := start(t, cfg)
			test.before(t, c, dispense[*lifeClient](t, p, "life"))
			within(t, "Kill", killTimeout+time.Second, c.Kill)
			receive(t, "Done", c.Done())
			if err := c.Err(); err != nil {
				t.Error(err)
			}
			if l.noted("grandchild") {
				lifeSignal(t, l.readPid("grandchild"), syscall.SIGKILL)
			}
			if test.mode == "life" && test.gentle != l.noted("main has finished") {
				t.Errorf("main has finished: %v", !test.gentle)
			}
		})
	}
}

func init() {
	modes["life stubborn"] = func() {
		note("plugin", strconv.Itoa(os.Getpid()))
		signal.Ignore(syscall.SIGTERM, syscall.SIGHUP, syscall.SIGQUIT)
		for {
			// Even Quit is not heard.
			lifeServe(func(c *ServeConfig) {
				c.Plugins = PluginSet{"life": testPlugin{server: func(*MuxBroker) (any, error) {
					go func() {
						for {
							runtime.Gosched()
						}
					}()
					return &lifeServer{}, nil
				}}}
			})
			select {}
		}
	}
	modes["life parent"] = func() {
		child := exec.Command("sleep", "1000")
		child.Stdout, child.Stderr = os.Stdout, os.Stderr
		if err := child.Start(); err != nil {
			panic(err)
		}
		note("grandchild", strconv.Itoa(child.Process.Pid))
		lifeServe()
	}
}

// A process that a plugin has started and that prints on keeps Kill neither
// from telling how the plugin ended nor from leaving nothing.
func TestLifeNoisyGrandchild(t *testing.T) {
	t.Parallel()
	for _, test := range []struct{ name, version, texts string }{
		{"it exits", "3", "exit status 7"},
		{"it does not start", "99", "version 99"},
	} {
		t.Run(test.name, func(t *testing.T) {
			l := newLab(t)
			cfg := l.config("life")
			cfg.Cmd.Path = "/bin/sh"
			cfg.Cmd.Args = []string{"sh", "-c", "(while echo noise; do sleep 0.05; done) >&2 & echo '1|" + test.version + "|unix|/none|netrpc|'; sleep 0.1; exit 7"}
			c := NewClient(cfg)
			defer c.Kill()
			_, err := c.Start()
			p := c.proc
			if err == nil {
				await(t, "the plugin exited", p.exited.Load)
				c.Kill()
				err = c.Err()
			}
			errorSays(t, err, test.texts)
			c.Kill()
			if _, err := os.Stat(p.dir); !isClosed(p.gone) || err == nil {
				t.Error("Kill has returned, and there is something left")
			}
		})
	}
}

// A grandchild that holds the output open does not keep the end of a plugin
// that crashed a secret.
func TestLifeGrandchildCrash(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	c, p := start(t, l.config("life parent"))
	defer lifeSignal(t, l.readPid("grandchild"), syscall.SIGKILL)
	err := dispense[*lifeClient](t, p, "life").Call("Plugin.Die", "panic", new(bool))
	var exit *ExitError
	if !errors.As(err, &exit) || !strings.HasPrefix(exit.Panic, "panic: boom") {
		t.Errorf("the call failed with %v", err)
	}
	receive(t, "Done", c.Done())
}

// Ping says within five seconds that a plugin does not answer; it may later.
func TestLifePingStopped(t *testing.T) {
	t.Parallel()
	c, p := start(t, newLab(t).config("life"))
	pid, _ := strconv.Atoi(c.ID())
	lifeSignal(t, pid, syscall.SIGSTOP)
	within(t, "Ping", 5*time.Second, func() {
		if err := p.Ping(); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("Ping returned %v", err)
		}
	})
	lifeSignal(t, pid, syscall.SIGCONT)
	if err := p.Ping(); err != nil {
		t.Error(err)
	}
}

// Many plugins are killed in the time that one takes: one after the other, they
// would take longer than the bound and the slack.
func TestLifeCleanup(t *testing.T) {
	l := newLab(t)
	const killTimeout = 500 * time.Millisecond
	var clients []*Client
	var starting sync.WaitGroup
	for range 32 {
		cfg := l.config("life")
		cfg.Managed, cfg.KillTimeout = true, killTimeout
		c := NewClient(cfg)
		t.Cleanup(c.Kill)
		clients = append(clients, c)
		starting.Go(func() {
			if _, err := c.Client(); err != nil {
				t.Error(err)
			}
		})
	}
	starting.Wait()
	for i, c := range clients {
		if pid, _ := strconv.Atoi(c.ID()); i%2 == 0 {
			lifeSignal(t, pid, syscall.SIGSTOP)
		}
	}
	within(t, "CleanupClients", killTimeout+time.Second, CleanupClients)
	for _, c := range clients {
		if !c.Exited() || c.Err() != nil {
			t.Errorf("Exited: %v, Err: %v", c.Exited(), c.Err())
		}
	}
	l.deserted(slack)
}

// lifePause is how long processes are stopped: longer than the shortest of
// yamux's time-outs, which is ten seconds.
func lifePause() time.Duration {
	if *long {
		return 2 * time.Minute
	}
	return 11 * time.Second
}

// halfReader stops in the middle until it may go on.
type halfReader struct {
	first, second io.Reader
	half          chan struct{} // closed by the reader
	goOn          chan struct{}
}

func (r *halfReader) Read(p []byte) (int, error) {
	n, err := r.first.Read(p)
	if err != io.EOF {
		return n, err
	}
	select {
	case <-r.half:
	default:
		close(r.half)
	}
	<-r.goOn
	return r.second.Read(p)
}

// A process that was stopped for a while goes on as if nothing had happened,
// and with it everything that was under way or was begun meanwhile, be it the
// plugin, the host or both.
func TestLifePause(t *testing.T) {
	t.Parallel()
	// The pauses are the same one, so that they take no longer than one.
	continues := []func(){lifePausePlugin(t), lifePauseHost(t, false), lifePauseHost(t, true)}
	<-time.After(lifePause())
	for _, f := range continues {
		f()
	}
}

// lifePausePlugin stops a plugin and returns what to do in the end.
func lifePausePlugin(t *testing.T) (goOn func()) {
	cfg := newLab(t).config("life")
	var stdout syncBuffer
	cfg.SyncStdout, cfg.SyncStderr = &stdout, io.Discard
	c, p := start(t, cfg)
	life := dispense[*lifeClient](t, p, "life")
	pid, _ := strconv.Atoi(c.ID())

	data := noise(8<<20, 1)
	want := sha256.Sum256(data)
	stream := &halfReader{bytes.NewReader(data[:1<<20]), bytes.NewReader(data[1<<20:]), make(chan struct{}), make(chan struct{})}
	results := make(chan error, 10)
	n := 0
	begin := func(what string, f func() error) {
		n++
		go func() {
			if err := f(); err != nil {
				results <- fmt.Errorf("%s: %w", what, err)
				return
			}
			results <- nil
		}()
	}
	begin("streaming", func() error {
		var sum []byte
		if err := life.Call("Plugin.Sum", life.broker.ServeReader(stream), &sum); err != nil {
			return err
		}
		if !bytes.Equal(sum, want[:]) {
			return errWrong
		}
		return nil
	})
	receive(t, "half of a stream", stream.half)
	lifeSignal(t, pid, syscall.SIGSTOP)
	close(stream.goOn)
	echo := func() error {
		var got []byte
		if err := life.Call("Plugin.Echo", data, &got); err != nil {
			return err
		}
		if !bytes.Equal(got, data) {
			return errWrong
		}
		return nil
	}
	begin("a large call", echo)
	begin("another large call", echo)
	begin("printing", func() error { return life.Call("Plugin.Print", "good morning\n", new(bool)) })
	begin("dispensing", func() error {
		other, err := Dispense[*lifeClient](p, "life")
		if err != nil {
			return err
		}
		return other.Call("Plugin.Echo", []byte("?"), new([]byte))
	})
	return func() {
		select {
		case err := <-results:
			t.Fatalf("while the plugin was stopped, a call returned: %v", err)
		case <-c.Done():
			t.Fatal("the plugin ended: ", c.Err())
		default:
		}
		lifeSignal(t, pid, syscall.SIGCONT)
		for range n {
			select {
			case err := <-results:
				if err != nil {
					t.Error(err)
				}
			case <-time.After(hangs):
				t.Fatal("not everything goes on")
			}
		}
		if err := p.Ping(); err != nil {
			t.Error(err)
		}
		await(t, "what was printed", func() bool { return stdout.String() == "good morning\n" })
	}
}

// lifePauseHost stops a busy host, and its plugin or not, and returns what to
// do in the end.
func lifePauseHost(t *testing.T, both bool) (goOn func()) {
	l := newLab(t)
	host := lifeHost{Plugin: "life", At: "busy"}.start(l)
	who := []int{host.Process.Pid}
	plugin := l.readPid(fmt.Sprintf("busy-%d", host.Process.Pid))
	if both {
		who = append(who, plugin)
	}
	progress := func() int { return l.readPid(fmt.Sprintf("progress-%d", host.Process.Pid)) }
	await(t, "any progress", func() bool { return progress() > 10 })
	for _, pid := range who {
		lifeSignal(t, pid, syscall.SIGSTOP)
	}
	return func() {
		before := progress()
		for _, pid := range who {
			lifeSignal(t, pid, syscall.SIGCONT)
		}
		await(t, "progress afterwards", func() bool { return progress() > before+20 })
		if !lifeRuns(plugin) {
			t.Error("it is not the same plugin any more")
		}
		host.kill(t)
		l.deserted(orphanBound + slack)
		if l.noted("a wrong answer") {
			t.Error(errWrong)
		}
	}
}

// SIGTERM is a graceful end, and SIGINT none at all.
func TestLifeSignals(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	c, p := start(t, l.config("life"))
	life := dispense[*lifeClient](t, p, "life")
	pid, _ := strconv.Atoi(c.ID())
	for range 3 {
		lifeSignal(t, pid, syscall.SIGINT)
		if err := life.Call("Plugin.Echo", []byte("?"), new([]byte)); err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range []string{"INT", "PIPE", "TERM"} {
		var end string
		if err := life.Call("Plugin.Child", []string{"sh", "-c", "kill -" + name + " $$; echo survived"}, &end); err != nil {
			t.Fatal(err)
		}
		if strings.Contains(end, "survived") || !strings.Contains(end, "signal: ") {
			t.Errorf("a child that was sent SIG%s: %s", name, end)
		}
	}
	lifeSignal(t, pid, syscall.SIGTERM)
	receive(t, "Done", c.Done())
	var exit *ExitError
	if !errors.As(c.Err(), &exit) || exit.State == nil || !exit.State.Success() {
		t.Errorf("Err returned %v", c.Err())
	}
	if !l.noted("main has finished") {
		t.Error("main has not finished")
	}
}

// A plugin can be a host in turn. When the first host goes, all go.
func TestLifeNested(t *testing.T) {
	t.Parallel()
	for _, mode := range []string{"life nested", "life nested endless"} {
		t.Run(mode, func(t *testing.T) {
			t.Parallel()
			l := newLab(t)
			host := lifeHost{Plugin: mode, At: "idle"}.start(l)
			l.read("host is ready")
			l.read("level 3 answers")
			// The host, and three plugins.
			if pids := l.processes(); len(pids) != 4 {
				t.Errorf("there are the processes %v", pids)
			}
			host.kill(t)
			l.deserted(3*orphanBound + slack)
		})
	}
	t.Run("Kill", func(t *testing.T) {
		t.Parallel()
		l := newLab(t)
		c, p := start(t, l.config("life nested"))
		dispense[*lifeClient](t, p, "life")
		l.read("level 3 answers")
		c.Kill()
		if c.Err() != nil || !c.Exited() {
			t.Errorf("Err: %v", c.Err())
		}
	})
}

func init() {
	const levelEnv = "TEST_LIFE_LEVEL"
	nested := func() {
		level, _ := strconv.Atoi(os.Getenv(levelEnv))
		level++
		lifeServe(func(c *ServeConfig) {
			c.Plugins = PluginSet{"life": testPlugin{server: func(*MuxBroker) (any, error) {
				if level == 3 {
					note("level 3 answers", "")
					return &lifeServer{}, nil
				}
				cfg := config(os.Getenv(modeEnv))
				cfg.Cmd.Env = append(cfg.Cmd.Env, fmt.Sprintf("%s=%d", levelEnv, level))
				p, err := NewClient(cfg).Client()
				if err != nil {
					return nil, err
				}
				_, err = p.Dispense("life")
				return &lifeServer{}, err
			}}}
		})
		if strings.HasSuffix(os.Getenv(modeEnv), "endless") {
			select {}
		}
	}
	modes["life nested"], modes["life nested endless"] = nested, nested
}

// swapHash swaps the file when it has been summed up.
type swapHash struct {
	hash.Hash
	swap func()
}

func (h swapHash) Sum(b []byte) []byte {
	h.swap()
	return h.Hash.Sum(b)
}

// What was checked is what runs, and it looks as if it had not been checked.
func TestLifeSecure(t *testing.T) {
	t.Parallel()
	if runtime.GOOS != "linux" {
		return // Nothing is promised there.
	}
	sum := func(path string) []byte {
		data, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		sum := sha256.Sum256(data)
		return sum[:]
	}
	script := filepath.Join(t.TempDir(), "greeter")
	writeProgram(t, script, fmt.Appendf(nil, "#!/bin/sh\nexec '%s' \"$@\"\n", os.Args[0]), 0o700)
	for name, path := range map[string]string{"binary": binaryNamed(t, "greeter"), "script": script} {
		t.Run(name, func(t *testing.T) {
			self := func(secure *SecureConfig) LifeSelf {
				cfg := newLab(t).config("life")
				cfg.Cmd.Path = path
				cfg.Cmd.Args = []string{"zero", "one", "two"}
				cfg.SecureConfig = secure
				_, p := start(t, cfg)
				return dispense[*lifeClient](t, p, "life").self(t)
			}
			plain := self(nil)
			checksum := sum(path)
			checked := self(&SecureConfig{Checksum: checksum, Hash: sha256.New()})
			if checked.Executable != plain.Executable || checked.Comm != plain.Comm || !slices.Equal(checked.Args, plain.Args) {
				t.Errorf("it is %q, %q, %q and was %q, %q, %q", checked.Executable, checked.Comm, checked.Args, plain.Executable, plain.Comm, plain.Args)
			}
			bad := filepath.Join(t.TempDir(), "bad")
			writeProgram(t, bad, []byte("#!/bin/sh\ntouch \"$"+notesEnv+"\"/swapped\n"), 0o700)
			swapped := false
			swap := func() {
				if err := os.Rename(bad, path); err != nil {
					t.Error(err)
				}
				swapped = true
			}
			self(&SecureConfig{Checksum: checksum, Hash: swapHash{sha256.New(), swap}})
			if !swapped || bytes.Equal(sum(path), checksum) {
				t.Error("the file was not swapped")
			}
		})
	}
}

// Hosts and plugins are killed, stopped and continued at any moment, while
// they call, stream and log. No call may hang or return a wrong answer, and
// nothing may be left.
func TestLifeTorture(t *testing.T) {
	l := newLab(t)
	end := time.Now().Add(*lifeTorture)
	var calls, lives, hosts atomic.Int64
	var workers sync.WaitGroup
	for range 2 {
		workers.Go(func() {
			for time.Now().Before(end) && !t.Failed() {
				lives.Add(1)
				torturePlugin(t, l, &calls)
			}
		})
		workers.Go(func() {
			for time.Now().Before(end) && !t.Failed() {
				hosts.Add(1)
				tortureHost(t, l)
			}
		})
	}
	done := make(chan struct{})
	go func() { defer close(done); workers.Wait() }()
	select {
	case <-done:
	case <-time.After(time.Until(end) + 3*hangs):
		t.Fatalf("something hangs:\n%s", stacks())
	}
	l.deserted(orphanBound + slack)
	if l.noted("a wrong answer") {
		t.Error(errWrong)
	}
	t.Logf("%d plugins and %d hosts have lived, with %d calls here", lives.Load(), hosts.Load(), calls.Load())
	if calls.Load() == 0 {
		t.Error("there were no calls")
	}
}

// torturePlugin starts a plugin of this process and ends it somehow.
func torturePlugin(t *testing.T, l *lab, calls *atomic.Int64) {
	cfg := l.config("life")
	cfg.KillTimeout = 500 * time.Millisecond
	cfg.SyncStdout, cfg.SyncStderr = io.Discard, io.Discard
	cfg.AutoMTLS = rand.IntN(4) == 0
	c := NewClient(cfg)
	tormented := make(chan struct{})
	pause := func() { <-time.After(rand.N(300 * time.Millisecond)) }
	how := rand.IntN(6)
	go func() {
		defer close(tormented)
		started := poll(hangs, func() bool { return c.ID() != "" || isClosed(c.done) })
		if !started {
			t.Error("a plugin is not started")
		}
		pause()
		pid, _ := strconv.Atoi(c.ID())
		// Its process may have been waited for only by who holds on to it.
		p, err := os.FindProcess(pid)
		if err != nil || isClosed(c.done) {
			return
		}
		switch how {
		case 0:
			_ = p.Signal(syscall.SIGKILL)
		case 1:
			_ = p.Signal(syscall.SIGTERM)
		case 2, 3:
			_ = p.Signal(syscall.SIGSTOP)
			pause()
			if how == 2 {
				_ = p.Signal(syscall.SIGCONT)
				pause()
			}
		case 4:
			_ = p.Signal(syscall.SIGINT)
			pause()
		}
		c.Kill()
	}()
	if p, err := c.Client(); err == nil {
		var streams sync.WaitGroup
		for range 3 {
			streams.Go(func() {
				life, err := Dispense[*lifeClient](p, "life")
				if err == nil {
					err = life.traffic(context.Background(), func(int) { calls.Add(1) })
				}
				if err == nil || errors.Is(err, errWrong) {
					t.Errorf("a call to a plugin that was killed returned %v", err)
				}
			})
		}
		streams.Wait()
	}
	<-tormented
	c.Kill()
	if !c.Exited() {
		t.Error("a plugin has not ended after Kill")
	}
}

// tortureHost starts a host with a plugin of its own and ends it somehow.
func tortureHost(t *testing.T, l *lab) {
	host := startLife(l, "life host", lifeHost{Plugin: "life", At: "busy"})
	busy := fmt.Sprintf("busy-%d", host.Process.Pid)
	if !poll(hangs, func() bool { return l.noted(busy) }) {
		t.Error("a host does not become busy")
		return
	}
	plugin := l.readPid(busy)
	pause := func() { <-time.After(rand.N(300 * time.Millisecond)) }
	pause()
	switch rand.IntN(4) {
	case 0:
		_ = host.Process.Kill()
	case 1:
		// It ends by itself when it has noticed.
		_ = syscall.Kill(plugin, syscall.SIGKILL)
	case 2:
		_ = host.Process.Signal(syscall.SIGSTOP)
		pause()
		_ = host.Process.Signal(syscall.SIGCONT)
		pause()
		_ = host.Process.Kill()
	case 3:
		_ = syscall.Kill(plugin, syscall.SIGSTOP)
		pause()
		_ = host.Process.Signal(syscall.SIGTERM)
		_ = syscall.Kill(plugin, syscall.SIGCONT)
	}
	if !poll(hangs, func() bool { return isClosed(host.waited) }) {
		t.Error("a host does not end")
	}
	if !poll(orphanBound+slack, func() bool { return !lifeRuns(plugin) }) {
		t.Error("a plugin outlives its host")
	}
}

// ==== Faults of the system and of the host's own code ====

// Descriptors, disks and processes run out, and loggers and writers of the
// host's fail: errors say so, and nothing hangs or is left.

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
		servePlugins(callsPlugins())
	}
	modes["fault endless"] = func() {
		servePlugins(callsPlugins())
		time.Sleep(forever)
	}
	modes["fault noisy"] = func() {
		fmt.Println("welcome to the jungle")
		fmt.Fprintln(os.Stderr, "so far, so good")
		servePlugins(callsPlugins())
	}
	modes["fault greedy"] = func() {
		servePlugins(faultGreedyPlugins())
	}
	modes["fault plugin"] = func() {
		spare, err := strconv.Atoi(os.Getenv(faultLimitEnv))
		if err != nil {
			panic(err)
		}
		faultLimit(spare)
		servePlugins(callsPlugins())
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
		if err = bounded(hangs, s.run); err != nil {
			step = s.name
			break
		}
	}
	before("Kill")
	if hung := bounded(hangs, func() error { c.Kill(); return nil }); hung != nil {
		return "Kill", hung
	}
	if err == nil && c.Err() != nil {
		return "Kill", c.Err()
	}
	return step, err
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
	cfg := config("calls")
	if err := faultConfigs[os.Getenv(faultConfigEnv)](cfg); err != nil {
		panic(err)
	}
	left := takeStock(os.TempDir())
	for r := (FaultReport{Err: "none yet"}); r.Err != "" && r.Spare < 100; r.Spare++ {
		restore := faultLimit(r.Spare)
		var err error
		r.Step, err = faultLife(cfg, func(string) {})
		restore()
		r.Err, r.Left = faultText(err), left()
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
	left := takeStock(os.TempDir())
	for _, at := range []string{"Start", "Client", "Ping", "everything", "Kill"} {
		restore := func() {}
		step, err := faultLife(config("calls"), func(step string) {
			if step == at {
				restore = faultFill()
			}
		})
		restore()
		if step == "" {
			step = "none after " + at
		}
		faultTell(FaultReport{Step: step, Err: faultText(err), Left: left()})
	}
}

// faultHostReattaches reattaches with one descriptor more each time.
func faultHostReattaches() {
	c := NewClient(config("calls"))
	defer c.Kill()
	if _, err := c.Client(); err != nil {
		panic(err)
	}
	left := takeStock(os.TempDir())
	for r := (FaultReport{Err: "none yet"}); r.Err != "" && r.Spare < 100; r.Spare++ {
		cfg := attachTo(c.ReattachConfig())
		cfg.Reattach.Test = true // so that Kill leaves the plugin to the next one
		again := NewClient(cfg)
		restore := faultLimit(r.Spare)
		err := bounded(hangs, func() error { _, err := again.Client(); return err })
		restore()
		r.Err = faultText(err)
		if errors.Is(err, ErrProcessNotFound) {
			r.Err = "the plugin is taken for dead: " + r.Err
		}
		if err := bounded(hangs, func() error { again.Kill(); return nil }); err != nil {
			r.Err = "Kill: " + err.Error()
		}
		r.Left = left()
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
	cmd.Env = append(os.Environ(), append(env, modeEnv+"="+mode, "TMPDIR="+shortDir(t))...)
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
				errorSays(t, errors.New(r.Err), pluginName(os.Args[0]), "too many open files", "ulimit -n")
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
			errorSays(t, errors.New(r.Err), pluginName(os.Args[0]), "too many open files", "ulimit -n")
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
			errorSays(t, errors.New(r.Err), "reattaching", "too many open files", "ulimit -n")
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
				errorSays(t, err, pluginName(os.Args[0]), "too many open files", "ulimit -n")
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
				if err := Call(boundedContext(t), c.Client, "Plugin.CallBack", back, new(string)); err == nil || !strings.Contains(err.Error(), "ouch") {
					t.Errorf("a callback that panics returns %v", err)
				}
			}},
			{"a served reader", "calls", func(t *testing.T, _ *Client, p ClientProtocol) {
				c := dispense[*callsClient](t, p, "calls")
				pipe := CallsPipe{c.broker.ServeReader(iotest.ErrReader(io.ErrClosedPipe)), c.broker.ServeWriter(io.Discard)}
				if err := Call(boundedContext(t), c.Client, "Plugin.Pipe", pipe, new(string)); err == nil {
					t.Error("a broken reader is read")
				}
			}},
			{"a service cannot be called", "calls", func(t *testing.T, _ *Client, p ClientProtocol) {
				c := dispense[*callsClient](t, p, "calls")
				back := CallsBack{c.broker.ServeRPC(struct{}{}), "Plugin.Echo", ""}
				if err := Call(boundedContext(t), c.Client, "Plugin.CallBack", back, new(string)); err == nil {
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
				cfg.Logger = logger
				cfg.Stderr = writerFunc(func([]byte) (int, error) { return 0, io.ErrShortWrite })
				cfg.StartTimeout, cfg.KillTimeout = 5*time.Second, 500*time.Millisecond
				c := NewClient(cfg)
				defer c.Kill()
				var p ClientProtocol
				err := bounded(hangs, func() (err error) { p, err = c.Client(); return err })
				if err != nil {
					t.Fatal(err)
				}
				if test.use != nil {
					test.use(t, c, p)
				}
				var out string
				if err := Call(boundedContext(t), dispense[*callsClient](t, p, "calls").Client, "Plugin.Echo", "x", &out); err != nil || out != "x" {
					t.Errorf("Echo returns %q, %v", out, err)
				}
				within(t, "Kill", cfg.KillTimeout+time.Second, c.Kill)
				receive(t, "Done", c.Done())
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
			return writerFunc(func([]byte) (int, error) { return 0, errors.New("no paper") })
		}, "no paper"},
		{"short write", func(*testing.T) io.Writer {
			return writerFunc(func(p []byte) (int, error) { return len(p) / 2, nil })
		}, "short write"},
		{"impossible count", func(*testing.T) io.Writer {
			return writerFunc(func(p []byte) (int, error) { return -1, nil })
		}, "short write"},
		{"panic", func(t *testing.T) io.Writer {
			fault := faultOf(t, "panics")
			return writerFunc(func(p []byte) (int, error) { fault(); return len(p), nil })
		}, "the host's own code is broken"},
		{"nil in a writer", func(*testing.T) io.Writer { return (*bytes.Buffer)(nil) }, "nil pointer"},
		{"full disk", faultFullDisk, "/dev/"},
		{"blocked", func(t *testing.T) io.Writer {
			fault := faultOf(t, "blocks")
			return writerFunc(func(p []byte) (int, error) { fault(); return len(p), nil })
		}, ""},
	} {
		for which := range 3 {
			name := []string{"SyncStdout", "SyncStderr", "Stderr"}[which]
			t.Run(test.name+" of "+name, func(t *testing.T) {
				t.Parallel()
				l := newLab(t)
				cfg := l.config("base")
				cfg.KillTimeout = 500 * time.Millisecond
				logger, records := recordingLogger()
				cfg.Logger = logger
				var good [3]syncBuffer
				to := [3]io.Writer{&good[0], &good[1], &good[2]}
				to[which] = test.writer(t)
				cfg.SyncStdout, cfg.SyncStderr, cfg.Stderr = to[0], to[1], to[2]
				c, p := start(t, cfg)
				client := dispense[*rpc.Client](t, p, "base")
				said := [3][]byte{junk, junk, junk}
				if test.text == "" {
					said[which] = junk[:1000] // it would fill what is between
				}
				if err := Call(boundedContext(t), client, "Plugin.Print", BaseOutput{said[0], said[1], said[2]}, new(struct{})); err != nil {
					t.Error(err)
				}
				echo(t, client, "and still here")
				for i := range good {
					if i != which {
						await(t, "the rest of the output", func() bool { return strings.HasPrefix(good[i].String(), string(junk)) })
					}
				}
				within(t, "Kill", cfg.KillTimeout+time.Second, c.Kill)
				receive(t, "Done", c.Done())
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
				cfg := config("calls")
				if variable == "TMPDIR" {
					t.Setenv(variable, dir)
				} else {
					cfg.UnixSocketConfig = &UnixSocketConfig{TempDir: dir}
				}
				err := startError(t, NewClient(cfg))
				errorSays(t, err, pluginName(os.Args[0]), dir, "TMPDIR", "TempDir")
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
	errorSays(t, err, pluginName(os.Args[0]), "cannot serve", "listen unix", cfg.UnixSocketConfig.TempDir)
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
		left := takeStock(os.TempDir())
		cfg := config("calls")
		cfg.UnixSocketConfig = &UnixSocketConfig{TempDir: dir}
		step, err := faultLife(cfg, func(string) {})
		rest := left()
		if entries, _ := os.ReadDir(dir); len(entries) > 0 {
			rest += fmt.Sprint(entries)
		}
		faultTell(FaultReport{Spare: files, Step: step, Err: faultText(err), Left: rest})
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
	dir := shortDir(t)
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
			errorSays(t, errors.New(r.Err), pluginName(os.Args[0]), "no space left on device", "/disk")
		case 2:
			if r.Err != "" {
				t.Error("it does not start where there is room:", r.Err)
			}
		}
	}
}

// Where the system cannot execute the binary, a start says why and what to do.
func TestFaultExec(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name  string
		edit  func(*testing.T, *ClientConfig)
		texts []string
		is    error
	}{
		// This is no fault on macOS.
		{"open for writing", func(t *testing.T, cfg *ClientConfig) {
			cfg.Cmd.Path = filepath.Join(t.TempDir(), "greeter")
			copyBinary(t, cfg.Cmd.Path)
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
				t.Parallel()
				cfg := newLab(t).config("calls")
				test.edit(t, cfg)
				if secure {
					if err := faultConfigs["SecureConfig"](cfg); err != nil {
						t.Fatal(err)
					}
				}
				err := startError(t, NewClient(cfg))
				t.Log(err)
				errorSays(t, err, append(test.texts, pluginName(cfg.Cmd.Path))...)
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

// faultHostWithoutProcesses starts two plugins as a user who may have one.
func faultHostWithoutProcesses() {
	left := takeStock(os.TempDir())
	dir := os.Getenv(faultConfigEnv)
	start := func() (*Client, error) {
		cfg := config("calls")
		cfg.Cmd.Path, cfg.Cmd.Dir = filepath.Join(dir, "greeter"), dir
		cfg.Cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 54321, Gid: 54321, NoSetGroups: true}}
		cfg.UnixSocketConfig = &UnixSocketConfig{TempDir: dir}
		c := NewClient(cfg)
		return c, bounded(hangs, func() error { _, err := c.Client(); return err })
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
	if alive := bounded(hangs, func() error { _, err := first.Client(); return err }); alive != nil {
		panic(alive)
	}
	first.Kill()
	faultTell(FaultReport{Err: faultText(err), Left: left()})
}

// A fork that fails for want of processes is said to have. The limit does not
// bind root, but another user as which root starts something; with any other
// user the host itself could not go on, so there TestFaultExec has to do.
func TestFaultProcesses(t *testing.T) {
	if runtime.GOOS != "linux" || os.Getuid() != 0 {
		t.Log("this is for root on Linux")
		return
	}
	dir, _ := publicDir(t)
	reports := faultReports(t, "fault host without processes", []string{faultConfigEnv + "=" + dir})
	if len(reports) != 1 {
		t.Fatalf("there are %d reports", len(reports))
	}
	t.Log(reports[0].Err)
	errorSays(t, errors.New(reports[0].Err), "greeter", "resource temporarily unavailable", "ulimit -u")
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
	logger, records := recordingLogger()
	cfg.Plugins, cfg.Logger = faultGreedyPlugins(), logger
	c, p := start(t, cfg)
	greedy := dispense[*rpc.Client](t, p, "greedy")
	ask := func(method string) {
		t.Helper()
		if err := Call(boundedContext(t), greedy, "Plugin."+method, struct{}{}, new(struct{})); err != nil {
			t.Fatal(err)
		}
	}
	ask("Take")
	calls := dispense[*callsClient](t, p, "calls")
	var out string
	back := CallsBack{calls.broker.ServeRPC(newCallsService(nil)), "Plugin.Echo", "y"}
	if err := Call(boundedContext(t), calls.Client, "Plugin.CallBack", back, &out); err != nil || out != "y" {
		t.Errorf("%q, %v", out, err)
	}
	var written syncBuffer
	pipe := CallsPipe{calls.broker.ServeReader(strings.NewReader("all of it")), calls.broker.ServeWriter(&written)}
	if err := Call(boundedContext(t), calls.Client, "Plugin.Pipe", pipe, &out); err != nil {
		t.Error(err)
	}
	await(t, "what was written", func() bool { return written.String() == "all of it" })

	again := *cfg
	again.Cmd, again.Reattach = nil, c.ReattachConfig()
	again.Reattach.Test = true // Kill only disconnects it
	_, other := start(t, &again)
	answered := async(func() error {
		_, err := Dispense[*callsClient](other, "calls")
		return err
	})
	await(t, "what is wrong is logged", func() bool { return len(records.find("could not be accepted")) > 0 })
	if len(answered) > 0 {
		t.Error("the other host has a connection:", <-answered)
	}
	ask("Give")
	if err := receive(t, "the other host's connection", answered); err != nil {
		t.Error(err)
	}
	ask("Take")
	within(t, "Kill", defaultKillTimeout+time.Second, c.Kill)
	if err := c.Err(); err != nil || !cfg.Cmd.ProcessState.Success() {
		t.Error("it ended with", err, cfg.Cmd.ProcessState)
	}
}
