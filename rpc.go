package plugin

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/rpc"
	"reflect"
	"runtime/debug"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"
)

// This file is one RPC stream: the protocol of net/rpc over gob, with additions that a
// stock net/rpc peer does not notice.
//
//   - A value that gob cannot encode or decode fails only its own call. (With a client
//     that is used without Call, net/rpc closes the client if a reply does not fit.)
//   - A request for a service that does not exist, with a sequence number that no call
//     has, cancels a call. A stock server answers it with an error that the client
//     ignores.
//   - The header of a response has one more field, which a stock decoder skips: the
//     registered errors that the error of the method is.

const (
	cancelBit    = 1 << 63          // in the sequence number of a request that cancels a call
	cancelMethod = "Context.Cancel" // the method of such a request
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

// contextError returns ctx.Err(), with the cause if that is another error.
func contextError(ctx context.Context) error {
	err, cause := ctx.Err(), context.Cause(ctx)
	if cause == err {
		return err
	}
	return fmt.Errorf("%w: %w", err, cause)
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

// service has the methods of a receiver.
type service struct {
	methods map[string]*method
	unfit   map[string]string // exported methods that cannot be called: name to reason
	err     error             // if not nil, the error of every call
	calls   group             // that are running; closed when the service is stopped
}

// method is one method of a service.
type method struct {
	call      func(ctx context.Context, arg, reply reflect.Value) error
	context   bool // it needs a context of its own
	ignores   bool // it accepts and ignores any argument
	arg, into reflect.Type
}

var (
	typeOfError   = reflect.TypeFor[error]()
	typeOfContext = reflect.TypeFor[context.Context]()
	typeOfNothing = reflect.TypeFor[struct{}]()
)

// newService returns a service for rcvr. Its methods are those that net/rpc describes, and
// the same with a context first. It fails if there are none. If rcvr is a *service, it
// returns that.
func newService(rcvr any) (*service, error) {
	if s, ok := rcvr.(*service); ok {
		return s, nil
	}
	if rcvr == nil {
		return nil, errors.New("there is nothing to serve: the receiver is nil")
	}
	s := &service{methods: make(map[string]*method), unfit: make(map[string]string)}
	v := reflect.ValueOf(rcvr)
	t := v.Type()
	for i := range t.NumMethod() {
		name := t.Method(i).Name
		fit, why := newMethod(v.Method(i))
		if why != "" {
			s.unfit[name] = why
			continue
		}
		s.methods[name] = fit
	}
	if len(s.methods) > 0 {
		return s, nil
	}
	text := fmt.Sprintf("%v has no method that can be called; one looks like func (T) Name(args A, reply *R) error, or the same with a context.Context first", t)
	for _, name := range sortedKeys(s.unfit) {
		text += fmt.Sprintf("; %s: %s", name, s.unfit[name])
	}
	if reflect.PointerTo(t).NumMethod() > t.NumMethod() {
		text += "; it has more methods as a pointer"
	}
	return nil, errors.New(text)
}

// newMethod returns a method for f, or why it cannot be called.
func newMethod(f reflect.Value) (fit *method, why string) {
	t := f.Type()
	fit = &method{}
	in := 0
	if t.NumIn() > 0 && t.In(0) == typeOfContext {
		fit.context = true
		in++
	}
	switch {
	case t.NumIn() != in+2 || t.IsVariadic():
		return nil, fmt.Sprintf("it takes %d arguments and not two, args and reply", t.NumIn()-in)
	case t.NumOut() != 1 || t.Out(0) != typeOfError:
		return nil, "it does not return exactly an error"
	case t.In(in+1).Kind() != reflect.Pointer:
		return nil, fmt.Sprintf("its reply, a %v, is not a pointer", t.In(in+1))
	}
	fit.arg, fit.into = t.In(in), t.In(in+1).Elem()
	fit.call = func(ctx context.Context, arg, reply reflect.Value) error {
		args := []reflect.Value{arg, reply}
		if fit.context {
			args = []reflect.Value{reflect.ValueOf(ctx), arg, reply}
		}
		err, _ := f.Call(args)[0].Interface().(error)
		return err
	}
	return fit, ""
}

// rpcServer answers the calls on one stream.
type rpcServer struct {
	w        *wire
	services map[string]*service
	logger   hclog.Logger
	catch    bool     // a panic in a method is an error of that call
	cancels  sync.Map // cancel functions of calls by their sequence numbers
}

func newRPCServer(conn io.ReadWriteCloser, services map[string]*service, logger hclog.Logger, catch bool) *rpcServer {
	return &rpcServer{w: newWire(conn, response{}), services: services, logger: logger, catch: catch}
}

var (
	errCanceled   = fmt.Errorf("plugin: the caller cancelled the call: %w", context.Canceled)
	errTimedOut   = fmt.Errorf("plugin: the caller cancelled the call: %w", context.DeadlineExceeded)
	errCallerGone = errors.New("plugin: the caller is gone")
	errExited     = errors.New("plugin: the method called runtime.Goexit")
	errStopped    = errors.New("plugin: the peer has stopped serving this")
)

// serve answers calls until the caller closes the stream, and returns why it ended. Each
// method runs in its own goroutine. Contexts of methods end with ctx, with the stream, and
// when the call has been answered.
func (s *rpcServer) serve(ctx context.Context) error {
	ctx, cancel := context.WithCancelCause(ctx)
	err := s.readRequests(ctx)
	s.w.failed.Store(true)
	cancel(errCallerGone)
	_ = s.w.conn.Close()
	return err
}

func (s *rpcServer) readRequests(ctx context.Context) error {
	for {
		if err := s.w.waitRoom(ctx); err != nil {
			return err
		}
		var req rpc.Request
		if err := s.w.decode(&req); err != nil {
			return err
		}
		if req.ServiceMethod == cancelMethod && req.Seq&cancelBit != 0 {
			s.cancel(req.Seq &^ cancelBit)
			continue
		}
		c, err := s.prepare(ctx, &req)
		if err != nil {
			s.respond(&req, nil, err)
			continue
		}
		// Ends when the method returns. Nothing waits for it, as it is the caller's code.
		go s.call(&req, c)
	}
}

// inCall is a call to a method of this side.
type inCall struct {
	service    *service
	method     *method
	ctx        context.Context
	arg, reply reflect.Value
	cancel     context.CancelCauseFunc
}

// prepare finds the method and decodes its argument. From then on, the call can be
// cancelled.
func (s *rpcServer) prepare(ctx context.Context, req *rpc.Request) (*inCall, error) {
	svc, m, err := s.find(req.ServiceMethod)
	if err != nil {
		_ = s.w.decode(nil)
		return nil, err
	}
	arg, reply := reflect.New(m.arg), reflect.New(m.into)
	into := arg.Interface()
	if m.ignores {
		into = nil
	}
	if err := s.w.decode(into); err != nil {
		return nil, fmt.Errorf("plugin: %s takes a %v, and what was sent cannot be read into that: %w", req.ServiceMethod, m.arg, err)
	}
	switch m.into.Kind() {
	case reflect.Map:
		reply.Elem().Set(reflect.MakeMap(m.into))
	case reflect.Slice:
		reply.Elem().Set(reflect.MakeSlice(m.into, 0, 0))
	}
	c := &inCall{svc, m, ctx, arg.Elem(), reply, func(error) {}}
	if m.context {
		c.ctx, c.cancel = context.WithCancelCause(ctx)
		s.cancels.Store(req.Seq, c.cancel)
	}
	return c, nil
}

// find returns the method with that name, or why it cannot be called.
func (s *rpcServer) find(full string) (*service, *method, error) {
	dot := strings.LastIndex(full, ".")
	name := full[dot+1:]
	svc := s.services[full[:max(dot, 0)]]
	switch {
	case dot < 0:
		return nil, nil, fmt.Errorf("rpc: service/method request ill-formed: %s: call it Plugin.%s", full, full)
	case svc == nil:
		return nil, nil, fmt.Errorf("rpc: can't find service %s; there is %s", full, nameList(s.services))
	case svc.err != nil:
		return nil, nil, fmt.Errorf("plugin: %s cannot be called: %w", full, svc.err)
	case svc.unfit[name] != "":
		return nil, nil, fmt.Errorf("rpc: can't find method %s: there is one, but it cannot be called: %s", full, svc.unfit[name])
	case svc.methods[name] == nil:
		return nil, nil, fmt.Errorf("rpc: can't find method %s; there are %s. The peer may be older: see HandshakeConfig.ProtocolVersion", full, nameList(svc.methods))
	}
	return svc, svc.methods[name], nil
}

// cancel ends the context of a call that is running.
func (s *rpcServer) cancel(seq uint64) {
	cause := errCanceled
	var deadline bool
	if s.w.decode(&deadline) == nil && deadline {
		cause = errTimedOut
	}
	if cancel, ok := s.cancels.Load(seq); ok {
		cancel.(context.CancelCauseFunc)(cause)
	}
}

// call runs a method and answers. In the host, a panic must not end the process. In a
// plugin it must: the host gets an ExitError, and nothing uses the state that the method
// may have left inconsistent.
func (s *rpcServer) call(req *rpc.Request, c *inCall) {
	defer func() {
		s.cancels.Delete(req.Seq)
		c.cancel(nil)
	}()
	if !c.service.calls.enter() {
		s.respond(req, nil, errStopped)
		return
	}
	err := errExited
	defer func() { // also if the method calls runtime.Goexit, as t.Fatal does
		if s.catch {
			if p := recover(); p != nil {
				s.logger.Error("a method that a plugin called panicked", "method", req.ServiceMethod, "panic", p, "trace", string(debug.Stack()))
				err = fmt.Errorf("plugin: %s panicked: %v", req.ServiceMethod, p)
			}
		}
		c.service.calls.Done()
		if err == errExited && !s.catch { // or panicked, and the process ends
			time.AfterFunc(time.Second, func() { s.respond(req, nil, err) })
			return
		}
		if context.Cause(c.ctx) == errStopped {
			err = errStopped
		}
		s.respond(req, c.reply.Interface(), err)
	}()
	err = c.method.call(c.ctx, c.arg, c.reply)
}

// respond answers a call. If the reply cannot be encoded, it sends an error instead.
func (s *rpcServer) respond(req *rpc.Request, reply any, err error) {
	resp := response{Seq: req.Seq}
	if err != nil {
		resp.Error, resp.Is = sendable(err)
		reply = struct{}{}
	}
	write, encodeErr := s.w.encode(&resp, reply)
	if write {
		s.w.write()
	}
	if encodeErr != nil && encodeErr != errLost && err == nil {
		s.respond(req, nil, fmt.Errorf("plugin: the reply of %s, of type %T, cannot be sent: %w", req.ServiceMethod, reply, encodeErr))
	}
}
