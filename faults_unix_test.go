//go:build unix

package plugin_test

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/muxplug/plugin"
)

// These tests let every step of the life of a process fail, one after the other.

// faultEnv says how a "faulty" plugin fails: after how many reads and writes, and
// whether it stalls then.
const faultEnv = "TEST_PLUGIN_FAULT"

func init() {
	// Serves one connection, which fails or stalls.
	modes["faulty"] = func() {
		listener := must(net.Listen("unix", filepath.Join(os.Getenv(plugin.EnvUnixSocketDir), "socket")))
		fmt.Printf("1|%d|unix|%s|netrpc\n", testHandshake.ProtocolVersion, listener.Addr())
		number, stalls := strings.CutSuffix(os.Getenv(faultEnv), " stalls")
		line := newFaultyConn(must(listener.Accept()), must(strconv.ParseInt(number, 10, 64)), stalls)
		go func() { // ends with the process
			<-line.stalled
			note("stalled", "")
		}()
		<-serve(line, testPlugins(newTestState()))
	}
}

// A process whose connection fails or stalls at any moment fails what its host does, or
// waits for Kill. It leaves nothing behind.
func TestProcessFaults(t *testing.T) {
	t.Parallel()
	for _, fault := range []string{"", " stalls"} {
		t.Run("it"+fault, func(t *testing.T) {
			t.Parallel()
			const together = 4 // they mostly wait
			n, works := 0, false
			for ; !works; n += together {
				var good atomic.Int32
				concurrently(t, together, func(i int) {
					if livesWith(t, fmt.Sprint(n+i, fault)) {
						good.Add(1)
					}
				})
				works = good.Load() == together
			}
			if n < 3*together {
				t.Errorf("everything works with %d reads and writes", n)
			}
			t.Logf("it needs at most %d reads and writes, and each of them has failed", n)
		})
	}
}

// livesWith starts a plugin with a fault, calls and kills it, and reports whether all of it
// went well.
func livesWith(t *testing.T, fault string) bool {
	l := newLab(t)
	cfg := l.config("faulty", faultEnv+"="+fault)
	cfg.KillTimeout = 100 * time.Millisecond
	c := plugin.NewClient(cfg)
	doing := async(func() error { return startAndCall(c) })
	var err error
	done := false
	await(t, "the end of what is done, or a fault: "+fault, func() bool {
		select {
		case err = <-doing:
			done = true
		default:
		}
		return done || l.noted("stalled")
	})
	within(t, "Kill", cfg.KillTimeout+2*time.Second, c.Kill)
	if !done {
		err = receive(t, "what is done: "+fault, doing)
	}
	if err != nil && !strings.Contains(err.Error(), pluginName(cfg.Cmd.Path)) {
		t.Errorf("with the fault %q, the error does not name the plugin: %v", fault, err)
	}
	return err == nil && !l.noted("stalled")
}

func init() {
	// Starts plugins with ever more free descriptors, until one can be used. Prints how many
	// there were, and each failure that is not as it should be.
	modes["frugal"] = func() {
		limit := syscall.Rlimit{Cur: 64, Max: 64}
		if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
			panic(err)
		}
		for free := 0; ; free++ {
			left := takeStock(os.TempDir())
			err := withDescriptors(free, func() error { return startAndKill(hosted.cfg) })
			if left := left(); left != "" {
				fmt.Println("with", free, "there is left:", left)
			}
			if err == nil {
				note("needed", strconv.Itoa(free))
				return
			}
			if !errors.Is(err, syscall.EMFILE) || !strings.Contains(err.Error(), pluginName(os.Args[0])) {
				fmt.Println("with", free, "the error is:", err)
			}
		}
	}
}

// withDescriptors calls f when so many descriptors are left to this process.
func withDescriptors(free int, f func() error) error {
	var taken []int
	for {
		fd, err := syscall.Open(os.DevNull, syscall.O_RDONLY|syscall.O_CLOEXEC, 0)
		if err != nil {
			break
		}
		taken = append(taken, fd)
	}
	for _, fd := range taken[:free] {
		_ = syscall.Close(fd)
	}
	err := f()
	for _, fd := range taken[free:] {
		_ = syscall.Close(fd)
	}
	return err
}

// startAndKill starts a plugin, calls it and kills it.
func startAndKill(cfg *plugin.ClientConfig) error {
	c := plugin.NewClient(cfg)
	defer c.Kill()
	return startAndCall(c)
}

// startAndCall starts a plugin and calls it.
func startAndCall(c *plugin.Client) error {
	p, err := c.Client()
	if err != nil {
		return err
	}
	test, err := plugin.Dispense[*testClient](p, "test")
	if err != nil {
		return err
	}
	return test.echoOf("text")
}

// A start that lacks a descriptor for any of its steps fails, says so, and leaves nothing.
func TestHostDescriptors(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	host := l.start("host frugal", childEnv+"=plugin")
	receive(t, "the end of the host", host.ended)
	checkEqual(t, "what went wrong", host.output.String(), "")
	if needed := l.readPid("needed"); needed < 10 {
		t.Errorf("a plugin started with %d descriptors", needed)
	}
}

// A plugin that lacks a descriptor for any of its steps exits, and its host says why.
func TestPluginDescriptors(t *testing.T) {
	t.Parallel()
	for limit := 3; limit < 24; limit++ {
		t.Run(fmt.Sprint(limit), func(t *testing.T) {
			t.Parallel()
			cfg := newLab(t).config("plugin")
			limited := exec.Command("sh", "-c", fmt.Sprintf(`ulimit -n %d; exec "$0"`, limit), os.Args[0])
			limited.Env = cfg.Cmd.Env
			cfg.Cmd = limited
			err := startAndKill(cfg)
			if err != nil && !isA[*plugin.StartError](err) && !isA[*plugin.ExitError](err) {
				t.Errorf("it failed with %T: %v", err, err)
			}
		})
	}
}
