package plugin

import (
	"context"
	"errors"
	"io"
	"net/rpc"
	"runtime"
	"testing"
	"time"
)

// errLoss is why the connection of a brokenConn was lost.
var errLoss = errors.New("test: the reason for the loss")

// brokenConn is a connection whose loss is found by writing first. Reading
// learns the reason when known is closed.
type brokenConn struct {
	written chan struct{} // gets something when a Write has failed
	known   chan struct{}
}

func (c *brokenConn) Write([]byte) (int, error) {
	c.written <- struct{}{}
	return 0, io.ErrClosedPipe
}

func (c *brokenConn) Read([]byte) (int, error) {
	<-c.known
	return 0, errLoss
}

func (c *brokenConn) Close() error { return nil }

// spawn is for clients without a session.
func spawn(f func()) bool {
	go f()
	return true
}

// Until the reason for the loss of a connection is known, calls wait for it,
// including those that begin after the loss.
func TestCallsWaitForReason(t *testing.T) {
	conn := &brokenConn{written: make(chan struct{}, 100), known: make(chan struct{})}
	c := newCallClient(conn, anyPeer, spawn)
	defer c.Close()
	calls := []*rpc.Call{c.Go("Plugin.Echo", "", new(string), nil)}
	receive(t, "a Write", conn.written)
	for range 20 {
		calls = append(calls, c.Go("Plugin.Echo", "", new(string), nil))
	}
	ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
	defer cancel()
	if err := Call(ctx, c, "Plugin.Echo", "", new(string)); !errors.Is(err, context.DeadlineExceeded) {
		t.Error(err)
	}
	for i, call := range calls {
		if len(call.Done) > 0 {
			t.Errorf("call %d does not wait: %v", i, call.Error)
		}
	}
	close(conn.known)
	for i, call := range calls {
		receive(t, "a call", call.Done)
		if !errors.Is(call.Error, errLoss) {
			t.Errorf("call %d returned %v", i, call.Error)
		}
	}
	var err error
	for err != rpc.ErrShutdown {
		err = c.Call("Plugin.Echo", "", new(string))
		if err != rpc.ErrShutdown && !errors.Is(err, errLoss) {
			t.Fatalf("a later call returned %v", err)
		}
	}
}

// A client that has ended is kept only as long as the caller keeps it.
func TestClientsAreCollected(t *testing.T) {
	kept := func() (n int) {
		clients.Range(func(any, any) bool { n++; return true })
		return n
	}
	conn := &brokenConn{written: make(chan struct{}, 1000), known: make(chan struct{})}
	close(conn.known)
	ended := make([]*rpc.Client, 1000)
	for i := range ended {
		ended[i] = newCallClient(conn, anyPeer, spawn)
	}
	for _, c := range ended {
		if err := Call(context.Background(), c, "Plugin.Echo", "", new(string)); !errors.Is(err, errLoss) {
			t.Fatal(err)
		}
	}
	if n := kept(); n < len(ended) {
		t.Fatalf("of %d clients, %d are kept", len(ended), n)
	}
	ended = nil
	deadline := time.Now().Add(hangs)
	for kept() > 100 { // some are of other tests that run now
		if time.Now().After(deadline) {
			t.Fatalf("%d clients are kept", kept())
		}
		runtime.GC()
	}
}
