package plugin

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/rpc"
	"reflect"
	"runtime"
	"sync"
	"sync/atomic"
	"time"
	"weak"
)

// This file is the client's half of calls: Call, and the codec of the rpc.Clients of this
// package.

// Call calls a method through c, like c.Call, and returns early if ctx ends, whatever the
// peer has sent so far. Then it does not change reply, and errors.Is finds ctx.Err() and
// context.Cause(ctx) in its error. If reply is nil, the reply is dropped.
//
// If both sides use this library and the method takes a context, that context ends with
// ctx. It has neither the deadline nor the values of ctx. Its Err is context.Canceled, and
// its Cause wraps context.DeadlineExceeded if ctx has reached its deadline. Other methods
// run to their end.
//
// errors.As finds an [rpc.ServerError] in an error that the method returned. If both sides
// use this library, errors.Is finds io.EOF, io.ErrUnexpectedEOF, fs.ErrNotExist,
// fs.ErrExist, fs.ErrPermission, fs.ErrInvalid, fs.ErrClosed, os.ErrDeadlineExceeded,
// context.Canceled, context.DeadlineExceeded, and the errors given to [RegisterError] on
// both sides, if the method returned them.
//
// If the peer exits during the call, errors.Is finds io.ErrUnexpectedEOF in the error and,
// in the host, errors.As finds an [*ExitError]. A later call fails with the reason for which
// the connection has ended, and errors.Is finds [rpc.ErrShutdown] in its error. Errors of
// calls that were not answered name the plugin and the method, as in "plugin greeter:
// Greet: context deadline exceeded".
//
// Arguments and replies are copies. Each is encoded as a whole before it is sent, and both
// processes need several times its size in memory: send large data through a reader or
// writer. A value that holds itself, is nested more than 100,000 levels deep, or is larger
// than gob's limit of 8 GiB (1 GiB on 32-bit systems) is an error of its call. There is no
// limit on concurrent calls, and on cancelled ones whose methods still run.
//
// Errors and cancelling work as described if c is the client that [Plugin].Client gets or
// that [MuxBroker.DialRPC] returns. With another rpc.Client, args must not be changed until
// the method has returned, even if ctx ends first.
func Call(ctx context.Context, c *rpc.Client, serviceMethod string, args, reply any) error {
	if c == nil {
		return fmt.Errorf("plugin: %s cannot be called: the client is nil", serviceMethod)
	}
	v := reflect.ValueOf(reply)
	if reply != nil && (v.Kind() != reflect.Pointer || v.IsNil()) {
		return fmt.Errorf("plugin: %s cannot be called: its reply cannot be written into a %T, "+
			"which must be a pointer that is not nil", serviceMethod, reply)
	}
	call := &pendingCall{method: serviceMethod, args: args, reply: reply}
	return call.do(ctx, c)
}

// pendingCall is a call by Call.
type pendingCall struct {
	method     string
	args       any         // nil when they have been encoded
	callErrors *callErrors // those of args; may be nil
	reply      any
	decodeInto any    // reply, or what is copied to it if the context has not ended
	seq        uint64 // its number on the stream
	err        error  // if not nil, the error of Call, for which net/rpc has no place
	names      string // response.Is
	peer       string // as in session.peer
}

// do makes the call through c and returns its error.
func (call *pendingCall) do(ctx context.Context, c *rpc.Client) error {
	call.decodeInto = call.reply
	if ctx.Done() != nil && call.reply != nil {
		// If ctx ends, reply must not be changed later.
		call.decodeInto = reflect.New(reflect.TypeOf(call.reply).Elem()).Interface()
	}
	call.peer = anyPeer
	known, _ := clients.Load(weak.Make(c))
	state, isOurs := known.(*clientState)
	if isOurs {
		call.peer = state.peer
	}
	if ctx.Err() != nil {
		return call.unanswered(contextError(ctx))
	}
	if !isOurs {
		return call.doStock(ctx, c)
	}
	codec := state.codec.Load()
	if codec == nil {
		return call.unanswered(state.why)
	}
	return call.doOurs(ctx, c, codec)
}

// doOurs makes the call through a client with a codec of this package.
func (call *pendingCall) doOurs(ctx context.Context, c *rpc.Client, codec *clientCodec) error {
	if err := codec.w.waitRoom(ctx); err != nil {
		return call.unanswered(err)
	}
	done := make(chan *rpc.Call, 1)
	// net/rpc hands the arguments to WriteRequest and the reply to ReadResponseBody,
	// and looks into neither. So the call itself is passed as both: the codec
	// finds in it what to encode and where to decode, may leave the reply of a call
	// that was cancelled, and can return errors that net/rpc has no place for.
	c.Go(call.method, call, call, done)
	select {
	case answered := <-done:
		return codec.result(call, answered.Error)
	case <-ctx.Done():
	}
	if codec.abandon(ctx, call) {
		return call.unanswered(contextError(ctx))
	}
	answered := <-done // at once
	return codec.result(call, answered.Error)
}

// doStock makes the call through a client that is not of this package.
func (call *pendingCall) doStock(ctx context.Context, c *rpc.Client) error {
	done := make(chan *rpc.Call, 1)
	// The codec may block while it writes the request. This goroutine ends when the
	// request has been written or the connection fails.
	go c.Go(call.method, call.args, call.decodeInto, done)
	select {
	case answered := <-done:
		if answered.Error == nil {
			call.setReply()
		}
		return answered.Error
	case <-ctx.Done():
		return call.unanswered(contextError(ctx))
	}
}

// setReply sets reply to what has been decoded.
func (call *pendingCall) setReply() {
	if call.decodeInto != call.reply {
		reflect.ValueOf(call.reply).Elem().Set(reflect.ValueOf(call.decodeInto).Elem())
	}
}

func (call *pendingCall) unanswered(err error) error {
	return &unanswered{peer: call.peer, method: call.method, err: err}
}

// clients maps each *rpc.Client of this package to its *clientState, until the client is
// collected. The keys are weak pointers.
var clients sync.Map

// clientState is what Call has to know of a client. When the stream has ended, it does not
// refer to the client or the codec, which would keep the client from being collected.
type clientState struct {
	peer  string // as in session.peer
	why   error  // why the stream has ended; set before codec becomes nil
	codec atomic.Pointer[clientCodec]
}

// clientCodec is the rpc.ClientCodec of every client that this package makes.
type clientCodec struct {
	w     *wire
	state *clientState
	spawn func(func()) bool
	head  response // the last header that was read

	mu      sync.Mutex              // guards the fields below
	nextSeq uint64                  // the number of the next request
	calls   map[uint64]*pendingCall // not answered yet, by their numbers
	closed  bool                    // Close has been called
}

// client returns a client for the service at the other end of conn, a stream.
func (s *session) client(conn io.ReadWriteCloser) *rpc.Client {
	return newCallClient(conn, s.peer, s.spawn)
}

// newCallClient returns a client for the service at the other end of conn. Its errors name
// the peer. It starts goroutines with spawn.
func newCallClient(conn io.ReadWriteCloser, peer string, spawn func(func()) bool) *rpc.Client {
	codec := &clientCodec{
		w:     newWire(conn, rpc.Request{}, spawn),
		state: &clientState{peer: peer},
		spawn: spawn,
		calls: make(map[uint64]*pendingCall),
	}
	codec.state.codec.Store(codec)
	client := rpc.NewClientWithCodec(codec)
	key := weak.Make(client)
	clients.Store(key, codec.state)
	runtime.AddCleanup(client, clients.Delete, any(key))
	return client
}

// WriteRequest encodes a request. It does not wait until the request is written, because
// net/rpc holds a lock meanwhile and no context could end the wait.
func (c *clientCodec) WriteRequest(req *rpc.Request, body any) error {
	call, isCall := body.(*pendingCall)
	c.mu.Lock()
	c.nextSeq = req.Seq + 1
	if isCall {
		call.seq = req.Seq
		c.calls[call.seq] = call
		body = call.args
		call.args = nil
	}
	c.mu.Unlock()
	err := c.w.send(req, body)
	if err == nil || err == errWireFailed {
		return nil // the call fails with the reason when reading ends
	}
	err = fmt.Errorf("plugin: %s cannot be called: the argument, of type %T, cannot be sent: %w",
		req.ServiceMethod, body, err)
	if isCall && c.remove(call) {
		call.err = err
	}
	return err
}

// remove removes a call from calls. It returns false if the call was not there.
func (c *clientCodec) remove(call *pendingCall) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.calls[call.seq] != call {
		return false
	}
	delete(c.calls, call.seq)
	return true
}

// abandon cancels a call whose context has ended. It returns false if the answer has
// arrived.
func (c *clientCodec) abandon(ctx context.Context, call *pendingCall) bool {
	if !c.remove(call) {
		return false
	}
	cancel := &rpc.Request{ServiceMethod: cancelMethod, Seq: call.seq | cancelBit}
	isDeadline := errors.Is(ctx.Err(), context.DeadlineExceeded)
	// If this cannot be sent, the connection is lost, which cancels the call.
	_ = c.w.send(cancel, isDeadline)
	return true
}

// ReadResponseHeader reads the header of a response.
func (c *clientCodec) ReadResponseHeader(resp *rpc.Response) error {
	c.head = response{}
	if err := c.w.decode(&c.head); err != nil {
		return c.finish(err)
	}
	resp.Seq = c.head.Seq
	resp.Error = c.head.Error
	c.mu.Lock()
	wasMade := resp.Seq < c.nextSeq
	if call := c.calls[resp.Seq]; call != nil {
		call.names = c.head.Is
	}
	c.mu.Unlock()
	isCancel := resp.Seq&cancelBit != 0 // of a stock server, to which it is a call
	if !wasMade && !isCancel {
		// net/rpc may know this call, and WriteRequest not yet: both would use it at once.
		return c.finish(errors.New("plugin: the peer answers a call that was not made"))
	}
	return nil
}

// ReadResponseBody reads the body of a response. It is nil if the response is an error or
// nothing waits for it.
func (c *clientCodec) ReadResponseBody(body any) error {
	if body == nil {
		c.skipBody()
		return nil
	}
	if call, isCall := body.(*pendingCall); isCall {
		c.readReply(call)
		return nil
	}
	if err := c.w.decode(body); err != nil {
		return c.finish(cutShort(err)) // net/rpc does not read on after an error
	}
	return nil
}

// skipBody skips the body of an error. Until that has been read, net/rpc does not end the
// call, and so it can be abandoned.
func (c *clientCodec) skipBody() {
	_ = c.w.skip() // if the stream has ended, the next header cannot be read
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.calls, c.head.Seq)
}

// readReply reads the reply of a call.
func (c *clientCodec) readReply(call *pendingCall) {
	var err error
	if call.decodeInto == nil {
		err = c.w.skip()
	} else {
		err = c.w.decode(call.decodeInto)
	}
	isWaiting := c.remove(call)
	switch {
	case !isWaiting:
		// It was cancelled, and nothing looks at it any more.
	case err == nil:
		call.setReply()
	case c.w.in.err != nil:
		call.err = call.unanswered(cutShort(err))
	default:
		call.err = fmt.Errorf("plugin: %s returned, but its reply cannot be read into a %T: %w",
			call.method, call.reply, misfit(err))
	}
}

// result returns the error of Call for that of net/rpc.
func (c *clientCodec) result(call *pendingCall, err error) error {
	if err == nil || call.err != nil {
		return call.err
	}
	if remote, ok := err.(rpc.ServerError); ok {
		return newRemoteError(remote, call.names, call.callErrors)
	}
	// After Close, the stream may not have ended yet. Then rpc.ErrShutdown says all.
	hasEnded := c.state.codec.Load() == nil
	if err == rpc.ErrShutdown && hasEnded {
		err = c.state.why
	}
	return call.unanswered(err)
}

// finish ends the stream when reading has failed with err. It is called once. It returns
// the error for net/rpc, which fails the calls in flight with it.
func (c *clientCodec) finish(err error) error {
	c.w.failed.Store(true)
	err = c.finishCalls(err)
	_ = c.w.conn.Close()
	c.spawn(c.discardRest)
	return err
}

// finishCalls keeps why the stream has ended, and returns the error for net/rpc.
func (c *clientCodec) finishCalls(err error) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	why := err // for calls that begin later
	switch {
	case c.closed:
		why = rpc.ErrShutdown
		err = io.EOF // net/rpc turns it into rpc.ErrShutdown
	case err == io.EOF: // net/rpc turns it into io.ErrUnexpectedEOF
		why = rpc.ErrShutdown
	case errors.Is(err, rpc.ErrShutdown):
		for _, call := range c.calls {
			call.err = call.unanswered(err)
		}
		err = rpc.ErrShutdown // callers of net/rpc expect it bare
	}
	c.state.why = &lostError{cause: why, kind: rpc.ErrShutdown}
	c.state.codec.Store(nil)
	clear(c.calls)
	return err
}

// discardRest reads what the peer still sends. It may wait for room for replies, and reads
// that this end is closed only when it has sent them.
func (c *clientCodec) discardRest() {
	if d, ok := c.w.conn.(interface{ SetReadDeadline(time.Time) error }); ok {
		_ = d.SetReadDeadline(time.Time{}) // if this fails, so does reading
	}
	_, _ = io.Copy(io.Discard, c.w.conn) // until the stream has ended
}

// Close closes the stream. Calls in flight fail with rpc.ErrShutdown.
func (c *clientCodec) Close() error {
	c.mu.Lock()
	defer c.mu.Unlock() // for finishCalls, which may be about to store nil
	c.closed = true
	if c.state.codec.Load() != nil { // otherwise it is closed, and discardRest may read
		abort(c.w.conn)
	}
	return nil
}
