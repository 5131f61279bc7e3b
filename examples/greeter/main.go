// Greeter starts itself as its plugin and shows what package plugin does.
package main

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"iter"
	"log"
	"log/slog"
	"os"
	"os/exec"
	"strings"
	"time"

	"github.com/muxplug/plugin"
)

// Greeter is the interface between the host and the plugin.
type Greeter interface {
	Greet(ctx context.Context, name string) (string, error)
	GreetAll(ctx context.Context, names io.Reader, greetings io.Writer, progress func(greeted int) error) error
	Guests(ctx context.Context, party string) iter.Seq2[Guest, error]
}

// Guest is a value that crosses the connection.
type Guest struct {
	Name  string
	Table int
}

// client is the Greeter in the host. Each method is one call to the plugin.
type client struct{ remote *plugin.Remote }

func (c client) Greet(ctx context.Context, name string) (string, error) {
	return plugin.Invoke[string](ctx, c.remote, "Greet", name)
}

func (c client) GreetAll(ctx context.Context, names io.Reader, greetings io.Writer, progress func(int) error) error {
	_, err := plugin.Invoke[struct{}](ctx, c.remote, "GreetAll", names, greetings, progress)
	return err
}

func (c client) Guests(ctx context.Context, party string) iter.Seq2[Guest, error] {
	return plugin.InvokeSeq[Guest](ctx, c.remote, "Guests", party)
}

// Plugin joins both sides. The plugin passes its implementation, and the host,
// which has none, passes nil.
func Plugin(impl Greeter) plugin.Plugin {
	return plugin.For(impl, func(r *plugin.Remote) Greeter { return client{r} })
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

// Guests yields guests until the host has heard enough.
func (English) Guests(ctx context.Context, party string) iter.Seq2[Guest, error] {
	return func(yield func(Guest, error) bool) {
		for n := 1; ctx.Err() == nil; n++ {
			if !yield(Guest{Name: fmt.Sprintf("%s %d", party, n), Table: n % 4}, nil) {
				return
			}
		}
	}
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

func runHost(out io.Writer) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	command := exec.Command(self)
	command.Env = []string{"GOTRACEBACK=none"} // so that a panic is a short record of the log
	greeters := plugin.NewSupervisor[Greeter](&plugin.ClientConfig{
		HandshakeConfig: handshake,
		Plugins:         plugin.PluginSet{"greeter": Plugin(nil)},
		Cmd:             command,
		Logger:          plugin.NewSlogLogger(slog.Default().Handler()),
	}, "greeter")
	defer greeters.Kill()

	greeter, err := greeters.Get(context.Background()) // starts the plugin
	if err != nil {
		return err
	}
	fmt.Fprintf(out, "The host is process %d and the plugin is process %s.\n", os.Getpid(), greeters.Client().ID())
	showCalls(out, greeter)

	_, err = greeter.Greet(context.Background(), "")
	fmt.Fprintln(out, "The plugin panics:", err)

	greeter, err = greeters.Get(context.Background())
	if err != nil {
		return err
	}
	greeting, err := greeter.Greet(context.Background(), "Gopher")
	fmt.Fprintf(out, "It runs again, as process %s, and returns: %s %v\n", greeters.Client().ID(), greeting, err)
	return nil
}

// showCalls calls each method, and cancels a call.
func showCalls(out io.Writer, greeter Greeter) {
	greeting, err := greeter.Greet(context.Background(), "Gopher")
	fmt.Fprintln(out, "A call returns:", greeting, err)

	progress := func(greeted int) error {
		_, err := fmt.Fprintln(out, "The plugin calls back. Greeted:", greeted)
		return err
	}
	var greetings strings.Builder
	err = greeter.GreetAll(context.Background(), strings.NewReader("Ada\nGrace\n"), &greetings, progress)
	fmt.Fprintf(out, "The plugin reads from the host and writes to it: %q %v\n", greetings.String(), err)

	for guest, err := range greeter.Guests(context.Background(), "gopher") {
		fmt.Fprintln(out, "The plugin yields:", guest, err)
		if guest.Table == 3 || err != nil {
			break // ends the method in the plugin
		}
	}

	ctx, cancel := context.WithTimeout(context.Background(), 100*time.Millisecond)
	defer cancel()
	_, err = greeter.Greet(ctx, "Godot")
	fmt.Fprintln(out, "A call is cancelled:", err)
}
