package plugin_test

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
	"os"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"testing/iotest"
	"time"

	"github.com/hashicorp/yamux"
	"github.com/muxplug/plugin"
)

// ---- What a stream carries ----

// writeTo writes so many bytes.
func writeTo(w io.Writer, size int) error {
	_, err := w.Write(make([]byte, size))
	return err
}

// carry sends random data, up to so many bytes, from a to b and back, and closes both.
func carry(t testing.TB, a, b net.Conn, most int) {
	t.Helper()
	data := noise(rand.IntN(most)>>rand.IntN(15), rand.Uint64())
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
		"TCP":  func() (a, b io.ReadWriteCloser) { return plugin.TestConn(t) },
		"pipe": func() (a, b io.ReadWriteCloser) { return net.Pipe() },
		"single bytes": func() (a, b io.ReadWriteCloser) {
			conn, b := plugin.TestConn(t)
			return readWriteCloser{iotest.OneByteReader(bufio.NewReader(conn)), conn, conn}, b
		},
	} {
		t.Run(name, func(t *testing.T) {
			a, b := connect()
			host, guest := joinBrokers(t, a, b)
			ends := [2]*plugin.MuxBroker{host, guest}
			leavesNoStreams(t, host)
			streams, most := 16, 700<<10
			if name == "single bytes" {
				streams, most = 4, 20<<10 // each byte costs a system call or two
			}
			concurrently(t, streams, func(i int) {
				for range 3 {
					a, b := joined(t, ends[i%2].Dial, ends[1-i%2].Accept)
					carry(t, a, b, most)
				}
			})
		})
	}
	t.Run("stock peer", func(t *testing.T) {
		raw, c, _ := rawPlugin(t)
		leavesNoStreams(t, c.broker)
		for range 5 {
			a, b := joinedRaw(t, raw, c)
			carry(t, a, b, 700<<10)
			b, a = joinedRaw(t, raw, c)
			carry(t, a, b, 700<<10)
		}
	})
}

// A Write waits for the peer to read, until its deadline or the end of its
// stream or session.
func TestWriteWaits(t *testing.T) {
	deadline := func(_ *plugin.MuxBroker, conn net.Conn, _ *rawPeer) { conn.SetDeadline(time.Unix(1, 0)) }
	for name, end := range map[string]func(*plugin.MuxBroker, net.Conn, *rawPeer){
		"closed":               func(_ *plugin.MuxBroker, conn net.Conn, _ *rawPeer) { conn.Close() },
		"deadline":             deadline,
		"session closed here":  func(b *plugin.MuxBroker, _ net.Conn, _ *rawPeer) { b.Close() },
		"session closed there": func(_ *plugin.MuxBroker, _ net.Conn, raw *rawPeer) { raw.Close() },
	} {
		t.Run(name, func(t *testing.T) {
			raw, c, _ := rawPlugin(t)
			conn, peer := joinedRaw(t, raw, c)
			const room = firstWindow - 4 // behind the id
			sent := 0
			await(t, "a full window", func() bool {
				check(t, conn.SetWriteDeadline(time.Now().Add(10*time.Millisecond)))
				n, err := conn.Write(make([]byte, 2*room))
				sent += n
				if timeout, ok := err.(net.Error); sent > room || !ok || !timeout.Timeout() {
					t.Fatalf("of Writes that are not read, %d bytes were sent: %v", sent, err)
				}
				return sent == room
			})
			check(t, conn.SetWriteDeadline(time.Time{}))
			write := func() error { return writeTo(conn, room) }
			writing := async(write)
			_, err := io.ReadFull(peer, make([]byte, 2*room))
			check(t, errors.Join(err, receive(t, "Write", writing)))
			writing = async(func() error { return untilError(write) })
			_, err = io.ReadFull(peer, make([]byte, 1)) // it has begun, and does not fit
			check(t, err)
			end(c.broker, conn, raw)
			err = receive(t, "Write", writing)
			if name == "session closed there" {
				errorIs(t, "a Write that waits", err, io.ErrUnexpectedEOF)
			}
		})
	}
}

// Reads of one stream that run at once get all that was sent, and its end.
func TestReadsAtOnce(t *testing.T) {
	t.Parallel()
	a, b := plugin.TestConn(t)
	host, guest := joinBrokers(t, a, b)
	const size = streamWindow / 2
	for range 100 {
		conn, peer := joined(t, host.Dial, guest.Accept)
		_, err := conn.Write(make([]byte, size/2))
		check(t, err)
		_, err = conn.Write(make([]byte, size/2))
		check(t, errors.Join(err, conn.Close()))
		var got atomic.Int64
		reading := async(func() bool {
			concurrently(t, 4, func(int) {
				n, err := io.CopyBuffer(struct{ io.Writer }{io.Discard}, peer, make([]byte, 1000))
				got.Add(n)
				errorIs(t, "Read", err, nil)
			})
			return true
		})
		receive(t, "the Reads", reading)
		checkEqual(t, "bytes", got.Load(), size)
		check(t, peer.Close())
	}
}

// What was sent before a stream was closed arrives, even if the session ends
// right behind it.
func TestClosedBeforeTheEnd(t *testing.T) {
	for range 50 {
		a, b := plugin.TestConn(t)
		host, guest := joinBrokers(t, a, b)
		conn, peer := joined(t, host.Dial, guest.Accept)
		_, err := conn.Write([]byte("all"))
		check(t, errors.Join(err, conn.Close(), host.Close()))
		_, _ = guest.Accept(8) // ends with the session
		if got, err := io.ReadAll(peer); err != nil || string(got) != "all" {
			t.Fatalf("%q arrived: %v", got, err)
		}
	}
}

// A session with many streams ends as soon as one with few.
func TestEndWithManyStreams(t *testing.T) {
	const instances = 5000
	for name, end := range map[string]func(c *plugin.Client){
		"killed": func(c *plugin.Client) { c.Kill() },
		"crashed": func(c *plugin.Client) {
			pid, err := strconv.Atoi(c.ID())
			check(t, err)
			p, err := os.FindProcess(pid)
			check(t, err)
			check(t, p.Kill())
		},
	} {
		t.Run(name, func(t *testing.T) {
			c, protocol := startPlugin(t, testConfig("plugin"))
			last := dispense(t, protocol)
			concurrently(t, 50, func(int) {
				for range instances / 50 {
					errorIs(t, "Dispense", dispensing(protocol), nil)
				}
			})
			echo(t, last.Client)
			start := time.Now()
			end(c)
			receive(t, "the end", c.Done())
			if err := last.Call("Plugin.Echo", "", new(string)); err == nil {
				t.Error("a plugin that has exited answers")
			}
			c.Kill()
			if took := time.Since(start); took > slack {
				t.Error("the end took", took)
			}
		})
	}
}

// ---- Bad connections and peers ----

// While the connection takes nothing, accepting, dialling, reading and closing go on,
// and only the Write that the system is taking outlasts its deadline.
func TestFullConnection(t *testing.T) {
	t.Parallel()
	const soon = 50 * time.Millisecond
	a, b := plugin.TestConn(t)
	line := newFaultyConn(a, neverFails, true)
	host, guest := joinBrokers(t, line, b)
	stuck, _ := joined(t, host.Dial, guest.Accept)
	far, other := joined(t, guest.Dial, host.Accept)
	dialling := boundedContext(t)
	dialled := async(func() error { _, err := guest.DialContext(dialling, 7); return err })
	_, err := far.Write(make([]byte, streamWindow/2))
	check(t, err)

	line.left.Store(0)
	writing := async(func() error { return writeTo(stuck, 10) })
	receive(t, "the Write that the system is taking", line.stalled)
	ctx, cancel := context.WithTimeout(context.Background(), soon)
	defer cancel()
	check(t, other.SetWriteDeadline(time.Now().Add(soon)))
	check(t, stuck.SetWriteDeadline(time.Now().Add(soon)))
	for name, f := range map[string]func() error{
		"another Write":                  func() error { return writeTo(other, 10) },
		"another Write of the stream":    func() error { return writeTo(stuck, 10) },
		"DialContext":                    func() error { _, err := host.DialContext(ctx, 9); return err },
		"AcceptContext of no dial":       func() error { _, err := host.AcceptContext(ctx, 8); return err },
		"DialContext of so many streams": func() error { return dialMany(ctx, host, 1000) },
	} {
		err := receive(t, name, async(f))
		var timeout net.Error
		if !errors.As(err, &timeout) || !timeout.Timeout() {
			t.Errorf("%s returned %v", name, err)
		}
	}
	for name, f := range map[string]func() error{
		"AcceptContext": func() error { _, err := host.AcceptContext(boundedContext(t), 7); return err },
		"Read and Close": func() error {
			_, err := io.ReadFull(other, make([]byte, streamWindow/2))
			return errors.Join(err, other.Close())
		},
	} {
		check(t, receive(t, name, async(f)))
	}
	check(t, host.Close())
	receive(t, "the Write that the system was taking", writing)
	receive(t, "dialling", dialled)
}

// dialMany dials n streams at once and returns the error of one.
func dialMany(ctx context.Context, b *plugin.MuxBroker, n int) (err error) {
	failed := make(chan error)
	for i := range n {
		go func() { // ends with ctx
			_, err := b.DialContext(ctx, uint32(1000+i))
			failed <- err
		}()
	}
	for range n {
		err = <-failed
	}
	return err
}

// A connection that fails or stalls at any moment fails what is done on it, and
// leaves nothing behind.
func TestConnectionFaults(t *testing.T) {
	t.Parallel()
	for name, fault := range map[string]struct{ host, stalls bool }{
		"host fails":    {host: true},
		"host stalls":   {host: true, stalls: true},
		"plugin fails":  {},
		"plugin stalls": {stalls: true},
	} {
		for what, use := range map[string]func(plugin.ClientProtocol) error{
			"by hand":   useByHand,
			"interface": useInterface,
		} {
			t.Run(name+", "+what, func(t *testing.T) {
				t.Parallel()
				n := int64(0)
				for ; !survives(t, n, fault.host, fault.stalls, use); n++ {
				}
				if n < 20 {
					t.Errorf("everything works with %d reads and writes", n)
				}
				t.Logf("it needs %d reads and writes, and each of them has failed", n)
			})
		}
	}
}

// survives uses a connection that fails or stalls after n reads and writes, and reports
// whether all of it went well.
func survives(t *testing.T, n int64, host, stalls bool, use func(plugin.ClientProtocol) error) bool {
	a, b := plugin.TestConn(t)
	var line *faultyConn
	var ends [2]io.ReadWriteCloser
	if host {
		line = newFaultyConn(a, n, stalls)
		ends = [2]io.ReadWriteCloser{line, b}
	} else {
		line = newFaultyConn(b, n, stalls)
		ends = [2]io.ReadWriteCloser{a, line}
	}
	if host && n%2 == 0 {
		ends[0] = struct{ io.ReadWriteCloser }{line} // has no deadlines
	}
	serving := serve(ends[1], testPlugins(newTestState()))
	doing := async(func() error {
		c, err := plugin.NewRPCClient(ends[0], testPlugins(nil))
		if err != nil {
			return err
		}
		defer c.Close()
		return errors.Join(use(c), c.Close())
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

// useByHand has a plugin call back, and copy a reader to a writer.
func useByHand(p plugin.ClientProtocol) error {
	test, err := plugin.Dispense[*testClient](p, "test")
	if err != nil {
		return err
	}
	id, _ := test.broker.ServeRPC(newTestServer())
	from, _ := test.broker.ServeReader(strings.NewReader("all of it"))
	to, _ := test.broker.ServeWriter(io.Discard)
	return errors.Join(
		test.Call("Plugin.CallBack", Callback{ID: id, Method: "Echo", Arg: "x"}, new(string)),
		test.Call("Plugin.Copy", Transfer{Reader: from, Writer: to}, new(int64)),
	)
}

// useInterface does the same with an interface, and has sequences sent both ways.
func useInterface(p plugin.ClientProtocol) error {
	k, err := plugin.Dispense[Kit](p, "kit")
	if err != nil {
		return err
	}
	ctx, r := context.Background(), k.(kitClient).remote
	answer := func(context.Context, int) (string, error) { return "x", nil }
	_, errCall := plugin.Invoke[string](ctx, r, "Call", answer, 1)
	_, errCopy := plugin.Invoke[int64](ctx, r, "Copy", strings.NewReader("all of it"), io.Discard, int64(100))
	for _, err := range plugin.InvokeSeq[Number](ctx, r, "Double", rowsTo(3, nil)) {
		if err != nil {
			return errors.Join(errCall, errCopy, err)
		}
	}
	return errors.Join(errCall, errCopy, r.Close())
}

// garbage is what may arrive instead of a session.
func garbage() [][]byte {
	const data, window, ping, goAway = dataFrame, windowFrame, pingFrame, goAwayFrame
	const syn, ack, fin, rst = synFlag, ackFlag, finFlag, rstFlag
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

// A peer that opens a stream with a number of this side, or that sends too many
// pings, ends the session. One that leaves no room for the answer to a dialled
// number is not accepted.
func TestBadPeers(t *testing.T) {
	t.Parallel()
	dialled := binary.LittleEndian.AppendUint32(nil, 7)
	for name, test := range map[string]struct {
		frames   []byte
		toPlugin bool // instead of to a host
		unread   bool // the peer takes no answers
	}{
		"a stream of the host":   {frames: frame(windowFrame, synFlag, 1001, 0)},
		"a stream of the plugin": {frames: frame(windowFrame, synFlag, 1000, 0), toPlugin: true},
		"no room for the answer": {frames: slices.Concat(
			frame(windowFrame, synFlag, 1000, 1<<32-firstWindow),
			frame(dataFrame, 0, 1000, 4, dialled...),
		)},
		"pings": {frames: bytes.Repeat(frame(pingFrame, synFlag, 0, 7), 1<<17), unread: true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			a, b := plugin.TestConn(t)
			line := newFaultyConn(a, neverFails, true)
			var raw *rawPeer
			var broker *plugin.MuxBroker
			if test.toPlugin {
				raw, broker, _ = rawHost(t, newTestServer())
			} else {
				var c *testClient
				raw, c, _ = joinRawPlugin(t, line, b)
				broker = c.broker
			}
			if test.unread {
				line.left.Store(0)
			}
			_, err := raw.conn.Write(test.frames)
			check(t, err)
			accepting := async(func() error {
				_, err := broker.AcceptContext(boundedContext(t), 7)
				return err
			})
			err = receive(t, "AcceptContext", accepting)
			if err == nil || errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("AcceptContext returned %v", err)
			}
		})
	}
}

// A stream that is not accepted, because the peer leaves no room for the answer, is closed.
func TestNoRoomForAnswer(t *testing.T) {
	t.Parallel()
	raw, c, _ := rawPlugin(t)
	leavesNoStreams(t, c.broker)
	_, err := raw.conn.Write(slices.Concat(
		frame(windowFrame, synFlag, 1000, 1<<32-firstWindow),
		frame(dataFrame, 0, 1000, 4, binary.LittleEndian.AppendUint32(nil, 7)...),
	))
	check(t, err)
	_, err = c.broker.AcceptContext(boundedContext(t), 7)
	errorSays(t, err, "room")
	_, err = raw.conn.Write(frame(windowFrame, finFlag, 1000, 0))
	check(t, err)
}

// A stream that the peer resets does not end as if all had been sent, and takes nothing.
func TestReset(t *testing.T) {
	t.Parallel()
	raw, c, _ := rawPlugin(t)
	dialled, accepted := joinedRaw(t, raw, c)
	_, err := raw.conn.Write(frame(windowFrame, rstFlag, accepted.(*yamux.Stream).StreamID(), 0))
	check(t, err)
	_, err = dialled.Read(make([]byte, 1))
	errorIs(t, "Read", err, yamux.ErrConnectionReset)
	_, err = dialled.Write(make([]byte, 1))
	errorIs(t, "Write", err, yamux.ErrConnectionReset)
}
