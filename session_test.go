package plugin

import (
	"bytes"
	"encoding/binary"
	"io"
	"net"
	"net/rpc"
	"testing"

	"github.com/hashicorp/yamux"
)

// ---- Peers made of yamux and net/rpc ----

// rawPeer is a peer without this package: a session whose streams the test
// opens and accepts.
type rawPeer struct {
	*yamux.Session
	control, stdout, stderr net.Conn
}

func newRawPeer(t testing.TB, conn net.Conn, host bool) *rawPeer {
	t.Helper()
	cfg := yamux.DefaultConfig()
	cfg.EnableKeepAlive = false
	cfg.LogOutput = io.Discard
	create := yamux.Server
	if host {
		create = yamux.Client
	}
	session, err := create(conn, cfg)
	check(t, err)
	t.Cleanup(func() { session.Close() })
	raw := &rawPeer{Session: session}
	for _, stream := range []*net.Conn{&raw.control, &raw.stdout, &raw.stderr} {
		if host {
			*stream, err = session.Open()
		} else {
			*stream, err = session.Accept()
		}
		check(t, err)
	}
	return raw
}

// dial opens the stream of a broker's id.
func (p *rawPeer) dial(t testing.TB, id uint32) net.Conn {
	t.Helper()
	st, err := p.Open()
	check(t, err)
	want := binary.LittleEndian.AppendUint32(nil, id)
	got := make([]byte, 4)
	_, err = st.Write(want)
	check(t, err)
	if _, err := io.ReadFull(st, got); err != nil || !bytes.Equal(got, want) {
		t.Fatalf("the id %x is answered with %x, %v", want, got, err)
	}
	return st
}

// accept accepts a stream and answers the id with which it was dialled.
func (p *rawPeer) accept(t testing.TB) (net.Conn, uint32) {
	t.Helper()
	st, err := p.Accept()
	check(t, err)
	id := make([]byte, 4)
	_, err = io.ReadFull(st, id)
	check(t, err)
	_, err = st.Write(id)
	check(t, err)
	return st, binary.LittleEndian.Uint32(id)
}

// rawHost connects a raw host to a plugin that serves v, and returns the host,
// the plugin's broker and the stream of what the host has dispensed.
func rawHost(t testing.TB, v any) (*rawPeer, *MuxBroker, net.Conn) {
	t.Helper()
	brokers := make(chan *MuxBroker, 1)
	a, b := TestConn(t)
	go (&RPCServer{Plugins: PluginSet{"test": testPlugin(func(b *MuxBroker) (any, error) {
		brokers <- b
		return v, nil
	})}}).ServeConn(b) // ends with the connection
	raw := newRawPeer(t, a, true)
	var id uint32
	check(t, rpc.NewClient(raw.control).Call("Dispenser.Dispense", "test", &id))
	return raw, <-brokers, raw.dial(t, id)
}

// rawPlugin connects a host to a raw plugin, and returns the plugin, the host's
// client of what it has dispensed, and the stream of that client.
func rawPlugin(t testing.TB) (*rawPeer, *testClient, net.Conn) {
	t.Helper()
	a, b := TestConn(t)
	host, err := NewRPCClient(a, testPlugins(nil))
	check(t, err)
	t.Cleanup(func() { host.Close() })
	raw := newRawPeer(t, b, false)
	control := rpc.NewServer()
	_ = control.RegisterName("Control", rawControl{})
	_ = control.RegisterName("Dispenser", rawControl{})
	go control.ServeConn(raw.control) // ends with the connection
	client := async(func() *testClient { return dispense(t, host) })
	st, _ := raw.accept(t)
	return raw, receive(t, "a dispensed client", client), st
}

// rawControl serves the control RPC of a raw plugin.
type rawControl struct{}

func (rawControl) Ping(bool, *struct{}) error { return nil }
func (rawControl) Quit(bool, *struct{}) error { return nil }
func (rawControl) Dispense(_ string, id *uint32) error {
	*id = 1
	return nil
}

// wires are the pairs that this package and net/rpc can form. The field
// connect returns a client of v; host and plugin tell which end is ours.
var wires = []struct {
	name         string
	host, plugin bool
	connect      func(t testing.TB, v any) *rpc.Client
}{
	{"plugin to plugin", true, true, func(t testing.TB, v any) *rpc.Client {
		host, _ := TestPluginRPCConn(t, PluginSet{"test": serves(v)}, nil)
		return dispense(t, host).Client
	}},
	{"plugin to net/rpc", true, false, func(t testing.TB, v any) *rpc.Client {
		_, c, st := rawPlugin(t)
		s := rpc.NewServer()
		check(t, s.RegisterName("Plugin", v))
		go s.ServeConn(st) // ends with the connection
		return c.Client
	}},
	{"net/rpc to plugin", false, true, func(t testing.TB, v any) *rpc.Client {
		_, _, st := rawHost(t, v)
		return rpc.NewClient(st)
	}},
	{"net/rpc to net/rpc", false, false, func(t testing.TB, v any) *rpc.Client {
		c, s := TestRPCConn(t)
		check(t, s.RegisterName("Plugin", v))
		return c
	}},
}
