// Greeter starts itself as its plugin and shows what package plugin does.
package main

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"log"
	"log/slog"
	"os"
	"os/exec"
	"strings"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/muxplug/plugin"
)

// Greeter is the interface between the host and the plugin.
type Greeter interface {
	Greet(ctx context.Context, name string) (string, error)
	GreetAll(ctx context.Context, names io.Reader, greetings io.Writer, progress func(greeted int) error) error
}

// Client is the Greeter in the host. Each method is a call to the plugin.
type Client struct{ remote *plugin.Remote }

func (c Client) Greet(ctx context.Context, name string) (string, error) {
	return plugin.Invoke[string](ctx, c.remote, "Greet", name)
}

func (c Client) GreetAll(ctx context.Context, names io.Reader, greetings io.Writer, progress func(int) error) error {
	_, err := plugin.Invoke[struct{}](ctx, c.remote, "GreetAll", names, greetings, progress)
	return err
}

// Plugin joins the two ends. Only the plugin has an implementation.
func Plugin(impl Greeter) plugin.Plugin {
	return plugin.For(impl, func(r *plugin.Remote) Greeter { return Client{r} })
}

var handshake = plugin.HandshakeConfig{
	ProtocolVersion:  1,
	MagicCookieKey:   "GREETER_PLUGIN",
	MagicCookieValue: "hello",
}

// English is the implementation. It runs in the plugin.
type English struct{}

func (English) Greet(ctx context.Context, name string) (string, error) {
	slog.Info("greeting", "name", name)
	switch name {
	case "":
		panic("there is no name")
	case "Godot":
		<-ctx.Done()
		slog.Warn("the call was cancelled", "name", name)
		return "", ctx.Err()
	}
	return "Hello, " + name + "!", nil
}

func (English) GreetAll(_ context.Context, names io.Reader, greetings io.Writer, progress func(int) error) error {
	lines := bufio.NewScanner(names)
	for greeted := 1; lines.Scan(); greeted++ {
		fmt.Fprintf(greetings, "Hello, %s!\n", lines.Text())
		if err := progress(greeted); err != nil {
			return err
		}
	}
	return lines.Err()
}

func main() {
	if os.Getenv(handshake.MagicCookieKey) != "" {
		servePlugin()
		return
	}
	if err := runHost(os.Stdout); err != nil {
		log.Fatal(err)
	}
}

func servePlugin() {
	slog.SetDefault(slog.New(slog.NewJSONHandler(os.Stderr, nil))) // before Serve
	plugin.Serve(&plugin.ServeConfig{
		HandshakeConfig: handshake,
		Plugins:         plugin.PluginSet{"greeter": Plugin(English{})},
	})
}

// slogSink passes the records of an hclog logger to slog.
type slogSink struct{ *slog.Logger }

func (s slogSink) Accept(name string, level hclog.Level, msg string, args ...any) {
	s.Log(context.Background(), slog.Level(4*(level-hclog.Info)), name+": "+msg, args...)
}

// start starts the plugin.
func start(config *plugin.ClientConfig) (*plugin.Client, Greeter, error) {
	client := plugin.NewClient(config)
	conn, err := client.Client()
	if err != nil {
		return nil, nil, err
	}
	greeter, err := plugin.Dispense[Greeter](conn, "greeter")
	if err != nil {
		client.Kill()
	}
	return client, greeter, err
}

func runHost(out io.Writer) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	logger := hclog.NewInterceptLogger(&hclog.LoggerOptions{Output: io.Discard})
	logger.RegisterSink(slogSink{slog.Default()})
	config := &plugin.ClientConfig{
		HandshakeConfig: handshake,
		Plugins:         plugin.PluginSet{"greeter": Plugin(nil)},
		Cmd:             exec.Command(self),
		Logger:          logger,
	}
	config.Cmd.Env = []string{"GOTRACEBACK=none"} // so a panic is one line of the log
	client, greeter, err := start(config)
	if err != nil {
		return err
	}
	defer func() { client.Kill() }()
	fmt.Fprintf(out, "The host is process %d and the plugin is process %s.\n", os.Getpid(), client.ID())

	greeting, err := greeter.Greet(context.Background(), "Gopher")
	fmt.Fprintln(out, "A call returns:", greeting, err)

	var greetings strings.Builder
	err = greeter.GreetAll(context.Background(), strings.NewReader("Ada\nGrace\n"), &greetings, func(greeted int) error {
		_, err := fmt.Fprintln(out, "The plugin calls back. Greeted:", greeted)
		return err
	})
	fmt.Fprintf(out, "The plugin reads from the host and writes to it: %q %v\n", greetings.String(), err)

	ctx, cancel := context.WithTimeout(context.Background(), 100*time.Millisecond)
	defer cancel()
	_, err = greeter.Greet(ctx, "Godot")
	fmt.Fprintln(out, "A call is cancelled:", err)

	_, err = greeter.Greet(context.Background(), "")
	fmt.Fprintln(out, "The plugin panics:", err)

	if client.Exited() {
		if client, greeter, err = start(config); err != nil {
			return err
		}
	}
	greeting, err = greeter.Greet(context.Background(), "Gopher")
	fmt.Fprintf(out, "The plugin runs again as process %s, and returns: %s %v\n", client.ID(), greeting, err)
	return nil
}
