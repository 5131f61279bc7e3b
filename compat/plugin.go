// Package plugin lets programs written for github.com/hashicorp/go-plugin use
// github.com/muxplug/plugin without a change to their code. It has the names of
// go-plugin's net/rpc mode and nothing else. Each is an alias or a call of the
// same name in github.com/muxplug/plugin, where it is documented.
//
// A program keeps its imports, gets one line in its go.mod, and runs go mod tidy:
//
//	replace github.com/hashicorp/go-plugin => github.com/muxplug/plugin/compat v0.1.0
//
// With a clone of the repository in ../plugin there are two lines:
//
//	replace github.com/hashicorp/go-plugin => ../plugin/compat
//	replace github.com/muxplug/plugin => ../plugin
//
// A program can import both paths and pass values from one to the other, so its
// imports can change package by package. The line goes when the last one has changed.
package plugin

import (
	"io"
	"net"
	"net/rpc"
	"sync/atomic"

	"github.com/muxplug/plugin"
)

const (
	// CoreProtocolVersion is the version of the handshake.
	CoreProtocolVersion = plugin.CoreProtocolVersion
	// EnvUnixSocketDir names the variable with the directory for the plugin's socket.
	EnvUnixSocketDir = plugin.EnvUnixSocketDir
	// EnvUnixSocketGroup names the variable with the group that may connect.
	EnvUnixSocketGroup = plugin.EnvUnixSocketGroup
	// ProtocolInvalid is the protocol of a plugin that did not start.
	ProtocolInvalid = plugin.ProtocolInvalid
	// ProtocolNetRPC is net/rpc, the only protocol that works.
	ProtocolNetRPC = plugin.ProtocolNetRPC
	// ProtocolGRPC is gRPC, which is refused.
	ProtocolGRPC = plugin.ProtocolGRPC
)

var (
	// ErrProcessNotFound is the error of reattaching to a plugin that is gone.
	ErrProcessNotFound = plugin.ErrProcessNotFound
	// ErrChecksumsDoNotMatch is the error of a binary with another checksum.
	ErrChecksumsDoNotMatch = plugin.ErrChecksumsDoNotMatch
	// ErrSecureConfigNoChecksum is the error of a SecureConfig without Checksum.
	ErrSecureConfigNoChecksum = plugin.ErrSecureConfigNoChecksum
	// ErrSecureConfigNoHash is the error of a SecureConfig without Hash.
	ErrSecureConfigNoHash = plugin.ErrSecureConfigNoHash
	// ErrSecureConfigAndReattach is the error of a ClientConfig with both.
	ErrSecureConfigAndReattach = plugin.ErrSecureConfigAndReattach
	// Killed is 1 once CleanupClients has been called; read it with sync/atomic.
	Killed uint32
)

type (
	// BasicError is an error that gob can encode.
	BasicError = plugin.BasicError
	// Client starts, calls and kills one plugin.
	Client = plugin.Client
	// ClientConfig describes a plugin to its host.
	ClientConfig = plugin.ClientConfig
	// ClientProtocol is the host's end of a connection.
	ClientProtocol = plugin.ClientProtocol
	// HandshakeConfig is what a host and its plugins must agree on.
	HandshakeConfig = plugin.HandshakeConfig
	// MuxBroker opens numbered streams between host and plugin.
	MuxBroker = plugin.MuxBroker
	// Plugin makes the two ends of an interface.
	Plugin = plugin.Plugin
	// PluginSet has the plugins by name.
	PluginSet = plugin.PluginSet
	// Protocol is the protocol of a connection.
	Protocol = plugin.Protocol
	// RPCClient is the ClientProtocol of net/rpc.
	RPCClient = plugin.RPCClient
	// RPCServer is the ServerProtocol of net/rpc.
	RPCServer = plugin.RPCServer
	// ReattachConfig describes a plugin that runs already.
	ReattachConfig = plugin.ReattachConfig
	// SecureConfig describes a binary by its checksum.
	SecureConfig = plugin.SecureConfig
	// ServeConfig describes what a plugin serves.
	ServeConfig = plugin.ServeConfig
	// ServeMuxMap has the configurations of ServeMux by name.
	ServeMuxMap = plugin.ServeMuxMap
	// ServeTestConfig makes Serve serve in test mode.
	ServeTestConfig = plugin.ServeTestConfig
	// ServerProtocol is the plugin's end of a connection.
	ServerProtocol = plugin.ServerProtocol
	// TestOptions are options of TestPluginRPCConn.
	TestOptions = plugin.TestOptions
	// UnixSocketConfig says where the plugin's socket is and who may connect.
	UnixSocketConfig = plugin.UnixSocketConfig
)

// CleanupClients sets Killed and kills all managed plugins.
func CleanupClients() {
	atomic.StoreUint32(&Killed, 1)
	plugin.CleanupClients()
}

// Discover returns the plugins in dir whose names match glob.
func Discover(glob, dir string) ([]string, error) { return plugin.Discover(glob, dir) }

// NewBasicError makes an error that gob can encode.
func NewBasicError(err error) *BasicError { return plugin.NewBasicError(err) }

// NewClient makes a Client, which starts its plugin when it is used.
func NewClient(config *ClientConfig) *Client { return plugin.NewClient(config) }

// NewRPCClient makes a client for the plugin at the other end of conn.
func NewRPCClient(conn io.ReadWriteCloser, plugins map[string]Plugin) (*RPCClient, error) {
	return plugin.NewRPCClient(conn, plugins)
}

// Serve serves plugins to the host that has started this process.
func Serve(config *ServeConfig) { plugin.Serve(config) }

// ServeMux serves the plugin that the command line names.
func ServeMux(m ServeMuxMap) { plugin.ServeMux(m) }

// TestConn returns the two ends of a connection.
func TestConn(t plugin.TestingT) (net.Conn, net.Conn) { return plugin.TestConn(t) }

// TestPluginRPCConn returns the two ends of a connection over which plugins can be dispensed.
func TestPluginRPCConn(t plugin.TestingT, plugins map[string]Plugin, opts *TestOptions) (*RPCClient, *RPCServer) {
	return plugin.TestPluginRPCConn(t, plugins, opts)
}

// TestRPCConn returns an RPC client and its server.
func TestRPCConn(t plugin.TestingT) (*rpc.Client, *rpc.Server) { return plugin.TestRPCConn(t) }
