package plugin_test

import (
	"bytes"
	"io"
	"testing"

	"github.com/muxplug/plugin"
)

// ---- Sessions ----

// feed returns a connection on which a script arrives. It ends behind it, or
// stalls.
func feed(script []byte, stalls bool) io.ReadWriteCloser {
	end, w := io.Pipe()
	if !stalls {
		w.Close()
	}
	return readWriteCloser{io.MultiReader(bytes.NewReader(script), end), io.Discard, end}
}

// addSessions adds what may arrive instead of a session, and what the end that
// is 0 for the host and 1 for the plugin sends in one.
func addSessions(f *testing.F, end int) {
	for _, script := range garbage() {
		f.Add(script)
	}
	var sent syncBuffer
	var ends [2]io.ReadWriteCloser
	ends[0], ends[1] = plugin.TestConn(f)
	ends[end] = readWriteCloser{ends[end], io.MultiWriter(&sent, ends[end]), ends[end]}
	serve(ends[1], testPlugins(newTestState()))
	c, err := plugin.NewRPCClient(ends[0], testPlugins(nil))
	check(f, err)
	dispenseAndEcho(f, c)
	check(f, c.Close())
	f.Add([]byte(sent.String()))
}

// FuzzSessionHost is a host whose plugin sends anything.
func FuzzSessionHost(f *testing.F) {
	addSessions(f, 1)
	f.Fuzz(func(t *testing.T, script []byte) {
		for _, stalls := range []bool{false, true} {
			conn := feed(script, stalls)
			c, err := plugin.NewRPCClient(conn, testPlugins(nil))
			if err != nil {
				continue
			}
			dispensing := async(func() error { _, err := c.Dispense("test"); return err })
			if stalls {
				check(t, conn.Close())
			}
			receive(t, "Dispense", dispensing)
			_ = c.Close()
			if err := c.Ping(); err == nil {
				t.Error("a closed connection answers")
			}
		}
	})
}

// FuzzSessionPlugin is a plugin whose host sends anything.
func FuzzSessionPlugin(f *testing.F) {
	addSessions(f, 0)
	f.Fuzz(func(t *testing.T, script []byte) {
		server := &plugin.RPCServer{Plugins: plugin.PluginSet{"test": serves(&useService{func() {}})}}
		serving := async(func() bool { server.ServeConn(feed(script, false)); return true })
		receive(t, "ServeConn", serving)
	})
}

// ---- RPC streams ----

// ---- What a plugin prints ----

// ---- All shapes ----
