package plugin_test

import (
	"bytes"
	"context"
	"encoding/gob"
	"errors"
	"io"
	"net"
	"net/rpc"
	"os"
	"runtime"
	"sync"
	"testing"
	"time"

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

// addStreams adds beginnings of streams: no gob, and a header with each body.
func addStreams(f *testing.F, h any) {
	for _, sent := range notGob {
		f.Add(sent)
	}
	for _, body := range []any{allTypes, "text", struct{}{}} {
		var sent bytes.Buffer
		enc := gob.NewEncoder(&sent)
		for range 2 {
			check(f, errors.Join(enc.Encode(h), enc.Encode(body)))
		}
		f.Add(sent.Bytes())
		f.Add(sent.Bytes()[:sent.Len()-2])
	}
}

// A server ends its stream, whatever its caller sends.
func FuzzRPCServer(f *testing.F) {
	for _, method := range []string{"Plugin.Box", "Plugin.Wait", "Plugin.Missing"} {
		addStreams(f, rpc.Request{ServiceMethod: method, Seq: 1})
	}
	addStreams(f, rpc.Request{ServiceMethod: "Context.Cancel", Seq: 1 | 1<<63})
	raw, broker, _ := rawHost(f, newTestServer())
	f.Fuzz(func(t *testing.T, sent []byte) {
		id, stop := broker.ServeRPC(newTestServer())
		defer stop()
		stream := raw.dial(t, id)
		_ = stream.SetDeadline(time.Now().Add(hangs))
		_, writeErr := stream.Write(sent) // or the server has ended it before
		check(t, stream.Close())
		if _, err := io.Copy(io.Discard, stream); errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("the stream does not end: %v, %v", writeErr, err)
		}
	})
}

// The calls of a client end, whatever its peer sends.
func FuzzRPCClient(f *testing.F) {
	type response struct { // as this package sends it
		ServiceMethod string
		Seq           uint64
		Error, Is     string
	}
	addStreams(f, response{Seq: 1})
	addStreams(f, response{Seq: 1, Error: "failed", Is: "io.EOF\nunknown"})
	raw, host, _ := rawPlugin(f)
	f.Fuzz(func(t *testing.T, sent []byte) {
		var c *rpc.Client
		dialling := async(func() (err error) {
			c, err = host.broker.DialRPC(7)
			return err
		})
		stream, _ := raw.accept(t)
		check(t, receive(t, "a client", dialling))
		defer c.Close()
		first := c.Go("Plugin.Box", Box{}, new(Box), nil)
		second := async(func() error {
			return plugin.Call(context.Background(), c, "Plugin.Box", Box{}, new(Box))
		})
		_, err := stream.Read(make([]byte, 1)) // there is a call
		check(t, err)
		_, _ = stream.Write(sent) // the client may end it before
		_ = stream.Close()
		receive(t, "the first call", first.Done)
		receive(t, "the second call", second)
		if c.Call("Plugin.Box", Box{}, new(Box)) == nil {
			t.Error("a stream that has ended replies")
		}
	})
}

// ---- Brokers ----

// FuzzBroker opens, accepts, dials, serves, uses, closes and stops at random on both
// ends of a connection. Nothing hangs, and nothing is left.
func FuzzBroker(f *testing.F) {
	for seed := range uint64(20) {
		f.Add(noise(20+int(seed)*10, seed))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		goroutines := runtime.NumGoroutine()
		a, b := plugin.TestConn(t)
		host, client, server := joinEnds(t, a, b)
		fuzz := &brokerFuzz{t: t, ends: [2]*plugin.MuxBroker{client.broker, server.broker}}
		fuzz.ctx, fuzz.cancel = context.WithCancel(context.Background())
		for ; len(data) >= 2; data = data[2:] {
			op := brokerOps[int(data[0])%len(brokerOps)]
			op(fuzz, int(data[1]))
		}
		fuzz.end()
		_ = host.Close()
		if !poll(hangs, func() bool { return runtime.NumGoroutine() <= goroutines }) {
			t.Errorf("there were %d goroutines, and now %d\n%s", goroutines, runtime.NumGoroutine(), stacks())
		}
	})
}

// brokerOps are what is done to a broker. The number says to which of its streams and
// how.
var brokerOps = []func(fuzz *brokerFuzz, n int){
	(*brokerFuzz).accept,
	(*brokerFuzz).dial,
	(*brokerFuzz).meet,
	(*brokerFuzz).carry,
	(*brokerFuzz).closeConn,
	(*brokerFuzz).serve,
	(*brokerFuzz).dialServed,
	(*brokerFuzz).use,
	(*brokerFuzz).closeEnd,
	(*brokerFuzz).stop,
}

// brokerNumbers is how many numbers are accepted and dialled.
const brokerNumbers = 4

// brokerFuzz is both ends of a connection, and what is open on it.
type brokerFuzz struct {
	t      *testing.T
	ends   [2]*plugin.MuxBroker
	ctx    context.Context
	cancel context.CancelFunc
	all    sync.WaitGroup // what has been begun

	mu     sync.Mutex // guards the fields below
	conns  []net.Conn
	served []servedNumber
	dialed []peerEnd
	over   bool // what opens now is closed at once
}

// servedNumber is something that one end serves.
type servedNumber struct {
	side, kind int
	id         uint32
	stop       func()
}

// addConn keeps a stream that was opened.
func (fuzz *brokerFuzz) addConn(conn net.Conn, err error) {
	if err != nil {
		return
	}
	fuzz.mu.Lock()
	defer fuzz.mu.Unlock()
	fuzz.conns = append(fuzz.conns, conn)
	if fuzz.over {
		_ = conn.Close()
	}
}

// pick returns one of several.
func pick[T any](fuzz *brokerFuzz, list *[]T, n int) (v T, ok bool) {
	fuzz.mu.Lock()
	defer fuzz.mu.Unlock()
	if len(*list) == 0 {
		return v, false
	}
	return (*list)[n%len(*list)], true
}

// accept accepts one of a few numbers.
func (fuzz *brokerFuzz) accept(n int) {
	fuzz.all.Go(func() { fuzz.addConn(fuzz.ends[n%2].AcceptContext(fuzz.ctx, uint32(n/2%brokerNumbers))) })
}

// dial dials one of a few numbers.
func (fuzz *brokerFuzz) dial(n int) {
	fuzz.all.Go(func() { fuzz.addConn(fuzz.ends[n%2].DialContext(fuzz.ctx, uint32(n/2%brokerNumbers))) })
}

// meet opens a stream, and waits until it is open, so that all before has arrived.
func (fuzz *brokerFuzz) meet(n int) {
	here, there := fuzz.ends[n%2], fuzz.ends[1-n%2]
	a, b := joined(fuzz.t, here.Dial, there.Accept)
	fuzz.addConn(a, nil)
	fuzz.addConn(b, nil)
}

// carry reads or writes on a stream.
func (fuzz *brokerFuzz) carry(n int) {
	conn, ok := pick(fuzz, &fuzz.conns, n/2)
	if !ok {
		return
	}
	buf := make([]byte, n<<12)
	fuzz.all.Go(func() {
		if n%2 == 0 {
			_, _ = conn.Write(buf)
		} else {
			_, _ = conn.Read(buf)
		}
	})
}

func (fuzz *brokerFuzz) closeConn(n int) {
	if conn, ok := pick(fuzz, &fuzz.conns, n); ok {
		_ = conn.Close()
	}
}

// serve serves something of one of the kinds.
func (fuzz *brokerFuzz) serve(n int) {
	side, kind := n%2, n/2%len(servedKinds)
	id, stop := servedKinds[kind].serve(fuzz.ends[side], func() {})
	fuzz.mu.Lock()
	defer fuzz.mu.Unlock()
	fuzz.served = append(fuzz.served, servedNumber{side, kind, id, stop})
}

// dialServed dials what the other end serves, in one of four cases as another kind.
func (fuzz *brokerFuzz) dialServed(n int) {
	s, ok := pick(fuzz, &fuzz.served, n/4)
	if !ok {
		return
	}
	kind := s.kind
	if n%4 == 0 {
		kind = (kind + 1) % len(servedKinds)
	}
	fuzz.all.Go(func() {
		end, err := servedKinds[kind].dial(fuzz.ends[1-s.side], s.id)
		if err != nil {
			return
		}
		fuzz.mu.Lock()
		fuzz.dialed = append(fuzz.dialed, end)
		over := fuzz.over
		fuzz.mu.Unlock()
		if over {
			_ = end.Close()
		}
	})
}

// use uses what was dialled.
func (fuzz *brokerFuzz) use(n int) {
	if end, ok := pick(fuzz, &fuzz.dialed, n/4); ok {
		fuzz.all.Go(func() {
			for range n % 4 {
				_ = end.next()
			}
		})
	}
}

func (fuzz *brokerFuzz) closeEnd(n int) {
	if end, ok := pick(fuzz, &fuzz.dialed, n); ok {
		fuzz.all.Go(func() { _ = end.Close() })
	}
}

// stop stops what is served. It waits only for what is being used.
func (fuzz *brokerFuzz) stop(n int) {
	if s, ok := pick(fuzz, &fuzz.served, n); ok {
		within(fuzz.t, "stop", 0, s.stop)
	}
}

// end stops and closes everything. Then all that was begun ends, and no stream is left
// but those of the connection.
func (fuzz *brokerFuzz) end() {
	fuzz.cancel()
	fuzz.mu.Lock()
	fuzz.over = true
	conns, served, dialed := fuzz.conns, fuzz.served, fuzz.dialed
	fuzz.mu.Unlock()
	for _, conn := range conns {
		_ = conn.Close()
	}
	for _, s := range served {
		s.stop()
	}
	for _, end := range dialed {
		fuzz.all.Go(func() { _ = end.Close() })
	}
	done := async(func() bool {
		fuzz.all.Wait()
		return true
	})
	await(fuzz.t, "the end of what was begun", func() bool {
		fuzz.drain()
		return len(done) > 0
	})
	await(fuzz.t, "the end of all streams", func() bool {
		return plugin.OpenStreams(fuzz.ends[0]) <= connectionStreams
	})
	check(fuzz.t, fuzz.ends[0].Close())
}

// drain closes the streams that wait to be accepted, which they would do for five
// seconds: they dial what nothing accepts, or what is not served any more.
func (fuzz *brokerFuzz) drain() {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Millisecond)
	defer cancel()
	var all sync.WaitGroup
	closeAll := func(side int, id uint32) {
		for ctx.Err() == nil {
			if conn, err := fuzz.ends[side].AcceptContext(ctx, id); err == nil {
				_ = conn.Close()
			}
		}
	}
	for side := range fuzz.ends {
		for id := range uint32(brokerNumbers) {
			all.Go(func() { closeAll(side, id) })
		}
	}
	for _, s := range fuzz.served {
		all.Go(func() { closeAll(s.side, s.id) })
	}
	all.Wait()
}
