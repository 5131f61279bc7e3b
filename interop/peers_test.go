package interop

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
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
	run                  func(*testing.T) error
}

const (
	grpcPeer  = "gRPC alone"
	oldPlugin = "our host, go-plugin plugin"
	oldHost   = "go-plugin host, our plugin"
)

var peerTests = []peerTest{
	{grpcPeer, "our host, a go-plugin plugin that speaks gRPC alone", "refused: `Start` says why, and nothing is left", grpcOnlyPlugin},
	{oldPlugin, "`Call` whose context ends", "returns at once; the method runs to its end, and the client stays usable", callGivenUp},
	{oldPlugin, "`errors.Is` for an error that a method returned", "the text arrives, as an `rpc.ServerError`, without the identity", lostIdentity},
	{oldPlugin, "`Call` during which the plugin panics", "an `ExitError` with the panic", exitError},
	{oldPlugin, "`DialRPC`, and `Accept` there", "works", dialOldRPC},
	{oldPlugin, "`ServeRPC`, and `Dial` there", "works", serveOldRPC},
	{oldPlugin, "`DialReader`, `DialWriter` for something else", "an error that says what the other side lacks", dialOldStream},
	{oldPlugin, "`ServeReader`, `ServeWriter`, dialled as something else", "the one that dials gets an error", serveOldStream},
	{oldHost, "a method that takes a context", "can be called as any other", methodWithContext},
	{oldHost, "a method's error with an identity", "the text arrives, as an `rpc.ServerError`", identityToOldHost},
	{oldHost, "`DialRPC`, `ServeRPC`", "work", rpcWithOldHost},
	{oldHost, "`DialReader`, `DialWriter` for something else", "an error that says what the other side lacks", dialFromOldHost},
	{oldHost, "`ServeReader`, `ServeWriter`, dialled as something else", "the one that dials gets an error", serveToOldHost},
}

var peerOutcomes [16]struct {
	once sync.Once
	err  error
}

// of runs a test, once in a test run, in a directory of its own, and sees that
// nothing is left.
func (p peerTest) of(t *testing.T, i int) error {
	o := &peerOutcomes[i]
	o.once.Do(func() {
		// Not t.TempDir, whose path is too long for sockets.
		dir, err := os.MkdirTemp("", "p-*")
		if err != nil {
			o.err = err
			return
		}
		defer os.RemoveAll(dir)
		t.Setenv("TMPDIR", dir)
		before := strings.Count(goroutinesLeft(0), "\n\n") + 1
		if o.err = p.run(t); o.err != nil {
			return
		}
		left := nothing(func() string { return processesLeft(dir) + filesLeft(dir) + goroutinesLeft(before) })
		if left != "" {
			o.err = fmt.Errorf("left behind: %s", left)
		}
	})
	return o.err
}

func TestPeers(t *testing.T) {
	for i, p := range peerTests {
		t.Run(p.group+"/"+p.what, func(t *testing.T) {
			if err := p.of(t, i); err != nil {
				t.Error(err)
			}
		})
	}
}

// within runs f, which must not hang.
func within(what string, f func() error) error {
	done := make(chan error, 1)
	go func() { done <- f() }()
	select {
	case err := <-done:
		return err
	case <-time.After(hangs):
		return fmt.Errorf("%s hangs", what)
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

// says checks that an error is there and says all that.
func says(err error, texts ...string) error {
	if err == nil {
		return errors.New("there is no error")
	}
	for _, text := range texts {
		if !strings.Contains(err.Error(), text) {
			return fmt.Errorf("the error does not say %q: %w", text, err)
		}
	}
	return nil
}

// remote is a plugin's broker and client, of whichever library.
type remote[B any] struct {
	broker B
	*rpc.Client
}

// ourHost is a Plugin for a host that uses this library.
type ourHost struct{}

func (ourHost) Server(*plugin.MuxBroker) (any, error) { return nil, nil }
func (ourHost) Client(b *plugin.MuxBroker, c *rpc.Client) (any, error) {
	return remote[*plugin.MuxBroker]{b, c}, nil
}

func ourConfig(binary string) *plugin.ClientConfig {
	return &plugin.ClientConfig{
		HandshakeConfig: plugin.HandshakeConfig(shared.Handshake),
		Plugins:         plugin.PluginSet{"worker": ourHost{}},
		Cmd:             exec.Command(binary),
		Logger:          hclog.NewNullLogger(),
	}
}

// withOldPlugin runs f with our host and a go-plugin plugin.
func withOldPlugin(t *testing.T, f func(*plugin.Client, remote[*plugin.MuxBroker]) error) error {
	c := plugin.NewClient(ourConfig(program{"plugin", build.GoPlugin}.path(t)))
	defer c.Kill()
	protocol, err := c.Client()
	if err != nil {
		return err
	}
	w, err := plugin.Dispense[remote[*plugin.MuxBroker]](protocol, "worker")
	if err != nil {
		return err
	}
	return within("the test", func() error { return f(c, w) })
}

// oldHostPlugin is a Plugin for a host that uses go-plugin.
type oldHostPlugin struct{}

func (oldHostPlugin) Server(*goplugin.MuxBroker) (any, error) { return nil, nil }
func (oldHostPlugin) Client(b *goplugin.MuxBroker, c *rpc.Client) (any, error) {
	return remote[*goplugin.MuxBroker]{b, c}, nil
}

// withOldHost runs f with a go-plugin host and a plugin of ours that uses what
// is new.
func withOldHost(t *testing.T, f func(remote[*goplugin.MuxBroker]) error) error {
	c := goplugin.NewClient(&goplugin.ClientConfig{
		HandshakeConfig: shared.Handshake,
		Plugins:         goplugin.PluginSet{"worker": oldHostPlugin{}},
		Cmd:             exec.Command(program{"newplugin", build.GoPlugin}.path(t)),
		Logger:          hclog.NewNullLogger(),
		SyncStdout:      io.Discard,
		SyncStderr:      io.Discard,
	})
	defer c.Kill()
	protocol, err := c.Client()
	if err != nil {
		return err
	}
	v, err := protocol.Dispense("worker")
	if err != nil {
		return err
	}
	return within("the test", func() error { return f(v.(remote[*goplugin.MuxBroker])) })
}

func grpcOnlyPlugin(t *testing.T) error {
	binary := program{"grpcplugin", build.GoPlugin}.path(t)
	for _, allowed := range [][]plugin.Protocol{nil, {plugin.ProtocolNetRPC}, {plugin.ProtocolGRPC}, {plugin.ProtocolNetRPC, plugin.ProtocolGRPC}} {
		config := ourConfig(binary)
		config.AllowedProtocols = allowed
		c := plugin.NewClient(config)
		err := within("a start that fails", func() error { _, err := c.Client(); return err })
		c.Kill()
		if err := says(err, "gRPC", "net/rpc"); err != nil {
			return fmt.Errorf("allowing %v: %w", allowed, err)
		}
		if !errors.As(err, new(*plugin.StartError)) {
			return fmt.Errorf("the error is a %T", err)
		}
	}
	return nil
}

func callGivenUp(t *testing.T) error {
	return withOldPlugin(t, func(_ *plugin.Client, w remote[*plugin.MuxBroker]) error {
		for range 10 {
			ctx, cancel := context.WithTimeout(context.Background(), 10*time.Millisecond)
			err := plugin.Call(ctx, w.Client, "Plugin.Sleep", 2*hangs, &struct{}{})
			cancel()
			if !errors.Is(err, context.DeadlineExceeded) {
				return fmt.Errorf("the error is %w", err)
			}
			var sum int
			if err := plugin.Call(context.Background(), w.Client, "Plugin.Add", [2]int{2, 3}, &sum); err != nil || sum != 5 {
				return fmt.Errorf("after that, 2+3 is %d, %w", sum, err)
			}
		}
		return nil
	})
}

func lostIdentity(t *testing.T) error {
	return withOldPlugin(t, func(_ *plugin.Client, w remote[*plugin.MuxBroker]) error {
		err := plugin.Call(context.Background(), w.Client, "Plugin.EOF", new(any), &struct{}{})
		var se rpc.ServerError
		if !errors.As(err, &se) || errors.Is(err, io.EOF) {
			return fmt.Errorf("the error is a %T: %w", err, err)
		}
		return says(err, "wrapped: EOF")
	})
}

func exitError(t *testing.T) error {
	return withOldPlugin(t, func(c *plugin.Client, w remote[*plugin.MuxBroker]) error {
		err := plugin.Call(context.Background(), w.Client, "Plugin.Crash", new(any), &struct{}{})
		var exit *plugin.ExitError
		if !errors.As(err, &exit) || !errors.Is(err, io.ErrUnexpectedEOF) {
			return fmt.Errorf("the error is a %T: %w", err, err)
		}
		<-c.Done()
		// A go-plugin plugin leaves its socket when it crashes, in the directory
		// that this host has made and removed.
		return says(errors.New(exit.Panic), "crash on demand")
	})
}

func dialOldRPC(t *testing.T) error {
	return withOldPlugin(t, func(_ *plugin.Client, w remote[*plugin.MuxBroker]) error {
		var id uint32
		if err := w.Call("Plugin.Helper", new(any), &id); err != nil {
			return err
		}
		client, err := w.broker.DialRPC(id)
		if err != nil {
			return err
		}
		defer client.Close()
		var got string
		err = plugin.Call(context.Background(), client, "Plugin.Greet", "host", &got)
		if got != "hello, host" {
			return fmt.Errorf("%q, %w", got, err)
		}
		return err
	})
}

type greeter struct{}

func (greeter) Greet(name string, out *string) error { *out = "welcome, " + name; return nil }

func serveOldRPC(t *testing.T) error {
	return withOldPlugin(t, func(_ *plugin.Client, w remote[*plugin.MuxBroker]) error {
		var got string
		err := w.Call("Plugin.CallBack", w.broker.ServeRPC(greeter{}), &got)
		if got != "welcome, the plugin" {
			return fmt.Errorf("%q, %w", got, err)
		}
		return err
	})
}

// lacking is what an error says about a peer that has no readers and writers.
var lacking = []string{"the other side", "this library"}

func dialOldStream(t *testing.T) error {
	return withOldPlugin(t, func(_ *plugin.Client, w remote[*plugin.MuxBroker]) error {
		reader := func(id uint32) error { _, err := w.broker.DialReader(id); return err }
		writer := func(id uint32) error { _, err := w.broker.DialWriter(id); return err }
		// An RPC server, which waits for the rest of what it takes for gob.
		service := func(dial func(uint32) error) func() error {
			return func() error {
				var id uint32
				if err := w.Call("Plugin.Helper", new(any), &id); err != nil {
					return err
				}
				return says(dial(id), lacking...)
			}
		}
		// Somebody who reads and says nothing, and must get an end.
		silent := func(dial func(uint32) error) func() error {
			return func() error {
				id := w.broker.NextId()
				call := w.Go("Plugin.Receive", shared.Transfer{ID: id, Size: 4}, new(string), nil)
				return errors.Join(says(dial(id), lacking...), (<-call.Done).Error)
			}
		}
		return together(service(reader), service(writer), silent(reader), silent(writer))
	})
}

func serveOldStream(t *testing.T) error {
	return withOldPlugin(t, func(_ *plugin.Client, w remote[*plugin.MuxBroker]) error {
		for name, id := range map[string]uint32{
			"ServeReader": w.broker.ServeReader(strings.NewReader("text")),
			"ServeWriter": w.broker.ServeWriter(io.Discard),
		} {
			// The plugin makes an RPC client of it, which cannot succeed.
			if err := says(w.Call("Plugin.CallBack", id, new(string))); err != nil {
				return fmt.Errorf("%s: %w", name, err)
			}
		}
		var sum int
		return w.Call("Plugin.Add", [2]int{2, 3}, &sum)
	})
}

func methodWithContext(t *testing.T) error {
	return withOldHost(t, func(w remote[*goplugin.MuxBroker]) error {
		var got string
		if err := w.Call("Plugin.Wait", time.Millisecond, &got); err != nil || got != "<nil>" {
			return fmt.Errorf("during the call, the context is at %q, %w", got, err)
		}
		return nil
	})
}

func identityToOldHost(t *testing.T) error {
	return withOldHost(t, func(w remote[*goplugin.MuxBroker]) error {
		err := w.Call("Plugin.Missing", "x", &struct{}{})
		if want := fmt.Sprintf("x: %v", fs.ErrNotExist); err != rpc.ServerError(want) {
			return fmt.Errorf("the error is a %T: %w", err, err)
		}
		return nil
	})
}

func rpcWithOldHost(t *testing.T) error {
	return withOldHost(t, func(w remote[*goplugin.MuxBroker]) error {
		id := w.broker.NextId()
		go w.broker.AcceptAndServe(id, greeter{})
		var got string
		if err := w.Call("Plugin.CallBack", id, &got); err != nil || got != "welcome, the plugin" {
			return fmt.Errorf("%q, %w", got, err)
		}
		if err := w.Call("Plugin.Helper", new(any), &id); err != nil {
			return err
		}
		conn, err := w.broker.Dial(id)
		if err != nil {
			return err
		}
		client := rpc.NewClient(conn)
		defer client.Close()
		if err := client.Call("Plugin.Greet", "host", &got); err != nil || got != "hello, host" {
			return fmt.Errorf("%q, %w", got, err)
		}
		return nil
	})
}

func dialFromOldHost(t *testing.T) error {
	return withOldHost(t, func(w remote[*goplugin.MuxBroker]) error {
		service := func(method string) func() error {
			return func() error {
				id := w.broker.NextId()
				go w.broker.AcceptAndServe(id, greeter{})
				return says(w.Call(method, id, new(string)), lacking...)
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
				return errors.Join(err, conn.Close(), says((<-call.Done).Error, lacking...))
			}
		}
		return together(service("Plugin.Read"), service("Plugin.Write"), silent("Plugin.Read"), silent("Plugin.Write"))
	})
}

func serveToOldHost(t *testing.T) error {
	return withOldHost(t, func(w remote[*goplugin.MuxBroker]) error {
		dial := func(method string) (net.Conn, error) {
			var id uint32
			if err := w.Call(method, new(any), &id); err != nil {
				return nil, err
			}
			return w.broker.Dial(id)
		}
		service := func(method string) func() error {
			return func() error {
				conn, err := dial(method)
				if err != nil {
					return err
				}
				client := rpc.NewClient(conn)
				defer client.Close()
				return says(client.Call("Plugin.Greet", "host", new(string)))
			}
		}
		silent := func(method string) func() error {
			return func() error {
				conn, err := dial(method)
				if err != nil {
					return err
				}
				_, err = io.Copy(io.Discard, conn)
				return errors.Join(err, conn.Close())
			}
		}
		return together(service("Plugin.Reader"), service("Plugin.Writer"), silent("Plugin.Reader"), silent("Plugin.Writer"))
	})
}
