package plugin

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/rpc"
	"reflect"
	"sync"
	"time"
)

// Call calls a method through c, like c.Call, and returns early if ctx ends. Then it does
// not change reply, and errors.Is finds ctx.Err() and context.Cause(ctx) in its error. If
// reply is nil, the reply is dropped.
//
// If both sides use this library and the method takes a context, that context ends with
// ctx. Its Err is context.Canceled, and its Cause wraps context.DeadlineExceeded if ctx
// has reached its deadline. Other methods run to their end.
//
// errors.As finds an [rpc.ServerError] in an error that the method returned. If both sides
// use this library, errors.Is finds io.EOF, io.ErrUnexpectedEOF, fs.ErrNotExist,
// fs.ErrExist, fs.ErrPermission, fs.ErrInvalid, fs.ErrClosed, os.ErrDeadlineExceeded,
// context.Canceled, context.DeadlineExceeded, and the errors given to [RegisterError] on
// both sides, if the method returned them.
//
// If the peer exits during the call, errors.Is finds io.ErrUnexpectedEOF in the error and,
// in the host, errors.As finds an [*ExitError]. A later call fails with the same error or
// with [rpc.ErrShutdown].
//
// Errors and cancelling work as described if c is the client that [Plugin].Client gets or
// that [MuxBroker.DialRPC] returns. With another rpc.Client, args must not be changed until
// the method has returned, even if ctx ends first.
func Call(ctx context.Context, c *rpc.Client, serviceMethod string, args, reply any) error {
	if v := reflect.ValueOf(reply); reply != nil && (v.Kind() != reflect.Pointer || v.IsNil()) {
		return fmt.Errorf("plugin: %s cannot be called: its reply cannot be written into a %T, which must be a pointer that is not nil", serviceMethod, reply)
	}
	if ctx.Err() != nil {
		return contextError(ctx)
	}
	k := &call{method: serviceMethod, args: args, reply: reply, own: reply}
	if ctx.Done() != nil && reply != nil {
		k.own = reflect.New(reflect.TypeOf(reply).Elem()).Interface()
	}
	done := make(chan *rpc.Call, 1)
	v, ours := codecs.Load(c)
	if !ours {
		// Another codec may block while it writes the request. This goroutine ends
		// when the request has been written or the connection fails.
		go c.Go(serviceMethod, args, k.own, done)
		select {
		case rc := <-done:
			if rc.Error == nil {
				k.fill()
			}
			return rc.Error
		case <-ctx.Done():
			return contextError(ctx)
		}
	}
	codec := v.(*clientCodec)
	if codec.w.waitRoom(ctx) != nil {
		return contextError(ctx)
	}
	c.Go(serviceMethod, k, k, done)
	select {
	case rc := <-done:
		return k.result(rc.Error)
	case <-ctx.Done():
	}
	if codec.abandon(ctx, k) {
		return contextError(ctx)
	}
	return k.result((<-done).Error) // the answer is here
}

// call is a call by Call. It is passed to rpc.Client as the arguments and as the reply, so
// that the codec recognises it.
type call struct {
	method      string
	args, reply any
	own         any // what the reply is decoded into; is reply if the context cannot end
	seq         uint64
	err         error  // why the reply could not be decoded
	is          string // the registered errors that the error of the method is
}

// fill sets reply to own.
func (k *call) fill() {
	if k.own != k.reply {
		reflect.ValueOf(k.reply).Elem().Set(reflect.ValueOf(k.own).Elem())
	}
}

func (k *call) result(err error) error {
	if k.err != nil {
		return k.err
	}
	if se, ok := err.(rpc.ServerError); ok && k.is != "" {
		return &remoteError{se, knownErrors(k.is)}
	}
	return err
}

// codecs maps each *rpc.Client of this package to its *clientCodec, until its stream
// ends.
var codecs sync.Map

// clientCodec is the rpc.ClientCodec of every client that this package makes.
type clientCodec struct {
	w     *wire
	spawn func(func()) bool
	write func()   // w.write, allocated once
	head  response // the last header that was read

	mu     sync.Mutex // guards the fields below
	client *rpc.Client
	begun  uint64           // the number of the next request
	calls  map[uint64]*call // by Call, and not answered yet
	closed bool             // Close has been called
	ended  bool             // reading has ended
}

// newRPCClient returns a client for the service at the other end of conn. It starts
// goroutines with spawn.
func newRPCClient(conn io.ReadWriteCloser, spawn func(func()) bool) *rpc.Client {
	codec := &clientCodec{w: newWire(conn, rpc.Request{}), spawn: spawn, calls: make(map[uint64]*call)}
	codec.write = codec.w.write
	client := rpc.NewClientWithCodec(codec)
	codec.mu.Lock()
	defer codec.mu.Unlock()
	if !codec.ended {
		codec.client = client
		codecs.Store(client, codec)
	}
	return client
}

// WriteRequest encodes a request. It does not wait until the request is written, because
// net/rpc holds a lock meanwhile and no context could end the wait.
func (c *clientCodec) WriteRequest(req *rpc.Request, body any) error {
	k, ours := body.(*call)
	c.mu.Lock()
	c.begun = req.Seq + 1
	if ours {
		body, k.args, k.seq = k.args, nil, req.Seq
		c.calls[k.seq] = k
	}
	c.mu.Unlock()
	err := c.send(req, body)
	if err == nil || err == errLost {
		return nil // the call fails with the reason when reading ends
	}
	if ours {
		c.mu.Lock()
		delete(c.calls, k.seq)
		c.mu.Unlock()
	}
	return fmt.Errorf("plugin: %s cannot be called: the argument, of type %T, cannot be sent: %w", req.ServiceMethod, body, err)
}

func (c *clientCodec) send(req *rpc.Request, body any) error {
	write, err := c.w.encode(req, body)
	if write && !c.spawn(c.write) {
		c.w.write() // fails at once: the session is being closed
	}
	return err
}

// abandon cancels a call whose context has ended. It returns false if the answer has
// arrived.
func (c *clientCodec) abandon(ctx context.Context, k *call) bool {
	c.mu.Lock()
	waiting := c.calls[k.seq] == k
	delete(c.calls, k.seq)
	c.mu.Unlock()
	if waiting {
		// If this cannot be sent, the connection is lost, which cancels the call.
		deadline := errors.Is(ctx.Err(), context.DeadlineExceeded)
		_ = c.send(&rpc.Request{ServiceMethod: cancelMethod, Seq: k.seq | cancelBit}, deadline)
	}
	return waiting
}

func (c *clientCodec) ReadResponseHeader(resp *rpc.Response) error {
	c.head = response{}
	if err := c.w.decode(&c.head); err != nil {
		return c.end(err)
	}
	resp.Seq, resp.Error = c.head.Seq, c.head.Error
	c.mu.Lock()
	early := resp.Seq >= c.begun && resp.Seq&cancelBit == 0
	if k := c.calls[resp.Seq]; k != nil && resp.Error != "" {
		delete(c.calls, resp.Seq)
		k.is = c.head.Is
	}
	c.mu.Unlock()
	if early { // net/rpc and WriteRequest would use the call at once
		return c.end(errors.New("plugin: the peer answers a call that was not made"))
	}
	return nil
}

func (c *clientCodec) ReadResponseBody(body any) error {
	k, ours := body.(*call)
	if !ours {
		if err := c.w.decode(body); err != nil {
			return c.end(cutShort(err)) // net/rpc does not read on after an error
		}
		return nil
	}
	err := c.w.decode(k.own)
	c.mu.Lock()
	defer c.mu.Unlock()
	waiting := c.calls[k.seq] == k
	delete(c.calls, k.seq)
	switch {
	case c.w.lost != nil && err != nil:
		k.err = cutShort(err)
	case err != nil:
		k.err = fmt.Errorf("plugin: %s returned, but its reply cannot be read into a %T: %w", k.method, k.reply, err)
	case waiting:
		k.fill()
	}
	return nil
}

// end is called once, when reading has failed with err. It returns the error for net/rpc.
func (c *clientCodec) end(err error) error {
	c.w.failed.Store(true)
	c.mu.Lock()
	c.ended = true
	closed, client := c.closed, c.client
	if !closed && errors.Is(err, rpc.ErrShutdown) {
		for _, k := range c.calls {
			k.err = err // callers of net/rpc expect the bare rpc.ErrShutdown
		}
		err = rpc.ErrShutdown
	}
	clear(c.calls)
	c.mu.Unlock()
	codecs.Delete(client)
	_ = c.w.conn.Close()
	// The peer may wait for room for replies, and reads that this end is closed only
	// when it has sent them.
	c.spawn(func() {
		if d, ok := c.w.conn.(interface{ SetReadDeadline(time.Time) error }); ok {
			_ = d.SetReadDeadline(time.Time{})
		}
		_, _ = io.Copy(io.Discard, c.w.conn)
	})
	if closed || err == io.ErrUnexpectedEOF {
		return io.EOF // net/rpc turns it into ErrShutdown or ErrUnexpectedEOF
	}
	return err
}

// Close closes the stream. Calls in flight fail with rpc.ErrShutdown.
func (c *clientCodec) Close() error {
	c.mu.Lock()
	c.closed = true
	c.mu.Unlock()
	abort(c.w.conn)
	return nil
}
