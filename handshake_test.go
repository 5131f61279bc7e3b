package plugin

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/hashicorp/go-hclog"
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

var handshakeLines = []struct {
	line, says string
	err        string // a word
}{
	// What plugins of this library and of go-plugin send.
	{line: "1|3|unix|/tmp/plugin123|netrpc|", says: "3 unix:/tmp/plugin123 netrpc"},
	{line: "1|3|unix|/tmp/plugin123|netrpc||flushes", says: "3 unix:/tmp/plugin123 netrpc flushes"},
	{line: "1|0|tcp|127.0.0.1:10000|netrpc|+/8BAg", says: "0 tcp:127.0.0.1:10000 netrpc fbff0102"},
	{line: "1|3|unix|/s|netrpc|+/8BAg|flushes", says: "3 unix:/s netrpc fbff0102 flushes"},
	{line: "1|3|unix|/tmp/with a space|grpc|", says: "3 unix:/tmp/with a space grpc"},

	// Fields may be missing, and further ones are ignored.
	{line: "1|3|unix|/s|netrpc", says: "3 unix:/s netrpc"},
	{line: "1|3|unix|/s|", says: "3 unix:/s netrpc"},
	{line: "1|3|unix|/s", says: "3 unix:/s netrpc"},
	{line: "1|3|unix|/s|netrpc||true", says: "3 unix:/s netrpc"},
	{line: "1|3|unix|/s|netrpc|+/8BAg|false|more", says: "3 unix:/s netrpc fbff0102"},
	{line: "1|1|tcp|[::1]:80|netrpc|\r\n", says: "1 tcp:[::1]:80 netrpc"},

	{line: "2|3|unix|/s|netrpc|", err: "core"},
	{line: "01|3|unix|/s|netrpc|", err: "core"},
	{line: "99999999999999999999|3|unix|/s", err: "core"},
	{line: "", err: "core"},
	{line: "1", err: "fields"},
	{line: "1|3|unix", err: "fields"},
	{line: "1||unix|/s", err: "version"},
	{line: "1|x|unix|/s", err: "version"},
	{line: "1|99999999999999999999|unix|/s", err: "version"},
	{line: "1|3|udp|127.0.0.1:1", err: "network"},
	{line: "1|3||/s", err: "network"},
	{line: "1|3|tcp|", err: "address"},
	{line: "1|3|tcp|127.0.0.1", err: "address"},
	{line: "1|3|tcp|127.0.0.1:http", err: "address"},
	{line: "1|3|tcp|127.0.0.1:65536", err: "address"},
	{line: "1|3|tcp|localhost:80", err: "address"}, // no name server is asked
	{line: "1|3|unix|/s|netrpc|false", err: "certificate"},
	{line: "1|3|unix|/s|netrpc|" + strings.Repeat("*", 80), err: "certificate"},
}

// A handshake line is read as it is meant, or the error says what is wrong.
func TestHandshakeLine(t *testing.T) {
	for i, test := range handshakeLines {
		h, err := parseHandshake(test.line)
		switch {
		case test.err != "":
			if err == nil || !strings.Contains(err.Error(), test.err) {
				t.Errorf("%q: the error is %v, and should have the word %q", test.line, err, test.err)
			}
		case err != nil:
			t.Errorf("%q: %v", test.line, err)
		case describe(h) != test.says:
			t.Errorf("%q is read as %q, and should be as %q", test.line, describe(h), test.says)
		case i < 5 && h.String() != test.line:
			t.Errorf("%q is written as %q", test.line, h)
		}
	}
}

// A plugin may print before its handshake, which begins a line with a number
// and a bar.
func TestNoise(t *testing.T) {
	t.Parallel()
	noise := []string{"hello", "1", "|", "a|1", " 1|3|unix|/s", "-1|", "1 |", "loading 1|3|"}
	cfg := newLab(t).config("say plugin", sayEnv+"="+strings.Join(noise, "\n"))
	logger, records := recorder()
	cfg.Logger = logger
	_, p := start(t, cfg)
	answers(t, p)
	var warned []string
	for _, r := range records.find("") {
		if r.level == hclog.Warn {
			warned = append(warned, r.args[1].(string))
		}
	}
	if !slices.Equal(warned, noise) {
		t.Errorf("the host logged %q", warned)
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
			cmd := exec.Command(os.Args[0])
			cmd.Env = slices.Concat(os.Environ(), l.env(), []string{
				modeEnv + "=plugin", testHandshake.MagicCookieKey + "=" + testHandshake.MagicCookieValue, envHost + "=" + test.host,
			})
			stdout, err := cmd.StdoutPipe()
			check(t, err)
			check(t, cmd.Start())
			defer cmd.Wait()
			defer cmd.Process.Kill()
			lines := bufio.NewReader(stdout)
			line := receive(t, "a handshake", async(func() string {
				line, _ := lines.ReadString('\n')
				return line
			}))
			if n := strings.Count(line, "|") + 1; n != test.fields {
				t.Errorf("the handshake has %d fields: %q", n, line)
			}
			h, err := parseHandshake(line)
			check(t, err)
			if runtime.GOOS != "windows" && filepath.Dir(filepath.Dir(h.addr.String())) != l.tmp {
				t.Errorf("the socket is %v", h.addr)
			}
			conn, err := net.Dial(h.addr.Network(), h.addr.String())
			check(t, err)
			host, err := NewRPCClient(conn, testPlugins(nil))
			check(t, err)
			answers(t, host)
			check(t, host.Close())
			if rest := receive(t, "the end", async(func() string {
				var rest bytes.Buffer
				_, _ = lines.WriteTo(&rest)
				return rest.String()
			})); rest != "" {
				t.Errorf("behind its handshake the plugin printed %q", rest)
			}
			l.read("plugin finished")
		})
	}
}

// A plugin serves the highest version that the host lists, or its own lowest.
func TestNegotiate(t *testing.T) {
	for _, test := range []struct{ own, host, want string }{
		{"1,2,3", "1,2,3", "3"},
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
		{host: "1", plugin: "1+1", want: 1},
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

// listenTCP listens on a free port of the range, or on any.
func TestPorts(t *testing.T) {
	taken, err := listenTCP("0", "0")
	check(t, err)
	defer taken.Close()
	port := taken.Addr().(*net.TCPAddr).Port
	if _, err := listenTCP(strconv.Itoa(port), strconv.Itoa(port)); err == nil || errors.Unwrap(err) == nil {
		t.Errorf("listening on a port that is not free returned %v", err)
	}
	next, err := listenTCP(strconv.Itoa(port), strconv.Itoa(min(port+100, 65535)))
	check(t, err)
	defer next.Close()
	if got := next.Addr().(*net.TCPAddr); got.Port <= port || got.Port > port+100 || !got.IP.IsLoopback() {
		t.Errorf("it listens on %v, and port %d was the first", got, port)
	}
}
