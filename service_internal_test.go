package plugin

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/rpc"
	"testing"
)

// exiting has a method that returns when its context ends.
type exiting struct {
	started chan bool
	results map[string]error // by the arguments
}

func (e *exiting) Wait(ctx context.Context, how string, result *string) error {
	e.started <- true
	<-ctx.Done()
	*result = how
	return e.results[how]
}

func (e *exiting) Server(*MuxBroker) (any, error)                { return e, nil }
func (*exiting) Client(_ *MuxBroker, c *rpc.Client) (any, error) { return c, nil }

// When a plugin is about to exit, the contexts of its methods end. What they reply is sent,
// and errors are, but for context.Canceled, which would say that the caller's context has
// ended. Such calls fail when the connection is closed.
func TestAnswersBeforeExit(t *testing.T) {
	e := &exiting{started: make(chan bool, 10), results: map[string]error{
		"nothing": nil, "failed": fs.ErrExist,
		"canceled": context.Canceled, "cause": errExiting,
		"wrapped": fmt.Errorf("waiting: %w", context.Canceled),
	}}
	host, server := TestPluginRPCConn(t, PluginSet{"test": e}, nil)
	client, err := host.Dispense("test")
	check(t, err)
	calls := make(map[string]*rpc.Call)
	for how := range e.results {
		calls[how] = client.(*rpc.Client).Go("Plugin.Wait", how, new(string), nil)
		receive(t, "a call", e.started)
	}
	server.windDown()
	check(t, receive(t, "a reply", calls["nothing"].Done).Error)
	errorSays(t, receive(t, "an error", calls["failed"].Done).Error, fs.ErrExist.Error())
	host.session.close()
	for _, how := range []string{"canceled", "wrapped", "cause"} {
		err := receive(t, "a call", calls[how].Done).Error
		if !errors.Is(err, rpc.ErrShutdown) {
			t.Errorf("%s: the call returned %v", how, err)
		}
	}
}
