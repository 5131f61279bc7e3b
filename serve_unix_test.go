//go:build unix

package plugin_test

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/muxplug/plugin"
)

func init() {
	// The goroutine of package signal stays, and is no leak of a test.
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGTERM)
	signal.Stop(signals)
}

// callWait calls Wait.
func callWait(c *testClient) error {
	return plugin.Call(context.Background(), c.Client, "Plugin.Wait", "", new(string))
}

// SIGTERM and SIGHUP end a plugin as Kill does. A call in flight fails with the end of the
// plugin, when main has finished. SIGINT is left to the host, and SIGHUP has no effect on a
// plugin that was started to ignore it.
func TestServeSignals(t *testing.T) {
	for _, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGHUP} {
		t.Run(sig.String(), func(t *testing.T) {
			t.Parallel()
			l := newLab(t)
			cfg := l.config("plugin finishing")
			c, p := startPlugin(t, cfg)
			test := dispense(t, p)
			for range 3 {
				check(t, cfg.Cmd.Process.Signal(syscall.SIGINT))
				echo(t, test.Client)
			}
			call := async(func() error { return callWait(test) })
			l.read("in a call")
			check(t, cfg.Cmd.Process.Signal(sig))
			l.read("cause")
			l.read("finishing")
			l.write("finish", "")
			receive(t, "Done", c.Done())
			var exit *plugin.ExitError
			if !errors.As(c.Err(), &exit) || exit.State == nil || !exit.State.Success() {
				t.Errorf("the plugin ended with %v", c.Err())
			}
			// The context of the call has not ended.
			err := receive(t, "the call in flight", call)
			if !errors.As(err, &exit) || errors.Is(err, context.Canceled) {
				t.Errorf("the call in flight returned %v", err)
			}
			l.read("plugin finished")
		})
	}
	t.Run("nohup", func(t *testing.T) {
		t.Parallel()
		cfg := newLab(t).config("plugin")
		cfg.Cmd.Path, cfg.Cmd.Args = "/bin/sh", []string{"sh", "-c", `trap "" HUP; exec "$0"`, os.Args[0]}
		c, p := startPlugin(t, cfg)
		test := dispense(t, p)
		check(t, cfg.Cmd.Process.Signal(syscall.SIGHUP))
		for range 200 {
			echo(t, test.Client)
		}
		c.Kill()
		check(t, c.Err())
	})
}

func init() {
	// Uses up the descriptors when the test says so.
	modes["fill"] = func() {
		limit := syscall.Rlimit{Cur: 128, Max: 128}
		if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
			panic(err)
		}
		note("filling", "")
		go func() {
			awaitNote("fill")
			for {
				if _, err := syscall.Open(os.DevNull, syscall.O_RDONLY, 0); err != nil {
					break
				}
			}
			// No descriptor is left to create a file.
			notes := os.Getenv(notesEnv)
			_ = os.Rename(filepath.Join(notes, "filling"), filepath.Join(notes, "filled"))
		}()
	}
}

// A plugin that cannot accept its connection says why and exits.
func TestDescriptorLimit(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	c := plugin.NewClient(l.config("fill plugin"))
	defer c.Kill()
	_, err := c.Start()
	check(t, err)
	l.write("fill", "")
	l.read("filled")
	p, err := c.Client()
	check(t, err)
	within(t, "Dispense", 2*time.Second, func() { _, err = p.Dispense("test") })
	errorSays(t, err, "too many open files", "exit status 1")
}

// In test mode the signals of the process stay with whoever takes them.
func TestTestModeSignals(t *testing.T) {
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGTERM, syscall.SIGHUP, os.Interrupt)
	defer signal.Stop(signals)
	rc, _, closed := serveTestMode(t, plugin.ServeTestConfig{})
	_, p := startPlugin(t, attachTo(rc))
	for _, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGHUP, syscall.SIGINT} {
		check(t, syscall.Kill(os.Getpid(), sig))
		if got := receive(t, sig.String(), signals); got != sig {
			t.Errorf("%v arrived as %v", sig, got)
		}
		dispenseAndEcho(t, p)
	}
	if isClosed(closed) {
		t.Error("the serving has ended")
	}
}

// A plugin whose host names no directory for its socket makes a private one, and removes it.
func TestOwnDirectory(t *testing.T) {
	leavesNothing(t)
	rc, stop, _ := serveTestMode(t, plugin.ServeTestConfig{})
	dir := filepath.Dir(rc.Addr.String())
	info, err := os.Stat(dir)
	check(t, err)
	if filepath.Dir(dir) != filepath.Clean(os.TempDir()) || info.Mode().Perm() != 0o700 {
		t.Errorf("the directory is %s, with the mode %v", dir, info.Mode())
	}
	stop()
	if _, err := os.Stat(dir); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the directory is still there: %v", err)
	}
}
