package plugin

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/gob"
	"errors"
	"io"
	"math/rand"
	"net/rpc"
	"reflect"
	"strings"
	"testing"
	"testing/quick"
	"time"

	"github.com/hashicorp/go-hclog"
)

// ---- RPC streams ----

// Box holds any value, and Pair is one that it may hold.
type (
	Box  struct{ V any }
	Pair struct {
		Name   string
		Number int
	}
)

func init() {
	gob.Register(Box{})
	gob.Register(Pair{})
	gob.Register([]any{})
	gob.Register(map[string]any{})
	gob.Register([2]any{})
	gob.Register(time.Time{})
}

// nested has registered types in an interface in an interface.
var nested = Box{[]any{
	Box{[]any{Pair{"x", 1}, map[string]any{"x": Pair{}}, [2]any{1, 2}, time.Unix(1, 0).UTC()}},
}}

// notGob are beginnings of a stream that claim more than comes, or are no gob.
var notGob = [][]byte{
	{0xfc, 0x40, 0, 0, 1, 0xff},
	{0xf8, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff},
	{0x80, 1, 2, 3},
	{0},
	{0xfc, 0x40, 0, 0, 0, 1, 2, 3},
	{0xfc, 0x40},
	{0x03, 0x01, 0x02, 0x03},
}

// script is a connection to a peer that sends what is read, and takes anything.
type script struct{ io.Reader }

func (script) Write(p []byte) (int, error) { return len(p), nil }
func (script) Close() error                { return nil }

// addStreams adds beginnings of streams: no gob, and a header with each body.
func addStreams(f *testing.F, h any) {
	for _, sent := range notGob {
		f.Add(sent)
	}
	for _, body := range []any{nested, "text", struct{}{}} {
		var sent bytes.Buffer
		enc := gob.NewEncoder(&sent)
		for range 2 {
			check(f, errors.Join(enc.Encode(h), enc.Encode(body)))
		}
		f.Add(sent.Bytes())
		f.Add(sent.Bytes()[:sent.Len()-2])
	}
}

// ending has methods that return soon after their callers have left.
type ending struct{}

func (ending) Box(in Box, out *Box) error {
	*out = in
	return nil
}

func (ending) Wait(ctx context.Context, _ string, _ *string) error {
	<-ctx.Done()
	return ctx.Err()
}

// A server ends, with a reason, whatever its caller sends.
func FuzzRPCServer(f *testing.F) {
	for _, method := range []string{"Plugin.Box", "Plugin.Wait", "Plugin.Missing"} {
		addStreams(f, rpc.Request{ServiceMethod: method, Seq: 1})
	}
	addStreams(f, rpc.Request{ServiceMethod: "Context.Cancel", Seq: 1 | 1<<63})
	f.Fuzz(func(t *testing.T, sent []byte) {
		svc, err := newService(ending{})
		check(t, err)
		services := map[string]*service{"Plugin": svc}
		s := newRPCServer(script{bytes.NewReader(sent)}, services, hclog.NewNullLogger(), true)
		if s.answerCalls(context.Background()) == nil {
			t.Error("the end has no reason")
		}
	})
}

// The calls of a client end, whatever its peer sends.
func FuzzRPCClient(f *testing.F) {
	addStreams(f, response{Seq: 1})
	addStreams(f, response{Seq: 1, Error: "failed", Is: "io.EOF\nunknown"})
	f.Fuzz(func(t *testing.T, sent []byte) {
		wait, begin := io.Pipe() // the script arrives when there are calls
		c := newRPCClient(script{io.MultiReader(wait, bytes.NewReader(sent))}, anyPeer, spawn)
		defer c.Close()
		first := c.Go("Plugin.Box", Box{}, new(Box), nil)
		second := make(chan error, 1)
		go func() { second <- Call(context.Background(), c, "Plugin.Box", Box{}, new(Box)) }()
		check(t, begin.Close())
		receive(t, "the first call", first.Done)
		receive(t, "the second call", second)
		if c.Call("Plugin.Box", Box{}, new(Box)) == nil {
			t.Error("a stream that has ended replies")
		}
	})
}

// ---- What a plugin prints ----

// A line is no handshake, or the same one when it is written again.
func FuzzHandshake(f *testing.F) {
	for _, test := range handshakeLines {
		f.Add(test.line)
	}
	f.Fuzz(func(t *testing.T, line string) {
		h, err := parseHandshake(line)
		if err != nil {
			return
		}
		again, err := parseHandshake(h.String())
		if err != nil {
			t.Fatalf("%q is read, and written as %q: %v", line, h, err)
		}
		if describe(again) != describe(h) {
			t.Fatalf("%q is read as %q, and that as %q", line, describe(h), describe(again))
		}
	})
}

// Any output makes as many records as it has lines.
func FuzzLogLine(f *testing.F) {
	for _, test := range stderrLines {
		f.Add([]byte(test.line), 1)
	}
	f.Add([]byte("panic: boom\n\ngoroutine 1 [running]:\nmain.main()\n\t/x.go:1\nafter"), 20)
	f.Fuzz(func(t *testing.T, output []byte, split int) {
		const limit = 200
		split = max(0, min(split, len(output)))
		records, text := logged(t, limit, string(output[:split]), string(output[split:]))
		lines := bytes.Count(output, []byte("\n"))
		if len(output) > 0 && output[len(output)-1] != '\n' {
			lines++
		}
		if len(records) != lines {
			t.Errorf("%d lines make %d records", lines, len(records))
		}
		checkLogIsSafe(t, text, lines)
		for _, r := range records {
			level, _, _ := strings.Cut(r, ":")
			if l := hclog.LevelFromString(level); l == hclog.NoLevel || l == hclog.Off || len(r) > 10*limit {
				t.Errorf("a record of %d bytes at level %q", len(r), level)
			}
		}
	})
}

// ---- All shapes ----

// byteSource is a source of random numbers that are in bytes, and then 0.
type byteSource struct{ data []byte }

func (s *byteSource) Seed(int64) {}

func (s *byteSource) Int63() int64 {
	var b [8]byte
	s.data = s.data[copy(b[:], s.data):]
	return int64(binary.LittleEndian.Uint64(b[:]) >> 1)
}

// holder holds interfaces, also with what gob does not encode.
type holder struct {
	V any
	M map[string]any
}

func (*holder) Generate(r *rand.Rand, _ int) reflect.Value {
	h := &holder{V: fuzzValue(reflect.TypeFor[any](), r).Interface()}
	if r.Intn(2) == 1 {
		h.M = map[string]any{"x": h.V}
	}
	return reflect.ValueOf(h)
}

// picky cannot encode its zero value.
type picky struct{ V int }

func (p picky) GobEncode() ([]byte, error) {
	if p.V == 0 {
		return nil, errors.New("a zero picky")
	}
	return []byte{byte(p.V)}, nil
}

func (p *picky) GobDecode(data []byte) error {
	p.V = int(data[0])
	return nil
}

// Point is a plain struct.
type Point struct{ X, Y int }

func init() { gob.Register(Point{}) }

// shapeTypes are the types of which others are made.
var shapeTypes = []reflect.Type{
	reflect.TypeFor[any](),
	reflect.TypeFor[*holder](),
	reflect.TypeFor[Point](),
	reflect.TypeFor[picky](),
	reflect.TypeFor[struct{}](),
	reflect.TypeFor[bool](),
	reflect.TypeFor[int](),
	reflect.TypeFor[int8](),
	reflect.TypeFor[uint32](),
	reflect.TypeFor[float64](),
	reflect.TypeFor[complex128](),
	reflect.TypeFor[string](),
	reflect.TypeFor[[]byte](),
	reflect.TypeFor[map[int]string](),
}

// fuzzType returns a type that gob can encode.
func fuzzType(r *rand.Rand, depth int) reflect.Type {
	kinds := 10
	if depth == 0 {
		kinds = 5
	}
	switch r.Intn(kinds) {
	case 9:
		return reflect.PointerTo(fuzzType(r, depth-1))
	case 8:
		return reflect.SliceOf(fuzzType(r, depth-1))
	case 7:
		return reflect.MapOf(reflect.TypeFor[string](), fuzzType(r, depth-1))
	case 6:
		return reflect.ArrayOf(r.Intn(3), fuzzType(r, depth-1))
	case 5:
		return reflect.StructOf([]reflect.StructField{
			{Name: "F", Type: fuzzType(r, depth-1)},
			{Name: "G", Type: fuzzType(r, depth-1)},
		})
	}
	return shapeTypes[r.Intn(len(shapeTypes))]
}

// fuzzValue returns a value of that type.
func fuzzValue(t reflect.Type, r *rand.Rand) reflect.Value {
	v := reflect.New(t).Elem()
	if t.Kind() == reflect.Interface {
		values := []any{nil, 1, "x", Point{1, 0}, &Point{}, []string{"not registered"}, (*Point)(nil)}
		if x := values[r.Intn(len(values))]; x != nil {
			v.Set(reflect.ValueOf(x))
		}
	} else if x, ok := quick.Value(t, r); ok { // it cannot make an interface inside
		v.Set(x)
	}
	return v
}

// throughGob returns v as it arrives if it is all that is sent.
func throughGob(v reflect.Value) (_ reflect.Value, err error) {
	defer recoverTo(&err)
	if err := checkNil(v); err != nil {
		return v, err
	}
	p := reflect.New(v.Type())
	p.Elem().Set(v)
	to := reflect.New(v.Type())
	var buf bytes.Buffer
	if err := gob.NewEncoder(&buf).EncodeValue(p); err != nil {
		return v, err
	}
	return to.Elem(), gob.NewDecoder(&buf).DecodeValue(to)
}

// A function with any parameters sees what gob makes of them, and a failure is that
// of one call.
func FuzzInvoke(f *testing.F) {
	for seed := range uint64(100) {
		f.Add(noise(200, seed))
	}
	there := make(chan *MuxBroker, 1)
	host, _ := TestPluginRPCConn(f, PluginSet{"test": brokerPlugin{there}}, nil)
	_, err := host.Dispense("test")
	check(f, err)
	b := <-there
	f.Fuzz(func(t *testing.T, data []byte) { fuzzInvoke(t, host.broker, b, rand.New(&byteSource{data})) })
}

// brokerPlugin tells the broker of the plugin's side.
type brokerPlugin struct{ there chan *MuxBroker }

func (p brokerPlugin) Server(b *MuxBroker) (any, error) {
	p.there <- b
	return new(rpcEcho), nil
}

func (brokerPlugin) Client(_ *MuxBroker, c *rpc.Client) (any, error) { return c, nil }

// rpcEcho has a method, as what is dispensed must.
type rpcEcho struct{}

func (*rpcEcho) Echo(in string, out *string) error {
	*out = in
	return nil
}

// fuzzMethod is a method with random parameters, and what a call of it has seen.
type fuzzMethod struct {
	typ      reflect.Type
	context  bool // its first parameter is a context
	returned int  // which argument it returns; -1 for none
	seen     []reflect.Value
}

// fuzzCallback is the type of a function that is an argument.
type fuzzCallback = func(int) (int, error)

// newFuzzMethod returns a method that returns one of its arguments, or nothing.
func newFuzzMethod(r *rand.Rand) *fuzzMethod {
	m := &fuzzMethod{context: r.Intn(2) == 1, returned: -1}
	var in []reflect.Type
	out := []reflect.Type{typeOfError}
	if m.context {
		in = append(in, typeOfContext)
	}
	served := []reflect.Type{typeOfReader, typeOfWriter, reflect.TypeFor[fuzzCallback]()}
	for i := range r.Intn(5) {
		if n := r.Intn(9); n < len(served) {
			in = append(in, served[n])
			continue
		}
		in = append(in, fuzzType(r, 3))
		if r.Intn(2) == 1 {
			m.returned = i
			out = []reflect.Type{in[len(in)-1], typeOfError}
		}
	}
	m.typ = reflect.FuncOf(in, out, false)
	return m
}

// call is the method. It uses its arguments.
func (m *fuzzMethod) call(t *testing.T, in []reflect.Value) []reflect.Value {
	m.seen = in
	if m.context {
		m.seen = in[1:]
	}
	for _, v := range m.seen {
		if err := useArgument(v.Interface()); err != nil {
			t.Errorf("using a %v: %v", v.Type(), err)
		}
	}
	result := []reflect.Value{reflect.Zero(typeOfError)}
	if m.returned >= 0 {
		result = []reflect.Value{m.seen[m.returned], result[0]}
	}
	return result
}

// useArgument reads, writes or calls an argument that can be.
func useArgument(v any) error {
	var err error
	switch arg := v.(type) {
	case io.Reader:
		_, err = io.Copy(io.Discard, arg)
	case io.Writer:
		_, err = io.WriteString(arg, "written")
	case fuzzCallback:
		if arg != nil {
			_, err = arg(1)
		}
	}
	return err
}

// fuzzServed returns an argument that is served, and not sent.
func fuzzServed(t reflect.Type) any {
	switch t {
	case reflect.TypeFor[io.Reader]():
		return strings.NewReader("x")
	case reflect.TypeFor[io.Writer]():
		return io.Discard
	}
	return fuzzCallback(func(n int) (int, error) { return n + 1, nil })
}

// fuzzArguments returns arguments for a signature, and the struct that is sent with a
// number for each of those that are served.
func fuzzArguments(s *signature, r *rand.Rand) (args []any, sent reflect.Value) {
	sent = reflect.New(s.sent).Elem()
	for i, p := range s.params {
		switch {
		case p.sent == p.Type:
			v := fuzzValue(p.Type, r)
			s.param(sent, i).Set(v)
			args = append(args, v.Interface())
		case r.Intn(2) == 1:
			s.param(sent, i).SetUint(1)
			args = append(args, fuzzServed(p.Type))
		default:
			args = append(args, reflect.Zero(p.Type).Interface())
		}
	}
	return args, sent
}

// fuzzInvoke calls a random method with random arguments, and compares the result
// with what gob alone makes of them.
func fuzzInvoke(t *testing.T, here, there *MuxBroker, r *rand.Rand) {
	m := newFuzzMethod(r)
	s, err := newSignature(m.typ)
	if err != nil {
		t.Fatalf("%v: %v", m.typ, err)
	}
	f := reflect.MakeFunc(m.typ, func(in []reflect.Value) []reflect.Value { return m.call(t, in) })
	id, stop := there.ServeRPC(&service{methods: map[string]*method{"Call": s.method(there, f)}})
	defer stop()
	c, err := here.DialRPC(id)
	check(t, err)
	defer c.Close()
	args, sent := fuzzArguments(s, r)
	ctx, cancel := context.WithTimeout(context.Background(), hangs)
	defer cancel()
	got, err := s.invoke(ctx, here, c, "Call", args)

	arrives, lost := throughGob(sent)
	if called := m.seen != nil; called != (lost == nil) {
		t.Errorf("%v: called: %v; what gob says: %v; the error: %v", m.typ, called, lost, err)
	}
	if lost == nil {
		m.checkSeen(t, s, args, arrives)
	}
	if lost == nil && m.returned >= 0 {
		result := m.seen[m.returned]
		arrives, lost = throughGob(result)
		if err == nil && lost == nil && !reflect.DeepEqual(got.Interface(), arrives.Interface()) {
			t.Errorf("%v: the result %#v arrives as %#v and not %#v", m.typ, result, got, arrives)
		}
	}
	if (err == nil) != (lost == nil) || errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("%v: the error is %v; what gob says: %v", m.typ, err, lost)
	}
	if err := c.Call("Plugin.Nothing", 1, nil); !errors.As(err, new(rpc.ServerError)) {
		t.Errorf("%v: afterwards: %v", m.typ, err)
	}
}

// checkSeen compares the arguments that the method has seen with the struct as it
// arrives.
func (m *fuzzMethod) checkSeen(t *testing.T, s *signature, args []any, arrives reflect.Value) {
	t.Helper()
	for i, got := range m.seen {
		want := s.param(arrives, i)
		served := s.params[i].sent != s.params[i].Type
		if served && got.IsNil() != want.IsZero() {
			t.Errorf("%v: argument %d is nil: %v", m.typ, i, got.IsNil())
		}
		if !served && !reflect.DeepEqual(got.Interface(), want.Interface()) {
			t.Errorf("%v: argument %d, %#v, arrives as %#v and not %#v", m.typ, i, args[i], got, want)
		}
	}
}
