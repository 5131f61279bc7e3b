package main

import (
	"context"
	"encoding/binary"
	"fmt"
	"iter"
	"net/rpc"
	"os"
	"os/exec"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/muxplug/plugin"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/muxplug/plugin/interop/bench/grpcjob"
	"github.com/muxplug/plugin/interop/bench/job"
	"github.com/muxplug/plugin/interop/internal/build"
)

// source is called with InvokeSeq.
type source interface {
	Values(ctx context.Context, n int) iter.Seq2[job.Value, error]
}

type sourceImpl struct{}

func (sourceImpl) Values(_ context.Context, n int) iter.Seq2[job.Value, error] {
	return func(yield func(job.Value, error) bool) {
		for i := range n {
			if !yield(job.NewValue(i), nil) {
				return
			}
		}
	}
}

type sourceClient struct{ remote *plugin.Remote }

func (c sourceClient) Values(ctx context.Context, n int) iter.Seq2[job.Value, error] {
	return plugin.InvokeSeq[job.Value](ctx, c.remote, "Values", n)
}

// sequences are the values of InvokeSeq, from a plugin that is this program itself: the
// one that is built with both libraries cannot use For. It starts with the first values.
type sequences struct {
	start  sync.Once
	client *plugin.Client
	source source
	err    error
}

func (s *sequences) values(n int) error {
	s.start.Do(func() { s.err = s.connect() })
	if s.err != nil {
		return s.err
	}
	got := 0
	for _, err := range s.source.Values(context.Background(), n) {
		if err != nil {
			return err
		}
		got++
	}
	return allValues(got, n)
}

func (s *sequences) connect() error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	s.client = plugin.NewClient(&plugin.ClientConfig{
		HandshakeConfig: plugin.HandshakeConfig(handshake), Plugins: invokePlugins,
		Cmd: exec.Command(self), Logger: hclog.NewNullLogger(),
	})
	protocol, err := s.client.Client()
	if err != nil {
		return err
	}
	s.source, err = plugin.Dispense[source](protocol, "values")
	return err
}

func (s *sequences) kill() {
	if s.client != nil {
		s.client.Kill()
	}
}

// netRPCValues gets each value with a call, because net/rpc has nothing else.
func netRPCValues(c *rpc.Client) func(n int) error {
	return func(n int) error {
		for i := range n {
			var v job.Value
			if err := c.Call("Plugin.Value", i, &v); err != nil {
				return err
			}
		}
		return nil
	}
}

// grpcValues uses a stream of the server.
func grpcValues(conn *grpc.ClientConn) func(n int) error {
	return func(n int) error {
		ctx, cancel := context.WithCancel(context.Background())
		defer cancel()
		stream, err := conn.NewStream(ctx, grpcjob.ValuesDesc, grpcjob.Method(job.Values))
		if err == nil {
			err = stream.SendMsg(wrapperspb.Bytes(binary.LittleEndian.AppendUint64(nil, uint64(n))))
		}
		if err == nil {
			err = stream.CloseSend()
		}
		got := 0
		for ; err == nil; got++ {
			err = stream.RecvMsg(new(grpcjob.Bytes))
		}
		return allValues(got-1, n)
	}
}

func allValues(got, want int) error {
	if got != want {
		return fmt.Errorf("%d values of %d", got, want)
	}
	return nil
}

// values measures how many values arrive in a second.
func values(e effort, _ *build.Builder, _ *peer, i *instance) (float64, error) {
	start := time.Now()
	err := i.values(e.values)
	return float64(e.values) / time.Since(start).Seconds(), err
}

// fewValues measures a sequence of n values, from the call to its end.
func fewValues(n int) func(*instance) func() error {
	return func(i *instance) func() error { return func() error { return i.values(n) } }
}
