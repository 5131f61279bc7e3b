package plugin

import (
	"bytes"
	"context"
	"encoding/gob"
	"errors"
	"io"
	"math/rand/v2"
	"net/rpc"
	"reflect"
	"strings"
	"testing"

	"github.com/hashicorp/go-hclog"
)

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

// holder holds an interface.
type holder struct{ V any }

func init() { gob.Register(Point{}) }

// shapes are values of the types that parameters have.
var shapes = []any{
	holder{}, holder{1}, holder{"x"}, holder{Point{1, 0}}, holder{&Point{}}, holder{(*Point)(nil)},
	holder{[]string{"not registered"}}, &holder{Point{}}, []holder{{1}, {}}, map[string]holder{"x": {2}},
	Point{}, Point{1, 2}, &Point{}, &Point{3, 4}, (*Point)(nil), []*Point{{}, {5, 6}}, []*Point{nil},
	picky{}, picky{1}, &picky{}, &picky{2}, []picky{{3}}, []picky{{}}, map[string]picky{"x": {}},
	struct{}{}, [2]struct{}{}, struct{ F, G any }{1, nil}, struct{ F *int }{}, true, false, "", "text",
	0, 7, int8(-8), uint32(9), 0.5, complex(1, 2), []byte(nil), []byte("bytes"), [3]int{1, 2, 3},
	map[int]string(nil), map[int]string{1: "x"}, [][]map[string]bool{{{"x": true}, nil}, nil},
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
		f.Add(seed)
	}
	there := make(chan *MuxBroker, 1)
	host, _ := TestPluginRPCConn(f, PluginSet{"test": brokerPlugin{there}}, nil)
	_, err := host.Dispense("test")
	check(f, err)
	b := <-there
	f.Fuzz(func(t *testing.T, seed uint64) { fuzzInvoke(t, host.broker, b, rand.New(rand.NewPCG(seed, 0))) })
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
	context  bool            // its first parameter is a context
	args     []any           // what it is called with, without a context
	returned int             // which argument it returns; -1 for none
	seen     []reflect.Value // what it was called with
}

// fuzzCallback is the type of a function that is an argument.
type fuzzCallback = func(int) (int, error)

func plusOne(n int) (int, error) { return n + 1, nil }

// newFuzzMethod returns a method that returns one of its arguments, or nothing.
func newFuzzMethod(r *rand.Rand) *fuzzMethod {
	m := &fuzzMethod{context: r.IntN(2) == 1, returned: -1}
	var in []reflect.Type
	out := []reflect.Type{typeOfError}
	if m.context {
		in = append(in, typeOfContext)
	}
	for i := range r.IntN(5) {
		served := fuzzServed[r.IntN(len(fuzzServed))]
		if r.IntN(3) == 0 {
			in = append(in, served.typ)
			m.args = append(m.args, served.args[r.IntN(2)])
			continue
		}
		arg := shapes[r.IntN(len(shapes))]
		in = append(in, reflect.TypeOf(arg))
		m.args = append(m.args, arg)
		if r.IntN(2) == 1 {
			m.returned = i
			out = []reflect.Type{reflect.TypeOf(arg), typeOfError}
		}
	}
	m.typ = reflect.FuncOf(in, out, false)
	return m
}

// fuzzServed are the types of arguments that are served, and not sent: one that is nil,
// and one that is not.
var fuzzServed = []struct {
	typ  reflect.Type
	args [2]any
}{
	{typeOfReader, [2]any{nil, strings.NewReader("")}},
	{typeOfWriter, [2]any{nil, io.Discard}},
	{reflect.TypeFor[fuzzCallback](), [2]any{nil, fuzzCallback(plusOne)}},
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

// sent returns the struct that is sent, with a number for each argument that is served.
func (m *fuzzMethod) sent(s *signature) reflect.Value {
	sent := reflect.New(s.sentType).Elem()
	for i, p := range s.params {
		switch {
		case p.sentType == p.Type:
			s.param(sent, i).Set(reflect.ValueOf(m.args[i]))
		case m.args[i] != nil:
			s.param(sent, i).SetUint(1)
		}
	}
	return sent
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
	ctx, cancel := context.WithTimeout(context.Background(), hangs)
	defer cancel()
	remote := &Remote{broker: here, client: c}
	got, err := remote.invoke(ctx, s, "Call", m.args)

	arrives, lost := throughGob(m.sent(s))
	if called := m.seen != nil; called != (lost == nil) {
		t.Errorf("%v: called: %v; what gob says: %v; the error: %v", m.typ, called, lost, err)
	}
	if lost == nil {
		m.checkSeen(t, s, arrives)
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
func (m *fuzzMethod) checkSeen(t *testing.T, s *signature, arrives reflect.Value) {
	t.Helper()
	for i, got := range m.seen {
		want := s.param(arrives, i)
		served := s.params[i].sentType != s.params[i].Type
		if served && got.IsNil() != want.IsZero() {
			t.Errorf("%v: argument %d is nil: %v", m.typ, i, got.IsNil())
		}
		if !served && !reflect.DeepEqual(got.Interface(), want.Interface()) {
			t.Errorf("%v: argument %d, %#v, arrives as %#v and not %#v", m.typ, i, m.args[i], got, want)
		}
	}
}
