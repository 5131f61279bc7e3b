package plugin_test

import (
	"context"
	"crypto/sha256"
	"errors"
	"io"
	"io/fs"
	"net"
	"os"
	"reflect"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/muxplug/plugin"
)

// ---- Hosts in their own processes ----

// orphanTest is a host that ends, and its plugin with it.
type orphanTest struct {
	plugin, host string
	end          func(testing.TB, *testProcess) // of a host that does not end by itself
	endless      bool                           // the plugin's main is
}

var orphanTests = []orphanTest{
	{plugin: "late plugin", host: "host starting ready wait"},
	{plugin: "plugin say cry", host: "host started ready wait"},
	{plugin: "plugin say cry", host: "host idle ready panic"},
	{plugin: "plugin say cry", host: "host calling ready exit3"},
	{plugin: "nest plugin", host: "host calling ready wait"},
	{plugin: "plugin endless", host: "host idle ready wait", endless: true},
}

func init() {
	// A plugin that is a host in turn.
	modes["nest"] = func() { must(plugin.NewClient(testConfig("plugin")).Start()) }
}

// Plugins exit with their hosts, whenever and however those end.
func TestOrphans(t *testing.T) {
	t.Parallel()
	for _, test := range orphanTests {
		t.Run(test.plugin+", "+test.host, func(t *testing.T) {
			t.Parallel()
			l := newLab(t)
			host := l.start(test.host, childEnv+"="+test.plugin)
			l.read("host is ready")
			if test.end != nil {
				test.end(t, host)
			} else if strings.HasSuffix(test.host, "wait") {
				host.kill(t)
			}
			receive(t, "the host's end", host.ended)
			l.write("serve", "")
			l.deserted(orphanTimeout + slack)
			if !test.endless {
				l.read("plugin finished")
			}
		})
	}
}

// ---- Processes of other hosts ----

// A plugin whose host is gone is used by the next host, and killed by the last.
func TestReattach(t *testing.T) {
	t.Parallel()
	for _, mode := range []string{"host detaching idle", "host idle reattachable"} {
		if runtime.GOOS == "windows" && strings.HasSuffix(mode, "reattachable") {
			continue // which does not detach it there
		}
		t.Run(mode, func(t *testing.T) {
			t.Parallel()
			l := newLab(t)
			receive(t, "the first host's end", l.start(mode, childEnv+"=plugin say cry").ended)
			address, pid := l.read("address"), l.read("plugin")
			// The host has plugins of one version only, so rc needs none.
			rc := &plugin.ReattachConfig{Addr: parseAddr(address), Pid: l.readPid("plugin")}
			cfg := attachTo(rc)
			var stdout syncBuffer
			cfg.SyncStdout = &stdout
			c, p := startPlugin(t, cfg)
			test := dispense(t, p)
			// Nothing reads the process's own stderr, and that is not its end.
			_ = test.Call("Plugin.Print", Output{Stdout: "for this host", Raw: "for nobody"}, new(struct{}))
			await(t, "output", func() bool { return stdout.String() == "for this host" })
			if c.ID() != pid || c.NegotiatedVersion() != 3 || c.Exited() {
				t.Errorf("reattached: %s, %d, %v", c.ID(), c.NegotiatedVersion(), c.Exited())
			}
			if got := c.ReattachConfig(); !reflect.DeepEqual(got, rc) {
				t.Errorf("reattached with %+v, and not %+v", got, rc)
			}
			last := l.start("host attaching idle kill", childEnv+"="+address+" "+pid)
			receive(t, "the last host's end", last.ended)
			l.read("plugin finished")
			receive(t, "Done", c.Done())
			var exit *plugin.ExitError
			if !errors.As(c.Err(), &exit) || exit.State != nil {
				t.Errorf("Err is %v", c.Err())
			}
			if _, err := plugin.NewClient(cfg).Start(); err != plugin.ErrProcessNotFound {
				t.Errorf("reattaching to what is gone returned %v", err)
			}
		})
	}
}

// A process that may not be the plugin is never signalled.
func TestStranger(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	dead := l.start("exit0")
	receive(t, "an end", dead.ended)
	stranger := l.start("late")
	pid := stranger.Process.Pid
	guest, _ := startPlugin(t, detached(newLab(t).config("plugin")))
	other, _ := startPlugin(t, detached(newLab(t).config("plugin")))
	silent, now := l.silent("plugin-1-1"), context.Background()
	ended, cancel := context.WithCancel(now)
	cancel()
	notFound := plugin.ErrProcessNotFound
	its := guest.ReattachConfig().Addr
	tests := []struct {
		name string
		rc   *plugin.ReattachConfig
		ctx  context.Context
		err  error
	}{
		{"dead", &plugin.ReattachConfig{Pid: dead.Process.Pid, Addr: silent}, now, notFound},
		{"no pid", &plugin.ReattachConfig{Addr: silent}, now, notFound},
		{"a process group", &plugin.ReattachConfig{Pid: -pid, Addr: silent}, now, notFound},
		{"nobody listens", &plugin.ReattachConfig{Pid: pid, Addr: parseAddr("127.0.0.1:1")}, now, notFound},
		{"not its socket", &plugin.ReattachConfig{Pid: pid, Addr: silent}, now, nil},
		{"the plugin's socket", &plugin.ReattachConfig{Pid: pid, Addr: its}, now, nil},
		{"no time to look", other.ReattachConfig(), ended, context.Canceled},
	}
	concurrently(t, len(tests), func(i int) {
		test := tests[i]
		c := plugin.NewClient(attachTo(test.rc))
		_, err := c.StartContext(test.ctx)
		errorIs(t, test.name, err, test.err)
		if test.err == notFound && err != notFound {
			t.Errorf("%s: the error is wrapped: %v", test.name, err)
		}
		within(t, "Kill", 4*time.Second, c.Kill)
		if !c.Exited() {
			t.Errorf("%s: Kill has returned, and Exited is false", test.name)
		}
	})
	receive(t, "the end of a plugin that was asked to quit", guest.Done())
	l.write("serve", "")
	receive(t, "the stranger's end", stranger.ended)
	if !stranger.ProcessState.Success() {
		t.Error("the stranger was harmed:", stranger.ProcessState)
	}
}

// testRunner is an AttachedRunner.
type testRunner struct {
	ended        chan error           // Wait returns what it receives
	waits, kills chan context.Context // of Wait and Kill
	stuck        bool                 // they ignore it
}

// config is for a plugin whose process is r. There is no such pid.
func (r *testRunner) config(addr net.Addr) *plugin.ReattachConfig {
	return &plugin.ReattachConfig{
		ProtocolVersion: 3,
		Addr:            addr,
		Pid:             -1,
		ReattachFunc:    func() (plugin.AttachedRunner, error) { return r, nil },
	}
}

func newTestRunner(t testing.TB, stuck bool) *testRunner {
	r := &testRunner{make(chan error, 1), make(chan context.Context, 9), make(chan context.Context, 9), stuck}
	if stuck {
		t.Cleanup(func() { close(r.ended) })
	}
	return r
}

func (r *testRunner) Wait(ctx context.Context) error {
	r.waits <- ctx
	if r.stuck {
		ctx = context.Background()
	}
	select {
	case err := <-r.ended:
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (r *testRunner) Kill(ctx context.Context) error {
	r.kills <- ctx
	if r.stuck {
		<-r.ended
	}
	return nil
}

func (*testRunner) ID() string { return "box 7" }

var errBox = errors.New("the box has fallen over")

// boxed is a plugin that a client knows through a runner.
type boxed struct {
	client  *plugin.Client
	test    *testClient
	runner  *testRunner
	process *os.Process
}

// startBoxed starts a plugin and reattaches to it through a runner, which learns of
// the plugin's end if it is told.
func startBoxed(t *testing.T, mode string, told bool) boxed {
	t.Helper()
	cfg := detached(newLab(t).config(mode))
	first, _ := startPlugin(t, cfg)
	r := newTestRunner(t, false)
	if told {
		go func() { // ends with the plugin
			<-first.Done()
			r.ended <- errBox
		}()
	}
	second := attachTo(r.config(first.ReattachConfig().Addr))
	c, p := startPlugin(t, second)
	if c.ID() != r.ID() || c.Exited() || c.Err() != nil {
		t.Errorf("reattached: %s, %v, %v", c.ID(), c.Exited(), c.Err())
	}
	return boxed{c, dispense(t, p), r, cfg.Cmd.Process}
}

// A plugin that a runner knows is asked to quit, and the runner is not to kill it.
// The wait for it is cancelled.
func TestRunnerIsNotAskedToKill(t *testing.T) {
	t.Parallel()
	b := startBoxed(t, "plugin", true)
	waiting := receive(t, "Wait", b.runner.waits)
	b.client.Kill()
	if !b.client.Exited() || b.client.Err() != nil || len(b.runner.kills) > 0 {
		t.Error("after Kill:", b.client.Exited(), b.client.Err(), len(b.runner.kills))
	}
	if waiting.Err() == nil {
		t.Error("the context of Wait has not ended")
	}
}

// A plugin that does not quit is killed through its runner, which is waited for.
func TestRunnerKills(t *testing.T) {
	t.Parallel()
	b := startBoxed(t, "plugin endless", true)
	waiting := receive(t, "Wait", b.runner.waits)
	killing := async(func() bool {
		b.client.Kill()
		return true
	})
	ctx := receive(t, "Kill", b.runner.kills)
	if waiting.Err() != nil || ctx.Err() != nil {
		t.Error("the contexts have ended:", waiting.Err(), ctx.Err())
	}
	_ = b.process.Kill()
	receive(t, "Client.Kill", killing)
	if !b.client.Exited() || b.client.Err() != nil || len(b.runner.kills) > 0 {
		t.Error("after Kill:", b.client.Exited(), b.client.Err(), len(b.runner.kills))
	}
	if waiting.Err() == nil {
		t.Error("the context of Wait has not ended")
	}
}

// The error of a runner is that of the calls in flight when its plugin exits, and
// of Err.
func TestRunnerTellsOfCrash(t *testing.T) {
	t.Parallel()
	b := startBoxed(t, "plugin", true)
	for _, err := range []error{b.test.Call("Plugin.Do", "exit3", new(string)), b.client.Err()} {
		errorSays(t, err, errBox.Error())
		if !b.client.Exited() || !errors.Is(err, errBox) || !isA[*plugin.ExitError](err) {
			t.Errorf("Exited is %v, and the error %v", b.client.Exited(), err)
		}
	}
}

// The end of a process ends its connection, which may outlive it: a child may have
// it.
func TestRunnerEndsConnection(t *testing.T) {
	t.Parallel()
	b := startBoxed(t, "plugin", false)
	errs := b.test.block(t, 4)
	b.runner.ended <- errBox
	for range cap(errs) {
		err := receive(t, "a call", errs)
		if !errors.Is(err, errBox) || !b.client.Exited() {
			t.Errorf("Exited is %v, and a call in flight returned %v", b.client.Exited(), err)
		}
	}
}

// A plugin whose connection is lost is not taken for dead while its runner says
// nothing.
func TestRunnerOutlivesConnection(t *testing.T) {
	t.Parallel()
	b := startBoxed(t, "plugin", false)
	_ = b.process.Kill()
	err := b.test.Call("Plugin.Block", "", new(string))
	errorIs(t, "a call in flight", err, io.ErrUnexpectedEOF)
	if b.client.Exited() || b.client.Err() != nil || isA[*plugin.ExitError](err) {
		t.Errorf("the process is taken for dead, %v, with %v", b.client.Exited(), err)
	}
}

// A runner that ignores its contexts does not keep Kill from returning.
func TestStuckRunner(t *testing.T) {
	t.Parallel()
	r := newTestRunner(t, true)
	cfg := attachTo(r.config(newLab(t).silent("s")))
	cfg.KillTimeout = 100 * time.Millisecond
	c, _ := startPlugin(t, cfg)
	within(t, "Kill", cfg.KillTimeout+2*time.Second, c.Kill)
	waiting, killing := receive(t, "Wait", r.waits), receive(t, "Kill", r.kills)
	if !c.Exited() || c.Err() != nil || waiting.Err() == nil || killing.Err() == nil {
		t.Error("after Kill:", c.Exited(), c.Err(), waiting.Err(), killing.Err())
	}
}

// findingBy returns a client whose process is found by a ReattachFunc.
func findingBy(t *testing.T, find func() (plugin.AttachedRunner, error)) *plugin.Client {
	t.Helper()
	rc := &plugin.ReattachConfig{Addr: newLab(t).silent("s"), ReattachFunc: find}
	c := plugin.NewClient(attachTo(rc))
	t.Cleanup(c.Kill)
	return c
}

// The error of ReattachFunc is that of Start. ErrProcessNotFound is returned as it
// is, and instead of no runner.
func TestReattachFuncFails(t *testing.T) {
	t.Parallel()
	find := func(err error) func() (plugin.AttachedRunner, error) {
		return func() (plugin.AttachedRunner, error) { return nil, err }
	}
	_, err := findingBy(t, find(errBox)).Start()
	errorIs(t, "another error", err, errBox)
	for _, found := range []error{plugin.ErrProcessNotFound, nil} {
		if _, err := findingBy(t, find(found)).Start(); err != plugin.ErrProcessNotFound {
			t.Errorf("Start returned %v, where %v was found", err, found)
		}
	}
}

// A panic of ReattachFunc stays one, and Kill works.
func TestReattachFuncPanics(t *testing.T) {
	t.Parallel()
	c := findingBy(t, func() (plugin.AttachedRunner, error) { panic(errBox) })
	checkEqual[any](t, "the panic of Start", panics(func() { _, _ = c.Start() }), errBox)
	within(t, "Kill", 0, c.Kill)
	_, err := c.Start()
	errorSays(t, err, "panicked")
}

// ---- SecureConfig ----

// sumOf returns the SHA-256 checksum of a file.
func sumOf(t testing.TB, path string) []byte {
	t.Helper()
	data, err := os.ReadFile(path)
	check(t, err)
	sum := sha256.Sum256(data)
	return sum[:]
}

// One SecureConfig may be used again, and by several clients at once.
func TestSecureConfig(t *testing.T) {
	t.Parallel()
	path := os.Args[0]
	hash := sha256.New()
	hash.Write([]byte("used before"))
	right := &plugin.SecureConfig{Checksum: sumOf(t, path), Hash: hash}
	concurrently(t, 6, func(i int) {
		cfg := testConfig("plugin")
		cfg.SecureConfig = right
		c := plugin.NewClient(cfg)
		defer c.Kill()
		ok, err := right.Check(path)
		if i%2 == 0 {
			err = connect(c)
		}
		if err != nil || !ok {
			t.Error(ok, err)
		}
	})
	wrong := append([]byte{right.Checksum[0] + 1}, right.Checksum[1:]...)
	for _, test := range []struct {
		secure *plugin.SecureConfig
		file   string
		err    error
	}{
		{&plugin.SecureConfig{Checksum: wrong, Hash: hash}, path, nil},
		{&plugin.SecureConfig{Checksum: right.Checksum[:16], Hash: hash}, path, nil},
		{&plugin.SecureConfig{Hash: hash}, path, plugin.ErrSecureConfigNoChecksum},
		{&plugin.SecureConfig{Checksum: wrong}, path, plugin.ErrSecureConfigNoHash},
		{right, path + ".missing", fs.ErrNotExist},
	} {
		if ok, err := test.secure.Check(test.file); ok || !errors.Is(err, test.err) {
			t.Errorf("Check returned %v, %v and not %v", ok, err, test.err)
		}
	}
}

// A Stdin of the caller's that is not a file, and blocks, does not hold up the end of its plugin.
func TestBlockingStdin(t *testing.T) {
	t.Parallel()
	release := make(chan struct{})
	t.Cleanup(func() { close(release) })
	cfg := testConfig("plugin")
	cfg.Cmd.Stdin = readerFunc(func([]byte) (int, error) {
		<-release
		return 0, io.EOF
	})
	c, p := startPlugin(t, cfg)
	_ = dispense(t, p).Call("Plugin.Do", "exit3", new(string))
	receive(t, "Done", c.Done())
	errorSays(t, c.Err(), "exit status 3")
}
