package plugin_test

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"encoding/base64"
	"errors"
	"fmt"
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
	"sync/atomic"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/muxplug/plugin"
)

func init() {
	// Accepts a connection, and never answers.
	modes["deaf"] = func() {
		l := announce(nil)
		must(l.Accept())
		note("connected", "")
		time.Sleep(forever)
	}
	// Has another certificate than its handshake says.
	modes["imposter"] = func() {
		l := announce(must(newCertificate()).Certificate[0])
		another := &tls.Config{Certificates: []tls.Certificate{must(newCertificate())}}
		_ = tls.Server(must(l.Accept()), another).Handshake()
		time.Sleep(forever)
	}
	// Has the certificate of testTLS.
	modes["tls"] = func() {
		servePlugin(func(c *plugin.ServeConfig) {
			c.TLSProvider = func() (*tls.Config, error) {
				dir := os.Getenv(notesEnv)
				cert, err := tls.LoadX509KeyPair(filepath.Join(dir, "cert"), filepath.Join(dir, "key"))
				return &tls.Config{Certificates: []tls.Certificate{cert}}, err
			}
		})
	}
}

// announce listens where a host expects its plugin to, and prints a handshake.
func announce(cert []byte) net.Listener {
	network, address := "unix", filepath.Join(os.Getenv(plugin.EnvUnixSocketDir), "s")
	if runtime.GOOS == "windows" {
		network, address = "tcp", "127.0.0.1:0"
	}
	l := must(net.Listen(network, address))
	fmt.Printf("1|3|%s|%s|netrpc|%s\n", network, l.Addr(), base64.RawStdEncoding.EncodeToString(cert))
	return l
}

// ---- Start ----

// badConfigs are configurations of which Start says what is wrong.
var badConfigs = []struct {
	name     string
	edit     func(*plugin.ClientConfig)
	reattach bool   // there is a process to reattach to, and no command
	word     string // in the error
	is       error  // what is returned as it is; nil for any
}{
	{name: "no command", word: "Cmd", edit: func(c *plugin.ClientConfig) { c.Cmd = nil }},
	{name: "a command and a process", word: "Cmd", edit: func(c *plugin.ClientConfig) {
		c.Reattach = &plugin.ReattachConfig{}
	}},
	{name: "no cookie", word: "MagicCookieKey", edit: func(c *plugin.ClientConfig) { c.MagicCookieKey = "" }},
	{name: "an empty cookie", word: "MagicCookieValue", edit: func(c *plugin.ClientConfig) {
		c.MagicCookieValue = ""
	}},
	{name: "no ports", word: "MaxPort", edit: func(c *plugin.ClientConfig) { c.MinPort, c.MaxPort = 20, 10 }},
	{name: "stdout of the command", word: "Stdout", edit: func(c *plugin.ClientConfig) {
		c.Cmd.Stdout = io.Discard
	}},
	{name: "stderr of the command", word: "Stderr", edit: func(c *plugin.ClientConfig) {
		c.Cmd.Stderr = io.Discard
	}},
	{name: "only gRPC", word: "netrpc", edit: func(c *plugin.ClientConfig) {
		c.AllowedProtocols = []plugin.Protocol{plugin.ProtocolGRPC}
	}},
	{name: "AutoMTLS", reattach: true, word: "Reattach", edit: func(c *plugin.ClientConfig) {
		c.AutoMTLS = true
	}},
	{name: "no address", reattach: true, word: "Addr", edit: func(c *plugin.ClientConfig) {
		c.Reattach.Addr = nil
	}},
	{name: "a process with gRPC", reattach: true, word: "gRPC", edit: func(c *plugin.ClientConfig) {
		c.Reattach.Protocol = plugin.ProtocolGRPC
	}},
	{name: "another version", reattach: true, word: "[3]", edit: func(c *plugin.ClientConfig) {
		c.Reattach.ProtocolVersion = 4
	}},
	{name: "no plugin", reattach: true, is: plugin.ErrProcessNotFound, edit: func(*plugin.ClientConfig) {}},
	{name: "a checksum of a process", reattach: true, is: plugin.ErrSecureConfigAndReattach,
		edit: func(c *plugin.ClientConfig) {
			c.SecureConfig = &plugin.SecureConfig{Checksum: []byte{1}, Hash: sha256.New()}
		}},
	{name: "no checksum", is: plugin.ErrSecureConfigNoChecksum, edit: func(c *plugin.ClientConfig) {
		c.SecureConfig = &plugin.SecureConfig{Hash: sha256.New()}
	}},
	{name: "no hash", is: plugin.ErrSecureConfigNoHash, edit: func(c *plugin.ClientConfig) {
		c.SecureConfig = &plugin.SecureConfig{Checksum: []byte{1}}
	}},
	{name: "another checksum", is: plugin.ErrChecksumsDoNotMatch, edit: func(c *plugin.ClientConfig) {
		c.SecureConfig = &plugin.SecureConfig{Checksum: []byte{1}, Hash: sha256.New()}
	}},
}

// Start says what is wrong with a configuration, each time, and the client is
// at its end.
func TestBadConfig(t *testing.T) {
	t.Parallel()
	for _, test := range badConfigs {
		t.Run(test.name, func(t *testing.T) {
			config := newLab(t).config("plugin")
			if test.reattach {
				config = attachTo(&plugin.ReattachConfig{
					ProtocolVersion: 3,
					Pid:             os.Getpid(),
					Addr:            parseAddr("127.0.0.1:1"),
				})
			}
			test.edit(config)
			c := plugin.NewClient(config)
			defer c.Kill()
			_, err := c.Start()
			errorSays(t, err, "plugin", test.word)
			if test.is != nil && err != test.is {
				t.Errorf("Start returned %v and not %v", err, test.is)
			}
			if _, again := c.Start(); again != err {
				t.Errorf("Start returned %v, and then %v", err, again)
			}
			if p, connecting := c.Client(); connecting != err || p != nil {
				t.Errorf("Start returned %v, and Client %v, %v", err, p, connecting)
			}
			receive(t, "Done", c.Done())
			if c.Err() != nil || !c.Exited() {
				t.Errorf("it is not over: %v, %v", c.Err(), c.Exited())
			}
			checkEqual(t, "Protocol", c.Protocol(), plugin.ProtocolInvalid)
			checkEqual(t, "NegotiatedVersion", c.NegotiatedVersion(), 0)
			checkEqual(t, "ReattachConfig", c.ReattachConfig(), nil)
		})
	}
}

// startFailure is a start that fails.
type startFailure struct {
	mode, say string // the mode, and what it prints
	edit      func(testing.TB, *plugin.ClientConfig)
	state     string // how the process exits by itself, if it does
	word      string // in the text
	without   string // not in it; "" for nothing
	is        error  // nil for any
}

func (f startFailure) run(t *testing.T) {
	t.Parallel()
	cfg := newLab(t).config(f.mode, sayEnv+"="+f.say)
	if f.edit != nil {
		f.edit(t, cfg)
	}
	c := plugin.NewClient(cfg)
	err := startError(t, c)
	errorSays(t, err, pluginName(cfg.Cmd.Path), f.word, f.state)
	if f.without != "" && strings.Contains(err.Error(), f.without) {
		t.Errorf("the error says %q:\n%v", f.without, err)
	}
	if f.state == "" && err.State != nil {
		t.Errorf("it exited by itself, with %v: %v", err.State, err)
	}
	if f.state != "" && (err.State == nil || err.State.String() != f.state) {
		t.Errorf("it exited with %v and not %s: %v", err.State, f.state, err)
	}
	if err.Path != cfg.Cmd.Path {
		t.Errorf("the error has the Path %s", err.Path)
	}
	if f.is != nil && !errors.Is(err, f.is) {
		t.Errorf("the error is not %v: %v", f.is, err)
	}
	receive(t, "Done", c.Done())
	if c.Err() != nil || cfg.Cmd.Process != nil && cfg.Cmd.ProcessState == nil {
		t.Errorf("Err is %v, and the process has ended with %v", c.Err(), cfg.Cmd.ProcessState)
	}
}

// A plugin that does not start says why. Its process is gone by then.
func TestStartError(t *testing.T) {
	t.Parallel()
	runs := func(path string) func(testing.TB, *plugin.ClientConfig) {
		return func(_ testing.TB, c *plugin.ClientConfig) { c.Cmd = exec.Command(path) }
	}
	impatient := func(_ testing.TB, c *plugin.ClientConfig) { c.StartTimeout = 2 * time.Second }
	mtls := func(_ testing.TB, c *plugin.ClientConfig) { c.AutoMTLS = true }
	ownCertificate := func(t testing.TB, c *plugin.ClientConfig) {
		testTLS(t, c)
		c.AutoMTLS = true
	}
	nowhere := func(_ testing.TB, c *plugin.ClientConfig) { c.Cmd.Dir = "/no/such/dir" }
	wrongCookie := func(_ testing.TB, c *plugin.ClientConfig) { c.MagicCookieValue = "wrong" }
	noFile := fs.ErrNotExist
	if runtime.GOOS == "windows" {
		noFile = exec.ErrNotFound
	}
	badCertificate := "1|3|unix|/s|netrpc|AAAA"
	endless := "1|" + strings.Repeat("x", 100_000) + "|unix|/s"
	late := context.DeadlineExceeded
	cookie := "the cookie " + testHandshake.MagicCookieKey
	for name, test := range map[string]startFailure{
		"exits":             {mode: "exit3", state: "exit status 3", word: "Serve"},
		"panics":            {mode: "panic", state: "exit status 2", word: "panic: boom"},
		"stdout, and exits": {mode: "say exit0", say: "jungle", state: "exit status 0", word: "jungle"},
		"stderr, and exits": {mode: "cry exit3", say: "jungle", state: "exit status 3", word: "jungle"},
		"stdout, and stays": {mode: "say wait", say: "jungle", edit: impatient, word: "jungle", is: late},
		"stays":             {mode: "wait", edit: impatient, word: "Serve", is: late},
		"too late":          {mode: "wait", edit: impatient, word: "StartTimeout", without: "interpreter"},
		"another cookie":    {mode: "plugin", edit: wrongCookie, state: "exit status 1", word: cookie},
		"gRPC":              {mode: "say wait", say: "1|3|unix|/s|grpc|", word: "gRPC"},
		"another core":      {mode: "say wait", say: "2|3|unix|/s|netrpc|", word: `"2|3|unix|/s|netrpc|"`},
		"behind other text": {mode: "say wait", say: "loading 2|3|unix|/s", word: `"2|3|unix|/s"`,
			without: "is no handshake"},
		"gibberish":           {mode: "say wait", say: "1|three|unix|/s", word: `"1|three|unix|/s"`},
		"numbers":             {mode: "say wait", say: "50|100", word: `"50|100"`},
		"a long handshake":    {mode: "say wait", say: endless, word: "handshake"},
		"no certificate":      {mode: "say wait", say: "1|3|unix|/s|netrpc|", edit: mtls, word: "AutoMTLS"},
		"a bad certificate":   {mode: "say wait", say: badCertificate, edit: mtls, word: "certificate"},
		"its own certificate": {mode: "tls", edit: ownCertificate, word: "TLSProvider"},
		"no file":             {edit: runs("/no/such/file"), word: "/no/such/file", is: noFile},
		"not in PATH":         {edit: runs("no-such-program"), word: "PATH", is: exec.ErrNotFound},
		"nowhere to run":      {edit: nowhere, word: "/such/dir", without: "interpreter", is: fs.ErrNotExist},
	} {
		t.Run(name, test.run)
	}
}

// startIn starts a client in a context and returns the error.
func startIn(t testing.TB, c *plugin.Client, ctx context.Context) error {
	t.Cleanup(c.Kill)
	_, err := c.StartContext(ctx)
	return err
}

// The end of its context ends a start, with the cause. A caller that waits for the
// start of another one leaves when its own context ends.
func TestStartContext(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	c := plugin.NewClient(l.config("wait"))
	reason := errors.New("the user has changed her mind")
	ctx, cancel := context.WithCancelCause(context.Background())
	first := async(func() error { return startIn(t, c, ctx) })
	l.read("plugin")
	deadline := newDeadlineContext()
	second := async(func() error { return startIn(t, c, deadline) })
	receive(t, "the wait of the second start", deadline.waits)
	deadline.pass()
	errorIs(t, "the second start", receive(t, "the second start", second), context.DeadlineExceeded)
	if len(first) > 0 || c.Exited() {
		t.Error("the first start has ended with the context of the second")
	}
	cancel(reason)
	err := receive(t, "the first start", first)
	errorIs(t, "the first start", err, context.Canceled)
	errorIs(t, "the first start", err, reason)
	if !isA[*plugin.StartError](err) {
		t.Errorf("the first start returned a %T", err)
	}
	l.deserted(slack)
}

// A start with a context that has ended fails. A context that ends after the
// start ends nothing.
func TestStartContextThatEndsBeforeOrAfter(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	ctx, cancel := context.WithCancel(context.Background())
	c := plugin.NewClient(l.config("plugin"))
	check(t, startIn(t, c, ctx))
	cancel()
	check(t, connect(c))
	err := startIn(t, plugin.NewClient(l.config("plugin")), ctx)
	errorIs(t, "a start with an ended context", err, context.Canceled)
}

// Without plugins, the host requires its ProtocolVersion, and Dispense fails.
func TestNoPlugins(t *testing.T) {
	t.Parallel()
	for _, plugins := range []plugin.PluginSet{nil, {}} {
		cfg := newLab(t).config("plugin")
		cfg.Plugins = plugins
		_, p := startPlugin(t, cfg)
		check(t, p.Ping())
		_, err := p.Dispense("test")
		errorSays(t, err, "ClientConfig")
		cfg.ProtocolVersion = 4
		err = startError(t, plugin.NewClient(cfg))
		var version *plugin.VersionError
		if !errors.As(err, &version) || version.Plugin != 3 || !slices.Equal(version.Host, []int{4}) {
			t.Errorf("another version: %v", err)
		}
	}
}

// ---- The configuration ----

// Nothing of the caller's changes but Cmd.Process and Cmd.ProcessState, not
// even behind the end of a slice. One configuration starts several plugins.
func TestConfigIsKept(t *testing.T) {
	t.Parallel()
	cfg := newLab(t).config("plugin")
	cmd := cfg.Cmd
	cmd.Env = append(make([]string, 0, len(cmd.Env)+9), cmd.Env...)
	cmd.Args = append(make([]string, 0, 9), cmd.Args...)
	cmd.ExtraFiles = make([]*os.File, 0, 9)
	if runtime.GOOS != "windows" {
		cmd.ExtraFiles = append(cmd.ExtraFiles, os.Stdin)
	}
	cfg.VersionedPlugins = map[int]plugin.PluginSet{1: testPlugins(nil)}
	cfg.AllowedProtocols = append(make([]plugin.Protocol, 0, 9), plugin.ProtocolGRPC, plugin.ProtocolNetRPC)
	cfg.SecureConfig = &plugin.SecureConfig{Checksum: sumOf(t, cmd.Path), Hash: sha256.New()}
	cfg.AutoMTLS = true
	// state describes all that must not change.
	state := func() string {
		kept, command := *cfg, *cmd
		kept.Cmd, command.Process, command.ProcessState = nil, nil, nil
		return fmt.Sprintf("%+v %+v %+v %x %q %q %v %q",
			kept, command, cfg.UnixSocketConfig, cfg.SecureConfig.Checksum,
			cmd.Env[:cap(cmd.Env)], cmd.Args[:9], cmd.ExtraFiles[:9], cfg.AllowedProtocols[:9])
	}
	before := state()
	var clients []*plugin.Client
	for range 2 {
		c, p := startPlugin(t, cfg)
		check(t, p.Ping())
		if strconv.Itoa(cmd.Process.Pid) != c.ID() || cmd.ProcessState != nil {
			t.Errorf("the command has %v, %v, and the plugin is %s", cmd.Process, cmd.ProcessState, c.ID())
		}
		clients = append(clients, c)
	}
	clients[0].Kill()
	if cmd.ProcessState != nil {
		t.Error("the end of the first process is taken for that of the second")
	}
	clients[1].Kill()
	if s := cmd.ProcessState; s == nil || strconv.Itoa(s.Pid()) != clients[1].ID() {
		t.Errorf("the command has %v", s)
	}
	checkEqual(t, "the configuration", state(), before)
}

// The variables of the handshake win over the command's, and those over the
// host's. None is left for the plugin's children.
func TestEnvironment(t *testing.T) {
	t.Setenv("TEST_HOST", "host")
	t.Setenv("TEST_BOTH", "host")
	t.Setenv("PLUGIN_OTHER", "host") // not the protocol's
	env := []string{"TEST_CMD=cmd", "TEST_BOTH=cmd", "GORACE=" + os.Getenv("GORACE")}
	protocol := append(slices.Clone(protocolVariables), testHandshake.MagicCookieKey)
	for _, name := range protocol {
		t.Setenv(name, "host")
		env = append(env, name+"=cmd")
	}
	for _, skip := range []bool{false, true} {
		cfg := newLab(t).config("plugin", env...)
		cfg.SkipHostEnv, cfg.MinPort, cfg.MaxPort = skip, 10000, 60000
		host := []string{"host"}
		if skip {
			host = nil
		}
		_, p := startPlugin(t, cfg)
		self := mustCall[Self](t, dispense(t, p).Client, "Self", struct{}{})
		for name, want := range map[string][]string{
			"TEST_HOST":                  host,
			"PLUGIN_OTHER":               host,
			"TEST_CMD":                   {"cmd"},
			"TEST_BOTH":                  {"cmd"},
			testHandshake.MagicCookieKey: {testHandshake.MagicCookieValue},
			versionsVariable:             {"3"},
			portMinVariable:              {"10000"},
			portMaxVariable:              {"60000"},
			multiplexVariable:            nil,
			plugin.EnvUnixSocketGroup:    nil,
		} {
			if got := envValues(self.Began, name); !slices.Equal(got, want) {
				t.Errorf("SkipHostEnv %v: %s is %q and not %q", skip, name, got, want)
			}
		}
		for _, name := range protocol {
			got := envValues(self.Began, name)
			if len(got) > 1 || slices.Contains(got, "cmd") || slices.Contains(got, "host") {
				t.Errorf("SkipHostEnv %v: %s is %q", skip, name, got)
			}
			if got := envValues(self.Env, name); len(got) > 0 {
				t.Errorf("%s is left in the plugin: %q", name, got)
			}
		}
	}
}

// A plugin's stdin is that of its command, or the host's.
func TestStdin(t *testing.T) {
	r, w, err := os.Pipe()
	check(t, err)
	defer r.Close()
	defer w.Close()
	defer func(stdin *os.File) { os.Stdin = stdin }(os.Stdin)
	os.Stdin = r
	_, err = w.WriteString("the host's")
	check(t, err)
	for want, stdin := range map[string]io.Reader{
		"the host's":    nil,
		"the command's": strings.NewReader("the command's"),
	} {
		cfg := newLab(t).config("plugin")
		cfg.Cmd.Stdin = stdin
		_, p := startPlugin(t, cfg)
		checkEqual(t, "what it read", mustCall[string](t, dispense(t, p).Client, "Stdin", len(want)), want)
	}
}

// A host and its plugin print nothing by themselves.
func TestQuiet(t *testing.T) {
	t.Parallel()
	host := newLab(t).start("host quiet idle kill", childEnv+"=plugin")
	receive(t, "the host's end", host.ended)
	if text := host.output.String(); text != "" || !host.ProcessState.Success() {
		t.Errorf("the host ended with %v, and printed: %s", host.ProcessState, text)
	}
}

// Writers of the host's that fail stop neither the plugin nor Kill.
func TestBadWriters(t *testing.T) {
	t.Parallel()
	cfg := newLab(t).config("plugin")
	cfg.KillTimeout = time.Second
	bad := writerFunc(func([]byte) (int, error) { return 0, io.ErrClosedPipe })
	cfg.SyncStdout, cfg.SyncStderr, cfg.Stderr = bad, bad, bad
	c, p := startPlugin(t, cfg)
	test := dispense(t, p)
	text := strings.Repeat("x", 3*streamWindow)
	mustCall[struct{}](t, test.Client, "Print", Output{Stdout: text, Stderr: text, Raw: text})
	echo(t, test.Client)
	within(t, "Kill", cfg.KillTimeout+2*time.Second, c.Kill)
	if !c.Exited() || c.Err() != nil || cfg.Cmd.ProcessState == nil {
		t.Error("the plugin lives:", c.Exited(), c.Err())
	}
}

// ---- Kill ----

// killMoment is a moment at which Kill is called.
type killMoment struct {
	mode       string
	tls        bool
	reached    func(testing.TB, *plugin.Client, *lab) bool // reports whether it has come
	interrupts bool                                        // Kill is the error of connecting
}

var killMoments = map[string]killMoment{
	"starting":      {mode: "wait", reached: noted("plugin"), interrupts: true},
	"TLS":           {mode: "deaf", tls: true, reached: noted("connected"), interrupts: true},
	"dispensing":    {mode: "deaf", reached: noted("connected"), interrupts: true},
	"at any moment": {mode: "plugin", reached: hasID},
	"stubborn":      {mode: "plugin endless", reached: connected},
}

// noted is the moment at which a plugin has left a note.
func noted(name string) func(testing.TB, *plugin.Client, *lab) bool {
	return func(_ testing.TB, _ *plugin.Client, l *lab) bool { return l.noted(name) }
}

// hasID is the moment at which the process of a client runs.
func hasID(_ testing.TB, c *plugin.Client, _ *lab) bool { return c.ID() != "" }

// connected is the moment at which a client has dispensed a plugin.
func connected(_ testing.TB, c *plugin.Client, _ *lab) bool { return connect(c) == nil }

// Kill may be called at any time, by several callers, and has a bound. What it
// interrupts says so.
func TestKill(t *testing.T) {
	t.Parallel()
	for name, test := range killMoments {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			l := newLab(t)
			cfg := l.config(test.mode)
			cfg.KillTimeout = 500 * time.Millisecond
			if test.tls {
				cfg.TLSConfig = &tls.Config{InsecureSkipVerify: true}
			}
			c := plugin.NewClient(cfg)
			connecting := async(func() error { return connect(c) })
			await(t, name, func() bool { return test.reached(t, c, l) })
			killByMany(t, c, cfg.KillTimeout)
			err := receive(t, "connecting", connecting)
			if test.interrupts {
				errorSays(t, err, "Kill")
			}
		})
	}
}

// A client that was killed before its start does not start a process.
func TestKillBeforeStart(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	c := plugin.NewClient(l.config("plugin"))
	killByMany(t, c, 0)
	errorSays(t, connect(c), "Kill")
	if l.noted("plugin") || c.ID() != "" {
		t.Error("it was started all the same")
	}
}

// killByMany calls Kill several times at once. When it has returned, the client is at
// its end.
func killByMany(t *testing.T, c *plugin.Client, killTimeout time.Duration) {
	t.Helper()
	concurrently(t, 4, func(int) {
		within(t, "Kill", killTimeout+2*time.Second, c.Kill)
		if !isClosed(c.Done()) || !c.Exited() || c.Err() != nil {
			t.Errorf("Kill has returned: %v, %v", c.Exited(), c.Err())
		}
	})
	if p, err := c.Client(); err == nil || p != nil {
		t.Error("Client returned a connection after Kill")
	}
}

// Kill ends calls in flight and lets main finish. Its last output has been
// delivered by then.
func TestKillIsGentle(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	cfg := l.config("plugin cry", sayEnv+"=last words")
	var stderr syncBuffer
	cfg.Stderr = &stderr
	c, p := startPlugin(t, cfg)
	test := dispense(t, p)
	errs := test.block(t, 4)
	text := strings.Repeat(strings.Repeat("x", 99)+"\n", 10_000)
	mustCall[struct{}](t, test.Client, "Print", Output{Raw: text})
	c.Kill()
	if got := stderr.String(); !strings.HasPrefix(got, text) || !strings.HasSuffix(got, "last words\n") {
		t.Errorf("of %d bytes arrived %d", len(text), len(got))
	}
	if !l.noted("plugin finished") || !cfg.Cmd.ProcessState.Success() || c.Err() != nil {
		t.Errorf("main has not finished: %v, %v", cfg.Cmd.ProcessState, c.Err())
	}
	for range cap(errs) {
		errorIs(t, "a call in flight", receive(t, "a call", errs), rpc.ErrShutdown)
	}
	within(t, "a second Kill", 0, c.Kill)
}

// When Kill has returned, no Write of the host's writers begins.
func TestNoWriteAfterKill(t *testing.T) {
	left := takeStock(os.TempDir())
	cfg := testConfig("plugin")
	cfg.KillTimeout = 500 * time.Millisecond
	var begun atomic.Int32
	release := make(chan struct{})
	slow := writerFunc(func(p []byte) (int, error) {
		begun.Add(1)
		<-release
		return len(p), nil
	})
	cfg.SyncStdout, cfg.SyncStderr, cfg.Stderr = slow, slow, slow
	c, p := startPlugin(t, cfg)
	text := strings.Repeat("x", 60_000) // more than is written at once
	test := dispense(t, p)
	printing := async(func() error { // may not return before Kill
		return test.Call("Plugin.Print", Output{Stdout: text, Stderr: text, Raw: text}, new(struct{}))
	})
	await(t, "output", func() bool { return begun.Load() == 3 })
	c.Kill()
	close(release)
	receive(t, "the end of printing", printing)
	checkEqual(t, "what is left when all Writes have returned", left(), "")
	checkEqual(t, "Writes", begun.Load(), 3)
}

// A Logger that blocks does not hold Kill beyond its bound, and saves no plugin.
func TestKillPastLogger(t *testing.T) {
	t.Parallel()
	for _, when := range []string{"starting", "serving"} {
		t.Run(when, func(t *testing.T) {
			t.Parallel()
			l := newLab(t)
			cfg := l.config("plugin endless")
			cfg.KillTimeout = 500 * time.Millisecond
			var blocks atomic.Bool
			release := make(chan struct{})
			defer close(release)
			output := writerFunc(func(p []byte) (int, error) {
				if blocks.Load() {
					<-release
				}
				return len(p), nil
			})
			cfg.Logger = hclog.New(&hclog.LoggerOptions{Level: hclog.Trace, Output: output})
			c := plugin.NewClient(cfg)
			if when == "starting" {
				blocks.Store(true)
				go c.Start() // ends when the Logger does
				l.read("plugin")
			} else {
				p, err := c.Client()
				check(t, err)
				test := dispense(t, p)
				blocks.Store(true)
				text := strings.Repeat("a line to be logged\n", 10_000) // more than is written at once
				mustCall[struct{}](t, test.Client, "Print", Output{Stdout: text})
			}
			within(t, "Kill", cfg.KillTimeout+2*time.Second, c.Kill)
			if !c.Exited() || c.Err() != nil {
				t.Errorf("after Kill, Exited is %v and Err %v", c.Exited(), c.Err())
			}
			l.deserted(slack)
		})
	}
}

// The end of the context of a command kills every process that was started with it.
func TestSharedContext(t *testing.T) {
	t.Parallel()
	for _, own := range []bool{false, true} {
		t.Run(fmt.Sprintf("own Cancel %v", own), func(t *testing.T) {
			t.Parallel()
			ctx, cancel := context.WithCancel(context.Background())
			defer cancel()
			cfg := newLab(t).config("plugin endless")
			cmd := exec.CommandContext(ctx, cfg.Cmd.Path)
			cmd.Env, cmd.WaitDelay = cfg.Cmd.Env, time.Minute
			cfg.Cmd = cmd
			var cancelled []string // is not guarded: Cancel is called in turn
			if own {
				cmd.Cancel = func() error {
					cancelled = append(cancelled, strconv.Itoa(cmd.Process.Pid))
					return cmd.Process.Kill()
				}
			}
			clients := make([]*plugin.Client, 3)
			concurrently(t, len(clients), func(i int) {
				clients[i] = plugin.NewClient(cfg)
				t.Cleanup(clients[i].Kill)
				err := connect(clients[i])
				if err != nil {
					t.Error(err)
				}
			})
			cancel()
			var pids []string
			for _, c := range clients {
				receive(t, "the end of a process", c.Done())
				errorSays(t, c.Err(), "plugin")
				pids = append(pids, c.ID())
			}
			slices.Sort(pids)
			slices.Sort(cancelled)
			if own && !slices.Equal(cancelled, pids) {
				t.Errorf("Cancel was called for %v and not for %v", cancelled, pids)
			}
		})
	}
}

// A plugin that does not exit is killed after KillTimeout, by default two
// seconds. One that was reattached to is killed if its socket tells whose it is.
func TestKillReattached(t *testing.T) {
	t.Parallel()
	first, _ := startPlugin(t, detached(newLab(t).config("plugin endless")))
	c, _ := startPlugin(t, attachTo(first.ReattachConfig()))
	began := time.Now()
	within(t, "Kill", 4*time.Second, c.Kill)
	if took := time.Since(began); took < 1900*time.Millisecond || !c.Exited() || c.Err() != nil {
		t.Errorf("it was killed after %v: %v, %v", took, c.Exited(), c.Err())
	}
	if runtime.GOOS == "windows" {
		if first.Exited() {
			t.Error("a process is killed that may not be the plugin")
		}
		return
	}
	receive(t, "the plugin's end", first.Done())
	errorSays(t, first.Err(), "killed")
}

// CleanupClients kills all managed clients, at once, and no other.
func TestCleanupClients(t *testing.T) {
	l := newLab(t)
	_, other := startPlugin(t, l.config("plugin"))
	cfg := l.config("plugin")
	cfg.Managed = true
	clients := []*plugin.Client{plugin.NewClient(cfg)} // never started
	for range 2 {
		c, _ := startPlugin(t, cfg)
		clients = append(clients, c)
	}
	clients[1].Kill()
	var finishing []*lab // of plugins of which each waits until all have been asked to quit
	for range 3 {
		l := newLab(t)
		cfg := l.config("plugin finishing")
		cfg.Managed, cfg.KillTimeout = true, forever
		c, _ := startPlugin(t, cfg)
		t.Cleanup(func() { l.write("finish", "") })
		clients = append(clients, c)
		finishing = append(finishing, l)
	}
	cleaned := async(func() bool {
		plugin.CleanupClients()
		return true
	})
	for _, l := range finishing {
		l.read("finishing")
	}
	for _, l := range finishing {
		l.write("finish", "")
	}
	receive(t, "the end of CleanupClients", cleaned)
	for i, c := range clients {
		if !c.Exited() || c.Err() != nil {
			t.Errorf("client %d: %v, %v", i, c.Exited(), c.Err())
		}
	}
	dispenseAndEcho(t, other)
}

// ---- The end ----

// An end that nobody asked for is logged once, with the plugin's name, its pid
// and what is known of the cause. An end that was asked for, or a start that
// failed, is logged at Debug. A line before the handshake is a warning.
func TestEndIsLogged(t *testing.T) {
	t.Parallel()
	do := func(how string) func(*plugin.Client, plugin.ClientProtocol) {
		return func(_ *plugin.Client, p plugin.ClientProtocol) {
			if test, err := plugin.Dispense[*testClient](p, "test"); err == nil {
				_ = test.Call("Plugin.Do", how, new(string))
			}
		}
	}
	kill := func(c *plugin.Client, _ plugin.ClientProtocol) { c.Kill() }
	closeIt := func(_ *plugin.Client, p plugin.ClientProtocol) { _ = p.Close() }
	for name, test := range map[string]struct {
		mode  string
		end   func(*plugin.Client, plugin.ClientProtocol)
		level hclog.Level
		word  string
	}{
		"panic":  {"say plugin", do("panic"), hclog.Error, "panic: boom"},
		"exit3":  {"say plugin", do("exit3"), hclog.Error, "exit status 3"},
		"killed": {"say plugin", do("killed"), hclog.Error, killedState},
		"exit0":  {"say plugin", do("exit0"), hclog.Info, "exit status 0"},
		"Kill":   {"say plugin", kill, hclog.Debug, `reason="exit status 0"`},
		"Close":  {"say plugin", closeIt, hclog.Debug, `reason="exit status 0"`},
		"start":  {"say exit3", nil, hclog.Debug, `reason="exit status 3"`},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			logger, log := recorder()
			cfg := newLab(t).config(test.mode, sayEnv+"=a banner | of a library\n") // and an empty line
			cfg.Logger = logger
			c := plugin.NewClient(cfg)
			t.Cleanup(c.Kill)
			if p, err := c.Client(); err == nil {
				test.end(c, p)
			}
			receive(t, "Done", c.Done())
			c.Kill()
			ofProcess := func() []logRecord { return log.findText("pid=" + strconv.Quote(c.ID())) }
			await(t, "the records of start and end", func() bool { return len(ofProcess()) >= 2 })
			end := ofProcess()[1]
			if len(ofProcess()) != 2 || end.level != test.level {
				t.Errorf("logged: %v", ofProcess())
			}
			for _, word := range []string{test.word, pluginName(cfg.Cmd.Path)} {
				if !strings.Contains(end.String(), word) {
					t.Errorf("%q is not in the record %v", word, end)
				}
			}
			banner := log.find("handshake")
			if len(banner) != 1 || banner[0].level != hclog.Warn {
				t.Fatalf("the line before the handshake is logged as %v", banner)
			}
			if !strings.Contains(banner[0].String(), "a banner") {
				t.Errorf("the line before the handshake is not in %v", banner[0])
			}
		})
	}
}

// After a crash, Exited is true by the time that any failed call has returned,
// also one that began after the connection broke.
func TestExitedAfterCrash(t *testing.T) {
	t.Parallel()
	for range 3 {
		cfg := newLab(t).config("plugin")
		c, p := startPlugin(t, cfg)
		test := dispense(t, p)
		calls := []func() error{
			func() error { return test.Call("Plugin.Echo", "x", new(string)) },
			func() error { return callIn(context.Background(), test.Client, "Echo") },
			func() error { return dispensing(p) },
			p.Ping,
		}
		crash := time.AfterFunc(20*time.Millisecond, func() { _ = cfg.Cmd.Process.Kill() })
		defer crash.Stop()
		concurrently(t, 20, func(i int) {
			failed := 0
			for failed < 5 {
				time.Sleep(time.Duration(i) * 100 * time.Microsecond) // so that calls begin at all times
				if err := calls[i%len(calls)](); err != nil {
					failed++
					if !c.Exited() {
						t.Errorf("call %d has returned %v, and Exited is false", i%len(calls), err)
					}
				}
			}
		})
	}
}

// ---- Test mode ----

// In test mode Kill and CleanupClients do nothing, and nothing is watched.
func TestTestModeClient(t *testing.T) {
	leavesNothing(t)
	rc, stop, _ := serveTestMode(t, plugin.ServeTestConfig{})
	rc.ReattachFunc = func() (plugin.AttachedRunner, error) {
		t.Error("ReattachFunc was called")
		return nil, plugin.ErrProcessNotFound
	}
	cfg := attachTo(rc)
	cfg.Managed = true
	c := plugin.NewClient(cfg)
	var p plugin.ClientProtocol
	for range 2 {
		c.Kill()
		plugin.CleanupClients()
		again, err := c.Client()
		check(t, err)
		if p != nil && again != p {
			t.Error("Client returned another connection")
		}
		p = again
		dispenseAndEcho(t, p)
	}
	check(t, p.Close())
	stop()
	if c.Exited() || isClosed(c.Done()) || c.Err() != nil || c.ID() != "" {
		t.Error("it is watched:", c.Exited(), c.Err(), c.ID())
	}
}
