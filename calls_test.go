package plugin

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/gob"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"math/rand/v2"
	"net"
	"net/rpc"
	"os"
	"reflect"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/yamux"
)

// The tests of calls, errors and streams. Most run over a connection inside
// this process; "the plugin" is then merely the other end.

func init() {
	modes["calls"] = func() { Serve(&ServeConfig{HandshakeConfig: testHandshake, Plugins: callsPlugins()}) }
	gob.Register(CallsBox{})
	gob.Register(CallsInner{})
	gob.Register(CallsDeep{})
	gob.Register(CallsMoody{})
	gob.Register([]any{})
	gob.Register(map[string]any{})
	RegisterError(errCallsKnown, errCallsKnownToo)
}

var (
	errCallsKnown    = errors.New("calls: one that both sides know")
	errCallsKnownToo = errors.New("calls: another that both sides know")
	errCallsUnknown  = errors.New("calls: one that was not registered")
	errCallsCause    = errors.New("calls: the cause")
)

// CallsBox holds anything.
type CallsBox struct{ V any }

// CallsInner and CallsDeep are what a box holds.
type CallsInner struct{ N int }
type CallsDeep struct{ S []string }

// callsHidden is not registered with gob.
type callsHidden struct{ N int }

// CallsMoody fails to be encoded or decoded if told so.
type CallsMoody struct{ How, Text string }

func (m CallsMoody) GobEncode() ([]byte, error) {
	switch m.How {
	case "encode fails":
		return nil, errors.New("moody: no encoding today")
	case "encode panics":
		panic("moody: panic while encoding")
	}
	return []byte(m.How + "|" + m.Text), nil
}

func (m *CallsMoody) GobDecode(b []byte) error {
	m.How, m.Text, _ = strings.Cut(string(b), "|")
	switch m.How {
	case "decode fails":
		return errors.New("moody: no decoding today")
	case "decode panics":
		panic("moody: panic while decoding")
	}
	return nil
}

// CallsRing holds itself, and an interface; it can be encoded all the same.
type CallsRing struct {
	Self *CallsRing
	V    any
	Name string
}

func newCallsRing(name string) *CallsRing {
	r := &CallsRing{Name: name}
	r.Self, r.V = r, r
	return r
}

func (r *CallsRing) GobEncode() ([]byte, error) { return []byte(r.Name), nil }
func (r *CallsRing) GobDecode(b []byte) error   { *r = *newCallsRing(string(b)); return nil }

// CallsGate lets nobody decode it until it is open.
type CallsGate struct{ open chan struct{} }

func (*CallsGate) GobEncode() ([]byte, error) { return nil, nil }
func (g *CallsGate) GobDecode([]byte) error   { <-g.open; return nil }

// callsBadReplies are the values that CallsService.Bad returns in a box.
var callsBadReplies = map[string]any{
	"chan":         make(chan int),
	"func":         func() {},
	"unregistered": callsHidden{1},
	"nil pointer":  (*CallsInner)(nil),
	"encode fails": CallsMoody{How: "encode fails"}, "encode panics": CallsMoody{How: "encode panics"},
	"nested": []any{CallsInner{1}, CallsBox{CallsDeep{[]string{"x"}}}, make(chan int)},
	"deeper": CallsBox{CallsBox{[]any{CallsDeep{}, CallsInner{3}, CallsMoody{How: "encode panics"}}}},
}

// callsErrors are what CallsService.Fail returns.
var callsErrors = map[string]error{
	"io.EOF":                   io.EOF,
	"io.ErrUnexpectedEOF":      io.ErrUnexpectedEOF,
	"fs.ErrNotExist":           fs.ErrNotExist,
	"fs.ErrExist":              fs.ErrExist,
	"fs.ErrPermission":         fs.ErrPermission,
	"fs.ErrInvalid":            fs.ErrInvalid,
	"fs.ErrClosed":             fs.ErrClosed,
	"os.ErrDeadlineExceeded":   os.ErrDeadlineExceeded,
	"context.Canceled":         context.Canceled,
	"context.DeadlineExceeded": context.DeadlineExceeded,
	"registered":               errCallsKnown,
	"registered, too":          errCallsKnownToo,
}

// callsNilError is an error that panics when it is asked for its text.
type callsNilError struct{ text string }

func (e *callsNilError) Error() string { return e.text }

// CallsService is what most tests call, over every kind of connection.
type CallsService struct {
	broker  *MuxBroker
	started chan string   // gets the argument of each Block and Wait
	release chan struct{} // ends one Block
	ended   chan error    // gets why the context of a Wait ended
}

func newCallsService(b *MuxBroker) *CallsService {
	return &CallsService{b, make(chan string, 1000), make(chan struct{}), make(chan error, 1000)}
}

func (s *CallsService) Echo(in string, out *string) error          { *out = in; return nil }
func (s *CallsService) Box(in CallsBox, out *CallsBox) error       { *out = in; return nil }
func (s *CallsService) Moody(in CallsMoody, out *CallsMoody) error { *out = in; return nil }
func (s *CallsService) Ring(in *CallsRing, out *CallsRing) error   { *out = *in; return nil }
func (s *CallsService) Bytes(in []byte, out *[]byte) error         { *out = in; return nil }
func (s *CallsService) BadChan(_ string, out *chan int) error      { return nil }
func (s *CallsService) BadFunc(_ string, out *func()) error        { return nil }
func (s *CallsService) Bad(name string, out *CallsBox) error {
	out.V = callsBadReplies[name]
	return nil
}
func (s *CallsService) Panic(what string, _ *string) error                        { panic(what) }
func (s *CallsService) NilError(string, *string) error                            { return (*callsNilError)(nil) }
func (s *CallsService) Unfit(string) error                                        { return nil }
func (s *CallsService) MoodyReply(how string, out *CallsMoody) error              { out.How = how; return nil }
func (s *CallsService) Many(n int, out *[]byte) error                             { *out = make([]byte, n); return nil }
func (s *CallsService) Fail(in CallsFail, _ *string) error                        { return in.error() }
func (s *CallsService) FailWith(_ context.Context, in CallsFail, _ *string) error { return in.error() }

func (s *CallsService) Gate(_ string, out *CallsGate) error { return nil }

// Block returns when it is released. It has no context.
func (s *CallsService) Block(in string, out *string) error {
	s.started <- in
	<-s.release
	*out = in
	return nil
}

// Wait waits for the end of its context.
func (s *CallsService) Wait(ctx context.Context, in string, out *string) error {
	s.started <- in
	select {
	case <-ctx.Done():
		s.ended <- context.Cause(ctx)
		return ctx.Err()
	case <-s.release:
		*out = in
		return ctx.Err()
	}
}

// CallsFail says which error to return, and how.
type CallsFail struct{ Name, How string }

func (f CallsFail) error() error {
	err := callsErrors[f.Name]
	switch f.How {
	case "wrapped":
		return fmt.Errorf("reading %s: %w", "x", err)
	case "joined":
		return errors.Join(errCallsUnknown, err)
	case "path":
		return &fs.PathError{Op: "open", Path: "/x", Err: err}
	}
	return err
}

// CallsBack says what to call at the host.
type CallsBack struct {
	ID          uint32
	Method, Arg string
}

// CallBack calls the host.
func (s *CallsService) CallBack(ctx context.Context, in CallsBack, out *string) error {
	c, err := s.broker.DialRPC(in.ID)
	if err != nil {
		return err
	}
	defer c.Close()
	return Call(ctx, c, in.Method, in.Arg, out)
}

type callsClient struct {
	broker *MuxBroker
	*rpc.Client
}

func callsPlugins() PluginSet {
	return PluginSet{"calls": testPlugin{
		func(b *MuxBroker) (any, error) { return newCallsService(b), nil },
		func(b *MuxBroker, c *rpc.Client) (any, error) { return &callsClient{b, c}, nil },
	}}
}

// callsContext ends when nothing but a hang takes that long.
func callsContext(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), hangs)
	t.Cleanup(cancel)
	return ctx
}

// callsSoon waits until ok.
func callsSoon(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(hangs); !ok(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(end) {
			buf := make([]byte, 1<<20)
			t.Fatalf("it never happened that %s\n%s", what, buf[:runtime.Stack(buf, true)])
		}
	}
}

// callsGet receives from ch.
func callsGet[T any](t testing.TB, what string, ch <-chan T) (v T) {
	t.Helper()
	select {
	case v = <-ch:
	case <-time.After(hangs):
		buf := make([]byte, 1<<20)
		t.Fatalf("waiting in vain for %s\n%s", what, buf[:runtime.Stack(buf, true)])
	}
	return v
}

// callsSend sends to ch.
func callsSend[T any](t testing.TB, what string, ch chan<- T, v T) {
	t.Helper()
	select {
	case ch <- v:
	case <-time.After(hangs):
		t.Fatalf("nobody took %s", what)
	}
}

// callsGo runs f and returns its result in a channel.
func callsGo[T any](f func() T) <-chan T {
	ch := make(chan T, 1)
	go func() { ch <- f() }()
	return ch
}

// callsGoroutines fails the test if more goroutines are left at its end than
// there were when it was called. Not for parallel tests.
func callsGoroutines(t testing.TB) {
	before := runtime.NumGoroutine()
	t.Cleanup(func() {
		callsSoon(t, "all goroutines ended", func() bool { return runtime.NumGoroutine() <= before })
	})
}

func callsSpawn(f func()) bool {
	go f()
	return true
}

// callsOurs and callsStock are a client of this package and one of net/rpc's,
// callsServe and callsServeStock likewise servers of v.
func callsOurs(conn net.Conn) *rpc.Client  { return newRPCClient(conn, callsSpawn) }
func callsStock(conn net.Conn) *rpc.Client { return rpc.NewClient(conn) }

func callsServe(conn net.Conn, v any) {
	svc, err := newService(v)
	if err != nil {
		panic(err)
	}
	go newRPCServer(conn, map[string]*service{"Plugin": svc}, hclog.NewNullLogger(), false).serve(context.Background())
}

func callsServeStock(conn net.Conn, v any) {
	s := rpc.NewServer()
	if err := s.RegisterName("Plugin", v); err != nil {
		panic(err)
	}
	go s.ServeConn(conn)
}

// callsWires are the ways in which our ends and net/rpc's can meet.
var callsWires = []struct {
	name         string
	client       func(net.Conn) *rpc.Client
	serve        func(net.Conn, any)
	ours, served bool // the client is ours; the server is
}{
	{"ours to ours", callsOurs, callsServe, true, true},
	{"ours to stock", callsOurs, callsServeStock, true, false},
	{"stock to ours", callsStock, callsServe, false, true},
	{"stock to stock", callsStock, callsServeStock, false, false},
}

// callsOver returns a client for s over a wire.
func callsOver(t testing.TB, client func(net.Conn) *rpc.Client, serve func(net.Conn, any), v any) *rpc.Client {
	t.Helper()
	a, b := TestConn(t)
	serve(b, v)
	c := client(a)
	t.Cleanup(func() { c.Close() })
	return c
}

// callsEcho makes sure that the client still works.
func callsEcho(t testing.TB, c *rpc.Client) {
	t.Helper()
	var out string
	text := fmt.Sprint("echo ", rand.Int())
	if err := Call(callsContext(t), c, "Plugin.Echo", text, &out); err != nil || out != text {
		t.Errorf("the stream did not live on: %q, %v", out, err)
	}
}

// callsPlugin dispenses the test plugin inside this process and returns the
// host's end, the client and the service.
func callsPlugin(t testing.TB, logger hclog.Logger) (*RPCClient, *callsClient, *CallsService) {
	t.Helper()
	served := make(chan *CallsService, 1)
	plugins := callsPlugins()
	p := plugins["calls"].(testPlugin)
	p.server = func(b *MuxBroker) (any, error) {
		s := newCallsService(b)
		served <- s
		return s, nil
	}
	plugins["calls"] = p
	a, b := TestConn(t)
	go (&RPCServer{Plugins: plugins}).ServeConn(b) // ends with the connection
	host, err := newConnection(a, plugins, logger, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { host.session.close() })
	return host, dispense[*callsClient](t, host, "calls"), <-served
}

// callsBrokers returns the brokers of the two ends of a connection.
func callsBrokers(t testing.TB) (host, plugin *MuxBroker) {
	t.Helper()
	a, b := TestConn(t)
	host, plugin = callsBroker(t, a, true), callsBroker(t, b, false)
	return host, plugin
}

func callsBroker(t testing.TB, conn io.ReadWriteCloser, host bool) *MuxBroker {
	t.Helper()
	s, err := newSession(context.Background(), conn, host, hclog.NewNullLogger(), nil)
	if err != nil {
		t.Fatal(err)
	}
	b := newMuxBroker(s)
	s.spawn(func() { defer s.cancel(); b.Run() })
	t.Cleanup(s.close)
	return b
}

// callsBothWays runs a test with the host on either end.
func callsBothWays(t *testing.T, f func(t *testing.T, here, there *MuxBroker)) {
	t.Run("host to plugin", func(t *testing.T) {
		host, plugin := callsBrokers(t)
		f(t, host, plugin)
	})
	t.Run("plugin to host", func(t *testing.T) {
		host, plugin := callsBrokers(t)
		f(t, plugin, host)
	})
}

// callsRaw returns a broker, and the session of a peer that does as it likes.
func callsRaw(t testing.TB) (*MuxBroker, *yamux.Session) {
	t.Helper()
	a, b := TestConn(t)
	config := yamux.DefaultConfig()
	config.EnableKeepAlive = false
	config.LogOutput = io.Discard
	raw, err := yamux.Server(b, config)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { raw.Close() })
	return callsBroker(t, a, true), raw
}

func callsID(id uint32) []byte { return binary.LittleEndian.AppendUint32(nil, id) }

// Calls.

func TestCallEndsWithContext(t *testing.T) {
	timeout := func(ctx context.Context) (context.Context, context.CancelFunc) {
		return context.WithTimeoutCause(ctx, time.Millisecond, errCallsCause)
	}
	cancelCause := func(ctx context.Context) (context.Context, context.CancelFunc) {
		ctx, cancel := context.WithCancelCause(ctx)
		return ctx, func() { cancel(errCallsCause) }
	}
	plainTimeout := func(ctx context.Context) (context.Context, context.CancelFunc) {
		return context.WithTimeout(ctx, time.Millisecond)
	}
	for _, end := range []struct {
		name     string
		make     func(context.Context) (context.Context, context.CancelFunc)
		canceled bool
		cause    error
	}{
		{"cancel", context.WithCancel, true, context.Canceled},
		{"cancel with cause", cancelCause, true, errCallsCause},
		{"deadline", plainTimeout, false, context.DeadlineExceeded},
		{"deadline with cause", timeout, false, errCallsCause},
	} {
		for _, wire := range callsWires {
			t.Run(wire.name+"/"+end.name, func(t *testing.T) {
				s := newCallsService(nil)
				c := callsOver(t, wire.client, wire.serve, s)
				ctx, cancel := end.make(context.Background())
				defer cancel()
				reply := "before"
				done := callsGo(func() error { return Call(ctx, c, "Plugin.Block", "late", &reply) })
				callsGet(t, "the call", s.started)
				if end.canceled {
					cancel()
				}
				err := callsGet(t, "the end of Call", done)
				if !errors.Is(err, ctx.Err()) || !errors.Is(err, end.cause) {
					t.Errorf("Call returned %v; want one that is %v and %v", err, ctx.Err(), end.cause)
				}
				// The reply is in use again while the late one arrives. The
				// race detector watches as well.
				callsSend(t, "the release", s.release, struct{}{})
				for i := range 20 {
					reply = fmt.Sprint("again ", i)
					callsEcho(t, c)
				}
				if reply != "again 19" {
					t.Errorf("a late reply was written: %q", reply)
				}
			})
		}
	}
}

func TestCallWithEndedContext(t *testing.T) {
	for _, wire := range callsWires {
		s := newCallsService(nil)
		c := callsOver(t, wire.client, wire.serve, s)
		ctx, cancel := context.WithCancelCause(context.Background())
		cancel(errCallsCause)
		err := Call(ctx, c, "Plugin.Block", "", new(string))
		if !errors.Is(err, context.Canceled) || !errors.Is(err, errCallsCause) {
			t.Errorf("%s: %v", wire.name, err)
		}
		callsEcho(t, c)
		if len(s.started) > 0 {
			t.Errorf("%s: the method was called", wire.name)
		}
	}
}

// A reply that the caller gave in the wrong form must fail its own call, also
// when nobody waits for it any more.
func TestCallBadReplyHolder(t *testing.T) {
	for name, reply := range map[string]any{"no pointer": "", "a struct": CallsBox{}, "nil pointer": (*CallsBox)(nil)} {
		t.Run(name, func(t *testing.T) {
			for _, method := range []string{"Plugin.Box", "Plugin.Bad"} {
				c := callsOver(t, callsOurs, callsServe, newCallsService(nil))
				var arg any = CallsBox{CallsInner{1}}
				if method == "Plugin.Bad" {
					arg = "none"
				}
				if err := Call(callsContext(t), c, method, arg, reply); err == nil {
					t.Error("no error")
				}
				callsEcho(t, c)
				var out CallsBox
				if err := Call(callsContext(t), c, "Plugin.Box", CallsBox{CallsInner{2}}, &out); err != nil || out.V != (CallsInner{2}) {
					t.Errorf("a later reply of the type did not arrive: %v, %v", out, err)
				}
			}
			// Given up at once, whoever is called.
			for _, wire := range callsWires {
				s := newCallsService(nil)
				c := callsOver(t, wire.client, wire.serve, s)
				ctx, cancel := context.WithTimeout(context.Background(), hangs)
				err := callsGet(t, "the end of Call", callsGo(func() error { return Call(ctx, c, "Plugin.Block", "", reply) }))
				cancel()
				if err == nil || !strings.Contains(err.Error(), "Plugin.Block") || !strings.Contains(err.Error(), fmt.Sprintf("%T", reply)) {
					t.Errorf("%s: %v", wire.name, err)
				}
				callsEcho(t, c)
			}
		})
	}
	// net/rpc drops the reply if there is no place for it.
	c := callsOver(t, callsOurs, callsServe, newCallsService(nil))
	if err := Call(callsContext(t), c, "Plugin.Box", CallsBox{CallsInner{1}}, nil); err != nil {
		t.Error(err)
	}
	callsEcho(t, c)
}

// callsRecorder is a connection that keeps what is written to it.
type callsRecorder struct {
	net.Conn
	mu      sync.Mutex
	written []byte
	writes  int
}

func (r *callsRecorder) Write(p []byte) (int, error) {
	r.mu.Lock()
	r.written = append(r.written, p...)
	r.writes++
	r.mu.Unlock()
	return r.Conn.Write(p)
}

// Without cancellation, Call sends byte by byte what c.Call sends.
func TestCallSendsNothingMore(t *testing.T) {
	record := func(call func(c *rpc.Client, out *string) error) ([]byte, int) {
		a, b := TestConn(t)
		callsServe(b, newCallsService(nil))
		r := &callsRecorder{Conn: a}
		c := newRPCClient(r, callsSpawn)
		for range 10 {
			var out string
			if err := call(c, &out); err != nil || out != "x" {
				t.Fatal(out, err)
			}
		}
		c.Close()
		r.mu.Lock()
		defer r.mu.Unlock()
		return r.written, r.writes
	}
	plain, writes := record(func(c *rpc.Client, out *string) error { return c.Call("Plugin.Echo", "x", out) })
	got, n := record(func(c *rpc.Client, out *string) error {
		ctx, cancel := context.WithTimeout(context.Background(), hangs)
		defer cancel()
		return Call(ctx, c, "Plugin.Echo", "x", out)
	})
	if !bytes.Equal(plain, got) || n != writes {
		t.Errorf("Call wrote %d bytes in %d writes, c.Call %d in %d", len(got), n, len(plain), writes)
	}
}

func TestCallAllocations(t *testing.T) {
	c := callsOver(t, callsOurs, callsServe, newCallsService(nil))
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	var out string
	measure := func(call func() error) float64 {
		return testing.AllocsPerRun(500, func() {
			if err := call(); err != nil {
				t.Fatal(err)
			}
		})
	}
	// The first of these also pays for what is cached from then on.
	measure(func() error { return Call(ctx, c, "Plugin.Echo", "x", &out) })
	plain := measure(func() error { return c.Call("Plugin.Echo", "x", &out) })
	ours := measure(func() error { return Call(ctx, c, "Plugin.Echo", "x", &out) })
	t.Logf("c.Call allocates %v times, Call %v times", plain, ours)
	if ours > plain+2 {
		t.Errorf("Call allocates %v times, c.Call %v times", ours, plain)
	}
}

// Contexts in served methods.

func TestServedContext(t *testing.T) {
	for _, test := range []struct {
		name string
		end  func(cancel func(), c *rpc.Client, here *MuxBroker)
		want []error // what the cause is
	}{
		{"cancel", func(cancel func(), _ *rpc.Client, _ *MuxBroker) { cancel() }, []error{errCanceled, context.Canceled}},
		{"deadline", nil, []error{errTimedOut, context.DeadlineExceeded}},
		{"client closed", func(_ func(), c *rpc.Client, _ *MuxBroker) { c.Close() }, []error{errCallerGone}},
		{"session closed", func(_ func(), _ *rpc.Client, here *MuxBroker) { here.Close() }, nil},
		{"connection lost", func(_ func(), _ *rpc.Client, here *MuxBroker) { here.session.mux.Close() }, nil},
	} {
		t.Run(test.name, func(t *testing.T) {
			callsBothWays(t, func(t *testing.T, here, there *MuxBroker) {
				s := newCallsService(nil)
				c, err := here.DialRPC(there.ServeRPC(s))
				if err != nil {
					t.Fatal(err)
				}
				defer c.Close()
				ctx, cancel := context.WithCancel(callsContext(t))
				if test.end == nil {
					ctx, cancel = context.WithTimeout(ctx, 20*time.Millisecond)
				}
				defer cancel()
				done := callsGo(func() error { return Call(ctx, c, "Plugin.Wait", "", new(string)) })
				callsGet(t, "the call", s.started)
				if test.end != nil {
					test.end(cancel, c, here)
				}
				cause := callsGet(t, "the end of the method's context", s.ended)
				for _, want := range test.want {
					if !errors.Is(cause, want) {
						t.Errorf("the context ended by %v; want %v", cause, want)
					}
				}
				if err := callsGet(t, "the end of Call", done); err == nil {
					t.Error("Call returned no error")
				}
			})
		})
	}
}

// When the host asks a plugin to quit, the contexts of its methods end, and
// so do those of the methods that the host serves to it.
func TestServedContextEndsWithQuit(t *testing.T) {
	host, c, s := callsPlugin(t, hclog.NewNullLogger())
	callback := newCallsService(nil)
	id := c.broker.ServeRPC(callback)
	waiting := callsGo(func() error { return Call(callsContext(t), c.Client, "Plugin.Wait", "", new(string)) })
	calling := callsGo(func() error {
		return Call(callsContext(t), c.Client, "Plugin.CallBack", CallsBack{ID: id, Method: "Plugin.Wait"}, new(string))
	})
	callsGet(t, "the call", s.started)
	callsGet(t, "the callback", callback.started)
	closed := callsGo(host.Close)
	callsGet(t, "the end of the method's context", s.ended)
	callsGet(t, "the end of the callback's context", callback.ended)
	if err := callsGet(t, "Close", closed); err != nil {
		t.Error(err)
	}
	for _, done := range []<-chan error{waiting, calling} {
		if err := callsGet(t, "the end of Call", done); err == nil {
			t.Error("Call returned no error")
		}
	}
}

// One call's cancel is that call's alone, among many on one stream.
func TestCancelOneOfMany(t *testing.T) {
	callsBothWays(t, func(t *testing.T, here, there *MuxBroker) {
		const calls = 200
		s := newCallsService(nil)
		c, err := here.DialRPC(there.ServeRPC(s))
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		ctx, cancel := context.WithCancel(callsContext(t))
		var canceled, released []<-chan error
		for i := range calls {
			with := callsContext(t)
			if i%2 == 0 {
				with = ctx
			}
			done := callsGo(func() error {
				var out string
				err := Call(with, c, "Plugin.Wait", fmt.Sprint(i), &out)
				if err == nil && out != fmt.Sprint(i) {
					err = fmt.Errorf("call %d got the reply %q", i, out)
				}
				return err
			})
			if i%2 == 0 {
				canceled = append(canceled, done)
			} else {
				released = append(released, done)
			}
		}
		for range calls {
			callsGet(t, "the calls", s.started)
		}
		cancel()
		for _, done := range canceled {
			if err := callsGet(t, "a cancelled call", done); !errors.Is(err, context.Canceled) {
				t.Error(err)
			}
			callsGet(t, "the end of a context", s.ended)
		}
		for range released {
			callsSend(t, "a release", s.release, struct{}{})
		}
		for _, done := range released {
			if err := callsGet(t, "a released call", done); err != nil {
				t.Error(err)
			}
		}
		if len(s.ended) > 0 {
			t.Error("another call was cancelled, too:", <-s.ended)
		}
	})
}

// A cancel that comes too early, too late or again must do nothing.
func TestOddCancels(t *testing.T) {
	a, b := TestConn(t)
	s := newCallsService(nil)
	callsServe(b, s)
	enc, dec := gob.NewEncoder(a), gob.NewDecoder(a)
	_ = a.SetDeadline(time.Now().Add(hangs))
	send := func(method string, seq uint64, body any) {
		t.Helper()
		if err := errors.Join(enc.Encode(rpc.Request{ServiceMethod: method, Seq: seq}), enc.Encode(body)); err != nil {
			t.Fatal(err)
		}
	}
	receive := func(seq uint64, fails bool) {
		t.Helper()
		var resp rpc.Response
		var body string
		err := dec.Decode(&resp)
		into := any(&body)
		if resp.Error != "" {
			into = nil
		}
		if err := errors.Join(err, dec.Decode(into)); err != nil {
			t.Fatal(err)
		}
		if resp.Seq != seq || (resp.Error != "") != fails {
			t.Errorf("received %+v; want the answer to %d, failed: %v", resp, seq, fails)
		}
	}
	cancel := func(seq uint64, deadline any) { send(cancelMethod, seq|cancelBit, deadline) }

	cancel(1, true) // before its call
	send("Plugin.Wait", 1, "a")
	callsGet(t, "the call", s.started)
	cancel(77, false) // of no call
	send("Plugin.Echo", 2, "b")
	receive(2, false)
	if len(s.ended) > 0 {
		t.Error("a cancel that came before its call cancelled it:", <-s.ended)
	}
	cancel(2, true) // after its end
	cancel(1, false)
	cancel(1, true) // twice
	cancel(1, false)
	if cause := callsGet(t, "the end of the context", s.ended); !errors.Is(cause, errCanceled) {
		t.Error(cause)
	}
	receive(1, true)
	cancel(3, "no bool") // with what is no such argument
	send("Plugin.Wait", 3, "c")
	callsGet(t, "the call", s.started)
	cancel(3, CallsBox{}) // here it counts, and says no reason
	callsGet(t, "the end of the context", s.ended)
	receive(3, true)
	send(cancelMethod, 4, true) // without the bit it is a call like any other
	receive(4, true)
	send("Plugin.Echo", 5, "d")
	receive(5, false)
}

// Bad values.

// callsGoodBoxes are values that must arrive whatever has failed before.
var callsGoodBoxes = []CallsBox{
	{CallsInner{7}},
	{CallsMoody{Text: "fine"}},
	{[]any{CallsInner{1}, CallsBox{CallsDeep{[]string{"x"}}}, "text"}},
	{CallsBox{CallsBox{[]any{CallsDeep{[]string{"y"}}, CallsInner{3}, CallsMoody{Text: "good"}}}}},
	{map[string]any{"a": CallsInner{1}, "b": []any{CallsBox{}}}},
}

// callsBoxes sends good values to and fro.
func callsBoxes(t testing.TB, c *rpc.Client) {
	t.Helper()
	for _, box := range callsGoodBoxes {
		var out CallsBox
		if err := Call(callsContext(t), c, "Plugin.Box", box, &out); err != nil || !reflect.DeepEqual(out, box) {
			t.Errorf("%v did not arrive: %v, %v", box, out, err)
		}
	}
	var moody CallsMoody
	if err := Call(callsContext(t), c, "Plugin.Moody", CallsMoody{Text: "good"}, &moody); err != nil || moody.Text != "good" {
		t.Errorf("%v did not arrive: %v", moody, err)
	}
}

// callsBad is a call that fails: what it is made with, and what its error has
// to mention beside the method.
type callsBad struct {
	name, method string
	arg          any
	mentions     []string
}

var callsBadArguments = []callsBad{
	{"chan", "Plugin.Echo", make(chan int), []string{"chan int"}},
	{"func", "Plugin.Echo", func() {}, []string{"func()"}},
	{"unregistered", "Plugin.Box", CallsBox{callsHidden{1}}, []string{"CallsBox", "callsHidden"}},
	{"chan in any", "Plugin.Box", CallsBox{make(chan int)}, []string{"CallsBox", "chan int"}},
	{"nil pointer in any", "Plugin.Box", CallsBox{(*CallsInner)(nil)}, []string{"CallsBox", "CallsInner"}},
	{"nil", "Plugin.Echo", nil, []string{"nil"}},
	{"nil pointer", "Plugin.Box", (*CallsBox)(nil), []string{"*plugin.CallsBox"}},
	{"encode fails", "Plugin.Moody", CallsMoody{How: "encode fails"}, []string{"CallsMoody", "no encoding today"}},
	{"encode panics", "Plugin.Moody", CallsMoody{How: "encode panics"}, []string{"CallsMoody", "panic while encoding"}},
	{"encode panics in any", "Plugin.Box", CallsBox{CallsMoody{How: "encode panics"}}, []string{"CallsBox", "panic while encoding"}},
	{"nested", "Plugin.Box", CallsBox{[]any{CallsInner{1}, CallsBox{CallsDeep{[]string{"x"}}}, make(chan int)}}, []string{"CallsBox", "chan int"}},
	{"deeper", "Plugin.Box", CallsBox{CallsBox{CallsBox{[]any{CallsDeep{}, CallsInner{3}, CallsMoody{How: "encode panics"}}}}}, []string{"CallsBox"}},
}

func init() {
	self := map[string]any{}
	self["self"] = self
	callsBadArguments = append(callsBadArguments, callsBad{"holds itself", "Plugin.Box", CallsBox{self}, []string{"CallsBox", "itself"}})
}

// Arguments that can be sent and not be received.
var callsUndecodable = []callsBad{
	{"another type", "Plugin.Echo", 7, []string{"string"}},
	{"a struct", "Plugin.Echo", CallsInner{1}, []string{"string"}},
	{"no field in common", "Plugin.Box", CallsInner{1}, []string{"CallsBox"}},
	{"decode fails", "Plugin.Moody", CallsMoody{How: "decode fails"}, []string{"CallsMoody", "no decoding today"}},
	{"decode panics", "Plugin.Moody", CallsMoody{How: "decode panics"}, []string{"CallsMoody", "panic while decoding"}},
	{"decode fails in any", "Plugin.Box", CallsBox{[]any{CallsInner{1}, CallsMoody{How: "decode fails"}}}, []string{"CallsBox"}},
	{"decode panics in any", "Plugin.Box", CallsBox{[]any{CallsDeep{}, CallsMoody{How: "decode panics"}}}, []string{"CallsBox"}},
}

// Replies that cannot be sent.
var callsUnsendable = []callsBad{
	{"chan", "Plugin.BadChan", "", []string{"chan int"}},
	{"func", "Plugin.BadFunc", "", []string{"func()"}},
	{"chan in any", "Plugin.Bad", "chan", []string{"CallsBox", "chan int"}},
	{"func in any", "Plugin.Bad", "func", []string{"CallsBox", "func()"}},
	{"unregistered", "Plugin.Bad", "unregistered", []string{"CallsBox", "callsHidden"}},
	{"nil pointer in any", "Plugin.Bad", "nil pointer", []string{"CallsBox", "CallsInner"}},
	{"encode fails", "Plugin.MoodyReply", "encode fails", []string{"CallsMoody", "no encoding today"}},
	{"encode panics", "Plugin.MoodyReply", "encode panics", []string{"CallsMoody", "panic while encoding"}},
	{"encode panics in any", "Plugin.Bad", "encode panics", []string{"CallsBox"}},
	{"nested", "Plugin.Bad", "nested", []string{"CallsBox"}},
	{"deeper", "Plugin.Bad", "deeper", []string{"CallsBox"}},
}

func TestOneBadValueFailsOneCall(t *testing.T) {
	for _, wire := range callsWires {
		for kind, bad := range map[string]struct {
			calls []callsBad
			can   bool
		}{
			"argument":             {callsBadArguments, wire.ours},
			"undecodable argument": {callsUndecodable, wire.served},
			"reply":                {callsUnsendable, wire.served},
		} {
			if !bad.can { // net/rpc itself breaks
				continue
			}
			t.Run(wire.name+"/"+kind, func(t *testing.T) {
				for _, call := range bad.calls {
					t.Run(call.name, func(t *testing.T) { testBadValues(t, wire.client, wire.serve, call) })
				}
				t.Run("all", func(t *testing.T) { testBadValues(t, wire.client, wire.serve, bad.calls...) })
			})
		}
	}
}

// testBadValues makes calls that fail, on one stream, beside one that does not.
func testBadValues(t *testing.T, client func(net.Conn) *rpc.Client, serve func(net.Conn, any), bad ...callsBad) {
	s := newCallsService(nil)
	c := callsOver(t, client, serve, s)
	var beside string
	done := callsGo(func() error { return Call(callsContext(t), c, "Plugin.Block", "beside", &beside) })
	callsGet(t, "the call beside", s.started)
	var others sync.WaitGroup
	for _, call := range bad {
		for _, how := range []string{"Call", "c.Call"} {
			others.Go(func() { callsEcho(t, c) })
			var err error
			var reply any = new(CallsBox)
			switch call.method {
			case "Plugin.BadChan":
				reply = new(chan int)
			case "Plugin.BadFunc":
				reply = new(func())
			case "Plugin.Echo":
				reply = new(string)
			case "Plugin.Moody", "Plugin.MoodyReply":
				reply = new(CallsMoody)
			}
			if how == "Call" {
				err = Call(callsContext(t), c, call.method, call.arg, reply)
			} else {
				err = callsGet(t, "c.Call", callsGo(func() error { return c.Call(call.method, call.arg, reply) }))
			}
			if err == nil {
				t.Errorf("%s %s: no error", how, call.name)
				continue
			}
			for _, want := range append(call.mentions, call.method) {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("%s %s: the error does not mention %s: %v", how, call.name, want, err)
				}
			}
			others.Go(func() { callsEcho(t, c) })
		}
	}
	others.Wait()
	callsBoxes(t, c)
	callsSend(t, "the release", s.release, struct{}{})
	if err := callsGet(t, "the call beside", done); err != nil || beside != "beside" {
		t.Errorf("the call beside returned %q, %v", beside, err)
	}
}

// A reply that cannot be read fails its call alone, where Call is used.
func TestUndecodableReply(t *testing.T) {
	c := callsOver(t, callsOurs, callsServe, newCallsService(nil))
	for _, call := range []struct {
		method, arg string
		reply       any
	}{
		{"Plugin.Echo", "text", new(int)},
		{"Plugin.Echo", "text", new(CallsInner)},
		{"Plugin.MoodyReply", "decode fails", new(CallsMoody)},
		{"Plugin.MoodyReply", "decode panics", new(CallsMoody)},
	} {
		err := Call(callsContext(t), c, call.method, call.arg, call.reply)
		if err == nil || !strings.Contains(err.Error(), call.method) || !strings.Contains(err.Error(), reflect.TypeOf(call.reply).String()) {
			t.Errorf("%s into %T: %v", call.method, call.reply, err)
		}
		callsEcho(t, c)
	}
	callsBoxes(t, c)
}

// A reply that nobody waits for any more may bring definitions of types that
// later ones use.
func TestAbandonedReplyKeepsStep(t *testing.T) {
	for _, wire := range callsWires[:2] {
		t.Run(wire.name, func(t *testing.T) {
			s := &callsSlowBox{newCallsService(nil)}
			c := callsOver(t, wire.client, wire.serve, s)
			for i := range callsGoodBoxes {
				ctx, cancel := context.WithCancel(context.Background())
				done := callsGo(func() error { return Call(ctx, c, "Plugin.Slow", i, new(CallsBox)) })
				callsGet(t, "the call", s.started)
				cancel()
				if err := callsGet(t, "the end of Call", done); !errors.Is(err, context.Canceled) {
					t.Error(err)
				}
				callsSend(t, "the release", s.release, struct{}{})
				for range 5 {
					callsEcho(t, c)
				}
			}
			callsBoxes(t, c)
		})
	}
}

// callsSlowBox returns boxes when it is released.
type callsSlowBox struct{ *CallsService }

func (s *callsSlowBox) Slow(i int, out *CallsBox) error {
	s.started <- ""
	<-s.release
	*out = callsGoodBoxes[i]
	return nil
}

// A type that encodes itself is not looked into: it may well hold itself.
func TestSelfEncodingType(t *testing.T) {
	for _, wire := range callsWires[:3] {
		c := callsOver(t, wire.client, wire.serve, newCallsService(nil))
		var out CallsRing
		if err := Call(callsContext(t), c, "Plugin.Ring", newCallsRing("x"), &out); err != nil || out.Name != "x" {
			t.Errorf("%s: %q, %v", wire.name, out.Name, err)
		}
		callsEcho(t, c)
	}
}

// Methods that do not fit.

func TestUnfitAndMissingMethods(t *testing.T) {
	for _, test := range []struct {
		method   string
		mentions []string
	}{
		{"Plugin.Unfit", []string{"Plugin.Unfit", "takes 1 argument"}},
		{"Plugin.Missing", []string{"can't find method Plugin.Missing", "Echo", "Wait", "older", "ProtocolVersion"}},
		{"Other.Echo", []string{"can't find service Other.Echo", "Plugin"}},
		{"Echo", []string{"ill-formed", "Echo"}},
	} {
		for _, wire := range callsWires {
			if !wire.served {
				continue
			}
			c := callsOver(t, wire.client, wire.serve, newCallsService(nil))
			err := Call(callsContext(t), c, test.method, CallsBox{CallsInner{1}}, new(string))
			for _, want := range test.mentions {
				if err == nil || !strings.Contains(err.Error(), want) {
					t.Errorf("%s: %s: %v does not mention %q", wire.name, test.method, err, want)
				}
			}
			if !errors.As(err, new(rpc.ServerError)) {
				t.Errorf("%T is no rpc.ServerError", err)
			}
			callsBoxes(t, c)
		}
	}
}

// CallsUnusable has a method of every kind that cannot be called.
type CallsUnusable struct{}

func (CallsUnusable) Many(_, _, _ string) error                                { return nil }
func (CallsUnusable) NoPointer(_, _ string) error                              { return nil }
func (CallsUnusable) NoError(_ string, _ *string)                              {}
func (CallsUnusable) OtherResult(_ string, _ *string) bool                     { return false }
func (CallsUnusable) HiddenArgument(_ callsHidden, _ *string) error            { return nil }
func (CallsUnusable) HiddenReply(_ string, _ *callsHidden) error               { return nil }
func (CallsUnusable) Variadic(_ string, _ ...string) error                     { return nil }
func (CallsUnusable) ContextLast(_ string, _ *string, _ context.Context) error { return nil }

// CallsPointer has its method on the pointer.
type CallsPointer struct{}

func (*CallsPointer) Echo(in string, out *string) error { *out = in; return nil }

func TestDispenseWithoutUsableMethods(t *testing.T) {
	for _, test := range []struct {
		name     string
		v        any
		mentions []string
	}{
		{"unusable", CallsUnusable{}, []string{"CallsUnusable", "Many: it takes 3", "NoPointer: its reply, a string", "NoError: ", "OtherResult: ", "HiddenArgument: its argument", "HiddenReply: its reply", "Variadic: ", "ContextLast: "}},
		{"on the pointer", CallsPointer{}, []string{"CallsPointer", "pass a pointer"}},
		{"none", struct{}{}, []string{"no method"}},
		{"nil", nil, []string{"returned nil"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			client, _ := TestPluginRPCConn(t, PluginSet{"p": testPlugin{serves(test.v), func(*MuxBroker, *rpc.Client) (any, error) { return 1, nil }}}, nil)
			_, err := client.Dispense("p")
			for _, want := range test.mentions {
				if err == nil || !strings.Contains(err.Error(), want) {
					t.Errorf("%v does not mention %q", err, want)
				}
			}
			if err := client.Ping(); err != nil {
				t.Error(err)
			}
		})
	}
}

// What cannot be served as a callback is told to the one who calls it.
func TestServeRPCWithoutUsableMethods(t *testing.T) {
	callsBothWays(t, func(t *testing.T, here, there *MuxBroker) {
		for _, v := range []any{nil, CallsUnusable{}} {
			c, err := here.DialRPC(there.ServeRPC(v))
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			if err := Call(callsContext(t), c, "Plugin.Echo", "", new(string)); err == nil || !strings.Contains(err.Error(), "cannot be called") {
				t.Error(err)
			}
		}
	})
}

// Panics.

func TestCallbackCannotCrashHost(t *testing.T) {
	var log callsLog
	_, c, _ := callsPlugin(t, hclog.New(&hclog.LoggerOptions{Output: &log, Level: hclog.Debug}))
	callback := newCallsService(nil)
	for _, method := range []string{"Panic", "NilError"} {
		log.Reset()
		id := c.broker.ServeRPC(callback)
		err := Call(callsContext(t), c.Client, "Plugin.CallBack", CallsBack{id, "Plugin." + method, "a broken callback"}, new(string))
		if err == nil || method == "Panic" && !strings.Contains(err.Error(), "a broken callback") {
			t.Errorf("%s: the plugin got %v", method, err)
		}
		if out := log.String(); method == "Panic" && (!strings.Contains(out, "[ERROR]") || !strings.Contains(out, "a broken callback") || !strings.Contains(out, "calls_test.go")) {
			t.Errorf("%s was logged as %s", method, out)
		}
		callsEcho(t, c.Client)
	}
	// The stream lives on, and what was served beside it.
	host, plugin := callsBrokers(t)
	s := newCallsService(nil)
	client, err := plugin.DialRPC(host.ServeRPC(s))
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	done := callsGo(func() error { return Call(callsContext(t), client, "Plugin.Block", "", new(string)) })
	callsGet(t, "the call beside", s.started)
	for range 3 {
		if err := Call(callsContext(t), client, "Plugin.Panic", "boom", new(string)); err == nil || !strings.Contains(err.Error(), "boom") {
			t.Error(err)
		}
	}
	callsEcho(t, client)
	callsSend(t, "the release", s.release, struct{}{})
	if err := callsGet(t, "the call beside", done); err != nil {
		t.Error(err)
	}
}

// callsLog is a buffer that may be written to and read concurrently.
type callsLog struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (l *callsLog) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.Write(p)
}
func (l *callsLog) String() string { l.mu.Lock(); defer l.mu.Unlock(); return l.buf.String() }
func (l *callsLog) Reset()         { l.mu.Lock(); defer l.mu.Unlock(); l.buf.Reset() }

// A panic in a plugin ends it, and every caller learns of what.
func TestPluginPanics(t *testing.T) {
	t.Parallel()
	cfg := config(t, "calls")
	cfg.Plugins = callsPlugins()
	_, p := start(t, cfg)
	c, other := dispense[*callsClient](t, p, "calls"), dispense[*callsClient](t, p, "calls")
	reader, err := c.broker.DialReader(1) // nobody serves it
	if err == nil {
		t.Error("there is a reader:", reader)
	}
	var inFlight []<-chan error
	for i := range 20 {
		client, method := c.Client, "Plugin.Block"
		if i%2 == 0 {
			client, method = other.Client, "Plugin.Wait"
		}
		inFlight = append(inFlight, callsGo(func() error { return Call(callsContext(t), client, method, "", new(string)) }))
	}
	callsEcho(t, c.Client)
	callsEcho(t, other.Client)
	inFlight = append(inFlight, callsGo(func() error { return Call(callsContext(t), c.Client, "Plugin.Panic", "the plugin's end", new(string)) }))
	for _, done := range inFlight {
		err := callsGet(t, "a call in flight", done)
		var exit *ExitError
		if !errors.As(err, &exit) {
			// It may have been too late to be in flight.
			if !errors.Is(err, rpc.ErrShutdown) {
				t.Errorf("a call returned %T %v", err, err)
			}
			continue
		}
		if !strings.Contains(exit.Panic, "the plugin's end") || !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Errorf("a call returned %v", err)
		}
	}
	if err := callsGet(t, "a call after the end", callsGo(func() error { return c.Call("Plugin.Echo", "", new(string)) })); !errors.Is(err, rpc.ErrShutdown) {
		t.Error("a later call returned", err)
	}
}

// Errors.

func TestErrorIdentity(t *testing.T) {
	cfg := config(t, "calls")
	cfg.Plugins = callsPlugins()
	_, p := start(t, cfg)
	process := dispense[*callsClient](t, p, "calls").Client
	stockServer := callsOver(t, callsOurs, callsServeStock, newCallsService(nil))
	stockClient := callsOver(t, callsStock, callsServe, newCallsService(nil))
	for name, sentinel := range callsErrors {
		for _, how := range []string{"", "wrapped", "joined", "path"} {
			in := CallsFail{name, how}
			for _, method := range []string{"Plugin.Fail", "Plugin.FailWith"} {
				err := Call(callsContext(t), process, method, in, new(string))
				testRemoteError(t, err, in.error().Error())
				for other, known := range callsErrors {
					if got, want := errors.Is(err, known), errors.Is(in.error(), known); got != want {
						t.Errorf("%s %s: errors.Is(%v, %s) is %v", name, how, err, other, got)
					}
				}
				if !errors.Is(err, sentinel) {
					t.Errorf("%s %s: %v has lost its identity", name, how, err)
				}
				if errors.Is(err, errCallsUnknown) {
					t.Errorf("%s %s: %v is an error that was not registered", name, how, err)
				}
			}
			testRemoteError(t, Call(callsContext(t), stockServer, "Plugin.Fail", in, new(string)), in.error().Error())
			testRemoteError(t, Call(callsContext(t), stockClient, "Plugin.Fail", in, new(string)), in.error().Error())
		}
	}
}

// testRemoteError checks that err is a server's error with that text.
func testRemoteError(t *testing.T, err error, text string) {
	t.Helper()
	var server rpc.ServerError
	if !errors.As(err, &server) || string(server) != text || err.Error() != text {
		t.Errorf("%T %v; want an rpc.ServerError with the text %q", err, err, text)
	}
}

func TestRegisterError(t *testing.T) {
	first, second := errors.New("calls: the same text"), errors.New("calls: the same text")
	RegisterError(first, second)
	RegisterError(second)
	if got := knownErrors(errorNames(fmt.Errorf("wrapped: %w", first))); len(got) != 1 || got[0] != first {
		t.Error("the first is known as", got)
	}
	if got := errorNames(second); got != nil {
		t.Error("the second has the names", got)
	}
	if got := knownErrors([]string{"registered: by the other side alone", ""}); got != nil {
		t.Error("unknown names are known as", got)
	}
	defer func() {
		if recover() == nil {
			t.Error("a nil error does not panic")
		}
	}()
	RegisterError(nil)
}

// Sizes.

func TestLargeCall(t *testing.T) {
	_, c, _ := callsPlugin(t, hclog.NewNullLogger())
	in := make([]byte, 256<<20)
	for i := 0; i < len(in); i += 4093 {
		in[i] = byte(i)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	var out []byte
	began := time.Now()
	if err := Call(ctx, c.Client, "Plugin.Bytes", in, &out); err != nil || !bytes.Equal(in, out) {
		t.Errorf("%d bytes came back, %v", len(out), err)
	}
	t.Logf("256 MiB to and fro took %v", time.Since(began))
	callsEcho(t, c.Client)
}

func TestTooLargeToSend(t *testing.T) {
	a, b := TestConn(t)
	callsServe(b, newCallsService(nil))
	r := &callsRecorder{Conn: a}
	c := newRPCClient(r, callsSpawn)
	defer c.Close()
	callsEcho(t, c)
	r.mu.Lock()
	before := len(r.written)
	r.mu.Unlock()
	err := Call(context.Background(), c, "Plugin.Bytes", make([]byte, maxMessage+1), new([]byte))
	if err == nil || !strings.Contains(err.Error(), "stream") || !strings.Contains(err.Error(), "Plugin.Bytes") || !strings.Contains(err.Error(), "[]uint8") {
		t.Errorf("it was refused by %v", err)
	}
	r.mu.Lock()
	sent := len(r.written) - before
	r.mu.Unlock()
	if sent > 100 {
		t.Errorf("%d bytes of it were sent", sent)
	}
	callsEcho(t, c)
	// A reply likewise.
	if err := Call(context.Background(), c, "Plugin.Many", maxMessage+1, new([]byte)); err == nil || !strings.Contains(err.Error(), "stream") {
		t.Errorf("the reply was refused by %v", err)
	}
	callsEcho(t, c)
}

// callsForged are beginnings of a message that claim more than may be, or is.
var callsForged = map[string][]byte{
	"one byte above":     {0xfc, 0x40, 0, 0, 1, 0xff},
	"eight bytes":        {0xf8, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff},
	"a count too long":   {0x80, 1, 2, 3},
	"nothing":            {0},
	"text":               []byte("HTTP/1.1 400 Bad Request\r\nContent-Type: text/plain\r\n\r\n400 Bad Request: nothing for you to be seen here, so go away\n"),
	"as much as may be":  {0xfc, 0x40, 0, 0, 0, 1, 2, 3},
	"a cut count":        {0xfc, 0x40},
	"a definition alone": {0x03, 0x01, 0x02, 0x03},
}

func TestForgedMessages(t *testing.T) {
	for name, forged := range callsForged {
		t.Run(name, func(t *testing.T) {
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			// To a server: it hangs up.
			a, b := TestConn(t)
			callsServe(b, newCallsService(nil))
			_, _ = a.Write(forged)
			_ = a.(*net.TCPConn).CloseWrite()
			_ = a.SetDeadline(time.Now().Add(hangs))
			if _, err := io.ReadAll(a); err != nil && errors.Is(err, os.ErrDeadlineExceeded) {
				t.Error("the server did not hang up:", err)
			}
			// To a client: its calls fail.
			a, b = TestConn(t)
			c := callsOurs(a)
			defer c.Close()
			done := callsGo(func() error { return Call(callsContext(t), c, "Plugin.Echo", "x", new(string)) })
			_, _ = b.Read(make([]byte, 1))
			_, _ = b.Write(forged)
			_ = b.(*net.TCPConn).CloseWrite()
			if err := callsGet(t, "the call", done); err == nil || errors.Is(err, context.DeadlineExceeded) {
				t.Error("the call returned", err)
			}
			runtime.ReadMemStats(&after)
			if used := after.TotalAlloc - before.TotalAlloc; used > 32<<20 {
				t.Errorf("%d bytes of memory were allocated", used)
			}
		})
	}
	// The text says what is allowed.
	r := newGobReader(bytes.NewReader(callsForged["one byte above"]))
	if err := r.next(); err == nil || !strings.Contains(err.Error(), fmt.Sprint(maxMessage+1)) || !strings.Contains(err.Error(), fmt.Sprint(maxMessage)) {
		t.Error(err)
	}
}

// Streams by number.

func TestBrokerTimeouts(t *testing.T) {
	t.Parallel()
	callsBothWays(t, func(t *testing.T, here, _ *MuxBroker) {
		for name, do := range map[string]func(context.Context, uint32) (net.Conn, error){"dialled": here.AcceptContext, "accepted": here.DialContext} {
			ctx, cancel := context.WithTimeoutCause(context.Background(), 50*time.Millisecond, errCallsCause)
			defer cancel()
			conn, err := do(ctx, 4711)
			if conn != nil || !errors.Is(err, context.DeadlineExceeded) || !errors.Is(err, errCallsCause) {
				t.Fatalf("%v, %v", conn, err)
			}
			for _, want := range []string{"4711", "other side", name} {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("%q does not say %q", err, want)
				}
			}
		}
	})
}

// Accept and Dial take five seconds, and so does everything that waits for the
// other side; afterwards nothing is left of it.
func TestNothingIsLeftAfterTimeout(t *testing.T) {
	callsGoroutines(t)
	host, plugin := callsBrokers(t)
	baseline := runtime.NumGoroutine()
	began := time.Now()
	for i := range 300 {
		host.ServeReader(strings.NewReader("x"))
		plugin.ServeWriter(io.Discard)
		host.ServeRPC(newCallsService(nil))
		// Silent streams, and such as nobody accepts.
		st, err := plugin.session.open()
		if err != nil {
			t.Fatal(err)
		}
		if i%2 == 0 {
			_, _ = st.Write(callsID(uint32(1000 + i)))
		} else {
			_, _ = st.Write([]byte{1, 2})
		}
		t.Cleanup(func() { abort(st) })
	}
	for i, do := range []func(uint32) (net.Conn, error){host.Accept, plugin.Dial} {
		id, what := uint32(4712+i), []string{"dialled", "accept"}[i]
		conn, err := do(id)
		if conn != nil || err == nil || !strings.Contains(err.Error(), what) || !strings.Contains(err.Error(), fmt.Sprint(id)) {
			t.Errorf("%v, %v", conn, err)
		}
	}
	if took := time.Since(began); took < 5*time.Second {
		t.Errorf("Accept and Dial took %v together", took)
	}
	for _, b := range []*MuxBroker{host, plugin} {
		callsSoon(t, "the broker forgot all ids", func() bool {
			b.mu.Lock()
			defer b.mu.Unlock()
			return len(b.accepting)+len(b.parked) == 0
		})
	}
	callsSoon(t, "all goroutines ended", func() bool { return runtime.NumGoroutine() <= baseline })
	callsTalk(t, host, plugin)
}

// callsTalk makes sure that two brokers work.
func callsTalk(t testing.TB, here, there *MuxBroker) {
	t.Helper()
	id := here.NextId()
	accepted := callsGo(func() error {
		conn, err := there.AcceptContext(callsContext(t), id)
		if err != nil {
			return err
		}
		defer conn.Close()
		_, err = io.Copy(conn, conn)
		return err
	})
	conn, err := here.DialContext(callsContext(t), id)
	if err != nil {
		t.Fatal("the brokers do not work any more:", err)
	}
	_, _ = io.WriteString(conn, "hello")
	got := make([]byte, 5)
	_ = conn.SetReadDeadline(time.Now().Add(hangs))
	if _, err := io.ReadFull(conn, got); err != nil || string(got) != "hello" {
		t.Errorf("%q, %v", got, err)
	}
	conn.Close()
	if err := callsGet(t, "the accepting side", accepted); err != nil {
		t.Error(err)
	}
}

func TestBrokerOddStreams(t *testing.T) {
	callsGoroutines(t)
	b, raw := callsRaw(t)
	open := func(send ...byte) *yamux.Stream {
		t.Helper()
		st, err := raw.OpenStream()
		if err != nil {
			t.Fatal(err)
		}
		_ = st.SetDeadline(time.Now().Add(hangs))
		if _, err := st.Write(send); err != nil {
			t.Fatal(err)
		}
		return st
	}
	silent := open()
	defer silent.Close()
	half := open(7)
	half.Close()
	// Dialled and closed before it is accepted: that one's end, no more.
	gone := open(callsID(5)...)
	gone.Close()
	conn, err := b.AcceptContext(callsContext(t), 5)
	if err == nil {
		if _, err := conn.Read(make([]byte, 1)); err != io.EOF {
			t.Error("a closed stream reads", err)
		}
		conn.Close()
	}
	// Two for one id: the first is taken, the second hung up on.
	first := open(callsID(6)...)
	callsSoon(t, "the stream was parked", func() bool {
		b.mu.Lock()
		defer b.mu.Unlock()
		return b.parked[6] != nil
	})
	second := open(callsID(6)...)
	if _, err := second.Read(make([]byte, 1)); err != io.EOF {
		t.Error("the second stream reads", err)
	}
	conn, err = b.Accept(6)
	if err != nil {
		t.Fatal(err)
	}
	ack := make([]byte, 4)
	if _, err := io.ReadFull(first, ack); err != nil || !bytes.Equal(ack, callsID(6)) {
		t.Error("acknowledged as", ack, err)
	}
	conn.Close()
	// Two who accept one id.
	ctx, cancel := context.WithCancel(context.Background())
	one := callsGo(func() error { _, err := b.AcceptContext(ctx, 8); return err })
	callsSoon(t, "it is being accepted", func() bool {
		b.mu.Lock()
		defer b.mu.Unlock()
		return b.accepting[8] != nil
	})
	if _, err := b.AcceptContext(ctx, 8); err == nil || !strings.Contains(err.Error(), "already") {
		t.Error("the second who accepts gets", err)
	}
	cancel()
	if err := callsGet(t, "the first who accepts", one); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	// A peer that acknowledges another number, a part of one, or hangs up.
	for _, ack := range [][]byte{callsID(99), {1, 2}, nil} {
		answered := callsGo(func() error {
			st, err := raw.AcceptStream()
			if err == nil {
				_, err = io.ReadFull(st, make([]byte, 4))
				_, _ = st.Write(ack)
				_ = st.Close()
			}
			return err
		})
		if conn, err := b.DialContext(callsContext(t), 9); err == nil || errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("acknowledged with %v: %v, %v", ack, conn, err)
		}
		if err := callsGet(t, "the peer", answered); err != nil {
			t.Error(err)
		}
	}
	raw.Close()
	if _, err := b.AcceptContext(callsContext(t), 10); err == nil || errors.Is(err, context.DeadlineExceeded) {
		t.Error("after the end of the connection, accepting returned", err)
	}
	if _, err := b.DialContext(callsContext(t), 10); err == nil || errors.Is(err, context.DeadlineExceeded) {
		t.Error("after the end of the connection, dialling returned", err)
	}
}

// Of two sides that dial one id, one gets it and the other learns of that.
func TestBrokerDuplicateDial(t *testing.T) {
	t.Parallel()
	host, plugin := callsBrokers(t)
	var dialling []<-chan error
	for range 2 {
		dialling = append(dialling, callsGo(func() error {
			conn, err := host.DialContext(callsContext(t), 5)
			if err == nil {
				conn.Close()
			}
			return err
		}))
	}
	var first, second <-chan error = dialling[0], dialling[1]
	var err error
	select {
	case err = <-first:
		first = second
	case err = <-second:
	}
	if err == nil || !strings.Contains(err.Error(), "stream 5") {
		t.Error("the second who dials gets", err)
	}
	conn, err := plugin.Accept(5)
	if err != nil {
		t.Fatal(err)
	}
	conn.Close()
	if err := callsGet(t, "the first who dials", first); err != nil {
		t.Error(err)
	}
}

// Ten thousand streams are open at once, and each is its own.
func TestTenThousandStreams(t *testing.T) {
	const streams = 10000
	b, raw := callsRaw(t)
	type result struct {
		conns []net.Conn
		err   error
	}
	accepting := callsGo(func() (r result) {
		ctx, cancel := context.WithTimeout(context.Background(), 10*hangs)
		defer cancel()
		for i := range streams {
			conn, err := b.AcceptContext(ctx, uint32(i+1))
			if err != nil {
				r.err = err
				return r
			}
			if _, err := conn.Write(callsID(uint32(i * 3))); err != nil {
				r.err = err
				return r
			}
			r.conns = append(r.conns, conn)
		}
		return r
	})
	var dialled []*yamux.Stream
	for i := range streams {
		st, err := raw.OpenStream()
		if err == nil {
			_, err = st.Write(callsID(uint32(i + 1)))
		}
		if err != nil {
			t.Fatal(err)
		}
		dialled = append(dialled, st)
	}
	var got [8]byte
	for i, st := range dialled {
		_ = st.SetDeadline(time.Now().Add(hangs))
		if _, err := io.ReadFull(st, got[:]); err != nil || !bytes.Equal(got[:], append(callsID(uint32(i+1)), callsID(uint32(i*3))...)) {
			t.Fatalf("stream %d reads %v, %v", i, got, err)
		}
	}
	r := callsGet(t, "the accepting side", accepting)
	if r.err != nil || len(r.conns) != streams {
		t.Fatalf("%d were accepted, %v", len(r.conns), r.err)
	}
	for i := range streams {
		dialled[i].Close()
		r.conns[i].Close()
	}
	callsSoon(t, "all streams were gone", func() bool { return b.session.mux.NumStreams()+raw.NumStreams() == 0 })
}

// Many goroutines dial and accept on both sides, in any order.
func TestBrokerCrowd(t *testing.T) {
	callsGoroutines(t)
	host, plugin := callsBrokers(t)
	var crowd sync.WaitGroup
	for range 500 {
		crowd.Go(func() { callsTalk(t, host, plugin) })
		crowd.Go(func() { callsTalk(t, plugin, host) })
	}
	crowd.Wait()
	for _, b := range []*MuxBroker{host, plugin} {
		callsSoon(t, "all streams were gone", func() bool { return b.session.mux.NumStreams() == 0 })
	}
}

func TestNextIdsNeverMeet(t *testing.T) {
	host, plugin := callsBrokers(t)
	seen := make(map[uint32]bool)
	for _, begin := range []uint32{0, 1<<30 - 50, 1<<31 - 50, 1<<32 - 50} {
		host.ids.Store(begin)
		plugin.ids.Store(begin)
		clear(seen)
		for range 100 {
			for b, bit := range map[*MuxBroker]uint32{host: 1 << 31, plugin: 1 << 30} {
				id := b.NextId()
				// go-plugin's sides count from 1.
				if seen[id] || id&(3<<30) != bit || id&^(3<<30) == 0 {
					t.Fatalf("NextId returned %#x, after %#x", id, begin)
				}
				seen[id] = true
			}
		}
	}
}

// Closing a client ends the serving and the stream on the other side.
func TestClosingClientEndsServing(t *testing.T) {
	t.Run("dispensed", func(t *testing.T) {
		host, c, s := callsPlugin(t, hclog.NewNullLogger())
		streams := host.session.mux.NumStreams()
		plugin := s.broker.session.mux
		done := callsGo(func() error { return Call(callsContext(t), c.Client, "Plugin.Wait", "", new(string)) })
		callsGet(t, "the call", s.started)
		if err := c.Close(); err != nil {
			t.Error(err)
		}
		if err := callsGet(t, "the call in flight", done); !errors.Is(err, rpc.ErrShutdown) {
			t.Error("a call in flight returned", err)
		}
		if cause := callsGet(t, "the end of the context", s.ended); !errors.Is(cause, errCallerGone) {
			t.Error(cause)
		}
		callsSoon(t, "the stream was gone on both sides", func() bool {
			return host.session.mux.NumStreams() == streams-1 && plugin.NumStreams() == streams-1
		})
		if err := c.Close(); !errors.Is(err, rpc.ErrShutdown) {
			t.Error("a second Close returned", err)
		}
		if err := host.Ping(); err != nil {
			t.Error(err)
		}
	})
	t.Run("dialled", func(t *testing.T) {
		callsBothWays(t, func(t *testing.T, here, there *MuxBroker) {
			callsGoroutines(t)
			for range 20 {
				c, err := here.DialRPC(there.ServeRPC(newCallsService(nil)))
				if err != nil {
					t.Fatal(err)
				}
				callsEcho(t, c)
				c.Close()
			}
			callsSoon(t, "all streams were gone", func() bool {
				return here.session.mux.NumStreams()+there.session.mux.NumStreams() == 0
			})
		})
	})
	// The server is stuck with replies that nobody reads any more.
	t.Run("busy", func(t *testing.T) {
		callsBothWays(t, func(t *testing.T, here, there *MuxBroker) {
			stack := make([]byte, 1<<20)
			for range 5 {
				c, err := here.DialRPC(there.ServeRPC(newCallsService(nil)))
				if err != nil {
					t.Fatal(err)
				}
				gate := &CallsGate{make(chan struct{})} // stops the client from reading
				c.Go("Plugin.Gate", "", gate, nil)
				for !bytes.Contains(stack[:runtime.Stack(stack, true)], []byte("(*gobWriter).waitRoom")) {
					c.Go("Plugin.Many", 1<<18, new([]byte), nil)
				}
				for range 100 {
					c.Go("Plugin.Many", 1<<18, new([]byte), nil)
				}
				codec, _ := codecs.Load(c)
				if err := codec.(*clientCodec).w.drain(callsContext(t)); err != nil {
					t.Error(err)
				}
				c.Close()
				close(gate.open)
			}
			callsSoon(t, "all streams were gone", func() bool {
				return here.session.mux.NumStreams()+there.session.mux.NumStreams() == 0
			})
		})
	})
}

// MuxBroker.Close ends every wait, on both sides.
func TestBrokerCloseEndsEveryWait(t *testing.T) {
	callsGoroutines(t)
	callsBothWays(t, func(t *testing.T, here, there *MuxBroker) {
		ctx := context.Background()
		s := newCallsService(nil)
		c, err := here.DialRPC(there.ServeRPC(s))
		if err != nil {
			t.Fatal(err)
		}
		pipe, write := io.Pipe() // a reader that has nothing to read
		defer write.Close()
		r, err := here.DialReader(there.ServeReader(pipe))
		if err != nil {
			t.Fatal(err)
		}
		block := make(chan struct{})
		defer close(block)
		w, err := here.DialWriter(there.ServeWriter(callsWriter(func(p []byte) (int, error) { <-block; return len(p), nil })))
		if err != nil {
			t.Fatal(err)
		}
		closing, err := here.DialWriter(there.ServeWriter(callsWriter(func(p []byte) (int, error) { <-block; return len(p), nil })))
		if err != nil {
			t.Fatal(err)
		}
		_, _ = closing.Write([]byte("x"))
		waits := map[string]<-chan error{
			"accept":        callsGo(func() error { _, err := here.AcceptContext(ctx, 5); return err }),
			"dial":          callsGo(func() error { _, err := here.DialContext(ctx, 6); return err }),
			"accept, there": callsGo(func() error { _, err := there.AcceptContext(ctx, 7); return err }),
			"dial, there":   callsGo(func() error { _, err := there.DialContext(ctx, 8); return err }),
			"call":          callsGo(func() error { return Call(ctx, c, "Plugin.Wait", "", new(string)) }),
			"read":          callsGo(func() error { _, err := io.ReadAll(r); return err }),
			"write":         callsGo(func() error { _, err := io.Copy(w, callsZeros{}); return err }),
			"close":         callsGo(closing.Close),
		}
		callsGet(t, "the call", s.started)
		callsSoon(t, "all wait", func() bool {
			here.mu.Lock()
			defer here.mu.Unlock()
			return here.accepting[5] != nil && here.parked[8] != nil
		})
		if err := here.Close(); err != nil {
			t.Error(err)
		}
		for name, done := range waits {
			if err := callsGet(t, name, done); err == nil {
				t.Errorf("%s returned no error", name)
			} else if name == "read" && err == io.EOF {
				t.Error("a cut reader is at a clean end")
			}
		}
		if err := here.Close(); err != nil {
			t.Error(err)
		}
		if _, err := here.Accept(9); err == nil {
			t.Error("Accept works after Close")
		}
		if _, err := here.Dial(9); err == nil {
			t.Error("Dial works after Close")
		}
	})
}

// callsWriter and callsReader are functions as writers and readers.
type callsWriter func([]byte) (int, error)

func (f callsWriter) Write(p []byte) (int, error) { return f(p) }

type callsReader func([]byte) (int, error)

func (f callsReader) Read(p []byte) (int, error) { return f(p) }

type callsZeros struct{}

func (callsZeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }

// Readers and writers.

// callsData is n bytes that are not alike.
func callsData(n int) []byte {
	data := make([]byte, n)
	r := rand.NewChaCha8([32]byte{1})
	_, _ = r.Read(data)
	return data
}

func TestReader(t *testing.T) {
	lost := fmt.Errorf("the disk is gone: %w", fs.ErrPermission)
	for _, test := range []struct {
		name string
		size int
		err  error // what the reader ends with
	}{
		{"empty", 0, io.EOF},
		{"small", 5, io.EOF},
		{"a frame", maxFrame, io.EOF},
		{"large", 8<<20 + 1, io.EOF},
		{"fails at once", 0, lost},
		{"fails half-way", 3<<20 + 7, lost},
		{"unexpected end", 100, io.ErrUnexpectedEOF},
		{"registered error", 100, errCallsKnown},
		{"unknown error", 100, errCallsUnknown},
		{"wraps the end", 100, fmt.Errorf("no clean end: %w", io.EOF)},
	} {
		t.Run(test.name, func(t *testing.T) {
			callsBothWays(t, func(t *testing.T, here, there *MuxBroker) {
				data := callsData(test.size)
				src := io.MultiReader(bytes.NewReader(data), callsReader(func([]byte) (int, error) { return 0, test.err }))
				r, err := here.DialReader(there.ServeReader(src))
				if err != nil {
					t.Fatal(err)
				}
				got, err := io.ReadAll(r)
				if !bytes.Equal(got, data) {
					t.Errorf("%d bytes arrived of %d", len(got), len(data))
				}
				switch {
				case test.err == io.EOF && err != nil:
					t.Error("it ended with", err)
				case test.err != io.EOF:
					if err == nil {
						t.Fatal("it ended well")
					}
					testRemoteError(t, err, test.err.Error())
					for _, known := range callsErrors {
						if errors.Is(err, known) != errors.Is(test.err, known) {
							t.Errorf("errors.Is(%v, %v) is %v", err, known, errors.Is(err, known))
						}
					}
				}
				if _, again := r.Read(make([]byte, 1)); again == nil || test.err != io.EOF && again != err {
					t.Error("reading again returned", again)
				}
				if err := r.Close(); err != nil {
					t.Error(err)
				}
				callsSoon(t, "the stream was gone", func() bool {
					return here.session.mux.NumStreams()+there.session.mux.NumStreams() == 0
				})
			})
		})
	}
}

// Data and error in one Read both arrive, and a panic is an error.
func TestOddReaders(t *testing.T) {
	callsBothWays(t, func(t *testing.T, here, there *MuxBroker) {
		for _, test := range []struct {
			name string
			r    io.Reader
			want string
			err  string
		}{
			{"both at once", callsReader(func(p []byte) (int, error) { return copy(p, "last"), errCallsKnown }), "last", errCallsKnown.Error()},
			{"end with data", callsReader(func(p []byte) (int, error) { return copy(p, "last"), io.EOF }), "last", ""},
			{"panic", callsReader(func(p []byte) (int, error) { panic("a broken reader") }), "", "a broken reader"},
			{"nil error type", callsReader(func(p []byte) (int, error) { return 0, (*callsNilError)(nil) }), "", "callsNilError"},
			{"no text", callsReader(func(p []byte) (int, error) { return 0, errors.New("") }), "", "errorString"},
			{"long text", callsReader(func(p []byte) (int, error) { return 0, errors.New(strings.Repeat("x", 3<<20)) }), "", "xxxxxxxx"},
		} {
			r, err := here.DialReader(there.ServeReader(test.r))
			if err != nil {
				t.Fatal(err)
			}
			got, err := io.ReadAll(r)
			if string(got) != test.want || (err == nil) != (test.err == "") || err != nil && !strings.Contains(err.Error(), test.err) {
				t.Errorf("%s: %q, %.100v", test.name, got, err)
			}
			r.Close()
		}
	})
}

// Closing a dialled reader early releases the serving end within a second,
// whether it waits for room or for the caller's own Read.
func TestReaderEarlyClose(t *testing.T) {
	callsGoroutines(t)
	callsBothWays(t, func(t *testing.T, here, there *MuxBroker) {
		var served atomic.Int64
		r, err := here.DialReader(there.ServeReader(callsReader(func(p []byte) (int, error) {
			served.Add(int64(len(p)))
			return len(p), nil
		})))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(r, make([]byte, 100)); err != nil {
			t.Fatal(err)
		}
		callsSoon(t, "the stream was full", func() bool { return served.Load() >= 256<<10 })
		began := time.Now()
		r.Close()
		gone := func() bool { return here.session.mux.NumStreams()+there.session.mux.NumStreams() == 0 }
		callsSoon(t, "the serving end was released", gone)
		if took := time.Since(began); took > 10*time.Second { // a second, on a machine that has time
			t.Errorf("it took %v", took)
		}
		if n, err := r.Read(make([]byte, 1)); n != 0 || !errors.Is(err, io.ErrClosedPipe) {
			t.Error("a closed reader reads", n, err)
		}
		r.Close()
		// One that is inside Read: its stream goes, the goroutine with Read.
		pipe, w := io.Pipe()
		r, err = here.DialReader(there.ServeReader(pipe))
		if err != nil {
			t.Fatal(err)
		}
		reading := callsGo(func() error { _, err := r.Read(make([]byte, 1)); return err })
		r.Close()
		if err := callsGet(t, "a Read during Close", reading); !errors.Is(err, io.ErrClosedPipe) {
			t.Error("a Read during Close returned", err)
		}
		callsSoon(t, "the stream was gone", gone)
		if _, err := w.Write([]byte("x")); err != nil { // the caller's reader is not closed
			t.Error("our reader was closed:", err)
		}
		w.Close()
	})
}

// A slow reader slows the other side, however much there is to send.
func TestReaderBoundedMemory(t *testing.T) {
	callsBothWays(t, func(t *testing.T, here, there *MuxBroker) {
		const size, most = 96 << 20, 3 << 20
		var sent, received, worst int64
		var mu sync.Mutex // guards the above
		sum, want := crc32.NewIEEE(), crc32.NewIEEE()
		random := rand.NewChaCha8([32]byte{2})
		left := size
		r, err := here.DialReader(there.ServeReader(callsReader(func(p []byte) (int, error) {
			n := min(len(p), left)
			if left -= n; n == 0 {
				return 0, io.EOF
			}
			_, _ = random.Read(p[:n])
			want.Write(p[:n])
			mu.Lock()
			defer mu.Unlock()
			sent += int64(n)
			worst = max(worst, sent-received)
			return n, nil
		})))
		if err != nil {
			t.Fatal(err)
		}
		defer r.Close()
		callsSoon(t, "the other side had begun", func() bool { mu.Lock(); defer mu.Unlock(); return sent >= 256<<10 })
		n, err := io.Copy(callsWriter(func(p []byte) (int, error) {
			mu.Lock()
			received += int64(len(p))
			mu.Unlock()
			return sum.Write(p)
		}), struct{ io.Reader }{r})
		if err != nil || n != size || sum.Sum32() != want.Sum32() {
			t.Errorf("%d bytes arrived of %d, %v; their sum is right: %v", n, size, err, sum.Sum32() == want.Sum32())
		}
		if worst > most {
			t.Errorf("%d bytes were on the way at once", worst)
		}
	})
}

// Close waits until the far writer has taken everything, however slow it is,
// and nothing more than a window is on the way.
func TestWriterSlow(t *testing.T) {
	callsBothWays(t, func(t *testing.T, here, there *MuxBroker) {
		const size, most = 16 << 20, 3 << 20
		data := callsData(size)
		var got bytes.Buffer
		var taken, worst atomic.Int64
		last := make(chan struct{})
		w, err := here.DialWriter(there.ServeWriter(callsWriter(func(p []byte) (int, error) {
			if got.Len()+len(p) == size {
				<-last
			}
			taken.Add(int64(len(p)))
			return got.Write(p)
		})))
		if err != nil {
			t.Fatal(err)
		}
		for n := 0; n < size; n += 32 << 10 {
			if _, err := w.Write(data[n : n+32<<10]); err != nil {
				t.Fatal(err)
			}
			worst.Store(max(worst.Load(), int64(n)-taken.Load()))
		}
		closed := callsGo(w.Close)
		select {
		case err := <-closed:
			t.Error("Close returned before everything was taken:", err)
		case <-time.After(100 * time.Millisecond):
		}
		close(last)
		if err := callsGet(t, "Close", closed); err != nil {
			t.Error(err)
		}
		if !bytes.Equal(got.Bytes(), data) {
			t.Errorf("%d bytes were written of %d", got.Len(), size)
		}
		if worst.Load() > most {
			t.Errorf("%d bytes were on the way at once", worst.Load())
		}
		if err := w.Close(); err != nil {
			t.Error("a second Close returned", err)
		}
		if _, err := w.Write([]byte("x")); !errors.Is(err, io.ErrClosedPipe) {
			t.Error("a Write after Close returned", err)
		}
	})
}

func TestWriterFails(t *testing.T) {
	full := fmt.Errorf("the disk is full: %w", errCallsKnown)
	for _, test := range []struct {
		name  string
		after int
		write func(p []byte) (int, error) // once that many bytes have been written
		is    error
		text  string
	}{
		{"at once", 0, func([]byte) (int, error) { return 0, full }, errCallsKnown, full.Error()},
		{"half-way", 1 << 20, func([]byte) (int, error) { return 0, full }, errCallsKnown, full.Error()},
		{"standard", 10, func([]byte) (int, error) { return 0, &fs.PathError{Op: "write", Path: "/x", Err: fs.ErrClosed} }, fs.ErrClosed, "write /x"},
		{"short write", 10, func([]byte) (int, error) { return 0, nil }, nil, io.ErrShortWrite.Error()},
		{"panic", 10, func([]byte) (int, error) { panic("a broken writer") }, nil, "a broken writer"},
	} {
		t.Run(test.name, func(t *testing.T) {
			callsBothWays(t, func(t *testing.T, here, there *MuxBroker) {
				for _, size := range []int{test.after + 10, test.after + 8<<20} { // the error comes from Close, or from Write
					n := 0
					w, err := here.DialWriter(there.ServeWriter(callsWriter(func(p []byte) (int, error) {
						if n += len(p); n > test.after {
							return test.write(p)
						}
						return len(p), nil
					})))
					if err != nil {
						t.Fatal(err)
					}
					_, writeErr := w.Write(make([]byte, size))
					closeErr := w.Close()
					if closeErr == nil {
						t.Fatal("Close returned no error; Write returned", writeErr)
					}
					for _, err := range []error{writeErr, closeErr} {
						if err == nil {
							continue
						}
						if !strings.Contains(err.Error(), test.text) || test.is != nil && !errors.Is(err, test.is) {
							t.Errorf("%v; want %q that is %v", err, test.text, test.is)
						}
					}
					callsSoon(t, "the stream was gone", func() bool {
						return here.session.mux.NumStreams()+there.session.mux.NumStreams() == 0
					})
				}
			})
		})
	}
}

// A reader that is cut off with its connection is at no clean end, and a
// writer has not written.
func TestStreamsLostConnection(t *testing.T) {
	callsBothWays(t, func(t *testing.T, here, there *MuxBroker) {
		pipe, feed := io.Pipe()
		defer feed.Close()
		r, err := here.DialReader(there.ServeReader(pipe))
		if err != nil {
			t.Fatal(err)
		}
		defer r.Close()
		w, err := here.DialWriter(there.ServeWriter(io.Discard))
		if err != nil {
			t.Fatal(err)
		}
		_, _ = feed.Write([]byte("begin"))
		if _, err := io.ReadFull(r, make([]byte, 5)); err != nil {
			t.Fatal(err)
		}
		there.session.mux.Close()
		if _, err := io.ReadAll(r); err == nil {
			t.Error("a reader that was cut off is at its end")
		}
		_, err = w.Write(make([]byte, 8<<20))
		if closeErr := w.Close(); closeErr == nil {
			t.Error("a writer that was cut off has written; Write returned", err)
		}
	})
}

// The kinds of both ends must go together, or the error says what is wrong.
func TestStreamKindMismatch(t *testing.T) {
	t.Parallel()
	callsBothWays(t, func(t *testing.T, here, there *MuxBroker) {
		raw := func(send string) func() uint32 {
			return func() uint32 {
				id := there.NextId()
				go func() {
					if conn, err := there.Accept(id); err == nil {
						_, _ = io.WriteString(conn, send)
						_, _ = io.Copy(io.Discard, conn)
						conn.Close()
					}
				}()
				return id
			}
		}
		reader := func(id uint32) (io.Closer, error) { return here.DialReader(id) }
		writer := func(id uint32) (io.Closer, error) { return here.DialWriter(id) }
		var all sync.WaitGroup
		for name, test := range map[string]struct {
			serve func() uint32
			dial  func(uint32) (io.Closer, error)
			want  string
		}{
			"reader of a writer":     {func() uint32 { return there.ServeWriter(io.Discard) }, reader, "does the same"},
			"writer of a reader":     {func() uint32 { return there.ServeReader(strings.NewReader("x")) }, writer, "does the same"},
			"reader of a service":    {func() uint32 { return there.ServeRPC(newCallsService(nil)) }, reader, "introduce"},
			"writer of a service":    {func() uint32 { return there.ServeRPC(newCallsService(nil)) }, writer, "introduce"},
			"reader of a raw stream": {raw("GET / HTTP/1.0"), reader, "need this library on both sides"},
			"writer of a raw stream": {raw("\x00\x00\x00\x00\x00"), writer, "need this library on both sides"},
			"reader of a silent one": {raw(""), reader, "introduce"},
			"writer of a silent one": {raw("mu"), writer, "introduce"},
		} {
			all.Go(func() {
				v, err := test.dial(test.serve())
				if err == nil {
					v.Close()
				}
				if err == nil || !strings.Contains(err.Error(), test.want) {
					t.Errorf("%s: %v does not say %q", name, err, test.want)
				}
			})
		}
		all.Go(func() { // a client learns it from its first call
			c, err := here.DialRPC(there.ServeReader(strings.NewReader("x")))
			if err != nil {
				t.Error(err)
				return
			}
			defer c.Close()
			if err := Call(callsContext(t), c, "Plugin.Echo", "x", new(string)); err == nil || errors.Is(err, context.DeadlineExceeded) {
				t.Error("a call to a reader returned", err)
			}
		})
		all.Wait()
		callsSoon(t, "all streams were gone", func() bool {
			return here.session.mux.NumStreams()+there.session.mux.NumStreams() == 0
		})
		callsTalk(t, here, there)
	})
}

// What comes over a reader's stream may be anything.
func TestHostileStreamFrames(t *testing.T) {
	verdict := func(b ...byte) []byte { return append([]byte{0, 0, 0, 0}, b...) }
	for name, send := range map[string][]byte{
		"a frame too large":     {0xff, 0xff, 0xff, 0xff, 1, 2, 3},
		"a cut length":          {1, 0},
		"a cut frame":           {10, 0, 0, 0, 1, 2, 3},
		"no end":                {},
		"a verdict too large":   verdict(0xff, 0xff, 0xff, 0x7f),
		"a cut verdict":         verdict(10, 0, 0, 0, 1),
		"a verdict that is not": verdict(4, 0, 0, 0, 1, 2, 3, 4),
		"no verdict":            verdict(),
	} {
		t.Run(name, func(t *testing.T) {
			b, raw := callsRaw(t)
			serving := callsGo(func() error {
				st, err := raw.AcceptStream()
				if err == nil {
					_, err = io.ReadFull(st, make([]byte, 4))
				}
				if err == nil {
					_, err = st.Write(append(callsID(5), append([]byte(sourceTag), send...)...))
					_ = st.Close()
				}
				return err
			})
			r, err := b.DialReader(5)
			if err != nil {
				t.Fatal(err)
			}
			defer r.Close()
			if err := callsGet(t, "the peer", serving); err != nil {
				t.Error(err)
			}
			if err := callsGet(t, "the reader", callsGo(func() error { _, err := io.ReadAll(r); return err })); err == nil {
				t.Error("it is at a clean end")
			}
		})
	}
}

// Helpers over a real process: a callback service calls through Call with its
// powers, from the plugin to the host.
func TestCallbackOverProcess(t *testing.T) {
	cfg := config(t, "calls")
	cfg.Plugins = callsPlugins()
	client, p := start(t, cfg)
	c := dispense[*callsClient](t, p, "calls")
	callback := newCallsService(nil)
	serve := func(method, arg string) (string, error) {
		var out string
		err := Call(callsContext(t), c.Client, "Plugin.CallBack", CallsBack{c.broker.ServeRPC(callback), method, arg}, &out)
		return out, err
	}
	if out, err := serve("Plugin.Echo", "round"); err != nil || out != "round" {
		t.Errorf("%q, %v", out, err)
	}
	if _, err := serve("Plugin.Panic", "ouch"); err == nil || !strings.Contains(err.Error(), "ouch") {
		t.Error(err)
	}
	// The host's cancel goes through the plugin's method into the callback.
	ctx, cancel := context.WithCancel(context.Background())
	done := callsGo(func() error {
		return Call(ctx, c.Client, "Plugin.CallBack", CallsBack{c.broker.ServeRPC(callback), "Plugin.Wait", ""}, new(string))
	})
	callsGet(t, "the callback", callback.started)
	cancel()
	// The plugin's method closes its client at once, which may overtake.
	if cause := callsGet(t, "the end of the callback's context", callback.ended); !errors.Is(cause, context.Canceled) && !errors.Is(cause, errCallerGone) {
		t.Error(cause)
	}
	if err := callsGet(t, "the call", done); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	callsEcho(t, c.Client)
	client.Kill()
	if err := client.Err(); err != nil {
		t.Error(err)
	}
}

// Garbage on the connection.

// callsFeed is a connection on which a script arrives.
type callsFeed struct {
	script *bytes.Reader
	gate   <-chan struct{} // nothing arrives before it is closed; nil for none
	stall  bool            // the script has no end
	once   sync.Once
	closed chan struct{}
}

func newCallsFeed(script []byte) *callsFeed {
	return &callsFeed{script: bytes.NewReader(script), closed: make(chan struct{})}
}

func (f *callsFeed) Read(p []byte) (int, error) {
	if f.gate != nil {
		select {
		case <-f.gate:
		case <-f.closed:
		}
	}
	n, err := f.script.Read(p)
	if err != nil && f.stall {
		<-f.closed
	}
	return n, err
}

func (f *callsFeed) Write(p []byte) (int, error) {
	select {
	case <-f.closed:
		return 0, net.ErrClosed
	default:
		return len(p), nil
	}
}

func (f *callsFeed) Close() error {
	f.once.Do(func() { close(f.closed) })
	return nil
}

// callsFrame is a frame of yamux.
func callsFrame(kind byte, flags uint16, stream, length uint32, body ...byte) []byte {
	b := binary.BigEndian.AppendUint16([]byte{0, kind}, flags)
	b = binary.BigEndian.AppendUint32(b, stream)
	return append(binary.BigEndian.AppendUint32(b, length), body...)
}

// callsGarbage is what may arrive instead of a session.
func callsGarbage() map[string][]byte {
	syn := callsFrame(1, 1, 1, 0)
	ack := callsFrame(1, 2, 1, 0)
	garbage := map[string][]byte{
		"nothing":           nil,
		"text":              []byte("Usage: foo [-bar]\n"),
		"HTTP":              []byte("HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n"),
		"TLS":               {0x15, 3, 1, 0, 2, 2, 0x28},
		"zeros":             make([]byte, 1000),
		"ones":              bytes.Repeat([]byte{0xff}, 1000),
		"random":            callsData(10000),
		"another version":   append([]byte{1}, syn[1:]...),
		"unknown type":      callsFrame(9, 0, 1, 0),
		"a cut frame":       syn[:7],
		"a cut body":        append(bytes.Clone(syn), callsFrame(0, 0, 1, 100, 1, 2, 3)...),
		"hostile length":    append(bytes.Clone(syn), callsFrame(0, 0, 1, 1<<32-1, 1, 2, 3)...),
		"an unknown stream": callsFrame(0, 0, 77, 1<<32-1, 1, 2, 3),
		"window overflow":   bytes.Repeat(callsFrame(1, 0, 1, 1<<32-1), 100),
		"resets":            bytes.Repeat(callsFrame(1, 8, 1, 0), 10),
		"finished twice":    append(bytes.Clone(ack), bytes.Repeat(callsFrame(1, 4, 1, 0), 3)...),
		"acknowledgements":  bytes.Repeat(ack, 100),
		"opened twice":      append(bytes.Clone(syn), syn...),
		"go away":           callsFrame(3, 0, 0, 0),
		"go away in error":  callsFrame(3, 0, 0, 2),
		"pings":             bytes.Repeat(callsFrame(2, 1, 0, 7), 1000),
	}
	for i := range 1000 {
		garbage["many streams"] = append(garbage["many streams"], callsFrame(1, 1, uint32(2*i+1), 0)...)
		garbage["many streams of ours"] = append(garbage["many streams of ours"], callsFrame(1, 1, uint32(2*i+2), 0)...)
	}
	for name, forged := range callsForged {
		body := callsFrame(0, 0, 1, uint32(len(forged)), forged...)
		garbage["answered: "+name] = append(bytes.Clone(ack), body...)
		garbage["asked: "+name] = bytes.Join([][]byte{syn, callsFrame(1, 1, 3, 0), callsFrame(1, 1, 5, 0), body}, nil)
	}
	return garbage
}

// Whatever arrives, the session ends with an error, at either end, and memory
// stays bounded; so it does for what arrives and does not end.
func TestGarbage(t *testing.T) {
	callsGoroutines(t)
	for name, script := range callsGarbage() {
		for _, stall := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, stalled: %v", name, stall), func(t *testing.T) {
				var before, after runtime.MemStats
				runtime.ReadMemStats(&before)
				feed := func() *callsFeed {
					f := newCallsFeed(script)
					f.stall = stall
					return f
				}
				conn := feed()
				client, err := NewRPCClient(conn, callsPlugins())
				if err == nil {
					ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
					defer cancel()
					if !stall {
						ctx = callsContext(t)
					}
					if err := client.ping(ctx); err == nil || !stall && errors.Is(err, context.DeadlineExceeded) {
						t.Error("the plugin answers:", err)
					}
					client.session.close()
				}
				<-conn.closed
				server := &RPCServer{Plugins: callsPlugins()}
				conn = feed()
				serving := callsGo(func() int { server.ServeConn(conn); return 0 })
				if stall {
					server.close()
				}
				callsGet(t, "ServeConn", serving)
				runtime.ReadMemStats(&after)
				if used := int64(after.HeapSys) - int64(before.HeapSys); used > 64<<20 {
					t.Errorf("%d bytes of memory were taken", used)
				}
			})
		}
	}
}

// callsFault is a connection that fails or stalls at its nth read or write.
type callsFault struct {
	net.Conn
	left   atomic.Int64
	stall  bool
	once   sync.Once
	closed chan struct{}
}

var errCallsFault = errors.New("calls: the line is cut")

func (f *callsFault) fault() error {
	if f.left.Add(-1) >= 0 {
		return nil
	}
	if f.stall {
		<-f.closed
	}
	return errCallsFault
}

func (f *callsFault) Read(p []byte) (int, error) {
	if err := f.fault(); err != nil {
		return 0, err
	}
	return f.Conn.Read(p)
}

func (f *callsFault) Write(p []byte) (int, error) {
	if err := f.fault(); err != nil {
		return 0, err
	}
	return f.Conn.Write(p)
}

func (f *callsFault) Close() error {
	f.once.Do(func() { close(f.closed) })
	return f.Conn.Close()
}

// A connection that fails or stalls at any moment fails what is done on it,
// cleanly, and leaves nothing behind.
func TestConnectionFaults(t *testing.T) {
	t.Parallel()
	for _, hosts := range []bool{true, false} {
		for _, stall := range []bool{false, true} {
			t.Run(fmt.Sprintf("at the host: %v, stalls: %v", hosts, stall), func(t *testing.T) {
				t.Parallel()
				for n := int64(0); ; n++ {
					if testFault(t, n, hosts, stall) {
						t.Log("it works with", n, "reads and writes")
						break
					}
					if n > 2000 {
						t.Fatal("it never works")
					}
				}
			})
		}
	}
}

// testFault does a bit of everything on a connection that fails at the nth
// read or write, and reports whether all of it went well.
func testFault(t *testing.T, n int64, hosts, stall bool) bool {
	a, b := TestConn(t)
	fault := &callsFault{stall: stall, closed: make(chan struct{})}
	fault.left.Store(n)
	if hosts {
		fault.Conn, a = a, fault
	} else {
		fault.Conn, b = b, fault
	}
	server := &RPCServer{Plugins: callsPlugins()}
	serving := callsGo(func() int { server.ServeConn(b); return 0 })
	// hung reports whether it stalls, which may be for ever.
	hung := func(done func() bool) bool {
		t.Helper()
		callsSoon(t, "it ended or stalled", func() bool { return done() || stall && fault.left.Load() < 0 })
		for end := time.Now().Add(20 * time.Millisecond); !done(); time.Sleep(time.Millisecond) {
			if time.Now().After(end) {
				return true
			}
		}
		return false
	}
	var client *RPCClient
	connecting := callsGo(func() (err error) { client, err = NewRPCClient(a, callsPlugins()); return err })
	if hung(func() bool { return len(connecting) > 0 }) {
		fault.Close() // the caller's own: NewRPCClient knows no bound
	}
	err := callsGet(t, "NewRPCClient", connecting)
	if err == nil {
		doing := callsGo(func() error { return everything(client) })
		slow := hung(func() bool { return len(doing) > 0 })
		client.session.close()
		if err = callsGet(t, "the end of what was done", doing); err == nil && slow {
			err = errCallsFault
		}
	}
	server.close()
	callsGet(t, "ServeConn", serving)
	return err == nil
}

// everything uses a bit of everything.
func everything(client *RPCClient) error {
	ctx := context.Background()
	c, err := Dispense[*callsClient](client, "calls")
	if err != nil {
		return err
	}
	defer c.Close()
	var out string
	if err := Call(ctx, c.Client, "Plugin.Echo", "x", &out); err != nil || out != "x" {
		return fmt.Errorf("%q, %w", out, err)
	}
	back := CallsBack{c.broker.ServeRPC(newCallsService(nil)), "Plugin.Echo", "y"}
	if err := Call(ctx, c.Client, "Plugin.CallBack", back, &out); err != nil || out != "y" {
		return fmt.Errorf("%q, %w", out, err)
	}
	in := CallsPipe{c.broker.ServeReader(strings.NewReader("all of it")), 0}
	var got bytes.Buffer
	written := make(chan struct{})
	in.Writer = c.broker.ServeWriter(callsWriter(func(p []byte) (int, error) {
		defer close(written)
		return got.Write(p)
	}))
	if err := Call(ctx, c.Client, "Plugin.Pipe", in, &out); err != nil {
		return err
	}
	if <-written; got.String() != "all of it" {
		return fmt.Errorf("%q was written", got.String())
	}
	return client.Close()
}

// CallsPipe is a reader and a writer of the host's.
type CallsPipe struct{ Reader, Writer uint32 }

// Pipe copies all from the reader to the writer.
func (s *CallsService) Pipe(in CallsPipe, _ *string) error {
	r, err := s.broker.DialReader(in.Reader)
	if err != nil {
		return err
	}
	defer r.Close()
	w, err := s.broker.DialWriter(in.Writer)
	if err != nil {
		return err
	}
	_, err = io.Copy(w, r)
	return errors.Join(err, w.Close())
}

// A plugin that reads a file of the host's and writes to it, in a process.
func TestPipeOverProcess(t *testing.T) {
	cfg := config(t, "calls")
	cfg.Plugins = callsPlugins()
	_, p := start(t, cfg)
	c := dispense[*callsClient](t, p, "calls")
	data := callsData(5 << 20)
	var got bytes.Buffer
	in := CallsPipe{c.broker.ServeReader(bytes.NewReader(data)), c.broker.ServeWriter(&got)}
	if err := Call(callsContext(t), c.Client, "Plugin.Pipe", in, new(string)); err != nil || !bytes.Equal(got.Bytes(), data) {
		t.Errorf("%d bytes of %d were piped, %v", got.Len(), len(data), err)
	}
	lost := io.MultiReader(bytes.NewReader(data[:100]), callsReader(func([]byte) (int, error) { return 0, errCallsKnown }))
	in = CallsPipe{c.broker.ServeReader(lost), c.broker.ServeWriter(io.Discard)}
	if err := Call(callsContext(t), c.Client, "Plugin.Pipe", in, new(string)); !errors.Is(err, errCallsKnown) {
		t.Error("an error that went to and fro is", err)
	}
}

// Schema evolution.

// What one side sends and another version of it receives.
type (
	CallsV1 struct {
		Name string
		Size int
	}
	CallsAdded struct {
		Name  string
		Size  int
		Extra string
	}
	CallsGone   struct{ Name string }
	CallsRename struct {
		Title string
		Size  int
	}
	CallsRetype struct {
		Name string
		Size string
	}
	CallsWiden struct {
		Name string
		Size int64
	}
	CallsNarrow struct {
		Name string
		Size int8
	}
	CallsSign struct {
		Name string
		Size uint
	}
	CallsPtr struct {
		Name *string
		Size *int
	}
	CallsNested struct {
		Name string
		Size struct{ N int }
	}
	CallsOther struct {
		Title  string
		Length int
	}
	CallsOrder struct {
		Size int
		Name string
	}
)

// callsVersion serves methods with A as arguments and R as replies.
type callsVersion[A, R any] struct {
	got   A
	reply R
}

func (s *callsVersion[A, R]) Do(in A, out *R) error {
	s.got, *out = in, s.reply
	return nil
}

// testSchema sends a value of type A as an argument and as a reply to where
// type B is known; both must be want, or fail and mention fails.
func testSchema[A, B any](t *testing.T, name string, send A, want B, fails string) {
	t.Run(name, func(t *testing.T) {
		for _, wire := range callsWires[:3] {
			check := func(what string, got B, err error) {
				t.Helper()
				switch {
				case fails == "" && (err != nil || !reflect.DeepEqual(got, want)):
					t.Errorf("%s: %s: %+v arrived as %+v, %v", wire.name, what, send, got, err)
				case fails != "" && (err == nil || !strings.Contains(err.Error(), fails)):
					t.Errorf("%s: %s: %v does not say %q", wire.name, what, err, fails)
				}
			}
			if wire.served {
				s := &callsVersion[B, string]{}
				c := callsOver(t, wire.client, wire.serve, s)
				err := Call(callsContext(t), c, "Plugin.Do", send, new(string))
				check("argument", s.got, err)
			}
			if wire.ours {
				c := callsOver(t, wire.client, wire.serve, &callsVersion[string, A]{reply: send})
				var got B
				err := Call(callsContext(t), c, "Plugin.Do", "", &got)
				check("reply", got, err)
			}
		}
	})
}

// What gob does when a host and a plugin were built with different versions of
// a struct. The package's documentation tells users what follows from it.
func TestSchemaEvolution(t *testing.T) {
	v1, name, size := CallsV1{"x", 7}, "x", 7
	testSchema(t, "same", v1, v1, "")
	testSchema(t, "other order", v1, CallsOrder{7, "x"}, "")
	testSchema(t, "receiver has one more", v1, CallsAdded{"x", 7, ""}, "")
	testSchema(t, "sender has one more", CallsAdded{"x", 7, "y"}, v1, "")
	testSchema(t, "receiver has one less", v1, CallsGone{"x"}, "")
	testSchema(t, "sender has one less", CallsGone{"x"}, CallsV1{"x", 0}, "")
	testSchema(t, "renamed", v1, CallsRename{"", 7}, "")
	testSchema(t, "all renamed", v1, CallsOther{}, "no fields matched")
	testSchema(t, "retyped", v1, CallsRetype{}, "wrong type")
	testSchema(t, "wider", v1, CallsWiden{"x", 7}, "")
	testSchema(t, "narrower", v1, CallsNarrow{"x", 7}, "")
	testSchema(t, "narrower, out of range", CallsV1{"x", 1000}, CallsNarrow{}, "out of range")
	testSchema(t, "other sign", v1, CallsSign{}, "wrong type")
	testSchema(t, "pointers", v1, CallsPtr{&name, &size}, "")
	testSchema(t, "from pointers", CallsPtr{&name, &size}, v1, "")
	testSchema(t, "nested", v1, CallsNested{}, "type mismatch")
	// A field with its zero value is not sent at all.
	testSchema(t, "zero to pointer", CallsV1{"", 7}, CallsPtr{nil, &size}, "")
}

// Fuzzing.

// callsWritten returns what a client writes while f uses it.
func callsWritten(tb testing.TB, answer []byte, f func(c *rpc.Client)) []byte {
	tb.Helper()
	a, b := net.Pipe()
	r := &callsRecorder{Conn: a}
	c := newRPCClient(r, callsSpawn)
	go func() { _, _ = b.Write(answer); _, _ = io.Copy(io.Discard, b) }()
	f(c)
	codec, _ := codecs.Load(c)
	_ = codec.(*clientCodec).w.drain(context.Background())
	c.Close()
	b.Close()
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.written
}

// callsSessions returns what each end of a whole session writes, the host's first.
func callsSessions(tb testing.TB) [2][]byte {
	a, b := TestConn(tb)
	host, plugin := &callsRecorder{Conn: a}, &callsRecorder{Conn: b}
	server := &RPCServer{Plugins: callsPlugins()}
	serving := callsGo(func() int { server.ServeConn(plugin); return 0 })
	client, err := NewRPCClient(host, callsPlugins())
	if err == nil {
		err = everything(client)
	}
	if err != nil {
		tb.Fatal(err)
	}
	client.session.close()
	callsGet(tb, "ServeConn", serving)
	return [2][]byte{host.written, plugin.written}
}

func callsSeeds(f *testing.F) {
	for _, script := range callsGarbage() {
		f.Add(script)
	}
}

// FuzzSessionHost is a host whose plugin sends anything.
func FuzzSessionHost(f *testing.F) {
	callsSeeds(f)
	f.Add(callsSessions(f)[1])
	f.Fuzz(func(t *testing.T, script []byte) {
		client, err := NewRPCClient(newCallsFeed(script), callsPlugins())
		if err != nil {
			return
		}
		if v, err := client.Dispense("calls"); err == nil {
			v.(*callsClient).Close()
		}
		_ = client.Close()
		if err := client.Ping(); err == nil {
			t.Error("a closed connection answers")
		}
	})
}

// CallsTame serves what ends by itself.
type CallsTame struct{}

func (CallsTame) Box(in CallsBox, out *CallsBox) error                { *out = in; return nil }
func (CallsTame) Echo(in string, out *string) error                   { *out = in; return nil }
func (CallsTame) Wait(ctx context.Context, _ string, _ *string) error { <-ctx.Done(); return ctx.Err() }

func callsTame() PluginSet {
	return PluginSet{"calls": testPlugin{serves(CallsTame{}), nil}}
}

// FuzzSessionPlugin is a plugin whose host sends anything.
func FuzzSessionPlugin(f *testing.F) {
	callsSeeds(f)
	f.Add(callsSessions(f)[0])
	f.Fuzz(func(t *testing.T, script []byte) {
		server := &RPCServer{Plugins: callsTame()}
		server.ServeConn(newCallsFeed(script))
		server.flush() // ends the contexts
	})
}

// FuzzRPCServer is an RPC stream's server whose client sends anything.
func FuzzRPCServer(f *testing.F) {
	for _, forged := range callsForged {
		f.Add(forged)
	}
	f.Add(callsWritten(f, nil, func(c *rpc.Client) {
		ctx, cancel := context.WithCancel(context.Background())
		for _, box := range callsGoodBoxes {
			c.Go("Plugin.Box", box, new(CallsBox), nil)
		}
		c.Go("Plugin.Missing", "x", new(string), nil)
		cancel()
		_ = Call(ctx, c, "Plugin.Wait", "x", new(string))
	}))
	f.Fuzz(func(t *testing.T, script []byte) {
		svc, err := newService(CallsTame{})
		if err != nil {
			t.Fatal(err)
		}
		newRPCServer(newCallsFeed(script), map[string]*service{"Plugin": svc}, hclog.NewNullLogger(), true).serve(context.Background())
	})
}

// FuzzRPCClient is an RPC stream's client whose server sends anything.
func FuzzRPCClient(f *testing.F) {
	for _, forged := range callsForged {
		f.Add(forged)
	}
	a, b := TestConn(f)
	r := &callsRecorder{Conn: b}
	callsServe(r, newCallsService(nil))
	c := newRPCClient(a, callsSpawn)
	for _, box := range callsGoodBoxes {
		_ = c.Call("Plugin.Box", box, new(CallsBox))
	}
	_ = c.Call("Plugin.Fail", CallsFail{"io.EOF", "wrapped"}, new(string))
	c.Close()
	r.mu.Lock()
	f.Add(r.written)
	r.mu.Unlock()
	f.Fuzz(func(t *testing.T, script []byte) {
		feed, gate := newCallsFeed(script), make(chan struct{})
		feed.gate = gate
		client := newRPCClient(feed, callsSpawn)
		defer client.Close()
		var boxes [4]CallsBox
		calls := make(chan *rpc.Call, len(boxes))
		for i := range boxes {
			client.Go("Plugin.Box", callsGoodBoxes[i], &boxes[i], calls)
		}
		done := callsGo(func() error { return Call(context.Background(), client, "Plugin.Box", CallsBox{}, &CallsBox{}) })
		close(gate)
		for range boxes {
			callsGet(t, "a call", calls)
		}
		callsGet(t, "Call", done)
		if err := client.Call("Plugin.Echo", "x", new(string)); err == nil {
			t.Error("a stream that has ended answers")
		}
	})
}

// FuzzBroker is a broker whose peer opens, uses and closes streams at will.
func FuzzBroker(f *testing.F) {
	f.Add([]byte("o1o2o3c"))
	f.Add([]byte("a1o1w>wwc"))
	f.Add([]byte("o9wmuxo9c"))
	f.Add([]byte("r1o1s<cr1o1s<w\x00\x00\x00\x00"))
	f.Add([]byte("r2o2s>w1"))
	f.Add([]byte("W1o1s>b\x03abcb\x00W2o2s>c"))
	f.Add([]byte("v1o1w\x7fd5d6a5"))
	f.Fuzz(func(t *testing.T, script []byte) {
		if len(script) > 200 {
			return
		}
		a, b := net.Pipe()
		config := yamux.DefaultConfig()
		config.EnableKeepAlive = false
		config.LogOutput = io.Discard
		raw, err := yamux.Server(b, config)
		if err != nil {
			t.Fatal(err)
		}
		go func() { // the streams that are dialled here
			for st, err := raw.AcceptStream(); err == nil; st, err = raw.AcceptStream() {
				_, _ = st.Write([]byte{5, 0, 0, 0, 'm', 'u', 'x', '<'})
			}
		}()
		s, err := newSession(context.Background(), a, true, hclog.NewNullLogger(), nil)
		if err != nil {
			t.Fatal(err)
		}
		broker := newMuxBroker(s)
		s.spawn(func() { defer s.cancel(); broker.Run() })
		ctx, cancel := context.WithCancel(context.Background())
		var users sync.WaitGroup
		use := func(f func()) { users.Go(f) }
		var st *yamux.Stream
		send := func(b ...byte) {
			if st != nil {
				_ = st.SetWriteDeadline(time.Now().Add(time.Second))
				_, _ = st.Write(b)
			}
		}
		next := func() (c byte) {
			if len(script) > 0 {
				c, script = script[0], script[1:]
			}
			return c
		}
		for len(script) > 0 {
			switch next() {
			case 'o': // open
				if st, err = raw.OpenStream(); err == nil {
					send(callsID(1<<31 | uint32(next()&0xf))...)
				}
			case 'O': // open and say nothing
				st, _ = raw.OpenStream()
			case 'w':
				send(next())
			case 'b': // a frame
				n := next()
				send(append([]byte{n, 0, 0, 0}, make([]byte, n)...)...)
			case 's': // introduce
				send('m', 'u', 'x', next())
			case 'c':
				if st != nil {
					_ = st.Close()
				}
			case 'a':
				id := 1<<31 | uint32(next()&0xf)
				use(func() {
					if conn, err := broker.AcceptContext(ctx, id); err == nil {
						_, _ = io.Copy(io.Discard, conn)
						conn.Close()
					}
				})
			case 'd':
				id := uint32(next())
				use(func() {
					if conn, err := broker.DialContext(ctx, id); err == nil {
						if src, err := newSource(conn.(*stream)); err == nil {
							_, _ = src.Write([]byte("text"))
							_ = src.Close()
						}
					}
				})
			case 'r':
				broker.ServeReader(strings.NewReader("text"))
			case 'W':
				broker.ServeWriter(io.Discard)
			case 'v':
				broker.ServeRPC(CallsTame{})
			}
		}
		cancel()
		raw.Close()
		s.close()
		users.Wait()
		broker.mu.Lock()
		defer broker.mu.Unlock()
		if len(broker.accepting)+len(broker.parked) > 0 {
			t.Errorf("left behind: %v, %v", broker.accepting, broker.parked)
		}
	})
}

// A peer that takes stream numbers of the other side's ends the session.
func TestStreamNumbersOfOthers(t *testing.T) {
	callsGoroutines(t)
	for _, host := range []bool{true, false} {
		a, b := TestConn(t)
		broker := callsBroker(t, a, host)
		stream := uint32(2)
		if host {
			stream = 1
		}
		if _, err := b.Write(callsFrame(1, 1, stream, 0)); err != nil {
			t.Fatal(err)
		}
		select {
		case <-broker.session.ended():
		case <-time.After(hangs):
			t.Error("the session lives on; host:", host)
		}
	}
}
