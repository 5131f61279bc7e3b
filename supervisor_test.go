package plugin_test

import (
	"context"
	"errors"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/muxplug/plugin"
)

var cutConn net.Conn // of the step "fragile"

func init() {
	// Serves one connection, which the step "cut" closes, and lives on.
	modes["fragile"] = func() {
		listener := announce(nil)
		cutConn = must(listener.Accept())
		server := &plugin.RPCServer{Plugins: testPlugins(newTestState())}
		server.ServeConn(cutConn)
		time.Sleep(forever)
	}
	modes["cut"] = func() { _ = cutConn.Close() }
}

// supervise returns a supervisor that is killed when the test ends.
func supervise(t testing.TB, config *plugin.ClientConfig) *plugin.Supervisor[*testClient] {
	t.Helper()
	s := plugin.NewSupervisor[*testClient](config, "test")
	t.Cleanup(s.Kill)
	return s
}

// mustGet returns the instance of a supervisor.
func mustGet(t testing.TB, s *plugin.Supervisor[*testClient]) *testClient {
	t.Helper()
	instance, err := s.Get(boundedContext(t))
	check(t, err)
	return instance
}

// failsForGood checks that Get fails, says why, and starts nothing more.
func failsForGood(t testing.TB, s *plugin.Supervisor[*testClient], word string) error {
	t.Helper()
	var err error
	for range 3 {
		_, err = s.Get(boundedContext(t))
		errorSays(t, err, "it is not started any more", word)
	}
	if c := s.Client(); c != nil && !c.Exited() {
		t.Error("a plugin runs")
	}
	return err
}

func endedContext() context.Context {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	return ctx
}

// A plugin is started by the first Get, and used by all others.
func TestSupervisor(t *testing.T) {
	t.Parallel()
	s := supervise(t, testConfig("plugin"))
	checkEqual(t, "before the first Get, the client", s.Client(), nil)
	var instances [20]*testClient
	concurrently(t, len(instances), func(i int) {
		var err error
		instances[i], err = s.Get(boundedContext(t))
		if err != nil {
			t.Error(err)
		}
	})
	for _, instance := range instances {
		if instance != instances[0] {
			t.Fatal("the callers have several instances")
		}
	}
	echo(t, instances[0].Client)
	instance, err := s.Get(endedContext())
	if err != nil || instance != instances[0] {
		t.Errorf("with a context that has ended, Get returned %p, %v", instance, err)
	}
	conn, err := s.Client().Client()
	check(t, err)
	dispenseAndEcho(t, conn)
}

// A plugin that has died is started again, even if it is noticed by a failed call.
func TestSupervisorAfterCrash(t *testing.T) {
	t.Parallel()
	s := supervise(t, testConfig("plugin"))
	pids := make(map[int]bool)
	for range 3 {
		instance := mustGet(t, s)
		pids[instance.self(t).Pid] = true
		first := s.Client()
		err := instance.Call("Plugin.Do", "exit3", new(string))
		if !errors.As(err, new(*plugin.ExitError)) {
			t.Errorf("the call failed with %v", err)
		}
		if s.Client() != first || first.Err() == nil {
			t.Errorf("the client that ran last has the error %v", first.Err())
		}
	}
	checkEqual(t, "processes", len(pids), 3)
}

// If the process lives on without its connection, it is killed, and another is started.
func TestSupervisorAfterLostConnection(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	s := supervise(t, l.config("fragile"))
	instance := mustGet(t, s)
	first := s.Client()
	err := instance.Call("Plugin.Do", "cut", new(string))
	errorSays(t, err, "the process lives")
	echo(t, mustGet(t, s).Client)
	if s.Client() == first || !first.Exited() {
		t.Error("the process without a connection was not killed")
	}
}

// A start does not end with the context of the caller that began it.
func TestSupervisorSharesStart(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	s := supervise(t, l.config("late plugin"))
	ctx, cancel := context.WithCancel(context.Background())
	got := async(func() error {
		_, err := s.Get(ctx)
		return err
	})
	pid := l.read("plugin")
	cancel()
	err := receive(t, "Get", got)
	errorIs(t, "Get", err, context.Canceled)
	l.write("serve", "")
	echo(t, mustGet(t, s).Client)
	checkEqual(t, "the pid", s.Client().ID(), pid)
}

// Starts that fail are tried again after pauses, and each Get waits for one of them.
func TestSupervisorPauses(t *testing.T) {
	t.Parallel()
	s := supervise(t, testConfig("exit3"))
	var failed *plugin.StartError
	began := time.Now()
	for range 4 {
		_, err := s.Get(boundedContext(t))
		if !errors.As(err, &failed) || failed.State == nil {
			t.Fatalf("Get returned %v", err)
		}
	}
	if took := time.Since(began); took < (100+200+400)*time.Millisecond {
		t.Errorf("the starts took only %v, with three pauses between them", took)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
	defer cancel()
	_, err := s.Get(ctx)
	errorIs(t, "Get in a pause", err, context.DeadlineExceeded)
	if !errors.As(err, &failed) || failed.State == nil {
		t.Errorf("the error does not have why the last start failed: %v", err)
	}
}

// The pause counts from the end of the plugin, and not from the next Get.
func TestSupervisorPausesFromEnd(t *testing.T) {
	t.Parallel()
	cfg := testConfig("plugin")
	cfg.Cmd.Path = filepath.Join(t.TempDir(), "missing") // which fails at once
	s := supervise(t, cfg)
	for range 7 {
		_, _ = s.Get(boundedContext(t)) // fails
	}
	time.Sleep(6400 * time.Millisecond) // the next pause, which is under test
	began := time.Now()
	_, _ = s.Get(boundedContext(t)) // fails
	if took := time.Since(began); took > 5*time.Second {
		t.Errorf("after the pause was over, the start took %v", took)
	}
}

// A plugin that has lived for ten seconds is started again at once.
func TestSupervisorAfterLongLife(t *testing.T) {
	t.Parallel()
	s := supervise(t, testConfig("plugin"))
	for range 6 { // short lives, so that the next pause would be 6.4 seconds
		_ = mustGet(t, s).Call("Plugin.Do", "exit3", new(string))
	}
	instance := mustGet(t, s)
	time.Sleep(10 * time.Second) // the life of the plugin, which is under test
	_ = instance.Call("Plugin.Do", "exit3", new(string))
	began := time.Now()
	echo(t, mustGet(t, s).Client)
	if took := time.Since(began); took > 5*time.Second {
		t.Errorf("after a long life, the start took %v", took)
	}
}

// Kill ends the supervisor for good, whatever it is doing.
func TestSupervisorKill(t *testing.T) {
	for name, test := range map[string]struct {
		mode  string
		began func(t *testing.T, s *plugin.Supervisor[*testClient], l *lab)
	}{
		"before the first Get": {"plugin", func(*testing.T, *plugin.Supervisor[*testClient], *lab) {}},
		"while it runs": {"plugin", func(t *testing.T, s *plugin.Supervisor[*testClient], l *lab) {
			mustGet(t, s)
		}},
		"after its end": {"plugin", func(t *testing.T, s *plugin.Supervisor[*testClient], l *lab) {
			_ = mustGet(t, s).Call("Plugin.Do", "exit3", new(string))
		}},
		"while it starts": {"wait", func(t *testing.T, s *plugin.Supervisor[*testClient], l *lab) {
			getting := getInBackground(t, s)
			l.read("plugin")
			t.Cleanup(func() { errorSays(t, receive(t, "Get", getting), "Kill") })
		}},
		"in a pause": {"exit3", func(t *testing.T, s *plugin.Supervisor[*testClient], l *lab) {
			for range 7 {
				_, _ = s.Get(boundedContext(t)) // fails
			}
			getting := getInBackground(t, s)
			began := time.Now()
			t.Cleanup(func() {
				errorSays(t, receive(t, "Get", getting), "Kill")
				if took := time.Since(began); took > 5*time.Second {
					t.Errorf("Get has waited %v, for the end of its pause", took)
				}
			})
		}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			l := newLab(t)
			s := plugin.NewSupervisor[*testClient](l.config(test.mode), "test")
			test.began(t, s, l)
			within(t, "Kill", 2*time.Second, s.Kill)
			last := s.Client()
			failsForGood(t, s, "Kill")
			s.Kill()
			checkEqual(t, "the client that ran last", s.Client(), last)
		})
	}
}

// getInBackground returns when Get waits, and sends its error.
func getInBackground(t testing.TB, s *plugin.Supervisor[*testClient]) <-chan error {
	ctx := newDeadlineContext() // which does not pass
	getting := async(func() error {
		_, err := s.Get(ctx)
		return err
	})
	receive(t, "the wait of Get", ctx.waits)
	return getting
}

// CleanupClients ends a supervisor of a managed plugin, even while no plugin runs.
func TestSupervisorCleanup(t *testing.T) {
	managed := func() *plugin.ClientConfig {
		cfg := testConfig("plugin")
		cfg.Managed = true
		return cfg
	}
	unused, running, ended := supervise(t, managed()), supervise(t, managed()), supervise(t, managed())
	other := supervise(t, testConfig("plugin"))
	mustGet(t, running)
	_ = mustGet(t, ended).Call("Plugin.Do", "exit3", new(string))
	instance := mustGet(t, other)
	plugin.CleanupClients()
	if !running.Client().Exited() {
		t.Error("a managed plugin runs on")
	}
	for _, s := range []*plugin.Supervisor[*testClient]{unused, running, ended} {
		failsForGood(t, s, "CleanupClients")
	}
	echo(t, instance.Client)
}

// The end of the command's context ends the supervisor.
func TestSupervisorContext(t *testing.T) {
	t.Parallel()
	for _, runs := range []bool{true, false} {
		ctx, cancel := context.WithCancel(context.Background())
		defer cancel()
		cfg := testConfig("plugin")
		env := cfg.Cmd.Env
		cfg.Cmd = exec.CommandContext(ctx, os.Args[0])
		cfg.Cmd.Env = env
		s := supervise(t, cfg)
		if runs {
			mustGet(t, s)
		}
		cancel()
		if runs {
			receive(t, "Done", s.Client().Done())
		}
		err := failsForGood(t, s, "the context of ClientConfig.Cmd")
		errorIs(t, "Get", err, context.Canceled)
	}
}

// A plugin that cannot be dispensed has not started.
func TestSupervisorOfAnotherPlugin(t *testing.T) {
	t.Parallel()
	s := plugin.NewSupervisor[*testClient](testConfig("plugin"), "another")
	defer s.Kill()
	_, err := s.Get(boundedContext(t))
	errorSays(t, err, `"another" cannot be dispensed`)
	if !s.Client().Exited() {
		t.Error("the process lives on")
	}
}

// What cannot be started again is refused at once.
func TestSupervisorConfig(t *testing.T) {
	for _, config := range []*plugin.ClientConfig{nil, attachTo(&plugin.ReattachConfig{})} {
		if panics(func() { plugin.NewSupervisor[*testClient](config, "test") }) == nil {
			t.Errorf("NewSupervisor took %+v", config)
		}
	}
}
