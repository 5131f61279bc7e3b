package plugin

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/rpc"
	"reflect"
	"time"
)

// This file is about one call of a method or function with a signature, at both ends. The
// caller serves what is not plain among the arguments, sends the numbers, and stops
// serving when the call has returned. The other end dials the numbers, calls the function
// and closes what it has dialled. A result that is a stream goes the other way: the end of
// the function serves it, and the caller dials it and owns it.

// Remote stands for the implementation in the plugin: [Invoke] and [InvokeSeq] call its
// methods. The [Plugin] that [For] returns makes it. The zero Remote has no methods. A Remote
// may be used concurrently.
type Remote struct {
	broker  *MuxBroker
	client  *rpc.Client
	methods map[string]*signature
}

// Close releases the instance: it ends its stream and what serves it in the plugin. It does
// not call a Close method of the implementation. Calls in flight fail, and so do later ones,
// with an error in which errors.Is finds [rpc.ErrShutdown]. Streams that were results work
// on. It is safe to call Close more than once, at any time, and for a nil or zero Remote. The
// error is always nil.
func (r *Remote) Close() error {
	if r != nil && r.client != nil {
		_ = r.client.Close() // fails only if it is closed already
	}
	return nil
}

// invoke calls a method of the peer and returns its result.
func (r *Remote) invoke(
	ctx context.Context, s *signature, method string, args []any,
) (result reflect.Value, err error) {
	sent := reflect.New(s.sentType)
	errs := &callErrors{}
	offers, err := s.setArguments(r.broker, sent.Elem(), method, args, errs)
	defer stopOffers(ctx, r.broker, offers)
	if err != nil {
		return result, err
	}
	reply := reflect.New(s.result.sentType)
	into := reply.Interface()
	if s.result.sentType == typeOfNothing {
		into = nil // accepts any reply
	}
	call := &pendingCall{method: "Plugin." + method, args: sent.Interface(), reply: into, callErrors: errs}
	if err := call.do(ctx, r.client); err != nil {
		return result, err
	}
	return s.result.dialResult(ctx, r.broker, reply.Elem())
}

// setArguments sets what is sent for args. What is not plain is served to the peer, which
// is sent its number, or 0 if it is nil. Errors of the arguments are kept in errs.
func (s *signature) setArguments(
	b *MuxBroker, sent reflect.Value, method string, args []any, errs *callErrors,
) (offers []*offer, err error) {
	for i, param := range s.params {
		arg := s.param(sent, i)
		if param.kind != plainSlot {
			arg = reflect.New(param.Type).Elem()
		}
		if err := param.set(arg, args[i]); err != nil {
			return offers, fmt.Errorf("plugin: argument %d of %s is %w", i+1, method, err)
		}
		if param.kind == plainSlot || arg.IsNil() {
			continue
		}
		o := param.serveValue(b, arg, untilStopped, nil)
		o.service.callErrors.Store(errs)
		offers = append(offers, o)
		s.param(sent, i).SetUint(uint64(o.id))
	}
	return offers, checkNil(sent)
}

// set sets v, which is nil or zero, to an argument. It fails if that does not fit.
func (param slot) set(v reflect.Value, arg any) error {
	if arg == nil && param.isNillable() {
		return nil
	}
	x := reflect.ValueOf(arg)
	if arg == nil || !x.Type().AssignableTo(param.Type) {
		return fmt.Errorf("a %T and not a %v", arg, param)
	}
	isStream := param.kind == readerSlot || param.kind == writerSlot
	if isStream && (x.Kind() == reflect.Pointer || x.Kind() == reflect.Func) && x.IsNil() {
		return fmt.Errorf("an %v with a nil %T in it, whose methods would panic", param, arg)
	}
	v.Set(x)
	return nil
}

// serveValue serves x, which is not plain, to the peer, which must dial it in time. For a
// stream, closer is called when the peer closes it or the serving ends, if it is not nil.
func (v slot) serveValue(
	b *MuxBroker, x reflect.Value, timeout time.Duration, closer func() error,
) *offer {
	switch v.kind {
	case readerSlot:
		return b.offerReader(x.Interface().(io.Reader), timeout, closer)
	case writerSlot:
		return b.offerWriter(x.Interface().(io.Writer), timeout, closer)
	case sequenceSlot:
		return b.offerSequence(x)
	}
	svc := &service{methods: map[string]*method{"Call": v.function.method(b, x)}}
	return b.offer(svc, &svc.calls, timeout)
}

// callbackTimeout is how long the Writes and callbacks that are running delay an Invoke whose
// context or connection has ended.
const callbackTimeout = time.Second

// stopOffers ends the serving of arguments, and waits for what is running of the caller's
// code: until useTimeout for a Read, and for the rest until it has ended or callbackTimeout
// after the end of ctx or the connection.
func stopOffers(ctx context.Context, b *MuxBroker, offers []*offer) {
	var reads, others []<-chan struct{}
	for _, o := range offers {
		o.end()
		if o.reads {
			reads = append(reads, o.uses.allDone())
		} else {
			others = append(others, o.uses.allDone())
		}
	}
	for _, done := range others {
		select {
		case <-done:
		case <-ctx.Done():
		case <-b.session.ended():
		}
	}
	waitFor(callbackTimeout, others...) // not at all if they are done
	waitFor(useTimeout, reads...)
}

// dialResult returns the result for which the peer has sent this. A stream belongs to the
// caller, whose Close closes it at the peer.
func (v slot) dialResult(
	ctx context.Context, b *MuxBroker, sent reflect.Value,
) (none reflect.Value, err error) {
	if v.kind != readerSlot && v.kind != writerSlot {
		return sent, nil
	}
	id := uint32(sent.Uint())
	if id == 0 {
		return reflect.Zero(v.Type), nil
	}
	var stream io.Closer
	if v.kind == readerSlot {
		stream, err = b.dialReader(ctx, id, true)
	} else {
		stream, err = b.dialWriter(ctx, id, true)
	}
	if err != nil {
		return none, err
	}
	return reflect.ValueOf(stream), nil
}

// implementation is a function of this end that the peer calls.
type implementation struct {
	*signature
	broker   *MuxBroker
	function reflect.Value
}

// method returns a method that calls a function with this signature.
func (s *signature) method(b *MuxBroker, function reflect.Value) *method {
	f := &implementation{signature: s, broker: b, function: function}
	return &method{
		call:    f.call,
		context: s.takesContext || s.connects,
		ignores: len(s.params) == 0,
		arg:     s.sentType,
		reply:   s.result.sentType,
	}
}

// call calls the function with what the peer sent, and sets reply.
func (f *implementation) call(ctx context.Context, sent, reply reflect.Value) error {
	if f.result.kind == readerSlot || f.result.kind == writerSlot {
		return f.callForStream(ctx, sent, reply.Elem())
	}
	out, err := f.callWith(ctx, sent)
	if err != nil || f.returns == 1 {
		return err
	}
	reply.Elem().Set(out[0])
	return checkNil(out[0])
}

// callWith calls the function with what the peer sent, and returns what it returns and
// its error. out is nil if the function has not returned.
func (f *implementation) callWith(ctx context.Context, sent reflect.Value) (out []reflect.Value, err error) {
	args := arguments{broker: f.broker, ctx: ctx}
	if f.connects {
		args.ctx, args.end = context.WithCancelCause(ctx)
	}
	defer func() { // even if the function panics
		unseen := args.close(out != nil)
		if err == nil {
			err = unseen
		}
	}()
	var in []reflect.Value
	if f.takesContext {
		in = append(in, reflect.ValueOf(ctx))
	}
	for i, param := range f.params {
		arg, err := args.dial(param, f.param(sent, i))
		if err != nil {
			return nil, err
		}
		in = append(in, arg)
	}
	if f.result.kind == sequenceSlot {
		return f.callForSequence(ctx, in)
	}
	out = f.function.Call(in)
	err, _ = out[f.returns-1].Interface().(error) // nil is no error
	return out, err
}

// callForSequence calls a function that returns a sequence, and writes its values to the
// last argument.
func (f *implementation) callForSequence(
	ctx context.Context, in []reflect.Value,
) (out []reflect.Value, err error) {
	last := len(in) - 1
	w, _ := in[last].Interface().(io.Writer)
	if w == nil {
		return nil, errors.New("plugin: the caller passes no writer for the values of the sequence")
	}
	out = f.function.Call(in[:last])
	return out, sendSequence(ctx, w, out[0], false)
}

// callForStream calls a function that returns a stream, serves that and sets id to its
// number. The context of the function ends with that of the call, if the call fails or is
// cancelled, or else with the stream.
func (f *implementation) callForStream(ofCall context.Context, sent, id reflect.Value) error {
	ctx, cancel := context.WithCancelCause(f.broker.session.methodsCtx)
	// detach makes ctx outlive ofCall. It returns false if ofCall has ended.
	detach := context.AfterFunc(ofCall, func() { cancel(context.Cause(ofCall)) })
	out, err := f.callWith(ctx, sent)
	if out == nil || out[0].IsNil() {
		return err // ofCall ends when this has been answered, and cancels ctx
	}
	stream := out[0].Interface().(io.Closer)
	if err == nil && !detach() {
		err = context.Cause(ofCall)
	}
	if err != nil {
		_ = stream.Close() // err says more
		return err
	}
	closeStream := func() error {
		defer cancel(nil)
		return stream.Close()
	}
	o := f.result.serveValue(f.broker, out[0], brokerTimeout, closeStream)
	id.SetUint(uint64(o.id))
	return nil
}

// arguments are those of one call that are not plain, at the end of the function.
type arguments struct {
	broker  *MuxBroker
	ctx     context.Context         // ends with that of the function, or when that has returned
	end     context.CancelCauseFunc // of ctx; nil if all arguments are plain
	closers []io.Closer             // what was dialled, but for the writers
	writers []*dialledWriter
}

var errReturned = errors.New("plugin: the method that took this argument has returned")

// dial returns the argument for which the peer has sent this. If ctx ends, neither the
// function nor close waits for the peer.
func (a *arguments) dial(param slot, sent reflect.Value) (arg reflect.Value, err error) {
	if param.kind == plainSlot {
		return sent, nil
	}
	id := uint32(sent.Uint())
	switch {
	case param.kind == sequenceSlot: // nil is an empty one
		q := &remoteSequence{ctx: a.ctx, broker: a.broker, id: id}
		return reflect.MakeFunc(param.Type, q.call), nil
	case id == 0:
		return reflect.Zero(param.Type), nil
	case param.kind == readerSlot:
		r, err := a.broker.dialReader(a.ctx, id, false)
		if err != nil {
			return arg, err
		}
		a.add(r)
		return reflect.ValueOf(r), nil
	case param.kind == writerSlot:
		w, err := a.broker.dialWriter(a.ctx, id, false)
		if err != nil {
			return arg, err
		}
		context.AfterFunc(a.ctx, w.abort)
		a.writers = append(a.writers, w)
		return reflect.ValueOf(w), nil
	}
	c, err := a.broker.dialService(a.ctx, id)
	if err != nil {
		return arg, err
	}
	a.add(c)
	remote := &Remote{broker: a.broker, client: c}
	call := func(in []reflect.Value) []reflect.Value {
		return remote.callFunction(a.ctx, param.function, in)
	}
	return reflect.MakeFunc(param.Type, call), nil
}

// add keeps what is closed when the function has returned or ctx ends.
func (a *arguments) add(c io.Closer) {
	a.closers = append(a.closers, c)
	context.AfterFunc(a.ctx, func() { _ = c.Close() })
}

// close ends the use of the arguments. If the function has returned, it waits until the
// peer has all that was written, and returns the error of a writer that the function has
// not seen.
func (a *arguments) close(returned bool) (unseen error) {
	if a.end == nil {
		return nil
	}
	defer a.end(errReturned)
	for _, c := range a.closers {
		_ = c.Close() // nothing is lost
	}
	if !returned {
		a.end(errReturned) // aborts the writers
	}
	for _, w := range a.writers { // all first, so that none waits for another
		w.finish()
	}
	for _, w := range a.writers {
		seen := w.failed.Load()
		err := w.Close()
		if unseen == nil && !seen {
			unseen = err
		}
	}
	return unseen
}

// callFunction calls a function of the peer that was passed to a method of this end.
// Without a context, it is called with ctx, that of the method's arguments.
func (r *Remote) callFunction(ctx context.Context, s *signature, in []reflect.Value) []reflect.Value {
	if s.takesContext {
		if passed, ok := in[0].Interface().(context.Context); ok {
			ctx = passed
		}
		in = in[1:]
	}
	args := make([]any, len(in))
	for i, v := range in {
		args[i] = v.Interface()
	}
	result, err := r.invoke(ctx, s, "Call", args)
	if err != nil {
		result = reflect.Zero(s.result.Type)
	}
	asError := reflect.ValueOf(&err).Elem() // of type error, even if it is nil
	if s.returns == 1 {
		return []reflect.Value{asError}
	}
	return []reflect.Value{result, asError}
}
