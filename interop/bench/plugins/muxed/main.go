// Program muxed is the benchmark's plugin written against go-plugin's API for
// net/rpc. It is built once with each library.
package main

import (
	"errors"
	"net/rpc"

	"github.com/hashicorp/go-plugin"

	"github.com/muxplug/plugin/interop/bench/job"
)

func main() {
	plugin.Serve(&plugin.ServeConfig{
		HandshakeConfig: plugin.HandshakeConfig{ProtocolVersion: 1, MagicCookieKey: "BENCH_COOKIE", MagicCookieValue: "1"},
		Plugins:         plugin.PluginSet{"job": jobPlugin{}},
	})
}

type jobPlugin struct{}

func (jobPlugin) Server(b *plugin.MuxBroker) (any, error) {
	return &job.Service{Accept: b.Accept, Serve: b.AcceptAndServe}, nil
}

func (jobPlugin) Client(*plugin.MuxBroker, *rpc.Client) (any, error) {
	return nil, errors.New("this is the plugin")
}
