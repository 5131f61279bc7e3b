package plugin

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"errors"
	"flag"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"net"
	"net/rpc"
	"os"
	"os/exec"
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

// The life and death of plugins. What needs Unix signals is in
// life_unix_test.go.

var lifeLong = flag.Bool("long", false, "let plugins live, pause and leak for as long as is promised")

const (
	// lifeNotesEnv names the directory of a lab's notes.
	lifeNotesEnv = "TEST_LIFE_NOTES"
	// slack is what is added to a bound that is promised, for a machine that
	// has other things to do.
	slack = 5 * time.Second
)

// lifeCycles is how often something is done that must not leak.
func lifeCycles() int {
	if *lifeLong {
		return 500
	}
	return 60
}

// lab is where the processes of one test live: with a TMPDIR of their own, and
// a directory for notes by which they tell the test what they have done, also
// after they were killed. When the test ends, nothing may be left in it.
type lab struct {
	t          testing.TB
	tmp, notes string
}

func newLab(t testing.TB) *lab {
	t.Helper()
	l := &lab{t: t}
	for _, dir := range []*string{&l.tmp, &l.notes} {
		var err error
		// Not t.TempDir, whose paths are too long for a socket.
		if *dir, err = os.MkdirTemp("", "l*"); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { os.RemoveAll(*dir) })
	}
	t.Cleanup(func() { l.deserted(hangs) })
	return l
}

func (l *lab) env() []string {
	return []string{"TMPDIR=" + l.tmp, lifeNotesEnv + "=" + l.notes}
}

// config is a configuration that starts the plugin "life" in a mode.
func (l *lab) config(mode string) *ClientConfig {
	cfg := lifeConfig(mode)
	cfg.Cmd.Env = append(cfg.Cmd.Env, l.env()...)
	if runtime.GOOS != "windows" {
		cfg.UnixSocketConfig = &UnixSocketConfig{TempDir: l.tmp}
	}
	return cfg
}

func lifeConfig(mode string) *ClientConfig {
	cmd := exec.Command(os.Args[0])
	cmd.Env = []string{modeEnv + "=" + mode}
	return &ClientConfig{HandshakeConfig: testHandshake, Plugins: lifePlugins(), Cmd: cmd, Logger: hclog.NewNullLogger()}
}

// processes are those that were started in the lab and have not ended.
func (l *lab) processes() []int { return processesWith(lifeNotesEnv + "=" + l.notes) }

// deserted fails the test if a process or file is left when the time is over.
func (l *lab) deserted(within time.Duration) {
	l.t.Helper()
	var left string
	ok := poll(within, func() bool {
		left = ""
		if pids := l.processes(); len(pids) > 0 {
			left = fmt.Sprintf("processes %v", pids)
		}
		if files, _ := os.ReadDir(l.tmp); len(files) > 0 {
			left += fmt.Sprintf(" files %v", files)
		}
		return left == ""
	})
	if !ok {
		l.t.Errorf("after %v there are left: %s", within, left)
		for _, pid := range l.processes() {
			if p, err := os.FindProcess(pid); err == nil {
				_ = p.Kill()
			}
		}
	}
}

// read waits for a note and returns its text.
func (l *lab) read(name string) string {
	l.t.Helper()
	lifeAwait(l.t, "the note "+name, func() bool { return l.noted(name) })
	text, err := os.ReadFile(filepath.Join(l.notes, name))
	if err != nil {
		l.t.Fatal(err)
	}
	return string(text)
}

func (l *lab) readPid(name string) int {
	l.t.Helper()
	pid, err := strconv.Atoi(l.read(name))
	if err != nil {
		l.t.Fatal(err)
	}
	return pid
}

func (l *lab) noted(name string) bool {
	_, err := os.Stat(filepath.Join(l.notes, name))
	return err == nil
}

func (l *lab) write(name, text string) { leaveNote(l.notes, name, text) }

// note leaves a note for the test from a process in a lab.
func note(name, text string) { leaveNote(os.Getenv(lifeNotesEnv), name, text) }

func leaveNote(dir, name, text string) {
	tmp := filepath.Join(dir, fmt.Sprintf(".%s-%d", name, os.Getpid()))
	if os.WriteFile(tmp, []byte(text), 0o600) == nil {
		_ = os.Rename(tmp, filepath.Join(dir, name))
	}
}

// awaitNote waits for a note of the test's, in a process that it may kill.
func awaitNote(name string) {
	l := &lab{notes: os.Getenv(lifeNotesEnv)}
	if !poll(3*hangs, func() bool { return l.noted(name) }) {
		os.Exit(65)
	}
}

// poll asks until the answer is yes, and returns false if the time is over.
func poll(within time.Duration, ok func() bool) bool {
	for end := time.Now().Add(within); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			return ok()
		}
	}
	return true
}

func lifeAwait(t testing.TB, what string, ok func() bool) {
	t.Helper()
	if !poll(hangs, ok) {
		t.Fatalf("there is still not %s", what)
	}
}

// awaitClosed fails the test if the channel is not closed.
func awaitClosed(t testing.TB, what string, ch <-chan struct{}) {
	t.Helper()
	select {
	case <-ch:
	case <-time.After(hangs):
		t.Fatalf("%s takes too long", what)
	}
}

// within fails the test if f takes longer than it is promised to take.
func within(t testing.TB, what string, bound time.Duration, f func()) {
	t.Helper()
	start, done := time.Now(), make(chan struct{})
	go func() { defer close(done); f() }()
	select {
	case <-done:
		t.Logf("%s took %v", what, time.Since(start))
	case <-time.After(bound + slack):
		t.Fatalf("%s takes longer than %v", what, bound)
	}
}

// lifeServer is what the test plugin "life" serves.
type lifeServer struct{ broker *MuxBroker }

var lifeHanging atomic.Int32 // calls of Hang

// lifeDeaths are the ways in which the plugin can end by itself.
var lifeDeaths = map[string]func(){
	"panic":       func() { panic("boom") },
	"fatal error": func() { new(sync.Mutex).Unlock() },
	"exit 0":      func() { os.Exit(0) },
	"exit 3":      func() { os.Exit(3) },
	"kill": func() {
		if p, err := os.FindProcess(os.Getpid()); err == nil {
			_ = p.Kill()
		}
	},
}

func (*lifeServer) Die(how string, _ *bool) error {
	lifeDeaths[how]()
	select {}
}

// Hang never returns.
func (*lifeServer) Hang(bool, *bool) error {
	lifeHanging.Add(1)
	note("in a call", "")
	select {}
}

// Hanging is how many calls hang.
func (*lifeServer) Hanging(_ bool, n *int32) error {
	*n = lifeHanging.Load()
	return nil
}

func (*lifeServer) Echo(p []byte, reply *[]byte) error {
	*reply = p
	return nil
}

// Print prints to stdout and stderr.
func (*lifeServer) Print(text string, _ *bool) error {
	fmt.Fprint(os.Stdout, text)
	fmt.Fprint(os.Stderr, text)
	return nil
}

// Sum reads a stream of the host's to its end and sums it up.
func (s *lifeServer) Sum(id uint32, sum *[]byte) error {
	r, err := s.broker.DialReader(id)
	if err != nil {
		return err
	}
	defer r.Close()
	h := sha256.New()
	if _, err := io.Copy(h, r); err != nil {
		return err
	}
	*sum = h.Sum(nil)
	return nil
}

// LifeSelf is what the plugin sees of itself.
type LifeSelf struct {
	Executable, Comm string
	Args, Env        []string
	Goroutines, FDs  int
}

func (*lifeServer) Self(_ bool, self *LifeSelf) (err error) {
	comm, _ := os.ReadFile("/proc/self/comm")
	self.Comm, self.Args, self.Env = string(comm), os.Args, os.Environ()
	self.Goroutines, self.FDs = runtime.NumGoroutine(), lifeFDs()
	self.Executable, err = os.Executable()
	return err
}

// Child runs a program as the plugin's child.
func (*lifeServer) Child(args []string, output *string) error {
	out, err := exec.Command(args[0], args[1:]...).CombinedOutput()
	*output = fmt.Sprintf("%s%v", out, err)
	return nil
}

// lifeFDs is how many descriptors this process has. Without /proc, none.
func lifeFDs() int {
	fds, _ := os.ReadDir("/proc/self/fd")
	return len(fds)
}

// lifeClient calls a lifeServer.
type lifeClient struct {
	broker *MuxBroker
	*rpc.Client
}

func lifePlugins() PluginSet {
	return PluginSet{"life": testPlugin{
		func(b *MuxBroker) (any, error) { return &lifeServer{b}, nil },
		func(b *MuxBroker, c *rpc.Client) (any, error) { return &lifeClient{b, c}, nil },
	}}
}

func (c *lifeClient) self(t testing.TB) (self LifeSelf) {
	t.Helper()
	if err := c.Call("Plugin.Self", true, &self); err != nil {
		t.Fatal(err)
	}
	return self
}

// hang has n calls in flight, half of them made with the function Call, and
// returns where their errors come.
func (c *lifeClient) hang(t testing.TB, n int) <-chan error {
	t.Helper()
	errs := make(chan error, n)
	for i := range n {
		go func() {
			if i%2 == 0 {
				errs <- c.Call("Plugin.Hang", true, new(bool))
			} else {
				errs <- Call(context.Background(), c.Client, "Plugin.Hang", true, new(bool))
			}
		}()
	}
	lifeAwait(t, "that all calls hang", func() bool {
		var hanging int32
		if err := c.Call("Plugin.Hanging", true, &hanging); err != nil {
			t.Fatal(err)
		}
		return int(hanging) == n
	})
	return errs
}

// lifeServe is a plugin's main, or part of it.
func lifeServe(edit ...func(*ServeConfig)) {
	cfg := &ServeConfig{HandshakeConfig: testHandshake, Plugins: lifePlugins()}
	for _, f := range edit {
		f(cfg)
	}
	Serve(cfg)
}

func init() {
	modes["life"] = func() {
		note("plugin", strconv.Itoa(os.Getpid()))
		lifeServe()
		// It must not matter that nobody reads this any more.
		fmt.Fprintln(os.Stdout, "main is finishing")
		fmt.Fprintln(os.Stderr, "main is finishing")
		note("main has finished", "")
	}
	modes["life late"] = func() {
		note("plugin", strconv.Itoa(os.Getpid()))
		awaitNote("serve")
		lifeServe()
		note("main has finished", "")
	}
	modes["life endless"] = func() {
		note("plugin", strconv.Itoa(os.Getpid()))
		lifeServe()
		note("main runs on", "")
		select {}
	}
	modes["life noisy"] = func() {
		fmt.Println("a banner | of a library")
		fmt.Println("7 of 9")
		fmt.Println()
		fmt.Println(strings.Repeat("x", 1<<20))
		lifeServe()
	}
	modes["life without TLS"] = func() {
		lifeServe(func(c *ServeConfig) {
			c.TLSProvider = func() (*tls.Config, error) { return nil, errors.New("the key is in the other trousers") }
		})
	}
	modes["life without plugins"] = func() { lifeServe(func(c *ServeConfig) { c.Plugins = nil }) }
	modes["life without a cookie"] = func() { lifeServe(func(c *ServeConfig) { c.MagicCookieKey = "" }) }
	modes["life without a place"] = func() {
		_ = os.RemoveAll(os.Getenv(EnvUnixSocketDir))
		lifeServe()
	}
	modes["life prints and exits"] = func() {
		fmt.Println("welcome to the jungle")
		fmt.Fprintln(os.Stderr, "so long")
	}
	modes["life prints and stays"] = func() {
		fmt.Println("welcome to the jungle")
		select {}
	}
	modes["life says nothing"] = func() {
		note("plugin", strconv.Itoa(os.Getpid()))
		<-make(chan int)
	}
	modes["life exits"] = func() { os.Exit(7) }
	modes["life speaks gRPC"] = func() {
		fmt.Println("1|3|unix|/tmp/none|grpc|")
		select {}
	}
	modes["life speaks gibberish"] = func() {
		fmt.Println("1|three|unix")
		select {}
	}
	modes["life deaf"] = func() {
		// It is there and listens, but nobody is at home.
		lis, err := net.Listen("unix", filepath.Join(os.Getenv(EnvUnixSocketDir), "deaf"))
		if err != nil {
			panic(err)
		}
		fmt.Printf("1|3|unix|%s|netrpc|\n", lis.Addr())
		select {}
	}
}

// lifeNamed returns the test binary under another name, for the life of the
// test.
func lifeNamed(t testing.TB, name string) string {
	t.Helper()
	if runtime.GOOS == "windows" {
		name += ".exe"
	}
	path := filepath.Join(t.TempDir(), name)
	if os.Link(os.Args[0], path) == nil {
		return path
	}
	data, err := os.ReadFile(os.Args[0])
	if err != nil {
		t.Fatal(err)
	}
	lifeWriteProgram(t, path, data, 0o700)
	return path
}

// A plugin that ends unasked says why: at Done and Err, and to every call that
// was in flight.
func TestLifeDeath(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		how, text string // the text in full, or its end after a "..."
		panic     bool
		code      int
	}{
		{"panic", "plugin greeter: panic: boom (exit status 2)", true, 2},
		{"fatal error", "plugin greeter: fatal error: sync: unlock of unlocked mutex (exit status 2)", true, 2},
		{"exit 0", "...(exit status 0)", false, 0},
		{"exit 3", "...(exit status 3)", false, 3},
		{"kill", map[bool]string{true: "...(exit status 1)", false: "...(signal: killed)"}[runtime.GOOS == "windows"], false, -1},
	} {
		t.Run(test.how, func(t *testing.T) {
			t.Parallel()
			cfg := newLab(t).config("life")
			cfg.Cmd.Path = lifeNamed(t, "greeter")
			c, p := start(t, cfg)
			life, idle := dispense[*lifeClient](t, p, "life"), dispense[*lifeClient](t, p, "life")
			if err := c.Err(); err != nil || c.Exited() {
				t.Errorf("it lives, with the error %v and Exited %v", err, c.Exited())
			}
			errs := life.hang(t, 4)
			check := func(err error) {
				t.Helper()
				var exit *ExitError
				if !errors.As(err, &exit) || !errors.Is(err, io.ErrUnexpectedEOF) {
					t.Fatalf("a call that was in flight failed with %T: %v", err, err)
				}
				if end, cut := strings.CutPrefix(test.text, "..."); cut && !strings.HasSuffix(err.Error(), end) || !cut && err.Error() != test.text {
					t.Errorf("a call that was in flight failed with %q and not %q", err, test.text)
				}
			}
			check(life.Call("Plugin.Die", test.how, new(bool)))
			for range cap(errs) {
				check(<-errs)
			}
			awaitClosed(t, "Done", c.Done())
			var exit *ExitError
			if !errors.As(c.Err(), &exit) {
				t.Fatalf("Err returned %v", c.Err())
			}
			if !c.Exited() || exit.Path != cfg.Cmd.Path || exit.State == nil || test.code >= 0 && exit.State.ExitCode() != test.code {
				t.Errorf("Exited: %v, %+v", c.Exited(), exit)
			}
			if got := strings.Contains(exit.Panic, "boom") || strings.Contains(exit.Panic, "unlock of"); got != test.panic {
				t.Errorf("Panic: %q", exit.Panic)
			}
			if test.panic && (!strings.Contains(exit.Panic, "lifeServer") || !strings.Contains(exit.Panic, "goroutine ") || !strings.Contains(exit.Stderr, "goroutine ")) {
				t.Errorf("there is no trace:\nPanic: %s\nStderr: %s", exit.Panic, exit.Stderr)
			}
			for _, client := range []*lifeClient{life, idle} {
				if err := client.Call("Plugin.Echo", []byte("?"), new([]byte)); err != rpc.ErrShutdown {
					t.Errorf("a later c.Call failed with %v", err)
				}
				if err := Call(context.Background(), client.Client, "Plugin.Echo", []byte("?"), new([]byte)); !errors.Is(err, rpc.ErrShutdown) {
					t.Errorf("a later Call failed with %v", err)
				}
			}
			within(t, "a later Dispense and Ping", 0, func() {
				if _, err := p.Dispense("life"); err == nil {
					t.Error("a later Dispense did not fail")
				}
				if p.Ping() == nil {
					t.Error("a later Ping did not fail")
				}
			})
			c.Kill()
			if c.Err() != exit {
				t.Errorf("after Kill, Err is %v", c.Err())
			}
		})
	}
}

// The last lines of stderr are kept, and not more than 8 KiB of them.
func TestLifeLastWords(t *testing.T) {
	t.Parallel()
	modes := map[string]string{"life babbles and exits": "", "life babbles and panics": "panic: boom"}
	for mode, crash := range modes {
		t.Run(mode, func(t *testing.T) {
			t.Parallel()
			c, p := start(t, newLab(t).config(mode))
			life := dispense[*lifeClient](t, p, "life")
			_ = life.Call("Plugin.Babble", crash != "", new(bool))
			awaitClosed(t, "Done", c.Done())
			var exit *ExitError
			if !errors.As(c.Err(), &exit) {
				t.Fatalf("Err returned %v", c.Err())
			}
			if len(exit.Stderr) > 8<<10 || len(exit.Stderr) < 4<<10 || !strings.Contains(exit.Stderr, "the last of 3000 lines") || !strings.HasPrefix(exit.Panic, crash) {
				t.Errorf("%d bytes of stderr: %q\nPanic: %q", len(exit.Stderr), exit.Stderr, exit.Panic)
			}
		})
	}
}

// lifeBabbler prints to the process's own stderr, as the runtime does.
type lifeBabbler struct{ stderr *os.File }

func (b lifeBabbler) Babble(crash bool, _ *bool) error {
	for n := range 3000 {
		fmt.Fprintf(b.stderr, "line %d\n", n)
	}
	fmt.Fprintln(b.stderr, "the last of 3000 lines")
	if crash {
		panic("boom")
	}
	os.Exit(0)
	return nil
}

func init() {
	babble := func() {
		stderr := os.Stderr
		lifeServe(func(c *ServeConfig) {
			c.Plugins = PluginSet{"life": testPlugin{server: serves(lifeBabbler{stderr})}}
		})
	}
	modes["life babbles and exits"], modes["life babbles and panics"] = babble, babble
}

// An end that was asked for is none to complain about.
func TestLifeAskedEnd(t *testing.T) {
	t.Parallel()
	for name, end := range map[string]func(c *Client, p ClientProtocol){
		"Kill":  func(c *Client, _ ClientProtocol) { c.Kill() },
		"Close": func(_ *Client, p ClientProtocol) { _ = p.Close() },
		"CleanupClients": func(c *Client, _ ClientProtocol) {
			CleanupClients()
		},
	} {
		t.Run(name, func(t *testing.T) {
			l := newLab(t)
			cfg := l.config("life")
			cfg.Managed = true
			c, p := start(t, cfg)
			end(c, p)
			awaitClosed(t, "Done", c.Done())
			if err := c.Err(); err != nil {
				t.Error(err)
			}
			l.read("main has finished")
		})
	}
}

// A client that was never started, or could not be, is done with at once.
func TestLifeNeverLived(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	c := NewClient(l.config("life"))
	c.Kill()
	awaitClosed(t, "Done", c.Done())
	if _, err := c.Start(); err == nil {
		t.Error("it started after Kill")
	}
	if _, err := c.Client(); err == nil {
		t.Error("it connected after Kill")
	}
	c.Kill()
	if c.Err() != nil || c.ID() != "" || l.noted("plugin") {
		t.Errorf("Err: %v, ID: %q", c.Err(), c.ID())
	}
}

// startError is the error of a start that must fail.
func startError(t testing.TB, c *Client) *StartError {
	t.Helper()
	t.Cleanup(c.Kill)
	_, err := c.Start()
	var failed *StartError
	if !errors.As(err, &failed) {
		t.Fatalf("Start returned %T: %v", err, err)
	}
	if _, again := c.Start(); again != err {
		t.Errorf("Start returned %v and then %v", err, again)
	}
	if _, again := c.Client(); again == nil || again.Error() != err.Error() {
		t.Errorf("Start returned %v, and Client %v", err, again)
	}
	awaitClosed(t, "Done", c.Done())
	return failed
}

// lifeFailure is a start that fails, and what its error must have.
type lifeFailure struct {
	name, mode     string
	edit           func(testing.TB, *ClientConfig)
	code           int    // of the exit; -1 if the process did not end by itself
	stdout, stderr string // parts of them
	hint           string // a part of the text
	is             error
}

func (f lifeFailure) run(t *testing.T) {
	t.Parallel()
	cfg := newLab(t).config(f.mode)
	if f.edit != nil {
		f.edit(t, cfg)
	}
	err := startError(t, NewClient(cfg))
	text := err.Error()
	t.Log(text)
	if err.Path != cfg.Cmd.Path || err.Err == nil {
		t.Errorf("Path: %q, Err: %v", err.Path, err.Err)
	}
	if f.code < 0 && err.State != nil || f.code >= 0 && (err.State.ExitCode() != f.code || !strings.Contains(text, err.State.String())) {
		t.Errorf("State: %v", err.State)
	}
	if !strings.Contains(err.Stdout, f.stdout) || !strings.Contains(text, f.stdout) {
		t.Errorf("Stdout: %q", err.Stdout)
	}
	if !strings.Contains(err.Stderr, f.stderr) || !strings.Contains(text, f.stderr) {
		t.Errorf("Stderr: %q", err.Stderr)
	}
	for part := range strings.SplitSeq(f.hint, "|") {
		if !strings.Contains(text, part) {
			t.Errorf("there is no hint with %q", part)
		}
	}
	if f.is != nil && !errors.Is(err, f.is) {
		t.Errorf("it is no %v", f.is)
	}
}

// A plugin that does not start says why, with all that is known.
func TestLifeStartError(t *testing.T) {
	t.Parallel()
	runs := func(path string) func(testing.TB, *ClientConfig) {
		return func(_ testing.TB, cfg *ClientConfig) { cfg.Cmd = exec.Command(path) }
	}
	soon := func(_ testing.TB, cfg *ClientConfig) { cfg.StartTimeout = 3 * time.Second }
	for _, test := range []lifeFailure{
		{name: "exit", mode: "life exits", code: 7},
		{name: "print and exit", mode: "life prints and exits", code: 0, stdout: "welcome to the jungle", stderr: "so long", hint: "plugin.Serve"},
		{name: "print and stay", mode: "life prints and stays", edit: soon, code: -1, stdout: "welcome to the jungle", hint: "plugin.Serve", is: context.DeadlineExceeded},
		{name: "say nothing", mode: "life says nothing", edit: soon, code: -1, hint: "handshake|3s", is: context.DeadlineExceeded},
		{name: "another program's", mode: "life", code: 1, stderr: "is a plugin", hint: "another program|" + testHandshake.MagicCookieKey, edit: func(_ testing.TB, cfg *ClientConfig) {
			cfg.MagicCookieValue = "another"
		}},
		{name: "gRPC", mode: "life speaks gRPC", code: -1, hint: "gRPC|net/rpc"},
		{name: "gibberish", mode: "life speaks gibberish", code: -1, hint: "handshake"},
		{name: "no file", edit: runs("/no/such/file"), code: -1, hint: "no such file", is: fs.ErrNotExist},
		{name: "not in PATH", edit: runs("no-such-program"), code: -1, is: exec.ErrNotFound},
		// What fails in Serve, is told on stderr.
		{name: "bad TLSProvider", mode: "life without TLS", code: 1, stderr: "the key is in the other trousers"},
		{name: "no plugins", mode: "life without plugins", code: 1, stderr: "no plugins"},
		{name: "no cookie", mode: "life without a cookie", code: 1, stderr: "MagicCookieKey"},
	} {
		t.Run(test.name, test.run)
	}
}

// Versions that do not meet are all named.
func TestLifeVersionError(t *testing.T) {
	t.Parallel()
	cfg := newLab(t).config("life") // it has 3
	cfg.ProtocolVersion, cfg.VersionedPlugins = 5, map[int]PluginSet{1: lifePlugins()}
	err := startError(t, NewClient(cfg))
	var version *VersionError
	if !errors.As(err, &version) || version.Plugin != 3 || !slices.Equal(version.Host, []int{1, 5}) {
		t.Fatalf("the error is %v, %+v", err, version)
	}
	for _, part := range []string{"3", "1 5"} {
		if !strings.Contains(err.Error(), part) {
			t.Errorf("%q does not name %s", err, part)
		}
	}
}

// Programs compare the sentinels.
func TestLifeSentinels(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	secure := func(s *SecureConfig) *ClientConfig {
		cfg := l.config("life")
		cfg.SecureConfig = s
		return cfg
	}
	dead := exec.Command(os.Args[0], "-test.run=^$")
	if err := dead.Run(); err != nil {
		t.Fatal(err)
	}
	reattach := func(pid int) *ClientConfig {
		cfg := l.config("life")
		cfg.Cmd, cfg.Reattach = nil, &ReattachConfig{ProtocolVersion: 3, Pid: pid, Addr: &net.UnixAddr{Net: "unix", Name: filepath.Join(l.tmp, "none")}}
		return cfg
	}
	both := reattach(os.Getpid())
	both.SecureConfig = &SecureConfig{Checksum: []byte{1}, Hash: sha256.New()}
	for _, test := range []struct {
		cfg  *ClientConfig
		want error
	}{
		{secure(&SecureConfig{Hash: sha256.New()}), ErrSecureConfigNoChecksum},
		{secure(&SecureConfig{Checksum: []byte{1}}), ErrSecureConfigNoHash},
		{secure(&SecureConfig{Checksum: []byte{1}, Hash: sha256.New()}), ErrChecksumsDoNotMatch},
		{reattach(dead.Process.Pid), ErrProcessNotFound},
		{reattach(os.Getpid()), ErrProcessNotFound},
		{both, ErrSecureConfigAndReattach},
	} {
		c := NewClient(test.cfg)
		for range 2 {
			if _, err := c.Start(); err != test.want {
				t.Errorf("Start returned %v and not %v", err, test.want)
			}
		}
		awaitClosed(t, "Done", c.Done())
		c.Kill()
	}
}

// lifeRecord is what a lifeLogger keeps.
type lifeRecord struct {
	level      hclog.Level
	name, text string
}

// lifeLogger returns a logger and the records that it has got so far.
func lifeLogger() (hclog.Logger, func() []lifeRecord) {
	var mu sync.Mutex
	var records []lifeRecord
	logger := hclog.NewInterceptLogger(&hclog.LoggerOptions{Output: io.Discard, Level: hclog.Trace})
	logger.RegisterSink(&lifeSink{func(r lifeRecord) {
		mu.Lock()
		defer mu.Unlock()
		records = append(records, r)
	}})
	return logger, func() []lifeRecord {
		mu.Lock()
		defer mu.Unlock()
		return slices.Clone(records)
	}
}

type lifeSink struct{ take func(lifeRecord) }

func (s *lifeSink) Accept(name string, level hclog.Level, msg string, args ...any) {
	s.take(lifeRecord{level, name, msg + fmt.Sprintln(args...)})
}

// What a plugin prints before its handshake does not keep it from starting.
func TestLifeNoise(t *testing.T) {
	t.Parallel()
	cfg := newLab(t).config("life noisy")
	cfg.Cmd.Path = lifeNamed(t, "greeter")
	logger, records := lifeLogger()
	cfg.Logger = logger
	c, p := start(t, cfg)
	var reply []byte
	if err := dispense[*lifeClient](t, p, "life").Call("Plugin.Echo", []byte("?"), &reply); err != nil || string(reply) != "?" {
		t.Errorf("Echo returned %q, %v", reply, err)
	}
	c.Kill()
	var warnings []lifeRecord
	for _, r := range records() {
		if r.level >= hclog.Warn {
			warnings = append(warnings, r)
		}
	}
	if len(warnings) != 4 {
		t.Fatalf("there are %d warnings and not one for each of 4 lines", len(warnings))
	}
	for i, part := range []string{"a banner | of a library", "7 of 9", "", strings.Repeat("x", 1000)} {
		if w := warnings[i]; w.level != hclog.Warn || !strings.Contains(w.name+w.text, "greeter") || !strings.Contains(w.text, part) {
			t.Errorf("warning %d by %q has no %q: %.200q", i, w.name, part, w.text)
		}
	}
	if n := len(warnings[3].text); n > defaultLogBufferSize+1000 {
		t.Errorf("a warning is %d bytes long", n)
	}
}

// Kill ends whatever Start and Client are waiting for.
func TestLifeKillInterrupts(t *testing.T) {
	t.Parallel()
	const killTimeout = 500 * time.Millisecond
	for _, test := range []struct {
		name, mode string
		edit       func(*ClientConfig)
		at         func(c *Client, l *lab) bool // Kill may be called
	}{
		{"waiting for the handshake", "life says nothing", nil, func(_ *Client, l *lab) bool { return l.noted("plugin") }},
		{"checking", "life", func(cfg *ClientConfig) {
			cfg.SecureConfig = &SecureConfig{Checksum: []byte{1}, Hash: &slowHash{Hash: sha256.New()}}
		}, func(c *Client, _ *lab) bool { return c.config.SecureConfig.Hash.(*slowHash).begun.Load() }},
		{"connecting", "life deaf", func(cfg *ClientConfig) {
			cfg.TLSConfig = &tls.Config{InsecureSkipVerify: true}
		}, func(c *Client, _ *lab) bool { return c.starting.result().addr != nil }},
		{"dispensing", "life deaf", nil, func(c *Client, _ *lab) bool { return c.connecting.result() != nil }},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			l := newLab(t)
			cfg := l.config(test.mode)
			cfg.KillTimeout = killTimeout
			if test.edit != nil {
				test.edit(cfg)
			}
			c := NewClient(cfg)
			failed := make(chan error, 1)
			go func() {
				p, err := c.Client()
				if err == nil {
					_, err = p.Dispense("life")
				}
				failed <- err
			}()
			lifeAwait(t, test.name, func() bool { return test.at(c, l) })
			within(t, "Kill", killTimeout+time.Second, c.Kill)
			within(t, "what was waiting", 0, func() {
				if err := <-failed; err == nil {
					t.Error("it did not fail")
				}
			})
			awaitClosed(t, "Done", c.Done())
			if err := c.Err(); err != nil {
				t.Error(err)
			}
		})
	}
}

// slowHash takes longer for a test binary than a test waits.
type slowHash struct {
	hash.Hash
	begun atomic.Bool
}

func (h *slowHash) Write(p []byte) (int, error) {
	h.begun.Store(true)
	time.Sleep(100 * time.Millisecond)
	return h.Hash.Write(p)
}

// A start that is given up leaves nothing, and says so ever after.
func TestLifeStartContext(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	c := NewClient(l.config("life says nothing"))
	defer c.Kill()
	reason := errors.New("the user has changed her mind")
	ctx, cancel := context.WithCancelCause(context.Background())
	failed := make(chan error, 1)
	go func() {
		_, err := c.StartContext(ctx)
		failed <- err
	}()
	l.read("plugin")
	// One that only waits for the first can leave before.
	impatient, leave := context.WithCancel(context.Background())
	leave()
	if _, err := c.StartContext(impatient); !errors.Is(err, context.Canceled) {
		t.Errorf("the one that waits got %v", err)
	}
	cancel(reason)
	err := <-failed
	if !errors.Is(err, context.Canceled) || !errors.Is(err, reason) || !errors.As(err, new(*StartError)) {
		t.Errorf("StartContext returned %v", err)
	}
	if _, again := c.Start(); again != err {
		t.Errorf("Start returned %v", again)
	}
	l.deserted(slack)

	addr, err := NewClient(l.config("life says nothing")).StartContext(impatient)
	if addr != nil || !errors.Is(err, context.Canceled) {
		t.Errorf("StartContext with a context that is over returned %v, %v", addr, err)
	}

	// The context is for starting, not for living.
	ctx, cancel = context.WithCancelCause(context.Background())
	c = NewClient(l.config("life"))
	defer c.Kill()
	if _, err := c.StartContext(ctx); err != nil {
		t.Fatal(err)
	}
	cancel(nil)
	p, err := c.Client()
	if err != nil {
		t.Fatal(err)
	}
	if err := p.Ping(); err != nil {
		t.Error(err)
	}
}

// One configuration starts a plugin again and again, also after a crash.
func TestLifeRestart(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	cfg := l.config("life")
	var pids []string
	for _, end := range []func(*Client, *lifeClient){
		func(c *Client, _ *lifeClient) { c.Kill() },
		func(_ *Client, life *lifeClient) { _ = life.Call("Plugin.Die", "panic", new(bool)) },
		func(c *Client, _ *lifeClient) { c.Kill() },
	} {
		c, p := start(t, cfg)
		if slices.Contains(pids, c.ID()) {
			t.Errorf("the process %s runs again", c.ID())
		}
		pids = append(pids, c.ID())
		end(c, dispense[*lifeClient](t, p, "life"))
		awaitClosed(t, "Done", c.Done())
	}
	if cfg.Cmd.Process == nil || strconv.Itoa(cfg.Cmd.Process.Pid) != pids[2] || cfg.Cmd.ProcessState == nil {
		t.Errorf("the command has %v, %v", cfg.Cmd.Process, cfg.Cmd.ProcessState)
	}
}

// A plugin that is done with reading the handshake's variables passes none of
// them on.
func TestLifeCleanHouse(t *testing.T) {
	t.Parallel()
	cfg := newLab(t).config("life")
	cfg.AutoMTLS = true
	_, p := start(t, cfg)
	life := dispense[*lifeClient](t, p, "life")
	var child string
	if err := life.Call("Plugin.Child", []string{"env"}, &child); err != nil {
		t.Fatal(err)
	}
	for name, env := range map[string][]string{"plugin": life.self(t).Env, "child": strings.Split(child, "\n")} {
		if !slices.ContainsFunc(env, func(v string) bool { return strings.HasPrefix(v, lifeNotesEnv+"=") }) {
			t.Errorf("the %s has no environment: %q", name, env)
		}
		for _, v := range env {
			if strings.HasPrefix(v, "PLUGIN_") || strings.HasPrefix(v, testHandshake.MagicCookieKey+"=") {
				t.Errorf("the %s has %s", name, v)
			}
		}
	}
}

// lifeSize is what must not grow.
type lifeSize struct {
	goroutines, fds int
	heap            uint64
}

func lifeMeasure() lifeSize {
	for range 3 {
		runtime.GC()
	}
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return lifeSize{runtime.NumGoroutine(), lifeFDs(), m.HeapAlloc}
}

// noLeak fails the test if f, done again and again, leaves something behind.
func noLeak(t *testing.T, cycles int, f func()) {
	t.Helper()
	for range 5 {
		f()
	}
	before := lifeMeasure()
	for range cycles {
		f()
	}
	// The garbage collector closes what was forgotten: look before it runs.
	if !poll(slack, func() bool { return lifeFDs() <= before.fds }) {
		t.Errorf("%d cycles made %d descriptors of %d", cycles, lifeFDs(), before.fds)
	}
	var after lifeSize
	if !poll(slack, func() bool {
		after = lifeMeasure()
		return after.goroutines <= before.goroutines && after.fds <= before.fds && after.heap <= before.heap+1<<20
	}) {
		t.Errorf("%d cycles made %+v of %+v", cycles, after, before)
	}
	if n := syncMapLen(&codecs); n != 0 {
		t.Errorf("%d clients are still known", n)
	}
}

func syncMapLen(m *sync.Map) (n int) {
	m.Range(func(any, any) bool { n++; return true })
	return n
}

// Nothing is left of plugins that have lived.
func TestLifeLeakCycles(t *testing.T) {
	l := newLab(t)
	noLeak(t, lifeCycles(), func() {
		cfg := l.config("life")
		cfg.Managed = true
		c := NewClient(cfg) // start would hold on to it
		p, err := c.Client()
		if err != nil {
			t.Fatal(err)
		}
		if err := dispense[*lifeClient](t, p, "life").Call("Plugin.Echo", []byte("?"), new([]byte)); err != nil {
			t.Fatal(err)
		}
		c.Kill()
	})
	l.deserted(0)
	managed.mu.Lock()
	defer managed.mu.Unlock()
	if len(managed.clients) > 0 {
		t.Errorf("%d clients are still managed", len(managed.clients))
	}
}

// Nothing is left of plugins that have crashed, even where nobody calls Kill.
func TestLifeLeakCrashes(t *testing.T) {
	l := newLab(t)
	deaths := []string{"panic", "kill", "exit 3"}
	n := 0
	noLeak(t, lifeCycles(), func() {
		c := NewClient(l.config("life"))
		p, err := c.Client()
		if err != nil {
			t.Fatal(err)
		}
		n++
		if err := dispense[*lifeClient](t, p, "life").Call("Plugin.Die", deaths[n%len(deaths)], new(bool)); !errors.As(err, new(*ExitError)) {
			t.Fatal(err)
		}
		awaitClosed(t, "Done", c.Done())
	})
	l.deserted(0)
}

// Nothing is left of what was dispensed, on either side.
func TestLifeLeakDispense(t *testing.T) {
	_, p := start(t, newLab(t).config("life"))
	life := dispense[*lifeClient](t, p, "life")
	cycle := func() {
		instance := dispense[*lifeClient](t, p, "life")
		if err := instance.Call("Plugin.Echo", []byte("?"), new([]byte)); err != nil {
			t.Fatal(err)
		}
		if err := instance.Close(); err != nil {
			t.Fatal(err)
		}
	}
	for range 5 {
		cycle()
	}
	there, known := life.self(t), syncMapLen(&codecs)
	before := lifeMeasure()
	for range 500 {
		cycle()
	}
	if !poll(slack, func() bool {
		after := lifeMeasure()
		return after.goroutines <= before.goroutines && after.fds <= before.fds && after.heap <= before.heap+1<<20
	}) {
		t.Errorf("the host has %+v and had %+v", lifeMeasure(), before)
	}
	if !poll(slack, func() bool {
		now := life.self(t)
		return now.Goroutines <= there.Goroutines+maxIdle && now.FDs <= there.FDs
	}) {
		now := life.self(t)
		t.Errorf("the plugin has %d goroutines and %d descriptors, and had %d and %d", now.Goroutines, now.FDs, there.Goroutines, there.FDs)
	}
	if n := syncMapLen(&codecs); n > known {
		t.Errorf("%d clients are known, and were %d", n, known)
	}
}

// lifeWriteProgram writes a file that is to be executed. While it is open for
// writing no process may be forked: it would hold it open, and it could not be
// executed.
func lifeWriteProgram(t testing.TB, path string, data []byte, mode fs.FileMode) {
	t.Helper()
	syscall.ForkLock.RLock()
	defer syscall.ForkLock.RUnlock()
	if err := os.WriteFile(path, data, mode); err != nil {
		t.Fatal(err)
	}
}

// lifeData is n bytes that do not repeat.
func lifeData(n int) []byte {
	data := make([]byte, n)
	_, _ = rand.Read(data)
	return data
}

// errWrong is a wrong answer.
var errWrong = errors.New("the answer is wrong")

// traffic makes calls, streams and logs until ctx ends or something fails.
func (c *lifeClient) traffic(ctx context.Context, logger func(n int)) error {
	for n := 0; ctx.Err() == nil; n++ {
		if logger != nil {
			logger(n)
		}
		data := lifeData(1 + n*7919%200_000)
		var err error
		var got, want []byte
		switch n % 3 {
		case 0:
			want = data
			err = Call(ctx, c.Client, "Plugin.Echo", data, &got)
		case 1:
			sum := sha256.Sum256(data)
			want = sum[:]
			err = Call(ctx, c.Client, "Plugin.Sum", c.broker.ServeReader(bytes.NewReader(data)), &got)
		case 2:
			err = c.Call("Plugin.Print", fmt.Sprintf("%x\n", data[:min(len(data), 5000)]), new(bool))
		}
		if err != nil {
			return err
		}
		if !bytes.Equal(got, want) {
			return errWrong
		}
	}
	return nil
}
