package plugin

import (
	"io"
	"net"
	"net/rpc"
)

// This file has what tests of hosts and plugins need: two ends of a connection within one
// process.

// TestOptions are options of [TestPluginRPCConn].
type TestOptions struct {
	// ServerStdout and ServerStderr, if not nil, are sent as the stdout and
	// stderr of the plugin. They are not closed. Call RPCClient.SyncStreams to
	// receive them.
	ServerStdout io.ReadCloser
	ServerStderr io.ReadCloser
}

// TestingT has the methods of *testing.T, *testing.B and testing.TB that the test helpers
// use.
type TestingT interface {
	Helper()
	Fatalf(format string, args ...any)
	Cleanup(func())
}

// TestConn returns the client's and the server's end of a local TCP connection. They are
// closed when the test ends.
func TestConn(t TestingT) (net.Conn, net.Conn) {
	t.Helper()
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatalf("plugin: listening: %v", err)
	}
	defer lis.Close()
	// The system connects before Accept is called.
	client, err := net.Dial("tcp", lis.Addr().String())
	if err != nil {
		t.Fatalf("plugin: dialling: %v", err)
	}
	server, err := lis.Accept()
	if err != nil {
		t.Fatalf("plugin: accepting: %v", err)
	}
	t.Cleanup(func() {
		_ = client.Close()
		_ = server.Close()
	})
	return client, server
}

// TestRPCConn returns a client and a server of net/rpc that are connected. They are closed
// when the test ends.
func TestRPCConn(t TestingT) (*rpc.Client, *rpc.Server) {
	t.Helper()
	clientConn, serverConn := TestConn(t)
	server := rpc.NewServer()
	go server.ServeConn(serverConn) // ends with the connection
	return rpc.NewClient(clientConn), server
}

// TestPluginRPCConn returns the two ends of a connection, over which plugins can be
// dispensed and called within a test. Both ends are closed when the test ends. opts may be
// nil.
func TestPluginRPCConn(t TestingT, plugins map[string]Plugin, opts *TestOptions) (*RPCClient, *RPCServer) {
	t.Helper()
	clientConn, serverConn := TestConn(t)
	if opts == nil {
		opts = &TestOptions{}
	}
	server := &RPCServer{Plugins: plugins, Stdout: opts.ServerStdout, Stderr: opts.ServerStderr}
	go server.ServeConn(serverConn) // ends with the connection
	client, err := NewRPCClient(clientConn, plugins)
	if err != nil {
		t.Fatalf("plugin: connecting: %v", err)
	}
	t.Cleanup(func() { client.session.close() })
	return client, server
}
