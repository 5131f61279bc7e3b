package plugin_test

import (
	"context"
	"encoding/gob"
	"net/rpc"
	"testing"
	"time"

	"github.com/hashicorp/yamux"
)

func init() {
	// Answers the first control request with the header of an error, and no more.
	modes["half"] = func() {
		conn := must(announce(nil).Accept())
		control := must(must(yamux.Server(conn, nil)).Accept())
		var request rpc.Request
		_ = gob.NewDecoder(control).Decode(&request)
		_ = gob.NewEncoder(control).Encode(rpc.Response{Seq: request.Seq, Error: "test: half an error"})
		time.Sleep(forever)
	}
}

// Call ends with its context, whatever part of the answer the peer has sent.
func TestCallEndsBetweenHeaderAndBody(t *testing.T) {
	for name, header := range map[string]rpc.Response{
		"reply": {},
		"error": {Error: "test: an error without a body"},
	} {
		t.Run(name, func(t *testing.T) {
			_, client, stream := rawPlugin(t)
			ctx, cancel := context.WithCancel(context.Background())
			defer cancel()
			call := async(func() error { return callIn(ctx, client.Client, "Echo") })
			var request rpc.Request
			check(t, gob.NewDecoder(stream).Decode(&request))
			header.Seq = request.Seq
			check(t, gob.NewEncoder(stream).Encode(header))
			// The host reads the header before what follows on another stream.
			time.AfterFunc(50*time.Millisecond, cancel)
			errorIs(t, "Call", receive(t, "the end of Call", call), context.Canceled)
		})
	}
}

// Ping, Close and Kill end although the plugin answers Ping with half an error.
func TestControlEndsBetweenHeaderAndBody(t *testing.T) {
	t.Parallel()
	c, p := startPlugin(t, testConfig("half"))
	within(t, "Ping", pingTimeout, func() {
		errorIs(t, "Ping", p.Ping(), context.DeadlineExceeded)
	})
	within(t, "Close", quitTimeout, func() {
		if p.Close() == nil {
			t.Error("Close returned no error")
		}
	})
	within(t, "Kill", hangs, c.Kill)
}
