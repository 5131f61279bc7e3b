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
	"slices"
	"strings"
	"testing"
	"testing/quick"
)

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
		return nil, errWrong
	}
	return []byte{byte(p.V)}, nil
}

func (p *picky) GobDecode(data []byte) error { p.V = int(data[0]); return nil }

var shapeTypes = []reflect.Type{
	reflect.TypeFor[any](), reflect.TypeFor[*holder](), reflect.TypeFor[Point](), reflect.TypeFor[picky](), reflect.TypeFor[struct{}](),
	reflect.TypeFor[bool](), reflect.TypeFor[int](), reflect.TypeFor[int8](), reflect.TypeFor[uint32](), reflect.TypeFor[float64](),
	reflect.TypeFor[complex128](), reflect.TypeFor[string](), reflect.TypeFor[[]byte](), reflect.TypeFor[map[int]string](),
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
		return reflect.StructOf([]reflect.StructField{{Name: "F", Type: fuzzType(r, depth-1)}, {Name: "G", Type: fuzzType(r, depth-1)}})
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
	_, here, there := local(f)
	f.Fuzz(func(t *testing.T, data []byte) { fuzzInvoke(t, here.broker, there.broker, rand.New(&byteSource{data})) })
}

func fuzzInvoke(t *testing.T, here, there *MuxBroker, r *rand.Rand) {
	var in []reflect.Type
	out := []reflect.Type{typeOfError}
	withContext := r.Intn(2)
	if withContext == 1 {
		in = append(in, typeOfContext)
	}
	callback := func(n int) (int, error) { return n + 1, nil }
	passed := append(slices.Clone(paramStreams), reflect.TypeOf(callback))
	returned := -1
	for i := range r.Intn(5) {
		if n := r.Intn(9); n < len(passed) {
			in = append(in, passed[n])
			continue
		}
		in = append(in, fuzzType(r, 3))
		if r.Intn(2) == 1 {
			returned = i
			out = []reflect.Type{in[len(in)-1], typeOfError}
		}
	}
	typ := reflect.FuncOf(in, out, false)
	s, err := newShape(typ, nil)
	if err != nil {
		t.Fatalf("%v: %v", typ, err)
	}

	// The method uses its arguments and returns one of them.
	var seen []reflect.Value
	f := reflect.MakeFunc(typ, func(in []reflect.Value) []reflect.Value {
		seen = in[withContext:]
		for _, v := range seen {
			var err error
			switch arg := v.Interface().(type) {
			case io.Reader:
				_, err = io.Copy(io.Discard, arg)
			case io.Writer:
				_, err = io.WriteString(arg, "written")
			case func(int) (int, error):
				if arg != nil {
					_, err = arg(1)
				}
			}
			if err != nil {
				t.Errorf("using a %v: %v", v.Type(), err)
			}
		}
		result := []reflect.Value{reflect.Zero(typeOfError)}
		if returned >= 0 {
			result = []reflect.Value{seen[returned], result[0]}
		}
		return result
	})
	id, stop := there.ServeRPC(&service{methods: map[string]*method{"Call": s.serve(there, f)}})
	defer stop()
	c, err := here.DialRPC(id)
	check(t, err)
	defer c.Close()

	var args []any
	sent := reflect.New(s.sent).Elem()
	for i, p := range s.params {
		if p.sent == p.Type {
			v := fuzzValue(p.Type, r)
			s.field(sent, i).Set(v)
			args = append(args, v.Interface())
		} else if r.Intn(2) == 1 {
			s.field(sent, i).SetUint(1)
			args = append(args, map[reflect.Type]any{passed[0]: strings.NewReader("x"), passed[1]: new(syncBuffer), passed[2]: callback}[p.Type])
		} else {
			args = append(args, reflect.Zero(p.Type).Interface())
		}
	}
	got, err := (&Remote{here, c, map[string]*shape{"Call": s}}).invoke(boundedContext(t), s.result.Type, "Call", args)

	arrives, lost := throughGob(sent)
	for i, p := range s.params {
		if lost != nil || len(seen) == 0 {
			break
		}
		want := s.field(arrives, i)
		if p.sent != p.Type {
			if seen[i].IsNil() != want.IsZero() {
				t.Errorf("%v: argument %d is nil: %v", typ, i, seen[i].IsNil())
			}
		} else if !reflect.DeepEqual(seen[i].Interface(), want.Interface()) {
			t.Errorf("%v: argument %d, %#v, arrives as %#v and not %#v", typ, i, args[i], seen[i], want)
		}
	}
	if called := seen != nil; called != (lost == nil) {
		t.Errorf("%v: called: %v; what gob says: %v; the error: %v", typ, called, lost, err)
	}
	if lost == nil && returned >= 0 {
		arrives, lost = throughGob(seen[returned])
		if err == nil && lost == nil && !reflect.DeepEqual(got.Interface(), arrives.Interface()) {
			t.Errorf("%v: the result %#v arrives as %#v and not %#v", typ, seen[returned], got, arrives)
		}
	}
	if (err == nil) != (lost == nil) || errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("%v: the error is %v; what gob says: %v", typ, err, lost)
	}
	if err := c.Call("Plugin.Nothing", 1, nil); !errors.As(err, new(rpc.ServerError)) {
		t.Errorf("%v: afterwards: %v", typ, err)
	}
}
