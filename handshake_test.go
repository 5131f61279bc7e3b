package plugin_test

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

	"github.com/muxplug/plugin"
)

func init() {
	// Prints without a line end.
	modes["mutter"] = func() { fmt.Print(os.Getenv(sayEnv)) }
	// Serves on a TCP port, with sayEnv as the host of its address.
	modes["tcp"] = func() {
		listener := must(net.Listen("tcp", "127.0.0.1:0"))
		done := make(chan struct{})
		server := &plugin.RPCServer{Plugins: testPlugins(newTestState()), DoneCh: done}
		go server.Serve(listener) // ends with the process
		_, port, _ := net.SplitHostPort(listener.Addr().String())
		fmt.Printf("1|3|tcp|%s:%s|netrpc|\n", os.Getenv(sayEnv), port)
		<-done
	}
}

// What a plugin prints without a line end before its handshake is logged, and does not
// keep it from starting.
func TestTextBeforeHandshake(t *testing.T) {
	for _, text := range []string{"loading... ", "\x1b[?25l", "\ufeff", "step 10", "one\ntwo 1|"} {
		t.Run(fmt.Sprintf("%q", text), func(t *testing.T) {
			t.Parallel()
			cfg := testConfig("mutter plugin", sayEnv+"="+text)
			logger, records := recorder()
			cfg.Logger = logger
			c, p := startPlugin(t, cfg)
			dispenseAndEcho(t, p)
			checkEqual(t, "the version", c.NegotiatedVersion(), 3)
			var logged []string
			for _, r := range records.find("before its handshake") {
				logged = append(logged, r.value("line").(string))
			}
			got := strings.Join(logged, "\n")
			if want := strings.NewReplacer("\x1b", `\x1b`, "\ufeff", `\ufeff`).Replace(text); got != want {
				t.Errorf("logged %q, and not %q", got, want)
			}
		})
	}
}

// The address in a handshake may have no host, or its usual name.
func TestLocalAddress(t *testing.T) {
	for _, host := range []string{"", "localhost", "127.0.0.1"} {
		t.Run(host, func(t *testing.T) {
			t.Parallel()
			cfg := testConfig("tcp", sayEnv+"="+host)
			c, p := startPlugin(t, cfg)
			dispenseAndEcho(t, p)
			checkEqual(t, "the host", c.ReattachConfig().Addr.(*net.TCPAddr).IP.String(), "127.0.0.1")
		})
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
		{"this host", fmt.Sprintf(`{"Pid":%d,"Detached":true}`, os.Getpid()), 7},
		{"a host further up", fmt.Sprintf(`{"Pid":%d,"Detached":true}`, os.Getppid()), 6},
		{"another library", "1", 6},
		{"no variable", "", 6},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			l := newLab(t)
			dir := filepath.Join(l.tmp, "plugin-dir")
			check(t, os.Mkdir(dir, 0o700))
			lifeline, socketDir := lifelineVariable+"="+test.host, plugin.EnvUnixSocketDir+"="+dir
			guest := l.start("plugin", testCookie, lifeline, socketDir)
			var line string
			await(t, "the handshake", func() (ok bool) {
				line, _, ok = strings.Cut(guest.output.String(), "\n")
				return ok
			})
			if n := strings.Count(line, "|") + 1; n != test.fields {
				t.Errorf("the handshake has %d fields: %q", n, line)
			}
			fields := strings.Split(line, "|")
			conn, err := net.Dial(fields[2], fields[3])
			check(t, err)
			host, err := plugin.NewRPCClient(conn, testPlugins(nil))
			check(t, err)
			dispenseAndEcho(t, host)
			check(t, host.Close())
			l.read("plugin finished")
			receive(t, "the end", guest.ended)
			if _, err := os.Stat(dir); (err != nil) != (test.fields == 7) {
				t.Errorf("only a directory of its own host is to be removed: %v", err)
			}
			check(t, os.RemoveAll(dir))
		})
	}
}

const versionsEnv = "TEST_PLUGIN_VERSIONS" // what the step "versions" serves

func init() {
	modes["versions"] = func() {
		servePlugin(func(c *plugin.ServeConfig) {
			c.ProtocolVersion, c.Plugins, c.VersionedPlugins = versions(os.Getenv(versionsEnv))
		})
	}
}

// versions returns the fields of a configuration with VersionedPlugins and,
// behind a plus sign, Plugins. A plugin has the name of its version, or "other"
// if the version is there twice and these Plugins must not be used.
func versions(list string) (version uint, plugins plugin.PluginSet, versioned map[int]plugin.PluginSet) {
	list, single, _ := strings.Cut(list, "+")
	versioned = make(map[int]plugin.PluginSet)
	for text := range strings.SplitSeq(list, ",") {
		if v, err := strconv.Atoi(text); err == nil {
			versioned[v] = plugin.PluginSet{text: serves(newTestServer())}
		}
	}
	if v, err := strconv.Atoi(single); err == nil {
		version, plugins = uint(v), plugin.PluginSet{single: serves(newTestServer())}
		if versioned[v] != nil {
			plugins = plugin.PluginSet{"other": serves(newTestServer())}
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
			cfg := testConfig("versions", versionsEnv+"="+test.plugin)
			cfg.ProtocolVersion, cfg.Plugins, cfg.VersionedPlugins = versions(test.host)
			if test.want < 0 {
				var err *plugin.VersionError
				failed := startError(t, plugin.NewClient(cfg))
				if !errors.As(failed, &err) {
					t.Fatalf("the error is %v", failed)
				}
				if err.Plugin != test.offers || !slices.Equal(err.Host, test.has) {
					t.Errorf("the error has %d, and %v of the host", err.Plugin, err.Host)
				}
				errorSays(t, err, fmt.Sprint(test.has), fmt.Sprint(test.offers), "ProtocolVersion")
				return
			}
			c, p := startPlugin(t, cfg)
			client, err := plugin.Dispense[*testClient](p, strconv.Itoa(test.want))
			check(t, err)
			checkEqual(t, "version", c.NegotiatedVersion(), test.want)
			echo(t, client.Client)
		})
	}
}
