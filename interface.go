package plugin

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net/rpc"
	"reflect"
	"slices"
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
	var offers []*offer
	defer func() { stopOffers(offers) }()
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
			l := p.serveValue(r.broker, x, untilStopped, nil)
			offers = append(offers, l)
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
	v, _, err = s.result.dialValue(ctx, r.broker, reply.Elem())
	return v, err
}

// stopOffers ends the serving of arguments. It waits for a Write or callback that is
// running, and until readTimeout for a Read.
func stopOffers(offers []*offer) {
	for _, l := range offers {
		l.end()
	}
	for _, l := range offers {
		if l.reads {
			waitFor(readTimeout, l.uses.allDone())
		} else {
			l.uses.Wait()
		}
	}
}

// giveBack ends the use of arguments. If the method has returned, it waits until the
// peer has all that was written, and returns the error of a writer that the method
// has not seen.
func giveBack(taken []io.Closer, returned bool) (err error) {
	for _, c := range taken {
		w, ok := c.(*dialledWriter)
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
		if w, ok := c.(*dialledWriter); ok {
			seen := w.failed.Load()
			if failed := w.Close(); !seen {
				err = cmp.Or(err, failed)
			}
		}
	}
	return err
}
