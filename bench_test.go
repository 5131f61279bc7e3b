package plugin_test

import (
	"bytes"
	"context"
	"io"
	"net"
	"net/rpc"
	"runtime"
	"sync/atomic"
	"testing"

	"github.com/muxplug/plugin"
)

// The benchmarks call a plugin in a process of its own. CONTRIBUTING.md says how two
// commits are compared.

func init() {
	modes["bench"] = func() {
		servePlugin(func(cfg *plugin.ServeConfig) { cfg.Plugins = benchPlugins })
	}
}

var benchPlugins = plugin.PluginSet{
	"calls":   benchPlugin{},
	"greeter": plugin.For[benchGreeter](&greeterOfBench{}, newGreeterClient),
}

// benchPlugin serves a benchServer. In the host it is a *benchClient.
type benchPlugin struct{}

func (benchPlugin) Server(b *plugin.MuxBroker) (any, error) {
	return &benchServer{broker: b}, nil
}

func (benchPlugin) Client(b *plugin.MuxBroker, c *rpc.Client) (any, error) {
	return &benchClient{Client: c, broker: b}, nil
}

type benchClient struct {
	*rpc.Client
	broker *plugin.MuxBroker
}

type benchServer struct{ broker *plugin.MuxBroker }

// Add is a small call.
func (*benchServer) Add(terms [2]int, sum *int) error {
	*sum = terms[0] + terms[1]
	return nil
}

// Echo returns what it is given.
func (*benchServer) Echo(data []byte, out *[]byte) error {
	*out = data
	return nil
}

// Pong accepts a stream, after it has returned, and sends the first message back.
func (s *benchServer) Pong(id uint32, _ *struct{}) error {
	// Ends when the host closes the stream.
	go func() {
		if conn, err := s.broker.Accept(id); err == nil {
			sendBack(conn)
		}
	}()
	return nil
}

func sendBack(conn net.Conn) {
	defer conn.Close()
	message := make([]byte, 64)
	n, err := conn.Read(message)
	if err == nil {
		_, _ = conn.Write(message[:n]) // the host notices
	}
}

// Drain reads the reader that the host serves as id.
func (s *benchServer) Drain(id uint32, size *int64) error {
	r, err := s.broker.DialReader(id)
	if err != nil {
		return err
	}
	defer r.Close()
	*size, err = io.CopyBuffer(struct{ io.Writer }{io.Discard}, r, make([]byte, 64<<10))
	return err
}

// benchGreeter is an interface across the connection.
type benchGreeter interface {
	Add(ctx context.Context, a, b int) (int, error)
}

type greeterOfBench struct{}

func (*greeterOfBench) Add(_ context.Context, a, b int) (int, error) { return a + b, nil }

type greeterClient struct{ remote *plugin.Remote }

func newGreeterClient(r *plugin.Remote) benchGreeter { return &greeterClient{remote: r} }

func (c *greeterClient) Add(ctx context.Context, a, b int) (int, error) {
	return plugin.Invoke[int](ctx, c.remote, "Add", a, b)
}

// startBench starts the plugin of the benchmarks.
func startBench(b *testing.B) plugin.ClientProtocol {
	b.Helper()
	cfg := testConfig("bench")
	cfg.Plugins = benchPlugins
	_, protocol := startPlugin(b, cfg)
	return protocol
}

func startBenchClient(b *testing.B) *benchClient {
	b.Helper()
	c, err := plugin.Dispense[*benchClient](startBench(b), "calls")
	check(b, err)
	return c
}

func (c *benchClient) add() error {
	var sum int
	return plugin.Call(context.Background(), c.Client, "Plugin.Add", [2]int{3, 4}, &sum)
}

// A small call.
func BenchmarkCall(b *testing.B) {
	c := startBenchClient(b)
	for b.Loop() {
		check(b, c.add())
	}
}

// The same through an interface.
func BenchmarkInvoke(b *testing.B) {
	greeter, err := plugin.Dispense[benchGreeter](startBench(b), "greeter")
	check(b, err)
	for b.Loop() {
		_, err := greeter.Add(context.Background(), 3, 4)
		check(b, err)
	}
}

// Small calls by 64 callers on one client.
func BenchmarkCallers(b *testing.B) {
	c := startBenchClient(b)
	b.SetParallelism((64 + runtime.GOMAXPROCS(0) - 1) / runtime.GOMAXPROCS(0))
	var failed atomic.Pointer[error]
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			if err := c.add(); err != nil {
				failed.Store(&err)
			}
		}
	})
	if err := failed.Load(); err != nil {
		b.Fatal(*err)
	}
}

func BenchmarkEcho64KiB(b *testing.B) { benchmarkEcho(b, 64<<10) }
func BenchmarkEcho1MiB(b *testing.B)  { benchmarkEcho(b, 1<<20) }

func benchmarkEcho(b *testing.B, size int) {
	c := startBenchClient(b)
	data := make([]byte, size)
	b.SetBytes(int64(size))
	for b.Loop() {
		var out []byte
		check(b, plugin.Call(context.Background(), c.Client, "Plugin.Echo", data, &out))
	}
}

// A reader of 16 MiB that the plugin reads.
func BenchmarkStream(b *testing.B) {
	c := startBenchClient(b)
	data := make([]byte, 16<<20)
	b.SetBytes(int64(len(data)))
	for b.Loop() {
		id, stop := c.broker.ServeReader(bytes.NewReader(data))
		var size int64
		check(b, c.Call("Plugin.Drain", id, &size))
		stop()
		if size != int64(len(data)) {
			b.Fatal("the plugin has read", size, "bytes")
		}
	}
}

// An instance that is dispensed, called once, and closed.
func BenchmarkDispense(b *testing.B) {
	protocol := startBench(b)
	for b.Loop() {
		c, err := plugin.Dispense[*benchClient](protocol, "calls")
		check(b, err)
		check(b, c.add())
		check(b, c.Close())
	}
}

// A stream that is dialled, used for a message there and back, and closed.
func BenchmarkDial(b *testing.B) {
	c := startBenchClient(b)
	message := []byte("a message")
	for b.Loop() {
		id := c.broker.NextId()
		check(b, c.Call("Plugin.Pong", id, &struct{}{}))
		conn, err := c.broker.Dial(id)
		check(b, err)
		_, err = conn.Write(message)
		check(b, err)
		_, err = io.ReadFull(conn, make([]byte, len(message)))
		check(b, err)
		check(b, conn.Close())
	}
}
