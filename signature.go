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

// serveValue serves x, which is a stream or function, to the peer. closer is called when
// a stream is closed or its serving ends.
func (v *value) serveValue(b *MuxBroker, x reflect.Value, timeout time.Duration, closer func() error) *offer {
	if v.function != nil {
		svc := &service{methods: map[string]*method{"Call": v.function.serve(b, x)}}
		return b.offer(svc, &svc.calls, timeout)
	}
	if v.stream == "Write" {
		return b.offerWriter(x.Interface().(io.Writer), timeout, closer)
	}
	return b.offerReader(x.Interface().(io.Reader), timeout, closer)
}

// dialValue returns the value for which x was sent. closer, if not nil, ends its use.
func (v *value) dialValue(ctx context.Context, b *MuxBroker, x reflect.Value) (_ reflect.Value, closer io.Closer, err error) {
	if v.sent == v.Type {
		return x, nil, nil
	}
	if x.IsZero() {
		return reflect.Zero(v.Type), nil, nil
	}
	id := uint32(x.Uint())
	owned := slices.Contains(resultStreams, v.Type)
	switch {
	case v.function != nil:
		client, err := b.dialRPC(ctx, id)
		if err != nil {
			return reflect.Value{}, nil, err
		}
		return v.function.proxy(ctx, b, client, v.Type), client, nil
	case v.stream == "Write":
		closer, err = b.dialWriter(ctx, id, owned)
	default:
		closer, err = b.dialReader(ctx, id, owned)
	}
	if err != nil {
		return reflect.Value{}, nil, err
	}
	return reflect.ValueOf(closer), closer, nil
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
		arg, closer, err := p.dialValue(ctx, b, s.field(sent, i))
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

// runStream is run for a function that returns a stream, which it serves. The context
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
	l := s.result.serveValue(b, out[0], brokerTimeout, func() error {
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
