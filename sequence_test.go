package plugin_test

import (
	"bytes"
	"context"
	"encoding/gob"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"iter"
	"math"
	"math/rand/v2"
	"net/rpc"
	"runtime"
	"slices"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/muxplug/plugin"
)

// ---- An interface with sequences ----

// Yielder has methods that take and return sequences.
type Yielder interface {
	Watch(ctx context.Context, how string, n int) iter.Seq2[Item, error]
	Import(ctx context.Context, how string, rows Numbers) (int, error)
	Double(ctx context.Context, rows Numbers) Numbers
	Points(n int) iter.Seq2[*Point, error]
	Anything(values iter.Seq2[any, error]) iter.Seq2[any, error]
	Goroutines() (int, error)
	Follow(ctx context.Context, plan Plan, rows Numbers) Numbers
	Log(ctx context.Context, out io.Writer) Numbers
}

type (
	Item struct {
		N    int
		Name string
		Any  any
	}
	Number struct{ N int }

	// Loop may hold itself.
	Loop struct{ Next *Loop }

	// Numbers is the type of most parameters.
	Numbers = iter.Seq2[Number, error]

	// Plan is what Follow does.
	Plan struct {
		Take  int    // how many rows of the caller it takes at most, to double them
		Yield int    // how many of its own it yields then
		End   string // "", "fail" or "panic"
	}
)

// Watch yields n events, and then does what how says.
func (k *kit) Watch(ctx context.Context, how string, n int) iter.Seq2[Item, error] {
	if how == "nil" {
		return nil
	}
	return func(yield func(Item, error) bool) {
		defer func() { k.event("left " + how) <- struct{}{} }()
		for i := range n {
			if !yield(Item{N: i, Name: how}, nil) {
				k.event("no more") <- struct{}{}
				<-ctx.Done()
				return
			}
		}
		switch how {
		case "fail":
			yield(Item{}, fmt.Errorf("failing: %w", fs.ErrNotExist))
		case "bad value":
			yield(Item{Any: make(chan int)}, nil)
		case "wait":
			<-ctx.Done()
			yield(Item{}, context.Cause(ctx))
		case "go on":
			yield(Item{}, fs.ErrNotExist)
			for range 10 {
				if yield(Item{N: -1}, nil) || yield(Item{}, fs.ErrExist) {
					panic("yield returned true after an error")
				}
			}
		}
	}
}

// Import returns the sum of the rows.
func (k *kit) Import(ctx context.Context, how string, rows Numbers) (sum int, err error) {
	switch how {
	case "ignore":
		return 0, nil
	case "keep":
		go func() { // ends with the test
			<-k.event("now")
			for _, err := range rows {
				k.event("kept: " + err.Error()) <- struct{}{}
			}
		}()
		return 0, nil
	}
	for row, err := range rows {
		if err != nil {
			return sum, err
		}
		sum += row.N
		if how == "break" {
			break
		}
	}
	if how == "again" {
		for _, err := range rows {
			return sum, err
		}
	}
	return sum, nil
}

func (k *kit) Double(ctx context.Context, rows Numbers) Numbers {
	return func(yield func(Number, error) bool) {
		for row, err := range rows {
			if !yield(Number{2 * row.N}, err) {
				return
			}
		}
	}
}

// Points yields n points, and a nil one.
func (k *kit) Points(n int) iter.Seq2[*Point, error] {
	return func(yield func(*Point, error) bool) {
		for i := range n {
			if !yield(&Point{i, 0}, nil) {
				return
			}
		}
		yield(nil, nil)
	}
}

func (k *kit) Anything(values iter.Seq2[any, error]) iter.Seq2[any, error] { return values }

func (k *kit) Follow(ctx context.Context, plan Plan, rows Numbers) Numbers {
	return func(yield func(Number, error) bool) {
		taken := 0
		for row, err := range rows {
			if taken == plan.Take {
				break
			}
			taken++
			if !yield(Number{2 * row.N}, err) {
				return
			}
		}
		for i := range plan.Yield {
			if !yield(Number{i}, nil) {
				return
			}
		}
		switch plan.End {
		case "fail":
			yield(Number{}, fs.ErrNotExist)
		case "panic":
			panic("boom")
		}
	}
}

// Log yields a number, and writes for ever.
func (k *kit) Log(ctx context.Context, out io.Writer) Numbers {
	return func(yield func(Number, error) bool) {
		yield(Number{}, nil)
		for ctx.Err() == nil {
			if _, err := out.Write([]byte("x")); err != nil {
				return
			}
		}
	}
}

func (k *kit) Goroutines() (int, error) { return runtime.NumGoroutine(), nil }

func init() { gob.Register(&Loop{}) }

// collect ranges over a sequence. It fails the test if anything follows an error, or an
// error comes with a value.
func collect[T any](t testing.TB, seq iter.Seq2[T, error]) (all []T, end error) {
	t.Helper()
	for v, err := range seq {
		if end != nil {
			t.Errorf("%v, %v follow an error", v, err)
		}
		if err == nil {
			all = append(all, v)
			continue
		}
		end = err
		var none T
		if any(v) != any(none) {
			t.Errorf("%v comes with the error %v", v, err)
		}
	}
	return all, end
}

// collectFrom calls a method and collects its sequence.
func collectFrom[T any](t testing.TB, r *plugin.Remote, method string, args ...any) (all []T, end error) {
	t.Helper()
	return collect(t, plugin.InvokeSeq[T](boundedContext(t), r, method, args...))
}

// rowsTo yields n rows, and then an error if it is not nil.
func rowsTo(n int, end error) Numbers {
	return func(yield func(Number, error) bool) {
		for i := range n {
			if !yield(Number{i}, nil) {
				return
			}
		}
		if end != nil {
			yield(Number{}, end)
		}
	}
}

// ---- Results ----

// All values arrive in their order, and each range is one call.
func TestSequence(t *testing.T) {
	leavesNothing(t)
	_, _, r := startKit(t)
	for _, n := range []int{0, 1, 100, 50_000} {
		events := plugin.InvokeSeq[Item](boundedContext(t), r, "Watch", "good", n)
		for range 2 {
			all, err := collect(t, events)
			check(t, err)
			checkEqual(t, "events", len(all), n)
			for i, e := range all {
				if e != (Item{N: i, Name: "good"}) {
					t.Fatalf("event %d is %v", i, e)
				}
			}
			invoke[struct{}](t, r, "Await", "left good")
		}
	}
	all, err := collectFrom[Item](t, r, "Watch", "nil", 0)
	check(t, err)
	checkEqual(t, "values of nil", len(all), 0)
}

// The first error comes after all values, and keeps its identity.
func TestSequenceErrors(t *testing.T) {
	leavesNothing(t)
	_, _, r := startKit(t)
	for _, n := range []int{0, 1, 10_000} {
		all, err := collectFrom[Item](t, r, "Watch", "fail", n)
		checkEqual(t, "values before an error", len(all), n)
		errorIs(t, "the error", err, fs.ErrNotExist)

		all, err = collectFrom[Item](t, r, "Watch", "bad value", n)
		checkEqual(t, "values before one that cannot be sent", len(all), n)
		errorSays(t, err, "Item", "chan")

		points, err := collectFrom[*Point](t, r, "Points", n)
		checkEqual(t, "points before nil", len(points), n)
		errorSays(t, err, "nil *plugin_test.Point")

		all, err = collectFrom[Item](t, r, "Watch", "go on", n)
		checkEqual(t, "values of a sequence that goes on after its error", len(all), n)
		errorIs(t, "its error", err, fs.ErrNotExist)
	}
	values, err := collectFrom[any](t, r, "Anything", valuesOf[any](nil, 1, "x", Point{1, 2}, nil))
	check(t, err)
	checkEqual(t, "values of any type", fmt.Sprint(values), "[<nil> 1 x {1 2} <nil>]")
	_, err = collectFrom[any](t, r, "Anything", valuesOf[any](1, hidden{}))
	errorSays(t, err, "hidden", "gob.Register")
	loop := &Loop{}
	loop.Next = loop
	_, err = collectFrom[any](t, r, "Anything", valuesOf[any](1, loop))
	errorSays(t, err, "holds itself")
}

// valuesOf yields these values.
func valuesOf[T any](values ...T) iter.Seq2[T, error] {
	return func(yield func(T, error) bool) {
		for _, v := range values {
			if !yield(v, nil) {
				return
			}
		}
	}
}

// An error of the caller's own is the same value again, at the end of its parameter and
// when it comes back in a sequence.
func TestOwnErrorOfSequence(t *testing.T) {
	t.Parallel()
	_, _, r := startKit(t)
	own := errors.New("an error that is not registered")
	errorIs(t, "the error of Invoke", errorOf[int](t, r, "Import", "", rowsTo(3, own)), own)
	all, err := collectFrom[Number](t, r, "Double", rowsTo(3, own))
	checkEqual(t, "values", len(all), 3)
	errorIs(t, "the error of the sequence", err, own)
}

// What cannot be called is one error, and nothing is sent.
func TestSequenceChecks(t *testing.T) {
	t.Parallel()
	host, _, r := localKit(t)
	_ = host.Close() // so what is sent fails with rpc.ErrShutdown, even if the plugin is slow to quit
	ctx := boundedContext(t)
	var noContext context.Context
	zero := new(plugin.Remote)
	watch := func(args ...any) iter.Seq2[Item, error] {
		return plugin.InvokeSeq[Item](ctx, r, "Watch", args...)
	}
	for _, test := range []struct {
		what  string
		seq   iter.Seq2[Item, error]
		words []string
	}{
		{"a nil context", plugin.InvokeSeq[Item](noContext, r, "Watch", "", 1), []string{"nil context"}},
		{"a nil Remote", plugin.InvokeSeq[Item](ctx, nil, "Watch", "", 1), []string{"nil"}},
		{"the zero Remote", plugin.InvokeSeq[Item](ctx, zero, "Watch", "", 1), []string{"Watch"}},
		{"an unknown method", plugin.InvokeSeq[Item](ctx, r, "Look", "", 1), []string{`"Look"`, "Watch"}},
		{"no sequence", plugin.InvokeSeq[Item](ctx, r, "Import", "", nil), []string{"Import", "Item"}},
		{"another type", plugin.InvokeSeq[Item](ctx, r, "Double", nil), []string{"Double", "Number", "Item"}},
		{"too few arguments", watch(""), []string{"Watch", "takes 2 arguments"}},
		{"too many", watch("", 1, 2), []string{"takes 2 arguments"}},
		{"an argument of another type", watch(1, 1), []string{"argument 1", "string"}},
	} {
		_, err := collect(t, test.seq)
		errorSays(t, err, test.words...)
		if errors.Is(err, rpc.ErrShutdown) {
			t.Errorf("%s was sent", test.what)
		}
	}
	errorSays(t, errorOf[iter.Seq2[Item, error]](t, r, "Watch", "", 1), "InvokeSeq")
	errorSays(t, errorOf[struct{}](t, r, "Watch", "", 1), "InvokeSeq")
	_, err := collect(t, watch("", 1))
	errorIs(t, "a correct call", err, rpc.ErrShutdown)
}

// For refuses other iterators and sequences elsewhere, with the reason.
func TestForRefusesSequences(t *testing.T) {
	forPanics[interface{ M() iter.Seq[int] }](t, "iter.Seq[int]", "iter.Seq2[T, error]")
	forPanics[interface{ M() iter.Seq2[int, int] }](t, "iter.Seq2[int,int]", "iter.Seq2[T, error]")
	forPanics[Gives[iter.Seq2[int, error]]](t, "only result")
	forPanics[interface {
		M() iter.Seq2[chan int, error]
	}](t, "chan int")
	forPanics[interface {
		M() iter.Seq2[Options, error]
	}](t, "Options.Hooks.Before")
	forPanics[Takes[iter.Seq[int]]](t, "iter.Seq[int]", "iter.Seq2[T, error]")
	forPanics[Takes[iter.Seq2[int, string]]](t, "iter.Seq2[T, error]")
	forPanics[Takes[iter.Seq2[*hidden, error]]](t, "hidden")
	forPanics[Takes[func(iter.Seq2[int, error]) error]](t, "callback")
	forPanics[Takes[func() iter.Seq2[int, error]]](t, "callback")
	forPanics[Takes[struct{ S iter.Seq2[int, error] }]](t, ".S", "iter.Seq2")
	// These are accepted.
	forPanics[interface {
		M() iter.Seq2[*Point, error]
	}](t)
	forPanics[Takes[func(yield func(string, error) bool)]](t)
}

// Leaving the loop ends the context of the method, and its yield returns false.
func TestSequenceLeft(t *testing.T) {
	leavesNothing(t)
	_, _, r := startKit(t)
	endless := plugin.InvokeSeq[Item](context.Background(), r, "Watch", "endless", math.MaxInt)
	for _, last := range []int{0, 1, 1000} {
		for e, err := range endless {
			check(t, err)
			if e.N == last {
				break
			}
		}
		invoke[struct{}](t, r, "Await", "no more")
		invoke[struct{}](t, r, "Await", "left endless")
	}
	func() { // return
		for range endless {
			return
		}
	}()
	invoke[struct{}](t, r, "Await", "left endless")
	func() {
		defer func() { checkEqual[any](t, "the panic", recover(), "mine") }()
		for range endless {
			panic("mine")
		}
	}()
	invoke[struct{}](t, r, "Await", "left endless")
	// A method that does not yield learns it from its context.
	for range plugin.InvokeSeq[Item](context.Background(), r, "Watch", "wait", 1) {
		break
	}
	invoke[struct{}](t, r, "Await", "left wait")
}

// A Write that blocks holds a loop that was left as it holds Invoke: for a second at most.
func TestSequenceWithBlockedWrite(t *testing.T) {
	t.Parallel()
	_, _, r := startKit(t)
	out := newUses()
	within(t, "leaving the loop", callbackTimeout, func() {
		for range plugin.InvokeSeq[Number](context.Background(), r, "Log", out) {
			<-out.began
			break
		}
	})
	close(out.release)
}

// The end of ctx is the error, and no value follows it.
func TestSequenceCanceled(t *testing.T) {
	leavesNothing(t)
	_, _, r := startKit(t)
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	n := 0
	for e, err := range plugin.InvokeSeq[Item](ctx, r, "Watch", "endless", math.MaxInt) {
		if err != nil {
			errorIs(t, "the end of ctx", err, context.Canceled)
			break
		}
		checkEqual(t, "the number of a value", e.N, n)
		n++
		if n == 100 {
			cancel()
		}
	}
	checkEqual(t, "values before the end of ctx", n, 100)
	invoke[struct{}](t, r, "Await", "left endless")
	late := newDeadlineContext()
	n = 0
	for _, err := range plugin.InvokeSeq[Item](late, r, "Watch", "wait", 3) {
		if err != nil {
			errorIs(t, "the deadline", err, context.DeadlineExceeded)
			break
		}
		n++
		if n == 3 {
			late.pass()
		}
	}
	checkEqual(t, "values before the deadline", n, 3)
	invoke[struct{}](t, r, "Await", "left wait")
	all, err := collect(t, plugin.InvokeSeq[Item](late, r, "Watch", "good", 3))
	checkEqual(t, "values afterwards", len(all), 0)
	errorIs(t, "afterwards", err, context.DeadlineExceeded)
}

// A slow loop holds the method back, and the method a sequence of the caller.
func TestSlowLoop(t *testing.T) {
	t.Parallel()
	_, _, r := startKit(t)
	var pulled atomic.Int64
	var endless Numbers = func(yield func(Number, error) bool) {
		for yield(Number{math.MaxInt / 2}, nil) { // its double must not overflow to a short number
			pulled.Add(1)
		}
	}
	for _, err := range plugin.InvokeSeq[Number](boundedContext(t), r, "Double", endless) {
		check(t, err)
		await(t, "values that are sent ahead", func() bool { return pulled.Load()*10 >= streamWindow })
		standsStill(t, "the sequence", pulled.Load)
		break
	}
	// Two streams and their buffers; a row has ten bytes at least.
	if n := pulled.Load() * 10; n > 2*(streamWindow+4*64<<10) {
		t.Errorf("%d bytes were sent ahead", n)
	}
}

// ---- Parameters ----

// A method ranges over a sequence of the caller.
func TestSequenceParameter(t *testing.T) {
	leavesNothing(t)
	_, _, r := startKit(t)
	for _, n := range []int{0, 1, 20_000} {
		checkEqual(t, "the sum", invoke[int](t, r, "Import", "", rowsTo(n, nil)), n*(n-1)/2)
		failing := rowsTo(n, fmt.Errorf("failing: %w", fs.ErrExist))
		errorIs(t, "its error", errorOf[int](t, r, "Import", "", failing), fs.ErrExist)
	}
	checkEqual(t, "an untyped nil", invoke[int](t, r, "Import", "", nil), 0)
	checkEqual(t, "a nil sequence", invoke[int](t, r, "Import", "", Numbers(nil)), 0)
	all, err := collectFrom[Number](t, r, "Double", nil)
	check(t, err)
	checkEqual(t, "the double of nil", len(all), 0)

	errorSays(t, errorOf[int](t, r, "Import", "again", rowsTo(5, nil)), "once")
	bad := func(yield func(any, error) bool) { yield(make(chan int), nil) }
	_, err = collectFrom[any](t, r, "Anything", iter.Seq2[any, error](bad))
	errorSays(t, err, "chan int", "cannot be sent")
	for what, broken := range map[string]func(){"boom": func() { panic("boom") }, "Goexit": runtime.Goexit} {
		rows := Numbers(func(yield func(Number, error) bool) {
			yield(Number{}, nil)
			broken()
		})
		errorSays(t, errorOf[int](t, r, "Import", "", rows), what)
	}
	invoke[int](t, r, "Import", "", rowsTo(10, nil))
}

// A sequence begins when the method ranges over it, and has ended when Invoke returns.
func TestEndOfParameter(t *testing.T) {
	leavesNothing(t)
	_, _, r := startKit(t)
	for _, how := range []string{"break", "ignore", "timeout"} {
		deadline := newDeadlineContext()
		ctx, cancel := context.WithTimeout(deadline, hangs)
		begun, ended := false, false
		rows := Numbers(func(yield func(Number, error) bool) {
			begun = true
			if how == "timeout" {
				deadline.pass()
			}
			defer func() { ended = true }()
			for yield(Number{}, nil) {
			}
			checkEqual(t, "yield after the end", yield(Number{}, nil), false)
		})
		_, err := plugin.Invoke[int](ctx, r, "Import", how, rows)
		cancel()
		checkEqual(t, how+": begun", begun, how != "ignore")
		checkEqual(t, how+": ended", ended, begun)
		if how == "timeout" {
			errorIs(t, how, err, context.DeadlineExceeded)
			continue
		}
		check(t, err)
	}
}

// A sequence that is kept is an error after the method has returned.
func TestKeptSequence(t *testing.T) {
	t.Parallel()
	_, k, r := localKit(t)
	invoke[int](t, r, "Import", "keep", rowsTo(5, nil))
	send(t, "the signal", k.event("now"), struct{}{})
	check(t, k.Await(boundedContext(t), "kept: plugin: the method that took this argument has returned"))
}

// A sequence that waits does not hold Invoke or a loop that was left, and its yield
// returns false afterwards.
func TestWaitingSequence(t *testing.T) {
	leavesNothing(t)
	_, _, r := startKit(t)
	release, ended := make(chan struct{}), make(chan bool, 1)
	waiting := Numbers(func(yield func(Number, error) bool) {
		yield(Number{1}, nil)
		<-release
		ended <- yield(Number{2}, nil)
	})
	within(t, "Invoke", useTimeout, func() { invoke[int](t, r, "Import", "break", waiting) })
	release <- struct{}{}
	checkEqual(t, "yield after Invoke", receive(t, "the end", ended), false)
	within(t, "the loop", useTimeout, func() {
		for range plugin.InvokeSeq[Number](boundedContext(t), r, "Double", waiting) {
			break
		}
	})
	release <- struct{}{}
	checkEqual(t, "yield after the loop", receive(t, "the end", ended), false)
}

// A method ranges over one sequence and yields another, in turns.
func TestConversation(t *testing.T) {
	leavesNothing(t)
	_, _, r := startKit(t)
	say := make(chan int, 1)
	turns := 0
	say <- 1
	questions := Numbers(func(yield func(Number, error) bool) {
		for n := range say {
			if !yield(Number{n}, nil) {
				return
			}
		}
	})
	for row, err := range plugin.InvokeSeq[Number](boundedContext(t), r, "Double", questions) {
		check(t, err)
		turns++
		if turns == 20 {
			close(say)
			continue
		}
		say <- row.N
	}
	checkEqual(t, "turns", turns, 20)
	_, err := collectFrom[Number](t, r, "Double", rowsTo(10, fs.ErrPermission))
	errorIs(t, "an error there and back", err, fs.ErrPermission)
}

// ---- The wire ----

// stockGob returns values as one stream of package gob.
func stockGob[T any](t testing.TB, values ...T) []byte {
	t.Helper()
	var stream bytes.Buffer
	encoder := gob.NewEncoder(&stream)
	for i := range values {
		check(t, encoder.Encode(&values[i]))
	}
	return stream.Bytes()
}

// handYielder serves methods of Yielder as they would be written by hand, with stock gob.
type handYielder struct {
	broker *plugin.MuxBroker
	t      testing.TB
	rows   []byte // the parameter of Import, as it arrives
}

// The arguments of Watch and Import.
type (
	watchArgs struct {
		A0 string
		A1 int
		A2 uint32
	}
	importArgs struct {
		A0 string
		A1 uint32
	}
)

func (s *handYielder) Watch(args watchArgs, _ *struct{}) error {
	w, err := s.broker.DialWriter(args.A2)
	if err != nil {
		return err
	}
	_, err = w.Write(stockGob(s.t, Item{N: args.A1, Name: args.A0}, Item{N: 1, Any: Point{1, 2}}, Item{}))
	return errors.Join(err, w.Close())
}

func (s *handYielder) Import(args importArgs, sum *int) error {
	r, err := s.broker.DialReader(args.A1)
	if err != nil {
		return err
	}
	s.rows, err = io.ReadAll(r)
	return errors.Join(err, r.Close())
}

// What InvokeSeq and Invoke send and read is what stock gob writes, byte for byte.
func TestSequencesOnWire(t *testing.T) {
	t.Parallel()
	byHand := &handYielder{t: t}
	server := func(b *plugin.MuxBroker) (any, error) {
		byHand.broker = b
		return byHand, nil
	}
	set := plugin.PluginSet{"kit": servedByHand{newKitPlugin(nil), server}}
	host, _ := plugin.TestPluginRPCConn(t, set, nil)
	r := dispenseKit(t, host)
	events, err := collectFrom[Item](t, r, "Watch", "by hand", 7)
	check(t, err)
	checkEqual(t, "the events", fmt.Sprint(events), "[{7 by hand <nil>} {1  {1 2}} {0  <nil>}]")
	invoke[int](t, r, "Import", "", rowsTo(100, nil))
	var rows []Number
	for i := range 100 {
		rows = append(rows, Number{i})
	}
	if want := stockGob(t, rows...); !bytes.Equal(byHand.rows, want) {
		t.Errorf("the rows are sent as %x and not %x", byHand.rows, want)
	}
}

// A host that is written by hand calls methods with sequences.
func TestHandWrittenSequences(t *testing.T) {
	t.Parallel()
	host, _, _ := localKit(t)
	c := dispenseKitByHand(t, host)
	var written syncBuffer
	id, stop := c.broker.ServeWriter(&written)
	defer stop()
	mustCall[struct{}](t, c.Client, "Watch", watchArgs{"x", 3, id})
	want := stockGob(t, Item{Name: "x"}, Item{N: 1, Name: "x"}, Item{N: 2, Name: "x"})
	if written.String() != string(want) {
		t.Errorf("the events are sent as %x and not %x", written.String(), want)
	}
	id, stop = c.broker.ServeReader(bytes.NewReader(stockGob(t, Number{1}, Number{2}, Number{3})))
	defer stop()
	checkEqual(t, "the sum", mustCall[int](t, c.Client, "Import", importArgs{"", id}), 6)
	checkEqual(t, "the sum of nil", mustCall[int](t, c.Client, "Import", importArgs{"", 0}), 0)

	call := func(method string, args any) error {
		return plugin.Call(boundedContext(t), c.Client, "Plugin."+method, args, nil)
	}
	errorSays(t, call("Watch", watchArgs{"x", 3, 0}), "no writer")
	id, stop = c.broker.ServeWriter(writerFunc(func(p []byte) (int, error) { return 0, fs.ErrPermission }))
	defer stop()
	points := struct {
		A0 int
		A1 uint32
	}{math.MaxInt, id}
	errorIs(t, "a writer that fails", call("Points", points), fs.ErrPermission)
	cut := stockGob(t, Number{1}, Number{2})
	for what, bad := range map[string][]byte{
		"cannot be read": stockGob(t, "not a row"),
		"unexpected EOF": cut[:len(cut)-1],
	} {
		id, stop := c.broker.ServeReader(bytes.NewReader(bad))
		defer stop()
		errorSays(t, call("Import", importArgs{"", id}), what)
	}
}

// ---- Random ends ----

// trial is one range over a sequence of Follow, and how it ends.
type trial struct {
	plan    Plan
	rows    int    // of the caller
	rowsEnd string // "", "fail" or "panic"
	leave   string // "", "break", "panic" or "cancel"
	at      int    // after how many values the loop is left
}

// newTrial returns a random trial.
func newTrial(rnd *rand.Rand) trial {
	number := func() int {
		if rnd.IntN(20) == 0 {
			return rnd.IntN(20_000)
		}
		return rnd.IntN(30)
	}
	choose := func(names ...string) string { return names[rnd.IntN(len(names))] }
	return trial{
		plan:    Plan{Take: number(), Yield: number(), End: choose("", "", "fail")},
		rows:    number(),
		rowsEnd: choose("", "", "fail", "panic"),
		leave:   choose("", "", "break", "panic", "cancel"),
		at:      1 + number(),
	}
}

// expected returns the values of the sequence, and whether its error is the right one.
func (tr trial) expected() (values []Number, isRight func(error) bool) {
	for i := range min(tr.plan.Take, tr.rows) {
		values = append(values, Number{2 * i})
	}
	if tr.plan.Take > tr.rows && tr.rowsEnd == "fail" {
		return values, func(err error) bool { return errors.Is(err, fs.ErrPermission) }
	}
	if tr.plan.Take > tr.rows && tr.rowsEnd == "panic" {
		return values, func(err error) bool { return err != nil && strings.Contains(err.Error(), "bang") }
	}
	for i := range tr.plan.Yield {
		values = append(values, Number{i})
	}
	if tr.plan.End == "fail" {
		return values, func(err error) bool { return errors.Is(err, fs.ErrNotExist) }
	}
	return values, func(err error) bool { return err == nil }
}

// run ranges over the sequence, and returns its values and its error.
func (tr trial) run(t testing.TB, r *plugin.Remote) (values []Number, end error) {
	ctx, cancel := context.WithTimeout(context.Background(), hangs)
	defer cancel()
	var running atomic.Int64
	rows := Numbers(func(yield func(Number, error) bool) {
		running.Add(1)
		defer running.Add(-1)
		for i := range tr.rows {
			if !yield(Number{i}, nil) {
				return
			}
		}
		switch tr.rowsEnd {
		case "fail":
			yield(Number{}, fs.ErrPermission)
		case "panic":
			panic("bang")
		}
	})
	defer func() {
		if p := recover(); p != nil && p != "mine" {
			panic(p)
		}
		if !poll(hangs, func() bool { return running.Load() == 0 }) {
			t.Errorf("%+v: the caller's sequence still runs", tr)
		}
	}()
	for row, err := range plugin.InvokeSeq[Number](ctx, r, "Follow", tr.plan, rows) {
		if end != nil {
			t.Errorf("%+v: %v, %v follow an error", tr, row, err)
		}
		if err != nil {
			end = err
			continue
		}
		values = append(values, row)
		if len(values) < tr.at {
			continue
		}
		switch tr.leave {
		case "break":
			return values, nil
		case "panic":
			panic("mine")
		case "cancel":
			cancel()
		}
	}
	return values, end
}

// check runs a trial and compares it with what is expected.
func (tr trial) check(t testing.TB, r *plugin.Remote) {
	values, err := tr.run(t, r)
	want, isRight := tr.expected()
	if tr.leave != "" && tr.at <= len(want) {
		want = want[:tr.at]
		isRight = func(err error) bool { return err == nil }
		if tr.leave == "cancel" {
			isRight = func(err error) bool { return errors.Is(err, context.Canceled) }
		}
	}
	if !slices.Equal(values, want) {
		t.Errorf("%+v: %d values and not %d: %v", tr, len(values), len(want), err)
	}
	if !isRight(err) {
		t.Errorf("%+v: the error is %v", tr, err)
	}
}

// Sequences that end at random, in all ways, have the values and errors that they should,
// and nothing is left of 1,000 of them, at either side.
func TestRandomSequences(t *testing.T) {
	leavesNothing(t)
	_, _, r := startKit(t)
	new(trial).check(t, r) // what this starts may stay
	before := invoke[int](t, r, "Goroutines")
	concurrently(t, 8, func(i int) {
		rnd := rand.New(rand.NewPCG(1, uint64(i)))
		for range 100 {
			newTrial(rnd).check(t, r)
		}
	})
	await(t, "the goroutines of the plugin to end", func() bool {
		return invoke[int](t, r, "Goroutines") <= before
	})
}

// A sequence that the end of the plugin cuts has no gap, and says how the plugin has ended.
func TestCutSequence(t *testing.T) {
	t.Parallel()
	_, _, r := startKit(t)
	next := 0
	var end error
	endless := Plan{Yield: math.MaxInt}
	for row, err := range plugin.InvokeSeq[Number](boundedContext(t), r, "Follow", endless, nil) {
		if err != nil {
			end = err
			break
		}
		if row.N != next {
			t.Fatalf("value %d is %d", next, row.N)
		}
		if next == 100 {
			_, _ = collectFrom[Number](t, r, "Follow", Plan{End: "panic"}, nil)
		}
		next++
	}
	if !isA[*plugin.ExitError](end) {
		t.Errorf("after %d values, the error is %v", next, end)
	}
}
