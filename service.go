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

// serve answers calls on a stream until the peer closes it. Contexts of methods end with
// ctx.
func (s *session) serve(ctx context.Context, st *stream, svc *service) {
	if err := newRPCServer(st, map[string]*service{"Plugin": svc}, s.logger, s.host).serve(ctx); err != io.EOF {
		s.debug("an RPC stream ended", "error", err)
	}
}
