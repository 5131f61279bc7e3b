package plugin_test

import (
	"bytes"
	"context"
	"encoding/gob"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"log"
	"net/rpc"
	"os"
	"os/exec"
	"os/signal"
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
	"github.com/muxplug/plugin"
)

// ---- The test binary ----

// The test binary stands in for every plugin and for hosts of their own: a
// process that is started with modeEnv set runs no tests. The variable names
// the steps of its main function, separated by spaces.
const modeEnv = "TEST_PLUGIN_MODE"

// modes are the steps. Each test file adds its own in an init function.
var modes = map[string]func(){
	"plugin": func() { servePlugin() },
	// Waits before it goes on.
	"late": func() { awaitNote("serve") },
	// Does its last work until the test says that it may end.
	"finishing": func() {
		note("finishing", "")
		awaitNote("finish")
	},
	"endless": func() {
		note("endless", "")
		time.Sleep(forever)
	},
	"wait":  func() { time.Sleep(forever) },
	"say":   func() { fmt.Println(os.Getenv(sayEnv)) },
	"cry":   func() { fmt.Fprintln(os.Stderr, os.Getenv(sayEnv)) },
	"panic": func() { panic("boom") },
	"fatal": func() { new(sync.Mutex).Unlock() },
	"exit0": func() { os.Exit(0) },
	"exit3": func() { os.Exit(3) },
	"killed": func() {
		if p, err := os.FindProcess(os.Getpid()); err == nil {
			_ = p.Kill()
		}
		time.Sleep(forever)
	},
}

const (
	sayEnv   = "TEST_PLUGIN_SAY"   // what the steps "say" and "cry" print
	notesEnv = "TEST_PLUGIN_NOTES" // the directory of a lab's notes
	childEnv = "TEST_PLUGIN_CHILD" // the mode of the plugin that the step "host" is to start
)

func TestMain(m *testing.M) {
	mode := os.Getenv(modeEnv)
	if mode == "" {
		os.Exit(runTests(m))
	}
	role := "plugin"
	if strings.HasPrefix(mode, "host") {
		role = "host"
	}
	signIn()
	note(role, strconv.Itoa(os.Getpid()))
	for step := range strings.FieldsSeq(mode) {
		run := modes[step]
		if run == nil {
			fmt.Fprintln(os.Stderr, "no such mode:", step)
			os.Exit(64)
		}
		run()
	}
	note(role+" finished", strconv.Itoa(os.Getpid()))
}

// runTests runs the tests in their own temporary directory, and fails if they
// leave a goroutine, process, descriptor or file behind.
func runTests(m *testing.M) int {
	tmp, err := os.MkdirTemp("", "mux-*")
	if err != nil {
		panic(err)
	}
	defer os.RemoveAll(tmp)
	os.Setenv("TMPDIR", tmp)
	os.Setenv("TMP", tmp) // on Windows
	// The race detector makes every process sleep a second before it exits.
	os.Setenv("GORACE", "atexit_sleep_ms=0 "+os.Getenv("GORACE"))
	left := takeStock(tmp)
	flag.Parse()
	fuzzing := flag.Lookup("test.fuzz").Value.String() != ""
	if n := flag.Lookup("test.parallel"); !fuzzing && n.Value.String() == n.DefValue {
		// Parallel tests mostly wait, for processes and timeouts.
		_ = n.Value.Set("16")
	}
	code := m.Run()
	if fuzzing {
		return code // the workers are killed, and leave their directories here
	}
	if left := left(); left != "" {
		fmt.Fprintln(os.Stderr, "the tests left behind:", left)
		return 1
	}
	return code
}

// ---- The test plugin ----

// testHandshake is the handshake of all test plugins.
var testHandshake = plugin.HandshakeConfig{
	ProtocolVersion:  3,
	MagicCookieKey:   "TEST_PLUGIN_COOKIE",
	MagicCookieValue: "d5f1",
}

// testPlugin returns what the plugin serves. In the host it is a *testClient.
type testPlugin func(*plugin.MuxBroker) (any, error)

func (p testPlugin) Server(b *plugin.MuxBroker) (any, error) { return p(b) }
func (testPlugin) Client(b *plugin.MuxBroker, c *rpc.Client) (any, error) {
	return &testClient{c, b}, nil
}

// serves returns a plugin that serves v.
func serves(v any) testPlugin { return func(*plugin.MuxBroker) (any, error) { return v, nil } }

// testPlugins returns the plugin set of the step "plugin": a testServer and a kit, each
// called by hand, and the same kit called with Invoke.
func testPlugins(s *testState) plugin.PluginSet {
	kit := newKitPlugin(new(kit))
	return plugin.PluginSet{
		"kit":         kit,
		"kit by hand": calledByHand{kit},
		"test":        testPlugin(func(b *plugin.MuxBroker) (any, error) { return &testServer{s, b}, nil }),
	}
}

// servePlugin is the main function of a plugin.
func servePlugin(edit ...func(*plugin.ServeConfig)) {
	cfg := &plugin.ServeConfig{HandshakeConfig: testHandshake, Plugins: testPlugins(newTestState())}
	for _, f := range edit {
		f(cfg)
	}
	plugin.Serve(cfg)
}

// testClient calls a testServer, or any other served value.
type testClient struct {
	*rpc.Client
	broker *plugin.MuxBroker
}

// testServer is what the plugin "test" serves. Its methods share one testState
// per process, or per call of newTestServer.
type testServer struct {
	*testState
	broker *plugin.MuxBroker
}

type testState struct {
	started chan string   // receives the argument of each Block and Wait
	release chan struct{} // ends one Block or Wait, or all when closed
	ended   chan error    // receives the cause of each Wait whose context ended
	waiting atomic.Int32  // Block and Wait calls under way
	environ []string      // the environment before Serve
	stderr  *os.File      // the process's own
}

func newTestState() *testState {
	return &testState{
		started: make(chan string, 1000), release: make(chan struct{}), ended: make(chan error, 1000),
		environ: os.Environ(), stderr: os.Stderr,
	}
}

func newTestServer() *testServer { return &testServer{testState: newTestState()} }

// Echo returns text. Methods that take and return a string can be called by
// CallBack.
func (*testServer) Echo(text string, out *string) error {
	*out = text
	return nil
}

// Box holds any value.
type Box struct{ V any }

func (*testServer) Box(in Box, out *Box) error {
	*out = in
	return nil
}

// Bad replies with a value that gob cannot encode.
func (*testServer) Bad(_ string, out *Box) error {
	out.V = make(chan int)
	return nil
}

var errRegistered = errors.New("test: registered")

func init() {
	gob.Register(Box{})
	gob.Register([]any{})
	plugin.RegisterError(errRegistered)
}

// testErrors are errors that keep their identity across the connection.
var testErrors = map[string]error{
	"EOF":              io.EOF,
	"UnexpectedEOF":    io.ErrUnexpectedEOF,
	"NotExist":         fs.ErrNotExist,
	"Exist":            fs.ErrExist,
	"Permission":       fs.ErrPermission,
	"Invalid":          fs.ErrInvalid,
	"Closed":           fs.ErrClosed,
	"deadline":         os.ErrDeadlineExceeded,
	"Canceled":         context.Canceled,
	"DeadlineExceeded": context.DeadlineExceeded,
	"registered":       errRegistered,
}

// Fail returns an error of testErrors, wrapped.
func (*testServer) Fail(name string, _ *string) error {
	return fmt.Errorf("failing: %w", testErrors[name])
}

// Panic panics in the method.
func (*testServer) Panic(text string, _ *string) error { panic(text) }

// Do runs a mode in another goroutine, and returns when that does.
func (*testServer) Do(mode string, _ *string) error {
	done := make(chan struct{})
	go func() {
		modes[mode]()
		close(done) // not deferred: the call may not return before a panic ends the process
	}()
	<-done
	return nil
}

// Block returns text when it is released. It has no context.
func (s *testServer) Block(text string, out *string) error {
	return s.Wait(context.Background(), text, out)
}

// Wait returns text when it is released, or an error when its context ends.
// In a lab it leaves the notes "in a call" and "cause".
func (s *testServer) Wait(ctx context.Context, text string, out *string) error {
	s.waiting.Add(1)
	defer s.waiting.Add(-1)
	note("in a call", "")
	s.started <- text
	select {
	case <-ctx.Done():
		note("cause", context.Cause(ctx).Error())
		s.ended <- context.Cause(ctx)
		return ctx.Err()
	case <-s.release:
		*out = text
		return nil
	}
}

// Output is what Print prints. Raw goes to the process's own stderr, as a
// trace of the runtime does, and Log to package log.
type Output struct{ Stdout, Stderr, Raw, Log string }

func (s *testServer) Print(o Output, _ *struct{}) error {
	_, err1 := io.WriteString(os.Stdout, o.Stdout)
	_, err2 := io.WriteString(os.Stderr, o.Stderr)
	_, err3 := io.WriteString(s.stderr, o.Raw)
	if o.Log != "" {
		log.Print(o.Log)
	}
	return errors.Join(err1, err2, err3)
}

// Stdin reads size bytes from stdin.
func (*testServer) Stdin(size int, text *string) error {
	buf := make([]byte, size)
	_, err := io.ReadFull(os.Stdin, buf)
	*text = string(buf)
	return err
}

// Self describes the process. Began is the environment before Serve.
type Self struct {
	Pid                      int
	Executable               string
	Args, Began, Env         []string
	Goroutines, FDs, Waiting int
}

func (s *testServer) Self(_ struct{}, self *Self) (err error) {
	*self = Self{
		Pid: os.Getpid(), Args: os.Args, Began: s.environ, Env: os.Environ(),
		Goroutines: runtime.NumGoroutine(), FDs: descriptors(), Waiting: int(s.waiting.Load()),
	}
	self.Executable, err = os.Executable()
	return err
}

// Fork starts a program that has this process's stdout and stderr.
func (s *testServer) Fork(args []string, pid *int) error {
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Stdout, cmd.Stderr = os.Stdout, s.stderr
	err := cmd.Start()
	if err == nil {
		*pid = cmd.Process.Pid
	}
	return err
}

// Transfer tells Copy the id of a reader, or of noise of Size bytes if that is
// 0, and the id of a writer, or of none if that is 0.
type Transfer struct {
	Reader, Writer uint32
	Size           int
}

// Copy copies from a reader of the host to a writer of the host.
func (s *testServer) Copy(in Transfer, n *int64) error {
	var from io.Reader = bytes.NewReader(noise(in.Size, 0))
	if in.Reader != 0 {
		r, err := s.broker.DialReader(in.Reader)
		if err != nil {
			return err
		}
		defer r.Close()
		from = r
	}
	if in.Writer == 0 {
		var err error
		*n, err = io.Copy(io.Discard, from)
		return err
	}
	to, err := s.broker.DialWriter(in.Writer)
	if err != nil {
		return err
	}
	if *n, err = io.Copy(to, from); err != nil {
		_ = to.Close()
		return err
	}
	return to.Close()
}

// Callback is a method of the host and its argument.
type Callback struct {
	ID          uint32
	Method, Arg string
}

// CallBack calls a method of the host.
func (s *testServer) CallBack(ctx context.Context, in Callback, out *string) error {
	c, err := s.broker.DialRPC(in.ID)
	if err != nil {
		return err
	}
	defer c.Close()
	return plugin.Call(ctx, c, "Plugin."+in.Method, in.Arg, out)
}

// Serve serves a "reader" of 1 MiB of noise, a "writer" to stdout, as "rpc" this
// server, or as "echo" a stream on which everything comes back.
func (s *testServer) Serve(kind string, id *uint32) error {
	switch kind {
	case "reader":
		*id, _ = s.broker.ServeReader(bytes.NewReader(noise(1<<20, 0)))
	case "writer":
		*id, _ = s.broker.ServeWriter(os.Stdout)
	case "rpc":
		*id, _ = s.broker.ServeRPC(s)
	case "echo":
		*id = s.broker.NextId()
		go s.echo(*id) // ends when the host closes the stream
	}
	return nil
}

func (s *testServer) echo(id uint32) {
	if conn, err := s.broker.Accept(id); err == nil {
		_, _ = io.Copy(conn, conn)
		_ = conn.Close()
	}
}

// killedState is how a process has ended that was killed.
var killedState = onWindows("exit status 1", "signal: killed")

// onWindows returns the first on Windows, and elsewhere the second.
func onWindows(there, elsewhere string) string {
	if runtime.GOOS == "windows" {
		return there
	}
	return elsewhere
}

// ---- Whole lives ----

// One connection carries calls, streams, callbacks and output, and logs
// nothing above Debug.
func TestLife(t *testing.T) {
	leavesNothing(t)
	cfg := testConfig("plugin")
	var stdout, stderr syncBuffer
	cfg.SyncStdout, cfg.SyncStderr = &stdout, &stderr
	logger, records := recorder()
	cfg.Logger = logger
	c, p := startPlugin(t, cfg)
	test := dispense(t, p)
	echo(t, test.Client)
	mustCall[struct{}](t, test.Client, "Print", Output{Stdout: "to stdout", Stderr: "to stderr"})
	data := noise(1_000_000, 1)
	var back bytes.Buffer
	from, stopReader := test.broker.ServeReader(bytes.NewReader(data))
	defer stopReader()
	to, stopWriter := test.broker.ServeWriter(&back)
	defer stopWriter()
	n := mustCall[int64](t, test.Client, "Copy", Transfer{Reader: from, Writer: to})
	if n != int64(len(data)) || !bytes.Equal(back.Bytes(), data) {
		t.Errorf("%d of %d bytes went through the plugin, %d came back", n, len(data), back.Len())
	}
	id, stop := test.broker.ServeRPC(newTestServer())
	defer stop()
	callback := Callback{ID: id, Method: "Echo", Arg: "called back"}
	checkEqual(t, "the callback", mustCall[string](t, test.Client, "CallBack", callback), "called back")
	if err := c.Err(); err != nil || c.Exited() || isClosed(c.Done()) {
		t.Errorf("it runs, and Err is %v, Exited %v", err, c.Exited())
	}
	c.Kill()
	if err := c.Err(); err != nil || !c.Exited() || !isClosed(c.Done()) {
		t.Errorf("after Kill, Err is %v, Exited %v", err, c.Exited())
	}
	if stdout.String() != "to stdout" || stderr.String() != "to stderr" {
		t.Errorf("the plugin printed %q and %q", stdout.String(), stderr.String())
	}
	for _, r := range records.find("") {
		if r.level > hclog.Debug {
			t.Errorf("it logged %+v", r)
		}
	}
}

// crashes are ways in which a plugin ends by itself, and what an ExitError says of
// each.
var crashes = []struct{ how, panic, state string }{
	{"panic", "panic: boom", "exit status 2"},
	{"fatal", "fatal error: sync", "exit status 2"},
	{"exit0", "", "exit status 0"},
	{"exit3", "", "exit status 3"},
	{"killed", "", killedState},
}

// A plugin that ends by itself says why, with its last output: in Err, in each call in
// flight, and in later ones.
func TestCrash(t *testing.T) {
	t.Parallel()
	for _, crash := range crashes {
		t.Run(crash.how, func(t *testing.T) {
			t.Parallel()
			cfg := newLab(t).config("plugin")
			c, p := startPlugin(t, cfg)
			test, idle := dispense(t, p), dispense(t, p)
			lines := strings.Repeat(strings.Repeat("x", 99)+"\n", 100) + "last words\n"
			mustCall[struct{}](t, test.Client, "Print", Output{Raw: lines})
			explains := func(err error) {
				t.Helper()
				var exit *plugin.ExitError
				if !errors.As(err, &exit) || exit.State == nil {
					t.Fatalf("the error is %T: %v", err, err)
				}
				errorSays(t, err, crash.panic, crash.state, pluginName(cfg.Cmd.Path))
				if exit.Path != cfg.Cmd.Path || exit.State.String() != crash.state {
					t.Errorf("the error is %+v", exit)
				}
				if !strings.HasPrefix(exit.Panic, crash.panic) || crash.panic == "" && exit.Panic != "" {
					t.Errorf("the panic is %q", exit.Panic)
				}
				if len(exit.Stderr) < 4<<10 || len(exit.Stderr) > 8<<10 {
					t.Errorf("the last lines have %d bytes", len(exit.Stderr))
				}
				if crash.panic == "" && !strings.Contains(exit.Stderr, "last words") {
					t.Errorf("the last lines are %q", exit.Stderr)
				}
			}
			inFlight := test.block(t, 4)
			err := test.Call("Plugin.Do", crash.how, new(string))
			errorIs(t, "the call that ends it", err, io.ErrUnexpectedEOF)
			explains(err)
			for range cap(inFlight) {
				err := receive(t, "a call", inFlight)
				errorIs(t, "a call in flight", err, io.ErrUnexpectedEOF)
				explains(err)
			}
			receive(t, "Done", c.Done())
			failsAfterCrash(t, p, test, idle)
			c.Kill()
			explains(c.Err())
		})
	}
}

// failsAfterCrash checks that all that is done with a plugin that has crashed fails at
// once, with the reason and rpc.ErrShutdown.
func failsAfterCrash(t *testing.T, p plugin.ClientProtocol, clients ...*testClient) {
	t.Helper()
	for _, c := range clients {
		err := c.Call("Plugin.Echo", "", new(string))
		if err != rpc.ErrShutdown && !isA[*plugin.ExitError](err) {
			t.Errorf("a later call returned %v", err)
		}
		err = callIn(context.Background(), c.Client, "Echo")
		if !errors.Is(err, rpc.ErrShutdown) || !isA[*plugin.ExitError](err) {
			t.Errorf("a later Call returned %v", err)
		}
	}
	within(t, "a later Dispense and Ping", 0, func() {
		if dispensing(p) == nil {
			t.Error("a later Dispense did not fail")
		}
		if p.Ping() == nil {
			t.Error("a later Ping did not fail")
		}
	})
}

// A host that reattached to a plugin learns of its end, and not how it ended.
func TestCrashAfterReattach(t *testing.T) {
	t.Parallel()
	for _, crash := range crashes {
		t.Run(crash.how, func(t *testing.T) {
			t.Parallel()
			first, p := startPlugin(t, detached(newLab(t).config("plugin")))
			second, other := startPlugin(t, attachTo(first.ReattachConfig()))
			inFlight := dispense(t, other).block(t, 2)
			if dispense(t, p).Call("Plugin.Do", crash.how, new(string)) == nil {
				t.Error("the call that ends it returned no error")
			}
			explains := func(what string, err error) {
				t.Helper()
				var exit *plugin.ExitError
				if !errors.As(err, &exit) || exit.State != nil {
					t.Errorf("%s: the error is %T: %v", what, err, err)
				}
			}
			for range cap(inFlight) {
				err := receive(t, "a call", inFlight)
				errorIs(t, "a call in flight", err, io.ErrUnexpectedEOF)
				explains("a call in flight", err)
			}
			receive(t, "Done", second.Done())
			second.Kill()
			explains("Err", second.Err())
		})
	}
}

// Dispense returns a value of the type that is asked for, or says what it is.
func TestDispenseType(t *testing.T) {
	host, _, _ := joinInProcess(t)
	if c, err := plugin.Dispense[io.Closer](host, "test"); err != nil || c.Close() != nil {
		t.Error(c, err)
	}
	n, err := plugin.Dispense[int](host, "test")
	errorSays(t, err, `"test"`, "*plugin_test.testClient", "int")
	checkEqual(t, "the value with the error", n, 0)
	_, err = plugin.Dispense[io.Closer](host, "missing")
	errorSays(t, err, `"missing"`)
}

// Discover returns the executable files that match, with absolute paths. Only
// the pattern is one: the directory's name is not.
func TestDiscover(t *testing.T) {
	parent := t.TempDir()
	dir := filepath.Join(parent, "[a]")
	check(t, os.MkdirAll(filepath.Join(dir, "plugin-dir"+exe), 0o755))
	for name, mode := range map[string]os.FileMode{
		"plugin-b" + exe: 0o755,
		"plugin-a" + exe: 0o700,
		"plugin-c.txt":   0o644,
		"other" + exe:    0o755,
	} {
		check(t, os.WriteFile(filepath.Join(dir, name), nil, mode))
	}
	want := []string{filepath.Join(dir, "plugin-a"+exe), filepath.Join(dir, "plugin-b"+exe)}
	t.Chdir(parent)
	for _, from := range []string{dir, "[a]"} {
		if got, err := plugin.Discover("plugin-*", from); err != nil || !slices.Equal(got, want) {
			t.Errorf("found in %s: %v, %v; want %v", from, got, err, want)
		}
	}
	if got, err := plugin.Discover("*", filepath.Join(dir, "missing")); err != nil || len(got) != 0 {
		t.Errorf("found in a missing directory: %v, %v", got, err)
	}
	if _, err := plugin.Discover("[", dir); err == nil {
		t.Error("a malformed pattern is no error")
	}
}

// BasicReply is a reply with an error in it.
type BasicReply struct{ Err *plugin.BasicError }

type basicServer struct{}

func (basicServer) Check(fail bool, reply *BasicReply) error {
	if fail {
		reply.Err = plugin.NewBasicError(fs.ErrNotExist)
	} else {
		reply.Err = plugin.NewBasicError(nil)
	}
	return nil
}

// A BasicError carries the text of an error in a reply, through net/rpc too.
func TestBasicError(t *testing.T) {
	for _, wire := range wires {
		c := wire.connect(t, basicServer{})
		err := mustCall[BasicReply](t, c, "Check", true).Err
		if err == nil || err.Error() != fs.ErrNotExist.Error() {
			t.Errorf("%s: got %v", wire.name, err)
		}
		if err := mustCall[BasicReply](t, c, "Check", false).Err; err != nil {
			t.Errorf("%s: got %v for no error", wire.name, err)
		}
	}
}

// hosted is the plugin of a host in its own process. The step "host" makes the
// configuration. The next may change it, and then one starts the client and
// brings the plugin to a moment of its life. The steps "ready wait" leave it
// there.
var hosted struct {
	cfg    *plugin.ClientConfig
	client *plugin.Client
}

func init() {
	modes["host"] = func() {
		// The parent of the tests may have made them ignore these signals.
		interrupted := make(chan os.Signal, 1)
		signal.Notify(interrupted, os.Interrupt, syscall.SIGHUP)
		go func() { <-interrupted; os.Exit(130) }() // ends with the process
		hosted.cfg = testConfig(os.Getenv(childEnv))
	}
	modes["attaching"] = func() {
		address, pid, _ := strings.Cut(os.Getenv(childEnv), " ")
		hosted.cfg = attachTo(&plugin.ReattachConfig{
			ProtocolVersion: 3,
			Addr:            parseAddr(address),
			Pid:             must(strconv.Atoi(pid)),
		})
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
		hosted.client = plugin.NewClient(hosted.cfg)
		go hosted.client.Start() // ends with the process
		awaitNote("plugin")
	}
	modes["started"] = func() {
		hosted.client = plugin.NewClient(hosted.cfg)
		note("address", must(hosted.client.Start()).String())
	}
	modes["idle"] = func() { hostedTest() }
	modes["calling"] = func() {
		go hostedTest().Call("Plugin.Block", "", new(string)) // ends with the process
		awaitNote("in a call")
	}
	modes["kill"] = func() { hosted.client.Kill() }
	modes["reattachable"] = func() { note("reattach", strconv.Itoa(hosted.client.ReattachConfig().Pid)) }
	modes["ready"] = func() { note("host is ready", "") }
}

// hostedTest starts the host's plugin and dispenses "test".
func hostedTest() *testClient {
	modes["started"]()
	return must(plugin.Dispense[*testClient](must(hosted.client.Client()), "test"))
}
