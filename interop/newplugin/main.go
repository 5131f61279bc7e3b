// Program newplugin serves what go-plugin cannot: methods that take a context,
// errors with an identity, readers and writers. Its host is a go-plugin one.
package main

import (
	"context"
	"fmt"
	"io"
	"io/fs"
	"net/rpc"
	"strings"
	"time"

	"github.com/muxplug/plugin"

	"github.com/muxplug/plugin/interop/shared"
)

func main() {
	plugin.Serve(&plugin.ServeConfig{
		HandshakeConfig: plugin.HandshakeConfig(shared.Handshake),
		Plugins:         plugin.PluginSet{"worker": modern{}},
	})
}

type modern struct{}

func (modern) Server(b *plugin.MuxBroker) (any, error)            { return &worker{b}, nil }
func (modern) Client(*plugin.MuxBroker, *rpc.Client) (any, error) { return nil, nil }

type worker struct{ broker *plugin.MuxBroker }

// Wait says how its context stands after a while.
func (w *worker) Wait(ctx context.Context, d time.Duration, out *string) error {
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-time.After(d):
		*out = fmt.Sprint(ctx.Err())
		return nil
	}
}

// Missing returns an error that would keep its identity with a host of ours.
func (w *worker) Missing(name string, _ *struct{}) error {
	return fmt.Errorf("%s: %w", name, fs.ErrNotExist)
}

// Reader serves a reader.
func (w *worker) Reader(_ any, id *uint32) error {
	*id, _ = w.broker.ServeReader(strings.NewReader("text"))
	return nil
}

// Writer serves a writer.
func (w *worker) Writer(_ any, id *uint32) error {
	*id, _ = w.broker.ServeWriter(io.Discard)
	return nil
}

// Read reads what the host serves, of which a go-plugin host is not capable.
func (w *worker) Read(id uint32, out *string) error {
	r, err := w.broker.DialReader(id)
	if err != nil {
		return err
	}
	defer r.Close()
	text, err := io.ReadAll(r)
	*out = string(text)
	return err
}

// Write writes to what the host serves.
func (w *worker) Write(id uint32, _ *struct{}) error {
	out, err := w.broker.DialWriter(id)
	if err != nil {
		return err
	}
	_, _ = io.WriteString(out, "text")
	return out.Close()
}

// CallBack calls what the host serves with AcceptAndServe.
func (w *worker) CallBack(id uint32, out *string) error {
	client, err := w.broker.DialRPC(id)
	if err != nil {
		return err
	}
	defer client.Close()
	return plugin.Call(context.Background(), client, "Plugin.Greet", "the plugin", out)
}

// Helper serves a second service and returns its id.
func (w *worker) Helper(_ any, id *uint32) error {
	*id, _ = w.broker.ServeRPC(helper{})
	return nil
}

type helper struct{}

func (helper) Greet(_ context.Context, name string, out *string) error {
	*out = "hello, " + name
	return nil
}
