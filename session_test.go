package plugin

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"net/rpc"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/iotest"
	"time"

	"github.com/hashicorp/go-hclog"
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

// ---- Both ends of this package ----

// readWriteCloser makes a connection of parts.
type readWriteCloser struct {
	io.Reader
	io.Writer
	io.Closer
}

// newBroker returns the broker at one end of a connection that carries nothing
// else.
func newBroker(t testing.TB, conn io.ReadWriteCloser, host bool) *MuxBroker {
	t.Helper()
	s, err := newSession(context.Background(), conn, host, hclog.NewNullLogger(), nil)
	check(t, err)
	b := newMuxBroker(s)
	s.spawn(func() { defer s.cancel(); b.Run() })
	t.Cleanup(s.close)
	return b
}

// joined returns both ends of a stream that is dialled and accepted.
func joined(t testing.TB, dial, accept func(id uint32) (net.Conn, error)) (dialled, accepted net.Conn) {
	t.Helper()
	id := rand.Uint32()
	dialling := async(func() error { var err error; dialled, err = dial(id); return err })
	accepted, err := accept(id)
	check(t, errors.Join(err, receive(t, "the dialled end", dialling)))
	return dialled, accepted
}

// joinedRaw returns both ends of a stream of a host and a raw plugin.
func joinedRaw(t testing.TB, raw *rawPeer, c *testClient) (dialled, accepted net.Conn) {
	return joined(t, c.broker.Dial, func(uint32) (net.Conn, error) { st, _ := raw.accept(t); return st, nil })
}

// streams returns how many streams a broker's session has.
func streams(b *MuxBroker) int {
	b.session.frames.mu.Lock()
	defer b.session.frames.mu.Unlock()
	return b.session.mux.NumStreams() + len(b.session.frames.flows)
}

// ---- What a stream carries ----

// carry sends random data from a to b and back, and closes both.
func carry(t testing.TB, a, b net.Conn) {
	t.Helper()
	data := noise(rand.IntN(700<<10)>>rand.IntN(15), rand.Uint64())
	piece := 1 + rand.IntN(400<<10)>>rand.IntN(10)
	for range 2 {
		sent := async(func() error {
			for piece := range slices.Chunk(data, piece) {
				if _, err := a.Write(piece); err != nil {
					return err
				}
			}
			return a.Close() // and reads on
		})
		_ = b.SetReadDeadline(time.Now().Add(hangs))
		if got, err := io.ReadAll(b); err != nil || !bytes.Equal(got, data) {
			t.Errorf("of %d bytes, %d arrived: %v", len(data), len(got), err)
		}
		check(t, receive(t, "sending", sent))
		a, b = b, a
	}
}

// Streams carry anything in any pieces, over any connection, and leave nothing
// behind.
func TestTraffic(t *testing.T) {
	t.Parallel()
	for name, connect := range map[string]func() (a, b io.ReadWriteCloser){
		"TCP":  func() (a, b io.ReadWriteCloser) { return TestConn(t) },
		"pipe": func() (a, b io.ReadWriteCloser) { return net.Pipe() },
		"single bytes": func() (a, b io.ReadWriteCloser) {
			conn, b := TestConn(t)
			return readWriteCloser{iotest.OneByteReader(bufio.NewReader(conn)), conn, conn}, b
		},
	} {
		t.Run(name, func(t *testing.T) {
			a, b := connect()
			ends := [2]*MuxBroker{newBroker(t, a, true), newBroker(t, b, false)}
			leavesNoStreams(t, ends[:]...)
			streams := 16
			if name == "single bytes" {
				streams = 4 // each byte costs a system call or two
			}
			callers(t, streams, func(i int) {
				for range 5 {
					a, b := joined(t, ends[i%2].Dial, ends[1-i%2].Accept)
					carry(t, a, b)
				}
			})
		})
	}
	t.Run("stock peer", func(t *testing.T) {
		raw, c, _ := rawPlugin(t)
		leavesNoStreams(t, c.broker)
		for range 20 {
			a, b := joinedRaw(t, raw, c)
			carry(t, a, b)
			b, a = joinedRaw(t, raw, c)
			carry(t, a, b)
		}
	})
}

// A Write waits for the peer to read, until its deadline or the end of its
// stream or session.
func TestWriteWaits(t *testing.T) {
	for name, end := range map[string]func(*MuxBroker, net.Conn, *rawPeer){
		"closed":               func(_ *MuxBroker, conn net.Conn, _ *rawPeer) { conn.Close() },
		"deadline":             func(_ *MuxBroker, conn net.Conn, _ *rawPeer) { conn.SetDeadline(time.Unix(1, 0)) },
		"session closed here":  func(b *MuxBroker, _ net.Conn, _ *rawPeer) { b.Close() },
		"session closed there": func(_ *MuxBroker, _ net.Conn, raw *rawPeer) { raw.Close() },
	} {
		t.Run(name, func(t *testing.T) {
			raw, c, _ := rawPlugin(t)
			conn, peer := joinedRaw(t, raw, c)
			const room = firstWindow - 4 // behind the id
			check(t, conn.SetWriteDeadline(time.Now().Add(10*time.Millisecond)))
			n, err := conn.Write(make([]byte, 2*room))
			if timeout, ok := err.(net.Error); n != room || !ok || !timeout.Timeout() {
				t.Fatalf("of a Write that is not read, %d bytes were sent: %v", n, err)
			}
			check(t, conn.SetWriteDeadline(time.Time{}))
			write := func() error { _, err := conn.Write(make([]byte, room)); return err }
			writing := async(write)
			_, err = io.ReadFull(peer, make([]byte, 2*room))
			check(t, errors.Join(err, receive(t, "Write", writing)))
			writing = async(func() error { return until(write) })
			await(t, "a Write that waits", func() bool { return strings.Contains(stacks(), "waitWindow") })
			end(c.broker, conn, raw)
			if err := receive(t, "Write", writing); name == "session closed there" && !errors.Is(err, io.ErrUnexpectedEOF) {
				t.Error("a Write that waits ended with", err)
			}
		})
	}
}

// What was sent before a stream was closed arrives, even if the session ends
// right behind it.
func TestClosedBeforeTheEnd(t *testing.T) {
	for range 50 {
		a, b := TestConn(t)
		host, plugin := newBroker(t, a, true), newBroker(t, b, false)
		conn, peer := joined(t, host.Dial, plugin.Accept)
		_, err := conn.Write([]byte("all"))
		check(t, errors.Join(err, conn.Close(), host.Close()))
		_, _ = plugin.Accept(8) // ends with the session
		if got, err := io.ReadAll(peer); err != nil || string(got) != "all" {
			t.Fatalf("%q arrived: %v", got, err)
		}
	}
}

// ---- Bad connections and peers ----

// faultyConn is a connection that fails after some reads and writes. Or its
// Writes stall from then on, until it is closed.
type faultyConn struct {
	net.Conn
	left    atomic.Int64 // reads and writes before the fault
	stalls  bool
	stalled chan bool // gets something when a Write stalls
	closed  context.Context
	close   context.CancelFunc
}

func newFaultyConn(conn net.Conn, left int64, stalls bool) *faultyConn {
	c := &faultyConn{Conn: conn, stalls: stalls, stalled: make(chan bool, 1000)}
	c.closed, c.close = context.WithCancel(context.Background())
	c.left.Store(left)
	return c
}

func (c *faultyConn) Read(p []byte) (int, error) {
	if c.left.Add(-1) < 0 && !c.stalls {
		return 0, io.ErrClosedPipe
	}
	return c.Conn.Read(p)
}

func (c *faultyConn) Write(p []byte) (int, error) {
	if c.left.Add(-1) >= 0 {
		return c.Conn.Write(p)
	}
	if c.stalls {
		c.stalled <- true
		<-c.closed.Done()
	}
	return 0, io.ErrClosedPipe
}

func (c *faultyConn) Close() error {
	c.close()
	return c.Conn.Close()
}

// A connection that fails or stalls at any moment fails what is done on it, and
// leaves nothing behind.
func TestConnectionFaults(t *testing.T) {
	t.Parallel()
	for name, fault := range map[string]struct{ host, stalls bool }{
		"host fails": {true, false}, "host stalls": {true, true}, "plugin fails": {false, false}, "plugin stalls": {false, true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			n := int64(0)
			for ; !survives(t, n, fault.host, fault.stalls); n++ {
			}
			if n < 20 {
				t.Errorf("everything works with %d reads and writes", n)
			}
		})
	}
}

// survives does a bit of everything on a connection that fails or stalls after
// n reads and writes, and reports whether all of it went well.
func survives(t *testing.T, n int64, host, stalls bool) bool {
	a, b := TestConn(t)
	line := newFaultyConn(a, n, stalls)
	ends := [2]io.ReadWriteCloser{line, b}
	if !host {
		line.Conn = b
		ends = [2]io.ReadWriteCloser{a, line}
	} else if n%2 == 0 {
		ends[0] = struct{ io.ReadWriteCloser }{line} // has no deadlines
	}
	serving := async(func() bool { (&RPCServer{Plugins: testPlugins(newTestState())}).ServeConn(ends[1]); return true })
	doing := async(func() error {
		c, err := NewRPCClient(ends[0], testPlugins(nil))
		if err != nil {
			return err
		}
		defer c.session.close()
		test, err := Dispense[*testClient](c, "test")
		if err != nil {
			return err
		}
		id, _ := test.broker.ServeRPC(newTestServer())
		from, _ := test.broker.ServeReader(strings.NewReader("all of it"))
		to, _ := test.broker.ServeWriter(io.Discard)
		return errors.Join(
			test.Call("Plugin.CallBack", Callback{id, "Echo", "x"}, new(string)),
			test.Call("Plugin.Copy", Transfer{Reader: from, Writer: to}, new(int64)),
			c.Close(),
		)
	})
	var err error
	select {
	case err = <-doing:
	case <-line.stalled:
		line.Close()
		err = cmp.Or(receive(t, "what was done", doing), io.ErrClosedPipe)
	case <-time.After(hangs):
		t.Fatalf("after %d reads and writes, it hangs\n%s", n, stacks())
	}
	_ = ends[1].Close()
	receive(t, "ServeConn", serving)
	return err == nil
}

// frame returns a frame of yamux.
func frame(kind byte, flags uint16, stream, length uint32, body ...byte) []byte {
	b := binary.BigEndian.AppendUint16([]byte{0, kind}, flags)
	b = binary.BigEndian.AppendUint32(b, stream)
	return append(binary.BigEndian.AppendUint32(b, length), body...)
}

// garbage is what may arrive instead of a session.
func garbage() [][]byte {
	const data, window, ping, goAway = 0, 1, 2, 3
	const syn, ack, fin, rst = 1, 2, 4, 8
	open := frame(window, syn, 1, 0)
	var many []byte
	for i := range uint32(2000) {
		many = append(many, frame(window, syn, i+1, 0)...)
	}
	return [][]byte{
		nil, many, make([]byte, 1000), noise(10000, 1),
		[]byte("HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n"),
		{0x15, 3, 1, 0, 2, 2, 0x28},    // TLS
		append([]byte{1}, open[1:]...), // another version
		frame(9, 0, 1, 0),
		frame(data, 0, 77, 1<<32-1, 1, 2, 3), // an unknown stream
		frame(goAway, 0, 0, 2),
		bytes.Repeat(frame(ping, syn, 0, 7), 1000),
		bytes.Repeat(frame(window, rst, 1, 0), 10),
		bytes.Repeat(frame(window, ack, 1, 0), 10),
		bytes.Repeat(frame(window, 0, 1, 1<<32-1), 100),
		slices.Concat(open, open),
		slices.Concat(open, frame(data, 0, 1, 100, 1, 2, 3)),     // is cut
		slices.Concat(open, frame(data, 0, 1, 1<<32-1, 1, 2, 3)), // is too long
		slices.Concat(open, bytes.Repeat(frame(window, fin, 1, 0), 3)),
	}
}

// A peer that opens streams with numbers of this side, or too many, or sends too
// many pings, ends the session. One that leaves no room for the answer is not
// accepted.
func TestBadPeers(t *testing.T) {
	t.Parallel()
	const noRoom = 1<<32 - firstWindow
	for i, frames := range [][]byte{
		frame(frameWindow, flagSYN, 1, 0),
		slices.Concat(frame(frameWindow, flagSYN, 2, noRoom), frame(frameData, 0, 2, 4, 7, 0, 0, 0)),
		bytes.Repeat(frame(2, flagSYN, 0, 7), 1<<16),
		frame(frameWindow, flagSYN, 2, 0),
	} {
		a, peer := TestConn(t)
		line := newFaultyConn(a, 1<<40, true)
		b := newBroker(t, line, i < 3)
		if i == 2 {
			line.left.Store(0) // the answers are not taken
		}
		_, err := peer.Write(frames)
		check(t, err)
		accepting := async(func() error { _, err := b.AcceptContext(boundedContext(t), 7); return err })
		if err := receive(t, "AcceptContext", accepting); err == nil || errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("after %.100v, AcceptContext returned %v", frames, err)
		}
	}
	a, peer := TestConn(t)
	s, err := newSession(context.Background(), a, true, hclog.NewNullLogger(), nil)
	check(t, err)
	defer s.close()
	var opened uint32
	for ; err == nil; opened++ {
		_, err = peer.Write(frame(frameWindow, flagSYN, 2*opened+2, 0))
		check(t, err)
		_, err = s.accept()
	}
	if opened != maxStreams+1 {
		t.Errorf("stream %d ended the session: %v", opened, err)
	}
}
