package plugin_test

import (
	"context"
	"errors"
	"fmt"
	"net/rpc"
	"runtime"
	"strings"
	"testing"
	"weak"

	"github.com/hashicorp/go-hclog"
	"github.com/muxplug/plugin"
)

// ---- Contexts of methods ----

// The context of a method ends with that of its call and with the caller.
func TestServedContext(t *testing.T) {
	for name, want := range map[string]error{ // nil for any
		"cancel":         context.Canceled,
		"deadline":       context.DeadlineExceeded,
		"client closed":  nil,
		"session closed": nil,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			bothWays(t, func(t *testing.T, here, there *plugin.MuxBroker) {
				s := newTestServer()
				c := dialled(t, here, there, s)
				deadline := newDeadlineContext()
				ctx, cancel := context.WithCancel(deadline)
				defer cancel()
				done := async(func() error { return callIn(ctx, c, "Wait") })
				receive(t, "the call", s.started)
				switch name {
				case "cancel":
					cancel()
				case "deadline":
					deadline.pass()
				case "client closed":
					c.Close()
				case "session closed":
					here.Close()
				}
				cause := receive(t, "the end of the context", s.ended)
				if want != nil && !errors.Is(cause, want) {
					t.Errorf("the context ended by %v and not %v", cause, want)
				}
				if err := receive(t, "the end of Call", done); err == nil {
					t.Error("Call returned no error")
				}
			})
		})
	}
}

// When the plugin is asked to quit, the contexts of methods end on both sides.
func TestServedContextEndsWithQuit(t *testing.T) {
	host, test, guest := joinInProcess(t)
	callback := newTestServer()
	id, _ := test.broker.ServeRPC(callback)
	waiting := async(func() error { return test.Call("Plugin.Wait", "", new(string)) })
	calling := async(func() error {
		return test.Call("Plugin.CallBack", Callback{ID: id, Method: "Wait"}, new(string))
	})
	receive(t, "the call", guest.started)
	receive(t, "the callback", callback.started)
	closed := async(host.Close)
	receive(t, "the end of the method's context", guest.ended)
	receive(t, "the end of the callback's context", callback.ended)
	check(t, receive(t, "Close", closed))
	for _, done := range []<-chan error{waiting, calling} {
		if err := receive(t, "the end of a call", done); err == nil {
			t.Error("a call returned no error")
		}
	}
}

// A call that is cancelled leaves the others of its stream alone.
func TestCancelOneOfMany(t *testing.T) {
	bothWays(t, func(t *testing.T, here, there *plugin.MuxBroker) {
		s := newTestServer()
		c := dialled(t, here, there, s)
		ctx, cancel := context.WithCancel(context.Background())
		const pairs = 50
		canceled, released := make(chan error, pairs), make(chan string, pairs)
		for i := range pairs {
			go func() { canceled <- callIn(ctx, c, "Wait") }()
			go func() { released <- mustCall[string](t, c, "Wait", fmt.Sprint(i)) }()
			receive(t, "a call", s.started)
			receive(t, "a call", s.started)
		}
		cancel()
		for range pairs {
			if err := receive(t, "a cancelled call", canceled); !errors.Is(err, context.Canceled) {
				t.Error(err)
			}
			receive(t, "the end of a context", s.ended)
		}
		close(s.release)
		got := make(map[string]bool)
		for range pairs {
			got[receive(t, "a released call", released)] = true
		}
		if len(got) != pairs || len(s.ended) > 0 {
			t.Errorf("the others have replied %v, and %d contexts have ended", got, len(s.ended))
		}
	})
}

// ---- Lost connections ----

// A panic in a method of the host is an error of that call, and is logged with its
// trace.
func TestCallbackPanics(t *testing.T) {
	t.Parallel()
	cfg := testConfig("plugin")
	logger, records := recorder()
	cfg.Logger = logger
	_, p := startPlugin(t, cfg)
	test := dispense(t, p)
	id, stop := test.broker.ServeRPC(newTestServer())
	defer stop()
	callback := Callback{ID: id, Method: "Panic", Arg: "a broken callback"}
	err := plugin.Call(boundedContext(t), test.Client, "Plugin.CallBack", callback, new(string))
	errorSays(t, err, "a broken callback")
	logged := records.find("panicked")
	if len(logged) != 1 || logged[0].level != hclog.Error {
		t.Fatalf("the log has %+v", logged)
	}
	if trace := fmt.Sprint(logged[0].args...); !strings.Contains(trace, "plugin_test.go") {
		t.Errorf("the trace does not have the method: %s", trace)
	}
	echo(t, test.Client)
}

// A panic or Goexit in a method of the host leaves the other calls of its stream
// alone.
func TestCallbackPanicsBesideOthers(t *testing.T) {
	_, host, guest := joinInProcess(t)
	callback := newTestServer()
	c := dialled(t, guest.broker, host.broker, callback)
	beside := async(func() error { return c.Call("Plugin.Block", "", new(string)) })
	receive(t, "the call beside", callback.started)
	for range 3 {
		errorSays(t, plugin.Call(boundedContext(t), c, "Plugin.Panic", "boom", new(string)), "boom")
	}
	close(callback.release)
	check(t, receive(t, "the call beside", beside))
	c = dialled(t, guest.broker, host.broker, leaving{})
	errorSays(t, plugin.Call(boundedContext(t), c, "Plugin.Leave", "", new(string)), "Goexit")
}

// leaving ends the goroutine of its method, as t.Fatal does.
type leaving struct{}

func (leaving) Leave(string, *string) error {
	runtime.Goexit()
	return nil
}

// A plain call whose reply does not fit ends its client, as in net/rpc, and
// nothing else. The client can be collected then.
func TestMisfitReply(t *testing.T) {
	_, p := startPlugin(t, testConfig("plugin"))
	test := dispense(t, p)
	errorSays(t, test.Call("Plugin.Echo", "text", new(int)), "int")
	if test.Call("Plugin.Echo", "", new(string)) == nil {
		t.Error("a later call returned no error")
	}
	dispenseAndEcho(t, p)
	client := weak.Make(test.Client)
	test = nil
	await(t, "the client to be collected", func() bool {
		runtime.GC()
		return client.Value() == nil
	})
}

// ---- Methods ----

// unfit has a method for each reason for which it cannot be called.
type unfit struct{}

func (unfit) Many(_, _, _ string) error                         { return nil }
func (unfit) Value(_, _ string) error                           { return nil }
func (unfit) NoError(string, *string)                           {}
func (unfit) Other(string, *string) bool                        { return false }
func (unfit) Variadic(string, ...string) error                  { return nil }
func (unfit) Last(_ string, _ *string, _ context.Context) error { return nil }
func (unfit) Context(_ context.Context, _ string) error         { return nil }

// partlyUnfit has a method that can be called.
type partlyUnfit struct {
	unfit
	*testServer
}

func (partlyUnfit) Hidden(in notRegistered, out *notRegistered) error { return mirrored(in, out) }

// Fill writes into a map, which is there already.
func (partlyUnfit) Fill(key string, out *map[string]bool) error {
	(*out)[key] = true
	return nil
}

// onPointer has its method on the pointer.
type onPointer struct{}

func (*onPointer) Echo(in string, out *string) error { return mirrored(in, out) }

// What has no method that can be called is not served, and the error says why.
func TestNoMethods(t *testing.T) {
	for _, test := range []struct {
		v     any
		words []string
	}{
		{nil, nil},
		{struct{}{}, nil},
		{onPointer{}, []string{"onPointer", "pointer"}},
		{unfit{}, []string{"unfit", "Many", "Value", "NoError", "Other", "Variadic", "Last", "Context"}},
	} {
		host, _ := plugin.TestPluginRPCConn(t, plugin.PluginSet{"test": serves(test.v)}, nil)
		_, err := host.Dispense("test")
		errorSays(t, err, test.words...)
		check(t, host.Ping())
		bothWays(t, func(t *testing.T, here, there *plugin.MuxBroker) {
			err := callIn(boundedContext(t), dialled(t, here, there, test.v), "Echo")
			errorSays(t, err, test.words...)
		})
	}
}

// Of a receiver, the methods that have the right form can be called. The error of
// another name says what there is.
func TestMethods(t *testing.T) {
	for _, wire := range wires {
		if !wire.plugin {
			continue
		}
		c := wire.connect(t, partlyUnfit{testServer: newTestServer()})
		for method, words := range map[string][]string{
			"Plugin.Value":   {"Plugin.Value", "pointer"},
			"Plugin.Missing": {"Plugin.Missing", "Echo", "Wait", "ProtocolVersion"},
			"Other.Echo":     {"Other.Echo", "Plugin"},
			"Echo":           {"Plugin.Echo"},
		} {
			err := plugin.Call(boundedContext(t), c, method, new(any), new(string))
			if !isA[rpc.ServerError](err) {
				t.Errorf("%s returned %T: %v", method, err, err)
			}
			errorSays(t, err, words...)
		}
		mustCall[notRegistered](t, c, "Hidden", notRegistered{1})
		mustCall[map[string]bool](t, c, "Fill", "x")
	}
}
