// Program grpc is the benchmark's plugin for go-plugin's gRPC mode.
package main

import (
	"github.com/hashicorp/go-plugin"
	"google.golang.org/grpc"

	"github.com/muxplug/plugin/interop/bench/grpcjob"
)

func main() {
	plugin.Serve(&plugin.ServeConfig{
		HandshakeConfig: plugin.HandshakeConfig{ProtocolVersion: 1, MagicCookieKey: "BENCH_COOKIE", MagicCookieValue: "1"},
		Plugins:         plugin.PluginSet{"job": grpcjob.Plugin{}},
		GRPCServer: func(opts []grpc.ServerOption) *grpc.Server {
			// Messages of 1 MiB and more, which the default would refuse.
			return grpc.NewServer(append(opts, grpc.MaxRecvMsgSize(64<<20))...)
		},
	})
}
