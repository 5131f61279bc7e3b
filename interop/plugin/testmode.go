//go:build !v1.0.0

package main

import (
	"context"
	"fmt"
	"io"
	"os"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/go-plugin"

	"github.com/muxplug/plugin/interop/shared"
)

func init() {
	// It tells its address on stdout, and says so when the serving has ended.
	serveTest = func(config *plugin.ServeConfig) {
		ctx, cancel := context.WithCancel(context.Background())
		addresses, closed := make(chan *plugin.ReattachConfig, 1), make(chan struct{})
		config.Test = &plugin.ServeTestConfig{Context: ctx, ReattachConfigCh: addresses, CloseCh: closed}
		config.Logger = hclog.NewNullLogger()
		go plugin.Serve(config)
		go func() {
			_, _ = io.Copy(io.Discard, os.Stdin)
			cancel()
		}()
		if err := shared.WriteAttachment(os.Stdout, <-addresses); err != nil {
			panic(err)
		}
		<-closed
		fmt.Println("closed")
	}
}
