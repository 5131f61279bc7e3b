// Program plugin serves a worker, written against go-plugin's API. It is built
// once with each library.
package main

import (
	"crypto/tls"
	"errors"
	"flag"
	"fmt"
	"io"
	"net/rpc"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/go-plugin"

	"github.com/muxplug/plugin/interop/shared"
)

var (
	versions = flag.String("versions", "", "serve these versions, comma-separated, instead of the handshake's alone")
	certFile = flag.String("cert", "", "serve TLS with the certificate and key in this file")
	marker   = flag.String("marker", "", "write this file when Serve has returned")
	linger   = flag.Bool("linger", false, "do not end when Serve has returned")
	testMode = flag.Bool("test", false, "serve in test mode until stdin ends")
)

// serveTest serves in test mode; nil if the library has none.
var serveTest func(*plugin.ServeConfig)

// logger writes to the process's own stderr, also while Serve captures that.
var logger = hclog.New(&hclog.LoggerOptions{Name: "worker", Level: hclog.Trace, Output: os.Stderr, JSONFormat: true})

func main() {
	flag.Parse()
	config := &plugin.ServeConfig{HandshakeConfig: shared.Handshake}
	if *versions == "" {
		config.Plugins = pluginSet(int(shared.Handshake.ProtocolVersion))
	} else {
		config.VersionedPlugins = make(map[int]plugin.PluginSet)
		for v := range strings.SplitSeq(*versions, ",") {
			n, err := strconv.Atoi(v)
			if err != nil {
				panic(err)
			}
			config.VersionedPlugins[n] = pluginSet(n)
		}
	}
	if *certFile != "" {
		config.TLSProvider = func() (*tls.Config, error) {
			cert, err := tls.LoadX509KeyPair(*certFile, *certFile)
			return &tls.Config{Certificates: []tls.Certificate{cert}}, err
		}
	}
	if *testMode {
		serveTest(config)
		return
	}
	plugin.Serve(config)
	if *linger {
		time.Sleep(time.Hour)
	}
	if *marker != "" {
		if err := os.WriteFile(*marker, nil, 0o666); err != nil {
			panic(err)
		}
	}
}

func pluginSet(version int) plugin.PluginSet {
	return plugin.PluginSet{"worker": &shared.Worker{Serve: func(b *plugin.MuxBroker) any {
		return &worker{b, version}
	}}}
}

type worker struct {
	broker  *plugin.MuxBroker
	version int
}

func (w *worker) Echo(in shared.Record, out *shared.Record) error { *out = in; return nil }

func (w *worker) Add(in [2]int, out *int) error { *out = in[0] + in[1]; return nil }

func (w *worker) Version(_ any, out *int) error { *out = w.version; return nil }

func (w *worker) Pid(_ any, out *int) error { *out = os.Getpid(); return nil }

func (w *worker) Fail(text string, _ *struct{}) error { return errors.New(text) }

func (w *worker) EOF(any, *struct{}) error { return fmt.Errorf("wrapped: %w", io.EOF) }

func (w *worker) Judge(text string, out *shared.Verdict) error {
	out.Err = plugin.NewBasicError(errors.New(text))
	return nil
}

func (w *worker) Sleep(d time.Duration, _ *struct{}) error { time.Sleep(d); return nil }

func (w *worker) Print(in shared.Lines, _ *struct{}) error {
	_, err := fmt.Fprint(os.Stdout, in.Stdout)
	_, err2 := fmt.Fprint(os.Stderr, in.Stderr)
	return errors.Join(err, err2)
}

func (w *worker) Log(any, *struct{}) error {
	for i, level := range shared.LogLevels {
		logger.Log(hclog.LevelFromString(level), "a record", "number", i, "text", "with \"quotes\" and\na line")
	}
	return nil
}

// CallBack calls what the host serves at id.
func (w *worker) CallBack(id uint32, out *string) error {
	conn, err := w.broker.Dial(id)
	if err != nil {
		return err
	}
	client := rpc.NewClient(conn)
	defer client.Close()
	return client.Call("Plugin.Greet", "the plugin", out)
}

// Helper serves a second service and returns its id.
func (w *worker) Helper(_ any, id *uint32) error {
	*id = w.broker.NextId()
	go w.broker.AcceptAndServe(*id, helper{})
	return nil
}

type helper struct{}

func (helper) Greet(name string, out *string) error { *out = "hello, " + name; return nil }

// Chain starts another plugin, as a host with AutoMTLS, and calls it.
func (w *worker) Chain(path string, out *int) error {
	c := plugin.NewClient(&plugin.ClientConfig{
		HandshakeConfig: shared.Handshake, Plugins: pluginSet(w.version), Cmd: exec.Command(path), AutoMTLS: true, Logger: logger,
	})
	defer c.Kill()
	_, inner, err := shared.Dispense(c)
	if err != nil {
		return err
	}
	return inner.Call("Plugin.Add", [2]int{2, 3}, out)
}

// Receive accepts a stream and returns the checksum of what came.
func (w *worker) Receive(in shared.Transfer, out *string) error {
	conn, err := w.broker.Accept(in.ID)
	if err != nil {
		return err
	}
	defer conn.Close()
	n, sum, err := shared.Receive(conn)
	if err == nil && n != in.Size {
		err = fmt.Errorf("%d bytes came and not %d", n, in.Size)
	}
	*out = sum
	return err
}

// Send dials a stream, sends, and returns the checksum of what it sent.
func (w *worker) Send(in shared.Transfer, out *string) error {
	conn, err := w.broker.Dial(in.ID)
	if err != nil {
		return err
	}
	defer conn.Close()
	*out, err = shared.Send(conn, in.Size)
	return err
}

// Crash ends the process as a panic in a goroutine does.
func (w *worker) Crash(any, *struct{}) error {
	go panic("crash on demand")
	select {}
}
