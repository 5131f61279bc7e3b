package plugin

import (
	"bytes"
	"cmp"
	"context"
	"encoding/gob"
	"errors"
	"fmt"
	"io"
	"net/rpc"
	"reflect"
	"slices"
	"time"
)

// For returns a [Plugin] for the interface T. The plugin passes its
// implementation; the host passes nil. In the host, client returns the T that
// Dispense returns. Each of its methods is one call of [Invoke]:
//
//	type Filter interface {
//		Filter(ctx context.Context, prefix string, in io.Reader, out io.Writer, progress func(done int) error) (Stats, error)
//	}
//
//	type client struct{ remote *plugin.Remote }
//
//	func (c client) Filter(ctx context.Context, prefix string, in io.Reader, out io.Writer, progress func(int) error) (Stats, error) {
//		return plugin.Invoke[Stats](ctx, c.remote, "Filter", prefix, in, out, progress)
//	}
//
//	func Plugin(impl Filter) plugin.Plugin {
//		return plugin.For(impl, func(r *plugin.Remote) Filter { return client{r} })
//	}
//
//	// in the plugin: plugin.PluginSet{"filter": filter.Plugin(upper{})}
//	// in the host:   plugin.PluginSet{"filter": filter.Plugin(nil)}
//
// If impl is of another type than T, T must be written: For[Filter](upper{}, …).
// T may be generic and may embed interfaces. Only the methods of T can be called,
// whatever other methods impl has. Dispense fails if impl is nil in the plugin. What it
// returns can be used until the connection ends.
//
// # Methods
//
// A method may take a context first. It takes any number of parameters, and returns
// an error, or one result and an error. The context ends as [Call] describes.
// Parameters and results have any type that package gob can encode, or one of those
// in the next two sections.
//
// For panics, with the method's name and the reason, if a method has another form,
// is variadic or unexported, or has a type that cannot be sent: a context that is
// not first, an error that is not last, a function as a result, a function type that
// contains itself, another interface of package io, or a type that gob cannot
// encode. So the first test that runs finds such a mistake.
//
// # Readers, writers and callbacks
//
// Parameters of type [io.Reader] and [io.Writer], and functions with the form of a
// method, work across the connection until the method returns. Nil arrives as nil.
// If the method keeps one, its later use returns an error.
//
//   - Readers, writers and functions of one call are used concurrently. A callback
//     may run before bytes that were written earlier have arrived.
//   - A reader is read ahead, by up to 1 MiB and one Read of 64 KiB. What the method
//     has not read when it returns is lost.
//   - When Invoke returns nil, the writer has everything that the method wrote. If
//     the writer failed and no Write of the method returned an error, Invoke returns
//     the writer's.
//   - A panic or runtime.Goexit (t.Fatal) in a callback that the host runs is an
//     error of that callback. A panic in the plugin ends the plugin.
//   - A callback may call the plugin again.
//
// When Invoke returns, also because its context has ended, no Write and no callback
// of its arguments is running, and none begins. Invoke waits for them without a
// limit: a Write to a pipe that is never read blocks it, and so does a callback that
// waits for Invoke. It waits a tenth of a second at most for each Read, because a
// terminal may never answer. What that Read returns later is lost, and no other Read
// begins.
//
// # Results that are streams
//
// A result of type [io.ReadCloser] or [io.WriteCloser] works until the caller closes
// it, also if the context of Invoke ends. Close waits for the Close of the stream
// that the method returned, and returns its error. The stream is also closed when the
// connection ends, when the caller has not taken it within five seconds, and at once
// if an error was returned with it. A Read or Write that is running delays this by a
// tenth of a second at most. The method's context ends when the stream is closed. A
// stream that is cut by the end of the connection never returns io.EOF.
//
// # What gob does not keep
//
//	value                                                arrives as
//	nil pointer, the only parameter or the result        an error of the call
//	nil pointer among several parameters                 nil
//	pointer to a zero number, string or bool among them  nil
//	nil or empty slice or map                            nil or empty, not told apart
//	result returned with an error                        the zero value
//
// A value in an any or another interface needs [gob.Register] on both sides, and may
// be nil. Structs arrive without their unexported fields, functions and channels.
//
// # On the wire
//
// A method is called as "Plugin.Name", with this argument and reply:
//
//	no parameter                an empty struct; the method accepts any value
//	one parameter               the parameter itself
//	several                     a struct with the fields A0, A1, …
//	no result                   an empty struct; Invoke accepts any value
//	one result                  the result itself
//	io.Reader, io.ReadCloser    a uint32, for MuxBroker.DialReader
//	io.Writer, io.WriteCloser   a uint32, for MuxBroker.DialWriter
//	function                    a uint32, for MuxBroker.DialRPC; its method is Plugin.Call
//	nil in place of these       0
//
// So a method with one parameter works with a client or server that was written for
// net/rpc or go-plugin. A context is not sent: adding one changes nothing. A
// parameter that is added behind several is zero if the caller is older.
func For[T any](impl T, client func(*Remote) T) Plugin {
	t := reflect.TypeFor[T]()
	if t.Kind() != reflect.Interface || t.NumMethod() == 0 {
		panic(fmt.Sprintf("plugin: %v is not an interface with methods: write For[Interface](impl, client)", t))
	}
	p := &interfacePlugin[T]{impl, client, make(map[string]*shape)}
	for i := range t.NumMethod() {
		m := t.Method(i)
		s, err := newShape(m.Type, nil)
		if err != nil || !m.IsExported() {
			panic(fmt.Sprintf("plugin: For[%v]: method %s: %v", t, m.Name, cmp.Or(err, errors.New("it is not exported"))))
		}
		p.shapes[m.Name] = s
	}
	return p
}

// interfacePlugin is the Plugin that For returns.
type interfacePlugin[T any] struct {
	impl   T
	client func(*Remote) T
	shapes map[string]*shape // by the names of the methods
}

func (p *interfacePlugin[T]) Client(b *MuxBroker, c *rpc.Client) (any, error) {
	return p.client(&Remote{b, c, p.shapes}), nil
}

func (p *interfacePlugin[T]) Server(b *MuxBroker) (any, error) {
	impl := reflect.ValueOf(&p.impl).Elem()
	if impl.IsNil() {
		return nil, fmt.Errorf("the plugin has no implementation: it calls For[%v] with nil", impl.Type())
	}
	svc := &service{methods: make(map[string]*method)}
	for name, s := range p.shapes {
		svc.methods[name] = s.serve(b, impl.MethodByName(name))
	}
	return svc, nil
}

// Remote is the implementation in the plugin, for [Invoke]. The [Plugin] that [For]
// returns makes it. The zero Remote has no methods. A Remote may be used
// concurrently.
type Remote struct {
	broker *MuxBroker
	client *rpc.Client
	shapes map[string]*shape
}

// Invoke calls a method of the remote implementation and returns its result. R is
// the result's type, or struct{} if the method returns only an error. The args are
// those behind the context. [For] says what can be passed and returned, and what
// Invoke waits for.
//
// When ctx ends, Invoke returns as [Call] does, and the method's context ends.
// Errors, also those of readers, writers and callbacks, keep their identity as those
// of Call do. If there is an error, the result is the zero value.
//
// An unknown method, another R, a wrong number of args, and an arg that cannot be
// assigned to its parameter are errors before anything is sent. An untyped nil can be
// passed if the parameter can be nil. Invoke never panics.
//
// Invoke may be called concurrently, also from a callback.
func Invoke[R any](ctx context.Context, r *Remote, method string, args ...any) (result R, err error) {
	v, err := r.invoke(ctx, reflect.TypeFor[R](), method, args)
	if err == nil {
		result, _ = reflect.TypeAssert[R](v)
	}
	return result, err
}

// invoke checks the arguments, sends them and returns the result.
func (r *Remote) invoke(ctx context.Context, result reflect.Type, method string, args []any) (v reflect.Value, err error) {
	if ctx == nil || r == nil {
		return v, errors.New("plugin: Invoke was called with a nil context or Remote")
	}
	s := r.shapes[method]
	switch {
	case s == nil:
		return v, fmt.Errorf("plugin: Invoke: there is no method %q; there are %s", method, nameList(r.shapes))
	case s.result.Type != result:
		return v, fmt.Errorf("plugin: Invoke: the result of %s is a %v and not a %v", method, s.result, result)
	case len(s.params) != len(args):
		return v, fmt.Errorf("plugin: Invoke: %s takes %d arguments behind the context and not %d", method, len(s.params), len(args))
	}
	var loans []*loan
	defer func() { endLoans(loans) }()
	sent, reply := reflect.New(s.sent), reflect.New(s.result.sent)
	for i, arg := range args {
		p, to, x := s.params[i], s.field(sent.Elem(), i), reflect.ValueOf(arg)
		switch {
		case arg == nil && slices.Contains(nillable, p.Kind()):
		case arg == nil || !x.Type().AssignableTo(p.Type):
			return v, fmt.Errorf("plugin: Invoke: argument %d of %s is a %T and not a %v", i+1, method, arg, p)
		case p.sent == p.Type:
			to.Set(x)
		case p.function == nil || !x.IsNil():
			l := p.lend(r.broker, x, untilStopped, nil)
			loans = append(loans, l)
			to.SetUint(uint64(l.id))
		}
	}
	if err = checkNil(sent.Elem()); err != nil {
		return v, err
	}
	into := reply.Interface()
	if s.result.Type == typeOfNothing {
		into = nil // accepts any reply
	}
	if err = Call(ctx, r.client, "Plugin."+method, sent.Interface(), into); err != nil {
		return v, err
	}
	v, _, err = s.result.take(ctx, r.broker, reply.Elem())
	return v, err
}

var (
	typeOfNumber  = reflect.TypeFor[uint32]()
	paramStreams  = []reflect.Type{reflect.TypeFor[io.Reader](), reflect.TypeFor[io.Writer]()}
	resultStreams = []reflect.Type{reflect.TypeFor[io.ReadCloser](), reflect.TypeFor[io.WriteCloser]()}
	nillable      = []reflect.Kind{reflect.Pointer, reflect.Interface, reflect.Slice, reflect.Map, reflect.Func}
)

// shape is the form of a method, or of a function that is a parameter.
type shape struct {
	context bool // it takes a context first
	params  []value
	lends   bool         // a parameter or the result is a stream or function
	sent    reflect.Type // what is sent for params
	result  value        // a struct{} for none
}

// value is a parameter or result.
type value struct {
	reflect.Type
	sent     reflect.Type // its type, or typeOfNumber for a stream or function
	stream   string       // "Read" or "Write" for a stream
	function *shape       // nil if it is not a function
}

// newShape returns the shape of a function type, or an error that says why it cannot
// be called. The types outer have it as a parameter.
func newShape(t reflect.Type, outer []reflect.Type) (_ *shape, err error) {
	s := &shape{result: value{Type: typeOfNothing, sent: typeOfNothing}}
	n := t.NumOut()
	switch {
	case n < 1 || n > 2 || t.Out(n-1) != typeOfError || t.IsVariadic():
		return nil, fmt.Errorf("%v does not return an error, or one result and an error, or is variadic", t)
	case slices.Contains(outer, t):
		return nil, fmt.Errorf("the function type %v contains itself", t)
	case n == 2:
		s.result, err = newValue(t.Out(0), resultStreams, nil)
		s.lends = s.result.stream != ""
	}
	var fields []reflect.StructField
	for i := range t.NumIn() {
		if i == 0 && t.In(i) == typeOfContext {
			s.context = true
			continue
		}
		p, unfit := newValue(t.In(i), paramStreams, append(outer, t))
		err = cmp.Or(err, unfit)
		s.params = append(s.params, p)
		s.lends = s.lends || p.sent != p.Type
		fields = append(fields, reflect.StructField{Name: fmt.Sprintf("A%d", len(fields)), Type: p.sent})
	}
	if s.sent = reflect.StructOf(fields); len(fields) == 1 {
		s.sent = fields[0].Type
	}
	return s, err
}

// newValue returns a parameter or result, or an error that says why it cannot be
// sent. outer is nil for a result.
func newValue(t reflect.Type, streams, outer []reflect.Type) (v value, err error) {
	v = value{Type: t, sent: t}
	switch i := slices.Index(streams, t); {
	case i >= 0:
		v.sent, v.stream = typeOfNumber, []string{"Read", "Write"}[i]
	case t.Kind() == reflect.Func && outer != nil:
		v.sent = typeOfNumber
		v.function, err = newShape(t, outer)
	case t == typeOfContext || t == typeOfError:
		err = errors.New("a context must be the first parameter, and an error the last result")
	case t.Kind() == reflect.Interface && t.PkgPath() == "io":
		err = fmt.Errorf("%v cannot be sent, but one of %v can", t, streams)
	default:
		err = checkGob(t)
	}
	return v, err
}

// checkGob returns an error if gob cannot send values of a type. An empty slice
// makes gob look at the type, without a value that its GobEncode might refuse.
func checkGob(t reflect.Type) (err error) {
	defer recoverTo(&err)
	var buf bytes.Buffer
	list := reflect.New(reflect.SliceOf(t))
	return cmp.Or(gob.NewEncoder(&buf).EncodeValue(list.Elem()), gob.NewDecoder(&buf).DecodeValue(list))
}

// checkNil returns an error for a nil pointer: gob would send a zero value for it.
func checkNil(v reflect.Value) error {
	for t := v.Type(); v.Kind() == reflect.Pointer; v = v.Elem() {
		if v.IsNil() {
			return fmt.Errorf("plugin: a nil %v cannot be sent as the only parameter or as the result", t)
		}
	}
	return nil
}

// field returns parameter i of what is sent.
func (s *shape) field(sent reflect.Value, i int) reflect.Value {
	if len(s.params) == 1 {
		return sent
	}
	return sent.Field(i)
}

// lend serves x, which is a stream or function, to the peer. closer is called when a
// stream is closed or its serving ends.
func (v *value) lend(b *MuxBroker, x reflect.Value, timeout time.Duration, closer func() error) *loan {
	if v.function != nil {
		svc := &service{methods: map[string]*method{"Call": v.function.serve(b, x)}}
		return b.serve(svc, &svc.calls, timeout)
	}
	if v.stream == "Write" {
		return b.serveStream("Write", x.Interface().(io.Writer).Write, timeout, closer)
	}
	return b.serveStream("Read", x.Interface().(io.Reader).Read, timeout, closer)
}

// endLoans ends the serving of arguments. It waits for a Write or callback that is
// running, and until readTimeout for a Read.
func endLoans(loans []*loan) {
	for _, l := range loans {
		l.end()
	}
	for _, l := range loans {
		if l.reads {
			waitFor(readTimeout, l.uses.allDone())
		} else {
			l.uses.Wait()
		}
	}
}

// take returns the value for which x was sent. closer, if not nil, ends its use.
func (v *value) take(ctx context.Context, b *MuxBroker, x reflect.Value) (_ reflect.Value, closer io.Closer, err error) {
	switch {
	case v.sent == v.Type:
		return x, nil, nil
	case x.IsZero():
		return reflect.Zero(v.Type), nil, nil
	case v.function != nil:
		c, err := b.dialRPC(ctx, uint32(x.Uint()))
		return v.function.proxy(ctx, b, c, v.Type), c, err
	}
	closer, err = b.dialStream(ctx, uint32(x.Uint()), v.stream, slices.Contains(resultStreams, v.Type))
	return reflect.ValueOf(closer), closer, err
}

// serve returns a method that calls f, which has this shape.
func (s *shape) serve(b *MuxBroker, f reflect.Value) *method {
	call := func(ctx context.Context, sent, reply reflect.Value) error {
		if s.result.stream != "" {
			return s.runStream(ctx, b, f, sent, reply.Elem())
		}
		out, err := s.run(ctx, b, f, sent)
		if err != nil || len(out) == 1 {
			return err
		}
		reply.Elem().Set(out[0])
		return checkNil(out[0])
	}
	return &method{call, s.context || s.lends, len(s.params) == 0, s.sent, s.result.sent}
}

// run calls f with what was sent, and returns its results and its error. out is nil
// if f was not called.
func (s *shape) run(ctx context.Context, b *MuxBroker, f, sent reflect.Value) (out []reflect.Value, err error) {
	var taken []io.Closer
	defer func() { err = cmp.Or(err, giveBack(taken, out != nil)) }()
	args := make([]reflect.Value, 0, len(s.params)+1)
	if s.context {
		args = append(args, reflect.ValueOf(ctx))
	}
	for i, p := range s.params {
		arg, closer, err := p.take(ctx, b, s.field(sent, i))
		if err != nil {
			return nil, err
		}
		if closer != nil {
			taken = append(taken, closer)
			// When the call has ended, neither f nor giveBack waits for the peer.
			context.AfterFunc(ctx, func() { _ = giveBack([]io.Closer{closer}, false) })
		}
		args = append(args, arg)
	}
	out = f.Call(args)
	err, _ = out[len(out)-1].Interface().(error)
	return out, err
}

// giveBack ends the use of arguments. If the method has returned, it waits until the
// peer has all that was written, and returns the error of a writer that the method
// has not seen.
func giveBack(taken []io.Closer, returned bool) (err error) {
	for _, c := range taken {
		w, ok := c.(pipeWriter)
		switch {
		case !ok:
			_ = c.Close()
		case returned:
			_ = w.conn.Close()
		default:
			_ = w.client.Close() // so Close does not wait
		}
	}
	for _, c := range taken {
		if w, ok := c.(pipeWriter); ok {
			seen := w.failed.Load()
			if failed := w.Close(); !seen {
				err = cmp.Or(err, failed)
			}
		}
	}
	return err
}

// runStream is run for a function that returns a stream, which it lends. The context
// of f ends with the call's, or else with the stream.
func (s *shape) runStream(call context.Context, b *MuxBroker, f, sent, id reflect.Value) error {
	ctx, cancel := context.WithCancelCause(b.session.calls)
	keep := context.AfterFunc(call, func() { cancel(context.Cause(call)) })
	out, err := s.run(ctx, b, f, sent)
	if out == nil || out[0].IsNil() {
		return err
	}
	closer := out[0].Interface().(io.Closer)
	if err != nil || !keep() {
		_ = closer.Close()
		return cmp.Or(err, context.Cause(call))
	}
	l := s.result.lend(b, out[0], brokerTimeout, func() error {
		defer cancel(nil)
		return closer.Close()
	})
	id.SetUint(uint64(l.id))
	return nil
}

// proxy returns a function of type t that calls the peer's. ctx is that of the method
// which it is passed to.
func (s *shape) proxy(ctx context.Context, b *MuxBroker, c *rpc.Client, t reflect.Type) reflect.Value {
	r := &Remote{b, c, map[string]*shape{"Call": s}}
	return reflect.MakeFunc(t, func(in []reflect.Value) []reflect.Value {
		ctx := ctx
		if s.context {
			ctx, _ = in[0].Interface().(context.Context)
			in = in[1:]
		}
		args := make([]any, len(in))
		for i, v := range in {
			args[i] = v.Interface()
		}
		result, err := r.invoke(ctx, s.result.Type, "Call", args)
		if err != nil {
			result = reflect.Zero(s.result.Type)
		}
		return []reflect.Value{result, reflect.ValueOf(&err).Elem()}[2-t.NumOut():]
	})
}
