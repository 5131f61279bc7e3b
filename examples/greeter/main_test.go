package main

import (
	"bytes"
	"os"
	"strings"
	"testing"

	"github.com/muxplug/plugin"
)

// TestMain is main where the test binary is started as the plugin.
func TestMain(m *testing.M) {
	if os.Getenv(handshake.MagicCookieKey) != "" {
		servePlugin()
		return
	}
	os.Exit(m.Run())
}

func TestGreeter(t *testing.T) {
	conn, _ := plugin.TestPluginRPCConn(t, plugin.PluginSet{"greeter": Plugin(English{})}, nil)
	greeter, err := plugin.Dispense[Greeter](conn, "greeter")
	if err != nil {
		t.Fatal(err)
	}
	greeting, err := greeter.Greet(t.Context(), "Gopher")
	if greeting != "Hello, Gopher!" || err != nil {
		t.Errorf("Greet returned %q, %v", greeting, err)
	}
}

func TestHost(t *testing.T) {
	var out bytes.Buffer
	if err := runHost(&out); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		"A call returns: Hello, Gopher! <nil>",
		"Greeted: 2",
		`"Hello, Ada!\nHello, Grace!\n" <nil>`,
		"deadline",
		"panic: there is no name",
		"The plugin yields: {gopher 3 3} <nil>",
		", and returns: Hello, Gopher! <nil>",
	} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("the host does not print %q:\n%s", want, &out)
		}
	}
}
