package plugin_test

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"iter"
	"net/rpc"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/muxplug/plugin"
)

// ---- An interface with sequences ----

// Store has methods that take and return sequences.
type Store interface {
	Watch(ctx context.Context, how string, n int) iter.Seq2[Event, error]
	Import(ctx context.Context, how string, rows iter.Seq2[Row, error]) (int, error)
	Double(ctx context.Context, rows iter.Seq2[Row, error]) iter.Seq2[Row, error]
	Points(n int) iter.Seq2[*Point, error]
	Anything(values iter.Seq2[any, error]) iter.Seq2[any, error]
	Await(ctx context.Context, event string) error
	Goroutines() (int, error)
}

type (
	Event struct {
		N    int
		Name string
		Any  any
	}
	Row struct{ N int }
)

// store implements Store. Its events tell a test what has happened in the plugin.
type store struct{ kit }

// Watch yields n events, and then does what how says.
func (s *store) Watch(ctx context.Context, how string, n int) iter.Seq2[Event, error] {
	if how == "nil" {
		return nil
	}
	return func(yield func(Event, error) bool) {
		defer func() { s.event("left " + how) <- struct{}{} }()
		for i := range n {
			if !yield(Event{N: i, Name: how}, nil) {
				s.event("no more") <- struct{}{}
				<-ctx.Done()
				return
			}
		}
		switch how {
		case "fail":
			yield(Event{}, fmt.Errorf("failing: %w", fs.ErrNotExist))
		case "bad value":
			yield(Event{Any: make(chan int)}, nil)
		case "wait":
			<-ctx.Done()
			yield(Event{}, context.Cause(ctx))
		case "panic":
			panic("boom")
		case "go on":
			yield(Event{}, fs.ErrNotExist)
			for range 10 {
				if yield(Event{N: -1}, nil) || yield(Event{}, fs.ErrExist) {
					panic("yield returned true after an error")
				}
			}
		}
	}
}

// Import returns the sum of the rows.
func (s *store) Import(ctx context.Context, how string, rows iter.Seq2[Row, error]) (sum int, err error) {
	switch how {
	case "ignore":
		return 0, nil
	case "keep":
		go func() { // ends with the test
			<-s.event("now")
			for _, err := range rows {
				s.event("kept: " + err.Error()) <- struct{}{}
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

func (s *store) Double(ctx context.Context, rows iter.Seq2[Row, error]) iter.Seq2[Row, error] {
	return func(yield func(Row, error) bool) {
		for row, err := range rows {
			if !yield(Row{2 * row.N}, err) {
				return
			}
		}
	}
}

// Points yields n points, and a nil one.
func (s *store) Points(n int) iter.Seq2[*Point, error] {
	return func(yield func(*Point, error) bool) {
		for i := range n {
			if !yield(&Point{i, 0}, nil) {
				return
			}
		}
		yield(nil, nil)
	}
}

func (s *store) Anything(values iter.Seq2[any, error]) iter.Seq2[any, error] { return values }

func (s *store) Goroutines() (int, error) { return runtime.NumGoroutine(), nil }

// storeClient is a Store whose methods tests call with Invoke and InvokeSeq.
type storeClient struct {
	Store
	remote *plugin.Remote
}

func newStorePlugin(impl Store) plugin.PluginSet {
	return plugin.PluginSet{"store": plugin.For(impl, func(r *plugin.Remote) Store { return storeClient{remote: r} })}
}

func init() {
	modes["store"] = func() {
		servePlugin(func(c *plugin.ServeConfig) { c.Plugins = newStorePlugin(new(store)) })
	}
}

// startStore starts a plugin and returns its Store.
func startStore(t testing.TB) (*plugin.Client, *plugin.Remote) {
	t.Helper()
	cfg := testConfig("store")
	cfg.Plugins = newStorePlugin(nil)
	c, p := startPlugin(t, cfg)
	s, err := plugin.Dispense[Store](p, "store")
	check(t, err)
	return c, s.(storeClient).remote
}

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

// rowsTo yields n rows, and then an error if it is not nil.
func rowsTo(n int, end error) iter.Seq2[Row, error] {
	return func(yield func(Row, error) bool) {
		for i := range n {
			if !yield(Row{i}, nil) {
				return
			}
		}
		if end != nil {
			yield(Row{}, end)
		}
	}
}

// ---- Results ----

// All values arrive in their order, and each range is one call.
func TestSequence(t *testing.T) {
	leavesNothing(t)
	_, r := startStore(t)
	for _, n := range []int{0, 1, 100, 50_000} {
		events := plugin.InvokeSeq[Event](boundedContext(t), r, "Watch", "good", n)
		for range 2 {
			all, err := collect(t, events)
			check(t, err)
			checkEqual(t, "events", len(all), n)
			for i, e := range all {
				if e != (Event{N: i, Name: "good"}) {
					t.Fatalf("event %d is %v", i, e)
				}
			}
			invoke[struct{}](t, r, "Await", "left good")
		}
	}
	all, err := collect(t, plugin.InvokeSeq[Event](boundedContext(t), r, "Watch", "nil", 0))
	check(t, err)
	checkEqual(t, "values of nil", len(all), 0)
}

// The first error comes after all values, and keeps its identity.
func TestSequenceErrors(t *testing.T) {
	leavesNothing(t)
	_, r := startStore(t)
	for _, n := range []int{0, 1, 10_000} {
		all, err := collect(t, plugin.InvokeSeq[Event](boundedContext(t), r, "Watch", "fail", n))
		checkEqual(t, "values before an error", len(all), n)
		errorIs(t, "the error", err, fs.ErrNotExist)

		all, err = collect(t, plugin.InvokeSeq[Event](boundedContext(t), r, "Watch", "bad value", n))
		checkEqual(t, "values before one that cannot be sent", len(all), n)
		errorSays(t, err, "Event", "chan")

		points, err := collect(t, plugin.InvokeSeq[*Point](boundedContext(t), r, "Points", n))
		checkEqual(t, "points before nil", len(points), n)
		errorSays(t, err, "nil *plugin_test.Point")

		all, err = collect(t, plugin.InvokeSeq[Event](boundedContext(t), r, "Watch", "go on", n))
		checkEqual(t, "values of a sequence that goes on after its error", len(all), n)
		errorIs(t, "its error", err, fs.ErrNotExist)
	}
	all, err := collect(t, plugin.InvokeSeq[any](boundedContext(t), r, "Anything", valuesOf[any](nil, 1, "x", Point{1, 2}, nil)))
	check(t, err)
	checkEqual(t, "values of any type", fmt.Sprint(all), "[<nil> 1 x {1 2} <nil>]")
	_, err = collect(t, plugin.InvokeSeq[any](boundedContext(t), r, "Anything", valuesOf[any](1, hidden{})))
	errorSays(t, err, "hidden", "gob.Register")
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

// The end of the plugin is the error of the sequence.
func TestSequenceCrash(t *testing.T) {
	t.Parallel()
	c, r := startStore(t)
	all, err := collect(t, plugin.InvokeSeq[Event](boundedContext(t), r, "Watch", "panic", 10))
	var exit *plugin.ExitError
	if !errors.As(err, &exit) || !strings.Contains(exit.Panic, "boom") || len(all) > 10 {
		t.Errorf("a plugin that panics: %d values, %v", len(all), err)
	}
	<-c.Done()
	all, err = collect(t, plugin.InvokeSeq[Event](boundedContext(t), r, "Watch", "good", 10))
	if err == nil || len(all) > 0 {
		t.Errorf("afterwards: %d values, %v", len(all), err)
	}
}

// What cannot be called is one error, and nothing is sent.
func TestSequenceChecks(t *testing.T) {
	t.Parallel()
	host, _ := plugin.TestPluginRPCConn(t, newStorePlugin(new(store)), nil)
	s, err := plugin.Dispense[Store](host, "store")
	check(t, err)
	r := s.(storeClient).remote
	check(t, host.Close()) // so what is sent fails with rpc.ErrShutdown
	ctx := boundedContext(t)
	var noContext context.Context
	for _, test := range []struct {
		what  string
		seq   iter.Seq2[Event, error]
		words []string
	}{
		{"a nil context", plugin.InvokeSeq[Event](noContext, r, "Watch", "", 1), []string{"nil context"}},
		{"a nil Remote", plugin.InvokeSeq[Event](ctx, nil, "Watch", "", 1), []string{"nil"}},
		{"the zero Remote", plugin.InvokeSeq[Event](ctx, new(plugin.Remote), "Watch", "", 1), []string{"Watch"}},
		{"an unknown method", plugin.InvokeSeq[Event](ctx, r, "Look", "", 1), []string{`"Look"`, "Watch"}},
		{"a method without a sequence", plugin.InvokeSeq[Event](ctx, r, "Import", "", nil), []string{"Import", "Event"}},
		{"another type", plugin.InvokeSeq[Event](ctx, r, "Double", nil), []string{"Double", "Row", "Event"}},
		{"too few arguments", plugin.InvokeSeq[Event](ctx, r, "Watch", ""), []string{"Watch", "takes 2 arguments"}},
		{"too many", plugin.InvokeSeq[Event](ctx, r, "Watch", "", 1, 2), []string{"takes 2 arguments"}},
		{"an argument of another type", plugin.InvokeSeq[Event](ctx, r, "Watch", 1, 1), []string{"argument 1", "string"}},
	} {
		_, err := collect(t, test.seq)
		errorSays(t, err, test.words...)
		if errors.Is(err, rpc.ErrShutdown) {
			t.Errorf("%s was sent", test.what)
		}
	}
	errorSays(t, errorOf[iter.Seq2[Event, error]](t, r, "Watch", "", 1), "InvokeSeq")
	errorSays(t, errorOf[struct{}](t, r, "Watch", "", 1), "InvokeSeq")
	_, err = collect(t, plugin.InvokeSeq[Event](ctx, r, "Watch", "", 1))
	errorIs(t, "a correct call", err, rpc.ErrShutdown)
}

// For refuses other iterators and sequences elsewhere, with the reason.
func TestForRefusesSequences(t *testing.T) {
	for _, test := range [][]string{
		{forPanics[interface{ M() iter.Seq[int] }](), "iter.Seq[int]", "iter.Seq2[T, error]"},
		{forPanics[interface{ M() iter.Seq2[int, int] }](), "iter.Seq2[int,int]", "iter.Seq2[T, error]"},
		{forPanics[Gives[iter.Seq2[int, error]]](), "only result"},
		{forPanics[interface {
			M() iter.Seq2[chan int, error]
		}](), "chan int"},
		{forPanics[interface {
			M() iter.Seq2[Options, error]
		}](), "Options.Hooks.Before"},
		{forPanics[Takes[iter.Seq[int]]](), "iter.Seq[int]", "iter.Seq2[T, error]"},
		{forPanics[Takes[iter.Seq2[int, string]]](), "iter.Seq2[T, error]"},
		{forPanics[Takes[iter.Seq2[*hidden, error]]](), "hidden"},
		{forPanics[Takes[func(iter.Seq2[int, error]) error]](), "callback"},
		{forPanics[Takes[func() iter.Seq2[int, error]]](), "callback"},
		{forPanics[Takes[struct{ S iter.Seq2[int, error] }]](), ".S", "iter.Seq2"},
		// These are accepted.
		{forPanics[interface {
			M() iter.Seq2[*Point, error]
		}](), "<nil>"},
		{forPanics[Takes[func(yield func(string, error) bool)]](), "<nil>"},
	} {
		for _, word := range test[1:] {
			if !strings.Contains(test[0], word) {
				t.Errorf("For does not say %q: %s", word, test[0])
			}
		}
	}
}

// Leaving the loop ends the context of the method, and its yield returns false.
func TestSequenceLeft(t *testing.T) {
	leavesNothing(t)
	_, r := startStore(t)
	endless := plugin.InvokeSeq[Event](context.Background(), r, "Watch", "endless", 1<<40)
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
	for range plugin.InvokeSeq[Event](context.Background(), r, "Watch", "wait", 1) {
		break
	}
	invoke[struct{}](t, r, "Await", "left wait")
}

// The end of ctx is the error, and no value follows it.
func TestSequenceCanceled(t *testing.T) {
	leavesNothing(t)
	_, r := startStore(t)
	ctx, cancel := context.WithCancel(context.Background())
	n := 0
	for e, err := range plugin.InvokeSeq[Event](ctx, r, "Watch", "endless", 1<<40) {
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
	ctx, cancel = context.WithTimeout(context.Background(), 50*time.Millisecond)
	defer cancel()
	all, err := collect(t, plugin.InvokeSeq[Event](ctx, r, "Watch", "wait", 3))
	checkEqual(t, "values before the deadline", len(all), 3)
	errorIs(t, "the deadline", err, context.DeadlineExceeded)
	invoke[struct{}](t, r, "Await", "left wait")
	all, err = collect(t, plugin.InvokeSeq[Event](ctx, r, "Watch", "good", 3))
	checkEqual(t, "values afterwards", len(all), 0)
	errorIs(t, "afterwards", err, context.DeadlineExceeded)
}

// A slow loop holds the method back, and the method a sequence of the caller.
func TestSlowLoop(t *testing.T) {
	t.Parallel()
	_, r := startStore(t)
	var pulled atomic.Int64
	endless := func(yield func(Row, error) bool) {
		for yield(Row{1 << 40}, nil) {
			pulled.Add(1)
		}
	}
	for _, err := range plugin.InvokeSeq[Row](boundedContext(t), r, "Double", iter.Seq2[Row, error](endless)) {
		check(t, err)
		for before := int64(-1); before != pulled.Load(); time.Sleep(100 * time.Millisecond) {
			before = pulled.Load()
		}
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
	_, r := startStore(t)
	for _, n := range []int{0, 1, 20_000} {
		checkEqual(t, "the sum", invoke[int](t, r, "Import", "", rowsTo(n, nil)), n*(n-1)/2)
		errorIs(t, "its error", errorOf[int](t, r, "Import", "", rowsTo(n, fmt.Errorf("failing: %w", fs.ErrExist))), fs.ErrExist)
	}
	checkEqual(t, "an untyped nil", invoke[int](t, r, "Import", "", nil), 0)
	checkEqual(t, "a nil sequence", invoke[int](t, r, "Import", "", iter.Seq2[Row, error](nil)), 0)
	all, err := collect(t, plugin.InvokeSeq[Row](boundedContext(t), r, "Double", nil))
	check(t, err)
	checkEqual(t, "the double of nil", len(all), 0)

	errorSays(t, errorOf[int](t, r, "Import", "again", rowsTo(5, nil)), "once")
	bad := func(yield func(any, error) bool) { yield(make(chan int), nil) }
	_, err = collect(t, plugin.InvokeSeq[any](boundedContext(t), r, "Anything", iter.Seq2[any, error](bad)))
	errorSays(t, err, "chan int", "cannot be sent")
	for what, broken := range map[string]func(){"boom": func() { panic("boom") }, "Goexit": runtime.Goexit} {
		err := errorOf[int](t, r, "Import", "", iter.Seq2[Row, error](func(yield func(Row, error) bool) {
			yield(Row{}, nil)
			broken()
		}))
		errorSays(t, err, what)
	}
	invoke[int](t, r, "Import", "", rowsTo(10, nil))
}

// A sequence begins when the method ranges over it, and has ended when Invoke returns.
func TestEndOfParameter(t *testing.T) {
	leavesNothing(t)
	_, r := startStore(t)
	for _, how := range []string{"break", "ignore", "timeout"} {
		ctx, cancel := context.WithTimeout(context.Background(), hangs)
		if how == "timeout" {
			ctx, cancel = context.WithTimeout(context.Background(), 50*time.Millisecond)
		}
		begun, ended := false, false
		_, err := plugin.Invoke[int](ctx, r, "Import", how, iter.Seq2[Row, error](func(yield func(Row, error) bool) {
			begun = true
			defer func() { ended = true }()
			for yield(Row{}, nil) {
			}
			checkEqual(t, "yield after the end", yield(Row{}, nil), false)
		}))
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
	s := new(store)
	host, _ := plugin.TestPluginRPCConn(t, newStorePlugin(s), nil)
	d, err := plugin.Dispense[Store](host, "store")
	check(t, err)
	invoke[int](t, d.(storeClient).remote, "Import", "keep", rowsTo(5, nil))
	send(t, "the signal", s.event("now"), struct{}{})
	check(t, s.Await(boundedContext(t), "kept: plugin: the method that took the sequence has returned"))
}

// A sequence that waits does not hold Invoke or a loop that was left, and its yield
// returns false afterwards.
func TestWaitingSequence(t *testing.T) {
	leavesNothing(t)
	_, r := startStore(t)
	release, ended := make(chan struct{}), make(chan bool, 1)
	waiting := iter.Seq2[Row, error](func(yield func(Row, error) bool) {
		yield(Row{1}, nil)
		<-release
		ended <- yield(Row{2}, nil)
	})
	within(t, "Invoke", readTimeout, func() { invoke[int](t, r, "Import", "break", waiting) })
	release <- struct{}{}
	checkEqual(t, "yield after Invoke", receive(t, "the end", ended), false)
	within(t, "the loop", readTimeout, func() {
		for range plugin.InvokeSeq[Row](boundedContext(t), r, "Double", waiting) {
			break
		}
	})
	release <- struct{}{}
	checkEqual(t, "yield after the loop", receive(t, "the end", ended), false)
}

// A method ranges over one sequence and yields another, in turns.
func TestConversation(t *testing.T) {
	leavesNothing(t)
	_, r := startStore(t)
	say := make(chan int, 1)
	turns := 0
	say <- 1
	questions := iter.Seq2[Row, error](func(yield func(Row, error) bool) {
		for n := range say {
			if !yield(Row{n}, nil) {
				return
			}
		}
	})
	for row, err := range plugin.InvokeSeq[Row](boundedContext(t), r, "Double", questions) {
		check(t, err)
		turns++
		if turns == 20 {
			close(say)
			continue
		}
		say <- row.N
	}
	checkEqual(t, "turns", turns, 20)
	_, err := collect(t, plugin.InvokeSeq[Row](boundedContext(t), r, "Double", rowsTo(10, fs.ErrPermission)))
	errorIs(t, "an error there and back", err, fs.ErrPermission)
}
