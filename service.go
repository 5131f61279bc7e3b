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
	"sync/atomic"

	"github.com/hashicorp/go-hclog"
)

// This file is the server's half of calls: the methods of a receiver, and the answering
// of the calls on one stream.

// service has the methods of a receiver.
type service struct {
	methods    map[string]*method
	uncallable map[string]string // exported methods that cannot be called: name to reason
	err        error             // if not nil, the error of every call
	calls      group             // that are running; closed when the service is stopped
	// callErrors are those of the call whose argument this is, or nil. They are set before
	// the peer is told of the service. It is atomic because a peer may guess the number.
	callErrors atomic.Pointer[callErrors]
}

// method is one method of a service.
type method struct {
	call    func(ctx context.Context, arg, reply reflect.Value) error
	context bool // it needs a context of its own
	ignores bool // it accepts and ignores any argument
	arg     reflect.Type
	reply   reflect.Type // what the pointer passed to call points to
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
	s := &service{methods: make(map[string]*method), uncallable: make(map[string]string)}
	v := reflect.ValueOf(rcvr)
	t := v.Type()
	for i := range t.NumMethod() {
		name := t.Method(i).Name
		m, problem := newMethod(v.Method(i))
		if problem != "" {
			s.uncallable[name] = problem
			continue
		}
		s.methods[name] = m
	}
	if len(s.methods) > 0 {
		return s, nil
	}
	text := fmt.Sprintf("%v has no method that can be called; one looks like "+
		"func (T) Name(args A, reply *R) error, or the same with a context.Context first", t)
	for _, name := range sortedKeys(s.uncallable) {
		text += fmt.Sprintf("; %s: %s", name, s.uncallable[name])
	}
	if reflect.PointerTo(t).NumMethod() > t.NumMethod() {
		text += "; it has more methods as a pointer"
	}
	return nil, errors.New(text)
}

// newMethod returns a method that calls f, or why f cannot be called.
func newMethod(f reflect.Value) (m *method, problem string) {
	t := f.Type()
	m = &method{context: t.NumIn() > 0 && t.In(0) == typeOfContext}
	first := 0 // after the context
	if m.context {
		first = 1
	}
	switch {
	case t.NumIn() != first+2 || t.IsVariadic():
		return nil, fmt.Sprintf("it takes %d arguments and not two, args and reply", t.NumIn()-first)
	case t.NumOut() != 1 || t.Out(0) != typeOfError:
		return nil, "it does not return exactly an error"
	case t.In(first+1).Kind() != reflect.Pointer:
		return nil, fmt.Sprintf("its reply, a %v, is not a pointer", t.In(first+1))
	}
	m.arg = t.In(first)
	m.reply = t.In(first + 1).Elem()
	m.call = func(ctx context.Context, arg, reply reflect.Value) error {
		args := []reflect.Value{arg, reply}
		if m.context {
			args = []reflect.Value{reflect.ValueOf(ctx), arg, reply}
		}
		err, _ := f.Call(args)[0].Interface().(error) // not an error if it is nil
		return err
	}
	return m, ""
}

// answerCalls answers calls of svc on conn, a stream, until the peer closes it. Contexts of
// methods end with ctx.
func (s *session) answerCalls(ctx context.Context, conn io.ReadWriteCloser, svc *service) {
	server := newCallServer(conn, map[string]*service{"Plugin": svc}, s.logger, s.host)
	if err := server.answerCalls(ctx); err != io.EOF {
		s.debug("an RPC stream ended", "error", err)
	}
}

// callServer answers the calls on one stream.
type callServer struct {
	w        *wire
	services map[string]*service
	logger   hclog.Logger
	catch    bool     // a panic or Goexit in a method is an error of that call
	cancels  sync.Map // cancel functions of calls by their sequence numbers
}

func newCallServer(
	conn io.ReadWriteCloser, services map[string]*service, logger hclog.Logger, catch bool,
) *callServer {
	// Methods have their own goroutines, which write their replies.
	return &callServer{w: newWire(conn, response{}, nil), services: services, logger: logger, catch: catch}
}

var (
	errCanceled   = fmt.Errorf("plugin: the caller cancelled the call: %w", context.Canceled)
	errTimedOut   = fmt.Errorf("plugin: the caller cancelled the call: %w", context.DeadlineExceeded)
	errCallerGone = errors.New("plugin: the caller is gone")
	errGoexit     = errors.New("plugin: the method called runtime.Goexit")
	errExiting    = fmt.Errorf("plugin: the plugin is about to exit: %w", context.Canceled)
)

// answerCalls answers calls until the caller closes the stream, and returns why it ended.
// Each method runs in its own goroutine. Contexts of methods end with ctx, with the stream,
// and when the call has been answered.
func (s *callServer) answerCalls(ctx context.Context) error {
	ctx, cancel := context.WithCancelCause(ctx)
	err := s.readRequests(ctx)
	s.w.failed.Store(true)
	cancel(errCallerGone)
	_ = s.w.conn.Close()
	return err
}

func (s *callServer) readRequests(ctx context.Context) error {
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
		call, err := s.prepare(ctx, &req)
		if err != nil {
			s.respondError(&req, err, nil)
			continue
		}
		// Ends when the method returns. Nothing waits for it, as it is the caller's code.
		go s.run(call)
	}
}

// servedCall is a call to a method of this side.
type servedCall struct {
	request    *rpc.Request
	service    *service
	method     *method
	ctx        context.Context
	cancel     context.CancelCauseFunc // of ctx; nil if the method needs no context
	arg, reply reflect.Value
}

// prepare finds the method and decodes its argument. From then on, the call can be
// cancelled.
func (s *callServer) prepare(ctx context.Context, req *rpc.Request) (*servedCall, error) {
	svc, m, err := s.find(req.ServiceMethod)
	if err != nil {
		_ = s.w.skip() // if the stream has ended, so does reading
		return nil, err
	}
	arg := reflect.New(m.arg)
	if m.ignores {
		err = s.w.skip()
	} else {
		err = s.w.decode(arg.Interface())
	}
	if err != nil {
		return nil, fmt.Errorf("plugin: %s takes a %v, and what was sent cannot be read into that: %w",
			req.ServiceMethod, m.arg, misfit(err))
	}
	reply := reflect.New(m.reply)
	switch m.reply.Kind() {
	case reflect.Map:
		reply.Elem().Set(reflect.MakeMap(m.reply))
	case reflect.Slice:
		reply.Elem().Set(reflect.MakeSlice(m.reply, 0, 0))
	}
	call := &servedCall{request: req, service: svc, method: m, ctx: ctx, arg: arg.Elem(), reply: reply}
	if m.context {
		call.ctx, call.cancel = context.WithCancelCause(ctx)
		s.cancels.Store(req.Seq, call.cancel)
	}
	return call, nil
}

// find returns the method with that name, or why it cannot be called.
func (s *callServer) find(serviceMethod string) (*service, *method, error) {
	dot := strings.LastIndex(serviceMethod, ".")
	if dot < 0 {
		return nil, nil, fmt.Errorf("rpc: service/method request ill-formed: %[1]s: call it Plugin.%[1]s",
			serviceMethod)
	}
	svc := s.services[serviceMethod[:dot]]
	if svc == nil {
		return nil, nil, fmt.Errorf("rpc: can't find service %s; there is %s",
			serviceMethod, nameList(s.services))
	}
	if svc.err != nil {
		return nil, nil, fmt.Errorf("plugin: %s cannot be called: %w", serviceMethod, svc.err)
	}
	name := serviceMethod[dot+1:]
	if problem := svc.uncallable[name]; problem != "" {
		return nil, nil, fmt.Errorf("rpc: can't find method %s: there is one, but it cannot be called: %s",
			serviceMethod, problem)
	}
	m := svc.methods[name]
	if m == nil {
		return nil, nil, fmt.Errorf("rpc: can't find method %s; there are %s. "+
			"The peer may be older: see HandshakeConfig.ProtocolVersion",
			serviceMethod, nameList(svc.methods))
	}
	return svc, m, nil
}

// cancel ends the context of a call that is running.
func (s *callServer) cancel(seq uint64) {
	var deadline bool
	_ = s.w.decode(&deadline) // what cannot be decoded cancels, too
	cause := errCanceled
	if deadline {
		cause = errTimedOut
	}
	if cancel, ok := s.cancels.Load(seq); ok {
		cancel.(context.CancelCauseFunc)(cause)
	}
}

// run calls the method and answers the call. In the host, a panic is an error: it must not
// end the process. In a plugin it must: the host gets an ExitError, and nothing uses the
// state that the method may have left inconsistent.
func (s *callServer) run(call *servedCall) {
	defer s.release(call)
	if !call.service.calls.enter() {
		s.respondError(call.request, errStopped, nil)
		return
	}
	err := errGoexit // if the method does not return
	defer func() {
		call.service.calls.Done()
		s.answer(call, err)
	}()
	if s.catch {
		defer s.catchPanic(call, &err)
	}
	err = call.method.call(call.ctx, call.arg, call.reply)
}

// catchPanic, if deferred, logs a panic and turns it into an error.
func (s *callServer) catchPanic(call *servedCall, err *error) {
	p := recover()
	if p == nil {
		return
	}
	method := call.request.ServiceMethod
	s.logger.Error("a method that a plugin called panicked",
		"method", method, "panic", p, "trace", string(debug.Stack()))
	*err = fmt.Errorf("plugin: %s panicked: %v", method, p)
}

// answer answers a call whose method has ended with err.
func (s *callServer) answer(call *servedCall, err error) {
	if err == errGoexit && !s.catch {
		// In a plugin, the method may as well have panicked. Then the process is
		// about to end, and this would be the wrong reason.
		return
	}
	switch context.Cause(call.ctx) {
	case errStopped:
		err = errStopped
	case errExiting:
		if isOfEnd(err) {
			// The context of the caller has not ended. The call fails with the
			// reason when the connection is closed, which is about to happen.
			return
		}
	}
	if err != nil {
		s.respondError(call.request, err, call.service.callErrors.Load())
		return
	}
	s.respond(call.request, call.reply.Interface())
}

// isOfEnd reports whether err is one that a context, callback, reader or writer returns
// when the call that it belongs to ends. The methods of err may panic.
func isOfEnd(err error) (is bool) {
	defer func() { _ = recover() }()
	for _, end := range []error{context.Canceled, rpc.ErrShutdown, io.ErrClosedPipe, errStopped} {
		if errors.Is(err, end) {
			return true
		}
	}
	return false
}

// release ends the context of a call that has been answered.
func (s *callServer) release(call *servedCall) {
	if call.cancel == nil {
		return
	}
	s.cancels.Delete(call.request.Seq)
	call.cancel(nil)
}

// respond answers a call with its reply. If that cannot be encoded, it sends an error
// instead.
func (s *callServer) respond(req *rpc.Request, reply any) {
	err := s.w.send(&response{Seq: req.Seq}, reply)
	if err == nil || err == errWireFailed {
		return
	}
	err = fmt.Errorf("plugin: the reply of %s, of type %T, cannot be sent: %w", req.ServiceMethod, reply, err)
	s.respondError(req, err, nil)
}

// respondError answers a call with an error. If own is not nil, err becomes one of them.
func (s *callServer) respondError(req *rpc.Request, err error, own *callErrors) {
	text, names := sendable(err)
	if own != nil {
		names = append(names, own.add(err))
	}
	resp := &response{Seq: req.Seq, Error: text, Is: strings.Join(names, nameSeparator)}
	_ = s.w.send(resp, struct{}{}) // fails only if the caller is gone
}
