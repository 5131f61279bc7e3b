package plugin

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	cryptorand "crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/binary"
	"encoding/gob"
	"encoding/json"
	"encoding/pem"
	"errors"
	"flag"
	"fmt"
	"hash"
	"hash/crc32"
	"io"
	"io/fs"
	"log"
	"maps"
	"math/rand/v2"
	"net"
	"net/rpc"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"regexp"
	"runtime"
	"runtime/pprof"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/iotest"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/yamux"
)

// ==== What all sections use ====

// The test binary stands in for every plugin: a process that is started with
// modeEnv set runs the mode of that name and no tests.
const modeEnv = "TEST_PLUGIN_MODE"

var modes = map[string]func(){
	"greeter": func() {
		servePlugins(testPlugins())
		fmt.Fprintln(os.Stderr, "main is finishing")
	},
}

// testHandshake is that of all test plugins.
var testHandshake = HandshakeConfig{ProtocolVersion: 3, MagicCookieKey: "TEST_PLUGIN_COOKIE", MagicCookieValue: "d5f1"}

const (
	// hangs is the bound on everything that takes no time unless it hangs.
	hangs = 20 * time.Second
	// slack is what is added to a bound that is promised, for a machine that
	// has other things to do.
	slack = 5 * time.Second
	// forever is longer than any test runs. A process that waits for its host
	// to kill it is gone after that even where the test itself was killed.
	forever = 2 * time.Minute
	// notesEnv names the directory of a lab's notes.
	notesEnv = "TEST_LIFE_NOTES"
)

var long = flag.Bool("long", false, "let plugins live, pause and leak for as long as is promised, and calls be as large")

func TestMain(m *testing.M) {
	if mode := os.Getenv(modeEnv); mode != "" {
		run := modes[mode]
		if run == nil {
			fmt.Fprintln(os.Stderr, "no such mode:", mode)
			os.Exit(64)
		}
		signIn()
		run()
		return
	}
	os.Exit(runTests(m))
}

// runTests runs the tests in a temporary directory of their own, and fails if
// they leave a goroutine, process, descriptor or file behind. It is the only
// one to see that of parallel tests.
func runTests(m *testing.M) int {
	tmp, err := os.MkdirTemp("", "mux-*")
	if err != nil {
		panic(err)
	}
	defer os.RemoveAll(tmp)
	os.Setenv("TMPDIR", tmp)
	os.Setenv("TMP", tmp) // on Windows
	// The race detector makes every process sleep a second before it exits.
	os.Setenv("GORACE", "atexit_sleep_ms=0 "+os.Getenv("GORACE"))
	left := takeStock(tmp)
	flag.Parse()
	fuzzing := flag.Lookup("test.fuzz").Value.String() != ""
	if n := flag.Lookup("test.parallel"); !fuzzing && n.Value.String() == n.DefValue {
		// The parallel tests wait most of their time, for processes and
		// time-outs, so there may be more of them than processors.
		_ = n.Value.Set("12")
	}
	code := m.Run()
	if fuzzing {
		return code // the workers are killed, and leave their directories in ours
	}
	if left := left(); left != "" {
		fmt.Fprintln(os.Stderr, "the tests left behind:", left)
		return 1
	}
	return code
}

// takeStock looks at what this process has, with the processes and files of its
// temporary directory. The function it returns says what there is beyond that,
// giving it a while to go.
func takeStock(tmp string) (left func() string) {
	goroutines, before := runtime.NumGoroutine(), held(tmp)
	return func() (left string) {
		poll(5*time.Second, func() bool {
			more := slices.DeleteFunc(held(tmp), func(s string) bool { return slices.Contains(before, s) })
			if n := runtime.NumGoroutine(); n > goroutines {
				more = append(more, fmt.Sprintf("%d goroutines:\n%s", n-goroutines, stacks()))
			}
			left = strings.Join(more, "\n")
			return left == ""
		})
		return left
	}
}

// held lists this process's children, zombies too, the processes in the same
// temporary directory, the files there and, where /proc tells, this process's
// descriptors.
func held(tmp string) (held []string) {
	for _, pid := range processesWith("TMPDIR=" + tmp) {
		cmdline, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
		held = append(held, fmt.Sprintf("process %d: %q", pid, cmdline))
	}
	entries, _ := os.ReadDir(tmp)
	for _, e := range entries {
		held = append(held, "file "+e.Name())
	}
	if runtime.GOOS == "windows" {
		return held // Wine shows /proc, and there what it needs itself
	}
	stats, _ := filepath.Glob("/proc/[0-9]*/stat")
	for _, name := range stats {
		stat, _ := os.ReadFile(name)
		_, after, _ := strings.Cut(string(stat), ") ")
		if f := strings.Fields(after); len(f) > 1 && f[1] == strconv.Itoa(os.Getpid()) {
			held = append(held, fmt.Sprintf("child %s (%s)", filepath.Base(filepath.Dir(name)), f[0]))
		}
	}
	fds, _ := filepath.Glob("/proc/self/fd/*")
	for _, fd := range fds {
		to, err := os.Readlink(fd)
		if err == nil && (strings.HasPrefix(to, "pipe:") || strings.HasPrefix(to, "socket:") || strings.HasPrefix(to, "/") && !strings.HasPrefix(to, "/dev/")) {
			held = append(held, "descriptor of "+to)
		}
	}
	return held
}

var signedIn *os.File // by signIn

// signIn lets processesWith find this process on Windows, where nobody can read
// its environment, but nobody can remove a file either that it holds open.
func signIn() {
	if runtime.GOOS != "windows" {
		return
	}
	if dir := cmp.Or(os.Getenv(notesEnv), os.Getenv("TMPDIR")); dir != "" {
		signedIn, _ = os.Create(filepath.Join(dir, fmt.Sprintf("process-%d", os.Getpid())))
	}
}

// processesWith returns the processes but this one that were started with a
// variable in their environment and are not zombies. On Windows the variable
// must be one that signIn uses; elsewhere without /proc, there are none.
func processesWith(variable string) (pids []int) {
	if runtime.GOOS == "windows" {
		_, dir, _ := strings.Cut(variable, "=")
		files, _ := filepath.Glob(filepath.Join(dir, "process-*"))
		for _, file := range files {
			_, number, _ := strings.Cut(filepath.Base(file), "-")
			if pid, err := strconv.Atoi(number); err == nil && os.Remove(file) != nil {
				pids = append(pids, pid)
			}
		}
		return pids
	}
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

// greeterClient is a Greeter in the host.
type greeterClient struct{ client *rpc.Client }

func (g *greeterClient) Greet() string {
	var reply string
	if err := g.client.Call("Plugin.Greet", new(any), &reply); err != nil {
		return err.Error()
	}
	return reply
}

// greeterServer is what the plugin "greeter" serves.
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

// serves returns a Server that returns v.
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

// servePlugins is the main of a plugin that serves these.
func servePlugins(plugins PluginSet) {
	Serve(&ServeConfig{HandshakeConfig: testHandshake, Plugins: plugins})
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

// dispense returns what is dispensed, which must be a T.
func dispense[T any](t testing.TB, p ClientProtocol, name string) T {
	t.Helper()
	v, err := Dispense[T](p, name)
	if err != nil {
		t.Fatal(err)
	}
	return v
}

// greets checks that the plugin "greeter" of a process answers.
func greets(t testing.TB, p ClientProtocol, when ...any) {
	t.Helper()
	if got := dispense[Greeter](t, p, "greeter").Greet(); got != "Hello!" {
		t.Error(append(when, "Greet returned", got)...)
	}
}

// config returns a configuration to start a mode, with these variables. It has
// the plugins of all modes.
func config(mode string, env ...string) *ClientConfig {
	cmd := exec.Command(os.Args[0])
	cmd.Env = append([]string{modeEnv + "=" + mode}, env...)
	plugins := basePlugins(&baseServer{})
	maps.Copy(plugins, lifePlugins())
	maps.Copy(plugins, callsPlugins())
	return &ClientConfig{HandshakeConfig: testHandshake, Plugins: plugins, Cmd: cmd, Logger: hclog.NewNullLogger()}
}

// attachTo returns a configuration to reattach to what runs.
func attachTo(rc *ReattachConfig) *ClientConfig {
	cfg := config("")
	cfg.Cmd, cfg.Reattach = nil, rc
	return cfg
}

// echo checks that the plugins "base" and "life" answer.
func echo(t testing.TB, c *rpc.Client, text string) {
	t.Helper()
	var got []byte
	if err := c.Call("Plugin.Echo", []byte(text), &got); err != nil {
		t.Error(err)
	} else if string(got) != text {
		t.Errorf("the echo of %q is %q", text, got)
	}
}

// errorSays checks that an error has these texts in it.
func errorSays(t testing.TB, err error, texts ...string) {
	t.Helper()
	if err == nil {
		t.Fatal("there is no error")
	}
	for _, text := range texts {
		if !strings.Contains(err.Error(), text) {
			t.Errorf("the error does not say %q:\n%v", text, err)
		}
	}
}

// startError is the error of a start that must fail.
func startError(t testing.TB, c *Client) *StartError {
	t.Helper()
	t.Cleanup(c.Kill)
	_, err := c.Start()
	var failed *StartError
	if !errors.As(err, &failed) {
		t.Fatalf("Start returned %T: %v", err, err)
	}
	if _, again := c.Start(); again != err {
		t.Errorf("Start returned %v and then %v", err, again)
	}
	if _, again := c.Client(); again == nil || again.Error() != err.Error() {
		t.Errorf("Start returned %v, and Client %v", err, again)
	}
	receive(t, "Done", c.Done())
	return failed
}

// poll asks until the answer is yes, and returns false if the time is over.
func poll(within time.Duration, ok func() bool) bool {
	pause := time.Millisecond
	for end := time.Now().Add(within); !ok(); time.Sleep(pause) {
		if time.Now().After(end) {
			return ok()
		}
		pause = min(2*pause, 5*time.Millisecond)
	}
	return true
}

// await waits for what must happen, and fails the test if it does not.
func await(t testing.TB, what string, ok func() bool) {
	t.Helper()
	if !poll(hangs, ok) {
		t.Fatalf("waited in vain: %s\n%s", what, stacks())
	}
}

// receive receives from a channel, or learns that it is closed, and fails the
// test if neither happens.
func receive[T any](t testing.TB, what string, ch <-chan T) (v T) {
	t.Helper()
	select {
	case v = <-ch:
	case <-time.After(hangs):
		t.Fatalf("waited in vain: %s\n%s", what, stacks())
	}
	return v
}

// send sends to a channel, and fails the test if nobody receives it.
func send[T any](t testing.TB, what string, ch chan<- T, v T) {
	t.Helper()
	select {
	case ch <- v:
	case <-time.After(hangs):
		t.Fatalf("nobody took %s\n%s", what, stacks())
	}
}

// async runs f beside its caller and sends what it returns.
func async[T any](f func() T) <-chan T {
	ch := make(chan T, 1)
	go func() { ch <- f() }()
	return ch
}

// bounded runs f and returns its error, or one that says that it hangs.
func bounded(bound time.Duration, f func() error) error {
	done := make(chan error, 1)
	go func() { defer close(done); done <- f() }() // f may end its goroutine
	select {
	case err := <-done:
		return err
	case <-time.After(bound):
		return fmt.Errorf("it hangs:\n%s", stacks())
	}
}

// returns fails the test if f does not return.
func returns(t testing.TB, what string, f func()) {
	t.Helper()
	if err := bounded(hangs, func() error { f(); return nil }); err != nil {
		t.Fatalf("%s: %v", what, err)
	}
}

// within fails the test if f takes longer than it is promised to take.
func within(t testing.TB, what string, bound time.Duration, f func()) {
	t.Helper()
	start := time.Now()
	if err := bounded(bound+slack, func() error { f(); return nil }); err != nil {
		t.Fatalf("%s takes longer than %v: %v", what, bound, err)
	}
	t.Logf("%s took %v", what, time.Since(start))
}

// boundedContext returns a context for what ends before it unless it hangs.
func boundedContext(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), hangs)
	t.Cleanup(cancel)
	return ctx
}

// stacks is what all goroutines are doing.
func stacks() string {
	buf := make([]byte, 1<<20)
	return string(buf[:runtime.Stack(buf, true)])
}

// leavesNothing fails the test if it leaves a goroutine, child process,
// descriptor or file behind. It is not for parallel tests. Call it before
// anything else; the tests' own cleanups come before its check.
func leavesNothing(t testing.TB) {
	t.Helper()
	left := takeStock(os.TempDir())
	t.Cleanup(func() {
		if left := left(); left != "" {
			t.Errorf("left behind:\n%s", left)
		}
	})
}

// ownGoroutines returns a function that counts the goroutines of this test, be
// they started by others of it, and not those of tests beside it.
func ownGoroutines(t testing.TB) func() int {
	pprof.SetGoroutineLabels(pprof.WithLabels(t.Context(), pprof.Labels("test", t.Name())))
	own := regexp.MustCompile(`(?m)^(\d+) @.*\n# labels: .*` + regexp.QuoteMeta(strconv.Quote(t.Name())))
	return func() (n int) {
		var profile strings.Builder
		_ = pprof.Lookup("goroutine").WriteTo(&profile, 1)
		for _, alike := range own.FindAllStringSubmatch(profile.String(), -1) {
			count, _ := strconv.Atoi(alike[1])
			n += count
		}
		return n
	}
}

// logRecord is one record of a logger.
type logRecord struct {
	name  string
	level hclog.Level
	msg   string
	args  []any
}

// logRecords are the records of a logger, but for the frames.
type logRecords struct {
	mu  sync.Mutex // guards all
	all []logRecord
}

func (r *logRecords) Accept(name string, level hclog.Level, msg string, args ...any) {
	if strings.HasSuffix(name, ".wire") {
		return // the frames
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.all = append(r.all, logRecord{name, level, msg, append([]any(nil), args...)})
}

// get returns the records so far.
func (r *logRecords) get() []logRecord {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.all)
}

// find returns the records whose message holds text.
func (r *logRecords) find(text string) []logRecord {
	return slices.DeleteFunc(r.get(), func(r logRecord) bool { return !strings.Contains(r.msg, text) })
}

// recordingLogger returns a logger and the records that it will have got.
func recordingLogger() (hclog.Logger, *logRecords) {
	r := new(logRecords)
	l := hclog.NewInterceptLogger(&hclog.LoggerOptions{Output: io.Discard, Level: hclog.Trace})
	l.RegisterSink(r)
	return l, r
}

// syncBuffer is a buffer for any writers and readers at once.
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

func (b *syncBuffer) Reset() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.buf.Reset()
}

// writerFunc is a function as a writer.
type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }

// readerFunc is a function as a reader.
type readerFunc func([]byte) (int, error)

func (f readerFunc) Read(p []byte) (int, error) { return f(p) }

// noise is n bytes that do not repeat; another seed gives others.
func noise(n int, seed uint64) []byte {
	data := make([]byte, n)
	var key [32]byte
	binary.LittleEndian.PutUint64(key[:], seed)
	_, _ = rand.NewChaCha8(key).Read(data)
	return data
}

// shortDir makes a directory whose path leaves room for a socket's name, which
// that of t.TempDir may not.
func shortDir(t testing.TB) string {
	t.Helper()
	base := "/tmp"
	if runtime.GOOS == "windows" {
		base = ""
	}
	dir, err := os.MkdirTemp(base, "mux-*")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return dir
}

// writeProgram writes a file that is to be executed. While it is open for
// writing no process may be forked: it would hold it open, and it could not be
// executed.
func writeProgram(t testing.TB, path string, data []byte, mode fs.FileMode) {
	t.Helper()
	syscall.ForkLock.RLock()
	defer syscall.ForkLock.RUnlock()
	if err := os.WriteFile(path, data, mode); err != nil {
		t.Fatal(err)
	}
}

// copyBinary copies the test binary.
func copyBinary(t testing.TB, path string) {
	t.Helper()
	data, err := os.ReadFile(os.Args[0])
	if err != nil {
		t.Fatal(err)
	}
	writeProgram(t, path, data, 0o700)
}

// binaryNamed returns the test binary under another name, for the life of the
// test.
func binaryNamed(t testing.TB, name string) string {
	t.Helper()
	if runtime.GOOS == "windows" {
		name += ".exe"
	}
	path := filepath.Join(t.TempDir(), name)
	// On Windows a link to a binary that runs cannot be removed.
	if runtime.GOOS != "windows" && os.Link(os.Args[0], path) == nil {
		return path
	}
	copyBinary(t, path)
	return path
}

// quietYamux is how a peer that is yamux alone is configured.
func quietYamux() *yamux.Config {
	config := yamux.DefaultConfig()
	config.EnableKeepAlive = false
	config.LogOutput = io.Discard
	return config
}

// lab is where the processes of one test live: with a TMPDIR of their own, and
// a directory for notes by which they tell the test what they have done, also
// after they were killed. When the test ends, nothing may be left in it.
type lab struct {
	t          testing.TB
	tmp, notes string
}

// newLab returns a lab that is checked and removed when the test ends.
func newLab(t testing.TB) *lab {
	t.Helper()
	l := &lab{t: t}
	for _, dir := range []*string{&l.tmp, &l.notes} {
		var err error
		// Not t.TempDir, whose paths are too long for a socket.
		if *dir, err = os.MkdirTemp("", "l*"); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { os.RemoveAll(*dir) })
	}
	t.Cleanup(func() { l.deserted(hangs) })
	return l
}

// env is what puts a process into the lab.
func (l *lab) env() []string {
	return []string{"TMPDIR=" + l.tmp, notesEnv + "=" + l.notes}
}

// config is a configuration to start a mode in the lab.
func (l *lab) config(mode string) *ClientConfig {
	cfg := config(mode)
	cfg.Cmd.Env = append(cfg.Cmd.Env, l.env()...)
	if runtime.GOOS != "windows" {
		cfg.UnixSocketConfig = &UnixSocketConfig{TempDir: l.tmp}
	}
	return cfg
}

// processes are those that were started in the lab and have not ended.
func (l *lab) processes() []int { return processesWith(notesEnv + "=" + l.notes) }

// deserted fails the test if a process or file is left when the time is over.
func (l *lab) deserted(within time.Duration) {
	l.t.Helper()
	var left string
	ok := poll(within, func() bool {
		left = ""
		if pids := l.processes(); len(pids) > 0 {
			left = fmt.Sprintf("processes %v", pids)
		}
		if files, _ := os.ReadDir(l.tmp); len(files) > 0 {
			left += fmt.Sprintf(" files %v", files)
		}
		return left == ""
	})
	if !ok {
		l.t.Errorf("after %v there are left: %s", within, left)
		for _, pid := range l.processes() {
			if p, err := os.FindProcess(pid); err == nil {
				_ = p.Kill()
			}
		}
	}
}

// read waits for a note and returns its text.
func (l *lab) read(name string) string {
	l.t.Helper()
	var text []byte
	await(l.t, "the note "+name, func() (ok bool) { // on Windows a new one may be locked
		var err error
		text, err = os.ReadFile(filepath.Join(l.notes, name))
		return err == nil
	})
	return string(text)
}

// readPid waits for a note that is a pid.
func (l *lab) readPid(name string) int {
	l.t.Helper()
	pid, err := strconv.Atoi(l.read(name))
	if err != nil {
		l.t.Fatal(err)
	}
	return pid
}

// noted reports whether there is a note.
func (l *lab) noted(name string) bool {
	_, err := os.Stat(filepath.Join(l.notes, name))
	return err == nil
}

// write leaves a note for the processes of the lab.
func (l *lab) write(name, text string) { leaveNote(l.notes, name, text) }

// note leaves a note for the test from a process in a lab.
func note(name, text string) { leaveNote(os.Getenv(notesEnv), name, text) }

// leaveNote leaves a note that appears at once and whole.
func leaveNote(dir, name, text string) {
	tmp := filepath.Join(dir, fmt.Sprintf(".%s-%d", name, os.Getpid()))
	if os.WriteFile(tmp, []byte(text), 0o600) == nil {
		_ = os.Rename(tmp, filepath.Join(dir, name))
	}
}

// awaitNote waits for a note of the test's, in a process that it may kill.
func awaitNote(name string) {
	l := &lab{notes: os.Getenv(notesEnv)}
	if !poll(3*hangs, func() bool { return l.noted(name) }) {
		os.Exit(65)
	}
}

// ==== Starting, calling, stopping ====

// What every host and every plugin does, one topic after the other, and what
// goes wrong because of how they are built or configured.

// The environment variables by which tests tell the modes below what to do.
const (
	baseSayEnv      = "TEST_BASE_SAY"      // what to print to stdout
	basePadEnv      = "TEST_BASE_PAD"      // how many bytes to add to it
	baseVersionsEnv = "TEST_BASE_VERSIONS" // the versions in VersionedPlugins
	baseLegacyEnv   = "TEST_BASE_LEGACY"   // the version of Plugins
	baseTLSEnv      = "TEST_BASE_TLS"      // certificate and key, or "fail"
	baseReattachEnv = "TEST_BASE_REATTACH" // see baseTicket
	baseMTLSEnv     = "TEST_BASE_MTLS"     // not empty for AutoMTLS
)

func init() {
	maps.Copy(modes, map[string]func(){
		// The plugin of most tests here.
		"base": func() {
			s := &baseServer{environ: os.Environ(), stderr: os.Stderr}
			servePlugins(basePlugins(s))
			fmt.Println("tail on stdout")
			fmt.Fprintln(os.Stderr, "[INFO] tail on stderr")
		},
		// Does not end when it is asked to.
		"base-stubborn": func() {
			servePlugins(basePlugins(&baseServer{}))
			time.Sleep(forever)
		},
		// Prints something and waits.
		"base-say": func() {
			pad, _ := strconv.Atoi(os.Getenv(basePadEnv))
			fmt.Print(os.Getenv(baseSayEnv), strings.Repeat("x", pad), "\n")
			time.Sleep(forever)
		},
		"base-closed-stdout": func() {
			_ = os.Stdout.Close()
			time.Sleep(forever)
		},
		"base-exits": func() {
			fmt.Fprintln(os.Stderr, "cannot find my settings")
			os.Exit(7)
		},
		"base-panics": func() {
			fmt.Fprintln(os.Stderr, "all is well")
			panic("boom")
		},
		// Sends its stdin back. No plugin.
		"base-innocent": func() { _, _ = io.Copy(os.Stdout, os.Stdin) },
		"base-versions": func() {
			config := &ServeConfig{HandshakeConfig: testHandshake, VersionedPlugins: baseVersions(os.Getenv(baseVersionsEnv))}
			if v, err := strconv.Atoi(os.Getenv(baseLegacyEnv)); err == nil {
				config.ProtocolVersion, config.Plugins = uint(v), baseVersion(v)
			}
			Serve(config)
		},
		"base-tls": func() {
			Serve(&ServeConfig{
				HandshakeConfig: testHandshake, Plugins: basePlugins(&baseServer{}),
				TLSProvider: func() (*tls.Config, error) {
					text := os.Getenv(baseTLSEnv)
					cert, err := tls.X509KeyPair([]byte(text), []byte(text))
					return &tls.Config{Certificates: []tls.Certificate{cert}}, err
				},
			})
		},
		"base-no-plugins": func() { Serve(&ServeConfig{HandshakeConfig: testHandshake}) },
		"base-mux": func() {
			config := func(text string) *ServeConfig {
				return &ServeConfig{HandshakeConfig: testHandshake, Plugins: PluginSet{"which": testPlugin{server: serves(baseName(text))}}}
			}
			ServeMux(ServeMuxMap{"first": config("the first"), "second": config("the second")})
		},
		"base-first-host":  baseFirstHost,
		"base-second-host": baseSecondHost,
		"base-quiet-host":  baseQuietHost,
	})
}

// baseServer is what the plugin "base" serves.
type baseServer struct {
	environ []string // as the process began with
	stderr  *os.File // the process's own
	broker  *MuxBroker
}

func (s *baseServer) Echo(in []byte, out *[]byte) error {
	*out = in
	return nil
}

func (s *baseServer) Environ(_ struct{}, out *[]string) error {
	*out = s.environ
	return nil
}

func (s *baseServer) Goroutines(_ struct{}, n *int) error {
	*n = runtime.NumGoroutine()
	return nil
}

// WaitQuit returns when the plugin has been asked to quit.
func (s *baseServer) WaitQuit(ctx context.Context, _ struct{}, _ *struct{}) error {
	<-ctx.Done()
	return nil
}

// ReadStdin reads until size bytes are there.
func (s *baseServer) ReadStdin(size int, text *string) error {
	buf := make([]byte, size)
	_, err := io.ReadFull(os.Stdin, buf)
	*text = string(buf)
	return err
}

// BaseOutput is what Print prints, and where to.
type BaseOutput struct{ Stdout, Stderr, Raw []byte }

func (s *baseServer) Print(o BaseOutput, _ *struct{}) error {
	_, err1 := os.Stdout.Write(o.Stdout)
	_, err2 := os.Stderr.Write(o.Stderr)
	_, err3 := s.stderr.Write(o.Raw)
	return errors.Join(err1, err2, err3)
}

// Take reads a stream to its end and returns the number of its bytes.
func (s *baseServer) Take(id uint32, n *int64) error {
	conn, err := s.broker.Dial(id)
	if err != nil {
		return err
	}
	defer conn.Close()
	*n, err = io.Copy(io.Discard, conn)
	return err
}

// basePlugins are the test plugins, "base" among them, which on the host's
// side is an *rpc.Client, and some that fail in every way.
func basePlugins(s *baseServer) PluginSet {
	client := func(_ *MuxBroker, c *rpc.Client) (any, error) { return c, nil }
	server := serves(greeterServer{})
	set := testPlugins()
	set["base"] = testPlugin{func(b *MuxBroker) (any, error) {
		own := *s
		own.broker = b
		return &own, nil
	}, client}
	set["server error"] = testPlugin{func(*MuxBroker) (any, error) { return nil, errors.New("no database") }, client}
	set["server nil"] = testPlugin{serves(nil), client}
	set["server panic"] = testPlugin{func(*MuxBroker) (any, error) { panic("server boom") }, client}
	set["client error"] = testPlugin{server, func(*MuxBroker, *rpc.Client) (any, error) { return nil, errors.New("no licence") }}
	set["client nil"] = testPlugin{server, func(*MuxBroker, *rpc.Client) (any, error) { return nil, nil }}
	set["client panic"] = testPlugin{server, func(*MuxBroker, *rpc.Client) (any, error) { panic("client boom") }}
	return set
}

// TestGreeter shows a whole life, with the log of it.
func TestGreeter(t *testing.T) {
	var log bytes.Buffer
	cfg := config("greeter")
	cfg.Logger = hclog.New(&hclog.LoggerOptions{Output: &log, Level: hclog.Trace, Mutex: new(sync.Mutex)})
	c, p := start(t, cfg)
	greets(t, p)
	c.Kill()
	if err := c.Err(); err != nil {
		t.Error(err)
	}
	t.Log(log.String())
}

// ---- The public API ----

// These are used by programs written for go-plugin, so they stay as they are.
var (
	_ func(*ClientConfig) *Client                                     = NewClient
	_ func()                                                          = CleanupClients
	_ func(*ServeConfig)                                              = Serve
	_ func(ServeMuxMap)                                               = ServeMux
	_ func(string, string) ([]string, error)                          = Discover
	_ func(error) *BasicError                                         = NewBasicError
	_ func(io.ReadWriteCloser, map[string]Plugin) (*RPCClient, error) = NewRPCClient
	_ func(*Client) (ClientProtocol, error)                           = (*Client).Client
	_ func(*Client) (net.Addr, error)                                 = (*Client).Start
	_ func(*Client)                                                   = (*Client).Kill
	_ func(*Client) bool                                              = (*Client).Exited
	_ func(*Client) string                                            = (*Client).ID
	_ func(*Client) Protocol                                          = (*Client).Protocol
	_ func(*Client) int                                               = (*Client).NegotiatedVersion
	_ func(*Client) *ReattachConfig                                   = (*Client).ReattachConfig
	_ func(*SecureConfig, string) (bool, error)                       = (*SecureConfig).Check
	_ func(*RPCClient, io.Writer, io.Writer) error                    = (*RPCClient).SyncStreams
	_ func(*RPCServer, net.Listener)                                  = (*RPCServer).Serve
	_ func(*RPCServer, io.ReadWriteCloser)                            = (*RPCServer).ServeConn
	_ func(*MuxBroker, uint32) (net.Conn, error)                      = (*MuxBroker).Accept
	_ func(*MuxBroker, uint32) (net.Conn, error)                      = (*MuxBroker).Dial
	_ func(*MuxBroker, uint32, interface{})                           = (*MuxBroker).AcceptAndServe
	_ func(*MuxBroker) uint32                                         = (*MuxBroker).NextId
	_ func(*MuxBroker) error                                          = (*MuxBroker).Close
	_ func(*MuxBroker)                                                = (*MuxBroker).Run

	_ ClientProtocol = (*RPCClient)(nil)
	_ ServerProtocol = (*RPCServer)(nil)
	_ error          = (*BasicError)(nil)

	_ = ServeTestConfig{Context: nil, ReattachConfigCh: nil, CloseCh: nil, SyncStdio: false}
	_ = ReattachConfig{Protocol: ProtocolInvalid, ProtocolVersion: 0, Addr: nil, Pid: 0, Test: false}
	_ = ClientConfig{
		HandshakeConfig: HandshakeConfig{ProtocolVersion: 1, MagicCookieKey: "", MagicCookieValue: ""},
		Plugins:         map[string]Plugin{}, VersionedPlugins: map[int]PluginSet{}, Cmd: nil, Reattach: nil,
		SecureConfig: nil, TLSConfig: nil, Managed: false, MinPort: 0, MaxPort: 0, StartTimeout: 0,
		Stderr: nil, SyncStdout: nil, SyncStderr: nil, AllowedProtocols: []Protocol{ProtocolNetRPC, ProtocolGRPC},
		Logger: nil, PluginLogBufferSize: 0, AutoMTLS: false, SkipHostEnv: false,
		UnixSocketConfig: &UnixSocketConfig{Group: "", TempDir: ""},
	}
)

// TestDispenseType checks that a wrong type is an error that says all.
func TestDispenseType(t *testing.T) {
	client, _ := TestPluginRPCConn(t, testPlugins(), nil)
	greets(t, client)
	if g := dispense[*greeterClient](t, client, "greeter"); g.Greet() != "Hello!" {
		t.Error(g.Greet())
	}
	_, err := Dispense[io.Writer](client, "greeter")
	errorSays(t, err, `"greeter"`, "*plugin.greeterClient", "io.Writer")
	n, err := Dispense[int](client, "greeter")
	errorSays(t, err, `"greeter"`, "*plugin.greeterClient", "int")
	if n != 0 {
		t.Error("a value was returned beside the error:", n)
	}
	_, err = Dispense[Greeter](client, "missing")
	errorSays(t, err, `"missing"`)
}

// TestAccessors checks what a client tells before, while and after its plugin
// runs.
func TestAccessors(t *testing.T) {
	leavesNothing(t)
	c := NewClient(config("base"))
	if c.Exited() || c.ID() != "" || c.NegotiatedVersion() != 0 || c.ReattachConfig() != nil {
		t.Error("before Start:", c.Exited(), c.ID(), c.NegotiatedVersion(), c.ReattachConfig())
	}
	if p := c.Protocol(); p != ProtocolNetRPC { // this starts it
		t.Errorf("the protocol is %q", p)
	}
	addr, err := c.Start()
	if err != nil {
		t.Fatal(err)
	}
	again, err := c.Start()
	if err != nil || again != addr {
		t.Errorf("a second Start returned %v, %v, and the first %v", again, err, addr)
	}
	p, err := c.Client()
	if err != nil {
		t.Fatal(err)
	}
	if same, err := c.Client(); err != nil || same != p {
		t.Error("a second Client returned another connection:", err)
	}
	if pid, err := strconv.Atoi(c.ID()); err != nil || pid <= 0 || c.Exited() || c.NegotiatedVersion() != 3 {
		t.Error("while it runs:", c.Exited(), c.ID(), c.NegotiatedVersion())
	}
	rc := c.ReattachConfig()
	want := &ReattachConfig{Protocol: ProtocolNetRPC, ProtocolVersion: 3, Addr: addr}
	want.Pid, _ = strconv.Atoi(c.ID())
	if !reflect.DeepEqual(rc, want) {
		t.Errorf("the ReattachConfig is %+v, and should be %+v", rc, want)
	}
	if err := p.Ping(); err != nil {
		t.Error(err)
	}
	c.Kill()
	if !c.Exited() {
		t.Error("it has not exited after Kill")
	}
	if p.Ping() == nil {
		t.Error("Ping succeeds after Kill")
	}
	failed := NewClient(config("base-exits"))
	defer failed.Kill()
	if p := failed.Protocol(); p != ProtocolInvalid {
		t.Errorf("the protocol of what does not start is %q", p)
	}
}

// TestDiscover checks that only files are found that can be executed.
func TestDiscover(t *testing.T) {
	dir := t.TempDir()
	ext := ""
	if runtime.GOOS == "windows" {
		ext = ".exe"
	}
	for name, mode := range map[string]os.FileMode{
		"plugin-b" + ext: 0o755, "plugin-a" + ext: 0o700, "plugin-c.txt": 0o644, "other" + ext: 0o755,
	} {
		if err := os.WriteFile(filepath.Join(dir, name), nil, mode); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Mkdir(filepath.Join(dir, "plugin-dir"+ext), 0o755); err != nil {
		t.Fatal(err)
	}
	got, err := Discover("plugin-*", dir)
	want := []string{filepath.Join(dir, "plugin-a"+ext), filepath.Join(dir, "plugin-b"+ext)}
	if err != nil || !slices.Equal(got, want) {
		t.Errorf("found %v, %v; want %v", got, err, want)
	}
	t.Chdir(dir)
	got, err = Discover("plugin-*", ".")
	if err != nil || len(got) != 2 || !filepath.IsAbs(got[0]) {
		t.Errorf("found in %q: %v, %v", ".", got, err)
	}
	if got, err := Discover("*", filepath.Join(dir, "missing")); err != nil || len(got) != 0 {
		t.Errorf("found in a directory that is not there: %v, %v", got, err)
	}
	if _, err := Discover("[", dir); err == nil {
		t.Error("a malformed pattern is no error")
	}
	// A directory whose name looks like a pattern is taken as it is.
	odd := filepath.Join(dir, "[a]")
	if err := os.Mkdir(odd, 0o755); err != nil {
		t.Fatal(err)
	}
	want = []string{filepath.Join(odd, "x"+ext)}
	if err := os.WriteFile(want[0], nil, 0o755); err != nil {
		t.Fatal(err)
	}
	if got, err := Discover("x*", odd); err != nil || !slices.Equal(got, want) {
		t.Errorf("found %v, %v; want %v", got, err, want)
	}
}

// BaseReply is a reply with an error in it.
type BaseReply struct{ Err *BasicError }

type baseFailing struct{ err error }

func (f baseFailing) Check(_ int, reply *BaseReply) error {
	reply.Err = NewBasicError(f.err)
	return nil
}

// TestBasicError checks that an error in a reply arrives, and no error too.
func TestBasicError(t *testing.T) {
	if NewBasicError(nil) != nil {
		t.Error("the BasicError of nil is not nil")
	}
	for _, want := range []error{fs.ErrNotExist, nil} {
		client, server := TestRPCConn(t)
		if err := server.RegisterName("Plugin", baseFailing{want}); err != nil {
			t.Fatal(err)
		}
		var reply BaseReply
		if err := client.Call("Plugin.Check", 0, &reply); err != nil {
			t.Fatal(err)
		}
		switch {
		case want == nil && reply.Err != nil:
			t.Errorf("got %v for no error", reply.Err)
		case want != nil && (reply.Err == nil || reply.Err.Error() != want.Error()):
			t.Errorf("got %v, want %v", reply.Err, want)
		}
		_ = client.Close()
	}
}

// TestHelpers uses the test helpers with each of the types that tests have.
func TestHelpers(t *testing.T) {
	leavesNothing(t)
	conn := func(client, server net.Conn) {
		go func() { _, _ = client.Write([]byte("abc")) }()
		got := make([]byte, 3)
		if _, err := io.ReadFull(server, got); err != nil || string(got) != "abc" {
			t.Errorf("read %q, %v", got, err)
		}
	}
	call := func(c *rpc.Client, s *rpc.Server) {
		if err := s.RegisterName("Plugin", greeterServer{}); err != nil {
			t.Error(err)
		}
		if got := (&greeterClient{c}).Greet(); got != "Hello!" {
			t.Error(got)
		}
	}
	plugin := func(c *RPCClient, s *RPCServer) {
		if got := dispense[Greeter](t, c, "greeter").Greet(); got != "Hello!" || s == nil {
			t.Error(got, s)
		}
	}
	t.Run("T", func(t *testing.T) {
		conn(TestConn(t))
		call(TestRPCConn(t))
		plugin(TestPluginRPCConn(t, testPlugins(), nil))
	})
	t.Run("TB", func(t *testing.T) {
		var tb testing.TB = t
		conn(TestConn(tb))
		call(TestRPCConn(tb))
		plugin(TestPluginRPCConn(tb, testPlugins(), &TestOptions{}))
	})
	ran := false
	testing.Benchmark(func(b *testing.B) {
		ran = true
		conn(TestConn(b))
		call(TestRPCConn(b))
		plugin(TestPluginRPCConn(b, map[string]Plugin{"greeter": testPlugins()["greeter"]}, nil))
		b.SkipNow() // one run will do
	})
	if !ran {
		t.Error("the benchmark has not run")
	}
}

// TestHelperOutput checks that the options' readers are the plugin's output.
func TestHelperOutput(t *testing.T) {
	leavesNothing(t)
	outR, outW := io.Pipe()
	errR, errW := io.Pipe()
	defer outW.Close()
	defer errW.Close()
	client, _ := TestPluginRPCConn(t, testPlugins(), &TestOptions{ServerStdout: outR, ServerStderr: errR})
	var stdout, stderr syncBuffer
	if err := client.SyncStreams(&stdout, &stderr); err != nil {
		t.Fatal(err)
	}
	fmt.Fprint(outW, "to stdout")
	fmt.Fprint(errW, "to stderr")
	await(t, "output", func() bool { return stdout.String() == "to stdout" && stderr.String() == "to stderr" })
}

type baseName string

func (n baseName) Name(_ int, reply *string) error {
	*reply = string(n)
	return nil
}

// TestServeMux checks that the argument selects the plugin.
func TestServeMux(t *testing.T) {
	leavesNothing(t)
	client := func(_ *MuxBroker, c *rpc.Client) (any, error) { return c, nil }
	for arg, want := range map[string]string{"first": "the first", "second": "the second"} {
		cfg := config("base-mux")
		cfg.Plugins = PluginSet{"which": testPlugin{client: client}}
		cfg.Cmd.Args = append(cfg.Cmd.Args, arg)
		c, p := start(t, cfg)
		var got string
		if err := dispense[*rpc.Client](t, p, "which").Call("Plugin.Name", 0, &got); err != nil || got != want {
			t.Errorf("%s is %q, %v", arg, got, err)
		}
		c.Kill()
	}
	for _, args := range [][]string{nil, {"third"}, {"first", "second"}} {
		cmd := exec.Command(os.Args[0], args...)
		cmd.Env = append(os.Environ(), modeEnv+"=base-mux", testHandshake.MagicCookieKey+"="+testHandshake.MagicCookieValue)
		out, err := cmd.CombinedOutput()
		if code := cmd.ProcessState.ExitCode(); code != 1 {
			t.Errorf("with %q it exits with %d: %v", args, code, err)
		}
		if text := string(out); !strings.Contains(text, "first") || !strings.Contains(text, "second") {
			t.Errorf("with %q it says %q, and not which arguments there are", args, text)
		}
	}
}

// ---- The wire ----

// TestHandshakeLine is the table of what a plugin may say when it is ready.
func TestHandshakeLine(t *testing.T) {
	own, err := newCertificate()
	if err != nil {
		t.Fatal(err)
	}
	der := own.Certificate[0]
	cert := base64.RawStdEncoding.EncodeToString(der)
	junk := strings.Repeat("A", 80)
	for _, test := range []struct {
		line     string
		version  int
		addr     string
		protocol Protocol
		cert     []byte
		err      string
	}{
		{line: "1|3|unix|/tmp/plugin123|netrpc|", version: 3, addr: "unix /tmp/plugin123", protocol: "netrpc"},
		{line: "1|3|unix|/tmp/plugin123|netrpc", version: 3, addr: "unix /tmp/plugin123", protocol: "netrpc"},
		{line: "1|3|unix|/tmp/plugin123", version: 3, addr: "unix /tmp/plugin123", protocol: "netrpc"},
		{line: "1|3|unix|/tmp/plugin123|", version: 3, addr: "unix /tmp/plugin123", protocol: "netrpc"},
		{line: "1|3|unix|/tmp/plugin123|grpc|", version: 3, addr: "unix /tmp/plugin123", protocol: "grpc"},
		{line: "1|3|unix|/tmp/with a space|netrpc|", version: 3, addr: "unix /tmp/with a space", protocol: "netrpc"},
		{line: "1|0|tcp|127.0.0.1:10000|netrpc|", version: 0, addr: "tcp 127.0.0.1:10000", protocol: "netrpc"},
		{line: "1|1|tcp|[::1]:80|netrpc|", version: 1, addr: "tcp [::1]:80", protocol: "netrpc"},
		{line: "1|1|tcp|localhost:80|netrpc|", version: 1, addr: "tcp 127.0.0.1:80", protocol: "netrpc"},
		{line: "1|1|tcp|:1234|netrpc|\r\n", version: 1, addr: "tcp :1234", protocol: "netrpc"},
		{line: "1|3|unix|/s|netrpc|" + cert, version: 3, addr: "unix /s", protocol: "netrpc", cert: der},
		{line: "1|3|unix|/s|netrpc|" + cert + "|false|more", version: 3, addr: "unix /s", protocol: "netrpc", cert: der},
		{line: "1|3|unix|/s|netrpc||true", version: 3, addr: "unix /s", protocol: "netrpc"},

		{line: "1|3|unix|/s|netrpc|false", err: "certificate"},
		{line: "2|3|unix|/s|netrpc|", err: `"2"`},
		{line: "01|3|unix|/s|netrpc|", err: "core protocol"},
		{line: "99999999999999999999|3|unix|/s", err: "core protocol"},
		{line: "2", err: "core protocol"},
		{line: "", err: "core protocol"},
		{line: "1", err: "1 fields"},
		{line: "1|3|unix", err: "3 fields"},
		{line: "1||unix|/s", err: "no number"},
		{line: "1|x|unix|/s", err: `"x"`},
		{line: "1|99999999999999999999|unix|/s", err: "no number"},
		{line: "1|3|udp|127.0.0.1:1", err: `"udp"`},
		{line: "1|3||/s", err: "network"},
		{line: "1|3|unix|", err: "empty"},
		{line: "1|3|tcp|", err: "address"},
		{line: "1|3|tcp|127.0.0.1", err: "address"},
		{line: "1|3|tcp|127.0.0.1:http", err: "port"},
		{line: "1|3|tcp|127.0.0.1:65536", err: "port"},
		{line: "1|3|tcp|127.0.0.1:-1", err: "port"},
		{line: "1|3|tcp|example.com:80", err: "no IP address"},
		{line: "1|3|unix|/s|netrpc|" + junk, err: "certificate"},
		{line: "1|3|unix|/s|netrpc|" + strings.Repeat("*", 80), err: "certificate"},
		{line: "1|3|unix|/s|netrpc|" + cert[:len(cert)-20], err: "certificate"},
	} {
		h, err := parseHandshake(test.line)
		if test.err != "" {
			if err == nil || !strings.Contains(err.Error(), test.err) {
				t.Errorf("%.60q: the error is %v, and should say %q", test.line, err, test.err)
			}
			continue
		}
		if err != nil {
			t.Errorf("%.60q: %v", test.line, err)
			continue
		}
		addr := h.addr.Network() + " " + h.addr.String()
		if h.version != test.version || addr != test.addr || h.protocol != test.protocol || !bytes.Equal(h.cert, test.cert) {
			t.Errorf("%.60q is read as %d, %s, %s and %d bytes", test.line, h.version, addr, h.protocol, len(h.cert))
		}
	}
}

// TestHandshakeIsWritten checks the line against the protocol's own words.
func TestHandshakeIsWritten(t *testing.T) {
	h := handshake{version: 3, addr: &net.UnixAddr{Name: "/tmp/plugin123", Net: "unix"}, protocol: ProtocolNetRPC}
	if got := h.String(); got != "1|3|unix|/tmp/plugin123|netrpc|" {
		t.Error(got)
	}
	h.addr, h.cert = &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 99}, []byte{0xfb, 0xff, 1, 2}
	if got := h.String(); got != "1|3|tcp|127.0.0.1:99|netrpc|+/8BAg" {
		t.Error(got)
	}
}

// TestHandshakeLineIsFound checks which lines of stdout are meant as one.
func TestHandshakeLineIsFound(t *testing.T) {
	for line, want := range map[string]bool{
		"1|3|unix|/s": true, "2|": true, "123|x": true,
		"": false, "1": false, "|": false, "a|1": false, " 1|3|unix|/s": false, "-1|": false, "1 |": false, "loading 1|3|": false,
	} {
		if got := isHandshake([]byte(line)); got != want {
			t.Errorf("%q: %v", line, got)
		}
	}
}

// FuzzHandshake checks that no line does any harm, and that what is read from
// one is what writing it again gives.
func FuzzHandshake(f *testing.F) {
	own, err := newCertificate()
	if err != nil {
		f.Fatal(err)
	}
	for _, line := range []string{
		"1|3|unix|/tmp/plugin123|netrpc|", "1|1|tcp|[fe80::1%eth0]:80|", "1|1|tcp|localhost:1|grpc|AAAA|true", "2|", "1|||", "1|-1|unix| | |",
		handshake{1, &net.UnixAddr{Name: "x", Net: "unix"}, "netrpc", own.Certificate[0]}.String(),
	} {
		f.Add(line)
	}
	f.Fuzz(func(t *testing.T, line string) {
		h, err := parseHandshake(line)
		if err != nil {
			return
		}
		again, err := parseHandshake(h.String())
		if err != nil {
			t.Fatalf("%q is read, and %q, which is the same, is not: %v", line, h, err)
		}
		if again.version != h.version || again.protocol != h.protocol || !bytes.Equal(again.cert, h.cert) ||
			again.addr.Network() != h.addr.Network() || again.addr.String() != h.addr.String() {
			t.Fatalf("%q is read as %q and that as %q", line, h, again)
		}
	})
}

// TestNegotiate is the table of who serves which version.
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
		if got := negotiate(baseVersions(test.own), test.host); strconv.Itoa(got) != test.want {
			t.Errorf("with %s, for a host with %s, %d is chosen and not %s", test.own, test.host, got, test.want)
		}
	}
}

// baseVersion is the plugins of one version. What is dispensed tells both
// sides' version.
func baseVersion(v int) PluginSet {
	return PluginSet{"version": testPlugin{
		serves(baseName(strconv.Itoa(v))),
		func(_ *MuxBroker, c *rpc.Client) (any, error) {
			var theirs string
			err := c.Call("Plugin.Name", 0, &theirs)
			return fmt.Sprintf("host %d plugin %s", v, theirs), err
		},
	}}
}

func baseVersions(list string) map[int]PluginSet {
	sets := make(map[int]PluginSet)
	for _, text := range strings.Split(list, ",") {
		if v, err := strconv.Atoi(text); err == nil {
			sets[v] = baseVersion(v)
		}
	}
	return sets
}

// TestVersions lets hosts and plugins with different versions meet.
func TestVersions(t *testing.T) {
	for _, test := range []struct {
		host, hostLegacy, plugin, pluginLegacy string
		want                                   int // -1 if they do not meet
		offered                                int // what the plugin says then
	}{
		{host: "1,2,3", plugin: "2,3,4", want: 3},
		{host: "2", plugin: "1,2,3", want: 2},
		{host: "1,2,3", plugin: "2", want: 2},
		{host: "1,2", hostLegacy: "5", plugin: "5,6", want: 5},
		{host: "4,5", plugin: "6", pluginLegacy: "4", want: 4},
		{hostLegacy: "7", pluginLegacy: "7", want: 7},
		{hostLegacy: "0", pluginLegacy: "0", want: 0},
		{host: "1,2", hostLegacy: "2", plugin: "2", pluginLegacy: "1", want: 2},
		{host: "1,2", plugin: "3,4", want: -1, offered: 3},
		{hostLegacy: "1", pluginLegacy: "2", want: -1, offered: 2},
		{host: "11,12", hostLegacy: "13", plugin: "14", pluginLegacy: "9", want: -1, offered: 9},
	} {
		name := fmt.Sprintf("%s+%s to %s+%s", test.host, test.hostLegacy, test.plugin, test.pluginLegacy)
		t.Run(name, func(t *testing.T) {
			leavesNothing(t)
			cfg := config("base-versions", baseVersionsEnv+"="+test.plugin, baseLegacyEnv+"="+test.pluginLegacy)
			cfg.Plugins, cfg.VersionedPlugins = nil, baseVersions(test.host)
			if v, err := strconv.Atoi(test.hostLegacy); err == nil {
				cfg.ProtocolVersion, cfg.Plugins = uint(v), baseVersion(v)
			}
			c := NewClient(cfg)
			t.Cleanup(c.Kill)
			p, err := c.Client()
			if test.want < 0 {
				var versions *VersionError
				if !errors.As(err, &versions) {
					t.Fatalf("the error is %v", err)
				}
				errorSays(t, err, fmt.Sprintf("version %d ", test.offered))
				for _, v := range strings.FieldsFunc(test.host+","+test.hostLegacy, func(r rune) bool { return r == ',' }) {
					errorSays(t, err, v)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if got := c.NegotiatedVersion(); got != test.want {
				t.Errorf("%d was negotiated", got)
			}
			want := fmt.Sprintf("host %d plugin %[1]d", test.want)
			if got := dispense[string](t, p, "version"); got != want {
				t.Errorf("served were %s", got)
			}
		})
	}
}

// TestCookie checks what a plugin tells a person who runs it.
func TestCookie(t *testing.T) {
	for _, env := range []string{"OTHER=x", testHandshake.MagicCookieKey + "=", testHandshake.MagicCookieKey + "=wrong"} {
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), modeEnv+"=base", env)
		var stdout, stderr bytes.Buffer
		cmd.Stdout, cmd.Stderr = &stdout, &stderr
		err := cmd.Run()
		if code := cmd.ProcessState.ExitCode(); code != 1 {
			t.Errorf("%s: it exits with %d: %v", env, code, err)
		}
		if text := stderr.String(); !strings.Contains(text, "this program is a plugin") || !strings.Contains(text, "host") {
			t.Errorf("%s: it says %q", env, text)
		}
		if stdout.Len() > 0 {
			t.Errorf("%s: on stdout it says %q", env, &stdout)
		}
	}
	leavesNothing(t)
	cfg := config("base")
	cfg.MagicCookieValue = "wrong"
	c := NewClient(cfg)
	defer c.Kill()
	_, err := c.Start()
	errorSays(t, err, "cookie "+testHandshake.MagicCookieKey, "exit status 1")
}

// TestWireOfHost plays a plugin with yamux and net/rpc alone, so that what the
// host does on the wire is seen and not what our other half makes of it.
func TestWireOfHost(t *testing.T) {
	leavesNothing(t)
	ours, theirs := TestConn(t)
	plugin, err := yamux.Server(theirs, quietYamux())
	if err != nil {
		t.Fatal(err)
	}
	defer plugin.Close()
	host, err := NewRPCClient(ours, basePlugins(&baseServer{}))
	if err != nil {
		t.Fatal(err)
	}
	defer host.session.close()
	var stdout, stderr syncBuffer
	if err := host.SyncStreams(&stdout, &stderr); err != nil {
		t.Fatal(err)
	}
	var streams [3]*yamux.Stream
	for i := range streams {
		if streams[i], err = plugin.AcceptStream(); err != nil {
			t.Fatal(err)
		}
	}
	server := rpc.NewServer()
	const id = 0x01020304
	if err := errors.Join(server.RegisterName("Control", basePing{}), server.RegisterName("Dispenser", baseDispenser(id))); err != nil {
		t.Fatal(err)
	}
	go server.ServeConn(streams[0])
	if err := host.Ping(); err != nil {
		t.Error("the first stream is not control:", err)
	}
	fmt.Fprint(streams[1], "to stdout")
	fmt.Fprint(streams[2], "to stderr")
	await(t, "output", func() bool { return stdout.String() == "to stdout" && stderr.String() == "to stderr" })

	served := make(chan error, 1)
	go func() {
		st, err := plugin.AcceptStream()
		if err != nil {
			served <- err
			return
		}
		var head [4]byte
		if _, err := io.ReadFull(st, head[:]); err != nil || head != [4]byte{4, 3, 2, 1} {
			served <- fmt.Errorf("the stream was dialled with %v, %v", head, err)
			return
		}
		_, _ = st.Write(head[:])
		instance := rpc.NewServer()
		served <- instance.RegisterName("Plugin", greeterServer{})
		instance.ServeConn(st)
	}()
	greets(t, host)
	if err := <-served; err != nil {
		t.Error(err)
	}
}

// TestWireOfPlugin plays the host in the same way.
func TestWireOfPlugin(t *testing.T) {
	leavesNothing(t)
	ours, theirs := TestConn(t)
	quit := make(chan struct{})
	stdout, stderr := io.MultiReader(strings.NewReader("to stdout")), io.MultiReader(strings.NewReader("to stderr"))
	server := &RPCServer{Plugins: testPlugins(), Stdout: stdout, Stderr: stderr, DoneCh: quit}
	served := make(chan struct{})
	go func() { defer close(served); server.ServeConn(ours) }()
	host, err := yamux.Client(theirs, quietYamux())
	if err != nil {
		t.Fatal(err)
	}
	open := func() *yamux.Stream {
		st, err := host.OpenStream()
		if err != nil {
			t.Fatal(err)
		}
		return st
	}
	control := rpc.NewClient(open())
	outputs := make(map[string]*yamux.Stream)
	for _, want := range []string{"to stdout", "to stderr"} {
		st := open()
		outputs[want] = st
		got := make([]byte, len(want))
		if _, err := io.ReadFull(st, got); err != nil || string(got) != want {
			t.Errorf("got %q, %v, and not %q", got, err, want)
		}
	}
	if err := control.Call("Control.Ping", true, &struct{}{}); err != nil {
		t.Error(err)
	}
	var id uint32
	if err := control.Call("Dispenser.Dispense", "greeter", &id); err != nil {
		t.Fatal(err)
	}
	st := open()
	sent := binary.LittleEndian.AppendUint32(nil, id)
	if _, err := st.Write(sent); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, 4)
	if _, err := io.ReadFull(st, got); err != nil || !bytes.Equal(got, sent) {
		t.Errorf("%v was answered with %v, %v", sent, got, err)
	}
	greeter := rpc.NewClient(st)
	if got := (&greeterClient{greeter}).Greet(); got != "Hello!" {
		t.Error(got)
	}
	if err := control.Call("Control.Quit", true, &struct{}{}); err != nil {
		t.Error(err)
	}
	// What was left of the output has been sent before Quit was answered.
	for name, st := range outputs {
		_ = st.SetReadDeadline(time.Now().Add(hangs))
		if n, err := st.Read(make([]byte, 1)); err != io.EOF {
			t.Errorf("after Quit, what goes %s has %d bytes more, %v", name, n, err)
		}
	}
	if !waitFor(hangs, quit) {
		t.Error("DoneCh is not closed after Quit")
	}
	_ = greeter.Close()
	_ = control.Close()
	_ = host.Close()
	if !waitFor(hangs, served) {
		t.Error("ServeConn goes on after the end of its connection")
	}
}

type basePing struct{}

func (basePing) Ping(bool, *struct{}) error { return nil }

type baseDispenser uint32

func (d baseDispenser) Dispense(_ string, id *uint32) error {
	*id = uint32(d)
	return nil
}

// TestRPCServer serves plugins without Serve, over a listener of the test's.
func TestRPCServer(t *testing.T) {
	leavesNothing(t)
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	server := &RPCServer{Plugins: testPlugins(), DoneCh: done}
	if err := server.Init(); err != nil || server.Config() != "" {
		t.Error(err, server.Config())
	}
	go server.Serve(lis)
	for range 2 { // one after the other, and each on its own connection
		conn, err := net.Dial("tcp", lis.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		client, err := NewRPCClient(conn, testPlugins())
		if err != nil {
			t.Fatal(err)
		}
		greets(t, client)
		if err := client.Close(); err != nil {
			t.Error(err)
		}
		if err := client.Close(); err != nil {
			t.Error("the second Close:", err)
		}
	}
	_ = lis.Close()
	if !waitFor(hangs, done) {
		t.Error("DoneCh is not closed")
	}
}

// ---- Logs ----

// baseLine runs lines through what reads a plugin's stderr, and returns the
// records that come of it.
func baseLine(max int, output string) []logRecord {
	logger, records := recordingLogger()
	l := &stderrLog{logger: logger}
	w := &lineWriter{max: max, emit: l.line}
	_, _ = io.WriteString(w, output)
	_ = w.Close()
	return records.get()
}

// baseLogLines is the table of what a plugin may write to its stderr.
var baseLogLines = []struct {
	name, line string
	level      hclog.Level
	msg        string
	args       []any
}{
	{"hclog", `{"@level":"info","@message":"hello","@module":"m","@timestamp":"2024-05-06T07:08:09.123456Z","zebra":1,"apple":"two","mango":true}`,
		hclog.Info, "hello", []any{"@module", "m", "zebra", json.Number("1"), "apple", "two", "mango", true, "timestamp", "2024-05-06T07:08:09.123Z"}},
	{"hclog at the other levels", `{"@level":"trace","@message":"t"}`, hclog.Trace, "t", nil},
	{"hclog debug", `{"@level":"debug","@message":"d"}`, hclog.Debug, "d", nil},
	{"hclog warn", `{"@message":"w","@level":"warn"}`, hclog.Warn, "w", nil},
	{"hclog error", `{"@level":"error","@message":"e","error":"no such file"}`, hclog.Error, "e", []any{"error", "no such file"}},
	{"hclog with a large number", `{"@level":"info","@message":"n","id":12345678901234567890}`, hclog.Info, "n", []any{"id", json.Number("12345678901234567890")}},
	{"hclog with nested values", `{"@level":"info","@message":"n","list":["a",1],"null":null}`, hclog.Info, "n", []any{"list", []any{"a", json.Number("1")}, "null", nil}},
	{"slog", `{"time":"2024-05-06T07:08:09.123456789+02:00","level":"WARN","msg":"careful","z":"1","a":"2"}`,
		hclog.Warn, "careful", []any{"z", "1", "a", "2", "timestamp", "2024-05-06T07:08:09.123+0200"}},
	{"slog debug", `{"level":"DEBUG","msg":"d"}`, hclog.Debug, "d", nil},
	{"slog info", `{"level":"INFO","msg":"i"}`, hclog.Info, "i", nil},
	{"slog error", `{"level":"ERROR","msg":"e"}`, hclog.Error, "e", nil},
	{"slog below debug", `{"level":"DEBUG-4","msg":"t"}`, hclog.Trace, "t", nil},
	{"slog between two", `{"level":"INFO+2","msg":"i"}`, hclog.Info, "i", nil},
	{"slog just below info", `{"level":"INFO-1","msg":"i"}`, hclog.Debug, "i", nil},
	{"slog above error", `{"level":"ERROR+8","msg":"e"}`, hclog.Error, "e", nil},

	{"trace", "[TRACE] t", hclog.Trace, "[TRACE] t", nil},
	{"debug", "[DEBUG] d", hclog.Debug, "[DEBUG] d", nil},
	{"info", "[INFO] i", hclog.Info, "[INFO] i", nil},
	{"warn", "[WARN] w", hclog.Warn, "[WARN] w", nil},
	{"error", "[ERROR] e", hclog.Error, "[ERROR] e", nil},
	{"no space behind it", "[INFO]i", hclog.Info, "[INFO]i", nil},
	{"behind a date and time", "2024/05/06 07:08:09 [WARN] w", hclog.Warn, "2024/05/06 07:08:09 [WARN] w", nil},
	{"behind microseconds", "2024/05/06 07:08:09.123456 [ERROR] e", hclog.Error, "2024/05/06 07:08:09.123456 [ERROR] e", nil},
	{"behind a time", "07:08:09 [INFO] i", hclog.Info, "07:08:09 [INFO] i", nil},
	{"behind a date", "2024/05/06 [INFO] i", hclog.Info, "2024/05/06 [INFO] i", nil},
	{"in the middle", "a line with [ERROR] in it", hclog.Debug, "a line with [ERROR] in it", nil},
	{"in lower case", "[error] e", hclog.Debug, "[error] e", nil},
	{"an unknown level", "[FATAL] f", hclog.Debug, "[FATAL] f", nil},
	{"plain text", "hello", hclog.Debug, "hello", nil},
	{"a tab", "a\tb", hclog.Debug, "a\tb", nil},
	{"a carriage return at the end", "hello\r", hclog.Debug, "hello", nil},
	{"other letters", "größer 日本", hclog.Debug, "größer 日本", nil},
	{"an empty line", "", hclog.Debug, "", nil},

	{"a message that is a number", `{"@message":1}`, hclog.Debug, `{"@message":1}`, nil},
	{"a level that is a number", `{"@level":3,"@message":"x"}`, hclog.Debug, `{"@level":3,"@message":"x"}`, nil},
	{"no level", `{"@message":"x"}`, hclog.Debug, `{"@message":"x"}`, nil},
	{"no message", `{"@level":"info"}`, hclog.Debug, `{"@level":"info"}`, nil},
	{"a level that is off", `{"@level":"off","@message":"x"}`, hclog.Debug, `{"@level":"off","@message":"x"}`, nil},
	{"null", "null", hclog.Debug, "null", nil},
	{"an empty list", "[]", hclog.Debug, "[]", nil},
	{"an empty object", "{}", hclog.Debug, "{}", nil},
	{"a bracket", "{", hclog.Debug, "{", nil},
	{"half a record", `{"@level":"info","@message":"x"`, hclog.Debug, `{"@level":"info","@message":"x"`, nil},
	{"a record and more", `{"@level":"info","@message":"x"} y`, hclog.Debug, `{"@level":"info","@message":"x"} y`, nil},
	{"two records", `{"@level":"info","@message":"x"}{}`, hclog.Debug, `{"@level":"info","@message":"x"}{}`, nil},
	{"JSON of something else", `{"a":1,"b":[2]}`, hclog.Debug, `{"a":1,"b":[2]}`, nil},
	{"deep JSON", strings.Repeat("[", 20000), hclog.Debug, strings.Repeat("[", 20000), nil},
	{"deep JSON in a record", `{"a":` + strings.Repeat("[", 20000), hclog.Debug, `{"a":` + strings.Repeat("[", 20000), nil},
	{"NULs", "a\x00b", hclog.Debug, `a\x00b`, nil},
	{"invalid UTF-8", "a\xff\xfeb", hclog.Debug, `a\xff\xfeb`, nil},
	{"a terminal's escapes", "\x1b[31mred", hclog.Debug, `\x1b[31mred`, nil},
	{"a carriage return inside", "hidden\rshown", hclog.Debug, `hidden\rshown`, nil},
	{"escapes in a record", `{"@level":"info","@message":"\u001b[2J","a\u0007":"b"}`, hclog.Info, `\x1b[2J`, []any{`a\a`, "b"}},
	{"a time that is none", `{"@level":"info","@message":"x","@timestamp":"noon"}`, hclog.Info, "x", []any{"timestamp", "noon"}},
}

// TestLogLine checks each line of the table alone.
func TestLogLine(t *testing.T) {
	for _, test := range baseLogLines {
		got := baseLine(defaultLogBufferSize, test.line+"\n")
		want := []logRecord{{"", test.level, test.msg, test.args}}
		if !reflect.DeepEqual(got, want) {
			t.Errorf("%s: got %.300q and want %.300q", test.name, fmt.Sprint(got), fmt.Sprint(want))
		}
	}
}

// TestLongLogLine checks that a line is one record up to the limit, and that
// a longer one is cut and nothing of it gets another level.
func TestLongLogLine(t *testing.T) {
	record := func(size int) string {
		return `{"@level":"error","@message":"` + strings.Repeat("x", size) + `"}`
	}
	const max = 1000
	fits := record(max - len(record(0)))
	for _, test := range []struct {
		output string
		want   []string // level and message
	}{
		{strings.Repeat("x", max) + "\n", []string{"debug " + strings.Repeat("x", max)}},
		{strings.Repeat("x", max+1) + "\ny\n", []string{"debug " + strings.Repeat("x", max) + " [1 more bytes]", "debug y"}},
		{"[WARN] " + strings.Repeat("x", 5*max) + "\n", []string{"warn [WARN] " + strings.Repeat("x", max-7) + " [4007 more bytes]"}},
		// Whatever stands behind the cut is never at the beginning of a line.
		{strings.Repeat("x", max) + "[ERROR] e" + strings.Repeat("x", max) + "\n", []string{"debug " + strings.Repeat("x", max) + " [1009 more bytes]"}},
		{fits + "\n", []string{"error " + strings.Repeat("x", max-len(record(0)))}},
		// What is left of a line is no record, even if it looks like one, but
		// its level is known.
		{fits + "junk\n", []string{"error " + fits + " [4 more bytes]"}},
		{record(max) + "\n", []string{"error " + record(max)[:max] + fmt.Sprintf(" [%d more bytes]", len(record(max))-max)}},
		{"without an end", []string{"debug without an end"}},
		{"a\n\nb", []string{"debug a", "debug ", "debug b"}},
		{"", nil},
	} {
		var got []string
		for _, r := range baseLine(max, test.output) {
			got = append(got, r.level.String()+" "+r.msg)
		}
		if !slices.Equal(got, test.want) {
			t.Errorf("%.40q: got %q, want %q", test.output, got, test.want)
		}
	}
}

// TestLogTail checks that the end of stderr is kept, in whole lines.
func TestLogTail(t *testing.T) {
	var l tail
	fmt.Fprintln(&l, "short")
	if got := l.String(); got != "short\n" {
		t.Errorf("kept is %q", got)
	}
	for i := range 10000 {
		fmt.Fprintln(&l, "line", i)
	}
	got := l.String()
	if !strings.HasSuffix(got, "line 9998\nline 9999\n") || !strings.HasPrefix(got, "line ") || len(got) > tailSize || len(got) < tailSize-20 {
		t.Errorf("kept are %d bytes, from %.20q", len(got), got)
	}
	fmt.Fprint(&l, strings.Repeat("x", 10*tailSize))
	if got := l.String(); got != strings.Repeat("x", tailSize) {
		t.Errorf("kept are %d bytes, from %.20q", len(got), got)
	}
}

// TestLogOfPanics checks that a panic's and a fatal error's lines are errors,
// and the lines around them not.
func TestLogOfPanics(t *testing.T) {
	const trace = `goroutine 1 [running]:
main.run(0x1, {0xc000012345, 0x2})
	/src/main.go:12 +0x1d
main.main()
	/src/main.go:5 +0x18
created by main.start in goroutine 7
	/src/main.go:20 +0x4c

goroutine 18 [chan receive, 2 minutes]:
main.wait(...)
	/src/main.go:30
exit status 2
`
	for _, crash := range []string{
		"panic: boom\n\n" + trace,
		"panic: boom [recovered]\n\tpanic: boom again\n\n" + trace,
		"panic: two\nlines\n\n" + trace,
		"fatal error: all goroutines are asleep - deadlock!\n\n" + trace,
		"panic: runtime error: invalid memory address or nil pointer dereference\n[signal SIGSEGV: segmentation violation code=0x1 addr=0x0 pc=0x1]\n\n" + trace,
		"fatal error: unexpected signal\n\nruntime.throw({0x1?, 0x2?})\n\t/go/panic.go:1 +0x1\n\n" + trace + "\nrax    0x0\nrip    0x4b2d21\n",
	} {
		records := baseLine(defaultLogBufferSize, "before\n"+crash+"after all\n")
		want := strings.Split("before\n"+crash+"after all", "\n")
		if len(records) != len(want) {
			t.Fatalf("%d lines make %d records", len(want), len(records))
		}
		for i, r := range records {
			level := hclog.Error
			if i == 0 || i == len(want)-1 {
				level = hclog.Debug
			}
			if r.level != level || r.msg != want[i] {
				t.Errorf("%q is logged at %v as %q", want[i], r.level, r.msg)
			}
		}
	}
	// An ordinary panic's text in the middle of a line is nothing.
	for _, r := range baseLine(defaultLogBufferSize, "recovered panic: boom\ngoroutine 1 [running]:\n") {
		if r.level != hclog.Debug {
			t.Errorf("%q is logged at %v", r.msg, r.level)
		}
	}
}

// TestLogOfBadLogger checks that a host's logger that panics costs a line and
// not the host.
func TestLogOfBadLogger(t *testing.T) {
	var got []string
	w := &lineWriter{max: 100, emit: func(line []byte, _ int) {
		if string(line) == "bad" {
			panic("cannot log this")
		}
		got = append(got, string(line))
	}}
	fmt.Fprint(w, "a\nbad\nb\n")
	if !slices.Equal(got, []string{"a", "b"}) {
		t.Errorf("got %q", got)
	}
}

// FuzzLogLine checks that whatever a plugin writes makes as many records as it
// has lines, each at a level that exists, and puts nothing into the host's own
// log that a terminal obeys. (A message in JSON may have several lines.)
func FuzzLogLine(f *testing.F) {
	for _, test := range baseLogLines {
		if len(test.line) < 1000 {
			f.Add([]byte(test.line))
		}
	}
	f.Add([]byte("panic: boom\n\ngoroutine 1 [running]:\nmain.main()\n\t/x.go:1\nafter"))
	f.Add([]byte(`{"@level":"info","@message":"x","a":{"b":"\u001b[31m"},"c":["\u001b[31m\n"]}`))
	f.Fuzz(func(t *testing.T, output []byte) {
		const max = 200
		var text bytes.Buffer
		records := new(logRecords)
		logger := hclog.NewInterceptLogger(&hclog.LoggerOptions{Output: &text, Level: hclog.Trace})
		logger.RegisterSink(records)
		l := &stderrLog{logger: logger}
		w := &lineWriter{max: max, emit: l.line}
		half := len(output) / 2 // however it is cut up on its way
		_, _ = w.Write(output[:half])
		_, _ = w.Write(output[half:])
		_ = w.Close()
		lines := bytes.Count(output, []byte("\n"))
		if len(output) > 0 && !bytes.HasSuffix(output, []byte("\n")) {
			lines++
		}
		if got := records.get(); len(got) != lines {
			t.Fatalf("%d lines make %d records", lines, len(got))
		}
		for _, r := range records.get() {
			if r.level < hclog.Trace || r.level > hclog.Error || len(r.args)%2 != 0 {
				t.Fatalf("a record at %v with %d arguments", r.level, len(r.args))
			}
			if len(r.msg) > 4*max+40 {
				t.Fatalf("a message of %d bytes", len(r.msg))
			}
		}
		for _, c := range text.Bytes() {
			if c < ' ' && c != '\n' && c != '\t' || c == 0x7f {
				t.Fatalf("the log has %q in it:\n%q", c, &text)
			}
		}
	})
}

// TestLogOfPlugin checks all of that once more over a process: what it writes
// to its stderr comes out of the logger, and byte for byte of Stderr.
func TestLogOfPlugin(t *testing.T) {
	leavesNothing(t)
	var raw syncBuffer
	cfg := config("base")
	logger, records := recordingLogger()
	cfg.Logger, cfg.Stderr = logger, &raw
	c, p := start(t, cfg)
	var text strings.Builder
	for _, test := range baseLogLines {
		fmt.Fprintln(&text, test.line)
	}
	text.WriteString("end of the table\n")
	client := dispense[*rpc.Client](t, p, "base")
	if err := client.Call("Plugin.Print", BaseOutput{Raw: []byte(text.String())}, &struct{}{}); err != nil {
		t.Fatal(err)
	}
	c.Kill()
	name := pluginName(os.Args[0])
	// The process's own stdout is logged, too, and in no order with its stderr.
	got := slices.DeleteFunc(records.get(), func(r logRecord) bool { return r.msg == "tail on stdout" })
	first := slices.IndexFunc(got, func(r logRecord) bool { return r.msg == baseLogLines[0].msg })
	if first < 0 || len(got) < first+len(baseLogLines) {
		t.Fatalf("there are %d records, and the table begins at %d", len(got), first)
	}
	for i, test := range baseLogLines {
		r, want := got[first+i], logRecord{name, test.level, test.msg, test.args}
		if !reflect.DeepEqual(r, want) {
			t.Errorf("%s: got %.300q and want %.300q", test.name, fmt.Sprint(r), fmt.Sprint(want))
		}
	}
	if want := text.String() + "[INFO] tail on stderr\n"; raw.String() != want {
		t.Errorf("Stderr got %d bytes and not the %d that were written", len(raw.String()), len(want))
	}
}

// TestLogWithoutEnd writes 2 MiB without the end of a line, which neither
// stops the plugin nor fills the host's memory, and lines beyond the limits.
func TestLogWithoutEnd(t *testing.T) {
	leavesNothing(t)
	for _, limit := range []int{0, 1000} {
		hash := sha256.New()
		cfg := config("base")
		logger, records := recordingLogger()
		cfg.Logger, cfg.Stderr, cfg.PluginLogBufferSize = logger, hash, limit
		c, p := start(t, cfg)
		const size = 2 << 20
		junk := bytes.Repeat([]byte("0123456789abcdef"), size/16)
		client := dispense[*rpc.Client](t, p, "base")
		if err := client.Call("Plugin.Print", BaseOutput{Raw: junk}, &struct{}{}); err != nil {
			t.Fatal(err)
		}
		c.Kill()
		max := cmp.Or(limit, 64<<10)
		// The plugin's last words stand behind it on the same line.
		tail := "[INFO] tail on stderr"
		want := fmt.Sprintf("%s [%d more bytes]", junk[:max], size-max+len(tail))
		long := records.find("0123456789abcdef")
		if len(long) != 1 || long[0].msg != want || long[0].level != hclog.Debug {
			t.Errorf("it made %d records", len(long))
		}
		all := sha256.Sum256(append(junk, (tail + "\n")...))
		if !bytes.Equal(hash.Sum(nil), all[:]) {
			t.Error("Stderr has not got every byte")
		}
	}
}

// baseBadWriter is a host's writer that fails after a while.
type baseBadWriter struct{ left int }

func (w *baseBadWriter) Write(p []byte) (int, error) {
	if w.left -= len(p); w.left < 0 {
		panic("disk full")
	}
	return len(p), nil
}

// TestBadWriters checks that the host's own writers, when they fail, stop
// neither the plugin nor its log.
func TestBadWriters(t *testing.T) {
	leavesNothing(t)
	cfg := config("base")
	logger, records := recordingLogger()
	cfg.Logger = logger
	cfg.Stderr, cfg.SyncStdout, cfg.SyncStderr = &baseBadWriter{100}, &baseBadWriter{100}, &baseBadWriter{100}
	c, p := start(t, cfg)
	client := dispense[*rpc.Client](t, p, "base")
	junk := bytes.Repeat([]byte("junk "+strings.Repeat("x", 500)+"\n"), 2500)
	returns(t, "printing", func() {
		if err := client.Call("Plugin.Print", BaseOutput{junk, junk, append(junk, "[WARN] still here\n"...)}, &struct{}{}); err != nil {
			t.Error(err)
		}
	})
	c.Kill()
	if len(records.find("still here")) != 1 {
		t.Error("the log ended when the writer failed")
	}
	if dropped := records.find("dropped"); len(dropped) != 3 || dropped[0].level != hclog.Warn {
		t.Errorf("that output is lost was logged %d times", len(dropped))
	}
}

// TestLogOfDyingPlugin checks that a panic comes out at Error, with its trace,
// and what was written before it does not.
func TestLogOfDyingPlugin(t *testing.T) {
	leavesNothing(t)
	cfg := config("base-panics")
	logger, records := recordingLogger()
	cfg.Logger = logger
	c := NewClient(cfg)
	defer c.Kill()
	_, err := c.Start()
	errorSays(t, err, "panic: boom", "exit status 2")
	returns(t, "the end", func() { <-c.Done() })
	for text, level := range map[string]hclog.Level{
		"all is well": hclog.Debug, "panic: boom": hclog.Error, "goroutine 1 [running]:": hclog.Error, "plugin_test.go:": hclog.Error,
	} {
		found := records.find(text)
		if len(found) == 0 {
			t.Errorf("%q is not in the log", text)
		}
		for _, r := range found {
			if r.level != level {
				t.Errorf("%q is logged at %v", r.msg, r.level)
			}
		}
	}
}

// Nothing in a record can look like a record of the host's own, or reach a
// terminal; names that only slog gives a meaning are names like others in a
// record of hclog's, and a record that was cut keeps its level.
func TestForgedRecords(t *testing.T) {
	var log bytes.Buffer
	logger := hclog.New(&hclog.LoggerOptions{Output: &log, Level: hclog.Trace})
	l := stderrLog{logger: logger}
	for line, left := range map[string]int{
		`{"@level":"info","@message":"m\n2026-01-01T00:00:00.000Z [ERROR] host: forged"}`:                   0,
		`{"@level":"info","@message":"m","k\n2026-01-01T00:00:00.000Z [ERROR] host: forged":1}`:             0,
		`{"@level":"info","@message":"m","a":[["\u001b[2J"]],"b":{"\u001b":"\n2026 [ERROR] host: forged"}}`: 0,
		`{"@level":"info","@message":"m","level":"error","msg":"other","time":"noon"}`:                      0,
		`{"1st":1,"@level":"info","@message":"m"}`:                                                          0,
		`{"@level":"info","@message":"cut`:                                                                  70,
	} {
		log.Reset()
		l.line([]byte(line), left)
		out := log.String()
		if !strings.Contains(out, "[INFO]") || strings.Contains(out, "\x1b") || strings.Contains(out, "\n2026") || strings.Contains(out, "@") && left == 0 {
			t.Errorf("%s was logged as %q", line, out)
		}
	}
}

// What is only said to be a panic does not make errors of all that follows.
func TestOnlyTheWordPanic(t *testing.T) {
	var levels []hclog.Level
	logger, records := recordingLogger()
	l := stderrLog{logger: logger}
	l.line([]byte("panic: it was only a drill"), 0)
	for range 100 {
		l.line([]byte("as ever"), 0)
	}
	for _, r := range records.get() {
		levels = append(levels, r.level)
	}
	if levels[0] != hclog.Error || levels[len(levels)-1] != hclog.Debug {
		t.Error(levels)
	}
}

// ---- Stdout, stderr and stdin ----

// baseGate is a writer that takes nothing until it is opened.
type baseGate struct {
	open chan struct{}
	syncBuffer
}

func (g *baseGate) Write(p []byte) (int, error) {
	<-g.open
	return g.syncBuffer.Write(p)
}

// TestOutput checks that what the plugin prints arrives, byte for byte and all
// of it, although the plugin is killed at once.
func TestOutput(t *testing.T) {
	leavesNothing(t)
	cfg := config("base")
	var stdout, stderr syncBuffer
	logger, records := recordingLogger()
	cfg.SyncStdout, cfg.SyncStderr, cfg.Logger = &stdout, &stderr, logger
	c, p := start(t, cfg)
	out, errs := noise(2<<20, 1), noise(streamWindow+400<<10+1, 2)
	client := dispense[*rpc.Client](t, p, "base")
	if err := client.Call("Plugin.Print", BaseOutput{Stdout: out, Stderr: errs}, &struct{}{}); err != nil {
		t.Fatal(err)
	}
	c.Kill()
	if stdout.String() != string(out) {
		t.Errorf("of %d bytes to stdout, %d have arrived", len(out), len(stdout.String()))
	}
	if stderr.String() != string(errs) {
		t.Errorf("of %d bytes to stderr, %d have arrived", len(errs), len(stderr.String()))
	}
	// What main prints after Serve goes to the process's own.
	for text, level := range map[string]hclog.Level{"tail on stdout": hclog.Debug, "[INFO] tail on stderr": hclog.Info} {
		if found := records.find(text); len(found) != 1 || found[0].level != level {
			t.Errorf("%q is not logged once at %v: %v", text, level, found)
		}
	}
	if !cfg.Cmd.ProcessState.Success() {
		t.Error(cfg.Cmd.ProcessState)
	}
}

// TestOutputUnderWay checks the same where more than a stream holds is still
// in the plugin when it has been asked to quit, because the host's writers
// have taken nothing so far.
func TestOutputUnderWay(t *testing.T) {
	leavesNothing(t)
	cfg := config("base")
	stdout, stderr := &baseGate{open: make(chan struct{})}, &baseGate{open: make(chan struct{})}
	cfg.SyncStdout, cfg.SyncStderr = stdout, stderr
	c, p := start(t, cfg)
	size := streamWindow + 80<<10
	if runtime.GOOS == "windows" { // whose pipes hold 4 KiB, and not 64
		size = streamWindow + 20<<10
	}
	out, errs := noise(size, 1), noise(size, 2)
	client := dispense[*rpc.Client](t, p, "base")
	if err := client.Call("Plugin.Print", BaseOutput{Stdout: out, Stderr: errs}, &struct{}{}); err != nil {
		t.Fatal(err)
	}
	asked := client.Go("Plugin.WaitQuit", struct{}{}, &struct{}{}, nil)
	killed := make(chan struct{})
	go func() { defer close(killed); c.Kill() }()
	<-asked.Done
	close(stdout.open)
	close(stderr.open)
	if !waitFor(hangs, killed) {
		t.Fatal("Kill hangs")
	}
	if stdout.String() != string(out) || stderr.String() != string(errs) {
		t.Errorf("of %d bytes each, %d and %d have arrived", size, len(stdout.String()), len(stderr.String()))
	}
}

// TestOutputToLog checks that the lines go to the logger where there is no
// writer, and only there.
func TestOutputToLog(t *testing.T) {
	leavesNothing(t)
	for _, test := range []struct{ stdout, stderr bool }{{false, false}, {true, false}, {false, true}} {
		cfg := config("base")
		logger, records := recordingLogger()
		cfg.Logger = logger
		if test.stdout {
			cfg.SyncStdout = io.Discard
		}
		if test.stderr {
			cfg.SyncStderr = io.Discard
		}
		c, p := start(t, cfg)
		const lines = 1000
		length := strings.Repeat("of some length ", 75) // more than a stream holds, in all
		var out, errs bytes.Buffer
		for i := range lines {
			fmt.Fprintf(&out, "out %d is a line %s\n", i, length)
			fmt.Fprintf(&errs, "err %d is a line %s\n", i, length)
		}
		out.WriteString("[ERROR] out without an end")
		client := dispense[*rpc.Client](t, p, "base")
		if err := client.Call("Plugin.Print", BaseOutput{Stdout: out.Bytes(), Stderr: errs.Bytes()}, &struct{}{}); err != nil {
			t.Fatal(err)
		}
		c.Kill()
		want := map[string]int{"out ": lines + 1, "err ": lines}
		if test.stdout {
			want["out "] = 0
		}
		if test.stderr {
			want["err "] = 0
		}
		for text, n := range want {
			found := records.find(text)
			if len(found) != n {
				t.Errorf("%+v: %d records of %q and not %d", test, len(found), text, n)
			}
			for i, r := range found {
				if r.level != hclog.Debug || i < lines && !strings.HasPrefix(r.msg, fmt.Sprintf("%s%d is", text, i)) {
					t.Fatalf("%+v: record %d is %v %q", test, i, r.level, r.msg)
				}
			}
		}
	}
}

// TestStdin checks that the plugin has the host's stdin, or the command's.
func TestStdin(t *testing.T) {
	leavesNothing(t)
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	defer w.Close()
	own := os.Stdin
	defer func() { os.Stdin = own }()
	os.Stdin = r
	if _, err := w.WriteString("from the host"); err != nil {
		t.Fatal(err)
	}
	for want, stdin := range map[string]io.Reader{"from the host": nil, "from the command": strings.NewReader("from the command")} {
		cfg := config("base")
		cfg.Cmd.Stdin = stdin
		c, p := start(t, cfg)
		var got string
		if err := dispense[*rpc.Client](t, p, "base").Call("Plugin.ReadStdin", len(want), &got); err != nil || got != want {
			t.Errorf("it read %q, %v, and not %q", got, err, want)
		}
		c.Kill()
	}
}

// ---- Reattach ----

// baseTicket is a ReattachConfig on its way to another process.
type baseTicket struct {
	Version, Pid  int
	Network, Addr string
}

func (b baseTicket) config() *ReattachConfig {
	addr, err := parseAddr(b.Network, b.Addr)
	if err != nil {
		panic(err)
	}
	return &ReattachConfig{Protocol: ProtocolNetRPC, ProtocolVersion: b.Version, Addr: addr, Pid: b.Pid}
}

func newBaseTicket(rc *ReattachConfig) string {
	text, err := json.Marshal(baseTicket{rc.ProtocolVersion, rc.Pid, rc.Addr.Network(), rc.Addr.String()})
	if err != nil {
		panic(err)
	}
	return string(text)
}

func readBaseTicket(text string) *ReattachConfig {
	var b baseTicket
	if err := json.Unmarshal([]byte(text), &b); err != nil {
		panic(err)
	}
	return b.config()
}

// baseFirstHost starts a plugin, says how to reattach to it, and ends.
func baseFirstHost() {
	cfg := config("base-versions", baseVersionsEnv+"=1,2,9")
	cfg.Plugins, cfg.VersionedPlugins = nil, baseVersions("1,2")
	cfg.Detach = runtime.GOOS == "windows" // where ReattachConfig does not do it
	c := NewClient(cfg)
	if _, err := c.Client(); err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	fmt.Println(newBaseTicket(c.ReattachConfig()))
}

// baseSecondHost reattaches to a plugin, calls it and kills it.
func baseSecondHost() {
	c := NewClient(attachTo(readBaseTicket(os.Getenv(baseReattachEnv))))
	defer c.Kill()
	p, err := c.Client()
	if err != nil {
		fmt.Println(err)
		return
	}
	g, err := Dispense[Greeter](p, "greeter")
	if err != nil {
		fmt.Println(err)
		return
	}
	fmt.Println(g.Greet())
}

// TestReattach lets a second host, in another process, use the plugin that
// this one has started, and kill it.
func TestReattach(t *testing.T) {
	leavesNothing(t)
	cfg := config("base")
	logger, records := recordingLogger()
	cfg.Logger = logger
	c, _ := start(t, cfg)
	second := exec.Command(os.Args[0])
	second.Env = append(os.Environ(), modeEnv+"=base-second-host", baseReattachEnv+"="+newBaseTicket(c.ReattachConfig()))
	out, err := second.CombinedOutput()
	if err != nil || string(out) != "Hello!\n" {
		t.Errorf("the second host: %q, %v", out, err)
	}
	if !waitFor(hangs, c.done) {
		t.Fatal("the plugin lives on though the second host has killed it")
	}
	if len(records.find("tail on stderr")) != 1 {
		t.Error("the plugin's main has not finished")
	}
}

// TestReattachLater uses a plugin whose first host has ended, with the version
// that the two had negotiated.
func TestReattachLater(t *testing.T) {
	leavesNothing(t)
	first := exec.Command(os.Args[0])
	first.Env = append(os.Environ(), modeEnv+"=base-first-host")
	out, err := first.Output()
	if err != nil {
		t.Fatalf("%q, %v", out, err)
	}
	rc := readBaseTicket(string(out))
	cfg := attachTo(rc)
	cfg.Plugins, cfg.VersionedPlugins = nil, baseVersions("1,2,3")
	c, p := start(t, cfg)
	if got := dispense[string](t, p, "version"); got != "host 2 plugin 2" || c.NegotiatedVersion() != 2 {
		t.Errorf("%s was dispensed, of version %d", got, c.NegotiatedVersion())
	}
	if c.ID() != strconv.Itoa(rc.Pid) || c.Exited() || !reflect.DeepEqual(c.ReattachConfig(), rc) {
		t.Error(c.ID(), c.Exited(), c.ReattachConfig())
	}
	c.Kill()
	if !c.Exited() {
		t.Error("it has not exited after Kill")
	}
	again := NewClient(cfg)
	defer again.Kill()
	if _, err := again.Start(); err != ErrProcessNotFound {
		t.Errorf("reattaching to what is gone: %v", err)
	}

	// A host that does not have the version that was negotiated.
	other := *cfg
	other.VersionedPlugins = baseVersions("7,8")
	c = NewClient(&other)
	defer c.Kill()
	_, err = c.Start()
	errorSays(t, err, "version 2 ", "7", "8")
}

// baseInnocent starts a process that is no plugin, and returns its pid and a
// function that checks that it still lives.
func baseInnocent(t *testing.T) (pid int, check func()) {
	t.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), modeEnv+"=base-innocent")
	stdin, err1 := cmd.StdinPipe()
	stdout, err2 := cmd.StdoutPipe()
	if err := errors.Join(err1, err2, cmd.Start()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = stdin.Close()
		if err := cmd.Wait(); err != nil {
			t.Error("the innocent process has been harmed:", err)
		}
	})
	return cmd.Process.Pid, func() {
		t.Helper()
		var buf [1]byte
		_, err := stdin.Write([]byte("x"))
		if err == nil {
			_, err = io.ReadFull(stdout, buf[:])
		}
		if err != nil {
			t.Error("the innocent process has been harmed:", err)
		}
	}
}

// TestReattachToNobody checks what is said of a plugin that is not there, and
// that a process that has its pid now is left alone.
func TestReattachToNobody(t *testing.T) {
	leavesNothing(t)
	innocent, check := baseInnocent(t)
	dead := exec.Command(os.Args[0])
	dead.Env = append(os.Environ(), modeEnv+"=base-exits")
	_ = dead.Run()
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer lis.Close()
	nowhere := &net.UnixAddr{Name: filepath.Join(shortDir(t), fmt.Sprintf("plugin-%d-1", innocent)), Net: "unix"}
	for name, rc := range map[string]*ReattachConfig{
		"a dead process": {Pid: dead.Process.Pid, Addr: nowhere},
		"a dead process and somebody else's socket": {Pid: dead.Process.Pid, Addr: lis.Addr()},
		"no pid":                               {Addr: lis.Addr()},
		"a group of processes":                 {Pid: -innocent, Addr: lis.Addr()},
		"another process now":                  {Pid: innocent, Addr: nowhere},
		"another process now, in Test mode":    {Pid: innocent, Addr: nowhere, Test: true},
		"another process and a socket with it": {Pid: innocent, Addr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 1}},
	} {
		rc.ProtocolVersion = int(testHandshake.ProtocolVersion)
		c := NewClient(attachTo(rc))
		if _, err := c.Start(); err != ErrProcessNotFound {
			t.Errorf("%s: Start returned %v", name, err)
		}
		if p, err := c.Client(); err != ErrProcessNotFound || p != nil {
			t.Errorf("%s: Client returned %v, %v", name, p, err)
		}
		c.Kill()
		check()
	}
}

// TestReattachWithWrongPid gives an innocent process's pid with the address of
// something that listens: a plugin, which is asked to quit, and something that
// never answers. That process is never signalled.
func TestReattachWithWrongPid(t *testing.T) {
	t.Parallel()
	innocent, check := baseInnocent(t)
	network, address := "unix", filepath.Join(shortDir(t), "plugin-1-1")
	if runtime.GOOS == "windows" {
		network, address = "tcp", "127.0.0.1:0"
	}
	silent, err := net.Listen(network, address)
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	real, _ := start(t, config("base"))
	for name, addr := range map[string]net.Addr{"a plugin": real.ReattachConfig().Addr, "silence": silent.Addr()} {
		cfg := attachTo(&ReattachConfig{ProtocolVersion: int(testHandshake.ProtocolVersion), Addr: addr, Pid: innocent})
		cfg.KillTimeout = 3 * time.Second // in which a plugin must have been asked
		c := NewClient(cfg)
		if _, err := c.Client(); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		returns(t, "Kill", c.Kill)
		if !isClosed(c.Done()) {
			t.Errorf("%s: Kill returned before Done was closed", name)
		}
		check()
	}
	if !waitFor(hangs, real.done) {
		t.Error("the plugin was not asked to quit")
	}
}

// A connection to reattach to is not missing because there was no time to look.
func TestReattachInNoTime(t *testing.T) {
	c, _ := start(t, config("greeter"))
	again := attachTo(c.ReattachConfig())
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	other := NewClient(again)
	defer other.Kill()
	if _, err := other.StartContext(ctx); !errors.Is(err, context.Canceled) || err == ErrProcessNotFound {
		t.Error(err)
	}
}

// ---- Security ----

// baseSum returns the checksum of the test binary.
func baseSum(t testing.TB) []byte {
	t.Helper()
	f, err := os.Open(os.Args[0])
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		t.Fatal(err)
	}
	return h.Sum(nil)
}

// baseHash is a hash that cannot be cloned.
type baseHash struct{ hash.Hash }

// TestSecureConfig checks that only the right binary is started, and that one
// SecureConfig will do for many checks, also at once.
func TestSecureConfig(t *testing.T) {
	leavesNothing(t)
	sum := baseSum(t)
	used := sha256.New()
	used.Write([]byte("used before"))
	usedSum := used.Sum(nil)
	for name, secure := range map[string]*SecureConfig{
		"a new hash":                   {sum, sha256.New()},
		"a hash that was used":         {sum, used},
		"a hash that cannot be cloned": {sum, baseHash{sha256.New()}},
	} {
		for range 3 {
			if ok, err := secure.Check(os.Args[0]); !ok || err != nil {
				t.Errorf("%s: %v, %v", name, ok, err)
			}
		}
		cfg := config("base")
		cfg.SecureConfig = secure
		for range 2 {
			c, p := start(t, cfg)
			greets(t, p, name)
			c.Kill()
		}
	}
	if !bytes.Equal(used.Sum(nil), usedSum) {
		t.Error("the hash was changed")
	}
	shared := &SecureConfig{sum, sha256.New()}
	var checking sync.WaitGroup
	for range 8 {
		checking.Go(func() {
			if ok, err := shared.Check(os.Args[0]); !ok || err != nil {
				t.Errorf("at once: %v, %v", ok, err)
			}
		})
	}
	checking.Wait()

	wrong := bytes.Clone(sum)
	wrong[0]++
	for _, test := range []struct {
		secure *SecureConfig
		err    error
	}{
		{&SecureConfig{wrong, sha256.New()}, ErrChecksumsDoNotMatch},
		{&SecureConfig{sum[:16], sha256.New()}, ErrChecksumsDoNotMatch},
		{&SecureConfig{nil, sha256.New()}, ErrSecureConfigNoChecksum},
		{&SecureConfig{sum, nil}, ErrSecureConfigNoHash},
	} {
		ok, err := test.secure.Check(os.Args[0])
		if ok || test.err != ErrChecksumsDoNotMatch && err != test.err {
			t.Errorf("Check returned %v, %v, and not %v", ok, err, test.err)
		}
		cfg := config("base")
		cfg.SecureConfig = test.secure
		c := NewClient(cfg)
		if _, err := c.Start(); err != test.err {
			t.Errorf("Start returned %v and not %v", err, test.err)
		}
		c.Kill()
		if cfg.Cmd.Process != nil {
			t.Error("it was started all the same")
		}
	}
	if ok, err := shared.Check(filepath.Join(t.TempDir(), "missing")); ok || !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("of a file that is not there: %v, %v", ok, err)
	}
}

// baseTLSConfig returns a host's configuration for the mode "base-tls" and
// what that needs in its environment.
func baseTLSConfig(t *testing.T) (*tls.Config, string) {
	t.Helper()
	cert, err := newCertificate()
	if err != nil {
		t.Fatal(err)
	}
	key, err := x509.MarshalPKCS8PrivateKey(cert.PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM([]byte(certPEM(cert.Certificate[0])))
	text := certPEM(cert.Certificate[0]) + string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: key}))
	return &tls.Config{RootCAs: pool, ServerName: "localhost", MinVersion: tls.VersionTLS12}, baseTLSEnv + "=" + text
}

// TestTLS checks that both sides' own TLS configurations are used.
func TestTLS(t *testing.T) {
	t.Parallel()
	secure, env := baseTLSConfig(t)
	cfg := config("base-tls", env)
	cfg.TLSConfig = secure
	c, p := start(t, cfg)
	greets(t, p)
	c.Kill()

	untrusting, _ := baseTLSConfig(t)
	for name, tlsConfig := range map[string]*tls.Config{"no TLS": nil, "another certificate": untrusting} {
		cfg.TLSConfig = tlsConfig
		c := NewClient(cfg)
		p, err := c.Client()
		if err == nil {
			err = p.Ping()
		}
		if err == nil {
			t.Errorf("a host with %s is served", name)
		}
		returns(t, "Kill", c.Kill)
	}

	cfg = config("base-tls", baseTLSEnv+"=no certificate")
	cfg.TLSConfig = secure
	c = NewClient(cfg)
	_, err := c.Start()
	errorSays(t, err, "TLSProvider", "exit status 1")
	c.Kill()

	// A plugin without TLS under a host with it.
	cfg = config("base")
	cfg.TLSConfig = secure
	c = NewClient(cfg)
	if _, err := c.Client(); err == nil {
		t.Error("a plugin without TLS is connected to")
	}
	returns(t, "Kill", c.Kill)
}

// TestAutoMTLS checks that only the two processes can talk, with certificates
// made for this start.
func TestAutoMTLS(t *testing.T) {
	leavesNothing(t)
	var before []byte
	for range 2 {
		cfg := config("base")
		cfg.AutoMTLS = true
		c, p := start(t, cfg)
		own := c.starting.result()
		if own.cert == nil || bytes.Equal(own.cert, before) {
			t.Error("the certificate is not a new one")
		}
		before = own.cert
		stranger, err := newCertificate()
		if err != nil {
			t.Fatal(err)
		}
		foreign, err := mutualTLS(stranger, own.cert)
		if err != nil {
			t.Fatal(err)
		}
		for name, secure := range map[string]*tls.Config{
			"no TLS": nil,
			// The address and the plugin's certificate are no secret.
			"no certificate":      {RootCAs: own.tls.RootCAs, ServerName: "localhost"},
			"another certificate": foreign,
		} {
			conn, err := net.Dial(own.addr.Network(), own.addr.String())
			if err != nil {
				t.Fatal(err)
			}
			if secure != nil {
				conn = tls.Client(conn, secure)
			}
			client, err := NewRPCClient(conn, testPlugins())
			if err == nil {
				if err = client.Ping(); err == nil {
					t.Errorf("a stranger with %s is answered", name)
				}
				if _, err = client.Dispense("greeter"); err == nil {
					t.Errorf("a stranger with %s is served", name)
				}
				client.session.close()
			}
		}
		greets(t, p, "after the strangers")
		c.Kill()
	}

	// A plugin that has its own TLS does not answer with a certificate.
	secure, env := baseTLSConfig(t)
	cfg := config("base-tls", env)
	cfg.AutoMTLS, cfg.TLSConfig = true, secure
	c := NewClient(cfg)
	defer c.Kill()
	_, err := c.Start()
	errorSays(t, err, "AutoMTLS", "TLSProvider")
}

// ---- Kill ----

// TestKillWhileConnecting checks that the error says who did not get a
// connection, and why.
func TestKillWhileConnecting(t *testing.T) {
	t.Parallel()
	silent, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	for _, test := range []struct {
		name  string
		kill  bool
		texts []string
	}{
		{"Kill", true, []string{"Kill was called"}},
		{"StartTimeout", false, []string{"deadline exceeded"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			cfg := attachTo(&ReattachConfig{ProtocolVersion: int(testHandshake.ProtocolVersion), Addr: silent.Addr(), Test: true})
			cfg.TLSConfig = &tls.Config{InsecureSkipVerify: true} // nobody answers
			cfg.StartTimeout = hangs
			if !test.kill {
				cfg.StartTimeout = 50 * time.Millisecond
			}
			c := NewClient(cfg)
			defer c.Kill()
			if _, err := c.Start(); err != nil {
				t.Fatal(err)
			}
			connecting := async(func() error { _, err := c.Client(); return err })
			if test.kill {
				await(t, "it was connecting", func() bool {
					c.connecting.mu.Lock()
					defer c.connecting.mu.Unlock()
					return c.connecting.done != nil
				})
				c.Kill()
			}
			errorSays(t, receive(t, "Client", connecting), append(test.texts, "plugin at "+silent.Addr().String())...)
		})
	}
}

// TestStartPanics checks that a panic of the host's own code in Start is the
// host's, and that Kill returns.
func TestStartPanics(t *testing.T) {
	cfg := config("base")
	cfg.SecureConfig = &SecureConfig{Checksum: []byte("x"), Hash: basePanickingHash{sha256.New()}}
	c := NewClient(cfg)
	func() {
		defer func() {
			if p := recover(); p != "hashing" {
				t.Error("Start panicked with", p)
			}
		}()
		_, _ = c.Start()
	}()
	_, err := c.Start()
	errorSays(t, err, "panicked")
	returns(t, "Kill", c.Kill)
}

type basePanickingHash struct{ hash.Hash }

func (basePanickingHash) Write([]byte) (int, error) { panic("hashing") }

// TestKill checks that the plugin may finish, and that Kill may be called
// whenever, and as often as, one likes.
func TestKill(t *testing.T) {
	t.Run("while it runs", func(t *testing.T) {
		leavesNothing(t)
		cfg := config("base")
		logger, records := recordingLogger()
		cfg.Logger = logger
		c, p := start(t, cfg)
		var killing sync.WaitGroup
		for range 5 {
			killing.Go(func() {
				c.Kill()
				if !c.Exited() {
					t.Error("Kill returned before the process was gone")
				}
			})
		}
		returns(t, "Kill", killing.Wait)
		returns(t, "Kill once more", c.Kill)
		if len(records.find("tail on stderr")) != 1 || !cfg.Cmd.ProcessState.Success() {
			t.Error("the plugin's main has not finished:", cfg.Cmd.ProcessState)
		}
		if c.Err() != nil {
			t.Error(c.Err())
		}
		if _, err := Dispense[Greeter](p, "greeter"); err == nil {
			t.Error("a plugin can be dispensed after Kill")
		}
	})
	t.Run("before Client", func(t *testing.T) {
		leavesNothing(t)
		cfg := config("base")
		c := NewClient(cfg)
		if _, err := c.Start(); err != nil {
			t.Fatal(err)
		}
		returns(t, "Kill", c.Kill)
		if !cfg.Cmd.ProcessState.Success() {
			t.Error("the plugin's main has not finished:", cfg.Cmd.ProcessState)
		}
	})
	t.Run("before Start", func(t *testing.T) {
		leavesNothing(t)
		cfg := config("base")
		c := NewClient(cfg)
		returns(t, "Kill", c.Kill)
		if _, err := c.Start(); err == nil || !strings.Contains(err.Error(), "Kill") {
			t.Errorf("Start after Kill returned %v", err)
		}
		if cfg.Cmd.Process != nil {
			t.Error("it was started all the same")
		}
	})
	t.Run("during Start", func(t *testing.T) {
		leavesNothing(t)
		cfg := config("base-say", baseSayEnv+"=loading")
		logger, records := recordingLogger()
		cfg.Logger = logger
		c := NewClient(cfg)
		started := make(chan error, 1)
		go func() {
			_, err := c.Start()
			started <- err
		}()
		await(t, "the plugin's first words", func() bool { return len(records.find("before its handshake")) > 0 })
		returns(t, "Kill", c.Kill)
		returns(t, "Start", func() {
			if err := <-started; err == nil || !strings.Contains(err.Error(), "Kill") {
				t.Errorf("Start returned %v", err)
			}
		})
		if !c.Exited() || cfg.Cmd.ProcessState == nil {
			t.Error("the process is not gone")
		}
	})
	t.Run("when it is long dead", func(t *testing.T) {
		leavesNothing(t)
		cfg := config("base")
		c, _ := start(t, cfg)
		if err := cfg.Cmd.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		if !waitFor(hangs, c.done) {
			t.Fatal("its end goes unnoticed")
		}
		returns(t, "Kill", c.Kill)
		returns(t, "Kill", c.Kill)
	})
}

// TestKillStubborn checks when a plugin is killed that does not end.
func TestKillStubborn(t *testing.T) {
	t.Parallel()
	cfg := config("base-stubborn")
	c, _ := start(t, cfg)
	begin := time.Now()
	returns(t, "Kill", c.Kill)
	// It has two seconds.
	if took := time.Since(begin); took < 2*time.Second-100*time.Millisecond || took > 8*time.Second {
		t.Errorf("it was killed after %v", took)
	}
	if !c.Exited() || cfg.Cmd.ProcessState == nil || cfg.Cmd.ProcessState.Success() {
		t.Error("the process ended with", cfg.Cmd.ProcessState)
	}
}

// baseManaged reports whether the package holds a client.
func baseManaged(c *Client) bool {
	managed.mu.Lock()
	defer managed.mu.Unlock()
	_, held := managed.clients[c]
	return held
}

// TestCleanupClients checks that the managed clients are killed, and let go.
func TestCleanupClients(t *testing.T) {
	leavesNothing(t)
	other, p := start(t, config("base"))
	cfg := config("base")
	cfg.Managed = true
	killed := NewClient(cfg)
	if !baseManaged(killed) || baseManaged(other) {
		t.Error("managed are:", baseManaged(killed), baseManaged(other))
	}
	killed.Kill()
	if baseManaged(killed) {
		t.Error("a client that was killed before Start is held")
	}
	var clients []*Client
	for range 4 {
		c, _ := start(t, cfg)
		clients = append(clients, c)
	}
	clients = append(clients, NewClient(cfg)) // never started
	clients[0].Kill()
	if baseManaged(clients[0]) {
		t.Error("a client that was killed is held")
	}
	returns(t, "CleanupClients", CleanupClients)
	for i, c := range clients {
		if !c.Exited() || baseManaged(c) {
			t.Errorf("client %d: exited is %v and managed %v", i, c.Exited(), baseManaged(c))
		}
	}
	if err := p.Ping(); err != nil {
		t.Error("a client that is not managed has been killed:", err)
	}
	CleanupClients() // there is none left
}

// After Kill, Client returns what it has returned before.
func TestClientAfterKill(t *testing.T) {
	c, p := start(t, config("greeter"))
	c.Kill()
	for range 100 {
		if again, err := c.Client(); again != p || err != nil {
			t.Fatal("another result:", again, err)
		}
	}
}

// ---- Config is input ----

// TestConfigIsKept checks that nothing of the caller's is changed, not even
// behind the end of a slice, and that a config can be used again.
func TestConfigIsKept(t *testing.T) {
	leavesNothing(t)
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	defer w.Close()
	cfg := config("base")
	roomy := func(s []string) []string { return append(make([]string, 0, len(s)+5), s...) }
	cfg.Cmd.Env, cfg.Cmd.Args = roomy(cfg.Cmd.Env), roomy(cfg.Cmd.Args)
	cfg.Cmd.ExtraFiles = make([]*os.File, 0, 8)
	if runtime.GOOS != "windows" { // where there can be none
		cfg.Cmd.ExtraFiles = append(cfg.Cmd.ExtraFiles, r)
	}
	set := PluginSet{} // of pointers, which can be compared
	for name, p := range cfg.Plugins {
		p := p.(testPlugin)
		set[name] = &p
	}
	cfg.Plugins = set
	cfg.VersionedPlugins = map[int]PluginSet{1: maps.Clone(set)}
	cfg.AllowedProtocols = append(make([]Protocol, 0, 4), ProtocolGRPC, ProtocolNetRPC)
	cfg.UnixSocketConfig = &UnixSocketConfig{}
	cfg.SecureConfig = &SecureConfig{baseSum(t), sha256.New()}
	cfg.AutoMTLS, cfg.Managed = true, true

	before, cmd := *cfg, *cfg.Cmd
	before.Plugins = maps.Clone(cfg.Plugins)
	before.VersionedPlugins = map[int]PluginSet{1: maps.Clone(cfg.VersionedPlugins[1])}
	sockets := *cfg.UnixSocketConfig
	before.UnixSocketConfig = &sockets
	before.AllowedProtocols = slices.Clone(cfg.AllowedProtocols[:4])
	before.SecureConfig = &SecureConfig{bytes.Clone(cfg.SecureConfig.Checksum), sha256.New()}
	env, args := slices.Clone(cmd.Env[:cap(cmd.Env)]), slices.Clone(cmd.Args[:cap(cmd.Args)])
	files := slices.Clone(cmd.ExtraFiles[:8])

	check := func() {
		t.Helper()
		now, nowCmd := *cfg, *cfg.Cmd
		now.AllowedProtocols = now.AllowedProtocols[:4]
		nowCmd.Process, nowCmd.ProcessState = nil, nil
		now.Cmd, before.Cmd = nil, nil
		if !reflect.DeepEqual(now, before) {
			t.Errorf("the config is %+v and was %+v", now, before)
		}
		if !reflect.DeepEqual(nowCmd, cmd) {
			t.Errorf("the command is %+v and was %+v", nowCmd, cmd)
		}
		if !slices.Equal(nowCmd.Env[:cap(cmd.Env)], env) || !slices.Equal(nowCmd.Args[:cap(cmd.Args)], args) || !slices.Equal(nowCmd.ExtraFiles[:8], files) {
			t.Error("what is behind the end of a slice was changed")
		}
	}
	first := NewClient(cfg)
	check()
	var clients []*Client
	for range 2 { // both run at the same time
		c, p := start(t, cfg)
		if pid := strconv.Itoa(cfg.Cmd.Process.Pid); pid != c.ID() || cfg.Cmd.ProcessState != nil {
			t.Errorf("Cmd.Process is %s, with %v, and the plugin %s", pid, cfg.Cmd.ProcessState, c.ID())
		}
		greets(t, p)
		check()
		clients = append(clients, c)
	}
	if clients[0].ID() == clients[1].ID() {
		t.Error("the second client uses the first one's process")
	}
	clients[0].Kill()
	if cfg.Cmd.ProcessState != nil {
		t.Error("the end of the first process was taken for the second's")
	}
	clients[1].Kill()
	if s := cfg.Cmd.ProcessState; s == nil || s.Pid() != cfg.Cmd.Process.Pid {
		t.Errorf("the second process has ended, and the command says %v", s)
	}
	first.Kill()
	check()
}

// baseLookup returns all values that the plugin's environment has for a name.
func baseLookup(t *testing.T, p ClientProtocol, name string) (values []string) {
	t.Helper()
	var env []string
	if err := dispense[*rpc.Client](t, p, "base").Call("Plugin.Environ", struct{}{}, &env); err != nil {
		t.Fatal(err)
	}
	for _, v := range env {
		if value, found := strings.CutPrefix(v, name+"="); found {
			values = append(values, value)
		}
	}
	return values
}

// TestEnvironment checks whose variables win.
func TestEnvironment(t *testing.T) {
	leavesNothing(t)
	t.Setenv("TEST_BASE_HOST", "host")
	t.Setenv("TEST_BASE_BOTH", "host")
	t.Setenv("PLUGIN_OF_OURS", "host") // named alike, and not the protocol's
	t.Setenv(testHandshake.MagicCookieKey, "host")
	for _, name := range protocolEnv {
		t.Setenv(name, "host")
	}
	own := []string{"TEST_BASE_CMD=cmd", "TEST_BASE_BOTH=cmd", testHandshake.MagicCookieKey + "=cmd", "GORACE=" + os.Getenv("GORACE")}
	for _, name := range protocolEnv {
		own = append(own, name+"=cmd")
	}
	for _, skip := range []bool{false, true} {
		cfg := config("base", own...)
		cfg.SkipHostEnv = skip
		cfg.MinPort, cfg.MaxPort = 10, 20
		c, p := start(t, cfg)
		host := []string{"host"}
		if skip {
			host = nil
		}
		for name, want := range map[string][]string{
			"TEST_BASE_HOST": host, "PLUGIN_OF_OURS": host,
			"TEST_BASE_CMD": {"cmd"}, "TEST_BASE_BOTH": {"cmd"},
			testHandshake.MagicCookieKey: {testHandshake.MagicCookieValue},
			envVersions:                  {"3"}, envMinPort: {"10"}, envMaxPort: {"20"},
			envClientCert: nil, envMultiplex: nil, EnvUnixSocketGroup: nil,
		} {
			if got := baseLookup(t, p, name); !slices.Equal(got, want) {
				t.Errorf("SkipHostEnv %v: %s is %q and not %q", skip, name, got, want)
			}
		}
		for _, name := range []string{envHost, EnvUnixSocketDir} {
			if runtime.GOOS == "windows" && name == EnvUnixSocketDir {
				continue // there are none
			}
			if got := baseLookup(t, p, name); len(got) != 1 || got[0] == "host" || got[0] == "cmd" {
				t.Errorf("SkipHostEnv %v: %s is %q", skip, name, got)
			}
		}
		c.Kill()
	}
}

// TestPorts checks that without MinPort a port below MaxPort is taken.
func TestPorts(t *testing.T) {
	l, err := listenTCP("0", "9000")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if port := l.Addr().(*net.TCPAddr).Port; port > 9000 {
		t.Error("port", port)
	}
}

// ---- Quiet ----

// baseQuietHost goes through a plugin's whole life, and says what its logger
// got above Debug.
func baseQuietHost() {
	cfg := config("greeter")
	cfg.Logger = hclog.New(&hclog.LoggerOptions{Output: os.Stdout, Level: hclog.Info})
	cfg.AutoMTLS = os.Getenv(baseMTLSEnv) != ""
	for range 3 {
		c := NewClient(cfg)
		p, err := c.Client()
		if err != nil {
			fmt.Println(err)
			return
		}
		g, err := Dispense[Greeter](p, "greeter")
		if err != nil || g.Greet() != "Hello!" || p.Ping() != nil {
			fmt.Println("it does not work", err)
		}
		c.Kill()
	}
}

// TestQuiet checks that a clean life logs nothing above Debug on either side,
// and that nothing is printed. (The plugin's own log is in the host's.)
func TestQuiet(t *testing.T) {
	leavesNothing(t)
	for _, mtls := range []string{"", "yes"} {
		host := exec.Command(os.Args[0])
		host.Env = append(os.Environ(), modeEnv+"=base-quiet-host", baseMTLSEnv+"="+mtls)
		out, err := host.CombinedOutput()
		if err != nil || len(out) > 0 {
			t.Errorf("AutoMTLS %q: the host says, %v:\n%s", mtls, err, out)
		}
	}
	// Whoever uses the log package's own logger in this process would be heard.
	var printed syncBuffer
	log.SetOutput(&printed)
	defer log.SetOutput(os.Stderr)
	logger, records := recordingLogger()
	cfg := config("greeter")
	cfg.Logger = logger
	c, p := start(t, cfg)
	greets(t, p)
	c.Kill()
	for _, r := range records.get() {
		if r.level > hclog.Debug {
			t.Errorf("logged at %v: %s %v", r.level, r.msg, r.args)
		}
		if strings.Contains(r.msg, "yamux") {
			t.Errorf("yamux complains about an ordinary end: %s", r.msg)
		}
	}
	if printed.String() != "" {
		t.Errorf("printed was %q", printed.String())
	}
}

// ---- Test mode ----

// baseServeTest runs Serve in test mode. The function it returns ends it and
// waits.
func baseServeTest(t *testing.T, config *ServeConfig) (*ReattachConfig, func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	ready, closed, returned := make(chan *ReattachConfig, 1), make(chan struct{}), make(chan struct{})
	config.Test.Context, config.Test.ReattachConfigCh, config.Test.CloseCh = ctx, ready, closed
	go func() { defer close(returned); Serve(config) }()
	stop := func() {
		t.Helper()
		cancel()
		if !waitFor(hangs, closed, returned) {
			t.Fatal("Serve does not end when its context does")
		}
	}
	t.Cleanup(stop)
	select {
	case rc := <-ready:
		return rc, stop
	case <-time.After(hangs):
		t.Fatal("Serve does not begin")
		return nil, nil
	}
}

// TestTestMode checks that serving within a test works, and touches nothing
// that belongs to the process.
func TestTestMode(t *testing.T) {
	leavesNothing(t)
	for _, name := range protocolEnv {
		t.Setenv(name, "ours")
	}
	t.Setenv(testHandshake.MagicCookieKey, "ours")
	_ = os.Unsetenv(EnvUnixSocketDir) // t.Setenv gives it back
	environ, stdout, stderr := os.Environ(), os.Stdout, os.Stderr
	rc, stop := baseServeTest(t, &ServeConfig{
		HandshakeConfig: testHandshake, Plugins: testPlugins(), Logger: hclog.NewNullLogger(), Test: &ServeTestConfig{},
	})
	if !rc.Test || rc.Pid != os.Getpid() || rc.Addr == nil || rc.ProtocolVersion != 3 {
		t.Errorf("the ReattachConfig is %+v", rc)
	}
	cfg := attachTo(rc)
	for range 2 { // the first one's Kill leaves the server alone
		c, p := start(t, cfg)
		greets(t, p)
		returns(t, "Kill", c.Kill)
	}
	if !slices.Equal(os.Environ(), environ) || os.Stdout != stdout || os.Stderr != stderr {
		t.Error("the environment, stdout or stderr was changed")
	}
	stop()
	c := NewClient(cfg)
	defer c.Kill()
	if _, err := c.Start(); err == nil {
		t.Error("it is still served")
	}
}

// TestTestModeEnds checks that Serve ends in test mode whatever it waits for,
// and when it cannot serve at all, without an exit of the process.
func TestTestModeEnds(t *testing.T) {
	leavesNothing(t)
	logger, records := recordingLogger()
	ended, cancel := context.WithCancel(context.Background())
	cancel()
	for name, config := range map[string]*ServeConfig{
		"nobody takes the ReattachConfig": {Plugins: testPlugins(), Test: &ServeTestConfig{Context: ended, ReattachConfigCh: make(chan *ReattachConfig)}},
		"there are no channels":           {Plugins: testPlugins(), Test: &ServeTestConfig{Context: ended}},
		"there are no plugins":            {Test: &ServeTestConfig{}},
		"there is no certificate": {Plugins: testPlugins(), Test: &ServeTestConfig{}, TLSProvider: func() (*tls.Config, error) {
			return nil, errors.New("no certificate")
		}},
	} {
		closed := make(chan struct{})
		config.Test.CloseCh, config.Logger = closed, logger
		returns(t, name+": Serve", func() { Serve(config) })
		if !isClosed(closed) {
			t.Errorf("%s: CloseCh is not closed", name)
		}
	}
	for _, text := range []string{"no plugins", "no certificate"} {
		if !slices.ContainsFunc(records.get(), func(r logRecord) bool { return strings.Contains(fmt.Sprint(r.args), text) }) {
			t.Errorf("%q is not in the log", text)
		}
	}
}

// TestTestModeOutput checks that SyncStdio sends the process's output to the
// host as well, and gives it back.
func TestTestModeOutput(t *testing.T) {
	leavesNothing(t)
	var files [2]*os.File
	for i := range files {
		f, err := os.Create(filepath.Join(t.TempDir(), "output"))
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		files[i] = f
	}
	stdout, stderr := os.Stdout, os.Stderr
	defer func() { os.Stdout, os.Stderr = stdout, stderr }()
	os.Stdout, os.Stderr = files[0], files[1]
	rc, stop := baseServeTest(t, &ServeConfig{
		HandshakeConfig: testHandshake, Plugins: testPlugins(), Logger: hclog.NewNullLogger(), Test: &ServeTestConfig{SyncStdio: true},
	})
	var out, errs syncBuffer
	cfg := attachTo(rc)
	cfg.SyncStdout, cfg.SyncStderr = &out, &errs
	c, _ := start(t, cfg)
	fmt.Fprintln(os.Stdout, "to stdout")
	fmt.Fprintln(os.Stderr, "to stderr")
	await(t, "output", func() bool { return out.String() == "to stdout\n" && errs.String() == "to stderr\n" })
	c.Kill()
	stop()
	if os.Stdout != files[0] || os.Stderr != files[1] {
		t.Error("the process does not have its output back")
	}
	for i, want := range []string{"to stdout\n", "to stderr\n"} {
		if got, err := os.ReadFile(files[i].Name()); err != nil || string(got) != want {
			t.Errorf("the process's own output is %q, %v", got, err)
		}
	}
}

// ---- Concurrency ----

// TestConcurrency lets 100 goroutines start, dispense, call and ask at once.
func TestConcurrency(t *testing.T) {
	t.Parallel()
	c := NewClient(config("base"))
	t.Cleanup(c.Kill)
	var all sync.WaitGroup
	for i := range 100 {
		all.Go(func() {
			p, err := c.Client()
			if err != nil {
				t.Error(err)
				return
			}
			for range 3 {
				client, err := Dispense[*rpc.Client](p, "base")
				if err != nil {
					t.Error(err)
					return
				}
				for j := range 5 {
					echo(t, client, strings.Repeat(fmt.Sprint(i, " ", j, " "), 100*i))
				}
				if err := client.Close(); err != nil {
					t.Error(err)
				}
			}
			if err := p.Ping(); err != nil {
				t.Error(err)
			}
			if _, err := c.Start(); err != nil || c.Exited() || c.ID() == "" || c.Protocol() != ProtocolNetRPC || c.NegotiatedVersion() != 3 {
				t.Error("a client in use tells otherwise:", err)
			}
		})
	}
	returns(t, "the whole", all.Wait)
}

// ---- Bad input ----

// TestBadConfig is the table of configurations that cannot work.
func TestBadConfig(t *testing.T) {
	leavesNothing(t)
	running := &ReattachConfig{Pid: os.Getpid(), Addr: &net.UnixAddr{Name: "/s", Net: "unix"}}
	for _, test := range []struct {
		name   string
		change func(*ClientConfig)
		is     error
		texts  []string
	}{
		{"neither Cmd nor Reattach", func(c *ClientConfig) { c.Cmd = nil }, nil, []string{"Cmd", "Reattach"}},
		{"Cmd and Reattach", func(c *ClientConfig) { c.Reattach = running }, nil, []string{"Cmd", "Reattach"}},
		{"no cookie's name", func(c *ClientConfig) { c.MagicCookieKey = "" }, nil, []string{"MagicCookieKey"}},
		{"no cookie's value", func(c *ClientConfig) { c.MagicCookieValue = "" }, nil, []string{"MagicCookieValue"}},
		{"no plugins", func(c *ClientConfig) { c.Plugins = nil }, nil, []string{"Plugins", "VersionedPlugins"}},
		{"empty plugins", func(c *ClientConfig) { c.Plugins, c.VersionedPlugins = PluginSet{}, map[int]PluginSet{} }, nil, []string{"Plugins"}},
		{"SecureConfig with Reattach", func(c *ClientConfig) { c.Cmd, c.Reattach, c.SecureConfig = nil, running, &SecureConfig{} }, ErrSecureConfigAndReattach, nil},
		{"SecureConfig with Reattach and Cmd", func(c *ClientConfig) { c.Reattach, c.SecureConfig = running, &SecureConfig{} }, ErrSecureConfigAndReattach, nil},
		{"no checksum", func(c *ClientConfig) { c.SecureConfig = &SecureConfig{Hash: sha256.New()} }, ErrSecureConfigNoChecksum, nil},
		{"no hash", func(c *ClientConfig) { c.SecureConfig = &SecureConfig{Checksum: []byte{1}} }, ErrSecureConfigNoHash, nil},
		{"MinPort above MaxPort", func(c *ClientConfig) { c.MinPort, c.MaxPort = 20, 10 }, nil, []string{"MinPort", "20", "MaxPort", "10"}},
		{"MinPort without MaxPort", func(c *ClientConfig) { c.MinPort = 20 }, nil, []string{"MinPort", "20", "MaxPort", "0"}},
		{"AutoMTLS with Reattach", func(c *ClientConfig) { c.Cmd, c.Reattach, c.AutoMTLS = nil, running, true }, nil, []string{"AutoMTLS", "Reattach"}},
		{"Reattach to no address", func(c *ClientConfig) { c.Cmd, c.Reattach = nil, &ReattachConfig{Pid: 1} }, nil, []string{"Addr"}},
		{"Reattach over gRPC", func(c *ClientConfig) {
			c.Cmd, c.Reattach = nil, &ReattachConfig{Protocol: ProtocolGRPC, Pid: os.Getpid(), Addr: running.Addr}
		}, nil, []string{"gRPC"}},
		{"Cmd with its own Stdout", func(c *ClientConfig) { c.Cmd.Stdout = io.Discard }, nil, []string{"Stdout", "SyncStdout"}},
		{"Cmd with its own Stderr", func(c *ClientConfig) { c.Cmd.Stderr = io.Discard }, nil, []string{"Stderr"}},
		{"a plugin for gRPC alone", func(c *ClientConfig) { c.AllowedProtocols = []Protocol{ProtocolGRPC} }, nil, []string{`"netrpc"`, `"grpc"`}},
	} {
		t.Run(test.name, func(t *testing.T) {
			cfg := config("base")
			test.change(cfg)
			c := NewClient(cfg)
			defer c.Kill()
			_, err := c.Start()
			if test.is != nil && err != test.is {
				t.Errorf("the error is %v and not %v", err, test.is)
			}
			errorSays(t, err, append(test.texts, "plugin")...)
			if p, again := c.Client(); again != err || p != nil {
				t.Errorf("Client returns %v, %v, and Start %v", p, again, err)
			}
			if c.Protocol() != ProtocolInvalid || c.NegotiatedVersion() != 0 || c.ReattachConfig() != nil {
				t.Error("it tells of a plugin:", c.Protocol(), c.NegotiatedVersion(), c.ReattachConfig())
			}
		})
	}
}

// baseForeign writes a program that another system runs.
func baseForeign(t *testing.T, head string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "foreign.exe")
	writeProgram(t, path, append([]byte(head), make([]byte, 1000)...), 0o755)
	return path
}

// TestBadBinary is the table of plugins that do not start.
func TestBadBinary(t *testing.T) {
	t.Parallel()
	say := func(line string) func(*testing.T, *ClientConfig) {
		return func(_ *testing.T, c *ClientConfig) {
			c.Cmd.Env = []string{modeEnv + "=base-say", baseSayEnv + "=" + line}
		}
	}
	mode := func(name string) func(*testing.T, *ClientConfig) {
		return func(_ *testing.T, c *ClientConfig) { c.Cmd.Env = []string{modeEnv + "=" + name} }
	}
	path := func(f func(t *testing.T) string) func(*testing.T, *ClientConfig) {
		return func(t *testing.T, c *ClientConfig) { c.Cmd.Path = f(t) }
	}
	arch := "\xb7" // arm64
	if runtime.GOARCH == "arm64" {
		arch = "\x3e" // amd64
	}
	short := func(c *ClientConfig) { c.StartTimeout = 3 * time.Second }
	for _, test := range []struct {
		name    string
		prepare func(*testing.T, *ClientConfig)
		change  func(*ClientConfig) // nil for nothing
		exited  bool                // it ended by itself
		texts   []string
	}{
		{"missing", path(func(t *testing.T) string { return filepath.Join(t.TempDir(), "greeter") }), nil, false, []string{"plugin greeter", "no such file"}},
		{"not in PATH", func(_ *testing.T, c *ClientConfig) { c.Cmd = exec.Command("no-such-plugin-anywhere") }, nil, false, []string{"no-such-plugin-anywhere", "no such file"}},
		{"a directory", path(func(t *testing.T) string { return t.TempDir() }), nil, false, []string{"directory"}},
		{"exits at once", mode("base-exits"), nil, true, []string{"exit status 7", "cannot find my settings"}},
		{"panics at once", mode("base-panics"), nil, true, []string{"exit status 2", "panic: boom"}},
		{"never speaks", say("loading"), short, false, []string{"3s", "loading", "handshake"}},
		{"closes stdout", mode("base-closed-stdout"), nil, false, []string{"closed its stdout"}},
		{"core protocol 2", say("2|3|unix|/tmp/s|netrpc|"), nil, false, []string{`"2"`, "core protocol"}},
		{"gRPC", say("1|3|unix|/tmp/s|grpc|"), nil, false, []string{"gRPC", "net/rpc"}},
		{"gRPC, allowed", say("1|3|unix|/tmp/s|grpc|"), func(c *ClientConfig) { c.AllowedProtocols = []Protocol{ProtocolNetRPC, ProtocolGRPC} }, false, []string{"gRPC"}},
		{"another protocol", say("1|3|unix|/tmp/s|smoke|"), nil, false, []string{`"smoke"`}},
		{"too few fields", say("1|3|unix"), nil, false, []string{"3 fields", "4"}},
		{"one field", say("1|"), nil, false, []string{"fields"}},
		{"an unknown network", say("1|3|pigeon|/tmp/s|netrpc|"), nil, false, []string{`"pigeon"`}},
		{"a bad address", say("1|3|tcp|nowhere|netrpc|"), nil, false, []string{"address", "nowhere"}},
		{"a bad port", say("1|3|tcp|127.0.0.1:99999|netrpc|"), nil, false, []string{"port"}},
		{"a bad version", say("1|three|unix|/tmp/s|netrpc|"), nil, false, []string{`"three"`}},
		{"another version", say("1|4|unix|/tmp/s|netrpc|"), nil, false, []string{"version 4", "[3]"}},
		{"a bad certificate", say("1|3|unix|/tmp/s|netrpc|" + strings.Repeat("A", 100)), func(c *ClientConfig) { c.AutoMTLS = true }, false, []string{"certificate"}},
		{"no certificate", say("1|3|unix|/tmp/s|netrpc|"), func(c *ClientConfig) { c.AutoMTLS = true }, false, []string{"certificate", "AutoMTLS"}},
		{"a handshake of 1 MB", say("1|"), func(c *ClientConfig) { c.Cmd.Env = append(c.Cmd.Env, basePadEnv+"=1000000") }, false, []string{"longer than"}},
		{"a handshake of 1 MB and no log", say("1|"), func(c *ClientConfig) {
			c.Cmd.Env, c.PluginLogBufferSize = append(c.Cmd.Env, basePadEnv+"=1000000"), 10
		}, false, []string{"longer than"}},
		{"a line of 1 MB", say("once upon a time"), func(c *ClientConfig) { short(c); c.Cmd.Env = append(c.Cmd.Env, basePadEnv+"=1000000") }, false, []string{"once upon a time", "no handshake"}},
		{"has no plugins", mode("base-no-plugins"), nil, true, []string{"exit status 1", "no plugins"}},
		{"built for macOS", path(func(t *testing.T) string { return baseForeign(t, "\xcf\xfa\xed\xfe\x0c\x00\x00\x01") }), nil, false, nil},
		{"built for another processor", path(func(t *testing.T) string {
			return baseForeign(t, "\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00"+arch+"\x00\x01\x00\x00\x00")
		}), nil, false, nil},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			cfg := config("base")
			test.prepare(t, cfg)
			if test.change != nil {
				test.change(cfg)
			}
			c := NewClient(cfg)
			var err error
			returns(t, "Start", func() { _, err = c.Start() })
			errorSays(t, err, append(test.texts, "plugin "+pluginName(cfg.Cmd.Path))...)
			var failed *StartError
			if !errors.As(err, &failed) {
				t.Fatalf("the error is a %T", err)
			}
			if (failed.State != nil) != test.exited {
				t.Errorf("its state is %v", failed.State)
			}
			if cfg.Cmd.Process != nil && cfg.Cmd.ProcessState == nil {
				t.Error("the process is not waited for")
			}
			if len(err.Error()) > 20<<10 {
				t.Errorf("the error has %d bytes", len(err.Error()))
			}
			if _, again := c.Start(); again != err {
				t.Errorf("the second Start returned %v", again)
			}
			if !waitFor(hangs, c.done) {
				t.Error("Done is not closed")
			}
			// Nothing is left even if Kill is never called: see runTests.
		})
	}
}

// TestBinaryKind checks that a binary for another system is told by its name.
func TestBinaryKind(t *testing.T) {
	pe := make([]byte, 0x90)
	copy(pe, "MZ")
	pe[60] = 0x80
	copy(pe[0x80:], "PE\x00\x00\x64\xaa")
	for _, test := range []struct{ head, want string }{
		{"\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\xb7\x00", "arm64"},
		{"\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\x3e\x00", "amd64"},
		{"\x7fELF\x02\x02\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\x16", "s390x"},
		{"\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\xff\xfe", "0xfeff"},
		{"\xcf\xfa\xed\xfe\x0c\x00\x00\x01", "macOS on arm64"},
		{"\xcf\xfa\xed\xfe\x07\x00\x00\x01", "macOS on amd64"},
		{string(pe), "Windows on arm64"},
		{"MZ", "Windows"},
		{"MZ" + strings.Repeat("\xff", 100), "Windows"},
		{"#!/bin/sh\n", ""},
	} {
		if got := binaryKind(baseForeign(t, test.head)); !strings.Contains(got, test.want) || test.want == "" && got != "" {
			t.Errorf("%.8q is %q and not %q", test.head, got, test.want)
		}
	}
	if got := binaryKind(filepath.Join(t.TempDir(), "missing")); got != "" {
		t.Error(got)
	}
}

// TestBadDispense is the table of plugins that cannot be dispensed. The
// connection lives on, and nothing stays behind on either side.
func TestBadDispense(t *testing.T) {
	leavesNothing(t)
	cfg := config("base")
	cfg.Plugins["only here"] = testPlugins()["greeter"]
	c, p := start(t, cfg)
	client := dispense[*rpc.Client](t, p, "base")
	goroutines := func() (n int) {
		if err := client.Call("Plugin.Goroutines", struct{}{}, &n); err != nil {
			t.Fatal(err)
		}
		return n
	}
	before := goroutines()
	for _, test := range []struct {
		name  string
		texts []string
	}{
		{"missing", []string{"knows no such plugin", "greeter"}},
		{"", []string{"knows no such plugin"}},
		{"only here", []string{"knows no such plugin", "base"}},
		{"server error", []string{"Server", "no database"}},
		{"server nil", []string{"Server", "nil"}},
		{"server panic", []string{"Server", "panic", "server boom"}},
		{"client error", []string{"Client", "no licence"}},
		{"client nil", []string{"Client", "nil"}},
		{"client panic", []string{"Client", "panic", "client boom"}},
	} {
		for range 3 {
			v, err := p.Dispense(test.name)
			errorSays(t, err, append(test.texts, strconv.Quote(test.name))...)
			if v != nil {
				t.Errorf("%s: %v was returned beside the error", test.name, v)
			}
		}
		greets(t, p, "after", test.name)
		before += 2 // that greeter is kept: who reads its calls, and who has served one
	}
	await(t, "the plugin's goroutines", func() bool { return goroutines() <= before+2 })
	c.Kill()
	if _, err := p.Dispense("greeter"); err == nil {
		t.Error("a plugin is dispensed after Kill")
	}
}

// A plugin without any plugins says so, and odd sizes and times mean the
// defaults.
func TestOddConfigs(t *testing.T) {
	for _, sets := range []map[int]PluginSet{nil, {}, {1: nil}, {1: {}}} {
		if s, err := newServing(&ServeConfig{Plugins: PluginSet{}, VersionedPlugins: sets}, nil, hclog.NewNullLogger()); err == nil {
			s.close()
			t.Error("there is nothing to serve, and it is served:", sets)
		}
	}
	cfg := config("greeter")
	cfg.PluginLogBufferSize, cfg.StartTimeout, cfg.KillTimeout = -1, -1, -1
	c, _ := start(t, cfg)
	c.Kill()
	if err := c.Err(); err != nil {
		t.Error(err)
	}
}

// ---- Speed ----

// baseBench starts the plugin "base" for a benchmark.
func baseBench(b *testing.B) (ClientProtocol, *rpc.Client) {
	b.Helper()
	_, p := start(b, config("base"))
	return p, dispense[*rpc.Client](b, p, "base")
}

func baseCall(b *testing.B, c *rpc.Client, in []byte) {
	var out []byte
	if err := c.Call("Plugin.Echo", in, &out); err != nil || len(out) != len(in) {
		b.Errorf("%d bytes, %v", len(out), err)
	}
}

// BenchmarkCall measures one small call to a plugin and back, from one caller.
func BenchmarkCall(b *testing.B) {
	_, c := baseBench(b)
	in := make([]byte, 16)
	b.ReportAllocs()
	for b.Loop() {
		baseCall(b, c, in)
	}
}

// BenchmarkCallParallel64 measures small calls from 64 callers on one client:
// the time for each is 1 by the throughput.
func BenchmarkCallParallel64(b *testing.B) {
	_, c := baseBench(b)
	const callers = 64
	in := make([]byte, 16)
	b.ReportAllocs()
	var calling sync.WaitGroup
	work := make(chan int, callers)
	for i := range callers {
		work <- b.N/callers + min(1, max(0, b.N%callers-i))
	}
	b.ResetTimer()
	for range callers {
		calling.Go(func() {
			for range <-work {
				baseCall(b, c, in)
			}
		})
	}
	calling.Wait()
}

// BenchmarkEcho1MiB measures a call with an argument of 1 MiB and a reply of
// as much; the throughput is that of one direction.
func BenchmarkEcho1MiB(b *testing.B) {
	_, c := baseBench(b)
	in := make([]byte, 1<<20)
	b.SetBytes(int64(len(in)))
	b.ReportAllocs()
	for b.Loop() {
		baseCall(b, c, in)
	}
}

// BenchmarkBrokerStream measures writes of 64 KiB to a stream of the broker's
// that the plugin reads.
func BenchmarkBrokerStream(b *testing.B) {
	p, c := baseBench(b)
	broker := p.(*RPCClient).broker
	id := broker.NextId()
	var n int64
	call := c.Go("Plugin.Take", id, &n, nil)
	conn, err := broker.Accept(id)
	if err != nil {
		b.Fatal(err)
	}
	chunk := make([]byte, 64<<10)
	b.SetBytes(int64(len(chunk)))
	b.ReportAllocs()
	var sent int64
	for b.Loop() {
		m, err := conn.Write(chunk)
		if err != nil {
			b.Fatal(err)
		}
		sent += int64(m)
	}
	_ = conn.Close()
	if <-call.Done; call.Error != nil || n != sent {
		b.Errorf("%d bytes of %d have arrived: %v", n, sent, call.Error)
	}
}

// BenchmarkCallback measures a call over a stream of its own, which is dialled
// for it and closed behind it.
func BenchmarkCallback(b *testing.B) {
	host, plugin := callsBrokers(b)
	s := newCallsService(nil)
	b.ReportAllocs()
	for b.Loop() {
		c, err := plugin.DialRPC(host.ServeRPC(s))
		if err != nil {
			b.Fatal(err)
		}
		callsEcho(b, c)
		c.Close()
	}
}

// BenchmarkStartToFirstReply measures the start of a plugin until the reply of
// its first call is here. Its end is not in it.
func BenchmarkStartToFirstReply(b *testing.B) {
	in := make([]byte, 16)
	for b.Loop() {
		c, p := start(b, config("base"))
		baseCall(b, dispense[*rpc.Client](b, p, "base"), in)
		b.StopTimer()
		c.Kill()
		b.StartTimer()
	}
}

// ==== Life and death ====

// How plugins end, by themselves or when they are asked, what their hosts learn
// of it, and that nothing is left. What needs Unix signals is in
// plugin_unix_test.go.

// lifeCycles is how often something is done that must not leak.
func lifeCycles() int {
	if *long {
		return 500
	}
	return 40
}

// lifeServer is what the test plugin "life" serves.
type lifeServer struct{ broker *MuxBroker }

var lifeHanging atomic.Int32 // calls of Hang

// lifeDeaths are the ways in which the plugin can end by itself.
var lifeDeaths = map[string]func(){
	"panic":       func() { panic("boom") },
	"fatal error": func() { new(sync.Mutex).Unlock() },
	"exit 0":      func() { os.Exit(0) },
	"exit 3":      func() { os.Exit(3) },
	"kill": func() {
		if p, err := os.FindProcess(os.Getpid()); err == nil {
			_ = p.Kill()
		}
	},
}

func (*lifeServer) Die(how string, _ *bool) error {
	lifeDeaths[how]()
	select {}
}

// Hang never returns.
func (*lifeServer) Hang(bool, *bool) error {
	lifeHanging.Add(1)
	note("in a call", "")
	select {}
}

// Hanging is how many calls hang.
func (*lifeServer) Hanging(_ bool, n *int32) error {
	*n = lifeHanging.Load()
	return nil
}

func (*lifeServer) Echo(p []byte, reply *[]byte) error {
	*reply = p
	return nil
}

// Print prints to stdout and stderr.
func (*lifeServer) Print(text string, _ *bool) error {
	fmt.Fprint(os.Stdout, text)
	fmt.Fprint(os.Stderr, text)
	return nil
}

// Sum reads a stream of the host's to its end and sums it up.
func (s *lifeServer) Sum(id uint32, sum *[]byte) error {
	r, err := s.broker.DialReader(id)
	if err != nil {
		return err
	}
	defer r.Close()
	h := sha256.New()
	if _, err := io.Copy(h, r); err != nil {
		return err
	}
	*sum = h.Sum(nil)
	return nil
}

// LifeSelf is what the plugin sees of itself.
type LifeSelf struct {
	Executable, Comm string
	Args, Env        []string
	Goroutines, FDs  int
}

func (*lifeServer) Self(_ bool, self *LifeSelf) (err error) {
	comm, _ := os.ReadFile("/proc/self/comm")
	self.Comm, self.Args, self.Env = string(comm), os.Args, os.Environ()
	self.Goroutines, self.FDs = runtime.NumGoroutine(), lifeFDs()
	self.Executable, err = os.Executable()
	return err
}

// Child runs a program as the plugin's child.
func (*lifeServer) Child(args []string, output *string) error {
	out, err := exec.Command(args[0], args[1:]...).CombinedOutput()
	*output = fmt.Sprintf("%s%v", out, err)
	return nil
}

// lifeFDs is how many descriptors this process has. Without /proc, none, and
// none on Windows, where Wine shows what it needs itself.
func lifeFDs() int {
	if runtime.GOOS == "windows" {
		return 0
	}
	fds, _ := os.ReadDir("/proc/self/fd")
	return len(fds)
}

// lifeClient calls a lifeServer.
type lifeClient struct {
	broker *MuxBroker
	*rpc.Client
}

func lifePlugins() PluginSet {
	return PluginSet{"life": testPlugin{
		func(b *MuxBroker) (any, error) { return &lifeServer{b}, nil },
		func(b *MuxBroker, c *rpc.Client) (any, error) { return &lifeClient{b, c}, nil },
	}}
}

func (c *lifeClient) self(t testing.TB) (self LifeSelf) {
	t.Helper()
	if err := c.Call("Plugin.Self", true, &self); err != nil {
		t.Fatal(err)
	}
	return self
}

// hang has n calls in flight, half of them made with the function Call, and
// returns where their errors come.
func (c *lifeClient) hang(t testing.TB, n int) <-chan error {
	t.Helper()
	errs := make(chan error, n)
	for i := range n {
		go func() {
			if i%2 == 0 {
				errs <- c.Call("Plugin.Hang", true, new(bool))
			} else {
				errs <- Call(context.Background(), c.Client, "Plugin.Hang", true, new(bool))
			}
		}()
	}
	await(t, "that all calls hang", func() bool {
		var hanging int32
		if err := c.Call("Plugin.Hanging", true, &hanging); err != nil {
			t.Fatal(err)
		}
		return int(hanging) == n
	})
	return errs
}

// lifeServe is a plugin's main, or part of it.
func lifeServe(edit ...func(*ServeConfig)) {
	cfg := &ServeConfig{HandshakeConfig: testHandshake, Plugins: lifePlugins()}
	for _, f := range edit {
		f(cfg)
	}
	Serve(cfg)
}

func init() {
	modes["life"] = func() {
		note("plugin", strconv.Itoa(os.Getpid()))
		lifeServe()
		// It must not matter that nobody reads this any more.
		fmt.Fprintln(os.Stdout, "main is finishing")
		fmt.Fprintln(os.Stderr, "main is finishing")
		note("main has finished", "")
	}
	modes["life late"] = func() {
		note("plugin", strconv.Itoa(os.Getpid()))
		awaitNote("serve")
		lifeServe()
		note("main has finished", "")
	}
	modes["life finishing"] = func() {
		note("plugin", strconv.Itoa(os.Getpid()))
		lifeServe()
		note("main is finishing", "")
		awaitNote("finish")
		note("main has finished", "")
	}
	modes["life endless"] = func() {
		note("plugin", strconv.Itoa(os.Getpid()))
		lifeServe()
		note("main runs on", "")
		select {}
	}
	modes["life noisy"] = func() {
		fmt.Println("a banner | of a library")
		fmt.Println("7 of 9")
		fmt.Println()
		fmt.Println(strings.Repeat("x", 1<<20))
		lifeServe()
	}
	modes["life without TLS"] = func() {
		lifeServe(func(c *ServeConfig) {
			c.TLSProvider = func() (*tls.Config, error) { return nil, errors.New("the key is in the other trousers") }
		})
	}
	modes["life without plugins"] = func() { lifeServe(func(c *ServeConfig) { c.Plugins = nil }) }
	modes["life without a cookie"] = func() { lifeServe(func(c *ServeConfig) { c.MagicCookieKey = "" }) }
	modes["life without a place"] = func() {
		_ = os.RemoveAll(os.Getenv(EnvUnixSocketDir))
		lifeServe()
	}
	modes["life prints and exits"] = func() {
		fmt.Println("welcome to the jungle")
		fmt.Fprintln(os.Stderr, "so long")
	}
	modes["life prints and stays"] = func() {
		fmt.Println("welcome to the jungle")
		time.Sleep(forever) // what waits for nothing is a deadlock
	}
	modes["life says nothing"] = func() {
		note("plugin", strconv.Itoa(os.Getpid()))
		time.Sleep(forever)
	}
	modes["life exits"] = func() { os.Exit(7) }
	modes["life speaks gRPC"] = func() {
		fmt.Println("1|3|unix|/tmp/none|grpc|")
		time.Sleep(forever)
	}
	modes["life speaks gibberish"] = func() {
		fmt.Println("1|three|unix")
		time.Sleep(forever)
	}
	modes["life deaf"] = func() {
		// It is there and listens, but nobody is at home.
		network, address := "unix", filepath.Join(os.Getenv(EnvUnixSocketDir), "deaf")
		if runtime.GOOS == "windows" {
			network, address = "tcp", "127.0.0.1:0"
		}
		lis, err := net.Listen(network, address)
		if err != nil {
			panic(err)
		}
		fmt.Printf("1|3|%s|%s|netrpc|\n", network, lis.Addr())
		time.Sleep(forever)
	}
}

// A plugin that ends unasked says why: at Done and Err, and to every call that
// was in flight.
func TestLifeDeath(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		how, text string // the text in full, or its end after a "..."
		panic     bool
		code      int
	}{
		{"panic", "plugin greeter: panic: boom (exit status 2)", true, 2},
		{"fatal error", "plugin greeter: fatal error: sync: unlock of unlocked mutex (exit status 2)", true, 2},
		{"exit 0", "...(exit status 0)", false, 0},
		{"exit 3", "...(exit status 3)", false, 3},
		{"kill", map[bool]string{true: "...(exit status 1)", false: "...(signal: killed)"}[runtime.GOOS == "windows"], false, -1},
	} {
		t.Run(test.how, func(t *testing.T) {
			t.Parallel()
			cfg := newLab(t).config("life")
			cfg.Cmd.Path = binaryNamed(t, "greeter")
			c, p := start(t, cfg)
			life, idle := dispense[*lifeClient](t, p, "life"), dispense[*lifeClient](t, p, "life")
			if err := c.Err(); err != nil || c.Exited() {
				t.Errorf("it lives, with the error %v and Exited %v", err, c.Exited())
			}
			errs := life.hang(t, 4)
			check := func(err error) {
				t.Helper()
				var exit *ExitError
				if !errors.As(err, &exit) || !errors.Is(err, io.ErrUnexpectedEOF) {
					t.Fatalf("a call that was in flight failed with %T: %v", err, err)
				}
				if end, cut := strings.CutPrefix(test.text, "..."); cut && !strings.HasSuffix(err.Error(), end) || !cut && err.Error() != test.text {
					t.Errorf("a call that was in flight failed with %q and not %q", err, test.text)
				}
			}
			check(life.Call("Plugin.Die", test.how, new(bool)))
			for range cap(errs) {
				check(<-errs)
			}
			receive(t, "Done", c.Done())
			var exit *ExitError
			if !errors.As(c.Err(), &exit) {
				t.Fatalf("Err returned %v", c.Err())
			}
			if !c.Exited() || exit.Path != cfg.Cmd.Path || exit.State == nil || test.code >= 0 && exit.State.ExitCode() != test.code {
				t.Errorf("Exited: %v, %+v", c.Exited(), exit)
			}
			if got := strings.Contains(exit.Panic, "boom") || strings.Contains(exit.Panic, "unlock of"); got != test.panic {
				t.Errorf("Panic: %q", exit.Panic)
			}
			if test.panic && (!strings.Contains(exit.Panic, "lifeServer") || !strings.Contains(exit.Panic, "goroutine ") || !strings.Contains(exit.Stderr, "goroutine ")) {
				t.Errorf("there is no trace:\nPanic: %s\nStderr: %s", exit.Panic, exit.Stderr)
			}
			for _, client := range []*lifeClient{life, idle} {
				if err := client.Call("Plugin.Echo", []byte("?"), new([]byte)); err != rpc.ErrShutdown {
					t.Errorf("a later c.Call failed with %v", err)
				}
				if err := Call(context.Background(), client.Client, "Plugin.Echo", []byte("?"), new([]byte)); !errors.Is(err, rpc.ErrShutdown) {
					t.Errorf("a later Call failed with %v", err)
				}
			}
			within(t, "a later Dispense and Ping", 0, func() {
				if _, err := p.Dispense("life"); err == nil {
					t.Error("a later Dispense did not fail")
				}
				if p.Ping() == nil {
					t.Error("a later Ping did not fail")
				}
			})
			c.Kill()
			if c.Err() != exit {
				t.Errorf("after Kill, Err is %v", c.Err())
			}
		})
	}
}

// Reattached to, a plugin that dies says what it can: the process is nobody's
// child.
func TestLifeReattachedDeath(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	first, _ := start(t, l.config("life"))
	cfg := l.config("")
	cfg.Cmd, cfg.Reattach = nil, first.ReattachConfig()
	second, p := start(t, cfg)
	life := dispense[*lifeClient](t, p, "life")
	errs := life.hang(t, 2)
	if err := life.Call("Plugin.Die", "exit 3", new(bool)); err == nil {
		t.Error("the call in which it died did not fail")
	}
	for range cap(errs) {
		if err := <-errs; !errors.As(err, new(*ExitError)) || !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Errorf("a call that was in flight failed with %T: %v", err, err)
		}
	}
	for c, child := range map[*Client]bool{first: true, second: false} {
		receive(t, "Done", c.Done())
		var exit *ExitError
		if !errors.As(c.Err(), &exit) || (exit.State != nil) != child {
			t.Errorf("Err returned %+v", c.Err())
		}
	}
}

// The last lines of stderr are kept, and not more than 8 KiB of them.
func TestLifeLastWords(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		mode, crash string
		slow        bool // the host's logger is
	}{
		{"life babbles and exits", "", false},
		{"life babbles and panics", "panic: boom", false},
		{"life babbles and panics", "panic: boom", true},
	} {
		crash := test.crash
		t.Run(fmt.Sprintf("%s, slow: %v", test.mode, test.slow), func(t *testing.T) {
			t.Parallel()
			cfg := newLab(t).config(test.mode)
			if test.slow {
				logger := hclog.NewInterceptLogger(&hclog.LoggerOptions{Output: io.Discard})
				logger.RegisterSink(new(lifeSlowSink))
				cfg.Logger = logger
			}
			c, p := start(t, cfg)
			life := dispense[*lifeClient](t, p, "life")
			_ = life.Call("Plugin.Babble", crash != "", new(bool))
			receive(t, "Done", c.Done())
			var exit *ExitError
			if !errors.As(c.Err(), &exit) {
				t.Fatalf("Err returned %v", c.Err())
			}
			if len(exit.Stderr) > 8<<10 || len(exit.Stderr) < 4<<10 || !strings.Contains(exit.Stderr, "the last of 300 lines") || !strings.HasPrefix(exit.Panic, crash) {
				t.Errorf("%d bytes of stderr: %q\nPanic: %q", len(exit.Stderr), exit.Stderr, exit.Panic)
			}
		})
	}
}

// lifeSlowSink takes as long for the last words as no plugin is waited for that
// prints nothing.
type lifeSlowSink struct{ next time.Time }

func (s *lifeSlowSink) Accept(_ string, _ hclog.Level, msg string, _ ...any) {
	if !strings.HasPrefix(msg, "line ") {
		return
	}
	if s.next.IsZero() {
		s.next = time.Now()
	}
	s.next = s.next.Add(drainTimeout / 200)
	time.Sleep(time.Until(s.next))
}

// lifeBabbler prints to the process's own stderr, as the runtime does.
type lifeBabbler struct{ stderr *os.File }

func (b lifeBabbler) Babble(crash bool, _ *bool) error {
	for n := range 300 { // a record of each has to be made while its end is awaited
		fmt.Fprintf(b.stderr, "line %d %s\n", n, strings.Repeat("x", 100))
	}
	fmt.Fprintln(b.stderr, "the last of 300 lines")
	if crash {
		panic("boom")
	}
	os.Exit(0)
	return nil
}

func init() {
	babble := func() {
		stderr := os.Stderr
		lifeServe(func(c *ServeConfig) {
			c.Plugins = PluginSet{"life": testPlugin{server: serves(lifeBabbler{stderr})}}
		})
	}
	modes["life babbles and exits"], modes["life babbles and panics"] = babble, babble
}

// An end that was asked for is none to complain about.
func TestLifeAskedEnd(t *testing.T) {
	t.Parallel()
	for name, end := range map[string]func(c *Client, p ClientProtocol){
		"Kill":  func(c *Client, _ ClientProtocol) { c.Kill() },
		"Close": func(_ *Client, p ClientProtocol) { _ = p.Close() },
		"CleanupClients": func(c *Client, _ ClientProtocol) {
			CleanupClients()
		},
	} {
		t.Run(name, func(t *testing.T) {
			l := newLab(t)
			cfg := l.config("life")
			cfg.Managed = true
			c, p := start(t, cfg)
			end(c, p)
			receive(t, "Done", c.Done())
			if err := c.Err(); err != nil {
				t.Error(err)
			}
			l.read("main has finished")
		})
	}
}

// A client that was never started, or could not be, is done with at once.
func TestLifeNeverLived(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	c := NewClient(l.config("life"))
	c.Kill()
	receive(t, "Done", c.Done())
	if _, err := c.Start(); err == nil {
		t.Error("it started after Kill")
	}
	if _, err := c.Client(); err == nil {
		t.Error("it connected after Kill")
	}
	c.Kill()
	if c.Err() != nil || c.ID() != "" || l.noted("plugin") {
		t.Errorf("Err: %v, ID: %q", c.Err(), c.ID())
	}
}

// lifeFailure is a start that fails, and what its error must have.
type lifeFailure struct {
	name, mode     string
	edit           func(testing.TB, *ClientConfig)
	code           int    // of the exit; -1 if the process did not end by itself
	stdout, stderr string // parts of them
	hint           string // a part of the text
	is             error
}

func (f lifeFailure) run(t *testing.T) {
	t.Parallel()
	cfg := newLab(t).config(f.mode)
	if f.edit != nil {
		f.edit(t, cfg)
	}
	err := startError(t, NewClient(cfg))
	text := err.Error()
	t.Log(text)
	if err.Path != cfg.Cmd.Path || err.Err == nil {
		t.Errorf("Path: %q, Err: %v", err.Path, err.Err)
	}
	if f.code < 0 && err.State != nil || f.code >= 0 && (err.State.ExitCode() != f.code || !strings.Contains(text, err.State.String())) {
		t.Errorf("State: %v", err.State)
	}
	if !strings.Contains(err.Stdout, f.stdout) || !strings.Contains(text, f.stdout) {
		t.Errorf("Stdout: %q", err.Stdout)
	}
	if !strings.Contains(err.Stderr, f.stderr) || !strings.Contains(text, f.stderr) {
		t.Errorf("Stderr: %q", err.Stderr)
	}
	for part := range strings.SplitSeq(f.hint, "|") {
		if !strings.Contains(text, part) {
			t.Errorf("there is no hint with %q", part)
		}
	}
	if f.is != nil && !errors.Is(err, f.is) {
		t.Errorf("it is no %v", f.is)
	}
}

// A plugin that does not start says why, with all that is known.
func TestLifeStartError(t *testing.T) {
	t.Parallel()
	runs := func(path string) func(testing.TB, *ClientConfig) {
		return func(_ testing.TB, cfg *ClientConfig) { cfg.Cmd = exec.Command(path) }
	}
	soon := func(_ testing.TB, cfg *ClientConfig) { cfg.StartTimeout = 3 * time.Second }
	noFile := fs.ErrNotExist
	if runtime.GOOS == "windows" { // where os/exec looks for it with other endings
		noFile = exec.ErrNotFound
	}
	for _, test := range []lifeFailure{
		{name: "exit", mode: "life exits", code: 7},
		{name: "print and exit", mode: "life prints and exits", code: 0, stdout: "welcome to the jungle", stderr: "so long", hint: "plugin.Serve"},
		{name: "print and stay", mode: "life prints and stays", edit: soon, code: -1, stdout: "welcome to the jungle", hint: "plugin.Serve", is: context.DeadlineExceeded},
		{name: "say nothing", mode: "life says nothing", edit: soon, code: -1, hint: "handshake|3s", is: context.DeadlineExceeded},
		{name: "another program's", mode: "life", code: 1, stderr: "is a plugin", hint: "another program|" + testHandshake.MagicCookieKey, edit: func(_ testing.TB, cfg *ClientConfig) {
			cfg.MagicCookieValue = "another"
		}},
		{name: "gRPC", mode: "life speaks gRPC", code: -1, hint: "gRPC|net/rpc"},
		{name: "gibberish", mode: "life speaks gibberish", code: -1, hint: "handshake"},
		{name: "no file", edit: runs("/no/such/file"), code: -1, hint: "no such file", is: noFile},
		{name: "not in PATH", edit: runs("no-such-program"), code: -1, is: exec.ErrNotFound},
		// What fails in Serve, is told on stderr.
		{name: "bad TLSProvider", mode: "life without TLS", code: 1, stderr: "the key is in the other trousers"},
		{name: "no plugins", mode: "life without plugins", code: 1, stderr: "no plugins"},
		{name: "no cookie", mode: "life without a cookie", code: 1, stderr: "MagicCookieKey"},
	} {
		t.Run(test.name, test.run)
	}
}

// Versions that do not meet are all named.
func TestLifeVersionError(t *testing.T) {
	t.Parallel()
	cfg := newLab(t).config("life") // it has 3
	cfg.ProtocolVersion, cfg.VersionedPlugins = 5, map[int]PluginSet{1: lifePlugins()}
	err := startError(t, NewClient(cfg))
	var version *VersionError
	if !errors.As(err, &version) || version.Plugin != 3 || !slices.Equal(version.Host, []int{1, 5}) {
		t.Fatalf("the error is %v, %+v", err, version)
	}
	for _, part := range []string{"3", "1 5"} {
		if !strings.Contains(err.Error(), part) {
			t.Errorf("%q does not name %s", err, part)
		}
	}
}

// Programs compare the sentinels.
func TestLifeSentinels(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	secure := func(s *SecureConfig) *ClientConfig {
		cfg := l.config("life")
		cfg.SecureConfig = s
		return cfg
	}
	dead := exec.Command(os.Args[0], "-test.run=^$")
	if err := dead.Run(); err != nil {
		t.Fatal(err)
	}
	reattach := func(pid int) *ClientConfig {
		cfg := l.config("life")
		cfg.Cmd, cfg.Reattach = nil, &ReattachConfig{ProtocolVersion: 3, Pid: pid, Addr: &net.UnixAddr{Net: "unix", Name: filepath.Join(l.tmp, "none")}}
		return cfg
	}
	both := reattach(os.Getpid())
	both.SecureConfig = &SecureConfig{Checksum: []byte{1}, Hash: sha256.New()}
	for _, test := range []struct {
		cfg  *ClientConfig
		want error
	}{
		{secure(&SecureConfig{Hash: sha256.New()}), ErrSecureConfigNoChecksum},
		{secure(&SecureConfig{Checksum: []byte{1}}), ErrSecureConfigNoHash},
		{secure(&SecureConfig{Checksum: []byte{1}, Hash: sha256.New()}), ErrChecksumsDoNotMatch},
		{reattach(dead.Process.Pid), ErrProcessNotFound},
		{reattach(os.Getpid()), ErrProcessNotFound},
		{both, ErrSecureConfigAndReattach},
	} {
		c := NewClient(test.cfg)
		for range 2 {
			if _, err := c.Start(); err != test.want {
				t.Errorf("Start returned %v and not %v", err, test.want)
			}
		}
		receive(t, "Done", c.Done())
		c.Kill()
	}
}

// What a plugin prints before its handshake does not keep it from starting.
func TestLifeNoise(t *testing.T) {
	t.Parallel()
	cfg := newLab(t).config("life noisy")
	cfg.Cmd.Path = binaryNamed(t, "greeter")
	logger, records := recordingLogger()
	cfg.Logger = logger
	c, p := start(t, cfg)
	echo(t, dispense[*lifeClient](t, p, "life").Client, "?")
	c.Kill()
	warnings := slices.DeleteFunc(records.get(), func(r logRecord) bool { return r.level < hclog.Warn })
	if len(warnings) != 4 {
		t.Fatalf("there are %d warnings and not one for each of 4 lines", len(warnings))
	}
	for i, part := range []string{"a banner | of a library", "7 of 9", "", strings.Repeat("x", 1000)} {
		w := warnings[i]
		text := w.msg + fmt.Sprintln(w.args...)
		if w.level != hclog.Warn || !strings.Contains(w.name+text, "greeter") || !strings.Contains(text, part) {
			t.Errorf("warning %d by %q has no %q: %.200q", i, w.name, part, text)
		}
	}
	if n := len(warnings[3].msg + fmt.Sprintln(warnings[3].args...)); n > defaultLogBufferSize+1000 {
		t.Errorf("a warning is %d bytes long", n)
	}
}

// Kill ends whatever Start and Client are waiting for.
func TestLifeKillInterrupts(t *testing.T) {
	t.Parallel()
	const killTimeout = 500 * time.Millisecond
	for _, test := range []struct {
		name, mode string
		edit       func(*ClientConfig)
		at         func(c *Client, l *lab) bool // Kill may be called
	}{
		{"waiting for the handshake", "life says nothing", nil, func(_ *Client, l *lab) bool { return l.noted("plugin") }},
		{"checking", "life", func(cfg *ClientConfig) {
			cfg.SecureConfig = &SecureConfig{Checksum: []byte{1}, Hash: &slowHash{Hash: sha256.New()}}
		}, func(c *Client, _ *lab) bool { return c.config.SecureConfig.Hash.(*slowHash).begun.Load() }},
		{"connecting", "life deaf", func(cfg *ClientConfig) {
			cfg.TLSConfig = &tls.Config{InsecureSkipVerify: true}
		}, func(c *Client, _ *lab) bool { return c.starting.result().addr != nil }},
		{"dispensing", "life deaf", nil, func(c *Client, _ *lab) bool { return c.connecting.result() != nil }},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			l := newLab(t)
			cfg := l.config(test.mode)
			cfg.KillTimeout = killTimeout
			if test.edit != nil {
				test.edit(cfg)
			}
			c := NewClient(cfg)
			failed := make(chan error, 1)
			go func() {
				p, err := c.Client()
				if err == nil {
					_, err = p.Dispense("life")
				}
				failed <- err
			}()
			await(t, test.name, func() bool { return test.at(c, l) })
			within(t, "Kill", killTimeout+time.Second, c.Kill)
			within(t, "what was waiting", 0, func() {
				if err := <-failed; err == nil {
					t.Error("it did not fail")
				}
			})
			receive(t, "Done", c.Done())
			if err := c.Err(); err != nil {
				t.Error(err)
			}
		})
	}
}

// slowHash takes longer for a test binary than a test waits.
type slowHash struct {
	hash.Hash
	begun atomic.Bool
}

func (h *slowHash) Write(p []byte) (int, error) {
	h.begun.Store(true)
	time.Sleep(100 * time.Millisecond)
	return h.Hash.Write(p)
}

// A start that is given up leaves nothing, and says so ever after.
func TestLifeStartContext(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	c := NewClient(l.config("life says nothing"))
	defer c.Kill()
	reason := errors.New("the user has changed her mind")
	ctx, cancel := context.WithCancelCause(context.Background())
	failed := make(chan error, 1)
	go func() {
		_, err := c.StartContext(ctx)
		failed <- err
	}()
	l.read("plugin")
	// One that only waits for the first can leave before.
	impatient, leave := context.WithCancel(context.Background())
	leave()
	if _, err := c.StartContext(impatient); !errors.Is(err, context.Canceled) {
		t.Errorf("the one that waits got %v", err)
	}
	cancel(reason)
	err := <-failed
	if !errors.Is(err, context.Canceled) || !errors.Is(err, reason) || !errors.As(err, new(*StartError)) {
		t.Errorf("StartContext returned %v", err)
	}
	if _, again := c.Start(); again != err {
		t.Errorf("Start returned %v", again)
	}
	l.deserted(slack)

	addr, err := NewClient(l.config("life says nothing")).StartContext(impatient)
	if addr != nil || !errors.Is(err, context.Canceled) {
		t.Errorf("StartContext with a context that is over returned %v, %v", addr, err)
	}

	// The context is for starting, not for living.
	ctx, cancel = context.WithCancelCause(context.Background())
	c = NewClient(l.config("life"))
	defer c.Kill()
	if _, err := c.StartContext(ctx); err != nil {
		t.Fatal(err)
	}
	cancel(nil)
	p, err := c.Client()
	if err != nil {
		t.Fatal(err)
	}
	if err := p.Ping(); err != nil {
		t.Error(err)
	}
}

// One configuration starts a plugin again and again, also after a crash.
func TestLifeRestart(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	cfg := l.config("life")
	var pids []string
	for _, end := range []func(*Client, *lifeClient){
		func(c *Client, _ *lifeClient) { c.Kill() },
		func(_ *Client, life *lifeClient) { _ = life.Call("Plugin.Die", "panic", new(bool)) },
		func(c *Client, _ *lifeClient) { c.Kill() },
	} {
		c, p := start(t, cfg)
		if slices.Contains(pids, c.ID()) {
			t.Errorf("the process %s runs again", c.ID())
		}
		pids = append(pids, c.ID())
		end(c, dispense[*lifeClient](t, p, "life"))
		receive(t, "Done", c.Done())
	}
	if cfg.Cmd.Process == nil || strconv.Itoa(cfg.Cmd.Process.Pid) != pids[2] || cfg.Cmd.ProcessState == nil {
		t.Errorf("the command has %v, %v", cfg.Cmd.Process, cfg.Cmd.ProcessState)
	}
}

// A plugin that is done with reading the handshake's variables passes none of
// them on.
func TestLifeCleanHouse(t *testing.T) {
	t.Parallel()
	cfg := newLab(t).config("life")
	cfg.AutoMTLS = true
	_, p := start(t, cfg)
	life := dispense[*lifeClient](t, p, "life")
	env := []string{"env"}
	if runtime.GOOS == "windows" {
		env = []string{"cmd", "/c", "set"}
	}
	var child string
	if err := life.Call("Plugin.Child", env, &child); err != nil {
		t.Fatal(err)
	}
	for name, env := range map[string][]string{"plugin": life.self(t).Env, "child": strings.Split(child, "\n")} {
		if !slices.ContainsFunc(env, func(v string) bool { return strings.HasPrefix(v, notesEnv+"=") }) {
			t.Errorf("the %s has no environment: %q", name, env)
		}
		for _, v := range env {
			if strings.HasPrefix(v, "PLUGIN_") || strings.HasPrefix(v, testHandshake.MagicCookieKey+"=") {
				t.Errorf("the %s has %s", name, v)
			}
		}
	}
}

// lifeSize is what must not grow.
type lifeSize struct {
	goroutines, fds int
	heap            uint64
}

func lifeMeasure() lifeSize {
	for range 3 {
		runtime.GC()
	}
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return lifeSize{runtime.NumGoroutine(), lifeFDs(), m.HeapAlloc}
}

// noLeak fails the test if f, done again and again, leaves something behind.
func noLeak(t *testing.T, cycles int, f func()) {
	t.Helper()
	for range 5 {
		f()
	}
	before := lifeMeasure()
	for range cycles {
		f()
	}
	// The garbage collector closes what was forgotten: look before it runs.
	if !poll(slack, func() bool { return lifeFDs() <= before.fds }) {
		t.Errorf("%d cycles made %d descriptors of %d", cycles, lifeFDs(), before.fds)
	}
	var after lifeSize
	if !poll(slack, func() bool {
		after = lifeMeasure()
		return after.goroutines <= before.goroutines && after.fds <= before.fds && after.heap <= before.heap+1<<20
	}) {
		t.Errorf("%d cycles made %+v of %+v", cycles, after, before)
	}
	if n := syncMapLen(&codecs); n != 0 {
		t.Errorf("%d clients are still known", n)
	}
}

func syncMapLen(m *sync.Map) (n int) {
	m.Range(func(any, any) bool { n++; return true })
	return n
}

// Nothing is left of plugins that have lived.
func TestLifeLeakCycles(t *testing.T) {
	l := newLab(t)
	noLeak(t, lifeCycles(), func() {
		cfg := l.config("life")
		cfg.Managed = true
		c := NewClient(cfg) // start would hold on to it
		p, err := c.Client()
		if err != nil {
			t.Fatal(err)
		}
		if err := dispense[*lifeClient](t, p, "life").Call("Plugin.Echo", []byte("?"), new([]byte)); err != nil {
			t.Fatal(err)
		}
		c.Kill()
	})
	l.deserted(0)
	managed.mu.Lock()
	defer managed.mu.Unlock()
	if len(managed.clients) > 0 {
		t.Errorf("%d clients are still managed", len(managed.clients))
	}
}

// Nothing is left of plugins that have crashed, even where nobody calls Kill.
func TestLifeLeakCrashes(t *testing.T) {
	l := newLab(t)
	deaths := []string{"panic", "kill", "exit 3"}
	n := 0
	noLeak(t, lifeCycles(), func() {
		c := NewClient(l.config("life"))
		p, err := c.Client()
		if err != nil {
			t.Fatal(err)
		}
		n++
		if err := dispense[*lifeClient](t, p, "life").Call("Plugin.Die", deaths[n%len(deaths)], new(bool)); !errors.As(err, new(*ExitError)) {
			t.Fatal(err)
		}
		receive(t, "Done", c.Done())
	})
	l.deserted(0)
}

// Nothing is left of what was dispensed, on either side.
func TestLifeLeakDispense(t *testing.T) {
	_, p := start(t, newLab(t).config("life"))
	life := dispense[*lifeClient](t, p, "life")
	cycle := func() {
		instance := dispense[*lifeClient](t, p, "life")
		if err := instance.Call("Plugin.Echo", []byte("?"), new([]byte)); err != nil {
			t.Fatal(err)
		}
		if err := instance.Close(); err != nil {
			t.Fatal(err)
		}
	}
	for range 5 {
		cycle()
	}
	there, known := life.self(t), syncMapLen(&codecs)
	before := lifeMeasure()
	for range 500 {
		cycle()
	}
	if !poll(slack, func() bool {
		after := lifeMeasure()
		return after.goroutines <= before.goroutines && after.fds <= before.fds && after.heap <= before.heap+1<<20
	}) {
		t.Errorf("the host has %+v and had %+v", lifeMeasure(), before)
	}
	if !poll(slack, func() bool {
		now := life.self(t)
		return now.Goroutines <= there.Goroutines+maxIdle && now.FDs <= there.FDs
	}) {
		now := life.self(t)
		t.Errorf("the plugin has %d goroutines and %d descriptors, and had %d and %d", now.Goroutines, now.FDs, there.Goroutines, there.FDs)
	}
	if n := syncMapLen(&codecs); n > known {
		t.Errorf("%d clients are known, and were %d", n, known)
	}
}

// errWrong is a wrong answer.
var errWrong = errors.New("the answer is wrong")

// traffic makes calls, streams and logs until ctx ends or something fails.
func (c *lifeClient) traffic(ctx context.Context, logger func(n int)) error {
	for n := 0; ctx.Err() == nil; n++ {
		if logger != nil {
			logger(n)
		}
		data := noise(1+n*7919%200_000, rand.Uint64())
		var err error
		var got, want []byte
		switch n % 3 {
		case 0:
			want = data
			err = Call(ctx, c.Client, "Plugin.Echo", data, &got)
		case 1:
			sum := sha256.Sum256(data)
			want = sum[:]
			err = Call(ctx, c.Client, "Plugin.Sum", c.broker.ServeReader(bytes.NewReader(data)), &got)
		case 2:
			err = c.Call("Plugin.Print", fmt.Sprintf("%x\n", data[:min(len(data), 5000)]), new(bool))
		}
		if err != nil {
			return err
		}
		if !bytes.Equal(got, want) {
			return errWrong
		}
	}
	return nil
}

// A descriptor that is not a pipe is somebody else's: it is neither read, nor
// closed, nor taken for the end of the host.
func TestForeignLifeline(t *testing.T) {
	f, err := os.Open(os.Args[0])
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for _, life := range []string{fmt.Sprint(lifePipe, f.Fd()), lifePipe + "9999", lifePipe + "x", lifePid + "x", lifeDetached, ""} {
		if hostWaiter(life) != nil {
			t.Errorf("%q is watched", life)
		}
	}
	runtime.GC()
	if _, err := f.Read(make([]byte, 1)); err != nil {
		t.Error("the file cannot be read any more:", err)
	}
}

// ==== Calls and streams ====

// The tests of calls, errors and streams. Most run over a connection inside
// this process; "the plugin" is then merely the other end.

func init() {
	modes["calls"] = func() { servePlugins(callsPlugins()) }
	gob.Register(CallsBox{})
	gob.Register(CallsInner{})
	gob.Register(CallsDeep{})
	gob.Register(CallsMoody{})
	gob.Register([]any{})
	gob.Register(map[string]any{})
	RegisterError(errCallsKnown, errCallsKnownToo)
}

var (
	errCallsKnown    = errors.New("calls: one that both sides know")
	errCallsKnownToo = errors.New("calls: another that both sides know")
	errCallsUnknown  = errors.New("calls: one that was not registered")
	errCallsCause    = errors.New("calls: the cause")
)

// CallsBox holds anything.
type CallsBox struct{ V any }

// CallsInner and CallsDeep are what a box holds.
type CallsInner struct{ N int }
type CallsDeep struct{ S []string }

// callsHidden is not registered with gob.
type callsHidden struct{ N int }

// CallsMoody fails to be encoded or decoded if told so.
type CallsMoody struct{ How, Text string }

func (m CallsMoody) GobEncode() ([]byte, error) {
	switch m.How {
	case "encode fails":
		return nil, errors.New("moody: no encoding today")
	case "encode panics":
		panic("moody: panic while encoding")
	}
	return []byte(m.How + "|" + m.Text), nil
}

func (m *CallsMoody) GobDecode(b []byte) error {
	m.How, m.Text, _ = strings.Cut(string(b), "|")
	switch m.How {
	case "decode fails":
		return errors.New("moody: no decoding today")
	case "decode panics":
		panic("moody: panic while decoding")
	}
	return nil
}

// CallsRing holds itself, and an interface; it can be encoded all the same.
type CallsRing struct {
	Self *CallsRing
	V    any
	Name string
}

func newCallsRing(name string) *CallsRing {
	r := &CallsRing{Name: name}
	r.Self, r.V = r, r
	return r
}

func (r *CallsRing) GobEncode() ([]byte, error) { return []byte(r.Name), nil }
func (r *CallsRing) GobDecode(b []byte) error   { *r = *newCallsRing(string(b)); return nil }

// CallsGate lets nobody decode it until it is open.
type CallsGate struct{ open chan struct{} }

func (*CallsGate) GobEncode() ([]byte, error) { return nil, nil }
func (g *CallsGate) GobDecode([]byte) error   { <-g.open; return nil }

// callsBadReplies are the values that CallsService.Bad returns in a box.
var callsBadReplies = map[string]any{
	"chan":         make(chan int),
	"func":         func() {},
	"unregistered": callsHidden{1},
	"nil pointer":  (*CallsInner)(nil),
	"encode fails": CallsMoody{How: "encode fails"}, "encode panics": CallsMoody{How: "encode panics"},
	"nested": []any{CallsInner{1}, CallsBox{CallsDeep{[]string{"x"}}}, make(chan int)},
	"deeper": CallsBox{CallsBox{[]any{CallsDeep{}, CallsInner{3}, CallsMoody{How: "encode panics"}}}},
}

// callsErrors are what CallsService.Fail returns.
var callsErrors = map[string]error{
	"io.EOF":                   io.EOF,
	"io.ErrUnexpectedEOF":      io.ErrUnexpectedEOF,
	"fs.ErrNotExist":           fs.ErrNotExist,
	"fs.ErrExist":              fs.ErrExist,
	"fs.ErrPermission":         fs.ErrPermission,
	"fs.ErrInvalid":            fs.ErrInvalid,
	"fs.ErrClosed":             fs.ErrClosed,
	"os.ErrDeadlineExceeded":   os.ErrDeadlineExceeded,
	"context.Canceled":         context.Canceled,
	"context.DeadlineExceeded": context.DeadlineExceeded,
	"registered":               errCallsKnown,
	"registered, too":          errCallsKnownToo,
}

// callsNilError is an error that panics when it is asked for its text.
type callsNilError struct{ text string }

func (e *callsNilError) Error() string { return e.text }

// CallsService is what most tests call, over every kind of connection.
type CallsService struct {
	broker  *MuxBroker
	started chan string   // gets the argument of each Block and Wait
	release chan struct{} // ends one Block
	ended   chan error    // gets why the context of a Wait ended
}

func newCallsService(b *MuxBroker) *CallsService {
	return &CallsService{b, make(chan string, 1000), make(chan struct{}), make(chan error, 1000)}
}

func (s *CallsService) Echo(in string, out *string) error          { *out = in; return nil }
func (s *CallsService) Box(in CallsBox, out *CallsBox) error       { *out = in; return nil }
func (s *CallsService) Moody(in CallsMoody, out *CallsMoody) error { *out = in; return nil }
func (s *CallsService) Ring(in *CallsRing, out *CallsRing) error   { *out = *in; return nil }
func (s *CallsService) Bytes(in []byte, out *[]byte) error         { *out = in; return nil }
func (s *CallsService) BadChan(_ string, out *chan int) error      { return nil }
func (s *CallsService) BadFunc(_ string, out *func()) error        { return nil }
func (s *CallsService) Bad(name string, out *CallsBox) error {
	out.V = callsBadReplies[name]
	return nil
}
func (s *CallsService) Panic(what string, _ *string) error                        { panic(what) }
func (s *CallsService) NilError(string, *string) error                            { return (*callsNilError)(nil) }
func (s *CallsService) Unfit(string) error                                        { return nil }
func (s *CallsService) MoodyReply(how string, out *CallsMoody) error              { out.How = how; return nil }
func (s *CallsService) Many(n int, out *[]byte) error                             { *out = make([]byte, n); return nil }
func (s *CallsService) Fail(in CallsFail, _ *string) error                        { return in.error() }
func (s *CallsService) FailWith(_ context.Context, in CallsFail, _ *string) error { return in.error() }

func (s *CallsService) Gate(_ string, out *CallsGate) error { return nil }

// Block returns when it is released. It has no context.
func (s *CallsService) Block(in string, out *string) error {
	s.started <- in
	<-s.release
	*out = in
	return nil
}

// Wait waits for the end of its context.
func (s *CallsService) Wait(ctx context.Context, in string, out *string) error {
	s.started <- in
	select {
	case <-ctx.Done():
		s.ended <- context.Cause(ctx)
		return ctx.Err()
	case <-s.release:
		*out = in
		return ctx.Err()
	}
}

// CallsFail says which error to return, and how.
type CallsFail struct{ Name, How string }

func (f CallsFail) error() error {
	err := callsErrors[f.Name]
	switch f.How {
	case "wrapped":
		return fmt.Errorf("reading %s: %w", "x", err)
	case "joined":
		return errors.Join(errCallsUnknown, err)
	case "path":
		return &fs.PathError{Op: "open", Path: "/x", Err: err}
	}
	return err
}

// CallsBack says what to call at the host.
type CallsBack struct {
	ID          uint32
	Method, Arg string
}

// CallBack calls the host.
func (s *CallsService) CallBack(ctx context.Context, in CallsBack, out *string) error {
	c, err := s.broker.DialRPC(in.ID)
	if err != nil {
		return err
	}
	defer c.Close()
	return Call(ctx, c, in.Method, in.Arg, out)
}

type callsClient struct {
	broker *MuxBroker
	*rpc.Client
}

func callsPlugins() PluginSet {
	return PluginSet{"calls": testPlugin{
		func(b *MuxBroker) (any, error) { return newCallsService(b), nil },
		func(b *MuxBroker, c *rpc.Client) (any, error) { return &callsClient{b, c}, nil },
	}}
}

func callsSpawn(f func()) bool {
	go f()
	return true
}

// callsOurs and callsStock are a client of this package and one of net/rpc's,
// callsServe and callsServeStock likewise servers of v.
func callsOurs(conn net.Conn) *rpc.Client  { return newRPCClient(conn, callsSpawn, new(sync.Pool)) }
func callsStock(conn net.Conn) *rpc.Client { return rpc.NewClient(conn) }

func callsServe(conn net.Conn, v any) {
	svc, err := newService(v)
	if err != nil {
		panic(err)
	}
	go newRPCServer(conn, map[string]*service{"Plugin": svc}, hclog.NewNullLogger(), false, new(sync.Pool)).serve(context.Background())
}

func callsServeStock(conn net.Conn, v any) {
	s := rpc.NewServer()
	if err := s.RegisterName("Plugin", v); err != nil {
		panic(err)
	}
	go s.ServeConn(conn)
}

// callsWires are the ways in which our ends and net/rpc's can meet.
var callsWires = []struct {
	name         string
	client       func(net.Conn) *rpc.Client
	serve        func(net.Conn, any)
	ours, served bool // the client is ours; the server is
}{
	{"ours to ours", callsOurs, callsServe, true, true},
	{"ours to stock", callsOurs, callsServeStock, true, false},
	{"stock to ours", callsStock, callsServe, false, true},
	{"stock to stock", callsStock, callsServeStock, false, false},
}

// callsOver returns a client for s over a wire.
func callsOver(t testing.TB, client func(net.Conn) *rpc.Client, serve func(net.Conn, any), v any) *rpc.Client {
	t.Helper()
	a, b := TestConn(t)
	serve(b, v)
	c := client(a)
	t.Cleanup(func() { c.Close() })
	return c
}

// callsEcho makes sure that the client still works.
func callsEcho(t testing.TB, c *rpc.Client) {
	t.Helper()
	var out string
	text := fmt.Sprint("echo ", rand.Int())
	if err := Call(boundedContext(t), c, "Plugin.Echo", text, &out); err != nil || out != text {
		t.Errorf("the stream did not live on: %q, %v", out, err)
	}
}

// callsPlugin dispenses the test plugin inside this process and returns the
// host's end, the client and the service.
func callsPlugin(t testing.TB, logger hclog.Logger) (*RPCClient, *callsClient, *CallsService) {
	t.Helper()
	served := make(chan *CallsService, 1)
	plugins := callsPlugins()
	p := plugins["calls"].(testPlugin)
	p.server = func(b *MuxBroker) (any, error) {
		s := newCallsService(b)
		served <- s
		return s, nil
	}
	plugins["calls"] = p
	a, b := TestConn(t)
	go (&RPCServer{Plugins: plugins}).ServeConn(b) // ends with the connection
	host, err := newConnection(a, plugins, logger, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { host.session.close() })
	return host, dispense[*callsClient](t, host, "calls"), <-served
}

// callsBrokers returns the brokers of the two ends of a connection.
func callsBrokers(t testing.TB) (host, plugin *MuxBroker) {
	t.Helper()
	a, b := TestConn(t)
	host, plugin = callsBroker(t, a, true), callsBroker(t, b, false)
	return host, plugin
}

func callsBroker(t testing.TB, conn io.ReadWriteCloser, host bool) *MuxBroker {
	t.Helper()
	s, err := newSession(context.Background(), conn, host, hclog.NewNullLogger(), nil)
	if err != nil {
		t.Fatal(err)
	}
	b := newMuxBroker(s)
	s.spawn(func() { defer s.cancel(); b.Run() })
	t.Cleanup(s.close)
	return b
}

// callsBothWays runs a test with the host on either end.
func callsBothWays(t *testing.T, f func(t *testing.T, here, there *MuxBroker)) {
	t.Run("host to plugin", func(t *testing.T) {
		host, plugin := callsBrokers(t)
		f(t, host, plugin)
	})
	t.Run("plugin to host", func(t *testing.T) {
		host, plugin := callsBrokers(t)
		f(t, plugin, host)
	})
}

// callsRaw returns a broker, and the session of a peer that does as it likes.
func callsRaw(t testing.TB) (*MuxBroker, *yamux.Session) {
	t.Helper()
	a, b := TestConn(t)
	raw, err := yamux.Server(b, quietYamux())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { raw.Close() })
	return callsBroker(t, a, true), raw
}

// streamsOf is how many streams are known on one side.
func streamsOf(b *MuxBroker) int {
	b.session.frames.mu.Lock()
	defer b.session.frames.mu.Unlock()
	return b.session.mux.NumStreams() + len(b.session.frames.flows)
}

// streamsGone waits until the brokers know of no streams.
func streamsGone(t testing.TB, brokers ...*MuxBroker) {
	t.Helper()
	for _, b := range brokers {
		await(t, "all streams were gone", func() bool { return streamsOf(b) == 0 })
	}
}

// callsID is how a stream is dialled.
func callsID(id uint32) []byte { return binary.LittleEndian.AppendUint32(nil, id) }

// ---- Calls ----

func TestCallEndsWithContext(t *testing.T) {
	timeout := func(ctx context.Context) (context.Context, context.CancelFunc) {
		return context.WithTimeoutCause(ctx, time.Millisecond, errCallsCause)
	}
	cancelCause := func(ctx context.Context) (context.Context, context.CancelFunc) {
		ctx, cancel := context.WithCancelCause(ctx)
		return ctx, func() { cancel(errCallsCause) }
	}
	plainTimeout := func(ctx context.Context) (context.Context, context.CancelFunc) {
		return context.WithTimeout(ctx, time.Millisecond)
	}
	for _, end := range []struct {
		name     string
		make     func(context.Context) (context.Context, context.CancelFunc)
		canceled bool
		cause    error
	}{
		{"cancel", context.WithCancel, true, context.Canceled},
		{"cancel with cause", cancelCause, true, errCallsCause},
		{"deadline", plainTimeout, false, context.DeadlineExceeded},
		{"deadline with cause", timeout, false, errCallsCause},
	} {
		for _, wire := range callsWires {
			t.Run(wire.name+"/"+end.name, func(t *testing.T) {
				s := newCallsService(nil)
				c := callsOver(t, wire.client, wire.serve, s)
				ctx, cancel := end.make(context.Background())
				defer cancel()
				reply := "before"
				done := async(func() error { return Call(ctx, c, "Plugin.Block", "late", &reply) })
				receive(t, "the call", s.started)
				if end.canceled {
					cancel()
				}
				err := receive(t, "the end of Call", done)
				if !errors.Is(err, ctx.Err()) || !errors.Is(err, end.cause) {
					t.Errorf("Call returned %v; want one that is %v and %v", err, ctx.Err(), end.cause)
				}
				// The reply is in use again while the late one arrives. The
				// race detector watches as well.
				send(t, "the release", s.release, struct{}{})
				for i := range 20 {
					reply = fmt.Sprint("again ", i)
					callsEcho(t, c)
				}
				if reply != "again 19" {
					t.Errorf("a late reply was written: %q", reply)
				}
			})
		}
	}
}

func TestCallWithEndedContext(t *testing.T) {
	for _, wire := range callsWires {
		s := newCallsService(nil)
		c := callsOver(t, wire.client, wire.serve, s)
		ctx, cancel := context.WithCancelCause(context.Background())
		cancel(errCallsCause)
		err := Call(ctx, c, "Plugin.Block", "", new(string))
		if !errors.Is(err, context.Canceled) || !errors.Is(err, errCallsCause) {
			t.Errorf("%s: %v", wire.name, err)
		}
		callsEcho(t, c)
		if len(s.started) > 0 {
			t.Errorf("%s: the method was called", wire.name)
		}
	}
}

// A reply that the caller gave in the wrong form must fail its own call, also
// when nobody waits for it any more.
func TestCallBadReplyHolder(t *testing.T) {
	for name, reply := range map[string]any{"no pointer": "", "a struct": CallsBox{}, "nil pointer": (*CallsBox)(nil)} {
		t.Run(name, func(t *testing.T) {
			for _, method := range []string{"Plugin.Box", "Plugin.Bad"} {
				c := callsOver(t, callsOurs, callsServe, newCallsService(nil))
				var arg any = CallsBox{CallsInner{1}}
				if method == "Plugin.Bad" {
					arg = "none"
				}
				if err := Call(boundedContext(t), c, method, arg, reply); err == nil {
					t.Error("no error")
				}
				callsEcho(t, c)
				var out CallsBox
				if err := Call(boundedContext(t), c, "Plugin.Box", CallsBox{CallsInner{2}}, &out); err != nil || out.V != (CallsInner{2}) {
					t.Errorf("a later reply of the type did not arrive: %v, %v", out, err)
				}
			}
			// Given up at once, whoever is called.
			for _, wire := range callsWires {
				s := newCallsService(nil)
				c := callsOver(t, wire.client, wire.serve, s)
				ctx, cancel := context.WithTimeout(context.Background(), hangs)
				err := receive(t, "the end of Call", async(func() error { return Call(ctx, c, "Plugin.Block", "", reply) }))
				cancel()
				if err == nil || !strings.Contains(err.Error(), "Plugin.Block") || !strings.Contains(err.Error(), fmt.Sprintf("%T", reply)) {
					t.Errorf("%s: %v", wire.name, err)
				}
				callsEcho(t, c)
			}
		})
	}
	// net/rpc drops the reply if there is no place for it.
	c := callsOver(t, callsOurs, callsServe, newCallsService(nil))
	if err := Call(boundedContext(t), c, "Plugin.Box", CallsBox{CallsInner{1}}, nil); err != nil {
		t.Error(err)
	}
	callsEcho(t, c)
}

// callsRecorder is a connection that keeps what is written to it.
type callsRecorder struct {
	net.Conn
	mu      sync.Mutex
	written []byte
	writes  int
}

func (r *callsRecorder) Write(p []byte) (int, error) {
	r.mu.Lock()
	r.written = append(r.written, p...)
	r.writes++
	r.mu.Unlock()
	return r.Conn.Write(p)
}

// all is what was written, and in how many writes.
func (r *callsRecorder) all() ([]byte, int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.written, r.writes
}

// Without cancellation, Call sends byte by byte what c.Call sends.
func TestCallSendsNothingMore(t *testing.T) {
	record := func(call func(c *rpc.Client, out *string) error) ([]byte, int) {
		a, b := TestConn(t)
		callsServe(b, newCallsService(nil))
		r := &callsRecorder{Conn: a}
		c := newRPCClient(r, callsSpawn, new(sync.Pool))
		for range 10 {
			var out string
			if err := call(c, &out); err != nil || out != "x" {
				t.Fatal(out, err)
			}
		}
		c.Close()
		return r.all()
	}
	plain, writes := record(func(c *rpc.Client, out *string) error { return c.Call("Plugin.Echo", "x", out) })
	got, n := record(func(c *rpc.Client, out *string) error {
		ctx, cancel := context.WithTimeout(context.Background(), hangs)
		defer cancel()
		return Call(ctx, c, "Plugin.Echo", "x", out)
	})
	if !bytes.Equal(plain, got) || n != writes {
		t.Errorf("Call wrote %d bytes in %d writes, c.Call %d in %d", len(got), n, len(plain), writes)
	}
}

func TestCallAllocations(t *testing.T) {
	c := callsOver(t, callsOurs, callsServe, newCallsService(nil))
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	var out string
	measure := func(call func() error) float64 {
		return testing.AllocsPerRun(500, func() {
			if err := call(); err != nil {
				t.Fatal(err)
			}
		})
	}
	// The first of these also pays for what is cached from then on.
	measure(func() error { return Call(ctx, c, "Plugin.Echo", "x", &out) })
	plain := measure(func() error { return c.Call("Plugin.Echo", "x", &out) })
	ours := measure(func() error { return Call(ctx, c, "Plugin.Echo", "x", &out) })
	t.Logf("c.Call allocates %v times, Call %v times", plain, ours)
	if ours > plain+2 {
		t.Errorf("Call allocates %v times, c.Call %v times", ours, plain)
	}
}

// ---- Contexts in served methods ----

func TestServedContext(t *testing.T) {
	for _, test := range []struct {
		name string
		end  func(cancel func(), c *rpc.Client, here *MuxBroker)
		want []error // what the cause is
	}{
		{"cancel", func(cancel func(), _ *rpc.Client, _ *MuxBroker) { cancel() }, []error{errCanceled, context.Canceled}},
		{"deadline", nil, []error{errTimedOut, context.DeadlineExceeded}},
		{"client closed", func(_ func(), c *rpc.Client, _ *MuxBroker) { c.Close() }, []error{errCallerGone}},
		{"session closed", func(_ func(), _ *rpc.Client, here *MuxBroker) { here.Close() }, nil},
		{"connection lost", func(_ func(), _ *rpc.Client, here *MuxBroker) { here.session.mux.Close() }, nil},
	} {
		t.Run(test.name, func(t *testing.T) {
			callsBothWays(t, func(t *testing.T, here, there *MuxBroker) {
				s := newCallsService(nil)
				c, err := here.DialRPC(there.ServeRPC(s))
				if err != nil {
					t.Fatal(err)
				}
				defer c.Close()
				ctx, cancel := context.WithCancel(boundedContext(t))
				if test.end == nil {
					ctx, cancel = context.WithTimeout(ctx, 20*time.Millisecond)
				}
				defer cancel()
				done := async(func() error { return Call(ctx, c, "Plugin.Wait", "", new(string)) })
				receive(t, "the call", s.started)
				if test.end != nil {
					test.end(cancel, c, here)
				}
				cause := receive(t, "the end of the method's context", s.ended)
				for _, want := range test.want {
					if !errors.Is(cause, want) {
						t.Errorf("the context ended by %v; want %v", cause, want)
					}
				}
				if err := receive(t, "the end of Call", done); err == nil {
					t.Error("Call returned no error")
				}
			})
		})
	}
}

// When the host asks a plugin to quit, the contexts of its methods end, and
// so do those of the methods that the host serves to it.
func TestServedContextEndsWithQuit(t *testing.T) {
	host, c, s := callsPlugin(t, hclog.NewNullLogger())
	callback := newCallsService(nil)
	id := c.broker.ServeRPC(callback)
	waiting := async(func() error { return Call(boundedContext(t), c.Client, "Plugin.Wait", "", new(string)) })
	calling := async(func() error {
		return Call(boundedContext(t), c.Client, "Plugin.CallBack", CallsBack{ID: id, Method: "Plugin.Wait"}, new(string))
	})
	receive(t, "the call", s.started)
	receive(t, "the callback", callback.started)
	closed := async(host.Close)
	receive(t, "the end of the method's context", s.ended)
	receive(t, "the end of the callback's context", callback.ended)
	if err := receive(t, "Close", closed); err != nil {
		t.Error(err)
	}
	for _, done := range []<-chan error{waiting, calling} {
		if err := receive(t, "the end of Call", done); err == nil {
			t.Error("Call returned no error")
		}
	}
}

// One call's cancel is that call's alone, among many on one stream.
func TestCancelOneOfMany(t *testing.T) {
	callsBothWays(t, func(t *testing.T, here, there *MuxBroker) {
		const calls = 200
		s := newCallsService(nil)
		c, err := here.DialRPC(there.ServeRPC(s))
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		ctx, cancel := context.WithCancel(boundedContext(t))
		var canceled, released []<-chan error
		for i := range calls {
			with := boundedContext(t)
			if i%2 == 0 {
				with = ctx
			}
			done := async(func() error {
				var out string
				err := Call(with, c, "Plugin.Wait", fmt.Sprint(i), &out)
				if err == nil && out != fmt.Sprint(i) {
					err = fmt.Errorf("call %d got the reply %q", i, out)
				}
				return err
			})
			if i%2 == 0 {
				canceled = append(canceled, done)
			} else {
				released = append(released, done)
			}
		}
		for range calls {
			receive(t, "the calls", s.started)
		}
		cancel()
		for _, done := range canceled {
			if err := receive(t, "a cancelled call", done); !errors.Is(err, context.Canceled) {
				t.Error(err)
			}
			receive(t, "the end of a context", s.ended)
		}
		for range released {
			send(t, "a release", s.release, struct{}{})
		}
		for _, done := range released {
			if err := receive(t, "a released call", done); err != nil {
				t.Error(err)
			}
		}
		if len(s.ended) > 0 {
			t.Error("another call was cancelled, too:", <-s.ended)
		}
	})
}

// A cancel that comes too early, too late or again must do nothing.
func TestOddCancels(t *testing.T) {
	a, b := TestConn(t)
	s := newCallsService(nil)
	callsServe(b, s)
	enc, dec := gob.NewEncoder(a), gob.NewDecoder(a)
	_ = a.SetDeadline(time.Now().Add(hangs))
	send := func(method string, seq uint64, body any) {
		t.Helper()
		if err := errors.Join(enc.Encode(rpc.Request{ServiceMethod: method, Seq: seq}), enc.Encode(body)); err != nil {
			t.Fatal(err)
		}
	}
	answer := func(seq uint64, fails bool) {
		t.Helper()
		var resp rpc.Response
		var body string
		err := dec.Decode(&resp)
		into := any(&body)
		if resp.Error != "" {
			into = nil
		}
		if err := errors.Join(err, dec.Decode(into)); err != nil {
			t.Fatal(err)
		}
		if resp.Seq != seq || (resp.Error != "") != fails {
			t.Errorf("received %+v; want the answer to %d, failed: %v", resp, seq, fails)
		}
	}
	cancel := func(seq uint64, deadline any) { send(cancelMethod, seq|cancelBit, deadline) }

	cancel(1, true) // before its call
	send("Plugin.Wait", 1, "a")
	receive(t, "the call", s.started)
	cancel(77, false) // of no call
	send("Plugin.Echo", 2, "b")
	answer(2, false)
	if len(s.ended) > 0 {
		t.Error("a cancel that came before its call cancelled it:", <-s.ended)
	}
	cancel(2, true) // after its end
	cancel(1, false)
	cancel(1, true) // twice
	cancel(1, false)
	if cause := receive(t, "the end of the context", s.ended); !errors.Is(cause, errCanceled) {
		t.Error(cause)
	}
	answer(1, true)
	cancel(3, "no bool") // with what is no such argument
	send("Plugin.Wait", 3, "c")
	receive(t, "the call", s.started)
	cancel(3, CallsBox{}) // here it counts, and says no reason
	receive(t, "the end of the context", s.ended)
	answer(3, true)
	send(cancelMethod, 4, true) // without the bit it is a call like any other
	answer(4, true)
	send("Plugin.Echo", 5, "d")
	answer(5, false)
}

// ---- Bad values ----

// callsGoodBoxes are values that must arrive whatever has failed before.
var callsGoodBoxes = []CallsBox{
	{CallsInner{7}},
	{CallsMoody{Text: "fine"}},
	{[]any{CallsInner{1}, CallsBox{CallsDeep{[]string{"x"}}}, "text"}},
	{CallsBox{CallsBox{[]any{CallsDeep{[]string{"y"}}, CallsInner{3}, CallsMoody{Text: "good"}}}}},
	{map[string]any{"a": CallsInner{1}, "b": []any{CallsBox{}}}},
}

// callsBoxes sends good values to and fro.
func callsBoxes(t testing.TB, c *rpc.Client) {
	t.Helper()
	for _, box := range callsGoodBoxes {
		var out CallsBox
		if err := Call(boundedContext(t), c, "Plugin.Box", box, &out); err != nil || !reflect.DeepEqual(out, box) {
			t.Errorf("%v did not arrive: %v, %v", box, out, err)
		}
	}
	var moody CallsMoody
	if err := Call(boundedContext(t), c, "Plugin.Moody", CallsMoody{Text: "good"}, &moody); err != nil || moody.Text != "good" {
		t.Errorf("%v did not arrive: %v", moody, err)
	}
}

// callsBad is a call that fails: what it is made with, and what its error has
// to mention beside the method.
type callsBad struct {
	name, method string
	arg          any
	mentions     []string
}

var callsBadArguments = []callsBad{
	{"chan", "Plugin.Echo", make(chan int), []string{"chan int"}},
	{"func", "Plugin.Echo", func() {}, []string{"func()"}},
	{"unregistered", "Plugin.Box", CallsBox{callsHidden{1}}, []string{"CallsBox", "callsHidden"}},
	{"chan in any", "Plugin.Box", CallsBox{make(chan int)}, []string{"CallsBox", "chan int"}},
	{"nil pointer in any", "Plugin.Box", CallsBox{(*CallsInner)(nil)}, []string{"CallsBox", "CallsInner"}},
	{"nil", "Plugin.Echo", nil, []string{"nil"}},
	{"nil pointer", "Plugin.Box", (*CallsBox)(nil), []string{"*plugin.CallsBox"}},
	{"encode fails", "Plugin.Moody", CallsMoody{How: "encode fails"}, []string{"CallsMoody", "no encoding today"}},
	{"encode panics", "Plugin.Moody", CallsMoody{How: "encode panics"}, []string{"CallsMoody", "panic while encoding"}},
	{"encode panics in any", "Plugin.Box", CallsBox{CallsMoody{How: "encode panics"}}, []string{"CallsBox", "panic while encoding"}},
	{"nested", "Plugin.Box", CallsBox{[]any{CallsInner{1}, CallsBox{CallsDeep{[]string{"x"}}}, make(chan int)}}, []string{"CallsBox", "chan int"}},
	{"deeper", "Plugin.Box", CallsBox{CallsBox{CallsBox{[]any{CallsDeep{}, CallsInner{3}, CallsMoody{How: "encode panics"}}}}}, []string{"CallsBox"}},
}

func init() {
	self := map[string]any{}
	self["self"] = self
	callsBadArguments = append(callsBadArguments, callsBad{"holds itself", "Plugin.Box", CallsBox{self}, []string{"CallsBox", "itself"}})
}

// Arguments that can be sent and not be received.
var callsUndecodable = []callsBad{
	{"another type", "Plugin.Echo", 7, []string{"string"}},
	{"a struct", "Plugin.Echo", CallsInner{1}, []string{"string"}},
	{"no field in common", "Plugin.Box", CallsInner{1}, []string{"CallsBox"}},
	{"decode fails", "Plugin.Moody", CallsMoody{How: "decode fails"}, []string{"CallsMoody", "no decoding today"}},
	{"decode panics", "Plugin.Moody", CallsMoody{How: "decode panics"}, []string{"CallsMoody", "panic while decoding"}},
	{"decode fails in any", "Plugin.Box", CallsBox{[]any{CallsInner{1}, CallsMoody{How: "decode fails"}}}, []string{"CallsBox"}},
	{"decode panics in any", "Plugin.Box", CallsBox{[]any{CallsDeep{}, CallsMoody{How: "decode panics"}}}, []string{"CallsBox"}},
}

// Replies that cannot be sent.
var callsUnsendable = []callsBad{
	{"chan", "Plugin.BadChan", "", []string{"chan int"}},
	{"func", "Plugin.BadFunc", "", []string{"func()"}},
	{"chan in any", "Plugin.Bad", "chan", []string{"CallsBox", "chan int"}},
	{"func in any", "Plugin.Bad", "func", []string{"CallsBox", "func()"}},
	{"unregistered", "Plugin.Bad", "unregistered", []string{"CallsBox", "callsHidden"}},
	{"nil pointer in any", "Plugin.Bad", "nil pointer", []string{"CallsBox", "CallsInner"}},
	{"encode fails", "Plugin.MoodyReply", "encode fails", []string{"CallsMoody", "no encoding today"}},
	{"encode panics", "Plugin.MoodyReply", "encode panics", []string{"CallsMoody", "panic while encoding"}},
	{"encode panics in any", "Plugin.Bad", "encode panics", []string{"CallsBox"}},
	{"nested", "Plugin.Bad", "nested", []string{"CallsBox"}},
	{"deeper", "Plugin.Bad", "deeper", []string{"CallsBox"}},
}

func TestOneBadValueFailsOneCall(t *testing.T) {
	t.Parallel()
	for _, wire := range callsWires {
		for kind, bad := range map[string]struct {
			calls []callsBad
			can   bool
		}{
			"argument":             {callsBadArguments, wire.ours},
			"undecodable argument": {callsUndecodable, wire.served},
			"reply":                {callsUnsendable, wire.served},
		} {
			if !bad.can { // net/rpc itself breaks
				continue
			}
			t.Run(wire.name+"/"+kind, func(t *testing.T) {
				for _, call := range bad.calls {
					t.Run(call.name, func(t *testing.T) { testBadValues(t, wire.client, wire.serve, call) })
				}
				t.Run("all", func(t *testing.T) { testBadValues(t, wire.client, wire.serve, bad.calls...) })
			})
		}
	}
}

// testBadValues makes calls that fail, on one stream, beside one that does not.
func testBadValues(t *testing.T, client func(net.Conn) *rpc.Client, serve func(net.Conn, any), bad ...callsBad) {
	s := newCallsService(nil)
	c := callsOver(t, client, serve, s)
	var beside string
	done := async(func() error { return Call(boundedContext(t), c, "Plugin.Block", "beside", &beside) })
	receive(t, "the call beside", s.started)
	var others sync.WaitGroup
	for _, call := range bad {
		for _, how := range []string{"Call", "c.Call"} {
			others.Go(func() { callsEcho(t, c) })
			var err error
			var reply any = new(CallsBox)
			switch call.method {
			case "Plugin.BadChan":
				reply = new(chan int)
			case "Plugin.BadFunc":
				reply = new(func())
			case "Plugin.Echo":
				reply = new(string)
			case "Plugin.Moody", "Plugin.MoodyReply":
				reply = new(CallsMoody)
			}
			if how == "Call" {
				err = Call(boundedContext(t), c, call.method, call.arg, reply)
			} else {
				err = receive(t, "c.Call", async(func() error { return c.Call(call.method, call.arg, reply) }))
			}
			if err == nil {
				t.Errorf("%s %s: no error", how, call.name)
				continue
			}
			for _, want := range append(call.mentions, call.method) {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("%s %s: the error does not mention %s: %v", how, call.name, want, err)
				}
			}
			others.Go(func() { callsEcho(t, c) })
		}
	}
	others.Wait()
	callsBoxes(t, c)
	send(t, "the release", s.release, struct{}{})
	if err := receive(t, "the call beside", done); err != nil || beside != "beside" {
		t.Errorf("the call beside returned %q, %v", beside, err)
	}
}

// A reply that cannot be read fails its call alone, where Call is used.
func TestUndecodableReply(t *testing.T) {
	c := callsOver(t, callsOurs, callsServe, newCallsService(nil))
	for _, call := range []struct {
		method, arg string
		reply       any
	}{
		{"Plugin.Echo", "text", new(int)},
		{"Plugin.Echo", "text", new(CallsInner)},
		{"Plugin.MoodyReply", "decode fails", new(CallsMoody)},
		{"Plugin.MoodyReply", "decode panics", new(CallsMoody)},
	} {
		err := Call(boundedContext(t), c, call.method, call.arg, call.reply)
		if err == nil || !strings.Contains(err.Error(), call.method) || !strings.Contains(err.Error(), reflect.TypeOf(call.reply).String()) {
			t.Errorf("%s into %T: %v", call.method, call.reply, err)
		}
		callsEcho(t, c)
	}
	callsBoxes(t, c)
}

// A reply that nobody waits for any more may bring definitions of types that
// later ones use.
func TestAbandonedReplyKeepsStep(t *testing.T) {
	for _, wire := range callsWires[:2] {
		t.Run(wire.name, func(t *testing.T) {
			s := &callsSlowBox{newCallsService(nil)}
			c := callsOver(t, wire.client, wire.serve, s)
			for i := range callsGoodBoxes {
				ctx, cancel := context.WithCancel(context.Background())
				done := async(func() error { return Call(ctx, c, "Plugin.Slow", i, new(CallsBox)) })
				receive(t, "the call", s.started)
				cancel()
				if err := receive(t, "the end of Call", done); !errors.Is(err, context.Canceled) {
					t.Error(err)
				}
				send(t, "the release", s.release, struct{}{})
				for range 5 {
					callsEcho(t, c)
				}
			}
			callsBoxes(t, c)
		})
	}
}

// callsSlowBox returns boxes when it is released.
type callsSlowBox struct{ *CallsService }

func (s *callsSlowBox) Slow(i int, out *CallsBox) error {
	s.started <- ""
	<-s.release
	*out = callsGoodBoxes[i]
	return nil
}

// A type that encodes itself is not looked into: it may well hold itself.
func TestSelfEncodingType(t *testing.T) {
	for _, wire := range callsWires[:3] {
		c := callsOver(t, wire.client, wire.serve, newCallsService(nil))
		var out CallsRing
		if err := Call(boundedContext(t), c, "Plugin.Ring", newCallsRing("x"), &out); err != nil || out.Name != "x" {
			t.Errorf("%s: %q, %v", wire.name, out.Name, err)
		}
		callsEcho(t, c)
	}
}

// A reply that does not fit ends the client of a plain c.Call, as net/rpc has
// it, and nothing else: neither Kill nor a session waits for it.
func TestMisfitReply(t *testing.T) {
	c, p := start(t, config("greeter"))
	g := dispense[Greeter](t, p, "greeter").(*greeterClient)
	if err := g.client.Call("Plugin.Greet", new(any), new(int)); err == nil || !strings.Contains(err.Error(), "int") {
		t.Error("a string was read into an int:", err)
	}
	greets(t, p, "another client")
	returns(t, "Kill", c.Kill)
	if _, known := codecs.Load(g.client); known {
		t.Error("the client is still known")
	}
}

// What a stock encoder has cut in pieces, at types in interfaces that are new,
// is passed over to the last piece where the first cannot be decoded.
func TestPiecesOfAFailedValue(t *testing.T) {
	targets := map[string]func() any{
		"int":          func() any { return new(int) },
		"other struct": func() any { return new(CallsInner) },
		"other field":  func() any { return new(struct{ V string }) },
		"nothing":      func() any { return nil },
	}
	for _, v := range []CallsBox{{CallsInner{1}}, {[]any{CallsInner{1}, CallsDeep{[]string{"x"}}}}, {CallsBox{CallsDeep{}}}} {
		for name, target := range targets {
			var sent bytes.Buffer
			enc := gob.NewEncoder(&sent)
			for _, part := range []any{rpc.Response{Seq: 1}, v, rpc.Response{Seq: 2}, "after"} {
				if err := enc.Encode(part); err != nil {
					t.Fatal(err)
				}
			}
			r := newGobReader(&sent, new(sync.Pool))
			var first, second header
			var text string
			err := errors.Join(r.readHeader(&first), r.next())
			_ = r.decode(target()) // fails
			err = errors.Join(err, r.readHeader(&second), r.next(), r.decode(&text))
			if err != nil || first.Seq != 1 || second.Seq != 2 || text != "after" {
				t.Errorf("%v into %s: %v, %v, %q, %v", v, name, first, second, text, err)
			}
		}
	}
}

// ---- Readers of one stream after another ----

// callsSent returns what an encoder sends for values that follow each other.
func callsSent(t testing.TB, values ...any) []byte {
	t.Helper()
	var sent bytes.Buffer
	enc := gob.NewEncoder(&sent)
	for _, v := range values {
		if err := enc.Encode(v); err != nil {
			t.Fatal(err)
		}
	}
	return sent.Bytes()
}

// callsUsed returns a reader for a stream, that another stream had before, with
// what was seen there, headers and values in turns, and the pool that it goes to.
func callsUsed(t testing.TB, stream []byte, seen ...any) (*gobReader, *sync.Pool) {
	t.Helper()
	for range 1000 { // a pool may lose what it is given
		pool := new(sync.Pool)
		r := newGobReader(bytes.NewReader(callsSent(t, seen...)), pool)
		for i := 1; i < len(seen); i += 2 {
			if err := errors.Join(r.readHeader(new(header)), r.next(), r.decode(reflect.New(reflect.TypeOf(seen[i])).Interface())); err != nil {
				t.Fatal(err)
			}
		}
		r.release()
		if r := newGobReader(bytes.NewReader(stream), pool); r.used {
			return r, pool
		}
	}
	t.Fatal("a reader is never used again")
	return nil, nil
}

// callsHead is no header of net/rpc's, but has the same kinds of fields.
type callsHead struct {
	ServiceMethod string
	Num           uint64
}

// A reader that another stream had reads what a new one does, whatever the
// types were there, and takes in only what is new.
func TestReaderOfAnotherStream(t *testing.T) {
	response := rpc.Response{ServiceMethod: "Plugin.X", Seq: 1}
	renamed := func(b []byte) []byte { // as another process may have numbered them
		return bytes.ReplaceAll(bytes.ReplaceAll(b, []byte("\x01N\x01"), []byte("\x01M\x01")), []byte("\x01S\x01"), []byte("\x01Q\x01"))
	}
	for name, test := range map[string]struct {
		stream []byte // two headers, each with a value
		a, b   any    // what these are
		again  bool   // whether the next stream may have the reader
		quick  bool   // whether the decoder is given no definition
	}{
		"the same types":          {callsSent(t, response, CallsInner{7}, response, CallsDeep{[]string{"x"}}), CallsInner{7}, CallsDeep{[]string{"x"}}, true, true},
		"a new type":              {callsSent(t, response, CallsInner{7}, response, CallsFail{"a", "b"}), CallsInner{7}, CallsFail{"a", "b"}, true, false},
		"other headers":           {callsSent(t, rpc.Request{Seq: 1}, CallsInner{7}, rpc.Request{Seq: 2}, "x"), CallsInner{7}, "x", true, false},
		"headers of another kind": {callsSent(t, callsHead{"Plugin.X", 1}, CallsInner{7}, callsHead{"Plugin.Y", 2}, "x"), CallsInner{7}, "x", true, false},
		"the same by that number": {bytes.ReplaceAll(callsSent(t, response, CallsInner{7}, response, "x"), []byte("\x03Seq"), []byte("\x03Num")),
			CallsInner{7}, "x", false, false},
		"an interface":             {callsSent(t, response, CallsBox{CallsInner{7}}, response, CallsInner{8}), CallsBox{CallsInner{7}}, CallsInner{8}, false, false},
		"interfaces in interfaces": {callsSent(t, response, CallsBox{CallsBox{CallsDeep{[]string{"x"}}}}, response, CallsInner{8}), CallsBox{CallsBox{CallsDeep{[]string{"x"}}}}, CallsInner{8}, false, false},
		"values in a list":         {callsSent(t, response, CallsInner{7}, response, []any{CallsInner{1}, CallsDeep{}}), CallsInner{7}, []any{CallsInner{1}, CallsDeep{}}, false, false},
		"other types by the same numbers": {renamed(callsSent(t, response, CallsInner{7}, response, CallsDeep{[]string{"x"}})),
			struct{ M int }{7}, struct{ Q []string }{[]string{"x"}}, false, false},
		"one of them late": {slices.Concat(callsSent(t, response, CallsInner{7}, response), renamed(callsSent(t, response, CallsInner{7}, response, CallsDeep{[]string{"x"}})[len(callsSent(t, response, CallsInner{7}, response)):])),
			CallsInner{7}, struct{ Q []string }{[]string{"x"}}, false, false},
	} {
		used, pool := callsUsed(t, test.stream, response, CallsInner{1}, response, CallsDeep{})
		var heads [2]header // as a new reader reads them
		for _, r := range []*gobReader{newGobReader(bytes.NewReader(test.stream), new(sync.Pool)), used} {
			given := 0
			for i, want := range []any{test.a, test.b} {
				var h header
				got := reflect.New(reflect.TypeOf(want))
				err := errors.Join(r.readHeader(&h), r.next())
				given += len(r.defs)
				if err = errors.Join(err, r.decode(got.Interface())); err != nil || !reflect.DeepEqual(got.Elem().Interface(), want) {
					t.Errorf("%s: value %d is %+v and not %+v: %v", name, i, got.Elem(), want, err)
				}
				if r != used {
					heads[i] = h
				} else if !reflect.DeepEqual(h, heads[i]) {
					t.Errorf("%s: header %d is %+v and not %+v", name, i, h, heads[i])
				}
			}
			if err := r.next(); err != io.EOF {
				t.Errorf("%s: the stream ends with %v", name, err)
			}
			if r == used && test.quick && given > 0 {
				t.Errorf("%s: the decoder was given %d bytes of definitions", name, given)
			}
			if r == used && r.last == test.again {
				t.Errorf("%s: for another stream: %v", name, !r.last)
			}
		}
		if used.release(); !test.again && pool.Get() != nil {
			t.Errorf("%s: the reader is used again", name)
		}
	}
}

// A reader whose decoder has lost step is not used again, and one that was used
// finds the next message where the value of another one failed.
func TestReaderAfterAFailedValue(t *testing.T) {
	for name, stream := range map[string][]byte{
		"the same types": callsSent(t, rpc.Response{Seq: 1}, CallsInner{7}, rpc.Response{Seq: 2}, CallsInner{8}),
		"other headers":  callsSent(t, rpc.Request{Seq: 1}, CallsInner{7}, rpc.Request{Seq: 2}, CallsInner{8}),
		"an interface":   callsSent(t, rpc.Response{Seq: 1}, CallsBox{CallsBox{CallsDeep{}}}, rpc.Response{Seq: 2}, CallsInner{8}),
	} {
		r, pool := callsUsed(t, stream, rpc.Response{Seq: 1}, CallsInner{1})
		var first, second header
		var n int
		var inner CallsInner
		err := errors.Join(r.readHeader(&first), r.next())
		if r.decode(&n) == nil {
			t.Errorf("%s: a struct was read into an int", name)
		}
		err = errors.Join(err, r.readHeader(&second), r.next(), r.decode(&inner))
		if err != nil || first.Seq != 1 || second.Seq != 2 || inner.N != 8 {
			t.Errorf("%s: %v, %v, %v, %v", name, first, second, inner, err)
		}
		if r.release(); pool.Get() != nil {
			t.Errorf("%s: the reader is used again", name)
		}
	}
}

// Where there are interfaces, a decoder may learn of more types than can be
// seen outside the values, and one that others had may know them already.
func TestReaderOfInterfaces(t *testing.T) {
	var pool sync.Pool
	var alone any = CallsInner{7}
	boxed, plain := CallsBox{CallsBox{CallsInner{8}}}, CallsInner{9}
	for range 20 { // a pool may lose what it is given
		for i, sent := range []any{&alone, plain, boxed, plain, &alone, &alone, boxed, boxed, plain} {
			r := newGobReader(bytes.NewReader(callsSent(t, rpc.Response{Seq: 1}, sent)), &pool)
			want := reflect.Indirect(reflect.ValueOf(sent))
			got := reflect.New(want.Type())
			if err := errors.Join(r.readHeader(new(header)), r.next(), r.decode(got.Interface())); err != nil || !reflect.DeepEqual(got.Elem().Interface(), want.Interface()) {
				t.Fatalf("stream %d: %v, %v", i, got.Elem(), err)
			}
			r.release()
		}
	}
}

// CallsTree holds itself, and CallsMixed much else.
type CallsTree struct{ Left, Right *CallsTree }
type CallsMixed struct {
	CallsInner
	Parts map[string][]CallsDeep
	Tree  *CallsTree
	Mood  CallsMoody
	Any   []any
}

// Whatever streams went through a reader before, each is read like the first.
func TestAnyStreamAfterAnyOther(t *testing.T) {
	var alone, list any = CallsInner{7}, []any{CallsDeep{[]string{"x"}}, nil}
	values := []any{
		"text", uint32(7), CallsInner{1}, CallsDeep{[]string{"x"}}, &CallsTree{Left: &CallsTree{}}, []CallsDeep{{}, {[]string{"y"}}},
		map[string]*CallsInner{"a": {1}}, [8]byte{1}, &alone, &list, CallsMoody{Text: "fine"}, []any{CallsInner{1}, nil},
		CallsMixed{CallsInner{1}, map[string][]CallsDeep{"a": {{}}}, &CallsTree{}, CallsMoody{}, nil},
		CallsMixed{Any: []any{CallsBox{CallsInner{2}}, CallsBox{}}},
	}
	for _, box := range callsGoodBoxes {
		values = append(values, box)
	}
	types, random := newGobWriter(io.Discard), rand.New(rand.NewPCG(1, 2))
	for range 300 { // peers
		var pool sync.Pool
		kinds := 1 + random.IntN(len(values)) // few at times, that decoders are used longer
		for range 10 {                        // streams of one
			var sent, wanted []any
			for range 1 + random.IntN(4) {
				wanted = append(wanted, values[random.IntN(kinds)])
				sent = append(sent, rpc.Response{Seq: uint64(len(wanted))}, wanted[len(wanted)-1])
			}
			stream := callsSent(t, sent...)
			cut := len(stream)
			if random.IntN(4) == 0 {
				cut = random.IntN(cut)
			}
			r := newGobReader(bytes.NewReader(stream[:cut]), &pool)
			for i, want := range wanted {
				var h header
				if err := errors.Join(r.readHeader(&h), r.next()); err != nil || h.Seq != uint64(i+1) {
					if cut == len(stream) {
						t.Fatalf("header %d of %v: %v, %v", i, sent, h, err)
					}
					break
				}
				// gob itself loses what is defined inside a value that it drops.
				if random.IntN(4) == 0 && (i == len(wanted)-1 || !types.mayHoldInterfaces(reflect.TypeOf(want))) {
					_ = r.decode(nil)
					continue
				}
				whole := reflect.Indirect(reflect.ValueOf(want))
				got := reflect.New(whole.Type())
				if err := r.decode(got.Interface()); cut == len(stream) && (err != nil || !reflect.DeepEqual(got.Elem().Interface(), whole.Interface())) {
					t.Fatalf("value %d of %v: %+v, %v", i, sent, got.Elem(), err)
				}
			}
			r.release()
		}
	}
}

// A stream that ends between a definition and its value is cut short, and its
// decoder has not got the definition.
func TestReaderOfHalfAMessage(t *testing.T) {
	sent := callsSent(t, CallsInner{1})
	r := newGobReader(bytes.NewReader(sent[:1+sent[0]]), new(sync.Pool))
	if err := r.next(); err != io.ErrUnexpectedEOF {
		t.Error(err)
	}
	if r.release(); r.pool.Get() != nil {
		t.Error("it is kept")
	}
}

// A stream may end behind a value that nobody wanted.
func TestReaderThatDroppedTheLast(t *testing.T) {
	var pool sync.Pool
	for range 20 { // a pool may lose what it is given
		r := newGobReader(bytes.NewReader(callsSent(t, rpc.Response{Seq: 1}, "dropped")), &pool)
		if err := errors.Join(r.readHeader(new(header)), r.next(), r.decode(nil)); err != nil {
			t.Fatal(err)
		}
		r.release()
	}
}

// A reader that would hold much is not kept, and holds no more than was sent.
func TestReaderThatHoldsMuch(t *testing.T) {
	values := []any{rpc.Response{Seq: 1}, CallsInner{1}}
	r := newGobReader(bytes.NewReader(callsSent(t, values...)), new(sync.Pool))
	r.size = maxTypes + 1
	if err := errors.Join(r.readHeader(new(header)), r.next()); err != nil || !r.last || len(r.types) > 0 {
		t.Errorf("of many types: %v, %d, %v", r.last, len(r.types), err)
	}
	def := definitions(callsSent(t, CallsInner{1}))
	r, _ = callsUsed(t, bytes.Repeat(def, 2+maxTypes/len(def)), values...)
	if err := r.next(); err != io.ErrUnexpectedEOF || !r.last || len(r.own) > 0 {
		t.Errorf("of one definition again and again: %v, %d bytes, %v", r.last, len(r.own), err)
	}
	r = newGobReader(bytes.NewReader(callsSent(t, make([]byte, keepBuffer))), new(sync.Pool))
	if err := errors.Join(r.next(), r.decode(new([]byte))); err != nil || !r.last {
		t.Errorf("of a large message: %v, %v", r.last, err)
	}
	if r.release(); r.pool.Get() != nil {
		t.Error("it is kept")
	}
}

// gob has 32 bits of a type's number, however many are sent.
func TestReaderOfLongNumbers(t *testing.T) {
	sent := definitions(callsSent(t, CallsInner{1}))
	id, body := gobUint(sent[1:])
	long := binary.BigEndian.AppendUint64([]byte{0xf8}, id+1<<33)
	long = append(long, body...)
	r, _ := callsUsed(t, append([]byte{byte(len(long))}, long...), rpc.Response{Seq: 1}, CallsInner{1})
	if err := r.next(); err != io.ErrUnexpectedEOF || !r.last {
		t.Errorf("another number for the same type is taken for a new one: %v", err)
	}
}

// Both ends of a stream that is closed leave their readers to the next one.
func TestCallbacksShareReaders(t *testing.T) {
	callsBothWays(t, func(t *testing.T, here, there *MuxBroker) {
		for name, pool := range map[string]*sync.Pool{"the client's": &here.session.responses, "the server's": &there.session.requests} {
			await(t, name, func() bool { // a pool may lose what it is given
				c, err := here.DialRPC(there.ServeRPC(newCallsService(nil)))
				if err != nil {
					t.Fatal(err)
				}
				callsEcho(t, c)
				c.Close()
				return poll(100*time.Millisecond, func() bool { return pool.Get() != nil })
			})
		}
	})
}

// CallsNils returns interfaces that are nil.
type CallsNils struct{}

func (CallsNils) Echo(in string, out *string) error { *out = in; return nil }
func (CallsNils) Alone(_ string, out *any) error    { return nil }
func (CallsNils) Last(_ string, out *[]any) error   { *out = []any{1, nil}; return nil }

// gob, where it drops a value, reads on behind an interface that is nil. A call
// must not wait for that, nor must the next one lose its header to it.
func TestDroppedNils(t *testing.T) {
	for _, wire := range callsWires {
		c := callsOver(t, wire.client, wire.serve, CallsNils{})
		call := func(method string, args, reply any) error {
			return receive(t, wire.name, async(func() error { return c.Call(method, args, reply) }))
		}
		if wire.served {
			for _, args := range []any{new(any), []any{1, nil}, map[string]any{"x": nil}} {
				if err := call("Plugin.Nowhere", args, new(string)); err == nil || !strings.Contains(err.Error(), "Plugin.Nowhere") {
					t.Errorf("%s: %T to a missing method: %v", wire.name, args, err)
				}
				callsEcho(t, c)
			}
		}
		if wire.ours {
			for _, method := range []string{"Plugin.Alone", "Plugin.Last"} {
				if err := call(method, "", nil); err != nil {
					t.Errorf("%s: %s: %v", wire.name, method, err)
				}
				callsEcho(t, c)
			}
		}
	}
}

// ---- Methods that do not fit ----

func TestUnfitAndMissingMethods(t *testing.T) {
	for _, test := range []struct {
		method   string
		mentions []string
	}{
		{"Plugin.Unfit", []string{"Plugin.Unfit", "takes 1 argument"}},
		{"Plugin.Missing", []string{"can't find method Plugin.Missing", "Echo", "Wait", "older", "ProtocolVersion"}},
		{"Other.Echo", []string{"can't find service Other.Echo", "Plugin"}},
		{"Echo", []string{"ill-formed", "Echo"}},
	} {
		for _, wire := range callsWires {
			if !wire.served {
				continue
			}
			c := callsOver(t, wire.client, wire.serve, newCallsService(nil))
			err := Call(boundedContext(t), c, test.method, CallsBox{CallsInner{1}}, new(string))
			for _, want := range test.mentions {
				if err == nil || !strings.Contains(err.Error(), want) {
					t.Errorf("%s: %s: %v does not mention %q", wire.name, test.method, err, want)
				}
			}
			if !errors.As(err, new(rpc.ServerError)) {
				t.Errorf("%T is no rpc.ServerError", err)
			}
			callsBoxes(t, c)
		}
	}
}

// CallsUnusable has a method of every kind that cannot be called.
type CallsUnusable struct{}

func (CallsUnusable) Many(_, _, _ string) error                                { return nil }
func (CallsUnusable) NoPointer(_, _ string) error                              { return nil }
func (CallsUnusable) NoError(_ string, _ *string)                              {}
func (CallsUnusable) OtherResult(_ string, _ *string) bool                     { return false }
func (CallsUnusable) HiddenArgument(_ callsHidden, _ *string) error            { return nil }
func (CallsUnusable) HiddenReply(_ string, _ *callsHidden) error               { return nil }
func (CallsUnusable) Variadic(_ string, _ ...string) error                     { return nil }
func (CallsUnusable) ContextLast(_ string, _ *string, _ context.Context) error { return nil }

// CallsPointer has its method on the pointer.
type CallsPointer struct{}

func (*CallsPointer) Echo(in string, out *string) error { *out = in; return nil }

func TestDispenseWithoutUsableMethods(t *testing.T) {
	for _, test := range []struct {
		name     string
		v        any
		mentions []string
	}{
		{"unusable", CallsUnusable{}, []string{"CallsUnusable", "Many: it takes 3", "NoPointer: its reply, a string", "NoError: ", "OtherResult: ", "HiddenArgument: its argument", "HiddenReply: its reply", "Variadic: ", "ContextLast: "}},
		{"on the pointer", CallsPointer{}, []string{"CallsPointer", "pass a pointer"}},
		{"none", struct{}{}, []string{"no method"}},
		{"nil", nil, []string{"returned nil"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			client, _ := TestPluginRPCConn(t, PluginSet{"p": testPlugin{serves(test.v), func(*MuxBroker, *rpc.Client) (any, error) { return 1, nil }}}, nil)
			_, err := client.Dispense("p")
			for _, want := range test.mentions {
				if err == nil || !strings.Contains(err.Error(), want) {
					t.Errorf("%v does not mention %q", err, want)
				}
			}
			if err := client.Ping(); err != nil {
				t.Error(err)
			}
		})
	}
}

// What cannot be served as a callback is told to the one who calls it.
func TestServeRPCWithoutUsableMethods(t *testing.T) {
	callsBothWays(t, func(t *testing.T, here, there *MuxBroker) {
		for _, v := range []any{nil, CallsUnusable{}} {
			c, err := here.DialRPC(there.ServeRPC(v))
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			if err := Call(boundedContext(t), c, "Plugin.Echo", "", new(string)); err == nil || !strings.Contains(err.Error(), "cannot be called") {
				t.Error(err)
			}
		}
	})
}

// ---- Panics ----

func TestCallbackCannotCrashHost(t *testing.T) {
	var log syncBuffer
	_, c, _ := callsPlugin(t, hclog.New(&hclog.LoggerOptions{Output: &log, Level: hclog.Debug}))
	callback := newCallsService(nil)
	for _, method := range []string{"Panic", "NilError"} {
		log.Reset()
		id := c.broker.ServeRPC(callback)
		err := Call(boundedContext(t), c.Client, "Plugin.CallBack", CallsBack{id, "Plugin." + method, "a broken callback"}, new(string))
		if err == nil || method == "Panic" && !strings.Contains(err.Error(), "a broken callback") {
			t.Errorf("%s: the plugin got %v", method, err)
		}
		if out := log.String(); method == "Panic" && (!strings.Contains(out, "[ERROR]") || !strings.Contains(out, "a broken callback") || !strings.Contains(out, "plugin_test.go")) {
			t.Errorf("%s was logged as %s", method, out)
		}
		callsEcho(t, c.Client)
	}
	// The stream lives on, and what was served beside it.
	host, plugin := callsBrokers(t)
	s := newCallsService(nil)
	client, err := plugin.DialRPC(host.ServeRPC(s))
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	done := async(func() error { return Call(boundedContext(t), client, "Plugin.Block", "", new(string)) })
	receive(t, "the call beside", s.started)
	for range 3 {
		if err := Call(boundedContext(t), client, "Plugin.Panic", "boom", new(string)); err == nil || !strings.Contains(err.Error(), "boom") {
			t.Error(err)
		}
	}
	callsEcho(t, client)
	send(t, "the release", s.release, struct{}{})
	if err := receive(t, "the call beside", done); err != nil {
		t.Error(err)
	}
}

// A panic in a plugin ends it, and every caller learns of what.
func TestPluginPanics(t *testing.T) {
	t.Parallel()
	cfg := config("calls")
	_, p := start(t, cfg)
	c, other := dispense[*callsClient](t, p, "calls"), dispense[*callsClient](t, p, "calls")
	reader, err := c.broker.DialReader(1) // nobody serves it
	if err == nil {
		t.Error("there is a reader:", reader)
	}
	var inFlight []<-chan error
	for i := range 20 {
		client, method := c.Client, "Plugin.Block"
		if i%2 == 0 {
			client, method = other.Client, "Plugin.Wait"
		}
		inFlight = append(inFlight, async(func() error { return Call(boundedContext(t), client, method, "", new(string)) }))
	}
	callsEcho(t, c.Client)
	callsEcho(t, other.Client)
	inFlight = append(inFlight, async(func() error {
		return Call(boundedContext(t), c.Client, "Plugin.Panic", "the plugin's end", new(string))
	}))
	for _, done := range inFlight {
		err := receive(t, "a call in flight", done)
		var exit *ExitError
		if !errors.As(err, &exit) {
			// It may have been too late to be in flight.
			if !errors.Is(err, rpc.ErrShutdown) {
				t.Errorf("a call returned %T %v", err, err)
			}
			continue
		}
		if !strings.Contains(exit.Panic, "the plugin's end") || !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Errorf("a call returned %v", err)
		}
	}
	if err := receive(t, "a call after the end", async(func() error { return c.Call("Plugin.Echo", "", new(string)) })); !errors.Is(err, rpc.ErrShutdown) {
		t.Error("a later call returned", err)
	}
}

// ---- Errors ----

func TestErrorIdentity(t *testing.T) {
	cfg := config("calls")
	_, p := start(t, cfg)
	process := dispense[*callsClient](t, p, "calls").Client
	stockServer := callsOver(t, callsOurs, callsServeStock, newCallsService(nil))
	stockClient := callsOver(t, callsStock, callsServe, newCallsService(nil))
	for name, sentinel := range callsErrors {
		for _, how := range []string{"", "wrapped", "joined", "path"} {
			in := CallsFail{name, how}
			for _, method := range []string{"Plugin.Fail", "Plugin.FailWith"} {
				err := Call(boundedContext(t), process, method, in, new(string))
				testRemoteError(t, err, in.error().Error())
				for other, known := range callsErrors {
					if got, want := errors.Is(err, known), errors.Is(in.error(), known); got != want {
						t.Errorf("%s %s: errors.Is(%v, %s) is %v", name, how, err, other, got)
					}
				}
				if !errors.Is(err, sentinel) {
					t.Errorf("%s %s: %v has lost its identity", name, how, err)
				}
				if errors.Is(err, errCallsUnknown) {
					t.Errorf("%s %s: %v is an error that was not registered", name, how, err)
				}
			}
			testRemoteError(t, Call(boundedContext(t), stockServer, "Plugin.Fail", in, new(string)), in.error().Error())
			testRemoteError(t, Call(boundedContext(t), stockClient, "Plugin.Fail", in, new(string)), in.error().Error())
		}
	}
}

// testRemoteError checks that err is a server's error with that text.
func testRemoteError(t *testing.T, err error, text string) {
	t.Helper()
	var server rpc.ServerError
	if !errors.As(err, &server) || string(server) != text || err.Error() != text {
		t.Errorf("%T %v; want an rpc.ServerError with the text %q", err, err, text)
	}
}

// An error may register errors when it is asked what it is.
func TestRegisterErrorInside(t *testing.T) {
	returns(t, "an error's Is that registers another", func() { sendable(callsRegistering{}) })
}

// callsRegistering registers an error when it is asked what it is.
type callsRegistering struct{}

func (callsRegistering) Error() string { return "calls: registering" }
func (callsRegistering) Is(error) bool { RegisterError(errCallsKnown); return false }

func TestRegisterError(t *testing.T) {
	first, second := errors.New("calls: the same text"), errors.New("calls: the same text")
	RegisterError(first, second)
	RegisterError(second)
	t.Cleanup(func() { // or it would be the first when the test is run again
		namedMu.Lock()
		defer namedMu.Unlock()
		named = maps.Clone(named)
		delete(named, "registered: "+first.Error())
	})
	if got := knownErrors(errorNames(fmt.Errorf("wrapped: %w", first))); len(got) != 1 || got[0] != first {
		t.Error("the first is known as", got)
	}
	if got := errorNames(second); got != nil {
		t.Error("the second has the names", got)
	}
	if got := knownErrors([]string{"registered: by the other side alone", ""}); got != nil {
		t.Error("unknown names are known as", got)
	}
	defer func() {
		if recover() == nil {
			t.Error("a nil error does not panic")
		}
	}()
	RegisterError(nil)
}

// ---- Sizes ----

func TestLargeCall(t *testing.T) {
	t.Parallel()
	_, c, _ := callsPlugin(t, hclog.NewNullLogger())
	// Above 16 MiB gob writes a size with one byte more, and above 10 MiB it
	// reads in pieces. Beyond that, more of it is only more of the same.
	size := 17 << 20
	if *long {
		size = 256 << 20
	}
	in := make([]byte, size)
	for i := 0; i < len(in); i += 4093 {
		in[i] = byte(i)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	var out []byte
	began := time.Now()
	if err := Call(ctx, c.Client, "Plugin.Bytes", in, &out); err != nil || !bytes.Equal(in, out) {
		t.Errorf("%d bytes came back, %v", len(out), err)
	}
	t.Logf("%d MiB to and fro took %v", size>>20, time.Since(began))
	callsEcho(t, c.Client)
}

func TestTooLargeToSend(t *testing.T) {
	a, b := TestConn(t)
	callsServe(b, newCallsService(nil))
	r := &callsRecorder{Conn: a}
	c := newRPCClient(r, callsSpawn, new(sync.Pool))
	defer c.Close()
	callsEcho(t, c)
	before, _ := r.all()
	err := Call(context.Background(), c, "Plugin.Bytes", make([]byte, maxMessage+1), new([]byte))
	if err == nil || !strings.Contains(err.Error(), "stream") || !strings.Contains(err.Error(), "Plugin.Bytes") || !strings.Contains(err.Error(), "[]uint8") {
		t.Errorf("it was refused by %v", err)
	}
	if after, _ := r.all(); len(after) > len(before)+100 {
		t.Errorf("%d bytes of it were sent", len(after)-len(before))
	}
	callsEcho(t, c)
	// A reply likewise.
	if err := Call(context.Background(), c, "Plugin.Many", maxMessage+1, new([]byte)); err == nil || !strings.Contains(err.Error(), "stream") {
		t.Errorf("the reply was refused by %v", err)
	}
	callsEcho(t, c)
}

// callsForged are beginnings of a message that claim more than may be, or is.
var callsForged = map[string][]byte{
	"one byte above":     {0xfc, 0x40, 0, 0, 1, 0xff},
	"eight bytes":        {0xf8, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff},
	"a count too long":   {0x80, 1, 2, 3},
	"nothing":            {0},
	"text":               []byte("HTTP/1.1 400 Bad Request\r\nContent-Type: text/plain\r\n\r\n400 Bad Request: nothing for you to be seen here, so go away\n"),
	"as much as may be":  {0xfc, 0x40, 0, 0, 0, 1, 2, 3},
	"a cut count":        {0xfc, 0x40},
	"a definition alone": {0x03, 0x01, 0x02, 0x03},
}

func TestForgedMessages(t *testing.T) {
	for name, forged := range callsForged {
		t.Run(name, func(t *testing.T) {
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			// To a server: it hangs up.
			a, b := TestConn(t)
			callsServe(b, newCallsService(nil))
			_, _ = a.Write(forged)
			_ = a.(*net.TCPConn).CloseWrite()
			_ = a.SetDeadline(time.Now().Add(hangs))
			if _, err := io.ReadAll(a); err != nil && errors.Is(err, os.ErrDeadlineExceeded) {
				t.Error("the server did not hang up:", err)
			}
			// To a client: its calls fail.
			a, b = TestConn(t)
			c := callsOurs(a)
			defer c.Close()
			done := async(func() error { return Call(boundedContext(t), c, "Plugin.Echo", "x", new(string)) })
			_, _ = b.Read(make([]byte, 1))
			_, _ = b.Write(forged)
			_ = b.(*net.TCPConn).CloseWrite()
			if err := receive(t, "the call", done); err == nil || errors.Is(err, context.DeadlineExceeded) {
				t.Error("the call returned", err)
			}
			runtime.ReadMemStats(&after)
			if used := after.TotalAlloc - before.TotalAlloc; used > 32<<20 {
				t.Errorf("%d bytes of memory were allocated", used)
			}
		})
	}
	// The text says what is allowed.
	r := newGobReader(bytes.NewReader(callsForged["one byte above"]), new(sync.Pool))
	if err := r.next(); err == nil || !strings.Contains(err.Error(), fmt.Sprint(maxMessage+1)) || !strings.Contains(err.Error(), fmt.Sprint(maxMessage)) {
		t.Error(err)
	}
}

// ---- Streams by number ----

func TestBrokerTimeouts(t *testing.T) {
	t.Parallel()
	callsBothWays(t, func(t *testing.T, here, _ *MuxBroker) {
		for name, do := range map[string]func(context.Context, uint32) (net.Conn, error){"dialled": here.AcceptContext, "accepted": here.DialContext} {
			ctx, cancel := context.WithTimeoutCause(context.Background(), 50*time.Millisecond, errCallsCause)
			defer cancel()
			conn, err := do(ctx, 4711)
			if conn != nil || !errors.Is(err, context.DeadlineExceeded) || !errors.Is(err, errCallsCause) {
				t.Fatalf("%v, %v", conn, err)
			}
			for _, want := range []string{"4711", "other side", name} {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("%q does not say %q", err, want)
				}
			}
		}
	})
}

// Accept and Dial take five seconds, and so does everything that waits for the
// other side; afterwards nothing is left of it.
func TestNothingIsLeftAfterTimeout(t *testing.T) {
	t.Parallel()
	goroutines := ownGoroutines(t)
	host, plugin := callsBrokers(t)
	baseline := goroutines()
	began := time.Now()
	for i := range 300 {
		host.ServeReader(strings.NewReader("x"))
		plugin.ServeWriter(io.Discard)
		host.ServeRPC(newCallsService(nil))
		// Silent streams, and such as nobody accepts.
		st, err := plugin.session.open()
		if err != nil {
			t.Fatal(err)
		}
		if i%2 == 0 {
			_, _ = st.Write(callsID(uint32(1000 + i)))
		} else {
			_, _ = st.Write([]byte{1, 2})
		}
		t.Cleanup(func() { abort(st) })
	}
	for i, do := range []func(uint32) (net.Conn, error){host.Accept, plugin.Dial} {
		id, what := uint32(4712+i), []string{"dialled", "accept"}[i]
		conn, err := do(id)
		if conn != nil || err == nil || !strings.Contains(err.Error(), what) || !strings.Contains(err.Error(), fmt.Sprint(id)) {
			t.Errorf("%v, %v", conn, err)
		}
	}
	if took := time.Since(began); took < 5*time.Second {
		t.Errorf("Accept and Dial took %v together", took)
	}
	for _, b := range []*MuxBroker{host, plugin} {
		await(t, "the broker forgot all ids", func() bool {
			b.mu.Lock()
			defer b.mu.Unlock()
			return len(b.accepting)+len(b.parked) == 0
		})
	}
	await(t, "all goroutines ended", func() bool { return goroutines() <= baseline })
	callsTalk(t, host, plugin)
}

// callsTalk makes sure that two brokers work.
func callsTalk(t testing.TB, here, there *MuxBroker) {
	t.Helper()
	id := here.NextId()
	accepted := async(func() error {
		conn, err := there.AcceptContext(boundedContext(t), id)
		if err != nil {
			return err
		}
		defer conn.Close()
		_, err = io.Copy(conn, conn)
		return err
	})
	conn, err := here.DialContext(boundedContext(t), id)
	if err != nil {
		t.Fatal("the brokers do not work any more:", err)
	}
	_, _ = io.WriteString(conn, "hello")
	got := make([]byte, 5)
	_ = conn.SetReadDeadline(time.Now().Add(hangs))
	if _, err := io.ReadFull(conn, got); err != nil || string(got) != "hello" {
		t.Errorf("%q, %v", got, err)
	}
	conn.Close()
	if err := receive(t, "the accepting side", accepted); err != nil {
		t.Error(err)
	}
}

func TestBrokerOddStreams(t *testing.T) {
	leavesNothing(t)
	b, raw := callsRaw(t)
	open := func(send ...byte) *yamux.Stream {
		t.Helper()
		st, err := raw.OpenStream()
		if err != nil {
			t.Fatal(err)
		}
		_ = st.SetDeadline(time.Now().Add(hangs))
		if _, err := st.Write(send); err != nil {
			t.Fatal(err)
		}
		return st
	}
	silent := open()
	defer silent.Close()
	half := open(7)
	half.Close()
	// Dialled and closed before it is accepted: that one's end, no more.
	gone := open(callsID(5)...)
	gone.Close()
	conn, err := b.AcceptContext(boundedContext(t), 5)
	if err == nil {
		if _, err := conn.Read(make([]byte, 1)); err != io.EOF {
			t.Error("a closed stream reads", err)
		}
		conn.Close()
	}
	// Two for one id: the first is taken, the second hung up on.
	first := open(callsID(6)...)
	await(t, "the stream was parked", func() bool {
		b.mu.Lock()
		defer b.mu.Unlock()
		return b.parked[6] != nil
	})
	second := open(callsID(6)...)
	if _, err := second.Read(make([]byte, 1)); err != io.EOF {
		t.Error("the second stream reads", err)
	}
	conn, err = b.Accept(6)
	if err != nil {
		t.Fatal(err)
	}
	ack := make([]byte, 4)
	if _, err := io.ReadFull(first, ack); err != nil || !bytes.Equal(ack, callsID(6)) {
		t.Error("acknowledged as", ack, err)
	}
	conn.Close()
	// Two who accept one id.
	ctx, cancel := context.WithCancel(context.Background())
	one := async(func() error { _, err := b.AcceptContext(ctx, 8); return err })
	await(t, "it is being accepted", func() bool {
		b.mu.Lock()
		defer b.mu.Unlock()
		return b.accepting[8] != nil
	})
	if _, err := b.AcceptContext(ctx, 8); err == nil || !strings.Contains(err.Error(), "already") {
		t.Error("the second who accepts gets", err)
	}
	cancel()
	if err := receive(t, "the first who accepts", one); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	// A peer that acknowledges another number, a part of one, or hangs up.
	for _, ack := range [][]byte{callsID(99), {1, 2}, nil} {
		answered := async(func() error {
			st, err := raw.AcceptStream()
			if err == nil {
				_, err = io.ReadFull(st, make([]byte, 4))
				_, _ = st.Write(ack)
				_ = st.Close()
			}
			return err
		})
		if conn, err := b.DialContext(boundedContext(t), 9); err == nil || errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("acknowledged with %v: %v, %v", ack, conn, err)
		}
		if err := receive(t, "the peer", answered); err != nil {
			t.Error(err)
		}
	}
	raw.Close()
	if _, err := b.AcceptContext(boundedContext(t), 10); err == nil || errors.Is(err, context.DeadlineExceeded) {
		t.Error("after the end of the connection, accepting returned", err)
	}
	if _, err := b.DialContext(boundedContext(t), 10); err == nil || errors.Is(err, context.DeadlineExceeded) {
		t.Error("after the end of the connection, dialling returned", err)
	}
}

// Of two sides that dial one id, one gets it and the other learns of that.
func TestBrokerDuplicateDial(t *testing.T) {
	t.Parallel()
	host, plugin := callsBrokers(t)
	var dialling []<-chan error
	for range 2 {
		dialling = append(dialling, async(func() error {
			conn, err := host.DialContext(boundedContext(t), 5)
			if err == nil {
				conn.Close()
			}
			return err
		}))
	}
	var first, second <-chan error = dialling[0], dialling[1]
	var err error
	select {
	case err = <-first:
		first = second
	case err = <-second:
	}
	if err == nil || !strings.Contains(err.Error(), "stream 5") {
		t.Error("the second who dials gets", err)
	}
	conn, err := plugin.Accept(5)
	if err != nil {
		t.Fatal(err)
	}
	conn.Close()
	if err := receive(t, "the first who dials", first); err != nil {
		t.Error(err)
	}
}

// Ten thousand streams are open at once, and each is its own.
func TestTenThousandStreams(t *testing.T) {
	t.Parallel()
	const streams = 10000
	b, raw := callsRaw(t)
	type result struct {
		conns []net.Conn
		err   error
	}
	accepting := async(func() (r result) {
		ctx, cancel := context.WithTimeout(context.Background(), 10*hangs)
		defer cancel()
		for i := range streams {
			conn, err := b.AcceptContext(ctx, uint32(i+1))
			if err != nil {
				r.err = err
				return r
			}
			if _, err := conn.Write(callsID(uint32(i * 3))); err != nil {
				r.err = err
				return r
			}
			r.conns = append(r.conns, conn)
		}
		return r
	})
	var dialled []*yamux.Stream
	for i := range streams {
		st, err := raw.OpenStream()
		if err == nil {
			_, err = st.Write(callsID(uint32(i + 1)))
		}
		if err != nil {
			t.Fatal(err)
		}
		dialled = append(dialled, st)
	}
	var got [8]byte
	for i, st := range dialled {
		_ = st.SetDeadline(time.Now().Add(hangs))
		if _, err := io.ReadFull(st, got[:]); err != nil || !bytes.Equal(got[:], append(callsID(uint32(i+1)), callsID(uint32(i*3))...)) {
			t.Fatalf("stream %d reads %v, %v", i, got, err)
		}
	}
	r := receive(t, "the accepting side", accepting)
	if r.err != nil || len(r.conns) != streams {
		t.Fatalf("%d were accepted, %v", len(r.conns), r.err)
	}
	for i := range streams {
		dialled[i].Close()
		r.conns[i].Close()
	}
	await(t, "all streams were gone", func() bool { return streamsOf(b)+raw.NumStreams() == 0 })
}

// Many goroutines dial and accept on both sides, in any order.
func TestBrokerCrowd(t *testing.T) {
	leavesNothing(t)
	host, plugin := callsBrokers(t)
	var crowd sync.WaitGroup
	for range 500 {
		crowd.Go(func() { callsTalk(t, host, plugin) })
		crowd.Go(func() { callsTalk(t, plugin, host) })
	}
	crowd.Wait()
	streamsGone(t, host, plugin)
}

func TestNextIdsNeverMeet(t *testing.T) {
	host, plugin := callsBrokers(t)
	seen := make(map[uint32]bool)
	for _, begin := range []uint32{0, 1<<30 - 50, 1<<31 - 50, 1<<32 - 50} {
		host.ids.Store(begin)
		plugin.ids.Store(begin)
		clear(seen)
		for range 100 {
			for b, bit := range map[*MuxBroker]uint32{host: 1 << 31, plugin: 1 << 30} {
				id := b.NextId()
				// go-plugin's sides count from 1.
				if seen[id] || id&(3<<30) != bit || id&^(3<<30) == 0 {
					t.Fatalf("NextId returned %#x, after %#x", id, begin)
				}
				seen[id] = true
			}
		}
	}
}

// Closing a client ends the serving and the stream on the other side.
func TestClosingClientEndsServing(t *testing.T) {
	t.Run("dispensed", func(t *testing.T) {
		host, c, s := callsPlugin(t, hclog.NewNullLogger())
		streams := host.session.mux.NumStreams()
		plugin := s.broker.session.mux
		done := async(func() error { return Call(boundedContext(t), c.Client, "Plugin.Wait", "", new(string)) })
		receive(t, "the call", s.started)
		if err := c.Close(); err != nil {
			t.Error(err)
		}
		if err := receive(t, "the call in flight", done); !errors.Is(err, rpc.ErrShutdown) {
			t.Error("a call in flight returned", err)
		}
		if cause := receive(t, "the end of the context", s.ended); !errors.Is(cause, errCallerGone) {
			t.Error(cause)
		}
		await(t, "the stream was gone on both sides", func() bool {
			return host.session.mux.NumStreams() == streams-1 && plugin.NumStreams() == streams-1
		})
		if err := c.Close(); !errors.Is(err, rpc.ErrShutdown) {
			t.Error("a second Close returned", err)
		}
		if err := host.Ping(); err != nil {
			t.Error(err)
		}
	})
	t.Run("dialled", func(t *testing.T) {
		callsBothWays(t, func(t *testing.T, here, there *MuxBroker) {
			leavesNothing(t)
			for range 20 {
				c, err := here.DialRPC(there.ServeRPC(newCallsService(nil)))
				if err != nil {
					t.Fatal(err)
				}
				callsEcho(t, c)
				c.Close()
			}
			streamsGone(t, here, there)
		})
	})
	// The server is stuck with replies that nobody reads any more.
	t.Run("busy", func(t *testing.T) {
		callsBothWays(t, func(t *testing.T, here, there *MuxBroker) {
			stack := make([]byte, 1<<20)
			for range 5 {
				c, err := here.DialRPC(there.ServeRPC(newCallsService(nil)))
				if err != nil {
					t.Fatal(err)
				}
				gate := &CallsGate{make(chan struct{})} // stops the client from reading
				c.Go("Plugin.Gate", "", gate, nil)
				for !bytes.Contains(stack[:runtime.Stack(stack, true)], []byte("(*gobWriter).waitRoom")) {
					c.Go("Plugin.Many", 1<<18, new([]byte), nil)
				}
				for range 20 {
					c.Go("Plugin.Many", 1<<18, new([]byte), nil)
				}
				codec, _ := codecs.Load(c)
				if err := codec.(*clientCodec).w.drain(boundedContext(t)); err != nil {
					t.Error(err)
				}
				c.Close()
				close(gate.open)
			}
			streamsGone(t, here, there)
		})
	})
}

// MuxBroker.Close ends every wait, on both sides.
func TestBrokerCloseEndsEveryWait(t *testing.T) {
	leavesNothing(t)
	callsBothWays(t, func(t *testing.T, here, there *MuxBroker) {
		ctx := context.Background()
		s := newCallsService(nil)
		c, err := here.DialRPC(there.ServeRPC(s))
		if err != nil {
			t.Fatal(err)
		}
		pipe, write := io.Pipe() // a reader that has nothing to read
		defer write.Close()
		r, err := here.DialReader(there.ServeReader(pipe))
		if err != nil {
			t.Fatal(err)
		}
		block := make(chan struct{})
		defer close(block)
		w, err := here.DialWriter(there.ServeWriter(writerFunc(func(p []byte) (int, error) { <-block; return len(p), nil })))
		if err != nil {
			t.Fatal(err)
		}
		closing, err := here.DialWriter(there.ServeWriter(writerFunc(func(p []byte) (int, error) { <-block; return len(p), nil })))
		if err != nil {
			t.Fatal(err)
		}
		_, _ = closing.Write([]byte("x"))
		waits := map[string]<-chan error{
			"accept":        async(func() error { _, err := here.AcceptContext(ctx, 5); return err }),
			"dial":          async(func() error { _, err := here.DialContext(ctx, 6); return err }),
			"accept, there": async(func() error { _, err := there.AcceptContext(ctx, 7); return err }),
			"dial, there":   async(func() error { _, err := there.DialContext(ctx, 8); return err }),
			"call":          async(func() error { return Call(ctx, c, "Plugin.Wait", "", new(string)) }),
			"read":          async(func() error { _, err := io.ReadAll(r); return err }),
			"write":         async(func() error { _, err := io.Copy(w, callsZeros{}); return err }),
			"close":         async(closing.Close),
		}
		receive(t, "the call", s.started)
		await(t, "all wait", func() bool {
			here.mu.Lock()
			defer here.mu.Unlock()
			return here.accepting[5] != nil && here.parked[8] != nil
		})
		if err := here.Close(); err != nil {
			t.Error(err)
		}
		for name, done := range waits {
			if err := receive(t, name, done); err == nil {
				t.Errorf("%s returned no error", name)
			} else if name == "read" && err == io.EOF {
				t.Error("a cut reader is at a clean end")
			}
		}
		if err := here.Close(); err != nil {
			t.Error(err)
		}
		if _, err := here.Accept(9); err == nil {
			t.Error("Accept works after Close")
		}
		if _, err := here.Dial(9); err == nil {
			t.Error("Dial works after Close")
		}
	})
}

type callsZeros struct{}

func (callsZeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }

// A time-out of the broker is one, and nothing else.
func TestBrokerTimeoutIsOne(t *testing.T) {
	t.Parallel()
	host, _ := callsBrokers(t)
	_, err := host.Accept(host.NextId())
	if !errors.Is(err, context.DeadlineExceeded) || errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}

// More streams than yamux leaves unanswered wait to be accepted.
func TestManyParkedStreams(t *testing.T) {
	b, raw := callsRaw(t)
	const many = 600
	opened := async(func() (err error) {
		for id := uint32(1); id <= many && err == nil; id++ {
			var st *yamux.Stream
			if st, err = raw.OpenStream(); err == nil {
				_, err = st.Write(callsID(id))
			}
		}
		return err
	})
	if err := receive(t, "opening", opened); err != nil {
		t.Fatal(err)
	}
	for id := uint32(1); id <= many; id++ {
		conn, err := b.AcceptContext(boundedContext(t), id)
		if err != nil {
			t.Fatal(err)
		}
		conn.Close()
	}
}

// ---- Readers and writers ----

func TestReader(t *testing.T) {
	t.Parallel()
	lost := fmt.Errorf("the disk is gone: %w", fs.ErrPermission)
	for _, test := range []struct {
		name string
		size int
		err  error // what the reader ends with
	}{
		{"empty", 0, io.EOF},
		{"small", 5, io.EOF},
		{"a chunk", maxChunk, io.EOF},
		{"large", 2<<20 + 1, io.EOF},
		{"fails at once", 0, lost},
		{"fails half-way", 2<<20 + 7, lost},
		{"unexpected end", 100, io.ErrUnexpectedEOF},
		{"registered error", 100, errCallsKnown},
		{"unknown error", 100, errCallsUnknown},
		{"wraps the end", 100, fmt.Errorf("no clean end: %w", io.EOF)},
	} {
		t.Run(test.name, func(t *testing.T) {
			callsBothWays(t, func(t *testing.T, here, there *MuxBroker) {
				data := noise(test.size, 1)
				src := io.MultiReader(bytes.NewReader(data), readerFunc(func([]byte) (int, error) { return 0, test.err }))
				r, err := here.DialReader(there.ServeReader(src))
				if err != nil {
					t.Fatal(err)
				}
				got, err := io.ReadAll(r)
				if !bytes.Equal(got, data) {
					t.Errorf("%d bytes arrived of %d", len(got), len(data))
				}
				switch {
				case test.err == io.EOF && err != nil:
					t.Error("it ended with", err)
				case test.err != io.EOF:
					if err == nil {
						t.Fatal("it ended well")
					}
					testRemoteError(t, err, test.err.Error())
					for _, known := range callsErrors {
						if errors.Is(err, known) != errors.Is(test.err, known) {
							t.Errorf("errors.Is(%v, %v) is %v", err, known, errors.Is(err, known))
						}
					}
				}
				if _, again := r.Read(make([]byte, 1)); again == nil || test.err != io.EOF && again != err {
					t.Error("reading again returned", again)
				}
				if err := r.Close(); err != nil {
					t.Error(err)
				}
				streamsGone(t, here, there)
			})
		})
	}
}

// Data and error in one Read both arrive, and a panic is an error.
func TestOddReaders(t *testing.T) {
	callsBothWays(t, func(t *testing.T, here, there *MuxBroker) {
		for _, test := range []struct {
			name string
			r    io.Reader
			want string
			err  string
		}{
			{"both at once", readerFunc(func(p []byte) (int, error) { return copy(p, "last"), errCallsKnown }), "last", errCallsKnown.Error()},
			{"end with data", readerFunc(func(p []byte) (int, error) { return copy(p, "last"), io.EOF }), "last", ""},
			{"panic", readerFunc(func(p []byte) (int, error) { panic("a broken reader") }), "", "a broken reader"},
			{"nil error type", readerFunc(func(p []byte) (int, error) { return 0, (*callsNilError)(nil) }), "", "callsNilError"},
			{"no text", readerFunc(func(p []byte) (int, error) { return 0, errors.New("") }), "", "errorString"},
			{"long text", readerFunc(func(p []byte) (int, error) { return 0, errors.New(strings.Repeat("x", 3<<20)) }), "", "xxxxxxxx"},
		} {
			r, err := here.DialReader(there.ServeReader(test.r))
			if err != nil {
				t.Fatal(err)
			}
			got, err := io.ReadAll(r)
			if string(got) != test.want || (err == nil) != (test.err == "") || err != nil && !strings.Contains(err.Error(), test.err) {
				t.Errorf("%s: %q, %.100v", test.name, got, err)
			}
			r.Close()
		}
	})
}

// Closing a dialled reader early releases the serving end within a second,
// whether it waits for room or for the caller's own Read.
func TestReaderEarlyClose(t *testing.T) {
	leavesNothing(t)
	callsBothWays(t, func(t *testing.T, here, there *MuxBroker) {
		var served atomic.Int64
		r, err := here.DialReader(there.ServeReader(readerFunc(func(p []byte) (int, error) {
			served.Add(int64(len(p)))
			return len(p), nil
		})))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(r, make([]byte, 100)); err != nil {
			t.Fatal(err)
		}
		await(t, "the stream was full", func() bool { return served.Load() >= 256<<10 })
		began := time.Now()
		r.Close()
		gone := func() bool { return here.session.mux.NumStreams()+there.session.mux.NumStreams() == 0 }
		await(t, "the serving end was released", gone)
		if took := time.Since(began); took > 10*time.Second { // a second, on a machine that has time
			t.Errorf("it took %v", took)
		}
		if n, err := r.Read(make([]byte, 1)); n != 0 || !errors.Is(err, io.ErrClosedPipe) {
			t.Error("a closed reader reads", n, err)
		}
		r.Close()
		// One that is inside Read: its stream goes, the goroutine with Read.
		pipe, w := io.Pipe()
		r, err = here.DialReader(there.ServeReader(pipe))
		if err != nil {
			t.Fatal(err)
		}
		reading := async(func() error { _, err := r.Read(make([]byte, 1)); return err })
		r.Close()
		if err := receive(t, "a Read during Close", reading); !errors.Is(err, io.ErrClosedPipe) {
			t.Error("a Read during Close returned", err)
		}
		await(t, "the stream was gone", gone)
		if _, err := w.Write([]byte("x")); err != nil { // the caller's reader is not closed
			t.Error("our reader was closed:", err)
		}
		w.Close()
	})
}

// A slow reader slows the other side, however much there is to send.
func TestReaderBoundedMemory(t *testing.T) {
	callsBothWays(t, func(t *testing.T, here, there *MuxBroker) {
		const size, most = 16 << 20, 3 << 20
		var sent, received, worst int64
		var mu sync.Mutex // guards the above
		sum, want := crc32.NewIEEE(), crc32.NewIEEE()
		random := rand.NewChaCha8([32]byte{2})
		left := size
		r, err := here.DialReader(there.ServeReader(readerFunc(func(p []byte) (int, error) {
			n := min(len(p), left)
			if left -= n; n == 0 {
				return 0, io.EOF
			}
			_, _ = random.Read(p[:n])
			want.Write(p[:n])
			mu.Lock()
			defer mu.Unlock()
			sent += int64(n)
			worst = max(worst, sent-received)
			return n, nil
		})))
		if err != nil {
			t.Fatal(err)
		}
		defer r.Close()
		await(t, "the other side had begun", func() bool { mu.Lock(); defer mu.Unlock(); return sent >= 256<<10 })
		n, err := io.Copy(writerFunc(func(p []byte) (int, error) {
			mu.Lock()
			received += int64(len(p))
			mu.Unlock()
			return sum.Write(p)
		}), struct{ io.Reader }{r})
		if err != nil || n != size || sum.Sum32() != want.Sum32() {
			t.Errorf("%d bytes arrived of %d, %v; their sum is right: %v", n, size, err, sum.Sum32() == want.Sum32())
		}
		if worst > most {
			t.Errorf("%d bytes were on the way at once", worst)
		}
	})
}

// Close waits until the far writer has taken everything, however slow it is,
// and nothing more than a window is on the way.
func TestWriterSlow(t *testing.T) {
	t.Parallel()
	callsBothWays(t, func(t *testing.T, here, there *MuxBroker) {
		const size, most = 5 << 20, 3 << 20
		data := noise(size, 1)
		var got bytes.Buffer
		var taken, worst atomic.Int64
		last := make(chan struct{})
		w, err := here.DialWriter(there.ServeWriter(writerFunc(func(p []byte) (int, error) {
			if got.Len()+len(p) == size {
				<-last
			}
			taken.Add(int64(len(p)))
			return got.Write(p)
		})))
		if err != nil {
			t.Fatal(err)
		}
		for n := 0; n < size; n += 32 << 10 {
			if _, err := w.Write(data[n : n+32<<10]); err != nil {
				t.Fatal(err)
			}
			worst.Store(max(worst.Load(), int64(n)-taken.Load()))
		}
		closed := async(w.Close)
		select {
		case err := <-closed:
			t.Error("Close returned before everything was taken:", err)
		case <-time.After(100 * time.Millisecond):
		}
		close(last)
		if err := receive(t, "Close", closed); err != nil {
			t.Error(err)
		}
		if !bytes.Equal(got.Bytes(), data) {
			t.Errorf("%d bytes were written of %d", got.Len(), size)
		}
		if worst.Load() > most {
			t.Errorf("%d bytes were on the way at once", worst.Load())
		}
		if err := w.Close(); err != nil {
			t.Error("a second Close returned", err)
		}
		if _, err := w.Write([]byte("x")); !errors.Is(err, io.ErrClosedPipe) {
			t.Error("a Write after Close returned", err)
		}
	})
}

func TestWriterFails(t *testing.T) {
	t.Parallel()
	full := fmt.Errorf("the disk is full: %w", errCallsKnown)
	for _, test := range []struct {
		name  string
		after int
		write func(p []byte) (int, error) // once that many bytes have been written
		is    error
		text  string
	}{
		{"at once", 0, func([]byte) (int, error) { return 0, full }, errCallsKnown, full.Error()},
		{"half-way", 1 << 20, func([]byte) (int, error) { return 0, full }, errCallsKnown, full.Error()},
		{"standard", 10, func([]byte) (int, error) { return 0, &fs.PathError{Op: "write", Path: "/x", Err: fs.ErrClosed} }, fs.ErrClosed, "write /x"},
		{"short write", 10, func([]byte) (int, error) { return 0, nil }, nil, io.ErrShortWrite.Error()},
		{"panic", 10, func([]byte) (int, error) { panic("a broken writer") }, nil, "a broken writer"},
	} {
		t.Run(test.name, func(t *testing.T) {
			callsBothWays(t, func(t *testing.T, here, there *MuxBroker) {
				for _, size := range []int{test.after + 10, test.after + 4<<20} { // the error comes from Close, or from Write
					n := 0
					w, err := here.DialWriter(there.ServeWriter(writerFunc(func(p []byte) (int, error) {
						if n += len(p); n > test.after {
							return test.write(p)
						}
						return len(p), nil
					})))
					if err != nil {
						t.Fatal(err)
					}
					_, writeErr := w.Write(make([]byte, size))
					closeErr := w.Close()
					if closeErr == nil {
						t.Fatal("Close returned no error; Write returned", writeErr)
					}
					for _, err := range []error{writeErr, closeErr} {
						if err == nil {
							continue
						}
						if !strings.Contains(err.Error(), test.text) || test.is != nil && !errors.Is(err, test.is) {
							t.Errorf("%v; want %q that is %v", err, test.text, test.is)
						}
					}
					streamsGone(t, here, there)
				}
			})
		})
	}
}

// A reader that is cut off with its connection is at no clean end, and a
// writer has not written.
func TestStreamsLostConnection(t *testing.T) {
	callsBothWays(t, func(t *testing.T, here, there *MuxBroker) {
		pipe, feed := io.Pipe()
		defer feed.Close()
		r, err := here.DialReader(there.ServeReader(pipe))
		if err != nil {
			t.Fatal(err)
		}
		defer r.Close()
		w, err := here.DialWriter(there.ServeWriter(io.Discard))
		if err != nil {
			t.Fatal(err)
		}
		_, _ = feed.Write([]byte("begin"))
		if _, err := io.ReadFull(r, make([]byte, 5)); err != nil {
			t.Fatal(err)
		}
		there.session.mux.Close()
		if _, err := io.ReadAll(r); err == nil {
			t.Error("a reader that was cut off is at its end")
		}
		_, err = w.Write(make([]byte, 8<<20))
		if closeErr := w.Close(); closeErr == nil {
			t.Error("a writer that was cut off has written; Write returned", err)
		}
	})
}

// The kinds of both ends must go together, or the error says what is wrong.
func TestStreamKindMismatch(t *testing.T) {
	t.Parallel()
	callsBothWays(t, func(t *testing.T, here, there *MuxBroker) {
		raw := func(send string) func() uint32 {
			return func() uint32 {
				id := there.NextId()
				go func() {
					if conn, err := there.Accept(id); err == nil {
						_, _ = io.WriteString(conn, send)
						_, _ = io.Copy(io.Discard, conn)
						conn.Close()
					}
				}()
				return id
			}
		}
		reader := func(id uint32) (io.Closer, error) { return here.DialReader(id) }
		writer := func(id uint32) (io.Closer, error) { return here.DialWriter(id) }
		var all sync.WaitGroup
		for name, test := range map[string]struct {
			serve func() uint32
			dial  func(uint32) (io.Closer, error)
			want  string
		}{
			"reader of a writer":     {func() uint32 { return there.ServeWriter(io.Discard) }, reader, "does the same"},
			"writer of a reader":     {func() uint32 { return there.ServeReader(strings.NewReader("x")) }, writer, "does the same"},
			"reader of a service":    {func() uint32 { return there.ServeRPC(newCallsService(nil)) }, reader, "introduce"},
			"writer of a service":    {func() uint32 { return there.ServeRPC(newCallsService(nil)) }, writer, "introduce"},
			"reader of a raw stream": {raw("GET / HTTP/1.0"), reader, "need this library on both sides"},
			"writer of a raw stream": {raw("\x00\x00\x00\x00\x00"), writer, "need this library on both sides"},
			"reader of a silent one": {raw(""), reader, "introduce"},
			"writer of a silent one": {raw("mu"), writer, "introduce"},
		} {
			all.Go(func() {
				v, err := test.dial(test.serve())
				if err == nil {
					v.Close()
				}
				if err == nil || !strings.Contains(err.Error(), test.want) {
					t.Errorf("%s: %v does not say %q", name, err, test.want)
				}
			})
		}
		all.Go(func() { // a client learns it from its first call
			c, err := here.DialRPC(there.ServeReader(strings.NewReader("x")))
			if err != nil {
				t.Error(err)
				return
			}
			defer c.Close()
			if err := Call(boundedContext(t), c, "Plugin.Echo", "x", new(string)); err == nil || errors.Is(err, context.DeadlineExceeded) {
				t.Error("a call to a reader returned", err)
			}
		})
		all.Wait()
		streamsGone(t, here, there)
		callsTalk(t, here, there)
	})
}

// What comes over a reader's stream may be anything.
func TestHostileStreamFrames(t *testing.T) {
	verdict := func(b ...byte) []byte { return append([]byte{0, 0, 0, 0}, b...) }
	for name, send := range map[string][]byte{
		"a frame too large":     {0xff, 0xff, 0xff, 0xff, 1, 2, 3},
		"a cut length":          {1, 0},
		"a cut frame":           {10, 0, 0, 0, 1, 2, 3},
		"no end":                {},
		"a verdict too large":   verdict(0xff, 0xff, 0xff, 0x7f),
		"a cut verdict":         verdict(10, 0, 0, 0, 1),
		"a verdict that is not": verdict(4, 0, 0, 0, 1, 2, 3, 4),
		"no verdict":            verdict(),
	} {
		t.Run(name, func(t *testing.T) {
			b, raw := callsRaw(t)
			serving := async(func() error {
				st, err := raw.AcceptStream()
				if err == nil {
					_, err = io.ReadFull(st, make([]byte, 4))
				}
				if err == nil {
					_, err = st.Write(append(callsID(5), append([]byte(sourceTag), send...)...))
					_ = st.Close()
				}
				return err
			})
			r, err := b.DialReader(5)
			if err != nil {
				t.Fatal(err)
			}
			defer r.Close()
			if err := receive(t, "the peer", serving); err != nil {
				t.Error(err)
			}
			if err := receive(t, "the reader", async(func() error { _, err := io.ReadAll(r); return err })); err == nil {
				t.Error("it is at a clean end")
			}
		})
	}
}

// Helpers over a real process: a callback service calls through Call with its
// powers, from the plugin to the host.
func TestCallbackOverProcess(t *testing.T) {
	cfg := config("calls")
	client, p := start(t, cfg)
	c := dispense[*callsClient](t, p, "calls")
	callback := newCallsService(nil)
	serve := func(method, arg string) (string, error) {
		var out string
		err := Call(boundedContext(t), c.Client, "Plugin.CallBack", CallsBack{c.broker.ServeRPC(callback), method, arg}, &out)
		return out, err
	}
	if out, err := serve("Plugin.Echo", "round"); err != nil || out != "round" {
		t.Errorf("%q, %v", out, err)
	}
	if _, err := serve("Plugin.Panic", "ouch"); err == nil || !strings.Contains(err.Error(), "ouch") {
		t.Error(err)
	}
	// The host's cancel goes through the plugin's method into the callback.
	ctx, cancel := context.WithCancel(context.Background())
	done := async(func() error {
		return Call(ctx, c.Client, "Plugin.CallBack", CallsBack{c.broker.ServeRPC(callback), "Plugin.Wait", ""}, new(string))
	})
	receive(t, "the callback", callback.started)
	cancel()
	// The plugin's method closes its client at once, which may overtake.
	if cause := receive(t, "the end of the callback's context", callback.ended); !errors.Is(cause, context.Canceled) && !errors.Is(cause, errCallerGone) {
		t.Error(cause)
	}
	if err := receive(t, "the call", done); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	callsEcho(t, c.Client)
	client.Kill()
	if err := client.Err(); err != nil {
		t.Error(err)
	}
}

// CallsPipe is a reader and a writer of the host's.
type CallsPipe struct{ Reader, Writer uint32 }

// Pipe copies all from the reader to the writer.
func (s *CallsService) Pipe(in CallsPipe, _ *string) error {
	r, err := s.broker.DialReader(in.Reader)
	if err != nil {
		return err
	}
	defer r.Close()
	w, err := s.broker.DialWriter(in.Writer)
	if err != nil {
		return err
	}
	_, err = io.Copy(w, r)
	return errors.Join(err, w.Close())
}

// A plugin that reads a file of the host's and writes to it, in a process.
func TestPipeOverProcess(t *testing.T) {
	cfg := config("calls")
	_, p := start(t, cfg)
	c := dispense[*callsClient](t, p, "calls")
	data := noise(3<<20, 1)
	var got bytes.Buffer
	in := CallsPipe{c.broker.ServeReader(bytes.NewReader(data)), c.broker.ServeWriter(&got)}
	if err := Call(boundedContext(t), c.Client, "Plugin.Pipe", in, new(string)); err != nil || !bytes.Equal(got.Bytes(), data) {
		t.Errorf("%d bytes of %d were piped, %v", got.Len(), len(data), err)
	}
	lost := io.MultiReader(bytes.NewReader(data[:100]), readerFunc(func([]byte) (int, error) { return 0, errCallsKnown }))
	in = CallsPipe{c.broker.ServeReader(lost), c.broker.ServeWriter(io.Discard)}
	if err := Call(boundedContext(t), c.Client, "Plugin.Pipe", in, new(string)); !errors.Is(err, errCallsKnown) {
		t.Error("an error that went to and fro is", err)
	}
}

// ---- Garbage on the connection ----

// callsFeed is a connection on which a script arrives.
type callsFeed struct {
	script *bytes.Reader
	gate   <-chan struct{} // nothing arrives before it is closed; nil for none
	stall  bool            // the script has no end
	once   sync.Once
	closed chan struct{}
}

func newCallsFeed(script []byte) *callsFeed {
	return &callsFeed{script: bytes.NewReader(script), closed: make(chan struct{})}
}

func (f *callsFeed) Read(p []byte) (int, error) {
	if f.gate != nil {
		select {
		case <-f.gate:
		case <-f.closed:
		}
	}
	n, err := f.script.Read(p)
	if err != nil && f.stall {
		<-f.closed
	}
	return n, err
}

func (f *callsFeed) Write(p []byte) (int, error) {
	select {
	case <-f.closed:
		return 0, net.ErrClosed
	default:
		return len(p), nil
	}
}

func (f *callsFeed) Close() error {
	f.once.Do(func() { close(f.closed) })
	return nil
}

// callsFrame is a frame of yamux.
func callsFrame(kind byte, flags uint16, stream, length uint32, body ...byte) []byte {
	b := binary.BigEndian.AppendUint16([]byte{0, kind}, flags)
	b = binary.BigEndian.AppendUint32(b, stream)
	return append(binary.BigEndian.AppendUint32(b, length), body...)
}

// callsGarbage is what may arrive instead of a session.
func callsGarbage() map[string][]byte {
	syn := callsFrame(1, 1, 1, 0)
	ack := callsFrame(1, 2, 1, 0)
	garbage := map[string][]byte{
		"nothing":           nil,
		"text":              []byte("Usage: foo [-bar]\n"),
		"HTTP":              []byte("HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n"),
		"TLS":               {0x15, 3, 1, 0, 2, 2, 0x28},
		"zeros":             make([]byte, 1000),
		"ones":              bytes.Repeat([]byte{0xff}, 1000),
		"random":            noise(10000, 1),
		"another version":   append([]byte{1}, syn[1:]...),
		"unknown type":      callsFrame(9, 0, 1, 0),
		"a cut frame":       syn[:7],
		"a cut body":        append(bytes.Clone(syn), callsFrame(0, 0, 1, 100, 1, 2, 3)...),
		"hostile length":    append(bytes.Clone(syn), callsFrame(0, 0, 1, 1<<32-1, 1, 2, 3)...),
		"an unknown stream": callsFrame(0, 0, 77, 1<<32-1, 1, 2, 3),
		"window overflow":   bytes.Repeat(callsFrame(1, 0, 1, 1<<32-1), 100),
		"resets":            bytes.Repeat(callsFrame(1, 8, 1, 0), 10),
		"finished twice":    append(bytes.Clone(ack), bytes.Repeat(callsFrame(1, 4, 1, 0), 3)...),
		"acknowledgements":  bytes.Repeat(ack, 100),
		"opened twice":      append(bytes.Clone(syn), syn...),
		"go away":           callsFrame(3, 0, 0, 0),
		"go away in error":  callsFrame(3, 0, 0, 2),
		"pings":             bytes.Repeat(callsFrame(2, 1, 0, 7), 1000),
	}
	for i := range 1000 {
		garbage["many streams"] = append(garbage["many streams"], callsFrame(1, 1, uint32(2*i+1), 0)...)
		garbage["many streams of ours"] = append(garbage["many streams of ours"], callsFrame(1, 1, uint32(2*i+2), 0)...)
	}
	for name, forged := range callsForged {
		body := callsFrame(0, 0, 1, uint32(len(forged)), forged...)
		garbage["answered: "+name] = append(bytes.Clone(ack), body...)
		garbage["asked: "+name] = bytes.Join([][]byte{syn, callsFrame(1, 1, 3, 0), callsFrame(1, 1, 5, 0), body}, nil)
	}
	return garbage
}

// Whatever arrives, the session ends with an error, at either end, and memory
// stays bounded; so it does for what arrives and does not end.
func TestGarbage(t *testing.T) {
	leavesNothing(t)
	for name, script := range callsGarbage() {
		for _, stall := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, stalled: %v", name, stall), func(t *testing.T) {
				var before, after runtime.MemStats
				runtime.ReadMemStats(&before)
				feed := func() *callsFeed {
					f := newCallsFeed(script)
					f.stall = stall
					return f
				}
				conn := feed()
				client, err := NewRPCClient(conn, callsPlugins())
				if err == nil {
					ctx, cancel := context.WithTimeout(context.Background(), 20*time.Millisecond)
					defer cancel()
					if !stall {
						ctx = boundedContext(t)
					}
					if err := client.ping(ctx); err == nil || !stall && errors.Is(err, context.DeadlineExceeded) {
						t.Error("the plugin answers:", err)
					}
					client.session.close()
				}
				<-conn.closed
				server := &RPCServer{Plugins: callsPlugins()}
				conn = feed()
				serving := async(func() int { server.ServeConn(conn); return 0 })
				if stall {
					server.close()
				}
				receive(t, "ServeConn", serving)
				runtime.ReadMemStats(&after)
				if used := int64(after.HeapSys) - int64(before.HeapSys); used > 64<<20 {
					t.Errorf("%d bytes of memory were taken", used)
				}
			})
		}
	}
}

// A peer that takes stream numbers of the other side's ends the session.
func TestStreamNumbersOfOthers(t *testing.T) {
	leavesNothing(t)
	for _, host := range []bool{true, false} {
		a, b := TestConn(t)
		broker := callsBroker(t, a, host)
		stream := uint32(2)
		if host {
			stream = 1
		}
		if _, err := b.Write(callsFrame(1, 1, stream, 0)); err != nil {
			t.Fatal(err)
		}
		select {
		case <-broker.session.ended():
		case <-time.After(hangs):
			t.Error("the session lives on; host:", host)
		}
	}
}

// A logger at Trace sees the frames, one at Debug does not.
func TestFramesInTheLog(t *testing.T) {
	for _, level := range []hclog.Level{hclog.Trace, hclog.Debug} {
		var log syncBuffer
		cfg := config("calls")
		cfg.Logger = hclog.New(&hclog.LoggerOptions{Output: &log, Level: level})
		_, c := start(t, cfg)
		callsEcho(t, dispense[*callsClient](t, c, "calls").Client)
		for _, want := range []string{
			"from=host type=window flags=SYN stream=1 ",
			"from=plugin type=window flags=ACK stream=1 ",
			"from=host type=data flags=\"\" stream=1 length=",
			"from=plugin type=data flags=\"\" stream=7 length=",
		} {
			if level == hclog.Trace {
				await(t, want, func() bool { return strings.Contains(log.String(), want) })
			} else if strings.Contains(log.String(), "from=") {
				t.Errorf("frames are logged at %v:\n%s", level, &log)
			}
		}
	}
}

// ---- Flow: what a stream may send, by the account that the connection keeps ----

// takesNothing reports whether writing to the connection of s waits.
func takesNothing(s *session) bool {
	for range 50 {
		if s.frames.writing.TryLock() {
			s.frames.writing.Unlock()
			return false
		}
		time.Sleep(time.Millisecond)
	}
	return true
}

// rawStream returns a stream that is open here and the other end of it, which
// a yamux session of nobody's holds.
func rawStream(t testing.TB) (*MuxBroker, *stream, *yamux.Stream) {
	t.Helper()
	b, raw := callsRaw(t)
	accepted := async(func() (st *yamux.Stream) {
		if st, _ = raw.AcceptStream(); st != nil {
			_, _ = io.CopyN(st, st, 4)
		}
		return st
	})
	conn, err := b.DialContext(boundedContext(t), 1)
	if err != nil {
		t.Fatal(err)
	}
	return b, conn.(*stream), receive(t, "the other end", accepted)
}

// A Write stops where the window ends, and goes on when it is read.
func TestWriteWaitsForTheReader(t *testing.T) {
	t.Parallel()
	_, st, raw := rawStream(t)
	sent := make([]byte, 5*firstWindow+123)
	_, _ = cryptorand.Read(sent)
	_ = st.SetDeadline(time.Now().Add(100 * time.Millisecond))
	n, err := st.Write(sent)
	var late net.Error
	if n != firstWindow-4 || !errors.As(err, &late) || !late.Timeout() {
		t.Fatalf("of a Write that nobody reads came back %d, %v; the window is %d", n, err, firstWindow-4)
	}
	_ = st.SetWriteDeadline(time.Time{})
	writing := async(func() error { _, err := st.Write(sent[n:]); return err })
	got := make([]byte, len(sent))
	if _, err := io.ReadFull(iotest.OneByteReader(bufio.NewReader(raw)), got); err != nil || !bytes.Equal(got, sent) {
		t.Error("what arrives is not what was sent:", err)
	}
	if err := receive(t, "Write", writing); err != nil {
		t.Error(err)
	}
}

// A Write that waits for room ends with the stream or the session.
func TestWriteEnds(t *testing.T) {
	for _, test := range []struct {
		name string
		end  func(*MuxBroker, *stream, *yamux.Stream)
		want error
	}{
		{"closed here", func(_ *MuxBroker, st *stream, _ *yamux.Stream) { st.Close() }, yamux.ErrStreamClosed},
		{"given up here", func(_ *MuxBroker, st *stream, _ *yamux.Stream) { abort(st) }, nil},
		{"deadline", func(_ *MuxBroker, st *stream, _ *yamux.Stream) { st.SetWriteDeadline(time.Unix(1, 0)) }, yamux.ErrTimeout},
		{"broken off there", func(b *MuxBroker, st *stream, _ *yamux.Stream) {
			reset := make([]byte, frameHeader)
			reset[1], reset[3] = frameWindow, flagRST
			binary.BigEndian.PutUint32(reset[4:], st.StreamID())
			b.session.frames.pass(reset, true)
		}, yamux.ErrConnectionReset},
		{"session closed here", func(b *MuxBroker, _ *stream, _ *yamux.Stream) { b.session.close() }, yamux.ErrSessionShutdown},
		{"session closed there", func(_ *MuxBroker, _ *stream, raw *yamux.Stream) { raw.Session().Close() }, io.ErrUnexpectedEOF},
	} {
		t.Run(test.name, func(t *testing.T) {
			b, st, raw := rawStream(t)
			writing := async(func() error { _, err := st.Write(make([]byte, 2*firstWindow)); return err })
			await(t, "the window was used up", func() bool {
				b.session.frames.mu.Lock()
				defer b.session.frames.mu.Unlock()
				return st.flow.window == 0
			})
			test.end(b, st, raw)
			err := receive(t, "Write", writing)
			if err == nil || test.want != nil && !errors.Is(err, test.want) {
				t.Errorf("it ended with %v and not %v", err, test.want)
			}
			if _, err := st.Write([]byte("more")); test.name != "deadline" && err == nil {
				t.Error("one more Write works")
			}
		})
	}
}

// The frames are found wherever reads cut them.
func TestFramesInPieces(t *testing.T) {
	t.Parallel()
	a, b := TestConn(t)
	host := callsBroker(t, struct {
		io.Reader
		io.WriteCloser
	}{iotest.OneByteReader(a), a}, true)
	plugin := callsBroker(t, b, false)
	sent := make([]byte, firstWindow+1000)
	_, _ = cryptorand.Read(sent)
	w, err := plugin.DialWriter(host.ServeWriter(io.Discard))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write(sent); err != nil {
		t.Error(err)
	}
	if err := w.Close(); err != nil {
		t.Error(err)
	}
	r, err := host.DialReader(plugin.ServeReader(bytes.NewReader(sent)))
	if err != nil {
		t.Fatal(err)
	}
	got, err := io.ReadAll(r)
	if err != nil || !bytes.Equal(got, sent) {
		t.Errorf("%d bytes were read, %v", len(got), err)
	}
	r.Close()
	streamsGone(t, host, plugin)
}

// flowFile is a connection like a file that knows no deadlines: nothing can be
// written to it any more, and nothing comes from it.
type flowFile struct {
	once   sync.Once
	closed chan struct{}
}

func (f *flowFile) Read([]byte) (int, error)        { <-f.closed; return 0, os.ErrClosed }
func (f *flowFile) Write([]byte) (int, error)       { return 0, errCallsFault }
func (f *flowFile) Close() error                    { f.once.Do(func() { close(f.closed) }); return nil }
func (f *flowFile) SetReadDeadline(time.Time) error { return os.ErrNoDeadline }

// A connection that can be written to no more ends, also where it has deadlines
// in name only.
func TestFlowNoDeadlines(t *testing.T) {
	client, err := NewRPCClient(&flowFile{closed: make(chan struct{})}, callsPlugins())
	if err != nil {
		return
	}
	defer client.session.close()
	receive(t, "a call", async(func() error { return client.ping(context.Background()) }))
}

// Dial knows a bound also towards a peer that answers pings and takes no streams.
func TestFlowDialIsBounded(t *testing.T) {
	t.Parallel()
	b, _ := callsRaw(t) // never accepts
	ctx, cancel := context.WithCancel(context.Background())
	var all sync.WaitGroup
	for id := range uint32(256) {
		all.Go(func() { _, _ = b.DialContext(ctx, id) })
	}
	await(t, "all were opened", func() bool { return b.session.mux.NumStreams() == 256 })
	cancel()
	all.Wait()
	dialled := async(func() error { _, err := b.Dial(1000); return err })
	if err := receive(t, "Dial", dialled); !errors.Is(err, context.DeadlineExceeded) {
		t.Error("Dial failed with", err)
	}
}

// Accepting ends with its context also when the answer may not be sent.
func TestFlowAcceptIsBounded(t *testing.T) {
	a, c := TestConn(t)
	b := callsBroker(t, a, true)
	go io.Copy(io.Discard, c)
	const none = 1<<32 - firstWindow // takes the first window away
	_, _ = c.Write(append(callsFrame(frameWindow, flagSYN, 2, none), callsFrame(frameData, 0, 2, 4, callsID(7)...)...))
	ctx, cancel := context.WithTimeout(context.Background(), 100*time.Millisecond)
	defer cancel()
	accepting := async(func() error { _, err := b.AcceptContext(ctx, 7); return err })
	if err := receive(t, "AcceptContext", accepting); err == nil {
		t.Error("it ended with", err)
	}
}

// The account agrees with that of a stock peer after any traffic.
func TestFlowAccount(t *testing.T) {
	t.Parallel()
	for seed := range int64(5) {
		b, st, raw := rawStream(t)
		r := rand.New(rand.NewPCG(0, uint64(seed)))
		const total = 2 << 20
		data := noise(total, 1)
		both := []<-chan error{
			async(func() error {
				for left := data; len(left) > 0; {
					n := min(len(left), 1+r.IntN(400<<10)>>r.IntN(16))
					if _, err := st.Write(left[:n]); err != nil {
						return err
					}
					left = left[n:]
				}
				return nil
			}),
			async(func() error { _, err := raw.Write(data); return err }),
			async(func() error { return flowExpect(raw, data, seed) }),
			async(func() error { return flowExpect(st, data, seed+100) }),
		}
		for _, done := range both {
			if err := receive(t, "the traffic", done); err != nil {
				t.Fatal(err)
			}
		}
		// Everything has been read, so the peer has less than half of its window
		// yet to give back. What this side thinks it may send can be sent.
		var window uint32
		await(t, "the last of the window was given back", func() bool {
			b.session.frames.mu.Lock()
			defer b.session.frames.mu.Unlock()
			window = st.flow.window
			return window > firstWindow/2
		})
		if window > firstWindow {
			t.Fatal("the window is", window)
		}
		n, err := st.Write(make([]byte, window))
		if err != nil {
			t.Fatal(n, err)
		}
		st.Close()
		if got, err := io.ReadAll(raw); len(got) != n || err != nil {
			t.Fatal(len(got), n, err)
		}
		raw.Close()
		streamsGone(t, b)
	}
}

func flowExpect(from io.Reader, data []byte, seed int64) error {
	r := rand.New(rand.NewPCG(0, uint64(seed)))
	buf := make([]byte, 300<<10)
	for left := data; len(left) > 0; {
		n, err := from.Read(buf[:min(len(left), 1+r.IntN(len(buf))>>r.IntN(12))])
		if err != nil || !bytes.Equal(buf[:n], left[:n]) {
			return fmt.Errorf("%d bytes before the end: %w", len(left), err)
		}
		left = left[n:]
	}
	return nil
}

func flowConns(t testing.TB) map[string]func() (a, b net.Conn) {
	return map[string]func() (a, b net.Conn){
		"TCP":  func() (net.Conn, net.Conn) { return TestConn(t) },
		"pipe": net.Pipe,
		"TLS": func() (net.Conn, net.Conn) {
			a, b := TestConn(t)
			return flowTLS(t, a, b)
		},
	}
}

func flowTLS(t testing.TB, a, b net.Conn) (net.Conn, net.Conn) {
	ca, err := newCertificate()
	if err != nil {
		t.Fatal(err)
	}
	client := tls.Client(a, &tls.Config{InsecureSkipVerify: true})
	server := tls.Server(b, &tls.Config{Certificates: []tls.Certificate{ca}})
	shaken := async(client.Handshake)
	if err := server.Handshake(); err != nil {
		t.Fatal(err)
	}
	if err := receive(t, "the handshake", shaken); err != nil {
		t.Fatal(err)
	}
	return client, server
}

// Streams opened, used, half closed, given up and broken off in any order
// leave nothing behind at either end.
func TestFlowChurn(t *testing.T) {
	t.Parallel()
	rounds := 3
	if *long {
		rounds = 100
	}
	for name, conns := range flowConns(t) {
		t.Run(name, func(t *testing.T) {
			x, y := conns()
			sides := [2]*MuxBroker{callsBroker(t, x, true), callsBroker(t, y, false)}
			var crowd sync.WaitGroup
			for i := range 16 {
				crowd.Go(func() {
					r := rand.New(rand.NewPCG(0, uint64(i)))
					here, there := sides[i%2], sides[1-i%2]
					for range rounds {
						id := here.NextId()
						how := r.IntN(5)
						size := r.IntN(700<<10) >> r.IntN(15)
						data := noise(size, 1)
						patience := time.Duration(r.IntN(3000)) * time.Microsecond
						var pair sync.WaitGroup
						pair.Go(func() {
							ctx := boundedContext(t)
							if how == 4 {
								c, cancel := context.WithTimeout(ctx, patience)
								defer cancel()
								ctx = c
							}
							conn, err := there.DialContext(ctx, id)
							if err != nil {
								if how != 4 {
									t.Error(err)
								}
								return
							}
							defer conn.Close()
							if how == 0 {
								abort(conn)
								return
							}
							if _, err := conn.Write(data); err != nil && how < 3 {
								t.Error(how, err)
							}
							conn.Close() // half closed: what comes is still read
							got, err := io.ReadAll(conn)
							if how == 1 && (err != nil || !bytes.Equal(got, data)) {
								t.Error(how, len(got), err)
							}
						})
						pair.Go(func() {
							ctx := boundedContext(t)
							if how == 4 {
								c, cancel := context.WithTimeout(ctx, 20*time.Millisecond)
								defer cancel()
								ctx = c
							}
							conn, err := here.AcceptContext(ctx, id)
							if err != nil {
								if how != 4 {
									t.Error(err)
								}
								return
							}
							if how == 3 {
								_ = conn.SetReadDeadline(time.Now().Add(time.Millisecond))
							}
							got, err := io.ReadAll(conn)
							if how == 1 || how == 2 {
								if err != nil || !bytes.Equal(got, data) {
									t.Error(how, len(got), err)
								}
							}
							if how == 1 {
								_, _ = conn.Write(got)
							}
							if how == 3 {
								go io.Copy(io.Discard, conn)
								_ = conn.SetReadDeadline(time.Time{})
							}
							conn.Close()
						})
						pair.Wait()
					}
				})
			}
			receive(t, "the crowd", async(func() int { crowd.Wait(); return 0 }))
			for _, b := range sides {
				streamsGone(t, b)
				if n := reflect.ValueOf(b.session.mux).Elem().FieldByName("synCh").Len(); n != 0 {
					t.Error(n, "streams are still in flight for yamux")
				}
			}
		})
	}
}

// What waits for a socket that takes no more ends with the session, from
// either side.
func TestFlowStuckSocket(t *testing.T) {
	t.Parallel()
	for name, conns := range flowConns(t) {
		for _, here := range []bool{true, false} {
			t.Run(fmt.Sprintf("%s, closed here: %v", name, here), func(t *testing.T) {
				x, y := conns()
				s, err := newSession(context.Background(), x, true, hclog.NewNullLogger(), nil)
				if err != nil {
					t.Fatal(err)
				}
				defer s.close()
				var streams []*stream
				for range 200 { // nobody reads: the frames that open them wait
					st, err := s.open()
					if err != nil {
						t.Fatal(err)
					}
					streams = append(streams, st)
				}
				var writing, closing []<-chan error
				for _, st := range streams[:150] {
					writing = append(writing, async(func() error {
						for {
							if _, err := st.Write(make([]byte, 100<<10)); err != nil {
								return err
							}
						}
					}))
				}
				await(t, "the connection was full", func() bool { return takesNothing(s) })
				for i, st := range streams[100:] {
					closing = append(closing, async(func() error {
						if i%3 == 0 {
							st.session.frames.announce(st)
						}
						if i%2 == 0 {
							return abort(st)
						}
						return st.Close()
					}))
				}
				if here {
					receive(t, "close", async(func() int { s.close(); return 0 }))
				} else {
					_ = y.Close()
				}
				for _, w := range writing {
					if err := receive(t, "a Write", w); err == nil || !here && !errors.Is(err, io.ErrUnexpectedEOF) && !errors.Is(err, yamux.ErrStreamClosed) {
						t.Error("a Write ended with", err)
					}
				}
				for _, w := range closing {
					receive(t, "a Close", w)
				}
				await(t, "the session ended", s.mux.IsClosed)
			})
		}
	}
}

// callsFault is a connection that fails or stalls at its nth read or write.
type callsFault struct {
	net.Conn
	left   atomic.Int64
	stall  bool
	once   sync.Once
	closed chan struct{}
}

var errCallsFault = errors.New("calls: the line is cut")

func (f *callsFault) fault() error {
	if f.left.Add(-1) >= 0 {
		return nil
	}
	if f.stall {
		<-f.closed
	}
	return errCallsFault
}

func (f *callsFault) Read(p []byte) (int, error) {
	if err := f.fault(); err != nil {
		return 0, err
	}
	return f.Conn.Read(p)
}

func (f *callsFault) Write(p []byte) (int, error) {
	if err := f.fault(); err != nil {
		return 0, err
	}
	return f.Conn.Write(p)
}

func (f *callsFault) Close() error {
	f.once.Do(func() { close(f.closed) })
	return f.Conn.Close()
}

// A connection that fails or stalls at any moment fails what is done on it,
// cleanly, and leaves nothing behind.
func TestConnectionFaults(t *testing.T) {
	t.Parallel()
	for _, hosts := range []bool{true, false} {
		for _, stall := range []bool{false, true} {
			t.Run(fmt.Sprintf("at the host: %v, stalls: %v", hosts, stall), func(t *testing.T) {
				t.Parallel()
				for n := int64(0); ; n++ {
					if testFault(t, n, hosts, stall) {
						t.Log("it works with", n, "reads and writes")
						break
					}
					if n > 2000 {
						t.Fatal("it never works")
					}
				}
			})
		}
	}
}

// testFault does a bit of everything on a connection that fails at the nth
// read or write, and reports whether all of it went well.
func testFault(t *testing.T, n int64, hosts, stall bool) bool {
	a, b := TestConn(t)
	fault := &callsFault{stall: stall, closed: make(chan struct{})}
	fault.left.Store(n)
	if hosts {
		fault.Conn, a = a, fault
	} else {
		fault.Conn, b = b, fault
	}
	server := &RPCServer{Plugins: callsPlugins()}
	serving := async(func() int { server.ServeConn(b); return 0 })
	// hung reports whether it stalls, which may be for ever.
	hung := func(done func() bool) bool {
		t.Helper()
		await(t, "it ended or stalled", func() bool { return done() || stall && fault.left.Load() < 0 })
		for end := time.Now().Add(10 * time.Millisecond); !done(); time.Sleep(time.Millisecond) {
			if time.Now().After(end) {
				return true
			}
		}
		return false
	}
	var client *RPCClient
	connecting := async(func() (err error) { client, err = NewRPCClient(a, callsPlugins()); return err })
	if hung(func() bool { return len(connecting) > 0 }) {
		fault.Close() // the caller's own: NewRPCClient knows no bound
	}
	err := receive(t, "NewRPCClient", connecting)
	if err == nil {
		doing := async(func() error { return everything(client) })
		slow := hung(func() bool { return len(doing) > 0 })
		client.session.close()
		if err = receive(t, "the end of what was done", doing); err == nil && slow {
			err = errCallsFault
		}
	}
	server.close()
	receive(t, "ServeConn", serving)
	return err == nil
}

// everything uses a bit of everything.
func everything(client *RPCClient) error {
	ctx := context.Background()
	c, err := Dispense[*callsClient](client, "calls")
	if err != nil {
		return err
	}
	defer c.Close()
	var out string
	if err := Call(ctx, c.Client, "Plugin.Echo", "x", &out); err != nil || out != "x" {
		return fmt.Errorf("%q, %w", out, err)
	}
	back := CallsBack{c.broker.ServeRPC(newCallsService(nil)), "Plugin.Echo", "y"}
	if err := Call(ctx, c.Client, "Plugin.CallBack", back, &out); err != nil || out != "y" {
		return fmt.Errorf("%q, %w", out, err)
	}
	in := CallsPipe{c.broker.ServeReader(strings.NewReader("all of it")), 0}
	var got bytes.Buffer
	written := make(chan struct{})
	in.Writer = c.broker.ServeWriter(writerFunc(func(p []byte) (int, error) {
		defer close(written)
		return got.Write(p)
	}))
	if err := Call(ctx, c.Client, "Plugin.Pipe", in, &out); err != nil {
		return err
	}
	if <-written; got.String() != "all of it" {
		return fmt.Errorf("%q was written", got.String())
	}
	return client.Close()
}

// ---- A peer that takes nothing, or leaves everything open ----

// A stream that was closed has come to its end on the other side, also if the
// session ends right behind it.
func TestClosedBeforeTheEnd(t *testing.T) {
	t.Parallel()
	for _, late := range []bool{false, true} {
		t.Run(fmt.Sprintf("read late: %v", late), func(t *testing.T) {
			for range 50 {
				host, plugin := callsBrokers(t)
				accepting := async(func() net.Conn { conn, _ := plugin.AcceptContext(boundedContext(t), 1); return conn })
				conn, err := host.DialContext(boundedContext(t), 1)
				if err != nil {
					t.Fatal(err)
				}
				other := receive(t, "the other end", accepting)
				read := func() error {
					text, err := io.ReadAll(other)
					if string(text) != "all" && err == nil {
						err = fmt.Errorf("%q has come", text)
					}
					return err
				}
				reading := make(<-chan error)
				if !late {
					reading = async(read)
				}
				if _, err := conn.Write([]byte("all")); err != nil {
					t.Fatal(err)
				}
				_ = conn.Close()
				host.session.close()
				if late {
					receive(t, "the end of the session", plugin.session.ended())
					reading = async(read)
				}
				if err := receive(t, "reading", reading); err != nil {
					t.Fatal(err)
				}
			}
		})
	}
}

// A context that has ended leaves a stream that was dialled to another Accept.
func TestAcceptTooLate(t *testing.T) {
	t.Parallel()
	host, plugin := callsBrokers(t)
	dialling := async(func() error { _, err := plugin.DialContext(boundedContext(t), 1); return err })
	await(t, "the stream was parked", func() bool {
		host.mu.Lock()
		defer host.mu.Unlock()
		return host.parked[1] != nil
	})
	ended, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := host.AcceptContext(ended, 1); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	if _, err := host.Accept(1); err != nil {
		t.Error(err)
	}
	if err := receive(t, "DialContext", dialling); err != nil {
		t.Error(err)
	}
}

// stick makes the connection of s one that takes nothing more: its peer at the
// other end of conn has promised to read much and does not. The peer must be
// silent, and s must have no streams that the peer knows.
func stick(t testing.TB, s *session, conn net.Conn) {
	t.Helper()
	st, err := s.open()
	if err != nil {
		t.Fatal(err)
	}
	st.session.frames.announce(st)
	if _, err := conn.Write(callsFrame(frameWindow, flagACK, st.StreamID(), 1<<30)); err != nil {
		t.Fatal(err)
	}
	go func() { // ends with the session
		for {
			if _, err := st.Write(make([]byte, 1<<20)); err != nil {
				return
			}
		}
	}()
	await(t, "the connection was full", func() bool { return takesNothing(s) })
}

// While a connection takes nothing, streams are still closed and given up.
func TestStuckConnection(t *testing.T) {
	t.Parallel()
	here, there := TestConn(t)
	b := callsBroker(t, here, true)
	st, err := b.session.open()
	if err != nil {
		t.Fatal(err)
	}
	const parked, late = 77, 78
	if _, err := there.Write(callsFrame(frameData, flagSYN, 2, 4, callsID(parked)...)); err != nil {
		t.Fatal(err)
	}
	await(t, "the stream was parked", func() bool {
		b.mu.Lock()
		defer b.mu.Unlock()
		return b.parked[parked] != nil
	})
	stick(t, b.session, there)
	accept := func(id uint32) <-chan error {
		ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
		t.Cleanup(cancel)
		return async(func() error { _, err := b.AcceptContext(ctx, id); return err })
	}
	accepting := []<-chan error{accept(parked), accept(late)}
	if _, err := there.Write(callsFrame(frameData, flagSYN, 4, 4, callsID(late)...)); err != nil {
		t.Fatal(err)
	}
	for _, a := range accepting {
		if err := receive(t, "AcceptContext", a); !errors.Is(err, context.DeadlineExceeded) {
			t.Error("accepting ended with", err)
		}
	}
	returns(t, "Close of a stream", func() { _ = st.Close() })
	writing := async(func() error { _, err := st.Write([]byte("x")); return err })
	if err := receive(t, "a Write to a closed stream", writing); !errors.Is(err, yamux.ErrStreamClosed) {
		t.Error("a closed stream is written to:", err)
	}
	returns(t, "the end of the session", b.session.close)
}

// Pings that are answered do not count; too many that are not end the session.
func TestPingFlood(t *testing.T) {
	t.Parallel()
	for _, reads := range []bool{true, false} {
		t.Run(fmt.Sprintf("reads the answers: %v", reads), func(t *testing.T) {
			here, there := TestConn(t)
			s := callsBroker(t, here, true).session
			if !reads {
				stick(t, s, there)
			}
			_ = there.SetDeadline(time.Now().Add(hangs))
			const some = 256
			pings := bytes.Repeat(callsFrame(framePing, flagSYN, 0, 7), some)
			for n := 0; n < 2*maxPings; n += some {
				_, err := there.Write(pings)
				if err == nil && reads {
					_, err = io.CopyN(io.Discard, there, int64(len(pings)))
				}
				if err != nil {
					if reads {
						t.Fatalf("after %d pings: %v", n, err)
					}
					break // the session has ended
				}
			}
			if !reads {
				receive(t, "the end of the session", s.ended())
			}
		})
	}
}

// Streams that the other side opens and does not close end the session when
// there are too many.
func TestStreamFlood(t *testing.T) {
	t.Parallel()
	here, there := TestConn(t)
	s, err := newSession(context.Background(), here, true, hclog.NewNullLogger(), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer s.close()
	const some = 128 // fewer than yamux lets wait
	for n := 0; n <= maxStreams; n += some {
		var syns []byte
		for i := range some {
			syns = append(syns, callsFrame(frameWindow, flagSYN, uint32(2*(n+i+1)), 0)...)
		}
		if _, err := there.Write(syns); err != nil {
			t.Fatal(err)
		}
		for i := range some {
			_, err := s.accept()
			if (err != nil) != (n+i >= maxStreams) {
				t.Fatalf("stream %d: %v", n+i+1, err)
			}
			if err != nil {
				errorSays(t, err, "more than 65536 streams")
				receive(t, "the end of the session", s.ended())
				errorSays(t, s.explain(io.EOF), "more than 65536 streams")
				return
			}
		}
	}
}

// A host that takes no output, as one that is stopped, keeps the plugin neither
// from ending nor from another host.
func TestOutputToStoppedHost(t *testing.T) {
	t.Parallel()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	go func() { // ends with the pipe
		for {
			if _, err := w.Write(make([]byte, 64<<10)); err != nil {
				return
			}
		}
	}()
	server := &RPCServer{Plugins: PluginSet{}, Stdout: r, release: sync.OnceFunc(func() { w.Close() })}
	defer server.release()
	here, there := TestConn(t)
	ended := async(func() bool { server.ServeConn(there); return true })
	frames := callsFrame(frameWindow, flagSYN, 1, 0) // control
	frames = append(frames, callsFrame(frameWindow, flagSYN, 3, 1<<30)...)
	frames = append(frames, callsFrame(frameWindow, flagSYN, 5, 0)...)
	if _, err := here.Write(frames); err != nil {
		t.Fatal(err)
	}
	await(t, "the connection was full", func() bool {
		server.mu.Lock()
		defer server.mu.Unlock()
		for s := range server.sessions {
			return takesNothing(s)
		}
		return false
	})
	other, serving := TestConn(t)
	otherEnded := async(func() bool { server.ServeConn(serving); return true })
	host, err := NewRPCClient(other, PluginSet{})
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(host.SyncStreams(io.Discard, io.Discard), host.Ping()); err != nil {
		t.Error("another host:", err)
	}
	returns(t, "sending the last output", server.flush)
	returns(t, "ending the sessions", server.close)
	receive(t, "the first session", ended)
	receive(t, "the second session", otherEnded)
	_ = host.Close()
}

// A GobEncode or GobDecode that does not return costs Kill a moment, not more.
func TestKillStuckGob(t *testing.T) {
	for _, way := range []string{"encode", "decode"} {
		t.Run(way, func(t *testing.T) {
			leavesNothing(t)
			goOn, inside := make(chan struct{}), make(chan struct{})
			stuck := CallsStuck{func() { close(inside); <-goOn }}
			cfg := config("calls")
			c, p := start(t, cfg)
			client := dispense[*callsClient](t, p, "calls")
			done := async(func() error {
				if way == "encode" {
					return client.Call("Plugin.Echo", stuck, new(string))
				}
				return Call(context.Background(), client.Client, "Plugin.Stuck", "", &stuck)
			})
			receive(t, way, inside)
			if way == "encode" {
				// Have the codec's own goroutine wait for that, too.
				v, _ := codecs.Load(client.Client)
				kick := v.(*clientCodec).kick
				kick <- struct{}{}
				await(t, "the kick was taken", func() bool { return len(kick) == 0 })
			}
			within(t, "Kill", hangs, c.Kill)
			if !c.Exited() {
				t.Error("the plugin lives on")
			}
			close(goOn)
			receive(t, "the call", done)
		})
	}
}

// CallsStuck calls a function when it is encoded or decoded.
type CallsStuck struct{ f func() }

func (s CallsStuck) GobEncode() ([]byte, error) {
	if s.f != nil {
		s.f()
	}
	return []byte("x"), nil
}

func (s *CallsStuck) GobDecode([]byte) error { _, err := s.GobEncode(); return err }

// Stuck returns one that does nothing.
func (*CallsService) Stuck(string, *CallsStuck) error { return nil }

// ---- Schema evolution ----

// What one side sends and another version of it receives.
type (
	CallsV1 struct {
		Name string
		Size int
	}
	CallsAdded struct {
		Name  string
		Size  int
		Extra string
	}
	CallsGone   struct{ Name string }
	CallsRename struct {
		Title string
		Size  int
	}
	CallsRetype struct {
		Name string
		Size string
	}
	CallsWiden struct {
		Name string
		Size int64
	}
	CallsNarrow struct {
		Name string
		Size int8
	}
	CallsSign struct {
		Name string
		Size uint
	}
	CallsPtr struct {
		Name *string
		Size *int
	}
	CallsNested struct {
		Name string
		Size struct{ N int }
	}
	CallsOther struct {
		Title  string
		Length int
	}
	CallsOrder struct {
		Size int
		Name string
	}
)

// callsVersion serves methods with A as arguments and R as replies.
type callsVersion[A, R any] struct {
	got   A
	reply R
}

func (s *callsVersion[A, R]) Do(in A, out *R) error {
	s.got, *out = in, s.reply
	return nil
}

// testSchema sends a value of type A as an argument and as a reply to where
// type B is known; both must be want, or fail and mention fails.
func testSchema[A, B any](t *testing.T, name string, send A, want B, fails string) {
	t.Run(name, func(t *testing.T) {
		for _, wire := range callsWires[:3] {
			check := func(what string, got B, err error) {
				t.Helper()
				switch {
				case fails == "" && (err != nil || !reflect.DeepEqual(got, want)):
					t.Errorf("%s: %s: %+v arrived as %+v, %v", wire.name, what, send, got, err)
				case fails != "" && (err == nil || !strings.Contains(err.Error(), fails)):
					t.Errorf("%s: %s: %v does not say %q", wire.name, what, err, fails)
				}
			}
			if wire.served {
				s := &callsVersion[B, string]{}
				c := callsOver(t, wire.client, wire.serve, s)
				err := Call(boundedContext(t), c, "Plugin.Do", send, new(string))
				check("argument", s.got, err)
			}
			if wire.ours {
				c := callsOver(t, wire.client, wire.serve, &callsVersion[string, A]{reply: send})
				var got B
				err := Call(boundedContext(t), c, "Plugin.Do", "", &got)
				check("reply", got, err)
			}
		}
	})
}

// What gob does when a host and a plugin were built with different versions of
// a struct. The package's documentation tells users what follows from it.
func TestSchemaEvolution(t *testing.T) {
	v1, name, size := CallsV1{"x", 7}, "x", 7
	testSchema(t, "same", v1, v1, "")
	testSchema(t, "other order", v1, CallsOrder{7, "x"}, "")
	testSchema(t, "receiver has one more", v1, CallsAdded{"x", 7, ""}, "")
	testSchema(t, "sender has one more", CallsAdded{"x", 7, "y"}, v1, "")
	testSchema(t, "receiver has one less", v1, CallsGone{"x"}, "")
	testSchema(t, "sender has one less", CallsGone{"x"}, CallsV1{"x", 0}, "")
	testSchema(t, "renamed", v1, CallsRename{"", 7}, "")
	testSchema(t, "all renamed", v1, CallsOther{}, "no fields matched")
	testSchema(t, "retyped", v1, CallsRetype{}, "wrong type")
	testSchema(t, "wider", v1, CallsWiden{"x", 7}, "")
	testSchema(t, "narrower", v1, CallsNarrow{"x", 7}, "")
	testSchema(t, "narrower, out of range", CallsV1{"x", 1000}, CallsNarrow{}, "out of range")
	testSchema(t, "other sign", v1, CallsSign{}, "wrong type")
	testSchema(t, "pointers", v1, CallsPtr{&name, &size}, "")
	testSchema(t, "from pointers", CallsPtr{&name, &size}, v1, "")
	testSchema(t, "nested", v1, CallsNested{}, "type mismatch")
	// A field with its zero value is not sent at all.
	testSchema(t, "zero to pointer", CallsV1{"", 7}, CallsPtr{nil, &size}, "")
}

// ---- Fuzzing ----

// callsWritten returns what a client writes while f uses it.
func callsWritten(tb testing.TB, answer []byte, f func(c *rpc.Client)) []byte {
	tb.Helper()
	a, b := net.Pipe()
	r := &callsRecorder{Conn: a}
	c := newRPCClient(r, callsSpawn, new(sync.Pool))
	go func() { _, _ = b.Write(answer); _, _ = io.Copy(io.Discard, b) }()
	f(c)
	codec, _ := codecs.Load(c)
	_ = codec.(*clientCodec).w.drain(context.Background())
	c.Close()
	b.Close()
	written, _ := r.all()
	return written
}

// callsSessions returns what each end of a whole session writes, the host's first.
func callsSessions(tb testing.TB) [2][]byte {
	a, b := TestConn(tb)
	host, plugin := &callsRecorder{Conn: a}, &callsRecorder{Conn: b}
	server := &RPCServer{Plugins: callsPlugins()}
	serving := async(func() int { server.ServeConn(plugin); return 0 })
	client, err := NewRPCClient(host, callsPlugins())
	if err == nil {
		err = everything(client)
	}
	if err != nil {
		tb.Fatal(err)
	}
	client.session.close()
	receive(tb, "ServeConn", serving)
	return [2][]byte{host.written, plugin.written}
}

func callsSeeds(f *testing.F) {
	for _, script := range callsGarbage() {
		f.Add(script)
	}
}

// FuzzSessionHost is a host whose plugin sends anything.
func FuzzSessionHost(f *testing.F) {
	callsSeeds(f)
	f.Add(callsSessions(f)[1])
	f.Fuzz(func(t *testing.T, script []byte) {
		client, err := NewRPCClient(newCallsFeed(script), callsPlugins())
		if err != nil {
			return
		}
		if v, err := client.Dispense("calls"); err == nil {
			v.(*callsClient).Close()
		}
		_ = client.Close()
		if err := client.Ping(); err == nil {
			t.Error("a closed connection answers")
		}
	})
}

// CallsTame serves what ends by itself.
type CallsTame struct{}

func (CallsTame) Box(in CallsBox, out *CallsBox) error                { *out = in; return nil }
func (CallsTame) Echo(in string, out *string) error                   { *out = in; return nil }
func (CallsTame) Wait(ctx context.Context, _ string, _ *string) error { <-ctx.Done(); return ctx.Err() }

func callsTame() PluginSet {
	return PluginSet{"calls": testPlugin{serves(CallsTame{}), nil}}
}

// FuzzSessionPlugin is a plugin whose host sends anything.
func FuzzSessionPlugin(f *testing.F) {
	callsSeeds(f)
	f.Add(callsSessions(f)[0])
	f.Fuzz(func(t *testing.T, script []byte) {
		server := &RPCServer{Plugins: callsTame()}
		server.ServeConn(newCallsFeed(script))
		server.flush() // ends the contexts
	})
}

// FuzzRPCServer is an RPC stream's server whose client sends anything.
func FuzzRPCServer(f *testing.F) {
	for _, forged := range callsForged {
		f.Add(forged)
	}
	f.Add(callsWritten(f, nil, func(c *rpc.Client) {
		ctx, cancel := context.WithCancel(context.Background())
		for _, box := range callsGoodBoxes {
			c.Go("Plugin.Box", box, new(CallsBox), nil)
		}
		c.Go("Plugin.Missing", "x", new(string), nil)
		cancel()
		_ = Call(ctx, c, "Plugin.Wait", "x", new(string))
	}))
	f.Fuzz(func(t *testing.T, script []byte) {
		svc, err := newService(CallsTame{})
		if err != nil {
			t.Fatal(err)
		}
		readers := new(sync.Pool)
		for range 2 { // the second stream may get the first one's reader
			newRPCServer(newCallsFeed(script), map[string]*service{"Plugin": svc}, hclog.NewNullLogger(), true, readers).serve(context.Background())
		}
	})
}

// FuzzRPCClient is an RPC stream's client whose server sends anything.
func FuzzRPCClient(f *testing.F) {
	for _, forged := range callsForged {
		f.Add(forged)
	}
	a, b := TestConn(f)
	r := &callsRecorder{Conn: b}
	callsServe(r, newCallsService(nil))
	c := newRPCClient(a, callsSpawn, new(sync.Pool))
	for _, box := range callsGoodBoxes {
		_ = c.Call("Plugin.Box", box, new(CallsBox))
	}
	_ = c.Call("Plugin.Fail", CallsFail{"io.EOF", "wrapped"}, new(string))
	c.Close()
	written, _ := r.all()
	f.Add(written)
	f.Fuzz(func(t *testing.T, script []byte) {
		feed, gate := newCallsFeed(script), make(chan struct{})
		feed.gate = gate
		client := newRPCClient(feed, callsSpawn, new(sync.Pool))
		defer client.Close()
		var boxes [4]CallsBox
		calls := make(chan *rpc.Call, len(boxes))
		for i := range boxes {
			client.Go("Plugin.Box", callsGoodBoxes[i], &boxes[i], calls)
		}
		done := async(func() error { return Call(context.Background(), client, "Plugin.Box", CallsBox{}, &CallsBox{}) })
		close(gate)
		for range boxes {
			receive(t, "a call", calls)
		}
		receive(t, "Call", done)
		if err := client.Call("Plugin.Echo", "x", new(string)); err == nil {
			t.Error("a stream that has ended answers")
		}
	})
}

// FuzzBroker is a broker whose peer opens, uses and closes streams at will.
func FuzzBroker(f *testing.F) {
	f.Add([]byte("o1o2o3c"))
	f.Add([]byte("a1o1w>wwc"))
	f.Add([]byte("o9wmuxo9c"))
	f.Add([]byte("r1o1s<cr1o1s<w\x00\x00\x00\x00"))
	f.Add([]byte("r2o2s>w1"))
	f.Add([]byte("W1o1s>b\x03abcb\x00W2o2s>c"))
	f.Add([]byte("v1o1w\x7fd5d6a5"))
	f.Fuzz(func(t *testing.T, script []byte) {
		if len(script) > 200 {
			return
		}
		a, b := net.Pipe()
		raw, err := yamux.Server(b, quietYamux())
		if err != nil {
			t.Fatal(err)
		}
		go func() { // the streams that are dialled here
			for st, err := raw.AcceptStream(); err == nil; st, err = raw.AcceptStream() {
				_, _ = st.Write([]byte{5, 0, 0, 0, 'm', 'u', 'x', '<'})
			}
		}()
		s, err := newSession(context.Background(), a, true, hclog.NewNullLogger(), nil)
		if err != nil {
			t.Fatal(err)
		}
		broker := newMuxBroker(s)
		s.spawn(func() { defer s.cancel(); broker.Run() })
		ctx, cancel := context.WithCancel(context.Background())
		var users sync.WaitGroup
		use := func(f func()) { users.Go(f) }
		var st *yamux.Stream
		send := func(b ...byte) {
			if st != nil {
				_ = st.SetWriteDeadline(time.Now().Add(time.Second))
				_, _ = st.Write(b)
			}
		}
		next := func() (c byte) {
			if len(script) > 0 {
				c, script = script[0], script[1:]
			}
			return c
		}
		for len(script) > 0 {
			switch next() {
			case 'o': // open
				if st, err = raw.OpenStream(); err == nil {
					send(callsID(1<<31 | uint32(next()&0xf))...)
				}
			case 'O': // open and say nothing
				st, _ = raw.OpenStream()
			case 'w':
				send(next())
			case 'b': // a frame
				n := next()
				send(append([]byte{n, 0, 0, 0}, make([]byte, n)...)...)
			case 's': // introduce
				send('m', 'u', 'x', next())
			case 'c':
				if st != nil {
					_ = st.Close()
				}
			case 'a':
				id := 1<<31 | uint32(next()&0xf)
				use(func() {
					if conn, err := broker.AcceptContext(ctx, id); err == nil {
						_, _ = io.Copy(io.Discard, conn)
						conn.Close()
					}
				})
			case 'd':
				id := uint32(next())
				use(func() {
					if conn, err := broker.DialContext(ctx, id); err == nil {
						if src, err := newSource(conn.(*stream)); err == nil {
							_, _ = src.Write([]byte("text"))
							_ = src.Close()
						}
					}
				})
			case 'r':
				broker.ServeReader(strings.NewReader("text"))
			case 'W':
				broker.ServeWriter(io.Discard)
			case 'v':
				broker.ServeRPC(CallsTame{})
			}
		}
		cancel()
		raw.Close()
		s.close()
		users.Wait()
		broker.mu.Lock()
		defer broker.mu.Unlock()
		if len(broker.accepting)+len(broker.parked) > 0 {
			t.Errorf("left behind: %v, %v", broker.accepting, broker.parked)
		}
	})
}
