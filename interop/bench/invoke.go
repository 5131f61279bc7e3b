package main

import (
	"context"
	"fmt"
	"net/rpc"
	"os"
	"os/exec"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/muxplug/plugin"

	"github.com/muxplug/plugin/interop/bench/job"
)

// adder is called with Invoke.
type adder interface{ Add(a, b int) (int, error) }

type adderImpl struct{}

func (adderImpl) Add(a, b int) (int, error) { return a + b, nil }

type adderClient struct{ remote *plugin.Remote }

func (c adderClient) Add(a, b int) (int, error) {
	return plugin.Invoke[int](context.Background(), c.remote, "Add", a, b)
}

// Summands are the argument of the same method, called with Call.
type Summands struct{ A, B int }

type callPlugin struct{}

type callServer struct{ job.Service }

func (*callServer) Add(in Summands, sum *int) error {
	*sum = in.A + in.B
	return nil
}

func (callPlugin) Server(*plugin.MuxBroker) (any, error)                  { return &callServer{}, nil }
func (callPlugin) Client(_ *plugin.MuxBroker, c *rpc.Client) (any, error) { return c, nil }

var invokePlugins = plugin.PluginSet{
	"invoke": plugin.For[adder](adderImpl{}, func(r *plugin.Remote) adder { return adderClient{r} }),
	"call":   callPlugin{},
	"values": plugin.For[source](sourceImpl{}, func(r *plugin.Remote) source { return sourceClient{r} }),
}

// serveInvoke is the plugin of compareInvoke and of sequences.
func serveInvoke() {
	plugin.Serve(&plugin.ServeConfig{HandshakeConfig: plugin.HandshakeConfig(handshake), Plugins: invokePlugins})
}

// compareInvoke compares Invoke of a method with two parameters with Call of a
// method with a struct: their speed, and the allocations of each side.
func compareInvoke(e effort, rounds int) (string, error) {
	self, err := os.Executable()
	if err != nil {
		return "", err
	}
	client := plugin.NewClient(&plugin.ClientConfig{
		HandshakeConfig: plugin.HandshakeConfig(handshake), Plugins: invokePlugins,
		Cmd: exec.Command(self), Logger: hclog.NewNullLogger(),
	})
	defer client.Kill()
	protocol, err := client.Client()
	if err != nil {
		return "", err
	}
	remote, err := plugin.Dispense[adder](protocol, "invoke")
	if err != nil {
		return "", err
	}
	c, err := plugin.Dispense[*rpc.Client](protocol, "call")
	if err != nil {
		return "", err
	}
	ways := []func(n int) error{
		func(n int) error {
			_, err := remote.Add(n, 2000)
			return err
		},
		func(n int) error {
			var sum int
			return plugin.Call(context.Background(), c, "Plugin.Add", Summands{n, 2000}, &sum)
		},
	}
	var took [2]figures
	var here, there [2]float64
	for range rounds * e.turns {
		for way, add := range ways {
			start, n := time.Now(), 0
			for ; time.Since(start) < e.calls; n++ {
				if err := add(1000 + n); err != nil {
					return "", err
				}
			}
			took[way] = append(took[way], time.Since(start).Seconds()/float64(n))
		}
	}
	for way, add := range ways {
		var before, after uint64
		if err := c.Call("Plugin.Mallocs", 0, &before); err != nil {
			return "", err
		}
		start := job.Mallocs()
		for n := range e.counted {
			if err := add(1000 + n); err != nil {
				return "", err
			}
		}
		here[way] = float64(job.Mallocs()-start) / float64(e.counted)
		if err := c.Call("Plugin.Mallocs", 0, &after); err != nil {
			return "", err
		}
		there[way] = float64(after-before) / float64(e.counted)
	}
	return fmt.Sprintf("Invoke of Add(a, b int): %s, times as fast as Call with a struct: %s; allocations in the host %.1f (%.1f), in the plugin %.1f (%.1f).",
		seconds.text(median(took[0])), compared(seconds, took[0], took[1]), here[0], here[1], there[0], there[1]), nil
}
