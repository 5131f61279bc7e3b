package plugin_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/hashicorp/go-hclog"
	"github.com/muxplug/plugin"
)

const testCookie = "TEST_PLUGIN_COOKIE=d5f1"

// refusal is a plugin that cannot serve. It is also a step of its name.
type refusal struct {
	name string
	args []string
	env  []string
	edit func(*plugin.ServeConfig)
	says string // on stderr
}

var refusals = []refusal{
	{name: "by-hand", says: "host"},
	{name: "wrong-cookie", env: []string{testHandshake.MagicCookieKey + "=wrong"}, says: "host"},
	{name: "no-cookie", edit: func(c *plugin.ServeConfig) { c.MagicCookieKey = "" }, says: "MagicCookieKey"},
	{name: "no-plugins", env: []string{testCookie}, edit: func(c *plugin.ServeConfig) {
		c.Plugins = nil
	}, says: "Plugins"},
	{name: "empty-sets", env: []string{testCookie}, edit: func(c *plugin.ServeConfig) {
		c.Plugins, c.VersionedPlugins = plugin.PluginSet{}, map[int]plugin.PluginSet{1: nil, 2: {}}
	}, says: "Plugins"},
	{name: "no-certificate", env: []string{testCookie}, edit: func(c *plugin.ServeConfig) {
		c.TLSProvider = func() (*tls.Config, error) { return nil, errors.New("out of paper") }
	}, says: "paper"},
	{name: "bad-certificate", env: []string{testCookie, certVariable + "=junk"}, says: "certificate"},
	{name: "no-stdout", env: []string{testCookie}, says: "handshake"},
	{name: "mux", env: []string{testCookie}, says: "first, second"},
	{name: "mux", env: []string{testCookie}, args: []string{"third"}, says: "first, second"},
	{name: "mux", env: []string{testCookie}, args: []string{"first", "second"}, says: "first, second"},
}

func init() {
	if runtime.GOOS != "windows" {
		noDirectory := []string{testCookie, plugin.EnvUnixSocketDir + "=/no/directory"}
		noGroup := []string{testCookie, plugin.EnvUnixSocketGroup + "=no-group"}
		refusals = append(refusals,
			refusal{name: "no-directory", env: noDirectory, says: "/no/directory"},
			refusal{name: "no-group", env: noGroup, says: "no-group"})
	}
	for _, r := range refusals {
		edit := r.edit
		if edit == nil {
			edit = func(*plugin.ServeConfig) {}
		}
		modes[r.name] = func() { servePlugin(edit) }
	}
	// In place of a mode that calls Serve.
	modes["mux"] = func() {
		set := make(plugin.ServeMuxMap)
		for _, name := range []string{"first", "second"} {
			set[name] = &plugin.ServeConfig{
				HandshakeConfig: testHandshake,
				Plugins:         plugin.PluginSet{name: serves(newTestServer())},
			}
		}
		plugin.ServeMux(set)
	}
}

// A plugin that cannot serve says why on stderr and exits with status 1.
func TestRefusals(t *testing.T) {
	for _, test := range refusals {
		t.Run(fmt.Sprint(test.name, test.args), func(t *testing.T) {
			t.Parallel()
			l := newLab(t)
			cmd := exec.Command(os.Args[0], test.args...)
			cmd.Env = slices.Concat(os.Environ(), l.env(), []string{modeEnv + "=" + test.name}, test.env)
			var stdout, stderr bytes.Buffer
			cmd.Stdout, cmd.Stderr = &stdout, &stderr
			if test.name == "no-stdout" {
				file, err := os.Open(os.DevNull) // cannot be written to
				check(t, err)
				defer file.Close()
				cmd.Stdout = file
			}
			within(t, "a plugin that cannot serve", hangs, func() { _ = cmd.Run() })
			if cmd.ProcessState.ExitCode() != 1 || stdout.Len() > 0 {
				t.Errorf("%v, with the stdout %q", cmd.ProcessState, &stdout)
			}
			if !strings.Contains(stderr.String(), test.says) {
				t.Errorf("the stderr should say %q:\n%s", test.says, &stderr)
			}
			if l.noted(test.name + " finished") {
				t.Error("Serve returned")
			}
		})
	}
}

// The argument selects the plugin that ServeMux serves.
func TestServeMux(t *testing.T) {
	for _, name := range []string{"first", "second"} {
		cfg := newLab(t).config("mux")
		cfg.Cmd.Args = append(cfg.Cmd.Args, name)
		cfg.Plugins = plugin.PluginSet{name: serves(nil)}
		_, p := startPlugin(t, cfg)
		test, err := plugin.Dispense[*testClient](p, name)
		check(t, err)
		echo(t, test.Client)
	}
}

// serveTestMode runs Serve in test mode, until stop is called. closed is CloseCh.
func serveTestMode(
	t *testing.T, test plugin.ServeTestConfig,
) (rc *plugin.ReattachConfig, stop func(), closed <-chan struct{}) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	ready, closing := make(chan *plugin.ReattachConfig), make(chan struct{})
	test.Context, test.ReattachConfigCh, test.CloseCh = ctx, ready, closing
	returned := async(func() bool {
		plugin.Serve(&plugin.ServeConfig{
			HandshakeConfig: testHandshake,
			Plugins:         testPlugins(newTestState()),
			Logger:          hclog.NewNullLogger(),
			Test:            &test,
		})
		return true
	})
	stop = func() {
		cancel()
		receive(t, "CloseCh", closing)
		<-returned
	}
	t.Cleanup(stop)
	return receive(t, "the ReattachConfig", ready), stop, closing
}

// In test mode, Serve changes nothing of its process, and ends when a host asks
// it to.
func TestTestMode(t *testing.T) {
	leavesNothing(t)
	dir, err := os.MkdirTemp("", "t*")
	check(t, err)
	t.Cleanup(func() { check(t, os.Remove(dir)) })
	for _, name := range append(slices.Clone(protocolVariables), testHandshake.MagicCookieKey) {
		t.Setenv(name, "x")
	}
	t.Setenv(plugin.EnvUnixSocketDir, dir)
	environ, stdout, stderr := os.Environ(), os.Stdout, os.Stderr
	rc, stop, closed := serveTestMode(t, plugin.ServeTestConfig{})
	if !rc.Test || rc.Pid != os.Getpid() || rc.ProtocolVersion != 3 || rc.Protocol != plugin.ProtocolNetRPC {
		t.Errorf("the ReattachConfig is %+v", rc)
	}
	if runtime.GOOS != "windows" && filepath.Dir(rc.Addr.String()) != dir {
		t.Errorf("the socket is %v", rc.Addr)
	}
	cfg := attachTo(rc)
	_, p := startPlugin(t, cfg)
	dispenseAndEcho(t, p)
	check(t, p.Close())
	receive(t, "CloseCh", closed)
	stop()
	if !slices.Equal(os.Environ(), environ) || os.Stdout != stdout || os.Stderr != stderr {
		t.Error("the environment, stdout or stderr has changed")
	}
	if _, err := plugin.NewClient(cfg).Start(); err != plugin.ErrProcessNotFound {
		t.Errorf("a client of what was served returned %v", err)
	}
}

// In test mode, Serve ends with its context, and when it cannot serve.
func TestTestModeEnds(t *testing.T) {
	leavesNothing(t)
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	unread := make(chan *plugin.ReattachConfig)
	for _, test := range []struct {
		name   string
		config plugin.ServeConfig
		says   string // at a level above Debug; "" for nothing
	}{
		{name: "no host", config: plugin.ServeConfig{
			Plugins: testPlugins(nil),
			Test:    &plugin.ServeTestConfig{Context: ctx, ReattachConfigCh: unread},
		}},
		{name: "no plugins", says: "Plugins", config: plugin.ServeConfig{
			Test: &plugin.ServeTestConfig{},
		}},
		{name: "no certificate", says: "paper", config: plugin.ServeConfig{
			Plugins:     testPlugins(nil),
			TLSProvider: func() (*tls.Config, error) { return nil, errors.New("out of paper") },
			Test:        &plugin.ServeTestConfig{},
		}},
	} {
		closed := make(chan struct{})
		logger, records := recorder()
		test.config.Test.CloseCh, test.config.Logger = closed, logger
		within(t, "Serve", 0, func() { plugin.Serve(&test.config) })
		if !isClosed(closed) {
			t.Errorf("%s: CloseCh is not closed", test.name)
		}
		var logged []string
		for _, r := range records.find("") {
			if r.level > hclog.Debug {
				logged = append(logged, r.String())
			}
		}
		switch {
		case test.says == "" && len(logged) > 0:
			t.Errorf("%s: there was logged %q", test.name, logged)
		case test.says != "" && (len(logged) != 1 || !strings.Contains(logged[0], test.says)):
			t.Errorf("%s: there was logged %q, and not %q", test.name, logged, test.says)
		}
	}
}

// With SyncStdio the process's output goes to the host as well, until the
// serving ends.
func TestTestModeOutput(t *testing.T) {
	leavesNothing(t)
	stdout, stderr := os.Stdout, os.Stderr
	defer func() { os.Stdout, os.Stderr = stdout, stderr }()
	file, err := os.Create(filepath.Join(t.TempDir(), "output"))
	check(t, err)
	defer file.Close()
	os.Stdout, os.Stderr = file, file
	rc, stop, _ := serveTestMode(t, plugin.ServeTestConfig{SyncStdio: true})
	var out, errs syncBuffer
	cfg := attachTo(rc)
	cfg.SyncStdout, cfg.SyncStderr = &out, &errs
	_, p := startPlugin(t, cfg)
	fmt.Fprint(os.Stdout, "to stdout,")
	await(t, "stdout", func() bool { return out.String() == "to stdout," })
	fmt.Fprint(os.Stderr, "to stderr,")
	check(t, p.Close())
	stop()
	if errs.String() != "to stderr," {
		t.Errorf("the host got %q of stderr", errs.String())
	}
	fmt.Fprint(os.Stdout, "to its own")
	got, err := os.ReadFile(file.Name())
	if string(got) != "to stdout,to stderr,to its own" || os.Stderr != file {
		t.Errorf("the process's own output is %q, %v", got, err)
	}
}

// The helpers take what tests have.
var (
	_ plugin.TestingT = (*testing.T)(nil)
	_ plugin.TestingT = (*testing.B)(nil)
	_ plugin.TestingT = testing.TB(nil)
)

// What the helpers have made ends with the test.
func TestHelpers(t *testing.T) {
	leavesNothing(t)
	var conns [2]net.Conn
	t.Run("helped", func(t *testing.T) {
		conns[0], conns[1] = plugin.TestConn(t)
		c, s := plugin.TestRPCConn(t)
		check(t, s.RegisterName("Plugin", newTestServer()))
		echo(t, c)
		r, w := io.Pipe()
		defer w.Close()
		output := &plugin.TestOptions{
			ServerStdout: io.NopCloser(strings.NewReader("to stdout")),
			ServerStderr: r,
		}
		host, _ := plugin.TestPluginRPCConn(t, testPlugins(newTestState()), output)
		var stdout, stderr syncBuffer
		check(t, host.SyncStreams(&stdout, &stderr))
		dispenseAndEcho(t, host)
		fmt.Fprint(w, "to stderr")
		await(t, "stdout", func() bool { return stdout.String() == "to stdout" })
		await(t, "stderr", func() bool { return stderr.String() == "to stderr" })
	})
	for _, conn := range conns {
		if _, err := conn.Write([]byte("abc")); !errors.Is(err, net.ErrClosed) {
			t.Errorf("after the test, Write returned %v", err)
		}
	}
}
