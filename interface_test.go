package plugin_test

import (
	"bytes"
	"context"
	"encoding/gob"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/rpc"
	"reflect"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/muxplug/plugin"
)

// ---- An interface, its implementation and its client ----

// Kit has methods of all forms. A generic interface and one of package io are
// embedded.
type Kit interface {
	io.Closer
	Echoer[any]
	Yielder
	Point(*Point) (*Point, error)
	Add(a, b int) (int, error)
	Greet(ctx context.Context, name string) (string, error)
	Several(p *Point, n *int, m map[string]int, s []int) (string, error)
	Fail(how string) (string, error)

	Copy(ctx context.Context, in io.Reader, out io.Writer, limit int64) (int64, error)
	Ignore(out io.Writer, text string, times int) error
	Call(f func(context.Context, int) (string, error), n int) (string, error)
	Nest(f Nested) (string, error)
	Which(r io.Reader, w io.Writer, f func() error) (string, error)
	Use(ctx context.Context, how string, r io.Reader, w io.Writer, f func(n int) error) error
	Start(background, untilThen func() error) error

	Open(ctx context.Context, how string) (io.ReadCloser, error)
	Create(ctx context.Context, how string) (io.WriteCloser, error)
	Await(ctx context.Context, event string) error
}

type Echoer[T any] interface{ Echo(T) (T, error) }

type Point struct{ X, Y int }

// Nested is a function of functions and streams.
type Nested func(ctx context.Context, in io.Reader, back OpenText) (io.WriteCloser, error)

// OpenText returns a reader of a text.
type OpenText func(text string) (io.ReadCloser, error)

// kit implements Kit. Its events tell a test what has happened in the plugin.
type kit struct {
	events sync.Map // string to chan struct{}

	// The last arguments of Which.
	r io.Reader
	w io.Writer
	f func() error

	kept error // the last that Use returned
}

func (k *kit) event(name string) chan struct{} {
	ch, _ := k.events.LoadOrStore(name, make(chan struct{}, 100))
	return ch.(chan struct{})
}

func (k *kit) Await(ctx context.Context, event string) error {
	select {
	case <-k.event(event):
		return nil
	case <-ctx.Done():
		return fmt.Errorf("waiting for %s: %w", event, context.Cause(ctx))
	}
}

func (k *kit) Close() error {
	k.event("closed") <- struct{}{}
	return nil
}

func (*kit) Echo(v any) (any, error) { return v, nil }

func (*kit) Point(p *Point) (*Point, error) {
	if p.X < 0 {
		p = nil
	}
	return p, nil
}

func (*kit) Add(a, b int) (int, error) { return a + b, nil }
func (*kit) Secret() error             { return nil }

func (*kit) Greet(ctx context.Context, name string) (string, error) {
	return "Hello, " + name, ctx.Err()
}

func (*kit) Several(p *Point, n *int, m map[string]int, s []int) (string, error) {
	return fmt.Sprint(p == nil, n == nil, len(m), len(s)), nil
}

func (*kit) Fail(how string) (string, error) {
	switch how {
	case "panic":
		panic("boom")
	case "nil":
		return "", nil
	}
	return "not to be seen", fmt.Errorf("failing: %w", testErrors[how])
}

func (k *kit) Copy(ctx context.Context, in io.Reader, out io.Writer, limit int64) (int64, error) {
	n, err := io.CopyN(out, in, limit)
	if err == io.EOF {
		err = nil
	}
	return n, err
}

// Ignore writes and ignores errors.
func (*kit) Ignore(out io.Writer, text string, times int) error {
	for range times {
		_, _ = io.WriteString(out, text)
	}
	return nil
}

func (*kit) Call(f func(context.Context, int) (string, error), n int) (string, error) {
	return f(context.Background(), n)
}

func (*kit) Nest(f Nested) (string, error) {
	open := func(text string) (io.ReadCloser, error) {
		return io.NopCloser(strings.NewReader(text)), nil
	}
	w, err := f(context.Background(), strings.NewReader("from the plugin"), open)
	if err != nil {
		return "", err
	}
	_, err = io.WriteString(w, "the end")
	return "nested", errors.Join(err, w.Close())
}

func (k *kit) Which(r io.Reader, w io.Writer, f func() error) (string, error) {
	k.r, k.w, k.f = r, w, f
	return fmt.Sprint(r == nil, w == nil, f == nil), nil
}

// closing is a stream with a Close.
type closing struct {
	io.Reader
	io.Writer
	close func() error
}

func (c closing) Close() error { return c.close() }

// stream returns a stream that reports its end, and the end of its context, as
// events.
func (k *kit) stream(ctx context.Context, how string) closing {
	context.AfterFunc(ctx, func() { k.event("context of " + how) <- struct{}{} })
	reader := io.Reader(strings.NewReader("content"))
	writer := io.Writer(writerFunc(func(p []byte) (int, error) {
		k.event("written " + string(p)) <- struct{}{}
		return len(p), nil
	}))
	if how == "endless" {
		reader = readerFunc(func(p []byte) (int, error) { return len(p), nil })
		writer = io.Discard
	}
	return closing{reader, writer, func() error {
		k.event("closed " + how) <- struct{}{}
		if how == "bad" {
			return fmt.Errorf("closing: %w", fs.ErrExist)
		}
		return nil
	}}
}

func (k *kit) Open(ctx context.Context, how string) (io.ReadCloser, error) {
	switch how {
	case "nil":
		return nil, nil
	case "late":
		k.event("opening") <- struct{}{}
		<-k.event("open")
	case "failing":
		return k.stream(ctx, how), fs.ErrPermission
	}
	return k.stream(ctx, how), nil
}

func (k *kit) Create(ctx context.Context, how string) (io.WriteCloser, error) {
	return k.stream(ctx, how), nil
}

// kitClient is a Kit whose methods tests call with Invoke and InvokeSeq.
type kitClient struct {
	Kit
	remote *plugin.Remote
}

func newKitPlugin(impl Kit) plugin.Plugin {
	return plugin.For(impl, func(r *plugin.Remote) Kit { return kitClient{remote: r} })
}

// calledByHand is a plugin of For whose client is written by hand.
type calledByHand struct{ plugin.Plugin }

func (calledByHand) Client(b *plugin.MuxBroker, c *rpc.Client) (any, error) {
	return &testClient{c, b}, nil
}

// servedByHand is a plugin of For whose server is written by hand.
type servedByHand struct {
	plugin.Plugin
	server testPlugin
}

func (p servedByHand) Server(b *plugin.MuxBroker) (any, error) { return p.server(b) }

func init() { gob.Register(Point{}) }

// startKit starts a plugin and returns its Kit.
func startKit(t testing.TB) (*plugin.Client, plugin.ClientProtocol, *plugin.Remote) {
	t.Helper()
	c, p := startPlugin(t, testConfig("plugin"))
	return c, p, dispenseKit(t, p)
}

// dispenseKit dispenses a Kit.
func dispenseKit(t testing.TB, p plugin.ClientProtocol) *plugin.Remote {
	t.Helper()
	k, err := plugin.Dispense[Kit](p, "kit")
	check(t, err)
	return k.(kitClient).remote
}

// dispenseKitByHand dispenses a client of the same kit.
func dispenseKitByHand(t testing.TB, p plugin.ClientProtocol) *testClient {
	t.Helper()
	c, err := plugin.Dispense[*testClient](p, "kit by hand")
	check(t, err)
	return c
}

// localKit is startKit in this process.
func localKit(t testing.TB) (*plugin.RPCClient, *kit, *plugin.Remote) {
	t.Helper()
	k := new(kit)
	set := plugin.PluginSet{"kit": newKitPlugin(k), "kit by hand": calledByHand{newKitPlugin(k)}}
	host, _ := plugin.TestPluginRPCConn(t, set, nil)
	return host, k, dispenseKit(t, host)
}

// invoke calls a method and fails the test if there is an error.
func invoke[R any](t testing.TB, r *plugin.Remote, method string, args ...any) R {
	t.Helper()
	v, err := plugin.Invoke[R](boundedContext(t), r, method, args...)
	if err != nil {
		t.Errorf("%s: %v", method, err)
	}
	return v
}

// errorOf calls a method and returns its error.
func errorOf[R any](t testing.TB, r *plugin.Remote, method string, args ...any) error {
	_, err := plugin.Invoke[R](boundedContext(t), r, method, args...)
	return err
}

// ---- What can be called ----

type (
	recursive func(recursive) error
	mutual    func(func(mutual) error) error
	hidden    struct{ _ int }
	list      struct{ Next *list }
	halfGob   struct{ _ int }
)

func (halfGob) GobEncode() ([]byte, error) { return nil, nil }

// Interfaces with one method.
type (
	Takes[T any]  interface{ M(T) error }
	Second[T any] interface{ M(int, T) error }
	Gives[T any]  interface{ M() (T, error) }
)

// forPanics calls For, and checks the words of its panic, or that there is none.
func forPanics[T any](t *testing.T, words ...string) {
	t.Helper()
	p := panics(func() {
		plugin.For(*new(T), func(*plugin.Remote) (none T) { return none })
	})
	if len(words) == 0 {
		checkEqual(t, "the panic of For", p, nil)
		return
	}
	errorSays(t, fmt.Errorf("For panics with %v", p), words...)
}

// For panics if a method cannot cross the connection, and says which one and why.
func TestForPanics(t *testing.T) {
	forPanics[*kit](t, "interface")
	forPanics[any](t, "interface")
	forPanics[interface{ mine() error }](t, "mine", "exported")
	forPanics[interface{ M() (int, string, error) }](t, "M", "error")
	forPanics[Second[context.Context]](t, "M", "context")
	forPanics[Gives[context.Context]](t, "M", "context")
	forPanics[Takes[error]](t, "M", "error")
	forPanics[Gives[error]](t, "M", "error")
	forPanics[Gives[func() error]](t, "M", "func")
	forPanics[Takes[func() (io.Reader, error)]](t, "M", "io.Reader")
	forPanics[Takes[recursive]](t, "M", "recursive")
	forPanics[Second[mutual]](t, "M", "mutual")
	forPanics[Takes[io.ReadCloser]](t, "M", "io.ReadCloser")
	forPanics[Gives[io.Reader]](t, "M", "io.Reader")
	forPanics[Takes[chan int]](t, "M", "chan")
	forPanics[Takes[struct{ P *hidden }]](t, "M", "hidden")
	forPanics[Gives[map[string]**hidden]](t, "M", "hidden")
	forPanics[Takes[halfGob]](t, "M", "halfGob")
	// These are accepted.
	forPanics[Takes[map[Point][]**list]](t)
	forPanics[Second[Padded]](t)
	forPanics[Gives[fmt.Stringer]](t)
	forPanics[Takes[func(io.Reader, func(io.Writer) error) (io.WriteCloser, error)]](t)
}

// Invoke sends nothing if the method, its arguments or its result are not those of
// the interface.
func TestInvokeChecks(t *testing.T) {
	host, _, r := localKit(t)
	_ = host.Close()              // so what is sent fails with rpc.ErrShutdown
	var noContext context.Context // nil
	_, errContext := plugin.Invoke[int](noContext, r, "Add", 1, 2)
	for what, err := range map[string]error{
		"a nil context":          errContext,
		"a nil Remote":           errorOf[int](t, nil, "Add", 1, 2),
		"the zero Remote":        errorOf[int](t, new(plugin.Remote), "Add", 1, 2),
		"an unknown method":      errorOf[int](t, r, "Subtract", 1, 2),
		"a method of impl alone": errorOf[struct{}](t, r, "Secret"),
		"another result":         errorOf[string](t, r, "Add", 1, 2),
		"no result":              errorOf[struct{}](t, r, "Add", 1, 2),
		"a result where is none": errorOf[any](t, r, "Close"),
		"too few arguments":      errorOf[int](t, r, "Add", 1),
		"another type":           errorOf[int](t, r, "Add", 1, "2"),
		"a convertible type":     errorOf[int](t, r, "Add", 1, int64(2)),
		"nil for an int":         errorOf[int](t, r, "Add", 1, nil),
		"another function":       errorOf[string](t, r, "Which", nil, nil, func() {}),
		"a reader for a writer":  errorOf[string](t, r, "Which", nil, strings.NewReader(""), nil),
	} {
		if err == nil || errors.Is(err, rpc.ErrShutdown) {
			t.Errorf("%s: %v", what, err)
		}
	}
	errorIs(t, "a correct call", errorOf[int](t, r, "Add", 1, 2), rpc.ErrShutdown)
}

// ---- Values ----

// A plugin without an implementation cannot be dispensed.
func TestNoImplementation(t *testing.T) {
	host, _ := plugin.TestPluginRPCConn(t, plugin.PluginSet{"kit": newKitPlugin(nil)}, nil)
	_, err := host.Dispense("kit")
	errorSays(t, err, "Kit", "implementation")
}

// Methods of an interface are called with values and contexts, and return values and
// errors that keep their identity. Another call fails after the end of the plugin.
func TestInterface(t *testing.T) {
	leavesNothing(t)
	c, _, r := startKit(t)
	checkEqual(t, "1 + 2", invoke[int](t, r, "Add", 1, 2), 3)
	checkEqual(t, "the greeting", invoke[string](t, r, "Greet", "Gopher"), "Hello, Gopher")
	invoke[struct{}](t, r, "Close")
	invoke[struct{}](t, r, "Await", "closed")
	ctx, cancel := context.WithTimeout(context.Background(), time.Millisecond)
	defer cancel()
	_, err := plugin.Invoke[struct{}](ctx, r, "Await", "nothing")
	errorIs(t, "a call that takes too long", err, context.DeadlineExceeded)
	for how, want := range testErrors {
		got, err := plugin.Invoke[string](boundedContext(t), r, "Fail", how)
		errorIs(t, how, err, want)
		checkEqual(t, "the result with an error", got, "")
	}
	err = errorOf[string](t, r, "Fail", "panic")
	var exit *plugin.ExitError
	if !errors.As(err, &exit) || !strings.Contains(exit.Panic, "boom") {
		t.Errorf("a panic in a method: %v", err)
	}
	<-c.Done()
	errorIs(t, "a call after the end", errorOf[int](t, r, "Add", 1, 2), rpc.ErrShutdown)
}

// What gob does not keep is as the documentation says.
func TestNils(t *testing.T) {
	t.Parallel()
	_, _, r := startKit(t)
	for _, p := range []any{nil, (*Point)(nil), &Point{X: -1}} { // the last has a nil result
		errorSays(t, errorOf[*Point](t, r, "Point", p), "nil *plugin_test.Point")
	}
	for _, p := range []Point{{}, {1, 2}} {
		checkEqual(t, "a point", *invoke[*Point](t, r, "Point", &p), p)
		checkEqual[any](t, "a point in an any", invoke[any](t, r, "Echo", p), p)
	}
	checkEqual(t, "nil in an any", invoke[any](t, r, "Echo", nil), nil)
	errorSays(t, errorOf[any](t, r, "Echo", (*Point)(nil)), "nil")
	errorSays(t, errorOf[any](t, r, "Echo", hidden{}), "Register")
	zero, one := 0, 1
	for _, test := range []struct {
		args []any
		want string
	}{
		{[]any{nil, nil, nil, nil}, "true true 0 0"},
		{[]any{(*Point)(nil), &zero, map[string]int{}, []int{}}, "true true 0 0"},
		{[]any{&Point{}, &one, map[string]int{"": 0}, []int{0}}, "false false 1 1"},
	} {
		checkEqual(t, "several parameters", invoke[string](t, r, "Several", test.args...), test.want)
	}
	for _, test := range []struct {
		args []any
		want string
	}{
		{[]any{nil, nil, nil}, "true true true"},
		{[]any{io.Reader(nil), nil, (func() error)(nil)}, "true true true"},
		{[]any{strings.NewReader(""), io.Discard, func() error { return nil }}, "false false false"},
	} {
		checkEqual(t, "which are nil", invoke[string](t, r, "Which", test.args...), test.want)
	}
	checkEqual(t, "a nil result", invoke[io.ReadCloser](t, r, "Open", "nil"), nil)
}

// ---- Readers, writers and callbacks ----

// Calls, their streams and callbacks are concurrent, and a callback calls the plugin
// again.
func TestArguments(t *testing.T) {
	leavesNothing(t)
	_, _, r := startKit(t)
	concurrently(t, 20, func(i int) {
		data := noise(100_000*i, uint64(i))
		var back bytes.Buffer
		n := invoke[int64](t, r, "Copy", bytes.NewReader(data), &back, int64(1<<40))
		checkEqual(t, "bytes copied", n, int64(len(data)))
		if !bytes.Equal(back.Bytes(), data) {
			t.Errorf("caller %d got other bytes", i)
		}
		got := invoke[string](t, r, "Call", func(_ context.Context, n int) (string, error) {
			return fmt.Sprint(n, invoke[int](t, r, "Add", n, n)), nil
		}, i)
		checkEqual(t, "the callback's result", got, fmt.Sprint(i, 2*i))
	})
	failing := readerFunc(func([]byte) (int, error) { return 0, fs.ErrPermission })
	callback := func(context.Context, int) (string, error) { return "x", fs.ErrPermission }
	errorIs(t, "a reader", errorOf[int64](t, r, "Copy", failing, io.Discard, int64(9)), fs.ErrPermission)
	errorIs(t, "a callback", errorOf[string](t, r, "Call", callback, 1), fs.ErrPermission)
}

// Functions take functions and streams, and return streams.
func TestNestedFunctions(t *testing.T) {
	t.Parallel()
	_, _, r := startKit(t)
	var written, read syncBuffer
	over := make(chan struct{})
	nested := func(ctx context.Context, in io.Reader, back OpenText) (io.WriteCloser, error) {
		more, err := back(" and back")
		if err != nil {
			return nil, err
		}
		_, err = io.Copy(&read, io.MultiReader(in, more))
		context.AfterFunc(ctx, func() { close(over) })
		return closing{nil, &written, func() error { return nil }}, errors.Join(err, more.Close())
	}
	got := invoke[string](t, r, "Nest", Nested(nested))
	checkEqual(t, "the result", got, "nested")
	checkEqual(t, "read", read.String(), "from the plugin and back")
	checkEqual(t, "written", written.String(), "the end")
	receive(t, "the end of the callback's context, with its stream", over)
}

// A panic or Goexit in an argument is an error there, and nowhere else.
func TestBrokenArguments(t *testing.T) {
	t.Parallel()
	_, _, r := startKit(t)
	for what, broken := range map[string]func(){"panic": func() { panic("boom") }, "exit": runtime.Goexit} {
		use := func([]byte) (int, error) {
			broken()
			return 0, nil
		}
		callback := func(context.Context, int) (string, error) {
			broken()
			return "", nil
		}
		for _, err := range []error{
			errorOf[string](t, r, "Call", callback, 1),
			errorOf[int64](t, r, "Copy", readerFunc(use), io.Discard, int64(9)),
			errorOf[int64](t, r, "Copy", strings.NewReader("some"), writerFunc(use), int64(9)),
		} {
			if !isA[rpc.ServerError](err) {
				t.Errorf("%s: %v", what, err)
			}
		}
	}
	invoke[int](t, r, "Add", 1, 2)
}

// All that a method wrote is in the writer. A failure that it has not seen is the
// error of Invoke, and one that it has seen is not.
func TestWriterOfCall(t *testing.T) {
	t.Parallel()
	_, _, r := startKit(t)
	var back syncBuffer
	slow := writerFunc(func(p []byte) (int, error) {
		time.Sleep(time.Millisecond)
		return back.Write(p)
	})
	invoke[struct{}](t, r, "Ignore", slow, strings.Repeat("x", 1000), 100)
	checkEqual(t, "bytes", len(back.String()), 100_000)
	failing := writerFunc(func(p []byte) (int, error) { return 0, fs.ErrNotExist })
	errorIs(t, "the last Write", errorOf[struct{}](t, r, "Ignore", failing, "x", 1), fs.ErrNotExist)
	// So much does not fit into the stream, so a Write of the method returns the error.
	invoke[struct{}](t, r, "Ignore", failing, strings.Repeat("x", 4<<20), 2)
}

// A reader is read ahead, but not far.
func TestReadAhead(t *testing.T) {
	t.Parallel()
	_, _, r := startKit(t)
	var read atomic.Int64
	endless := readerFunc(func(p []byte) (int, error) {
		read.Add(int64(len(p)))
		return len(p), nil
	})
	checkEqual(t, "bytes copied", invoke[int64](t, r, "Copy", endless, io.Discard, int64(10)), 10)
	n := read.Load()
	if n > 1<<20+64<<10 {
		t.Errorf("%d bytes were read for 10", n)
	}
	invoke[int](t, r, "Add", 1, 2) // time for another Read to begin
	checkEqual(t, "bytes read in the end", read.Load(), n)
}

// What a method keeps fails when it has returned.
func TestKeptArguments(t *testing.T) {
	_, k, r := localKit(t)
	var uses atomic.Int64
	use := func([]byte) (int, error) {
		uses.Add(1)
		return 0, io.EOF
	}
	callback := func() error {
		uses.Add(1)
		return nil
	}
	invoke[string](t, r, "Which", readerFunc(use), writerFunc(use), callback)
	before := uses.Load()
	_, errRead := k.r.Read(make([]byte, 1))
	_, errWrite := k.w.Write([]byte("late"))
	for i, err := range []error{errRead, errWrite, k.f()} {
		if err == nil || err == io.EOF {
			t.Errorf("argument %d that was kept: %v", i, err)
		}
	}
	checkEqual(t, "uses", uses.Load(), before)
}

// uses counts the calls of a writer or callback, which last until they are released.
type uses struct {
	began    chan struct{} // gets something when one begins
	release  chan struct{}
	running  atomic.Int64
	finished atomic.Int64
}

func newUses() *uses {
	return &uses{began: make(chan struct{}, 1000), release: make(chan struct{})}
}

func (u *uses) use() {
	u.running.Add(1)
	u.began <- struct{}{}
	<-u.release
	u.running.Add(-1)
	u.finished.Add(1)
}

func (u *uses) Write(p []byte) (int, error) {
	u.use()
	return len(p), nil
}

func (u *uses) callback(context.Context, int) (string, error) {
	u.use()
	return "", nil
}

// Invoke waits for a Write and a callback although its context has ended, and none
// begins when it has returned.
func TestEndOfCall(t *testing.T) {
	leavesNothing(t)
	_, _, r := startKit(t)
	for what, call := range map[string]func(ctx context.Context, u *uses) error{
		"Write": func(ctx context.Context, u *uses) error {
			in := bytes.NewReader(noise(1<<20, 1))
			_, err := plugin.Invoke[int64](ctx, r, "Copy", in, u, int64(1<<20))
			return err
		},
		"callback": func(ctx context.Context, u *uses) error {
			_, err := plugin.Invoke[string](ctx, r, "Call", u.callback, 1)
			return err
		},
	} {
		ctx, cancel := context.WithCancel(context.Background())
		u := newUses()
		returned := async(func() error {
			err := call(ctx, u)
			checkEqual(t, what+"s that run when Invoke returns", u.running.Load(), 0)
			return err
		})
		receive(t, "a "+what, u.began)
		cancel()
		invoke[int](t, r, "Add", 1, 2) // time for it to return too early
		checkEqual(t, what+": Invoke has returned", len(returned), 0)
		close(u.release)
		errorIs(t, what, receive(t, "the end of Invoke", returned), context.Canceled)
		finished := u.finished.Load()
		invoke[int](t, r, "Add", 1, 2) // time for another one to begin
		checkEqual(t, what+"s in the end", u.finished.Load(), finished)
	}
}

// A callback learns that the call is cancelled.
func TestCallbackIsCancelled(t *testing.T) {
	t.Parallel()
	_, _, r := startKit(t)
	ctx, cancel := context.WithCancel(context.Background())
	_, err := plugin.Invoke[string](ctx, r, "Call", func(ctx context.Context, _ int) (string, error) {
		cancel()
		<-ctx.Done()
		return "", nil
	}, 1)
	errorIs(t, "a callback that waits for the end", err, context.Canceled)
}

// Invoke does not wait for a Read that blocks, whether the method has returned or
// the call is cancelled, and no other begins.
func TestBlockedRead(t *testing.T) {
	leavesNothing(t)
	_, _, r := startKit(t)
	for limit, timeout := range map[int64]time.Duration{0: hangs, 9: 50 * time.Millisecond} {
		ctx, cancel := context.WithTimeout(context.Background(), timeout)
		defer cancel()
		release := make(chan struct{})
		var reads atomic.Int64
		blocked := readerFunc(func(p []byte) (int, error) {
			reads.Add(1)
			<-release
			return 0, nil
		})
		within(t, "Invoke with a Read that blocks", useTimeout, func() {
			_, err := plugin.Invoke[int64](ctx, r, "Copy", blocked, io.Discard, limit)
			checkEqual(t, "cancelled", errors.Is(err, context.DeadlineExceeded), limit > 0)
		})
		close(release)
		invoke[int](t, r, "Add", 1, 2) // time for another one to begin
		if n := reads.Load(); n > 1 {
			t.Errorf("%d Reads began", n)
		}
	}
}

// ---- Results that are streams ----

// A result that is a stream works after its call, even if the context of that has
// ended, and is closed in the plugin when it is closed here.
func TestResults(t *testing.T) {
	leavesNothing(t)
	_, _, r := startKit(t)
	for _, how := range []string{"good", "bad"} {
		ctx, cancel := context.WithCancel(context.Background())
		in, err := plugin.Invoke[io.ReadCloser](ctx, r, "Open", how)
		check(t, err)
		out, err := plugin.Invoke[io.WriteCloser](ctx, r, "Create", how)
		check(t, err)
		cancel()
		data, err := io.ReadAll(in)
		checkEqual(t, "read", string(data), "content")
		check(t, err)
		_, err = io.WriteString(out, how)
		check(t, err)
		invoke[struct{}](t, r, "Await", "written "+how)
		for _, s := range []io.Closer{in, out} {
			err := s.Close()
			checkEqual(t, how+": Close fails", err != nil, how == "bad")
			checkEqual(t, how+": with its error", errors.Is(err, fs.ErrExist), how == "bad")
			awaitClosed(t, r, how)
		}
	}
}

// awaitClosed waits until a stream is closed in the plugin, and its context ends.
func awaitClosed(t testing.TB, r *plugin.Remote, how string) {
	t.Helper()
	invoke[struct{}](t, r, "Await", "closed "+how)
	invoke[struct{}](t, r, "Await", "context of "+how)
}

// A stream may be closed before its end.
func TestResultIsClosedEarly(t *testing.T) {
	t.Parallel()
	_, _, r := startKit(t)
	s := invoke[io.ReadCloser](t, r, "Open", "endless")
	_, err := io.ReadFull(s, make([]byte, 1<<20))
	check(t, err)
	within(t, "closing early", 0, func() { errorIs(t, "Close", s.Close(), nil) })
	awaitClosed(t, r, "endless")
	_, err = s.Read(make([]byte, 1))
	errorIs(t, "Read after Close", err, io.ErrClosedPipe)
}

// A stream that is returned with an error is closed in the plugin.
func TestResultWithError(t *testing.T) {
	t.Parallel()
	_, _, r := startKit(t)
	s, err := plugin.Invoke[io.ReadCloser](boundedContext(t), r, "Open", "failing")
	checkEqual(t, "a stream with an error", s, nil)
	errorIs(t, "a stream with an error", err, fs.ErrPermission)
	awaitClosed(t, r, "failing")
}

// A stream that is not taken is closed, and so is one whose connection ends.
func TestForgottenResults(t *testing.T) {
	t.Parallel()
	host, k, r := localKit(t)
	mustCall[uint32](t, dispenseKitByHand(t, host).Client, "Open", "forgotten")
	invoke[io.WriteCloser](t, r, "Create", "cut")
	check(t, k.Await(boundedContext(t), "closed forgotten"))
	check(t, k.Await(boundedContext(t), "context of forgotten"))
	checkEqual(t, "streams closed too early", len(k.event("closed cut"))+len(k.event("context of cut")), 0)
	_ = host.Close() // whether or not the plugin answers in time
	check(t, k.Await(boundedContext(t), "closed cut"))
	check(t, k.Await(boundedContext(t), "context of cut"))
}

// A stream that is cut by a crash does not seem complete.
func TestCutResults(t *testing.T) {
	t.Parallel()
	_, _, r := startKit(t)
	in := invoke[io.ReadCloser](t, r, "Open", "endless")
	reading := async(func() error {
		_, err := io.Copy(io.Discard, in)
		return err
	})
	out := invoke[io.WriteCloser](t, r, "Create", "endless")
	writing := async(func() error {
		return untilError(func() error { return writeTo(out, 1) })
	})
	_ = errorOf[string](t, r, "Fail", "panic")
	for _, errs := range []<-chan error{reading, writing} {
		err := receive(t, "the end of a stream", errs)
		checkEqual(t, "with an ExitError", isA[*plugin.ExitError](err), true)
	}
	checkEqual(t, "Close fails", in.Close() != nil && out.Close() != nil, true)
}

// ---- The wire ----

// handKit serves methods of Kit as they would be written by hand.
type handKit struct{ broker *plugin.MuxBroker }

type (
	addArgs   = struct{ A0, A1 int }
	whichArgs = struct{ A0, A1, A2 uint32 }
)

func (handKit) Add(args addArgs, sum *int) error          { return mirrored(args.A0+args.A1, sum) }
func (handKit) Greet(name string, greeting *string) error { return mirrored("Hello, "+name, greeting) }
func (handKit) Point(p *Point, reply *Point) error        { return mirrored(*p, reply) }
func (handKit) Echo(v any, reply *any) error              { return mirrored(v, reply) }
func (handKit) Close(struct{}, *struct{}) error           { return nil }

// Ignore has the reply of go-plugin's examples.
func (handKit) Ignore(struct{ A0 uint32 }, *any) error { return nil }

// Which copies from the reader to the writer and calls the function.
func (k handKit) Which(args whichArgs, reply *string) error {
	if args == (whichArgs{}) {
		*reply = "true true true"
		return nil
	}
	in, errIn := k.broker.DialReader(args.A0)
	out, errOut := k.broker.DialWriter(args.A1)
	f, errCall := k.broker.DialRPC(args.A2)
	if err := errors.Join(errIn, errOut, errCall); err != nil {
		return err
	}
	_, err := io.Copy(out, in)
	return errors.Join(err, f.Call("Plugin.Call", 1, nil), in.Close(), out.Close(), f.Close())
}

func (k handKit) Open(how string, id *uint32) error {
	*id, _ = k.broker.ServeReader(strings.NewReader(how))
	return nil
}

// What is sent is what net/rpc sends, byte for byte: a request and a response end with
// the message that gob makes of the argument and the reply.
func TestInterfaceOnWire(t *testing.T) {
	t.Parallel()
	none, text := any(nil), any("text")
	for _, test := range []struct {
		method string
		invoke invokeFunc
		into   func() any
		args   []any
		sent   any
		reply  any
	}{
		{"Add", invokeFor[int], into[int], []any{1, 2}, addArgs{1, 2}, 3},
		{"Add", invokeFor[int], into[int], []any{0, 0}, addArgs{}, 0},
		{"Greet", invokeFor[string], into[string], []any{"Gopher"}, "Gopher", "Hello, Gopher"},
		{"Point", invokeFor[*Point], into[*Point], []any{&Point{1, 2}}, Point{1, 2}, &Point{1, 2}},
		{"Point", invokeFor[*Point], into[*Point], []any{&Point{}}, &Point{}, &Point{}},
		{"Echo", invokeFor[any], into[any], []any{"text"}, &text, &text},
		{"Echo", invokeFor[any], into[any], []any{nil}, &none, &none},
		{"Close", invokeFor[struct{}], into[struct{}], nil, struct{}{}, struct{}{}},
		{"Which", invokeFor[string], into[string], []any{nil, nil, nil}, whichArgs{}, "true true true"},
	} {
		result, request := invokeAtStock(t, test.invoke, test.method, test.args)
		checkEqual(t, test.method, result, reflect.Indirect(reflect.ValueOf(test.reply)).Interface())
		response := callFromStock(t, test.method, test.sent, test.into())
		for what, pair := range map[string][2]string{
			"request": {request, lastMessage(t, test.sent)},
			"reply":   {response, lastMessage(t, test.reply)},
		} {
			if got, want := pair[0], pair[1]; !strings.HasSuffix(got, want) {
				t.Errorf("the %s of %s(%v) is %x and not %x", what, test.method, test.args, got, want)
			}
		}
	}
}

// tapped is a stream whose bytes are kept as they are read.
type tapped struct {
	io.Reader
	io.WriteCloser
}

// invokeAtStock calls a method of a plugin that is net/rpc, and returns the result and
// what the plugin has got.
func invokeAtStock(t testing.TB, invoke invokeFunc, method string, args []any) (result any, sent string) {
	t.Helper()
	_, c, st := rawPlugin(t)
	var request syncBuffer
	server := rpc.NewServer()
	check(t, server.RegisterName("Plugin", handKit{}))
	go server.ServeConn(tapped{io.TeeReader(st, &request), st}) // ends with the connection
	k, err := newKitPlugin(nil).Client(c.broker, c.Client)
	check(t, err)
	result, err = invoke(boundedContext(t), k.(kitClient).remote, method, args...)
	check(t, err)
	return result, request.String()
}

// callFromStock calls a method from a host that is net/rpc, and returns what the host
// has got.
func callFromStock(t testing.TB, method string, arg, into any) (got string) {
	t.Helper()
	svc, err := newKitPlugin(new(kit)).Server(nil)
	check(t, err)
	_, _, st := rawHost(t, svc)
	var response syncBuffer
	client := rpc.NewClient(tapped{io.TeeReader(st, &response), st})
	check(t, client.Call("Plugin."+method, arg, into))
	return response.String()
}

// invokeFunc calls a method, and returns what its result is or points to.
type invokeFunc func(ctx context.Context, r *plugin.Remote, method string, args ...any) (any, error)

// invokeFor is the invokeFunc of methods that return an R.
func invokeFor[R any](ctx context.Context, r *plugin.Remote, method string, args ...any) (any, error) {
	v, err := plugin.Invoke[R](ctx, r, method, args...)
	return reflect.Indirect(reflect.ValueOf(&v).Elem()).Interface(), err
}

// into returns what net/rpc may decode an R into.
func into[R any]() any { return new(R) }

// lastMessage returns v as gob writes it, without definitions of types.
func lastMessage(t testing.TB, v any) (last string) {
	t.Helper()
	enc := gob.NewEncoder(writerFunc(func(p []byte) (int, error) {
		last = string(p)
		return len(p), nil
	}))
	check(t, enc.Encode(v))
	return last
}

// Invoke calls methods that were written by hand, which have no context.
func TestInvokeOfHandWritten(t *testing.T) {
	server := func(b *plugin.MuxBroker) (any, error) { return handKit{b}, nil }
	set := plugin.PluginSet{"kit": servedByHand{newKitPlugin(nil), server}}
	host, _ := plugin.TestPluginRPCConn(t, set, nil)
	r := dispenseKit(t, host)
	var back bytes.Buffer
	called := false
	callback := func() error {
		called = true
		return nil
	}
	invoke[string](t, r, "Which", strings.NewReader("content"), &back, callback)
	checkEqual(t, "copied", back.String(), "content")
	checkEqual(t, "called", called, true)
	s := invoke[io.ReadCloser](t, r, "Open", "content")
	data, err := io.ReadAll(s)
	checkEqual(t, "read", string(data), "content")
	check(t, err)
	check(t, s.Close())
	invoke[struct{}](t, r, "Close")
	invoke[struct{}](t, r, "Ignore", nil, "", 0)
	errorSays(t, errorOf[struct{}](t, r, "Await", "text"), "Await")
}

// A client that was written by hand calls methods of an interface.
func TestHandWrittenCalls(t *testing.T) {
	t.Parallel()
	_, p, r := startKit(t)
	hand := dispenseKitByHand(t, p)
	checkEqual(t, "without the last parameter", mustCall[int](t, hand.Client, "Add", struct{ A0 int }{5}), 5)
	checkEqual(t, "with one more", mustCall[int](t, hand.Client, "Add", struct{ A2, A1, A0 int }{7, 2, 1}), 3)
	for _, args := range []any{
		new(any), struct{}{}, true, "text", []any{nil}, map[string]any{"x": nil}, Point{},
	} {
		check(t, hand.Client.Call("Plugin.Close", args, nil))
	}
	var back bytes.Buffer
	in, stopReader := hand.broker.ServeReader(strings.NewReader("content"))
	defer stopReader()
	out, stopWriter := hand.broker.ServeWriter(&back)
	defer stopWriter()
	type copyArgs struct {
		A0, A1 uint32
		A2     int64
	}
	checkEqual(t, "bytes copied", mustCall[int64](t, hand.Client, "Copy", copyArgs{in, out, 5}), 5)
	checkEqual(t, "copied", back.String(), "conte")
	f, stop := hand.broker.ServeRPC(handCallback{})
	defer stop()
	call := struct {
		A0 uint32
		A1 int
	}{f, 42}
	checkEqual(t, "the callback's result", mustCall[string](t, hand.Client, "Call", call), "called with 42")
	s, err := hand.broker.DialReader(mustCall[uint32](t, hand.Client, "Open", "good"))
	check(t, err)
	data, err := io.ReadAll(s)
	checkEqual(t, "read", string(data), "content")
	check(t, err)
	check(t, s.Close())
	invoke[struct{}](t, r, "Await", "closed good")
	checkEqual(t, "the number of nil", mustCall[uint32](t, hand.Client, "Open", "nil"), 0)
	// Numbers that are not served.
	for _, args := range []copyArgs{{7, 7, 1}, {out, in, 1}} {
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		if plugin.Call(ctx, hand.Client, "Plugin.Copy", args, new(int64)) == nil {
			t.Errorf("%+v are served", args)
		}
	}
	invoke[int](t, r, "Add", 1, 2)
}

type handCallback struct{}

func (handCallback) Call(n int, reply *string) error {
	*reply = fmt.Sprint("called with ", n)
	return nil
}
