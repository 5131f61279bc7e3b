package plugin_test

import (
	"context"
	"encoding/gob"
	"errors"
	"fmt"
	"net/rpc"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/yamux"
	"github.com/muxplug/plugin"
)

func init() {
	// Answers the first control request with the header of an error, and no more.
	modes["half"] = func() {
		conn := must(announce(nil).Accept())
		control := must(must(yamux.Server(conn, nil)).Accept())
		var request rpc.Request
		_ = gob.NewDecoder(control).Decode(&request)
		_ = gob.NewEncoder(control).Encode(rpc.Response{Seq: request.Seq, Error: "test: half an error"})
		time.Sleep(forever)
	}
}

// Call ends with its context, whatever part of the answer the peer has sent.
func TestCallEndsBetweenHeaderAndBody(t *testing.T) {
	for name, header := range map[string]rpc.Response{
		"reply": {},
		"error": {Error: "test: an error without a body"},
	} {
		t.Run(name, func(t *testing.T) {
			raw, client, stream := rawPlugin(t)
			ctx, cancel := context.WithCancel(context.Background())
			defer cancel()
			call := async(func() error { return callIn(ctx, client.Client, "Echo") })
			var request rpc.Request
			check(t, gob.NewDecoder(stream).Decode(&request))
			header.Seq = request.Seq
			check(t, gob.NewEncoder(stream).Encode(header))
			_, err := raw.Ping() // the header has arrived
			check(t, err)
			cancel()
			errorIs(t, "Call", receive(t, "the end of Call", call), context.Canceled)
		})
	}
}

// Ping, Close and Kill end although the plugin answers Ping with half an error.
func TestControlEndsBetweenHeaderAndBody(t *testing.T) {
	t.Parallel()
	c, p := startPlugin(t, testConfig("half"))
	within(t, "Ping", pingTimeout, func() {
		errorIs(t, "Ping", p.Ping(), context.DeadlineExceeded)
	})
	within(t, "Close", quitTimeout, func() {
		if p.Close() == nil {
			t.Error("Close returned no error")
		}
	})
	within(t, "Kill", hangs, c.Kill)
}

// ---- Ends of contexts ----

var errCause = errors.New("test: the cause")

// A call returns when its context ends, with the cause, and its reply is not written
// later.
func TestCallEndsWithContext(t *testing.T) {
	for _, wire := range wires {
		for _, want := range []error{context.Canceled, context.DeadlineExceeded} {
			for _, cause := range []error{nil, errCause} {
				t.Run(fmt.Sprint(wire.name, " ", want, " ", cause), func(t *testing.T) {
					t.Parallel()
					s := newTestServer()
					testCallEndsWithContext(t, wire.connect(t, s), s, want, cause)
				})
			}
		}
	}
}

func testCallEndsWithContext(t *testing.T, c *rpc.Client, s *testServer, want, cause error) {
	ctx, cancel := context.WithCancelCause(context.Background())
	defer cancel(nil)
	if want == context.DeadlineExceeded {
		var stop context.CancelFunc
		ctx, stop = context.WithTimeoutCause(ctx, 20*time.Millisecond, cause)
		defer stop()
	}
	reply := "before"
	done := async(func() error { return plugin.Call(ctx, c, "Plugin.Block", "late", &reply) })
	if want == context.Canceled {
		receive(t, "the call", s.started)
		cancel(cause)
	}
	err := receive(t, "the end of Call", done)
	errorIs(t, "Call", err, want)
	errorIs(t, "Call", err, context.Cause(ctx))
	if errors.Is(err, context.Canceled) && errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Call returned %v", err)
	}
	close(s.release)
	for range 20 {
		reply = "in use again" // the race detector watches
		echo(t, c)
	}
	checkEqual(t, "the reply, which is in use again", reply, "in use again")
	calls := len(s.started)
	again := plugin.Call(ctx, c, "Plugin.Block", "", &reply)
	if again == nil || again.Error() != err.Error() {
		t.Errorf("a call with an ended context returned %v", again)
	}
	echo(t, c)
	if len(s.started) > calls {
		t.Error("a call with an ended context was sent")
	}
}

// A reply that cannot be written fails its call before anything is sent.
func TestCallReply(t *testing.T) {
	for _, wire := range wires {
		s := newTestServer()
		c := wire.connect(t, s)
		for _, reply := range []any{"", Box{}, (*string)(nil)} {
			err := plugin.Call(boundedContext(t), c, "Plugin.Block", "", reply)
			errorSays(t, err, "Plugin.Block", fmt.Sprintf("%T", reply))
		}
		check(t, plugin.Call(boundedContext(t), c, "Plugin.Echo", "text", nil))
		echo(t, c)
		if len(s.started) > 0 {
			t.Errorf("%s: a call was sent", wire.name)
		}
	}
}

// A nil client is an error of the call, and no panic in a goroutine.
func TestNilClient(t *testing.T) {
	errorSays(t, plugin.Call(boundedContext(t), nil, "Plugin.Echo", "", new(string)), "Plugin.Echo", "nil")
}

// Call ends with its context although the peer takes nothing. While too much
// waits to be written, no argument is encoded.
func TestCallToStuckPeer(t *testing.T) {
	_, test, st := rawPlugin(t)
	large := string(noise(2*maxUnsent, 0))
	test.Go("Plugin.Echo", large, new(string), nil)
	_, err := st.Read(make([]byte, 1)) // it is being written, and never will be
	check(t, err)
	test.Go("Plugin.Echo", large, new(string), nil)
	ctx, cancel := context.WithTimeout(context.Background(), 100*time.Millisecond)
	defer cancel()
	before := padding.Load()
	concurrently(t, 10, func(int) {
		err := plugin.Call(ctx, test.Client, "Plugin.Box", Padded{}, new(Box))
		errorIs(t, "Call", err, context.DeadlineExceeded)
	})
	if padding.Load() != before {
		t.Error("an argument was encoded")
	}
}

// Call with a client of net/rpc, whose Go waits for the peer, ends with its context.
func TestStockCallToStuckPeer(t *testing.T) {
	conn, _ := plugin.TestConn(t)
	stock := rpc.NewClient(conn)
	defer stock.Close()
	large := string(noise(40<<20, 0)) // more than the system takes
	ctx, cancel := context.WithTimeout(context.Background(), 100*time.Millisecond)
	defer cancel()
	within(t, "Call", hangs, func() {
		err := plugin.Call(ctx, stock, "Plugin.Echo", large, new(string))
		errorIs(t, "Call", err, context.DeadlineExceeded)
	})
}

// A client that has failed takes what its peer still sends, even if it is closed meanwhile:
// a stock server does not end before it has sent its replies.
func TestCloseAfterMisfit(t *testing.T) {
	t.Parallel()
	_, c, st := rawPlugin(t)
	impl := newTestServer()
	server := rpc.NewServer()
	check(t, server.RegisterName("Plugin", impl))
	serving := async(func() bool {
		server.ServeConn(st)
		return true
	})
	c.Go("Plugin.Block", strings.Repeat("x", 4*streamWindow), new(string), nil) // fails with the client
	receive(t, "the call with a large reply", impl.started)
	errorSays(t, c.Call("Plugin.Echo", "", new(int)), "int")
	check(t, c.Close())
	close(impl.release)
	receive(t, "the end of the server", serving)
}
