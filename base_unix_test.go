//go:build unix

package plugin

import (
	"crypto/sha256"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
)

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
