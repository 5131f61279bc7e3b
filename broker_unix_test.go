//go:build unix

package plugin_test

import (
	"context"
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
	pid := pidOf(t, client)
	var uses atomic.Int64
	from, stopReader := serveUsedReader(c.broker, func() { uses.Add(1) })
	to, stopWriter := serveUsedWriter(c.broker, func() { uses.Add(1) })
	copying := async(func() error {
		transfer := Transfer{Reader: from, Writer: to}
		return plugin.Call(context.Background(), c.Client, "Plugin.Copy", transfer, nil)
	})
	await(t, "copying", func() bool { return uses.Load() > 100 })
	stop(t, pid)
	within(t, "stop", 0, stopReader)
	within(t, "stop", 0, stopWriter)
	signalTo(t, pid, syscall.SIGCONT)
	isStopped(t, receive(t, "the call", copying))
	echo(t, c.Client)
}
