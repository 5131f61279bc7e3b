package plugin_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/rpc"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/yamux"
	"github.com/muxplug/plugin"
)

// ---- What is documented ----

const (
	brokerTimeout = 5 * time.Second         // how long what is dialled or served waits for the peer
	pingTimeout   = 4 * time.Second         // how long Ping waits for the answer
	quitTimeout   = 2 * time.Second         // how long RPCClient.Close waits for the answer
	outputTimeout = time.Second             // how long a plugin that quits sends output
	useTimeout    = 100 * time.Millisecond  // how long Invoke waits for a Read
	orphanTimeout = 1500 * time.Millisecond // how long a plugin may run when its host is gone

	streamWindow = 1 << 20   // how many bytes a stream holds that have not been read
	firstWindow  = 256 << 10 // how many of them yamux allows before the peer has allowed more
	maxUnsent    = 1 << 20   // how many bytes of requests may wait to be written before Call waits
)

// The variables by which a host tells its plugin how to serve.
const (
	portMinVariable   = "PLUGIN_MIN_PORT"
	portMaxVariable   = "PLUGIN_MAX_PORT"
	versionsVariable  = "PLUGIN_PROTOCOL_VERSIONS"
	certVariable      = "PLUGIN_CLIENT_CERT"
	multiplexVariable = "PLUGIN_MULTIPLEX_GRPC" // of go-plugin; not used here
	// lifelineVariable has what the plugin is told about its host, as JSON: its Pid, when it
	// has Started, and whether the plugin is Detached.
	lifelineVariable = "PLUGIN_HOST_LIFELINE"
)

// protocolVariables are all that a plugin removes from its environment, but for
// the cookie.
var protocolVariables = []string{
	plugin.EnvUnixSocketDir, plugin.EnvUnixSocketGroup, portMinVariable, portMaxVariable,
	versionsVariable, certVariable, multiplexVariable, lifelineVariable,
}

// pluginName is the name under which a plugin is logged and reported.
func pluginName(path string) string { return strings.TrimSuffix(filepath.Base(path), ".exe") }

// ---- Starting and calling ----

// testConfig returns a configuration that starts the test binary in a mode.
func testConfig(mode string, env ...string) *plugin.ClientConfig {
	cmd := exec.Command(os.Args[0])
	cmd.Env = append([]string{modeEnv + "=" + mode}, env...)
	return &plugin.ClientConfig{
		HandshakeConfig: testHandshake,
		Plugins:         testPlugins(nil),
		Cmd:             cmd,
		Logger:          hclog.NewNullLogger(),
	}
}

// attachTo returns a configuration that reattaches to a running plugin.
func attachTo(rc *plugin.ReattachConfig) *plugin.ClientConfig {
	cfg := testConfig("")
	cfg.Cmd, cfg.Reattach = nil, rc
	return cfg
}

// detached changes a configuration so that other hosts can connect to the plugin, on
// Windows as well.
func detached(config *plugin.ClientConfig) *plugin.ClientConfig {
	config.Detach = true
	return config
}

// startPlugin starts a plugin and kills it when the test ends.
func startPlugin(t testing.TB, config *plugin.ClientConfig) (*plugin.Client, plugin.ClientProtocol) {
	t.Helper()
	c := plugin.NewClient(config)
	t.Cleanup(c.Kill)
	p, err := c.Client()
	check(t, err)
	return c, p
}

// startError returns the error of a start that must fail.
func startError(t testing.TB, c *plugin.Client) *plugin.StartError {
	t.Helper()
	t.Cleanup(c.Kill)
	_, err := c.Start()
	var failed *plugin.StartError
	if !errors.As(err, &failed) {
		t.Fatalf("Start returned %T: %v", err, err)
	}
	return failed
}

// connect starts a plugin and dispenses "test".
func connect(c *plugin.Client) error {
	p, err := c.Client()
	if err != nil {
		return err
	}
	return dispensing(p)
}

// dispensing returns the error of dispensing the plugin "test".
func dispensing(p plugin.ClientProtocol) error {
	_, err := p.Dispense("test")
	return err
}

// dispense dispenses the plugin "test".
func dispense(t testing.TB, p plugin.ClientProtocol) *testClient {
	t.Helper()
	c, err := plugin.Dispense[*testClient](p, "test")
	check(t, err)
	return c
}

// joinInProcess dispenses the plugin "test" without a process.
func joinInProcess(t testing.TB) (*plugin.RPCClient, *testClient, *testServer) {
	t.Helper()
	a, b := plugin.TestConn(t)
	return joinEnds(t, a, b)
}

// bothWays runs a test with the brokers of both ends of a connection, and
// again with the ends swapped.
func bothWays(t *testing.T, f func(t *testing.T, here, there *plugin.MuxBroker)) {
	t.Run("host to plugin", func(t *testing.T) {
		_, host, guest := joinInProcess(t)
		f(t, host.broker, guest.broker)
	})
	t.Run("plugin to host", func(t *testing.T) {
		_, host, guest := joinInProcess(t)
		f(t, guest.broker, host.broker)
	})
}

// dialled returns a client here for v, which is served there.
func dialled(t testing.TB, here, there *plugin.MuxBroker, v any) *rpc.Client {
	t.Helper()
	id, _ := there.ServeRPC(v)
	c, err := here.DialRPC(id)
	check(t, err)
	t.Cleanup(func() { c.Close() })
	return c
}

// callIn calls a method of the plugin that takes and returns a string, in a
// context.
func callIn(ctx context.Context, c *rpc.Client, method string) error {
	return plugin.Call(ctx, c, "Plugin."+method, "", new(string))
}

// mustCall calls a method of the plugin and returns the reply. It fails the test
// if there is an error.
func mustCall[R any](t testing.TB, c *rpc.Client, method string, arg any) (reply R) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), hangs)
	defer cancel()
	if err := plugin.Call(ctx, c, "Plugin."+method, arg, &reply); err != nil {
		t.Errorf("%s: %v", method, err)
	}
	return reply
}

// echo checks that a client of a testServer works.
func echo(t testing.TB, c *rpc.Client) {
	t.Helper()
	want := fmt.Sprint(rand.Int())
	checkEqual(t, "the echo of", mustCall[string](t, c, "Echo", want), want)
}

// dispenseAndEcho checks that the plugin "test" can be dispensed and called.
func dispenseAndEcho(t testing.TB, p plugin.ClientProtocol) {
	t.Helper()
	c := dispense(t, p)
	echo(t, c.Client)
	if err := c.Close(); err != nil {
		t.Error(err)
	}
}

// self describes the plugin's process.
func (c *testClient) self(t testing.TB) Self { return mustCall[Self](t, c.Client, "Self", struct{}{}) }

// block has n calls of Block in flight, half of them made with the function
// Call, and returns where their errors arrive.
func (c *testClient) block(t testing.TB, n int) <-chan error {
	t.Helper()
	errs := make(chan error, n)
	waiting := n + c.self(t).Waiting
	for i := range n {
		go func() {
			if i%2 == 0 {
				errs <- c.Call("Plugin.Block", "", new(string))
			} else {
				errs <- plugin.Call(context.Background(), c.Client, "Plugin.Block", "", new(string))
			}
		}()
	}
	await(t, "calls in flight", func() bool { return t.Failed() || c.self(t).Waiting >= waiting })
	return errs
}

// envValues returns all values that an environment has for a name.
func envValues(env []string, name string) (values []string) {
	for _, v := range env {
		if value, found := strings.CutPrefix(v, name+"="); found {
			values = append(values, value)
		}
	}
	return values
}

// parseAddr is the inverse of String for the address of a plugin.
func parseAddr(address string) net.Addr {
	if runtime.GOOS == "windows" {
		return must(net.ResolveTCPAddr("tcp", address))
	}
	return &net.UnixAddr{Name: address, Net: "unix"}
}

// must is for processes that are no tests.
func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

// ---- Waiting ----

const (
	// hangs bounds everything that takes no time unless it hangs.
	hangs = time.Minute
	// slack is added to a documented bound, for a busy machine.
	slack = 15 * time.Second
	// forever is longer than any test runs. A process that waits for its host
	// to kill it exits after that, even if the test was killed.
	forever = 5 * time.Minute
)

// poll calls ok until it returns true, and returns false after a while.
func poll(within time.Duration, ok func() bool) bool {
	end := time.Now().Add(within)
	pause := time.Millisecond
	for !ok() {
		if time.Now().After(end) {
			return ok()
		}
		time.Sleep(pause)
		pause = min(2*pause, 5*time.Millisecond)
	}
	return true
}

// standsStill waits until a number has not changed for a while, and returns it.
func standsStill(t testing.TB, what string, number func() int64) int64 {
	t.Helper()
	before := number()
	await(t, what+" to stand still", func() bool {
		time.Sleep(300 * time.Millisecond)
		last := before
		before = number()
		return before == last
	})
	return before
}

// await waits for ok to return true.
func await(t testing.TB, what string, ok func() bool) {
	t.Helper()
	if !poll(hangs, ok) {
		t.Fatalf("waited in vain for %s\n%s", what, stacks())
	}
}

// receive receives from a channel, or learns that it is closed.
func receive[T any](t testing.TB, what string, ch <-chan T) (v T) {
	t.Helper()
	select {
	case v = <-ch:
	case <-time.After(hangs):
		t.Fatalf("waited in vain for %s\n%s", what, stacks())
	}
	return v
}

// send sends to a channel.
func send[T any](t testing.TB, what string, ch chan<- T, v T) {
	t.Helper()
	select {
	case ch <- v:
	case <-time.After(hangs):
		t.Fatalf("nothing received %s\n%s", what, stacks())
	}
}

// async runs f in a goroutine and sends its result. The channel is closed
// without a result if f ends its goroutine.
func async[T any](f func() T) <-chan T {
	ch := make(chan T, 1)
	go func() { defer close(ch); ch <- f() }()
	return ch
}

// within fails the test if f takes longer than the bound and the slack, which is much: it
// finds what hangs, and does not measure the bound.
func within(t testing.TB, what string, bound time.Duration, f func()) {
	t.Helper()
	select {
	case <-async(func() bool { f(); return true }):
	case <-time.After(bound + slack):
		t.Fatalf("%s takes longer than %v\n%s", what, bound, stacks())
	}
}

// concurrently calls f in n goroutines and waits for all.
func concurrently(t testing.TB, n int, f func(i int)) {
	t.Helper()
	var all sync.WaitGroup
	for i := range n {
		all.Go(func() { f(i) })
	}
	within(t, fmt.Sprintf("%d callers", n), hangs, all.Wait)
}

// boundedContext returns a context that ends when everything hangs.
func boundedContext(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), hangs)
	t.Cleanup(cancel)
	return ctx
}

// deadlineContext has a deadline that passes when the test says so.
type deadlineContext struct {
	context.Context
	passed chan struct{}
	waits  chan bool // receives something when something begins to wait
}

func newDeadlineContext() deadlineContext {
	return deadlineContext{context.Background(), make(chan struct{}), make(chan bool, 1)}
}

func (c deadlineContext) pass() { close(c.passed) }

func (c deadlineContext) Done() <-chan struct{} {
	select {
	case c.waits <- true:
	default:
	}
	return c.passed
}

func (c deadlineContext) Err() error {
	select {
	case <-c.passed:
		return context.DeadlineExceeded
	default:
		return nil
	}
}

// isClosed reports whether a channel is closed.
func isClosed[T any](ch <-chan T) bool {
	select {
	case _, open := <-ch:
		return !open
	default:
		return false
	}
}

// stacks returns the stacks of all goroutines.
func stacks() string {
	buf := make([]byte, 1<<20)
	return string(buf[:runtime.Stack(buf, true)])
}

// ---- Checks, logs, buffers ----

// check ends the test if there is an error. errorSays ends it if there is none, and checks
// that the error contains some words.
var (
	check     = plugin.Check
	errorSays = plugin.ErrorSays
)

// errorIs checks an error.
func errorIs(t testing.TB, what string, err, want error) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Errorf("%s: the error is %v, and not %v", what, err, want)
	}
}

// checkEqual checks a value.
func checkEqual[T comparable](t testing.TB, what string, got, want T) {
	t.Helper()
	if got != want {
		t.Errorf("%s: %v, and not %v", what, got, want)
	}
}

// panics returns what f panics with, or nil.
func panics(f func()) (value any) {
	defer func() { value = recover() }()
	f()
	return nil
}

// isA reports whether an error is or wraps an E.
func isA[E error](err error) bool {
	var target E
	return errors.As(err, &target)
}

// logRecord is one record of a logger.
type logRecord struct {
	name  string
	level hclog.Level
	msg   string
	args  []any
}

func (r logRecord) String() string { return plugin.RecordText(r.level, r.msg, r.args) }

// logRecords collects the records of a logger.
type logRecords struct {
	mu  sync.Mutex // guards all
	all []logRecord
}

// recorder returns a logger and its records.
func recorder() (hclog.Logger, *logRecords) {
	r := new(logRecords)
	l := hclog.NewInterceptLogger(&hclog.LoggerOptions{Output: io.Discard, Level: hclog.Trace})
	l.RegisterSink(r)
	return l, r
}

func (r *logRecords) Accept(name string, level hclog.Level, msg string, args ...any) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.all = append(r.all, logRecord{name, level, msg, slices.Clone(args)})
}

// find returns the records so far whose message contains text.
func (r *logRecords) find(text string) []logRecord {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.DeleteFunc(slices.Clone(r.all), func(r logRecord) bool {
		return !strings.Contains(r.msg, text)
	})
}

// findText is find for any text of the record.
func (r *logRecords) findText(text string) []logRecord {
	return slices.DeleteFunc(r.find(""), func(r logRecord) bool {
		return !strings.Contains(r.String(), text)
	})
}

// syncBuffer is a buffer for concurrent use.
type syncBuffer struct {
	mu  sync.Mutex // guards buf
	buf bytes.Buffer
}

func (b *syncBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *syncBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}

// readerFunc and writerFunc are functions as readers and writers.
type (
	readerFunc func([]byte) (int, error)
	writerFunc func([]byte) (int, error)
)

func (f readerFunc) Read(p []byte) (int, error) { return f(p) }

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }

// readWriteCloser makes a connection of parts.
type readWriteCloser struct {
	io.Reader
	io.Writer
	io.Closer
}

// noise returns n bytes that do not repeat. Another seed gives others.
func noise(n int, seed uint64) []byte {
	data := make([]byte, n)
	var key [32]byte
	binary.LittleEndian.PutUint64(key[:], seed)
	_, _ = rand.NewChaCha8(key).Read(data)
	return data
}

// ---- Connections that fail ----

// faultyConn is a connection that fails after some reads and writes. Or its
// Writes stall from then on, until it is closed.
type faultyConn struct {
	net.Conn
	left    atomic.Int64 // reads and writes before the fault
	stalls  bool
	stalled chan bool // gets something when a Write stalls
	closed  context.Context
	close   context.CancelFunc
}

// neverFails is a number of reads and writes that no test comes to.
const neverFails = 1 << 40

func newFaultyConn(conn net.Conn, left int64, stalls bool) *faultyConn {
	c := &faultyConn{Conn: conn, stalls: stalls, stalled: make(chan bool, 1000)}
	c.closed, c.close = context.WithCancel(context.Background())
	c.left.Store(left)
	return c
}

func (c *faultyConn) Read(p []byte) (int, error) {
	if c.left.Add(-1) < 0 && !c.stalls {
		return 0, io.ErrClosedPipe
	}
	return c.Conn.Read(p)
}

func (c *faultyConn) Write(p []byte) (int, error) {
	if c.left.Add(-1) >= 0 {
		return c.Conn.Write(p)
	}
	if c.stalls {
		c.stalled <- true
		<-c.closed.Done()
	}
	return 0, io.ErrClosedPipe
}

func (c *faultyConn) Close() error {
	c.close()
	return c.Conn.Close()
}

// ---- Brokers and streams ----

// serve serves plugins on one end of a connection. It ends with the connection.
func serve(end io.ReadWriteCloser, plugins plugin.PluginSet) (served <-chan bool) {
	return async(func() bool {
		server := &plugin.RPCServer{Plugins: plugins}
		server.ServeConn(end)
		return true
	})
}

// joinBrokers makes a connection of its two ends, dispenses the plugin "test" over
// it, and returns the brokers of the host and of the plugin.
func joinBrokers(t testing.TB, hostEnd, pluginEnd io.ReadWriteCloser) (host, guest *plugin.MuxBroker) {
	t.Helper()
	_, client, server := joinEnds(t, hostEnd, pluginEnd)
	return client.broker, server.broker
}

// joinEnds is joinBrokers, and returns the dispensed client and its server.
func joinEnds(
	t testing.TB, hostEnd, pluginEnd io.ReadWriteCloser,
) (*plugin.RPCClient, *testClient, *testServer) {
	t.Helper()
	state, dispensed := newTestState(), make(chan *testServer, 100)
	serve(pluginEnd, plugin.PluginSet{"test": testPlugin(func(b *plugin.MuxBroker) (any, error) {
		s := &testServer{state, b}
		dispensed <- s
		return s, nil
	})})
	host, err := plugin.NewRPCClient(hostEnd, testPlugins(nil))
	check(t, err)
	client := dispense(t, host)
	t.Cleanup(func() { _ = client.broker.Close() })
	s := <-dispensed
	// Dispense does not wait until its stream has been opened.
	await(t, "the stream of the instance", func() bool {
		return plugin.OpenStreams(client.broker) == connectionStreams &&
			plugin.OpenStreams(s.broker) == connectionStreams
	})
	return host, client, s
}

// joined returns both ends of a stream that is dialled and accepted.
func joined(t testing.TB, dial, accept func(id uint32) (net.Conn, error)) (dialled, accepted net.Conn) {
	t.Helper()
	id := rand.Uint32()
	dialling := async(func() (err error) {
		dialled, err = dial(id)
		return err
	})
	accepted, err := accept(id)
	check(t, errors.Join(err, receive(t, "the dialled end", dialling)))
	return dialled, accepted
}

// joinedRaw returns both ends of a stream of a host and a raw plugin.
func joinedRaw(t testing.TB, raw *rawPeer, c *testClient) (dialled, accepted net.Conn) {
	return joined(t, c.broker.Dial, func(uint32) (net.Conn, error) { st, _ := raw.accept(t); return st, nil })
}

// leavesNoStreams fails the test if it leaves a stream open on the connection of a
// broker.
func leavesNoStreams(t testing.TB, brokers ...*plugin.MuxBroker) {
	t.Helper()
	for _, b := range brokers {
		before := plugin.OpenStreams(b)
		t.Cleanup(func() {
			if !poll(hangs, func() bool { return plugin.OpenStreams(b) <= before }) {
				t.Errorf("%d streams were open, and now %d", before, plugin.OpenStreams(b))
			}
		})
	}
}

// connectionStreams is how many streams a connection has over which one plugin was
// dispensed: for control, stdout, stderr, and the plugin.
const connectionStreams = 4

// The types of frames of yamux, and their flags.
const (
	dataFrame, windowFrame, pingFrame, goAwayFrame = 0, 1, 2, 3

	synFlag, ackFlag, finFlag, rstFlag = 1, 2, 4, 8
)

// frame returns a frame of yamux.
func frame(kind byte, flags uint16, stream, length uint32, body ...byte) []byte {
	b := binary.BigEndian.AppendUint16([]byte{0, kind}, flags)
	b = binary.BigEndian.AppendUint32(b, stream)
	return append(binary.BigEndian.AppendUint32(b, length), body...)
}

// ---- Peers made of yamux and net/rpc ----

// rawPeer is a peer without this package: a session whose streams the test
// opens and accepts.
type rawPeer struct {
	*yamux.Session
	conn                    net.Conn // of the session
	control, stdout, stderr net.Conn
}

func newRawPeer(t testing.TB, conn net.Conn, host bool) *rawPeer {
	t.Helper()
	cfg := yamux.DefaultConfig()
	cfg.EnableKeepAlive = false
	cfg.LogOutput = io.Discard
	create := yamux.Server
	if host {
		create = yamux.Client
	}
	session, err := create(conn, cfg)
	check(t, err)
	t.Cleanup(func() { session.Close() })
	raw := &rawPeer{Session: session, conn: conn}
	for _, stream := range []*net.Conn{&raw.control, &raw.stdout, &raw.stderr} {
		if host {
			*stream, err = session.Open()
		} else {
			*stream, err = session.Accept()
		}
		check(t, err)
	}
	return raw
}

// dial opens the stream of a broker's id.
func (p *rawPeer) dial(t testing.TB, id uint32) net.Conn {
	t.Helper()
	st, err := p.Open()
	check(t, err)
	want := binary.LittleEndian.AppendUint32(nil, id)
	got := make([]byte, 4)
	_, err = st.Write(want)
	check(t, err)
	if _, err := io.ReadFull(st, got); err != nil || !bytes.Equal(got, want) {
		t.Fatalf("the id %x is answered with %x, %v", want, got, err)
	}
	return st
}

// accept accepts a stream and answers the id with which it was dialled.
func (p *rawPeer) accept(t testing.TB) (net.Conn, uint32) {
	t.Helper()
	st, err := p.Accept()
	check(t, err)
	id := make([]byte, 4)
	_, err = io.ReadFull(st, id)
	check(t, err)
	_, err = st.Write(id)
	check(t, err)
	return st, binary.LittleEndian.Uint32(id)
}

// rawHost connects a raw host to a plugin that serves v, and returns the host,
// the plugin's broker and the stream of what the host has dispensed.
func rawHost(t testing.TB, v any) (*rawPeer, *plugin.MuxBroker, net.Conn) {
	t.Helper()
	brokers := make(chan *plugin.MuxBroker, 1)
	a, end := plugin.TestConn(t)
	serve(end, plugin.PluginSet{"test": testPlugin(func(b *plugin.MuxBroker) (any, error) {
		brokers <- b
		return v, nil
	})})
	raw := newRawPeer(t, a, true)
	var id uint32
	check(t, rpc.NewClient(raw.control).Call("Dispenser.Dispense", "test", &id))
	return raw, <-brokers, raw.dial(t, id)
}

// rawPlugin connects a host to a raw plugin, and returns the plugin, the host's
// client of what it has dispensed, and the stream of that client.
func rawPlugin(t testing.TB) (*rawPeer, *testClient, net.Conn) {
	t.Helper()
	a, b := plugin.TestConn(t)
	return joinRawPlugin(t, a, b)
}

// joinRawPlugin is rawPlugin over a connection whose ends are given.
func joinRawPlugin(t testing.TB, hostEnd, pluginEnd net.Conn) (*rawPeer, *testClient, net.Conn) {
	t.Helper()
	host, err := plugin.NewRPCClient(hostEnd, testPlugins(nil))
	check(t, err)
	t.Cleanup(func() { host.Close() })
	raw := newRawPeer(t, pluginEnd, false)
	control := rpc.NewServer()
	_ = control.RegisterName("Control", rawControl{})
	_ = control.RegisterName("Dispenser", rawControl{})
	go control.ServeConn(raw.control) // ends with the connection
	client := async(func() *testClient { return dispense(t, host) })
	st, _ := raw.accept(t)
	return raw, receive(t, "a dispensed client", client), st
}

// rawControl serves the control RPC of a raw plugin.
type rawControl struct{}

func (rawControl) Ping(bool, *struct{}) error { return nil }

func (rawControl) Quit(bool, *struct{}) error { return nil }

func (rawControl) Dispense(_ string, id *uint32) error {
	*id = 1
	return nil
}

// connectOurs returns a client of v, with this package at both ends.
func connectOurs(t testing.TB, v any) *rpc.Client {
	t.Helper()
	host, _ := plugin.TestPluginRPCConn(t, plugin.PluginSet{"test": serves(v)}, nil)
	return dispense(t, host).Client
}

// wires are the pairs that this package and net/rpc can form. The field
// connect returns a client of v; host and plugin tell which end is ours.
var wires = []struct {
	name         string
	host, plugin bool
	connect      func(t testing.TB, v any) *rpc.Client
}{
	{"plugin to plugin", true, true, connectOurs},
	{"plugin to net/rpc", true, false, func(t testing.TB, v any) *rpc.Client {
		_, c, st := rawPlugin(t)
		s := rpc.NewServer()
		check(t, s.RegisterName("Plugin", v))
		go s.ServeConn(st) // ends with the connection
		return c.Client
	}},
	{"net/rpc to plugin", false, true, func(t testing.TB, v any) *rpc.Client {
		_, _, st := rawHost(t, v)
		return rpc.NewClient(st)
	}},
	{"net/rpc to net/rpc", false, false, func(t testing.TB, v any) *rpc.Client {
		c, s := plugin.TestRPCConn(t)
		check(t, s.RegisterName("Plugin", v))
		return c
	}},
}
