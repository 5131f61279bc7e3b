package main

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/rpc"
	"os"
	"os/exec"
	"path/filepath"

	"github.com/hashicorp/go-hclog"
	goplugin "github.com/hashicorp/go-plugin"
	"github.com/muxplug/plugin"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/muxplug/plugin/interop/bench/grpcjob"
	"github.com/muxplug/plugin/interop/bench/job"
	"github.com/muxplug/plugin/interop/internal/build"
)

// peer is one way to have a plugin.
type peer struct {
	name   string
	pkg    string // of its plugin's program
	lib    build.Library
	start  func(binary string) (*instance, error)
	binary string // once it is built
}

// baseline is the peer that the others are compared with.
const baseline = "go-plugin net/rpc"

var peers = []*peer{
	{name: "muxplug", pkg: "bench/plugins/muxed", lib: build.Ours, start: startOurs},
	{name: baseline, pkg: "bench/plugins/muxed", lib: build.GoPlugin, start: startNetRPC},
	{name: "go-plugin gRPC", pkg: "bench/plugins/grpc", lib: build.GoPlugin, start: startGRPC},
	{name: "net/rpc, stdio", pkg: "bench/plugins/bare", lib: build.GoPlugin, start: startStdio},
	{name: "net/rpc, socket", pkg: "bench/plugins/bare", lib: build.GoPlugin, start: startSocket},
}

// instance is a plugin that runs. What a peer does not have is nil.
type instance struct {
	small   func() error
	echo    func([]byte) error
	mallocs func() (uint64, error) // in the plugin, since it began

	// So many bytes to the plugin or from it, in writes of 64 KiB.
	sink, source func(int64) error
	// session opens a stream, sends a message and gets it back, and closes it.
	session func() error
	// callback opens a stream, makes a small call over it, and closes it.
	callback func() error
	// dispense makes an instance, makes a small call, and closes it.
	dispense func() error
	// values gets so many small structs, one after the other.
	values func(n int) error

	pid  int
	kill func()
}

// newInstance fills in what is done with calls over net/rpc.
func newInstance(c *rpc.Client, pid int, kill func()) *instance {
	return &instance{
		small: func() error { return small(c) },
		echo: func(b []byte) error {
			var out []byte
			err := c.Call("Plugin.Echo", b, &out)
			return errors.Join(err, sameSize(out, b))
		},
		mallocs: func() (n uint64, err error) {
			err = c.Call("Plugin.Mallocs", 0, &n)
			return n, err
		},
		values: netRPCValues(c),
		pid:    pid,
		kill:   kill,
	}
}

func small(c *rpc.Client) error {
	var out job.Reply
	err := c.Call("Plugin.Small", job.Args{Name: "a name", Value: 7}, &out)
	if err == nil && out.Sum != 13 {
		err = fmt.Errorf("the reply is %d", out.Sum)
	}
	return err
}

func sameSize(got, sent []byte) error {
	if len(got) != len(sent) {
		return fmt.Errorf("%d bytes came back of %d", len(got), len(sent))
	}
	return nil
}

// withStreams fills in what is done with streams.
func (i *instance) withStreams(open func(use string) (net.Conn, error)) *instance {
	// transfer opens a stream for size bytes and has them go through it.
	transfer := func(use string, size int64, f func(io.ReadWriter, []byte) error) error {
		conn, err := open(use)
		if err != nil {
			return err
		}
		_, err = conn.Write(binary.LittleEndian.AppendUint64(nil, uint64(size)))
		if err == nil {
			err = f(conn, make([]byte, job.Chunk))
		}
		return errors.Join(err, conn.Close())
	}
	i.sink = func(size int64) error {
		return transfer(job.Sink, size, func(conn io.ReadWriter, buf []byte) error {
			return errors.Join(job.Write(conn, size, buf), job.Read(conn, 1, buf))
		})
	}
	i.source = func(size int64) error {
		return transfer(job.Source, size, func(conn io.ReadWriter, buf []byte) error {
			return job.Read(conn, size, buf)
		})
	}
	message := []byte("a message")
	i.session = func() error {
		conn, err := open(job.Pong)
		if err != nil {
			return err
		}
		buf := make([]byte, len(message))
		_, err = conn.Write(message)
		if err == nil {
			_, err = io.ReadFull(conn, buf)
		}
		return errors.Join(err, conn.Close())
	}
	i.callback = callback(func(use string) (*rpc.Client, error) {
		conn, err := open(use)
		if err != nil {
			return nil, err
		}
		return rpc.NewClient(conn), nil
	})
	return i
}

// callback makes a call with a client that lives no longer.
func callback(open func(use string) (*rpc.Client, error)) func() error {
	return func() error {
		c, err := open(job.Calls)
		if err != nil {
			return err
		}
		return errors.Join(small(c), c.Close())
	}
}

// remote is a broker and a client, of either library.
type remote[B any] struct {
	broker B
	client *rpc.Client
}

type ourPlugin struct{}

func (ourPlugin) Server(*plugin.MuxBroker) (any, error) { return nil, nil }
func (ourPlugin) Client(b *plugin.MuxBroker, c *rpc.Client) (any, error) {
	return remote[*plugin.MuxBroker]{b, c}, nil
}

type theirPlugin struct{}

func (theirPlugin) Server(*goplugin.MuxBroker) (any, error) { return nil, nil }
func (theirPlugin) Client(b *goplugin.MuxBroker, c *rpc.Client) (any, error) {
	return remote[*goplugin.MuxBroker]{b, c}, nil
}

var handshake = goplugin.HandshakeConfig{ProtocolVersion: 1, MagicCookieKey: "BENCH_COOKIE", MagicCookieValue: "1"}

func startOurs(binary string) (*instance, error) {
	cmd := exec.Command(binary)
	c := plugin.NewClient(&plugin.ClientConfig{
		HandshakeConfig: plugin.HandshakeConfig(handshake), Plugins: plugin.PluginSet{"job": ourPlugin{}},
		Cmd: cmd, Logger: hclog.NewNullLogger(), SyncStdout: io.Discard, SyncStderr: io.Discard,
	})
	protocol, err := c.Client()
	if err != nil {
		return nil, err
	}
	v, err := protocol.Dispense("job")
	if err != nil {
		c.Kill()
		return nil, err
	}
	r := v.(remote[*plugin.MuxBroker])
	i := newInstance(r.client, cmd.Process.Pid, c.Kill).withStreams(brokered(r.broker.Dial, r.broker, r.client))
	i.callback = callback(brokered(r.broker.DialRPC, r.broker, r.client))
	i.dispense = callback(func(string) (*rpc.Client, error) {
		v, err := protocol.Dispense("job")
		if err != nil {
			return nil, err
		}
		return v.(remote[*plugin.MuxBroker]).client, nil
	})
	s := &sequences{}
	i.values = s.values
	i.kill = func() {
		s.kill()
		c.Kill()
	}
	return i, nil
}

// theirClient starts a go-plugin plugin, in either mode.
func theirClient(binary string, p goplugin.Plugin, protocols ...goplugin.Protocol) (any, int, *goplugin.Client, error) {
	cmd := exec.Command(binary)
	c := goplugin.NewClient(&goplugin.ClientConfig{
		HandshakeConfig: handshake, Plugins: goplugin.PluginSet{"job": p}, AllowedProtocols: protocols,
		Cmd: cmd, Logger: hclog.NewNullLogger(), SyncStdout: io.Discard, SyncStderr: io.Discard,
		GRPCDialOptions: []grpc.DialOption{grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(64 << 20))},
	})
	protocol, err := c.Client()
	if err != nil {
		return nil, 0, nil, err
	}
	v, err := protocol.Dispense("job")
	if err != nil {
		c.Kill()
		return nil, 0, nil, err
	}
	return v, cmd.Process.Pid, c, nil
}

func startNetRPC(binary string) (*instance, error) {
	v, pid, c, err := theirClient(binary, theirPlugin{}, goplugin.ProtocolNetRPC)
	if err != nil {
		return nil, err
	}
	r := v.(remote[*goplugin.MuxBroker])
	i := newInstance(r.client, pid, c.Kill).withStreams(brokered(r.broker.Dial, r.broker, r.client))
	i.dispense = callback(func(string) (*rpc.Client, error) {
		protocol, err := c.Client() // that of the start
		if err != nil {
			return nil, err
		}
		v, err := protocol.Dispense("job")
		if err != nil {
			return nil, err
		}
		return v.(remote[*goplugin.MuxBroker]).client, nil
	})
	return i, nil
}

// brokered opens streams as either library's users do: a call tells the plugin
// the number, and the host dials it.
func brokered[T any](dial func(uint32) (T, error), broker interface{ NextId() uint32 }, c *rpc.Client) func(string) (T, error) {
	return func(use string) (conn T, err error) {
		id := broker.NextId()
		if err := c.Call("Plugin.Open", job.Open{ID: id, Use: use}, &struct{}{}); err != nil {
			return conn, err
		}
		return dial(id)
	}
}

func startGRPC(path string) (*instance, error) {
	v, pid, client, err := theirClient(path, grpcjob.Plugin{}, goplugin.ProtocolGRPC)
	if err != nil {
		return nil, err
	}
	c := v.(*grpcjob.Client)
	small := append(make([]byte, 8), "a name"...)
	return &instance{
		small: func() error { _, err := grpcjob.Call(c.Conn, "Small", small); return err },
		echo: func(b []byte) error {
			out, err := grpcjob.Call(c.Conn, "Echo", b)
			return errors.Join(err, sameSize(out, b))
		},
		mallocs: func() (uint64, error) {
			out, err := grpcjob.Call(c.Conn, "Mallocs", nil)
			if err != nil {
				return 0, err
			}
			return binary.LittleEndian.Uint64(out), nil
		},
		sink:   func(size int64) error { return grpcSink(c.Conn, size) },
		source: func(size int64) error { return grpcSource(c.Conn, size) },
		values: grpcValues(c.Conn),
		pid:    pid,
		kill:   client.Kill,
		callback: func() error {
			id := c.Broker.NextId()
			if _, err := grpcjob.Call(c.Conn, "Open", binary.LittleEndian.AppendUint32(nil, id)); err != nil {
				return err
			}
			conn, err := c.Broker.Dial(id)
			if err != nil {
				return err
			}
			_, err = grpcjob.Call(conn, "Small", small)
			return errors.Join(err, conn.Close())
		},
	}, nil
}

// grpcSink and grpcSource use gRPC's own streams, on the plugin's connection:
// that is how its users send much, and a broker would only add a connection.

func grpcSink(conn *grpc.ClientConn, size int64) error {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	stream, err := conn.NewStream(ctx, grpcjob.SinkDesc, grpcjob.Method(job.Sink))
	if err != nil {
		return err
	}
	chunk := wrapperspb.Bytes(make([]byte, job.Chunk))
	for ; err == nil && size > 0; size -= job.Chunk {
		err = stream.SendMsg(chunk)
	}
	if err == nil {
		err = stream.CloseSend()
	}
	if err == nil {
		err = stream.RecvMsg(new(grpcjob.Bytes))
	}
	return err
}

func grpcSource(conn *grpc.ClientConn, size int64) error {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	stream, err := conn.NewStream(ctx, grpcjob.SourceDesc, grpcjob.Method(job.Source))
	if err == nil {
		err = stream.SendMsg(wrapperspb.Bytes(binary.LittleEndian.AppendUint64(nil, uint64(size))))
	}
	if err == nil {
		err = stream.CloseSend()
	}
	var chunk grpcjob.Bytes
	for err == nil && size > 0 {
		err = stream.RecvMsg(&chunk)
		size -= int64(len(chunk.GetValue()))
	}
	return err
}

// startStdio is what natefinch/pie does, too.
func startStdio(binary string) (*instance, error) {
	cmd := exec.Command(binary)
	in, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	c := rpc.NewClient(struct {
		io.Reader
		io.WriteCloser
	}{out, in})
	return newInstance(c, cmd.Process.Pid, func() { _, _ = c.Close(), cmd.Wait() }), nil
}

func startSocket(binary string) (*instance, error) {
	dir, err := os.MkdirTemp("", "b-*")
	if err != nil {
		return nil, err
	}
	socket := filepath.Join(dir, "socket")
	cmd := exec.Command(binary, socket)
	kill := func() { _, _ = cmd.Wait(), os.RemoveAll(dir) }
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		_ = os.RemoveAll(dir)
		return nil, err
	}
	// It says that it is ready, or exits.
	_, _ = bufio.NewReader(out).ReadString('\n')
	conn, err := net.Dial("unix", socket)
	if err != nil {
		kill()
		return nil, err
	}
	c := rpc.NewClient(conn)
	i := newInstance(c, cmd.Process.Pid, func() { _ = c.Close(); kill() })
	return i.withStreams(func(use string) (net.Conn, error) {
		conn, err := net.Dial("unix", socket)
		if err == nil {
			_, err = conn.Write([]byte{use[0]})
		}
		return conn, err
	}), nil
}
