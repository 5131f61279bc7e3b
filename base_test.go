package plugin

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"log"
	"maps"
	"net"
	"net/rpc"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/yamux"
)

// The environment variables by which tests tell the modes below what to do.
const (
	baseSayEnv      = "TEST_BASE_SAY"      // what to print to stdout
	basePadEnv      = "TEST_BASE_PAD"      // how many bytes to add to it
	baseVersionsEnv = "TEST_BASE_VERSIONS" // the versions in VersionedPlugins
	baseLegacyEnv   = "TEST_BASE_LEGACY"   // the version of Plugins
	baseTLSEnv      = "TEST_BASE_TLS"      // certificate and key, or "fail"
	baseReattachEnv = "TEST_BASE_REATTACH" // see baseTicket
	baseMTLSEnv     = "TEST_BASE_MTLS"     // not empty for AutoMTLS
)

// baseForever is longer than any test runs. A process that waits for its host
// to kill it is gone after that even where the test itself was killed.
const baseForever = 2 * time.Minute

func init() {
	maps.Copy(modes, map[string]func(){
		// The plugin of most tests here.
		"base": func() {
			s := &baseServer{environ: os.Environ(), stderr: os.Stderr}
			Serve(&ServeConfig{HandshakeConfig: testHandshake, Plugins: basePlugins(s)})
			fmt.Println("tail on stdout")
			fmt.Fprintln(os.Stderr, "[INFO] tail on stderr")
		},
		// Does not end when it is asked to.
		"base-stubborn": func() {
			Serve(&ServeConfig{HandshakeConfig: testHandshake, Plugins: basePlugins(&baseServer{})})
			time.Sleep(baseForever)
		},
		// Prints something and waits.
		"base-say": func() {
			pad, _ := strconv.Atoi(os.Getenv(basePadEnv))
			fmt.Print(os.Getenv(baseSayEnv), strings.Repeat("x", pad), "\n")
			time.Sleep(baseForever)
		},
		"base-closed-stdout": func() {
			_ = os.Stdout.Close()
			time.Sleep(baseForever)
		},
		"base-exits": func() {
			fmt.Fprintln(os.Stderr, "cannot find my settings")
			os.Exit(7)
		},
		"base-panics": func() {
			fmt.Fprintln(os.Stderr, "all is well")
			panic("boom")
		},
		// Sends its stdin back. No plugin.
		"base-innocent": func() { _, _ = io.Copy(os.Stdout, os.Stdin) },
		"base-versions": func() {
			config := &ServeConfig{HandshakeConfig: testHandshake, VersionedPlugins: baseVersions(os.Getenv(baseVersionsEnv))}
			if v, err := strconv.Atoi(os.Getenv(baseLegacyEnv)); err == nil {
				config.ProtocolVersion, config.Plugins = uint(v), baseVersion(v)
			}
			Serve(config)
		},
		"base-tls": func() {
			Serve(&ServeConfig{
				HandshakeConfig: testHandshake, Plugins: basePlugins(&baseServer{}),
				TLSProvider: func() (*tls.Config, error) {
					text := os.Getenv(baseTLSEnv)
					cert, err := tls.X509KeyPair([]byte(text), []byte(text))
					return &tls.Config{Certificates: []tls.Certificate{cert}}, err
				},
			})
		},
		"base-no-plugins": func() { Serve(&ServeConfig{HandshakeConfig: testHandshake}) },
		"base-mux": func() {
			config := func(text string) *ServeConfig {
				return &ServeConfig{HandshakeConfig: testHandshake, Plugins: PluginSet{"which": testPlugin{server: serves(baseName(text))}}}
			}
			ServeMux(ServeMuxMap{"first": config("the first"), "second": config("the second")})
		},
		"base-first-host":  baseFirstHost,
		"base-second-host": baseSecondHost,
		"base-quiet-host":  baseQuietHost,
	})
}

// baseServer is what the plugin "base" serves.
type baseServer struct {
	environ []string // as the process began with
	stderr  *os.File // the process's own
	broker  *MuxBroker
}

func (s *baseServer) Echo(in []byte, out *[]byte) error {
	*out = in
	return nil
}

func (s *baseServer) Environ(_ struct{}, out *[]string) error {
	*out = s.environ
	return nil
}

func (s *baseServer) Goroutines(_ struct{}, n *int) error {
	*n = runtime.NumGoroutine()
	return nil
}

// WaitQuit returns when the plugin has been asked to quit.
func (s *baseServer) WaitQuit(ctx context.Context, _ struct{}, _ *struct{}) error {
	<-ctx.Done()
	return nil
}

// ReadStdin reads until size bytes are there.
func (s *baseServer) ReadStdin(size int, text *string) error {
	buf := make([]byte, size)
	_, err := io.ReadFull(os.Stdin, buf)
	*text = string(buf)
	return err
}

// BaseOutput is what Print prints, and where to.
type BaseOutput struct{ Stdout, Stderr, Raw []byte }

func (s *baseServer) Print(o BaseOutput, _ *struct{}) error {
	_, err1 := os.Stdout.Write(o.Stdout)
	_, err2 := os.Stderr.Write(o.Stderr)
	_, err3 := s.stderr.Write(o.Raw)
	return errors.Join(err1, err2, err3)
}

// Take reads a stream to its end and returns the number of its bytes.
func (s *baseServer) Take(id uint32, n *int64) error {
	conn, err := s.broker.Dial(id)
	if err != nil {
		return err
	}
	defer conn.Close()
	*n, err = io.Copy(io.Discard, conn)
	return err
}

// basePlugins are the test plugins, "base" among them, which on the host's
// side is an *rpc.Client, and some that fail in every way.
func basePlugins(s *baseServer) PluginSet {
	client := func(_ *MuxBroker, c *rpc.Client) (any, error) { return c, nil }
	server := serves(greeterServer{})
	set := testPlugins()
	set["base"] = testPlugin{func(b *MuxBroker) (any, error) {
		own := *s
		own.broker = b
		return &own, nil
	}, client}
	set["server error"] = testPlugin{func(*MuxBroker) (any, error) { return nil, errors.New("no database") }, client}
	set["server nil"] = testPlugin{serves(nil), client}
	set["server panic"] = testPlugin{func(*MuxBroker) (any, error) { panic("server boom") }, client}
	set["client error"] = testPlugin{server, func(*MuxBroker, *rpc.Client) (any, error) { return nil, errors.New("no licence") }}
	set["client nil"] = testPlugin{server, func(*MuxBroker, *rpc.Client) (any, error) { return nil, nil }}
	set["client panic"] = testPlugin{server, func(*MuxBroker, *rpc.Client) (any, error) { panic("client boom") }}
	return set
}

// baseConfig returns a configuration for a mode, with these variables.
func baseConfig(mode string, env ...string) *ClientConfig {
	cmd := exec.Command(os.Args[0])
	cmd.Env = append([]string{modeEnv + "=" + mode}, env...)
	return &ClientConfig{HandshakeConfig: testHandshake, Plugins: basePlugins(&baseServer{}), Cmd: cmd, Logger: hclog.NewNullLogger()}
}

// baseRecord is one record of a logger, and baseRecords all of them.
type baseRecord struct {
	name  string
	level hclog.Level
	msg   string
	args  []any
}

type baseRecords struct {
	mu  sync.Mutex // guards all
	all []baseRecord
}

func (r *baseRecords) Accept(name string, level hclog.Level, msg string, args ...any) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.all = append(r.all, baseRecord{name, level, msg, append([]any(nil), args...)})
}

func (r *baseRecords) get() []baseRecord {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.all)
}

// find returns the records whose message holds text.
func (r *baseRecords) find(text string) []baseRecord {
	return slices.DeleteFunc(r.get(), func(r baseRecord) bool { return !strings.Contains(r.msg, text) })
}

// baseLogger returns a logger and the records that it will have got.
func baseLogger() (hclog.Logger, *baseRecords) {
	r := new(baseRecords)
	l := hclog.NewInterceptLogger(&hclog.LoggerOptions{Output: io.Discard, Level: hclog.Trace})
	l.RegisterSink(r)
	return l, r
}

// baseBuffer is a buffer for one writer and any readers.
type baseBuffer struct {
	mu  sync.Mutex // guards buf
	buf bytes.Buffer
}

func (b *baseBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *baseBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}

// baseUntil waits until ok reports true.
func baseUntil(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(hangs); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("waited in vain: %s", what)
		}
	}
}

// baseReturns runs f and fails if it does not return.
func baseReturns(t testing.TB, what string, f func()) {
	t.Helper()
	done := make(chan struct{})
	go func() { defer close(done); f() }()
	if !waitFor(hangs, done) {
		t.Fatalf("%s hangs", what)
	}
}

// baseClean fails the test if it leaves a goroutine, child process, descriptor
// or file behind. Call it before anything else; the tests' own cleanups come
// before its check.
func baseClean(t testing.TB) {
	t.Helper()
	tmp := os.TempDir()
	goroutines, held := runtime.NumGoroutine(), baseHeld(tmp)
	t.Cleanup(func() {
		var left []string
		for end := time.Now().Add(5 * time.Second); ; time.Sleep(5 * time.Millisecond) {
			left = slices.DeleteFunc(baseHeld(tmp), func(s string) bool { return slices.Contains(held, s) })
			if n := runtime.NumGoroutine(); n > goroutines {
				buf := make([]byte, 1<<20)
				left = append(left, fmt.Sprintf("%d goroutines:\n%s", n-goroutines, buf[:runtime.Stack(buf, true)]))
			}
			if len(left) == 0 {
				return
			}
			if time.Now().After(end) {
				break
			}
		}
		t.Errorf("left behind:\n%s", strings.Join(left, "\n"))
	})
}

// baseHeld lists this process's children, zombies too, the processes in the
// same temporary directory, the files there and, where /proc tells, this
// process's descriptors.
func baseHeld(tmp string) (held []string) {
	entries, _ := os.ReadDir(tmp)
	for _, e := range entries {
		held = append(held, "file "+e.Name())
	}
	stats, _ := filepath.Glob("/proc/[0-9]*/stat")
	for _, name := range stats {
		stat, _ := os.ReadFile(name)
		_, after, _ := strings.Cut(string(stat), ") ")
		if f := strings.Fields(after); len(f) > 1 && f[1] == strconv.Itoa(os.Getpid()) {
			held = append(held, fmt.Sprintf("child %s (%s)", filepath.Base(filepath.Dir(name)), f[0]))
		}
	}
	for _, pid := range processesWith("TMPDIR=" + tmp) {
		held = append(held, fmt.Sprintf("process %d", pid))
	}
	fds, _ := filepath.Glob("/proc/self/fd/*")
	for _, fd := range fds {
		to, err := os.Readlink(fd)
		if err == nil && (strings.HasPrefix(to, "pipe:") || strings.HasPrefix(to, "socket:") || strings.HasPrefix(to, "/") && !strings.HasPrefix(to, "/dev/")) {
			held = append(held, "descriptor of "+to)
		}
	}
	return held
}

// baseShortDir makes a directory whose path leaves room for a socket's name,
// which that of t.TempDir may not.
func baseShortDir(t testing.TB) string {
	t.Helper()
	base := "/tmp"
	if runtime.GOOS == "windows" {
		base = ""
	}
	dir, err := os.MkdirTemp(base, "mux-*")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return dir
}

// baseCheckError checks that an error has these texts in it.
func baseCheckError(t testing.TB, err error, texts ...string) {
	t.Helper()
	if err == nil {
		t.Fatal("there is no error")
	}
	for _, text := range texts {
		if !strings.Contains(err.Error(), text) {
			t.Errorf("the error does not say %q:\n%v", text, err)
		}
	}
}

func baseEcho(t testing.TB, c *rpc.Client, text string) {
	t.Helper()
	var got []byte
	if err := c.Call("Plugin.Echo", []byte(text), &got); err != nil {
		t.Error(err)
	} else if string(got) != text {
		t.Errorf("the echo of %q is %q", text, got)
	}
}

// ---- The public API ----

// These are used by programs written for go-plugin, so they stay as they are.
var (
	_ func(*ClientConfig) *Client                                     = NewClient
	_ func()                                                          = CleanupClients
	_ func(*ServeConfig)                                              = Serve
	_ func(ServeMuxMap)                                               = ServeMux
	_ func(string, string) ([]string, error)                          = Discover
	_ func(error) *BasicError                                         = NewBasicError
	_ func(io.ReadWriteCloser, map[string]Plugin) (*RPCClient, error) = NewRPCClient
	_ func(*Client) (ClientProtocol, error)                           = (*Client).Client
	_ func(*Client) (net.Addr, error)                                 = (*Client).Start
	_ func(*Client)                                                   = (*Client).Kill
	_ func(*Client) bool                                              = (*Client).Exited
	_ func(*Client) string                                            = (*Client).ID
	_ func(*Client) Protocol                                          = (*Client).Protocol
	_ func(*Client) int                                               = (*Client).NegotiatedVersion
	_ func(*Client) *ReattachConfig                                   = (*Client).ReattachConfig
	_ func(*SecureConfig, string) (bool, error)                       = (*SecureConfig).Check
	_ func(*RPCClient, io.Writer, io.Writer) error                    = (*RPCClient).SyncStreams
	_ func(*RPCServer, net.Listener)                                  = (*RPCServer).Serve
	_ func(*RPCServer, io.ReadWriteCloser)                            = (*RPCServer).ServeConn
	_ func(*MuxBroker, uint32) (net.Conn, error)                      = (*MuxBroker).Accept
	_ func(*MuxBroker, uint32) (net.Conn, error)                      = (*MuxBroker).Dial
	_ func(*MuxBroker, uint32, interface{})                           = (*MuxBroker).AcceptAndServe
	_ func(*MuxBroker) uint32                                         = (*MuxBroker).NextId
	_ func(*MuxBroker) error                                          = (*MuxBroker).Close
	_ func(*MuxBroker)                                                = (*MuxBroker).Run

	_ ClientProtocol = (*RPCClient)(nil)
	_ ServerProtocol = (*RPCServer)(nil)
	_ error          = (*BasicError)(nil)

	_ = ServeTestConfig{Context: nil, ReattachConfigCh: nil, CloseCh: nil, SyncStdio: false}
	_ = ReattachConfig{Protocol: ProtocolInvalid, ProtocolVersion: 0, Addr: nil, Pid: 0, Test: false}
	_ = ClientConfig{
		HandshakeConfig: HandshakeConfig{ProtocolVersion: 1, MagicCookieKey: "", MagicCookieValue: ""},
		Plugins:         map[string]Plugin{}, VersionedPlugins: map[int]PluginSet{}, Cmd: nil, Reattach: nil,
		SecureConfig: nil, TLSConfig: nil, Managed: false, MinPort: 0, MaxPort: 0, StartTimeout: 0,
		Stderr: nil, SyncStdout: nil, SyncStderr: nil, AllowedProtocols: []Protocol{ProtocolNetRPC, ProtocolGRPC},
		Logger: nil, PluginLogBufferSize: 0, AutoMTLS: false, SkipHostEnv: false,
		UnixSocketConfig: &UnixSocketConfig{Group: "", TempDir: ""},
	}
)

// TestDispenseType checks that a wrong type is an error that says all.
func TestDispenseType(t *testing.T) {
	client, _ := TestPluginRPCConn(t, testPlugins(), nil)
	if g := dispense[Greeter](t, client, "greeter"); g.Greet() != "Hello!" {
		t.Error(g.Greet())
	}
	if g := dispense[*greeterClient](t, client, "greeter"); g.Greet() != "Hello!" {
		t.Error(g.Greet())
	}
	_, err := Dispense[io.Writer](client, "greeter")
	baseCheckError(t, err, `"greeter"`, "*plugin.greeterClient", "io.Writer")
	n, err := Dispense[int](client, "greeter")
	baseCheckError(t, err, `"greeter"`, "*plugin.greeterClient", "int")
	if n != 0 {
		t.Error("a value was returned beside the error:", n)
	}
	_, err = Dispense[Greeter](client, "missing")
	baseCheckError(t, err, `"missing"`)
}

// TestAccessors checks what a client tells before, while and after its plugin
// runs.
func TestAccessors(t *testing.T) {
	baseClean(t)
	c := NewClient(baseConfig("base"))
	if c.Exited() || c.ID() != "" || c.NegotiatedVersion() != 0 || c.ReattachConfig() != nil {
		t.Error("before Start:", c.Exited(), c.ID(), c.NegotiatedVersion(), c.ReattachConfig())
	}
	if p := c.Protocol(); p != ProtocolNetRPC { // this starts it
		t.Errorf("the protocol is %q", p)
	}
	addr, err := c.Start()
	if err != nil {
		t.Fatal(err)
	}
	again, err := c.Start()
	if err != nil || again != addr {
		t.Errorf("a second Start returned %v, %v, and the first %v", again, err, addr)
	}
	p, err := c.Client()
	if err != nil {
		t.Fatal(err)
	}
	if same, err := c.Client(); err != nil || same != p {
		t.Error("a second Client returned another connection:", err)
	}
	if pid, err := strconv.Atoi(c.ID()); err != nil || pid <= 0 || c.Exited() || c.NegotiatedVersion() != 3 {
		t.Error("while it runs:", c.Exited(), c.ID(), c.NegotiatedVersion())
	}
	rc := c.ReattachConfig()
	want := &ReattachConfig{Protocol: ProtocolNetRPC, ProtocolVersion: 3, Addr: addr}
	want.Pid, _ = strconv.Atoi(c.ID())
	if !reflect.DeepEqual(rc, want) {
		t.Errorf("the ReattachConfig is %+v, and should be %+v", rc, want)
	}
	if err := p.Ping(); err != nil {
		t.Error(err)
	}
	c.Kill()
	if !c.Exited() {
		t.Error("it has not exited after Kill")
	}
	if p.Ping() == nil {
		t.Error("Ping succeeds after Kill")
	}
	failed := NewClient(baseConfig("base-exits"))
	defer failed.Kill()
	if p := failed.Protocol(); p != ProtocolInvalid {
		t.Errorf("the protocol of what does not start is %q", p)
	}
}

// TestDiscover checks that only files are found that can be executed.
func TestDiscover(t *testing.T) {
	dir := t.TempDir()
	ext := ""
	if runtime.GOOS == "windows" {
		ext = ".exe"
	}
	for name, mode := range map[string]os.FileMode{
		"plugin-b" + ext: 0o755, "plugin-a" + ext: 0o700, "plugin-c.txt": 0o644, "other" + ext: 0o755,
	} {
		if err := os.WriteFile(filepath.Join(dir, name), nil, mode); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Mkdir(filepath.Join(dir, "plugin-dir"+ext), 0o755); err != nil {
		t.Fatal(err)
	}
	got, err := Discover("plugin-*", dir)
	want := []string{filepath.Join(dir, "plugin-a"+ext), filepath.Join(dir, "plugin-b"+ext)}
	if err != nil || !slices.Equal(got, want) {
		t.Errorf("found %v, %v; want %v", got, err, want)
	}
	t.Chdir(dir)
	got, err = Discover("plugin-*", ".")
	if err != nil || len(got) != 2 || !filepath.IsAbs(got[0]) {
		t.Errorf("found in %q: %v, %v", ".", got, err)
	}
	if got, err := Discover("*", filepath.Join(dir, "missing")); err != nil || len(got) != 0 {
		t.Errorf("found in a directory that is not there: %v, %v", got, err)
	}
	if _, err := Discover("[", dir); err == nil {
		t.Error("a malformed pattern is no error")
	}
	// A directory whose name looks like a pattern is taken as it is.
	odd := filepath.Join(dir, "[a]")
	if err := os.Mkdir(odd, 0o755); err != nil {
		t.Fatal(err)
	}
	want = []string{filepath.Join(odd, "x"+ext)}
	if err := os.WriteFile(want[0], nil, 0o755); err != nil {
		t.Fatal(err)
	}
	if got, err := Discover("x*", odd); err != nil || !slices.Equal(got, want) {
		t.Errorf("found %v, %v; want %v", got, err, want)
	}
}

// BaseReply is a reply with an error in it.
type BaseReply struct{ Err *BasicError }

type baseFailing struct{ err error }

func (f baseFailing) Check(_ int, reply *BaseReply) error {
	reply.Err = NewBasicError(f.err)
	return nil
}

// TestBasicError checks that an error in a reply arrives, and no error too.
func TestBasicError(t *testing.T) {
	if NewBasicError(nil) != nil {
		t.Error("the BasicError of nil is not nil")
	}
	for _, want := range []error{fs.ErrNotExist, nil} {
		client, server := TestRPCConn(t)
		if err := server.RegisterName("Plugin", baseFailing{want}); err != nil {
			t.Fatal(err)
		}
		var reply BaseReply
		if err := client.Call("Plugin.Check", 0, &reply); err != nil {
			t.Fatal(err)
		}
		switch {
		case want == nil && reply.Err != nil:
			t.Errorf("got %v for no error", reply.Err)
		case want != nil && (reply.Err == nil || reply.Err.Error() != want.Error()):
			t.Errorf("got %v, want %v", reply.Err, want)
		}
		_ = client.Close()
	}
}

// TestHelpers uses the test helpers with each of the types that tests have.
func TestHelpers(t *testing.T) {
	baseClean(t)
	conn := func(client, server net.Conn) {
		go func() { _, _ = client.Write([]byte("abc")) }()
		got := make([]byte, 3)
		if _, err := io.ReadFull(server, got); err != nil || string(got) != "abc" {
			t.Errorf("read %q, %v", got, err)
		}
	}
	call := func(c *rpc.Client, s *rpc.Server) {
		if err := s.RegisterName("Plugin", greeterServer{}); err != nil {
			t.Error(err)
		}
		if got := (&greeterClient{c}).Greet(); got != "Hello!" {
			t.Error(got)
		}
	}
	plugin := func(c *RPCClient, s *RPCServer) {
		if got := dispense[Greeter](t, c, "greeter").Greet(); got != "Hello!" || s == nil {
			t.Error(got, s)
		}
	}
	t.Run("T", func(t *testing.T) {
		conn(TestConn(t))
		call(TestRPCConn(t))
		plugin(TestPluginRPCConn(t, testPlugins(), nil))
	})
	t.Run("TB", func(t *testing.T) {
		var tb testing.TB = t
		conn(TestConn(tb))
		call(TestRPCConn(tb))
		plugin(TestPluginRPCConn(tb, testPlugins(), &TestOptions{}))
	})
	ran := false
	testing.Benchmark(func(b *testing.B) {
		ran = true
		conn(TestConn(b))
		call(TestRPCConn(b))
		plugin(TestPluginRPCConn(b, map[string]Plugin{"greeter": testPlugins()["greeter"]}, nil))
		b.SkipNow() // one run will do
	})
	if !ran {
		t.Error("the benchmark has not run")
	}
}

// TestHelperOutput checks that the options' readers are the plugin's output.
func TestHelperOutput(t *testing.T) {
	baseClean(t)
	outR, outW := io.Pipe()
	errR, errW := io.Pipe()
	defer outW.Close()
	defer errW.Close()
	client, _ := TestPluginRPCConn(t, testPlugins(), &TestOptions{ServerStdout: outR, ServerStderr: errR})
	var stdout, stderr baseBuffer
	if err := client.SyncStreams(&stdout, &stderr); err != nil {
		t.Fatal(err)
	}
	fmt.Fprint(outW, "to stdout")
	fmt.Fprint(errW, "to stderr")
	baseUntil(t, "output", func() bool { return stdout.String() == "to stdout" && stderr.String() == "to stderr" })
}

type baseName string

func (n baseName) Name(_ int, reply *string) error {
	*reply = string(n)
	return nil
}

// TestServeMux checks that the argument selects the plugin.
func TestServeMux(t *testing.T) {
	baseClean(t)
	client := func(_ *MuxBroker, c *rpc.Client) (any, error) { return c, nil }
	for arg, want := range map[string]string{"first": "the first", "second": "the second"} {
		cfg := baseConfig("base-mux")
		cfg.Plugins = PluginSet{"which": testPlugin{client: client}}
		cfg.Cmd.Args = append(cfg.Cmd.Args, arg)
		c, p := start(t, cfg)
		var got string
		if err := dispense[*rpc.Client](t, p, "which").Call("Plugin.Name", 0, &got); err != nil || got != want {
			t.Errorf("%s is %q, %v", arg, got, err)
		}
		c.Kill()
	}
	for _, args := range [][]string{nil, {"third"}, {"first", "second"}} {
		cmd := exec.Command(os.Args[0], args...)
		cmd.Env = append(os.Environ(), modeEnv+"=base-mux", testHandshake.MagicCookieKey+"="+testHandshake.MagicCookieValue)
		out, err := cmd.CombinedOutput()
		if code := cmd.ProcessState.ExitCode(); code != 1 {
			t.Errorf("with %q it exits with %d: %v", args, code, err)
		}
		if text := string(out); !strings.Contains(text, "first") || !strings.Contains(text, "second") {
			t.Errorf("with %q it says %q, and not which arguments there are", args, text)
		}
	}
}

// ---- The wire ----

// TestHandshakeLine is the table of what a plugin may say when it is ready.
func TestHandshakeLine(t *testing.T) {
	own, err := newCertificate()
	if err != nil {
		t.Fatal(err)
	}
	der := own.Certificate[0]
	cert := base64.RawStdEncoding.EncodeToString(der)
	junk := strings.Repeat("A", 80)
	for _, test := range []struct {
		line     string
		version  int
		addr     string
		protocol Protocol
		cert     []byte
		err      string
	}{
		{line: "1|3|unix|/tmp/plugin123|netrpc|", version: 3, addr: "unix /tmp/plugin123", protocol: "netrpc"},
		{line: "1|3|unix|/tmp/plugin123|netrpc", version: 3, addr: "unix /tmp/plugin123", protocol: "netrpc"},
		{line: "1|3|unix|/tmp/plugin123", version: 3, addr: "unix /tmp/plugin123", protocol: "netrpc"},
		{line: "1|3|unix|/tmp/plugin123|", version: 3, addr: "unix /tmp/plugin123", protocol: "netrpc"},
		{line: "1|3|unix|/tmp/plugin123|grpc|", version: 3, addr: "unix /tmp/plugin123", protocol: "grpc"},
		{line: "1|3|unix|/tmp/with a space|netrpc|", version: 3, addr: "unix /tmp/with a space", protocol: "netrpc"},
		{line: "1|0|tcp|127.0.0.1:10000|netrpc|", version: 0, addr: "tcp 127.0.0.1:10000", protocol: "netrpc"},
		{line: "1|1|tcp|[::1]:80|netrpc|", version: 1, addr: "tcp [::1]:80", protocol: "netrpc"},
		{line: "1|1|tcp|localhost:80|netrpc|", version: 1, addr: "tcp 127.0.0.1:80", protocol: "netrpc"},
		{line: "1|1|tcp|:1234|netrpc|\r\n", version: 1, addr: "tcp :1234", protocol: "netrpc"},
		{line: "1|3|unix|/s|netrpc|" + cert, version: 3, addr: "unix /s", protocol: "netrpc", cert: der},
		{line: "1|3|unix|/s|netrpc|" + cert + "|false|more", version: 3, addr: "unix /s", protocol: "netrpc", cert: der},
		{line: "1|3|unix|/s|netrpc||true", version: 3, addr: "unix /s", protocol: "netrpc"},
		{line: "1|3|unix|/s|netrpc|false", version: 3, addr: "unix /s", protocol: "netrpc"},

		{line: "2|3|unix|/s|netrpc|", err: `"2"`},
		{line: "01|3|unix|/s|netrpc|", err: "core protocol"},
		{line: "99999999999999999999|3|unix|/s", err: "core protocol"},
		{line: "2", err: "core protocol"},
		{line: "", err: "core protocol"},
		{line: "1", err: "1 fields"},
		{line: "1|3|unix", err: "3 fields"},
		{line: "1||unix|/s", err: "no number"},
		{line: "1|x|unix|/s", err: `"x"`},
		{line: "1|99999999999999999999|unix|/s", err: "no number"},
		{line: "1|3|udp|127.0.0.1:1", err: `"udp"`},
		{line: "1|3||/s", err: "network"},
		{line: "1|3|unix|", err: "empty"},
		{line: "1|3|tcp|", err: "address"},
		{line: "1|3|tcp|127.0.0.1", err: "address"},
		{line: "1|3|tcp|127.0.0.1:http", err: "port"},
		{line: "1|3|tcp|127.0.0.1:65536", err: "port"},
		{line: "1|3|tcp|127.0.0.1:-1", err: "port"},
		{line: "1|3|tcp|example.com:80", err: "no IP address"},
		{line: "1|3|unix|/s|netrpc|" + junk, err: "certificate"},
		{line: "1|3|unix|/s|netrpc|" + strings.Repeat("*", 80), err: "certificate"},
		{line: "1|3|unix|/s|netrpc|" + cert[:len(cert)-20], err: "certificate"},
	} {
		h, err := parseHandshake(test.line)
		if test.err != "" {
			if err == nil || !strings.Contains(err.Error(), test.err) {
				t.Errorf("%.60q: the error is %v, and should say %q", test.line, err, test.err)
			}
			continue
		}
		if err != nil {
			t.Errorf("%.60q: %v", test.line, err)
			continue
		}
		addr := h.addr.Network() + " " + h.addr.String()
		if h.version != test.version || addr != test.addr || h.protocol != test.protocol || !bytes.Equal(h.cert, test.cert) {
			t.Errorf("%.60q is read as %d, %s, %s and %d bytes", test.line, h.version, addr, h.protocol, len(h.cert))
		}
	}
}

// TestHandshakeIsWritten checks the line against the protocol's own words.
func TestHandshakeIsWritten(t *testing.T) {
	h := handshake{version: 3, addr: &net.UnixAddr{Name: "/tmp/plugin123", Net: "unix"}, protocol: ProtocolNetRPC}
	if got := h.String(); got != "1|3|unix|/tmp/plugin123|netrpc|" {
		t.Error(got)
	}
	h.addr, h.cert = &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 99}, []byte{0xfb, 0xff, 1, 2}
	if got := h.String(); got != "1|3|tcp|127.0.0.1:99|netrpc|+/8BAg" {
		t.Error(got)
	}
}

// TestHandshakeLineIsFound checks which lines of stdout are meant as one.
func TestHandshakeLineIsFound(t *testing.T) {
	for line, want := range map[string]bool{
		"1|3|unix|/s": true, "2|": true, "123|x": true,
		"": false, "1": false, "|": false, "a|1": false, " 1|3|unix|/s": false, "-1|": false, "1 |": false, "loading 1|3|": false,
	} {
		if got := isHandshake([]byte(line)); got != want {
			t.Errorf("%q: %v", line, got)
		}
	}
}

// FuzzHandshake checks that no line does any harm, and that what is read from
// one is what writing it again gives.
func FuzzHandshake(f *testing.F) {
	own, err := newCertificate()
	if err != nil {
		f.Fatal(err)
	}
	for _, line := range []string{
		"1|3|unix|/tmp/plugin123|netrpc|", "1|1|tcp|[fe80::1%eth0]:80|", "1|1|tcp|localhost:1|grpc|AAAA|true", "2|", "1|||", "1|-1|unix| | |",
		handshake{1, &net.UnixAddr{Name: "x", Net: "unix"}, "netrpc", own.Certificate[0]}.String(),
	} {
		f.Add(line)
	}
	f.Fuzz(func(t *testing.T, line string) {
		h, err := parseHandshake(line)
		if err != nil {
			return
		}
		again, err := parseHandshake(h.String())
		if err != nil {
			t.Fatalf("%q is read, and %q, which is the same, is not: %v", line, h, err)
		}
		if again.version != h.version || again.protocol != h.protocol || !bytes.Equal(again.cert, h.cert) ||
			again.addr.Network() != h.addr.Network() || again.addr.String() != h.addr.String() {
			t.Fatalf("%q is read as %q and that as %q", line, h, again)
		}
	})
}

// TestNegotiate is the table of who serves which version.
func TestNegotiate(t *testing.T) {
	for _, test := range []struct{ own, host, want string }{
		{"1,2,3", "1,2,3", "3"},
		{"1,2,3", "3,2,1", "3"},
		{"1,2,3", "2,4", "2"},
		{"1,2,10", "10,9,2", "10"},
		{"1,2,3", "4", "1"},
		{"2,3", "", "2"},
		{"0", "0", "0"},
		{"1,12", "1,2", "1"},
		{"2,3", "x,,3y,2", "2"},
	} {
		if got := negotiate(baseVersions(test.own), test.host); strconv.Itoa(got) != test.want {
			t.Errorf("with %s, for a host with %s, %d is chosen and not %s", test.own, test.host, got, test.want)
		}
	}
}

// baseVersion is the plugins of one version. What is dispensed tells both
// sides' version.
func baseVersion(v int) PluginSet {
	return PluginSet{"version": testPlugin{
		serves(baseName(strconv.Itoa(v))),
		func(_ *MuxBroker, c *rpc.Client) (any, error) {
			var theirs string
			err := c.Call("Plugin.Name", 0, &theirs)
			return fmt.Sprintf("host %d plugin %s", v, theirs), err
		},
	}}
}

func baseVersions(list string) map[int]PluginSet {
	sets := make(map[int]PluginSet)
	for _, text := range strings.Split(list, ",") {
		if v, err := strconv.Atoi(text); err == nil {
			sets[v] = baseVersion(v)
		}
	}
	return sets
}

// TestVersions lets hosts and plugins with different versions meet.
func TestVersions(t *testing.T) {
	for _, test := range []struct {
		host, hostLegacy, plugin, pluginLegacy string
		want                                   int // -1 if they do not meet
		offered                                int // what the plugin says then
	}{
		{host: "1,2,3", plugin: "2,3,4", want: 3},
		{host: "2", plugin: "1,2,3", want: 2},
		{host: "1,2,3", plugin: "2", want: 2},
		{host: "1,2", hostLegacy: "5", plugin: "5,6", want: 5},
		{host: "4,5", plugin: "6", pluginLegacy: "4", want: 4},
		{hostLegacy: "7", pluginLegacy: "7", want: 7},
		{hostLegacy: "0", pluginLegacy: "0", want: 0},
		{host: "1,2", hostLegacy: "2", plugin: "2", pluginLegacy: "1", want: 2},
		{host: "1,2", plugin: "3,4", want: -1, offered: 3},
		{hostLegacy: "1", pluginLegacy: "2", want: -1, offered: 2},
		{host: "11,12", hostLegacy: "13", plugin: "14", pluginLegacy: "9", want: -1, offered: 9},
	} {
		name := fmt.Sprintf("%s+%s to %s+%s", test.host, test.hostLegacy, test.plugin, test.pluginLegacy)
		t.Run(name, func(t *testing.T) {
			baseClean(t)
			cfg := baseConfig("base-versions", baseVersionsEnv+"="+test.plugin, baseLegacyEnv+"="+test.pluginLegacy)
			cfg.Plugins, cfg.VersionedPlugins = nil, baseVersions(test.host)
			if v, err := strconv.Atoi(test.hostLegacy); err == nil {
				cfg.ProtocolVersion, cfg.Plugins = uint(v), baseVersion(v)
			}
			c := NewClient(cfg)
			t.Cleanup(c.Kill)
			p, err := c.Client()
			if test.want < 0 {
				var versions *VersionError
				if !errors.As(err, &versions) {
					t.Fatalf("the error is %v", err)
				}
				baseCheckError(t, err, fmt.Sprintf("version %d ", test.offered))
				for _, v := range strings.FieldsFunc(test.host+","+test.hostLegacy, func(r rune) bool { return r == ',' }) {
					baseCheckError(t, err, v)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if got := c.NegotiatedVersion(); got != test.want {
				t.Errorf("%d was negotiated", got)
			}
			want := fmt.Sprintf("host %d plugin %[1]d", test.want)
			if got := dispense[string](t, p, "version"); got != want {
				t.Errorf("served were %s", got)
			}
		})
	}
}

// TestCookie checks what a plugin tells a person who runs it.
func TestCookie(t *testing.T) {
	for _, env := range []string{"OTHER=x", testHandshake.MagicCookieKey + "=", testHandshake.MagicCookieKey + "=wrong"} {
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), modeEnv+"=base", env)
		var stdout, stderr bytes.Buffer
		cmd.Stdout, cmd.Stderr = &stdout, &stderr
		err := cmd.Run()
		if code := cmd.ProcessState.ExitCode(); code != 1 {
			t.Errorf("%s: it exits with %d: %v", env, code, err)
		}
		if text := stderr.String(); !strings.Contains(text, "this program is a plugin") || !strings.Contains(text, "host") {
			t.Errorf("%s: it says %q", env, text)
		}
		if stdout.Len() > 0 {
			t.Errorf("%s: on stdout it says %q", env, &stdout)
		}
	}
	baseClean(t)
	cfg := baseConfig("base")
	cfg.MagicCookieValue = "wrong"
	c := NewClient(cfg)
	defer c.Kill()
	_, err := c.Start()
	baseCheckError(t, err, "cookie "+testHandshake.MagicCookieKey, "exit status 1")
}

// TestWireOfHost plays a plugin with yamux and net/rpc alone, so that what the
// host does on the wire is seen and not what our other half makes of it.
func TestWireOfHost(t *testing.T) {
	baseClean(t)
	ours, theirs := TestConn(t)
	plugin, err := yamux.Server(theirs, baseYamux())
	if err != nil {
		t.Fatal(err)
	}
	defer plugin.Close()
	host, err := NewRPCClient(ours, basePlugins(&baseServer{}))
	if err != nil {
		t.Fatal(err)
	}
	defer host.session.close()
	var stdout, stderr baseBuffer
	if err := host.SyncStreams(&stdout, &stderr); err != nil {
		t.Fatal(err)
	}
	var streams [3]*yamux.Stream
	for i := range streams {
		if streams[i], err = plugin.AcceptStream(); err != nil {
			t.Fatal(err)
		}
	}
	server := rpc.NewServer()
	const id = 0x01020304
	if err := errors.Join(server.RegisterName("Control", basePing{}), server.RegisterName("Dispenser", baseDispenser(id))); err != nil {
		t.Fatal(err)
	}
	go server.ServeConn(streams[0])
	if err := host.Ping(); err != nil {
		t.Error("the first stream is not control:", err)
	}
	fmt.Fprint(streams[1], "to stdout")
	fmt.Fprint(streams[2], "to stderr")
	baseUntil(t, "output", func() bool { return stdout.String() == "to stdout" && stderr.String() == "to stderr" })

	served := make(chan error, 1)
	go func() {
		st, err := plugin.AcceptStream()
		if err != nil {
			served <- err
			return
		}
		var head [4]byte
		if _, err := io.ReadFull(st, head[:]); err != nil || head != [4]byte{4, 3, 2, 1} {
			served <- fmt.Errorf("the stream was dialled with %v, %v", head, err)
			return
		}
		_, _ = st.Write(head[:])
		instance := rpc.NewServer()
		served <- instance.RegisterName("Plugin", greeterServer{})
		instance.ServeConn(st)
	}()
	if got := dispense[Greeter](t, host, "greeter").Greet(); got != "Hello!" {
		t.Error(got)
	}
	if err := <-served; err != nil {
		t.Error(err)
	}
}

// TestWireOfPlugin plays the host in the same way.
func TestWireOfPlugin(t *testing.T) {
	baseClean(t)
	ours, theirs := TestConn(t)
	quit := make(chan struct{})
	stdout, stderr := io.MultiReader(strings.NewReader("to stdout")), io.MultiReader(strings.NewReader("to stderr"))
	server := &RPCServer{Plugins: testPlugins(), Stdout: stdout, Stderr: stderr, DoneCh: quit}
	served := make(chan struct{})
	go func() { defer close(served); server.ServeConn(ours) }()
	host, err := yamux.Client(theirs, baseYamux())
	if err != nil {
		t.Fatal(err)
	}
	open := func() *yamux.Stream {
		st, err := host.OpenStream()
		if err != nil {
			t.Fatal(err)
		}
		return st
	}
	control := rpc.NewClient(open())
	outputs := make(map[string]*yamux.Stream)
	for _, want := range []string{"to stdout", "to stderr"} {
		st := open()
		outputs[want] = st
		got := make([]byte, len(want))
		if _, err := io.ReadFull(st, got); err != nil || string(got) != want {
			t.Errorf("got %q, %v, and not %q", got, err, want)
		}
	}
	if err := control.Call("Control.Ping", true, &struct{}{}); err != nil {
		t.Error(err)
	}
	var id uint32
	if err := control.Call("Dispenser.Dispense", "greeter", &id); err != nil {
		t.Fatal(err)
	}
	st := open()
	sent := binary.LittleEndian.AppendUint32(nil, id)
	if _, err := st.Write(sent); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, 4)
	if _, err := io.ReadFull(st, got); err != nil || !bytes.Equal(got, sent) {
		t.Errorf("%v was answered with %v, %v", sent, got, err)
	}
	greeter := rpc.NewClient(st)
	if got := (&greeterClient{greeter}).Greet(); got != "Hello!" {
		t.Error(got)
	}
	if err := control.Call("Control.Quit", true, &struct{}{}); err != nil {
		t.Error(err)
	}
	// What was left of the output has been sent before Quit was answered.
	for name, st := range outputs {
		_ = st.SetReadDeadline(time.Now().Add(hangs))
		if n, err := st.Read(make([]byte, 1)); err != io.EOF {
			t.Errorf("after Quit, what goes %s has %d bytes more, %v", name, n, err)
		}
	}
	if !waitFor(hangs, quit) {
		t.Error("DoneCh is not closed after Quit")
	}
	_ = greeter.Close()
	_ = control.Close()
	_ = host.Close()
	if !waitFor(hangs, served) {
		t.Error("ServeConn goes on after the end of its connection")
	}
}

func baseYamux() *yamux.Config {
	config := yamux.DefaultConfig()
	config.LogOutput = io.Discard
	return config
}

type basePing struct{}

func (basePing) Ping(bool, *struct{}) error { return nil }

type baseDispenser uint32

func (d baseDispenser) Dispense(_ string, id *uint32) error {
	*id = uint32(d)
	return nil
}

// TestRPCServer serves plugins without Serve, over a listener of the test's.
func TestRPCServer(t *testing.T) {
	baseClean(t)
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	server := &RPCServer{Plugins: testPlugins(), DoneCh: done}
	if err := server.Init(); err != nil || server.Config() != "" {
		t.Error(err, server.Config())
	}
	go server.Serve(lis)
	for range 2 { // one after the other, and each on its own connection
		conn, err := net.Dial("tcp", lis.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		client, err := NewRPCClient(conn, testPlugins())
		if err != nil {
			t.Fatal(err)
		}
		if got := dispense[Greeter](t, client, "greeter").Greet(); got != "Hello!" {
			t.Error(got)
		}
		if err := client.Close(); err != nil {
			t.Error(err)
		}
		if err := client.Close(); err != nil {
			t.Error("the second Close:", err)
		}
	}
	_ = lis.Close()
	if !waitFor(hangs, done) {
		t.Error("DoneCh is not closed")
	}
}

// ---- Logs ----

// baseLine runs lines through what reads a plugin's stderr, and returns the
// records that come of it.
func baseLine(max int, output string) []baseRecord {
	logger, records := baseLogger()
	l := &stderrLog{logger: logger}
	w := &lineWriter{max: max, emit: l.line}
	_, _ = io.WriteString(w, output)
	_ = w.Close()
	return records.get()
}

// baseLogLines is the table of what a plugin may write to its stderr.
var baseLogLines = []struct {
	name, line string
	level      hclog.Level
	msg        string
	args       []any
}{
	{"hclog", `{"@level":"info","@message":"hello","@module":"m","@timestamp":"2024-05-06T07:08:09.123456Z","zebra":1,"apple":"two","mango":true}`,
		hclog.Info, "hello", []any{"@module", "m", "zebra", json.Number("1"), "apple", "two", "mango", true, "timestamp", "2024-05-06T07:08:09.123Z"}},
	{"hclog at the other levels", `{"@level":"trace","@message":"t"}`, hclog.Trace, "t", nil},
	{"hclog debug", `{"@level":"debug","@message":"d"}`, hclog.Debug, "d", nil},
	{"hclog warn", `{"@message":"w","@level":"warn"}`, hclog.Warn, "w", nil},
	{"hclog error", `{"@level":"error","@message":"e","error":"no such file"}`, hclog.Error, "e", []any{"error", "no such file"}},
	{"hclog with a large number", `{"@level":"info","@message":"n","id":12345678901234567890}`, hclog.Info, "n", []any{"id", json.Number("12345678901234567890")}},
	{"hclog with nested values", `{"@level":"info","@message":"n","list":["a",1],"null":null}`, hclog.Info, "n", []any{"list", []any{"a", json.Number("1")}, "null", nil}},
	{"slog", `{"time":"2024-05-06T07:08:09.123456789+02:00","level":"WARN","msg":"careful","z":"1","a":"2"}`,
		hclog.Warn, "careful", []any{"z", "1", "a", "2", "timestamp", "2024-05-06T07:08:09.123+0200"}},
	{"slog debug", `{"level":"DEBUG","msg":"d"}`, hclog.Debug, "d", nil},
	{"slog info", `{"level":"INFO","msg":"i"}`, hclog.Info, "i", nil},
	{"slog error", `{"level":"ERROR","msg":"e"}`, hclog.Error, "e", nil},
	{"slog below debug", `{"level":"DEBUG-4","msg":"t"}`, hclog.Trace, "t", nil},
	{"slog between two", `{"level":"INFO+2","msg":"i"}`, hclog.Info, "i", nil},
	{"slog just below info", `{"level":"INFO-1","msg":"i"}`, hclog.Debug, "i", nil},
	{"slog above error", `{"level":"ERROR+8","msg":"e"}`, hclog.Error, "e", nil},

	{"trace", "[TRACE] t", hclog.Trace, "[TRACE] t", nil},
	{"debug", "[DEBUG] d", hclog.Debug, "[DEBUG] d", nil},
	{"info", "[INFO] i", hclog.Info, "[INFO] i", nil},
	{"warn", "[WARN] w", hclog.Warn, "[WARN] w", nil},
	{"error", "[ERROR] e", hclog.Error, "[ERROR] e", nil},
	{"no space behind it", "[INFO]i", hclog.Info, "[INFO]i", nil},
	{"behind a date and time", "2024/05/06 07:08:09 [WARN] w", hclog.Warn, "2024/05/06 07:08:09 [WARN] w", nil},
	{"behind microseconds", "2024/05/06 07:08:09.123456 [ERROR] e", hclog.Error, "2024/05/06 07:08:09.123456 [ERROR] e", nil},
	{"behind a time", "07:08:09 [INFO] i", hclog.Info, "07:08:09 [INFO] i", nil},
	{"behind a date", "2024/05/06 [INFO] i", hclog.Info, "2024/05/06 [INFO] i", nil},
	{"in the middle", "a line with [ERROR] in it", hclog.Debug, "a line with [ERROR] in it", nil},
	{"in lower case", "[error] e", hclog.Debug, "[error] e", nil},
	{"an unknown level", "[FATAL] f", hclog.Debug, "[FATAL] f", nil},
	{"plain text", "hello", hclog.Debug, "hello", nil},
	{"a tab", "a\tb", hclog.Debug, "a\tb", nil},
	{"a carriage return at the end", "hello\r", hclog.Debug, "hello", nil},
	{"other letters", "größer 日本", hclog.Debug, "größer 日本", nil},
	{"an empty line", "", hclog.Debug, "", nil},

	{"a message that is a number", `{"@message":1}`, hclog.Debug, `{"@message":1}`, nil},
	{"a level that is a number", `{"@level":3,"@message":"x"}`, hclog.Debug, `{"@level":3,"@message":"x"}`, nil},
	{"no level", `{"@message":"x"}`, hclog.Debug, `{"@message":"x"}`, nil},
	{"no message", `{"@level":"info"}`, hclog.Debug, `{"@level":"info"}`, nil},
	{"a level that is off", `{"@level":"off","@message":"x"}`, hclog.Debug, `{"@level":"off","@message":"x"}`, nil},
	{"null", "null", hclog.Debug, "null", nil},
	{"an empty list", "[]", hclog.Debug, "[]", nil},
	{"an empty object", "{}", hclog.Debug, "{}", nil},
	{"a bracket", "{", hclog.Debug, "{", nil},
	{"half a record", `{"@level":"info","@message":"x"`, hclog.Debug, `{"@level":"info","@message":"x"`, nil},
	{"a record and more", `{"@level":"info","@message":"x"} y`, hclog.Debug, `{"@level":"info","@message":"x"} y`, nil},
	{"two records", `{"@level":"info","@message":"x"}{}`, hclog.Debug, `{"@level":"info","@message":"x"}{}`, nil},
	{"JSON of something else", `{"a":1,"b":[2]}`, hclog.Debug, `{"a":1,"b":[2]}`, nil},
	{"deep JSON", strings.Repeat("[", 20000), hclog.Debug, strings.Repeat("[", 20000), nil},
	{"deep JSON in a record", `{"a":` + strings.Repeat("[", 20000), hclog.Debug, `{"a":` + strings.Repeat("[", 20000), nil},
	{"NULs", "a\x00b", hclog.Debug, `a\x00b`, nil},
	{"invalid UTF-8", "a\xff\xfeb", hclog.Debug, `a\xff\xfeb`, nil},
	{"a terminal's escapes", "\x1b[31mred", hclog.Debug, `\x1b[31mred`, nil},
	{"a carriage return inside", "hidden\rshown", hclog.Debug, `hidden\rshown`, nil},
	{"escapes in a record", `{"@level":"info","@message":"\u001b[2J","a\u0007":"b"}`, hclog.Info, `\x1b[2J`, []any{`a\a`, "b"}},
	{"a time that is none", `{"@level":"info","@message":"x","@timestamp":"noon"}`, hclog.Info, "x", []any{"timestamp", "noon"}},
}

// TestLogLine checks each line of the table alone.
func TestLogLine(t *testing.T) {
	for _, test := range baseLogLines {
		got := baseLine(defaultLogBufferSize, test.line+"\n")
		want := []baseRecord{{"", test.level, test.msg, test.args}}
		if !reflect.DeepEqual(got, want) {
			t.Errorf("%s: got %.300q and want %.300q", test.name, fmt.Sprint(got), fmt.Sprint(want))
		}
	}
}

// TestLongLogLine checks that a line is one record up to the limit, and that
// a longer one is cut and nothing of it gets another level.
func TestLongLogLine(t *testing.T) {
	record := func(size int) string {
		return `{"@level":"error","@message":"` + strings.Repeat("x", size) + `"}`
	}
	const max = 1000
	fits := record(max - len(record(0)))
	for _, test := range []struct {
		output string
		want   []string // level and message
	}{
		{strings.Repeat("x", max) + "\n", []string{"debug " + strings.Repeat("x", max)}},
		{strings.Repeat("x", max+1) + "\ny\n", []string{"debug " + strings.Repeat("x", max) + " [1 more bytes]", "debug y"}},
		{"[WARN] " + strings.Repeat("x", 5*max) + "\n", []string{"warn [WARN] " + strings.Repeat("x", max-7) + " [4007 more bytes]"}},
		// Whatever stands behind the cut is never at the beginning of a line.
		{strings.Repeat("x", max) + "[ERROR] e" + strings.Repeat("x", max) + "\n", []string{"debug " + strings.Repeat("x", max) + " [1009 more bytes]"}},
		{fits + "\n", []string{"error " + strings.Repeat("x", max-len(record(0)))}},
		// What is left of a line is no record, even if it looks like one.
		{fits + "junk\n", []string{"debug " + fits + " [4 more bytes]"}},
		{record(max) + "\n", []string{"debug " + record(max)[:max] + fmt.Sprintf(" [%d more bytes]", len(record(max))-max)}},
		{"without an end", []string{"debug without an end"}},
		{"a\n\nb", []string{"debug a", "debug ", "debug b"}},
		{"", nil},
	} {
		var got []string
		for _, r := range baseLine(max, test.output) {
			got = append(got, r.level.String()+" "+r.msg)
		}
		if !slices.Equal(got, test.want) {
			t.Errorf("%.40q: got %q, want %q", test.output, got, test.want)
		}
	}
}

// TestLogTail checks that the end of stderr is kept, in whole lines.
func TestLogTail(t *testing.T) {
	var l tail
	fmt.Fprintln(&l, "short")
	if got := l.String(); got != "short\n" {
		t.Errorf("kept is %q", got)
	}
	for i := range 10000 {
		fmt.Fprintln(&l, "line", i)
	}
	got := l.String()
	if !strings.HasSuffix(got, "line 9998\nline 9999\n") || !strings.HasPrefix(got, "line ") || len(got) > tailSize || len(got) < tailSize-20 {
		t.Errorf("kept are %d bytes, from %.20q", len(got), got)
	}
	fmt.Fprint(&l, strings.Repeat("x", 10*tailSize))
	if got := l.String(); got != strings.Repeat("x", tailSize) {
		t.Errorf("kept are %d bytes, from %.20q", len(got), got)
	}
}

// TestLogOfPanics checks that a panic's and a fatal error's lines are errors,
// and the lines around them not.
func TestLogOfPanics(t *testing.T) {
	const trace = `goroutine 1 [running]:
main.run(0x1, {0xc000012345, 0x2})
	/src/main.go:12 +0x1d
main.main()
	/src/main.go:5 +0x18
created by main.start in goroutine 7
	/src/main.go:20 +0x4c

goroutine 18 [chan receive, 2 minutes]:
main.wait(...)
	/src/main.go:30
exit status 2
`
	for _, crash := range []string{
		"panic: boom\n\n" + trace,
		"panic: boom [recovered]\n\tpanic: boom again\n\n" + trace,
		"panic: two\nlines\n\n" + trace,
		"fatal error: all goroutines are asleep - deadlock!\n\n" + trace,
		"panic: runtime error: invalid memory address or nil pointer dereference\n[signal SIGSEGV: segmentation violation code=0x1 addr=0x0 pc=0x1]\n\n" + trace,
		"fatal error: unexpected signal\n\nruntime.throw({0x1?, 0x2?})\n\t/go/panic.go:1 +0x1\n\n" + trace + "\nrax    0x0\nrip    0x4b2d21\n",
	} {
		records := baseLine(defaultLogBufferSize, "before\n"+crash+"after all\n")
		want := strings.Split("before\n"+crash+"after all", "\n")
		if len(records) != len(want) {
			t.Fatalf("%d lines make %d records", len(want), len(records))
		}
		for i, r := range records {
			level := hclog.Error
			if i == 0 || i == len(want)-1 {
				level = hclog.Debug
			}
			if r.level != level || r.msg != want[i] {
				t.Errorf("%q is logged at %v as %q", want[i], r.level, r.msg)
			}
		}
	}
	// An ordinary panic's text in the middle of a line is nothing.
	for _, r := range baseLine(defaultLogBufferSize, "recovered panic: boom\ngoroutine 1 [running]:\n") {
		if r.level != hclog.Debug {
			t.Errorf("%q is logged at %v", r.msg, r.level)
		}
	}
}

// TestLogOfBadLogger checks that a host's logger that panics costs a line and
// not the host.
func TestLogOfBadLogger(t *testing.T) {
	var got []string
	w := &lineWriter{max: 100, emit: func(line []byte, _ int) {
		if string(line) == "bad" {
			panic("cannot log this")
		}
		got = append(got, string(line))
	}}
	fmt.Fprint(w, "a\nbad\nb\n")
	if !slices.Equal(got, []string{"a", "b"}) {
		t.Errorf("got %q", got)
	}
}

// FuzzLogLine checks that whatever a plugin writes makes as many records as it
// has lines, each at a level that exists, and puts nothing into the host's own
// log that a terminal obeys. (A message in JSON may have several lines.)
func FuzzLogLine(f *testing.F) {
	for _, test := range baseLogLines {
		if len(test.line) < 1000 {
			f.Add([]byte(test.line))
		}
	}
	f.Add([]byte("panic: boom\n\ngoroutine 1 [running]:\nmain.main()\n\t/x.go:1\nafter"))
	f.Add([]byte(`{"@level":"info","@message":"x","a":{"b":"\u001b[31m"},"c":["\u001b[31m\n"]}`))
	f.Fuzz(func(t *testing.T, output []byte) {
		const max = 200
		var text bytes.Buffer
		records := new(baseRecords)
		logger := hclog.NewInterceptLogger(&hclog.LoggerOptions{Output: &text, Level: hclog.Trace})
		logger.RegisterSink(records)
		l := &stderrLog{logger: logger}
		w := &lineWriter{max: max, emit: l.line}
		half := len(output) / 2 // however it is cut up on its way
		_, _ = w.Write(output[:half])
		_, _ = w.Write(output[half:])
		_ = w.Close()
		lines := bytes.Count(output, []byte("\n"))
		if len(output) > 0 && !bytes.HasSuffix(output, []byte("\n")) {
			lines++
		}
		if got := records.get(); len(got) != lines {
			t.Fatalf("%d lines make %d records", lines, len(got))
		}
		for _, r := range records.get() {
			if r.level < hclog.Trace || r.level > hclog.Error || len(r.args)%2 != 0 {
				t.Fatalf("a record at %v with %d arguments", r.level, len(r.args))
			}
			if len(r.msg) > 4*max+40 {
				t.Fatalf("a message of %d bytes", len(r.msg))
			}
		}
		for _, c := range text.Bytes() {
			if c < ' ' && c != '\n' && c != '\t' || c == 0x7f {
				t.Fatalf("the log has %q in it:\n%q", c, &text)
			}
		}
	})
}

// TestLogOfPlugin checks all of that once more over a process: what it writes
// to its stderr comes out of the logger, and byte for byte of Stderr.
func TestLogOfPlugin(t *testing.T) {
	baseClean(t)
	var raw baseBuffer
	cfg := baseConfig("base")
	logger, records := baseLogger()
	cfg.Logger, cfg.Stderr = logger, &raw
	c, p := start(t, cfg)
	var text strings.Builder
	for _, test := range baseLogLines {
		fmt.Fprintln(&text, test.line)
	}
	text.WriteString("end of the table\n")
	client := dispense[*rpc.Client](t, p, "base")
	if err := client.Call("Plugin.Print", BaseOutput{Raw: []byte(text.String())}, &struct{}{}); err != nil {
		t.Fatal(err)
	}
	c.Kill()
	name := pluginName(os.Args[0])
	// The process's own stdout is logged, too, and in no order with its stderr.
	got := slices.DeleteFunc(records.get(), func(r baseRecord) bool { return r.msg == "tail on stdout" })
	first := slices.IndexFunc(got, func(r baseRecord) bool { return r.msg == baseLogLines[0].msg })
	if first < 0 || len(got) < first+len(baseLogLines) {
		t.Fatalf("there are %d records, and the table begins at %d", len(got), first)
	}
	for i, test := range baseLogLines {
		r, want := got[first+i], baseRecord{name, test.level, test.msg, test.args}
		if !reflect.DeepEqual(r, want) {
			t.Errorf("%s: got %.300q and want %.300q", test.name, fmt.Sprint(r), fmt.Sprint(want))
		}
	}
	if want := text.String() + "[INFO] tail on stderr\n"; raw.String() != want {
		t.Errorf("Stderr got %d bytes and not the %d that were written", len(raw.String()), len(want))
	}
}

// TestLogWithoutEnd writes 10 MB without the end of a line, which neither
// stops the plugin nor fills the host's memory, and lines beyond the limits.
func TestLogWithoutEnd(t *testing.T) {
	baseClean(t)
	for _, limit := range []int{0, 1000} {
		hash := sha256.New()
		cfg := baseConfig("base")
		logger, records := baseLogger()
		cfg.Logger, cfg.Stderr, cfg.PluginLogBufferSize = logger, hash, limit
		c, p := start(t, cfg)
		const size = 10 << 20
		junk := bytes.Repeat([]byte("0123456789abcdef"), size/16)
		client := dispense[*rpc.Client](t, p, "base")
		if err := client.Call("Plugin.Print", BaseOutput{Raw: junk}, &struct{}{}); err != nil {
			t.Fatal(err)
		}
		c.Kill()
		max := cmp.Or(limit, 64<<10)
		// The plugin's last words stand behind it on the same line.
		tail := "[INFO] tail on stderr"
		want := fmt.Sprintf("%s [%d more bytes]", junk[:max], size-max+len(tail))
		long := records.find("0123456789abcdef")
		if len(long) != 1 || long[0].msg != want || long[0].level != hclog.Debug {
			t.Errorf("it made %d records", len(long))
		}
		all := sha256.Sum256(append(junk, (tail + "\n")...))
		if !bytes.Equal(hash.Sum(nil), all[:]) {
			t.Error("Stderr has not got every byte")
		}
	}
}

// baseBadWriter is a host's writer that fails after a while.
type baseBadWriter struct{ left int }

func (w *baseBadWriter) Write(p []byte) (int, error) {
	if w.left -= len(p); w.left < 0 {
		panic("disk full")
	}
	return len(p), nil
}

// TestBadWriters checks that the host's own writers, when they fail, stop
// neither the plugin nor its log.
func TestBadWriters(t *testing.T) {
	baseClean(t)
	cfg := baseConfig("base")
	logger, records := baseLogger()
	cfg.Logger = logger
	cfg.Stderr, cfg.SyncStdout, cfg.SyncStderr = &baseBadWriter{100}, &baseBadWriter{100}, &baseBadWriter{100}
	c, p := start(t, cfg)
	client := dispense[*rpc.Client](t, p, "base")
	junk := bytes.Repeat([]byte("junk "+strings.Repeat("x", 500)+"\n"), 10000)
	baseReturns(t, "printing", func() {
		if err := client.Call("Plugin.Print", BaseOutput{junk, junk, append(junk, "[WARN] still here\n"...)}, &struct{}{}); err != nil {
			t.Error(err)
		}
	})
	c.Kill()
	if len(records.find("still here")) != 1 {
		t.Error("the log ended when the writer failed")
	}
	if dropped := records.find("dropped"); len(dropped) != 3 || dropped[0].level != hclog.Warn {
		t.Errorf("that output is lost was logged %d times", len(dropped))
	}
}

// TestLogOfDyingPlugin checks that a panic comes out at Error, with its trace,
// and what was written before it does not.
func TestLogOfDyingPlugin(t *testing.T) {
	baseClean(t)
	cfg := baseConfig("base-panics")
	logger, records := baseLogger()
	cfg.Logger = logger
	c := NewClient(cfg)
	defer c.Kill()
	_, err := c.Start()
	baseCheckError(t, err, "panic: boom", "exit status 2")
	baseReturns(t, "the end", func() { <-c.Done() })
	for text, level := range map[string]hclog.Level{
		"all is well": hclog.Debug, "panic: boom": hclog.Error, "goroutine 1 [running]:": hclog.Error, "plugin_test.go:": hclog.Error,
	} {
		found := records.find(text)
		if len(found) == 0 {
			t.Errorf("%q is not in the log", text)
		}
		for _, r := range found {
			if r.level != level {
				t.Errorf("%q is logged at %v", r.msg, r.level)
			}
		}
	}
}

// ---- Stdout, stderr and stdin ----

// basePattern is size bytes of lines that are all different.
func basePattern(name string, size int) []byte {
	var b bytes.Buffer
	for i := 0; b.Len() < size; i++ {
		fmt.Fprintf(&b, "%s %07d \x00\xff some more\n", name, i)
	}
	return b.Bytes()[:size]
}

// baseGate is a writer that takes nothing until it is opened.
type baseGate struct {
	open chan struct{}
	baseBuffer
}

func (g *baseGate) Write(p []byte) (int, error) {
	<-g.open
	return g.baseBuffer.Write(p)
}

// TestOutput checks that what the plugin prints arrives, byte for byte and all
// of it, although the plugin is killed at once.
func TestOutput(t *testing.T) {
	baseClean(t)
	cfg := baseConfig("base")
	var stdout, stderr baseBuffer
	logger, records := baseLogger()
	cfg.SyncStdout, cfg.SyncStderr, cfg.Logger = &stdout, &stderr, logger
	c, p := start(t, cfg)
	out, errs := basePattern("stdout", 5<<20), basePattern("stderr", 3<<20+1)
	client := dispense[*rpc.Client](t, p, "base")
	if err := client.Call("Plugin.Print", BaseOutput{Stdout: out, Stderr: errs}, &struct{}{}); err != nil {
		t.Fatal(err)
	}
	c.Kill()
	if stdout.String() != string(out) {
		t.Errorf("of %d bytes to stdout, %d have arrived", len(out), len(stdout.String()))
	}
	if stderr.String() != string(errs) {
		t.Errorf("of %d bytes to stderr, %d have arrived", len(errs), len(stderr.String()))
	}
	// What main prints after Serve goes to the process's own.
	for text, level := range map[string]hclog.Level{"tail on stdout": hclog.Debug, "[INFO] tail on stderr": hclog.Info} {
		if found := records.find(text); len(found) != 1 || found[0].level != level {
			t.Errorf("%q is not logged once at %v: %v", text, level, found)
		}
	}
	if !cfg.Cmd.ProcessState.Success() {
		t.Error(cfg.Cmd.ProcessState)
	}
}

// TestOutputUnderWay checks the same where more than a stream holds is still
// in the plugin when it has been asked to quit, because the host's writers
// have taken nothing so far.
func TestOutputUnderWay(t *testing.T) {
	baseClean(t)
	cfg := baseConfig("base")
	stdout, stderr := &baseGate{open: make(chan struct{})}, &baseGate{open: make(chan struct{})}
	cfg.SyncStdout, cfg.SyncStderr = stdout, stderr
	c, p := start(t, cfg)
	const size = streamWindow + 80<<10
	out, errs := basePattern("stdout", size), basePattern("stderr", size)
	client := dispense[*rpc.Client](t, p, "base")
	if err := client.Call("Plugin.Print", BaseOutput{Stdout: out, Stderr: errs}, &struct{}{}); err != nil {
		t.Fatal(err)
	}
	asked := client.Go("Plugin.WaitQuit", struct{}{}, &struct{}{}, nil)
	killed := make(chan struct{})
	go func() { defer close(killed); c.Kill() }()
	<-asked.Done
	close(stdout.open)
	close(stderr.open)
	if !waitFor(hangs, killed) {
		t.Fatal("Kill hangs")
	}
	if stdout.String() != string(out) || stderr.String() != string(errs) {
		t.Errorf("of %d bytes each, %d and %d have arrived", size, len(stdout.String()), len(stderr.String()))
	}
}

// TestOutputToLog checks that the lines go to the logger where there is no
// writer, and only there.
func TestOutputToLog(t *testing.T) {
	baseClean(t)
	for _, test := range []struct{ stdout, stderr bool }{{false, false}, {true, false}, {false, true}} {
		cfg := baseConfig("base")
		logger, records := baseLogger()
		cfg.Logger = logger
		if test.stdout {
			cfg.SyncStdout = io.Discard
		}
		if test.stderr {
			cfg.SyncStderr = io.Discard
		}
		c, p := start(t, cfg)
		const lines = 50000
		var out, errs bytes.Buffer
		for i := range lines {
			fmt.Fprintf(&out, "out %d is a line of some length\n", i)
			fmt.Fprintf(&errs, "err %d is a line of some length\n", i)
		}
		out.WriteString("[ERROR] out without an end")
		client := dispense[*rpc.Client](t, p, "base")
		if err := client.Call("Plugin.Print", BaseOutput{Stdout: out.Bytes(), Stderr: errs.Bytes()}, &struct{}{}); err != nil {
			t.Fatal(err)
		}
		c.Kill()
		want := map[string]int{"out ": lines + 1, "err ": lines}
		if test.stdout {
			want["out "] = 0
		}
		if test.stderr {
			want["err "] = 0
		}
		for text, n := range want {
			found := records.find(text)
			if len(found) != n {
				t.Errorf("%+v: %d records of %q and not %d", test, len(found), text, n)
			}
			for i, r := range found {
				if r.level != hclog.Debug || i < lines && !strings.HasPrefix(r.msg, fmt.Sprintf("%s%d is", text, i)) {
					t.Fatalf("%+v: record %d is %v %q", test, i, r.level, r.msg)
				}
			}
		}
	}
}

// TestStdin checks that the plugin has the host's stdin, or the command's.
func TestStdin(t *testing.T) {
	baseClean(t)
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	defer w.Close()
	own := os.Stdin
	defer func() { os.Stdin = own }()
	os.Stdin = r
	if _, err := w.WriteString("from the host"); err != nil {
		t.Fatal(err)
	}
	for want, stdin := range map[string]io.Reader{"from the host": nil, "from the command": strings.NewReader("from the command")} {
		cfg := baseConfig("base")
		cfg.Cmd.Stdin = stdin
		c, p := start(t, cfg)
		var got string
		if err := dispense[*rpc.Client](t, p, "base").Call("Plugin.ReadStdin", len(want), &got); err != nil || got != want {
			t.Errorf("it read %q, %v, and not %q", got, err, want)
		}
		c.Kill()
	}
}

// ---- Reattach ----

// baseTicket is a ReattachConfig on its way to another process.
type baseTicket struct {
	Version, Pid  int
	Network, Addr string
}

func (b baseTicket) config() *ReattachConfig {
	addr, err := parseAddr(b.Network, b.Addr)
	if err != nil {
		panic(err)
	}
	return &ReattachConfig{Protocol: ProtocolNetRPC, ProtocolVersion: b.Version, Addr: addr, Pid: b.Pid}
}

func newBaseTicket(rc *ReattachConfig) string {
	text, err := json.Marshal(baseTicket{rc.ProtocolVersion, rc.Pid, rc.Addr.Network(), rc.Addr.String()})
	if err != nil {
		panic(err)
	}
	return string(text)
}

func readBaseTicket(text string) *ReattachConfig {
	var b baseTicket
	if err := json.Unmarshal([]byte(text), &b); err != nil {
		panic(err)
	}
	return b.config()
}

// baseFirstHost starts a plugin, says how to reattach to it, and ends.
func baseFirstHost() {
	cfg := baseConfig("base-versions", baseVersionsEnv+"=1,2,9")
	cfg.Plugins, cfg.VersionedPlugins = nil, baseVersions("1,2")
	c := NewClient(cfg)
	if _, err := c.Client(); err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	fmt.Println(newBaseTicket(c.ReattachConfig()))
}

// baseSecondHost reattaches to a plugin, calls it and kills it.
func baseSecondHost() {
	c := NewClient(&ClientConfig{
		HandshakeConfig: testHandshake, Plugins: testPlugins(), Logger: hclog.NewNullLogger(),
		Reattach: readBaseTicket(os.Getenv(baseReattachEnv)),
	})
	defer c.Kill()
	p, err := c.Client()
	if err != nil {
		fmt.Println(err)
		return
	}
	g, err := Dispense[Greeter](p, "greeter")
	if err != nil {
		fmt.Println(err)
		return
	}
	fmt.Println(g.Greet())
}

// TestReattach lets a second host, in another process, use the plugin that
// this one has started, and kill it.
func TestReattach(t *testing.T) {
	baseClean(t)
	cfg := baseConfig("base")
	logger, records := baseLogger()
	cfg.Logger = logger
	c, _ := start(t, cfg)
	second := exec.Command(os.Args[0])
	second.Env = append(os.Environ(), modeEnv+"=base-second-host", baseReattachEnv+"="+newBaseTicket(c.ReattachConfig()))
	out, err := second.CombinedOutput()
	if err != nil || string(out) != "Hello!\n" {
		t.Errorf("the second host: %q, %v", out, err)
	}
	if !waitFor(hangs, c.done) {
		t.Fatal("the plugin lives on though the second host has killed it")
	}
	if len(records.find("tail on stderr")) != 1 {
		t.Error("the plugin's main has not finished")
	}
}

// TestReattachLater uses a plugin whose first host has ended, with the version
// that the two had negotiated.
func TestReattachLater(t *testing.T) {
	baseClean(t)
	first := exec.Command(os.Args[0])
	first.Env = append(os.Environ(), modeEnv+"=base-first-host")
	out, err := first.Output()
	if err != nil {
		t.Fatalf("%q, %v", out, err)
	}
	rc := readBaseTicket(string(out))
	cfg := &ClientConfig{HandshakeConfig: testHandshake, VersionedPlugins: baseVersions("1,2,3"), Logger: hclog.NewNullLogger(), Reattach: rc}
	c, p := start(t, cfg)
	if got := dispense[string](t, p, "version"); got != "host 2 plugin 2" || c.NegotiatedVersion() != 2 {
		t.Errorf("%s was dispensed, of version %d", got, c.NegotiatedVersion())
	}
	if c.ID() != strconv.Itoa(rc.Pid) || c.Exited() || !reflect.DeepEqual(c.ReattachConfig(), rc) {
		t.Error(c.ID(), c.Exited(), c.ReattachConfig())
	}
	c.Kill()
	if !c.Exited() {
		t.Error("it has not exited after Kill")
	}
	again := NewClient(cfg)
	defer again.Kill()
	if _, err := again.Start(); err != ErrProcessNotFound {
		t.Errorf("reattaching to what is gone: %v", err)
	}

	// A host that does not have the version that was negotiated.
	other := *cfg
	other.VersionedPlugins = baseVersions("7,8")
	c = NewClient(&other)
	defer c.Kill()
	_, err = c.Start()
	baseCheckError(t, err, "version 2 ", "7", "8")
}

// baseInnocent starts a process that is no plugin, and returns its pid and a
// function that checks that it still lives.
func baseInnocent(t *testing.T) (pid int, check func()) {
	t.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), modeEnv+"=base-innocent")
	stdin, err1 := cmd.StdinPipe()
	stdout, err2 := cmd.StdoutPipe()
	if err := errors.Join(err1, err2, cmd.Start()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = stdin.Close()
		if err := cmd.Wait(); err != nil {
			t.Error("the innocent process has been harmed:", err)
		}
	})
	return cmd.Process.Pid, func() {
		t.Helper()
		var buf [1]byte
		_, err := stdin.Write([]byte("x"))
		if err == nil {
			_, err = io.ReadFull(stdout, buf[:])
		}
		if err != nil {
			t.Error("the innocent process has been harmed:", err)
		}
	}
}

// TestReattachToNobody checks what is said of a plugin that is not there, and
// that a process that has its pid now is left alone.
func TestReattachToNobody(t *testing.T) {
	baseClean(t)
	innocent, check := baseInnocent(t)
	dead := exec.Command(os.Args[0])
	dead.Env = append(os.Environ(), modeEnv+"=base-exits")
	_ = dead.Run()
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer lis.Close()
	nowhere := &net.UnixAddr{Name: filepath.Join(baseShortDir(t), fmt.Sprintf("plugin-%d-1", innocent)), Net: "unix"}
	for name, rc := range map[string]*ReattachConfig{
		"a dead process": {Pid: dead.Process.Pid, Addr: nowhere},
		"a dead process and somebody else's socket": {Pid: dead.Process.Pid, Addr: lis.Addr()},
		"no pid":                               {Addr: lis.Addr()},
		"a group of processes":                 {Pid: -innocent, Addr: lis.Addr()},
		"another process now":                  {Pid: innocent, Addr: nowhere},
		"another process now, in Test mode":    {Pid: innocent, Addr: nowhere, Test: true},
		"another process and a socket with it": {Pid: innocent, Addr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 1}},
	} {
		rc.ProtocolVersion = int(testHandshake.ProtocolVersion)
		c := NewClient(&ClientConfig{HandshakeConfig: testHandshake, Plugins: testPlugins(), Logger: hclog.NewNullLogger(), Reattach: rc})
		if _, err := c.Start(); err != ErrProcessNotFound {
			t.Errorf("%s: Start returned %v", name, err)
		}
		if p, err := c.Client(); err != ErrProcessNotFound || p != nil {
			t.Errorf("%s: Client returned %v, %v", name, p, err)
		}
		c.Kill()
		check()
	}
}

// TestReattachWithWrongPid gives an innocent process's pid with the address of
// something that listens: a plugin, which is asked to quit, and something that
// never answers. That process is never signalled.
func TestReattachWithWrongPid(t *testing.T) {
	baseClean(t)
	innocent, check := baseInnocent(t)
	silent, err := net.Listen("unix", filepath.Join(baseShortDir(t), "plugin-1-1"))
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	real, _ := start(t, baseConfig("base"))
	for name, addr := range map[string]net.Addr{"a plugin": real.ReattachConfig().Addr, "silence": silent.Addr()} {
		c := NewClient(&ClientConfig{
			HandshakeConfig: testHandshake, Plugins: testPlugins(), Logger: hclog.NewNullLogger(), KillTimeout: 300 * time.Millisecond,
			Reattach: &ReattachConfig{ProtocolVersion: int(testHandshake.ProtocolVersion), Addr: addr, Pid: innocent},
		})
		if _, err := c.Client(); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		baseReturns(t, "Kill", c.Kill)
		check()
	}
	if !waitFor(hangs, real.done) {
		t.Error("the plugin was not asked to quit")
	}
}

// ---- Security ----

// baseSum returns the checksum of the test binary.
func baseSum(t testing.TB) []byte {
	t.Helper()
	f, err := os.Open(os.Args[0])
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		t.Fatal(err)
	}
	return h.Sum(nil)
}

// baseHash is a hash that cannot be cloned.
type baseHash struct{ hash.Hash }

// TestSecureConfig checks that only the right binary is started, and that one
// SecureConfig will do for many checks, also at once.
func TestSecureConfig(t *testing.T) {
	baseClean(t)
	sum := baseSum(t)
	used := sha256.New()
	used.Write([]byte("used before"))
	usedSum := used.Sum(nil)
	for name, secure := range map[string]*SecureConfig{
		"a new hash":                   {sum, sha256.New()},
		"a hash that was used":         {sum, used},
		"a hash that cannot be cloned": {sum, baseHash{sha256.New()}},
	} {
		for range 3 {
			if ok, err := secure.Check(os.Args[0]); !ok || err != nil {
				t.Errorf("%s: %v, %v", name, ok, err)
			}
		}
		cfg := baseConfig("base")
		cfg.SecureConfig = secure
		for range 2 {
			c, p := start(t, cfg)
			if got := dispense[Greeter](t, p, "greeter").Greet(); got != "Hello!" {
				t.Errorf("%s: %s", name, got)
			}
			c.Kill()
		}
	}
	if !bytes.Equal(used.Sum(nil), usedSum) {
		t.Error("the hash was changed")
	}
	shared := &SecureConfig{sum, sha256.New()}
	var checking sync.WaitGroup
	for range 8 {
		checking.Go(func() {
			if ok, err := shared.Check(os.Args[0]); !ok || err != nil {
				t.Errorf("at once: %v, %v", ok, err)
			}
		})
	}
	checking.Wait()

	wrong := bytes.Clone(sum)
	wrong[0]++
	for _, test := range []struct {
		secure *SecureConfig
		err    error
	}{
		{&SecureConfig{wrong, sha256.New()}, ErrChecksumsDoNotMatch},
		{&SecureConfig{sum[:16], sha256.New()}, ErrChecksumsDoNotMatch},
		{&SecureConfig{nil, sha256.New()}, ErrSecureConfigNoChecksum},
		{&SecureConfig{sum, nil}, ErrSecureConfigNoHash},
	} {
		ok, err := test.secure.Check(os.Args[0])
		if ok || test.err != ErrChecksumsDoNotMatch && err != test.err {
			t.Errorf("Check returned %v, %v, and not %v", ok, err, test.err)
		}
		cfg := baseConfig("base")
		cfg.SecureConfig = test.secure
		c := NewClient(cfg)
		if _, err := c.Start(); err != test.err {
			t.Errorf("Start returned %v and not %v", err, test.err)
		}
		c.Kill()
		if cfg.Cmd.Process != nil {
			t.Error("it was started all the same")
		}
	}
	if ok, err := shared.Check(filepath.Join(t.TempDir(), "missing")); ok || !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("of a file that is not there: %v, %v", ok, err)
	}
}

// baseTLSConfig returns a host's configuration for the mode "base-tls" and
// what that needs in its environment.
func baseTLSConfig(t *testing.T) (*tls.Config, string) {
	t.Helper()
	cert, err := newCertificate()
	if err != nil {
		t.Fatal(err)
	}
	key, err := x509.MarshalPKCS8PrivateKey(cert.PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM([]byte(certPEM(cert.Certificate[0])))
	text := certPEM(cert.Certificate[0]) + string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: key}))
	return &tls.Config{RootCAs: pool, ServerName: "localhost", MinVersion: tls.VersionTLS12}, baseTLSEnv + "=" + text
}

// TestTLS checks that both sides' own TLS configurations are used.
func TestTLS(t *testing.T) {
	baseClean(t)
	secure, env := baseTLSConfig(t)
	cfg := baseConfig("base-tls", env)
	cfg.TLSConfig = secure
	c, p := start(t, cfg)
	if got := dispense[Greeter](t, p, "greeter").Greet(); got != "Hello!" {
		t.Error(got)
	}
	c.Kill()

	untrusting, _ := baseTLSConfig(t)
	for name, tlsConfig := range map[string]*tls.Config{"no TLS": nil, "another certificate": untrusting} {
		cfg.TLSConfig = tlsConfig
		c := NewClient(cfg)
		p, err := c.Client()
		if err == nil {
			err = p.Ping()
		}
		if err == nil {
			t.Errorf("a host with %s is served", name)
		}
		baseReturns(t, "Kill", c.Kill)
	}

	cfg = baseConfig("base-tls", baseTLSEnv+"=no certificate")
	cfg.TLSConfig = secure
	c = NewClient(cfg)
	_, err := c.Start()
	baseCheckError(t, err, "TLSProvider", "exit status 1")
	c.Kill()

	// A plugin without TLS under a host with it.
	cfg = baseConfig("base")
	cfg.TLSConfig = secure
	c = NewClient(cfg)
	if _, err := c.Client(); err == nil {
		t.Error("a plugin without TLS is connected to")
	}
	baseReturns(t, "Kill", c.Kill)
}

// TestAutoMTLS checks that only the two processes can talk, with certificates
// made for this start.
func TestAutoMTLS(t *testing.T) {
	baseClean(t)
	var before []byte
	for range 2 {
		cfg := baseConfig("base")
		cfg.AutoMTLS = true
		c, p := start(t, cfg)
		own := c.starting.result()
		if own.cert == nil || bytes.Equal(own.cert, before) {
			t.Error("the certificate is not a new one")
		}
		before = own.cert
		stranger, err := newCertificate()
		if err != nil {
			t.Fatal(err)
		}
		foreign, err := mutualTLS(stranger, own.cert)
		if err != nil {
			t.Fatal(err)
		}
		for name, secure := range map[string]*tls.Config{
			"no TLS": nil,
			// The address and the plugin's certificate are no secret.
			"no certificate":      {RootCAs: own.tls.RootCAs, ServerName: "localhost"},
			"another certificate": foreign,
		} {
			conn, err := net.Dial(own.addr.Network(), own.addr.String())
			if err != nil {
				t.Fatal(err)
			}
			if secure != nil {
				conn = tls.Client(conn, secure)
			}
			client, err := NewRPCClient(conn, testPlugins())
			if err == nil {
				if err = client.Ping(); err == nil {
					t.Errorf("a stranger with %s is answered", name)
				}
				if _, err = client.Dispense("greeter"); err == nil {
					t.Errorf("a stranger with %s is served", name)
				}
				client.session.close()
			}
		}
		if got := dispense[Greeter](t, p, "greeter").Greet(); got != "Hello!" {
			t.Error("after the strangers:", got)
		}
		c.Kill()
	}

	// A plugin that has its own TLS does not answer with a certificate.
	secure, env := baseTLSConfig(t)
	cfg := baseConfig("base-tls", env)
	cfg.AutoMTLS, cfg.TLSConfig = true, secure
	c := NewClient(cfg)
	defer c.Kill()
	_, err := c.Start()
	baseCheckError(t, err, "AutoMTLS", "TLSProvider")
}

// ---- Kill ----

// TestKill checks that the plugin may finish, and that Kill may be called
// whenever, and as often as, one likes.
func TestKill(t *testing.T) {
	t.Run("while it runs", func(t *testing.T) {
		baseClean(t)
		cfg := baseConfig("base")
		logger, records := baseLogger()
		cfg.Logger = logger
		c, p := start(t, cfg)
		var killing sync.WaitGroup
		for range 5 {
			killing.Go(func() {
				c.Kill()
				if !c.Exited() {
					t.Error("Kill returned before the process was gone")
				}
			})
		}
		baseReturns(t, "Kill", killing.Wait)
		baseReturns(t, "Kill once more", c.Kill)
		if len(records.find("tail on stderr")) != 1 || !cfg.Cmd.ProcessState.Success() {
			t.Error("the plugin's main has not finished:", cfg.Cmd.ProcessState)
		}
		if c.Err() != nil {
			t.Error(c.Err())
		}
		if _, err := Dispense[Greeter](p, "greeter"); err == nil {
			t.Error("a plugin can be dispensed after Kill")
		}
	})
	t.Run("before Client", func(t *testing.T) {
		baseClean(t)
		cfg := baseConfig("base")
		c := NewClient(cfg)
		if _, err := c.Start(); err != nil {
			t.Fatal(err)
		}
		baseReturns(t, "Kill", c.Kill)
		if !cfg.Cmd.ProcessState.Success() {
			t.Error("the plugin's main has not finished:", cfg.Cmd.ProcessState)
		}
	})
	t.Run("before Start", func(t *testing.T) {
		baseClean(t)
		cfg := baseConfig("base")
		c := NewClient(cfg)
		baseReturns(t, "Kill", c.Kill)
		if _, err := c.Start(); err == nil || !strings.Contains(err.Error(), "Kill") {
			t.Errorf("Start after Kill returned %v", err)
		}
		if cfg.Cmd.Process != nil {
			t.Error("it was started all the same")
		}
	})
	t.Run("during Start", func(t *testing.T) {
		baseClean(t)
		cfg := baseConfig("base-say", baseSayEnv+"=loading")
		logger, records := baseLogger()
		cfg.Logger = logger
		c := NewClient(cfg)
		started := make(chan error, 1)
		go func() {
			_, err := c.Start()
			started <- err
		}()
		baseUntil(t, "the plugin's first words", func() bool { return len(records.find("before its handshake")) > 0 })
		baseReturns(t, "Kill", c.Kill)
		baseReturns(t, "Start", func() {
			if err := <-started; err == nil || !strings.Contains(err.Error(), "Kill") {
				t.Errorf("Start returned %v", err)
			}
		})
		if !c.Exited() || cfg.Cmd.ProcessState == nil {
			t.Error("the process is not gone")
		}
	})
	t.Run("when it is long dead", func(t *testing.T) {
		baseClean(t)
		cfg := baseConfig("base")
		c, _ := start(t, cfg)
		if err := cfg.Cmd.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		if !waitFor(hangs, c.done) {
			t.Fatal("its end goes unnoticed")
		}
		baseReturns(t, "Kill", c.Kill)
		baseReturns(t, "Kill", c.Kill)
	})
	t.Run("when it does not end", func(t *testing.T) {
		baseClean(t)
		cfg := baseConfig("base-stubborn")
		c, _ := start(t, cfg)
		begin := time.Now()
		baseReturns(t, "Kill", c.Kill)
		// It has two seconds.
		if took := time.Since(begin); took < 2*time.Second-100*time.Millisecond || took > 8*time.Second {
			t.Errorf("it was killed after %v", took)
		}
		if !c.Exited() || cfg.Cmd.ProcessState == nil || cfg.Cmd.ProcessState.Success() {
			t.Error("the process ended with", cfg.Cmd.ProcessState)
		}
	})
}

// baseManaged reports whether the package holds a client.
func baseManaged(c *Client) bool {
	managed.mu.Lock()
	defer managed.mu.Unlock()
	_, held := managed.clients[c]
	return held
}

// TestCleanupClients checks that the managed clients are killed, and let go.
func TestCleanupClients(t *testing.T) {
	baseClean(t)
	other, p := start(t, baseConfig("base"))
	cfg := baseConfig("base")
	cfg.Managed = true
	killed := NewClient(cfg)
	if !baseManaged(killed) || baseManaged(other) {
		t.Error("managed are:", baseManaged(killed), baseManaged(other))
	}
	killed.Kill()
	if baseManaged(killed) {
		t.Error("a client that was killed before Start is held")
	}
	var clients []*Client
	for range 4 {
		c, _ := start(t, cfg)
		clients = append(clients, c)
	}
	clients = append(clients, NewClient(cfg)) // never started
	clients[0].Kill()
	if baseManaged(clients[0]) {
		t.Error("a client that was killed is held")
	}
	baseReturns(t, "CleanupClients", CleanupClients)
	for i, c := range clients {
		if !c.Exited() || baseManaged(c) {
			t.Errorf("client %d: exited is %v and managed %v", i, c.Exited(), baseManaged(c))
		}
	}
	if err := p.Ping(); err != nil {
		t.Error("a client that is not managed has been killed:", err)
	}
	CleanupClients() // there is none left
}

// ---- Config is input ----

// TestConfigIsKept checks that nothing of the caller's is changed, not even
// behind the end of a slice, and that a config can be used again.
func TestConfigIsKept(t *testing.T) {
	baseClean(t)
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	defer w.Close()
	cfg := baseConfig("base")
	roomy := func(s []string) []string { return append(make([]string, 0, len(s)+5), s...) }
	cfg.Cmd.Env, cfg.Cmd.Args = roomy(cfg.Cmd.Env), roomy(cfg.Cmd.Args)
	cfg.Cmd.ExtraFiles = append(make([]*os.File, 0, 8), r)
	set := PluginSet{} // of pointers, which can be compared
	for name, p := range cfg.Plugins {
		p := p.(testPlugin)
		set[name] = &p
	}
	cfg.Plugins = set
	cfg.VersionedPlugins = map[int]PluginSet{1: maps.Clone(set)}
	cfg.AllowedProtocols = append(make([]Protocol, 0, 4), ProtocolGRPC, ProtocolNetRPC)
	cfg.UnixSocketConfig = &UnixSocketConfig{}
	cfg.SecureConfig = &SecureConfig{baseSum(t), sha256.New()}
	cfg.AutoMTLS, cfg.Managed = true, true

	before, cmd := *cfg, *cfg.Cmd
	before.Plugins = maps.Clone(cfg.Plugins)
	before.VersionedPlugins = map[int]PluginSet{1: maps.Clone(cfg.VersionedPlugins[1])}
	sockets := *cfg.UnixSocketConfig
	before.UnixSocketConfig = &sockets
	before.AllowedProtocols = slices.Clone(cfg.AllowedProtocols[:4])
	before.SecureConfig = &SecureConfig{bytes.Clone(cfg.SecureConfig.Checksum), sha256.New()}
	env, args := slices.Clone(cmd.Env[:cap(cmd.Env)]), slices.Clone(cmd.Args[:cap(cmd.Args)])
	files := slices.Clone(cmd.ExtraFiles[:8])

	check := func() {
		t.Helper()
		now, nowCmd := *cfg, *cfg.Cmd
		now.AllowedProtocols = now.AllowedProtocols[:4]
		nowCmd.Process, nowCmd.ProcessState = nil, nil
		now.Cmd, before.Cmd = nil, nil
		if !reflect.DeepEqual(now, before) {
			t.Errorf("the config is %+v and was %+v", now, before)
		}
		if !reflect.DeepEqual(nowCmd, cmd) {
			t.Errorf("the command is %+v and was %+v", nowCmd, cmd)
		}
		if !slices.Equal(nowCmd.Env[:cap(cmd.Env)], env) || !slices.Equal(nowCmd.Args[:cap(cmd.Args)], args) || !slices.Equal(nowCmd.ExtraFiles[:8], files) {
			t.Error("what is behind the end of a slice was changed")
		}
	}
	first := NewClient(cfg)
	check()
	var clients []*Client
	for range 2 { // both run at the same time
		c, p := start(t, cfg)
		if pid := strconv.Itoa(cfg.Cmd.Process.Pid); pid != c.ID() || cfg.Cmd.ProcessState != nil {
			t.Errorf("Cmd.Process is %s, with %v, and the plugin %s", pid, cfg.Cmd.ProcessState, c.ID())
		}
		if got := dispense[Greeter](t, p, "greeter").Greet(); got != "Hello!" {
			t.Error(got)
		}
		check()
		clients = append(clients, c)
	}
	if clients[0].ID() == clients[1].ID() {
		t.Error("the second client uses the first one's process")
	}
	clients[0].Kill()
	if cfg.Cmd.ProcessState != nil {
		t.Error("the end of the first process was taken for the second's")
	}
	clients[1].Kill()
	if s := cfg.Cmd.ProcessState; s == nil || s.Pid() != cfg.Cmd.Process.Pid {
		t.Errorf("the second process has ended, and the command says %v", s)
	}
	first.Kill()
	check()
}

// baseLookup returns all values that the plugin's environment has for a name.
func baseLookup(t *testing.T, p ClientProtocol, name string) (values []string) {
	t.Helper()
	var env []string
	if err := dispense[*rpc.Client](t, p, "base").Call("Plugin.Environ", struct{}{}, &env); err != nil {
		t.Fatal(err)
	}
	for _, v := range env {
		if value, found := strings.CutPrefix(v, name+"="); found {
			values = append(values, value)
		}
	}
	return values
}

// TestEnvironment checks whose variables win.
func TestEnvironment(t *testing.T) {
	baseClean(t)
	t.Setenv("TEST_BASE_HOST", "host")
	t.Setenv("TEST_BASE_BOTH", "host")
	t.Setenv("PLUGIN_OF_OURS", "host") // named alike, and not the protocol's
	t.Setenv(testHandshake.MagicCookieKey, "host")
	for _, name := range protocolEnv {
		t.Setenv(name, "host")
	}
	own := []string{"TEST_BASE_CMD=cmd", "TEST_BASE_BOTH=cmd", testHandshake.MagicCookieKey + "=cmd"}
	for _, name := range protocolEnv {
		own = append(own, name+"=cmd")
	}
	for _, skip := range []bool{false, true} {
		cfg := baseConfig("base", own...)
		cfg.SkipHostEnv = skip
		cfg.MinPort, cfg.MaxPort = 10, 20
		c, p := start(t, cfg)
		host := []string{"host"}
		if skip {
			host = nil
		}
		for name, want := range map[string][]string{
			"TEST_BASE_HOST": host, "PLUGIN_OF_OURS": host,
			"TEST_BASE_CMD": {"cmd"}, "TEST_BASE_BOTH": {"cmd"},
			testHandshake.MagicCookieKey: {testHandshake.MagicCookieValue},
			envVersions:                  {"3"}, envMinPort: {"10"}, envMaxPort: {"20"},
			envClientCert: nil, envMultiplex: nil, EnvUnixSocketGroup: nil,
		} {
			if got := baseLookup(t, p, name); !slices.Equal(got, want) {
				t.Errorf("SkipHostEnv %v: %s is %q and not %q", skip, name, got, want)
			}
		}
		for _, name := range []string{envHost, EnvUnixSocketDir} {
			if runtime.GOOS == "windows" && name == EnvUnixSocketDir {
				continue // there are none
			}
			if got := baseLookup(t, p, name); len(got) != 1 || got[0] == "host" || got[0] == "cmd" {
				t.Errorf("SkipHostEnv %v: %s is %q", skip, name, got)
			}
		}
		c.Kill()
	}
}

// ---- Quiet ----

// baseQuietHost goes through a plugin's whole life, and says what its logger
// got above Debug.
func baseQuietHost() {
	cfg := baseConfig("greeter")
	cfg.Logger = hclog.New(&hclog.LoggerOptions{Output: os.Stdout, Level: hclog.Info})
	cfg.AutoMTLS = os.Getenv(baseMTLSEnv) != ""
	for range 3 {
		c := NewClient(cfg)
		p, err := c.Client()
		if err != nil {
			fmt.Println(err)
			return
		}
		g, err := Dispense[Greeter](p, "greeter")
		if err != nil || g.Greet() != "Hello!" || p.Ping() != nil {
			fmt.Println("it does not work", err)
		}
		c.Kill()
	}
}

// TestQuiet checks that a clean life logs nothing above Debug on either side,
// and that nothing is printed. (The plugin's own log is in the host's.)
func TestQuiet(t *testing.T) {
	baseClean(t)
	for _, mtls := range []string{"", "yes"} {
		host := exec.Command(os.Args[0])
		host.Env = append(os.Environ(), modeEnv+"=base-quiet-host", baseMTLSEnv+"="+mtls)
		out, err := host.CombinedOutput()
		if err != nil || len(out) > 0 {
			t.Errorf("AutoMTLS %q: the host says, %v:\n%s", mtls, err, out)
		}
	}
	// Whoever uses the log package's own logger in this process would be heard.
	var printed baseBuffer
	log.SetOutput(&printed)
	defer log.SetOutput(os.Stderr)
	logger, records := baseLogger()
	cfg := baseConfig("greeter")
	cfg.Logger = logger
	c, p := start(t, cfg)
	if got := dispense[Greeter](t, p, "greeter").Greet(); got != "Hello!" {
		t.Error(got)
	}
	c.Kill()
	for _, r := range records.get() {
		if r.level > hclog.Debug {
			t.Errorf("logged at %v: %s %v", r.level, r.msg, r.args)
		}
		if strings.Contains(r.msg, "yamux") {
			t.Errorf("yamux complains about an ordinary end: %s", r.msg)
		}
	}
	if printed.String() != "" {
		t.Errorf("printed was %q", printed.String())
	}
}

// ---- Test mode ----

// baseServeTest runs Serve in test mode. The function it returns ends it and
// waits.
func baseServeTest(t *testing.T, config *ServeConfig) (*ReattachConfig, func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	ready, closed, returned := make(chan *ReattachConfig, 1), make(chan struct{}), make(chan struct{})
	config.Test.Context, config.Test.ReattachConfigCh, config.Test.CloseCh = ctx, ready, closed
	go func() { defer close(returned); Serve(config) }()
	stop := func() {
		t.Helper()
		cancel()
		if !waitFor(hangs, closed, returned) {
			t.Fatal("Serve does not end when its context does")
		}
	}
	t.Cleanup(stop)
	select {
	case rc := <-ready:
		return rc, stop
	case <-time.After(hangs):
		t.Fatal("Serve does not begin")
		return nil, nil
	}
}

// TestTestMode checks that serving within a test works, and touches nothing
// that belongs to the process.
func TestTestMode(t *testing.T) {
	baseClean(t)
	for _, name := range protocolEnv {
		t.Setenv(name, "ours")
	}
	t.Setenv(testHandshake.MagicCookieKey, "ours")
	_ = os.Unsetenv(EnvUnixSocketDir) // t.Setenv gives it back
	environ, stdout, stderr := os.Environ(), os.Stdout, os.Stderr
	rc, stop := baseServeTest(t, &ServeConfig{
		HandshakeConfig: testHandshake, Plugins: testPlugins(), Logger: hclog.NewNullLogger(), Test: &ServeTestConfig{},
	})
	if !rc.Test || rc.Pid != os.Getpid() || rc.Addr == nil || rc.ProtocolVersion != 3 {
		t.Errorf("the ReattachConfig is %+v", rc)
	}
	cfg := &ClientConfig{HandshakeConfig: testHandshake, Plugins: testPlugins(), Logger: hclog.NewNullLogger(), Reattach: rc}
	for range 2 { // the first one's Kill leaves the server alone
		c, p := start(t, cfg)
		if got := dispense[Greeter](t, p, "greeter").Greet(); got != "Hello!" {
			t.Error(got)
		}
		baseReturns(t, "Kill", c.Kill)
	}
	if !slices.Equal(os.Environ(), environ) || os.Stdout != stdout || os.Stderr != stderr {
		t.Error("the environment, stdout or stderr was changed")
	}
	stop()
	c := NewClient(cfg)
	defer c.Kill()
	if _, err := c.Start(); err == nil {
		t.Error("it is still served")
	}
}

// TestTestModeEnds checks that Serve ends in test mode whatever it waits for,
// and when it cannot serve at all, without an exit of the process.
func TestTestModeEnds(t *testing.T) {
	baseClean(t)
	logger, records := baseLogger()
	ended, cancel := context.WithCancel(context.Background())
	cancel()
	for name, config := range map[string]*ServeConfig{
		"nobody takes the ReattachConfig": {Plugins: testPlugins(), Test: &ServeTestConfig{Context: ended, ReattachConfigCh: make(chan *ReattachConfig)}},
		"there are no channels":           {Plugins: testPlugins(), Test: &ServeTestConfig{Context: ended}},
		"there are no plugins":            {Test: &ServeTestConfig{}},
		"there is no certificate": {Plugins: testPlugins(), Test: &ServeTestConfig{}, TLSProvider: func() (*tls.Config, error) {
			return nil, errors.New("no certificate")
		}},
	} {
		closed := make(chan struct{})
		config.Test.CloseCh, config.Logger = closed, logger
		baseReturns(t, name+": Serve", func() { Serve(config) })
		if !isClosed(closed) {
			t.Errorf("%s: CloseCh is not closed", name)
		}
	}
	for _, text := range []string{"no plugins", "no certificate"} {
		if !slices.ContainsFunc(records.get(), func(r baseRecord) bool { return strings.Contains(fmt.Sprint(r.args), text) }) {
			t.Errorf("%q is not in the log", text)
		}
	}
}

// TestTestModeOutput checks that SyncStdio sends the process's output to the
// host as well, and gives it back.
func TestTestModeOutput(t *testing.T) {
	baseClean(t)
	var files [2]*os.File
	for i := range files {
		f, err := os.Create(filepath.Join(t.TempDir(), "output"))
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		files[i] = f
	}
	stdout, stderr := os.Stdout, os.Stderr
	defer func() { os.Stdout, os.Stderr = stdout, stderr }()
	os.Stdout, os.Stderr = files[0], files[1]
	rc, stop := baseServeTest(t, &ServeConfig{
		HandshakeConfig: testHandshake, Plugins: testPlugins(), Logger: hclog.NewNullLogger(), Test: &ServeTestConfig{SyncStdio: true},
	})
	var out, errs baseBuffer
	c, _ := start(t, &ClientConfig{
		HandshakeConfig: testHandshake, Plugins: testPlugins(), Logger: hclog.NewNullLogger(), Reattach: rc, SyncStdout: &out, SyncStderr: &errs,
	})
	fmt.Fprintln(os.Stdout, "to stdout")
	fmt.Fprintln(os.Stderr, "to stderr")
	baseUntil(t, "output", func() bool { return out.String() == "to stdout\n" && errs.String() == "to stderr\n" })
	c.Kill()
	stop()
	if os.Stdout != files[0] || os.Stderr != files[1] {
		t.Error("the process does not have its output back")
	}
	for i, want := range []string{"to stdout\n", "to stderr\n"} {
		if got, err := os.ReadFile(files[i].Name()); err != nil || string(got) != want {
			t.Errorf("the process's own output is %q, %v", got, err)
		}
	}
}

// ---- Concurrency ----

// TestConcurrency lets 100 goroutines start, dispense, call and ask at once.
func TestConcurrency(t *testing.T) {
	baseClean(t)
	c := NewClient(baseConfig("base"))
	t.Cleanup(c.Kill)
	var all sync.WaitGroup
	for i := range 100 {
		all.Go(func() {
			p, err := c.Client()
			if err != nil {
				t.Error(err)
				return
			}
			for range 3 {
				client, err := Dispense[*rpc.Client](p, "base")
				if err != nil {
					t.Error(err)
					return
				}
				for j := range 5 {
					baseEcho(t, client, strings.Repeat(fmt.Sprint(i, " ", j, " "), 100*i))
				}
				if err := client.Close(); err != nil {
					t.Error(err)
				}
			}
			if err := p.Ping(); err != nil {
				t.Error(err)
			}
			if _, err := c.Start(); err != nil || c.Exited() || c.ID() == "" || c.Protocol() != ProtocolNetRPC || c.NegotiatedVersion() != 3 {
				t.Error("a client in use tells otherwise:", err)
			}
		})
	}
	baseReturns(t, "the whole", all.Wait)
}

// ---- Bad input ----

// TestBadConfig is the table of configurations that cannot work.
func TestBadConfig(t *testing.T) {
	baseClean(t)
	running := &ReattachConfig{Pid: os.Getpid(), Addr: &net.UnixAddr{Name: "/s", Net: "unix"}}
	for _, test := range []struct {
		name   string
		change func(*ClientConfig)
		is     error
		texts  []string
	}{
		{"neither Cmd nor Reattach", func(c *ClientConfig) { c.Cmd = nil }, nil, []string{"Cmd", "Reattach"}},
		{"Cmd and Reattach", func(c *ClientConfig) { c.Reattach = running }, nil, []string{"Cmd", "Reattach"}},
		{"no cookie's name", func(c *ClientConfig) { c.MagicCookieKey = "" }, nil, []string{"MagicCookieKey"}},
		{"no cookie's value", func(c *ClientConfig) { c.MagicCookieValue = "" }, nil, []string{"MagicCookieValue"}},
		{"no plugins", func(c *ClientConfig) { c.Plugins = nil }, nil, []string{"Plugins", "VersionedPlugins"}},
		{"empty plugins", func(c *ClientConfig) { c.Plugins, c.VersionedPlugins = PluginSet{}, map[int]PluginSet{} }, nil, []string{"Plugins"}},
		{"SecureConfig with Reattach", func(c *ClientConfig) { c.Cmd, c.Reattach, c.SecureConfig = nil, running, &SecureConfig{} }, ErrSecureConfigAndReattach, nil},
		{"SecureConfig with Reattach and Cmd", func(c *ClientConfig) { c.Reattach, c.SecureConfig = running, &SecureConfig{} }, ErrSecureConfigAndReattach, nil},
		{"no checksum", func(c *ClientConfig) { c.SecureConfig = &SecureConfig{Hash: sha256.New()} }, ErrSecureConfigNoChecksum, nil},
		{"no hash", func(c *ClientConfig) { c.SecureConfig = &SecureConfig{Checksum: []byte{1}} }, ErrSecureConfigNoHash, nil},
		{"MinPort above MaxPort", func(c *ClientConfig) { c.MinPort, c.MaxPort = 20, 10 }, nil, []string{"MinPort", "20", "MaxPort", "10"}},
		{"MinPort without MaxPort", func(c *ClientConfig) { c.MinPort = 20 }, nil, []string{"MinPort", "20", "MaxPort", "0"}},
		{"AutoMTLS with Reattach", func(c *ClientConfig) { c.Cmd, c.Reattach, c.AutoMTLS = nil, running, true }, nil, []string{"AutoMTLS", "Reattach"}},
		{"Reattach to no address", func(c *ClientConfig) { c.Cmd, c.Reattach = nil, &ReattachConfig{Pid: 1} }, nil, []string{"Addr"}},
		{"Reattach over gRPC", func(c *ClientConfig) {
			c.Cmd, c.Reattach = nil, &ReattachConfig{Protocol: ProtocolGRPC, Pid: os.Getpid(), Addr: running.Addr}
		}, nil, []string{"gRPC"}},
		{"Cmd with its own Stdout", func(c *ClientConfig) { c.Cmd.Stdout = io.Discard }, nil, []string{"Stdout", "SyncStdout"}},
		{"Cmd with its own Stderr", func(c *ClientConfig) { c.Cmd.Stderr = io.Discard }, nil, []string{"Stderr"}},
		{"a plugin for gRPC alone", func(c *ClientConfig) { c.AllowedProtocols = []Protocol{ProtocolGRPC} }, nil, []string{`"netrpc"`, `"grpc"`}},
	} {
		t.Run(test.name, func(t *testing.T) {
			cfg := baseConfig("base")
			test.change(cfg)
			c := NewClient(cfg)
			defer c.Kill()
			_, err := c.Start()
			if test.is != nil && err != test.is {
				t.Errorf("the error is %v and not %v", err, test.is)
			}
			baseCheckError(t, err, append(test.texts, "plugin")...)
			if p, again := c.Client(); again != err || p != nil {
				t.Errorf("Client returns %v, %v, and Start %v", p, again, err)
			}
			if c.Protocol() != ProtocolInvalid || c.NegotiatedVersion() != 0 || c.ReattachConfig() != nil {
				t.Error("it tells of a plugin:", c.Protocol(), c.NegotiatedVersion(), c.ReattachConfig())
			}
		})
	}
}

// baseForeign writes a program that another system runs.
func baseForeign(t *testing.T, head string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "foreign.exe")
	if err := os.WriteFile(path, append([]byte(head), make([]byte, 1000)...), 0o755); err != nil {
		t.Fatal(err)
	}
	return path
}

// TestBadBinary is the table of plugins that do not start.
func TestBadBinary(t *testing.T) {
	say := func(line string) func(*testing.T, *ClientConfig) {
		return func(_ *testing.T, c *ClientConfig) {
			c.Cmd.Env = []string{modeEnv + "=base-say", baseSayEnv + "=" + line}
		}
	}
	mode := func(name string) func(*testing.T, *ClientConfig) {
		return func(_ *testing.T, c *ClientConfig) { c.Cmd.Env = []string{modeEnv + "=" + name} }
	}
	path := func(f func(t *testing.T) string) func(*testing.T, *ClientConfig) {
		return func(t *testing.T, c *ClientConfig) { c.Cmd.Path = f(t) }
	}
	arch := "\xb7" // arm64
	if runtime.GOARCH == "arm64" {
		arch = "\x3e" // amd64
	}
	short := func(c *ClientConfig) { c.StartTimeout = 300 * time.Millisecond }
	for _, test := range []struct {
		name    string
		prepare func(*testing.T, *ClientConfig)
		change  func(*ClientConfig) // nil for nothing
		exited  bool                // it ended by itself
		texts   []string
	}{
		{"missing", path(func(t *testing.T) string { return filepath.Join(t.TempDir(), "greeter") }), nil, false, []string{"plugin greeter", "no such file"}},
		{"not in PATH", func(_ *testing.T, c *ClientConfig) { c.Cmd = exec.Command("no-such-plugin-anywhere") }, nil, false, []string{"no-such-plugin-anywhere", "no such file"}},
		{"a directory", path(func(t *testing.T) string { return t.TempDir() }), nil, false, []string{"directory"}},
		{"exits at once", mode("base-exits"), nil, true, []string{"exit status 7", "cannot find my settings"}},
		{"panics at once", mode("base-panics"), nil, true, []string{"exit status 2", "panic: boom"}},
		{"never speaks", say("loading"), short, false, []string{"300ms", "loading", "handshake"}},
		{"closes stdout", mode("base-closed-stdout"), nil, false, []string{"closed its stdout"}},
		{"core protocol 2", say("2|3|unix|/tmp/s|netrpc|"), nil, false, []string{`"2"`, "core protocol"}},
		{"gRPC", say("1|3|unix|/tmp/s|grpc|"), nil, false, []string{"gRPC", "net/rpc"}},
		{"gRPC, allowed", say("1|3|unix|/tmp/s|grpc|"), func(c *ClientConfig) { c.AllowedProtocols = []Protocol{ProtocolNetRPC, ProtocolGRPC} }, false, []string{"gRPC"}},
		{"another protocol", say("1|3|unix|/tmp/s|smoke|"), nil, false, []string{`"smoke"`}},
		{"too few fields", say("1|3|unix"), nil, false, []string{"3 fields", "4"}},
		{"one field", say("1|"), nil, false, []string{"fields"}},
		{"an unknown network", say("1|3|pigeon|/tmp/s|netrpc|"), nil, false, []string{`"pigeon"`}},
		{"a bad address", say("1|3|tcp|nowhere|netrpc|"), nil, false, []string{"address", "nowhere"}},
		{"a bad port", say("1|3|tcp|127.0.0.1:99999|netrpc|"), nil, false, []string{"port"}},
		{"a bad version", say("1|three|unix|/tmp/s|netrpc|"), nil, false, []string{`"three"`}},
		{"another version", say("1|4|unix|/tmp/s|netrpc|"), nil, false, []string{"version 4", "[3]"}},
		{"a bad certificate", say("1|3|unix|/tmp/s|netrpc|" + strings.Repeat("A", 100)), func(c *ClientConfig) { c.AutoMTLS = true }, false, []string{"certificate"}},
		{"no certificate", say("1|3|unix|/tmp/s|netrpc|"), func(c *ClientConfig) { c.AutoMTLS = true }, false, []string{"certificate", "AutoMTLS"}},
		{"a handshake of 1 MB", say("1|"), func(c *ClientConfig) { c.Cmd.Env = append(c.Cmd.Env, basePadEnv+"=1000000") }, false, []string{"longer than"}},
		{"a handshake of 1 MB and no log", say("1|"), func(c *ClientConfig) {
			c.Cmd.Env, c.PluginLogBufferSize = append(c.Cmd.Env, basePadEnv+"=1000000"), 10
		}, false, []string{"longer than"}},
		{"a line of 1 MB", say("once upon a time"), func(c *ClientConfig) { short(c); c.Cmd.Env = append(c.Cmd.Env, basePadEnv+"=1000000") }, false, []string{"once upon a time", "no handshake"}},
		{"has no plugins", mode("base-no-plugins"), nil, true, []string{"exit status 1", "no plugins"}},
		{"built for macOS", path(func(t *testing.T) string { return baseForeign(t, "\xcf\xfa\xed\xfe\x0c\x00\x00\x01") }), nil, false, nil},
		{"built for another processor", path(func(t *testing.T) string {
			return baseForeign(t, "\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00"+arch+"\x00\x01\x00\x00\x00")
		}), nil, false, nil},
	} {
		t.Run(test.name, func(t *testing.T) {
			baseClean(t)
			cfg := baseConfig("base")
			test.prepare(t, cfg)
			if test.change != nil {
				test.change(cfg)
			}
			c := NewClient(cfg)
			var err error
			baseReturns(t, "Start", func() { _, err = c.Start() })
			baseCheckError(t, err, append(test.texts, "plugin "+pluginName(cfg.Cmd.Path))...)
			var failed *StartError
			if !errors.As(err, &failed) {
				t.Fatalf("the error is a %T", err)
			}
			if (failed.State != nil) != test.exited {
				t.Errorf("its state is %v", failed.State)
			}
			if cfg.Cmd.Process != nil && cfg.Cmd.ProcessState == nil {
				t.Error("the process is not waited for")
			}
			if len(err.Error()) > 20<<10 {
				t.Errorf("the error has %d bytes", len(err.Error()))
			}
			if _, again := c.Start(); again != err {
				t.Errorf("the second Start returned %v", again)
			}
			if !waitFor(hangs, c.done) {
				t.Error("Done is not closed")
			}
			// Nothing is left even if Kill is never called.
		})
	}
}

// TestBinaryKind checks that a binary for another system is told by its name.
func TestBinaryKind(t *testing.T) {
	pe := make([]byte, 0x90)
	copy(pe, "MZ")
	pe[60] = 0x80
	copy(pe[0x80:], "PE\x00\x00\x64\xaa")
	for _, test := range []struct{ head, want string }{
		{"\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\xb7\x00", "arm64"},
		{"\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\x3e\x00", "amd64"},
		{"\x7fELF\x02\x02\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\x16", "s390x"},
		{"\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\xff\xfe", "0xfeff"},
		{"\xcf\xfa\xed\xfe\x0c\x00\x00\x01", "macOS on arm64"},
		{"\xcf\xfa\xed\xfe\x07\x00\x00\x01", "macOS on amd64"},
		{string(pe), "Windows on arm64"},
		{"MZ", "Windows"},
		{"MZ" + strings.Repeat("\xff", 100), "Windows"},
		{"#!/bin/sh\n", ""},
	} {
		if got := binaryKind(baseForeign(t, test.head)); !strings.Contains(got, test.want) || test.want == "" && got != "" {
			t.Errorf("%.8q is %q and not %q", test.head, got, test.want)
		}
	}
	if got := binaryKind(filepath.Join(t.TempDir(), "missing")); got != "" {
		t.Error(got)
	}
}

// TestBadDispense is the table of plugins that cannot be dispensed. The
// connection lives on, and nothing stays behind on either side.
func TestBadDispense(t *testing.T) {
	baseClean(t)
	cfg := baseConfig("base")
	cfg.Plugins["only here"] = testPlugins()["greeter"]
	c, p := start(t, cfg)
	client := dispense[*rpc.Client](t, p, "base")
	goroutines := func() (n int) {
		if err := client.Call("Plugin.Goroutines", struct{}{}, &n); err != nil {
			t.Fatal(err)
		}
		return n
	}
	before := goroutines()
	for _, test := range []struct {
		name  string
		texts []string
	}{
		{"missing", []string{"knows no such plugin", "greeter"}},
		{"", []string{"knows no such plugin"}},
		{"only here", []string{"knows no such plugin", "base"}},
		{"server error", []string{"Server", "no database"}},
		{"server nil", []string{"Server", "nil"}},
		{"server panic", []string{"Server", "panic", "server boom"}},
		{"client error", []string{"Client", "no licence"}},
		{"client nil", []string{"Client", "nil"}},
		{"client panic", []string{"Client", "panic", "client boom"}},
	} {
		for range 3 {
			v, err := p.Dispense(test.name)
			baseCheckError(t, err, append(test.texts, strconv.Quote(test.name))...)
			if v != nil {
				t.Errorf("%s: %v was returned beside the error", test.name, v)
			}
		}
		if got := dispense[Greeter](t, p, "greeter").Greet(); got != "Hello!" {
			t.Errorf("after %s: %s", test.name, got)
		}
		before += 2 // that greeter is kept: who reads its calls, and who has served one
	}
	baseUntil(t, "the plugin's goroutines", func() bool { return goroutines() <= before+2 })
	c.Kill()
	if _, err := p.Dispense("greeter"); err == nil {
		t.Error("a plugin is dispensed after Kill")
	}
}

// ---- Speed ----

// baseBench starts the plugin "base" for a benchmark.
func baseBench(b *testing.B) (ClientProtocol, *rpc.Client) {
	b.Helper()
	_, p := start(b, baseConfig("base"))
	return p, dispense[*rpc.Client](b, p, "base")
}

func baseCall(b *testing.B, c *rpc.Client, in []byte) {
	var out []byte
	if err := c.Call("Plugin.Echo", in, &out); err != nil || len(out) != len(in) {
		b.Errorf("%d bytes, %v", len(out), err)
	}
}

// BenchmarkCall measures one small call to a plugin and back, from one caller.
func BenchmarkCall(b *testing.B) {
	_, c := baseBench(b)
	in := make([]byte, 16)
	b.ReportAllocs()
	for b.Loop() {
		baseCall(b, c, in)
	}
}

// BenchmarkCallParallel64 measures small calls from 64 callers on one client:
// the time for each is 1 by the throughput.
func BenchmarkCallParallel64(b *testing.B) {
	_, c := baseBench(b)
	const callers = 64
	in := make([]byte, 16)
	b.ReportAllocs()
	var calling sync.WaitGroup
	work := make(chan int, callers)
	for i := range callers {
		work <- b.N/callers + min(1, max(0, b.N%callers-i))
	}
	b.ResetTimer()
	for range callers {
		calling.Go(func() {
			for range <-work {
				baseCall(b, c, in)
			}
		})
	}
	calling.Wait()
}

// BenchmarkEcho1MiB measures a call with an argument of 1 MiB and a reply of
// as much; the throughput is that of one direction.
func BenchmarkEcho1MiB(b *testing.B) {
	_, c := baseBench(b)
	in := make([]byte, 1<<20)
	b.SetBytes(int64(len(in)))
	b.ReportAllocs()
	for b.Loop() {
		baseCall(b, c, in)
	}
}

// BenchmarkBrokerStream measures writes of 64 KiB to a stream of the broker's
// that the plugin reads.
func BenchmarkBrokerStream(b *testing.B) {
	p, c := baseBench(b)
	broker := p.(*RPCClient).broker
	id := broker.NextId()
	var n int64
	call := c.Go("Plugin.Take", id, &n, nil)
	conn, err := broker.Accept(id)
	if err != nil {
		b.Fatal(err)
	}
	chunk := make([]byte, 64<<10)
	b.SetBytes(int64(len(chunk)))
	b.ReportAllocs()
	var sent int64
	for b.Loop() {
		m, err := conn.Write(chunk)
		if err != nil {
			b.Fatal(err)
		}
		sent += int64(m)
	}
	_ = conn.Close()
	if <-call.Done; call.Error != nil || n != sent {
		b.Errorf("%d bytes of %d have arrived: %v", n, sent, call.Error)
	}
}

// BenchmarkStartToFirstReply measures the start of a plugin until the reply of
// its first call is here. Its end is not in it.
func BenchmarkStartToFirstReply(b *testing.B) {
	in := make([]byte, 16)
	for b.Loop() {
		c, p := start(b, baseConfig("base"))
		baseCall(b, dispense[*rpc.Client](b, p, "base"), in)
		b.StopTimer()
		c.Kill()
		b.StartTimer()
	}
}
