package plugin

import (
	"context"
	"encoding/gob"
	"errors"
	"fmt"
	"io"
	"iter"
	"net/rpc"
	"reflect"
	"slices"
)

// For returns a [Plugin] for the interface T. The plugin passes its
// implementation; the host passes nil. In the host, client returns the T that
// Dispense returns. Each of its methods is one call of [Invoke] or [InvokeSeq]:
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
// whatever other methods impl has. Dispense fails if impl is nil in the plugin. All that
// it returns share impl, and can be used until the connection ends.
//
// # Methods
//
// A method may take a context first. It takes any number of parameters, and returns
// an error, one result and an error, or one sequence. The context ends as [Call]
// describes. Parameters and results have any type that package gob can encode, or one
// of those in the next three sections.
//
// For panics, with the method's name and the reason, if a method has another form,
// is variadic or unexported, or has a type that cannot be sent: a context that is
// not first, an error that is not last, a function as a result, a function type that
// contains itself, another interface of package io, or a type that gob cannot
// encode. Functions, channels and interfaces of package io are also refused in
// exported fields of structs, in slices and in maps, unless the type encodes itself:
// gob would leave them out. So the first test that runs finds such a mistake. For
// also panics if T is not an interface with methods, or if client is nil.
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
//     error of that callback. A panic in the plugin ends the plugin. A method of the
//     plugin that calls runtime.Goexit is not answered.
//   - A callback may call the plugin again.
//
// When Invoke returns, no Read, Write or callback of its arguments begins any more. It
// waits for the Writes and callbacks that are running, but for one second at most when
// its context or the connection has ended, and for a Read a tenth of a second at most,
// because a terminal may never answer. What that Read returns later is lost.
//
// # Results that are streams
//
// A result of type [io.ReadCloser] or [io.WriteCloser] works until the caller closes
// it, even if the context of Invoke ends. Close waits for the Close of the stream
// that the method returned, and returns its error. The stream is also closed when the
// connection ends, when the answer has not reached the caller within five seconds, and at once
// if an error was returned with it. A Read or Write that is running delays this by a
// tenth of a second at most. The method's context ends when the stream is closed. A
// stream that is cut by the end of the connection never returns io.EOF.
//
// # Sequences
//
// A method whose only result is an [iter.Seq2] of a type and error is called with
// [InvokeSeq], which describes it. Parameters of that type go with Invoke and InvokeSeq:
//
//	type Store interface {
//		Watch(ctx context.Context, prefix string) iter.Seq2[Event, error]
//		Import(ctx context.Context, rows iter.Seq2[Row, error]) (Stats, error)
//	}
//
//	func (c client) Watch(ctx context.Context, prefix string) iter.Seq2[Event, error] {
//		return plugin.InvokeSeq[Event](ctx, c.remote, "Watch", prefix)
//	}
//
// These are the rules:
//
//   - The values are encoded with gob. A nil pointer, or another value that cannot be
//     encoded, is an error that ends its sequence.
//   - A sequence ends with its first error. If it goes on after that, or after yield has
//     returned false, what it yields is dropped.
//   - A parameter can be ranged over once, while the method runs. It starts when the
//     method ranges over it, runs in a goroutine of Invoke's, and is read ahead by about
//     1 MiB. What the method has not ranged over is lost.
//   - When Invoke returns, the sequences of its arguments have ended. Invoke waits for one
//     that is inside the caller's own code a tenth of a second at most, and its next yield
//     returns false.
//   - A panic in the caller's sequence is an error of that parameter.
//   - A nil sequence arrives as an empty one.
//   - A value that is yielded alone arrives at once, so a method that takes and returns a
//     sequence can converse with its caller. Values that are yielded faster than they can
//     be sent are sent together.
//
// For refuses iter.Seq, which cannot say why it ends, and sequences in callbacks.
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
// be nil. Structs arrive without their unexported fields. Arguments are copies: what a
// method changes in them does not change for the caller. The methods of a value in an
// interface run in the receiver: to call back, pass functions.
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
//	sequence as a parameter     as an io.Reader of its values, as one stream of gob
//	sequence as the result      as an io.Writer to which its values are written so: one more
//	                            parameter, the last; the reply is an empty struct
//
// So a method with one parameter works with a client or server that was written for
// net/rpc or go-plugin. A context is not sent: adding one changes nothing. A
// parameter that is added after several is zero if the caller is older.
func For[T any](impl T, client func(*Remote) T) Plugin {
	t := reflect.TypeFor[T]()
	if t.Kind() != reflect.Interface || t.NumMethod() == 0 {
		panic(fmt.Sprintf(
			"plugin: %v is not an interface with methods: write For[Interface](impl, client)", t))
	}
	if client == nil {
		panic(fmt.Sprintf("plugin: For[%v]: the client function is nil", t))
	}
	p := &interfacePlugin[T]{impl: impl, client: client, methods: make(map[string]*signature)}
	for i := range t.NumMethod() {
		m := t.Method(i)
		s, err := newSignature(m.Type)
		if !m.IsExported() {
			err = errors.New("it is not exported")
		}
		if err != nil {
			panic(fmt.Sprintf("plugin: For[%v]: method %s: %v", t, m.Name, err))
		}
		p.methods[m.Name] = s
	}
	return p
}

// interfacePlugin is the Plugin that For returns.
type interfacePlugin[T any] struct {
	impl    T
	client  func(*Remote) T
	methods map[string]*signature
}

func (p *interfacePlugin[T]) Client(b *MuxBroker, c *rpc.Client) (any, error) {
	return p.client(&Remote{broker: b, client: c, methods: p.methods}), nil
}

func (p *interfacePlugin[T]) Server(b *MuxBroker) (any, error) {
	impl := reflect.ValueOf(&p.impl).Elem()
	if impl.IsNil() {
		return nil, fmt.Errorf("the plugin has no implementation: it calls For[%v] with nil", impl.Type())
	}
	svc := &service{methods: make(map[string]*method)}
	for name, s := range p.methods {
		svc.methods[name] = s.method(b, impl.MethodByName(name))
	}
	return svc, nil
}

// Invoke calls a method of the remote implementation and returns its result. R is
// the result's type, or struct{} if the method returns only an error. The args are
// those after the context. [For] says what can be passed and returned, and what
// Invoke waits for.
//
// When ctx ends, Invoke returns as [Call] does, and the method's context ends.
// Errors keep their identity as those of Call do. An error that a reader, writer,
// sequence or callback of args has returned is itself in the error of Invoke, even if it
// is not registered: errors.Is finds it, if the method returns it or wraps it. If there
// is an error, the result is the zero value.
//
// An unknown method, another R, a wrong number of args, and an arg that cannot be
// assigned to its parameter are errors before anything is sent. An untyped nil can be
// passed if the parameter can be nil. Invoke never panics.
//
// Invoke may be called concurrently, and from a callback.
func Invoke[R any](ctx context.Context, r *Remote, method string, args ...any) (result R, err error) {
	s, err := r.find(ctx, "Invoke", method, len(args))
	if err != nil {
		return result, err
	}
	if s.result.kind == sequenceSlot {
		return result, fmt.Errorf("plugin: Invoke: the result of %s is a %v: call it with InvokeSeq",
			method, s.result)
	}
	if want := reflect.TypeFor[R](); s.result.Type != want {
		return result, fmt.Errorf("plugin: Invoke: the result of %s is a %v and not a %v",
			method, s.result, want)
	}
	v, err := r.invoke(ctx, s, method, args)
	if err != nil {
		return result, err
	}
	result, _ = reflect.TypeAssert[R](v) // a nil interface is no R, and the zero one
	return result, nil
}

// InvokeSeq calls a method of the remote implementation whose only result is an
// iter.Seq2[T, error]. The args are those after the context, as for [Invoke].
//
// Each range over what InvokeSeq returns makes one call, when it starts. The loop
// gets the values in their order. The first error comes with a zero value, and nothing
// follows it: it is that of the sequence, of ctx, of the connection, or of an argument,
// and keeps its identity as those of Invoke do. All values that were yielded before it
// arrive, unless ctx or the connection has ended.
//
// When the loop is left, by break, return or a panic, the method's context ends and its
// yield returns false. The range then waits as Invoke does. A slow loop holds the method
// back, which is at most about 1 MiB ahead.
//
// InvokeSeq may be called concurrently, and what it returns may be ranged over concurrently.
func InvokeSeq[T any](ctx context.Context, r *Remote, method string, args ...any) iter.Seq2[T, error] {
	return func(yield func(T, error) bool) {
		next := func(values *gob.Decoder) (more bool, err error) {
			var v T
			if err := decode(values, &v); err != nil {
				return false, err
			}
			return yield(v, nil), nil
		}
		if err := r.invokeSeq(ctx, reflect.TypeFor[T](), method, args, next); err != nil {
			var none T
			yield(none, err)
		}
	}
}

// invokeSeq calls a method whose result is a sequence of element, and next for its values.
func (r *Remote) invokeSeq(
	ctx context.Context, element reflect.Type, method string, args []any, next nextValue,
) (err error) {
	s, err := r.find(ctx, "InvokeSeq", method, len(args))
	if err != nil {
		return err
	}
	if s.result.kind != sequenceSlot || s.result.element() != element {
		return fmt.Errorf("plugin: InvokeSeq: the result of %s is a %v and not an iter.Seq2[%v, error]",
			method, s.result, element)
	}
	values, w := io.Pipe()
	args = append(slices.Clone(args), w)
	call, leave := context.WithCancel(ctx)
	returned := make(chan error, 1)
	// Ends with the call, which ends with its context; waited for below.
	go func() {
		_, err := r.invoke(call, s, method, args)
		_ = w.CloseWithError(err) // never fails
		returned <- err
	}()
	defer func() { // even if the body of the loop panics
		leave()
		_ = values.Close() // ends a Write that waits for the loop
		callErr := <-returned
		if err != nil && ctx.Err() != nil && errors.Is(callErr, ctx.Err()) {
			err = callErr // it names the method
		}
	}()
	return receiveSequence(ctx, values, next)
}

// find returns the signature of a method that takes so many arguments. An error names
// the caller, which is Invoke or InvokeSeq.
func (r *Remote) find(ctx context.Context, caller, method string, args int) (*signature, error) {
	if ctx == nil || r == nil {
		return nil, fmt.Errorf("plugin: %s was called with a nil context or Remote", caller)
	}
	s := r.methods[method]
	if s == nil {
		return nil, fmt.Errorf("plugin: %s: there is no method %q; there are %s",
			caller, method, nameList(r.methods))
	}
	if s.argumentCount() != args {
		return nil, fmt.Errorf("plugin: %s: %s takes %d arguments after the context and not %d",
			caller, method, s.argumentCount(), args)
	}
	return s, nil
}
