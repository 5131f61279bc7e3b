package plugin_test

import (
	"bytes"
	"context"
	"encoding/gob"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/rpc"
	"reflect"
	"runtime"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/muxplug/plugin"
)

// ---- Values ----

// Pair has no interface, and its fields are those of no other type here.
type Pair struct {
	Name   string
	Number int
}

// Holder is a different type for each T.
type Holder[T any] struct{ V T }

// Tree is recursive.
type Tree struct {
	Left, Right *Tree
	Leaf        any
}

// Moody encodes itself. It is encoded and decoded twice when a method returns
// its argument, and fails or panics at one of these steps.
type Moody struct {
	Fails  int // the step, from 1; 0 for none
	Panics bool
	Text   string
	step   int // the last
}

func (m *Moody) next() error {
	m.step++
	switch {
	case m.step != m.Fails:
		return nil
	case m.Panics:
		panic("moody panic")
	}
	return errors.New("moody error")
}

func (m Moody) GobEncode() ([]byte, error) {
	if err := m.next(); err != nil {
		return nil, err
	}
	return fmt.Appendf(nil, "%d %t %q %d", m.Fails, m.Panics, m.Text, m.step), nil
}

func (m *Moody) GobDecode(b []byte) error {
	if _, err := fmt.Sscanf(string(b), "%d %t %q %d", &m.Fails, &m.Panics, &m.Text, &m.step); err != nil {
		return err
	}
	return m.next()
}

// Ring encodes itself, through a pointer, and holds itself.
type Ring struct {
	Self *Ring
	V    any
	Name string
}

func newRing(name string) *Ring {
	r := &Ring{Name: name}
	r.Self, r.V = r, r
	return r
}

func (r *Ring) GobEncode() ([]byte, error) { return []byte(r.Name), nil }
func (r *Ring) GobDecode(b []byte) error {
	*r = *newRing(strings.TrimRight(string(b), " "))
	return nil
}

// Padded encodes itself in another length each time.
type Padded struct{ Text string }

var padding atomic.Int32

func (p Padded) GobEncode() ([]byte, error) {
	return []byte(p.Text + strings.Repeat(" ", int(padding.Add(7)%16))), nil
}

func (p *Padded) GobDecode(b []byte) error {
	p.Text = strings.TrimRight(string(b), " ")
	return nil
}

// notRegistered cannot be encoded in an interface.
type notRegistered struct{ N int }

// registeredValues are values of all types that can be in an interface.
var registeredValues = []any{
	Pair{"x", 1}, Tree{Leaf: 1}, Moody{Text: "x"}, newRing("x"), Padded{"x"},
	map[string]any{}, [2]any{1, 2}, time.Unix(1, 0).UTC(),
	Holder[int]{1}, Holder[string]{"x"}, Holder[any]{1}, Holder[[]Pair]{},
	Holder[map[int]any]{}, Holder[*Tree]{}, Holder[Holder[any]]{},
}

// allTypes has them in an interface in an interface.
var allTypes = Box{[]any{Box{registeredValues}}}

func init() {
	for _, v := range registeredValues {
		gob.Register(v)
	}
}

// source makes random values.
type source struct {
	*rand.Rand
	*model
	nils bool // with interfaces that are nil
	bad  bool // with values that cannot be encoded, or fail later
}

func (s source) text() string { return fmt.Sprintf("%x", s.Int64N(1<<s.IntN(60))) }

func (s source) moody() Moody {
	m := Moody{Text: s.text()}
	if s.bad && s.IntN(2) == 0 {
		m.Fails, m.Panics = []int{1, 2, 3, 3, 3, 4}[s.IntN(6)], s.IntN(2) == 0
	}
	return m
}

func (s source) tree(depth int) *Tree {
	t := &Tree{Leaf: s.any(depth - 1)}
	if depth > 0 && s.IntN(2) == 0 {
		t.Left, t.Right = s.tree(depth-1), s.tree(depth-2)
	}
	return t
}

func (s source) list(depth int) []any {
	list := make([]any, s.IntN(4))
	for i := range list {
		list[i] = s.any(depth - 1)
	}
	return list
}

func (s source) mapped(depth int) map[string]any {
	m := make(map[string]any)
	for _, v := range s.list(depth) {
		m[s.text()] = v
	}
	return m
}

// any returns a value for an interface.
func (s source) any(depth int) any {
	values := []any{
		s.IntN(1000), s.text(), Pair{s.text(), s.IntN(5)}, Holder[int]{s.IntN(3)},
		Holder[string]{s.text()}, Holder[[]Pair]{make([]Pair, s.IntN(3))},
		s.moody(), Padded{s.text()}, newRing(s.text()), time.Unix(s.Int64N(1e9), 0).UTC(),
	}
	if depth > 0 && s.IntN(2) == 0 {
		v := s.any(depth - 1)
		values = []any{
			Holder[any]{v}, Holder[map[int]any]{map[int]any{s.IntN(9): v}},
			Holder[Holder[any]]{Holder[any]{v}}, Box{v}, [2]any{v, s.any(depth - 1)},
			Holder[*Tree]{s.tree(depth - 1)}, s.list(depth), s.mapped(depth),
		}
	}
	if s.nils {
		values = append(values, nil)
	}
	if s.bad {
		values = append(values, make(chan int), func() {}, notRegistered{1}, (*Pair)(nil), Ring{})
	}
	return values[s.IntN(len(values))]
}

// ---- A model of calls ----

// mirror returns what it is given. Each method has an argument of another form.
type mirror struct{ *testServer }

func mirrored[T any](in T, out *T) error {
	*out = in
	return nil
}

func (mirror) Any(in any, out *any) error                       { return mirrored(in, out) }
func (mirror) Pair(in Pair, out *Pair) error                    { return mirrored(in, out) }
func (mirror) Tree(in *Tree, out *Tree) error                   { return mirrored(*in, out) }
func (mirror) Ring(in *Ring, out *Ring) error                   { return mirrored(*in, out) }
func (mirror) Moody(in Moody, out *Moody) error                 { return mirrored(in, out) }
func (mirror) Padded(in Padded, out *Padded) error              { return mirrored(in, out) }
func (mirror) List(in []any, out *[]any) error                  { return mirrored(in, out) }
func (mirror) Map(in map[string]any, out *map[string]any) error { return mirrored(in, out) }
func (mirror) Wide(in Holder[int64], out *Holder[int64]) error  { return mirrored(in, out) }
func (mirror) Narrow(in Holder[int8], out *Holder[int8]) error  { return mirrored(in, out) }
func (mirror) Trim(in Trimmed, out *Trimmed) error              { return mirrored(in, out) }

// Trimmed lacks fields of Tree that hold interfaces.
type Trimmed struct{ Right *Trimmed }

// forms are the methods of mirror, and what makes arguments that fit.
var forms = map[string]func(s source) any{
	"Any":    func(s source) any { v := s.any(3); return &v },
	"Box":    func(s source) any { return Box{s.any(3)} },
	"Pair":   func(s source) any { return Pair{s.text(), s.IntN(3)} },
	"Tree":   func(s source) any { return s.tree(3) },
	"Ring":   func(s source) any { return newRing(s.text()) },
	"Moody":  func(s source) any { return s.moody() },
	"Padded": func(s source) any { return Padded{s.text()} },
	"List":   func(s source) any { return s.list(3) },
	"Map":    func(s source) any { return s.mapped(3) },
	"Wide":   func(s source) any { return Holder[int]{s.IntN(3000)} },
	"Narrow": func(s source) any { return Holder[int]{s.IntN(300)} },
	"Trim": func(s source) any {
		s.nils = false
		return s.tree(3)
	},
}

// parameters returns pointers to a method's argument and reply.
func parameters(method string) (arg, reply any) {
	m, _ := reflect.TypeFor[mirror]().MethodByName(method)
	return reflect.New(m.Type.In(1)).Interface(), reflect.New(m.Type.In(2).Elem()).Interface()
}

// The steps of a call of mirror. One that fails is an error of that call alone.
const (
	encodeArgument = 1 + iota
	decodeArgument
	encodeReply
	decodeReply
)

// model is one gob stream.
type model struct {
	enc *gob.Encoder
	dec *gob.Decoder
}

// newModel returns a stream on which all types are defined. Where a value is
// skipped or fails, gob alone loses the definitions inside it.
func newModel(t testing.TB) *model {
	var sent bytes.Buffer
	m := &model{gob.NewEncoder(&sent), gob.NewDecoder(&sent)}
	if failed, _ := m.call("Box", allTypes, new(Box)); failed != 0 {
		t.Fatal("gob alone fails at step", failed)
	}
	return m
}

// call is what gob alone makes of a call. It sets reply, and returns the step
// that fails, or 0.
func (m *model) call(method string, arg, reply any) (failed int, panics bool) {
	in, out := parameters(method)
	for i, step := range []func() error{
		func() error { return m.enc.Encode(arg) },
		func() error { return m.dec.Decode(in) },
		func() error {
			reflect.ValueOf(out).Elem().Set(reflect.Indirect(reflect.ValueOf(in).Elem()))
			return m.enc.Encode(out)
		},
		func() error { return m.dec.Decode(reply) },
	} {
		err := func() (err error) {
			defer func() {
				if p := recover(); p != nil {
					panics, err = true, fmt.Errorf("panic: %v", p)
				}
			}()
			return step()
		}()
		if err != nil {
			return i + 1, panics
		}
	}
	return 0, false
}

// randomCall is a call of mirror with random values.
type randomCall struct {
	source
	host, plugin bool // which ends are this package's

	method  string
	arg     any
	reply   any  // what the reply is decoded into, and
	want    any  // what it should be
	missing bool // the method does not exist
	dropped bool // the caller does not want the reply
	failed  int  // the step that fails, or 0
	panics  bool // it panics
}

// newCall returns a random call, and what should become of it.
func (s source) newCall(host, plugin bool) *randomCall {
	names := slices.Sorted(maps.Keys(forms))
	// otherThan returns any name in one of n cases.
	otherThan := func(name string, n int) string {
		if s.IntN(n) == 0 {
			return names[s.IntN(len(names))]
		}
		return name
	}
	c := &randomCall{host: host, plugin: plugin}
	c.method = names[s.IntN(len(names))]
	from, into := otherThan(c.method, 4), otherThan(c.method, 8)
	c.missing, c.dropped = s.IntN(20) == 0, s.IntN(20) == 0
	// gob does not find the end of a nil interface that it skips.
	skips := from != c.method || into != c.method || c.missing && !plugin || c.dropped && !host
	s.nils = !skips
	s.bad = s.IntN(2) == 0
	c.source = s

	c.arg = forms[from](s)
	_, c.reply = parameters(into)
	_, c.want = parameters(into)
	c.failed, c.panics = s.model.call(c.method, c.arg, c.want)
	if c.missing && c.failed != encodeArgument {
		c.method, c.failed, c.panics = "Nowhere", decodeArgument, false
	}
	if c.dropped {
		c.reply = nil
	}
	if c.dropped && c.failed == decodeReply {
		c.failed = 0 // the reply is skipped
	}
	c.method = "Plugin." + c.method
	return c
}

// isOurs reports whether this package does the step that fails.
func (c *randomCall) isOurs() bool {
	switch c.failed {
	case encodeArgument, decodeReply:
		return c.host
	case decodeArgument, encodeReply:
		return c.plugin
	}
	return false
}

// endsPeer reports whether the failure ends a connection or process of net/rpc alone.
func (c *randomCall) endsPeer() bool {
	return c.failed != 0 && !c.isOurs() && (c.failed != decodeArgument || c.panics)
}

// do makes the call in one of several ways. If it returns canceled, the call was
// cancelled before it was answered.
func (c *randomCall) do(client *rpc.Client) (err error, canceled bool) {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	switch c.IntN(4) {
	case 0:
		if c.failed != decodeReply { // would end the client
			return client.Call(c.method, c.arg, c.reply), false
		}
	case 1:
		return plugin.Call(context.Background(), client, c.method, c.arg, c.reply), false
	case 2:
		go cancel()
	}
	err = plugin.Call(ctx, client, c.method, c.arg, c.reply)
	return err, errors.Is(err, context.Canceled)
}

// check makes the call and compares what comes of it with the model. A call that was
// cancelled must not have changed its reply.
func (c *randomCall) check(t testing.TB, client *rpc.Client) {
	err, canceled := c.do(client)
	if canceled {
		if c.reply != nil && !reflect.ValueOf(c.reply).Elem().IsZero() {
			t.Errorf("%s was cancelled, and replied %+v", c.method, c.reply)
		}
		return
	}
	remote := c.failed == decodeArgument || c.failed == encodeReply
	switch {
	case (err == nil) != (c.failed == 0):
		t.Errorf("%s of %+v returned %v; gob alone fails at step %d", c.method, c.arg, err, c.failed)
	case err == nil && !c.dropped && !reflect.DeepEqual(c.reply, c.want):
		t.Errorf("%s of %+v replied %+v and not %+v", c.method, c.arg, c.reply, c.want)
	case err != nil && isA[rpc.ServerError](err) != remote:
		t.Errorf("%s of %+v returned %T: %v", c.method, c.arg, err, err)
	case c.isOurs():
		errorSays(t, err, c.method)
	}
}

// exchange sends values of all types to and fro.
func exchange(t testing.TB, c *rpc.Client) {
	t.Helper()
	var want Box
	newModel(t).call("Box", allTypes, &want)
	if got := mustCall[Box](t, c, "Box", allTypes); !reflect.DeepEqual(got, want) {
		t.Errorf("%+v came back as %+v", want, got)
	}
}

// Many callers send random values in random order over one connection. Each
// call returns what gob alone makes of it, or an error of its own.
func TestRandomCalls(t *testing.T) {
	for _, wire := range wires {
		t.Run(wire.name, func(t *testing.T) {
			t.Parallel()
			for range 10 {
				c, seed := wire.connect(t, mirror{newTestServer()}), rand.Uint64()
				if !wire.host || !wire.plugin {
					// net/rpc sends the definitions of some types inside values
					// that use them, and they are lost with the value.
					exchange(t, c)
				}
				concurrently(t, 8, func(i int) {
					s := source{Rand: rand.New(rand.NewPCG(seed, uint64(i))), model: newModel(t)}
					for range 25 {
						if call := s.newCall(wire.host, wire.plugin); !call.endsPeer() {
							call.check(t, c)
						}
					}
				})
				exchange(t, c)
				if t.Failed() {
					t.Fatal("the seed was", seed)
				}
			}
		})
	}
}

// The error of a value that cannot be encoded, or does not fit, names its type.
func TestBadValues(t *testing.T) {
	for _, test := range []struct {
		method     string
		arg, reply any
		words      []string
	}{
		{"Box", Box{notRegistered{1}}, new(Box), []string{"Box", "notRegistered", "gob.Register"}},
		{"Box", Box{make(chan int)}, new(Box), []string{"Box", "chan int"}},
		{"Box", nil, new(Box), []string{"nil"}},
		{"Box", (*Box)(nil), new(Box), []string{"Box", "nil"}},
		{"Pair", "text", new(Pair), []string{"Pair", "ProtocolVersion"}},
		{"Pair", Tree{Leaf: 1}, new(Pair), []string{"Pair", "ProtocolVersion"}},
		{"Echo", Pair{"x", 1}, nil, []string{"string", "the type Pair = struct {", "ProtocolVersion"}},
		{"Echo", 1, nil, []string{"string", "the peer sent the type int", "ProtocolVersion"}},
		{"Echo", struct{ A0, A1 int }{1, 2}, nil, []string{"the type struct { A0 int; A1 int; }"}},
		{"Bad", "", new(Box), []string{"Box", "chan int"}},
		{"Echo", "text", new(Pair), []string{"Pair", "ProtocolVersion"}},
		{"Echo", "text", new(int), []string{"int", "the peer sent the type string", "ProtocolVersion"}},
	} {
		c := connectOurs(t, mirror{newTestServer()})
		err := plugin.Call(boundedContext(t), c, "Plugin."+test.method, test.arg, test.reply)
		errorSays(t, err, append(test.words, "Plugin."+test.method)...)
		exchange(t, c)
	}
}

// ---- Sizes and streams that are not gob ----

// Above 16 MiB gob writes a size with one byte more, and above 10 MiB it reads
// in pieces.
func TestLargeCall(t *testing.T) {
	t.Parallel()
	_, test, _ := joinInProcess(t)
	in, out := Box{noise(17<<20, 0)}, Box{}
	check(t, plugin.Call(context.Background(), test.Client, "Plugin.Box", in, &out))
	if !reflect.DeepEqual(in, out) {
		t.Error("it came back changed")
	}
	echo(t, test.Client)
}

// A server whose replies are not read reads no more requests after a while.
func TestStuckCaller(t *testing.T) {
	t.Parallel()
	const calls = 60
	_, _, st := rawHost(t, newTestServer())
	large := string(noise(256<<10, 0))
	var written atomic.Int64
	sent := async(func() error {
		enc := gob.NewEncoder(st)
		for i := range calls {
			req := rpc.Request{ServiceMethod: "Plugin.Echo", Seq: uint64(i)}
			if err := errors.Join(enc.Encode(req), enc.Encode(large)); err != nil {
				return err
			}
			written.Add(1)
		}
		return nil
	})
	if n := standsStill(t, "the requests", written.Load); n == 0 || n == calls {
		t.Errorf("the server has read %d of %d requests", n, calls)
	}
	dec := gob.NewDecoder(st)
	_ = st.SetReadDeadline(time.Now().Add(hangs))
	for range calls {
		var got string
		check(t, errors.Join(dec.Decode(new(rpc.Response)), dec.Decode(&got)))
		if got != large {
			t.Fatal("a reply is wrong")
		}
	}
	check(t, receive(t, "the last request", sent))
}

// notGob are beginnings of a stream that claim more than comes, or are no gob.
var notGob = [][]byte{
	{0xfc, 0x40, 0, 0, 1, 0xff},
	{0xf8, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff},
	{0x80, 1, 2, 3},
	{0},
	{0xfc, 0x40, 0, 0, 0, 1, 2, 3},
	{0xfc, 0x40},
	{0x03, 0x01, 0x02, 0x03},
	[]byte("HTTP/1.1 400 Bad Request\r\nContent-Type: text/plain\r\n\r\n400 Bad Request: go away\n"),
}

// A plugin that sends no gob ends the stream of its client, at no cost of
// memory, and nothing else.
func TestNotGob(t *testing.T) {
	for _, sent := range notGob {
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		raw, test, st := rawPlugin(t)
		call := test.Go("Plugin.Echo", "", new(string), nil)
		_, err1 := st.Read(make([]byte, 1))
		_, err2 := st.Write(sent)
		check(t, errors.Join(err1, err2, st.Close()))
		receive(t, "the call", call.Done)
		if call.Error == nil {
			t.Errorf("%x is taken for a reply", sent)
		}
		_, err := raw.Ping()
		check(t, err)
		runtime.ReadMemStats(&after)
		if used := after.TotalAlloc - before.TotalAlloc; used > 64<<20 {
			t.Errorf("%x: %d bytes were allocated", sent, used)
		}
	}
}

// ---- Values that get stuck ----

// Stuck waits while it is encoded or decoded, if its function is set.
type Stuck struct{ wait func() }

func (s Stuck) GobEncode() ([]byte, error) {
	if s.wait != nil {
		s.wait()
	}
	return []byte("x"), nil
}

func (s *Stuck) GobDecode([]byte) error {
	_, err := s.GobEncode()
	return err
}

// GetStuck replies with a Stuck.
func (*testServer) GetStuck(string, *Stuck) error { return nil }

// Kill does not wait for the host's own GobEncode or GobDecode.
func TestKillStuckGob(t *testing.T) {
	for _, decode := range []bool{false, true} {
		leavesNothing(t)
		c, p := startPlugin(t, testConfig("plugin"))
		test := dispense(t, p)
		inside, release := make(chan bool), make(chan bool)
		stuck := Stuck{func() {
			inside <- true
			<-release
		}}
		call := async(func() error {
			if decode {
				return test.Call("Plugin.GetStuck", "", &stuck)
			}
			return test.Call("Plugin.GetStuck", stuck, new(Stuck))
		})
		receive(t, "the encoding or decoding", inside)
		within(t, "Kill", hangs, c.Kill)
		if !c.Exited() {
			t.Error("the plugin lives on")
		}
		close(release)
		receive(t, "the call", call)
	}
}
