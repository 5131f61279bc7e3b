package plugin

import (
	"bytes"
	"context"
	"encoding/gob"
	"errors"
	"io"
	"net/rpc"
	"testing"

	"github.com/hashicorp/go-hclog"
)

// ---- RPC streams ----

// script is a connection to a peer that sends what is read, and takes anything.
type script struct{ io.Reader }

func (script) Write(p []byte) (int, error) { return len(p), nil }
func (script) Close() error                { return nil }

// addStreams adds beginnings of streams: no gob, and a header with each body.
func addStreams(f *testing.F, h any) {
	for _, sent := range notGob {
		f.Add(sent)
	}
	for _, body := range []any{allTypes, "text", struct{}{}} {
		var sent bytes.Buffer
		enc := gob.NewEncoder(&sent)
		for range 2 {
			check(f, errors.Join(enc.Encode(h), enc.Encode(body)))
		}
		f.Add(sent.Bytes())
		f.Add(sent.Bytes()[:sent.Len()-2])
	}
}

// ending has methods that return soon after their callers have left.
type ending struct{}

func (ending) Box(in Box, out *Box) error                          { return mirrored(in, out) }
func (ending) Wait(ctx context.Context, _ string, _ *string) error { <-ctx.Done(); return ctx.Err() }

func FuzzRPCServer(f *testing.F) {
	for _, method := range []string{"Plugin.Box", "Plugin.Wait", "Plugin.Missing"} {
		addStreams(f, rpc.Request{ServiceMethod: method, Seq: 1})
	}
	addStreams(f, rpc.Request{ServiceMethod: "Context.Cancel", Seq: 1 | 1<<63})
	f.Fuzz(func(t *testing.T, sent []byte) {
		svc, err := newService(ending{})
		check(t, err)
		s := newRPCServer(script{bytes.NewReader(sent)}, map[string]*service{"Plugin": svc}, hclog.NewNullLogger(), true)
		if s.serve(context.Background()) == nil {
			t.Error("the end has no reason")
		}
	})
}

func FuzzRPCClient(f *testing.F) {
	addStreams(f, response{Seq: 1})
	addStreams(f, response{Seq: 1, Error: "failed", Is: "io.EOF\nunknown"})
	f.Fuzz(func(t *testing.T, sent []byte) {
		begin := make(chan bool)
		wait := readerFunc(func([]byte) (int, error) {
			<-begin
			return 0, io.EOF
		})
		c := newRPCClient(script{io.MultiReader(wait, bytes.NewReader(sent))}, spawn)
		defer c.Close()
		first := c.Go("Plugin.Box", Box{}, new(Box), nil)
		second := async(func() error { return Call(boundedContext(t), c, "Plugin.Box", Box{}, new(Box)) })
		close(begin)
		receive(t, "the first call", first.Done)
		receive(t, "the second call", second)
		if c.Call("Plugin.Box", Box{}, new(Box)) == nil {
			t.Error("a stream that has ended replies")
		}
	})
}
