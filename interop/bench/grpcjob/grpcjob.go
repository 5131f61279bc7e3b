// Package grpcjob is the benchmark's work as a gRPC service. Its messages are
// protobuf's own wrappers, so that there is nothing to generate.
package grpcjob

import (
	"context"
	"encoding/binary"
	"errors"
	"io"

	"github.com/hashicorp/go-plugin"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/muxplug/plugin/interop/bench/job"
)

// Bytes is the one message.
type Bytes = wrapperspb.BytesValue

// Plugin is the plugin "job", on both sides.
type Plugin struct{ plugin.NetRPCUnsupportedPlugin }

// GRPCServer registers the service.
func (Plugin) GRPCServer(b *plugin.GRPCBroker, s *grpc.Server) error {
	register := func(s *grpc.Server) { s.RegisterService(&desc, &service{}) }
	s.RegisterService(&desc, &service{b, register})
	return nil
}

// GRPCClient returns a *Client.
func (Plugin) GRPCClient(_ context.Context, b *plugin.GRPCBroker, c *grpc.ClientConn) (any, error) {
	return &Client{b, c}, nil
}

// service is the plugin's side. Its fields are nil in a service that is itself
// served through the broker.
type service struct {
	broker   *plugin.GRPCBroker
	register func(*grpc.Server)
}

// desc describes the service: methods from Bytes to Bytes, and three
// streams.
var desc = grpc.ServiceDesc{
	ServiceName: "bench.Job",
	HandlerType: (*any)(nil),
	Methods: []grpc.MethodDesc{
		{MethodName: "Small", Handler: unary((*service).small)},
		{MethodName: "Echo", Handler: unary((*service).echo)},
		{MethodName: "Mallocs", Handler: unary((*service).mallocs)},
		{MethodName: "Open", Handler: unary((*service).open)},
	},
	Streams: []grpc.StreamDesc{
		{StreamName: job.Sink, Handler: sink, ClientStreams: true},
		{StreamName: job.Source, Handler: source, ServerStreams: true},
		{StreamName: job.Values, Handler: values, ServerStreams: true},
	},
}

// The stream descriptions that a caller needs.
var (
	SinkDesc   = &desc.Streams[0]
	SourceDesc = &desc.Streams[1]
	ValuesDesc = &desc.Streams[2]
)

func unary(f func(*service, *Bytes) (*Bytes, error)) func(any, context.Context, func(any) error, grpc.UnaryServerInterceptor) (any, error) {
	return func(srv any, _ context.Context, decode func(any) error, _ grpc.UnaryServerInterceptor) (any, error) {
		in := new(Bytes)
		if err := decode(in); err != nil {
			return nil, err
		}
		return f(srv.(*service), in)
	}
}

func (s *service) small(in *Bytes) (*Bytes, error) {
	return wrapperspb.Bytes(in.GetValue()[:1]), nil
}

func (s *service) echo(in *Bytes) (*Bytes, error) { return in, nil }

func (s *service) mallocs(*Bytes) (*Bytes, error) {
	return wrapperspb.Bytes(binary.LittleEndian.AppendUint64(nil, job.Mallocs())), nil
}

// open serves another such service through the broker.
func (s *service) open(in *Bytes) (*Bytes, error) {
	id := binary.LittleEndian.Uint32(in.GetValue())
	go s.broker.AcceptAndServe(id, func(opts []grpc.ServerOption) *grpc.Server {
		server := grpc.NewServer(opts...)
		s.register(server)
		return server
	})
	return new(Bytes), nil
}

func sink(_ any, stream grpc.ServerStream) error {
	for {
		if err := stream.RecvMsg(new(Bytes)); errors.Is(err, io.EOF) {
			return stream.SendMsg(new(Bytes))
		} else if err != nil {
			return err
		}
	}
}

func source(_ any, stream grpc.ServerStream) error {
	var in Bytes
	if err := stream.RecvMsg(&in); err != nil {
		return err
	}
	chunk := wrapperspb.Bytes(make([]byte, job.Chunk))
	for size := int64(binary.LittleEndian.Uint64(in.GetValue())); size > 0; size -= job.Chunk {
		if err := stream.SendMsg(chunk); err != nil {
			return err
		}
	}
	return nil
}

// values sends messages of 64 bytes.
func values(_ any, stream grpc.ServerStream) error {
	var in Bytes
	if err := stream.RecvMsg(&in); err != nil {
		return err
	}
	for range binary.LittleEndian.Uint64(in.GetValue()) {
		if err := stream.SendMsg(wrapperspb.Bytes(make([]byte, 64))); err != nil {
			return err
		}
	}
	return nil
}

// Client is the host's side.
type Client struct {
	Broker *plugin.GRPCBroker
	Conn   *grpc.ClientConn
}

// Call calls a method.
func Call(conn *grpc.ClientConn, method string, in []byte) ([]byte, error) {
	out := new(Bytes)
	err := conn.Invoke(context.Background(), Method(method), wrapperspb.Bytes(in), out)
	return out.GetValue(), err
}

// Method is a method's or stream's full name.
func Method(name string) string { return "/bench.Job/" + name }
