package plugin_test

import (
	"bytes"
	"context"
	"io"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/muxplug/plugin"
)

// The benchmarks call a plugin in a process of its own. CONTRIBUTING.md says how two
// commits are compared.

// startBench starts the plugin of the benchmarks.
func startBench(b *testing.B) *testClient {
	b.Helper()
	_, p := startPlugin(b, testConfig("plugin"))
	return dispense(b, p)
}

// echoOf calls Echo.
func (c *testClient) echoOf(text string) error {
	return plugin.Call(context.Background(), c.Client, "Plugin.Echo", text, new(string))
}

// A small call.
func BenchmarkCall(b *testing.B) {
	c := startBench(b)
	for b.Loop() {
		check(b, c.echoOf("text"))
	}
}

// The same through an interface.
func BenchmarkInvoke(b *testing.B) {
	_, _, r := startKit(b)
	for b.Loop() {
		_, err := plugin.Invoke[int](context.Background(), r, "Add", 3, 4)
		check(b, err)
	}
}

// Small calls by 64 callers on one client.
func BenchmarkCallers(b *testing.B) {
	c := startBench(b)
	b.SetParallelism((64 + runtime.GOMAXPROCS(0) - 1) / runtime.GOMAXPROCS(0))
	var failed atomic.Pointer[error]
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			if err := c.echoOf("text"); err != nil {
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
	c := startBench(b)
	text := strings.Repeat("x", size)
	b.SetBytes(int64(size))
	for b.Loop() {
		check(b, c.echoOf(text))
	}
}

// A reader of 16 MiB that the plugin reads.
func BenchmarkStream(b *testing.B) {
	c := startBench(b)
	data := make([]byte, 16<<20)
	b.SetBytes(int64(len(data)))
	for b.Loop() {
		id, stop := c.broker.ServeReader(bytes.NewReader(data))
		checkEqual(b, "bytes", mustCall[int64](b, c.Client, "Copy", Transfer{Reader: id}), int64(len(data)))
		stop()
	}
}

func BenchmarkSequence1(b *testing.B)    { benchmarkSequence(b, 1) }
func BenchmarkSequence1000(b *testing.B) { benchmarkSequence(b, 1000) }

// A sequence of n values.
func benchmarkSequence(b *testing.B, n int) {
	_, _, r := startKit(b)
	for b.Loop() {
		got := 0
		for _, err := range plugin.InvokeSeq[Number](context.Background(), r, "Follow", Plan{Yield: n}, nil) {
			check(b, err)
			got++
		}
		checkEqual(b, "values", got, n)
	}
}

// An instance that is dispensed, called once, and closed.
func BenchmarkDispense(b *testing.B) {
	_, p := startPlugin(b, testConfig("plugin"))
	for b.Loop() {
		c := dispense(b, p)
		check(b, c.echoOf("text"))
		check(b, c.Close())
	}
}

// A stream that is dialled, used for a message there and back, and closed.
func BenchmarkDial(b *testing.B) {
	c := startBench(b)
	message := []byte("a message")
	for b.Loop() {
		conn, err := c.broker.Dial(mustCall[uint32](b, c.Client, "Serve", "echo"))
		check(b, err)
		_, err = conn.Write(message)
		check(b, err)
		_, err = io.ReadFull(conn, make([]byte, len(message)))
		check(b, err)
		check(b, conn.Close())
	}
}
