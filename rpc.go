package plugin

import (
	"context"
	"errors"
	"fmt"
	"go/token"
	"io"
	"net/rpc"
	"reflect"
	"runtime/debug"
	"strings"
	"sync"

	"github.com/hashicorp/go-hclog"
)

// This file is one RPC stream: net/rpc's protocol over gob, with what net/rpc
// itself cannot do. A stock net/rpc peer on the other end notices nothing.
//
//   - A value that gob cannot encode, or decode, costs one call and not the
//     stream (wire.go). (A reply that does not fit ends a client that was
//     called without Call: net/rpc itself sees to that.)
//   - A call can be cancelled: a request for a service that does not exist,
//     with a sequence number that no call has, tells our server and is
//     answered by a stock server with an error that nobody waits for.
//   - A response's header has one more field, which a stock decoder skips: the
//     names of the errors that the returned error is.

const (
	// cancelBit is set in the sequence number of a request to cancel a call.
	cancelBit = 1 << 63
	// cancelMethod is what such a request asks for.
	cancelMethod = "Context.Cancel"
)

// Call calls a method through c, like c.Call, and returns when ctx ends, if
// the method has not returned before. It then returns an error in which
// errors.Is finds both ctx.Err() and context.Cause(ctx), and leaves reply
// alone; a reply that comes later is dropped.
//
// Where both sides use this library and the served method takes a context,
// that context ends with ctx; its Err is context.Canceled, and context.Cause
// tells a deadline apart. Any other method runs to its end, unheard.
//
// An error that the method returned is found as an [rpc.ServerError] by
// errors.As. Where both sides use this library, errors.Is also finds those
// errors of the standard library that plugins return most (io.EOF,
// io.ErrUnexpectedEOF, fs.ErrNotExist, fs.ErrExist, fs.ErrPermission,
// fs.ErrInvalid, fs.ErrClosed, os.ErrDeadlineExceeded, context.Canceled and
// context.DeadlineExceeded), and those given to [RegisterError] on both sides.
//
// When the other side is gone, a call that was in flight fails with an error
// in which errors.Is finds io.ErrUnexpectedEOF and, on the host, errors.As
// finds an [*ExitError]; a later one fails so, too, or with [rpc.ErrShutdown].
//
// A context that cannot end costs nothing. Any *rpc.Client will do, but the
// errors and the cancelling need one that this package made: the one given to
// [Plugin].Client or returned by [MuxBroker.DialRPC]. With another, args must
// not be changed before its call has ended, even if ctx ends sooner.
//
// Call may be called concurrently.
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
		// Nothing can stop a codec of another kind from blocking while it writes
		// the request. This ends when it is written or the connection fails.
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
	rc := <-done // the answer is here
	return k.result(rc.Error)
}

// contextError is why ctx ended: ctx.Err(), and the cause, if there is another.
func contextError(ctx context.Context) error {
	err, cause := ctx.Err(), context.Cause(ctx)
	if cause == err {
		return err
	}
	return fmt.Errorf("%w: %w", err, cause)
}

// call is what Call gives to an *rpc.Client of ours both as the arguments and
// as the reply, so that the codec knows it when it sees it.
type call struct {
	method      string
	args, reply any
	own         any // what the answer is read into: reply, if the context cannot end
	seq         uint64
	err         error  // the reply could not be decoded
	is          string // names of the errors that the method's error is
}

// fill sets the reply to what the answer was read into.
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

// codecs finds the codec of an *rpc.Client made here: *rpc.Client to
// *clientCodec. An entry leaves when its stream ends.
var codecs sync.Map

// clientCodec is the rpc.ClientCodec of every client that this package makes.
type clientCodec struct {
	w     *wire
	spawn func(func()) bool
	write func()   // w.write, made once
	head  response // the header that was read last

	mu     sync.Mutex // guards the fields below
	client *rpc.Client
	calls  map[uint64]*call // made by Call and not yet answered
	closed bool             // the user has called Close
	ended  bool             // reading has ended
}

// newRPCClient returns a client for the service on the other end of conn, which
// starts goroutines with spawn.
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

// WriteRequest encodes a request. It does not wait until that is written:
// net/rpc holds a lock while it calls, and nobody could end the wait.
func (c *clientCodec) WriteRequest(req *rpc.Request, body any) error {
	k, ours := body.(*call)
	if ours {
		body, k.args, k.seq = k.args, nil, req.Seq
		c.mu.Lock()
		c.calls[k.seq] = k
		c.mu.Unlock()
	}
	err := c.send(req, body)
	if err == nil || err == errLost {
		return nil // the end of reading will fail the call, with the reason
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
		_ = c.w.conn.Close()
	}
	return err
}

// abandon gives up on a call whose context has ended and tells the other side.
// It reports false if the answer is here.
func (c *clientCodec) abandon(ctx context.Context, k *call) bool {
	c.mu.Lock()
	waiting := c.calls[k.seq] == k
	delete(c.calls, k.seq)
	ended := c.ended
	c.mu.Unlock()
	if waiting && !ended {
		// If this cannot be sent, the connection is lost and the call with it.
		deadline := errors.Is(ctx.Err(), context.DeadlineExceeded)
		_ = c.send(&rpc.Request{ServiceMethod: cancelMethod, Seq: k.seq | cancelBit}, deadline)
	}
	return waiting
}

func (c *clientCodec) ReadResponseHeader(resp *rpc.Response) error {
	c.head = response{}
	if err := c.w.decode(&c.head); err != nil {
		return c.end(c.w.reason(err))
	}
	resp.Seq, resp.Error = c.head.Seq, c.head.Error
	c.mu.Lock()
	defer c.mu.Unlock()
	if k := c.calls[resp.Seq]; k != nil && resp.Error != "" {
		delete(c.calls, resp.Seq)
		k.is = c.head.Is
	}
	return nil
}

func (c *clientCodec) ReadResponseBody(body any) error {
	k, ours := body.(*call)
	if !ours {
		if err := c.w.decode(body); err != nil {
			return c.end(cutShort(c.w.reason(err))) // net/rpc reads no more after that
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
		k.err = cutShort(c.w.reason(err))
	case err != nil:
		k.err = fmt.Errorf("plugin: %s returned, but its reply cannot be read into a %T: %w", k.method, k.reply, err)
	case waiting:
		k.fill()
	}
	return nil
}

// end is called once, when nothing more can be read, with the reason.
func (c *clientCodec) end(err error) error {
	c.w.failed.Store(true)
	c.mu.Lock()
	c.ended = true
	closed, client := c.closed, c.client
	if !closed && errors.Is(err, rpc.ErrShutdown) {
		for _, k := range c.calls {
			k.err = err // of which net/rpc's own callers expect
		}
		err = rpc.ErrShutdown
	}
	clear(c.calls)
	c.mu.Unlock()
	codecs.Delete(client)
	_ = c.w.conn.Close()
	if closed || err == io.ErrUnexpectedEOF {
		return io.EOF // net/rpc makes an ErrShutdown or an ErrUnexpectedEOF of it
	}
	return err
}

// Close ends the stream. Calls in flight fail with rpc.ErrShutdown.
func (c *clientCodec) Close() error {
	c.mu.Lock()
	c.closed = true
	c.mu.Unlock()
	abort(c.w.conn)
	return nil
}

// service is a receiver whose methods can be called.
type service struct {
	rcvr    reflect.Value
	methods map[string]*method
	unfit   map[string]string // exported methods that cannot be called, and why
	err     error             // why none can be called, told to every caller
	calls   group             // closed when the service is stopped
}

// method is one method of a service.
type method struct {
	fn        func(in []reflect.Value) error // in are receiver, maybe context, argument, reply
	context   bool                           // it takes a context first
	ignores   bool                           // it accepts any argument and ignores it
	arg, into reflect.Type
}

var (
	typeOfError   = reflect.TypeFor[error]()
	typeOfContext = reflect.TypeFor[context.Context]()
)

// newService finds the methods of rcvr that can be called: those that
// net/rpc's documentation describes, and the same with a context first. It
// fails if there is none. A *service is one already.
func newService(rcvr any) (*service, error) {
	if s, ok := rcvr.(*service); ok {
		return s, nil
	}
	if rcvr == nil {
		return nil, errors.New("there is nothing to serve: the receiver is nil")
	}
	s := &service{rcvr: reflect.ValueOf(rcvr), methods: make(map[string]*method), unfit: make(map[string]string)}
	t := s.rcvr.Type()
	for i := range t.NumMethod() {
		m := t.Method(i)
		fit, why := newMethod(m)
		if why != "" {
			s.unfit[m.Name] = why
			continue
		}
		s.methods[m.Name] = fit
	}
	if len(s.methods) > 0 {
		return s, nil
	}
	text := fmt.Sprintf("%v has no method that can be called; one looks like func (T) Name(args A, reply *R) error, or the same with a context.Context first", t)
	for _, name := range sortedKeys(s.unfit) {
		text += fmt.Sprintf("; %s: %s", name, s.unfit[name])
	}
	if t.Kind() != reflect.Pointer && reflect.PointerTo(t).NumMethod() > t.NumMethod() {
		text += fmt.Sprintf("; a *%v has more methods: pass a pointer", t)
	}
	return nil, errors.New(text)
}

// newMethod returns m as one that can be called, or says what is wrong with it.
func newMethod(m reflect.Method) (fit *method, why string) {
	t := m.Type
	fit = &method{fn: func(in []reflect.Value) error {
		err, _ := m.Func.Call(in)[0].Interface().(error)
		return err
	}}
	in := 1 // behind the receiver
	if t.NumIn() > in && t.In(in) == typeOfContext {
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
	case !exportedOrBuiltin(t.In(in)):
		return nil, fmt.Sprintf("its argument's type, %v, is not exported", t.In(in))
	case !exportedOrBuiltin(t.In(in + 1)):
		return nil, fmt.Sprintf("its reply's type, %v, is not exported", t.In(in+1))
	}
	fit.arg, fit.into = t.In(in), t.In(in+1).Elem()
	return fit, ""
}

func exportedOrBuiltin(t reflect.Type) bool {
	for t.Kind() == reflect.Pointer {
		t = t.Elem()
	}
	return token.IsExported(t.Name()) || t.PkgPath() == ""
}

// find returns the method with that name, or says why there is none.
func (s *service) find(full, name string) (*method, error) {
	if s.err != nil {
		return nil, fmt.Errorf("plugin: %s cannot be called: %w", full, s.err)
	}
	if m := s.methods[name]; m != nil {
		return m, nil
	}
	if why := s.unfit[name]; why != "" {
		return nil, fmt.Errorf("rpc: can't find method %s: there is one, but it cannot be called: %s", full, why)
	}
	return nil, fmt.Errorf("rpc: can't find method %s; there are %s. The side that serves it may have been built from an older version: see HandshakeConfig.ProtocolVersion", full, nameList(s.methods))
}

// rpcServer serves the calls that arrive on one stream.
type rpcServer struct {
	w        *wire
	services map[string]*service
	logger   hclog.Logger
	catch    bool // a panic in a method is an error of that call

	mu      sync.Mutex // guards cancels
	cancels map[uint64]context.CancelCauseFunc
}

func newRPCServer(conn io.ReadWriteCloser, services map[string]*service, logger hclog.Logger, catch bool) *rpcServer {
	return &rpcServer{w: newWire(conn, response{}), services: services, logger: logger, catch: catch, cancels: make(map[uint64]context.CancelCauseFunc)}
}

var (
	errCanceled   = fmt.Errorf("plugin: the caller gave the call up: %w", context.Canceled)
	errTimedOut   = fmt.Errorf("plugin: the caller gave the call up: %w", context.DeadlineExceeded)
	errCallerGone = errors.New("plugin: the caller is gone")
	errExited     = errors.New("plugin: the method called runtime.Goexit")
	errStopped    = errors.New("plugin: the peer has stopped serving this")
)

// serve answers calls until the caller hangs up. Methods run in goroutines of
// their own, which end when the methods return; their contexts end with ctx,
// with the caller, and when the call has been answered. It returns why it ended.
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
			return s.w.reason(err)
		}
		if req.ServiceMethod == cancelMethod && req.Seq&cancelBit != 0 {
			s.cancel(req.Seq &^ cancelBit)
			continue
		}
		c, err := s.prepare(ctx, &req)
		if s.w.lost != nil && err != nil {
			return cutShort(s.w.lost)
		}
		if err != nil {
			s.respond(&req, nil, err)
			continue
		}
		// Ends when the method returns, which is the caller's own code.
		go s.call(&req, c)
	}
}

// inCall is a call that has arrived.
type inCall struct {
	service *service
	method  *method
	in      []reflect.Value // what method.fn is called with
	cancel  context.CancelCauseFunc
}

// prepare finds the method and reads its argument. A method that takes a
// context can be cancelled from here on.
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
	c := &inCall{service: svc, method: m, in: []reflect.Value{svc.rcvr, arg.Elem(), reply}}
	if m.context {
		ctx, c.cancel = context.WithCancelCause(ctx)
		s.mu.Lock()
		s.cancels[req.Seq] = c.cancel
		s.mu.Unlock()
		c.in = []reflect.Value{svc.rcvr, reflect.ValueOf(ctx), arg.Elem(), reply}
	}
	return c, nil
}

func (s *rpcServer) find(full string) (*service, *method, error) {
	dot := strings.LastIndex(full, ".")
	if dot < 0 {
		return nil, nil, fmt.Errorf("rpc: service/method request ill-formed: %s: call it Plugin.%s", full, full)
	}
	svc := s.services[full[:dot]]
	if svc == nil {
		return nil, nil, fmt.Errorf("rpc: can't find service %s; there is %s", full, nameList(s.services))
	}
	m, err := svc.find(full, full[dot+1:])
	return svc, m, err
}

// cancel ends the context of a call, if there is still such a call.
func (s *rpcServer) cancel(seq uint64) {
	cause := errCanceled
	var deadline bool
	if s.w.decode(&deadline) == nil && deadline {
		cause = errTimedOut
	}
	s.mu.Lock()
	cancel := s.cancels[seq]
	s.mu.Unlock()
	if cancel != nil {
		cancel(cause)
	}
}

// call runs a method and answers.
func (s *rpcServer) call(req *rpc.Request, c *inCall) {
	if c.method.context {
		defer func() {
			s.mu.Lock()
			delete(s.cancels, req.Seq)
			s.mu.Unlock()
			c.cancel(nil)
		}()
	}
	err := errExited
	// Also runs if the method calls runtime.Goexit, as t.Fatal does. A panic in a
	// plugin ends the process and is not answered.
	defer func() {
		if err != errExited || s.catch {
			s.respond(req, c.in[len(c.in)-1].Interface(), err)
		}
	}()
	err = s.invoke(req, c)
}

// invoke runs a method. In the host, a panic must not be the end of the
// process; in a plugin it must be, so that its host learns of it and nobody
// goes on with what the method may have left half done.
func (s *rpcServer) invoke(req *rpc.Request, c *inCall) (err error) {
	if !c.service.calls.enter() {
		return errStopped
	}
	defer func() {
		if c.service.calls.isClosed() {
			err = errStopped
		}
		c.service.calls.Done()
	}()
	if s.catch {
		defer func() {
			if p := recover(); p != nil {
				s.logger.Error("a method that a plugin called panicked", "method", req.ServiceMethod, "panic", p, "trace", string(debug.Stack()))
				err = fmt.Errorf("plugin: %s panicked: %v", req.ServiceMethod, p)
			}
		}()
	}
	return c.method.fn(c.in)
}

// respond answers one call. If the reply cannot be sent, an error that says so
// is sent instead.
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
