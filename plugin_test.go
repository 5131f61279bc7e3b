package plugin

import (
	"bytes"
	"flag"
	"fmt"
	"net/rpc"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
)

// The test binary stands in for every plugin: a process that is started with
// modeEnv set runs the mode of that name and no tests.
const modeEnv = "TEST_PLUGIN_MODE"

var modes = map[string]func(){
	"greeter": func() {
		Serve(&ServeConfig{HandshakeConfig: testHandshake, Plugins: testPlugins()})
		fmt.Fprintln(os.Stderr, "main is finishing")
	},
}

// testHandshake is that of all test plugins.
var testHandshake = HandshakeConfig{ProtocolVersion: 3, MagicCookieKey: "TEST_PLUGIN_COOKIE", MagicCookieValue: "d5f1"}

// hangs is the bound on everything that takes no time unless it hangs.
const hangs = 20 * time.Second

func TestMain(m *testing.M) {
	if mode := os.Getenv(modeEnv); mode != "" {
		run := modes[mode]
		if run == nil {
			fmt.Fprintln(os.Stderr, "no such mode:", mode)
			os.Exit(64)
		}
		run()
		return
	}
	os.Exit(runTests(m))
}

// runTests runs the tests in a temporary directory of their own, and fails if
// they leave a file, process or goroutine behind.
func runTests(m *testing.M) int {
	tmp, err := os.MkdirTemp("", "mux-*")
	if err != nil {
		panic(err)
	}
	defer os.RemoveAll(tmp)
	os.Setenv("TMPDIR", tmp)
	// The race detector makes every process sleep a second before it exits.
	os.Setenv("GORACE", "atexit_sleep_ms=0 "+os.Getenv("GORACE"))
	before := runtime.NumGoroutine()
	code := m.Run()
	if f := flag.Lookup("test.fuzz"); f != nil && f.Value.String() != "" {
		return code // the workers are killed, and leave their directories in ours
	}
	if left := leftovers(tmp, before); left != "" {
		fmt.Fprintln(os.Stderr, "the tests left behind:", left)
		return 1
	}
	return code
}

// leftovers says what is left behind, giving it a while to go.
func leftovers(tmp string, goroutines int) (left string) {
	for end := time.Now().Add(5 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		left = ""
		if entries, _ := os.ReadDir(tmp); len(entries) > 0 {
			left += fmt.Sprintf("files in TMPDIR: %v\n", entries)
		}
		for _, pid := range processesWith("TMPDIR=" + tmp) {
			cmdline, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
			left += fmt.Sprintf("process %d: %q\n", pid, cmdline)
		}
		if n := runtime.NumGoroutine(); n > goroutines {
			buf := make([]byte, 1<<20)
			left += fmt.Sprintf("%d goroutines:\n%s", n-goroutines, buf[:runtime.Stack(buf, true)])
		}
		if left == "" || time.Now().After(end) {
			return left
		}
	}
}

// processesWith returns the processes but this one that were started with a
// variable in their environment and are not zombies. Without /proc, none.
func processesWith(variable string) (pids []int) {
	dirs, _ := filepath.Glob("/proc/[0-9]*")
	for _, dir := range dirs {
		pid, _ := strconv.Atoi(filepath.Base(dir))
		env, _ := os.ReadFile(dir + "/environ") // empty for a zombie
		if pid != os.Getpid() && slices.Contains(strings.Split(string(env), "\x00"), variable) {
			pids = append(pids, pid)
		}
	}
	return pids
}

// Greeter is the interface of the test plugin "greeter".
type Greeter interface{ Greet() string }

type greeterClient struct{ client *rpc.Client }

func (g *greeterClient) Greet() string {
	var reply string
	if err := g.client.Call("Plugin.Greet", new(any), &reply); err != nil {
		return err.Error()
	}
	return reply
}

type greeterServer struct{}

func (greeterServer) Greet(_ any, reply *string) error {
	*reply = "Hello!"
	return nil
}

// testPlugin is a Plugin made of two functions.
type testPlugin struct {
	server func(*MuxBroker) (any, error)
	client func(*MuxBroker, *rpc.Client) (any, error)
}

func (p testPlugin) Server(b *MuxBroker) (any, error)                { return p.server(b) }
func (p testPlugin) Client(b *MuxBroker, c *rpc.Client) (any, error) { return p.client(b, c) }

func serves(v any) func(*MuxBroker) (any, error) {
	return func(*MuxBroker) (any, error) { return v, nil }
}

// testPlugins are the plugins of all test modes.
func testPlugins() PluginSet {
	return PluginSet{
		"greeter": testPlugin{
			serves(greeterServer{}),
			func(_ *MuxBroker, c *rpc.Client) (any, error) { return &greeterClient{c}, nil },
		},
	}
}

// config returns a configuration to start the test plugin in a mode.
func config(t testing.TB, mode string) *ClientConfig {
	t.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = []string{modeEnv + "=" + mode}
	return &ClientConfig{HandshakeConfig: testHandshake, Plugins: testPlugins(), Cmd: cmd, Logger: hclog.NewNullLogger()}
}

// start starts a plugin and kills it when the test ends.
func start(t testing.TB, config *ClientConfig) (*Client, ClientProtocol) {
	t.Helper()
	c := NewClient(config)
	t.Cleanup(c.Kill)
	p, err := c.Client()
	if err != nil {
		t.Fatal(err)
	}
	return c, p
}

func dispense[T any](t testing.TB, p ClientProtocol, name string) T {
	t.Helper()
	v, err := Dispense[T](p, name)
	if err != nil {
		t.Fatal(err)
	}
	return v
}

func TestGreeter(t *testing.T) {
	var log bytes.Buffer
	cfg := config(t, "greeter")
	cfg.Logger = hclog.New(&hclog.LoggerOptions{Output: &log, Level: hclog.Trace, Mutex: new(sync.Mutex)})
	c, p := start(t, cfg)
	if got := dispense[Greeter](t, p, "greeter").Greet(); got != "Hello!" {
		t.Errorf("Greet returned %q", got)
	}
	c.Kill()
	if err := c.Err(); err != nil {
		t.Error(err)
	}
	t.Log(log.String())
}
