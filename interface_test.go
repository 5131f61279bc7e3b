package plugin

import (
	"bytes"
	"context"
	"encoding/gob"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/rpc"
	"reflect"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// ---- An interface, its implementation and its client ----

// Kit has methods of all forms. The generic and the standard interface in it are
// embedded.
type Kit interface {
	io.Closer
	Echoer[any]
	Echoer2[*Point]

	Add(a, b int) (int, error)
	Greet(ctx context.Context, name string) (string, error)
	Several(p *Point, n *int, m map[string]int, s []int) (string, error)
	Fail(how string) (string, error)

	Copy(ctx context.Context, in io.Reader, out io.Writer, limit int64) (int64, error)
	Ignore(out io.Writer, text string, times int) error
	Call(f func(context.Context, int) (string, error), n int) (string, error)
	Nest(f Nested) (string, error)
	Which(r io.Reader, w io.Writer, f func() error) (string, error)

	Open(ctx context.Context, how string) (io.ReadCloser, error)
	Create(ctx context.Context, how string) (io.WriteCloser, error)
	Await(ctx context.Context, event string) error
}

type Echoer[T any] interface{ Echo(T) (T, error) }

type Echoer2[T any] interface{ Point(T) (T, error) }

type Point struct{ X, Y int }

// Nested is a function of functions and streams.
type Nested func(ctx context.Context, in io.Reader, back func(text string) (io.ReadCloser, error)) (io.WriteCloser, error)

// kit implements Kit. Its events tell a test what has happened in the plugin.
type kit struct {
	events sync.Map // string to chan struct{}

	// The last arguments of Which.
	r io.Reader
	w io.Writer
	f func() error
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

func (k *kit) Close() error          { k.event("closed") <- struct{}{}; return nil }
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
	return fmt.Sprint(p, n, len(m), len(s)), nil
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

// Nest reads from in and from what back returns, and writes both to what f returns.
func (*kit) Nest(f Nested) (string, error) {
	done := make(chan struct{})
	w, err := f(context.Background(), strings.NewReader("from the plugin"), func(text string) (io.ReadCloser, error) {
		return closing{strings.NewReader(text), nil, func() error { close(done); return nil }}, nil
	})
	if err != nil {
		return "", err
	}
	<-done
	if _, err := io.WriteString(w, "the end"); err != nil {
		return "", err
	}
	return "nested", w.Close()
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
	if how == "endless" {
		reader = readerFunc(func(p []byte) (int, error) { return len(p), nil })
	}
	return closing{reader, writerFunc(func(p []byte) (int, error) {
		k.event("written " + string(p)) <- struct{}{}
		return len(p), nil
	}), func() error {
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
	case "failing":
		return k.stream(ctx, how), fs.ErrPermission
	}
	return k.stream(ctx, how), nil
}

func (k *kit) Create(ctx context.Context, how string) (io.WriteCloser, error) {
	return k.stream(ctx, how), nil
}

// kitClient is a Kit whose methods tests call with Invoke.
type kitClient struct {
	Kit
	remote *Remote
}

func kitPlugin(impl Kit) Plugin {
	return For(impl, func(r *Remote) Kit { return kitClient{remote: r} })
}

func init() {
	gob.Register(Point{})
	modes["kit"] = func() {
		servePlugin(func(c *ServeConfig) { c.Plugins = PluginSet{"kit": kitPlugin(new(kit)), "none": kitPlugin(nil)} })
	}
}

// startKit starts a plugin and returns its Kit.
func startKit(t testing.TB) (*Client, ClientProtocol, *Remote) {
	t.Helper()
	cfg := config("kit")
	cfg.Plugins = PluginSet{"kit": kitPlugin(nil), "none": kitPlugin(nil)}
	c, p := start(t, cfg)
	return c, p, dispenseKit(t, p)
}

func dispenseKit(t testing.TB, p ClientProtocol) *Remote {
	t.Helper()
	k, err := Dispense[Kit](p, "kit")
	check(t, err)
	return k.(kitClient).remote
}

// localKit is startKit in this process.
func localKit(t testing.TB) (*RPCClient, *kit, *Remote) {
	t.Helper()
	k := new(kit)
	host, _ := TestPluginRPCConn(t, PluginSet{"kit": kitPlugin(k)}, nil)
	return host, k, dispenseKit(t, host)
}

// invoke calls a method and fails the test if there is an error.
func invoke[R any](t testing.TB, r *Remote, method string, args ...any) R {
	t.Helper()
	v, err := Invoke[R](boundedContext(t), r, method, args...)
	if err != nil {
		t.Errorf("%s: %v", method, err)
	}
	return v
}

// ---- What For accepts ----

type (
	recursive func(recursive) error
	mutual    func(func(mutual) error) error
	hidden    struct{ x int }
	tree      struct {
		V        any
		Children map[string]*tree
	}
	halfGob struct{ x int }
	// picky cannot encode its zero value.
	picky struct{ V int }
)

func (halfGob) GobEncode() ([]byte, error) { return nil, nil }

func (p picky) GobEncode() ([]byte, error) {
	if p.V == 0 {
		return nil, errWrong
	}
	return []byte{byte(p.V)}, nil
}

func (p *picky) GobDecode(data []byte) error { p.V = int(data[0]); return nil }

// forPanics calls For and returns what it panics with.
func forPanics[T any]() (text string) {
	defer func() { text = fmt.Sprint(recover()) }()
	For[T](*new(T), nil)
	return ""
}

func TestForPanics(t *testing.T) {
	for _, test := range [][]string{
		{forPanics[*kit](), "interface"},
		{forPanics[any](), "interface"},
		{forPanics[interface{ mine() error }](), "mine", "exported"},
		{forPanics[interface{ M(...int) error }](), "M", "variadic"},
		{forPanics[interface{ M() }](), "M", "error"},
		{forPanics[interface{ M() int }](), "M", "error"},
		{forPanics[interface{ M() (int, string, error) }](), "M", "error"},
		{forPanics[interface {
			M(int, context.Context) error
		}](), "M", "context"},
		{forPanics[interface {
			M() (context.Context, error)
		}](), "M", "context"},
		{forPanics[interface{ M(error) error }](), "M", "error"},
		{forPanics[interface{ M() (error, error) }](), "M", "error"},
		{forPanics[interface{ M() (func() error, error) }](), "M", "func"},
		{forPanics[interface {
			M(func(...int) error) error
		}](), "M", "variadic"},
		{forPanics[interface{ M(func(int) int) error }](), "M", "error"},
		{forPanics[interface {
			M(func() (io.Reader, error)) error
		}](), "M", "io.Reader"},
		{forPanics[interface{ M(recursive) error }](), "M", "recursive"},
		{forPanics[interface{ M(int, mutual) error }](), "M", "mutual"},
		{forPanics[interface{ M(io.ReadCloser) error }](), "M", "io.ReadCloser"},
		{forPanics[interface{ M(io.Seeker) error }](), "M", "io.Seeker"},
		{forPanics[interface{ M() (io.Reader, error) }](), "M", "io.Reader"},
		{forPanics[interface{ M(chan int) error }](), "M", "chan"},
		{forPanics[interface{ M([]func()) error }](), "M", "func"},
		{forPanics[interface{ M(hidden) error }](), "M", "hidden"},
		{forPanics[interface {
			M() (map[string]**hidden, error)
		}](), "M", "hidden"},
		{forPanics[interface {
			M(struct{ P *hidden }) error
		}](), "M", "hidden"},
		{forPanics[interface{ M(halfGob) error }](), "M", "halfGob"},
		// These are accepted.
		{forPanics[interface {
			M(tree, *tree, []*tree) (**tree, error)
		}](), "nil"},
		{forPanics[interface {
			M(picky, *picky) (picky, error)
		}](), "nil"},
		{forPanics[interface {
			M(struct{}, time.Time, any, fmt.Stringer) error
		}](), "nil"},
		{forPanics[interface {
			M(func(io.Reader, func(io.Writer) error) (io.WriteCloser, error)) error
		}](), "nil"},
		{forPanics[Echoer[map[Point][]byte]](), "nil"},
	} {
		for _, word := range test[1:] {
			if !strings.Contains(test[0], word) {
				t.Errorf("For does not say %q: %s", word, test[0])
			}
		}
	}
}

func TestInvokeChecks(t *testing.T) {
	host, _, r := localKit(t)
	check(t, host.Close()) // so what is sent fails with rpc.ErrShutdown
	var noContext context.Context
	_, errContext := Invoke[int](noContext, r, "Add", 1, 2)
	invokeError := func(_ any, err error) error { return err }
	ctx := context.Background()
	for what, err := range map[string]error{
		"a nil context":          errContext,
		"a nil Remote":           invokeError(Invoke[int](ctx, nil, "Add", 1, 2)),
		"the zero Remote":        invokeError(Invoke[int](ctx, new(Remote), "Add", 1, 2)),
		"an unknown method":      invokeError(Invoke[int](ctx, r, "Subtract", 1, 2)),
		"a method of impl alone": invokeError(Invoke[struct{}](ctx, r, "Secret")),
		"another result":         invokeError(Invoke[string](ctx, r, "Add", 1, 2)),
		"no result":              invokeError(Invoke[struct{}](ctx, r, "Add", 1, 2)),
		"a result where is none": invokeError(Invoke[any](ctx, r, "Close")),
		"too few arguments":      invokeError(Invoke[int](ctx, r, "Add", 1)),
		"too many arguments":     invokeError(Invoke[int](ctx, r, "Add", 1, 2, 3)),
		"another type":           invokeError(Invoke[int](ctx, r, "Add", 1, "2")),
		"a convertible type":     invokeError(Invoke[int](ctx, r, "Add", 1, int64(2))),
		"nil for an int":         invokeError(Invoke[int](ctx, r, "Add", 1, nil)),
		"another function":       invokeError(Invoke[string](ctx, r, "Which", nil, nil, func() {})),
		"a reader for a writer":  invokeError(Invoke[string](ctx, r, "Which", nil, strings.NewReader(""), nil)),
	} {
		if err == nil || errors.Is(err, rpc.ErrShutdown) {
			t.Errorf("%s: %v", what, err)
		}
	}
	if _, err := Invoke[int](ctx, r, "Add", 1, 2); !errors.Is(err, rpc.ErrShutdown) {
		t.Errorf("a correct call: %v", err)
	}
}

// ---- Values ----

func TestInterface(t *testing.T) {
	leavesNothing(t)
	c, p, r := startKit(t)
	if got := invoke[int](t, r, "Add", 1, 2); got != 3 {
		t.Errorf("1 + 2 is %d", got)
	}
	if got := invoke[string](t, r, "Greet", "Gopher"); got != "Hello, Gopher" {
		t.Errorf("the greeting is %q", got)
	}
	invoke[struct{}](t, r, "Close")
	invoke[struct{}](t, r, "Await", "closed")
	_, err := Dispense[Kit](p, "none")
	errorSays(t, err, "Kit", "implementation")
	ctx, cancel := context.WithTimeoutCause(context.Background(), time.Millisecond, errWrong)
	defer cancel()
	if _, err := Invoke[struct{}](ctx, r, "Await", "nothing"); !errors.Is(err, context.DeadlineExceeded) || !errors.Is(err, errWrong) {
		t.Errorf("a call that takes too long: %v", err)
	}
	for how, want := range testErrors {
		got, err := Invoke[string](context.Background(), r, "Fail", how)
		if !errors.Is(err, want) || got != "" {
			t.Errorf("the error %s is %v; the result with it %q", how, err, got)
		}
	}
	_, err = Invoke[string](context.Background(), r, "Fail", "panic")
	var exit *ExitError
	if !errors.As(err, &exit) || !strings.Contains(exit.Panic, "boom") {
		t.Errorf("a panic in a method: %v", err)
	}
	<-c.Done()
	if _, err := Invoke[int](context.Background(), r, "Add", 1, 2); !errors.Is(err, rpc.ErrShutdown) {
		t.Errorf("a call after the end: %v", err)
	}
}

// What gob does not keep is as the documentation says.
func TestNils(t *testing.T) {
	t.Parallel()
	_, _, r := startKit(t)
	for _, p := range []*Point{{}, {1, 2}} {
		if got := invoke[*Point](t, r, "Point", p); got == nil || *got != *p {
			t.Errorf("%v arrives as %v", p, got)
		}
	}
	for _, p := range []any{nil, (*Point)(nil), &Point{X: -1}} { // the last has a nil result
		_, err := Invoke[*Point](boundedContext(t), r, "Point", p)
		errorSays(t, err, "nil *plugin.Point")
	}
	for _, v := range []any{nil, 0, "", Point{}, Point{1, 2}} {
		if got := invoke[any](t, r, "Echo", v); got != v {
			t.Errorf("%#v arrives as %#v", v, got)
		}
	}
	_, err := Invoke[any](boundedContext(t), r, "Echo", (*Point)(nil))
	errorSays(t, err, "nil")
	_, err = Invoke[any](boundedContext(t), r, "Echo", hidden{})
	errorSays(t, err, "Register")
	zero, one := 0, 1
	for _, test := range []struct {
		args []any
		want string
	}{
		{[]any{nil, nil, nil, nil}, "<nil> <nil> 0 0"},
		{[]any{(*Point)(nil), &zero, map[string]int{}, []int{}}, "<nil> <nil> 0 0"},
		{[]any{&Point{}, nil, map[string]int{"": 0}, []int{0}}, "&{0 0} <nil> 1 1"},
	} {
		if got := invoke[string](t, r, "Several", test.args...); got != test.want {
			t.Errorf("%v arrives as %v", test.want, got)
		}
	}
	if got := invoke[string](t, r, "Several", nil, &one, nil, nil); strings.HasPrefix(got, "<nil> <nil>") {
		t.Errorf("a pointer to 1 arrives as nil: %s", got)
	}
	if got := invoke[string](t, r, "Which", nil, nil, nil); got != "true true true" {
		t.Errorf("nil arrives as nil: %s", got)
	}
	if got := invoke[string](t, r, "Which", nil, io.Writer(nil), (func() error)(nil)); got != "true true true" {
		t.Errorf("nil of its type arrives as nil: %s", got)
	}
	if got := invoke[string](t, r, "Which", strings.NewReader(""), io.Discard, func() error { return nil }); got != "false false false" {
		t.Errorf("what is not nil arrives as nil: %s", got)
	}
	if got := invoke[io.ReadCloser](t, r, "Open", "nil"); got != nil {
		t.Errorf("a nil stream arrives as %v", got)
	}
}

// ---- Readers, writers and callbacks ----

func TestArguments(t *testing.T) {
	leavesNothing(t)
	_, _, r := startKit(t)
	data := noise(3_000_000, 1)
	var back bytes.Buffer
	n := invoke[int64](t, r, "Copy", bytes.NewReader(data), &back, int64(1<<40))
	if n != int64(len(data)) || !bytes.Equal(back.Bytes(), data) {
		t.Errorf("%d of %d bytes were copied, and %d came back", n, len(data), back.Len())
	}
	// Errors keep their identity, whatever they come from.
	failing := func([]byte) (int, error) { return 0, fs.ErrPermission }
	_, errRead := Invoke[int64](boundedContext(t), r, "Copy", readerFunc(failing), io.Discard, int64(9))
	_, errWrite := Invoke[int64](boundedContext(t), r, "Copy", bytes.NewReader(data), writerFunc(failing), int64(1<<40))
	_, errCall := Invoke[string](boundedContext(t), r, "Call", func(context.Context, int) (string, error) { return "x", fs.ErrPermission }, 1)
	for _, err := range []error{errRead, errWrite, errCall} {
		if !errors.Is(err, fs.ErrPermission) {
			t.Errorf("the error is %v", err)
		}
	}
	got := invoke[string](t, r, "Call", func(_ context.Context, n int) (string, error) {
		return fmt.Sprint(n, invoke[int](t, r, "Add", n, n)), nil // calls the plugin again
	}, 21)
	if got != "21 42" {
		t.Errorf("the callback returned %q", got)
	}
	// Calls, their streams and callbacks are concurrent.
	callers(t, 20, func(i int) {
		data := noise(100_000+i, uint64(i))
		var back bytes.Buffer
		invoke[int64](t, r, "Copy", bytes.NewReader(data), &back, int64(1<<40))
		if !bytes.Equal(back.Bytes(), data) {
			t.Errorf("caller %d got other bytes", i)
		}
		got := invoke[string](t, r, "Call", func(_ context.Context, n int) (string, error) { return fmt.Sprint(n), nil }, i)
		if got != fmt.Sprint(i) {
			t.Errorf("caller %d got the callback of %s", i, got)
		}
	})
}

// Functions take functions and streams, and return streams.
func TestNestedFunctions(t *testing.T) {
	t.Parallel()
	_, _, r := startKit(t)
	var written, read syncBuffer
	closed := make(chan struct{})
	got := invoke[string](t, r, "Nest", Nested(func(ctx context.Context, in io.Reader, back func(string) (io.ReadCloser, error)) (io.WriteCloser, error) {
		_, err := io.Copy(&read, in)
		check(t, err)
		more, err := back(" and back")
		check(t, err)
		_, err = io.Copy(&read, more)
		check(t, err)
		check(t, more.Close())
		context.AfterFunc(ctx, func() { close(closed) })
		return closing{nil, &written, func() error { return nil }}, nil
	}))
	if got != "nested" || read.String() != "from the plugin and back" || written.String() != "the end" {
		t.Errorf("%q, read %q, written %q", got, read.String(), written.String())
	}
	receive(t, "the end of a callback's context with its stream", closed)
}

// A panic or Goexit in a callback, reader or writer is an error there, and nowhere
// else.
func TestBrokenArguments(t *testing.T) {
	t.Parallel()
	_, _, r := startKit(t)
	for what, broken := range map[string]func(){"panic": func() { panic("boom") }, "exit": runtime.Goexit} {
		use := func([]byte) (int, error) { broken(); return 0, nil }
		_, errCall := Invoke[string](boundedContext(t), r, "Call", func(context.Context, int) (string, error) { broken(); return "", nil }, 1)
		_, errRead := Invoke[int64](boundedContext(t), r, "Copy", readerFunc(use), io.Discard, int64(9))
		_, errWrite := Invoke[int64](boundedContext(t), r, "Copy", strings.NewReader("some"), writerFunc(use), int64(9))
		for _, err := range []error{errCall, errRead, errWrite} {
			if err == nil || errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("%s: %v", what, err)
			}
		}
	}
	invoke[int](t, r, "Add", 1, 2)
}

// All that a method wrote is in the writer; a failure that it has not seen is the
// error of Invoke, and one that it has seen is not.
func TestWriterOfCall(t *testing.T) {
	t.Parallel()
	_, _, r := startKit(t)
	var back syncBuffer
	slow := writerFunc(func(p []byte) (int, error) {
		time.Sleep(time.Millisecond)
		return back.Write(p)
	})
	text := strings.Repeat("x", 1000)
	invoke[struct{}](t, r, "Ignore", slow, text, 100)
	if n := len(back.String()); n != 100_000 {
		t.Errorf("%d bytes arrived", n)
	}
	failing := writerFunc(func(p []byte) (int, error) { return 0, fs.ErrNotExist })
	if _, err := Invoke[struct{}](boundedContext(t), r, "Ignore", failing, "x", 1); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the failure of the last Write: %v", err)
	}
	// So much does not fit, so that a Write of the method returns the error.
	if _, err := Invoke[struct{}](boundedContext(t), r, "Ignore", failing, strings.Repeat("x", 4<<20), 2); err != nil {
		t.Errorf("a failure that the method ignored: %v", err)
	}
}

// A reader is read ahead, but not far.
func TestReadAhead(t *testing.T) {
	t.Parallel()
	_, _, r := startKit(t)
	var read atomic.Int64
	endless := readerFunc(func(p []byte) (int, error) { read.Add(int64(len(p))); return len(p), nil })
	if n := invoke[int64](t, r, "Copy", endless, io.Discard, int64(10)); n != 10 {
		t.Errorf("%d bytes were copied", n)
	}
	n := read.Load()
	if limit := int64(streamWindow + 64<<10); n > limit {
		t.Errorf("%d bytes were read for 10", n)
	}
	invoke[int](t, r, "Add", 1, 2)
	if now := read.Load(); now != n {
		t.Errorf("%d bytes more were read after Invoke returned", now-n)
	}
}

// What a method keeps fails when it has returned.
func TestKeptArguments(t *testing.T) {
	host, k, r := localKit(t)
	defer host.Close()
	var uses atomic.Int64
	use := func([]byte) (int, error) { uses.Add(1); return 0, io.EOF }
	invoke[string](t, r, "Which", readerFunc(use), writerFunc(use), func() error { uses.Add(1); return nil })
	before := uses.Load()
	_, errRead := k.r.Read(make([]byte, 1))
	_, errWrite := k.w.Write([]byte("late"))
	for i, err := range []error{errRead, errWrite, k.f()} {
		if err == nil || err == io.EOF {
			t.Errorf("argument %d that was kept: %v", i, err)
		}
	}
	if n := uses.Load(); n != before {
		t.Errorf("arguments were used %d times after the end", n-before)
	}
}

// Invoke waits for a Write and a callback, and none begins when it has returned.
func TestEndOfCall(t *testing.T) {
	leavesNothing(t)
	_, _, r := startKit(t)
	for _, what := range []string{"Write", "callback"} {
		ctx, cancel := context.WithCancel(context.Background())
		began, release := make(chan struct{}), make(chan struct{})
		var begun, done atomic.Int64
		use := func() {
			if begun.Add(1) == 1 {
				close(began)
			}
			<-release
			done.Add(1)
		}
		returned := async(func() (err error) {
			if what == "Write" {
				w := writerFunc(func(p []byte) (int, error) { use(); return len(p), nil })
				_, err = Invoke[int64](ctx, r, "Copy", bytes.NewReader(noise(1<<20, 1)), w, int64(1<<20))
			} else {
				_, err = Invoke[string](ctx, r, "Call", func(context.Context, int) (string, error) { use(); return "", nil }, 1)
			}
			if done.Load() != 1 {
				t.Errorf("Invoke does not wait for a %s", what)
			}
			return err
		})
		receive(t, "a "+what, began)
		cancel()
		invoke[int](t, r, "Add", 1, 2) // time for it to return too early
		close(release)
		if err := receive(t, "the end of Invoke", returned); !errors.Is(err, context.Canceled) {
			t.Errorf("%s: %v", what, err)
		}
		invoke[int](t, r, "Add", 1, 2) // time for another one to begin
		if n := begun.Load(); n != 1 {
			t.Errorf("%s: %d uses", what, n)
		}
	}
}

// Invoke does not wait for a Read that blocks, whether the method has returned or
// the call is cancelled, and no other begins.
func TestBlockedRead(t *testing.T) {
	leavesNothing(t)
	_, _, r := startKit(t)
	for _, limit := range []int64{0, 9} {
		ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
		defer cancel()
		release := make(chan struct{})
		var reads atomic.Int64
		blocked := readerFunc(func(p []byte) (int, error) { reads.Add(1); <-release; return 0, nil })
		within(t, "Invoke with a Read that blocks", readTimeout, func() {
			if _, err := Invoke[int64](ctx, r, "Copy", blocked, io.Discard, limit); errors.Is(err, context.DeadlineExceeded) != (limit > 0) {
				t.Errorf("copying %d bytes: %v", limit, err)
			}
		})
		close(release)
		invoke[int](t, r, "Add", 1, 2) // time for another one to begin
		if n := reads.Load(); n > 1 {
			t.Errorf("%d Reads began", n)
		}
	}
}

// A callback whose context ends lets Invoke return.
func TestContextOfCallback(t *testing.T) {
	t.Parallel()
	_, _, r := startKit(t)
	ctx, cancel := context.WithCancel(context.Background())
	_, err := Invoke[string](ctx, r, "Call", func(ctx context.Context, _ int) (string, error) {
		cancel()
		<-ctx.Done()
		return "", ctx.Err()
	}, 1)
	if !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}

// ---- Results that are streams ----

func TestResults(t *testing.T) {
	leavesNothing(t)
	_, _, r := startKit(t)
	for _, how := range []string{"good", "bad"} {
		for _, method := range []string{"Open", "Create"} {
			ctx, cancel := context.WithCancel(context.Background())
			var s io.Closer
			var err error
			if method == "Open" {
				s, err = Invoke[io.ReadCloser](ctx, r, method, how)
			} else {
				s, err = Invoke[io.WriteCloser](ctx, r, method, how)
			}
			check(t, err)
			cancel() // does not touch it
			if rd, ok := s.(io.Reader); ok {
				if data, err := io.ReadAll(rd); string(data) != "content" || err != nil {
					t.Errorf("read %q: %v", data, err)
				}
			} else {
				_, err := io.WriteString(s.(io.Writer), how)
				check(t, err)
				invoke[struct{}](t, r, "Await", "written "+how)
			}
			if err := s.Close(); errors.Is(err, fs.ErrExist) != (how == "bad") || (err == nil) != (how == "good") {
				t.Errorf("closing what %s returned, %s: %v", method, how, err)
			}
			invoke[struct{}](t, r, "Await", "closed "+how)
			invoke[struct{}](t, r, "Await", "context of "+how)
		}
	}
	// One that nobody reads to its end.
	s := invoke[io.ReadCloser](t, r, "Open", "endless")
	_, err := io.ReadFull(s, make([]byte, 1<<20))
	check(t, err)
	within(t, "closing early", 0, func() { check(t, s.Close()) })
	invoke[struct{}](t, r, "Await", "closed endless")
	if _, err := s.Read(make([]byte, 1)); !errors.Is(err, io.ErrClosedPipe) {
		t.Errorf("Read after Close: %v", err)
	}
	// One with an error.
	if s, err := Invoke[io.ReadCloser](boundedContext(t), r, "Open", "failing"); s != nil || !errors.Is(err, fs.ErrPermission) {
		t.Errorf("a stream with an error: %v, %v", s, err)
	}
	invoke[struct{}](t, r, "Await", "closed failing")
	invoke[struct{}](t, r, "Await", "context of failing")
}

// A stream that is not taken is closed, and so is one whose connection ends.
func TestForgottenResults(t *testing.T) {
	t.Parallel()
	host, k, r := localKit(t)
	var id uint32
	check(t, Call(boundedContext(t), r.client, "Plugin.Open", "forgotten", &id))
	s := invoke[io.WriteCloser](t, r, "Create", "cut")
	check(t, k.Await(boundedContext(t), "closed forgotten"))
	check(t, k.Await(boundedContext(t), "context of forgotten"))
	if len(k.event("closed cut")) > 0 {
		t.Error("a stream that was taken is closed")
	}
	check(t, host.Close())
	check(t, k.Await(boundedContext(t), "closed cut"))
	check(t, k.Await(boundedContext(t), "context of cut"))
	if err := s.Close(); err == nil {
		t.Error("closing a stream that was cut is no error")
	}
}

// A stream that is cut does not seem complete.
func TestCutResults(t *testing.T) {
	t.Parallel()
	for _, end := range []string{"Kill", "killed"} {
		c, _, r := startKit(t)
		s := invoke[io.ReadCloser](t, r, "Open", "endless")
		errs := async(func() error { _, err := io.Copy(io.Discard, s); return err })
		if end == "Kill" {
			c.Kill()
		} else {
			_, _ = Invoke[string](boundedContext(t), r, "Fail", "panic")
		}
		err := receive(t, "the end of a stream", errs)
		if err == nil || errors.As(err, new(*ExitError)) != (end == "killed") {
			t.Errorf("%s: %v", end, err)
		}
		_ = s.Close()
	}
}

// ---- The wire ----

// handKit serves methods of Kit as they would be written by hand.
type handKit struct{ broker *MuxBroker }

type (
	addArgs  = struct{ A0, A1 int }
	copyArgs = struct {
		A0, A1 uint32
		A2     int64
	}
	callArgs = struct {
		A0 uint32
		A1 int
	}
)

func (handKit) Add(args addArgs, sum *int) error          { *sum = args.A0 + args.A1; return nil }
func (handKit) Greet(name string, greeting *string) error { *greeting = "Hello, " + name; return nil }
func (handKit) Point(p *Point, reply *Point) error        { *reply = *p; return nil }
func (handKit) Echo(v any, reply *any) error              { *reply = v; return nil }
func (handKit) Close(struct{}, *struct{}) error           { return nil }

// Ignore has the reply of go-plugin's examples.
func (handKit) Ignore(struct{ A0 uint32 }, *any) error { return nil }

// Await has another argument than Kit's.
func (handKit) Await(struct{}, *struct{}) error { return nil }

func (handKit) Which(args struct{ A0, A1, A2 uint32 }, reply *string) error {
	*reply = fmt.Sprint(args.A0 == 0, args.A1 == 0, args.A2 == 0)
	return nil
}

func (k handKit) Copy(args copyArgs, n *int64) error {
	in, err := k.broker.DialReader(args.A0)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := k.broker.DialWriter(args.A1)
	if err != nil {
		return err
	}
	*n, err = io.Copy(out, io.LimitReader(in, args.A2))
	return errors.Join(err, out.Close())
}

func (k handKit) Call(args callArgs, reply *string) error {
	c, err := k.broker.DialRPC(args.A0)
	if err != nil {
		return err
	}
	defer c.Close()
	return c.Call("Plugin.Call", args.A1, reply)
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
		args   []any
		sent   any
		reply  any
	}{
		{"Add", []any{1, 2}, addArgs{1, 2}, 3},
		{"Add", []any{0, 0}, addArgs{}, 0},
		{"Greet", []any{"Gopher"}, "Gopher", "Hello, Gopher"},
		{"Point", []any{&Point{1, 2}}, Point{1, 2}, &Point{1, 2}},
		{"Point", []any{&Point{}}, &Point{}, &Point{}},
		{"Echo", []any{"text"}, &text, &text},
		{"Echo", []any{nil}, &none, &none},
		{"Close", nil, struct{}{}, struct{}{}},
		{"Which", []any{nil, nil, nil}, struct{ A0, A1, A2 uint32 }{}, "true true true"},
	} {
		// net/rpc is the plugin.
		_, c, st := rawPlugin(t)
		var request, response syncBuffer
		server := rpc.NewServer()
		check(t, server.RegisterName("Plugin", handKit{}))
		go server.ServeConn(tapped{st, io.TeeReader(st, &request)}) // ends with the connection
		k, err := kitPlugin(nil).Client(c.broker, c.Client)
		check(t, err)
		r := k.(kitClient).remote
		result := r.shapes[test.method].result.Type
		got, err := r.invoke(boundedContext(t), result, test.method, test.args)
		check(t, err)
		if want := reflect.Indirect(reflect.ValueOf(test.reply)); !reflect.DeepEqual(reflect.Indirect(got).Interface(), want.Interface()) {
			t.Errorf("%s(%v) returns %v", test.method, test.args, got)
		}
		// net/rpc is the host.
		svc, err := kitPlugin(new(kit)).Server(nil)
		check(t, err)
		_, _, st = rawHost(t, svc)
		check(t, rpc.NewClient(tapped{st, io.TeeReader(st, &response)}).Call("Plugin."+test.method, test.sent, reflect.New(result).Interface()))

		for what, pair := range map[string][2]string{
			"request": {request.String(), lastMessage(t, test.sent)},
			"reply":   {response.String(), lastMessage(t, test.reply)},
		} {
			if !strings.HasSuffix(pair[0], pair[1]) {
				t.Errorf("the %s of %s(%v) is %x and not %x", what, test.method, test.args, pair[0], pair[1])
			}
		}
	}
}

// tapped is a connection that is read through another reader.
type tapped struct {
	net.Conn
	from io.Reader
}

func (c tapped) Read(p []byte) (int, error) { return c.from.Read(p) }

// lastMessage returns v as gob writes it, without definitions of types.
func lastMessage(t testing.TB, v any) (last string) {
	t.Helper()
	check(t, gob.NewEncoder(writerFunc(func(p []byte) (int, error) { last = string(p); return len(p), nil })).Encode(v))
	return last
}

// Invoke calls methods that were written by hand, which have no context.
func TestInvokeOfHandWritten(t *testing.T) {
	host, _ := TestPluginRPCConn(t, PluginSet{"kit": handPlugin{kitPlugin(nil)}}, nil)
	r := dispenseKit(t, host)
	data := noise(300_000, 1)
	var back bytes.Buffer
	if n := invoke[int64](t, r, "Copy", bytes.NewReader(data), &back, int64(1<<40)); n != 300_000 || !bytes.Equal(back.Bytes(), data) {
		t.Errorf("%d bytes were copied, %d came back", n, back.Len())
	}
	got := invoke[string](t, r, "Call", func(_ context.Context, n int) (string, error) { return fmt.Sprint(n), nil }, 42)
	if got != "42" {
		t.Errorf("the callback returned %q", got)
	}
	s := invoke[io.ReadCloser](t, r, "Open", "content")
	if data, err := io.ReadAll(s); string(data) != "content" || err != nil {
		t.Errorf("read %q: %v", data, err)
	}
	check(t, s.Close())
	invoke[struct{}](t, r, "Close")
	invoke[struct{}](t, r, "Ignore", nil, "", 0)
	_, err := Invoke[struct{}](boundedContext(t), r, "Await", "text")
	errorSays(t, err, "struct")
	_, err = Invoke[string](boundedContext(t), r, "Fail", "EOF")
	errorSays(t, err, "Fail")
	invoke[int64](t, r, "Copy", bytes.NewReader(data), io.Discard, int64(1))
}

type handPlugin struct{ Plugin }

func (handPlugin) Server(b *MuxBroker) (any, error) { return handKit{b}, nil }

// A client that was written by hand calls methods of an interface.
func TestHandWrittenCalls(t *testing.T) {
	t.Parallel()
	_, _, r := startKit(t)
	call := func(method string, args, reply any) {
		t.Helper()
		check(t, Call(boundedContext(t), r.client, "Plugin."+method, args, reply))
	}
	var sum int
	call("Add", struct{ A0 int }{5}, &sum) // without the last parameter
	if sum != 5 {
		t.Errorf("5 and nothing is %d", sum)
	}
	call("Add", struct{ A2, A1, A0 int }{7, 2, 1}, &sum) // with one more
	if sum != 3 {
		t.Errorf("1 + 2 is %d", sum)
	}
	for _, args := range []any{new(any), struct{}{}, true, "text", []any{nil}, map[string]any{"x": nil}, Point{}} {
		check(t, r.client.Call("Plugin.Close", args, nil))
	}
	var back bytes.Buffer
	in, stopReader := r.broker.ServeReader(strings.NewReader("content"))
	defer stopReader()
	out, stopWriter := r.broker.ServeWriter(&back)
	defer stopWriter()
	var n int64
	call("Copy", copyArgs{in, out, 5}, &n)
	if n != 5 || back.String() != "conte" {
		t.Errorf("%d bytes were copied: %q", n, back.String())
	}
	f, stop := r.broker.ServeRPC(handCallback{})
	defer stop()
	var reply string
	call("Call", callArgs{f, 42}, &reply)
	if reply != "called with 42" {
		t.Errorf("the callback returned %q", reply)
	}
	var id uint32
	call("Open", "good", &id)
	s, err := r.broker.DialReader(id)
	check(t, err)
	if data, err := io.ReadAll(s); string(data) != "content" || err != nil {
		t.Errorf("read %q: %v", data, err)
	}
	check(t, s.Close())
	call("Await", "closed good", nil)
	call("Open", "nil", &id)
	if id != 0 {
		t.Errorf("the number of nil is %d", id)
	}
	// Numbers that are not served.
	for _, args := range []copyArgs{{7, 7, 1}, {out, in, 1}} {
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		if err := Call(ctx, r.client, "Plugin.Copy", args, &n); err == nil {
			t.Errorf("copying %v is no error", args)
		}
	}
	invoke[int](t, r, "Add", 1, 2)
}

type handCallback struct{}

func (handCallback) Call(n int, reply *string) error {
	*reply = fmt.Sprint("called with ", n)
	return nil
}
