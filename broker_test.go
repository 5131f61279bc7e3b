package plugin_test

import (
	"bytes"
	"cmp"
	"context"
	"encoding/binary"
	"encoding/gob"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"math/rand/v2"
	"net"
	"net/rpc"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/muxplug/plugin"
)

// ---- Streams by number ----

// meeter dials or accepts a number.
type meeter func(ctx context.Context, id uint32) (net.Conn, error)

// Many streams are open at once. Each caller that dials a number meets one that
// accepts it, in any order.
func TestBrokerMeetings(t *testing.T) {
	t.Parallel()
	const pairs, numbers = 2000, 100
	_, client, server := joinInProcess(t)
	host, guest := client.broker, server.broker
	leavesNoStreams(t, host)
	ctx := boundedContext(t)
	sides := [][2]meeter{
		{host.AcceptContext, guest.DialContext},
		{guest.AcceptContext, host.DialContext},
	}
	// Of each number there are callers on both sides and in both roles.
	type caller struct{ side, role, number, peer int }
	var all [2 * pairs]caller
	var open sync.WaitGroup // until all are
	open.Add(len(all))
	concurrently(t, len(all), func(i int) {
		me := &all[i]
		*me = caller{side: i / 2 % 2, role: i % 2, number: i / 4 % numbers}
		conn, err := sides[me.side][me.role](ctx, uint32(me.number))
		open.Done()
		if err != nil {
			t.Error(err)
			return
		}
		defer conn.Close()
		open.Wait()
		me.peer = swapNumbers(t, conn, i)
	})
	for i, me := range all {
		peer := all[me.peer]
		if peer.peer != i || peer.number != me.number || peer.side != me.side || peer.role == me.role {
			t.Fatalf("%d, %+v, has met %d, %+v", i, me, me.peer, peer)
		}
	}
}

// swapNumbers sends a number to the peer of a stream, and returns that of the peer.
func swapNumbers(t testing.TB, conn net.Conn, mine int) int {
	if err := binary.Write(conn, binary.LittleEndian, uint32(mine)); err != nil {
		t.Error(err)
	}
	var peers uint32
	if err := binary.Read(conn, binary.LittleEndian, &peers); err != nil {
		t.Error(err)
	}
	return int(peers)
}

// Accept and Dial end with their contexts, with the cause and the number in the
// error.
func TestBrokerContexts(t *testing.T) {
	bothWays(t, func(t *testing.T, here, there *plugin.MuxBroker) {
		leavesNoStreams(t, here)
		cause := errors.New("test: the cause")
		short, cancel := context.WithTimeoutCause(context.Background(), time.Millisecond, cause)
		defer cancel()
		for name, meet := range map[string]meeter{"accept": here.AcceptContext, "dial": here.DialContext} {
			conn, err := meet(short, 4711)
			if conn != nil {
				t.Errorf("%s returned a stream", name)
			}
			errorIs(t, name, err, context.DeadlineExceeded)
			errorIs(t, name, err, cause)
			errorSays(t, err, "4711")
		}
	})
}

// What waits for the peer ends after five seconds.
func TestBrokerTimeouts(t *testing.T) {
	t.Parallel()
	_, client, server := joinInProcess(t)
	host, guest := client.broker, server.broker
	leavesNoStreams(t, host)
	began := time.Now()
	waits := make(map[string]func() error)
	for side, ends := range map[string][2]*plugin.MuxBroker{"host": {host, guest}, "plugin": {guest, host}} {
		here, there := ends[0], ends[1]
		waits["accepting in the "+side] = func() error { return errorOfConn(here.Accept(4712)) }
		waits["dialling in the "+side] = func() error { return errorOfConn(here.Dial(4714)) }
		waits["serving in the "+side] = func() error {
			here.AcceptAndServe(4713, newTestServer())
			return errors.New("it has returned")
		}
		for _, kind := range servedKinds {
			kind.serve(here, func() {}) // nothing dials it
			id, stop := kind.serve(there, func() {})
			stop()
			waits["dialling a stopped "+kind.name+" in the "+side] = func() error {
				_, err := kind.dial(here, id)
				return err
			}
		}
	}
	endAfterTimeout(t, began, waits)
}

// A stream of a peer that does not say as which number it is dialled, or whose
// number nothing accepts, is closed after five seconds.
func TestOddStreamsTimeOut(t *testing.T) {
	t.Parallel()
	raw, c, _ := rawPlugin(t)
	leavesNoStreams(t, c.broker)
	began := time.Now()
	waits := make(map[string]func() error)
	for name, begin := range map[string][]byte{
		"no number":                nil,
		"half a number":            {7, 0},
		"a number that is not met": {7, 0, 0, 0},
	} {
		st, err := raw.Open()
		check(t, err)
		defer st.Close()
		_, err = st.Write(begin)
		check(t, err)
		waits[name] = func() error {
			_, err := st.Read(make([]byte, 1))
			return err
		}
	}
	endAfterTimeout(t, began, waits)
}

// errorOfConn is the error of Accept or Dial.
func errorOfConn(_ net.Conn, err error) error { return err }

// endAfterTimeout checks that all end with an error, and not before the time is up
// in which a peer must answer.
func endAfterTimeout(t *testing.T, began time.Time, waits map[string]func() error) {
	t.Helper()
	names := slices.Sorted(maps.Keys(waits))
	concurrently(t, len(names), func(i int) {
		err := waits[names[i]]()
		took := time.Since(began)
		if took < brokerTimeout || err == nil || errors.Is(err, context.Canceled) {
			t.Errorf("%s: %v, after %v", names[i], err, took)
		}
	})
}

// A number that nobody has dialled is forgotten when the wait for it ends.
func TestNumbersAreForgotten(t *testing.T) {
	_, host, _ := joinInProcess(t)
	ended, cancel := context.WithCancel(context.Background())
	cancel()
	objects := func() uint64 {
		var stats runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&stats)
		return stats.HeapObjects
	}
	const numbers = 20_000
	before := objects()
	for id := range uint32(numbers) {
		if _, err := host.broker.AcceptContext(ended, id); !errors.Is(err, context.Canceled) {
			t.Fatalf("AcceptContext returned %v", err)
		}
	}
	if after := objects(); after > before+numbers/2 {
		t.Errorf("%d numbers have left %d objects", numbers, after-before)
	}
}

// Dial closes what the peer has not accepted, or as another.
func TestNotAccepted(t *testing.T) {
	raw, c, _ := rawPlugin(t)
	for _, answer := range [][]byte{nil, {8, 0}, {8, 0, 0, 0}} {
		ctx, cancel := context.WithCancel(context.Background())
		dialling := async(func() error { return errorOfConn(c.broker.DialContext(ctx, 9)) })
		st, err := raw.Accept()
		check(t, err)
		_, err = st.Write(answer)
		check(t, err)
		complete := len(answer) == 4
		if !complete {
			cancel()
		}
		err = receive(t, "DialContext", dialling)
		if err == nil || !complete && !errors.Is(err, context.Canceled) {
			t.Errorf("a stream that is answered with %v is dialled: %v", answer, err)
		}
		cancel()
		_ = st.SetReadDeadline(time.Now().Add(hangs))
		_, err = io.Copy(io.Discard, st)
		check(t, errors.Join(err, st.Close()))
	}
}

// A stream that was dialled and given up is not accepted. The next one is.
func TestDialGivenUp(t *testing.T) {
	raw, c, _ := rawPlugin(t)
	leavesNoStreams(t, c.broker)
	for id := range uint32(10) {
		number := binary.LittleEndian.AppendUint32(nil, id)
		givenUp, err := raw.Open()
		check(t, err)
		_, err = givenUp.Write(number)
		check(t, errors.Join(err, givenUp.Close()))
		live, err := raw.Open()
		check(t, err)
		_, err = live.Write(number)
		check(t, err)
		_, err = raw.Ping() // the host has received both
		check(t, err)
		accepted, err := c.broker.Accept(id)
		check(t, err)
		_, err = io.ReadFull(live, number)
		check(t, err)
		check(t, errors.Join(live.Close(), accepted.Close()))
	}
}

// At most 256 streams wait to be accepted, and as many to be received. When they
// are closed, others can be dialled.
func TestManyDialled(t *testing.T) {
	const limit = 256
	raw, c, _ := rawPlugin(t)
	dialled := make(chan net.Conn, 4*limit)
	for id := range uint32(cap(dialled)) {
		go func() { // ends when the host receives its stream, or with the connection
			st, err := raw.Open()
			if err == nil {
				_, _ = st.Write(binary.LittleEndian.AppendUint32(nil, id))
				dialled <- st
			}
		}()
	}
	await(t, "dialled streams", func() bool { return len(dialled) == 2*limit })
	for range 100 {
		_, err := raw.Ping() // time enough to receive more
		check(t, err)
	}
	if n := len(dialled); n > 2*limit {
		t.Errorf("%d streams wait", n)
	}
	for range cap(dialled) {
		check(t, receive(t, "a stream", dialled).Close())
	}
	dial := func(id uint32) (net.Conn, error) { return raw.dial(t, id), nil }
	st, accepted := joined(t, dial, c.broker.Accept)
	check(t, errors.Join(st.Close(), accepted.Close()))
}

// Dials end with their context while the peer accepts none, however many they are.
func TestDialWithoutAccept(t *testing.T) {
	raw, c, _ := rawPlugin(t)
	ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
	defer cancel()
	concurrently(t, 1000, func(i int) {
		conn, err := c.broker.DialContext(ctx, uint32(i))
		if conn != nil || !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("DialContext returned %v, %v", conn, err)
		}
	})
	go func() { // ends with the connection
		for {
			st, err := raw.Accept()
			if err != nil {
				return
			}
			id := make([]byte, 4)
			_, _ = io.ReadFull(st, id)
			_, _ = st.Write(id)
			_ = st.Close()
		}
	}()
	_, err := c.broker.Dial(1)
	check(t, err)
}

// A number that the peer serves is used before the peer has acknowledged that.
// What is read then depends on the acknowledgement.
func TestDialServed(t *testing.T) {
	for name, test := range map[string]struct {
		answer []byte
		says   string
	}{
		"another number": {[]byte{8, 0, 0, 0}, "the peer accepted another"},
		"nothing":        {nil, "the peer closed it and did not accept it"},
	} {
		t.Run(name, func(t *testing.T) {
			raw, c, _ := rawPlugin(t)
			dialling := async(func() error {
				_, err := c.broker.DialReader(7)
				return err
			})
			st, err := raw.Accept()
			check(t, errors.Join(err, st.SetReadDeadline(time.Now().Add(hangs))))
			_, err = io.ReadFull(st, make([]byte, 20)) // the number, and the beginning of a call
			check(t, err)
			_, err = st.Write(test.answer)
			check(t, errors.Join(err, st.Close()))
			errorSays(t, receive(t, "DialReader", dialling), "7", test.says)
		})
	}
}

// If the connection ends before the peer has acknowledged a stream, the error says why it
// ended, and not that a stream was dialled.
func TestLostBeforeAcknowledged(t *testing.T) {
	raw, c, _ := rawPlugin(t)
	dialling := async(func() error {
		_, err := c.broker.DialReader(7)
		return err
	})
	st, err := raw.Accept()
	check(t, errors.Join(err, st.SetReadDeadline(time.Now().Add(hangs))))
	_, err = io.ReadFull(st, make([]byte, 20)) // the number, and the beginning of a call
	check(t, errors.Join(err, raw.conn.Close()))
	err = receive(t, "DialReader", dialling)
	errorIs(t, "DialReader", err, io.ErrUnexpectedEOF)
	errorSays(t, err, "the connection was lost")
	if strings.Contains(err.Error(), "dialling") {
		t.Errorf("DialReader returned %v", err)
	}
}

// If the connection ends when the peer has answered and its bytes have not arrived, the
// wait for them ends.
func TestLostAfterAnswer(t *testing.T) {
	raw, c, _ := rawPlugin(t)
	dialling := async(func() error {
		_, err := c.broker.DialReader(7)
		return err
	})
	st, _ := raw.accept(t)
	var req rpc.Request
	var id uint32
	from, to := gob.NewDecoder(st), gob.NewEncoder(st)
	check(t, errors.Join(from.Decode(&req), from.Decode(&id)))
	check(t, errors.Join(to.Encode(rpc.Response{Seq: req.Seq}), to.Encode(struct{}{})))
	_, err := raw.Ping() // the answer has arrived
	check(t, errors.Join(err, raw.conn.Close()))
	err = receive(t, "DialReader", dialling)
	errorIs(t, "DialReader", err, io.ErrUnexpectedEOF)
	errorSays(t, err, "the connection was lost")
}

// Closing a client ends its serving at the peer, and what runs there.
func TestClosingClient(t *testing.T) {
	bothWays(t, func(t *testing.T, here, there *plugin.MuxBroker) {
		leavesNoStreams(t, here, there)
		s, id := newTestServer(), there.NextId()
		serving := async(func() bool { there.AcceptAndServe(id, s); return true })
		c, err := here.DialRPC(id)
		check(t, err)
		waiting := async(func() error { return plugin.Call(context.Background(), c, "Plugin.Wait", "", nil) })
		receive(t, "the call", s.started)
		// The peer is stuck with replies that are not read any more.
		for range 20 {
			c.Go("Plugin.Echo", strings.Repeat("x", 1<<18), new(string), make(chan *rpc.Call, 1))
		}
		check(t, c.Close())
		errorIs(t, "a call in flight", receive(t, "a call in flight", waiting), rpc.ErrShutdown)
		receive(t, "the end of a context", s.ended)
		receive(t, "the end of AcceptAndServe", serving)
	})
}

// Close ends every wait, on both sides.
func TestBrokerClose(t *testing.T) {
	leavesNothing(t)
	bothWays(t, func(t *testing.T, here, there *plugin.MuxBroker) {
		ctx := context.Background()
		begun, block := make(chan bool, 100), make(chan bool)
		defer close(block)
		use := func() {
			begun <- true
			<-block
		}
		waits := make(map[string]<-chan error)
		for name, ends := range map[string][2]*plugin.MuxBroker{
			"here":  {here, there},
			"there": {there, here},
		} {
			near, far := ends[0], ends[1]
			waits[name+", accepting"] = async(func() error { return errorOfConn(near.AcceptContext(ctx, 5)) })
			waits[name+", dialling"] = async(func() error { return errorOfConn(near.DialContext(ctx, 6)) })
			for _, kind := range servedKinds {
				id, _ := kind.serve(near, use)
				end, err := kind.dial(far, id)
				check(t, err)
				waits[name+", "+kind.name] = async(func() error {
					if kind.name == "writer" { // Close waits, too
						return errors.Join(end.next(), end.Close())
					}
					return untilError(end.next)
				})
				receive(t, "its use", begun)
			}
		}
		check(t, here.Close())
		check(t, here.Close())
		waits["Accept afterwards"] = async(func() error { return errorOfConn(here.Accept(7)) })
		waits["Dial afterwards"] = async(func() error { return errorOfConn(here.Dial(8)) })
		for name, done := range waits {
			err := receive(t, name, done)
			if err == nil || err == io.EOF || errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("%s ended with %v", name, err)
			}
		}
	})
}

// ---- Readers and writers ----

// failures are the ways in which a reader or writer fails.
func failures() map[string]func() error {
	fails := map[string]func() error{
		"panic":       func() error { panic("boom") },
		"no text":     func() error { return errors.New("") },
		"nil pointer": func() error { return (*fs.PathError)(nil) },
		"long text":   func() error { return errors.New(strings.Repeat("x", 3<<20)) },
	}
	for name, err := range testErrors {
		fails[name] = func() error { return fmt.Errorf("failing: %w", err) }
	}
	return fails
}

// isFailure checks what the peer gets.
func isFailure(t testing.TB, name string, err error) {
	t.Helper()
	if err == nil {
		t.Errorf("%s: there is no error", name)
	}
	for known, is := range testErrors {
		if errors.Is(err, is) != (known == name) {
			t.Errorf("%s: errors.Is(%.100v, %v) is %v", name, err, is, known != name)
		}
	}
}

// sizeFor returns one of a few sizes for each name, because all sizes for all would take long.
func sizeFor(name string) int {
	sizes := []int{0, 5, 2<<20 + 7}
	return sizes[len(name)%len(sizes)]
}

// A reader has the bytes and the end of the one that is served.
func TestReader(t *testing.T) {
	bothWays(t, func(t *testing.T, here, there *plugin.MuxBroker) {
		leavesNoStreams(t, here, there)
		read := func(src io.Reader, size int) error {
			id, stop := there.ServeReader(src)
			defer stop()
			r, err := here.DialReader(id)
			check(t, err)
			got, err := io.ReadAll(r)
			if !bytes.Equal(got, noise(size, 1)) {
				t.Errorf("of %d bytes, %d arrived", size, len(got))
			}
			if _, again := r.Read(make([]byte, 1)); again != cmp.Or(err, io.EOF) {
				t.Errorf("Read returned %.100v, and then %.100v", err, again)
			}
			check(t, errors.Join(r.Close(), r.Close()))
			if _, err := r.Read(make([]byte, 1)); !errors.Is(err, io.ErrClosedPipe) {
				t.Error("a closed reader returned", err)
			}
			return err
		}
		for name, fail := range failures() {
			size := sizeFor(name)
			check(t, read(bytes.NewReader(noise(size, 1)), size))
			failing := readerFunc(func([]byte) (int, error) { return 0, fail() })
			isFailure(t, name, read(io.MultiReader(bytes.NewReader(noise(size, 1)), failing), size))
		}
		last := func(end error) io.Reader {
			return readerFunc(func(p []byte) (int, error) { return copy(p, noise(5, 1)), end })
		}
		check(t, read(last(io.EOF), 5))
		isFailure(t, "registered", read(last(errRegistered), 5))
	})
}

// A writer has written everything when Close has returned, or has the error of
// the one that is served.
func TestWriter(t *testing.T) {
	bothWays(t, func(t *testing.T, here, there *plugin.MuxBroker) {
		leavesNoStreams(t, here, there)
		// The writer fails once it has got so many bytes.
		write := func(size, after int, fail func() error) (writeErr, closeErr error) {
			var got bytes.Buffer
			id, stop := there.ServeWriter(writerFunc(func(p []byte) (int, error) {
				if got.Len()+len(p) > after {
					return 0, fail()
				}
				return got.Write(p)
			}))
			defer stop()
			w, err := here.DialWriter(id)
			check(t, err)
			_, writeErr = w.Write(noise(size, 1))
			closeErr = w.Close()
			checkEqual(t, "Close", w.Close(), closeErr)
			if closeErr == nil && !bytes.Equal(got.Bytes(), noise(size, 1)) {
				t.Errorf("of %d bytes, %d were written", size, got.Len())
			}
			if _, err := w.Write([]byte("x")); !errors.Is(err, io.ErrClosedPipe) {
				t.Error("a closed writer returned", err)
			}
			return writeErr, closeErr
		}
		for name, fail := range failures() {
			size := sizeFor(name)
			writeErr, closeErr := write(size, size, nil)
			check(t, errors.Join(writeErr, closeErr))
			_, err := write(size+10, size, fail)
			isFailure(t, name, err)
			writeErr, closeErr = write(size+4<<20, size, fail)
			isFailure(t, name, writeErr)
			isFailure(t, name, closeErr)
		}
		_, err := write(10, 0, func() error { return nil })
		errorSays(t, err, io.ErrShortWrite.Error())
	})
}

// Closing a reader does not wait for a Read of the one that is served, and does
// not close that.
func TestReaderIsClosedEarly(t *testing.T) {
	bothWays(t, func(t *testing.T, here, there *plugin.MuxBroker) {
		leavesNoStreams(t, here)
		pipe, feed := io.Pipe()
		defer feed.Close()
		inside := make(chan bool, 2)
		id, _ := there.ServeReader(readerFunc(func(p []byte) (int, error) {
			inside <- true
			return pipe.Read(p)
		}))
		r, err := here.DialReader(id)
		check(t, err)
		receive(t, "a Read", inside)
		reading := async(func() error {
			_, err := r.Read(make([]byte, 1))
			return err
		})
		check(t, r.Close())
		errorIs(t, "Read during Close", receive(t, "Read", reading), io.ErrClosedPipe)
		_, err = feed.Write([]byte("x"))
		check(t, err)
	})
}

// Each end of a stream has an error if the other one is of another kind, or has no
// methods.
func TestWrongKind(t *testing.T) {
	bothWays(t, func(t *testing.T, here, there *plugin.MuxBroker) {
		leavesNoStreams(t, here)
		began := time.Now()
		for i, kind := range servedKinds {
			id, _ := kind.serve(there, func() {})
			other := servedKinds[(i+1)%len(servedKinds)]
			errorSays(t, useOnce(other.dial(here, id)), "method")
			none, _ := there.ServeRPC(struct{}{})
			errorSays(t, useOnce(other.dial(here, none)), "method")
		}
		if took := time.Since(began); took > 2*brokerTimeout {
			t.Errorf("the errors took %v", took)
		}
	})
}

// useOnce returns the error of dialling, or of the first use: a client learns
// from its first call that it has dialled something else.
func useOnce(end peerEnd, err error) error {
	if err != nil {
		return err
	}
	defer end.Close()
	return end.next()
}

// rawStreams serves a reader and a writer as it likes.
type rawStreams struct{ serve func(id uint32) error }

func (s rawStreams) Read(id uint32, _ *struct{}) error  { return s.serve(id) }
func (s rawStreams) Write(id uint32, _ *struct{}) error { return s.serve(id) }

// serveRaw serves rawStreams with net/rpc.
func serveRaw(st net.Conn, serve func(id uint32) error) {
	s := rpc.NewServer()
	_ = s.RegisterName("Plugin", rawStreams{serve})
	s.ServeConn(st)
}

// oddPeers are peers that get the stream of a reader or writer, with its id, and do
// as they like.
var oddPeers = map[string]func(t testing.TB, raw *rawPeer, st net.Conn, id []byte){
	"closes": func(_ testing.TB, _ *rawPeer, st net.Conn, _ []byte) { st.Close() },
	"is silent": func(_ testing.TB, _ *rawPeer, st net.Conn, id []byte) {
		_, _ = st.Write(id)
	},
	"speaks no gob": func(_ testing.TB, _ *rawPeer, st net.Conn, id []byte) {
		_, _ = st.Write(append(id, make([]byte, 100)...))
	},
	"answers at once": func(_ testing.TB, _ *rawPeer, st net.Conn, id []byte) {
		_, _ = st.Write(id)
		serveRaw(st, func(uint32) error { return nil })
	},
	"never answers": func(t testing.TB, raw *rawPeer, st net.Conn, id []byte) {
		_, _ = st.Write(id)
		serveRaw(st, func(id uint32) error {
			data := raw.dial(t, id)
			_, err := io.WriteString(data, "begin")
			return errors.Join(err, data.Close(), st.Close())
		})
	},
}

// A reader or writer of a peer that does as it likes ends with an error, and not as
// if it were complete.
func TestOddPeers(t *testing.T) {
	t.Parallel()
	for name, peer := range oddPeers {
		for _, kind := range servedKinds[:2] { // the reader and the writer
			t.Run(kind.name+" of a peer that "+name, func(t *testing.T) {
				t.Parallel()
				raw, c, _ := rawPlugin(t)
				dialling := async(func() error {
					end, err := kind.dial(c.broker, 7)
					if err != nil {
						return err
					}
					_ = end.next()
					err = end.next()
					if closeErr := end.Close(); kind.name == "writer" {
						err = closeErr
					}
					return err
				})
				st, err := raw.Accept()
				check(t, err)
				id := make([]byte, 4)
				_, err = io.ReadFull(st, id)
				check(t, err)
				go peer(t, raw, st, id) // ends with the connection
				if err := receive(t, "its end", dialling); err == nil || err == io.EOF {
					t.Errorf("it ends with %v", err)
				}
			})
		}
	}
}

// A peer can use a reader or writer once.
func TestServedOnce(t *testing.T) {
	raw, c, _ := rawPlugin(t)
	for i, method := range []string{"Plugin.Read", "Plugin.Write"} {
		id, stop := servedKinds[i].serve(c.broker, func() {})
		peer := rpc.NewClient(raw.dial(t, id))
		calls := make(chan *rpc.Call, 2)
		peer.Go(method, uint32(1), nil, calls)
		peer.Go(method, uint32(2), nil, calls)
		raw.accept(t)
		if failed := receive(t, "one of them", calls); failed.Error == nil {
			t.Errorf("%s returned no error", method)
		}
		within(t, "stop", 0, stop)
		isStopped(t, receive(t, "the other", calls).Error)
		check(t, peer.Close())
	}
}

// ---- Streams that are taken back ----

// useService calls use in its method.
type useService struct{ use func() }

func (s *useService) Use(struct{}, *struct{}) error {
	s.use()
	return nil
}

// peerEnd is what was dialled. It is used by next.
type peerEnd struct {
	io.Closer
	next func() error
}

// servedKinds are the kinds of what is served. Each calls use whenever it is used,
// and has no end of its own.
var servedKinds = []struct {
	name  string
	serve func(b *plugin.MuxBroker, use func()) (id uint32, stop func())
	dial  func(b *plugin.MuxBroker, id uint32) (peerEnd, error)
}{
	{"reader", serveUsedReader, dialReader},
	{"writer", serveUsedWriter, dialWriter},
	{"client", serveUsedService, dialClient},
}

// used returns a function that calls use for each Read or Write, which succeeds.
func used(use func()) func(p []byte) (int, error) {
	return func(p []byte) (int, error) {
		use()
		return len(p), nil
	}
}

func serveUsedReader(b *plugin.MuxBroker, use func()) (uint32, func()) {
	return b.ServeReader(readerFunc(used(use)))
}

func dialReader(b *plugin.MuxBroker, id uint32) (peerEnd, error) {
	r, err := b.DialReader(id)
	return peerEnd{r, func() error {
		_, err := r.Read(make([]byte, 32<<10))
		return err
	}}, err
}

func serveUsedWriter(b *plugin.MuxBroker, use func()) (uint32, func()) {
	return b.ServeWriter(writerFunc(used(use)))
}

func dialWriter(b *plugin.MuxBroker, id uint32) (peerEnd, error) {
	w, err := b.DialWriter(id)
	return peerEnd{w, func() error {
		_, err := w.Write(make([]byte, 32<<10))
		return err
	}}, err
}

func serveUsedService(b *plugin.MuxBroker, use func()) (uint32, func()) {
	return b.ServeRPC(&useService{use})
}

func dialClient(b *plugin.MuxBroker, id uint32) (peerEnd, error) {
	c, err := b.DialRPC(id)
	return peerEnd{c, func() error {
		return plugin.Call(context.Background(), c, "Plugin.Use", struct{}{}, nil)
	}}, err
}

// untilError calls next until it fails.
func untilError(next func() error) error {
	for {
		if err := next(); err != nil {
			return err
		}
	}
}

// isStopped checks what the peer gets after stop.
func isStopped(t testing.TB, err error) {
	t.Helper()
	errorSays(t, err, "stopped")
	if errors.Is(err, io.EOF) || isA[*plugin.ExitError](err) {
		t.Errorf("the peer gets a %T: %v", err, err)
	}
}

// After stop has returned, what was served is the caller's alone. The peer is
// told.
func TestStop(t *testing.T) {
	for _, kind := range servedKinds {
		t.Run(kind.name, func(t *testing.T) {
			t.Parallel()
			bothWays(t, func(t *testing.T, here, there *plugin.MuxBroker) {
				leavesNoStreams(t, here, there)
				for range 20 {
					uses, busy := 0, false // guarded by stop alone
					id, stop := kind.serve(here, func() {
						busy = true
						time.Sleep(rand.N(3 * time.Millisecond))
						uses++
						busy = false
					})
					end, err := kind.dial(there, id)
					check(t, err)
					using := async(func() error { return untilError(end.next) })
					time.Sleep(rand.N(5 * time.Millisecond))
					concurrently(t, 3, func(int) {
						stop()
						if busy {
							t.Error("stop returned while it was in use")
						}
					})
					uses = 0
					isStopped(t, receive(t, "its end", using))
					isStopped(t, end.next())
					if err := end.Close(); kind.name == "writer" {
						isStopped(t, err)
					}
					stop()
					if uses > 0 {
						t.Error("it was used after stop had returned")
					}
				}
			})
		})
	}
}

// stop ends the contexts of methods, waits for the methods, and may be called
// after the end of what it stops.
func TestStopOfCalls(t *testing.T) {
	bothWays(t, func(t *testing.T, here, there *plugin.MuxBroker) {
		s := newTestServer()
		id, stop := here.ServeRPC(s)
		c, err := there.DialRPC(id)
		check(t, err)
		call := func(method string) <-chan error {
			return async(func() error { return callIn(context.Background(), c, method) })
		}
		waiting, blocked := call("Wait"), call("Block")
		receive(t, "a call", s.started)
		receive(t, "a call", s.started)
		stopped := async(func() bool { stop(); return true })
		isStopped(t, receive(t, "the cause of the context", s.ended))
		isStopped(t, receive(t, "the call with a context", waiting))
		isStopped(t, receive(t, "a call afterwards", call("Echo")))
		if len(stopped) > 0 {
			t.Error("stop has not waited for a method")
		}
		send(t, "the end of a method", s.release, struct{}{})
		receive(t, "stop", stopped)
		isStopped(t, receive(t, "the call without a context", blocked))
		_, stop = here.ServeRPC(s)
		check(t, here.Close())
		within(t, "stop after the end of the session", 0, stop)
	})
}

// While a connection takes nothing, stop waits for nothing, contexts end what
// waits, and streams can be closed. The end of the session, from either side,
// ends the rest.
func TestStopWhileStuck(t *testing.T) {
	for _, kind := range servedKinds {
		closeHere := kind.name != "writer" // and otherwise there
		t.Run(kind.name, func(t *testing.T) {
			leavesNothing(t)
			a, b := plugin.TestConn(t)
			line := newFaultyConn(a, neverFails, true)
			here, there := joinBrokers(t, line, b)
			conn, _ := joined(t, here.Dial, there.Accept)
			var uses atomic.Int64
			id, stop := kind.serve(here, func() { uses.Add(1) })
			end, err := kind.dial(there, id)
			check(t, err)
			waits := []<-chan error{
				async(func() error { return untilError(end.next) }),
				async(func() error {
					return untilError(func() error { return writeTo(conn, 1000) })
				}),
			}
			await(t, "some use", func() bool { return uses.Load() > 10 })
			line.left.Store(0)
			receive(t, "a Write that stalls", line.stalled)
			within(t, "stop", 0, stop)
			within(t, "Close", 0, func() { conn.Close() })
			ctx, cancel := context.WithTimeout(context.Background(), time.Millisecond)
			defer cancel()
			if _, err := here.DialContext(ctx, 8); !errors.Is(err, context.DeadlineExceeded) {
				t.Error("DialContext returned", err)
			}
			waits = append(waits, async(func() error { return errorOfConn(there.Dial(9)) }))
			check(t, receive(t, "AcceptContext", async(func() error {
				_, err := here.AcceptContext(context.Background(), 9) // its answer is in a queue
				return err
			})))
			if closeHere {
				check(t, here.Close())
			} else {
				check(t, there.Close())
			}
			for _, done := range waits {
				receive(t, "the end of the session", done)
			}
		})
	}
}

// Invoke ends with its context, even if it has a stream as its result and cannot
// write.
func TestResultWhileStuck(t *testing.T) {
	a, b := plugin.TestConn(t)
	line := newFaultyConn(a, neverFails, true)
	k := new(kit)
	set := plugin.PluginSet{"kit": newKitPlugin(k)}
	serve(b, set)
	host, err := plugin.NewRPCClient(line, set)
	check(t, err)
	defer host.Close()
	r := dispenseKit(t, host)
	deadline := newDeadlineContext()
	opening := async(func() error {
		_, err := plugin.Invoke[io.ReadCloser](deadline, r, "Open", "late")
		return err
	})
	receive(t, "a call", k.event("opening"))
	line.left.Store(0)
	pinging := async(host.Ping)
	receive(t, "a Write that stalls", line.stalled)
	before := line.left.Load()
	send(t, "the signal", k.event("open"), struct{}{})
	await(t, "the Read behind the answer", func() bool { return line.left.Load() < before })
	deadline.pass()
	errorIs(t, "Invoke", receive(t, "Invoke", opening), context.DeadlineExceeded)
	check(t, line.Close())
	if err := receive(t, "Ping", pinging); err == nil {
		t.Error("a ping that was not sent is answered")
	}
}
