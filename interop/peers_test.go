package interop

import (
	"context"
	"errors"
	"io"
	"io/fs"
	"net/rpc"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	goplugin "github.com/hashicorp/go-plugin"
	"github.com/muxplug/plugin"

	"github.com/muxplug/plugin/interop/internal/build"
	"github.com/muxplug/plugin/interop/shared"
)

// The tests here are about what one library has and the other has not. The
// host is this process: with ours it uses what is new, with go-plugin's it is
// an old host.

// peerTest is one of these tests: what is tried, and what must come of it.
type peerTest struct {
	group, what, outcome string
	run                  func(*testing.T)
}

const (
	oursFirst     = "our host, go-plugin plugin"
	goPluginFirst = "go-plugin host, our plugin"
)

var peerTests = []peerTest{
	{oursFirst, "a plugin that speaks gRPC alone", "refused: `Start` says why, and nothing is left", grpcOnlyPlugin},
	{oursFirst, "`Call` whose context ends", "returns at once; the method runs to its end, and the client stays usable", cancelledCall},
	{oursFirst, "`errors.Is` for an error that a method returned", "the text arrives, as an `rpc.ServerError`, without the identity", lostIdentity},
	{oursFirst, "`Call` during which the plugin panics", "an `ExitError` with the panic", exitError},
	{oursFirst, "`DialRPC`, and `Accept` there", "works", dialGoPluginRPC},
	{oursFirst, "`ServeRPC`, and `Dial` there", "works", serveGoPluginRPC},
	{oursFirst, "`DialReader`, `DialWriter` for something else", "an error, at the latest when it is used", dialGoPluginStream},
	{oursFirst, "`ServeReader`, `ServeWriter`, called as another service", "the plugin gets an error", serveGoPluginStream},
	{goPluginFirst, "a method that takes a context", "can be called as any other", methodWithContext},
	{goPluginFirst, "a method's error with an identity", "the text arrives, as an `rpc.ServerError`", identityToGoPlugin},
	{goPluginFirst, "`DialRPC`, `ServeRPC`", "work", rpcWithGoPlugin},
	{goPluginFirst, "`DialReader`, `DialWriter` for something else", "an error, at the latest when it is used", dialFromGoPlugin},
	{goPluginFirst, "`ServeReader`, `ServeWriter`, called as another service", "the host gets an error", serveToGoPlugin},
}

// TestPeers runs each in a directory of its own, and sees that nothing is left.
func TestPeers(t *testing.T) {
	for _, p := range peerTests {
		t.Run(p.group+"/"+p.what, func(t *testing.T) {
			// Not t.TempDir, whose path is too long for sockets.
			dir, err := os.MkdirTemp("", "p-*")
			ok(t, err)
			t.Setenv("TMPDIR", dir)
			before := strings.Count(goroutinesLeft(0), "\n\n") + 1
			hanging := time.AfterFunc(2*hangs, func() { panic("the test hangs:\n" + goroutinesLeft(0)) })
			t.Cleanup(func() { // after the test's own
				hanging.Stop()
				left := nothing(func() string { return processesLeft(dir) + filesLeft(dir) + goroutinesLeft(before) })
				if left != "" {
					t.Error("left behind:", left)
				}
				_ = os.RemoveAll(dir)
			})
			p.run(t)
		})
	}
}

// together runs all at once, for they wait for five seconds each.
func together(fs ...func() error) error {
	errs := make([]error, len(fs))
	var running sync.WaitGroup
	for i, f := range fs {
		running.Go(func() { errs[i] = f() })
	}
	running.Wait()
	return errors.Join(errs...)
}

// fails makes an error of there being none.
func fails(err error) error {
	if err == nil {
		return errors.New("there is no error")
	}
	return nil
}

func must(t *testing.T, holds bool, format string, args ...any) {
	t.Helper()
	if !holds {
		t.Fatalf(format, args...)
	}
}

// remote is a plugin's broker and client, of whichever library.
type remote[B any] struct {
	broker B
	*rpc.Client
}

// sound checks that it can be called.
func (r remote[B]) sound(t *testing.T) {
	t.Helper()
	var sum int
	ok(t, r.Call("Plugin.Add", [2]int{2, 3}, &sum))
	must(t, sum == 5, "2+3 is %d", sum)
}

// ourHost is a Plugin for a host that uses this library.
type ourHost struct{}

func (ourHost) Server(*plugin.MuxBroker) (any, error) { return nil, nil }
func (ourHost) Client(b *plugin.MuxBroker, c *rpc.Client) (any, error) {
	return remote[*plugin.MuxBroker]{b, c}, nil
}

// ourClient is a client for a plugin made with go-plugin.
func ourClient(t *testing.T, pkg string, allowed ...plugin.Protocol) *plugin.Client {
	c := plugin.NewClient(&plugin.ClientConfig{
		HandshakeConfig:  plugin.HandshakeConfig(shared.Handshake),
		Plugins:          plugin.PluginSet{"worker": ourHost{}},
		Cmd:              exec.Command(program{pkg, build.GoPlugin}.path(t)),
		Logger:           hclog.NewNullLogger(),
		AllowedProtocols: allowed,
	})
	t.Cleanup(c.Kill)
	return c
}

// goPlugin returns a go-plugin plugin, as a host of ours has it.
func goPlugin(t *testing.T) (*plugin.Client, remote[*plugin.MuxBroker]) {
	c := ourClient(t, "plugin")
	protocol, err := c.Client()
	ok(t, err)
	w, err := plugin.Dispense[remote[*plugin.MuxBroker]](protocol, "worker")
	ok(t, err)
	return c, w
}

// goPluginHost is a Plugin for a host that uses go-plugin.
type goPluginHost struct{}

func (goPluginHost) Server(*goplugin.MuxBroker) (any, error) { return nil, nil }
func (goPluginHost) Client(b *goplugin.MuxBroker, c *rpc.Client) (any, error) {
	return remote[*goplugin.MuxBroker]{b, c}, nil
}

// ourPlugin returns a plugin of ours that uses what go-plugin has not, as a
// go-plugin host has it.
func ourPlugin(t *testing.T) remote[*goplugin.MuxBroker] {
	c := goplugin.NewClient(&goplugin.ClientConfig{
		HandshakeConfig: shared.Handshake,
		Plugins:         goplugin.PluginSet{"worker": goPluginHost{}},
		Cmd:             exec.Command(program{"newplugin", build.Ours}.path(t)),
		Logger:          hclog.NewNullLogger(),
		SyncStdout:      io.Discard,
		SyncStderr:      io.Discard,
	})
	t.Cleanup(c.Kill)
	protocol, err := c.Client()
	ok(t, err)
	v, err := protocol.Dispense("worker")
	ok(t, err)
	return v.(remote[*goplugin.MuxBroker])
}

func grpcOnlyPlugin(t *testing.T) {
	for _, allowed := range [][]plugin.Protocol{nil, {plugin.ProtocolNetRPC}, {plugin.ProtocolGRPC}, {plugin.ProtocolNetRPC, plugin.ProtocolGRPC}} {
		_, err := ourClient(t, "grpcplugin", allowed...).Client()
		must(t, errors.As(err, new(*plugin.StartError)), "allowing %v, the error is a %T: %v", allowed, err, err)
		must(t, strings.Contains(err.Error(), "gRPC"), "allowing %v, the error is %v", allowed, err)
	}
}

func cancelledCall(t *testing.T) {
	_, w := goPlugin(t)
	for range 10 {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Millisecond)
		err := plugin.Call(ctx, w.Client, "Plugin.Sleep", 2*hangs, &struct{}{})
		cancel()
		must(t, errors.Is(err, context.DeadlineExceeded), "the error is %v", err)
		w.sound(t)
	}
}

func lostIdentity(t *testing.T) {
	_, w := goPlugin(t)
	err := plugin.Call(context.Background(), w.Client, "Plugin.EOF", new(any), &struct{}{})
	var text rpc.ServerError
	must(t, errors.As(err, &text) && text == "wrapped: EOF" && !errors.Is(err, io.EOF), "the error is a %T: %v", err, err)
}

func exitError(t *testing.T) {
	c, w := goPlugin(t)
	err := plugin.Call(context.Background(), w.Client, "Plugin.Crash", new(any), &struct{}{})
	var exit *plugin.ExitError
	must(t, errors.As(err, &exit) && errors.Is(err, io.ErrUnexpectedEOF), "the error is a %T: %v", err, err)
	must(t, strings.Contains(exit.Panic, "crash on demand"), "the panic is %q", exit.Panic)
	// A go-plugin plugin leaves its socket when it crashes, in the directory that
	// this host has made and removes.
	<-c.Done()
}

func dialGoPluginRPC(t *testing.T) {
	_, w := goPlugin(t)
	var id uint32
	ok(t, w.Call("Plugin.Helper", new(any), &id))
	client, err := w.broker.DialRPC(id)
	ok(t, err)
	defer client.Close()
	var got string
	ok(t, plugin.Call(context.Background(), client, "Plugin.Greet", "host", &got))
	must(t, got == "hello, host", "the answer is %q", got)
}

type greeter struct{}

func (greeter) Greet(name string, out *string) error { *out = "welcome, " + name; return nil }

func serveGoPluginRPC(t *testing.T) {
	_, w := goPlugin(t)
	id, stop := w.broker.ServeRPC(greeter{})
	defer stop()
	var got string
	ok(t, w.Call("Plugin.CallBack", id, &got))
	must(t, got == "welcome, the plugin", "the answer is %q", got)
}

func dialGoPluginStream(t *testing.T) {
	_, w := goPlugin(t)
	read := func(id uint32) error {
		r, err := w.broker.DialReader(id)
		if err != nil {
			return nil
		}
		_, err = io.ReadAll(r)
		return errors.Join(fails(err), r.Close())
	}
	write := func(id uint32) error {
		wr, err := w.broker.DialWriter(id)
		if err != nil {
			return nil
		}
		_, err = io.WriteString(wr, "text")
		return fails(errors.Join(err, wr.Close()))
	}
	// An RPC server, which waits for the rest of what it takes for gob.
	service := func(dial func(uint32) error) func() error {
		return func() error {
			var id uint32
			return errors.Join(w.Call("Plugin.Helper", new(any), &id), dial(id))
		}
	}
	// Somebody who reads and says nothing, and must get an end.
	silent := func(dial func(uint32) error) func() error {
		return func() error {
			id := w.broker.NextId()
			call := w.Go("Plugin.Receive", shared.Transfer{ID: id}, new(string), nil)
			err := dial(id)
			<-call.Done
			return err
		}
	}
	ok(t, together(service(read), service(write), silent(read), silent(write)))
}

func serveGoPluginStream(t *testing.T) {
	_, w := goPlugin(t)
	reader, stopReading := w.broker.ServeReader(strings.NewReader("text"))
	defer stopReading()
	writer, stopWriting := w.broker.ServeWriter(io.Discard)
	defer stopWriting()
	// The plugin makes an RPC client of each, which cannot succeed.
	for _, id := range []uint32{reader, writer} {
		ok(t, fails(w.Call("Plugin.CallBack", id, new(string))))
	}
	w.sound(t)
}

func methodWithContext(t *testing.T) {
	var got string
	ok(t, ourPlugin(t).Call("Plugin.Wait", time.Millisecond, &got))
	must(t, got == "<nil>", "during the call, the context is at %q", got)
}

func identityToGoPlugin(t *testing.T) {
	err := ourPlugin(t).Call("Plugin.Missing", "x", &struct{}{})
	must(t, err == rpc.ServerError("x: "+fs.ErrNotExist.Error()), "the error is a %T: %v", err, err)
}

func rpcWithGoPlugin(t *testing.T) {
	w := ourPlugin(t)
	id := w.broker.NextId()
	go w.broker.AcceptAndServe(id, greeter{})
	var got string
	ok(t, w.Call("Plugin.CallBack", id, &got))
	must(t, got == "welcome, the plugin", "the answer is %q", got)
	ok(t, w.Call("Plugin.Helper", new(any), &id))
	conn, err := w.broker.Dial(id)
	ok(t, err)
	client := rpc.NewClient(conn)
	defer client.Close()
	ok(t, client.Call("Plugin.Greet", "host", &got))
	must(t, got == "hello, host", "the answer is %q", got)
}

func dialFromGoPlugin(t *testing.T) {
	w := ourPlugin(t)
	service := func(method string) func() error {
		return func() error {
			id := w.broker.NextId()
			go w.broker.AcceptAndServe(id, greeter{})
			return fails(w.Call(method, id, new(string)))
		}
	}
	silent := func(method string) func() error {
		return func() error {
			id := w.broker.NextId()
			call := w.Go(method, id, new(string), nil)
			conn, err := w.broker.Accept(id)
			if err != nil {
				return err
			}
			_, err = io.Copy(io.Discard, conn)
			return errors.Join(err, conn.Close(), fails((<-call.Done).Error))
		}
	}
	ok(t, together(service("Plugin.Read"), service("Plugin.Write"), silent("Plugin.Read"), silent("Plugin.Write")))
}

func serveToGoPlugin(t *testing.T) {
	w := ourPlugin(t)
	for _, method := range []string{"Plugin.Reader", "Plugin.Writer"} {
		var id uint32
		ok(t, w.Call(method, new(any), &id))
		conn, err := w.broker.Dial(id)
		ok(t, err)
		client := rpc.NewClient(conn)
		ok(t, fails(client.Call("Plugin.Greet", "host", new(string))))
		ok(t, client.Close())
	}
}
