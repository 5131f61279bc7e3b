package plugin_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/rpc"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/muxplug/plugin"
)

// shakyListener fails to accept a connection before each that it accepts.
type shakyListener struct {
	net.Listener
	failed bool
}

func (l *shakyListener) Accept() (net.Conn, error) {
	l.failed = !l.failed
	if l.failed {
		return nil, errors.New("too many open files")
	}
	return l.Listener.Accept()
}

// An RPCServer serves one host after the other, until its listener is closed.
func TestRPCServer(t *testing.T) {
	leavesNothing(t)
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	check(t, err)
	done := make(chan struct{})
	server := &plugin.RPCServer{Plugins: testPlugins(newTestState()), DoneCh: done}
	if err := server.Init(); err != nil || server.Config() != "" {
		t.Errorf("Init returned %v, and Config %q", err, server.Config())
	}
	served := async(func() bool { server.Serve(&shakyListener{Listener: lis}); return true })
	for range 2 {
		conn, err := net.Dial("tcp", lis.Addr().String())
		check(t, err)
		host, err := plugin.NewRPCClient(conn, testPlugins(nil))
		check(t, err)
		dispenseAndEcho(t, host)
		check(t, host.Close())
		if err := host.Close(); err != nil {
			t.Errorf("a second Close returned %v", err)
		}
		if dispensing(host) == nil {
			t.Error("after Close, Dispense returned no error")
		}
		if host.Ping() == nil {
			t.Error("after Close, Ping returned no error")
		}
		receive(t, "DoneCh", done)
	}
	check(t, lis.Close())
	receive(t, "the end of Serve", served)
}

// On the wire, a plugin's output goes to the second and third stream, and ends
// before Quit is answered. What was printed before the host came is there, and
// Close waits for all of it.
func TestWireOfOutput(t *testing.T) {
	leavesNothing(t)
	stdout, stderr := noise(200_000, 1), noise(200_000, 2)
	connect := func() (net.Conn, <-chan struct{}) {
		a, b := plugin.TestConn(t)
		done := make(chan struct{})
		server := &plugin.RPCServer{
			Stdout: bytes.NewReader(stdout),
			Stderr: bytes.NewReader(stderr),
			DoneCh: done,
		}
		go server.ServeConn(b) // ends with the connection
		return a, done
	}
	conn, done := connect()
	raw := newRawPeer(t, conn, true)
	check(t, rpc.NewClient(raw.control).Call("Control.Quit", true, &struct{}{}))
	for st, want := range map[net.Conn][]byte{raw.stdout: stdout, raw.stderr: stderr} {
		check(t, st.SetReadDeadline(time.Now().Add(hangs)))
		if got, err := io.ReadAll(st); err != nil || !bytes.Equal(got, want) {
			t.Errorf("of %d bytes, %d were read: %v", len(want), len(got), err)
		}
	}
	receive(t, "DoneCh", done)

	conn, done = connect()
	host, err := plugin.NewRPCClient(conn, nil)
	check(t, err)
	var out, errs syncBuffer
	gate := make(chan struct{})
	check(t, host.SyncStreams(gatedWriter(gate, &out), &errs))
	closed := async(host.Close)
	receive(t, "DoneCh", done)
	if poll(100*time.Millisecond, func() bool { return len(closed) > 0 }) {
		t.Error("Close returned before the output was written")
	}
	close(gate)
	check(t, receive(t, "Close", closed))
	if out.String() != string(stdout) || errs.String() != string(stderr) {
		t.Errorf("%d and %d bytes have arrived", len(out.String()), len(errs.String()))
	}
}

// gatedWriter returns a writer that writes to w once the gate is open.
func gatedWriter(gate <-chan struct{}, w io.Writer) io.Writer {
	return writerFunc(func(p []byte) (int, error) {
		<-gate
		return w.Write(p)
	})
}

// Close waits for the end of the output only where it comes: a go-plugin plugin in test mode
// lives on, and so do its streams.
func TestCloseInTestMode(t *testing.T) {
	t.Parallel()
	for range 5 { // for a busy machine
		took, err := closeInTestMode(t)
		if err == nil && took < quitTimeout*3/4 {
			return
		}
		t.Logf("Close has taken %v, and returned %v", took, err)
	}
	t.Error("Close waits for its limit each time")
}

// closeInTestMode returns how long Close takes with a plugin that ends no output, and its error.
func closeInTestMode(t *testing.T) (time.Duration, error) {
	t.Helper()
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	check(t, err)
	defer lis.Close()
	var stdout syncBuffer
	cfg := attachTo(&plugin.ReattachConfig{Test: true, Addr: lis.Addr()})
	cfg.SyncStdout = &stdout
	client := plugin.NewClient(cfg)
	connected := async(func() error {
		_, err := client.Client()
		return err
	})
	probe, err := lis.Accept() // Start looks whether there is a plugin
	check(t, err)
	check(t, probe.Close())
	conn, err := lis.Accept()
	check(t, err)
	raw := newRawPeer(t, conn, false)
	check(t, receive(t, "Client", connected))
	control := rpc.NewServer()
	check(t, control.RegisterName("Control", rawControl{}))
	go control.ServeConn(raw.control) // ends with the connection
	_, err = raw.stdout.Write([]byte("to be read"))
	check(t, err)
	host, err := client.Client()
	check(t, err)
	begun := time.Now()
	err = host.Close()
	took := time.Since(begun)
	checkEqual(t, "the output", stdout.String(), "to be read")
	return took, err
}

// A host that does not read the plugin's output, and output that does not end,
// keep the plugin from nothing. Without a host the output is dropped.
func TestOutputWithoutReader(t *testing.T) {
	leavesNothing(t)
	r, w := io.Pipe()
	defer w.Close()
	print := func() <-chan int {
		return async(func() int {
			n, _ := w.Write(make([]byte, 2*streamWindow))
			return n
		})
	}
	server := &plugin.RPCServer{Stdout: r}
	connect := func() net.Conn {
		a, b := plugin.TestConn(t)
		go server.ServeConn(b) // ends with the connection
		return a
	}
	printed := print()
	stopped := newRawPeer(t, connect(), true)
	_, err := stopped.stdout.Read(make([]byte, 1))
	check(t, err)

	host, err := plugin.NewRPCClient(connect(), nil)
	check(t, err)
	var got syncBuffer
	check(t, host.SyncStreams(&got, io.Discard))
	receive(t, "the output", printed)
	receive(t, "more output", print())
	if !poll(slack, func() bool { return len(got.String()) >= 2*streamWindow }) {
		t.Errorf("the host has got %d bytes", len(got.String()))
	}
	within(t, "Close", outputTimeout, func() { errorIs(t, "Close", host.Close(), nil) })
	check(t, stopped.Close())
	receive(t, "output without a host", print())
}

// A plugin that cannot be dispensed costs neither the connection nor anything
// that stays.
func TestBadDispense(t *testing.T) {
	leavesNothing(t)
	fails := func(err error) func(*plugin.MuxBroker) (any, error) {
		return func(*plugin.MuxBroker) (any, error) { return nil, err }
	}
	set := plugin.PluginSet{
		"good":         serves(newTestServer()),
		"server fails": testPlugin(fails(errors.New("no database"))),
		"server nil":   testPlugin(fails(nil)),
		"client fails": badClient{serves(newTestServer()), errors.New("no licence")},
		"client nil":   badClient{serves(newTestServer()), nil},
	}
	a, b := plugin.TestConn(t)
	go (&plugin.RPCServer{Plugins: set}).ServeConn(b) // ends with the connection
	known := maps.Clone(set)
	known["only here"] = set["good"]
	host, err := plugin.NewRPCClient(a, known)
	check(t, err)
	defer host.Close()
	check(t, host.Ping())
	for name, words := range map[string][]string{
		"missing":      {"good", "ClientConfig"},
		"only here":    {"good", "ServeConfig"},
		"server fails": {"Server", "no database"},
		"server nil":   {"Server", "nil"},
		"client fails": {"Client", "no licence"},
		"client nil":   {"Client", "nil"},
	} {
		t.Run(name, func(t *testing.T) {
			leavesNothing(t)
			v, err := host.Dispense(name)
			errorSays(t, err, append(words, fmt.Sprintf("%q", name))...)
			checkEqual(t, "the value with the error", v, nil)
			c, err := plugin.Dispense[*testClient](host, "good")
			check(t, err)
			echo(t, c.Client)
			check(t, c.Close())
		})
	}
}

// badClient is a plugin whose Client returns err and no client.
type badClient struct {
	testPlugin
	err error
}

func (p badClient) Client(*plugin.MuxBroker, *rpc.Client) (any, error) { return nil, p.err }

// All that a plugin printed has arrived when Kill returns, also what was on its
// way when Kill began, because the host's writers took nothing.
func TestOutput(t *testing.T) {
	t.Parallel()
	var stdout, stderr syncBuffer
	gate := make(chan struct{})
	l := newLab(t)
	cfg := l.config("plugin finishing say cry", sayEnv+"=last words")
	cfg.KillTimeout = hangs
	cfg.SyncStdout, cfg.SyncStderr = gatedWriter(gate, &stdout), gatedWriter(gate, &stderr)
	logger, records := recorder()
	cfg.Logger = logger
	c, p := startPlugin(t, cfg)
	test := dispense(t, p)
	size := streamWindow + 20<<10 // pipes hold 4 KiB on Windows, and elsewhere 64
	out, errs := string(noise(size, 1)), string(noise(size, 2))
	mustCall[struct{}](t, test.Client, "Print", Output{Stdout: out, Stderr: errs})
	call := test.Go("Plugin.Wait", "", new(string), nil)
	await(t, "a call", func() bool { return test.self(t).Waiting > 0 })
	killed := async(func() bool { c.Kill(); return true })
	l.read("cause") // the context of the call has ended
	l.write("finish", "")
	close(gate)
	receive(t, "Kill", killed)
	checkEqual(t, "the error of the call", receive(t, "the call", call.Done).Error, rpc.ErrShutdown)
	if stdout.String() != out || stderr.String() != errs {
		t.Errorf("of %d bytes each, %d and %d have arrived", size, len(stdout.String()), len(stderr.String()))
	}
	// What main prints after Serve goes to the process's own.
	if found := records.find("last words"); len(found) != 2 || found[0].level != hclog.Debug {
		t.Errorf("what main printed last was logged as %v", found)
	}
}

// Output without a writer is logged at Debug, line by line.
func TestOutputToLog(t *testing.T) {
	t.Parallel()
	var lines strings.Builder
	for i := range 1000 {
		fmt.Fprintf(&lines, "[ERROR] line %d %s\n", i, strings.Repeat("of some length ", 75))
	}
	lines.WriteString("no end")
	want := strings.Split(lines.String(), "\n")
	for _, discarded := range []bool{false, true} {
		cfg := newLab(t).config("plugin")
		cfg.KillTimeout = hangs // which is how long Kill waits for what is logged
		logger, records := recorder()
		cfg.Logger = logger
		copies := 2
		if discarded {
			cfg.SyncStdout, copies = io.Discard, 1
		}
		c, p := startPlugin(t, cfg)
		output := Output{Stdout: lines.String(), Stderr: lines.String()}
		mustCall[struct{}](t, dispense(t, p).Client, "Print", output)
		c.Kill()
		got := map[string]int{}
		for _, r := range records.find("") {
			if r.level == hclog.Debug {
				got[r.msg]++
			}
		}
		for _, line := range want {
			if got[line] != copies {
				t.Fatalf("%d of %d times, there was logged %q", got[line], copies, line)
			}
		}
	}
}

// countingControl is the control RPC of a plugin whose output ends when it is asked to quit.
type countingControl struct {
	raw   *rawPeer
	pings atomic.Int32
}

func (c *countingControl) Ping(bool, *struct{}) error {
	c.pings.Add(1)
	return nil
}

func (c *countingControl) Quit(bool, *struct{}) error {
	return errors.Join(c.raw.stdout.Close(), c.raw.stderr.Close())
}

// A plugin that may use go-plugin, and exits when it has answered, gets a few round trips to
// send its output before it is asked to quit.
func TestPingsBeforeQuit(t *testing.T) {
	t.Parallel()
	hostEnd, pluginEnd := plugin.TestConn(t)
	host, err := plugin.NewRPCClient(hostEnd, nil)
	check(t, err)
	control := &countingControl{raw: newRawPeer(t, pluginEnd, false)}
	server := rpc.NewServer()
	check(t, server.RegisterName("Control", control))
	go server.ServeConn(control.raw.control) // ends with the connection
	check(t, host.Close())
	checkEqual(t, "pings", control.pings.Load(), 3)
}
