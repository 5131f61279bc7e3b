package plugin_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net/rpc"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/muxplug/plugin"
)

// callbackTimeout is how long Invoke waits for Writes and callbacks when its context or
// connection has ended.
const callbackTimeout = time.Second

// A Write and a callback that block do not hold Invoke when its context has ended, or
// the plugin has been killed or has crashed, and none begins afterwards.
func TestBlockedUses(t *testing.T) {
	for _, end := range []string{"cancel", "Kill", "crash"} {
		t.Run(end, func(t *testing.T) {
			t.Parallel()
			c, _, r := startKit(t)
			ctx, cancel := context.WithCancel(context.Background())
			defer cancel()
			u := newUses()
			errs := make(chan error, 2)
			go func() {
				data := noise(1<<20, 1)
				_, err := plugin.Invoke[int64](ctx, r, "Copy", bytes.NewReader(data), u, int64(len(data)))
				errs <- err
			}()
			go func() {
				_, err := plugin.Invoke[string](ctx, r, "Call", u.callback, 1)
				errs <- err
			}()
			receive(t, "a Write or callback", u.began)
			receive(t, "the other", u.began)
			isRight := func(err error) bool { return errors.As(err, new(*plugin.ExitError)) }
			switch end {
			case "cancel":
				cancel()
				isRight = func(err error) bool { return errors.Is(err, context.Canceled) }
			case "Kill":
				go c.Kill() // is waited for when the test ends
				isRight = func(err error) bool { return err != nil }
			case "crash":
				_ = errorOf[string](t, r, "Fail", "panic")
			}
			within(t, "Invoke after its end", callbackTimeout, func() {
				for range 2 {
					if err := <-errs; !isRight(err) {
						t.Errorf("the error is %v", err)
					}
				}
			})
			close(u.release)
			if end == "cancel" {
				invoke[int](t, r, "Add", 1, 2) // time for another one to begin
			}
			checkEqual(t, "Writes and callbacks too many", len(u.began), 0)
		})
	}
}

// Start returns when untilThen does, and before background.
func (*kit) Start(background, untilThen func() error) error {
	go background() // ends when the host lets it
	return untilThen()
}

// While its context and the connection live, Invoke waits for a callback that is
// running, however long, even when the method has returned.
func TestUsesAfterReturn(t *testing.T) {
	t.Parallel()
	_, _, r := startKit(t)
	began, release := make(chan struct{}), make(chan struct{})
	var ended atomic.Bool
	returned := async(func() error {
		background := func() error {
			close(began)
			<-release
			ended.Store(true)
			return nil
		}
		untilThen := func() error {
			<-began
			return nil
		}
		return errorOf[struct{}](t, r, "Start", background, untilThen)
	})
	receive(t, "the callback", began)
	select {
	case <-returned:
		t.Error("Invoke did not wait for the callback")
	case <-time.After(callbackTimeout + 200*time.Millisecond):
	}
	close(release)
	check(t, receive(t, "the end of Invoke", returned))
	checkEqual(t, "ended", ended.Load(), true)
}

// A nil pointer in an io.Reader or io.Writer is an error that says which argument it is.
func TestNilInInterface(t *testing.T) {
	t.Parallel()
	_, _, r := startKit(t)
	var buffer *bytes.Buffer
	var read readerFunc
	for _, test := range []struct {
		in   io.Reader
		out  io.Writer
		want []string
	}{
		{buffer, io.Discard, []string{"argument 1", "Copy", "io.Reader", "nil *bytes.Buffer"}},
		{read, io.Discard, []string{"argument 1", "readerFunc"}},
		{strings.NewReader(""), buffer, []string{"argument 2", "io.Writer", "nil *bytes.Buffer"}},
	} {
		err := errorOf[int64](t, r, "Copy", test.in, test.out, int64(1))
		errorSays(t, err, test.want...)
		if errors.As(err, new(rpc.ServerError)) {
			t.Errorf("it was sent: %v", err)
		}
	}
}

// Taker has a method that takes a reader.
type Taker interface {
	Take(ctx context.Context, r io.Reader) error
}

// taker implements Taker, and reports its call and the error of its Read.
type taker struct {
	called chan bool
	read   chan error
}

func (k taker) Take(_ context.Context, r io.Reader) error {
	k.called <- true
	_, err := r.Read(make([]byte, 1))
	k.read <- err
	return err
}

// The end of a call ends a Read of an argument, even if the caller serves the reader on.
func TestCancelEndsRead(t *testing.T) {
	t.Parallel()
	k := taker{called: make(chan bool, 1), read: make(chan error, 1)}
	client := func(*plugin.Remote) Taker { return nil } // it is called by hand
	set := plugin.PluginSet{"taker": calledByHand{plugin.For[Taker](k, client)}}
	host, _ := plugin.TestPluginRPCConn(t, set, nil)
	c, err := plugin.Dispense[*testClient](host, "taker")
	check(t, err)
	release := make(chan bool)
	id, stop := c.broker.ServeReader(readerFunc(func([]byte) (int, error) {
		<-release
		return 0, io.EOF
	}))
	defer stop()
	defer close(release)
	ctx, cancel := context.WithCancel(context.Background())
	called := async(func() error { return plugin.Call(ctx, c.Client, "Plugin.Take", id, nil) })
	receive(t, "the method", k.called)
	cancel()
	errorIs(t, "the call", receive(t, "the call", called), context.Canceled)
	if err := receive(t, "the end of Read", k.read); err == nil || err == io.EOF {
		t.Errorf("Read returned %v", err)
	}
}

// ---- Instances that are released ----

// Close fails the calls in flight and later ones. Streams that were results go on.
func TestRemoteClose(t *testing.T) {
	leavesNothing(t)
	_, p, r := startKit(t)
	other := dispenseKit(t, p)
	in := invoke[io.ReadCloser](t, r, "Open", "good")
	calls := make(chan error, 2)
	for range cap(calls) {
		go func() {
			_, err := plugin.Invoke[struct{}](context.Background(), r, "Await", "never")
			calls <- err
		}()
	}
	invoke[string](t, r, "Call", func(context.Context, int) (string, error) { return "", nil }, 1)
	concurrently(t, 5, func(int) { errorIs(t, "Close", r.Close(), nil) })
	for range cap(calls) {
		errorIs(t, "a call in flight", receive(t, "a call in flight", calls), rpc.ErrShutdown)
	}
	errorIs(t, "a later call", errorOf[int](t, r, "Add", 1, 2), rpc.ErrShutdown)
	check(t, r.Close())
	data, err := io.ReadAll(in)
	check(t, err)
	checkEqual(t, "a stream that was a result", string(data), "content")
	check(t, in.Close())
	checkEqual(t, "another instance", invoke[int](t, other, "Add", 1, 2), 3)
	check(t, (*plugin.Remote)(nil).Close())
	check(t, new(plugin.Remote).Close())
}

// The plugin's side is released with the host's: nothing is left of 2,000 instances.
func TestManyInstances(t *testing.T) {
	leavesNothing(t)
	_, p, first := startKit(t)
	here, there := runtime.NumGoroutine(), invoke[int](t, first, "Goroutines")
	concurrently(t, 10, func(int) {
		for range 200 {
			r := dispenseKit(t, p)
			_, err := plugin.Invoke[int](context.Background(), r, "Goroutines")
			errorIs(t, "Invoke and Close", errors.Join(err, r.Close()), nil)
		}
	})
	await(t, "the host to release them", func() bool { return runtime.NumGoroutine() <= here })
	await(t, "the plugin to release them", func() bool {
		return invoke[int](t, first, "Goroutines") <= there
	})
}
