package plugin_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"net/rpc"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/muxplug/plugin"
)

// ---- Errors of the caller's own arguments ----

// Use uses its arguments, which fail.
func (k *kit) Use(
	_ context.Context, how string, r io.Reader, w io.Writer, f func(n int) error,
) (err error) {
	switch how {
	case "callback":
		err = f(1)
	case "two callbacks":
		err = errors.Join(f(1), f(2))
	case "reader":
		_, err = io.ReadAll(r)
	case "writer":
		_, err = io.Copy(w, strings.NewReader("text"))
		if err == nil {
			return nil // Invoke returns the error of the writer
		}
	case "kept":
		return k.kept
	}
	k.kept = err
	return fmt.Errorf("using: %w", err)
}

// trouble is an error that is not registered. Two of them are different errors.
type trouble struct{ n int }

func (t *trouble) Error() string { return fmt.Sprint("trouble ", t.n) }

// What a callback, reader or writer of the caller returned is itself in the error of
// Invoke, and in no other call's.
func TestErrorsOfArguments(t *testing.T) {
	t.Parallel()
	_, _, remote := startKit(t)
	var troubles []*trouble
	use := func(how string) error {
		troubles = nil
		fail := func(n int) error {
			err := &trouble{n}
			troubles = append(troubles, err)
			return err
		}
		var r io.Reader
		if how == "reader" { // which is read ahead, whatever the method does
			r = readerFunc(func([]byte) (int, error) { return 0, fail(1) })
		}
		w := writerFunc(func([]byte) (int, error) { return 0, fail(1) })
		return errorOf[struct{}](t, remote, "Use", how, r, w, fail)
	}
	for _, how := range []string{"callback", "two callbacks", "reader", "writer"} {
		err := use(how)
		if len(troubles) == 0 {
			t.Fatalf("%s: nothing has failed: %v", how, err)
		}
		for _, failed := range troubles {
			if !errors.Is(err, failed) {
				t.Errorf("%s: the error is %v, and not %v itself", how, err, failed)
			}
		}
		errorSays(t, err, "trouble 1")
		before := troubles
		if err := use("kept"); err == nil || errors.Is(err, before[0]) {
			t.Errorf("%s: another call returned %v", how, err)
		}
	}
}

// ---- Calls that are not answered ----

// unanswered is a Kit whose calls are not answered.
type unanswered struct {
	remote *plugin.Remote
	hand   *testClient
}

// startGreeter starts a plugin whose binary is named greeter.
func startGreeter(t testing.TB) (*plugin.Client, unanswered) {
	t.Helper()
	cfg := testConfig("plugin")
	cfg.Cmd.Path = copyBinary(t, "greeter")
	c, p := startPlugin(t, cfg)
	return c, unanswered{dispenseKit(t, p), dispenseKitByHand(t, p)}
}

// check checks the errors of Call and Invoke with a context.
func (k unanswered) check(ctx context.Context, t testing.TB, text string, is ...error) {
	t.Helper()
	_, invoked := plugin.Invoke[struct{}](ctx, k.remote, "Await", "nothing")
	called := plugin.Call(ctx, k.hand.Client, "Plugin.Await", "nothing", nil)
	for _, err := range []error{invoked, called} {
		if err == nil {
			t.Fatal("a call that is not answered returned no error")
		}
		checkEqual(t, "the text", err.Error(), text)
		for _, want := range is {
			errorIs(t, "a call", err, want)
		}
	}
}

// The error of a call that was not answered names the plugin and the method, once each.
// Later calls say why the connection has ended.
func TestUnanswered(t *testing.T) {
	t.Parallel()
	c, kit := startGreeter(t)
	ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
	defer cancel()
	for range 2 { // the second begins when the context has ended
		kit.check(ctx, t, "plugin greeter: Await: context deadline exceeded", context.DeadlineExceeded)
	}
	canceled, cancelCause := context.WithCancelCause(context.Background())
	cancelCause(errCause)
	kit.check(canceled, t, "plugin greeter: Await: context canceled: "+errCause.Error(),
		context.Canceled, errCause)

	const crash = "plugin greeter: Fail: panic: boom (exit status 2)"
	inFlight := errorOf[string](t, kit.remote, "Fail", "panic")
	checkEqual(t, "the call in flight", inFlight.Error(), crash)
	errorIs(t, "the call in flight", inFlight, io.ErrUnexpectedEOF)
	receive(t, "Done", c.Done())
	for range 3 {
		later := errorOf[string](t, kit.remote, "Fail", "again")
		checkEqual(t, "a later call", later.Error(), crash)
		errorIs(t, "a later call", later, rpc.ErrShutdown)
		errorIs(t, "a later call", later, c.Err())
		kit.check(canceled, t, "plugin greeter: Await: context canceled: "+errCause.Error(), errCause)
	}
	await(t, "the error of net/rpc", func() bool {
		return kit.hand.Call("Plugin.Add", 1, nil) == rpc.ErrShutdown
	})
}

// A reattached plugin, whose path is not known, has its address in errors, once as well.
func TestUnansweredByReattached(t *testing.T) {
	t.Parallel()
	first, _ := startPlugin(t, detached(testConfig("plugin")))
	byPid := first.ReattachConfig()
	byFunc := *byPid
	runner := newTestRunner(t, false)
	byFunc.ReattachFunc = runner.config(nil).ReattachFunc
	var kits []*plugin.Remote
	for _, rc := range []*plugin.ReattachConfig{byPid, &byFunc} {
		_, p := startPlugin(t, attachTo(rc))
		kits = append(kits, dispenseKit(t, p))
	}
	process, err := os.FindProcess(byPid.Pid)
	check(t, err)
	check(t, process.Kill())
	runner.ended <- errCause
	for i, reason := range []string{"the process exited unexpectedly", errCause.Error()} {
		err := errorOf[string](t, kits[i], "Fail", "nil")
		checkEqual(t, "the error", err.Error(), fmt.Sprintf("plugin at %v: Fail: %s", byPid.Addr, reason))
		var exit *plugin.ExitError
		if errors.As(err, &exit) {
			checkEqual(t, "Path", exit.Path, fmt.Sprint("at ", byPid.Addr))
		} else {
			t.Error("there is no ExitError")
		}
	}
}

// After Kill, and after Close of the client, calls fail with rpc.ErrShutdown.
func TestUnansweredAfterKill(t *testing.T) {
	t.Parallel()
	c, kit := startGreeter(t)
	invoke[int](t, kit.remote, "Add", 1, 2) // so the stream is not being dialled any more
	waiting := async(func() error { return errorOf[struct{}](t, kit.remote, "Await", "nothing") })
	c.Kill()
	const killed = "plugin greeter: Await: Kill or Close ended the connection: connection is shut down"
	inFlight := receive(t, "the call in flight", waiting)
	checkEqual(t, "the call in flight", inFlight.Error(), killed)
	errorIs(t, "the call in flight", inFlight, rpc.ErrShutdown)
	kit.check(context.Background(), t, killed, rpc.ErrShutdown)

	_, kit = startGreeter(t)
	invoke[int](t, kit.remote, "Add", 1, 2)
	check(t, errors.Join(kit.remote.Close(), kit.hand.Close()))
	kit.check(context.Background(), t, "plugin greeter: Await: connection is shut down", rpc.ErrShutdown)
}

// A call says that the connection was lost if the process lives.
func TestUnansweredByLivingProcess(t *testing.T) {
	hostEnd, pluginEnd := plugin.TestConn(t)
	_, client, _ := joinEnds(t, hostEnd, pluginEnd)
	echo(t, client.Client)
	check(t, pluginEnd.Close())
	var err error
	for !errors.Is(err, rpc.ErrShutdown) { // until a call begins when the end is known
		err = plugin.Call(boundedContext(t), client.Client, "Plugin.Echo", "", new(string))
		errorSays(t, err, "plugin: Echo: the connection was lost")
	}
}

// While Kill runs, and afterwards, the errors of calls and streams are rpc.ErrShutdown, and
// name the plugin.
func TestErrorsWhileKilling(t *testing.T) {
	t.Parallel()
	for name, use := range map[string]func(t *testing.T, r *plugin.Remote, begun func()) error{
		"reader": func(t *testing.T, r *plugin.Remote, begun func()) error {
			in := invoke[io.ReadCloser](t, r, "Open", "endless")
			defer in.Close()
			for {
				_, err := in.Read(make([]byte, 100))
				if err != nil {
					return err
				}
				begun()
			}
		},
		"writer": func(t *testing.T, r *plugin.Remote, begun func()) error {
			out := invoke[io.WriteCloser](t, r, "Create", "written")
			defer out.Close()
			for {
				_, err := out.Write(make([]byte, 100))
				if err != nil {
					return err
				}
				begun()
			}
		},
		"arguments": func(t *testing.T, r *plugin.Remote, begun func()) error {
			in := readerFunc(func(p []byte) (int, error) { return len(p), nil })
			out := writerFunc(func(p []byte) (int, error) { begun(); return len(p), nil })
			_, err := plugin.Invoke[int64](context.Background(), r, "Copy", in, out, int64(1<<60))
			return err
		},
		"callback": func(t *testing.T, r *plugin.Remote, begun func()) error {
			wait := func(ctx context.Context, n int) (string, error) {
				begun()
				<-ctx.Done()
				return "", ctx.Err()
			}
			_, err := plugin.Invoke[string](context.Background(), r, "Call", wait, 1)
			return err
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			for range 5 {
				c, kit := startGreeter(t)
				begun := make(chan bool, 1)
				begin := sync.OnceFunc(func() { begun <- true })
				ended := async(func() error { return use(t, kit.remote, begin) })
				receive(t, "the use", begun)
				c.Kill()
				err := receive(t, "the end of the use", ended)
				errorIs(t, "the use", err, rpc.ErrShutdown)
				if !strings.HasPrefix(fmt.Sprint(err), "plugin greeter: ") {
					t.Errorf("the error does not name the plugin: %v", err)
				}
			}
		})
	}
}

// ---- The identity of errors ----

// failing returns errors by name.
type failing map[string]error

func (f failing) Fail(name string, _ *string) error { return f[name] }

// Errors keep their text, and between two sides with this package what they are.
func TestErrorIdentity(t *testing.T) {
	unknown, all := errors.New("test: unknown"), failing{}
	for name, err := range testErrors {
		all[name] = err
		all[name+" wrapped"] = fmt.Errorf("failing: %w", err)
		all[name+" joined"] = errors.Join(unknown, err, io.EOF)
		all[name+" with a path"] = &fs.PathError{Op: "open", Path: "x", Err: err}
	}
	all["unknown"] = unknown
	compare := func(t *testing.T, c *rpc.Client, identity bool) {
		t.Helper()
		for name, sent := range all {
			err := plugin.Call(boundedContext(t), c, "Plugin.Fail", name, new(string))
			var remote rpc.ServerError
			if !errors.As(err, &remote) || string(remote) != sent.Error() || err.Error() != sent.Error() {
				t.Errorf("%v arrived as %T: %v", sent, err, err)
			}
			for _, known := range testErrors {
				if got, want := errors.Is(err, known), errors.Is(sent, known); got != (want && identity) {
					t.Errorf("%s: errors.Is(%v) is %v", name, known, got)
				}
			}
			if errors.Is(err, unknown) {
				t.Errorf("%s: is an error that is not registered", name)
			}
		}
	}
	for _, wire := range wires {
		compare(t, wire.connect(t, all), wire.host && wire.plugin)
	}
	bothWays(t, func(t *testing.T, here, there *plugin.MuxBroker) {
		compare(t, dialled(t, here, there, all), true)
	})
}

// Of two errors with one text the first that is registered stays.
func TestRegisterError(t *testing.T) {
	text := fmt.Sprint("test: ", rand.Int())
	first, second := errors.New(text), errors.New(text)
	plugin.RegisterError(first, second)
	plugin.RegisterError(second)
	c := connectOurs(t, failing{"first": fmt.Errorf("failing: %w", first), "second": second})
	for name, want := range map[string]bool{"first": true, "second": false} {
		err := plugin.Call(boundedContext(t), c, "Plugin.Fail", name, new(string))
		isFirst, isSecond := errors.Is(err, first), errors.Is(err, second)
		if isFirst != want || isSecond {
			t.Errorf("the %s error is the first: %v, and the second: %v", name, isFirst, isSecond)
		}
	}
}

// Registering a nil error panics.
func TestRegisterNil(t *testing.T) {
	if panics(func() { plugin.RegisterError(nil) }) == nil {
		t.Error("a nil error does not panic")
	}
}

// nilError panics when it is asked for its text.
type nilError struct{ text string }

func (e *nilError) Error() string { return e.text }

// oddIs panics when it is asked what it is.
type oddIs struct{}

func (oddIs) Error() string { return "odd" }
func (oddIs) Is(error) bool { panic("odd Is") }

// An error with odd methods, or without a text, is still an error.
func TestOddErrors(t *testing.T) {
	odd := failing{"nil": (*nilError)(nil), "empty": errors.New(""), "panics": oddIs{}}
	c := connectOurs(t, odd)
	for name := range odd {
		err := plugin.Call(boundedContext(t), c, "Plugin.Fail", name, new(string))
		var remote rpc.ServerError
		if !errors.As(err, &remote) || remote == "" {
			t.Errorf("%s: %T: %v", name, err, err)
		}
	}
}
