package plugin

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// describe returns what a handshake says.
func describe(h handshake) string {
	text := fmt.Sprintf("%d %v:%v %s", h.version, h.addr.Network(), h.addr, h.protocol)
	if len(h.cert) > 0 {
		text += fmt.Sprintf(" %x", h.cert)
	}
	if h.flushes {
		text += " flushes"
	}
	return text
}

var handshakeLines = []struct{ line, says string }{
	// What plugins of this library and of go-plugin send.
	{"1|3|unix|/tmp/plugin123|netrpc|", "3 unix:/tmp/plugin123 netrpc"},
	{"1|3|unix|/tmp/plugin123|netrpc||flushes", "3 unix:/tmp/plugin123 netrpc flushes"},
	{"1|0|tcp|127.0.0.1:10000|netrpc|+/8BAg", "0 tcp:127.0.0.1:10000 netrpc fbff0102"},
	{"1|3|unix|/s|netrpc|+/8BAg|flushes", "3 unix:/s netrpc fbff0102 flushes"},
	{"1|3|unix|/tmp/with a space|grpc|", "3 unix:/tmp/with a space grpc"},

	// Fields may be missing, and further ones are ignored.
	{"1|3|unix|/s|netrpc", "3 unix:/s netrpc"},
	{"1|3|unix|/s|", "3 unix:/s netrpc"},
	{"1|3|unix|/s", "3 unix:/s netrpc"},
	{"1|3|unix|/s|netrpc||true", "3 unix:/s netrpc"},
	{"1|3|unix|/s|netrpc|+/8BAg|false|more", "3 unix:/s netrpc fbff0102"},
	{"1|1|tcp|[::1]:80|netrpc|\r\n", "1 tcp:[::1]:80 netrpc"},
}

// badHandshakes are lines by a word of their errors.
var badHandshakes = map[string][]string{
	"core":        {"2|3|unix|/s|netrpc|", "01|3|unix|/s|netrpc|", "99999999999999999999|3|unix|/s", ""},
	"fields":      {"1", "1|3|unix"},
	"version":     {"1||unix|/s", "1|x|unix|/s", "1|99999999999999999999|unix|/s"},
	"network":     {"1|3|udp|127.0.0.1:1", "1|3||/s"},
	"address":     {"1|3|tcp|", "1|3|tcp|127.0.0.1", "1|3|tcp|127.0.0.1:http", "1|3|tcp|127.0.0.1:65536", "1|3|tcp|localhost:80"},
	"certificate": {"1|3|unix|/s|netrpc|false", "1|3|unix|/s|netrpc|" + strings.Repeat("*", 80)},
}

// A handshake line is read as it is meant, or the error says what is wrong.
func TestHandshakeLine(t *testing.T) {
	for i, test := range handshakeLines {
		h, err := parseHandshake(test.line)
		if check(t, err); describe(h) != test.says {
			t.Errorf("%q is read as %q, and should be as %q", test.line, describe(h), test.says)
		}
		if i < 5 && h.String() != test.line {
			t.Errorf("%q is written as %q", test.line, h)
		}
	}
	for word, lines := range badHandshakes {
		for _, line := range lines {
			_, err := parseHandshake(line)
			errorSays(t, err, word)
		}
	}
}

// What a plugin is told about its host is read as it was written, and anything
// else is nothing.
func TestHostInfo(t *testing.T) {
	for _, h := range []hostInfo{{1, 3, watchPipe}, {4194304, 0, watchPid}, {7, 0, watchNothing}} {
		if got := parseHostInfo(h.String()); got != h {
			t.Errorf("%v is read as %v", h, got)
		}
	}
	for _, text := range []string{"", "1", "1 2", "x 2 pipe", "1 x pipe", "pipe 1 2", "99999999999999999999 1 pipe"} {
		if got := parseHostInfo(text); got != (hostInfo{}) {
			t.Errorf("%q is read as %v", text, got)
		}
	}
}

// A plugin sends the field that go-plugin's hosts may not expect only to a host
// of this library, and not if the variable is inherited from one further up.
// Without the host's variables it serves all the same.
func TestHandshakeFields(t *testing.T) {
	for _, test := range []struct {
		name, host string
		fields     int
	}{
		{"this host", hostInfo{pid: os.Getpid(), watch: watchNothing}.String(), 7},
		{"a host further up", hostInfo{pid: os.Getppid(), watch: watchNothing}.String(), 6},
		{"another library", "1", 6},
		{"no variable", "", 6},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			l := newLab(t)
			dir := filepath.Join(l.tmp, "plugin-dir")
			check(t, os.Mkdir(dir, 0o700))
			plugin := l.start("plugin", testCookie, envHost+"="+test.host, EnvUnixSocketDir+"="+dir)
			var line string
			await(t, "the handshake", func() (ok bool) {
				line, _, ok = strings.Cut(plugin.output.String(), "\n")
				return ok
			})
			if n := strings.Count(line, "|") + 1; n != test.fields {
				t.Errorf("the handshake has %d fields: %q", n, line)
			}
			h, err := parseHandshake(line)
			check(t, err)
			conn, err := net.Dial(h.addr.Network(), h.addr.String())
			check(t, err)
			host, err := NewRPCClient(conn, testPlugins(nil))
			check(t, err)
			answers(t, host)
			check(t, host.Close())
			l.read("plugin finished")
			receive(t, "the end", plugin.ended)
			if _, err := os.Stat(dir); (err != nil) != (test.fields == 7) {
				t.Errorf("only a directory of its own host is to be removed: %v", err)
			}
			check(t, os.RemoveAll(dir))
		})
	}
}

// A plugin serves the highest version that the host lists, or its own lowest.
func TestNegotiate(t *testing.T) {
	for _, test := range []struct{ own, host, want string }{
		{"1,2,3", "3,2,1", "3"},
		{"1,2,3", "2,4", "2"},
		{"1,2,10", "10,9,2", "10"},
		{"1,2,3", "4", "1"},
		{"2,3", "", "2"},
		{"0", "0", "0"},
		{"1,12", "1,2", "1"},
		{"2,3", "x,,3y,2", "2"},
	} {
		_, _, own := versions(test.own)
		if got := negotiate(own, test.host); strconv.Itoa(got) != test.want {
			t.Errorf("of %s, %d is served to a host with %q", test.own, got, test.host)
		}
	}
}

const versionsEnv = "TEST_PLUGIN_VERSIONS" // what the step "versions" serves

func init() {
	modes["versions"] = func() {
		servePlugin(func(c *ServeConfig) {
			c.ProtocolVersion, c.Plugins, c.VersionedPlugins = versions(os.Getenv(versionsEnv))
		})
	}
}

// versions returns the fields of a configuration with VersionedPlugins and,
// behind a plus sign, Plugins. A plugin has the name of its version, or "other"
// if the version is there twice and these Plugins must not be used.
func versions(list string) (version uint, plugins PluginSet, versioned map[int]PluginSet) {
	list, single, _ := strings.Cut(list, "+")
	versioned = make(map[int]PluginSet)
	for text := range strings.SplitSeq(list, ",") {
		if v, err := strconv.Atoi(text); err == nil {
			versioned[v] = PluginSet{text: serves(newTestServer())}
		}
	}
	if v, err := strconv.Atoi(single); err == nil {
		version, plugins = uint(v), PluginSet{single: serves(newTestServer())}
		if versioned[v] != nil {
			plugins = PluginSet{"other": serves(newTestServer())}
		}
	}
	return version, plugins, versioned
}

// Hosts and plugins use the highest version that both have, or say which
// versions they have.
func TestVersions(t *testing.T) {
	for _, test := range []struct {
		host, plugin string
		want         int   // -1 if there is none
		has          []int // the host's versions then
		offers       int   // the plugin's
	}{
		{host: "1,2,3", plugin: "2,3,4", want: 3},
		{host: "2", plugin: "1,2,3", want: 2},
		{host: "1,2,3", plugin: "2", want: 2},
		{host: "1,2+5", plugin: "5,6", want: 5},
		{host: "4,5", plugin: "6+4", want: 4},
		{host: "+7", plugin: "+7", want: 7},
		{host: "+0", plugin: "+0", want: 0},
		{host: "1,2+2", plugin: "2+1", want: 2},
		{host: "1,2", plugin: "3,4", want: -1, has: []int{1, 2}, offers: 3},
		{host: "+1", plugin: "+2", want: -1, has: []int{1}, offers: 2},
		{host: "11,12+13", plugin: "14+9", want: -1, has: []int{11, 12, 13}, offers: 9},
	} {
		t.Run(test.host+" with "+test.plugin, func(t *testing.T) {
			t.Parallel()
			cfg := config("versions", versionsEnv+"="+test.plugin)
			cfg.ProtocolVersion, cfg.Plugins, cfg.VersionedPlugins = versions(test.host)
			if test.want < 0 {
				var err *VersionError
				if failed := startError(t, NewClient(cfg)); !errors.As(failed, &err) || err.Plugin != test.offers || !slices.Equal(err.Host, test.has) {
					t.Fatalf("the error is %v", failed)
				}
				errorSays(t, err, fmt.Sprint(test.has), fmt.Sprint(test.offers), "ProtocolVersion")
				return
			}
			c, p := start(t, cfg)
			client, err := Dispense[*testClient](p, strconv.Itoa(test.want))
			if check(t, err); c.NegotiatedVersion() != test.want {
				t.Errorf("version %d was negotiated", c.NegotiatedVersion())
			}
			echo(t, client.Client)
		})
	}
}
