package plugin_test

import (
	"net"
	"net/rpc"
	"testing"
	"time"

	"github.com/muxplug/plugin"
)

// unreliableListener accepts one connection. Then Accept fails, again and again.
type unreliableListener struct {
	net.Listener
	conns  chan net.Conn
	failed chan bool
	closed chan bool
}

func (l *unreliableListener) Accept() (net.Conn, error) {
	select {
	case conn := <-l.conns:
		return conn, nil
	case <-l.closed:
		return nil, net.ErrClosed
	case l.failed <- true:
		return nil, net.ErrWriteToConnected // any error
	}
}

// A plugin that has a host serves on, however often Accept fails.
func TestAcceptFailsLater(t *testing.T) {
	t.Parallel()
	hostEnd, pluginEnd := plugin.TestConn(t)
	listener := &unreliableListener{
		conns:  make(chan net.Conn, 1),
		failed: make(chan bool),
		closed: make(chan bool),
	}
	listener.conns <- pluginEnd
	serving := async(func() bool {
		server := &plugin.RPCServer{Plugins: testPlugins(newTestState())}
		server.Serve(listener)
		return true
	})
	host, err := plugin.NewRPCClient(hostEnd, testPlugins(nil))
	check(t, err)
	dispenseAndEcho(t, host)
	for range 40 { // twice as often as before the first connection
		receive(t, "a failed Accept", listener.failed)
	}
	check(t, host.Close())
	close(listener.closed)
	receive(t, "the end of Serve", serving)
}

// A plugin that is asked to quit does not end before its answer has been written, or only
// after a while.
func TestQuitAnswerIsWritten(t *testing.T) {
	t.Parallel()
	hostEnd, pluginEnd := plugin.TestConn(t)
	line := newFaultyConn(pluginEnd, 1<<40, true)
	done := make(chan struct{})
	go func() { // ends with the connection
		server := &plugin.RPCServer{Plugins: testPlugins(newTestState()), DoneCh: done}
		server.ServeConn(line)
	}()
	raw := newRawPeer(t, hostEnd, true)
	control := rpc.NewClient(raw.control)
	check(t, control.Call("Control.Ping", true, &struct{}{}))
	line.left.Store(0)
	// Both end with the connection.
	control.Go("Control.Ping", true, &struct{}{}, nil)
	receive(t, "a Write that stalls", line.stalled)
	control.Go("Control.Quit", true, &struct{}{}, nil) // whose answer waits behind that of Ping
	select {
	case <-done:
		t.Error("the plugin has ended before its answer was written")
	case <-time.After(outputTimeout / 4):
	}
	receive(t, "the end of the plugin", done)
	check(t, line.Close())
}
