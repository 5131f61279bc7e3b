//go:build unix

package plugin_test

import (
	"context"
	"strconv"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/muxplug/plugin"
)

// stop does not wait for a plugin that is stopped.
func TestStopWhilePaused(t *testing.T) {
	t.Parallel()
	client, p := startPlugin(t, testConfig("plugin"))
	c := dispense(t, p)
	pid, err := strconv.Atoi(client.ID())
	check(t, err)
	var uses atomic.Int64
	from, stopReader := servedKinds[0].serve(c.broker, func() { uses.Add(1) })
	to, stopWriter := servedKinds[1].serve(c.broker, func() { uses.Add(1) })
	copying := async(func() error {
		return plugin.Call(context.Background(), c.Client, "Plugin.Copy", Transfer{Reader: from, Writer: to}, nil)
	})
	await(t, "copying", func() bool { return uses.Load() > 100 })
	check(t, syscall.Kill(pid, syscall.SIGSTOP))
	within(t, "stop", 0, stopReader)
	within(t, "stop", 0, stopWriter)
	check(t, syscall.Kill(pid, syscall.SIGCONT))
	isStopped(t, receive(t, "the call", copying))
	echo(t, c.Client)
}
