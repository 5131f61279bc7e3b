// Program grpcplugin is a go-plugin plugin that speaks gRPC alone.
package main

import (
	"context"

	"github.com/hashicorp/go-plugin"
	"google.golang.org/grpc"

	"github.com/muxplug/plugin/interop/shared"
)

func main() {
	plugin.Serve(&plugin.ServeConfig{
		HandshakeConfig: shared.Handshake,
		Plugins:         plugin.PluginSet{"worker": idle{}},
		GRPCServer:      plugin.DefaultGRPCServer,
	})
}

// idle has no services: nobody gets as far as calling them.
type idle struct{ plugin.NetRPCUnsupportedPlugin }

func (idle) GRPCServer(*plugin.GRPCBroker, *grpc.Server) error { return nil }

func (idle) GRPCClient(context.Context, *plugin.GRPCBroker, *grpc.ClientConn) (any, error) {
	return nil, nil
}
