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
	"time"

	"github.com/hashicorp/go-hclog"
)

// ==== Starting, calling, stopping ====

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
		Serve(&ServeConfig{HandshakeConfig: testHandshake, Plugins: basePlugins(s)})
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
	return info.Mode().Perm(), int(stat.Uid), int(stat.Gid)
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
	baseClean(t)
	seen := make(map[string]bool)
	for name, end := range map[string]func(*Client, *exec.Cmd){
		"by Kill":           func(c *Client, _ *exec.Cmd) { c.Kill() },
		"by SIGKILL":        func(_ *Client, cmd *exec.Cmd) { _ = cmd.Process.Kill() },
		"by SIGTERM":        func(_ *Client, cmd *exec.Cmd) { _ = cmd.Process.Signal(syscall.SIGTERM) },
		"without a connect": nil,
	} {
		cfg := baseConfig("base")
		cfg.UnixSocketConfig = &UnixSocketConfig{TempDir: baseShortDir(t)}
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
	cfg := baseConfig("base")
	cfg.UnixSocketConfig = &UnixSocketConfig{TempDir: filepath.Join(t.TempDir(), "missing")}
	c := NewClient(cfg)
	defer c.Kill()
	_, err := c.Start()
	baseCheckError(t, err, "missing", "no such file")
}

// TestSocketGroup checks that a group may be let in.
func TestSocketGroup(t *testing.T) {
	baseClean(t)
	gid := os.Getgid()
	if os.Getuid() == 0 {
		gid = 54321 // only root may give files to a group that it is not in
	}
	groups := []string{strconv.Itoa(gid)}
	if g, err := user.LookupGroupId(strconv.Itoa(os.Getgid())); err == nil {
		groups = append(groups, g.Name)
	}
	for i, group := range groups {
		cfg := baseConfig("base")
		cfg.UnixSocketConfig = &UnixSocketConfig{Group: group}
		c, p := start(t, cfg)
		want := gid
		if i > 0 {
			want = os.Getgid()
		}
		path, dir := baseSocket(t, c)
		if mode, uid, got := baseOwner(t, dir); mode != 0o770 || uid != os.Getuid() || got != want {
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
	cfg := baseConfig("base")
	cfg.UnixSocketConfig = &UnixSocketConfig{Group: "no-such-group"}
	c := NewClient(cfg)
	defer c.Kill()
	_, err := c.Start()
	baseCheckError(t, err, "no-such-group")
}

// TestSocketPathTooLong checks that a TMPDIR that is too long for a socket is
// done without, and that the error says so where a directory was asked for.
func TestSocketPathTooLong(t *testing.T) {
	baseClean(t)
	long := t.TempDir()
	for len(long) < 120 {
		long = filepath.Join(long, strings.Repeat("long", 8))
	}
	if err := os.MkdirAll(long, 0o755); err != nil {
		t.Fatal(err)
	}
	cfg := baseConfig("base")
	cfg.UnixSocketConfig = &UnixSocketConfig{TempDir: long}
	c := NewClient(cfg)
	_, err := c.Start()
	baseCheckError(t, err, "too long", "TempDir", long)
	c.Kill()

	t.Setenv("TMPDIR", long)
	cfg.UnixSocketConfig = nil
	c, p := start(t, cfg)
	if got := dispense[Greeter](t, p, "greeter").Greet(); got != "Hello!" {
		t.Error(got)
	}
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

// baseShared returns a directory that every user may enter, with a copy of the
// test binary in it.
func baseShared(t *testing.T) (dir, binary string) {
	t.Helper()
	dir = baseShortDir(t)
	binary = filepath.Join(dir, "greeter")
	from, err := os.Open(os.Args[0])
	if err != nil {
		t.Fatal(err)
	}
	defer from.Close()
	to, err := os.OpenFile(binary, os.O_CREATE|os.O_WRONLY, 0o755)
	if err != nil {
		t.Fatal(err)
	}
	_, err = io.Copy(to, from)
	if closed := to.Close(); err == nil {
		err = closed
	}
	if err == nil {
		err = os.Chmod(binary, 0o755)
	}
	if err == nil {
		err = os.Chmod(dir, 0o755)
	}
	if err != nil {
		t.Fatal(err)
	}
	return dir, binary
}

// TestOtherUser starts the plugin under another user, which only root can; any
// other user tries it with itself.
func TestOtherUser(t *testing.T) {
	baseClean(t)
	dir, binary := baseShared(t)
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
		cfg := baseConfig("base-user")
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
			baseClean(t)
			path := filepath.Join(t.TempDir(), "greeter")
			if err := os.WriteFile(path, []byte(test.text), test.mode); err != nil {
				t.Fatal(err)
			}
			cfg := baseConfig("")
			cfg.Cmd = exec.Command(path)
			c := NewClient(cfg)
			defer c.Kill()
			var err error
			baseReturns(t, "Start", func() { _, err = c.Start() })
			baseCheckError(t, err, append(test.texts, "plugin greeter")...)
			if exited := cfg.Cmd.ProcessState != nil; exited != test.exited {
				t.Errorf("it ended with %v", cfg.Cmd.ProcessState)
			}
		})
	}
}

// TestTestModeSignals checks that in test mode the process's signals stay with
// whoever else takes them.
func TestTestModeSignals(t *testing.T) {
	baseClean(t)
	signals := make(chan os.Signal, 4)
	signal.Notify(signals, syscall.SIGTERM, os.Interrupt)
	defer signal.Stop(signals)
	rc, _ := baseServeTest(t, &ServeConfig{
		HandshakeConfig: testHandshake, Plugins: testPlugins(), Logger: hclog.NewNullLogger(), Test: &ServeTestConfig{},
	})
	_, p := start(t, &ClientConfig{HandshakeConfig: testHandshake, Plugins: testPlugins(), Logger: hclog.NewNullLogger(), Reattach: rc})
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
	if got := dispense[Greeter](t, p, "greeter").Greet(); got != "Hello!" {
		t.Error("after the signals:", got)
	}
}

// ==== Life and death ====

var lifeTorture = flag.Duration("torture", 3*time.Second, "how long hosts and plugins are tortured")

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
	awaitClosed(t, "killing", p.waited)
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
		cfg := lifeConfig(h.Plugin)
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
			awaitClosed(t, "the host's end", host.waited)
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

// A main that goes on when its host is gone is ended.
func TestLifeOrphanEndless(t *testing.T) {
	t.Parallel()
	for _, shell := range []bool{false, true} {
		t.Run(fmt.Sprint("shell:", shell), func(t *testing.T) {
			t.Parallel()
			l := newLab(t)
			host := lifeHost{Plugin: "life endless", At: "idle", Shell: shell}.start(l)
			l.read("host is ready")
			host.kill(t)
			l.read("main runs on")
			l.deserted(orphanBound + slack)
		})
	}
	// The host may also go when main is at it already.
	t.Run("later", func(t *testing.T) {
		t.Parallel()
		l := newLab(t)
		host := lifeHost{Plugin: "life endless", At: "idle"}.start(l)
		l.read("host is ready")
		lifeSignal(t, l.readPid("plugin"), syscall.SIGTERM)
		l.read("main runs on")
		host.kill(t)
		l.deserted(orphanBound + slack)
	})
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
}

// lifeBuffer is a bytes.Buffer for two goroutines.
type lifeBuffer struct {
	mu  sync.Mutex // guards buf
	buf bytes.Buffer
}

func (b *lifeBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *lifeBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
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

			var stdout, stderr lifeBuffer
			cfg := l.config("")
			cfg.Cmd = nil
			cfg.Reattach = &ReattachConfig{Protocol: ProtocolNetRPC, ProtocolVersion: 3, Addr: &net.UnixAddr{Net: "unix", Name: l.read("address")}, Pid: pid}
			cfg.SyncStdout, cfg.SyncStderr = &stdout, &stderr
			c, p := start(t, cfg)
			life := dispense[*lifeClient](t, p, "life")
			if err := life.Call("Plugin.Print", "for the second host\n", new(bool)); err != nil {
				t.Fatal(err)
			}
			lifeAwait(t, "what the plugin printed", func() bool {
				return strings.Contains(stdout.String(), "for the second host") && strings.Contains(stderr.String(), "for the second host")
			})
			c.Kill()
			awaitClosed(t, "Done", c.Done())
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
			lifeWriteProgram(t, cfg.Cmd.Path, data, mode)
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
			go life.Call("Plugin.Echo", lifeData(8<<20), new([]byte))
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
			awaitClosed(t, "Done", c.Done())
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
	awaitClosed(t, "Done", c.Done())
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

// Many plugins are killed in the time that one takes.
func TestLifeCleanup(t *testing.T) {
	l := newLab(t)
	const killTimeout = time.Second
	var clients []*Client
	var starting sync.WaitGroup
	for range 50 {
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
	if *lifeLong {
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
	var stdout lifeBuffer
	cfg.SyncStdout, cfg.SyncStderr = &stdout, io.Discard
	c, p := start(t, cfg)
	life := dispense[*lifeClient](t, p, "life")
	pid, _ := strconv.Atoi(c.ID())

	data := lifeData(8 << 20)
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
	awaitClosed(t, "half of a stream", stream.half)
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
		lifeAwait(t, "what was printed", func() bool { return stdout.String() == "good morning\n" })
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
	lifeAwait(t, "any progress", func() bool { return progress() > 10 })
	for _, pid := range who {
		lifeSignal(t, pid, syscall.SIGSTOP)
	}
	return func() {
		before := progress()
		for _, pid := range who {
			lifeSignal(t, pid, syscall.SIGCONT)
		}
		lifeAwait(t, "progress afterwards", func() bool { return progress() > before+20 })
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
	awaitClosed(t, "Done", c.Done())
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
				cfg := lifeConfig(os.Getenv(modeEnv))
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
	lifeWriteProgram(t, script, fmt.Appendf(nil, "#!/bin/sh\nexec '%s' \"$@\"\n", os.Args[0]), 0o700)
	for name, path := range map[string]string{"binary": lifeNamed(t, "greeter"), "script": script} {
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
			lifeWriteProgram(t, bad, []byte("#!/bin/sh\ntouch \"$"+lifeNotesEnv+"\"/swapped\n"), 0o700)
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
		buf := make([]byte, 1<<20)
		t.Fatalf("something hangs:\n%s", buf[:runtime.Stack(buf, true)])
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
