package plugin_test

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"net"
	"os"
	"reflect"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/muxplug/plugin"
)

// ---- What is left behind ----

// ---- Labs: processes that tests watch and kill ----

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

// ---- Torture ----

// errWrong is a wrong reply.
var errWrong = errors.New("a wrong reply")

// traffic makes calls, streams and prints until ctx ends or a call fails.
func (c *testClient) traffic(ctx context.Context, progress func()) error {
	for n := 0; ctx.Err() == nil; n++ {
		progress()
		data := string(noise(1+n*7919%200_000, rand.Uint64()))
		got := data
		var err error
		switch n % 3 {
		case 0:
			err = plugin.Call(ctx, c.Client, "Plugin.Echo", data, &got)
		case 1:
			var back syncBuffer
			from, stopReader := c.broker.ServeReader(strings.NewReader(data))
			to, stopWriter := c.broker.ServeWriter(&back)
			err = plugin.Call(ctx, c.Client, "Plugin.Copy", Transfer{Reader: from, Writer: to}, new(int64))
			stopReader()
			stopWriter()
			got = back.String()
		case 2:
			text := fmt.Sprintf("%x\n", data[:min(len(data), 5000)])
			err = c.Call("Plugin.Print", Output{Stdout: text, Stderr: text}, new(struct{}))
		}
		if err != nil {
			return err
		}
		if got != data {
			return errWrong
		}
	}
	return nil
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
			rc := &plugin.ReattachConfig{Addr: parseAddr(address), Pid: l.readPid("plugin")} // there is but one version
			cfg := attachTo(rc)
			var stdout syncBuffer
			cfg.SyncStdout = &stdout
			c, p := startPlugin(t, cfg)
			test := dispense(t, p)
			_ = test.Call("Plugin.Print", Output{"for this host", "", "for nobody", ""}, new(struct{})) // nor is that its end
			await(t, "output", func() bool { return stdout.String() == "for this host" })
			if c.ID() != pid || c.NegotiatedVersion() != 3 || c.Exited() || !reflect.DeepEqual(c.ReattachConfig(), rc) {
				t.Errorf("reattached: %s, %d, %v, %+v", c.ID(), c.NegotiatedVersion(), c.Exited(), c.ReattachConfig())
			}
			receive(t, "the last host's end", l.start("host attaching idle kill", childEnv+"="+address+" "+pid).ended)
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
	guest, _ := startPlugin(t, newLab(t).config("plugin"))
	other, _ := startPlugin(t, newLab(t).config("plugin"))
	silent, now := l.silent("plugin-1-1"), context.Background()
	ended, cancel := context.WithCancel(now)
	cancel()
	tests := []struct {
		name string
		rc   *plugin.ReattachConfig
		ctx  context.Context
		err  error
	}{
		{"dead", &plugin.ReattachConfig{Pid: dead.Process.Pid, Addr: silent}, now, plugin.ErrProcessNotFound},
		{"no pid", &plugin.ReattachConfig{Addr: silent}, now, plugin.ErrProcessNotFound},
		{"a process group", &plugin.ReattachConfig{Pid: -pid, Addr: silent}, now, plugin.ErrProcessNotFound},
		{"nobody listens", &plugin.ReattachConfig{Pid: pid, Addr: parseAddr("127.0.0.1:1")}, now, plugin.ErrProcessNotFound},
		{"not its socket", &plugin.ReattachConfig{Pid: pid, Addr: silent}, now, nil},
		{"the plugin's socket", &plugin.ReattachConfig{Pid: pid, Addr: guest.ReattachConfig().Addr}, now, nil},
		{"no time to look", other.ReattachConfig(), ended, context.Canceled},
	}
	concurrently(t, len(tests), func(i int) {
		c := plugin.NewClient(attachTo(tests[i].rc))
		if _, err := c.StartContext(tests[i].ctx); !errors.Is(err, tests[i].err) || tests[i].err == plugin.ErrProcessNotFound && err != plugin.ErrProcessNotFound {
			t.Errorf("%s: Start returned %v", tests[i].name, err)
		}
		within(t, "Kill", 4*time.Second, c.Kill)
		if !c.Exited() {
			t.Errorf("%s: Kill has returned, and Exited is false", tests[i].name)
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
	return &plugin.ReattachConfig{ProtocolVersion: 3, Addr: addr, Pid: -1, ReattachFunc: func() (plugin.AttachedRunner, error) { return r, nil }}
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

// boxed starts a plugin that a client knows through a runner. A mute runner does
// not learn of the plugin's end.
func boxed(t *testing.T, mode string, mute bool) (*plugin.Client, *testClient, *testRunner, *os.Process) {
	t.Helper()
	t.Parallel()
	cfg := newLab(t).config(mode)
	first, _ := startPlugin(t, cfg)
	r := newTestRunner(t, false)
	if !mute {
		go func() { <-first.Done(); r.ended <- errBox }() // ends with the plugin
	}
	second := attachTo(r.config(first.ReattachConfig().Addr))
	second.KillTimeout = 500 * time.Millisecond
	c, p := startPlugin(t, second)
	if c.ID() != r.ID() || c.Exited() || c.Err() != nil {
		t.Errorf("reattached: %s, %v, %v", c.ID(), c.Exited(), c.Err())
	}
	return c, dispense(t, p), r, cfg.Cmd.Process
}

// ReattachFunc finds the process, which is waited for and killed through it.
func TestReattachFunc(t *testing.T) {
	t.Parallel()
	for mode, stubborn := range map[string]bool{"plugin": false, "plugin endless": true} {
		t.Run(mode, func(t *testing.T) {
			c, _, r, process := boxed(t, mode, false)
			waiting := receive(t, "Wait", r.waits)
			killing := async(func() bool { c.Kill(); return true })
			if stubborn {
				if ctx := receive(t, "Kill", r.kills); waiting.Err() != nil || ctx.Err() != nil {
					t.Error("the contexts have ended:", waiting.Err(), ctx.Err())
				}
				_ = process.Kill()
			}
			receive(t, "Client.Kill", killing)
			if !c.Exited() || c.Err() != nil || waiting.Err() == nil || len(r.kills) > 0 {
				t.Error("after Kill:", c.Exited(), c.Err(), waiting.Err(), len(r.kills))
			}
		})
	}
	t.Run("crash", func(t *testing.T) {
		c, test, _, _ := boxed(t, "plugin", false)
		for _, err := range []error{test.Call("Plugin.Do", "exit3", new(string)), c.Err()} {
			errorSays(t, err, errBox.Error())
			if !c.Exited() || !errors.Is(err, errBox) || !errors.As(err, new(*plugin.ExitError)) {
				t.Errorf("Exited is %v, and the error %v", c.Exited(), err)
			}
		}
	})
	t.Run("outlived", func(t *testing.T) { // as by a child that has the connection
		c, test, r, _ := boxed(t, "plugin", true)
		errs := test.block(t, 4)
		r.ended <- errBox
		for range cap(errs) {
			if err := receive(t, "a call", errs); !errors.Is(err, errBox) || !c.Exited() {
				t.Errorf("Exited is %v, and a call in flight returned %v", c.Exited(), err)
			}
		}
	})
	t.Run("lost connection", func(t *testing.T) {
		c, test, _, process := boxed(t, "plugin", true)
		_ = process.Kill()
		err := test.Call("Plugin.Block", "", new(string))
		if c.Exited() || c.Err() != nil || errors.As(err, new(*plugin.ExitError)) || !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Errorf("the process is taken for dead, %v, with %v", c.Exited(), err)
		}
	})
	silent := newLab(t).silent("s")
	t.Run("stuck", func(t *testing.T) {
		r := newTestRunner(t, true)
		cfg := attachTo(r.config(silent))
		cfg.KillTimeout = 100 * time.Millisecond
		c, _ := startPlugin(t, cfg)
		within(t, "Kill", cfg.KillTimeout+2*time.Second, c.Kill)
		waiting, killing := receive(t, "Wait", r.waits), receive(t, "Kill", r.kills)
		if !c.Exited() || c.Err() != nil || waiting.Err() == nil || killing.Err() == nil {
			t.Error("after Kill:", c.Exited(), c.Err(), waiting.Err(), killing.Err())
		}
	})
	for found, want := range map[error]error{errBox: errBox, plugin.ErrProcessNotFound: plugin.ErrProcessNotFound, nil: plugin.ErrProcessNotFound} {
		rc := &plugin.ReattachConfig{Addr: silent, ReattachFunc: func() (plugin.AttachedRunner, error) { return nil, found }}
		if _, err := plugin.NewClient(attachTo(rc)).Start(); !errors.Is(err, want) || want == plugin.ErrProcessNotFound && err != want {
			t.Errorf("Start returned %v and not %v", err, want)
		}
	}
	// A panic in the host's own code stays one, and Kill works.
	c := plugin.NewClient(attachTo(&plugin.ReattachConfig{Addr: silent, ReattachFunc: func() (plugin.AttachedRunner, error) { panic(errBox) }}))
	func() {
		defer func() {
			if p := recover(); p != errBox {
				t.Error("Start panicked with", p)
			}
		}()
		_, _ = c.Start()
	}()
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
	right := &plugin.SecureConfig{sumOf(t, path), hash}
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
		{&plugin.SecureConfig{wrong, hash}, path, nil},
		{&plugin.SecureConfig{right.Checksum[:16], hash}, path, nil},
		{&plugin.SecureConfig{nil, hash}, path, plugin.ErrSecureConfigNoChecksum},
		{&plugin.SecureConfig{wrong, nil}, path, plugin.ErrSecureConfigNoHash},
		{right, path + ".missing", fs.ErrNotExist},
	} {
		if ok, err := test.secure.Check(test.file); ok || !errors.Is(err, test.err) {
			t.Errorf("Check returned %v, %v and not %v", ok, err, test.err)
		}
	}
}
